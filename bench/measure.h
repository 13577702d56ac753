/* SPDX-License-Identifier: Apache-2.0 */
/*
 * measure.h - clocks, CPU accounting and latency histogram of the benchmark's client and sender.
 *
 * CPU is taken twice. `busy_ns`: everything that ran on each core (/proc/stat, ticks of 10 ms): complete, but
 * coarse, and other programs count too. `task_ns`: run time of the tasks that take part and of ksoftirqd
 * (/proc/PID/task/TID/schedstat, nanoseconds): softirq work runs in the context of the task that sends, or in
 * ksoftirqd, so this misses only what interrupts do while a core idles.
 */
#ifndef BENCH_MEASURE_H
#define BENCH_MEASURE_H

#include <dirent.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static inline uint64_t clock_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

/* ---- CPU ------------------------------------------------------------------------------------------------ */
enum { MAX_CORES = 64 };

struct cpu_sample {
    uint64_t core_ns[MAX_CORES];
    uint64_t task_ns;
};

static inline void sample_cores(struct cpu_sample *s)
{
    char line[512];
    FILE *f = fopen("/proc/stat", "r");
    long hz = sysconf(_SC_CLK_TCK);
    while (f && fgets(line, sizeof line, f)) {
        unsigned core;
        unsigned long long v[8];
        if (sscanf(line, "cpu%u %llu %llu %llu %llu %llu %llu %llu %llu", &core, v, v + 1, v + 2, v + 3, v + 4, v + 5,
                   v + 6, v + 7) != 9 ||
            core >= MAX_CORES)
            continue;
        /* all but idle, iowait and steal */
        s->core_ns[core] = (v[0] + v[1] + v[2] + v[5] + v[6]) * (1000000000ull / (uint64_t)hz);
    }
    if (f)
        fclose(f);
}

static inline uint64_t task_run_ns(const char *pid)
{
    char path[300];
    uint64_t sum = 0;
    struct dirent *e;
    snprintf(path, sizeof path, "/proc/%s/task", pid);
    DIR *d = opendir(path);
    while (d && (e = readdir(d))) {
        unsigned long long ns = 0;
        char file[600];
        snprintf(file, sizeof file, "%s/%s/schedstat", path, e->d_name);
        FILE *f = e->d_name[0] != '.' ? fopen(file, "r") : NULL;
        if (f && fscanf(f, "%llu", &ns) == 1)
            sum += ns;
        if (f)
            fclose(f);
    }
    if (d)
        closedir(d);
    return sum;
}

/* pids: decimal, separated by commas; the caller itself is added. */
static inline struct cpu_sample cpu_sample(const char *pids)
{
    struct cpu_sample s = {.task_ns = task_run_ns("self")};
    char list[512], *save = NULL;
    snprintf(list, sizeof list, "%s", pids);
    for (char *p = strtok_r(list, ",", &save); p; p = strtok_r(NULL, ",", &save))
        s.task_ns += task_run_ns(p);
    sample_cores(&s);
    return s;
}

/* ---- Latency: a histogram of 1/64 resolution, 1 ns to 4 s ------------------------------------------------- */
enum { SUB_BITS = 6, SUB = 1 << SUB_BITS, BUCKETS = 32 * SUB };

struct histogram {
    uint64_t count;
    uint64_t bucket[BUCKETS];
};

static inline uint32_t bucket_of(uint64_t ns)
{
    uint32_t top = ns < SUB ? 0 : 63 - (uint32_t)__builtin_clzll(ns) - SUB_BITS;
    uint32_t b = top * SUB + (uint32_t)(ns >> top);
    return b < BUCKETS ? b : BUCKETS - 1;
}

static inline void histogram_add(struct histogram *h, uint64_t ns)
{
    h->bucket[bucket_of(ns)]++;
    h->count++;
}

/* The smallest value that is at least as large as `share` of all, in microseconds. */
static inline double histogram_us(const struct histogram *h, double share)
{
    uint64_t want = (uint64_t)(share * (double)h->count), seen = 0;
    for (uint32_t b = 0; b < BUCKETS; b++) {
        seen += h->bucket[b];
        if (seen > want || (seen == h->count && seen > 0)) {
            uint32_t top = b < 2 * SUB ? 0 : b / SUB - 1;
            return (double)((uint64_t)(b - top * SUB) << top) / 1000;
        }
    }
    return 0;
}

/* ---- Output: one JSON object -------------------------------------------------------------------------------- */
static inline void print_result(const char *extra, uint64_t ops, uint64_t bytes, uint64_t ns,
                                const struct cpu_sample *from, const struct cpu_sample *to, const struct histogram *h)
{
    printf("{\"ops\": %llu, \"bytes\": %llu, \"seconds\": %.6f, \"task_cpu_s\": %.6f, \"core_cpu_s\": [",
           (unsigned long long)ops, (unsigned long long)bytes, (double)ns / 1e9,
           (double)(to->task_ns - from->task_ns) / 1e9);
    for (long i = 0; i < sysconf(_SC_NPROCESSORS_CONF) && i < MAX_CORES; i++)
        printf("%s%.2f", i ? ", " : "", (double)(to->core_ns[i] - from->core_ns[i]) / 1e9);
    printf("]");
    if (h)
        printf(", \"p50_us\": %.2f, \"p99_us\": %.2f", histogram_us(h, 0.5), histogram_us(h, 0.99));
    printf("%s}\n", extra);
}

#endif
