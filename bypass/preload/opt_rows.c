/* SPDX-License-Identifier: Apache-2.0 */
/* opt_rows.c - socket options, a line each: who has it. socket(7), ip(7), ipv6(7), tcp(7), udp(7). */
#define _GNU_SOURCE
#include <netinet/tcp.h>
#include <netinet/udp.h>

#include "opt.h"

/* By number: this C library has no name for it. */
#define ONLY(number, side, text) [number] = {side, NUMBER, 0, text}
#define SAME(opt) ONLY(opt, SAME, #opt)
#define KEPT(opt) ONLY(opt, KEPT, #opt)
#define LOST(opt) ONLY(opt, LOST, #opt)
#define MULTI(opt) ONLY(opt, MULTI, #opt)
#define HAS(opt, kind) [opt] = {STACK, kind, BYPASS_##opt, #opt}
#define HAS_AS(opt, kind, core) [opt] = {STACK, kind, core, #opt}

static const struct option_row socket_rows[] = {
    SAME(SO_DEBUG),
    HAS(SO_REUSEADDR, NUMBER),
    SAME(SO_TYPE),
    HAS_AS(SO_ERROR, PENDING, 0),
    LOST(SO_DONTROUTE),
    HAS(SO_BROADCAST, NUMBER),
    HAS(SO_SNDBUF, DOUBLED),
    HAS(SO_RCVBUF, DOUBLED),
    HAS(SO_KEEPALIVE, NUMBER),
    HAS(SO_OOBINLINE, NUMBER),
    KEPT(SO_NO_CHECK), /* the stack sends checksums, which every receiver takes */
    KEPT(SO_PRIORITY),
    HAS(SO_LINGER, LINGER),
    SAME(SO_BSDCOMPAT),
    HAS(SO_REUSEPORT, NUMBER),
    SAME(SO_PASSCRED),
    SAME(SO_PEERCRED),
    HAS(SO_RCVLOWAT, NUMBER),
    SAME(SO_SNDLOWAT),
    HAS_AS(SO_RCVTIMEO, TIMEOUT, 0),
    HAS_AS(SO_SNDTIMEO, TIMEOUT, 1),
    LOST(SO_BINDTODEVICE),
    LOST(SO_ATTACH_FILTER),
    SAME(SO_DETACH_FILTER),
    HAS_AS(SO_PEERNAME, PEER, 0),
    LOST(SO_TIMESTAMP),
    SAME(SO_ACCEPTCONN),
    SAME(SO_PEERSEC),
    HAS_AS(SO_SNDBUFFORCE, FORCED, BYPASS_SO_SNDBUF),
    HAS_AS(SO_RCVBUFFORCE, FORCED, BYPASS_SO_RCVBUF),
    SAME(SO_PASSSEC),
    LOST(SO_TIMESTAMPNS),
    LOST(SO_MARK),
    LOST(SO_TIMESTAMPING),
    SAME(SO_PROTOCOL),
    SAME(SO_DOMAIN),
    LOST(SO_RXQ_OVFL),
    LOST(SO_WIFI_STATUS),
    LOST(SO_PEEK_OFF),
    SAME(SO_NOFCS),
    LOST(SO_LOCK_FILTER),
    SAME(SO_SELECT_ERR_QUEUE),
    KEPT(SO_BUSY_POLL),
    HAS(SO_MAX_PACING_RATE, RATE),
    SAME(SO_BPF_EXTENSIONS),
    KEPT(SO_INCOMING_CPU),
    LOST(SO_ATTACH_BPF),
    LOST(SO_ATTACH_REUSEPORT_CBPF),
    LOST(SO_ATTACH_REUSEPORT_EBPF),
    SAME(SO_CNX_ADVICE),
    SAME(SO_MEMINFO),
    SAME(SO_INCOMING_NAPI_ID),
    SAME(SO_COOKIE),
    SAME(SO_PEERGROUPS),
    LOST(SO_ZEROCOPY),
    LOST(SO_TXTIME),
    LOST(SO_BINDTOIFINDEX),
    LOST(SO_TIMESTAMP_NEW),
    LOST(SO_TIMESTAMPNS_NEW),
    LOST(SO_TIMESTAMPING_NEW),
    [66] = {STACK, TIMEOUT, 0, "SO_RCVTIMEO"},
    [67] = {STACK, TIMEOUT, 1, "SO_SNDTIMEO"},
    SAME(SO_DETACH_REUSEPORT_BPF),
    ONLY(69, KEPT, "SO_PREFER_BUSY_POLL"),
    ONLY(70, KEPT, "SO_BUSY_POLL_BUDGET"),
    ONLY(71, SAME, "SO_NETNS_COOKIE"),
    ONLY(72, SAME, "SO_BUF_LOCK"),
    ONLY(73, SAME, "SO_RESERVE_MEM"),
    ONLY(74, SAME, "SO_TXREHASH"),
    ONLY(75, LOST, "SO_RCVMARK"),
    ONLY(76, SAME, "SO_PASSPIDFD"),
    ONLY(77, SAME, "SO_PEERPIDFD"),
    ONLY(82, LOST, "SO_RCVPRIORITY"),
    ONLY(83, SAME, "SO_PASSRIGHTS"),
};

static const struct option_row ip_rows[] = {
    HAS(IP_TOS, NUMBER),
    HAS(IP_TTL, NUMBER),
    SAME(IP_HDRINCL),
    LOST(IP_OPTIONS),
    SAME(IP_ROUTER_ALERT),
    LOST(IP_RECVOPTS),
    LOST(IP_RETOPTS),
    LOST(IP_PKTINFO),
    SAME(IP_PKTOPTIONS),
    HAS(IP_MTU_DISCOVER, NUMBER),
    LOST(IP_RECVERR),
    LOST(IP_RECVTTL),
    LOST(IP_RECVTOS),
    HAS(IP_MTU, NUMBER),
    SAME(IP_FREEBIND), /* bind() tells */
    LOST(IP_IPSEC_POLICY),
    LOST(IP_XFRM_POLICY),
    LOST(IP_PASSSEC),
    LOST(IP_TRANSPARENT),
    LOST(IP_ORIGDSTADDR),
    LOST(IP_MINTTL),
    SAME(IP_NODEFRAG),
    LOST(IP_CHECKSUM),
    SAME(IP_BIND_ADDRESS_NO_PORT),
    LOST(IP_RECVFRAGSIZE),
    LOST(IP_RECVERR_RFC4884),
    MULTI(IP_MULTICAST_IF),
    SAME(IP_MULTICAST_TTL),
    SAME(IP_MULTICAST_LOOP),
    MULTI(IP_ADD_MEMBERSHIP),
    SAME(IP_DROP_MEMBERSHIP),
    MULTI(IP_UNBLOCK_SOURCE),
    MULTI(IP_BLOCK_SOURCE),
    MULTI(IP_ADD_SOURCE_MEMBERSHIP),
    SAME(IP_DROP_SOURCE_MEMBERSHIP),
    MULTI(IP_MSFILTER),
    MULTI(MCAST_JOIN_GROUP),
    MULTI(MCAST_BLOCK_SOURCE),
    MULTI(MCAST_UNBLOCK_SOURCE),
    SAME(MCAST_LEAVE_GROUP),
    MULTI(MCAST_JOIN_SOURCE_GROUP),
    SAME(MCAST_LEAVE_SOURCE_GROUP),
    MULTI(MCAST_MSFILTER),
    SAME(IP_MULTICAST_ALL),
    LOST(IP_UNICAST_IF),
    ONLY(51, LOST, "IP_LOCAL_PORT_RANGE"),
    ONLY(52, SAME, "IP_PROTOCOL"),
};

/* Of a socket that talks IPv4 by mapped addresses. What concerns only IPv6 packets changes nothing for these. */
static const struct option_row ipv6_rows[] = {
    LOST(IPV6_ADDRFORM),
    SAME(IPV6_2292PKTOPTIONS),
    SAME(IPV6_CHECKSUM),
    SAME(IPV6_NEXTHOP),
    SAME(IPV6_AUTHHDR),
    SAME(IPV6_UNICAST_HOPS),
    SAME(IPV6_MULTICAST_IF),
    SAME(IPV6_MULTICAST_HOPS),
    SAME(IPV6_MULTICAST_LOOP),
    MULTI(IPV6_JOIN_GROUP),
    SAME(IPV6_LEAVE_GROUP),
    SAME(IPV6_ROUTER_ALERT),
    SAME(IPV6_MTU_DISCOVER),
    HAS_AS(IPV6_MTU, NUMBER, BYPASS_IP_MTU),
    LOST(IPV6_RECVERR),
    HAS_AS(IPV6_V6ONLY, V6ONLY, 0),
    MULTI(IPV6_JOIN_ANYCAST),
    SAME(IPV6_LEAVE_ANYCAST),
    SAME(IPV6_MULTICAST_ALL),
    SAME(IPV6_ROUTER_ALERT_ISOLATE),
    LOST(IPV6_RECVERR_RFC4884),
    MULTI(MCAST_JOIN_GROUP),
    MULTI(MCAST_JOIN_SOURCE_GROUP),
    LOST(IPV6_RECVPKTINFO),
    LOST(IPV6_PKTINFO),
    LOST(IPV6_RECVHOPLIMIT),
    SAME(IPV6_HOPLIMIT),
    SAME(IPV6_RECVHOPOPTS),
    SAME(IPV6_HOPOPTS),
    SAME(IPV6_RTHDRDSTOPTS),
    SAME(IPV6_RECVRTHDR),
    SAME(IPV6_RTHDR),
    SAME(IPV6_RECVDSTOPTS),
    SAME(IPV6_DSTOPTS),
    SAME(IPV6_RECVPATHMTU),
    SAME(IPV6_PATHMTU),
    SAME(IPV6_DONTFRAG),
    LOST(IPV6_RECVTCLASS),
    SAME(IPV6_TCLASS),
    SAME(IPV6_AUTOFLOWLABEL),
    SAME(IPV6_ADDR_PREFERENCES),
    LOST(IPV6_MINHOPCOUNT),
    LOST(IPV6_ORIGDSTADDR),
    LOST(IPV6_TRANSPARENT),
    LOST(IPV6_UNICAST_IF),
    LOST(IPV6_RECVFRAGSIZE),
    SAME(IPV6_FREEBIND),
};

static const struct option_row tcp_rows[] = {
    HAS(TCP_NODELAY, NUMBER),
    HAS(TCP_MAXSEG, NUMBER),
    HAS(TCP_CORK, NUMBER),
    HAS(TCP_KEEPIDLE, NUMBER),
    HAS(TCP_KEEPINTVL, NUMBER),
    HAS(TCP_KEEPCNT, NUMBER),
    HAS(TCP_SYNCNT, NUMBER),
    HAS(TCP_LINGER2, NUMBER),
    KEPT(TCP_DEFER_ACCEPT), /* accept() returns earlier, before there is data */
    KEPT(TCP_WINDOW_CLAMP),
    HAS_AS(TCP_INFO, INFO, 0),
    HAS(TCP_QUICKACK, NUMBER),
    HAS_AS(TCP_CONGESTION, CONGESTION, 0),
    LOST(TCP_MD5SIG),
    KEPT(TCP_THIN_LINEAR_TIMEOUTS),
    SAME(TCP_THIN_DUPACK),
    HAS(TCP_USER_TIMEOUT, NUMBER),
    LOST(TCP_REPAIR),
    LOST(TCP_REPAIR_QUEUE),
    LOST(TCP_QUEUE_SEQ),
    LOST(TCP_REPAIR_OPTIONS),
    HAS(TCP_FASTOPEN, OPTIONAL),
    LOST(TCP_TIMESTAMP),
    HAS(TCP_NOTSENT_LOWAT, NUMBER),
    HAS_AS(TCP_CC_INFO, NOTHING, 0),
    LOST(TCP_SAVE_SYN),
    HAS_AS(TCP_SAVED_SYN, NOTHING, 0),
    LOST(TCP_REPAIR_WINDOW),
    HAS(TCP_FASTOPEN_CONNECT, OPTIONAL),
    LOST(TCP_ULP),
    LOST(TCP_MD5SIG_EXT),
    KEPT(TCP_FASTOPEN_KEY),
    KEPT(TCP_FASTOPEN_NO_COOKIE),
    LOST(TCP_ZEROCOPY_RECEIVE),
    LOST(TCP_INQ),
    LOST(TCP_TX_DELAY),
    [38 ... 42] = {LOST, NUMBER, 0, "TCP_AO"},
    ONLY(43, SAME, "TCP_IS_MPTCP"),
    ONLY(44, KEPT, "TCP_RTO_MAX_MS"),
    ONLY(45, KEPT, "TCP_RTO_MIN_US"),
    ONLY(46, KEPT, "TCP_DELACK_MAX_US"),
};

static const struct option_row udp_rows[] = {
    LOST(UDP_CORK),
    LOST(UDP_ENCAP),
    ONLY(101, SAME, "UDP_NO_CHECK6_TX"),
    ONLY(102, SAME, "UDP_NO_CHECK6_RX"),
    ONLY(103, LOST, "UDP_SEGMENT"),
    ONLY(104, KEPT, "UDP_GRO"), /* datagrams come one by one */
};

#define TABLE(rows)                                                                                                    \
    {                                                                                                                  \
        rows, sizeof rows / sizeof *rows                                                                               \
    }
static const struct {
    const struct option_row *rows;
    size_t count;
} tables[] = {[SOL_SOCKET] = TABLE(socket_rows),
              [IPPROTO_IP] = TABLE(ip_rows),
              [IPPROTO_IPV6] = TABLE(ipv6_rows),
              [IPPROTO_TCP] = TABLE(tcp_rows),
              [IPPROTO_UDP] = TABLE(udp_rows)};

const struct option_row *option_row(const struct object *o, int level, int name)
{
    static const struct option_row unknown = {.name = "an unknown option"};
    bool has = (level != IPPROTO_TCP || o->type == BYPASS_STREAM) &&
               (level != IPPROTO_UDP || o->type == BYPASS_DGRAM) && (level != IPPROTO_IPV6 || o->family == AF_INET6);

    if (!has || level < 0 || (size_t)level >= sizeof tables / sizeof *tables || name < 0 ||
        (size_t)name >= tables[level].count || !tables[level].rows[name].name) {
        return &unknown;
    }
    return &tables[level].rows[name];
}
