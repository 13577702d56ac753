# SPDX-License-Identifier: Apache-2.0
"""What the parts of the broker share: its applications, the site, the loop; and how a request is refused."""

from __future__ import annotations

import errno
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from bypass.broker.apps import App, Process
from bypass.broker.site import Site
from bypass.grants import ANY


class Loop(Protocol):
    """What the broker needs of the one who runs it."""

    def changed(self, process: Process) -> None:
        """It has something to send."""

    def drop(self, process: Process) -> None:
        """Its connection has to go."""

    def watch(self, fd: int, call: Callable[[], None]) -> None:
        """call() whenever fd is readable."""

    def unwatch(self, fd: int) -> None: ...

    def stop(self) -> None:
        """Everything ends."""


@dataclass(slots=True)
class State:
    """A broker's.

    Attributes:
        site: where packets come from.
        loop: who sends, and watches descriptors.
        name: of the broker's socket, for those whom it starts.
        clock: nanoseconds, as time.monotonic_ns.
        apps: by number.
        draining: nothing new begins any more.
    """

    site: Site
    loop: Loop
    name: str
    clock: Callable[[], int]
    apps: dict[int, App] = field(default_factory=dict)
    draining: bool = False


class Refused(Exception):
    """The answer to a request is this error."""

    def __init__(self, code: int, text: str = "") -> None:
        super().__init__(code, text)
        self.code, self.text = code, text


def code_of(e: Exception) -> int:
    """An error's errno; EIO: it has none, the text says what it is."""
    return (e.errno if isinstance(e, OSError) else None) or errno.EIO


def words_of(e: Exception) -> str:
    return (e.strerror if isinstance(e, OSError) else None) or str(e)


def app_of(process: Process) -> App:
    assert process.app is not None  # hello comes first
    return process.app


def plain(host: str) -> str:
    """IPv4 as text; any address as 0.0.0.0. Refused: IPv6."""
    if host == "::":
        return ANY
    if ipaddress.ip_address(host).version == 6:
        raise Refused(errno.EAFNOSUPPORT, f"{host}: only IPv4 is steered, IPv6 is the kernel's")
    return host
