/* SPDX-License-Identifier: Apache-2.0 */
/*
 * socket.c - what an AF_XDP device asks of its sockets: the UMEM's registration, a socket and four rings per queue,
 * bind, modes, statistics, wake-ups, closing. Its interface is in interface.c, a view of a device that another process
 * opened in attach.c, the per-packet path in netdev.c.
 *
 * The first socket registers the UMEM; the others share it (XDP_SHARED_UMEM) and inherit its mode, each with a
 * fill and a completion ring of its own. Fill rings are populated before bind: a driver may take frames at once.
 * Read first: Documentation/networking/af_xdp.rst, net/xdp/xsk.c.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/if_xdp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

enum {                            /* newer than the UAPI headers of older distributions */
       OPT_COOKIE = 57,           /* SO_COOKIE, kernel 4.12 */
       OPT_MAX_TX_SKB_BUDGET = 9, /* XDP_MAX_TX_SKB_BUDGET, kernel 6.17 */
       OPT_PREFER_BUSY_POLL = 69, /* SO_PREFER_BUSY_POLL, kernel 5.11 */
       OPT_BUSY_POLL_BUDGET = 70, /* SO_BUSY_POLL_BUDGET, kernel 5.11 */
       BIND_PAUSE_NS = 5000000,
};

static uint64_t clock_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static void pause_ns(long ns)
{
    struct timespec t = {.tv_nsec = ns};

    nanosleep(&t, NULL);
}

int fail(struct afxdp_error *error, int step, int queue, int option)
{
    *error = (struct afxdp_error){.err = errno, .step = step, .queue = queue, .option = option};
    return -1;
}

uint64_t socket_cookie(int fd)
{
    uint64_t cookie = 0;
    socklen_t len = sizeof cookie;

    return getsockopt(fd, SOL_SOCKET, OPT_COOKIE, &cookie, &len) == 0 ? cookie : 0;
}

/* ---- Wake-ups ---------------------------------------------------------------------------------------------- */

static int wake_tx(struct afxdp *d, uint32_t qi)
{
    return sendto(d->queue[qi].fd, NULL, 0, MSG_DONTWAIT, NULL, 0) >= 0 ? 0 : -errno;
}

static int wake_rx(struct afxdp *d, uint32_t qi)
{
    return recvfrom(d->queue[qi].fd, NULL, 0, MSG_DONTWAIT, NULL, NULL) >= 0 ? 0 : -errno;
}

const struct afxdp_sys kernel_calls = {.wake_tx = wake_tx, .wake_rx = wake_rx};

/* ---- Rings ------------------------------------------------------------------------------------------------- */

struct ring_kind {
    int option; /* setsockopt that creates it */
    off_t pgoff;
    size_t entry;      /* bytes */
    size_t ring;       /* offset of the struct ring in struct queue */
    size_t offsets_at; /* in struct xdp_mmap_offsets */
    bool fill_sized;
};

#define KIND(name, opt, page, type, field, big)                                                                        \
    {                                                                                                                  \
        .option = opt, .pgoff = (off_t)page, .entry = sizeof(type), .ring = offsetof(struct queue, name),              \
        .offsets_at = offsetof(struct xdp_mmap_offsets, field), .fill_sized = big                                      \
    }

static const struct ring_kind kinds[4] = {
    KIND(fill, XDP_UMEM_FILL_RING, XDP_UMEM_PGOFF_FILL_RING, uint64_t, fr, true),
    KIND(comp, XDP_UMEM_COMPLETION_RING, XDP_UMEM_PGOFF_COMPLETION_RING, uint64_t, cr, true),
    KIND(rx, XDP_RX_RING, XDP_PGOFF_RX_RING, struct xdp_desc, rx, false),
    KIND(tx, XDP_TX_RING, XDP_PGOFF_TX_RING, struct xdp_desc, tx, false),
};

static int map_ring(struct queue *q, int i, uint32_t size, const struct xdp_mmap_offsets *all)
{
    const struct ring_kind *k = &kinds[i];
    const struct xdp_ring_offset *off = (const void *)((const char *)all + k->offsets_at);
    struct ring *r = (void *)((char *)q + k->ring);
    size_t bytes = off->desc + size * k->entry;
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, q->fd, k->pgoff);

    if (at == MAP_FAILED) {
        return -1;
    }
    q->map[i].at = at;
    q->map[i].size = bytes;
    *r = (struct ring){.producer = (void *)((char *)at + off->producer),
                       .consumer = (void *)((char *)at + off->consumer),
                       .flags = (void *)((char *)at + off->flags),
                       .entries = (char *)at + off->desc,
                       .size = size,
                       .mask = size - 1};
    return 0;
}

int rings_map(struct queue *q, const struct afxdp_config *cfg, struct afxdp_error *error)
{
    struct xdp_mmap_offsets off;
    socklen_t len = sizeof off;

    if (getsockopt(q->fd, SOL_XDP, XDP_MMAP_OFFSETS, &off, &len) < 0 || len < sizeof off) {
        return fail(error, AFXDP_STEP_RING, q->number, 0);
    }
    for (int i = 0; i < 4; i++) {
        if (map_ring(q, i, kinds[i].fill_sized ? fill_size(cfg) : cfg->ring_size, &off) < 0) {
            return fail(error, AFXDP_STEP_MAP, q->number, 0);
        }
    }
    return 0;
}

static int make_rings(struct queue *q, const struct afxdp_config *cfg, struct afxdp_error *error)
{
    for (int i = 0; i < 4; i++) {
        uint32_t size = kinds[i].fill_sized ? fill_size(cfg) : cfg->ring_size;

        if (setsockopt(q->fd, SOL_XDP, kinds[i].option, &size, sizeof size) < 0) {
            return fail(error, AFXDP_STEP_RING, q->number, 0);
        }
    }
    return 0;
}

/* ---- Options ----------------------------------------------------------------------------------------------- */

static int set_option(struct queue *q, int name, int value, struct afxdp_error *error)
{
    if (setsockopt(q->fd, SOL_SOCKET, name, &value, sizeof value) < 0) {
        return fail(error, AFXDP_STEP_OPTION, q->number, name);
    }
    return 0;
}

static int set_options(struct queue *q, const struct afxdp_config *cfg, struct afxdp_error *error)
{
    uint32_t budget = cfg->ring_size;
    int sndbuf = (int)(cfg->ring_size < 1u << 18 ? cfg->ring_size * 4096 : 1u << 30);

    /* Copy mode charges each packet under way to the socket's send buffer, and its default holds about 90.
     * Both are improvements that the kernel may refuse: without them a kick stops earlier with EAGAIN. */
    if (setsockopt(q->fd, SOL_SOCKET, SO_SNDBUFFORCE, &sndbuf, sizeof sndbuf) < 0) {
        (void)setsockopt(q->fd, SOL_SOCKET, SO_SNDBUF, &sndbuf, sizeof sndbuf);
    }
    if (budget >= 32) {
        (void)setsockopt(q->fd, SOL_XDP, OPT_MAX_TX_SKB_BUDGET, &budget, sizeof budget);
    }
    if ((cfg->flags & AFXDP_F_PREFER_BUSY_POLL) && set_option(q, OPT_PREFER_BUSY_POLL, 1, error) < 0) {
        return -1;
    }
    if (cfg->busy_poll_us && set_option(q, SO_BUSY_POLL, (int)cfg->busy_poll_us, error) < 0) {
        return -1;
    }
    if (cfg->busy_poll_budget && set_option(q, OPT_BUSY_POLL_BUDGET, (int)cfg->busy_poll_budget, error) < 0) {
        return -1;
    }
    return 0;
}

/* ---- Opening ----------------------------------------------------------------------------------------------- */

/* With room for transmit metadata where the kernel knows it (6.11): without, it is asked again for plain memory. */
static int register_umem(struct afxdp *d, const struct afxdp_config *cfg, struct afxdp_error *error)
{
    struct { /* struct xdp_umem_reg as kernel 6.11 has it; 5.4 takes it when what it does not know is zero */
        uint64_t addr, len;
        uint32_t chunk_size, headroom, flags, tx_metadata_len;
    } reg = {.addr = (uintptr_t)d->nd.mem,
             .len = (uint64_t)d->nd.frames * d->nd.stride,
             .chunk_size = d->nd.stride,
             .headroom = cfg->rx_headroom,
             .flags = UMEM_TX_METADATA_LEN,
             .tx_metadata_len = sizeof(struct tx_metadata)};

    if (!(cfg->flags & AFXDP_F_NO_TX_CSUM)) {
        if (setsockopt(d->queue[0].fd, SOL_XDP, XDP_UMEM_REG, &reg, sizeof reg) == 0) {
            d->tx_meta_len = d->st->tx_meta_len = reg.tx_metadata_len;
            return 0;
        }
        if (errno != EINVAL) {
            return fail(error, AFXDP_STEP_UMEM, -1, 0);
        }
    }
    reg.flags = reg.tx_metadata_len = 0;
    if (setsockopt(d->queue[0].fd, SOL_XDP, XDP_UMEM_REG, &reg, sizeof reg) < 0) {
        return fail(error, AFXDP_STEP_UMEM, -1, 0);
    }
    return 0;
}

int queue_prepare(struct queue *q, const struct afxdp_config *cfg, struct afxdp_error *error)
{
    return make_rings(q, cfg, error) < 0 || set_options(q, cfg, error) < 0 ? -1 : 0;
}

int queue_bind(struct afxdp *d, uint32_t qi, const struct afxdp_config *cfg, uint64_t deadline_ns,
               struct afxdp_error *error)
{
    static const uint16_t mode_flags[] = {[AFXDP_AUTO] = 0, [AFXDP_COPY] = XDP_COPY, [AFXDP_ZEROCOPY] = XDP_ZEROCOPY};
    struct queue *q = &d->queue[qi];
    struct sockaddr_xdp addr = {.sxdp_family = AF_XDP, .sxdp_ifindex = d->ifindex, .sxdp_queue_id = q->number};

    if (qi == 0) {
        addr.sxdp_flags = (uint16_t)(mode_flags[cfg->mode] | XDP_USE_NEED_WAKEUP);
    } else {
        addr.sxdp_flags = XDP_SHARED_UMEM;
        addr.sxdp_shared_umem_fd = (uint32_t)d->queue[0].fd;
    }
    /* The kernel closes AF_XDP sockets asynchronously: a queue stays busy for up to a second after its socket. */
    while (bind(q->fd, (struct sockaddr *)&addr, sizeof addr) < 0) {
        if (errno != EBUSY || clock_ns() >= deadline_ns) {
            return fail(error, AFXDP_STEP_BIND, q->number, 0);
        }
        pause_ns(BIND_PAUSE_NS);
    }
    return 0;
}

int queue_watch(struct afxdp *d, uint32_t qi, struct afxdp_error *error)
{
    struct epoll_event ev = {.events = EPOLLIN, .data.u32 = qi};

    if (epoll_ctl(d->epoll_fd, EPOLL_CTL_ADD, d->queue[qi].fd, &ev) < 0) {
        return fail(error, AFXDP_STEP_POLL, d->queue[qi].number, 0);
    }
    return 0;
}

static int open_queue(struct afxdp *d, uint32_t qi, const struct afxdp_config *cfg, uint64_t deadline_ns,
                      struct afxdp_error *error)
{
    struct queue *q = &d->queue[qi];

    q->number = cfg->queues[qi];
    q->fd = socket(AF_XDP, SOCK_RAW | SOCK_CLOEXEC, 0);
    if (q->fd < 0) {
        return fail(error, AFXDP_STEP_SOCKET, q->number, 0);
    }
    if (qi == 0 && register_umem(d, cfg, error) < 0) {
        return -1;
    }
    if (queue_prepare(q, cfg, error) < 0 || rings_map(q, cfg, error) < 0) {
        return -1;
    }
    fill_refill(d, qi);
    if (queue_watch(d, qi, error) < 0) {
        return -1;
    }
    d->st->cookie[qi] = socket_cookie(q->fd);
    return queue_bind(d, qi, cfg, deadline_ns, error); /* last: from here on frames may be the kernel's */
}

void queue_release(struct queue *q)
{
    for (int i = 0; i < 4; i++) { /* a mapping keeps the socket of a closed descriptor alive */
        if (q->map[i].at) {
            munmap(q->map[i].at, q->map[i].size);
        }
    }
    if (q->fd >= 0) {
        close(q->fd);
    }
    *q = (struct queue){.fd = -1};
}

void afxdp_detach(struct afxdp *d)
{
    const int fds[] = {d->epoll_fd, d->control_fd, d->namespace_fd};

    for (unsigned i = 0; i < sizeof fds / sizeof *fds; i++) {
        if (fds[i] >= 0) {
            close(fds[i]);
        }
    }
    for (uint32_t qi = AFXDP_MAX_QUEUES; qi-- > 0;) {
        queue_release(&d->queue[qi]);
    }
    free(d);
}

static int open_all(struct afxdp *d, const struct afxdp_config *cfg, void *mem, size_t size, struct afxdp_error *error)
{
    uint64_t deadline_ns = clock_ns() + cfg->bind_wait_ms * 1000000ull;
    int err = umem_init(d, cfg, mem, size);

    if (err) {
        errno = -err;
        return fail(error, AFXDP_STEP_CONFIG, -1, 0);
    }
    if (interface_find(d, cfg->ifname) < 0) {
        return fail(error, AFXDP_STEP_INTERFACE, -1, 0);
    }
    d->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (d->epoll_fd < 0) {
        return fail(error, AFXDP_STEP_POLL, -1, 0);
    }
    for (uint32_t qi = 0; qi < cfg->queue_count; qi++) {
        if (open_queue(d, qi, cfg, deadline_ns, error) < 0) {
            return -1;
        }
    }
    if (d->tx_meta_len && interface_sums(d)) {
        d->nd.caps |= BYPASS_CAP_TX_CSUM;
    }
    d->st->caps = d->nd.caps;
    return 0;
}

struct afxdp *view_new(const struct afxdp_config *cfg)
{
    struct afxdp *d = calloc(1, sizeof *d);

    if (!d) {
        return NULL;
    }
    for (uint32_t qi = 0; qi < AFXDP_MAX_QUEUES; qi++) {
        d->queue[qi].fd = -1;
    }
    d->epoll_fd = d->control_fd = d->namespace_fd = -1;
    d->cfg = *cfg;
    d->nd.ops = &afxdp_ops;
    d->sys = &kernel_calls;
    d->rx_off = KERNEL_HEADROOM + cfg->rx_headroom;
    d->rx_csum_trust = cfg->flags & AFXDP_F_RX_CSUM_TRUST;
    d->nd.caps = d->rx_csum_trust ? BYPASS_CAP_RX_CSUM : 0;
    d->busy_poll = cfg->flags & AFXDP_F_PREFER_BUSY_POLL;
    return d;
}

struct afxdp *afxdp_open(const struct afxdp_config *cfg, void *mem, size_t size, struct afxdp_error *error)
{
    struct afxdp *d = view_new(cfg);

    *error = (struct afxdp_error){.queue = -1};
    if (!d) {
        *error = (struct afxdp_error){.err = ENOMEM, .step = AFXDP_STEP_CONFIG, .queue = -1};
        return NULL;
    }
    if (open_all(d, cfg, mem, size, error) < 0) {
        afxdp_detach(d);
        return NULL;
    }
    return d;
}

static int open_added(struct afxdp *d, uint32_t qi, const struct afxdp_config *cfg, struct afxdp_error *error)
{
    int back = namespace_enter(d);
    int ret = back == -2 ? fail(error, AFXDP_STEP_SOCKET, cfg->queues[qi], 0)
                         : open_queue(d, qi, cfg, clock_ns() + cfg->bind_wait_ms * 1000000ull, error);

    namespace_leave(back);
    return ret;
}

int afxdp_add_queue(struct afxdp *d, uint16_t number, uint32_t of, struct afxdp_error *error)
{
    struct afxdp_config cfg = d->cfg;
    uint32_t qi = cfg.queue_count, before = d->st->fill_target, target;

    cfg.queue_count = of > qi ? of : qi + 1;
    target = cfg.queue_count <= AFXDP_MAX_QUEUES ? umem_fill_target(&cfg) : 0;
    cfg.queue_count = qi + 1;
    *error = (struct afxdp_error){.err = ENOSPC, .step = AFXDP_STEP_CONFIG, .queue = number};
    if (target == 0) {
        return -ENOSPC;
    }
    if (d->namespace_fd < 0) {
        error->err = EPERM;
        return -EPERM;
    }
    cfg.queues[qi] = number;
    d->st->fill_target = target; /* the others come down to it as packets arrive */
    d->st->queue[qi] = (struct queue_state){0};
    if (open_added(d, qi, &cfg, error) < 0) {
        fill_undo(d, qi);
        queue_release(&d->queue[qi]);
        d->st->fill_target = before;
        return -error->err;
    }
    d->cfg = d->st->cfg = cfg;
    d->nd.queues = (uint16_t)cfg.queue_count;
    return (int)qi;
}

/* ---- Closing ----------------------------------------------------------------------------------------------- */

static uint32_t under_transmission(const struct afxdp *d)
{
    uint32_t n = 0;

    for (uint32_t qi = 0; qi < d->nd.queues; qi++) {
        n += d->st->queue[qi].tx_frames;
    }
    return n;
}

int afxdp_close(struct afxdp *d, int wait_ms)
{
    uint64_t deadline_ns = clock_ns() + (uint64_t)(wait_ms > 0 ? wait_ms : 0) * 1000000;
    int left;

    for (;;) {
        bypass_pkt done[64];
        int err;

        while (d->nd.ops->reap(&d->nd, done, 64) == 64) {}
        if (!under_transmission(d) || clock_ns() >= deadline_ns) {
            break;
        }
        err = d->nd.ops->kick(&d->nd);
        if (err == -ENETDOWN) {
            break;
        }
        pause_ns(100000);
    }
    left = (int)under_transmission(d);
    afxdp_detach(d);
    return left;
}

/* ---- Questions --------------------------------------------------------------------------------------------- */

struct bypass_netdev *afxdp_netdev(struct afxdp *d) { return &d->nd; }

void afxdp_sync(struct afxdp *d)
{
    d->nd.free_frames = d->st->free_count;
    interface_take(d);
}

static const struct queue *queue_at(const struct afxdp *d, int qi)
{
    return qi >= 0 && qi < d->nd.queues ? &d->queue[qi] : NULL;
}

int afxdp_fd(const struct afxdp *d, int queue_index)
{
    const struct queue *q = queue_at(d, queue_index);

    return q ? q->fd : -EINVAL;
}

int afxdp_zerocopy(const struct afxdp *d)
{
    for (uint32_t qi = 0; qi < d->nd.queues; qi++) {
        struct xdp_options options;
        socklen_t len = sizeof options;

        if (getsockopt(d->queue[qi].fd, SOL_XDP, XDP_OPTIONS, &options, &len) < 0) {
            return -errno;
        }
        if (!(options.flags & XDP_OPTIONS_ZEROCOPY)) {
            return 0;
        }
    }
    return 1;
}

int afxdp_health(struct afxdp *d)
{
    int err = d->st->gone ? -ENXIO : wake_tx(d, 0);

    if (err == -ENXIO) {
        device_gone(d);
        return err;
    }
    if (interface_read(d) < 0) { /* just deleted: the sockets are told a moment later */
        return -ENXIO;
    }
    return err == -ENETDOWN ? err : 0;
}

int afxdp_counters(const struct afxdp *d, int queue_index, struct afxdp_counters *out)
{
    if (!queue_at(d, queue_index)) {
        return -EINVAL;
    }
    *out = d->st->queue[queue_index].n;
    return 0;
}

int afxdp_kernel_stats(const struct afxdp *d, int queue_index, struct afxdp_kernel_stats *out)
{
    const struct queue *q = queue_at(d, queue_index);
    struct xdp_statistics s = {0};
    socklen_t len = sizeof s;

    if (!q) {
        return -EINVAL;
    }
    if (getsockopt(q->fd, SOL_XDP, XDP_STATISTICS, &s, &len) < 0) {
        return -errno;
    }
    *out = (struct afxdp_kernel_stats){.rx_dropped = s.rx_dropped,
                                       .rx_invalid_descs = s.rx_invalid_descs,
                                       .tx_invalid_descs = s.tx_invalid_descs,
                                       .rx_ring_full = s.rx_ring_full,
                                       .rx_fill_ring_empty_descs = s.rx_fill_ring_empty_descs,
                                       .tx_ring_empty_descs = s.tx_ring_empty_descs};
    return 0;
}
