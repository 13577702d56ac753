# bypass: what can be done with it. `make help` prints the comments behind the targets.
#
# Variants of the C core: the release build, `BYPASS_DEBUG=1` (asserts) and `SAN=1` (address and undefined-behaviour
# sanitizers). Each has its own folder below build/, so that switching costs nothing.

.DELETE_ON_ERROR:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules

VENV := .venv
PY := $(VENV)/bin/python
VARIANT := $(if $(SAN),san,$(if $(BYPASS_DEBUG),debug,release))
OUT := build/$(VARIANT)
ifeq ($(MAKELEVEL),0)
MAKEFLAGS += -j$(shell nproc)
endif
Q := $(if $(V),,@)# V=1 shows the commands
# Compiled Python is kept, whatever the environment says: tests start hundreds of interpreters.
unexport PYTHONDONTWRITEBYTECODE

CC := gcc
CFLAGS_release := -O3 -g
CFLAGS_debug := -O1 -g -DBYPASS_DEBUG
comma := ,
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all
CFLAGS_san := -O1 -g -DBYPASS_DEBUG -fno-omit-frame-pointer $(SANITIZE)
CFLAGS := -std=c11 -fPIC -fvisibility=hidden -Wall -Wextra -Werror $(CFLAGS_$(VARIANT))
LDFLAGS := $(if $(SAN),$(SANITIZE))

STACK_SRC := $(wildcard bypass/stack/*.c)
OTHER_SRC := $(wildcard bypass/app/*.c bypass/afxdp/*.c bypass/sim/*.c bypass/dpdk_backend/*.c) bypass/fwd/port.c bypass/host.c
STACK_OBJ := $(STACK_SRC:%.c=$(OUT)/%.o)
OTHER_OBJ := $(OTHER_SRC:%.c=$(OUT)/%.o)
# The preload library: the core, the devices that an application may have, and the calls of unmodified programs.
LINGER_SRC := bypass/preload/linger.c
PRELOAD_SRC := $(filter-out $(LINGER_SRC),$(wildcard bypass/preload/*.c))
DEVICE_OBJ := $(patsubst %.c,$(OUT)/own/%.o,$(wildcard bypass/afxdp/*.c) bypass/fwd/port.c)
PRELOAD_OBJ := $(PRELOAD_SRC:%.c=$(OUT)/%.o) $(STACK_OBJ) \
	$(patsubst %.c,$(OUT)/%.o,$(wildcard bypass/app/*.c) bypass/host.c) $(DEVICE_OBJ)
PUBLIC_H := $(wildcard bypass/include/*.h bypass/afxdp/*.h bypass/sim/*.h bypass/app/*.h) bypass/fwd/port.h bypass/fwd/fwd.h bypass/host.h bypass/frames.h \
	bypass/dpdk_backend/plugin.h bypass/dpdk_backend/load.h bypass/dpdk_backend/classify.h bypass/dpdk_backend/filter.h \
	bypass/dpdk_backend/exception.h bypass/bpf/reasons.h

# The release extension lies in the package; the other variants beside their objects, found through BYPASS_BUILD.
EXT := $(if $(filter release,$(VARIANT)),bypass,$(OUT)/py)/_core.so
PRELOAD := $(if $(filter release,$(VARIANT)),build,$(OUT))/libbypass-preload.so
LIB := $(if $(filter release,$(VARIANT)),build,$(OUT))/libbypass.so
# bypass-fwd: no Python, no stack; the devices, and what moves frames between them and applications.
FWD_OBJ := $(patsubst %.c,$(OUT)/%.o,$(wildcard bypass/fwd/*.c bypass/afxdp/*.c bypass/dpdk_backend/*.c))
# bypass-linger: drives what the last process of an application left. It has the preload library in it.
LINGER_OBJ := $(LINGER_SRC:%.c=$(OUT)/%.o) $(PRELOAD_OBJ)
LINGER := $(if $(filter release,$(VARIANT)),build,$(OUT))/bypass-linger
FWD := $(if $(filter release,$(VARIANT)),build,$(OUT))/bypass-fwd

# The DPDK plug-in: built where DPDK is (libdpdk 22.11 or later), the only code that sees its headers.
DPDK_SRC := $(wildcard bypass/dpdk_backend/eth/*.c)
DPDK_OBJ := $(DPDK_SRC:%.c=$(OUT)/%.o)
DPDK := $(shell pkg-config --exists 'libdpdk >= 22.11' 2> /dev/null && echo $(if $(filter release,$(VARIANT)),build,$(OUT))/bypass-dpdk.so)

# How Python is started. The sanitizers' runtime has to be there before the interpreter, hence a script, which also
# starts the Python children of tests; other programs do without it (curl's threads hang under it now and then).
RUN_release := $(CURDIR)/$(PY)
RUN_debug := BYPASS_BUILD=$(CURDIR)/$(OUT)/py $(CURDIR)/$(PY)
RUN_san := $(CURDIR)/$(OUT)/python
RUN := $(RUN_$(VARIANT))
# Many tests wait most of their time: two workers more than there are cores. JOBS=0: one test after the other, in one process.
JOBS := $(shell n=$$(nproc); echo $$((n < 6 ? n + 2 : 8)))
ASAN := detect_leaks=0:abort_on_error=1:handle_segv=1

.PHONY: help setup build install demo programs test test-oracle test-classifier test-cpython test-programs test-killing test-backends test-vm bench bench-dpdk bench-goodput bench-lossy bench-programs lint fuzz clean

help: ## This list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r t d; do \
		printf '  make %-14s %s\n' "$$t" "$$d"; done
	@echo
	@echo '  Variables: ARGS="..." for pytest or the benchmark, JOBS=0 (tests one after the other), BYPASS_DEBUG=1 (asserts),'
	@echo '  SAN=1 (sanitizers), V=1 (commands).'

setup: build ## Debian packages, .venv with pinned dependencies, the C core (demo, test and the others call it)

build: $(VENV)/.stamp $(EXT) $(LIB) $(FWD) $(PRELOAD) $(LINGER) $(DPDK) $(if $(SAN),$(OUT)/python) ## The C core: bypass/_core*.so for Python, build/libbypass.so, build/bypass-fwd, build/bypass-linger

PREFIX ?= /usr/local
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
install: build ## The C libraries, headers and pkg-config files: below PREFIX (/usr/local), in DESTDIR
	$(Q)install -d $(DESTDIR)$(PREFIX)/lib/pkgconfig $(DESTDIR)$(PREFIX)/lib/bypass $(DESTDIR)$(PREFIX)/include
	$(Q)install -m 755 $(LINGER) $(FWD) $(DESTDIR)$(PREFIX)/lib/bypass/
	$(if $(DPDK),$(Q)install -m 755 $(DPDK) $(DESTDIR)$(PREFIX)/lib/bypass/)
	$(Q)install -m 755 $(LIB) $(PRELOAD) $(DESTDIR)$(PREFIX)/lib/
	$(Q)ln -sf libbypass-preload.so $(DESTDIR)$(PREFIX)/lib/libbypass-posix.so
	$(Q)install -m 644 bypass/include/bypass.h $(DESTDIR)$(PREFIX)/include/
	$(Q)for pc in bypass bypass-posix; do sed 's#@PREFIX@#$(PREFIX)#; s#@VERSION@#$(VERSION)#' scripts/$$pc.pc.in \
		> $(DESTDIR)$(PREFIX)/lib/pkgconfig/$$pc.pc; done

demo: setup ## The demonstration: kernel and bypass on one address (BACKEND=dpdk: on a DPDK port); simulated without root or XDP
	@$(RUN) -m bypass.demo $(if $(BACKEND),--backend $(BACKEND)) $(ARGS)

programs: setup ## Debian's programs that tests and benchmarks run, unpacked below .venv/debian
	@scripts/programs

test: setup programs ## The whole test suite (ARGS="-k tcp" for a part of it)
	@$(RUN) -m pytest -n $(JOBS) --dist worksteal $(ARGS)

test-oracle: setup ## The TCP scripts against this machine's kernel, compared with the registered differences (root)
	@$(RUN) tests/oracle.py $(ARGS)

test-classifier: setup ## 100,000 frames through the XDP program and the classifier of the DPDK backend: same verdicts (~1 min; root)
	@BYPASS_CLASSIFIER_FRAMES=100000 $(RUN) -m pytest -q -s tests/test_classify_equivalence.py $(ARGS)

test-cpython: setup ## CPython's own socket tests on the kernel and on the stack's loopback: same results (~5 min)
	@$(RUN) tests/cpython_suite.py $(ARGS)

bench: setup ## Rates, latency and CPU against the kernel and a bare ring-to-ring echo (ROUNDS=5); leaves build/bench.json
	@$(MAKE) --no-print-directory -s -f bench/build.mk
	@$(RUN) -m bench $(if $(ROUNDS),--rounds $(ROUNDS)) $(ARGS)

bench-dpdk: setup ## DPDK against testpmd, AF_XDP and the kernel, and in memory (ROUNDS=5, ~4 min); leaves build/dpdk.json
	@$(MAKE) --no-print-directory -s -f bench/build.mk
	@$(RUN) -m bench.dpdk $(if $(ROUNDS),--rounds $(ROUNDS)) $(ARGS)

bench-goodput: setup ## Goodput under twelve impairments against Linux (ROUNDS=5, ~30 min; ARGS=--quick ROUNDS=1: 2 min)
	@$(MAKE) --no-print-directory -s -f bench/build.mk
	@$(RUN) -m bench.goodput $(if $(ROUNDS),--rounds $(ROUNDS)) $(ARGS)

test-programs: setup programs ## Debian's programs, unmodified: do they work, who served? (~15 min; ARGS="--only redis --on dpdk")
	@$(RUN) -m bench.apps $(ARGS)

test-killing: setup programs ## SIGKILL at 100 random moments of each role under load: what peers saw, what is left (~20 min)
	@$(RUN) -m bench.killing $(ARGS)

test-backends: setup programs ## The tests of both backends, AF_XDP and DPDK, side by side (~4 min; root); leaves build/backends.json
	@$(RUN) tests/side_by_side.py -n $(JOBS) --dist worksteal $(ARGS)

test-vm: setup ## Real drivers (e1000e, virtio-net) in QEMU: AF_XDP on two queues, DPDK by vfio-pci and back (~3 min; root)
	@scripts/vm
	@$(VENV)/bin/python tests/vm $(ARGS)

bench-programs: setup programs ## What they cost, kernel and bypass in turn (ROUNDS=5, ~10 min); leaves build/versus.json
	@$(MAKE) --no-print-directory -s -f bench/build.mk
	@$(RUN) -m bench.versus $(if $(ROUNDS),--rounds $(ROUNDS)) $(ARGS)

lint: $(VENV)/.stamp ## ruff, mypy --strict and clang-format
	@scripts/lint

bench-lossy: setup ## A gigabyte each way through 2 % of loss, beside Linux (~5 min; ARGS="--bytes N --loss 0.02 --rounds N")
	@$(RUN) -m bench.lossy $(ARGS)

fuzz: setup ## libFuzzer over the C core (FUZZ=60: seconds a harness), then the hypothesis suites with TIMES=20 times the examples (0: without)
	@scripts/fuzz $(or $(FUZZ),60)
	$(if $(filter-out 0,$(or $(TIMES),20)),@$(MAKE) --no-print-directory SAN=1 BYPASS_FUZZ=$(or $(TIMES),20) test ARGS="-m hypothesis --timeout=0 $(ARGS)")

clean: ## Removes what was built; .venv stays (remove it by hand for a fresh start)
	rm -rf build bypass/_core*.so
	find bypass tests -name __pycache__ -prune -exec rm -rf {} +

# ---- Set-up: redone when a file that names dependencies has changed --------------------------------------------
$(VENV)/.stamp: scripts/setup requirements.txt requirements-dev.txt pyproject.toml
	@scripts/setup

# ---- The C core ------------------------------------------------------------------------------------------------
INC_stack := -Ibypass/include -Ibypass/stack
INC_rest := -Ibypass/include -Ibypass

# (The compiler is one of the things that set-up installs.)
$(OUT)/bypass/stack/%.o: bypass/stack/%.c | $(VENV)/.stamp
	@mkdir -p $(@D)
	@echo '  CC   $(OUT): $<'
	$(Q)$(CC) $(CFLAGS) $(INC_stack) -MMD -MP -c $< -o $@

# Loaded with the program: its thread-local data has a fixed place.
$(OUT)/bypass/preload/%.o: CFLAGS += -ftls-model=initial-exec

# DPDK's headers are not ours to warn about; GNU C, as they are.
$(OUT)/bypass/dpdk_backend/eth/%.o: bypass/dpdk_backend/eth/%.c | $(VENV)/.stamp
	@mkdir -p $(@D)
	@echo '  CC   $(OUT): $<'
	$(Q)$(CC) $(subst -std=c11,-std=gnu11,$(CFLAGS)) $(INC_rest) -Ibypass/dpdk_backend \
		$$(pkg-config --cflags libdpdk | sed 's/-I/-isystem /g') -MMD -MP -c $< -o $@

$(OUT)/bypass/%.o: bypass/%.c | $(VENV)/.stamp
	@mkdir -p $(@D)
	@echo '  CC   $(OUT): $<'
	$(Q)$(CC) $(CFLAGS) $(INC_rest) -MMD -MP -c $< -o $@

$(OUT)/own/bypass/%.o: bypass/%.c | $(VENV)/.stamp
	@mkdir -p $(@D)
	@echo '  CC   $(OUT): $< (preload)'
	$(Q)$(CC) $(CFLAGS) $(INC_rest) -include preload/own_calls.h -MMD -MP -c $< -o $@

# The Python module's own C file is generated from the public headers.
$(OUT)/_core.c: bypass/_build_core.py $(PUBLIC_H) | $(VENV)/.stamp
	@mkdir -p $(@D)
	@echo '  GEN  $@'
	$(Q)rm -f $@ && $(PY) bypass/_build_core.py $@ > /dev/null

$(OUT)/_core.o: $(OUT)/_core.c
	@echo '  CC   $(OUT): $<'
	$(Q)$(CC) $(CFLAGS) -Wno-unused-parameter -Wno-missing-field-initializers $(INC_rest) \
		-I$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("include"))') -MMD -MP -c $< -o $@

$(EXT): $(OUT)/_core.o $(STACK_OBJ) $(OTHER_OBJ) $(OUT)/sources
	@mkdir -p $(@D)
	@echo '  LINK $@'
	$(Q)$(CC) -shared $(LDFLAGS) $(filter %.o,$^) -o $@.tmp
	@echo '$(filter %.o,$^)' > $(OUT)/_core.objects
	@mv $@.tmp $@

$(LIB): $(STACK_OBJ) $(OUT)/sources scripts/libbypass.map
	@mkdir -p $(@D)
	@echo '  LINK $@'
	$(Q)$(CC) -shared $(LDFLAGS) $(if $(SAN),,-Wl$(comma)-z$(comma)defs) -Wl,--version-script=scripts/libbypass.map $(STACK_OBJ) -o $@

$(PRELOAD): $(PRELOAD_OBJ) $(OUT)/sources scripts/preload.map
	@mkdir -p $(@D)
	@echo '  LINK $@'
	$(Q)$(CC) -shared $(LDFLAGS) -Wl,-Bsymbolic $(if $(SAN),,-Wl$(comma)-z$(comma)defs) -Wl,--version-script=scripts/preload.map \
		$(PRELOAD_OBJ) -o $@.tmp && mv $@.tmp $@

$(FWD): $(FWD_OBJ)
	@mkdir -p $(@D)
	@echo '  LINK $@'
	$(Q)$(CC) -pthread $(LDFLAGS) $^ -o $@

# Only what is called is linked: drivers are loaded by EAL from DPDK's folder.
DPDK_LIBS := -lrte_ethdev -lrte_mbuf -lrte_mempool -lrte_eal
build/bypass-dpdk.so $(OUT)/bypass-dpdk.so: $(DPDK_OBJ)
	@mkdir -p $(@D)
	@echo '  LINK $@'
	$(Q)$(CC) -shared $(LDFLAGS) $(if $(SAN),,-Wl$(comma)-z$(comma)defs) $^ $$(pkg-config --libs-only-L libdpdk) $(DPDK_LIBS) \
		-pthread -o $@.tmp && mv $@.tmp $@

$(LINGER): $(LINGER_OBJ) $(OUT)/sources
	@mkdir -p $(@D)
	@echo '  LINK $@'
	$(Q)$(CC) -pthread $(LDFLAGS) $(LINGER_OBJ) -o $@.tmp && mv $@.tmp $@

$(OUT)/python: Makefile
	@mkdir -p $(@D)
	@printf '%s\n' '#!/bin/sh' '# Python with the sanitizers: made by the Makefile' \
		'export BYPASS_BUILD="$${BYPASS_BUILD:-$(CURDIR)/$(OUT)/py}" BYPASS_PYTHON="$(CURDIR)/$@"' \
		'export ASAN_OPTIONS=$(ASAN) UBSAN_OPTIONS=print_stacktrace=1' \
		"export LD_PRELOAD='$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)'\$${LD_PRELOAD:+' '\$$LD_PRELOAD}" \
		'exec "$(CURDIR)/$(PY)" "$$@"' > $@
	@chmod +x $@

# A removed or added source file has to link anew too: the list is a file that changes only with the list.
$(OUT)/sources: FORCE
	@mkdir -p $(@D)
	@echo '$(STACK_SRC) $(OTHER_SRC) $(PRELOAD_SRC)' | cmp -s - $@ || echo '$(STACK_SRC) $(OTHER_SRC) $(PRELOAD_SRC)' > $@
FORCE:

-include $(DPDK_OBJ:.o=.d) $(LINGER_OBJ:.o=.d) $(FWD_OBJ:.o=.d) $(STACK_OBJ:.o=.d) $(OTHER_OBJ:.o=.d) $(OUT)/_core.d
