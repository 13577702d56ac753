# SPDX-License-Identifier: Apache-2.0
"""Reads memory of applications for somebody who may not: `python -m bypass.broker.look FD:UID:PID,PID ...`

A program of its own, started by the broker (looks.py) with the memory files open and a pipe as its output: one line of
JSON an application (bypass.observe.Application), then `{"end": true}`. Memory is read by a child without privileges, as
in `bypass conns` of root; this process asks the kernel about sockets of the PIDs, which are what the broker knows, not
what the memory says. Who does not read the pipe costs nobody anything: it ends when its time is over.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path

from bypass.observe import Application, Memory, look, which

TIME_S = 30
MEMORY = 1 << 30  # bytes of its own; memory files are mapped by the child, and shared
NICE = 10
END = json.dumps({"end": True})


def limits() -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(TIME_S)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(NICE)


def one(argument: str) -> Application:
    """FD:UID:PID,PID ..."""
    fd, uid, pids = argument.split(":")
    holders = [int(pid) for pid in pids.split(",") if pid]
    memory = Memory(Path(f"/proc/self/fd/{int(fd)}"), which(os.fstat(int(fd))), int(uid), holders)
    told = look(memory)
    told.uid = int(uid)
    return told


def main(arguments: list[str]) -> int:
    limits()
    try:
        for argument in arguments:
            print(one(argument).model_dump_json(), flush=True)
        print(END, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # who asked has had enough; the exit flushes
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
