# `make` lists the targets.

# The tag of the last release and the number of commits since then, or the commit if no
# release exists. Nested modules have separate tags, such as tools/devstack/v0.1.0.
VERSION := $(shell git describe --tags --match 'v[0-9]*' --always --dirty 2>/dev/null || echo dev)
GOLANGCI_LINT := $(CURDIR)/bin/tools/golangci-lint
GOVULNCHECK := $(CURDIR)/bin/tools/govulncheck
CYCLONEDX := $(CURDIR)/bin/tools/cyclonedx-gomod
TEST_REPORT := test-report.json

# The suites with long specs, for `make test/all`.
LONG_REPORT := test-all-report.json
LONG_PKG := ./test/chaos ./test/integration ./test/model ./tools/devstack/internal/chserver

# The modules. The product's module is the first. Each module is built without a
# workspace, in the same way as by its users. See
# docs/adr/0025-one-root-and-nested-modules.md.
MODULES := . $(patsubst %/go.mod,%,$(wildcard */go.mod test/helm/go.mod tools/devstack/go.mod))
export GOWORK := off

# The packages that `make test` runs, and more flags for Ginkgo.
PKG ?= ./...
ARGS ?=

# The processes of a suite. Half of them wait for a database or a timeout at any time.
PROCS ?= $(shell echo $$((2 * $$(getconf _NPROCESSORS_ONLN))))

# The duration of `make test/chaos`, and of the load of `make test/stalls` and
# `make docs/images`.
DURATION ?= 10m

# The inputs or the time for each fuzz target in these folders.
FUZZ ?= 2000x
FUZZ_DIRS := test/fuzz pkg/users

.DEFAULT_GOAL := help

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z/-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: run
run: need-npm build ## run PostgreSQL, ClickHouse, the API and the relay until Ctrl-C
	bin/devstack up

.PHONY: demo
demo: need-npm build ## create 10,000 users and watch their events reach ClickHouse
	bin/devstack demo

# Ginkgo also runs the examples of a package and the seeds of its fuzz targets.
# CGO_ENABLED is for the race detector; the programs are built without cgo. If a program
# that specs need is missing, these specs are skipped and `make test` prints the reason.
# If DIEHARD_TEST_REQUIRE_ALL is set, they fail.
GINKGO = CGO_ENABLED=$(if $(HAS_CC),1,0) DIEHARD_DEVSTACK_BIN='$(CURDIR)/bin/devstack' go tool ginkgo run \
	-r --procs=$(PROCS) --randomize-all --randomize-suites --keep-going \
	--require-suite --fail-on-pending --timeout=75m --poll-progress-after=1m --output-dir=bin

.PHONY: test
test: need-npm want-cc build ## run every suite with the race detector (PKG=./pkg/outbox: one suite; ARGS=…: flags for Ginkgo)
	@rm -f bin/$(TEST_REPORT)
	@$(GINKGO) $(if $(HAS_CC),--race) --fail-on-empty --label-filter='!long && !stalls && !compose' --json-report=$(TEST_REPORT) $(ARGS) $(PKG); \
	status=$$?; go run ./tools/testsummary -left-out bin/$(TEST_REPORT) >&2; exit $$status

# Specs with the label long test the same behaviour as specs of `make test`, but at a
# larger scale. They repeat more often, run longer, use larger tables, or check larger
# models. They run without the race detector: `make test` runs the same code with it.
.PHONY: test/all
test/all: need-npm build ## run the long specs, which `make test` does not run, and test/pooler
	@rm -f bin/$(LONG_REPORT)
	@$(GINKGO) --label-filter=long --json-report=$(LONG_REPORT) $(ARGS) $(LONG_PKG); \
	status=$$?; $(MAKE) test/pooler || status=1; exit $$status

# Each step at which a relay is killed, a short chaos, and the specs of the whole system
# again, with the programs behind a PgBouncer in transaction mode. It takes three minutes.
POOLER_REPORT := test-pooler-report.json
POOLED := ^chaos (A relay that is killed .*over native|Chaos )|^integration (Delivery|Creating a user|Publishing by SQL|An API that stops|In another application)
.PHONY: test/pooler
test/pooler: need-npm build ## run the crash points, chaos and integration behind PgBouncer
	@rm -f bin/$(POOLER_REPORT)
	@DIEHARD_TEST_POOLER=1 DIEHARD_CHAOS_DURATION=15s $(GINKGO) --fail-on-empty --focus='$(POOLED)' --json-report=$(POOLER_REPORT) ./test/chaos ./test/integration

# The targets run one after the other, because the go command can fuzz only one target at
# a time. FUZZ is a time, such as 10m, or a number of inputs, such as 2000x.
.PHONY: test/fuzz
test/fuzz: need-npm build ## send fuzzed inputs to the API and its parsers (FUZZ=2000x: inputs or time for each target)
	@for dir in $(FUZZ_DIRS); do \
		listed=$$(DIEHARD_DEVSTACK_BIN='$(CURDIR)/bin/devstack' go -C $$dir test -list '^Fuzz' .) && targets=$$(echo "$$listed" | grep '^Fuzz') || { echo "$$dir: $$listed"; exit 1; }; \
		for target in $$targets; do \
			DIEHARD_DEVSTACK_BIN='$(CURDIR)/bin/devstack' go -C $$dir test -run '^$$' -fuzz "^$$target\$$" -fuzztime '$(FUZZ)' . || exit; \
		done; \
	done

# Each run prints its seed. SEED= with this number repeats the order of the faults.
.PHONY: test/chaos
test/chaos: need-npm build ## cause random faults in the whole system (DURATION=10m, SEED=…)
	DIEHARD_DEVSTACK_BIN='$(CURDIR)/bin/devstack' DIEHARD_CHAOS_DURATION='$(DURATION)' go tool ginkgo run \
		--focus '^chaos Chaos ' --fail-on-empty $(if $(SEED),--seed=$(SEED)) --timeout=24h --poll-progress-after=5m ./test/chaos

# The spec has the label stalls, so that neither `make test` nor `make test/all` runs it. It
# runs for six minutes longer than the load.
.PHONY: test/stalls
test/stalls: need-npm build ## cause each kind of stall under load, and check the alerts and the page (DURATION=10m)
	DIEHARD_DEVSTACK_BIN='$(CURDIR)/bin/devstack' DIEHARD_STALLS_DURATION='$(DURATION)' go tool ginkgo run \
		--label-filter=stalls --fail-on-empty --timeout=24h --poll-progress-after=30m ./test/deploy

# The images and docker-compose.yml, with a container engine. Without one, the suite says so.
# DIEHARD_COMPOSE_OVERRIDE can name another compose file, for example with images of a
# private registry.
.PHONY: test/compose
test/compose: need-go ## build the images and drive docker-compose.yml: scale, kill, restart, upgrade
	go tool ginkgo run --label-filter=compose --timeout=1h --poll-progress-after=5m -v ./test/compose

.PHONY: test/outcomes
test/outcomes: need-npm build ## run the chaos suites, and write their outcomes into docs/delivery.md
	DIEHARD_TEST_REQUIRE_ALL=1 DIEHARD_DEVSTACK_BIN='$(CURDIR)/bin/devstack' DIEHARD_CHAOS_OUTCOMES='$(CURDIR)/docs/delivery.md' go tool ginkgo run \
		-p --timeout=1h --poll-progress-after=5m ./test/chaos

# The benchmarks to run, or all benchmarks if empty. ARGS contains flags for bin/bench.
BENCH ?=
BENCH_PKG := ./pkg/outbox ./pkg/relay/store ./pkg/users ./pkg/sink/clickhouse
RUN_BENCH = DIEHARD_DEVSTACK_BIN='$(CURDIR)/bin/devstack' bin/bench

.PHONY: bench
bench: build/bench ## compare Diehard with the capacity of its databases (BENCH=relay: one benchmark; ARGS=--json)
	$(RUN_BENCH) $(ARGS) $(BENCH)

.PHONY: bench/docs
bench/docs: build/bench ## run all benchmarks, and write the results into docs/benchmarks.md
	$(RUN_BENCH) --docs docs/benchmarks.md

.PHONY: bench/chart
bench/chart: need-go ## draw the tables and the chart of docs/benchmarks.md again, from docs/benchmarks.json
	CGO_ENABLED=0 go -C bench run -buildvcs=false . --redraw ../docs/benchmarks.md

# This target checks that every benchmark works. Its results are not measurements.
.PHONY: bench/try
bench/try: build/bench ## run every benchmark once, for a short time
	$(RUN_BENCH) --rounds 1 --scale 0.01
	go test -run '^$$' -bench . -benchtime 1x $(BENCH_PKG)

.PHONY: build/bench
build/bench: need-npm build
	CGO_ENABLED=0 go -C bench build -trimpath -buildvcs=false -o '$(CURDIR)/bin/' . ./peers

# golangci-lint includes go vet, and the formatters gofumpt and gci.
.PHONY: lint
lint: need-go $(GOLANGCI_LINT) ## check the code: golangci-lint (with go vet and gofumpt), go.mod
	@for module in $(MODULES); do \
		echo "lint $$module" && go -C $$module mod tidy -diff && (cd $$module && $(GOLANGCI_LINT) run --config='$(CURDIR)/.golangci.yaml' ./...) || failed=1; \
	done; [ -z "$$failed" ]

.PHONY: fmt
fmt: need-go $(GOLANGCI_LINT) ## format the code
	@for module in $(MODULES); do (cd $$module && $(GOLANGCI_LINT) fmt --config='$(CURDIR)/.golangci.yaml' ./...) || exit; done

.PHONY: docs/images
docs/images: need-npm build ## take the screenshots of docs/page.md again, after a load (DURATION=10m)
	mkdir -p docs/images
	DIEHARD_TEST_REQUIRE_ALL=1 DIEHARD_DEVSTACK_BIN='$(CURDIR)/bin/devstack' DIEHARD_PAGE_IMAGES='$(CURDIR)/docs/images' DIEHARD_PAGE_LOAD='$(DURATION)' \
		go tool ginkgo run --focus 'draws the last hour' --fail-on-empty --timeout=3h ./test/integration

.PHONY: docs/update
docs/update: need-npm ## download the files of the API's documentation page again (their version is in pkg/httpapi/docs/update.sh)
	pkg/httpapi/docs/update.sh

# Without -buildvcs=false the build fails in a checkout that belongs to another user. The
# linker flag sets the version.
.PHONY: build
build: need-go ## build bin/api, bin/relay and bin/devstack
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-X main.version=$(VERSION)' \
		-o bin/ ./cmd/api ./cmd/relay
	CGO_ENABLED=0 go -C tools/devstack build -trimpath -buildvcs=false -ldflags '-X main.version=$(VERSION)' -o '$(CURDIR)/bin/' ./cmd/devstack

.PHONY: images
images: ## build the images diehard-api and diehard-relay with Docker
	@for program in api relay; do \
		docker build --build-arg VERSION='$(VERSION)' --build-arg REVISION="$$(git rev-parse HEAD 2>/dev/null)" \
			--target $$program --tag "diehard-$$program:$(VERSION)" . || exit; \
	done

# A vulnerability counts if a program can call it. Without the database of vulnerabilities,
# one line says so.
.PHONY: vulns
vulns: need-go $(GOVULNCHECK) ## look for known vulnerabilities that the programs can reach
	@output=$$($(GOVULNCHECK) ./cmd/... 2>&1); status=$$?; \
	case "$$status $$output" in \
		*'fetching vulnerabilities'*) echo 'make vulns is left out: the database of vulnerabilities cannot be reached' >&2 ;; \
		*) echo "$$output"; exit $$status ;; \
	esac

.PHONY: sbom
sbom: need-go $(CYCLONEDX) ## write the SBOMs of both programs, with licences, into bin/sbom (CycloneDX)
	@mkdir -p bin/sbom
	@for program in api relay; do \
		$(CYCLONEDX) app -json -licenses -main cmd/$$program -output bin/sbom/$$program.cdx.json . || exit; \
	done

# What goreleaser makes for a tag, without images. GORELEASER names the program.
GORELEASER ?= goreleaser
.PHONY: release/try
release/try: $(CYCLONEDX) ## make the archives, checksums and SBOMs of a release in dist, and publish nothing
	IMAGES=localhost $(GORELEASER) release --snapshot --clean --skip=docker

.PHONY: migrate
migrate: build ## migrate the databases that DIEHARD_POSTGRES_DSN and DIEHARD_CLICKHOUSE_DSN name
	bin/relay migrate
	bin/api migrate

.PHONY: clean
clean: ## remove the built programs, and the data of `make run`
	rm -rf bin dist .devstack

$(GOLANGCI_LINT): tools/lint/go.mod tools/lint/go.sum
	@echo 'building the linter: this takes a few minutes, once'
	cd tools/lint && CGO_ENABLED=0 go build -trimpath -buildvcs=false -o '$(CURDIR)/bin/tools/' tool

$(GOVULNCHECK) $(CYCLONEDX): tools/release/go.mod tools/release/go.sum
	cd tools/release && CGO_ENABLED=0 go build -trimpath -buildvcs=false -o '$(CURDIR)/bin/tools/' tool

# The required programs. If a program is missing, one line names it. `go list -m` fails if
# Go is older than go.mod requires and cannot download a newer version.

.PHONY: need-go
need-go:
	@command -v go >/dev/null || { echo 'Go is missing: install it from https://go.dev/dl/' >&2; exit 1; }
	@go list -m >/dev/null 2>&1 || { echo "Go $$(sed -n 's/^go //p' go.mod) or newer is required, but this is $$(go version | cut -d' ' -f3): install it from https://go.dev/dl/" >&2; exit 1; }

.PHONY: need-npm
need-npm:
	@command -v npm >/dev/null || { echo 'npm is missing: it downloads the database engines. Install Node.js from https://nodejs.org or with your package manager (Debian: apt install npm)' >&2; exit 1; }

# HAS_CC is empty if no C compiler is installed.
HAS_CC = $(shell command -v "$$(go env CC | cut -d' ' -f1)")

.PHONY: want-cc
want-cc: need-go
	@[ -n '$(HAS_CC)' ] || { echo 'the race detector is off because a C compiler is missing: install gcc or clang with your package manager (Debian: apt install gcc libc6-dev)' >&2; [ -z "$$DIEHARD_TEST_REQUIRE_ALL" ]; }
