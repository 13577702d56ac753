/* SPDX-License-Identifier: Apache-2.0 */
/*
 * stdio.c - streams on sockets: the C library reads and writes its streams by calls of its own, which come by none of
 * ours. fdopen() of a socket gives a stream that does (fopencookie(3)); and where descriptor 0, 1 or 2 becomes a socket
 * (inetd), stdin, stdout or stderr becomes such a stream. dprintf() is formatted here.
 *
 * Not so on the stack: wide characters on such a stream (fwide(3)), freopen() of it, std::cout and its kin, and a FILE of
 * fd 0 to 2 that was copied from stdin and so on before.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "preload.h"

struct stream {
    struct stream *next, **prev;
    FILE *file;
    int fd;
};

static struct stream *streams; /* that are open */
static pthread_mutex_t listed = PTHREAD_MUTEX_INITIALIZER;

/* ---- What the C library calls ----------------------------------------------------------------------------------- */
static ssize_t stream_read(void *cookie, char *buf, size_t n) { return read(((struct stream *)cookie)->fd, buf, n); }

static ssize_t write_all(int fd, const char *buf, size_t n)
{
    size_t done = 0;

    while (done < n) {
        ssize_t went = write(fd, buf + done, n - done);

        if (went < 0) {
            break;
        }
        done += (size_t)went;
    }
    return (ssize_t)done;
}

/* All of it, or the stream is in error (fopencookie(3): never negative). */
static ssize_t stream_write(void *cookie, const char *buf, size_t n)
{
    return write_all(((struct stream *)cookie)->fd, buf, n);
}

static int stream_seek(void *cookie, off64_t *at, int whence)
{
    (void)cookie, (void)at, (void)whence;
    errno = ESPIPE;
    return -1;
}

static int stream_close(void *cookie)
{
    struct stream *s = cookie;
    int fd = s->fd;

    pthread_mutex_lock(&listed);
    *s->prev = s->next;
    if (s->next) {
        s->next->prev = s->prev;
    }
    pthread_mutex_unlock(&listed);
    free(s);
    return close(fd);
}

/* ---- Streams --------------------------------------------------------------------------------------------------------- */
static FILE *stream_open(int fd, const char *mode)
{
    const cookie_io_functions_t calls = {stream_read, stream_write, stream_seek, stream_close};
    struct stream *s = calloc(1, sizeof *s);

    if (!s) {
        return NULL;
    }
    s->fd = fd;
    s->file = fopencookie(s, mode, calls);
    if (!s->file) {
        free(s);
        return NULL;
    }
    s->file->_fileno = fd; /* for fileno() */
    pthread_mutex_lock(&listed);
    s->next = streams;
    s->prev = &streams;
    if (s->next) {
        s->next->prev = &s->next;
    }
    streams = s;
    pthread_mutex_unlock(&listed);
    return s->file;
}

EXPORT FILE *fdopen(int fd, const char *mode)
{
    real_load();
    if (!fd_on_stack(fd) || !strchr("rwa", *mode)) {
        return real.fdopen(fd, mode);
    }
    return stream_open(fd, mode);
}

/* Standard streams of programs that copy them late enough: all but C++'s, and those who keep a FILE of their own. */
void stream_standard(int fd)
{
    FILE **const standard[] = {&stdin, &stdout, &stderr};
    FILE *ours;

    if (fd < 0 || fd > 2 || !fd_on_stack(fd) || !*standard[fd] || (*standard[fd])->_fileno != fd) {
        return;
    }
    for (struct stream *s = streams; s; s = s->next) {
        if (s->file == *standard[fd]) {
            return;
        }
    }
    if (fd > 0) {
        fflush(*standard[fd]);
    }
    ours = stream_open(fd, fd == 0 ? "r" : "w");
    if (ours) {
        if (fd == 2) {
            setvbuf(ours, NULL, _IONBF, 0);
        }
        *standard[fd] = ours;
    }
}

void streams_flush(void)
{
    FILE *files[64];
    size_t n = 0;

    pthread_mutex_lock(&listed);
    for (struct stream *s = streams; s && n < sizeof files / sizeof *files; s = s->next) {
        files[n++] = s->file;
    }
    pthread_mutex_unlock(&listed);
    while (n > 0) {
        fflush(files[--n]);
    }
}

/* ---- dprintf(3) -------------------------------------------------------------------------------------------------------- */
static int print(int fd, const char *format, va_list args)
{
    char *text;
    int n = vasprintf(&text, format, args);

    if (n < 0) {
        return -1;
    }
    n = write_all(fd, text, (size_t)n) == n ? n : -1;
    free(text);
    return n;
}

EXPORT int vdprintf(int fd, const char *format, va_list args)
{
    real_load();
    return fd_on_stack(fd) ? print(fd, format, args) : real.vdprintf(fd, format, args);
}

EXPORT int dprintf(int fd, const char *format, ...)
{
    va_list args;
    int n;

    va_start(args, format);
    n = vdprintf(fd, format, args);
    va_end(args);
    return n;
}

EXPORT int __vdprintf_chk(int fd, int flag, const char *format, va_list args)
{
    real_load();
    return fd_on_stack(fd) ? print(fd, format, args) : real.__vdprintf_chk(fd, flag, format, args);
}

EXPORT int __dprintf_chk(int fd, int flag, const char *format, ...)
{
    va_list args;
    int n;

    va_start(args, format);
    n = __vdprintf_chk(fd, flag, format, args);
    va_end(args);
    return n;
}
