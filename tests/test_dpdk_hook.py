# SPDX-License-Identifier: Apache-2.0
"""Calls of a shared library that come to functions of ours (eth/hook.c): all that are asked for, or none."""

from __future__ import annotations

import ctypes
import errno
from pathlib import Path

import pytest
from c_programs import run
from test_fuzz import dpdk_headers

FLAGS = [
    "-std=gnu11",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-O1",
    "-shared",
    "-fPIC",
    "-Ibypass/include",
    "-Ibypass",
    "-Ibypass/dpdk_backend",
]

CALLER = """
#include <stdlib.h>
#include <unistd.h>
int calls(void) { return getpid() * 1000 + abs(-1); }
"""


class Hook(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("instead", ctypes.c_void_p))


@ctypes.CFUNCTYPE(ctypes.c_int)
def seven() -> int:
    return 7


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)
def nine(_: int) -> int:
    return 9


@pytest.mark.parametrize("binding", ["lazy", "now"])
def test_all_calls_or_none_are_replaced(tmp_path: Path, binding: str) -> None:
    """`now`: the slots are read-only when the library is there (PT_GNU_RELRO)."""
    source, caller, hook = tmp_path / "caller.c", tmp_path / f"lib_{binding}_x.so", tmp_path / "hook.so"
    source.write_text(CALLER)
    link = ["-fno-builtin", "-Wl,-z,relro", f"-Wl,-z,{binding}"]
    run("gcc", "-O1", "-shared", "-fPIC", source, *link, "-o", caller)
    run("gcc", *FLAGS, "bypass/dpdk_backend/eth/hook.c", *dpdk_headers(), "-o", hook)
    calls, hook_calls = ctypes.CDLL(str(caller)).calls, ctypes.CDLL(str(hook)).hook_calls
    hook_calls.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t]
    before = calls()

    def ask(library: str, **names: object) -> int:
        hooks = (Hook * len(names))(
            *(Hook(k.encode(), ctypes.cast(f, ctypes.c_void_p)) for k, f in names.items())
        )
        return int(hook_calls(library.encode(), hooks, len(hooks)))

    assert ask("libnobody_x.so", getpid=seven) == -errno.ENOENT
    assert ask(caller.name, getpid=seven, it_calls_no_such=nine) == -errno.ENOSYS
    assert calls() == before, "half of them were replaced"
    assert ask(caller.name, getpid=seven, abs=nine) == 0
    assert calls() == 7009
