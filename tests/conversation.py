# SPDX-License-Identifier: Apache-2.0
"""A conversation with one stack: this frame at this virtual time in, exactly these frames out.

    with Conversation() as c:
        c.inject(c.frame(ipv4(PEER, US, ICMP, echo(8, 1, 1, b"hello"))))
        [reply] = c.sent()

The stack is alone on a simulated wire without faults; the test holds the other end. Closing it asserts that nothing is
left: no frame, packet, timer or socket.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bypass._core import ffi, lib
from wire import BROADCAST, ETH_ARP, ETH_IPV4, Ip, Udp, arp, eth, parse_ip, parse_udp

from bypass.core import Address, Config, CoreStack, Event

US, PEER, OTHER, AWAY = "192.0.2.1", "192.0.2.2", "192.0.2.3", "198.51.100.7"
OUR_MAC = bytes.fromhex("020000000001")
PEER_MAC = bytes.fromhex("020000000002")
SECOND = 1_000_000_000
KERNEL = 0  # flags of a stack whose next hops the embedder answers
CORPUS = os.environ.get("BYPASS_CORPUS")  # a folder: frames become seeds of tests/c/fuzz_frames.c
ALL = lib.BYPASS_F_ARP | lib.BYPASS_F_PING | lib.BYPASS_F_RST


class Conversation:
    """A stack at 192.0.2.1/24 and its wire.

    Args:
        flags: lib.BYPASS_F_* of the stack.
        neighbours: addresses that are resolved to PEER_MAC before the conversation begins, so that no ARP is in it.
        frames: packet memory of the stack's port.
        seed: the stack's secrets derive from it.
    """

    def __init__(
        self,
        *,
        flags: int = ALL,
        neighbours: tuple[str, ...] = (PEER,),
        gateway: str | None = None,
        config: Config | None = None,
        frames: int = 256,
        mtu: int = 1500,
        start_ns: int = SECOND,
        caps: int = 0,
        seed: int = 1,
    ) -> None:
        self.sim: Any = lib.sim_create(seed, start_ns)
        wire = lib.sim_wire_create(self.sim, 0)
        self.port = self._port(wire, OUR_MAC, frames=frames, mtu=mtu, caps=caps)
        self.raw = self._port(wire, PEER_MAC, flags=lib.SIM_PORT_RAW, mtu=max(mtu, 9000))
        env = ffi.new("struct bypass_env *")
        assert lib.sim_env(self.sim, env, 0) == 0
        self.stack = CoreStack(
            self.port, config=config or Config(conns=64), flags=flags, now_ns=start_ns, env=env
        )
        self.stack.addr_add(US, 24)
        self.number = lib.sim_stack_add(self.sim, self.stack.c, self.port)
        assert self.number >= 0
        self.events: list[Event] = []
        self._seed = b""
        self._out = ffi.new("struct sim_event[]", 64)
        self._result = ffi.new("struct sim_result *")
        self._frames: list[tuple[int, bytes]] = []
        self._buf: Any = ffi.new("uint8_t[]", 65536)
        if gateway is not None:
            self.stack.gateway_set(gateway)
        for address in neighbours:
            self.stack.nexthop_set(address, PEER_MAC)
        self._stats = self.stack.stats()

    def _port(
        self, wire: Any, mac: bytes, *, flags: int = 0, frames: int = 0, mtu: int = 0, caps: int = 0
    ) -> Any:
        cfg = ffi.new("struct sim_port_config *")
        cfg.flags, cfg.frames, cfg.mtu, cfg.caps = flags, frames, mtu, caps
        cfg.mac = mac
        port = lib.sim_port_create(wire, cfg)
        assert port != ffi.NULL
        return port

    # ---- time and frames
    @property
    def now(self) -> int:
        """Virtual nanoseconds."""
        return int(lib.sim_now(self.sim))

    def _run(self, until: int) -> None:
        while True:
            result = lib.sim_run(self.sim, until, self._out, 64, self._result)
            assert result == 0, f"sim_run: {result}"
            for i in range(self._result.events):
                e = self._out[i]
                self.events.append(Event(e.sock, e.user, e.mask))
            self._drain()
            if self._result.reason == lib.SIM_TIME:
                return
            assert self._result.reason != lib.SIM_IDLE or until == lib.sim_now(self.sim), (
                "the clock must move"
            )

    def _drain(self) -> None:
        when = ffi.new("uint64_t *")
        while (n := lib.sim_port_recv(self.raw, self._buf, len(self._buf), when)) >= 0:
            self._frames.append((int(when[0]), ffi.buffer(self._buf, n)[:]))

    def settle(self) -> None:
        """Everything that happens at this instant happens."""
        self._run(self.now)

    def advance(self, seconds: float) -> None:
        """Moves the clock; timers run on the way, at their own times."""
        self._run(self.now + round(seconds * SECOND))

    def inject(self, *frames: bytes) -> None:
        """Frames arrive at the stack, now."""
        for frame in frames:
            if CORPUS and len(self._seed) < 4000:
                self._seed += b"\x04" + len(frame).to_bytes(2, "big") + frame
            buf = ffi.from_buffer(frame)
            assert lib.sim_port_send(self.raw, buf, len(frame)) == 0
        self.settle()

    def frame(self, packet: bytes, *, src: bytes = PEER_MAC, dst: bytes = OUR_MAC) -> bytes:
        """An IPv4 packet in a frame to the stack."""
        return eth(dst, src, ETH_IPV4, packet)

    def inject_ip(self, *packets: bytes) -> None:
        self.inject(*(self.frame(p) for p in packets))

    def sent_at(self) -> list[tuple[int, bytes]]:
        """(virtual time in ns, frame) of everything that left since the last call."""
        self.settle()
        frames, self._frames = self._frames, []
        return frames

    def sent(self) -> list[bytes]:
        """Frames that left since the last call."""
        return [frame for _, frame in self.sent_at()]

    def sent_ip(self) -> list[Ip]:
        """The same as IPv4 packets; asserts that each went to the peer's MAC and that its header is right."""
        packets = []
        for frame in self.sent():
            assert frame[:6] == PEER_MAC
            assert frame[6:12] == OUR_MAC
            assert frame[12:14] == ETH_IPV4.to_bytes(2, "big"), frame.hex()
            packets.append(parse_ip(frame[14:]))
        return packets

    def sent_udp(self) -> list[Udp]:
        return [parse_udp(p) for p in self.sent_ip()]

    def nothing(self) -> None:
        """Asserts that no frame left."""
        assert [f.hex() for f in self.sent()] == []

    def answer_arp(self, address: str, mac: bytes = PEER_MAC) -> None:
        self.inject(eth(OUR_MAC, mac, ETH_ARP, arp(2, mac, address, OUR_MAC, US)))

    # ---- sockets
    def udp(self, port: int = 7, address: str = "0.0.0.0", peer: Address | None = None) -> int:
        sock = self.stack.socket(lib.BYPASS_DGRAM)
        self.stack.bind(sock, (address, port))
        if peer is not None:
            assert self.stack.connect(sock, peer) == 0
        return sock

    def read(self, sock: int, n: int = 65536) -> tuple[bytes, Address]:
        got = self.stack.recvfrom(sock, n)
        assert not isinstance(got, int), f"recvfrom: {got}"
        return got[0], got[1]

    def taken(self, sock: int) -> int:
        """All events of this socket since the last call, together."""
        self.settle()
        mask = 0
        for e in self.events:
            mask |= e.mask if e.sock == sock else 0
        self.events = [e for e in self.events if e.sock != sock]
        return mask

    # ---- what happened inside
    def counted(self) -> dict[str, int]:
        """Counters that moved since the last call, but for the totals of frames and bytes."""
        stats = self.stack.stats()
        moved = Counter(stats)
        moved.subtract(self._stats)
        self._stats = stats
        return {
            k: v
            for k, v in moved.items()
            if v and k not in ("rx_frames", "rx_bytes", "tx_frames", "tx_bytes")
        }

    def held(self) -> int:
        """Frames that the stack holds."""
        stats = ffi.new("struct sim_port_stats *")
        lib.sim_port_stats(self.port, stats)
        return int(stats.held)

    def starve(self, *, starved: bool = True) -> None:
        """From now on the device gives no frames for sending, though it has some."""
        self.device(alloc_fail_ppm=1_000_000 if starved else 0)

    def device(self, **faults: int) -> None:
        """What is wrong with the device from now on: fields of struct sim_device_faults; the others are 0."""
        lib.sim_port_device_faults(self.port, ffi.new("struct sim_device_faults *", faults))

    # ---- end
    def close(self, *, check: bool = True) -> None:
        """Ends it. check: asserts that the stack gave everything back."""
        if CORPUS and self._seed:
            folder = Path(CORPUS) / "frames"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / hashlib.sha1(self._seed).hexdigest()).write_bytes(self._seed)
        lib.bypass_destroy(self.stack.c)
        audit = self.stack.audit()
        self.stack.closed = True
        lib.sim_stack_del(self.sim, self.number)
        stats = ffi.new("struct sim_port_stats *")
        lib.sim_port_stats(self.port, stats)
        held, misuse = int(stats.held), int(stats.misuse)
        lib.sim_destroy(self.sim)
        if check:
            assert not {k: v for k, v in audit.items() if v}, audit
            assert held == 0, f"{held} frames leaked"
            assert misuse == 0, f"{misuse} frames freed or sent without being held"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(check=kind is None)


def broadcast(packet: bytes) -> bytes:
    """An IPv4 packet in a broadcast frame."""
    return eth(BROADCAST, PEER_MAC, ETH_IPV4, packet)
