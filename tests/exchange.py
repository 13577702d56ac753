# SPDX-License-Identifier: Apache-2.0
"""Two simulated stacks in any condition, and one exchange between them (bypass.testing.exchanges).

A failure carries what hypothesis drew, and the path of a pcapng file with the last frames.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from bypass.core import Config
from bypass.sim import DeviceFaults, Faults, Network
from bypass.testing import Exchange, device_faults, exchanges, play, wire_faults
from bypass.testing.streams import assert_clean

PCAP_FOLDER = Path(__file__).resolve().parent.parent / "build" / "sim"


@dataclass(frozen=True)
class Conditions:
    """The network of an exchange; pairs are of client and server."""

    seed: int
    sndbuf: int
    rcvbuf: int
    mtus: tuple[int, int]
    frames: tuple[int, int]
    faults: tuple[Faults, Faults]
    devices: tuple[DeviceFaults, DeviceFaults]


def conditions(most: float = 0.06) -> st.SearchStrategy[Conditions]:
    """most: the largest probability of each kind of harm to a frame."""
    buffers = st.sampled_from([65536, 4096, 1 << 20])
    mtu, frames = st.sampled_from([1500, 1500, 576, 9000]), st.sampled_from([4096, 256])
    device = st.just(DeviceFaults()) | st.just(DeviceFaults()) | device_faults()
    wire = wire_faults(most=most)
    return st.builds(
        Conditions,
        st.integers(0, 1 << 32),
        buffers,
        buffers,
        st.tuples(mtu, mtu),
        st.tuples(frames, frames),
        st.tuples(wire, wire),
        st.tuples(device, device),
    )


def exchange_in(c: Conditions, talk: Exchange) -> Network:
    """Plays it, and asserts that nothing is left. The closed network is returned."""
    net = Network(c.seed)
    net.wire()
    config = Config(conns=8, sndbuf=c.sndbuf, rcvbuf=c.rcvbuf)
    with net.explain_failure(PCAP_FOLDER / "exchange.pcapng"):
        stacks = [
            net.stack(
                f"10.0.0.{i + 1}/24",
                name="ab"[i],
                config=config,
                faults=c.faults[i],
                mtu=c.mtus[i],
                frames=c.frames[i],
            )
            for i in range(2)
        ]
        for stack, faults in zip(stacks, c.devices, strict=True):
            assert stack.port is not None
            stack.port.set_device_faults(faults)
        play(net, *stacks, talk)
        assert_clean(net, *stacks)
        net.close()
    return net


def talk_of(sizes: Sequence[int], seed: int = 0) -> Exchange:
    """An exchange of so many pseudo-random bytes up and down, in pieces of all sizes."""
    rng = random.Random(seed)
    up, down = (rng.randbytes(n) for n in sizes)
    return Exchange(up, down, (1448, 60_000, 1, 5000, 100), (4096, 700, 100_000, 1))


__all__ = ["PCAP_FOLDER", "Conditions", "conditions", "exchange_in", "exchanges", "talk_of"]
