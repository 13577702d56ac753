/* SPDX-License-Identifier: Apache-2.0 */
/*
 * core.c - the arena and what every protocol needs from it: creation and layout, pools, frames, chunks,
 * unpredictable numbers. No protocol lives here.
 * Read first: bypass.h (frames, creation), core.h (the arena's head).
 */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>

#include "core.h"
#include "tcp.h"

static_assert(sizeof(struct chunk) == CHUNK_SIZE, "a chunk is 512 bytes");
static_assert(sizeof(struct bypass_pkt_meta) == 64, "one cache line of metadata a frame");

/* ---- Layout ------------------------------------------------------------------------------------ */
uint64_t layout_bytes(struct layout *l, uint64_t bytes)
{
    uint64_t off = (l->next + 63) & ~63ull;
    l->next = off + bytes;
    return off;
}

void layout_pool(struct layout *l, struct pool *p, uint32_t entry_size, uint32_t cap)
{
    *p = (struct pool){.size = entry_size, .cap = cap, .free = NO_INDEX};
    p->off = layout_bytes(l, (uint64_t)entry_size * cap);
}

static uint32_t round_up_pow2(uint32_t v) { return v <= 1 ? 1 : 1u << (32 - __builtin_clz(v - 1)); }

enum { TXQ_MAX = 1 << 18 }; /* frames a device may have */

static uint64_t layout_all(struct core *c)
{
    struct layout l = {.next = sizeof(struct core)};
    layout_pool(&l, &c->chunks, sizeof(struct chunk), c->cfg.max_chunks);
    sock_layout(&l, c);
    dst_layout(&l, c);
    reass_layout(&l, c);
    udp_layout(&l, c);
    tcp_layout(&l, c);
    c->txq_cap = TXQ_MAX;
    c->txq_off = layout_bytes(&l, (uint64_t)c->txq_cap * sizeof(bypass_pkt));
    return (l.next + 63) & ~63ull;
}

void bypass_config_default(struct bypass_config *cfg, uint32_t max_conns)
{
    *cfg = (struct bypass_config){
        .abi = BYPASS_ABI,
        .flags = BYPASS_F_ARP | BYPASS_F_PING | BYPASS_F_RST,
        .max_conns = max_conns,
        .max_socks = max_conns + 64,
        .max_chunks = max_u32(1024, min_u32(max_conns, 65536)),
        .max_dsts = max_u32(256, min_u32(max_conns, 16384)),
        .max_frags = 64,
        .sndbuf = 1u << 18,
        .rcvbuf = 1u << 18,
        .sndbuf_max = 4u << 20,
        .rcvbuf_max = 6u << 20,
        .delack_ms = DELACK_MS,
        .ecn = 2,
        .max_syn_backlog = max_u32(128, min_u32(max_conns, 4096)),
        .max_time_wait = max_conns,
        .syn_cookies = BYPASS_COOKIES_WHEN_FULL,
        .mtu_probing = BYPASS_MTU_PROBING_BLACKHOLE,
        .fastopen = BYPASS_FASTOPEN_CLIENT | BYPASS_FASTOPEN_SERVER,
        .tw_reuse = 1,
    };
}

static bool config_valid(const struct bypass_config *cfg)
{
    const uint32_t limit = 1u << 24;
    if (cfg->abi != BYPASS_ABI || (cfg->flags & ~15u) != 0 || cfg->ecn > 2)
        return false;
    if (cfg->max_conns == 0 || cfg->max_conns > limit || cfg->max_socks == 0 || cfg->max_socks > limit)
        return false;
    if (cfg->max_chunks == 0 || cfg->max_chunks > limit || cfg->max_dsts == 0 || cfg->max_dsts > limit)
        return false;
    if (cfg->max_syn_backlog == 0 || cfg->max_syn_backlog > limit || cfg->max_time_wait == 0)
        return false;
    if (cfg->syn_cookies > BYPASS_COOKIES_ALWAYS || cfg->mtu_probing > BYPASS_MTU_PROBING_ALWAYS || cfg->fastopen > 3 ||
        cfg->tw_reuse > 1)
        return false;
    if (cfg->sndbuf < 4096 || cfg->rcvbuf < 4096 || cfg->sndbuf > cfg->sndbuf_max || cfg->rcvbuf > cfg->rcvbuf_max)
        return false;
    if (cfg->sndbuf_max > 1u << 30 || cfg->rcvbuf_max > 1u << 30 || cfg->delack_ms == 0 || cfg->delack_ms > 500)
        return false; /* MUST-40 of RFC 9293 3.8.6.3: less than half a second */
    return cfg->max_frags > 0 && cfg->max_frags <= 65536 && cfg->reserved == 0;
}

size_t bypass_arena_size(const struct bypass_config *cfg)
{
    struct core scratch = {.cfg = *cfg};
    return config_valid(cfg) ? (size_t)layout_all(&scratch) : 0;
}

int bypass_create(struct bypass_stack *s, void *arena, size_t size, const struct bypass_config *cfg,
                  struct bypass_netdev *dev, const struct bypass_env *env, uint64_t now_ns)
{
    size_t need = bypass_arena_size(cfg);
    if (need == 0 || !arena || ((uintptr_t)arena & 63) != 0 || !dev || !env || !env->random)
        return -EINVAL;
    if (dev->headroom < 128 || dev->frames > TXQ_MAX || dev->meta_stride < sizeof(struct bypass_pkt_meta))
        return -EINVAL;
    if (size < need)
        return -ENOMEM;
    *s = (struct bypass_stack){.arena = arena, .dev = dev, .env = *env};
    struct core *c = arena;
    c->cfg = *cfg;
    c->size = need;
    c->now_ns = now_ns;
    c->now_ms = (uint32_t)(now_ns / MSEC_NS);
    c->ev_head = c->ev_tail = NO_INDEX;
    (void)layout_all(c);
    uint64_t secret[10];
    int err = env->random(env->ctx, secret, sizeof secret);
    if (err < 0)
        return err;
    hash_init(c, secret);
    memcpy(c->isn_key, secret + 2, 16);
    memcpy(c->port_key, secret + 4, 16);
    memcpy(c->rand_state, secret + 6, 16);
    memcpy(c->fastopen_key, secret + 8, 16);
    c->lend_id = siphash13(c->rand_state, "lend", 4);
    c->lend_serial = (uint32_t)c->lend_id;                     /* so that another stack's tokens are not good here */
    c->txq_cap = min_u32(TXQ_MAX, round_up_pow2(dev->frames)); /* each frame is in it at most once */
    tcp_init(s);
    c->abi = BYPASS_ABI;
    c->magic = CORE_MAGIC;
    return 0;
}

int bypass_attach(struct bypass_stack *s, void *arena, size_t size, struct bypass_netdev *dev,
                  const struct bypass_env *env)
{
    const struct core *c = arena;
    if (!arena || size < sizeof *c || c->magic != CORE_MAGIC || c->abi != BYPASS_ABI || size < c->size)
        return -EINVAL;
    if (c->flow_aes && !hash_has_aes())
        return -EINVAL; /* its flow tables are hashed by instructions that this processor lacks */
    *s = (struct bypass_stack){.arena = arena, .dev = dev, .env = *env, .attached = 1};
    return 0;
}

void bypass_destroy(struct bypass_stack *s)
{
    tcp_destroy(s);
    udp_destroy(s);
    net_destroy(s);
    sock_destroy(s);
    (void)bypass_flush(s);
    tx_drop_all(s);
    core(s)->magic = 0;
}

void bypass_now(struct bypass_stack *s, uint64_t now_ns)
{
    struct core *c = core(s);
    if (now_ns > c->now_ns) {
        c->now_ns = now_ns;
        c->now_ms = (uint32_t)(now_ns / MSEC_NS);
    }
}

/* ---- Pools ------------------------------------------------------------------------------------- */
uint32_t pool_alloc(struct bypass_stack *s, struct pool *p)
{
    uint32_t i = p->free;
    if (i != NO_INDEX)
        memcpy(&p->free, pool_at(s, p, i), 4);
    else if (p->bump < p->cap)
        i = p->bump++;
    else
        return NO_INDEX;
    p->used++;
    return i;
}

void pool_free(struct bypass_stack *s, struct pool *p, uint32_t i)
{
    memcpy(pool_at(s, p, i), &p->free, 4);
    p->free = i;
    p->used--;
}

uint32_t chunk_alloc(struct bypass_stack *s)
{
    uint32_t i = pool_alloc(s, &core(s)->chunks);
    if (i == NO_INDEX) {
        STAT(s, no_chunk);
        return i;
    }
    struct chunk *k = chunk_at(s, i);
    k->next = NO_INDEX;
    k->off = k->len = 0;
    return i;
}

void chunk_free(struct bypass_stack *s, uint32_t i) { pool_free(s, &core(s)->chunks, i); }

/* ---- Frames ------------------------------------------------------------------------------------ */
bypass_pkt pkt_alloc(struct bypass_stack *s)
{
    bypass_pkt p;
    if (s->dev->ops->alloc(s->dev, &p, 1) != 1) {
        STAT(s, no_frame);
        return BYPASS_PKT_NONE;
    }
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    m->off = s->dev->headroom;
    m->len = 0;
    m->flags = 0;
    m->seg_flags = 0;
    m->queue = 0;
    m->next = BYPASS_PKT_NONE;
    return p;
}

void pkt_free(struct bypass_stack *s, bypass_pkt p) { s->dev->ops->free(s->dev, &p, 1); }

uint8_t *pkt_push(struct bypass_stack *s, bypass_pkt p, uint16_t n)
{
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    if (m->off < n)
        return NULL;
    m->off = (uint16_t)(m->off - n);
    m->len = (uint16_t)(m->len + n);
    return pkt_data(s, p);
}

uint8_t *pkt_put(struct bypass_stack *s, bypass_pkt p, uint16_t n)
{
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    if ((uint32_t)m->off + m->len + n > s->dev->stride)
        return NULL;
    uint8_t *end = pkt_data(s, p) + m->len;
    m->len = (uint16_t)(m->len + n);
    return end;
}

/* ---- Randomness and the log -------------------------------------------------------------------- */
uint64_t core_random(struct bypass_stack *s)
{
    struct core *c = core(s);
    c->rand_state[2]++; /* a keyed hash of a counter: unpredictable without the key */
    return siphash13(c->rand_state, &c->rand_state[2], 8);
}

void core_log(const struct bypass_stack *s, int level, const char *fmt, ...)
{
    if (!s->env.log)
        return;
    char msg[256];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(msg, sizeof msg, fmt, ap);
    va_end(ap);
    s->env.log(s->env.ctx, level, msg);
}

/* ---- Introspection ------------------------------------------------------------------------------ */
static const char *const stat_names[] = {
#define X(name) #name,
    STATS(X)
#undef X
};

int bypass_stat_count(void) { return ST_COUNT; }

const char *bypass_stat_name(int i) { return i >= 0 && i < ST_COUNT ? stat_names[i] : NULL; }

const uint64_t *bypass_stats(const struct bypass_stack *s) { return core(s)->stats; }

void bypass_audit(const struct bypass_stack *s, struct bypass_audit *out)
{
    const struct core *c = core(s);
    *out = (struct bypass_audit){
        .handles = c->socks.used,
        .chunks = c->chunks.used,
        .lent = c->lent,
        .tx_pending = c->txq_tail - c->txq_head,
    };
    for (uint32_t p = 0; p < s->dev->frames; p++)
        out->frames += (pkt_meta(s, p)->holders & BYPASS_HOLD_STACK) != 0;
    net_audit(s, out);
    udp_audit(s, out);
    tcp_audit(s, out);
}
