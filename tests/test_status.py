# SPDX-License-Identifier: Apache-2.0
"""A running process answers `bypass flows` and `bypass stats`; who may ask, who is believed, and what stays behind."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bypass import netns, raw, status
from bypass.cli import cli
from bypass.cli.flows import print_flows
from bypass.errors import BypassError
from bypass.lab import Lab
from bypass.policy import parse_policy
from bypass.status import Instance, Snapshot, StatusServer, ask, instances
from bypass.steer_maps import Count, Endpoint

PATIENCE_S = 20.0
POLICY = Path(__file__).parent.parent / "config" / "web.yaml"


class Source:
    """Answers that can be told apart."""

    def __init__(self, size: int = 1) -> None:
        self.size = size

    def flows(self, limit: int) -> dict[str, Any]:
        return {"asked": "flows", "limit": limit, "padding": "x" * self.size}

    def stats(self, limit: int) -> dict[str, Any]:
        return {"asked": "stats", "limit": limit}


@contextlib.contextmanager
def polled(server: StatusServer) -> Iterator[None]:
    """Polls the server in another thread, as a program's event loop would."""
    end = threading.Event()

    def loop() -> None:
        while not end.is_set():
            if select.select([server], [], [], 0.02)[0]:
                server.poll()

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


@pytest.fixture
def ifname() -> str:
    return f"t{os.getpid()}"


def mine(ifname: str) -> Instance:
    (found,) = instances(ifname)
    return found


def test_a_question_is_answered(ifname: str) -> None:
    with StatusServer(ifname, Source()) as server, polled(server):
        instance = mine(ifname)
        assert (instance.ifname, instance.pid) == (ifname, os.getpid())
        assert ask(instance, "flows", 7) == {"asked": "flows", "limit": 7, "padding": "x"}
        assert ask(instance, "stats", 1)["asked"] == "stats"
    assert instances(ifname) == []


def test_a_long_answer_arrives_whole(ifname: str) -> None:
    with StatusServer(ifname, Source(5_000_000)) as server, polled(server):
        assert len(ask(mine(ifname), "flows")["padding"]) == 5_000_000


def test_many_may_ask_at_once(ifname: str) -> None:
    with StatusServer(ifname, Source()) as server, polled(server), ThreadPoolExecutor(4) as pool:
        limits = range(40)
        answers = pool.map(lambda n: ask(mine(ifname), "flows", n)["limit"], limits)
        assert list(answers) == list(limits)


def test_two_stacks_of_one_process_are_two(ifname: str) -> None:
    with StatusServer(ifname, Source()), StatusServer(ifname, Source()):
        names = [i.name for i in instances(ifname)]
        assert names == [f"@bypass/{ifname}/{os.getpid()}", f"@bypass/{ifname}/{os.getpid()}.2"]


def connected(ifname: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect("\0" + mine(ifname).name[1:])
    return sock


@pytest.mark.parametrize(
    "request_", [b"", b"flows", b"\n", b"flows -1\n", b"rm 1\n", b"flows 1 2\n", b"x" * 200]
)
def test_nonsense_is_answered_with_an_error_or_the_end(ifname: str, request_: bytes) -> None:
    with StatusServer(ifname, Source()) as server, polled(server):
        with connected(ifname) as sock:
            sock.settimeout(PATIENCE_S)
            sock.sendall(request_)
            sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                answer = sock.recv(1000)
                assert answer == b"" or "error" in json.loads(answer)
        assert ask(mine(ifname), "flows", 3)["limit"] == 3


def test_clients_that_say_nothing_do_not_keep_others_out(
    ifname: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "CLIENT_S", 0.2)
    with StatusServer(ifname, Source()) as server, contextlib.ExitStack() as stack:
        for _ in range(2 * status.MAX_CLIENTS):
            stack.enter_context(connected(ifname))
            server.poll()
        assert len(server._clients) == status.MAX_CLIENTS
        end = time.monotonic() + PATIENCE_S
        while server._clients:
            assert time.monotonic() < end
            select.select([server], [], [], 0.02)
            server.poll()
        with polled(server):
            assert ask(mine(ifname), "flows", 1)["limit"] == 1


def test_a_process_that_is_busy_is_named(ifname: str) -> None:
    with (
        StatusServer(ifname, Source()),
        pytest.raises(BypassError, match=rf"process {os.getpid()} does not answer"),
    ):
        ask(mine(ifname), "flows", timeout=0.05)


def test_only_root_and_the_same_user_are_answered(ifname: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with StatusServer(ifname, Source()) as server, polled(server):
        real = status._peer_uid
        # The server sees a stranger; its end of the connection is the one with a name.
        monkeypatch.setattr(status, "_peer_uid", lambda s: 12345 if s.getsockname() else real(s))
        with pytest.raises(BypassError, match=r"refuses: only root and its own user|cannot be asked"):
            ask(mine(ifname), "flows")


def test_an_impostor_is_not_believed(ifname: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("missing: root, to become another user")
    program = (
        "import os, socket, sys\n"
        "os.setuid(65534)\n"
        "s = socket.socket(socket.AF_UNIX)\n"
        f"s.bind('\\0bypass/{ifname}/1')\n"
        "s.listen()\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(BypassError, match="belongs to user 65534: not believed"):
            ask(mine(ifname), "flows")
        other.communicate("")


# ---- The commands --------------------------------------------------------------------------------------------------


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, args, standalone_mode=False)


@pytest.mark.parametrize("command", ["flows", "stats"])
def test_nobody_to_ask_is_an_error_that_says_so(command: str) -> None:
    with pytest.raises(BypassError, match="no process steers flows on nosuch0 in this network namespace"):
        raise run(command, "nosuch0").exception  # type: ignore[misc]


@pytest.mark.parametrize("command", ["flows", "stats"])
def test_help_has_examples(command: str) -> None:
    assert f"bypass {command}" in run(command, "--help").output.partition("Examples")[2]


def test_what_a_limit_leaves_out_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    rule = {"name": "a", "action": "drop", "packets": 1, "bytes": 60, "match": "proto udp"}
    answer = {"interface": "eth1", "pid": 1, "policy": "p", "mode": "copy", "xdp_mode": "native"}
    print_flows({**answer, "rules": [rule], "rules_total": 9, "entries": [], "entries_total": 0})
    told = capsys.readouterr().out
    assert "... and 8 more rules" in told
    assert "No live entries" in told


class FakeSteering:
    """Three rules and two entries, the later ones busier."""

    def __init__(self) -> None:
        text = "version: 1\ninterface: eth1\nbackend: {kind: afxdp}\nflows:\n"
        for n in range(3):
            text += f"- {{name: r{n}, match: {{proto: tcp, local_port: {n + 1}}}, action: steer}}\n"
        self.policy = parse_policy(text, "p.yaml")

    def rules(self) -> dict[str, Count]:
        return {"r0": Count(1, 60), "r1": Count(5, 300), "r2": Count(3, 180)}

    def entries(self) -> dict[int, tuple[Endpoint, Count]]:
        def entry(n: int) -> Endpoint:
            return Endpoint(n, 6, None, 80 + n, ipaddress.IPv4Address("192.0.2.20"), 5, 0, n == 1)

        return {n: (entry(n), Count(n, 60 * n)) for n in range(2)}


class BlockSteering(FakeSteering):
    """Whose only entry is a block of local ports."""

    def entries(self) -> dict[int, tuple[Endpoint, Count]]:
        block = Endpoint(7, 6, ipaddress.IPv4Address("192.0.2.10"), 32768, None, None, 0, False, block=True)
        return {7: (block, Count(2, 120))}


def test_a_block_of_ports_is_one_entry_with_its_first_and_last(capsys: pytest.CaptureFixture[str]) -> None:
    device = SimpleNamespace(
        ifname="eth1", mode="copy", mode_reason="", xdp_mode="native", queue_numbers=(0,)
    )
    answer = Snapshot(BlockSteering(), device, name="web").flows(9)
    [entry] = answer["entries"]
    assert (entry["local_port"], entry["last_local_port"], entry["remote"]) == (32768, 33023, None)
    print_flows(answer)
    assert "192.0.2.10:32768-33023" in capsys.readouterr().out


def test_a_snapshot_holds_the_busiest_rules_and_entries() -> None:
    device = SimpleNamespace(
        ifname="eth1", mode="copy", mode_reason="", xdp_mode="native", queue_numbers=(0,)
    )
    answer = Snapshot(FakeSteering(), device, name="web").flows(1)
    assert json.loads(json.dumps(answer)) == {
        "interface": "eth1",
        "pid": os.getpid(),
        "name": "web",
        "policy": "p.yaml",
        "mode": "copy",
        "mode_reason": "",
        "xdp_mode": "native",
        "queues": [0],
        "hardware": None,
        "rules": [
            {
                "index": 1,
                "name": "r1",
                "line": 6,
                "match": "proto tcp, local_port 2",
                "action": "steer",
                "packets": 5,
                "bytes": 300,
            }
        ],
        "rules_total": 3,
        "entries": [
            {
                "entry": 1,
                "proto": "tcp",
                "local": None,
                "local_port": 81,
                "last_local_port": 81,
                "remote": "192.0.2.20",
                "remote_port": 5,
                "drain": True,
                "packets": 1,
                "bytes": 60,
            }
        ],
        "entries_total": 2,
    }


SERVER = f"""
import sys
from bypass import Stack
with Stack.from_policy({str(POLICY)!r}) as stack:
    server = stack.create_server(("192.0.2.10", 8080))
    print("ready", flush=True)
    while True:
        sock, _ = server.accept()
        sock.sendall(sock.recv(100))
        sock.close()
"""


@contextlib.contextmanager
def serving(lab: Lab) -> Iterator[subprocess.Popen[str]]:
    argv = lab.command("server", [sys.executable, "-c", SERVER])
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def told(lab: Lab, *args: str) -> Any:
    argv = lab.command("server", [sys.executable, "-m", "bypass", *args])
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) if "--json" in args else done.stdout


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.netns
def test_flows_and_stats_of_a_server_that_has_served(lab: Lab) -> None:
    with serving(lab):
        with netns.entered(lab.client_ns):
            client = socket.create_connection(("192.0.2.10", 8080), timeout=PATIENCE_S)
        with client:
            client.sendall(b"hello")
            assert client.recv(100) == b"hello"
            assert client.recv(100) == b""
        flows = told(lab, "flows", "--json")
        (process,) = flows["processes"]
        assert (process["interface"], process["policy"], process["mode"]) == ("bypass0", str(POLICY), "copy")
        (rule,) = flows["rules"]
        assert (rule["name"], rule["action"]) == ("web", "steer")
        (entry,) = flows["entries"]
        assert (entry["local"], entry["local_port"], entry["remote"]) == ("192.0.2.10", 8080, None)
        assert rule["packets"] >= entry["packets"] >= 4

        (numbers,) = told(lab, "stats", "bypass0", "--json")["processes"]
        steered = next(r for r in numbers["reasons"] if r["name"] == "steered")
        assert steered["packets"] >= 4
        assert numbers["guard"]["active"]
        assert sum(ring["rx_packets"] for ring in numbers["rings"].values()) >= 4
        assert numbers["stack"]["tcp_passive_opens"] == 1
        assert numbers["in_use"]["listeners"] == 1

        assert "192.0.2.10:8080" in told(lab, "flows")
        text = told(lab, "stats")
        for word in ("STEERING", "RINGS", "STACK", "guard: active"):
            assert word in text
        assert "TCP_NO_SOCKET".lower() in told(lab, "stats", "--all")


@pytest.mark.netns
def test_a_killed_process_is_gone_from_the_list_at_once(lab: Lab) -> None:
    with serving(lab) as process:
        assert [i.ifname for i in netns.run(lab.server_ns, instances)] == ["bypass0"]
        with pytest.raises(BypassError, match=f"there are some in: .*{lab.server_ns}"):
            raise run("flows", "bypass0").exception  # type: ignore[misc]
        pid = netns.run(lab.server_ns, instances)[0].pid
        os.kill(pid, signal.SIGKILL)
        process.wait()
        wait_for(lambda: netns.run(lab.server_ns, instances) == [])


@pytest.mark.netns
def test_a_raw_port_answers_while_it_waits(lab: Lab) -> None:
    text = POLICY.read_text().replace("tcp", "udp").replace("8080", "5000")
    with netns.entered(lab.server_ns):
        port = raw.open_port(parse_policy(text), [("udp", "192.0.2.10", 5000)])
    end = threading.Event()

    def receive() -> None:
        while not end.is_set():
            port.recv(timeout=0.1)

    with port:
        thread = threading.Thread(target=receive)
        thread.start()
        try:
            with netns.entered(lab.server_ns):
                (instance,) = instances("bypass0")
                flows, stats = ask(instance, "flows"), ask(instance, "stats")
        finally:
            end.set()
            thread.join()
    assert [(e["proto"], e["local_port"]) for e in flows["entries"]] == [("udp", 5000)]
    assert set(stats["rings"]) == {"0", "1"}
    assert "stack" not in stats
