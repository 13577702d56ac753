# SPDX-License-Identifier: Apache-2.0
"""Shared mode in C, compiled for Python: an application's port, and bypass-fwd's half of it in the same process."""

from __future__ import annotations

import os
import socket
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import cffi

ROOT = Path(__file__).resolve().parent.parent
INCLUDES = [f"-I{ROOT / d}" for d in ("bypass/include", "bypass", "tests/c")]
CC = ["gcc", "-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-DBYPASS_DEBUG", *INCLUDES]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SOURCES = ("bypass/fwd/port.c", "bypass/fwd/peer.c", "tests/c/fwd_words.c")
PAGE = 4096
STACK, DEV, RX = 1, 2, 4


@lru_cache
def build(folder: Path) -> tuple[cffi.FFI, Any]:
    """(ffi, lib) of SOURCES, with the debug checks."""
    so = folder / "fwd.so"
    sanitize = SANITIZE if "san" in os.environ.get("BYPASS_BUILD", "") else []
    sources = [str(ROOT / s) for s in SOURCES]
    subprocess.run([*CC, "-shared", "-fPIC", *sanitize, *sources, "-o", str(so)], check=True)
    headers = "".join(f'#include "{s[:-1]}h"\n' for s in SOURCES if s.startswith("tests/"))
    text = subprocess.run(
        ["gcc", "-E", "-P", "-DBYPASS_CDEF", *INCLUDES, "-x", "c", "-"],
        input=headers.replace("tests/c/", ""),
        check=True,
        text=True,
        stdout=subprocess.PIPE,
    ).stdout
    ffi = cffi.FFI()
    ffi.cdef(text)
    return ffi, ffi.dlopen(str(so))


class Port:
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
        self.room = ffi.new("uint8_t[]", 2048)

    def close(self) -> None:
        self.app_end.close()
        self.fwd_end.close()
        os.close(self.eventfd)

    # ---- The application's half
    def _list(self, op: Any, n: int) -> list[int]:
        out = self.ffi.new("bypass_pkt[]", max(n, 1))
        got = op(self.nd, out, n)
        if got < 0:
            raise OSError(-got, os.strerror(-got))
        return list(out[0:got])

    def alloc(self, n: int) -> list[int]:
        return self._list(self.nd.ops.alloc, n)

    def rx_burst(self, n: int = 64) -> list[int]:
        return self._list(self.nd.ops.rx_burst, n)

    def reap(self, n: int = 64) -> list[int]:
        return self._list(self.nd.ops.reap, n)

    def free(self, pkts: list[int]) -> None:
        self.nd.ops.free(self.nd, self.ffi.new("bypass_pkt[]", pkts or [0]), len(pkts))

    def tx_burst(self, pkts: list[int]) -> int:
        """Number taken, or -errno."""
        return int(self.nd.ops.tx_burst(self.nd, self.ffi.new("bypass_pkt[]", pkts or [0]), len(pkts)))

    def kick(self) -> int:
        return int(self.nd.ops.kick(self.nd))

    def meta(self, pkt: int) -> Any:
        return self.nd.meta[pkt]

    def data(self, pkt: int) -> bytes:
        m = self.meta(pkt)
        return bytes(self.ffi.buffer(self.nd.mem + pkt * self.nd.stride + m.off, m.len))

    def write(self, pkt: int, data: bytes, queue: int = 0) -> None:
        m = self.meta(pkt)
        m.len, m.queue = len(data), queue
        self.ffi.memmove(self.nd.mem + pkt * self.nd.stride + m.off, data, len(data))

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
        """struct port_audit; asserts that all its sums agree."""
        out = self.ffi.new("struct port_audit *")
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
            if self.lib.peer_tx_take(self.peer, self.room, self.one):
                got.append((bytes(self.room[0 : self.one.len]), self.one.queue))
        self.lib.peer_tx_publish(self.peer)
        return got
