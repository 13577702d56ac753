/* SPDX-License-Identifier: Apache-2.0 */
/* Streams on sockets: fdopen(), dprintf(), and stdin, stdout, stderr of a program that a connection started. posix.h. */
#include <signal.h>
#include <stdarg.h>

#include "posix.h"

static FILE *stream(int fd, const char *mode)
{
    FILE *f = fdopen(fd, mode);

    CHECK(f != NULL);
    return f;
}

CASE(a_stream_reads_lines)
{
    int fds[2];
    char line[32];
    tcp_pair(fds);
    FILE *f = stream(fds[1], "r");
    EQ(fileno(f), fds[1]);
    says(fds[0], "one\ntwo\nrest");
    MUST(shutdown(fds[0], SHUT_WR));
    CHECK(fgets(line, sizeof(line), f) && strcmp(line, "one\n") == 0);
    CHECK(fgets(line, sizeof(line), f) && strcmp(line, "two\n") == 0);
    EQ(ungetc('R', f), 'R');
    EQ(fgetc(f), 'R');
    CHECK(fgets(line, sizeof(line), f) && strcmp(line, "rest") == 0);
    EQ(fgetc(f), EOF);
    CHECK(feof(f) && !ferror(f));
    EQ(fclose(f), 0);
    FAILS(EBADF, fcntl(fds[1], F_GETFD));
}

CASE(a_stream_writes_what_is_flushed)
{
    int fds[2];
    tcp_pair(fds);
    FILE *f = stream(fds[0], "w");
    EQ(fprintf(f, "%s %d\n", "number", 42), 10);
    EQ(ready(fds[1]), POLLOUT); /* it is in the buffer */
    EQ(fflush(f), 0);
    hears(fds[1], "number 42\n");
    EQ(setvbuf(f, NULL, _IOLBF, 0), 0);
    EQ(fputs("a line\n", f) >= 0, 1);
    hears(fds[1], "a line\n");
    fputs("the end", f);
    EQ(fclose(f), 0);
    hears(fds[1], "the end");
    hears_end(fds[1]);
}

CASE(a_stream_writes_more_than_buffers_hold)
{
    enum { ALL = 4 << 20 };
    int fds[2];
    static uint8_t block[ALL];
    tcp_pair(fds);
    pid_t child = (pid_t)MUST(fork());
    if (child == 0) {
        MUST(close(fds[1]));
        FILE *f = stream(fds[0], "w");
        fill(block, ALL, 0);
        EQ(fwrite(block, 1, ALL, f), ALL);
        exit(0); /* the rest of the buffer goes out */
    }
    MUST(close(fds[0]));
    EQ(pattern_in(fds[1]), ALL);
    reap(child);
}

CASE(two_streams_on_one_connection)
{
    int fds[2];
    char word[16];
    tcp_pair(fds);
    FILE *in = stream(fds[1], "r"), *out = stream((int)MUST(dup(fds[1])), "w");
    says(fds[0], "ping\n");
    EQ(fscanf(in, "%15s", word), 1);
    fprintf(out, "%s back\n", word);
    EQ(fflush(out), 0);
    hears(fds[0], "ping back\n");
    EQ(fclose(in), 0);
    fputs("still", out);
    EQ(fclose(out), 0);
    hears(fds[0], "still");
    hears_end(fds[0]);
}

CASE(a_stream_for_both_ways)
{
    int fds[2];
    char line[16];
    tcp_pair(fds);
    FILE *f = stream(fds[1], "r+");
    EQ(setvbuf(f, NULL, _IONBF, 0), 0);
    says(fds[0], "question\n");
    CHECK(fgets(line, sizeof(line), f) && strcmp(line, "question\n") == 0);
    FAILS(ESPIPE, fseek(f, 0, SEEK_CUR));
    EQ(fclose(f), 0);
    hears_end(fds[0]);
}

CASE(a_stream_may_be_opened_before_the_connection)
{
    int l = listener(1), fd = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    struct sockaddr_in a = name_of(l);
    FILE *f = stream(fd, "w");
    MUST(connect(fd, (struct sockaddr *)&a, sizeof(a)));
    int s = accept_one(l);
    fputs("hello", f);
    EQ(fclose(f), 0);
    hears(s, "hello");
    hears_end(s);
}

CASE(a_stream_of_a_bad_mode_or_descriptor)
{
    int fds[2];
    tcp_pair(fds);
    errno = 0;
    CHECK(fdopen(fds[0], "x") == NULL && errno == EINVAL);
    MUST(close(fds[0]));
    errno = 0;
    CHECK(fdopen(fds[0], "r") == NULL && errno == EBADF);
}

CASE(a_broken_stream_says_so)
{
    int fds[2];
    tcp_pair(fds);
    FILE *f = stream(fds[0], "w");
    signal(SIGPIPE, SIG_IGN);
    MUST(shutdown(fds[0], SHUT_WR));
    fputs("nowhere", f);
    errno = 0;
    EQ(fflush(f), EOF);
    EQ(errno, EPIPE);
    CHECK(ferror(f));
}

static int says_by_list(int fd, const char *format, ...)
{
    va_list args;
    int n;

    va_start(args, format);
    n = vdprintf(fd, format, args);
    va_end(args);
    return n;
}

CASE(dprintf_and_vdprintf)
{
    int fds[2], p[2];
    char got[8];
    tcp_pair(fds);
    EQ(dprintf(fds[0], "%d and %s", 7, "seven"), 11);
    EQ(says_by_list(fds[0], "%5.2f", 3.14159), 5);
    hears(fds[1], "7 and seven 3.14");
    MUST(pipe(p));
    EQ(dprintf(p[1], "pipe"), 4);
    EQ(read(p[0], got, sizeof(got)), 4);
}

CASE(exit_writes_what_is_buffered_and_underscore_exit_does_not)
{
    for (int how = 0; how < 2; how++) {
        int fds[2];
        tcp_pair(fds);
        pid_t child = (pid_t)MUST(fork());
        if (child == 0) {
            fputs("buffered", stream(fds[0], "w"));
            how == 0 ? exit(0) : _exit(0);
        }
        MUST(close(fds[0]));
        reap(child);
        if (how == 0)
            hears(fds[1], "buffered");
        hears_end(fds[1]);
    }
}

/* ---- A program that a connection started, and that never heard of sockets ---- */
static void program(void)
{
    char line[64];

    fprintf(stderr, "to stderr\n");
    while (fgets(line, sizeof(line), stdin))
        printf("you said %s", line);
    puts("bye");
}

CASE(a_program_with_its_standard_streams_on_a_connection)
{
    int fds[2];
    tcp_pair(fds);
    pid_t child = (pid_t)MUST(fork());
    if (child == 0) {
        for (int i = 0; i < 3; i++)
            MUST(dup2(fds[1], i));
        closefrom(3);
        execl(posix_self, posix_self, "--program", NULL);
        _exit(127);
    }
    MUST(close(fds[1]));
    says(fds[0], "hello\nagain\n");
    MUST(shutdown(fds[0], SHUT_WR));
    hears(fds[0], "to stderr\nyou said hello\nyou said again\nbye\n");
    hears_end(fds[0]);
    reap(child);
}

CASE(a_child_puts_a_connection_on_its_standard_streams)
{
    int fds[2];
    tcp_pair(fds);
    pid_t child = (pid_t)MUST(fork());
    if (child == 0) {
        for (int i = 0; i < 3; i++)
            MUST(dup2(fds[1], i));
        closefrom(3);
        program();
        exit(0);
    }
    MUST(close(fds[1]));
    says(fds[0], "hello\n");
    MUST(shutdown(fds[0], SHUT_WR));
    hears(fds[0], "to stderr\nyou said hello\nbye\n");
    hears_end(fds[0]);
    reap(child);
}

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "--program") == 0) {
        program();
        return 0;
    }
    return posix_main(argc, argv);
}
