# SPDX-License-Identifier: Apache-2.0
"""UDP sockets as asyncio transports."""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import Callable
from typing import Any

from bypass._core import lib
from bypass.aio.loop import WRITABLE, Handle, Hub
from bypass.core import Address
from bypass.sockets import raised
from bypass.stack_api import DGRAM, Stack

__all__ = ["DatagramTransport", "create_datagram_endpoint"]


LOW_BYTES, HIGH_BYTES = 16 << 10, 64 << 10  # of datagrams that wait: the protocol is paused between them


class DatagramTransport(Handle, asyncio.DatagramTransport):
    """An asyncio transport over a UDP handle. Extra info: `sockname`, `peername` (connected), `stack`, `handle`."""

    RECV_TURN = 256

    def __init__(
        self, hub: Hub, stack: Stack, handle: int, protocol: asyncio.DatagramProtocol, peer: Address | None
    ) -> None:
        with stack.driver.lock:
            extra = {"sockname": stack.core.local(handle), "peername": peer, "stack": stack, "handle": handle}
        asyncio.DatagramTransport.__init__(self, extra)
        Handle.__init__(self, hub, stack, handle)
        self._protocol = protocol
        self._peer = peer
        self._closing = False
        self._lost = False
        self._backlog: deque[tuple[bytes, Address | None]] = deque()
        self._backlog_bytes = 0
        self._paused = False

    def start(self) -> None:
        self._protocol.connection_made(self)
        with self.stack.driver.lock:
            if self.handle >= 0:
                self.watch()

    def on_ready(self, mask: int) -> None:
        if self.handle < 0:
            return
        if lost := self.lost_device():
            self.end(lost)
            return
        if error := self.taken_error(mask):
            self._protocol.error_received(error)
        while mask & WRITABLE and self._backlog and self._send(*self._backlog[0]):
            self._backlog_bytes -= len(self._backlog.popleft()[0])
        if self._paused and self._backlog_bytes <= LOW_BYTES:
            self._paused = False
            self._protocol.resume_writing()
        if self._closing and not self._backlog:
            self._finish()
        for _ in range(self.RECV_TURN):
            if self.handle < 0 or self._closing:
                return
            with self.stack.driver.lock:
                got = self.stack.core.recvfrom(self.handle, 65536)
            if isinstance(got, int):
                if got != -errno.EAGAIN:
                    self._protocol.error_received(raised(-got))
                return
            self._protocol.datagram_received(got[0], got[1])
        with self.stack.driver.lock:
            if self.handle >= 0:
                self._note(lib.BYPASS_IN)

    def _send(self, data: Any, address: Address | None) -> bool:
        """False: no room now."""
        with self.stack.driver.lock:
            sent = self.stack.sendto(self.handle, data, address)
        self.hub.touched()
        if sent == -errno.EAGAIN:
            return False
        if sent < 0:
            self._protocol.error_received(raised(-sent))
        return True

    def sendto(self, data: Any, addr: Any = None) -> None:
        """One datagram, kept until there is room. Errors come to protocol.error_received()."""
        if self._closing or self.handle < 0:
            return
        if self._backlog or not self._send(data, addr):
            self._backlog.append((bytes(data), addr))
            self._backlog_bytes += len(data)
            if self._backlog_bytes > HIGH_BYTES and not self._paused:
                self._paused = True
                self._protocol.pause_writing()

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            if not self._backlog:
                self.hub.loop.call_soon(self._finish)

    def abort(self) -> None:
        self._closing = True
        self._backlog.clear()
        self.hub.loop.call_soon(self._finish)

    def end(self, error: Exception) -> None:
        self._closing = True
        self._finish(error)

    def _finish(self, error: Exception | None = None) -> None:
        if not self._lost:
            self._lost = True
            try:
                self._protocol.connection_lost(error)
            finally:
                self.drop()

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, asyncio.DatagramProtocol)
        self._protocol = protocol


async def create_datagram_endpoint(
    stack: Stack,
    protocol_factory: Callable[[], asyncio.DatagramProtocol],
    local_addr: Address | None = None,
    remote_addr: Address | None = None,
) -> tuple[DatagramTransport, asyncio.DatagramProtocol]:
    """As loop.create_datagram_endpoint(): (transport, protocol). At least one address is needed.

    Raises:
        OSError: EADDRINUSE, EADDRNOTAVAIL; PermissionError when no rule grants the flow.
    """
    if local_addr is None and remote_addr is None:
        raise ValueError("a local or a remote address is needed")
    hub = Hub.get(stack.driver)
    with stack.driver.lock:
        handle = stack.open(DGRAM)
        try:
            if local_addr is not None:
                stack.bind(handle, local_addr)
            if remote_addr is not None:
                result = stack.connect(handle, remote_addr)
                if result < 0:
                    raise raised(-result)
        except BaseException:
            stack.close_handle(handle)
            raise
    protocol = protocol_factory()
    transport = DatagramTransport(hub, stack, handle, protocol, remote_addr)
    transport.start()
    return transport, protocol
