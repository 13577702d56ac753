/* SPDX-License-Identifier: Apache-2.0 */
/* A forwarder between ports and a device in memory, for tests that see both ends. */
#ifndef TESTS_FWD_WORLD_H
#define TESTS_FWD_WORLD_H

#include "fwd/forward.h"

struct world;
struct world *world_open(uint32_t frames);
void world_close(struct world *w); /* asserts that every frame came home */
struct forwarder *world_forwarder(struct world *w);
/* A frame comes from the wire; entry < 0: without a verdict. 0, -ENOBUFS. */
int world_receive(struct world *w, const uint8_t *frame, uint32_t len, uint16_t queue, int32_t entry);
/* The oldest frame that was sent, into room of 2048 bytes: its length; 0: none. */
uint32_t world_sent(struct world *w, uint8_t *room, uint16_t *queue);
/* Frames that the device takes between two rounds. */
void world_tx_limit(struct world *w, uint32_t limit);
void world_caps(struct world *w, uint32_t caps);
void world_kick_result(struct world *w, int result);

#endif
