# SPDX-License-Identifier: Apache-2.0
"""What users of steering need of it, whoever decides about the packets: the XDP program (`bypass.steering`), or the
classifier of the DPDK backend (`bypass.dpdk_backend.steering`).

What lives here: the protocol, and the types in it. What does not: either of the two, and what they share
(`bypass.endpoints`).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from bypass.bpf.build import Reason
from bypass.policy import Policy
from bypass.steer_maps import Count, Endpoint

__all__ = ["Address", "Attached", "Guard", "SteerResult", "Steers", "Verdict"]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Guard:
    """Whether the kernel's resets of live flows are silenced, and if not, why."""

    active: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Attached:
    """What another process has left of its steering. Descriptors, by name."""

    mode: str
    guard: Guard
    maps: dict[str, int]
    links: dict[str, int]


class Verdict(NamedTuple):
    """What comes with a frame that was taken (bpf/verdict.h)."""

    entry: int
    rule: int
    hash: int


class SteerResult(NamedTuple):
    """What was decided about one frame."""

    action: str  # pass, drop, redirect
    reason: str  # a name of `reason_list`; empty when other packets were counted at the same time
    verdict: Verdict | None
    data: bytes  # the frame afterwards
    duration_ns: int


class Steers(Protocol):
    """Steering of one interface. Arguments and errors: `bypass.steering.Steering`."""

    ifname: str
    guard: Guard

    @property
    def mode(self) -> str: ...
    @property
    def policy(self) -> Policy: ...
    @property
    def reason_list(self) -> tuple[Reason, ...]:
        """The keys of reasons(), with verdicts and texts."""

    def prepare(self, policy: Policy) -> None: ...
    def swap(self, policy: Policy) -> list[Endpoint]: ...
    def close(self) -> None: ...

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
    ) -> int: ...
    def remove_endpoint(self, entry: int) -> None: ...
    def set_drain(self, entry: int, drain: bool) -> None:
        """Again with True, now and then while it lasts: what the kernel still holds may have to be found out anew."""

    def draining(self, entry: int) -> bool: ...
    def find(
        self, proto: int, laddr: str, lport: int, peer: tuple[str, int] | None, *, block: bool
    ) -> int | None: ...
    def key_of(self, entry: int) -> bytes: ...
    @property
    def endpoints_fd(self) -> int: ...
    @property
    def map_fds(self) -> dict[str, int]: ...
    @property
    def link_fds(self) -> dict[str, int]: ...
    def entries(self) -> dict[int, tuple[Endpoint, Count]]: ...

    def set_locals(self, addresses: Iterable[str | Address]) -> None: ...
    def set_groups(self, macs: Iterable[bytes]) -> None: ...
    def set_mac(self, mac: bytes) -> None: ...

    def rules(self) -> dict[str, Count]: ...
    def reasons(self) -> dict[str, Count]: ...
    def guard_counts(self) -> dict[str, Count]: ...

    def test_run(self, frame: bytes, *, rx_queue: int = 0) -> SteerResult: ...
