/* SPDX-License-Identifier: Apache-2.0 */
/* epoll where it is hard: both halves of one socket, threads, sets that change while somebody sleeps, sets of sets, fork.
 * What is plain stands in posix_ready.c. Frame: posix.h. */
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/select.h>

#include "posix.h"

enum { MARK = 0x5eed0000 };

static void ctl(int ep, int op, int fd, uint32_t events)
{
    struct epoll_event e = {.events = events, .data.u64 = (uint64_t)MARK << 32 | (uint32_t)fd};
    MUST(epoll_ctl(ep, op, fd, &e));
}

static void add(int ep, int fd, uint32_t events) { ctl(ep, EPOLL_CTL_ADD, fd, events); }
static void mod(int ep, int fd, uint32_t events) { ctl(ep, EPOLL_CTL_MOD, fd, events); }
static void del(int ep, int fd) { MUST(epoll_ctl(ep, EPOLL_CTL_DEL, fd, NULL)); }
static int make(void) { return (int)MUST(epoll_create1(EPOLL_CLOEXEC)); }

static int fd_of(const struct epoll_event *e)
{
    EQ(e->data.u64 >> 32, (uint32_t)MARK);
    return (int)(uint32_t)e->data.u64;
}

/* Exactly this event within `ms` (-1: whenever it comes). */
static void one(int ep, int fd, uint32_t events, int ms)
{
    struct epoll_event e[4];
    EQ(epoll_wait(ep, e, 4, ms), 1);
    EQ(fd_of(e), fd);
    EQ(e->events, events);
}

static void none(int ep)
{
    struct epoll_event e[4];
    EQ(epoll_wait(ep, e, 4, 0), 0);
    EQ(epoll_wait(ep, e, 4, 20), 0);
}

/* ---- Who comes by the kernel although a stack is there: a process without the library ---- */
static pid_t outsider(const char *how, struct sockaddr_in to)
{
    char port[8];
    char *argv[] = {posix_self, (char *)how, port, NULL}, *env[] = {NULL};
    pid_t pid;

    snprintf(port, sizeof(port), "%d", ntohs(to.sin_port));
    pid = (pid_t)MUST(fork());
    if (pid == 0) {
        execve(posix_self, argv, env);
        _exit(3);
    }
    return pid;
}

static int outside(const char *how, const char *port)
{
    struct sockaddr_in a = loopback((uint16_t)atoi(port));
    int fd = (int)MUST(socket(AF_INET, strcmp(how, "-connect") == 0 ? SOCK_STREAM : SOCK_DGRAM, 0));
    MUST(connect(fd, (struct sockaddr *)&a, sizeof(a)));
    says(fd, "outside");
    char c; /* until the server closes: a reset, where it has not read */
    while (strcmp(how, "-connect") == 0 && recv(fd, &c, 1, 0) > 0)
        ;
    return 0;
}

CASE(a_listener_hears_both_sides_once)
{
    int l = listener(8), ep = make();
    struct epoll_event e[4];
    nonblocking(l);
    add(ep, l, EPOLLIN);
    pid_t out = outsider("-connect", name_of(l));
    one(ep, l, EPOLLIN, -1);
    int in = client_of(l);
    while (ready(l) != POLLIN)
        ;
    EQ(epoll_wait(ep, e, 4, -1), 1); /* one member, one event, whoever waits there */
    EQ(fd_of(e), l);
    int a = accept_one(l), b = accept_one(l);
    FAILS(EAGAIN, accept(l, NULL, NULL));
    none(ep);
    add(ep, a, EPOLLIN);
    add(ep, b, EPOLLIN);
    says(in, "outside");
    for (int seen = 0; seen < 2;) {
        long n = MUST(epoll_wait(ep, e, 4, -1));
        for (int i = 0; i < n; i++, seen++) {
            hears(fd_of(&e[i]), "outside");
            del(ep, fd_of(&e[i]));
        }
    }
    MUST(close(a));
    MUST(close(b));
    reap(out);
}

CASE(an_edge_of_either_side)
{
    int l = listener(8), ep = make();
    nonblocking(l);
    add(ep, l, EPOLLIN | EPOLLET);
    none(ep);
    pid_t out = outsider("-connect", name_of(l));
    one(ep, l, EPOLLIN, -1);
    none(ep);
    int in = client_of(l);
    one(ep, l, EPOLLIN, -1);
    none(ep); /* nobody accepted, and nothing new came */
    for (int n = 0; n < 2; n++)
        MUST(close(accept_one(l)));
    MUST(close(in));
    reap(out);
}

CASE(a_shot_is_fired_by_one_side)
{
    int l = listener(8), ep = make();
    nonblocking(l);
    add(ep, l, EPOLLIN | EPOLLONESHOT);
    int in = client_of(l);
    one(ep, l, EPOLLIN, -1);
    pid_t out = outsider("-connect", name_of(l));
    none(ep);
    wait_ready(l, POLLIN);
    int a = accept_one(l);
    nap_ms(100);
    none(ep);
    mod(ep, l, EPOLLIN | EPOLLONESHOT);
    one(ep, l, EPOLLIN, -1); /* the other one still waits */
    none(ep);
    int b = accept_one(l);
    mod(ep, l, EPOLLIN | EPOLLONESHOT);
    none(ep);
    MUST(close(a));
    MUST(close(b));
    MUST(close(in));
    reap(out);
}

CASE(datagrams_of_both_sides)
{
    int u = bound(SOCK_DGRAM), c = (int)MUST(socket(AF_INET, SOCK_DGRAM, 0)), ep = make();
    struct sockaddr_in to = name_of(u);
    char got[16];
    add(ep, u, EPOLLIN);
    reap(outsider("-send", to));
    one(ep, u, EPOLLIN, -1);
    MUST(connect(c, (struct sockaddr *)&to, sizeof(to)));
    says(c, "inside!");
    one(ep, u, EPOLLIN, -1);
    for (int n = 0; n < 2; n++)
        EQ(recv(u, got, sizeof(got), 0), 7);
    none(ep);
    mod(ep, u, EPOLLIN | EPOLLOUT);
    one(ep, u, EPOLLOUT, 0);
}

/* ---- Sets that change while somebody sleeps ---- */
struct later {
    int ep, op, fd, say;
    uint32_t events;
    int ms;
};

static void *later(void *arg)
{
    struct later *l = arg;
    nap_ms(l->ms ? l->ms : 50);
    if (l->ep >= 0)
        ctl(l->ep, l->op, l->fd, l->events);
    if (l->say >= 0)
        says(l->say, "x");
    return NULL;
}

static pthread_t start(void *(*run)(void *), void *arg)
{
    pthread_t t;
    CHECK(pthread_create(&t, NULL, run, arg) == 0);
    return t;
}

CASE(a_sleeper_of_a_set_that_had_only_pipes)
{
    int fds[2], p[2], ep = make();
    tcp_pair(fds);
    MUST(pipe(p));
    add(ep, p[0], EPOLLIN);
    struct later it = {.ep = ep, .op = EPOLL_CTL_ADD, .fd = fds[1], .events = EPOLLIN, .say = fds[0]};
    pthread_t t = start(later, &it);
    one(ep, fds[1], EPOLLIN, -1);
    pthread_join(t, NULL);
    EQ(write(p[1], "y", 1), 1);
    struct epoll_event e[4];
    EQ(epoll_wait(ep, e, 4, -1), 2);
    hears(fds[1], "x");
    one(ep, p[0], EPOLLIN, -1);
}

static void *sleeps_for_one(void *arg)
{
    struct epoll_event e;
    EQ(epoll_wait(*(int *)arg, &e, 1, -1), 1);
    return (void *)(intptr_t)fd_of(&e);
}

CASE(many_sleepers_of_a_set_that_had_only_pipes)
{
    enum { THREADS = 4 };
    int fds[THREADS][2], p[2], ep = make();
    bool got[1024] = {false};
    pthread_t t[THREADS];
    MUST(pipe(p));
    add(ep, p[0], EPOLLIN | EPOLLET);
    for (int i = 0; i < THREADS; i++) {
        tcp_pair(fds[i]);
        t[i] = start(sleeps_for_one, &ep);
    }
    nap_ms(50);
    for (int i = 0; i < THREADS; i++) {
        add(ep, fds[i][1], EPOLLIN | EPOLLET);
        says(fds[i][0], "x");
    }
    for (int i = 0; i < THREADS; i++) { /* each thread one event, none twice */
        void *fd;
        pthread_join(t[i], &fd);
        CHECK(!got[(intptr_t)fd]);
        got[(intptr_t)fd] = true;
    }
}

CASE(what_is_asked_for_changes_while_one_sleeps)
{
    int fds[2], ep = make();
    tcp_pair(fds);
    add(ep, fds[1], EPOLLRDHUP);
    struct later it = {.ep = ep, .op = EPOLL_CTL_MOD, .fd = fds[1], .events = EPOLLOUT | EPOLLET, .say = -1};
    pthread_t t = start(later, &it);
    one(ep, fds[1], EPOLLOUT, -1);
    pthread_join(t, NULL);
    mod(ep, fds[1], EPOLLOUT | EPOLLET); /* says it anew, once */
    one(ep, fds[1], EPOLLOUT, 0);
    none(ep);
    mod(ep, fds[1], EPOLLPRI | EPOLLET);
    says(fds[0], "x");
    wait_ready(fds[1], POLLIN);
    none(ep); /* not asked for */
    mod(ep, fds[1], EPOLLIN | EPOLLOUT | EPOLLET);
    one(ep, fds[1], EPOLLIN | EPOLLOUT, 0);
    del(ep, fds[1]);
    says(fds[0], "x");
    none(ep);
    add(ep, fds[1], EPOLLIN);
    one(ep, fds[1], EPOLLIN, 0);
}

CASE(a_socket_is_added_before_it_connects)
{
    int l = listener(8), ep = make(), c = (int)MUST(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
    struct sockaddr_in a = name_of(l);
    add(ep, c, EPOLLIN | EPOLLET);
    one(ep, c, EPOLLHUP, 0);
    none(ep);
    if (connect(c, (struct sockaddr *)&a, sizeof(a)) == -1)
        EQ(errno, EINPROGRESS);
    int s = accept_one(l);
    says(s, "x");
    struct epoll_event e; /* the end of the handshake may wake it first */
    while (epoll_wait(ep, &e, 1, -1) == 1 && e.events != EPOLLIN)
        ;
    hears(c, "x");
    del(ep, c);
    FAILS(ENOENT, epoll_ctl(ep, EPOLL_CTL_DEL, c, NULL));
}

CASE(two_refused_and_one_good)
{
    int holder, ep = make(), c[3], l = listener(8);
    struct sockaddr_in bad = refusing(&holder), good = name_of(l);
    unsigned seen = 0;
    for (int i = 0; i < 3; i++) {
        struct sockaddr_in *to = i == 1 ? &good : &bad;
        c[i] = (int)MUST(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
        if (connect(c[i], (struct sockaddr *)to, sizeof(*to)) == -1)
            CHECK(errno == EINPROGRESS || (errno == ECONNREFUSED && i != 1));
        add(ep, c[i], EPOLLOUT | EPOLLONESHOT);
    }
    while (seen != 7) {
        struct epoll_event e[3];
        long n = MUST(epoll_wait(ep, e, 3, -1));
        for (int k = 0; k < n; k++) {
            int i = fd_of(&e[k]) == c[0] ? 0 : fd_of(&e[k]) == c[1] ? 1 : 2;
            CHECK(!(seen & 1u << i));
            seen |= 1u << i;
            CHECK(i == 1 ? e[k].events == EPOLLOUT : e[k].events & EPOLLHUP && e[k].events & EPOLLOUT);
        }
    }
}

/* ---- Descriptors come and go ---- */
CASE(a_number_is_used_again_in_the_same_set)
{
    int ep = make(), fds[2];
    for (int n = 0; n < 20; n++) {
        tcp_pair(fds);
        add(ep, fds[1], EPOLLIN | (n % 2 ? EPOLLET : 0));
        says(fds[0], "x");
        one(ep, fds[1], EPOLLIN, -1);
        MUST(close(fds[n % 2]));
        if (n % 2 == 0) {
            wait_ready(fds[1], POLLRDHUP);
            one(ep, fds[1], EPOLLIN, 0);
        }
        MUST(close(fds[1 - n % 2]));
        none(ep);
    }
}

CASE(a_closed_listener_is_in_no_set)
{
    int l = listener(8), ep = make(), d = (int)MUST(dup(l));
    struct sockaddr_in a = name_of(l);
    add(ep, l, EPOLLIN);
    add(ep, d, EPOLLIN | EPOLLET);
    int c = connect_to(a);
    struct epoll_event e[4];
    while (MUST(epoll_wait(ep, e, 4, -1)) < 2)
        mod(ep, d, EPOLLIN | EPOLLET);
    MUST(close(l));
    mod(ep, d, EPOLLIN);
    EQ(epoll_wait(ep, e, 4, -1), 2); /* by the duplicate it is there still, under both numbers */
    int null = (int)MUST(open("/dev/null", O_RDWR));
    MUST(dup2(null, d));
    none(ep);
    MUST(close(c));
}

CASE(a_set_has_two_numbers)
{
    int fds[2], ep = make(), twin = (int)MUST(dup(ep));
    tcp_pair(fds);
    add(ep, fds[1], EPOLLIN);
    says(fds[0], "x");
    one(twin, fds[1], EPOLLIN, -1);
    FAILS(EEXIST, epoll_ctl(twin, EPOLL_CTL_ADD, fds[1], &(struct epoll_event){.events = EPOLLIN}));
    MUST(close(ep));
    one(twin, fds[1], EPOLLIN, 0);
    int third = (int)MUST(dup2(twin, ep));
    MUST(close(twin));
    one(third, fds[1], EPOLLIN, 0);
    MUST(close(third));
    FAILS(EBADF, epoll_wait(third, &(struct epoll_event){0}, 1, 0));
}

CASE(one_socket_in_many_sets)
{
    enum { SETS = 24 };
    int fds[2], ep[SETS];
    tcp_pair(fds);
    for (int i = 0; i < SETS; i++)
        add(ep[i] = make(), fds[1], EPOLLIN | (i % 3 == 0 ? EPOLLET : i % 3 == 1 ? EPOLLONESHOT : 0));
    says(fds[0], "x");
    for (int i = 0; i < SETS; i++) {
        one(ep[i], fds[1], EPOLLIN, -1);
        if (i % 3 < 2)
            none(ep[i]);
    }
    for (int i = 0; i < SETS; i += 2)
        MUST(close(ep[i]));
    says(fds[0], "y");
    for (int i = 1; i < SETS; i += 6) /* level */
        one(ep[i + 4 < SETS ? i + 4 : i], fds[1], EPOLLIN, -1);
    MUST(close(fds[1]));
    for (int i = 1; i < SETS; i += 2)
        none(ep[i]);
}

/* ---- Threads ---- */
struct pool {
    int ep, quit;
    _Atomic int events, bytes;
};

static void *serves(void *arg)
{
    struct pool *p = arg;
    for (;;) {
        struct epoll_event e[2];
        long n = epoll_wait(p->ep, e, 2, -1);
        CHECK(n > 0);
        for (int i = 0; i < n; i++) {
            char buf[64];
            ssize_t got;
            if (fd_of(&e[i]) == p->quit)
                return NULL;
            p->events++;
            while ((got = recv(fd_of(&e[i]), buf, sizeof(buf), MSG_DONTWAIT)) > 0) {
                p->bytes += (int)got;
                EQ(send(fd_of(&e[i]), buf, (size_t)got, MSG_NOSIGNAL), got);
            }
            if (got == 0)
                del(p->ep, fd_of(&e[i]));
            else
                mod(p->ep, fd_of(&e[i]), EPOLLIN | EPOLLONESHOT);
        }
    }
}

CASE(a_pool_on_one_set_with_one_shots)
{
    enum { THREADS = 4, PAIRS = 12, ROUNDS = 40 };
    int fds[PAIRS][2];
    struct pool p = {.ep = make(), .quit = (int)MUST(eventfd(0, EFD_NONBLOCK))};
    pthread_t t[THREADS];
    add(p.ep, p.quit, EPOLLIN);
    for (int i = 0; i < THREADS; i++)
        t[i] = start(serves, &p);
    for (int i = 0; i < PAIRS; i++) {
        tcp_pair(fds[i]);
        add(p.ep, fds[i][1], EPOLLIN | EPOLLONESHOT);
    }
    for (int n = 0; n < ROUNDS; n++) {
        for (int i = 0; i < PAIRS; i++)
            says(fds[i][0], "0123456789");
        for (int i = 0; i < PAIRS; i++)
            hears(fds[i][0], "0123456789");
    }
    EQ(p.bytes, PAIRS * ROUNDS * 10);
    eventfd_write(p.quit, 1); /* level: all of them see it */
    for (int i = 0; i < THREADS; i++)
        pthread_join(t[i], NULL);
}

CASE(one_event_wakes_one_edge_sleeper)
{
    int fds[2], ep = make(), bell = (int)MUST(eventfd(0, EFD_NONBLOCK));
    pthread_t t[2];
    void *first, *second;
    tcp_pair(fds);
    add(ep, fds[1], EPOLLIN | EPOLLET);
    add(ep, bell, EPOLLIN | EPOLLET);
    for (int i = 0; i < 2; i++)
        t[i] = start(sleeps_for_one, &ep);
    nap_ms(50);
    says(fds[0], "x");
    nap_ms(50);
    eventfd_write(bell, 1);
    pthread_join(t[0], &first);
    pthread_join(t[1], &second);
    EQ((intptr_t)first + (intptr_t)second, fds[1] + bell); /* not the same twice */
}

static _Thread_local char large[1 << 20]; /* so that no thread can have a small stack */

static void *polls(void *arg)
{
    struct pollfd p = {.fd = *(int *)arg, .events = POLLIN};
    large[p.fd] = 1;
    EQ(poll(&p, 1, -1), 1);
    return (void *)(intptr_t)large[p.fd];
}

CASE(what_is_said_last_arrives_although_nobody_calls)
{
    int fds[2];
    void *got;
    tcp_pair(fds);
    EQ(ready(fds[0]), POLLOUT);
    pthread_t t = start(polls, &fds[0]);
    nap_ms(1000); /* the last timer of the handshake is over: it would drive, too */
    MUST(shutdown(fds[1], SHUT_WR));
    pthread_join(t, &got); /* no call of ours drives the stack */
    EQ((intptr_t)got, 1);
}

/* ---- Sets in sets, and in poll() ---- */
CASE(sets_are_nested_before_they_have_sockets)
{
    int fds[2], p[2], a = make(), b = make(), c = make();
    tcp_pair(fds);
    MUST(pipe(p));
    add(a, b, EPOLLIN);
    add(b, c, EPOLLIN | EPOLLET);
    none(a);
    struct later it = {.ep = c, .op = EPOLL_CTL_ADD, .fd = fds[1], .events = EPOLLIN, .say = fds[0]};
    pthread_t t = start(later, &it);
    one(a, b, EPOLLIN, -1);
    pthread_join(t, NULL);
    EQ(ready(a), POLLIN);
    one(b, c, EPOLLIN, -1);
    none(b); /* the edge was taken */
    none(a);
    one(c, fds[1], EPOLLIN, 0);
    hears(fds[1], "x");
    none(c);
    add(c, p[0], EPOLLIN);
    EQ(write(p[1], "y", 1), 1);
    one(a, b, EPOLLIN, -1);
    one(b, c, EPOLLIN, -1);
    one(c, p[0], EPOLLIN, 0);
    MUST(close(c));
    none(b);
    none(a);
}

CASE(a_nested_set_of_a_listener)
{
    int l = listener(8), in = make(), out = make();
    nonblocking(l);
    add(in, l, EPOLLIN);
    add(out, in, EPOLLIN);
    none(out);
    pid_t kernel = outsider("-connect", name_of(l));
    one(out, in, EPOLLIN, -1);
    one(in, l, EPOLLIN, 0);
    int s = accept_one(l);
    none(out);
    int c = client_of(l);
    one(out, in, EPOLLIN, -1);
    struct pollfd p[2] = {{.fd = out, .events = POLLIN}, {.fd = in, .events = POLLIN}};
    EQ(poll(p, 2, -1), 2);
    MUST(close(accept_one(l)));
    EQ(poll(p, 2, 0), 0);
    MUST(close(s));
    MUST(close(c));
    reap(kernel);
    del(out, in);
    c = client_of(l);
    one(in, l, EPOLLIN, -1);
    none(out);
}

CASE(poll_of_a_set_that_gets_a_socket_meanwhile)
{
    int fds[2], p[2], ep = make();
    tcp_pair(fds);
    MUST(pipe(p));
    struct pollfd f = {.fd = ep, .events = POLLIN};
    EQ(poll(&f, 1, 5), 0);
    EQ(write(p[1], "x", 1), 1);
    struct later it = {.ep = ep, .op = EPOLL_CTL_ADD, .fd = p[0], .events = EPOLLIN, .say = -1};
    pthread_t t = start(later, &it);
    EQ(poll(&f, 1, -1), 1);
    pthread_join(t, NULL);
    del(ep, p[0]);
    EQ(poll(&f, 1, 5), 0);
    says(fds[0], "x");
    it.fd = fds[1];
    t = start(later, &it);
    EQ(poll(&f, 1, -1), 1);
    pthread_join(t, NULL);
    EQ(f.revents, POLLIN);
    one(ep, fds[1], EPOLLIN, 0);
    hears(fds[1], "x");
    EQ(poll(&f, 1, 0), 0);
}

CASE(poll_of_hundreds)
{
    enum { PAIRS = 90, PIPES = 30 };
    static struct pollfd p[2 * PAIRS + PIPES + 1];
    int fds[PAIRS][2], pipes[PIPES][2], n = 0;
    for (int i = 0; i < PAIRS; i++) {
        tcp_pair(fds[i]);
        for (int k = 0; k < 2; k++)
            p[n++] = (struct pollfd){.fd = fds[i][k], .events = POLLIN};
    }
    for (int i = 0; i < PIPES; i++) {
        MUST(pipe(pipes[i]));
        p[n++] = (struct pollfd){.fd = pipes[i][0], .events = POLLIN};
    }
    p[n++] = (struct pollfd){.fd = -1, .events = POLLIN, .revents = 99};
    EQ(poll(p, (nfds_t)n, 5), 0);
    EQ(p[n - 1].revents, 0);
    struct later it = {.ep = -1, .say = fds[77][0]};
    pthread_t t = start(later, &it);
    EQ(poll(p, (nfds_t)n, -1), 1);
    EQ(p[2 * 77 + 1].revents, POLLIN);
    pthread_join(t, NULL);
    EQ(write(pipes[29][1], "x", 1), 1);
    EQ(poll(p, (nfds_t)n, -1), 2);
    EQ(p[2 * PAIRS + 29].revents, POLLIN);
    MUST(close(pipes[3][0]));
    EQ(poll(p, (nfds_t)n, -1), 3);
    EQ(p[2 * PAIRS + 3].revents, POLLNVAL);
}

CASE(select_of_what_it_does_not_mean)
{
    int fds[2], p[2];
    fd_set in, ex;
    struct timeval t = {.tv_usec = 1060000}; /* more than a second's */
    tcp_pair(fds);
    MUST(pipe(p));
    MUST(close(p[1])); /* POLLHUP: no exception of select()'s */
    FD_ZERO(&ex);
    FD_SET(p[0], &ex);
    FD_SET(fds[0], &ex);
    t.tv_usec = 60000;
    int64_t since = now_ms();
    EQ(select(fds[1] + p[0] + 1, NULL, NULL, &ex, &t), 0);
    CHECK(now_ms() - since >= 59);
    EQ(t.tv_sec * 1000000 + t.tv_usec, 0);
    CHECK(!FD_ISSET(p[0], &ex));
    FD_ZERO(&in);
    FD_SET(fds[1], &in);
    t = (struct timeval){.tv_sec = 1, .tv_usec = 5000000};
    says(fds[0], "x");
    EQ(select(fds[1] + 1, &in, NULL, NULL, &t), 1);
    CHECK(t.tv_sec <= 6 && t.tv_usec < 1000000);
    MUST(close(p[0]));
    FD_SET(p[0], &in);
    FAILS(EBADF, select(fds[1] + p[0] + 1, &in, NULL, NULL, NULL));
    t.tv_usec = -1;
    FAILS(EINVAL, select(fds[1] + 1, &in, NULL, NULL, &t));
    FAILS(EINVAL, select(-1, &in, NULL, NULL, NULL));
}

/* ---- Many ---- */
CASE(a_thousand_sockets_one_set)
{
    enum { PAIRS = 500 };
    static int fds[PAIRS][2];
    static struct epoll_event e[PAIRS + 1];
    static bool seen[4096];
    int ep = make(), l = listener(PAIRS), got = 0;
    for (int i = 0; i < PAIRS; i++) {
        fds[i][0] = client_of(l);
        fds[i][1] = accept_one(l);
        add(ep, fds[i][1], EPOLLIN | EPOLLET);
    }
    for (int i = 0; i < PAIRS; i++)
        says(fds[i][0], "x");
    while (got < PAIRS) {
        long n = MUST(epoll_wait(ep, e, 37, -1));
        for (int i = 0; i < n; i++, got++) {
            EQ(e[i].events, EPOLLIN);
            CHECK(!seen[fd_of(&e[i])]);
            seen[fd_of(&e[i])] = true;
        }
    }
    none(ep);
    for (int i = 0; i < PAIRS; i += 2)
        MUST(close(fds[i][0]));
    for (got = 0; got < PAIRS / 2;) {
        long n = MUST(epoll_wait(ep, e, PAIRS + 1, -1));
        for (int i = 0; i < n; i++, got++)
            EQ(recv(fd_of(&e[i]), &(char){0}, 1, 0), 1);
    }
}

/* ---- Processes ---- */
static void child_of_its_own(int ep, int fd)
{
    int own = make();
    MUST(close(ep));
    add(own, fd, EPOLLIN);
    one(own, fd, EPOLLIN, -1);
    hears(fd, "for the child");
    says(fd, "heard");
}

CASE(a_child_has_a_set_of_its_own)
{
    int a[2], b[2], ep = make();
    tcp_pair(a);
    tcp_pair(b);
    add(ep, a[1], EPOLLIN);
    pid_t pid = forked(child_of_its_own, ep, b[1]);
    nap_ms(50);
    says(b[0], "for the child");
    hears(b[0], "heard");
    reap(pid);
    says(a[0], "x");
    one(ep, a[1], EPOLLIN, -1);
    hears(a[1], "x");
}

static void child_hears_no_echo(int ep, int fd)
{
    struct pollfd f = {.fd = ep, .events = POLLIN};
    EQ(poll(&f, 1, 0), 0);
    none(ep);
    says(fd, "go on");
    one(ep, fd, EPOLLIN, -1);
    hears(fd, "xy");
}

CASE(an_edge_is_not_told_again_to_a_child)
{
    int a[2], ep = make();
    tcp_pair(a);
    add(ep, a[1], EPOLLIN | EPOLLET);
    says(a[0], "x");
    one(ep, a[1], EPOLLIN, -1);
    pid_t pid = forked(child_hears_no_echo, ep, a[1]);
    hears(a[0], "go on");
    says(a[0], "y");
    reap(pid);
}

CASE(a_listener_that_was_shut_down)
{
    int l = listener(8), ep = make();
    add(ep, l, EPOLLIN | EPOLLOUT);
    none(ep);
    MUST(shutdown(l, SHUT_RD));
    EQ(ready(l), POLLOUT | POLLHUP);
    one(ep, l, EPOLLOUT | EPOLLHUP, 0);
}

static void child_waits_too(int ep, int fd)
{
    one(ep, fd, EPOLLIN, -1);
    hears(fd, "x");
}

CASE(a_child_waits_in_its_parents_set)
{
    int a[2], p[2], ep = make();
    tcp_pair(a);
    MUST(pipe(p));
    add(ep, a[1], EPOLLIN);
    pid_t pid = forked(child_waits_too, ep, a[1]);
    nap_ms(50);
    says(a[0], "x");
    reap(pid);
    none(ep);
    add(ep, p[0], EPOLLIN);
    EQ(write(p[1], "y", 1), 1);
    one(ep, p[0], EPOLLIN, -1);
    says(a[0], "z");
    wait_ready(a[1], POLLIN);
    struct epoll_event e[4];
    EQ(epoll_wait(ep, e, 4, -1), 2);
}

int main(int argc, char **argv)
{
    if (argc == 3 && argv[1][0] == '-')
        return outside(argv[1], argv[2]);
    return posix_main(argc, argv);
}
