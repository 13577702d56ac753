# SPDX-License-Identifier: Apache-2.0
"""Urgent data as the kernel has it: the same calls on the kernel's sockets and on ours, the same results and errnos.

The kernel's are a pair over loopback, ours one over a simulated wire. After each call both have time to deliver.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bypass.sim import Network

SIOCATMARK = 0x8905
PEEK, OOB, TRUNC = socket.MSG_PEEK, socket.MSG_OOB, socket.MSG_TRUNC
EXAMPLES = 60 * int(os.environ.get("BYPASS_FUZZ", "1"))
BITS = select.POLLIN | select.POLLPRI
PROMPT_S = 5


class Pair:
    """A writer and a reader, both nonblocking."""

    writer: Any
    reader: Any

    def settle(self) -> None:
        """What was written arrives."""

    def at_mark(self) -> bool:
        raise NotImplementedError

    def ready(self) -> int:
        raise NotImplementedError

    def do(self, call: str, *args: Any) -> Any:
        """The result, or the errno's name."""
        try:
            got = getattr(self, call)(*args)
        except OSError as e:
            return errno.errorcode[e.errno or 0]
        self.settle()
        return got

    def write(self, n: int, flags: int) -> int:
        self.wrote = getattr(self, "wrote", 0) + n
        return int(self.writer.send(bytes((self.wrote - n + i) & 0xFF for i in range(n)), flags))

    def read(self, n: int, flags: int) -> bytes:
        return bytes(self.reader.recv(n, flags))

    def in_line(self, on: bool) -> None:
        self.reader.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, on)

    def end(self) -> None:
        self.writer.shutdown(socket.SHUT_WR)


class Kernel(Pair):
    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.writer = socket.create_connection(listener.getsockname())
            self.reader, _ = listener.accept()
        self.writer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for s in (self.writer, self.reader):
            s.setblocking(False)

    def settle(self) -> None:
        """Loopback delivers inside of send(), but for what another task of the machine holds up: until all is there."""
        unacked = struct.Struct("24xI")  # tcp_info.tcpi_unacked
        until = time.monotonic() + PROMPT_S
        while unacked.unpack(self.writer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, unacked.size))[0]:
            assert time.monotonic() < until

    def at_mark(self) -> bool:
        return bool(struct.unpack("i", fcntl.ioctl(self.reader, SIOCATMARK, bytes(4)))[0])

    def ready(self) -> int:
        poll = select.poll()
        poll.register(self.reader, BITS)
        found = poll.poll(0)
        return found[0][1] & BITS if found else 0

    def close(self) -> None:
        self.writer.close()
        self.reader.close()


class Ours(Pair):
    def __init__(self) -> None:
        self.net = Network(seed=1)
        self.net.wire()
        server, client = self.net.stack("10.0.0.2"), self.net.stack("10.0.0.1")
        with server.create_server(("10.0.0.2", 80)) as listener:
            self.writer = client.create_connection(("10.0.0.2", 80))
            self.reader, _ = listener.accept()
        self.writer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for s in (self.writer, self.reader):
            s.setblocking(False)

    def settle(self) -> None:
        self.writer.stack.run(timeout=0.3)

    def at_mark(self) -> bool:
        return bool(self.reader.at_mark())

    def ready(self) -> int:
        return int(self.reader.readiness()) & BITS

    def close(self) -> None:
        self.writer.close()
        self.reader.close()
        self.net.close()


@pytest.fixture(params=[Kernel, Ours])
def pair(request: pytest.FixtureRequest) -> Iterator[Any]:
    it = request.param()
    yield it
    it.close()


# ---- Said once, and true of both ---------------------------------------------------------------------------------
def test_readiness_tells_of_the_urgent_byte_until_it_is_fetched(pair: Any) -> None:
    assert pair.ready() == 0
    pair.do("write", 1, OOB)
    assert pair.ready() == select.POLLPRI  # and nothing to read
    assert pair.do("read", 1, OOB) == b"\0"
    assert pair.ready() == 0


def test_a_read_stops_at_the_mark_and_the_program_can_tell(pair: Any) -> None:
    pair.do("write", 5, OOB)
    pair.do("write", 3, 0)
    assert not pair.at_mark()
    assert pair.do("read", 100, 0) == bytes(range(4))
    assert pair.at_mark()
    assert pair.do("read", 100, 0) == bytes(range(5, 8))
    assert not pair.at_mark()


def test_in_line_the_urgent_byte_is_read_where_it_stands(pair: Any) -> None:
    pair.in_line(True)
    pair.do("write", 5, OOB)
    assert pair.do("read", 1, OOB) == "EINVAL"
    assert pair.do("read", 100, 0) == bytes(range(4))
    assert pair.at_mark()
    assert pair.do("read", 100, 0) == bytes([4])


def test_an_urgent_byte_cannot_be_fetched_twice_but_looked_at(pair: Any) -> None:
    assert pair.do("read", 1, OOB) == "EINVAL"
    pair.do("write", 2, OOB)
    assert pair.do("read", 9, OOB | PEEK) == bytes([1])
    assert pair.do("read", 9, OOB) == bytes([1])
    assert pair.do("read", 9, OOB) == "EINVAL"
    assert pair.do("read", 9, 0) == bytes([0])


def test_at_the_end_of_the_stream_the_byte_is_still_there(pair: Any) -> None:
    pair.do("write", 2, OOB)
    pair.do("end")
    assert pair.do("read", 9, 0) == bytes([0])
    assert pair.do("read", 9, OOB) == bytes([1])
    assert pair.do("read", 9, 0) == b""


def test_a_mark_is_of_connections(pair: Any) -> None:
    if isinstance(pair, Ours):
        with (
            pair.reader.stack.socket(socket.SOCK_DGRAM) as udp,
            pytest.raises(OSError, match="Invalid argument"),
        ):
            udp.at_mark()


# ---- Any calls ---------------------------------------------------------------------------------------------------
READS = st.tuples(
    st.just("read"),
    st.sampled_from([1, 2, 3, 10, 1000]),
    st.sampled_from([0, 0, 0, PEEK, OOB, OOB | PEEK, TRUNC]),
)
WRITES = st.tuples(st.just("write"), st.sampled_from([1, 2, 3, 10, 300]), st.sampled_from([0, OOB, OOB]))
CALLS = st.one_of(WRITES, WRITES, READS, READS, st.tuples(st.just("in_line"), st.booleans()))


@pytest.mark.hypothesis
@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(CALLS, max_size=20), st.booleans())
def test_any_calls_have_the_kernels_results(calls: list[tuple[Any, ...]], end: bool) -> None:
    """Bytes, errnos, the mark and readiness after every call."""
    kernel, ours = Kernel(), Ours()
    try:
        for call in [
            *calls,
            *([("end",)] if end else []),
            ("read", 1000, 0),
            ("read", 1000, 0),
            ("read", 1, OOB),
        ]:
            expected = (kernel.do(*call), kernel.at_mark(), kernel.ready())
            got = (ours.do(*call), ours.at_mark(), ours.ready())
            if call[0] == "read" and call[2] & TRUNC:  # what is in the buffer is not said
                expected, got = (
                    (len(r[0]) if isinstance(r[0], bytes) else r[0], *r[1:]) for r in (expected, got)
                )
            assert got == expected, call
    finally:
        kernel.close()
        ours.close()
