/* SPDX-License-Identifier: Apache-2.0 */
/* Answers leave by the queue that the question came by: echo replies, errors, ARP, datagrams. */
#include "memdev.h"

#include "core.h"
#include "csum.h"
#include "wire.h"

static const uint8_t us[4] = {192, 0, 2, 1}, peer[4] = {192, 0, 2, 2}, mac[6] = {2, 0, 0, 0, 0, 2};

static uint32_t packet(uint8_t *b, uint8_t proto, uint16_t port)
{
    memset(b, 0, 60);
    memcpy(b, (uint8_t[6]){2, 0, 0, 0, 0, 1}, 6);
    memcpy(b + 6, mac, 6);
    wr16(b + 12, ETH_TYPE_IPV4);
    uint8_t *ip = b + ETH_LEN, *l4 = ip + IP4_LEN;
    ip[0] = 0x45;
    wr16(ip + IP4_TOTAL, 28);
    ip[IP4_TTL] = 64;
    ip[IP4_PROTO] = proto;
    memcpy(ip + IP4_SRC, peer, 4);
    memcpy(ip + IP4_DST, us, 4);
    uint16_t csum = csum_fold(csum_bytes(ip, IP4_LEN, 0));
    memcpy(ip + IP4_CSUM, &csum, 2);
    if (proto == PROTO_UDP) {
        wr16(l4 + UDP_SRC, 9);
        wr16(l4 + UDP_DST, port);
        wr16(l4 + UDP_SIZE, 8);
    } else {
        l4[0] = ICMP_ECHO;
        wr16(l4 + ICMP_CSUM, (uint16_t) ~(ICMP_ECHO << 8));
    }
    return 42;
}

static uint32_t arp(uint8_t *b)
{
    memset(b, 0xff, 6);
    memcpy(b + 6, mac, 6);
    memcpy(b + 12, (uint8_t[10]){8, 6, 0, 1, 8, 0, 6, 4, 0, 1}, 10);
    memcpy(b + 22, mac, 6);
    memcpy(b + 28, peer, 4);
    memset(b + 32, 0, 6);
    memcpy(b + 38, us, 4);
    return 42;
}

/* The queue of the one frame that leaves when this one has come. */
static uint16_t asked_by(struct memdev *m, struct bypass_stack *s, const uint8_t *b, uint32_t len, uint16_t queue)
{
    size_t n;
    assert(memdev_inject_queue(m, b, len, queue, 0) == 0);
    (void)bypass_poll(s, 1, 64);
    assert(memdev_sent_count(m) == 1);
    uint16_t by = m->sent->queue;
    assert(memdev_sent(m, &n) != NULL);
    return by;
}

int main(void)
{
    struct memdev m;
    struct bypass_stack s;
    struct bypass_config cfg;
    uint64_t state = 1;
    struct bypass_env env = {.random = memdev_env_random, .ctx = &state};
    addr_t addr = addr_from_v4(us), far = addr_from_v4(peer);
    struct bypass_endpoint local = {.port = 7}, from;
    uint8_t b[64], buf[16];
    memdev_open(&m, 64, 2048);
    bypass_config_default(&cfg, 16);
    size_t size = bypass_arena_size(&cfg);
    void *arena = aligned_alloc(64, size);
    memset(arena, 0, size);
    assert(bypass_create(&s, arena, size, &cfg, &m.dev, &env, 0) == 0);
    assert(bypass_addr_add(&s, &addr, 24) == 0 && bypass_nexthop_set(&s, &far, mac, 0) == 0);
    bypass_sock sock = bypass_socket(&s, BYPASS_DGRAM);
    assert(bypass_bind(&s, sock, &local) == 0);
    for (uint16_t queue = 0; queue < 2; queue++) {
        assert(asked_by(&m, &s, b, packet(b, PROTO_ICMP, 0), queue) == queue);
        assert(asked_by(&m, &s, b, packet(b, PROTO_UDP, 4242), queue) == queue); /* nobody there */
        assert(asked_by(&m, &s, b, arp(b), queue) == queue);
        assert(memdev_inject_queue(&m, b, packet(b, PROTO_UDP, 7), queue, 0) == 0);
        (void)bypass_poll(&s, 1, 64);
        assert(bypass_recvfrom(&s, sock, buf, sizeof buf, 0, &from) == 0);
        assert(bypass_sendto(&s, sock, "y", 1, 0, &from) == 1);
        (void)bypass_flush(&s);
        assert(m.sent->queue == queue);
        memdev_forget_sent(&m);
    }
    bypass_destroy(&s);
    memdev_close(&m);
    free(arena);
    return 0;
}
