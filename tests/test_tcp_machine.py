# SPDX-License-Identifier: Apache-2.0
"""TCP: two stacks, programs that do anything at any time, and a hostile wire, against two byte strings a connection.

The model knows what each program wrote and what it was told. What is read is always what the other wrote, from its
beginning; when the wire is calm again and nobody reset anything, all of it arrives; at the end nothing is left.
"""

from __future__ import annotations

import errno
import itertools
import random
from dataclasses import dataclass, field

from bypass._core import lib
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)
from support import examples
from wire import SYN, TCP, eth, ipv4, tcp

from bypass.core import Config, CoreStack
from bypass.sim import DeviceFaults, Faults, Network

A, B = "10.0.0.1", "10.0.0.2"
MS = 1_000_000
AGAIN = -errno.EAGAIN
DATA = random.Random(5).randbytes(1 << 18)


@dataclass(eq=False)
class Side:
    """One program's end of a connection."""

    core: CoreStack
    handle: int = -1
    written: int = 0
    read: bytearray = field(default_factory=bytearray)
    eof: bool = False
    shut: bool = False
    closed: bool = False
    broken: int = 0  # errno it was told
    offset: int = 0  # where in DATA its stream begins

    @property
    def usable(self) -> bool:
        return self.handle >= 0 and not self.closed

    @property
    def bytes(self) -> bytes:
        return DATA[self.offset : self.offset + self.written]


@dataclass(eq=False)
class Link:
    client: Side
    server: Side
    ends_by_reset: bool = False  # a program reset it, or closed it with something unread

    def other(self, side: Side) -> Side:
        return self.server if side is self.client else self.client

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.client, self.server


class TwoStacks(RuleBasedStateMachine):
    links = Bundle("links")

    @initialize(
        seed=st.integers(0, 999),
        buffers=st.sampled_from([4096, 20_000, 1 << 20]),
        mtu=st.sampled_from([576, 1500, 9000]),
        frames=st.sampled_from([128, 1024]),
        ecn=st.sampled_from([0, 1, 2]),
        mtu_probing=st.sampled_from([0, 1, 2]),
        fastopen=st.sampled_from([0, 3]),
        cookies=st.sampled_from([0, 1]),  # 2: an old cookie may make its connection again (RFC 4987 3.6)
        cc=st.sampled_from(["cubic", "reno", "bbr"]),
    )
    def begin(
        self, seed: int, buffers: int, mtu: int, frames: int, ecn: int, mtu_probing: int, fastopen: int,
        cookies: int, cc: str,
    ) -> None:  # fmt: skip
        self.net = Network(seed)
        config = Config(
            conns=12, sndbuf=buffers, rcvbuf=buffers, chunks=256, ecn=ecn, mtu_probing=mtu_probing,
            fastopen=fastopen, syn_cookies=cookies,
        )  # fmt: skip
        self.stacks = [
            self.net.stack(f"{ip}/24", name=n, config=config, mtu=mtu, frames=frames)
            for ip, n in ((A, "a"), (B, "b"))
        ]
        for stack in self.stacks:
            stack.core.cc_default(cc)
        self.raw = self.net.raw_port("hostile")
        self.rng = random.Random(seed)
        self.fastopen = fastopen
        self.history: list[bytes] = []
        self.all: list[Link] = []
        self.a, self.b = (s.core for s in self.stacks)
        self.listener = self.b.socket(lib.BYPASS_STREAM)
        for option in (lib.BYPASS_SO_OOBINLINE, lib.BYPASS_TCP_FASTOPEN):  # urgent bytes stay in the stream
            self.b.setopt(self.listener, option, 1 if option == lib.BYPASS_SO_OOBINLINE else 16)
        self.b.bind(self.listener, (B, 80))
        self.b.listen(self.listener, 8)
        self.count = itertools.count()

    # ---- programs
    @rule(target=links, early=st.sampled_from([0, 0, 1, 700, 3000]))
    def connect(self, early: int) -> object:
        """early: bytes that may go with the SYN (RFC 7413)."""
        if sum(1 for link in self.all if not link.client.closed) >= 4:
            return multiple()
        handle = self.a.socket(lib.BYPASS_STREAM)
        self.a.setopt(handle, lib.BYPASS_SO_OOBINLINE, 1)
        n = next(self.count)
        offset = n * 700 % 50_000
        if early and self.fastopen:
            result = self.a.sendto(handle, DATA[offset : offset + early], (B, 80), lib.BYPASS_FASTOPEN)
        else:
            result = self.a.connect(handle, (B, 80))
        if result < 0 and result != -errno.EINPROGRESS:
            assert result == -errno.ENOBUFS
            self.a.close_socket(handle)
            return multiple()
        link = Link(
            Side(self.a, handle, offset=offset, written=max(result, 0)), Side(self.b, offset=n * 900 % 50_000)
        )
        self.all.append(link)
        self.net.run(duration_ns=MS)
        self.accept()
        return link

    @rule()
    def accept(self) -> None:
        while True:
            handle = self.b.accept(self.listener)
            if handle == AGAIN:
                return
            assert handle >= 0
            port = self.b.peer(handle)[1]
            for link in reversed(self.all):
                if link.client.usable and self.a.local(link.client.handle)[1] == port:
                    if (
                        self.fastopen and link.server.handle >= 0
                    ):  # a SYN's data may come twice (RFC 7413 2.1)
                        self.b.close_socket(handle)
                        break
                    assert link.server.handle < 0, "one connection was accepted twice"
                    link.server.handle = handle
                    break
            else:  # its client is gone already
                self.b.close_socket(handle)

    def error(self, side: Side, code: int) -> None:
        side.broken = -code
        assert -code in (
            errno.ECONNRESET,
            errno.EPIPE,
            errno.ETIMEDOUT,
            errno.EHOSTUNREACH,
            errno.ECONNREFUSED,
            errno.ENOTCONN,  # shutdown() ended the attempt to connect
        ), code

    def send(self, side: Side, n: int, flags: int = 0) -> None:
        n = min(n, len(DATA) - side.offset - side.written)
        start = side.offset + side.written
        got = side.core.send(side.handle, DATA[start : start + n], flags)
        if got >= 0:
            assert got <= n
            assert not side.shut or n == 0
            side.written += got
        elif side.shut:
            assert got == -errno.EPIPE or side.broken == 0
            if got != -errno.EPIPE:
                self.error(side, got)
        elif got != AGAIN:
            self.error(side, got)

    def recv(self, side: Side, n: int) -> int:
        got = side.core.recv(side.handle, n)
        if isinstance(got, int):
            if got != AGAIN:
                self.error(side, got)
            return 0
        if n:
            side.eof = side.eof or got == b""
        side.read += got
        return len(got)

    def side(self, link: Link, server: bool) -> Side | None:
        side = link.server if server else link.client
        return side if side.usable else None

    @rule(
        link=links,
        server=st.booleans(),
        n=st.sampled_from([0, 1, 99, 536, 1448, 5000, 40_000]),
        flags=st.sampled_from([0, 0, lib.BYPASS_MORE, lib.BYPASS_OOB]),
    )
    def write(self, link: Link, server: bool, n: int, flags: int) -> None:
        if side := self.side(link, server):
            self.send(side, n, flags)

    @rule(
        link=links,
        sizes=st.lists(st.sampled_from([1, 500, 1448, 9000]), min_size=1, max_size=8),
        ms=st.integers(0, 60),
    )
    def talk(self, link: Link, sizes: list[int], ms: int) -> None:
        """Both write, time passes, both read."""
        for i, n in enumerate(sizes):
            if side := self.side(link, bool(i % 2)):
                self.send(side, n)
        self.wait(ms)
        for server in (True, False):
            if side := self.side(link, server):
                self.recv(side, 1 << 17)

    @rule(link=links, server=st.booleans(), n=st.sampled_from([1, 100, 1448, 100_000]))
    def read(self, link: Link, server: bool, n: int) -> None:
        if side := self.side(link, server):
            self.recv(side, n)

    @rule(link=links, server=st.booleans(), n=st.sampled_from([1, 1448, 100_000]))
    def peek(self, link: Link, server: bool, n: int) -> None:
        """A look ahead takes nothing, and sees what a read then gets."""
        if side := self.side(link, server):
            seen = side.core.recv(side.handle, n, lib.BYPASS_PEEK)
            if isinstance(seen, bytes):
                start = len(side.read)
                assert self.recv(side, len(seen)) <= len(seen)
                got = bytes(side.read[start:])
                assert seen.startswith(got)
                assert got or not seen

    @rule(link=links, server=st.booleans(), name=st.sampled_from(["reno", "cubic", "bbr", "dctcp"]))
    def congestion(self, link: Link, server: bool, name: str) -> None:
        if side := self.side(link, server):
            side.core.cc_set(side.handle, name)

    @rule(link=links, server=st.booleans())
    def shutdown(self, link: Link, server: bool) -> None:
        if side := self.side(link, server):
            try:
                side.core.shutdown(side.handle, lib.BYPASS_SHUT_WR)
                side.shut = True
            except OSError as e:
                assert e.errno == errno.ENOTCONN  # noqa: PT017 - it may also succeed

    @rule(link=links, server=st.booleans(), abort=st.booleans())
    def close(self, link: Link, server: bool, abort: bool) -> None:
        if side := self.side(link, server):
            link.ends_by_reset = True  # what arrives from now on has no reader
            side.closed = True
            (side.core.abort if abort else side.core.close_socket)(side.handle)

    @rule(
        link=links,
        server=st.booleans(),
        option=st.sampled_from(
            [lib.BYPASS_TCP_NODELAY, lib.BYPASS_TCP_CORK, lib.BYPASS_SO_KEEPALIVE, lib.BYPASS_TCP_QUICKACK]
        ),
        on=st.booleans(),
    )
    def option(self, link: Link, server: bool, option: int, on: bool) -> None:
        if side := self.side(link, server):
            side.core.setopt(side.handle, option, on)

    @rule(link=links, server=st.booleans(), size=st.sampled_from([4096, 30_000, 1 << 20]))
    def buffers(self, link: Link, server: bool, size: int) -> None:
        if side := self.side(link, server):
            side.core.setopt(side.handle, lib.BYPASS_SO_RCVBUF, size)
            side.core.setopt(side.handle, lib.BYPASS_SO_SNDBUF, size)

    # ---- time and the wire
    @rule(ms=st.sampled_from([0, 1, 10, 45, 250, 1500, 70_000]))
    def wait(self, ms: int) -> None:
        self.net.run(duration_ns=ms * MS)
        self.history += [frame for _, frame in self.raw.recv()]
        del self.history[:-200]

    @rule(
        which=st.integers(0, 1),
        loss=st.sampled_from([0, 0.02, 0.2]),
        duplicate=st.sampled_from([0, 0.1]),
        corrupt=st.sampled_from([0, 0.05]),
        reorder=st.sampled_from([0, 0.2]),
        delay_ms=st.sampled_from([0, 1, 80]),
    )
    def faults(
        self, which: int, loss: float, duplicate: float, corrupt: float, reorder: float, delay_ms: int
    ) -> None:
        port = self.stacks[which].port
        assert port is not None
        port.set_faults(
            Faults(
                loss=loss,
                duplicate=duplicate,
                corrupt=corrupt,
                reorder=reorder,
                reorder_ns=30 * MS,
                delay_ns=delay_ms * MS,
                jitter_ns=delay_ms * MS // 4,
            )
        )

    @rule(
        which=st.integers(0, 1),
        alloc=st.sampled_from([0, 0.3]),
        short=st.sampled_from([0, 0.3]),
        ms=st.sampled_from([0, 3]),
    )
    def device(self, which: int, alloc: float, short: float, ms: int) -> None:
        port = self.stacks[which].port
        assert port is not None
        port.set_device_faults(
            DeviceFaults(alloc_fail=alloc, tx_short=short, kick_again=short, complete_ns=ms * MS)
        )

    @precondition(lambda self: self.history)
    @rule(n=st.integers(1, 8))
    def replay(self, n: int) -> None:
        """Old frames come again."""
        for _ in range(n):
            self.raw.send(self.rng.choice(self.history))

    @rule(link=links, to_server=st.booleans(), n=st.integers(1, 8))
    def guess(self, link: Link, to_server: bool, n: int) -> None:
        """A blind attacker who knows the connection's names, but no sequence number."""
        if not link.client.usable:
            return
        local = self.a.local(link.client.handle)[1]
        ends = ((A, local), (B, 80)) if to_server else ((B, 80), (A, local))
        (src, sport), (dst, dport) = ends
        for _ in range(n):
            flags = self.rng.randrange(64) & ~SYN  # a SYN may begin something in its own right
            packet = tcp(
                src,
                dst,
                sport,
                dport,
                self.rng.getrandbits(32),
                self.rng.getrandbits(32),
                flags,
                9000,
                b"evil" * 9,
            )
            mac = self.stacks[to_server].port
            assert mac is not None
            self.raw.send(eth(mac.mac, b"\x02\0\0\0\0\x99", 0x0800, ipv4(src, dst, TCP, packet)))

    # ---- what always holds
    @invariant()
    def only_what_was_written_is_read(self) -> None:
        for link in getattr(self, "all", ()):
            for side in link.sides:
                wrote = link.other(side).bytes
                assert wrote.startswith(bytes(side.read)), "bytes that were never written, or out of order"
                if side.eof and not side.broken and not link.ends_by_reset:
                    assert len(side.read) == len(wrote), "end of stream before its end"

    # ---- the end: the wire is calm; everybody reads to the end
    def teardown(self) -> None:
        if not hasattr(self, "net"):
            return
        for stack in self.stacks:
            assert stack.port is not None
            stack.port.set_faults(Faults())
            stack.port.set_device_faults(DeviceFaults())
        for _ in range(60):
            self.accept()
            for link in self.all:
                for side in link.sides:
                    if side.usable and not side.broken:
                        while self.recv(side, 1 << 17):
                            pass
                        if (
                            side.core.ready(side.handle) & lib.BYPASS_OUT
                            and not side.shut
                            and not side.broken
                        ):
                            side.core.shutdown(side.handle, lib.BYPASS_SHUT_WR) if side.core.tcp_info(
                                side.handle
                            ).state not in ("CLOSED",) else None
                            side.shut = True
            self.net.run(duration_ns=20_000 * MS)
            self.only_what_was_written_is_read()
        for link in self.all:
            if link.ends_by_reset or any(s.broken for s in link.sides) or link.server.handle < 0:
                continue
            for side in link.sides:
                assert side.eof, (link, side.core.tcp_info(side.handle))
                assert len(side.read) == link.other(side).written, "bytes are missing"
        for link in self.all:
            for side in link.sides:
                if side.usable:
                    side.core.close_socket(side.handle)
        self.b.close_socket(self.listener)
        self.net.run(duration_ns=30 * 60_000 * MS)
        for stack in self.stacks:
            left = {k: v for k, v in stack.audit().items() if v}
            assert not left, (stack.name, left, stack.conns())
        self.net.close()


TwoStacks.TestCase.settings = settings(max_examples=examples(150), stateful_step_count=60)
TestTwoStacks = TwoStacks.TestCase
