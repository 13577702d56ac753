/* SPDX-License-Identifier: Apache-2.0 */
/* See afxdp_order.h. Linked with --wrap=bind,--wrap=mmap around the device's own code. */
#include <linux/if_xdp.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/types.h>

#include "afxdp_order.h"

enum { MAX = 64 };

static void *fill_ring[1024]; /* by descriptor */
static struct {
    uint32_t filled, flags;
} seen[MAX];
static int calls;

void *__real_mmap(void *at, size_t len, int prot, int flags, int fd, off_t off);
void *__wrap_mmap(void *at, size_t len, int prot, int flags, int fd, off_t off);
int __real_bind(int fd, const struct sockaddr *addr, socklen_t len);
int __wrap_bind(int fd, const struct sockaddr *addr, socklen_t len);

void *__wrap_mmap(void *at, size_t len, int prot, int flags, int fd, off_t off)
{
    void *map = __real_mmap(at, len, prot, flags, fd, off);

    if (off == (off_t)XDP_UMEM_PGOFF_FILL_RING && fd < 1024) {
        fill_ring[fd] = map;
    }
    return map;
}

int __wrap_bind(int fd, const struct sockaddr *addr, socklen_t len)
{
    struct xdp_mmap_offsets off = {0};
    socklen_t size = sizeof off;

    if (calls < MAX && fd < 1024 && fill_ring[fd] && getsockopt(fd, 283, XDP_MMAP_OFFSETS, &off, &size) == 0) {
        seen[calls].filled = *(uint32_t *)((char *)fill_ring[fd] + off.fr.producer);
        seen[calls].flags = ((const struct sockaddr_xdp *)addr)->sxdp_flags;
        calls++;
    }
    return __real_bind(fd, addr, len);
}

int order_binds(void) { return calls; }
uint32_t order_filled(int call) { return seen[call].filled; }
uint32_t order_flags(int call) { return seen[call].flags; }
