/* SPDX-License-Identifier: Apache-2.0 */
/*
 * afxdp.h - the AF_XDP network device: one UMEM, one socket on each queue, driven through bypass_netdev_ops.
 *
 * Where a frame is, and who moves it on (one ring of each kind per queue; K is the kernel, we are the device):
 *
 *        alloc                    tx_burst                K                  reap
 *   free ------> caller (STACK) ----------> tx ring ------> completion ring ------> caller or free
 *    ^  \                                   \______ held by the device (DEV) _____/
 *    |   \ refill               K             rx_burst
 *    |    `-----> fill ring ------> rx ring -----------> caller (STACK) --.
 *    |            \_ held by the device (RX) _/                           | free
 *    `--------------------------------------------------------------------'
 *
 * All mutable state lies in the memory that the caller supplies (afxdp_mem_size() bytes) and holds no pointers;
 * `struct afxdp` is one process's view of it: mapped rings, descriptors. Several processes may have views of one device,
 * by afxdp_attach() or by fork(); one caller at a time per device, whatever its views: the embedder has a lock.
 * Results are >= 0 or -errno. Read first: Documentation/networking/af_xdp.rst of the kernel.
 */
#ifndef BYPASS_AFXDP_H
#define BYPASS_AFXDP_H

#include "bypass.h"
#include "frames.h"

enum {
    AFXDP_MAX_QUEUES = 64,

    /* afxdp_config.mode */
    AFXDP_AUTO = 0, /* zero-copy where the driver can, else copy; ask afxdp_zerocopy() what it became */
    AFXDP_COPY = 1,
    AFXDP_ZEROCOPY = 2, /* fails where the driver cannot */

    /* afxdp_config.flags */
    AFXDP_F_RX_CSUM_TRUST = 1, /* received L4 checksums are taken as right: a veth peer with transmit checksum
                                  offload sends only the sum of the pseudo-header */
    AFXDP_F_PREFER_BUSY_POLL = 2,
    AFXDP_F_NO_TX_CSUM = 4, /* do not use the kernel's transmit metadata although it is offered */

    /* afxdp_error.step: what failed */
    AFXDP_STEP_CONFIG = 1, /* the configuration makes no sense; nothing was tried */
    AFXDP_STEP_INTERFACE,  /* no such interface */
    AFXDP_STEP_SOCKET,     /* socket(AF_XDP) */
    AFXDP_STEP_UMEM,       /* XDP_UMEM_REG: registering (and locking) the memory */
    AFXDP_STEP_RING,       /* creating a ring or asking for its offsets */
    AFXDP_STEP_MAP,        /* mapping a ring */
    AFXDP_STEP_OPTION,     /* a socket option that the configuration asks for */
    AFXDP_STEP_BIND,       /* binding to the queue */
    AFXDP_STEP_POLL,       /* making the descriptor to sleep on */
    AFXDP_STEP_STATE,      /* afxdp_attach(): the memory holds no device of this build, or a damaged one */
};

struct afxdp_config {
    char ifname[16];
    uint32_t mode;
    uint32_t flags;
    uint32_t queue_count;
    uint16_t queues[AFXDP_MAX_QUEUES]; /* queue numbers of the interface; meta.queue is an index into these */
    uint32_t frames;
    uint32_t frame_size;   /* bytes, 2048 or 4096 */
    uint32_t rx_headroom;  /* bytes left free in front of received packets, beyond the kernel's 256 */
    uint32_t tx_headroom;  /* bytes; 0: 128 */
    uint32_t ring_size;    /* entries of the rx and tx rings, a power of two */
    uint32_t fill_size;    /* entries of fill and completion ring, a power of two; 0: ring_size */
    uint32_t fill_target;  /* frames kept with the device for reception, per queue; 0: what rings and frames allow */
    uint32_t bind_wait_ms; /* how long to retry a busy queue: closing a socket is asynchronous */
    uint32_t busy_poll_us; /* SO_BUSY_POLL; 0: off */
    uint32_t busy_poll_budget; /* SO_BUSY_POLL_BUDGET, packets; 0: the kernel's */
};

struct afxdp_error {
    int32_t err;    /* positive errno */
    int32_t step;   /* AFXDP_STEP_* */
    int32_t queue;  /* of the interface, or -1 */
    int32_t option; /* AFXDP_STEP_OPTION: which SO_* option */
};

struct afxdp;

/* Bytes of memory for cfg: state, free list, metadata, UMEM. 0 when cfg makes no sense. */
BYPASS_API size_t afxdp_mem_size(const struct afxdp_config *cfg);
/* Zeroed, page-aligned, shareable memory (memfd). *fd may be handed to another process. NULL: errno is set. */
BYPASS_API void *afxdp_mem_map(size_t size, int *fd);
BYPASS_API void afxdp_mem_unmap(void *mem, size_t size, int fd);
/* Opens a device in mem (page-aligned; it may be a part of a larger mapping), which must live until afxdp_close() has
 * returned. Blocks for bind_wait_ms at most. NULL: *error says why, and nothing is left open. */
BYPASS_API struct afxdp *afxdp_open(const struct afxdp_config *cfg, void *mem, size_t size, struct afxdp_error *error);
/* A view of the device that another process has opened in the same memory, mapped here (shared, page-aligned; size: what
 * is there, at least the device's). fds: its AF_XDP sockets (dup, SCM_RIGHTS), in the order of the queues' indices; with
 * fewer than there are the view serves only those; more are of queues that nobody has taken yet (afxdp_take_queue()).
 * Needs no capability. The view owns the descriptors from now on.
 * The memory's say is checked before it is believed: sizes, offsets, ring positions, the sockets' identity. flags: 0.
 * The embedder's lock is held. NULL: *error says why (AFXDP_STEP_STATE with EBADMSG: no device, or a damaged one; EXDEV:
 * a descriptor is not that queue's socket), and the descriptors are the caller's still. */
BYPASS_API struct afxdp *afxdp_attach(void *mem, size_t size, const int *fds, uint32_t nfds, uint32_t flags,
                                      struct afxdp_error *error);
/* Takes over what other views have changed: the number of free frames (a stack looks at it between calls), MTU and MAC
 * address. For a view that is not the only one, whenever the embedder has got its lock. */
BYPASS_API void afxdp_sync(struct afxdp *dev);
/* For an embedder whose lock others wait for: with `on` this view's kick() makes no system call for what is to be sent, which
 * takes as long as all else together. Before the lock is let go of afxdp_owed() tells what for (0: nothing), and without the
 * lock afxdp_kick_owed() makes the calls. Its result is as kick()'s: where it is not 0, the embedder calls kick() with the
 * lock, and with `on` false, until that is content. Who is killed in between leaves what it put into the ring to the next
 * kick(). */
BYPASS_API void afxdp_defer(struct afxdp *dev, int on);
BYPASS_API uint64_t afxdp_owed(struct afxdp *dev);
BYPASS_API int afxdp_kick_owed(struct afxdp *dev, uint64_t queues);
/* The embedder's lock was a process' that was killed, in the middle of any operation or with frames in hand: every frame
 * that the caller held is free, what the rings and the kernel have stays there, and the books are right again. Other
 * views: afxdp_sync(). May be called again when it was itself interrupted. 0; -EBADMSG: the memory is damaged otherwise
 * than by that, and the device is not to be used any more; -EXDEV: this view does not serve a queue whose books are
 * half done. */
BYPASS_API int afxdp_reclaim(struct afxdp *dev);
/* Closes the view's descriptors, unmaps its rings and frees it; waits for nothing and reads nothing of the memory. The
 * device lives as long as any process has its sockets, and forgets nothing when none has a view for a while. */
BYPASS_API void afxdp_detach(struct afxdp *dev);
/* Opens one more queue of the interface, which has got more of them; `of`: how many there are going to be, to share
 * the frames. From any network namespace (another one than the device's needs CAP_SYS_ADMIN). Its index, or -errno:
 * *error says why, and the device goes on as before. -ENOSPC: more than AFXDP_MAX_QUEUES, or too few frames; -EPERM: an
 * attached view. Other views do not serve the queue. */
BYPASS_API int afxdp_add_queue(struct afxdp *dev, uint16_t number, uint32_t of, struct afxdp_error *error);
/* The same for a device that is not opened here, whose memory nobody here has to believe: only the socket, for
 * afxdp_take_queue() of those who use it. cfg: as it was opened; with: the socket of its first queue. Does not wait where
 * the queue is busy. The descriptor, or -errno: *error says why. */
BYPASS_API int afxdp_more_socket(const struct afxdp_config *cfg, uint16_t number, int with, struct afxdp_error *error);
/* This view serves one more queue, the next one, by the socket that afxdp_more_socket() has made; `of` as above. Each view
 * does so, in any order. Its index; the view owns fd from now on. Or -errno, *error says why, and fd is the caller's:
 * -ENOSPC as above, -EXDEV: another view has another socket for it. */
BYPASS_API int afxdp_take_queue(struct afxdp *dev, int fd, uint32_t of, struct afxdp_error *error);
/* Waits up to wait_ms for transmissions to complete, then detaches in any case. For the device's last view; afterwards
 * mem may be unmapped. Returns the number of frames that the kernel had not completed. */
BYPASS_API int afxdp_close(struct afxdp *dev, int wait_ms);
/* Valid until afxdp_close() or afxdp_detach(). */
BYPASS_API struct bypass_netdev *afxdp_netdev(struct afxdp *dev);

/* ---- What it became ------------------------------------------------------------------------------
 *
 * These believe nothing of the memory, so that a process may ask them of a device in memory that others, whom it does
 * not trust, may write: afxdp_fd(), afxdp_zerocopy(), afxdp_queues_now(), afxdp_kernel_stats(), and afxdp_detach() to
 * end. Everything else is for those who share the device.
 */
BYPASS_API int afxdp_fd(const struct afxdp *dev, int queue_index); /* the socket, for the XSKMAP; -EINVAL */
/* XDP_OPTIONS read back from every socket: 1 zero-copy on all, 0 copy on any, or -errno. */
BYPASS_API int afxdp_zerocopy(const struct afxdp *dev);
/* Receive queues that an interface has now (ethtool channels), or -errno (-EOPNOTSUPP: the driver cannot tell): by
 * name in the network namespace of the calling thread, and of an open device wherever it is called. */
BYPASS_API int afxdp_interface_queues(const char *ifname);
BYPASS_API int afxdp_queues_now(const struct afxdp *dev); /* -EXDEV: attached from another network namespace */
/* 0: usable; -ENETDOWN: interface down, recovers by itself; -ENXIO: gone for good, and reap gives back every frame
 * under transmission. Needed because an idle device makes no system call and poll() stays silent when the interface
 * is deleted. Also takes over a changed MTU or MAC address. */
BYPASS_API int afxdp_health(struct afxdp *dev);

/* ---- Counters ------------------------------------------------------------------------------------ */
struct afxdp_counters { /* of one queue, since open */
    uint64_t rx_packets, rx_bytes;
    uint64_t tx_packets, tx_bytes; /* handed to the kernel */
    uint64_t tx_completed;
    uint64_t tx_full;                /* tx_burst stopped at a full ring */
    uint64_t tx_invalid;             /* refused: bad length or offset, or a frame that is not the caller's to send */
    uint64_t tx_abandoned;           /* given up when the device went away */
    uint64_t rx_bad, completion_bad; /* descriptors from the kernel that make no sense */
    uint64_t fill_starved;           /* a refill found too few free frames */
    uint64_t kicks_tx, kicks_rx;     /* system calls */
    uint64_t kicks_saved;            /* there was something to send, but need_wakeup was clear */
    uint64_t kick_again;             /* EAGAIN: call again; nothing is lost */
    uint64_t kick_busy;              /* EBUSY: the kernel dropped and completed a packet; never sent again */
    uint64_t kick_down, kick_gone, kick_failed; /* ENETDOWN, ENXIO, any other error */
};
struct afxdp_kernel_stats {    /* XDP_STATISTICS, all six */
    uint64_t rx_dropped;       /* for other reasons: larger than a frame, bad metadata */
    uint64_t rx_invalid_descs; /* fill descriptors refused */
    uint64_t tx_invalid_descs;
    uint64_t rx_ring_full;
    uint64_t rx_fill_ring_empty_descs;
    uint64_t tx_ring_empty_descs;
};
BYPASS_API int afxdp_counters(const struct afxdp *dev, int queue_index, struct afxdp_counters *out);
BYPASS_API int afxdp_kernel_stats(const struct afxdp *dev, int queue_index, struct afxdp_kernel_stats *out);

/* Counts by walking all frames. 0, or -EIO when the places do not add up to the pool and ring counters. */
BYPASS_API int afxdp_audit(struct afxdp *dev, struct frame_audit *out);

/* ---- Bare echo (benchmarks) ------------------------------------------------------------------------
 *
 * The least that can answer a packet: from the rx ring straight to the tx ring of the same queue, from the
 * completion ring straight to the fill ring. No stack, no metadata, no allocation. Nothing else may use the
 * device meanwhile.
 */
enum {
    AFXDP_ECHO_SPIN = 1, /* never sleep */
};
struct afxdp_echo_args {
    uint64_t duration_ns; /* returns after it; callers loop to stay interruptible */
    uint64_t max_packets; /* answers; 0: no limit */
    uint32_t flags;
    uint32_t port; /* only packets to this TCP/UDP port are answered; 0: all */
};
struct afxdp_echo_result {
    uint64_t packets, bytes; /* answered */
    uint64_t ignored;        /* needed no answer or could not be parsed; recycled */
    uint64_t polls;          /* times it slept */
    uint64_t kicks;
    uint64_t tx_stalls; /* the tx ring was full */
};
/* UDP: swaps MAC and IP addresses and ports. TCP: a stateless responder that a kernel client can connect to:
 * SYN gets SYN-ACK, data is acknowledged and sent back, FIN gets FIN-ACK; it never retransmits. Adds to *out.
 * 0, -EBUSY (frames are under transmission), -ENETDOWN, -ENXIO, -ETIMEDOUT (completions did not come back within
 * a second after the end: close the device). */
BYPASS_API int afxdp_echo(struct afxdp *dev, const struct afxdp_echo_args *args, struct afxdp_echo_result *out);

/* ---- Raw port: whole frames by copy, for programs with their own protocol; works on any netdev -------- */
struct rawport_frame {
    uint32_t off, len; /* in the caller's buffer, bytes */
    uint16_t queue;
    uint16_t flags;             /* BYPASS_RX_* */
    uint32_t entry, rule, hash; /* with BYPASS_RX_VERDICT */
};
/* Receives up to max frames into buf, back to back, and frees them. Takes no more than surely fit: size / stride.
 * Number of frames, or -errno of the device, -EINVAL (buf holds not even one). */
BYPASS_API int rawport_recv(struct bypass_netdev *dev, uint8_t *buf, size_t size, struct rawport_frame *out, int max);
/* Sends n Ethernet frames that lie back to back in buf, and kicks. Number accepted (fewer than n: rings or pool
 * are full, call again for the rest), or -errno of the device, -EMSGSIZE, -EINVAL (shorter than 14 bytes) for
 * the first frame. */
BYPASS_API int rawport_send(struct bypass_netdev *dev, const uint8_t *buf, const uint32_t *len, int n, int queue);

#endif
