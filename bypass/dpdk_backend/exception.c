/* SPDX-License-Identifier: Apache-2.0 */
/*
 * exception.c - the TAP device of a port: opening it, and frames to and from it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_arp.h>
#include <linux/if_tun.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "dpdk_backend/exception.h"

enum { SECOND = 1000000000, MIN_BURST = 64, BURSTS_A_SECOND = 50, MIN_FRAME = 14 };

/* ---- Opening --------------------------------------------------------------------------------------------- */

__attribute__((format(printf, 3, 4))) static int refuse(struct exception_error *error, int err, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vsnprintf(error->text, sizeof error->text, format, args);
    va_end(args);
    error->err = err;
    return -err;
}

static int open_clone(const char *name, struct exception_error *error)
{
    int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);

    if (fd >= 0) {
        return fd;
    }
    if (errno == ENOENT || errno == ENODEV || errno == ENXIO) {
        return refuse(error, errno,
                      "%s: /dev/net/tun: %s: the exception path is a TAP device: modprobe tun, or mknod /dev/net/tun c "
                      "10 200; or policy backend.exception: none",
                      name, strerror(errno));
    }
    return refuse(error, errno, "%s: /dev/net/tun: %s", name, strerror(errno));
}

static int make_device(int fd, const char *name, struct exception_error *error)
{
    struct ifreq ifr = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_TUN_EXCL};

    snprintf(ifr.ifr_name, sizeof ifr.ifr_name, "%s", name);
    if (ioctl(fd, TUNSETIFF, &ifr) == 0) {
        return 0;
    }
    if (errno == EBUSY || errno == EINVAL) { /* EINVAL: it is no TUN/TAP device */
        return refuse(
            error, EBUSY,
            "%s: a device of this name exists: `interface` of a dpdk policy names the device that is made for "
            "the kernel; choose another name, or remove that one (ip link del %s)",
            name, name);
    }
    if (errno == EPERM) {
        return refuse(error, EPERM, "%s: the kernel's device of the port takes CAP_NET_ADMIN", name);
    }
    return refuse(error, errno, "%s: TUNSETIFF: %s", name, strerror(errno));
}

/* One ioctl of an interface, by a socket of this network namespace. */
static int set(int sock, unsigned long request, struct ifreq *ifr, const char *what, struct exception_error *error)
{
    if (ioctl(sock, request, ifr) == 0) {
        return 0;
    }
    return refuse(error, errno, "%s: the %s cannot be set: %s", ifr->ifr_name, what, strerror(errno));
}

static int dress(int sock, const struct exception_config *cfg, struct exception_error *error)
{
    struct ifreq ifr = {0};
    int err;

    snprintf(ifr.ifr_name, sizeof ifr.ifr_name, "%s", cfg->name);
    ifr.ifr_hwaddr.sa_family = ARPHRD_ETHER;
    memcpy(ifr.ifr_hwaddr.sa_data, cfg->mac, 6);
    err = set(sock, SIOCSIFHWADDR, &ifr, "MAC address", error);
    if (err == 0) {
        ifr.ifr_mtu = cfg->mtu;
        err = set(sock, SIOCSIFMTU, &ifr, "MTU", error);
    }
    if (err == 0) {
        err = set(sock, SIOCGIFFLAGS, &ifr, "state", error);
    }
    if (err == 0) {
        ifr.ifr_flags |= IFF_UP;
        err = set(sock, SIOCSIFFLAGS, &ifr, "state", error);
    }
    return err;
}

void exception_adopt(struct exception_path *e, int fd, uint32_t rate, uint32_t burst)
{
    uint32_t usual = rate / BURSTS_A_SECOND;

    memset(e, 0, sizeof *e);
    e->fd = fd;
    e->rate = rate;
    e->burst = burst ? burst : usual > MIN_BURST ? usual : MIN_BURST;
    e->credit = (uint64_t)e->burst * SECOND;
}

int exception_open(struct exception_path *e, const struct exception_config *cfg, struct exception_error *error)
{
    int fd, sock, err;

    memset(error, 0, sizeof *error);
    exception_adopt(e, -1, cfg->rate, cfg->burst);
    fd = open_clone(cfg->name, error);
    if (fd < 0) {
        return fd;
    }
    err = make_device(fd, cfg->name, error);
    if (err == 0 && cfg->mtu) {
        sock = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
        err =
            sock < 0 ? refuse(error, errno, "%s: no socket: %s", cfg->name, strerror(errno)) : dress(sock, cfg, error);
        if (sock >= 0) {
            close(sock);
        }
    }
    if (err < 0) {
        close(fd);
        return err;
    }
    e->fd = fd;
    return 0;
}

void exception_close(struct exception_path *e)
{
    if (e->fd >= 0) {
        close(e->fd);
        e->fd = -1;
        e->gone = true;
    }
}

/* ---- Frames ---------------------------------------------------------------------------------------------- */

void exception_round(struct exception_path *e, uint64_t now_ns)
{
    uint64_t most = (uint64_t)e->burst * SECOND, passed = now_ns - e->time_ns;

    e->writes = EXCEPTION_WRITES;
    e->reads = EXCEPTION_READS;
    if (e->time_ns == 0 || now_ns < e->time_ns) { /* the first time, or another clock */
        e->time_ns = now_ns;
        return;
    }
    e->time_ns = now_ns;
    /* Where seconds alone fill it the product below might not fit. */
    e->credit = passed / SECOND * e->rate >= e->burst ? most : e->credit + passed * e->rate;
    e->credit = e->credit < most ? e->credit : most;
}

int exception_admit(struct exception_path *e)
{
    if (e->credit < SECOND) {
        e->n.over_rate++;
        return 0;
    }
    e->credit -= SECOND;
    return 1;
}

static bool note_gone(struct exception_path *e)
{
    e->gone |= errno == EBADFD; /* of tun.c: the descriptor has no device any more */
    return e->gone;
}

int exception_write(struct exception_path *e, const void *frame, size_t len)
{
    ssize_t done;

    if (e->writes == 0) {
        return EXCEPTION_LATER;
    }
    e->writes--;
    done = write(e->fd, frame, len);
    if (done >= 0) {
        e->n.passed++;
        e->n.passed_bytes += len;
        return EXCEPTION_PASSED;
    }
    if (errno == EAGAIN || errno == EINTR || errno == ENOBUFS) {
        return EXCEPTION_LATER;
    }
    (void)note_gone(e);
    e->n.errors++; /* EIO: the device is down; EINVAL: no Ethernet frame */
    return EXCEPTION_LOST;
}

size_t exception_read(struct exception_path *e, void *buf, size_t size)
{
    char beyond; /* the kernel cuts what does not fit without saying so */
    struct iovec parts[] = {{buf, size}, {&beyond, sizeof beyond}};

    while (e->reads > 0) {
        ssize_t got = readv(e->fd, parts, 2);

        e->reads--;
        if (got < 0 && (note_gone(e) || errno == EAGAIN || errno == EINTR)) {
            return 0;
        }
        if (got >= MIN_FRAME && (size_t)got <= size) {
            e->n.from_kernel++;
            e->n.from_kernel_bytes += (uint64_t)got;
            return (size_t)got;
        }
        e->n.read_errors++;
    }
    return 0;
}

int exception_skip(struct exception_path *e)
{
    char head[MIN_FRAME];

    if (e->reads == 0) {
        return 0;
    }
    e->reads--;
    return read(e->fd, head, sizeof head) >= 0 || (!note_gone(e) && errno != EAGAIN && errno != EINTR);
}

int exception_carrier(struct exception_path *e, int up) { return ioctl(e->fd, TUNSETCARRIER, &up) == 0 ? 0 : -errno; }
