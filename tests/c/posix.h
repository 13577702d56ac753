/* SPDX-License-Identifier: Apache-2.0 */
/*
 * posix.h - the frame of the posix_*.c programs: cases by name, checks that say where and why, pairs of sockets on
 * 127.0.0.1. Each program runs on the kernel and, with the preload library, on the stack's loopback; what a case demands
 * is what Linux does. `program NAME` runs one case in a process of its own and prints "ok NAME"; no argument: the names.
 * tests/test_posix.py runs all of them and ends the ones that hang.
 *
 * Nothing is measured with an upper bound. Where a case has to act while another thread sleeps in a call, it naps first:
 * if the nap was too short, the case is easier, not wrong.
 */
#ifndef POSIX_H
#define POSIX_H

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct posix_case {
    const char *name;
    void (*run)(void);
    struct posix_case *next;
};

static struct posix_case *posix_cases;

/* CASE(name) { ... }: registers itself before main(). */
#define CASE(NAME)                                                                                                     \
    static void case_##NAME(void);                                                                                     \
    __attribute__((constructor)) static void add_##NAME(void)                                                          \
    {                                                                                                                  \
        static struct posix_case it = {.name = #NAME, .run = case_##NAME};                                             \
        it.next = posix_cases;                                                                                         \
        posix_cases = &it;                                                                                             \
    }                                                                                                                  \
    static void case_##NAME(void)

static inline long posix_fail(const char *file, int line, const char *what, long got, int err)
{
    fprintf(stderr, "%s:%d: %s: got %ld, errno %d (%s)\n", file, line, what, got, err, strerror(err));
    _exit(1);
}

/* The call succeeds; its value. */
#define MUST(CALL)                                                                                                     \
    ({                                                                                                                 \
        errno = 0;                                                                                                     \
        long got_ = (long)(CALL);                                                                                      \
        got_ == -1 ? posix_fail(__FILE__, __LINE__, #CALL " must succeed", -1, errno) : got_;                          \
    })
/* The call returns -1 and sets errno so. */
#define FAILS(ERRNO, CALL)                                                                                             \
    do {                                                                                                               \
        errno = 0;                                                                                                     \
        long got_ = (long)(CALL);                                                                                      \
        if (got_ != -1 || errno != (ERRNO))                                                                            \
            posix_fail(__FILE__, __LINE__, #CALL " must fail with " #ERRNO, got_, errno);                              \
    } while (0)
#define EQ(GOT, WANT)                                                                                                  \
    do {                                                                                                               \
        long got_ = (long)(GOT);                                                                                       \
        if (got_ != (long)(WANT))                                                                                      \
            posix_fail(__FILE__, __LINE__, #GOT " must be " #WANT, got_, errno);                                       \
    } while (0)
#define CHECK(COND)                                                                                                    \
    do {                                                                                                               \
        if (!(COND))                                                                                                   \
            posix_fail(__FILE__, __LINE__, #COND, 0, errno);                                                           \
    } while (0)

/* ---- Time ---- */
static inline int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static inline void nap_ms(int ms)
{
    struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000};
    while (nanosleep(&t, &t) == -1 && errno == EINTR)
        ;
}

/* ---- Data: byte i of a stream is pattern(i), so that a lost, doubled or moved byte shows ---- */
static inline uint8_t pattern(uint64_t i) { return (uint8_t)((i * 2654435761u) >> 13); }

static inline void fill(uint8_t *p, size_t len, uint64_t from)
{
    for (size_t i = 0; i < len; i++)
        p[i] = pattern(from + i);
}

static inline void verify(const uint8_t *p, size_t len, uint64_t from)
{
    for (size_t i = 0; i < len; i++)
        if (p[i] != pattern(from + i))
            posix_fail(__FILE__, __LINE__, "byte of the stream", (long)(from + i), 0);
}

static inline void send_all(int fd, const void *data, size_t len)
{
    for (size_t done = 0; done < len;)
        done += (size_t)MUST(send(fd, (const char *)data + done, len - done, MSG_NOSIGNAL));
}

static inline void recv_all(int fd, void *data, size_t len)
{
    for (size_t done = 0; done < len;) {
        long n = MUST(recv(fd, (char *)data + done, len - done, 0));
        if (n == 0)
            posix_fail(__FILE__, __LINE__, "the stream ended after", (long)done, 0);
        done += (size_t)n;
    }
}

/* `len` bytes of the pattern go out; a blocking socket. */
static inline void pattern_out(int fd, size_t len)
{
    static _Thread_local uint8_t block[16384];
    for (size_t done = 0; done < len;) {
        size_t n = len - done < sizeof(block) ? len - done : sizeof(block);
        fill(block, n, done);
        send_all(fd, block, n);
        done += n;
    }
}

/* The pattern comes in until the stream ends: how many bytes. */
static inline size_t pattern_in(int fd)
{
    static _Thread_local uint8_t block[16384];
    for (size_t done = 0;;) {
        long n = MUST(recv(fd, block, sizeof(block), 0));
        if (n == 0)
            return done;
        verify(block, (size_t)n, done);
        done += (size_t)n;
    }
}

static inline void says(int fd, const char *text)
{
    EQ(send(fd, text, strlen(text), MSG_NOSIGNAL), (long)strlen(text));
}

static inline void hears(int fd, const char *text)
{
    char got[256] = "";
    recv_all(fd, got, strlen(text));
    if (memcmp(got, text, strlen(text)) != 0) {
        fprintf(stderr, "heard \"%s\", not \"%s\"\n", got, text);
        _exit(1);
    }
}

static inline void hears_end(int fd)
{
    char c;
    EQ(recv(fd, &c, 1, 0), 0);
}

/* ---- Sockets on 127.0.0.1 ---- */
static inline struct sockaddr_in loopback(uint16_t port)
{
    return (struct sockaddr_in){
        .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
}

static inline struct sockaddr_in name_of(int fd)
{
    struct sockaddr_in a = {0};
    socklen_t len = sizeof(a);
    MUST(getsockname(fd, (struct sockaddr *)&a, &len));
    CHECK(len == sizeof(a) && a.sin_family == AF_INET);
    return a;
}

static inline struct sockaddr_in peer_of(int fd)
{
    struct sockaddr_in a = {0};
    socklen_t len = sizeof(a);
    MUST(getpeername(fd, (struct sockaddr *)&a, &len));
    CHECK(len == sizeof(a) && a.sin_family == AF_INET);
    return a;
}

static inline bool same_address(struct sockaddr_in a, struct sockaddr_in b)
{
    return a.sin_port == b.sin_port && a.sin_addr.s_addr == b.sin_addr.s_addr;
}

static inline int bound(int type)
{
    struct sockaddr_in a = loopback(0);
    int fd = (int)MUST(socket(AF_INET, type, 0));
    MUST(bind(fd, (struct sockaddr *)&a, sizeof(a)));
    return fd;
}

static inline int listener(int backlog)
{
    int fd = bound(SOCK_STREAM);
    MUST(listen(fd, backlog));
    return fd;
}

static inline int connect_to(struct sockaddr_in a)
{
    int fd = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    MUST(connect(fd, (struct sockaddr *)&a, sizeof(a)));
    return fd;
}

static inline int client_of(int listening) { return connect_to(name_of(listening)); }

static inline int accept_one(int listening) { return (int)MUST(accept(listening, NULL, NULL)); }

/* fds[0] connected, fds[1] accepted it. */
static inline void tcp_pair(int fds[2])
{
    int l = listener(8);
    fds[0] = client_of(l);
    fds[1] = accept_one(l);
    MUST(close(l));
}

static inline void udp_pair(int fds[2])
{
    fds[0] = bound(SOCK_DGRAM);
    fds[1] = bound(SOCK_DGRAM);
    for (int i = 0; i < 2; i++) {
        struct sockaddr_in a = name_of(fds[1 - i]);
        MUST(connect(fds[i], (struct sockaddr *)&a, sizeof(a)));
    }
}

/* An address on which nobody listens; it stays reserved as long as *holder is open. */
static inline struct sockaddr_in refusing(int *holder)
{
    *holder = bound(SOCK_STREAM);
    return name_of(*holder);
}

static inline int option(int fd, int level, int name)
{
    int value = -1;
    socklen_t len = sizeof(value);
    MUST(getsockopt(fd, level, name, &value, &len));
    return value;
}

static inline void set_option(int fd, int level, int name, int value)
{
    MUST(setsockopt(fd, level, name, &value, sizeof(value)));
}

static inline void set_timeout(int fd, int name, int ms)
{
    struct timeval t = {.tv_sec = ms / 1000, .tv_usec = ms % 1000 * 1000};
    MUST(setsockopt(fd, SOL_SOCKET, name, &t, sizeof(t)));
}

static inline void nonblocking(int fd) { MUST(fcntl(fd, F_SETFL, MUST(fcntl(fd, F_GETFL)) | O_NONBLOCK)); }

/* What poll() says now, of everything that can be asked. */
static inline int ready(int fd)
{
    struct pollfd p = {.fd = fd, .events = POLLIN | POLLOUT | POLLPRI | POLLRDHUP};
    MUST(poll(&p, 1, 0));
    return p.revents;
}

/* Waits until poll() says at least these; all that it says then. */
static inline int wait_ready(int fd, int events)
{
    for (;;) {
        struct pollfd p = {.fd = fd, .events = (short)events};
        if (poll(&p, 1, -1) == -1 && errno != EINTR)
            posix_fail(__FILE__, __LINE__, "poll()", -1, errno);
        if ((p.revents & events) == events)
            return ready(fd);
        nap_ms(1);
    }
}

/* ---- Processes ---- */
static inline pid_t forked(void (*child)(int, int), int a, int b)
{
    pid_t pid = (pid_t)MUST(fork());
    if (pid == 0) {
        child(a, b);
        _exit(0);
    }
    return pid;
}

/* The child ended well. */
static inline void reap(pid_t pid)
{
    int status = 0;
    pid_t got;
    do
        got = waitpid(pid, &status, 0);
    while (got == -1 && errno == EINTR);
    EQ(got, pid);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
        posix_fail(__FILE__, __LINE__, "the child's status", status, 0);
}

/* ---- A server and its client: of each connection one line, which comes back with a greeting ---- */
static inline void serve(int fd)
{
    char c;
    dprintf(fd, "hello ");
    while (MUST(recv(fd, &c, 1, 0)) == 1) {
        EQ(send(fd, &c, 1, MSG_NOSIGNAL), 1);
        if (c == '\n')
            break;
    }
}

static inline void ask(struct sockaddr_in a)
{
    int fd = connect_to(a);
    says(fd, "question\n");
    hears(fd, "hello question\n");
    hears_end(fd);
    MUST(close(fd));
}

static inline void worker(int l, int n)
{
    for (int i = 0; i < n; i++) {
        int fd = accept_one(l);
        serve(fd);
        MUST(close(fd));
    }
}

static char *posix_self; /* the program's own path, for exec */

static inline int posix_main(int argc, char **argv)
{
    posix_self = argv[0];
    for (struct posix_case *c = posix_cases; c; c = c->next) {
        if (argc < 2) {
            puts(c->name);
        } else if (strcmp(c->name, argv[1]) == 0) {
            c->run();
            printf("ok %s\n", c->name);
            return 0;
        }
    }
    if (argc < 2)
        return 0;
    fprintf(stderr, "no case %s\n", argv[1]);
    return 2;
}

#endif
