/* SPDX-License-Identifier: Apache-2.0 */
/*
 * load.c - one request over and over, at a given rate or as fast as answers come: kernel sockets and epoll.
 *
 *   load ADDRESS PORT PARALLEL RATE WARMUP_MS MEASURE_MS PIDS ANSWER_BYTES < REQUEST
 *
 * PARALLEL connections, at most one request in flight on each; every answer has ANSWER_BYTES and begins as the first
 * one did. RATE 0: the next request follows the answer. Else a request is due every 1/RATE seconds whatever the server
 * does: one that finds no idle connection waits for it, and the wait is part of its latency, which counts from when it
 * was due. (Otherwise a server that stalls would not be asked while it does, and look good.)
 *
 * It measures for MEASURE_MS, and until the first answer in that time: on a busy machine a short time may have none.
 *
 * PIDS: as in measure.h, the tasks of the server. Prints what measure.h does, and `client_cpu_s`, this program's share
 * of `task_cpu_s`; `due`, the requests that were due in the measured time.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>

#include "measure.h"

enum { MAX_PARALLEL = 1024, MAX_REQUEST = 4096, MAX_ANSWER = 1 << 20, SAME = 8 };
#define PATIENCE_NS 10000000000ull

struct flow {
    int fd;
    int got;         /* bytes of the answer that came so far */
    uint64_t due_ns; /* of the request in flight */
};

struct run {
    int epoll, parallel, answer;
    size_t size; /* of the request */
    uint64_t step_ns, next_ns;
    uint64_t begin_ns, end_ns, due;
    bool measuring;
    uint64_t ops, bytes, last_ns;
    const char *pids;
    struct cpu_sample from, to;
    uint64_t own_from, own_to;
    int idle_count;
    struct flow *idle[MAX_PARALLEL];
};

static struct flow flows[MAX_PARALLEL];
static char request[MAX_REQUEST];
static char first[SAME];
static bool have_first;
static struct histogram histogram;

static void die(const char *what)
{
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void open_flow(struct run *r, struct flow *f, const char *address, int port)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    struct epoll_event ev = {.events = EPOLLIN, .data.ptr = f};
    int one = 1;
    f->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (f->fd < 0 || inet_pton(AF_INET, address, &a.sin_addr) != 1 ||
        connect(f->fd, (struct sockaddr *)&a, sizeof a) < 0)
        die("connect");
    setsockopt(f->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (fcntl(f->fd, F_SETFL, O_NONBLOCK) < 0 || epoll_ctl(r->epoll, EPOLL_CTL_ADD, f->fd, &ev) < 0)
        die("epoll");
    r->idle[r->idle_count++] = f;
}

/* Sends what is due; with RATE 0 everything always is. */
static void ask(struct run *r, uint64_t now)
{
    while (r->idle_count > 0 && (r->step_ns == 0 || r->next_ns <= now)) {
        struct flow *f = r->idle[--r->idle_count];
        f->got = 0;
        f->due_ns = r->step_ns ? r->next_ns : now;
        r->next_ns += r->step_ns;
        if (send(f->fd, request, r->size, MSG_NOSIGNAL) != (ssize_t)r->size)
            die("send");
    }
}

static void done(struct run *r, struct flow *f)
{
    uint64_t now = clock_ns();
    r->last_ns = now;
    r->idle[r->idle_count++] = f;
    if (!r->measuring)
        return;
    r->ops++;
    r->bytes += (uint64_t)r->answer;
    histogram_add(&histogram, now - f->due_ns);
}

static void check(const struct flow *f, const char *buf, ssize_t n)
{
    size_t most = (size_t)n < SAME ? (size_t)n : SAME;
    if (f->got > 0)
        return;
    if (!have_first)
        memcpy(first, buf, most);
    have_first = true;
    if (memcmp(first, buf, most) != 0) {
        fprintf(stderr, "load: an answer begins with %.*s\n", (int)most, buf);
        exit(1);
    }
}

static void take(struct run *r, struct flow *f)
{
    static char buf[MAX_ANSWER];
    ssize_t n = recv(f->fd, buf, sizeof buf, 0);
    if (n == 0)
        errno = ECONNRESET;
    if (n == 0 || (n < 0 && errno != EAGAIN))
        die("recv");
    if (n < 0)
        return;
    check(f, buf, n);
    f->got += (int)n;
    if (f->got > r->answer) {
        fprintf(stderr, "load: an answer of more than %d bytes\n", r->answer);
        exit(1);
    }
    if (f->got == r->answer)
        done(r, f);
}

static void begin(struct run *r, uint64_t now)
{
    r->measuring = true;
    r->end_ns += now - r->begin_ns;
    r->own_from = task_run_ns("self");
    r->from = cpu_sample(r->pids);
    r->begin_ns = clock_ns();
}

/* How long to sleep when no answer comes: until the next request is due. (It does not spin: the kernel thread that
 * receives for it needs this core.) */
static struct timespec patience(const struct run *r, uint64_t now)
{
    struct timespec t = {.tv_nsec = 10000000};
    if (r->step_ns && r->idle_count > 0)
        t.tv_nsec = r->next_ns <= now ? 0 : (long)(r->next_ns - now < 10000000 ? r->next_ns - now : 10000000);
    return t;
}

static void turn(struct run *r)
{
    struct epoll_event ev[64];
    uint64_t now = r->last_ns = clock_ns();
    r->next_ns = now;
    for (;; now = clock_ns()) {
        if (!r->measuring && now >= r->begin_ns)
            begin(r, now);
        if (r->measuring && now >= r->end_ns && r->ops > 0) /* without an answer there is nothing to tell yet */
            return;
        if (now - r->last_ns > PATIENCE_NS) {
            errno = ETIMEDOUT;
            die("no answer for 10 s");
        }
        ask(r, now);
        struct timespec t = patience(r, now);
        int n = epoll_pwait2(r->epoll, ev, 64, &t, NULL);
        for (int i = 0; i < n; i++)
            take(r, ev[i].data.ptr);
    }
}

static void setup(struct run *r, char **argv)
{
    int rate = atoi(argv[4]);
    r->parallel = atoi(argv[3]);
    r->answer = atoi(argv[8]);
    r->size = fread(request, 1, sizeof request, stdin);
    if (r->parallel < 1 || r->parallel > MAX_PARALLEL || r->size == 0 || r->answer < 1 || r->answer > MAX_ANSWER) {
        fprintf(stderr, "load: 1 to %d in parallel, a request on standard input, an answer of 1 to %d bytes\n",
                MAX_PARALLEL, MAX_ANSWER);
        exit(2);
    }
    r->step_ns = rate > 0 ? 1000000000ull / (uint64_t)rate : 0;
    r->pids = argv[7];
    r->epoll = epoll_create1(EPOLL_CLOEXEC);
    for (int i = 0; i < r->parallel; i++)
        open_flow(r, &flows[i], argv[1], atoi(argv[2]));
}

int main(int argc, char **argv)
{
    static struct run r;
    char extra[128];
    if (argc != 9) {
        fprintf(stderr, "usage: load ADDRESS PORT PARALLEL RATE WARMUP_MS MEASURE_MS PIDS ANSWER_BYTES < REQUEST\n");
        return 2;
    }
    setup(&r, argv);
    prctl(PR_SET_TIMERSLACK, 1); /* 50 us otherwise, prctl(2) */
    r.begin_ns = clock_ns() + (uint64_t)atoi(argv[5]) * 1000000;
    r.end_ns = r.begin_ns + (uint64_t)atoi(argv[6]) * 1000000;
    turn(&r);
    uint64_t ns = clock_ns() - r.begin_ns;
    r.to = cpu_sample(r.pids);
    r.own_to = task_run_ns("self");
    r.due = r.step_ns ? ns / r.step_ns : r.ops;
    snprintf(extra, sizeof extra, ", \"client_cpu_s\": %.6f, \"due\": %llu", (double)(r.own_to - r.own_from) / 1e9,
             (unsigned long long)r.due);
    print_result(extra, r.ops, r.bytes, ns, &r.from, &r.to, &histogram);
    return 0;
}
