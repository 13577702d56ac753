# SPDX-License-Identifier: Apache-2.0
"""A bench for the steering program: a namespace with an interface, kernel connections and AF_XDP sockets, in which a
policy's program is loaded and compared with its model, packet by packet."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import random
import socket
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from model import TCP_TIME_WAIT, BlockKey, Model
from steering_rules import policy_of

from bypass import libbpf, netns, probe
from bypass.bpf import build
from bypass.errors import GrantError
from bypass.rules import Address, Rule
from bypass.steering import BLOCK, Steering
from bypass.testing.flows import (
    GROUP_MACS,
    LOCALS,
    TCP,
    UDP,
    EndpointKey,
    World,
    draw_frame,
    flow_of_rule,
    meets,
)

QUEUES = 4
SOCKET_QUEUES = (0, 1, 2)  # queue 3 has no socket
AF_XDP = 44
TCP_ESTABLISHED = 1
KERNEL_LOCALS, KERNEL_PORTS = ("192.0.2.10", "192.0.2.11"), (80, 8000)
KERNEL_PEERS = ("198.51.100.1", "198.51.100.2")

_benches = 0


def without_metadata() -> str:
    """The program as it runs on a driver that has no room in front of the packet."""
    text = build.source()
    line = "bpf_xdp_adjust_meta(ctx, -(int)sizeof(struct steer_verdict))"
    assert line in text
    return text.replace(line, "bpf_xdp_adjust_meta(ctx, -1024)")


class Bench:
    """The namespace, and what stays the same for all policies. Enters the namespace for the calling thread."""

    def __init__(self) -> None:
        global _benches
        _benches += 1
        self.name = f"bypass-{os.getpid()}-bench{_benches}"
        self.kernel: dict[tuple[Address, int, Address, int], int] = {}
        self._listeners: dict[tuple[str, int], socket.socket] = {}
        self._stack = ExitStack()
        self._next_port = 20000

    def __enter__(self) -> Self:
        try:
            netns.create(self.name)
            self._stack.callback(netns.remove, self.name)
            self._stack.enter_context(netns.entered(self.name))
            self._wire()
            self._enable_queues()
            # An AF_XDP socket need not be bound to be in the map, and a test run redirects nothing.
            self._xsks = [
                self._stack.enter_context(socket.socket(AF_XDP, socket.SOCK_RAW)) for _ in SOCKET_QUEUES
            ]
            for address in KERNEL_LOCALS:
                for port in KERNEL_PORTS:
                    listener = self._stack.enter_context(socket.create_server((address, port)))
                    self._listeners[address, port] = listener
                    for peer in KERNEL_PEERS:
                        for remote_port in (443, 8007):
                            self._connection(address, port, peer, remote_port, close=False)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _wire(self) -> None:
        """A multi-queue veth whose other end is in the same namespace; the test networks are local everywhere."""
        from pyroute2 import IPRoute

        counts = {"num_tx_queues": QUEUES, "num_rx_queues": QUEUES}
        with IPRoute() as ip:
            ip.link("add", ifname="in0", kind="veth", peer={"ifname": "in1", **counts}, **counts)
            for name in ("lo", "in0"):  # in1 stays down: no packet comes by the wire
                ip.link("set", index=socket.if_nametoindex(name), state="up")
            for net in ("192.0.2.0/24", "198.51.100.0/24"):
                ip.route("add", dst=net, oif=1, table=255, type="local", scope=254)
            self.mac = bytes.fromhex(
                ip.get_links(socket.if_nametoindex("in0"))[0].get("address").replace(":", "")
            )

    def _enable_queues(self) -> None:
        """A veth has receive queues for test runs to name while any XDP program is attached."""
        prog = libbpf.Prog(libbpf.PROG_XDP, "pass", probe.PASS_PROGRAM, libbpf.ATTACH_XDP, [])
        self._stack.callback(prog.close)
        link = libbpf.Link(prog, socket.if_nametoindex("in0"), libbpf.ATTACH_XDP, libbpf.XDP_DRV_MODE)
        self._stack.callback(link.close)

    def _connection(self, address: str, port: int, peer: str, remote_port: int, *, close: bool) -> None:
        """A connection of the kernel's; `close`: its server side is in TIME_WAIT."""
        with ExitStack() as both:
            client = both.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.bind((peer, remote_port))
            client.connect((address, port))
            server = both.enter_context(self._listeners[address, port].accept()[0])
            if close:  # the side that closes first waits
                server.shutdown(socket.SHUT_WR)
                client.recv(1)
                client.close()
                server.recv(1)
            else:
                self._stack.enter_context(both.pop_all())
        key = (ipaddress.ip_address(address), port, ipaddress.ip_address(peer), remote_port)
        self.kernel[key] = TCP_TIME_WAIT if close else TCP_ESTABLISHED

    def _waiting(self) -> None:
        """New connections in TIME_WAIT (it ends after a minute, so those of an earlier policy are forgotten)."""
        self.kernel = {k: v for k, v in self.kernel.items() if v != TCP_TIME_WAIT}
        for address in KERNEL_LOCALS:
            for port in KERNEL_PORTS:
                for _ in range(3):
                    self._next_port += 1
                    self._connection(address, port, KERNEL_PEERS[0], self._next_port, close=True)

    @contextlib.contextmanager
    def case(
        self, rng: random.Random, rules: list[Rule], *, bare: bool = False, text: str | None = None
    ) -> Iterator[Case]:
        """A policy in force with random endpoints, some of them without sockets, some draining.

        Args:
            bare: as on a driver without room for metadata.
            text: the program's source in place of the installed one.
        """
        self._waiting()
        policy = policy_of(rules, "in0")
        with ExitStack() as stack:
            text = without_metadata() if bare else text
            steering = stack.enter_context(
                Steering(policy, "in0", queues=QUEUES, owners=2, attach=False, text=text)
            )
            for queue, xsk in zip(SOCKET_QUEUES, self._xsks, strict=True):
                steering.set_socket(0, queue, xsk.fileno())
            steering.set_locals(LOCALS)
            steering.set_groups(GROUP_MACS)
            endpoints = _draw_endpoints(rng, steering, rules, list(self.kernel))
            blocks = _draw_blocks(rng, steering, rules)
            model = Model(
                rules,
                mac=self.mac,
                locals_=LOCALS,
                groups=GROUP_MACS,
                endpoints=endpoints,
                blocks=blocks,
                sockets=[(0, q) for q in SOCKET_QUEUES],
                kernel=self.kernel,
            )
            kernel = [k for k in self.kernel if any(meets(r, TCP, k[0], k[1]) for r in rules)]
            world = World(rules, self.mac, [*endpoints, *_about_blocks(rng, blocks)], kernel)
            yield Case(steering, model, world, bytes(252) if bare else b"")


def _draw_endpoints(
    rng: random.Random, steering: Steering, rules: list[Rule], kernel: list[tuple[Address, int, Address, int]]
) -> dict[EndpointKey, tuple[int, int, bool]]:
    """Endpoints that the rules grant, of all three kinds."""
    wanted: list[EndpointKey] = []
    for rule in (r for r in rules if r.action == "steer"):
        for proto in (TCP, UDP) if rule.proto is None else (rule.proto,):
            for _ in range(3):
                f = flow_of_rule(rng, rule)
                if proto not in (TCP, UDP) or f.local.version == 6:
                    continue
                kind = rng.choice(("any", "any", "local", "exact"))
                local = None if kind == "any" else f.local
                exact = kind == "exact" and not f.remote.is_unspecified
                peer = (f.remote, f.remote_port) if exact else (None, None)
                wanted.append((proto, local, f.local_port, *peer))
    for local, port, remote, remote_port in rng.sample(kernel, 6):
        wanted.append((TCP, local, port, None, None))
        wanted.append((TCP, local, port, remote, remote_port))
    endpoints: dict[EndpointKey, tuple[int, int, bool]] = {}
    for key in wanted:
        with_kernel = key[2] in KERNEL_PORTS
        owner, drain = int(rng.random() < 0.3), rng.random() < (0.65 if with_kernel else 0.4)
        with contextlib.suppress(GrantError):
            if key not in endpoints:
                endpoints[key] = (_add(steering, key, owner, drain), owner, drain)
    return endpoints


def _draw_blocks(
    rng: random.Random, steering: Steering, rules: list[Rule]
) -> dict[BlockKey, tuple[int, int, bool]]:
    """Blocks of ports that the rules grant, some of them about ports of endpoints and of the kernel's connections."""
    blocks: dict[BlockKey, tuple[int, int, bool]] = {}
    for rule in (r for r in rules if r.action == "steer"):
        f = flow_of_rule(rng, rule)
        port = rng.choice((f.local_port, *KERNEL_PORTS))
        key = (rng.choice((TCP, TCP, UDP)), f.local, port - port % BLOCK)
        if key in blocks or key[2] == 0 or f.local.version == 6:
            continue
        owner, drain = int(rng.random() < 0.3), rng.random() < 0.5
        with contextlib.suppress(GrantError):
            entry = steering.add_endpoint(key[0], str(f.local), key[2], owner=owner, drain=drain, block=True)
            blocks[key] = (entry, owner, drain)
    return blocks


def _about_blocks(rng: random.Random, blocks: Iterable[BlockKey]) -> Iterator[EndpointKey]:
    """Sockets inside blocks, at their edges, and just outside."""
    for proto, local, first in blocks:
        for port in (first - 1, first, first + rng.randrange(BLOCK), first + BLOCK - 1, first + BLOCK):
            if port < 65536:
                yield (proto, local, port, None, None)


def _add(steering: Steering, key: EndpointKey, owner: int, drain: bool) -> int:
    proto, local, port, remote, remote_port = key
    assert local is None or local.version == 4
    assert remote is None or remote.version == 4
    return steering.add_endpoint(proto, local, port, remote, remote_port, owner=owner, drain=drain)


@dataclass
class Case:
    """A policy in force, and what the model says about it."""

    steering: Steering
    model: Model
    world: World
    meta: bytes  # what the model is told to be in front of each packet
    rules: Counter[int] = field(default_factory=Counter)
    entries: Counter[int] = field(default_factory=Counter)

    def check(self, rng: random.Random, seed: int) -> str:
        """Draws a frame, and compares what program and model say. Returns the reason."""
        return self.check_frame(draw_frame(rng, self.world), rng.choice((0, 0, 1, 2, 3)), f"seed {seed}")

    def check_frame(self, frame: bytes, queue: int, about: str) -> str:
        want = self.model.verdict(frame, queue, self.meta)
        got = self.steering.test_run(frame, rx_queue=queue, ifindex=self.steering.ifindex)
        where = f"{about}, queue {queue}, frame {frame.hex()}, rules {self.model.rules}"
        assert (got.action, got.reason) == (want.verdict, want.reason), where
        assert got.data == frame, where
        if want.entry is not None and want.reason != "steered_bare":
            assert got.verdict is not None, where
            assert (got.verdict.entry, got.verdict.rule) == (want.entry, want.rule), where
        else:
            assert got.verdict is None, where
        if want.rule is not None:
            self.rules[want.rule] += 1
        if want.entry is not None:
            self.entries[want.entry] += 1
        return want.reason

    def check_counters(self) -> None:
        """Every rule and every entry counted exactly its packets."""
        counts = [c.packets for c in self.steering.rules().values()]
        assert counts == [self.rules[i] for i in range(len(counts))]
        assert {n: c.packets for n, (_, c) in self.steering.entries().items()} == {
            n: self.entries[n] for n in self.steering.entries()
        }
