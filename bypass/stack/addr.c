/* SPDX-License-Identifier: Apache-2.0 */
/*
 * addr.c - which addresses are ours, what kind an IPv4 address is (RFC 1122 3.2.1.3, RFC 6890), which one we send from.
 * The list in the arena's head is what the caller set; struct net holds the same, as packets are compared with it.
 */
#include <errno.h>

#include "net.h"

static uint32_t mask_of(int prefix_len) { return prefix_len == 0 ? 0 : __builtin_bswap32(~0u << (32 - prefix_len)); }

static void rebuild(struct bypass_stack *s)
{
    struct net *n = net(s);
    n->locals = 0;
    for (int i = 0; i < MAX_ADDRS; i++) {
        const struct local_addr *a = &core(s)->addrs[i];
        if (a->used) {
            struct net_local *l = &n->local[n->locals++];
            l->addr = load_be32(addr_v4(&a->addr));
            l->mask = mask_of(a->prefix_len);
            l->bcast = a->prefix_len > 30 ? ~0u : l->addr | ~l->mask; /* RFC 3021: /31 has none */
        }
    }
    dst_purge(s); /* what was on the link may not be any more */
}

static struct local_addr *local_find(struct bypass_stack *s, const addr_t *addr)
{
    for (int i = 0; i < MAX_ADDRS; i++) {
        struct local_addr *a = &core(s)->addrs[i];
        if (a->used && addr_eq(&a->addr, addr)) {
            return a;
        }
    }
    return NULL;
}

int bypass_addr_add(struct bypass_stack *s, const struct bypass_addr *addr, int prefix_len)
{
    if (!addr_is_v4(addr)) {
        return -EAFNOSUPPORT;
    }
    uint8_t first = addr_v4(addr)[0];
    bool loopback = first == 127 && !loops(s);
    if (prefix_len < 0 || prefix_len > 32 || first == 0 || loopback || first >= 224) {
        return -EINVAL;
    }
    if (local_find(s, addr) != NULL) {
        return -EEXIST;
    }
    for (int i = 0; i < MAX_ADDRS; i++) {
        struct local_addr *a = &core(s)->addrs[i];
        if (!a->used) {
            *a = (struct local_addr){.addr = *addr, .prefix_len = prefix_len, .used = 1};
            rebuild(s);
            return 0;
        }
    }
    return -ENOSPC;
}

int bypass_addr_del(struct bypass_stack *s, const struct bypass_addr *addr)
{
    struct local_addr *a = local_find(s, addr);
    if (a == NULL) {
        return -EADDRNOTAVAIL;
    }
    a->used = 0;
    rebuild(s);
    return 0;
}

int bypass_gateway_set(struct bypass_stack *s, const struct bypass_addr *gateway)
{
    struct core *c = core(s);
    if (gateway != NULL && !addr_is_v4(gateway)) {
        return -EAFNOSUPPORT;
    }
    if (gateway != NULL && addr_kind(s, addr_v4(gateway)) != ADDR_UNICAST) {
        return -EINVAL;
    }
    c->has_gateway = gateway != NULL;
    c->gateway = gateway != NULL ? *gateway : (addr_t){{0}};
    dst_purge(s);
    return 0;
}

enum addr_kind addr_kind(const struct bypass_stack *s, const uint8_t *wire)
{
    const struct net *n = net(s);
    uint32_t a = load_be32(wire);
    if (a == ~0u) {
        return ADDR_BROADCAST;
    }
    for (uint32_t i = 0; i < n->locals; i++) {
        if (a == n->local[i].addr) {
            return ADDR_LOCAL;
        }
        if (a == n->local[i].bcast) {
            return ADDR_BROADCAST;
        }
    }
    if (wire[0] == 0 || wire[0] == 127 || wire[0] >= 240) {
        return ADDR_INVALID;
    }
    return wire[0] >= 224 ? ADDR_MULTICAST : ADDR_UNICAST;
}

bool addr_on_link(const struct bypass_stack *s, const uint8_t *wire)
{
    const struct net *n = net(s);
    uint32_t a = load_be32(wire);
    for (uint32_t i = 0; i < n->locals; i++) {
        if (((a ^ n->local[i].addr) & n->local[i].mask) == 0) {
            return true;
        }
    }
    return false;
}

bool addr_for(struct bypass_stack *s, const addr_t *dst, addr_t *src)
{
    const struct net *n = net(s);
    if (n->locals == 0 || !addr_is_v4(dst)) {
        return false;
    }
    uint32_t a = load_be32(addr_v4(dst)), best = 0;
    for (uint32_t i = n->locals; i-- > 0;) {
        if (((a ^ n->local[i].addr) & n->local[i].mask) == 0) {
            best = i;
        }
    }
    *src = addr_from_v4(&n->local[best].addr);
    return true;
}

bool addr_is_local(const struct bypass_stack *s, const addr_t *a)
{
    return addr_is_v4(a) && addr_kind(s, addr_v4(a)) == ADDR_LOCAL;
}
