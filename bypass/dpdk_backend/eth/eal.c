/* SPDX-License-Identifier: Apache-2.0 */
/*
 * eal.c - starts DPDK's environment, once a process, without leaving its marks on the caller: the thread keeps its
 * affinity, messages go where the caller says. The first complaint is kept: it says best why something failed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <glob.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <rte_eal.h>
#include <rte_errno.h>
#include <rte_log.h>

#include "eth/port.h"

enum { MAX_ARGS = 64, LINE = 300 };

static struct {
    pthread_mutex_t lock;
    int state; /* 0: not tried; 1: started; -errno: failed, for good */
    int argc;
    char *argv[MAX_ARGS + 1]; /* ours: EAL keeps pointers into it */
    char *given[MAX_ARGS];    /* as they were given: EAL reorders its own */
} eal = {.lock = PTHREAD_MUTEX_INITIALIZER};

static struct {
    void (*sink)(int level, const char *text);
    char first[LINE]; /* complaint since log_mark(): those that follow say only what else failed for it */
} messages;

int complain(struct dpdk_error *error, int err, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vsnprintf(error->text, sizeof error->text, format, args);
    va_end(args);
    error->err = err;
    return err;
}

void log_mark(void) { messages.first[0] = 0; }
const char *log_why(void) { return messages.first; }

/* Where messages go when nobody asked for them. */
static void to_stderr(int level, const char *text) { fprintf(stderr, "dpdk %d: %s\n", level, text); }

/* One message of DPDK's, of any of its threads. */
static ssize_t log_write(void *cookie, const char *text, size_t n)
{
    char line[LINE];
    size_t len = n < sizeof line ? n : sizeof line - 1;
    int level = rte_log_cur_msg_loglevel();

    (void)cookie;
    memcpy(line, text, len);
    line[len] = 0;
    while (len && line[len - 1] == '\n') {
        line[--len] = 0;
    }
    if (level <= (int)RTE_LOG_ERR && len && !messages.first[0]) {
        memcpy(messages.first, line, len + 1);
    }
    if (messages.sink) {
        messages.sink(level, line);
    }
    return (ssize_t)n;
}

static int log_open(void (*sink)(int level, const char *text))
{
    FILE *stream = fopencookie(NULL, "w", (cookie_io_functions_t){.write = log_write});

    if (!stream) {
        return -ENOMEM;
    }
    setvbuf(stream, NULL, _IOLBF, 1024);
    messages.sink = sink ? sink : secure_getenv("BYPASS_DPDK_LOG") ? to_stderr : NULL;
    return rte_openlog_stream(stream);
}

static bool same_args(int argc, const char *const *argv)
{
    bool same = argc == eal.argc;

    for (int i = 1; same && i < argc; i++) { /* argv[0] is a name */
        same = strcmp(argv[i], eal.given[i]) == 0;
    }
    return same;
}

static bool has_arg(int argc, const char *const *argv, const char *arg)
{
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], arg) == 0) {
            return true;
        }
    }
    return false;
}

/* Pages that are free, or may be taken beyond those that are reserved. */
static unsigned long hugepages_free(void)
{
    static const char *const patterns[] = {"/sys/kernel/mm/hugepages/hugepages-*/free_hugepages",
                                           "/sys/kernel/mm/hugepages/hugepages-*/nr_overcommit_hugepages"};
    unsigned long sum = 0;

    for (size_t i = 0; i < 2; i++) {
        glob_t found;

        if (glob(patterns[i], 0, NULL, &found) != 0) {
            continue;
        }
        for (size_t j = 0; j < found.gl_pathc; j++) {
            FILE *file = fopen(found.gl_pathv[j], "r");
            unsigned long n = 0;

            sum += file && fscanf(file, "%lu", &n) == 1 ? n : 0;
            if (file) {
                fclose(file);
            }
        }
        globfree(&found);
    }
    return sum;
}

/* Looked at before EAL tries: when it fails, this process cannot have DPDK any more. */
static int check_first(int argc, const char *const *argv, struct dpdk_error *error)
{
    if (argc < 1 || argc > MAX_ARGS) {
        return complain(error, EINVAL, "DPDK: %d arguments for EAL: 1 to %d can be given", argc, MAX_ARGS);
    }
    if (!has_arg(argc, argv, "--no-huge") && hugepages_free() == 0) {
        return complain(error, ENOMEM,
                        "DPDK: no hugepages are free: reserve some (bypass nic hugepages 512, or echo 512 > "
                        "/proc/sys/vm/nr_hugepages), or do without (backend.eal.hugepages: false)");
    }
    return 0;
}

static int take_args(int argc, const char *const *argv)
{
    for (int i = 0; i < argc; i++) {
        eal.argv[i] = strdup(argv[i]);
        eal.given[i] = strdup(argv[i]);
        if (!eal.argv[i] || !eal.given[i]) {
            return -ENOMEM;
        }
    }
    eal.argc = argc;
    return 0;
}

static int init(struct dpdk_error *error)
{
    cpu_set_t before;
    bool known = pthread_getaffinity_np(pthread_self(), sizeof before, &before) == 0;
    int result, err;

    log_mark();
    result = rte_eal_init(eal.argc, eal.argv);
    err = rte_errno;
    if (known) {
        pthread_setaffinity_np(pthread_self(), sizeof before, &before); /* EAL has pinned this thread to its lcore */
    }
    if (result >= 0) {
        return 0;
    }
    err = err > 0 ? err : EIO;
    if (err == EACCES || err == EPERM) {
        return complain(error, err, "DPDK cannot start: %s: run as root (%s)", strerror(err), log_why());
    }
    return complain(error, err, "DPDK cannot start: %s (%s)", *log_why() ? log_why() : strerror(err),
                    "this process cannot try again; look at backend.eal of the policy");
}

static int start(int argc, const char *const *argv, void (*log)(int, const char *), struct dpdk_error *error)
{
    int err;

    if (eal.state < 0) {
        return complain(error, -eal.state, "DPDK has failed to start in this process before, and cannot try again");
    }
    if (eal.state > 0) {
        messages.sink = log ? log : messages.sink;
        if (same_args(argc, argv)) {
            return 0;
        }
        return complain(error, EALREADY,
                        "DPDK is running in this process with other arguments: all policies of a process need the same "
                        "backend.eal; a port of another kind needs a process of its own");
    }
    err = check_first(argc, argv, error);
    if (err) {
        return err;
    }
    if (take_args(argc, argv) < 0 || log_open(log) < 0) {
        return complain(error, ENOMEM, "DPDK: no memory");
    }
    err = init(error);
    eal.state = err ? -err : 1;
    return err;
}

int eal_start(int argc, const char *const *argv, void (*log)(int level, const char *text), struct dpdk_error *error)
{
    int err;

    memset(error, 0, sizeof *error);
    pthread_mutex_lock(&eal.lock);
    err = start(argc, argv, log, error);
    pthread_mutex_unlock(&eal.lock);
    return -err;
}
