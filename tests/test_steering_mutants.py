# SPDX-License-Identifier: Apache-2.0
"""The comparison of the steering program with its model notices a wrong program.

Each mutant is the program with one line changed; it is loaded in place of the right one, and the packets of
test_steering_model.py have to show a difference. A mutant whose line is gone is a failure: mend the list.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from steering_rules import draw_rules
from steering_support import Bench

from bypass.bpf import build

pytestmark = pytest.mark.netns

MAX_CASES = 12
PACKETS = 700


@dataclass(frozen=True)
class Mutant:
    """One line of the program, and what a careless hand made of it."""

    name: str
    right: str
    wrong: str
    kind: str = "ip4"  # of policies (steering_rules.draw_rules) that are about this line


MUTANTS = (
    Mutant("the last mask wins, not the highest rank", "v && v->rank > best->rank", "v", "ranges"),
    Mutant(
        "the first mask that matches ends the search", "best->rank >= highest->max[i]", "best->rank", "ranges"
    ),
    Mutant("half of the MAC address is not compared", "a[1] == b[1] && a[2] == b[2]", "a[1] == b[1]"),
    Mutant("TCP to a group MAC address is steered", "p->icmp || proto == IPPROTO_TCP", "0"),
    Mutant("the VLAN identifier is read backwards", "__builtin_bswap16(tag->control)", "tag->control", "all"),
    Mutant("a tagged frame is steered", "if (p->tagged) {", "if (0) {", "all"),
    Mutant("routed packets are taken", "if (!locals4.lookup(&local)) {", "if (0) {"),
    Mutant("Ethernet padding counts as payload", "|| p->l4 + FRAGMENT_MIN > p->end", ""),
    Mutant("an impossible TCP header length is accepted", "tcp->doff * 4 < TCP_HEADER_MIN ||", ""),
    Mutant("options are read as ports", "p->l4 = p->l3 + ip->ihl * 4", "p->l4 = p->l3 + 20"),
    Mutant("first fragments of live TCP pass", "proto == IPPROTO_TCP ? REASON_TCP_FRAGMENT : ", ""),
    Mutant(
        "later fragments are read as if they had ports",
        "p->part = LATER_FRAGMENT;\n        return GO_ON",
        ";",
    ),
    Mutant("live TCP without a socket passes", "tcp ? REASON_TCP_NO_SOCKET : ", ""),
    Mutant("owners share their sockets", "e->owner * MAX_QUEUES + queue", "queue"),
    Mutant(
        "the quoted flow is turned round",
        "quoted->local_port = ports->source",
        "quoted->local_port = ports->dest",
    ),
    Mutant("any ICMP type has a quote", "*type != 12", "*type != 12 && *type != 5"),
    Mutant("an error about another host's packet is taken", " || ip->saddr != p->flow.local[ADDR_LAST]", ""),
    Mutant("a listener of the kernel's keeps the flow", "state != BPF_TCP_LISTEN && ", ""),
    Mutant("TIME_WAIT swallows new connections", "BPF_TCP_TIME_WAIT && syn", "BPF_TCP_TIME_WAIT && 0"),
    Mutant("connected endpoints are overlooked", "kinds & KIND_EXACT", "0"),
    Mutant("blocks of ports are overlooked", "kinds & KIND_BLOCK", "0"),
    Mutant("a block has half of its ports", "be16(BLOCK_MASK)", "be16(0xff80)"),
    Mutant("a block is every port of its address", "f->local_port & be16(BLOCK_MASK)", "0"),
    Mutant("an endpoint on the first port is a block", "key.proto |= KEY_BLOCK;", ""),
    Mutant("beside blocks other endpoints are not found", "key.proto = f->proto;", ""),
    Mutant("beside blocks others are found by a block's port", "key.local_port = f->local_port;", ""),
    Mutant("the verdict names the wrong rule", "v->rule = rule", "v->rule = entry"),
    Mutant("AH is measured like other headers", "(ext->length + 2) * 4", "(ext->length + 1) * 8", "all"),
    Mutant("one extension header too few is walked", "MAX_EXT_HEADERS 6", "MAX_EXT_HEADERS 5", "all"),
    Mutant("rules are not counted", "count_add(rule_count.lookup(&rule), bytes)", ""),
)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with Bench() as it:
        yield it


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name.replace(" ", "-"))
def test_a_wrong_program_is_noticed(bench: Bench, mutant: Mutant) -> None:
    text = build.source()
    assert text.count(mutant.right) == 1, (
        f"the line of this mutant is not in the program any more: {mutant.right}"
    )
    text = text.replace(mutant.right, mutant.wrong)
    for seed in range(MAX_CASES):
        rng = random.Random(seed)
        rules = draw_rules(rng, mutant.kind)
        with bench.case(rng, rules, text=text) as case:
            try:
                for _ in range(PACKETS):
                    case.check(rng, seed)
                case.check_counters()
            except AssertionError:
                return
    pytest.fail("every packet was judged as the model judges it")
