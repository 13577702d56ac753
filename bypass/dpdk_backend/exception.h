/* SPDX-License-Identifier: Apache-2.0 */
/*
 * exception.h - the way to the kernel of a port that the kernel does not have: a TAP device with the port's MAC address.
 * What is written to it arrives in the kernel as if from the port; what the kernel sends there is read here.
 *
 * It never blocks and takes a bounded share of the caller's time: a token bucket lets so many packets a second through,
 * and each round (exception_round()) has a number of writes and of reads. Time is an argument, in nanoseconds of any
 * monotonic clock. The device goes with its descriptor. Source: Documentation/networking/tuntap.rst.
 */
#ifndef BYPASS_DPDK_EXCEPTION_H
#define BYPASS_DPDK_EXCEPTION_H

#ifndef BYPASS_CDEF
#include <stddef.h>
#include <stdint.h>
#endif

enum {
    EXCEPTION_WRITES = 32, /* frames of a round */
    EXCEPTION_READS = 32,

    /* results of exception_write() */
    EXCEPTION_PASSED = 1,
    EXCEPTION_LATER = 0, /* the kernel or the round has no room now: the frame is still the caller's to pass */
    EXCEPTION_LOST = -1, /* dropped and counted */
};

struct exception_config {
    char name[16]; /* of the device */
    uint8_t mac[6];
    uint16_t mtu;   /* 0: the device stays as it was made, down, for the caller to set up */
    uint32_t rate;  /* packets a second to the kernel */
    uint32_t burst; /* that may go at once; 0: a fiftieth of a second's, at least 64 */
};

struct exception_error {
    int32_t err;    /* positive errno */
    char text[200]; /* one line: what, where, what to do */
};

struct exception_counters {
    uint64_t passed, passed_bytes; /* to the kernel */
    uint64_t over_rate;            /* dropped: more than the rate */
    uint64_t full;                 /* dropped: the kernel took none for a while */
    uint64_t errors;               /* dropped: the kernel refused the frame (its device is down) */
    uint64_t from_kernel, from_kernel_bytes;
    uint64_t read_errors; /* frames of the kernel that were lost in reading (larger than the MTU) */
};

/* Fields are private. No pointers in it. */
struct exception_path {
    int32_t fd;    /* -1: there is none */
    uint32_t gone; /* 1: somebody deleted the device: nothing goes either way any more */
    uint32_t rate, burst;
    uint32_t writes, reads; /* left of this round */
    uint64_t credit;        /* packets, times 1e9 */
    uint64_t time_ns;       /* of credit */
    struct exception_counters n;
};

/* Makes the device, and sets it up, in the network namespace of the calling thread. 0 or -errno, and *error says why. */
int exception_open(struct exception_path *e, const struct exception_config *cfg, struct exception_error *error);
/* On a descriptor that is there: of a TAP device that another process opened, or of anything with frames. */
void exception_adopt(struct exception_path *e, int fd, uint32_t rate, uint32_t burst);
/* The device goes, unless somebody else has its descriptor. */
void exception_close(struct exception_path *e);

/* Begins a round. */
void exception_round(struct exception_path *e, uint64_t now_ns);
/* Whether the rate has room for one more packet; it is charged. false: counted, and the frame is to be dropped. */
int exception_admit(struct exception_path *e);
/* Passes an admitted frame to the kernel. EXCEPTION_PASSED, _LATER, _LOST. */
int exception_write(struct exception_path *e, const void *frame, size_t len);
/* The next frame of the kernel's: its length, or 0: there is none, or the round has no reads left. */
size_t exception_read(struct exception_path *e, void *buf, size_t size);
/* The same for who has no room: the frame is lost. 1, or 0: there was none. */
int exception_skip(struct exception_path *e);
/* Whether the kernel's device has a carrier: the port's link. 0 or -errno. */
int exception_carrier(struct exception_path *e, int up);

#endif
