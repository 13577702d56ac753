/* SPDX-License-Identifier: Apache-2.0 */
/*
 * blast.c - sends UDP datagrams as fast as the kernel takes them: the load of the drop benchmark.
 *
 *   blast ADDRESS PORT SIZE WARMUP_MS MEASURE_MS PIDS
 *
 * On a veth the sender's core does the receiver's work as well (XDP program, netfilter hooks), so the rate of
 * sending is the rate of sending and dropping together. Prints one JSON object (measure.h).
 */
#include <arpa/inet.h>
#include <errno.h>
#include <sys/socket.h>

#include "measure.h"

enum { BATCH = 64, MAX_SIZE = 1472 };

static void die(const char *what)
{
    fprintf(stderr, "blast: %s: %s\n", what, strerror(errno));
    exit(1);
}

/* Until `end_ns`; datagrams sent. */
static uint64_t blast(int fd, struct mmsghdr *msgs, uint64_t end_ns)
{
    uint64_t sent = 0;
    while (clock_ns() < end_ns) {
        int n = sendmmsg(fd, msgs, BATCH, 0);
        if (n < 0 && errno != EAGAIN && errno != ENOBUFS && errno != ECONNREFUSED)
            die("sendmmsg");
        sent += n > 0 ? (uint64_t)n : 0;
    }
    return sent;
}

int main(int argc, char **argv)
{
    static struct mmsghdr msgs[BATCH];
    static uint8_t payload[MAX_SIZE];
    char extra[64];
    if (argc != 7) {
        fprintf(stderr, "usage: blast ADDRESS PORT SIZE WARMUP_MS MEASURE_MS PIDS\n");
        return 2;
    }
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[2]))};
    struct iovec iov = {.iov_base = payload, .iov_len = (size_t)atoi(argv[3])};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || inet_pton(AF_INET, argv[1], &to.sin_addr) != 1 || iov.iov_len > MAX_SIZE)
        die("arguments");
    for (int i = 0; i < BATCH; i++) /* not connected: an answer of ICMP does not disturb */
        msgs[i].msg_hdr = (struct msghdr){.msg_name = &to, .msg_namelen = sizeof to, .msg_iov = &iov, .msg_iovlen = 1};
    uint64_t before = blast(fd, msgs, clock_ns() + (uint64_t)atoi(argv[4]) * 1000000);
    struct cpu_sample from = cpu_sample(argv[6]);
    uint64_t begin_ns = clock_ns();
    uint64_t sent = blast(fd, msgs, begin_ns + (uint64_t)atoi(argv[5]) * 1000000);
    uint64_t ns = clock_ns() - begin_ns;
    struct cpu_sample to_cpu = cpu_sample(argv[6]);
    snprintf(extra, sizeof extra, ", \"sent_in_all\": %llu", (unsigned long long)(before + sent));
    print_result(extra, sent, 0, ns, &from, &to_cpu, NULL);
    return 0;
}
