package config_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/spf13/viper"

	"github.com/diehard-outbox/diehard/pkg/config"
)

var root = filepath.Join("..", "..")

var _ = Describe("the documentation", func() {
	DescribeTable("configs/ contains every key with its default",
		func(name string, keys []config.Key, load func(config.LoadOptions) error) {
			path := filepath.Join(root, "configs", name)
			file := viper.New()
			file.SetConfigFile(path)
			Expect(file.ReadInConfig()).To(Succeed())
			expected := make([]string, 0, len(keys))
			for _, key := range keys {
				expected = append(expected, key.Name)
				Expect(file.GetString(key.Name)).To(Equal(key.Default), key.Name)
			}
			Expect(file.AllKeys()).To(ConsistOf(expected))

			GinkgoT().Setenv("DIEHARD_POSTGRES_DSN", postgresDSN)
			GinkgoT().Setenv("DIEHARD_CLICKHOUSE_DSN", clickHouseDSN)
			Expect(load(config.LoadOptions{File: path})).To(Succeed())
		},
		Entry("of the API", "api.yaml", config.APIKeys(), func(o config.LoadOptions) error {
			_, _, err := config.LoadAPI(o)
			return err
		}),
		Entry("of the relay", "relay.yaml", config.RelayKeys(), func(o config.LoadOptions) error {
			_, _, err := config.LoadRelay(o)
			return err
		}),
	)

	DescribeTable("configs/ has a comment above every key",
		func(name string) {
			content, err := os.ReadFile(filepath.Join(root, "configs", name))
			Expect(err).NotTo(HaveOccurred())
			before := ""
			for line := range strings.Lines(string(content)) {
				trimmed := strings.TrimSpace(line)
				if _, value, isKey := strings.Cut(trimmed, ": "); isKey && value != "" && !strings.HasPrefix(trimmed, "#") {
					Expect(before).To(HavePrefix("#"), line)
				}
				before = trimmed
			}
		},
		Entry("of the API", "api.yaml"),
		Entry("of the relay", "relay.yaml"),
	)

	DescribeTable("docs/configuration.md contains the table of keys",
		func(keys []config.Key) {
			var table strings.Builder
			table.WriteString("| key | variable | default | meaning |\n| --- | --- | --- | --- |\n")
			for _, key := range keys {
				fallback := "`" + key.Default + "`"
				switch {
				case key.Required:
					fallback = "required"
				case key.Default == "":
					fallback = "none"
				}
				fmt.Fprintf(&table, "| `%s` | `%s` | %s | %s |\n", key.Name, key.Variable, fallback, key.Usage)
			}
			content, err := os.ReadFile(filepath.Join(root, "docs", "configuration.md"))
			Expect(err).NotTo(HaveOccurred())
			Expect(strings.Contains(string(content), table.String()+"\n")).To(BeTrue(),
				"the table must be:\n\n%s", table.String())
		},
		Entry("of the API", config.APIKeys()),
		Entry("of the relay", config.RelayKeys()),
	)
})
