/* SPDX-License-Identifier: Apache-2.0 */
/*
 * preload.h - what the files of the preload library share. docs/preload.md has the rules; in the order of a call:
 *
 *   calls_*.c     the functions that programs call: errno, cancellation, flags
 *   fds.c         descriptor -> object; dup, close
 *   place.c       whose a socket is: the stack's or the kernel's, and why
 *   lock.c        into the stack, and out of it; kick.c what is sent then
 *   drive.c       a turn of the stack, and who is told of what it found; helper.c where nobody waits
 *   park.c        how threads sleep and drive meanwhile; aside.c whether they watch; wake.c how they are woken, and relatives
 *   attach.c      this process' view of the application's memory; fork
 *   broker.c      the conversation with the broker
 *   group.c       what relatives share; real.c the C library's own functions
 *
 * The lock is the group's. Functions say "lock held", or take it by themselves. Results: >= 0 or -errno, as the core's.
 */
#ifndef BYPASS_PRELOAD_H
#define BYPASS_PRELOAD_H

#include <errno.h>
#include <netinet/in.h>
#include <stdatomic.h>
#include <sys/un.h>

#include "app/loop.h"
#include "fwd/port.h"
#include "group.h"
#include "real.h"

#define EXPORT __attribute__((visibility("default")))
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

enum {
    FD_MAX = 1 << 20,       /* descriptors above it are the kernel's */
    FD_KERNEL = 0x40000000, /* its object is the kernel's for good: only close and dup have to know it */
    FD_HIDDEN = 0x20000000, /* the library's own */
    FD_EPOLL = (int)0x80000000,
    WATCH_FDS = APP_QUEUES + 2,
    WAKES = 8,
    RELATIVES_LOOK_NS = 1000000000, /* relatives that say nothing are looked after this often */
    TICK_NS = 1000000,              /* of the helper */
    SOON_NS = 100000,               /* threads that are awake for less than that are soon back */
    FLUSH_AT = 32, /* calls that queued output before it is handed to the device anyway: what one kick sends */
};

struct item; /* an entry of an epoll set: epoll.h */
struct epoll;

struct local { /* of an object, in this process */
    struct item *items;
    uint32_t fds; /* descriptors here */
};

/* A thread asleep in park(). */
struct sleeper {
    struct sleeper *next, **prev;
    uint32_t object;     /* that it waits for; GROUP_NONE: for several, it looks itself */
    struct epoll *epoll; /* or for this set, which has an eventfd of its own */
    int wake_fd;         /* an eventfd: written to wake it */
    bool woken;          /* there is something for it */
    bool spinning;       /* it does not sleep yet */
    bool watching;       /* it watches the device */
};

struct me {       /* this process */
    int attached; /* 0: nobody needed it yet; 1; -1: refused, all sockets are the kernel's */
    char refused[200];
    int32_t pid;
    uint32_t proc; /* its place in group.procs */
    struct app_header *app;
    struct group *g;
    struct bypass_stack stack;
    struct bypass_netdev *dev;
    struct loop loop;
    struct afxdp *afxdp;
    struct port port;
    int mem_fd, broker_fd, wake_fd;
    int ends_ep;                  /* an epoll set of relatives that may end: proc.c */
    int dev_ep;                   /* an epoll set of the device's descriptors */
    int watch_fds[WATCH_FDS];     /* those, and wake_fd */
    bool watch_shared[WATCH_FDS]; /* ... that wake one relative only (EPOLLEXCLUSIVE) */
    int watch_count;
    struct sleeper *sleepers;
    bool lent;               /* nobody watches: who was woken will, when it sleeps again */
    int64_t away_ns;         /* how long threads are awake that were woken for something, on average */
    uint64_t watch_until;    /* ... and until when it sleeps at the latest */
    uint32_t vain;           /* times in a row that it was woken and nothing had come for this process: */
    bool aside;              /* relatives watch, and this process does not (aside.c) */
    uint32_t aside_turns;    /* ... of relatives, when that was looked at last */
    struct sleeper *watcher; /* who watches the device for all; NULL: nobody */
    struct sleeper helper;
    bool helper_runs, helper_deep;
    bool helper_slow;         /* it sleeps for a while, since relatives drive */
    uint32_t turns;           /* of group.turns, those that this process has given */
    bool may_pass;            /* it made a pair of Unix sockets: descriptors may be passed to children */
    bool relative;            /* it was started by a relative, attached or not */
    char app_text[64];        /* BYPASS_APP, as "NAME=value", once attached */
    bool reaper;              /* this is bypass-linger, which drives what others left */
    _Atomic bool gone;        /* goodbye() was called */
    bool cancels;             /* pthread_cancel() has been called */
    struct thread *halted_by; /* a thread that ends this process, or its program: others may not go to work */
    bool broken;              /* BYPASS_BREAK=recv: the control of the test suites, which have to notice */
    bool forked;              /* a child that has not joined the group yet */
    int fd_top;               /* highest descriptor that `table` ever knew, plus one */
    uint64_t turn_ns;         /* the last turn of this process' own threads */
    struct local *local;      /* by object */
    _Atomic uint32_t
        *_Atomic table; /* by descriptor: 0 the kernel's; object + 1, FD_KERNEL | object + 1, FD_EPOLL | ... */
};
extern struct me me;

struct thread {              /* of the calling thread */
    uint32_t inside;         /* it holds the lock: signal handlers wait (signal.c) */
    uint32_t pending;        /* a signal was put off meanwhile, */
    uint64_t mask;           /* when these were blocked */
    siginfo_t kept;          /* ... and this is the first of them, if si_signo is not 0 */
    uint32_t handled;        /* handlers that ran, ever: who was about to sleep looks whether it changed */
    bool no_restart;         /* ... of these one had no SA_RESTART */
    bool guarded;            /* not to be cancelled while it holds the lock; before that it was in this state: */
    int cancel_state;        /* pthread_setcancelstate(3) */
    uint32_t orphan;         /* an object that only the call under way has, plus one */
    bool kernels;            /* wait_for(): the kernel's half is ready */
    bool attaching;          /* in attach() */
    uint64_t fed_ns;         /* when it was last woken for something, if it has not slept since */
    int wakes;               /* that it owes: whom it found something for while it has the lock */
    int owed[WAKES];         /* eventfds; relatives as -1 - their place */
    int wake_fd;             /* its eventfd plus one; 0: none yet */
    struct sleeper *sleeper; /* it is in park() with this one */
};
extern __thread struct thread self;

/* ---- attach.c */
/* Makes this process an application's, if it is told to be one. Whether it is. Takes the lock by itself. */
bool attach(void);
/* Whether it is told to be one. */
bool preload_wanted(void);
/* Makes me.table if it is not there: sets may be noted before the library attaches. Whether it is there. */
bool fd_table(void);
/* After fork(), in the child, lock held: joins the group. */
void attach_child(void);
extern pthread_mutex_t attaching; /* attach() is at work */

/* Lock just taken: what relatives did to the device meanwhile. */
void device_sync(void);
/* kick.c: whether the device leaves the system calls by which it sends to those two; lock held. */
void device_defer(bool on);
/* The lock is about to be let go of: what system calls have to follow (0: none); and makes them, without the lock. */
uint64_t device_owed(void);
void device_kick(uint64_t owed);
/* Lock held: the device is told now of all that it has not sent. */
void device_kick_again(void);
/* The interface has got a queue, of number n, and there are going to be `of`: fd is its socket. */
void device_queue(int fd, uint32_t n, uint32_t of);

/* revive.c: the lock has been taken over from a relative that died with it. */
void revive(void);

/* ---- lock.c */
void enter(void);
void leave(void);
/* As enter(), but a child of fork() does not join the group for it: for close(), exec and exit. */
void enter_quietly(void);
void signals_deliver(void); /* signal.c: lets in what was put off; no lock held */

/* ---- fds.c */
/* Objects by descriptor. Lock taken when the result is not NULL, and the object is served by the stack (PLACE_STACK,
 * PLACE_BOTH). NULL: it is the kernel's, nothing is held. */
struct object *fd_enter(int fd);
/* The same for any object, wherever it is served. */
struct object *fd_enter_any(int fd);
struct object *fd_enter_quietly(int fd); /* as enter_quietly() */
uint32_t object_index(const struct object *o);
/* Lock held. fd names the object from now on, counted; what it named before it names no more. No other thread sees a
 * time in which it names nothing. */
void fd_set_object(int fd, uint32_t object);
/* Lock held. GROUP_NONE: it names none. */
uint32_t fd_object(int fd);
/* Without the lock. The kernel has just given this number to something that is no object: if the table knows it, it was
 * closed behind our back (a direct system call, fclose()). */
void fd_fresh(int fd);
void fd_mark(int fd, uint32_t entry); /* in the table, as it is */
/* Lock held. fd names no object any more; with the last descriptor of all relatives the object ends. */
void fd_forget(int fd);
/* Lock held: one reference less. */
void object_put(uint32_t object);
void object_end(uint32_t object); /* nobody has it any more */
/* Its packets are the kernel's from now on, since the policy has changed: so is a listener or a datagram socket, and a
 * connection is over. */
void object_revoke(uint32_t object);
/* Lock held. A socket that the stack does not have, kept to tell why. type 0: neither TCP nor UDP. more may be NULL. */
void object_of_kernel(int fd, int family, int type, enum reason why, const char *more);
/* Lock held: close() of a descriptor, up to the kernel's part; the last of a listener's ends the kernel's half too. */
void close_object(int fd);
static inline uint32_t fd_entry(int fd)
{
    return likely((unsigned)fd < FD_MAX && me.table) ? atomic_load_explicit(&me.table[fd], memory_order_relaxed) : 0;
}
static inline bool fd_is_object(int fd)
{
    uint32_t v = fd_entry(fd);
    return v != 0 && !(v & (FD_EPOLL | FD_HIDDEN));
}
static inline bool fd_on_stack(int fd) /* it may be: fd_enter() tells */
{
    uint32_t v = fd_entry(fd);
    return v != 0 && !(v & (FD_KERNEL | FD_EPOLL | FD_HIDDEN));
}
/* A kernel descriptor of the library's own, moved to where programs do not look for theirs; close-on-exec. */
int fd_hide(int fd);
void fd_unhide(int fd); /* closes it */
/* Whether fd is one of the library's own: programs that close everything must not close these. */
static inline bool fd_hidden(int fd) { return (fd_entry(fd) & FD_HIDDEN) && !(fd_entry(fd) & FD_EPOLL); }

/* ---- place.c. Lock held. */
/* The socket is the kernel's from now on, and why. `more` may be NULL. */
void place_kernel(int fd, struct object *o, enum reason why, const char *more);
/* bind(), listen() and connect() have to decide. The shadow has done its part where said.
 * 0; -errno is the call's result; PLACE_REAL: the call is the kernel's. */
enum {
    PLACE_REAL = 1,
    PLACE_TRY, /* the kernel is asked; if it refuses, nothing is decided */
};
/* The shadow's bind(), also to an address that the stack alone has. 0 or -errno. */
int place_bind(int fd, const struct object *o, const struct sockaddr *sa, socklen_t len);
int place_bind_any(int fd, const struct object *o, const struct sockaddr *sa,
                   socklen_t len);                                            /* port 0; the shadow only */
int place_free(struct object *o, const struct bypass_endpoint *local);        /* before */
int place_bound(int fd, struct object *o);                                    /* after the shadow is bound */
int place_rebind(struct object *o, const struct sockaddr *sa, socklen_t len); /* a connection, or one that was */
int place_listen(int fd, struct object *o, int backlog);                      /* before the shadow listens */
void place_unlisten(struct object *o);                                        /* the shadow does not listen */
int place_connect(int fd, struct object *o, const struct bypass_endpoint *to);
/* PLACE_TRY, and the kernel has refused it: so does the stack. -EINPROGRESS, or what prevents it. */
int place_refused(int fd, struct object *o, const struct bypass_endpoint *to);
/* Whether datagrams of o to this peer leave by the stack. */
bool place_sends(const struct object *o, const struct bypass_endpoint *to);
/* A datagram socket sends to a peer before bind() and connect(). */
void place_unbound(int fd, struct object *o, const struct sockaddr *sa, socklen_t len);
bool address_is_loopback(const struct bypass_addr *a);

/* ---- drive.c. Lock held. */
uint64_t clock_ns(void);
/* Receives, runs timers, sends, tells who waits. Whether anything happened. */
bool turn(void);
/* When the stack, or the care for relatives, wants a turn at the latest. */
uint64_t next_turn(void);
/* A call has queued output: it leaves with the next turn, or now when there is much. */
void sent(void);
/* A call would block, and the program does not want to wait: a turn, unless there was one a moment ago. Whether it is
 * worth trying again. */
bool retry(void);
/* Whoever watches the device goes to sleep anew: there may be something to do earlier. */
void drive_anew(void);

/* ---- helper.c: makes sure that its thread runs (for the broker's messages, and while nobody waits). Lock held. */
void helper_start(void);

/* ---- aside.c: the watcher of this process is about to sleep until due_ns: whether relatives watch the device in place of it
 * (me.aside). When it has to be awake at the latest. Lock held. */
uint64_t aside_judge(uint64_t due_ns);

/* ---- park.c. Lock held. */
/* Sleeps until one of these: an object became ready (sleeper.object, sleeper.epoll), a kernel descriptor of fds is (its
 * revents say), until_ns (UINT64_MAX: never). The lock is let go of meanwhile. Number of fds ready, -EINTR, -ETIMEDOUT. */
int park(struct sleeper *s, struct pollfd *fds, int n, uint64_t until_ns, const sigset_t *mask);
/* The same without a copy: the first PARKS of fds are park's, n counts those behind them. */
enum { PARKS = 3 };
int park_polling(struct sleeper *s, struct pollfd *fds, int n, uint64_t until_ns, const sigset_t *mask);
/* The same with another system call to sleep in. `doze` is called without the lock; or with it, when *ts is 0: then it must
 * be no cancellation point. What it returns ends the sleep: > 0 something is ready, 0, -errno. Result as park()'s. */
typedef int doze_call(void *arg, const struct timespec *ts, const sigset_t *mask);
int park_by(struct sleeper *s, doze_call *doze, void *arg, uint64_t until_ns, const sigset_t *mask);
/* The calling thread sleeps in park(), and is about to run a signal's handler. No lock held. */
void unpark(void);
/* Waits until the object may have become ready for `events` (POLLIN, POLLOUT, ...). 0: try again; -EINTR; -EAGAIN: the
 * timeout (timeo_ns; 0 none, counted from *since, which is 0 at first) is over. Restarts after signals as SA_RESTART
 * says (signal(7)). */
int wait_for(struct object *o, int fd, short events, int64_t timeo_ns, uint64_t *since);
/* From now on this process is told when the object becomes ready. */
void object_wait(uint32_t object);
/* real.ppoll(), -errno; no cancellation point when *ts is 0: may be called with the lock held. */
int poll_kernel(struct pollfd *fds, int n, const struct timespec *ts, const sigset_t *mask);
/* From now until then, into *ts; NULL: for ever. */
struct timespec *time_left(uint64_t until_ns, struct timespec *ts);

/* ---- wake.c. Lock held. */
void wake(struct sleeper *s);
/* Threads that are woken for something sleep again before long. */
bool soon_back(void);
/* Eventfds to wake threads by. What was one is kept for the next who needs one: a late ring must not hit anything else. */
int bell_open(void);
void bell_close(int fd);
void bells_child(void);   /* after fork, in the child: the parent's are not ours */
int thread_wake_fd(void); /* the calling thread's own */
/* Rings a bell: when the lock is free, so that who wakes up does not wait for it. */
void ring(int bell);
/* Reads a bell, or one wake of a relative's. No cancellation point: a thread that has the lock must not be cancelled. */
void drain(int fd);
/* Wakes each relative: one that drives may have something to do earlier; */
void wake_joined(void);
void wake_relatives(void);                                  /* those that sleep and have something in their queues. */
void wake_owed(void);                                       /* The lock has just become free: what this thread owes. */
socklen_t wake_name(struct sockaddr_un *sa, uint32_t proc); /* of a relative's socket */

/* ---- Readiness */
/* Level readiness of an object as poll(2) bits, the stack's half. */
short object_ready(const struct object *o);
/* The stack's readiness as poll(2) tells it. */
static inline uint32_t poll_bits(uint32_t ready)
{
    return (ready & BYPASS_IN ? POLLIN | POLLRDNORM : 0) | (ready & BYPASS_OUT ? POLLOUT | POLLWRNORM : 0) |
           (ready & BYPASS_ERR ? POLLERR : 0) | (ready & BYPASS_HUP ? POLLHUP : 0) |
           (ready & BYPASS_RDHUP ? POLLRDHUP : 0) | (ready & BYPASS_PRI ? POLLPRI : 0);
}
/* epoll.c, called by dispatch: an object of this process became ready; how, as poll_bits(). */
void epoll_ready(uint32_t object, uint32_t bits);
/* A descriptor of it is about to be closed; me.local[].fds counts those that are left. */
void epoll_forget(uint32_t object, int fd);
void epoll_sleeper(struct epoll *set, int count); /* a thread more, or less, sleeps in a set */
void epoll_devices(struct epoll *e, bool on);     /* the threads of the set are to be woken by the device, or are not */
void epoll_watch(int fd);                         /* one more socket of the device */
void epoll_child(void);                           /* after fork, in the child */
void epoll_placed(uint32_t object, int fd);       /* it is decided whose it is: members of sets change sides */
void epoll_close(int fd);                         /* without the lock: a set's descriptor is about to be closed */
void epoll_dup(int fd, int copy);                 /* without the lock: another descriptor of the same set */
int epoll_save(void);                             /* epoll_exec.c: a file for the next program; -1: nothing to keep */
void epoll_restore(int file);                     /* ... in which it has its sets again */

/* ---- dial.c */
/* A connection to the broker at `path` (`@` first: an abstract name), if it is to be believed. wait: for one that is busy.
 * The descriptor, hidden; -errno with me.refused set. */
int dial(const char *path, bool wait);

/* ---- broker.c */
/* Says hello: new application or relative. 0: me.app.., descriptors; -errno with me.refused set. */
void broker_hide(bool shared); /* whether others of this user may look into this process, once that is known */
int broker_hello(int *fds, int max, int *count);
int broker_ready(void);  /* then, with the stack there: addresses and grants */
int broker_rejoin(void); /* after fork */
/* Lock held throughout: one question, one answer. -errno of the answer. */
int broker_lease(struct app_msg *m, int fd);
void broker_release(uint32_t lease);
void broker_release_soon(uint32_t lease); /* nobody waits for its end */
/* A question for a block that is not needed yet: the answer is block_came()'s, whoever of this process hears it. */
void broker_block_ahead(int type, const struct bypass_endpoint *to);
bool broker_block_await(void); /* waits for that answer; whether there was a question */
/* blocks.c: binds the shadow to a port of a block from which the peer is reached. 0 and *local; -ENOENT: there is none,
 * ask for a lease with `flags` (app.h); -EACCES: it is not granted from a block; other -errno are the call's. */
int block_bind(int fd, const struct object *o, const struct bypass_endpoint *to, struct bypass_endpoint *local,
               uint32_t *flags);
void block_add(const struct app_msg *m, int type, const struct bypass_addr *to); /* the answer to that, a block */
void block_came(const struct app_msg *m, int type, const struct bypass_addr *to);
bool block_has(int type, const struct bypass_endpoint *local);
void blocks_check(uint64_t now); /* gives back those that nobody uses */
void block_revoked(uint32_t lease);
void routes_forget(void);
/* Its socket is closed: it ends when the stack has no connection on the port any more. leases.c */
void lease_leaves(uint32_t lease, int type, uint16_t port);
void leases_check(void);         /* now and then */
void lease_told(uint32_t lease); /* the broker says that we have it */
bool block_known(uint32_t lease);
void broker_resolve(const struct bypass_addr *dst);
int address_add(const struct bypass_addr *addr, int prefix_len);
int broker_fd(void);    /* readable: broker_read() has work; -1 none */
void broker_read(void); /* what the broker says of its own accord */
bool granted(int kind, const struct bypass_endpoint *local, const struct bypass_endpoint *remote);
void grant_take(const struct app_msg *m); /* grants.c */
void broker_announce_exec(void);
void broker_tell_fork(pid_t pid); /* in the child, on its parent's connection: without the lock */
int broker_dial_again(void);      /* a connection on which hello was said; -errno. rejoin.c */
int broker_linger(void);
void broker_leave(void); /* ends the conversation: the application is over */

/* ---- rejoin.c: another broker, when ours was killed. Lock held. */
void rejoin_soon(void);                        /* the connection is lost */
void rejoin_never(void);                       /* it ends in order, or does not know us */
uint64_t rejoin_due(void);                     /* when rejoin_try() has something to do; UINT64_MAX */
void rejoin_try(void);                         /* the helper's; does not wait */
int rejoin_fd(void);                           /* readable: broker_read() has work; -1 none */
int rejoin_take(void);                         /* the connection that it made, if there is one: the caller's now */
bool rejoin_answered(const struct app_msg *m); /* hello was; false: the conversation is over */
void rejoin_child(void);                       /* after fork, in the child */

/* ---- proc.c: relatives that fork, become other programs, and end. Lock held. */
/* g->check_ns is over: looks after relatives that died or became programs without this library. */
void relatives_check(void);
/* ... which is to be done by then. */
void relatives_look_before(uint64_t due_ns);
/* The end of this relative is to be noticed at once: me.ends_ep becomes readable, and relatives_ended() looks. */
void relative_watch(pid_t pid);
void relatives_ended(void);
void relatives_open(void);         /* before the first */
void relatives_child(void);        /* after fork, in the child: without the lock */
void relative_look(uint32_t proc); /* one of them now */
/* A place is nobody's any more, nor is what it had. */
void relative_gone(uint32_t proc);
/* An object has references, none of them of this process: whether its other holders are still there is looked at soon. */
void relatives_suspect(uint32_t object);

/* ---- fork.c, exec.c, exit.c */
void fork_prepare(void); /* once */
void exit_prepare(void);
/* A program has just started: it joins the application if it was started with sockets of it. */
void exec_arrived(void);
void app_to_environment(const char *text);
bool is_internet(int fd);
/* Lock held. This process has just joined a group that was there: it takes what it was started with. */
void adopt_sockets(void);
/* Lock held. Internet sockets that are no object's have been opened where this library was not: they are the kernel's,
 * and it is told why. A single one: whether fd is such a socket. */
void note_inherited(void);
bool note_inherited_fd(int fd);
uint64_t fd_inode(int fd); /* 0: it is no socket */
/* The process ends: its sockets are closed, and somebody drives what they left. Without the lock; again: nothing. */
void goodbye(void);
bool stack_used(void); /* Lock held. There are connections; */
bool stack_busy(void); /* ... with something to send, or to be acknowledged */
/* stdio.c: what programs have buffered for sockets. Without the lock. */
void streams_flush(void);
void stream_standard(int fd); /* 0 to 2 may have become a socket */

/* ---- pass.c: descriptors in messages on Unix sockets. Without the lock. */
void pass_sent(const struct msghdr *h);   /* before it is sent, */
void pass_unsent(const struct msghdr *h); /* ... and when that failed */
void pass_received(struct msghdr *h);
void pass_check(void); /* lock held: messages that nobody took */
void pass_child(void); /* after fork, in the child */

/* ---- uring.c: this process has an io_uring. now: look, else a look of the last second will do. */
bool uring_used(bool now);
void uring_noted(void); /* it is making one */

/* ---- share.c: sockets by place, of this process and of all relatives. Lock held. */
void count_stack(int type);
void count_kernel(int type, int reason);
void count_child(void); /* after fork, in the child */
/* BYPASS_TRACE_SHARE: this process ends, or becomes another program: tells, once. Any thread; without the lock too. */
void share_write(void);

/* ---- Addresses: name.c */
/* -EAFNOSUPPORT, -EINVAL (too short). An IPv4 address may come as AF_INET, or mapped in AF_INET6. */
int name_from(const struct object *o, const struct sockaddr *sa, socklen_t len, struct bypass_endpoint *out);
/* Writes what fits, and the whole length to *len, as the kernel does. */
void name_to(const struct object *o, const struct bypass_endpoint *e, struct sockaddr *sa, socklen_t *len);

static inline int result(int64_t r)
{
    if (unlikely(r < 0)) {
        errno = (int)-r;
        return -1;
    }
    return (int)r;
}
static inline ssize_t result_size(int64_t r)
{
    if (unlikely(r < 0)) {
        errno = (int)-r;
        return -1;
    }
    return (ssize_t)r;
}

#endif
