/* SPDX-License-Identifier: Apache-2.0 */
/*
 * server_kernel.c - the benchmark's server on kernel sockets and epoll: echo (UDP and TCP), discard, chargen.
 * Prints "ready" and serves until its standard input ends.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "ports.h"

enum { BULK = 262144, EVENTS = 64 };
enum kind { INPUT, UDP, LISTEN_ECHO, LISTEN_DISCARD, LISTEN_CHARGEN, ECHO, DISCARD, CHARGEN };

static uint8_t buf[BULK];
static int epoll;

static void die(const char *what)
{
    fprintf(stderr, "server_kernel: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void watch(int fd, enum kind kind, uint32_t events)
{
    struct epoll_event ev = {.events = events, .data.u64 = (uint64_t)kind << 32 | (uint32_t)fd};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &ev) < 0)
        die("epoll");
}

static void open_port(int type, int port, enum kind kind)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    int one = 1, fd = socket(AF_INET, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) < 0 ||
        bind(fd, (struct sockaddr *)&a, sizeof a) < 0 || (type == SOCK_STREAM && listen(fd, 1024) < 0))
        die("port");
    watch(fd, kind, EPOLLIN);
}

static void take_connection(int listener, enum kind kind)
{
    int one = 1, fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0) {
        if (errno != EAGAIN && errno != ECONNABORTED)
            die("accept");
        return;
    }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    watch(fd, kind + (ECHO - LISTEN_ECHO), kind == LISTEN_CHARGEN ? EPOLLOUT : EPOLLIN);
}

static void udp_echo(int fd)
{
    struct sockaddr_in from;
    for (;;) {
        socklen_t len = sizeof from;
        ssize_t n = recvfrom(fd, buf, sizeof buf, 0, (struct sockaddr *)&from, &len);
        if (n < 0)
            return;
        (void)!sendto(fd, buf, (size_t)n, 0, (struct sockaddr *)&from, len);
    }
}

static void serve(int fd, enum kind kind)
{
    ssize_t n = kind == CHARGEN ? 1 : recv(fd, buf, kind == ECHO ? 4096 : sizeof buf, 0);
    if (n > 0 && kind != DISCARD)
        n = send(fd, buf, kind == ECHO ? (size_t)n : sizeof buf, MSG_NOSIGNAL);
    if (n == 0 || (n < 0 && errno != EAGAIN))
        close(fd);
}

int main(void)
{
    struct epoll_event ev[EVENTS];
    epoll = epoll_create1(EPOLL_CLOEXEC);
    open_port(SOCK_DGRAM, PORT_ECHO, UDP);
    open_port(SOCK_STREAM, PORT_ECHO, LISTEN_ECHO);
    open_port(SOCK_STREAM, PORT_DISCARD, LISTEN_DISCARD);
    open_port(SOCK_STREAM, PORT_CHARGEN, LISTEN_CHARGEN);
    watch(STDIN_FILENO, INPUT, EPOLLIN);
    puts("ready");
    fflush(stdout);
    for (;;) {
        int n = epoll_wait(epoll, ev, EVENTS, -1);
        for (int i = 0; i < n; i++) {
            int fd = (int)(uint32_t)ev[i].data.u64;
            enum kind kind = (enum kind)(ev[i].data.u64 >> 32);
            if (kind == INPUT)
                return 0;
            if (kind == UDP)
                udp_echo(fd);
            else if (kind <= LISTEN_CHARGEN)
                take_connection(fd, kind);
            else
                serve(fd, kind);
        }
    }
}
