/* SPDX-License-Identifier: Apache-2.0 */
/*
 * store.c - items: a name, some bytes, some descriptors; and watches. An item is watched when it has processes
 * (pidfds). When the last of them is dead, its listening sockets stop, lest that the kernel accept connections for nobody;
 * its keys are deleted from its maps, a few between two rounds of frames; then its ports go, the item and its parts go
 * (those whose name is the item's, a dot, and more), and the brokers are told.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "closer.h"
#include "maps.h"
#include "program.h"
#include "steer_mem.h"

struct process {
    int fd; /* pidfd */
    uint32_t number;
};

struct keys {                /* of one map, or of one classifier */
    int map;                 /* -1: none */
    struct steer_mem *steer; /* NULL: it is a map */
    uint32_t size, count, room;
    uint8_t *key;
};

struct item {
    struct item *next;
    uint32_t hash; /* of the name: there may be thousands of items, one for each lease */
    char name[FWD_NAME];
    uint32_t len, fds_n;
    uint8_t *blob;
    int *fds;
    struct process *process;
    uint32_t processes;
    struct keys keys[FWD_MAPS];
    bool dying;
};

static uint32_t hash_of(const char *name)
{
    uint32_t h = 2166136261u; /* FNV-1a; names are the broker's */

    while (*name) {
        h = (h ^ (uint8_t)*name++) * 16777619u;
    }
    return h;
}

/* name: with its 0, of at most FWD_NAME bytes. */
static struct item **find(struct program *w, const char *name)
{
    struct item **at = &w->items;
    uint32_t hash = hash_of(name);

    while (*at && ((*at)->hash != hash || strncmp((*at)->name, name, FWD_NAME) != 0)) {
        at = &(*at)->next;
    }
    return at;
}

static bool part_of(const struct item *part, const char *name)
{
    size_t n = strlen(name);

    return strncmp(part->name, name, n) == 0 && part->name[n] == '.';
}

static void keys_end(struct keys *k)
{
    if (k->steer) {
        steer_mem_close(k->steer);
        free(k->steer);
    }
    if (k->map >= 0) {
        close(k->map);
    }
    free(k->key);
    *k = (struct keys){.map = -1};
}

static void unwatch(struct program *w, struct item *item)
{
    for (uint32_t i = 0; i < item->processes; i++) {
        if (item->process[i].fd >= 0) {
            program_unwatch(w, item->process[i].fd);
            close(item->process[i].fd);
        }
    }
    free(item->process);
    item->process = NULL;
    item->processes = 0;
    for (int i = 0; i < FWD_MAPS; i++) {
        keys_end(&item->keys[i]);
    }
}

static void take_out(struct program *w, struct item **at)
{
    struct item *item = *at;

    *at = item->next;
    w->items_n--;
    device_ports_of_item(w, item->name);
    unwatch(w, item);
    close_later(item->fds, (int)item->fds_n);
    free(item->fds);
    free(item->blob);
    free(item);
}

/* With its parts. */
static void drop(struct program *w, const char *name)
{
    char whole[FWD_NAME]; /* the name may be the item's own */

    memcpy(whole, name, FWD_NAME);
    for (struct item **at = &w->items; *at;) {
        if (part_of(*at, whole)) {
            take_out(w, at);
        } else {
            at = &(*at)->next;
        }
    }
    take_out(w, find(w, whole));
}

/* ---- Items ------------------------------------------------------------------------------------------------- */

/* The item that a message names first, or NULL, with the error noted. */
static struct item *named(struct request *q)
{
    const struct fwd_name *m = q->message;
    struct item *item;

    if (!memchr(m->name, 0, FWD_NAME) || !m->name[0]) {
        refuse(q, EINVAL, "the name has no end, or is empty");
        return NULL;
    }
    item = *find(q->w, m->name);
    if (!item || item->dying) {
        refuse(q, ENOENT, "no item %s", m->name);
        return NULL;
    }
    return item;
}

static struct item *new_item(struct program *w, const char *name)
{
    struct item *item = calloc(1, sizeof *item), **at = &w->items;

    if (!item) {
        return NULL;
    }
    memcpy(item->name, name, FWD_NAME);
    item->hash = hash_of(name);
    for (int i = 0; i < FWD_MAPS; i++) {
        item->keys[i].map = -1;
    }
    while (*at) {
        at = &(*at)->next;
    }
    *at = item;
    w->items_n++;
    return item;
}

int store_put(struct request *q)
{
    const struct fwd_item *m = q->message;
    struct item *item;
    uint8_t *blob;
    int *fds;

    if (!memchr(m->name, 0, FWD_NAME) || !m->name[0] || m->len > FWD_BLOB ||
        q->len != offsetof(struct fwd_item, blob) + m->len) {
        return refuse(q, EINVAL, "an item has a name of at most %d bytes and at most %d bytes of data", FWD_NAME - 1,
                      FWD_BLOB);
    }
    item = *find(q->w, m->name);
    if (item && item->dying) {
        return refuse(q, EBUSY, "item %s is being cleaned up after its processes: try again", m->name);
    }
    blob = malloc(m->len + 1u);
    fds = malloc(((uint32_t)q->fds_n + 1u) * sizeof *fds);
    item = blob && fds && !item ? new_item(q->w, m->name) : item;
    if (!blob || !fds || !item) {
        free(blob);
        free(fds);
        return refuse(q, ENOMEM, "no memory for item %s", m->name);
    }
    close_later(item->fds, (int)item->fds_n);
    free(item->fds);
    free(item->blob);
    item->len = m->len;
    item->blob = memcpy(blob, m->blob, m->len);
    item->fds_n = (uint32_t)q->fds_n;
    item->fds = memcpy(fds, q->fds, (uint32_t)q->fds_n * sizeof *fds);
    memset(q->fds, -1, (size_t)q->fds_n * sizeof *q->fds);
    return 0;
}

int store_get(struct request *q)
{
    const struct item *item = named(q);
    struct fwd_item *a = q->answer;

    if (!item) {
        return -EINVAL;
    }
    memcpy(a->name, item->name, FWD_NAME);
    a->len = item->len;
    memcpy(a->blob, item->blob, item->len);
    q->answer_len = offsetof(struct fwd_item, blob) + item->len;
    q->answer_fds = item->fds;
    q->answer_fds_n = item->fds_n;
    return 0;
}

int store_list(struct request *q)
{
    const struct fwd_list *m = q->message;
    struct fwd_list *a = q->answer;
    uint32_t i = 0, from = m->from;

    a->from = from;
    a->count = 0;
    for (const struct item *item = q->w->items; item && a->count < FWD_LIST_MAX; item = item->next) {
        if (i++ >= from) {
            struct fwd_listed *to = &a->item[a->count++];

            *to = (struct fwd_listed){.len = item->len, .fds = item->fds_n};
            memcpy(to->name, item->name, FWD_NAME);
            for (uint32_t p = 0; p < item->processes; p++) {
                to->pids += item->process[p].fd >= 0;
            }
            for (int k = 0; k < FWD_MAPS; k++) {
                to->keys += item->keys[k].count;
            }
        }
    }
    q->answer_len = offsetof(struct fwd_list, item) + a->count * sizeof a->item[0];
    return 0;
}

int store_delete(struct request *q)
{
    const struct item *item = named(q);

    if (!item) {
        return -EINVAL;
    }
    drop(q->w, item->name);
    return 0;
}

/* ---- Watches ----------------------------------------------------------------------------------------------- */

int store_watch(struct request *q)
{
    struct item *item = named(q);
    struct process *more;

    if (!item) {
        return -EINVAL;
    }
    if (q->fds_n == 0) {
        return refuse(q, EINVAL, "no process to watch for item %s", item->name);
    }
    more = realloc(item->process, (item->processes + (uint32_t)q->fds_n) * sizeof *more);
    if (!more) {
        return refuse(q, ENOMEM, "no memory for the processes of item %s", item->name);
    }
    item->process = more;
    for (int i = 0; i < q->fds_n; i++) {
        struct process *p = &more[item->processes];

        *p = (struct process){.fd = q->fds[i], .number = ++q->w->pids_made};
        if (!program_watch(q->w, p->fd, EPOLLIN, EVENT_PID, p->number)) {
            return refuse(q, errno, "descriptor %d of a process of item %s cannot be waited on", i, item->name);
        }
        q->fds[i] = -1;
        item->processes++;
    }
    return 0;
}

static struct keys *keys_of(struct request *q, struct item *item)
{
    const struct fwd_keys *m = q->message;

    if (m->map >= FWD_MAPS || m->key_size == 0 || m->key_size > 256 || m->count > FWD_KEYS_BYTES / m->key_size ||
        q->len != offsetof(struct fwd_keys, keys) + m->count * m->key_size) {
        refuse(q, EINVAL, "keys of item %s: map below %d, keys of 1 to 256 bytes", item->name, FWD_MAPS);
        return NULL;
    }
    return &item->keys[m->map];
}

/* What these keys are of from now on. */
static int keys_begin(struct request *q, struct keys *k)
{
    const struct fwd_keys *m = q->message;
    struct steer_mem *steer = NULL;
    int err;

    if (steer_mem_is(q->fds[0])) {
        steer = malloc(sizeof *steer);
        err = !steer                                       ? -ENOMEM
              : m->key_size != sizeof(struct classify_key) ? -EINVAL
                                                           : steer_mem_open(steer, q->fds[0]);
        if (err) {
            free(steer);
            return refuse(q, -err, "a file of memory, and no classifier whose keys have %u bytes", m->key_size);
        }
    }
    keys_end(k);
    *k = (struct keys){.map = q->fds[0], .steer = steer, .size = m->key_size};
    q->fds[0] = -1;
    return 0;
}

int store_watch_keys(struct request *q)
{
    const struct fwd_keys *m = q->message;
    struct item *item = named(q);
    struct keys *k = item ? keys_of(q, item) : NULL;
    int err = k && q->fds_n ? keys_begin(q, k) : 0;

    if (!k || err) {
        return k ? err : -EINVAL;
    }
    if (k->map < 0 || k->size != m->key_size) {
        return refuse(q, EINVAL, "map %u of item %s is not known, or its keys have another size", m->map, item->name);
    }
    if (k->count + m->count > k->room) {
        uint32_t room = 2 * (k->count + m->count);
        uint8_t *more = realloc(k->key, (size_t)room * k->size);

        if (!more) {
            return refuse(q, ENOMEM, "no memory for the keys of item %s", item->name);
        }
        k->key = more;
        k->room = room;
    }
    memcpy(k->key + (size_t)k->count * k->size, m->keys, (size_t)m->count * k->size);
    k->count += m->count;
    return 0;
}

int store_forget_keys(struct request *q)
{
    const struct fwd_keys *m = q->message;
    struct item *item = named(q);
    struct keys *k = item ? keys_of(q, item) : NULL;

    if (!k) {
        return -EINVAL;
    }
    for (uint32_t i = 0; i < m->count && k->size == m->key_size; i++) {
        const uint8_t *key = m->keys + (size_t)i * k->size;

        for (uint32_t j = k->count; j-- > 0;) { /* the newest first: connections are short */
            if (memcmp(k->key + (size_t)j * k->size, key, k->size) == 0) {
                memcpy(k->key + (size_t)j * k->size, k->key + (size_t)--k->count * k->size, k->size);
                break;
            }
        }
    }
    return 0;
}

int store_unwatch(struct request *q)
{
    struct item *item = named(q);

    if (!item) {
        return -EINVAL;
    }
    unwatch(q->w, item);
    return 0;
}

int store_watched(struct request *q)
{
    static int alive[FWD_FDS]; /* until it is answered */
    const struct fwd_watched *m = q->message;
    const struct item *item = named(q);
    struct fwd_watched *a = q->answer;
    uint32_t from = m->from, seen = 0;

    if (!item) {
        return -EINVAL;
    }
    memcpy(a->name, item->name, FWD_NAME);
    a->from = from;
    a->count = 0;
    for (uint32_t i = 0; i < item->processes && a->count < FWD_FDS; i++) {
        if (item->process[i].fd >= 0 && seen++ >= from) {
            alive[a->count++] = item->process[i].fd;
        }
    }
    q->answer_len = sizeof *a;
    q->answer_fds = alive;
    q->answer_fds_n = a->count;
    return 0;
}

/* ---- Death ------------------------------------------------------------------------------------------------- */

/* A duplicate keeps a listener listening after its process' death; shutdown(2) ends it. Others have nothing to shut. */
static void stop_listeners(const struct program *w, const char *name)
{
    for (const struct item *item = w->items; item; item = item->next) {
        for (uint32_t i = 0; i < item->fds_n && part_of(item, name); i++) {
            shutdown(item->fds[i], SHUT_RDWR);
        }
    }
}

void store_pid_dead(struct program *w, uint32_t number)
{
    for (struct item *item = w->items; item; item = item->next) {
        uint32_t alive = 0;
        bool ours = false;

        for (uint32_t i = 0; i < item->processes; i++) {
            struct process *p = &item->process[i];

            if (p->number == number && p->fd >= 0) {
                program_unwatch(w, p->fd);
                close(p->fd);
                p->fd = -1;
                ours = true;
            }
            alive += p->fd >= 0;
        }
        if (ours) {
            item->dying = alive == 0;
            if (item->dying) {
                stop_listeners(w, item->name);
                w->work = true;
            }
            return;
        }
    }
}

/* false: somebody else writes there now: try again. Who has ended in order has deleted it. */
static bool key_delete(struct keys *k, const uint8_t *key)
{
    if (k->steer) {
        return classify_endpoint_del(&k->steer->view, (const struct classify_key *)key, false) != -EBUSY;
    }
    map_delete(k->map, key);
    return true;
}

/* Deletes some keys. false: there may be more. */
static bool keys_delete(struct item *item)
{
    uint32_t n = 0;

    for (int i = 0; i < FWD_MAPS; i++) {
        struct keys *k = &item->keys[i];

        while (k->count) {
            if (n++ == PROGRAM_KEYS_A_ROUND || !key_delete(k, k->key + (size_t)(k->count - 1) * k->size)) {
                return false;
            }
            k->count--;
        }
    }
    return true;
}

void store_work(struct program *w)
{
    struct item **at = &w->items;

    w->work = false;
    while (*at) {
        struct fwd_name told = {0};

        if (!(*at)->dying) {
            at = &(*at)->next;
        } else if (!keys_delete(*at)) {
            w->work = true;
            at = &(*at)->next;
        } else {
            memcpy(told.name, (*at)->name, FWD_NAME);
            drop(w, told.name);
            control_tell(w, &told, sizeof told, FWD_DIED);
            control_lonely(w);
            at = &w->items; /* parts may have been anywhere */
        }
    }
}
