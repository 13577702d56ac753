/* SPDX-License-Identifier: Apache-2.0 */
/*
 * wake.c - what wakes a program that sleeps on a port:
 *
 *     wait_fd = epoll --+-- a descriptor for each queue: the driver's interrupt, or the kernel's socket below net_af_packet
 *                       `-- a timer: instead of these, beside them, or only to look at the link
 *
 * Who polls pays nothing for this: interrupts are switched on by wake_arm(), just before a sleep, and off by the first
 * look that finds something. Between the last look and switching on a frame may have come, of which no interrupt tells:
 * a last look follows, and what it finds waits for the next rx_burst() (wake_early()).
 *
 * An interrupt is trusted when one has come, and only as long as they come: some drivers say that they have them and have
 * not (e1000 with MSI-X), others let them come late on purpose (e1000: 17 ms apart, ixgbe: 0.5 ms). So there is a timer
 * beside them, in the first case always, in the second while the conversation is lively.
 *
 * Read first: epoll(7) (edges, one-shot), DPDK's rte_eth_dev_rx_intr_enable(), the kernel's packet_poll().
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <linux/if_packet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <rte_cycles.h>

#include "eth/port.h"

enum {
    TIMER = DPDK_MAX_QUEUES, /* beside numbers of queues */
    PATIENCE = 16,           /* sleeps of idle_us, with nothing received, until they become longer */
    DOUBLINGS = 5,           /* to 2^5 times as long, but not */
    MOST_NS = 2000000,       /* longer than that; */
    SLOW_NS = 100000000,     /* where interrupts wake: for the link, and for an interrupt that was lost */
    MISSES = 64,             /* sleeps ended by the timer with frames waiting, in a row: interrupts do not come */
    SLOW_MISS = 16,          /* one of the slow timer counts so much: it costs most */
    MANY_FDS = 65536,
};

/* ---- The timer ------------------------------------------------------------------------------------------------- */

/* It goes off this long from now, and stays readable until it is armed again. */
static void arm_timer(struct dpdk_port *d, uint64_t ns)
{
    struct waker *w = &d->wake;
    uint64_t now = rte_rdtsc(), then = now + w->tsc_us * (ns / 1000);
    struct itimerspec when = {.it_value = {(time_t)(ns / 1000000000u), (long)(ns % 1000000000u)}};

    if (now < w->timer_tsc && w->timer_tsc <= then) {
        return; /* it does so in time */
    }
    timerfd_settime(w->timer, 0, &when, NULL);
    w->timer_tsc = then;
    w->idle++;
}

/* Where nothing comes for long it goes off less and less often: each time costs a sleeper tens of microseconds. */
static uint64_t idle_ns(const struct dpdk_port *d)
{
    uint64_t ns = d->cfg.idle_us * 1000ull, longer;
    uint32_t idle = d->wake.idle;

    if (idle < PATIENCE || ns >= MOST_NS) {
        return ns;
    }
    longer = ns << (idle - PATIENCE < DOUBLINGS ? idle - PATIENCE + 1 : DOUBLINGS);
    return longer < MOST_NS ? longer : MOST_NS;
}

static uint64_t slow_ns(const struct dpdk_port *d)
{
    uint64_t link = d->cfg.link_poll_ms * 1000000ull;

    return link < SLOW_NS ? link : SLOW_NS;
}

/* Whether interrupts alone wake. */
static bool alone(const struct waker *w)
{
    return w->source != WAKE_TIMER && w->trusted && (w->prompt || w->idle >= PATIENCE);
}

/* ---- The queues' descriptors ------------------------------------------------------------------------------------ */

/* Sockets and TAP devices stay readable as long as they have something; events of others count up (eventfd(2)), and
 * nobody but DPDK may read them: only what is new matters. */
static bool stays_readable(int fd)
{
    struct stat st;

    return fstat(fd, &st) == 0 && (S_ISSOCK(st.st_mode) || S_ISCHR(st.st_mode));
}

static int watch_fd(struct waker *w, uint32_t qi, int op)
{
    struct epoll_event e = {.events = w->level ? (uint32_t)EPOLLONESHOT : EPOLLIN | EPOLLET, .data.u32 = qi};

    return epoll_ctl(w->epoll, op, w->fd[qi], &e);
}

static int queue_fd(const struct dpdk_port *d, uint32_t qi)
{
    return d->wake.source == WAKE_SOCKETS ? d->wake.fd[qi] : rte_eth_dev_rx_intr_ctl_q_get_fd(d->id, (uint16_t)qi);
}

/* The other side of a vhost or virtio port may have gone and come back, with other descriptors. */
static void refresh(struct dpdk_port *d)
{
    struct waker *w = &d->wake;

    for (uint32_t qi = 0; qi < d->nd.queues; qi++) {
        int fd = queue_fd(d, qi);

        if (fd != w->fd[qi] && w->fd[qi] >= 0) {
            watch_fd(w, qi, EPOLL_CTL_DEL);
        }
        w->fd[qi] = fd;
        if (fd >= 0) {
            watch_fd(w, qi, EPOLL_CTL_ADD); /* EEXIST: it is there. Of the same number may be another, too */
        }
    }
}

static int switch_queue(struct dpdk_port *d, uint32_t qi, bool on)
{
    struct waker *w = &d->wake;
    struct epoll_event e = {.events = EPOLLONESHOT | (on ? (uint32_t)EPOLLIN : 0), .data.u32 = qi};
    int err = 0;

    if (w->source == WAKE_INTERRUPTS) {
        err = on ? rte_eth_dev_rx_intr_enable(d->id, (uint16_t)qi) : rte_eth_dev_rx_intr_disable(d->id, (uint16_t)qi);
    }
    if (w->level) { /* net_tap has nothing to switch */
        err = epoll_ctl(w->epoll, EPOLL_CTL_MOD, w->fd[qi], &e) < 0 ? -errno : err == -ENOTSUP ? 0 : err;
    }
    return err;
}

static void switch_off(struct dpdk_port *d, uint32_t queues)
{
    for (uint32_t qi = 0; queues >> qi; qi++) {
        if (queues >> qi & 1) {
            switch_queue(d, qi, false);
        }
    }
    d->wake.on = 0;
}

static void give_up(struct dpdk_port *d, const char *why)
{
    struct waker *w = &d->wake;

    switch_off(d, w->on);
    w->source = WAKE_TIMER;
    snprintf(w->why, sizeof w->why, "%s", why);
}

/* ---- Sleeping and waking ----------------------------------------------------------------------------------------- */

/* Switches on those that are off, and takes what has come before that. Whether all are on. */
static bool switch_on(struct dpdk_port *d)
{
    struct waker *w = &d->wake;
    uint32_t all = (uint32_t)(1ull << d->nd.queues) - 1, off = all & ~w->on;

    for (uint32_t qi = 0; off >> qi; qi++) {
        if (!(off >> qi & 1)) {
            continue;
        }
        if (w->fd[qi] < 0 || switch_queue(d, qi, true) < 0) {
            w->refused++;
            return false;
        }
        w->on |= 1u << qi;
        if (!w->level) {
            w->early_n += (uint32_t)rx_queue(d, qi, w->early + w->early_n, (int)(DPDK_EARLY - w->early_n));
        }
    }
    return true;
}

int wake_arm(struct dpdk_port *d)
{
    struct waker *w = &d->wake;
    bool quick = true;

    w->told = w->slept = true;
    if (w->source != WAKE_TIMER && !d->gone && w->early_at == w->early_n) {
        w->early_at = w->early_n = 0;
        if (rte_rdtsc() >= w->refresh_tsc) {
            w->refresh_tsc = rte_rdtsc() + w->tsc_us * (SLOW_NS / 1000);
            refresh(d);
        }
        quick = !switch_on(d) || !alone(w);
    }
    arm_timer(d, quick ? idle_ns(d) : slow_ns(d));
    w->slow = !quick;
    return (int)(w->early_n - w->early_at);
}

/* A socket says once that its interface went down, which link.c sees for itself. */
static bool cleared(const struct waker *w, uint32_t qi)
{
    int err;
    socklen_t len = sizeof err;

    return getsockopt(w->fd[qi], SOL_SOCKET, SO_ERROR, &err, &len) == 0;
}

/* What ended the sleep. Before the queues are looked at: what comes from now on is an event anew. */
static void awake(struct dpdk_port *d)
{
    struct waker *w = &d->wake;
    struct epoll_event e[DPDK_MAX_QUEUES + 1];
    int n = epoll_wait(w->epoll, e, DPDK_MAX_QUEUES + 1, 0);
    bool failed = false;

    w->slept = w->timed = false;
    w->fired = 0;
    for (int i = 0; i < n; i++) {
        if (e[i].data.u32 == TIMER) {
            w->timed = true;
            w->timer_tsc = 0; /* the two clocks differ: DPDK rounds the frequency of the TSC to 10 MHz */
            d->queue[0].n.rx_timers++;
        } else {
            w->fired |= 1u << e[i].data.u32;
            failed |= (e[i].events & (EPOLLERR | EPOLLHUP)) && !cleared(w, e[i].data.u32);
            d->queue[e[i].data.u32].n.rx_interrupts++;
        }
    }
    w->on &= ~w->fired; /* one-shot, or the device's own doing: many mask an interrupt that they have sent */
    if (w->fired) {
        w->trusted = true;
        w->misses = 0;
    }
    if (failed) { /* it would wake for ever */
        give_up(d, "the device's descriptor has failed");
    }
}

/* The timer told what an interrupt should have. */
static void missed(struct dpdk_port *d)
{
    struct waker *w = &d->wake;

    d->queue[0].n.rx_late++;
    w->misses += w->slow ? SLOW_MISS : 1;
    if (w->misses >= MISSES) {
        give_up(d, "the driver's interrupts do not come");
    }
}

void wake_before(struct dpdk_port *d)
{
    if (d->wake.slept) {
        awake(d);
    }
}

void wake_found(struct dpdk_port *d)
{
    struct waker *w = &d->wake;

    w->idle = 0;
    if (w->source == WAKE_TIMER) {
        return;
    }
    if (w->timed && !w->fired && (w->slow || !w->trusted)) {
        missed(d);
    }
    switch_off(d, w->level ? w->on : w->on | w->fired);
    w->fired = 0;
    w->timed = false;
}

void wake_nothing(struct dpdk_port *d)
{
    if (!d->wake.told) {
        arm_timer(d, idle_ns(d)); /* nobody says when he sleeps */
    }
}

int wake_early(struct dpdk_port *d, bypass_pkt *out, int max)
{
    struct waker *w = &d->wake;
    int n = 0;

    while (n < max && w->early_at < w->early_n) {
        out[n++] = w->early[w->early_at++];
    }
    return n;
}

/* ---- The sockets of net_af_packet ---------------------------------------------------------------------------------- */

/* The driver tells nobody of them, but they are there. All of the process, or those of an interface. */
static uint32_t packet_sockets(uint32_t if_index, uint8_t *known, int *out, uint32_t max)
{
    DIR *folder = opendir("/proc/self/fd");
    uint32_t n = 0;

    for (struct dirent *e; folder && (e = readdir(folder)) != NULL;) {
        struct sockaddr_ll at = {0};
        socklen_t len = sizeof at;
        int fd = atoi(e->d_name), domain = 0;
        socklen_t size = sizeof domain;

        if (e->d_name[0] == '.' || fd >= MANY_FDS || known[fd / 8] >> fd % 8 & 1 ||
            getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) < 0 || domain != AF_PACKET) {
            continue;
        }
        if (!out) {
            known[fd / 8] |= (uint8_t)(1 << fd % 8);
        } else if (getsockname(fd, (struct sockaddr *)&at, &len) == 0 && at.sll_ifindex == (int)if_index && n++ < max) {
            out[n - 1] = fd;
        }
    }
    if (folder) {
        closedir(folder);
    }
    return n;
}

static uint8_t known_sockets[MANY_FDS / 8]; /* one port is opened at a time */

void wake_remember(void)
{
    memset(known_sockets, 0, sizeof known_sockets);
    packet_sockets(0, known_sockets, NULL, 0);
}

/* ---- Choosing ------------------------------------------------------------------------------------------------------ */
bool wake_by_driver(const struct dpdk_port *d)
{
    return !(d->cfg.flags & DPDK_F_NO_RX_INTERRUPTS) && !d->member_count && !device_is_af_packet(d->name);
}

/* "": the port's sockets wake; or why they do not. */
static const char *take_sockets(struct dpdk_port *d)
{
    struct waker *w = &d->wake;
    uint32_t found = packet_sockets(d->info.if_index, known_sockets, w->fd, DPDK_MAX_QUEUES);

    if (!d->info.if_index || found < d->nd.queues || found > DPDK_MAX_QUEUES) {
        return "the driver's sockets were not found";
    }
    w->source = WAKE_SOCKETS;
    w->level = w->trusted = w->prompt = true;
    return "";
}

/* Drivers whose interrupts come at once. Others hold them back, some for long, and none says so. */
static bool is_prompt(const struct dpdk_port *d)
{
    static const char *const names[] = {"net_virtio", "net_vhost", "net_tap"};

    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (strncmp(d->info.driver_name, names[i], strlen(names[i])) == 0) {
            return true;
        }
    }
    return (d->cfg.flags & DPDK_F_RX_INTERRUPTS) != 0;
}

static const char *take_interrupts(struct dpdk_port *d)
{
    struct waker *w = &d->wake;

    if (!d->conf.intr_conf.rxq) {
        return *w->why ? w->why : "the driver does not start with interrupts";
    }
    w->source = WAKE_INTERRUPTS;
    for (uint32_t qi = 0; qi < d->nd.queues; qi++) {
        int err = rte_eth_dev_rx_intr_enable(d->id, (uint16_t)qi);

        w->fd[qi] = queue_fd(d, qi);
        if (w->fd[qi] < 0 || (err < 0 && !(err == -ENOTSUP && stays_readable(w->fd[qi])))) {
            w->source = WAKE_TIMER;
            return "the driver has no interrupts";
        }
        rte_eth_dev_rx_intr_disable(d->id, (uint16_t)qi);
    }
    w->level = stays_readable(w->fd[0]);
    w->prompt = is_prompt(d);
    w->trusted = w->level || (d->cfg.flags & DPDK_F_RX_INTERRUPTS);
    return "";
}

static const char *choose(struct dpdk_port *d)
{
    if (d->cfg.flags & DPDK_F_NO_RX_INTERRUPTS) {
        return "rx_interrupts: none";
    }
    if (d->member_count) {
        return "a bonding device has no interrupts";
    }
    return device_is_af_packet(d->name) ? take_sockets(d) : take_interrupts(d);
}

int wake_open(struct dpdk_port *d, struct dpdk_error *error)
{
    struct waker *w = &d->wake;
    struct epoll_event e = {.events = EPOLLIN, .data.u32 = TIMER};

    w->tsc_us = rte_get_tsc_hz() / 1000000;
    w->epoll = epoll_create1(EPOLL_CLOEXEC);
    w->timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (w->epoll < 0 || w->timer < 0 || epoll_ctl(w->epoll, EPOLL_CTL_ADD, w->timer, &e) < 0) {
        return complain(error, errno, "%s: no descriptor to sleep on: %s", d->name, strerror(errno));
    }
    timerfd_settime(w->timer, 0, &(struct itimerspec){.it_value.tv_nsec = 1}, NULL);
    snprintf(w->why, sizeof w->why, "%s", choose(d));
    if (w->source == WAKE_TIMER && d->cfg.flags & DPDK_F_RX_INTERRUPTS) {
        return complain(error, ENOTSUP,
                        "%s: rx_interrupts: required, but %s (driver %s): auto sleeps by a timer where there are none",
                        d->name, w->why, d->info.driver_name);
    }
    for (uint32_t qi = 0; w->source != WAKE_TIMER && qi < d->nd.queues; qi++) {
        if (watch_fd(w, qi, EPOLL_CTL_ADD) < 0) {
            give_up(d, strerror(errno));
        }
    }
    return 0;
}

void wake_stop(struct dpdk_port *d)
{
    if (d->wake.source != WAKE_TIMER) {
        give_up(d, "the device is gone");
    }
}

void wake_close(struct dpdk_port *d)
{
    struct waker *w = &d->wake;

    if (!d->gone) {
        switch_off(d, w->on);
    }
    if (w->epoll >= 0) {
        close(w->epoll);
    }
    if (w->timer >= 0) {
        close(w->timer);
    }
}

void wake_about(const struct dpdk_port *d, char *out, size_t size)
{
    const struct waker *w = &d->wake;

    if (w->source == WAKE_TIMER) {
        snprintf(out, size, "a timer: %s", w->why);
    } else {
        snprintf(out, size, "%s%s", w->source == WAKE_SOCKETS ? "the driver's sockets" : "interrupts",
                 w->trusted ? "" : ", of which none has come yet, and a timer");
    }
}
