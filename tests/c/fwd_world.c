/* SPDX-License-Identifier: Apache-2.0 */
#include "fwd_world.h"

#include "memdev.h"

struct world {
    struct memdev dev;
    struct forwarder f;
};

struct world *world_open(uint32_t frames)
{
    struct world *w = calloc(1, sizeof *w);

    assert(w != NULL && forward_init(&w->f, 12345) == 0);
    memdev_open(&w->dev, frames, 2048);
    forward_device(&w->f, &w->dev.dev);
    return w;
}

void world_close(struct world *w)
{
    w->dev.dev.ops->free(&w->dev.dev, w->f.pkt, (int)w->f.pending);
    memdev_close(&w->dev);
    forward_free(&w->f);
    free(w);
}

struct forwarder *world_forwarder(struct world *w) { return &w->f; }

int world_receive(struct world *w, const uint8_t *frame, uint32_t len, uint16_t queue, int32_t entry)
{
    uint8_t flags = entry >= 0 ? BYPASS_RX_VERDICT : 0;
    int err = memdev_inject_queue(&w->dev, frame, len, queue, flags);

    if (err == 0) {
        struct bypass_pkt_meta *m = memdev_meta(&w->dev, w->dev.rx[(w->dev.rx_tail - 1) % w->dev.dev.frames]);

        m->entry = (uint32_t)entry;
        m->rule = 3;
        m->hash = 4;
    }
    return err;
}

uint32_t world_sent(struct world *w, uint8_t *room, uint16_t *queue)
{
    size_t len = 0;
    const uint8_t *frame;

    if (w->dev.sent == NULL) {
        return 0;
    }
    *queue = w->dev.sent->queue;
    frame = memdev_sent(&w->dev, &len);
    memcpy(room, frame, len);
    return (uint32_t)len;
}

void world_tx_limit(struct world *w, uint32_t limit) { w->dev.tx_limit = limit; }
void world_caps(struct world *w, uint32_t caps) { w->dev.dev.caps = caps; }
void world_kick_result(struct world *w, int result) { w->dev.kick_result = result; }
