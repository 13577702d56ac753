# SPDX-License-Identifier: Apache-2.0
"""Programs on the kernel's sockets and, by the preload library, on the stack's loopback: how they start and end.

With BYPASS_LOOPBACK=1 the library runs a stack of the program's own that talks to itself on 127.0.0.1: no privilege, no
interface. At the exit of each process it adds a line to the file that BYPASS_TRACE_SHARE names: how many of its sockets
were on the stack.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "build/libbypass-preload.so"
CALLS = {"close", "recvmsg", "epoll_wait", "poll", "sendfile", "fork"}  # without these nothing works


def complete() -> bool:
    """The library has the calls that every program makes."""
    if not LIBRARY.exists():
        return False
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", LIBRARY], check=True, capture_output=True, text=True
    ).stdout
    return {line.split()[-1] for line in listed.splitlines()} >= CALLS


SURFACES = ("kernel", "stack") if complete() else ("kernel",)
CLEAN = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD" and not k.startswith("BYPASS_")}


def environment(surface: str, share: Path | None = None, **more: str) -> dict[str, str]:
    """Of a program on that surface. share: where its processes say which sockets were on the stack."""
    if surface == "kernel":
        return CLEAN | more
    traced = {"BYPASS_TRACE_SHARE": str(share)} if share else {}
    return CLEAN | {"LD_PRELOAD": str(LIBRARY), "BYPASS_LOOPBACK": "1"} | traced | more


@dataclass
class Share:
    """Sockets of all processes by place, and why some were the kernel's."""

    processes: int = 0
    tcp_stack: int = 0
    tcp_kernel: int = 0
    udp_stack: int = 0
    udp_kernel: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def stack(self) -> int:
        return self.tcp_stack + self.udp_stack

    @property
    def kernel(self) -> int:
        return self.tcp_kernel + self.udp_kernel

    @property
    def ratio(self) -> float:
        return self.stack / (self.stack + self.kernel) if self.stack + self.kernel else 0.0

    def __str__(self) -> str:
        why = "".join(f"; {n} for: {reason}" for reason, n in self.reasons.most_common())
        return (
            f"TCP {self.tcp_stack} of {self.tcp_stack + self.tcp_kernel}, "
            f"UDP {self.udp_stack} of {self.udp_stack + self.udp_kernel} sockets on the stack: {self.ratio:.1%}{why}"
        )


def read_share(path: Path) -> Share:
    """The sum of what the processes wrote. A file that is not there: no process."""
    share = Share()
    for line in path.read_text().splitlines() if path.exists() else []:
        one = json.loads(line)
        share.processes += 1
        for name in ("tcp_stack", "tcp_kernel", "udp_stack", "udp_kernel"):
            setattr(share, name, getattr(share, name) + one[name])
        share.reasons.update(one.get("reasons", {}))
    return share


@dataclass
class Ended:
    """How a program ended. status: as subprocess tells it; None: it had to be ended."""

    status: int | None
    out: str
    err: str


GRACE_S = 2.0


def _end_orphans(leader: int, over: threading.Event) -> None:
    """Children that outlive the program hold its output open: they have a moment."""
    with suppress(ChildProcessError):  # it was waited for already: then all of its output had come
        os.waitid(os.P_PID, leader, os.WEXITED | os.WNOWAIT)
    if not over.wait(GRACE_S):
        os.killpg(leader, signal.SIGKILL)


def run(
    argv: Sequence[str | Path],
    env: Mapping[str, str],
    limit_s: float,
    cwd: Path | None = None,
    *,
    orphans: bool = True,
) -> Ended:
    """The program from start to end; with its children it is killed when the time is over. orphans: they are waited
    for; else they end a moment after it."""
    command = [str(a) for a in argv]
    over = threading.Event()
    with subprocess.Popen(
        command,
        env=dict(env),
        cwd=cwd,
        text=True,
        errors="backslashreplace",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as program:
        if not orphans:
            threading.Thread(target=_end_orphans, args=(program.pid, over), daemon=True).start()
        try:
            out, err = program.communicate(timeout=limit_s)
            return Ended(program.returncode, out, err)
        except subprocess.TimeoutExpired:
            where = asleep_in(program.pid)
            os.killpg(program.pid, signal.SIGKILL)
            out, err = program.communicate()
            return Ended(None, out, err + where)
        finally:
            over.set()
            if program.poll() is None:
                os.killpg(program.pid, signal.SIGKILL)


def asleep_in(group: int) -> str:
    """What the kernel says the threads of a process group are doing, for the message about one that hangs."""
    lines = []
    for task in Path("/proc").glob("[0-9]*/task/[0-9]*"):
        try:
            if os.getpgid(int(task.parent.parent.name)) == group:
                wchan = (task / "wchan").read_text()
                syscall = (task / "syscall").read_text().split()[:2]
                lines.append(
                    f"{task.parent.parent.name}/{task.name}: asleep in {wchan}, call {' '.join(syscall)}"
                )
        except (ProcessLookupError, FileNotFoundError, PermissionError):
            continue  # it has ended meanwhile
    return "\n".join(["", "hangs:", *lines])
