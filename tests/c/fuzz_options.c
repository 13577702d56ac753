/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_options - TCP options, any bytes: the parser reads no byte behind them (they lie at the end of their memory), and
 * what it says is within bounds and there in the bytes.
 */
#include "fuzz.h"
#include "tcp.h"

/* The bytes hold an option of this kind and length at a place where some reading of them finds one. */
static bool holds(const uint8_t *p, uint32_t n, uint8_t kind, uint32_t len)
{
    for (uint32_t i = 0; i + 1 < n; i++)
        if (p[i] == kind && (p[i + 1] == len || len == 0))
            return true;
    return false;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint32_t n = size > 40 ? 40 : (uint32_t)size;
    uint8_t *p = malloc(n ? n : 1); /* exact: one byte too far is seen */
    struct tcp_opts all = {0}, again = {0}, quick = {0};
    assert(p != NULL);
    memcpy(p, data, n);
    bool good = tcp_opt_parse(p, n, &all);
    bool repeated = tcp_opt_parse(p, n, &again);
    CHECK(good == repeated, "two answers about the same bytes");
    CHECK(all.wscale <= 14, "shift %u (RFC 7323 2.3)", all.wscale);
    CHECK(all.sacks <= SACK_BLOCKS, "%u blocks", all.sacks);
    CHECK(!all.has_ts || holds(p, n, 8, 10), "timestamps out of nothing");
    CHECK(!all.has_wscale || holds(p, n, 3, 3), "a window scale out of nothing");
    CHECK(!all.mss || holds(p, n, 2, 4), "an MSS out of nothing");
    CHECK(!all.sack_ok || holds(p, n, 4, 2), "SACK permitted out of nothing");
    CHECK(!all.sacks || holds(p, n, 5, 0), "SACK blocks out of nothing");
    if (tcp_opt_parse_ts(p, n, &quick)) {
        CHECK(good && all.has_ts && all.ts_val == quick.ts_val && all.ts_ecr == quick.ts_ecr,
              "the quick reading differs from the careful one");
    }
    free(p);
    return 0;
}
