package helm_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"sync"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/santhosh-tekuri/jsonschema/v6"
)

// schemas returns the schemas of each kind, by apiVersion/kind. Kinds of Kubernetes have a
// schema of the oldest and of the newest version.
var schemas = sync.OnceValue(func() map[string][]*jsonschema.Schema {
	all := map[string][]*jsonschema.Schema{}
	paths, err := filepath.Glob("testdata/*.json")
	Expect(err).NotTo(HaveOccurred())
	for _, path := range paths {
		text, err := os.ReadFile(path)
		Expect(err).NotTo(HaveOccurred())
		document, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
		Expect(err).NotTo(HaveOccurred())
		compiler := jsonschema.NewCompiler()
		Expect(compiler.AddResource(path, document)).To(Succeed())
		definitions, ok := document.(map[string]any)["$defs"].(map[string]any)
		Expect(ok).To(BeTrue())
		for name := range definitions {
			if strings.Contains(name, "/") {
				schema, err := compiler.Compile(path + "#/$defs/" + strings.ReplaceAll(name, "/", "~1"))
				Expect(err).NotTo(HaveOccurred(), name)
				all[name] = append(all[name], schema)
			}
		}
	}
	return all
})

// check returns the problems of an object. The object must be as UnmarshalStrict returns it.
func check(o *object) (problems []string) {
	found := schemas()[o.APIVersion+"/"+o.Kind]
	if len(found) == 0 {
		return []string{"no schema of " + o.APIVersion + "/" + o.Kind}
	}
	for _, schema := range found {
		if err := schema.Validate(o.whole); err != nil {
			problems = append(problems, o.Metadata.Name+": "+err.Error())
		}
	}
	return problems
}

var _ = Describe("The schemas", func() {
	It("refuse a mistake in each kind", func(ctx SpecContext) {
		mistaken := map[string]bool{}
		all, err := tryRender(ctx, everything)
		Expect(err).NotTo(HaveOccurred())
		for _, o := range all {
			Expect(check(o)).To(BeEmpty())
			spec, ok := o.whole["spec"].(map[string]any)
			Expect(ok).To(BeTrue())
			spec["selektor"] = map[string]any{}
			Expect(check(o)).NotTo(BeEmpty(), o.Kind)
			mistaken[o.APIVersion+"/"+o.Kind] = true
		}
		for kind := range schemas() {
			Expect(mistaken).To(HaveKey(kind), "testdata has only kinds that the chart uses")
		}
	})
})
