/* SPDX-License-Identifier: Apache-2.0 */
/*
 * flow.c - rules of the device (rte_flow), which drop packets or choose their queue before anybody sees them:
 *
 *     packet --rule--> dropped, or to the queues of the rule
 *            `-------> nothing matches: as the port hashes, or all to the queue `rest`
 *
 * Rules come as they were translated (bypass/hwflow/rte.py): a header of a pattern is the bytes of that header, with
 * which DPDK's struct of each item begins. They are exchanged as a whole: all are in force, or none.
 *
 * "The rest" is kept on one queue by the table of the port's hash, and where the driver has no such table by one more
 * rule, behind all others, for every frame.
 * Source: DPDK Programmer's Guide, "Generic flow API (rte_flow)" and "Receive Side Scaling".
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <rte_flow.h>

#include "eth/port.h"

enum { RETA_MAX = RTE_ETH_RSS_RETA_SIZE_512, RETA_GROUPS = RETA_MAX / RTE_ETH_RETA_GROUP_SIZE };

struct port_flows {
    struct rte_flow *flow[DPDK_FLOWS + 1]; /* and the one for the rest */
    uint32_t count;
    bool table_set; /* the hash table is not what it was */
    struct rte_eth_rss_reta_entry64 table[RETA_GROUPS];
};

/* A rule as rte_flow has it. */
struct rule {
    struct rte_flow_attr attr;
    struct rte_flow_item pattern[DPDK_FLOW_ITEMS + 1];
    struct rte_flow_action action[2];
    struct rte_flow_action_queue queue;
    struct rte_flow_action_rss rss;
    /* Larger than any of DPDK's structs of the items used, which begin with the header; the rest of each is 0. */
    _Alignas(8) uint8_t spec[DPDK_FLOW_ITEMS][64], mask[DPDK_FLOW_ITEMS][64];
};
_Static_assert(sizeof(struct rte_flow_item_ipv6) <= 64 && sizeof(struct rte_flow_item_eth) <= 64, "items fit");

/* ---- One rule ---------------------------------------------------------------------------------------------- */
static const struct {
    enum rte_flow_item_type type;
    uint32_t bytes; /* of the header */
} kinds[] = {
    [DPDK_FLOW_ETH] = {RTE_FLOW_ITEM_TYPE_ETH, 14},   [DPDK_FLOW_VLAN] = {RTE_FLOW_ITEM_TYPE_VLAN, 4},
    [DPDK_FLOW_IPV4] = {RTE_FLOW_ITEM_TYPE_IPV4, 20}, [DPDK_FLOW_IPV6] = {RTE_FLOW_ITEM_TYPE_IPV6, 40},
    [DPDK_FLOW_TCP] = {RTE_FLOW_ITEM_TYPE_TCP, 20},   [DPDK_FLOW_UDP] = {RTE_FLOW_ITEM_TYPE_UDP, 8},
};

static bool well_formed(const struct dpdk_port *d, const struct dpdk_flow *f)
{
    if (f->items < 1 || f->items > DPDK_FLOW_ITEMS || f->queues > d->cfg.queues) {
        return false;
    }
    for (uint32_t i = 0; i < f->items; i++) {
        if (f->item[i].kind < DPDK_FLOW_ETH || f->item[i].kind > DPDK_FLOW_UDP) {
            return false;
        }
    }
    for (uint32_t i = 0; i < f->queues; i++) {
        if (f->queue[i] >= d->cfg.queues) {
            return false;
        }
    }
    return true;
}

/* A header of which nothing is compared has neither spec nor mask: not all drivers understand a mask of zeros. */
static void set_items(struct rule *r, const struct dpdk_flow *f)
{
    static const uint8_t nothing[DPDK_FLOW_HEADER];

    for (uint32_t i = 0; i < f->items; i++) {
        const struct dpdk_flow_item *from = &f->item[i];

        r->pattern[i].type = kinds[from->kind].type;
        if (memcmp(from->mask, nothing, kinds[from->kind].bytes) != 0) {
            memcpy(r->spec[i], from->spec, kinds[from->kind].bytes);
            memcpy(r->mask[i], from->mask, kinds[from->kind].bytes);
            r->pattern[i].spec = r->spec[i];
            r->pattern[i].mask = r->mask[i];
        }
    }
    r->pattern[f->items].type = RTE_FLOW_ITEM_TYPE_END;
}

static void set_action(const struct dpdk_port *d, struct rule *r, const struct dpdk_flow *f)
{
    r->action[1].type = RTE_FLOW_ACTION_TYPE_END;
    if (f->queues == 0) {
        r->action[0].type = RTE_FLOW_ACTION_TYPE_DROP;
    } else if (f->queues == 1) {
        r->queue.index = f->queue[0];
        r->action[0] = (struct rte_flow_action){.type = RTE_FLOW_ACTION_TYPE_QUEUE, .conf = &r->queue};
    } else {
        uint64_t hash = RTE_ETH_RSS_IP | RTE_ETH_RSS_TCP | RTE_ETH_RSS_UDP;

        r->rss = (struct rte_flow_action_rss){.func = RTE_ETH_HASH_FUNCTION_DEFAULT,
                                              .types = hash & d->info.flow_type_rss_offloads,
                                              .queue_num = f->queues,
                                              .queue = f->queue};
        r->action[0] = (struct rte_flow_action){.type = RTE_FLOW_ACTION_TYPE_RSS, .conf = &r->rss};
    }
}

static void set_rule(const struct dpdk_port *d, struct rule *r, const struct dpdk_flow *f)
{
    memset(r, 0, sizeof *r);
    r->attr.ingress = 1;
    r->attr.priority = f->priority;
    set_items(r, f);
    set_action(d, r, f);
}

/* What a driver says of a refusal; rte_errno is not always set by it. */
static int told(struct dpdk_error *error, int err, const struct rte_flow_error *why)
{
    const char *said = why->message && *why->message ? why->message : log_why();

    err = err < 0 ? -err : rte_errno ? rte_errno : EIO;
    if (err == ENOSYS) {
        return complain(error, ENOTSUP, "its driver has no rules (rte_flow)");
    }
    said = strcmp(said, strerror(err)) == 0 ? "" : said;
    return complain(error, err, "%s%s%s%s", strerror(err), *said ? " (" : "", said, *said ? ")" : "");
}

static int ask(const struct dpdk_port *d, const struct dpdk_flow *f, struct dpdk_error *error)
{
    struct rule r;
    struct rte_flow_error why = {0};
    int err;

    if (!well_formed(d, f)) {
        return complain(error, EINVAL, "it is no rule");
    }
    set_rule(d, &r, f);
    log_mark();
    err = rte_flow_validate(d->id, &r.attr, r.pattern, r.action, &why);
    return err < 0 ? told(error, err, &why) : 0;
}

static int make(struct dpdk_port *d, const struct dpdk_flow *f, struct dpdk_error *error)
{
    struct rule r;
    struct rte_flow_error why = {0};
    struct rte_flow *made;

    set_rule(d, &r, f);
    log_mark();
    rte_errno = 0;
    made = rte_flow_create(d->id, &r.attr, r.pattern, r.action, &why);
    if (!made) {
        return told(error, 0, &why);
    }
    d->flows->flow[d->flows->count++] = made;
    return 0;
}

/* ---- The rest ---------------------------------------------------------------------------------------------- */

/* 0; -ENOTSUP: the driver has no table. */
static int table_to(struct dpdk_port *d, uint16_t queue)
{
    struct rte_eth_rss_reta_entry64 to[RETA_GROUPS];
    uint16_t size = d->info.reta_size;
    int err;

    if (d->cfg.queues < 2 || !size || size > RETA_MAX) {
        return -ENOTSUP;
    }
    for (size_t g = 0; g < RETA_GROUPS; g++) {
        d->flows->table[g].mask = to[g].mask = UINT64_MAX;
        for (size_t i = 0; i < RTE_ETH_RETA_GROUP_SIZE; i++) {
            to[g].reta[i] = queue;
        }
    }
    err = rte_eth_dev_rss_reta_query(d->id, d->flows->table, size);
    err = err < 0 ? err : rte_eth_dev_rss_reta_update(d->id, to, size);
    d->flows->table_set = err == 0;
    return err == -ENOSYS ? -ENOTSUP : err;
}

static int rest_to(struct dpdk_port *d, uint16_t queue, uint32_t last, struct dpdk_error *error)
{
    struct dpdk_flow f = {.priority = last + 1, .items = 1, .queues = 1};
    int err = table_to(d, queue);

    if (err != -ENOTSUP) {
        return err < 0 ? complain(error, -err, "%s", strerror(-err)) : 0;
    }
    f.item[0].kind = DPDK_FLOW_ETH;
    f.queue[0] = queue;
    return make(d, &f, error);
}

/* ---- All ---------------------------------------------------------------------------------------------------- */

/* Every rule by itself, and then whatever else the driver may have of us. */
void flow_clear(struct dpdk_port *d)
{
    struct port_flows *f = d->flows;
    struct rte_flow_error why;

    if (!f) {
        return;
    }
    if (!d->gone) {
        while (f->count > 0) {
            rte_flow_destroy(d->id, f->flow[--f->count], &why);
        }
        rte_flow_flush(d->id, &why);
        if (f->table_set) {
            rte_eth_dev_rss_reta_update(d->id, f->table, d->info.reta_size);
        }
    }
    free(f);
    d->flows = NULL;
}

static int put(struct dpdk_port *d, const struct dpdk_flow *flow, uint32_t count, int rest, uint32_t *at,
               struct dpdk_error *error)
{
    uint32_t last = 0;

    for (*at = 0; *at < count; ++*at) {
        if (ask(d, &flow[*at], error)) {
            return error->err;
        }
        last = RTE_MAX(last, flow[*at].priority);
    }
    for (*at = 0; *at < count; ++*at) {
        if (make(d, &flow[*at], error)) {
            return error->err;
        }
    }
    return rest < 0 ? 0 : rest_to(d, (uint16_t)rest, last, error);
}

int port_flows(struct dpdk_port *d, const struct dpdk_flow *flow, uint32_t count, int rest, uint32_t *at,
               struct dpdk_error *error)
{
    memset(error, 0, sizeof *error);
    *at = 0;
    if (d->gone) {
        return -complain(error, ENODEV, "the port was removed");
    }
    if (count > DPDK_FLOWS || rest >= (int)d->cfg.queues) {
        return -complain(error, EINVAL, "at most %d rules, and queues that the port has", DPDK_FLOWS);
    }
    flow_clear(d);
    if (count == 0 && rest < 0) {
        return 0;
    }
    d->flows = calloc(1, sizeof *d->flows);
    if (!d->flows) {
        return -complain(error, ENOMEM, "no memory");
    }
    if (put(d, flow, count, rest, at, error)) {
        flow_clear(d);
    }
    return -error->err;
}
