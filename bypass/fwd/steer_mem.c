/* SPDX-License-Identifier: Apache-2.0 */
/* steer_mem.c - see steer_mem.h. */
#define _GNU_SOURCE
#include "steer_mem.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/stat.h>

bool steer_mem_is(int fd) { return fcntl(fd, F_GET_SEALS) >= 0; }

int steer_mem_open(struct steer_mem *m, int fd)
{
    int seals = fcntl(fd, F_GET_SEALS), err;
    struct stat st;

    *m = (struct steer_mem){0};
    if (seals < 0 || !(seals & F_SEAL_SHRINK)) {
        return -EPERM;
    }
    if (fstat(fd, &st) < 0 || st.st_size <= 0) {
        return -EINVAL;
    }
    m->size = (size_t)st.st_size;
    m->map = mmap(NULL, m->size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (m->map == MAP_FAILED) {
        m->map = NULL;
        return -errno;
    }
    err = classify_attach(&m->view, m->map, m->size);
    if (err) {
        steer_mem_close(m);
    }
    return err;
}

void steer_mem_close(struct steer_mem *m)
{
    if (m->map) {
        munmap(m->map, m->size);
    }
    m->map = NULL;
}
