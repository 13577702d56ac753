/* SPDX-License-Identifier: Apache-2.0 */
/*
 * port.c - the application's half of a port: bypass_netdev_ops over the rings of port.h. Makes system calls only to
 * ring the doorbell and to take a ring off it.
 *
 * A frame's place is meta.holders and nothing else, as in afxdp/umem.c: 0 free, HOLD_STACK and HOLD_DEV alone or
 * together, or HOLD_RX alone. Reception comes first: while fewer frames than fill_target are posted, every frame that
 * becomes free is posted before alloc can hand it out. Otherwise unacknowledged data could hold all frames, and the
 * acknowledgement that frees them would find none to arrive in.
 */
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "layout.h"

enum { HOLD_STACK = BYPASS_HOLD_STACK, HOLD_DEV = BYPASS_HOLD_DEV, HOLD_RX = BYPASS_HOLD_RX };

static struct port *device(struct bypass_netdev *nd) { return (struct port *)nd; }

static struct bypass_pkt_meta *meta_at(const struct port *p, uint32_t frame)
{
    return (struct bypass_pkt_meta *)((uint8_t *)p->nd.meta + (size_t)frame * PORT_META);
}

#ifdef BYPASS_DEBUG
#include <stdio.h>
#include <stdlib.h>

static void check(struct port *p, const char *where)
{
    struct frame_audit audit;

    if (p->nd.free_frames != p->sh->st.free_count || (p->nd.frames <= 1024 && port_audit(p, &audit) != 0)) {
        fprintf(stderr, "port: frames are not conserved after %s\n", where);
        abort();
    }
}
#else
static void check(struct port *p, const char *where) { (void)p, (void)where; }
#endif

static bool is_gone(const struct port *p)
{
    return p->sh->st.gone || __atomic_load_n(&p->sh->link, __ATOMIC_RELAXED) == PORT_LINK_GONE;
}

/* The device's MAC address and MTU, when bypass-fwd has told that they changed. */
static void follow(struct port *p)
{
    uint64_t about = __atomic_load_n(&p->sh->about, __ATOMIC_RELAXED);
    uint32_t mtu = (uint32_t)(about >> 48), most = p->nd.stride - PORT_HEADROOM - PORT_ETH;

    if (about == p->about) {
        return;
    }
    p->about = about;
    for (int i = 0; i < 6; i++) {
        p->nd.mac[i] = (uint8_t)(about >> 8 * i);
    }
    p->nd.mtu = (uint16_t)(mtu < most ? mtu : most);
}

/* ---- The pool --------------------------------------------------------------------------------------------- */

void port_sync(struct port *p) { p->nd.free_frames = p->sh->st.free_count; }

static void frame_to_pool(struct port *p, uint32_t frame)
{
    meta_at(p, frame)->holders = 0;
    p->free_list[p->sh->st.free_count++] = frame;
}

static uint32_t frame_from_pool(struct port *p) /* it is not empty */ { return p->free_list[--p->sh->st.free_count]; }

/* Posts free frames for reception until fill_target is reached. The ring has room: fill_target is at most its size. */
static void refill(struct port *p)
{
    struct port_state *st = &p->sh->st;
    uint32_t posted = st->rx_posted - st->rx_taken, mask = p->sh->cfg.rx_ring - 1;
    uint32_t want = st->fill_target > posted ? st->fill_target - posted : 0;
    uint32_t n = want < st->free_count ? want : st->free_count;

    st->n.fill_starved += n < want;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t frame = frame_from_pool(p);

        meta_at(p, frame)->holders = HOLD_RX;
        p->rx[st->rx_posted & mask].frame = frame;
        st->rx_posted++;
    }
    if (n) {
        __atomic_store_n(&p->sh->rx_posted, st->rx_posted, __ATOMIC_RELEASE); /* A */
    }
}

static bool hungry(const struct port *p)
{
    const struct port_state *st = &p->sh->st;

    return st->rx_posted - st->rx_taken < st->fill_target && st->free_count;
}

static int port_op_alloc(struct bypass_netdev *nd, bypass_pkt *out, int n)
{
    struct port *p = device(nd);
    int got = 0;

    for (; got < n && p->sh->st.free_count; got++) {
        struct bypass_pkt_meta *m = meta_at(p, out[got] = frame_from_pool(p));

        m->holders = HOLD_STACK;
        m->off = PORT_HEADROOM;
        m->len = m->queue = 0;
        m->flags = 0;
    }
    port_sync(p);
    check(p, "alloc");
    return got;
}

static void port_op_free(struct bypass_netdev *nd, const bypass_pkt *pkts, int n)
{
    struct port *p = device(nd);

    for (int i = 0; i < n; i++) {
        struct bypass_pkt_meta *m = meta_at(p, pkts[i]);

        if (pkts[i] >= nd->frames || !(m->holders & HOLD_STACK)) {
            p->sh->st.bad_free++;
            continue;
        }
        m->holders &= (uint8_t)~HOLD_STACK;
        if (m->holders == 0) {
            frame_to_pool(p, pkts[i]);
        }
    }
    if (hungry(p)) {
        refill(p);
    }
    port_sync(p);
    check(p, "free");
}

/* ---- Sleep and wake-up ------------------------------------------------------------------------------------- */

/* Takes rings off the doorbell: else who waits on it would not sleep again. One that is said may not be written yet. */
static void bell_read(struct port *p)
{
    struct port_state *st = &p->sh->st;
    char byte;

    while (st->bell_owed && p->doorbell_in >= 0 && recv(p->doorbell_in, &byte, 1, MSG_DONTWAIT) >= 0) {
        st->bell_owed--;
        st->n.woken++;
    }
}

static void awake(struct port *p)
{
    p->sh->st.bell_owed++; /* first: who is killed in between leaves one too many, which does no harm */
    if (__atomic_exchange_n(&p->sh->app_sleeps, PORT_AWAKE, __ATOMIC_ACQ_REL) != PORT_RUNG) {
        p->sh->st.bell_owed--;
    }
}

/* Posted frames that bypass-fwd has filled and nobody took. */
static uint32_t rx_avail(struct port *p, uint32_t max)
{
    struct port_state *st = &p->sh->st;
    uint32_t n = st->rx_done - st->rx_taken;

    if (n < max) {
        uint32_t done = __atomic_load_n(&p->sh->rx_done, __ATOMIC_ACQUIRE); /* B */

        if (done - st->rx_taken <= st->rx_posted - st->rx_taken) { /* else nonsense: nothing to read */
            st->rx_done = done;
            n = done - st->rx_taken;
        }
    }
    return n < max ? n : max;
}

int port_wait_begin(struct port *p)
{
    uint32_t was = PORT_AWAKE;

    __atomic_compare_exchange_n(&p->sh->app_sleeps, &was, PORT_ASLEEP, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* C */
    return rx_avail(p, 1) > 0;
}

void port_wait_announced(struct port *p, int announced) { p->sh->st.announced = announced != 0; }

/* ---- Reception --------------------------------------------------------------------------------------------- */

/* Takes one filled slot over. false: it makes no sense, the caller gets nothing. */
static bool rx_accept(struct port *p, const struct port_rx_slot *slot, bypass_pkt *out)
{
    struct port_state *st = &p->sh->st;
    uint32_t frame = slot->frame, off = slot->off, len = slot->len;
    struct bypass_pkt_meta *m = meta_at(p, frame);

    if (frame >= p->nd.frames || m->holders != HOLD_RX) {
        st->n.rx_bad++;
        return false;
    }
    if (len < PORT_ETH || off > p->nd.stride || len > p->nd.stride - off) {
        st->n.rx_bad++;
        frame_to_pool(p, frame);
        return false;
    }
    m->holders = HOLD_STACK;
    m->off = (uint16_t)off;
    m->len = (uint16_t)len;
    m->queue = slot->queue;
    m->flags = slot->flags;
    m->entry = slot->entry;
    m->rule = slot->rule;
    m->hash = slot->hash;
    st->n.rx_packets++;
    st->n.rx_bytes += len;
    *out = frame;
    return true;
}

static int port_op_rx_burst(struct bypass_netdev *nd, bypass_pkt *out, int max)
{
    struct port *p = device(nd);
    struct port_state *st = &p->sh->st;
    uint32_t n = rx_avail(p, (uint32_t)max), mask = p->sh->cfg.rx_ring - 1, sleeps;
    int got = 0;

    follow(p);
    sleeps = __atomic_load_n(&p->sh->app_sleeps, __ATOMIC_RELAXED);
    if (sleeps == PORT_RUNG || (sleeps == PORT_ASLEEP && (n == (uint32_t)max || st->announced))) {
        awake(p);
    }
    if (st->bell_owed) {
        bell_read(p);
    }
    if (n < (uint32_t)max && !st->announced && port_wait_begin(p)) { /* who gets fewer than asked for may sleep */
        n = rx_avail(p, (uint32_t)max);
    }
    for (uint32_t i = 0; i < n; i++) {
        if (i + 4 < n) {
            const struct port_rx_slot *ahead = &p->rx[(st->rx_taken + 4) & mask];

            __builtin_prefetch(meta_at(p, ahead->frame), 1);
            __builtin_prefetch(nd->mem + (size_t)ahead->frame * nd->stride + ahead->off);
        }
        got += rx_accept(p, &p->rx[st->rx_taken++ & mask], &out[got]);
    }
    __atomic_signal_fence(__ATOMIC_SEQ_CST); /* rx_taken is written before its slots are used anew: port_reclaim() */
    if (n || hungry(p)) {
        refill(p);
    }
    port_sync(p);
    check(p, "rx_burst");
    return got || !is_gone(p) ? got : -ENXIO;
}

/* ---- Transmission ------------------------------------------------------------------------------------------ */

static bool tx_valid(const struct port *p, bypass_pkt pkt)
{
    const struct bypass_pkt_meta *m = meta_at(p, pkt);

    return pkt < p->nd.frames && m->holders == HOLD_STACK && m->len >= PORT_ETH && m->off < p->nd.stride &&
           m->len <= p->nd.stride - m->off && (!(m->flags & BYPASS_TX_CSUM) || (p->nd.caps & BYPASS_CAP_TX_CSUM));
}

static int port_op_tx_burst(struct bypass_netdev *nd, const bypass_pkt *pkts, int n)
{
    struct port *p = device(nd);
    struct port_state *st = &p->sh->st;
    uint32_t size = p->sh->cfg.tx_ring;
    int done = 0, err = 0;

    if (is_gone(p)) {
        return -ENXIO;
    }
    for (; done < n; done++) {
        struct bypass_pkt_meta *m = meta_at(p, pkts[done]);

        if (!tx_valid(p, pkts[done])) {
            st->n.tx_invalid++;
            err = -EINVAL;
            break;
        }
        if (st->tx_posted - st->tx_reaped == size) {
            st->n.tx_full++;
            break;
        }
        p->tx[st->tx_posted++ & (size - 1)] = (struct port_tx_slot){
            .frame = pkts[done],
            .off = m->off,
            .len = m->len,
            .queue = m->queue,
            .flags = m->flags & BYPASS_TX_CSUM,
            .csum_start = m->csum_start,
            .csum_off = m->csum_off,
        };
        m->holders |= HOLD_DEV;
        st->n.tx_packets++;
        st->n.tx_bytes += m->len;
    }
    __atomic_store_n(&p->sh->tx_posted, st->tx_posted, __ATOMIC_RELEASE); /* A */
    check(p, "tx_burst");
    return done ? done : err;
}

/* Which position transmission is complete up to. */
static uint32_t tx_complete(struct port *p)
{
    struct port_state *st = &p->sh->st;
    uint32_t done = is_gone(p) ? st->tx_posted : __atomic_load_n(&p->sh->tx_done, __ATOMIC_ACQUIRE); /* B */

    if (done - st->tx_reaped <= st->tx_posted - st->tx_reaped) { /* else nonsense: nothing new is complete */
        st->tx_done = done;
    }
    return st->tx_done;
}

static int port_op_reap(struct bypass_netdev *nd, bypass_pkt *done, int max)
{
    struct port *p = device(nd);
    struct port_state *st = &p->sh->st;
    uint32_t mask = p->sh->cfg.tx_ring - 1, upto;
    int got = 0;

    if (st->tx_posted == st->tx_reaped) {
        port_sync(p);
        return 0;
    }
    upto = tx_complete(p);
    while (st->tx_reaped != upto && got < max) {
        uint32_t frame = p->tx[st->tx_reaped++ & mask].frame;
        struct bypass_pkt_meta *m = meta_at(p, frame);

        if (frame >= nd->frames || !(m->holders & HOLD_DEV)) {
            continue; /* a relative that broke its memory broke its own */
        }
        *(is_gone(p) ? &st->n.tx_abandoned : &st->n.tx_completed) += 1;
        m->holders &= (uint8_t)~HOLD_DEV;
        if (m->holders & HOLD_STACK) {
            done[got++] = frame;
        } else {
            frame_to_pool(p, frame);
        }
    }
    if (hungry(p)) {
        refill(p);
    }
    port_sync(p);
    check(p, "reap");
    return got;
}

static void ring_doorbell(struct port *p)
{
    const uint64_t one = 1;

    if (__atomic_exchange_n(&p->sh->fwd_sleeps, 0, __ATOMIC_ACQ_REL) && p->doorbell_out >= 0) {
        ssize_t n = write(p->doorbell_out, &one, sizeof one); /* an eventfd is full after 2^64 - 2 of them */

        (void)n;
        /* The embedder's lock is not held, if port_defer(). */
        __atomic_fetch_add(&p->sh->st.n.rings, 1, __ATOMIC_RELAXED);
    }
}

void port_defer(struct port *p, int on) { p->defer = on != 0; }

bool port_owed(struct port *p)
{
    bool owed = p->owed;

    p->owed = false;
    return owed;
}

void port_kick_owed(struct port *p) { ring_doorbell(p); }

static int port_op_kick(struct bypass_netdev *nd)
{
    struct port *p = device(nd);
    struct port_state *st = &p->sh->st;
    uint32_t link = __atomic_load_n(&p->sh->link, __ATOMIC_RELAXED);

    if (is_gone(p)) {
        return -ENXIO;
    }
    follow(p);
    if (hungry(p)) {
        refill(p);
    }
    if (__atomic_load_n(&p->sh->tx_done, __ATOMIC_RELAXED) != st->tx_posted) {
        __atomic_thread_fence(__ATOMIC_SEQ_CST); /* C */
        if (__atomic_load_n(&p->sh->fwd_sleeps, __ATOMIC_RELAXED)) {
            p->owed = p->defer;
            if (!p->defer) {
                ring_doorbell(p);
            }
        } else {
            st->n.rings_saved++;
        }
    }
    port_sync(p);
    check(p, "kick");
    return link == PORT_LINK_DOWN ? -ENETDOWN : 0;
}

static int port_op_wait_fd(struct bypass_netdev *nd)
{
    return device(nd)->doorbell_in >= 0 ? device(nd)->doorbell_in : -ENOTSUP;
}

static const struct bypass_netdev_ops port_ops = {
    .alloc = port_op_alloc,
    .free = port_op_free,
    .rx_burst = port_op_rx_burst,
    .tx_burst = port_op_tx_burst,
    .reap = port_op_reap,
    .kick = port_op_kick,
    .wait_fd = port_op_wait_fd,
};

/* ---- Making and attaching ---------------------------------------------------------------------------------- */

size_t port_mem_size(const struct port_config *cfg) { return port_config_valid(cfg) ? port_places(cfg).end : 0; }

static void view(struct port *p, void *mem, const struct port_config *cfg)
{
    struct port_places at = port_places(cfg);
    uint8_t *base = mem;

    *p = (struct port){.sh = mem,
                       .rx = (struct port_rx_slot *)(base + at.rx),
                       .tx = (struct port_tx_slot *)(base + at.tx),
                       .free_list = (uint32_t *)(base + at.free_list),
                       .doorbell_out = -1,
                       .doorbell_in = -1,
                       .nd = {.ops = &port_ops,
                              .mem = base + at.frames,
                              .meta = (struct bypass_pkt_meta *)(base + at.meta),
                              .stride = port_frame_size(cfg),
                              .meta_stride = PORT_META,
                              .frames = cfg->frames,
                              .caps = cfg->caps,
                              .queues = cfg->queues,
                              .mtu = cfg->mtu,
                              .headroom = PORT_HEADROOM}};
    memcpy(p->nd.mac, cfg->mac, sizeof p->nd.mac);
    port_sync(p);
}

int port_init(void *mem, size_t size, const struct port_config *cfg)
{
    struct port_shared *sh = mem;
    struct port p;

    if (!port_config_valid(cfg) || ((uintptr_t)mem & (PORT_PAGE - 1))) {
        return -EINVAL;
    }
    if (size < port_places(cfg).end) {
        return -ENOMEM;
    }
    *sh = (struct port_shared){.magic = PORT_MAGIC, .cfg = *cfg};
    sh->st.fill_target = port_fill_target(cfg);
    view(&p, mem, cfg);
    for (uint32_t f = cfg->frames; f-- > 0;) { /* frame 0 on top */
        frame_to_pool(&p, f);
    }
    refill(&p); /* bypass-fwd may deliver before the application is there */
    return 0;
}

int port_attach(struct port *p, void *mem, size_t size, int doorbell_out, int doorbell_in)
{
    const struct port_shared *sh = mem;

    if (((uintptr_t)mem & (PORT_PAGE - 1)) || size < sizeof *sh || sh->magic != PORT_MAGIC ||
        !port_config_valid(&sh->cfg) || size < port_places(&sh->cfg).end) {
        return -EINVAL;
    }
    view(p, mem, &sh->cfg);
    p->doorbell_out = doorbell_out;
    p->doorbell_in = doorbell_in;
    return 0;
}

struct bypass_netdev *port_netdev(struct port *p) { return &p->nd; }

void port_set_gone(struct port *p) { p->sh->st.gone = 1; }

/* ---- After a death ------------------------------------------------------------------------------------------
 *
 * Where frames are is known from slots and positions: posted is what bypass-fwd was shown, by one store; rx_taken and
 * tx_reaped advance before a frame's holders change, and are ours alone. Nothing else is believed.
 */

/* The frames in slots of a ring, `from` to `to`, are the device's. */
static int held_by_device(struct port *p, bool rx, uint32_t from, uint32_t to)
{
    uint32_t size = rx ? p->sh->cfg.rx_ring : p->sh->cfg.tx_ring;

    if (to - from > size) {
        return -EBADMSG;
    }
    for (; from != to; from++) {
        uint32_t frame = rx ? p->rx[from & (size - 1)].frame : p->tx[from & (size - 1)].frame;

        if (frame >= p->nd.frames || meta_at(p, frame)->holders) {
            return -EBADMSG; /* no frame, or one that is posted twice */
        }
        meta_at(p, frame)->holders = rx ? HOLD_RX : HOLD_DEV;
    }
    return 0;
}

/* Rings of the doorbell that were said or not. One that is on its way is waited for by bell_read(). */
static void reclaim_bell(struct port *p)
{
    struct port_state *st = &p->sh->st;
    char byte;

    awake(p);
    while (p->doorbell_in >= 0 && recv(p->doorbell_in, &byte, 1, MSG_DONTWAIT) >= 0) {
        st->bell_owed -= st->bell_owed > 0;
    }
}

int port_reclaim(struct port *p)
{
    struct port_state *st = &p->sh->st;
    int err;

    for (uint32_t f = 0; f < p->nd.frames; f++) {
        meta_at(p, f)->holders = 0;
    }
    err = held_by_device(p, true, st->rx_taken, p->sh->rx_posted);
    err = err ? err : held_by_device(p, false, st->tx_reaped, p->sh->tx_posted);
    if (err || st->fill_target > p->sh->cfg.rx_ring) {
        return -EBADMSG;
    }
    st->rx_posted = p->sh->rx_posted;
    st->tx_posted = p->sh->tx_posted;
    st->rx_done = st->rx_taken; /* what bypass-fwd did is looked up when it is needed */
    st->tx_done = st->tx_reaped;
    st->free_count = 0;
    for (uint32_t f = p->nd.frames; f-- > 0;) {
        if (meta_at(p, f)->holders == 0) {
            frame_to_pool(p, f);
        }
    }
    refill(p);
    reclaim_bell(p);
    port_sync(p);
    check(p, "reclaim");
    return 0;
}

/* ---- Questions --------------------------------------------------------------------------------------------- */

void port_counters(const struct port *p, struct port_counters *out) { *out = p->sh->st.n; }

int port_audit(struct port *p, struct frame_audit *out)
{
    const struct port_state *st = &p->sh->st;

    memset(out, 0, sizeof *out);
    out->bad_free = st->bad_free;
    for (uint32_t i = 0; i < st->free_count; i++) { /* marks what the free list names, each once */
        if (i >= p->nd.frames || p->free_list[i] >= p->nd.frames) {
            out->misplaced++;
        } else {
            frames_listed(meta_at(p, p->free_list[i]), out);
        }
    }
    frames_count(&p->nd, out);
    return out->misplaced || out->rx != st->rx_posted - st->rx_taken ||
                   out->tx + out->stack_tx != st->tx_posted - st->tx_reaped
               ? -EIO
               : 0;
}
