/* SPDX-License-Identifier: Apache-2.0 */
/*
 * client.c - the benchmark's client: kernel sockets and epoll, the same against every server.
 *
 *   client udp|tcp|up|down ADDRESS PARALLEL SIZE WARMUP_MS MEASURE_MS PIDS
 *
 *   udp    datagrams of SIZE bytes to the echo port, PARALLEL in flight on one socket
 *   tcp    PARALLEL connections to the echo port, one request of SIZE bytes in flight on each
 *   up     one connection to the discard port, written as fast as it takes
 *   down   one connection to the character generator port, read as fast as it gives
 *
 * PIDS are the other tasks whose CPU time counts (server, ksoftirqd). Prints one JSON object (measure.h):
 * operations (bytes for bulk) and CPU between the two ends of the measured time.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include "measure.h"
#include "ports.h"

enum { MAX_PARALLEL = 1024, MAX_SIZE = 1472, BULK = 262144, LOST_NS = 20000000 };
#define PATIENCE_NS 10000000000ull

struct flow {
    int fd;
    int got;          /* bytes of the answer that came so far */
    uint64_t sent_ns; /* 0: nothing in flight */
    uint32_t seq;
};

struct run {
    int epoll, parallel, size;
    uint64_t begin_ns, end_ns; /* of the measured time */
    bool measuring;
    uint64_t ops, bytes, lost;
    struct histogram *h;
    const char *pids;
    struct cpu_sample from, to;
};

static struct flow flows[MAX_PARALLEL];
static uint8_t buf[BULK];

static void die(const char *what)
{
    fprintf(stderr, "client: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int open_socket(const char *address, int type, int port)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    int one = 1, fd = socket(AF_INET, type | SOCK_CLOEXEC, 0);
    if (inet_pton(AF_INET, address, &a.sin_addr) != 1) {
        errno = EINVAL;
        die(address);
    }
    if (fd < 0 || connect(fd, (struct sockaddr *)&a, sizeof a) < 0)
        die("connect");
    if (type == SOCK_STREAM)
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (fcntl(fd, F_SETFL, O_NONBLOCK) < 0)
        die("fcntl");
    return fd;
}

static void watch(const struct run *r, int fd, uint32_t events, uint32_t index)
{
    struct epoll_event ev = {.events = events, .data.u32 = index};
    if (epoll_ctl(r->epoll, EPOLL_CTL_ADD, fd, &ev) < 0)
        die("epoll");
}

/* False: the measured time is over. */
static bool on_time(struct run *r, uint64_t now)
{
    if (!r->measuring && now >= r->begin_ns) {
        r->measuring = true;
        r->from = cpu_sample(r->pids);
        r->end_ns += clock_ns() - r->begin_ns;
        r->begin_ns = clock_ns();
    }
    if (r->measuring && r->ops == 0 && r->bytes == 0)
        return now < r->end_ns + PATIENCE_NS; /* on a busy machine: at least one answer */
    return now < r->end_ns;
}

static void count(struct run *r, uint64_t sent_ns, uint64_t now, uint64_t bytes)
{
    if (!r->measuring)
        return;
    r->ops++;
    r->bytes += bytes;
    if (sent_ns >= r->begin_ns)
        histogram_add(r->h, now - sent_ns);
}

/* ---- UDP: every datagram carries the number of its slot and of its turn ------------------------------------ */
static void udp_ask(struct run *r, int fd, uint32_t slot)
{
    uint32_t id[2] = {slot, ++flows[slot].seq};
    memcpy(buf, id, sizeof id);
    flows[slot].sent_ns = clock_ns();
    if (send(fd, buf, (size_t)r->size, 0) < 0 && errno != EAGAIN && errno != ENOBUFS && errno != ECONNREFUSED)
        die("send");
}

static void udp_take(struct run *r, int fd)
{
    uint32_t id[2];
    uint8_t answer[MAX_SIZE];
    ssize_t n;
    while ((n = recv(fd, answer, sizeof answer, 0)) > 0) {
        memcpy(id, answer, sizeof id);
        if (n != r->size || id[0] >= (uint32_t)r->parallel || flows[id[0]].seq != id[1])
            continue; /* an answer that was given up */
        count(r, flows[id[0]].sent_ns, clock_ns(), 0);
        udp_ask(r, fd, id[0]);
    }
    if (n < 0 && errno != EAGAIN && errno != ECONNREFUSED)
        die("recv");
}

static void run_udp(struct run *r, const char *address)
{
    int fd = open_socket(address, SOCK_DGRAM, PORT_ECHO);
    struct epoll_event ev;
    uint64_t now = clock_ns(), checked = now;
    watch(r, fd, EPOLLIN, 0);
    for (int i = 0; i < r->parallel; i++)
        udp_ask(r, fd, (uint32_t)i);
    for (; on_time(r, now); now = clock_ns()) {
        if (epoll_wait(r->epoll, &ev, 1, 10) > 0)
            udp_take(r, fd);
        if (now - checked < LOST_NS)
            continue;
        checked = now;
        for (int i = 0; i < r->parallel; i++) {
            if (now - flows[i].sent_ns > LOST_NS && now > flows[i].sent_ns) {
                r->lost += r->measuring;
                udp_ask(r, fd, (uint32_t)i);
            }
        }
    }
}

/* ---- TCP request and response ------------------------------------------------------------------------------- */
static void tcp_ask(const struct run *r, struct flow *f)
{
    f->got = 0;
    f->sent_ns = clock_ns();
    if (send(f->fd, buf, (size_t)r->size, MSG_NOSIGNAL) != r->size)
        die("send");
}

static void tcp_take(struct run *r, struct flow *f)
{
    uint8_t answer[MAX_SIZE];
    ssize_t n = recv(f->fd, answer, (size_t)(r->size - f->got), 0);
    if (n == 0)
        errno = ECONNRESET;
    if (n == 0 || (n < 0 && errno != EAGAIN))
        die("recv");
    if (n < 0)
        return;
    f->got += (int)n;
    if (f->got == r->size) {
        count(r, f->sent_ns, clock_ns(), 0);
        tcp_ask(r, f);
    }
}

static void run_tcp(struct run *r, const char *address)
{
    struct epoll_event ev[64];
    for (int i = 0; i < r->parallel; i++) {
        flows[i].fd = open_socket(address, SOCK_STREAM, PORT_ECHO);
        watch(r, flows[i].fd, EPOLLIN, (uint32_t)i);
    }
    for (int i = 0; i < r->parallel; i++)
        tcp_ask(r, &flows[i]);
    while (on_time(r, clock_ns())) {
        int n = epoll_wait(r->epoll, ev, 64, 10);
        for (int i = 0; i < n; i++)
            tcp_take(r, &flows[ev[i].data.u32]);
    }
}

/* ---- Bulk ----------------------------------------------------------------------------------------------------- */
static void run_bulk(struct run *r, const char *address, bool up)
{
    int fd = open_socket(address, SOCK_STREAM, up ? PORT_DISCARD : PORT_CHARGEN);
    struct epoll_event ev;
    watch(r, fd, up ? EPOLLOUT : EPOLLIN, 0);
    while (on_time(r, clock_ns())) {
        if (epoll_wait(r->epoll, &ev, 1, 10) <= 0)
            continue;
        ssize_t n = up ? send(fd, buf, sizeof buf, MSG_NOSIGNAL) : recv(fd, buf, sizeof buf, 0);
        if (n == 0)
            errno = ECONNRESET;
        if (n == 0 || (n < 0 && errno != EAGAIN))
            die(up ? "send" : "recv");
        if (n > 0 && r->measuring)
            r->bytes += (uint64_t)n;
    }
    /* SO_LINGER 0: what is queued does not disturb the next run */
    struct linger now = {.l_onoff = 1};
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    close(fd);
}

int main(int argc, char **argv)
{
    static struct histogram h;
    char extra[64];
    if (argc != 8) {
        fprintf(stderr, "usage: client udp|tcp|up|down ADDRESS PARALLEL SIZE WARMUP_MS MEASURE_MS PIDS\n");
        return 2;
    }
    struct run r = {.parallel = atoi(argv[3]), .size = atoi(argv[4]), .h = &h, .pids = argv[7]};
    if (r.parallel < 1 || r.parallel > MAX_PARALLEL || r.size < 8 || r.size > MAX_SIZE) {
        fprintf(stderr, "client: 1 to %d in parallel, 8 to %d bytes\n", MAX_PARALLEL, MAX_SIZE);
        return 2;
    }
    r.epoll = epoll_create1(EPOLL_CLOEXEC);
    r.begin_ns = clock_ns() + (uint64_t)atoi(argv[5]) * 1000000;
    r.end_ns = r.begin_ns + (uint64_t)atoi(argv[6]) * 1000000;
    bool bulk = strcmp(argv[1], "up") == 0 || strcmp(argv[1], "down") == 0;
    if (bulk)
        run_bulk(&r, argv[2], argv[1][0] == 'u');
    else if (strcmp(argv[1], "udp") == 0)
        run_udp(&r, argv[2]);
    else
        run_tcp(&r, argv[2]);
    uint64_t ns = clock_ns() - r.begin_ns;
    r.to = cpu_sample(r.pids);
    snprintf(extra, sizeof extra, ", \"lost\": %llu", (unsigned long long)r.lost);
    print_result(extra, r.ops, r.bytes, ns, &r.from, &r.to, bulk ? NULL : &h);
    return 0;
}
