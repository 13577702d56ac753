/* SPDX-License-Identifier: Apache-2.0 */
/*
 * claim.c - one owner of a kernel's interface below a port.
 *
 * Any number of processes may read an interface by AF_PACKET, and each gets every frame: two stacks with the same port
 * would both answer, and reset each other's connections. So the owner listens at an abstract socket of the interface's
 * number, in its network namespace, which ends with the process however that ends (unix(7)). Anybody may listen at such a
 * name; one of a user who could not open the port is not believed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "eth/port.h"

static socklen_t address_of(uint32_t if_index, struct sockaddr_un *a)
{
    int n;

    *a = (struct sockaddr_un){.sun_family = AF_UNIX};
    n = snprintf(a->sun_path + 1, sizeof a->sun_path - 1, "bypass/port/%u", if_index);
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)n);
}

/* The process that listens there, if its user is root or ours; 0: nobody does, or somebody else. */
static pid_t owner(const struct sockaddr_un *a, socklen_t len)
{
    struct ucred who = {0};
    socklen_t size = sizeof who;
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    if (fd >= 0 && connect(fd, (const struct sockaddr *)a, len) == 0) {
        getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &size);
    }
    if (fd >= 0) {
        close(fd);
    }
    return who.uid == 0 || who.uid == geteuid() ? who.pid : 0;
}

int claim_take(struct dpdk_port *d, struct dpdk_error *error)
{
    struct sockaddr_un a;
    socklen_t len = address_of(d->info.if_index, &a);
    pid_t other;

    if (!device_is_af_packet(d->name) || !d->info.if_index) {
        return 0;
    }
    d->claim_fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (d->claim_fd < 0) {
        return complain(error, errno, "%s: no socket: %s", d->cfg.device, strerror(errno));
    }
    if (bind(d->claim_fd, (const struct sockaddr *)&a, len) == 0 && listen(d->claim_fd, 8) == 0) {
        return 0;
    }
    other = owner(&a, len);
    return other
               ? complain(error, EBUSY, "%s: process %d has this port already: end it first", d->cfg.device, (int)other)
               : 0;
}

void claim_drop(struct dpdk_port *d)
{
    if (d->claim_fd >= 0) {
        close(d->claim_fd);
    }
}
