# SPDX-License-Identifier: Apache-2.0
"""Sockets that do not copy: views of frames, and what keeps a frame from being used again while somebody looks."""

from __future__ import annotations

import array
import gc
import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from bypass import Stack
from bypass.sim import Network
from bypass.sockets import Socket
from bypass.zerocopy import TCP_KEEP_FRAMES, SendBuffer

MB = 1_000_000


@dataclass
class World:
    net: Network
    server: Stack
    client: Stack
    a: Socket  # the client's end
    b: Socket  # the server's

    def copied(self) -> int:
        """Payload bytes that the stacks have copied, both together."""
        return sum(s.stats()["tcp_copied_bytes"] for s in (self.server, self.client))


@pytest.fixture
def world() -> Iterator[World]:
    with Network(seed=1) as net:
        net.wire()
        server, client = net.stack("10.0.0.2"), net.stack("10.0.0.1")
        listener = server.create_server(("10.0.0.2", 80))
        a = client.create_connection(("10.0.0.2", 80), timeout=5)
        b, _ = listener.accept()
        b.settimeout(5)
        for s in (a, b):
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield World(net, server, client, a, b)
        for s in (a, b, listener):
            s.close()


def fill(sock: Socket, data: bytes) -> list[SendBuffer]:
    """Buffers with these bytes, written in place."""
    buffers = []
    while data:
        [buffer] = sock.alloc_zc()
        n = buffer.write(data)
        buffers.append(buffer)
        data = data[n:]
    return buffers


def noise(n: int) -> bytes:
    return random.Random(n).randbytes(n)


# ---- receiving
def test_a_view_shows_the_bytes_and_the_frame_goes_back_behind_the_block(world: World) -> None:
    data = noise(5000)
    world.a.sendall(data)
    got = b""
    while len(got) < len(data):
        with world.b.recv_zc() as pieces:
            assert world.server.audit()["lent"] == len(pieces) > 0
            assert pieces.nbytes == sum(len(v) for v in pieces)
            got += b"".join(pieces)
        assert world.server.audit()["lent"] == 0
    assert got == data


def test_a_view_cannot_be_written(world: World) -> None:
    world.a.sendall(noise(1000))
    with world.b.recv_zc() as pieces:
        assert pieces[0].readonly
        with pytest.raises(TypeError, match="read-only"):
            pieces[0][0] = 0


def test_views_end_with_the_block(world: World) -> None:
    world.a.sendall(noise(1000))
    with world.b.recv_zc() as pieces:
        view = pieces[0]
    with pytest.raises(ValueError, match="released"):
        view[0]
    assert (len(pieces), list(pieces)) == (0, [])


def keep_slice(view: memoryview) -> Any:
    return view[10:20]


def keep_array(view: memoryview) -> Any:
    return memoryview(view).cast("B")


def keep_iterator(view: memoryview) -> Any:
    return iter(view[5:])


@pytest.mark.parametrize("keep", [keep_slice, keep_array, keep_iterator])
def test_a_frame_that_somebody_looks_at_stays_out_until_nobody_does(world: World, keep: Any) -> None:
    data = noise(1000)
    world.a.sendall(data)
    with pytest.raises(BufferError, match="1 buffers are looked into"), world.b.recv_zc() as pieces:
        kept = keep(pieces[0])
    for _ in range(50):  # many a frame comes and goes
        world.a.sendall(noise(1000))
        assert world.b.recv(1000) == noise(1000)
    assert world.server.audit()["lent"] == 1
    seen = bytes(kept)
    assert seen
    assert seen in data
    del kept
    world.a.sendall(b"x" * 300)
    with world.b.recv_zc():
        assert world.server.audit()["lent"] == 1
    assert world.server.audit()["lent"] == 0


def test_an_error_inside_the_block_is_the_one_to_see(world: World) -> None:
    world.a.sendall(noise(1000))
    parts = []

    def fail() -> None:
        with world.b.recv_zc() as pieces:
            parts.append(pieces[0][1:])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert world.server.audit()["lent"] == 1
    parts.clear()
    gc.collect()
    with pytest.raises(BlockingIOError):
        world.b.recv_zc(flags=socket.MSG_DONTWAIT)
    assert world.server.audit()["lent"] == 0


def test_what_is_forgotten_goes_back_by_itself(world: World) -> None:
    """A program that never releases, but forgets, does not stop its peer."""
    data = noise(MB)
    sent, got = 0, b""
    while len(got) < len(data):
        if sent < len(data):
            sent += world.a.send(data[sent : sent + 50_000])
        got += b"".join(world.b.recv_zc())
    assert got == data
    assert world.server.audit()["lent"] < 64


def test_the_end_of_the_stream_is_an_empty_sequence(world: World) -> None:
    world.a.sendall(b"x")
    world.a.shutdown(socket.SHUT_WR)
    with world.b.recv_zc() as pieces:
        assert bytes(pieces[0]) == b"x"
    with world.b.recv_zc() as pieces:
        assert (len(pieces), pieces.nbytes) == (0, 0)


def test_errors_are_those_of_recv(world: World) -> None:
    with pytest.raises(BlockingIOError):
        world.b.recv_zc(flags=socket.MSG_DONTWAIT)
    world.b.settimeout(0.5)
    with pytest.raises(TimeoutError):
        world.b.recv_zc()
    with pytest.raises(OSError, match="not supported"):
        world.b.recv_zc(flags=socket.MSG_PEEK)
    with world.server.socket(socket.SOCK_DGRAM) as udp, pytest.raises(OSError, match="not supported"):
        udp.recv_zc()
    world.b.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        world.b.recv_zc()


def test_the_mark_of_urgent_data_is_an_error_that_recv_solves(world: World) -> None:
    world.a.sendall(b"before")
    world.a.send(b"!", socket.MSG_OOB)
    with pytest.raises(OSError, match="Message too long"):
        world.b.recv_zc()
    assert world.b.recv(100) == b"before"


def test_views_outlive_their_socket(world: World) -> None:
    data = noise(1000)
    world.a.sendall(data)
    with world.b.recv_zc() as pieces:
        world.b.close()
        world.a.close()
        assert bytes(pieces[0]) == data


def test_a_stack_is_not_closed_under_somebodys_eyes(world: World) -> None:
    """Its memory goes with it: what nobody looks at ends, a view in use makes closing fail, nothing is lost."""
    data = noise(1000)
    world.a.sendall(data)
    pieces = world.b.recv_zc()
    part = pieces[0][:10]
    with pytest.raises(BufferError, match="1 lent buffers"):
        world.server.close()
    with pytest.raises(BufferError, match="1 lent buffers"):
        world.net.close()
    assert bytes(part) == data[:10]
    world.a.sendall(b"still there")
    assert world.b.recv(100) == b"still there"
    del part
    world.server.close()
    with pytest.raises(ValueError, match="released"):
        pieces[0]
    pieces.release()


def test_a_stack_that_closes_takes_back_what_nobody_looks_at(world: World) -> None:
    world.a.sendall(noise(1000))
    pieces, [buffer] = world.b.recv_zc(), world.b.alloc_zc()
    world.server.close()
    assert world.server.port is not None
    assert world.server.port.stats().held == 0
    with pytest.raises(ValueError, match="released"):
        buffer.write(b"x")
    pieces.release()
    buffer.release()


# ---- sending
def test_buffers_arrive_as_they_were_written(world: World) -> None:
    data = noise(10_000)
    buffers = fill(world.a, data)
    assert world.client.audit()["lent"] == len(buffers) == 7
    assert world.a.send_zc(buffers) == len(buffers)
    assert world.client.audit()["lent"] == 0
    assert world.b.recv(len(data), socket.MSG_WAITALL) == data


def test_a_buffer_is_written_in_place(world: World) -> None:
    [buffer] = world.a.alloc_zc()
    with buffer.data as view:
        assert (len(view), view.readonly) == (buffer.size, False)
        view[:5] = b"hello"
    buffer.used = 5
    assert world.a.send_zc([buffer]) == 1
    assert world.b.recv(100) == b"hello"
    with pytest.raises(ValueError, match="sent"):
        _ = buffer.data
    with pytest.raises(ValueError, match="sent"):
        world.a.send_zc([buffer])


def test_a_buffer_that_somebody_can_still_write_is_not_sent(world: World) -> None:
    first, second = world.a.alloc_zc(2)
    for b in (first, second):
        b.write(b"abc")
    part = second.data[:1]
    with pytest.raises(BufferError, match="somebody else"):
        world.a.send_zc([first, second])
    del part
    second.write(b"def")
    assert world.a.send_zc([first, second]) == 2
    assert world.b.recv(9, socket.MSG_WAITALL) == b"abcabcdef"


def test_a_buffer_comes_once_in_a_call(world: World) -> None:
    [buffer] = world.a.alloc_zc()
    buffer.write(b"abc")
    with pytest.raises(ValueError, match="sent"):
        world.a.send_zc([buffer, buffer])
    assert world.a.send_zc([buffer]) == 1
    assert world.b.recv(9) == b"abc"


@pytest.mark.parametrize("used", [0, -1, 1461])
def test_a_buffer_has_as_many_bytes_as_fit(world: World, used: int) -> None:
    [buffer] = world.a.alloc_zc()
    buffer.used = used
    with pytest.raises((OSError, OverflowError)):
        world.a.send_zc([buffer])
    assert world.client.audit()["lent"] == 1
    buffer.release()
    assert world.client.audit()["lent"] == 0


def test_what_is_not_sent_goes_back(world: World) -> None:
    with world.a.alloc_zc()[0] as buffer:
        buffer.write(b"never mind")
        assert world.client.audit()["lent"] == 1
    assert world.client.audit()["lent"] == 0
    world.a.alloc_zc(3)  # forgotten
    world.a.alloc_zc()[0].release()
    assert world.client.audit()["lent"] == 0


def test_a_full_send_buffer_takes_a_part_and_then_waits(world: World) -> None:
    world.a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 20_000)
    world.b.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 20_000)
    data = noise(100_000)
    world.a.settimeout(0.5)
    sent, n = b"", 1
    while n:
        buffers = fill(world.a, data[len(sent) : len(sent) + 30_000])
        try:
            n = world.a.send_zc(buffers)
        except TimeoutError:
            n = 0
        for buffer in buffers[n:]:  # still ours
            assert bytes(buffer.data[: buffer.used]) in data
            buffer.release()
        sent += data[len(sent) :][: sum(b.used for b in buffers[:n])]
    assert 20_000 <= len(sent) < len(data)
    [buffer] = fill(world.a, b"x")
    with pytest.raises(BlockingIOError):
        world.a.send_zc([buffer], socket.MSG_DONTWAIT)
    buffer.release()
    assert world.b.recv(len(sent), socket.MSG_WAITALL) == sent


def test_too_many_buffers_are_refused(world: World) -> None:
    held = world.a.alloc_zc(1 << 16)
    with pytest.raises(OSError, match="No buffer space"):
        world.a.alloc_zc()
    world.a.sendall(b"others go on")
    assert world.b.recv(100) == b"others go on"
    for b in held:
        b.release()


# ---- the budget
def all_of_it(here: Socket, there: Socket, n: int, at_once: int) -> None:
    """n bytes without copies, `at_once` in buffers at a time."""
    data = noise(n)
    rest, got = data, bytearray()
    while len(got) < n:
        buffers = fill(here, rest[:at_once])
        taken = here.send_zc(buffers) if buffers else 0
        rest = rest[sum(b.used for b in buffers[:taken]) :]
        for buffer in buffers[taken:]:
            buffer.release()
        with there.recv_zc() as pieces:
            for view in pieces:
                got += view
    assert got == data


@pytest.mark.parametrize(("keep", "at_once"), [(False, 64 * 1448), (True, 100_000), (True, 100)])
def test_no_byte_that_is_delivered_was_copied(world: World, keep: bool, at_once: int) -> None:
    """Payload bytes that both stacks copied per byte delivered: 0. Payloads of 256 bytes and less are copied out of
    their frames unless TCP_KEEP_FRAMES is set."""
    for here, there in ((world.a, world.b), (world.b, world.a)):
        there.setsockopt(socket.IPPROTO_TCP, TCP_KEEP_FRAMES, keep)
        all_of_it(here, there, MB if at_once > 100 else 20_000, at_once)
    assert world.copied() == 0
    assert (world.server.audit()["lent"], world.client.audit()["lent"]) == (0, 0)


def test_plain_calls_copy_each_byte_once_each_way(world: World) -> None:
    """send() into a frame, recv() out of it: two stacks, two copies, one each."""
    for here, there in ((world.a, world.b), (world.b, world.a)):
        data = noise(MB)
        sender, receiver = (s.stack.stats()["tcp_copied_bytes"] for s in (here, there))
        at, got, target = 0, bytearray(), bytearray(65536)
        while len(got) < len(data):
            at += here.send(data[at : at + 100_000]) if at < len(data) else 0
            n = there.recv_into(target)
            got += target[:n]
        assert got == data
        assert here.stack.stats()["tcp_copied_bytes"] - sender == len(data)
        assert there.stack.stats()["tcp_copied_bytes"] - receiver == len(data)


def test_an_array_of_a_view_keeps_the_frame(world: World) -> None:
    """Whatever takes the buffer protocol, not only memoryviews."""
    world.a.sendall(array.array("I", range(300)).tobytes())
    pieces = world.b.recv_zc()
    numbers = pieces[0].cast("I")
    with pytest.raises(BufferError):
        pieces.release()
    assert list(numbers) == list(range(300))
