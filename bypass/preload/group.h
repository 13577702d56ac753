/* SPDX-License-Identifier: Apache-2.0 */
/*
 * group.h - what the relatives of an application share, in its memory (app.h): the lock, objects (sockets), processes,
 * and which process has which object. No pointers: each process maps it elsewhere.
 *
 * An object is a socket of the program. Its shadow is the kernel socket that has the descriptor's number. Descriptors of
 * all relatives that name it are counted in `refs`; with the last of them it ends.
 *
 * Everything here is read and written with the lock held, unless it says otherwise.
 */
#ifndef BYPASS_PRELOAD_GROUP_H
#define BYPASS_PRELOAD_GROUP_H

#include <pthread.h>
#include <stdbool.h>

#include "app/app.h"

enum {
    GROUP_PROCS = 512,
    GROUP_NONE = 0xffffffff, /* no index */
    GROUP_WHY = 40,
    GROUP_ADDRS = 16, /* addresses of a stack */
    BYPASS_EVERYTHING = BYPASS_IN | BYPASS_OUT | BYPASS_ERR | BYPASS_HUP | BYPASS_RDHUP | BYPASS_PRI,
    HOLDS = 3,        /* for each object, on the average */
    GROUP_SPARE = 64, /* objects beyond what the stack has room for: to tell why more sockets are the kernel's */
};

enum place {
    PLACE_UNDECIDED, /* opened, and nothing has told yet whose it will be */
    PLACE_STACK,
    PLACE_KERNEL, /* object.reason says why */
    PLACE_BOTH,   /* a listener, a bound datagram socket: what is steered comes by the stack, the rest by the kernel */
};

/* Why a socket is the kernel's. */
#define REASONS(X)                                                                                                     \
    X(NONE, "")                                                                                                        \
    X(NOT_GRANTED, "no rule of the policy grants it")                                                                  \
    X(REFUSED, "the broker refused")                                                                                   \
    X(LOOPBACK, "it is local: loopback traffic is the kernel's")                                                       \
    X(IPV6, "IPv6")                                                                                                    \
    X(PROTOCOL, "a protocol that the stack does not speak")                                                            \
    X(FULL, "the stack has no room")                                                                                   \
    X(OPTION, "an option that the stack does not have")                                                                \
    X(UNBOUND_DATAGRAMS, "datagrams sent without bind() or connect()")                                                 \
    X(INHERITED, "opened before the library was there, or by another program")                                         \
    X(MULTICAST, "multicast or broadcast")                                                                             \
    X(NOBODY, "nobody listens there on the stack")                                                                     \
    X(URING, "io_uring is used")                                                                                       \
    X(DUPLICATE, "the port is a relative's or another socket's on the stack")

enum reason {
#define X(name, text) WHY_##name,
    REASONS(X)
#undef X
        WHY_COUNT
};

struct object {
    uint32_t next;                    /* free list */
    uint32_t refs;                    /* descriptors and sleeping calls of all relatives, messages under way */
    uint64_t ino;                     /* of the shadow; 0: nobody needed it yet */
    bypass_sock sock;                 /* -1: none; with PLACE_STACK: it was lost, the connection is over */
    struct bypass_endpoint local;     /* PLACE_BOTH: where it is bound, */
    int32_t backlog;                  /* ... and how it listens */
    int64_t rcvtimeo_ns, sndtimeo_ns; /* 0: none */
    uint32_t lease;                   /* the broker's; 0: none */
    uint32_t holds;                   /* list of struct hold */
    int32_t pid, fd;                  /* its first descriptor, for people */
    uint8_t type;                     /* BYPASS_STREAM, BYPASS_DGRAM */
    uint8_t family;                   /* AF_INET, AF_INET6 */
    uint8_t place;                    /* enum place */
    uint8_t reason;                   /* enum reason */
    uint8_t nonblock;                 /* O_NONBLOCK of the open file description */
    uint8_t listening;
    uint8_t connecting; /* a connect() is under way on the stack */
    uint8_t bound;      /* by the program */
    uint8_t v6only;
    uint8_t shut_rd;         /* of a datagram socket */
    uint8_t shadow_nonblock; /* the shadow is O_NONBLOCK although the program's descriptor may not be */
    uint16_t under_way;      /* of refs: messages that carry it (pass.c) */
    int32_t keep_fd; /* of the process keep_pid: a duplicate of the shadow that keeps the port until `lease` ends; -1 */
    char why[GROUP_WHY]; /* more about `reason`; for people */
};

struct hold {       /* a process has descriptors of an object, or waits for it */
    uint32_t next;  /* of the object's, or of the free list */
    uint32_t qnext; /* of the process' queue */
    uint32_t object;
    uint32_t refs;  /* descriptors, and */
    uint32_t calls; /* ... threads that sleep in a call on it */
    uint16_t proc;
    uint8_t queued;
    uint8_t waits; /* it wants to know when the object becomes ready */
    uint32_t mask; /* what became ready, BYPASS_IN ..., since it was told */
};

enum proc_state {
    PROC_JOINED,  /* it has the library and a socket to be woken by, which ends with it */
    PROC_FORKED,  /* a child that has not called anything yet, and may never */
    PROC_FOREIGN, /* it became another program, or is about to: /proc tells what it has */
};

struct proc {          /* a relative */
    int32_t pid;       /* 0: free; -1: a child that is being made */
    uint32_t state;    /* enum proc_state */
    uint64_t since_ns; /* that it is in this state */
    uint64_t started;  /* of the process, as /proc/PID/stat has it: the number may be used again; 0: unknown */
    uint32_t parked;   /* threads asleep */
    uint32_t watches;  /* ... one of which watches the device */
    uint32_t called;   /* one of them is being woken: what waits in the queue is not told again */
    uint32_t queue_head, queue_tail; /* watches whose objects became ready */
};

struct block {      /* a lease of local ports to connect from: blocks.c */
    uint32_t lease; /* 0: none */
    uint16_t first, last, type;
    struct bypass_addr local;
    uint64_t used_ns; /* a connection was on it at least until then */
};

struct route { /* which local address a peer is reached from */
    struct bypass_addr to, local;
    uint64_t until_ns; /* then the broker is asked again */
};

struct leaving { /* a lease whose socket is closed: leases.c */
    uint32_t lease;
    uint16_t port, type;
};

struct group {
    uint32_t magic, abi;
    uint32_t ready;     /* atomic: 0 nobody has made the stack yet, 1 being made, 2 made */
    uint32_t revived;   /* how often the stack was made anew: revive.c */
    uint32_t dead;      /* a relative died inside the stack: nothing of it can be trusted any more */
    uint32_t relatives; /* processes, */
    uint32_t procs_top; /* in the first so many of `procs` */
    uint64_t wake_id;   /* part of the names of the sockets that wake relatives */
    pthread_mutex_t lock;
    uint32_t working;  /* whoever has the lock is at work: if it dies there is no telling what it left */
    uint64_t turn_ns;  /* when the stack was driven last */
    uint64_t check_ns; /* when somebody has to look after processes that do not tell by themselves; UINT64_MAX: never */
    uint32_t unsent;   /* calls whose output has not been handed to the device */
    uint32_t kick_again; /* errno: the device has frames that it could not send yet, or of which it was not told */
    uint32_t objects_free, objects_bump, objects_used, objects_max;
    uint32_t holds_free, holds_bump, holds_max;
    uint64_t objects_off, holds_off;                       /* from the group's start */
    uint64_t tcp_stack, tcp_kernel, udp_stack, udp_kernel; /* sockets that ended up there, ever */
    struct {
        struct bypass_addr addr;
        int32_t prefix_len;
        uint32_t used;
    } addrs[GROUP_ADDRS];
    uint64_t leaving_ns; /* when they were looked at */
    uint32_t leaving_count;
    uint32_t turns; /* that were given to the stack, ever */
    struct leaving leaving[4096];
    uint64_t blocks_due_ns; /* when blocks have to be looked at; UINT64_MAX: never */
    uint64_t blocks_ask_ns; /* until then nobody asks for one ahead */
    struct block blocks[64];
    struct route routes[256];
    struct proc procs[GROUP_PROCS];
};

_Static_assert(sizeof(struct group) + GROUP_SPARE * APP_GROUP_PER_SOCKET <= APP_GROUP_FIXED,
               "the head of the group fits");
_Static_assert(sizeof(struct object) + HOLDS * sizeof(struct hold) <= APP_GROUP_PER_SOCKET,
               "an object and its holds fit");

static inline struct object *group_object(struct group *g, uint32_t i)
{
    return (struct object *)((uint8_t *)g + g->objects_off) + i;
}
static inline struct hold *group_hold(struct group *g, uint32_t i)
{
    return (struct hold *)((uint8_t *)g + g->holds_off) + i;
}

/* Makes a group in zeroed memory for so many sockets of the stack. 0 or -errno. */
int group_init(struct group *g, uint64_t size, uint32_t max_socks, uint64_t wake_id);
/* GROUP_NONE: there are too many. refs is 1. */
uint32_t group_object_new(struct group *g);
void group_object_free(struct group *g, uint32_t object);
/* The object with this shadow; GROUP_NONE. A walk over all: for exec and passed descriptors only. */
uint32_t group_find_ino(struct group *g, uint64_t ino);
/* The hold of a process on an object, made when there is none. GROUP_NONE: there are too many. */
uint32_t group_hold_get(struct group *g, uint32_t object, uint32_t proc);
/* One descriptor more, and one less: whether it was the last of all processes. */
void group_ref(struct group *g, uint32_t object, uint32_t proc);
/* How many descriptors a process has of an object; and sets that: whether nobody has any now. */
uint32_t group_holds(struct group *g, uint32_t object, uint32_t proc);
bool group_set_hold(struct group *g, uint32_t object, uint32_t proc, uint32_t refs);
bool group_unref(struct group *g, uint32_t object, uint32_t proc);
/* A thread is going to sleep in a call on an object, which has it meanwhile, whoever closes it; and is back: whether
 * nobody else has it any more. With the process' death the call is over too. */
void group_call_begins(struct group *g, uint32_t object, uint32_t proc);
bool group_call_ends(struct group *g, uint32_t object, uint32_t proc);
/* Puts an object into the queue of every process that waits for it. mask: what became ready, BYPASS_IN ... */
void group_notify(struct group *g, uint32_t object, uint32_t mask);
/* A process died that may have been changing any of this: makes it consistent. Objects that nobody has are free, with
 * `lease` as it was; no object is in a queue. false: it is damaged otherwise than by that. */
bool group_repair(struct group *g);
/* The next object that became ready for a process, and how; GROUP_NONE. */
uint32_t group_take(struct group *g, uint32_t proc, uint32_t *mask);
/* A place for a process; GROUP_NONE: too many. */
uint32_t group_join(struct group *g, int32_t pid);
/* It is gone: its descriptors count no more. Calls ended(arg, object) for each object that nobody has now. */
void group_leave(struct group *g, uint32_t proc, void (*ended)(void *arg, uint32_t object), void *arg);
/* The child of a process that forks has what it has. */
void group_copy(struct group *g, uint32_t from, uint32_t to);
const char *group_reason(int reason);

#endif
