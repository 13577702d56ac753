/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dial.c - a connection to the broker, if it is one to be believed: it gives this process its memory and its rules, and is
 * told the token of the application. Anybody may listen at an abstract name (unix(7)) while no broker does; there it has to
 * be root's, this user's, or of the user whose broker it was before. A path is as safe as its directory.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stddef.h>
#include <string.h>
#include <sys/un.h>
#include <unistd.h>

#include "preload.h"

static uid_t known; /* root, or whose the broker was at first */

static bool believed(int fd, const char *path)
{
    struct ucred peer;
    socklen_t len = sizeof peer;

    if (path[0] != '@') {
        return true;
    }
    if (real.getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len) < 0) {
        return false;
    }
    if (peer.uid != 0 && peer.uid != known && peer.uid != geteuid()) {
        snprintf(me.refused, sizeof me.refused, "%s is user %u's, neither root's nor this user's", path, peer.uid);
        return false;
    }
    known = peer.uid;
    return true;
}

static int dial_socket(const char *path, bool wait)
{
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    size_t len = strlen(path);
    int fd, err;

    if (len == 0 || len >= sizeof sa.sun_path) {
        return -EINVAL;
    }
    memcpy(sa.sun_path, path, len);
    if (path[0] == '@') {
        sa.sun_path[0] = 0;
    }
    fd = fd_hide(real.socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | (wait ? 0 : SOCK_NONBLOCK), 0));
    if (fd < 0) {
        return -errno;
    }
    if (real.connect(fd, (struct sockaddr *)&sa, (socklen_t)(offsetof(struct sockaddr_un, sun_path) + len)) < 0) {
        err = errno;
        fd_unhide(fd);
        return -err;
    }
    if (!wait) {
        real.fcntl(fd, F_SETFL, 0);
    }
    return fd;
}

int dial(const char *path, bool wait)
{
    int fd = dial_socket(path, wait);

    if (fd < 0) {
        snprintf(me.refused, sizeof me.refused, "no broker at %s: %s (`bypass up` starts one)", *path ? path : "(none)",
                 strerror(-fd));
        return fd;
    }
    if (!believed(fd, path)) {
        fd_unhide(fd);
        return -EACCES;
    }
    return fd;
}
