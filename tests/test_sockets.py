# SPDX-License-Identifier: Apache-2.0
"""bypass sockets behave as socket.socket does: the same test bodies run on the kernel's and on ours.

`world` gives both: the kernel's sockets on loopback, and two stacks on a simulated wire with a virtual clock.
"""

from __future__ import annotations

import errno
import random
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from bypass.core import Config
from bypass.sim import Faults, Network, SimulationError
from bypass.sockets import Socket


class World:
    """Sockets of one kind: at a server's host and at a client's."""

    ours = False
    server_ip = "127.0.0.1"
    client_ip = "127.0.0.1"

    def at_server(self, kind: int = socket.SOCK_STREAM) -> Any:
        return socket.socket(socket.AF_INET, kind)

    def at_client(self, kind: int = socket.SOCK_STREAM) -> Any:
        return socket.socket(socket.AF_INET, kind)

    def listener(self, backlog: int = 16) -> Any:
        s = self.at_server()
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind((self.server_ip, 0))
        s.listen(backlog)
        return s

    def pair(self) -> tuple[Any, Any]:
        """A connected client and its server side."""
        with self.listener() as server:
            client = self.at_client()
            client.connect(server.getsockname())
            connection, _ = server.accept()
        return client, connection


class SimWorld(World):
    ours = True
    server_ip = "10.0.0.2"
    client_ip = "10.0.0.1"

    def __init__(self) -> None:
        self.net = Network(seed=1)
        self.net.wire(faults=Faults(delay_ns=50_000))
        self.client = self.net.stack("10.0.0.1/24", name="client", config=Config(conns=64))
        self.server = self.net.stack("10.0.0.2/24", name="server", config=Config(conns=64))

    def at_server(self, kind: int = socket.SOCK_STREAM) -> Any:
        return self.server.socket(kind)

    def at_client(self, kind: int = socket.SOCK_STREAM) -> Any:
        return self.client.socket(kind)


@pytest.fixture(params=["kernel", "bypass"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    if request.param == "kernel":
        yield World()
        return
    sim = SimWorld()
    yield sim
    # TIME_WAIT has to pass before everything is given back.
    sim.net.run(duration_ns=300 * 10**9)
    left = sim.net.leaks()
    sim.net.close()
    assert not left


@pytest.fixture
def sim() -> Iterator[SimWorld]:
    it = SimWorld()
    yield it
    it.net.close()


# ---- The same on both ----------------------------------------------------------------------------------------------


def test_an_urgent_byte_comes_out_of_band(world: World) -> None:
    client, connection = world.pair()
    with client, connection:
        client.send(b"before!", socket.MSG_OOB)
        assert connection.recv(100) == b"before"
        assert connection.recv(100, socket.MSG_OOB) == b"!"
        with pytest.raises(OSError, match="Invalid argument"):
            connection.recv(1, socket.MSG_OOB)
        client.send(b"behind")
        assert connection.recv(100) == b"behind"


def test_an_error_waits_until_what_was_read_before_it_is_told(world: World) -> None:
    client, connection = world.pair()
    with client, connection:
        client.sendall(b"last words")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        assert connection.recv(100, socket.MSG_WAITALL) == b"last words"
        with pytest.raises(ConnectionResetError):
            connection.recv(100)
        assert connection.recv(100) == b""


def test_echo_with_names_and_addresses(world: World) -> None:
    with world.listener() as server:
        assert server.getsockname()[0] == world.server_ip
        assert server.getsockname()[1] > 0
        with world.at_client() as client:
            client.connect(server.getsockname())
            connection, peer = server.accept()
            with connection:
                assert peer == client.getsockname()
                assert client.getpeername() == server.getsockname() == connection.getsockname()
                assert connection.getpeername() == client.getsockname()
                assert client.send(b"ping") == 4
                assert connection.recv(100) == b"ping"
                connection.sendall(b"pong")
                assert client.recv(2) == b"po"
                assert client.recv(100) == b"ng"


def test_end_of_stream_after_shutdown_and_answers_still_pass(world: World) -> None:
    client, connection = world.pair()
    with client, connection:
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        received = b""
        while piece := connection.recv(3):
            received += piece
        assert received == b"question"
        connection.sendall(b"answer")
        assert client.recv(100) == b"answer"
        with pytest.raises(BrokenPipeError):
            client.send(b"too late")
        connection.close()
        assert client.recv(100) == b""


def test_refused_connection(world: World) -> None:
    with world.at_server() as placeholder:
        placeholder.bind((world.server_ip, 0))
        address = placeholder.getsockname()
        with world.at_client() as client, pytest.raises(ConnectionRefusedError) as e:
            client.connect(address)
        assert e.value.errno == errno.ECONNREFUSED
        with world.at_client() as client:
            assert client.connect_ex(address) == errno.ECONNREFUSED


def test_nonblocking_calls_say_that_they_would_block(world: World) -> None:
    with world.listener() as server:
        server.setblocking(False)
        assert server.getblocking() is False
        assert server.gettimeout() == 0
        with pytest.raises(BlockingIOError):
            server.accept()
    client, connection = world.pair()
    with client, connection:
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(1)
        with pytest.raises(BlockingIOError):
            client.recv_into(bytearray(10))
        connection.setblocking(True)
        with pytest.raises(BlockingIOError):
            connection.recv(1, socket.MSG_DONTWAIT)
        sent = 0
        with pytest.raises(BlockingIOError):  # noqa: PT012 - until the buffers are full
            while True:
                sent += client.send(bytes(65536))
        assert sent > 0
        received = 0
        while received < sent:
            received += len(connection.recv(1 << 16))
        client.setblocking(True)
        client.sendall(b"room again")
        assert connection.recv(100) == b"room again"


def test_timeouts(world: World) -> None:
    client, connection = world.pair()
    with client, connection:
        client.settimeout(0.05)
        assert client.gettimeout() == client.timeout == 0.05
        with pytest.raises(TimeoutError, match="timed out"):
            client.recv(1)
        connection.sendall(b"x")
        assert client.recv(1) == b"x"
        with pytest.raises(ValueError, match="out of range"):
            client.settimeout(-1)
    with world.listener() as server:
        server.settimeout(0.05)
        with pytest.raises(TimeoutError):
            server.accept()
    with world.at_server(socket.SOCK_DGRAM) as udp:
        udp.bind((world.server_ip, 0))
        udp.settimeout(0.05)
        with pytest.raises(TimeoutError):
            udp.recvfrom(10)


def test_peek_waitall_and_buffers(world: World) -> None:
    client, connection = world.pair()
    with client, connection:
        client.sendall(b"0123456789")
        assert connection.recv(4, socket.MSG_PEEK) == b"0123"
        assert connection.recv(4) == b"0123"
        buffer = bytearray(b"........")
        assert connection.recv_into(buffer, 3) == 3
        assert buffer == b"456....."
        with memoryview(buffer) as view:
            assert connection.recv_into(view[4:]) == 3
        assert buffer == b"456.789."
        client.sendall(b"abc")
        client.shutdown(socket.SHUT_WR)
        assert connection.recv(100, socket.MSG_WAITALL) == b"abc", "the end of the stream ends it"
        assert connection.recv(10) == b""
        assert connection.recvfrom(10) == (b"", None)
        with pytest.raises(ValueError, match="negative"):
            connection.recv(-1)


def test_more_than_all_buffers_passes_in_both_directions(world: World) -> None:
    rng = random.Random(1)
    client, connection = world.pair()
    up, down = rng.randbytes(3_000_000), rng.randbytes(2_000_000)
    with client, connection:
        for sock in (client, connection):
            sock.setblocking(False)
        received = {client: bytearray(), connection: bytearray()}
        queued = {client: memoryview(up), connection: memoryview(down)}
        while len(received[connection]) < len(up) or len(received[client]) < len(down):
            for sock in (client, connection):
                try:
                    while queued[sock]:
                        queued[sock] = queued[sock][sock.send(queued[sock][:50_000]) :]
                except BlockingIOError:
                    pass
                try:
                    while True:
                        received[sock] += sock.recv(100_000)
                except BlockingIOError:
                    pass
            if world.ours:
                world.net.run(duration_ns=100_000)  # type: ignore[attr-defined]
        assert received[connection] == up
        assert received[client] == down


def test_files(world: World) -> None:
    client, connection = world.pair()
    with connection.makefile("rw", newline="\n", encoding="utf-8") as text, client.makefile("rwb") as binary:
        connection.close()  # the file keeps it open
        text.write("first\nsecond\n")
        text.flush()
        assert binary.readline() == b"first\n"
        assert binary.readline() == b"second\n"
        binary.write("grüß\n".encode())
        binary.flush()
        assert text.readline() == "grüß\n"
    client.close()
    with pytest.raises(ValueError, match="mode"):
        client.makefile("a")


def test_options(world: World) -> None:
    client, connection = world.pair()
    with client, connection:
        for level, option, value in (
            (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 77),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 7),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
            (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 12345),
            (socket.IPPROTO_IP, socket.IP_TTL, 33),
        ):
            client.setsockopt(level, option, value)
            assert client.getsockopt(level, option) == value, (level, option)
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_STREAM
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) > 4096
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 4) == struct.pack("i", 1)
        linger = struct.pack("ii", 1, 5)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == linger
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
        with pytest.raises(OSError, match="not available"):
            client.setsockopt(socket.SOL_SOCKET, 4711, 1)
        with pytest.raises(OSError, match="not available"):
            client.getsockopt(socket.SOL_SOCKET, 4711)


def test_linger_zero_resets(world: World) -> None:
    client, connection = world.pair()
    with connection:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        with pytest.raises(ConnectionResetError):
            connection.recv(10)


def test_closing_with_unread_data_resets(world: World) -> None:
    client, connection = world.pair()
    with connection:
        connection.sendall(b"never read")
        assert client.recv(1, socket.MSG_PEEK) == b"n"
        client.close()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):  # noqa: PT012 - the reset may take a moment
            for _ in range(3):
                connection.recv(10)
                connection.send(b"x")


def test_closed_sockets_say_so(world: World) -> None:
    client, connection = world.pair()
    connection.close()
    client.close()
    client.close()
    assert client.fileno() == -1
    for call in (
        lambda: client.recv(1),
        lambda: client.send(b"x"),
        lambda: client.getsockname(),
        lambda: client.bind(("", 0)),
        lambda: client.shutdown(socket.SHUT_RDWR),
    ):
        with pytest.raises(OSError) as e:  # noqa: PT011 - errno is looked at
            call()
        assert e.value.errno == errno.EBADF


def test_unconnected_and_double_use(world: World) -> None:
    with world.at_client() as sock:
        for call in (lambda: sock.recv(1), lambda: sock.getpeername(), lambda: sock.shutdown(socket.SHUT_WR)):
            with pytest.raises(OSError) as e:  # noqa: PT011
                call()
            assert e.value.errno == errno.ENOTCONN
        with pytest.raises(BrokenPipeError):
            sock.send(b"x")
        with pytest.raises(OSError) as e:  # noqa: PT011
            sock.accept()
        assert e.value.errno == errno.EINVAL
    with world.listener() as server, world.at_server() as second:
        with pytest.raises(OSError) as e:  # noqa: PT011
            second.bind(server.getsockname())
        assert e.value.errno == errno.EADDRINUSE
        with pytest.raises(OSError) as e:  # noqa: PT011
            server.bind((world.server_ip, 0))
        assert e.value.errno == errno.EINVAL
    client, connection = world.pair()
    with client, connection:
        with pytest.raises(OSError) as e:  # noqa: PT011
            client.connect((world.server_ip, 1))
        assert e.value.errno == errno.EISCONN
    with world.at_client() as sock:
        with pytest.raises(OSError) as e:  # noqa: PT011
            sock.bind(("203.0.113.99", 0))
        assert e.value.errno == errno.EADDRNOTAVAIL


def test_datagrams(world: World) -> None:
    with world.at_server(socket.SOCK_DGRAM) as server, world.at_client(socket.SOCK_DGRAM) as client:
        server.bind((world.server_ip, 0))
        assert client.sendto(b"one", server.getsockname()) == 3
        assert client.sendto(b"", 0, server.getsockname()) == 0
        assert client.sendto(b"three" * 1000, server.getsockname()) == 5000
        data, peer = server.recvfrom(100)
        assert (data, peer[1]) == (b"one", client.getsockname()[1])
        assert server.recvfrom(100)[0] == b""
        assert server.recv(10) == b"threethree", "the rest of a datagram is cut off"
        server.sendto(b"back", peer)
        buffer = bytearray(10)
        assert client.recvfrom_into(buffer) == (4, server.getsockname())
        assert buffer[:4] == b"back"
        client.connect(server.getsockname())
        assert client.getpeername() == server.getsockname()
        client.send(b"connected")
        assert server.recv(100) == b"connected"
        with pytest.raises(OSError) as e:  # noqa: PT011
            client.send(bytes(70_000))
        assert e.value.errno == errno.EMSGSIZE
    with world.at_client(socket.SOCK_DGRAM) as client, pytest.raises(OSError) as e:  # noqa: PT011
        client.send(b"nowhere")
    assert e.value.errno == errno.EDESTADDRREQ


def test_who_would_wait_for_datagrams_after_shutdown_gets_nothing(world: World) -> None:
    with world.at_client(socket.SOCK_DGRAM) as sock:
        sock.connect((world.server_ip, 9))
        sock.shutdown(socket.SHUT_RD)
        assert sock.recvfrom(10) == (b"", None)
        with pytest.raises(BlockingIOError):
            sock.recv(10, socket.MSG_DONTWAIT)


def test_datagram_to_a_closed_port_is_refused(world: World) -> None:
    with world.at_server(socket.SOCK_DGRAM) as placeholder:
        placeholder.bind((world.server_ip, 0))
        address = placeholder.getsockname()
    with world.at_client(socket.SOCK_DGRAM) as client:
        client.connect(address)
        client.settimeout(2)
        client.send(b"anybody?")
        with pytest.raises(ConnectionRefusedError):
            client.recv(10)


def test_backlog_and_accept_order(world: World) -> None:
    with world.listener() as server:
        clients = []
        for _ in range(10):
            client = world.at_client()
            client.connect(server.getsockname())
            clients.append(client)
        for client in clients:
            connection, peer = server.accept()
            assert peer == client.getsockname()
            connection.close()
        for client in clients:
            assert client.recv(1) == b""
            client.close()


# ---- Ours alone ----------------------------------------------------------------------------------------------------


def test_timeouts_are_of_the_virtual_clock(sim: SimWorld) -> None:
    client, connection = sim.pair()
    with client, connection:
        client.settimeout(3600)
        before = sim.net.now_ns()
        with pytest.raises(TimeoutError):
            client.recv(1)
        assert 3600 * 10**9 <= sim.net.now_ns() - before < 3601 * 10**9


def test_a_call_that_could_never_return_fails_instead(sim: SimWorld) -> None:
    client, connection = sim.pair()
    with client, connection, pytest.raises(SimulationError, match="for ever"):
        client.recv(1)


def test_threads_share_a_stack() -> None:
    """Each thread serves or asks with blocking calls; the network follows real time."""
    net = Network(seed=1, pace="real")
    a, b = net.stack("10.0.0.1/24"), net.stack("10.0.0.2/24")
    n, rounds = 8, 25
    errors: list[BaseException] = []

    def serve(server: Socket) -> None:
        try:
            for _ in range(rounds):
                with server.accept()[0] as connection:
                    while data := connection.recv(1000):
                        connection.sendall(data)
        except BaseException as e:  # noqa: BLE001 - shown below
            errors.append(e)

    def ask(port: int) -> None:
        try:
            for i in range(rounds):
                with a.create_connection(("10.0.0.2", port), timeout=60) as client:
                    body = random.Random(i).randbytes(3000)
                    client.sendall(body)
                    client.shutdown(socket.SHUT_WR)
                    assert client.recv(3000, socket.MSG_WAITALL) == body
        except BaseException as e:  # noqa: BLE001
            errors.append(e)

    servers = [b.create_server(("10.0.0.2", 1000 + i)) for i in range(n)]
    threads = [threading.Thread(target=serve, args=(s,)) for s in servers]
    threads += [threading.Thread(target=ask, args=(1000 + i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(t.is_alive() for t in threads)
    assert not errors
    for server in servers:
        server.close()
    net.close()


def test_close_by_another_thread_ends_a_call_that_waits() -> None:
    net = Network(seed=1, pace="real")
    stack = net.stack("10.0.0.1/24")
    server = stack.create_server(("10.0.0.1", 80))
    result: list[BaseException] = []

    def wait() -> None:
        try:
            server.accept()
        except OSError as e:
            result.append(e)

    thread = threading.Thread(target=wait)
    thread.start()
    server.close()
    thread.join(30)
    assert not thread.is_alive()
    assert [e.errno for e in result if isinstance(e, OSError)] == [errno.EBADF]
    net.close()


def test_forgotten_sockets_warn_and_are_closed(sim: SimWorld) -> None:
    sock = sim.server.socket()
    assert sim.server.audit()["handles"] == 1
    with pytest.warns(ResourceWarning, match="unclosed"):
        del sock
    with sim.server.socket():
        assert sim.server.audit()["handles"] == 1


def test_stack_close_delivers_what_was_sent(sim: SimWorld) -> None:
    with sim.listener() as server:
        client = sim.client.create_connection(server.getsockname())
        connection, _ = server.accept()
    body = random.Random(4).randbytes(300_000)
    connection.settimeout(10)
    client.setblocking(False)
    sent = client.send(body)
    sim.client.close(linger=5)
    received = bytearray()
    while piece := connection.recv(1 << 16):
        received += piece
    assert received == body[:sent]
    connection.close()
    sim.client.close()
    with pytest.raises(OSError) as e:  # noqa: PT011
        client.send(b"x")
    assert e.value.errno == errno.EBADF
    client.close()
    with pytest.raises(OSError, match="closed"):
        sim.client.socket()


def test_stack_close_resets_what_does_not_end(sim: SimWorld) -> None:
    """A peer that never reads: after the linger time it gets a reset."""
    client, connection = sim.pair()
    client.setblocking(False)
    with pytest.raises(BlockingIOError):  # noqa: PT012
        while True:
            client.send(bytes(100_000))
            sim.net.run(duration_ns=1_000_000)
    before = sim.net.now_ns()
    sim.client.close(linger=2)
    assert sim.net.now_ns() - before < 3 * 10**9
    connection.settimeout(60)
    with pytest.raises(ConnectionResetError):  # noqa: PT012
        while connection.recv(1 << 16):
            pass
    client.close()
    connection.close()


def test_run_waits_for_a_condition(sim: SimWorld) -> None:
    client, connection = sim.pair()
    with client, connection:
        assert not sim.server.run(timeout=1.0)
        client.sendall(b"x")
        assert sim.server.run(lambda: sim.server.core.ready(connection._handle) & 1 == 1, timeout=5)
        assert connection.recv(1) == b"x"


def test_names_are_not_resolved(sim: SimWorld) -> None:
    with sim.at_client() as client, pytest.raises(socket.gaierror, match="not an IP address"):
        client.connect(("localhost", 80))


def test_keyboard_interrupt_leaves_everything_usable(sim: SimWorld) -> None:
    import signal

    net = Network(seed=1, pace="real")
    stack = net.stack("10.0.0.1/24")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        with stack.create_server(("10.0.0.1", 80)) as server:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(KeyboardInterrupt):
                server.accept()
            server.settimeout(0.01)
            with pytest.raises(TimeoutError):
                server.accept()
    finally:
        signal.signal(signal.SIGALRM, old)
        net.close()
