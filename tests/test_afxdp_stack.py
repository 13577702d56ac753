# SPDX-License-Identifier: Apache-2.0
"""The whole stack on an AF_XDP device when the device has trouble: links that flap, interfaces that go, peers that
leave checksums to hardware which is not there. Transfers and datagrams also on a DPDK port."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from afxdp_support import set_queues
from backends import policy_for

import bypass
from bypass import netns
from bypass.errors import DeviceError
from bypass.lab import CLIENT_IFNAME, SERVER_IFNAME, SERVER_IP, Lab
from bypass.policy import parse_policy

pytestmark = pytest.mark.netns

PORT = 8080
POLICY = f"""
version: 1
interface: {SERVER_IFNAME}
backend: {{kind: afxdp, mode: auto, ring_size: 512}}
flows:
  - {{name: tcp, match: {{proto: tcp, local: {SERVER_IP}, local_port: {PORT}}}, action: steer}}
  - {{name: udp, match: {{proto: udp, local: {SERVER_IP}, local_port: {PORT}}}, action: steer}}
"""


@contextmanager
def served(lab: Lab, **options: Any) -> Iterator[bypass.Stack]:
    """A stack on the server's interface; the calling thread is in its namespace meanwhile."""
    policy = parse_policy(policy_for(lab, POLICY))
    with netns.entered(lab.server_ns), bypass.Stack.from_policy(policy, **options) as stack:
        yield stack


def client(lab: Lab, kind: int) -> socket.socket:
    s = netns.run(lab.client_ns, socket.socket, socket.AF_INET, kind)
    s.settimeout(20)
    return s


def flap(lab: Lab, ns: str, ifname: str) -> None:
    from pyroute2 import IPRoute

    with IPRoute(netns=ns) as ip:
        index = ip.link_lookup(ifname=ifname)[0]
        for state in ("down", "up"):
            ip.link("set", index=index, state=state)


@pytest.mark.backends(asked=True)
@pytest.mark.parametrize("side", ["server", "client"])
def test_a_transfer_survives_link_flaps_at_either_end(lab: Lab, side: str) -> None:
    """Server's link down: the kernel keeps what it was given. Client's: it takes, drops and completes."""
    ns, ifname = (lab.server_ns, lab.server_ifname) if side == "server" else (lab.client_ns, CLIENT_IFNAME)
    body = bytes(range(256)) * (20 << 12)  # 20 MiB
    result: list[str] = []

    def download(s: socket.socket) -> None:
        s.connect((SERVER_IP, PORT))
        got, digest = 0, hashlib.sha256()
        flaps = [len(body) // 4, len(body) // 2]
        while data := s.recv(1 << 16):
            got += len(data)
            digest.update(data)
            if flaps and got >= flaps[0]:
                flaps.pop(0)
                flap(lab, ns, ifname)
        result.append(digest.hexdigest())
        s.shutdown(socket.SHUT_WR)

    with (
        served(lab) as stack,
        stack.create_server((SERVER_IP, PORT)) as server,
        client(lab, socket.SOCK_STREAM) as s,
    ):
        thread = threading.Thread(target=download, args=(s,))
        thread.start()
        server.settimeout(20)
        conn, _ = server.accept()
        with conn:
            conn.settimeout(30)
            conn.sendall(body)
            conn.shutdown(socket.SHUT_WR)
            assert conn.recv(1) == b""
        thread.join(30)
        assert result == [hashlib.sha256(body).hexdigest()]
        audit = stack.driver.device.audit()
        assert audit.conserved
        assert (audit.misplaced, audit.bad_free) == (0, 0)


@pytest.mark.parametrize("lab", [{"queues": 4}], indirect=True)
def test_connections_by_queues_that_appear_later_are_served(lab: Lab) -> None:
    """`ethtool -L` below a running stack: nothing but netlink tells it."""
    set_queues(lab, 1)
    done: list[bytes] = []

    def ask(count: int) -> None:
        for i in range(count):
            with client(lab, socket.SOCK_STREAM) as s:
                s.connect((SERVER_IP, PORT))
                s.sendall(b"%d" % i)
                done.append(s.recv(100))

    def serve(server: Any, count: int) -> None:
        thread = threading.Thread(target=ask, args=(count,))
        thread.start()
        for _ in range(count):
            conn, _peer = server.accept()
            with conn:
                conn.sendall(conn.recv(100))
        thread.join()

    with served(lab) as stack, stack.create_server((SERVER_IP, PORT)) as server:
        server.settimeout(20)
        serve(server, 4)
        thread = threading.Thread(target=set_queues, args=(lab, 4))
        thread.start()
        device = stack.driver.device
        while len(device.fds) < 4:
            assert not stack.run(timeout=0.05)
        thread.join()
        serve(server, 64)
        assert all(queue["rx_packets"] for queue in device.statistics().values())
    assert done == [b"%d" % i for i in range(4)] + [b"%d" % i for i in range(64)]


def test_deletion_of_the_interface_ends_waiting_calls_with_its_name(lab: Lab) -> None:
    from pyroute2 import IPRoute

    with served(lab) as stack, stack.create_server((SERVER_IP, PORT)) as server:
        server.settimeout(20)

        def delete() -> None:
            with IPRoute(netns=lab.server_ns) as ip:
                ip.link("del", index=ip.link_lookup(ifname=SERVER_IFNAME)[0])

        thread = threading.Timer(0.05, delete)
        thread.start()
        with pytest.raises(DeviceError, match=f"{SERVER_IFNAME} is gone"):
            server.accept()
        thread.join()


@pytest.mark.parametrize("trust", [False, True])
def test_a_peer_that_leaves_checksums_out_is_heard_only_when_trusted(lab: Lab, trust: bool) -> None:
    from pyroute2.ethtool.ioctl import IoctlEthtool

    def leave_checksums_out() -> None:
        ethtool = IoctlEthtool(CLIENT_IFNAME)
        features = ethtool.get_features()
        features["tx-checksum-ip-generic"] = True
        ethtool.set_features(features)
        ethtool.close()

    netns.run(lab.client_ns, leave_checksums_out)
    heard: list[bytes] = []
    with served(lab, rx_csum_trust=trust) as stack, stack.socket(socket.SOCK_DGRAM) as server:
        server.bind((SERVER_IP, PORT))
        with client(lab, socket.SOCK_DGRAM) as s:
            s.connect((SERVER_IP, PORT))
            s.send(b"partial")
            if not trust:
                while stack.stats()["udp_in_bad_checksum"] == 0:
                    assert not stack.run(timeout=0.01)
                server.settimeout(0)
                with pytest.raises(BlockingIOError):
                    server.recvfrom(100)
                return
            server.settimeout(20)
            data, peer = server.recvfrom(100)
            server.sendto(data, peer)
            thread = threading.Thread(target=lambda: heard.append(s.recv(100)))
            thread.start()
            while thread.is_alive():
                assert not stack.run(timeout=0.01)
            assert heard == [b"partial"]


@pytest.mark.backends(asked=True)
def test_no_frame_is_left_after_thousands_of_datagrams(lab: Lab) -> None:
    answers = 0

    def ask(s: socket.socket) -> None:
        nonlocal answers
        for i in range(3000):
            s.send(b"%d" % i * (1 + i % 200))
            answers += s.recv(2000) == b"%d" % i * (1 + i % 200)

    with served(lab) as stack, stack.socket(socket.SOCK_DGRAM) as server:
        server.bind((SERVER_IP, PORT))
        server.settimeout(20)
        with client(lab, socket.SOCK_DGRAM) as s:
            s.connect((SERVER_IP, PORT))
            thread = threading.Thread(target=ask, args=(s,))
            thread.start()
            for _ in range(3000):
                data, peer = server.recvfrom(2000)
                server.sendto(data, peer)
            thread.join()
        assert answers == 3000
        while stack.driver.device.audit().tx:
            assert not stack.run(timeout=0.01)
        audit = stack.driver.device.audit()
        assert audit.conserved
        assert (audit.stack, audit.stack_tx, audit.misplaced, audit.bad_free) == (0, 0, 0, 0)
        assert audit.free + audit.rx == audit.frames
