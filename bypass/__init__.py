# SPDX-License-Identifier: Apache-2.0
"""bypass: chosen flows of a shared NIC, served by a TCP/IP stack in user space.

The names below are imported when they are first used, so that `import bypass` (and with it every command) stays
quick and works where the C core has not been built.

BYPASS_BUILD in the environment names a folder whose `_core` extension is used in place of the package's own: a
build with asserts or sanitizers.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if os.environ.get("BYPASS_BUILD"):
    __path__.insert(0, os.environ["BYPASS_BUILD"])

# name -> module that defines it
_EXPORTS = {
    "BypassError": "bypass.errors",
    "DeviceError": "bypass.errors",
    "DeviceGoneError": "bypass.errors",
    "ForeignProgramError": "bypass.errors",
    "LabError": "bypass.errors",
    "PolicyError": "bypass.errors",
    "PrivilegeError": "bypass.errors",
    "Stack": "bypass.stack_api",
    "SteeringError": "bypass.errors",
}

__all__ = [
    "BypassError",
    "DeviceError",
    "DeviceGoneError",
    "ForeignProgramError",
    "LabError",
    "PolicyError",
    "PrivilegeError",
    "Stack",
    "SteeringError",
    "__version__",
]

if TYPE_CHECKING:
    from bypass.errors import BypassError as BypassError
    from bypass.errors import DeviceError as DeviceError
    from bypass.errors import DeviceGoneError as DeviceGoneError
    from bypass.errors import ForeignProgramError as ForeignProgramError
    from bypass.errors import LabError as LabError
    from bypass.errors import PolicyError as PolicyError
    from bypass.errors import PrivilegeError as PrivilegeError
    from bypass.errors import SteeringError as SteeringError
    from bypass.stack_api import Stack as Stack


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module 'bypass' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
