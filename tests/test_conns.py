# SPDX-License-Identifier: Apache-2.0
"""`bypass conns`: sockets of running programs, read from outside; and memory that may hold anything."""

from __future__ import annotations

import json
import mmap
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bypass._core import lib
from c_programs import CFLAGS, ROOT
from c_programs import run as build
from preloaded import environment

from bypass import netns, observe, procfs
from bypass.cli import conns as conns_command
from bypass.lab import SERVER_IFNAME, SERVER_IP, Lab

NAME = f"holder-{os.getpid()}"


@dataclass
class Holder:
    """A program that holds sockets, and what it said of them: descriptors by name."""

    pid: int
    fds: dict[str, list[int]]


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("conns") / "conns_hold"
    build("gcc", *CFLAGS, "-O1", "-pthread", "tests/c/conns_hold.c", "-o", out)
    return out


@pytest.fixture
def holder(program: Path) -> Iterator[Holder]:
    env = environment("stack", BYPASS_PROCNAME=NAME)
    with subprocess.Popen(
        [program], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as held:
        assert held.stdout
        fds: dict[str, list[int]] = {}
        name = ""
        for word in held.stdout.readline().split():
            if word.isdecimal():
                fds[name].append(int(word))
            else:
                name = word
                fds[name] = []
        assert fds, "it ended early"
        yield Holder(held.pid, fds)
        held.communicate()
        assert held.returncode == 0


def conns(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bypass", "conns", *args]
    return subprocess.run(
        command, cwd=ROOT, text=True, capture_output=True, env={**os.environ, "COLUMNS": "200"}
    )


def told(holder: Holder) -> dict[str, Any]:
    done = conns("--json", "--app", NAME)
    assert (done.returncode, done.stderr) == (0, "")
    [application] = json.loads(done.stdout)["applications"]
    assert application["holders"] == [holder.pid]
    assert not application["error"]
    return dict(application)


def of(application: dict[str, Any], fd: int) -> dict[str, Any]:
    [socket] = [s for s in application["sockets"] if s["fd"] == fd]
    return dict(socket)


def test_each_socket_is_told_with_its_place_and_state(holder: Holder) -> None:
    application = told(holder)
    fds = holder.fds
    listener = of(application, fds["listener"][0])
    assert (listener["place"], listener["state"]) == ("both", "LISTEN")
    assert (listener["recv_queue"], listener["send_queue"]) == (2, 5)
    assert listener["why"] == "TCP_DEFER_ACCEPT has no effect"
    one, other = (of(application, fd) for fd in fds["pair"])
    assert (one["local"], one["peer"]) == (other["peer"], other["local"])
    assert one["local"].startswith("127.0.0.1:")
    for end in (one, other):
        assert (end["proto"], end["place"], end["state"], end["why"]) == ("tcp", "stack", "ESTAB", "")
        assert end["congestion"] == "cubic"
        assert end["cwnd"] == 10
        assert end["retransmits"] == 0
        assert end["rtt_us"] > 0
    assert other["recv_queue"] == 5
    sender, receiver = (of(application, fd) for fd in fds["udp"])
    assert (sender["proto"], sender["place"], sender["state"]) == ("udp", "both", "ESTAB")
    assert sender["peer"] == receiver["local"]
    assert receiver["recv_queue"] >= 8


def test_what_is_the_kernels_is_told_with_its_reason(holder: Holder) -> None:
    application = told(holder)
    pktinfo = of(application, holder.fds["pktinfo"][0])
    assert pktinfo["place"] == "kernel"
    assert pktinfo["why"] == "an option that the stack does not have: IP_PKTINFO"
    assert pktinfo["state"] == "UNCONN"
    assert pktinfo["local"].startswith("127.0.0.1:"), "the kernel was asked"
    refused = of(application, holder.fds["refused"][0])
    assert (refused["place"], refused["why"]) == ("undecided", ""), "it may still connect elsewhere"
    undecided = of(application, holder.fds["undecided"][0])
    assert (undecided["place"], undecided["descriptors"]) == ("undecided", 2)


def test_connections_without_a_socket_are_told(holder: Holder) -> None:
    want = ["CLOSE-WAIT", "ESTAB", "FIN-WAIT-2"]
    for _ in range(40):  # the last FIN leaves soon after close()
        orphans = [s for s in told(holder)["sockets"] if s["fd"] is None]
        if sorted(s["state"] for s in orphans) == want:
            break
        time.sleep(0.05)
    assert sorted(s["state"] for s in orphans) == want
    assert all(s["pid"] is None and s["place"] == "stack" for s in orphans)


def test_the_table_says_the_same(holder: Holder) -> None:
    done = conns("--app", str(holder.pid))
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{NAME}: process {holder.pid}, user ")
    assert "loopback" in lines[0]
    assert lines[1].split()[:5] == ["PROTO", "STATE", "RECV-Q", "SEND-Q", "LOCAL"]
    [kernel] = [line for line in lines if "IP_PKTINFO" in line]
    assert kernel.split()[:2] == ["udp", "UNCONN"]
    assert "kernel: an option that the stack does not have: IP_PKTINFO" in kernel
    assert sum("ESTAB" in line and line.rstrip().endswith("stack") for line in lines) >= 3


def test_a_long_table_is_cut_behind_what_is_the_kernels(holder: Holder) -> None:
    done = conns("--app", NAME, "--limit", "6")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    rows = lines[3:9]
    assert all(row.split()[0] in ("tcp", "udp") for row in rows)
    assert any("IP_PKTINFO" in row for row in rows)
    assert not any(row.rstrip().endswith(" stack") for row in rows)
    assert re.fullmatch(r"\.\.\. and \d more \(--limit\)", lines[9])


def test_looking_disturbs_nobody(holder: Holder) -> None:
    def known(application: dict[str, Any]) -> list[tuple[object, ...]]:
        names = ("fd", "place", "state", "local", "peer", "recv_queue", "retransmits")
        return [tuple(s[name] for name in names) for s in application["sockets"]]

    before = known(told(holder))
    for _ in range(3):
        assert known(told(holder)) == before


def test_an_application_that_is_not_there() -> None:
    done = conns("--all", "--app", "no such program")
    assert done.returncode == 2
    assert done.stderr == (
        "bypass: no application no such program, or it is another user's (`bypass run` starts one)\n"
    )


# ---- Memory that may hold anything ------------------------------------------------------------------------------
def header(**fields: int) -> bytes:
    """Of an application whose memory is all zeroes behind it."""
    from bypass._core import ffi

    h = ffi.new("struct app_header *")
    h.device = lib.APP_DEV_LOOP
    lib.bypass_config_default(ffi.addressof(h, "config"), 16)
    assert lib.app_layout(h, 1 << 20)
    for name, value in fields.items():
        setattr(h, name, value)
    return bytes(ffi.buffer(h))


@pytest.fixture
def memory() -> Iterator[observe.Memory]:
    """Of this process: seen by every look, as any program's."""
    fd = os.memfd_create("bypass")
    os.write(fd, header())
    os.ftruncate(fd, 64 << 20)
    file = observe.which(os.fstat(fd))
    yield observe.Memory(Path(f"/proc/{os.getpid()}/fd/{fd}"), file, os.getuid(), [os.getpid()])
    os.close(fd)


def group_at(memory: observe.Memory) -> int:
    from bypass._core import ffi

    with memory.path.open("rb") as file:
        return int(ffi.cast("struct app_header *", ffi.from_buffer(file.read(4096))).group_off)


def write(memory: observe.Memory, at: int, data: bytes) -> None:
    with memory.path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[at : at + len(data)] = data


def test_memory_is_found_by_what_it_holds(memory: observe.Memory) -> None:
    mine = [m for m in observe.memories() if os.getpid() in m.holders]
    assert [m.path for m in mine] == [memory.path]


def test_an_application_that_is_being_made_has_no_sockets(memory: observe.Memory) -> None:
    told = observe.look(memory)
    assert (told.summary, told.sockets, told.error) == (None, [], "")


def test_damage_is_an_error_of_that_application_only(memory: observe.Memory, holder: Holder) -> None:
    write(memory, group_at(memory) + 8, (2).to_bytes(4, "little"))  # made, it says; and is all zeroes
    assert observe.look(memory).error == "it is damaged"
    done = conns("--json")
    assert done.returncode == 1
    assert f"the memory of the application of process {os.getpid()}: it is damaged" in done.stderr, (
        done.stderr
    )
    names = [a["summary"]["name"] for a in json.loads(done.stdout)["applications"] if a["summary"]]
    assert NAME in names


def test_a_reader_that_crashes_is_damage(memory: observe.Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    def crashes(*_: object) -> Iterator[tuple[str, Any]]:
        os.kill(os.getpid(), signal.SIGSEGV)
        yield "error", "not reached"

    monkeypatch.setattr(observe, "_rows", crashes)
    assert observe.look(memory).error == "it is damaged: reading it ended with SIGSEGV"


def test_a_file_that_shrinks_under_the_reader_is_damage(
    memory: observe.Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = observe._rows

    def shrinks(mem: Any, size: int) -> Iterator[tuple[str, Any]]:
        os.truncate(shared, 0)
        return rows(mem, size)

    shared = str(memory.path)
    monkeypatch.setattr(observe, "_rows", shrinks)
    monkeypatch.setattr(observe, "_give_up_privileges", lambda: None)
    assert observe.look(memory).error == "it is damaged: reading it ended with SIGBUS"


def test_a_reader_that_does_not_end_is_ended(memory: observe.Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(*_: object) -> Iterator[tuple[str, Any]]:
        while True:
            time.sleep(1)
            yield "error", "too late"

    monkeypatch.setattr(observe, "_rows", hangs)
    monkeypatch.setattr(observe, "TIME_S", 0.2)
    assert observe.look(memory).error.startswith("reading it took more than")


def test_a_reader_that_tells_too_much_is_ended(
    memory: observe.Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def floods(*_: object) -> Iterator[tuple[str, Any]]:
        while True:
            yield "error", "x" * 10_000

    monkeypatch.setattr(observe, "_rows", floods)
    monkeypatch.setattr(observe, "OUTPUT", 1 << 20)
    assert observe.look(memory).error == "it tells of more than any application holds"


@pytest.mark.skipif(os.geteuid() != 0, reason="root has privileges to give up")
def test_the_reader_has_no_privileges(memory: observe.Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    def says_who_it_is(*_: object) -> Iterator[tuple[str, Any]]:
        status = Path("/proc/self/status").read_text()
        caps = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff"))
        yield "error", f"{os.getresuid()} {os.getresgid()} {os.getgroups()} {int(caps, 16)}"

    monkeypatch.setattr(observe, "_rows", says_who_it_is)
    nobody = (65534, 65534, 65534)
    assert observe.look(memory).error == f"{nobody} {nobody} [] 0"


def test_text_for_the_terminal_is_printable() -> None:
    from bypass._core import ffi

    assert observe._text(ffi.new("char[]", b"\x1b]0;title\x07\xff\n")) == "?]0;title?" + "�" + "?"


# ---- Processes that go on while they are looked at ---------------------------------------------------------------
@pytest.fixture
def stranger() -> Iterator[int]:
    """What cannot be opened by its name: a socket."""
    with socket.socket(socket.AF_UNIX) as s:
        yield s.fileno()


def number(memory: observe.Memory) -> int:
    """The descriptor of this process that the memory was found at."""
    return int(memory.path.name)


def found_here() -> observe.Memory | None:
    """The one memory of this process, if it is seen."""
    mine = [m for m in observe.memories() if os.getpid() in m.holders]
    assert len(mine) <= 1
    return mine[0] if mine else None


@pytest.mark.parametrize("how", ["closed", "a socket"])
def test_a_descriptor_that_changed_before_it_was_opened_is_no_application(
    how: str, memory: observe.Memory, stranger: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptors, seen = procfs.descriptors, []

    def changing(pid: int) -> Iterator[tuple[Path, str]]:
        for path, target in descriptors(pid):
            if path == memory.path:
                seen.append(target)
                os.close(number(memory))
                if how == "a socket":
                    os.dup2(stranger, number(memory))
            yield path, target

    monkeypatch.setattr(procfs, "descriptors", changing)
    assert found_here() is None
    assert seen == ["/memfd:bypass (deleted)"], "it changed in time"
    os.dup2(stranger, number(memory))


def test_memory_that_went_between_finding_and_reading_is_an_application_that_ended(
    memory: observe.Memory, stranger: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = found_here()
    assert found is not None
    monkeypatch.setattr(conns_command, "told_by_brokers", list)
    assert [a.holders for a in conns_command.applications([found])] == [[os.getpid()]]
    os.dup2(stranger, number(memory))
    with pytest.raises(ProcessLookupError, match="no process has this memory any more"):
        observe.look(found)
    assert conns_command.applications([found]) == []


def test_another_applications_memory_in_its_place_is_not_taken_for_it(memory: observe.Memory) -> None:
    found = found_here()
    assert found is not None
    other = os.memfd_create("bypass")
    os.write(other, header(app=7))
    os.ftruncate(other, 64 << 20)
    os.dup2(other, number(memory))
    os.close(other)
    with pytest.raises(ProcessLookupError):
        observe.look(found)
    again = found_here()
    assert again is not None
    assert again.file != found.file
    assert observe.look(again).error == ""


def test_memory_that_is_an_applications_no_more_is_one_that_ended(memory: observe.Memory) -> None:
    write(memory, 0, bytes(4))
    assert found_here() is None
    with pytest.raises(ProcessLookupError):
        observe.look(memory)


def test_memory_that_its_process_moved_is_read_where_it_is(memory: observe.Memory, stranger: int) -> None:
    moved = os.dup(number(memory))
    os.dup2(stranger, number(memory))
    assert observe.look(memory).error == ""
    assert memory.path == Path(f"/proc/{os.getpid()}/fd/{moved}")
    os.close(moved)


def test_memory_that_was_left_to_a_child_is_read_there(memory: observe.Memory, stranger: int) -> None:
    argv = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, pass_fds=[number(memory)]) as child:
        os.dup2(stranger, number(memory))
        told = observe.look(memory)
    assert (told.holders, told.error) == ([child.pid], "")


def test_a_descriptor_that_is_closed_meanwhile_hides_no_other(
    memory: observe.Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    listdir = os.listdir

    def one_more(path: Any = ".") -> list[str]:
        names = listdir(path)
        return ["999999", *names] if str(path).endswith("/fd") else names

    monkeypatch.setattr(os, "listdir", one_more)
    found = found_here()
    assert found is not None
    assert found.path == memory.path


SWAPS = """
import os, socket, sys
memory, other = int(sys.argv[1]), socket.socket(socket.AF_UNIX).fileno()
print(flush=True)
while True:
    kept = os.dup(memory)
    os.dup2(other, memory)
    os.dup2(kept, memory)
    os.close(kept)
"""


def test_a_program_that_moves_its_memory_all_the_time_is_read_all_the_same(memory: observe.Memory) -> None:
    argv = [sys.executable, "-c", SWAPS, str(number(memory))]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, pass_fds=[number(memory)]) as child:
        try:
            assert child.stdout
            child.stdout.readline()
            theirs = observe.Memory(Path(f"/proc/{child.pid}/fd/{number(memory)}"), memory.file, os.getuid())
            for _ in range(8):
                theirs.path = Path(f"/proc/{child.pid}/fd/{number(memory)}")
                assert observe.look(theirs).error == "", "at last by this process, which has it too"
                assert found_here() is not None
        finally:
            child.kill()


# ---- On a network -------------------------------------------------------------------------------------------------
SERVER = f"""
import socket, sys
s = socket.create_server(("{SERVER_IP}", 8080))
elsewhere = socket.create_server(("{SERVER_IP}", 8081))
print(s.fileno(), elsewhere.fileno(), flush=True)
c, _ = s.accept()
print(c.fileno(), flush=True)
sys.stdin.read()
"""
POLICY = f"""
version: 1
interface: {SERVER_IFNAME}
backend: {{kind: afxdp, mode: copy, ring_size: 256}}
flows:
  - name: echo
    match: {{proto: tcp, local_port: 8080}}
    action: steer
"""


def seen_by(uid: int) -> list[str]:
    """Names of the applications that this user can look into."""
    ours, theirs = os.pipe()
    if (pid := os.fork()) == 0:
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        told = [a.summary.name for a in map(observe.look, observe.memories()) if a.summary]
        os.write(theirs, json.dumps(told).encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as pipe:
        told = json.loads(pipe.read())
    assert os.waitpid(pid, 0)[1] == 0
    return list(told)


def seen_from_elsewhere(lab: Lab, application: dict[str, Any]) -> None:
    """Like ss, the command tells of its own network namespace, unless it is asked for more."""
    done = conns("--app", NAME)
    assert done.returncode == 2
    assert re.search(r"no application .*, or in another network namespace: \d+ there \(--all\)", done.stderr)
    everything = json.loads(conns("--json", "--all", "--app", NAME).stdout)["applications"]
    assert [a["netns"] for a in everything] == [application["netns"]]
    (pid,) = {s["pid"] for s in application["sockets"] if s["pid"]}
    for more in (("--all", "--app", NAME), ("--app", str(pid))):
        title = conns(*more).stdout.splitlines()[0]
        assert f"direct mode on {SERVER_IFNAME} in {lab.server_ns}; TCP sockets" in title
    with netns.entered(lab.server_ns):
        title = conns("--app", NAME).stdout.splitlines()[0]
        assert f"direct mode on {SERVER_IFNAME}; TCP sockets" in title


@pytest.mark.netns
def test_an_application_on_a_network(lab: Lab, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY)
    run = [
        sys.executable,
        "-m",
        "bypass",
        "run",
        "-c",
        str(policy),
        "--user",
        "65534",
        "--procname",
        NAME,
        "--",
    ]
    pipe = subprocess.PIPE
    with (
        netns.entered(lab.server_ns),
        subprocess.Popen(
            [*run, "/usr/bin/python3", "-c", SERVER], stdin=pipe, stdout=pipe, text=True
        ) as program,
    ):
        assert program.stdout
        listener, elsewhere = map(int, program.stdout.readline().split())
        with (
            netns.entered(lab.client_ns),
            socket.create_connection((SERVER_IP, 8080), 10) as client,
        ):
            connection = int(program.stdout.readline())
            name = "{}:{}".format(*client.getsockname())
            with netns.entered(lab.server_ns):
                done = conns("--json", "--app", NAME)
            assert (done.returncode, done.stderr) == (0, "")
            [application] = json.loads(done.stdout)["applications"]
            assert (application["uid"], application["summary"]["interface"]) == (65534, SERVER_IFNAME)
            assert application["netns"] == (netns.RUN_DIR / lab.server_ns).stat().st_ino
            seen_from_elsewhere(lab, application)
            assert application["summary"]["device"] == "direct"
            assert of(application, listener)["place"] == "both"
            refused = of(application, elsewhere)
            assert (refused["place"], refused["why"]) == ("kernel", "no rule of the policy grants it")
            assert (refused["state"], refused["local"]) == ("LISTEN", f"{SERVER_IP}:8081")
            served = of(application, connection)
            assert (served["place"], served["state"], served["peer"]) == ("stack", "ESTAB", name)
            assert served["local"] == f"{SERVER_IP}:8080"
            assert NAME in seen_by(65534)
            assert NAME not in seen_by(65533), "another user's"
        program.communicate()
    assert program.returncode == 0
