/* SPDX-License-Identifier: Apache-2.0 */
/* Single calls of TCP sockets: blocking and not, timeouts, flags, options, names, errors. Frame: posix.h. */
#include <limits.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/uio.h>

#include "posix.h"

#include <linux/sockios.h>

/* ---- What happens while a call sleeps ---- */
struct later {
    int fd;
    const char *text;
    struct sockaddr_in to;
};

static void *speaks_later(void *arg)
{
    struct later *l = arg;
    nap_ms(50);
    says(l->fd, l->text);
    return NULL;
}

static void *connects_later(void *arg)
{
    struct later *l = arg;
    nap_ms(50);
    l->fd = connect_to(l->to);
    return NULL;
}

CASE(recv_waits_for_data)
{
    int fds[2];
    pthread_t t;
    tcp_pair(fds);
    struct later l = {.fd = fds[0], .text = "late"};
    CHECK(pthread_create(&t, NULL, speaks_later, &l) == 0);
    hears(fds[1], "late");
    pthread_join(t, NULL);
}

CASE(accept_waits_for_a_connection)
{
    int fd = listener(4);
    pthread_t t;
    struct later l = {.to = name_of(fd)};
    CHECK(pthread_create(&t, NULL, connects_later, &l) == 0);
    struct sockaddr_in from = {0};
    socklen_t len = sizeof(from);
    int got = (int)MUST(accept(fd, (struct sockaddr *)&from, &len));
    pthread_join(t, NULL);
    EQ(len, sizeof(from));
    CHECK(same_address(from, name_of(l.fd)) && same_address(from, peer_of(got)));
    CHECK(same_address(name_of(got), name_of(fd)) && same_address(peer_of(l.fd), name_of(fd)));
    says(got, "hello");
    hears(l.fd, "hello");
}

CASE(timeouts_of_recv_accept_and_send)
{
    int fds[2], l = listener(4);
    uint8_t block[65536] = {0};
    char c;
    tcp_pair(fds);
    set_timeout(fds[0], SO_RCVTIMEO, 80);
    int64_t start = now_ms();
    FAILS(EAGAIN, recv(fds[0], &c, 1, 0));
    CHECK(now_ms() - start >= 75); /* the kernel's timer counts in ticks */
    set_timeout(l, SO_RCVTIMEO, 80);
    FAILS(EAGAIN, accept(l, NULL, NULL));
    set_timeout(fds[0], SO_SNDTIMEO, 80);
    for (;;) {
        long n = send(fds[0], block, sizeof(block), 0);
        if (n == -1) {
            EQ(errno, EAGAIN);
            break;
        }
    }
    struct timeval t;
    socklen_t len = sizeof(t);
    MUST(getsockopt(fds[0], SOL_SOCKET, SO_RCVTIMEO, &t, &len));
    EQ(t.tv_sec, 0);
    CHECK(t.tv_usec >= 80000 && t.tv_usec < 100000);
    says(fds[1], "x"); /* a timeout is no error of the socket */
    hears(fds[0], "x");
}

CASE(nothing_there_is_eagain)
{
    int fds[2], l = listener(4);
    char c;
    tcp_pair(fds);
    FAILS(EAGAIN, recv(fds[0], &c, 1, MSG_DONTWAIT));
    nonblocking(fds[0]);
    nonblocking(l);
    FAILS(EAGAIN, recv(fds[0], &c, 1, 0));
    FAILS(EAGAIN, read(fds[0], &c, 1));
    FAILS(EAGAIN, accept(l, NULL, NULL));
    EQ(fcntl(fds[0], F_GETFL), O_RDWR | O_NONBLOCK);
    int off = 0, on = 1;
    MUST(ioctl(fds[0], FIONBIO, &off));
    EQ(fcntl(fds[0], F_GETFL), O_RDWR);
    MUST(ioctl(fds[0], FIONBIO, &on));
    EQ(fcntl(fds[0], F_GETFL), O_RDWR | O_NONBLOCK);
    FAILS(EAGAIN, recv(fds[0], &c, 1, 0));
}

CASE(flags_of_socket_and_accept4)
{
    int l = (int)MUST(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, IPPROTO_TCP));
    struct sockaddr_in a = loopback(0);
    EQ(fcntl(l, F_GETFL), O_RDWR | O_NONBLOCK);
    EQ(fcntl(l, F_GETFD), FD_CLOEXEC);
    MUST(bind(l, (struct sockaddr *)&a, sizeof(a)));
    MUST(listen(l, 4));
    int one = client_of(l), two = client_of(l);
    wait_ready(l, POLLIN);
    int x = (int)MUST(accept4(l, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC));
    EQ(fcntl(x, F_GETFL), O_RDWR | O_NONBLOCK);
    EQ(fcntl(x, F_GETFD), FD_CLOEXEC);
    wait_ready(l, POLLIN);
    int y = (int)MUST(accept(l, NULL, NULL)); /* O_NONBLOCK is not inherited */
    EQ(fcntl(y, F_GETFL), O_RDWR);
    EQ(fcntl(y, F_GETFD), 0);
    FAILS(EINVAL, accept4(l, NULL, NULL, 1));
    MUST(fcntl(y, F_SETFD, FD_CLOEXEC));
    EQ(fcntl(y, F_GETFD), FD_CLOEXEC);
    close(one), close(two);
}

CASE(connect_without_waiting)
{
    int l = listener(4), fd = (int)MUST(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
    struct sockaddr_in a = name_of(l);
    if (connect(fd, (struct sockaddr *)&a, sizeof(a)) == -1)
        EQ(errno, EINPROGRESS);
    EQ(wait_ready(fd, POLLOUT), POLLOUT);
    EQ(option(fd, SOL_SOCKET, SO_ERROR), 0);
    MUST(connect(fd, (struct sockaddr *)&a, sizeof(a))); /* once: it succeeded */
    FAILS(EISCONN, connect(fd, (struct sockaddr *)&a, sizeof(a)));
    says(fd, "now");
    hears(accept_one(l), "now");
}

CASE(connect_refused)
{
    int holder, fd = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    struct sockaddr_in a = refusing(&holder);
    FAILS(ECONNREFUSED, connect(fd, (struct sockaddr *)&a, sizeof(a)));
    EQ(option(fd, SOL_SOCKET, SO_ERROR), 0); /* told already */
    int nb = (int)MUST(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
    FAILS(EINPROGRESS, connect(nb, (struct sockaddr *)&a, sizeof(a)));
    CHECK((wait_ready(nb, POLLERR) & (POLLERR | POLLHUP)) == (POLLERR | POLLHUP));
    EQ(option(nb, SOL_SOCKET, SO_ERROR), ECONNREFUSED);
    EQ(option(nb, SOL_SOCKET, SO_ERROR), 0);
    /* the same socket again, to one who listens */
    int l = listener(4);
    a = name_of(l);
    MUST(connect(fd, (struct sockaddr *)&a, sizeof(a)));
    says(fd, "second try");
    hears(accept_one(l), "second try");
}

CASE(send_before_connect)
{
    int fd = (int)MUST(socket(AF_INET, SOCK_STREAM, 0)), other[2];
    struct sockaddr_in a;
    socklen_t len = sizeof(a);
    char c = 0;
    FAILS(EPIPE, send(fd, &c, 1, MSG_NOSIGNAL));
    FAILS(ENOTCONN, recv(fd, &c, 1, 0));
    FAILS(ENOTCONN, getpeername(fd, (struct sockaddr *)&a, &len));
    FAILS(EINVAL, accept(fd, NULL, NULL));
    a = name_of(fd);
    EQ(a.sin_port, 0);
    EQ(a.sin_addr.s_addr, 0);
    tcp_pair(other); /* where it runs shows by these */
}

/* ---- Flags ---- */
CASE(peek_leaves_the_data)
{
    int fds[2];
    char got[8] = "";
    tcp_pair(fds);
    says(fds[0], "abcdef");
    wait_ready(fds[1], POLLIN);
    EQ(recv(fds[1], got, 3, MSG_PEEK), 3);
    CHECK(memcmp(got, "abc", 3) == 0);
    hears(fds[1], "ab");
    EQ(recv(fds[1], got, 8, MSG_PEEK), 4);
    CHECK(memcmp(got, "cdef", 4) == 0);
    hears(fds[1], "cdef");
}

static void *in_three_parts(void *arg)
{
    int fd = *(int *)arg;
    for (int i = 0; i < 3; i++) {
        uint8_t part[100];
        fill(part, sizeof(part), (uint64_t)i * 100);
        nap_ms(20);
        send_all(fd, part, sizeof(part));
    }
    return NULL;
}

CASE(waitall_waits_for_all)
{
    int fds[2];
    uint8_t got[400];
    pthread_t t;
    tcp_pair(fds);
    CHECK(pthread_create(&t, NULL, in_three_parts, &fds[0]) == 0);
    EQ(recv(fds[1], got, 250, MSG_WAITALL), 250);
    verify(got, 250, 0);
    pthread_join(t, NULL);
    MUST(shutdown(fds[0], SHUT_WR));
    EQ(recv(fds[1], got, 400, MSG_WAITALL), 50); /* the end comes first */
    verify(got, 50, 250);
    EQ(recv(fds[1], got, 400, MSG_WAITALL), 0);
}

CASE(trunc_throws_away)
{
    int fds[2];
    char got[16] = "zzzz";
    tcp_pair(fds);
    says(fds[0], "0123456789");
    wait_ready(fds[1], POLLIN);
    EQ(recv(fds[1], got, 4, MSG_TRUNC), 4); /* tcp(7): discarded, not copied */
    CHECK(memcmp(got, "zzzz", 4) == 0);
    hears(fds[1], "456789");
}

CASE(urgent_byte)
{
    int fds[2], mark = -1;
    char c = 0, got[8];
    tcp_pair(fds);
    FAILS(EINVAL, recv(fds[1], &c, 1, MSG_OOB));
    says(fds[0], "ab");
    EQ(send(fds[0], "!", 1, MSG_OOB), 1);
    says(fds[0], "cd");
    CHECK(wait_ready(fds[1], POLLPRI) & POLLIN);
    EQ(recv(fds[1], &c, 1, MSG_OOB), 1);
    EQ(c, '!');
    FAILS(EINVAL, recv(fds[1], &c, 1, MSG_OOB));
    MUST(ioctl(fds[1], SIOCATMARK, &mark));
    EQ(mark, 0);
    EQ(recv(fds[1], got, sizeof(got), 0), 2); /* reading stops at the mark */
    MUST(ioctl(fds[1], SIOCATMARK, &mark));
    EQ(mark, 1);
    EQ(sockatmark(fds[1]), 1);
    hears(fds[1], "cd");
}

CASE(more_and_cork_hold_back)
{
    int fds[2];
    char got[16];
    tcp_pair(fds);
    EQ(send(fds[0], "ab", 2, MSG_MORE), 2);
    EQ(send(fds[0], "cd", 2, 0), 2);
    EQ(recv(fds[1], got, 4, MSG_WAITALL), 4);
    set_option(fds[0], IPPROTO_TCP, TCP_CORK, 1);
    says(fds[0], "ef");
    says(fds[0], "gh");
    set_option(fds[0], IPPROTO_TCP, TCP_CORK, 0);
    EQ(recv(fds[1], got, 4, MSG_WAITALL), 4);
    CHECK(memcmp(got, "efgh", 4) == 0);
}

CASE(empty_calls)
{
    int fds[2];
    char c;
    tcp_pair(fds);
    EQ(send(fds[0], "", 0, 0), 0);
    EQ(write(fds[0], "", 0), 0);
    EQ(read(fds[1], &c, 0), 0);
    says(fds[0], "x");
    wait_ready(fds[1], POLLIN);
    EQ(read(fds[1], &c, 0), 0);
    EQ(recv(fds[1], &c, 0, 0), 0);
    hears(fds[1], "x");
}

/* ---- Vectors and messages ---- */
CASE(readv_and_writev)
{
    int fds[2];
    char a[3] = "", b[1] = "", c[8] = "";
    struct iovec out[3] = {{"ab", 2}, {"", 0}, {"cdefg", 5}}, in[3] = {{a, 3}, {b, 1}, {c, 8}};
    tcp_pair(fds);
    EQ(writev(fds[0], out, 3), 7);
    wait_ready(fds[1], POLLIN);
    EQ(readv(fds[1], in, 3), 7);
    CHECK(memcmp(a, "abc", 3) == 0 && b[0] == 'd' && memcmp(c, "efg", 3) == 0);
    volatile int wrong = -1; /* volatile: the compiler must not see what is passed */
    FAILS(EINVAL, writev(fds[0], out, wrong));
    wrong = IOV_MAX + 1;
    FAILS(EINVAL, writev(fds[0], out, wrong));
}

CASE(messages_of_a_stream)
{
    int fds[2];
    char a[4] = "", b[8] = "";
    struct iovec out[2] = {{"ab", 2}, {"cdef", 4}}, in[2] = {{a, 4}, {b, 8}};
    struct msghdr m = {.msg_iov = out, .msg_iovlen = 2};
    tcp_pair(fds);
    EQ(sendmsg(fds[0], &m, MSG_NOSIGNAL), 6);
    struct sockaddr_in from;
    struct msghdr r = {.msg_iov = in, .msg_iovlen = 2, .msg_name = &from, .msg_namelen = sizeof(from)};
    wait_ready(fds[1], POLLIN);
    EQ(recvmsg(fds[1], &r, 0), 6);
    EQ(r.msg_namelen, 0); /* a connected stream tells no sender */
    EQ(r.msg_flags, 0);
    CHECK(memcmp(a, "abcd", 4) == 0 && memcmp(b, "ef", 2) == 0);
    struct mmsghdr many[2] = {{.msg_hdr = m}, {.msg_hdr = m}};
    EQ(sendmmsg(fds[0], many, 2, 0), 2);
    EQ(many[0].msg_len, 6);
    EQ(many[1].msg_len, 6);
    hears(fds[1], "abcdefabcdef");
}

CASE(addresses_of_a_stream_say_nothing)
{
    int fds[2];
    char got[4];
    struct sockaddr_in from = {.sin_port = 7}, elsewhere = loopback(9);
    socklen_t len = sizeof(from);
    tcp_pair(fds);
    EQ(sendto(fds[0], "abc", 3, 0, (struct sockaddr *)&elsewhere, sizeof(elsewhere)), 3);
    EQ(recvfrom(fds[1], got, 3, MSG_WAITALL, (struct sockaddr *)&from, &len), 3);
    EQ(len, 0);
}

/* ---- ioctl ---- */
CASE(queues_by_ioctl)
{
    int fds[2], n = -1, l = listener(2);
    tcp_pair(fds);
    MUST(ioctl(fds[1], FIONREAD, &n));
    EQ(n, 0);
    says(fds[0], "abcde");
    wait_ready(fds[1], POLLIN);
    MUST(ioctl(fds[1], FIONREAD, &n));
    EQ(n, 5);
    hears(fds[1], "ab");
    MUST(ioctl(fds[1], FIONREAD, &n));
    EQ(n, 3);
    do
        MUST(ioctl(fds[0], SIOCOUTQ, &n)); /* until all is acknowledged */
    while (n != 0);
    FAILS(EINVAL, ioctl(l, FIONREAD, &n));
    FAILS(ENOTTY, ioctl(fds[0], 0x12345678, &n));
}

/* ---- Options ---- */
CASE(options_that_tell)
{
    int fds[2], l = listener(3), fresh = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    tcp_pair(fds);
    EQ(option(l, SOL_SOCKET, SO_ACCEPTCONN), 1);
    EQ(option(fds[0], SOL_SOCKET, SO_ACCEPTCONN), 0);
    EQ(option(fds[0], SOL_SOCKET, SO_TYPE), SOCK_STREAM);
    EQ(option(fds[0], SOL_SOCKET, SO_DOMAIN), AF_INET);
    EQ(option(fds[0], SOL_SOCKET, SO_PROTOCOL), IPPROTO_TCP);
    EQ(option(fresh, SOL_SOCKET, SO_ERROR), 0);
    CHECK(option(fds[0], SOL_SOCKET, SO_SNDBUF) > 0 && option(fds[0], SOL_SOCKET, SO_RCVBUF) > 0);
    CHECK(option(fds[0], IPPROTO_TCP, TCP_MAXSEG) > 0);
    FAILS(ENOPROTOOPT, setsockopt(fds[0], SOL_SOCKET, 9999, &(int){1}, sizeof(int)));
    FAILS(ENOPROTOOPT, setsockopt(fds[0], IPPROTO_TCP, 9999, &(int){1}, sizeof(int)));
    FAILS(EINVAL, setsockopt(fds[0], SOL_SOCKET, SO_KEEPALIVE, &(char){1}, 1));
}

CASE(options_that_are_kept)
{
    static const int on[][2] = {{SOL_SOCKET, SO_KEEPALIVE},  {SOL_SOCKET, SO_REUSEADDR},
                                {SOL_SOCKET, SO_OOBINLINE},  {IPPROTO_TCP, TCP_NODELAY},
                                {IPPROTO_TCP, TCP_KEEPIDLE}, {IPPROTO_TCP, TCP_KEEPINTVL},
                                {IPPROTO_TCP, TCP_KEEPCNT},  {IPPROTO_TCP, TCP_USER_TIMEOUT}};
    int fds[2], l = listener(3);
    tcp_pair(fds);
    for (size_t i = 0; i < sizeof(on) / sizeof(on[0]); i++) {
        set_option(fds[0], on[i][0], on[i][1], 1);
        EQ(option(fds[0], on[i][0], on[i][1]), 1);
    }
    set_option(fds[0], IPPROTO_IP, IP_TOS, 0x10);
    EQ(option(fds[0], IPPROTO_IP, IP_TOS), 0x10);
    set_option(l, SOL_SOCKET, SO_KEEPALIVE, 1); /* what a listener has, its connections have */
    set_option(l, IPPROTO_TCP, TCP_NODELAY, 1);
    int c = client_of(l), s = accept_one(l);
    EQ(option(s, SOL_SOCKET, SO_KEEPALIVE), 1);
    EQ(option(s, IPPROTO_TCP, TCP_NODELAY), 1);
    EQ(option(c, SOL_SOCKET, SO_KEEPALIVE), 0);
    set_option(s, SOL_SOCKET, SO_RCVBUF, 8192);
    EQ(option(s, SOL_SOCKET, SO_RCVBUF), 16384); /* socket(7): doubled */
}

CASE(options_set_before_connect_hold_after_it)
{
    int l = listener(3), fd = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    struct sockaddr_in a = name_of(l);
    set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
    set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
    set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, 77);
    set_option(fd, SOL_SOCKET, SO_SNDBUF, 20000);
    MUST(connect(fd, (struct sockaddr *)&a, sizeof(a)));
    EQ(option(fd, IPPROTO_TCP, TCP_NODELAY), 1);
    EQ(option(fd, SOL_SOCKET, SO_KEEPALIVE), 1);
    EQ(option(fd, IPPROTO_TCP, TCP_KEEPIDLE), 77);
    EQ(option(fd, SOL_SOCKET, SO_SNDBUF), 40000);
}

CASE(tcp_info_is_of_this_connection)
{
    int fds[2], l = listener(3);
    struct tcp_info info = {0};
    socklen_t len = sizeof(info);
    tcp_pair(fds);
    MUST(getsockopt(fds[0], IPPROTO_TCP, TCP_INFO, &info, &len));
    EQ(info.tcpi_state, TCP_ESTABLISHED);
    CHECK(info.tcpi_snd_mss > 0 && info.tcpi_snd_cwnd > 0 && info.tcpi_rto > 0);
    MUST(shutdown(fds[0], SHUT_WR));
    hears_end(fds[1]);
    MUST(getsockopt(fds[1], IPPROTO_TCP, TCP_INFO, &info, &len));
    EQ(info.tcpi_state, TCP_CLOSE_WAIT);
    MUST(getsockopt(l, IPPROTO_TCP, TCP_INFO, &info, &len));
    EQ(info.tcpi_state, TCP_LISTEN);
    char name[16] = "";
    len = sizeof(name);
    MUST(getsockopt(fds[0], IPPROTO_TCP, TCP_CONGESTION, name, &len));
    CHECK(name[0] != 0);
}

CASE(a_port_in_use)
{
    int l = listener(3), fd = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    struct sockaddr_in a = name_of(l);
    CHECK(a.sin_port != 0);
    FAILS(EADDRINUSE, bind(fd, (struct sockaddr *)&a, sizeof(a)));
    FAILS(EINVAL, bind(l, (struct sockaddr *)&a, sizeof(a)));
    MUST(close(l));
    MUST(bind(fd, (struct sockaddr *)&a, sizeof(a)));
    MUST(listen(fd, 3));
    says(client_of(fd), "new owner");
    hears(accept_one(fd), "new owner");
}

CASE(bind_again_after_time_wait_needs_reuseaddr)
{
    int l = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    struct sockaddr_in a = loopback(0);
    set_option(l, SOL_SOCKET, SO_REUSEADDR, 1);
    MUST(bind(l, (struct sockaddr *)&a, sizeof(a)));
    MUST(listen(l, 3));
    a = name_of(l);
    int c = client_of(l), s = accept_one(l);
    MUST(close(s)); /* the server closes first: TIME_WAIT is on its port */
    hears_end(c);
    MUST(close(c));
    MUST(close(l));
    int plain = (int)MUST(socket(AF_INET, SOCK_STREAM, 0)), reuse = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    FAILS(EADDRINUSE, bind(plain, (struct sockaddr *)&a, sizeof(a)));
    set_option(reuse, SOL_SOCKET, SO_REUSEADDR, 1);
    MUST(bind(reuse, (struct sockaddr *)&a, sizeof(a)));
    MUST(listen(reuse, 3));
}

CASE(a_listener_that_was_shut_down_connects)
{
    struct sockaddr_in a = loopback(0), to;
    int l = (int)MUST(socket(AF_INET, SOCK_STREAM, 0)), other = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    MUST(bind(other, (struct sockaddr *)&a, sizeof(a)));
    MUST(listen(other, 3));
    MUST(bind(l, (struct sockaddr *)&a, sizeof(a)));
    MUST(listen(l, 3));
    MUST(shutdown(l, SHUT_RD));
    to = name_of(other);
    MUST(connect(l, (struct sockaddr *)&to, sizeof(to)));
    EQ(ready(l), POLLOUT);
    int s = accept_one(other);
    says(l, "hello");
    hears(s, "hello");
}

CASE(bind_to_any_address)
{
    struct sockaddr_in any = {.sin_family = AF_INET};
    int fd = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    MUST(bind(fd, (struct sockaddr *)&any, sizeof(any)));
    MUST(listen(fd, 3));
    EQ(name_of(fd).sin_addr.s_addr, 0);
    int c = connect_to(loopback(ntohs(name_of(fd).sin_port))), s = accept_one(fd);
    EQ(name_of(s).sin_addr.s_addr, htonl(INADDR_LOOPBACK));
    says(c, "any");
    hears(s, "any");
}

/* ---- What is no socket, and what a socket is not ---- */
CASE(other_descriptors_are_left_alone)
{
    int p[2], u[2], fds[2];
    char got[4];
    MUST(pipe(p));
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, u));
    tcp_pair(fds);
    EQ(write(p[1], "abc", 3), 3);
    EQ(read(p[0], got, 3), 3);
    says(u[0], "xyz");
    hears(u[1], "xyz");
    FAILS(ENOTSOCK, recv(p[0], got, 1, 0));
    FAILS(ENOTSOCK, bind(p[0], (struct sockaddr *)&(struct sockaddr_in){.sin_family = AF_INET}, 16));
    FAILS(EBADF, recv(999, got, 1, 0));
    FAILS(EBADF, close(999));
    MUST(close(fds[0]));
    FAILS(EBADF, send(fds[0], "x", 1, 0));
    FAILS(EBADF, close(fds[0]));
}

CASE(a_socket_has_no_place_in_a_file)
{
    int fds[2];
    char c;
    struct stat st;
    tcp_pair(fds);
    FAILS(ESPIPE, lseek(fds[0], 0, SEEK_SET));
    FAILS(ESPIPE, pread(fds[0], &c, 1, 0));
    FAILS(ESPIPE, pwrite(fds[0], "x", 1, 0));
    MUST(fstat(fds[0], &st));
    CHECK(S_ISSOCK(st.st_mode));
    char link[64], target[64] = "";
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fds[0]);
    MUST(readlink(link, target, sizeof(target) - 1));
    CHECK(strncmp(target, "socket:[", 8) == 0);
}

CASE(bad_arguments)
{
    int fds[2];
    struct sockaddr_in a = loopback(1), six = a;
    six.sin_family = AF_INET6;
    tcp_pair(fds);
    int fd = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    FAILS(EINVAL, bind(fd, (struct sockaddr *)&a, 4));
    FAILS(EAFNOSUPPORT, connect(fd, (struct sockaddr *)&six, sizeof(six)));
    FAILS(EADDRNOTAVAIL,
          bind(fd,
               (struct sockaddr *)&(struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(0xc0000201)},
               sizeof(a)));
    FAILS(EINVAL, shutdown(fds[0], 3));
    FAILS(ENOTCONN, shutdown(fd, SHUT_WR));
    FAILS(EINVAL, listen(fds[0], 1));
    FAILS(EISCONN, connect(fds[0], (struct sockaddr *)&a, sizeof(a)));
    FAILS(EAFNOSUPPORT, socket(12345, SOCK_STREAM, 0));
    FAILS(EINVAL, socket(AF_INET, 99, 0));
    FAILS(EPROTONOSUPPORT, socket(AF_INET, SOCK_STREAM, IPPROTO_UDP));
}

int main(int argc, char **argv) { return posix_main(argc, argv); }
