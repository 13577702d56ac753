# SPDX-License-Identifier: Apache-2.0
"""What two programs say to each other over a byte stream, and how they read and write it.

    @given(exchanges(), wire_faults())
    def test_bytes_arrive(talk, faults):
        with Network(seed=1) as net:
            net.wire(faults=faults)
            a, b = net.stack("10.0.0.1/24"), net.stack("10.0.0.2/24")
            play(net, a, b, talk)          # AssertionError when a byte differs
            assert_clean(net, a, b)        # ... or when something is left

`play()` is for two simulated stacks. For a server of your own use the fields of an `Exchange`.
"""

from __future__ import annotations

import errno
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from hypothesis import strategies as st

from bypass._core import lib
from bypass.core import Address
from bypass.sim import Network
from bypass.stack_api import STREAM, Stack

__all__ = ["Exchange", "assert_clean", "exchanges", "play"]

MINUTE_NS = 60 * 10**9


@dataclass(frozen=True)
class Exchange:
    """A conversation over a byte stream: each side sends its bytes, closes its direction, and reads to the end.

    Attributes:
        up: from the client to the server; down: the other way.
        writes: sizes of the pieces in which each side offers its bytes, bytes, over and over.
        reads: sizes of the pieces in which each side asks for bytes, over and over.
    """

    up: bytes
    down: bytes
    writes: tuple[int, ...] = (60_000,)
    reads: tuple[int, ...] = (100_000,)

    def __repr__(self) -> str:
        return f"Exchange({len(self.up)} up, {len(self.down)} down, writes={self.writes}, reads={self.reads})"


WRITE_SIZES = st.sampled_from([60_000, 5000, 1448, 100, 1])
READ_SIZES = st.sampled_from([100_000, 4096, 700, 1])


@st.composite
def exchanges(draw: st.DrawFn, *, most_bytes: int = 60_000) -> Exchange:
    """Conversations of up to `most_bytes` in each direction: none, one byte, a segment, and any number.

    The bytes themselves are pseudo-random, so that a piece in the wrong place differs; sizes shrink to nothing.
    """
    size = st.sampled_from([0, 1, 1448, 1449]).map(lambda n: min(n, most_bytes))
    size |= st.integers(0, most_bytes) | st.integers(most_bytes // 2, most_bytes)
    rng = random.Random(draw(st.integers(0, 255)))
    up, down = rng.randbytes(draw(size)), rng.randbytes(draw(size))
    writes = draw(st.lists(WRITE_SIZES, min_size=1, max_size=4))
    reads = draw(st.lists(READ_SIZES, min_size=1, max_size=4))
    # One byte at a time takes long, and says no more after a few thousand of them.
    if len(up) + len(down) > 4000:
        writes, reads = [max(writes), *writes], [max(reads), *reads]
        writes = [n if n > 1 else 1448 for n in writes] if max(writes) == 1 else writes
        reads = [n if n > 1 else 700 for n in reads] if max(reads) == 1 else reads
    return Exchange(up, down, tuple(writes), tuple(reads))


# ---- Playing one between two simulated stacks -----------------------------------------------------------------------


@dataclass
class _End:
    """One end of the connection, driven by events."""

    stack: Stack
    handle: int
    to_send: bytes
    writes: Iterator[int]
    reads: Iterator[int]
    sent: int = 0
    shut: bool = False
    eof: bool = False
    received: bytearray = field(default_factory=bytearray)

    def step(self) -> None:
        """Writes and reads what goes."""
        core = self.stack.core
        while self.sent < len(self.to_send):
            n = core.send(self.handle, self.to_send[self.sent : self.sent + next(self.writes)])
            if n == -errno.EAGAIN:
                break
            assert n > 0, f"send: {errno.errorcode.get(-n, n)}"
            self.sent += n
        if self.sent == len(self.to_send) and not self.shut:
            core.shutdown(self.handle, lib.BYPASS_SHUT_WR)
            self.shut = True
        while not self.eof:
            got = core.recv(self.handle, next(self.reads))
            if got == -errno.EAGAIN:
                break
            assert isinstance(got, bytes), f"recv: {errno.errorcode.get(-got, got)}"
            self.eof = not got
            self.received += got

    @property
    def done(self) -> bool:
        return self.shut and self.eof


def assert_clean(net: Network, *stacks: Stack) -> None:
    """Runs until connections have ended and left TIME_WAIT; asserts that nothing is in use then (`Stack.audit`) and
    that no frame was freed or sent without being held. Close every socket before."""
    for _ in range(24 * 12):
        net.run(duration_ns=5 * MINUTE_NS)
        if not any(stack.conns() for stack in stacks):
            break
    for stack in stacks:
        left = {kind: n for kind, n in stack.audit().items() if n}
        assert not left, f"{stack.name} still has {left}: {stack.conns()}"
        assert stack.port is not None
        assert stack.port.stats().misuse == 0, f"{stack.name} misused frames"


def _connected(net: Network, client: Stack, address: Address) -> int:
    """Connects, again and again while ARP finds nobody or the SYNs are lost."""
    while True:
        with net.lock:
            handle = client.open(STREAM)
            assert client.connect(handle, address) in (0, -errno.EINPROGRESS)

        def settled(handle: int = handle) -> bool:
            return bool(client.core.ready(handle) & (lib.BYPASS_OUT | lib.BYPASS_ERR))

        assert net.run(settled, duration_ns=60 * MINUTE_NS), "connect() neither succeeded nor failed"
        code = client.core.error(handle)
        if code == 0:
            return handle
        assert code in (errno.EHOSTUNREACH, errno.ETIMEDOUT), errno.errorcode[code]
        with net.lock:
            client.close_handle(handle)


def play(
    net: Network,
    client: Stack,
    server: Stack,
    talk: Exchange,
    *,
    address: Address = ("10.0.0.2", 80),
    limit_ns: int = 24 * 60 * MINUTE_NS,
) -> None:
    """Plays an exchange: `client` connects to `address`, which `server` owns; both send, half-close, and read to the
    end; the sockets are closed.

    Raises:
        AssertionError: a byte differs, a call fails that should not, or it is not finished after `limit_ns` of virtual
            time.
    """
    writes, reads = itertools.cycle(talk.writes), itertools.cycle(talk.reads)
    with server.create_server(("0.0.0.0", address[1])) as listener:
        near = _End(client, _connected(net, client, address), talk.up, writes, reads)
        ends: list[_End] = []

        def finished() -> bool:
            if not ends:
                handle = server.accept(listener._handle)
                if handle >= 0:
                    ends.append(_End(server, handle, talk.down, writes, reads))
            for end in (*ends, near):
                end.step()
            return bool(ends) and near.done and ends[0].done

        assert net.run(finished, duration_ns=limit_ns), (
            f"not finished: {len(near.received)} of {len(talk.down)} down, "
            f"{len(ends[0].received) if ends else 0} of {len(talk.up)} up; {client.conns()} {server.conns()}"
        )
        assert near.received == talk.down, "bytes to the client differ"
        assert ends[0].received == talk.up, "bytes to the server differ"
    with net.lock:
        client.close_handle(near.handle)
        server.close_handle(ends[0].handle)
