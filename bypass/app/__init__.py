# SPDX-License-Identifier: Apache-2.0
"""Applications: what programs that were never compiled for bypass need to run on it, and where it is installed.

The contract of applications and broker is app.h; the broker is bypass.broker.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from bypass.errors import BypassError

__all__ = ["forwarder_program", "linger_program", "preload_library"]

PRELOAD = "libbypass-preload.so"
LINGER = "bypass-linger"
FORWARDER = "bypass-fwd"
TREE = Path(__file__).resolve().parents[2]


def preload_library() -> Path:
    """The library that LD_PRELOAD takes: of the source tree, where this is one, else where `make install` puts it.

    Raises:
        BypassError: it is nowhere.
    """
    return _find(PRELOAD, "lib", "BYPASS_PRELOAD")


def linger_program() -> Path:
    """The program that drives an application's stack on when its last process has ended.

    Raises:
        BypassError: it is nowhere.
    """
    return _find(LINGER, "lib/bypass", "BYPASS_LINGER")


def forwarder_program() -> Path:
    """bypass-fwd, which outlives brokers.

    Raises:
        BypassError: it is nowhere.
    """
    return _find(FORWARDER, "lib/bypass", "BYPASS_FWD")


def _find(name: str, folder: str, variable: str) -> Path:
    places = [TREE / "build" / name, Path(sys.prefix) / folder / name]
    places += [Path(prefix) / folder / name for prefix in ("/usr/local", "/usr")]
    if variable in os.environ:
        places = [Path(os.environ[variable])]
    for place in places:
        if place.is_file():
            return place
    where = ", ".join(str(place.parent) for place in places)
    raise BypassError(f"{name} is not here ({where}): build it by `make build`, install it by `make install`")
