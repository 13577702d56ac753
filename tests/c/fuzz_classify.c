/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_classify - foreign bytes for the classifier: a frame that is whatever the input says, or nearly right; before it,
 * if the input wants so, foreign bytes in the classifier's own memory. It must come back, read nothing outside of frame
 * and memory (both end at their allocation's end), and say something that makes sense; on memory that is right it must
 * say the same twice, alone and in a burst, and count it.
 */
#include "fuzz.h"

#include "dpdk_backend/classify.h"

enum {
    MALFORM = 1, /* first byte of the input, bits: foreign bytes in memory */
    KEY_V6 = 2,
    BUILT = 4, /* the frame begins as one for a live entry */
    TAGS = 8,
    KEYS = 64,
    ENTRIES = 8,
    FRAME_MAX = 2048,
    MASKS = 3,
    ALIGNED = 64,
    TCP_PORT = 8080,
};

#ifdef FUZZ_LIE /* linked with --wrap: bursts name another rule, and the harness has to notice */
void __real_classify_burst(struct classifier *c, const struct classify_frame *in, uint32_t n,
                           struct classify_result *out);
void __wrap_classify_burst(struct classifier *c, const struct classify_frame *in, uint32_t n,
                           struct classify_result *out);
void __wrap_classify_burst(struct classifier *c, const struct classify_frame *in, uint32_t n,
                           struct classify_result *out)
{
    __real_classify_burst(c, in, n, out);
    out->rule += FUZZ_LIE;
}
#endif

static const uint8_t mac[6] = {2, 0, 0, 0, 0, 1}, host[4] = {192, 0, 2, 10};

/* Masks: local port; protocol; VLAN, which only rules about tags have. */
static void put_rules(struct classifier *c, bool v6, bool tags)
{
    uint32_t n = v6 ? 40 : 16, at = v6 ? 32 : 8; /* ports, behind two addresses */
    struct classify_mask masks[MASKS] = {{.max_rank = 3}, {.max_rank = 2}, {.max_rank = 1}};
    struct classify_rule values[MASKS] = {{3, 0}, {2, 1 << 2 | 1}, {1, 2 << 2 | 2}};
    struct classify_policy p = {.key_v6 = v6, .with_v6 = 1, .vlan_depth = tags, .masks_n = MASKS, .rules = MASKS};
    uint8_t keys[MASKS * 40] = {0};

    memset(masks[0].bits + at, 0xff, 2);
    masks[1].bits[at + 6] = 0xff;
    memset(masks[2].bits + at + 4, 0xff, 2);
    put16(keys + at, TCP_PORT);
    keys[n + at + 6] = 17;
    keys[2 * n + at + 4] = 5;
    for (uint32_t i = 0; i < MASKS; i++) {
        keys[(i + 1) * n - 1] |= (uint8_t)i;
    }
    p.keys_n = MASKS;
    p.masks = masks;
    p.keys = keys;
    p.values = values;
    CHECK(classify_rules_set(c, &p) == 0, "rules");
}

static void fill(struct classifier *c, uint8_t flags)
{
    struct classify_key key = {.local_port = {TCP_PORT >> 8, TCP_PORT & 0xff}, .proto = 6};
    struct classify_key block = {.local_port = {0x80, 0}, .proto = 6, .kind = CLASSIFY_BLOCK};
    struct classify_endpoint e = {.entry = 1, .flags = CLASSIFY_DRAIN}, of_block = {.entry = 2};
    uint8_t local[16] = {0}, local6[16] = {0x20, 1, 0x0d, 0xb8, [15] = 0x10}, group[16] = {1, 0, 0x5e, 1, 2, 3};

    memcpy(local, host, 4);
    memcpy(block.local, host, 4);
    put_rules(c, flags & KEY_V6, flags & TAGS);
    classify_mac_set(c, mac);
    CHECK(classify_set_add(c, CLASSIFY_LOCALS4, local) == 0 && classify_set_add(c, CLASSIFY_LOCALS6, local6) == 0 &&
              classify_set_add(c, CLASSIFY_GROUPS, group) == 0,
          "sets");
    CHECK(classify_endpoint_add(c, &key, &e) == 0 && classify_endpoint_add(c, &block, &of_block) == 0, "entries");
    memcpy(key.local, host, 4);
    memcpy(key.remote, fuzz_peer, 4);
    key.remote_port[0] = 80;
    CHECK(classify_held_add(c, &key, CLASSIFY_TIME_WAIT) == 0, "held");
}

/* Places and values of the input in the memory, the first pages (rules in force, sizes, sequence counts) above all.
 * Locks are not taken any more. */
static void foreign(struct classifier *c, struct input *in)
{
    for (int i = in_u8(in) % 64; i > 0; i--) {
        uint64_t where = in_u16(in);

        where = where & 1 ? where >> 1 & 4095 : where << 8 | in_u8(in);
        c->mem[where % c->size] = in_u8(in);
    }
}

static uint32_t frame_of(struct input *in, uint8_t flags, uint8_t *frame)
{
    uint32_t n = 0;

    if (flags & BUILT) {
        struct fuzz_tcp t = {.sport = 0x5000, .dport = in_u8(in) & 1 ? TCP_PORT : 0x8012, .flags = in_u8(in)};

        n = fuzz_tcp_frame(frame, &t);
        memcpy(frame, mac, 6);
        memcpy(frame + 30, host, 4);
        for (int i = in_u8(in) % 8; i > 0; i--) {
            uint16_t where = in_u16(in);

            frame[where % n] = in_u8(in);
        }
        return n - in_u8(in) % 8;
    }
    while (in->p < in->end && n < FRAME_MAX) {
        frame[n++] = in_u8(in);
    }
    if (n >= 6 && flags & TAGS) {
        memcpy(frame, mac, 6);
    }
    return n;
}

static void sense(const struct classify_result *r, bool right)
{
    bool steered = r->reason == REASON_STEERED || r->reason == REASON_STEERED_ICMP;

    CHECK(r->reason < REASON_ALL && r->verdict <= CLASSIFY_STEER, "reason %u, verdict %u", r->reason, r->verdict);
    CHECK(steered == (r->verdict == CLASSIFY_STEER), "reason %u, verdict %u", r->reason, r->verdict);
    CHECK(!right || steered == (r->entry == 1 || r->entry == 2), "reason %u, entry %u", r->reason, r->entry);
    CHECK(!right || (r->reason != REASON_BUSY && r->reason != REASON_UNSETTLED), "reason %u", r->reason);
    CHECK(!right || !steered || r->rule == 0 || r->rule == 1, "rule %u", r->rule);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct classify_config cfg = {CLASSIFY_ABI, KEYS, ENTRIES, ENTRIES, ENTRIES, 0, 42};
    struct input in = {data, data + size};
    size_t bytes = classify_mem_size(&cfg);
    void *mem = aligned_alloc(ALIGNED, bytes);
    uint8_t flags = in_u8(&in), *frame = malloc(FRAME_MAX), *tight;
    struct classify_result alone, in_burst;
    struct classify_count before, after;
    struct classifier c;
    uint32_t len;

    CHECK(mem && frame && bytes % ALIGNED == 0, "no memory");
    memset(mem, 0, bytes);
    CHECK(classify_init(&c, mem, bytes, &cfg) == 0, "init");
    fill(&c, flags);
    if (flags & MALFORM) {
        foreign(&c, &in);
    }
    len = frame_of(&in, flags, frame);
    tight = malloc(len ? len : 1);
    memcpy(tight, frame, len);
    classify(&c, tight, len, 0, &alone);
    sense(&alone, !(flags & MALFORM));
    classify_reason_count(&c, alone.reason, &before);
    classify_burst(&c, &(struct classify_frame){.data = tight, .len = len}, 1, &in_burst);
    sense(&in_burst, !(flags & MALFORM));
    classify_reason_count(&c, alone.reason, &after);
    if (!(flags & MALFORM)) {
        CHECK(memcmp(&alone, &in_burst, sizeof alone) == 0, "reason %u, then %u", alone.reason, in_burst.reason);
        CHECK(before.packets == 1 && after.packets == 2 && after.bytes == 2 * len, "%u packets",
              (uint32_t)after.packets);
    }
    free(tight);
    free(frame);
    free(mem);
    return 0;
}
