# SPDX-License-Identifier: Apache-2.0
"""The conversations notice a wrong loss recovery: mutants as in test_tcp_mutants.py, one for each rule or more."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutants import Mutant, Runs, assert_noticed, by_its_test

MUTANTS = {
    "what the peer has is sent again after a timeout": Mutant(
        "tcp_sack.c",
        "const struct bypass_pkt_meta *m = pkt_meta(s, p);\n        if ((m->seg_flags & (SEG_LOST | SEG_SACKED)) ==",
        "struct bypass_pkt_meta *m = pkt_meta(s, p);\n        m->seg_flags &= (uint16_t)~SEG_SACKED;\n"
        "        if ((m->seg_flags & (SEG_LOST | SEG_SACKED)) ==",
        "sack_send::test_a_timeout_does_not_send_what_the_peer_has",
    ),
    "a timeout sends again what has just left": Mutant(
        "tcp_sack.c",
        "!but_recent || tcp_rack_overdue(s, c, m)",
        "true",
        "rack::test_after_a_timeout_what_left_just_before_is_not_sent_again",
    ),
    "a segment of which a part is SACKed counts as SACKed": Mutant(
        "tcp_sack.c",
        "        p = pkt_meta(s, p)->next; /* the peer has a part of it: it has to come again */",
        "        (void)0;",
        "sack_send::test_a_segment_of_which_the_peer_has_a_part_is_sent_again_whole",
    ),
    "blocks beyond what was sent are believed": Mutant(
        "tcp_sack.c",
        "return seq_lt(b->first, b->end) && seq_geq(b->first, c->snd_una) && seq_leq(b->end, c->snd_nxt);",
        "return c != NULL && b != NULL;",
        "sack_send::test_blocks_about_what_was_never_sent_change_nothing",
    ),
    "reneging is not noticed": Mutant(
        "tcp_recover.c",
        "if (sm->acked == 0 || !tcp_sack_reneged(s, c))",
        "if (true)",
        "sack_send::test_a_peer_that_takes_back_what_it_sacked_gets_it_again",
    ),
    "D-SACKs within the second block are overlooked": Mutant(
        "tcp_sack.c",
        "return g->opt.sacks > 1 && seq_geq(b[0].first, b[1].first) && seq_leq(b[0].end, b[1].end);",
        "return false;",
        "sack_send::test_a_duplicate_within_the_second_block_is_recognised",
    ),
    "lost bytes count as in flight": Mutant(
        "tcp_ack.c",
        "c->snd_nxt.v - c->snd_una.v - c->lost_bytes -",
        "c->snd_nxt.v - c->snd_una.v -",
        "sack_send::test_what_is_in_flight_excludes_what_arrived_and_what_is_lost",
    ),
    "RACK waits for nothing": Mutant(
        "tcp_rack.c",
        "return (uint32_t)min_u64(fl->reo_mult * quarter, c->srtt_us);",
        "return 0;",
        "rack::test_what_was_sent_before_what_arrived_is_lost_after_a_quarter_of_a_round_trip",
    ),
    "RACK waits however many are SACKed": Mutant(
        "tcp_rack.c",
        "if (!fl->reordering && (fl->ca_state >= CA_RECOVERY || fl->sacked_frames >= DUP_THRESH))",
        "if (false)",
        "rack::test_with_three_sacked_nothing_is_waited_for",
    ),
    "reordering is not noticed": Mutant(
        "tcp_rack.c",
        "fl->ca_state != CA_OPEN && !fl->reordering) {",
        "false) {",
        "rack::test_on_a_path_that_reorders_three_sacked_prove_nothing",
    ),
    "the window for reordering does not grow": Mutant(
        "tcp_rack.c",
        "        fl->reo_mult++;",
        "        (void)0;",
        "rack::test_a_duplicate_report_widens_the_window_for_sixteen_recoveries",
    ),
    "the window for reordering never shrinks": Mutant(
        "tcp_rack.c",
        "        fl->reo_mult = 1;",
        "        (void)0;",
        "rack::test_a_duplicate_report_widens_the_window_for_sixteen_recoveries",
    ),
    "the window for reordering has no bound": Mutant(
        "tcp_rack.c",
        "min_u64(fl->reo_mult * quarter, c->srtt_us)",
        "(fl->reo_mult * quarter)",
        "rack::test_the_window_for_reordering_is_at_most_a_round_trip",
    ),
    "a lost retransmission waits for the timeout": Mutant(
        "tcp_rack.c",
        "    while (fl->resent_list.head != BYPASS_PKT_NONE && judge(s, c, fl, fl->resent_list.head, &at))\n        ;",
        "",
        "rack::test_a_lost_retransmission_is_found_by_what_was_sent_after_it",
    ),
    "an ACK that is too quick is the retransmission's": Mutant(
        "tcp_rack.c",
        "return c->min_rtt_us != UINT32_MAX && rtt_us < c->min_rtt_us;",
        "return false;",
        "rack::test_an_ack_that_is_too_quick_for_the_retransmission_is_the_originals",
    ),
    "there is no probe at the tail": Mutant(
        "tcp_timer.c",
        "return (fl->ca_state == CA_OPEN ||",
        "return false && (fl->ca_state == CA_OPEN ||",
        "rack::test_a_lost_tail_is_probed_after_two_round_trips",
    ),
    "the probe is the last segment always": Mutant(
        "tcp_out.c",
        "bool sent = output_next(s, c, d, true);",
        "bool sent = false;",
        "rack::test_the_probe_is_new_data_when_there_is_some",
    ),
    "a probe follows a probe": Mutant(
        "tcp_timer.c",
        "&& !fl->tlp_out;",
        ";",
        "rack::test_until_the_probe_is_answered_progress_starts_the_timeout_and_not_another_probe",
    ),
    "a probe that repaired a loss costs nothing": Mutant(
        "tcp_rack.c",
        "bool lost = fl->tlp_rtx && !sm->dsack_tlp && seq_gt(g->ack, fl->tlp_end);",
        "bool lost = false;",
        "rack::test_a_probe_that_repairs_a_loss_costs_the_window_a_reduction",
    ),
    "a needless probe costs a reduction": Mutant(
        "tcp_rack.c",
        "bool lost = fl->tlp_rtx && !sm->dsack_tlp && seq_gt(g->ack, fl->tlp_end);",
        "bool lost = fl->tlp_rtx;",
        "rack::test_a_probe_that_was_needless_costs_nothing",
    ),
    "the reduction is not proportional": Mutant(
        "tcp_recover.c",
        "if (pipe > c->ssthresh) {\n        uint64_t share",
        "if (false) {\n        uint64_t share",
        "undo::test_the_window_shrinks_in_proportion_to_what_is_delivered",
    ),
    "the first retransmission waits": Mutant(
        "tcp_recover.c",
        "if (fl->prr_out == 0) /* the first retransmission does not wait */",
        "if (false)",
        "undo::test_the_first_retransmission_does_not_wait_for_the_window",
    ),
    "the end of recovery leaves the window": Mutant(
        "tcp_recover.c",
        "        c->cwnd = c->ssthresh; /* RFC 9937",
        "        c->cwnd = c->cwnd; /* RFC 9937",
        "undo::test_a_window_that_had_shrunk_below_ssthresh_ends_there_too",
    ),
    "the end of recovery grows the window": Mutant(
        "tcp_recover.c",
        "        sm->settled = true;\n    }",
        "    }",
        "undo::test_the_ack_that_ends_a_recovery_does_not_grow_the_window_besides",
    ),
    "limited transmit has no limit": Mutant(
        "tcp_ack.c",
        "min_u32(fl->dupacks, 2)",
        "(fl->dupacks)",
        "undo::test_without_sack_two_duplicates_allow_two_new_segments_and_a_third_none",
    ),
    "F-RTO believes the retransmission's own ACK": Mutant(
        "tcp_recover.c",
        "if (sm->original && (with_sack(c) || !sm->resent))",
        "if (sm->acked > 0)",
        "undo::test_a_block_above_the_hole_after_the_new_data_says_so_too",
    ),
    "F-RTO ignores duplicates": Mutant(
        "tcp_recover.c",
        "            fl->frto = FRTO_OFF;                                   /* 3.a",
        "            (void)0;                                   /* 3.a",
        "undo::test_a_block_above_the_hole_after_the_new_data_says_so_too",
    ),
    "F-RTO waits for answers to nothing": Mutant(
        "tcp_out.c",
        "fl->frto = seq_gt(c->snd_nxt, fl->recover) ? FRTO_WAIT : FRTO_OFF;",
        "fl->frto = FRTO_WAIT;",
        "undo::test_without_new_data_to_send_recovery_goes_on_as_usual",
    ),
    "Eifel believes any timestamp": Mutant(
        "tcp_recover.c",
        "(int32_t)(g->opt.ts_ecr - fl->rtx_ts) < 0;",
        "true;",
        "undo::test_an_echo_of_the_retransmission_undoes_nothing",
    ),
    "Eifel believes an echo of nothing": Mutant(
        "tcp_recover.c",
        "g->opt.has_ts && g->opt.ts_ecr != 0 &&",
        "g->opt.has_ts &&",
        "undo::test_an_echo_of_the_retransmission_undoes_nothing",
    ),
    "one D-SACK undoes all": Mutant(
        "tcp_sack.c",
        "fl->undo_rtx -= min_u32(fl->undo_rtx, frames);",
        "fl->undo_rtx = 0;",
        "undo::test_one_real_loss_among_needless_retransmissions_keeps_the_reduction",
    ),
    "an undone recovery keeps ssthresh": Mutant(
        "tcp_recover.c",
        "        c->ssthresh = max_u32(c->ssthresh, fl->prior_ssthresh);",
        "        (void)0;",
        "undo::test_when_each_retransmission_was_a_duplicate_the_recovery_is_undone",
    ),
    "RACK hears of the block only": Mutant(
        "tcp_snd.c",
        "fl->ca_state == CA_OPEN && fl->sacked_frames == 0;",
        "fl->ca_state == CA_OPEN;",
        "rack::test_late_originals_acknowledged_with_the_first_block_are_what_rack_measures",
    ),
    "every ACK is safe": Mutant(
        "tcp_recover.c",
        "        if (safe)\n",
        "        if (true)\n",
        "undo::test_new_losses_are_not_progress",
    ),
    "a window of data is undone again and again": Mutant(
        "tcp_recover.c",
        "fl->undo = !fl->undone;",
        "fl->undo = true;",
        "undo::test_a_window_of_data_is_undone_once",
    ),
    "what the timer found counts against the next ACK": Mutant(
        "tcp_recover.c",
        "sm->acked > 0 && fl->lost == lost);",
        "sm->acked > 0 && sm->lost == 0);",
        "undo::test_when_much_is_lost_sending_goes_on_as_in_slow_start",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name: str, tmp_path: Path, mutant_runs: Runs) -> None:
    assert_noticed(by_its_test(MUTANTS[name], tmp_path, mutant_runs))
