/* SPDX-License-Identifier: Apache-2.0 */
/* How streams end, duplicates of descriptors, stdio on sockets, sendfile and splice. Frame: posix.h. */
#include <pthread.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/stat.h>

#include "posix.h"

enum { MEGABYTE = 1 << 20 };

/* A file of the pattern, already without a name. */
static int pattern_file(size_t len)
{
    char name[] = "/tmp/posix-streams-XXXXXX";
    int fd = (int)MUST(mkstemp(name));
    MUST(unlink(name));
    uint8_t block[4096];
    for (size_t done = 0; done < len; done += sizeof(block)) {
        size_t n = len - done < sizeof(block) ? len - done : sizeof(block);
        fill(block, n, done);
        EQ(write(fd, block, n), (long)n);
    }
    MUST(lseek(fd, 0, SEEK_SET));
    return fd;
}

static void *reads_pattern(void *arg) { return (void *)pattern_in(*(int *)arg); }

static pthread_t reader_of(int *fd)
{
    pthread_t t;
    CHECK(pthread_create(&t, NULL, reads_pattern, fd) == 0);
    return t;
}

static size_t read_by(pthread_t t)
{
    void *len;
    CHECK(pthread_join(t, &len) == 0);
    return (size_t)len;
}

/* ---- The end of a stream ---- */
CASE(half_closed)
{
    int fds[2];
    tcp_pair(fds);
    says(fds[0], "request");
    MUST(shutdown(fds[0], SHUT_WR));
    hears(fds[1], "request");
    hears_end(fds[1]);
    hears_end(fds[1]);
    says(fds[1], "answer");
    hears(fds[0], "answer");
    FAILS(EPIPE, send(fds[0], "x", 1, MSG_NOSIGNAL));
    MUST(close(fds[1]));
    hears_end(fds[0]);
}

CASE(shut_for_reading)
{
    int fds[2];
    tcp_pair(fds);
    MUST(shutdown(fds[0], SHUT_RD));
    hears_end(fds[0]);
    says(fds[0], "still writes");
    hears(fds[1], "still writes");
}

CASE(shut_both_ways)
{
    int fds[2];
    tcp_pair(fds);
    says(fds[0], "last");
    MUST(shutdown(fds[0], SHUT_RDWR));
    hears_end(fds[0]);
    FAILS(EPIPE, send(fds[0], "x", 1, MSG_NOSIGNAL));
    hears(fds[1], "last");
    hears_end(fds[1]);
}

CASE(close_loses_nothing)
{
    int fds[2];
    tcp_pair(fds);
    pthread_t t = reader_of(&fds[1]);
    pattern_out(fds[0], 4 * MEGABYTE);
    MUST(close(fds[0]));
    EQ(read_by(t), 4 * MEGABYTE);
}

CASE(close_with_unread_data_resets)
{
    int fds[2];
    char c;
    tcp_pair(fds);
    says(fds[0], "never read");
    wait_ready(fds[1], POLLIN);
    MUST(close(fds[1]));
    CHECK(wait_ready(fds[0], POLLERR) & POLLHUP);
    FAILS(ECONNRESET, recv(fds[0], &c, 1, 0));
    EQ(recv(fds[0], &c, 1, 0), 0); /* an error is told once */
    FAILS(EPIPE, send(fds[0], &c, 1, MSG_NOSIGNAL));
}

CASE(linger_zero_resets)
{
    int fds[2];
    char c;
    struct linger l = {.l_onoff = 1, .l_linger = 0};
    tcp_pair(fds);
    MUST(setsockopt(fds[0], SOL_SOCKET, SO_LINGER, &l, sizeof(l)));
    MUST(close(fds[0]));
    FAILS(ECONNRESET, recv(fds[1], &c, 1, 0));
}

CASE(linger_waits_for_the_data)
{
    int fds[2];
    struct linger l = {.l_onoff = 1, .l_linger = 30};
    tcp_pair(fds);
    pthread_t t = reader_of(&fds[1]);
    MUST(setsockopt(fds[0], SOL_SOCKET, SO_LINGER, &l, sizeof(l)));
    pattern_out(fds[0], MEGABYTE);
    MUST(close(fds[0]));
    EQ(read_by(t), MEGABYTE);
}

CASE(writing_to_one_who_left)
{
    int fds[2];
    tcp_pair(fds);
    MUST(close(fds[1]));
    hears_end(fds[0]);
    EQ(send(fds[0], "x", 1, MSG_NOSIGNAL), 1); /* it draws a reset */
    wait_ready(fds[0], POLLERR);
    FAILS(EPIPE, send(fds[0], "x", 1, MSG_NOSIGNAL));
}

CASE(closing_a_listener_resets_who_was_not_accepted)
{
    int l = listener(4), c = client_of(l);
    char x;
    wait_ready(l, POLLIN);
    MUST(close(l));
    FAILS(ECONNRESET, recv(c, &x, 1, 0));
}

CASE(a_listener_that_is_shut_down)
{
    int l = listener(4);
    struct sockaddr_in a = name_of(l);
    MUST(shutdown(l, SHUT_RDWR));
    FAILS(EINVAL, accept(l, NULL, NULL));
    int fd = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    FAILS(ECONNREFUSED, connect(fd, (struct sockaddr *)&a, sizeof(a)));
    MUST(listen(l, 4)); /* it can listen again; Linux may have given it another port */
    a = name_of(l);
    int c = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    MUST(connect(c, (struct sockaddr *)&a, sizeof(a)));
    says(accept_one(l), "again");
    hears(c, "again");
}

/* ---- Duplicates ---- */
CASE(the_last_duplicate_ends_it)
{
    int fds[2];
    tcp_pair(fds);
    int d = (int)MUST(dup(fds[0])), e = (int)MUST(fcntl(fds[0], F_DUPFD, 200));
    CHECK(e >= 200);
    EQ(fcntl(fds[0], F_DUPFD_CLOEXEC, 300) >= 300, 1);
    MUST(close(MUST(fcntl(fds[0], F_DUPFD_CLOEXEC, 300))));
    MUST(close(300));
    MUST(close(fds[0]));
    says(d, "by the first");
    MUST(close(d));
    says(e, "by the second");
    hears(fds[1], "by the firstby the second");
    EQ(ready(fds[1]), POLLOUT);
    MUST(close(e));
    hears_end(fds[1]);
}

CASE(duplicates_share_what_the_file_has)
{
    int fds[2];
    tcp_pair(fds);
    int d = (int)MUST(dup(fds[0]));
    nonblocking(fds[0]);
    EQ(fcntl(d, F_GETFL), O_RDWR | O_NONBLOCK);
    MUST(fcntl(d, F_SETFL, O_RDWR));
    EQ(fcntl(fds[0], F_GETFL), O_RDWR);
    MUST(fcntl(fds[0], F_SETFD, FD_CLOEXEC));
    EQ(fcntl(d, F_GETFD), 0);
    set_option(d, IPPROTO_TCP, TCP_NODELAY, 1);
    EQ(option(fds[0], IPPROTO_TCP, TCP_NODELAY), 1);
    MUST(shutdown(d, SHUT_WR));
    FAILS(EPIPE, send(fds[0], "x", 1, MSG_NOSIGNAL));
    hears_end(fds[1]);
}

CASE(dup2_over_a_socket_closes_it)
{
    int a[2], b[2];
    tcp_pair(a);
    tcp_pair(b);
    EQ(dup2(a[0], b[0]), b[0]); /* the last reference to that connection's end */
    hears_end(b[1]);
    says(b[0], "other way");
    hears(a[1], "other way");
    EQ(dup2(a[0], a[0]), a[0]);
    FAILS(EINVAL, dup3(a[0], a[0], 0));
    FAILS(EBADF, dup2(998, a[0]));
    EQ(dup3(a[0], 250, O_CLOEXEC), 250);
    EQ(fcntl(250, F_GETFD), FD_CLOEXEC);
    int n = open("/dev/null", O_RDWR);
    EQ(dup2(n, a[0]), a[0]); /* a file over a socket: the others keep the connection */
    says(250, "lives");
    hears(a[1], "lives");
    EQ(write(a[0], "gone", 4), 4);
    EQ(dup2(a[1], n), n); /* a socket over a file */
    says(n, "back");
    hears(250, "back");
}

CASE(a_number_that_is_used_again)
{
    int fds[2], number;
    tcp_pair(fds);
    number = fds[0];
    MUST(close(number));
    int p[2];
    MUST(pipe(p));
    EQ(p[0], number - (p[0] != number)); /* the lowest free number */
    EQ(write(p[1], "pipe", 4), 4);
    char got[4];
    EQ(read(p[0], got, 4), 4);
    CHECK(memcmp(got, "pipe", 4) == 0);
    hears_end(fds[1]);
}

CASE(close_range_and_closefrom)
{
    int a[2], b[2];
    tcp_pair(a);
    tcp_pair(b);
    EQ(dup2(a[0], 400), 400);
    EQ(dup2(b[0], 402), 402);
    MUST(close(a[0]));
    MUST(close(b[0]));
    MUST(close_range(400, 401, 0));
    hears_end(a[1]);
    EQ(ready(b[1]), POLLOUT);
    MUST(close_range(402, 402, CLOSE_RANGE_CLOEXEC));
    EQ(fcntl(402, F_GETFD), FD_CLOEXEC);
    says(402, "here");
    hears(b[1], "here");
    FAILS(EINVAL, close_range(5, 4, 0));
    closefrom(402);
    FAILS(EBADF, fcntl(402, F_GETFD));
    hears_end(b[1]);
}

/* ---- stdio ---- */
CASE(streams_of_stdio)
{
    int fds[2];
    char line[64];
    tcp_pair(fds);
    FILE *a = fdopen(fds[0], "r+"), *b = fdopen(fds[1], "r+");
    CHECK(a && b);
    fprintf(a, "number %d\nsecond line\n", 42);
    EQ(fflush(a), 0);
    CHECK(fgets(line, sizeof(line), b) && strcmp(line, "number 42\n") == 0);
    CHECK(fgets(line, sizeof(line), b) && strcmp(line, "second line\n") == 0);
    fputs("back\n", b);
    EQ(fflush(b), 0);
    CHECK(fgets(line, sizeof(line), a) && strcmp(line, "back\n") == 0);
    EQ(fileno(a), fds[0]);
    fputs("unflushed", a);
    EQ(fclose(a), 0);
    FAILS(EBADF, fcntl(fds[0], F_GETFD));
    EQ(fread(line, 1, sizeof(line), b), 9);
    CHECK(memcmp(line, "unflushed", 9) == 0 && feof(b));
    EQ(fclose(b), 0);
}

CASE(dprintf_and_unbuffered_streams)
{
    int fds[2], number = 0;
    tcp_pair(fds);
    EQ(dprintf(fds[0], "%s %d\n", "value", 17), 9);
    FILE *in = fdopen(fds[1], "r");
    CHECK(in && setvbuf(in, NULL, _IONBF, 0) == 0);
    EQ(fscanf(in, "value %d", &number), 1);
    EQ(number, 17);
    EQ(getc(in), '\n');
    FILE *out = fdopen((int)MUST(dup(fds[0])), "w");
    CHECK(out && setvbuf(out, NULL, _IOLBF, 512) == 0);
    fputs("a line leaves at its end\n", out);
    char line[64];
    CHECK(fgets(line, sizeof(line), in) && strcmp(line, "a line leaves at its end\n") == 0);
    EQ(fclose(out), 0);
    says(fds[0], "still open");
    EQ(fread(line, 1, 10, in), 10);
}

CASE(freopened_stdout)
{
    int fds[2];
    tcp_pair(fds);
    fflush(stdout);
    int saved = (int)MUST(dup(1));
    EQ(dup2(fds[0], 1), 1);
    printf("to the peer %d", 5);
    puts("");
    EQ(fflush(stdout), 0);
    EQ(dup2(saved, 1), 1);
    hears(fds[1], "to the peer 5\n");
}

CASE(a_large_file_through_stdio)
{
    int fds[2];
    tcp_pair(fds);
    pthread_t t = reader_of(&fds[1]);
    FILE *out = fdopen(fds[0], "w");
    CHECK(out);
    uint8_t block[5000];
    for (size_t i = 0; i < 100; i++) {
        fill(block, sizeof(block), i * sizeof(block));
        EQ(fwrite(block, 1, sizeof(block), out), sizeof(block));
    }
    EQ(fclose(out), 0);
    EQ(read_by(t), 500000);
}

/* ---- sendfile and splice ---- */
CASE(sendfile_from_a_file)
{
    int fds[2], file = pattern_file(MEGABYTE + 123);
    tcp_pair(fds);
    pthread_t t = reader_of(&fds[1]);
    off_t at = 0;
    while (at < 1000)
        MUST(sendfile(fds[0], file, &at, (size_t)(1000 - at)));
    EQ(at, 1000);
    EQ(lseek(file, 0, SEEK_CUR), 0); /* with an offset the file's own stays */
    MUST(lseek(file, 1000, SEEK_SET));
    long n;
    while ((n = MUST(sendfile(fds[0], file, NULL, 10 * MEGABYTE))) > 0)
        ;
    EQ(n, 0);
    EQ(lseek(file, 0, SEEK_CUR), MEGABYTE + 123);
    MUST(close(fds[0]));
    EQ(read_by(t), MEGABYTE + 123);
    FAILS(EBADF, sendfile(fds[0], file, NULL, 1));
}

CASE(sendfile_without_waiting)
{
    int fds[2], file = pattern_file(16 * MEGABYTE);
    off_t at = 0;
    long n;
    tcp_pair(fds);
    nonblocking(fds[0]);
    while ((n = sendfile(fds[0], file, &at, 16 * MEGABYTE)) > 0)
        ;
    if (n == -1)
        EQ(errno, EAGAIN);
    pthread_t t = reader_of(&fds[1]);
    while (at < 16 * MEGABYTE) {
        wait_ready(fds[0], POLLOUT);
        n = sendfile(fds[0], file, &at, (size_t)(16 * MEGABYTE - at));
        CHECK(n > 0 || (n == -1 && errno == EAGAIN));
    }
    MUST(close(fds[0]));
    EQ(read_by(t), 16 * MEGABYTE);
}

CASE(splice_from_socket_to_socket)
{
    int in[2], out[2], p[2];
    tcp_pair(in);
    tcp_pair(out);
    MUST(pipe(p));
    nonblocking(in[1]);
    FAILS(EAGAIN, splice(in[1], NULL, p[1], NULL, 100, 0));
    MUST(fcntl(in[1], F_SETFL, O_RDWR));
    pthread_t t = reader_of(&out[1]);
    pid_t child = (pid_t)MUST(fork());
    if (child == 0) {
        MUST(close(in[1]));
        pattern_out(in[0], MEGABYTE);
        _exit(0);
    }
    MUST(close(in[0]));
    size_t sum = 0;
    long n;
    while ((n = MUST(splice(in[1], NULL, p[1], NULL, 65536, SPLICE_F_MOVE))) > 0) {
        sum += (size_t)n;
        while (n > 0)
            n -= MUST(splice(p[0], NULL, out[0], NULL, (size_t)n, SPLICE_F_MOVE));
    }
    EQ(sum, MEGABYTE);
    MUST(close(out[0]));
    EQ(read_by(t), MEGABYTE);
    reap(child);
    FAILS(EINVAL, splice(in[1], NULL, out[1], NULL, 1, 0)); /* one has to be a pipe */
}

CASE(splice_from_a_file)
{
    int fds[2], p[2], file = pattern_file(100000);
    loff_t at = 0;
    tcp_pair(fds);
    MUST(pipe(p));
    pthread_t t = reader_of(&fds[1]);
    while (at < 100000) {
        long n = MUST(splice(file, &at, p[1], NULL, 40000, 0));
        while (n > 0)
            n -= MUST(splice(p[0], NULL, fds[0], NULL, (size_t)n, SPLICE_F_MORE));
    }
    MUST(close(fds[0]));
    EQ(read_by(t), 100000);
}

/* ---- Many numbers ---- */
CASE(high_numbers)
{
    int fds[2];
    struct rlimit r;
    MUST(getrlimit(RLIMIT_NOFILE, &r));
    CHECK(r.rlim_max >= 3000);
    r.rlim_cur = r.rlim_max;
    MUST(setrlimit(RLIMIT_NOFILE, &r));
    tcp_pair(fds);
    EQ(dup2(fds[0], 2900), 2900);
    EQ(dup2(fds[1], 2901), 2901);
    MUST(close(fds[0]));
    MUST(close(fds[1]));
    says(2900, "high");
    EQ(wait_ready(2901, POLLIN), POLLIN | POLLOUT);
    hears(2901, "high");
    MUST(close(2900));
    hears_end(2901);
}

CASE(no_numbers_left)
{
    struct rlimit r;
    int l = listener(4), c = client_of(l), spare = (int)MUST(dup(0)), fds[2];
    tcp_pair(fds);
    MUST(getrlimit(RLIMIT_NOFILE, &r));
    rlim_t before = r.rlim_cur;
    wait_ready(l, POLLIN);
    MUST(close(spare));
    r.rlim_cur = (rlim_t)spare;
    MUST(setrlimit(RLIMIT_NOFILE, &r)); /* every number below is taken, and no higher one is allowed */
    for (int fd; (fd = dup(0)) != -1;)
        ;
    EQ(errno, EMFILE);
    FAILS(EMFILE, socket(AF_INET, SOCK_STREAM, 0));
    FAILS(EMFILE, accept(l, NULL, NULL));
    FAILS(EMFILE, dup(l));
    r.rlim_cur = before;
    MUST(setrlimit(RLIMIT_NOFILE, &r));
    says(c, "kept waiting"); /* the connection was not lost */
    hears(accept_one(l), "kept waiting");
}

int main(int argc, char **argv) { return posix_main(argc, argv); }
