/* SPDX-License-Identifier: Apache-2.0 */
/* How handlers are set and what they are told, while signals come in the middle of everything. Frame: posix.h. */
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/time.h>

#include "posix.h"

#pragma GCC diagnostic ignored "-Wdeprecated-declarations" /* sigset() and siginterrupt() are what is tried */

static volatile sig_atomic_t caught, last_value, order_wrong;
static volatile pid_t from;

static void counts(int sig)
{
    (void)sig;
    caught++;
}

static void counts_other(int sig) { counts(sig); }

static void told(int sig, siginfo_t *info, void *context)
{
    (void)context;
    EQ(info->si_signo, sig);
    EQ(info->si_code, SI_QUEUE);
    order_wrong |= info->si_value.sival_int != last_value + 1;
    last_value = info->si_value.sival_int;
    from = info->si_pid;
    caught++;
}

/* Calls of all kinds until `enough` of what a thread sends has come. */
static void work(int fds[2], int enough)
{
    char buf[4096] = "";

    while (caught < enough) {
        EQ(send(fds[0], buf, sizeof(buf), 0), sizeof(buf));
        recv_all(fds[1], buf, sizeof(buf));
    }
}

static pthread_t main_thread;
static int wanted;

static void *sends(void *arg)
{
    int sig = *(int *)arg;

    for (int i = 1; i <= wanted; i++) {
        union sigval v = {.sival_int = i};
        while (pthread_sigqueue(main_thread, sig, v) == EAGAIN)
            nap_ms(1);
    }
    return NULL;
}

/* ---- What is set is what is read (with a socket: the library is at work then) ---- */
static void with_sockets(void)
{
    int fds[2];

    tcp_pair(fds);
}

CASE(sigaction_tells_what_was_set)
{
    struct sigaction a = {.sa_sigaction = told, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK}, b;
    with_sockets();
    sigemptyset(&a.sa_mask);
    sigaddset(&a.sa_mask, SIGUSR2);
    MUST(sigaction(SIGUSR1, &a, &b));
    CHECK(b.sa_handler == SIG_DFL);
    MUST(sigaction(SIGUSR1, NULL, &b));
    CHECK(b.sa_sigaction == told && (b.sa_flags & ~0x04000000) == a.sa_flags); /* SA_RESTORER */
    EQ(sigismember(&b.sa_mask, SIGUSR2), 1);
    EQ(sigismember(&b.sa_mask, SIGUSR1), 0);
    a = (struct sigaction){.sa_handler = SIG_IGN};
    MUST(sigaction(SIGUSR1, &a, &b));
    CHECK(b.sa_sigaction == told);
    MUST(sigaction(SIGUSR1, NULL, &b));
    CHECK(b.sa_handler == SIG_IGN && !(b.sa_flags & SA_SIGINFO));
    FAILS(EINVAL, sigaction(SIGKILL, &a, NULL));
    FAILS(EINVAL, sigaction(0, NULL, &b));
    FAILS(EINVAL, sigaction(65, &a, NULL));
}

CASE(signal_tells_the_one_before)
{
    with_sockets();
    CHECK(signal(SIGUSR1, counts) == SIG_DFL);
    CHECK(signal(SIGUSR1, counts_other) == counts);
    CHECK(signal(SIGUSR1, SIG_IGN) == counts_other);
    CHECK(signal(SIGUSR1, SIG_DFL) == SIG_IGN);
    errno = 0;
    CHECK(signal(SIGSTOP, counts) == SIG_ERR && errno == EINVAL);
}

static void interrupts(int expected)
{
    int fds[2];
    char c;
    tcp_pair(fds);
    pid_t child = (pid_t)MUST(fork());
    if (child == 0) {
        pid_t parent = getppid();
        for (int i = 0; i < 20; i++) {
            nap_ms(5);
            MUST(kill(parent, SIGUSR1));
        }
        says(fds[1], "x");
        _exit(0);
    }
    long n = recv(fds[0], &c, 1, 0);
    EQ(n == -1 && errno == EINTR, expected);
    reap(child);
}

CASE(signal_restarts_calls)
{
    signal(SIGUSR1, counts);
    interrupts(0);
}

CASE(siginterrupt_stops_them)
{
    signal(SIGUSR1, counts);
    MUST(siginterrupt(SIGUSR1, 1));
    interrupts(1);
    signal(SIGUSR1, counts); /* it stays so */
    interrupts(1);
    MUST(siginterrupt(SIGUSR1, 0));
    interrupts(0);
}

CASE(sysv_signal_is_for_once)
{
    struct sigaction now;
    with_sockets();
    CHECK(sysv_signal(SIGUSR1, counts) == SIG_DFL);
    MUST(raise(SIGUSR1));
    EQ(caught, 1);
    MUST(sigaction(SIGUSR1, NULL, &now));
    CHECK(now.sa_handler == SIG_DFL);
}

CASE(sigset_holds_and_releases)
{
    with_sockets();
    CHECK(sigset(SIGUSR1, counts) == SIG_DFL);
    CHECK(sigset(SIGUSR1, SIG_HOLD) == counts);
    MUST(raise(SIGUSR1));
    EQ(caught, 0);
    CHECK(sigset(SIGUSR1, counts_other) == SIG_HOLD); /* unblocked: it comes */
    EQ(caught, 1);
}

/* ---- Signals in the middle of calls ---- */
CASE(queued_signals_keep_order_and_values)
{
    int fds[2], sig = SIGRTMIN + 2;
    struct sigaction a = {.sa_sigaction = told, .sa_flags = SA_SIGINFO | SA_RESTART};
    pthread_t t;
    tcp_pair(fds);
    MUST(sigaction(sig, &a, NULL));
    main_thread = pthread_self();
    wanted = 20000;
    CHECK(pthread_create(&t, NULL, sends, &sig) == 0);
    work(fds, wanted);
    pthread_join(t, NULL);
    EQ(caught, wanted);
    EQ(order_wrong, 0);
    EQ(from, getpid());
}

static volatile sig_atomic_t inside, nested;

static void never_within_itself(int sig)
{
    nested |= inside;
    inside = 1;
    for (volatile int i = 0; i < 200; i++) {}
    inside = 0;
    counts(sig);
}

CASE(a_handler_is_not_interrupted_by_what_it_masks)
{
    int fds[2], sigs[2] = {SIGRTMIN + 2, SIGRTMIN + 3};
    struct sigaction a = {.sa_handler = never_within_itself, .sa_flags = SA_RESTART};
    pthread_t t[2];
    tcp_pair(fds);
    sigaddset(&a.sa_mask, sigs[0]);
    sigaddset(&a.sa_mask, sigs[1]);
    MUST(sigaction(sigs[0], &a, NULL));
    MUST(sigaction(sigs[1], &a, NULL));
    main_thread = pthread_self();
    wanted = 10000;
    for (int i = 0; i < 2; i++)
        CHECK(pthread_create(&t[i], NULL, sends, &sigs[i]) == 0);
    work(fds, 2 * wanted);
    for (int i = 0; i < 2; i++)
        pthread_join(t[i], NULL);
    EQ(caught, 2 * wanted);
    EQ(nested, 0);
}

CASE(the_mask_is_as_before_after_calls)
{
    int fds[2];
    sigset_t before, after;
    struct itimerval every = {{0, 200}, {0, 200}}, never = {0};
    tcp_pair(fds);
    set_option(fds[0], IPPROTO_TCP, TCP_NODELAY, 1);
    signal(SIGALRM, counts);
    sigemptyset(&before);
    sigaddset(&before, SIGUSR2);
    MUST(pthread_sigmask(SIG_SETMASK, &before, NULL));
    MUST(setitimer(ITIMER_REAL, &every, NULL));
    for (int i = 0; i < 20000; i++) {
        says(fds[0], "x");
        hears(fds[1], "x");
    }
    MUST(setitimer(ITIMER_REAL, &never, NULL));
    CHECK(caught > 0);
    MUST(pthread_sigmask(SIG_SETMASK, NULL, &after));
    for (int sig = 1; sig < 65; sig++)
        if (sig != 32 && sig != 33)
            EQ(sigismember(&after, sig), sig == SIGUSR2);
}

static sigjmp_buf out;

static void jumps(int sig)
{
    counts(sig);
    siglongjmp(out, 1);
}

CASE(jumping_out_of_calls_harms_no_other_thread)
{
    int fds[2], other[2];
    char c;
    struct itimerval once = {.it_value = {0, 3000}};
    tcp_pair(fds);
    tcp_pair(other);
    signal(SIGALRM, jumps);
    pid_t child = (pid_t)MUST(fork());
    if (child == 0) {
        signal(SIGALRM, SIG_IGN);
        for (int i = 0; i < 60; i++) {
            nap_ms(2);
            says(other[0], "x");
        }
        _exit(0);
    }
    for (int i = 0; i < 60; i++) {
        if (sigsetjmp(out, 1) == 0) {
            MUST(setitimer(ITIMER_REAL, &once, NULL));
            EQ(recv(fds[1], &c, 1, 0), 1); /* nobody sends: the handler ends it */
        }
        hears(other[1], "x"); /* somebody has to watch the device for this */
    }
    EQ(caught, 60);
    reap(child);
}

/* ---- Faults ---- */
static void fault(int sig, siginfo_t *info, void *context)
{
    (void)sig, (void)context;
    last_value = info->si_addr == (void *)16;
    siglongjmp(out, 1);
}

CASE(a_fault_reaches_its_handler)
{
    int fds[2];
    struct sigaction a = {.sa_sigaction = fault, .sa_flags = SA_SIGINFO};
    tcp_pair(fds);
    MUST(sigaction(SIGSEGV, &a, NULL));
    if (sigsetjmp(out, 1) == 0)
        *(volatile int *)16 = 1;
    EQ(last_value, 1);
    says(fds[0], "on");
    hears(fds[1], "on");
}

/* ---- Cancellation ---- */
static void *sleeps_in_recv(void *arg)
{
    char c;

    recv(*(int *)arg, &c, 1, 0);
    return NULL;
}

static void *talks_for_ever(void *arg)
{
    int *fds = arg;

    for (;;) {
        says(fds[0], "x");
        hears(fds[1], "x");
    }
    return NULL;
}

CASE(threads_may_be_cancelled_in_calls)
{
    int idle[2], busy[2];
    tcp_pair(idle);
    for (int i = 0; i < 30; i++) {
        pthread_t asleep, talking;
        void *how;
        tcp_pair(busy);
        set_option(busy[0], IPPROTO_TCP, TCP_NODELAY, 1);
        CHECK(pthread_create(&asleep, NULL, sleeps_in_recv, &idle[1]) == 0);
        CHECK(pthread_create(&talking, NULL, talks_for_ever, busy) == 0);
        nap_ms(i % 4);
        EQ(pthread_cancel(asleep), 0);
        EQ(pthread_cancel(talking), 0);
        EQ(pthread_join(asleep, &how), 0);
        CHECK(how == PTHREAD_CANCELED);
        EQ(pthread_join(talking, &how), 0);
        CHECK(how == PTHREAD_CANCELED);
        MUST(close(busy[0]));
        MUST(close(busy[1]));
        says(idle[0], "y");
        hears(idle[1], "y");
    }
}

int main(int argc, char **argv) { return posix_main(argc, argv); }
