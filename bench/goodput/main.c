/* SPDX-License-Identifier: Apache-2.0 */
/*
 * main.c - goodput KEY=VALUE...: runs flows over one wire and prints one JSON object.
 *
 *   clock=real|virtual (real)   seed=N (1)   ms=N (10000): measured   warmup_ms=N (2000): before that
 *   sample_ms=N (0): also each flow's bytes at every so many milliseconds   pcap=PREFIX: records (path.c)
 *   trace=FILE: with sample_ms, what each sender's TCP says of itself
 *   flow=FROM,TO,CC[,START_MS[,BYTES]]: FROM and TO are linux or ours; BYTES: transfers of that size, repeated
 *   fwd.KEY=N, rev.KEY=N: struct faults of goodput.h by name; both.KEY=N: of both directions
 *
 * Exit code 2: an argument is wrong, or the machine lacks something.
 */
#include <errno.h>
#include <inttypes.h>
#include <sched.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <time.h>

#include "goodput.h"
#include "measure.h"

enum { START_NS = 1000000000, EVENTS = 64 };

struct options {
    uint64_t ms, warmup_ms, sample_ms;
    struct faults faults[2];
    const char *pcap, *trace;
};

struct run {
    struct options opt;
    struct histogram late;
    uint64_t late_max_ns, measured_from_ns, measured_to_ns, samples;
    FILE *trace;
    uint64_t *series; /* samples of all flows, one after another */
    bool realtime;
};

_Noreturn void die(const char *what, int64_t err)
{
    fprintf(stderr, "goodput: %s%s%s\n", what, err ? ": " : "", err ? strerror((int)-err) : "");
    exit(2);
}

void host_mac(int number, uint8_t mac[6]) { memcpy(mac, (uint8_t[]){2, 0, 0, 0, 9, (uint8_t)number}, 6); }

uint32_t host_ip(int number) { return 10u << 24 | 9u << 16 | (uint32_t)number; }

void host_out(struct host *h, const uint8_t *frame, uint32_t len)
{
    int to = len >= 14 && memcmp(frame, (uint8_t[]){2, 0, 0, 0, 9}, 5) == 0 ? frame[5] : 0;
    if (to > 0 && to < HOSTS && h->bench->hosts[to])
        path_send(h->bench->path, h->number, to, frame, len, h->bench->now_ns);
}

/* ---- Arguments ---------------------------------------------------------------------------------------------- */
static const struct {
    const char *name;
    size_t at;
} FAULTS[] = {
#define FAULT(x)                                                                                                       \
    {                                                                                                                  \
#x, offsetof(struct faults, x)                                                                                 \
    }
    FAULT(rate_bps),  FAULT(delay_ns),      FAULT(queue_bytes),     FAULT(mark_bytes), FAULT(loss_ppm),
    FAULT(burst_ppm), FAULT(burst_end),     FAULT(reorder_ppm),     FAULT(reorder_ns), FAULT(jitter_ns),
    FAULT(outage_ns), FAULT(duplicate_ppm), FAULT(outage_every_ns),
#undef FAULT
};

static uint64_t number(const char *text)
{
    char *end;
    errno = 0;
    uint64_t n = strtoull(text, &end, 10);
    if (errno || *end || end == text || *text == '-')
        die(text, -EINVAL);
    return n;
}

static void fault_option(struct options *o, const char *arg, const char *value)
{
    size_t dot = (size_t)(strchr(arg, '.') - arg), n = (size_t)(value - arg) - dot - 2;
    bool fwd = strncmp(arg, "fwd.", 4) == 0, rev = strncmp(arg, "rev.", 4) == 0;
    if (strncmp(arg, "both.", 5) == 0)
        fwd = rev = true;
    for (size_t i = 0; i < sizeof FAULTS / sizeof *FAULTS; i++) {
        if (strlen(FAULTS[i].name) == n && strncmp(arg + dot + 1, FAULTS[i].name, n) == 0 && (fwd || rev)) {
            for (int d = 0; d < 2; d++)
                if (d == FWD ? fwd : rev)
                    *(uint64_t *)((uint8_t *)&o->faults[d] + FAULTS[i].at) = number(value);
            return;
        }
    }
    die(arg, -EINVAL);
}

static int host_named(const char *name, int side)
{
    if (strcmp(name, "linux") != 0 && strcmp(name, "ours") != 0)
        die(name, -EINVAL);
    return (side == FWD ? LEFT_LINUX : RIGHT_LINUX) + (strcmp(name, "ours") == 0);
}

static void flow_option(struct bench *b, const char *value)
{
    char text[256], *save = NULL, *part[5] = {0};
    snprintf(text, sizeof text, "%s", value);
    int n = 0;
    for (char *p = strtok_r(text, ",", &save); p; p = strtok_r(NULL, ",", &save))
        if (n < 5)
            part[n++] = p;
    if (n < 3 || b->flow_count == FLOWS_MAX || strlen(part[2]) >= CC_NAME)
        die(value, -EINVAL);
    struct flow *f = &b->flows[b->flow_count++];
    f->from = host_named(part[0], FWD);
    f->to = host_named(part[1], REV);
    strcpy(f->cc, part[2]);
    f->start_ns = n > 3 ? number(part[3]) * MSEC : 0;
    f->bytes = n > 4 ? number(part[4]) : 0;
}

static void option(struct bench *b, struct options *o, const char *arg)
{
    const char *equals = strchr(arg, '='), *value = equals + 1;
    static const char *const names[] = {"seed=", "ms=", "warmup_ms=", "sample_ms="};
    uint64_t *const numbers[] = {&b->seed, &o->ms, &o->warmup_ms, &o->sample_ms};
    if (!equals)
        die(arg, -EINVAL);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (strncmp(arg, names[i], strlen(names[i])) == 0) {
            *numbers[i] = number(value);
            return;
        }
    }
    if (strcmp(arg, "clock=virtual") == 0)
        b->is_virtual = true;
    else if (strncmp(arg, "flow=", 5) == 0)
        flow_option(b, value);
    else if (strncmp(arg, "pcap=", 5) == 0)
        o->pcap = value;
    else if (strncmp(arg, "trace=", 6) == 0)
        o->trace = value;
    else if (strchr(arg, '.') && strchr(arg, '.') < equals)
        fault_option(o, arg, value);
    else if (strcmp(arg, "clock=real") != 0)
        die(arg, -EINVAL);
}

/* ---- The loop ----------------------------------------------------------------------------------------------- */
static uint64_t min_ns(uint64_t a, uint64_t b) { return a < b ? a : b; }

static void deliver(struct bench *b, struct run *r)
{
    struct arrival a;
    while (path_take(b->path, b->now_ns, &a)) {
        uint64_t late = b->now_ns - a.due_ns;
        histogram_add(&r->late, late);
        r->late_max_ns = late > r->late_max_ns ? late : r->late_max_ns;
        b->hosts[a.to]->ops->deliver(b->hosts[a.to], a.frame, a.len);
        path_done(b->path);
    }
}

static void run_hosts(struct bench *b)
{
    for (int i = 0; i < HOSTS; i++) {
        struct host *h = b->hosts[i];
        uint64_t next = h ? h->ops->next_ns(h) : NEVER;
        if (h && (next == NEVER || next <= b->now_ns)) /* a Linux host may always have something */
            h->ops->run(h);
    }
}

static uint64_t next_ns(const struct bench *b)
{
    uint64_t next = path_next(b->path);
    for (int i = 0; i < HOSTS; i++)
        if (b->hosts[i])
            next = min_ns(next, b->hosts[i]->ops->next_ns(b->hosts[i]));
    for (int i = 0; i < b->flow_count; i++)
        if (!b->flows[i].started)
            next = min_ns(next, b->began_ns + b->flows[i].start_ns);
    return next;
}

static void wait_until(struct bench *b, uint64_t when_ns)
{
    struct epoll_event ev[EVENTS];
    if (b->is_virtual) {
        b->now_ns = when_ns > b->now_ns ? when_ns : b->now_ns;
        return;
    }
    uint64_t now = clock_ns(), left = when_ns > now ? when_ns - now : 0;
    struct timespec t = {.tv_sec = (time_t)(left / SEC), .tv_nsec = (long)(left % SEC)};
    int n = epoll_pwait2(b->epoll, ev, EVENTS, &t, NULL);
    if (n < 0 && errno != EINTR)
        die("epoll", -errno);
    b->now_ns = clock_ns();
    for (int i = 0; i < n; i++)
        if (ev[i].data.u64 >= FIRST_TAG) /* frames are read in any case */
            flow_event(b, ev[i].data.u64);
}

static void trace(struct bench *b, const struct run *r, int i)
{
    static const char *const states[] = {"open", "disorder", "cwr", "recovery", "loss"};
    struct flow *f = &b->flows[i];
    const struct tcp_info *t = &f->last;
    flow_look(b, f);
    fprintf(r->trace,
            "%" PRIu64 " flow %d got %" PRIu64
            " %s cwnd %u ssthresh %d unacked %u sacked %u lost %u retrans %u/%u rto %u "
            "backoff %u srtt %u var %u min %u rate %" PRIu64 " paced %" PRId64 "\n",
            (uint64_t)((b->now_ns - b->began_ns) / MSEC), i, f->total, states[t->tcpi_ca_state % 5], t->tcpi_snd_cwnd,
            (int)t->tcpi_snd_ssthresh, t->tcpi_unacked, t->tcpi_sacked, t->tcpi_lost, t->tcpi_retrans,
            t->tcpi_total_retrans, t->tcpi_rto, t->tcpi_backoff, t->tcpi_rtt, t->tcpi_rttvar, t->tcpi_min_rtt,
            (uint64_t)t->tcpi_delivery_rate, (int64_t)t->tcpi_pacing_rate);
}

static void marks(struct bench *b, struct run *r)
{
    uint64_t from = b->began_ns + r->opt.warmup_ms * MSEC;
    uint64_t step = r->opt.sample_ms * MSEC;
    if (!r->measured_from_ns && b->now_ns >= from) {
        r->measured_from_ns = b->now_ns;
        for (int i = 0; i < b->flow_count; i++)
            b->flows[i].total_at_warm = b->flows[i].total;
    }
    while (step && b->now_ns >= b->began_ns + (r->samples + 1) * step) {
        for (int i = 0; i < b->flow_count; i++) {
            r->series[r->samples * (uint64_t)b->flow_count + (uint64_t)i] = b->flows[i].total;
            if (r->trace)
                trace(b, r, i);
        }
        r->samples++;
    }
}

static void loop(struct bench *b, struct run *r)
{
    uint64_t end = b->began_ns + (r->opt.warmup_ms + r->opt.ms) * MSEC;
    uint64_t step = r->opt.sample_ms * MSEC;
    while (b->now_ns < end) {
        uint64_t next = next_ns(b);
        next = min_ns(next, r->measured_from_ns ? end : b->began_ns + r->opt.warmup_ms * MSEC);
        if (step)
            next = min_ns(next, b->began_ns + (r->samples + 1) * step);
        wait_until(b, next);
        marks(b, r);
        deliver(b, r);
        for (int i = 0; i < b->flow_count; i++)
            if (!b->flows[i].started && b->now_ns >= b->began_ns + b->flows[i].start_ns)
                flow_start(b, &b->flows[i]);
        run_hosts(b);
    }
    r->measured_to_ns = b->now_ns;
}

/* ---- The report --------------------------------------------------------------------------------------------- */
static void print_flow(const struct bench *b, const struct run *r, int i)
{
    static const char *const kinds[] = {
        [LEFT_LINUX] = "linux", [LEFT_OURS] = "ours", [RIGHT_LINUX] = "linux", [RIGHT_OURS] = "ours"};
    const struct flow *f = &b->flows[i];
    double s = (double)(r->measured_to_ns - r->measured_from_ns) / 1e9;
    printf("{\"from\": \"%s\", \"to\": \"%s\", \"cc\": \"%s\", \"mbit\": %.4f, \"bytes\": %" PRIu64
           ", \"retransmits\": %" PRIu64 ", \"cwnd\": %" PRIu64 ", \"srtt_ms\": %.2f, \"error\": ",
           kinds[f->from], kinds[f->to], f->cc, (double)(f->total - f->total_at_warm) * 8 / 1e6 / s, f->total,
           (uint64_t)f->last.tcpi_total_retrans, (uint64_t)f->last.tcpi_snd_cwnd * f->last.tcpi_snd_mss,
           (double)f->last.tcpi_rtt / 1000);
    printf(f->error ? "\"%s\"" : "null", f->error);
    printf(", \"transfers_ms\": [");
    for (uint32_t k = 0, first = 1; k < f->done; k++) {
        if (f->done_at_ns[k] >= r->opt.warmup_ms * MSEC) {
            printf("%s%.2f", first ? "" : ", ", f->done_ms[k]);
            first = 0;
        }
    }
    printf("], \"series\": [");
    for (uint64_t k = 0; k < r->samples; k++)
        printf("%s%" PRIu64, k ? ", " : "", r->series[k * (uint64_t)b->flow_count + (uint64_t)i]);
    printf("]}");
}

static void print_direction(const struct bench *b, const char *name, int dir)
{
    const struct counts *n = path_counts(b->path, dir);
    uint64_t queued = n->frames - n->queue_dropped;
    printf("\"%s\": {\"frames\": %" PRIu64 ", \"bytes\": %" PRIu64 ", \"delivered\": %" PRIu64
           ", \"queue_dropped\": %" PRIu64 ", \"lost\": %" PRIu64 ", \"burst_lost\": %" PRIu64
           ", \"outage_lost\": %" PRIu64 ", \"reordered\": %" PRIu64 ", \"duplicated\": %" PRIu64
           ", \"marked\": %" PRIu64 ", \"queue_mean_ms\": %.3f, \"queue_max_ms\": %.3f}, ",
           name, n->frames, n->bytes, n->delivered, n->queue_dropped, n->lost, n->burst_lost, n->outage_lost,
           n->reordered, n->duplicated, n->marked, queued ? (double)n->queue_sum_ns / (double)queued / 1e6 : 0,
           (double)n->queue_max_ns / 1e6);
}

static void print(const struct bench *b, const struct run *r)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    printf("{\"seed\": %" PRIu64 ", \"clock\": \"%s\", \"seconds\": %.3f, \"flows\": [", b->seed,
           b->is_virtual ? "virtual" : "real", (double)(r->measured_to_ns - r->measured_from_ns) / 1e9);
    for (int i = 0; i < b->flow_count; i++) {
        printf("%s", i ? ", " : "");
        print_flow(b, r, i);
    }
    printf("], ");
    print_direction(b, "fwd", FWD);
    print_direction(b, "rev", REV);
    printf("\"late_us\": {\"p50\": %.1f, \"p99\": %.1f, \"max\": %.1f}, \"realtime\": %s, \"cpu_s\": %.3f}\n",
           histogram_us(&r->late, 0.5), histogram_us(&r->late, 0.99), (double)r->late_max_ns / 1000,
           r->realtime ? "true" : "false",
           (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6);
}

/* ---- Set-up ------------------------------------------------------------------------------------------------- */

/* The wire has to be on time on a busy machine, and takes little: it sleeps most of the time. If it ever does not,
 * the kernel ends it (setrlimit(2), RLIMIT_RTTIME). */
static bool be_on_time(void)
{
    struct rlimit limit = {.rlim_cur = 500000, .rlim_max = 500000};
    (void)prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
    if (setrlimit(RLIMIT_RTTIME, &limit) < 0)
        return false;
    return sched_setscheduler(0, SCHED_FIFO, &(struct sched_param){.sched_priority = 1}) == 0;
}

static void open_hosts(struct bench *b)
{
    for (int i = 0; i < b->flow_count; i++) {
        const int ends[] = {b->flows[i].from, b->flows[i].to};
        for (int k = 0; k < 2; k++) {
            int n = ends[k];
            bool ours = n == LEFT_OURS || n == RIGHT_OURS;
            if (b->is_virtual && !ours)
                die("a virtual clock does not move the kernel's", 0);
            if (!b->hosts[n])
                b->hosts[n] = ours ? ours_create(b, n) : linux_create(b, n);
        }
        flow_listen(b, &b->flows[i]);
    }
}

int main(int argc, char **argv)
{
    static struct bench b = {.seed = 1};
    static struct run r = {.opt = {.ms = 10000, .warmup_ms = 2000}};
    for (int i = 1; i < argc; i++)
        option(&b, &r.opt, argv[i]);
    if (b.flow_count == 0 || r.opt.ms == 0)
        die("no flow, or no time", -EINVAL);
    if (b.is_virtual && !r.opt.faults[FWD].delay_ns && !r.opt.faults[REV].delay_ns)
        die("with a virtual clock and without delay, time would stand still", 0);
    flow_init();
    b.epoll = epoll_create1(EPOLL_CLOEXEC);
    if (b.epoll < 0)
        die("epoll", -errno);
    b.now_ns = b.is_virtual ? START_NS : clock_ns();
    open_hosts(&b); /* a namespace takes its time, which no flow should be charged with */
    b.began_ns = b.now_ns = b.is_virtual ? START_NS : clock_ns();
    b.path = path_create(b.seed, b.now_ns, r.opt.faults);
    if (!b.path)
        die("memory", -ENOMEM);
    if (r.opt.sample_ms)
        r.series = calloc((r.opt.ms + r.opt.warmup_ms) / r.opt.sample_ms + 2, (size_t)b.flow_count * sizeof *r.series);
    if (r.opt.sample_ms && !r.series)
        die("memory", -ENOMEM);
    int err = r.opt.pcap ? path_record(b.path, r.opt.pcap) : 0;
    if (err < 0)
        die(r.opt.pcap, err);
    r.trace = r.opt.trace ? fopen(r.opt.trace, "w") : NULL;
    if (r.opt.trace && !r.trace)
        die(r.opt.trace, -errno);
    r.realtime = !b.is_virtual && be_on_time();
    loop(&b, &r);
    for (int i = 0; i < b.flow_count; i++)
        flow_look(&b, &b.flows[i]);
    for (int i = 0; i < HOSTS; i++)
        if (b.hosts[i])
            b.hosts[i]->ops->end(b.hosts[i]);
    print(&b, &r);
    path_destroy(b.path);
    if (r.trace)
        (void)fclose(r.trace);
    return 0;
}
