/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Calls that no preload library sees: syscall(), io_uring. On a socket of the stack they reach its kernel socket, which
 * has no connection. They may fail, and they may be right; they may not say that a stream has ended, that bytes went out
 * which did not, or give bytes that are none. Frame: posix.h.
 */
#include <linux/io_uring.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "posix.h"

/* An error, or the right bytes of the stream. */
static bool wrong_read(long n, const char *got, const char *want)
{
    return n != -1 && (n != (long)strlen(want) || memcmp(got, want, (size_t)n) != 0);
}

CASE(raw_reads)
{
    static const long numbers[] = {SYS_read, SYS_recvfrom, SYS_readv};
    for (size_t i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++) {
        int fds[2];
        char got[8] = "";
        struct iovec v = {got, 8};
        tcp_pair(fds);
        says(fds[0], "hello");
        wait_ready(fds[1], POLLIN);
        nonblocking(fds[1]); /* the kernel's socket may have nothing to give */
        long n = numbers[i] == SYS_readv ? syscall(SYS_readv, fds[1], &v, 1)
                                         : syscall(numbers[i], fds[1], got, 8, MSG_DONTWAIT, NULL, NULL);
        if (wrong_read(n, got, "hello"))
            posix_fail(__FILE__, __LINE__, "what a raw read gave; the case's number", n, (int)i);
        if (n == -1)
            hears(fds[1], "hello"); /* and nothing was lost by it */
    }
}

CASE(raw_writes)
{
    signal(SIGPIPE, SIG_IGN); /* the kernel's socket has no peer to write to */
    static const long numbers[] = {SYS_write, SYS_sendto, SYS_writev};
    for (size_t i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++) {
        int fds[2];
        struct iovec v = {"hello", 5};
        tcp_pair(fds);
        long n = numbers[i] == SYS_writev
                     ? syscall(SYS_writev, fds[0], &v, 1)
                     : syscall(numbers[i], fds[0], "hello", 5, MSG_NOSIGNAL | MSG_DONTWAIT, NULL, 0);
        CHECK(n == -1 || n == 5);
        if (n == 5)
            hears(fds[1], "hello");
        says(fds[0], "after");
        hears(fds[1], "after");
    }
}

CASE(raw_close_and_dup)
{
    int fds[2], more[2];
    tcp_pair(fds);
    int d = (int)syscall(SYS_dup, fds[0]); /* the library does not know this number */
    CHECK(d >= 0);
    long n = send(d, "x", 1, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n == 1)
        hears(fds[1], "x");
    says(fds[0], "y");
    hears(fds[1], "y");
    EQ(syscall(SYS_close, fds[0]), 0);
    MUST(pipe(more)); /* the number is used again, by a pipe */
    CHECK(more[0] == fds[0] || more[1] == fds[0]);
    EQ(write(more[1], "pipe", 4), 4);
    char got[4];
    EQ(read(more[0], got, 4), 4);
    CHECK(memcmp(got, "pipe", 4) == 0);
    FAILS(ENOTSOCK, send(more[1], "x", 1, 0));
}

/* ---- io_uring, without its library ---- */
struct uring {
    int fd;
    uint8_t *sq, *cq;
    struct io_uring_sqe *sqes;
    struct io_uring_params p;
};

static bool uring_open(struct uring *u)
{
    memset(u, 0, sizeof(*u));
    u->fd = (int)syscall(SYS_io_uring_setup, 4, &u->p);
    if (u->fd == -1) {
        CHECK(errno == ENOSYS || errno == EPERM); /* not there, or forbidden: nothing can go wrong */
        return false;
    }
    u->sq = mmap(NULL, u->p.sq_off.array + u->p.sq_entries * 4, PROT_READ | PROT_WRITE, MAP_SHARED, u->fd,
                 IORING_OFF_SQ_RING);
    u->cq = mmap(NULL, u->p.cq_off.cqes + u->p.cq_entries * sizeof(struct io_uring_cqe), PROT_READ | PROT_WRITE,
                 MAP_SHARED, u->fd, IORING_OFF_CQ_RING);
    u->sqes = mmap(NULL, u->p.sq_entries * sizeof(struct io_uring_sqe), PROT_READ | PROT_WRITE, MAP_SHARED, u->fd,
                   IORING_OFF_SQES);
    CHECK(u->sq != MAP_FAILED && u->cq != MAP_FAILED && u->sqes != MAP_FAILED);
    return true;
}

/* One operation from beginning to end: what the kernel says of it. */
static int uring_do(struct uring *u, int op, int fd, void *data, unsigned len, int flags)
{
    uint32_t *tail = (uint32_t *)(u->sq + u->p.sq_off.tail), at = *tail & (u->p.sq_entries - 1);
    uint32_t *head = (uint32_t *)(u->cq + u->p.cq_off.head);
    struct io_uring_cqe *done = (struct io_uring_cqe *)(u->cq + u->p.cq_off.cqes);
    u->sqes[at] = (struct io_uring_sqe){
        .opcode = (uint8_t)op, .fd = fd, .addr = (uintptr_t)data, .len = len, .msg_flags = (uint32_t)flags};
    ((uint32_t *)(u->sq + u->p.sq_off.array))[at] = at;
    __atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE); /* the kernel reads it with acquire */
    MUST(syscall(SYS_io_uring_enter, u->fd, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0));
    int result = done[*head & (u->p.cq_entries - 1)].res;
    __atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
    return result;
}

CASE(io_uring_on_a_connection)
{
    int fds[2];
    char got[8] = "";
    struct uring u;
    tcp_pair(fds);
    says(fds[0], "hello");
    wait_ready(fds[1], POLLIN);
    if (!uring_open(&u))
        return;
    int n = uring_do(&u, IORING_OP_RECV, fds[1], got, 8, MSG_DONTWAIT);
    if (wrong_read(n < 0 ? -1 : n, got, "hello"))
        posix_fail(__FILE__, __LINE__, "what io_uring received", n, 0);
    if (n < 0)
        hears(fds[1], "hello");
    n = uring_do(&u, IORING_OP_SEND, fds[0], "world", 5, MSG_NOSIGNAL | MSG_DONTWAIT);
    CHECK(n < 0 || n == 5);
    if (n == 5)
        hears(fds[1], "world");
    says(fds[0], "after");
    hears(fds[1], "after");
}

int main(int argc, char **argv) { return posix_main(argc, argv); }
