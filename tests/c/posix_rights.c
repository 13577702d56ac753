/* SPDX-License-Identifier: Apache-2.0 */
/* Descriptors that are passed on in messages of Unix sockets (SCM_RIGHTS), between relatives. Frame: posix.h. */
#include "posix.h"

extern char **environ;
static char *first_environment[256]; /* as the program was started, before there was a socket */

static void give(int over, const int *fds, size_t n)
{
    union {
        char space[CMSG_SPACE(sizeof(int) * 4)];
        struct cmsghdr align;
    } u = {0};
    struct iovec v = {"F", 1};
    struct msghdr m = {
        .msg_iov = &v, .msg_iovlen = 1, .msg_control = u.space, .msg_controllen = CMSG_SPACE(sizeof(int) * n)};
    struct cmsghdr *c = CMSG_FIRSTHDR(&m);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof(int) * n);
    memcpy(CMSG_DATA(c), fds, sizeof(int) * n);
    EQ(sendmsg(over, &m, 0), 1);
}

static int take(int over, int *fds, size_t room, int flags)
{
    union {
        char space[CMSG_SPACE(sizeof(int) * 4)];
        struct cmsghdr align;
    } u = {0};
    char byte;
    struct iovec v = {&byte, 1};
    struct msghdr m = {
        .msg_iov = &v, .msg_iovlen = 1, .msg_control = u.space, .msg_controllen = CMSG_LEN(sizeof(int) * room)};
    EQ(recvmsg(over, &m, flags), 1);
    EQ(byte, 'F');
    struct cmsghdr *c = CMSG_FIRSTHDR(&m);
    CHECK(c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS);
    size_t n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    memcpy(fds, CMSG_DATA(c), n * sizeof(int));
    return (int)n | ((m.msg_flags & MSG_CTRUNC) ? 256 : 0);
}

CASE(descriptors_passed_within_a_process)
{
    int u[2], fds[2], got[2];
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, u));
    tcp_pair(fds);
    give(u[0], (int[]){fds[0]}, 1);
    MUST(close(fds[0])); /* it lives on in the message */
    EQ(take(u[1], got, 1, MSG_CMSG_CLOEXEC), 1);
    EQ(fcntl(got[0], F_GETFD), FD_CLOEXEC);
    says(got[0], "passed");
    hears(fds[1], "passed");
    MUST(close(got[0]));
    hears_end(fds[1]);
}

CASE(descriptors_passed_to_a_child)
{
    int u[2], fds[2], l, d[2], got[4];
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, u));
    pid_t child = (pid_t)MUST(fork()); /* before there are sockets */
    if (child == 0) {
        EQ(take(u[1], got, 3, 0), 3);
        says(got[0], "by the child");
        worker(got[1], 1);
        EQ(send(got[2], "datagram", 8, 0), 8);
        _exit(0);
    }
    tcp_pair(fds);
    udp_pair(d);
    l = listener(4);
    struct sockaddr_in a = name_of(l);
    give(u[0], (int[]){fds[0], l, d[0]}, 3);
    MUST(close(fds[0]));
    MUST(close(l));
    hears(fds[1], "by the child");
    ask(a);
    char text[16];
    EQ(recv(d[1], text, sizeof(text), 0), 8);
    reap(child);
    hears_end(fds[1]);
}

/* As node's cluster: the environment is a copy from before the fork, and the C library's is replaced before exec. */
CASE(descriptors_passed_to_a_program_that_was_started_before)
{
    int u[2], got;
    char number[12];
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, u));
    pid_t child = (pid_t)MUST(fork());
    if (child == 0) {
        environ = first_environment;
        snprintf(number, sizeof(number), "%d", u[1]);
        execv(posix_self, (char *[]){posix_self, "--take", number, NULL});
        _exit(1);
    }
    int l = listener(4);
    struct sockaddr_in a = name_of(l);
    give(u[0], &l, 1);
    ask(a);
    for (int i = 0; i < 2; i++) {
        int fd = connect_to(a);
        got = accept_one(l);
        give(u[0], &got, 1);
        MUST(close(got));
        says(fd, "question\n");
        hears(fd, "hello question\n");
        hears_end(fd);
        MUST(close(fd));
    }
    reap(child);
}

/* That program: a listener and two connections come. */
static int taker(int over)
{
    int fd;
    EQ(take(over, &fd, 1, 0), 1);
    worker(fd, 1);
    for (int i = 0; i < 2; i++) {
        EQ(take(over, &fd, 1, 0), 1);
        serve(fd);
        MUST(close(fd));
    }
    return 0;
}

CASE(descriptors_passed_from_a_child)
{
    int u[2], got[1];
    MUST(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, u));
    int l = listener(4);
    struct sockaddr_in a = name_of(l);
    pid_t child = (pid_t)MUST(fork());
    if (child == 0) {
        int fd = connect_to(a);
        give(u[1], &fd, 1);
        _exit(0); /* it has gone before the descriptor is used */
    }
    int s = accept_one(l);
    reap(child);
    EQ(take(u[0], got, 1, 0), 1);
    says(got[0], "from the child's");
    hears(s, "from the child's");
}

CASE(no_room_for_all_descriptors)
{
    int u[2], a[2], got[4];
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, u));
    tcp_pair(a);
    give(u[0], a, 2);
    EQ(take(u[1], got, 1, 0), 1 | 256); /* the second is closed by the kernel: MSG_CTRUNC */
    MUST(close(a[0]));
    MUST(close(a[1]));
    MUST(close(got[0]));
}

CASE(an_unread_message_keeps_a_connection)
{
    int u[2], fds[2];
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, u));
    tcp_pair(fds);
    give(u[0], &fds[0], 1);
    MUST(close(fds[0]));
    nap_ms(30);
    EQ(ready(fds[1]), POLLOUT);
    MUST(close(u[1])); /* now nobody can take it */
    hears_end(fds[1]);
}

int main(int argc, char **argv)
{
    for (size_t i = 0; environ[i] && i + 1 < sizeof(first_environment) / sizeof(*first_environment); i++)
        first_environment[i] = strdup(environ[i]);
    if (argc == 3 && strcmp(argv[1], "--take") == 0)
        return taker(atoi(argv[2]));
    return posix_main(argc, argv);
}
