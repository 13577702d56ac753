# SPDX-License-Identifier: Apache-2.0
"""The broker on an interface, with applications in processes of their own, against kernel peers over a veth."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import pytest
from afxdp_support import link
from broker_support import STREAM, BrokerError, Child, Client, RunningBroker, running
from pyroute2 import IPRoute
from support import WAIT_S

from bypass import netns
from bypass.broker.direct import DirectSite
from bypass.broker.protocol import ABI, Kind, Message
from bypass.lab import CLIENT_IFNAME, CLIENT_IP, SERVER_IFNAME, SERVER_IP, Lab
from bypass.policy import parse_policy

pytestmark = pytest.mark.netns

POLICY = f"""
version: 1
interface: {SERVER_IFNAME}
backend: {{kind: afxdp, mode: copy, ring_size: 256}}
flows:
  - name: web
    match: {{proto: tcp, local: {SERVER_IP}, local_port: 8080}}
    action: steer
  - name: clients
    match: {{proto: tcp, local: {SERVER_IP}, local_port: 50000-50009, remote: {CLIENT_IP}}}
    action: steer
  - name: names
    match: {{proto: udp, local_port: 53}}
    action: steer
"""


@pytest.fixture
def broker(lab: Lab) -> Iterator[RunningBroker]:
    """The test's thread is in the server's namespace."""
    with (
        netns.entered(lab.server_ns),
        running(lambda: DirectSite(parse_policy(POLICY)), lab.server_ns) as it,
    ):
        yield it


def live(broker: RunningBroker) -> list[str]:
    return sorted(str(endpoint) for endpoint, _ in broker.site.steering.entries().values())


def peer(lab: Lab) -> socket.socket:
    """A kernel socket of the client's."""
    with netns.entered(lab.client_ns):
        sock = socket.socket()
    sock.settimeout(WAIT_S)
    return sock


def server_socket(port: int, kind: int = STREAM) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM if kind == STREAM else socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((SERVER_IP, port))
    return sock


def passive_opens(ns: str) -> int:
    """What the kernel of a namespace has accepted."""
    with netns.entered(ns), open("/proc/thread-self/net/snmp") as f:
        names, values = (line.split() for line in f if line.startswith("Tcp:"))
    return int(values[names.index("PassiveOpens")])


def test_an_application_serves_kernel_clients_and_the_kernel_serves_none_of_them(
    broker: RunningBroker, lab: Lab
) -> None:
    before = passive_opens(lab.server_ns)
    with Child(broker.name, ns=lab.server_ns) as app:
        app.do("hello")
        app.tell("serve", host=SERVER_IP, port=8080, connections=3)
        assert app.line() == {"serving": [SERVER_IP, 8080]}
        assert live(broker) == [f"tcp {SERVER_IP}:8080"]
        sent = 0
        for n in range(3):
            with peer(lab) as client:
                client.connect((SERVER_IP, 8080))
                data = bytes([n]) * 1000
                client.sendall(data)
                assert client.recv(1000, socket.MSG_WAITALL) == data
                sent += len(data)
        assert app.line() == {"bytes": sent}
        assert passive_opens(lab.server_ns) == before


def test_an_application_connects_from_a_port_that_the_policy_grants(broker: RunningBroker, lab: Lab) -> None:
    with peer(lab) as server, Child(broker.name, ns=lab.server_ns) as app:
        server.bind((CLIENT_IP, 7000))
        server.listen()
        app.do("hello")
        app.tell("fetch", host=CLIENT_IP, port=7000, data="ping")
        connection, local = server.accept()
        with connection:
            assert connection.recv(10) == b"ping"
            assert connection.recv(10) == b""
            connection.sendall(b"pong")
        assert app.line() == {"local": list(local), "data": "pong"}
        assert local[0] == SERVER_IP
        assert 50000 <= local[1] <= 50009


def test_an_interface_is_one_applications_until_it_ends(broker: RunningBroker, lab: Lab) -> None:
    for _ in range(3):
        with Child(broker.name, ns=lab.server_ns) as first:
            app = first.do("hello")
            assert app["fds"] == 1 + 2  # memory, and a socket for each of two queues
            first.do("listen", host=SERVER_IP, port=8080)
            assert live(broker) == [f"tcp {SERVER_IP}:8080"]
            with pytest.raises(
                BrokerError, match=rf"taken by application {app['app']} .*{first.process.pid}"
            ) as e:
                broker.client().hello()
            assert e.value.code == errno.EBUSY
            first.kill()
            broker.wait(lambda: not live(broker))
            with peer(lab) as client:
                assert client.connect_ex((SERVER_IP, 8080)) == errno.ECONNREFUSED, "the kernel has it again"


def test_what_no_rule_grants_is_refused_and_the_rule_named(broker: RunningBroker) -> None:
    client = broker.client()
    client.hello()
    with server_socket(22) as ssh:
        with pytest.raises(BrokerError, match=r"does not grant tcp 192\.0\.2\.10:22; .*local_port: 22") as e:
            client.lease(ssh, STREAM, (SERVER_IP, 22))
        assert e.value.code == errno.EACCES
    with socket.socket() as sock, pytest.raises(BrokerError, match="does not grant") as e:
        client.lease(sock, STREAM, remote=("192.0.2.99", 80))
    assert e.value.code == errno.EACCES
    assert live(broker) == []


def test_grants_say_what_the_policy_says(broker: RunningBroker) -> None:
    client = broker.client()
    client.hello()
    grants = [m for m in client.told if m.type == Kind.GRANT]
    assert [(m.index, m.text, m.kind, m.flags) for m in grants] == [
        (0, "web", 1, 0),
        (1, "clients", 1, 0),
        (2, "names", 2, 1),
    ]
    web, clients, names = grants
    assert (web.local, web.last_port, web.prefix_len) == ((SERVER_IP, 8080), 8080, 128)
    assert (web.remote, web.last_remote_port, web.remote_prefix_len) == (("0.0.0.0", 0), 65535, 96)
    assert (clients.local, clients.last_port) == ((SERVER_IP, 50000), 50009)
    assert (clients.remote[0], clients.remote_prefix_len) == (CLIENT_IP, 128)
    assert (names.local, names.last_port, names.prefix_len) == (("0.0.0.0", 53), 53, 96)


def test_a_release_gives_the_flow_back_to_the_kernel(broker: RunningBroker) -> None:
    client = broker.client()
    client.hello()
    with server_socket(8080) as sock, server_socket(8080) as again:
        first = client.lease(sock, STREAM, (SERVER_IP, 8080)).lease
        second = client.lease(again, STREAM, (SERVER_IP, 8080)).lease
        assert live(broker) == [f"tcp {SERVER_IP}:8080"]
        client.good(Message(Kind.RELEASE, lease=first))
        assert live(broker) == [f"tcp {SERVER_IP}:8080"]
        client.good(Message(Kind.RELEASE, lease=second))
        assert live(broker) == []


def test_next_hops_are_told_and_followed(broker: RunningBroker, lab: Lab) -> None:
    client = broker.client()
    client.hello()
    mac = next(side.mac for side in lab.sides() or () if side.interface == CLIENT_IFNAME)
    answer, _ = client.ask(Message(Kind.RESOLVE, remote=(CLIENT_IP, 0)))
    assert answer.error in (0, errno.EINPROGRESS)
    told = client.wait_for(Kind.NEXTHOP, lambda m: m.remote[0] == CLIENT_IP and not m.flags)
    assert told.mac.hex(":") == mac
    assert told.mtu == 1500
    known, _ = client.ask(Message(Kind.RESOLVE, remote=(CLIENT_IP, 0)))
    assert (known.error, known.mac) == (0, told.mac)
    client.told.clear()
    new = "02:00:00:00:00:77"
    link(lab.client_ns, CLIENT_IFNAME, address=new)
    with peer(lab) as other:  # its ARP tells the new address
        other.connect_ex((SERVER_IP, 1))
    client.wait_for(Kind.NEXTHOP, lambda m: m.mac.hex(":") == new)
    answer, _ = client.ask(Message(Kind.RESOLVE, remote=("203.0.113.1", 0)))
    assert (answer.error, answer.flags) == (0, 1), "no route: unreachable"


def test_addresses_and_the_link_are_told(broker: RunningBroker, lab: Lab) -> None:
    client = broker.client()
    client.hello()
    assert [(m.local[0], m.prefix_len) for m in client.told if m.type == Kind.ADDR_ADD] == [(SERVER_IP, 24)]
    with IPRoute() as ip:
        index = ip.link_lookup(ifname=SERVER_IFNAME)[0]
        ip.addr("add", index=index, address="192.0.2.11", prefixlen=24)
        client.wait_for(Kind.ADDR_ADD, lambda m: m.local[0] == "192.0.2.11")
        ip.addr("del", index=index, address="192.0.2.11", prefixlen=24)
        client.wait_for(Kind.ADDR_DEL, lambda m: m.local[0] == "192.0.2.11")
        ip.link("set", index=index, state="down")
        client.wait_for(Kind.LINK, lambda m: m.flags == 1)
        ip.link("set", index=index, state="up")
        client.wait_for(Kind.LINK, lambda m: m.flags == 0)
        ip.link("set", index=index, mtu=1400)
        client.wait_for(Kind.LINK, lambda m: m.mtu == 1400)
        ip.link("del", index=index)
        client.wait_for(Kind.LINK, lambda m: m.flags == 2)
    late = broker.client()
    code = late.ask(Message(Kind.HELLO, abi=ABI))[0].error
    assert code == errno.EBUSY


def test_a_hello_waits_for_sockets_that_the_kernel_still_closes(broker: RunningBroker, lab: Lab) -> None:
    with Child(broker.name, ns=lab.server_ns) as child:
        child.do("hello")
        child.kill()
        with Client(broker.name) as next_one:
            broker.wait(lambda: not broker.server.broker.apps)
            next_one.hello()
