# SPDX-License-Identifier: Apache-2.0
"""The conversations notice a wrong TCP.

Each mutant is the stack with one line changed, built beside the right one; the named test has to fail with it. A mutant
whose line is gone is a failure: mend the list.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from mutants import Mutant, Runs, assert_noticed, by_its_test

MUTANTS = {
    "a reset anywhere in the window ends the connection": Mutant(
        "tcp_in.c",
        "if (!seq_eq(g->seq, c->rcv_nxt)) {",
        "if (false) {",
        "reset::test_a_reset_elsewhere_in_the_window_draws_a_challenge_and_nothing_else",
    ),
    "sequence numbers are compared without wrapping": Mutant(
        "tcp_ack.c",
        "bool advances = seq_gt(g->ack, c->snd_una);",
        "bool advances = g->ack.v > c->snd_una.v;",
        "send::test_written_bytes_leave_in_segments_and_the_last_is_pushed",
    ),
    "PAWS compares without wrapping": Mutant(
        "tcp_in.c",
        "return (int32_t)(g->opt.ts_val - c->ts_recent) < 0 &&",
        "return g->opt.ts_val < c->ts_recent &&",
        "receive::test_timestamps_wrap",
    ),
    "an old timestamp is good": Mutant(
        "tcp_in.c",
        "if (unlikely(paws_rejects(s, c, g))) {",
        "if (false) {",
        "receive::test_an_old_timestamp_marks_an_old_duplicate",
    ),
    "the window is not scaled": Mutant(
        "tcp_ack.c",
        "c->snd_wnd = g->wnd << c->snd_wscale;",
        "c->snd_wnd = g->wnd;",
        "send::test_the_window_is_scaled_as_agreed",
    ),
    "any segment updates the window": Mutant(
        "tcp_ack.c",
        "if (advances || seq_lt(c->snd_wl1, g->seq) || (seq_eq(c->snd_wl1, g->seq) && seq_leq(c->snd_wl2, g->ack))) {",
        "if (true) {",
        "send::test_a_window_from_an_older_segment_is_not_believed",
    ),
    "a new acknowledgment keeps the old window": Mutant(
        "tcp_ack.c",
        "if (advances || seq_lt(c->snd_wl1,",
        "if (seq_lt(c->snd_wl1,",
        "send::test_a_new_acknowledgment_tells_the_window_whatever_its_sequence_number",
    ),
    "Nagle is off": Mutant(
        "tcp_out.c",
        "return !flight || (c->flags & TF_NODELAY);",
        "return true;",
        "send::test_nagle_holds_small_writes_back_while_data_is_in_flight",
    ),
    "the second duplicate ACK retransmits": Mutant(
        "tcp_recover.c",
        "lost = fl->dupacks == 3 &&",
        "lost = fl->dupacks == 2 &&",
        "loss::test_the_third_duplicate_ack_retransmits",
    ),
    "a recovery may follow at once": Mutant(
        "tcp_recover.c",
        "a->duplicate && !(fl->hold && seq_leq(c->snd_una, fl->recover));",
        "a->duplicate;",
        "loss::test_duplicates_at_the_end_of_a_recovery_do_not_begin_another",
    ),
    "a partial ACK ends the recovery": Mutant(
        "tcp_recover.c",
        "{\n    if (seq_geq(c->snd_una, fl->recover)) {\n        finish(",
        "{\n    if (true) {\n        finish(",
        "loss::test_a_partial_ack_retransmits_the_next_hole_at_once",
    ),
    "limited transmit counts for ssthresh": Mutant(
        "tcp_cc.c",
        "min_u32(v.flight_size, v.cwnd)",
        "v.flight_size",
        "loss::test_limited_transmit_sends_new_segments_on_the_first_two_duplicates",
    ),
    "timeouts do not back off": Mutant(
        "tcp_timer.c",
        "(uint64_t)c->rto_us << min_u32(c->backoff, 16)",
        "(uint64_t)c->rto_us",
        "loss::test_timeouts_double_up_to_two_minutes_and_then_give_up",
    ),
    "round trips of retransmissions count": Mutant(
        "tcp_snd.c",
        "sm->resent = sm->resent || (m->seg_flags & SEG_RTX);",
        "sm->resent = false;",
        "loss::test_no_round_trip_is_taken_from_a_segment_that_was_sent_twice",
    ),
    "slow start never ends": Mutant(
        "tcp_reno.c",
        "if (acked == 0 || cc->cwnd < cc->ssthresh)",
        "if (true)",
        "loss::test_congestion_avoidance_adds_a_segment_each_round_trip",
    ),
    "a SYN's window is scaled": Mutant(
        "tcp_in.c",
        "g->wnd >>= c->snd_wscale;",
        "",
        "handshake::test_a_simultaneous_open_becomes_one_connection",
    ),
    "what was not offered is answered": Mutant(
        "tcp_req.c",
        "if (o->has_ts) {\n        r->flags |= REQ_TS;",
        "{\n        r->flags |= REQ_TS;",
        "handshake::test_the_syn_ack_offers_only_what_the_syn_offered",
    ),
    "a reset that acknowledges nothing refuses a connection": Mutant(
        "tcp_in.c",
        "if (!ack_ok) {\n            STAT(s, tcp_in_reset_ignored);\n            return;\n        }",
        "",
        "handshake::test_a_reset_that_does_not_acknowledge_our_syn_is_ignored",
    ),
    "TIME_WAIT does not start over": Mutant(
        "tcp_in.c",
        "if (c->state == BYPASS_TIME_WAIT && (g->flags & TCP_FIN)) {",
        "if (false) {",
        "close::test_a_repeated_fin_in_time_wait_is_acknowledged_and_the_wait_starts_over",
    ),
    "a FIN ahead of data is taken at once": Mutant(
        "tcp_rcv.c",
        "if (fin && seq_gt(end, c->rcv_nxt)) {",
        "if (false) {",
        "close::test_a_fin_ahead_of_missing_data_waits_for_it",
    ),
    "a closed window keeps an orphan for ever": Mutant(
        "tcp_timer.c",
        "bool enough = orphan(c) && c->backoff >= ORPHAN_RETRIES;",
        "bool enough = false;",
        "close::test_a_closed_window_does_not_keep_an_orphan_for_ever",
    ),
    "unread data is forgotten on close": Mutant(
        "tcp_conn.c",
        "if (c->rcv_queued > 0 || conn_cold(s, c)->opt.linger_s == 0 ||",
        "if (conn_cold(s, c)->opt.linger_s == 0 ||",
        "close::test_closing_with_unread_data_resets",
    ),
    "data comes after the end": Mutant(
        "tcp_in.c",
        "&& !(c->flags & TF_FIN_IN)) /* nothing",
        ") /* nothing",
        "receive::test_data_behind_the_peers_fin_is_not_delivered",
    ),
    "data that was filled in comes twice": Mutant(
        "tcp_ooo.c",
        "uint32_t have = c->rcv_nxt.v - *v.seq, next = *v.next;",
        "uint32_t have = 0, next = *v.next;",
        "receive::test_overlaps_of_every_shape_give_the_bytes_once",
    ),
    "the window follows every byte that is read": Mutant(
        "tcp_rcv.c",
        "if (room < offered + step)\n        return offered;",
        "",
        "receive::test_the_right_edge_moves_by_worthwhile_steps_only",
    ),
    "a duplicate is reported for ever": Mutant(
        "tcp_sack_rcv.c",
        "c->feat &= ~(uint32_t)TX_DSACK;",
        "",
        "sack_receive::test_a_duplicate_below_the_acknowledgment_is_reported_once",
    ),
    "the block that changed last comes anywhere": Mutant(
        "tcp_ooo.c",
        "recent_touch(o, at);",
        "if (o->recents == 0)\n        recent_touch(o, at);",
        "sack_receive::test_the_block_that_changed_last_comes_first",
    ),
    "a full segment swallows the report": Mutant(
        "tcp_out.c",
        "answered &= ~(uint32_t)TF_ACK_NOW; /* a full",
        "; /* a full",
        "sack_receive::test_an_ack_that_is_due_is_not_swallowed_by_a_full_segment",
    ),
    "ranges are not bounded": Mutant(
        "tcp_ooo.c",
        "uint32_t i = o->ranges < most ?",
        "uint32_t i = most ?",
        "sack_receive::test_a_sender_of_every_second_segment_gets_a_bounded_number_of_ranges",
    ),
    "a read goes on over the mark": Mutant(
        "tcp_urg.c",
        "return n < ahead ? n : ahead;",
        "return n;",
        "urgent::test_a_read_stops_at_the_mark_and_the_next_passes_over_the_byte",
    ),
    "an older pointer moves the mark": Mutant(
        "tcp_urg.c",
        "(k->urg_state != URG_NONE && seq_leq(up, k->rcv_up))",
        "false",
        "urgent::test_an_older_or_repeated_pointer_changes_nothing",
    ),
    "buffers grow without measure": Mutant(
        "tcp_tune.c",
        "if (copied > k->space_bytes) {",
        "if (true) {",
        "autotune::test_the_window_stays_when_the_peer_sends_little",
    ),
    "the maximum of the configuration is not kept": Mutant(
        "tcp_tune.c",
        "uint32_t most = min_u32(core(s)->cfg.rcvbuf_max, memory_share(s, c));",
        "uint32_t most = memory_share(s, c);",
        "autotune::test_the_window_grows_to_the_maximum_and_no_further",
    ),
    "pressure is not felt": Mutant(
        "tcp_listen.c",
        "if (tcp_tune_pressure(s)) {",
        "if (false) {",
        "autotune::test_under_pressure_new_connections_are_refused_and_old_ones_go_on",
    ),
    "out-of-order data may take every chunk": Mutant(
        "tcp_rcv.c",
        "if (!in_order && p->used >= p->cap - p->cap / 4)",
        "if (false)",
        "receive::test_one_connections_out_of_order_data_leaves_chunks_for_others",
    ),
    "ICMP errors need not quote anything in flight": Mutant(
        "tcp_in.c",
        "if (seq_lt(seq(e->seq), first) || seq_geq(seq(e->seq), c->snd_nxt))\n        return;",
        "",
        "icmp::test_errors_that_quote_nothing_in_flight_are_ignored",
    ),
    "the ISN forgets the peer's port": Mutant(
        "tcp_conn.c",
        "} id = {*laddr, *raddr, lport, rport};",
        "} id = {*laddr, *raddr, lport, 0};",
        "isn::test_every_part_of_the_flows_name_changes_it",
    ),
    "stale handles live": Mutant(
        "sock.c",
        "return k->type != SOCK_FREE && k->gen == gen ? k : NULL;",
        "return k->type != SOCK_FREE ? k : NULL;",
        "sockets::test_a_stale_handle_is_refused_by_every_call",
    ),
    "a cookie is good for any MSS": Mutant(
        "tcp_cookie.c",
        "} id = {g->ri->dst, g->ri->src, g->dst_port, g->src_port, irs.v, mss};",
        "} id = {g->ri->dst, g->ri->src, g->dst_port, g->src_port, irs.v, 0};",
        "cookies::test_what_is_not_exactly_a_cookie_draws_a_reset_and_leaves_nothing",
    ),
    "a cookie's secret is never renewed": Mutant(
        "tcp_cookie.c",
        "key[0] = core_random(s);",
        "return now;",
        "cookies::test_a_cookie_lives_for_one_period_of_the_secrets_and_not_for_three",
    ),
    "a TIME_WAIT is taken over at once": Mutant(
        "tcp_tw.c",
        "conn_now_ms(s) - c->ts_recent_ms > 1000;",
        "true;",
        "close::test_connecting_again_replaces_our_own_time_wait_when_timestamps_guard_it",
    ),
    "a server may not start again": Mutant(
        "tcp_port.c",
        "!(both & (OPT_REUSEADDR | OPT_REUSEPORT)))",
        "true)",
        "ports::test_a_server_starts_again_beside_its_old_connections_with_reuseaddr",
    ),
    "all destinations share one counter of ports": Mutant(
        "tcp_port.c",
        "port_clock[f >> 32 & (TCP_PORT_CLOCKS - 1)]",
        "port_clock[0]",
        "ports::test_a_peer_cannot_count_connections_to_others_by_its_own_ports",
    ),
    "half-open connections have no bound": Mutant(
        "tcp_listen.c",
        "return ep->syn_count >= max_u32(ep->backlog, 128) || p->used == p->cap;",
        "return p->used == p->cap;",
        "handshake::test_many_half_open_connections_are_bounded",
    ),
    "a reset ends TIME_WAIT": Mutant(
        "tcp_in.c",
        "if (c->state == BYPASS_TIME_WAIT) {\n        STAT(s, tcp_in_reset_ignored);",
        "if (false) {",
        "reset::test_a_reset_does_not_end_time_wait",
    ),
    "answers to a SYN wait for the next hop": Mutant(
        "ipv4.c",
        "if (mac == NULL || (d && d->state == DST_OK)) {",
        "if (mac == NULL || d) {",
        "handshake::test_a_burst_of_syns_is_answered_while_the_question_for_their_neighbour_is_open",
    ),
    "any cookie opens fast": Mutant(
        "tcp_fastopen.c",
        "if (cookie == COOKIE_WRONG) {",
        "if (false) {",
        "fastopen::test_data_in_a_syn_with_a_forged_cookie_is_never_delivered",
    ),
    "a cookie is everybody's": Mutant(
        "tcp_fastopen.c",
        "} id = {*client, period};",
        "} id = {{{0}}, period};\n    (void)client;",
        "fastopen::test_a_cookie_is_good_for_the_address_that_it_was_given_to",
    ),
    "connections that opened fast have no bound": Mutant(
        "tcp_fastopen.c",
        "return ep->fo_pending + ep->fo_resets < ep->fo_max;",
        "return ep->fo_resets < ep->fo_max;",
        "fastopen::test_connections_before_the_end_of_their_handshake_are_bounded",
    ),
    "resets give a thief of cookies more": Mutant(
        "tcp_fastopen.c",
        "ep->fo_resets++;",
        "",
        "fastopen::test_a_stolen_cookie_gets_no_more_connections_by_the_resets_of_its_owner",
    ),
    "data that went with the SYN is never sent again": Mutant(
        "tcp_fastopen.c",
        "take_back(c, g->ack);",
        "",
        "fastopen::test_what_the_syn_ack_does_not_acknowledge_goes_again_at_once",
    ),
    "a repeated SYN has data again": Mutant(
        "tcp_fastopen.c",
        "(c->flags & TF_SYN_RTX)) /* 4.2.1: repeated without */",
        "false)",
        "fastopen::test_a_lost_syn_is_repeated_without_data_and_option",
    ),
    "a lent byte leaves room in the window": Mutant(
        "tcp_rcv.c",
        "held += conn_cold(s, c)->rcv_lent;",
        "held += 0;",
        "zero_copy::test_what_is_lent_counts_against_the_window_until_it_is_released",
    ),
    "a token is good for what is lent later": Mutant(
        "sock_zc.c",
        "return m->seg_flags == IN_LENT && m->hash == token_serial(token) ? m : NULL;",
        "return m->seg_flags == IN_LENT ? m : NULL;",
        "zero_copy::test_a_mistake_with_tokens_is_an_error_and_harms_nobody",
    ),
    "what is lent is settled with whoever has its place": Mutant(
        "sock_zc.c",
        "return core_alive(s) && cold_at(s, idx)->gen == gen ? conn_at(s, idx) : NULL;",
        "(void)gen;\n    return conn_at(s, idx);",
        "zero_copy::test_lent_buffers_outlive_socket_connection_and_whoever_has_its_place",
    ),
    "a program may take all frames to write in": Mutant(
        "sock_zc.c",
        "core(s)->writing < s->dev->frames / 4 && ",
        "",
        "zero_copy::test_a_quarter_of_the_frames_may_be_out_for_writing",
    ),
    "a user timeout waits for the next retransmission": Mutant(
        "tcp_timer.c",
        "    c->rtx_at = max_u64(end, now_ns(s) + MSEC_NS);\n    tcp_timer_update(s, c);",
        "",
        "timers::test_a_user_timeout_ends_a_connection_whose_data_is_not_acknowledged",
    ),
    "keepalive counts probes whatever the user timeout": Mutant(
        "tcp_timer.c",
        "if (k->opt.user_timeout_ms == 0)\n        return c->probes",
        "if (true)\n        return c->probes",
        "timers::test_a_user_timeout_decides_about_keepalive_in_place_of_the_number_of_probes",
    ),
    "what is read is not acknowledged": Mutant(
        "tcp_rcv.c",
        "if (unlikely(c->feat & TX_LISTENS) && (c->flags & TF_ACK_LATER) && c->rcv_queued == 0)",
        "if (false)",
        "ack::test_what_a_listener_reads_is_acknowledged_when_it_is_read",
    ),
    "a read that leaves something is acknowledged": Mutant(
        "tcp_rcv.c",
        "(c->flags & TF_ACK_LATER) && c->rcv_queued == 0)\n        ack_alone",
        "(c->flags & TF_ACK_LATER))\n        ack_alone",
        "ack::test_nothing_leaves_before_all_is_read",
    ),
    "who has listened listens for good": Mutant(
        "tcp_rcv.c",
        "    c->feat &= ~(uint32_t)(TX_ACK_ALONE | TX_ACKS_ALONE);\n",
        "    if (c->feat & TX_LISTENS)\n        return;\n",
        "ack::test_a_late_answer_costs_one_acknowledgment_and_the_next_request_none",
    ),
    "an answer ends listening, whatever was before": Mutant(
        "tcp_rcv.c",
        "bool pieces = (c->feat & TX_LISTENS) && (c->feat & TX_ACKS_ALONE);",
        "bool pieces = false;",
        "ack::test_pieces_and_then_an_answer_do_not_wait_each_time",
    ),
    "the first delay is long": Mutant(
        "tcp_timer.c",
        "if (unlikely(!(c->feat & (TX_ANSWERS | TX_LISTENS))))",
        "if (false)",
        "ack::test_small_writes_in_one_direction_wait_once_and_briefly",
    ),
    "each delay is short": Mutant(
        "tcp_timer.c",
        "if (unlikely(!(c->feat & (TX_ANSWERS | TX_LISTENS))))",
        "if (true)",
        "ack::test_an_answer_may_take_its_time_once_answers_have_come",
    ),
    "the urgent byte stays in the stream": Mutant(
        "tcp_urg.c",
        "    tcp_rcv_skip(s, c, 1);\n    mark_passed(c, k);\n    return n;",
        "    mark_passed(c, k);\n    return n;",
        "urgent::test_a_read_stops_at_the_mark_and_the_next_passes_over_the_byte",
    ),
    "removal leaves a hole in the flow table": Mutant(
        "tcp_conn.c",
        "if (((j - home) & mask) < ((j - i) & mask))\n            continue;",
        "if (true)\n            break;",
        "sockets::test_many_connections_that_come_and_go_stay_findable",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name: str, tmp_path: Path, mutant_runs: Runs) -> None:
    assert_noticed(by_its_test(MUTANTS[name], tmp_path, mutant_runs))
