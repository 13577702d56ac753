/* SPDX-License-Identifier: Apache-2.0 */
/* fork, vfork, posix_spawn and exec: who holds a connection, and what ends with it. Frame: posix.h. */
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <sys/epoll.h>
#include <sys/prctl.h>

#include "posix.h"

extern char **environ;

enum { MEGABYTE = 1 << 20 };

/* ---- fork ---- */
CASE(parent_accepts_child_serves)
{
    int l = listener(16);
    struct sockaddr_in a = name_of(l);
    pid_t client = (pid_t)MUST(fork());
    if (client == 0) {
        MUST(close(l));
        for (int i = 0; i < 8; i++)
            ask(a);
        _exit(0);
    }
    for (int i = 0; i < 8; i++) {
        int fd = accept_one(l);
        pid_t child = (pid_t)MUST(fork());
        if (child == 0) {
            MUST(close(l));
            serve(fd);
            _exit(0); /* its exit ends the connection */
        }
        MUST(close(fd));
        reap(child);
    }
    reap(client);
}

CASE(workers_share_a_listener)
{
    int l = listener(16);
    struct sockaddr_in a = name_of(l);
    pid_t w[3];
    for (int i = 0; i < 3; i++)
        w[i] = forked(worker, l, 5);
    for (int i = 0; i < 15; i++)
        ask(a);
    for (int i = 0; i < 3; i++)
        reap(w[i]);
}

static void epoll_worker(int l, int stop)
{
    int ep = (int)MUST(epoll_create1(0));
    struct epoll_event e = {.events = EPOLLIN | EPOLLEXCLUSIVE, .data.fd = l}, s = {.events = EPOLLIN, .data.fd = stop};
    MUST(epoll_ctl(ep, EPOLL_CTL_ADD, l, &e));
    MUST(epoll_ctl(ep, EPOLL_CTL_ADD, stop, &s));
    for (;;) {
        MUST(epoll_wait(ep, &e, 1, -1));
        if (e.data.fd == stop)
            break;
        int fd = accept(l, NULL, NULL); /* another may have been quicker */
        if (fd == -1) {
            EQ(errno, EAGAIN);
            continue;
        }
        serve(fd);
        MUST(close(fd));
    }
}

CASE(workers_with_epoll)
{
    int l = listener(32), stop[2];
    struct sockaddr_in a = name_of(l);
    pid_t w[3];
    nonblocking(l);
    MUST(pipe(stop));
    for (int i = 0; i < 3; i++)
        w[i] = forked(epoll_worker, l, stop[0]);
    for (int i = 0; i < 30; i++)
        ask(a);
    EQ(write(stop[1], "stop", 4), 4);
    for (int i = 0; i < 3; i++)
        reap(w[i]);
}

CASE(a_connection_lives_as_long_as_anyone_holds_it)
{
    int fds[2], p[2];
    char c;
    tcp_pair(fds);
    MUST(pipe(p));
    pid_t child = (pid_t)MUST(fork());
    if (child == 0) {
        MUST(close(fds[1]));
        MUST(close(p[1]));
        EQ(read(p[0], &c, 1), 1);
        says(fds[0], "from the child");
        _exit(0);
    }
    says(fds[0], "from the parent");
    MUST(close(fds[0]));
    hears(fds[1], "from the parent");
    EQ(ready(fds[1]), POLLOUT);
    EQ(write(p[1], "x", 1), 1);
    hears(fds[1], "from the child");
    hears_end(fds[1]);
    reap(child);
}

CASE(a_childs_close_is_its_own)
{
    int fds[2], l = listener(4);
    tcp_pair(fds);
    pid_t child = (pid_t)MUST(fork());
    if (child == 0) {
        closefrom(3); /* as a daemon does, or one who saves in the background */
        _exit(0);
    }
    reap(child);
    says(fds[0], "there still");
    hears(fds[1], "there still");
    says(client_of(l), "this too");
    hears(accept_one(l), "this too");
}

CASE(a_childs_shutdown_is_everybodys)
{
    int fds[2];
    tcp_pair(fds);
    pid_t child = (pid_t)MUST(fork());
    if (child == 0) {
        MUST(shutdown(fds[0], SHUT_WR));
        _exit(0);
    }
    hears_end(fds[1]);
    FAILS(EPIPE, send(fds[0], "x", 1, MSG_NOSIGNAL));
    reap(child);
}

CASE(settings_are_shared_with_a_child)
{
    int fds[2];
    tcp_pair(fds);
    pid_t child = (pid_t)MUST(fork());
    if (child == 0) {
        nonblocking(fds[0]);
        set_option(fds[0], IPPROTO_TCP, TCP_NODELAY, 1);
        MUST(fcntl(fds[0], F_SETFD, FD_CLOEXEC));
        _exit(0);
    }
    reap(child);
    EQ(fcntl(fds[0], F_GETFL), O_RDWR | O_NONBLOCK);
    EQ(option(fds[0], IPPROTO_TCP, TCP_NODELAY), 1);
    EQ(fcntl(fds[0], F_GETFD), 0);
}

static void writes_and_exits(int fd, int how)
{
    pattern_out(fd, MEGABYTE);
    if (how == 1)
        MUST(close(fd));
    if (how == 2)
        exit(0);
}

CASE(write_close_exit_loses_nothing)
{
    for (int how = 0; how < 3; how++) {
        int fds[2];
        tcp_pair(fds);
        pid_t child = (pid_t)MUST(fork());
        if (child == 0) {
            MUST(close(fds[1]));
            writes_and_exits(fds[0], how);
            _exit(0);
        }
        MUST(close(fds[0]));
        nap_ms(20); /* the child has gone before most is read */
        EQ(pattern_in(fds[1]), MEGABYTE);
        reap(child);
    }
}

CASE(a_killed_process_leaves_its_peer_an_end)
{
    int fds[2];
    tcp_pair(fds);
    pid_t child = (pid_t)MUST(fork());
    if (child == 0) {
        MUST(close(fds[1]));
        says(fds[0], "last words");
        pause();
        _exit(0);
    }
    MUST(close(fds[0]));
    hears(fds[1], "last words");
    MUST(kill(child, SIGKILL));
    hears_end(fds[1]);
    EQ(waitpid(child, NULL, 0), child);
}

CASE(a_grandchild_serves_on)
{
    int l = listener(8), status;
    struct sockaddr_in a = name_of(l);
    MUST(prctl(PR_SET_CHILD_SUBREAPER, 1));
    pid_t child = (pid_t)MUST(fork());
    if (child == 0) { /* daemon(3) */
        if (MUST(fork()) == 0) {
            MUST(setsid());
            alarm(60); /* out of reach of whoever ends the case */
            worker(l, 3);
        }
        _exit(0);
    }
    reap(child);
    MUST(close(l));
    for (int i = 0; i < 3; i++)
        ask(a);
    MUST(wait(&status));
    EQ(status, 0);
}

CASE(an_epoll_set_is_shared_with_a_child)
{
    int fds[2], ep = (int)MUST(epoll_create1(0));
    struct epoll_event e = {.events = EPOLLIN, .data.u32 = 77};
    tcp_pair(fds);
    MUST(epoll_ctl(ep, EPOLL_CTL_ADD, fds[1], &e));
    pid_t child = (pid_t)MUST(fork());
    if (child == 0) {
        EQ(epoll_wait(ep, &e, 1, -1), 1);
        EQ(e.data.u32, 77);
        hears(fds[1], "for the child");
        _exit(0);
    }
    says(fds[0], "for the child");
    reap(child);
    EQ(epoll_wait(ep, &e, 1, 0), 0);
    says(fds[0], "x");
    EQ(epoll_wait(ep, &e, 1, -1), 1);
}

static void *blocked_in_recv(void *arg)
{
    hears(*(int *)arg, "x");
    return NULL;
}

CASE(fork_while_a_thread_sleeps_in_recv)
{
    int fds[2], more[2];
    pthread_t t;
    tcp_pair(fds);
    tcp_pair(more);
    CHECK(pthread_create(&t, NULL, blocked_in_recv, &fds[1]) == 0);
    nap_ms(30);
    pid_t child = (pid_t)MUST(fork());
    if (child == 0) {
        says(more[0], "child is well");
        hears(more[1], "child is well");
        says(fds[0], "x"); /* wakes the parent's thread */
        _exit(0);
    }
    pthread_join(t, NULL);
    reap(child);
}

CASE(both_write_after_a_fork)
{
    enum { LINES = 200, LINE = 8 };
    int fds[2], seen[2] = {0, 0};
    char got[LINE];
    tcp_pair(fds);
    pid_t child = (pid_t)MUST(fork());
    for (int i = 0; i < LINES; i++)
        EQ(send(fds[0], child ? "parents\n" : "childs..", LINE, 0), LINE); /* each call's bytes stay together */
    if (child == 0)
        _exit(0);
    for (int i = 0; i < 2 * LINES; i++) {
        recv_all(fds[1], got, LINE);
        CHECK(memcmp(got, "parents\n", LINE) == 0 || memcmp(got, "childs..", LINE) == 0);
        seen[got[0] == 'p']++;
    }
    EQ(seen[0], LINES);
    EQ(seen[1], LINES);
    reap(child);
}

/* ---- SO_LINGER: close() waits, and somebody else decides for how long ---- */
static int filled_and_lingering(int fds[2])
{
    char block[4096] = {0};
    tcp_pair(fds);
    MUST(setsockopt(fds[0], SOL_SOCKET, SO_LINGER, &(struct linger){1, 60}, sizeof(struct linger)));
    int sent = 0;
    for (ssize_t n; (n = send(fds[0], block, sizeof(block), MSG_DONTWAIT)) > 0;)
        sent += (int)n;
    return sent;
}

CASE(close_waits_until_all_is_sent)
{
    int fds[2], began[2], closed[2];
    char c;
    MUST(pipe(began));
    MUST(pipe(closed));
    int sent = filled_and_lingering(fds);
    pid_t child = (pid_t)MUST(fork());
    if (child == 0) {
        char block[4096];
        MUST(close(fds[0]));
        EQ(write(closed[1], "c", 1), 1);
        nap_ms(100);
        EQ(write(began[1], "b", 1), 1);
        for (int got = 0; got < sent;)
            got += (int)MUST(recv(fds[1], block, sizeof(block), 0));
        hears_end(fds[1]);
        _exit(0);
    }
    MUST(close(fds[1]));
    EQ(read(closed[0], &c, 1), 1); /* ours is the last */
    MUST(close(fds[0]));
    EQ(ready(began[0]) & POLLIN, POLLIN);
    reap(child);
}

CASE(close_waits_no_longer_when_the_peer_resets)
{
    int fds[2], closed[2];
    char c;
    MUST(pipe(closed));
    filled_and_lingering(fds);
    pid_t child = (pid_t)MUST(fork());
    if (child == 0) {
        MUST(close(fds[0]));
        EQ(write(closed[1], "c", 1), 1);
        nap_ms(100);
        _exit(0); /* with what it has not read: a reset */
    }
    MUST(close(fds[1]));
    EQ(read(closed[0], &c, 1), 1);
    MUST(close(fds[0]));
    reap(child);
}

/* ---- exec ---- */
static void becomes(char *const argv[], int fd)
{
    MUST(dup2(fd, 0));
    MUST(dup2(fd, 1));
    closefrom(3);
    execv(argv[0], argv);
    _exit(127);
}

CASE(a_program_on_a_connection)
{
    int fds[2];
    tcp_pair(fds);
    pid_t child = (pid_t)MUST(fork());
    if (child == 0)
        becomes((char *[]){"/bin/cat", NULL}, fds[1]);
    MUST(close(fds[1]));
    says(fds[0], "through cat\n");
    hears(fds[0], "through cat\n");
    pattern_out(fds[0], 20000); /* less than the buffers hold: nobody reads meanwhile */
    MUST(shutdown(fds[0], SHUT_WR));
    EQ(pattern_in(fds[0]), 20000);
    reap(child);
}

CASE(what_was_not_read_is_there_after_exec)
{
    int fds[2];
    tcp_pair(fds);
    says(fds[0], "already here\n");
    wait_ready(fds[1], POLLIN);
    pid_t child = (pid_t)MUST(fork());
    if (child == 0)
        becomes((char *[]){"/bin/sh", "-c", "read -r line; echo \"got $line\"", NULL}, fds[1]);
    MUST(close(fds[1]));
    hears(fds[0], "got already here\n");
    hears_end(fds[0]);
    reap(child);
}

static void after_exec(const char *mode, int fd)
{
    if (strcmp(mode, "listener") == 0) {
        worker(fd, 2);
    } else if (strcmp(mode, "gone") == 0) {
        FAILS(EBADF, fcntl(fd, F_GETFD));
    } else if (strcmp(mode, "datagram") == 0) {
        char got[8];
        EQ(recv(fd, got, sizeof(got), 0), 4);
        EQ(send(fd, got, 4, 0), 4);
    } else if (strcmp(mode, "settings") == 0) {
        EQ(fcntl(fd, F_GETFL), O_RDWR | O_NONBLOCK);
        EQ(option(fd, IPPROTO_TCP, TCP_NODELAY), 1);
        CHECK(peer_of(fd).sin_port != 0);
        says(fd, "as before");
    } else {
        posix_fail(__FILE__, __LINE__, mode, 0, 0);
    }
}

static pid_t execs_itself(const char *mode, int fd)
{
    char number[16];
    snprintf(number, sizeof(number), "%d", fd);
    pid_t pid = (pid_t)MUST(fork());
    if (pid == 0) {
        execl(posix_self, posix_self, "--after-exec", mode, number, NULL);
        _exit(127);
    }
    return pid;
}

CASE(exec_with_a_listener)
{
    int l = listener(8);
    struct sockaddr_in a = name_of(l);
    pid_t child = execs_itself("listener", l);
    MUST(close(l));
    ask(a);
    ask(a);
    reap(child);
    int fd = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    FAILS(ECONNREFUSED, connect(fd, (struct sockaddr *)&a, sizeof(a)));
}

CASE(exec_closes_what_is_marked)
{
    int fds[2];
    tcp_pair(fds);
    MUST(fcntl(fds[0], F_SETFD, FD_CLOEXEC));
    pid_t child = execs_itself("gone", fds[0]);
    MUST(close(fds[0]));
    hears_end(fds[1]); /* the parent's and the child's are gone */
    reap(child);
}

CASE(exec_keeps_what_was_set)
{
    int fds[2];
    tcp_pair(fds);
    nonblocking(fds[0]);
    set_option(fds[0], IPPROTO_TCP, TCP_NODELAY, 1);
    pid_t child = execs_itself("settings", fds[0]);
    hears(fds[1], "as before");
    reap(child);
}

CASE(exec_with_a_datagram_socket)
{
    int fds[2];
    char got[8];
    udp_pair(fds);
    pid_t child = execs_itself("datagram", fds[1]);
    EQ(send(fds[0], "echo", 4, 0), 4);
    EQ(recv(fds[0], got, sizeof(got), 0), 4);
    reap(child);
}

CASE(posix_spawn_with_file_actions)
{
    int fds[2];
    pid_t child;
    posix_spawn_file_actions_t actions;
    tcp_pair(fds);
    CHECK(posix_spawn_file_actions_init(&actions) == 0);
    CHECK(posix_spawn_file_actions_adddup2(&actions, fds[1], 0) == 0);
    CHECK(posix_spawn_file_actions_adddup2(&actions, fds[1], 1) == 0);
    CHECK(posix_spawn_file_actions_addclosefrom_np(&actions, 3) == 0);
    CHECK(posix_spawn(&child, "/bin/cat", &actions, NULL, (char *[]){"cat", NULL}, environ) == 0);
    CHECK(posix_spawn_file_actions_destroy(&actions) == 0);
    MUST(close(fds[1]));
    says(fds[0], "spawned");
    hears(fds[0], "spawned");
    MUST(shutdown(fds[0], SHUT_WR));
    hears_end(fds[0]);
    reap(child);
}

CASE(vfork_and_exec)
{
    int fds[2];
    tcp_pair(fds);
    pid_t child = vfork();
    if (child == 0) {
        dup2(fds[1], 0);
        dup2(fds[1], 1);
        close(fds[0]);
        close(fds[1]); /* of the child's table; in the parent's memory nothing may change */
        execl("/bin/cat", "cat", NULL);
        _exit(127);
    }
    says(fds[0], "after vfork");
    MUST(close(fds[1]));
    hears(fds[0], "after vfork");
    MUST(shutdown(fds[0], SHUT_WR));
    hears_end(fds[0]);
    reap(child);
}

CASE(vfork_that_fails)
{
    int fds[2];
    tcp_pair(fds);
    pid_t child = vfork();
    if (child == 0) {
        close(fds[0]);
        close(fds[1]);
        execl("/nonexistent", "nonexistent", NULL);
        _exit(0);
    }
    reap(child);
    says(fds[0], "unharmed");
    hears(fds[1], "unharmed");
    MUST(close(fds[0]));
    hears_end(fds[1]);
}

CASE(system_and_popen)
{
    int fds[2];
    char line[32];
    tcp_pair(fds);
    EQ(system("exit 7"), 7 << 8);
    FILE *p = popen("echo from a pipe", "r");
    CHECK(p && fgets(line, sizeof(line), p) && strcmp(line, "from a pipe\n") == 0);
    EQ(pclose(p), 0);
    char command[64];
    snprintf(command, sizeof(command), "echo by the shell >&%d", fds[0]);
    EQ(fds[0] < 10, 1); /* numbers of one digit only: dash */
    EQ(system(command), 0);
    hears(fds[1], "by the shell\n");
    says(fds[0], "and on");
    hears(fds[1], "and on");
}

int main(int argc, char **argv)
{
    if (argc == 4 && strcmp(argv[1], "--after-exec") == 0) {
        posix_self = argv[0];
        after_exec(argv[2], atoi(argv[3]));
        return 0;
    }
    return posix_main(argc, argv);
}
