# SPDX-License-Identifier: Apache-2.0
# The libFuzzer harnesses, by clang, under the address and undefined-behaviour sanitizers, into build/fuzz.
# Called by scripts/fuzz: make -s -f tests/c/fuzz.mk

OUT := build/fuzz
CLANG := clang-14
CFLAGS := -std=c11 -D_GNU_SOURCE -O1 -g -fno-omit-frame-pointer -Wall -Wextra -Werror -DBYPASS_DEBUG \
	-fsanitize=address,undefined -fno-sanitize-recover=all
STACK := $(patsubst bypass/stack/%.c,$(OUT)/stack/%.o,$(wildcard bypass/stack/*.c))
FWD := $(patsubst %,$(OUT)/fwd/%.o,port peer lease check forward)
CLASSIFY := $(patsubst bypass/dpdk_backend/%.c,$(OUT)/dpdk_backend/%.o,$(wildcard bypass/dpdk_backend/classify*.c))
FILTER := $(patsubst %,$(OUT)/dpdk_backend/%.o,filter exception)
DPDK := $(shell pkg-config --cflags libdpdk 2> /dev/null | sed 's/-I/-isystem /g') # headers: no library is linked
HARNESSES := $(patsubst tests/c/%.c,$(OUT)/%,$(wildcard tests/c/fuzz_f[riw]*.c tests/c/fuzz_o*.c tests/c/fuzz_reass.c tests/c/fuzz_classify.c $(if $(DPDK),tests/c/fuzz_tso.c)))

MAKEFLAGS += --no-builtin-rules

all: $(HARNESSES)

$(OUT)/stack/%.o: bypass/stack/%.c
	@mkdir -p $(@D)
	$(CLANG) $(CFLAGS) -fsanitize=fuzzer-no-link -Ibypass/include -Ibypass/stack -MMD -MP -c $< -o $@

$(OUT)/fwd/%.o: bypass/fwd/%.c
	@mkdir -p $(@D)
	$(CLANG) $(CFLAGS) -fsanitize=fuzzer-no-link -Ibypass/include -Ibypass -MMD -MP -c $< -o $@

$(OUT)/dpdk_backend/%.o: bypass/dpdk_backend/%.c
	@mkdir -p $(@D)
	$(CLANG) $(CFLAGS) -U_GNU_SOURCE -fsanitize=fuzzer-no-link -Ibypass/include -Ibypass -MMD -MP -c $< -o $@

$(OUT)/fuzz_classify: tests/c/fuzz_classify.c $(wildcard tests/c/*.h) $(CLASSIFY)
	$(CLANG) $(CFLAGS) -fsanitize=fuzzer -Ibypass/include -Ibypass $< $(CLASSIFY) -o $@

$(OUT)/fuzz_filter: tests/c/fuzz_filter.c $(wildcard tests/c/*.h) $(FILTER)
	$(CLANG) $(CFLAGS) -fsanitize=fuzzer -Ibypass/include -Ibypass $< $(FILTER) -o $@

$(OUT)/fuzz_tso: tests/c/fuzz_tso.c bypass/dpdk_backend/eth/tso.c bypass/dpdk_backend/eth/port.h $(wildcard tests/c/*.h)
	$(CLANG) $(subst -std=c11,-std=gnu11,$(CFLAGS)) -fsanitize=fuzzer -Ibypass/include -Ibypass -Ibypass/dpdk_backend $(DPDK) \
		$(filter %.c,$^) -o $@

$(OUT)/fuzz_fwd: tests/c/fuzz_fwd.c $(wildcard tests/c/*.h) $(FWD)
	$(CLANG) $(CFLAGS) -fsanitize=fuzzer -Ibypass/include -Ibypass $< $(FWD) -o $@

$(OUT)/%: tests/c/%.c $(wildcard tests/c/*.h) $(STACK)
	$(CLANG) $(CFLAGS) -fsanitize=fuzzer -Ibypass/include -Ibypass/stack $< $(STACK) -o $@

.PHONY: all
.SECONDARY: $(STACK) $(FWD) $(CLASSIFY) $(FILTER)

-include $(STACK:.o=.d) $(FWD:.o=.d) $(CLASSIFY:.o=.d) $(FILTER:.o=.d)
