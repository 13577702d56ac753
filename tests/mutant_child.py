# SPDX-License-Identifier: Apache-2.0
"""Runs tests and scripts on mutants, each in a child of this process, which imported before what all of them need.

Started by mutants.py, in the root of the project. A line of stdin is a run: JSON of [folder of _core.so, file for what
is said, arguments of pytest], or of the oracle's where `oracle` comes first. A line of stdout is its exit code, -N of a
child that died by signal N. The core, and all that imports it, is imported in the child only: it is another one each
time.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import io
import json
import multiprocessing.connection
import os
import sys
import uuid
from pathlib import Path

import _cffi_backend
import hypothesis.stateful
import hypothesis.strategies
import pytest
import yaml

sys.path.insert(0, str(Path.cwd()))  # as `python -m pytest` does

import bypass.policy

IMPORTED = (argparse, ctypes, multiprocessing.connection, uuid, _cffi_backend, hypothesis.stateful, yaml)


def run(first: str, *rest: str) -> int:
    if first != "oracle":
        return int(pytest.main([first, *rest]))
    import oracle

    return oracle.main(list(rest))


def child(folder: str, said: str, args: list[str]) -> int:
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    bypass.__path__.insert(0, folder)  # what BYPASS_BUILD does
    code = run(*args)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def main() -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pytest.main(["--noconftest", "--version", "--version"])  # imports the plug-ins
    assert "bypass._core" not in sys.modules
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os._exit(child(*json.loads(line)))
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
