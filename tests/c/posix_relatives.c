/* SPDX-License-Identifier: Apache-2.0 */
/* Processes that end, fail and become others while their threads are at work; programs that know nothing. posix.h. */
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/resource.h>

#include "posix.h"

extern char **environ;

enum { THREADS = 3, NOBODY = 65534 };

static char *first_environment[256]; /* as the program was started, before there was a socket */

/* ---- Threads that are always in a call ---- */
static void *talks(void *arg)
{
    int fds[2];

    (void)arg;
    tcp_pair(fds);
    set_option(fds[0], IPPROTO_TCP, TCP_NODELAY, 1);
    for (;;) {
        says(fds[0], "busy");
        hears(fds[1], "busy");
    }
    return NULL;
}

static void busy_threads(void)
{
    for (int i = 0; i < THREADS; i++) {
        pthread_t t;
        CHECK(pthread_create(&t, NULL, talks, NULL) == 0);
    }
    nap_ms(5);
}

static void still_works(int fds[2])
{
    says(fds[0], "there");
    hears(fds[1], "there");
    says(fds[1], "and back");
    hears(fds[0], "and back");
}

CASE(processes_end_while_their_threads_work)
{
    int fds[2];
    tcp_pair(fds);
    for (int i = 0; i < 30; i++) {
        pid_t child = (pid_t)MUST(fork());
        if (child == 0) {
            busy_threads();
            nap_ms(i % 5);
            i % 2 ? exit(0) : _exit(0);
        }
        reap(child);
        still_works(fds);
    }
}

CASE(programs_follow_while_threads_work)
{
    int fds[2];
    tcp_pair(fds);
    for (int i = 0; i < 20; i++) {
        pid_t child = (pid_t)MUST(fork());
        if (child == 0) {
            busy_threads();
            execl("/bin/true", "true", NULL);
            _exit(127);
        }
        reap(child);
        still_works(fds);
    }
}

static void *becomes_server(void *arg)
{
    execl(posix_self, posix_self, "--serve", arg, NULL);
    _exit(127);
}

CASE(another_thread_calls_exec)
{
    for (int i = 0; i < 10; i++) {
        int fds[2];
        char number[16];
        tcp_pair(fds);
        snprintf(number, sizeof(number), "%d", fds[0]);
        pid_t child = (pid_t)MUST(fork());
        if (child == 0) {
            pthread_t t;
            MUST(close(fds[1]));
            busy_threads();
            CHECK(pthread_create(&t, NULL, becomes_server, number) == 0);
            pthread_join(t, NULL);
            _exit(1);
        }
        MUST(close(fds[0]));
        says(fds[1], "question\n");
        hears(fds[1], "hello question\n");
        hears_end(fds[1]);
        reap(child);
    }
}

static volatile int go_on;

static void *talks_as_long(void *arg)
{
    int *fds = arg;

    while (go_on) {
        says(fds[0], "x");
        hears(fds[1], "x");
    }
    return NULL;
}

CASE(an_exec_that_fails_changes_nothing)
{
    int fds[2], other[2], l = listener(4);
    pthread_t t;
    tcp_pair(fds);
    tcp_pair(other);
    MUST(fcntl(fds[0], F_SETFD, FD_CLOEXEC));
    set_option(other[0], IPPROTO_TCP, TCP_NODELAY, 1);
    go_on = 1;
    CHECK(pthread_create(&t, NULL, talks_as_long, other) == 0);
    for (int i = 0; i < 20; i++) {
        FAILS(ENOENT, execl("/nonexistent", "x", NULL));
        FAILS(ENOENT, execvp("no-such-program", (char *[]){"x", NULL}));
        FAILS(EACCES, execv("/etc/passwd", (char *[]){"x", NULL}));
        nap_ms(2);
        still_works(fds);
    }
    go_on = 0;
    pthread_join(t, NULL);
    pid_t none;
    EQ(posix_spawn(&none, "/nonexistent", NULL, NULL, (char *[]){"x", NULL}, environ), ENOENT);
    MUST(close(client_of(l)));
    hears_end(accept_one(l));
    MUST(close(fds[0])); /* nobody else has it */
    hears_end(fds[1]);
}

/* ---- Programs that know nothing of the library ---- */
static pid_t sleeper_without_environment(void)
{
    pid_t child;

    CHECK(posix_spawn(&child, "/bin/sleep", NULL, NULL, (char *[]){"sleep", "60", NULL}, (char *[]){NULL}) == 0);
    return child;
}

CASE(a_stranger_holds_what_it_was_started_with)
{
    int fds[2], other[2];
    tcp_pair(fds);
    tcp_pair(other);
    MUST(fcntl(other[0], F_SETFD, FD_CLOEXEC));
    pid_t child = sleeper_without_environment();
    MUST(close(other[0]));
    hears_end(other[1]); /* the stranger has not got it */
    MUST(close(fds[0]));
    nap_ms(50);
    EQ(ready(fds[1]), POLLOUT); /* the stranger has it open */
    MUST(kill(child, SIGKILL));
    hears_end(fds[1]);
    EQ(waitpid(child, NULL, 0), child);
}

CASE(a_stranger_after_fork_and_exec)
{
    int fds[2], other[2];
    tcp_pair(fds);
    tcp_pair(other);
    MUST(fcntl(other[0], F_SETFD, FD_CLOEXEC));
    pid_t child = (pid_t)MUST(fork());
    if (child == 0) {
        execle("/bin/sleep", "sleep", "60", NULL, (char *[]){NULL});
        _exit(127);
    }
    MUST(close(other[0]));
    hears_end(other[1]);
    MUST(close(fds[0]));
    nap_ms(50);
    EQ(ready(fds[1]), POLLOUT);
    MUST(kill(child, SIGKILL));
    hears_end(fds[1]);
    EQ(waitpid(child, NULL, 0), child);
}

CASE(an_environment_that_is_older_than_the_first_socket)
{
    int fds[2];
    char number[16];
    tcp_pair(fds);
    snprintf(number, sizeof(number), "%d", fds[0]);
    pid_t child = (pid_t)MUST(fork());
    if (child == 0) {
        execve(posix_self, (char *[]){posix_self, "--serve", number, NULL}, first_environment);
        _exit(127);
    }
    MUST(close(fds[0]));
    says(fds[1], "question\n");
    hears(fds[1], "hello question\n");
    hears_end(fds[1]);
    reap(child);
}

/* ---- fork() in unusual places ---- */
CASE(daemon_goes_on)
{
    int l = listener(4), status;
    struct sockaddr_in a = name_of(l);
    MUST(prctl(PR_SET_CHILD_SUBREAPER, 1));
    pid_t child = (pid_t)MUST(fork());
    if (child == 0) {
        MUST(daemon(0, 1));
        alarm(60);
        worker(l, 2);
        _exit(0);
    }
    MUST(close(l));
    reap(child);
    ask(a);
    ask(a);
    MUST(wait(&status));
    EQ(status, 0);
}

static volatile pid_t made;

static void forks(int sig)
{
    (void)sig;
    made = fork();
    if (made == 0)
        _exit(0);
}

CASE(fork_in_a_handler)
{
    int fds[2];
    tcp_pair(fds);
    signal(SIGUSR1, forks);
    for (int i = 0; i < 20; i++) {
        MUST(raise(SIGUSR1));
        reap(made);
        still_works(fds);
    }
}

CASE(a_fork_that_fails_leaves_nothing)
{
    int fds[2];
    struct rlimit none = {0, 0};
    tcp_pair(fds);
    pid_t child = (pid_t)MUST(fork());
    if (child == 0) {
        MUST(close(fds[1]));
        MUST(setrlimit(RLIMIT_NPROC, &none));
        if (geteuid() == 0)
            MUST(setresuid(NOBODY, NOBODY, NOBODY));
        FAILS(EAGAIN, fork());
        says(fds[0], "alone");
        MUST(close(fds[0]));
        pause();
    }
    MUST(close(fds[0]));
    hears(fds[1], "alone");
    hears_end(fds[1]); /* a child that was never made has nothing open */
    MUST(kill(child, SIGKILL));
    EQ(waitpid(child, NULL, 0), child);
}

CASE(many_generations)
{
    enum { DEPTH = 12 };
    int fds[2];
    tcp_pair(fds);
    for (int i = 0; i < DEPTH; i++) { /* each waits for its child; the last one says it */
        pid_t child = (pid_t)MUST(fork());
        if (child > 0) {
            if (i == 0)
                break;
            reap(child);
            _exit(0);
        }
        MUST(close(fds[1])), fds[1] = (int)MUST(open("/dev/null", O_RDONLY));
        if (i == DEPTH - 1) {
            says(fds[0], "the last");
            _exit(0);
        }
    }
    MUST(close(fds[0]));
    hears(fds[1], "the last");
    hears_end(fds[1]);
    int status;
    MUST(wait(&status));
    EQ(status, 0);
}

int main(int argc, char **argv)
{
    for (size_t i = 0; environ[i] && i + 1 < sizeof(first_environment) / sizeof(*first_environment); i++)
        first_environment[i] = strdup(environ[i]);
    if (argc == 3 && strcmp(argv[1], "--serve") == 0) {
        serve(atoi(argv[2]));
        return 0;
    }
    return posix_main(argc, argv);
}
