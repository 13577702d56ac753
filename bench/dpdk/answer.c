/* SPDX-License-Identifier: Apache-2.0 */
/*
 * answer.c - a server on a DPDK port, in one process: the stack, or the least that can answer.
 *
 *   answer stack|bare DEVICE PEER_MAC
 *
 * stack: bench/server_bypass.c (echo by UDP and TCP) as 10.0.0.1. bare: UDP with addresses and ports swapped, frame for
 * frame, which is what testpmd's 5tswap does. Spins. Prints "ready"; ends with its input.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <unistd.h>

#include "dpdk_port.h"
#include "server_bypass.h"

enum { FRAMES = 16384, BURST = 64, IP = 14, UDP = 34, MIN = 42 };

static volatile uint32_t stop;

static void *until_input_ends(void *arg)
{
    char c;

    (void)arg;
    while (read(0, &c, 1) > 0) {}
    stop = 1;
    return NULL;
}

static void swap(uint8_t *a, uint8_t *b, size_t n)
{
    uint8_t t[8];

    memcpy(t, a, n);
    memcpy(a, b, n);
    memcpy(b, t, n);
}

/* No sum changes when its words change places. */
static int turned(struct bypass_netdev *dev, bypass_pkt p)
{
    struct bypass_pkt_meta *m = (struct bypass_pkt_meta *)((uint8_t *)dev->meta + (size_t)p * dev->meta_stride);
    uint8_t *f = dev->mem + (size_t)p * dev->stride + m->off;

    if (m->len < MIN || f[12] != 8 || f[13] != 0 || f[IP] != 0x45 || f[IP + 9] != 17)
        return 0;
    swap(f, f + 6, 6);
    swap(f + IP + 12, f + IP + 16, 4);
    swap(f + UDP, f + UDP + 2, 2);
    m->flags = 0;
    return 1;
}

static void bare(struct bypass_netdev *dev)
{
    bypass_pkt in[BURST], out[BURST];

    while (!stop) {
        int n = dev->ops->rx_burst(dev, in, BURST), k = 0;

        for (int i = 0; i < n; i++) {
            if (turned(dev, in[i]))
                out[k++] = in[i];
            else
                dev->ops->free(dev, &in[i], 1);
        }
        if (k > 0) {
            (void)dev->ops->tx_burst(dev, out, k); /* what does not fit is lost, as with testpmd */
            (void)dev->ops->kick(dev);
            dev->ops->free(dev, out, k);
        }
        (void)dev->ops->reap(dev, out, BURST);
    }
}

static int parse_mac(const char *text, uint8_t mac[6])
{
    return sscanf(text, "%hhx:%hhx:%hhx:%hhx:%hhx:%hhx", mac, mac + 1, mac + 2, mac + 3, mac + 4, mac + 5) == 6;
}

int main(int argc, char **argv)
{
    struct server_args args = {.local.b = {[10] = 0xff, [11] = 0xff, 10, 0, 0, 1},
                               .peer.b = {[10] = 0xff, [11] = 0xff, 10, 0, 0, 2},
                               .flags = SERVER_SPIN};
    uint64_t stats[512];
    pthread_t thread;
    int err = 0;

    if (argc != 4 || !parse_mac(argv[3], args.peer_mac) || bypass_stat_count() > 512) {
        fprintf(stderr, "usage: answer stack|bare DEVICE PEER_MAC\n");
        return 2;
    }
    struct dpdk_end end = port_open(argv[2], FRAMES);

    pthread_create(&thread, NULL, until_input_ends, NULL);
    printf("ready\n");
    fflush(stdout);
    if (strcmp(argv[1], "bare") == 0)
        bare(end.dev);
    else
        err = server_run(end.dev, &args, &stop, stats);
    port_close(&end);
    return err < 0;
}
