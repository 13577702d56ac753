# SPDX-License-Identifier: Apache-2.0
"""Sizes and times of a stack as a policy gives them: profiles, and the keys that override them one by one.

What lives here: what `profile: latency` means in numbers, and how a policy, a program and the core's own defaults come
together. What does not: how the keys are written and checked (`policy_fields.py`), the table for people
(docs/policy.md, which a test compares with this one).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from bypass.core import Config

__all__ = ["NO_OPTIONS", "PROFILES", "RING_SIZES", "Profile", "StackOptions", "resolve"]

Profile = Literal["latency", "throughput", "connections"]


@dataclass(frozen=True, slots=True)
class StackOptions:
    """What a policy says about its stack. None: the core's default (bypass.core.Config), or the driver's.

    Attributes:
        conns: TCP connections in all states.
        socks, chunks, dsts, syn_backlog, time_wait: pools, as in Config.
        sndbuf, rcvbuf: buffers of a new socket, bytes; sndbuf_max, rcvbuf_max: what TCP's grow to.
        delack_ms: longest delay of an acknowledgment, milliseconds.
        spin_us: how long a blocking call polls before it sleeps, microseconds.
        batch: frames that are received before the program gets its turn.
    """

    conns: int | None = None
    socks: int | None = None
    chunks: int | None = None
    dsts: int | None = None
    syn_backlog: int | None = None
    time_wait: int | None = None
    sndbuf: int | None = None
    rcvbuf: int | None = None
    sndbuf_max: int | None = None
    rcvbuf_max: int | None = None
    delack_ms: int | None = None
    spin_us: int | None = None
    batch: int | None = None

    def over(self, below: StackOptions) -> StackOptions:
        """These, and those of `below` where these say nothing."""
        said = {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}
        return replace(below, **said)

    def config(self, program: Config | None) -> Config:
        """The configuration of a stack: what the program says, else what the policy says, else the core's default.

        Args:
            program: its `conns` counts as said.
        """
        from bypass.core import Config

        base = program or (Config() if self.conns is None else Config(conns=self.conns))
        said: dict[str, Any] = {
            name: value
            for name in OF_THE_CORE
            if (value := getattr(self, name)) is not None and getattr(base, name) is None
        }
        for name in ("sndbuf", "rcvbuf"):
            if program is not None and getattr(program, name) is not None:
                said.pop(f"{name}_max", None)  # a buffer that a program fixes brings its own limit
                continue
            limit = said.get(f"{name}_max", getattr(base, f"{name}_max"))
            if limit is not None:
                said[name] = min(said.get(name, CORE_BUFFER), limit)
        return replace(base, **said)


OF_THE_CORE = tuple(f.name for f in fields(StackOptions) if f.name not in ("conns", "spin_us", "batch"))
CORE_BUFFER = 1 << 18  # bytes: the core's default of sndbuf and rcvbuf
NO_OPTIONS = StackOptions()

PROFILES: dict[Profile, StackOptions] = {
    "latency": StackOptions(delack_ms=10, sndbuf_max=1 << 20, rcvbuf_max=1 << 20, spin_us=50, batch=32),
    "throughput": StackOptions(
        chunks=4096, sndbuf=1 << 20, rcvbuf=1 << 20, sndbuf_max=16 << 20, rcvbuf_max=16 << 20
    ),
    "connections": StackOptions(
        conns=1 << 18,
        chunks=1 << 17,
        dsts=1 << 14,
        syn_backlog=1 << 14,
        time_wait=1 << 16,
        sndbuf=16384,
        rcvbuf=16384,
        sndbuf_max=1 << 18,
        rcvbuf_max=1 << 18,
    ),
}
RING_SIZES: dict[Profile, int] = {"latency": 1024, "throughput": 4096, "connections": 4096}
"""Descriptors of each of a queue's rings, where the backend does not say; 2048 without a profile."""

assert set(PROFILES) == set(RING_SIZES) == set(get_args(Profile))


def resolve(profile: Profile | None, explicit: StackOptions) -> StackOptions:
    """A policy's options: those that it names, else its profile's."""
    return explicit.over(PROFILES[profile]) if profile is not None else explicit
