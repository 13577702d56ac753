/* SPDX-License-Identifier: Apache-2.0 */
/*
 * hostile.c - a long transfer over a simulated wire that loses, reorders, duplicates and corrupts frames in both
 * directions, each by chance. Every byte is compared with what was written: the stream is a function of the position,
 * so that nothing misplaced can pass; its hash is printed by both ends besides.
 *
 * The longest time without a new byte is told as well, and when the transfer breaks, how both ends stood.
 *
 * hostile MEGABYTES [LOSS REORDER DUPLICATE CORRUPT [SEED]]: chances in parts per million, of each frame; by default 5 %,
 * 5 %, 1 % and 0.1 %. Prints one JSON object; a line of progress a gigabyte on standard error.
 */
#include <stdbool.h>

#include "simhost.h"

enum { CHUNK = 1 << 18 };

struct end {
    uint64_t at, hash; /* bytes so far */
};

static inline uint64_t word(uint64_t i) /* splitmix64: Steele, Lea, Flood 2014 */
{
    uint64_t z = (i + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

/* The n bytes of the stream from `at`. */
static void stream(uint64_t at, uint8_t *buf, size_t n)
{
    for (size_t i = 0; i < n;) {
        uint64_t w = word((at + i) / 8);
        size_t off = (at + i) % 8, take = 8 - off < n - i ? 8 - off : n - i;
        memcpy(buf + i, (uint8_t *)&w + off, take);
        i += take;
    }
}

static inline uint64_t max(uint64_t a, uint64_t b) { return a > b ? a : b; }

static void took(struct end *e, const uint8_t *buf, size_t n)
{
    for (size_t i = 0; i < n; i++) /* FNV-1a */
        e->hash = (e->hash ^ buf[i]) * 0x100000001b3ull;
    e->at += n;
}

static void tell(const char *who, struct host *h)
{
    struct bypass_tcp_info i = {0};
    (void)bypass_tcp_info(&h->stack, h->sock, &i);
    fprintf(stderr,
            "%s: state %u una %u nxt %u rcv_nxt %u snd_wnd %u rcv_wnd %u cwnd %u ssthresh %u mss %u queued %u/%u "
            "rto %u us ca %u timeouts %u probes %u backoff %u unacked %u sacked %u lost %u retrans %u notsent %u\n",
            who, i.state, i.snd_una, i.snd_nxt, i.rcv_nxt, i.snd_wnd, i.rcv_wnd, i.cwnd, i.ssthresh, i.snd_mss,
            i.snd_queued, i.rcv_queued, i.rto_us, i.ca_state, i.timeouts, i.probes, i.backoff, i.unacked, i.sacked,
            i.lost, i.retrans, i.notsent);
    for (int n = 0; n < bypass_stat_count(); n++)
        if (bypass_stats(&h->stack)[n])
            fprintf(stderr, " %s %llu", bypass_stat_name(n), (unsigned long long)bypass_stats(&h->stack)[n]);
    fprintf(stderr, "\n");
}

static bool send_some(struct host *from, struct end *e, uint64_t total)
{
    static uint8_t buf[CHUNK];
    while (e->at < total) {
        size_t n = total - e->at < CHUNK ? (size_t)(total - e->at) : CHUNK;
        stream(e->at, buf, n);
        int64_t sent = bypass_send(&from->stack, from->sock, buf, n, 0);
        if (sent == -EAGAIN)
            return true;
        if (sent < 0) {
            fprintf(stderr, "hostile: send: %s at byte %llu\n", strerror((int)-sent), (unsigned long long)e->at);
            return false;
        }
        took(e, buf, (size_t)sent);
    }
    return true;
}

static void receive_some(struct host *to, struct end *e)
{
    static uint8_t buf[CHUNK], expected[CHUNK];
    int64_t n;
    while ((n = bypass_recv(&to->stack, to->sock, buf, sizeof buf, 0)) > 0) {
        stream(e->at, expected, (size_t)n);
        if (memcmp(buf, expected, (size_t)n) != 0) {
            fprintf(stderr, "hostile: wrong bytes within %lld of byte %llu\n", (long long)n, (unsigned long long)e->at);
            exit(1);
        }
        if ((e->at + (uint64_t)n) / 1000000000 != e->at / 1000000000)
            fprintf(stderr, "hostile: %llu GB\n", (unsigned long long)((e->at + (uint64_t)n) / 1000000000));
        took(e, buf, (size_t)n);
    }
    if (n != -EAGAIN)
        die("recv", n == 0 ? -EPIPE : n);
}

static void nothing_left(struct sim *sim, struct host *h, const char *who)
{
    struct bypass_audit a;
    struct sim_event ev[16];
    struct sim_result res;
    uint64_t until = sim_now(sim) + 300ull * 1000000000;
    (void)bypass_close(&h->stack, h->sock);
    while (sim_run(sim, until, ev, 16, &res) >= 0 && sim_now(sim) < until && res.reason != SIM_IDLE) {}
    bypass_audit(&h->stack, &a);
    if (a.conns || a.flights || a.timers || a.chunks || a.frames)
        die(who, -EBUSY);
}

int main(int argc, char **argv)
{
    uint64_t total = (argc > 1 ? (uint64_t)atoll(argv[1]) : 1000) * 1000000;
    uint32_t ppm[4] = {50000, 50000, 10000, 1000};
    for (int i = 0; i < 4 && i + 2 < argc; i++)
        ppm[i] = (uint32_t)atoi(argv[i + 2]);
    const struct sim_faults faults = {.loss_ppm = ppm[0],
                                      .reorder_ppm = ppm[1],
                                      .duplicate_ppm = ppm[2],
                                      .corrupt_ppm = ppm[3],
                                      .reorder_ns = 2000000,
                                      .delay_ns = 100000};
    struct host server = {0}, client = {0};
    struct end out = {.hash = 0xcbf29ce484222325ull}, in = out;
    struct bypass_tcp_info info;
    struct sim_port_stats stats;
    struct sim *sim = sim_create(argc > 6 ? (uint64_t)atoll(argv[6]) : 1, 1000000000);
    struct sim_wire *wire = sim ? sim_wire_create(sim, SIM_WIRE_SWITCH) : NULL;
    if (!wire)
        die("memory", -ENOMEM);
    host_open(&server, sim, wire, 1, &faults);
    host_open(&client, sim, wire, 2, &faults);
    connect_both(sim, &server, &client);
    uint64_t began_ns = sim_now(sim), moved_ns = began_ns, stall_ns = 0, cpu = cpu_ns();
    for (uint64_t at = 0; in.at < total; stall_ns = max(stall_ns, sim_now(sim) - moved_ns)) {
        if (!send_some(&client, &out, total)) {
            tell("sender", &client);
            tell("receiver", &server);
            exit(1);
        }
        receive_some(&server, &in);
        moved_ns = in.at > at ? sim_now(sim) : moved_ns;
        at = in.at;
        if (in.at < total)
            step(sim);
    }
    cpu = cpu_ns() - cpu;
    double virtual_s = (double)(sim_now(sim) - began_ns) / 1e9;
    (void)bypass_tcp_info(&client.stack, client.sock, &info);
    sim_port_stats(client.dev, &stats);
    nothing_left(sim, &client, "client: something is left");
    nothing_left(sim, &server, "server: something is left");
    printf("{\"bytes\": %llu, \"sent_hash\": \"%016llx\", \"received_hash\": \"%016llx\", \"cpu_s\": %.1f, "
           "\"virtual_s\": %.1f, \"longest_stall_s\": %.2f, \"frames\": %llu, \"lost\": %llu, \"reordered\": %llu, "
           "\"duplicated\": %llu, "
           "\"corrupted\": %llu, \"retransmits\": %u}\n",
           (unsigned long long)in.at, (unsigned long long)out.hash, (unsigned long long)in.hash, (double)cpu / 1e9,
           virtual_s, (double)stall_ns / 1e9, (unsigned long long)stats.tx_frames, (unsigned long long)stats.lost,
           (unsigned long long)stats.reordered, (unsigned long long)stats.duplicated,
           (unsigned long long)stats.corrupted, info.retransmits);
    host_close(&client);
    host_close(&server);
    sim_destroy(sim);
    return out.hash == in.hash ? 0 : 1;
}
