# SPDX-License-Identifier: Apache-2.0
"""What bypass-fwd holds for the broker, so that the broker's death disturbs nobody.

    steering   the links that keep the programs attached, until broker and processes of all applications are dead
    app-N      the live entries of application N, until the broker and all of its processes are dead

Without a broker nothing new is leased, and what is live goes on. When the last process has ended, its entries are
deleted, the programs detach, and bypass-fwd ends: the kernel has everything. A broker that ends in order ends it too.
"""

from __future__ import annotations

import os
from contextlib import suppress

from bypass.fwd import Forwarder, ForwarderError
from bypass.steering import Steering

STEERING = "steering"
ENDPOINTS = 0  # our number of the map of live endpoints, for watch_keys()


class Holder:
    """A bypass-fwd of ours.

    Args:
        steering: whose links it holds.
        spin_us: how long it polls before it sleeps, where it moves frames; None: its default.

    Attributes:
        forwarder: for what else it is told.

    Raises:
        ForwarderError: it cannot be started.
    """

    def __init__(self, steering: Steering, spin_us: int | None) -> None:
        self._steering = steering
        self._keys: dict[int, set[bytes]] = {}  # live entries by application; empty: the map is not told yet
        self._us = os.pidfd_open(os.getpid())
        try:
            self.forwarder = Forwarder.start(hold=True, spin_us=spin_us)
        except BaseException:
            os.close(self._us)
            raise
        try:
            self.forwarder.put(STEERING, fds=steering.link_fds)
            self.forwarder.watch(STEERING, [self._us])
        except BaseException:
            self.close()
            raise

    def begin(self, owner: int) -> str:
        """An application begins; the name of its item."""
        name = _item(owner)
        self.forwarder.put(name)
        self.forwarder.watch(name, [self._us])  # while the broker lives, it alone decides who is dead
        self._keys[owner] = set()
        return name

    def joined(self, owner: int, pidfd: int) -> None:
        """One more process belongs to it."""
        for name in (_item(owner), STEERING):
            self.forwarder.watch(name, [pidfd])

    def live(self, owner: int, entry: int) -> None:
        """This entry is its own."""
        key, keys = self._steering.key_of(entry), self._keys[owner]
        self.forwarder.watch_keys(
            _item(owner), ENDPOINTS, [key], self._steering.endpoints_fd if not keys else None
        )
        keys.add(key)

    def not_live(self, owner: int, entry: int) -> None:
        """It is about to be removed."""
        key = self._steering.key_of(entry)
        keys = self._keys.get(owner, set())
        if key in keys:
            self.forwarder.forget_keys(_item(owner), ENDPOINTS, [key])
            keys.discard(key)

    def end(self, owner: int) -> None:
        if self._keys.pop(owner, None) is not None:
            with suppress(FileNotFoundError, ForwarderError):
                self.forwarder.delete(_item(owner))

    def close(self) -> None:
        os.close(self._us)
        with suppress(ForwarderError):
            self.forwarder.quit()
        self.forwarder.close()


def _item(owner: int) -> str:
    return f"app-{owner}"
