/* SPDX-License-Identifier: Apache-2.0 */
/*
 * epoll_exec.c - sets that survive exec. The kernel keeps the set, with the members that the kernel serves; items are this
 * program's memory, and are handed to the next one in a small file (memfd_create(2)) that BYPASS_SETS names:
 *
 *     SET   a descriptor that stays open, and which set it is
 *     ITEM  of a set: of the object with this shadow, or of another set; what it asks for, and whether that is to be told
 *
 * What happens between the two programs waits at the old one's place in the group (group_notify()), so no edge is lost.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "epoll.h"

enum { SET = 1, ITEM };

struct saved {
    uint32_t kind, set; /* the old program's struct epoll.index */
    uint32_t inner;     /* ITEM: of that set, plus one; 0: of an object */
    int32_t fd;         /* of the set; that the item was added by */
    uint64_t ino;       /* the object's */
    uint64_t data;
    uint32_t wanted, flags;
    uint8_t half, queued;
    uint16_t pad;
};

/* ---- In the old program ------------------------------------------------------------------------------------- */
static bool survives(int fd)
{
    int flags = real.fcntl(fd, F_GETFD);

    return flags >= 0 && !(flags & FD_CLOEXEC);
}

static bool anything(void)
{
    for (int fd = 0; fd < me.fd_top; fd++) {
        const struct epoll *e = epoll_of(fd);

        if (e && e->items && survives(fd)) {
            return true;
        }
    }
    return false;
}

static void save_item(int file, const struct item *i)
{
    struct saved one = {.kind = ITEM,
                        .set = i->set->index,
                        .inner = i->inner ? i->inner->index + 1 : 0,
                        .fd = i->fd,
                        .ino = i->inner ? 0 : group_object(me.g, i->object)->ino,
                        .data = i->data.u64,
                        .wanted = i->wanted,
                        .flags = i->flags,
                        .half = i->half,
                        .queued = i->queued};

    (void)!real.write(file, &one, sizeof one);
}

/* Sets and items of objects first, so that an item of a set finds that one as it is to be. */
static void save_all(int file, bool nested)
{
    for (int fd = 0; fd < me.fd_top; fd++) {
        struct epoll *e = epoll_of(fd);

        if (!e || !survives(fd)) {
            continue;
        }
        if (!nested) {
            (void)!real.write(file, &(struct saved){.kind = SET, .set = e->index, .fd = fd}, sizeof(struct saved));
        }
        for (const struct item *i = e->items; i; i = i->set_next) {
            if (nested == (i->inner != NULL)) {
                save_item(file, i);
            }
        }
    }
}

int epoll_save(void)
{
    int file = anything() ? fd_hide(memfd_create("bypass-sets", MFD_CLOEXEC)) : -1;

    if (file >= 0) {
        save_all(file, false);
        save_all(file, true);
        real.fcntl(file, F_SETFD, 0);
    }
    return file;
}

/* ---- In the new one ------------------------------------------------------------------------------------------ */

/* The set that was known by this number: the first descriptor of it that was read. */
static struct epoll *set_of(const struct saved *all, int n, uint32_t set)
{
    for (int k = 0; k < n; k++) {
        if (all[k].kind == SET && all[k].set == set) {
            return epoll_of(all[k].fd);
        }
    }
    return NULL;
}

static void restore_set(const struct saved *all, int n)
{
    const struct saved *it = &all[n];
    struct epoll *e = set_of(all, n, it->set);

    if (epoll_of(it->fd) || !epoll_is(it->fd)) {
        return; /* it names something else now */
    }
    if (e) {
        epoll_dup(e->fd, it->fd);
    } else {
        epoll_note(it->fd);
    }
}

/* Its side is as the object's is now; on which it was is `half`. */
static void settle(struct item *i, uint8_t half)
{
    struct epoll_event ev = {.events = (i->wanted & ~(uint32_t)(EPOLLERR | EPOLLHUP)) | i->flags, .data = i->data};
    int place = i->inner ? PLACE_UNDECIDED : group_object(me.g, i->object)->place;
    bool ours = i->inner ? i->inner->ours : place == PLACE_STACK || place == PLACE_BOTH;

    if (!ours && half != HALF_KERNEL) {
        real.epoll_ctl(i->set->fd, EPOLL_CTL_ADD, i->fd, &ev);
    } else if (ours && half == HALF_KERNEL) {
        real.epoll_ctl(i->set->fd, EPOLL_CTL_DEL, i->fd, NULL);
    }
    if (place == PLACE_KERNEL || (ours && item_ours(i) < 0)) {
        item_drop(i);
    }
}

static void restore_item(const struct saved *all, int count, const struct saved *it)
{
    struct epoll *e = set_of(all, count, it->set), *inner = it->inner ? set_of(all, count, it->inner - 1) : NULL;
    uint32_t object = it->inner ? GROUP_NONE : group_find_ino(me.g, it->ino);
    struct epoll_event ev = {.events = it->wanted | it->flags, .data.u64 = it->data};
    struct item *i;

    if (!e || e == inner || (it->inner ? !inner : object == GROUP_NONE || me.local[object].fds == 0) ||
        item_find(e, object, inner, it->fd) || !(i = item_new(e, object, inner, it->fd, &ev))) {
        return; /* it has ended with the old program, or is there by another descriptor of the set */
    }
    i->wanted = it->wanted;
    settle(i, it->half);
    i = item_find(e, object, inner, it->fd);
    if (i && !it->queued && i->flags & EPOLLET) {
        item_unqueue(i); /* that was told already */
    }
}

void epoll_restore(int file)
{
    off_t size = lseek(file, 0, SEEK_END);
    int count = size > 0 ? (int)((size_t)size / sizeof(struct saved)) : 0;
    struct saved *all =
        count ? mmap(NULL, (size_t)size, PROT_READ, MAP_PRIVATE, file, 0) : MAP_FAILED; /* written by us, or nonsense */

    if (all == MAP_FAILED) {
        return;
    }
    for (int n = 0; n < count; n++) {
        if (all[n].kind == SET) {
            restore_set(all, n);
        } else if (all[n].kind == ITEM) {
            restore_item(all, count, &all[n]);
        }
    }
    munmap(all, (size_t)size);
}
