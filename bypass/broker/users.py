# SPDX-License-Identifier: Apache-2.0
"""Who asks: users as the kernel knows them at the other end of a socket, and which rules they may use.

Root, the user who runs the broker, and the one whose private broker it is may use every rule; others what `allow` says.
"""

from __future__ import annotations

import array
import grp
import os
import pwd
import socket
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from bypass.access import Allow, Quota
from bypass.errors import PolicyError, Problem
from bypass.policy import Policy
from bypass.rules import PortRange, Rule

SO_PEERGROUPS = 59  # asm-generic/socket.h
SO_PEERPIDFD = 77
MAX_GROUPS = 65536


@dataclass(frozen=True, slots=True)
class User:
    """A user and its groups.

    Attributes:
        trusted: root, the user who runs the broker, or the one whose private broker it is: may use every rule.
    """

    uid: int
    gid: int
    groups: frozenset[int]
    trusted: bool


def peer_of(sock: socket.socket, trusted: Collection[int]) -> tuple[int, User]:
    """The process at the other end (0: of another pid namespace) and its user, as they were when it connected."""
    pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    groups = array.array("I")
    groups.frombytes(sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 1024))
    return pid, User(uid, gid, frozenset((gid, *groups)), uid in trusted)


def pidfd_of(sock: socket.socket, pid: int) -> int:
    """A descriptor that becomes readable when that process ends; -1: it has ended, or cannot be seen."""
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, 4)
        return int(struct.unpack("i", raw)[0])
    except OSError:
        pass  # before Linux 6.5, or it was reaped already
    try:
        return os.pidfd_open(pid) if pid > 0 else -1
    except OSError:
        return -1


@dataclass(frozen=True, slots=True)
class _Allowed:
    """An `allow` whose names are numbers."""

    uids: frozenset[int]
    gids: frozenset[int]

    def has(self, user: User) -> bool:
        return user.uid in self.uids or not self.gids.isdisjoint(user.groups)


class Access:
    """Who may use which rule of a policy. Names are looked up once, here.

    Raises:
        PolicyError: a user or group that `allow` names is not here.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._allowed: dict[Allow, _Allowed] = {}
        self._open = False  # there are steer rules that allow nobody
        problems: list[Problem] = []
        for rule in policy.flows:
            if rule.action != "steer":
                continue
            if rule.allow is None:
                self._open = True
            elif rule.allow not in self._allowed:
                self._allowed[rule.allow] = _resolved(rule, problems)
        if problems:
            raise PolicyError(problems, policy.path)

    def allows(self, rule: Rule, user: User) -> bool:
        return rule.allow is not None and self._allowed[rule.allow].has(user)

    def permits(self, user: User) -> UserPermits | None:
        """What this user may use; None: everything."""
        if user.trusted:
            return None
        only = next(iter(self._allowed), None)
        if (
            len(self._allowed) == 1
            and not self._open
            and only
            and not only.ports
            and self._allowed[only].has(user)
        ):
            return None  # a million rules of one user's are not asked one by one
        return UserPermits(self, user)

    def quota(self, user: User) -> Quota:
        """The policy's, and that of every rule that allows this user."""
        quota = self.policy.quota
        for allow, allowed in self._allowed.items():
            if allowed.has(user):
                quota = quota.and_also(allow.quota)
        return quota


class UserPermits:
    """bypass.grants.Permits of one user."""

    def __init__(self, access: Access, user: User) -> None:
        self._access, self._user = access, user

    def __call__(self, rule: Rule, port: int) -> bool:
        return any(ports is None or port in ports for ports in self.ports(rule))

    def ports(self, rule: Rule) -> Iterator[PortRange | None]:
        if self._access.allows(rule, self._user):
            assert rule.allow is not None
            yield from (rule.local_port,) if rule.allow.ports is None else rule.allow.ports


def _resolved(rule: Rule, problems: list[Problem]) -> _Allowed:
    assert rule.allow is not None
    uids, gids = set(), set()
    for user in rule.allow.users:
        try:
            uids.add(user if isinstance(user, int) else pwd.getpwnam(user).pw_uid)
        except KeyError:
            problems.append(_unknown(rule, "user", str(user), "passwd"))
    for group in rule.allow.groups:
        try:
            gids.add(group if isinstance(group, int) else grp.getgrnam(group).gr_gid)
        except KeyError:
            problems.append(_unknown(rule, "group", str(group), "group"))
    return _Allowed(frozenset(uids), frozenset(gids))


def _unknown(rule: Rule, kind: str, name: str, database: str) -> Problem:
    path = f"flows[{rule.index}].allow.{kind}"
    message = f"there is no {kind} {name} on this machine"
    return Problem(
        path, rule.line, rule.column, message, name, f"`getent {database}` lists those that there are"
    )
