/* SPDX-License-Identifier: Apache-2.0 */
/* Every counter of the stack, once: STAT(name). Names are what `bypass stats` prints. */
#ifndef BYPASS_STACK_COUNTERS_H
#define BYPASS_STACK_COUNTERS_H

/* One paragraph a protocol. */
/* clang-format off */
#define STATS(X)                                                                                             \
    /* frames */                                                                                             \
    X(rx_frames) X(rx_bytes) X(tx_frames) X(tx_bytes) X(tx_ring_full) X(no_frame) X(no_chunk)                \
    /* ethernet and arp */                                                                                   \
    X(eth_in_short) X(eth_in_not_us) X(eth_in_unknown_type) X(arp_in_bad) X(arp_in_ignored)                  \
    X(arp_in_conflict) X(arp_in_request) X(arp_in_reply) X(arp_out_request) X(arp_out_reply)                 \
    /* next hops */                                                                                          \
    X(dst_miss) X(dst_evicted) X(dst_table_full) X(dst_failed) X(dst_wait_dropped)                           \
    /* ipv4 */                                                                                               \
    X(ip_in_short) X(ip_in_bad_version) X(ip_in_bad_header) X(ip_in_bad_checksum) X(ip_in_truncated)         \
    X(ip_in_not_us) X(ip_in_bad_source) X(ip_in_unknown_proto) X(ip_in_source_route) X(ip_in_broadcast)      \
    X(ip_out_unreachable) X(ip_out_too_big) X(ip_out_fragments) X(ip_frag_in) X(ip_frag_reassembled)         \
    X(ip_frag_timeout) X(ip_frag_overlap) X(ip_frag_duplicate) X(ip_frag_too_many) X(ip_frag_too_large)      \
    X(ip_frag_bad) X(ip_frag_after_overlap)                                                                  \
    /* icmp */                                                                                               \
    X(icmp_in_short) X(icmp_in_bad_checksum) X(icmp_in_echo) X(icmp_out_echo_reply) X(icmp_in_error)         \
    X(icmp_in_error_bad) X(icmp_in_ignored) X(icmp_out_unreachable) X(icmp_out_time_exceeded)                \
    X(icmp_out_limited)                                                                                      \
    /* udp */                                                                                                \
    X(udp_in) X(udp_in_short) X(udp_in_bad_length) X(udp_in_bad_checksum) X(udp_in_no_socket) X(udp_in_full) \
    X(udp_in_no_memory) X(udp_out) X(udp_out_blocked) X(udp_in_error)                                        \
    /* tcp */                                                                                                \
    X(tcp_in) X(tcp_in_fast) X(tcp_in_joined) X(tcp_out_joined) X(tcp_in_short) X(tcp_in_bad_offset) X(tcp_in_bad_checksum) X(tcp_in_bad_options)              \
    X(tcp_in_no_socket) X(tcp_in_data_segments) X(tcp_in_out_of_order) X(tcp_in_duplicate)                   \
    X(tcp_in_out_of_window) X(tcp_in_paws) X(tcp_in_bad_ack) X(tcp_in_after_close) X(tcp_in_no_memory)       \
    X(tcp_in_reset) X(tcp_in_reset_ignored) X(tcp_in_syn_in_window) X(tcp_in_zero_window_probe)              \
    X(tcp_in_error_quoted) X(tcp_out) X(tcp_out_data_segments) X(tcp_out_acks) X(tcp_out_resets)             \
    X(tcp_out_challenge_acks) X(tcp_out_challenge_limited) X(tcp_out_retransmits) X(tcp_out_probes)          \
    X(tcp_out_keepalives) X(tcp_fast_retransmits) X(tcp_timeouts) X(tcp_dup_acks) X(tcp_partial_acks)        \
    X(tcp_sack_ignored) X(tcp_sack_reneged) X(tcp_in_dsacks) X(tcp_reordered) X(tcp_lost_retransmits)        \
    X(tcp_out_loss_probes) X(tcp_loss_probe_repairs) X(tcp_undone_recoveries) X(tcp_undone_timeouts)         \
    X(tcp_blocked) X(tcp_active_opens) X(tcp_passive_opens) X(tcp_accepted) X(tcp_established)               \
    X(tcp_listen_overflow) X(tcp_syn_overflow) X(tcp_no_conn) X(tcp_time_wait) X(tcp_time_wait_reused)       \
    X(tcp_time_wait_overflow) X(tcp_mtu_probes) X(tcp_mtu_probes_acked) X(tcp_mtu_probes_lost)                   \
    X(tcp_fastopen_cookies) X(tcp_fastopen_passive) X(tcp_fastopen_bad_cookies) X(tcp_fastopen_overflow)     \
    X(tcp_fastopen_active) X(tcp_fastopen_active_taken)                                                      \
    X(tcp_mtu_black_holes) X(tcp_cookies_sent) X(tcp_cookies_good) X(tcp_cookies_bad)                             \
    X(tcp_aborted) X(tcp_timed_out) X(tcp_keepalive_timeouts) X(tcp_ooo_pruned)      \
    X(tcp_ooo_refused) X(tcp_out_sacks) X(tcp_out_dsacks) X(tcp_tune_rcvbuf) X(tcp_tune_sndbuf) \
    X(tcp_tune_held_back) X(tcp_syn_pressure) X(tcp_in_marked) X(tcp_in_ece) X(tcp_copied_bytes)
/* clang-format on */

enum stat {
#define X(name) ST_##name,
    STATS(X)
#undef X
        ST_COUNT
};

#endif
