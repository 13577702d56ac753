# SPDX-License-Identifier: Apache-2.0
"""How a stack lives in an event loop: the hub that polls it, handles whose events come to the loop, virtual time.

The hub puts the device's descriptor into the selector and the stack's deadline into a timer. One poll serves all
connections; calls of one turn of the loop are sent together. In virtual time the loop itself drives the network:
where it would sleep, the simulation runs.
"""

from __future__ import annotations

import asyncio
import errno
import selectors
import threading
from collections import deque
from collections.abc import Coroutine
from typing import Any, TypeVar

from bypass._core import lib
from bypass.core import FOREVER
from bypass.driver import Driver
from bypass.errors import DeviceGoneError
from bypass.sim.network import Network, SimulationError
from bypass.sockets import raised
from bypass.stack_api import Stack

__all__ = ["FAILED", "READABLE", "WRITABLE", "Handle", "Hub", "VirtualLoop", "run"]

T = TypeVar("T")

READABLE: int = lib.BYPASS_IN | lib.BYPASS_RDHUP | lib.BYPASS_HUP
WRITABLE: int = lib.BYPASS_OUT
FAILED: int = lib.BYPASS_ERR


class Hub:
    """Joins one event loop and one driver: polls, arms the timer, wakes those whose handles became ready."""

    @classmethod
    def get(cls, driver: Driver) -> Hub:
        """The hub of the running loop for this driver."""
        loop = asyncio.get_running_loop()
        driver.hubs = [hub for hub in driver.hubs if not hub.loop.is_closed()]
        for hub in driver.hubs:
            if hub.loop is loop:
                return hub
        driver.hubs.append(cls(loop, driver))
        return driver.hubs[-1]

    def __init__(self, loop: asyncio.AbstractEventLoop, driver: Driver) -> None:
        self.loop = loop
        self.driver = driver
        self._thread = threading.get_ident()
        self._ready: deque[Handle] = deque()
        self._users = 0
        self._watched: list[int] = []
        self._timer: asyncio.TimerHandle | None = None
        self._pump_scheduled = False
        self._run_scheduled = False
        self._virtual = isinstance(loop, VirtualLoop) and loop.network is driver

    # -- lifetime: descriptors are in the loop while something uses them, and until connections have ended
    def retain(self) -> None:
        self._users += 1
        if not self._watched and not self.driver.failure:
            self._watched = self.driver.fds()
            for fd in self._watched:
                self.loop.add_reader(fd, self._woken, fd)
        self.touched()

    def release(self) -> None:
        self._users -= 1
        self.touched()

    def unwatch(self) -> None:
        """The descriptors are about to be closed, or nobody needs them."""
        watched, self._watched = self._watched, []
        if self.loop.is_closed():
            return
        for fd in watched:
            if threading.get_ident() == self._thread:
                self.loop.remove_reader(fd)
            else:
                self.loop.call_soon_threadsafe(self.loop.remove_reader, fd)

    # -- the stack's side
    def notify(self, handle: Handle) -> None:
        """Lock held, any thread: the handle has something to do."""
        if self.loop.is_closed():
            return  # the program has left: nobody is there to be told
        self._ready.append(handle)
        if threading.get_ident() == self._thread:
            if not self._run_scheduled:
                self._run_scheduled = True
                self.loop.call_soon(self._run_ready)
        else:
            self.loop.call_soon_threadsafe(self._run_ready)

    def touched(self) -> None:
        """Socket calls were made: let the stack send, once for all calls of this turn of the loop."""
        if not self._pump_scheduled and not self.loop.is_closed():
            self._pump_scheduled = True
            self.loop.call_soon(self._pump)

    def _woken(self, fd: int) -> None:
        with self.driver.lock:
            self.driver.woken(fd)
        self._pump()

    def _pump(self) -> None:
        self._pump_scheduled = False
        driver = self.driver
        with driver.lock:
            driver.poll()
            if not self._virtual:
                self._arm()
            if self._watched and (driver.failure is not None or (not self._users and driver.quiet())):
                self.unwatch()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._watched and self.driver.frames_waiting():  # the loop may sleep now
            self._timer = self.loop.call_later(0.0, self._pump)
            return
        next_ns = self.driver.next_ns()
        if next_ns != FOREVER:
            self._timer = self.loop.call_later(max(0.0, self.driver.seconds_until(next_ns)), self._pump)

    def _run_ready(self) -> None:
        self._run_scheduled = False
        for _ in range(len(self._ready)):
            with self.driver.lock:  # another thread may be noting an event just now
                handle = self._ready.popleft()
                mask, handle.mask = handle.mask, 0
            if mask:
                try:
                    handle.on_ready(mask)
                except Exception as e:  # noqa: BLE001 - one connection's trouble: the others go on
                    handle.crashed(e)


class Handle:
    """A handle of the stack whose events come to the loop. `mask` gathers them until on_ready(mask) is called."""

    def __init__(self, hub: Hub, stack: Stack, handle: int) -> None:
        self.hub = hub
        self.stack = stack
        self.handle = handle
        self.mask = 0
        hub.retain()

    def watch(self) -> None:
        """Lock held. Events from now on, and what is ready already."""
        self.stack.set_handler(self.handle, self._note)
        self._note(self.stack.core.ready(self.handle))

    def _note(self, mask: int) -> None:
        if mask and not self.mask:
            self.hub.notify(self)
        self.mask |= mask

    def on_ready(self, mask: int) -> None:
        raise NotImplementedError

    def crashed(self, error: Exception) -> None:
        """on_ready() raised: its protocol has a fault, or the stack was closed."""
        if not isinstance(error, OSError):
            self.hub.loop.call_exception_handler(
                {
                    "message": f"Fatal error: protocol of {self!r} failed",
                    "exception": error,
                    "transport": self,
                }
            )
        self.end(error)

    def end(self, error: Exception) -> None:
        """At once, because of an error."""
        self.drop(abort=True)

    def taken_error(self, mask: int) -> OSError | None:
        """The pending error that an event tells of; it is told once."""
        if not mask & FAILED:
            return None
        with self.stack.driver.lock:
            code = self.stack.core.error(self.handle)
        return raised(code) if code else None

    def lost_device(self) -> OSError | None:
        """Why nothing will ever come any more, if so."""
        if self.stack.core.closed:
            return OSError(errno.EBADF, "the stack is closed")
        failure = self.stack.driver.failure
        return None if failure is None else DeviceGoneError(str(failure))

    def drop(self, *, abort: bool = False) -> None:
        """Closes the handle."""
        if self.handle >= 0:
            handle, self.handle = self.handle, -1
            with self.stack.driver.lock:
                self.stack.close_handle(handle, abort=abort)
            self.mask = 0
            self.hub.release()


# ---- Virtual time -----------------------------------------------------------------------------------------------


class _VirtualSelector(selectors.BaseSelector):
    """Where a loop sleeps, the network runs: select(timeout) lets so much virtual time pass."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._real = selectors.DefaultSelector()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = self._real.select(0)
        network = self._network
        with network.lock:
            # Rounded up, so that the timer for which the loop sleeps is due afterwards.
            now = network.now_ns()
            limit = FOREVER if timeout is None else now + (int(max(timeout, 0.0) * 1e9) + 1 if timeout else 0)
            if ready:
                limit = now
            reason = network.advance(limit)
        if reason == lib.SIM_IDLE and not ready:
            if threading.active_count() == 1:
                raise SimulationError(
                    f"the loop would wait for ever: at {network.now_ns()} ns nothing is on a wire and no timer runs"
                )
            return self._real.select(None)
        return ready

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.modify(fileobj, events, data)

    def close(self) -> None:
        self._real.close()

    def get_map(self) -> Any:
        return self._real.get_map()


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock is that of a simulated network."""

    def __init__(self, network: Network) -> None:
        self.network = network
        super().__init__(_VirtualSelector(network))

    def time(self) -> float:
        """Seconds since the network's start."""
        return (self.network.now_ns() - self.network.start_ns) / 1e9


def run(main: Coroutine[Any, Any, T], network: Network, *, debug: bool | None = None) -> T:
    """As asyncio.run(), in the virtual time of a simulated network."""
    with asyncio.Runner(debug=debug, loop_factory=lambda: VirtualLoop(network)) as runner:
        return runner.run(main)
