/* SPDX-License-Identifier: Apache-2.0 */
/*
 * attach.c - this process' view of its application's memory: who it belongs to is decided when the first Internet socket
 * is opened, so that programs without sockets never notice.
 *
 *   BYPASS_SOCKET      the broker: it hands out the memory
 *   BYPASS_LOOPBACK=1  no broker: memory of our own, and a stack that talks to itself
 *   BYPASS_APP         a relative's: "ID:TOKEN" with a broker, "fd:N:PID" without
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "afxdp/afxdp.h"
#include "host.h"
#include "preload.h"

enum { LOOP_CONNS = 8192, LOOP_FRAMES = 16384 };

struct me me = {.mem_fd = -1, .broker_fd = -1, .wake_fd = -1, .dev_ep = -1, .ends_ep = -1};
pthread_mutex_t attaching = PTHREAD_MUTEX_INITIALIZER;

static void refuse(const char *why, int err)
{
    snprintf(me.refused, sizeof me.refused, "%s%s%s", why, err ? ": " : "", err ? strerror(err) : "");
}

/* ---- The memory ---------------------------------------------------------------------------------------- */
static int map_memory(int fd)
{
    struct stat st;

    if (fstat(fd, &st) < 0) {
        return -errno;
    }
    me.app = mmap(NULL, (size_t)st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (me.app == MAP_FAILED) {
        me.app = NULL;
        return -errno;
    }
    if (!app_valid(me.app, (size_t)st.st_size)) {
        munmap(me.app, (size_t)st.st_size);
        me.app = NULL;
        return -EPROTO;
    }
    me.mem_fd = fd;
    me.g = (struct group *)((uint8_t *)me.app + me.app->group_off);
    return 0;
}

/* Memory of our own, for a stack that talks to itself. */
static int make_loop(void)
{
    struct app_header h = {.device = APP_DEV_LOOP, .mtu = LOOP_MTU, .batch = 256};
    size_t size;
    int fd;

    bypass_config_default(&h.config, LOOP_CONNS);
    h.config.flags = BYPASS_F_RST | BYPASS_F_PING | BYPASS_F_LOOPBACK;
    snprintf(h.name, sizeof h.name, "%s", getenv("BYPASS_PROCNAME") ?: program_invocation_short_name);
    size = app_layout(&h, loop_mem_size(LOOP_FRAMES));
    fd = memfd_create("bypass", 0);
    if (fd < 0 || ftruncate(fd, (off_t)size) < 0 || real.write(fd, &h, sizeof h) != sizeof h) {
        return -errno;
    }
    return fd;
}

static bool is_loop(int fd)
{
    char path[32], target[32];
    ssize_t n;

    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    n = readlink(path, target, sizeof target);
    return n >= 13 && memcmp(target, "/memfd:bypass", 13) == 0;
}

/* The memory of relatives. Where a file action of posix_spawn() has closed it, the one who made it has it still. */
static int inherited_loop(void)
{
    const char *app = getenv("BYPASS_APP");
    char path[64];
    int fd, pid;

    if (!app || sscanf(app, "fd:%d:%d", &fd, &pid) != 2) {
        return -1;
    }
    if (is_loop(fd)) {
        return fd;
    }
    snprintf(path, sizeof path, "/proc/%d/fd/%d", pid, fd);
    fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd >= 0 && !is_loop(fd)) {
        real.close(fd);
        fd = -1;
    }
    return fd;
}

/* Programs that are started by this one find there whose relatives they are; exec.c adds it to other environments. */
void app_to_environment(const char *text)
{
    snprintf(me.app_text, sizeof me.app_text, "BYPASS_APP=%s", text);
    setenv("BYPASS_APP", text, 1);
}

static int open_loop(void)
{
    char text[32];
    int fd = inherited_loop();

    if (fd < 0) {
        fd = make_loop();
    }
    if (fd >= 0) {
        fd = fd_hide(fd);
        real.fcntl(fd, F_SETFD, 0); /* programs that are started by this one are relatives */
        snprintf(text, sizeof text, "fd:%d:%d", fd, (int)getpid());
        app_to_environment(text);
    }
    return fd;
}

/* ---- Device and stack ------------------------------------------------------------------------------------ */
static void watch(int fd, bool shared)
{
    if (me.watch_count < WATCH_FDS) {
        me.watch_fds[me.watch_count] = fd;
        me.watch_shared[me.watch_count++] = shared;
    }
}

static int attach_device(const int *fds, int count)
{
    void *mem = (uint8_t *)me.app + me.app->dev_off;
    struct afxdp_error error;
    int err;

    switch (me.app->device) {
    case APP_DEV_LOOP:
        me.dev = &me.loop.nd;
        if (me.g->ready == 1 && loop_init(mem, me.app->dev_size, LOOP_FRAMES) < 0) {
            return -EPROTO;
        }
        return loop_attach(&me.loop, mem, me.app->dev_size);
    case APP_DEV_AFXDP:
        me.afxdp = afxdp_attach(mem, me.app->dev_size, fds, (uint32_t)count, 0, &error);
        if (!me.afxdp) {
            return -error.err;
        }
        me.dev = afxdp_netdev(me.afxdp);
        for (int i = 0; i < count; i++) {
            watch(afxdp_fd(me.afxdp, i), true);
        }
        return 0;
    case APP_DEV_PORT:
        if (count < 2) {
            return -EPROTO;
        }
        watch(fds[1], true);
        err = port_attach(&me.port, mem, me.app->dev_size, fds[0], fds[1]);
        me.dev = err == 0 ? port_netdev(&me.port) : NULL;
        return err;
    default:
        return -EPROTO;
    }
}

/* What wakes this process stays the last: fork.c. */
static void watch_more(int fd)
{
    struct epoll_event ev = {.events = EPOLLIN | EPOLLEXCLUSIVE};
    int wake = me.watch_fds[me.watch_count - 1];

    if (me.watch_count < WATCH_FDS) {
        me.watch_fds[me.watch_count - 1] = fd;
        me.watch_shared[me.watch_count - 1] = true;
        watch(wake, false);
        real.epoll_ctl(me.dev_ep, EPOLL_CTL_ADD, fd, &ev);
        epoll_watch(fd);
        drive_anew(); /* who watches a single descriptor (park.c) has to watch this one too */
    }
}

void device_queue(int fd, uint32_t n, uint32_t of)
{
    struct afxdp_error error;

    if (me.app->device != APP_DEV_AFXDP || !me.afxdp || n != me.dev->queues) {
        real.close(fd); /* it was told before */
        return;
    }
    fd = fd_hide(fd);
    if (fd < 0) {
        return;
    }
    if (afxdp_take_queue(me.afxdp, fd, of, &error) < 0) {
        dprintf(2, "bypass: queue %u of %s cannot be served: %s\n", n, me.app->ifname, strerror(error.err));
        fd_unhide(fd);
        return;
    }
    watch_more(fd);
}

void device_sync(void)
{
    if (!me.dev) {
        return; /* attach() is at it */
    }
    if (me.app->device == APP_DEV_AFXDP) {
        afxdp_sync(me.afxdp);
    } else if (me.app->device == APP_DEV_PORT) {
        port_sync(&me.port);
    }
}

static int make_stack(void)
{
    static const struct bypass_addr localhost = {{[10] = 0xff, [11] = 0xff, 127, 0, 0, 1}};
    const struct bypass_env env = {.random = host_random};
    void *arena = (uint8_t *)me.app + me.app->arena_off;
    int err;

    if (me.g->ready != 1) {
        return bypass_attach(&me.stack, arena, me.app->arena_size, me.dev, &env);
    }
    err = bypass_create(&me.stack, arena, me.app->arena_size, &me.app->config, me.dev, &env, clock_ns());
    if (err == 0 && me.app->device == APP_DEV_LOOP) {
        err = address_add(&localhost, 8);
    }
    if (err == 0 && me.app->congestion[0]) {
        err = bypass_cc_default(&me.stack, me.app->congestion);
    }
    return err;
}

/* One of the relatives makes the group; the others wait for it. true: it is this one. */
static bool first(void)
{
    uint32_t none = 0;
    bool mine = atomic_compare_exchange_strong((_Atomic uint32_t *)&me.g->ready, &none, 1);

    while (!mine && atomic_load((_Atomic uint32_t *)&me.g->ready) != 2) {
        usleep(100);
    }
    return mine;
}

/* ---- This process ------------------------------------------------------------------------------------------- */
static int open_wakes(void)
{
    struct sockaddr_un sa;
    int fd = fd_hide(real.socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    socklen_t len = wake_name(&sa, me.proc);

    if (fd < 0 || real.bind(fd, (struct sockaddr *)&sa, len) < 0) {
        return -errno;
    }
    me.wake_fd = fd;
    me.dev_ep = fd_hide(real.epoll_create1(EPOLL_CLOEXEC));
    for (int i = 0; i < me.watch_count; i++) {
        struct epoll_event ev = {.events = EPOLLIN | (me.watch_shared[i] ? EPOLLEXCLUSIVE : 0)};

        if (real.epoll_ctl(me.dev_ep, EPOLL_CTL_ADD, me.watch_fds[i], &ev) < 0) {
            return -errno;
        }
    }
    watch(fd, false);
    return 0;
}

static int join(void)
{
    me.pid = getpid();
    me.proc = group_join(me.g, me.pid);
    return me.proc == GROUP_NONE ? -EUSERS : open_wakes();
}

static int attach_memory(const int *fds, int count)
{
    uint64_t wake_id = 0;
    bool mine = first();
    int err = 0;

    if (mine) {
        host_random(NULL, &wake_id, sizeof wake_id);
        err = group_init(me.g, me.app->group_size, me.app->config.max_socks, wake_id);
    } else {
        enter_quietly(); /* relatives are at work */
    }
    if (err == 0) {
        err = attach_device(fds, count);
    }
    if (err == 0) {
        device_defer(true);
        me.g->kick_again = EAGAIN; /* who had the device before may have been killed when it was about to */
        err = make_stack();
    }
    if (mine) {
        atomic_store((_Atomic uint32_t *)&me.g->ready, 2);
    } else {
        leave();
    }
    return err;
}

static void *reserve(size_t bytes)
{
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    return at == MAP_FAILED ? NULL : at;
}

bool fd_table(void)
{
    _Atomic uint32_t *none = NULL, *mine;

    if (likely(me.table) || !preload_wanted()) {
        return me.table;
    }
    mine = reserve(FD_MAX * sizeof *mine);
    if (mine && !atomic_compare_exchange_strong(&me.table, &none, mine)) {
        munmap(mine, FD_MAX * sizeof *mine);
    }
    return me.table;
}

static int attach_now(void)
{
    int fds[APP_QUEUES + 1], count = 0, err = 0;
    bool loop = !getenv("BYPASS_SOCKET") && getenv("BYPASS_LOOPBACK");

    fds[0] = !fd_table() ? -ENOMEM : loop ? open_loop() : -1;
    if (loop && fds[0] < 0) {
        refuse("no memory for a stack", -fds[0]);
        return fds[0];
    }
    if (!loop) {
        err = broker_hello(fds, APP_QUEUES + 1, &count);
        if (err < 0) {
            broker_hide(false);
            return err;
        }
        for (int i = 0; i < count; i++) {
            fds[i] = fd_hide(fds[i]);
        }
    }
    err = map_memory(fds[0]);
    broker_hide(err == 0 && me.app->device == APP_DEV_PORT);
    if (err == 0) {
        err = attach_memory(fds + 1, count - 1);
    }
    if (err == 0) {
        me.local = reserve(me.g->objects_max * sizeof *me.local);
        enter();
        err = me.local ? join() : -ENOMEM;
        if (err == 0 && me.g->relatives > 1) {
            adopt_sockets();
            relatives_look_before(clock_ns() + RELATIVES_LOOK_NS);
        }
        if (err == 0) {
            note_inherited();
        }
        if (err == 0 && !loop) {
            err = broker_ready();
        }
        leave();
    }
    if (err < 0) {
        refuse("the application's memory cannot be used", -err);
    }
    return err;
}

/* As it was before main(): programs may clear their environment. */
bool preload_wanted(void)
{
    static int yes; /* 0: not looked yet */

    if (!yes) {
        const char *loop = getenv("BYPASS_LOOPBACK"), *socket = getenv("BYPASS_SOCKET");

        yes = (loop && *loop && strcmp(loop, "0") != 0) || (socket && *socket) ? 1 : -1;
    }
    return yes > 0;
}

bool attach(void)
{
    if (likely(me.attached)) {
        return me.attached > 0;
    }
    if (self.attaching) {
        return false; /* the device asks about its interface by a socket of its own */
    }
    pthread_mutex_lock(&attaching);
    self.attaching = true;
    if (!me.attached) {
        int saved = errno;
        int done = !preload_wanted() ? -1 : attach_now() == 0 ? 1 : -1;

        if (done < 0 && me.refused[0]) {
            dprintf(2, "bypass: %s: sockets are the kernel's\n", me.refused);
        }
        atomic_thread_fence(memory_order_seq_cst);
        me.attached = done;
        if (done > 0) {
            enter();
            helper_start();
            if (me.g->relatives > 1) {
                relative_watch(getppid());
            }
            leave();
        }
        errno = saved;
    }
    self.attaching = false;
    pthread_mutex_unlock(&attaching);
    return me.attached > 0;
}

void attach_child(void)
{
    me.forked = false;
    fd_unhide(me.wake_fd); /* unbound: wake.c opened it to wake relatives */
    if (open_wakes() < 0) {
        refuse("a relative cannot be woken", errno);
    }
    me.g->procs[me.proc].state = PROC_JOINED;
    epoll_child();
    broker_rejoin();
    helper_start();
    relative_watch(getppid());
}

/* After those that note the environment (102): it may attach. */
__attribute__((constructor(103))) static void prepare(void)
{
    real_load();
    preload_wanted();
    me.broken = getenv("BYPASS_BREAK") && strcmp(getenv("BYPASS_BREAK"), "recv") == 0;
    fork_prepare();
    exit_prepare();
    exec_arrived();
}
