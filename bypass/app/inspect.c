/* SPDX-License-Identifier: Apache-2.0 */
/* inspect.c - see inspect.h. Whatever says where to read next is copied, checked, and used from the copy. */
#include "app/inspect.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>

#include "preload/group.h"

_Static_assert((int)APP_INSPECT_WHY >= (int)GROUP_WHY, "room for it");
_Static_assert(sizeof((struct app_summary *)0)->name == APP_NAME, "as long as the header's");

struct memory { /* what was checked of an application's memory */
    const uint8_t *base;
    struct app_header h;
    struct group g; /* a copy of its head; without the places of processes, which are many */
    uint64_t objects_off;
};

/* The part of struct group that is copied: all up to the lists. */
enum { GROUP_HEAD = offsetof(struct group, leaving) };

static int look_at(struct memory *m, const void *mem, size_t size)
{
    m->base = mem;
    if (!mem || size < APP_HEADER_SIZE) {
        return -EINVAL;
    }
    memcpy(&m->h, mem, sizeof m->h);
    if (!app_valid(&m->h, size) || m->h.group_size < sizeof m->g) {
        return -EINVAL;
    }
    memcpy(&m->g, m->base + m->h.group_off, GROUP_HEAD);
    if (m->g.ready != 2) {
        return m->g.ready < 2 ? -EAGAIN : -EINVAL;
    }
    m->objects_off = m->g.objects_off;
    if (m->g.abi != APP_ABI || m->objects_off < sizeof m->g || m->objects_off > m->h.group_size ||
        m->g.objects_bump > m->g.objects_max ||
        (uint64_t)m->g.objects_max * sizeof(struct object) > m->h.group_size - m->objects_off) {
        return -EINVAL;
    }
    return 0;
}

static void copy_text(char *out, const char *from, size_t n)
{
    memcpy(out, from, n);
    out[n - 1] = 0;
}

int app_summary(const void *mem, size_t size, struct app_summary *out)
{
    struct memory m;
    int err = look_at(&m, mem, size);

    *out = (struct app_summary){0};
    if (err < 0) {
        return err;
    }
    out->app = m.h.app;
    out->device = m.h.device;
    out->dead = m.g.dead;
    out->spin_us = m.h.spin_us;
    out->tcp_stack = m.g.tcp_stack;
    out->tcp_kernel = m.g.tcp_kernel;
    out->udp_stack = m.g.udp_stack;
    out->udp_kernel = m.g.udp_kernel;
    out->sockets = m.g.objects_used;
    out->sockets_max = m.g.objects_max;
    copy_text(out->ifname, m.h.ifname, sizeof out->ifname);
    copy_text(out->name, m.h.name, sizeof out->name);
    for (uint32_t i = 0; i < GROUP_PROCS; i++) {
        struct proc p;

        memcpy(&p, m.base + m.h.group_off + offsetof(struct group, procs) + i * sizeof p, sizeof p);
        if (p.pid > 0 && out->processes < sizeof out->pids / sizeof *out->pids) {
            out->pids[out->processes] = p.pid;
        }
        out->processes += p.pid > 0;
    }
    return 0;
}

static void tell(const struct memory *m, uint32_t i, const struct object *o, struct app_socket *out)
{
    int err = -EBADF;

    *out = (struct app_socket){.object = i,
                               .pid = o->pid,
                               .fd = o->fd,
                               .refs = o->refs,
                               .type = o->type,
                               .inet6 = o->family == AF_INET6,
                               .place = o->place,
                               .reason = o->reason};
    copy_text(out->why, o->why, sizeof o->why);
    if (o->sock >= 0) {
        err = bypass_inspect_sock(m->base + m->h.arena_off, m->h.arena_size, o->sock, &out->stack);
    }
    out->told = err == 0 ? 1 : err == -EBADF ? 0 : err;
}

int app_socket_next(const void *mem, size_t size, uint32_t *cursor, struct app_socket *out)
{
    struct memory m;
    int err = look_at(&m, mem, size);

    while (err == 0 && *cursor < m.g.objects_bump) {
        uint32_t i = (*cursor)++;
        struct object o;

        memcpy(&o, m.base + m.h.group_off + m.objects_off + (uint64_t)i * sizeof o, sizeof o);
        if (o.refs == 0) {
            continue;
        }
        if (o.place > PLACE_BOTH || o.reason >= WHY_COUNT) {
            return -EINVAL;
        }
        tell(&m, i, &o, out);
        return 1;
    }
    return err;
}

int app_orphan_next(const void *mem, size_t size, uint32_t *cursor, struct bypass_inspect *out)
{
    struct memory m;
    int err = look_at(&m, mem, size);

    if (err < 0) {
        return err;
    }
    do {
        err = bypass_inspect_conn(m.base + m.h.arena_off, m.h.arena_size, cursor, out);
    } while (err == 1 && out->handle != UINT32_MAX);
    return err;
}

const char *app_reason(int reason)
{
    static const char *const texts[] = {
#define X(name, text) text,
        REASONS(X)
#undef X
    };

    return reason >= 0 && reason < WHY_COUNT ? texts[reason] : NULL;
}
