# SPDX-License-Identifier: Apache-2.0
"""Shared mode in C, compiled for Python: an application's port, and bypass-fwd's half of it in the same process."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

import cffi
from afxdp_support import sum16
from c_library import ROOT, Library, Netdev, compiled

SOURCES = (
    *(f"bypass/fwd/{name}.c" for name in ("port", "peer", "lease", "check", "forward")),
    "tests/c/fwd_words.c",
    "tests/c/fwd_world.c",
)
PAGE = 4096
STACK, DEV, RX = 1, 2, 4


_built: list[Library] = []


@lru_cache
def build(folder: Path) -> Library:
    """(ffi, lib) of SOURCES, with the debug checks. Tests have it as the fixture `fwd_library`."""
    sources = [ROOT / s for s in SOURCES]
    headers = [s.with_suffix(".h").name for s in sources if s.parent.name == "c"]
    _built.append(compiled(folder / "fwd.so", sources, headers, ["-DBYPASS_DEBUG"]))
    return _built[-1]


def built() -> Library:
    """The same where no fixture can come: a state machine of hypothesis."""
    return _built[-1]


class Port(Netdev):
    """A port in ordinary memory with both halves; doorbells are a pair of sockets and an eventfd."""

    def __init__(self, ffi: cffi.FFI, lib: Any, first: int = 0, **config: Any) -> None:
        self.ffi, self.lib = ffi, lib
        values = {"frames": 64, "rx_ring": 16, "tx_ring": 16, "mtu": 1500, "queues": 2} | config
        self.config = ffi.new("struct port_config *", values)
        size = lib.port_mem_size(self.config)
        assert size
        self.raw = ffi.new("uint8_t[]", size + PAGE)
        self.mem = ffi.cast("void *", (int(ffi.cast("uintptr_t", self.raw)) + PAGE - 1) & -PAGE)
        assert lib.port_init(self.mem, size, self.config) == 0
        lib.fwd_positions(self.mem, first)
        self.app_end, self.fwd_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.eventfd = os.eventfd(0, os.EFD_NONBLOCK)
        self.port, self.peer = ffi.new("struct port *"), ffi.new("struct peer *")
        assert lib.port_attach(self.port, self.mem, size, self.eventfd, self.app_end.fileno()) == 0
        assert lib.peer_attach(self.peer, self.mem, size, self.config, self.fwd_end.fileno()) == 0
        self.nd = lib.port_netdev(self.port)
        self.one = ffi.new("struct bypass_pkt_meta *")
        self.room = ffi.new("uint8_t[]", (self.config.frame_size or 2048) - 256)

    def close(self) -> None:
        self.app_end.close()
        self.fwd_end.close()
        os.close(self.eventfd)

    # ---- The application's half, as of every device and
    def send(self, data: bytes) -> None:
        """One frame, posted and let go of."""
        [p] = self.alloc(1)
        self.write(p, data)
        assert self.tx_burst([p]) == 1
        self.free([p])

    def receive(self) -> list[bytes]:
        """All that is there, freed."""
        got = self.rx_burst()
        data = [self.data(p) for p in got]
        self.free(got)
        return data

    def counters(self) -> Any:
        out = self.ffi.new("struct port_counters *")
        self.lib.port_counters(self.port, out)
        return out

    def audit(self) -> Any:
        """struct frame_audit; asserts that all its sums agree."""
        out = self.ffi.new("struct frame_audit *")
        assert self.lib.port_audit(self.port, out) == 0
        return out

    def word(self, name: str) -> Any:
        """Pointer to a shared word: rx_posted, tx_posted, rx_done, tx_done, link, fwd_sleeps, app_sleeps."""
        return self.lib.fwd_word(self.mem, getattr(self.lib, f"WORD_{name.upper()}"))

    # ---- bypass-fwd's half
    def deliver(self, data: bytes, **meta: int) -> bool:
        self.one[0] = {"len": len(data)} | meta
        return bool(self.lib.peer_deliver(self.peer, data, self.one))

    def publish(self) -> None:
        self.lib.peer_publish(self.peer)

    def take(self, max_: int = 64) -> list[tuple[bytes, int]]:
        """What the application sent, at most max_ frames, given back to it: (bytes, queue)."""
        got = []
        for _ in range(self.lib.peer_tx_avail(self.peer, max_)):
            if self.lib.peer_tx_take(self.peer, self.room, len(self.room), self.one):
                got.append((bytes(self.room[0 : self.one.len]), self.one.queue))
        self.lib.peer_tx_publish(self.peer)
        return got


# ---- The whole: ports, the forwarder, and a device in memory ---------------------------------------------------------
MAC, ROUTER = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")  # MAC: memdev.h
HOST, HOST2, PEER = "192.0.2.10", "192.0.2.11", "198.51.100.7"
TCP, UDP, ICMP = 6, 17, 1


def mapped(address: str) -> bytes:
    return b"\0" * 10 + b"\xff\xff" + ipaddress.IPv4Address(address).packed if address else bytes(16)


def ip(
    payload: bytes,
    proto: int = UDP,
    *,
    src: str = HOST,
    dst: str = PEER,
    ident: int = 0,
    frag: int = 0,
    first: int = 0x45,
    total: int | None = None,
    options: bytes = b"",
) -> bytes:
    """An IPv4 packet with a right checksum. frag: flags and offset / 8."""
    size = 20 + len(options) + len(payload) if total is None else total
    head = struct.pack(">BBHHHBBH", first + len(options) // 4, 0, size, ident, frag, 64, proto, 0)
    head += ipaddress.IPv4Address(src).packed + ipaddress.IPv4Address(dst).packed + options
    return head[:10] + (~sum16(head) & 0xFFFF).to_bytes(2, "big") + head[12:] + payload


def udp(data: bytes = b"", sport: int = 5000, dport: int = 53, size: int | None = None) -> bytes:
    return struct.pack(">4H", sport, dport, 8 + len(data) if size is None else size, 0) + data


def tcp(data: bytes = b"", sport: int = 80, dport: int = 40000, offset: int = 5) -> bytes:
    return struct.pack(">2H2IBB3H", sport, dport, 1, 2, offset << 4, 16, 1000, 0, 0) + data


def eth(
    packet: bytes, *, src: bytes = MAC, dst: bytes = ROUTER, kind: int = 0x0800, tag: int | None = None
) -> bytes:
    vlan = struct.pack(">2H", 0x8100, tag) if tag is not None else b""
    return dst + src + vlan + kind.to_bytes(2, "big") + packet


class World:
    """A forwarder with its ports by application number, in virtual time."""

    def __init__(self, ffi: cffi.FFI, lib: Any, frames: int = 1024) -> None:
        self.ffi, self.lib = ffi, lib
        self.world = lib.world_open(frames)
        self.f = lib.world_forwarder(self.world)
        self.ports: dict[int, Port] = {}
        self.now = 1_000_000_000
        self.room, self.queue = ffi.new("uint8_t[2048]"), ffi.new("uint16_t *")
        self.locals(f"{HOST}/24", f"{HOST2}/32")

    def locals(self, *addresses: str) -> None:
        nets = [ipaddress.IPv4Interface(a) for a in addresses]
        entries = [{"addr": {"b": mapped(str(n.ip))}, "prefix_len": n.network.prefixlen} for n in nets]
        self.lib.checker_locals(
            self.ffi.addressof(self.f, "check"), self.ffi.new("struct fwd_local[]", entries), len(entries)
        )

    def add(self, app: int, allow: int = 0, **config: int) -> Port:
        p = Port(self.ffi, self.lib, **({"frames": 128, "rx_ring": 64, "tx_ring": 64} | config))
        about = self.ffi.new("struct fwd_port_add *", {"app": app, "allow": allow, "cfg": p.config[0]})
        size = self.lib.port_mem_size(p.config)
        err = self.lib.forward_port_add(self.f, about, p.mem, size, p.fwd_end.fileno())
        assert err == 0, os.strerror(-err)
        p.peer = self.ffi.addressof(self.lib.forward_port_find(self.f, app), "peer")
        self.ports[app] = p
        return p

    def remove(self, app: int) -> None:
        assert self.lib.forward_port_del(self.f, app) == 0
        self.ports.pop(app).close()

    def lease(
        self,
        app: int,
        proto: int,
        local: str,
        port: int,
        peer: tuple[str, int] = ("", 0),
        *,
        block: bool = False,
        add: bool = True,
    ) -> int:
        """0 or -errno. local "": any address."""
        about = {
            "app": app,
            "proto": proto,
            "flags": int(block),
            "local": {"addr": {"b": mapped(local)}, "port": port},
            "remote": {"addr": {"b": mapped(peer[0])}, "port": peer[1]},
        }
        return int(self.lib.forward_lease(self.f, self.ffi.new("struct fwd_lease *", about), add))

    def rate(self, app: int, **limits: int) -> None:
        about = self.ffi.new("struct fwd_rate *", {"app": app} | limits)
        assert self.lib.forward_rate(self.f, about, self.now) == 0

    def round(self) -> int:
        return int(self.lib.forward_round(self.f, self.now))

    def sent(self) -> list[bytes]:
        """What the device sent meanwhile."""
        got = []
        while n := self.lib.world_sent(self.world, self.room, self.queue):
            got.append(bytes(self.room[0:n]))
        return got

    def pass_on(self, app: int, *frames: bytes) -> list[bytes]:
        """What leaves when the application sends these."""
        for frame in frames:
            self.ports[app].send(frame)
        self.round()
        self.ports[app].reap()
        return self.sent()

    def receive(self, frame: bytes, entry: int = -1, queue: int = 0) -> None:
        assert self.lib.world_receive(self.world, frame, len(frame), queue, entry) == 0

    def stats(self, app: int) -> Any:
        out = self.ffi.new("struct fwd_port_stats *")
        self.lib.forward_port_stats(self.lib.forward_port_find(self.f, app), out)
        return out

    def refusals(self, app: int) -> dict[str, int]:
        names = self.ffi.typeof("enum fwd_refusal").elements
        stats = self.stats(app)  # its array lives as long as it does
        return {names[i].removeprefix("FWD_REFUSED_").lower(): n for i, n in enumerate(stats.refused) if n}

    def sleep(self) -> int | None:
        """Until when it would sleep; None: it would not."""
        until = self.ffi.new("uint64_t *")
        return None if self.lib.forward_sleep(self.f, self.now, until) else int(until[0])

    def close(self) -> None:
        for app in list(self.ports):
            self.remove(app)
        assert self.f.check.leases.count == 0
        assert not any(self.f.check.leases.of_kind)
        self.lib.world_close(self.world)
