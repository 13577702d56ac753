# SPDX-License-Identifier: Apache-2.0
"""A broker on a port of DPDK: unmodified programs of several users, the kernel beside them by the exception path, and
what is left when one of all these is killed. The port is a veth's end by net_af_packet."""

from __future__ import annotations

import errno
import gc
import json
import os
import pkgutil
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from broker_support import running
from dpdk_support import every_frame, longest, needs_dpdk  # noqa: F401 (fixture)
from flow_support import hardware, shim  # noqa: F401 (fixtures)
from preloaded import CLEAN
from test_broker_takeover import (
    Load,
    Program,
    at_the_server,
    down,
    echo_at,
    kernel_echo,
    kill,
    leases,
    refused,
    rejoined,
    to_the_kernel,
    up,
)
from test_cli_broker import BYPASS, bypass, folder, good, others, wait_until  # noqa: F401 (fixture)

from bypass import netns
from bypass.broker import dpdk
from bypass.broker.protocol import Kind
from bypass.broker.shared import site_of
from bypass.broker.tools import listening
from bypass.errors import DeviceError, NameTakenError
from bypass.fwd import Forwarder
from bypass.lab import (
    CLIENT_IFNAME,
    CLIENT_IP,
    CLIENT_NET,
    SERVER_IFNAME,
    SERVER_IP,
    WIRE_IFNAME,
    Lab,
    dpdk_policy,
)
from bypass.policy import DpdkBackend, load_policy

pytestmark = [
    pytest.mark.netns,
    pytest.mark.timeout(180),
    pytest.mark.parametrize("lab", [{"wire": True, "queues": 1}], indirect=True),
]

NOBODY, OTHER = 65534, 65533
PORT = 7000
POLICY = f"""
version: 1
interface: {SERVER_IFNAME}
backend: {{kind: afxdp}}
flows:
  - name: web
    match: {{proto: tcp, local: {SERVER_IP}, local_port: 8080-8089}}
    action: steer
    allow: {{user: {NOBODY}}}
  - name: other
    match: {{proto: tcp, local: {SERVER_IP}, local_port: 9090}}
    action: steer
    allow: {{user: {OTHER}}}
  - name: clients
    match: {{proto: tcp, local: {SERVER_IP}, remote: {CLIENT_IP}, remote_port: {PORT}}}
    action: steer
    allow: {{user: {NOBODY}}}
"""


def interfaces() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


@pytest.fixture
def policy(lab: Lab, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "policy.yaml"
    path.write_text(dpdk_policy(POLICY))
    with at_the_server(lab, lambda: interfaces() <= {"lo", WIRE_IFNAME}):
        yield path


@pytest.fixture
def broker(policy: Path, folder: Path) -> tuple[str, int]:  # noqa: F811
    """Its socket and its process."""
    name = str(folder / "broker.sock")
    return name, up(policy, name)


def forwarder(lab: Lab) -> int:
    (pid,) = (pid for pid, comm in others(lab).items() if comm == "bypass-fwd")
    return pid


def ping(lab: Lab) -> str:
    with netns.entered(lab.client_ns):
        argv = ["ping", "-c", "3", "-i", "0.05", "-W", "5", SERVER_IP]
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60).stdout


def tap() -> str:
    """What `ip` says of the kernel's device of the port."""
    argv = ["ip", "-o", "link", "show", SERVER_IFNAME]
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout


def refuses(lab: Lab, port: int) -> bool:
    """The kernel has the port, and nobody there."""
    with netns.entered(lab.client_ns):
        try:
            socket.create_connection((SERVER_IP, port), 10).close()
        except ConnectionRefusedError:
            return True
    return False


def rules_that_decided() -> set[str]:
    """As `bypass flows` counts them."""
    rules = json.loads(good("flows", SERVER_IFNAME, "--json"))["rules"]
    return {rule["name"] for rule in rules if rule["packets"]}


def test_programs_of_two_users_serve_beside_the_kernel(broker: tuple[str, int], lab: Lab) -> None:
    name, _ = broker
    with Program(name) as first, Program(name, OTHER) as second, kernel_echo(lab):
        assert first.do("listen", SERVER_IP, 8080) == "8080"
        assert second.do("listen", SERVER_IP, 9090) == "9090"
        assert leases(name) == [f"{SERVER_IP}:8080", f"{SERVER_IP}:9090"]
        seen = to_the_kernel(lab)
        assert int(first.do("connect", CLIENT_IP, PORT)) > 0
        assert first.do("again") == "1"
        with Load(lab, 2) as load:
            echo_at(lab, 9090)
            assert "3 received, 0% packet loss" in ping(lab), "nothing is lost, nothing comes twice"
            load.goes_on()
        assert to_the_kernel(lab) == seen, "the kernel has seen packets of the stack's"
        with socket.create_server((SERVER_IP, 22)), netns.entered(lab.client_ns):
            socket.create_connection((SERVER_IP, 22), 10).close()
        assert to_the_kernel(lab) > seen, "what no rule steers is the kernel's"
        tools_tell(name, first.process.pid)

        second.process.kill()
        wait_until(lambda: f"{SERVER_IP}:9090" not in leases(name))
        assert refuses(lab, 9090), "the kernel has it again"
        assert first.do("again") == "1"
        assert "died, with 1 connection" in down(name)
        assert SERVER_IFNAME not in interfaces()


def tools_tell(name: str, pid: int) -> None:
    assert rules_that_decided() == {"web", "other", "clients"}
    (stats,) = json.loads(good("stats", SERVER_IFNAME, "--json"))["processes"]
    assert (stats["mode"], stats["queues"]) == ("dpdk", [0])
    assert stats["more"]["link"]["up"] == 1
    assert stats["rings"]["0"]["rx_packets"] == sum(r["packets"] for r in stats["reasons"])
    more = stats["more"]
    assert {"rx_good_packets", "rx_q0_packets"} <= more["port"].keys(), "the driver's own counters"
    assert more["filter"]["passed"] == more["exception"]["passed"] > 0, "to the kernel"
    assert more["filter"]["from_kernel"] == more["exception"]["from_kernel"] > 0
    assert more["filter"]["steered"] + more["filter"]["passed"] == stats["rings"]["0"]["rx_packets"]
    flow = f"tcp {CLIENT_IP}:40000 > {SERVER_IP}:8080"
    explained = json.loads(good("explain", SERVER_IFNAME, flow, "--json", "--socket", name))
    assert (explained["pids"], explained["mode"], explained["queue"]) == ([pid], "shared", 0)
    assert f"{CLIENT_IP}:{PORT}" in good("conns", "--socket", name)


def test_without_an_exception_path_nothing_of_the_host_is_there(
    policy: Path,
    folder: Path,  # noqa: F811
    lab: Lab,
) -> None:
    """`exception: none`: programs of two users serve and connect, ARP and ping are answered, and that is all."""
    text = policy.read_text().replace("kind: dpdk", "kind: dpdk\n  exception: none")
    policy.write_text(text.replace(CLIENT_NET, "0.0.0.0/0"))
    name = str(folder / "broker.sock")
    broker = up(policy, name)
    assert interfaces() == {"lo", WIRE_IFNAME}, "no device of the port's here"
    with Program(name) as first, Program(name, OTHER) as second, kernel_echo(lab):
        assert first.do("listen", SERVER_IP, 8080) == "8080"
        assert second.do("listen", SERVER_IP, 9090) == "9090"
        with socket.create_server(("0.0.0.0", 8081)), Load(lab, 2) as load:
            load.goes_on()
            echo_at(lab, 9090)
            assert "3 received, 0% packet loss" in ping(lab)
            assert refuses(lab, 8081), "the host listens there, but not for the port"
            assert int(first.do("connect", CLIENT_IP, PORT)) > 0
            assert first.do("again") == "1"
            kill(broker, lab)
            load.goes_on()
            up(policy, name)
            rejoined(name, first, second)
            load.goes_on()
            assert first.do("connect", CLIENT_IP, PORT) != "0"
            assert first.do("again") == "2"
        second.process.kill()
        wait_until(lambda: refuses(lab, 9090))
        down(name)


def test_jumbo_frames_go_through_bypass_fwd(policy: Path, folder: Path, lab: Lab) -> None:  # noqa: F811
    """Segments of more than 1,500 bytes, both ways; the kernel behind the TAP has the same MTU."""
    mtu, name = 4000, str(folder / "broker.sock")
    for ns, ifname in ((lab.server_ns, WIRE_IFNAME), (lab.client_ns, CLIENT_IFNAME)):
        argv = ["ip", "-n", ns, "link", "set", ifname, "mtu", str(mtu)]
        subprocess.run(argv, check=True, timeout=60)
    policy.write_text(policy.read_text().replace("kind: dpdk", "kind: dpdk\n  frame_size: 8192"))
    up(policy, name)
    with Program(name) as program, netns.entered(lab.client_ns):
        assert program.do("listen", SERVER_IP, 8080) == "8080"
        seen = to_the_kernel(lab)
        data = os.urandom(1 << 16)
        with every_frame(CLIENT_IFNAME) as wire, socket.create_connection((SERVER_IP, 8080), 10) as sock:
            echo_all(sock, data)
            assert longest(wire) == (mtu, mtu)
        big = ["ping", "-c", "1", "-M", "do", "-s", str(mtu - 28), "-W", "5", SERVER_IP]
        subprocess.run(big, check=True, capture_output=True, timeout=60)
        assert to_the_kernel(lab) == seen, "the kernel has seen packets of the stack's"
    down(name)


def test_a_lost_link_is_the_kernels_too_and_comes_back(broker: tuple[str, int], lab: Lab) -> None:
    name, _ = broker

    def link(state: str) -> None:
        argv = ["ip", "-n", lab.client_ns, "link", "set", CLIENT_IFNAME, state]
        subprocess.run(argv, check=True, timeout=60)

    (where,) = (n for n in listening() if n.startswith(f"@bypass/fwd/{SERVER_IFNAME}/"))
    with Program(name) as program, Forwarder.connect(where, broker=False) as looks:
        assert program.do("listen", SERVER_IP, 8080) == "8080"
        with Load(lab, 2) as load:
            load.goes_on()
            link("down")
            wait_until(lambda: "NO-CARRIER" in tap())
            assert looks.stats()["link"] == 1
            wait_until(lambda: f"{SERVER_IFNAME} is down: connections wait" in good("ps", "--socket", name))
            link("up")
            wait_until(lambda: "NO-CARRIER" not in tap())
            load.goes_on()
            assert looks.stats()["link"] == 0
            assert " 0% packet loss" in ping(lab)
            assert "is down" not in good("ps", "--socket", name)
        down(name)


def test_another_mac_address_of_the_port_is_everybodys(
    policy: Path, broker: tuple[str, int], lab: Lab
) -> None:
    """As an administrator sets it, or a bond at failover; also while no broker lives."""
    name, pid = broker

    def change(last: int) -> str:
        mac = f"02:00:00:00:77:{last:02x}"
        argv = ["ip", "link", "set", WIRE_IFNAME, "address", mac]
        subprocess.run(argv, check=True, timeout=60)
        return mac

    with Program(name) as program:
        assert program.do("listen", SERVER_IP, 8080) == "8080"
        with Load(lab, 2) as load:
            load.goes_on()
            mac = change(1)
            wait_until(lambda: mac in tap())
            load.goes_on()
            assert " 0% packet loss" in ping(lab)
            seen = to_the_kernel(lab)
            echo_at(lab, 8080)
            kill(pid, lab)
            mac = change(2)
            up(policy, name)
            wait_until(lambda: mac in tap())
            rejoined(name, program)
            load.goes_on()
            echo_at(lab, 8080)
            assert to_the_kernel(lab) == seen, "the kernel has seen packets of the stack's"
        down(name)


def test_another_mtu_of_the_port_is_everybodys(broker: tuple[str, int], lab: Lab) -> None:
    """A program's segments are as small, and what the kernel sends by its device too. That device may have less, which
    stays; more, which its port would drop, it loses again."""
    name, _ = broker

    def change(ifname: str, mtu: int) -> None:
        subprocess.run(["ip", "link", "set", ifname, "mtu", str(mtu)], check=True, timeout=60)
        if ifname == WIRE_IFNAME:  # which drops what is larger
            argv = ["ip", "-n", lab.client_ns, "link", "set", CLIENT_IFNAME, "mtu", str(mtu)]
            subprocess.run(argv, check=True, timeout=60)

    def has(mtu: int) -> bool:
        return f" mtu {mtu} " in tap()

    with (
        Program(name) as program,
        netns.run(lab.client_ns, every_frame, CLIENT_IFNAME) as wire,
    ):
        assert program.do("listen", SERVER_IP, 8080) == "8080"
        with netns.run(lab.client_ns, socket.create_connection, (SERVER_IP, 8080), 10) as sock:
            data = os.urandom(1 << 16)
            echo_all(sock, data)
            assert longest(wire)[0] == 1500
            for ifname, mtu in ((WIRE_IFNAME, 1300), (SERVER_IFNAME, 1200)):
                change(ifname, mtu)
                wait_until(lambda mtu=mtu: has(mtu))
                wait_until(lambda mtu=mtu: echo_all(sock, data) or longest(wire)[0] == mtu)
                echo_all(sock, data)
                assert longest(wire)[0] == mtu
            change(WIRE_IFNAME, 1400)
            echo_all(sock, data)
            assert has(1200), "somebody wanted it so"
            change(SERVER_IFNAME, 9000)
            wait_until(lambda: has(1400))
            change(WIRE_IFNAME, 1500)
            wait_until(lambda: has(1500))
            wait_until(lambda: echo_all(sock, data) or longest(wire)[0] == 1500)
        down(name)


def echo_all(sock: socket.socket, data: bytes) -> None:
    thread = threading.Thread(target=sock.sendall, args=(data,))
    thread.start()
    got = b""
    while len(got) < len(data):
        got += sock.recv(1 << 16)
    assert got == data
    thread.join()


def test_a_port_that_is_removed_is_told_and_not_asked_for_ever(broker: tuple[str, int], lab: Lab) -> None:
    name, _ = broker
    (where,) = (n for n in listening() if n.startswith(f"@bypass/fwd/{SERVER_IFNAME}/"))
    with Program(name) as program, Forwarder.connect(where, broker=False) as looks:
        assert program.do("listen", SERVER_IP, 8080) == "8080"
        with Load(lab, 1) as load:
            load.goes_on()
        subprocess.run(["ip", "link", "del", WIRE_IFNAME], check=True, timeout=60)
        wait_until(lambda: looks.stats()["link"] == 2)
        before = looks.stats()["rounds"]
        time.sleep(0.2)
        assert looks.stats()["rounds"] - before < 50, "it does not sleep any more"
        assert leases(name) == [f"{SERVER_IP}:8080"], "the broker lives"
        wait_until(lambda: SERVER_IFNAME not in interfaces())  # as an interface goes with its NIC
        gone = f"{SERVER_IFNAME} is gone: its connections get nothing"
        assert gone in good("ps", "--socket", name)
        assert gone in good("stats", SERVER_IFNAME)
        down(name)


OUTLASTS = f"""
import os, select, socket, time

def said(call, *args):
    try:
        return call(*args)
    except OSError as e:
        return e.errno

waits, sends, keeps = (socket.create_connection(("{CLIENT_IP}", {PORT}), 20) for _ in range(3))
waits.settimeout(None)
sends.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000)
for option, n in ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 1)):
    keeps.setsockopt(socket.IPPROTO_TCP, option, n)
keeps.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
print("ready", flush=True)
input()
sends.settimeout(None)
keeps.settimeout(None)
while isinstance(ended := said(sends.send, bytes(1 << 16)), int) and ended > 1000:
    pass
print(ended, said(keeps.recv, 1), said(socket.create_connection, ("{CLIENT_IP}", {PORT}), 20),
      said(socket.create_server, ("{SERVER_IP}", 8081)), said(select.select, [waits], [], [], 0), flush=True)
before = time.process_time()
time.sleep(0.5)
print(time.process_time() - before < 0.1, flush=True)
"""


def test_programs_see_a_removed_port_as_they_see_a_removed_nic_on_linux(
    broker: tuple[str, int], lab: Lab
) -> None:
    """Sockets stay; what is unanswered times out, what is new is unreachable; who only waits goes on waiting."""
    name, _ = broker
    argv = [*BYPASS, "run", "--socket", name, "--user", "nobody", "--", "/usr/bin/python3", "-c", OUTLASTS]
    pipe = subprocess.PIPE
    with netns.entered(lab.client_ns):
        peer = socket.create_server((CLIENT_IP, PORT))  # never accepts: the kernel does
    with peer, subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True, env=CLEAN) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        subprocess.run(["ip", "link", "del", WIRE_IFNAME], check=True, timeout=60)
        wait_until(lambda: SERVER_IFNAME not in interfaces())
        print(file=program.stdin, flush=True)
        told = program.stdout.readline().split(maxsplit=4)
        assert int(told[0]) in (errno.ETIMEDOUT, errno.EHOSTUNREACH)
        assert [int(t) for t in told[1:4]] == [errno.ETIMEDOUT, errno.ENETUNREACH, errno.EADDRNOTAVAIL]
        assert told[4] == "([], [], [])\n", "a connection that only waits has nothing to be told"
        assert program.stdout.readline() == "True\n", "it computes all the time"
        assert program.wait(60) == 0
        wait_until(lambda: "No application" in good("ps", "--socket", name))  # nobody waits for its peers
    down(name)


def test_a_new_broker_goes_on_with_what_a_killed_one_left(
    policy: Path, broker: tuple[str, int], lab: Lab
) -> None:
    name, pid = broker
    with Program(name) as program, kernel_echo(lab):
        assert program.do("listen", SERVER_IP, 8080) == "8080"
        program.do("connect", CLIENT_IP, PORT)
        with Load(lab, 4) as load:
            load.goes_on()
            seen, had, fwd = to_the_kernel(lab), leases(name), forwarder(lab)
            kill(pid, lab)
            load.goes_on()
            assert "3 received, 0% packet loss" in ping(lab), "port and TAP are not the broker's"
            up(policy, name)
            load.goes_on()
            rejoined(name, program)
            assert (leases(name), forwarder(lab)) == (had, fwd)
            assert program.do("listen", SERVER_IP, 8081) == "8081"
            echo_at(lab, 8081)
            assert program.do("again") == "1"
            load.goes_on()
            assert to_the_kernel(lab) == seen, "the kernel has seen packets of the stack's"
        down(name)


def test_what_is_granted_no_more_is_the_kernels(policy: Path, broker: tuple[str, int], lab: Lab) -> None:
    name, _ = broker
    with Program(name) as first, Program(name, OTHER) as second:
        assert first.do("listen", SERVER_IP, 8080) == "8080"
        assert second.do("listen", SERVER_IP, 9090) == "9090"
        with Load(lab, 2) as load:
            seen = to_the_kernel(lab)
            echo_at(lab, 9090)
            assert to_the_kernel(lab) == seen
            policy.write_text(policy.read_text().replace("9090", "9091"))
            said = good("reload", "--socket", name)
            assert said.endswith("3 rules in force; 1 leases are granted no more\n")
            assert leases(name) == [f"{SERVER_IP}:8080"]
            echo_at(lab, 9090)
            assert to_the_kernel(lab) > seen, "the program goes on there, on the kernel"
            load.goes_on()
        down(name)


def test_who_dies_without_a_broker_leaves_his_flows_to_the_kernel(broker: tuple[str, int], lab: Lab) -> None:
    """bypass-fwd ends with its last application, and port and TAP with it."""
    name, pid = broker
    with Program(name) as first, Program(name, OTHER) as second:
        assert first.do("listen", SERVER_IP, 8080) == "8080"
        assert second.do("listen", SERVER_IP, 9090) == "9090"
        echo_at(lab, 8080)  # its way to the client is known from now on: only a broker can ask the kernel
        kill(pid, lab)
        second.process.kill()
        wait_until(lambda: refuses(lab, 9090))
        echo_at(lab, 8080)
        first.process.kill()
        wait_until(lambda: SERVER_IFNAME not in interfaces())


def test_without_bypass_fwd_there_is_no_port(broker: tuple[str, int], lab: Lab) -> None:
    name, _ = broker
    with Program(name) as program:
        assert program.do("listen", SERVER_IP, 8080) == "8080"
        os.kill(forwarder(lab), signal.SIGKILL)
        wait_until(lambda: not os.path.exists(name))
        wait_until(lambda: list(others(lab)) == [program.process.pid])
        assert interfaces() == {"lo", WIRE_IFNAME}


def test_the_end_of_bypass_fwd_is_told_though_its_device_ends_first(policy: Path, lab: Lab) -> None:
    """The kernel tells that the addresses of the TAP are gone, for which bypass-fwd is not there any more."""
    with running(lambda: site_of(load_policy(str(policy))), lab.server_ns) as broker:
        client = broker.client()
        client.hello()
        os.kill(broker.site.forwarder.pid, signal.SIGKILL)
        with pytest.raises(EOFError):
            client.wait_for(Kind.REVOKED)  # nothing more comes
        said = f"{SERVER_IFNAME}: bypass-fwd has ended; its port and the kernel's device of it are gone"
        assert broker.server.broker.failure == said


def test_what_cannot_be_says_why_and_leaves_nothing(policy: Path, broker: tuple[str, int], lab: Lab) -> None:
    name, _ = broker
    text = policy.read_text()
    with pytest.raises(
        NameTakenError, match=rf"^{SERVER_IFNAME}: process {broker[1]} serves it already"
    ) as e:
        site_of(load_policy(str(policy)), f"{name}.second")
    assert e.value.ours, "which a private broker waits for"
    assert "ip link del" not in str(e.value), "which would take the kernel off the port"
    policy.write_text(text.replace("192.0.2.10/24", "192.0.2.11/24"))
    assert f"addresses and routes are given to {SERVER_IFNAME}" in bypass("reload", "--socket", name).stderr
    policy.write_text(text.replace("memory: 64M", "memory: 65M"))
    assert "backend is not what it was" in bypass("reload", "--socket", name).stderr
    down(name)
    policy.write_text(text.replace(WIRE_IFNAME, "nosuch0"))
    assert "nosuch0" in refused(policy, name)
    policy.write_text(text)
    done = subprocess.run(
        [*BYPASS, "up", "-c", str(policy), "--socket", name],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=os.environ | {"BYPASS_DPDK": "/nowhere/bypass-dpdk.so"},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "/nowhere/bypass-dpdk.so cannot be read" in done.stderr
    assert interfaces() == {"lo", WIRE_IFNAME}


def test_rules_in_hardware_are_put_on_exchanged_and_taken_off(
    hardware: Path,  # noqa: F811
    policy: Path,
    folder: Path,  # noqa: F811
    lab: Lab,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By bypass-fwd, which has the port. What the new policy needs and the port refuses leaves all as it was."""
    name = str(folder / "broker.sock")

    def write(ports: str) -> None:
        drop = f"{{proto: udp, local: {SERVER_IP}, local_port: {ports}}}"
        text = dpdk_policy(f"{POLICY}  - name: bad\n    match: {drop}\n    action: drop\n")
        policy.write_text(text.replace("kind: dpdk", "kind: dpdk\n  hardware_rules: required"))

    def did() -> list[str]:
        lines = hardware.read_text().splitlines()
        hardware.write_text("")
        return [f"{line.split()[0]} {line.split()[-1]}" for line in lines]

    def told() -> dict[str, object]:
        (stats,) = json.loads(good("stats", SERVER_IFNAME, "--json"))["processes"]
        return dict(stats["hardware"])

    write("9")
    monkeypatch.setenv("BYPASS_FLOWS_ROOM", "2")
    up(policy, name)
    assert did() == ["create drop"]
    assert told() == {"rules": 1, "reason": "1 drop"}
    assert "hardware rules: 1 (1 drop)" in good("stats", SERVER_IFNAME)
    write("7")
    good("reload", "--socket", name)
    assert did() == ["destroy 1", "create drop"]
    write("7-8")
    said = bypass("reload", "--socket", name)
    assert said.returncode == 2
    assert "does not take 'bad': No space left on device (table full)" in said.stderr
    assert told() == {"rules": 1, "reason": "1 drop"}
    assert did() == ["destroy 1", "create drop", "destroy 1", "create drop"], "the old ones are there again"
    down(name)
    assert did() == ["destroy 1"]
    assert "backend.hardware_rules is required" in refused(policy, name)
    assert interfaces() == {"lo", WIRE_IFNAME}


def test_a_device_is_taken_before_all_and_given_back_after_all(
    policy: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the kernel's driver, which is only told here (tests/test_pci_*.py)."""
    seen: list[tuple[str, set[str], list[str]]] = []

    def look(what: str) -> None:
        seen.append((what, interfaces(), list(others(lab).values())))

    @contextmanager
    def taken(backend: DpdkBackend) -> Iterator[bool]:
        assert backend.device.startswith("net_af_packet0")
        look("taken")
        try:
            yield True
        finally:
            look("given back")

    monkeypatch.setattr(dpdk, "device_taken", taken)
    site = site_of(load_policy(str(policy)))
    look("used")
    site.close()
    alone = {"lo", WIRE_IFNAME}
    assert seen == [
        ("taken", alone, []),
        ("used", alone | {SERVER_IFNAME}, ["bypass-fwd"]),
        ("given back", alone, []),
    ]
    policy.write_text(policy.read_text().replace(WIRE_IFNAME, "nosuch0"))
    with pytest.raises(DeviceError, match="nosuch0"):
        site_of(load_policy(str(policy)))
    assert seen[3:] == [("taken", alone, []), ("given back", alone, [])]


SERVE_ONE = f"""
import socket
with socket.create_server(("{SERVER_IP}", 8080)) as s:
    print("serving", flush=True)
    with s.accept()[0] as c:
        c.sendall(c.recv(100))
"""


def test_a_program_alone_needs_no_broker(policy: Path, lab: Lab) -> None:
    argv = [*BYPASS, "run", "-c", str(policy), "--", "/usr/bin/python3", "-c", SERVE_ONE]
    for _ in range(2):  # the second has to wait until the first one's broker has let go
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=CLEAN) as program:
            assert program.stdout is not None
            assert program.stdout.readline() == "serving\n"
            seen = to_the_kernel(lab)
            echo_at(lab, 8080)
            assert to_the_kernel(lab) == seen
            assert program.wait(60) == 0


def open_files() -> list[str]:
    """Of this process, by what they are; without the one that the listing takes."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(re.sub(r"\d+", "N", name) for name in found if not name.startswith("/proc"))


STEPS = (
    # what fails, and whether it has done its work before
    ("bypass.broker.dpdk.tap.open_tap", False),
    ("os.memfd_create", False),
    ("bypass.dpdk_backend.steering.SoftSteering._put_rules", True),
    ("bypass.watch.KernelWatch._tell_addresses", False),
    ("bypass.status.StatusServer._listen", True),
    ("bypass.fwd.Forwarder.start", False),
    ("bypass.broker.holder.Holder._put_steering", True),
    ("bypass.fwd.Forwarder.watch", True),
    ("bypass.fwd.Forwarder.dpdk_open", True),
    ("bypass.dpdk_backend.tap._index", True),
    ("bypass.dpdk_backend.tap._addresses", True),
    ("bypass.broker.dpdk.put_flows", True),
    ("bypass.fwd.Forwarder.locals", True),
)


def break_step(patch: pytest.MonkeyPatch, step: str, done: bool, error: BaseException) -> list[str]:
    """Has it fail once; what is returned is not empty any more then."""
    owner, _, name = step.rpartition(".")
    real, failed = getattr(pkgutil.resolve_name(owner), name), list[str]()

    def broken(*args: Any, **more: Any) -> Any:
        if failed:  # undoing may take the same
            return real(*args, **more)
        failed.append(step)
        if done:
            real(*args, **more)
        raise error

    patch.setattr(step, broken)
    return failed


def test_whatever_fails_at_the_start_nothing_is_left(
    policy: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is interrupted. What a step had done is undone."""
    loaded = load_policy(str(policy))
    site_of(loaded, "@test/injected").close()  # what is loaded once, and stays
    before = open_files()
    for number, (step, done) in enumerate(STEPS):
        error = (OSError(errno.EIO, "injected"), DeviceError("injected"), KeyboardInterrupt("injected"))[
            number % 3
        ]
        with monkeypatch.context() as patch:
            failed = break_step(patch, step, done, error)
            with pytest.raises((type(error), DeviceError)):
                site_of(loaded, "@test/injected")
        assert failed, step
        wait_until(lambda: interfaces() == {"lo", WIRE_IFNAME})
        wait_until(lambda: not others(lab))
        error.__traceback__ = None  # it holds the frames, and what is in them
        gc.collect()
        assert open_files() == before, (step, done)
        assert [name for name in listening() if "bypass" in name] == [], step
    site_of(loaded).close()
