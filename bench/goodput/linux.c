/* SPDX-License-Identifier: Apache-2.0 */
/*
 * linux.c - the kernel's TCP as a host: a network namespace without a name, a TAP device without offloads (no
 * virtio-net header, so the kernel cuts segments and completes checksums before we read them), ordinary sockets. All
 * of it ends with the process. tun.rst of the kernel's documentation; tcp(7).
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <netinet/in.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "goodput.h"

enum { TX_QUEUE = 10000 }; /* frames: a whole window may be sent at once, before we read */
static const char IFNAME[] = "wire";

struct linux_host {
    struct host host;
    int ns, tap;
};

static struct linux_host *self(struct host *h) { return (struct linux_host *)h; }

/* ---- Creation ----------------------------------------------------------------------------------------------- */
static void sysctl_write(const char *path, const char *value)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, value, strlen(value)) < 0)
        die(path, -errno);
    close(fd);
}

static struct ifreq request(void)
{
    struct ifreq r = {0};
    memcpy(r.ifr_name, IFNAME, sizeof IFNAME);
    return r;
}

static void set_address(int fd, unsigned long what, uint32_t ip)
{
    struct ifreq r = request();
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(ip)};
    memcpy(&r.ifr_addr, &a, sizeof a);
    if (ioctl(fd, what, &r) < 0)
        die("address of the TAP device", -errno);
}

static void configure(int number)
{
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct ifreq r = request();
    r.ifr_hwaddr.sa_family = ARPHRD_ETHER;
    host_mac(number, (uint8_t *)r.ifr_hwaddr.sa_data);
    if (fd < 0 || ioctl(fd, SIOCSIFHWADDR, &r) < 0)
        die("MAC of the TAP device", -errno);
    r.ifr_mtu = MTU;
    if (ioctl(fd, SIOCSIFMTU, &r) < 0)
        die("MTU of the TAP device", -errno);
    r.ifr_qlen = TX_QUEUE;
    if (ioctl(fd, SIOCSIFTXQLEN, &r) < 0)
        die("queue of the TAP device", -errno);
    set_address(fd, SIOCSIFADDR, host_ip(number));
    set_address(fd, SIOCSIFNETMASK, 0xffffff00);
    r.ifr_flags = IFF_UP | IFF_RUNNING;
    if (ioctl(fd, SIOCSIFFLAGS, &r) < 0)
        die("TAP device up", -errno);
    for (int other = 1; other < HOSTS; other++) { /* nobody asks by ARP: its loss would be measured too */
        struct arpreq arp = {.arp_flags = ATF_PERM | ATF_COM, .arp_ha.sa_family = ARPHRD_ETHER};
        struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(host_ip(other))};
        memcpy(&arp.arp_pa, &a, sizeof a);
        memcpy(arp.arp_dev, IFNAME, sizeof IFNAME);
        host_mac(other, (uint8_t *)arp.arp_ha.sa_data);
        if (other != number && ioctl(fd, SIOCSARP, &arp) < 0)
            die("neighbour of the TAP device", -errno);
    }
    close(fd);
}

/* The kernel's defaults, but: buffers may grow as far as the largest queue here needs, no connection learns from
 * the one before it, no IPv6. */
static void tune(void)
{
    sysctl_write("/proc/sys/net/ipv4/tcp_rmem", "4096 131072 33554432");
    sysctl_write("/proc/sys/net/ipv4/tcp_wmem", "4096 16384 33554432");
    sysctl_write("/proc/sys/net/ipv4/tcp_no_metrics_save", "1");
    sysctl_write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1");
    sysctl_write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
}

/* ---- Frames ------------------------------------------------------------------------------------------------- */
static void linux_deliver(struct host *h, const uint8_t *frame, uint32_t len)
{
    if (write(self(h)->tap, frame, len) < 0)
        die("write to the TAP device", -errno);
}

static void linux_run(struct host *h)
{
    uint8_t frame[65536];
    ssize_t n;
    while ((n = read(self(h)->tap, frame, sizeof frame)) > 0)
        host_out(h, frame, (uint32_t)n);
    if (n < 0 && errno != EAGAIN)
        die("read from the TAP device", -errno);
}

static uint64_t linux_next_ns(const struct host *h)
{
    (void)h;
    return NEVER;
}

/* ---- Sockets ------------------------------------------------------------------------------------------------ */
static int64_t watch(struct host *h, int fd, uint32_t events, uint64_t tag)
{
    struct epoll_event e = {.events = events, .data.u64 = tag};
    return epoll_ctl(h->bench->epoll, EPOLL_CTL_ADD, fd, &e) < 0 ? -errno : fd;
}

static int new_socket(struct host *h)
{
    if (setns(self(h)->ns, CLONE_NEWNET) < 0)
        die("setns", -errno);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        die("socket", -errno);
    return fd;
}

static int64_t linux_listen(struct host *h, uint16_t port, uint64_t tag)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port)};
    int fd = new_socket(h);
    if (bind(fd, (struct sockaddr *)&a, sizeof a) < 0 || listen(fd, 16) < 0)
        return -errno;
    return watch(h, fd, EPOLLIN, tag);
}

static int64_t linux_connect(struct host *h, int to, uint16_t port, const char *cc, uint64_t tag)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(host_ip(to))};
    int fd = new_socket(h);
    if (setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, cc, (socklen_t)strlen(cc)) < 0)
        return -errno;
    if (connect(fd, (struct sockaddr *)&a, sizeof a) < 0 && errno != EINPROGRESS)
        return -errno;
    return watch(h, fd, EPOLLOUT, tag);
}

static int64_t linux_accept(struct host *h, int64_t listener, uint64_t tag)
{
    int fd = accept4((int)listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    return fd < 0 ? -errno : watch(h, fd, EPOLLIN, tag);
}

static int64_t linux_send(struct host *h, int64_t sock, const void *buf, size_t n)
{
    (void)h;
    ssize_t done = send((int)sock, buf, n, MSG_NOSIGNAL);
    return done < 0 ? -errno : done;
}

static int64_t linux_recv(struct host *h, int64_t sock, void *buf, size_t n)
{
    (void)h;
    ssize_t done = recv((int)sock, buf, n, 0);
    return done < 0 ? -errno : done;
}

static void linux_close(struct host *h, int64_t sock)
{
    (void)h;
    close((int)sock);
}

static void linux_info(struct host *h, int64_t sock, struct tcp_info *out)
{
    socklen_t len = sizeof *out;
    (void)h;
    if (getsockopt((int)sock, IPPROTO_TCP, TCP_INFO, out, &len) < 0)
        die("TCP_INFO", -errno);
}

/* What the device dropped because we did not read in time would not be the wire's doing. */
static void linux_end(struct host *h)
{
    char line[512];
    unsigned long long rx_dropped = 1, tx_dropped = 1;
    if (setns(self(h)->ns, CLONE_NEWNET) < 0)
        die("setns", -errno);
    FILE *f = fopen("/proc/thread-self/net/dev", "r");
    while (f && fgets(line, sizeof line, f)) {
        const char *at = strstr(line, IFNAME);
        if (at)
            sscanf(at + sizeof IFNAME, "%*u %*u %*u %llu %*u %*u %*u %*u %*u %*u %*u %llu", &rx_dropped, &tx_dropped);
    }
    if (f)
        fclose(f);
    if (rx_dropped || tx_dropped)
        die("the TAP device dropped frames", 0);
}

struct host *linux_create(struct bench *b, int number)
{
    static const struct host_ops ops = {
        .deliver = linux_deliver,
        .run = linux_run,
        .next_ns = linux_next_ns,
        .listen = linux_listen,
        .connect = linux_connect,
        .accept = linux_accept,
        .send = linux_send,
        .recv = linux_recv,
        .close = linux_close,
        .info = linux_info,
        .end = linux_end,
    };
    struct linux_host *l = calloc(1, sizeof *l);
    struct ifreq r = request();
    r.ifr_flags = IFF_TAP | IFF_NO_PI;
    if (!l || unshare(CLONE_NEWNET) < 0)
        die("network namespace", l ? -errno : -ENOMEM);
    l->host = (struct host){.ops = &ops, .bench = b, .number = number};
    l->ns = open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC);
    l->tap = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (l->ns < 0 || l->tap < 0 || ioctl(l->tap, TUNSETIFF, &r) < 0 || ioctl(l->tap, TUNSETOFFLOAD, 0) < 0)
        die("TAP device", -errno);
    tune();
    configure(number);
    int64_t err = watch(&l->host, l->tap, EPOLLIN, (uint64_t)number);
    if (err < 0)
        die("epoll", err);
    return &l->host;
}
