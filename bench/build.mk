# SPDX-License-Identifier: Apache-2.0
# The benchmark's C programs, into build/bench. The stack is the release build of the main Makefile, which runs first.
# Called by `make bench` and by the tests: make -s -f bench/build.mk

OUT := build/bench
CC := gcc
CFLAGS := -std=c11 -D_GNU_SOURCE -O2 -g -Wall -Wextra -Werror
STACK := $(patsubst %.c,build/release/%.o,$(wildcard bypass/stack/*.c))
SIM := $(patsubst %.c,build/release/%.o,$(wildcard bypass/sim/*.c))
HEADERS := $(wildcard bench/*.h) bypass/include/bypass.h bypass/sim/sim.h

DPDK_ALL := $(addprefix $(OUT)/dpdk_,answer ask count)

all: $(addprefix $(OUT)/,client server_kernel blast inject callgrind_rr idle many sim_bulk sim_copies hostile goodput synflood churn load rr libserver.so) $(DPDK_ALL)

$(OUT)/callgrind_rr $(OUT)/idle $(OUT)/many $(OUT)/synflood $(OUT)/churn: $(OUT)/%: bench/%.c $(STACK) $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -Ibypass/include $< $(STACK) -o $@

$(OUT)/sim_bulk $(OUT)/sim_copies $(OUT)/hostile: $(OUT)/%: bench/%.c $(STACK) $(SIM) $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -Ibypass/include -Ibypass $< $(STACK) $(SIM) -o $@

$(OUT)/goodput: $(wildcard bench/goodput/*.c) $(STACK) $(SIM) $(HEADERS) bench/goodput/goodput.h
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -Ibench -Ibypass/include -Ibypass $(filter %.c %.o,$^) -o $@

# With DPDK below (bench/dpdk): the plug-in is loaded when they run.
DPDK := $(wildcard bench/dpdk/*.h bypass/dpdk_backend/*.h) build/release/bypass/dpdk_backend/load.o
$(OUT)/dpdk_answer: bench/server_bypass.c
$(DPDK_ALL): $(OUT)/dpdk_%: bench/dpdk/%.c $(STACK) $(HEADERS) $(DPDK)
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -Ibench -Ibypass/include -Ibypass $(filter %.c %.o,$^) -ldl -o $@

$(OUT)/libserver.so: bench/server_bypass.c build/libbypass.so $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -fPIC -shared -fvisibility=hidden -Ibypass/include $< -Lbuild -lbypass -Wl,-rpath,'$$ORIGIN/..' -o $@

$(OUT)/%: bench/%.c $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) $< -o $@

.PHONY: all
