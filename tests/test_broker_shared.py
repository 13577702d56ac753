# SPDX-License-Identifier: Apache-2.0
"""Shared mode: applications of several users on one interface, each with its own flows and nothing of the others'."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from backends import has_it, policy_for
from broker_support import STREAM, BrokerError, Child, RunningBroker, running
from bypass._core import lib
from support import WAIT_S

from bypass import netns
from bypass.broker.protocol import Kind
from bypass.broker.shared import site_of
from bypass.lab import CLIENT_IFNAME, CLIENT_IP, SERVER_IFNAME, SERVER_IP, WIRE_IFNAME, Lab
from bypass.policy import parse_policy

pytestmark = [pytest.mark.netns, pytest.mark.backends]

ALICE, BOB = 65534, 65533
POLICY = f"""
version: 1
interface: {SERVER_IFNAME}
mode: shared
backend: {{kind: afxdp, mode: copy, ring_size: 256}}
quota: {{apps: 2}}
flows:
  - name: alice
    match: {{proto: tcp, local: {SERVER_IP}, local_port: 8080-8081}}
    action: steer
    allow: {{user: {ALICE}, quota: {{rate: 1M}}}}
  - name: bob
    match: {{proto: tcp, local: {SERVER_IP}, local_port: 9090}}
    action: steer
    allow: {{user: {BOB}}}
  - name: clients
    match: {{proto: tcp, local: {SERVER_IP}, local_port: 50000-50009, remote: {CLIENT_IP}}}
    action: steer
    allow: {{user: {BOB}}}
"""


@pytest.fixture
def broker(lab: Lab) -> Iterator[RunningBroker]:
    """The test's thread is in the server's namespace."""
    with (
        netns.entered(lab.server_ns),
        running(lambda: site_of(parse_policy(policy_for(lab, POLICY))), lab.server_ns) as it,
    ):
        yield it


def live(broker: RunningBroker) -> list[str]:
    return sorted(str(endpoint) for endpoint, _ in broker.site.steering.entries().values())


def echo(lab: Lab, port: int, data: bytes) -> None:
    """A kernel client sends and gets the same back."""
    with netns.entered(lab.client_ns):
        client = socket.create_connection((SERVER_IP, port), WAIT_S)
    with client:
        client.sendall(data)
        assert client.recv(len(data), socket.MSG_WAITALL) == data


def refusal(lab: Lab, port: int) -> int:
    with netns.entered(lab.client_ns):
        sock = socket.socket()
    with sock:
        sock.settimeout(WAIT_S)
        return sock.connect_ex((SERVER_IP, port))


def test_applications_of_two_users_serve_kernel_clients_at_the_same_time(
    broker: RunningBroker, lab: Lab
) -> None:
    with Child(broker.name, ALICE, lab.server_ns) as alice, Child(broker.name, BOB, lab.server_ns) as bob:
        for child, port in ((alice, 8080), (bob, 9090)):
            assert child.do("hello")["fds"] == 3, "memory and two doorbells; no socket of the interface"
            child.tell("serve", host=SERVER_IP, port=port, connections=3)
            assert child.line() == {"serving": [SERVER_IP, port]}
        assert live(broker) == [f"tcp {SERVER_IP}:8080", f"tcp {SERVER_IP}:9090"]
        for _ in range(3):
            echo(lab, 8080, b"alice" * 100)
            echo(lab, 9090, b"bob" * 100)
        assert alice.line() == {"bytes": 1500}
        assert bob.line() == {"bytes": 900}
        apps = broker.server.broker.apps
        for number in list(apps):
            stats = broker.inside(lambda number=number: broker.site.forwarder.port_stats(number))
            assert stats["rx_packets"] > 0
            assert stats["refused"] == {}


def test_an_application_goes_on_with_another_mac_address_of_the_interface(
    broker: RunningBroker, lab: Lab
) -> None:
    mac, ifname = "02:00:00:00:77:01", WIRE_IFNAME if lab.wire else SERVER_IFNAME
    with Child(broker.name, BOB, lab.server_ns) as bob:
        bob.do("hello")
        bob.tell("serve", host=SERVER_IP, port=9090, connections=2)
        assert bob.line() == {"serving": [SERVER_IP, 9090]}
        echo(lab, 9090, b"before")
        subprocess.run(["ip", "link", "set", ifname, "address", mac], check=True)
        broker.inside(broker.site.forwarder.look)
        neighbour = ["neigh", "replace", SERVER_IP, "lladdr", mac, "dev", CLIENT_IFNAME]
        subprocess.run(["ip", "-n", lab.client_ns, *neighbour], check=True)
        echo(lab, 9090, b"after")
        assert bob.line() == {"bytes": 11}
        assert broker.site.watch.watcher.interface.mac.hex(":") == mac, "the kernel's device of it too"


def test_an_application_connects(broker: RunningBroker, lab: Lab) -> None:
    with netns.entered(lab.client_ns):
        server = socket.create_server((CLIENT_IP, 7000))
    with server, Child(broker.name, BOB, lab.server_ns) as bob:
        bob.do("hello")
        bob.tell("fetch", host=CLIENT_IP, port=7000, data="ping")
        connection, local = server.accept()
        with connection:
            assert connection.recv(10) == b"ping"
            assert connection.recv(10) == b""
            connection.sendall(b"pong")
        assert bob.line() == {"local": list(local), "data": "pong"}
        assert 50000 <= local[1] <= 50009


def test_nobody_takes_what_another_one_has(broker: RunningBroker, lab: Lab) -> None:
    with (
        Child(broker.name, ALICE, lab.server_ns) as first,
        Child(broker.name, ALICE, lab.server_ns) as second,
        Child(broker.name, ALICE, lab.server_ns) as third,
        Child(broker.name, BOB, lab.server_ns) as bob,
    ):
        for child in (first, second, bob):
            assert child.do("hello")["app"]
        assert third.do("hello")["error"] == errno.EDQUOT, "two applications are what a user may have"
        assert first.do("bind", host=SERVER_IP, port=8080)["lease"]
        taken = second.do("bind", host=SERVER_IP, port=8080)
        assert taken["error"] == errno.EADDRINUSE
        assert "another application has it" in taken["text"]
        assert bob.do("bind", host=SERVER_IP, port=8080)["error"] == errno.EACCES
        assert live(broker) == [f"tcp {SERVER_IP}:8080"]
        first.kill()
        broker.wait(lambda: live(broker) == [])
        assert second.do("bind", host=SERVER_IP, port=8080)["lease"]


def test_a_killed_application_takes_nobody_with_it(broker: RunningBroker, lab: Lab) -> None:
    with Child(broker.name, BOB, lab.server_ns) as bob:
        bob.do("hello")
        bob.tell("serve", host=SERVER_IP, port=9090, connections=4)
        assert bob.line() == {"serving": [SERVER_IP, 9090]}
        for _ in range(3):
            with Child(broker.name, ALICE, lab.server_ns) as alice:
                alice.do("hello")
                alice.do("listen", host=SERVER_IP, port=8080)
                alice.kill()
                broker.wait(lambda: live(broker) == [f"tcp {SERVER_IP}:9090"])
            assert refusal(lab, 8080) == errno.ECONNREFUSED, "the kernel has it again"
            echo(lab, 9090, b"still there")
        assert list(broker.site._ports) == list(broker.server.broker.apps)


def test_the_rate_of_a_user_is_told_and_the_memory_is_its_own(broker: RunningBroker, lab: Lab) -> None:
    with Child(broker.name, ALICE, lab.server_ns) as alice, Child(broker.name, BOB, lab.server_ns) as bob:
        numbers = [child.do("hello")["app"] for child in (alice, bob)]
        files = [os.fstat(broker.server.broker.apps[n].memory.fd).st_ino for n in numbers]
        assert files[0] != files[1]
        assert [broker.server.broker.apps[n].memory.header.device for n in numbers] == [lib.APP_DEV_PORT] * 2
        assert broker.server.broker.site.quota(broker.server.broker.apps[numbers[0]].user).rate == 1 << 20


def test_another_policy_changes_rates_and_spinning_of_what_runs(
    broker: RunningBroker, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwarder, told = broker.site.forwarder, []

    def noted(name: str) -> Callable[..., None]:
        tell = getattr(forwarder, name)

        def call(*args: Any, **kwargs: Any) -> None:
            tell(*args, **kwargs)  # bypass-fwd takes it
            told.append((name, args, kwargs))

        return call

    with Child(broker.name, ALICE, lab.server_ns) as alice, Child(broker.name, BOB, lab.server_ns) as bob:
        numbers = [child.do("hello")["app"] for child in (alice, bob)]
        for name in ("rate", "spin"):
            monkeypatch.setattr(forwarder, name, noted(name))
        slower = POLICY.replace("rate: 1M", "rate: 8M").replace(
            "flows:", "stack: {spin_us: 7, batch: 9}\nflows:"
        )
        assert broker.inside(lambda: broker.server.broker.swap(parse_policy(policy_for(lab, slower)))) == 0
        headers = [broker.server.broker.apps[n].memory.header for n in numbers]
        assert [(h.spin_us, h.batch) for h in headers] == [(7, 9)] * 2
        free = parse_policy(policy_for(lab, POLICY.replace(", quota: {rate: 1M}", "")))
        assert broker.inside(lambda: broker.server.broker.swap(free)) == 0
    rates = [(args[0], kwargs["bytes_"]) for name, args, kwargs in told if name == "rate"]
    assert rates == [(numbers[0], 8 << 20), (numbers[1], 0), (numbers[0], 0), (numbers[1], 0)]
    assert [args[0] for name, args, _ in told if name == "spin"] == [7, lib.FWD_SPIN_US]


def test_without_bypass_fwd_the_kernel_has_everything(lab: Lab) -> None:
    with netns.entered(lab.server_ns):
        with running(lambda: site_of(parse_policy(policy_for(lab, POLICY))), lab.server_ns) as broker:
            client = broker.client()
            client.hello()
            with socket.create_server((SERVER_IP, 9090)) as sock:
                client.lease(sock, STREAM, (SERVER_IP, 9090))
                os.kill(broker.site.forwarder.pid, signal.SIGKILL)
                with pytest.raises(EOFError):
                    client.wait_for(Kind.REVOKED)
        end = time.monotonic() + WAIT_S
        while has_it(lab):
            assert time.monotonic() < end
            time.sleep(0.01)
    assert refusal(lab, 9090) == errno.ECONNREFUSED


def test_a_second_application_of_root_needs_no_other_port(broker: RunningBroker) -> None:
    first, second = broker.client(), broker.client()
    first.hello()
    second.hello()
    with socket.socket() as a, socket.socket() as b:
        for sock in (a, b):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((SERVER_IP, 9090))
        first.lease(a, STREAM, (SERVER_IP, 9090))
        with pytest.raises(BrokerError) as e:
            second.lease(b, STREAM, (SERVER_IP, 9090))
        assert e.value.code == errno.EADDRINUSE
