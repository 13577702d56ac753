# SPDX-License-Identifier: Apache-2.0
"""A small HTTP/1.1 client over streams, for the mixed load: GET and PUT on one connection or on many."""

from __future__ import annotations

import hashlib
from asyncio import StreamReader, StreamWriter
from pathlib import Path

__all__ = ["WrongAnswer", "exchange", "get", "put"]


class WrongAnswer(Exception):
    """Not the file that was asked for, or no HTTP."""


async def exchange(
    reader: StreamReader, writer: StreamWriter, head: str, body: bytes = b""
) -> tuple[str, bytes, int]:
    """One request. Returns the SHA-256 of the answer's body, its first 100 bytes, and its length."""
    writer.write(head.encode() + body)
    await writer.drain()
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    if lines[0].split(" ")[1:2] != ["200"]:
        raise WrongAnswer(lines[0])
    left = length = int(fields["content-length"])
    digest, first = hashlib.sha256(), b""
    while left:
        piece = await reader.read(min(left, 1 << 18))
        if not piece:
            raise WrongAnswer(f"{left} bytes of {length} are missing")
        digest.update(piece)
        first = first or piece[:100]
        left -= len(piece)
    return digest.hexdigest(), first, length


def _head(method: str, path: str, host: str, close: bool, length: int | None = None) -> str:
    fields = "" if length is None else f"Content-Length: {length}\r\n"
    connection = "close" if close else "keep-alive"
    return f"{method} /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: {connection}\r\n{fields}\r\n"


async def get(
    reader: StreamReader, writer: StreamWriter, host: str, name: str, sha256: str, *, close: bool
) -> int:
    """One file; its length. WrongAnswer: its hash is another."""
    digest, _, length = await exchange(reader, writer, _head("GET", name, host, close))
    if digest != sha256:
        raise WrongAnswer(f"{name}: {length} bytes with the wrong hash")
    return length


async def put(
    reader: StreamReader, writer: StreamWriter, host: str, path: Path, sha256: str, *, close: bool
) -> int:
    """One file to a server that answers with the hash of what it got (bypass.webserver)."""
    body = path.read_bytes()
    _, answer, _ = await exchange(reader, writer, _head("PUT", path.name, host, close, len(body)), body)
    if answer.decode().strip() != sha256:
        raise WrongAnswer(f"{path.name}: the server read something else")
    return len(body)
