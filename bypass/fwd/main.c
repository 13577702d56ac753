/* SPDX-License-Identifier: Apache-2.0 */
/*
 * main.c - the program: options, what it may do, and its loop. It polls while there are frames and for a while after
 * the last; then it sleeps in epoll until a frame, a doorbell, a message, or a death.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <getopt.h>
#include <linux/capability.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "program.h"

enum { BROKER_FD = 3, EVENTS_A_LOOK = 16, LOOK_ROUNDS = 8, CAPABILITY_BPF = 39 };

static struct program program; /* half a megabyte */

static const char help[] =
    "Usage: bypass-fwd [--listen NAME] [--hold] [--fd N] [--spin US] [--cpu N]\n"
    "\n"
    "Holds what accelerates this host's flows (links, maps, sockets, memory) for the broker, and, where several\n"
    "applications share an interface, moves their frames. `bypass` starts it; there is nothing to type here.\n"
    "\n"
    "  --listen NAME  where the next broker connects, as this user: a path, or @name in the abstract namespace.\n"
    "                 Without it bypass-fwd ends when its broker does.\n"
    "  --hold         when the broker ends, go on until all processes of the last item are dead, and no longer\n"
    "  --fd N         the broker's end of a SOCK_SEQPACKET pair (3)\n"
    "  --spin US      microseconds that it polls for more frames before it sleeps (50)\n"
    "  --cpu N        the CPU it runs on (any)\n"
    "  --help         this text\n";

static void __attribute__((noreturn, format(printf, 1, 2))) give_up(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    fputs("bypass-fwd: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(2);
}

uint64_t program_clock(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

int program_pin(int cpu)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    for (int i = 0; i < CPU_SETSIZE; i++) {
        if (cpu < 0 || i == cpu) {
            CPU_SET(i, &set);
        }
    }
    if (cpu >= CPU_SETSIZE) {
        return -EINVAL;
    }
    return sched_setaffinity(0, sizeof set, &set) < 0 ? -errno : 0;
}

/* ---- Events ------------------------------------------------------------------------------------------------ */

bool program_watch(struct program *w, int fd, uint32_t events, uint32_t kind, uint32_t number)
{
    struct epoll_event ev = {.events = events, .data.u64 = (uint64_t)kind << 32 | number};

    return epoll_ctl(w->epoll_fd, EPOLL_CTL_ADD, fd, &ev) == 0;
}

void program_unwatch(struct program *w, int fd) { epoll_ctl(w->epoll_fd, EPOLL_CTL_DEL, fd, NULL); }

static void on_event(struct program *w, uint64_t data)
{
    uint32_t number = (uint32_t)data;

    switch (data >> 32) {
    case EVENT_SIGNAL:
        w->quit = true;
        break;
    case EVENT_LISTEN:
        control_accept(w);
        break;
    case EVENT_CONNECTION:
        control_in(w, number);
        break;
    case EVENT_PID:
        store_pid_dead(w, number);
        break;
    default: /* doorbells and frames: it is awake, that is all */
        break;
    }
}

/* One event at a time: what it does may end what another is about. wait_ns: for the first, at most. */
static void look(struct program *w, uint64_t wait_ns)
{
    struct timespec t = {.tv_sec = (time_t)(wait_ns / 1000000000), .tv_nsec = (long)(wait_ns % 1000000000)};
    struct epoll_event ev;

    for (int i = 0; i < EVENTS_A_LOOK && !w->quit; i++) {
        if (epoll_pwait2(w->epoll_fd, &ev, 1, wait_ns == UINT64_MAX ? NULL : &t, NULL) != 1) {
            return;
        }
        on_event(w, ev.data.u64);
        if (ev.data.u64 >> 32 == EVENT_DEVICE) {
            return; /* it stays ready until its frames are taken */
        }
        t = (struct timespec){0};
        wait_ns = 0;
    }
}

static void tell_cuts(struct program *w)
{
    for (uint32_t i = 0; i < w->forward.ports; i++) {
        struct forward_port *p = w->forward.port[i];

        if (p && p->peer.cut && !p->cut_told) {
            struct fwd_app told = {.app = p->app};

            p->cut_told = 1;
            control_tell(w, &told, sizeof told, FWD_CUT);
        }
    }
}

/* The device is told of the sleep, and wakes it. */
static bool frames_waiting(struct program *w)
{
    struct bypass_netdev *d = w->device ? w->device->netdev : NULL;

    return d && d->ops->sleep && d->ops->sleep(d) > 0;
}

static void sleep_until_needed(struct program *w)
{
    uint64_t until_ns, now_ns = w->now_ns;

    if (!forward_sleep(&w->forward, now_ns, &until_ns)) {
        if (w->device && w->health_ns < until_ns) {
            until_ns = w->health_ns;
        }
        if (until_ns > now_ns && !frames_waiting(w)) {
            look(w, until_ns == UINT64_MAX ? UINT64_MAX : until_ns - now_ns);
        }
    }
    forward_wake(&w->forward);
}

static void run(struct program *w)
{
    uint64_t last_ns = 0;
    uint32_t rounds = 0;

    while (!w->quit) {
        uint32_t moved;

        w->now_ns = program_clock();
        if (w->device && w->device->kind->turn) {
            w->device->kind->turn(w->device, w->now_ns);
        }
        moved = forward_round(&w->forward, w->now_ns);
        tell_cuts(w);
        device_health(w);
        if (w->work) {
            store_work(w);
        }
        if (moved || w->work) {
            last_ns = w->now_ns;
        }
        if (w->now_ns - last_ns >= w->spin_ns && !w->work) {
            sleep_until_needed(w);
        } else if (++rounds % LOOK_ROUNDS == 0) {
            look(w, 0);
        }
    }
}

/* ---- Beginning --------------------------------------------------------------------------------------------- */

static socklen_t socket_name(const char *name, struct sockaddr_un *addr)
{
    size_t n = strlen(name);

    *addr = (struct sockaddr_un){.sun_family = AF_UNIX};
    if (n == 0 || n >= sizeof addr->sun_path || (name[0] != '@' && name[0] != '/')) {
        give_up("--listen %s: an absolute path or @name, of at most %zu bytes", name, sizeof addr->sun_path - 1);
    }
    memcpy(addr->sun_path, name, n);
    if (name[0] == '@') {
        addr->sun_path[0] = 0;
        return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + n);
    }
    return sizeof *addr;
}

/* Is nobody behind that path any more? Then it is taken away. */
static bool stale(const char *path, const struct sockaddr_un *addr, socklen_t len)
{
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    bool dead = fd >= 0 && connect(fd, (const struct sockaddr *)addr, len) < 0 && errno == ECONNREFUSED;

    if (fd >= 0) {
        close(fd);
    }
    return dead && path[0] == '/' && unlink(path) == 0;
}

static void listen_on(struct program *w, const char *name)
{
    struct sockaddr_un addr;
    socklen_t len = socket_name(name, &addr);
    mode_t mask = umask(0177);

    w->listen = name;
    w->listen_fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    while (bind(w->listen_fd, (struct sockaddr *)&addr, len) < 0) {
        if (errno == EADDRINUSE && stale(name, &addr, len)) {
            continue;
        }
        give_up("--listen %s: %s", name, errno == EADDRINUSE ? "another bypass-fwd is there" : strerror(errno));
    }
    umask(mask);
    if (listen(w->listen_fd, PROGRAM_CONNECTIONS) < 0 || !program_watch(w, w->listen_fd, EPOLLIN, EVENT_LISTEN, 0)) {
        give_up("--listen %s: %s", name, strerror(errno));
    }
}

static void take_broker(struct program *w, int fd, bool asked)
{
    int type = 0;
    socklen_t len = sizeof type;

    if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &len) == 0 && type == SOCK_SEQPACKET) {
        control_connection(w, fd);
    } else if (asked || w->listen_fd < 0) {
        give_up("descriptor %d is no SOCK_SEQPACKET socket: bypass-fwd is started by the broker, or with --listen", fd);
    }
}

static void signals(struct program *w)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    sigprocmask(SIG_BLOCK, &set, NULL);
    w->signal_fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (w->signal_fd < 0 || !program_watch(w, w->signal_fd, EPOLLIN, EVENT_SIGNAL, 0)) {
        give_up("signals: %s", strerror(errno));
    }
}

/* Keeps what opening AF_XDP sockets, locking their memory and writing to maps need, for ever; drops the rest. Nothing
 * can be gained by exec either, and nobody of the same user may look into this process. */
static void drop_privileges(void)
{
    const uint64_t keep = 1ull << CAP_NET_RAW | 1ull << CAP_NET_ADMIN | 1ull << CAP_IPC_LOCK | 1ull << CAPABILITY_BPF;
    struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct have[2];

    for (int cap = 0; cap < 64; cap++) {
        if (!(keep >> cap & 1)) {
            prctl(PR_CAPBSET_DROP, cap, 0, 0,
                  0); /* a kernel has fewer than 64; without CAP_SETPCAP none can be dropped */
        }
    }
    if (syscall(SYS_capget, &head, have) < 0) {
        give_up("capget: %s", strerror(errno));
    }
    for (int i = 0; i < 2; i++) {
        have[i].permitted &= (uint32_t)(keep >> 32 * i);
        have[i].effective = have[i].permitted;
        have[i].inheritable = 0;
    }
    if (syscall(SYS_capset, &head, have) < 0 || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 ||
        prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0) {
        give_up("privileges cannot be dropped: %s", strerror(errno));
    }
}

static long number_of(const char *option, const char *text, long least, long most)
{
    char *end;
    long n = strtol(text, &end, 10);

    if (*end || end == text || n < least || n > most) {
        give_up("--%s %s: a number from %ld to %ld", option, text, least, most);
    }
    return n;
}

struct options {
    const char *listen;
    bool hold;
    int fd, cpu;
    bool fd_given;
    long spin_us;
};

static struct options options_of(int argc, char **argv)
{
    static const struct option all[] = {{"listen", required_argument, NULL, 'l'},
                                        {"fd", required_argument, NULL, 'f'},
                                        {"spin", required_argument, NULL, 's'},
                                        {"cpu", required_argument, NULL, 'c'},
                                        {"hold", no_argument, NULL, 'H'},
                                        {"help", no_argument, NULL, 'h'},
                                        {0}};
    struct options o = {.fd = BROKER_FD, .cpu = -1, .spin_us = FWD_SPIN_US};
    int c;

    while ((c = getopt_long(argc, argv, "", all, NULL)) >= 0) {
        switch (c) {
        case 'l':
            o.listen = optarg;
            break;
        case 'f':
            o.fd = (int)number_of("fd", optarg, 3, 1 << 20);
            o.fd_given = true;
            break;
        case 's':
            o.spin_us = number_of("spin", optarg, 0, 1000000);
            break;
        case 'c':
            o.cpu = (int)number_of("cpu", optarg, 0, CPU_SETSIZE - 1);
            break;
        case 'H':
            o.hold = true;
            break;
        case 'h':
            fputs(help, stdout);
            exit(0);
        default:
            fputs("bypass-fwd: see bypass-fwd --help\n", stderr);
            exit(2);
        }
    }
    if (optind < argc) {
        give_up("%s: no argument is expected; see bypass-fwd --help", argv[optind]);
    }
    return o;
}

static void begin(struct program *w, const struct options *o)
{
    struct rlimit files;
    uint64_t seed;

    w->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    w->listen_fd = -1;
    w->spin_ns = (uint64_t)o->spin_us * 1000;
    w->hold = o->hold;
    for (int i = 0; i < PROGRAM_CONNECTIONS; i++) {
        w->connection[i].fd = -1;
    }
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    if (w->epoll_fd < 0 || getrandom(&seed, sizeof seed, 0) != sizeof seed || forward_init(&w->forward, seed) < 0) {
        give_up("%s", strerror(errno));
    }
    if (o->cpu >= 0 && program_pin(o->cpu) < 0) {
        give_up("--cpu %d: %s", o->cpu, strerror(errno));
    }
    signals(w);
    if (o->listen) {
        listen_on(w, o->listen);
    }
    take_broker(w, o->fd, o->fd_given);
    drop_privileges();
}

/* Everything closes: programs detach, the kernel has all packets; applications learn that their device is gone. What
 * items hold closes with the process, which waits for no peer (net/socket.c: sock_close() of one that exits). */
static void end(struct program *w)
{
    device_end(w);
    control_close(w);
    if (w->listen_fd >= 0) {
        close(w->listen_fd);
        if (w->listen[0] == '/') {
            unlink(w->listen);
        }
    }
    close(w->signal_fd);
    close(w->epoll_fd);
    forward_free(&w->forward);
}

int main(int argc, char **argv)
{
    struct options o = options_of(argc, argv);

    begin(&program, &o);
    run(&program);
    end(&program);
    return 0;
}
