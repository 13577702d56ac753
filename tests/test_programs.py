# SPDX-License-Identifier: Apache-2.0
"""Debian's programs, unmodified (bench/apps): each works when the kernel serves it and by `bypass run`, and the
proof says who did; what would be wrong is noticed."""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import missing
from dpdk_support import require_dpdk

from bench.apps import __main__ as command
from bench.apps import hold, iperf, redis, show, web
from bench.apps.launch import LAUNCHERS, BypassLauncher, DpdkLauncher, Grant, KernelLauncher
from bench.apps.place import Place, environment, find, lacking, place
from bench.apps.run import APPS, Verdict, idle_cpu, idle_users, run
from bench.programs import BenchError
from bypass.errors import DeviceError
from bypass.lab import Lab
from bypass.policy import parse_policy

ROOT = Path(__file__).resolve().parent.parent
SCALE = 0.03
ON_DPDK = ("redis", "nginx", "nginx-short", "memcached", "asyncio", "curl")
"""Children, threads, one thread, a client. The others take longer: `make test-programs` runs all of them there."""

pytestmark = pytest.mark.bench


@pytest.mark.netns
@pytest.mark.parametrize("name", sorted(APPS))
def test_a_program_works_on_the_kernel_and_the_proof_says_so(name: str) -> None:
    if lack := APPS[name].missing():
        missing(lack)
    verdict = run(APPS[name], KernelLauncher, scale=SCALE)
    assert verdict.problems == []
    assert verdict.figures
    assert (verdict.rate or 0) > 0, f"no {verdict.unit}"
    assert verdict.elsewhere != []  # the kernel served, and the proof does not believe in bypass
    assert verdict.proof["active_opens"] + verdict.proof["passive_opens"] > 0


@pytest.mark.netns
@pytest.mark.parametrize("name", sorted(APPS))
def test_a_program_works_on_bypass_and_the_kernel_sees_none_of_its_connections(name: str) -> None:
    if lack := APPS[name].missing():
        missing(lack)
    verdict = run(APPS[name], BypassLauncher, scale=SCALE)
    assert verdict.problems == []
    assert verdict.figures
    assert verdict.elsewhere == []
    assert verdict.proof["active_opens"] + verdict.proof["passive_opens"] == 0


@pytest.mark.netns
@pytest.mark.parametrize("name", ON_DPDK)
def test_a_program_works_on_a_port_of_dpdk_and_the_kernel_sees_none_of_its_connections(name: str) -> None:
    require_dpdk()
    if lack := APPS[name].missing():
        missing(lack)
    verdict = run(APPS[name], DpdkLauncher, scale=SCALE)
    assert verdict.problems == []
    assert verdict.elsewhere == []
    assert verdict.proof["active_opens"] + verdict.proof["passive_opens"] == 0


def test_the_command_says_in_one_line_what_it_cannot_do(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "bench.apps", "--only", "fortune"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'fortune' is not one of" in done.stderr


# ---- What is shown -----------------------------------------------------------------------------------------------
PROOF = {"steered": 0.9996, "idle_cpu": 0.021, "active_opens": 0, "passive_opens": 0}
SEEN = [
    Verdict("curl", "kernel", rate=12.25, unit="files/s", proof=PROOF | {"steered": 0.0, "active_opens": 20}),
    Verdict("redis", "dpdk", rate=76530.6, unit="GET/s", proof=PROOF),
    Verdict("redis", "kernel", problems=["it did not start", "a process is left"], unit="GET/s"),
]


def test_verdicts_stand_side_by_side_a_line_a_program_and_a_column_a_world() -> None:
    heads = [head.split() for head in show.columns(SEEN)]
    figures = ["!", "rate", "steered", "idle", "opens"]
    assert heads == [["program"], ["rate", "of"], ["kernel", *figures], ["dpdk", *figures]]
    assert [[cell.split() for cell in row] for row in show.rows(SEEN)] == [
        [["curl"], ["files/s"], ["0", "12.2", "0.0%", "2.1%", "20+0"], []],
        [["redis"], ["GET/s"], ["2", "-", "-", "-", "-"], ["0", "76,531", "100.0%", "2.1%", "0+0"]],
    ]
    ends = {len(line) for row in show.rows(SEEN) for line in row[2:] if line}
    assert ends == {len(show.columns(SEEN)[2].splitlines()[1])}, "figures stand below their heads"


def test_the_same_stands_in_the_file_by_program_and_world() -> None:
    found = show.programs(SEEN)
    assert found["redis"]["dpdk"] == {"problems": 0, "rate": 76530.6} | PROOF
    assert found["redis"]["kernel"] == {"problems": 2, "rate": None} | dict.fromkeys(PROOF)
    assert found["curl"]["unit"] == "files/s"
    assert "dpdk" not in found["curl"]


def test_dpdk_is_left_out_where_it_is_not_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise DeviceError("no plug-in: apt-get install dpdk-dev")

    monkeypatch.setattr(command, "load_plugin", absent)
    launchers, left_out = command.chosen(())
    assert launchers == ["kernel", "bypass", "shared"]
    assert left_out == {"dpdk": "no plug-in: apt-get install dpdk-dev"}
    with pytest.raises(BenchError, match="dpdk: no plug-in"):
        command.chosen(("dpdk",))
    assert command.chosen(("shared", "kernel", "shared")) == (["shared", "kernel"], {})


# ---- Starting and ending -----------------------------------------------------------------------------------------
@pytest.fixture
def here(lab: Lab) -> Iterator[Place]:
    with place(lab) as it:
        yield it


@pytest.mark.netns
def test_a_program_runs_as_an_unprivileged_user_in_the_servers_namespace(here: Place) -> None:
    script = "import os, socket; print(os.getuid(), os.getgroups(), [n for _, n in socket.if_nameindex()])"
    program = KernelLauncher(here, ()).start(["/usr/bin/python3", "-c", script])
    assert program.process.wait(20) == 0
    nobody = pwd.getpwnam("nobody")
    assert program.said() == f"{nobody.pw_uid} [] ['lo', 'bypass0']"


@pytest.mark.netns
def test_a_program_that_leaves_a_child_is_noticed_and_the_child_is_killed(here: Place) -> None:
    script = "sleep 1000 & echo $!; trap 'exit 0' TERM; while :; do sleep 0.05; done"
    program = KernelLauncher(here, ()).start(["/bin/sh", "-c", script])
    wait_until(lambda: program.said() != "")
    child = int(program.said())
    wait_until(lambda: child in program.pids("sleep"))  # it is the shell's copy before
    program.end()
    assert any(f"a process is left: sleep ({child})" in text for text in program.problems)
    wait_until(lambda: not Path(f"/proc/{child}").exists() or is_zombie(child))


@pytest.mark.netns
def test_a_program_that_fails_says_how(here: Place) -> None:
    program = KernelLauncher(here, ()).start(["/bin/sh", "-c", "echo no luck; exit 3"])
    program.process.wait(20)
    program.end()
    assert program.problems == ["exit code 3: no luck"]


@pytest.mark.netns
def test_a_server_that_dies_while_it_is_used_is_a_problem() -> None:
    class Dies(APPS["asyncio"]):  # type: ignore[misc]
        def exercise(self) -> dict[str, object]:
            self.server.process.send_signal(signal.SIGKILL)
            self.server.process.wait()
            return {}

    found = run(Dies, KernelLauncher, scale=SCALE).problems
    assert any("ended before it was told to" in text for text in found)


@pytest.mark.netns
def test_a_program_that_uses_the_processor_while_nobody_asks_is_noticed(here: Place) -> None:
    launcher = KernelLauncher(here, ())
    with launcher.start(["/bin/sleep", "1000"]):
        assert idle_cpu(idle_users(here.lab)) < KernelLauncher.idle_cpu
    with launcher.start(["/bin/sh", "-c", "while :; do :; done"]):
        assert idle_users(here.lab)["sh"] > KernelLauncher.idle_cpu


def wait_until(condition: object) -> None:
    from bypass.lab import wait_for

    wait_for(condition, 20, "a condition")  # type: ignore[arg-type]


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


# ---- What is needed ----------------------------------------------------------------------------------------------
def test_a_missing_program_is_named_with_what_brings_it() -> None:
    assert lacking(["sh"]) == []
    assert lacking(["no-such-program"]) == ["no-such-program (scripts/programs)"]


def test_programs_are_debians_and_their_environment_is_not_the_callers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("LD_PRELOAD", "nothing.so")
    assert str(find("sh")).endswith("/bin/sh")
    assert not set(environment(tmp_path)) - {"PATH", "HOME", "LANG", "LD_LIBRARY_PATH"}


def test_a_policy_grants_what_a_program_listens_on_and_connects_to(tmp_path: Path) -> None:
    grants = (Grant(6379), Grant(5201, "udp"), Grant(80, remote=True))
    launcher = BypassLauncher(Place(Lab("none"), tmp_path), grants, stack={"conns": 5000})
    policy = parse_policy(launcher.policy().read_text())
    rules = [rule.match_text() for rule in policy.flows]
    assert len(rules) == 3
    assert "6379" in rules[0]
    assert "udp" in rules[1]
    assert "192.0.2.20" in rules[2]


def test_launchers_are_known_by_name() -> None:
    assert set(LAUNCHERS) == {"kernel", "bypass", "shared", "dpdk", "up"}


# ---- Verdicts of the clients -------------------------------------------------------------------------------------
def answered(answer: bytes) -> int:
    """fetch() of one file from a server that says this and closes."""
    ours, theirs = socket.socketpair()
    theirs.sendall(answer)
    theirs.shutdown(socket.SHUT_WR)
    reader = web.Reader(ours)
    try:
        return web.fetch(reader, "f", hashlib.sha256(b"body").hexdigest())
    finally:
        reader.close()
        theirs.close()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n"


def test_a_whole_answer_is_good() -> None:
    assert answered(HEAD + b"body") == 4


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (HEAD + b"bod", "1 bytes of 4 are missing"),
        (HEAD + b"bodY", "wrong hash"),
        (HEAD[:-2], "inside of the header"),
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n", "answered b'HTTP/1.1 502"),
    ],
)
def test_an_answer_that_is_not_whole_or_another_is_lost(answer: bytes, why: str) -> None:
    with pytest.raises(web.Lost, match=why.replace("(", r"\(")):
        answered(answer)


def test_an_end_before_the_answer_may_be_asked_again() -> None:
    with pytest.raises(ConnectionError):
        answered(b"")


def test_iperf3_says_what_is_wrong() -> None:
    with pytest.raises(BenchError, match="refused"):
        iperf.judged('{"error": "connection refused"}')
    with pytest.raises(BenchError, match="nothing arrived"):
        iperf.judged(json.dumps({"end": {"sum_received": {"bits_per_second": 0, "bytes": 0}}}))
    with pytest.raises(BenchError, match="no JSON"):
        iperf.judged("iperf3: error")
    good = {"end": {"sum_received": {"bits_per_second": 2e6, "bytes": 5}}}
    assert iperf.judged(json.dumps(good)) == {"mbit_per_s": 2.0}


def test_redis_answers_are_read_and_errors_raised() -> None:
    ours, theirs = socket.socketpair()
    with redis.Resp(ours) as client, theirs:
        theirs.sendall(b"+OK\r\n:7\r\n$3\r\na\r\n\r\n$-1\r\n*2\r\n:1\r\n$1\r\nx\r\n-ERR no\r\n")
        assert [client.call("GET", "k") for _ in range(5)] == [b"OK", 7, b"a\r\n", None, [1, b"x"]]
        with pytest.raises(BenchError, match="ERR no"):
            client.answer()
        theirs.sendall(b"$5\r\nab")
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(EOFError):
            client.answer()


def test_held_connections_that_answer_wrongly_or_cannot_be_opened_are_problems(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hold, "PATIENCE_S", 0.2)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]

    def answers(sock: socket.socket, answer: bytes) -> None:
        with sock, suppress(ConnectionResetError):  # the client need not have read all
            while sock.recv(64):
                sock.sendall(answer)

    def serve() -> None:
        threads = []
        for answer in (b"+PONG\r\n", b"-ERR\r\n"):
            threads.append(threading.Thread(target=answers, args=(listener.accept()[0], answer)))
            threads[-1].start()
        for t in threads:
            t.join()

    thread = threading.Thread(target=serve)
    thread.start()
    found = hold.main("127.0.0.1", port, 2)
    thread.join()
    listener.close()
    assert found["held"] == 2
    assert any("answered b'-ERR" in text for text in found["problems"])
    assert any("connection 1" in text for text in hold.main("127.0.0.1", port, 1)["problems"])


def test_a_folder_of_a_place_belongs_to_the_programs_user_and_is_removed() -> None:
    if os.geteuid() != 0:
        missing(["root"])
    with place(Lab("none")) as there:
        assert there.folder.stat().st_uid == pwd.getpwnam("nobody").pw_uid
    assert not there.folder.exists()
