/* SPDX-License-Identifier: Apache-2.0 */
/* app.c - the layout of an application's memory (app.h). */
#include "app.h"

#include <stdbool.h>

enum { PAGE = 4096, HUGE_ALIGN = 1 << 21 };

_Static_assert(sizeof(struct app_header) <= APP_HEADER_SIZE, "the header fits its page");

static uint64_t place(uint64_t *next, uint64_t size, uint64_t align)
{
    uint64_t at = (*next + align - 1) & ~(align - 1);

    *next = at + size;
    return at;
}

size_t app_layout(struct app_header *h, size_t dev_size)
{
    uint64_t next = APP_HEADER_SIZE;

    h->arena_size = bypass_arena_size(&h->config);
    if (h->arena_size == 0 || dev_size == 0) {
        return 0;
    }
    h->magic = APP_MAGIC;
    h->abi = APP_ABI;
    h->dev_size = dev_size;
    h->group_size = APP_GROUP_FIXED + (uint64_t)h->config.max_socks * APP_GROUP_PER_SOCKET;
    h->group_off = place(&next, h->group_size, PAGE);
    h->dev_off = place(&next, h->dev_size, HUGE_ALIGN); /* frames may lie in huge pages */
    h->arena_off = place(&next, h->arena_size, PAGE);
    h->size = (next + PAGE - 1) & ~(uint64_t)(PAGE - 1);
    return (size_t)h->size;
}

static bool within(uint64_t off, uint64_t len, uint64_t size)
{
    return off >= APP_HEADER_SIZE && off % 64 == 0 && off <= size && len > 0 && len <= size - off;
}

int app_valid(const struct app_header *h, size_t size)
{
    return size >= APP_HEADER_SIZE && h->magic == APP_MAGIC && h->abi == APP_ABI && h->size <= size &&
           within(h->group_off, h->group_size, h->size) && within(h->arena_off, h->arena_size, h->size) &&
           within(h->dev_off, h->dev_size, h->size);
}
