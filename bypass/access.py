# SPDX-License-Identifier: Apache-2.0
"""Who may use a rule, and how much of everything: the keys `allow` and `quota` of a policy, as data.

What does not live here: how they are written and checked (`policy_fields.py`), who a process is (`broker/users.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bypass.rules import PortRange

__all__ = ["NO_QUOTA", "Allow", "Quota"]


@dataclass(frozen=True, slots=True)
class Quota:
    """What one application may have at most; None: no limit but the stack's own.

    Attributes:
        conns: TCP connections in all states.
        memory: bytes of its memory file: stack, rings and frames.
        frames: frames of packet memory.
        rate: bytes a second that it may send, where applications share an interface.
        apps: applications of a user at a time.
    """

    conns: int | None = None
    memory: int | None = None
    frames: int | None = None
    rate: int | None = None
    apps: int | None = None

    def and_also(self, other: Quota) -> Quota:
        """The stricter of both, one by one."""
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Quota(*(min((v for v in pair if v is not None), default=None) for pair in pairs))


NO_QUOTA = Quota()


@dataclass(frozen=True, slots=True)
class Allow:
    """Who may use a rule beside root and the user who runs the broker.

    Attributes:
        users, groups: names, or numbers.
        ports: the local ports of the rule that they may use; None: all of them.
        quota: of their applications, beside the policy's own.
    """

    users: tuple[str | int, ...] = ()
    groups: tuple[str | int, ...] = ()
    ports: tuple[PortRange, ...] | None = None
    quota: Quota = NO_QUOTA
