# SPDX-License-Identifier: Apache-2.0
"""A new broker goes on with what a killed one has left: bypass-fwd runs still, and holds it (holder.py).

    find_left()   the bypass-fwd, and what it holds, checked: nothing is changed before all of it can be taken over
    Left          the steering that is attached, and the applications, without a connection to any of their processes

Processes that live are the application's `children` until they say hello again, which the library does by itself.
What cannot be taken over is refused with one error; then the applications go on as before, without a broker.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from bypass.broker.apps import App, Lease
from bypass.broker.blocks import still_granted
from bypass.broker.holder import NAMES, STEERING, VERSION, item_of
from bypass.broker.memory import AppMemory
from bypass.broker.shadow import Shadow
from bypass.broker.tools import listening
from bypass.broker.users import Access, User
from bypass.core import Address
from bypass.errors import BypassError
from bypass.fwd import Forwarder, ForwarderError
from bypass.grants import Grants, Key
from bypass.policy import Policy
from bypass.steering import Attached, Guard


@dataclass(slots=True)
class Left:
    """What a killed broker has left.

    Attributes:
        forwarder: connected; from now on it does not end by itself.
        about: what the killed one wrote down about the interface.
        attached: what is attached to it.
        apps: the applications, each with what it wrote down about its device.
    """

    forwarder: Forwarder
    about: dict[str, Any]
    attached: Attached
    apps: list[tuple[App, dict[str, Any]]] = field(default_factory=list)


def find_left(policy: Policy, name: str) -> Left | None:
    """What a killed broker has left on the policy's interface; None: nothing.

    Args:
        name: of our socket, where the applications look for a broker.

    Raises:
        BypassError: it cannot be taken over; why, and what to do.
    """
    for where in sorted(listening()):
        if not where.startswith(f"{NAMES}{policy.interface}/"):
            continue
        try:
            forwarder = Forwarder.connect(where)
        except ForwarderError:
            continue  # somebody else's, or it has just ended
        except OSError as e:
            if e.errno == errno.EBUSY:
                continue  # its broker lives
            raise BypassError(f"{policy.interface}: bypass-fwd at {where}: {e.strerror}") from e
        with ExitStack() as undo:
            undo.callback(forwarder.close)
            try:
                left = _Reader(forwarder, policy, name, undo).read()
            except FileNotFoundError:
                continue  # its last application has ended while it was looked at
            undo.pop_all()
            return left
    return None


class _Reader:
    """Reads what one bypass-fwd holds."""

    def __init__(self, forwarder: Forwarder, policy: Policy, name: str, undo: ExitStack) -> None:
        self._forwarder = forwarder
        self._policy = policy
        self._access = Access(policy)
        self._name = name
        self._undo = undo  # what has to be closed if it does not come to an end

    def read(self) -> Left:
        about, attached = self._steering()
        apps = list(self._apps())
        self._require_grants([app for app, _ in apps])
        us = os.pidfd_open(os.getpid())
        try:  # from now on all this lives at least as long as we do
            self._forwarder.watch(STEERING, [us])
            for app, device in list(apps):
                try:
                    self._forwarder.watch(item_of(app.number), [us])
                except FileNotFoundError:
                    apps.remove((app, device))
                    _let_go(app)
        finally:
            os.close(us)
        return Left(self._forwarder, about, attached, apps)

    def _get(self, name: str) -> tuple[dict[str, Any], list[int]]:
        blob, fds = self._forwarder.get(name)
        return (json.loads(blob) if blob else {}), fds

    # ---- the interface
    def _steering(self) -> tuple[dict[str, Any], Attached]:
        about, fds = self._get(STEERING)
        for fd in fds:
            self._undo.callback(os.close, fd)
        self._require(about)
        by_name = dict(zip(about["fds"], fds, strict=True))
        links, maps = (
            {n.removeprefix(kind): fd for n, fd in by_name.items() if n.startswith(kind)}
            for kind in ("link ", "map ")
        )
        return about, Attached(about["xdp"], Guard(*about["guard"]), maps, links)

    def _require(self, about: dict[str, Any]) -> None:
        """BypassError: it is not for us."""
        policy, ifname = self._policy, self._policy.interface
        end = "or end these applications, then all is the kernel's"
        if about.get("version") != VERSION:
            raise BypassError(
                f"{ifname}: a broker of another version was killed, and its applications go on: start that version, "
                f"{end}"
            )
        if about["socket"] != self._name:
            raise BypassError(
                f"{ifname}: a broker at {about['socket']} was killed, and its applications go on: "
                f"`bypass up --socket {about['socket']}` takes them over; {end}"
            )
        for what, before in about["policy"].items():
            if repr(getattr(policy, what)) != before:
                raise BypassError(
                    f"{policy.path}: {what} is not what it was when the broker of {ifname} was killed, and its "
                    f"applications go on: start with the policy that was in force, {end}"
                )

    # ---- applications
    def _apps(self) -> Iterator[tuple[App, dict[str, Any]]]:
        names = [item.name for item in self._forwarder.list()]
        for item in names:
            if not re.fullmatch(r"app-\d+", item):
                continue
            try:
                about, fds = self._get(item)
                if about:
                    app = self._app(int(item.partition("-")[2]), about, fds, names)
                    self._undo.callback(_let_go, app)
                    yield app, about["device"]
                else:
                    self._forwarder.delete(item)  # it was being made, and no program has been told of it
            except FileNotFoundError:
                continue  # its last process has just ended

    def _app(self, number: int, about: dict[str, Any], fds: list[int], names: list[str]) -> App:
        uid, gid, groups, trusted = about["user"]
        user = User(uid, gid, frozenset(groups), trusted)
        memory = AppMemory.of(f"bypass-app-{number}", fds[0])
        app = App(number, bytes.fromhex(about["token"]), user, about["name"], memory, about["limit"], fds[1:])
        app.lingering, app.restored = about["lingering"], True
        for name in names:
            if name.startswith(item_of(number) + "."):
                lease = self._lease(int(name.rpartition(".")[2]), name)
                app.leases[lease.number] = lease
        app.last_lease = max(app.leases, default=0) + 1  # one more may have been told, and released
        for fd in self._forwarder.watched(item_of(number)):
            pid = pid_of(fd)
            if pid > 0 and pid not in app.children:
                app.children[pid] = fd
            else:
                os.close(fd)
        return app

    def _lease(self, number: int, name: str) -> Lease:
        about, fds = self._get(name)
        kind, local, remote, last = about["kind"], about["local"], about["remote"], about["last_port"]
        key: Key = (about["key"][0], _address(about["key"][1]), _maybe(about["key"][2]))
        shadow = Shadow(fds[0], kind) if fds else None
        return Lease(number, kind, _address(local), _maybe(remote), key, shadow, last)

    def _require_grants(self, apps: list[App]) -> None:
        for app in apps:
            grants = Grants(self._policy, self._access.permits(app.user))
            for lease in app.leases.values():
                if not still_granted(grants, lease):
                    ports = f"{lease.local[1]}" + (f"-{lease.last_port}" if lease.last_port else "")
                    raise BypassError(
                        f"{self._policy.path} does not grant {lease.local[0]}:{ports}, which {app.who()} has from a "
                        "broker that was killed: start with a policy that does, then `bypass reload`, or end it"
                    )


def _let_go(app: App) -> None:
    """Descriptors of ours; nothing happens to what they are of."""
    app.memory.close()
    for fd in (*app.fds, *app.children.values()):
        os.close(fd)
    for lease in app.leases.values():
        if lease.shadow is not None:
            lease.shadow.sock.close()


def _address(said: Any) -> Address:
    return str(said[0]), int(said[1])


def _maybe(said: Any) -> Address | None:
    return None if said is None else _address(said)


def pid_of(pidfd: int) -> int:
    """The process of a pidfd; -1: it has ended."""
    with open(f"/proc/self/fdinfo/{pidfd}") as info:
        return next(int(line.split()[1]) for line in info if line.startswith("Pid:"))
