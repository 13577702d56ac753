/* SPDX-License-Identifier: Apache-2.0 */
/* maps.c - see maps.h. */
#define _GNU_SOURCE
#include "maps.h"

#include <errno.h>
#include <linux/bpf.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static int map_call(int cmd, int map, const void *key, const void *value)
{
    union bpf_attr attr;

    memset(&attr, 0, sizeof attr);
    attr.map_fd = (uint32_t)map;
    attr.key = (uintptr_t)key;
    attr.value = (uintptr_t)value;
    return syscall(SYS_bpf, cmd, &attr, sizeof attr) < 0 ? -errno : 0;
}

int map_update(int map, uint32_t key, uint32_t value) { return map_call(BPF_MAP_UPDATE_ELEM, map, &key, &value); }
int map_delete(int map, const void *key) { return map_call(BPF_MAP_DELETE_ELEM, map, key, NULL); }
