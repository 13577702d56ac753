/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_filter - the device between a port and a stack (filter.c): frames of whatever bytes and lengths arrive on a port
 * with or without a VLAN of its own, are steered, passed or dropped as the input says, the kernel (a socket) sends and
 * takes or does not, the port's ring is full, its frames are used up. Every frame has to be in one place: what is handed
 * up and what the kernel gets is what was put in, changed by the tag at the most; none is lost uncounted, doubled, or
 * touched outside of its bytes (frames that are free are poisoned).
 */
#include "fuzz.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "dpdk_backend/filter.h"

enum {
    FRAMES = 48,
    STRIDE = 2048,
    VLAN = 5,
    TAG = 4,
    MACS = 12,
    MAX = 1600,
    NUMBER_AT = 6, /* two bytes of each frame's source MAC address say which it is */
    INPUTS = 512,
};

struct seen { /* of a frame that was put in */
    uint16_t len;
    uint8_t bytes[MAX];
};

struct world {
    struct memdev dev;
    struct bypass_netdev *filter;
    struct exception_path path;
    int kernel; /* its end; -1: there is none */
    uint16_t vlan;
    const uint8_t *verdicts; /* of the input; one byte a frame that is judged */
    uint32_t verdicts_n, judged, steered, passed, dropped;
    struct seen *in; /* by number; from input to input the same place */
    uint32_t in_n;
    uint64_t up, to_kernel, from_kernel, on_wire, sent;
};

#ifdef FUZZ_LOSE /* linked with --wrap: what is said to have been passed was not, and the harness has to notice */
int __wrap_exception_write(struct exception_path *e, const void *frame, size_t len);
int __wrap_exception_write(struct exception_path *e, const void *frame, size_t len)
{
    (void)frame;
    e->n.passed++;
    e->n.passed_bytes += len;
    return EXCEPTION_PASSED;
}
#endif

static struct seen put_in[INPUTS];
static struct world *now; /* of classify(), which gets nothing of ours else */

static void classify_as_told(struct classifier *ctx, const struct classify_frame *in, uint32_t n,
                             struct classify_result *out)
{
    struct world *w = now;

    CHECK(ctx == NULL && n > 0 && n <= CLASSIFY_BURST, "%u frames", n);
    for (uint32_t i = 0; i < n; i++, w->judged++) {
        uint32_t sum = 0;

        for (uint32_t b = 0; b < in[i].len; b++) { /* all of it can be read */
            sum += in[i].data[b];
        }
        out[i] = (struct classify_result){.entry = sum, .rule = i, .hash = 1};
        out[i].verdict = w->verdicts_n ? w->verdicts[w->judged % w->verdicts_n] % 3 : CLASSIFY_PASS;
        w->steered += out[i].verdict == CLASSIFY_STEER;
        w->dropped += out[i].verdict == CLASSIFY_DROP;
        w->passed += out[i].verdict == CLASSIFY_PASS;
    }
}

/* ---- What comes out ---------------------------------------------------------------------------------------------- */

/* Is it one that was put in, with the tag or without? */
static void judge_frame(const struct world *w, const uint8_t *p, uint32_t len, bool tagged)
{
    const struct seen *s;
    uint32_t number = len >= MACS ? get16(p + NUMBER_AT) : UINT32_MAX, cut = tagged ? 0 : TAG;

    if (len < MACS) { /* too short to say: some such one was put in */
        CHECK(!w->vlan || tagged, "%u bytes", len);
        return;
    }
    CHECK(number < w->in_n, "number %u of %u", number, w->in_n);
    s = &w->in[number];
    if (!w->vlan) {
        cut = 0;
    }
    CHECK(len + cut == s->len, "%u bytes of %u", len, s->len);
    CHECK(memcmp(p, s->bytes, MACS) == 0 && memcmp(p + MACS, s->bytes + MACS + cut, len - MACS) == 0, "other bytes");
    CHECK(!cut || (get16(s->bytes + MACS) == 0x8100 && (get16(s->bytes + MACS + 2) & 0xfff) == w->vlan), "another tag");
}

static void drain_kernel(struct world *w)
{
    uint8_t b[4096];
    ssize_t n;

    while (w->kernel >= 0 && (n = recv(w->kernel, b, sizeof b, MSG_DONTWAIT)) >= 0) {
        judge_frame(w, b, (uint32_t)n, true);
        w->to_kernel++;
    }
}

/* What left by the port: the stack's frames with the port's tag, the kernel's as they were. */
static void drain_wire(struct world *w)
{
    const uint8_t *p;
    size_t len;

    while ((p = memdev_sent(&w->dev, &len)) != NULL) {
        w->on_wire++;
        if (len > 0 && p[0] == 0x42) { /* the stack's */
            bool tagged = len >= MACS + TAG + 2 && get16(p + MACS) == 0x8100;

            CHECK(!w->vlan || tagged, "untagged");
            CHECK(!w->vlan || get16(p + MACS + 2) == w->vlan, "tag %u", get16(p + MACS + 2));
            CHECK(!w->vlan || get16(p + MACS + TAG) == 0x88b5, "ethertype %x", get16(p + MACS + TAG));
        }
    }
}

static void handed_up(struct world *w, int max)
{
    bypass_pkt pkts[64];
    int n = w->filter->ops->rx_burst(w->filter, pkts, max);

    CHECK(n >= 0 && n <= max, "%d of %d", n, max);
    CHECK(w->filter->free_frames == w->dev.dev.free_frames, "%u free, %u", w->filter->free_frames,
          w->dev.dev.free_frames);
    for (int i = 0; i < n; i++) {
        struct bypass_pkt_meta *m = memdev_meta(&w->dev, pkts[i]);

        judge_frame(w, memdev_bytes(&w->dev, pkts[i]) + m->off, m->len, false);
        CHECK(w->kernel < 0 || m->flags & BYPASS_RX_VERDICT, "passed up, with a kernel there");
    }
    w->filter->ops->free(w->filter, pkts, n);
    w->up += (uint64_t)n;
    drain_kernel(w);
}

/* ---- What happens ------------------------------------------------------------------------------------------------ */

static void arrive(struct world *w, struct input *in)
{
    uint8_t what = in_u8(in), frame[MAX];
    uint32_t len = in_u16(in) % MAX, head = what & 1 ? MACS + TAG : MACS;

    if (w->in_n == INPUTS) {
        return;
    }
    memset(frame, 0x11, sizeof frame);
    if (what & 1) { /* the port's own tag, or one that is nearly it */
        put16(frame + MACS, what & 2 ? 0x88a8 : 0x8100);
        put16(frame + MACS + 2, (uint32_t)(in_u8(in) & 0xf0) << 8 | (what & 4 ? in_u16(in) & 0xfff : VLAN));
    }
    for (uint32_t n = what >> 4; n > 0; n--) {
        frame[head + n] = in_u8(in);
    }
    len = what & 8 ? len % (MACS + TAG + 4) : len;
    if (len >= MACS) {
        put16(frame + NUMBER_AT, w->in_n);
    }
    if (memdev_inject_queue(&w->dev, frame, len, what & 1, what & 2 ? BYPASS_RX_VERDICT : 0) < 0) {
        return;
    }
    w->in[w->in_n].len = (uint16_t)len;
    memcpy(w->in[w->in_n++].bytes, frame, len);
}

static void kernel_says(struct world *w, struct input *in)
{
    uint8_t frame[2 * MAX] = {0x24};
    uint32_t len = in_u16(in) % sizeof frame;

    if (w->kernel >= 0 && send(w->kernel, frame, len ? len : 1, MSG_DONTWAIT) >= 0) {
        w->from_kernel++;
    }
}

/* As a stack does, one that asks for a checksum too. */
static void transmit(struct world *w, struct input *in)
{
    uint8_t what = in_u8(in);
    struct bypass_pkt_meta *m;
    uint8_t *at;
    bypass_pkt pkt;
    int sent;

    if (w->filter->ops->alloc(w->filter, &pkt, 1) != 1) {
        return;
    }
    m = memdev_meta(&w->dev, pkt);
    m->len = (uint16_t)(60 + what);
    at = memdev_bytes(&w->dev, pkt) + m->off;
    memset(at, 0x42, m->len);
    put16(at + MACS, 0x88b5);
    m->flags = what & 1 ? BYPASS_TX_CSUM : 0;
    m->csum_start = 34;
    sent = w->filter->ops->tx_burst(w->filter, &pkt, 1);
    if (sent == 0) { /* once more, as it is */
        (void)w->filter->ops->reap(w->filter, &(bypass_pkt){0}, 0);
        w->dev.tx_limit = UINT32_MAX;
        sent = w->filter->ops->tx_burst(w->filter, &pkt, 1);
    }
    CHECK(sent == 1, "%d", sent);
    CHECK(m->csum_start == 34 + (w->vlan && what & 1 ? TAG : 0), "checksum from %u on", m->csum_start);
    w->filter->ops->free(w->filter, &pkt, 1);
    w->sent++;
}

static void reap(struct world *w)
{
    bypass_pkt done[64];

    CHECK(w->filter->ops->reap(w->filter, done, 64) == 0, "somebody holds a frame that was sent");
    drain_wire(w);
}

static void step(struct world *w, struct input *in)
{
    uint8_t what = in_u8(in);

    switch (what % 8) {
    case 0:
    case 1:
        arrive(w, in);
        break;
    case 2:
        handed_up(w, 1 + what / 8);
        break;
    case 3:
        kernel_says(w, in);
        break;
    case 4:
        transmit(w, in);
        break;
    case 5:
        w->dev.tx_limit = what & 8 ? UINT32_MAX : what >> 4;
        break;
    case 6:
        reap(w);
        break;
    default: /* the device was deleted, or it is later */
        if (what == 255) {
            w->path.gone = 1;
        }
        filter_now(w->filter, (uint64_t)in_u16(in) << (what >> 4) | 1);
    }
}

/* ---- The world --------------------------------------------------------------------------------------------------- */

static void open_world(struct world *w, struct input *in)
{
    struct filter_config cfg = {.classify = classify_as_told};
    uint8_t flags = in_u8(in);
    int pair[2] = {-1, -1}, room = 1 << 16;

    memset(w, 0, sizeof *w);
    now = w;
    memdev_open(&w->dev, FRAMES, STRIDE);
    w->in = put_in;
    w->vlan = cfg.vlan = flags & 1 ? VLAN : 0;
    w->kernel = -1;
    if (flags & 2) {
        CHECK(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0, pair) == 0, "no sockets");
        setsockopt(pair[1], SOL_SOCKET, SO_SNDBUF, &room, sizeof room);
        w->kernel = pair[0];
        exception_adopt(&w->path, pair[1], 1u << (flags >> 3), flags & 4 ? 8 : 0);
        cfg.exception = &w->path;
    }
    w->verdicts_n = in_u8(in) % 32;
    if (w->verdicts_n > (uint32_t)(in->end - in->p)) {
        w->verdicts_n = (uint32_t)(in->end - in->p);
    }
    w->verdicts = in->p;
    in->p += w->verdicts_n;
    w->filter = filter_create(&w->dev.dev, &cfg);
    CHECK(w->filter != NULL, "no memory");
    filter_now(w->filter, 1);
}

static void close_world(struct world *w)
{
    struct filter_counters n;

    w->dev.tx_limit = UINT32_MAX;
    for (int i = 0; i < 16; i++) { /* all that can still move */
        handed_up(w, 64);
        reap(w);
    }
    filter_counters(w->filter, &n);
    CHECK(n.steered == w->steered && n.dropped == w->dropped && n.passed == w->passed + n.other_vlan,
          "%u steered, %u dropped, %u passed", w->steered, w->dropped, w->passed);
    CHECK(w->up == n.steered + (w->kernel < 0 ? n.passed - n.other_vlan : 0), "%u handed up", (uint32_t)w->up);
    CHECK(w->kernel < 0 ||
              n.passed == n.waiting + w->path.n.passed + w->path.n.over_rate + w->path.n.full + w->path.n.errors,
          "%u passed", (uint32_t)n.passed);
    CHECK(w->to_kernel == w->path.n.passed, "the kernel has got %u", (uint32_t)w->to_kernel);
    CHECK(w->on_wire == w->sent + n.from_kernel, "%u on the wire", (uint32_t)w->on_wire);
    CHECK(w->path.gone ||
              w->from_kernel == n.from_kernel + n.from_kernel_full + n.from_kernel_no_frame + w->path.n.read_errors,
          "%u from the kernel", (uint32_t)w->from_kernel);
    filter_destroy(w->filter);
    memdev_close(&w->dev); /* which wants all frames back */
    if (w->kernel >= 0) {
        exception_close(&w->path);
        close(w->kernel);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct world w;
    struct input in = {data, data + (size < 4000 ? size : 4000)};

    open_world(&w, &in);
    while (in.p < in.end) {
        step(&w, &in);
    }
    close_world(&w);
    return 0;
}
