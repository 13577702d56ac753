# SPDX-License-Identifier: Apache-2.0
"""Steering without XDP: the classifier (classify.h) of a port that DPDK drives, as `bypass.steering.Steering` is to its
users.

What lives here: the classifier's memory, and what is written into it. What does not: the decision (classify.c), who
asks it for each packet (the filter netdev, bypass-fwd), and what both kinds of steering share (`bypass.endpoints`).

The memory is a sealed memfd: bypass-fwd maps it to classify, and the broker's successor to go on.

Draining is different here: the XDP program asks the kernel for each packet whether it holds the connection; here the
kernel's connections are listed (sock_diag) and held in memory, anew whenever set_drain() is called.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from bypass._core import ffi, lib
from bypass.bpf import build
from bypass.core import check
from bypass.endpoints import Endpoints, RuleCounts, ipv4, local_keys
from bypass.errors import SteeringError
from bypass.netlink import NETLINK_SOCK_DIAG, NetlinkSocket, TcpFlow, tcp_flows
from bypass.policy import Policy
from bypass.rules import MAX_ENTRIES as MAX_KEYS
from bypass.rules import TCP
from bypass.steer_maps import (
    GUARD_KINDS,
    MAX_ENTRIES,
    MAX_LOCALS,
    REASONS,
    Count,
    Endpoint,
    endpoint_key,
    endpoint_of,
    packed_masks,
    packed_rules,
)
from bypass.steering_api import Address, Attached, Guard, SteerResult, Verdict

__all__ = ["CLASSIFIER_REASONS", "SoftSteering"]

CLASSIFIER_REASONS = REASONS + build.reasons(macro="CLASSIFY_REASONS")
"""Why packets were steered, passed or dropped, by number."""
MEMORY = "classifier"
"""Name of the one descriptor in `map_fds`."""
MAX_HELD = 1 << 16
"""Connections of the kernel on ports that drain, at once."""
_ACTIONS = {lib.CLASSIFY_PASS: "pass", lib.CLASSIFY_DROP: "drop", lib.CLASSIFY_STEER: "redirect"}
_SETS = {4: lib.CLASSIFY_LOCALS4, 6: lib.CLASSIFY_LOCALS6}

KernelFlows = Callable[[int], Iterable[TcpFlow]]
"""The kernel's TCP connections on a local port; 0: on all."""


def kernel_flows(port: int) -> Iterator[TcpFlow]:
    """In the network namespace of the calling thread."""
    with NetlinkSocket(NETLINK_SOCK_DIAG) as diag:
        yield from tcp_flows(diag, port)


class _Memory:
    """A range for a classifier, mapped."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, size)
        self._held = ffi.from_buffer(self._map)
        self.at, self.size = ffi.cast("void *", self._held), size

    @classmethod
    def make(cls, size: int) -> _Memory:
        """New memory, that nobody can make smaller under a reader's hands. What is not touched costs nothing."""
        fd = os.memfd_create("bypass-classifier", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return cls(fd, size)
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        ffi.release(self._held)
        self._map.close()
        os.close(self.fd)


class SoftSteering:
    """The classifier of one port: what `bypass.steering.Steering` is on an interface with XDP.

    Until `set_locals` has named addresses and `set_mac` the port's, nothing is taken. Close what classifies on it (the
    filter netdev) first.

    Args:
        policy: what may be taken.
        ifname: the interface by which the kernel knows the port.
        owners: how many sets of queues there are.
        left: what another process has left, to go on with: live endpoints stay live, and the policy is exchanged as by
            swap(). Its descriptors are the steering's from here on.
        kernel_flows: the kernel's TCP connections; the default asks the network namespace of the calling thread.

    Attributes:
        classifier: `struct classifier *` on the memory, for C in this process.
        guard: none is needed.

    Raises:
        SteeringError: what `left` is is no classifier's memory, or another version's.
    """

    mode = "soft"

    def __init__(
        self,
        policy: Policy,
        ifname: str,
        *,
        owners: int = 1,
        left: Attached | None = None,
        kernel_flows: KernelFlows = kernel_flows,
    ) -> None:
        if not 1 <= owners <= lib.CLASSIFY_OWNERS:
            raise SteeringError(f"{ifname}: {owners} owners; the classifier knows {lib.CLASSIFY_OWNERS}")
        self.ifname, self.owners = ifname, owners
        self.guard = Guard(False, "none is needed: the kernel sees no packet of a live connection")
        self.classifier: Any = ffi.new("struct classifier *")
        self._kernel_flows = kernel_flows
        self._policy = policy
        self._previous: Policy | None = None  # readers may have counted for it until just now
        self._counts = RuleCounts()
        self._endpoints = Endpoints(ifname, owners)
        # By entry: the kernel's connections that it leaves alone, by key, with flags.
        self._held: dict[int, dict[bytes, int]] = {}
        # What was written, so that the memory need not be searched for it: flows that are held, members by set.
        self._told: dict[bytes, int] = {}
        self._members: dict[int, set[bytes]] = {}
        self._packed: tuple[Policy, Any, list[Any]] | None = None
        self._memory: _Memory | None = self._attached(left.maps) if left else self._made()
        try:
            self._put_rules(policy)
            if left:
                self._go_on()
        except BaseException:
            self.close()
            raise

    def _made(self) -> _Memory:
        config = ffi.new("struct classify_config *")
        config.abi, config.keys, config.endpoints = lib.CLASSIFY_ABI, MAX_KEYS, MAX_ENTRIES
        config.held, config.members = MAX_HELD, 2 * MAX_LOCALS  # new members are added before old ones go
        config.seed = int.from_bytes(os.urandom(8), "little")
        memory = _Memory.make(lib.classify_mem_size(config))
        try:
            check(lib.classify_init(self.classifier, memory.at, memory.size, config))
        except BaseException:
            memory.close()
            raise
        return memory

    def _attached(self, maps: dict[str, int]) -> _Memory:
        fd = maps[MEMORY]
        try:
            size = os.fstat(fd).st_size
            if size == 0:  # an error of its own for mmap()
                raise SteeringError(f"{self.ifname}: the memory is no classifier's: it is empty")
            memory = _Memory(fd, size)
        except BaseException:
            os.close(fd)
            raise
        if lib.classify_attach(self.classifier, memory.at, memory.size) < 0:
            memory.close()
            raise SteeringError(f"{self.ifname}: the memory is no classifier's, or one of another version")
        return memory

    def _go_on(self) -> None:
        """With endpoints that are live."""
        at, key = ffi.new("uint32_t *"), ffi.new("struct classify_key *")
        value, flags, member = (
            ffi.new("struct classify_endpoint *"),
            ffi.new("uint32_t *"),
            ffi.new("uint8_t[16]"),
        )
        found = []
        while lib.classify_endpoint_next(self.classifier, at, key, value):
            found.append(_endpoint_of(key, value))
        self._endpoints.go_on(found)
        at[0] = 0
        while lib.classify_held_next(self.classifier, at, key, flags):
            self._told[bytes(ffi.buffer(key))] = flags[0]
        for number in range(lib.CLASSIFY_SETS):
            at[0], self._members[number] = 0, set()
            while lib.classify_set_next(self.classifier, number, at, member):
                self._members[number].add(bytes(ffi.buffer(member)))
        drain = [endpoint for endpoint in found if endpoint.drain]
        for endpoint in drain:
            self._held[endpoint.entry] = self._flows(endpoint)
        self._tell_held()  # those of all at once: what one entry holds stays held meanwhile
        for endpoint in drain:
            self._set_flags(endpoint)  # who made it may have been killed before it was settled

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the memory, which ends when all processes have. Again: nothing."""
        memory, self._memory = self._memory, None
        if memory is not None:
            self.classifier = ffi.NULL
            memory.close()

    @property
    def map_fds(self) -> dict[str, int]:
        """The memory, for a successor's `left`."""
        return {MEMORY: self._open().fd}

    @property
    def link_fds(self) -> dict[str, int]:
        """Nothing is attached to the kernel."""
        return {}

    @property
    def endpoints_fd(self) -> int:
        """The memory, for bypass-fwd, which classifies on it, and removes live entries when this process is gone."""
        return self._open().fd

    # ---- the policy
    @property
    def policy(self) -> Policy:
        """The rules in force."""
        return self._policy

    def prepare(self, policy: Policy) -> None:
        """Does the slow part of `swap` ahead, also in another thread."""
        self._packed = (policy, *_packed(policy))

    def swap(self, policy: Policy) -> list[Endpoint]:
        """As `Steering.swap`. SteeringError: it does not fit; the old policy stays in force."""
        old, previous = self._policy, self._previous
        late = self._rule_counts(previous, 1) if previous else []
        self._put_rules(policy)
        if previous:
            self._counts.ended(previous, late)
            self._counts.keep(old)
        self._counts.keep(policy)
        self._previous, self._policy = old, policy
        return self._endpoints.ungranted(policy)

    def _put_rules(self, policy: Policy) -> None:
        self._open()
        prepared, self._packed = self._packed, None
        rules, _ = prepared[1:] if prepared and prepared[0] is policy else _packed(policy)
        result = lib.classify_rules_set(self.classifier, rules)
        if result < 0:
            raise SteeringError(f"{self.ifname}: {policy.path}: the classifier: {os.strerror(-result)}")

    def _rule_counts(self, policy: Policy, which: int) -> list[Count]:
        """Of the policy in force (0), or of the one before it (1)."""
        n = len(policy.flows)
        out = ffi.new("struct classify_count[]", max(1, n))
        lib.classify_rule_counts(self.classifier, which, out, n)
        words = memoryview(ffi.buffer(out)).cast("Q")
        return [Count(words[2 * i], words[2 * i + 1]) for i in range(n)]

    # ---- live endpoints
    def add_endpoint(
        self,
        proto: int,
        laddr: str | Address | None,
        lport: int,
        raddr: str | Address | None = None,
        rport: int | None = None,
        *,
        owner: int = 0,
        drain: bool = False,
        block: bool = False,
    ) -> int:
        """As `Steering.add_endpoint`. While the kernel is asked for its connections (drain), SYNs are dropped."""
        self._open()
        endpoint = self._endpoints.add(
            self.policy, self._put, proto, laddr, lport, raddr, rport, owner=owner, drain=drain, block=block
        )
        if drain:
            try:
                self._hold(endpoint)
                self._set_flags(endpoint)
            except BaseException:
                self.remove_endpoint(endpoint.entry)
                raise
        return endpoint.entry

    def _put(self, endpoint: Endpoint) -> None:
        value = ffi.new("struct classify_endpoint *")
        value.entry, value.owner = endpoint.entry, endpoint.owner
        value.flags = lib.CLASSIFY_DRAIN | lib.CLASSIFY_UNSETTLED if endpoint.drain else 0
        check(lib.classify_endpoint_add(self.classifier, _key(endpoint_key(endpoint)), value))

    def _set_flags(self, endpoint: Endpoint) -> None:
        flags = lib.CLASSIFY_DRAIN if endpoint.drain else 0
        result = lib.classify_endpoint_set(self.classifier, _key(endpoint_key(endpoint)), flags)
        if result != -errno.ENOENT:  # bypass-fwd has just deleted it, and says so
            check(result)

    def remove_endpoint(self, entry: int) -> None:
        """Ends it: its packets are the kernel's from now on. An unknown number: nothing."""
        endpoint = self._endpoints.remove(entry)
        if endpoint is not None:
            self._open()
            result = lib.classify_endpoint_del(self.classifier, _key(endpoint_key(endpoint)), True)
            if result != -errno.ENOENT:  # as above
                check(result)
            self._let_go(entry)

    def set_drain(self, entry: int, drain: bool) -> None:
        """Whether connections that the kernel holds stay with it. KeyError: no such entry.

        With True those that it holds now; called again, those that it holds then.
        """
        endpoint = replace(self._endpoints[entry], drain=drain)
        if drain:
            self._hold(endpoint)
        self._set_flags(endpoint)
        self._endpoints.change(endpoint)
        if not drain:
            self._let_go(entry)

    def _hold(self, endpoint: Endpoint) -> None:
        """Its packets of connections that the kernel has now are the kernel's."""
        self._held[endpoint.entry] = self._flows(endpoint)
        self._tell_held()

    def _flows(self, endpoint: Endpoint) -> dict[bytes, int]:
        """Connections that the kernel has on its ports."""
        if endpoint.proto != TCP:
            return {}
        return {
            endpoint_key(Endpoint(0, TCP, f.local, f.local_port, f.remote, f.remote_port, 0, False)): (
                lib.CLASSIFY_TIME_WAIT if f.waits else 0
            )
            for f in self._kernel_flows(0 if endpoint.block else endpoint.lport)
            if f.local.version == 4
            and f.remote.version == 4
            and endpoint.lport <= f.local_port <= endpoint.last_port
            and endpoint.laddr in (None, f.local)
        }

    def _let_go(self, entry: int) -> None:
        if self._held.pop(entry, None) is not None:
            self._tell_held()

    def _tell_held(self) -> None:
        """Makes the held flows of all entries those of the memory."""
        wanted: dict[bytes, int] = {}
        for flows in self._held.values():
            wanted |= flows
        if len(wanted) > MAX_HELD:
            raise SteeringError(
                f"{self.ifname}: the kernel has {len(wanted)} connections on ports that drain; {MAX_HELD} can be held"
            )
        for flow in self._told.keys() - wanted.keys():
            check(lib.classify_held_del(self.classifier, _key(flow)))
            del self._told[flow]
        for flow, what in wanted.items():
            if self._told.get(flow) != what:
                check(lib.classify_held_add(self.classifier, _key(flow), what))
                self._told[flow] = what

    def find(
        self, proto: int, laddr: str, lport: int, peer: tuple[str, int] | None, *, block: bool
    ) -> int | None:
        """The number of a live entry; None: there is none."""
        remote, rport = (None, None) if peer is None else (ipv4(peer[0]), peer[1])
        wanted = endpoint_key(Endpoint(0, proto, ipv4(laddr), lport, remote, rport, 0, False, block))
        value = ffi.new("struct classify_endpoint *")
        self._open()
        found = lib.classify_endpoint_get(self.classifier, _key(wanted), value)
        return None if found < 0 else int(value.entry)

    def draining(self, entry: int) -> bool:
        """As set_drain() says. KeyError: no such entry."""
        return self._endpoints[entry].drain

    def key_of(self, entry: int) -> bytes:
        """The key of a live entry, a `struct classify_key`. KeyError: there is none."""
        return endpoint_key(self._endpoints[entry])

    def entries(self) -> dict[int, tuple[Endpoint, Count]]:
        """Live entries with what was taken for each since it began."""
        self._open()
        return {n: (e, self._count(lib.classify_entry_count, n)) for n, e in self._endpoints.copy().items()}

    # ---- what packets are compared with
    def set_served(self, owner: int, queue: int, served: bool) -> None:
        """Whether an owner takes packets of a queue; all do until this says otherwise. Where it does not, live TCP is
        dropped and UDP passes."""
        self._open()
        if lib.classify_served_set(self.classifier, owner, queue, served) < 0:
            raise SteeringError(f"{self.ifname}: no owner {owner} or queue {queue}")

    def set_locals(self, addresses: Iterable[str | Address]) -> None:
        """As `Steering.set_locals`."""
        for version, keys in local_keys(self.ifname, addresses):
            self._set(_SETS[version], keys)

    def set_groups(self, macs: Iterable[bytes]) -> None:
        """Group MAC addresses that are joined, at most MAX_LOCALS: UDP to them can be steered."""
        self._set(lib.CLASSIFY_GROUPS, set(macs))

    def _set(self, number: int, members: set[bytes]) -> None:
        self._open()
        wanted, told = {m.ljust(16, b"\0") for m in members}, self._members.setdefault(number, set())
        for new in wanted - told:
            check(lib.classify_set_add(self.classifier, number, new))
            told.add(new)
        for old in told - wanted:
            check(lib.classify_set_del(self.classifier, number, old))
            told.discard(old)

    def set_mac(self, mac: bytes) -> None:
        """The port's MAC address."""
        self._open()
        lib.classify_mac_set(self.classifier, mac)

    def change_mac(self, mac: bytes) -> None:
        """It becomes this one. The one before is taken too, until set_mac(): what is the stack's must not reach the
        kernel by either while the kernel's device changes, for it would reset connections that it does not have."""
        self._open()
        lib.classify_mac_change(self.classifier, mac)

    # ---- counters
    def rules(self) -> dict[str, Count]:
        """By rule name, in file order: packets that the rule decided, whatever its action."""
        self._open()
        counts = self._counts.total(self._policy, self._rule_counts(self._policy, 0))
        if self._previous is not None:
            before = zip(self._previous.flows, self._rule_counts(self._previous, 1), strict=True)
            for rule, count in before:
                if rule.name in counts:
                    counts[rule.name] += count
        return counts

    @property
    def reason_list(self) -> tuple[build.Reason, ...]:
        """CLASSIFIER_REASONS."""
        return CLASSIFIER_REASONS

    def reasons(self) -> dict[str, Count]:
        """By reason: every packet that was classified is in exactly one."""
        self._open()
        return {r.name: self._count(lib.classify_reason_count, n) for n, r in enumerate(CLASSIFIER_REASONS)}

    def guard_counts(self) -> dict[str, Count]:
        """There is no guard: zeroes."""
        return dict.fromkeys(GUARD_KINDS, Count(0, 0))

    def _count(self, get: Callable[[Any, int, Any], int], number: int) -> Count:
        out = ffi.new("struct classify_count *")
        check(get(self.classifier, number, out))
        return Count(out.packets, out.bytes)

    # ---- tests
    def test_run(self, frame: bytes, *, rx_queue: int = 0, repeat: int = 1) -> SteerResult:
        """Classifies a frame that is on no wire; `repeat`: so often, for the time that it takes."""
        self._open()
        result = ffi.new("struct classify_result *")
        begin = time.perf_counter_ns()
        verdict = lib.classify(self.classifier, frame, len(frame), rx_queue, result)
        took = time.perf_counter_ns() - begin
        if repeat > 1:
            took = self._repeated(frame, rx_queue, repeat)
        steered = verdict == lib.CLASSIFY_STEER
        return SteerResult(
            _ACTIONS[verdict],
            CLASSIFIER_REASONS[result.reason].name,
            Verdict(result.entry, result.rule, result.hash) if steered else None,
            frame,
            took,
        )

    def _repeated(self, frame: bytes, rx_queue: int, repeat: int) -> int:
        """Nanoseconds of one packet, in bursts of 1024."""
        n = 1024
        data = ffi.from_buffer(frame)
        frames, results = ffi.new("struct classify_frame[]", n), ffi.new("struct classify_result[]", n)
        for f in frames:
            f.data, f.len, f.queue = data, len(frame), rx_queue
        rounds = -(-repeat // n)
        begin = time.perf_counter_ns()
        for _ in range(rounds):
            lib.classify_burst(self.classifier, frames, n, results)
        return (time.perf_counter_ns() - begin) // (rounds * n)

    # ---- inside
    def _open(self) -> _Memory:
        if self._memory is None:
            raise SteeringError(f"{self.ifname}: steering is closed")
        return self._memory


def _key(packed: bytes) -> Any:
    key = ffi.new("struct classify_key *")
    ffi.memmove(key, packed, len(packed))
    return key


def _endpoint_of(key: Any, value: Any) -> Endpoint:
    """From C: the key is that of the steering program's map."""
    packed = struct.pack("=4I", value.entry, value.owner, value.flags != 0, 0)
    return endpoint_of(bytes(ffi.buffer(key)), packed)


def _packed(policy: Policy) -> tuple[Any, list[Any]]:
    """A `struct classify_policy`, and what it points to, which has to live as long."""
    compiled = policy.compiled
    keys, values = packed_rules(compiled)
    masks = ffi.new("struct classify_mask[]", max(1, len(compiled.masks)))
    for mask, (bits, max_rank) in zip(masks, packed_masks(compiled), strict=False):
        ffi.memmove(mask.bits, bits, len(bits))
        mask.max_rank = max_rank
    out = ffi.new("struct classify_policy *")
    kept = [ffi.from_buffer(keys), ffi.from_buffer(values), masks]
    out.key_v6, out.with_v6, out.vlan_depth = compiled.key_v6, compiled.uses_v6, compiled.vlan_depth
    out.masks_n, out.rules, out.keys_n = len(compiled.masks), len(compiled.rules), len(compiled)
    out.masks = masks
    out.keys = ffi.cast("uint8_t *", kept[0])
    out.values = ffi.cast("struct classify_rule *", kept[1])
    return out, kept
