/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sim.h - a simulated network: a virtual clock, wires with seeded impairments, ports that are network
 * devices for stacks, and a recorder of frames.
 *
 *     stack A -- port --+                       +-- port -- stack B
 *                       |  wire (hub or switch) |
 *     Python  -- port --+                       +-- port -- stack C
 *        (raw)
 *
 * What happens to a frame is decided when its port sends it, by the faults of that port: a direction of
 * a link is the port that sends into it. Everything is deterministic: the same seeds, calls and times
 * give the same frames at the same virtual times.
 *
 * The simulator is not part of the core: it allocates, but only when something is created. Nothing
 * here reads a clock. One caller at a time per `struct sim`.
 */
#ifndef BYPASS_SIM_H
#define BYPASS_SIM_H

#ifndef BYPASS_CDEF
#include "bypass.h"
#endif

struct sim;
struct sim_wire;
struct capture;

/* ---- Clock and stacks --------------------------------------------------------------------------- */

/* NULL: no memory. Every random stream of the simulation derives from seed. */
struct sim *sim_create(uint64_t seed, uint64_t start_ns);
/* Frees wires and ports too; stacks on them must be destroyed before. */
void sim_destroy(struct sim *sim);
uint64_t sim_now(const struct sim *sim);

/* Fills env with a deterministic `random`, of its own stream for each number; the log stays NULL.
 * Valid as long as the simulation. For simulations only: it is predictable by design. -ENOMEM. */
int sim_env(struct sim *sim, struct bypass_env *env, uint32_t stream);
/* The `random` of such an environment; ctx is what sim_env() put there. */
int sim_random(void *ctx, void *buf, size_t n);

/* Drives the stack from sim_run(). `port` is the port it uses, directly or below a wrapper. Returns
 * its number (kept until it is removed), or -ENOMEM. */
int sim_stack_add(struct sim *sim, struct bypass_stack *stack, struct bypass_netdev *port);
void sim_stack_del(struct sim *sim, int number);

struct sim_event {
    uint32_t stack; /* number of the stack */
    uint32_t mask;  /* BYPASS_IN ... */
    bypass_sock sock;
    uint64_t user;
};

enum {                  /* why sim_run() came back */
       SIM_TIME = 0,    /* until_ns is reached */
       SIM_EVENTS = 1,  /* events were written */
       SIM_RAW = 2,     /* a raw port received a frame */
       SIM_IDLE = 3,    /* nothing will ever happen: no frame on a wire, no deadline; the clock stands */
       SIM_CAPTURE = 4, /* a recorder that must not lose frames is half full: read it */
};

struct sim_result {
    uint64_t now_ns;
    uint32_t reason; /* SIM_* */
    uint32_t events; /* number written */
};

/* Runs stacks and wires until events, frames for a raw port, or until_ns (UINT64_MAX: no limit). The
 * clock moves to until_ns only when SIM_TIME is the reason. 0, or -ELOOP: stacks keep sending to each
 * other without end and without time passing; else what bypass_poll() returned, except -ENETDOWN. */
int sim_run(struct sim *sim, uint64_t until_ns, struct sim_event *out, int max, struct sim_result *res);
/* The next time at which something happens; UINT64_MAX: never. */
uint64_t sim_next(const struct sim *sim);

/* ---- Wires and ports ------------------------------------------------------------------------------ */
enum {
    SIM_WIRE_SWITCH = 1, /* frames to a port's MAC go only there; else to every other port (a hub) */
};
/* NULL: no memory. */
struct sim_wire *sim_wire_create(struct sim *sim, uint32_t flags);

enum {
    SIM_PORT_RAW = 1, /* no stack: frames by sim_port_send() and sim_port_recv(); sees all frames */
};
struct sim_port_config {
    uint32_t frames;    /* packet memory, frames; 0: 16384 */
    uint32_t in_flight; /* frames on their way to this port, at most; 0: 16384 */
    uint32_t tx_ring;   /* transmissions not yet reaped, at most; 0: 1024 */
    uint32_t caps;      /* BYPASS_CAP_* */
    uint32_t flags;     /* SIM_PORT_* */
    uint16_t mtu;       /* largest IP packet, bytes; 0: 1500 */
    uint16_t queues;    /* receive queues, flows spread over them; 0: 1 */
    uint8_t mac[6];
    uint8_t reserved[2];
};
/* Plugs a new port into the wire. NULL: no memory, or cfg makes no sense. */
struct bypass_netdev *sim_port_create(struct sim_wire *wire, const struct sim_port_config *cfg);

struct sim_faults { /* what happens to the frames that one port sends; at most one of four, parts per million */
    uint32_t loss_ppm;
    uint32_t duplicate_ppm; /* delivered twice */
    uint32_t corrupt_ppm;   /* one to three bits flipped within one 16-bit word that a checksum covers;
                               a frame without any checksum (ARP) is lost instead, as by its FCS */
    uint32_t reorder_ppm;   /* held back for up to reorder_ns, so that later frames overtake it */
    uint64_t reorder_ns;
    uint64_t delay_ns;
    uint64_t jitter_ns;   /* added delay, uniform in 0..jitter_ns; order is kept */
    uint64_t rate_bps;    /* bits a second of Ethernet frame without FCS; 0: no limit */
    uint32_t queue_bytes; /* waiting for the rate, at most; 0: 262144. What exceeds it is dropped */
    uint32_t mtu;         /* larger IP packets are dropped; 0: no limit */
    uint32_t mark_bytes;  /* what finds more waiting for the rate gets CE if it is ECN-capable (RFC 3168 5); 0: never */
    uint32_t reserved;
};
void sim_port_faults(struct bypass_netdev *port, const struct sim_faults *faults);

enum { /* a fate in a script */
       SIM_FATE_PASS = 0,
       SIM_FATE_LOSE = 1,
       SIM_FATE_DUPLICATE = 2,
       SIM_FATE_CORRUPT = 3,
       SIM_FATE_REORDER = 4,
       SIM_FATE_RANDOM = 5, /* by the probabilities above */
};
/* Fates of the next n frames that the port sends, one each; copied. After them the probabilities hold
 * again. -ENOMEM. */
int sim_port_script(struct bypass_netdev *port, const uint8_t *fates, uint32_t n);

struct sim_device_faults {   /* what a bad day of the device itself looks like to its stack */
    uint32_t alloc_fail_ppm; /* alloc gives nothing, though frames are free */
    uint32_t tx_short_ppm;   /* tx_burst takes only a part */
    uint32_t kick_again_ppm; /* kick gives -EAGAIN */
    uint32_t down;           /* 1: no carrier; frames are lost, kick gives -ENETDOWN */
    uint32_t gone;           /* 1: removed; rx_burst, tx_burst and kick give -ENXIO */
    uint32_t keep;           /* a transmission is completed only when so many more followed it */
    uint64_t complete_ns;    /* transmissions are completed so much later */
};
void sim_port_device_faults(struct bypass_netdev *port, const struct sim_device_faults *faults);

struct sim_port_stats {
    uint64_t tx_frames, tx_bytes;                    /* sent by this port, whatever became of them */
    uint64_t rx_frames, rx_bytes;                    /* handed to this port's receive queue */
    uint64_t lost, duplicated, corrupted, reordered; /* of frames sent by this port */
    uint64_t queue_dropped;                          /* did not fit the rate's queue */
    uint64_t marked;                                 /* congestion experienced (mark_bytes) */
    uint64_t oversize;                               /* larger than the MTU */
    uint64_t in_flight_dropped;                      /* towards this port: too many frames on the wire */
    uint64_t no_frame;                               /* towards this port: its packet memory was used up */
    uint64_t down_dropped;                           /* sent or arriving while the port was down */
    uint64_t misuse;     /* frames that were freed or sent without being held: an error in the stack */
    uint32_t in_flight;  /* on their way to this port now */
    uint32_t rx_waiting; /* received, not taken yet */
    uint32_t unreaped;   /* transmissions not reaped yet */
    uint32_t held;       /* frames neither free nor waiting nor unreaped: the stack's */
};
void sim_port_stats(const struct bypass_netdev *port, struct sim_port_stats *out);

/* Sends len bytes, an Ethernet frame without FCS, into the wire now. -EMSGSIZE (no room in a frame). */
int sim_port_send(struct bypass_netdev *port, const void *frame, size_t len);
/* Takes the oldest received frame. Its length (at most n bytes are written) and its arrival time, or
 * -EAGAIN. */
int64_t sim_port_recv(struct bypass_netdev *port, void *buf, size_t n, uint64_t *time_ns);

/* ---- Recorder of frames -------------------------------------------------------------------------
 *
 * A ring of bytes that keeps frames with their times; whoever reads it writes the file. `interface` is
 * the caller's number for where the frame was seen.
 */
enum { /* capture_record.flags */
       CAPTURE_RX = 1,
       CAPTURE_TX = 2,
       CAPTURE_LOST = 4,
       CAPTURE_DUPLICATED = 8,
       CAPTURE_CORRUPTED = 16,
       CAPTURE_REORDERED = 32,
       CAPTURE_QUEUE_DROPPED = 64,
       CAPTURE_OVERSIZE = 128,
       CAPTURE_DOWN = 256,
       CAPTURE_NO_FRAME = 512,
};
struct capture_record { /* followed by `captured` bytes, padded to 8 */
    uint64_t time_ns;
    uint32_t captured;
    uint32_t len; /* of the frame */
    uint16_t interface;
    uint16_t flags;
    uint32_t reserved;
};
/* `bytes` of memory; of each frame at most snap_len bytes are kept (0: all). keep_last 1: the oldest
 * records make room; 0: new ones are dropped and counted when it is full. NULL: no memory. */
struct capture *capture_create(size_t bytes, uint32_t snap_len, int keep_last);
void capture_destroy(struct capture *cap);
void capture_add(struct capture *cap, uint64_t time_ns, uint16_t interface, uint16_t flags, const void *frame,
                 uint32_t len);
/* Moves whole records, oldest first, to buf. Bytes written; 0: none left, or n is too small. */
int64_t capture_read(struct capture *cap, void *buf, size_t n);
/* Records that made room or found none. */
uint64_t capture_dropped(const struct capture *cap);
/* 1: half full and not of the kind that keeps the last. */
int capture_wants_read(const struct capture *cap);

/* Records what the port sends (with its fate) and receives; NULL ends it. The recorder must outlive it. */
void sim_port_capture(struct bypass_netdev *port, struct capture *cap, uint16_t interface);

/* A device that records everything that passes to and from `lower`, of any backend (tcpdump does not
 * see AF_XDP's frames). It uses lower's frames. NULL: no memory. Frames carry the time that was last
 * given to capture_dev_now(). */
struct bypass_netdev *capture_dev_create(struct bypass_netdev *lower, struct capture *cap, uint16_t interface);
void capture_dev_now(struct bypass_netdev *dev, uint64_t now_ns);
void capture_dev_destroy(struct bypass_netdev *dev);

#endif
