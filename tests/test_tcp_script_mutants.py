# SPDX-License-Identifier: Apache-2.0
"""The scripts notice a wrong TCP.

Each mutant is the stack with one line changed; the script of tests/scripts that is named beside it has to differ with
it. A mutant whose line is gone is a failure: mend the list. docs/scripts.md has the numbers by topic.
"""

from __future__ import annotations

from pathlib import Path
from subprocess import CompletedProcess

import oracle
import pytest
from mutants import Mutant, Runs, build

MUTANTS: dict[str, dict[str, Mutant]] = {
    "handshake": {
        "a SYN-ACK is repeated every second": Mutant(
            "tcp_req.c",
            "((RTO_INIT_US * 1000ull) << r->tries)",
            "(RTO_INIT_US * 1000ull)",
            "handshake/synack_retransmitted",
        ),
        "any SYN-ACK answers our SYN": Mutant(
            "tcp_in.c",
            "if (seq_leq(g->ack, conn_cold(s, c)->iss) || seq_gt(g->ack, c->snd_nxt)) {",
            "if (false) {",
            "handshake/wrong_ack_in_syn_sent",
        ),
        "TCP_SYNCNT is not heard": Mutant(
            "tcp_timer.c", "? conn_cold(s, c)->opt.syn_retries :", "? 6u :", "handshake/opening_gives_up"
        ),
        "the reset of a closed port has the wrong number": Mutant(
            "tcp_out.c", "b.ack = seq_add(g->seq, seg_len(g));", "b.ack = g->seq;", "handshake/closed_port"
        ),
        "the accept queue has no end": Mutant(
            "tcp_listen.c",
            "{ return ep->accept_count > ep->backlog; }",
            "{ return false && ep; }",
            "handshake/third_segment_finds_the_queue_full",
        ),
    },
    "options": {
        "a shift of any size is taken": Mutant(
            "tcp_opt.c",
            "value[0] > MAX_WSCALE ? MAX_WSCALE : value[0];",
            "value[0];",
            "options/wscale_above_14_is_14",
        ),
        "a peer that names no MSS takes an Ethernet's": Mutant(
            "tcp_listen.c", ": TCP_DEFAULT_MSS;", ": 1460;", "options/no_mss_means_536"
        ),
        "a delayed ACK echoes the newest timestamp": Mutant(
            "tcp_fast.c",
            "if (seq_eq(c->last_ack_sent, c->rcv_nxt)) { /* RFC 7323 4.3 (2) */",
            "if (true) {",
            "options/timestamp_echo_of_delayed_acks",
        ),
        "TCP_MAXSEG is only announced": Mutant(
            "tcp_conn.c", "mss = min_u32(mss, maxseg);", ";", "options/maxseg_of_the_program"
        ),
        "what was not offered is answered": Mutant(
            "tcp_req.c",
            "if (o->sack_ok)\n        r->flags |= REQ_SACK;",
            "r->flags |= REQ_SACK;",
            "options/passive_answers_only_what_was_offered",
        ),
        "our shift stays when the peer has none": Mutant(
            "tcp_listen.c",
            "c->snd_wscale = c->rcv_wscale = 0;",
            ";",
            "options/window_scaling_only_when_both_offer",
        ),
    },
    "windows": {
        "a segment that was overtaken tells the window": Mutant(
            "tcp_ack.c",
            "(seq_eq(c->snd_wl1, g->seq) && seq_leq(c->snd_wl2, g->ack))) {",
            "seq_leq(c->snd_wl2, g->ack)) {",
            "windows/overtaken_segments_do_not_change_it",
        ),
        "any opening is filled": Mutant(
            "tcp_out.c",
            "return *len >= c->snd_wnd_max / 2 ||",
            "return true ||",
            "windows/small_opening_is_not_used",
        ),
        "a segment is sent whole when part of it fits": Mutant(
            "tcp_out.c",
            "*len = min_u32(min_u32(frame_len, c->snd_mss), usable);",
            "*len = min_u32(frame_len, c->snd_mss);",
            "windows/never_more_than_offered",
        ),
        "Nagle is off": Mutant(
            "tcp_out.c",
            "return !flight || (c->flags & TF_NODELAY);",
            "return true;",
            "nagle/small_writes_wait_for_the_acknowledgment",
        ),
        "a cork holds nothing": Mutant(
            "tcp_out.c",
            "if (c->flags & (TF_CORK | TF_MORE))",
            "if (c->flags & TF_MORE)",
            "nagle/cork_holds_until_it_is_pulled",
        ),
        "each byte that is read is told": Mutant(
            "tcp_rcv.c",
            "if (window_room(s, c) >= offered + step)",
            "if (window_room(s, c) > offered)",
            "windows/reading_a_little_opens_nothing",
        ),
        "the shift is never above 12": Mutant(
            "tcp_tune.c",
            "while (most >> shift > 65535 && shift < 14)",
            "while (most >> shift > 65535 && shift < 12)",
            "windows/up_to_a_gigabyte",
        ),
        "every third segment is acknowledged": Mutant(
            "tcp_rcv.c",
            "} else if (waiting >= 2u * c->rcv_mss) {",
            "} else if (waiting >= 3u * c->rcv_mss) {",
            "ack/every_second_segment",
        ),
        "pieces that overlap are delivered twice": Mutant(
            "tcp_ooo.c",
            "uint32_t have = c->rcv_nxt.v - *v.seq, next = *v.next;",
            "uint32_t have = 0, next = *v.next;",
            "windows/overlapping_pieces_out_of_order",
        ),
    },
    "zero window": {
        "answered probes do not back off": Mutant(
            "tcp_timer.c",
            "c->backoff = (uint8_t)min_u32(c->backoff + 1u, UINT8_MAX); /* also when",
            "; /* also when",
            "zero_window/probes_are_answered_and_back_off",
        ),
        "a closed window is never probed": Mutant(
            "tcp_out.c",
            "} else if (c->sndq_next != BYPASS_PKT_NONE && c->rtx_at == 0) {",
            "} else if (false) {",
            "zero_window/probes_are_answered_and_back_off",
        ),
        "the timeout of probes stays when the window opens": Mutant(
            "tcp_ack.c",
            "c->flags &= ~(uint32_t)TF_PROBING;\n        c->rtx_at = 0;\n        c->backoff = 0;",
            "c->flags &= ~(uint32_t)TF_PROBING;\n        c->rtx_at = 0;",
            "zero_window/opening_starts_the_timeout_anew",
        ),
        "the user timeout does not end a closed window": Mutant(
            "tcp_timer.c",
            "if (c->probes >= most || enough || user_timeout_over(s, c)) {",
            "if (c->probes >= most || enough) {",
            "zero_window/user_timeout",
        ),
    },
    "RTO": {
        "the first round trip's deviation is half of what it should be": Mutant(
            "tcp_ack.c", "c->rttvar_us = r / 2;", "c->rttvar_us = r / 4;", "rto/first_timeout"
        ),
        "timeouts do not back off": Mutant(
            "tcp_timer.c",
            "(uint64_t)c->rto_us << min_u32(c->backoff, 16)",
            "(uint64_t)c->rto_us",
            "rto/backoff_doubles",
        ),
        "round trips of retransmissions count": Mutant(
            "tcp_snd.c",
            "sm->resent = sm->resent || (m->seg_flags & SEG_RTX);",
            "sm->resent = false;",
            "rto/karn_keeps_the_backed_off_timeout",
        ),
        "a spurious timeout is believed": Mutant(
            "tcp_recover.c",
            "if (sm->original && (with_sack(c) || !sm->resent))\n        return true;",
            "",
            "frto/spurious_timeout_is_undone",
        ),
        "the echo of the original is not looked at": Mutant(
            "tcp_recover.c", "return fl->rtx_stamped &&", "return false &&", "frto/eifel_by_timestamps"
        ),
        "the FIN is not repeated with its data": Mutant(
            "tcp_out.c",
            "bool fin = p == c->sndq_tail && (c->flags & TF_FIN_SENT);",
            "bool fin = false;",
            "rto/a_lost_fin_with_data",
        ),
    },
    "fast recovery": {
        "the second duplicate retransmits": Mutant(
            "tcp_recover.c",
            "lost = fl->dupacks == 3 &&",
            "lost = fl->dupacks == 2 &&",
            "fast_recovery/two_duplicates_are_reordering",
        ),
        "a partial acknowledgment waits for the timer": Mutant(
            "tcp_recover.c",
            "STAT(s, tcp_partial_acks);\n        resend_head(s, c);",
            "STAT(s, tcp_partial_acks);",
            "fast_recovery/partial_acknowledgment",
        ),
        "duplicates let nothing new out": Mutant(
            "tcp_ack.c", ": min_u32(fl->dupacks, 2);", ": 0;", "fast_recovery/limited_transmit"
        ),
        "segments with data count as duplicates": Mutant(
            "tcp_ack.c",
            "current && g->len == 0 &&",
            "current &&",
            "fast_recovery/segments_with_data_are_no_duplicates",
        ),
        "recovery sends a segment for each that is delivered": Mutant(
            "tcp_recover.c",
            "if (pipe > c->ssthresh) {",
            "if (false) {",
            "prr/one_new_segment_for_each_two_delivered",
        ),
        "each acknowledgment is worth a segment": Mutant(
            "tcp_reno.c",
            "uint32_t grow = min_u32(min_u32(acked, most), cc->ssthresh - cc->cwnd);",
            "uint32_t grow = cc->mss;",
            "cwnd/ack_division_gains_nothing",
        ),
    },
    "SACK": {
        "what the peer has stays in the flight": Mutant(
            "tcp_ack.c",
            "uint32_t left = fl->sacked_bytes + arrived * c->snd_mss;",
            "uint32_t left = arrived * c->snd_mss;",
            "sack/the_scoreboard_counts",
        ),
        "the newest block comes anywhere": Mutant(
            "tcp_ooo.c",
            "recent_touch(o, at);\n",
            "if (o->recents == 0)\n        recent_touch(o, at);\n",
            "sack/received_newest_block_first",
        ),
        "a partial duplicate is reported whole": Mutant(
            "tcp_sack_rcv.c",
            "tcp_sack_duplicate(s, c, g->seq, seq_lt(end, c->rcv_nxt) ? end : c->rcv_nxt);",
            "tcp_sack_duplicate(s, c, g->seq, end);",
            "sack/dsack_of_a_partial_overlap",
        ),
        "half a segment counts as a whole one": Mutant(
            "tcp_sack.c",
            "p = pkt_meta(s, p)->next; /* the peer has a part",
            "; /* the peer has a part",
            "sack/half_a_segment",
        ),
        "reneging is not noticed": Mutant(
            "tcp_recover.c", "if (sm->acked == 0 || !tcp_sack_reneged(s, c))", "if (true)", "sack/reneging"
        ),
        "a timeout forgets what was reported": Mutant(
            "tcp_sack.c",
            "if (tcp_sack_reneged(s, c))\n        forget_sacks",
            "if (fl->sacked_frames > 0)\n        forget_sacks",
            "sack/timeout_sends_only_what_is_missing",
        ),
        "a needless retransmission costs the window": Mutant(
            "tcp_recover.c", "return fl->undo_rtx == 0;", "return false;", "sack/dsack_undoes_the_reduction"
        ),
    },
    "RACK-TLP": {
        "reordering is forgotten": Mutant(
            "tcp_rack.c",
            "if (!fl->reordering && (fl->ca_state",
            "if ((fl->ca_state",
            "rack_tlp/reordering_seen_widens_the_tolerance",
        ),
        "there is no tolerance": Mutant(
            "tcp_rack.c",
            "    return (uint32_t)min_u64(fl->reo_mult * quarter, c->srtt_us);",
            "    return 0;",
            "rack_tlp/reordering_within_the_quarter",
        ),
        "a retransmission is never lost": Mutant(
            "tcp_rack.c",
            "while (fl->resent_list.head != BYPASS_PKT_NONE && judge",
            "while (false && judge",
            "rack_tlp/lost_retransmission",
        ),
        "a lone segment's probe does not wait for a delayed ACK": Mutant(
            "tcp_rack.c",
            "(one ? TLP_ACK_DELAY_US : TLP_SLACK_US)",
            "TLP_SLACK_US",
            "rack_tlp/a_lone_segment_waits_for_a_delayed_ack",
        ),
        "the probe is always old data": Mutant(
            "tcp_out.c",
            "bool sent = output_next(s, c, d, true);",
            "bool sent = false;",
            "rack_tlp/probe_prefers_new_data",
        ),
        "a probe repairs a loss unheard": Mutant(
            "tcp_rack.c", "return lost;", "return false;", "rack_tlp/probe_that_repaired_a_loss_reduces"
        ),
        "needless retransmissions do not widen the tolerance": Mutant(
            "tcp_rack.c", "fl->reo_mult++;", ";", "rack_tlp/needless_retransmissions_widen_the_tolerance"
        ),
        "the report of a duplicate does not end the probe's episode": Mutant(
            "tcp_rack.c",
            "if (!fl->tlp_rtx || sm->dsack_tlp || lost ||",
            "if (!fl->tlp_rtx || lost ||",
            "rack_tlp/probe_that_was_needless_does_not",
        ),
    },
    "ECN": {
        "retransmissions are marked capable": Mutant(
            "tcp_ecn.c", "if (!new_data)\n        return 0;", "", "ecn/retransmissions_are_not_marked_capable"
        ),
        "a repeated SYN asks again": Mutant(
            "tcp_ecn.c",
            "(c->flags & TF_SYN_RTX) || !wanted",
            "!wanted",
            "ecn/client_without_answer_asks_no_more",
        ),
        "a refusal is not heard": Mutant(
            "tcp_ecn.c",
            "if ((g->flags & (TCP_ACK | TCP_ECE | TCP_CWR)) != (TCP_ACK | TCP_ECE))",
            "if (false)",
            "ecn/client_is_refused",
        ),
        "a mark is echoed for ever": Mutant(
            "tcp_ecn.c",
            "if (g->flags & TCP_CWR)\n        c->feat &= ~(uint32_t)TX_ECE;",
            "",
            "ecn/mark_is_echoed_until_cwr",
        ),
        "each echo reduces": Mutant(
            "tcp_recover.c",
            "if (fl->ca_state >= CA_CWR)\n        return;\n    if (fl->ca_state == CA_OPEN)",
            "if (fl->ca_state == CA_OPEN)",
            "ecn/echo_reduces_once_a_round_trip",
        ),
        "a SYN that is marked capable is agreed to": Mutant(
            "tcp_ecn.c",
            "return (g->ri->tos & CE) == 0 || exact;",
            "return true;",
            "ecn/marked_syn_is_refused",
        ),
    },
    "PAWS": {
        "an old timestamp is good": Mutant(
            "tcp_in.c",
            "if (unlikely(paws_rejects(s, c, g))) {",
            "if (false) {",
            "paws/old_timestamp_is_dropped",
        ),
        "an old timestamp protects from a reset": Mutant(
            "tcp_in.c",
            "|| !g->opt.has_ts || (g->flags & TCP_RST))",
            "|| !g->opt.has_ts)",
            "paws/a_reset_needs_no_timestamp",
        ),
        "timestamps do not wrap": Mutant(
            "tcp_in.c",
            "return (int32_t)(g->opt.ts_val - c->ts_recent) < 0 &&",
            "return g->opt.ts_val < c->ts_recent &&",
            "paws/timestamps_wrap",
        ),
        "an equal timestamp is old": Mutant(
            "tcp_in.c",
            "return (int32_t)(g->opt.ts_val - c->ts_recent) < 0 &&",
            "return (int32_t)(g->opt.ts_val - c->ts_recent) <= 0 &&",
            "paws/the_same_timestamp_is_good",
        ),
        "segments ahead of a hole set the echo": Mutant(
            "tcp_in.c",
            "&& seq_leq(g->seq, c->last_ack_sent) &&",
            "&&",
            "paws/out_of_order_segments_do_not_set_the_echo",
        ),
    },
    "close": {
        "a FIN ahead of data is taken at once": Mutant(
            "tcp_rcv.c", "if (fin && seq_gt(end, c->rcv_nxt)) {", "if (false) {", "close/fin_before_the_data"
        ),
        "unread data is forgotten on close": Mutant(
            "tcp_conn.c",
            "if (c->rcv_queued > 0 || conn_cold(s, c)->opt.linger_s == 0 ||",
            "if (conn_cold(s, c)->opt.linger_s == 0 ||",
            "close/unread_data_resets",
        ),
        "FINs that cross end it at once": Mutant(
            "tcp_rcv.c",
            "c->state = BYPASS_CLOSING;",
            "conn_time_wait(s, c);",
            "close/closing_repeats_the_fin",
        ),
        "an old SYN opens anew": Mutant(
            "tcp_tw.c",
            "\n    return seq_gt(g->seq, c->rcv_nxt);",
            "\n    return true;",
            "close/time_wait_refuses_an_old_syn",
        ),
        "the FIN overtakes what is queued": Mutant(
            "tcp_out.c",
            "|| c->sndq_next != BYPASS_PKT_NONE)\n        return;\n    if (!send_bare",
            ")\n        return;\n    if (!send_bare",
            "close/fin_goes_with_the_last_queued_data",
        ),
        "FIN_WAIT_2 lasts for ever": Mutant(
            "tcp_conn.c",
            "c->rtx_at = now_ns(s) + (uint64_t)wait_s * SEC_NS;",
            ";",
            "close/fin_wait_2_is_not_waited_for",
        ),
        "a TIME_WAIT is never taken over": Mutant(
            "tcp_tw.c",
            "conn_now_ms(s) - c->ts_recent_ms > 1000;",
            "false;",
            "close/connect_takes_a_time_wait_over",
        ),
    },
    "reset": {
        "a refused connection was reset": Mutant(
            "tcp_in.c",
            "conn_drop(s, c, ECONNREFUSED);",
            "conn_drop(s, c, ECONNRESET);",
            "handshake/connection_refused",
        ),
        "a reset behind the peer's FIN is like any other": Mutant(
            "tcp_in.c", "err = EPIPE;", "err = ECONNRESET;", "reset/in_close_wait"
        ),
        "the reset is told again and again": Mutant(
            "tcp_rcv.c",
            "int err = k->error;\n        k->error = 0;",
            "int err = k->error;",
            "reset/in_order_ends_the_connection",
        ),
        "writing after a reset fails in one way only": Mutant(
            "tcp_snd.c", "return -EPIPE;", "return -ECONNRESET;", "reset/while_writing"
        ),
    },
    "blind attacks": {
        "a reset anywhere in the window ends the connection": Mutant(
            "tcp_in.c",
            "if (!seq_eq(g->seq, c->rcv_nxt)) {",
            "if (false) {",
            "blind/reset_elsewhere_in_the_window",
        ),
        "a reset outside the window is answered": Mutant(
            "tcp_in.c",
            "STAT(s, tcp_in_reset_ignored);\n        return STOP;",
            "STAT(s, tcp_in_reset_ignored);",
            "blind/reset_outside_the_window",
        ),
        "a SYN in the window is passed over": Mutant(
            "tcp_in.c",
            "if (unlikely(g->flags & TCP_SYN)) { /* fourth; RFC 5961 4.2 */",
            "if (false) {",
            "blind/syn_in_the_connection",
        ),
        "an acknowledgment of any age is good": Mutant(
            "tcp_ack.c",
            "if (seq_lt(seq_add(g->ack, oldest), c->snd_una)) {",
            "if (false) {",
            "blind/acknowledgment_too_old",
        ),
        "data with an acknowledgment of what was never sent is taken": Mutant(
            "tcp_ack.c",
            "return false;\n    }\n    if (unlikely(c->feat & TX_LONE))",
            "return true;\n    }\n    if (unlikely(c->feat & TX_LONE))",
            "blind/acknowledgment_of_what_was_never_sent",
        ),
        "ICMP errors need not quote anything in flight": Mutant(
            "tcp_in.c",
            "if (seq_lt(seq(e->seq), first) || seq_geq(seq(e->seq), c->snd_nxt))\n        return;",
            "(void)first;",
            "pmtu/frag_needed_about_nothing_in_flight",
        ),
        "challenges are not limited": Mutant(
            "tcp_out.c",
            "if (soon || !tcp_challenge_token(s)) {",
            "if (false) {",
            "blind/challenges_are_limited",
        ),
        "a segment needs no ACK flag": Mutant(
            "tcp_in.c",
            "if (!(g->flags & TCP_ACK))\n        return;\n    take_timestamp",
            "take_timestamp",
            "blind/segment_without_ack_is_dropped",
        ),
    },
    "PMTU": {
        "any MTU is believed": Mutant(
            "tcp_pmtu.c",
            "uint16_t mtu = e->mtu < MIN_MTU ? MIN_MTU : e->mtu;",
            "uint16_t mtu = e->mtu;",
            "pmtu/absurdly_small_mtu",
        ),
        "what was too large waits for the timer": Mutant(
            "tcp_pmtu.c",
            "tcp_mark_oversize(s, c);\n        tcp_output",
            "tcp_output",
            "pmtu/frag_needed_makes_segments_smaller",
        ),
        "a black hole is not suspected": Mutant(
            "tcp_pmtu.c", "|| c->rtx_count < 3 ||", "|| true ||", "pmtu/black_hole"
        ),
        "a probe that arrives teaches nothing": Mutant(
            "tcp_pmtu.c", "k->mtu_low = k->mtu_probe;", ";", "pmtu/search_finds_a_larger_one"
        ),
        "a lost probe is congestion": Mutant(
            "tcp_recover.c",
            "if (lost && unlikely(c->feat & TX_PMTU_PROBE) && tcp_pmtu_probe_lost(s, c)) {",
            "if (false) {",
            "pmtu/lost_probe_is_no_congestion",
        ),
    },
    "keepalive": {
        "one probe more is allowed": Mutant(
            "tcp_timer.c",
            "return c->probes >= k->opt.keep_cnt;",
            "return c->probes > k->opt.keep_cnt;",
            "keepalive/gives_up",
        ),
        "what arrives does not put it off": Mutant(
            "tcp_timer.c", "if (idle_end > now_ns(s)) {", "if (false) {", "keepalive/data_puts_it_off"
        ),
        "the probe is new data": Mutant(
            "tcp_out.c",
            "(void)send_bare(s, c, seq_add(c->snd_una, (uint32_t)-1), 0);",
            "(void)send_bare(s, c, c->snd_una, 0);",
            "keepalive/probes_an_idle_connection",
        ),
        "it probes beside the retransmission timer": Mutant(
            "tcp_timer.c",
            "if (c->snd_queued > 0 || c->snd_nxt.v != c->snd_una.v) { /* other",
            "if (false) { /* other",
            "keepalive/not_beside_retransmissions",
        ),
    },
    "simultaneous open": {
        "a SYN without ACK is taken for an answer": Mutant(
            "tcp_in.c",
            "if (ack_ok) {\n        syn_sent_established",
            "if (true) {\n        syn_sent_established",
            "simultaneous_open/syns_cross",
        ),
        "only a listener's connection is completed": Mutant(
            "tcp_in.c",
            "if ((c->flags & TF_PASSIVE) && !early && !tcp_listen_ready(s, c))",
            "if (!early && !tcp_listen_ready(s, c))",
            "simultaneous_open/plain_acknowledgment_completes_it",
        ),
        "the SYN in the SYN-ACK is an attack": Mutant(
            "tcp_in.c",
            "g->flags &= (uint8_t)~TCP_SYN; /* simultaneous open",
            "; /* simultaneous open",
            "simultaneous_open/syns_cross",
        ),
    },
    "SYN cookies": {
        "any cookie is good": Mutant(
            "tcp_cookie.c",
            "return (bits & ((1u << TAG_BITS) - 1)) == tag(s, g, irs, secret, mss) ? mss_table[mss] : 0;",
            "return mss_table[mss];",
            "syn_cookies/forged_acknowledgment",
        ),
        "SACK is forgotten": Mutant(
            "tcp_cookie.c",
            "o->sack_ok = (bits & OPT_SACK) != 0;",
            ";",
            "syn_cookies/options_survive_in_the_timestamp",
        ),
        "ECN is forgotten": Mutant(
            "tcp_cookie.c",
            "return bits & OPT_ECN ? TX_ECN : 0;",
            "return 0;",
            "syn_cookies/ecn_survives_in_the_timestamp",
        ),
        "a SYN is kept all the same": Mutant(
            "tcp_listen.c",
            "(full || cookies == BYPASS_COOKIES_ALWAYS)",
            "full",
            "syn_cookies/nothing_is_repeated",
        ),
        "options are offered that nobody will remember": Mutant(
            "tcp_cookie.c",
            ".has_wscale = ts && g->opt.has_wscale,",
            ".has_wscale = g->opt.has_wscale,",
            "syn_cookies/no_options_without_timestamps",
        ),
        "the MSS is the largest of the table": Mutant(
            "tcp_cookie.c",
            "while (i > 0 && mss_table[i] > mss)",
            "while (false)",
            "syn_cookies/mss_of_the_peer",
        ),
    },
    "Fast Open": {
        "any cookie is good": Mutant(
            "tcp_fastopen.c",
            "if (cookie == COOKIE_WRONG) {\n        STAT",
            "if (false) {\n        STAT",
            "fast_open/server_refuses_a_wrong_cookie",
        ),
        "who asks gets no cookie": Mutant(
            "tcp_fastopen.c", "put_cookie(s, &g->ri->src, o);", ";", "fast_open/server_gives_a_cookie"
        ),
        "the data of a SYN is not taken": Mutant(
            "tcp_fastopen.c",
            "if (g->len > 0)\n        take_syn_data(s, c, g);",
            "",
            "fast_open/server_takes_data_in_the_syn",
        ),
        "cookies are not kept": Mutant(
            "tcp_fastopen.c",
            "e->cookie_len = g->opt.cookie_len;",
            "e->cookie_len = 0;",
            "fast_open/client_sends_data_in_the_syn",
        ),
        "nobody asks for a cookie": Mutant(
            "tcp_fastopen.c",
            "o->has_fo = true;\n    if (!e ||",
            "if (!e ||",
            "fast_open/client_asks_for_a_cookie",
        ),
    },
}
BY_NAME = {f"{topic}: {name}": m for topic, of_topic in MUTANTS.items() for name, m in of_topic.items()}
TOPICS = (
    "handshake", "options", "windows", "RTO", "fast recovery", "SACK", "RACK-TLP", "ECN", "PAWS", "zero window",
    "close", "reset", "blind attacks", "PMTU", "keepalive", "simultaneous open", "SYN cookies", "Fast Open",
)  # fmt: skip


def play(m: Mutant, folder: Path, runs: Runs) -> CompletedProcess[str]:
    build(m, folder)
    return runs(folder, "oracle", "--ours", "--strict", oracle.SCRIPTS / f"{m.test}.pkt")


@pytest.mark.parametrize("name", BY_NAME)
def test_a_mutant_is_noticed(name: str, tmp_path: Path, mutant_runs: Runs) -> None:
    m = BY_NAME[name]
    assert m.test not in oracle.pending(), f"{m.test} is pending: it notices nothing yet"
    done = play(m, tmp_path, mutant_runs)
    assert done.returncode == 1, f"nothing was noticed:\n{done.stdout}{done.stderr}"
    assert done.stdout.startswith(f"{m.test} "), done.stdout + done.stderr


def test_every_topic_has_mutants() -> None:
    assert set(MUTANTS) == set(TOPICS)
    assert len(BY_NAME) >= 60
    assert min(map(len, MUTANTS.values())) >= 3
