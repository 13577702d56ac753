/* SPDX-License-Identifier: Apache-2.0 */
/*
 * proc_shim.c - preloaded behind the library: what /proc says of a process in which a thread that is not the first calls
 * exec, and says for some microseconds only. PROC_SAYS is one of
 *
 *     links   the first thread has ended since its descriptors were listed: their links are gone
 *     list    it has ended while they were listed: the list is short
 *     stat    it has given its number away while its state was read: a zombie without any thread
 *
 * Each process is misrepresented once; the file PROC_SAID is made then. exec comes late, so that others look before.
 */
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { LATE_US = 8000 };

static DIR *shown;  /* a directory of descriptors that is not shown as it is */
static int told[2]; /* the last process that was misrepresented: by its descriptors, by its state */

static int says(const char *what)
{
    const char *set = getenv("PROC_SAYS");

    return set && strcmp(set, what) == 0;
}

/* Whether it is another process', and the first time. */
static int first_time(int kind, int pid)
{
    int fd;

    if (pid <= 0 || pid == getpid() || told[kind] == pid) {
        return 0;
    }
    told[kind] = pid;
    fd = open(getenv("PROC_SAID"), O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
    return fd >= 0 && close(fd) == 0;
}

DIR *opendir(const char *path)
{
    DIR *(*real)(const char *) = dlsym(RTLD_NEXT, "opendir");
    DIR *d = real(path);
    int pid = 0, end = 0;

    if (d && sscanf(path, "/proc/%d/fd%n", &pid, &end) == 1 && end && !path[end] && !says("stat") &&
        first_time(0, pid)) {
        shown = d;
    }
    return d;
}

int closedir(DIR *d)
{
    int (*real)(DIR *) = dlsym(RTLD_NEXT, "closedir");

    shown = shown == d ? NULL : shown;
    return real(d);
}

struct dirent *readdir(DIR *d)
{
    struct dirent *(*real)(DIR *) = dlsym(RTLD_NEXT, "readdir");
    struct dirent *e = real(d);

    return e && d == shown && says("list") && atoi(e->d_name) > STDERR_FILENO ? NULL : e;
}

ssize_t readlinkat(int dir, const char *name, char *to, size_t size)
{
    ssize_t (*real)(int, const char *, char *, size_t) = dlsym(RTLD_NEXT, "readlinkat");

    if (shown && dirfd(shown) == dir && says("links") && atoi(name) > STDERR_FILENO) {
        errno = ENOENT;
        return -1;
    }
    return real(dir, name, to, size);
}

ssize_t read(int fd, void *to, size_t size)
{
    ssize_t (*real)(int, void *, size_t) = dlsym(RTLD_NEXT, "read");
    char self[32], path[32] = "";
    int pid = 0, end = 0;

    if (says("stat")) {
        snprintf(self, sizeof self, "/proc/self/fd/%d", fd);
        if (readlink(self, path, sizeof path - 1) > 0 && sscanf(path, "/proc/%d/stat%n", &pid, &end) == 1 && end &&
            first_time(1, pid)) {
            return snprintf(to, size, "%d (posix) Z 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 0 0 1", pid);
        }
    }
    return real(fd, to, size);
}

int execve(const char *path, char *const argv[], char *const env[])
{
    int (*real)(const char *, char *const[], char *const[]) = dlsym(RTLD_NEXT, "execve");

    usleep(LATE_US);
    return real(path, argv, env);
}
