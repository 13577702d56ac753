# SPDX-License-Identifier: Apache-2.0
"""An application that means harm, in a process of its own: what tests/test_attacks.py has it try.

It says hello to the broker like any other, and then does by hand what the library would never do: leases with
descriptors of its choice, and frames that it writes into its port itself.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
import time
from pathlib import Path
from typing import Any

import broker_support
from broker_support import STREAM, BrokerError, Child, Client, Played
from bypass._core import ffi, lib

from bypass.broker.protocol import ABI, Kind, Message
from bypass.core import Address

PIDFD_GETFD = 438  # asm-generic/unistd.h
LIBC = ctypes.CDLL(None, use_errno=True)


class Attacking(Child):
    """A Child that can do what Attacker can."""

    script = str(Path(__file__))


class Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


class Attacker(Played):
    """What it can try. What the kernel or the broker refuses is told as {"error": errno, "text": ...}."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    # ---- the broker
    def take(self, local: Address, remote: Address = ("::", 0), how: str = "unbound", flags: int = 0) -> Any:
        """A lease, with a descriptor that is "unbound"; "bound" there, "reuse" with SO_REUSEADDR and SO_REUSEPORT;
        "mine": bound to a port of its own; "kept": bound earlier by prepare()."""
        local, remote = (local[0], local[1]), (remote[0], remote[1])
        sock = self.sockets[0] if how == "kept" else socket.socket()
        try:
            if how in ("bound", "reuse"):
                self._bind(sock, local, how == "reuse")
            elif how == "mine":
                sock.bind((local[0], 0))
            asked = Message(Kind.LEASE, kind=STREAM, local=local, remote=remote, flags=flags)
            answer = self.client.good(asked, (sock.fileno(),))
            return {"lease": answer.lease, "local": answer.local, "flags": answer.flags}
        except OSError as e:
            return {"error": e.errno, "text": f"the kernel: {e.strerror}"}
        finally:
            if how != "kept":
                sock.close()

    @staticmethod
    def _bind(sock: socket.socket, local: Address, reuse: bool) -> None:
        if reuse:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(local)

    def prepare(self, local: Address) -> Any:
        """Binds a socket there and does not listen: SO_REUSEADDR lets another listen there afterwards."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((local[0], local[1]))
        self.sockets.insert(0, sock)
        return {}

    def release(self, lease: int) -> Any:
        return {"lease": self.client.good(Message(Kind.RELEASE, lease=lease)).lease}

    def forged(self, app: int, local: Address) -> Any:
        """A lease that says to be another application's."""
        with socket.socket() as sock:
            message = Message(Kind.LEASE, kind=STREAM, app=app, local=(local[0], local[1]))
            return {"lease": self.client.good(message, (sock.fileno(),)).lease}

    def join(self, app: int, token: str) -> Any:
        """Says on another connection that it is a relative."""
        with Client(self.name) as client:
            answer, fds = client.ask(Message(Kind.HELLO, abi=ABI, app=app, token=bytes.fromhex(token)))
            for fd in fds:
                os.close(fd)
        if answer.error:
            raise BrokerError(answer)
        return {"app": answer.app, "fds": len(fds)}

    # ---- frames
    def open(self) -> Any:
        """Its port, for the functions that follow."""
        self.map = mmap.mmap(self.client.fds[0], 0)
        header = self.client.header()
        at = ffi.from_buffer("uint8_t[]", self.map) + header.dev_off
        self.port = ffi.new("struct port *")
        assert lib.port_attach(self.port, at, header.dev_size, *self.client.fds[1:]) == 0
        self.nd = lib.port_netdev(self.port)
        return {"mac": bytes(self.nd.mac).hex()}

    def _post(self, frames: list[bytes]) -> int:
        """How many there is room for now."""
        pkts = ffi.new("bypass_pkt[]", 64)
        lib_ops = self.nd.ops
        lib_ops.reap(self.nd, pkts, 64)
        got = lib_ops.rx_burst(self.nd, pkts, 64)
        lib_ops.free(self.nd, pkts, got)
        got = lib_ops.alloc(self.nd, pkts, min(64, len(frames)))
        for i in range(got):
            meta = self.nd.meta[pkts[i]]
            meta.len, meta.queue, meta.flags = len(frames[i]), 0, 0
            ffi.memmove(self.nd.mem + pkts[i] * self.nd.stride + meta.off, frames[i], len(frames[i]))
        took = lib_ops.tx_burst(self.nd, pkts, got)
        lib_ops.free(self.nd, pkts, got)
        lib_ops.kick(self.nd)
        return max(took, 0)

    def frames(self, data: list[str]) -> Any:
        """Sends each once."""
        left = [bytes.fromhex(text) for text in data]
        while left:
            left = left[self._post(left) :]
            time.sleep(0.001)
        return {"sent": len(data)}

    def flood(self, frame: str, seconds: float) -> Any:
        """As fast as the port takes it; how often it was full."""
        end, full, posted = time.monotonic() + seconds, 0, 0
        copies = [bytes.fromhex(frame)] * 64
        while time.monotonic() < end:
            took = self._post(copies)
            posted += took
            full += took == 0
            if took == 0:
                time.sleep(0.0005)
        return {"posted": posted, "full": full}

    # ---- memory
    def memory(self, pid: int, address: int) -> Any:
        """What of a process it can get at: {way: errno, 0 for success}."""
        ways = {
            "own descriptors": lambda: self._own(pid),
            "/proc/PID/fd": lambda: self._memfds(pid),
            "/proc/PID/map_files": lambda: os.listdir(f"/proc/{pid}/map_files"),
            "/proc/PID/mem": lambda: os.close(os.open(f"/proc/{pid}/mem", os.O_RDWR)),
            "/proc/PID/environ": lambda: Path(f"/proc/{pid}/environ").read_bytes(),
            "process_vm_readv": lambda: self._vm_read(pid, address),
            "pidfd_getfd": lambda: self._getfd(pid),
            "ptrace": lambda: self._ptrace(pid),
        }
        return {way: self._tried(call) for way, call in ways.items()}

    @staticmethod
    def _tried(call: Any) -> int:
        try:
            call()
        except OSError as e:
            return e.errno or -1
        return 0

    def _own(self, pid: int) -> None:
        """ENOENT: none of its descriptors is a memory file of another application."""
        mine = os.fstat(self.client.fds[0]).st_ino
        for name in os.listdir("/proc/self/fd"):
            try:
                st, target = os.stat(f"/proc/self/fd/{name}"), os.readlink(f"/proc/self/fd/{name}")
            except FileNotFoundError:
                continue  # the descriptor of the listing itself
            if target.startswith("/memfd:bypass-app") and st.st_ino != mine:
                return
        raise OSError(errno.ENOENT, "none")

    @staticmethod
    def _memfds(pid: int) -> None:
        """Opens the memory file for writing. ENOENT: it is not among them."""
        for name in os.listdir(f"/proc/{pid}/fd"):
            if os.readlink(f"/proc/{pid}/fd/{name}").startswith("/memfd:bypass-app"):
                os.close(os.open(f"/proc/{pid}/fd/{name}", os.O_RDWR))
                return
        raise OSError(errno.ENOENT, "none")

    @staticmethod
    def _checked(result: int) -> int:
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result

    def _vm_read(self, pid: int, address: int) -> None:
        room = ctypes.create_string_buffer(8)
        ours, theirs = Iovec(ctypes.addressof(room), 8), Iovec(address, 8)
        vectors = (ctypes.byref(ours), 1, ctypes.byref(theirs), 1)
        self._checked(LIBC.process_vm_readv(pid, *vectors, 0))

    def _getfd(self, pid: int) -> None:
        pidfd = os.pidfd_open(pid)
        try:
            os.close(self._checked(LIBC.syscall(PIDFD_GETFD, pidfd, 1, 0)))
        finally:
            os.close(pidfd)

    def _ptrace(self, pid: int) -> None:
        self._checked(LIBC.ptrace(16, pid, 0, 0))  # PTRACE_ATTACH
        os.waitpid(pid, 0x40000000)  # __WALL
        LIBC.ptrace(17, pid, 0, 0)  # PTRACE_DETACH


if __name__ == "__main__":
    broker_support.main(Attacker)
