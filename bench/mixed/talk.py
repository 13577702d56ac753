# SPDX-License-Identifier: Apache-2.0
"""Short conversations: connect, ask, be answered, end; and the many ways to end. Both ends know every byte.

A request is `kind`, the length of the wanted answer, the length of what follows, and that many bytes.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import struct
from asyncio import StreamReader, StreamWriter
from collections import Counter

from bench.mixed.worlds import World

__all__ = ["KINDS", "Wrong", "ask", "server"]

HEAD = struct.Struct("!BII")
BYTES = random.Random(5).randbytes(1 << 18)  # what any answer and any body is the beginning of
SIZES = (0, 1, 100, 1448, 1449, 5000, 60_000)

(CLIENT_CLOSES, SERVER_CLOSES, HALF_CLOSE, CLIENT_RESETS, SERVER_RESETS, SILENT, UNREAD) = range(7)
KINDS = {
    CLIENT_CLOSES: "client closes",
    SERVER_CLOSES: "server closes",
    HALF_CLOSE: "half-close",
    CLIENT_RESETS: "client resets",
    SERVER_RESETS: "server resets",
    SILENT: "silent",
    UNREAD: "closed unread",
}
WEIGHTS = (8, 4, 4, 1, 1, 1, 1)


class Wrong(Exception):
    """The other end did what it should not have done."""


def any_kind(rng: random.Random) -> int:
    return rng.choices(range(len(KINDS)), WEIGHTS)[0]


# ---- Server --------------------------------------------------------------------------------------------------------
def server(world: World, counts: Counter[str], errors: list[str]) -> Server:
    return Server(world, counts, errors)


class Server:
    """Answers. Counts conversations by kind; what is wrong goes to `errors`."""

    def __init__(self, world: World, counts: Counter[str], errors: list[str]) -> None:
        self.world = world
        self.counts = counts
        self.errors = errors

    async def handle(self, reader: StreamReader, writer: StreamWriter) -> None:
        kind = -1
        try:
            async with asyncio.timeout(60):
                head = await reader.read(HEAD.size)
                if not head:
                    self.counts["silent"] += 1
                    return
                head += await reader.readexactly(HEAD.size - len(head))
                kind, want, have = HEAD.unpack(head)
                await self._answer(kind, want, await reader.readexactly(have), reader, writer)
                self.counts[KINDS[kind]] += 1
        except (ConnectionError, asyncio.IncompleteReadError) as e:
            if kind in (CLIENT_RESETS, UNREAD):
                self.counts[KINDS[kind]] += 1  # it came to hear of it
            else:
                self.errors.append(f"short server: kind {kind}: {e!r}")
        except (Wrong, TimeoutError, KeyError) as e:
            self.errors.append(f"short server: kind {kind}: {e!r}")
        finally:
            writer.close()

    async def _answer(
        self, kind: int, want: int, body: bytes, reader: StreamReader, writer: StreamWriter
    ) -> None:
        if body != BYTES[: len(body)]:
            raise Wrong("the body differs")
        if kind == SERVER_RESETS:
            self.world.reset(writer)
            return
        if kind == HALF_CLOSE:
            if await reader.read(1):
                raise Wrong("bytes behind the end")
            writer.write(hashlib.sha256(body).digest())
        writer.write(BYTES[:want])
        await writer.drain()
        if kind == CLIENT_CLOSES and await reader.read(1):
            raise Wrong("bytes behind the end")
        if kind in (CLIENT_RESETS, UNREAD):
            await reader.read(1)  # until it has gone; by whatever


# ---- Client --------------------------------------------------------------------------------------------------------
async def ask(world: World, port: int, kind: int, rng: random.Random) -> int:
    """One conversation with the peer's server. Returns the bytes that came.

    Raises:
        Wrong: it did not go as this kind has to. OSError, TimeoutError, IncompleteReadError: neither.
    """
    want, have = rng.choice(SIZES), rng.choice(SIZES)
    if kind in (CLIENT_RESETS, UNREAD):
        want = max(want, 1000)
    async with asyncio.timeout(60):
        reader, writer = await world.connect(world.peer, port)
        try:
            if kind == SILENT:
                return 0
            writer.write(HEAD.pack(kind, want, have) + BYTES[:have])
            return await _hear(world, kind, want, have, reader, writer)
        finally:
            writer.close()
            try:
                await writer.wait_closed()
            except ConnectionError:
                if kind not in (SERVER_RESETS, CLIENT_RESETS, UNREAD):
                    raise


async def _hear(
    world: World, kind: int, want: int, have: int, reader: StreamReader, writer: StreamWriter
) -> int:
    if kind == SERVER_RESETS:
        try:
            got = await reader.read(1)
        except ConnectionResetError:
            return 0
        raise Wrong(f"no reset but {got!r}")
    if kind == HALF_CLOSE:
        writer.write_eof()
        if await reader.readexactly(32) != hashlib.sha256(BYTES[:have]).digest():
            raise Wrong("the server read something else")
    if kind in (CLIENT_RESETS, UNREAD):
        got = await reader.readexactly(500)
        if kind == CLIENT_RESETS:
            world.reset(writer)
    else:
        got = await reader.readexactly(want)
    if got != BYTES[: len(got)]:
        raise Wrong("the answer differs")
    if kind in (SERVER_CLOSES, HALF_CLOSE) and await reader.read(1):
        raise Wrong("bytes behind the answer")
    return len(got)
