# SPDX-License-Identifier: Apache-2.0
"""What lies in the maps of the steering program: their layouts, as in bpf/steer.h, and their sizes.

What lives here: packing to bytes and back. What does not: when something is written (`steering.py`), and the system
calls (`libbpf.py`).
"""

from __future__ import annotations

import hashlib
import ipaddress
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from bypass import libbpf
from bypass.bpf import build
from bypass.rules import CompiledRules, protocol_name

MAX_QUEUES = 256
"""Slots of one owner in the socket map; the steering program has the same number (bpf/steer.h)."""
MAX_ENTRIES = 65536
"""Live endpoints of an interface."""
BLOCK = 256
"""Local ports of a block; each block begins at a multiple of it."""
MAX_LOCALS = 4096
"""Local addresses of each family, and joined group MAC addresses."""

REASONS = build.reasons()
"""Why packets were steered, passed or dropped, by number."""
GUARD_KINDS = ("silenced", "kernel_connection", "draining", "other")
"""What the reset guard saw: resets dropped; passed because a connection of the kernel's sent them, because the kernel
holds a draining connection, because no live endpoint is concerned."""


_KEY4, _KEY6 = struct.Struct("=4s4s2s2sHBB"), struct.Struct("=16s16s2s2sHBB")  # struct rule_key
_RULE = struct.Struct("=2I")  # struct rule_value
_ENDPOINT_KEY, _ENDPOINT = struct.Struct("=4s4s2s2sI"), struct.Struct("=4I")
CONFIG = struct.Struct("=6sH")
COUNT = struct.Struct("=2Q")
_PORT, U32, ZERO = struct.Struct(">H"), struct.Struct("=I"), bytes(4)
_ACTIONS = {"steer": 0, "pass": 1, "drop": 2}
_DRAIN = 1
NONE: Mapping[str, int] = {}
_EXACT, _LOCAL, _ANY, _BLOCK = 1, 2, 4, 8  # KIND_* of bpf/steer.h
_KEY_BLOCK = 1 << 8  # KEY_BLOCK


class Count(NamedTuple):
    """Packets, and bytes of their frames."""

    packets: int
    bytes: int

    def __add__(self, other: object) -> Count:
        if not isinstance(other, Count):
            return NotImplemented
        return Count(self.packets + other.packets, self.bytes + other.bytes)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A live entry: flows that a socket owns at this moment.

    Attributes:
        entry: its number, as verdicts carry it. Numbers are used again, latest possible.
        proto: 6 (TCP) or 17 (UDP).
        laddr: None: any local address.
        lport: of a block the first of its ports.
        raddr, rport: both None: any peer.
        owner: whose AF_XDP sockets get it.
        drain: connections that the kernel still holds stay with the kernel.
        block: BLOCK local ports, for whoever connects from them.
    """

    entry: int
    proto: int
    laddr: ipaddress.IPv4Address | None
    lport: int
    raddr: ipaddress.IPv4Address | None
    rport: int | None
    owner: int
    drain: bool
    block: bool = False

    @property
    def last_port(self) -> int:
        """The last of its local ports; `lport` itself unless it is a block."""
        return self.lport + BLOCK - 1 if self.block else self.lport

    def __str__(self) -> str:
        peer = "" if self.raddr is None else f" from {self.raddr}:{self.rport}"
        ports = f"{self.lport}-{self.last_port}" if self.block else f"{self.lport}"
        return f"{protocol_name(self.proto)} {self.laddr or '*'}:{ports}{peer}"


def endpoint_key(e: Endpoint) -> bytes:
    return _ENDPOINT_KEY.pack(
        e.laddr.packed if e.laddr else ZERO,
        e.raddr.packed if e.raddr else ZERO,
        _PORT.pack(e.lport),
        _PORT.pack(e.rport or 0),
        e.proto | (_KEY_BLOCK if e.block else 0),
    )


def endpoint_value(e: Endpoint) -> bytes:
    return _ENDPOINT.pack(e.entry, e.owner, _DRAIN if e.drain else 0, 0)


def endpoint_kind(e: Endpoint) -> int:
    return _EXACT if e.raddr else _BLOCK if e.block else _LOCAL if e.laddr else _ANY


def endpoint_of(key: bytes, value: bytes) -> Endpoint:
    """The opposite."""
    local, remote, lport, rport, rest = _ENDPOINT_KEY.unpack(key)
    entry, owner, flags, _ = _ENDPOINT.unpack(value)
    return Endpoint(
        entry,
        rest & 0xFF,
        ipaddress.IPv4Address(local) if local != ZERO else None,
        _PORT.unpack(lport)[0],
        ipaddress.IPv4Address(remote) if remote != ZERO else None,
        _PORT.unpack(rport)[0] if remote != ZERO else None,
        owner,
        bool(flags & _DRAIN),
        bool(rest & _KEY_BLOCK),
    )


def _interface_maps(owners: int) -> Iterator[tuple[int, str, int, int, int]]:
    """Kind, name, sizes of key and value, entries."""
    room = 2 * MAX_LOCALS  # new ones are added before old ones go
    yield (libbpf.MAP_HASH, "endpoints", _ENDPOINT_KEY.size, _ENDPOINT.size, MAX_ENTRIES)
    yield (libbpf.MAP_ARRAY, "config", 4, CONFIG.size, 1)
    yield (libbpf.MAP_HASH, "locals4", 4, 1, room)
    yield (libbpf.MAP_HASH, "locals6", 16, 1, room)
    yield (libbpf.MAP_HASH, "groups", 8, 1, room)
    yield (libbpf.MAP_PERCPU_ARRAY, "entry_count", 4, COUNT.size, MAX_ENTRIES)
    yield (libbpf.MAP_PERCPU_ARRAY, "reason_count", 4, COUNT.size, len(REASONS))
    yield (libbpf.MAP_PERCPU_ARRAY, "guard_count", 4, COUNT.size, len(GUARD_KINDS))
    yield (libbpf.MAP_XSKMAP, "xsks", 4, 4, owners * MAX_QUEUES)


def interface_maps(owners: int, fds: Mapping[str, int] = NONE) -> Iterator[libbpf.Map]:
    """The maps of an interface; fds: those that there are already, by name."""
    for kind, name, key_size, value_size, entries in _interface_maps(owners):
        yield libbpf.Map(kind, name, key_size, value_size, entries, fds.get(name, -1))


def layout() -> str:
    """Changes with anything that is in the maps of an interface."""
    return hashlib.sha256(repr((list(_interface_maps(1)), REASONS)).encode()).hexdigest()[:16]


def policy_maps(policy: CompiledRules) -> Iterator[tuple[str, libbpf.Map]]:
    """The maps of a policy, filled."""
    key = _key_of(policy)
    keys, values = packed_rules(policy)
    rules = libbpf.Map(libbpf.MAP_HASH, "rules", key.size, _RULE.size, max(1, len(policy)))
    yield "rules", rules
    rules.put_all(keys, values)
    highest = [m.max_rank for m in policy.masks]
    ranks = libbpf.Map(libbpf.MAP_ARRAY, "ranks", 4, 64, 1)
    yield "ranks", ranks
    ranks.put(ZERO, struct.pack("=16I", *highest, *[0] * (16 - len(highest))))
    size = max(1, len(policy.rules))
    yield "rule_count", libbpf.Map(libbpf.MAP_PERCPU_ARRAY, "rule_count", 4, COUNT.size, size)


def _key_of(policy: CompiledRules) -> struct.Struct:
    return _KEY6 if policy.key_v6 else _KEY4


def packed_masks(policy: CompiledRules) -> Iterator[tuple[bytes, int]]:
    """For each mask the bits that its keys compare, laid out as they are, and the highest rank under it."""
    width = 16 if policy.key_v6 else 4
    for mask in policy.masks:
        local, remote = (
            ((1 << width * 8) - (1 << width * 8 - length)).to_bytes(width, "big")
            for length in (mask.local_plen, mask.remote_plen)
        )
        ports = (mask.local_port_mask.to_bytes(2, "big"), mask.remote_port_mask.to_bytes(2, "big"))
        rest = (0xFFF if mask.vlan else 0, 0xFF if mask.proto else 0, 0xF0 if mask.family else 0)
        yield _key_of(policy).pack(local, remote, *ports, *rest), mask.max_rank


def packed_rules(policy: CompiledRules) -> tuple[bytes, bytes]:
    """Keys and values of the rule map."""
    key, width = _key_of(policy), 16 if policy.key_v6 else 4
    keys, values = bytearray(), bytearray()
    for entry in policy.entries():
        k = entry.key
        keys += key.pack(
            k.local.to_bytes(width, "big"),
            k.remote.to_bytes(width, "big"),
            k.local_port.to_bytes(2, "big"),
            k.remote_port.to_bytes(2, "big"),
            k.vlan,
            k.proto,
            k.family << 4 | entry.mask,
        )
        values += _RULE.pack(entry.rank, entry.rule << 2 | _ACTIONS[entry.action])
    return bytes(keys), bytes(values)


def counts_of(m: libbpf.Map) -> Iterator[Count]:
    """The values of a per-CPU array, CPUs added up."""
    words = memoryview(m.all_values()).cast("Q")
    step = 2 * libbpf.possible_cpus()
    packets, sizes = (zip(*(words[i::step] for i in range(first, step, 2)), strict=True) for first in (0, 1))
    return map(Count, map(sum, packets), map(sum, sizes))


def count_of(m: libbpf.Map, index: int) -> Count:
    words = memoryview(m.get(U32.pack(index)) or b"").cast("Q")
    return Count(sum(words[::2]), sum(words[1::2]))


def set_keys(m: libbpf.Map, wanted: set[bytes]) -> None:
    """Makes `wanted` the keys of a set-like map, adding before removing."""
    present = set(m.keys())
    for key in wanted - present:
        m.put(key, b"\1")
    for key in present - wanted:
        m.delete(key)
