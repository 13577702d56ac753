# SPDX-License-Identifier: Apache-2.0
"""The errors that bypass raises for reasons its user can do something about.

Socket calls raise OSError with an errno, as `socket` does; these are for everything around them.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass


class BypassError(Exception):
    """Base of all of them. The message says what is wrong, where, and what to do.

    Attributes:
        exit_code: what the command line exits with.
    """

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong in a policy.

    Attributes:
        path: where in the document, such as `flows[0].match.local_port`; empty for the document itself.
        line, column: from 1; 0 when the problem has no place (the file cannot be read).
        message: what is wrong.
        value: the offending text as written, shortened; empty when nothing is written there.
        hint: what would be right; empty when the message says it.
    """

    path: str
    line: int
    column: int
    message: str
    value: str = ""
    hint: str = ""

    def text(self, file: str) -> str:
        """`FILE:LINE:COL: path: message: hint`, the form that editors jump to."""
        where = f"{file}:{self.line}:{self.column}" if self.line else file
        return ": ".join(part for part in (where, self.path, self.message, self.hint) if part)


class PolicyError(BypassError):
    """A policy that is refused. The message holds every problem, each with file, line and column.

    Attributes:
        file: the file's name as it was given.
        problems: at least one, in file order.
    """

    def __init__(self, problems: Sequence[Problem], file: str = "policy") -> None:
        self.file = file
        self.problems = list(problems)
        super().__init__("\n".join(p.text(file) for p in self.problems))


class GrantError(BypassError, PermissionError):
    """No rule of the policy grants the flow that a socket asked for (EACCES of bind(2))."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EACCES, message)

    def __str__(self) -> str:
        return str(self.strerror)


class SteeringError(BypassError):
    """The XDP program cannot be loaded or attached, or a live entry cannot be set."""


class ForeignProgramError(SteeringError):
    """Another XDP program is on the interface. bypass never replaces one.

    Attributes:
        ours: it is another program's of bypass, which may be about to end.
    """

    def __init__(self, text: str, ours: bool = False) -> None:
        super().__init__(text)
        self.ours = ours


class DeviceError(BypassError):
    """The interface cannot do what is asked: no such queue or mode, or it is gone."""


class NameTakenError(DeviceError):
    """A device has the name that the kernel's device of a DPDK port would get.

    Attributes:
        ours: it may be another program's of bypass, which may be about to end.
    """

    def __init__(self, text: str, ours: bool = False) -> None:
        super().__init__(text)
        self.ours = ours


class QueueBusyError(DeviceError):
    """A queue has an AF_XDP socket already. The kernel closes these asynchronously: it may be free in a moment."""


class DeviceGoneError(DeviceError, OSError):
    """The interface was deleted, or moved to another namespace, while sockets were open on it (ENODEV)."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ENODEV, message)

    def __str__(self) -> str:
        return str(self.strerror)


class PrivilegeError(BypassError):
    """A capability, a limit or a kernel feature is missing."""


class LabError(BypassError):
    """The lab's namespaces cannot be made, used or removed."""
