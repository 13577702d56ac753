# SPDX-License-Identifier: Apache-2.0
"""asyncio over the kernel and over simulated stacks, alike: what the tests of bypass.aio share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from bypass import aio
from bypass.core import Config
from bypass.sim import Faults, Network

T = TypeVar("T")
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class World:
    """asyncio over the kernel's sockets."""

    name = "kernel"
    ip = "127.0.0.1"

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        return asyncio.run(asyncio.wait_for(main, 60))

    async def start_server(self, handler: Callable[..., Any], **options: Any) -> Any:
        return await asyncio.start_server(handler, self.ip, 0, **options)

    def port(self, server: Any) -> int:
        return int(server.sockets[0].getsockname()[1])

    async def open_connection(self, port: int, **options: Any) -> Streams:
        return await asyncio.open_connection(self.ip, port, **options)

    async def datagrams(self, factory: Callable[[], Any], **options: Any) -> tuple[Any, Any]:
        return await asyncio.get_running_loop().create_datagram_endpoint(factory, **options)


class SimWorld(World):
    ip = "10.0.0.2"

    def __init__(self, pace: Any, faults: Faults | None = None) -> None:
        self.name = pace
        self.net = Network(seed=1, pace=pace)
        self.net.wire(faults=faults or Faults())
        config = Config(conns=1024)
        self.client = self.net.stack("10.0.0.1/24", name="client", config=config)
        self.server = self.net.stack("10.0.0.2/24", name="server", config=config)

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        if self.name == "virtual":
            return aio.run(main, self.net)
        return super().run(main)

    async def start_server(self, handler: Callable[..., Any], **options: Any) -> Any:
        return await aio.start_server(self.server, handler, self.ip, 0, **options)

    def port(self, server: Any) -> int:
        return int(server.address[1])

    async def open_connection(self, port: int, **options: Any) -> Streams:
        return await aio.open_connection(self.client, self.ip, port, **options)

    async def datagrams(self, factory: Callable[[], Any], **options: Any) -> tuple[Any, Any]:
        stack = self.server if "local_addr" in options else self.client
        return await aio.create_datagram_endpoint(stack, factory, **options)

    def close(self) -> None:
        """Nothing may be left when everything was closed and TIME_WAIT has passed."""
        self.net.pace = "virtual"
        self.net.run(duration_ns=400 * 10**9)
        left = self.net.leaks()
        self.net.close()
        assert not left


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()
    await writer.wait_closed()


async def patient(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """echo() for a peer that may vanish."""
    with suppress(OSError):
        await echo(reader, writer)


class Collect(asyncio.DatagramProtocol):
    """Keeps what comes; answers when it is told to."""

    def __init__(self, answer: bool = False) -> None:
        self.answer = answer
        self.got: asyncio.Queue[Any] = asyncio.Queue()
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.got.put_nowait(data)
        if self.answer:
            self.transport.sendto(data.upper(), addr)

    def error_received(self, exc: Exception) -> None:
        self.got.put_nowait(exc)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set_result(exc)
