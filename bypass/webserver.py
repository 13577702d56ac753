# SPDX-License-Identifier: Apache-2.0
"""A small HTTP/1.1 server on a bypass stack, in asyncio: what the demonstration and the tests talk to.

    python -m bypass.webserver --policy config/web.yaml --directory /srv/www 192.0.2.10:8080

GET and HEAD serve the files of one directory (no subdirectories, no listing of anything else); PUT takes a body and
answers with its SHA-256, storing nothing. It is an example of the API, not a web server for the Internet.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import sys
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

import bypass
from bypass import aio
from bypass.errors import BypassError

__all__ = ["Request", "WebServer", "serve"]

CHUNK_BYTES = 1 << 20
HEAD_BYTES = 16 << 10


class BadRequestError(Exception):
    """What the client sent is no request that this server understands."""


@dataclass(frozen=True)
class Request:
    """A request's head. `length`: bytes of body that follow."""

    method: str
    path: str
    length: int
    keep_alive: bool

    @classmethod
    def parse(cls, head: bytes) -> Request:
        """The head up to and with its empty line (RFC 9112 2.1). BadRequestError."""
        lines = head.decode("latin-1").split("\r\n")
        words = lines[0].split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            raise BadRequestError(f"no HTTP/1 request line: {lines[0][:80]!r}")
        fields = {}
        for line in filter(None, lines[1:]):
            name, colon, value = line.partition(":")
            if not colon:
                raise BadRequestError(f"no header field: {line[:80]!r}")
            fields[name.strip().lower()] = value.strip()
        length = fields.get("content-length", "0")
        if not length.isdigit() or "transfer-encoding" in fields:
            raise BadRequestError("a body needs a Content-Length")
        connection = fields.get("connection", "").lower()
        keep = connection != "close" if words[2] == "HTTP/1.1" else connection == "keep-alive"
        return cls(words[0], words[1], int(length), keep)


class WebServer:
    """Serves one directory.

    Attributes:
        requests: answered so far.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.requests = 0

    async def handle(self, reader: StreamReader, writer: StreamWriter) -> None:
        """One connection, for asyncio's start_server and for bypass.aio.start_server alike."""
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, TimeoutError):
            pass  # the client went away: its right
        finally:
            writer.close()

    async def _exchange(self, reader: StreamReader, writer: StreamWriter) -> bool:
        try:
            request = Request.parse(await reader.readuntil(b"\r\n\r\n"))
        except asyncio.IncompleteReadError as e:
            if e.partial:
                raise
            return False
        except (BadRequestError, asyncio.LimitOverrunError) as e:
            await self._answer(writer, 400, f"{e}\n".encode(), keep_alive=False)
            return False
        self.requests += 1
        if request.method == "PUT":
            await self._put(request, reader, writer)
        elif request.method in ("GET", "HEAD"):
            await self._get(request, writer)
        else:
            await self._answer(writer, 405, b"GET, HEAD and PUT\n", keep_alive=False)
            return False
        return request.keep_alive

    async def _get(self, request: Request, writer: StreamWriter) -> None:
        name = request.path.lstrip("/").partition("?")[0] or "index.html"
        path = self.directory / name
        if "/" in name or name.startswith(".") or not path.is_file():
            await self._answer(writer, 404, b"no such file\n", keep_alive=request.keep_alive)
            return
        with path.open("rb") as body:
            size = os.fstat(body.fileno()).st_size
            self._head(writer, 200, size, request.keep_alive)
            while request.method == "GET" and (piece := body.read(CHUNK_BYTES)):
                writer.write(piece)
                await writer.drain()
        await writer.drain()

    async def _put(self, request: Request, reader: StreamReader, writer: StreamWriter) -> None:
        digest = hashlib.sha256()
        left = request.length
        while left > 0:
            piece = await reader.read(min(left, CHUNK_BYTES))
            if not piece:
                raise asyncio.IncompleteReadError(b"", left)
            digest.update(piece)
            left -= len(piece)
        await self._answer(writer, 200, digest.hexdigest().encode() + b"\n", keep_alive=request.keep_alive)

    async def _answer(self, writer: StreamWriter, status: int, body: bytes, *, keep_alive: bool) -> None:
        self._head(writer, status, len(body), keep_alive)
        writer.write(body)
        await writer.drain()

    @staticmethod
    def _head(writer: StreamWriter, status: int, length: int, keep_alive: bool) -> None:
        reason = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed"}[status]
        writer.write(
            f"HTTP/1.1 {status} {reason}\r\nServer: bypass\r\nContent-Length: {length}\r\n"
            f"Connection: {'keep-alive' if keep_alive else 'close'}\r\n\r\n".encode()
        )


async def serve(
    stack: bypass.Stack, host: str, port: int, directory: Path, ready: Callable[[], None] | None = None
) -> WebServer:
    """Serves until SIGINT or SIGTERM; `ready` is called when the port is open."""
    web = WebServer(directory)
    stop = asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    server = await aio.start_server(stack, web.handle, host, port)
    if ready is not None:
        ready()
    await stop.wait()
    server.close()
    await server.wait_closed()
    return web


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise click.BadParameter(f"{address!r} is not HOST:PORT, such as 192.0.2.10:8080")
    return host, int(port)


@click.command()
@click.option(
    "--policy", required=True, type=click.Path(path_type=Path), help="The policy that grants the port."
)
@click.option(
    "--directory",
    required=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Its files are served.",
)
@click.argument("address")
def main(policy: Path, directory: Path, address: str) -> None:
    """Serves the files of a directory over HTTP at ADDRESS (HOST:PORT) from a user-space stack."""
    host, port = _split(address)
    try:
        with bypass.Stack.from_policy(policy) as stack:
            asyncio.run(serve(stack, host, port, directory, lambda: print(f"serving {address}", flush=True)))
    except BypassError as e:
        print(f"webserver: {e}", file=sys.stderr)
        sys.exit(e.exit_code)


if __name__ == "__main__":
    main()
