# localmig: the one door. Every target first sets up what it needs; `make` alone lists them.
#
# Set-up is remembered by stamps in .venv: the tools come again when pyproject.toml changes, the Rust core is
# built again when its sources do.

PYTHON ?= python3
CARGO ?= cargo
PYTEST_ARGS ?=
# Most tests wait for other processes most of the time: one more of them than processors keeps the processors busy, and
# starves no emulated guest.
TEST_WORKERS ?= $(shell expr $$(nproc) + 1)
BENCH_ARGS ?=
BASE ?=
DEMO_ARGS ?=
FUZZ_SECONDS ?= 60
FUZZ_RUNS ?=
FUZZ_BOUND = $(if $(FUZZ_RUNS),runs=$(FUZZ_RUNS),$(FUZZ_SECONDS))
SOAK_HANDOVERS ?= 20000
SOAK_FAILURES ?= 20000
FUZZ_TARGETS ?= vhost-user sessions stream frames descriptors analysis qmp options config split packed

VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
# Tests of a group share something dear, and run one after the other; see the markers in tests/conftest.py.
PYTEST = $(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadgroup --no-loadscope-reorder

# What the guest tier runs on, from Debian's packages, and what docs/devices.md has its reader run. The guest's own kernel is
# downloaded and unpacked, never installed. DPDK's driver is a guest as well; its test program is among the development files.
GUEST_PACKAGES := qemu-system-x86 user-mode-linux busybox-static iproute2 ethtool dpdk-dev librte-meta-all passt patch
# What the benchmarks measure beside us, and drive us with.
BENCH_PACKAGES := iproute2 gcc libc6-dev dpdk dpdk-dev librte-meta-all passt iperf3
# libFuzzer is C++.
FUZZ_PACKAGES := g++
# They unpack what is tested with beside this machine's own: a second QEMU, a root with systemd.
LAB_PACKAGES := mmdebstrap patchelf
# Where this machine has Debian's packages from.
DEBIAN_MIRROR = $(shell apt-get indextargets --format '$$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' | head -n 1)
# What the demonstration needs and this machine has not.
DEMO_PACKAGES = $(if $(shell command -v ip),,iproute2) \
  $(if $(findstring qemu,$(DEMO_ARGS))$(findstring --vmm,$(DEMO_ARGS)),$(if $(shell command -v qemu-system-x86_64),,qemu-system-x86)) \
  $(if $(findstring uml,$(DEMO_ARGS)),$(if $(shell command -v linux.uml),,user-mode-linux)) \
  $(if $(findstring --guest,$(DEMO_ARGS))$(findstring --vmm,$(DEMO_ARGS)),$(if $(shell command -v busybox),,busybox-static))
# An ordinary user may make TAPs and bring interfaces up only in namespaces of their own; root may anywhere, and each
# test makes its own.
IN_NAMESPACES = $(if $(filter 0,$(shell id -u)),,$(shell $(BIN)/python -m localmig.testing.namespace && echo $(BIN)/python -m localmig.testing.namespace))

APT_GET := DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300

RUST_SOURCES := $(shell find rust -path rust/dataplane/fuzz -prune -o -type f \( -name '*.rs' -o -name Cargo.toml \) -print) Cargo.toml $(wildcard Cargo.lock)

RUST_VERSION := $(shell sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)

# The binding and cargo's own runs must agree on the interpreter, or each would rebuild the other's work.
export PYO3_PYTHON := $(BIN)/python
export VIRTUAL_ENV := $(VENV)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test quick check bench bench-compare shortage fuzz soak vmm kill-matrix docs clean host-root demo-packages guest-packages guest-kernel bench-packages fuzz-packages lab-packages second-qemu

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

setup: $(VENV)/core.stamp ## make .venv and build localmig into it

demo: setup demo-packages $(VENV)/picture.stamp $(if $(findstring qemu,$(DEMO_ARGS))$(findstring --vmm,$(DEMO_ARGS)),guest-kernel) ## ten handovers under traffic, beside ten restarts; with DEMO_ARGS="--guest qemu" under QEMU; with DEMO_ARGS=--vmm QEMU itself is replaced
	@$(BIN)/python -m localmig.demo $(DEMO_ARGS)

test: setup guest-packages guest-kernel host-root second-qemu $(VENV)/picture.stamp ## run all tests; as root on Debian install what the guest tier needs
	@# Rust's tests beside Python's, which wait for much. pytest's summary ends the output.
	@mkdir -p target; $(CARGO) test --quiet --workspace >target/test.log 2>&1 & rust=$$!; \
	$(IN_NAMESPACES) $(PYTEST) $(PYTEST_ARGS); status=$$?; \
	wait $$rust || { status=1; cat target/test.log >&2; }; \
	exit $$status

quick: setup ## the tests that need nothing but this process: seconds
	@$(PYTEST) -q tests/unit tests/protocol tests/compat $(PYTEST_ARGS)

check: setup ## formats, lints, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest localmig.dataplane._dataplane
	$(BIN)/lint-imports
	$(CARGO) fmt --all --check
	$(CARGO) fmt --manifest-path rust/dataplane/fuzz/Cargo.toml --check
	$(CARGO) clippy --quiet --workspace --all-targets -- -D warnings

bench: setup guest-packages guest-kernel bench-packages ## measure, beside what others do: half an hour (BENCH_ARGS=--quick: minutes)
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

bench-compare: setup bench-packages ## measure this tree and commit BASE=REV (default: the one before) in turns; BENCH_ARGS=--quick
	@$(BIN)/python -m benchmarks compare $(if $(BASE),--base '$(BASE)') $(BENCH_ARGS)

shortage: setup ## let each system call of a handover fail with each error: the tests have a selection, all of it takes some minutes
	@# Each test in a process of its own, which keeps what it has of every daemon; select(2) sees 1024 descriptors.
	@export LOCALMIG_EVERY_CALL=1; $(BIN)/python -m pytest --collect-only -q tests/faults/test_shortage.py | grep :: | while read -r test; do \
	  $(IN_NAMESPACES) $(BIN)/python -m pytest -q --timeout=1800 "$$test" $(PYTEST_ARGS) </dev/null || exit 1; \
	done

fuzz: setup fuzz-packages $(VENV)/fuzz.stamp ## look for inputs that break what takes bytes from outside, FUZZ_SECONDS or FUZZ_RUNS for each target
	@for target in $(FUZZ_TARGETS); do \
	  echo "$$target: $(if $(FUZZ_RUNS),$(FUZZ_RUNS) runs,$(FUZZ_SECONDS) seconds)"; \
	  PYTHONHASHSEED=0 $(BIN)/python -m tests.fuzz $$target $(FUZZ_BOUND) || exit 1; \
	done

vmm: setup guest-packages guest-kernel second-qemu ## replace a guest's VMM ten times in a row in each way and shape, and move it between machines
	@# Each is alone: it counts the packets of an emulated guest.
	@export LOCALMIG_VMM_MOVES=10; $(IN_NAMESPACES) $(BIN)/python -m pytest tests/guest/test_vmm_moves.py tests/guest/test_vmm_to_another_machine.py $(PYTEST_ARGS)

kill-matrix: setup ## kill, stop and confuse either side at every point of a handover; writes docs/kill-matrix.md
	$(IN_NAMESPACES) $(BIN)/python -m pytest tests/faults/test_kill_matrix.py --kill-matrix docs/kill-matrix.md

soak: setup ## hand over SOAK_HANDOVERS times in a row, and fail to SOAK_FAILURES times: half an hour, nothing may be lost or grow
	@$(IN_NAMESPACES) $(BIN)/python -m tests.soak --handovers $(SOAK_HANDOVERS) --failures $(SOAK_FAILURES)

docs: setup ## draw the diagrams of docs/handover.md from its tables, write docs/device-api.md from the docstrings
	@$(BIN)/python -m tests.unit.diagrams
	@$(BIN)/python -m tests.unit.reference

clean: ## remove everything the other targets made
	rm -rf .venv .lab .fuzz target benchmarks/results .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src -name '*.so' -delete

define need_rust
	@command -v $(CARGO) >/dev/null || { echo "localmig's packet path needs a Rust toolchain ($(RUST_VERSION) or newer), and there is no '$(CARGO)': see https://rustup.rs" >&2; exit 1; }
	@$(CARGO) --version | awk '{ split($$2, is, "."); split("$(RUST_VERSION)", least, "."); exit is[1] * 1000 + is[2] < least[1] * 1000 + least[2] }' || \
	  { echo "localmig's packet path needs Rust $(RUST_VERSION) or newer, '$(CARGO)' is $$($(CARGO) --version): see https://rustup.rs" >&2; exit 1; }
	@command -v cc >/dev/null || { echo "Rust needs a linker, and there is no 'cc': on Debian, apt-get install gcc libc6-dev" >&2; exit 1; }
endef

$(VENV)/tools.stamp: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "localmig needs Python 3.11 or newer, and there is no '$(PYTHON)': install python3, or say PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "localmig needs Python 3.11 or newer, '$(PYTHON)' is $$($(PYTHON) --version 2>&1): say PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "'$(PYTHON)' cannot make virtual environments: on Debian, apt-get install python3-venv" >&2; exit 1; }
	$(need_rust)
	@echo "setting up .venv: tools from the Python package index, about half a minute"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1' # the first one that reads dependency groups
	@$(BIN)/python -m pip install --quiet --group dev
	@touch $@

$(VENV)/core.stamp: $(VENV)/tools.stamp $(RUST_SOURCES)
	$(need_rust)
	@echo "building the packet path: about half a minute the first time"
	@said=$$(PIP_QUIET=1 $(BIN)/maturin develop --release --quiet 2>&1) || { echo "$$said" >&2; exit 1; }
	@touch $@

$(VENV)/picture.stamp: $(VENV)/tools.stamp
	@$(BIN)/python -m pip install --quiet --retries 1 --group demo && touch $@ || \
	  echo "matplotlib could not be installed: the demonstration draws no picture"

$(VENV)/fuzz.stamp: $(VENV)/tools.stamp
	@$(BIN)/python -m pip install --quiet --group fuzz
	@touch $@

demo-packages: PACKAGES = $(DEMO_PACKAGES)
guest-packages: PACKAGES := $(GUEST_PACKAGES)
bench-packages: PACKAGES := $(BENCH_PACKAGES)
fuzz-packages: PACKAGES := $(FUZZ_PACKAGES)
lab-packages: PACKAGES := $(LAB_PACKAGES)
demo-packages guest-packages bench-packages fuzz-packages lab-packages:
	@missing=; for package in $(PACKAGES); do \
	  dpkg-query -W -f '$${Status}' $$package 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$package"; \
	done; \
	if [ -z "$$missing" ]; then :; \
	elif ! command -v apt-get >/dev/null; then echo "not Debian: what needs these is skipped unless they are here by other means:$$missing"; \
	elif [ ! -w /var/lib/dpkg ]; then echo "not root: what needs these is skipped; to have it, as root: apt-get install$$missing"; \
	else echo "installing:$$missing"; \
	  $(APT_GET) update -qq && $(APT_GET) install -qq -y --no-install-recommends $$missing >/dev/null; fi

host-root: lab-packages ## unpack a Debian with systemd into .lab, for the tests of service managers
	@[ -e .lab/systemd ] || [ "$$(id -u)" != 0 ] || { rm -rf .lab/unpack-systemd && mkdir -p .lab && \
	  mmdebstrap --quiet --variant=minbase --include=systemd,systemd-sysv,dbus,iproute2 bookworm .lab/unpack-systemd \
	    "deb $(DEBIAN_MIRROR) bookworm main" && mv .lab/unpack-systemd .lab/systemd; } || \
	  echo "no Debian root could be made: nothing is tested under systemd"
	@rm -rf .lab/unpack-systemd

guest-kernel: ## download the kernel that QEMU guests boot, into .lab
	@[ -e .lab/kernel ] || { rm -rf .lab/unpack && mkdir -p .lab/unpack && cd .lab/unpack && \
	  { apt-cache show linux-image-cloud-amd64 >/dev/null 2>&1 || { [ "$$(id -u)" = 0 ] && $(APT_GET) update -qq; }; } && \
	  package=$$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p') && \
	  apt-get -o APT::Sandbox::User=root download -qq $$package 2>&1 && dpkg -x $$package*.deb root && mv root ../kernel; } || \
	  echo "no guest kernel could be downloaded from Debian's packages: there are no guests under QEMU"
	@rm -rf .lab/unpack

# It stands beside the installed one: its own loader and libraries are written into it, so it runs like any program here.
second-qemu: lab-packages ## unpack a newer QEMU from Debian's backports into .lab: tests replace VMMs with both
	@[ -e .lab/qemu ] || { rm -rf .lab/unpack-qemu && mkdir -p .lab && mmdebstrap --quiet --variant=extract --include=qemu-system-x86 --aptopt='APT::Install-Recommends "false"' \
	    --aptopt='APT::Default-Release "trixie-backports"' trixie .lab/unpack-qemu "deb $(DEBIAN_MIRROR) trixie main" "deb $(DEBIAN_MIRROR) trixie-backports main" && \
	  libraries=$(CURDIR)/.lab/qemu/usr/lib/x86_64-linux-gnu && \
	  patchelf --set-interpreter $$libraries/ld-linux-x86-64.so.2 --force-rpath --set-rpath $$libraries .lab/unpack-qemu/usr/bin/qemu-system-x86_64 && \
	  mv .lab/unpack-qemu .lab/qemu; } || echo "no second QEMU could be unpacked from Debian's packages: VMMs are replaced with the installed one only"
	@rm -rf .lab/unpack-qemu
