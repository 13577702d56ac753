# SPDX-License-Identifier: Apache-2.0
"""HTTP for the programs' tests: files with known hashes, and a blocking client that knows what is lost."""

from __future__ import annotations

import hashlib
import os
import pwd
import random
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from bench.apps.place import USER
from bench.programs import BenchError

__all__ = ["SIZES", "Lost", "Reader", "fetch", "make_files"]

SIZES = (0, 1, 500, 1448, 1449, 20_000, 65_536, 1_000_000)
LARGE = 10 << 20


class Lost(BenchError):
    """A request without its answer."""


def make_files(folder: Path) -> dict[str, str]:
    """Files of SIZES and one of LARGE in a new folder, readable for USER: name -> SHA-256."""
    rng = random.Random(11)
    folder.mkdir()
    user = pwd.getpwnam(USER)
    os.chown(folder, user.pw_uid, user.pw_gid)
    digests = {}
    for size in (*SIZES, LARGE):
        body = rng.randbytes(size)
        (folder / f"{size}.bin").write_bytes(body)
        digests[f"{size}.bin"] = hashlib.sha256(body).hexdigest()
    return digests


class Reader:
    """A connection that asks for one thing after another. Closed by the server: `open` is False."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.open = True
        self._file: BinaryIO = sock.makefile("rb")

    def close(self) -> None:
        self._file.close()
        self.sock.close()

    def get(self, name: str, *, close: bool = False) -> tuple[str, int]:
        """SHA-256 and length of a file.

        Raises:
            ConnectionError: the connection ended before the answer's first byte: who asks on an old one asks again
                (RFC 9112, 9.5).
            Lost: it ended inside of the answer, or the answer is none.
        """
        connection = "close" if close else "keep-alive"
        self.sock.sendall(f"GET /{name} HTTP/1.1\r\nHost: test\r\nConnection: {connection}\r\n\r\n".encode())
        status = self._file.readline()
        if not status:
            raise ConnectionResetError("closed before the answer")
        if status.split(b" ")[1:2] != [b"200"]:
            raise Lost(f"{name}: answered {status!r}")
        fields = dict(self._fields(name))
        length = int(fields[b"content-length"])
        digest, left = hashlib.sha256(), length
        while left:
            piece = self._file.read(min(left, 1 << 18))
            if not piece:
                raise Lost(f"{name}: {left} bytes of {length} are missing")
            digest.update(piece)
            left -= len(piece)
        self.open = not close and fields.get(b"connection", b"").lower() != b"close"
        return digest.hexdigest(), length

    def _fields(self, name: str) -> Iterator[tuple[bytes, bytes]]:
        while (line := self._file.readline()) != b"\r\n":
            if not line:
                raise Lost(f"{name}: ended inside of the header")
            field, _, value = line.partition(b":")
            yield field.lower(), value.strip()


def fetch(reader: Reader, name: str, sha256: str, *, close: bool = False) -> int:
    """One file; its length. Lost: its hash is another."""
    digest, length = reader.get(name, close=close)
    if digest != sha256:
        raise Lost(f"{name}: {length} bytes with the wrong hash")
    return length


def ended(reader: Reader) -> bool:
    """The server closes: nothing but the end comes."""
    with suppress(ConnectionResetError):
        return reader.sock.recv(1) == b""
    return False
