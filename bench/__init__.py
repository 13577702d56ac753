# SPDX-License-Identifier: Apache-2.0
"""The benchmark: `make bench`, or `python -m bench`. What each figure means: docs/benchmark.md."""
