/* SPDX-License-Identifier: Apache-2.0 */
/*
 * inject.c - puts UDP frames on a veth without socket buffers: XDP frames, as a driver has them when they arrive.
 * The load of the drop benchmark that resembles a NIC: the receiver makes a socket buffer only if its XDP program
 * lets the packet pass (or if there is none), whereas a kernel sender's buffer has to be copied for XDP.
 *
 *   inject IFNAME DST_MAC SRC_IP DST_IP PORT SIZE WARMUP_MS MEASURE_MS PIDS
 *
 * A program of two instructions redirects to the interface; BPF_PROG_TEST_RUN with live frames runs it (kernel 5.18,
 * Documentation/bpf/bpf_prog_run.rst). The receiver needs XDP or GRO switched on. Prints one JSON object (measure.h).
 */
#include <arpa/inet.h>
#include <errno.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <netinet/udp.h>
#include <sys/syscall.h>

#include "measure.h"

enum { REPEAT = 1 << 14, BATCH = 64, MAX_SIZE = 1472, HEADERS = 14 + 20 + 8 };

static void die(const char *what)
{
    fprintf(stderr, "inject: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int load_redirect(unsigned ifindex)
{
    struct bpf_insn code[] = {
        {.code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_1, .imm = (int)ifindex},
        {.code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_2, .imm = 0},
        {.code = BPF_JMP | BPF_CALL, .imm = BPF_FUNC_redirect},
        {.code = BPF_JMP | BPF_EXIT},
    };
    union bpf_attr attr = {.prog_type = BPF_PROG_TYPE_XDP,
                           .insns = (uint64_t)(uintptr_t)code,
                           .insn_cnt = sizeof code / sizeof *code,
                           .license = (uint64_t)(uintptr_t) "Dual BSD/GPL"};
    return (int)syscall(SYS_bpf, BPF_PROG_LOAD, &attr, sizeof attr);
}

static uint16_t ip_checksum(const void *header)
{
    uint32_t sum = 0;
    uint16_t words[10];
    memcpy(words, header, sizeof words);
    for (int i = 0; i < 10; i++)
        sum += words[i];
    sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t) ~((sum & 0xffff) + (sum >> 16));
}

/* Without a UDP checksum, which IPv4 allows. Its length. */
static size_t make_frame(uint8_t *f, char **argv)
{
    size_t size = (size_t)atoi(argv[6]);
    struct iphdr ip = {.version = 4, .ihl = 5, .ttl = 64, .protocol = IPPROTO_UDP};
    struct udphdr udp = {.uh_sport = htons(9), .uh_dport = htons((uint16_t)atoi(argv[5]))};
    unsigned mac[6];
    if (size > MAX_SIZE || inet_pton(AF_INET, argv[3], &ip.saddr) != 1 || inet_pton(AF_INET, argv[4], &ip.daddr) != 1 ||
        sscanf(argv[2], "%x:%x:%x:%x:%x:%x", mac, mac + 1, mac + 2, mac + 3, mac + 4, mac + 5) != 6) {
        errno = EINVAL;
        die("arguments");
    }
    ip.tot_len = htons((uint16_t)(20 + 8 + size));
    ip.check = ip_checksum(&ip);
    udp.uh_ulen = htons((uint16_t)(8 + size));
    memset(f, 0, HEADERS + size);
    for (int i = 0; i < 6; i++)
        f[i] = (uint8_t)mac[i];
    f[6] = 2; /* some locally administered source */
    f[12] = ETH_P_IP >> 8;
    memcpy(f + 14, &ip, 20);
    memcpy(f + 34, &udp, 8);
    return HEADERS + size;
}

static uint64_t inject(int prog, const uint8_t *frame, size_t len, uint64_t end_ns)
{
    uint64_t sent = 0;
    while (clock_ns() < end_ns) {
        union bpf_attr attr = {.test = {.prog_fd = (uint32_t)prog,
                                        .data_in = (uint64_t)(uintptr_t)frame,
                                        .data_size_in = (uint32_t)len,
                                        .repeat = REPEAT,
                                        .flags = BPF_F_TEST_XDP_LIVE_FRAMES,
                                        .batch_size = BATCH}};
        if (syscall(SYS_bpf, BPF_PROG_TEST_RUN, &attr, sizeof attr) < 0)
            die("BPF_PROG_TEST_RUN with live frames");
        sent += REPEAT;
    }
    return sent;
}

int main(int argc, char **argv)
{
    static uint8_t frame[HEADERS + MAX_SIZE];
    char extra[64];
    if (argc != 10) {
        fprintf(stderr, "usage: inject IFNAME DST_MAC SRC_IP DST_IP PORT SIZE WARMUP_MS MEASURE_MS PIDS\n");
        return 2;
    }
    size_t len = make_frame(frame, argv);
    int prog = load_redirect(if_nametoindex(argv[1]));
    if (prog < 0)
        die("loading the program");
    uint64_t before = inject(prog, frame, len, clock_ns() + (uint64_t)atoi(argv[7]) * 1000000);
    struct cpu_sample from = cpu_sample(argv[9]);
    uint64_t begin_ns = clock_ns();
    uint64_t sent = inject(prog, frame, len, begin_ns + (uint64_t)atoi(argv[8]) * 1000000);
    uint64_t ns = clock_ns() - begin_ns;
    struct cpu_sample to = cpu_sample(argv[9]);
    snprintf(extra, sizeof extra, ", \"sent_in_all\": %llu", (unsigned long long)(before + sent));
    print_result(extra, sent, 0, ns, &from, &to, NULL);
    return 0;
}
