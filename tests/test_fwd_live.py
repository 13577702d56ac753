# SPDX-License-Identifier: Apache-2.0
"""Shared mode over a veth: applications in processes of their own, bypass-fwd between them and the AF_XDP sockets, the
kernel as the peer."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from afxdp_support import link, set_queues
from fwd_live import App, AppMemory, application

from bypass import netns
from bypass.fwd import Died, Forwarder, Lease, LinkState, QueuesAdded
from bypass.lab import SERVER_IFNAME, SERVER_IP, Lab, wait_for
from bypass.policy import parse_policy
from bypass.steer_maps import endpoint_key
from bypass.steering import Steering

pytestmark = pytest.mark.netns

POLICY = f"""
version: 1
interface: {SERVER_IFNAME}
backend: {{kind: afxdp, mode: auto, ring_size: 512}}
flows:
  - {{name: tcp, match: {{proto: tcp, local: {SERVER_IP}, local_port: 7000-7099}}, action: steer}}
  - {{name: udp, match: {{proto: udp, local: {SERVER_IP}, local_port: 7000-7099}}, action: steer}}
"""
PORT = 7000  # of application 0; 1 has the next, and so on
TX_CSUM = 2  # BYPASS_CAP_TX_CSUM
CONFIG = {"ring_size": 512, "frames": 4096, "frame_size": 2048, "bind_wait_ms": 2000}


class Live:
    """bypass-fwd on the server's interface, steered to by the real program."""

    def __init__(self, lab: Lab, folder: Path, program: Path, queues: int | None = None) -> None:
        self.lab, self.folder, self.program = lab, folder, program
        self.stack = ExitStack()
        self.apps: dict[int, App] = {}
        self.memory: dict[int, AppMemory] = {}
        sides = lab.sides()
        assert sides is not None
        self.peer_mac = sides[1].mac
        with netns.entered(lab.server_ns):
            self.steering = self.stack.enter_context(
                Steering(parse_policy(POLICY), SERVER_IFNAME, queues=lab.queues)
            )
            self.f = Forwarder.start()
            self.stack.callback(self.f.close)
        self.steering.set_locals([SERVER_IP])
        config = CONFIG | {"ifname": SERVER_IFNAME, "queues": list(range(queues or lab.queues))}
        self.device = self.f.device_open(config, self.steering._maps["xsks"].fd)
        self.f.locals([f"{SERVER_IP}/24"])

    def add(self, number: int) -> AppMemory:
        """A port for application number + 1, with its flows."""
        m = AppMemory(
            frames=1024, rx_ring=256, tx_ring=256, mac=list(self.device["mac"]), mtu=self.device["mtu"]
        )
        self.stack.callback(m.close)
        self.memory[number] = m
        self.f.put(f"app/{number}")
        m.add_to(self.f, number + 1, item=f"app/{number}")
        self.lease(number)
        keys = []
        for proto in (6, 17):
            entry = self.steering.add_endpoint(proto, SERVER_IP, PORT + number)
            self.f.entry(entry, number + 1)
            keys.append(endpoint_key(self.steering._endpoints[entry]))
        self.f.watch_keys(f"app/{number}", 0, keys, self.steering._maps["endpoints"].fd)
        return m

    def lease(self, number: int) -> None:
        for proto in (6, 17):
            self.f.lease_add(Lease(number + 1, proto, SERVER_IP, PORT + number))

    def start(self, number: int, mode: str = "echo") -> App:
        self.add(number)
        return self.run(number, mode)

    def run(self, number: int, mode: str) -> App:
        """The application of a port that is there."""
        app = App(self.program, mode, self.lab.server_ns, self.memory[number], PORT + number, self.peer_mac)
        self.apps[number] = app
        self.stack.callback(app.kill)
        pidfd = os.pidfd_open(app.process.pid)
        self.f.watch(f"app/{number}", [pidfd])
        os.close(pidfd)
        return app

    def client(self, number: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
        s = self.stack.enter_context(netns.run(self.lab.client_ns, socket.socket, socket.AF_INET, kind))
        s.settimeout(30)
        s.connect((SERVER_IP, PORT + number))
        return s

    def echo_stream(self, number: int, size: int) -> None:
        """So many bytes to the application and back, compared."""
        body = bytes(range(256)) * (size // 256)
        with self.client(number) as s:
            writer = threading.Thread(target=s.sendall, args=(body,))
            writer.start()
            got = bytearray()
            while len(got) < len(body):
                data = s.recv(1 << 16)
                assert data, f"ended after {len(got)} bytes"
                got += data
            writer.join()
            assert got == body
            s.shutdown(socket.SHUT_WR)
            assert s.recv(1) == b""

    def echo_datagrams(self, number: int, count: int) -> None:
        """One after the other, each of them answered."""
        with self.client(number, socket.SOCK_DGRAM) as s:
            for i in range(count):
                data = b"%d" % i * (1 + i % 100)
                s.send(data)
                assert s.recv(2000) == data

    def at_home(self, number: int) -> None:
        """Ends an echo, whose frames are all free or posted."""
        assert self.apps[number].end().split() == ["0"] * 5


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return application(tmp_path_factory.mktemp("fwd_app"))


@pytest.fixture
def live(lab: Lab, tmp_path: Path, program: Path) -> Iterator[Live]:
    it = Live(lab, tmp_path, program)
    with it.stack:
        yield it


def test_streams_and_datagrams_are_served_by_a_stack_that_sleeps_between(live: Live) -> None:
    live.start(0)
    live.echo_stream(0, 8 << 20)
    live.echo_datagrams(0, 500)
    stats = live.f.port_stats(1)
    assert stats["refused"] == {}
    assert (stats["rx_bad_slot"], stats["tx_bad_slot"], stats["cut"]) == (0, 0, 0)
    assert stats["rings"] > 0
    assert live.f.stats()["rx_nobody"] == 0
    assert live.f.stats()["tx_dropped"] == 0
    live.at_home(0)


@pytest.mark.parametrize("sums", [True, False])
def test_checksums_are_left_to_an_interface_that_sums(
    lab: Lab, tmp_path: Path, program: Path, sums: bool
) -> None:
    state = "on" if sums else "off"
    ethtool = ["ip", "netns", "exec", lab.server_ns, "ethtool", "-K", SERVER_IFNAME, "tx", state]
    subprocess.run(ethtool, check=True, stdout=subprocess.DEVNULL)
    live = Live(lab, tmp_path, program)
    with live.stack:
        assert bool(live.device["caps"] & TX_CSUM) == sums
        live.start(0)
        live.echo_stream(0, 4 << 20)
        live.echo_datagrams(0, 100)
        assert live.f.port_stats(1)["refused"] == {}
        live.at_home(0)


def test_a_rate_holds_on_the_wire(live: Live) -> None:
    """What bypass-fwd passes on while one floods is what its rate allows for the time that has passed."""
    live.add(0)
    live.f.rate(1, bytes_=1_000_000, bytes_burst=10_000)
    begin = time.monotonic()
    app = live.run(0, "flood")
    wait_for(lambda: bool(live.f.port_stats(1)["tx_packets"] > 500), 30, "half a megabyte")
    sent = live.f.port_stats(1)["tx_bytes"]
    most = (time.monotonic() - begin) * 1_000_000 + 10_000 + 1000
    assert sent <= most
    assert live.f.port_stats(1)["tx_limited"] > 0
    app.end()


def test_many_connections_at_once(live: Live) -> None:
    live.start(0)
    clients = [live.client(0) for _ in range(50)]
    for round_ in range(5):
        for i, s in enumerate(clients):
            s.sendall(b"%d %d" % (i, round_))
        for i, s in enumerate(clients):
            assert s.recv(100) == b"%d %d" % (i, round_)
    for s in clients:
        s.close()
    live.at_home(0)


def test_two_applications_have_their_own_flows(live: Live) -> None:
    live.start(0)
    live.start(1)
    for number in (0, 1, 1, 0):
        live.echo_stream(number, 1 << 20)
        live.echo_datagrams(number, 20)
    assert live.f.port_stats(1)["rx_packets"] > 40
    assert live.f.port_stats(2)["rx_packets"] > 40
    live.at_home(0)
    live.at_home(1)


def test_while_one_floods_every_frame_of_the_other_arrives(live: Live) -> None:
    live.start(0, "flood")
    live.start(1)
    live.echo_datagrams(1, 2000)
    live.echo_stream(1, 2 << 20)
    stats = live.f.port_stats(1)
    assert stats["tx_sent"] > 2000
    assert stats["refused"].keys() == {"lease"}
    assert live.f.port_stats(2)["refused"] == {}
    live.apps[0].end()
    live.at_home(1)


@pytest.mark.parametrize("mode", ["garbage", "clever"])
def test_a_hostile_application_hurts_only_itself(live: Live, mode: str) -> None:
    """It writes to all of the shared memory while bypass-fwd works; cut off, it is let in again and again."""
    hostile = live.start(0, mode)
    live.start(1)
    cuts = 0
    seen: Counter[str] = Counter()
    refused: set[str] = set()
    while cuts < 3 or seen["rounds"] < 30:
        seen["rounds"] += 1
        assert seen["rounds"] < 1000
        with live.client(0, socket.SOCK_DGRAM) as s:
            s.send(b"for the hostile one")  # its frames are copied to its memory
        live.echo_datagrams(1, 50)
        stats = live.f.port_stats(1)
        if stats["cut"] or seen["rounds"] % 10 == 0:
            cuts += stats["cut"]
            refused |= stats["refused"].keys()
            seen.update({name: stats[name] for name in ("tx_packets", "tx_bad_slot", "rx_packets")})
            live.f.port_del(1)
            live.memory[0].add_to(live.f, 1, item="app/0")
            live.lease(0)
    live.echo_stream(1, 1 << 20)
    if mode == "clever":
        assert seen["tx_packets"] > 100
        assert seen["tx_bad_slot"] > 10
        assert refused >= {"lease", "source_mac", "offload"}
    assert live.f.port_stats(2)["refused"] == {}
    assert hostile.process.poll() is None
    hostile.end()
    live.at_home(1)


def test_bypass_fwd_sleeps_while_nothing_happens(live: Live) -> None:
    live.start(0)
    live.echo_datagrams(0, 10)
    time.sleep(0.2)
    before = live.f.stats()["rounds"]
    time.sleep(1)
    assert live.f.stats()["rounds"] - before < 50  # it would be a million
    live.echo_datagrams(0, 10)
    live.at_home(0)


# ---- Failure -----------------------------------------------------------------------------------------------------
def listener(live: Live, number: int) -> socket.socket:
    """The kernel's, at the same port."""
    s = live.stack.enter_context(netns.run(live.lab.server_ns, socket.socket))
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind((SERVER_IP, PORT + number))
    s.listen()
    s.settimeout(20)
    return s


def kernel_answers(live: Live, server: socket.socket, number: int) -> None:
    with live.client(number) as s:
        conn, _ = server.accept()
        with conn:
            conn.sendall(b"kernel")
            assert s.recv(100) == b"kernel"


def test_when_bypass_fwd_is_killed_the_kernel_has_all_traffic(live: Live) -> None:
    server = listener(live, 0)
    live.start(0)
    live.echo_stream(0, 1 << 16)
    held = [link.fd for link in live.steering._links.values()]
    held += [m.fd for m in live.steering._maps.values()]
    live.f.put("steering", b"", held)
    live.steering.close()  # as a broker that dies, or wants this
    live.echo_stream(0, 1 << 16)
    os.kill(live.f.pid, signal.SIGKILL)

    def detached() -> bool:
        from pyroute2 import IPRoute

        with IPRoute(netns=live.lab.server_ns) as ip:
            [about] = ip.get_links(ip.link_lookup(ifname=SERVER_IFNAME)[0])
            return not about.get_nested("IFLA_XDP", "IFLA_XDP_ATTACHED")

    wait_for(detached, 20, "the program to be detached")
    kernel_answers(live, server, 0)
    live.apps[0].kill()


def test_when_an_application_is_killed_its_flows_are_the_kernels(live: Live) -> None:
    server = listener(live, 0)
    app = live.start(0)
    live.start(1)
    live.echo_stream(0, 1 << 16)
    app.kill()
    happened: list[object] = []

    def noticed() -> bool:
        happened.extend(live.f.events())
        return bool(happened)

    wait_for(noticed, 20, "its death")
    assert happened == [Died("app/0")]
    kernel_answers(live, server, 0)
    assert live.f.stats()["ports"] == 1
    live.echo_stream(1, 1 << 16)
    live.at_home(1)


def test_a_link_that_goes_down_is_reported_and_connections_survive(live: Live) -> None:
    live.start(0)
    s = live.client(0)
    s.sendall(b"before")
    assert s.recv(100) == b"before"
    seen: list[object] = []
    for state in ("down", "up"):
        link(live.lab.server_ns, SERVER_IFNAME, state=state)

        def told(state: str = state) -> bool:
            seen.extend(live.f.events())
            return any(isinstance(e, LinkState) and e.state == state for e in seen)

        wait_for(told, 20, f"the link to be {state}")
    s.sendall(b"after")
    assert s.recv(100) == b"after"
    s.close()
    live.at_home(0)


@pytest.mark.parametrize("lab", [{"queues": 4}], indirect=True)
def test_queues_that_appear_later_are_served(lab: Lab, tmp_path: Path, program: Path) -> None:
    """`ethtool -L` on an interface in use: their packets are this application's too."""
    set_queues(lab, 1)
    live = Live(lab, tmp_path, program, queues=1)
    with live.stack:
        live.start(0)
        live.echo_stream(0, 1 << 16)
        set_queues(lab, 4)
        seen: list[object] = []

        def told() -> bool:
            seen.extend(live.f.events())
            return QueuesAdded(4) in seen

        wait_for(told, 20, "the queues to be served")
        live.steering.attach_anew()
        for _ in range(64):
            live.echo_stream(0, 1 << 10)
        live.at_home(0)


@pytest.mark.parametrize("lab", [{"queues": 4}], indirect=True)
def test_queues_that_were_not_asked_for_are_left_alone(lab: Lab, tmp_path: Path, program: Path) -> None:
    live = Live(lab, tmp_path, program, queues=1)
    with live.stack:
        before = len(os.listdir(f"/proc/{live.f.pid}/fd"))
        time.sleep(2.5)  # it looks every second
        assert len(os.listdir(f"/proc/{live.f.pid}/fd")) == before
        assert live.f.events() == []


def test_a_closed_device_gives_the_flows_back_to_whoever_opens_it_next(live: Live) -> None:
    live.start(0)
    live.echo_stream(0, 1 << 16)
    live.f.device_close()
    config = CONFIG | {"ifname": SERVER_IFNAME, "queues": list(range(live.lab.queues))}
    live.f.device_open(config, live.steering._maps["xsks"].fd)
    live.echo_stream(0, 1 << 16)
    live.at_home(0)
