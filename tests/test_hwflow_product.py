# SPDX-License-Identifier: Apache-2.0
"""`backend: {queues: [0], hardware_rules: ...}` where it is used: a stack in a program, and a broker in both modes. The
interface's rules are those of a file that answers in the kernel's place (nic_support.py): put on, exchanged, gone on
with, taken off, after a kill too. What a real device does with them is not tested here (docs/hardware.md)."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from backends import has_it
from dpdk_support import Child, hear, in_child, say
from nic_support import DROPPED, FileNic, hardware_nic, nic_shim
from test_broker_takeover import POLICY, Load, Program, down, echo_at, kill, rejoined, up
from test_cli_broker import bypass as command
from test_cli_broker import folder, good, others, wait_until

import bypass
from bypass import netns
from bypass.errors import BypassError
from bypass.hwflow.held import RECORDS
from bypass.lab import CLIENT_IFNAME, SERVER_IFNAME, SERVER_IP, Lab

__all__ = ["folder", "hardware_nic", "nic_shim"]
pytestmark = [pytest.mark.netns, pytest.mark.timeout(180)]


def bad(port: int) -> str:
    return f"  - {{name: bad, match: {{proto: udp, local: {SERVER_IP}, local_port: {port}}}, action: drop}}\n"


def text(how: str) -> str:
    return f"""version: 1
interface: {SERVER_IFNAME}
backend: {{kind: afxdp, mode: copy, ring_size: 256, queues: [0], hardware_rules: {how}}}
flows:
  - {{name: web, match: {{proto: tcp, local: {SERVER_IP}, local_port: 8080}}, action: steer}}
{bad(9)}"""


def records(ns: str) -> list[str]:
    cookie = netns.run(ns, netns.cookie)
    return sorted(p.name for p in RECORDS.glob(f"{cookie}-*")) if RECORDS.exists() else []


@pytest.fixture
def one_way(lab: Lab) -> Iterator[Lab]:
    """What the client sends arrives on queue 0, as hardware with the rules would have it."""
    netns.run(lab.client_ns, subprocess.run, ["ethtool", "-L", CLIENT_IFNAME, "tx", "1"], check=True)
    yield lab
    assert records(lab.server_ns) == []


# ---- In a program --------------------------------------------------------------------------------------------------
@in_child
def served(policy_text: str) -> dict[str, Any]:
    """Echoes one message of each connection until it is told to end."""
    from bypass.policy import parse_policy

    try:
        stack = bypass.Stack.from_policy(parse_policy(policy_text, "p.yaml"))
    except BypassError as error:
        say({"error": str(error)})
        return {}
    with stack, stack.create_server((SERVER_IP, 8080)) as server:
        device = stack.driver.device  # type: ignore[attr-defined]
        say({"hardware": device.hardware and device.hardware.text(), "queues": list(device.queue_numbers)})
        server.setblocking(False)
        while not select.select([0], [], [], 0)[0]:
            stack.run(timeout=0.01)
            try:
                conn, _ = server.accept()
            except BlockingIOError:
                continue
            with conn:
                conn.sendall(conn.recv(100))
        hear()
    return {}


def echo(lab: Lab) -> bytes:
    with netns.run(lab.client_ns, socket.create_connection, (SERVER_IP, 8080), 20) as s:
        s.sendall(b"hello")
        return s.recv(100)


def end(child: Child) -> None:
    child.tell("end")
    assert child.result() == {}


def test_a_stack_has_its_queue_to_itself_and_a_killed_one_leaves_it_to_the_next(
    hardware_nic: FileNic, one_way: Lab
) -> None:
    """Who wants no rules takes them off as well."""
    nic, ns = hardware_nic, one_way.server_ns
    with served.start(text("required"), netns=ns) as first:
        assert first.line() == {
            "hardware": "2 rules in hardware: 1 drop; steered flows on queues 0, the rest on 1",
            "queues": [0],
        }
        assert (nic.rules, nic.table, nic.state.flags) == ({8080: 0, 9: DROPPED}, {1}, 1 << 27)
        assert len(records(ns)) == 1
        assert echo(one_way) == b"hello"
    assert first.process.returncode == -9
    assert nic.table == {1}, "a NIC knows nothing of processes"
    assert len(records(ns)) == 1
    with served.start(text("none"), netns=ns) as second:
        assert second.line() == {"hardware": None, "queues": [0]}
        assert nic.untouched()
        assert echo(one_way) == b"hello"
        end(second)


def test_a_refusal_is_one_error_or_another_way(hardware_nic: FileNic, one_way: Lab) -> None:
    """auto: all queues are served, for nothing keeps the flows on one. Nothing refused: put on, and given back."""
    nic, ns = hardware_nic, one_way.server_ns
    nic.refuse(4)
    with served.start(text("required"), netns=ns) as child:
        said = child.line()["error"]
        assert said.startswith("backend.hardware_rules is required, and cannot be: ")
        assert said.endswith("its hash table cannot be set: No space left on device")
        assert child.result() == {}
    assert nic.untouched()
    assert netns.run(ns, has_it, one_way) is False
    nic.refuse(2)
    with served.start(text("auto"), netns=ns) as child:
        told = child.line()
        assert told["queues"] == [0, 1]
        assert told["hardware"].startswith("none: ")
        assert nic.untouched()
        assert records(ns) == []
        assert echo(one_way) == b"hello"
        end(child)
    with served.start(text("auto"), netns=ns) as child:
        assert child.line()["queues"] == [0]
        assert nic.table == {1}
        end(child)
    assert nic.untouched()


def test_a_veth_has_no_such_rules(one_way: Lab) -> None:
    """By the kernel's own answer."""
    with served.start(text("required"), netns=one_way.server_ns) as child:
        assert "hardware_rules is required, and cannot be" in child.line()["error"]


# ---- Below a broker ------------------------------------------------------------------------------------------------
@pytest.fixture
def policy(one_way: Lab, tmp_path: Path) -> Iterator[Path]:
    """The test's thread is in the server's namespace, in which nothing is left afterwards."""
    path = tmp_path / "policy.yaml"
    with netns.entered(one_way.server_ns):
        try:
            yield path
            wait_until(lambda: not others(one_way))
        finally:
            for pid in others(one_way):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not has_it(one_way))


def with_rules(mode: str) -> str:
    ours = "ring_size: 256, queues: [0], hardware_rules: required"
    return POLICY.replace("MODE", mode).replace("ring_size: 256", ours)


def stats() -> dict[str, Any]:
    (found,) = json.loads(good("stats", SERVER_IFNAME, "--json"))["processes"]
    return dict(found)


def test_a_broker_puts_rules_on_and_its_successor_goes_on(
    hardware_nic: FileNic, policy: Path, folder: Path, one_way: Lab
) -> None:
    nic, name = hardware_nic, str(folder / "broker.sock")
    plain = with_rules("shared")
    policy.write_text(plain + bad(9))
    pid = up(policy, name)
    assert stats()["hardware"]["reason"] == "1 drop; steered flows on queues 0, the rest on 1"
    put = dict(nic.rules)
    assert put == {8080: 0, 0: 0, 9: DROPPED} | put
    with Program(name) as program:
        assert program.do("listen", SERVER_IP, 8080) == "8080"
        assert stats()["queues"] == [0]
        flow = f"tcp 198.51.100.7:40000 > {SERVER_IP}:8080"
        explained = json.loads(good("explain", SERVER_IFNAME, flow, "--json", "--socket", name))
        assert explained["queue"] == 0
        assert "a rule of the interface sends what 'web' steers there" in json.dumps(explained)
        with Load(one_way, 2) as load:
            load.goes_on()
            nic.forget()
            wait_until(lambda: nic.rules == put and nic.table == {1})
            kill(pid, one_way)
            load.goes_on()
            assert nic.rules == put, "they are the applications', who go on"
            up(policy, name)
            rejoined(name, program)
            load.goes_on()
            assert nic.rules == put
            policy.write_text(plain + bad(7))
            good("reload", "--socket", name)
            assert nic.rules.get(7) == DROPPED
            assert 9 not in nic.rules
            policy.write_text(plain + bad(5))
            nic.refuse(len(nic.rules) + 1)
            said = command("reload", "--socket", name)
            assert said.returncode == 2
            assert "No space left on device" in said.stderr
            assert nic.rules.get(7) == DROPPED
            load.goes_on()
        echo_at(one_way, 8080)
    down(name)
    assert nic.untouched()


def test_rules_go_with_the_last_of_those_that_they_are_for(
    hardware_nic: FileNic, policy: Path, folder: Path, one_way: Lab
) -> None:
    """Broker and application are killed: the next broker takes them off. It needs its own and is refused: it ends; one
    that does not need them has all queues."""
    nic, name = hardware_nic, str(folder / "broker.sock")
    policy.write_text(with_rules("direct"))
    pid = up(policy, name)
    with Program(name) as program:
        assert program.do("listen", SERVER_IP, 8080) == "8080"
        kill(pid, one_way)
    wait_until(lambda: not others(one_way))
    assert nic.table == {1}
    nic.refuse(1 + len(nic.rules) + 2)  # table and rules off, filters off, filters on again
    said = command("up", "-c", str(policy), "--socket", name)
    assert said.returncode == 2
    assert "backend.hardware_rules is required, and cannot be" in said.stderr
    assert nic.untouched()
    policy.write_text(with_rules("direct").replace("required", "auto"))
    nic.refuse(1)
    up(policy, name)
    with Program(name) as program:
        assert program.do("listen", SERVER_IP, 8080) == "8080"
        assert stats()["queues"] == [0, 1], "without rules all are needed"
        assert stats()["hardware"]["rules"] == 0
        good("reload", "--socket", name)
        assert nic.untouched()
        echo_at(one_way, 8080)
    down(name)
