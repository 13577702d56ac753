/* SPDX-License-Identifier: Apache-2.0 */
/* Signals that arrive while a call sleeps or works: EINTR, restarts, masks, SIGPIPE, handlers that call. Frame: posix.h. */
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/time.h>

#include "posix.h"

static volatile sig_atomic_t caught, write_fd = -1;

static void counts(int sig)
{
    (void)sig;
    caught++;
}

static void handle(int sig, void (*how)(int), int flags)
{
    struct sigaction a = {.sa_handler = how, .sa_flags = flags};
    MUST(sigaction(sig, &a, NULL));
}

/* SIGALRM again and again: the first may come before the call that it is to interrupt. */
static void alarms(int every_us)
{
    struct itimerval t = {{0, every_us}, {0, every_us}};
    MUST(setitimer(ITIMER_REAL, &t, NULL));
}

static void quiet(void) { alarms(0); }

/* ---- Without SA_RESTART ---- */
CASE(calls_are_interrupted)
{
    int fds[2], l = listener(4), ep = (int)MUST(epoll_create1(0));
    char c;
    struct epoll_event e = {.events = EPOLLIN};
    struct iovec v = {&c, 1};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};
    tcp_pair(fds);
    MUST(epoll_ctl(ep, EPOLL_CTL_ADD, fds[0], &e));
    handle(SIGALRM, counts, 0);
    alarms(10000);
    FAILS(EINTR, recv(fds[0], &c, 1, 0));
    FAILS(EINTR, read(fds[0], &c, 1));
    FAILS(EINTR, recvmsg(fds[0], &m, 0));
    FAILS(EINTR, accept(l, NULL, NULL));
    struct pollfd p = {fds[0], POLLIN, 0};
    FAILS(EINTR, poll(&p, 1, -1));
    fd_set r;
    FD_ZERO(&r);
    FD_SET(fds[0], &r);
    FAILS(EINTR, select(fds[0] + 1, &r, NULL, NULL, NULL));
    FAILS(EINTR, epoll_wait(ep, &e, 1, -1));
    quiet();
    CHECK(caught >= 7);
    says(fds[1], "fine");
    hears(fds[0], "fine");
}

CASE(a_full_send_is_interrupted)
{
    int fds[2];
    static uint8_t block[1 << 20];
    uint64_t sent = 0, got = 0;
    tcp_pair(fds);
    handle(SIGALRM, counts, 0);
    alarms(20000);
    for (;;) { /* what went is told; when nothing went: EINTR */
        fill(block, sizeof(block), sent);
        long n = send(fds[0], block, sizeof(block), 0);
        if (n == -1)
            break;
        CHECK(n > 0);
        sent += (uint64_t)n;
    }
    EQ(errno, EINTR);
    quiet();
    MUST(shutdown(fds[0], SHUT_WR));
    got = pattern_in(fds[1]);
    EQ(got, sent);
}

/* ---- With SA_RESTART ---- */
static void *speaks_after_signals(void *arg)
{
    int fd = *(int *)arg;
    while (caught < 5)
        nap_ms(5);
    says(fd, "after all");
    return NULL;
}

CASE(recv_is_restarted)
{
    int fds[2];
    pthread_t t;
    char got[9];
    tcp_pair(fds);
    handle(SIGALRM, counts, SA_RESTART);
    CHECK(pthread_create(&t, NULL, speaks_after_signals, &fds[0]) == 0);
    alarms(10000);
    long n = recv(fds[1], got, sizeof(got), MSG_WAITALL);
    quiet();
    EQ(n, 9);
    CHECK(memcmp(got, "after all", 9) == 0 && caught >= 5);
    pthread_join(t, NULL);
}

static void *connects_after_signals(void *arg)
{
    while (caught < 5)
        nap_ms(5);
    return (void *)(intptr_t)connect_to(*(struct sockaddr_in *)arg);
}

CASE(accept_is_restarted)
{
    int l = listener(4);
    pthread_t t;
    struct sockaddr_in a = name_of(l);
    handle(SIGALRM, counts, SA_RESTART);
    CHECK(pthread_create(&t, NULL, connects_after_signals, &a) == 0);
    alarms(10000);
    long fd = accept(l, NULL, NULL);
    quiet();
    CHECK(fd >= 0 && caught >= 5);
    pthread_join(t, NULL);
}

CASE(waiting_for_readiness_is_never_restarted)
{
    int fds[2], ep = (int)MUST(epoll_create1(0));
    struct epoll_event e = {.events = EPOLLIN};
    tcp_pair(fds);
    MUST(epoll_ctl(ep, EPOLL_CTL_ADD, fds[0], &e));
    handle(SIGALRM, counts, SA_RESTART);
    alarms(10000);
    struct pollfd p = {fds[0], POLLIN, 0};
    FAILS(EINTR, poll(&p, 1, -1)); /* signal(7) */
    FAILS(EINTR, epoll_wait(ep, &e, 1, -1));
    FAILS(EINTR, pselect(0, NULL, NULL, NULL, NULL, NULL));
    quiet();
}

CASE(a_call_with_a_timeout_is_never_restarted)
{
    int fds[2], l = listener(4);
    char c;
    tcp_pair(fds);
    set_timeout(fds[0], SO_RCVTIMEO, 60000);
    set_timeout(l, SO_RCVTIMEO, 60000);
    handle(SIGALRM, counts, SA_RESTART);
    alarms(10000);
    FAILS(EINTR, recv(fds[0], &c, 1, 0)); /* signal(7): SO_RCVTIMEO set */
    FAILS(EINTR, accept(l, NULL, NULL));
    quiet();
}

CASE(an_ignored_signal_interrupts_nothing)
{
    int fds[2];
    pthread_t t;
    tcp_pair(fds);
    handle(SIGALRM, SIG_IGN, 0);
    alarms(5000);
    caught = 5;
    CHECK(pthread_create(&t, NULL, speaks_after_signals, &fds[0]) == 0);
    nap_ms(50);
    hears(fds[1], "after all");
    quiet();
    pthread_join(t, NULL);
}

CASE(part_of_what_was_asked_is_no_error)
{
    int fds[2];
    char got[8];
    tcp_pair(fds);
    handle(SIGALRM, counts, 0);
    says(fds[0], "abc");
    wait_ready(fds[1], POLLIN);
    alarms(20000);
    EQ(recv(fds[1], got, 8, MSG_WAITALL), 3);
    quiet();
    CHECK(caught >= 1);
}

/* ---- SIGPIPE ---- */
CASE(sigpipe)
{
    int fds[2];
    tcp_pair(fds);
    handle(SIGPIPE, counts, 0);
    MUST(shutdown(fds[0], SHUT_WR));
    FAILS(EPIPE, send(fds[0], "x", 1, MSG_NOSIGNAL));
    EQ(caught, 0);
    FAILS(EPIPE, send(fds[0], "x", 1, 0));
    EQ(caught, 1);
    FAILS(EPIPE, write(fds[0], "x", 1));
    EQ(caught, 2);
    FAILS(EPIPE, dprintf(fds[0], "x"));
    EQ(caught, 3);
    sigset_t all, pending;
    sigfillset(&all);
    MUST(sigprocmask(SIG_BLOCK, &all, NULL));
    FAILS(EPIPE, write(fds[0], "x", 1)); /* blocked: it waits */
    EQ(caught, 3);
    MUST(sigpending(&pending));
    EQ(sigismember(&pending, SIGPIPE), 1);
    MUST(sigprocmask(SIG_UNBLOCK, &all, NULL));
    EQ(caught, 4);
}

CASE(sigpipe_ends_who_does_not_handle_it)
{
    int status, fds[2];
    tcp_pair(fds);
    MUST(shutdown(fds[0], SHUT_WR));
    pid_t pid = (pid_t)MUST(fork());
    if (pid == 0) {
        handle(SIGPIPE, SIG_DFL, 0);
        if (write(fds[0], "x", 1) == -1)
            _exit(2);
        _exit(3);
    }
    EQ(waitpid(pid, &status, 0), pid);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGPIPE);
}

/* ---- Masks ---- */
CASE(masks_of_ppoll_pselect_and_epoll_pwait)
{
    int fds[2], ep = (int)MUST(epoll_create1(0));
    struct epoll_event e = {.events = EPOLLIN};
    sigset_t usr1, none;
    tcp_pair(fds);
    MUST(epoll_ctl(ep, EPOLL_CTL_ADD, fds[0], &e));
    handle(SIGUSR1, counts, 0);
    sigemptyset(&none);
    sigemptyset(&usr1);
    sigaddset(&usr1, SIGUSR1);
    MUST(sigprocmask(SIG_BLOCK, &usr1, NULL));
    MUST(raise(SIGUSR1));
    EQ(caught, 0);
    FAILS(EINTR, epoll_pwait(ep, &e, 1, -1, &none));
    EQ(caught, 1);
    MUST(raise(SIGUSR1));
    struct pollfd p = {fds[0], POLLIN, 0};
    FAILS(EINTR, ppoll(&p, 1, NULL, &none));
    EQ(caught, 2);
    MUST(raise(SIGUSR1));
    fd_set r;
    FD_ZERO(&r);
    FD_SET(fds[0], &r);
    FAILS(EINTR, pselect(fds[0] + 1, &r, NULL, NULL, NULL, &none));
    EQ(caught, 3);
    MUST(raise(SIGUSR1));
    struct timespec t = {60, 0};
    FAILS(EINTR, epoll_pwait2(ep, &e, 1, &t, &none));
    EQ(caught, 4);
    MUST(raise(SIGUSR1));
    EQ(epoll_wait(ep, &e, 1, 20), 0); /* blocked again */
    EQ(caught, 4);
    says(fds[1], "x");
    wait_ready(fds[0], POLLIN);
    EQ(epoll_pwait(ep, &e, 1, -1, &usr1), 1); /* blocked in the call as well */
    EQ(caught, 4);
}

CASE(a_mask_that_blocks_keeps_the_call_asleep)
{
    int fds[2], ep = (int)MUST(epoll_create1(0));
    struct epoll_event e = {.events = EPOLLIN};
    sigset_t alrm;
    pthread_t t;
    tcp_pair(fds);
    MUST(epoll_ctl(ep, EPOLL_CTL_ADD, fds[1], &e));
    sigemptyset(&alrm);
    sigaddset(&alrm, SIGALRM);
    handle(SIGALRM, counts, 0);
    caught = 5; /* the other thread speaks at once */
    MUST(pthread_sigmask(SIG_BLOCK, &alrm, NULL));
    CHECK(pthread_create(&t, NULL, speaks_after_signals, &fds[0]) == 0);
    pthread_join(t, NULL);
    MUST(pthread_sigmask(SIG_UNBLOCK, &alrm, NULL));
    hears(fds[1], "after all");
    alarms(10000);
    EQ(epoll_pwait(ep, &e, 1, 60, &alrm), 0);
    quiet();
}

/* ---- Handlers that work ---- */
static void writes(int sig)
{
    (void)sig;
    int kept = errno;
    if (write_fd >= 0 && write(write_fd, "s", 1) == 1)
        caught++;
    errno = kept;
}

CASE(a_handler_writes_to_another_socket_of_the_stack)
{
    int bulk[2], wake[2];
    static uint8_t got[1 << 16];
    tcp_pair(bulk);
    tcp_pair(wake);
    write_fd = wake[0];
    pid_t child = (pid_t)MUST(fork());
    if (child == 0) {
        MUST(close(bulk[1]));
        pattern_out(bulk[0], 8 << 20);
        _exit(0);
    }
    MUST(close(bulk[0]));
    handle(SIGALRM, writes, SA_RESTART);
    alarms(1000);
    uint64_t sum = 0;
    long n;
    while ((n = recv(bulk[1], got, sizeof(got), 0)) > 0) {
        verify(got, (size_t)n, sum);
        sum += (uint64_t)n;
    }
    quiet();
    EQ(n, 0);
    EQ(sum, 8 << 20);
    reap(child);
    MUST(raise(SIGALRM)); /* once at least */
    MUST(close(wake[0]));
    long heard = 0;
    while ((n = MUST(recv(wake[1], got, sizeof(got), 0))) > 0)
        heard += n;
    EQ(heard, caught);
}

CASE(a_handler_writes_to_the_same_socket)
{
    int fds[2];
    char got[8];
    tcp_pair(fds);
    write_fd = fds[0];
    handle(SIGALRM, writes, SA_RESTART);
    alarms(20000);
    long n = recv(fds[1], got, 1, 0); /* what it waits for is sent by its own handler */
    quiet();
    EQ(n, 1);
    EQ(got[0], 's');
}

static sigjmp_buf out;

static void jumps(int sig)
{
    (void)sig;
    siglongjmp(out, 1);
}

CASE(a_handler_jumps_out_of_recv)
{
    int fds[2];
    char c;
    tcp_pair(fds);
    handle(SIGALRM, jumps, 0);
    for (volatile int i = 0; i < 5; i++) {
        if (sigsetjmp(out, 1) == 0) {
            struct itimerval once = {{0, 0}, {0, 20000}};
            MUST(setitimer(ITIMER_REAL, &once, NULL));
            (void)!recv(fds[0], &c, 1, 0);
            posix_fail(__FILE__, __LINE__, "recv() returned", 0, errno);
        }
        says(fds[1], "x");
        hears(fds[0], "x");
    }
}

static void *receives_one(void *arg)
{
    char c;
    long n = recv(*(int *)arg, &c, 1, 0);
    return (void *)(intptr_t)(n == -1 ? -errno : n);
}

CASE(a_signal_for_one_thread)
{
    int fds[2];
    void *result = NULL;
    pthread_t t;
    tcp_pair(fds);
    handle(SIGUSR2, counts, 0);
    CHECK(pthread_create(&t, NULL, receives_one, &fds[0]) == 0);
    do {
        nap_ms(10);
        pthread_kill(t, SIGUSR2);
    } while (pthread_tryjoin_np(t, &result) == EBUSY);
    EQ((intptr_t)result, -EINTR);
    CHECK(caught >= 1);
}

static void *sends_much(void *arg)
{
    int fd = *(int *)arg;
    pattern_out(fd, 16 << 20); /* with SA_RESTART no call may be seen as interrupted */
    MUST(shutdown(fd, SHUT_WR));
    return NULL;
}

CASE(bulk_under_a_storm_of_signals)
{
    int fds[2];
    pthread_t t;
    tcp_pair(fds);
    handle(SIGALRM, counts, SA_RESTART);
    alarms(500);
    CHECK(pthread_create(&t, NULL, sends_much, &fds[0]) == 0);
    EQ(pattern_in(fds[1]), 16 << 20);
    quiet();
    pthread_join(t, NULL);
    CHECK(caught > 0);
}

CASE(handlers_see_masks_and_stacks_as_set)
{
    int fds[2];
    char c;
    struct sigaction a = {.sa_handler = counts}, got;
    sigaddset(&a.sa_mask, SIGUSR1);
    tcp_pair(fds);
    MUST(sigaction(SIGALRM, &a, NULL));
    MUST(sigaction(SIGALRM, NULL, &got));
    CHECK(got.sa_handler == counts && sigismember(&got.sa_mask, SIGUSR1) == 1);
    alarms(10000);
    FAILS(EINTR, recv(fds[0], &c, 1, 0));
    quiet();
    CHECK(signal(SIGALRM, SIG_DFL) == counts);
    CHECK(signal(SIGUSR1, counts) == SIG_DFL);
    MUST(sigaction(SIGUSR1, NULL, &got));
    CHECK(got.sa_handler == counts && (got.sa_flags & SA_RESTART));
}

int main(int argc, char **argv) { return posix_main(argc, argv); }
