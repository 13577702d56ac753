/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_sack_cost.c - what acknowledgments of a peer that lies cost the sender, for callgrind to count: bypass_poll() with
 * one such ACK each time, all that leaves in answer included.
 *
 *   valgrind --tool=callgrind --collect-atstart=no tcp_sack_cost PATTERN FLIGHT ACKS
 *
 * FLIGHT segments are out and one peer answers with ACKS acknowledgments. PATTERN:
 *
 *   honest   the first is missing: each ACK's block is longer by a segment
 *   beyond   four blocks of what was never sent
 *   random   four blocks of a segment anywhere
 *   edges    four blocks anywhere that begin and end inside segments
 *   descend  every second segment, the last first
 *   whole    nearly all that is out, each time with other edges
 *   dsack    duplicates are reported of what was acknowledged, anywhere
 *   undo     all retransmissions are called duplicates, by an ACK that moves on; then one of them is SACKed
 *   renege   a block at the ACK, which moves on by a segment
 */
#include <valgrind/callgrind.h>

#define MEMPORT_COUNT 65536
#include "peer.h"

enum { MSS = 536, BLOCKS = 4, STEP_NS = 20000 };

static bypass_sock sock;
static uint32_t una, nxt; /* what the peer acknowledges; behind what was sent */
static uint32_t resent;   /* what left last of what had left before */
static uint32_t chance = 12345;

static uint32_t below(uint32_t n)
{
    chance = chance * 1664525 + 1013904223;
    return (chance >> 8) % n;
}

static void carry(void)
{
    const uint8_t *h;
    uint32_t len;
    while ((h = carried(&len))) {
        uint32_t first = get32(h + 4), end = first + len + (h[13] & 2 ? 1 : 0);
        if (una == 0)
            una = nxt = first + 1;
        else if ((int32_t)(end - nxt) > 0)
            nxt = end;
        else if (end != first)
            resent = first;
    }
}

static void ack(const uint32_t *edges, uint32_t n)
{
    uint8_t opts[2 + 2 + 8 * BLOCKS] = {1, 1, 5, (uint8_t)(2 + 8 * n)};
    for (uint32_t i = 0; i < 2 * n; i++)
        put32(opts + 4 + 4 * i, edges[i]);
    inject(16, 1, una, opts, n > 0 ? 4 + 8 * n : 0, 0);
}

/* ---- The connection --------------------------------------------------------------------------------------------- */
static void open_connection(void)
{
    static const uint8_t opts[12] = {2, 4, MSS >> 8, MSS & 255, 4, 2, 1, 1, 1, 3, 3, 14};
    bypass_sock listener = listen_with(BYPASS_SO_SNDBUF, 64 << 20);
    inject(2, 0, una, opts, sizeof opts, 0);
    poll_after(STEP_NS);
    carry();
    inject(16, 1, una, NULL, 0, 0);
    poll_after(STEP_NS);
    sock = bypass_accept(&stack, listener);
    if (sock < 0)
        die("accept", sock);
}

static void send_segments(uint32_t n)
{
    static uint8_t data[MSS];
    for (uint32_t i = 0; i < n; i++)
        if (bypass_send(&stack, sock, data, sizeof data, 0) != MSS)
            die("send", -EAGAIN);
    poll_after(STEP_NS);
    carry();
}

/* Slow start, each segment acknowledged, until the window holds so many; then all of them are out. */
static void fly(uint32_t flight)
{
    struct bypass_tcp_info info;
    while (bypass_tcp_info(&stack, sock, &info) == 0 && info.cwnd < flight * MSS) {
        send_segments(info.cwnd / MSS);
        for (uint32_t end = nxt; una != end; carry()) {
            una += MSS;
            ack(NULL, 0);
            poll_after(STEP_NS);
        }
    }
    send_segments(flight);
    if (nxt - una != flight * MSS)
        die("flight", -EINVAL);
}

/* ---- Patterns --------------------------------------------------------------------------------------------------- */
static void block(uint32_t *edges, uint32_t first, uint32_t end)
{
    edges[0] = first;
    edges[1] = end;
}

/* The blocks of ACK number i; returns how many. */
static uint32_t honest(uint32_t *e, uint32_t i, uint32_t flight)
{
    block(e, una + MSS, una + MSS * (2 + i % (flight - 1)));
    return 1;
}

static uint32_t beyond(uint32_t *e, uint32_t i, uint32_t flight)
{
    for (uint32_t b = 0; b < BLOCKS; b++)
        block(e + 2 * b, nxt + MSS * (1 + b + below(flight)), nxt + MSS * (i + flight + 3));
    return BLOCKS;
}

static uint32_t anywhere(uint32_t *e, uint32_t i, uint32_t flight)
{
    (void)i;
    for (uint32_t b = 0; b < BLOCKS; b++) {
        uint32_t n = 1 + below(flight - 1);
        block(e + 2 * b, una + MSS * n, una + MSS * (n + 1));
    }
    return BLOCKS;
}

static uint32_t edges(uint32_t *e, uint32_t i, uint32_t flight)
{
    for (uint32_t b = 0; b < BLOCKS; b++) {
        uint32_t n = 1 + below(flight - 2);
        block(e + 2 * b, una + MSS * n + 1 + i % 500, una + MSS * (n + 1) + i % 500);
    }
    return BLOCKS;
}

static uint32_t descend(uint32_t *e, uint32_t i, uint32_t flight)
{
    uint32_t n = flight - 1 - 2 * i % (flight - 2);
    block(e, una + MSS * n, una + MSS * (n + 1));
    return 1;
}

static uint32_t whole(uint32_t *e, uint32_t i, uint32_t flight)
{
    block(e, una + MSS * (1 + i % 2) + i % 500, una + MSS * (flight - i % 3));
    return 1;
}

static uint32_t dsack(uint32_t *e, uint32_t i, uint32_t flight)
{
    uint32_t n = 1 + below(flight - 1);
    block(e, una - MSS * (1 + i % 9), una - MSS * (i % 9));
    block(e + 2, una + MSS * n, una + MSS * (n + 1));
    return 2;
}

static uint32_t undo(uint32_t *e, uint32_t i, uint32_t flight)
{
    if (i % 3 == 2 && nxt - una > flight / 4 * MSS) { /* all of it was needless */
        una += MSS;
        block(e, una - 60 * MSS, una);
    } else if (i % 3 == 1 && (int32_t)(resent - una) > 0) { /* it arrived, so all that left before is lost */
        block(e, resent, resent + MSS);
    } else {
        uint32_t n = (nxt - una) / MSS - 1 - i / 3 % (flight / 8);
        block(e, una + MSS * n, una + MSS * (n + 1));
    }
    return 1;
}

static uint32_t renege(uint32_t *e, uint32_t i, uint32_t flight)
{
    (void)flight;
    if (i % 2 == 1 && nxt - una > 4 * MSS)
        una += MSS;
    block(e, una + MSS, una + 3 * MSS);
    return 1;
}

static const struct {
    const char *name;
    uint32_t (*blocks)(uint32_t *, uint32_t, uint32_t);
} PATTERNS[] = {{"honest", honest}, {"beyond", beyond}, {"random", anywhere}, {"edges", edges},  {"descend", descend},
                {"whole", whole},   {"dsack", dsack},   {"undo", undo},       {"renege", renege}};

static void run(const char *name, uint32_t flight, uint32_t acks)
{
    for (size_t p = 0; p < sizeof PATTERNS / sizeof *PATTERNS; p++) {
        if (strcmp(PATTERNS[p].name, name) != 0)
            continue;
        for (uint32_t i = 0; i < acks; i++) {
            uint32_t e[2 * BLOCKS];
            ack(e, PATTERNS[p].blocks(e, i, flight));
            CALLGRIND_TOGGLE_COLLECT;
            poll_after(STEP_NS);
            CALLGRIND_TOGGLE_COLLECT;
            carry();
        }
        return;
    }
    die(name, -EINVAL);
}

/* What the stack counted of it: the ACKs were taken for what they are. */
static void report(void)
{
    const uint64_t *values = bypass_stats(&stack);
    printf("{\"flight\": %u", (nxt - una) / MSS);
    for (int i = 0; i < bypass_stat_count(); i++)
        if (values[i] > 0)
            printf(", \"%s\": %llu", bypass_stat_name(i), (unsigned long long)values[i]);
    puts("}");
}

int main(int argc, char **argv)
{
    if (argc != 4 || atoi(argv[2]) < 100 || atoi(argv[3]) < 1)
        die("usage: tcp_sack_cost PATTERN FLIGHT ACKS", -EINVAL);
    struct bypass_env env = {.random = repeatable};
    struct bypass_config cfg;
    bypass_config_default(&cfg, 64);
    cfg.max_chunks = 32768;
    size_t size = bypass_arena_size(&cfg);
    void *arena = aligned_alloc(64, size);
    if (!arena || memport_open(&port, 1) < 0)
        die("memory", -ENOMEM);
    memset(arena, 0, size);
    int err = bypass_create(&stack, arena, size, &cfg, &port.dev, &env, now_ns);
    if (err < 0)
        die("create", err);
    open_connection();
    fly((uint32_t)atoi(argv[2]));
    run(argv[1], (uint32_t)atoi(argv[2]), (uint32_t)atoi(argv[3]));
    report();
    bypass_destroy(&stack);
    free(arena);
    memport_close(&port);
    return 0;
}
