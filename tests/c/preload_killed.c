/* SPDX-License-Identifier: Apache-2.0 */
/*
 * preload_killed.c - relatives that are killed at any moment, in the middle of the stack too: those who are left go on.
 * Each round: a child serves, another talks to it, and one of the two is killed while they talk; the other has to notice.
 * Then two new ones have a whole conversation.
 *
 *     preload_killed ROUNDS SEED [ADDRESS PORT]
 *
 * With ADDRESS the server is another host's; two children talk to it then, and one of them is killed. Prints how often a
 * whole conversation was possible after a kill, which is ROUNDS.
 */
#include <arpa/inet.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static struct sockaddr_in where = {.sin_family = AF_INET};

static void must(int good, const char *what)
{
    if (!good) {
        perror(what);
        exit(1);
    }
}

static int at_work[2]; /* a server writes here when somebody talks to it */

static pid_t server(int listener, int conversations)
{
    pid_t pid = fork();

    if (pid == 0) {
        char buf[4096];
        ssize_t n;

        while (conversations--) {
            int c = accept(listener, NULL, NULL);

            if (c >= 0 && (n = read(c, buf, sizeof buf)) > 0 && write(c, buf, (size_t)n) == n) {
                must(write(at_work[1], "", 1) == 1, "pipe");
                while ((n = read(c, buf, sizeof buf)) > 0 && write(c, buf, (size_t)n) == n) {}
            }
            close(c);
        }
        exit(0);
    }
    return pid;
}

/* How often it was answered; -1: nobody is there. */
static int talk(int times, int tell)
{
    char out[500], in[500];
    int c = socket(AF_INET, SOCK_STREAM, 0), good = 0;

    memset(out, 'x', sizeof out);
    if (c < 0 || connect(c, (struct sockaddr *)&where, sizeof where) < 0) {
        return -1;
    }
    for (; good < times; good++) {
        size_t got = 0;
        ssize_t n = 1;

        if (write(c, out, sizeof out) != sizeof out) {
            break;
        }
        while (got < sizeof in && (n = read(c, in, sizeof in - got)) > 0) {
            got += (size_t)n;
        }
        if (n <= 0) {
            break;
        }
        if (good == 0 && tell) {
            must(write(at_work[1], "", 1) == 1, "pipe");
        }
    }
    close(c);
    return good;
}

static pid_t client(int times, int tell)
{
    pid_t pid = fork();

    if (pid == 0) {
        talk(times, tell);
        exit(0);
    }
    return pid;
}

static void hear(int children)
{
    char byte;

    while (children--) {
        must(read(at_work[0], &byte, 1) == 1, "pipe");
    }
}

/* One of two children dies, at any time; the other comes to its end by itself. */
static void kill_one(pid_t a, pid_t b)
{
    pid_t victim = rand() % 2 ? a : b, other = victim == a ? b : a;

    usleep((useconds_t)(rand() % 20000));
    must(kill(victim, SIGKILL) == 0, "kill");
    must(waitpid(victim, NULL, 0) == victim, "waitpid");
    must(waitpid(other, NULL, 0) == other, "waitpid");
}

static int round_here(int listener)
{
    pid_t serves = server(listener, 1), talks = client(1 << 30, 0);
    int good;

    hear(1);
    kill_one(serves, talks);
    serves = server(listener, 1);
    good = talk(20, 0) == 20;
    must(waitpid(serves, NULL, 0) == serves, "waitpid");
    hear(1);
    return good;
}

static int round_away(void)
{
    pid_t one = client(1000, 1), two = client(1000, 1);

    hear(2);
    kill_one(one, two);
    return talk(20, 0) == 20;
}

static int listen_here(void)
{
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    socklen_t len = sizeof where;

    where.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    must(listener >= 0 && bind(listener, (struct sockaddr *)&where, len) == 0 && listen(listener, 16) == 0, "listen");
    must(getsockname(listener, (struct sockaddr *)&where, &len) == 0, "getsockname");
    return listener;
}

int main(int argc, char **argv)
{
    int rounds = argc > 1 ? atoi(argv[1]) : 10, good = 0, listener = -1;

    srand(argc > 2 ? (unsigned)atoi(argv[2]) : 1);
    signal(SIGPIPE, SIG_IGN);
    must(pipe(at_work) == 0, "pipe");
    if (argc > 4) {
        must(inet_pton(AF_INET, argv[3], &where.sin_addr) == 1, "address");
        where.sin_port = htons((uint16_t)atoi(argv[4]));
        must(talk(20, 0) == 20, "talk"); /* before: children of who has no socket are no relatives */
    } else {
        listener = listen_here();
    }
    for (int i = 0; i < rounds; i++) {
        alarm(20); /* whoever is left has to notice */
        good += listener >= 0 ? round_here(listener) : round_away();
    }
    printf("%d of %d\n", good, rounds);
    return good != rounds;
}
