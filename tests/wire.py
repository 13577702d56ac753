# SPDX-License-Identifier: Apache-2.0
"""Frames byte by byte: bypass.testing.wire, under the short name that the suite has for it."""

from bypass.testing.wire import *  # noqa: F403
