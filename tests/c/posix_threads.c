/* SPDX-License-Identifier: Apache-2.0 */
/* Threads that call on the same descriptors at the same time. Frame: posix.h. */
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>

#include "posix.h"

enum { MEGABYTE = 1 << 20 };

static pthread_t start(void *(*run)(void *), void *arg)
{
    pthread_t t;
    CHECK(pthread_create(&t, NULL, run, arg) == 0);
    return t;
}

static void *finish(pthread_t t)
{
    void *result;
    CHECK(pthread_join(t, &result) == 0);
    return result;
}

static void *sends_bulk(void *arg)
{
    int fd = *(int *)arg;
    pattern_out(fd, 4 * MEGABYTE);
    MUST(shutdown(fd, SHUT_WR));
    return NULL;
}

static void *receives_bulk(void *arg) { return (void *)pattern_in(*(int *)arg); }

CASE(both_ways_at_once)
{
    int fds[2];
    pthread_t t[4];
    tcp_pair(fds);
    for (int i = 0; i < 2; i++) {
        t[2 * i] = start(sends_bulk, &fds[i]);
        t[2 * i + 1] = start(receives_bulk, &fds[i]);
    }
    for (int i = 0; i < 4; i++)
        EQ((size_t)finish(t[i]), i % 2 ? 4 * MEGABYTE : 0);
}

CASE(many_connections_many_threads)
{
    enum { PAIRS = 6 };
    int fds[PAIRS][2];
    pthread_t t[PAIRS][2];
    for (int i = 0; i < PAIRS; i++) {
        tcp_pair(fds[i]);
        t[i][0] = start(sends_bulk, &fds[i][0]);
        t[i][1] = start(receives_bulk, &fds[i][1]);
    }
    for (int i = 0; i < PAIRS; i++) {
        EQ((size_t)finish(t[i][0]), 0);
        EQ((size_t)finish(t[i][1]), 4 * MEGABYTE);
    }
}

/* ---- Sleepers that others wake ---- */
static void *recv_result(void *arg)
{
    char c;
    long n = recv(*(int *)arg, &c, 1, 0);
    return (void *)(intptr_t)(n == -1 ? -errno : n);
}

static void *accept_result(void *arg)
{
    long n = accept(*(int *)arg, NULL, NULL);
    return (void *)(intptr_t)(n == -1 ? -errno : n);
}

/* Every eventfd of the process is written, by system calls: as a bell of the library's that is rung late. */
static void ring_all(void)
{
    for (int fd = 0; fd < 4096; fd++) {
        char path[32], what[32] = "";
        uint64_t one = 1;
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        if (syscall(SYS_readlink, path, what, sizeof what - 1) > 0 && !strcmp(what, "anon_inode:[eventfd]"))
            CHECK(syscall(SYS_write, fd, &one, sizeof one) == sizeof one);
    }
}

static void *receives_one(void *arg)
{
    char byte;
    EQ(recv(*(int *)arg, &byte, 1, 0), 1);
    return NULL;
}

static int64_t cpu_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &ts);
    return ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

CASE(a_bell_that_rings_late_wakes_once)
{
    int fds[2];
    pthread_t t;
    int64_t before;
    tcp_pair(fds);
    t = start(receives_one, &fds[0]);
    usleep(50000);
    ring_all();
    before = cpu_ms();
    usleep(400000);
    CHECK(cpu_ms() - before < 200); /* who spins uses all of it */
    EQ(send(fds[1], "x", 1, 0), 1);
    finish(t);
}

CASE(shutdown_wakes_recv)
{
    int fds[2];
    tcp_pair(fds);
    pthread_t t = start(recv_result, &fds[0]);
    nap_ms(30);
    MUST(shutdown(fds[0], SHUT_RD));
    EQ((intptr_t)finish(t), 0);
}

/* Long after all that the connection had to do of its own accord. */
CASE(shutdown_wakes_recv_of_an_idle_connection)
{
    int fds[2];
    tcp_pair(fds);
    says(fds[1], "x");
    hears(fds[0], "x");
    pthread_t t = start(recv_result, &fds[0]);
    nap_ms(1500);
    MUST(shutdown(fds[0], SHUT_RD));
    EQ((intptr_t)finish(t), 0);
}

CASE(shutdown_wakes_accept)
{
    int l = listener(4);
    pthread_t t = start(accept_result, &l);
    nap_ms(30);
    MUST(shutdown(l, SHUT_RDWR));
    EQ((intptr_t)finish(t), -EINVAL);
}

static void *send_until_error(void *arg)
{
    static uint8_t block[65536];
    while (send(*(int *)arg, block, sizeof(block), MSG_NOSIGNAL) > 0)
        ;
    return (void *)(intptr_t)-errno;
}

CASE(shutdown_wakes_send)
{
    int fds[2];
    tcp_pair(fds);
    pthread_t t = start(send_until_error, &fds[0]);
    nap_ms(50);
    MUST(shutdown(fds[0], SHUT_WR));
    EQ((intptr_t)finish(t), -EPIPE);
}

CASE(close_does_not_wake_recv)
{
    int fds[2], kept;
    tcp_pair(fds);
    kept = fds[0];
    pthread_t t = start(recv_result, &kept);
    nap_ms(50);
    MUST(close(fds[0])); /* the sleeping call holds the connection: close(2), "Multithreaded processes and close()" */
    nap_ms(20);
    says(fds[1], "x");
    EQ((intptr_t)finish(t), 1);
    hears_end(fds[1]); /* the call was the last that held it */
}

static void *poll_result(void *arg)
{
    struct pollfd p = {*(int *)arg, POLLIN, 0};
    MUST(poll(&p, 1, -1));
    return (void *)(intptr_t)p.revents;
}

CASE(several_sleep_on_one)
{
    int fds[2];
    tcp_pair(fds);
    pthread_t t[3];
    for (int i = 0; i < 3; i++)
        t[i] = start(poll_result, &fds[1]);
    nap_ms(30);
    says(fds[0], "x");
    for (int i = 0; i < 3; i++)
        EQ((intptr_t)finish(t[i]), POLLIN);
}

CASE(a_reset_wakes_recv)
{
    int fds[2];
    struct linger hard = {.l_onoff = 1};
    tcp_pair(fds);
    pthread_t t = start(recv_result, &fds[0]);
    nap_ms(30);
    MUST(setsockopt(fds[1], SOL_SOCKET, SO_LINGER, &hard, sizeof(hard)));
    MUST(close(fds[1]));
    EQ((intptr_t)finish(t), -ECONNRESET);
}

static void reset_by(int fd)
{
    struct linger hard = {.l_onoff = 1};
    MUST(setsockopt(fd, SOL_SOCKET, SO_LINGER, &hard, sizeof(hard)));
    MUST(close(fd));
}

enum { MUCH = 32 << 20 };

/* More than all buffers hold. */
static void *send_much(void *arg)
{
    static const char much[MUCH];
    ssize_t n = send(*(int *)arg, much, sizeof(much), MSG_NOSIGNAL);
    return (void *)(n < 0 ? -(intptr_t)errno : (intptr_t)n);
}

CASE(a_reset_in_the_middle_of_send_is_the_next_calls_error)
{
    int fds[2];
    tcp_pair(fds);
    pthread_t t = start(send_much, &fds[0]);
    nap_ms(50);
    reset_by(fds[1]);
    intptr_t n = (intptr_t)finish(t);
    CHECK(n > 0 && n < MUCH);
    FAILS(ECONNRESET, send(fds[0], "x", 1, MSG_NOSIGNAL));
    FAILS(EPIPE, send(fds[0], "x", 1, MSG_NOSIGNAL));
}

static void *recv_whole(void *arg)
{
    char buf[100];
    ssize_t n = recv(*(int *)arg, buf, sizeof(buf), MSG_WAITALL);
    return (void *)(n < 0 ? -(intptr_t)errno : (intptr_t)n);
}

CASE(a_reset_in_the_middle_of_recv_is_the_next_calls_error)
{
    int fds[2];
    char c;
    tcp_pair(fds);
    pthread_t t = start(recv_whole, &fds[0]);
    says(fds[1], "part");
    nap_ms(50);
    reset_by(fds[1]);
    EQ((intptr_t)finish(t), 4);
    FAILS(ECONNRESET, recv(fds[0], &c, 1, 0));
    EQ(recv(fds[0], &c, 1, 0), 0);
}

struct echo {
    int in, done, polls;
};

/* Of each byte that comes it says so by an eventfd. */
static void *hears_bytes(void *arg)
{
    struct echo *e = arg;
    char c = 0;
    while (c != 'q') {
        struct pollfd p = {e->in, POLLIN, 0};
        if (e->polls)
            EQ(poll(&p, 1, -1), 1);
        EQ(recv(e->in, &c, 1, 0), 1);
        MUST(eventfd_write(e->done, 1));
    }
    return NULL;
}

/* The sleeper is woken each time, whether the byte comes before it sleeps, just then, or later. */
static void sleeps_often(int polls)
{
    int fds[2];
    tcp_pair(fds);
    set_option(fds[0], IPPROTO_TCP, TCP_NODELAY, 1); /* each byte leaves at once */
    struct echo e = {fds[1], (int)MUST(eventfd(0, 0)), polls};
    pthread_t t = start(hears_bytes, &e);
    for (int i = 0; i < 1500; i++) {
        struct timespec pause = {0, i % 50 * 20000};
        eventfd_t value;
        nanosleep(&pause, NULL);
        says(fds[0], i == 1499 ? "q" : "x");
        struct pollfd p = {e.done, POLLIN, 0};
        EQ(poll(&p, 1, 20000), 1); /* not lost: it would sleep for ever */
        MUST(eventfd_read(e.done, &value));
    }
    finish(t);
}

CASE(recv_is_woken_each_time) { sleeps_often(0); }

CASE(poll_is_woken_each_time) { sleeps_often(1); }

/* ---- Several threads read, accept, write ---- */
static void *reads_some(void *arg)
{
    int fd = *(int *)arg;
    uint8_t got[1000];
    size_t sum = 0;
    long n;
    while ((n = MUST(recv(fd, got, sizeof(got), 0))) > 0)
        for (long i = 0; i < n; i++)
            sum += got[i];
    return (void *)sum;
}

CASE(readers_share_a_stream)
{
    int fds[2];
    size_t want = 0, got = 0;
    tcp_pair(fds);
    pthread_t t[3];
    for (int i = 0; i < 3; i++)
        t[i] = start(reads_some, &fds[1]);
    pattern_out(fds[0], MEGABYTE);
    MUST(shutdown(fds[0], SHUT_WR));
    for (uint64_t i = 0; i < MEGABYTE; i++)
        want += pattern(i);
    for (int i = 0; i < 3; i++)
        got += (size_t)finish(t[i]);
    EQ(got, want);
}

static void *accepts_and_serves(void *arg)
{
    int l = *(int *)arg;
    size_t served = 0;
    for (;;) {
        int fd = accept(l, NULL, NULL);
        if (fd == -1) {
            EQ(errno, EINVAL);
            return (void *)served;
        }
        hears(fd, "ask");
        says(fd, "answer");
        MUST(close(fd));
        served++;
    }
}

static void *asks_often(void *arg)
{
    for (int i = 0; i < 25; i++) {
        int fd = connect_to(*(struct sockaddr_in *)arg);
        says(fd, "ask");
        hears(fd, "answer");
        hears_end(fd);
        MUST(close(fd));
    }
    return NULL;
}

CASE(a_pool_accepts)
{
    int l = listener(32);
    struct sockaddr_in a = name_of(l);
    pthread_t pool[4], clients[4];
    for (int i = 0; i < 4; i++) {
        pool[i] = start(accepts_and_serves, &l);
        clients[i] = start(asks_often, &a);
    }
    for (int i = 0; i < 4; i++)
        finish(clients[i]);
    MUST(shutdown(l, SHUT_RDWR));
    size_t served = 0;
    for (int i = 0; i < 4; i++)
        served += (size_t)finish(pool[i]);
    EQ(served, 100);
}

struct writer {
    int fd;
    char mark;
};

static void *writes_records(void *arg)
{
    struct writer *w = arg;
    char record[64];
    memset(record, w->mark, sizeof(record));
    for (int i = 0; i < 500; i++)
        EQ(send(w->fd, record, sizeof(record), 0), sizeof(record));
    return NULL;
}

CASE(records_of_writers_stay_whole)
{
    int fds[2], seen[256] = {0};
    tcp_pair(fds);
    struct writer w[3] = {{fds[0], 'a'}, {fds[0], 'b'}, {fds[0], 'c'}};
    pthread_t t[3];
    for (int i = 0; i < 3; i++)
        t[i] = start(writes_records, &w[i]);
    for (int i = 0; i < 1500; i++) {
        char got[64];
        recv_all(fds[1], got, sizeof(got));
        for (int k = 1; k < 64; k++)
            EQ(got[k], got[0]);
        seen[(uint8_t)got[0]]++;
    }
    for (int i = 0; i < 3; i++) {
        finish(t[i]);
        EQ(seen[(uint8_t)w[i].mark], 500);
    }
}

/* ---- Opening and closing while others work ---- */
static void *opens_and_closes(void *arg)
{
    struct sockaddr_in *a = arg;
    for (int i = 0; i < 200; i++) {
        int fd = connect_to(*a), d = (int)MUST(dup(fd));
        MUST(close(fd));
        MUST(close(d));
        int u = bound(SOCK_DGRAM), p[2];
        MUST(pipe(p));
        MUST(close(u));
        MUST(close(p[0]));
        MUST(close(p[1]));
    }
    return NULL;
}

static void *accepts_until_shut(void *arg)
{
    for (;;) {
        int fd = accept(*(int *)arg, NULL, NULL);
        if (fd == -1)
            return NULL;
        MUST(close(fd));
    }
}

CASE(numbers_come_and_go_in_all_threads)
{
    int l = listener(64), bulk[2];
    struct sockaddr_in a = name_of(l);
    pthread_t t[3], acceptor = start(accepts_until_shut, &l);
    tcp_pair(bulk);
    pthread_t out = start(sends_bulk, &bulk[0]), in = start(receives_bulk, &bulk[1]);
    for (int i = 0; i < 3; i++)
        t[i] = start(opens_and_closes, &a);
    for (int i = 0; i < 3; i++)
        finish(t[i]);
    EQ((size_t)finish(in), 4 * MEGABYTE);
    finish(out);
    MUST(shutdown(l, SHUT_RDWR));
    finish(acceptor);
}

/* ---- Cancelling ---- */
CASE(a_cancelled_recv_holds_nothing)
{
    int fds[2];
    tcp_pair(fds);
    for (int i = 0; i < 5; i++) {
        pthread_t t = start(recv_result, &fds[0]);
        nap_ms(20);
        CHECK(pthread_cancel(t) == 0); /* recv() is a cancellation point: pthreads(7) */
        EQ((intptr_t)finish(t), (intptr_t)PTHREAD_CANCELED);
        says(fds[1], "x");
        hears(fds[0], "x");
    }
}

CASE(a_cancelled_poll_and_accept_hold_nothing)
{
    int fds[2], l = listener(4);
    tcp_pair(fds);
    pthread_t t = start(poll_result, &fds[0]), u = start(accept_result, &l);
    nap_ms(20);
    CHECK(pthread_cancel(t) == 0 && pthread_cancel(u) == 0);
    EQ((intptr_t)finish(t), (intptr_t)PTHREAD_CANCELED);
    EQ((intptr_t)finish(u), (intptr_t)PTHREAD_CANCELED);
    says(fds[1], "x");
    hears(fds[0], "x");
    says(client_of(l), "y");
    hears(accept_one(l), "y");
}

/* ---- While the program computes ---- */
CASE(data_moves_while_nobody_calls)
{
    int fds[2];
    volatile uint64_t work = 0;
    tcp_pair(fds);
    pid_t child = (pid_t)MUST(fork());
    if (child == 0) {
        MUST(close(fds[0]));
        EQ(pattern_in(fds[1]), 100000); /* less than the buffers hold */
        _exit(0);
    }
    MUST(close(fds[1]));
    pattern_out(fds[0], 100000);
    MUST(shutdown(fds[0], SHUT_WR));
    int status;
    pid_t got;
    while ((got = waitpid(child, &status, WNOHANG)) == 0) /* no call on a socket from here on */
        for (int i = 0; i < 1000000; i++)
            work += (uint64_t)i;
    EQ(got, child);
    EQ(status, 0);
}

/* ---- An event loop that a thread wakes ---- */
static void *rings(void *arg)
{
    for (int i = 0; i < 100; i++) {
        MUST(eventfd_write(*(int *)arg, 1));
        nap_ms(1);
    }
    return NULL;
}

CASE(an_event_loop_with_a_bell)
{
    int fds[2], bell = (int)MUST(eventfd(0, EFD_NONBLOCK | EFD_SEMAPHORE)), ep = (int)MUST(epoll_create1(0));
    tcp_pair(fds);
    struct epoll_event e = {.events = EPOLLIN, .data.fd = bell}, f = {.events = EPOLLIN, .data.fd = fds[1]};
    MUST(epoll_ctl(ep, EPOLL_CTL_ADD, bell, &e));
    MUST(epoll_ctl(ep, EPOLL_CTL_ADD, fds[1], &f));
    pthread_t t = start(rings, &bell);
    int rung = 0, heard = 0;
    while (rung < 100 || heard < 100) {
        struct epoll_event got[4];
        long n = MUST(epoll_wait(ep, got, 4, -1));
        for (long i = 0; i < n; i++) {
            eventfd_t value;
            if (got[i].data.fd == fds[1]) {
                char c;
                EQ(recv(fds[1], &c, 1, 0), 1);
                heard++;
            } else if (eventfd_read(bell, &value) == 0) {
                rung++;
                says(fds[0], "b");
            }
        }
    }
    finish(t);
}

int main(int argc, char **argv) { return posix_main(argc, argv); }
