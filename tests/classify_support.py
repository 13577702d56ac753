# SPDX-License-Identifier: Apache-2.0
"""The classifier beside the steering program: the same policy, endpoints, addresses and connections of the kernel in
both, and the same frames through both. Bench and policies are those of the program's own tests."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bypass._core import ffi, lib
from model import TCP_TIME_WAIT
from steering_support import QUEUES, SOCKET_QUEUES, Bench, Case

from bypass.dpdk_backend.steering import CLASSIFIER_REASONS, SoftSteering
from bypass.netlink import TcpFlow
from bypass.rules import Rule
from bypass.steering_api import SteerResult
from bypass.testing.flows import GROUP_MACS, LOCALS, draw_frame

ACTIONS = ("pass", "drop", "redirect")
NONE = 0xFFFFFFFF

Judgement = tuple[str, str, tuple[int, int, int] | None]
"""Verdict, reason; of what is taken: entry, rule, hash."""


def judgement(result: SteerResult) -> Judgement:
    return result.action, result.reason, None if result.verdict is None else tuple(result.verdict)


@dataclass
class Pair:
    """Program and classifier with the same in both."""

    case: Case
    soft: SoftSteering

    def by_program(self, frame: bytes, queue: int) -> Judgement:
        steering = self.case.steering
        return judgement(steering.test_run(frame, rx_queue=queue, ifindex=steering.ifindex))

    def by_classifier(self, frame: bytes, queue: int) -> Judgement:
        return judgement(self.soft.test_run(frame, rx_queue=queue))

    def draw(self, rng: random.Random) -> tuple[bytes, int]:
        return draw_frame(rng, self.case.world), rng.choice((0, 0, 1, 2, 3))

    def check(self, rng: random.Random, about: str) -> Judgement:
        frame, queue = self.draw(rng)
        want, got = self.by_program(frame, queue), self.by_classifier(frame, queue)
        assert want == got, f"{about}, queue {queue}, frame {frame.hex()}, rules {self.soft.policy.flows}"
        return want

    def check_counters(self) -> None:
        """Packets and bytes by rule, by reason, by entry."""
        theirs, ours = self.case.steering, self.soft
        assert theirs.rules() == ours.rules()
        assert theirs.entries() == ours.entries()
        reasons = ours.reasons()
        assert theirs.reasons() == {name: reasons[name] for name in theirs.reasons()}


@contextlib.contextmanager
def pair(bench: Bench, rng: random.Random, rules: list[Rule], text: str | None = None) -> Iterator[Pair]:
    """A policy in force in both. `text`: the program's source in place of the installed one."""
    with bench.case(rng, rules, text=text) as case:
        kernel = [TcpFlow(*key, state == TCP_TIME_WAIT) for key, state in case.model.kernel.items()]
        with SoftSteering(
            case.steering.policy,
            "in0",
            owners=2,
            kernel_flows=lambda port: [f for f in kernel if port in (0, f.local_port)],
        ) as soft:
            soft.set_mac(bench.mac)
            soft.set_locals(LOCALS)
            soft.set_groups(GROUP_MACS)
            for queue in range(QUEUES):
                soft.set_served(1, queue, False)
                soft.set_served(0, queue, queue in SOCKET_QUEUES)
            for entry, (e, _) in sorted(case.steering.entries().items()):
                where = (e.proto, e.laddr, e.lport, e.raddr, e.rport)
                added = soft.add_endpoint(*where, owner=e.owner, drain=e.drain, block=e.block)
                assert added == entry
            yield Pair(case, soft)


class Reader:
    """A classifier of another library on the memory of `soft`: it reads what that has written."""

    def __init__(self, soft: SoftSteering, other: Any = lib, other_ffi: Any = ffi) -> None:
        self._lib, self._ffi = other, other_ffi
        self._c = other_ffi.new("struct classifier *")
        memory = soft._open()
        at = other_ffi.cast("void *", int(ffi.cast("uintptr_t", memory.at)))
        assert other.classify_attach(self._c, at, memory.size) == 0
        self._out = other_ffi.new("struct classify_result *")

    def judge(self, frame: bytes, queue: int) -> Judgement:
        verdict = self._lib.classify(self._c, frame, len(frame), queue, self._out)
        out = self._out
        taken = (out.entry, out.rule, out.hash) if out.entry != NONE else None
        return ACTIONS[verdict], CLASSIFIER_REASONS[out.reason].name, taken
