# SPDX-License-Identifier: Apache-2.0
"""An application's memory file: header, group, device, arena, as bypass/app/app.h lays them out.

Its size is sealed: nobody can shrink it under somebody else's mapping. All of it is the application's to write; the
broker fills in the header once, before anybody else has the file, and writes single fields of it later. It never reads
it again.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import platform
from typing import Any, Self

from bypass._core import ffi, lib
from bypass.errors import BypassError

F_ADD_SEALS = 1033  # linux/fcntl.h
SEALS = 0x0001 | 0x0002 | 0x0004  # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW
HEADER: int = lib.APP_HEADER_SIZE


MBIND = {"x86_64": 237, "aarch64": 235}  # asm/unistd.h
MPOL_PREFERRED = 1  # linux/mempolicy.h
MAX_NODES = 1024


class QuotaError(BypassError, OSError):
    """More than the policy lets an application have (EDQUOT)."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EDQUOT, message)

    def __str__(self) -> str:
        return str(self.strerror)


def bind_to_node(address: int, size: int, node: int) -> None:
    """Pages of a shared mapping come from this node, whoever touches them first (mbind(2)). OSError."""
    mask = (ctypes.c_ulong * (MAX_NODES // 64))()
    mask[node // 64] = 1 << node % 64
    number = ctypes.c_long(MBIND[platform.machine()])
    call = ctypes.CDLL(None, use_errno=True).syscall
    arguments = (
        ctypes.c_void_p(address),
        ctypes.c_ulong(size),
        MPOL_PREFERRED,
        mask,
        ctypes.c_ulong(MAX_NODES),
        0,
    )
    if call(number, *arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"NUMA node {node}: {os.strerror(code)}")


class AppMemory:
    """The file, and a mapping of its header. Implements bypass.afxdp.Memory: the device's part.

    Args:
        name: of the file, as /proc shows it.
        device: APP_DEV_*.
        config: cffi `struct bypass_config *`.
        limit: bytes that the file may have; None: any.
        numa: the NUMA node that it lies on; None: where it is first used.

    Attributes:
        fd: the memory file; -1 before the device's size is known, and after close().
        header: cffi `struct app_header *`. Fill it in before publish().
        size: bytes of the file.
    """

    def __init__(
        self, name: str, device: int, config: Any, limit: int | None = None, numa: int | None = None
    ) -> None:
        self.name = name
        self.limit = limit
        self.numa = numa
        self.fd = -1
        self.size = 0
        self.header = ffi.new("struct app_header *")
        self.header.device = device
        self.header.config = config[0]
        self._page: mmap.mmap | None = None
        self._whole: mmap.mmap | None = None
        self._view: Any = None

    @classmethod
    def of(cls, name: str, fd: int) -> Self:
        """One that another broker has made; the descriptor is the memory's from here on. Its header is not read."""
        memory = cls.__new__(cls)
        memory.name, memory.limit, memory.numa, memory.fd = name, None, None, fd
        memory.size = os.fstat(fd).st_size
        memory.header = ffi.new("struct app_header *")
        memory._page = mmap.mmap(fd, HEADER)
        memory._whole = memory._view = None
        return memory

    def layout(self, dev_size: int) -> int:
        """Bytes of the file with a device of this size.

        Raises:
            ValueError: the configuration makes no sense.
            QuotaError: it is more than it may be.
        """
        size = int(lib.app_layout(self.header, dev_size))
        if not size:
            raise ValueError("the sizes of the stack make no sense")
        if self.limit is not None and size > self.limit:
            raise QuotaError(
                f"the application needs {size >> 10} KiB of memory and may have {self.limit >> 10} KiB"
            )
        return size

    # ---- bypass.afxdp.Memory
    def map(self, size: int) -> Any:
        whole = self.layout(size)
        self.close()  # of a try that failed: the next one wants zeroes
        self.fd = os.memfd_create(self.name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, whole)
            fcntl.fcntl(self.fd, F_ADD_SEALS, SEALS)
            self.size = whole
            self._page = mmap.mmap(self.fd, HEADER)
            self._whole = mmap.mmap(self.fd, whole)
            self._view = ffi.from_buffer(self._whole)
            if self.numa is not None:
                bind_to_node(int(ffi.cast("uintptr_t", self._view)), whole, self.numa)
        except BaseException:
            self.close()
            raise
        return ffi.cast("uint8_t *", self._view) + int(self.header.dev_off)

    def unmap(self) -> None:
        """Drops the mapping; the file stays."""
        if self._view is not None:
            ffi.release(self._view)
            self._view = None
        if self._whole is not None:
            self._whole.close()
            self._whole = None

    # ---- header
    def publish(self) -> None:
        """Writes the header to the file."""
        self._write(0, bytes(ffi.buffer(self.header)))

    def set(self, name: str, value: Any) -> None:
        """Changes one field of a published header."""
        setattr(self.header, name, value)
        field = dict(ffi.typeof("struct app_header").fields)[name]
        at = field.offset
        self._write(at, bytes(ffi.buffer(self.header))[at : at + ffi.sizeof(field.type)])

    def _write(self, at: int, data: bytes) -> None:
        assert self._page is not None
        self._page[at : at + len(data)] = data

    def close(self) -> None:
        self.unmap()
        if self._page is not None:
            self._page.close()
            self._page = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
