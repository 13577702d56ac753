/* SPDX-License-Identifier: Apache-2.0 */
/* Sets of epoll in the program after exec: what was in them is, and what was told is not told again. Frame: posix.h. */
#include <sys/epoll.h>
#include <sys/ioctl.h>

#include "posix.h"

enum { NUMBERS = 8 };

/* The same process, another program: it goes on with after_NAME(). */
static void becomes(const char *name, const int *fds, int n)
{
    char text[NUMBERS][12], *argv[NUMBERS + 4] = {posix_self, (char *)"--after", (char *)name};
    for (int i = 0; i < n; i++) {
        snprintf(text[i], sizeof(text[i]), "%d", fds[i]);
        argv[3 + i] = text[i];
    }
    execv(posix_self, argv);
    posix_fail(__FILE__, __LINE__, "execv", -1, errno);
}
#define BECOMES(NAME, ...)                                                                                             \
    do {                                                                                                               \
        const int fds_[] = {__VA_ARGS__};                                                                              \
        becomes(NAME, fds_, sizeof(fds_) / sizeof(*fds_));                                                             \
    } while (0)

static void add(int ep, int fd, uint32_t events, uint64_t data)
{
    struct epoll_event e = {.events = events, .data.u64 = data};
    MUST(epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e));
}

static void change(int ep, int fd, uint32_t events, uint64_t data)
{
    struct epoll_event e = {.events = events, .data.u64 = data};
    MUST(epoll_ctl(ep, EPOLL_CTL_MOD, fd, &e));
}

/* One event comes, and it is this one. */
static void tells(int ep, uint64_t data, uint32_t events)
{
    struct epoll_event e[4];
    EQ(epoll_wait(ep, e, 4, -1), 1);
    EQ(e[0].data.u64, data);
    EQ(e[0].events, events);
}

static void tells_nothing(int ep)
{
    struct epoll_event e;
    EQ(epoll_wait(ep, &e, 1, 30), 0);
}

static void there_already(int ep, int fd)
{
    struct epoll_event e = {.events = EPOLLIN};
    FAILS(EEXIST, epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e));
}

/* ---- */
CASE(a_connection)
{
    int fds[2], ep = (int)MUST(epoll_create1(0));
    tcp_pair(fds);
    add(ep, fds[0], EPOLLIN, 0x1234567890);
    BECOMES("a_connection", ep, fds[0], fds[1]);
}

static void after_a_connection(const int *fd)
{
    there_already(fd[0], fd[1]);
    tells_nothing(fd[0]);
    says(fd[2], "x");
    tells(fd[0], 0x1234567890, EPOLLIN);
    change(fd[0], fd[1], EPOLLOUT, 7);
    tells(fd[0], 7, EPOLLOUT);
    MUST(epoll_ctl(fd[0], EPOLL_CTL_DEL, fd[1], NULL));
    tells_nothing(fd[0]);
    FAILS(ENOENT, epoll_ctl(fd[0], EPOLL_CTL_DEL, fd[1], NULL));
}

CASE(edges_and_one_shots)
{
    int told[2], untold[2], fired[2], ep = (int)MUST(epoll_create1(0));
    tcp_pair(told);
    tcp_pair(untold);
    tcp_pair(fired);
    add(ep, told[0], EPOLLIN | EPOLLET, 1);
    says(told[1], "x");
    tells(ep, 1, EPOLLIN);
    add(ep, fired[0], EPOLLIN | EPOLLONESHOT, 3);
    says(fired[1], "x");
    tells(ep, 3, EPOLLIN);
    add(ep, untold[0], EPOLLIN | EPOLLET, 2);
    says(untold[1], "x");
    wait_ready(untold[0], POLLIN);
    BECOMES("edges_and_one_shots", ep, told[0], told[1], untold[0], untold[1], fired[0], fired[1]);
}

static void after_edges_and_one_shots(const int *fd)
{
    tells(fd[0], 2, EPOLLIN);
    tells_nothing(fd[0]);
    says(fd[2], "y"); /* something new, of each */
    tells(fd[0], 1, EPOLLIN);
    says(fd[6], "y");
    wait_ready(fd[5], POLLIN);
    tells_nothing(fd[0]);
    change(fd[0], fd[5], EPOLLIN | EPOLLONESHOT, 4);
    tells(fd[0], 4, EPOLLIN);
    tells_nothing(fd[0]);
}

CASE(listeners_datagrams_files_and_fresh_ones)
{
    int ep = (int)MUST(epoll_create1(0)), l = listener(4), udp = bound(SOCK_DGRAM), p[2];
    int fresh = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    MUST(pipe(p));
    add(ep, l, EPOLLIN, 1);
    add(ep, udp, EPOLLIN, 2);
    add(ep, p[0], EPOLLIN, 3);
    add(ep, fresh, EPOLLIN, 4);
    tells(ep, 4, EPOLLHUP); /* not connected */
    BECOMES("listeners_datagrams_files_and_fresh_ones", ep, l, udp, p[0], p[1], fresh);
}

static void after_listeners_datagrams_files_and_fresh_ones(const int *fd)
{
    struct sockaddr_in at = name_of(fd[1]), to = name_of(fd[2]);
    char c;
    tells(fd[0], 4, EPOLLHUP);
    MUST(connect(fd[5], (struct sockaddr *)&at, sizeof(at)));
    tells(fd[0], 1, EPOLLIN);
    int got = accept_one(fd[1]);
    tells_nothing(fd[0]);
    says(got, "x");
    tells(fd[0], 4, EPOLLIN);
    hears(fd[5], "x");
    EQ(sendto(fd[2], "x", 1, 0, (struct sockaddr *)&to, sizeof(to)), 1);
    tells(fd[0], 2, EPOLLIN);
    EQ(recv(fd[2], &c, 1, 0), 1);
    EQ(write(fd[4], "x", 1), 1);
    tells(fd[0], 3, EPOLLIN);
}

CASE(a_set_in_a_set)
{
    int fds[2], outer = (int)MUST(epoll_create1(0)), inner = (int)MUST(epoll_create1(0));
    tcp_pair(fds);
    add(outer, inner, EPOLLIN, 1);
    add(inner, fds[0], EPOLLIN, 2);
    BECOMES("a_set_in_a_set", outer, inner, fds[0], fds[1]);
}

static void after_a_set_in_a_set(const int *fd)
{
    there_already(fd[0], fd[1]);
    there_already(fd[1], fd[2]);
    tells_nothing(fd[0]);
    says(fd[3], "x");
    tells(fd[0], 1, EPOLLIN);
    tells(fd[1], 2, EPOLLIN);
}

CASE(what_is_closed_by_exec_leaves)
{
    int ep = (int)MUST(epoll_create1(EPOLL_CLOEXEC)), copy, gone[2], stays[2];
    tcp_pair(gone);
    tcp_pair(stays);
    add(ep, gone[0], EPOLLIN | EPOLLRDHUP, 1);
    add(ep, stays[0], EPOLLIN | EPOLLRDHUP, 2);
    copy = (int)MUST(dup(ep)); /* without the mark */
    MUST(fcntl(gone[0], F_SETFD, FD_CLOEXEC));
    BECOMES("what_is_closed_by_exec_leaves", ep, copy, gone[0], gone[1], stays[0], stays[1]);
}

static void after_what_is_closed_by_exec_leaves(const int *fd)
{
    FAILS(EBADF, fcntl(fd[0], F_GETFD));
    FAILS(EBADF, fcntl(fd[2], F_GETFD));
    hears_end(fd[3]);
    tells_nothing(fd[1]);
    there_already(fd[1], fd[4]);
    says(fd[5], "x");
    tells(fd[1], 2, EPOLLIN);
}

CASE(two_numbers_of_a_set)
{
    int ep = (int)MUST(epoll_create1(0)), copy = (int)MUST(dup(ep)), fds[2];
    tcp_pair(fds);
    add(ep, fds[0], EPOLLIN, 1);
    BECOMES("two_numbers_of_a_set", ep, copy, fds[0], fds[1]);
}

static void after_two_numbers_of_a_set(const int *fd)
{
    there_already(fd[0], fd[2]);
    there_already(fd[1], fd[2]);
    MUST(close(fd[0]));
    says(fd[3], "x");
    tells(fd[1], 1, EPOLLIN);
    MUST(epoll_ctl(fd[1], EPOLL_CTL_DEL, fd[2], NULL));
    tells_nothing(fd[1]);
}

CASE(exec_that_fails_changes_nothing)
{
    int ep = (int)MUST(epoll_create1(0)), fds[2], before, after;
    tcp_pair(fds);
    add(ep, fds[0], EPOLLIN, 1);
    before = (int)MUST(dup(ep));
    MUST(close(before));
    FAILS(ENOENT, execl("/nonexistent", "nonexistent", NULL));
    after = (int)MUST(dup(ep));
    EQ(after, before);
    says(fds[1], "x");
    tells(ep, 1, EPOLLIN);
}

static const struct {
    const char *name;
    void (*run)(const int *);
} afters[] = {
    {"a_connection", after_a_connection},
    {"edges_and_one_shots", after_edges_and_one_shots},
    {"listeners_datagrams_files_and_fresh_ones", after_listeners_datagrams_files_and_fresh_ones},
    {"a_set_in_a_set", after_a_set_in_a_set},
    {"what_is_closed_by_exec_leaves", after_what_is_closed_by_exec_leaves},
    {"two_numbers_of_a_set", after_two_numbers_of_a_set},
};

int main(int argc, char **argv)
{
    int fds[NUMBERS] = {0};
    if (argc < 3 || strcmp(argv[1], "--after") != 0)
        return posix_main(argc, argv);
    for (int i = 3; i < argc && i < NUMBERS + 3; i++)
        fds[i - 3] = atoi(argv[i]);
    for (size_t i = 0; i < sizeof(afters) / sizeof(*afters); i++) {
        if (strcmp(afters[i].name, argv[2]) == 0) {
            afters[i].run(fds);
            printf("ok %s\n", argv[2]);
            return 0;
        }
    }
    return 2;
}
