# SPDX-License-Identifier: Apache-2.0
"""TCP connections as asyncio transports, and opening them."""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from bypass._core import lib
from bypass.aio.loop import FAILED, READABLE, WRITABLE, Handle, Hub
from bypass.core import Address
from bypass.sockets import raised
from bypass.stack_api import STREAM, Stack

__all__ = ["ProtocolFactory", "StreamTransport", "create_connection", "open_connection"]

ProtocolFactory = Callable[[], asyncio.BaseProtocol]

READ_BYTES = 256 << 10
READ_TURN_BYTES = 1 << 20  # then other connections get their turn
STREAM_LIMIT = 64 << 10  # asyncio's own default


class StreamTransport(Handle, asyncio.Transport):
    """An asyncio transport over a connected TCP handle.

    Extra info: `peername`, `sockname`, `stack`, `handle`.
    """

    def __init__(
        self, hub: Hub, stack: Stack, handle: int, ended: Callable[[StreamTransport], None] | None = None
    ) -> None:
        with stack.driver.lock:
            extra = {
                "sockname": stack.core.local(handle),
                "peername": stack.core.tcp_info(handle).peer,
                "stack": stack,
                "handle": handle,
            }
        asyncio.Transport.__init__(self, extra)
        Handle.__init__(self, hub, stack, handle)
        self._protocol: asyncio.BaseProtocol = _NoProtocol()
        self._buffered: Any = None  # asyncio.BufferedProtocol
        self._ended = ended
        self._paused = False
        self._closing = False
        self._lost = False
        self._peer_done = False
        self._eof_wanted = False
        self._backlog: deque[memoryview] = deque()  # written, not yet taken by the stack
        self._backlog_bytes = 0
        self._low, self._high = 16 << 10, 64 << 10
        self._protocol_paused = False

    def start(self, protocol: asyncio.BaseProtocol) -> None:
        """connection_made(), then events."""
        self.set_protocol(protocol)
        protocol.connection_made(self)
        with self.stack.driver.lock:
            if self.handle >= 0:
                self.watch()

    # -- events
    def on_ready(self, mask: int) -> None:
        if self.handle < 0:
            return
        if lost := self.lost_device():
            self.end(lost)
            return
        if error := self.taken_error(mask):
            self.end(error)
            return
        if mask & WRITABLE and self._backlog:
            self._drain_backlog()
        if mask & READABLE and not self._paused and not self._closing:
            self._read_some()

    def _read_some(self) -> None:
        core, lock = self.stack.core, self.stack.driver.lock
        turn = 0
        while not (self._paused or self._closing or self._peer_done) and self.handle >= 0:
            if turn >= READ_TURN_BYTES:
                with lock:
                    self._note(lib.BYPASS_IN)
                return
            got: bytes | int
            if self._buffered is not None:
                got = self._read_buffered()
            else:
                with lock:
                    got = core.recv(self.handle, READ_BYTES)
            if isinstance(got, int) and got < 0:
                if got != -errno.EAGAIN:
                    self.end(raised(-got))
                return
            self.hub.touched()  # the window may have opened
            if not got:
                self._on_eof()
                return
            if isinstance(got, bytes):
                self._protocol.data_received(got)  # type: ignore[attr-defined]
                turn += len(got)
            else:
                self._buffered.buffer_updated(got)
                turn += got

    def _read_buffered(self) -> int:
        buffer = self._buffered.get_buffer(READ_BYTES)
        with self.stack.driver.lock:
            return self.stack.core.recv_into(self.handle, buffer)

    def _on_eof(self) -> None:
        self._peer_done = True
        keep_open = self._protocol.eof_received()  # type: ignore[attr-defined]
        if not keep_open:
            self.close()

    # -- writing
    def write(self, data: Any) -> None:
        """Never blocks: what the stack does not take now is kept, and the protocol paused above the high mark."""
        if self._eof_wanted:
            raise RuntimeError("Cannot call write() after write_eof()")
        if self._closing or self._lost or self.handle < 0:
            return
        view = memoryview(data).cast("B")
        if not view:
            return
        taken = 0
        if not self._backlog:
            taken = self._try_send(view)
            if taken < 0:
                return
        if taken < len(view):
            rest = view[taken:]
            # Only bytes never change under us.
            self._backlog.append(rest if isinstance(data, bytes) else memoryview(bytes(rest)))
            self._backlog_bytes += len(rest)
            self._maybe_pause()

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        self.write(b"".join(list_of_data))

    def _try_send(self, view: memoryview) -> int:
        """Bytes taken; -1: the connection has failed."""
        core, lock = self.stack.core, self.stack.driver.lock
        taken = 0
        while taken < len(view):
            with lock:
                n = core.send(self.handle, view[taken:] if taken else view)
            if n < 0:
                if n == -errno.EAGAIN:
                    break
                self.hub.loop.call_soon(self.end, raised(-n))
                return -1
            taken += n
        if taken:
            self.hub.touched()
        return taken

    def _drain_backlog(self) -> None:
        while self._backlog:
            view = self._backlog[0]
            taken = self._try_send(view)
            if taken < 0:
                return
            self._backlog_bytes -= taken
            if taken < len(view):
                self._backlog[0] = view[taken:]
                break
            self._backlog.popleft()
        self._maybe_resume()
        if not self._backlog:
            if self._closing:
                self._finish(None)
            elif self._eof_wanted:
                self._shutdown_write()

    def write_eof(self) -> None:
        """Half-close, after what was written."""
        if self._closing or self._eof_wanted:
            return
        self._eof_wanted = True
        if not self._backlog:
            self._shutdown_write()

    def _shutdown_write(self) -> None:
        if self.handle >= 0:
            with self.stack.driver.lock:
                self.stack.core.shutdown(self.handle, lib.BYPASS_SHUT_WR)
            self.hub.touched()

    def can_write_eof(self) -> bool:
        return True

    # -- flow control
    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if high is None:
            high = 64 << 10 if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
        self._low, self._high = low, high
        self._maybe_pause()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low, self._high

    def get_write_buffer_size(self) -> int:
        """Bytes that the stack has not taken yet; what it holds in its send buffer is not counted."""
        return self._backlog_bytes

    def _maybe_pause(self) -> None:
        if self._backlog_bytes > self._high and not self._protocol_paused:
            self._protocol_paused = True
            self._protocol.pause_writing()

    def _maybe_resume(self) -> None:
        if self._protocol_paused and self._backlog_bytes <= self._low:
            self._protocol_paused = False
            self._protocol.resume_writing()

    def is_reading(self) -> bool:
        return not self._paused and not self._closing

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        if self._paused and not self._closing:
            self._paused = False
            with self.stack.driver.lock:
                if self.handle >= 0:
                    self._note(lib.BYPASS_IN)  # events of the pause were not acted on

    # -- end
    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        """Delivers what was written, then closes. connection_lost(None) follows."""
        if self._closing:
            return
        self._closing = True
        if not self._backlog:
            self.hub.loop.call_soon(self._finish, None)

    def abort(self) -> None:
        """Resets the connection."""
        self._closing = True
        self.hub.loop.call_soon(self._finish, None, True)

    def end(self, error: Exception) -> None:
        self._closing = True
        self._finish(error, True)

    def _finish(self, error: Exception | None, abort: bool = False) -> None:
        if self._lost:
            return
        self._lost = True
        self._backlog.clear()
        self._backlog_bytes = 0
        try:
            self._protocol.connection_lost(error)
        finally:
            self.drop(abort=abort)
            if self._ended is not None:
                self._ended(self)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol
        self._buffered = protocol if isinstance(protocol, asyncio.BufferedProtocol) else None

    def __repr__(self) -> str:
        state = "closed" if self._lost else "closing" if self._closing else "open"
        return f"<{type(self).__name__} {state} peer={self.get_extra_info('peername')}>"


class _NoProtocol(asyncio.Protocol):
    """Until start()."""


class _Connecting(Handle):
    """A connection under way; `done` is a future."""

    def __init__(self, hub: Hub, stack: Stack, handle: int) -> None:
        super().__init__(hub, stack, handle)
        self.done: asyncio.Future[None] = hub.loop.create_future()

    def on_ready(self, mask: int) -> None:
        if lost := self.lost_device():
            self.end(lost)
            return
        if self.done.done() or not mask & (WRITABLE | FAILED | lib.BYPASS_HUP):
            return
        with self.stack.driver.lock:
            code = self.stack.core.error(self.handle)
        if code:
            self.done.set_exception(raised(code))
        else:
            self.done.set_result(None)

    def end(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)

    def give_up_handle(self) -> int:
        """The handle goes on to another owner."""
        handle, self.handle = self.handle, -1
        with self.stack.driver.lock:
            self.stack.set_handler(handle, None)
        self.hub.release()
        return handle


async def _connect(stack: Stack, address: Address, local_addr: Address | None) -> StreamTransport:
    hub = Hub.get(stack.driver)
    with stack.driver.lock:
        handle = stack.open(STREAM)
    connecting = _Connecting(hub, stack, handle)
    try:
        with stack.driver.lock:
            if local_addr is not None:
                stack.bind(handle, local_addr)
            result = stack.connect(handle, address)
            if result == -errno.EINPROGRESS:
                connecting.watch()
        if result == -errno.EINPROGRESS:
            await connecting.done
        elif result < 0:
            raise raised(-result)
        return StreamTransport(hub, stack, connecting.give_up_handle())
    except BaseException:
        connecting.drop(abort=True)
        raise


async def create_connection(
    stack: Stack, protocol_factory: ProtocolFactory, address: Address, *, local_addr: Address | None = None
) -> tuple[StreamTransport, asyncio.BaseProtocol]:
    """As loop.create_connection(): (transport, protocol).

    Raises:
        OSError: ECONNREFUSED, ETIMEDOUT, EHOSTUNREACH ...; PermissionError when no rule grants the flow.
    """
    transport = await _connect(stack, address, local_addr)
    protocol = protocol_factory()
    transport.start(protocol)
    return transport, protocol


async def open_connection(
    stack: Stack, host: str, port: int, *, limit: int = STREAM_LIMIT, local_addr: Address | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """As asyncio.open_connection(). limit: of the reader's buffer, bytes. Errors as create_connection()."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=limit, loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport, _ = await create_connection(stack, lambda: protocol, (host, port), local_addr=local_addr)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)
