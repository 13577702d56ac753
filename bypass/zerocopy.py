# SPDX-License-Identifier: Apache-2.0
"""Payload that nobody copies: what Socket.recv_zc() lends, and the buffers that Socket.send_zc() takes.

    with sock.recv_zc() as got:              # the frames that the packets came in
        for view in got:                     # read-only memoryviews, in the order of the stream
            digest.update(view)

    [buffer] = sock.alloc_zc()               # a frame
    with buffer.data as view:
        buffer.used = fill(view)
    sock.send_zc([buffer])                   # is the segment that leaves

Memory is out as long as anybody can see it: a view, a slice of one, an array made of one. release(), the end of a
`with` block, send_zc() and Stack.close() raise BufferError when somebody else still looks; the memory stays out then,
and goes back by itself, at the stack's next call, when the last of them is gone. So does what is forgotten unreleased.
Until then it counts as unread (bypass.h, "Without copying"): a program that keeps what it received stops its peer.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bypass._core import ffi, lib

if TYPE_CHECKING:
    from bypass.core import CoreStack
    from bypass.stack_api import Stack

__all__ = ["TCP_KEEP_FRAMES", "Received", "SendBuffer"]

TCP_KEEP_FRAMES = 0x4259
"""setsockopt(IPPROTO_TCP, TCP_KEEP_FRAMES, 1): payloads of 256 bytes and less stay in their frames too, although those
are larger. Connections inherit it from their listener. Not an option of Linux'."""

PIECES = 64
"""What recv_zc() lends at most in one call, unless it is told otherwise."""


class Lendings:
    """What of a stack's memory is out. Lock held in all methods, but for what the collector calls."""

    def __init__(self, core: CoreStack) -> None:
        self._core = core
        self._out: dict[int, weakref.ref[Any]] = {}  # token: the memory, as long as it is looked at
        self._gone: deque[int] = deque()  # tokens of memory that nobody sees any more. Any thread, no lock
        self._holders: weakref.WeakSet[_Memory] = weakref.WeakSet()

    def __len__(self) -> int:
        return len(self._out)

    def watch(self, token: int, memory: Any) -> None:
        """From now on the memory's end gives the token back."""
        gone = self._gone
        self._out[token] = weakref.ref(memory, lambda _: gone.append(token))

    def forget(self, token: int) -> None:
        """The memory's end means nothing any more."""
        del self._out[token]

    def seen(self, token: int) -> bool:
        ref = self._out.get(token)
        return ref is not None and ref() is not None

    def drain(self) -> bool:
        """Gives back what nobody sees. Whether there was any."""
        if not self._gone:
            return False
        while self._gone:
            token = self._gone.popleft()
            del self._out[token]
            if lib.bypass_release(self._core.c, ffi.new("uint64_t[]", [token]), 1) != 0:
                raise SystemError(
                    f"buffer {token:#x} was not out"
                )  # neither the program nor the core does this
        return True

    def end(self) -> None:
        """The memory is about to go: every buffer ends. BufferError: somebody looks into one; all else goes on."""
        for memory in list(self._holders):
            memory.let_go()
        self.drain()
        if self._out:
            raise BufferError(f"{len(self._out)} lent buffers are looked into: release their views first")

    def received(self, sock: int, pieces: int) -> list[_Memory] | int:
        """What bypass_recv_zc() gives, or its -errno."""
        self.drain()
        bufs = ffi.new("struct bypass_buf[]", pieces)
        n = int(lib.bypass_recv_zc(self._core.c, sock, bufs, pieces))
        return n if n < 0 else [_Memory(self, bufs[i]) for i in range(n)]

    def alloc(self, sock: int, n: int) -> list[_Memory] | int:
        """What bypass_buf_alloc() gives, or its -errno."""
        self.drain()
        bufs = ffi.new("struct bypass_buf[]", n)
        got = int(lib.bypass_buf_alloc(self._core.c, sock, bufs, n))
        return got if got < 0 else [_Memory(self, bufs[i]) for i in range(got)]

    def send(self, sock: int, buffers: Sequence[SendBuffer], flags: int) -> int:
        """How many were taken, or -errno."""
        bufs = ffi.new("struct bypass_buf[]", len(buffers))
        taken = 0
        ready: list[SendBuffer] = []
        try:
            for c, buffer in zip(bufs, buffers, strict=True):
                c.token, c.len = buffer._memory.token, buffer.used
                buffer._memory.take()
                ready.append(buffer)
            taken = int(lib.bypass_send_zc(self._core.c, sock, bufs, len(bufs), flags))
        finally:
            for buffer in ready[max(taken, 0) :]:
                buffer._memory.put_back()
        for buffer in ready[: max(taken, 0)]:
            buffer._memory.token = 0
        return taken


class _Memory:
    """One buffer that is out: `data` as a view, as long as this object has it."""

    __slots__ = ("__weakref__", "_address", "_lendings", "_raw", "size", "token", "view")

    def __init__(self, lendings: Lendings, buf: Any) -> None:
        self._lendings = lendings
        self._address = buf.data
        self.size: int = buf.cap
        self.token: int = buf.token
        self._raw: Any = None
        self.view: memoryview | None = None
        lendings._holders.add(self)
        self.put_back()

    def put_back(self) -> None:
        """It is ours again."""
        self._raw = ffi.buffer(self._address, self.size)
        self._lendings.watch(self.token, self._raw)

    def look(self) -> memoryview:
        if self._raw is None:
            raise ValueError("the buffer was released or sent")
        if self.view is None:
            self.view = memoryview(self._raw)
        return self.view

    def _close_view(self) -> bool:
        """False: something was made of the view that needs it."""
        try:
            if self.view is not None:
                self.view.release()
        except BufferError:
            return False
        self.view = None
        return True

    def let_go(self) -> bool:
        """Lock held. Ends our sight of it. False: somebody else sees it, and it goes back when nobody does."""
        quiet = self._close_view()
        self.view = self._raw = None
        return quiet and not self._lendings.seen(self.token)

    def take(self) -> None:
        """Lock held. Nobody sees it any more, nor gives it back. BufferError: somebody does, nothing has changed."""
        if self._raw is None:
            raise ValueError("the buffer was released or sent")
        if self._close_view():
            probe = weakref.ref(self._raw)
            self._lendings.forget(self.token)
            self._raw = None
            if (raw := probe()) is None:
                return
            self._raw = raw
            self._lendings.watch(self.token, raw)
        raise BufferError("somebody else looks into the buffer")


class _Out:
    """What is common to both kinds: they end, at the latest at the end of a `with` block."""

    def __init__(self, stack: Stack, memories: list[_Memory]) -> None:
        self._stack = stack
        self._memories = memories

    def release(self) -> None:
        """Gives the memory back; a second call does nothing.

        Raises:
            BufferError: views of it are alive: it goes back when the last one is gone.
        """
        with self._stack.driver.lock:
            memories, self._memories = self._memories, []
            busy = sum(not m.let_go() for m in memories)
            if not self._stack.core.closed and self._stack.lent.drain():
                self._stack.touched()  # room in the receive window may have to be announced
        if busy:
            raise BufferError(f"{busy} buffers are looked into: they go back when their last view is gone")

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            self.release()
        except BufferError:
            if kind is None:  # else the first error is the one to see; its traceback may be what still looks
                raise


class Received(_Out):
    """Received bytes where they lie: a sequence of read-only memoryviews, empty at the end of the stream.

    Attributes:
        nbytes: of all pieces.
    """

    def __init__(self, stack: Stack, memories: list[_Memory]) -> None:
        super().__init__(stack, memories)
        self.nbytes = sum(m.size for m in memories)
        for m in memories:
            m.view = m.look().toreadonly()

    def __len__(self) -> int:
        return len(self._memories)

    def __getitem__(self, i: int) -> memoryview:
        return self._memories[i].look()

    def __iter__(self) -> Iterator[memoryview]:
        return iter([m.look() for m in self._memories])

    def __enter__(self) -> Received:
        return self

    def __repr__(self) -> str:
        return f"<bypass.zerocopy.Received {self.nbytes} bytes in {len(self)} pieces>"


class SendBuffer(_Out):
    """Memory to write payload in. `used` says how many bytes of it send_zc() sends.

    Attributes:
        size: bytes that fit: what one segment carries.
    """

    def __init__(self, stack: Stack, memory: _Memory) -> None:
        super().__init__(stack, [memory])
        self._memory = memory
        self.size = memory.size
        self.used = 0

    @property
    def data(self) -> memoryview:
        """All of it, to write. ValueError: it was released or sent."""
        return self._memory.look()

    def write(self, data: Any) -> int:
        """Copies bytes behind what is used. How many fitted."""
        with memoryview(data) as view, view.cast("B") as source:
            n = min(len(source), self.size - self.used)
            self.data[self.used : self.used + n] = source[:n]
        self.used += n
        return n

    def __enter__(self) -> SendBuffer:
        return self

    def __repr__(self) -> str:
        return f"<bypass.zerocopy.SendBuffer {self.used} of {self.size} bytes>"
