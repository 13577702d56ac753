# SPDX-License-Identifier: Apache-2.0
"""A stack on a DPDK port (net_af_packet over a veth) with the kernel behind its exception path, and without a kernel.

Each test runs the stack in a process of its own (EAL starts once in one), in the lab's server namespace; the peers are
the kernel of the client's.
"""

from __future__ import annotations

import hashlib
import logging
import os
import select
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import lab_name
from dpdk_support import InChild, every_frame, hear, in_child, longest, needs_dpdk, say, until
from support import WAIT_S

import bypass
from bypass import netns
from bypass.errors import BypassError, DeviceGoneError
from bypass.lab import CLIENT_IFNAME, SERVER_IP, WIRE_IFNAME, Lab, dpdk_policy
from bypass.policy import Policy, parse_policy
from bypass.stack_api import Stack

__all__ = ["needs_dpdk"]
pytestmark = pytest.mark.netns

RULES = """\
version: 1
interface: bypass0
backend: {kind: afxdp}
flows:
  - {name: web, match: {proto: tcp, local_port: 8080}, action: steer}
  - {name: out, match: {proto: tcp, local_port: 20000-20255}, action: steer}
  - {name: udp, match: {proto: udp, local_port: 5353}, action: steer}
"""
ALONE = (
    dpdk_policy(RULES)
    .replace("kind: dpdk", "kind: dpdk\n  exception: none")
    .replace("to: 198.51.100.0/24", "to: 0.0.0.0/0")
)
BIG = 5 << 20


@pytest.fixture
def wire() -> Iterator[Lab]:
    with Lab(lab_name(), wire=True, queues=1) as lab:
        yield lab


@contextmanager
def opened(text: str = "", **options: Any) -> Iterator[Stack]:
    policy: Policy = parse_policy(text or dpdk_policy(RULES), "dpdk.yaml")
    stack = Stack.from_policy(policy, **options)
    try:
        yield stack
    finally:
        stack.close()


def serve(stack: Stack, condition: Callable[[], Any]) -> None:
    """Lets the stack work until something is so."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "what was waited for did not happen"
        stack.run(timeout=0.01)


def said(stack: Stack) -> Any:
    """What the parent tells, while the stack works."""
    serve(stack, lambda: select.select([0], [], [], 0)[0])
    return hear()


def exception(stack: Stack) -> dict[str, int]:
    counters: dict[str, int] = stack.driver.port.counters()["exception"]  # type: ignore[attr-defined]
    return counters


def frames_left(stack: Stack) -> dict[str, int]:
    """Of a closed stack's device, before that closes: what is not where it belongs."""
    audit = stack.driver.device.audit()  # type: ignore[attr-defined]
    return {"misplaced": audit.misplaced + audit.bad_free, "conserved": audit.conserved}


# ---- What runs in the child ----------------------------------------------------------------------------------------
@in_child
def echo_server(text: str = "") -> dict[str, Any]:
    """Serves connections until it is told to end."""
    with opened(text) as stack:
        with stack.create_server((SERVER_IP, 8080)) as server:
            server.setblocking(False)
            connections: list[Any] = []
            say("up")
            while not select.select([0], [], [], 0)[0]:
                stack.run(timeout=0.01)
                try:
                    connections.append(server.accept()[0])
                    connections[-1].setblocking(False)
                except BlockingIOError:
                    pass
                connections = [c for c in connections if _echo(stack, c)]
            for c in connections:
                c.close()
        counters = stack.driver.port.counters()  # type: ignore[attr-defined]
        return {
            "reasons": {k: v.packets for k, v in stack.driver.steering.reasons().items()},  # type: ignore[attr-defined]
            "counters": counters,
            **frames_left(stack),
        }


def _echo(stack: Stack, connection: Any) -> bool:
    try:
        data = connection.recv(1 << 16)
    except BlockingIOError:
        return True
    if data:
        connection.setblocking(True)
        connection.sendall(data)
        connection.setblocking(False)
        return True
    connection.close()
    return False


@in_child
def idle() -> dict[str, Any]:
    """Does nothing but what it is told, one line each."""
    with opened() as stack:
        say("up")
        server: Any = None
        while (what := said(stack)) != "end":
            if what == "listen":
                server = stack.create_server((SERVER_IP, 8080))
            elif what == "entries":
                steering = stack.driver.steering  # type: ignore[attr-defined]
                say([e.drain for e, _ in steering.entries().values()])
                continue
            say("done")
        if server is not None:
            server.close()
        return frames_left(stack)


@in_child
def watches(what: str) -> dict[str, Any]:
    """Tells what the log says until the port is gone."""
    records: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())
            say(records[-1])

    logging.getLogger("bypass").addHandler(Handler())
    try:
        with opened() as stack:
            say("up")
            said(stack)
    except DeviceGoneError as e:
        return {"gone": str(e), "records": records}
    return {"gone": "", "records": records}


@in_child
def refused(text: str) -> str:
    try:
        with opened(text):
            return ""
    except BypassError as e:
        return f"{type(e).__name__}: {e}"


@in_child
def dials(address: list[Any]) -> str:
    with opened() as stack, stack.socket() as sock:
        sock.settimeout(WAIT_S)
        sock.connect(tuple(address))
        sock.sendall(b"from bypass")
        return f"{sock.getsockname()[1]} {sock.recv(100).decode()}"


@in_child
def turns_round(text: str) -> dict[str, Any]:
    """Whole frames: UDP comes back as it went, with its addresses exchanged."""
    from bypass import raw

    with raw.open_port(parse_policy(text), [("udp", SERVER_IP, 5353)]) as port:
        say("up")
        while True:
            for frame in port.recv(timeout=WAIT_S):
                d = frame.data
                if frame.rule is not None:
                    back = d[6:12] + d[:6] + d[12:26] + d[30:34] + d[26:30] + d[36:38] + d[34:36] + d[38:]
                    assert port.send([back], queue=frame.queue) == 1
                    if d.endswith(b"last"):
                        return {"rule": frame.rule, **port.status._source.stats(1)["more"]}  # type: ignore[union-attr]


# ---- The peer's side ---------------------------------------------------------------------------------------------
def client(lab: Lab, address: tuple[str, int]) -> socket.socket:
    return netns.run(lab.client_ns, lambda: socket.create_connection(address, WAIT_S))


def ping(lab: Lab, count: int = 2) -> str:
    command = lab.command("client", ["ping", "-c", str(count), "-i", "0.1", "-W", "5", SERVER_IP])
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def ip(lab: Lab, *args: str, side: str = "server") -> str:
    return subprocess.run(lab.command(side, ["ip", *args]), capture_output=True, text=True, check=True).stdout


def echoed(s: socket.socket, data: bytes) -> bytes:
    """Sends all and reads as much."""
    got, sent = b"", 0
    s.setblocking(False)
    while len(got) < len(data):
        r, w, _ = select.select([s], [s] if sent < len(data) else [], [], WAIT_S)
        assert r or w
        if w:
            sent += s.send(data[sent : sent + 65536])
        if r:
            part = s.recv(1 << 16)
            assert part
            got += part
    s.setblocking(True)
    return got


@contextmanager
def running(lab: Lab, function: InChild, *args: Any) -> Iterator[Any]:
    with function.start(*args, netns=lab.server_ns) as child:
        assert child.line() == "up"
        yield child


# ---- Tests ---------------------------------------------------------------------------------------------------------
def test_steered_and_kernel_traffic_share_the_port(wire: Lab) -> None:
    """A bulk echo by bypass, beside it ping and TCP of the kernel on the same address; no live TCP at the kernel."""
    with ExitStack() as ends, running(wire, echo_server) as child:
        assert "bypass0" in ip(wire, "-br", "link")
        listener, sniffer = netns.run(wire.server_ns, kernel_side)
        ends.enter_context(listener)
        ends.enter_context(sniffer)
        data = os.urandom(BIG)
        with client(wire, (SERVER_IP, 8080)) as s:
            assert s.getpeername() == (SERVER_IP, 8080)
            assert hashlib.sha256(echoed(s, data)).digest() == hashlib.sha256(data).digest()
            assert "2 received" in ping(wire)
            with client(wire, (SERVER_IP, 2222)) as kernels:
                accepted, _ = listener.accept()
                accepted.sendall(b"SSH-2.0-like\r\n")
                assert kernels.recv(100) == b"SSH-2.0-like\r\n"
                accepted.close()
            assert echoed(s, b"still there") == b"still there"
        with pytest.raises(ConnectionRefusedError):
            client(wire, (SERVER_IP, 8081))
        assert tcp_ports(sniffer) == {2222, 8081}, "and not 8080, whose connection is open"
        child.tell("end")
        result = child.result()
    assert result["conserved"]
    assert result["misplaced"] == 0
    assert result["reasons"]["steered"] > BIG // 1500
    assert result["counters"]["exception"]["from_kernel"] > 4
    assert result["counters"]["port"]["rx_good_packets"] >= result["reasons"]["steered"]
    assert "bypass0:" not in ip(wire, "-o", "link"), "the device goes with the stack"


def kernel_side() -> tuple[socket.socket, socket.socket]:
    listener = socket.create_server((SERVER_IP, 2222))
    listener.settimeout(WAIT_S)
    sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(3))
    sniffer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    sniffer.bind(("bypass0", 3))
    return listener, sniffer


def tcp_ports(sniffer: socket.socket) -> set[int]:
    """Server ports of the TCP segments that went by the TAP device until now, either way."""
    seen: set[int] = set()
    while select.select([sniffer], [], [], 0)[0]:
        data = sniffer.recv(2000)
        if data[12:14] == b"\x08\x00" and data[23] == socket.IPPROTO_TCP:
            ports = {int.from_bytes(data[34:36], "big"), int.from_bytes(data[36:38], "big")}
            seen |= {p for p in ports if p < 20000}
    return seen


def test_another_mac_address_of_the_port_is_the_stacks_and_the_kernels(wire: Lab) -> None:
    """As an administrator sets it, or a bond at failover."""
    mac = "02:00:00:00:77:01"
    with running(wire, echo_server) as child, client(wire, (SERVER_IP, 8080)) as s:
        assert echoed(s, b"before") == b"before"
        ip(wire, "link", "set", WIRE_IFNAME, "address", mac)
        end = time.monotonic() + WAIT_S
        while mac not in ip(wire, "-o", "link", "show", "bypass0"):
            assert time.monotonic() < end, "the kernel's device keeps the old one"
            time.sleep(0.01)
        assert echoed(s, b"after") == b"after"
        assert "2 received" in ping(wire)
        child.tell("end")
        result = child.result()
    assert result["reasons"]["steered"] > 4
    assert result["counters"]["link"]["up"] == 1
    assert result["conserved"]


@contextmanager
def sizes(lab: Lab) -> Iterator[Callable[[socket.socket], int]]:
    """A function that has much echoed, and says how long the longest packet from the stack was."""
    data = os.urandom(100_000)
    with netns.run(lab.client_ns, every_frame, CLIENT_IFNAME) as seen:

        def size(s: socket.socket) -> int:
            longest(seen)
            assert echoed(s, data) == data
            return longest(seen)[0]

        yield size


def test_another_mtu_of_the_port_is_the_stacks_and_the_kernels(wire: Lab) -> None:
    """As on a shared interface: what is sent is as small at once. The kernel's device may have less, which stays; more,
    which the port would drop, it loses again."""

    def change(ifname: str, **what: object) -> None:
        ip(wire, "link", "set", ifname, *(str(x) for pair in what.items() for x in pair))
        if ifname == WIRE_IFNAME:  # which drops what is larger
            ip(wire, "link", "set", CLIENT_IFNAME, "mtu", str(what["mtu"]), side="client")

    def has(mtu: int) -> bool:
        return f" mtu {mtu} " in ip(wire, "-o", "link", "show", "bypass0")

    with running(wire, echo_server) as child, client(wire, (SERVER_IP, 8080)) as s, sizes(wire) as size:
        assert size(s) == 1500
        for ifname, mtu in ((WIRE_IFNAME, 1400), ("bypass0", 1300)):
            change(ifname, mtu=mtu)
            until(lambda mtu=mtu: has(mtu))  # type: ignore[misc]
            until(lambda mtu=mtu: size(s) == mtu)  # type: ignore[misc]
            assert size(s) == mtu, "it is again"
        change(WIRE_IFNAME, mtu=1450, address="02:00:00:00:77:02")
        until(lambda: "02:00:00:00:77:02" in ip(wire, "-o", "link", "show", "bypass0"))
        assert has(1300), "somebody wanted it so"
        assert size(s) == 1300
        change("bypass0", mtu=9000)
        until(lambda: has(1450))
        until(lambda: size(s) == 1450)
        change(WIRE_IFNAME, mtu=1500)
        until(lambda: has(1500))
        until(lambda: size(s) == 1500)
        child.tell("end")
        assert child.result()["conserved"]


def test_another_mtu_of_the_port_is_that_of_a_stack_without_a_kernel(wire: Lab) -> None:
    with (
        running(wire, echo_server, ALONE) as child,
        client(wire, (SERVER_IP, 8080)) as s,
        sizes(wire) as size,
    ):
        for mtu in (1400, 1500):
            ip(wire, "link", "set", WIRE_IFNAME, "mtu", str(mtu))
            ip(wire, "link", "set", CLIENT_IFNAME, "mtu", str(mtu), side="client")
            until(lambda mtu=mtu: size(s) == mtu)  # type: ignore[misc]
            assert size(s) == mtu, "it is again"
        child.tell("end")
        assert child.result()["conserved"]


def test_connections_of_the_kernel_drain(wire: Lab) -> None:
    with running(wire, idle) as child:
        with netns.run(wire.server_ns, lambda: socket.create_server((SERVER_IP, 8080))) as listener:
            old = client(wire, (SERVER_IP, 8080))
            kernels, _ = listener.accept()
        child.tell("listen")
        assert child.line() == "done"
        child.tell("entries")
        assert child.line() == [True]
        old.sendall(b"of the kernel's")
        assert kernels.recv(100) == b"of the kernel's"
        with client(wire, (SERVER_IP, 8080)) as new:
            assert new.getpeername() == (SERVER_IP, 8080)
        kernels.sendall(b"to the end")
        assert old.recv(100) == b"to the end"
        old.close()
        kernels.close()
        child.tell("end")
        assert child.result() == {"misplaced": 0, "conserved": True}


def test_outgoing_connections_find_their_way_by_the_kernels_routes(wire: Lab) -> None:
    def listening() -> socket.socket:
        return socket.create_server(("198.51.100.77", 9000))

    with (
        netns.run(wire.client_ns, listening) as server,
        dials.start(["198.51.100.77", 9000], netns=wire.server_ns) as child,
    ):
        server.settimeout(WAIT_S)
        connection, peer = server.accept()
        assert connection.recv(100) == b"from bypass"
        connection.sendall(b"and back")
        port, _, text = child.result().partition(" ")
        assert text == "and back"
        assert peer == (SERVER_IP, int(port))
        assert 20000 <= int(port) <= 20255
        connection.close()


def test_a_link_that_goes_and_comes_back(wire: Lab) -> None:
    with running(wire, watches, "link") as child:
        ip(wire, "link", "set", CLIENT_IFNAME, "down", side="client")
        assert child.line() == "bypass0 is down; connections wait for it"
        assert "NO-CARRIER" in ip(wire, "link", "show", "bypass0")
        ip(wire, "link", "set", CLIENT_IFNAME, "up", side="client")
        assert child.line() == "bypass0 is up again"
        assert "2 received" in ping(wire)
        child.tell("end")
        assert child.result()["gone"] == ""


@pytest.mark.parametrize("device", ["bypass0", WIRE_IFNAME])
def test_a_device_that_is_removed_is_told(wire: Lab, device: str) -> None:
    """The kernel's device of the port, and the port itself."""
    with running(wire, watches, "gone") as child:
        ip(wire, "link", "del", device)
        while (line := child.line()) != "bypass0 is gone":
            assert isinstance(line, str), f"it ended without saying so: {line}"
        result = child.result()
        assert result["gone"] == "bypass0 is gone"
    assert "bypass0:" not in ip(wire, "-o", "link")


def test_a_name_that_is_taken_is_one_clear_error(wire: Lab) -> None:
    ip(wire, "link", "add", "bypass0", "type", "veth")
    text = refused(dpdk_policy(RULES), netns=wire.server_ns)
    assert text.startswith("NameTakenError: bypass0: a device of this name exists"), text


def test_without_a_kernel_the_stack_is_the_host(wire: Lab) -> None:
    """ARP, ping, refusals; nothing of it is the kernel's."""
    with running(wire, echo_server, ALONE) as child:
        assert ip(wire, "-br", "link").split()[::3].count("bypass0") == 0
        assert "2 received" in ping(wire)
        with client(wire, (SERVER_IP, 8080)) as s:
            assert echoed(s, b"x" * 100_000) == b"x" * 100_000
        with pytest.raises(ConnectionRefusedError):
            client(wire, (SERVER_IP, 8081))
        child.tell("end")
        result = child.result()
    assert result["conserved"]
    assert "exception" not in result["counters"]
    assert result["counters"]["filter"]["passed"] > 2


def test_raw_frames_on_a_port(wire: Lab) -> None:
    """Beside the kernel, which answers ping and ARP while they are read."""
    with (
        running(wire, turns_round, dpdk_policy(RULES)) as child,
        netns.run(wire.client_ns, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as s,
    ):
        assert "2 received" in ping(wire)
        s.settimeout(WAIT_S)
        for text in (b"first", b"last"):
            s.sendto(text, (SERVER_IP, 5353))
            assert s.recv(100) == text
        result = child.result()
    assert result["rule"] == 2
    assert result["filter"]["steered"] == 2
    assert result["exception"]["passed"] >= 2


def test_the_tools_tell_of_the_port(wire: Lab) -> None:
    with running(wire, echo_server) as child:
        with client(wire, (SERVER_IP, 8080)) as s:
            assert echoed(s, b"hello") == b"hello"

            def tool(*args: str) -> str:
                bypass_tool = str(Path(bypass.__file__).parent.parent / ".venv/bin/bypass")
                done = subprocess.run(
                    wire.command("server", [bypass_tool, *args]), capture_output=True, text=True, check=False
                )
                assert done.returncode == 0, done.stderr
                return done.stdout

            stats = tool("stats", "--all")
            assert "poll mode (DPDK" in stats
            for title in ("FILTER", "EXCEPTION", "PORT", "RINGS", "STACK"):
                assert title in stats
            assert "rx_good_packets" in stats
            flows = tool("flows")
            assert "XDP" not in flows
            assert "tcp" in flows
            assert "8080" in flows
        child.tell("end")
        assert child.result()["conserved"]
