/* SPDX-License-Identifier: Apache-2.0 */
/*
 * epoll.h - epoll sets with members on both sides.
 *
 * A set of the program is a kernel set, with the descriptor that the program has. What the kernel serves is a member of
 * it, with the program's own data: nothing changes there, and what the kernel does for it (duplicates, closing, fork) it
 * goes on doing. Members that the stack serves are items here. When a set gets the first of them it also gets an outer
 * kernel set, hidden, of this process only, in which its threads sleep from then on:
 *
 *     outer --- the program's set (its members: kernel files, sockets of which nobody knows yet whose they are)
 *       |------ the kernel's half of objects of which the stack serves one half: listeners, datagrams
 *       |------ outer sets of nested sets
 *       |------ the device, relatives that wake this process
 *       '------ bell: an eventfd, rung when an item became ready while threads slept; edge-triggered, and never read:
 *               whoever read it might take a ring away that epoll_wait() has not told of yet
 *
 *   epoll.c       sets and items, which side they are on, who is woken
 *   epoll_ctl.c   epoll_create(), epoll_ctl()
 *   epoll_wait.c  what is ready; epoll_wait() and its family
 *   epoll_exec.c  sets that the next program of the process has, too
 *
 * Everything with the group's lock held, unless it says otherwise; atomic fields are read without it.
 */
#ifndef BYPASS_PRELOAD_EPOLL_H
#define BYPASS_PRELOAD_EPOLL_H

#include "preload.h"

enum {
    /* struct item.half: who says whether it is ready */
    HALF_KERNEL, /* the program's set; the item only remembers, because the object may become the stack's */
    HALF_STACK,
    HALF_BOTH, /* its kernel half is in the outer set */

    ITEM_FLAGS = (int)(EPOLLET | EPOLLONESHOT | EPOLLEXCLUSIVE | EPOLLWAKEUP), /* in epoll_event.events, no readiness */
};

/* What members of an outer set tell; an item's are smaller: its generation and index. */
#define OUTER_REAL UINT64_MAX
#define OUTER_BELL (UINT64_MAX - 1)
#define OUTER_WAKE (UINT64_MAX - 2)
#define OUTER_DEVICE (UINT64_MAX - 3)

struct item {
    struct item *next; /* of the same object, or of the same nested set */
    struct item *set_next, **set_prev;
    struct item *ready_next, *ready_prev; /* queue of its set */
    struct epoll *set;
    struct epoll *inner; /* a nested set; NULL: an object */
    uint32_t object;
    int fd; /* it was added by this number */
    uint32_t index, generation;
    uint32_t wanted; /* EPOLLIN ..., with EPOLLERR and EPOLLHUP; 0: one shot was fired */
    uint32_t flags;  /* EPOLLET ... */
    epoll_data_t data;
    uint32_t kernel; /* what its kernel half said, */
    uint32_t look;   /* ... in which look */
    uint8_t half;
    bool queued;
};

struct epoll {
    uint32_t index;
    _Atomic uint32_t refs;               /* descriptors; 0: closed */
    _Atomic uint32_t ours;               /* items that are not HALF_KERNEL */
    _Atomic uint32_t plain;              /* threads that sleep in the program's set itself */
    _Atomic bool kicking;                /* ... and are being told that there is an outer one now */
    bool rung;                           /* the bell was rung, and nobody heard it yet */
    bool kernel_ready;                   /* the program's set has something */
    bool deaf;                           /* epoll_devices() */
    int fd;                              /* one of its descriptors */
    int outer, old_outer, bell, kick_fd; /* -1: none */
    uint32_t asleep;                     /* threads in the outer set, or about to be */
    struct item *items, *head, *tail;    /* all but the kernel's; the queue of those that may be ready */
    struct item *parents;                /* where it is nested */
    uint32_t looks, calls;
    uint32_t empty; /* looks at the kernel's half that found nothing, in a row */
    int odd;        /* whose turn it is: 0 the stack's, 1 the kernel's */
    uint64_t looked_ns;
    uint64_t kick_data;
    uint64_t kick_until_ns;
};

/* ---- epoll.c */
struct epoll *epoll_of(int fd); /* NULL: it is none, or nobody needs to know. Without the lock */
/* Remembers that fd is a set. NULL: the library has nothing to do, or there are too many. Without the lock. */
struct epoll *epoll_note(int fd);
struct item *item_find(const struct epoll *e, uint32_t object, const struct epoll *inner, int fd);
struct item *item_by_id(uint64_t id);
/* A new one, HALF_KERNEL. NULL: no memory. */
struct item *item_new(struct epoll *e, uint32_t object, struct epoll *inner, int fd, const struct epoll_event *ev);
void item_arm(struct item *i, const struct epoll_event *ev);
void item_drop(struct item *i);
/* It is the stack's now, half or whole. 0 or -errno: then it stays where it was. */
int item_ours(struct item *i);
/* Its kernel half in the outer set: EPOLL_CTL_*. */
int item_kernel_half(struct item *i, int op);
void item_queue(struct item *i);
void item_unqueue(struct item *i);
/* If it is ready it is queued, and who waits is told. */
void item_check(struct item *i);
/* There is something for who waits. */
void epoll_alert(struct epoll *e);
/* Makes the outer set if there is none (a child has to make its own). 0 or -errno. */
int epoll_outer(struct epoll *e);
/* The outer set has members that nobody knows any more: another one. */
void epoll_renew(struct epoll *e);
/* events[0..n) came from the program's set: the one that tells of the outer set is taken out, where there is one. What is
 * left of n. */
int epoll_unkick(struct epoll *e, struct epoll_event *events, int n);

/* ---- epoll_ctl.c: whether the descriptor is a set, as the kernel sees it */
bool epoll_is(int fd);

/* ---- epoll_wait.c */
uint32_t item_ready(struct item *i);
/* Whether epoll_wait() would have something. */
bool epoll_readable(struct epoll *e);

/* A pointer from the program that a system call would refuse with EFAULT, where that is easily seen. */
static inline bool bad_pointer(const void *p) { return (uintptr_t)p < 4096 || (uintptr_t)p >> 47; }

#endif
