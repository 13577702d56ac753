# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the DPDK backend: `python -m bench.dpdk`, `make bench-dpdk`."""
