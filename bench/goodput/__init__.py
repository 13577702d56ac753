# SPDX-License-Identifier: Apache-2.0
"""Goodput under impairment: this stack and Linux over one wire in user space. `python -m bench.goodput`."""
