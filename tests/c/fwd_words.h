/* SPDX-License-Identifier: Apache-2.0 */
/* The words of a port's shared memory, for tests that look at them and that write nonsense into them. */
#ifndef TESTS_FWD_WORDS_H
#define TESTS_FWD_WORDS_H

#include "fwd/peer.h"
#include "fwd/port.h"

enum { WORD_RX_POSTED, WORD_TX_POSTED, WORD_RX_DONE, WORD_TX_DONE, WORD_LINK, WORD_FWD_SLEEPS, WORD_APP_SLEEPS };
uint32_t *fwd_word(void *mem, int which);
/* All positions of a fresh port begin at `first`, a multiple of both rings' sizes, to be near 2^32. */
void fwd_positions(void *mem, uint32_t first);
/* Slot i of the rings, as words. */
uint32_t *fwd_rx_slot(struct port *port, uint32_t i);
uint32_t *fwd_tx_slot(struct port *port, uint32_t i);
/* Spoils the application's books: 0 a frame twice in the free list, 1 a free frame with a holder, 2 and 3 wrong
 * numbers of frames with the device. */
void fwd_spoil(struct port *port, int how);

#endif
