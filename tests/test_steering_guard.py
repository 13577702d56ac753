# SPDX-License-Identifier: Apache-2.0
"""The reset guard silences exactly the resets of flows that steering would take, and wrong guards are noticed.

The program runs in the kernel on frames that were never sent (BPF_PROG_TEST_RUN), in a namespace with a connection of
the kernel's own. What sockets send is tested on the wire, in test_steering_live.py.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count

import pytest
import wire
from steering_rules import policy_of

from bypass import netns
from bypass.bpf import build
from bypass.rules import PortRange, Rule
from bypass.steering import Steering

pytestmark = pytest.mark.netns

TCP = socket.IPPROTO_TCP
HOST, PEER, KERNELS_PEER, PASSED_PEER = "127.0.0.10", "127.0.0.20", "127.0.0.21", "127.0.0.22"
PORT, DRAINING_PORT, BLOCK_PORT, PEER_PORT = 80, 443, 600, 5000
RULES = [
    Rule(0, "take", TCP, None, PortRange(1, 1023), None, None, None, "steer"),
    Rule(1, "leave", TCP, None, PortRange(PORT, PORT), ipaddress.ip_network(PASSED_PEER), None, None, "pass"),
]
QUIET = (False, "")


def reset(
    peer: str = PEER,
    port: int = PORT,
    *,
    host: str = HOST,
    flags: int = wire.RST,
    options: bytes = b"",
    frag: int = 0,
) -> bytes:
    """A segment from us to a peer, a reset unless flags say otherwise."""
    segment = wire.tcp(host, peer, port, PEER_PORT, 1, 0, flags, 0)
    packet = wire.ipv4(host, peer, TCP, segment, options=options, frag=frag)
    return wire.eth(bytes(6), bytes(6), wire.ETH_IPV4, packet)


TABLE = {
    "of a live flow": (reset(), (True, "silenced")),
    "with ACK": (reset(flags=wire.RST | wire.ACK), (True, "silenced")),
    "with IP options": (reset(options=bytes(8)), (True, "silenced")),
    "of a draining port, no connection": (reset(port=DRAINING_PORT), (True, "silenced")),
    "of a draining port, the kernel's connection": (reset(KERNELS_PEER, DRAINING_PORT), (False, "draining")),
    "of a port without endpoint": (reset(port=81), (False, "other")),
    "of a block of ports": (reset(port=BLOCK_PORT), (True, "silenced")),
    "behind the block": (reset(port=BLOCK_PORT + 256), (False, "other")),
    "of a port without rule": (reset(port=2000), (False, "other")),
    "to a peer that a rule leaves to the kernel": (reset(PASSED_PEER), (False, "other")),
    "routed through this host": (reset(port=DRAINING_PORT, host="127.0.0.99"), (False, "other")),
    "no reset": (reset(flags=wire.ACK), QUIET),
    "a later fragment": (reset(frag=3), QUIET),
    "cut short": (reset()[:50], QUIET),
    "UDP": (wire.eth(bytes(6), bytes(6), 0x0800, wire.ipv4(HOST, PEER, 17, reset()[34:])), QUIET),
    "ARP": (wire.eth(bytes(6), bytes(6), 0x0806, reset()[14:]), QUIET),
}


_numbers = count()


@contextmanager
def guarding(text: str | None = None) -> Iterator[Steering]:
    """Ports 80, 443, and 512 to 767 are live, 443 drains, and the kernel holds a connection there."""
    name = f"bypass-{os.getpid()}-guard{next(_numbers)}"
    with ExitStack() as stack:
        netns.create(name)
        stack.callback(netns.remove, name)
        stack.enter_context(netns.entered(name))
        up()
        listener = stack.enter_context(socket.create_server((HOST, DRAINING_PORT)))
        client = stack.enter_context(socket.socket())
        client.bind((KERNELS_PEER, PEER_PORT))
        client.connect((HOST, DRAINING_PORT))
        stack.enter_context(listener.accept()[0])
        s = stack.enter_context(Steering(policy_of(RULES), "lo", queues=1, attach=False, text=text))
        s.set_locals([HOST])
        s.add_endpoint(TCP, HOST, PORT)
        s.add_endpoint(TCP, None, DRAINING_PORT, drain=True)
        s.add_endpoint(TCP, HOST, BLOCK_PORT - BLOCK_PORT % 256, block=True)
        yield s


def up() -> None:
    from pyroute2 import IPRoute

    with IPRoute() as ip:
        ip.link("set", index=1, state="up")


@pytest.fixture(scope="module")
def guard() -> Iterator[Steering]:
    with guarding() as it:
        yield it


@pytest.mark.parametrize("case", TABLE)
def test_resets(guard: Steering, case: str) -> None:
    frame, expected = TABLE[case]
    assert guard.test_guard(frame) == expected


MUTANTS = {
    "routed resets are dropped": ("!cfg || !locals4.lookup(&local)", "!cfg"),
    "pass rules are ignored": ("!best.rank || (best.rule_action & 3) != ACTION_STEER", "!best.rank"),
    "every segment is a reset": (" || !tcp->rst", ""),
    "draining is ignored": ("(e->flags & ENDPOINT_DRAIN) && kernel_holds(skb, f, 0)", "0"),
    "options are read as TCP": ("(void *)ip + ip->ihl * 4", "(void *)ip + 20"),
    "peers are swapped": (
        "flow_set_ipv4(f, ip->saddr, ip->daddr, IPPROTO_TCP)",
        "flow_set_ipv4(f, ip->daddr, ip->saddr, IPPROTO_TCP)",
    ),
    "fragments are read": (" ||\n        (ip->frag_off & be16(IP_OFFSET))", ""),
    "nothing is dropped": ("kind == GUARD_SILENCED ? TCX_DROP_PACKET : ", ""),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_guard_is_noticed(name: str) -> None:
    right, wrong = MUTANTS[name]
    text = build.source()
    assert text.count(right) == 1, f"the line of this mutant is not in the program any more: {right}"
    with guarding(text.replace(right, wrong)) as guard:
        assert any(guard.test_guard(frame) != expected for frame, expected in TABLE.values())
