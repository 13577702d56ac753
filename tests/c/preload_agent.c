/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The agent: does calls on descriptors as it is told, and says what came of them. Two of them, one on the kernel's
 * sockets and one preloaded, are told the same by tests/preload_machine.py. In C, so that nothing stands between the
 * test and the calls.
 *
 *     preload_agent N        serves the control socket AGENT_CONTROL + N
 *
 * A command is one packet, words and numbers: "send 5 100 0 7". The answer: value, errno (0 where the value is no -1),
 * how many SIGPIPE came, and what the call gives besides. Commands beside those of preload_calls.c:
 *
 *     fork N             a child that serves control socket N, with the same descriptors
 *     exec               the program anew, in the same process
 *     exit, wait, kill   the process; its child that ended (PID); a signal for a child
 *     go SLOT COMMAND    the call in a thread of its own, which stays for all its calls
 *     end SLOT MS        what that gave; "asleep" when it has not come back yet
 *     kick SLOT SIGNAL   a signal for that thread
 *     action SIGNAL FLAGS, caught   a handler that counts; how many there were
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "preload_agent.h"

enum { SLOTS = 4 };

static int control;
static char *self;
static volatile sig_atomic_t pipes, caught;

void answer_add(struct answer *out, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    int n = vsnprintf(out->text + out->len, AGENT_TEXT - out->len, format, args);
    va_end(args);
    out->len += n > 0 ? (size_t)n : 0;
    if (out->len >= AGENT_TEXT)
        _exit(3); /* no answer is as long as that */
}

static void counts_pipe(int sig)
{
    (void)sig;
    pipes++;
}

static void counts(int sig)
{
    (void)sig;
    caught++;
}

/* ---- One call ---- */
static void do_call(char *line, struct answer *out)
{
    char *rest, *name = strtok_r(line, " ", &rest);
    long a[AGENT_ARGS] = {0};
    int n = 0;
    for (char *word; n < AGENT_ARGS && (word = strtok_r(NULL, " ", &rest)); n++)
        a[n] = strtol(word, NULL, 0);
    for (const struct agent_call *c = agent_calls; c->name; c++) {
        if (strcmp(c->name, name) != 0 || c->args != n)
            continue;
        char extra[AGENT_TEXT];
        struct answer more = {extra, 0};
        extra[0] = 0;
        errno = 0;
        long r = c->run(a, &more);
        int e = r == -1 ? errno : 0;
        answer_add(out, "%ld %d %d%s", r, e, (int)pipes, extra);
        pipes = 0;
        return;
    }
    answer_add(out, "? %s with %d numbers", name, n);
}

/* ---- Threads ---- */
struct slot {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    enum { IDLE, ASKED, BEGUN, DONE } state;
    char command[256];
    char text[AGENT_TEXT];
    int there;
};

static struct slot slots[SLOTS] = {
    [0 ... SLOTS - 1] = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER}};

static void *slot_run(void *arg)
{
    struct slot *s = arg;
    for (;;) {
        pthread_mutex_lock(&s->lock);
        while (s->state != ASKED)
            pthread_cond_wait(&s->changed, &s->lock);
        s->state = BEGUN;
        pthread_cond_broadcast(&s->changed);
        pthread_mutex_unlock(&s->lock);
        struct answer out = {s->text, 0};
        do_call(s->command, &out);
        pthread_mutex_lock(&s->lock);
        s->state = DONE;
        pthread_cond_broadcast(&s->changed);
        pthread_mutex_unlock(&s->lock);
    }
    return NULL;
}

static void slot_go(struct slot *s, const char *command)
{
    if (!s->there && pthread_create(&s->thread, NULL, slot_run, s) != 0)
        _exit(4);
    s->there = 1;
    pthread_mutex_lock(&s->lock);
    snprintf(s->command, sizeof(s->command), "%s", command);
    s->state = ASKED;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
}

static void slot_end(struct slot *s, long ms, struct answer *out)
{
    struct timespec t;
    pthread_mutex_lock(&s->lock);
    while (s->state == ASKED) /* on a busy machine that may take a while, and would look like sleeping */
        pthread_cond_wait(&s->changed, &s->lock);
    clock_gettime(CLOCK_REALTIME, &t);
    t.tv_sec += ms / 1000;
    t.tv_nsec += ms % 1000 * 1000000;
    t.tv_sec += t.tv_nsec / 1000000000;
    t.tv_nsec %= 1000000000;
    while (s->state == BEGUN && pthread_cond_timedwait(&s->changed, &s->lock, &t) == 0)
        ;
    answer_add(out, "%s", s->state == BEGUN ? "asleep" : s->state == DONE ? s->text : "idle");
    if (s->state == DONE)
        s->state = IDLE;
    pthread_mutex_unlock(&s->lock);
}

/* ---- Processes and signals ---- */
static void do_fork(long n, struct answer *out)
{
    pid_t pid = fork();
    if (pid == 0) {
        close(control);
        control = AGENT_CONTROL + (int)n;
        memset(slots, 0, sizeof(slots)); /* the threads are the parent's */
        for (int i = 0; i < SLOTS; i++) {
            pthread_mutex_init(&slots[i].lock, NULL);
            pthread_cond_init(&slots[i].changed, NULL);
        }
    } else {
        close(AGENT_CONTROL + (int)n); /* so that the test sees the end of the child */
    }
    answer_add(out, "%d %d 0", pid == -1 ? -1 : 0, pid == -1 ? errno : 0);
    if (pid > 0)
        answer_add(out, " pid=%d", (int)pid);
}

static void do_exec(void)
{
    char number[16];
    snprintf(number, sizeof(number), "%d", control - AGENT_CONTROL);
    execl(self, self, number, NULL);
    _exit(5);
}

static void do_wait(long pid, struct answer *out)
{
    int status = 0;
    pid_t got = waitpid((pid_t)pid, &status, 0);
    answer_add(out, "%d %d 0 status=%d", got > 0 ? 0 : -1, got > 0 ? 0 : errno, status);
}

static void do_action(long sig, long flags, struct answer *out)
{
    struct sigaction a = {.sa_handler = counts, .sa_flags = (int)flags};
    caught = 0;
    answer_add(out, "%d 0 0", sigaction((int)sig, &a, NULL));
}

/* True: it was a command of these. */
static int own_command(const char *line, struct answer *out)
{
    long x = 0, y = 0;
    int skip = 0;
    if (sscanf(line, "fork %ld", &x) == 1)
        do_fork(x, out);
    else if (strcmp(line, "exec") == 0)
        do_exec();
    else if (strcmp(line, "exit") == 0)
        exit(0);
    else if (sscanf(line, "wait %ld", &x) == 1)
        do_wait(x, out);
    else if (sscanf(line, "kill %ld %ld", &x, &y) == 2)
        answer_add(out, "%d 0 0", kill((pid_t)x, (int)y));
    else if (sscanf(line, "go %ld %n", &x, &skip) == 1 && skip)
        slot_go(&slots[x], line + skip), answer_add(out, "0 0 0");
    else if (sscanf(line, "end %ld %ld", &x, &y) == 2)
        slot_end(&slots[x], y, out);
    else if (sscanf(line, "kick %ld %ld", &x, &y) == 2)
        answer_add(out, "%d 0 0", pthread_kill(slots[x].thread, (int)y));
    else if (sscanf(line, "action %ld %ld", &x, &y) == 2)
        do_action(x, y, out);
    else if (strcmp(line, "caught") == 0)
        answer_add(out, "%d 0 0", (int)caught);
    else
        return 0;
    return 1;
}

int main(int argc, char **argv)
{
    static char line[AGENT_TEXT], text[AGENT_TEXT];
    struct sigaction ignore_pipe = {.sa_handler = counts_pipe, .sa_flags = SA_RESTART};
    if (argc != 2)
        return 2;
    self = argv[0];
    control = AGENT_CONTROL + atoi(argv[1]);
    sigaction(SIGPIPE, &ignore_pipe, NULL);
    if (send(control, "ready", 5, 0) != 5)
        return 1;
    for (;;) {
        long n = recv(control, line, sizeof(line) - 1, 0);
        if (n == -1 && errno == EINTR)
            continue;
        if (n <= 0)
            return 0; /* the test has ended */
        line[n] = 0;
        struct answer out = {text, 0};
        if (!own_command(line, &out))
            do_call(line, &out);
        if (send(control, text, out.len, 0) != (long)out.len)
            return 1;
    }
}
