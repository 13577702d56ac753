# SPDX-License-Identifier: Apache-2.0
"""C files compiled for Python by cffi, with the sanitizers where the run has them, and what every device has."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cffi

ROOT = Path(__file__).resolve().parent.parent
INCLUDES = [f"-I{ROOT / d}" for d in ("bypass/include", "bypass", "tests/c")]
GCC = ["gcc", "-std=c11", "-g", "-Wall", "-Wextra", "-Werror"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

Library = tuple[cffi.FFI, Any]


def compiled(so: Path, sources: Iterable[Path], headers: Sequence[str], flags: Sequence[str] = ()) -> Library:
    """(ffi, lib) of these sources; `headers` say in C what Python sees of them."""
    sanitize = SANITIZE if "san" in os.environ.get("BYPASS_BUILD", "") else []
    command = [
        *GCC,
        *INCLUDES,
        "-O1",
        "-shared",
        "-fPIC",
        *flags,
        *sanitize,
        *map(str, sources),
        "-o",
        str(so),
    ]
    subprocess.run(command, check=True)
    declared = subprocess.run(
        ["gcc", "-E", "-P", "-DBYPASS_CDEF", *INCLUDES, "-x", "c", "-"],
        input="".join(f'#include "{header}"\n' for header in headers),
        check=True,
        text=True,
        stdout=subprocess.PIPE,
    )
    ffi = cffi.FFI()
    ffi.cdef(declared.stdout)
    return ffi, ffi.dlopen(str(so))


class Netdev:
    """The operations of `nd`, a struct bypass_netdev, with Python lists."""

    ffi: cffi.FFI
    nd: Any

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
        at = self.ffi.cast("char *", self.nd.meta) + pkt * self.nd.meta_stride
        return self.ffi.cast("struct bypass_pkt_meta *", at)

    def data(self, pkt: int) -> bytes:
        m = self.meta(pkt)
        return bytes(self.ffi.buffer(self.nd.mem + pkt * self.nd.stride + m.off, m.len))

    def write(self, pkt: int, data: bytes, queue: int = 0) -> None:
        m = self.meta(pkt)
        m.len, m.queue = len(data), queue
        self.ffi.memmove(self.nd.mem + pkt * self.nd.stride + m.off, data, len(data))
