/* SPDX-License-Identifier: Apache-2.0 */
/*
 * options.c - every socket option, in every state of a socket, with sizes and values good and bad: prints what
 * setsockopt() and getsockopt() say, a line a call. tests/test_preload_options.py compares the kernel's lines with those of
 * the stack.
 *
 *     STATE OPTION CALL -> ERROR LENGTH BYTES
 */
#include <netinet/udp.h>
#include <sys/time.h>

#include "posix.h"

/* ---- States ------------------------------------------------------------------------------------------------------ */
struct made {
    int fd, others[2];
};

static int connect6(int fd, int listening)
{
    struct sockaddr_in6 a = {.sin6_family = AF_INET6, .sin6_port = name_of(listening).sin_port};

    memcpy(&a.sin6_addr, (uint8_t[16]){[10] = 0xff, [11] = 0xff, 127, 0, 0, 1}, 16);
    return connect(fd, (struct sockaddr *)&a, sizeof(a));
}

static struct made fresh_tcp(void) { return (struct made){(int)MUST(socket(AF_INET, SOCK_STREAM, 0)), {-1, -1}}; }
static struct made fresh_udp(void) { return (struct made){(int)MUST(socket(AF_INET, SOCK_DGRAM, 0)), {-1, -1}}; }
static struct made fresh_tcp6(void) { return (struct made){(int)MUST(socket(AF_INET6, SOCK_STREAM, 0)), {-1, -1}}; }
static struct made listening(void) { return (struct made){listener(4), {-1, -1}}; }
static struct made bound_udp(void) { return (struct made){bound(SOCK_DGRAM), {-1, -1}}; }

static struct made connected(void)
{
    int fds[2];

    tcp_pair(fds);
    return (struct made){fds[0], {fds[1], -1}};
}

static struct made accepted(void)
{
    struct made m = connected();

    return (struct made){m.others[0], {m.fd, -1}};
}

static struct made connected6(void)
{
    struct made m = fresh_tcp6();
    int l = listener(4);

    MUST(connect6(m.fd, l));
    m.others[0] = accept_one(l);
    m.others[1] = l;
    return m;
}

static struct made connected_udp(void)
{
    int fds[2];

    udp_pair(fds);
    return (struct made){fds[0], {fds[1], -1}};
}

static void unmake(struct made m)
{
    MUST(close(m.fd));
    for (int i = 0; i < 2; i++) {
        if (m.others[i] >= 0) {
            MUST(close(m.others[i]));
        }
    }
}

static const struct {
    const char *name;
    struct made (*make)(void);
    bool datagrams, inet6;
} states[] = {
    {"tcp-fresh", fresh_tcp, false, false},        {"tcp-listener", listening, false, false},
    {"tcp-connected", connected, false, false},    {"tcp-accepted", accepted, false, false},
    {"tcp6-fresh", fresh_tcp6, false, true},       {"tcp6-connected", connected6, false, true},
    {"udp-fresh", fresh_udp, true, false},         {"udp-bound", bound_udp, true, false},
    {"udp-connected", connected_udp, true, false},
};

/* ---- Options ------------------------------------------------------------------------------------------------------- */
enum shape { INT, FLAG, TIME, HARD_LINGER, RATE, NAME, SIZE_ONLY };

#define O(level, name, shape)                                                                                          \
    {                                                                                                                  \
        level, name, #name, shape                                                                                      \
    }
static const struct option_name {
    int level, number;
    const char *name;
    enum shape shape;
} options[] = {
    O(SOL_SOCKET, SO_REUSEADDR, INT),
    O(SOL_SOCKET, SO_TYPE, INT),
    O(SOL_SOCKET, SO_ERROR, INT),
    O(SOL_SOCKET, SO_DONTROUTE, FLAG),
    O(SOL_SOCKET, SO_BROADCAST, INT),
    O(SOL_SOCKET, SO_SNDBUF, INT),
    O(SOL_SOCKET, SO_RCVBUF, INT),
    O(SOL_SOCKET, SO_KEEPALIVE, INT),
    O(SOL_SOCKET, SO_OOBINLINE, INT),
    O(SOL_SOCKET, SO_NO_CHECK, INT),
    O(SOL_SOCKET, SO_PRIORITY, INT),
    O(SOL_SOCKET, SO_LINGER, HARD_LINGER),
    O(SOL_SOCKET, SO_REUSEPORT, INT),
    O(SOL_SOCKET, SO_PASSCRED, FLAG),
    O(SOL_SOCKET, SO_PEERCRED, SIZE_ONLY),
    O(SOL_SOCKET, SO_RCVLOWAT, INT),
    O(SOL_SOCKET, SO_SNDLOWAT, INT),
    O(SOL_SOCKET, SO_RCVTIMEO, TIME),
    O(SOL_SOCKET, SO_SNDTIMEO, TIME),
    O(SOL_SOCKET, SO_BINDTODEVICE, NAME),
    O(SOL_SOCKET, SO_PEERNAME, SIZE_ONLY),
    O(SOL_SOCKET, SO_TIMESTAMP, FLAG),
    O(SOL_SOCKET, SO_ACCEPTCONN, INT),
    O(SOL_SOCKET, SO_MARK, FLAG),
    O(SOL_SOCKET, SO_PROTOCOL, INT),
    O(SOL_SOCKET, SO_DOMAIN, INT),
    O(SOL_SOCKET, SO_RXQ_OVFL, FLAG),
    O(SOL_SOCKET, SO_BUSY_POLL, FLAG),
    O(SOL_SOCKET, SO_MAX_PACING_RATE, RATE),
    O(SOL_SOCKET, SO_MEMINFO, SIZE_ONLY),
    O(SOL_SOCKET, SO_COOKIE, SIZE_ONLY),
    O(SOL_SOCKET, SO_ZEROCOPY, FLAG),
    O(SOL_SOCKET, 9999, FLAG),
    O(IPPROTO_IP, IP_TOS, INT),
    O(IPPROTO_IP, IP_TTL, INT),
    O(IPPROTO_IP, IP_PKTINFO, FLAG),
    O(IPPROTO_IP, IP_MTU_DISCOVER, INT),
    O(IPPROTO_IP, IP_RECVERR, FLAG),
    O(IPPROTO_IP, IP_RECVTOS, FLAG),
    O(IPPROTO_IP, IP_MTU, INT),
    O(IPPROTO_IP, IP_FREEBIND, FLAG),
    O(IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, FLAG),
    O(IPPROTO_IP, IP_MULTICAST_TTL, INT),
    O(IPPROTO_IP, 9999, FLAG),
    O(IPPROTO_IPV6, IPV6_V6ONLY, FLAG),
    O(IPPROTO_IPV6, IPV6_UNICAST_HOPS, INT),
    O(IPPROTO_IPV6, IPV6_TCLASS, INT),
    O(IPPROTO_IPV6, IPV6_RECVPKTINFO, FLAG),
    O(IPPROTO_TCP, TCP_NODELAY, INT),
    O(IPPROTO_TCP, TCP_MAXSEG, INT),
    O(IPPROTO_TCP, TCP_CORK, INT),
    O(IPPROTO_TCP, TCP_KEEPIDLE, INT),
    O(IPPROTO_TCP, TCP_KEEPINTVL, INT),
    O(IPPROTO_TCP, TCP_KEEPCNT, INT),
    O(IPPROTO_TCP, TCP_SYNCNT, INT),
    O(IPPROTO_TCP, TCP_LINGER2, INT),
    O(IPPROTO_TCP, TCP_DEFER_ACCEPT, FLAG),
    O(IPPROTO_TCP, TCP_WINDOW_CLAMP, FLAG),
    O(IPPROTO_TCP, TCP_INFO, SIZE_ONLY),
    O(IPPROTO_TCP, TCP_QUICKACK, FLAG),
    O(IPPROTO_TCP, TCP_CONGESTION, NAME),
    O(IPPROTO_TCP, TCP_USER_TIMEOUT, INT),
    O(IPPROTO_TCP, TCP_FASTOPEN, FLAG),
    O(IPPROTO_TCP, TCP_NOTSENT_LOWAT, INT),
    O(IPPROTO_TCP, TCP_SAVED_SYN, SIZE_ONLY),
    O(IPPROTO_TCP, TCP_FASTOPEN_CONNECT, FLAG),
    O(IPPROTO_TCP, TCP_ULP, NAME),
    O(IPPROTO_TCP, TCP_INQ, FLAG),
    O(IPPROTO_TCP, 9999, FLAG),
    O(IPPROTO_UDP, UDP_CORK, FLAG),
    O(IPPROTO_UDP, 9999, FLAG),
    O(12345, 1, FLAG),
};

/* ---- Calls --------------------------------------------------------------------------------------------------------- */
static const char *where; /* state */
static const struct option_name *which;

static void line(const char *call, int failed, const void *bytes, socklen_t len)
{
    printf("%s %s/%d %s -> %s", where, which->name, which->level, call, failed ? strerrorname_np(errno) : "0");
    if (!failed && bytes) {
        printf(" %u", len);
        for (socklen_t i = 0; which->shape != SIZE_ONLY && i < len && i < 32; i++) {
            printf("%s%02x", i ? "" : " ", ((const uint8_t *)bytes)[i]);
        }
    }
    putchar('\n');
}

static void tells(int fd, const char *after, socklen_t size)
{
    uint8_t room[512];
    socklen_t len = size;
    char call[96];
    int r = getsockopt(fd, which->level, which->number, room, &len);

    snprintf(call, sizeof(call), "%sget%d", after, (int)size);
    line(call, r, room, len);
}

static void sets(int fd, const char *what, const void *value, socklen_t size)
{
    char after[64];
    int r = setsockopt(fd, which->level, which->number, value, size);

    line(what, r, NULL, 0);
    snprintf(after, sizeof(after), "%s,", what);
    if (r == 0) {
        tells(fd, after, which->shape == TIME ? 16 : which->shape == HARD_LINGER || which->shape == RATE ? 8 : 4);
    }
}

static void sets_ints(int fd)
{
    static const int many[] = {1,   0,   -1,  2,   3,     5,     64,    87,        88,       127,
                               128, 255, 256, 536, 32767, 32768, 70000, INT32_MAX, INT32_MIN},
                     few[] = {0, 1};
    const int *values = which->shape == FLAG ? few : many;
    int count = which->shape == FLAG ? 2 : (int)(sizeof(many) / sizeof(*many));
    char what[64];

    for (socklen_t size = 0; size <= 5; size++) {
        uint8_t bytes[8] = {1};

        snprintf(what, sizeof(what), "set%u(1)", size);
        sets(fd, what, bytes, size);
    }
    for (int i = 0; i < count; i++) {
        snprintf(what, sizeof(what), "set4(%d)", values[i]);
        sets(fd, what, &values[i], 4);
    }
}

static void sets_times(int fd)
{
    static const struct timeval values[] = {{1, 0},       {0, 1},  {0, 250000}, {2, 999999}, {-1, 0},
                                            {0, 1000000}, {0, -1}, {100000, 0}, {0, 0}};
    char what[64];

    for (size_t i = 0; i < sizeof(values) / sizeof(*values); i++) {
        snprintf(what, sizeof(what), "set16(%ld,%ld)", values[i].tv_sec, values[i].tv_usec);
        sets(fd, what, &values[i], sizeof(values[i]));
    }
    sets(fd, "set8", &values[0], 8);
}

static void sets_lingers(int fd)
{
    static const struct linger values[] = {{0, 0}, {1, 0}, {1, 5}, {7, 5}, {1, 100000}};
    char what[64];

    for (size_t i = 0; i < sizeof(values) / sizeof(*values); i++) {
        snprintf(what, sizeof(what), "set8(%d,%d)", values[i].l_onoff, values[i].l_linger);
        sets(fd, what, &values[i], sizeof(values[i]));
    }
    sets(fd, "set4", &values[1], 4);
    sets(fd, "set8 again", &values[0], 8); /* its end is not to be a reset */
}

static void sets_rates(int fd)
{
    static const uint64_t values[] = {1000000, 5000000000, UINT32_MAX, UINT64_MAX};
    char what[64];

    for (size_t i = 0; i < sizeof(values) / sizeof(*values); i++) {
        for (socklen_t size = 3; size <= 9; size++) {
            uint8_t room[16] = {0};

            memcpy(room, &values[i], 8);
            snprintf(what, sizeof(what), "set%u(%lx)", size, values[i]);
            sets(fd, what, room, size);
        }
    }
}

static void sets_names(int fd)
{
    static const char *const values[] = {"reno", "cubic", "no such name", "a name that is much too long for this"};

    for (size_t i = 0; i < sizeof(values) / sizeof(*values); i++) {
        sets(fd, values[i], values[i], (socklen_t)strlen(values[i]));
        tells(fd, "", 16);
    }
    sets(fd, "set0", "", 0);
}

static void bad_calls(int fd)
{
    socklen_t len = 4;
    int room = 1;

    line("set of NULL", setsockopt(fd, which->level, which->number, NULL, 4), NULL, 0);
    line("set of size -1", setsockopt(fd, which->level, which->number, &room, (socklen_t)-1), NULL, 0);
    line("get into NULL", getsockopt(fd, which->level, which->number, NULL, &len), NULL, 0);
    line("get without a size", getsockopt(fd, which->level, which->number, &room, NULL), NULL, 0);
    len = (socklen_t)-1;
    line("get of size -1", getsockopt(fd, which->level, which->number, &room, &len), NULL, 0);
}

static void every_call(int fd)
{
    static const socklen_t sizes[] = {0, 1, 2, 3, 4, 5, 8, 16, 28, 300};

    for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++) {
        tells(fd, "", sizes[i]);
    }
    bad_calls(fd);
    switch (which->shape) {
    case TIME:
        sets_times(fd);
        break;
    case HARD_LINGER:
        sets_lingers(fd);
        break;
    case RATE:
        sets_rates(fd);
        break;
    case NAME:
        sets_names(fd);
        break;
    case SIZE_ONLY:
        break;
    default:
        sets_ints(fd);
    }
}

/* Set before connect(), told after it, and by the connection that a listener with it accepts. */
static void carried(int value)
{
    int l = listener(4), fd = (int)MUST(socket(AF_INET, SOCK_STREAM, 0)), there;
    struct sockaddr_in a = name_of(l);
    char call[64];

    snprintf(call, sizeof(call), "set4(%d),connect,", value);
    where = "tcp-carried";
    line(call, setsockopt(fd, which->level, which->number, &value, 4), NULL, 0);
    setsockopt(l, which->level, which->number, &value, 4);
    MUST(connect(fd, (struct sockaddr *)&a, sizeof(a)));
    tells(fd, call, 4);
    there = accept_one(l);
    where = "tcp-inherited";
    tells(there, call, 4);
    MUST(close(fd));
    MUST(close(there));
    MUST(close(l));
}

int main(void)
{
    static const int values[] = {1, 0, 2, 100, 20000};

    for (size_t i = 0; i < sizeof(options) / sizeof(*options); i++) {
        which = &options[i];
        for (size_t s = 0; s < sizeof(states) / sizeof(*states); s++) {
            struct made m = states[s].make();

            where = states[s].name;
            every_call(m.fd);
            unmake(m);
        }
        for (size_t v = 0; which->shape == INT && v < sizeof(values) / sizeof(*values); v++) {
            carried(values[v]);
        }
    }
    (void)posix_main;
    return 0;
}
