/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Built with -O2 -D_FORTIFY_SOURCE=2: where a length is known only at run time and the buffer's size is known, the
 * compiler calls __read_chk() and its like, which a preload library has to have as well. tests/test_posix.py demands
 * that this program imports them. Frame: posix.h.
 */
#include <signal.h>
#include <stdarg.h>
#include <sys/select.h>

#include "posix.h"

/* A number that the compiler does not know. */
static size_t some(size_t n)
{
    volatile size_t v = n;
    return v;
}

CASE(read_recv_and_recvfrom)
{
    int fds[2];
    char got[32];
    struct sockaddr_in from;
    socklen_t len = sizeof(from);
    tcp_pair(fds);
    says(fds[0], "abcdef");
    wait_ready(fds[1], POLLIN);
    EQ(read(fds[1], got, some(2)), 2);
    EQ(recv(fds[1], got + 2, some(2), 0), 2);
    EQ(recvfrom(fds[1], got + 4, some(2), 0, (struct sockaddr *)&from, &len), 2);
    CHECK(memcmp(got, "abcdef", 6) == 0);
}

CASE(poll_and_ppoll)
{
    int fds[2];
    tcp_pair(fds);
    struct pollfd p[2] = {{fds[0], POLLIN | POLLOUT, 0}, {fds[1], POLLIN, 0}};
    struct timespec t = {0, 1000000};
    EQ(poll(p, some(2), 0), 1);
    EQ(p[0].revents, POLLOUT);
    says(fds[0], "x");
    wait_ready(fds[1], POLLIN);
    EQ(ppoll(p, some(2), &t, NULL), 2);
    EQ(p[1].revents, POLLIN);
}

CASE(select_with_checked_sets)
{
    int fds[2];
    fd_set r;
    tcp_pair(fds);
    says(fds[0], "x");
    FD_ZERO(&r);
    FD_SET((int)some((size_t)fds[1]), &r);
    EQ(select(fds[1] + 1, &r, NULL, NULL, NULL), 1);
    CHECK(FD_ISSET((int)some((size_t)fds[1]), &r));
}

static int prints(int fd, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    int n = vdprintf(fd, format, args);
    va_end(args);
    return n;
}

CASE(printing)
{
    int fds[2];
    char line[32];
    tcp_pair(fds);
    EQ(dprintf(fds[0], "%d %s\n", 7, "by dprintf"), 13);
    EQ(prints(fds[0], "%s\n", "by vdprintf"), 12);
    FILE *out = fdopen(fds[0], "w"), *in = fdopen(fds[1], "r");
    CHECK(out && in);
    EQ(fprintf(out, "%s\n", "by fprintf"), 11);
    EQ(fflush(out), 0);
    CHECK(fgets(line, (int)some(sizeof(line)), in) && strcmp(line, "7 by dprintf\n") == 0);
    CHECK(fgets(line, (int)some(sizeof(line)), in) && strcmp(line, "by vdprintf\n") == 0);
    CHECK(fgets(line, (int)some(sizeof(line)), in) && strcmp(line, "by fprintf\n") == 0);
    EQ(fwrite("block", 1, 5, out), 5);
    EQ(fclose(out), 0);
    EQ(fread(line, 1, some(5), in), 5);
    CHECK(memcmp(line, "block", 5) == 0);
}

CASE(files_are_files)
{
    char name[] = "/tmp/posix-fortify-XXXXXX", got[8], link[64], target[64];
    int fds[2], fd = (int)MUST(mkstemp(name));
    MUST(unlink(name));
    EQ(write(fd, "abcdef", 6), 6);
    EQ(pread(fd, got, some(3), 2), 3);
    CHECK(memcmp(got, "cde", 3) == 0);
    tcp_pair(fds);
    FAILS(ESPIPE, pread(fds[0], got, some(1), 0));
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fds[0]);
    long n = MUST(readlink(link, target, some(sizeof(target))));
    CHECK(n > 8 && memcmp(target, "socket:[", 8) == 0);
}

CASE(a_buffer_that_is_too_small_ends_the_program)
{
    int fds[2], status;
    char got[4];
    tcp_pair(fds);
    says(fds[0], "too much for it");
    pid_t child = (pid_t)MUST(fork());
    if (child == 0) {
        close(2); /* glibc says "buffer overflow detected" there */
        (void)!recv(fds[1], got, some(8), 0);
        _exit(0);
    }
    EQ(waitpid(child, &status, 0), child);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
    hears(fds[1], "too much for it"); /* found out before anything was read */
}

int main(int argc, char **argv) { return posix_main(argc, argv); }
