# SPDX-License-Identifier: Apache-2.0
"""Whole ports driven by DPDK: classifier, exception path, and the plug-in that has DPDK in it."""
