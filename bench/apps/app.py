# SPDX-License-Identifier: Apache-2.0
"""What the module of every program has: how it is started, how a kernel client uses it, and what "it works" means."""

from __future__ import annotations

import re
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from bench.apps.launch import Grant, Launcher, Running
from bench.apps.place import Place, lacking
from bench.programs import BenchError
from bypass.errors import BypassError

T = TypeVar("T")

__all__ = ["App", "ServerApp", "memory_bytes"]


class App(ABC):
    """A program at a place. exercise() adds what is wrong to `problems`; none means that it works.

    Args:
        place: where; its scale says how much is done.
        launcher: starts it.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]  # Debian's programs
    grants: ClassVar[tuple[Grant, ...]]
    files: ClassVar[int] = 0  # descriptors, where it needs more than usual
    stack: ClassVar[Mapping[str, int]] = {}  # of a policy, where the stack needs other sizes than usual
    rated: ClassVar[tuple[str, ...]]  # the figure that stands for all of them, by its path
    unit: ClassVar[str]  # of that one

    def __init__(self, place: Place, launcher: Launcher) -> None:
        self.place = place
        self.launcher = launcher
        self.problems: list[str] = []

    @classmethod
    def missing(cls) -> list[str]:
        return lacking(cls.needs)

    @classmethod
    def rate(cls, figures: Mapping[str, Any]) -> float | None:
        """The figure that stands for all; None: it was not come to."""
        found: Any = figures
        for key in cls.rated:
            found = found.get(key) if isinstance(found, Mapping) else None
        return float(found) if found is not None else None

    @abstractmethod
    def session(self) -> AbstractContextManager[None]:
        """Everything that exercise() needs is there inside."""

    @abstractmethod
    def exercise(self) -> dict[str, Any]:
        """Uses it; figures for people."""

    def expect(self, good: bool, what: str) -> None:
        if not good:
            self.problems.append(what)

    def attempt(self, what: str, do: Callable[..., T], *args: Any) -> T | None:
        """do(*args), whose failure is a problem; None then."""
        try:
            return do(*args)
        except (BenchError, OSError, EOFError, ValueError) as e:
            self.problems.append(f"{what}: {e}")
            return None


class ServerApp(App):
    """A program that listens; a session begins when it does, and ends with it.

    Attributes:
        server: the program, inside a session.
    """

    end_by: ClassVar[signal.Signals] = signal.SIGTERM
    end_codes: ClassVar[tuple[int, ...]] = (0,)
    server: Running

    @abstractmethod
    def argv(self) -> list[str]:
        """Writes what the program needs into the place's folder, and gives its command line."""

    @contextmanager
    def session(self) -> Iterator[None]:
        self.server = self.launcher.start(self.argv(), files=self.files)
        try:
            for grant in self.grants:
                if grant.proto == "tcp" and not grant.remote:
                    self._wait_open(grant.port)
            yield
            self.expect(self.server.alive(), f"{self.name} ended before it was told to")
        finally:
            self.server.end(self.end_by, self.end_codes)
            self.problems += self.server.problems

    def _wait_open(self, port: int) -> None:
        try:
            self.place.wait_open(port, self.server.alive)
            self.launcher.wait_served(port)
        except BypassError as e:
            raise BenchError(f"{self.name}: {e}: {self.server.said()}") from e


def memory_bytes(pids: list[int]) -> int:
    """What these processes use, each page by its share (Pss): what relatives share counts once."""
    total = 0
    for pid in pids:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        match = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
        total += int(match[1]) * 1024 if match else 0
    return total
