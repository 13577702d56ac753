# SPDX-License-Identifier: Apache-2.0
"""The two ends of the mixed load: connections of the kernel, and connections of a bypass stack, by the same calls."""

from __future__ import annotations

import asyncio
import socket
import struct
from asyncio import StreamReader, StreamWriter
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import bypass
from bypass import aio
from bypass.lab import CLIENT_IP, SERVER_IP

__all__ = ["BypassWorld", "LinuxWorld", "World"]

Serve = Callable[[StreamReader, StreamWriter], Awaitable[None]]
LIMIT = 1 << 20  # of a reader's buffer, bytes


class World(Protocol):
    name: str
    address: str  # its own
    peer: str

    async def connect(self, host: str, port: int) -> tuple[StreamReader, StreamWriter]: ...

    async def serve(self, serve: Serve, port: int) -> Any: ...

    def reset(self, writer: StreamWriter) -> None:
        """Ends the connection by RST."""


class LinuxWorld:
    name = "linux"
    address = CLIENT_IP
    peer = SERVER_IP

    async def connect(self, host: str, port: int) -> tuple[StreamReader, StreamWriter]:
        return await asyncio.open_connection(host, port, limit=LIMIT)

    async def serve(self, serve: Serve, port: int) -> Any:
        return await asyncio.start_server(serve, self.address, port, limit=LIMIT, backlog=1024)

    def reset(self, writer: StreamWriter) -> None:
        linger = struct.pack("ii", 1, 0)  # without it a close with nothing unread is a FIN
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()


class BypassWorld:
    name = "bypass"
    address = SERVER_IP
    peer = CLIENT_IP

    def __init__(self, stack: bypass.Stack) -> None:
        self.stack = stack

    async def connect(self, host: str, port: int) -> tuple[StreamReader, StreamWriter]:
        return await aio.open_connection(self.stack, host, port, limit=LIMIT)

    async def serve(self, serve: Serve, port: int) -> Any:
        return await aio.start_server(self.stack, serve, self.address, port, limit=LIMIT)

    def reset(self, writer: StreamWriter) -> None:
        writer.transport.abort()
