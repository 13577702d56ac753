/* SPDX-License-Identifier: Apache-2.0 */
/* UDP: names, truncation, errors, several at once. Frame: posix.h. */
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/uio.h>

#include "posix.h"

static void to(int fd, const char *text, struct sockaddr_in a)
{
    EQ(sendto(fd, text, strlen(text), 0, (struct sockaddr *)&a, sizeof(a)), (long)strlen(text));
}

CASE(sendto_and_recvfrom)
{
    int a = bound(SOCK_DGRAM), b = bound(SOCK_DGRAM);
    char got[16];
    struct sockaddr_in from;
    socklen_t len = sizeof(from);
    to(a, "hello", name_of(b));
    EQ(recvfrom(b, got, sizeof(got), 0, (struct sockaddr *)&from, &len), 5);
    EQ(len, sizeof(from));
    CHECK(same_address(from, name_of(a)) && memcmp(got, "hello", 5) == 0);
    int fresh = (int)MUST(socket(AF_INET, SOCK_DGRAM, 0)); /* gets its port when it sends */
    EQ(name_of(fresh).sin_port, 0);
    to(fresh, "x", name_of(b));
    CHECK(name_of(fresh).sin_port != 0);
    EQ(recvfrom(b, got, sizeof(got), 0, (struct sockaddr *)&from, &len), 1);
    EQ(from.sin_port, name_of(fresh).sin_port);
    FAILS(EDESTADDRREQ, send(a, "x", 1, 0));
}

CASE(connected)
{
    int fds[2], stranger = bound(SOCK_DGRAM);
    char got[8];
    udp_pair(fds);
    EQ(send(fds[0], "abc", 3, 0), 3);
    EQ(write(fds[0], "def", 3), 3);
    EQ(read(fds[1], got, sizeof(got)), 3);
    EQ(recv(fds[1], got, sizeof(got), 0), 3);
    to(stranger, "no", name_of(fds[1]));
    FAILS(EAGAIN, recv(fds[1], got, sizeof(got), MSG_DONTWAIT)); /* only its peer's */
    CHECK(same_address(peer_of(fds[0]), name_of(fds[1])));
    struct sockaddr none = {.sa_family = AF_UNSPEC};
    MUST(connect(fds[1], &none, sizeof(none)));
    struct sockaddr_in a;
    socklen_t len = sizeof(a);
    FAILS(ENOTCONN, getpeername(fds[1], (struct sockaddr *)&a, &len));
}

CASE(nobody_there)
{
    int holder = bound(SOCK_DGRAM), fd = bound(SOCK_DGRAM);
    struct sockaddr_in a = name_of(holder);
    char c;
    MUST(close(holder));
    MUST(connect(fd, (struct sockaddr *)&a, sizeof(a)));
    EQ(send(fd, "x", 1, 0), 1);
    wait_ready(fd, POLLERR);
    FAILS(ECONNREFUSED, recv(fd, &c, 1, 0)); /* the ICMP message's error, once */
    FAILS(EAGAIN, recv(fd, &c, 1, MSG_DONTWAIT));
}

CASE(cut_off_and_peeked)
{
    int fds[2];
    char got[4];
    udp_pair(fds);
    EQ(send(fds[0], "0123456789", 10, 0), 10);
    EQ(recv(fds[1], got, 4, MSG_PEEK), 4);
    EQ(recv(fds[1], got, 4, MSG_PEEK | MSG_TRUNC), 10);
    struct iovec v = {got, 4};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};
    EQ(recvmsg(fds[1], &m, 0), 4);
    EQ(m.msg_flags, MSG_TRUNC);
    CHECK(memcmp(got, "0123", 4) == 0);
    FAILS(EAGAIN, recv(fds[1], got, 4, MSG_DONTWAIT)); /* the rest is gone */
    EQ(send(fds[0], "", 0, 0), 0);
    EQ(wait_ready(fds[1], POLLIN), POLLIN | POLLOUT);
    EQ(recv(fds[1], got, 4, 0), 0); /* an empty datagram is no end */
    EQ(send(fds[0], "y", 1, 0), 1);
    EQ(recv(fds[1], got, 4, 0), 1);
}

CASE(bytes_of_the_next_datagram)
{
    int fds[2], n = -1;
    char got[8];
    udp_pair(fds);
    MUST(ioctl(fds[1], FIONREAD, &n));
    EQ(n, 0);
    EQ(send(fds[0], "abc", 3, 0), 3);
    EQ(send(fds[0], "defgh", 5, 0), 5);
    wait_ready(fds[1], POLLIN);
    MUST(ioctl(fds[1], FIONREAD, &n));
    EQ(n, 3);
    EQ(recv(fds[1], got, 8, 0), 3);
    MUST(ioctl(fds[1], FIONREAD, &n));
    EQ(n, 5);
}

CASE(several_by_one_call)
{
    int fds[2];
    char text[4][8] = {"one", "two", "three", "four"}, got[4][8];
    struct iovec out[4], in[4];
    struct mmsghdr o[4] = {0}, i[4] = {0};
    udp_pair(fds);
    for (int k = 0; k < 4; k++) {
        out[k] = (struct iovec){text[k], strlen(text[k])};
        in[k] = (struct iovec){got[k], 8};
        o[k].msg_hdr = (struct msghdr){.msg_iov = &out[k], .msg_iovlen = 1};
        i[k].msg_hdr = (struct msghdr){.msg_iov = &in[k], .msg_iovlen = 1};
    }
    EQ(sendmmsg(fds[0], o, 4, 0), 4);
    EQ(o[2].msg_len, 5);
    wait_ready(fds[1], POLLIN);
    EQ(recvmmsg(fds[1], i, 2, MSG_WAITALL, NULL), 2);
    CHECK(i[1].msg_len == 3 && memcmp(got[1], "two", 3) == 0);
    wait_ready(fds[1], POLLIN);
    nap_ms(10);
    EQ(recvmmsg(fds[1], i, 4, MSG_WAITFORONE, NULL), 2);
    CHECK(i[0].msg_len == 5 && memcmp(got[0], "three", 5) == 0);
    FAILS(EAGAIN, recvmmsg(fds[1], i, 4, MSG_DONTWAIT, NULL));
    struct timespec bad = {0, -1};
    FAILS(EINVAL, recvmmsg(fds[1], i, 4, 0, &bad));
}

CASE(gathered_and_scattered)
{
    int fds[2];
    char a[3], b[10];
    struct sockaddr_in from;
    struct iovec out[2] = {{"abcd", 4}, {"ef", 2}}, in[2] = {{a, 3}, {b, 10}};
    struct msghdr m = {.msg_iov = in, .msg_iovlen = 2, .msg_name = &from, .msg_namelen = sizeof(from)};
    udp_pair(fds);
    EQ(writev(fds[0], out, 2), 6);
    EQ(recvmsg(fds[1], &m, 0), 6);
    EQ(m.msg_namelen, sizeof(from));
    CHECK(same_address(from, name_of(fds[0])) && memcmp(a, "abc", 3) == 0 && memcmp(b, "def", 3) == 0);
}

CASE(large_and_too_large)
{
    static uint8_t out[70000], in[70000];
    int fds[2];
    udp_pair(fds);
    fill(out, sizeof(out), 0);
    EQ(send(fds[0], out, 60000, 0), 60000);
    EQ(recv(fds[1], in, sizeof(in), 0), 60000);
    verify(in, 60000, 0);
    FAILS(EMSGSIZE, send(fds[0], out, 65508, 0));
}

CASE(timeout_and_shutdown)
{
    int fds[2];
    char c;
    udp_pair(fds);
    set_timeout(fds[0], SO_RCVTIMEO, 60);
    int64_t start = now_ms();
    FAILS(EAGAIN, recv(fds[0], &c, 1, 0));
    CHECK(now_ms() - start >= 55);
    MUST(shutdown(fds[0], SHUT_RD));
    EQ(recv(fds[0], &c, 1, 0), 0);
    MUST(shutdown(fds[0], SHUT_WR));
    FAILS(EPIPE, send(fds[0], &c, 1, MSG_NOSIGNAL));
}

static void *sends_later(void *arg)
{
    nap_ms(40);
    EQ(send(*(int *)arg, "late", 4, 0), 4);
    return NULL;
}

CASE(recv_waits)
{
    int fds[2];
    pthread_t t;
    char got[8];
    udp_pair(fds);
    CHECK(pthread_create(&t, NULL, sends_later, &fds[0]) == 0);
    EQ(recv(fds[1], got, 8, MSG_WAITALL), 4);
    pthread_join(t, NULL);
}

CASE(bound_to_any_address)
{
    struct sockaddr_in any = {.sin_family = AF_INET};
    int fd = (int)MUST(socket(AF_INET, SOCK_DGRAM, 0)), other = (int)MUST(socket(AF_INET, SOCK_DGRAM, 0));
    char got[8];
    MUST(bind(fd, (struct sockaddr *)&any, sizeof(any)));
    struct sockaddr_in a = name_of(fd);
    FAILS(EADDRINUSE, bind(other, (struct sockaddr *)&a, sizeof(a)));
    to(other, "any", loopback(ntohs(a.sin_port)));
    struct sockaddr_in from;
    socklen_t len = sizeof(from);
    EQ(recvfrom(fd, got, 8, 0, (struct sockaddr *)&from, &len), 3);
    to(fd, "back", from);
    EQ(recv(other, got, 8, 0), 4);
}

CASE(many_and_none_lost)
{
    int fds[2];
    udp_pair(fds);
    for (uint32_t i = 0; i < 2000; i++) { /* fewer in flight than any buffer holds */
        uint32_t got;
        EQ(send(fds[0], &i, sizeof(i), 0), sizeof(i));
        if (i % 8 != 7)
            continue;
        for (uint32_t k = i - 7; k <= i; k++) {
            EQ(recv(fds[1], &got, sizeof(got), 0), sizeof(got));
            EQ(got, k);
        }
    }
}

CASE(duplicates_and_children)
{
    int fds[2];
    char got[16];
    udp_pair(fds);
    int d = (int)MUST(dup(fds[0]));
    MUST(close(fds[0]));
    pid_t child = (pid_t)MUST(fork());
    if (child == 0) {
        EQ(send(d, "child", 5, 0), 5);
        EQ(recv(d, got, sizeof(got), 0), 6);
        _exit(memcmp(got, "parent", 6) != 0);
    }
    EQ(recv(fds[1], got, sizeof(got), 0), 5);
    EQ(send(fds[1], "parent", 6, 0), 6);
    reap(child);
    EQ(send(d, "again", 5, 0), 5);
    EQ(recv(fds[1], got, sizeof(got), 0), 5);
}

CASE(where_a_datagram_was_sent_to)
{
    union {
        char space[256];
        struct cmsghdr align;
    } u;
    int fds[2];
    char c;
    struct iovec v = {&c, 1};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = u.space, .msg_controllen = sizeof(u.space)};
    udp_pair(fds);
    set_option(fds[1], IPPROTO_IP, IP_PKTINFO, 1);
    EQ(send(fds[0], "x", 1, 0), 1);
    EQ(recvmsg(fds[1], &m, 0), 1);
    struct cmsghdr *h = CMSG_FIRSTHDR(&m);
    CHECK(h && h->cmsg_level == IPPROTO_IP && h->cmsg_type == IP_PKTINFO);
    struct in_pktinfo info;
    memcpy(&info, CMSG_DATA(h), sizeof(info));
    EQ(info.ipi_addr.s_addr, htonl(INADDR_LOOPBACK));
}

int main(int argc, char **argv) { return posix_main(argc, argv); }
