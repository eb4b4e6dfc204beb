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
# At least twelve digits, so that a version is recognised wherever it is printed.
VERSION ?= $(shell git describe --tags --always --dirty --abbrev=12 2>/dev/null || echo unknown)
# What `make bench` runs, and for how long each.
BENCH ?= .
BENCHTIME ?= 200ms
# Set to 1, `make bench-create`, `make bench-refs`, `make bench-restore` and `make bench-gc` fail when a bar is missed or cannot be judged.
STRICT ?= 0
# Flags for them besides, such as '-n 1000 -rounds 3 -only register,create'.
BENCH_FLAGS ?=
# For how long `make fuzz` runs each fuzz test, and which: those whose package or name matches.
FUZZTIME ?= 10s
FUZZ ?= .
# The points that `make crash` crashes at; set QUICK to 1 for one side of those of
# creates and restores, which SEED chooses, 0 by chance.
POINT ?=
QUICK ?= 0
# CASE=line runs one case, named as the run prints it. PAIRS=n runs n pairs of points, -1 all of them.
CASE ?=
PAIRS ?=
SEED ?= 0
# The prefix of the names of the mutants that `make mutants` runs. Empty: all.
ONLY ?=
# Set to 1, an unreachable vulnerability database is said and forgiven.
VULN_OPTIONAL ?= 0

LDFLAGS := -s -w -X main.version=$(VERSION)

.PHONY: help
help: ## Lists the targets.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-16s %s\n", $$1, $$2}'

.PHONY: all
all: build lint test ## Builds, lints (generated code included) and tests: what a change has to pass.

.PHONY: build
build: ## Builds bin/snapshotd and bin/snapshotctl.
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/...

.PHONY: demo
demo: build ## Shows snapshotd at work, start to end, on this machine.
	$(GO) run ./examples/demo

.PHONY: test
test: $(BIN)/buf $(BIN)/versitygw ## Runs every test that gates a change, with the race detector.
	$(GO) test -race -shuffle=on -timeout 20m ./...
	$(GO) test -C tools ./...

.PHONY: test-short
test-short: ## Runs the tests that need no server: under a minute.
	$(GO) test -tags short -short -timeout 2m ./...

.PHONY: fuzz
fuzz: ## Runs every fuzz test for FUZZTIME=10s, until one finds something: FUZZ=regexp.
	GO='$(GO)' test/fuzz.sh '$(FUZZTIME)' '$(FUZZ)'

.PHONY: mutants
mutants: $(BIN)/versitygw ## Puts each defect of test/mutants into a copy and requires that a test finds it: ONLY=prefix.
	$(GO) run ./test/mutants/run -only '$(ONLY)'

.PHONY: bench
bench: ## Runs the benchmarks: BENCH=regexp, BENCHTIME=200ms.
	$(GO) test -run '^$$' -bench '$(BENCH)' -benchtime $(BENCHTIME) -timeout 20m ./...

.PHONY: bench-create
bench-create: build $(BIN)/versitygw ## Measures create, registration and reading against their bars: STRICT=1, BENCH_FLAGS=.
	$(GO) build -o $(BIN)/bench-etcd ./test/bench/etcd
	$(GO) build -o $(BIN)/bench-create ./test/bench/create
	$(BIN)/bench-create $(if $(filter 1,$(STRICT)),-strict) -o $(BIN)/bench-create.md $(BENCH_FLAGS)

.PHONY: bench-refs
bench-refs: build ## Measures what it costs to know what snapshots reference, and to reclaim, against the bars: STRICT=1, BENCH_FLAGS=.
	$(GO) build -o $(BIN)/bench-etcd ./test/bench/etcd
	$(GO) build -o $(BIN)/bench-refs ./test/bench/refs
	$(BIN)/bench-refs $(if $(filter 1,$(STRICT)),-strict) -o $(BIN)/bench-refs.md $(BENCH_FLAGS)

.PHONY: bench-restore
bench-restore: build $(BIN)/versitygw $(BIN)/rclone ## Measures restores against their bars, a loop of bare copies and rclone: STRICT=1, BENCH_FLAGS=.
	$(GO) build -o $(BIN)/bench-etcd ./test/bench/etcd
	$(GO) build -o $(BIN)/bench-restore ./test/bench/restore
	$(BIN)/bench-restore $(if $(filter 1,$(STRICT)),-strict) -o $(BIN)/bench-restore.md $(BENCH_FLAGS)

.PHONY: bench-gc
bench-gc: build $(BIN)/versitygw ## Measures the rounds of the collector against their bars and a loop of bare deletes: STRICT=1, BENCH_FLAGS=.
	$(GO) build -o $(BIN)/bench-etcd ./test/bench/etcd
	$(GO) build -o $(BIN)/bench-gc ./test/bench/gc
	$(BIN)/bench-gc $(if $(filter 1,$(STRICT)),-strict) -o $(BIN)/bench-gc.md $(BENCH_FLAGS)

.PHONY: docs-check
docs-check: build $(BIN)/docscheck $(BIN)/grpcurl $(BIN)/versitygw ## Runs the console examples of the documents and compares their output.
	$(BIN)/docscheck

.PHONY: docs-update
docs-update: build $(BIN)/docscheck $(BIN)/grpcurl $(BIN)/versitygw ## Runs the same examples and writes their output into the documents.
	$(BIN)/docscheck -update

# SEED=s runs one seed; SEEDS=n runs n consecutive seeds. No new seed starts after SIM_FOR.
SEED ?= 0
SEEDS ?= $(if $(filter-out 0,$(SEED)),1,2000)
SIM_FOR ?= 2m
SIM_EXACT := -tags exact -overlay $(BIN)/sim/overlay.json
.PHONY: sim
sim: ## Simulates clusters with all faults, each run decided by a seed: SEEDS=n, SEED=s.
	flags='$(SIM_EXACT)'; \
	GO='$(GO)' test/sim/exact.sh $(BIN)/sim && $(GO) test -c $$flags -o $(BIN)/sim/sim.test ./test/sim || { \
		echo 'sim: the runtime of this Go release is not patched: a seed may not replay exactly' >&2; flags=; \
	}; \
	$(GO) test $$flags -count 1 -timeout 20m -v ./test/sim -run 'TestSim|TestMetadataRollback' -seed $(SEED) -seeds $(SEEDS) -for $(SIM_FOR)

# Fails on a Go release whose runtime test/sim/exact.sh does not know.
.PHONY: sim-replay
sim-replay: ## Shows that a seed of the simulation replays exactly, on a patched runtime: SEEDS=n, SEED=s.
	GO='$(GO)' test/sim/exact.sh $(BIN)/sim
	$(GO) test $(SIM_EXACT) -count 1 -timeout 20m -v ./test/sim -run 'TestReplay' -seed $(SEED) -seeds $(SEEDS)

# An etcd that is too old; empty: that of Debian 12, which apt-get fetches and nothing installs.
OLD_ETCD ?=
.PHONY: old-etcd
old-etcd: ## Shows that an etcd that is too old is refused, with the one of Debian 12 or OLD_ETCD.
	if [ -z '$(OLD_ETCD)' ] && [ ! -x $(BIN)/old-etcd/usr/bin/etcd ]; then \
		mkdir -p $(BIN)/old-etcd && cd $(BIN)/old-etcd && apt-get download etcd-server && dpkg -x etcd-server_*.deb .; \
	fi
	OLD_ETCD=$(or $(OLD_ETCD),$(BIN)/old-etcd/usr/bin/etcd) $(GO) test -tags oldetcd -count 1 -run '^TestRealOldEtcd$$' -v ./internal/store/meta/etcd

# The server's address is S3_ENDPOINT, of keys that may make buckets. S3_BROKEN names subtests that are left out.
.PHONY: s3-conformance
s3-conformance: ## Probes an S3 server and runs the conformance suite on it: S3_ENDPOINT, S3_ACCESS_KEY_ID, S3_SECRET_ACCESS_KEY, S3_REGION, S3_BROKEN.
	$(GO) test -tags s3foreign -count 1 -run '^TestForeignServer$$' -v ./internal/store/object/s3

# For how long `make robustness` runs. SEED decides the traffic and the faults, 0 by the clock; ONLY names scenarios, with
# commas between them; QUICK=1 runs three of them, in 90 seconds.
TIME ?= 7m

.PHONY: robustness
robustness: build $(BIN)/versitygw ## Kills, freezes and cuts off what runs in processes of its own, and judges what is left: TIME=7m, SEED=, ONLY=, QUICK=1.
	$(GO) test -c -tags robustness -o $(BIN)/robustness ./test/robustness
	cd test/robustness && $(BIN)/robustness -test.run '^TestRobustness$$' -test.timeout 30m \
		-time '$(TIME)' -seed '$(SEED)' -only '$(ONLY)' $(if $(filter 1,$(QUICK)),-quick)

# For how long `make soak` runs. SEED decides the load, 0 by the clock.
SOAK_TIME ?= 10m

.PHONY: soak
soak: build $(BIN)/versitygw ## Shows that memory, goroutines, files, etcd and the bucket stay as they are: SOAK_TIME=10m, SEED=, QUICK=1.
	$(GO) build -o $(BIN)/bench-etcd ./test/bench/etcd
	$(GO) build -o $(BIN)/soak ./test/soak
	$(BIN)/soak -for '$(SOAK_TIME)' $(if $(filter 1,$(QUICK)),-short) -seed '$(SEED)' -o $(BIN)/soak.md

.PHONY: test-ci
test-ci: ## Runs short forms of sim, crash, robustness, mutants, fuzz and soak, in about ten minutes, as CI does.
	test/ci.sh

# MODEL=full checks the largest configurations as well.
.PHONY: model
model: ## Checks the protocols' models with spin, and that each rule is needed.
	docs/design/model/check.sh

.PHONY: crash
crash: $(BIN)/versitygw ## Kills snapshotd before and after every durable step and looks whether all is well: POINT=regexp, CASE=line, PAIRS=n, QUICK=1, SEED=n.
	CGO_ENABLED=0 $(GO) build -o $(BIN)/crash/ ./test/crash ./test/crash/snapshotd
	$(BIN)/crash/crash -bin $(BIN)/crash/snapshotd -point '$(POINT)' -s3 $(BIN)/versitygw $(if $(CASE),-case '$(CASE)') $(if $(PAIRS),-pairs '$(PAIRS)') \
		$(if $(filter 1,$(QUICK)),-quick) -seed $(SEED)

.PHONY: lint
lint: lint-go lint-proto lint-tidy check-generate ## Lints Go and protobuf, and checks that nothing generated is stale.

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
generate: $(BIN)/buf $(BIN)/protodep ## Writes all generated code anew.
	$(BIN)/protodep api/third_party go.mod
	find api/gen internal/store/storagepb -name '*.pb.go' -delete 2>/dev/null || true
	$(BIN)/buf generate

# In a copy of the tree, so that it works, and harms nothing, in the middle of a change.
.PHONY: check-generate
check-generate: $(BIN)/buf $(BIN)/protodep ## Checks that `make generate` would change nothing.
	@copy=$$(mktemp -d); trap 'rm -rf "$$copy"' EXIT; \
	tar -cf - --exclude=./.git --exclude=./.bin --exclude=./bin --exclude=./snapshotd-data . | tar -xf - -C "$$copy"; \
	ln -s '$(BIN)' "$$copy/.bin"; \
	$(MAKE) -C "$$copy" generate BIN='$(BIN)'; \
	for folder in api internal/store; do \
		diff -r "$$folder" "$$copy/$$folder" || { echo 'generated files are stale: run make generate' >&2; exit 1; }; \
	done

.PHONY: baseline
baseline: $(BIN)/buf ## Takes the protobuf files as they are for the baseline of buf breaking. Release managers only.
	$(BIN)/buf build api/proto --exclude-source-info --output api/baseline.binpb
	$(BIN)/buf build internal/store/proto --exclude-source-info --output internal/store/proto/baseline.binpb

# govulncheck ends with 3 for a vulnerability that the code reaches. Not to know is no better, so that is 3 as well.
.PHONY: vuln
vuln: $(BIN)/govulncheck ## Looks for known vulnerabilities that the code reaches.
	@out=$$(mktemp); trap 'rm -f "$$out"' EXIT; status=0; \
	$(BIN)/govulncheck ./... >"$$out" 2>&1 || status=$$?; cat "$$out"; \
	if grep -qE 'vuln\.go\.dev|fetching vulnerabilities' "$$out" && [ $$status -eq 1 ]; then \
		echo 'vulnerability database not reachable: NOT CHECKED'; \
		[ '$(VULN_OPTIONAL)' = 1 ] && exit 0; exit 3; \
	fi; exit $$status

.PHONY: clean
clean: ## Removes what make built.
	rm -rf bin .bin

# The tools, each built once from the versions in tools/go.mod. Go's own time
# stamps are not to be relied on, hence touch.
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

# The S3 server that tests start. Its module is its own: it asks for other
# versions than the tools do.
.bin/versitygw: $(BIN)/versitygw
$(BIN)/versitygw: tools/versitygw/go.mod tools/versitygw/go.sum
	$(GO) build -C tools/versitygw -o $(BIN)/ github.com/versity/versitygw/cmd/versitygw
	touch $@

# What the benchmark of restores compares them with, in a module of its own for
# the same reason.
.bin/rclone: $(BIN)/rclone
$(BIN)/rclone: tools/rclone/go.mod tools/rclone/go.sum tools/rclone/main.go
	$(GO) build -C tools/rclone -o $@ .
	touch $@
