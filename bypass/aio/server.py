# SPDX-License-Identifier: Apache-2.0
"""Listening: connections that get a protocol each, as asyncio's servers give them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from bypass._core import lib
from bypass.aio.loop import Handle, Hub
from bypass.aio.streams import STREAM_LIMIT, ProtocolFactory, StreamTransport
from bypass.stack_api import STREAM, Stack

__all__ = ["Server", "create_server", "start_server"]


class Server(Handle, asyncio.AbstractServer):
    """A listening socket whose connections get protocols. As asyncio.Server, without sockets.

    Attributes:
        address: where it listens; the port is the chosen one if 0 was asked for.
    """

    ACCEPT_TURN = 64

    def __init__(self, hub: Hub, stack: Stack, handle: int, factory: ProtocolFactory, backlog: int) -> None:
        super().__init__(hub, stack, handle)
        self._factory = factory
        self._backlog = backlog
        self._serving = False
        self._transports: set[StreamTransport] = set()
        self._closed: asyncio.Future[None] = hub.loop.create_future()
        with stack.driver.lock:
            self.address = stack.core.local(handle)

    async def start_serving(self) -> None:
        if not self._serving and self.handle >= 0:
            self._serving = True
            with self.stack.driver.lock:
                self.stack.listen(self.handle, self._backlog)
                self.watch()

    def on_ready(self, mask: int) -> None:
        if lost := self.lost_device():
            self.end(lost)
            return
        for _ in range(self.ACCEPT_TURN):
            with self.stack.driver.lock:
                if self.handle < 0:
                    return
                try:
                    handle = self.stack.accept(self.handle)
                except OSError as e:  # ENFILE: handles are used up. It stays in the queue and is tried later
                    self.hub.loop.call_exception_handler(
                        {"message": "accept failed", "exception": e, "server": self}
                    )
                    self.hub.loop.call_later(0.1, self.on_ready, 0)
                    return
            if handle < 0:
                return
            self._serve(handle)
        with self.stack.driver.lock:
            self._note(lib.BYPASS_IN)

    def end(self, error: Exception) -> None:
        """The listener is gone with its stack or its device."""
        self.hub.loop.call_exception_handler({"message": "server ended", "exception": error, "server": self})
        self.close()

    def _serve(self, handle: int) -> None:
        transport = StreamTransport(self.hub, self.stack, handle, self._connection_ended)
        self._transports.add(transport)
        try:
            transport.start(self._factory())
        except Exception as e:  # noqa: BLE001 - the program's own error: reported as asyncio does, the server goes on
            self.hub.loop.call_exception_handler(
                {"message": "protocol of a new connection failed", "exception": e, "transport": transport}
            )
            transport.abort()

    def _connection_ended(self, transport: StreamTransport) -> None:
        """A connection has ended."""
        self._transports.discard(transport)
        if self.handle < 0 and not self._transports and not self._closed.done():
            self._closed.set_result(None)

    def close(self) -> None:
        """Stops listening; connections go on."""
        if self.handle >= 0:
            self._serving = False
            self.drop()
            if not self._transports and not self._closed.done():
                self._closed.set_result(None)

    def close_clients(self) -> None:
        """Closes all connections."""
        for transport in list(self._transports):
            transport.close()

    async def wait_closed(self) -> None:
        """Until it is closed and all connections have ended."""
        await asyncio.shield(self._closed)

    def is_serving(self) -> bool:
        return self._serving

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self.hub.loop

    async def serve_forever(self) -> None:
        await self.start_serving()
        try:
            await asyncio.shield(self._closed)
        except asyncio.CancelledError:
            self.close()
            raise


async def create_server(
    stack: Stack,
    protocol_factory: ProtocolFactory,
    host: str,
    port: int,
    *,
    backlog: int = 1024,
    start_serving: bool = True,
) -> Server:
    """As loop.create_server(). host: a local address or "0.0.0.0"; port 0 chooses one.

    Raises:
        OSError: EADDRINUSE, EADDRNOTAVAIL; PermissionError when no rule grants the flow.
    """
    hub = Hub.get(stack.driver)
    with stack.driver.lock:
        handle = stack.open(STREAM)
        try:
            stack.core.setopt(handle, lib.BYPASS_SO_REUSEADDR, 1)
            stack.bind(handle, (host, port))
        except BaseException:
            stack.close_handle(handle)
            raise
    server = Server(hub, stack, handle, protocol_factory, backlog)
    if start_serving:
        try:
            await server.start_serving()
        except BaseException:
            server.close()
            raise
    return server


async def start_server(
    stack: Stack,
    client_connected_cb: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any],
    host: str,
    port: int,
    *,
    limit: int = STREAM_LIMIT,
    backlog: int = 1024,
) -> Server:
    """As asyncio.start_server(): client_connected_cb(reader, writer) for each connection, a coroutine or a function."""
    loop = asyncio.get_running_loop()

    def factory() -> asyncio.StreamReaderProtocol:
        reader = asyncio.StreamReader(limit=limit, loop=loop)
        return asyncio.StreamReaderProtocol(reader, client_connected_cb, loop=loop)

    return await create_server(stack, factory, host, port, backlog=backlog)
