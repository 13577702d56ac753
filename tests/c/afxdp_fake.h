/* SPDX-License-Identifier: Apache-2.0 */
/*
 * afxdp_fake.h - an AF_XDP device on rings in ordinary memory, and the test's hand on the kernel's side of them.
 * The device is the real one of bypass/afxdp; only the descriptors are missing. Results are >= 0 or -errno.
 */
#ifndef AFXDP_FAKE_H
#define AFXDP_FAKE_H

#include "afxdp/afxdp.h"

/* All ring indices of both sides begin at `first`, to be near 2^32. NULL: cfg makes no sense. */
struct afxdp *fake_open(const struct afxdp_config *cfg, uint32_t first);
/* The same in memory that children by fork share: `room` bytes at `at`. NULL: it is too small. */
struct afxdp *fake_open_in(void *at, size_t room, const struct afxdp_config *cfg, uint32_t first);
/* What the kernel's side knows of the first n queues, *bytes: to be saved and put back. */
void *fake_kernel(uint32_t n, size_t *bytes);
void fake_close(struct afxdp *dev);

/* ---- The kernel's side -------------------------------------------------------------------------------- */
/* A packet of len bytes, all of them `byte`, behind a verdict if entry >= 0. 0; -ENOBUFS: the fill ring is empty;
 * -ENOSPC: the rx ring is full. */
int fake_rx(struct afxdp *dev, uint32_t qi, uint32_t len, uint8_t byte, int entry);
/* Takes up to n descriptors off the tx ring, while the completion ring has room for all that were taken. Each must
 * hold bytes of one value, and these values come in `seen`. */
int fake_tx(struct afxdp *dev, uint32_t qi, int n, uint8_t *seen);
/* Completes up to n of those, the latest first where `reverse`. */
int fake_complete(struct afxdp *dev, uint32_t qi, int n, int reverse);
/* What need_wakeup says, and what the next kicks answer: they take `budget` packets each, then return err. */
void fake_wakeup(struct afxdp *dev, uint32_t qi, int tx, int fill);
void fake_kick_answers(int err, int budget);
int fake_kicks(void); /* system calls since the last question */
/* Nonsense from the other side. */
int fake_odd_rx(struct afxdp *dev, uint32_t qi, uint32_t off, uint32_t len); /* of a frame it was given; -ENOBUFS */
void fake_bad_rx(struct afxdp *dev, uint32_t qi, uint64_t addr, uint32_t len);
int fake_bad_completion(struct afxdp *dev, uint32_t qi, uint64_t addr); /* 1: there was room for it */
void fake_torn_indices(struct afxdp *dev, uint32_t qi, uint32_t by);    /* moves what the kernel wrote, for a moment */

/* Spoils the device's own books, to see that the checks notice: 0 a frame twice in the free list, 1 a free frame with
 * a holder, 2 and 3 wrong counts with the device for reception and transmission, 4 two holders that exclude each
 * other. */
void fake_spoil(struct afxdp *dev, int how);

/* ---- Looking ------------------------------------------------------------------------------------------ */
/* For every frame the number of places it has with rings, kernel and free list: all must be 1 for frames that the
 * caller does not hold, and for those it holds 0, or 1 (under transmission). */
void fake_census(struct afxdp *dev, uint8_t *places);
uint32_t fake_rx_frames(struct afxdp *dev, uint32_t qi);
uint32_t fake_tx_left(struct afxdp *dev, uint32_t qi); /* on the tx ring, not taken */
int fake_violations(void);                             /* of the debug checks, since the last question */
const char *fake_violation(void);
uint8_t fake_holders(struct afxdp *dev, uint32_t frame);

#endif
