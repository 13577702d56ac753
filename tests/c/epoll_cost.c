/* SPDX-License-Identifier: Apache-2.0 */
/*
 * epoll_cost.c - what epoll_wait() costs with one busy connection among idle ones, for callgrind to count.
 *
 *   valgrind --tool=callgrind --collect-atstart=no epoll_cost IDLE EVENTS edge|level
 */
#include <sys/epoll.h>
#include <valgrind/callgrind.h>

#include "posix.h"

int main(int argc, char **argv)
{
    if (argc < 4)
        return 2;
    int idle = atoi(argv[1]), events = atoi(argv[2]), ep = (int)MUST(epoll_create1(0)), fds[2] = {-1, -1};
    uint32_t edge = strcmp(argv[3], "edge") == 0 ? EPOLLET : 0;
    char c;

    for (int i = 0; i <= idle; i++) { /* the last one is busy */
        tcp_pair(fds);
        set_option(fds[0], IPPROTO_TCP, TCP_NODELAY, 1); /* nobody answers: Nagle would wait for ACKs */
        struct epoll_event e = {.events = EPOLLIN | edge, .data.fd = fds[1]};
        MUST(epoll_ctl(ep, EPOLL_CTL_ADD, fds[1], &e));
    }
    for (int i = 0; i < events; i++) {
        struct epoll_event e[16];
        says(fds[0], "x");
        CALLGRIND_TOGGLE_COLLECT;
        int n = epoll_wait(ep, e, 16, -1);
        CALLGRIND_TOGGLE_COLLECT;
        EQ(n, 1);
        EQ(e->data.fd, fds[1]);
        EQ(recv(fds[1], &c, 1, 0), 1);
    }
    printf("%d\n", events);
    return 0;
}
