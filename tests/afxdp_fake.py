# SPDX-License-Identifier: Apache-2.0
"""The AF_XDP device compiled together with a C file of the tests, and the one over a fake kernel
(tests/c/afxdp_fake.c, with the debug checks) for Python."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import cffi

ROOT = Path(__file__).resolve().parent.parent
INCLUDES = ["-I", str(ROOT / "bypass/include"), "-I", str(ROOT / "bypass")]
CC = ["gcc", "-std=c11", "-g", "-Wall", "-Wextra", "-Werror", *INCLUDES]
DEBUG = ["-DBYPASS_DEBUG", "-DAFXDP_VIOLATION=afxdp_fake_violation"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def build(folder: Path, name: str, *flags: str) -> tuple[cffi.FFI, Any]:
    """Compiles the device and tests/c/NAME.c into `folder`. (ffi, lib) of both."""
    header = ROOT / f"tests/c/{name}.h"
    sources = [*sorted(map(str, (ROOT / "bypass/afxdp").glob("*.c"))), str(header.with_suffix(".c"))]
    so = folder / f"{name}.so"
    sanitize = SANITIZE if "san" in os.environ.get("BYPASS_BUILD", "") else []
    subprocess.run([*CC, "-O1", "-shared", "-fPIC", *flags, *sanitize, *sources, "-o", str(so)], check=True)
    text = subprocess.run(
        ["gcc", "-E", "-P", "-DBYPASS_CDEF", *INCLUDES, str(header)],
        check=True,
        text=True,
        stdout=subprocess.PIPE,
    ).stdout
    ffi = cffi.FFI()
    ffi.cdef(text)
    return ffi, ffi.dlopen(str(so))


class FakeDevice:
    """The device's operations with Python lists, and the fake kernel's."""

    def __init__(self, ffi: cffi.FFI, lib: Any, first: int = 0, **config: Any) -> None:
        self.ffi, self.lib = ffi, lib
        values = {"queue_count": 1, "queues": list(range(config.get("queue_count", 1))), "frame_size": 2048}
        self.config = ffi.new("struct afxdp_config *", values | config)
        self.dev = lib.fake_open(self.config, first)
        assert self.dev != ffi.NULL, "the configuration makes no sense"
        self.nd = lib.afxdp_netdev(self.dev)
        self.frames = self.nd.frames

    def close(self) -> None:
        self.lib.fake_close(self.dev)

    def _list(self, op: Any, n: int) -> list[int]:
        out = self.ffi.new("bypass_pkt[]", max(n, 1))
        got = op(self.nd, out, n)
        if got < 0:
            raise OSError(-got, os.strerror(-got))
        return list(out[0:got])

    def alloc(self, n: int) -> list[int]:
        return self._list(self.nd.ops.alloc, n)

    def rx_burst(self, n: int) -> list[int]:
        return self._list(self.nd.ops.rx_burst, n)

    def reap(self, n: int) -> list[int]:
        return self._list(self.nd.ops.reap, n)

    def free(self, pkts: list[int]) -> None:
        self.nd.ops.free(self.nd, self.ffi.new("bypass_pkt[]", pkts or [0]), len(pkts))

    def tx_burst(self, pkts: list[int]) -> int:
        """Number taken, or -errno."""
        return int(self.nd.ops.tx_burst(self.nd, self.ffi.new("bypass_pkt[]", pkts or [0]), len(pkts)))

    def kick(self) -> int:
        return int(self.nd.ops.kick(self.nd))

    def meta(self, pkt: int) -> Any:
        at = self.ffi.cast("char *", self.nd.meta) + pkt * self.nd.meta_stride
        return self.ffi.cast("struct bypass_pkt_meta *", at)

    def data(self, pkt: int) -> bytes:
        m = self.meta(pkt)
        return bytes(self.ffi.buffer(self.nd.mem + pkt * self.nd.stride + m.off, m.len))

    def write(self, pkt: int, data: bytes, queue: int = 0) -> None:
        m = self.meta(pkt)
        m.len, m.queue = len(data), queue
        self.ffi.memmove(self.nd.mem + pkt * self.nd.stride + m.off, data, len(data))

    def kernel_tx(self, queue: int, n: int) -> list[int]:
        """First bytes of what the kernel took off the tx ring, in order."""
        seen = self.ffi.new("uint8_t[]", 4096)
        return list(seen[0 : self.lib.fake_tx(self.dev, queue, n, seen)])

    def counters(self, queue: int = 0) -> Any:
        out = self.ffi.new("struct afxdp_counters *")
        assert self.lib.afxdp_counters(self.dev, queue, out) == 0
        return out

    def audit(self) -> Any:
        """struct afxdp_audit; asserts that all its sums agree."""
        out = self.ffi.new("struct afxdp_audit *")
        assert self.lib.afxdp_audit(self.dev, out) == 0
        return out

    def census(self) -> bytes:
        """For every frame, in how many of rings, kernel and free list it is."""
        places = self.ffi.new("uint8_t[]", self.frames)
        self.lib.fake_census(self.dev, places)
        return bytes(self.ffi.buffer(places))
