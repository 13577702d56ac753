# SPDX-License-Identifier: Apache-2.0
"""The other end of a memif, without DPDK: it says what it likes, as far as it likes, and goes when it likes.

Read first: drivers/net/memif/memif.h of DPDK (messages, rings), and its guide "Memif Poll Mode Driver".
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
from types import TracebackType
from typing import Self

ACK, HELLO, INIT, ADD_REGION, ADD_RING, CONNECT, CONNECTED, DISCONNECT = range(1, 9)
MESSAGE = 128
VERSION = 2 << 8
COOKIE = 0x3E31F20
LOG2_RING = 8
RING = 1 << LOG2_RING
BUFFER = 2048
HEADER, DESCRIPTOR = (
    128,
    16,
)  # of a ring: cookie, flags, head; tail; descriptors, each on a cache line of its own
HEAD_AT, TAIL_AT = 6, 64
RING_SIZE = HEADER + RING * DESCRIPTOR
C2S, S2C = 0, RING_SIZE  # where the two rings are
BUFFERS = 2 * RING_SIZE
REGION = BUFFERS + 2 * RING * BUFFER


class Gone(Exception):
    """The other side has ended the connection."""


class Ring:
    """A ring of one direction in mapped memory."""

    def __init__(self, memory: mmap.mmap, at: int) -> None:
        self._memory, self._at = memory, at

    def _get(self, at: int) -> int:
        return int(struct.unpack_from("<H", self._memory, self._at + at)[0])

    def _set(self, at: int, value: int) -> None:
        struct.pack_into("<H", self._memory, self._at + at, value & 0xFFFF)

    head = property(lambda self: self._get(HEAD_AT), lambda self, value: self._set(HEAD_AT, value))
    tail = property(lambda self: self._get(TAIL_AT), lambda self, value: self._set(TAIL_AT, value))

    def fill(self, first: int, frames: list[bytes]) -> None:
        """All descriptors, with buffers from the first one on, and the frames again and again."""
        for i in range(RING):
            frame, buffer = frames[i % len(frames)], BUFFERS + (first + i) * BUFFER
            struct.pack_into(
                "<HHIII", self._memory, self._at + HEADER + i * DESCRIPTOR, 0, 0, len(frame), buffer, 0
            )
            self._memory[buffer : buffer + len(frame)] = frame

    def start(self) -> None:
        struct.pack_into("<IHH", self._memory, self._at, COOKIE, 1, 0)  # nobody wants interrupts


class Peer:
    """A connection. Steps of the handshake are methods, to be called in turn; close() at any time."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.memory: mmap.mmap | None = None
        self._fds: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        if self.memory is not None:
            self.memory.close()
            self.memory = None

    def say(self, kind: int, body: bytes = b"", fd: int | None = None) -> None:
        message = struct.pack("<H", kind) + body
        try:
            socket.send_fds(self.sock, [message.ljust(MESSAGE, b"\0")], [] if fd is None else [fd])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Gone from error

    def hear(self, *kinds: int) -> bytes:
        """The body of the next message, which has to be one of these."""
        try:
            data, fds, _, _ = socket.recv_fds(self.sock, MESSAGE, 4)
        except ConnectionResetError as error:
            raise Gone from error
        self._fds += fds
        if not data or struct.unpack_from("<H", data)[0] == DISCONNECT:
            raise Gone
        assert struct.unpack_from("<H", data)[0] in kinds
        return data[2:]

    def map(self, fd: int, size: int = REGION) -> mmap.mmap:
        self.memory = mmap.mmap(fd, size)
        return self.memory


class Client(Peer):
    """Connects to a server under test."""

    def __init__(self, path: str, number: int = 0) -> None:
        super().__init__(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        self.number = number
        try:
            self.sock.connect(path)  # waits while the server's queue of one is full
            self.sock.settimeout(20)
        except OSError:
            self.close()
            raise

    def hello(self) -> None:
        self.hear(HELLO)

    def init(self) -> None:
        self.say(INIT, struct.pack("<HIB24s32s", VERSION, self.number, 0, b"", b"peer"))
        self.hear(ACK)

    def region(self) -> None:
        fd = os.memfd_create("memif", os.MFD_CLOEXEC)
        self._fds.append(fd)
        os.ftruncate(fd, REGION)
        memory = self.map(fd)
        for at in (C2S, S2C):
            Ring(memory, at).start()
        self.say(ADD_REGION, struct.pack("<HQ", 0, REGION), fd)
        self.hear(ACK)

    def rings(self) -> None:
        for flags, at in ((1, C2S), (0, S2C)):
            fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._fds.append(fd)
            self.say(ADD_RING, struct.pack("<HHHIBH", flags, 0, 0, at, LOG2_RING, 0), fd)
            self.hear(ACK)

    def connect(self) -> None:
        self.say(CONNECT, b"peer".ljust(32, b"\0"))

    def connected(self) -> None:
        self.hear(CONNECTED)

    STEPS = (hello, init, region, rings, connect, connected)

    def talk(self, frames: list[bytes], times: int) -> int:
        """Sends the frames again and again, and takes what comes. Frames taken."""
        assert self.memory is not None
        out, back = Ring(self.memory, C2S), Ring(self.memory, S2C)
        out.fill(0, frames)
        back.fill(RING, [bytes(BUFFER)])
        for _ in range(times):
            out.head = out.tail + RING
            back.head = back.tail + RING
        return int(back.tail)


class Server(Peer):
    """Has accepted a client under test."""

    def serve(self) -> None:
        """The whole handshake."""
        self.sock.settimeout(20)
        self.say(HELLO, struct.pack("<32sHHHHHB", b"peer", VERSION, VERSION, 1, 0, 0, LOG2_RING))
        self.hear(INIT)
        self.say(ACK)
        size = int(struct.unpack_from("<HQ", self.hear(ADD_REGION))[1])
        memory_fd = self._fds[-1]
        self.say(ACK)
        self.at = {}
        for _ in range(2):
            flags, _, _, at = struct.unpack_from("<HHHI", self.hear(ADD_RING))
            self.at[flags] = at
            self.say(ACK)
        self.hear(CONNECT)
        self.map(memory_fd, size)
        self.say(CONNECTED, b"peer".ljust(32, b"\0"))

    def talk(self, frame: bytes, times: int) -> int:
        """Puts the frame into all buffers that the client has, and takes what comes. Frames taken."""
        assert self.memory is not None
        out, back = Ring(self.memory, self.at[0]), Ring(self.memory, self.at[1])
        for i in range(RING):
            at = self.at[0] + HEADER + i * DESCRIPTOR
            buffer = struct.unpack_from("<I", self.memory, at + 8)[0]
            self.memory[buffer : buffer + len(frame)] = frame
        for _ in range(times):
            for i in range(RING):
                struct.pack_into("<I", self.memory, self.at[0] + HEADER + i * DESCRIPTOR + 4, len(frame))
            out.tail = out.head
            back.tail = back.head
        return int(back.tail)
