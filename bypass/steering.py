# SPDX-License-Identifier: Apache-2.0
"""Steering: the XDP program on an interface, the maps under it, and who owns which flow.

What lives here: live endpoints, AF_XDP sockets by queue, local addresses, counters, and the exchange of the policy
under traffic. What does not: the decision itself (`bpf/xdp_steer.c`), compiling (`bpf/build.py`), loading and attaching
(`steer_programs.py`), the maps' layout (`steer_maps.py`), rules and ranks (`rules.py`), the sockets (`afxdp/`).

    policy --compile--> rules, masks --+                     endpoints, sockets, addresses
                                       v                       v  (outlive the policy)
                          maps of the policy  <- program ->  maps of the interface
                                                    |
                                              bpf_link on the NIC: gone when this process is

Nothing is pinned: when the process that holds a `Steering` ends in whatever way, the kernel detaches the programs
and frees the maps, and the kernel has all traffic again.
"""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Iterable
from dataclasses import replace
from types import TracebackType
from typing import Self, cast

from bypass import libbpf
from bypass.bpf import build
from bypass.endpoints import Endpoints, RuleCounts, ipv4, local_keys
from bypass.errors import BypassError, SteeringError
from bypass.policy import Policy, require_visible_vlans
from bypass.steer_maps import (
    BLOCK,
    CONFIG,
    COUNT,
    GUARD_KINDS,
    MAX_ENTRIES,
    MAX_LOCALS,
    MAX_QUEUES,
    NONE,
    REASONS,
    U32,
    ZERO,
    Count,
    Endpoint,
    count_of,
    counts_of,
    endpoint_key,
    endpoint_of,
    endpoint_value,
    interface_maps,
    set_keys,
)
from bypass.steer_programs import Mode, Programs, attach_guard, attach_xdp, explained, refuse_foreign
from bypass.steering_api import Address, Attached, Guard, SteerResult, Verdict

__all__ = [
    "BLOCK",
    "GUARD_KINDS",
    "MAX_ENTRIES",
    "MAX_LOCALS",
    "MAX_QUEUES",
    "REASONS",
    "Attached",
    "Count",
    "Endpoint",
    "Guard",
    "Steering",
    "Verdict",
]

_MAGIC = 0x42595053  # STEER_VERDICT_MAGIC of bpf/verdict.h
_VERDICT = struct.Struct("=4I")  # struct steer_verdict
_XDP_ACTIONS = ("aborted", "drop", "pass", "tx", "redirect")
_TCX_DROP = 2  # of linux/bpf.h; what the guard leaves alone goes to the next program
_SIOCGIFHWADDR = 0x8927


class Steering:
    """The steering program on one interface of the current network namespace.

    It takes the packets of live endpoints, as far as rules of the policy grant them; everything else stays the
    kernel's. Until `set_locals` has named addresses, nothing is taken. Close it before the AF_XDP sockets.

    Args:
        policy: what may be taken.
        ifname: the interface.
        queues: receive queues that have AF_XDP sockets, 1..256.
        owners: how many sets of sockets there are.
        mode: `native` (in the driver), `skb` (generic, slower, every driver), `auto`: native, else skb.
        attach: False only loads the programs, for `test_run`.
        text: the programs' source in place of the installed one.
        left: what is attached already, with the same number of owners, to go on with: live endpoints stay live, and the
            policy is exchanged as by swap(). Its descriptors are the steering's from here on.

    Attributes:
        guard: whether the kernel's own resets of live flows are kept from the wire (kernel 6.6 and later).
        mode: what it was attached as: native or skb.

    Raises:
        ForeignProgramError: an XDP program is on the interface already. It is left alone.
        SteeringError: the interface is missing or cannot do the mode; the program is refused.
        PrivilegeError: root is missing, or bcc.
        PolicyError: rules about VLANs, and XDP does not see the interface's tags.
    """

    def __init__(
        self,
        policy: Policy,
        ifname: str,
        *,
        queues: int,
        owners: int = 1,
        mode: Mode = "native",
        attach: bool = True,
        text: str | None = None,
        left: Attached | None = None,
    ) -> None:
        if not 1 <= queues <= MAX_QUEUES:
            raise SteeringError(
                f"{ifname}: {queues} queues; steering serves 1 to {MAX_QUEUES} (`ethtool -L`)"
            )
        self.ifname, self.queues, self.owners = ifname, queues, owners
        self.ifindex = _ifindex(ifname)
        self.mode: Mode = mode
        self.guard = Guard(False, "not attached")
        self._text = text
        self._links: dict[str, libbpf.Link] = {}
        self._maps: dict[str, libbpf.Map] = {}
        self._loaded: Programs | None = None
        self._endpoints = Endpoints(ifname, owners)
        self._mac = bytes(6)
        self._told = b""
        self._counts = RuleCounts()
        if attach and left is None:
            refuse_foreign(ifname, self.ifindex)
        if attach:
            require_visible_vlans(policy, ifname)
        try:
            for m in interface_maps(owners, left.maps if left else NONE):
                self._maps[m.name] = m
            if left:
                self._go_on(left)
            self._loaded = Programs(policy, self._maps, text)
            self.set_mac(_mac_of(ifname))
            if left:
                for name, link in self._links.items():
                    link.update(self._loaded.progs[name])
            elif attach:
                self._attach(mode)
        except BaseException as e:
            self.close()
            if isinstance(e, OSError) and not isinstance(e, BypassError):
                raise explained(e, ifname) from e
            raise

    def _go_on(self, left: Attached) -> None:
        """With links, and with endpoints that are live."""
        self._links = {name: libbpf.Link.of(fd) for name, fd in left.links.items()}
        self.mode, self.guard = cast(Mode, left.mode), left.guard
        endpoints = self._maps["endpoints"]
        found = ((key, endpoints.get(key)) for key in list(endpoints.keys()))
        # None: bypass-fwd has just deleted it.
        self._endpoints.go_on(endpoint_of(key, value) for key, value in found if value is not None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Detaches and frees everything; the kernel has all traffic at its return. Again: nothing."""
        for link in reversed(self._links.values()):
            link.close()
        if self._loaded:
            self._loaded.close()
        for m in self._maps.values():
            m.close()
        self._links, self._maps, self._loaded = {}, {}, None
        self._endpoints = Endpoints(self.ifname, self.owners)
        self.guard = Guard(False, "closed")

    # ---- the policy -------------------------------------------------------------------------------------------

    @property
    def policy(self) -> Policy:
        """The rules in force."""
        return self._current().policy

    def prepare(self, policy: Policy) -> None:
        """Does the slow part of `swap` ahead (half a second where the masks are new), also in another thread."""
        build.compile_programs(build.defines(policy.compiled), self._text)

    def swap(self, policy: Policy) -> list[Endpoint]:
        """Puts another policy in force. No packet goes unserved: each meets the old rules or the new ones.

        Endpoints, sockets and all counters survive; those of a rule go on under its name.

        Returns:
            Endpoints of which no rule grants anything any more. Their packets are the kernel's from now on; close them.

        Raises:
            SteeringError, PrivilegeError, PolicyError: as the constructor. The old policy stays in force.
        """
        old = self._current()
        if self._links:
            require_visible_vlans(policy, self.ifname)
        try:
            new = Programs(policy, self._maps, self._text)
        except OSError as e:
            raise explained(e, self.ifname) from e
        done: list[str] = []
        try:
            for name, link in self._links.items():
                link.update(new.progs[name])
                done.append(name)
        except OSError as e:
            for name in done:
                self._links[name].update(old.progs[name])
            new.close()
            raise explained(e, self.ifname) from e
        self._loaded = new
        libbpf.wait_for_programs()
        self._counts.ended(old.policy, old.counts())
        self._counts.keep(new.policy)
        old.close()
        return self._endpoints.ungranted(new.policy)

    def attach_anew(self) -> None:
        """Attaches the program once more, with nothing changed: a veth runs none on queues that it got below one.

        Raises:
            SteeringError, PrivilegeError: it is refused; what was attached goes on.
        """
        loaded = self._current()
        try:
            fresh = loaded.load(build.XDP, self._maps)
        except OSError as e:
            raise explained(e, self.ifname) from e
        try:
            if build.XDP in self._links:
                self._links[build.XDP].update(fresh)
        except OSError as e:
            fresh.close()
            raise explained(e, self.ifname) from e
        old, loaded.progs[build.XDP] = loaded.progs[build.XDP], fresh
        libbpf.wait_for_programs()
        old.close()

    # ---- live endpoints ---------------------------------------------------------------------------------------

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
        """Makes flows live: from now on their packets go to the owner's sockets.

        Args:
            proto: socket.IPPROTO_TCP or IPPROTO_UDP.
            laddr: local address; None or the unspecified one: any.
            lport: local port, 1..65535.
            raddr, rport: the peer; both or none.
            drain: TCP connections that the kernel holds at the moment stay with the kernel.
            block: lport, a multiple of BLOCK, is the first of BLOCK local ports of laddr, for connections from them to
                any peer: one entry in place of one each. It comes before endpoints that are bound to one of its ports,
                so who hands ports out sees to it that they are nobody else's.

        Returns:
            The entry's number.

        Raises:
            GrantError: no rule of the policy grants any of these flows, or none does for a port of a block; or they
                are IPv6.
            SteeringError: the entry exists already, or there are MAX_ENTRIES.
        """
        endpoint = self._endpoints.add(
            self.policy, self._put, proto, laddr, lport, raddr, rport, owner=owner, drain=drain, block=block
        )
        cpus = libbpf.possible_cpus()
        self._map("entry_count").put(U32.pack(endpoint.entry), bytes(COUNT.size * cpus))
        self._tell()
        return endpoint.entry

    def _put(self, endpoint: Endpoint) -> None:
        self._map("endpoints").put(endpoint_key(endpoint), endpoint_value(endpoint), libbpf.NOEXIST)

    def remove_endpoint(self, entry: int) -> None:
        """Ends it: its packets are the kernel's from now on. An unknown number: nothing."""
        endpoint = self._endpoints.remove(entry)
        if endpoint is not None:
            self._map("endpoints").delete(endpoint_key(endpoint))
            self._tell()

    def set_drain(self, entry: int, drain: bool) -> None:
        """Whether connections that the kernel holds stay with it. KeyError: no such entry."""
        endpoint = replace(self._endpoints[entry], drain=drain)
        self._map("endpoints").put(endpoint_key(endpoint), endpoint_value(endpoint), libbpf.EXIST)
        self._endpoints.change(endpoint)

    def entries(self) -> dict[int, tuple[Endpoint, Count]]:
        """Live entries with what was redirected for each since it began."""
        live = self._endpoints.copy()  # at once: another thread may ask while the broker's adds and removes
        return {n: (e, count_of(self._map("entry_count"), n)) for n, e in live.items()}

    # ---- what the program compares with -----------------------------------------------------------------------

    def set_socket(self, owner: int, queue: int, fd: int) -> None:
        """The AF_XDP socket for an owner's packets of a queue. When it closes, the kernel empties the slot.

        Raises:
            SteeringError: no such owner or queue, or fd is no AF_XDP socket.
        """
        try:
            self._map("xsks").put(self._slot(owner, queue), U32.pack(fd))
        except OSError as e:
            raise SteeringError(f"{self.ifname}, queue {queue}: descriptor {fd} is no AF_XDP socket") from e

    @property
    def link_fds(self) -> dict[str, int]:
        """What keeps the programs attached, for somebody trusted who keeps them so when this process is gone."""
        return {name: link.fd for name, link in self._links.items()}

    @property
    def map_fds(self) -> dict[str, int]:
        """The maps of the interface, for a successor's `left`."""
        return {name: m.fd for name, m in self._maps.items()}

    def find(
        self, proto: int, laddr: str, lport: int, peer: tuple[str, int] | None, *, block: bool
    ) -> int | None:
        """The number of a live entry; None: there is none."""
        remote, rport = (None, None) if peer is None else (ipv4(peer[0]), peer[1])
        wanted = endpoint_key(Endpoint(0, proto, ipv4(laddr), lport, remote, rport, 0, False, block))
        value = self._map("endpoints").get(wanted)
        return None if value is None else endpoint_of(wanted, value).entry

    def draining(self, entry: int) -> bool:
        """As set_drain() says. KeyError: no such entry."""
        return self._endpoints[entry].drain

    @property
    def endpoints_fd(self) -> int:
        """The map of live endpoints, for somebody trusted who removes them when this process is gone."""
        return self._map("endpoints").fd

    def key_of(self, entry: int) -> bytes:
        """The key of a live entry in that map. KeyError: there is none."""
        return endpoint_key(self._endpoints[entry])

    @property
    def sockets_fd(self) -> int:
        """The map of AF_XDP sockets, for somebody trusted who opens them elsewhere: owner 0's queues from slot 0 on."""
        return self._map("xsks").fd

    def clear_socket(self, owner: int, queue: int) -> None:
        """Takes the socket out: live TCP of that queue is dropped, UDP passes."""
        self._map("xsks").delete(self._slot(owner, queue))

    def _slot(self, owner: int, queue: int) -> bytes:
        if not (0 <= owner < self.owners and 0 <= queue < MAX_QUEUES):
            raise SteeringError(f"{self.ifname}: no slot for owner {owner}, queue {queue}")
        return U32.pack(owner * MAX_QUEUES + queue)

    def set_locals(self, addresses: Iterable[str | Address]) -> None:
        """The addresses of this host (IPv4 and IPv6): only what is sent to them is taken or dropped.

        Raises:
            SteeringError: more than MAX_LOCALS of a family.
        """
        for version, keys in local_keys(self.ifname, addresses):
            set_keys(self._map(f"locals{version}"), keys)

    def set_groups(self, macs: Iterable[bytes]) -> None:
        """Group MAC addresses that are joined, at most MAX_LOCALS: UDP to them can be steered."""
        set_keys(self._map("groups"), {mac + bytes(2) for mac in macs})

    def set_mac(self, mac: bytes) -> None:
        """The interface's MAC address, when it changed (the constructor reads it)."""
        self._mac = mac
        self._tell()

    def _tell(self) -> None:
        """MAC address, and the kinds of endpoints there are: lookups that cannot hit are not made."""
        config = CONFIG.pack(self._mac, self._endpoints.kinds)
        if config != self._told:
            self._map("config").put(ZERO, config)
            self._told = config

    # ---- counters ---------------------------------------------------------------------------------------------

    def rules(self) -> dict[str, Count]:
        """By rule name, in file order: packets that the rule decided, whatever its action."""
        loaded = self._current()
        return self._counts.total(loaded.policy, loaded.counts())

    @property
    def reason_list(self) -> tuple[build.Reason, ...]:
        """REASONS."""
        return REASONS

    def reasons(self) -> dict[str, Count]:
        """By reason, in the order of REASONS: every packet that the program saw is in exactly one."""
        return dict(zip((r.name for r in REASONS), counts_of(self._map("reason_count")), strict=True))

    def guard_counts(self) -> dict[str, Count]:
        """TCP resets that left through the interface's tc egress, by GUARD_KINDS."""
        return dict(zip(GUARD_KINDS, counts_of(self._map("guard_count")), strict=True))

    # ---- tests ------------------------------------------------------------------------------------------------

    def test_run(
        self, frame: bytes, *, rx_queue: int = 0, meta: bytes = b"", ifindex: int = 0, repeat: int = 1
    ) -> SteerResult:
        """Runs the program on a frame without a packet on any wire (BPF_PROG_TEST_RUN).

        Args:
            frame: 14 bytes or more, from the destination MAC on.
            rx_queue: the queue that it claims to come from; other than 0 only with `ifindex`.
            meta: metadata of another program in front of it, a multiple of 4 bytes.
            ifindex: interface that it claims to come from; 0: the loopback.
        """
        counters = self._map("reason_count")
        before = [c.packets for c in counts_of(counters)]
        run = (
            self._current()
            .progs[build.XDP]
            .run_xdp(frame, meta=meta, ifindex=ifindex, rx_queue=rx_queue, repeat=repeat)
        )
        rose = [i for i, c in enumerate(counts_of(counters)) if c.packets != before[i]]
        fields = _VERDICT.unpack(run.meta[: _VERDICT.size]) if len(run.meta) >= _VERDICT.size else (0,) * 4
        return SteerResult(
            _XDP_ACTIONS[run.result],
            REASONS[rose[0]].name if len(rose) == 1 else "",
            Verdict(*fields[1:]) if fields[0] == _MAGIC else None,
            run.data,
            run.duration_ns,
        )

    def test_guard(self, frame: bytes) -> tuple[bool, str]:
        """Runs the reset guard on a frame as if the kernel sent it without a socket.

        Returns:
            Whether it is dropped, and as what it was counted, of GUARD_KINDS; empty: not a reset.
        """
        before = self.guard_counts()
        result = self._current().progs[build.GUARD].run_skb(frame)
        rose = [kind for kind, c in self.guard_counts().items() if c != before[kind]]
        return result == _TCX_DROP, "".join(rose)

    # ---- inside -----------------------------------------------------------------------------------------------

    def _current(self) -> Programs:
        if self._loaded is None:
            raise SteeringError(f"{self.ifname}: steering is closed")
        return self._loaded

    def _map(self, name: str) -> libbpf.Map:
        self._current()
        return self._maps[name]

    def _attach(self, mode: Mode) -> None:
        progs = self._current().progs
        self._links[build.XDP], self.mode = attach_xdp(progs, self.ifname, self.ifindex, mode)
        guard, self.guard = attach_guard(progs, self.ifindex)
        if guard is not None:
            self._links[build.GUARD] = guard


def _ifindex(ifname: str) -> int:
    try:
        return socket.if_nametoindex(ifname)
    except OSError as e:
        raise SteeringError(f"no interface {ifname} in this network namespace (`ip link`)") from e


def _mac_of(ifname: str) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        answer: bytes = fcntl.ioctl(s, _SIOCGIFHWADDR, struct.pack("16s16x", ifname.encode()))
    return answer[18:24]
