# wanmig: build, try, test, measure.
#
#   make demo    a VM crosses an emulated WAN with its disks     (root; installs what it needs)
#   make test    everything, lab tests with real guests included (root; installs what it needs)
#   make unit    what needs no privileges, in seconds
#   make soak    the long forms of the lab tests: hundreds of faults (root; an hour or two)
#   make bench   measurements; RUN=TestLink for one of them

GO      ?= go
VERSION := $(shell git describe --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -X github.com/wanmig/wanmig/agent.Version=$(VERSION)
export CGO_ENABLED = 0

.PHONY: deps build faults demo test unit lab soak lint bench clean

deps:
	sh scripts/deps.sh

build:
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/...
	$(GO) build -trimpath -ldflags '-s -w' -o bin/wanlab-guest ./lab/guest

# What tests let stop at exact points, see faults/doc.go: one, and the release after it.
faults:
	$(GO) build -trimpath -tags faults -ldflags '$(LDFLAGS)' -o bin/faults/wanmig ./cmd/wanmig
	$(GO) build -trimpath -tags faults -ldflags '$(LDFLAGS)-next' -o bin/faults/wanmig-next ./cmd/wanmig

demo: deps build
	sh scripts/demo.sh

test: deps build lint lab

unit:
	$(GO) test ./...

lab: build faults
	sh scripts/labtest.sh

soak: deps build faults
	sh scripts/soak.sh

lint:
	@fmt=$$(gofmt -l .); test -z "$$fmt" || { echo "gofmt would change: $$fmt"; exit 1; }
	$(GO) vet -tags lab,bench,soak,faults ./... # with every file that has one of these tags, or none

bench: deps build
	sh scripts/bench.sh

clean:
	rm -rf bin
