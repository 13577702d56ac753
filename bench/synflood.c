/* SPDX-License-Identifier: Apache-2.0 */
/*
 * synflood.c - a server under a flood of SYNs from forged addresses: what does it cost those who are there, and does
 * anybody new get in? Under callgrind, which counts the server's stack alone; what the requests cost is the difference of
 * a run with and one without them.
 *
 * synflood ROUNDS SYNS REQUESTS NEWCOMERS: in each round (10 ms of virtual time) SYNS forged ones arrive, and, with
 * REQUESTS 1, a request of 64 bytes in the middle of them on one of CONNS connections, which is answered. NEWCOMERS times
 * in all a new client connects in the midst of it, asks and leaves. Prints one JSON object.
 */
#include <valgrind/callgrind.h>

#include "memhost.h"

enum { SIZE = 64, CONNS = 64, PORT = 7, SYN_LEN = 14 + 20 + 40, MOST = 10000 };

static struct host server, client;
static bypass_sock listener, asking[CONNS];
static uint64_t flood_seed = 99;

static uint32_t sum16(const uint8_t *p, size_t n, uint32_t sum)
{
    for (size_t i = 0; i + 1 < n; i += 2)
        sum += (uint32_t)(p[i] << 8 | p[i + 1]);
    return sum;
}

static void put_checksum(uint8_t *at, uint32_t sum)
{
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    at[0] = (uint8_t)(~sum >> 8);
    at[1] = (uint8_t)~sum;
}

/* A SYN as clients send it (MSS, SACK, timestamps, window scale), from anywhere in 198.18.0.0/15. */
static void forge(uint8_t *f)
{
    static const uint8_t like[SYN_LEN] = {
        2,    0, 0,    0,    0, 1, 2,    0,    0,  0, 0, 2,   8,   0,          /* Ethernet */
        0x45, 0, 0,    60,   0, 0, 0x40, 0,    64, 6, 0, 0,   198, 18, 0, 0,   /* IPv4 */
        10,   0, 0,    1,    0, 0, 0,    PORT, 0,  0, 0, 0,   0,   0,  0, 0,   /* TCP */
        0xa0, 2, 0xff, 0xff, 0, 0, 0,    0,    2,  4, 5, 180, 4,   2,  8, 10}; /* options */
    uint8_t *ip = f + 14, *tcp = ip + 20;
    uint64_t r = next_random(&flood_seed), q = next_random(&flood_seed);
    memcpy(f, like, SYN_LEN);
    ip[13] = (uint8_t)(18 + (r >> 40 & 1));
    memcpy(ip + 14, &r, 2);
    memcpy(tcp, &q, 2);
    memcpy(tcp + 4, (uint8_t *)&q + 2, 3);
    memcpy(tcp + 28, (uint8_t *)&r + 2, 3);
    memcpy(tcp + 36, (const uint8_t[]){1, 3, 3, 7}, 4);
    put_checksum(ip + 10, sum16(ip, 20, 0));
    put_checksum(tcp + 16, sum16(tcp, 40, sum16(ip + 12, 8, 6 + 40)));
}

static void flood(int syns)
{
    struct memport *m = &server.port;
    for (int i = 0; i < syns; i++) {
        bypass_pkt p;
        if (memport_alloc(&m->dev, &p, 1) != 1)
            die("flood", -ENOBUFS);
        struct bypass_pkt_meta *meta = memport_meta(m, p);
        meta->holders = BYPASS_HOLD_RX;
        meta->len = SYN_LEN;
        meta->queue = 0;
        meta->flags = 0;
        forge(m->dev.mem + (size_t)p * MEMPORT_STRIDE + meta->off);
        m->rx[m->rx_tail++ & MEMPORT_MASK] = p;
    }
}

/* The measured part: all of the server's. Requests that it answered. */
static int serve(void)
{
    struct bypass_event ev[BATCH];
    uint8_t buf[SIZE];
    int done = 0, n;
    CALLGRIND_TOGGLE_COLLECT;
    while (bypass_poll(&server.stack, now_ns, BATCH) == BATCH) {}
    while ((n = bypass_events(&server.stack, ev, BATCH)) > 0) {
        for (int i = 0; i < n; i++) {
            int64_t got = ev[i].sock == listener ? 0 : bypass_recv(&server.stack, ev[i].sock, buf, sizeof buf, 0);
            if (got > 0 && bypass_send(&server.stack, ev[i].sock, buf, (size_t)got, 0) == got)
                done++;
        }
    }
    (void)bypass_flush(&server.stack);
    CALLGRIND_TOGGLE_COLLECT;
    return done;
}

/* A connection, established at both ends. The server's end: as accept() gave it. */
static bypass_sock join(bypass_sock *server_end)
{
    bypass_sock k = connect_to(&client, PORT);
    flood(flood_seed != 99); /* into a queue that is full, once there is a flood */
    settle(&server, &client);
    *server_end = bypass_accept(&server.stack, listener);
    if (*server_end < 0)
        die("accept", *server_end);
    return k;
}

/* Connects, asks, is answered, leaves. */
static void newcomer(void)
{
    uint8_t request[SIZE] = {1}, buf[SIZE];
    bypass_sock end, k = join(&end);
    if (bypass_send(&client.stack, k, request, SIZE, 0) != SIZE)
        die("newcomer", -EIO);
    settle(&server, &client);
    int64_t n = bypass_recv(&server.stack, end, buf, SIZE, 0);
    if (n != SIZE || bypass_send(&server.stack, end, buf, SIZE, 0) != SIZE)
        die("newcomer's request", n < 0 ? n : -EIO);
    settle(&server, &client);
    n = bypass_recv(&client.stack, k, buf, SIZE, 0);
    if (n != SIZE || memcmp(buf, request, SIZE) != 0)
        die("newcomer's answer", n < 0 ? n : -EIO);
    (void)bypass_abort(&client.stack, k);
    settle(&server, &client);
    (void)bypass_close(&server.stack, end);
}

static void ask(int round)
{
    uint8_t request[SIZE];
    memset(request, round, sizeof request);
    int64_t n = bypass_send(&client.stack, asking[round % CONNS], request, SIZE, 0);
    if (n != SIZE)
        die("request", n < 0 ? n : -EIO);
    (void)bypass_flush(&client.stack);
    (void)memport_carry(&client.port, &server.port);
}

static void answered(int round)
{
    uint8_t buf[SIZE];
    int64_t n = bypass_recv(&client.stack, asking[round % CONNS], buf, sizeof buf, 0);
    if (n != SIZE || buf[0] != (uint8_t)round)
        die("response", n < 0 ? n : -EIO);
}

static void open_all(void)
{
    host_open(&server, 1, MOST, false);
    host_open(&client, 2, MOST, false);
    struct bypass_endpoint gateway = endpoint(2, 0);
    (void)bypass_gateway_set(&server.stack, &gateway.addr);
    listener = listen_on(&server, PORT, 1024);
    for (int i = 0; i < CONNS; i++) {
        bypass_sock end;
        asking[i] = join(&end);
    }
}

int main(int argc, char **argv)
{
    if (argc != 5)
        die("usage: synflood ROUNDS SYNS REQUESTS NEWCOMERS", -EINVAL);
    int rounds = atoi(argv[1]), syns = atoi(argv[2]), requests = atoi(argv[3]), newcomers = atoi(argv[4]);
    int done = 0, joined = 0;
    static const int tenths[3] = {1, 5, 10};
    uint64_t memory[3] = {0};
    if (rounds < 10 || rounds % 10 != 0 || syns < 0 || syns > 2000 || newcomers > rounds)
        die("out of range; ROUNDS is a multiple of 10", -EINVAL);
    open_all();
    for (int round = 0; round < rounds; round++) {
        now_ns += 10000000;
        flood(syns / 2);
        if (requests)
            ask(round);
        flood(syns - syns / 2);
        done += serve();
        (void)memport_carry(&server.port, &client.port);
        (void)bypass_poll(&client.stack, now_ns, MEMPORT_FRAMES);
        (void)memport_carry(&client.port, &server.port); /* next hops, and ACKs for next time */
        if (requests)
            answered(round);
        if (newcomers > 0 && round % (rounds / newcomers) == 0) {
            newcomer();
            joined++;
        }
        for (int i = 0; i < 3; i++)
            if (round + 1 == rounds / 10 * tenths[i])
                memory[i] = resident_bytes(&server);
    }
    printf("{\"requests\": %d, \"syns\": %llu, \"newcomers\": %d, \"cookies\": %llu, \"resident\": [%llu, %llu, %llu], "
           "\"process\": %llu}\n",
           done, (unsigned long long)rounds * (unsigned)syns, joined,
           (unsigned long long)stat_of(&server.stack, "tcp_cookies_sent"), (unsigned long long)memory[0],
           (unsigned long long)memory[1], (unsigned long long)memory[2], (unsigned long long)process_bytes());
    host_close(&client);
    host_close(&server);
    return 0;
}
