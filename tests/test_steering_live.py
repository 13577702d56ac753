# SPDX-License-Identifier: Apache-2.0
"""Steering on an interface in use: it comes and goes unnoticed, leaves others' programs alone, loses nothing when the
policy is exchanged, and keeps the kernel from resetting what is not its own."""

from __future__ import annotations

import errno
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import wire
from steering_rules import policy_of

from bypass import libbpf, netns, probe
from bypass.afxdp import AfxdpDevice
from bypass.errors import ForeignProgramError
from bypass.lab import CLIENT_IFNAME, CLIENT_IP, SERVER_IFNAME, SERVER_IP, Lab, wait_for
from bypass.policy import Policy
from bypass.rules import PortRange, Rule
from bypass.steering import Steering

pytestmark = pytest.mark.netns

TESTS = Path(__file__).parent
ROOT = TESTS.parent
TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP
PORT = 9000


def steer(
    port: int, proto: int | None = None, action: str = "steer", name: str = "echo", index: int = 0
) -> Rule:
    return Rule(index, name, proto, None, PortRange(port, port), None, None, None, action)  # type: ignore[arg-type]


POLICY = policy_of([steer(PORT)], SERVER_IFNAME)


@contextmanager
def steering(lab: Lab, policy: Policy = POLICY, **options: object) -> Iterator[Steering]:
    """Attached to the server's interface, with its address."""
    with netns.entered(lab.server_ns):
        it = Steering(policy, SERVER_IFNAME, queues=lab.queues, **options)  # type: ignore[arg-type]
    with it:
        it.set_locals([SERVER_IP])
        yield it


def attached(lab: Lab) -> libbpf.XdpAttached | None:
    return netns.run(lab.server_ns, lambda: libbpf.xdp_attached(socket.if_nametoindex(SERVER_IFNAME)))


# ---- Coming and going --------------------------------------------------------------------------------------------
LOADER = f"""
import signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(TESTS)!r}]
from test_steering_live import POLICY, SERVER_IFNAME
from bypass.steering import Steering
steering = Steering(POLICY, SERVER_IFNAME, queues=2)
steering.set_locals(["192.0.2.10"])
print("attached", flush=True)
signal.pause()
"""


@contextmanager
def loader(lab: Lab) -> Iterator[subprocess.Popen[str]]:
    """Another process that steers the server's interface."""
    argv = ["ip", "netns", "exec", lab.server_ns, sys.executable, "-c", LOADER]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "attached\n"
            yield process
        finally:
            process.kill()


def links_of(pid: int) -> set[int]:
    texts = [f.read_text() for f in Path(f"/proc/{pid}/fdinfo").iterdir()]
    return {int(m[1]) for m in (re.search(r"link_id:\s*(\d+)", t) for t in texts) if m}


def link_exists(number: int) -> bool:
    fd = libbpf._lib().bpf_link_get_fd_by_id(number)
    if fd >= 0:
        os.close(fd)
    return bool(fd >= 0)


def test_a_killed_loader_leaves_nothing_attached(lab: Lab) -> None:
    with loader(lab) as process:
        links = links_of(process.pid)
        assert len(links) == 2, "XDP and the reset guard"
        there = attached(lab)
        assert there is not None
        assert (there.name, there.mode, there.pids) == ("bypass_steer", "native", (process.pid,))
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_for(lambda: not any(map(link_exists, links)), 5, "the kernel to end the links")
    assert attached(lab) is None
    shown = subprocess.run(
        lab.command("server", ["ip", "-d", "link"]), capture_output=True, text=True, check=True
    )
    assert "xdp" not in shown.stdout


def test_closing_detaches_at_once(lab: Lab) -> None:
    with steering(lab) as s:
        links = {int(m[1]) for m in re.finditer(r"link_id:\s*(\d+)", fdinfos())}
        assert s.guard.active, s.guard.reason
        assert attached(lab) is not None
    assert attached(lab) is None
    assert not any(map(link_exists, links))
    s.close()  # once more is nothing


def fdinfos() -> str:
    texts = []
    for f in Path("/proc/self/fdinfo").iterdir():
        try:
            texts.append(f.read_text())
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    return "".join(texts)


def test_ping_and_arp_go_on_while_it_comes_and_goes(lab: Lab) -> None:
    ping = ["ping", "-i", "0.002", "-c", "500", "-W", "2", "-q", SERVER_IP]
    with subprocess.Popen(lab.command("client", ping), stdout=subprocess.PIPE, text=True) as process:
        rounds = 0
        while process.poll() is None:
            with steering(lab):
                rounds += 1
                flush = ["ip", "neigh", "flush", "dev", CLIENT_IFNAME]  # the next ping asks by ARP
                subprocess.run(lab.command("client", flush), check=True)
        assert process.stdout is not None
        text = process.stdout.read()
    assert rounds >= 2
    assert "500 packets transmitted, 500 received" in text, text


@pytest.mark.parametrize("lab", [{"mtu": 9000}], indirect=True)
def test_an_mtu_that_the_driver_refuses_is_named(lab: Lab) -> None:
    with pytest.raises(Exception, match="MTU"), steering(lab):
        pass
    with steering(lab, mode="skb") as s:
        assert s.mode == "skb"


# ---- Others' programs --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["netlink", "netlink generic", "another process"])
def test_a_foreign_program_is_named_and_left_alone(lab: Lab, how: str) -> None:
    with ExitStack() as stack:
        if how == "another process":
            process = stack.enter_context(loader(lab))
            whose = rf"held by process {process.pid} \(python"
        else:
            stack.enter_context(
                by_netlink(lab, libbpf.XDP_SKB_MODE if "generic" in how else libbpf.XDP_DRV_MODE)
            )
            whose = (
                "attached by netlink.*xdpgeneric off" if "generic" in how else "attached by netlink.*xdp off"
            )
        before = attached(lab)
        assert before is not None
        for mode in ("native", "skb", "auto"):
            match = rf"{SERVER_IFNAME} has an XDP program already: id {before.prog_id}, name {before.name}, .*{whose}"
            with pytest.raises(ForeignProgramError, match=match), steering(lab, mode=mode):
                pass
        assert attached(lab) == before


@contextmanager
def by_netlink(lab: Lab, flags: int) -> Iterator[None]:
    """A program that passes everything, attached the old way."""
    prog = libbpf.Prog(libbpf.PROG_XDP, "somebody", probe.PASS_PROGRAM, 0, [])
    with netns.entered(lab.server_ns):
        index = socket.if_nametoindex(SERVER_IFNAME)
        assert libbpf._lib().bpf_xdp_attach(index, prog.fd, flags, None) == 0
        prog.close()
        try:
            yield
        finally:
            assert libbpf._lib().bpf_xdp_attach(index, -1, flags, None) == 0


# ---- Traffic -----------------------------------------------------------------------------------------------------
def client_socket(lab: Lab, kind: int = socket.SOCK_DGRAM) -> socket.socket:
    with netns.entered(lab.client_ns):
        s = socket.socket(socket.AF_INET, kind)
    s.settimeout(5)
    return s


@contextmanager
def echo_server(lab: Lab, s: Steering) -> Iterator[AfxdpDevice]:
    """AF_XDP sockets on all queues that send everything back, in a thread."""
    with netns.entered(lab.server_ns):
        device = AfxdpDevice(SERVER_IFNAME, ring_size=256, frames=2048)
    ending = threading.Event()

    def serve() -> None:
        while not ending.is_set():
            device.echo(0.05, port=PORT)

    with device:
        for queue, fd in device.fds.items():
            s.set_socket(0, queue, fd)
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield device
        finally:
            ending.set()
            thread.join()


def test_a_policy_is_exchanged_under_traffic_without_a_loss(lab: Lab) -> None:
    narrow = Rule(0, "echo", UDP, None, PortRange(PORT, PORT), None, None, None, "steer")
    wide = [
        steer(22, TCP, "pass", "ssh"),
        steer(53, None, "drop", "dns", 1),
        steer(PORT, None, "steer", "echo", 2),
    ]
    policies = [policy_of([narrow], SERVER_IFNAME), policy_of(wide, SERVER_IFNAME)]
    sent = 0
    lost: list[int] = []
    ending = threading.Event()

    def pump(sock: socket.socket) -> None:
        nonlocal sent
        while not ending.is_set():
            number = struct.pack("=I", sent)
            sock.send(number)
            sent += 1
            try:
                assert sock.recv(64) == number
            except TimeoutError:
                lost.append(sent - 1)

    with steering(lab, policies[0]) as s, client_socket(lab) as sock, echo_server(lab, s):
        entry = s.add_endpoint(UDP, SERVER_IP, PORT)
        sock.connect((SERVER_IP, PORT))
        thread = threading.Thread(target=pump, args=(sock,))
        thread.start()
        try:
            for round_ in range(20):
                assert s.swap(policies[(round_ + 1) % 2]) == []
                before = sent
                wait_for(lambda before=before: sent > before + 20 or not thread.is_alive(), 10, "traffic")  # type: ignore[misc]
        finally:
            ending.set()
            thread.join()
        assert not lost
        assert sent > 400
        reasons = {name: c.packets for name, c in s.reasons().items()}
        assert reasons["steered"] == sent
        assert reasons["no_endpoint"] == reasons["rule_pass"] == 0
        assert s.rules()["echo"].packets == sent, "a rule's counter goes on under its name"
        assert s.entries()[entry][1].packets == sent


def test_entries_come_and_go_under_traffic_without_a_loss(lab: Lab) -> None:
    """Every datagram is the stack's or the kernel's, whatever moment it comes at; echoed is what was steered."""
    sent = echoed = 0
    with steering(lab) as s, client_socket(lab) as sock, echo_server(lab, s):
        with netns.entered(lab.server_ns):
            kernel = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with kernel:
            kernel.bind((SERVER_IP, PORT))
            kernel.settimeout(5)
            sock.connect((SERVER_IP, PORT))
            others = [s.add_endpoint(UDP, SERVER_IP, PORT, "198.51.100.1", port) for port in range(1, 50)]
            taken = 0
            for number in range(600):
                entry = s.add_endpoint(UDP, None, PORT) if number % 2 else -1
                if number < len(others):
                    s.remove_endpoint(others[number])
                sock.send(struct.pack("=I", number))
                sent += 1
                answered, _, _ = select.select([sock, kernel], [], [], 5)
                assert answered, f"datagram {number} is lost"
                assert answered[0].recv(64) == struct.pack("=I", number)
                echoed += answered[0] is sock
                taken += answered[0] is kernel
                if entry >= 0:
                    s.remove_endpoint(entry)
        assert (echoed, taken) == (300, 300)
        assert s.reasons()["steered"].packets == 300
        assert s.entries() == {}


def test_generic_mode_steers_as_well(lab: Lab) -> None:
    with steering(lab, mode="skb") as s, client_socket(lab) as sock, echo_server(lab, s):
        assert s.mode == "skb"
        there = attached(lab)
        assert there is not None
        assert there.mode == "skb"
        s.add_endpoint(UDP, SERVER_IP, PORT)
        sock.connect((SERVER_IP, PORT))
        sock.send(b"generic")
        assert sock.recv(64) == b"generic"
        assert s.reasons()["steered"].packets == 1


def test_entries_whose_grant_is_gone_are_reported_and_left_to_the_kernel(lab: Lab) -> None:
    with steering(lab) as s, client_socket(lab) as sock, echo_server(lab, s):
        kept = s.add_endpoint(TCP, None, PORT)
        gone = s.add_endpoint(UDP, SERVER_IP, PORT)
        sock.connect((SERVER_IP, PORT))
        sock.send(b"to the stack")
        assert sock.recv(64) == b"to the stack"
        vanished = s.swap(policy_of([steer(PORT, TCP)], SERVER_IFNAME))
        assert [e.entry for e in vanished] == [gone]
        assert set(s.entries()) == {kept, gone}
        sock.send(b"to the kernel")
        with pytest.raises(ConnectionRefusedError):  # nobody listens there
            sock.recv(64)


# ---- The kernel's resets -----------------------------------------------------------------------------------------
class Peer:
    """The client's wire: raw frames out, resets in."""

    def __init__(self, lab: Lab) -> None:
        sides = lab.sides()
        assert sides is not None
        self.macs = tuple(bytes.fromhex(side.mac.replace(":", "")) for side in sides)
        with netns.entered(lab.client_ns):
            self.sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # ETH_P_ALL
        self.sock.bind((CLIENT_IFNAME, 3))

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()

    def send(self, port: int, sport: int, flags: int, *, tag: bool = False, frag: int = wire.DF) -> None:
        segment = wire.tcp(CLIENT_IP, SERVER_IP, sport, port, 1000, 2000, flags, 1024, b"x" * 12)
        packet = wire.ipv4(CLIENT_IP, SERVER_IP, TCP, segment, frag=frag)
        kind = struct.pack("!HHH", 0x8100, 0, 0x0800) if tag else struct.pack("!H", 0x0800)
        self.sock.send(self.macs[0] + self.macs[1] + kind + packet)

    def resets(self, port: int, *, wait_s: float) -> int:
        """Resets from a server port that have arrived, or arrive within wait_s (then it returns at the first)."""
        count = 0
        while select.select([self.sock], [], [], 0 if count else wait_s)[0]:
            frame, about = self.sock.recvfrom(2048)
            if about[2] == socket.PACKET_OUTGOING or frame[12:14] != b"\x08\0" or frame[23] != TCP:
                continue
            sport, flags = struct.unpack_from("!H", frame, 34)[0], frame[47]
            count += sport == port and bool(flags & wire.RST)
        return count


@pytest.mark.parametrize("listener", [False, True], ids=["alone", "beside a listener of the kernel's"])
def test_the_kernel_resets_no_live_flow_whatever_reaches_it(lab: Lab, listener: bool) -> None:
    """A priority-tagged frame (VLAN 0) is the kernel's, which takes the tag off and finds no connection."""
    strays = [wire.ACK, wire.SYN | wire.ACK, wire.FIN | wire.ACK] + [wire.SYN] * (not listener)
    with ExitStack() as stack:
        if listener:
            with netns.entered(lab.server_ns):
                stack.enter_context(socket.create_server((SERVER_IP, PORT)))
        s, peer = stack.enter_context(steering(lab)), stack.enter_context(Peer(lab))
        peer.send(PORT, 40000, wire.ACK, tag=True)
        assert peer.resets(PORT, wait_s=5) == 1, "without an endpoint it does reset"
        s.add_endpoint(TCP, SERVER_IP, PORT, drain=listener)
        for number, flags in enumerate(strays):
            peer.send(PORT, 40001 + number, flags, tag=True)
        wait_for(lambda: s.guard_counts()["silenced"].packets == len(strays), 5, "silenced resets")
        peer.send(PORT + 1, 40100, wire.ACK, tag=True)  # not ours: its reset comes after those would have
        assert peer.resets(PORT + 1, wait_s=5) == 1
        assert peer.resets(PORT, wait_s=0) == 0
        assert s.guard_counts()["other"].packets == 2


def test_without_tcx_steering_goes_on_and_says_what_is_missing(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels before 6.6 refuse the attach type; so does this one refuse a number that does not exist."""
    monkeypatch.setattr(libbpf, "ATTACH_TCX_EGRESS", 9999)
    with steering(lab) as s, Peer(lab) as peer:
        assert not s.guard.active
        assert "6.6" in s.guard.reason
        s.add_endpoint(TCP, SERVER_IP, PORT)
        peer.send(PORT, 40000, wire.ACK, tag=True)
        assert peer.resets(PORT, wait_s=5) == 1, "this is what the guard is for"
        assert s.swap(POLICY) == []


def test_live_tcp_without_a_socket_is_dropped_and_never_reset(lab: Lab) -> None:
    with steering(lab) as s, Peer(lab) as peer:
        entry = s.add_endpoint(TCP, None, PORT)
        for flags in (wire.SYN, wire.ACK, wire.SYN | wire.ACK):
            peer.send(PORT, 40000, flags)
        peer.send(PORT, 40000, wire.ACK, frag=wire.MF)
        wait_for(lambda: s.reasons()["tcp_no_socket"].packets == 3, 5, "three drops")
        wait_for(lambda: s.reasons()["tcp_fragment"].packets == 1, 5, "a dropped fragment")
        assert sum(c.packets for c in s.guard_counts().values()) == 0, "nothing reached the kernel"
        s.remove_endpoint(entry)
        peer.send(PORT, 40000, wire.SYN)
        assert peer.resets(PORT, wait_s=5) == 1, "without the endpoint the kernel answers at once"


def test_connections_of_the_kernel_survive_an_endpoint_that_drains(lab: Lab) -> None:
    with ExitStack() as stack:
        with netns.entered(lab.server_ns):
            listener = stack.enter_context(socket.create_server((SERVER_IP, PORT)))
        client = stack.enter_context(client_socket(lab, socket.SOCK_STREAM))
        client.connect((SERVER_IP, PORT))
        server = stack.enter_context(listener.accept()[0])
        listener.close()
        s = stack.enter_context(steering(lab))
        entry = s.add_endpoint(TCP, None, PORT, drain=True)
        for _ in range(20):
            client.sendall(b"question")
            assert server.recv(64) == b"question"
            server.sendall(b"answer")
            assert client.recv(64) == b"answer"
        assert s.reasons()["draining"].packets >= 20
        # A new connection is not the kernel's: it meets the endpoint, which has no AF_XDP socket here.
        other = stack.enter_context(client_socket(lab, socket.SOCK_STREAM))
        other.setblocking(False)
        assert other.connect_ex((SERVER_IP, PORT)) == errno.EINPROGRESS
        wait_for(lambda: s.reasons()["tcp_no_socket"].packets >= 1, 5, "the new connection's SYN")
        # The kernel still resets its own.
        server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        server.close()
        with pytest.raises(ConnectionResetError):
            client.recv(64)
        assert s.guard_counts()["kernel_connection"].packets == 1
        s.set_drain(entry, False)
        assert s.entries()[entry][0].drain is False


def test_tcp_of_every_queue_is_counted_even_where_no_socket_is(lab: Lab) -> None:
    """Until sockets are there for all queues, live TCP waits for its retransmission: it is not refused."""
    with steering(lab) as s:
        s.add_endpoint(TCP, None, PORT)
        with client_socket(lab, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)
            assert sock.connect_ex((SERVER_IP, PORT)) == errno.EINPROGRESS
            wait_for(lambda: s.reasons()["tcp_no_socket"].packets >= 1, 5, "the SYN")
            assert not select.select([], [sock], [], 0)[1]
