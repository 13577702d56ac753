# SPDX-License-Identifier: Apache-2.0
"""iperf3's protocol over any byte streams, both roles: an `iperf3` program talks to a bypass stack with it.

A test has one control connection and, per direction, up to 128 data connections; each begins with the same 37 bytes,
the cookie. What happens next is said on the control connection in single bytes, always by the server but for the end:

    server  PARAM_EXCHANGE    client  its parameters, JSON behind four bytes of length
    server  CREATE_STREAMS    client  opens the data connections
    server  TEST_START, TEST_RUNNING                data flows, to the client if `reverse`
    client  TEST_END
    server  closes the data connections, EXCHANGE_RESULTS
                              client  what it counted, JSON; then the server's
    server  DISPLAY_RESULTS   client  IPERF_DONE

TCP only, one direction at a time. What a block holds is not looked at: iperf3 sends anything.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import struct
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

__all__ = ["BusyError", "Connect", "ProtocolError", "Result", "Server", "run_client"]

Connect = Callable[[str, int], Awaitable[tuple[StreamReader, StreamWriter]]]

COOKIE_BYTES = 37
TEST_START, TEST_RUNNING, TEST_END = 1, 2, 4
PARAM_EXCHANGE, CREATE_STREAMS, CLIENT_TERMINATE, EXCHANGE_RESULTS, DISPLAY_RESULTS, IPERF_DONE = (
    9,
    10,
    12,
    13,
    14,
    16,
)
ACCESS_DENIED, SERVER_ERROR = 255, 254  # -1, -2
MOST_JSON, MOST_STREAMS, MOST_BLOCK = 1 << 20, 128, 1 << 20
STEP_S = 20.0  # how long the other end may take for a step that is not the test itself


class ProtocolError(Exception):
    """The other end does not speak iperf3, or asks for something that is not here."""


class BusyError(Exception):
    """The server has another client."""


@dataclass(frozen=True)
class Result:
    """What the sender says that it sent and the receiver that it received, bytes of payload; `seconds` as asked for."""

    sent: int
    received: int
    seconds: float
    streams: int

    def check(self) -> None:
        """ProtocolError: nothing arrived, or more than was sent."""
        if not 0 < self.received <= self.sent:
            raise ProtocolError(f"{self.received} bytes arrived of {self.sent} that were sent")


def stream_number(i: int) -> int:
    """iperf3 calls its streams 1, 3, 4, 5 ..."""
    return i + 1 if i == 0 else i + 2


async def _send_json(writer: StreamWriter, document: dict[str, Any]) -> None:
    text = json.dumps(document).encode()
    writer.write(struct.pack("!I", len(text)) + text)
    await writer.drain()


async def _receive_json(reader: StreamReader) -> dict[str, Any]:
    async with asyncio.timeout(STEP_S):
        length = struct.unpack("!I", await reader.readexactly(4))[0]
        if length > MOST_JSON:
            raise ProtocolError(f"{length} bytes of JSON")
        document = json.loads(await reader.readexactly(length))
    if not isinstance(document, dict):
        raise ProtocolError("a JSON document that is no object")
    return document


async def _receive_state(reader: StreamReader, seconds: float = STEP_S) -> int:
    async with asyncio.timeout(seconds):
        return (await reader.readexactly(1))[0]


class _Flows:
    """The data connections of one end: sends on all of them, or receives, and counts."""

    def __init__(
        self, streams: list[tuple[StreamReader, StreamWriter]], *, sends: bool, block: int, bit_s: int
    ) -> None:
        self.streams = streams
        self.sends = sends
        self.block = block
        self.bit_s = bit_s
        self.bytes = [0] * len(streams)
        self._stopped = False
        work = self._send if sends else self._receive
        self.tasks = [asyncio.create_task(work(i)) for i in range(len(streams))]

    async def _send(self, i: int) -> None:
        writer = self.streams[i][1]
        block = os.urandom(self.block)
        began = time.monotonic()
        while not self._stopped:
            if self.bit_s:
                ahead = began + self.bytes[i] * 8 / self.bit_s - time.monotonic()
                if ahead > 0:
                    await asyncio.sleep(min(ahead, 0.1))
                    continue
            writer.write(block)
            self.bytes[i] += len(block)
            await writer.drain()

    async def _receive(self, i: int) -> None:
        reader = self.streams[i][0]
        while data := await reader.read(1 << 18):
            self.bytes[i] += len(data)

    def stop_sending(self) -> None:
        """What the transport still holds will go as well."""
        self._stopped = True
        for task in self.tasks if self.sends else ():
            task.cancel()

    def broken(self) -> str:
        """Why a stream ended while the test went on; empty: none did."""
        for i, task in enumerate(self.tasks):
            if task.done() and not task.cancelled():
                error = task.exception()
                return (
                    f"stream {stream_number(i)} ended: {error!r}"
                    if error
                    else f"stream {stream_number(i)} ended early"
                )
        return ""

    def results(self) -> dict[str, Any]:
        streams = [
            {"id": stream_number(i), "bytes": n, "retransmits": -1, "jitter": 0, "errors": 0, "packets": 0}
            for i, n in enumerate(self.bytes)
        ]
        usage = {"cpu_util_total": 0.0, "cpu_util_user": 0.0, "cpu_util_system": 0.0}
        return {**usage, "sender_has_retransmits": 0 if self.sends else -1, "streams": streams}

    def close(self) -> None:
        for _, writer in self.streams:
            writer.close()

    async def wait_closed(self) -> None:
        """Until nothing of them is left here. The other end may have gone before all had reached it."""
        self.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for _, writer in self.streams:
            try:
                async with asyncio.timeout(STEP_S):
                    await writer.wait_closed()
            except ConnectionError:
                continue
            except TimeoutError:
                writer.transport.abort()


def _total(results: dict[str, Any]) -> int:
    return sum(int(stream["bytes"]) for stream in results["streams"])


def _result(flows: _Flows, theirs: dict[str, Any], seconds: float) -> Result:
    ours, other = sum(flows.bytes), _total(theirs)
    sent, received = (ours, other) if flows.sends else (other, ours)
    return Result(sent, received, seconds, len(flows.streams))


# ---- Server --------------------------------------------------------------------------------------------------------
class Server:
    """One test at a time, as `iperf3 -s`; `handle` is for start_server() of asyncio and of bypass.aio.

    Attributes:
        done: tests that ended as they should.
        results: of the last test that did.
        errors: what went wrong in others, one text each.
    """

    def __init__(self) -> None:
        self.done = 0
        self.results: Result | None = None
        self.errors: list[str] = []
        self._cookie = b""
        self._streams: asyncio.Queue[tuple[StreamReader, StreamWriter]] = asyncio.Queue()

    async def handle(self, reader: StreamReader, writer: StreamWriter) -> None:
        try:
            async with asyncio.timeout(STEP_S):
                cookie = await reader.readexactly(COOKIE_BYTES)
        except (ConnectionError, asyncio.IncompleteReadError, TimeoutError):
            writer.close()  # not a client of ours
            return
        if cookie == self._cookie:
            self._streams.put_nowait((reader, writer))
            return
        if self._cookie:
            writer.write(bytes([ACCESS_DENIED]))
            writer.close()
            return
        self._cookie = cookie  # until all of this test has gone
        flows: list[_Flows] = []
        try:
            self.results = await self._test(reader, writer, flows)
            self.done += 1
        except (
            ConnectionError,
            asyncio.IncompleteReadError,
            TimeoutError,
            ProtocolError,
            ValueError,
            KeyError,
        ) as e:
            self.errors.append(f"iperf3 server: {e!r}")
        finally:
            if flows:
                await flows[0].wait_closed()
            while not self._streams.empty():
                self._streams.get_nowait()[1].transport.abort()
            writer.close()
            self._cookie = b""

    async def _parameters(self, reader: StreamReader, writer: StreamWriter) -> dict[str, Any]:
        writer.write(bytes([PARAM_EXCHANGE]))
        asked = await _receive_json(reader)
        wrong = next((k for k in ("udp", "sctp", "bidirectional", "mptcp") if asked.get(k)), "")
        if (
            not 1 <= int(asked.get("parallel", 1)) <= MOST_STREAMS
            or not 1 <= int(asked.get("len", 1)) <= MOST_BLOCK
        ):
            wrong = "parallel or len"
        if wrong:
            writer.write(struct.pack("!Bii", SERVER_ERROR, 21, 0))  # IEUNIMP
            await writer.drain()
            raise ProtocolError(f"a test with {wrong}")
        return asked

    async def _test(self, reader: StreamReader, writer: StreamWriter, flows: list[_Flows]) -> Result:
        asked = await self._parameters(reader, writer)
        writer.write(bytes([CREATE_STREAMS]))
        async with asyncio.timeout(STEP_S):
            streams = [await self._streams.get() for _ in range(int(asked.get("parallel", 1)))]
        writer.write(bytes([TEST_START, TEST_RUNNING]))
        sends, block = bool(asked.get("reverse")), int(asked.get("len", 1 << 17))
        moving = _Flows(streams, sends=sends, block=block, bit_s=int(asked.get("bandwidth", 0)))
        flows.append(moving)
        seconds = float(asked.get("time", 0)) or 3600.0
        state = await _receive_state(reader, seconds + 2 * STEP_S)
        moving.stop_sending()
        if state != TEST_END:
            raise ProtocolError(
                f"the client said {state}" + (": terminated" if state == CLIENT_TERMINATE else "")
            )
        if moving.broken() and sends:
            raise ProtocolError(moving.broken())
        moving.close()  # before the exchange: a client that receives reads on until then
        writer.write(bytes([EXCHANGE_RESULTS]))
        theirs = await _receive_json(reader)
        await _send_json(writer, moving.results())
        writer.write(bytes([DISPLAY_RESULTS]))
        if await _receive_state(reader) != IPERF_DONE:
            raise ProtocolError("the client does not end")
        return _result(moving, theirs, seconds)


# ---- Client --------------------------------------------------------------------------------------------------------
class _Client:
    def __init__(self, connect: Connect, host: str, port: int, asked: dict[str, Any]) -> None:
        self.connect = connect
        self.address = host, port
        self.asked = asked
        self.cookie = (
            "".join(random.choices("abcdefghijklmnopqrstuvwxyz234567", k=COOKIE_BYTES - 1)).encode() + b"\0"
        )
        self.streams: list[tuple[StreamReader, StreamWriter]] = []
        self.flows: _Flows | None = None

    async def _open(self) -> tuple[StreamReader, StreamWriter]:
        async with asyncio.timeout(STEP_S):
            reader, writer = await self.connect(*self.address)
        writer.write(self.cookie)
        return reader, writer

    async def run(self) -> Result:
        reader, writer = await self._open()
        try:
            return await self._test(reader, writer)
        finally:
            if self.flows is not None:
                await self.flows.wait_closed()
            else:
                for _, stream in self.streams:
                    stream.close()
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def _test(self, reader: StreamReader, writer: StreamWriter) -> Result:
        theirs: dict[str, Any] | None = None
        while True:
            state = await _receive_state(reader)
            if state == PARAM_EXCHANGE:
                await _send_json(writer, self.asked)
            elif state == CREATE_STREAMS:
                self.streams = [await self._open() for _ in range(self.asked["parallel"])]
            elif state == TEST_START:
                pass
            elif state == TEST_RUNNING:
                await self._run(writer)
            elif state == EXCHANGE_RESULTS and self.flows is not None:
                await _send_json(writer, self.flows.results())
                theirs = await _receive_json(reader)
            elif state == DISPLAY_RESULTS and self.flows is not None and theirs is not None:
                writer.write(bytes([IPERF_DONE]))
                await writer.drain()
                return _result(self.flows, theirs, float(self.asked["time"]))
            elif state == ACCESS_DENIED:
                raise BusyError("the server has another client")
            elif state == SERVER_ERROR:
                raise ProtocolError(
                    "the server reports errors {} and {}".format(
                        *struct.unpack("!ii", await reader.readexactly(8))
                    )
                )
            else:
                raise ProtocolError(f"the server said {state}")

    async def _run(self, writer: StreamWriter) -> None:
        asked = self.asked
        self.flows = _Flows(
            self.streams, sends="reverse" not in asked, block=asked["len"], bit_s=asked["bandwidth"]
        )
        await asyncio.sleep(asked["time"])
        self.flows.stop_sending()
        if self.flows.broken():
            raise ProtocolError(self.flows.broken())
        writer.write(bytes([TEST_END]))  # what still arrives is read: the server could be stuck otherwise
        await writer.drain()


async def run_client(
    connect: Connect,
    host: str,
    port: int,
    *,
    seconds: int,
    parallel: int = 1,
    reverse: bool = False,
    bit_s: int = 0,
    block: int = 1 << 17,
) -> Result:
    """One test against an iperf3 server. bit_s: of each stream; 0: as fast as it goes. reverse: the server sends.

    Raises:
        BusyError: it has another client. ProtocolError, OSError, TimeoutError, IncompleteReadError: it broke.
    """
    asked: dict[str, Any] = {
        "tcp": True, "omit": 0, "time": seconds, "num": 0, "blockcount": 0, "parallel": parallel, "len": block,
        "bandwidth": bit_s, "pacing_timer": 1000, "client_version": "3.12",
    }  # fmt: skip
    if reverse:
        asked["reverse"] = True
    result = await _Client(connect, host, port, asked).run()
    result.check()
    return result
