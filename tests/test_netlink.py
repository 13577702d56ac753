# SPDX-License-Identifier: Apache-2.0
"""What the kernel tells by netlink arrives: link, addresses, next hops, connections; and nothing stays behind."""

from __future__ import annotations

import errno
import ipaddress
import json
import select
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from bypass import netns
from bypass.errors import DeviceError
from bypass.lab import Lab
from bypass.netlink import (
    NETLINK_SOCK_DIAG,
    Change,
    LocalAddress,
    NetlinkSocket,
    Watcher,
    steerable,
    tcp_connections,
)
from bypass.nexthop import PENDING, RENEW_NS, UNREACHABLE, Answer, NextHop, NextHops, multicast_mac
from bypass.rules import Address
from bypass.watch import KernelWatch

pytestmark = pytest.mark.netns

PATIENCE_S = 15.0
IP = ipaddress.ip_address
SERVER, CLIENT, BEHIND = IP("192.0.2.10"), IP("192.0.2.20"), IP("198.51.100.7")


class Place:
    """The lab's server side, with a watcher and next hops inside it."""

    def __init__(self, lab: Lab, stack: ExitStack) -> None:
        self.lab = lab
        with netns.entered(lab.server_ns):
            self.watcher = stack.enter_context(Watcher("bypass0"))
            self.hops = NextHops(self.watcher)
            stack.callback(self.hops.close)
        self.seen = Change.NONE
        self.told: dict[Address, Answer | None] = {}
        self.skip_ns = 0  # how far the clock is ahead

    def ip(self, *args: str) -> Any:
        """The ip command on the server's side; JSON where it prints some."""
        return ip(self.lab.server_ns, *args)

    def now_ns(self) -> int:
        return time.monotonic_ns() + self.skip_ns

    def step(self, timeout: float = 0.05) -> None:
        if select.select([self.watcher], [], [], timeout)[0]:
            change = self.watcher.poll()
            self.seen |= change
            self.hops.changed(change)
        self.told |= self.hops.update(self.now_ns())

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end, f"waited in vain; seen {self.seen}, told {self.told}"
            self.step()

    def resolved(self, destination: Address) -> NextHop:
        """The next hop, as soon as there is one."""
        answer: Answer | None = self.hops.resolve(destination, self.now_ns())
        if answer is PENDING:
            self.until(lambda: destination in self.told)
            answer = self.told.pop(destination)
        assert isinstance(answer, NextHop)
        return answer


def ip(namespace: str, *args: str) -> Any:
    done = subprocess.run(["ip", "-j", "-n", namespace, *args], capture_output=True, text=True, check=True)
    return json.loads(done.stdout) if done.stdout.strip() else None


@pytest.fixture
def place(lab: Lab) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(lab, stack)


def mac_of(namespace: str, interface: str) -> bytes:
    return bytes.fromhex(ip(namespace, "link", "show", interface)[0]["address"].replace(":", ""))


# ---- Interface and addresses ------------------------------------------------------------------------------------


def test_the_state_at_the_start_is_the_interface_s(place: Place) -> None:
    seen = place.watcher.interface
    assert seen.name == "bypass0"
    assert seen.mac == mac_of(place.lab.server_ns, "bypass0")
    assert (seen.mtu, seen.up, seen.running) == (1500, True, True)
    assert LocalAddress(SERVER, 24, seen.index) in place.watcher.addresses
    assert steerable(place.watcher.addresses) == {SERVER}
    assert place.watcher.poll() == Change.NONE


def test_an_interface_that_is_not_there_is_named_with_those_that_are(lab: Lab) -> None:
    with (
        netns.entered(lab.server_ns),
        pytest.raises(DeviceError, match=r"no interface 'eth7' here.*bypass0, lo"),
    ):
        Watcher("eth7")


def test_link_mtu_and_mac_changes_are_seen(place: Place) -> None:
    place.ip("link", "set", "bypass0", "mtu", "1400")
    place.until(lambda: Change.MTU in place.seen)
    assert place.watcher.interface.mtu == 1400
    place.ip("link", "set", "bypass0", "down")
    place.until(lambda: Change.LINK in place.seen)
    assert not place.watcher.interface.up
    place.ip("link", "set", "bypass0", "address", "02:00:00:00:00:99")
    place.until(lambda: Change.MAC in place.seen)
    assert place.watcher.interface.mac == bytes.fromhex("020000000099")
    place.ip("link", "set", "bypass0", "up")
    place.until(lambda: place.watcher.interface.running)


def test_a_peer_that_goes_down_takes_the_carrier(place: Place) -> None:
    ip(place.lab.client_ns, "link", "set", "bypass1", "down")
    place.until(lambda: not place.watcher.interface.running)
    assert place.watcher.interface.up


def test_a_deleted_interface_is_gone_for_good(place: Place) -> None:
    place.ip("link", "del", "bypass0")
    place.until(lambda: Change.GONE in place.seen)
    assert place.watcher.gone
    assert place.hops.resolve(CLIENT, 0) is UNREACHABLE
    place.ip("link", "add", "bypass0", "type", "veth", "peer", "name", "other0")
    place.step()
    assert place.watcher.gone


def test_addresses_come_and_go(place: Place) -> None:
    place.ip("address", "add", "192.0.2.11/24", "dev", "bypass0")
    place.ip("address", "add", "203.0.113.1/32", "dev", "lo")
    place.ip("address", "add", "2001:db8::10/64", "dev", "bypass0", "nodad")
    new = {IP("192.0.2.11"), IP("203.0.113.1"), IP("2001:db8::10")}
    place.until(lambda: new <= steerable(place.watcher.addresses))
    assert Change.ADDRESSES in place.seen
    place.ip("address", "del", "192.0.2.11/24", "dev", "bypass0")
    place.until(lambda: IP("192.0.2.11") not in steerable(place.watcher.addresses))


def test_lost_events_are_made_good(place: Place) -> None:
    place.watcher._events.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2304)
    batch = "".join(f"address add 10.77.{n // 250}.{n % 250 + 1}/32 dev lo\n" for n in range(500))
    batch += "link set bypass0 mtu 1300\n"
    subprocess.run(["ip", "-n", place.lab.server_ns, "-batch", "-"], input=batch, text=True, check=True)
    place.until(lambda: place.watcher.interface.mtu == 1300)
    assert len(steerable(place.watcher.addresses)) == 501
    assert Change.ROUTES in place.seen


def test_sockets_stay_in_the_namespace_they_were_made_in(place: Place) -> None:
    place.ip("address", "add", "192.0.2.12/24", "dev", "bypass0")
    place.until(lambda: IP("192.0.2.12") in steerable(place.watcher.addresses))
    assert IP("192.0.2.12") not in {a.address for a in host_addresses()}


def host_addresses() -> set[LocalAddress]:
    with Watcher("lo") as watcher:
        return set(watcher.addresses)


# ---- Next hops --------------------------------------------------------------------------------------------------


def test_a_neighbour_and_what_is_behind_it_have_its_mac(place: Place) -> None:
    mac = mac_of(place.lab.client_ns, "bypass1")
    assert place.resolved(CLIENT) == NextHop(mac, 1500, SERVER)
    assert place.resolved(BEHIND) == NextHop(mac, 1500, SERVER)
    assert place.hops.source_for(BEHIND) == SERVER


def test_what_cannot_be_reached_by_this_interface_is_unreachable(place: Place) -> None:
    place.ip("link", "set", "lo", "up")
    place.ip("route", "add", "203.0.113.0/24", "dev", "lo")
    place.ip("route", "add", "blackhole", "203.0.113.7")
    place.ip("route", "add", "unreachable", "203.0.113.8")
    place.ip("route", "add", "prohibit", "203.0.113.9")
    nowhere = IP("8.8.8.8")
    for destination in (
        nowhere,
        IP("203.0.113.1"),
        IP("203.0.113.7"),
        IP("203.0.113.8"),
        IP("203.0.113.9"),
        SERVER,
    ):
        assert place.hops.resolve(destination, 0) is UNREACHABLE
    with pytest.raises(OSError, match=r"8\.8\.8\.8") as caught:
        place.hops.source_for(nowhere)
    assert caught.value.errno == errno.ENETUNREACH


def test_groups_and_broadcast_need_no_neighbour(place: Place) -> None:
    place.ip("route", "add", "224.0.0.0/4", "dev", "bypass0")
    assert place.resolved(IP("192.0.2.255")).mac == b"\xff" * 6
    assert place.resolved(IP("239.129.2.3")).mac == bytes.fromhex("01005e010203")
    assert multicast_mac(IP("ff02::1:ff00:7")) == bytes.fromhex("3333ff000007")


def test_a_silent_neighbour_is_pending_then_unreachable_and_can_be_tried_again(place: Place) -> None:
    silent = IP("192.0.2.77")
    assert place.hops.resolve(silent, place.now_ns()) is PENDING
    place.until(lambda: silent in place.told)
    assert place.told.pop(silent) is UNREACHABLE
    assert not any(n["dst"] == str(silent) and "managed" in n for n in place.ip("neigh") or [])
    assert place.hops.due_ns() is None
    assert place.hops.resolve(silent, place.now_ns()) is PENDING
    ip(place.lab.client_ns, "address", "add", f"{silent}/24", "dev", "bypass1")
    place.until(lambda: silent in place.told)
    assert isinstance(place.told[silent], NextHop)


def test_a_route_change_moves_the_destination(place: Place) -> None:
    first = place.resolved(BEHIND)
    ip(place.lab.client_ns, "address", "add", "192.0.2.21/24", "dev", "bypass1")
    place.ip(
        "neigh", "replace", "192.0.2.21", "lladdr", "02:00:00:00:00:21", "dev", "bypass0", "nud", "permanent"
    )
    place.ip("route", "replace", "198.51.100.0/24", "via", "192.0.2.21", "mtu", "1280")
    place.until(lambda: BEHIND in place.told)
    assert place.told[BEHIND] == NextHop(bytes.fromhex("020000000021"), 1280, SERVER)
    assert place.told[BEHIND] != first
    place.ip("route", "del", "198.51.100.0/24")
    place.until(lambda: place.told[BEHIND] is UNREACHABLE)


def test_an_ipv4_destination_behind_an_ipv6_gateway_has_its_mac(place: Place) -> None:
    place.ip("address", "add", "2001:db8::10/64", "dev", "bypass0", "nodad")
    gateway = ("2001:db8::20", "lladdr", "02:00:00:00:00:20", "dev", "bypass0", "nud", "permanent")
    place.ip("neigh", "replace", *gateway)
    place.ip("route", "add", "203.0.113.0/24", "via", "inet6", "2001:db8::20", "dev", "bypass0")
    assert place.resolved(IP("203.0.113.7")) == NextHop(bytes.fromhex("020000000020"), 1500, SERVER)


def test_a_permanent_neighbour_stays_permanent(place: Place) -> None:
    place.ip(
        "neigh", "replace", "192.0.2.30", "lladdr", "02:00:00:00:00:30", "dev", "bypass0", "nud", "permanent"
    )
    assert place.resolved(IP("192.0.2.30")).mac == bytes.fromhex("020000000030")
    place.hops.close()
    (entry,) = [n for n in place.ip("neigh") if n["dst"] == "192.0.2.30"]
    assert entry["state"] == ["PERMANENT"]
    assert "managed" not in entry


def test_neighbours_in_use_are_managed_and_ordinary_again_afterwards(place: Place) -> None:
    place.resolved(CLIENT)
    (entry,) = place.ip("neigh")
    assert "managed" in entry
    place.hops.close()
    (entry,) = place.ip("neigh")
    assert "managed" not in entry


def test_a_neighbour_that_changes_its_mac_is_followed(place: Place) -> None:
    place.resolved(CLIENT)
    new = "02:00:00:00:00:55"
    ip(place.lab.client_ns, "link", "set", "bypass1", "address", new)
    # The client's own traffic makes the server's kernel learn it, as any gratuitous ARP would.
    place.ip("neigh", "change", str(CLIENT), "lladdr", new, "dev", "bypass0", "nud", "reachable")
    place.until(lambda: CLIENT in place.told)
    answer = place.told[CLIENT]
    assert isinstance(answer, NextHop)
    assert answer.mac == bytes.fromhex(new.replace(":", ""))


def test_a_neighbour_that_fails_is_looked_for_again_at_once(place: Place) -> None:
    place.resolved(CLIENT)
    new = "02:00:00:00:00:66"
    ip(place.lab.client_ns, "link", "set", "bypass1", "address", new)
    place.ip("neigh", "change", str(CLIENT), "dev", "bypass0", "nud", "failed")
    answers = []

    def found() -> bool:
        answers.append(place.told.get(CLIENT))
        return isinstance(answers[-1], NextHop)

    place.until(found)
    assert UNREACHABLE not in answers
    answer = answers[-1]
    assert isinstance(answer, NextHop)
    assert answer.mac == bytes.fromhex(new.replace(":", ""))


def test_a_path_mtu_exception_is_found_by_asking_again(place: Place) -> None:
    """The kernel learns it from an ICMP error and sends no event."""
    assert place.resolved(BEHIND).mtu == 1500
    with netns.entered(place.lab.server_ns), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER: IP_PMTUDISC_DO
        sock.bind((str(SERVER), 5000))
        sock.connect((str(BEHIND), 6000))
        send_frag_needed(place, sock, 1300)
    assert place.told.get(BEHIND) is None
    place.skip_ns += RENEW_NS
    place.until(lambda: BEHIND in place.told)
    answer = place.told[BEHIND]
    assert isinstance(answer, NextHop)
    assert answer.mtu == 1300


def send_frag_needed(place: Place, sock: socket.socket, mtu: int) -> None:
    """The client answers the server's datagram with "fragmentation needed", and waits until that has arrived."""
    with netns.entered(place.lab.client_ns):
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    with raw:
        quote = bytes.fromhex("4500001e00004000401100000000000000000000")[:12] + SERVER.packed + BEHIND.packed
        quote += (5000).to_bytes(2, "big") + (6000).to_bytes(2, "big") + bytes.fromhex("000a0000")
        body = bytes([3, 4, 0, 0, 0, 0]) + mtu.to_bytes(2, "big") + quote
        body = body[:2] + checksum(body) + body[4:]
        raw.sendto(body, (str(SERVER), 0))
    end = time.monotonic() + PATIENCE_S
    while sock.getsockopt(socket.IPPROTO_IP, 14) != mtu:  # IP_MTU
        assert time.monotonic() < end
        select.select([sock], [], [], 0.01)


def checksum(data: bytes) -> bytes:
    total = sum(int.from_bytes(data[i : i + 2].ljust(2, b"\0"), "big") for i in range(0, len(data), 2))
    total = (total & 0xFFFF) + (total >> 16)
    return (0xFFFF - ((total & 0xFFFF) + (total >> 16))).to_bytes(2, "big")


def test_asking_does_not_make_events_that_make_us_ask(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.resolved(CLIENT)
    place.resolved(BEHIND)
    asked = 0
    question = place.hops._requests.get

    def counted(message: Any, kind: int) -> Any:
        nonlocal asked
        asked += 1
        return question(message, kind)

    monkeypatch.setattr(place.hops._requests, "get", counted)
    for _ in range(40):
        place.step(0.01)
    assert asked < 20


def test_a_thousand_destinations_are_renewed_a_few_at_a_time(place: Place) -> None:
    place.resolved(CLIENT)
    hosts = [IP(f"198.51.100.{n}") for n in range(1, 255)]
    for host in hosts:
        assert isinstance(place.hops.resolve(host, place.now_ns()), NextHop)
    place.ip("route", "del", "198.51.100.0/24")
    place.until(lambda: Change.ROUTES in place.seen)
    first = {d for d in place.told if d in set(hosts)}
    assert 0 < len(first) <= 32
    assert place.hops.due_ns() is not None
    place.until(lambda: all(place.told.get(h) is UNREACHABLE for h in hosts))


# ---- Connections of the kernel ----------------------------------------------------------------------------------


def test_connections_are_counted_and_listeners_are_not(place: Place) -> None:
    with netns.entered(place.lab.server_ns):
        diag = NetlinkSocket(NETLINK_SOCK_DIAG)
        listener = socket.create_server(("", 7000))
        dual = socket.create_server(("::", 7001), family=socket.AF_INET6, dualstack_ipv6=True)
    with diag, listener, dual:
        assert tcp_connections(diag, 7000) == 0
        with netns.entered(place.lab.client_ns):
            peers = [socket.create_connection((str(SERVER), port)) for port in (7000, 7000, 7001)]
        taken = [listener.accept()[0], listener.accept()[0], dual.accept()[0]]
        assert tcp_connections(diag, 7000) == tcp_connections(diag, 7000, SERVER) == 2
        assert tcp_connections(diag, 7000, CLIENT) == 0
        assert tcp_connections(diag, 7001, SERVER) == 1
        assert tcp_connections(diag, 7002) == 0
        taken[0].close()  # closed here first: stays in FIN_WAIT, then TIME_WAIT
        peers[0].close()
        assert tcp_connections(diag, 7000) == 2
        for sock in (*taken[1:], *peers[1:]):
            sock.close()


# ---- Carried on --------------------------------------------------------------------------------------------------


class Told:
    """Stack, steering and device that write down what they are told."""

    def __init__(self) -> None:
        self.addresses: dict[str, int] = {}
        self.hops: dict[str, tuple[bytes | None, int] | None] = {}
        self.locals: set[str] = set()
        self.mac = b""
        self.asked_health = 0

    def addr_add(self, address: str, prefix_len: int) -> None:
        assert address not in self.addresses
        self.addresses[address] = prefix_len

    def addr_del(self, address: str) -> None:
        del self.addresses[address]

    def nexthop_set(self, address: str, mac: bytes | None, mtu: int = 0) -> None:
        self.hops[address] = (mac, mtu)

    def nexthop_forget(self, address: str | None = None) -> None:
        if address is None:
            self.hops.clear()
        else:
            self.hops[address] = None

    def set_locals(self, addresses: Any) -> None:
        self.locals = {str(a) for a in addresses}

    def set_mac(self, mac: bytes) -> None:
        self.mac = mac

    def health(self) -> int:
        self.asked_health += 1
        return 0


@pytest.fixture
def watched(lab: Lab) -> Iterator[tuple[KernelWatch, Told, Callable[[Callable[[], bool]], None]]]:
    told = Told()
    with netns.entered(lab.server_ns):
        watch = KernelWatch("bypass0", told, told, told)

    def until(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end, vars(told)
            select.select([watch], [], [], 0.05)
            watch.update()

    yield watch, told, until
    watch.close()


def test_stack_and_steering_know_the_addresses(lab: Lab, watched: Any) -> None:
    _, told, until = watched
    assert told.addresses == {"192.0.2.10": 24}
    assert told.locals == {"192.0.2.10"}
    assert told.mac == mac_of(lab.server_ns, "bypass0")
    ip(lab.server_ns, "address", "add", "203.0.113.1/24", "dev", "lo")
    ip(lab.server_ns, "address", "add", "192.0.2.11/25", "dev", "bypass0")
    until(lambda: told.addresses == {"192.0.2.10": 24, "192.0.2.11": 25, "203.0.113.1": 32})
    assert told.locals == set(told.addresses)
    ip(lab.server_ns, "address", "del", "203.0.113.1/24", "dev", "lo")
    ip(lab.server_ns, "link", "set", "bypass0", "address", "02:00:00:00:00:77")
    until(lambda: len(told.locals) == 2 and told.mac == bytes.fromhex("020000000077"))
    assert told.addresses == {"192.0.2.10": 24, "192.0.2.11": 25}
    assert told.asked_health > 0


def test_the_interface_s_addresses_come_first_when_a_stack_cannot_have_all(lab: Lab, watched: Any) -> None:
    _, told, until = watched
    batch = "".join(f"address add 10.0.0.{n}/32 dev lo\n" for n in range(1, 30))
    subprocess.run(["ip", "-n", lab.server_ns, "-batch", "-"], input=batch, text=True, check=True)
    until(lambda: len(told.locals) == 30)
    assert len(told.addresses) == 16
    assert "192.0.2.10" in told.addresses


def test_next_hops_are_told_when_they_are_found_and_when_they_change(lab: Lab, watched: Any) -> None:
    watch, told, until = watched
    mac = mac_of(lab.client_ns, "bypass1")
    watch.resolve(["192.0.2.20", "8.8.8.8", "192.0.2.255"])
    assert told.hops["8.8.8.8"] == (None, 0)
    assert told.hops["192.0.2.255"] == (b"\xff" * 6, 1500)
    until(lambda: told.hops.get("192.0.2.20") == (mac, 1500))
    ip(lab.server_ns, "link", "set", "bypass0", "mtu", "1400")
    until(lambda: told.hops.get("192.0.2.20") == (mac, 1400))
    assert watch.source_for("198.51.100.9") == "192.0.2.10"
    assert watch.tcp_connections(8080) == 0


def test_what_had_no_way_is_told_as_soon_as_there_is_one(lab: Lab, watched: Any) -> None:
    """Nobody asks again meanwhile: connections must not wait for their timers after a flap."""
    watch, told, until = watched
    mac = mac_of(lab.client_ns, "bypass1")
    watch.resolve(["192.0.2.20", "203.0.113.9"])
    until(lambda: told.hops.get("192.0.2.20") == (mac, 1500))
    assert told.hops["203.0.113.9"] == (None, 0)
    ip(lab.server_ns, "link", "set", "bypass0", "down")
    until(lambda: told.hops["192.0.2.20"] == (None, 0))
    ip(lab.server_ns, "link", "set", "bypass0", "up")
    until(lambda: told.hops["192.0.2.20"] == (mac, 1500))
    ip(lab.server_ns, "route", "add", "203.0.113.0/24", "via", "192.0.2.20")
    until(lambda: told.hops["203.0.113.9"] == (mac, 1500))


def test_update_says_when_the_link_is_down_and_when_it_is_gone(lab: Lab, watched: Any) -> None:
    watch, told, until = watched
    assert watch.update() == 0
    ip(lab.server_ns, "link", "set", "bypass0", "down")
    until(lambda: watch.update() == errno.ENETDOWN)
    ip(lab.server_ns, "link", "set", "bypass0", "up")
    until(lambda: watch.update() == 0)
    before = told.asked_health
    ip(lab.server_ns, "link", "del", "bypass0")
    until(lambda: watch.update() == errno.ENXIO)
    assert told.asked_health > before
