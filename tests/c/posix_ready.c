/* SPDX-License-Identifier: Apache-2.0 */
/* poll, select and epoll: what is ready, who is woken, sockets mixed with other descriptors. Frame: posix.h. */
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/select.h>

#include "posix.h"

static int ep_add(int ep, int fd, uint32_t events)
{
    struct epoll_event e = {.events = events, .data.u64 = 0x1234567800000000u | (uint32_t)fd};
    return epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e);
}

static int ep_mod(int ep, int fd, uint32_t events)
{
    struct epoll_event e = {.events = events, .data.u64 = 0x1234567800000000u | (uint32_t)fd};
    return epoll_ctl(ep, EPOLL_CTL_MOD, fd, &e);
}

/* The one event that there is at once or within `ms`; 0: none. */
static uint32_t ep_one(int ep, int fd, int ms)
{
    struct epoll_event e[4];
    long n = MUST(epoll_wait(ep, e, 4, ms));
    if (n == 0)
        return 0;
    EQ(n, 1);
    EQ(e[0].data.u64, (0x1234567800000000u | (uint32_t)fd));
    return e[0].events;
}

/* ---- What poll says of a socket's life ---- */
CASE(poll_from_birth_to_end)
{
    int fresh = (int)MUST(socket(AF_INET, SOCK_STREAM, 0)), l = listener(4), fds[2];
    EQ(ready(fresh), POLLOUT | POLLHUP);
    EQ(ready(l), 0);
    int c = client_of(l);
    EQ(wait_ready(l, POLLIN), POLLIN);
    MUST(close(c));
    tcp_pair(fds);
    EQ(ready(fds[1]), POLLOUT);
    says(fds[0], "x");
    EQ(wait_ready(fds[1], POLLIN), POLLIN | POLLOUT);
    hears(fds[1], "x");
    MUST(shutdown(fds[0], SHUT_WR));
    EQ(wait_ready(fds[1], POLLRDHUP), POLLIN | POLLOUT | POLLRDHUP);
    EQ(ready(fds[0]), POLLOUT);
    MUST(shutdown(fds[1], SHUT_WR));
    EQ(wait_ready(fds[1], POLLHUP), POLLIN | POLLOUT | POLLRDHUP | POLLHUP);
    EQ(wait_ready(fds[0], POLLHUP), POLLIN | POLLOUT | POLLRDHUP | POLLHUP);
}

CASE(poll_after_a_reset)
{
    int fds[2];
    struct linger hard = {.l_onoff = 1};
    tcp_pair(fds);
    MUST(setsockopt(fds[0], SOL_SOCKET, SO_LINGER, &hard, sizeof(hard)));
    MUST(close(fds[0]));
    EQ(wait_ready(fds[1], POLLERR), POLLIN | POLLOUT | POLLRDHUP | POLLERR | POLLHUP);
    EQ(option(fds[1], SOL_SOCKET, SO_ERROR), ECONNRESET);
    EQ(ready(fds[1]), POLLIN | POLLOUT | POLLRDHUP | POLLHUP);
}

CASE(poll_without_room)
{
    int fds[2];
    uint8_t block[65536] = {0};
    tcp_pair(fds);
    nonblocking(fds[0]);
    for (;;) { /* what the peer takes meanwhile makes room again */
        while (send(fds[0], block, sizeof(block), 0) > 0)
            ;
        EQ(errno, EAGAIN);
        nap_ms(20);
        if (ready(fds[0]) == 0)
            break;
    }
    struct pollfd p = {.fd = fds[0], .events = POLLOUT};
    EQ(poll(&p, 1, 20), 0);
    nonblocking(fds[1]);
    while (ready(fds[0]) == 0) /* the reader makes room */
        if (recv(fds[1], block, sizeof(block), 0) == -1)
            EQ(errno, EAGAIN);
    EQ(ready(fds[0]), POLLOUT);
}

CASE(poll_mixed_with_others)
{
    int fds[2], p[2], e = (int)MUST(eventfd(0, 0));
    char c;
    tcp_pair(fds);
    MUST(pipe(p));
    struct pollfd all[] = {{fds[1], POLLIN, 0}, {p[0], POLLIN, 0}, {-1, POLLIN, 7}, {e, POLLIN, 0}, {997, POLLIN, 0}};
    EQ(poll(all, 4, 10), 0);
    EQ(all[2].revents, 0);
    EQ(poll(all, 5, -1), 1);
    EQ(all[4].revents, POLLNVAL);
    EQ(write(p[1], "x", 1), 1);
    EQ(poll(all, 4, -1), 1);
    EQ(all[1].revents, POLLIN);
    says(fds[0], "y");
    wait_ready(fds[1], POLLIN);
    eventfd_write(e, 3);
    EQ(poll(all, 4, -1), 3);
    EQ(all[0].revents, POLLIN);
    EQ(read(p[0], &c, 1), 1);
    EQ(poll(all, 4, 0), 2);
    EQ(all[1].revents, 0);
}

struct act {
    int fd, kind;
};

static void *acts_later(void *arg)
{
    struct act *a = arg;
    nap_ms(50);
    if (a->kind == 0)
        EQ(write(a->fd, "x", 1), 1);
    else if (a->kind == 1)
        MUST(shutdown(a->fd, SHUT_WR));
    else
        MUST(close(a->fd));
    return NULL;
}

static void wakes(int fd, int kind, struct pollfd *p, nfds_t n, int which, short revents)
{
    pthread_t t;
    struct act a = {fd, kind};
    CHECK(pthread_create(&t, NULL, acts_later, &a) == 0);
    EQ(poll(p, n, -1), 1);
    EQ(p[which].revents, revents);
    pthread_join(t, NULL);
}

CASE(poll_is_woken_from_either_world)
{
    int fds[2], pipefd[2];
    char c;
    tcp_pair(fds);
    MUST(pipe(pipefd));
    struct pollfd p[2] = {{fds[1], POLLIN | POLLRDHUP, 0}, {pipefd[0], POLLIN, 0}};
    wakes(pipefd[1], 0, p, 2, 1, POLLIN);
    EQ(read(pipefd[0], &c, 1), 1);
    wakes(fds[0], 0, p, 2, 0, POLLIN);
    hears(fds[1], "x");
    wakes(fds[0], 1, p, 2, 0, POLLIN | POLLRDHUP);
}

CASE(ppoll_and_poll_keep_their_timeouts)
{
    int fds[2];
    tcp_pair(fds);
    struct pollfd p = {fds[1], POLLIN, 0};
    struct timespec t = {0, 60000000}, before = t;
    int64_t start = now_ms();
    EQ(ppoll(&p, 1, &t, NULL), 0);
    CHECK(now_ms() - start >= 59);
    CHECK(t.tv_nsec == before.tv_nsec); /* glibc's copy is what the kernel changes */
    start = now_ms();
    EQ(poll(&p, 1, 60), 0);
    CHECK(now_ms() - start >= 59);
    EQ(poll(NULL, 0, 10), 0);
    t.tv_nsec = -1;
    FAILS(EINVAL, ppoll(&p, 1, &t, NULL));
}

/* ---- select ---- */
static void empty(fd_set *r, fd_set *w, fd_set *x)
{
    FD_ZERO(r);
    FD_ZERO(w);
    FD_ZERO(x);
}

CASE(select_of_three_sets)
{
    int fds[2], l = listener(4), p[2];
    tcp_pair(fds);
    MUST(pipe(p));
    fd_set r, w, x;
    empty(&r, &w, &x);
    FD_SET(fds[0], &r), FD_SET(fds[1], &r), FD_SET(l, &r), FD_SET(p[0], &r);
    FD_SET(fds[0], &w), FD_SET(fds[1], &x);
    EQ(select(FD_SETSIZE, &r, &w, &x, NULL), 1);
    CHECK(FD_ISSET(fds[0], &w) && !FD_ISSET(fds[0], &r) && !FD_ISSET(l, &r) && !FD_ISSET(fds[1], &x));
    EQ(send(fds[0], "ab!", 3, MSG_OOB), 3);
    wait_ready(fds[1], POLLPRI | POLLIN);
    int c = client_of(l);
    wait_ready(l, POLLIN);
    empty(&r, &w, &x);
    FD_SET(fds[1], &r), FD_SET(l, &r), FD_SET(fds[1], &x);
    EQ(select(FD_SETSIZE, &r, NULL, &x, NULL), 3);
    CHECK(FD_ISSET(fds[1], &r) && FD_ISSET(l, &r) && FD_ISSET(fds[1], &x));
    struct timeval t = {0, 30000};
    FD_ZERO(&r);
    FD_SET(fds[0], &r);
    EQ(select(fds[0] + 1, &r, NULL, NULL, &t), 0);
    CHECK(t.tv_sec == 0 && t.tv_usec == 0); /* select(2): Linux tells the time that was left */
    CHECK(!FD_ISSET(fds[0], &r));
    int gone = (int)MUST(dup(0));
    MUST(close(gone));
    FD_SET(gone, &r);
    FAILS(EBADF, select(gone + 1, &r, NULL, NULL, NULL));
    FAILS(EINVAL, select(-1, NULL, NULL, NULL, NULL));
    MUST(close(c));
}

CASE(select_after_the_end)
{
    int fds[2];
    struct linger hard = {.l_onoff = 1};
    fd_set r, w, x;
    tcp_pair(fds);
    MUST(setsockopt(fds[0], SOL_SOCKET, SO_LINGER, &hard, sizeof(hard)));
    MUST(close(fds[0]));
    wait_ready(fds[1], POLLERR);
    empty(&r, &w, &x);
    FD_SET(fds[1], &r), FD_SET(fds[1], &w), FD_SET(fds[1], &x);
    EQ(pselect(fds[1] + 1, &r, &w, &x, NULL, NULL), 2); /* an error is no exceptional condition */
    CHECK(FD_ISSET(fds[1], &r) && FD_ISSET(fds[1], &w) && !FD_ISSET(fds[1], &x));
}

CASE(select_of_high_numbers)
{
    int fds[2];
    struct rlimit lim;
    unsigned long set[4096 / (8 * sizeof(unsigned long))] = {0}; /* larger than an fd_set: select(2) allows it */
    enum { BITS = 8 * sizeof(unsigned long), HIGH = 3000 };
    MUST(getrlimit(RLIMIT_NOFILE, &lim));
    lim.rlim_cur = lim.rlim_max;
    MUST(setrlimit(RLIMIT_NOFILE, &lim));
    tcp_pair(fds);
    EQ(dup2(fds[1], HIGH), HIGH);
    says(fds[0], "x");
    set[HIGH / BITS] |= 1ul << HIGH % BITS;
    EQ(select(HIGH + 1, (fd_set *)set, NULL, NULL, NULL), 1);
    CHECK(set[HIGH / BITS] == 1ul << HIGH % BITS);
    hears(HIGH, "x");
    struct timeval t = {0, 1000};
    EQ(select(HIGH + 1, (fd_set *)set, NULL, NULL, &t), 0);
    EQ(set[HIGH / BITS], 0);
}

/* ---- epoll ---- */
CASE(epoll_level)
{
    int fds[2], ep = (int)MUST(epoll_create1(EPOLL_CLOEXEC));
    EQ(fcntl(ep, F_GETFD), FD_CLOEXEC);
    tcp_pair(fds);
    MUST(ep_add(ep, fds[1], EPOLLIN | EPOLLRDHUP));
    EQ(ep_one(ep, fds[1], 10), 0);
    says(fds[0], "xy");
    EQ(ep_one(ep, fds[1], -1), EPOLLIN);
    EQ(ep_one(ep, fds[1], 0), EPOLLIN);
    hears(fds[1], "x");
    EQ(ep_one(ep, fds[1], 0), EPOLLIN);
    hears(fds[1], "y");
    EQ(ep_one(ep, fds[1], 0), 0);
    MUST(ep_mod(ep, fds[1], EPOLLOUT));
    EQ(ep_one(ep, fds[1], 0), EPOLLOUT);
    MUST(ep_mod(ep, fds[1], EPOLLIN | EPOLLRDHUP));
    MUST(close(fds[0]));
    EQ(ep_one(ep, fds[1], -1), EPOLLIN | EPOLLRDHUP);
    MUST(epoll_ctl(ep, EPOLL_CTL_DEL, fds[1], NULL));
    EQ(ep_one(ep, fds[1], 0), 0);
}

CASE(epoll_edge)
{
    int fds[2], ep = (int)MUST(epoll_create(1));
    tcp_pair(fds);
    MUST(ep_add(ep, fds[1], EPOLLIN | EPOLLET));
    says(fds[0], "a");
    EQ(ep_one(ep, fds[1], -1), EPOLLIN);
    EQ(ep_one(ep, fds[1], 20), 0); /* once, though the byte is there still */
    says(fds[0], "b");
    EQ(ep_one(ep, fds[1], -1), EPOLLIN); /* more came */
    EQ(ep_one(ep, fds[1], 0), 0);
    MUST(ep_mod(ep, fds[1], EPOLLIN | EPOLLET)); /* asks anew */
    EQ(ep_one(ep, fds[1], 0), EPOLLIN);
    hears(fds[1], "ab");
    MUST(ep_mod(ep, fds[1], EPOLLIN | EPOLLOUT | EPOLLET));
    EQ(ep_one(ep, fds[1], 0), EPOLLOUT);
    EQ(ep_one(ep, fds[1], 0), 0);
    says(fds[0], "c");
    EQ(ep_one(ep, fds[1], -1), EPOLLIN | EPOLLOUT);
}

CASE(epoll_edge_of_room)
{
    int fds[2], ep = (int)MUST(epoll_create1(0));
    uint8_t block[65536] = {0};
    tcp_pair(fds);
    nonblocking(fds[0]);
    nonblocking(fds[1]);
    MUST(ep_add(ep, fds[0], EPOLLOUT | EPOLLET));
    EQ(ep_one(ep, fds[0], 0), EPOLLOUT);
    for (int full = 0; full < 3; full++) {
        while (send(fds[0], block, sizeof(block), 0) > 0)
            ;
        EQ(errno, EAGAIN);
        uint32_t got = 0;
        while (!got) { /* who met EAGAIN is told when there is room */
            if (recv(fds[1], block, sizeof(block), 0) == -1)
                EQ(errno, EAGAIN);
            got = ep_one(ep, fds[0], 1);
        }
        EQ(got, EPOLLOUT);
    }
}

CASE(epoll_oneshot)
{
    int fds[2], ep = (int)MUST(epoll_create1(0));
    tcp_pair(fds);
    MUST(ep_add(ep, fds[1], EPOLLIN | EPOLLONESHOT));
    says(fds[0], "a");
    EQ(ep_one(ep, fds[1], -1), EPOLLIN);
    says(fds[0], "b");
    EQ(ep_one(ep, fds[1], 20), 0);
    MUST(ep_mod(ep, fds[1], EPOLLIN | EPOLLONESHOT));
    EQ(ep_one(ep, fds[1], -1), EPOLLIN);
    EQ(ep_one(ep, fds[1], 0), 0);
}

CASE(epoll_exclusive_wakes_somebody)
{
    int l = listener(8), a = (int)MUST(epoll_create1(0)), b = (int)MUST(epoll_create1(0));
    MUST(ep_add(a, l, EPOLLIN | EPOLLEXCLUSIVE));
    MUST(ep_add(b, l, EPOLLIN | EPOLLEXCLUSIVE));
    FAILS(EINVAL, ep_mod(a, l, EPOLLIN));
    FAILS(EINVAL, ep_add(a, listener(1), EPOLLIN | EPOLLEXCLUSIVE | EPOLLONESHOT));
    int c = client_of(l);
    wait_ready(l, POLLIN);
    CHECK(ep_one(a, l, 0) == EPOLLIN || ep_one(b, l, 0) == EPOLLIN);
    says(c, "x");
    hears(accept_one(l), "x");
    EQ(ep_one(a, l, 0), 0);
    EQ(ep_one(b, l, 0), 0);
}

CASE(epoll_nested)
{
    int fds[2], inner = (int)MUST(epoll_create1(0)), outer = (int)MUST(epoll_create1(0));
    tcp_pair(fds);
    MUST(ep_add(outer, inner, EPOLLIN));
    EQ(ready(inner), 0);
    MUST(ep_add(inner, fds[1], EPOLLIN));
    EQ(ep_one(outer, inner, 0), 0);
    says(fds[0], "x");
    EQ(ep_one(outer, inner, -1), EPOLLIN);
    EQ(ready(inner), POLLIN);
    EQ(ep_one(inner, fds[1], 0), EPOLLIN);
    hears(fds[1], "x");
    EQ(ep_one(outer, inner, 0), 0);
    FAILS(ELOOP, ep_add(inner, outer, EPOLLIN));
    FAILS(EINVAL, ep_add(inner, inner, EPOLLIN));
    struct pollfd p = {inner, POLLIN, 0}; /* poll() sleeps on an epoll descriptor */
    wakes(fds[0], 0, &p, 1, 0, POLLIN);
}

CASE(epoll_errors)
{
    int fds[2], ep = (int)MUST(epoll_create1(0)), file = (int)MUST(open("/etc/passwd", O_RDONLY));
    struct epoll_event e;
    tcp_pair(fds);
    MUST(ep_add(ep, fds[0], EPOLLIN));
    FAILS(EEXIST, ep_add(ep, fds[0], EPOLLIN));
    FAILS(ENOENT, ep_mod(ep, fds[1], EPOLLIN));
    FAILS(ENOENT, epoll_ctl(ep, EPOLL_CTL_DEL, fds[1], NULL));
    FAILS(EBADF, ep_add(ep, 996, EPOLLIN));
    FAILS(EBADF, ep_add(996, fds[0], EPOLLIN));
    FAILS(EINVAL, ep_add(fds[1], fds[0], EPOLLIN));
    FAILS(EPERM, ep_add(ep, file, EPOLLIN));
    FAILS(EINVAL, epoll_wait(ep, &e, 0, 0));
    volatile int wrong = -1; /* volatile: the compiler must not see what is passed */
    FAILS(EINVAL, epoll_wait(ep, &e, wrong, 0));
    FAILS(EINVAL, epoll_wait(fds[0], &e, 1, 0));
    FAILS(EBADF, epoll_wait(996, &e, 1, 0));
    FAILS(EINVAL, epoll_create(0));
    FAILS(EINVAL, epoll_create1(1));
}

CASE(epoll_forgets_what_is_closed)
{
    int fds[2], ep = (int)MUST(epoll_create1(0));
    tcp_pair(fds);
    MUST(ep_add(ep, fds[1], EPOLLIN));
    says(fds[0], "x");
    EQ(ep_one(ep, fds[1], -1), EPOLLIN);
    int d = (int)MUST(dup(fds[1])), number = fds[1];
    MUST(close(number));
    EQ(ep_one(ep, number, 0), EPOLLIN); /* epoll(7), question 6: the open file is there still */
    MUST(close(d));
    EQ(ep_one(ep, number, 0), 0);
    int again[2];
    tcp_pair(again); /* the number is used again, and is not in the set */
    CHECK(again[0] == number || again[1] == number);
    says(again[0], "y");
    wait_ready(again[1], POLLIN);
    EQ(ep_one(ep, number, 0), 0);
    MUST(ep_add(ep, again[1], EPOLLIN));
    EQ(ep_one(ep, again[1], 0), EPOLLIN);
}

CASE(epoll_of_both_worlds)
{
    int fds[2], p[2], ep = (int)MUST(epoll_create1(0)), e = (int)MUST(eventfd(0, EFD_NONBLOCK));
    char c;
    tcp_pair(fds);
    MUST(pipe(p));
    MUST(ep_add(ep, fds[1], EPOLLIN));
    MUST(ep_add(ep, p[0], EPOLLIN));
    MUST(ep_add(ep, e, EPOLLIN | EPOLLET));
    EQ(write(p[1], "x", 1), 1);
    EQ(ep_one(ep, p[0], -1), EPOLLIN);
    EQ(read(p[0], &c, 1), 1);
    says(fds[0], "y");
    EQ(ep_one(ep, fds[1], -1), EPOLLIN);
    EQ(write(p[1], "x", 1), 1);
    eventfd_write(e, 1);
    struct epoll_event all[8];
    EQ(epoll_wait(ep, all, 8, -1), 3);
    EQ(epoll_wait(ep, all, 8, -1), 2); /* the edge is over */
    uint64_t seen[2] = {0, 0};
    for (int i = 0; i < 2; i++) { /* one at a time: everybody's turn comes */
        EQ(epoll_wait(ep, all, 1, -1), 1);
        seen[i] = all[0].data.u64;
    }
    CHECK(seen[0] != seen[1]);
}

CASE(epoll_many_ready_few_asked)
{
    enum { PAIRS = 40 };
    int fds[PAIRS][2], ep = (int)MUST(epoll_create1(0)), turns[1024] = {0};
    for (int i = 0; i < PAIRS; i++) {
        tcp_pair(fds[i]);
        MUST(ep_add(ep, fds[i][1], EPOLLIN));
        says(fds[i][0], "x");
        wait_ready(fds[i][1], POLLIN);
    }
    for (int round = 0; round < PAIRS / 4; round++) {
        struct epoll_event e[4];
        EQ(epoll_wait(ep, e, 4, -1), 4);
        for (int i = 0; i < 4; i++)
            turns[e[i].data.u64 & 0xffff]++;
    }
    for (int i = 0; i < PAIRS; i++)
        EQ(turns[fds[i][1]], 1); /* level-triggered, read by nobody: each had one turn */
}

struct adding {
    int ep, fd;
};

static void *adds_later(void *arg)
{
    struct adding *a = arg;
    nap_ms(50);
    MUST(ep_add(a->ep, a->fd, EPOLLIN));
    return NULL;
}

CASE(epoll_wait_sees_what_is_added_meanwhile)
{
    int fds[2], ep = (int)MUST(epoll_create1(0));
    pthread_t t;
    tcp_pair(fds);
    says(fds[0], "x");
    struct adding a = {ep, fds[1]};
    CHECK(pthread_create(&t, NULL, adds_later, &a) == 0);
    EQ(ep_one(ep, fds[1], -1), EPOLLIN);
    pthread_join(t, NULL);
}

CASE(epoll_timeouts)
{
    int fds[2], ep = (int)MUST(epoll_create1(0));
    struct epoll_event e;
    tcp_pair(fds);
    MUST(ep_add(ep, fds[1], EPOLLIN));
    int64_t start = now_ms();
    EQ(epoll_wait(ep, &e, 1, 60), 0);
    CHECK(now_ms() - start >= 59);
    struct timespec t = {0, 30000000};
    start = now_ms();
    EQ(epoll_pwait2(ep, &e, 1, &t, NULL), 0);
    CHECK(now_ms() - start >= 29);
    EQ(epoll_pwait(ep, &e, 1, 0, NULL), 0);
    says(fds[0], "x");
    EQ(epoll_pwait2(ep, &e, 1, NULL, NULL), 1);
    t.tv_nsec = 1000000000;
    FAILS(EINVAL, epoll_pwait2(ep, &e, 1, &t, NULL));
}

CASE(epoll_of_a_listener_and_a_connect)
{
    int l = listener(8), ep = (int)MUST(epoll_create1(0)), c = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    struct sockaddr_in a = name_of(l);
    nonblocking(c);
    MUST(ep_add(ep, l, EPOLLIN));
    EQ(ep_one(ep, l, 0), 0);
    MUST(ep_add(ep, c, EPOLLOUT | EPOLLET));
    EQ(ep_one(ep, c, 0), EPOLLOUT | EPOLLHUP); /* not connected yet */
    if (connect(c, (struct sockaddr *)&a, sizeof(a)) == -1)
        EQ(errno, EINPROGRESS);
    int seen = 0;
    while (seen != 3) {
        struct epoll_event e[2];
        long n = MUST(epoll_wait(ep, e, 2, -1));
        for (int i = 0; i < n; i++) {
            if ((int)(e[i].data.u64 & 0xffff) == l)
                seen |= 1;
            else if (e[i].events == EPOLLOUT)
                seen |= 2;
        }
    }
    EQ(option(c, SOL_SOCKET, SO_ERROR), 0);
}

int main(int argc, char **argv) { return posix_main(argc, argv); }
