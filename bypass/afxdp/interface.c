/* SPDX-License-Identifier: Apache-2.0 */
/*
 * interface.c - what an AF_XDP device asks about its interface: index, MAC address, MTU, queues, checksums, and the
 * network namespace that it is in. Nothing here needs a privilege but to enter another namespace.
 * Read first: netdevice(7), socket(7), network_namespaces(7).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/ethtool.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <sched.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"

enum { OPT_NETNS_COOKIE = 71 }; /* SO_NETNS_COOKIE, kernel 5.14 */

#define NAMESPACE "/proc/thread-self/ns/net"

/* Receive queues of ifr's interface, through a socket of its network namespace. */
static int count_queues(int fd, struct ifreq *ifr)
{
    struct ethtool_channels ch = {.cmd = ETHTOOL_GCHANNELS};

    ifr->ifr_data = (char *)&ch;
    return ioctl(fd, SIOCETHTOOL, ifr) < 0 ? -errno : (int)(ch.rx_count + ch.combined_count);
}

/* Whether the kernel builds what it sends for this driver of the frame's own pages (IFF_TX_SKB_NO_LINEAR): it does not look
 * at transmit metadata then, and the packet would leave without its sum (net/xdp/xsk.c, xsk_build_skb(); seen with 6.12).
 * The flag is not shown to user space; virtio-net is the driver that has it. */
static bool ignores_metadata(const struct afxdp *d, struct ifreq *ifr)
{
    struct ethtool_drvinfo info = {.cmd = ETHTOOL_GDRVINFO};

    ifr->ifr_data = (char *)&info;
    return ioctl(d->control_fd, SIOCETHTOOL, ifr) == 0 && strcmp(info.driver, "virtio_net") == 0;
}

bool interface_sums(const struct afxdp *d)
{
    struct ethtool_value on = {.cmd = ETHTOOL_GTXCSUM};
    struct ifreq ifr = {.ifr_ifindex = (int)d->ifindex};

    if (afxdp_zerocopy(d) != 0 || ioctl(d->control_fd, SIOCGIFNAME, &ifr) < 0 || ignores_metadata(d, &ifr)) {
        return false;
    }
    ifr.ifr_data = (char *)&on;
    return ioctl(d->control_fd, SIOCETHTOOL, &ifr) == 0 && on.data != 0;
}

int afxdp_interface_queues(const char *ifname)
{
    struct ifreq ifr = {0};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    int ret;

    if (fd < 0) {
        return -errno;
    }
    memcpy(ifr.ifr_name, ifname, strnlen(ifname, IFNAMSIZ - 1));
    ret = count_queues(fd, &ifr);
    close(fd);
    return ret;
}

int afxdp_queues_now(const struct afxdp *d)
{
    struct ifreq ifr = {.ifr_ifindex = (int)d->ifindex};

    if (d->control_fd < 0) {
        return -EXDEV;
    }
    return ioctl(d->control_fd, SIOCGIFNAME, &ifr) < 0 ? -errno : count_queues(d->control_fd, &ifr);
}

void interface_take(struct afxdp *d)
{
    uint32_t room = d->nd.stride - d->rx_off - ETH_HEADER;
    uint16_t mtu = d->st->mtu;

    memcpy(d->nd.mac, d->st->mac, sizeof d->nd.mac);
    d->nd.mtu = (uint16_t)(mtu < room ? mtu : room);
}

/* The interface is found by its index, so that it may be renamed, and through a descriptor of its network namespace, so
 * that the caller may have moved to another one. */
int interface_read(struct afxdp *d)
{
    struct ifreq ifr = {.ifr_ifindex = (int)d->ifindex};
    uint8_t mac[sizeof d->st->mac];

    if (d->control_fd < 0) { /* a view from another namespace: others keep the state up to date */
        interface_take(d);
        return 0;
    }
    if (ioctl(d->control_fd, SIOCGIFNAME, &ifr) < 0 || ioctl(d->control_fd, SIOCGIFHWADDR, &ifr) < 0) {
        return -1;
    }
    memcpy(mac, ifr.ifr_hwaddr.sa_data, sizeof mac);
    if (ioctl(d->control_fd, SIOCGIFMTU, &ifr) < 0) {
        return -1;
    }
    memcpy(d->st->mac, mac, sizeof mac);
    d->st->mtu = (uint16_t)(ifr.ifr_mtu < UINT16_MAX ? ifr.ifr_mtu : UINT16_MAX);
    interface_take(d);
    return 0;
}

int interface_find(struct afxdp *d, const char *ifname)
{
    struct ifreq ifr = {0};

    d->control_fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    d->namespace_fd = open(NAMESPACE, O_RDONLY | O_CLOEXEC);
    memcpy(ifr.ifr_name, ifname, strnlen(ifname, IFNAMSIZ - 1));
    if (d->control_fd < 0 || d->namespace_fd < 0 || ioctl(d->control_fd, SIOCGIFINDEX, &ifr) < 0) {
        return -1;
    }
    d->ifindex = d->st->ifindex = (uint32_t)ifr.ifr_ifindex;
    return interface_read(d);
}

static uint64_t namespace_cookie(int fd)
{
    uint64_t cookie = 0;
    socklen_t len = sizeof cookie;

    return getsockopt(fd, SOL_SOCKET, OPT_NETNS_COOKIE, &cookie, &len) == 0 ? cookie : 0;
}

void interface_attach(struct afxdp *d, int xsk)
{
    uint64_t there = namespace_cookie(xsk); /* 0: the kernel does not tell */

    d->ifindex = d->st->ifindex;
    d->control_fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (d->control_fd >= 0 && (there == 0 || namespace_cookie(d->control_fd) != there)) {
        close(d->control_fd);
        d->control_fd = -1;
    }
    interface_take(d);
}

/* ---- Network namespaces ---------------------------------------------------------------------------------------- */

int namespace_enter(const struct afxdp *d)
{
    int here = open(NAMESPACE, O_RDONLY | O_CLOEXEC);
    struct stat a, b;

    if (here < 0) {
        return -2;
    }
    if (fstat(here, &a) == 0 && fstat(d->namespace_fd, &b) == 0 && a.st_ino == b.st_ino && a.st_dev == b.st_dev) {
        close(here);
        return -1;
    }
    if (setns(d->namespace_fd, CLONE_NEWNET) < 0) {
        int err = errno;

        close(here);
        errno = err;
        return -2;
    }
    return here;
}

void namespace_leave(int back)
{
    if (back >= 0) {
        setns(back, CLONE_NEWNET);
        close(back);
    }
}
