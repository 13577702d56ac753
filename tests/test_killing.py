# SPDX-License-Identifier: Apache-2.0
"""SIGKILL under load (bench/killing): an embedded stack's peers have the kernel's answer, programs on the kernel behave
as the judge thinks that they do, and a judge that sees something else says so."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import missing, require_dpdk

from bench.apps.place import Place, lacking
from bench.killing import __main__ as killing
from bench.killing import client
from bench.killing.__main__ import Trial
from bench.killing.busy import Busy, Spent
from bench.killing.judge import GONE, OUTCOMES, Outcome, Seen, judge
from bench.killing.residue import Residue, Stay
from bench.killing.worlds import WORLDS, Alive, World
from bench.programs import BenchError
from bypass import netns
from bypass.lab import Lab

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [pytest.mark.bench, pytest.mark.usefixtures("bench_programs")]


# ---- Live --------------------------------------------------------------------------------------------------------
@pytest.mark.netns
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("embedded", "application"),
        ("echo", "application"),
        ("kernel-nginx", "worker"),
        ("kernel-redis", "application"),
        ("dpdk", "fwd"),
    ],
)
def test_a_kill_ends_as_it_has_to_and_leaves_nothing(name: str, role: str, tmp_path: Path) -> None:
    """(With 2 s of time: how long it takes is told by `make test-killing`, on a machine that does nothing else.)"""
    if lack := lacking(WORLDS[name].needs):
        missing(lack)
    if WORLDS[name].wire:
        require_dpdk()
    output = tmp_path / "killing.json"
    argv = [
        sys.executable, "-m", "bench.killing", "--only", name, "--role", role, "--times", "2",
        "--within", "2000", "--output", str(output),
    ]  # fmt: skip
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    every = json.loads(output.read_text())["trials"]
    trials = [trial for trial in every if not trial["excused"]]  # late on a busy machine: tried once more
    assert len(trials) == 2
    assert not any(trial["wrong"] for trial in every)
    for trial in trials:
        assert trial["wrong"] + trial["late"] == []
        assert trial["new_ms"] >= 0
        assert trial["probes"]["served"] > 0


def test_the_moments_of_a_seed_are_always_the_same_and_a_role_has_to_be_there(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "bench.killing", "--only", "embedded", "--role", "worker"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    if "missing" in done.stderr:
        missing([done.stderr.strip()])
    assert done.returncode == 2
    assert done.stderr == "killing: embedded has no role worker\n"


# ---- The judge ---------------------------------------------------------------------------------------------------
KILLED = 10.0
WITHIN = 0.1


def probes(*after: tuple[float, str]) -> list[tuple[float, float, str]]:
    """Two that were served before the kill; then results that began so many milliseconds after it and took one."""
    at = [(KILLED + ms / 1e3, KILLED + (ms + 1) / 1e3, result) for ms, result in after]
    return [(9.0, 9.1, "served"), (9.5, 9.6, "served"), *at]


def kept(
    ended_ms: float | None = None, how: str = "reset", answers_ms: tuple[float, ...] = ()
) -> dict[str, Any]:
    return {
        "answers": [9.5, *(KILLED + ms / 1e3 for ms in answers_ms)],
        "ended": None if ended_ms is None else [KILLED + ended_ms / 1e3, how],
    }


def judged(
    role: str, after: list[tuple[float, str]], *connections: dict[str, Any], until_ms: float = 150
) -> Seen:
    found = {"probes": probes(*after), "kept": list(connections), "ended": KILLED + until_ms / 1e3}
    return judge(found, KILLED, OUTCOMES.get(role, GONE), WITHIN)


def test_an_application_that_is_refused_and_reset_in_time_is_good() -> None:
    seen = judged("application", [(1, "silence"), (30, "refused"), (60, "refused")], kept(40), kept(20))
    assert seen.problems == []
    assert (seen.new_ms, seen.kept_ms) == (31.0, 40.0)


@pytest.mark.parametrize(
    ("role", "after", "connections", "why"),
    [
        ("application", [(120, "refused")], [kept(1)], "refused only after 121 ms"),
        ("application", [(1, "refused"), (5, "silence")], [kept(1)], "{'silence': 1}"),
        ("application", [(1, "served"), (50, "served")], [kept(1)], "never refused: {'served': 2}"),
        ("application", [], [kept(1)], "there were none"),
        ("application", [(1, "refused")], [kept(101)], "ended only after 101 ms"),
        ("application", [(1, "refused")], [kept(1, "eof")], "ended by eof, not by reset"),
        ("application", [(1, "refused")], [kept()], "kept connection 0 did not end"),
        ("application", [(1, "refused")], [kept(1), kept(-5)], "connection 1 ended before the kill"),
        ("worker", [(1, "refused"), (120, "served")], [kept(1)], "served only after 121 ms"),
        ("worker", [(1, "served"), (5, "reset")], [kept(1)], "{'reset': 1}"),
        ("worker", [(1, "served")], [kept()], "neither ended nor was answered again"),
        ("broker", [(1, "reset"), (5, "served")], [kept(answers_ms=(50, 100))], "{'reset': 1}"),
        ("broker", [(1, "served")], [kept(40)], "ended: reset"),
        ("broker", [(1, "served")], [kept(answers_ms=(10, 149))], "not answered for 139 ms"),
        (
            "fwd",
            [(1, "served")],
            [kept(1), kept(answers_ms=(20,))],
            "connection 1 was not answered for 130 ms",
        ),
        ("owner of a port", [(1, "silence"), (30, "served")], [kept()], "{'served': 1}"),
        ("owner of a port", [(1, "refused"), (30, "refused")], [kept()], "never silence: {'refused': 2}"),
        ("owner of a port", [(1, "silence")], [kept(answers_ms=(5, 140))], "answered 140 ms after the kill"),
        ("owner of a port", [(1, "silence")], [kept(40)], "ended by reset"),
    ],
)
def test_what_should_not_happen_is_told(
    role: str, after: list[tuple[float, str]], connections: list[dict[str, Any]], why: str
) -> None:
    problems = judged(role, after, *connections).problems
    assert len(problems) == 1, problems
    assert why in problems[0]


def test_who_goes_on_has_to_be_answered_all_the_time() -> None:
    assert judged("broker", [(1, "served")], kept(answers_ms=(50, 100))).problems == []
    assert judged("fwd", [(1, "served")], kept(50), kept(answers_ms=(50, 100))).problems == []
    assert judged("owner of a port", [(1, "served"), (4, "silence")], kept(answers_ms=(2,))).problems == []
    assert judged("worker", [(1, "eof"), (4, "served")], kept(3, "eof")).problems == []


def test_what_only_took_long_is_late_and_the_rest_is_wrong() -> None:
    slow = judged("application", [(1, "silence"), (120, "refused"), (130, "unanswered")], kept(101))
    assert (len(slow.late), slow.wrong) == (3, [])
    bad = judged("application", [(1, "refused"), (5, "served"), (6, "silence")], kept(1, "eof"), kept())
    assert (bad.late, len(bad.wrong)) == ([], 3)


def test_a_load_that_was_not_served_before_the_kill_proves_nothing() -> None:
    found = {"probes": [(9.0, 9.1, "unanswered"), (10.0, 10.1, "served")], "kept": [], "ended": 10.15}
    assert judge(found, KILLED, Outcome("served", "go on"), 1).problems == [
        "before the kill: {'unanswered': 1}"
    ]


# ---- One kill after the other ------------------------------------------------------------------------------------
class Played(World):
    """A world that counts its starts."""

    roles = ("application", "broker")

    starts = 0

    @contextmanager
    def running(self, here: Place) -> Iterator[Alive]:
        self.starts += 1
        yield PlayedAlive()


class PlayedAlive(Alive):
    def victim(self, role: str) -> int:
        return 0

    def family(self) -> dict[int, str]:
        return {}

    def mended(self, role: str) -> list[str] | None:
        return ["a descriptor"] if role == "application" else None


LATE = Seen(late=["late"])


def played(
    monkeypatch: pytest.MonkeyPatch, lab: Lab, *script: tuple[Seen, Spent], roles: str
) -> tuple[list[Trial], Played]:
    """What is told of kills of these roles (a or b)."""
    comes = iter(script)

    def kill(lab: Lab, world: World, here: Place, alive: Alive, it: Trial, within_s: float) -> None:
        seen, it.spent = next(comes)
        it.seen = Seen(list(seen.wrong), list(seen.late))

    monkeypatch.setattr(killing, "kill", kill)
    told: list[Trial] = []
    world = Played()
    names = {"a": "application", "b": "broker"}
    killing.Series(lab, world, 0.1, told.append).run([(names[role], 0.0) for role in roles])
    assert next(comes, None) is None
    return told, world


QUIET, BUSY = Spent(0.0, 0.0), Spent(0.9, 0.0)


@pytest.mark.netns
def test_a_world_is_started_anew_only_where_it_has_to_be(monkeypatch: pytest.MonkeyPatch, lab: Lab) -> None:
    told, world = played(monkeypatch, lab, *[(Seen(), QUIET)] * 5, roles="aabab")
    assert [it.role[0] for it in told] == list("aabab")
    assert world.starts == 2
    assert [it.seen.wrong for it in told] == [["left: a descriptor"]] * 2 + [[]] + [
        ["left: a descriptor"]
    ] + [[]]


@pytest.mark.netns
def test_who_is_late_on_a_busy_machine_is_tried_twice_more_and_who_is_wrong_is_not(
    monkeypatch: pytest.MonkeyPatch, lab: Lab
) -> None:
    told, _ = played(monkeypatch, lab, (LATE, BUSY), (Seen(), BUSY), roles="b")
    assert [(it.tries, it.excused()) for it in told] == [(0, True), (1, False)]
    told, _ = played(monkeypatch, lab, *[(LATE, BUSY)] * 3, roles="b")
    assert [(it.tries, it.excused()) for it in told] == [(0, True), (1, True), (2, False)]
    told, _ = played(monkeypatch, lab, (LATE, QUIET), roles="b")
    assert [it.excused() for it in told] == [False]
    told, _ = played(monkeypatch, lab, (Seen(["wrong"], ["late"]), BUSY), roles="b")
    assert [it.excused() for it in told] == [False]


@pytest.mark.netns
def test_a_kill_that_cannot_be_made_is_told_and_the_next_one_follows(
    monkeypatch: pytest.MonkeyPatch, lab: Lab
) -> None:
    def kill(lab: Lab, world: World, here: Place, alive: Alive, it: Trial, within_s: float) -> None:
        raise BenchError("the peers were not answered")

    monkeypatch.setattr(killing, "kill", kill)
    told: list[Trial] = []
    world = Played()
    killing.Series(lab, world, 0.1, told.append).run([("broker", 0.0), ("application", 0.0)])
    assert [it.seen.wrong for it in told] == [["the peers were not answered"]] * 2
    assert world.starts == 2


@pytest.mark.netns
def test_processor_time_of_others_and_of_the_lab_are_told_apart(lab: Lab) -> None:
    spin = [sys.executable, "-c", "while True: pass"]
    own = subprocess.Popen(lab.command("server", spin))
    others = [subprocess.Popen(spin) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        time.sleep(0.3)
        busy = Busy(lab)
        time.sleep(0.5)
        spent = busy.spent()
    finally:
        for process in (own, *others):
            process.kill()
            process.wait()
    assert 0.3 < spent.others <= 1
    assert spent.waited_ms > 20
    assert spent.too_busy()
    assert not QUIET.too_busy()


# ---- The peers ---------------------------------------------------------------------------------------------------
@contextmanager
def server(answer: Any) -> Iterator[tuple[str, int]]:
    """answer(sock) in a thread for each connection."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(sock,)).start()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()


def _pong(sock: socket.socket) -> None:
    with sock, suppress(ConnectionError):
        while sock.recv(100):
            sock.sendall(b"pong")


def _other(sock: socket.socket) -> None:
    with sock:
        sock.recv(100)
        sock.sendall(b"ping")


def _eof(sock: socket.socket) -> None:
    with sock:
        sock.recv(100)


def _nothing(sock: socket.socket) -> None:
    with sock:
        while sock.recv(100):
            continue


@pytest.mark.parametrize(
    ("answer", "result"),
    [(_pong, "served"), (_other, "answered b'ping'"), (_eof, "eof"), (_nothing, "unanswered")],
)
def test_a_new_connection_tells_what_became_of_it(answer: Any, result: str) -> None:
    with server(answer) as where:
        assert client.probe(where, b"ask", b"pong") == result


def test_a_closed_port_refuses() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        where = listener.getsockname()
    assert client.probe(where, b"ask", b"pong") == "refused"


def test_a_kept_connection_asks_again_when_it_was_answered_and_hears_its_end() -> None:
    with server(_pong) as where:
        connection = client.Kept(where, b"ask")
        deadline = time.monotonic() + 20
        while len(connection.answers) < 3 and time.monotonic() < deadline:
            connection.turn()
        assert len(connection.answers) >= 3
        assert connection.ended is None
        connection.sock.close()
    with server(_eof) as where:
        connection = client.Kept(where, b"ask")
        while not connection.ended and time.monotonic() < deadline:
            connection.turn()
            connection.turn()
        assert connection.ended is not None
        assert connection.ended[1] in ("eof", "reset")
        connection.sock.close()


# ---- What is left ------------------------------------------------------------------------------------------------
@pytest.mark.netns
def test_a_process_a_name_and_a_program_that_are_left_are_told(lab: Lab) -> None:
    residue = Residue(lab)
    assert residue.check(set(), 0) == []
    with netns.entered(lab.server_ns):
        sleeper = subprocess.Popen(["sleep", "1000"])
        named = socket.socket(socket.AF_UNIX)
        named.bind("\0bypass/left")
    try:
        left = residue.check(set(), 0)
        assert f"process: sleep ({sleeper.pid})" in left
        assert "socket: @bypass/left" in left
        assert len(left) == 2
    finally:
        sleeper.kill()
        sleeper.wait()
        named.close()
    assert residue.check(set()) == []


@pytest.mark.netns
@pytest.mark.parametrize("lab", [{"wire": True}], indirect=True)
def test_a_tap_that_is_left_is_told(lab: Lab) -> None:
    residue = Residue(lab)
    assert residue.check(set(), 0) == []
    subprocess.run(["ip", "-n", lab.server_ns, "tuntap", "add", "bypass0", "mode", "tap"], check=True)
    assert residue.check(set(), 0) == ["interface: bypass0"]


@pytest.mark.netns
def test_a_bpf_object_that_is_left_is_told(lab: Lab) -> None:
    """This very process holds one as long as the steering program is attached."""
    from bench.mixed.leftovers import bpf_objects
    from bypass.policy import parse_policy
    from bypass.steering import Steering

    policy = parse_policy(
        "version: 1\ninterface: bypass0\nbackend: {kind: afxdp}\n"
        "flows: [{name: web, match: {proto: tcp, local_port: 80}, action: steer}]"
    )
    residue = Residue(lab)
    with netns.entered(lab.server_ns), Steering(policy, "bypass0", queues=2):
        objects = bpf_objects(os.getpid())
        assert {kind for kind, _ in objects} >= {"prog", "map"}
        left = residue.check(objects, 0, 0)
        assert any(text.startswith("attached: ") for text in left)
        assert any(text.startswith("BPF prog ") for text in left)


@pytest.mark.netns
def test_descriptors_and_processes_that_those_who_stay_have_more_than_before_are_told(lab: Lab) -> None:
    grow = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGUSR1, lambda *_: os.dup(0))\n"
        "print('ready', flush=True)\n"
        "while True: signal.pause()"
    )
    stays = subprocess.Popen(lab.command("server", [sys.executable, "-c", grow]), stdout=subprocess.PIPE)
    other = None
    try:
        assert stays.stdout is not None
        assert stays.stdout.readline() == b"ready\n"
        stay = Stay(lab)
        assert stay.check(0) == []
        stays.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + 20
        while not (left := stay.check(0)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert left == [f"1 descriptors of process {stays.pid}"]
        other = subprocess.Popen(lab.command("server", ["sleep", "1000"]))
        while "1 processes sleep" not in (left := stay.check(0)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "1 processes sleep" in left
    finally:
        for process in (stays, other):
            if process is not None:
                process.kill()
                process.communicate()
