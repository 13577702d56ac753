# SPDX-License-Identifier: Apache-2.0
"""What the steering program has to decide, as plain Python: the oracle of its tests.

It reads the rules themselves, one after the other, and knows neither masks nor keys nor ranks as numbers, so that
their compilation is tested along with the program. The names of reasons are those of bypass/bpf/reasons.h in lower
case. Slow on purpose: nothing here is shared with what it judges but the rule's fields.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bypass.rules import Address, PortRange, Rule

TCP, UDP, ICMP = 6, 17, 1
TCP_TIME_WAIT, TCP_LISTEN = 6, 10
QUEUES = 256
METADATA_ROOM = 252
VERDICT_BYTES = 16

VERDICTS = {
    "malformed": "pass",
    "other_mac": "pass",
    "group": "pass",
    "vlan": "pass",
    "not_ip": "pass",
    "ipv6": "pass",
    "not_local": "pass",
    "too_deep": "pass",
    "fragment": "pass",
    "no_rule": "pass",
    "rule_pass": "pass",
    "rule_drop": "drop",
    "no_endpoint": "pass",
    "draining": "pass",
    "tcp_fragment": "drop",
    "no_socket": "pass",
    "tcp_no_socket": "drop",
    "steered": "redirect",
    "steered_icmp": "redirect",
    "steered_bare": "redirect",
}
"""Reason -> verdict, in the order of the counters."""


@dataclass(frozen=True)
class Verdict:
    """What happens to a packet.

    Attributes:
        reason: a key of VERDICTS.
        rule: index of the rule that counts the packet; None: none does.
        entry: number of the endpoint that it is handed to; None: it is handed to none.
        owner: of that endpoint.
    """

    reason: str
    rule: int | None = None
    entry: int | None = None
    owner: int | None = None

    @property
    def verdict(self) -> str:
        return VERDICTS[self.reason]


class Flow(NamedTuple):
    """What rules and endpoints look at. Ports 0: the packet has none."""

    proto: int
    local: Address
    local_port: int
    remote: Address
    remote_port: int


class Endpoint(NamedTuple):
    entry: int
    owner: int
    drain: bool


EndpointKey = tuple[int, Address | None, int, Address | None, int | None]
KernelKey = tuple[Address, int, Address, int]
BlockKey = tuple[int, Address, int]


class _Decided(Exception):
    def __init__(self, reason: str, rule: int | None = None) -> None:
        self.verdict = Verdict(reason, rule)


@dataclass
class _Frame:
    """Of the packet under judgement, as far as it was parsed."""

    data: bytes
    rx_queue: int
    meta: bytes
    group: bool = False
    vlan: int | None = None  # of the outermost tag; None: untagged


class Model:
    """The steering program's decision.

    Args:
        rules: of the policy.
        mac: of the interface, 6 bytes.
        locals_: addresses of this host.
        groups: group MAC addresses that the interface has joined.
        endpoints: (proto, local, local port, remote, remote port) -> Endpoint or an equal tuple.
        blocks: (proto, local, first local port) -> the same, for 256 ports.
        sockets: (owner, receive queue) pairs that have an AF_XDP socket.
        kernel: (local, local port, remote, remote port) -> state number of the kernel's TCP socket.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        *,
        mac: bytes,
        locals_: Collection[Address],
        groups: Collection[bytes] = (),
        endpoints: Mapping[EndpointKey, tuple[int, int, bool]] | None = None,
        blocks: Mapping[BlockKey, tuple[int, int, bool]] | None = None,
        sockets: Collection[tuple[int, int]] = (),
        kernel: Mapping[KernelKey, int] | None = None,
    ) -> None:
        self.rules = list(rules)
        self.mac = mac
        self.locals = set(locals_)
        self.groups = set(groups)
        self.endpoints = dict(endpoints or {})
        self.blocks = dict(blocks or {})
        self.sockets = set(sockets)
        self.kernel = dict(kernel or {})

    def verdict(self, frame: bytes, rx_queue: int = 0, meta: bytes = b"") -> Verdict:
        """Judges one frame that came by `rx_queue`, with another program's metadata in front of it."""
        try:
            return self._ethernet(_Frame(frame, rx_queue, meta))
        except _Decided as decided:
            return decided.verdict

    # ---- Parsing

    def _ethernet(self, f: _Frame) -> Verdict:
        if len(f.data) < 14:
            raise _Decided("malformed")
        destination = f.data[:6]
        f.group = bool(destination[0] & 1)
        if f.group and destination not in self.groups:
            raise _Decided("group")
        if not f.group and destination != self.mac:
            raise _Decided("other_mac")
        (ethertype,) = struct.unpack_from("!H", f.data, 12)
        at = 14
        # Only rules that name a VLAN, and drop rules, can act on a tagged frame.
        tags_read = 1 if any(r.vlan is not None or r.action == "drop" for r in self.rules) else 0
        for _ in range(tags_read):
            if ethertype in (0x8100, 0x88A8):
                if len(f.data) < at + 4:
                    raise _Decided("malformed")
                tci, ethertype = struct.unpack_from("!HH", f.data, at)
                f.vlan = tci & 0xFFF
                at += 4
        if ethertype in (0x8100, 0x88A8):
            raise _Decided("vlan")
        if ethertype == 0x0800:
            return self._ipv4(f, f.data[at:])
        if ethertype == 0x86DD:
            return self._ipv6(f, f.data[at:])
        raise _Decided("not_ip")

    def _ipv4(self, f: _Frame, ip: bytes) -> Verdict:
        if len(ip) < 20 or ip[0] >> 4 != 4:
            raise _Decided("malformed")
        header = (ip[0] & 15) * 4
        total, _, fragment = struct.unpack_from("!HHH", ip, 2)
        if header < 20 or not header <= total <= len(ip):
            raise _Decided("malformed")
        proto = ip[9]
        remote, local = ipaddress.IPv4Address(ip[12:16]), ipaddress.IPv4Address(ip[16:20])
        if local not in self.locals:
            raise _Decided("not_local")
        if fragment & 0x1FFF:
            self._drop_or(f, Flow(proto, local, 0, remote, 0), "fragment")
        more = bool(fragment & 0x2000)
        payload = ip[header:total]
        flow = self._transport(payload, proto, local, remote, more)
        if proto == ICMP and not more:
            quoted = self._quoted(payload, local)
            if quoted is not None:
                rule = self._best(f, quoted)
                if rule is not None:
                    return self._act(f, rule, quoted, payload, more, is_icmp=True)
        return self._ruled(f, flow, payload, more)

    def _ipv6(self, f: _Frame, ip: bytes) -> Verdict:
        # Only rules about IPv6 addresses, and drop rules without addresses, can act on IPv6.
        if not any(_is_v6(r) or (r.action == "drop" and r.local is r.remote is None) for r in self.rules):
            raise _Decided("ipv6")
        if len(ip) < 40 or ip[0] >> 4 != 6:
            raise _Decided("malformed")
        end = 40 + struct.unpack_from("!H", ip, 4)[0]
        if end > len(ip):
            raise _Decided("malformed")
        remote, local = ipaddress.IPv6Address(ip[8:24]), ipaddress.IPv6Address(ip[24:40])
        if local not in self.locals:
            raise _Decided("not_local")
        proto, at, more, walked = ip[6], 40, False, 0
        while proto in (0, 43, 44, 51, 60):
            if walked == 6:
                self._drop_or(f, Flow(proto, local, 0, remote, 0), "too_deep")
            if at + 8 > end:
                raise _Decided("malformed")
            size = {44: 8, 51: (ip[at + 1] + 2) * 4}.get(proto, (ip[at + 1] + 1) * 8)
            if at + size > end:
                raise _Decided("malformed")
            if proto == 44:
                (fragment,) = struct.unpack_from("!H", ip, at + 2)
                if fragment >> 3:
                    self._drop_or(f, Flow(ip[at], local, 0, remote, 0), "fragment")
                more = more or bool(fragment & 1)
            proto, at, walked = ip[at], at + size, walked + 1
        payload = ip[at:end]
        return self._ruled(f, self._transport(payload, proto, local, remote, more), payload, more)

    def _transport(self, payload: bytes, proto: int, local: Address, remote: Address, more: bool) -> Flow:
        if proto not in (TCP, UDP):
            return Flow(proto, local, 0, remote, 0)
        if len(payload) < (20 if proto == TCP and not more else 8):
            raise _Decided("malformed")
        if proto == TCP and not more:
            header = (payload[12] >> 4) * 4
            if not 20 <= header <= len(payload):
                raise _Decided("malformed")
        remote_port, local_port = struct.unpack_from("!HH", payload)
        return Flow(proto, local, local_port, remote, remote_port)

    @staticmethod
    def _quoted(icmp: bytes, local: Address) -> Flow | None:
        """The flow that an ICMP error is about, seen from this host: the quoted packet's sender."""
        if len(icmp) < 8 or icmp[0] not in (3, 4, 11, 12):
            return None
        quote = icmp[8:]
        if len(quote) < 20 or quote[0] >> 4 != 4:
            return None
        header = (quote[0] & 15) * 4
        (fragment,) = struct.unpack_from("!H", quote, 6)
        if header < 20 or len(quote) < header + 8 or fragment & 0x1FFF or quote[9] not in (TCP, UDP):
            return None
        source, destination = ipaddress.IPv4Address(quote[12:16]), ipaddress.IPv4Address(quote[16:20])
        if source != local:
            return None
        source_port, destination_port = struct.unpack_from("!HH", quote, header)
        return Flow(quote[9], source, source_port, destination, destination_port)

    # ---- Rules

    def _best(self, f: _Frame, flow: Flow) -> Rule | None:
        """The rule that decides: the narrowest of those that match; of equals the first in the file."""
        best: Rule | None = None
        for rule in self.rules:
            if matches(rule, flow, f.vlan) and (best is None or breadth(rule) < breadth(best)):
                best = rule
        return best

    def _drop_or(self, f: _Frame, flow: Flow, reason: str) -> None:
        rule = self._best(f, flow)
        if rule is not None and rule.action == "drop":
            raise _Decided("rule_drop", rule.index)
        raise _Decided(reason)

    def _ruled(self, f: _Frame, flow: Flow, payload: bytes, more: bool) -> Verdict:
        rule = self._best(f, flow)
        if rule is None:
            raise _Decided("no_rule")
        return self._act(f, rule, flow, payload, more, is_icmp=False)

    def _act(
        self, f: _Frame, rule: Rule, flow: Flow, payload: bytes, more: bool, *, is_icmp: bool
    ) -> Verdict:
        if rule.action != "steer":
            raise _Decided("rule_" + rule.action, rule.index)
        if flow.local.version == 6 or flow.proto not in (TCP, UDP):
            raise _Decided("no_endpoint", rule.index)
        if f.vlan is not None:
            raise _Decided("vlan", rule.index)
        if f.group and (is_icmp or flow.proto == TCP):
            raise _Decided("group", rule.index)
        endpoint = self._endpoint(flow)
        if endpoint is None:
            raise _Decided("no_endpoint", rule.index)
        syn = not is_icmp and not more and flow.proto == TCP and payload[13] & 0x12 == 0x02
        if endpoint.drain and flow.proto == TCP and self._kernel_has(flow, syn):
            raise _Decided("draining", rule.index)
        if more and not is_icmp:
            raise _Decided("tcp_fragment" if flow.proto == TCP else "fragment", rule.index)
        if f.rx_queue >= QUEUES or (endpoint.owner, f.rx_queue) not in self.sockets:
            lost_tcp = flow.proto == TCP and not is_icmp
            raise _Decided("tcp_no_socket" if lost_tcp else "no_socket", rule.index)
        reason = "steered_icmp" if is_icmp else "steered"
        if len(f.meta) + VERDICT_BYTES > METADATA_ROOM:
            reason = "steered_bare"
        return Verdict(reason, rule.index, endpoint.entry, endpoint.owner)

    def _endpoint(self, flow: Flow) -> Endpoint | None:
        proto, local, port = flow[:3]
        connected = self.endpoints.get((proto, local, port, flow.remote, flow.remote_port))
        if connected is not None:
            return Endpoint(*connected)
        for (p, a, first), block in self.blocks.items():
            if (p, a) == (proto, local) and first <= port <= first + 255:
                return Endpoint(*block)
        keys: list[EndpointKey] = [(proto, local, port, None, None), (proto, None, port, None, None)]
        return next((Endpoint(*self.endpoints[k]) for k in keys if k in self.endpoints), None)

    def _kernel_has(self, flow: Flow, syn: bool) -> bool:
        state = self.kernel.get((flow.local, flow.local_port, flow.remote, flow.remote_port))
        return state is not None and state != TCP_LISTEN and not (state == TCP_TIME_WAIT and syn)


def _is_v6(rule: Rule) -> bool:
    return any(net is not None and net.version == 6 for net in (rule.local, rule.remote))


def matches(rule: Rule, flow: Flow, vlan: int | None) -> bool:
    """The rule names nothing that the packet contradicts."""
    return (
        rule.proto in (None, flow.proto)
        and (rule.vlan is None or rule.vlan == vlan)
        and (rule.local is None or flow.local in rule.local)
        and (rule.remote is None or flow.remote in rule.remote)
        and _port_matches(rule.local_port, flow.local_port)
        and _port_matches(rule.remote_port, flow.remote_port)
    )


def _port_matches(ports: PortRange | None, port: int) -> bool:
    return ports is None or ports.first <= port <= ports.last


def breadth(rule: Rule) -> tuple[int, ...]:
    """How much a rule matches, in the order of precedence; the smallest wins. What is absent is the widest."""

    def ports(r: PortRange | None) -> int:
        return 65536 if r is None else r.last - r.first + 1

    return (
        ports(rule.local_port),
        999 if rule.local is None else -rule.local.prefixlen,
        999 if rule.remote is None else -rule.remote.prefixlen,
        ports(rule.remote_port),
        int(rule.vlan is None),
        int(rule.proto is None),
    )
