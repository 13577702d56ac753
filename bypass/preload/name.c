/* SPDX-License-Identifier: Apache-2.0 */
/* name.c - socket addresses of programs and of the stack: ip(7), ipv6(7) with mapped addresses (RFC 4291 2.5.5.2). */
#define _GNU_SOURCE
#include <string.h>

#include "preload.h"

static const uint8_t mapped[12] = {[10] = 0xff, [11] = 0xff};

bool address_is_loopback(const struct bypass_addr *a) { return memcmp(a->b, mapped, 12) == 0 && a->b[12] == 127; }

int name_from(const struct object *o, const struct sockaddr *sa, socklen_t len, struct bypass_endpoint *out)
{
    *out = (struct bypass_endpoint){0};
    if (len < sizeof sa->sa_family) {
        return -EINVAL;
    }
    if (sa->sa_family == AF_INET) {
        const struct sockaddr_in *in = (const void *)sa;

        if (len < sizeof *in) {
            return -EINVAL;
        }
        memcpy(out->addr.b, mapped, 12);
        memcpy(out->addr.b + 12, &in->sin_addr, 4);
        out->port = ntohs(in->sin_port);
        return o->family == AF_INET ? 0 : -EAFNOSUPPORT;
    }
    if (sa->sa_family == AF_INET6 && o->family == AF_INET6) {
        const struct sockaddr_in6 *in6 = (const void *)sa;

        if (len < offsetof(struct sockaddr_in6, sin6_scope_id)) {
            return -EINVAL;
        }
        memcpy(out->addr.b, &in6->sin6_addr, 16);
        out->port = ntohs(in6->sin6_port);
        if (IN6_IS_ADDR_UNSPECIFIED(&in6->sin6_addr) && !o->v6only) {
            memcpy(out->addr.b, mapped, 12); /* :: stands for both families */
            return 0;
        }
        return IN6_IS_ADDR_V4MAPPED(&in6->sin6_addr) && !o->v6only ? 0 : -EAFNOSUPPORT;
    }
    return -EAFNOSUPPORT;
}

void name_to(const struct object *o, const struct bypass_endpoint *e, struct sockaddr *sa, socklen_t *len)
{
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_port = htons(e->port)};
    struct sockaddr_in6 in6 = {.sin6_family = AF_INET6, .sin6_port = htons(e->port)};
    const void *from = o->family == AF_INET6 ? (const void *)&in6 : (const void *)&in;
    socklen_t size = o->family == AF_INET6 ? sizeof in6 : sizeof in;

    if (!sa || !len) {
        return;
    }
    memcpy(&in.sin_addr, e->addr.b + 12, 4);
    memcpy(&in6.sin6_addr, e->addr.b, 16);
    if (memcmp(e->addr.b + 12, &(uint32_t){0}, 4) == 0) {
        memset(&in6.sin6_addr, 0, 16); /* the wildcard of an AF_INET6 socket is :: */
    }
    memcpy(sa, from, *len < size ? *len : size);
    *len = size;
}
