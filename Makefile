# `make` lists what there is. `make demo` shows Skerry at work on this host.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
export CGO_ENABLED := 0

MODULE  := github.com/skerry-io/skerry
COMMIT  := $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
DATE    := $(shell git log -1 --format=%cd --date=format-local:%Y-%m-%dT%H:%M:%SZ 2>/dev/null || echo 1970-01-01T00:00:00Z)
EPOCH   := $(shell git log -1 --format=%ct 2>/dev/null || echo 0)
TREE    := $(if $(shell git status --porcelain --untracked-files=no 2>/dev/null),dirty,clean)
VERSION ?= $(or $(shell git describe --tags --match 'v*' 2>/dev/null),v0.0.0-dev.$(shell git rev-parse --short=12 HEAD 2>/dev/null || echo unknown))
export TZ := UTC0

# Kubernetes tells its version by what the linker stamps; without it, it would
# say v0.0.0-master, which clients and the scheduler take at its word.
KUBE         := $(shell sed -n 's/^\tk8s.io\/kubernetes \(v[0-9.]*\)$$/\1/p' go.mod)
KUBE_VERSION := $(KUBE)+skerry
KUBE_STAMP    = $(foreach pkg,k8s.io/component-base/version k8s.io/client-go/pkg/version,\
	-X $(pkg).gitVersion=$(KUBE_VERSION) -X $(pkg).gitCommit=$(COMMIT) -X $(pkg).gitTreeState=$(TREE) -X $(pkg).buildDate=$(DATE) \
	-X $(pkg).gitMajor=$(word 1,$(subst ., ,$(KUBE:v%=%))) -X $(pkg).gitMinor=$(word 2,$(subst ., ,$(KUBE:v%=%))))
LDFLAGS       = -s -w -X main.version=$(VERSION) $(KUBE_STAMP)

# The programs are linked against all of Kubernetes: one at a time is as much as
# a machine of 2 cores and 4 GB takes.
GO_TEST  := go test -p 1 -timeout 40m
UNIT      = $$(go list ./... | grep -v -e /e2e -e /deploy)
SYSTEM   := ./e2e/... ./deploy/...
BENCH      ?= .
BENCH_ARGS ?=
FUZZTIME ?= 10s
TIME     ?= 10m
SEED     ?=
PLATFORMS := amd64 arm64 armv7

##@ Build

.PHONY: build
build: bin/cloudhub bin/edgecore ## Build both programs into bin/

.PHONY: bin/cloudhub bin/edgecore
bin/cloudhub bin/edgecore: bin/%:
	@deploy/build.sh $@ '$(LDFLAGS)' ./$*

.PHONY: release
release: ## Build the release archives for all platforms into dist/
	@deploy/release.sh '$(VERSION)' '$(EPOCH)' '$(LDFLAGS)' $(PLATFORMS)

##@ Test

.PHONY: test
test: ## Run every check and every test (needs root)
	@$(MAKE) --no-print-directory vet
	@$(MAKE) --no-print-directory --keep-going test-unit test-e2e

.PHONY: test-unit
test-unit: deps ## Run the tests of the packages (needs root)
	$(GO_TEST) $(UNIT)

.PHONY: test-e2e
test-e2e: deps build ## Run the tests of the whole system with real parts (needs root)
	$(GO_TEST) -count=1 $(SYSTEM)

# The tests in files named for autonomy share the other tests' machines.
.PHONY: test-autonomy
test-autonomy: deps build ## Run the scenarios of nodes on their own, and the model test (needs root)
	$(GO_TEST) -count=1 -run "^($$(sed -n 's/^func \(Test[A-Za-z0-9_]*\)(t .*/\1/p' e2e/autonomy*_test.go | paste -sd '|'))\$$" ./e2e
	$(GO_TEST) -count=1 ./e2e/convergence

.PHONY: soak
soak: deps build ## Let a hub and two nodes work for TIME (10m) under random faults, and report (needs root; SEED=n)
	@go build -o bin/soak ./e2e/soak
	@bin/soak -time $(TIME) $(if $(SEED),-seed $(SEED))

.PHONY: vet lint
vet lint: ## Check format and go vet
	@bad=$$(git ls-files '*.go' | xargs -r gofmt -l); if [ -n "$$bad" ]; then echo "gofmt wants to change:"; echo "$$bad"; exit 1; fi
	go vet ./...

.PHONY: bench
bench: deps build bin/kubelet ## Measure the whole system beside a plain kubelet: one table (needs root; BENCH_ARGS='-only pods')
	@go build -o bin/bench ./e2e/bench
	@bin/bench -kubelet bin/kubelet $(BENCH_ARGS)

.PHONY: bench-devices
bench-devices: deps build ## Measure devices: MQTT to twin, to the hub and back, memory, disk (needs root; BENCH_ARGS='-only rate')
	@go build -o bin/bench-devices ./e2e/bench-devices
	@bin/bench-devices $(BENCH_ARGS)

.PHONY: bench-go
bench-go: ## Run the packages' own benchmarks (BENCH=regexp)
	go test -p 1 -run '^$$' -bench '$(BENCH)' -benchmem -timeout 60m ./...

# The upstream kubelet as it comes, to compare with.
.PHONY: bin/kubelet
bin/kubelet:
	@deploy/build.sh $@ '$(LDFLAGS)' k8s.io/kubernetes/cmd/kubelet

.PHONY: generate
generate: ## Make the device API's definitions and copy functions anew from its types
	go run sigs.k8s.io/controller-tools/cmd/controller-gen@v0.20.0 object crd:crdVersions=v1,allowDangerousTypes=true \
		paths=./devicetwin/api/... output:crd:dir=devicetwin/api/v1alpha1/crds output:object:dir=devicetwin/api/v1alpha1

.PHONY: fuzz-short
fuzz-short: ## Run every fuzz test for FUZZTIME (10s)
	@git grep -l '^func Fuzz' -- '*_test.go' | while read -r file; do \
		sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' "$$file" | while read -r name; do \
			echo "fuzz $$(dirname "$$file") $$name"; \
			go test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) "./$$(dirname "$$file")" < /dev/null; \
		done; \
	done

##@ Try

.PHONY: demo
demo: deps build ## Start a cloud and an edge node on this host and show them at work (needs root)
	@deploy/build.sh bin/demo '' ./deploy/demo
	@bin/demo up

.PHONY: demo-down
demo-down: ## Take down what `make demo` has started, leaving nothing behind
	@deploy/build.sh bin/demo '' ./deploy/demo
	@bin/demo down

##@ Other

.PHONY: deps
deps: ## Install what is missing of containerd, runc, CNI plugins and such (Debian packages)
	@deploy/deps.sh

.PHONY: clean
clean: ## Remove what was built
	rm -rf bin dist

.PHONY: help
help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} \
		/^##@ / {printf "\n%s\n", substr($$0, 5)} \
		/^[a-z][a-z0-9 -]*:.*## / {sub(/ lint$$/, "", $$1); printf "  make %-13s %s\n", $$1, $$2}' Makefile
