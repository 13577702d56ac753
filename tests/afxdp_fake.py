# SPDX-License-Identifier: Apache-2.0
"""The AF_XDP device compiled together with a C file of the tests, and the one over a fake kernel
(tests/c/afxdp_fake.c, with the debug checks) for Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cffi
from c_library import ROOT, Library, Netdev, compiled

DEBUG = ["-DBYPASS_DEBUG", "-DAFXDP_VIOLATION=afxdp_fake_violation"]


def build(folder: Path, name: str, *flags: str) -> Library:
    """Compiles the device and tests/c/NAME.c into `folder`. (ffi, lib) of both."""
    sources = [*sorted((ROOT / "bypass/afxdp").glob("*.c")), ROOT / f"tests/c/{name}.c"]
    return compiled(folder / f"{name}.so", sources, [f"{name}.h"], flags)


class FakeDevice(Netdev):
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

    def kernel_tx(self, queue: int, n: int) -> list[int]:
        """First bytes of what the kernel took off the tx ring, in order."""
        seen = self.ffi.new("uint8_t[]", 4096)
        return list(seen[0 : self.lib.fake_tx(self.dev, queue, n, seen)])

    def counters(self, queue: int = 0) -> Any:
        out = self.ffi.new("struct afxdp_counters *")
        assert self.lib.afxdp_counters(self.dev, queue, out) == 0
        return out

    def audit(self) -> Any:
        """struct frame_audit; asserts that all its sums agree."""
        out = self.ffi.new("struct frame_audit *")
        assert self.lib.afxdp_audit(self.dev, out) == 0
        return out

    def census(self) -> bytes:
        """For every frame, in how many of rings, kernel and free list it is."""
        places = self.ffi.new("uint8_t[]", self.frames)
        self.lib.fake_census(self.dev, places)
        return bytes(self.ffi.buffer(places))
