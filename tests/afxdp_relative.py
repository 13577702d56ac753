# SPDX-License-Identifier: Apache-2.0
"""A process that shares an AF_XDP device which another one opened, and how to speak to it (test_afxdp_attach.py).

Started anew, it is handed memory and sockets over a Unix socket, its standard input, gives all privileges up, and does
what it is told there: one JSON message each way, `[method of View, arguments]`.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from afxdp_support import answer, payload
from bypass._core import ffi, lib

from bypass.raw import RawPort

NOBODY = 65534
MAX_FDS = 8
PATIENCE_S = 10.0


class View:
    """What a process has that was handed a device: memory, from `offset` on in a file, and sockets.

    Attributes:
        dev: the cffi `struct afxdp *`; NULL: there is no view.
    """

    def __init__(self, memfd: int) -> None:
        self.memfd = memfd
        self.map = mmap.mmap(memfd, 0)
        self.dev: Any = ffi.NULL

    def attach(
        self, fds: list[int], offset: int, size: int | None = None, flags: int = 0
    ) -> tuple[int, int] | None:
        """None, or why it is refused."""
        error = ffi.new("struct afxdp_error *")
        at = ffi.from_buffer("uint8_t[]", self.map) + offset
        size = len(self.map) - offset if size is None else size
        self.dev = lib.afxdp_attach(at, size, fds, len(fds), flags, error)
        if self.dev == ffi.NULL:
            return int(error.err), int(error.step)
        self.become(self.dev)
        return None

    def take_queue(self, fds: list[int], of: int) -> int:
        """Serves one more; its index, or -errno."""
        with self.using():
            return int(lib.afxdp_take_queue(self.dev, fds[0], of, ffi.new("struct afxdp_error *")))

    def become(self, dev: Any) -> None:
        self.dev = dev
        self.nd = lib.afxdp_netdev(dev)
        self.port = RawPort(self.nd)

    @contextmanager
    def using(self) -> Iterator[RawPort]:
        """The device, under the lock that everybody who uses it has to hold."""
        fcntl.lockf(self.memfd, fcntl.LOCK_EX)
        try:
            lib.afxdp_sync(self.dev)
            yield self.port
        finally:
            fcntl.lockf(self.memfd, fcntl.LOCK_UN)

    @property
    def answered(self) -> int:
        """Datagrams that all views of this device have answered: the first bytes of the file, before the device."""
        return int.from_bytes(self.map[:4], "little")

    def echo(self, until: int, batch: int = 8) -> list[int]:
        """Answers datagrams, which carry numbers, until all views together have answered so many; the numbers."""
        seen: list[int] = []
        deadline = time.monotonic() + PATIENCE_S
        while self.answered < until:
            assert time.monotonic() < deadline, f"{self.answered} of {until} came"
            select.select([self.port], [], [], 0.01)
            with self.using() as port:
                for frame in port.recv(batch, timeout=0):
                    port.send([answer(frame.data)], queue=frame.queue)
                    seen.append(int(payload(frame)))
                    self.map[:4] = (self.answered + 1).to_bytes(4, "little")
        return seen

    def forked_echo(self, until: int) -> list[int]:
        """What a child answers by the view that it has inherited."""
        r, w = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.write(w, json.dumps(self.echo(until)).encode())
                status = 0
            finally:
                os._exit(status)
        os.close(w)
        with os.fdopen(r) as pipe:
            text = pipe.read()
        assert os.waitpid(pid, 0)[1] == 0
        return list(json.loads(text))

    def _churn(self) -> None:
        """Uses the device without end, in large bites, so that most of the time is spent within its operations."""
        ops, pkts = self.nd.ops, ffi.new("bypass_pkt[]", 256)
        frame = b"\xff" * 6 + bytes(self.nd.mac) + b"\x88\xb5" + bytes(46)  # IEEE 802: for local experiments
        while True:
            with self.using():
                n = ops.alloc(self.nd, pkts, random.randrange(256))
                for i in range(0, n, 2):
                    meta = ffi.cast(
                        "struct bypass_pkt_meta *", ffi.cast("char *", self.nd.meta) + pkts[i] * 64
                    )
                    meta.len, meta.queue = len(frame), random.randrange(2)
                    ffi.memmove(self.nd.mem + pkts[i] * self.nd.stride + meta.off, frame, len(frame))
                    ops.tx_burst(self.nd, pkts + i, 1)
                ops.free(self.nd, pkts, n)
                ops.kick(self.nd)
                n = ops.rx_burst(self.nd, pkts, random.randrange(64))
                ops.tx_burst(self.nd, pkts, n)
                ops.free(self.nd, pkts, n)
                n = ops.reap(self.nd, pkts, 256)
                ops.free(self.nd, pkts, n)

    def killed(self, after_s: float) -> int:
        """A child uses the device and is killed. What reclaiming it says."""
        pid = os.fork()
        if pid == 0:
            try:
                self._churn()
            finally:
                os._exit(1)
        time.sleep(after_s)
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        with self.using():
            return int(lib.afxdp_reclaim(self.dev))

    def receive(self) -> list[tuple[int, int]]:
        """What is there: number and queue index of each datagram."""
        with self.using() as port:
            return [(int(payload(f)), f.queue) for f in port.recv(64, timeout=0)]

    def take(self, count: int) -> list[int]:
        """Frames out of the pool."""
        out = ffi.new("bypass_pkt[]", count)
        with self.using():
            return list(out[0 : self.nd.ops.alloc(self.nd, out, count)])

    def hold(self) -> list[tuple[int, int, int]]:
        """A frame that has arrived, not given back, its queue's index, and the number in it; or none."""
        out = ffi.new("bypass_pkt[]", 1)
        with self.using():
            if self.nd.ops.rx_burst(self.nd, out, 1) == 0:
                return []
            meta = ffi.cast(
                "struct bypass_pkt_meta *", ffi.cast("char *", self.nd.meta) + out[0] * self.nd.meta_stride
            )
            data = bytes(ffi.buffer(self.nd.mem + out[0] * self.nd.stride + meta.off, meta.len))
            return [(int(out[0]), int(meta.queue), int(payload(data)))]

    def give(self, frames: list[int]) -> None:
        with self.using():
            self.nd.ops.free(self.nd, frames, len(frames))

    def about(self) -> dict[str, Any]:
        """What the view knows, asked for anew."""
        with self.using():
            health = int(lib.afxdp_health(self.dev))
            return {
                "health": health,
                "mac": bytes(self.nd.mac).hex(":"),
                "mtu": int(self.nd.mtu),
                "caps": int(self.nd.caps),
                "queues": int(self.nd.queues),
                "queues_now": int(lib.afxdp_queues_now(self.dev)),
                "zerocopy": int(lib.afxdp_zerocopy(self.dev)),
            }

    def close(self, wait_ms: int = 1000) -> int:
        """As the last: frames that the kernel had not completed."""
        dev, self.dev = self.dev, ffi.NULL
        return int(lib.afxdp_close(dev, wait_ms))

    def detach(self) -> None:
        dev, self.dev = self.dev, ffi.NULL
        lib.afxdp_detach(dev)


class Relative:
    """Such a process, from outside. A context manager.

    Args:
        memfd: the memory file; the process gets a descriptor of its own.
    """

    def __init__(self, memfd: int) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(2 * PATIENCE_S)
        with theirs:
            self._process = subprocess.Popen([sys.executable, __file__], stdin=theirs)
        socket.send_fds(self._socket, [b"memory"], [memfd])

    def begin(self, method: str, *args: Any, fds: list[int] | None = None) -> None:
        socket.send_fds(self._socket, [json.dumps([method, args]).encode()], fds or [])

    def end(self) -> Any:
        answer = self._socket.recv(1 << 16)
        assert answer, "the process has died: see its standard error"
        return json.loads(answer)

    def call(self, method: str, *args: Any, fds: list[int] | None = None) -> Any:
        self.begin(method, *args, fds=fds)
        return self.end()

    def __enter__(self) -> Relative:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self._process.wait(PATIENCE_S)


def privileges() -> dict[str, str]:
    """Of this process: user and capabilities, as the kernel writes them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        k: v.strip() for k, v in (line.split(":", 1) for line in lines) if k in ("Uid", "CapEff", "CapPrm")
    }


def main() -> None:
    told = socket.socket(fileno=0)
    _, memory, _, _ = socket.recv_fds(told, 16, 1)
    view = View(memory[0])
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    while True:
        message, fds, _, _ = socket.recv_fds(told, 1 << 16, MAX_FDS)
        if not message:
            return
        method, args = json.loads(message)
        if method == "privileges":
            result: Any = privileges()
        else:
            result = getattr(view, method)(*([fds] if fds else []), *args)
        told.send(json.dumps(result).encode())


if __name__ == "__main__":
    main()
