/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sim_copies.c - how often the stack copies a payload byte, with plain calls and with those that do not copy: one
 * transfer each way over the simulated wire, both ends on one core. The program makes each byte where it sends it from
 * and compares each where it received it, with both kinds of calls, so that their difference is the stack's.
 *
 * sim_copies MEGABYTES plain|zc: prints one JSON object: bytes delivered, copies of each side's stack in bytes, CPU
 * nanoseconds of the process.
 */
#include "simhost.h"

enum { PATTERN = 65536, BUFS = 32, MSS = 1448 };
static uint8_t pattern[2 * PATTERN]; /* twice the same: a piece from any offset lies in one */

static void produce(uint8_t *to, uint64_t at, size_t n) { memcpy(to, pattern + at % PATTERN, n); }

static void consume(const uint8_t *got, uint64_t at, size_t n)
{
    for (size_t done = 0, part; done < n; done += part) {
        part = n - done < PATTERN ? n - done : PATTERN;
        if (memcmp(got + done, pattern + (at + done) % PATTERN, part) != 0)
            die("received bytes differ", -EIO);
    }
}

static uint64_t copied(const struct host *h)
{
    for (int i = 0; i < bypass_stat_count(); i++)
        if (strcmp(bypass_stat_name(i), "tcp_copied_bytes") == 0)
            return bypass_stats(&h->stack)[i];
    return (uint64_t)die("tcp_copied_bytes", -ENOENT);
}

static uint64_t checked(const char *what, int64_t n)
{
    if (n < 0 && n != -EAGAIN && n != -ENOBUFS)
        die(what, n);
    return n < 0 ? 0 : (uint64_t)n;
}

/* ---- Plain calls: bytes taken or read now -------------------------------------------------------------------- */
static uint64_t send_plain(struct host *h, uint64_t at, uint64_t most)
{
    static uint8_t buf[PATTERN];
    size_t n = most < PATTERN ? (size_t)most : PATTERN;
    produce(buf, at, n);
    return checked("send", bypass_send(&h->stack, h->sock, buf, n, 0));
}

static uint64_t recv_plain(struct host *h, uint64_t at)
{
    static uint8_t buf[4 * PATTERN];
    uint64_t n = checked("recv", bypass_recv(&h->stack, h->sock, buf, sizeof buf, 0));
    consume(buf, at, n);
    return n;
}

/* ---- Calls that do not copy ---------------------------------------------------------------------------------- */
static uint64_t send_zc(struct host *h, uint64_t at, uint64_t most)
{
    static struct bypass_buf bufs[BUFS]; /* the first `have` are filled, and go first next time */
    static int have;
    uint64_t taken = 0, filled = 0;
    for (int i = 0; i < have; i++)
        filled += bufs[i].len;
    int fresh = (int)checked(
        "alloc", most > filled && have < BUFS ? bypass_buf_alloc(&h->stack, h->sock, bufs + have, BUFS - have) : 0);
    for (int i = have; fresh > 0; i++, fresh--) {
        bufs[i].len = most - filled < bufs[i].cap ? (uint32_t)(most - filled) : bufs[i].cap;
        if (bufs[i].len == 0) { /* all is written: these are not needed */
            (void)bypass_release(&h->stack, &bufs[i].token, 1);
            continue;
        }
        produce(bufs[i].data, at + filled, bufs[i].len);
        filled += bufs[i].len;
        have = i + 1;
    }
    uint32_t lens[BUFS];
    for (int i = 0; i < have; i++)
        lens[i] = bufs[i].len;
    int n = have > 0 ? (int)checked("send", bypass_send_zc(&h->stack, h->sock, bufs, have, 0)) : 0;
    for (int i = 0; i < n; i++)
        taken += lens[i];
    memmove(bufs, bufs + n, (size_t)(have - n) * sizeof *bufs);
    have -= n;
    return taken;
}

static uint64_t recv_zc(struct host *h, uint64_t at)
{
    struct bypass_buf bufs[BUFS];
    uint64_t tokens[BUFS], got = 0;
    int n = (int)checked("recv", bypass_recv_zc(&h->stack, h->sock, bufs, BUFS));
    for (int i = 0; i < n; i++) {
        consume(bufs[i].data, at + got, bufs[i].len);
        got += bufs[i].len;
        tokens[i] = bufs[i].token;
    }
    if (n > 0 && bypass_release(&h->stack, tokens, n) != 0)
        die("release", -EINVAL);
    return got;
}

static void transfer(struct sim *sim, struct host *from, struct host *to, uint64_t total, int zc)
{
    uint64_t sent = 0, received = 0, n;
    while (received < total) {
        while (sent < total && (n = (zc ? send_zc : send_plain)(from, sent, total - sent)) > 0)
            sent += n;
        while ((n = (zc ? recv_zc : recv_plain)(to, received)) > 0)
            received += n;
        if (received < total)
            step(sim);
    }
}

int main(int argc, char **argv)
{
    const struct sim_faults faults = {.delay_ns = 10000};
    int zc = argc == 3 && strcmp(argv[2], "zc") == 0;
    if (argc != 3 || (!zc && strcmp(argv[2], "plain") != 0) || atoll(argv[1]) <= 0) {
        fprintf(stderr, "usage: sim_copies MEGABYTES plain|zc\n");
        return 2;
    }
    uint64_t bytes = (uint64_t)atoll(argv[1]) * 1000000;
    bytes -=
        bytes % MSS; /* a short last segment would be copied out of its frame, as all payloads up to 256 bytes are */
    struct host server = {0}, client = {0};
    struct sim *sim = sim_create(1, 1000000000);
    struct sim_wire *wire = sim ? sim_wire_create(sim, SIM_WIRE_SWITCH) : NULL;
    if (!wire)
        die("memory", -ENOMEM);
    for (size_t i = 0; i < sizeof pattern; i++)
        pattern[i] = (uint8_t)(i % PATTERN * 7 + (i % PATTERN >> 8));
    host_open(&server, sim, wire, 1, &faults);
    host_open(&client, sim, wire, 2, &faults);
    connect_both(sim, &server, &client);
    uint64_t cpu = cpu_ns();
    transfer(sim, &client, &server, bytes, zc);
    uint64_t sender = copied(&client), receiver = copied(&server);
    transfer(sim, &server, &client, bytes, zc);
    cpu = cpu_ns() - cpu;
    struct bypass_audit a;
    bypass_audit(&server.stack, &a);
    printf("{\"bytes\": %llu, \"sender_copied\": %llu, \"receiver_copied\": %llu, \"back_sender_copied\": %llu, "
           "\"back_receiver_copied\": %llu, \"cpu_ns\": %llu, \"lent\": %u}\n",
           (unsigned long long)bytes, (unsigned long long)sender, (unsigned long long)receiver,
           (unsigned long long)(copied(&server) - receiver), (unsigned long long)(copied(&client) - sender),
           (unsigned long long)cpu, a.lent);
    host_close(&client);
    host_close(&server);
    sim_destroy(sim);
    return 0;
}
