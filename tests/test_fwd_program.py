# SPDX-License-Identifier: Apache-2.0
"""The program bypass-fwd: it keeps what a broker would lose with its life, does what the broker would have done when
processes die, and never gives up because of what it is told."""

from __future__ import annotations

import array
import errno
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from bypass._core import lib
from fwd_live import AppMemory

from bypass import fwd, libbpf
from bypass.broker.takeover import pid_of
from bypass.errors import BypassError
from bypass.fwd import Forwarder, ForwarderError, Lease


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.002)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture
def forwarder() -> Iterator[Forwarder]:
    f = Forwarder.start()
    yield f
    f.close()


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[tuple[Forwarder, str]]:
    name = str(tmp_path / "fwd.sock")
    f = Forwarder.start(name)
    yield f, name
    try:
        os.kill(f.pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    finally:
        f.close()
    assert os.waitstatus_to_exitcode(os.waitpid(f.pid, 0)[1]) == 0


def pipe_says(read_end: int) -> bool:
    """Whether a pipe has no writer any more."""
    return bool(select.select([read_end], [], [], 0)[0]) and os.read(read_end, 1) == b""


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """(read end, write end): who holds the write end alone can be seen at the other."""
    r, w = os.pipe()
    yield r, w
    os.close(r)
    with suppress(OSError):  # the test may have closed it
        os.close(w)


# ---- Starting ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--help"], "Usage: bypass-fwd"),
        ([], "no SOCK_SEQPACKET socket"),
        (["--fd", "2"], "--fd 2: a number from 3"),
        (["--fd", "99"], "descriptor 99"),
        (["--cpu", "x"], "--cpu x: a number from 0"),
        (["--cpu", "1023"], "--cpu 1023"),
        (["--spin", "-1"], "--spin -1"),
        (["--nonsense"], "--help"),
        (["more"], "more: no argument"),
        (["--listen", "here"], "an absolute path or @name"),
        (["--listen", "/x" * 60], "an absolute path or @name"),
        (["--listen", "/nowhere/at/all"], "/nowhere/at/all: No such file"),
    ],
)
def test_what_is_wrong_with_its_arguments_is_said(args: list[str], says: str) -> None:
    done = subprocess.run([fwd.binary(), *args], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == (0 if args == ["--help"] else 2)
    assert says in done.stdout + done.stderr
    assert len(done.stderr.splitlines()) <= 2


def test_a_second_one_does_not_take_the_name_of_the_first(listening: tuple[Forwarder, str]) -> None:
    done = subprocess.run(
        [fwd.binary(), "--listen", listening[1]], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 2
    assert "another bypass-fwd is there" in done.stderr


def test_a_name_left_by_one_that_was_killed_is_taken(tmp_path: Path) -> None:
    name = str(tmp_path / "fwd.sock")
    with Forwarder.start(name) as first:
        os.kill(first.pid, signal.SIGKILL)
        os.waitpid(first.pid, 0)
    assert Path(name).exists()
    with Forwarder.start(name) as second:
        assert second.list() == []
        second.quit()
    assert not Path(name).exists()


def test_a_start_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ForwarderError, match="ended with exit code 2"):
        Forwarder.start(str(tmp_path / "no/such/folder"))
    assert issubclass(ForwarderError, BypassError)


def test_it_keeps_no_privilege_beyond_its_needs(forwarder: Forwarder) -> None:
    status = Path(f"/proc/{forwarder.pid}/status").read_text()
    about = dict(line.split(":\t", 1) for line in status.splitlines())
    needed = sum(1 << cap for cap in (12, 13, 14, 39))  # NET_ADMIN, NET_RAW, IPC_LOCK, BPF
    for sort in ("CapEff", "CapPrm", "CapBnd" if os.geteuid() == 0 else "CapInh"):
        assert int(about[sort], 16) & ~needed == 0
    assert about["NoNewPrivs"] == "1"


def test_it_ends_with_its_broker_when_nobody_else_could_come() -> None:
    f = Forwarder.start()
    f.close()  # waits
    assert gone(f.pid)


def test_one_that_was_killed_is_waited_for() -> None:
    f = Forwarder.start(hold=True)
    os.kill(f.pid, signal.SIGKILL)
    with pytest.raises(ForwarderError, match="has ended"):
        f.quit()
    assert not Path(f"/proc/{f.pid}").exists()
    f.close()


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(tmp_path: Path, sig: int) -> None:
    name = str(tmp_path / "fwd.sock")
    with Forwarder.start(name) as f:
        os.kill(f.pid, sig)
        assert os.waitstatus_to_exitcode(os.waitpid(f.pid, 0)[1]) == 0
        assert not Path(name).exists()
        with pytest.raises(ForwarderError, match="has ended"):
            f.list()


# ---- The store ---------------------------------------------------------------------------------------------------
def test_items_come_back_as_they_were_put_in(forwarder: Forwarder, pipe: tuple[int, int]) -> None:
    r, w = pipe
    forwarder.put("link/eth0", b"\0\1\2" * 1000, [r, w])
    forwarder.put("empty")
    blob, fds = forwarder.get("link/eth0")
    assert blob == b"\0\1\2" * 1000
    assert [os.fstat(fd).st_ino for fd in fds] == [os.fstat(r).st_ino] * 2
    os.write(fds[1], b"!")
    assert os.read(r, 1) == b"!"
    for fd in fds:
        assert not os.get_inheritable(fd)
        os.close(fd)
    assert forwarder.get("empty") == (b"", [])
    assert [(i.name, i.size, i.fds) for i in forwarder.list()] == [("link/eth0", 3000, 2), ("empty", 0, 0)]


def test_descriptors_are_held_until_an_item_is_deleted_or_replaced(
    forwarder: Forwarder, pipe: tuple[int, int]
) -> None:
    r, w = pipe
    forwarder.put("a", fds=[w])
    os.close(w)
    assert not pipe_says(r)
    forwarder.put("b", fds=[r])
    assert not pipe_says(r)
    forwarder.put("a", b"without")
    wait_for(lambda: pipe_says(r), "the write end to close")
    forwarder.delete("b")
    assert [i.name for i in forwarder.list()] == ["a"]


def test_a_descriptor_that_takes_long_to_close_delays_nobody(forwarder: Forwarder) -> None:
    """close(2) of a socket with SO_LINGER waits until its peer has acknowledged all: here ten minutes."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        for i in range(20):  # more than it has threads
            s = socket.create_connection(server.getsockname())
            stack.enter_context(server.accept()[0])  # it never reads
            s.setblocking(False)
            with suppress(BlockingIOError):
                while s.send(bytes(1 << 20)):
                    pass
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=2i", 1, 600))
            forwarder.put(f"lingers {i}", fds=[s.fileno()])
            os.close(s.detach())
            forwarder.delete(f"lingers {i}")
            assert forwarder.list() == []
        forwarder.put("x", b"1")
        assert forwarder.get("x").blob == b"1"


def test_the_largest_item_and_as_many_as_one_likes(forwarder: Forwarder) -> None:
    with open("/dev/null") as null:
        forwarder.put("x" * 63, b"y" * 4096, [null.fileno()] * 128)
    blob, fds = forwarder.get("x" * 63)
    assert (len(blob), len(fds)) == (4096, 128)
    for fd in fds:
        os.close(fd)
    for i in range(1000):
        forwarder.put(f"item {i}", b"%d" % i)
    names = [i.name for i in forwarder.list()]
    assert names == ["x" * 63, *(f"item {i}" for i in range(1000))]
    assert forwarder.get("item 777").blob == b"777"


def test_what_is_too_much_or_not_there_is_refused(forwarder: Forwarder) -> None:
    with pytest.raises(ValueError, match="at most 4096 bytes"):
        forwarder.put("x", b"y" * 4097)
    for name in ("", "x" * 64):
        with pytest.raises(OSError, match="a name has 1 to 63 bytes"):
            forwarder.put(name)
    with pytest.raises(FileNotFoundError, match="no item nothing"):
        forwarder.get("nothing")
    for call in (forwarder.delete, forwarder.unwatch):
        with pytest.raises(FileNotFoundError):
            call("nothing")
    with pytest.raises(FileNotFoundError):
        forwarder.watch("nothing", [])
    forwarder.put("x")
    with pytest.raises(OSError, match="no process to watch"):
        forwarder.watch("x", [])


# ---- The broker's death ------------------------------------------------------------------------------------------
BROKER = """
import os, sys
from bypass.fwd import Forwarder
f = Forwarder.connect(sys.argv[1])
r, w = os.pipe()
f.put("state", b"what I knew", [w])
f.put("pipe", b"", [r])
os.close(r); os.close(w)
print(f.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_new_broker_finds_what_a_killed_one_had(listening: tuple[Forwarder, str]) -> None:
    first, name = listening
    first.close()
    done = subprocess.run(
        [sys.executable, "-c", BROKER, name], stdout=subprocess.PIPE, text=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL
    with Forwarder.connect(name) as second:
        assert second.pid == first.pid == int(done.stdout)
        assert [i.name for i in second.list()] == ["state", "pipe"]
        blob, [w] = second.get("state")
        [r] = second.get("pipe").fds
        assert blob == b"what I knew"
        os.write(w, b"still open")
        assert os.read(r, 100) == b"still open"
        os.close(w)
        os.close(r)


def test_one_broker_at_a_time_and_others_may_look(listening: tuple[Forwarder, str]) -> None:
    first, name = listening
    first.put("x", b"1")
    with pytest.raises(OSError, match="another broker is connected") as e:
        Forwarder.connect(name)
    assert e.value.errno == errno.EBUSY
    with Forwarder.connect(name, broker=False) as looker:
        assert [i.name for i in looker.list()] == ["x"]
        assert looker.stats()["items"] == 1
        for ask in (
            lambda: looker.put("y"),
            lambda: looker.get("x"),
            lambda: looker.delete("x"),
            looker.quit,
        ):
            with pytest.raises(PermissionError, match="only the broker"):
                ask()
    first.close()
    with Forwarder.connect(name) as second:
        assert [i.name for i in second.list()] == ["x"]


@pytest.mark.skipif(os.geteuid() != 0, reason="missing: root, to be somebody else")
def test_nobody_else_may_connect(listening: tuple[Forwarder, str]) -> None:
    first, name = listening
    os.chmod(name, 0o666)
    os.chmod(Path(name).parent, 0o755)
    abstract = f"@bypass-test-{os.getpid()}"
    with Forwarder.start(abstract) as other:
        code = (
            "import os, socket, sys\n"
            "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
            "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
            f"s.connect('\\0{abstract[1:]}')\n"
            "s.send(bytes(100))\n"
            "sys.exit(0 if s.recv(10) == b'' else 1)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False
        )
        refused = done.returncode == 0 or "ConnectionResetError" in done.stderr or "BrokenPipe" in done.stderr
        assert refused, done.stderr
        other.quit()
    assert first.list() == []


# ---- Watches -----------------------------------------------------------------------------------------------------
def sleeper() -> tuple[subprocess.Popen[bytes], int]:
    process = subprocess.Popen(["sleep", "1000"])
    return process, os.pidfd_open(process.pid)


def test_an_item_goes_when_all_its_processes_are_dead(forwarder: Forwarder, pipe: tuple[int, int]) -> None:
    r, w = pipe
    forwarder.put("app/1", b"", [w])
    os.close(w)
    forwarder.put("app/2")
    (a, fd_a), (b, fd_b), (c, fd_c) = sleeper(), sleeper(), sleeper()
    forwarder.watch("app/1", [fd_a, fd_b])
    forwarder.watch("app/2", [fd_c])
    for fd in (fd_a, fd_b, fd_c):
        os.close(fd)
    assert [(i.name, i.pids) for i in forwarder.list()] == [("app/1", 2), ("app/2", 1)]
    a.kill()
    a.wait()
    wait_for(lambda: forwarder.list()[0].pids == 1, "one of two to be noticed")
    assert forwarder.events() == []
    b.kill()
    b.wait()
    assert select.select([forwarder], [], [], 20)[0]
    assert forwarder.events() == [fwd.Died("app/1")]
    assert [i.name for i in forwarder.list()] == ["app/2"]
    wait_for(lambda: pipe_says(r), "the write end to close")
    forwarder.unwatch("app/2")
    c.kill()
    c.wait()
    assert [i.name for i in forwarder.list()] == ["app/2"]
    assert forwarder.events() == []


def test_parts_of_an_item_go_with_it_and_stop_listening(forwarder: Forwarder) -> None:
    process, fd = sleeper()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        forwarder.put("app-1.7", b"", [listener.fileno()])  # before its item, and after: in any order
    forwarder.put("app-1")
    forwarder.put("app-1.8")
    forwarder.put("app-10")
    forwarder.put("app-1x.1")
    forwarder.watch("app-1", [fd])
    os.close(fd)
    socket.create_connection(address).close()
    process.kill()
    process.wait()
    wait_for(
        lambda: [i.name for i in forwarder.list()] == ["app-10", "app-1x.1"], "the item and its parts to go"
    )
    assert forwarder.events() == [fwd.Died("app-1")]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    forwarder.put("app-10.1")
    forwarder.delete("app-10")
    assert [i.name for i in forwarder.list()] == ["app-1x.1"]


def test_a_successor_is_given_the_processes_that_live(forwarder: Forwarder) -> None:
    forwarder.put("app-1")
    many = [sleeper() for _ in range(3)]
    us = os.pidfd_open(os.getpid())
    for _ in range(130):  # more than one message holds
        forwarder.watch("app-1", [us])
    forwarder.watch("app-1", [fd for _, fd in many])
    many[1][0].kill()
    many[1][0].wait()
    wait_for(lambda: forwarder.list()[0].pids == 132, "a death to be noticed")
    given = forwarder.watched("app-1")
    assert [pid_of(fd) for fd in given] == [os.getpid()] * 130 + [many[0][0].pid, many[2][0].pid]
    for fd in (us, *given, *(fd for _, fd in many)):
        os.close(fd)
    for process, _ in many:
        process.kill()
        process.wait()
    with pytest.raises(FileNotFoundError):
        forwarder.watched("app-2")


def test_who_holds_and_listens_ends_with_the_last_item(tmp_path: Path) -> None:
    name = str(tmp_path / "fwd.sock")
    first = Forwarder.start(name, hold=True)
    process, fd = sleeper()
    first.put("app-1")
    first.watch("app-1", [fd])
    os.close(fd)
    first.close()
    with Forwarder.connect(name) as second:
        assert second.pid == first.pid
    assert not gone(first.pid), "an item is left"
    process.kill()
    process.wait()
    assert os.waitstatus_to_exitcode(os.waitpid(first.pid, 0)[1]) == 0
    assert not os.path.exists(name)


def test_a_process_that_is_dead_already_counts(forwarder: Forwarder) -> None:
    forwarder.put("app")
    process, fd = sleeper()
    process.kill()
    process.wait()
    forwarder.watch("app", [fd])
    os.close(fd)
    wait_for(lambda: forwarder.list() == [], "the item to go")


@pytest.fixture
def hash_map() -> Iterator[libbpf.Map]:
    if os.geteuid() != 0:
        pytest.skip("missing: root, for a BPF map")
    m = libbpf.Map(libbpf.MAP_HASH, "endpoints", 16, 4, 65536)
    yield m
    m.close()


def key(i: int) -> bytes:
    return struct.pack("=4I", i, 1, 2, 3)


@pytest.mark.parametrize("broker", ["alive", "dead"])
def test_the_flows_of_the_dead_are_the_kernels(
    listening: tuple[Forwarder, str], hash_map: libbpf.Map, broker: str
) -> None:
    """More keys than go between two rounds; some were given up before, some are not its own."""
    f, name = listening
    for i in range(5000):
        hash_map.put(key(i), b"1234")
    f.put("app")
    f.watch_keys("app", 0, [key(i) for i in range(2000)], hash_map.fd)
    f.watch_keys("app", 0, [key(i) for i in range(2000, 4000)])
    f.forget_keys("app", 0, [key(i) for i in range(1000, 1100)])
    other = libbpf.Map(libbpf.MAP_HASH, "other", 4, 4, 16)
    other.put(b"aaaa", b"1234")
    other.put(b"bbbb", b"1234")
    f.watch_keys("app", 7, [b"aaaa"], other.fd)
    process, fd = sleeper()
    f.watch("app", [fd])
    os.close(fd)
    assert [(i.pids, i.keys) for i in f.list()] == [(1, 3901)]
    if broker == "dead":
        f.close()
    process.kill()
    process.wait()
    wait_for(lambda: hash_map.get(key(0)) is None, "its keys to go")
    expected = {key(i) for i in (*range(1000, 1100), *range(4000, 5000))}
    wait_for(lambda: set(hash_map.keys()) == expected, "all its keys to go, and no others")
    assert set(other.keys()) == {b"bbbb"}
    other.close()
    if broker == "dead":
        f = Forwarder.connect(name)
    wait_for(lambda: f.list() == [], "the item to go")
    if broker == "dead":
        f.close()


def test_keys_without_sense_are_refused(forwarder: Forwarder) -> None:
    forwarder.put("app")
    for which, keys in ((8, [b"1"]), (0, [b"x" * 257]), (0, [b"no map yet"])):
        with pytest.raises(OSError, match="app"):
            forwarder.watch_keys("app", which, keys)


# ---- Ports -------------------------------------------------------------------------------------------------------
@pytest.fixture
def memory() -> Iterator[Callable[..., AppMemory]]:
    with ExitStack() as stack:

        def make(**config: Any) -> AppMemory:
            m = AppMemory(**config)
            stack.callback(m.close)
            return m

        yield make


def test_ports_come_and_go(forwarder: Forwarder, memory: Callable[..., AppMemory]) -> None:
    app = memory()
    app.add_to(forwarder, 1)
    with pytest.raises(FileExistsError):
        app.add_to(forwarder, 1)
    forwarder.locals(["192.0.2.10/24"])
    forwarder.lease_add(Lease(1, 6, "192.0.2.10", 80))
    with pytest.raises(FileExistsError):
        forwarder.lease_add(Lease(1, 6, "192.0.2.10", 80))
    forwarder.lease_add(Lease(1, 6, "", 0x8000, block=True))
    forwarder.entry(5, 1)
    forwarder.rate(1, bytes_=1000, bytes_burst=2000)
    forwarder.spin(0)
    stats = forwarder.port_stats(1)
    assert (stats["app"], stats["leases"], stats["cut"], stats["refused"]) == (1, 2, 0, {})
    assert forwarder.stats()["ports"] == 1
    forwarder.lease_del(Lease(1, 6, "192.0.2.10", 80))
    with pytest.raises(FileNotFoundError):
        forwarder.lease_del(Lease(1, 6, "192.0.2.10", 80))
    forwarder.port_del(1)
    for ask in (
        lambda: forwarder.port_del(1),
        lambda: forwarder.port_stats(1),
        lambda: forwarder.entry(5, 1),
        lambda: forwarder.rate(1),
        lambda: forwarder.lease_add(Lease(1, 6, "", 80)),
    ):
        with pytest.raises(FileNotFoundError):
            ask()
    assert forwarder.stats()["leases"] == 0
    app.add_to(forwarder, 1)


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ({"sealed": False}, "not sealed against shrinking"),
        ({"missing": 4096}, "its memory is too small"),
        ({"offset": 4096 + 64, "missing": 1}, "makes no sense"),
    ],
)
def test_memory_that_could_hurt_is_refused(
    forwarder: Forwarder, memory: Callable[..., AppMemory], how: dict[str, Any], error: str
) -> None:
    with pytest.raises(OSError, match=error):
        memory(**how).add_to(forwarder, 1)
    assert forwarder.stats()["ports"] == 0


def test_a_port_goes_with_the_processes_of_its_item(
    forwarder: Forwarder, memory: Callable[..., AppMemory]
) -> None:
    process, fd = sleeper()
    forwarder.put("app/1")
    memory().add_to(forwarder, 1, item="app/1")
    memory().add_to(forwarder, 2, item="")
    forwarder.lease_add(Lease(1, 17, "", 53))
    forwarder.watch("app/1", [fd])
    os.close(fd)
    process.kill()
    process.wait()
    assert select.select([forwarder], [], [], 20)[0]
    assert forwarder.events() == [fwd.Died("app/1")]
    assert (forwarder.stats()["ports"], forwarder.stats()["leases"]) == (1, 0)
    forwarder.lease_add(Lease(2, 17, "", 53))


def test_an_end_in_order_tells_applications(forwarder: Forwarder, memory: Callable[..., AppMemory]) -> None:
    app = memory()
    app.add_to(forwarder, 1)
    assert lib.port_wait_begin(app.port) == 0
    forwarder.quit()
    assert select.select([app.bells.app], [], [], 20)[0], "it sleeps no longer"
    nd = lib.port_netdev(app.port)
    assert nd.ops.kick(nd) == -errno.ENXIO


def test_a_device_that_there_is_not_is_an_error(forwarder: Forwarder, hash_map: libbpf.Map) -> None:
    config = {"ifname": "nosuch0", "queues": [0], "frames": 1024, "frame_size": 2048, "ring_size": 64}
    with pytest.raises(OSError, match="nosuch0") as e:
        forwarder.device_open(config, hash_map.fd)
    assert e.value.errno == errno.ENODEV
    with pytest.raises(OSError, match="makes no sense"):
        forwarder.device_open(config | {"frames": 3}, hash_map.fd)
    with pytest.raises(OSError, match="no interface is open"):
        forwarder.device_close()


# ---- Whatever it is told -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(8))
def test_random_messages_are_answered_and_leak_nothing(seed: int) -> None:
    """From one who says hello first: lengths, types, contents and descriptors at random."""
    rng = random.Random(seed)
    with Forwarder.start() as f, open("/dev/null") as null, socket.socket(fileno=os.dup(f.fileno())) as raw:
        before = len(os.listdir(f"/proc/{f.pid}/fd"))
        answered = 0
        for _ in range(400):
            kind = rng.choice([t for t in range(1, 36) if t != lib.FWD_QUIT])
            size = rng.choice([0, 4, 8, 9, 12, 72, 76, 84, 100, 400, 4096, 40000])
            body = bytes(size) if rng.random() < 0.5 else rng.randbytes(size)
            name = rng.choice([b"a", b"b", b"c"]).ljust(64, b"\0")
            body = name + body[64:] if rng.random() < 0.6 and size >= 64 else body
            message = struct.pack("=HHI", kind, 0, rng.randrange(2**32)) + body
            message = message[: rng.choice([1, 7, len(message), len(message), len(message)])]
            fds = array.array("i", [null.fileno()] * rng.choice([0, 0, 1, 2, 3, 128]))
            raw.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else [])
            head = raw.recv(200000)[:8]
            answered += 1
            if len(message) >= 8:
                assert head[:2] == message[:2]
                assert head[4:8] == message[4:8]
        assert answered == 400
        for item in f.list():
            f.delete(item.name)
        wait_for(lambda: len(os.listdir(f"/proc/{f.pid}/fd")) == before, "every descriptor to be closed")


def ask_for_ever(sock: socket.socket, message: bytes) -> None:
    for _ in range(100_000):
        sock.send(message)


def test_who_does_not_read_is_disconnected_and_the_others_are_served(
    listening: tuple[Forwarder, str],
) -> None:
    first, name = listening
    first.put("x", b"y" * 4096)
    deaf = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    deaf.connect(name)
    deaf.settimeout(20)
    ask = struct.pack("=HHI", lib.FWD_LIST, 0, 1) + bytes(8)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        ask_for_ever(deaf, ask)
    deaf.close()
    assert first.get("x").blob == b"y" * 4096


def test_another_version_is_refused(listening: tuple[Forwarder, str]) -> None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(listening[1])
    sock.send(struct.pack("=HHI6I", lib.FWD_HELLO, 0, 1, 99, 0, 0, 0, 0, 0))
    answer = sock.recv(1000)
    sock.close()
    assert struct.unpack_from("=HHI", answer) == (lib.FWD_HELLO, errno.EPROTO, 1)
    assert b"speaks version %d, not 99" % lib.FWD_ABI in answer
