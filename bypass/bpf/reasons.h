/* SPDX-License-Identifier: (GPL-2.0 OR BSD-2-Clause) */
/*
 * Why a packet was steered, passed or dropped: every packet gets exactly one reason, and a reason has exactly one
 * verdict. Included by the steering program; read by bypass/bpf/build.py, which takes names, verdicts and texts
 * from these lines, so there is one list. The order is the order of the counters: append only.
 */
#ifndef BYPASS_BPF_REASONS_H
#define BYPASS_BPF_REASONS_H

/* clang-format off */
#define STEER_REASONS(R)                                                                   \
    R(MALFORMED, PASS, "a header is truncated or impossible")                              \
    R(OTHER_MAC, PASS, "not for this interface's MAC address")                             \
    R(GROUP, PASS, "to a group MAC address: not joined, or not UDP")                       \
    R(VLAN, PASS, "tagged: more tags than the policy looks behind, or a steer rule")       \
    R(NOT_IP, PASS, "neither IPv4 nor IPv6")                                               \
    R(IPV6, PASS, "IPv6, and no rule of the policy is about it")                           \
    R(NOT_LOCAL, PASS, "routed or bridged: the destination is not an address of this host") \
    R(TOO_DEEP, PASS, "more IPv6 extension headers than are looked behind")                \
    R(FRAGMENT, PASS, "a fragment without ports, or of a UDP datagram: reassembled by the kernel") \
    R(NO_RULE, PASS, "no rule of the policy matches")                                      \
    R(RULE_PASS, PASS, "a pass rule")                                                      \
    R(RULE_DROP, DROP, "a drop rule")                                                      \
    R(NO_ENDPOINT, PASS, "a steer rule, but no socket is open for it")                     \
    R(DRAINING, PASS, "belongs to a connection that the kernel had before")                \
    R(TCP_FRAGMENT, DROP, "a fragment of a live connection: the kernel would reset it")    \
    R(NO_SOCKET, PASS, "no AF_XDP socket on the queue: UDP or ICMP left to the kernel")    \
    R(TCP_NO_SOCKET, DROP, "no AF_XDP socket on the queue: the kernel would reset the connection") \
    R(STEERED, REDIRECT, "to the stack")                                                   \
    R(STEERED_ICMP, REDIRECT, "an ICMP error about a live flow, to the stack")             \
    R(STEERED_BARE, REDIRECT, "to the stack, without a verdict: no room for metadata")

/* What only the classifier of the DPDK backend (bypass/dpdk_backend/classify.h) has to say beside these: it is told which
 * flows the kernel holds, where the steering program asks, and its rules are exchanged under it. Appended to them. */
#define CLASSIFY_REASONS(R)                                                                \
    R(UNSETTLED, DROP, "a connection begins while the kernel is asked for its own: the peer tries again") \
    R(BUSY, DROP, "the rules were exchanged several times while one packet was looked at")
/* clang-format on */

#define STEER_REASON_ENUM(name, verdict, text) REASON_##name,
enum steer_reason { STEER_REASONS(STEER_REASON_ENUM) REASON_MAX };
enum classify_reason { REASON_BEFORE = REASON_MAX - 1, CLASSIFY_REASONS(STEER_REASON_ENUM) REASON_ALL };

#endif
