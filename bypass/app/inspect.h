/* SPDX-License-Identifier: Apache-2.0 */
/*
 * inspect.h - an application's memory (app.h), read by a tool while the application runs, without its help. The memory
 * is the application's, so nothing in it is believed: see bypass_inspect_sock(). May be mapped read-only.
 */
#ifndef BYPASS_INSPECT_H
#define BYPASS_INSPECT_H

#include "app/app.h"

enum { APP_INSPECT_WHY = 64 };

struct app_summary {
    uint32_t app;    /* 0: without a broker */
    uint32_t device; /* APP_DEV_* */
    uint32_t dead;   /* a process died inside of the stack: nothing goes on */
    uint32_t spin_us;
    uint64_t tcp_stack, tcp_kernel, udp_stack, udp_kernel; /* sockets that ended up there, ever */
    uint32_t sockets, sockets_max;
    uint32_t processes;
    int32_t pids[32]; /* the first of them */
    char ifname[16];
    char name[32];
};
/* 0, -EINVAL: it is no application's memory, or it is damaged. -EAGAIN: the application has not made its stack yet. */
BYPASS_API int app_summary(const void *mem, size_t size, struct app_summary *out);

struct app_socket {
    uint32_t object;
    int32_t pid, fd; /* its first descriptor */
    uint32_t refs;   /* descriptors, of all processes */
    uint8_t type;    /* BYPASS_STREAM, BYPASS_DGRAM; 0: another protocol */
    uint8_t inet6;   /* AF_INET6 */
    uint8_t place;   /* enum place of preload/group.h */
    uint8_t reason;  /* enum reason */
    int32_t told;    /* 1: `stack` is filled in; 0: the stack has no such socket; -EINVAL: it is damaged there */
    char why[APP_INSPECT_WHY]; /* more about the reason, or a note */
    struct bypass_inspect stack;
};
/* Sockets of the program: 1, 0 at the end, -EINVAL. *cursor starts at 0. */
BYPASS_API int app_socket_next(const void *mem, size_t size, uint32_t *cursor, struct app_socket *out);
/* Connections that no socket of the program holds any more: 1, 0, -EINVAL. */
BYPASS_API int app_orphan_next(const void *mem, size_t size, uint32_t *cursor, struct bypass_inspect *out);
/* Text of app_socket.reason; NULL: there is none such. */
BYPASS_API const char *app_reason(int reason);

#endif
