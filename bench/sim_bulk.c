/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sim_bulk.c - one bulk transfer over the simulated wire, sender, wire and receiver on one core: how fast the stack
 * itself moves bytes (MSS 1448: 1500-byte packets with timestamps). The wire copies each frame, as veth does.
 *
 * sim_bulk MEGABYTES DELAY_US: prints one JSON object: bytes, CPU nanoseconds of the process during the transfer,
 * segments, virtual nanoseconds, mss.
 */
#include "simhost.h"

enum { CHUNK = 65536 };

/* Copies in and copies out are the program's, counted too. */
static void transfer(struct sim *sim, struct host *from, struct host *to, uint64_t total)
{
    static uint8_t out[CHUNK], in[CHUNK];
    uint64_t sent = 0, received = 0;
    for (size_t i = 0; i < sizeof out; i++)
        out[i] = (uint8_t)(i * 7 + (i >> 8));
    for (;;) {
        int64_t n;
        while (sent < total) {
            size_t off = sent % CHUNK, most = total - sent < CHUNK - off ? (size_t)(total - sent) : CHUNK - off;
            n = bypass_send(&from->stack, from->sock, out + off, most, 0);
            if (n == -EAGAIN)
                break;
            if (n < 0)
                die("send", n);
            sent += (uint64_t)n;
        }
        while ((n = bypass_recv(&to->stack, to->sock, in, sizeof in, 0)) > 0) {
            if (in[0] != out[received % CHUNK])
                die("received bytes differ", -EIO);
            received += (uint64_t)n;
        }
        if (n != -EAGAIN)
            die("recv", n == 0 ? -EPIPE : n);
        if (received == total)
            return;
        step(sim);
    }
}

int main(int argc, char **argv)
{
    uint64_t bytes = (argc > 1 ? (uint64_t)atoll(argv[1]) : 1000) * 1000000;
    const struct sim_faults faults = {.delay_ns = (argc > 2 ? (uint64_t)atoll(argv[2]) : 10) * 1000};
    struct host server = {0}, client = {0};
    struct bypass_tcp_info info;
    struct sim_port_stats wire_stats;
    struct sim *sim = sim_create(1, 1000000000);
    struct sim_wire *wire = sim ? sim_wire_create(sim, SIM_WIRE_SWITCH) : NULL;
    if (!wire)
        die("memory", -ENOMEM);
    host_open(&server, sim, wire, 1, &faults);
    host_open(&client, sim, wire, 2, &faults);
    connect_both(sim, &server, &client);
    uint64_t began_ns = sim_now(sim), cpu = cpu_ns();
    transfer(sim, &client, &server, bytes);
    cpu = cpu_ns() - cpu;
    (void)bypass_tcp_info(&client.stack, client.sock, &info);
    sim_port_stats(client.dev, &wire_stats);
    printf("{\"bytes\": %llu, \"cpu_ns\": %llu, \"virtual_ns\": %llu, \"mss\": %u, \"frames\": %llu, "
           "\"retransmits\": %u}\n",
           (unsigned long long)bytes, (unsigned long long)cpu, (unsigned long long)(sim_now(sim) - began_ns),
           info.snd_mss, (unsigned long long)wire_stats.tx_frames, info.retransmits);
    host_close(&client);
    host_close(&server);
    sim_destroy(sim);
    return 0;
}
