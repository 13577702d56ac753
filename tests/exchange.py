# SPDX-License-Identifier: Apache-2.0
"""One TCP exchange between two simulated stacks: bytes both ways under faults, compared at the end.

Everything derives from a seed. A failure carries the seed and the path of a pcapng file with the last frames.
"""

from __future__ import annotations

import errno
import random
from dataclasses import dataclass
from pathlib import Path

from bypass._core import lib

from bypass.core import Config
from bypass.sim import DeviceFaults, Faults, Network
from bypass.stack_api import STREAM, Stack

PCAP_FOLDER = Path(__file__).resolve().parent.parent / "build" / "sim"
MINUTE_NS = 60 * 10**9


def random_faults(rng: random.Random, *, harsh: bool = False) -> Faults:
    """A direction of a wire that does anything between nothing and much."""
    most = 0.15 if harsh else 0.06

    def sometimes() -> float:
        return rng.random() * most if rng.random() < 0.5 else 0.0

    return Faults(
        loss=sometimes(),
        duplicate=sometimes(),
        corrupt=sometimes(),
        reorder=sometimes(),
        reorder_ns=rng.choice([10_000, 1_000_000, 20_000_000]),
        delay_ns=rng.choice([0, 20_000, 1_000_000, 40_000_000]),
        jitter_ns=rng.choice([0, 0, 5_000, 2_000_000]),
        rate_bps=rng.choice([0, 0, 1_000_000_000, 20_000_000]),
        queue_bytes=rng.choice([30_000, 300_000]),
    )


@dataclass
class End:
    """One end of the connection, driven by events."""

    stack: Stack
    handle: int
    to_send: bytes
    write_sizes: random.Random
    sent: int = 0
    shut: bool = False
    eof: bool = False

    def __post_init__(self) -> None:
        self.received = bytearray()

    def step(self) -> None:
        """Writes and reads what goes, in pieces of random size."""
        core = self.stack.core
        while self.sent < len(self.to_send):
            size = self.write_sizes.choice([1, 100, 1448, 5000, 60_000])
            n = core.send(self.handle, self.to_send[self.sent : self.sent + size])
            if n == -errno.EAGAIN:
                break
            assert n > 0, f"send: {errno.errorcode.get(-n, n)}"
            self.sent += n
        if self.sent == len(self.to_send) and not self.shut:
            core.shutdown(self.handle, lib.BYPASS_SHUT_WR)
            self.shut = True
        while not self.eof:
            got = core.recv(self.handle, self.write_sizes.choice([1, 700, 4096, 100_000]))
            if got == -errno.EAGAIN:
                break
            assert isinstance(got, bytes), f"recv: {errno.errorcode.get(-got, got)}"
            self.eof = not got
            self.received += got

    @property
    def done(self) -> bool:
        return self.shut and self.eof


def check_clean(net: Network, *stacks: Stack) -> None:
    """Runs until connections have ended and left TIME_WAIT; nothing may be in use then."""
    for _ in range(24 * 12):
        net.run(duration_ns=5 * MINUTE_NS)
        if not any(stack.conns() for stack in stacks):
            break
    for stack in stacks:
        left = {kind: n for kind, n in stack.audit().items() if n}
        assert not left, f"{stack.name} still has {left}: {stack.conns()}"
        assert stack.port is not None
        assert stack.port.stats().misuse == 0, f"{stack.name} misused frames"


def connected_handle(net: Network, a: Stack) -> int:
    """Connects to 10.0.0.2:80, again and again while ARP finds nobody or the SYNs are lost."""
    while True:
        with net.lock:
            handle = a.open(STREAM)
            assert a.connect(handle, ("10.0.0.2", 80)) in (0, -errno.EINPROGRESS)

        def settled(handle: int = handle) -> bool:
            return bool(a.core.ready(handle) & (lib.BYPASS_OUT | lib.BYPASS_ERR))

        assert net.run(settled, duration_ns=60 * MINUTE_NS), "connect() neither succeeded nor failed"
        code = a.core.error(handle)
        if code == 0:
            return handle
        assert code in (errno.EHOSTUNREACH, errno.ETIMEDOUT), errno.errorcode[code]
        with net.lock:
            a.close_handle(handle)


def exchange(
    net: Network,
    a: Stack,
    b: Stack,
    up: bytes,
    down: bytes,
    rng: random.Random,
    *,
    limit_ns: int = 24 * 60 * MINUTE_NS,
) -> tuple[End, End]:
    """a connects to b; both send, half-close, and read to the end. AssertionError when a byte differs."""
    server = b.create_server(("0.0.0.0", 80))
    handle = connected_handle(net, a)
    client = End(a, handle, up, rng)
    ends: list[End] = []

    def accepted() -> bool:
        if not ends:
            with_handle = b.accept(server._handle)
            if with_handle >= 0:
                ends.append(End(b, with_handle, down, rng))
        return bool(ends)

    def finished() -> bool:
        if accepted():
            ends[0].step()
        client.step()
        return bool(ends) and client.done and ends[0].done

    assert net.run(finished, duration_ns=limit_ns), (
        f"not finished: {len(client.received)} of {len(down)} down, "
        f"{len(ends[0].received) if ends else 0} of {len(up)} up; {a.conns()} {b.conns()}"
    )
    assert client.received == down, "bytes to the client differ"
    assert ends[0].received == up, "bytes to the server differ"
    server.close()
    with net.lock:
        a.close_handle(handle)
        b.close_handle(ends[0].handle)
    return client, ends[0]


def random_exchange(seed: int, *, most_bytes: int = 60_000, harsh: bool = False) -> Network:
    """A whole simulation from a seed; the closed network is returned for its name only."""
    rng = random.Random(seed)
    net = Network(seed)
    net.wire()
    config = Config(
        conns=8, sndbuf=rng.choice([4096, 65536, 1 << 20]), rcvbuf=rng.choice([4096, 65536, 1 << 20])
    )
    sizes = {"mtu": rng.choice([1500, 1500, 576, 9000]), "frames": rng.choice([256, 4096])}
    with net.explain_failure(PCAP_FOLDER / f"exchange-{seed}.pcapng"):
        a = net.stack("10.0.0.1/24", name="a", config=config, faults=random_faults(rng, harsh=harsh), **sizes)
        b = net.stack("10.0.0.2/24", name="b", config=config, faults=random_faults(rng, harsh=harsh), **sizes)
        for stack in (a, b):
            if rng.random() < 0.3:
                assert stack.port is not None
                stack.port.set_device_faults(
                    DeviceFaults(
                        alloc_fail=rng.choice([0, 0.05]),
                        tx_short=rng.choice([0, 0.2]),
                        kick_again=rng.choice([0, 0.2]),
                        complete_ns=rng.choice([0, 10_000, 3_000_000]),
                    )
                )
        up = rng.randbytes(rng.choice([0, 1, 1448, rng.randrange(most_bytes)]))
        down = rng.randbytes(rng.choice([0, 1, 1449, rng.randrange(most_bytes)]))
        exchange(net, a, b, up, down, rng)
        check_clean(net, a, b)
        net.close()
    return net
