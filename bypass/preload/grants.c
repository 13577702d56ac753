/* SPDX-License-Identifier: Apache-2.0 */
/* grants.c - what the policy grants this user, as the broker tells it (APP_GRANT): asked before the broker is. */
#define _GNU_SOURCE
#include <string.h>

#include "preload.h"

enum { GRANTS = 256 };

static struct app_msg grants[GRANTS], incoming[GRANTS]; /* in force; being told */
static uint32_t grant_count, incoming_count;

void grant_take(const struct app_msg *m)
{
    incoming_count = m->index == 0 ? 0 : incoming_count;
    if (incoming_count < GRANTS && !(m->flags & 2)) {
        incoming[incoming_count++] = *m;
    }
    if (m->flags & 3) {
        memcpy(grants, incoming, incoming_count * sizeof *grants);
        grant_count = incoming_count;
    }
}

static bool in_prefix(const struct bypass_addr *a, const struct bypass_addr *net, int bits)
{
    int whole = bits / 8, rest = bits % 8;

    return memcmp(a->b, net->b, (size_t)whole) == 0 && (rest == 0 || (a->b[whole] ^ net->b[whole]) >> (8 - rest) == 0);
}

bool granted(int kind, const struct bypass_endpoint *local, const struct bypass_endpoint *remote)
{
    static const struct bypass_addr any = {{[10] = 0xff, [11] = 0xff}};

    if (me.app->device == APP_DEV_LOOP) {
        return !remote || address_is_loopback(&remote->addr);
    }
    for (uint32_t i = 0; i < grant_count; i++) {
        const struct app_msg *g = &grants[i];
        bool port = !local->port || !g->local.port || (local->port >= g->local.port && local->port <= g->last_port);
        bool from =
            memcmp(&local->addr, &any, sizeof any) == 0 || in_prefix(&local->addr, &g->local.addr, g->prefix_len);
        bool rport =
            !remote || !g->remote.port || (remote->port >= g->remote.port && remote->port <= g->last_remote_port);
        bool to = !remote || in_prefix(&remote->addr, &g->remote.addr, g->remote_prefix_len);

        if ((g->kind == 0 || g->kind == (uint32_t)kind) && port && from && rport && to) {
            return true;
        }
    }
    return false;
}
