/* SPDX-License-Identifier: Apache-2.0 */
/*
 * inspect_damaged.c - bypass/app/inspect.c reads an application's memory that may hold anything: first a good one, of
 * which everything has to be told, then the same with words overwritten, cut short, and made of noise. Built with the
 * sanitizers, which end it where a byte outside of the memory is read. `inspect_damaged SEED ROUNDS`; what it prints is
 * how often each answer came, so that the test can see that damage was found and that much was read all the same.
 */
#include <assert.h>
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "app/inspect.h"
#include "app/loop.h"
#include "preload/group.h"

enum { FRAMES = 256, CONNS = 3, LOCAL_PORT = 80 };

static uint64_t state;

static uint64_t next(void) /* xorshift64* */
{
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 0x2545f4914f6cdd1dull;
}

static int some_random(void *ctx, void *out, size_t n)
{
    (void)ctx;
    for (size_t i = 0; i < n; i++) {
        ((uint8_t *)out)[i] = (uint8_t)next();
    }
    return 0;
}

/* ---- A good one ------------------------------------------------------------------------------------------------- */
static uint8_t *mem;
static size_t size;
static struct bypass_stack stack;
static struct loop loop;
static struct app_header good;
static const struct bypass_endpoint server = {.addr = {{[10] = 0xff, [11] = 0xff, 127, 0, 0, 1}}, .port = LOCAL_PORT};

static struct app_header *head(void) { return (struct app_header *)(void *)mem; }
static struct group *group(void) { return (struct group *)(void *)(mem + head()->group_off); }

static void runs(void)
{
    static uint64_t now = 1000000000;

    for (int i = 0; i < 20; i++) {
        bypass_poll(&stack, now += 1000000, 64);
    }
}

static void object(bypass_sock sock, int type, enum place place, enum reason why)
{
    uint32_t i = group_object_new(group());
    struct object *o = group_object(group(), i);

    o->sock = sock;
    o->type = (uint8_t)type;
    o->family = 2;
    o->place = (uint8_t)place;
    o->reason = (uint8_t)why;
    o->pid = 100;
    o->fd = (int)i;
    snprintf(o->why, sizeof o->why, "%s", why == WHY_OPTION ? "IP_PKTINFO" : "");
    group_ref(group(), i, 0);
    o->refs = 1;
}

static void make(void)
{
    struct app_header h = {.device = APP_DEV_LOOP, .mtu = LOOP_MTU, .name = "test"};
    struct bypass_env env = {.random = some_random};
    bypass_sock listener, made[CONNS], udp;

    bypass_config_default(&h.config, 16);
    h.config.max_chunks = 64;
    h.config.flags = BYPASS_F_RST | BYPASS_F_LOOPBACK;
    size = app_layout(&h, loop_mem_size(FRAMES));
    mem = aligned_alloc(4096, size); /* its end is the end of what may be read */
    memset(mem, 0, size);
    memcpy(mem, &h, sizeof h);
    assert(group_init(group(), h.group_size, h.config.max_socks, 7) == 0);
    assert(loop_init(mem + h.dev_off, h.dev_size, FRAMES) == 0);
    assert(loop_attach(&loop, mem + h.dev_off, h.dev_size) == 0);
    assert(bypass_create(&stack, mem + h.arena_off, h.arena_size, &h.config, &loop.nd, &env, 1) == 0);
    assert(bypass_addr_add(&stack, &server.addr, 8) == 0);
    group()->ready = 2;
    group_join(group(), 100);
    listener = bypass_socket(&stack, BYPASS_STREAM);
    assert(bypass_bind(&stack, listener, &server) == 0 && bypass_listen(&stack, listener, 8) == 0);
    object(listener, BYPASS_STREAM, PLACE_BOTH, WHY_NONE);
    for (int i = 0; i < CONNS; i++) {
        made[i] = bypass_socket(&stack, BYPASS_STREAM);
        bypass_connect(&stack, made[i], &server);
        runs();
        assert(bypass_send(&stack, made[i], "hello", 5, 0) == 5);
        object(made[i], BYPASS_STREAM, PLACE_STACK, WHY_NONE);
    }
    runs();
    object(bypass_accept(&stack, listener), BYPASS_STREAM, PLACE_STACK, WHY_NONE);
    udp = bypass_socket(&stack, BYPASS_DGRAM);
    assert(bypass_connect(&stack, udp, &server) == 0);
    object(udp, BYPASS_DGRAM, PLACE_BOTH, WHY_NONE);
    object(-1, BYPASS_DGRAM, PLACE_KERNEL, WHY_OPTION);
}

static void all_is_told(void)
{
    struct app_summary sum;
    struct app_socket s;
    struct bypass_inspect c;
    struct bypass_tcp_info info;
    uint32_t cursor = 0, n = 0, established = 0, received = 0, orphans = 0;

    assert(app_summary(mem, size, &sum) == 0);
    assert(strcmp(sum.name, "test") == 0 && sum.processes == 1 && sum.pids[0] == 100 && sum.sockets == CONNS + 4);
    while (app_socket_next(mem, size, &cursor, &s) == 1) {
        bypass_sock sock = group_object(group(), s.object)->sock;

        n++;
        if (s.place == PLACE_KERNEL) {
            assert(s.told == 0 && strcmp(app_reason(s.reason), "an option that the stack does not have") == 0);
            assert(strcmp(s.why, "IP_PKTINFO") == 0);
            continue;
        }
        assert(s.told == 1 && s.stack.type == s.type);
        if (s.type == BYPASS_STREAM) {
            assert(bypass_tcp_info(&stack, sock, &info) == 0);
            assert(memcmp(&info.local, &s.stack.info.local, sizeof info.local) == 0);
            assert(memcmp(&info.peer, &s.stack.info.peer, sizeof info.peer) == 0);
            assert(info.state == s.stack.info.state && info.bytes_sent == s.stack.info.bytes_sent);
            assert(info.rcv_queued == s.stack.info.rcv_queued && info.segs_out == s.stack.info.segs_out);
            assert(info.state == BYPASS_LISTEN || info.cwnd == s.stack.info.cwnd);
            assert(strcmp(s.stack.congestion, "cubic") == 0);
            established += s.stack.info.state == BYPASS_ESTABLISHED;
            received += s.stack.info.state == BYPASS_LISTEN ? 0 : s.stack.info.rcv_queued;
        } else {
            assert(s.stack.info.peer.port == LOCAL_PORT && s.stack.info.local.port != 0);
        }
    }
    assert(n == CONNS + 4 && established == CONNS + 1 && received == 5);
    for (cursor = 0; app_orphan_next(mem, size, &cursor, &c) == 1; orphans++) {
        assert(c.info.local.port == LOCAL_PORT && c.info.state == BYPASS_ESTABLISHED && c.info.rcv_queued == 5);
    }
    assert(orphans == CONNS - 1); /* what waits to be accepted is nobody's yet */
}

/* ---- Damage ------------------------------------------------------------------------------------------------------ */
static uint64_t answers[5]; /* bad summary, bad socket list, bad socket, bad connection list, rows */

static void reads(const uint8_t *at, size_t n)
{
    struct app_summary sum;
    struct app_socket s;
    struct bypass_inspect c;
    uint32_t cursor = 0, steps = 0;
    int r = app_summary(at, n, &sum);

    assert(r == 0 || r == -EINVAL || r == -EAGAIN);
    assert(r < 0 || (memchr(sum.name, 0, sizeof sum.name) && memchr(sum.ifname, 0, sizeof sum.ifname)));
    answers[0] += r < 0;
    while ((r = app_socket_next(at, n, &cursor, &s)) == 1) {
        assert(memchr(s.why, 0, sizeof s.why) && app_reason(s.reason));
        assert(memchr(s.stack.congestion, 0, sizeof s.stack.congestion));
        answers[2] += s.told < 0;
        answers[4]++;
        assert(++steps <= size / sizeof(struct object));
    }
    answers[1] += r < 0;
    for (cursor = steps = 0; (r = app_orphan_next(at, n, &cursor, &c)) == 1;) {
        assert(memchr(c.congestion, 0, sizeof c.congestion));
        answers[4]++;
        assert(++steps <= 2 * size / 8);
    }
    answers[3] += r < 0;
}

static uint64_t bad_value(uint64_t was)
{
    switch (next() % 8) {
    case 0:
        return 0;
    case 1:
        return UINT64_MAX >> next() % 64;
    case 2:
        return was + 1;
    case 3:
        return was - 1;
    case 4:
        return was << next() % 16;
    case 5:
        return size - next() % 512;
    case 6:
        return next() % (2 * size);
    default:
        return next();
    }
}

/* A place to overwrite: mostly where it says what lies where. */
static size_t somewhere(void)
{
    static const size_t near = 4096;
    size_t from[] = {0, good.group_off, good.arena_off, good.group_off + sizeof(struct group), good.arena_off, 0};
    size_t wide[] = {sizeof good, 512, near, sizeof(struct object) * 8, good.arena_size, size};
    size_t which = next() % 6;

    return (from[which] + next() % wide[which]) & ~(size_t)7;
}

static void damaged(void)
{
    int words = 1 + (int)(next() % 6);
    uint64_t undo[6];
    size_t at[6];

    for (int i = 0; i < words; i++) {
        size_t n = (size_t)1 << next() % 4;
        uint64_t was, value;

        at[i] = somewhere();
        at[i] = at[i] > size - 8 ? size - 8 : at[i];
        memcpy(&was, mem + at[i], 8);
        undo[i] = was;
        value = bad_value(was);
        memcpy(mem + at[i] + (next() % 8 & ~(n - 1)), &value, n);
    }
    reads(mem, size);
    while (words-- > 0) {
        memcpy(mem + at[words], &undo[words], 8);
    }
}

static void cut(size_t n)
{
    uint8_t *part = aligned_alloc(4096, (n + 4095) & ~(size_t)4095), *exact = malloc(n ? n : 1);

    memcpy(part, mem, n);
    memcpy(exact, mem, n);
    reads(exact, n); /* what is behind it may not be read */
    if (n >= sizeof(struct app_header)) {
        ((struct app_header *)(void *)part)->size = n; /* the header agrees with the cut */
        memcpy(exact, part, n);
        reads(exact, n);
    }
    free(part);
    free(exact);
}

int main(int argc, char **argv)
{
    int rounds = argc > 2 ? atoi(argv[2]) : 1000;

    state = 0x9e3779b97f4a7c15ull ^ (argc > 1 ? strtoull(argv[1], NULL, 10) * 0xbf58476d1ce4e5b9ull : 0);
    make();
    all_is_told();
    good = *head();
    for (int i = 0; i < rounds; i++) {
        damaged();
    }
    for (int i = 0; i < 64; i++) {
        cut(next() % size);
    }
    for (size_t n = 0; n < 64; n++) {
        cut(n * 64);
    }
    all_is_told(); /* reading has changed nothing */
    printf("%lu %lu %lu %lu %lu\n", answers[0], answers[1], answers[2], answers[3], answers[4]);
    free(mem);
    return 0;
}
