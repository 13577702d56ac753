# SPDX-License-Identifier: Apache-2.0
"""What bypass-fwd holds for the broker, so that the broker's death disturbs nobody, and the next one goes on.

    steering    links and maps, or a classifier's memory, until broker and processes of all applications are dead: the
                programs stay attached
    app-N       an application: memory and device; its live entries, until the broker and all of its processes are dead
    app-N.M     its lease M: the kernel socket that holds the port. Put in before anything is live, taken out after

Without a broker nothing new is leased, and what is live goes on. When the last process has ended, its entries are
deleted, the programs detach, and bypass-fwd ends: the kernel has everything. A broker that ends in order ends it too.
How a new broker goes on with what a killed one left: takeover.py.
"""

from __future__ import annotations

import json
import os
import secrets
from contextlib import suppress
from typing import Any

from bypass._core import lib
from bypass.broker.apps import App, Lease
from bypass.fwd import Forwarder, ForwarderError
from bypass.steer_maps import layout
from bypass.steering_api import Steers

STEERING = "steering"
ENDPOINTS = 0  # our number of where live endpoints are, for watch_keys()
NAMES = "@bypass/fwd/"
VERSION = f"1.{lib.APP_ABI}.{lib.FWD_ABI}.{lib.CLASSIFY_ABI}.{layout()}"
"""Of what is stored: who has another one cannot go on with it."""
MAX_GROUPS = 300
"""Groups of a user that are remembered, as far as an item has room."""


class Holder:
    """A bypass-fwd of ours.

    Args:
        steering: whose links and maps it holds.
        spin_us: how long it polls before it sleeps, where it moves frames; None: its default.
        about: what a successor has to know, as JSON; None: there will be none.
        left: one that runs, which a killed broker has left.

    Attributes:
        forwarder: for what else it is told.

    Raises:
        ForwarderError: it cannot be started.
    """

    def __init__(
        self,
        steering: Steers,
        spin_us: int | None,
        about: dict[str, Any] | None = None,
        left: Forwarder | None = None,
    ) -> None:
        self._steering = steering
        self._about = about
        self._keys: dict[int, set[bytes]] = {}  # live entries by application; empty: the map is not told yet
        self._us = os.pidfd_open(os.getpid())
        name = None if about is None else f"{NAMES}{steering.ifname}/{secrets.token_hex(8)}"
        try:
            self.forwarder = left or Forwarder.start(name, hold=True, spin_us=spin_us)
        except BaseException:
            os.close(self._us)
            raise
        try:
            self._put_steering()
            if left is None:
                self.forwarder.watch(STEERING, [self._us])
        except BaseException:
            if left is None:
                self.close()
            raise

    def _put_steering(self) -> None:
        steering = self._steering
        if self._about is None:
            self.forwarder.put(STEERING, fds=list(steering.link_fds.values()))
            return
        fds = {f"link {name}": fd for name, fd in steering.link_fds.items()}
        fds |= {f"map {name}": fd for name, fd in steering.map_fds.items()}
        guard = [steering.guard.active, steering.guard.reason]
        about = {"version": VERSION, "xdp": steering.mode, "guard": guard, "fds": list(fds)} | self._about
        self.forwarder.put(STEERING, json.dumps(about).encode(), list(fds.values()))

    def tell(self, **about: Any) -> None:
        """More that a successor has to know."""
        if self._about is not None:
            self._about |= about
            self._put_steering()

    # ---- applications
    def begin(self, owner: int) -> str:
        """An application begins; the name of its item."""
        name = item_of(owner)
        self.forwarder.put(name)
        self.forwarder.watch(name, [self._us])  # while the broker lives, it alone decides who is dead
        self._keys[owner] = set()
        return name

    def keep(self, app: App, device: dict[str, Any]) -> None:
        """What a successor has to know of it. Again, when that has changed."""
        user = app.user
        about = {
            "name": app.name,
            "token": app.token.hex(),
            "user": [user.uid, user.gid, sorted(user.groups)[:MAX_GROUPS], user.trusted],
            "limit": app.limit,
            "lingering": app.lingering,
            "device": device,
        }
        self.forwarder.put(item_of(app.number), json.dumps(about).encode(), [app.memory.fd, *app.fds])

    def joined(self, owner: int, pidfd: int) -> None:
        """One more process belongs to it."""
        for name in (item_of(owner), STEERING):
            self.forwarder.watch(name, [pidfd])

    def end(self, owner: int) -> None:
        if self._keys.pop(owner, None) is not None:
            with suppress(FileNotFoundError, ForwarderError):
                self.forwarder.delete(item_of(owner))

    # ---- leases
    def leased(self, owner: int, lease: Lease) -> None:
        """Before it is live. A crash in between leaves an item without a live entry, which a successor drops."""
        about = {
            "kind": lease.kind,
            "local": lease.local,
            "remote": lease.remote,
            "key": lease.key,
            "last_port": lease.last_port,
        }
        fds = [] if lease.shadow is None else [lease.shadow.sock.fileno()]
        self.forwarder.put(item_of(owner, lease.number), json.dumps(about).encode(), fds)

    def released(self, owner: int, number: int) -> None:
        """After it was live."""
        with suppress(FileNotFoundError, ForwarderError):
            self.forwarder.delete(item_of(owner, number))

    # ---- live entries
    def live(self, owner: int, entry: int) -> None:
        """This entry is its own."""
        key, keys = self._steering.key_of(entry), self._keys[owner]
        self.forwarder.watch_keys(
            item_of(owner), ENDPOINTS, [key], self._steering.endpoints_fd if not keys else None
        )
        keys.add(key)

    def not_live(self, owner: int, entry: int) -> None:
        """It is about to be removed."""
        key = self._steering.key_of(entry)
        keys = self._keys.get(owner, set())
        if key in keys:
            self.forwarder.forget_keys(item_of(owner), ENDPOINTS, [key])
            keys.discard(key)

    def go_on(self, owner: int, entries: list[int]) -> None:
        """An application that was taken over has these."""
        keys = [self._steering.key_of(entry) for entry in entries]
        self._keys[owner] = set(keys)
        if keys:
            self.forwarder.watch_keys(item_of(owner), ENDPOINTS, keys, self._steering.endpoints_fd)

    def close(self) -> None:
        os.close(self._us)
        with suppress(ForwarderError):
            self.forwarder.quit()
        self.forwarder.close()


def item_of(owner: int, lease: int | None = None) -> str:
    return f"app-{owner}" if lease is None else f"app-{owner}.{lease}"
