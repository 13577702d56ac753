# SPDX-License-Identifier: Apache-2.0
"""What only bypass.aio has: virtual time, bad wires and devices, stacks that end before their loop and after it."""

from __future__ import annotations

import asyncio
import errno
import random
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from aio_worlds import Collect, SimWorld, Streams, echo, patient

from bypass import aio
from bypass.sim import DeviceFaults, Faults, SimulationError


@pytest.fixture
def sim() -> Iterator[SimWorld]:
    it = SimWorld(
        "virtual", Faults(loss=0.03, reorder=0.03, duplicate=0.03, corrupt=0.03, delay_ns=1_000_000)
    )
    yield it
    it.close()


def test_bytes_are_equal_over_a_bad_wire_and_a_bad_device(sim: SimWorld) -> None:
    rng = random.Random(2)
    for stack in (sim.client, sim.server):
        assert stack.port is not None
        stack.port.set_device_faults(
            DeviceFaults(alloc_fail=0.02, tx_short=0.1, kick_again=0.1, complete_ns=50_000)
        )

    async def main() -> None:
        server = await sim.start_server(echo)

        async def one() -> None:
            body = rng.randbytes(200_000)
            reader, writer = await sim.open_connection(sim.port(server))
            writer.write(body)
            writer.write_eof()
            assert await reader.read() == body
            writer.close()
            await writer.wait_closed()

        await asyncio.gather(*(one() for _ in range(20)))
        server.close()
        await server.wait_closed()

    sim.run(main())


def test_abort_resets_the_peer(sim: SimWorld) -> None:
    async def main() -> None:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readexactly(1)
            writer.transport.abort()

        server = await sim.start_server(handler)
        reader, writer = await sim.open_connection(sim.port(server))
        writer.write(b"x" * 10)
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()
        with pytest.raises(ConnectionResetError):
            await writer.wait_closed()
        server.close()
        await server.wait_closed()

    sim.run(main())


def test_virtual_time_passes_only_in_the_loop(sim: SimWorld) -> None:
    async def main() -> tuple[float, int]:
        loop = asyncio.get_running_loop()
        start, before = loop.time(), sim.net.now_ns()
        await asyncio.sleep(3600)
        assert sim.net.now_ns() - before == pytest.approx(3600e9, abs=10)
        order = []

        async def at(when: float) -> None:
            await asyncio.sleep(when)
            order.append((when, round(loop.time() - start - 3600, 6)))

        await asyncio.gather(at(0.3), at(0.1), at(0.2))
        assert order == [(0.1, 0.1), (0.2, 0.2), (0.3, 0.3)]
        return loop.time() - start, len(order)

    assert sim.run(main())[0] == pytest.approx(3600.3)


def test_the_same_run_twice() -> None:
    def trace() -> list[tuple[int, int]]:
        world = SimWorld("virtual", Faults(loss=0.1, delay_ns=500_000, jitter_ns=300_000))
        seen: list[tuple[int, int]] = []

        async def main() -> None:
            server = await world.start_server(echo)
            reader, writer = await world.open_connection(world.port(server))
            for i in range(20):
                writer.write(bytes(1000 * i + 1))
                seen.append((len(await reader.readexactly(1000 * i + 1)), world.net.now_ns()))
            writer.close()
            await writer.wait_closed()
            server.close()
            await server.wait_closed()

        world.run(main())
        world.close()
        return seen

    assert trace() == trace()


def test_waiting_for_what_never_comes_is_an_error_in_virtual_time(sim: SimWorld) -> None:
    async def main() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(SimulationError, match="for ever"):
        sim.run(main())


def test_a_cancelled_connect_leaves_nothing() -> None:
    world = SimWorld("virtual")
    assert world.server.port is not None
    world.server.port.set_device_faults(DeviceFaults(down=True))

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(world.open_connection(80), 0.5)

    world.run(main())
    world.close()


def test_connect_to_nobody_fails_with_its_reason() -> None:
    world = SimWorld("virtual")

    async def main() -> None:
        with pytest.raises(OSError) as e:  # noqa: PT011
            await aio.open_connection(world.client, "10.0.0.77", 80)
        assert e.value.errno == errno.EHOSTUNREACH

    world.run(main())
    world.close()


def test_peer_that_vanishes_ends_the_connection(sim: SimWorld) -> None:
    """No answer at all: the retransmissions give up, and the stream says so."""

    async def main() -> None:
        server = await sim.start_server(patient)
        reader, writer = await sim.open_connection(sim.port(server))
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        assert sim.server.port is not None
        sim.server.port.set_device_faults(DeviceFaults(down=True))
        writer.write(b"into the void")
        with pytest.raises(OSError) as e:  # noqa: PT011
            await reader.read()
        assert e.value.errno in (errno.ETIMEDOUT, errno.EHOSTUNREACH)
        writer.close()
        sim.server.port.set_device_faults(DeviceFaults())
        server.close_clients()
        server.close()
        await server.wait_closed()

    sim.run(main())


def test_a_protocol_that_fails_loses_only_its_own_connection() -> None:
    world = SimWorld("virtual")

    class Faulty(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            if data == b"fail":
                raise RuntimeError("as asked for")
            self.transport.write(data)

    async def main() -> list[Any]:
        contexts: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: contexts.append(context))
        server = await aio.create_server(world.server, Faulty, world.ip, 80)
        good = [await world.open_connection(80) for _ in range(5)]
        bad_reader, bad_writer = await world.open_connection(80)
        bad_writer.write(b"fail")
        for _, writer in good:
            writer.write(b"fine")
        for reader, writer in good:
            assert await reader.readexactly(4) == b"fine"
            writer.close()
        with pytest.raises(ConnectionResetError):
            await bad_reader.read()
        bad_writer.close()
        server.close()
        await server.wait_closed()
        return contexts

    [context] = world.run(main())
    assert "as asked for" in str(context["exception"])
    world.close()


def test_a_stack_that_is_closed_ends_its_streams() -> None:
    world = SimWorld("virtual")

    async def main() -> None:
        ended: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: ended.append(context["message"]))
        server = await world.start_server(patient)
        reader, writer = await world.open_connection(world.port(server))
        transport, protocol = await aio.create_datagram_endpoint(
            world.client, Collect, local_addr=("10.0.0.1", 9)
        )
        world.client.close(linger=0)
        with pytest.raises(OSError, match="the stack is closed"):
            await reader.read()
        assert isinstance(await protocol.lost, OSError)
        assert transport.is_closing()
        writer.close()
        world.server.close(linger=0)
        await server.wait_closed()
        assert ended == ["server ended"]
        with pytest.raises(OSError, match="closed"):
            await world.open_connection(80)

    world.run(main())
    world.close()


@pytest.mark.parametrize("pace", ["virtual", "real"])
def test_a_loop_may_end_before_its_stack(pace: str) -> None:
    """Streams that nobody closed: the stack's end resets them."""
    world = SimWorld(pace)

    async def main() -> Streams:
        server = await world.start_server(patient)
        streams = await world.open_connection(world.port(server))
        streams[1].write(b"x")
        assert await streams[0].readexactly(1) == b"x"
        return streams

    kept = world.run(main())
    assert world.client.audit()["conns"] == 1
    world.net.close()
    assert kept[1].transport.get_extra_info("peername")[0] == world.ip


class Buffered(asyncio.BufferedProtocol):
    """Receives into its own buffer."""

    def __init__(self) -> None:
        self.buffer = bytearray(1000)
        self.received = bytearray()
        self.done = asyncio.get_running_loop().create_future()

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.received += self.buffer[:nbytes]

    def eof_received(self) -> None:
        self.done.set_result(bytes(self.received))


def test_buffered_protocols() -> None:
    world = SimWorld("virtual")
    body = random.Random(3).randbytes(50_000)

    async def main() -> None:
        async def handler(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(body)
            writer.close()

        server = await world.start_server(handler)
        transport, protocol = await aio.create_connection(
            world.client, Buffered, (world.ip, world.port(server)), local_addr=("10.0.0.1", 4000)
        )
        assert transport.get_extra_info("sockname") == ("10.0.0.1", 4000)
        assert isinstance(protocol, Buffered)
        assert await protocol.done == body
        server.close()
        await server.wait_closed()

    world.run(main())
    world.close()


def test_pause_and_resume_reading() -> None:
    world = SimWorld("virtual")

    async def main() -> None:
        async def handler(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"x" * 1000)
            await asyncio.sleep(1)
            writer.write(b"y" * 1000)
            writer.close()

        server = await world.start_server(handler)
        reader, writer = await world.open_connection(world.port(server))
        transport: Any = writer.transport
        assert transport.is_reading()
        transport.pause_reading()
        assert not transport.is_reading()
        await asyncio.sleep(5)
        assert not reader._buffer  # type: ignore[attr-defined]
        transport.resume_reading()
        assert await reader.read() == b"x" * 1000 + b"y" * 1000
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()

    world.run(main())
    world.close()


def test_bad_use_is_refused() -> None:
    world = SimWorld("virtual")

    async def main() -> None:
        server = await world.start_server(echo)
        with pytest.raises(OSError) as e:  # noqa: PT011
            await aio.start_server(world.server, echo, *server.address)
        assert e.value.errno == errno.EADDRINUSE
        with pytest.raises(OSError) as e:  # noqa: PT011
            await aio.start_server(world.server, echo, "203.0.113.1", 80)
        assert e.value.errno == errno.EADDRNOTAVAIL
        with pytest.raises(ValueError, match="address is needed"):
            await aio.create_datagram_endpoint(world.server, Collect)
        reader, writer = await world.open_connection(world.port(server))
        with pytest.raises(ValueError, match="high"):
            writer.transport.set_write_buffer_limits(high=1, low=2)
        writer.write_eof()
        with pytest.raises(RuntimeError, match="write_eof"):
            writer.write(b"x")
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        async with server:
            assert server.is_serving()
        assert not server.is_serving()

    world.run(main())
    assert world.server.audit()["listeners"] == 0
    world.close()


def test_blocking_sockets_and_asyncio_share_a_network() -> None:
    """The peer of an asyncio server may be a blocking socket in another thread, and no event is lost between them."""
    world = SimWorld("real")
    between_threads = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads change places in the middle of everything

    def ask(port: int) -> bytes:
        with world.client.create_connection((world.ip, port), timeout=30) as client:
            client.sendall(b"question")
            client.shutdown(socket.SHUT_WR)
            return client.recv(100, socket.MSG_WAITALL)

    async def main() -> None:
        server = await world.start_server(echo)
        answers = await asyncio.gather(*(asyncio.to_thread(ask, world.port(server)) for _ in range(20)))
        assert answers == [b"question"] * 20
        server.close()
        await server.wait_closed()

    try:
        world.run(main())
    finally:
        sys.setswitchinterval(between_threads)
    world.close()
