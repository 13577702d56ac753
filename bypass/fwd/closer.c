/* SPDX-License-Identifier: Apache-2.0 */
/*
 * closer.c - see closer.h. A thread lives while there is something to close; of those that are stuck there are at most
 * THREADS, and then descriptors wait in the queue. It is a list of what was handed over, in order.
 */
#include "closer.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
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
            if (job->fds[i] >= 0) {
                close(job->fds[i]);
            }
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

void close_later(const int *fds, int n)
{
    struct job *job = n ? malloc(sizeof *job + (size_t)n * sizeof *fds) : NULL;
    bool more;

    if (!job) {
        return; /* without memory they stay open: that is less harm than to wait */
    }
    job->next = NULL;
    job->n = n;
    memcpy(job->fds, fds, (size_t)n * sizeof *fds);
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
