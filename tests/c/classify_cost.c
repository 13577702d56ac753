/* SPDX-License-Identifier: Apache-2.0 */
/*
 * classify_cost.c - what the classifier costs a packet of a live entry, under one mask and a rule for each peer.
 *
 *   classify_cost RULES PATTERN CALL PACKETS
 *
 * PATTERN: hot (one flow), random (any of them). CALL: single, burst. Prints nanoseconds of a packet; under
 * `valgrind --tool=callgrind --collect-atstart=no` the calls alone are counted.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <valgrind/callgrind.h>

#include "dpdk_backend/classify.h"

enum { FRAMES = 1 << 15, BYTES = 54, ROUND = 32, PORT = 8080 };

static uint8_t frames[FRAMES][64];
static struct classify_frame in[FRAMES];

static void die(const char *what)
{
    fprintf(stderr, "classify_cost: %s\n", what);
    exit(1);
}

static void put32(uint8_t *p, uint32_t v)
{
    for (int i = 0; i < 4; i++)
        p[i] = (uint8_t)(v >> (24 - 8 * i));
}

static uint32_t peer(uint32_t i) { return 10u << 24 | i; }

/* Rule i: TCP from peer i to the port. */
static void put_rules(struct classifier *c, uint32_t n)
{
    struct classify_mask mask = {.bits = {0, 0, 0, 0, 255, 255, 255, 255, 255, 255, 0, 0, 0, 0, 255, 0}, .max_rank = n};
    uint8_t *keys = calloc(n, 16);
    struct classify_rule *values = calloc(n, sizeof *values);
    struct classify_policy p = {.masks_n = 1, .rules = n, .keys_n = n, .masks = &mask, .keys = keys, .values = values};

    if (!keys || !values)
        die("no memory");
    for (uint32_t i = 0; i < n; i++) {
        put32(keys + 16 * (size_t)i + 4, peer(i));
        keys[16 * (size_t)i + 8] = PORT >> 8;
        keys[16 * (size_t)i + 9] = PORT & 255;
        keys[16 * (size_t)i + 14] = 6;
        values[i] = (struct classify_rule){.rank = i + 1, .rule_action = i << 2};
    }
    if (classify_rules_set(c, &p))
        die("rules");
    free(keys);
    free(values);
}

static void put_frame(uint8_t *f, uint32_t from)
{
    static const uint8_t head[] = {0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 9, 8, 0, 0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6};

    memset(f, 0, BYTES);
    memcpy(f, head, sizeof head);
    put32(f + 26, from);
    put32(f + 30, 0xc000020a);
    f[34] = 0x9c;
    f[36] = PORT >> 8;
    f[37] = PORT & 255;
    f[46] = 0x50;
    f[47] = 0x10;
}

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static int by_size(const void *a, const void *b)
{
    const double *x = a, *y = b;

    return (*x > *y) - (*x < *y);
}

/* Nanoseconds of a packet: the fifth part of the rounds was as quick. What else the machine does meets the others. */
static double run(struct classifier *c, int burst, uint32_t packets)
{
    uint32_t rounds = packets / ROUND, at = 0;
    double *took = calloc(rounds, sizeof *took), result;
    struct classify_result out[ROUND];

    if (!took)
        die("no memory");
    for (uint32_t r = 0; r < rounds; r++, at = (at + ROUND) % FRAMES) {
        double begin = now();

        CALLGRIND_TOGGLE_COLLECT;
        if (burst) {
            classify_burst(c, in + at, ROUND, out);
        } else {
            for (uint32_t i = 0; i < ROUND; i++)
                classify(c, in[at + i].data, in[at + i].len, 0, &out[i]);
        }
        CALLGRIND_TOGGLE_COLLECT;
        took[r] = (now() - begin) / ROUND;
        if (out[0].reason != REASON_STEERED || out[ROUND - 1].reason != REASON_STEERED)
            die("a packet is not steered");
    }
    qsort(took, rounds, sizeof *took, by_size);
    result = took[rounds / 5];
    free(took);
    return result;
}

int main(int argc, char **argv)
{
    struct classify_config cfg = {
        .abi = CLASSIFY_ABI, .endpoints = 65536, .held = 65536, .members = 8192, .seed = 4711};
    struct classify_key key = {.local_port = {PORT >> 8, PORT & 255}, .proto = 6};
    const uint8_t local[16] = {192, 0, 2, 10}, mac[6] = {0};
    uint32_t rules = argc == 5 ? (uint32_t)atol(argv[1]) : 0, packets, chance = 1;
    struct classifier c;
    void *mem;
    int hot, burst;

    if (!rules)
        die("usage: classify_cost RULES hot|random single|burst PACKETS");
    hot = strcmp(argv[2], "hot") == 0;
    burst = strcmp(argv[3], "burst") == 0;
    packets = (uint32_t)atol(argv[4]);
    cfg.keys = rules;
    mem =
        mmap(NULL, classify_mem_size(&cfg), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mem == MAP_FAILED || classify_init(&c, mem, classify_mem_size(&cfg), &cfg))
        die("init");
    put_rules(&c, rules);
    classify_mac_set(&c, mac);
    memcpy(key.local, local, 4);
    if (classify_set_add(&c, CLASSIFY_LOCALS4, local) ||
        classify_endpoint_add(&c, &key, &(struct classify_endpoint){0}))
        die("entries");
    for (uint32_t i = 0; i < FRAMES; i++) {
        chance = chance * 1664525 + 1013904223;
        put_frame(frames[i], peer(hot ? rules / 2 : (uint32_t)((uint64_t)chance * rules >> 32)));
        in[i] = (struct classify_frame){.data = frames[hot ? 0 : i], .len = BYTES};
    }
    printf("%.1f\n", run(&c, burst, packets));
    return 0;
}
