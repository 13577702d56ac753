/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rte_flow_shim.c - preloaded in front of DPDK: a port whose hardware has rules. It takes what a driver takes (the very
 * structs), writes each call as a line to the file BYPASS_FLOWS, and refuses where it is told to:
 *   BYPASS_FLOWS_ROOM=N   the Nth rule and those behind it do not fit (create: ENOSPC)
 *   BYPASS_FLOWS_NO=drop  rules of this action are not supported (validate: ENOTSUP)
 *   BYPASS_FLOWS_TABLE=1  the port has a hash table of 128 entries
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <rte_errno.h>
#include <rte_ethdev.h>
#include <rte_flow.h>

static unsigned made;
static uint16_t table[128];

static void hex(FILE *f, const void *bytes, size_t n)
{
    for (size_t i = 0; bytes && i < n; i++) {
        fprintf(f, "%02x", ((const unsigned char *)bytes)[i]);
    }
}

static FILE *line(void) { return fopen(getenv("BYPASS_FLOWS"), "a"); }

static size_t bytes_of(enum rte_flow_item_type type)
{
    switch (type) {
    case RTE_FLOW_ITEM_TYPE_ETH:
        return 14;
    case RTE_FLOW_ITEM_TYPE_VLAN:
        return 4;
    case RTE_FLOW_ITEM_TYPE_IPV4:
        return 20;
    case RTE_FLOW_ITEM_TYPE_IPV6:
        return 40;
    case RTE_FLOW_ITEM_TYPE_TCP:
        return 20;
    case RTE_FLOW_ITEM_TYPE_UDP:
        return 8;
    default:
        return 0;
    }
}

static const char *name_of(const struct rte_flow_action *a)
{
    return a->type == RTE_FLOW_ACTION_TYPE_DROP ? "drop" : a->type == RTE_FLOW_ACTION_TYPE_QUEUE ? "queue" : "rss";
}

static void write_rule(const struct rte_flow_attr *attr, const struct rte_flow_item *p, const struct rte_flow_action *a)
{
    FILE *f = line();

    fprintf(f, "create %u", attr->priority);
    for (; p->type != RTE_FLOW_ITEM_TYPE_END; p++) {
        fprintf(f, " %d:", p->type);
        hex(f, p->spec, bytes_of(p->type));
        fprintf(f, "/");
        hex(f, p->mask, bytes_of(p->type));
    }
    fprintf(f, " %s", name_of(a));
    if (a->type == RTE_FLOW_ACTION_TYPE_QUEUE) {
        fprintf(f, " %u", ((const struct rte_flow_action_queue *)a->conf)->index);
    }
    if (a->type == RTE_FLOW_ACTION_TYPE_RSS) {
        const struct rte_flow_action_rss *rss = a->conf;

        for (uint32_t i = 0; i < rss->queue_num; i++) {
            fprintf(f, " %u", rss->queue[i]);
        }
    }
    fprintf(f, "\n");
    fclose(f);
}

int rte_flow_validate(uint16_t port, const struct rte_flow_attr *attr, const struct rte_flow_item pattern[],
                      const struct rte_flow_action actions[], struct rte_flow_error *error)
{
    const char *no = getenv("BYPASS_FLOWS_NO");

    (void)port;
    if (attr->ingress != 1 || actions[1].type != RTE_FLOW_ACTION_TYPE_END ||
        pattern[0].type != RTE_FLOW_ITEM_TYPE_ETH) {
        return rte_flow_error_set(error, EINVAL, RTE_FLOW_ERROR_TYPE_UNSPECIFIED, NULL, "not what is expected");
    }
    if (no && strcmp(no, name_of(&actions[0])) == 0) {
        return rte_flow_error_set(error, ENOTSUP, RTE_FLOW_ERROR_TYPE_ACTION, NULL, "no such action here");
    }
    return 0;
}

struct rte_flow *rte_flow_create(uint16_t port, const struct rte_flow_attr *attr, const struct rte_flow_item pattern[],
                                 const struct rte_flow_action actions[], struct rte_flow_error *error)
{
    const char *room = getenv("BYPASS_FLOWS_ROOM");

    (void)port;
    if (room && made + 1 >= (unsigned)atoi(room)) {
        rte_flow_error_set(error, ENOSPC, RTE_FLOW_ERROR_TYPE_HANDLE, NULL, "table full");
        return NULL;
    }
    made++;
    write_rule(attr, pattern, actions);
    return (struct rte_flow *)(uintptr_t)made;
}

int rte_flow_destroy(uint16_t port, struct rte_flow *flow, struct rte_flow_error *error)
{
    FILE *f = line();

    (void)port, (void)error;
    fprintf(f, "destroy %u\n", (unsigned)(uintptr_t)flow);
    fclose(f);
    made--;
    return 0;
}

int rte_flow_flush(uint16_t port, struct rte_flow_error *error)
{
    (void)port, (void)error;
    return 0;
}

/* ---- The hash table: rte_eth_dev_info_get() is the real one's but for its size ----------------------------------- */
int rte_eth_dev_rss_reta_query(uint16_t port, struct rte_eth_rss_reta_entry64 *conf, uint16_t size)
{
    (void)port;
    for (uint16_t i = 0; i < size; i++) {
        conf[i / 64].reta[i % 64] = (uint16_t)(table[i] + i % 2); /* as it hashes over two queues */
    }
    return getenv("BYPASS_FLOWS_TABLE") ? 0 : -ENOTSUP;
}

int rte_eth_dev_rss_reta_update(uint16_t port, struct rte_eth_rss_reta_entry64 *conf, uint16_t size)
{
    FILE *f = line();
    unsigned queues = 0;

    (void)port;
    for (uint16_t i = 0; i < size; i++) {
        if (!(conf[i / 64].mask >> i % 64 & 1)) {
            queues = 99;
        }
        queues |= 1u << conf[i / 64].reta[i % 64];
    }
    fprintf(f, "table %u entries, queues %#x\n", size, queues);
    fclose(f);
    return 0;
}
