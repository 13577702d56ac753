/* SPDX-License-Identifier: Apache-2.0 */
/* A relative is killed in the middle of the stack: what its sockets are, and are to be, they are afterwards. Frame: posix.h. */
#include <signal.h>

#include "posix.h"

enum { MOST_KILLS = 200, KILLS = 5 };

/* Sends and receives without end: on the stack it is in there nearly always. */
static void works_without_end(int a, int b)
{
    char c = 0;
    for (;;) {
        EQ(send(a, &c, 1, 0), 1);
        EQ(recv(b, &c, 1, 0), 1);
    }
}

static void killed_while_it_works(void)
{
    int fds[2], ready[2];
    char c;
    MUST(pipe(ready));
    pid_t pid = (pid_t)MUST(fork());
    if (pid == 0) {
        udp_pair(fds);
        EQ(write(ready[1], "", 1), 1);
        works_without_end(fds[0], fds[1]);
    }
    EQ(read(ready[0], &c, 1), 1);
    nap_ms(3);
    MUST(kill(pid, SIGKILL));
    EQ(waitpid(pid, NULL, 0), pid);
    MUST(close(ready[0]));
    MUST(close(ready[1]));
}

/* On the stack all connections are over when it was made anew; on the kernel nothing happens. */
static void kill_relatives(void)
{
    bool stack = getenv("LD_PRELOAD") != NULL;
    int fds[2], kills = 0;
    char c;
    tcp_pair(fds);
    for (;; kills++) {
        CHECK(kills < MOST_KILLS);
        if (recv(fds[0], &c, 1, MSG_DONTWAIT) == -1 && errno == ECONNRESET)
            break;
        EQ(errno, EAGAIN);
        if (!stack && kills == KILLS)
            break;
        killed_while_it_works();
    }
    MUST(close(fds[0]));
    MUST(close(fds[1]));
}

static const struct {
    int level, name, value, told;
} settings[] = {
    {SOL_SOCKET, SO_KEEPALIVE, 1, 1},   {SOL_SOCKET, SO_RCVBUF, 60000, 120000},
    {IPPROTO_IP, IP_TTL, 33, 33},       {IPPROTO_IP, IP_TOS, 16, 16},
    {IPPROTO_TCP, TCP_NODELAY, 1, 1},   {IPPROTO_TCP, TCP_KEEPIDLE, 77, 77},
    {IPPROTO_TCP, TCP_KEEPINTVL, 7, 7}, {IPPROTO_TCP, TCP_KEEPCNT, 3, 3},
    {IPPROTO_TCP, TCP_LINGER2, 5, 5},   {IPPROTO_TCP, TCP_USER_TIMEOUT, 1234, 1234},
    {SOL_SOCKET, SO_OOBINLINE, 1, 1},
};
enum { SETTINGS = sizeof(settings) / sizeof(*settings) };

static void has_them(int fd)
{
    char name[16] = "";
    socklen_t len = sizeof(name);
    struct linger l = {0};
    for (size_t i = 0; i < SETTINGS; i++) {
        if (option(fd, settings[i].level, settings[i].name) != settings[i].told)
            posix_fail(__FILE__, __LINE__, "option", settings[i].name, option(fd, settings[i].level, settings[i].name));
    }
    MUST(getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name, &len));
    CHECK(strcmp(name, "reno") == 0);
    len = sizeof(l);
    MUST(getsockopt(fd, SOL_SOCKET, SO_LINGER, &l, &len));
    CHECK(l.l_onoff == 1 && l.l_linger == 9);
}

CASE(a_listener_keeps_its_options)
{
    int l = listener(5), plain = listener(5);
    struct linger linger = {.l_onoff = 1, .l_linger = 9};
    for (size_t i = 0; i < SETTINGS; i++)
        set_option(l, settings[i].level, settings[i].name, settings[i].value);
    MUST(setsockopt(l, IPPROTO_TCP, TCP_CONGESTION, "reno", 4));
    MUST(setsockopt(l, SOL_SOCKET, SO_LINGER, &linger, sizeof(linger)));
    has_them(l);
    int before = option(plain, SOL_SOCKET, SO_SNDBUF);
    kill_relatives();
    has_them(l);
    int client = client_of(l), got = accept_one(l);
    has_them(got);
    says(client, "hello");
    hears(got, "hello");
    EQ(option(plain, SOL_SOCKET, SO_SNDBUF), before);
    EQ(option(plain, SOL_SOCKET, SO_KEEPALIVE), 0);
}

CASE(a_fresh_socket_keeps_its_options)
{
    int l = listener(5), fd = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    struct sockaddr_in to = name_of(l);
    set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
    set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, 77);
    kill_relatives();
    MUST(connect(fd, (struct sockaddr *)&to, sizeof(to)));
    EQ(option(fd, IPPROTO_TCP, TCP_NODELAY), 1);
    EQ(option(fd, IPPROTO_TCP, TCP_KEEPIDLE), 77);
}

CASE(datagram_sockets_keep_options_names_and_peers)
{
    int fds[2], stranger = bound(SOCK_DGRAM), fd = (int)MUST(socket(AF_INET, SOCK_DGRAM, 0));
    char got[8];
    udp_pair(fds);
    struct sockaddr_in to = name_of(stranger), name = name_of(fds[0]);
    set_option(fds[0], IPPROTO_IP, IP_TTL, 33);
    set_option(fds[0], SOL_SOCKET, SO_BROADCAST, 1);
    MUST(connect(fd, (struct sockaddr *)&to, sizeof(to))); /* its port is not of its own choice */
    struct sockaddr_in chosen = name_of(fd);
    kill_relatives();
    CHECK(same_address(name_of(fds[0]), name) && same_address(peer_of(fds[1]), name));
    CHECK(same_address(name_of(fd), chosen) && same_address(peer_of(fd), to));
    EQ(option(fds[0], IPPROTO_IP, IP_TTL), 33);
    EQ(option(fds[0], SOL_SOCKET, SO_BROADCAST), 1);
    EQ(send(fds[0], "there", 5, 0), 5);
    EQ(recv(fds[1], got, sizeof(got), 0), 5);
    EQ(send(fds[1], "back", 4, 0), 4);
    EQ(recv(fds[0], got, sizeof(got), 0), 4);
    EQ(send(fd, "here", 4, 0), 4);
    struct sockaddr_in from;
    socklen_t len = sizeof(from);
    EQ(recvfrom(stranger, got, sizeof(got), 0, (struct sockaddr *)&from, &len), 4);
    CHECK(same_address(from, chosen));
    EQ(sendto(stranger, "no", 2, 0, (struct sockaddr *)&name, sizeof(name)), 2); /* it hears its peer alone */
    FAILS(EAGAIN, recv(fds[0], got, sizeof(got), MSG_DONTWAIT));
}

int main(int argc, char **argv) { return posix_main(argc, argv); }
