# SPDX-License-Identifier: Apache-2.0
"""What the tests of the broker share: a broker in a thread, and a client that plays an application.

Run as a program it is a client in a process of its own, which does what its standard input says and tells the results:
`python broker_support.py SOCKET [UID]`; see Child.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bypass._core import ffi, lib
from support import WAIT_S

from bypass import netns
from bypass.broker import protocol
from bypass.broker.protocol import ABI, Kind, Message
from bypass.broker.server import Server, listen
from bypass.broker.site import Site
from bypass.core import Address, CoreStack

STREAM: int = lib.BYPASS_STREAM
DGRAM: int = lib.BYPASS_DGRAM
ME = "127.0.0.1"


class BrokerError(Exception):
    """The broker has answered with an error."""

    def __init__(self, answer: Message) -> None:
        super().__init__(f"{os.strerror(answer.error)}: {answer.text}")
        self.code, self.text = answer.error, answer.text


class Client:
    """One connection of an application."""

    def __init__(self, name: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.connect(protocol.socket_address(name))
        self.sock.setblocking(False)
        self.seq = 0
        self.app = 0
        self.token = bytes(16)
        self.fds: list[int] = []
        self.told: list[Message] = []  # of the broker's own accord
        self.lease_of: dict[int, Address] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()
        for fd in self.fds:
            os.close(fd)
        self.fds = []

    def read(self, timeout: float = WAIT_S) -> tuple[Message, list[int]]:
        """The next message. EOFError: the broker has closed the connection. TimeoutError."""
        if not select.select([self.sock], [], [], timeout)[0]:
            raise TimeoutError("the broker tells nothing")
        got = protocol.receive(self.sock, max_fds=80)
        assert got is not None
        data, fds, whole = got
        assert whole
        if not data:
            raise EOFError("the broker has closed the connection")
        return Message.unpack(data), fds

    def send(self, message: Message, fds: tuple[int, ...] = ()) -> int:
        self.seq += 1
        message.seq = self.seq
        assert protocol.send(self.sock, message.pack(), fds)
        return self.seq

    def ask(self, message: Message, fds: tuple[int, ...] = ()) -> tuple[Message, list[int]]:
        """The answer, whatever it is; what is told meanwhile is kept."""
        seq = self.send(message, fds)
        while True:
            answer, got = self.read()
            if answer.seq == seq:
                assert answer.type == message.type
                return answer, got
            assert answer.seq == 0
            self.told.append(answer)

    def good(self, message: Message, fds: tuple[int, ...] = ()) -> Message:
        answer, got = self.ask(message, fds)
        if answer.error:
            raise BrokerError(answer)
        self.fds += got
        return answer

    def hello(self, name: str = "test", *, app: int = 0, token: bytes = bytes(16)) -> Message:
        """Until the broker is ready."""
        answer = self.good(Message(Kind.HELLO, abi=ABI, name=name, app=app, token=token))
        self.app, self.token = answer.app, answer.token
        self.wait_for(Kind.READY)
        return answer

    def wait_for(self, kind: Kind, where: Callable[[Message], bool] = lambda m: True) -> Message:
        """The first such message that the broker tells, also one that it has told."""
        looked = 0
        while True:
            for message in self.told[looked:]:
                if message.type == kind and where(message):
                    return message
            looked = len(self.told)
            message, fds = self.read()
            assert not fds
            assert message.seq == 0
            self.told.append(message)

    def lease(
        self,
        sock: socket.socket,
        kind: int,
        local: Address = ("::", 0),
        remote: Address = ("::", 0),
    ) -> Message:
        return self.good(Message(Kind.LEASE, kind=kind, local=local, remote=remote), (sock.fileno(),))

    def header(self) -> Any:
        """`struct app_header` as it is in the memory file."""
        raw = os.pread(self.fds[0], ffi.sizeof("struct app_header"), 0)
        header = ffi.new("struct app_header *")
        ffi.memmove(header, raw, len(raw))
        return header


class RunningBroker:
    """A broker in a thread of this process."""

    def __init__(self, server: Server, name: str) -> None:
        self.server = server
        self.name = name
        self._clients: list[Client] = []

    def client(self) -> Client:
        client = Client(self.name)
        self._clients.append(client)
        return client

    def close_clients(self) -> None:
        for client in self._clients:
            client.close()

    @property
    def site(self) -> Any:
        return self.server.broker.site

    def inside(self, func: Callable[[], Any]) -> Any:
        """What a function gives that is called by the broker's thread."""
        given: list[Any] = []
        called = threading.Event()

        def call() -> None:
            given.append(func())
            called.set()

        self.server._later(lambda: None, call)
        assert called.wait(WAIT_S)
        return given[0]

    def wait(self, condition: Callable[[], bool], what: str = "") -> None:
        """Until something is so in the broker, which works meanwhile."""
        end = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < end, what
            time.sleep(0.005)


_names = 0


def new_name() -> str:
    global _names
    _names += 1
    return f"@bypass-test-{os.getpid()}-{_names}"


@contextmanager
def running(make_site: Callable[[], Site], ns: str = "") -> Iterator[RunningBroker]:
    """A broker that serves until the end of the block; `ns`: in a network namespace."""
    name = new_name()
    made: list[Server] = []
    failed: list[BaseException] = []
    ready = threading.Event()

    def work() -> None:
        try:
            with Server(make_site(), listen(name)) as server:
                made.append(server)
                ready.set()
                server.run()
        except BaseException as e:  # noqa: BLE001 (raised in the test)
            failed.append(e)
        finally:
            ready.set()

    def inside() -> None:
        if ns:
            with netns.entered(ns):
                work()
        else:
            work()

    thread = threading.Thread(target=inside)
    thread.start()
    assert ready.wait(WAIT_S)
    if failed:
        thread.join()
        raise failed[0]
    broker = RunningBroker(made[0], name)
    try:
        yield broker
    finally:
        broker.close_clients()
        made[0].stop()
        thread.join(WAIT_S)
        assert not thread.is_alive()
    if failed:
        raise failed[0]


class Child:
    """A client in a process of its own, as another user if one is given, which can be killed."""

    script = str(Path(__file__))

    def __init__(self, name: str, uid: int = 0, ns: str = "") -> None:
        argv = [sys.executable, self.script, name, str(uid), ns]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.line() == {"ready": self.process.pid}

    def line(self) -> Any:
        """What it says next."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the child has ended"
        return json.loads(line)

    def do(self, what: str, **args: Any) -> Any:
        """Calls a function of Played. BrokerError's errno and text come as {"error": ..., "text": ...}."""
        self.tell(what, **args)
        return self.line()

    def tell(self, what: str, **args: Any) -> None:
        """Does not wait for what comes of it."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([what, args]) + "\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


class Application:
    """A stack on the device that a client was given. The arena is the process's own: nobody shares it here."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.map = mmap.mmap(client.fds[0], 0)
        self.header = client.header()
        at = ffi.from_buffer("uint8_t[]", self.map) + self.header.dev_off
        sockets = [os.dup(fd) for fd in client.fds[1:]]
        self.dev = ffi.NULL
        if self.header.device == lib.APP_DEV_AFXDP:
            error = ffi.new("struct afxdp_error *")
            self.dev = lib.afxdp_attach(at, self.header.dev_size, sockets, len(sockets), 0, error)
            assert self.dev != ffi.NULL, f"{os.strerror(error.err)}, step {error.step}"
            netdev = lib.afxdp_netdev(self.dev)
        else:
            self.port = ffi.new("struct port *")
            assert lib.port_attach(self.port, at, self.header.dev_size, *sockets) == 0
            netdev = lib.port_netdev(self.port)
        self.core = CoreStack(netdev, flags=self.header.config.flags, now_ns=time.monotonic_ns(), owner=self)
        self._heeded = 0
        self.alone = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.core.close()
        if self.dev != ffi.NULL:
            lib.afxdp_detach(self.dev)

    def turn(self) -> None:
        """Packets, timers, and what the broker tells."""
        while not self.alone and select.select([self.client.sock], [], [], 0)[0]:
            try:
                self.client.told.append(self.client.read()[0])
            except (EOFError, ConnectionResetError):
                self.alone = True  # the broker has ended; what is on the stack goes on
        for m in self.client.told[self._heeded :]:
            if m.type == Kind.ADDR_ADD:
                self.core.addr_add(m.local[0], m.prefix_len)
            elif m.type == Kind.NEXTHOP and not m.flags:
                self.core.nexthop_set(m.remote[0], m.mac, m.mtu)
        self._heeded = len(self.client.told)
        self.core.poll(time.monotonic_ns())
        for destination in () if self.alone else self.core.nexthop_wanted():
            self.client.send(Message(Kind.RESOLVE, remote=(destination, 0)))

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < end
            self.turn()
            time.sleep(0.0005)

    def read(self, sock: int) -> bytes | None:
        """None: nothing yet; b"": the end."""
        got = self.core.recv(sock, 65536)
        return got if isinstance(got, bytes) else None

    def echo(self, local: Address, connections: int) -> int:
        core = self.core
        self.turn()
        listener = core.socket(STREAM)
        core.bind(listener, local)
        core.listen(listener, 16)
        print(json.dumps({"serving": local}), flush=True)
        echoed = 0
        for _ in range(connections):
            accepted = -1

            def accept() -> bool:
                nonlocal accepted
                accepted = core.accept(listener)
                return accepted >= 0

            self.until(accept)
            data: bytes | None = None
            while data != b"":
                self.turn()
                data = self.read(accepted)
                if data:
                    assert core.send(accepted, data) == len(data)
                    echoed += len(data)
            core.close_socket(accepted)
        return echoed

    def fetch(self, local: Address, remote: Address, data: bytes) -> str:
        core = self.core
        self.turn()
        sock = core.socket(STREAM)
        core.bind(sock, local)
        core.connect(sock, remote)
        self.until(lambda: bool(core.ready(sock) & lib.BYPASS_OUT))
        assert core.send(sock, data) == len(data)
        core.shutdown(sock, lib.BYPASS_SHUT_WR)
        got = b""

        def ended() -> bool:
            nonlocal got
            more = self.read(sock)
            got += more or b""
            return more == b""

        self.until(ended)
        core.close_socket(sock)
        return got.decode()


class Played:
    """What a Child can do."""

    def __init__(self, name: str) -> None:
        self.client = Client(name)
        self.sockets: list[socket.socket] = []

    def hello(self, app: int = 0, token: str = "") -> Any:
        answer = self.client.hello("child", app=app, token=bytes.fromhex(token) or bytes(16))
        return {"app": answer.app, "token": answer.token.hex(), "fds": len(self.client.fds)}

    def listen(self, host: str, port: int, kind: int = STREAM) -> Any:
        """A listening socket and its lease."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM if kind == STREAM else socket.SOCK_DGRAM)
        self.sockets.append(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        if kind == STREAM:
            sock.listen()
        return {"lease": self.client.lease(sock, kind, (host, port)).lease}

    def bind(self, host: str, port: int) -> Any:
        """A socket that is bound and does not listen, and its lease."""
        sock = socket.socket()
        self.sockets.append(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        return {"lease": self.client.lease(sock, STREAM, (host, port)).lease}

    def serve(self, host: str, port: int, connections: int) -> Any:
        """Echoes on the stack until so many connections have ended; lease and stack as a real program has them."""
        with Application(self.client) as app:
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            self.sockets.append(sock)
            sock.bind((host, port))
            sock.listen()
            self.client.lease(sock, STREAM, (host, port))
            return {"bytes": app.echo((host, port), connections)}

    def fetch(self, host: str, port: int, data: str) -> Any:
        """Connects on the stack, sends, and gives what comes back."""
        with Application(self.client) as app, socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            leased = self.client.lease(sock, STREAM, remote=(host, port))
            assert leased.local == sock.getsockname()
            return {"local": leased.local, "data": app.fetch(leased.local, (host, port), data.encode())}

    def fork(self) -> Any:
        """A child that has not said hello; its number. It ends with this process, or when it is killed."""
        pid = os.fork()
        if pid == 0:
            self.client.sock.close()
            signal.pause()
        self.client.send(Message(Kind.FORK, index=pid))
        return {"pid": pid}

    def claim(self, pid: int) -> Any:
        """Says that a process is its child."""
        self.client.send(Message(Kind.FORK, index=pid))
        return {}

    def linger(self) -> Any:
        self.client.good(Message(Kind.LINGER))
        return {}

    def exec(self) -> Any:
        self.client.good(Message(Kind.EXEC))
        return {}

    def hang_up(self) -> Any:
        self.client.close()
        return {}

    def grants(self) -> Any:
        return {"grants": [m.text for m in self.client.told if m.type == Kind.GRANT]}


def main(player: type[Played] = Played) -> None:
    name, uid, ns = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    if ns:
        with netns.entered(ns):
            play(player, name, uid)
            os._exit(0)  # there is no way back for a user without privileges
    else:
        play(player, name, uid)


def play(player: type[Played], name: str, uid: int) -> None:
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    played = player(name)
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        what, args = json.loads(line)
        try:
            result = getattr(played, what)(**args)
        except BrokerError as e:
            result = {"error": e.code, "text": e.text}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
