/* SPDX-License-Identifier: Apache-2.0 */
/*
 * flow.c - the programs at both ends: one writes a known pattern as fast as it is let, the other reads, compares, and
 * counts. A flow is one connection without end, or transfers of so many bytes one after another, each on a connection
 * of its own, timed from connect() to the last byte read.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "goodput.h"

enum { PERIOD = 65521 /* a prime: no shift by a round number goes unnoticed */, CHUNK = 65536, FIRST_PORT = 5000 };
static uint8_t pattern[PERIOD + CHUNK], buffer[CHUNK];

void flow_init(void)
{
    uint32_t x = 1;
    for (uint32_t i = 0; i < PERIOD; i++) {
        x = x * 1664525 + 1013904223;
        pattern[i] = (uint8_t)(x >> 24);
    }
    for (uint32_t i = PERIOD; i < sizeof pattern; i++)
        pattern[i] = pattern[i - PERIOD];
}

static uint64_t tag_of(const struct bench *b, const struct flow *f, int what)
{
    return FIRST_TAG + (uint64_t)(f - b->flows) * 4 + (uint64_t)what;
}

static void failed(struct flow *f, int64_t err)
{
    f->error = strerror((int)-err);
    f->sender = f->receiver = -1;
}

void flow_listen(struct bench *b, struct flow *f)
{
    struct host *to = b->hosts[f->to];
    f->listener = to->ops->listen(to, (uint16_t)(FIRST_PORT + (f - b->flows)), tag_of(b, f, TAG_LISTENER));
    if (f->listener < 0)
        die("listen", f->listener);
    f->sender = f->receiver = -1;
}

void flow_start(struct bench *b, struct flow *f)
{
    struct host *from = b->hosts[f->from];
    uint16_t port = (uint16_t)(FIRST_PORT + (f - b->flows));
    f->started = true;
    f->sent = f->received = 0;
    f->began_ns = b->now_ns;
    f->sender = from->ops->connect(from, f->to, port, f->cc, tag_of(b, f, TAG_SENDER));
    if (f->sender < 0)
        die(f->cc, f->sender);
}

static void pump_send(struct bench *b, struct flow *f)
{
    struct host *from = b->hosts[f->from];
    while (f->sender >= 0) {
        uint64_t left = f->bytes ? f->bytes - f->sent : CHUNK;
        int64_t n = from->ops->send(from, f->sender, pattern + f->sent % PERIOD, left < CHUNK ? left : CHUNK);
        if (n == -EAGAIN || n == -ENOTCONN)
            return;
        if (n < 0) {
            failed(f, n);
            return;
        }
        f->sent += (uint64_t)n;
        if (f->bytes && f->sent == f->bytes) { /* what is queued is still sent, then a FIN */
            from->ops->close(from, f->sender);
            f->sender = -1;
        }
    }
}

static void transfer_done(struct bench *b, struct flow *f)
{
    struct host *to = b->hosts[f->to];
    to->ops->close(to, f->receiver);
    f->receiver = -1;
    if (f->done == f->done_cap) {
        f->done_cap = f->done_cap ? 2 * f->done_cap : 64;
        f->done_ms = realloc(f->done_ms, f->done_cap * sizeof *f->done_ms);
        f->done_at_ns = realloc(f->done_at_ns, f->done_cap * sizeof *f->done_at_ns);
        if (!f->done_ms || !f->done_at_ns)
            die("memory", -ENOMEM);
    }
    f->done_at_ns[f->done] = b->now_ns - b->began_ns;
    f->done_ms[f->done++] = (double)(b->now_ns - f->began_ns) / (double)MSEC;
    flow_start(b, f);
}

static void pump_recv(struct bench *b, struct flow *f)
{
    struct host *to = b->hosts[f->to];
    while (f->receiver >= 0) {
        int64_t n = to->ops->recv(to, f->receiver, buffer, sizeof buffer);
        if (n == -EAGAIN)
            return;
        if (n < 0) {
            failed(f, n);
            return;
        }
        if (memcmp(buffer, pattern + f->received % PERIOD, (size_t)n) != 0)
            die("bytes received are not the bytes sent", 0);
        f->received += (uint64_t)n;
        f->total += (uint64_t)n;
        if (n == 0 && f->received != f->bytes)
            die("the stream ended early", 0);
        if (n == 0)
            transfer_done(b, f);
    }
}

void flow_event(struct bench *b, uint64_t tag)
{
    struct flow *f = &b->flows[(tag - FIRST_TAG) / 4];
    struct host *to = b->hosts[f->to];
    switch ((tag - FIRST_TAG) % 4) {
    case TAG_SENDER:
        pump_send(b, f);
        break;
    case TAG_RECEIVER:
        pump_recv(b, f);
        break;
    default:
        if (f->receiver < 0) {
            int64_t got = to->ops->accept(to, f->listener, tag_of(b, f, TAG_RECEIVER));
            if (got < 0 && got != -EAGAIN)
                die("accept", got);
            f->receiver = got < 0 ? -1 : got;
            pump_recv(b, f);
        }
    }
}

void flow_look(struct bench *b, struct flow *f)
{
    struct host *from = b->hosts[f->from];
    if (f->sender >= 0)
        from->ops->info(from, f->sender, &f->last);
}
