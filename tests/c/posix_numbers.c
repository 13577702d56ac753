/* SPDX-License-Identifier: Apache-2.0 */
/* Descriptors by number: who closes what is not his, duplicates under use, flags, queues by ioctl. Frame: posix.h. */
#include <linux/close_range.h>
#include <linux/sockios.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>

#include "posix.h"

static void pair_works(void)
{
    int fds[2];

    tcp_pair(fds);
    says(fds[0], "there");
    hears(fds[1], "there");
    says(fds[1], "and back");
    hears(fds[0], "and back");
    MUST(close(fds[0]));
    hears_end(fds[1]);
    MUST(close(fds[1]));
}

/* ---- Programs that close all that they do not know ---- */
CASE(closing_every_number_by_hand)
{
    pair_works();
    for (int fd = 3; fd < 5000; fd++)
        close(fd);
    pair_works();
}

CASE(closing_every_number_from_the_top)
{
    int fds[2];
    tcp_pair(fds);
    for (int fd = 5000; fd >= 3; fd--)
        if (fd != fds[0] && fd != fds[1])
            close(fd);
    says(fds[0], "still");
    hears(fds[1], "still");
}

CASE(closefrom_and_close_range_of_all)
{
    int fds[2];
    pair_works();
    closefrom(3);
    pair_works();
    tcp_pair(fds);
    MUST(close_range(3, ~0u, 0));
    FAILS(EBADF, fcntl(fds[0], F_GETFD));
    pair_works();
    MUST(close_range(3, ~0u, CLOSE_RANGE_UNSHARE));
    pair_works();
}

CASE(close_on_exec_of_all)
{
    int fds[2];
    tcp_pair(fds);
    MUST(close_range(3, ~0u, CLOSE_RANGE_CLOEXEC));
    EQ(fcntl(fds[0], F_GETFD), FD_CLOEXEC);
    says(fds[0], "open");
    hears(fds[1], "open");
    pair_works();
    FAILS(EINVAL, close_range(3, ~0u, 1 << 10));
    FAILS(EINVAL, close_range(4, 3, CLOSE_RANGE_CLOEXEC));
}

CASE(the_peer_hears_of_a_range_that_is_closed)
{
    int a[2], b[2];
    tcp_pair(a);
    tcp_pair(b);
    EQ(dup2(a[0], 300), 300);
    EQ(dup2(b[0], 301), 301);
    MUST(close(a[0]));
    MUST(close(b[0]));
    MUST(close_range(300, 400, 0));
    hears_end(a[1]);
    hears_end(b[1]);
}

/* ---- A number that changes what it means while it is used ---- */
enum { SWAPS = 2000 };
static int number;
static atomic_bool over;

static void *sends(void *arg)
{
    long *sent = arg;
    while (!atomic_load(&over)) {
        EQ(send(number, "x", 1, MSG_NOSIGNAL), 1);
        ++*sent;
        if (*sent % 64 == 0)
            nap_ms(1);
    }
    return NULL;
}

static long all_of(int fd)
{
    char room[4096];
    long all = 0, n;
    while ((n = MUST(recv(fd, room, sizeof(room), 0))) > 0)
        all += n;
    return all;
}

CASE(a_number_is_replaced_under_use)
{
    int a[2], b[2];
    long sent = 0;
    pthread_t thread;
    tcp_pair(a);
    tcp_pair(b);
    number = (int)MUST(fcntl(a[0], F_DUPFD, 500));
    CHECK(pthread_create(&thread, NULL, sends, &sent) == 0);
    for (int i = 0; i < SWAPS; i++)
        EQ(dup2(i % 2 ? a[0] : b[0], number), number);
    atomic_store(&over, true);
    CHECK(pthread_join(thread, NULL) == 0);
    MUST(close(number));
    MUST(close(a[0]));
    MUST(close(b[0]));
    EQ(all_of(a[1]) + all_of(b[1]), sent);
}

CASE(a_file_and_a_socket_take_turns)
{
    int fds[2], p[2];
    char c;
    tcp_pair(fds);
    MUST(pipe(p));
    number = (int)MUST(fcntl(fds[0], F_DUPFD, 500));
    for (int i = 0; i < 50; i++) {
        EQ(dup2(p[1], number), number);
        EQ(write(number, "p", 1), 1);
        EQ(read(p[0], &c, 1), 1);
        EQ(dup2(fds[0], number), number);
        EQ(write(number, "s", 1), 1);
        EQ(recv(fds[1], &c, 1, 0), 1);
        EQ(c, 's');
    }
    EQ(dup3(p[1], number, O_CLOEXEC), number);
    EQ(fcntl(number, F_GETFD), FD_CLOEXEC);
    MUST(close(fds[0])); /* the last one that named the socket */
    hears_end(fds[1]);
}

CASE(dup2_over_the_last_descriptor_of_a_listener)
{
    int l = listener(4), n = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    struct sockaddr_in a = name_of(l);
    MUST(close(connect_to(a)));
    EQ(dup2(0, l), l);
    FAILS(ECONNREFUSED, connect(n, (struct sockaddr *)&a, sizeof(a)));
    pair_works();
}

CASE(dup2_that_fails_changes_nothing)
{
    int fds[2];
    tcp_pair(fds);
    FAILS(EBADF, dup2(fds[0], -1));
    FAILS(EBADF, dup2(fds[0], 1 << 30));
    FAILS(EBADF, dup2(997, fds[0]));
    FAILS(EINVAL, dup3(fds[0], 600, O_APPEND));
    FAILS(EINVAL, fcntl(fds[0], F_DUPFD, -1));
    FAILS(EBADF, fcntl(600, F_GETFD));
    says(fds[0], "here");
    hears(fds[1], "here");
}

CASE(duplicates_of_an_epoll_set)
{
    int fds[2], ep = (int)MUST(epoll_create1(0)), d, e;
    struct epoll_event ev = {.events = EPOLLIN, .data.u32 = 7}, got;
    tcp_pair(fds);
    d = (int)MUST(dup(ep));
    MUST(epoll_ctl(d, EPOLL_CTL_ADD, fds[1], &ev));
    EQ(epoll_wait(ep, &got, 1, 0), 0);
    says(fds[0], "x");
    EQ(epoll_wait(ep, &got, 1, -1), 1);
    EQ(got.data.u32, 7);
    MUST(close(ep));
    EQ(epoll_wait(d, &got, 1, -1), 1);
    e = (int)MUST(fcntl(d, F_DUPFD_CLOEXEC, 200));
    EQ(dup2(0, d), d);
    EQ(epoll_wait(e, &got, 1, -1), 1);
    MUST(close_range(200, 300, 0));
    FAILS(EBADF, epoll_wait(e, &got, 1, 0));
    hears(fds[1], "x");
}

/* ---- Flags ---- */
CASE(a_listener_blocks_as_it_was_told)
{
    int l = listener(4), off = 0;
    EQ(fcntl(l, F_GETFL), O_RDWR);
    nonblocking(l);
    FAILS(EAGAIN, accept(l, NULL, NULL));
    EQ(fcntl(l, F_GETFL), O_RDWR | O_NONBLOCK);
    MUST(ioctl(l, FIONBIO, &off));
    EQ(fcntl(l, F_GETFL), O_RDWR);
    set_timeout(l, SO_RCVTIMEO, 30);
    FAILS(EAGAIN, accept(l, NULL, NULL)); /* after it has waited */
    int c = client_of(l), s = accept_one(l);
    EQ(fcntl(s, F_GETFL), O_RDWR);
    says(c, "x");
    hears(s, "x");
}

CASE(a_datagram_socket_blocks_as_it_was_told)
{
    int u = bound(SOCK_DGRAM);
    char c;
    EQ(fcntl(u, F_GETFL), O_RDWR);
    MUST(fcntl(u, F_SETFL, O_NONBLOCK));
    FAILS(EAGAIN, recv(u, &c, 1, 0));
    MUST(fcntl(u, F_SETFL, 0));
    EQ(fcntl(u, F_GETFL), O_RDWR);
    set_timeout(u, SO_RCVTIMEO, 30);
    FAILS(EAGAIN, recv(u, &c, 1, 0));
}

static long timeout_ms(int fd, int name)
{
    struct timeval t = {0};
    socklen_t len = sizeof(t);
    MUST(getsockopt(fd, SOL_SOCKET, name, &t, &len));
    return t.tv_sec * 1000 + t.tv_usec / 1000;
}

CASE(timeouts_are_inherited_and_flags_are_not)
{
    int l = listener(4);
    char c;
    set_timeout(l, SO_RCVTIMEO, 40);
    set_timeout(l, SO_SNDTIMEO, 2000);
    int a = client_of(l), s = accept_one(l);
    EQ(timeout_ms(s, SO_RCVTIMEO), 40);
    EQ(timeout_ms(s, SO_SNDTIMEO), 2000);
    EQ(timeout_ms(a, SO_SNDTIMEO), 0);
    FAILS(EAGAIN, recv(s, &c, 1, 0)); /* after it has waited */
    nonblocking(l);
    int b = client_of(l);
    wait_ready(l, POLLIN);
    EQ(fcntl(accept_one(l), F_GETFL), O_RDWR);
    MUST(close(b));
}

CASE(a_timeout_of_less_than_nothing_does_not_wait)
{
    int fds[2];
    struct timeval before = {.tv_sec = -1};
    char c;
    tcp_pair(fds);
    MUST(setsockopt(fds[0], SOL_SOCKET, SO_RCVTIMEO, &before, sizeof(before)));
    FAILS(EAGAIN, recv(fds[0], &c, 1, 0));
    EQ(timeout_ms(fds[0], SO_RCVTIMEO), 0);
    set_timeout(fds[0], SO_RCVTIMEO, 0); /* none: it waits */
    says(fds[1], "x");
    hears(fds[0], "x");
}

static atomic_int told_of_io;
static void on_io(int sig) { atomic_store(&told_of_io, sig); }

CASE(signals_for_io)
{
    struct sockaddr_in a = loopback(0);
    int u = (int)MUST(socket(AF_INET, SOCK_DGRAM, 0)), v = (int)MUST(socket(AF_INET, SOCK_DGRAM, 0));
    struct sigaction on = {.sa_handler = on_io};
    pair_works();
    MUST(sigaction(SIGIO, &on, NULL));
    MUST(fcntl(u, F_SETOWN, getpid()));
    EQ(fcntl(u, F_GETOWN), getpid());
    MUST(fcntl(u, F_SETFL, O_ASYNC));
    EQ(fcntl(u, F_GETFL), O_RDWR | O_ASYNC);
    MUST(bind(u, (struct sockaddr *)&a, sizeof(a)));
    a = name_of(u);
    MUST(sendto(v, "x", 1, 0, (struct sockaddr *)&a, sizeof(a)));
    for (int i = 0; i < 5000 && !atomic_load(&told_of_io); i++)
        nap_ms(1);
    EQ(atomic_load(&told_of_io), SIGIO);
}

/* ---- Queues ---- */
static int queued(int fd, unsigned long request)
{
    int n = -1;
    MUST(ioctl(fd, request, &n));
    return n;
}

CASE(queues_of_streams)
{
    int fds[2], l = listener(1), n, fresh = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    char c;
    tcp_pair(fds);
    EQ(queued(fds[1], FIONREAD), 0);
    EQ(queued(fds[1], SIOCOUTQ), 0);
    EQ(queued(fds[1], SIOCOUTQNSD), 0);
    EQ(queued(fresh, FIONREAD), 0);
    says(fds[0], "four");
    wait_ready(fds[1], POLLIN);
    while (queued(fds[1], FIONREAD) < 4)
        nap_ms(1);
    EQ(recv(fds[1], &c, 1, 0), 1);
    EQ(queued(fds[1], FIONREAD), 3);
    EQ(queued(fds[0], FIONREAD), 0);
    EQ(queued(fds[1], SIOCATMARK), 0);
    FAILS(EINVAL, ioctl(l, FIONREAD, &n));
    FAILS(EINVAL, ioctl(l, SIOCOUTQ, &n));
    FAILS(EINVAL, ioctl(l, SIOCOUTQNSD, &n));
    FAILS(EFAULT, ioctl(fds[1], FIONREAD, NULL));
}

CASE(queues_of_datagrams)
{
    int us[2], n;
    char room[16];
    udp_pair(us);
    EQ(queued(us[1], FIONREAD), 0);
    EQ(send(us[0], "seven..", 7, 0), 7);
    EQ(send(us[0], "two", 2, 0), 2);
    wait_ready(us[1], POLLIN);
    EQ(queued(us[1], FIONREAD), 7);
    EQ(recv(us[1], room, sizeof(room), 0), 7);
    EQ(queued(us[1], FIONREAD), 2);
    FAILS(ENOTTY, ioctl(us[1], SIOCATMARK, &n));
}

CASE(the_mark_of_urgent_data)
{
    int fds[2];
    char c;
    tcp_pair(fds);
    EQ(sockatmark(fds[1]), 0);
    says(fds[0], "a");
    EQ(send(fds[0], "!", 1, MSG_OOB), 1);
    says(fds[0], "bc");
    wait_ready(fds[1], POLLPRI);
    while (ready(fds[1]) != (POLLIN | POLLOUT | POLLPRI))
        nap_ms(1);
    EQ(sockatmark(fds[1]), 0);
    EQ(queued(fds[1], FIONREAD), 1); /* up to the mark */
    hears(fds[1], "a");
    EQ(sockatmark(fds[1]), 1);
    EQ(queued(fds[1], FIONREAD), 0);
    EQ(recv(fds[1], &c, 1, MSG_OOB), 1);
    EQ(c, '!');
    EQ(queued(fds[1], FIONREAD), 0);
    hears(fds[1], "bc");
    EQ(queued(fds[1], FIONREAD), 0);
    EQ(sockatmark(fds[1]), 0);
    FAILS(ENOTTY, sockatmark(0));
}

int main(int argc, char **argv) { return posix_main(argc, argv); }
