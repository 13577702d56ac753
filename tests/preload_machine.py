# SPDX-License-Identifier: Apache-2.0
"""Two processes that are told the same calls: one on the kernel's sockets, one preloaded, which talks to itself.

Both are tests/c/preload_agent.c, each in a network namespace of its own with nothing but a loopback. The calls are
drawn by tests/test_preload_machine.py; here is what both worlds are, how they come to rest, and what is the same.

What the machine compares exactly: values, errnos, bytes (by a digest), flags, numbers of descriptors, their flags,
readiness, queues, names, states, events of epoll, SIGPIPEs. What it cannot: a port that nobody asked for is "chosen";
the order of epoll's events; and how much fits into a buffer. After each call it waits until both worlds look alike, so
that the next call finds the same in both; if they do not within PATIENCE_S, they differ.

    python tests/preload_machine.py FILE    # the calls of a failure's log, anew, beside each other
"""

from __future__ import annotations

import os
import re
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))

from c_programs import CFLAGS  # noqa: E402
from c_programs import run as build  # noqa: E402
from preloaded import SURFACES, asleep_in, environment  # noqa: E402

CONTROL, PROCESSES, FDS = 900, 4, 60  # as in preload_agent.h
PORTS = (5001, 5002)  # the namespaces are new for each example: nobody else has them
PATIENCE_S = 3.0
LIMIT_S = 20.0  # of a call that must not sleep
ALONE = ("unshare", "--net") if os.geteuid() == 0 else ("unshare", "--user", "--map-root-user", "--net")
OTHER = SURFACES[-1]  # what the kernel is compared with: itself where there is no preload library


class Different(AssertionError):
    """The two worlds gave not the same."""


class Stuck(AssertionError):
    """A call that must not sleep did not come back."""


@lru_cache
def agent(folder: Path) -> Path:
    out = folder / "preload_agent"
    build("gcc", *CFLAGS, "-O1", "-pthread", "tests/c/preload_agent.c", "tests/c/preload_calls.c", "-o", out)
    return out


def normal(text: str) -> str:
    """An answer in words that hold in both worlds."""
    known = {str(p) for p in (0, *PORTS)}
    text = re.sub(
        r"(=\d+\.\d+\.\d+\.\d+:)(\d+)", lambda m: m[1] + (m[2] if m[2] in known else "chosen"), text
    )
    return re.sub(r" pid=\d+", "", text)


def state_of(pid: int) -> str | None:
    """As proc(5) has it: "Z" of one that has ended and was not waited for; None: it is gone."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return None


@dataclass
class World:
    """One agent with its children."""

    surface: str
    program: Path
    env: dict[str, str] = field(default_factory=dict)
    controls: dict[int, socket.socket] = field(default_factory=dict)
    pids: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._stderr: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        theirs = []
        for n in range(PROCESSES):
            mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            os.dup2(other.fileno(), CONTROL + n, inheritable=True)
            other.close()
            mine.settimeout(LIMIT_S)
            self.controls[n] = mine
            theirs.append(CONTROL + n)
        env = environment(self.surface) | self.env
        behind = [f"{k}={v}" for k, v in env.items() if k.startswith(("BYPASS_", "LD_PRELOAD"))]
        before = {k: v for k, v in env.items() if not k.startswith(("BYPASS_", "LD_PRELOAD"))}
        inside = ["sh", "-c", 'ip link set lo up && exec "$@"', "sh", "env", *behind, str(self.program), "0"]
        try:
            self._process = subprocess.Popen(
                [*ALONE, *inside],
                env=before,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=theirs,
                start_new_session=True,
            )
        finally:
            for fd in theirs:
                os.close(fd)
        self.pids[0] = self._process.pid
        self.expect(0, "ready")

    # ---- Talking
    def receive(self, n: int) -> str:
        try:
            text = self.controls[n].recv(1 << 17).decode()
        except TimeoutError:
            raise Stuck(
                f"{self.surface}: process {n} does not answer{asleep_in(self._process.pid)}"
            ) from None
        if not text:
            self._stderr.seek(0)
            raise Stuck(f"{self.surface}: process {n} has ended; it said: {self._stderr.read()}")
        return text

    def expect(self, n: int, text: str) -> None:
        got = self.receive(n)
        assert got == text, f"{self.surface}: {got!r} instead of {text!r}"

    def tell(self, n: int, command: str) -> None:
        try:
            self.controls[n].send(command.encode())
        except OSError as e:
            self._stderr.seek(0)
            raise Stuck(
                f"{self.surface}: process {n} has ended ({e}); it said: {self._stderr.read()}"
            ) from None

    def ask(self, n: int, command: str) -> str:
        """The answer to one command; @N in it is the port of descriptor N. What changes processes is done at once."""
        word = command.split()[0]
        if "@" in command:
            command = re.sub(
                r"@(\d+)", lambda m: self.ask(n, f"getsockname {m[1]}").rpartition(":")[2], command
            )
        if word == "fork":
            return self._fork(n, int(command.split()[1]))
        self.tell(n, command)
        if word == "exec":
            self.expect(n, "ready")
            return "0 0 0"
        if word == "exit":
            return self._gone(n)
        return self.receive(n)

    # ---- Processes
    def _fork(self, n: int, child: int) -> str:
        self.tell(n, f"fork {child}")
        answer, other = self.receive(n), self.receive(child)  # both come back from fork()
        self.pids[child] = int(re.findall(r"pid=(\d+)", answer)[0])
        assert normal(answer) == other, f"fork: {answer!r} and {other!r}"
        return answer

    def kill(self, n: int) -> str:
        os.kill(self.pids[n], 9)
        return self._gone(n)

    def _gone(self, n: int) -> str:
        """Waits for the end of process n. Its number is not used again."""
        pid = self.pids.pop(n)
        self.tell(0, f"wait {pid}")
        self.receive(0)  # ECHILD where it was not a child of the first process
        end = time.monotonic() + LIMIT_S
        while state_of(pid) not in ("Z", None) and time.monotonic() < end:
            time.sleep(0.001)
        return "0 0 0"

    def close(self) -> None:
        for control in self.controls.values():
            control.close()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, 9)
        self._process.wait()
        self._stderr.close()


@dataclass
class Both:
    """The two worlds, and all that was told to them."""

    kernel: World
    other: World
    log: list[str] = field(default_factory=list)
    tables: dict[int, dict[int, dict[str, str]]] = field(
        default_factory=dict
    )  # process: number: what is seen of it

    def before(self) -> str:
        return "\n".join(["; before:", *self.log])

    def ask(self, n: int, command: str) -> str:
        """One command in both worlds; the answer, which has to be the same."""
        self.log.append(f"{n} {command}")
        theirs = normal(self.kernel.ask(n, command))
        self.log[-1] += f"  # {theirs.partition(chr(10))[0]}"
        try:
            mine = normal(self.other.ask(n, command))
        except Stuck as e:
            raise Stuck(f"{e}{self.before()}") from None
        if mine != theirs:
            raise Different(f"{command}: {mine!r} here, {theirs!r} on Linux{self.before()}")
        return mine

    def ask_each(self, n: int, command: str) -> tuple[str, str]:
        """Where the answers may differ: (Linux', ours)."""
        self.log.append(f"{n} {command}")
        answers = self.kernel.ask(n, command), self.other.ask(n, command)
        self.log[-1] += f"  # {answers[0]} / {answers[1]}"
        return answers

    def drain(self, n: int, fd: int, most: Sequence[int] = (1 << 62, 1 << 62)) -> list[int]:
        """Reads until nothing more comes, or so much came: how many bytes (on Linux, here)."""
        self.log.append(f"{n} drain {fd}")
        sums = [0, 0]
        for i, world in enumerate((self.kernel, self.other)):
            while sums[i] < most[i] and world.ask(n, f"poll {fd} {select.POLLIN} 2000").startswith("1 "):
                got = world.ask(n, f"drain {fd}")
                sums[i] += int(got.rpartition("=")[2])
                if got.startswith("0 "):
                    break  # the end of the stream
        return sums

    def kill(self, n: int) -> None:
        self.log.append(f"{n} killed")
        for world in (self.kernel, self.other):
            world.kill(n)

    def rest(self) -> None:
        """Waits until both worlds look alike; then `tables` is what is there."""
        for n in sorted(self.kernel.pids):
            end = time.monotonic() + PATIENCE_S
            while True:
                theirs, mine = (normal(w.ask(n, "look")) for w in (self.kernel, self.other))
                if theirs == mine:
                    break
                if time.monotonic() > end:
                    lines = set(theirs.splitlines()) ^ set(mine.splitlines())
                    seen = "\n".join(f"{'Linux' if x in theirs else 'here '}: {x}" for x in sorted(lines))
                    raise Different(f"process {n} sees\n{seen}{self.before()}")
                time.sleep(0.002)
            self.tables[n] = table_of(mine)
        for n in [n for n in self.tables if n not in self.kernel.pids]:
            del self.tables[n]

    def close(self) -> None:
        self.kernel.close()
        self.other.close()


def table_of(look: str) -> dict[int, dict[str, str]]:
    """{number: {"kind": "s", "ready": "4", ...}} of the answer to "look"."""
    table = {}
    for line in look.splitlines()[1:]:
        number, *words = line.split()
        table[int(number)] = dict(w.split("=", 1) for w in words)
    return table


def both(program: Path, other: str = OTHER, **env: str) -> Both:
    """Both worlds, just begun. env: of the other one alone."""
    kernel = World("kernel", program)
    try:
        return Both(kernel, World(other, program, env))
    except BaseException:
        kernel.close()
        raise


def replay(lines: list[str], program: Path) -> list[str]:
    """The calls of a log, one after another; what differed. A line is "PROCESS COMMAND"; behind # stands nothing."""
    found = []
    sleeps = False
    worlds = both(program)
    try:
        for line in lines:
            n, _, command = line.partition("#")[0].strip().partition(" ")
            if command == "killed":
                worlds.kill(int(n))
                continue
            if command.startswith("drain"):
                worlds.drain(int(n), int(command.split()[1]))
                continue
            answers = [normal(w.ask(int(n), command)) for w in (worlds.kernel, worlds.other)]
            print(f"{n} {command}: {answers[0]}")
            if command.startswith("flood"):  # until there is no room: a buffer's size
                continue
            if command.startswith(("go", "end")):
                sleeps = command.startswith("go") or answers[0] == "asleep"
            if answers[0] != answers[1]:
                found.append(f"{n} {command}: {answers[0]!r} on Linux, {answers[1]!r} here")
            if sleeps:  # to look is to drive the stack, and might wake who has to be woken otherwise
                continue
            try:
                worlds.rest()
            except Different as e:
                found.append(f"{n} {command}: {str(e).partition('; before')[0]}")
                break
    except Stuck as e:
        found.append(f"{n} {command}: {e}")
    finally:
        worlds.close()
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = replay(
            [x for x in Path(sys.argv[1]).read_text().splitlines() if x.strip()], agent(Path(folder))
        )
    print("\n".join(["", "different:", *found] if found else ["no difference"]))
    sys.exit(bool(found))
