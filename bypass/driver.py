# SPDX-License-Identifier: Apache-2.0
"""Driver: what gives stacks time, packets and sleep. The core has none of these.

One driver serves a simulated network with all its stacks (bypass.sim.Network), or one stack on a device
(bypass.embedded). Blocking sockets wait through it, asyncio polls it.

One lock a driver guards every call into the C core. `lock held` in a docstring: the caller holds it.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from bypass.errors import DeviceGoneError

if TYPE_CHECKING:
    from bypass.aio.loop import Hub
    from bypass.stack_api import Stack


class Driver(ABC):
    """Base of drivers.

    Attributes:
        lock: guards the stacks; not reentrant.
        cond: notified whenever a waiting thread should look again.
        failure: why the device is gone for good, if it is.
        hubs: the event loops that poll it (bypass.aio.loop.Hub).
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.cond = threading.Condition(self.lock)
        self.failure: DeviceGoneError | None = None
        self.hubs: list[Hub] = []

    @abstractmethod
    def now_ns(self) -> int:
        """The clock that deadlines are of."""

    @abstractmethod
    def wait(self, deadline_ns: int) -> bool:
        """Lock held, but released while asleep. Lets things happen until something may have changed for a socket
        (True) or the deadline has passed (False). True promises nothing: the caller tries again."""

    @abstractmethod
    def poll(self) -> None:
        """Lock held. Does what is due, without sleeping."""

    @abstractmethod
    def touched(self, stack: Stack) -> None:
        """Lock held. A socket call may have produced output or an earlier deadline."""

    @abstractmethod
    def next_ns(self) -> int:
        """Lock held. When poll() has to run next if no packet arrives; FOREVER: never."""

    @abstractmethod
    def seconds_until(self, time_ns: int) -> float:
        """Real seconds until that time of the driver's clock, for a timer; may be negative."""

    def fds(self) -> list[int]:
        """Descriptors that become readable when poll() has work."""
        return []

    def woken(self, fd: int) -> None:
        """Lock held. This one of fds() is readable; poll() follows."""
        return

    def frames_waiting(self) -> bool:
        """Lock held. The caller is about to sleep on fds(), and has to know this. True: poll() has work already."""
        return False

    def quiet(self) -> bool:
        """Lock held. No packet can matter to anybody: descriptors need no watching."""
        return True

    @abstractmethod
    def remove(self, stack: Stack) -> None:
        """Lock held. The stack is gone."""
