# SPDX-License-Identifier: Apache-2.0
"""Embedded mode: one privileged process steers flows of an interface, runs the stack, and owns both.

    policy -> steering -> device -> CoreStack -> sockets
                 ^ live entries        ^ next hops, addresses
                 bypass.control        netlink

What lives here: putting these together, and the driver that polls the device and sleeps on its descriptor. What does
not: what differs between backends (`backends.py`).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import threading
import time
from pathlib import Path

from bypass.backends import Attachment, Watch, attach
from bypass.control import PolicyControl
from bypass.core import FOREVER, Config, CoreStack
from bypass.driver import Driver
from bypass.errors import DeviceGoneError
from bypass.policy import Policy, load_policy
from bypass.sim.pcap import DeviceCapture
from bypass.stack_api import Stack
from bypass.status import Snapshot, StatusServer

__all__ = ["DeviceDriver", "open_stack"]

log = logging.getLogger("bypass")
TICK_NS = 100_000_000
STATUS_NS = 10_000_000  # between looks at who asks, while packets keep us from sleeping
POLL_BUDGET = 256  # frames
POLL_ROUNDS = 8  # batches, before the program gets its turn


class DeviceDriver(Driver):
    """Drives one stack on the device of an interface.

    One thread at a time polls and sleeps for all; others that wait are woken by it. A socket call of another thread
    wakes it, since the deadline may have moved. When the interface is gone, every call that waits raises `failure`.
    """

    def __init__(
        self,
        core: CoreStack,
        port: Attachment,
        control: PolicyControl,
        watch: Watch,
        status: StatusServer,
        spin_us: int,
        capture: DeviceCapture | None = None,
    ) -> None:
        super().__init__()
        self.core = core
        self.port = port
        self.device = port.device
        self.steering = port.steering
        self.control = control
        self.watch = watch
        self.capture = capture
        self.status = status
        self.batch = POLL_BUDGET
        self._spin_ns = spin_us * 1000
        self._stack: Stack | None = None
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._sleeping_until: int | None = None
        self._driving = False
        self._down = False
        self._said = 0  # the last error of the device that was logged
        self._tick_ns = 0
        self._news = False  # netlink has something
        self._tick_wanted = True
        self._status_ns = 0
        self._device_fd = int(port.netdev.ops.wait_fd(port.netdev))
        self._doze = port.netdev.ops.sleep or None  # a null pointer is false
        self._netdev = port.netdev
        self._poll = select.poll()
        for fd in (*self.fds(), self._wake):
            self._poll.register(fd, select.POLLIN)
        control.changed = self._want_tick

    def fds(self) -> list[int]:
        return [self._device_fd, self.watch.fileno(), self.status.fileno()]

    def woken(self, fd: int) -> None:
        if fd == self.watch.fileno():
            self._news = True
        elif fd == self.status.fileno():
            self._status_ns = 0

    def frames_waiting(self) -> bool:
        return self._doze is not None and self._doze(self._netdev) > 0

    def quiet(self) -> bool:
        return self.core.closed or not any(self.core.conns())

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def seconds_until(self, time_ns: int) -> float:
        return (time_ns - time.monotonic_ns()) / 1e9

    # ---- one turn
    def poll(self) -> None:
        self._turn()

    def _turn(self) -> bool:
        """Receives, runs timers, sends, reports events. Whether anything happened."""
        core = self.core
        if core.closed:
            return True
        busy = False
        for _ in range(POLL_ROUNDS):
            now = time.monotonic_ns()
            self.port.turn(now)
            if self.capture is not None:
                self.capture.now(now)
            got = core.poll(now, self.batch)
            if got < 0:
                self._trouble(-got)
                break
            busy = busy or got > 0
            if got < self.batch:
                break
        assert self._stack is not None
        while events := core.events():
            busy = True
            for e in events:
                self._stack.dispatch(e.user, e.mask)
        self._housekeeping()
        if busy:
            self.cond.notify_all()
        return busy

    def _trouble(self, code: int) -> None:
        """0: the interface is well, as netlink sees it."""
        if code == 0:
            if self._down:
                log.warning("%s is up again", self.port.ifname)
            self._down = False
        elif code == errno.ENXIO:
            if self.failure is None:
                self.failure = DeviceGoneError(f"{self.port.ifname} is gone")
                log.error("%s", self.failure)
                if self._stack is not None:
                    self._stack.alert()
        elif code == errno.ENETDOWN:
            if not self._down:
                log.warning("%s is down; connections wait for it", self.port.ifname)
            self._down = True
        elif code not in (errno.EAGAIN, self._said):
            log.error("%s: %s", self.port.ifname, os.strerror(code))
            self._said = code

    def _housekeeping(self) -> None:
        """What has to be asked of, or told to, the kernel."""
        now = time.monotonic_ns()
        if wanted := self.core.nexthop_wanted():
            self.watch.resolve(wanted)
        due = self.watch.due_ns()
        if wanted or self._news or now >= self._tick_ns or (due is not None and now >= due):
            if self._news:
                self.port.news()
            self._news = False
            self._trouble(self.watch.update())
        if now >= self._tick_ns:
            leaving = self.control.tick(now) if self._tick_wanted else 0
            self._tick_wanted = leaving > 0
            # The more there are, the longer a look at them takes, and the less one of them matters.
            self._tick_ns = now + TICK_NS * (1 + leaving // 100)
        if self.capture is not None:
            self.capture.flush()
        if now >= self._status_ns:
            self._status_ns = now + STATUS_NS
            self.status.poll()

    def _want_tick(self) -> None:
        self._tick_wanted = True

    def next_ns(self) -> int:
        if self.core.closed:  # a callback of the loop that was on its way
            return FOREVER
        deadline = self.core.deadline()
        if self._tick_wanted:
            deadline = min(deadline, self._tick_ns)
        due = self.watch.due_ns()
        return deadline if due is None else min(deadline, due)

    # ---- sleeping
    def wait(self, deadline_ns: int) -> bool:
        if self.failure is not None:
            raise DeviceGoneError(str(self.failure))
        if self._driving:  # another thread polls for us
            left = (deadline_ns - time.monotonic_ns()) / 1e9 if deadline_ns != FOREVER else None
            if left is not None and left <= 0:
                return False
            self.cond.wait(left)
            return True
        self._driving = True
        try:
            return self._drive(deadline_ns)
        finally:
            self._driving = False
            self.cond.notify_all()  # whoever still waits drives now

    def _drive(self, deadline_ns: int) -> bool:
        spin_until = time.monotonic_ns() + self._spin_ns
        while not self._turn():
            now = time.monotonic_ns()
            if now >= deadline_ns:
                return False
            if self.failure is not None or self.core.closed:
                return True
            if now < spin_until:
                self._breathe()
                continue
            self._sleep(min(deadline_ns, self.next_ns()), now)
        return True

    def _breathe(self) -> None:
        """Other threads may take the lock."""
        self.lock.release()
        self.lock.acquire()

    def _sleep(self, until_ns: int, now_ns: int) -> None:
        if until_ns <= now_ns or self.frames_waiting():
            return
        timeout = None if until_ns == FOREVER else (until_ns - now_ns + 999_999) // 1_000_000
        self._sleeping_until = until_ns
        self.lock.release()
        try:
            ready = self._poll.poll(timeout)
        finally:
            self.lock.acquire()
            self._sleeping_until = None
        if self.core.closed:
            return  # by another thread; the descriptors are gone
        for fd, _ in ready:
            if fd == self._wake:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
            else:
                self.woken(fd)

    def touched(self, stack: Stack) -> None:
        if wanted := self.core.nexthop_wanted():
            self.watch.resolve(wanted)  # what the kernel knows already is answered here
        self.core.flush()
        if self._sleeping_until is not None and self._driving:
            os.eventfd_write(self._wake, 1)

    # ---- end
    def run_in_background(self) -> None:
        """A thread polls and sleeps whenever no other does, so that the stack works while the program is busy."""

        def work() -> None:
            with self.lock:
                while not self.core.closed and self.failure is None:
                    self.wait(FOREVER)

        threading.Thread(target=work, name=f"bypass {self.port.ifname}", daemon=True).start()

    def remove(self, stack: Stack) -> None:
        """Detaches before the sockets close: packets go to the kernel again, none into a closing socket."""
        while self._driving:  # by another thread: it has to leave before its descriptors go
            os.eventfd_write(self._wake, 1)
            self.cond.wait()
        for hub in list(self.hubs):
            hub.unwatch()
        with contextlib.ExitStack() as end:
            end.callback(os.close, self._wake)
            end.callback(self.watch.close)
            end.callback(self.status.close)
            if self.capture is not None:
                end.callback(self.capture.close)
            end.callback(self.port.close)
            end.callback(self.control.close)


def open_stack(
    policy: str | os.PathLike[str] | Policy,
    *,
    config: Config | None = None,
    spin_us: int | None = None,
    background: bool = False,
    capture: str | os.PathLike[str] | None = None,
    rx_csum_trust: bool = False,
    name: str | None = None,
) -> Stack:
    """A stack on the interface of a policy; see Stack.from_policy().

    Args:
        policy: path of a policy, or a Policy.
        config: sizes of the stack; what it leaves out, and `spin_us`, are the policy's (`profile`, `stack`).
        spin_us: how long a blocking call polls before it sleeps, microseconds.
        background: a thread drives the stack while no call does. Without it the stack works while a call waits (or
            in Stack.run(), or in asyncio): a program that computes for long in between answers nobody meanwhile.
        capture: a pcapng file of every frame that the stack receives and sends; tcpdump sees none of them. Slow.
        rx_csum_trust: received checksums of TCP and UDP are taken as right (a veth peer that leaves them out).
        name: for messages; None: the interface.

    Raises:
        PolicyError, PrivilegeError, DeviceError, SteeringError, ForeignProgramError.
    """
    if not isinstance(policy, Policy):
        policy = load_policy(policy)
    ifname = policy.interface
    options = policy.stack
    if spin_us is None:
        spin_us = options.spin_us or 0
    with contextlib.ExitStack() as undo:
        port = attach(policy, rx_csum_trust=rx_csum_trust)
        undo.callback(port.close)
        recorded: DeviceCapture | None = None
        netdev = port.netdev
        if capture is not None:
            recorded = DeviceCapture(netdev, Path(capture), ifname, time.time_ns() - time.monotonic_ns())
            undo.callback(recorded.close)
            netdev = recorded.dev
        core = CoreStack(
            netdev,
            config=options.config(config),
            flags=port.flags,
            now_ns=time.monotonic_ns(),
            owner=port,
        )
        undo.callback(core.close)
        if policy.congestion is not None:
            core.cc_default(policy.congestion)
        watch = port.watch(core)
        undo.callback(watch.close)
        control = PolicyControl(policy, port.steering, watch)
        control.core = core
        status = StatusServer(
            ifname, Snapshot(port.steering, port.device, core, name or ifname, port.counters)
        )
        undo.callback(status.close)
        driver = DeviceDriver(core, port, control, watch, status, spin_us, recorded)
        driver.batch = options.batch or POLL_BUDGET
        stack = Stack(core, driver, name=name or ifname, control=control)
        driver._stack = stack
        undo.pop_all()
    if background:
        driver.run_in_background()
    return stack
