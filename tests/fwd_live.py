# SPDX-License-Identifier: Apache-2.0
"""bypass-fwd as a process, and applications with ports in processes of their own (tests/c/fwd_app.c)."""

from __future__ import annotations

import fcntl
import mmap
import os
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

from bypass._core import ffi, lib
from c_programs import CFLAGS, ENV, INCLUDE, VARIANTS, make, run, stack_objects

from bypass import netns
from bypass.fwd import Doorbells, Forwarder
from bypass.lab import CLIENT_IP, SERVER_IP

SEAL_SHRINK, ADD_SEALS = 2, 1033


class AppMemory:
    """A port in a memory file, as the broker makes it."""

    def __init__(self, offset: int = 4096, *, sealed: bool = True, missing: int = 0, **config: Any) -> None:
        values = {"frames": 64, "rx_ring": 16, "tx_ring": 16, "mtu": 1500, "queues": 1}
        self.config = ffi.new("struct port_config *", values | config)
        self.offset = offset
        self.size = lib.port_mem_size(self.config)
        self.fd = os.memfd_create("app", os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, offset + self.size - missing)
        if sealed:
            fcntl.fcntl(self.fd, ADD_SEALS, SEAL_SHRINK)
        self.map = mmap.mmap(self.fd, offset + self.size - missing)
        self.mem = ffi.cast("void *", int(ffi.cast("uintptr_t", ffi.from_buffer(self.map))) + offset)
        if not missing:
            assert lib.port_init(self.mem, self.size, self.config) == 0
        self.bells = Doorbells.make()
        self.port = ffi.new("struct port *")
        if not missing:
            assert lib.port_attach(self.port, self.mem, self.size, self.bells.to_fwd, self.bells.app) == 0

    def add_to(self, f: Forwarder, app: int, **more: Any) -> None:
        f.port_add(app, self.fd, self.offset, self.config, self.bells, **more)

    def close(self) -> None:
        os.close(self.fd)
        self.bells.close()


@lru_cache
def application(folder: Path) -> Path:
    """tests/c/fwd_app.c, with the whole stack."""
    out = folder / "fwd_app"
    objects = stack_objects("release")
    more = ["build/release/bypass/fwd/port.o", "build/release/bypass/host.o"]
    make(*more)
    source = ["-Ibypass", "tests/c/fwd_app.c"]
    run("gcc", *CFLAGS, *VARIANTS["release"], *INCLUDE, *source, *objects, *more, "-o", out)
    return out


class App:
    """An application of that kind that runs; ends in `end()`."""

    def __init__(
        self, program: Path, mode: str, ns: str, memory: AppMemory, port: int, peer_mac: str
    ) -> None:
        numbers = (memory.fd, memory.offset, memory.size, memory.bells.to_fwd, memory.bells.app)
        args = [str(program), mode, *map(str, numbers), SERVER_IP, str(port), CLIENT_IP, peer_mac]
        fds = (memory.fd, memory.bells.to_fwd, memory.bells.app)
        self.process = netns.run(
            ns,
            lambda: subprocess.Popen(
                args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=fds, env=ENV
            ),
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def end(self) -> str:
        """What it says at the end of its input."""
        out, _ = self.process.communicate(timeout=30)
        assert self.process.returncode == 0
        return out

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()
