# SPDX-License-Identifier: Apache-2.0
"""The one thing pyproject.toml cannot say: the extension module is built by cffi.

`make setup` installs the package with BYPASS_PREBUILT=1, because there the Makefile compiles the C core,
file by file and only what has changed.
"""

import os

from setuptools import setup

setup(cffi_modules=[] if os.environ.get("BYPASS_PREBUILT") else ["bypass/_build_core.py:ffibuilder"])
