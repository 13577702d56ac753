/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_lend.h - what a story's programs have been lent: it must stay as it is until they give it back, and nothing else
 * that they say may count.
 */
#ifndef TESTS_FUZZ_LEND_H
#define TESTS_FUZZ_LEND_H

#include <errno.h>

#include "fuzz.h"

enum { FUZZ_LENT = 12 };
struct fuzz_lent {
    struct bypass_buf buf[FUZZ_LENT];
    uint32_t sum[FUZZ_LENT], n;
};

static inline void fuzz_lent_release(struct bypass_stack *s, struct fuzz_lent *l, uint32_t i)
{
    CHECK(fuzz_sum(l->buf[i].data, l->buf[i].len, 0) == l->sum[i], "lent bytes have changed");
    uint64_t token = l->buf[i].token;
    CHECK(bypass_release(s, &token, 1) == 0, "a buffer that was lent");
    CHECK(bypass_release(s, &token, 1) == -EINVAL, "and was given back");
    l->n--;
    l->buf[i] = l->buf[l->n];
    l->sum[i] = l->sum[l->n];
}

static inline void fuzz_lent_keep(struct bypass_stack *s, struct fuzz_lent *l, const struct bypass_buf *b)
{
    if (l->n == FUZZ_LENT)
        fuzz_lent_release(s, l, 0);
    l->buf[l->n] = *b;
    l->sum[l->n++] = fuzz_sum(b->data, b->len, 0);
}

/* A token that nobody was given, like one that somebody was. */
static inline void fuzz_lent_mistake(struct bypass_stack *s, const struct fuzz_lent *l, const uint8_t *a)
{
    uint64_t like = l->n > 0 ? l->buf[a[0] % l->n].token : a[0];
    uint64_t token = like ^ ((uint64_t)(a[1] | 1) << (32 + (a[2] & 7))), item = (like & ~0xffffffffull) | get32(a);
    struct bypass_buf b = {.token = like, .len = 1};
    CHECK(bypass_release(s, &token, 1) == -EINVAL, "another serial");
    for (uint32_t i = 0; i < l->n; i++)
        if (item == l->buf[i].token)
            return;
    CHECK(bypass_release(s, &item, 1) == -EINVAL, "another item");
    (void)bypass_send_zc(s, a[3], &b, 1, 0); /* lent to be read */
}

static inline void fuzz_lent_end(struct bypass_stack *s, struct fuzz_lent *l)
{
    while (l->n > 0)
        fuzz_lent_release(s, l, 0);
}

#endif
