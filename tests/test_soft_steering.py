# SPDX-License-Identifier: Apache-2.0
"""Steering by the classifier: what `Steering` promises, and what is different where no XDP program asks the kernel."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator

import pytest
from bypass._core import ffi, lib
from steering_rules import BACKEND

from bypass.dpdk_backend.steering import CLASSIFIER_REASONS, SoftSteering
from bypass.errors import GrantError, SteeringError
from bypass.grants import ANY, KernelView, LiveEntries
from bypass.netlink import NETLINK_SOCK_DIAG, NetlinkSocket, TcpFlow, tcp_connections
from bypass.policy import Policy
from bypass.rules import TCP, UDP, Action, PortRange, Rule
from bypass.stack_api import STREAM
from bypass.steering import REASONS
from bypass.steering_api import Attached, Guard, Steers

HOST, PEER, MAC = "192.0.2.10", "198.51.100.1", bytes.fromhex("020000000001")
SYN, ACK = 0x02, 0x10


def rule(index: int, port: int, action: Action = "steer", name: str = "") -> Rule:
    return Rule(index, name or f"r{index}", None, None, PortRange(port, port), None, None, None, action)


def policy(*rules: Rule) -> Policy:
    return Policy(1, "eth1", BACKEND, rules, "test")


WEB = policy(rule(0, 8080, name="web"))


def frame(
    port: int = 8080, flags: int = ACK, *, host: str = HOST, peer: str = PEER, rport: int = 40000
) -> bytes:
    tcp = struct.pack("!HHIIBBHHH", rport, port, 1, 2, 0x50, flags, 1024, 0, 0)
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 40, 0, 0x4000, 64, TCP, 0)
    return MAC + bytes(6) + b"\x08\x00" + ip + socket.inet_aton(peer) + socket.inet_aton(host) + tcp


class Kernel:
    """Whose connections are these?"""

    def __init__(self) -> None:
        self.flows: list[TcpFlow] = []

    def __call__(self, port: int) -> Iterable[TcpFlow]:
        return [f for f in self.flows if port in (0, f.local_port)]

    def has(
        self, rport: int, *, port: int = 8080, waits: bool = False, host: str = HOST, peer: str = PEER
    ) -> None:
        from ipaddress import ip_address

        self.flows.append(TcpFlow(ip_address(host), port, ip_address(peer), rport, waits))


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def steering(kernel: Kernel) -> Iterator[SoftSteering]:
    with made(kernel) as it:
        yield it


def made(kernel: Kernel, policy: Policy = WEB, left: Attached | None = None) -> SoftSteering:
    s = SoftSteering(policy, "eth1", kernel_flows=kernel, left=left)
    s.set_mac(MAC)
    s.set_locals([HOST])
    return s


def reason(s: SoftSteering, data: bytes) -> str:
    return s.test_run(data).reason


def left_by(s: SoftSteering) -> Attached:
    return Attached(s.mode, s.guard, {name: os.dup(fd) for name, fd in s.map_fds.items()}, {})


def test_it_is_what_users_of_steering_need(steering: SoftSteering) -> None:
    user: Steers = steering
    assert user.reason_list[: len(REASONS)] == REASONS
    assert list(user.reasons()) == [r.name for r in CLASSIFIER_REASONS]
    assert not user.guard.active
    assert set(user.guard_counts().values()) == {(0, 0)}


def test_nothing_is_taken_before_addresses_are_named(kernel: Kernel) -> None:
    with SoftSteering(WEB, "eth1", kernel_flows=kernel) as s:
        s.add_endpoint(TCP, None, 8080)
        assert reason(s, frame()) == "other_mac"
        s.set_mac(MAC)
        assert reason(s, frame()) == "not_local"
        s.set_locals([HOST, "2001:db8::1"])
        assert reason(s, frame()) == "steered"
        s.set_locals(["192.0.2.11"])
        assert reason(s, frame()) == "not_local"


def test_while_the_mac_address_changes_both_are_taken(steering: SoftSteering) -> None:
    """Else one of them reaches the kernel's device, which has it then, and the kernel resets what it does not know."""
    steering.add_endpoint(TCP, None, 8080)
    new, before = bytes.fromhex("020000007701"), frame()
    after = new + before[len(MAC) :]
    assert [reason(steering, f) for f in (before, after)] == ["steered", "other_mac"]
    steering.change_mac(new)
    assert [reason(steering, f) for f in (before, after)] == ["steered", "steered"]
    steering.set_mac(new)
    assert [reason(steering, f) for f in (before, after)] == ["other_mac", "steered"]


def test_endpoints_are_refused_as_by_the_other_steering(steering: SoftSteering) -> None:
    with pytest.raises(GrantError, match=r"no rule of the policy grants tcp \*:81 on eth1"):
        steering.add_endpoint(TCP, None, 81)
    with pytest.raises(GrantError, match="only IPv4"):
        steering.add_endpoint(TCP, "::1", 8080)
    with pytest.raises(SteeringError, match="owner 1 of 1"):
        steering.add_endpoint(TCP, None, 8080, owner=1)
    entry = steering.add_endpoint(TCP, None, 8080)
    with pytest.raises(SteeringError, match="live already"):
        steering.add_endpoint(TCP, None, 8080)
    assert steering.find(TCP, ANY, 8080, None, block=False) == entry
    assert steering.find(UDP, ANY, 8080, None, block=False) is None
    steering.remove_endpoint(entry)
    steering.remove_endpoint(entry)
    assert reason(steering, frame()) == "no_endpoint"
    assert steering.entries() == {}


def test_after_close_every_call_says_so(kernel: Kernel) -> None:
    s = made(kernel)
    s.close()
    s.close()
    for call in (
        s.reasons,
        s.rules,
        s.entries,
        lambda: s.set_locals([]),
        lambda: s.swap(WEB),
        lambda: s.map_fds,
    ):
        with pytest.raises(SteeringError, match="eth1: steering is closed"):
            call()


# ---- Counters and policies


def test_counts_of_rules_go_on_under_their_names(steering: SoftSteering) -> None:
    entry = steering.add_endpoint(TCP, None, 8080)
    first, second = frame(), frame(22)
    steering.test_run(first)
    both = policy(rule(0, 22, "drop", "ssh"), rule(1, 8080, name="web"))
    assert steering.swap(both) == []
    steering.test_run(first)
    steering.test_run(second)
    assert {n: c.packets for n, c in steering.rules().items()} == {"ssh": 1, "web": 2}
    steering.prepare(WEB)
    assert steering.swap(WEB) == []
    assert {n: c.packets for n, c in steering.rules().items()} == {"web": 2}
    steering.swap(both)  # a name that was gone begins anew
    assert {n: c.packets for n, c in steering.rules().items()} == {"ssh": 0, "web": 2}
    assert steering.entries()[entry][1] == (2, 2 * len(first))
    assert [e.entry for e in steering.swap(policy(rule(0, 22)))] == [entry]


def test_a_policy_that_does_not_fit_leaves_the_old_one(
    steering: SoftSteering, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steering.classifier.cfg, "keys", 1)
    with pytest.raises(SteeringError, match="eth1: test: the classifier: No space left"):
        steering.swap(policy(rule(0, 22), rule(1, 23)))
    assert steering.policy is WEB
    assert reason(steering, frame()) == "no_endpoint"


# ---- Draining


def test_connections_of_the_kernel_stay_with_it(steering: SoftSteering, kernel: Kernel) -> None:
    kernel.has(40000)
    kernel.has(40001, waits=True)
    kernel.has(40002, port=8081)
    entry = steering.add_endpoint(TCP, None, 8080, drain=True)
    assert steering.draining(entry)
    assert (
        reason(steering, frame(rport=40000)) == reason(steering, frame(rport=40000, flags=SYN)) == "draining"
    )
    assert reason(steering, frame(rport=40001)) == "draining"
    assert reason(steering, frame(rport=40001, flags=SYN)) == "steered"
    assert reason(steering, frame(rport=40002)) == "steered"
    kernel.flows.pop(0)
    steering.set_drain(entry, True)
    assert reason(steering, frame(rport=40000)) == "steered"
    assert reason(steering, frame(rport=40001)) == "draining"
    steering.set_drain(entry, False)
    assert reason(steering, frame(rport=40001)) == "steered"
    assert held(steering) == 0


def held(s: SoftSteering) -> int:
    at, key, flags = ffi.new("uint32_t *"), ffi.new("struct classify_key *"), ffi.new("uint32_t *")
    n = 0
    while lib.classify_held_next(s.classifier, at, key, flags):
        n += 1
    return n


def test_entries_that_drain_beside_each_other_do_not_let_go_of_each_others(
    steering: SoftSteering, kernel: Kernel
) -> None:
    kernel.has(40000)
    everywhere = steering.add_endpoint(TCP, None, 8080, drain=True)
    here = steering.add_endpoint(TCP, HOST, 8080, drain=True)
    assert held(steering) == 1
    steering.remove_endpoint(here)
    assert reason(steering, frame()) == "draining"
    steering.remove_endpoint(everywhere)
    assert held(steering) == 0


def test_while_the_kernel_is_asked_nothing_is_taken_and_nothing_begins(kernel: Kernel) -> None:
    seen: list[str] = []

    def asked(port: int) -> Iterable[TcpFlow]:
        seen.extend((reason(s, frame()), reason(s, frame(flags=SYN))))
        return kernel(port)

    s = made(kernel)
    s._kernel_flows = asked
    with s:
        s.add_endpoint(TCP, None, 8080, drain=True)
        assert seen == ["draining", "unsettled"]
        assert reason(s, frame()) == reason(s, frame(flags=SYN)) == "steered"
        assert s.reasons()["unsettled"].packets == 1


def test_where_the_kernel_does_not_answer_nothing_is_live(steering: SoftSteering) -> None:
    def silent(port: int) -> Iterable[TcpFlow]:
        raise OSError(errno.ENOBUFS, "no")

    steering._kernel_flows = silent
    with pytest.raises(OSError, match="no"):
        steering.add_endpoint(TCP, None, 8080, drain=True)
    assert steering.entries() == {}
    assert reason(steering, frame()) == "no_endpoint"


def test_the_kernel_is_asked_for_real() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        port = listener.getsockname()[1]
        client.bind(("127.0.0.1", 0))
        rport = client.getsockname()[1]
        client.connect(listener.getsockname())
        server = listener.accept()[0]
        with SoftSteering(policy(rule(0, port)), "lo") as s, NetlinkSocket(NETLINK_SOCK_DIAG) as diag:
            s.set_mac(MAC)
            s.set_locals(["127.0.0.1"])

            class View:
                def tcp_connections(self, port: int) -> int:
                    return tcp_connections(diag, port)

            view: KernelView = View()  # type: ignore[assignment]
            entries = LiveEntries(s, view)
            live = entries.use((STREAM, (ANY, port), None))
            ours = {"host": "127.0.0.1", "peer": "127.0.0.1", "rport": rport}
            assert live.drain
            assert reason(s, frame(port, SYN, **ours)) == "draining"  # type: ignore[arg-type]
            server.close()  # first: its side waits
            client.recv(1)
            client.close()
            assert entries.check_draining(2_000_000_000) == 1  # looks anew
            assert reason(s, frame(port, SYN, **ours)) == "steered"  # type: ignore[arg-type]
            assert reason(s, frame(port, ACK, **ours)) == "draining"  # type: ignore[arg-type]


def test_a_successor_holds_on_to_connections_while_it_asks(kernel: Kernel) -> None:
    first = made(kernel, policy(rule(0, 8080), rule(1, 8081)))
    kernel.has(40000)
    kernel.has(40000, port=8081)
    for port in (8080, 8081):
        first.add_endpoint(TCP, None, port, drain=True)
    left = left_by(first)
    seen: list[str] = []

    def asked(port: int) -> Iterable[TcpFlow]:
        seen.extend((reason(first, frame(8080)), reason(first, frame(8081))))
        return kernel(port)

    with first, SoftSteering(first.policy, "eth1", left=left, kernel_flows=asked):
        assert seen == ["draining"] * 4


# ---- The memory


def test_what_is_not_used_costs_no_memory(steering: SoftSteering, kernel: Kernel) -> None:
    def used() -> int:
        return os.fstat(steering.endpoints_fd).st_blocks * 512

    before = used()
    assert before < 256 << 10
    for port in range(50):
        kernel.has(40000 + port)
    entry = steering.add_endpoint(TCP, None, 8080, drain=True)
    steering.set_drain(entry, True)
    steering.set_locals([HOST, "192.0.2.11"])
    assert used() - before < 512 << 10  # each in a page of its own at worst


def test_nobody_can_shrink_the_memory(steering: SoftSteering) -> None:
    for size in (0, os.fstat(steering.endpoints_fd).st_size + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(steering.endpoints_fd, size)


def test_a_successor_goes_on_with_what_is_live(kernel: Kernel) -> None:
    first = made(kernel, policy(rule(0, 8080), rule(1, 8081)))
    kept = first.add_endpoint(TCP, HOST, 8080, PEER, 40000)
    gone = first.add_endpoint(UDP, None, 8081)
    kernel.has(40001)
    draining = first.add_endpoint(TCP, None, 8080, drain=True)
    first.test_run(frame())
    left = left_by(first)
    first.remove_endpoint(gone)
    first.close()
    kernel.flows.clear()
    kernel.has(40002)
    with made(kernel, left=left) as second:
        assert second.find(TCP, HOST, 8080, (PEER, 40000), block=False) == kept
        assert set(second.entries()) == {kept, draining}
        assert second.entries()[kept][1].packets == 1
        assert second.draining(draining)
        assert not second.draining(kept)
        assert reason(second, frame(rport=40001)) == "steered"
        assert reason(second, frame(rport=40002)) == "draining"
        fresh = second.add_endpoint(TCP, HOST, 8080)
        assert fresh not in (kept, draining)
        second.remove_endpoint(kept)
        second.remove_endpoint(draining)
        assert held(second) == 0, "what the first had held has gone, too"
        second.set_locals(["192.0.2.11"])
        assert reason(second, frame()) == "not_local"


def test_a_successor_settles_what_a_killed_one_left_unsettled(kernel: Kernel) -> None:
    first = made(kernel)
    entry = first.add_endpoint(TCP, None, 8080)
    key = ffi.new("struct classify_key *")
    ffi.memmove(key, first.key_of(entry), 16)
    assert lib.classify_endpoint_set(first.classifier, key, lib.CLASSIFY_DRAIN | lib.CLASSIFY_UNSETTLED) == 0
    left = left_by(first)
    first.close()
    with made(kernel, left=left) as second:
        assert second.draining(entry)
        assert reason(second, frame(flags=SYN)) == "steered"


def test_other_memory_is_refused() -> None:
    for size in (0, 4096, 1 << 20):
        fd = os.memfd_create("other")
        os.ftruncate(fd, size)
        with pytest.raises((SteeringError, ValueError), match=r"no classifier's|empty"):
            SoftSteering(WEB, "eth1", left=Attached("soft", Guard(False, ""), {"classifier": fd}, {}))
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)


def test_what_bypass_fwd_deletes_is_no_error_to_remove(steering: SoftSteering) -> None:
    entry = steering.add_endpoint(TCP, None, 8080)
    key = ffi.new("struct classify_key *")
    ffi.memmove(key, steering.key_of(entry), 16)
    assert lib.classify_endpoint_del(steering.classifier, key, False) == 0
    assert reason(steering, frame()) == "no_endpoint"
    steering.set_drain(entry, True)
    steering.remove_endpoint(entry)
    assert steering.entries() == {}
