# SPDX-License-Identifier: Apache-2.0
"""What a simulated wire and a network device do to frames: loss, reordering, duplication, corruption, delay, rate;
devices without free frames, with short rings, late completions.

The values are those of `bypass.sim.Faults` and `bypass.sim.DeviceFaults`: probabilities 0..1, nanoseconds, bits a
second. Simplest is a perfect wire, and that is what hypothesis shrinks to.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from bypass.sim import DeviceFaults, Fate, Faults

__all__ = ["device_faults", "fates", "wire_faults"]


def wire_faults(*, most: float = 0.06, slow: bool = True) -> st.SearchStrategy[Faults]:
    """One direction of a wire, from perfect to bad.

    Args:
        most: the largest probability of each of loss, duplication, corruption, reordering; at most 0.25, since a frame
            meets at most one of them.
        slow: also delays up to 40 ms, jitter, and rates down to 20 Mbit/s.

    Raises:
        ValueError: `most` is out of range.
    """
    if not 0 <= most <= 0.25:
        raise ValueError(f"most is a probability, 0..0.25, not {most}")
    return _wire_faults(most, slow)


@st.composite
def _wire_faults(draw: st.DrawFn, most: float, slow: bool) -> Faults:
    chance = st.just(0.0) | st.sampled_from([most / 6, most / 2, most])
    loss, duplicate, corrupt, reorder = (draw(chance) for _ in range(4))
    faults = Faults(
        loss=loss,
        duplicate=duplicate,
        corrupt=corrupt,
        reorder=reorder,
        reorder_ns=draw(st.sampled_from([1_000_000, 10_000, 20_000_000])),
    )
    if not slow:
        return faults
    return replace(
        faults,
        delay_ns=draw(st.sampled_from([0, 20_000, 1_000_000, 40_000_000])),
        jitter_ns=draw(st.sampled_from([0, 5_000, 2_000_000])),
        rate_bps=draw(st.sampled_from([0, 1_000_000_000, 20_000_000])),
        queue_bytes=draw(st.sampled_from([300_000, 30_000])),
    )


def fates(max_size: int = 60) -> st.SearchStrategy[list[int]]:
    """What happens to the first frames that a port sends, one by one, for `Port.script()`: half of them pass.

    Shorter and simpler stories come first, so a failure shrinks to the frames whose fate matters.
    """
    harm = [Fate.LOSE, Fate.DUPLICATE, Fate.CORRUPT, Fate.REORDER]
    return st.lists(st.sampled_from([Fate.PASS] * 4 + harm), max_size=max_size)


def device_faults(*, most: float = 0.2) -> st.SearchStrategy[DeviceFaults]:
    """A network device on a bad day; `most`: the largest probability of a failed allocation, a batch that is taken in
    part, a kick that asks to be repeated."""
    chance = st.sampled_from([0.0, most / 4, most])
    return st.builds(
        DeviceFaults,
        alloc_fail=chance,
        tx_short=chance,
        kick_again=chance,
        complete_ns=st.sampled_from([0, 10_000, 3_000_000]),
    )
