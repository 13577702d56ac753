# SPDX-License-Identifier: Apache-2.0
"""Instructions of one request and response on the server's side, the stack alone, counted by callgrind.

The count repeats exactly on one machine and compiler: it is what a change of the stack is judged by.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.programs import BenchError, program

BUDGET = 1000
TOP = 15


def missing() -> str:
    """What is not there; empty: nothing."""
    return "" if shutil.which("valgrind") else "valgrind (apt-get install valgrind)"


def count(operations: int = 10_000, connections: int = 1) -> dict[str, Any]:
    """Runs callgrind_rr under callgrind.

    Args:
        operations: requests to answer.
        connections: requests that each poll finds, one a connection.

    Returns:
        Per request: `per_request`, of it `device` and `program` (the in-memory device, the server's loop), `stack`
        (the rest), and the largest `functions` and `files`.
    """
    answered, functions, files = counted("callgrind_rr", [str(operations), str(connections)])
    total, device, own = sum(functions.values()), files["memport.h"], files["rr_counted.h"]
    return {
        "operations": answered,
        "connections": connections,
        "per_request": total / answered,
        "stack": (total - device - own) / answered,
        "device": device / answered,
        "program": own / answered,
        "functions": {name: n / answered for name, n in functions.most_common(TOP)},
        "files": {name: n / answered for name, n in files.most_common(TOP)},
    }


def counted(name: str, args: Sequence[str]) -> tuple[int, Counter[str], Counter[str]]:
    """Runs a program of the benchmark that toggles what is collected and prints how many operations there were.

    Returns:
        Operations; instructions by function and by source file.

    Raises:
        BenchError: it failed, or valgrind is missing.
    """
    if missing():
        raise BenchError(f"missing: {missing()}")
    with tempfile.TemporaryDirectory(prefix="bypass-bench-") as folder:
        out = Path(folder) / "callgrind.out"
        argv = [
            "valgrind", "--tool=callgrind", "--collect-atstart=no", "--compress-strings=no", "--compress-pos=no",
            f"--callgrind-out-file={out}", program(name), *args,
        ]  # fmt: skip
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BenchError(f"{' '.join(argv)}: {done.stderr.strip()}")
        return int(done.stdout), *self_cost(out.read_text())


def self_cost(text: str) -> tuple[Counter[str], Counter[str]]:
    """Instructions by function (what was inlined counts for the function it is in) and by source file, from
    callgrind's output without compression. https://valgrind.org/docs/manual/cl-format.html"""
    functions: Counter[str] = Counter()
    files: Counter[str] = Counter()
    function = file = ""
    call = False
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals and name == "fn":
            function = value
        elif equals and name in ("fl", "fi", "fe"):
            file = Path(value).name
        elif equals and name == "calls":
            call = True  # the next line is the callee's cost
        elif line[:1].isdigit():
            if not call:
                n = int(line.split()[1])
                functions[function] += n
                files[file] += n
            call = False
    return functions, files
