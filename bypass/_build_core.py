# SPDX-License-Identifier: Apache-2.0
"""Builds the extension module `bypass._core` from the C core (cffi, out-of-line, API mode).

Two users: the Makefile, which wants the generated C file only (`python bypass/_build_core.py OUT.c`) and
compiles and links by itself, and setuptools (`pip install .`), which takes `ffibuilder` and does everything.

The declarations are those of the public headers, put through the C preprocessor with BYPASS_CDEF defined:
there is no second copy of them in Python.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cffi

PACKAGE = Path(__file__).resolve().parent if "__file__" in globals() else Path("bypass").resolve()
ROOT = PACKAGE.parent
HEADERS = (
    "include/bypass.h",
    "frames.h",
    "afxdp/afxdp.h",
    "sim/sim.h",
    "host.h",
    "app/app.h",
    "app/loop.h",
    "app/inspect.h",
    "fwd/port.h",
    "fwd/fwd.h",
    "dpdk_backend/plugin.h",
    "dpdk_backend/load.h",
    "dpdk_backend/classify.h",
    "dpdk_backend/exception.h",
    "dpdk_backend/filter.h",
)
SOURCES = ("stack/*.c", "app/*.c", "afxdp/*.c", "sim/*.c", "dpdk_backend/*.c", "fwd/port.c", "host.c")
INCLUDE_DIRS = ("include", "stack", ".")

# Calls from C into Python. Only for what is rare: each costs about a microsecond.
CALLBACKS = """
extern "Python" void host_log(void *ctx, int level, const char *msg);
"""


def public_headers() -> list[str]:
    """The headers whose declarations Python sees, in the order in which they are read."""
    return [h for h in HEADERS if (PACKAGE / h).exists()]


def includes() -> str:
    return "".join(f'#include "{h}"\n' for h in public_headers())


def declarations() -> str:
    """The public declarations, without comments, directives and system headers.

    Raises:
        subprocess.CalledProcessError: a header does not preprocess; the compiler has said why.
    """
    cmd = [os.environ.get("CC", "cc"), "-E", "-P", "-DBYPASS_CDEF", "-x", "c", "-"]
    cmd += [f"-I{PACKAGE / d}" for d in INCLUDE_DIRS]
    return subprocess.run(cmd, input=includes(), text=True, check=True, stdout=subprocess.PIPE).stdout


def make_builder() -> cffi.FFI:
    ffi = cffi.FFI()
    ffi.cdef(declarations())
    ffi.cdef(CALLBACKS)
    ffi.set_source(
        "bypass._core",
        includes(),
        sources=sorted(os.path.relpath(p, ROOT) for pattern in SOURCES for p in PACKAGE.glob(pattern)),
        include_dirs=[os.path.relpath(PACKAGE / d, ROOT) for d in INCLUDE_DIRS],
        extra_compile_args=["-std=c11", "-O2", "-g", "-fvisibility=hidden"],
    )
    return ffi


ffibuilder = make_builder()

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python bypass/_build_core.py OUT.c")
    ffibuilder.emit_c_code(sys.argv[1])
