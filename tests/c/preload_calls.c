/* SPDX-License-Identifier: Apache-2.0 */
/* The calls of the agent: each does one call of POSIX or Linux and prints what came of it. See preload_agent.c. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "preload_agent.h"

#include <linux/sockios.h>

enum { BLOCK = 1 << 20, MANY = 8 };

static _Thread_local uint8_t block[BLOCK];

/* ---- Data and addresses ---- */
static void seeded(uint8_t *p, size_t n, long seed)
{
    for (size_t i = 0; i < n; i++)
        p[i] = (uint8_t)((size_t)seed + i * 7 + (i >> 8));
}

static uint32_t digest(const uint8_t *p, size_t n)
{
    uint32_t h = 2166136261u; /* FNV-1a */
    for (size_t i = 0; i < n; i++)
        h = (h ^ p[i]) * 16777619u;
    return h;
}

static void data(struct answer *out, const uint8_t *p, long n)
{
    if (n > 0)
        answer_add(out, " data=%08x", digest(p, (size_t)n));
}

static size_t clamp(long n) { return n < 0 ? 0 : n > BLOCK ? BLOCK : (size_t)n; }

/* host 0: 127.0.0.1; 1: any address; 2: no address family, which dissolves a connection. */
static struct sockaddr_in address(long host, long port)
{
    struct sockaddr_in a = {.sin_family = host == 2 ? AF_UNSPEC : AF_INET, .sin_port = htons((uint16_t)port)};
    a.sin_addr.s_addr = htonl(host == 0 ? INADDR_LOOPBACK : INADDR_ANY);
    return a;
}

static void named(struct answer *out, const char *what, const struct sockaddr_in *a, socklen_t len)
{
    if (len == 0)
        answer_add(out, " %s=none", what);
    else if (a->sin_family != AF_INET)
        answer_add(out, " %s=family%d", what, a->sin_family);
    else
        answer_add(out, " %s=%s:%d", what, inet_ntoa(a->sin_addr), ntohs(a->sin_port));
}

/* ---- Sockets ---- */
static long do_socket(const long *a, struct answer *out)
{
    (void)out;
    return socket((int)a[0], (int)a[1], (int)a[2]);
}

static long do_bind(const long *a, struct answer *out)
{
    (void)out;
    struct sockaddr_in to = address(a[1], a[2]);
    return bind((int)a[0], (struct sockaddr *)&to, sizeof(to));
}

static long do_connect(const long *a, struct answer *out)
{
    (void)out;
    struct sockaddr_in to = address(a[1], a[2]);
    return connect((int)a[0], (struct sockaddr *)&to, sizeof(to));
}

static long do_listen(const long *a, struct answer *out)
{
    (void)out;
    return listen((int)a[0], (int)a[1]);
}

static long do_accept(const long *a, struct answer *out)
{
    struct sockaddr_in from = {0};
    socklen_t len = sizeof(from);
    long fd = accept((int)a[0], (struct sockaddr *)&from, &len);
    if (fd >= 0)
        named(out, "from", &from, len);
    return fd;
}

static long do_accept4(const long *a, struct answer *out)
{
    (void)out;
    return accept4((int)a[0], NULL, NULL, (int)a[1]);
}

static long do_shutdown(const long *a, struct answer *out)
{
    (void)out;
    return shutdown((int)a[0], (int)a[1]);
}

static long do_getsockname(const long *a, struct answer *out)
{
    struct sockaddr_in name = {0};
    socklen_t len = sizeof(name);
    long r = getsockname((int)a[0], (struct sockaddr *)&name, &len);
    if (r == 0)
        named(out, "name", &name, len);
    return r;
}

static long do_getpeername(const long *a, struct answer *out)
{
    struct sockaddr_in name = {0};
    socklen_t len = sizeof(name);
    long r = getpeername((int)a[0], (struct sockaddr *)&name, &len);
    if (r == 0)
        named(out, "peer", &name, len);
    return r;
}

static long do_setsockopt(const long *a, struct answer *out)
{
    (void)out;
    int value = (int)a[3];
    return setsockopt((int)a[0], (int)a[1], (int)a[2], &value, sizeof(value));
}

static long do_getsockopt(const long *a, struct answer *out)
{
    int value = 0;
    socklen_t len = sizeof(value);
    long r = getsockopt((int)a[0], (int)a[1], (int)a[2], &value, &len);
    if (r == 0)
        answer_add(out, " value=%d len=%u", value, len);
    return r;
}

static long do_linger(const long *a, struct answer *out)
{
    (void)out;
    struct linger l = {.l_onoff = (int)a[1], .l_linger = (int)a[2]};
    return setsockopt((int)a[0], SOL_SOCKET, SO_LINGER, &l, sizeof(l));
}

static long do_timeout(const long *a, struct answer *out)
{
    (void)out;
    struct timeval t = {.tv_sec = a[1] / 1000, .tv_usec = a[1] % 1000 * 1000};
    return setsockopt((int)a[0], SOL_SOCKET, SO_RCVTIMEO, &t, sizeof(t));
}

/* ---- Descriptors ---- */
static long do_close(const long *a, struct answer *out)
{
    (void)out;
    return close((int)a[0]);
}

static long do_close_range(const long *a, struct answer *out)
{
    (void)out;
    return close_range((unsigned)a[0], (unsigned)a[1], (int)a[2]);
}

static long do_dup(const long *a, struct answer *out)
{
    (void)out;
    return dup((int)a[0]);
}

static long do_dup2(const long *a, struct answer *out)
{
    (void)out;
    return dup2((int)a[0], (int)a[1]);
}

static long do_dup3(const long *a, struct answer *out)
{
    (void)out;
    return dup3((int)a[0], (int)a[1], (int)a[2]);
}

static long do_fcntl(const long *a, struct answer *out)
{
    (void)out;
    return fcntl((int)a[0], (int)a[1], a[2]);
}

static long do_ioctl(const long *a, struct answer *out)
{
    int value = (int)a[2];
    long r = ioctl((int)a[0], (unsigned long)a[1], &value);
    if (r == 0 && a[1] != FIONBIO)
        answer_add(out, " value=%d", value);
    return r;
}

/* ---- Bytes out ---- */
static long do_write(const long *a, struct answer *out)
{
    (void)out;
    seeded(block, clamp(a[1]), a[2]);
    return write((int)a[0], block, clamp(a[1]));
}

static long do_writev(const long *a, struct answer *out)
{
    (void)out;
    size_t n = clamp(a[1]);
    seeded(block, n, a[2]);
    struct iovec v[3] = {{block, n / 3}, {block, 0}, {block + n / 3, n - n / 3}};
    return writev((int)a[0], v, 3);
}

static long do_send(const long *a, struct answer *out)
{
    (void)out;
    seeded(block, clamp(a[1]), a[3]);
    return send((int)a[0], block, clamp(a[1]), (int)a[2]);
}

static long do_sendto(const long *a, struct answer *out)
{
    (void)out;
    struct sockaddr_in to = address(a[4], a[5]);
    seeded(block, clamp(a[1]), a[3]);
    return sendto((int)a[0], block, clamp(a[1]), (int)a[2], (struct sockaddr *)&to, sizeof(to));
}

static long do_sendmsg(const long *a, struct answer *out)
{
    (void)out;
    size_t n = clamp(a[1]);
    seeded(block, n, a[3]);
    struct iovec v[2] = {{block, n / 2}, {block + n / 2, n - n / 2}};
    struct msghdr m = {.msg_iov = v, .msg_iovlen = 2};
    return sendmsg((int)a[0], &m, (int)a[2]);
}

static void several(struct mmsghdr *m, struct iovec *v, size_t each)
{
    for (size_t i = 0; i < MANY; i++) {
        v[i] = (struct iovec){block + i * each, each};
        m[i] = (struct mmsghdr){.msg_hdr = {.msg_iov = &v[i], .msg_iovlen = 1}};
    }
}

static long do_sendmmsg(const long *a, struct answer *out)
{
    struct mmsghdr m[MANY];
    struct iovec v[MANY];
    seeded(block, BLOCK, a[4]);
    several(m, v, clamp(a[2]) / MANY);
    long n = sendmmsg((int)a[0], m, (unsigned)a[1] % (MANY + 1), (int)a[3]);
    for (long i = 0; i < n; i++)
        answer_add(out, " %u", m[i].msg_len);
    return n;
}

static long do_sendfile(const long *a, struct answer *out)
{
    off_t at = a[2];
    long n = sendfile((int)a[0], (int)a[1], a[2] < 0 ? NULL : &at, clamp(a[3]));
    answer_add(out, " at=%ld", (long)at);
    return n;
}

static long do_splice(const long *a, struct answer *out)
{
    (void)out;
    return splice((int)a[0], NULL, (int)a[1], NULL, clamp(a[2]), SPLICE_F_NONBLOCK);
}

/* Sends until there is no room, without waiting: how many bytes. */
static long do_flood(const long *a, struct answer *out)
{
    long sum = 0, n;
    seeded(block, 65536, a[1]);
    while ((n = send((int)a[0], block, 65536, MSG_DONTWAIT | MSG_NOSIGNAL)) > 0)
        sum += n;
    answer_add(out, " bytes=%ld", sum);
    return n;
}

/* Reads and forgets all that is there, without waiting: how many bytes. */
static long do_drain(const long *a, struct answer *out)
{
    long sum = 0, n;
    while ((n = read((int)a[0], block, BLOCK)) > 0)
        sum += n;
    answer_add(out, " bytes=%ld", sum);
    return n;
}

/* ---- Bytes in ---- */
static long do_read(const long *a, struct answer *out)
{
    long n = read((int)a[0], block, clamp(a[1]));
    data(out, block, n);
    return n;
}

static long do_readv(const long *a, struct answer *out)
{
    size_t n = clamp(a[1]);
    struct iovec v[3] = {{block, n / 3}, {block, 0}, {block + n / 3, n - n / 3}};
    long r = readv((int)a[0], v, 3);
    data(out, block, r);
    return r;
}

static long do_recv(const long *a, struct answer *out)
{
    memset(block, 0, clamp(a[1]));
    long n = recv((int)a[0], block, clamp(a[1]), (int)a[2]);
    data(out, block, n < (long)clamp(a[1]) ? n : (long)clamp(a[1]));
    return n;
}

static long do_recvfrom(const long *a, struct answer *out)
{
    struct sockaddr_in from = {0};
    socklen_t len = sizeof(from);
    long n = recvfrom((int)a[0], block, clamp(a[1]), (int)a[2], (struct sockaddr *)&from, &len);
    data(out, block, n < (long)clamp(a[1]) ? n : (long)clamp(a[1]));
    if (n >= 0)
        named(out, "from", &from, len);
    return n;
}

static long do_recvmsg(const long *a, struct answer *out)
{
    struct sockaddr_in from = {0};
    size_t n = clamp(a[1]);
    struct iovec v[2] = {{block, n / 2}, {block + n / 2, n - n / 2}};
    struct msghdr m = {.msg_iov = v, .msg_iovlen = 2, .msg_name = &from, .msg_namelen = sizeof(from)};
    memset(block, 0, n);
    long r = recvmsg((int)a[0], &m, (int)a[2]);
    if (r >= 0) {
        data(out, block, r < (long)n ? r : (long)n);
        named(out, "from", &from, m.msg_namelen);
        answer_add(out, " flags=%x control=%zu", m.msg_flags, m.msg_controllen);
    }
    return r;
}

static long do_recvmmsg(const long *a, struct answer *out)
{
    struct mmsghdr m[MANY];
    struct iovec v[MANY];
    several(m, v, clamp(a[2]) / MANY);
    long n = recvmmsg((int)a[0], m, (unsigned)a[1] % (MANY + 1), (int)a[3] | MSG_DONTWAIT, NULL);
    for (long i = 0; i < n; i++) {
        answer_add(out, " %u/%x", m[i].msg_len, m[i].msg_hdr.msg_flags);
        data(out, v[i].iov_base, m[i].msg_len);
    }
    return n;
}

/* ---- Other descriptors ---- */
static long do_pipe(const long *a, struct answer *out)
{
    int p[2];
    long r = pipe2(p, (int)a[0] | O_NONBLOCK);
    if (r == 0)
        answer_add(out, " %d %d", p[0], p[1]);
    return r;
}

static long do_unixpair(const long *a, struct answer *out)
{
    int p[2];
    long r = socketpair(AF_UNIX, (int)a[0] | SOCK_NONBLOCK, 0, p);
    if (r == 0)
        answer_add(out, " %d %d", p[0], p[1]);
    return r;
}

static long do_eventfd(const long *a, struct answer *out)
{
    (void)out;
    return eventfd((unsigned)a[0], EFD_NONBLOCK);
}

static long do_memfd(const long *a, struct answer *out)
{
    (void)out;
    int fd = memfd_create("agent", 0);
    seeded(block, clamp(a[0]), 1);
    if (fd >= 0 && (write(fd, block, clamp(a[0])) < 0 || lseek(fd, 0, SEEK_SET) < 0))
        return -1;
    return fd;
}

union rights {
    char space[CMSG_SPACE(sizeof(int))];
    struct cmsghdr align;
};

static long do_sendfd(const long *a, struct answer *out)
{
    (void)out;
    union rights u = {0};
    int fd = (int)a[1];
    struct iovec v = {"F", 1};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = u.space, .msg_controllen = sizeof(u.space)};
    struct cmsghdr *c = CMSG_FIRSTHDR(&m);
    *c = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int))};
    memcpy(CMSG_DATA(c), &fd, sizeof(fd));
    return sendmsg((int)a[0], &m, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static long do_recvfd(const long *a, struct answer *out)
{
    union rights u = {0};
    int fd = -1;
    char byte = 0;
    struct iovec v = {&byte, 1};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = u.space, .msg_controllen = sizeof(u.space)};
    long n = recvmsg((int)a[0], &m, MSG_DONTWAIT | (int)a[1]);
    struct cmsghdr *c = n >= 0 ? CMSG_FIRSTHDR(&m) : NULL;
    if (c && c->cmsg_type == SCM_RIGHTS)
        memcpy(&fd, CMSG_DATA(c), sizeof(fd));
    if (n >= 0)
        answer_add(out, " fd=%d flags=%x", fd, m.msg_flags & ~MSG_CMSG_CLOEXEC);
    return n;
}

/* ---- Readiness ---- */
static long do_poll(const long *a, struct answer *out)
{
    struct pollfd p = {.fd = (int)a[0], .events = (short)a[1]};
    long n = poll(&p, 1, (int)a[2]);
    if (n > 0)
        answer_add(out, " %x", (unsigned)p.revents);
    return n;
}

/* All of the test's numbers that are open, in all three sets. */
static long do_select(const long *a, struct answer *out)
{
    fd_set sets[3];
    struct timeval t = {0, a[0] * 1000};
    for (int k = 0; k < 3; k++)
        FD_ZERO(&sets[k]);
    for (int fd = 3; fd < AGENT_FDS; fd++)
        for (int k = 0; k < 3 && fcntl(fd, F_GETFD) != -1; k++)
            FD_SET(fd, &sets[k]);
    long n = select(AGENT_FDS, &sets[0], &sets[1], &sets[2], &t);
    for (int k = 0; k < 3 && n >= 0; k++)
        for (int fd = 3; fd < AGENT_FDS; fd++)
            if (FD_ISSET(fd, &sets[k]))
                answer_add(out, " %c%d", "rwx"[k], fd);
    return n;
}

static long do_epoll_create(const long *a, struct answer *out)
{
    (void)out;
    return epoll_create1((int)a[0]);
}

static long do_epoll_ctl(const long *a, struct answer *out)
{
    (void)out;
    struct epoll_event e = {.events = (uint32_t)a[3], .data.u64 = (uint64_t)a[2] << 32 | 5};
    return epoll_ctl((int)a[0], (int)a[1], (int)a[2], &e);
}

static int by_data(const void *a, const void *b)
{
    uint64_t x = ((const struct epoll_event *)a)->data.u64, y = ((const struct epoll_event *)b)->data.u64;
    return x < y ? -1 : x > y;
}

static long events_of(struct epoll_event *e, long n, struct answer *out)
{
    if (n > 1)
        qsort(e, (size_t)n, sizeof(*e), by_data); /* the order is nobody's promise */
    for (long i = 0; i < n; i++)
        answer_add(out, " %llx:%x", (unsigned long long)e[i].data.u64, e[i].events);
    return n;
}

static long do_epoll_wait(const long *a, struct answer *out)
{
    struct epoll_event e[64];
    return events_of(e, epoll_wait((int)a[0], e, 64, (int)a[1]), out);
}

static long do_epoll_pwait2(const long *a, struct answer *out)
{
    struct epoll_event e[64];
    struct timespec t = {0, a[1] * 1000000};
    return events_of(e, epoll_pwait2((int)a[0], e, 64, &t, NULL), out);
}

/* ---- All that can be seen of all descriptors, without changing any ---- */
static char kind_of(int fd)
{
    char link[32], target[64] = "";
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    if (readlink(link, target, sizeof(target) - 1) == -1)
        return '?';
    return strstr(target, "eventpoll") ? 'e' : target[0] == '/' ? 'f' : target[0]; /* socket, pipe, anon_inode */
}

static void look_at(int fd, int flags, struct answer *out)
{
    struct pollfd p = {.fd = fd, .events = POLLIN | POLLOUT | POLLPRI | POLLRDHUP};
    int queued = -1, type = 0;
    socklen_t len = sizeof(type);
    poll(&p, 1, 0);
    answer_add(out, "\n%d kind=%c fdflags=%d flags=%x ready=%x", fd, kind_of(fd), flags, (unsigned)fcntl(fd, F_GETFL),
               (unsigned)p.revents);
    if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &type, &len) == -1 || type != AF_INET)
        return;
    len = sizeof(type);
    getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &len);
    answer_add(out, " type=%d", type);
    if (ioctl(fd, FIONREAD, &queued) == 0)
        answer_add(out, " queued=%d", queued);
    do_getsockname((long[]){fd}, out);
    do_getpeername((long[]){fd}, out);
    struct tcp_info info;
    len = sizeof(info);
    if (type == SOCK_STREAM && getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &len) == 0)
        answer_add(out, " state=%d", info.tcpi_state);
}

static long do_look(const long *a, struct answer *out)
{
    (void)a;
    long n = 0;
    for (int fd = 3; fd < AGENT_FDS; fd++) {
        int flags = fcntl(fd, F_GETFD);
        if (flags == -1)
            continue;
        look_at(fd, flags, out);
        n++;
    }
    return n;
}

const struct agent_call agent_calls[] = {
    {"socket", 3, do_socket},
    {"bind", 3, do_bind},
    {"connect", 3, do_connect},
    {"listen", 2, do_listen},
    {"accept", 1, do_accept},
    {"accept4", 2, do_accept4},
    {"shutdown", 2, do_shutdown},
    {"getsockname", 1, do_getsockname},
    {"getpeername", 1, do_getpeername},
    {"setsockopt", 4, do_setsockopt},
    {"getsockopt", 3, do_getsockopt},
    {"linger", 3, do_linger},
    {"timeout", 2, do_timeout},
    {"close", 1, do_close},
    {"close_range", 3, do_close_range},
    {"dup", 1, do_dup},
    {"dup2", 2, do_dup2},
    {"dup3", 3, do_dup3},
    {"fcntl", 3, do_fcntl},
    {"ioctl", 3, do_ioctl},
    {"write", 3, do_write},
    {"writev", 3, do_writev},
    {"send", 4, do_send},
    {"sendto", 6, do_sendto},
    {"sendmsg", 4, do_sendmsg},
    {"sendmmsg", 5, do_sendmmsg},
    {"sendfile", 4, do_sendfile},
    {"splice", 3, do_splice},
    {"flood", 2, do_flood},
    {"drain", 1, do_drain},
    {"read", 2, do_read},
    {"readv", 2, do_readv},
    {"recv", 3, do_recv},
    {"recvfrom", 3, do_recvfrom},
    {"recvmsg", 3, do_recvmsg},
    {"recvmmsg", 4, do_recvmmsg},
    {"pipe", 1, do_pipe},
    {"unixpair", 1, do_unixpair},
    {"eventfd", 1, do_eventfd},
    {"memfd", 1, do_memfd},
    {"sendfd", 2, do_sendfd},
    {"recvfd", 2, do_recvfd},
    {"poll", 3, do_poll},
    {"select", 1, do_select},
    {"epoll_create", 1, do_epoll_create},
    {"epoll_ctl", 4, do_epoll_ctl},
    {"epoll_wait", 2, do_epoll_wait},
    {"epoll_pwait2", 2, do_epoll_pwait2},
    {"look", 0, do_look},
    {0},
};
