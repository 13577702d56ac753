/* SPDX-License-Identifier: Apache-2.0 */
/*
 * goodput.h - a wire in user space with a bottleneck, and TCP hosts on both of its sides:
 *
 *     1 Linux --+                                             +-- 3 Linux
 *               |-- queue, rate, delay, loss, reordering ... --|
 *     2 ours ---+        (FWD: left to right; REV back)        +-- 4 ours
 *
 *   path.c     what becomes of a frame, and when it arrives; no I/O, no clock
 *   linux.c    the kernel's TCP: a namespace of its own, a TAP device, sockets
 *   ours.c     this stack: a memory device (of bypass/sim) in this process
 *   flow.c     the programs: who sends what to whom, and what has arrived
 *   main.c     arguments, the loop, the clock (real or virtual), the report
 *
 * One process, one thread. Each frame takes the same path whoever sent it. With hosts of this stack only the clock
 * may be virtual, and then a run depends on nothing but its arguments.
 */
#ifndef GOODPUT_H
#define GOODPUT_H

#include <linux/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

enum { FWD = 0, REV = 1 };
enum { LEFT_LINUX = 1, LEFT_OURS = 2, RIGHT_LINUX = 3, RIGHT_OURS = 4, HOSTS = 5 };
enum { FLOWS_MAX = 32, FRAME_MAX = 1600, MTU = 1500, CC_NAME = 16 };
#define MSEC 1000000ull
#define SEC 1000000000ull
#define NEVER UINT64_MAX

static inline int side_of(int host) { return host <= LEFT_OURS ? FWD : REV; } /* the direction it sends in */

/* ---- path.c ---------------------------------------------------------------------------------------------- */
struct faults {           /* of one direction; probabilities in parts per million */
    uint64_t rate_bps;    /* bits a second of Ethernet frames without FCS; 0: no limit */
    uint64_t delay_ns;    /* one way */
    uint64_t queue_bytes; /* waiting for the rate, at most; what exceeds it is dropped */
    uint64_t mark_bytes;  /* ECN: more than so many waiting mark an ECN-capable packet (RFC 3168); 0: never */
    uint64_t loss_ppm;    /* each frame by itself */
    uint64_t burst_ppm;   /* Gilbert-Elliott: a frame begins a burst, in which all are lost ... */
    uint64_t burst_end;   /* ... and which each frame ends with this probability, ppm */
    uint64_t reorder_ppm; /* a frame arrives later by reorder_ns */
    uint64_t reorder_ns;  /* ... so that others overtake it */
    uint64_t jitter_ns;   /* every frame arrives later by 0..jitter_ns, uniform; order is not kept */
    uint64_t duplicate_ppm;
    uint64_t outage_every_ns; /* at the end of each such period ... */
    uint64_t outage_ns;       /* ... nothing gets through for so long */
};
struct counts {
    uint64_t frames, bytes, delivered;
    uint64_t queue_dropped, lost, burst_lost, outage_lost, reordered, duplicated, marked;
    uint64_t queue_sum_ns, queue_max_ns; /* waiting time that an arriving frame found */
};
struct arrival {
    const uint8_t *frame; /* valid until path_done() */
    uint64_t due_ns;
    uint32_t len;
    int to;
};
struct path;
struct path *path_create(uint64_t seed, uint64_t now_ns, const struct faults faults[2]); /* NULL: no memory */
void path_send(struct path *p, int from, int to, const uint8_t *frame, uint32_t len, uint64_t now_ns);
uint64_t path_next(const struct path *p);                             /* when the next frame arrives */
bool path_take(struct path *p, uint64_t now_ns, struct arrival *out); /* false: none is due */
void path_done(struct path *p);                                       /* with what was taken last */
const struct counts *path_counts(const struct path *p, int dir);
/* Every frame as it enters and as it leaves, with its time: PREFIX.sent.pcap, PREFIX.got.pcap. 0 or -errno. */
int path_record(struct path *p, const char *prefix);
void path_destroy(struct path *p);

/* ---- Hosts: linux.c, ours.c ------------------------------------------------------------------------------ */
struct bench;
struct host;
struct host_ops { /* handles are >= 0, errors -errno; `tag` comes back in flow_event() */
    void (*deliver)(struct host *, const uint8_t *frame, uint32_t len);
    void (*run)(struct host *);               /* what is due; what goes out is given to host_out() */
    uint64_t (*next_ns)(const struct host *); /* NEVER: its descriptors say when */
    int64_t (*listen)(struct host *, uint16_t port, uint64_t tag);
    int64_t (*connect)(struct host *, int to, uint16_t port, const char *cc, uint64_t tag);
    int64_t (*accept)(struct host *, int64_t listener, uint64_t tag);
    int64_t (*send)(struct host *, int64_t sock, const void *buf, size_t n);
    int64_t (*recv)(struct host *, int64_t sock, void *buf, size_t n);
    void (*close)(struct host *, int64_t sock);
    void (*info)(struct host *, int64_t sock, struct tcp_info *out); /* both speak of themselves as Linux does */
    void (*end)(struct host *);                                      /* die() when the host itself lost frames */
};
struct host {
    const struct host_ops *ops;
    struct bench *bench;
    int number;
};
struct host *linux_create(struct bench *b, int number);
struct host *ours_create(struct bench *b, int number);
void host_mac(int number, uint8_t mac[6]);
uint32_t host_ip(int number);                                      /* host order */
void host_out(struct host *h, const uint8_t *frame, uint32_t len); /* by its destination address; foreign: dropped */

/* ---- flow.c ---------------------------------------------------------------------------------------------- */
struct flow {
    int from, to; /* hosts */
    char cc[CC_NAME];
    uint64_t start_ns, bytes; /* after the beginning; of each transfer, 0: one without end */
    int64_t listener, sender, receiver;
    uint64_t sent, received; /* of this transfer */
    uint64_t began_ns;
    uint64_t total, total_at_warm; /* delivered to the program, all transfers */
    struct tcp_info last;          /* the sender's */
    const char *error;
    bool started;
    uint32_t done, done_cap; /* transfers */
    double *done_ms;
    uint64_t *done_at_ns;
};
void flow_init(void);
void flow_listen(struct bench *b, struct flow *f);
void flow_start(struct bench *b, struct flow *f);
void flow_event(struct bench *b, uint64_t tag);  /* look at what this end can do */
void flow_look(struct bench *b, struct flow *f); /* at the sender: `last` */

/* ---- main.c ---------------------------------------------------------------------------------------------- */
struct bench {
    struct path *path;
    struct host *hosts[HOSTS];
    struct flow flows[FLOWS_MAX];
    int flow_count;
    int epoll; /* data.u64: a tag, or the number of a Linux host below FIRST_TAG */
    uint64_t now_ns, began_ns, seed;
    bool is_virtual;
};
enum { FIRST_TAG = 16, TAG_SENDER = 0, TAG_RECEIVER = 1, TAG_LISTENER = 2 };
_Noreturn void die(const char *what, int64_t err); /* err: -errno, or 0: there is none */

#endif
