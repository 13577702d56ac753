/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Small writes in one direction, whoever waits for them and however, and small requests with small answers. Frame: posix.h.
 *
 * Nagle's algorithm (RFC 896) holds back each write until the one before is acknowledged: where the reader's side waits
 * for data to go with that (RFC 1122 4.2.3.2), each write takes 40 ms, and a case more than a minute.
 */
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/select.h>

#include "posix.h"

enum { WRITES = 2000, REQUESTS = 1000 };

typedef void wait_call(int fd, int ep);

static void not_at_all(int fd, int ep)
{
    (void)fd;
    (void)ep;
}

static void by_poll(int fd, int ep)
{
    (void)ep;
    CHECK(wait_ready(fd, POLLIN) & POLLIN);
}

static void by_poll_of_two(int fd, int ep)
{
    struct pollfd both[2] = {{.fd = ep, .events = POLLIN}, {.fd = fd, .events = POLLIN}};
    EQ(poll(both, 2, 20000), 1);
    EQ(both[1].revents, POLLIN);
}

static void by_select(int fd, int ep)
{
    fd_set in;
    FD_ZERO(&in);
    FD_SET(fd, &in);
    (void)ep;
    EQ(select(fd + 1, &in, NULL, NULL, &(struct timeval){.tv_sec = 20}), 1);
}

static void by_epoll(int fd, int ep)
{
    struct epoll_event e;
    (void)fd;
    EQ(epoll_wait(ep, &e, 1, 20000), 1);
    EQ(e.events, EPOLLIN);
}

static int set_of(int fd, uint32_t events)
{
    int ep = (int)MUST(epoll_create1(0));
    struct epoll_event e = {.events = events};
    if (events)
        MUST(epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e));
    return ep;
}

static void one_way(wait_call *waits, uint32_t events)
{
    int fds[2];
    char c;
    tcp_pair(fds);
    int ep = set_of(fds[1], events);
    for (int i = 0; i < WRITES; i++) {
        EQ(send(fds[0], "x", 1, 0), 1);
        waits(fds[1], ep);
        EQ(recv(fds[1], &c, 1, 0), 1);
    }
}

CASE(one_way_by_recv) { one_way(not_at_all, 0); }

CASE(one_way_by_poll) { one_way(by_poll, 0); }

CASE(one_way_by_poll_of_two) { one_way(by_poll_of_two, 0); }

CASE(one_way_by_select) { one_way(by_select, 0); }

CASE(one_way_by_epoll) { one_way(by_epoll, EPOLLIN); }

CASE(one_way_by_edges) { one_way(by_epoll, EPOLLIN | EPOLLET); }

/* Segments that left without data. Beyond what <netinet/tcp.h> has, as linux/tcp.h says. */
static uint32_t acknowledgments(int fd)
{
    struct {
        struct tcp_info info;
        uint64_t rates[2], bytes[2];
        uint32_t segs_out, segs_in, notsent_bytes, min_rtt, data_segs_in, data_segs_out;
    } told;
    socklen_t len = sizeof(told);
    MUST(getsockopt(fd, IPPROTO_TCP, TCP_INFO, &told, &len));
    EQ(len, sizeof(told));
    EQ(told.data_segs_out, REQUESTS);
    return told.segs_out - told.data_segs_out;
}

/* The answer carries the acknowledgment, and the next request the answer's. A busy machine may keep this thread for longer
 * than an acknowledgment is put off: not one time in ten. */
static void requests(wait_call *waits, uint32_t events)
{
    int fds[2];
    tcp_pair(fds);
    int ep = set_of(fds[1], events);
    for (int i = 0; i < REQUESTS; i++) {
        says(fds[0], "request");
        waits(fds[1], ep);
        hears(fds[1], "request");
        says(fds[1], "answer");
        hears(fds[0], "answer");
    }
    CHECK(acknowledgments(fds[0]) < REQUESTS / 10);
    CHECK(acknowledgments(fds[1]) < REQUESTS / 10);
}

CASE(requests_by_recv) { requests(not_at_all, 0); }

CASE(requests_by_poll) { requests(by_poll, 0); }

CASE(requests_by_epoll) { requests(by_epoll, EPOLLIN); }

CASE(requests_by_edges) { requests(by_epoll, EPOLLIN | EPOLLET); }

int main(int argc, char **argv) { return posix_main(argc, argv); }
