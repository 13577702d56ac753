/* SPDX-License-Identifier: Apache-2.0 */
/*
 * closer.c - see closer.h. A thread lives while there is something to close; of those that are stuck there are at most
 * THREADS, and then descriptors wait in the queue. It is a list of what was handed over, in order.
 */
#define _GNU_SOURCE
#include "closer.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

enum { THREADS = 16, STACK = 65536 };

struct job {
    struct job *next;
    int n;
    int fds[];
};

static pthread_mutex_t lock =
    PTHREAD_MUTEX_INITIALIZER; /* held for a few instructions, never across a call that waits */
static struct job *first, **last = &first;
static int threads;

static struct job *take(void)
{
    struct job *job;

    pthread_mutex_lock(&lock);
    job = first;
    if (job) {
        first = job->next;
        last = first ? last : &first;
    } else {
        threads--;
    }
    pthread_mutex_unlock(&lock);
    return job;
}

static void *work(void *unused)
{
    struct job *job;

    (void)unused;
    while ((job = take())) {
        for (int i = 0; i < job->n; i++) {
            close(job->fds[i]);
        }
        free(job);
    }
    return NULL;
}

static bool start(void)
{
    pthread_attr_t attr;
    pthread_t thread;
    bool ok;

    pthread_attr_init(&attr);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attr, STACK);
    ok = pthread_create(&thread, &attr, work, NULL) == 0;
    pthread_attr_destroy(&attr);
    return ok;
}

static bool option(int fd, int level, int name, void *value, socklen_t len)
{
    return getsockopt(fd, level, name, value, &len) == 0;
}

/* An Internet socket that has no connection: its close waits for nobody. (With one it may linger, socket(7), if its owner
 * says so even now.) */
static bool closes_at_once(int fd)
{
    int domain, protocol;
    uint8_t state; /* what struct tcp_info begins with */

    return option(fd, SOL_SOCKET, SO_DOMAIN, &domain, sizeof domain) && (domain == AF_INET || domain == AF_INET6) &&
           option(fd, SOL_SOCKET, SO_PROTOCOL, &protocol, sizeof protocol) &&
           (protocol == IPPROTO_UDP || (protocol == IPPROTO_TCP && option(fd, IPPROTO_TCP, TCP_INFO, &state, 1) &&
                                        (state == TCP_CLOSE || state == TCP_LISTEN)));
}

void close_later(const int *fds, int n)
{
    struct job *job = n ? malloc(sizeof *job + (size_t)n * sizeof *fds) : NULL;
    bool more;

    if (!job) {
        return; /* without memory they stay open: that is less harm than to wait */
    }
    job->next = NULL;
    job->n = 0;
    for (int i = 0; i < n; i++) {
        if (fds[i] >= 0 && closes_at_once(fds[i])) {
            close(fds[i]); /* a port that is given back may be bound again when the answer is there */
        } else if (fds[i] >= 0) {
            job->fds[job->n++] = fds[i];
        }
    }
    if (job->n == 0) {
        free(job);
        return;
    }
    pthread_mutex_lock(&lock);
    *last = job;
    last = &job->next;
    more = threads < THREADS;
    threads += more;
    pthread_mutex_unlock(&lock);
    if (more && !start()) {
        pthread_mutex_lock(&lock);
        threads--;
        pthread_mutex_unlock(&lock);
    }
}
