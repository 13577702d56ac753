/* SPDX-License-Identifier: Apache-2.0 */
/*
 * program.h - the program bypass-fwd, one loop:
 *
 *   main.c     options, privileges, the loop
 *   control.c  connections: a message in, an answer out
 *   store.c    items, their watches, and what happens when their processes are dead
 *   device.c   the device of shared mode, and memory and doorbells of ports
 *   device_afxdp.c, device_dpdk.c   the kinds of device (device.h)
 *   maps.c, steer_mem.c   where live entries are: a map of the kernel, or a classifier's memory
 *   closer.c   closes what may take long to close, in threads
 *   forward.c, check.c, lease.c, peer.c   the way of a frame; they know nothing of the above
 */
#ifndef BYPASS_FWD_PROGRAM_H
#define BYPASS_FWD_PROGRAM_H

#include <stdbool.h>
#include <stdint.h>

#include "device.h"
#include "forward.h"
#include "fwd.h"

enum {
    PROGRAM_CONNECTIONS = 8,
    PROGRAM_KEYS_A_ROUND = 256, /* keys of the dead that are deleted between two rounds */

    /* What an event of epoll is about: upper half of its data; the lower half is a number. */
    EVENT_SIGNAL = 0,
    EVENT_LISTEN,
    EVENT_CONNECTION, /* index */
    EVENT_PID,        /* number of the process, see store.c */
    EVENT_DOORBELL,
    EVENT_DEVICE,
};

struct connection {
    int fd; /* -1: free */
    bool broker;
};

struct port_memory { /* of a port, by the application's number */
    uint32_t app;    /* 0: free */
    void *map;
    size_t size;
    int eventfd, socket;
    char item[FWD_NAME];
};

struct program {
    int epoll_fd, listen_fd, signal_fd;
    const char *listen; /* name as given, or NULL */
    bool quit;
    bool hold; /* without a broker it goes on until the last item is gone */
    bool work; /* keys of the dead are left to delete */
    uint64_t spin_ns;
    uint64_t now_ns, health_ns; /* health_ns: when the device is asked again */
    struct connection connection[PROGRAM_CONNECTIONS];
    struct item *items; /* store.c */
    uint32_t items_n, pids_made;
    struct port_memory memory[FWD_PORTS_MAX];
    struct device *device; /* NULL: none is open */
    struct fwd_link told;  /* of it, to the broker; mtu 0: nothing */
    bool unwatched;        /* it is gone, and nobody waits for it */
    struct forwarder forward;
};

/* A request and its answer. */
struct request {
    struct program *w;
    bool broker; /* who asks is one */
    struct connection *from;
    const void *message;
    size_t len;
    int fds[FWD_FDS];
    int fds_n; /* those that a handler keeps it sets to -1 */
    void *answer;
    size_t answer_len;
    const int *answer_fds; /* stay whose they are */
    uint32_t answer_fds_n;
    char text[FWD_TEXT]; /* of an error; empty: strerror() */
};
/* Notes why. Returns -err. */
int refuse(struct request *q, int err, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* main.c */
/* Waits for events of a descriptor from now on. false: errno. */
bool program_watch(struct program *w, int fd, uint32_t events, uint32_t kind, uint32_t number);
void program_unwatch(struct program *w, int fd);
uint64_t program_clock(void);
int program_pin(int cpu); /* -1: any; -errno */

/* control.c */
bool control_connection(struct program *w, int fd); /* takes it; false: too many, and it is closed */
void control_in(struct program *w, uint32_t index);
void control_accept(struct program *w);
/* To the brokers that are connected. */
void control_tell(struct program *w, void *message, size_t len, uint16_t type);
void control_close(struct program *w);
/* Ends the program where nobody is connected, nobody can come, and nothing is held for anybody. */
void control_lonely(struct program *w);

/* store.c: handlers of FWD_PUT..FWD_UNWATCH, FWD_WATCHED */
int store_put(struct request *q);
int store_get(struct request *q);
int store_list(struct request *q);
int store_delete(struct request *q);
int store_watch(struct request *q);
int store_watch_keys(struct request *q);
int store_forget_keys(struct request *q);
int store_unwatch(struct request *q);
int store_watched(struct request *q);
void store_pid_dead(struct program *w, uint32_t number);
void store_work(struct program *w); /* some keys of the dead */

/* device.c, device_dpdk.c: handlers of FWD_DEVICE_OPEN, FWD_DPDK_OPEN, FWD_DEVICE_CLOSE, FWD_DPDK_STATS, FWD_PORT_ADD,
 * FWD_PORT_DEL */
int device_open(struct request *q);
int device_open_dpdk(struct request *q);
int device_dpdk_stats(struct request *q);
int device_dpdk_audit(struct request *q);
int device_dpdk_xstats(struct request *q);
int device_dpdk_flows(struct request *q);
int device_close(struct request *q);
int device_port_add(struct request *q);
int device_port_del(struct request *q);
void device_ports_of_item(struct program *w, const char *item); /* it is gone: its ports go */
void device_health(struct program *w);
void device_end(struct program *w); /* everything */

#endif
