# SPDX-License-Identifier: Apache-2.0
"""What both kinds of steering keep beside what decides about packets: the live endpoints of an interface, and the
counts of rules over the policies that came and went.

What lives here: which endpoints may be, their numbers, whose errors are raised. What does not: where packets are
compared with them (`bypass.steering`: maps of the kernel, `bypass.dpdk_backend.steering`: memory).
"""

from __future__ import annotations

import ipaddress
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from bypass.errors import GrantError, SteeringError
from bypass.policy import Policy
from bypass.rules import TCP, UDP
from bypass.steer_maps import BLOCK, MAX_ENTRIES, MAX_LOCALS, Count, Endpoint, endpoint_kind
from bypass.steering_api import Address

__all__ = ["Endpoints", "RuleCounts", "ipv4", "local_keys"]


def ipv4(address: str | Address | None) -> ipaddress.IPv4Address | None:
    """None for any. GrantError: it is IPv6."""
    if address is None:
        return None
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        raise GrantError(f"{parsed}: only IPv4 is steered, IPv6 is the kernel's")
    return None if parsed.is_unspecified else parsed


def local_keys(ifname: str, addresses: Iterable[str | Address]) -> Iterator[tuple[int, set[bytes]]]:
    """IP version, and the addresses of it as bytes. SteeringError: more than MAX_LOCALS of a family."""
    wanted = {ipaddress.ip_address(a) for a in addresses}
    for version in (4, 6):
        keys = {a.packed for a in wanted if a.version == version}
        if len(keys) > MAX_LOCALS:
            raise SteeringError(f"{ifname}: {len(keys)} IPv{version} addresses; steering knows {MAX_LOCALS}")
        yield version, keys


class Endpoints:
    """The live endpoints of an interface.

    Args:
        ifname: for errors.
        owners: how many there are.
    """

    def __init__(self, ifname: str, owners: int) -> None:
        self._ifname, self._owners = ifname, owners
        self._live: dict[int, Endpoint] = {}
        self._free: deque[int] = deque(range(MAX_ENTRIES))
        self._by_kind: Counter[int] = Counter()

    def __getitem__(self, entry: int) -> Endpoint:
        return self._live[entry]

    @property
    def kinds(self) -> int:
        """Which kinds there are, as KIND_* of bpf/steer.h."""
        return sum(kind for kind, n in self._by_kind.items() if n)

    def copy(self) -> dict[int, Endpoint]:
        """By number."""
        return self._live.copy()

    def go_on(self, endpoints: Iterable[Endpoint]) -> None:
        """With these, which are live already."""
        for endpoint in endpoints:
            self._live[endpoint.entry] = endpoint
            self._by_kind[endpoint_kind(endpoint)] += 1
        self._free = deque(n for n in range(MAX_ENTRIES) if n not in self._live)

    def add(
        self,
        policy: Policy,
        put: Callable[[Endpoint], None],
        proto: int,
        laddr: str | Address | None,
        lport: int,
        raddr: str | Address | None,
        rport: int | None,
        *,
        owner: int,
        drain: bool,
        block: bool,
    ) -> Endpoint:
        """One more.

        Args:
            put: makes it live; FileExistsError where its key is there already.
            The others: `bypass.steering.Steering.add_endpoint`, as are the errors.
        """
        local, remote = ipv4(laddr), ipv4(raddr)
        if not self._free:
            raise SteeringError(f"{self._ifname}: {MAX_ENTRIES} endpoints are live; close some")
        endpoint = Endpoint(self._free[0], proto, local, lport, remote, rport, owner, drain, block)
        self._check(policy, endpoint)
        try:
            put(endpoint)
        except FileExistsError as e:
            raise SteeringError(f"{self._ifname}: {endpoint} is live already") from e
        self._free.popleft()
        self._live[endpoint.entry] = endpoint
        self._by_kind[endpoint_kind(endpoint)] += 1
        return endpoint

    def change(self, endpoint: Endpoint) -> None:
        """The one with this number is as this from now on; of the same key."""
        self._live[endpoint.entry] = endpoint

    def remove(self, entry: int) -> Endpoint | None:
        """Which it was; None: there was none."""
        endpoint = self._live.pop(entry, None)
        if endpoint is not None:
            self._free.append(entry)
            self._by_kind[endpoint_kind(endpoint)] -= 1
        return endpoint

    def ungranted(self, policy: Policy) -> list[Endpoint]:
        """Those of which no rule grants anything."""
        return [e for e in self._live.values() if not any(_grants(policy, e))]

    def _check(self, policy: Policy, endpoint: Endpoint) -> None:
        if endpoint.proto not in (TCP, UDP) or not 0 < endpoint.lport < 65536:
            raise SteeringError(f"an endpoint is TCP or UDP with a local port of 1 to 65535, not {endpoint}")
        if (endpoint.raddr is None) != (endpoint.rport is None) or (endpoint.raddr and not endpoint.laddr):
            raise SteeringError(f"{endpoint}: a peer has address and port, and needs a local address")
        if endpoint.block and (endpoint.lport % BLOCK or endpoint.raddr or not endpoint.laddr):
            raise SteeringError(
                f"{endpoint}: a block begins at a multiple of {BLOCK} of a local address, and has no peer"
            )
        if not 0 <= endpoint.owner < self._owners:
            raise SteeringError(f"{endpoint}: owner {endpoint.owner} of {self._owners}")
        if not all(_grants(policy, endpoint)):
            each = "every port of " if endpoint.block else ""
            raise GrantError(f"no rule of the policy grants {each}{endpoint} on {self._ifname}")


def _grants(policy: Policy, e: Endpoint) -> Iterator[bool]:
    """For each of its local ports whether the policy grants anything."""
    for port in range(e.lport, e.last_port + 1):
        yield policy.grant(e.proto, e.laddr, port, e.raddr, e.rport) is not None


class RuleCounts:
    """Counts of rules by name: those under a policy, and what they were under the policies before it."""

    def __init__(self) -> None:
        self._before: dict[str, Count] = {}

    def ended(self, policy: Policy, counts: Sequence[Count]) -> None:
        """What was counted under a policy that is not in force any more."""
        for rule, count in zip(policy.flows, counts, strict=True):
            if count.packets:
                self._before[rule.name] = self._before.get(rule.name, Count(0, 0)) + count

    def keep(self, policy: Policy) -> None:
        """Forgets rules that this one does not have."""
        kept = {rule.name for rule in policy.flows}
        self._before = {name: count for name, count in self._before.items() if name in kept}

    def total(self, policy: Policy, counts: Sequence[Count]) -> dict[str, Count]:
        """By rule name, in file order."""
        zero = Count(0, 0)
        pairs = zip(policy.flows, counts, strict=True)
        return {rule.name: self._before.get(rule.name, zero) + count for rule, count in pairs}
