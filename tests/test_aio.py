# SPDX-License-Identifier: Apache-2.0
"""bypass.aio behaves as asyncio's own: the same coroutines run over the kernel and over a stack.

Ours run twice: in virtual time (aio.run), and on an ordinary loop with a network whose clock follows real time.
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Iterator

import pytest
from aio_worlds import Collect, SimWorld, World, echo

from bypass.sim import Faults


@pytest.fixture(params=["kernel", "virtual", "real"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    if request.param == "kernel":
        yield World()
    else:
        it = SimWorld(request.param, Faults(delay_ns=20_000))
        yield it
        it.close()


def test_echo_and_half_close(world: World) -> None:
    async def main() -> None:
        server = await world.start_server(echo)
        reader, writer = await world.open_connection(world.port(server))
        assert type(reader) is asyncio.StreamReader
        assert type(writer) is asyncio.StreamWriter
        writer.write(b"line one\n")
        assert await reader.readline() == b"line one\n"
        writer.writelines([b"two ", b"and ", b"three"])
        assert writer.can_write_eof()
        writer.write_eof()
        assert await reader.read() == b"two and three"
        assert reader.at_eof()
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()

    world.run(main())


def test_addresses_and_extra_info(world: World) -> None:
    async def main() -> None:
        seen = asyncio.get_running_loop().create_future()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            seen.set_result((writer.get_extra_info("peername"), writer.get_extra_info("sockname")))
            writer.close()

        server = await world.start_server(handler)
        _, writer = await world.open_connection(world.port(server))
        names = writer.get_extra_info("sockname"), writer.get_extra_info("peername")
        assert await seen == names
        assert names[1] == (world.ip, world.port(server))
        assert writer.get_extra_info("nothing", 7) == 7
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()

    world.run(main())


def test_big_bodies_both_ways_at_once(world: World) -> None:
    rng = random.Random(1)
    up, down = rng.randbytes(8_000_000), rng.randbytes(5_000_000)

    async def main() -> None:
        received = asyncio.get_running_loop().create_future()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(down)
            writer.write_eof()
            received.set_result(await reader.read())
            writer.close()

        server = await world.start_server(handler)
        reader, writer = await world.open_connection(world.port(server))

        async def upload() -> None:
            for at in range(0, len(up), 100_000):
                writer.write(up[at : at + 100_000])
                await writer.drain()
            writer.write_eof()

        task = asyncio.create_task(upload())
        assert await reader.read() == down
        await task
        assert await received == up
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()

    world.run(main())


def test_a_slow_reader_holds_the_writer_back(world: World) -> None:
    async def main() -> None:
        go_on = asyncio.Event()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await go_on.wait()
            body = await reader.read()
            writer.write(str(len(body)).encode())
            writer.close()

        server = await world.start_server(handler, limit=10_000)
        reader, writer = await world.open_connection(world.port(server))
        writer.transport.set_write_buffer_limits(high=100_000)
        written = 0
        while True:
            writer.write(bytes(500_000))
            written += 500_000
            try:
                await asyncio.wait_for(writer.drain(), 0.5)
            except TimeoutError:
                break
            assert written < 100_000_000, "nothing ever held the writer back"
        low, _ = writer.transport.get_write_buffer_limits()  # type: ignore[attr-defined]
        assert writer.transport.get_write_buffer_size() > low
        go_on.set()
        writer.write_eof()
        assert await reader.read() == str(written).encode()
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()

    world.run(main())


def test_refused(world: World) -> None:
    async def main() -> None:
        server = await world.start_server(echo)
        port = world.port(server)
        server.close()
        await server.wait_closed()
        with pytest.raises(ConnectionRefusedError) as e:
            await world.open_connection(port)
        assert e.value.errno == errno.ECONNREFUSED

    world.run(main())


def test_cancelled_reads_and_timeouts_leave_the_stream_usable(world: World) -> None:
    async def main() -> None:
        server = await world.start_server(echo)
        reader, writer = await world.open_connection(world.port(server))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.readexactly(1), 0.05)
        task = asyncio.create_task(reader.readline())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        writer.write(b"still there\n")
        assert await reader.readline() == b"still there\n"
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()

    world.run(main())


def test_hundreds_of_connections_at_once(world: World) -> None:
    async def main() -> None:
        server = await world.start_server(echo, backlog=500)

        async def one(i: int) -> None:
            reader, writer = await world.open_connection(world.port(server))
            body = random.Random(i).randbytes(1 + 37 * i)
            writer.write(body)
            assert await reader.readexactly(len(body)) == body
            writer.close()
            await writer.wait_closed()

        await asyncio.gather(*(one(i) for i in range(300)))
        server.close()
        await server.wait_closed()

    world.run(main())


def test_a_failing_handler_is_reported_and_the_server_goes_on(world: World) -> None:
    async def main() -> list[str]:
        messages: list[str] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: messages.append(context["message"]))

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                if await reader.readline() == b"fail\n":
                    raise RuntimeError("as asked for")
                writer.write(b"fine")
            finally:
                writer.close()

        server = await world.start_server(handler)
        for word, answer in ((b"fail\n", b""), (b"work\n", b"fine")):
            reader, writer = await world.open_connection(world.port(server))
            writer.write(word)
            assert await reader.read() == answer
            writer.close()
            await writer.wait_closed()
        server.close()
        await server.wait_closed()
        return messages

    assert len(world.run(main())) == 1


def test_datagrams(world: World) -> None:
    async def main() -> None:
        server, protocol = await world.datagrams(lambda: Collect(answer=True), local_addr=(world.ip, 0))
        address = server.get_extra_info("sockname")
        client, answers = await world.datagrams(Collect, remote_addr=address)
        assert client.get_extra_info("peername") == address
        for i in range(100):
            client.sendto(b"ping %d" % i)
            assert await answers.got.get() == b"PING %d" % i
        assert protocol.got.qsize() == 100
        server.close()
        assert await protocol.lost is None
        client.sendto(b"anybody?")
        error = await answers.got.get()
        assert isinstance(error, ConnectionRefusedError)
        client.close()
        assert client.is_closing()
        assert await answers.lost is None

    world.run(main())
