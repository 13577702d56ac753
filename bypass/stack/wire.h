/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Wire formats below TCP: offsets, sizes and code points, nothing else. Fields are read and written with rd16, wr16
 * and memcpy at these offsets. Ethernet (RFC 894), ARP (RFC 826), IPv4 (RFC 791), ICMP (RFC 792, 1191), UDP (RFC 768).
 */
#ifndef BYPASS_STACK_WIRE_H
#define BYPASS_STACK_WIRE_H

enum { ETH_DST = 0, ETH_SRC = 6, ETH_TYPE = 12, ETH_LEN = 14, ETH_GROUP_BIT = 1 };
enum { ETH_TYPE_IPV4 = 0x0800, ETH_TYPE_ARP = 0x0806 };

/*  0                   1                   2                   3
 *  |Version|  IHL  |Type of Service|          Total Length         |
 *  |         Identification        |Flags|     Fragment Offset     |
 *  |  Time to Live |    Protocol   |        Header Checksum        |
 *  |                Source, Destination, Options                   |
 */
enum {
    IP4_VER_IHL = 0,
    IP4_TOS = 1,
    IP4_TOTAL = 2,
    IP4_ID = 4,
    IP4_FRAG = 6,
    IP4_TTL = 8,
    IP4_PROTO = 9,
    IP4_CSUM = 10,
    IP4_SRC = 12,
    IP4_DST = 16,
    IP4_LEN = 20,     /* without options */
    IP4_MAX = 65535,  /* bytes of a datagram, header included */
    IP4_MIN_MTU = 68, /* RFC 791 3.2: every path carries this much */
    IP4_TTL_DEFAULT = 64,
    /* flags and offset word */
    IP4_DF = 0x4000,
    IP4_MF = 0x2000,
    IP4_OFFSET_MASK = 0x1fff, /* in units of 8 bytes */
};
enum { IP4_OPT_END = 0, IP4_OPT_NOP = 1, IP4_OPT_LSRR = 131, IP4_OPT_SSRR = 137 };
enum { PROTO_ICMP = 1, PROTO_TCP = 6, PROTO_UDP = 17 };

enum { NET_HEADERS = ETH_LEN + IP4_LEN }; /* what ip_out() puts in front */

enum {
    ARP_HTYPE = 0,
    ARP_PTYPE = 2,
    ARP_HLEN = 4,
    ARP_PLEN = 5,
    ARP_OP = 6,
    ARP_SHA = 8,  /* sender's MAC */
    ARP_SPA = 14, /* sender's address */
    ARP_THA = 18,
    ARP_TPA = 24,
    ARP_LEN = 28,
    ARP_HTYPE_ETHERNET = 1,
    ARP_REQUEST = 1,
    ARP_REPLY = 2,
};

enum {
    ICMP_TYPE = 0,
    ICMP_CODE = 1,
    ICMP_CSUM = 2,
    ICMP_MTU = 6, /* RFC 1191 4: next-hop MTU of code 4 */
    ICMP_LEN = 8,
    ICMP_QUOTE_MIN = 8,   /* bytes after the quoted IP header, RFC 792 */
    ICMP_ERROR_MAX = 576, /* RFC 1812 4.3.2.3: as much as fits, not more than this */
};
enum {
    ICMP_ECHO_REPLY = 0,
    ICMP_UNREACHABLE = 3,
    ICMP_ECHO = 8,
    ICMP_TIME_EXCEEDED = 11,
    ICMP_PARAMETER = 12,
};
enum { ICMP_UNREACH_PROTO = 2, ICMP_UNREACH_PORT = 3, ICMP_UNREACH_FRAG = 4, ICMP_TIME_REASSEMBLY = 1 };

enum { TCP_SEQ = 4, TCP_FLAGS = 13, TCP_CSUM = 16 }; /* in the TCP header */
enum { UDP_SRC = 0, UDP_DST = 2, UDP_SIZE = 4, UDP_CSUM = 6, UDP_LEN = 8 };
enum { UDP_MAX_PAYLOAD = IP4_MAX - IP4_LEN - UDP_LEN };

#endif
