# SPDX-License-Identifier: Apache-2.0
"""The broker without an interface: who may say what, what a lease needs, and what an end takes with it."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator

import pytest
from broker_support import DGRAM, STREAM, BrokerError, Child, Client, RunningBroker, running
from bypass._core import ffi, lib

from bypass import netns
from bypass.broker import protocol
from bypass.broker.protocol import ABI, Kind, Message
from bypass.broker.server import Server, listen
from bypass.broker.site import LoopSite
from bypass.errors import BypassError

ME = "127.0.0.1"
F_GET_SEALS = 1034


@pytest.fixture
def broker() -> Iterator[RunningBroker]:
    with running(LoopSite) as it:
        yield it


@pytest.fixture
def client(broker: RunningBroker) -> Client:
    it = broker.client()
    it.hello("redis")
    return it


def kernel_socket(kind: int = STREAM, family: int = socket.AF_INET) -> socket.socket:
    return socket.socket(family, socket.SOCK_STREAM if kind == STREAM else socket.SOCK_DGRAM)


def bound(kind: int = STREAM, host: str = ME, family: int = socket.AF_INET) -> socket.socket:
    sock = kernel_socket(kind, family)
    sock.bind((host, 0))
    return sock


def refused(client: Client, message: Message, fds: tuple[int, ...] = ()) -> tuple[int, str]:
    answer, got = client.ask(message, fds)
    assert not got
    return answer.error, answer.text


# ---- hello ---------------------------------------------------------------------------------------------------------


def test_an_application_gets_memory_addresses_and_grants(client: Client) -> None:
    header = client.header()
    size = os.fstat(client.fds[0]).st_size
    assert lib.app_valid(header, size)
    assert (header.size, header.app, header.device) == (size, client.app, lib.APP_DEV_LOOP)
    assert ffi.string(header.name) == b"redis"
    assert bytes(header.token) == client.token
    assert any(client.token)
    assert header.config.flags & lib.BYPASS_F_LOOPBACK
    assert header.batch
    assert [m.type for m in client.told] == [Kind.ADDR_ADD, Kind.GRANT, Kind.READY]
    assert (client.told[0].local, client.told[0].prefix_len) == ((ME, 0), 8)
    assert (client.told[1].index, client.told[1].last_port) == (0, 65535)


def test_nobody_changes_the_size_of_the_memory(client: Client) -> None:
    for size in (0, 1 << 40):
        with pytest.raises(PermissionError):
            os.ftruncate(client.fds[0], size)
    assert fcntl.fcntl(client.fds[0], F_GET_SEALS) == 0x7


def test_a_relative_shows_the_token_and_gets_the_same_memory(broker: RunningBroker, client: Client) -> None:
    relative = broker.client()
    relative.hello(app=client.app, token=client.token)
    assert relative.app == client.app
    assert os.fstat(relative.fds[0]).st_ino == os.fstat(client.fds[0]).st_ino
    other = broker.client()
    other.hello()
    assert other.app != client.app
    assert os.fstat(other.fds[0]).st_ino != os.fstat(client.fds[0]).st_ino


def test_a_wrong_token_is_refused(broker: RunningBroker, client: Client) -> None:
    wrong = bytes([client.token[0] ^ 1]) + client.token[1:]
    for app, token in ((client.app, wrong), (client.app, bytes(16)), (client.app + 1, client.token)):
        with pytest.raises(BrokerError) as e:
            broker.client().hello(app=app, token=token)
        assert e.value.code == errno.EACCES


def test_another_version_of_the_contract_is_refused(broker: RunningBroker) -> None:
    code, text = refused(broker.client(), Message(Kind.HELLO, abi=ABI + 1))
    assert code == errno.EPROTO
    assert f"version {ABI}" in text


def test_hello_comes_first_and_once(broker: RunningBroker) -> None:
    client = broker.client()
    with bound() as sock:
        code, text = refused(
            client, Message(Kind.LEASE, kind=STREAM, local=sock.getsockname()), (sock.fileno(),)
        )
    assert (code, text) == (errno.EPROTO, "hello comes first")
    client.hello()
    assert refused(client, Message(Kind.HELLO, abi=ABI))[0] == errno.EISCONN


@pytest.mark.parametrize("kind", [0, Kind.READY, Kind.NEXTHOP, Kind.GRANT, 200, 0xFFFF])
def test_what_is_not_for_the_broker_is_refused(client: Client, kind: int) -> None:
    assert refused(client, Message(kind))[0] == errno.EPROTO


@pytest.mark.parametrize("data", [b"x", bytes(299), bytes(301), bytes(60_000)])
def test_a_packet_that_is_no_message_ends_the_connection(client: Client, data: bytes) -> None:
    client.sock.send(data)
    with pytest.raises(EOFError):
        client.read()


# ---- leases --------------------------------------------------------------------------------------------------------


def test_a_lease_needs_the_socket_that_holds_the_port(client: Client) -> None:
    with bound() as sock, bound() as other, bound(DGRAM) as datagrams, kernel_socket() as fresh:
        local = sock.getsockname()
        assert client.lease(sock, STREAM, local).local == local
        reader, writer = os.pipe()
        for what, fds in (
            ("another port", (other.fileno(),)),
            ("no port", (fresh.fileno(),)),
            ("UDP", (datagrams.fileno(),)),
            ("no socket", (reader,)),
            ("a Unix socket", (client.sock.fileno(),)),
            ("none", ()),
            ("two", (sock.fileno(), other.fileno())),
        ):
            code, text = refused(client, Message(Kind.LEASE, kind=STREAM, local=local), fds)
            assert code in (errno.EINVAL, errno.ENOTSOCK, errno.EBADF), what
            assert text, what
        os.close(reader)
        os.close(writer)
        assert (
            refused(client, Message(Kind.LEASE, kind=7, local=local), (sock.fileno(),))[0]
            == errno.EPROTONOSUPPORT
        )
        away = (local[0], local[1] ^ 1)
        assert (
            refused(client, Message(Kind.LEASE, kind=STREAM, local=away), (sock.fileno(),))[0] == errno.EINVAL
        )
        assert client.lease(datagrams, DGRAM, datagrams.getsockname()).lease == 2


def test_any_address_counts_and_ipv6_sockets_that_take_ipv4(client: Client) -> None:
    six = socket.AF_INET6
    with (
        bound(host="") as any4,
        bound(host="::", family=six) as any6,
        bound(host="::ffff:127.0.0.1", family=six) as me6,
    ):
        for sock, wanted in ((any4, "0.0.0.0"), (any4, ME), (any6, "0.0.0.0"), (any6, ME), (me6, ME)):
            local = (wanted, sock.getsockname()[1])
            assert client.lease(sock, STREAM, local).local == local
        assert refused(
            client, Message(Kind.LEASE, kind=STREAM, local=("0.0.0.0", me6.getsockname()[1])), (me6.fileno(),)
        )
    with kernel_socket(family=six) as only:
        only.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        only.bind(("::", 0))
        local = (ME, only.getsockname()[1])
        code, text = refused(client, Message(Kind.LEASE, kind=STREAM, local=local), (only.fileno(),))
        assert code == errno.EINVAL
        assert "IPv6 only" in text
    with bound(host="::1", family=six) as six_only:
        local = ("::1", six_only.getsockname()[1])
        answer = refused(client, Message(Kind.LEASE, kind=STREAM, local=local), (six_only.fileno(),))
        assert answer[0] == errno.EAFNOSUPPORT


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("kind", [STREAM, DGRAM])
def test_a_socket_that_connects_is_bound_by_the_broker(client: Client, family: int, kind: int) -> None:
    with kernel_socket(kind, family) as sock:
        local = client.lease(sock, kind, remote=(ME, 80)).local
        assert local[0] == ME
        host = ME if family == socket.AF_INET else f"::ffff:{ME}"
        assert sock.getsockname()[:2] == (host, local[1])
        message = Message(Kind.LEASE, kind=kind, remote=(ME, 80))
        assert refused(client, message, (sock.fileno(),))[0] == errno.EINVAL, "it is bound by now"
        with kernel_socket(kind) as unreachable:
            away = Message(Kind.LEASE, kind=kind, remote=("198.51.100.1", 80))
            assert refused(client, away, (unreachable.fileno(),))[0] == errno.ENETUNREACH


@pytest.mark.netns
def test_a_socket_of_another_network_namespace_holds_no_port_here(client: Client, namespace: str) -> None:
    with netns.entered(namespace), bound(host="") as sock:
        local = ("0.0.0.0", sock.getsockname()[1])
        code, text = refused(client, Message(Kind.LEASE, kind=STREAM, local=local), (sock.fileno(),))
    assert code == errno.EINVAL
    assert "namespace" in text


def test_the_port_is_held_until_the_lease_ends(broker: RunningBroker, client: Client) -> None:
    sock = bound()
    local = sock.getsockname()
    lease = client.lease(sock, STREAM, local).lease
    sock.close()
    with kernel_socket() as other:
        with pytest.raises(OSError, match="in use"):
            other.bind(local)
        stranger = broker.client()
        stranger.hello()
        assert refused(stranger, Message(Kind.RELEASE, lease=lease))[0] == errno.ENOENT, "another's lease"
        assert client.good(Message(Kind.RELEASE, lease=lease)).lease == lease
        other.bind(local)
    assert refused(client, Message(Kind.RELEASE, lease=lease))[0] == errno.ENOENT, "released already"


# ---- ends ------------------------------------------------------------------------------------------------------------


def reachable(local: tuple[str, int]) -> bool:
    with kernel_socket() as sock:
        return sock.connect_ex(local) == 0


def free_port() -> int:
    with bound() as sock:
        return int(sock.getsockname()[1])


def test_a_listener_ends_with_its_process(broker: RunningBroker) -> None:
    local = (ME, free_port())
    with Child(broker.name) as child:
        child.do("hello")
        child.do("listen", host=ME, port=local[1])
        assert reachable(local)
        child.kill()
        broker.wait(lambda: not broker.server.broker.apps)
        assert not reachable(local)


def test_an_application_lives_as_long_as_a_relative(broker: RunningBroker) -> None:
    local = (ME, free_port())
    with Child(broker.name) as first, Child(broker.name) as second:
        app = first.do("hello")
        second.do("hello", app=app["app"], token=app["token"])
        first.do("listen", host=ME, port=local[1])
        first.kill()
        broker.wait(lambda: len(broker.server.broker.apps[app["app"]].processes) == 1)
        assert len(broker.server.broker.apps[app["app"]].leases) == 1
        second.kill()
        broker.wait(lambda: not broker.server.broker.apps)


def test_a_process_that_becomes_another_program_is_waited_for(broker: RunningBroker) -> None:
    with Child(broker.name) as first, Child(broker.name) as second:
        app = first.do("hello")
        first.do("exec")
        first.do("hang_up")
        broker.wait(lambda: not broker.server.broker.apps[app["app"]].processes)
        assert broker.server.broker.apps[app["app"]].ends_ns
        joined = second.do("hello", app=app["app"], token=app["token"])
        assert joined["app"] == app["app"]
        assert not broker.server.broker.apps[app["app"]].ends_ns
        second.kill()
        broker.wait(lambda: not broker.server.broker.apps)


def test_a_process_that_ends_in_place_of_becoming_another_is_not_waited_for(broker: RunningBroker) -> None:
    with Child(broker.name) as child:
        child.do("hello")
        child.do("exec")
        child.do("hang_up")
        app = next(iter(broker.server.broker.apps.values()))
        broker.wait(lambda: app.pidfd >= 0)
        ends_ns = app.ends_ns
        child.kill()
        broker.wait(lambda: not broker.server.broker.apps)
        assert ends_ns > 0


def test_an_application_lives_as_long_as_a_child_that_has_not_said_hello(broker: RunningBroker) -> None:
    local = (ME, free_port())
    with Child(broker.name) as parent:
        number = parent.do("hello")["app"]
        parent.do("listen", host=ME, port=local[1])
        child = parent.do("fork")["pid"]
        app = broker.server.broker.apps[number]
        broker.wait(lambda: list(app.children) == [child])
        parent.kill()
        try:
            broker.wait(lambda: not app.processes)
            assert number in broker.server.broker.apps
        finally:
            os.kill(child, signal.SIGKILL)
        broker.wait(lambda: not broker.server.broker.apps)


def test_nobody_elses_process_keeps_an_application_alive(broker: RunningBroker) -> None:
    with Child(broker.name, 65534) as child, subprocess.Popen(["sleep", "60"]) as roots:
        try:
            assert child.do("hello")["app"]
            child.do("claim", pid=roots.pid)
            child.do("claim", pid=1 << 22)
            child.do("hang_up")
            broker.wait(lambda: not broker.server.broker.apps)
        finally:
            roots.kill()


REAPER = """#!/bin/sh
echo "$(id -u) $BYPASS_APP $BYPASS_SOCKET" > {told}
read line < {fifo}
"""


def test_a_reaper_keeps_an_application_until_it_ends(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(prefix="bypass-test-") as folder, Child(broker.name, 65534) as child:
        os.chmod(folder, 0o777)
        told, fifo, program = (os.path.join(folder, name) for name in ("told", "fifo", "reaper"))
        os.mkfifo(fifo)
        os.chmod(fifo, 0o666)
        with open(program, "w") as f:
            f.write(REAPER.format(told=told, fifo=fifo))
        os.chmod(program, 0o755)
        monkeypatch.setenv("BYPASS_LINGER", program)
        local = (ME, free_port())
        app = child.do("hello")
        child.do("listen", host=ME, port=local[1])
        assert child.do("linger") == {}
        assert child.do("linger")["error"] == errno.EALREADY
        assert reachable(local)
        child.kill()
        broker.wait(lambda: not broker.server.broker.apps[app["app"]].processes)
        broker.wait(lambda: os.path.exists(told) and os.path.getsize(told) > 0)
        with open(told) as f:
            assert f.read().split() == ["65534", f"{app['app']}:{app['token']}", broker.name]
        assert not reachable(local), "nobody is left who accepts"
        with open(fifo, "w") as f:
            f.write("end\n")
        broker.wait(lambda: not broker.server.broker.apps)
        monkeypatch.setenv("BYPASS_LINGER", "/nonexistent")
        with broker.client() as client:
            client.hello()
            assert refused(client, Message(Kind.LINGER))[0] == errno.EIO


def test_a_process_that_hangs_up_without_a_word_has_ended(broker: RunningBroker, client: Client) -> None:
    with bound() as sock:
        client.lease(sock, STREAM, sock.getsockname())
        client.close()
        broker.wait(lambda: not broker.server.broker.apps)


def test_the_end_of_the_broker_ends_every_connection() -> None:
    with running(LoopSite) as broker:
        client = broker.client()
        client.hello()
        broker.server.stop()
        with pytest.raises(EOFError):
            client.read()


# ---- a hostile client ------------------------------------------------------------------------------------------------


def test_who_asks_without_reading_is_not_listened_to_and_disturbs_nobody(
    broker: RunningBroker, client: Client
) -> None:
    flood = broker.client()
    flood.hello()
    sent = 0

    def flooded() -> bool:
        nonlocal sent
        while protocol.send(flood.sock, Message(Kind.RELEASE, seq=sent + 2, lease=99).pack()):
            sent += 1
            assert sent < 100_000, "everything is read"
        return any(p.paused for p in broker.server._processes.values())

    broker.wait(flooded)
    assert refused(client, Message(Kind.RELEASE, lease=99))[0] == errno.ENOENT
    process = next(p for p in broker.server._processes.values() if p.waiting)
    assert process.waiting <= 128
    for n in range(sent):
        assert flood.read()[0].seq == n + 2


def test_who_does_not_read_misses_news_and_is_told_everything_later(
    broker: RunningBroker, client: Client
) -> None:
    def told() -> list[Message]:
        got = []
        while True:
            try:
                got.append(client.read(0.3)[0])
            except TimeoutError:
                return got

    told()
    process = next(iter(broker.server._processes.values()))
    for n in range(5000):
        process.tell(Message(Kind.ADDR_DEL, local=(f"10.0.{n >> 8}.{n & 255}", 0)))
    assert process.lagging
    assert process.waiting < 5000
    assert refused(broker.client(), Message(Kind.HELLO, abi=0))[0] == errno.EPROTO  # the loop has a turn
    broker.server.changed(process)
    client.send(Message(Kind.RELEASE, lease=99))
    got = told()
    kinds = [m.type for m in got]
    last = max(i for i, m in enumerate(got) if m.type == Kind.ADDR_DEL)
    assert kinds.count(Kind.ADDR_DEL) < 5000
    assert Kind.NEXTHOP in kinds[last:]
    assert Kind.ADDR_ADD in kinds[last:]
    assert Kind.GRANT in kinds[last:]
    assert not process.lagging


# ---- the socket's file


def test_one_broker_a_socket_and_the_file_of_a_killed_one_is_taken_over(tmp_path: os.PathLike[str]) -> None:
    name = os.path.join(tmp_path, "run", "broker.sock")
    with Server(LoopSite(), listen(name), name):
        assert os.stat(name).st_mode & 0o777 == 0o666
        with pytest.raises(BypassError, match="a broker runs already"):
            listen(name)
    assert not os.path.exists(name)
    listen(name).close()  # leaves its file, as who is killed does
    assert os.path.exists(name)
    with Server(LoopSite(), listen(name), name):
        pass
    with open(name, "w") as f:
        f.write("mine")
    with pytest.raises(BypassError, match="something else"):
        listen(name)
    assert os.path.exists(name)
