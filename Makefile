# `make` lists what there is to do.

# The last release's tag with what came after it, or the commit before there is
# one. A nested module has tags of its own, such as tools/devstack/v0.1.0.
VERSION := $(shell git describe --tags --match 'v[0-9]*' --always --dirty 2>/dev/null || echo dev)
GOLANGCI_LINT := $(CURDIR)/bin/tools/golangci-lint
TEST_REPORT := test-report.json

# What `make test/all` runs: the suites that have long specs.
LONG_REPORT := test-all-report.json
LONG_PKG := ./test/chaos ./test/integration ./test/model

# The modules, the product's first. Each is built as others would build it: no
# workspace unifies their versions.
MODULES := . $(patsubst %/go.mod,%,$(wildcard */go.mod tools/devstack/go.mod))
export GOWORK := off

# What `make test` runs, and further flags for Ginkgo.
PKG ?= ./...
ARGS ?=

# How long `make test/chaos` goes on.
DURATION ?= 10m

# What `make test/fuzz` tries on each of the targets in these folders.
FUZZ ?= 2000x
FUZZ_DIRS := test/fuzz pkg/users

.DEFAULT_GOAL := help

.PHONY: help
help: ## list what there is to do
	@awk -F ':.*## ' '/^[a-z/-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: run
run: need-npm build ## run everything: PostgreSQL, ClickHouse, the API and the relay, until Ctrl-C
	bin/devstack up

.PHONY: demo
demo: need-npm build ## create 10,000 users and watch their events reach ClickHouse
	bin/devstack demo

# Ginkgo runs the examples and the seeds of the fuzz targets of a package along
# with its specs. CGO_ENABLED is for the race detector; the programs are built
# without it. If the machine lacks something, the specs that need it are left out
# and named, unless DIEHARD_TEST_REQUIRE_ALL is set.
GINKGO = CGO_ENABLED=$(if $(HAS_CC),1,0) DIEHARD_DEVSTACK_BIN='$(CURDIR)/bin/devstack' go tool ginkgo run \
	-r -p $(if $(HAS_CC),--race) --randomize-all --randomize-suites --keep-going \
	--require-suite --fail-on-pending --timeout=75m --poll-progress-after=1m --output-dir=bin

.PHONY: test
test: need-npm want-cc build ## run every suite with the race detector (PKG=./pkg/outbox: one; ARGS=…: flags for Ginkgo)
	@rm -f bin/$(TEST_REPORT)
	@$(GINKGO) --fail-on-empty --label-filter='!long' --json-report=$(TEST_REPORT) $(ARGS) $(PKG); \
	status=$$?; go run ./tools/testsummary -left-out bin/$(TEST_REPORT) >&2; exit $$status

# The specs with the label long repeat, soak, grow or exhaust what a spec of
# `make test` shows once.
.PHONY: test/all
test/all: need-npm want-cc build ## run the long specs, which `make test` leaves out
	@rm -f bin/$(LONG_REPORT)
	@$(GINKGO) --label-filter=long --json-report=$(LONG_REPORT) $(ARGS) $(LONG_PKG)

# Each target in its turn, since the go command fuzzes one at a time. FUZZ is a
# time, as in 10m, or a number of inputs.
.PHONY: test/fuzz
test/fuzz: need-npm build ## send the API and its parsers what a fuzzer thinks of (FUZZ=2000x: how much for each)
	@for dir in $(FUZZ_DIRS); do \
		listed=$$(go -C $$dir test -list '^Fuzz' .) && targets=$$(echo "$$listed" | grep '^Fuzz') || { echo "$$dir: $$listed"; exit 1; }; \
		for target in $$targets; do \
			DIEHARD_DEVSTACK_BIN='$(CURDIR)/bin/devstack' go -C $$dir test -run '^$$' -fuzz "^$$target\$$" -fuzztime '$(FUZZ)' . || exit; \
		done; \
	done

# The same run again: SEED=, with the number that it printed.
.PHONY: test/chaos
test/chaos: need-npm build ## break everything at random for a while (DURATION=10m, SEED=…)
	DIEHARD_DEVSTACK_BIN='$(CURDIR)/bin/devstack' DIEHARD_CHAOS_DURATION='$(DURATION)' go tool ginkgo run \
		--focus '^chaos Chaos ' --fail-on-empty $(if $(SEED),--seed=$(SEED)) --timeout=24h --poll-progress-after=5m ./test/chaos

.PHONY: test/outcomes
test/outcomes: need-npm build ## break everything, and write what came of it into docs/delivery.md
	DIEHARD_TEST_REQUIRE_ALL=1 DIEHARD_DEVSTACK_BIN='$(CURDIR)/bin/devstack' DIEHARD_CHAOS_OUTCOMES='$(CURDIR)/docs/delivery.md' go tool ginkgo run \
		-p --timeout=1h --poll-progress-after=5m ./test/chaos

# The parts of the benchmarks to run; ARGS has flags for them.
BENCH ?=
BENCH_PKG := ./pkg/outbox ./pkg/relay/store ./pkg/users ./pkg/sink/clickhouse
RUN_BENCH = DIEHARD_DEVSTACK_BIN='$(CURDIR)/bin/devstack' bin/bench

.PHONY: bench
bench: build/bench ## measure Diehard against what the databases take (BENCH=relay: a part; ARGS=--json)
	$(RUN_BENCH) $(ARGS) $(BENCH)

.PHONY: bench/docs
bench/docs: build/bench ## measure everything, and write it into docs/benchmarks.md
	$(RUN_BENCH) --docs docs/benchmarks.md

.PHONY: bench/chart
bench/chart: need-go ## draw the tables and the chart of docs/benchmarks.md again, from docs/benchmarks.json
	CGO_ENABLED=0 go -C bench run -buildvcs=false . --redraw ../docs/benchmarks.md

# So that they cannot rot: the figures mean nothing.
.PHONY: bench/try
bench/try: build/bench ## run every benchmark once and shortly
	$(RUN_BENCH) --rounds 1 --scale 0.01
	go test -run '^$$' -bench . -benchtime 1x $(BENCH_PKG)

.PHONY: build/bench
build/bench: need-npm build
	CGO_ENABLED=0 go -C bench build -trimpath -buildvcs=false -o '$(CURDIR)/bin/' . ./peers

# golangci-lint brings go vet, and gofumpt and gci as formatters.
.PHONY: lint
lint: need-go $(GOLANGCI_LINT) ## check the code: golangci-lint (with go vet and gofumpt), go.mod
	@for module in $(MODULES); do \
		echo "lint $$module" && go -C $$module mod tidy -diff && (cd $$module && $(GOLANGCI_LINT) run --config='$(CURDIR)/.golangci.yaml' ./...) || failed=1; \
	done; [ -z "$$failed" ]

.PHONY: fmt
fmt: need-go $(GOLANGCI_LINT) ## format the code
	@for module in $(MODULES); do (cd $$module && $(GOLANGCI_LINT) fmt --config='$(CURDIR)/.golangci.yaml' ./...) || exit; done

.PHONY: docs/update
docs/update: need-npm ## fetch the files of the API's page again (their version stands in pkg/httpapi/docs/update.sh)
	pkg/httpapi/docs/update.sh

# -buildvcs=false: a checkout whose owner is somebody else would stop the build;
# the version comes from the linker flag.
.PHONY: build
build: need-go ## build bin/api, bin/relay and bin/devstack
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-X main.version=$(VERSION)' \
		-o bin/ ./cmd/api ./cmd/relay
	CGO_ENABLED=0 go -C tools/devstack build -trimpath -buildvcs=false -ldflags '-X main.version=$(VERSION)' -o '$(CURDIR)/bin/' ./cmd/devstack

.PHONY: images
images: ## build the images diehard-api and diehard-relay with Docker
	docker build --build-arg VERSION='$(VERSION)' --file Dockerfile.api --tag 'diehard-api:$(VERSION)' .
	docker build --build-arg VERSION='$(VERSION)' --file Dockerfile.relay --tag 'diehard-relay:$(VERSION)' .

.PHONY: migrate
migrate: build ## migrate the databases that DIEHARD_POSTGRES_DSN and DIEHARD_CLICKHOUSE_DSN name
	bin/relay migrate
	bin/api migrate

.PHONY: clean
clean: ## remove what was built, and the data of `make run`
	rm -rf bin .devstack

$(GOLANGCI_LINT): tools/lint/go.mod tools/lint/go.sum
	@echo 'building the linter, a few minutes, once'
	cd tools/lint && CGO_ENABLED=0 go build -trimpath -buildvcs=false -o '$(CURDIR)/bin/tools/' tool

# What has to be on the machine, each named in one line. `go list -m` fails where
# Go is older than go.mod asks for and cannot fetch a newer one by itself.

.PHONY: need-go
need-go:
	@command -v go >/dev/null || { echo 'Go is missing: get it from https://go.dev/dl/' >&2; exit 1; }
	@go list -m >/dev/null 2>&1 || { echo "Go $$(sed -n 's/^go //p' go.mod) or newer is needed, this is $$(go version | cut -d' ' -f3): get it from https://go.dev/dl/" >&2; exit 1; }

.PHONY: need-npm
need-npm:
	@command -v npm >/dev/null || { echo 'npm is missing, which fetches the database engines: get Node.js from https://nodejs.org or your package manager (Debian: apt install npm)' >&2; exit 1; }

# Empty without a C compiler.
HAS_CC = $(shell command -v "$$(go env CC | cut -d' ' -f1)")

.PHONY: want-cc
want-cc: need-go
	@[ -n '$(HAS_CC)' ] || { echo 'no race detector: a C compiler is missing: install gcc or clang from your package manager (Debian: apt install gcc libc6-dev)' >&2; [ -z "$$DIEHARD_TEST_REQUIRE_ALL" ]; }
