/* SPDX-License-Identifier: Apache-2.0 */
/*
 * path.c - the bottleneck. All that happens to a frame is decided when it enters: when its last bit leaves the queue
 * (the rate holds exactly, whenever the caller comes), what it meets on the way, when it arrives. Frames on their way
 * lie in a heap by that time, so that reordering is nothing special.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "goodput.h"

enum { SLOTS = 1 << 16 /* frames on the wire; memory comes with use */, ETH_HEADER = 14, PPM = 1000000 };

struct flight {
    uint64_t time_ns, order;
    uint32_t slot;
    uint16_t len;
    uint8_t dir, to;
};

struct direction {
    struct faults f;
    struct counts n;
    uint64_t random; /* state of its generator */
    uint64_t busy_until_ns, rest;
    bool in_burst;
};

struct path {
    struct direction dir[2];
    uint64_t began_ns, order;
    uint32_t flights, free_count, bump, taken;
    FILE *sent, *got;
    struct flight heap[SLOTS];
    uint32_t free_list[SLOTS];
    uint8_t frames[SLOTS][FRAME_MAX];
};

/* splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators"). */
static uint64_t random_next(struct direction *d)
{
    uint64_t z = (d->random += 0x9e3779b97f4a7c15ull);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

static uint64_t random_below(struct direction *d, uint64_t n)
{
    return (uint64_t)((unsigned __int128)random_next(d) * n >> 64);
}

static bool hit(struct direction *d, uint64_t ppm) { return ppm && random_below(d, PPM) < ppm; }

struct path *path_create(uint64_t seed, uint64_t now_ns, const struct faults faults[2])
{
    struct path *p = mmap(NULL, sizeof *p, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED)
        return NULL;
    p->began_ns = now_ns;
    for (int d = 0; d < 2; d++) {
        p->dir[d].f = faults[d];
        p->dir[d].random = seed * 2 + (uint64_t)d;
        p->dir[d].random = random_next(&p->dir[d]);
    }
    return p;
}

void path_destroy(struct path *p)
{
    if (p->sent)
        (void)fclose(p->sent);
    if (p->got)
        (void)fclose(p->got);
    (void)munmap(p, sizeof *p);
}

const struct counts *path_counts(const struct path *p, int dir) { return &p->dir[dir].n; }

/* ---- Recording: classic pcap with nanoseconds --------------------------------------------------------------- */
static FILE *record_open(const char *prefix, const char *what)
{
    static const uint32_t head[] = {0xa1b23c4d, 4 << 16 | 2, 0, 0, 65535, 1 /* Ethernet */};
    char path[4096];
    snprintf(path, sizeof path, "%s.%s.pcap", prefix, what);
    FILE *f = fopen(path, "wb");
    if (f)
        (void)fwrite(head, sizeof head, 1, f);
    return f;
}

int path_record(struct path *p, const char *prefix)
{
    p->sent = record_open(prefix, "sent");
    p->got = p->sent ? record_open(prefix, "got") : NULL;
    return p->got ? 0 : -errno;
}

static void record(FILE *f, const struct path *p, uint64_t now_ns, const uint8_t *frame, uint32_t len)
{
    if (!f)
        return;
    uint64_t t = now_ns - p->began_ns;
    uint32_t head[] = {(uint32_t)(t / SEC), (uint32_t)(t % SEC), len, len};
    (void)fwrite(head, sizeof head, 1, f);
    (void)fwrite(frame, len, 1, f);
}

/* ---- The heap ----------------------------------------------------------------------------------------------- */
static bool earlier(const struct flight *a, const struct flight *b)
{
    return a->time_ns != b->time_ns ? a->time_ns < b->time_ns : a->order < b->order;
}

static void heap_push(struct path *p, struct flight f)
{
    uint32_t i = p->flights++;
    for (; i > 0 && earlier(&f, &p->heap[(i - 1) / 2]); i = (i - 1) / 2)
        p->heap[i] = p->heap[(i - 1) / 2];
    p->heap[i] = f;
}

static struct flight heap_pop(struct path *p)
{
    struct flight first = p->heap[0], last = p->heap[--p->flights];
    uint32_t i = 0, child;
    for (; (child = 2 * i + 1) < p->flights; i = child) {
        if (child + 1 < p->flights && earlier(&p->heap[child + 1], &p->heap[child]))
            child++;
        if (earlier(&last, &p->heap[child]))
            break;
        p->heap[i] = p->heap[child];
    }
    p->heap[i] = last;
    return first;
}

/* ---- A frame's fate ----------------------------------------------------------------------------------------- */

/* Congestion Experienced, if the packet is IPv4 and ECN-capable (RFC 3168 5). */
static bool mark(uint8_t *frame, uint32_t len)
{
    uint8_t *ip = frame + ETH_HEADER;
    if (len < ETH_HEADER + 20 || frame[12] != 8 || frame[13] != 0 || !(ip[1] & 3))
        return false;
    ip[1] |= 3;
    ip[10] = ip[11] = 0;
    uint32_t sum = 0;
    for (uint32_t i = 0; i < (ip[0] & 15u) * 4; i += 2)
        sum += (uint32_t)ip[i] << 8 | ip[i + 1];
    sum = (sum & 0xffff) + (sum >> 16);
    sum = ~(sum + (sum >> 16));
    ip[10] = (uint8_t)(sum >> 8);
    ip[11] = (uint8_t)sum;
    return true;
}

/* When the last bit leaves the queue; NEVER: there was no room. */
static uint64_t departure(struct direction *d, uint32_t len, uint64_t now_ns, bool *crowded)
{
    *crowded = false;
    if (!d->f.rate_bps)
        return now_ns;
    if (d->busy_until_ns <= now_ns) {
        d->busy_until_ns = now_ns;
        d->rest = 0;
    }
    uint64_t wait_ns = d->busy_until_ns - now_ns;
    uint64_t waiting = (uint64_t)((unsigned __int128)wait_ns * d->f.rate_bps / (8 * SEC));
    if (waiting + len > d->f.queue_bytes && wait_ns > 0)
        return NEVER;
    d->n.queue_sum_ns += wait_ns;
    d->n.queue_max_ns = wait_ns > d->n.queue_max_ns ? wait_ns : d->n.queue_max_ns;
    *crowded = d->f.mark_bytes && waiting > d->f.mark_bytes;
    uint64_t work = len * 8 * SEC + d->rest; /* the remainder is carried over: the rate holds exactly */
    d->busy_until_ns += work / d->f.rate_bps;
    d->rest = work % d->f.rate_bps;
    return d->busy_until_ns;
}

static bool lost_on_the_way(struct path *p, struct direction *d, uint64_t departed_ns)
{
    const struct faults *f = &d->f;
    if (f->burst_ppm) {
        if (hit(d, d->in_burst ? f->burst_end : f->burst_ppm))
            d->in_burst = !d->in_burst;
        d->n.burst_lost += d->in_burst;
    }
    bool lost = hit(d, f->loss_ppm);
    d->n.lost += lost;
    bool out =
        f->outage_every_ns && (departed_ns - p->began_ns) % f->outage_every_ns >= f->outage_every_ns - f->outage_ns;
    d->n.outage_lost += out;
    return d->in_burst || lost || out;
}

static void launch(struct path *p, const uint8_t *frame, struct flight f, bool marked)
{
    if (p->free_count)
        f.slot = p->free_list[--p->free_count];
    else if (p->bump < SLOTS)
        f.slot = p->bump++;
    else
        die("too many frames on the wire", 0);
    f.order = p->order++;
    memcpy(p->frames[f.slot], frame, f.len);
    if (marked)
        p->dir[f.dir].n.marked += mark(p->frames[f.slot], f.len);
    heap_push(p, f);
}

void path_send(struct path *p, int from, int to, const uint8_t *frame, uint32_t len, uint64_t now_ns)
{
    struct direction *d = &p->dir[side_of(from)];
    bool crowded;
    if (len > FRAME_MAX)
        die("a frame is larger than the MTU: offloads are on", 0);
    d->n.frames++;
    d->n.bytes += len;
    record(p->sent, p, now_ns, frame, len);
    uint64_t t = departure(d, len, now_ns, &crowded);
    if (t == NEVER) {
        d->n.queue_dropped++;
        return;
    }
    if (lost_on_the_way(p, d, t))
        return;
    t += d->f.delay_ns;
    if (d->f.jitter_ns)
        t += random_below(d, d->f.jitter_ns + 1);
    if (hit(d, d->f.reorder_ppm)) {
        d->n.reordered++;
        t += d->f.reorder_ns;
    }
    struct flight f = {.time_ns = t, .len = (uint16_t)len, .dir = (uint8_t)side_of(from), .to = (uint8_t)to};
    launch(p, frame, f, crowded);
    if (hit(d, d->f.duplicate_ppm)) {
        d->n.duplicated++;
        launch(p, frame, f, crowded);
    }
}

uint64_t path_next(const struct path *p) { return p->flights ? p->heap[0].time_ns : NEVER; }

bool path_take(struct path *p, uint64_t now_ns, struct arrival *out)
{
    if (path_next(p) > now_ns)
        return false;
    struct flight f = heap_pop(p);
    p->taken = f.slot;
    p->dir[f.dir].n.delivered++;
    *out = (struct arrival){.frame = p->frames[f.slot], .due_ns = f.time_ns, .len = f.len, .to = f.to};
    record(p->got, p, now_ns, out->frame, out->len);
    return true;
}

void path_done(struct path *p) { p->free_list[p->free_count++] = p->taken; }
