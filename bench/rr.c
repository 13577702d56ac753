/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rr.c - a server as any program has one, which knows nothing of bypass: sends back what it reads.
 *
 *   rr ADDRESS PORT THREADS
 *
 * Each thread has a listening socket of its own (SO_REUSEPORT, socket(7)) and an epoll instance. THREADS 0: a thread for
 * each connection, and calls that block, as netperf's server has it. Ends by a signal.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MAX_THREADS = 64, MAX_EVENTS = 64, BACKLOG = 1024 };

static struct sockaddr_in where = {.sin_family = AF_INET};

static void die(const char *what)
{
    fprintf(stderr, "rr: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int open_listener(void)
{
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        die("socket");
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)&where, sizeof where) < 0)
        die("bind");
    if (listen(fd, BACKLOG) < 0)
        die("listen");
    return fd;
}

static void watch(int epoll, int fd)
{
    struct epoll_event ev = {.events = EPOLLIN, .data.fd = fd};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &ev) < 0)
        die("epoll_ctl");
}

static void take(int epoll, int listener)
{
    int one = 1, fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0) {
        if (errno == ECONNABORTED || errno == EINTR || errno == EAGAIN)
            return;
        die("accept");
    }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    watch(epoll, fd);
}

static void serve(int fd)
{
    char buf[4096];
    ssize_t n = read(fd, buf, sizeof buf);
    if (n <= 0 || write(fd, buf, (size_t)n) != n) /* (a request is small: it is taken whole) */
        close(fd);
}

static void *run(void *arg)
{
    struct epoll_event ev[MAX_EVENTS];
    int listener = *(int *)arg, epoll = epoll_create1(EPOLL_CLOEXEC);
    if (epoll < 0)
        die("epoll_create1");
    watch(epoll, listener);
    for (;;) {
        int n = epoll_wait(epoll, ev, MAX_EVENTS, -1);
        if (n < 0 && errno != EINTR)
            die("epoll_wait");
        for (int i = 0; i < n; i++) {
            if (ev[i].data.fd == listener)
                take(epoll, listener);
            else
                serve(ev[i].data.fd);
        }
    }
    return NULL;
}

static void *block(void *arg)
{
    int one = 1, fd = *(int *)arg;
    char buf[4096];
    ssize_t n;
    free(arg);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    while ((n = recv(fd, buf, sizeof buf, 0)) > 0 && send(fd, buf, (size_t)n, MSG_NOSIGNAL) == n)
        continue;
    close(fd);
    return NULL;
}

static void run_blocking(int listener)
{
    for (;;) {
        pthread_t thread;
        int *fd = malloc(sizeof *fd);
        if (!fd || (*fd = accept(listener, NULL, NULL)) < 0)
            die("accept");
        errno = pthread_create(&thread, NULL, block, fd);
        if (errno)
            die("pthread_create");
        pthread_detach(thread);
    }
}

int main(int argc, char **argv)
{
    static int listeners[MAX_THREADS];
    int threads = argc == 4 ? atoi(argv[3]) : -1;
    if (threads < 0 || threads > MAX_THREADS || inet_pton(AF_INET, argv[1], &where.sin_addr) != 1) {
        fprintf(stderr, "usage: rr ADDRESS PORT THREADS (0 to %d)\n", MAX_THREADS);
        return 2;
    }
    where.sin_port = htons((uint16_t)atoi(argv[2]));
    if (threads == 0)
        run_blocking(open_listener());
    for (int i = 0; i < threads; i++)
        listeners[i] = open_listener();
    for (int i = 1; i < threads; i++) {
        pthread_t thread;
        errno = pthread_create(&thread, NULL, run, &listeners[i]);
        if (errno)
            die("pthread_create");
    }
    run(&listeners[0]);
    return 0;
}
