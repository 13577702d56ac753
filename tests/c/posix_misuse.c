/* SPDX-License-Identifier: Apache-2.0 */
/* Calls about nothing, on the wrong thing, or twice: what is said first, and what is left as it was. Frame: posix.h. */
#include <pthread.h>
#include <signal.h>
#include <sys/sendfile.h>
#include <sys/uio.h>

#include "posix.h"

static struct iovec none[3];
static struct msghdr empty = {.msg_iov = none, .msg_iovlen = 2};

/* Nothing has arrived, and what is sent next does. */
static void heard_nothing_of(int to, int from)
{
    char c = 0;
    EQ(send(from, "!", 1, 0), 1);
    EQ(recv(to, &c, 1, 0), 1);
    EQ(c, '!');
}

/* ---- No byte ---- */
CASE(vectors_without_a_byte_do_nothing)
{
    int udp[2], tcp[2], fresh = (int)MUST(socket(AF_INET, SOCK_STREAM, 0)), l = listener(1);
    udp_pair(udp);
    tcp_pair(tcp);
    int all[] = {udp[0], tcp[0], fresh, l};
    volatile int minus = -1;
    for (size_t i = 0; i < sizeof(all) / sizeof(*all); i++) {
        for (int count = 0; count < 4; count++) {
            EQ(writev(all[i], none, count), 0);
            EQ(readv(all[i], none, count), 0); /* and does not wait */
            EQ(pwritev2(all[i], none, count, -1, 0), 0);
            EQ(preadv2(all[i], none, count, -1, 0), 0);
        }
        EQ(read(all[i], NULL, 0), 0);
        FAILS(EINVAL, readv(all[i], none, minus));
    }
    heard_nothing_of(udp[1], udp[0]);
    heard_nothing_of(tcp[1], tcp[0]);
}

CASE(messages_without_a_byte_are_messages)
{
    int udp[2], tcp[2], l = listener(1);
    char c;
    udp_pair(udp);
    tcp_pair(tcp);
    EQ(sendmsg(udp[0], &empty, 0), 0);
    EQ(wait_ready(udp[1], POLLIN), POLLIN | POLLOUT);
    EQ(recv(udp[1], &c, 1, 0), 0);
    EQ(write(udp[0], "", 0), 0);
    EQ(recv(udp[1], &c, 1, 0), 0);
    EQ(sendmsg(tcp[0], &empty, 0), 0);
    FAILS(EPIPE, sendmsg(l, &empty, MSG_NOSIGNAL));
    FAILS(EPIPE, send(l, "", 0, MSG_NOSIGNAL));
    heard_nothing_of(tcp[1], tcp[0]);
}

CASE(a_message_without_room_waits_for_a_byte)
{
    int udp[2], tcp[2];
    char got[4];
    udp_pair(udp);
    tcp_pair(tcp);
    FAILS(EAGAIN, recvmsg(tcp[1], &empty, MSG_DONTWAIT));
    FAILS(EAGAIN, recvmsg(udp[1], &empty, MSG_DONTWAIT));
    says(tcp[0], "ab");
    wait_ready(tcp[1], POLLIN);
    EQ(recvmsg(tcp[1], &empty, 0), 0);
    EQ(recv(tcp[1], got, sizeof(got), 0), 2); /* it has taken none */
    EQ(send(udp[0], "ab", 2, 0), 2);
    wait_ready(udp[1], POLLIN);
    struct msghdr m = empty;
    EQ(recvmsg(udp[1], &m, MSG_PEEK), 0);
    EQ(m.msg_flags, MSG_TRUNC);
    m = empty;
    EQ(recvmsg(udp[1], &m, MSG_TRUNC), 2);
    FAILS(EAGAIN, recvmsg(udp[1], &empty, MSG_DONTWAIT)); /* it has taken the datagram */
    MUST(shutdown(tcp[0], SHUT_WR));
    wait_ready(tcp[1], POLLRDHUP);
    EQ(recvmsg(tcp[1], &empty, 0), 0);
}

CASE(a_message_of_too_many_pieces)
{
    static struct iovec many[1025];
    int tcp[2];
    tcp_pair(tcp);
    struct msghdr m = {.msg_iov = many, .msg_iovlen = 1025};
    FAILS(EMSGSIZE, sendmsg(tcp[0], &m, 0));
    FAILS(EMSGSIZE, recvmsg(tcp[0], &m, MSG_DONTWAIT));
    FAILS(EINVAL, writev(tcp[0], many, 1025));
}

/* ---- Names twice ---- */
CASE(a_socket_that_has_a_name_is_not_bound)
{
    int tcp[2], udp[2], l = listener(1), one = bound(SOCK_STREAM), fresh = (int)MUST(socket(AF_INET, SOCK_DGRAM, 0));
    struct sockaddr_in any = loopback(0), far = any, taken = name_of(l);
    far.sin_addr.s_addr = htonl(0x08080808);
    tcp_pair(tcp);
    udp_pair(udp);
    struct sockaddr_in to = name_of(udp[0]);
    MUST(connect(fresh, (struct sockaddr *)&to, sizeof(to)));
    int all[] = {tcp[0], tcp[1], udp[0], l, one, fresh};
    for (size_t i = 0; i < sizeof(all) / sizeof(*all); i++) {
        struct sockaddr_in before = name_of(all[i]);
        FAILS(EINVAL, bind(all[i], (struct sockaddr *)&any, sizeof(any)));
        FAILS(EINVAL, bind(all[i], (struct sockaddr *)&taken, sizeof(taken)));
        FAILS(EADDRNOTAVAIL, bind(all[i], (struct sockaddr *)&far, sizeof(far)));
        FAILS(EINVAL, bind(all[i], (struct sockaddr *)&any, 3));
        CHECK(same_address(name_of(all[i]), before));
    }
    says(tcp[0], "still");
    hears(tcp[1], "still");
}

CASE(listen_of_datagrams_changes_nothing)
{
    int fresh = (int)MUST(socket(AF_INET, SOCK_DGRAM, 0)), fd = bound(SOCK_DGRAM);
    FAILS(EOPNOTSUPP, listen(fresh, 5));
    EQ(name_of(fresh).sin_port, 0);
    FAILS(EOPNOTSUPP, listen(fd, 5));
    FAILS(EOPNOTSUPP, accept(fd, NULL, NULL));
    struct sockaddr_in a = loopback(0);
    MUST(bind(fresh, (struct sockaddr *)&a, sizeof(a)));
}

CASE(nothing_is_read_from_a_listener)
{
    int l = listener(1);
    char c;
    FAILS(ENOTCONN, recv(l, &c, 1, 0));
    FAILS(ENOTCONN, read(l, &c, 1));
    FAILS(EPIPE, send(l, &c, 1, MSG_NOSIGNAL));
    MUST(shutdown(l, SHUT_RDWR));
    FAILS(ENOTCONN, recv(l, &c, 1, 0));
    FAILS(ENOTCONN, shutdown(l, SHUT_RDWR)); /* but that is what it is: */
    EQ(recv(l, &c, 1, 0), 0);
    EQ(read(l, &c, 1), 0);
    FAILS(EPIPE, send(l, &c, 1, MSG_NOSIGNAL));
}

/* ---- Nobody there, and then somebody ---- */
CASE(refused_without_waiting_and_tried_again)
{
    int holder, fd = (int)MUST(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
    struct sockaddr_in to = refusing(&holder);
    FAILS(EINPROGRESS, connect(fd, (struct sockaddr *)&to, sizeof(to)));
    wait_ready(fd, POLLERR | POLLHUP);
    EQ(option(fd, SOL_SOCKET, SO_ERROR), ECONNREFUSED);
    MUST(listen(holder, 5));
    FAILS(ECONNABORTED, connect(fd, (struct sockaddr *)&to, sizeof(to))); /* of the attempt before */
    FAILS(EINPROGRESS, connect(fd, (struct sockaddr *)&to, sizeof(to)));
    EQ(wait_ready(fd, POLLOUT), POLLOUT);
    int got = accept_one(holder);
    CHECK(same_address(peer_of(fd), to) && same_address(peer_of(got), name_of(fd)));
    says(fd, "there");
    hears(got, "there");
}

CASE(refused_with_a_name_of_its_own)
{
    int holder, fd = bound(SOCK_STREAM);
    struct sockaddr_in to = refusing(&holder), name = name_of(fd);
    nonblocking(fd);
    FAILS(EINPROGRESS, connect(fd, (struct sockaddr *)&to, sizeof(to)));
    wait_ready(fd, POLLERR | POLLHUP);
    FAILS(ECONNREFUSED, connect(fd, (struct sockaddr *)&to, sizeof(to)));
    EQ(name_of(fd).sin_port, name.sin_port);
    MUST(listen(holder, 5));
    FAILS(EINPROGRESS, connect(fd, (struct sockaddr *)&to, sizeof(to)));
    EQ(wait_ready(fd, POLLOUT), POLLOUT);
    int got = accept_one(holder);
    CHECK(same_address(peer_of(got), name_of(fd)));
}

CASE(refused_while_it_waits_and_tried_again)
{
    int holder, fd = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    struct sockaddr_in to = refusing(&holder);
    for (int i = 0; i < 3; i++)
        FAILS(ECONNREFUSED, connect(fd, (struct sockaddr *)&to, sizeof(to)));
    MUST(listen(holder, 5));
    MUST(connect(fd, (struct sockaddr *)&to, sizeof(to)));
    int got = accept_one(holder);
    says(got, "there");
    hears(fd, "there");
}

/* One that talks to itself hears nobody else; who sends to it is told. */
CASE(datagrams_to_itself)
{
    int fd = bound(SOCK_DGRAM), other = bound(SOCK_DGRAM);
    struct sockaddr_in name = name_of(fd);
    char c = 0;
    MUST(connect(fd, (struct sockaddr *)&name, sizeof(name)));
    EQ(send(fd, "a", 1, 0), 1);
    EQ(recv(fd, &c, 1, 0), 1);
    EQ(c, 'a');
    MUST(connect(other, (struct sockaddr *)&name, sizeof(name)));
    EQ(send(other, "b", 1, 0), 1);
    wait_ready(other, POLLERR);
    FAILS(ECONNREFUSED, recv(other, &c, 1, 0));
    FAILS(EAGAIN, recv(fd, &c, 1, MSG_DONTWAIT));
}

/* ---- sendfile and splice of what is none of their business ---- */
CASE(sendfile_says_what_is_wrong)
{
    int tcp[2], p[2];
    off_t at = 0;
    char c;
    tcp_pair(tcp);
    MUST(pipe(p));
    FAILS(ESPIPE, sendfile(tcp[0], tcp[1], &at, 1));
    FAILS(EINVAL, sendfile(tcp[0], tcp[1], NULL, 1));
    FAILS(ESPIPE, sendfile(tcp[0], p[0], &at, 1));
    FAILS(EINVAL, sendfile(tcp[0], p[0], NULL, 1));
    FAILS(EBADF, sendfile(tcp[0], p[1], NULL, 1));
    FAILS(ESPIPE, sendfile(p[1], tcp[0], &at, 1));
    FAILS(EBADF, sendfile(p[0], tcp[0], NULL, 1));
    FAILS(EBADF, sendfile(-1, tcp[0], NULL, 1));
    FAILS(EBADF, sendfile(tcp[0], -1, NULL, 1));
    says(tcp[0], "x"); /* nothing has gone wrong with it */
    EQ(recv(tcp[1], &c, 1, 0), 1);
}

CASE(sendfile_into_a_pipe_is_splice)
{
    int tcp[2], p[2];
    char got[8];
    tcp_pair(tcp);
    MUST(pipe(p));
    says(tcp[0], "hello");
    wait_ready(tcp[1], POLLIN);
    EQ(sendfile(p[1], tcp[1], NULL, 3), 3);
    EQ(read(p[0], got, sizeof(got)), 3);
    CHECK(memcmp(got, "hel", 3) == 0);
    hears(tcp[1], "lo");
}

CASE(sendfile_from_a_device)
{
    int tcp[2], zero = (int)MUST(open("/dev/zero", O_RDONLY));
    char got[8] = "xxxxxxx";
    tcp_pair(tcp);
    EQ(sendfile(tcp[0], zero, NULL, sizeof(got)), sizeof(got));
    recv_all(tcp[1], got, sizeof(got));
    CHECK(memcmp(got, "\0\0\0\0\0\0\0", sizeof(got)) == 0);
}

CASE(splice_says_what_is_wrong)
{
    int tcp[2], p[2], l = listener(1), fresh = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    off_t at = 0;
    tcp_pair(tcp);
    MUST(pipe2(p, O_NONBLOCK));
    nonblocking(tcp[0]);
    EQ(splice(l, NULL, p[0], NULL, 0, 0), 0); /* nothing is no matter */
    FAILS(EINVAL, splice(tcp[0], NULL, p[1], NULL, 1, 0x80));
    FAILS(EBADF, splice(-1, NULL, tcp[0], NULL, 1, 0));
    FAILS(EBADF, splice(tcp[0], NULL, -1, NULL, 1, 0));
    FAILS(EBADF, splice(l, NULL, p[0], NULL, 1, 0)); /* its reading end */
    FAILS(EBADF, splice(p[1], NULL, l, NULL, 1, 0));
    FAILS(EINVAL, splice(tcp[0], NULL, tcp[1], NULL, 1, 0));
    FAILS(EINVAL, splice(tcp[0], &at, p[1], NULL, 1, 0));
    FAILS(ESPIPE, splice(tcp[0], NULL, p[1], &at, 1, 0));
    FAILS(ESPIPE, splice(p[0], &at, tcp[0], NULL, 1, 0));
    FAILS(EINVAL, splice(p[0], NULL, tcp[0], &at, 1, 0));
    FAILS(EAGAIN, splice(p[0], NULL, l, NULL, 1, 0)); /* the pipe is asked first */
    FAILS(EAGAIN, splice(tcp[0], NULL, p[1], NULL, 1, 0));
    FAILS(ENOTCONN, splice(l, NULL, p[1], NULL, 1, 0));
    FAILS(ENOTCONN, splice(fresh, NULL, p[1], NULL, 1, 0));
    signal(SIGPIPE, SIG_IGN);
    EQ(write(p[1], "x", 1), 1);
    FAILS(EPIPE, splice(p[0], NULL, l, NULL, 1, 0));
    MUST(close(p[0]));
    FAILS(EPIPE, splice(l, NULL, p[1], NULL, 1, 0)); /* nobody reads the pipe */
}

CASE(splice_takes_datagrams)
{
    int udp[2], p[2];
    char got[8];
    udp_pair(udp);
    MUST(pipe2(p, O_NONBLOCK));
    EQ(send(udp[0], "", 0, 0), 0);
    EQ(send(udp[0], "hello", 5, 0), 5);
    EQ(send(udp[0], "x", 1, 0), 1);
    wait_ready(udp[1], POLLIN);
    EQ(splice(udp[1], NULL, p[1], NULL, 8, 0), 0);
    EQ(splice(udp[1], NULL, p[1], NULL, 3, 0), 3); /* the rest of it is gone */
    EQ(splice(udp[1], NULL, p[1], NULL, 8, 0), 1);
    EQ(read(p[0], got, sizeof(got)), 4);
    CHECK(memcmp(got, "helx", 4) == 0);
}

static void *writes_later(void *arg)
{
    nap_ms(50);
    EQ(write(*(int *)arg, "late", 4), 4);
    return NULL;
}

CASE(splice_waits_for_the_pipe)
{
    int tcp[2], p[2];
    pthread_t t;
    tcp_pair(tcp);
    MUST(pipe(p));
    FAILS(EAGAIN, splice(p[0], NULL, tcp[0], NULL, 10, SPLICE_F_NONBLOCK));
    CHECK(pthread_create(&t, NULL, writes_later, &p[1]) == 0);
    EQ(splice(p[0], NULL, tcp[0], NULL, 10, 0), 4);
    pthread_join(t, NULL);
    hears(tcp[1], "late");
    MUST(close(p[1]));
    EQ(splice(p[0], NULL, tcp[0], NULL, 10, 0), 0); /* nobody will write any more */
}

CASE(splice_waits_for_the_socket_whatever_is_said_of_the_pipe)
{
    int tcp[2], p[2];
    pthread_t t;
    char got[8];
    tcp_pair(tcp);
    MUST(pipe(p));
    CHECK(pthread_create(&t, NULL, writes_later, &tcp[0]) == 0);
    EQ(splice(tcp[1], NULL, p[1], NULL, 10, SPLICE_F_NONBLOCK), 4);
    pthread_join(t, NULL);
    EQ(read(p[0], got, sizeof(got)), 4);
}

CASE(splice_takes_what_the_pipe_has_room_for)
{
    int tcp[2], p[2];
    uint8_t block[16384];
    tcp_pair(tcp);
    MUST(pipe(p));
    EQ(fcntl(p[1], F_SETPIPE_SZ, 8192), 8192);
    EQ(write(p[1], "0123", 4), 4);
    fill(block, sizeof(block), 0);
    send_all(tcp[0], block, sizeof(block));
    while (option(tcp[1], SOL_SOCKET, SO_ERROR) == 0 && recv(tcp[1], block, sizeof(block), MSG_PEEK) < 16384)
        nap_ms(1);
    long n = MUST(splice(tcp[1], NULL, p[1], NULL, 16384, 0)); /* and does not wait for more room */
    CHECK(n > 0 && n <= 8192 - 4);
    FAILS(EAGAIN, splice(tcp[1], NULL, p[1], NULL, 16384, SPLICE_F_NONBLOCK));
    EQ(read(p[0], block, 4), 4);
    for (long got = 0; got < n;) {
        long m = MUST(read(p[0], block, sizeof(block)));
        verify(block, (size_t)m, (uint64_t)got);
        got += m;
    }
    for (long got = n; got < 16384;) {
        long m = MUST(recv(tcp[1], block, sizeof(block), 0));
        verify(block, (size_t)m, (uint64_t)got);
        got += m;
    }
}

int main(int argc, char **argv) { return posix_main(argc, argv); }
