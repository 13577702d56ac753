/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ethtool_nic.c - preloaded in front of the kernel: the interface BYPASS_NIC_IFNAME has a table of rules, a hash table and
 * ntuple filters, as ethtool's ioctls show them. Its state is the file BYPASS_NIC (struct nic, nic_support.py), so that it
 * outlives processes as a NIC does. What else is asked, the kernel answers.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/ethtool.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { ROOM = 32, ENTRIES = 8 };

struct nic {
    uint32_t rings, room, flags;
    uint32_t changes; /* so far */
    uint32_t refuses; /* the how manieth change is refused (ENOSPC); 0: none */
    uint32_t table[ENTRIES];
    uint32_t used[ROOM];
    uint64_t cookie[ROOM]; /* of a rule: where to */
    uint16_t port[ROOM];   /* its destination port, 0: any */
};

static struct nic *nic_of(const char *ifname)
{
    static struct nic *nic;
    const char *name = getenv("BYPASS_NIC_IFNAME"), *path = getenv("BYPASS_NIC");

    if (!name || !path || strncmp(ifname, name, IFNAMSIZ) != 0) {
        return NULL;
    }
    if (!nic) {
        int fd = open(path, O_RDWR | O_CLOEXEC);

        nic = mmap(NULL, sizeof *nic, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        close(fd);
        nic = nic == MAP_FAILED ? NULL : nic;
    }
    return nic;
}

static int refused(struct nic *n)
{
    if (++n->changes == n->refuses) {
        errno = ENOSPC;
        return -1;
    }
    return 0;
}

static int rules(struct nic *n, struct ethtool_rxnfc *q)
{
    uint32_t at = q->fs.location, found = 0;

    switch (q->cmd) {
    case ETHTOOL_GRXCLSRLCNT:
    case ETHTOOL_GRXCLSRLALL:
        for (uint32_t i = 0; i < n->room; i++) {
            if (n->used[i] && q->cmd == ETHTOOL_GRXCLSRLALL) {
                q->rule_locs[found] = i;
            }
            found += n->used[i];
        }
        q->rule_cnt = found;
        q->data = n->room;
        return 0;
    case ETHTOOL_SRXCLSRLINS:
        if (refused(n) < 0) {
            return -1;
        }
        if (at >= n->room || n->used[at] || (q->fs.ring_cookie != RX_CLS_FLOW_DISC && q->fs.ring_cookie >= n->rings)) {
            errno = EINVAL;
            return -1;
        }
        n->used[at] = 1;
        n->cookie[at] = q->fs.ring_cookie;
        n->port[at] = (uint16_t)(q->fs.h_u.tcp_ip4_spec.pdst >> 8 | q->fs.h_u.tcp_ip4_spec.pdst << 8);
        return 0;
    default:
        if (refused(n) < 0) {
            return -1;
        }
        if (at >= n->room || !n->used[at]) {
            errno = ENOENT;
            return -1;
        }
        n->used[at] = 0;
        return 0;
    }
}

static int table(struct nic *n, struct ethtool_rxfh *q)
{
    if (q->cmd == ETHTOOL_GRSSH) {
        if (q->indir_size == ENTRIES) {
            memcpy(q->rss_config, n->table, sizeof n->table);
        }
        q->indir_size = ENTRIES;
        q->key_size = 0;
        return 0;
    }
    if (refused(n) < 0) {
        return -1;
    }
    if (q->rss_context || q->indir_size != ENTRIES) {
        errno = EOPNOTSUPP;
        return -1;
    }
    memcpy(n->table, q->rss_config, sizeof n->table);
    return 0;
}

static int asked(struct nic *n, void *data)
{
    struct ethtool_value *value = data;

    switch (value->cmd) {
    case ETHTOOL_GFLAGS:
        value->data = n->flags;
        return 0;
    case ETHTOOL_SFLAGS:
        if (refused(n) < 0) {
            return -1;
        }
        n->flags = value->data;
        return 0;
    case ETHTOOL_GRXRINGS:
        ((struct ethtool_rxnfc *)data)->data = n->rings;
        return 0;
    case ETHTOOL_GRXCLSRLCNT:
    case ETHTOOL_GRXCLSRLALL:
    case ETHTOOL_SRXCLSRLINS:
    case ETHTOOL_SRXCLSRLDEL:
        return rules(n, data);
    case ETHTOOL_GRSSH:
    case ETHTOOL_SRSSH:
        return table(n, data);
    default:
        return 1;
    }
}

int ioctl(int fd, unsigned long request, ...)
{
    static int (*kernel)(int fd, unsigned long request, ...);
    struct nic *n = NULL;
    struct ifreq *ifr;
    va_list args;
    int done = 1;

    va_start(args, request);
    ifr = va_arg(args, struct ifreq *);
    va_end(args);
    if (!kernel) {
        *(void **)&kernel = dlsym(RTLD_NEXT, "ioctl");
    }
    if (request == SIOCETHTOOL) {
        n = nic_of(ifr->ifr_name);
        done = n ? asked(n, ifr->ifr_data) : 1;
    }
    return done > 0 ? kernel(fd, request, ifr) : done;
}
