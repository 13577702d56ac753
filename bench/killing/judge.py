# SPDX-License-Identifier: Apache-2.0
"""What peers saw of a kill, against what has to happen. Pure: no clock, no process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

__all__ = ["GONE", "OUTCOMES", "Outcome", "Seen", "judge"]

PATIENCE = {"silence", "unanswered"}  # results that tell of time only: the client would not wait longer


@dataclass(frozen=True)
class Outcome:
    """What has to happen when a role is killed.

    Attributes:
        new: the result of new connections from then on: `served`, `refused`, or `silence`.
        kept: `end` (all of them), `go on` (all), `either` (each of them does one of both, and none hangs), `hang` (all:
            nobody answers).
        how: in which ways a kept connection may end.
        at_once: not one new connection may fail on the way there.
    """

    new: str
    kept: str
    how: tuple[str, ...] = ("reset",)
    at_once: bool = False


OUTCOMES = {
    "application": Outcome("refused", "end"),
    "worker": Outcome("served", "either", ("reset", "eof")),
    "broker": Outcome("served", "go on", at_once=True),
    "fwd": Outcome("served", "either"),
}
GONE = Outcome("silence", "hang", ())
"""The owner of a DPDK port is killed: the kernel's device of the port ends with it, and nobody answers."""


@dataclass
class Seen:
    """The verdict on one kill. `wrong`: what no lack of processor time explains; `late`: what was as it has to be, but
    not in time. Milliseconds from the kill: until new connections had the result that they have to have; until the last
    kept connection that ended did."""

    wrong: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    new_ms: float | None = None
    kept_ms: float | None = None

    @property
    def problems(self) -> list[str]:
        return self.wrong + self.late


def judge(found: dict[str, Any], killed: float, outcome: Outcome, within_s: float) -> Seen:
    """
    Args:
        found: what bench/killing/client.py printed.
        killed: when, by its clock.
        within_s: how soon it has to have happened.
    """
    seen = Seen()
    early = [result for _, ended, result in found["probes"] if ended < killed]
    if not early or set(early) != {"served"}:
        too_slow = bool(early) and set(early) <= PATIENCE | {"served"}
        (seen.late if too_slow else seen.wrong).append(
            f"before the kill: {dict(Counter(early)) or 'nothing was asked'}"
        )
    _new(found["probes"], killed, outcome, within_s, seen)
    _kept(found["kept"], killed, found["ended"], outcome, within_s, seen)
    return seen


def _new(
    probes: Sequence[tuple[float, float, str]], killed: float, outcome: Outcome, within_s: float, seen: Seen
) -> None:
    after = [(ended, result) for began, ended, result in probes if began >= killed]
    good = next((i for i, (_, result) in enumerate(after) if result == outcome.new), None)
    if good is None:
        results = dict(Counter(result for _, result in after))
        seen.wrong.append(f"new connections were never {outcome.new}: {results or 'there were none'}")
        return
    seen.new_ms = round((after[good][0] - killed) * 1e3, 1)
    if after[good][0] - killed > within_s:
        seen.late.append(f"new connections were {outcome.new} only after {seen.new_ms:g} ms")
    wrong = Counter(result for _, result in after[0 if outcome.at_once else good :] if result != outcome.new)
    if wrong:
        (seen.late if set(wrong) <= PATIENCE else seen.wrong).append(
            f"new connections that have to be {outcome.new}: {dict(wrong)}"
        )


def _kept(
    kept: Sequence[dict[str, Any]], killed: float, until: float, outcome: Outcome, within_s: float, seen: Seen
) -> None:
    for number, connection in enumerate(kept):
        ended = connection["ended"]
        if ended is None:
            _went_on(number, connection["answers"], killed, until, outcome, within_s, seen)
            continue
        at, how = ended
        seen.kept_ms = max(seen.kept_ms or 0.0, round((at - killed) * 1e3, 1))
        if at < killed:
            seen.wrong.append(f"kept connection {number} ended before the kill: {how}")
        elif outcome.kept == "go on":
            seen.wrong.append(f"kept connection {number} ended: {how}")
        elif how not in outcome.how:
            seen.wrong.append(f"kept connection {number} ended by {how}, not by {' or '.join(outcome.how)}")
        elif at - killed > within_s:
            seen.late.append(f"kept connection {number} ended only after {(at - killed) * 1e3:.0f} ms")


def _went_on(
    number: int,
    answers: Sequence[float],
    killed: float,
    until: float,
    outcome: Outcome,
    within_s: float,
    seen: Seen,
) -> None:
    """A connection that did not end has to be answered, without a pause that is too long; or not to be answered."""
    if outcome.kept == "end":
        seen.wrong.append(f"kept connection {number} did not end")
        return
    if outcome.kept == "hang":
        after = [t - killed for t in answers if t - killed > within_s]
        if after:
            seen.late.append(f"kept connection {number} was answered {after[-1] * 1e3:.0f} ms after the kill")
        return
    times = [killed, *(t for t in answers if t >= killed), until]
    longest = max(later - earlier for earlier, later in pairwise(times))
    if len(times) == 2:
        seen.wrong.append(f"kept connection {number} neither ended nor was answered again")
    elif longest > within_s:
        seen.late.append(f"kept connection {number} was not answered for {longest * 1e3:.0f} ms")
