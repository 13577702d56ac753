# SPDX-License-Identifier: Apache-2.0
"""Whatever clients send, the broker goes on, answers others, and is left with nothing when they are gone."""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import fields

import pytest
from broker_support import ME, STREAM, new_name
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import WAIT_S, examples

from bypass.broker import protocol
from bypass.broker.protocol import ABI, SIZE, Kind, Message
from bypass.broker.server import Server, listen
from bypass.broker.site import LoopSite

CLIENTS = 3
HOSTS = ("127.0.0.1", "0.0.0.0", "::", "::1", "198.51.100.1", "255.255.255.255")
NUMBERS = st.sampled_from((0, 1, 2, 3, 255, 0xFFFF))
THINGS = ("bound", "listening", "fresh", "udp", "six", "unix", "pipe", "memory", "folder")


@st.composite
def messages(draw: st.DrawFn) -> Message:
    """Mostly such as mean something."""
    endpoint = st.tuples(st.sampled_from(HOSTS), NUMBERS)
    message = Message(
        draw(st.one_of(st.sampled_from(list(Kind)), st.integers(0, 0xFFFF))),
        seq=draw(NUMBERS),
        app=draw(NUMBERS),
        lease=draw(NUMBERS),
        local=draw(endpoint),
        remote=draw(endpoint),
        kind=draw(NUMBERS),
        flags=draw(NUMBERS),
        abi=draw(st.sampled_from((ABI, ABI, ABI, 0, 0xFFFF))),
        name=draw(st.text(max_size=8)).replace("\0", ""),
    )
    assert len(fields(message)) == 20
    return message


CLIENT = st.integers(0, CLIENTS - 1)
STEPS = st.one_of(
    st.tuples(st.just("say"), CLIENT, messages(), st.lists(st.sampled_from(THINGS), max_size=6)),
    st.tuples(st.just("lease"), CLIENT, st.sampled_from(THINGS)),
    st.tuples(st.just("raw"), CLIENT, st.binary(max_size=SIZE + 8)),
    st.tuples(st.just("read"), CLIENT),
    st.tuples(st.just("hang up"), CLIENT),
    st.tuples(st.just("flood"), CLIENT, messages(), st.integers(1, 300)),
)


@pytest.fixture(autouse=True)
def no_reaper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYPASS_LINGER", "/nonexistent")


class Things:
    """Descriptors of every kind."""

    def __init__(self) -> None:
        self.bound = socket.socket()
        self.bound.bind((ME, 0))
        self.listening = socket.socket()
        self.listening.bind((ME, 0))
        self.listening.listen()
        self.fresh = socket.socket()
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind((ME, 0))
        self.six = socket.socket(socket.AF_INET6)
        self.unix, self.other = socket.socketpair()
        self.pipe = os.pipe()
        self.memory = os.memfd_create("test")
        self.folder = os.open("/", os.O_RDONLY)

    def fd(self, name: str) -> int:
        thing = self.pipe[0] if name == "pipe" else getattr(self, name)
        return thing if isinstance(thing, int) else int(thing.fileno())

    def close(self) -> None:
        for thing in vars(self).values():
            if isinstance(thing, socket.socket):
                thing.close()
        for fd in (*self.pipe, self.memory, self.folder):
            os.close(fd)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def settled(count: int) -> bool:
    """Descriptors that are closed in threads may take a moment."""
    end = time.monotonic() + WAIT_S
    while open_fds() != count and time.monotonic() < end:
        time.sleep(0.001)
    return open_fds() == count


class World:
    """A broker that has a turn when the test says so, its clients, and one that behaves."""

    def __init__(self) -> None:
        self.before = open_fds()
        self.name = new_name()
        self.server = Server(LoopSite(), listen(self.name))
        self.things = Things()
        self.clients = [self.connect() for _ in range(CLIENTS)]
        self.decent = self.connect()
        self.ask(Message(Kind.HELLO, abi=ABI, seq=1))

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(protocol.socket_address(self.name))
        sock.setblocking(False)
        self.server.turn(0)
        return sock

    def ask(self, message: Message) -> Message:
        """The decent client is answered within a few turns whatever the others do."""
        assert protocol.send(self.decent, message.pack())
        for _ in range(200):
            self.server.turn(0)
            while (got := protocol.receive(self.decent)) is not None:
                for fd in got[1]:
                    os.close(fd)
                answer = Message.unpack(got[0])
                if answer.seq == message.seq:
                    return answer
        raise AssertionError("no answer")

    def send(self, number: int, data: bytes, fds: list[int]) -> None:
        with suppress(OSError):
            protocol.send(self.clients[number], data, fds)
        self.server.turn(0)

    def step(self, what: str, number: int, *args: object) -> None:
        sock = self.clients[number]
        if what == "say":
            message, names = args
            assert isinstance(message, Message)
            assert isinstance(names, list)
            self.send(number, message.pack(), [self.things.fd(n) for n in names])
        elif what == "lease":
            name = str(args[0])
            self.send(number, Message(Kind.HELLO, abi=ABI).pack(), [])
            port = getattr(self.things, name).getsockname()[1] if name in ("bound", "listening") else 0
            message = Message(
                Kind.LEASE, kind=STREAM, local=(ME, port), remote=("::", 0) if port else (ME, 9)
            )
            self.send(number, message.pack(), [self.things.fd(name)])
        elif what == "raw":
            self.send(number, bytes(args[0]), [])  # type: ignore[arg-type]
        elif what == "flood":
            message, count = args
            assert isinstance(message, Message)
            with suppress(OSError):
                for _ in range(int(str(count))):
                    if not protocol.send(sock, message.pack()):
                        break
            self.server.turn(0)
        elif what == "read":
            self.read(sock)
        else:
            sock.close()
            self.server.turn(0)
            self.clients[number] = self.connect()

    def read(self, sock: socket.socket) -> None:
        with suppress(OSError):
            while (got := protocol.receive(sock)) is not None and got[0]:
                for fd in got[1]:
                    os.close(fd)

    def close(self) -> None:
        for sock in (*self.clients, self.decent):
            sock.close()
        end = time.monotonic() + WAIT_S
        while self.server._processes and time.monotonic() < end:
            self.server.turn(0.001)
        assert all(app.ends_ns for app in self.server.broker.apps.values()), "they wait for another program"
        assert not self.server._processes
        self.server.close()
        self.things.close()
        assert settled(self.before), "descriptors are left"


@settings(max_examples=examples(150), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(STEPS, max_size=25))
def test_no_sequence_of_messages_harms_the_broker(steps: list[tuple[object, ...]]) -> None:
    world = World()
    for number, (what, client, *args) in enumerate(steps):
        world.step(str(what), int(str(client)), *args)
        answer = world.ask(Message(Kind.RELEASE, lease=77, seq=1000 + number))
        assert answer.error
    world.close()


def test_a_connection_that_is_passed_over_itself_ends_with_its_client() -> None:
    world = World()
    sock = world.clients[0]
    world.send(0, Message(Kind.LEASE).pack(), [sock.fileno()])
    world.close()


def test_descriptors_that_do_not_close_are_not_taken_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a file system in user space that does not answer."""
    world = World()
    release, close = threading.Event(), os.close

    def stuck(fd: int) -> None:
        if threading.current_thread().name.startswith("close "):
            assert release.wait(20)
        close(fd)

    monkeypatch.setattr("bypass.broker.closer.os.close", stuck)
    before = open_fds()
    for _ in range(100):
        world.step("say", 0, Message(Kind.LEASE), ["folder"] * 4)
        world.step("hang up", 0)
    assert open_fds() < before + 20
    assert world.ask(Message(Kind.RELEASE, lease=77, seq=5)).error, "others are served"
    release.set()
    world.close()
