# Everything that a contributor or CI runs. `make help` lists the targets.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := all
MAKEFLAGS += --warn-undefined-variables
MAKEFLAGS += --no-builtin-rules
MAKEFLAGS += --no-print-directory

GO ?= go
BIN := $(CURDIR)/.bin
# At least twelve digits, so that docscheck can mask a version in any output.
VERSION ?= $(shell git describe --tags --always --dirty --abbrev=12 2>/dev/null || echo unknown)
# The benchmarks that `make bench` runs, and the time for each.
BENCH ?= .
BENCHTIME ?= 200ms
# STRICT=1 makes the bench-* targets fail if a bar is missed or cannot be judged.
STRICT ?= 0
# More flags for them, such as '-n 1000 -rounds 3 -only register,create'.
BENCH_FLAGS ?=
# The time per fuzz test of `make fuzz`, and a regexp of packages or names to run.
FUZZTIME ?= 10s
FUZZ ?= .
# POINT is a regexp of the crash points of `make crash`. QUICK=1 runs one side of the
# points of creates and restores, chosen by SEED; SEED=0 chooses at random.
POINT ?=
QUICK ?= 0
# CASE=line runs one case, as printed by a run. PAIRS=n runs n pairs of points, -1 all.
CASE ?=
PAIRS ?=
SEED ?= 0
# The name prefix of the mutants that `make mutants` runs; empty means all.
ONLY ?=
# Set to 1 to warn instead of failing when the vulnerability database is unreachable.
VULN_OPTIONAL ?= 0

LDFLAGS := -s -w -X main.version=$(VERSION)

.PHONY: help
help: ## Lists the targets.
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-16s %s\n", $$1, $$2}'

.PHONY: all
all: build lint test ## Builds, lints (including generated code) and tests: required for every change.

.PHONY: build
build: ## Builds bin/snapshotd and bin/snapshotctl.
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/...

.PHONY: demo
demo: build ## Demonstrates snapshotd from start to end on this machine.
	$(GO) run ./examples/demo

.PHONY: test
test: $(BIN)/buf $(BIN)/versitygw ## Runs every test that gates a change, with the race detector.
	$(GO) test -race -shuffle=on -timeout 40m ./...
	$(GO) test -C tools ./...

.PHONY: test-short
test-short: ## Runs the tests that need no server: under a minute.
	$(GO) test -tags short -short -timeout 2m ./...

.PHONY: fuzz
fuzz: ## Runs each fuzz test for FUZZTIME=10s, up to the first failure: FUZZ=regexp.
	GO='$(GO)' test/fuzz.sh '$(FUZZTIME)' '$(FUZZ)'

.PHONY: mutants
mutants: $(BIN)/versitygw ## Applies each mutant to a copy and requires that a test finds it: ONLY=prefix.
	$(GO) run ./test/mutants/run -only '$(ONLY)'

.PHONY: bench
bench: ## Runs the benchmarks: BENCH=regexp, BENCHTIME=200ms.
	$(GO) test -run '^$$' -bench '$(BENCH)' -benchtime $(BENCHTIME) -timeout 20m ./...

.PHONY: bench-create bench-refs bench-restore bench-gc
bench-create: $(BIN)/versitygw ## Measures create, registration and reading: STRICT=1, BENCH_FLAGS=.
bench-refs: ## Measures the index of references and reclaim: STRICT=1, BENCH_FLAGS=.
bench-restore: $(BIN)/versitygw $(BIN)/rclone ## Measures restores: STRICT=1, BENCH_FLAGS=.
bench-gc: $(BIN)/versitygw ## Measures the collector: STRICT=1, BENCH_FLAGS=.
bench-create bench-refs bench-restore bench-gc: build
	$(GO) build -o $(BIN)/bench-etcd ./test/bench/etcd
	$(GO) build -o $(BIN)/$@ ./test/bench/$(@:bench-%=%)
	$(BIN)/$@ $(if $(filter 1,$(STRICT)),-strict) -o $(BIN)/$@.md $(BENCH_FLAGS)

.PHONY: docs-check
docs-check: build $(BIN)/docscheck $(BIN)/grpcurl $(BIN)/versitygw ## Runs the examples in the documents.
	$(BIN)/docscheck

.PHONY: docs-update
docs-update: build $(BIN)/docscheck $(BIN)/grpcurl $(BIN)/versitygw ## Writes the output of the examples.
	$(BIN)/docscheck -update

# SEED=s runs one seed; SEEDS=n runs n consecutive seeds. No new seed starts after SIM_FOR.
SEEDS ?= $(if $(filter-out 0,$(SEED)),1,2000)
SIM_FOR ?= 2m
SIM_EXACT := -tags exact -overlay $(BIN)/sim/overlay.json
.PHONY: sim
sim: ## Simulates clusters with faults, each run from a seed: SEEDS=n, SEED=s.
	flags='$(SIM_EXACT)'; \
	GO='$(GO)' test/sim/exact.sh $(BIN)/sim && $(GO) test -c $$flags -o $(BIN)/sim/sim.test ./test/sim || { \
		echo 'sim: the runtime of this Go release is not patched: a seed may not replay exactly' >&2; flags=; \
	}; \
	$(GO) test $$flags -count 1 -timeout 20m -v ./test/sim \
		-run 'TestSim|TestMetadataRollback' -seed $(SEED) -seeds $(SEEDS) -for $(SIM_FOR)

# Fails on a Go release whose runtime test/sim/exact.sh does not know.
.PHONY: sim-replay
sim-replay: ## Checks that a seed replays exactly, on a patched runtime: SEEDS=n, SEED=s.
	GO='$(GO)' test/sim/exact.sh $(BIN)/sim
	$(GO) test $(SIM_EXACT) -count 1 -timeout 20m -v ./test/sim \
		-run 'TestReplay' -seed $(SEED) -seeds $(SEEDS)

# The path of an etcd that is too old; empty: that of Debian 12, downloaded but not installed.
OLD_ETCD ?=
.PHONY: old-etcd
old-etcd: ## Checks that an etcd that is too old is rejected: OLD_ETCD=path.
	if [ -z '$(OLD_ETCD)' ] && [ ! -x $(BIN)/old-etcd/usr/bin/etcd ]; then \
		mkdir -p $(BIN)/old-etcd && cd $(BIN)/old-etcd && apt-get download etcd-server && dpkg -x etcd-server_*.deb .; \
	fi
	OLD_ETCD=$(or $(OLD_ETCD),$(BIN)/old-etcd/usr/bin/etcd) \
		$(GO) test -tags oldetcd -count 1 -run '^TestRealOldEtcd$$' -v ./internal/store/meta/etcd

# S3_ENDPOINT, S3_REGION, S3_ACCESS_KEY_ID and S3_SECRET_ACCESS_KEY select the server; the keys
# must be allowed to create buckets. S3_BROKEN is a regexp of subtests to skip.
.PHONY: s3-conformance
s3-conformance: ## Runs the conformance suite of object stores on an S3 server: S3_ENDPOINT=, ….
	$(GO) test -tags s3foreign -count 1 -run '^TestForeignServer$$' -v ./internal/store/object/s3

# The duration of `make robustness`. SEED decides the traffic and the faults, 0 uses the clock; ONLY is a
# comma-separated list of scenarios; QUICK=1 runs three of them in 90 seconds.
TIME ?= 7m

.PHONY: robustness
robustness: build $(BIN)/versitygw ## Kills, freezes and partitions a cluster: TIME=7m, SEED=, ONLY=, QUICK=1.
	$(GO) test -c -tags robustness -o $(BIN)/robustness ./test/robustness
	cd test/robustness && $(BIN)/robustness -test.run '^TestRobustness$$' -test.timeout 30m \
		-time '$(TIME)' -seed '$(SEED)' -only '$(ONLY)' $(if $(filter 1,$(QUICK)),-quick)

# The duration of `make soak`. SEED decides the load, 0 uses the clock.
SOAK_TIME ?= 10m

.PHONY: soak
soak: build $(BIN)/versitygw ## Checks that no resource grows under load: SOAK_TIME=10m, SEED=, QUICK=1.
	$(GO) build -o $(BIN)/bench-etcd ./test/bench/etcd
	$(GO) build -o $(BIN)/soak ./test/soak
	$(BIN)/soak -for '$(SOAK_TIME)' $(if $(filter 1,$(QUICK)),-short) -seed '$(SEED)' -o $(BIN)/soak.md

.PHONY: test-ci
test-ci: ## Runs sim, crash, robustness, mutants, fuzz and soak in short, as CI does: ten minutes.
	test/ci.sh

# MODEL=full also checks the largest configurations.
.PHONY: model
model: ## Checks the models of the protocols with spin, and that each rule is needed.
	docs/design/model/check.sh

.PHONY: crash
crash: $(BIN)/versitygw ## Kills snapshotd at every durable step: POINT=regexp, CASE=line, PAIRS=n, QUICK=1, SEED=n.
	CGO_ENABLED=0 $(GO) build -o $(BIN)/crash/ ./test/crash ./test/crash/snapshotd
	$(BIN)/crash/crash -bin $(BIN)/crash/snapshotd -point '$(POINT)' -s3 $(BIN)/versitygw \
		$(if $(CASE),-case '$(CASE)') $(if $(PAIRS),-pairs '$(PAIRS)') $(if $(filter 1,$(QUICK)),-quick) -seed $(SEED)

.PHONY: lint
lint: lint-go lint-proto lint-tidy check-generate ## Lints Go and protobuf, and checks that generated files are current.

.PHONY: lint-go
lint-go: $(BIN)/golangci-lint
	$(BIN)/golangci-lint fmt --diff
	$(BIN)/golangci-lint run
	cd tools && $(BIN)/golangci-lint run --config ../.golangci.yaml

.PHONY: lint-proto
lint-proto: $(BIN)/buf
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code --exclude-path api/third_party/buf
	$(BIN)/buf breaking api/proto --against api/baseline.binpb --exclude-imports
	$(BIN)/buf breaking internal/store/proto --against internal/store/proto/baseline.binpb --exclude-imports

.PHONY: lint-tidy
lint-tidy:
	$(GO) mod tidy -diff
	cd tools && $(GO) mod tidy -diff
	cd tools/versitygw && $(GO) mod tidy -diff
	cd tools/rclone && $(GO) mod tidy -diff

.PHONY: fmt
fmt: $(BIN)/golangci-lint $(BIN)/buf ## Formats Go and protobuf files.
	$(BIN)/golangci-lint fmt
	$(BIN)/buf format --write --exclude-path api/third_party/buf

.PHONY: generate
generate: $(BIN)/buf $(BIN)/protodep ## Regenerates all generated code.
	$(BIN)/protodep api/third_party go.mod
	find api/gen internal/store/storagepb -name '*.pb.go' -delete 2>/dev/null || true
	$(BIN)/buf generate

# Runs in a copy of the tree, so that uncommitted changes are safe.
.PHONY: check-generate
check-generate: $(BIN)/buf $(BIN)/protodep ## Checks that make generate changes nothing.
	@copy=$$(mktemp -d); trap 'rm -rf "$$copy"' EXIT; \
	tar -cf - --exclude=./.git --exclude=./.bin --exclude=./bin --exclude=./snapshotd-data . | tar -xf - -C "$$copy"; \
	ln -s '$(BIN)' "$$copy/.bin"; \
	$(MAKE) -C "$$copy" generate BIN='$(BIN)'; \
	for folder in api internal/store; do \
		diff -r "$$folder" "$$copy/$$folder" || { echo 'generated files are stale: run make generate' >&2; exit 1; }; \
	done

.PHONY: baseline
baseline: $(BIN)/buf ## Makes the current protobuf files the baseline of buf breaking: after a new RPC, and for a release.
	$(BIN)/buf build api/proto --exclude-source-info --output api/baseline.binpb
	$(BIN)/buf build internal/store/proto --exclude-source-info --output internal/store/proto/baseline.binpb

# govulncheck exits with 3 for a reachable vulnerability. An unchecked tree exits with 3, too.
.PHONY: vuln
vuln: $(BIN)/govulncheck ## Checks for known vulnerabilities in reachable code.
	@out=$$(mktemp); trap 'rm -f "$$out"' EXIT; status=0; \
	$(BIN)/govulncheck ./... >"$$out" 2>&1 || status=$$?; cat "$$out"; \
	if grep -qE 'vuln\.go\.dev|fetching vulnerabilities' "$$out" && [ $$status -eq 1 ]; then \
		echo 'vulnerability database not reachable: NOT CHECKED'; \
		[ '$(VULN_OPTIONAL)' = 1 ] && exit 0; exit 3; \
	fi; exit $$status

.PHONY: clean
clean: ## Removes build results.
	rm -rf bin .bin

# The tools, each built once at the versions in tools/go.mod. go build may keep an old
# time stamp, hence touch.
define tool
.bin/$(1): $(BIN)/$(1)
$(BIN)/$(1): tools/go.mod tools/go.sum $(3)
	$(GO) build -C tools -o $(BIN)/ $(2)
	touch $$@
endef
$(eval $(call tool,buf,github.com/bufbuild/buf/cmd/buf,))
$(eval $(call tool,golangci-lint,github.com/golangci/golangci-lint/v2/cmd/golangci-lint,))
$(eval $(call tool,govulncheck,golang.org/x/vuln/cmd/govulncheck,))
$(eval $(call tool,grpcurl,github.com/fullstorydev/grpcurl/cmd/grpcurl,))
$(eval $(call tool,docscheck,./docscheck,$(wildcard tools/docscheck/*.go)))
$(eval $(call tool,protodep,./protodep,tools/protodep/main.go))

# The S3 server for tests, in a separate module: its dependencies need other versions
# than those of the tools.
.bin/versitygw: $(BIN)/versitygw
$(BIN)/versitygw: tools/versitygw/go.mod tools/versitygw/go.sum
	$(GO) build -C tools/versitygw -o $(BIN)/ github.com/versity/versitygw/cmd/versitygw
	touch $@

# The program that bench-restore compares with, in a separate module for the same reason.
.bin/rclone: $(BIN)/rclone
$(BIN)/rclone: tools/rclone/go.mod tools/rclone/go.sum tools/rclone/main.go
	$(GO) build -C tools/rclone -o $@ .
	touch $@
