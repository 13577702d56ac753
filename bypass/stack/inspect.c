/* SPDX-License-Identifier: Apache-2.0 */
/*
 * inspect.c - what a stack holds, for a tool that reads its arena while somebody else runs it, and that believes nothing
 * it reads there: whatever says where to read next is copied first, checked, and used from the copy.
 */
#include <errno.h>

#include "core.h"
#include "tcp.h"
#include "tcp_cc.h"
#include "udp.h"

struct look { /* an arena: its head as it was a moment ago */
    const uint8_t *arena;
    uint64_t size; /* bytes that may be read */
    struct core head;
};

/* Bytes at an offset. false: they are not all within the arena. */
static bool get(const struct look *l, uint64_t off, void *out, size_t n)
{
    if (off > l->size || n > l->size - off)
        return false;
    memcpy(out, l->arena + off, n);
    return true;
}

static bool entry(const struct look *l, const struct pool *p, uint32_t i, void *out, size_t n)
{
    return p->size == n && i < p->cap && p->off <= l->size && get(l, p->off + (uint64_t)i * n, out, n);
}

static int look_at(struct look *l, const void *arena, size_t size)
{
    *l = (struct look){.arena = arena, .size = size};
    if (!arena || !get(l, 0, &l->head, sizeof l->head) || l->head.magic != CORE_MAGIC || l->head.abi != BYPASS_ABI)
        return -EINVAL;
    if (l->head.size < l->size)
        l->size = l->head.size;
    return 0;
}

/* ---- Names ------------------------------------------------------------------------------------------------- */
static void congestion(const struct look *l, uint32_t cc, char out[BYPASS_CC_NAME])
{
    uint64_t names = l->head.tcp_state[0] + offsetof(struct tcp, cc_names);
    const char *builtin = tcp_cc_builtin(cc);
    if (builtin)
        memcpy(out, builtin, strlen(builtin) + 1);
    else if (cc - TCP_CC_BUILTINS >= BYPASS_CC_MAX || l->head.tcp_state[0] > l->size ||
             !get(l, names + (uint64_t)(cc - TCP_CC_BUILTINS) * BYPASS_CC_NAME, out, BYPASS_CC_NAME))
        out[0] = 0;
    out[BYPASS_CC_NAME - 1] = 0;
}

/* ---- Connections --------------------------------------------------------------------------------------------- */
static int tell_conn(const struct look *l, uint32_t i, struct bypass_inspect *out)
{
    struct tcp_conn c;
    struct tcp_cold k;
    struct tcp_flight fl;
    if (!entry(l, &l->head.conns, i, &c, sizeof c) || !entry(l, &l->head.colds, i, &k, sizeof k))
        return -EINVAL;
    c.rcv_wscale &= 15; /* RFC 7323 2.3: at most 14 */
    struct tcp_told t = {.c = &c, .k = &k};
    if (has_flight(&c) && entry(l, &l->head.flights, c.flight, &fl, sizeof fl))
        t.fl = &fl;
    uint32_t bytes = c.snd_nxt.v - c.snd_una.v;
    t.unacked = bytes / max_u32(c.snd_mss, 1) + (bytes % max_u32(c.snd_mss, 1) != 0);
    tcp_info_fill(&t, &out->info);
    out->info.advmss = 0;
    out->type = BYPASS_STREAM;
    out->handle = c.sock;
    congestion(l, c.cc, out->congestion);
    return 0;
}

static int tell_endpoint(const struct look *l, uint32_t i, struct bypass_inspect *out)
{
    struct tcp_endpoint ep;
    if (!entry(l, &l->head.listeners, i, &ep, sizeof ep))
        return -EINVAL;
    out->info = (struct bypass_tcp_info){
        .local = {.addr = ep.addr, .port = ep.port},
        .state = ep.listening ? BYPASS_LISTEN : BYPASS_CLOSED,
        .rcv_queued = ep.accept_count,
        .snd_queued = ep.listening ? ep.backlog : 0,
        .ssthresh = UINT32_MAX,
        .min_rtt_us = UINT32_MAX,
    };
    congestion(l, ep.cc, out->congestion);
    return 0;
}

static int tell_udp(const struct look *l, uint32_t i, struct bypass_inspect *out)
{
    struct udp u;
    if (!entry(l, &l->head.udps, i, &u, sizeof u))
        return -EINVAL;
    out->info = (struct bypass_tcp_info){
        .local = {.addr = u.local, .port = u.local_port},
        .state = u.flags & UDP_CONNECTED ? BYPASS_ESTABLISHED : BYPASS_CLOSED,
        .rcv_queued = u.charged,
    };
    if (u.flags & UDP_CONNECTED)
        out->info.peer = (struct bypass_endpoint){.addr = u.peer, .port = u.peer_port};
    return 0;
}

int bypass_inspect_sock(const void *arena, size_t size, bypass_sock h, struct bypass_inspect *out)
{
    struct look l;
    struct sock k;
    uint32_t si = (uint32_t)h, gen = (uint32_t)((uint64_t)h >> 32);
    int err = look_at(&l, arena, size);
    *out = (struct bypass_inspect){.type = BYPASS_STREAM, .handle = si};
    if (err < 0)
        return err;
    if (h < 0 || si >= l.head.socks.cap)
        return -EBADF;
    if (!entry(&l, &l.head.socks, si, &k, sizeof k))
        return -EINVAL;
    if (k.gen != gen)
        return -EBADF;
    switch (k.type) {
    case SOCK_TCP:
        err = tell_conn(&l, k.idx, out);
        out->handle = si;
        return err;
    case SOCK_LISTEN:
        return tell_endpoint(&l, k.idx, out);
    case SOCK_UDP:
        out->type = BYPASS_DGRAM;
        return tell_udp(&l, k.idx, out);
    default:
        return k.type == SOCK_FREE ? -EBADF : -EINVAL;
    }
}

/* ---- All connections ------------------------------------------------------------------------------------------ */
static int tell_request(const struct look *l, uint32_t i, struct bypass_inspect *out)
{
    struct tcp_req r;
    if (!entry(l, &l->head.reqs, i, &r, sizeof r))
        return -EINVAL;
    if (!(r.flags & REQ_USED))
        return 0;
    *out = (struct bypass_inspect){.type = BYPASS_STREAM, .handle = NO_INDEX};
    out->info = (struct bypass_tcp_info){
        .local = {.addr = r.laddr, .port = r.lport},
        .peer = {.addr = r.raddr, .port = r.rport},
        .state = BYPASS_SYN_RECEIVED,
        .retransmits = r.tries,
        .ssthresh = UINT32_MAX,
        .min_rtt_us = UINT32_MAX,
    };
    return 1;
}

int bypass_inspect_conn(const void *arena, size_t size, uint32_t *cursor, struct bypass_inspect *out)
{
    struct look l;
    struct flow_slot slot;
    struct { /* the beginning of struct tcp */
        uint64_t table_off;
        uint32_t table_mask;
    } t;
    int err = look_at(&l, arena, size);
    if (err < 0 || !get(&l, l.head.tcp_state[0], &t, sizeof t) || t.table_mask == UINT32_MAX)
        return -EINVAL;
    for (; *cursor <= t.table_mask; (*cursor)++) {
        if (t.table_off > l.size || !get(&l, t.table_off + (uint64_t)*cursor * sizeof slot, &slot, sizeof slot))
            return -EINVAL;
        if (slot.idx == 0)
            continue;
        (*cursor)++;
        *out = (struct bypass_inspect){.type = BYPASS_STREAM};
        err = tell_conn(&l, slot.idx - 1, out);
        return err < 0 ? err : 1;
    }
    for (uint32_t i; (i = *cursor - t.table_mask - 1) < l.head.reqs.bump && *cursor != UINT32_MAX;) {
        (*cursor)++;
        err = tell_request(&l, i, out);
        if (err != 0)
            return err;
    }
    return 0;
}

static_assert(offsetof(struct tcp, table_off) == 0 && offsetof(struct tcp, table_mask) == 8, "as it is read above");
