# SPDX-License-Identifier: Apache-2.0
"""Sockets of a stack on a live interface: grants, reserved ports, live entries and their ends. The peer is Linux.

Everything runs in this process: the stack in the lab's server namespace, the kernel's sockets in the client's.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dpkt
import pytest
from backends import policy_for

from bypass import Stack, aio, netns
from bypass.control import PolicyControl
from bypass.embedded import DeviceDriver
from bypass.errors import DeviceError, GrantError
from bypass.lab import CLIENT_IP, SERVER_IFNAME, SERVER_IP, Lab
from bypass.policy import parse_policy

pytestmark = [pytest.mark.netns, pytest.mark.backends]

POLICY = f"""
version: 1
interface: {SERVER_IFNAME}
backend: {{kind: afxdp, mode: copy, ring_size: 512}}
flows:
  - name: web
    match: {{proto: tcp, local: {SERVER_IP}, local_port: 8080}}
    action: steer
  - name: any-address
    match: {{proto: tcp, local_port: 8090}}
    action: steer
  - name: clients
    match: {{proto: tcp, local: {SERVER_IP}, local_port: 50000-50009, remote: {CLIENT_IP}}}
    action: steer
  - name: echo
    match: {{proto: udp, local_port: 7}}
    action: steer
"""


@pytest.fixture
def stack(lab: Lab) -> Iterator[Stack]:
    """A stack in the server's namespace; the test's thread is in that namespace too."""
    with netns.entered(lab.server_ns):
        it = Stack.from_policy(parse_policy(policy_for(lab, POLICY)))
        yield it
        it.close(linger=0.2)


def control(stack: Stack) -> PolicyControl:
    assert isinstance(stack._control, PolicyControl)
    return stack._control


def live(stack: Stack) -> list[str]:
    """The live entries, as the steering program has them."""
    return sorted(str(endpoint) for endpoint, _ in control(stack).steering.entries().values())


def kernel_socket(lab: Lab, kind: int = socket.SOCK_STREAM, side: str = "client") -> socket.socket:
    with netns.entered(lab.client_ns if side == "client" else lab.server_ns):
        s = socket.socket(socket.AF_INET, kind)
    s.settimeout(10)
    return s


def connected(lab: Lab, address: tuple[str, int]) -> socket.socket:
    """A kernel connection of the client's, made by a thread while the stack runs in this one."""
    s = kernel_socket(lab)
    s.setblocking(False)
    s.connect_ex(address)
    return s


def serving(stack: Stack, condition: Callable[[], bool], timeout: float = 10) -> bool:
    """Lets the stack work until something is so, which packets alone bring about."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            return False
        stack.run(timeout=0.01)
    return True


def readable(sock: socket.socket) -> bool:
    return bool(select.select([sock], [], [], 0)[0])


def writable(sock: socket.socket) -> bool:
    return bool(select.select([], [sock], [], 0)[1])


def test_a_connection_from_accept_to_the_end(stack: Stack, lab: Lab) -> None:
    with stack.create_server((SERVER_IP, 8080)) as server:
        assert live(stack) == [f"tcp {SERVER_IP}:8080"]
        with connected(lab, (SERVER_IP, 8080)) as client:
            connection, peer = server.accept()
            assert peer == client.getsockname()
            assert connection.getsockname() == (SERVER_IP, 8080)
            client.send(b"ping")
            assert connection.recv(10) == b"ping"
            connection.sendall(b"pong")
            assert serving(stack, lambda: readable(client))
            assert client.recv(10) == b"pong"
            connection.close()
            assert serving(stack, lambda: readable(client))
            assert client.recv(10) == b""


def test_what_no_rule_grants_is_refused_and_the_rule_named(stack: Stack) -> None:
    with stack.socket() as sock:
        with pytest.raises(
            PermissionError, match=r"does not grant tcp 192\.0\.2\.10:22; .*local_port: 22"
        ) as e:
            sock.bind((SERVER_IP, 22))
        assert isinstance(e.value, GrantError)
        assert e.value.errno == errno.EACCES
        with pytest.raises(PermissionError, match=r"remote: 198\.51\.100\.1"):
            sock.connect(("198.51.100.1", 80))
    with stack.socket(socket.SOCK_DGRAM) as sock, pytest.raises(PermissionError, match="udp"):
        sock.bind((SERVER_IP, 53))
    assert live(stack) == []


def test_the_port_is_reserved_in_the_kernel_and_given_back(stack: Stack, lab: Lab) -> None:
    with stack.create_server((SERVER_IP, 8080)):
        with kernel_socket(lab, side="server") as other, pytest.raises(OSError, match="in use"):
            other.bind((SERVER_IP, 8080))
        with stack.socket() as second, pytest.raises(OSError) as e:  # noqa: PT011
            second.bind((SERVER_IP, 8080))
        assert e.value.errno == errno.EADDRINUSE
    assert serving(stack, lambda: live(stack) == [])
    with kernel_socket(lab, side="server") as other:
        other.bind((SERVER_IP, 8080))
        other.listen()
        with stack.socket() as sock, pytest.raises(OSError, match="kernel socket has") as e:
            sock.bind((SERVER_IP, 8080))
        assert e.value.errno == errno.EADDRINUSE
    with stack.create_server((SERVER_IP, 8080)):
        assert live(stack) == [f"tcp {SERVER_IP}:8080"]


def test_an_entry_lives_as_long_as_a_connection_on_its_port(stack: Stack, lab: Lab) -> None:
    """TIME_WAIT included: the kernel must not see a segment of it."""
    server = stack.create_server((SERVER_IP, 8080))
    client = connected(lab, (SERVER_IP, 8080))
    connection, _ = server.accept()
    server.close()
    stack.run(timeout=0.3)
    assert live(stack) == [f"tcp {SERVER_IP}:8080"], "a connection is open"
    connection.close()  # first to close: TIME_WAIT is ours
    assert serving(stack, lambda: readable(client))
    client.close()
    assert serving(stack, lambda: [c.state for c in stack.conns()] == ["TIME_WAIT"])
    stack.run(timeout=0.3)
    assert live(stack) == [f"tcp {SERVER_IP}:8080"], "TIME_WAIT is a connection"
    with stack.create_server((SERVER_IP, 8080)) as again:  # over the entry that is still there
        client = connected(lab, (SERVER_IP, 8080))
        connection, _ = again.accept()
        client.close()
        assert connection.recv(1) == b""
        connection.close()


def test_an_entry_goes_when_the_last_connection_was_closed_by_the_peer(stack: Stack, lab: Lab) -> None:
    with stack.create_server((SERVER_IP, 8080)) as server:
        client = connected(lab, (SERVER_IP, 8080))
        connection, _ = server.accept()
        client.close()
        assert connection.recv(1) == b""
        connection.close()
    assert serving(stack, lambda: live(stack) == [])
    assert not any(stack.audit().values())


def test_a_listener_on_any_address(stack: Stack, lab: Lab) -> None:
    with stack.create_server(("", 8090)) as server:
        assert live(stack) == ["tcp *:8090"]
        with connected(lab, (SERVER_IP, 8090)) as client:
            connection, peer = server.accept()
            assert peer == client.getsockname()
            connection.close()


def test_outgoing_connections_take_ports_that_the_policy_grants(stack: Stack, lab: Lab) -> None:
    with kernel_socket(lab) as server:
        server.bind((CLIENT_IP, 0))
        server.listen()
        clients = []
        for _ in range(10):
            client = stack.create_connection(server.getsockname(), timeout=10)
            assert client.getsockname()[0] == SERVER_IP
            assert 50000 <= client.getsockname()[1] <= 50009
            clients.append(client)
        assert len({c.getsockname()[1] for c in clients}) == 10
        assert len(live(stack)) == 10
        assert all(f"from {CLIENT_IP}:{server.getsockname()[1]}" in entry for entry in live(stack))
        with pytest.raises(PermissionError):
            stack.create_connection(server.getsockname(), timeout=10)
        for client in clients:
            connection, peer = server.accept()
            assert peer == client.getsockname()
            client.sendall(b"hello")
            assert connection.recv(10) == b"hello"
            connection.close()
            assert client.recv(1) == b""
            client.close()
    assert serving(stack, lambda: live(stack) == [])
    assert control(stack)._shadows == {}


def test_connection_refused_by_linux(stack: Stack, lab: Lab) -> None:
    with kernel_socket(lab) as placeholder:
        placeholder.bind((CLIENT_IP, 0))
        with pytest.raises(ConnectionRefusedError):
            stack.create_connection(placeholder.getsockname(), timeout=10)
    assert serving(stack, lambda: live(stack) == [])


def test_datagrams(stack: Stack, lab: Lab) -> None:
    with stack.socket(socket.SOCK_DGRAM) as server, kernel_socket(lab, socket.SOCK_DGRAM) as client:
        server.bind(("", 7))
        assert live(stack) == ["udp *:7"]
        client.sendto(b"hello", (SERVER_IP, 7))
        data, peer = server.recvfrom(100)
        assert data == b"hello"
        server.sendto(b"back", peer)
        assert client.recvfrom(100) == (b"back", (SERVER_IP, 7))
    assert serving(stack, lambda: live(stack) == [])


def test_connections_of_the_kernel_drain(stack: Stack, lab: Lab) -> None:
    """The kernel's own connections on the port go on; when they have ended, draining ends."""
    with kernel_socket(lab, side="server") as old:
        old.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        old.bind((SERVER_IP, 8080))
        old.listen()
        client = connected(lab, (SERVER_IP, 8080))
        assert serving(stack, lambda: readable(old))
        kept, _ = old.accept()
    with stack.create_server((SERVER_IP, 8080)) as server:
        assert [e.drain for e, _ in control(stack).steering.entries().values()] == [True]
        new = connected(lab, (SERVER_IP, 8080))
        connection, _ = server.accept()
        client.setblocking(True)
        client.sendall(b"of the kernel's")
        assert serving(stack, lambda: readable(kept))
        assert kept.recv(100) == b"of the kernel's"
        kept.sendall(b"still here")
        assert serving(stack, lambda: readable(client))
        assert client.recv(100) == b"still here"
        client.close()
        assert serving(stack, lambda: readable(kept))  # else both ends would wait in TIME_WAIT
        kept.close()
        assert serving(
            stack, lambda: not any(e.drain for e, _ in control(stack).steering.entries().values()), 90
        )
        new.send(b"of the stack's")
        assert connection.recv(100) == b"of the stack's"
        connection.close()
        new.close()


def test_link_down_and_up_again(stack: Stack, lab: Lab) -> None:
    from pyroute2 import IPRoute

    with stack.create_server((SERVER_IP, 8080)) as server, IPRoute() as ip:
        client = connected(lab, (SERVER_IP, 8080))
        connection, _ = server.accept()
        index = ip.link_lookup(ifname=lab.server_ifname)[0]
        ip.link("set", index=index, state="down")
        connection.sendall(b"while it was down")
        stack.run(timeout=0.5)
        assert not readable(client)
        ip.link("set", index=index, state="up")
        assert serving(stack, lambda: readable(client), 30)
        assert client.recv(100) == b"while it was down"
        connection.close()
        client.close()


def test_a_deleted_interface_is_reported_at_once(stack: Stack, lab: Lab) -> None:
    from pyroute2 import IPRoute

    server = stack.create_server((SERVER_IP, 8080))
    client = connected(lab, (SERVER_IP, 8080))
    connection, _ = server.accept()
    connection.sendall(b"x" * 100_000)
    with IPRoute() as ip:
        index = ip.link_lookup(ifname=SERVER_IFNAME)[0]
        timer = threading.Timer(0.2, lambda: ip.link("del", index=index))
        timer.start()
        with pytest.raises(OSError, match=f"{SERVER_IFNAME} is gone") as e:
            server.accept()
        assert e.value.errno == errno.ENODEV
        timer.join()
    with pytest.raises(OSError, match="gone"):
        connection.recv(1)
    with pytest.raises(DeviceError, match="gone"):
        stack.run(timeout=1)
    for sock in (server, connection, client):
        sock.close()
    stack.close(linger=60)


def test_threads_with_blocking_calls(stack: Stack, lab: Lab) -> None:
    """One thread polls for all; whoever finishes hands over."""
    server = stack.create_server((SERVER_IP, 8080))
    errors: list[BaseException] = []
    n, rounds = 6, 20

    def serve() -> None:
        try:
            for _ in range(rounds):
                with server.accept()[0] as connection:
                    while data := connection.recv(10_000):
                        connection.sendall(data)
        except BaseException as e:  # noqa: BLE001 - shown below
            errors.append(e)

    def ask() -> None:
        try:
            for i in range(rounds):
                with kernel_socket(lab) as client:
                    client.connect((SERVER_IP, 8080))
                    body = os.urandom(1000 + 500 * i)
                    client.sendall(body)
                    client.shutdown(socket.SHUT_WR)
                    received = b""
                    while piece := client.recv(100_000):
                        received += piece
                    assert received == body
        except BaseException as e:  # noqa: BLE001
            errors.append(e)

    threads = [threading.Thread(target=f) for f in (serve, ask) for _ in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert not any(t.is_alive() for t in threads)
    server.close()


def test_closing_the_stack_ends_calls_that_wait(stack: Stack) -> None:
    results: list[OSError] = []
    server = stack.create_server((SERVER_IP, 8080))
    udp = stack.socket(socket.SOCK_DGRAM)
    udp.bind(("", 7))

    def wait(call: Callable[[], object]) -> None:
        try:
            call()
        except OSError as e:
            results.append(e)

    calls: list[Callable[[], object]] = [server.accept, lambda: udp.recv(10)]
    threads = [threading.Thread(target=wait, args=(c,)) for c in calls]
    for thread in threads:
        thread.start()
    stack.close(linger=0)
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert [e.errno for e in results] == [errno.EBADF] * 2
    server.close()
    udp.close()


def test_a_stack_in_the_background_works_while_the_program_does_not_call(lab: Lab) -> None:
    with netns.entered(lab.server_ns):
        with (
            Stack.from_policy(parse_policy(policy_for(lab, POLICY)), background=True) as stack,
            stack.create_server((SERVER_IP, 8080)) as server,
            kernel_socket(lab) as client,
        ):
            client.connect((SERVER_IP, 8080))  # blocks in the kernel, in the only thread that we have
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"x" * 100_000)
                received = b""
                while len(received) < 100_000:
                    received += client.recv(100_000)
        assert not [t for t in threading.enumerate() if t.name.startswith("bypass ") and t.join(10)]


def test_a_capture_shows_what_tcpdump_cannot_see(lab: Lab, tmp_path: Path) -> None:
    path = tmp_path / "steered.pcapng"
    with (
        netns.entered(lab.server_ns),
        Stack.from_policy(parse_policy(policy_for(lab, POLICY)), capture=path) as stack,
        stack.create_server((SERVER_IP, 8080)) as server,
    ):
        client = connected(lab, (SERVER_IP, 8080))
        connection, _ = server.accept()
        client.send(b"in the capture")
        assert connection.recv(100) == b"in the capture"
        connection.sendall(b"and the answer")
        client.close()
        connection.close()
    with path.open("rb") as file:
        frames = list(dpkt.pcapng.Reader(file))
    assert abs(frames[0][0] - time.time()) < 600, "times are those of the calendar"
    flags = [dpkt.ethernet.Ethernet(data).data.data.flags & 0x12 for _, data in frames]
    assert flags[:2] == [2, 0x12], "SYN and SYN-ACK"
    everything = b"".join(data for _, data in frames)
    assert b"in the capture" in everything
    assert b"and the answer" in everything


def test_idle_sockets_use_no_cpu(stack: Stack) -> None:
    with stack.create_server((SERVER_IP, 8080)) as server:
        server.settimeout(1.0)
        before = time.thread_time_ns()
        with pytest.raises(TimeoutError):
            server.accept()
        assert time.thread_time_ns() - before < 200_000_000, "it spins"


def test_asyncio_server_on_the_interface(stack: Stack, lab: Lab) -> None:
    """The device's descriptor wakes the ordinary loop; nothing polls in between."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def main() -> None:
        server = await aio.start_server(stack, handler, SERVER_IP, 8080)

        async def one(i: int) -> None:
            s = kernel_socket(lab)
            s.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(s, (SERVER_IP, 8080))
            reader, writer = await asyncio.open_connection(sock=s)
            body = os.urandom(100_000 + i)
            writer.write(body)
            writer.write_eof()
            assert await reader.read() == body
            writer.close()
            await writer.wait_closed()

        await asyncio.gather(*(one(i) for i in range(50)))
        server.close()
        await server.wait_closed()

    asyncio.run(asyncio.wait_for(main(), 60))
    assert not stack.audit()["frames"]


def test_asyncio_client_of_a_linux_server(stack: Stack, lab: Lab) -> None:
    async def main() -> None:
        s = kernel_socket(lab)
        s.bind((CLIENT_IP, 0))

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"hello " + await reader.readline())
            writer.close()

        server = await asyncio.start_server(handler, sock=s)
        reader, writer = await aio.open_connection(stack, *s.getsockname())
        writer.write(b"world\n")
        assert await reader.read() == b"hello world\n"
        writer.close()
        await writer.wait_closed()
        server.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_asyncio_learns_of_a_deleted_interface(stack: Stack, lab: Lab) -> None:
    from pyroute2 import IPRoute

    def delete() -> None:
        with IPRoute() as ip:
            ip.link("del", index=ip.link_lookup(ifname=SERVER_IFNAME)[0])

    async def main() -> None:
        told: list[str] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: told.append(str(context["exception"]))
        )
        made: asyncio.Future[asyncio.StreamReader] = asyncio.get_running_loop().create_future()
        server = await aio.start_server(
            stack, lambda reader, writer: made.set_result(reader), SERVER_IP, 8080
        )
        with connected(lab, (SERVER_IP, 8080)):
            reader = await made
            await asyncio.to_thread(delete)
            with pytest.raises(OSError, match=f"{SERVER_IFNAME} is gone") as e:
                await reader.read()
            assert e.value.errno == errno.ENODEV
            await server.wait_closed()
        assert told == [f"{SERVER_IFNAME} is gone"]

    asyncio.run(asyncio.wait_for(main(), 30))


def test_close_leaves_nothing_and_may_come_twice(lab: Lab) -> None:
    with netns.entered(lab.server_ns):
        before = len(os.listdir("/proc/self/fd"))
        stack = Stack.from_policy(parse_policy(policy_for(lab, POLICY)))
        assert isinstance(stack.driver, DeviceDriver)
        server = stack.create_server((SERVER_IP, 8080))
        client = connected(lab, (SERVER_IP, 8080))
        connection, _ = server.accept()
        stack.close(linger=0.1)
        stack.close()
        assert readable(client) or select.select([client], [], [], 5)[0]
        client.close()
        for sock in (server, connection):
            sock.close()
        assert len(os.listdir("/proc/self/fd")) == before
        with kernel_socket(lab, side="server") as other:
            other.bind(("", 8080))
