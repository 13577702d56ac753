/* SPDX-License-Identifier: Apache-2.0 */
/*
 * guard.c - a memif port whose peer comes and goes while it is polled.
 *
 * DPDK's memif driver handles its control sockets in EAL's interrupt thread. When a peer closes or dies, memif_disconnect()
 * there unmaps the memory of the rings and closes the queues' descriptors, while eth_memif_rx() and eth_memif_tx() use both
 * in the thread that polls, and nothing in the driver keeps the two apart (drivers/net/memif, DPDK 22.11 and later):
 *
 *     polling thread                             EAL's interrupt thread
 *     ring = region's address + offset
 *                                                recvmsg() = 0: memif_disconnect(): munmap(region), run = {0}
 *     memcpy(ring's buffer, frame): SIGSEGV
 *
 * So a handler of the driver runs here, and only while nobody polls a port with memif in it:
 *
 *     port->guard.busy = 1                       port->guard.closed = 1       for each such port
 *     closed ? nothing, come back : a burst      wait until busy is 0
 *     busy = 0                                   the driver's handler
 *                                                closed = 0
 *
 * Both stores are sequentially consistent, so that one of the two sees the other. Polling never waits. net_vhost does the
 * same for its own (while_queuing, allow_queuing).
 *
 * The driver's handlers come here because its calls of EAL's functions do (hook.c). What else of the driver ends in memory
 * that is gone is put right with them: a listener that the driver frees stays known to EAL; so does a connection whose
 * client died before it was greeted, and EAL panics of its closed descriptor; an answer to a client that has died is
 * SIGPIPE; a handler that waits while its port is closed would run afterwards.
 */
#define _GNU_SOURCE
#define ALLOW_EXPERIMENTAL_API /* rte_intr_fd_get(), rte_intr_instance_free(): the same since DPDK 21.11 */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <rte_interrupts.h>

#include "eth/port.h"

/* A descriptor that EAL watches for the driver. Made by whoever registers it, freed when EAL has forgotten it. */
struct watch {
    struct watch *next;
    rte_intr_callback_fn handler; /* the driver's, */
    void *arg;                    /* ... with this; */
    rte_intr_unregister_callback_fn end;
    const struct rte_intr_handle *handle;
    const struct watch *listener; /* that has accepted it */
    bool dead;                    /* not to be called any more */
    bool close;                   /* with the end of the watch: the driver does not */
};

static struct {
    pthread_mutex_t handlers; /* one runs, or what must not meet one. Not taken by who polls */
    pthread_mutex_t list;     /* of watches. Nothing else is taken, nor EAL called, with it */
    struct watch *watches;
    struct dpdk_port *ports;
    bool installed;
} guard = {.handlers = PTHREAD_MUTEX_INITIALIZER, .list = PTHREAD_MUTEX_INITIALIZER};

static _Thread_local const struct watch *running;

void guard_hold(void) { pthread_mutex_lock(&guard.handlers); }
void guard_release(void) { pthread_mutex_unlock(&guard.handlers); }

/* ---- Polling and handlers --------------------------------------------------------------------------------------- */
static bool enter(struct dpdk_port *d)
{
    __atomic_store_n(&d->guard.busy, 1, __ATOMIC_SEQ_CST);
    if (unlikely(__atomic_load_n(&d->guard.closed, __ATOMIC_SEQ_CST))) {
        __atomic_store_n(&d->guard.busy, 0, __ATOMIC_RELEASE);
        return false;
    }
    return true;
}

static void leave(struct dpdk_port *d) { __atomic_store_n(&d->guard.busy, 0, __ATOMIC_RELEASE); }

static void close_ports(void)
{
    for (struct dpdk_port *d = guard.ports; d; d = d->guard.next) {
        __atomic_store_n(&d->guard.closed, 1, __ATOMIC_SEQ_CST);
    }
    for (struct dpdk_port *d = guard.ports; d; d = d->guard.next) {
        while (__atomic_load_n(&d->guard.busy, __ATOMIC_SEQ_CST)) {
            usleep(10); /* the thread that polls may need this core to come to its end */
        }
    }
}

static void open_ports(void)
{
    for (struct dpdk_port *d = guard.ports; d; d = d->guard.next) {
        __atomic_store_n(&d->guard.closed, 0, __ATOMIC_RELEASE);
    }
}

/* The driver's handlers block when there is nothing: EAL may have seen it on a descriptor of the same number. */
static bool is_ready(const struct watch *w)
{
    struct pollfd p = {.fd = rte_intr_fd_get(w->handle), .events = POLLIN | POLLRDHUP};

    return poll(&p, 1, 0) > 0;
}

/* In EAL's interrupt thread. */
static void handle(void *arg)
{
    struct watch *w = arg;
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &set, NULL); /* for good: sendmsg() to a peer that has gone */
    guard_hold();
    close_ports();
    if (!w->dead && is_ready(w)) {
        running = w;
        w->handler(w->arg);
        running = NULL;
    }
    open_ports();
    guard_release();
}

/* ---- What EAL watches for the driver ------------------------------------------------------------------------------ */
static void forget(struct watch *w)
{
    pthread_mutex_lock(&guard.list);
    for (struct watch **at = &guard.watches; *at; at = &(*at)->next) {
        if (*at == w) {
            *at = w->next;
            break;
        }
    }
    pthread_mutex_unlock(&guard.list);
}

struct wanted {
    rte_intr_callback_fn handler;
    const void *arg;
    const struct rte_intr_handle *handle;
    const struct watch *listener;
};

/* By what is not NULL in it, and not dead. */
static struct watch *find(struct wanted k)
{
    struct watch *w;

    pthread_mutex_lock(&guard.list);
    for (w = guard.watches; w; w = w->next) {
        if (!w->dead && (!k.handler || (w->handler == k.handler && w->arg == k.arg)) &&
            (!k.handle || w->handle == k.handle) && (!k.listener || w->listener == k.listener)) {
            break;
        }
    }
    pthread_mutex_unlock(&guard.list);
    return w;
}

/* EAL has forgotten it. May be called with EAL's own lock. */
static void ended(struct rte_intr_handle *handle, void *arg)
{
    struct watch *w = arg;

    forget(w);
    if (w->end) {
        w->end(handle, w->arg);
    } else if (w->close) {
        close(rte_intr_fd_get(handle));
    }
    free(w);
}

/* It is not called any more, and ends now, or when it has returned to EAL. Their number: 1; or -errno. */
static int drop(struct watch *w)
{
    struct rte_intr_handle *handle_of = (struct rte_intr_handle *)(uintptr_t)w->handle;
    int n;

    w->dead = true;
    for (;;) { /* the first is refused unless it runs, the second while it does */
        n = rte_intr_callback_unregister_pending(handle_of, handle, w, ended);
        if (n != -EAGAIN) {
            return n;
        }
        n = rte_intr_callback_unregister(handle_of, handle, w);
        if (n != -EAGAIN) {
            break;
        }
    }
    if (n > 0) {
        ended(handle_of, w);
    }
    return n;
}

/* ---- The driver's calls ------------------------------------------------------------------------------------------- */
static int on_register(const struct rte_intr_handle *handle_of, rte_intr_callback_fn handler, void *arg)
{
    struct watch *w = calloc(1, sizeof *w);
    int err;

    if (!w) {
        return -ENOMEM;
    }
    *w = (struct watch){.handler = handler, .arg = arg, .handle = handle_of, .listener = running};
    pthread_mutex_lock(&guard.list);
    w->next = guard.watches;
    guard.watches = w;
    pthread_mutex_unlock(&guard.list);
    err = rte_intr_callback_register(handle_of, handle, w);
    if (err < 0) {
        forget(w);
        free(w);
    }
    return err;
}

static int on_unregister(const struct rte_intr_handle *handle_of, rte_intr_callback_fn handler, void *arg)
{
    struct watch *w = find((struct wanted){.handler = handler, .arg = arg});
    int n = w ? rte_intr_callback_unregister(handle_of, handle, w) : -ENOENT;

    if (n > 0) {
        forget(w);
        free(w);
    }
    return n;
}

static int on_unregister_pending(const struct rte_intr_handle *handle_of, rte_intr_callback_fn handler, void *arg,
                                 rte_intr_unregister_callback_fn end)
{
    struct watch *w = find((struct wanted){.handler = handler, .arg = arg});

    (void)handle_of;
    if (!w) {
        return -ENOENT;
    }
    w->end = end;
    return drop(w);
}

/* Of a descriptor that EAL still watches: the driver's listener with its last port, whose descriptor it leaves open; or a
 * connection that it could not greet, and has closed. What the listener has accepted for no port goes with it; the few
 * bytes that the driver keeps for such a connection are lost. */
static void on_instance_free(struct rte_intr_handle *handle_of)
{
    struct watch *w = handle_of ? find((struct wanted){.handle = handle_of}) : NULL;

    if (w) {
        for (struct watch *c; (c = find((struct wanted){.listener = w})) != NULL;) {
            c->close = true;
            drop(c);
        }
        w->close = !w->listener;
        drop(w);
    }
    rte_intr_instance_free(handle_of);
}

/* ---- Ports -------------------------------------------------------------------------------------------------------- */
bool device_is_memif(const char *name) { return strncmp(name, "net_memif", 9) == 0; }

int guard_install(struct dpdk_error *error, const char *name)
{
    static const struct hook hooks[] = {
        {"rte_intr_callback_register", on_register},
        {"rte_intr_callback_unregister", on_unregister},
        {"rte_intr_callback_unregister_pending", on_unregister_pending},
        {"rte_intr_instance_free", on_instance_free},
    };
    int err = guard.installed ? 0 : hook_calls("librte_net_memif.so", hooks, sizeof hooks / sizeof *hooks);

    if (err < 0) {
        return complain(error, -err, "there is no DPDK device %s: the driver librte_net_memif.so %s", name,
                        err == -ENOENT ? "is not loaded"
                                       : "is not as expected: a peer that ends would end this process");
    }
    guard.installed = true;
    return 0;
}

void guard_add(struct dpdk_port *d)
{
    guard_hold();
    d->guard.next = guard.ports;
    guard.ports = d;
    guard_release();
}

void guard_remove(struct dpdk_port *d)
{
    guard_hold();
    for (struct dpdk_port **at = &guard.ports; *at; at = &(*at)->guard.next) {
        if (*at == d) {
            *at = d->guard.next;
            break;
        }
    }
    guard_release();
}

/* ---- Its netdev: that of netdev.c, when no handler runs ------------------------------------------------------------ */
static struct dpdk_port *port_of(struct bypass_netdev *nd) { return (struct dpdk_port *)nd; }

static int guarded_rx_burst(struct bypass_netdev *nd, bypass_pkt *out, int max)
{
    struct dpdk_port *d = port_of(nd);
    int n;

    if (unlikely(!enter(d))) {
        wake_before(d);
        wake_nothing(d);
        return 0;
    }
    n = eth_ops.rx_burst(nd, out, max);
    leave(d);
    return n;
}

static int guarded_tx_burst(struct bypass_netdev *nd, const bypass_pkt *pkts, int count)
{
    struct dpdk_port *d = port_of(nd);
    int n;

    if (unlikely(!enter(d))) {
        return 0;
    }
    n = eth_ops.tx_burst(nd, pkts, count);
    leave(d);
    return n;
}

static int guarded_reap(struct bypass_netdev *nd, bypass_pkt *done, int max)
{
    struct dpdk_port *d = port_of(nd);
    int n;

    if (unlikely(!enter(d))) {
        return 0;
    }
    n = eth_ops.reap(nd, done, max);
    leave(d);
    return n;
}

static int guarded_kick(struct bypass_netdev *nd)
{
    struct dpdk_port *d = port_of(nd);
    int err;

    if (unlikely(!enter(d))) {
        return 0;
    }
    err = eth_ops.kick(nd);
    leave(d);
    return err;
}

static int guarded_sleep(struct bypass_netdev *nd)
{
    struct dpdk_port *d = port_of(nd);
    int n;

    if (unlikely(!enter(d))) {
        return 1; /* look once more */
    }
    n = eth_ops.sleep(nd);
    leave(d);
    return n;
}

const struct bypass_netdev_ops *guarded_ops(void)
{
    static struct bypass_netdev_ops ops; /* one port is opened at a time */

    if (ops.rx_burst) {
        return &ops;
    }
    ops = eth_ops;
    ops.rx_burst = guarded_rx_burst;
    ops.tx_burst = guarded_tx_burst;
    ops.reap = guarded_reap;
    ops.kick = guarded_kick;
    ops.sleep = guarded_sleep;
    return &ops;
}
