# SPDX-License-Identifier: Apache-2.0
"""A policy's rules for network hardware, which then chooses queues before any program runs.

    rules.py    fields, masks and levels that both kinds have in common; refusals
    ntuple.py   for the AF_XDP backend: ethtool's rules and hash table, as text and as bytes
    apply.py    puts these on an interface, and takes them off again
    rte.py      for DPDK: rte_flow's patterns and actions, as data and as testpmd's commands

Written from documentation: no device that has such tables was at hand (docs/hardware.md).
"""

from __future__ import annotations

from bypass.hwflow.ntuple import NtupleRule, Plan, plan
from bypass.hwflow.rte import RteRule, rte_rules
from bypass.hwflow.rules import HardwareRule, Translation, translate

__all__ = ["HardwareRule", "NtupleRule", "Plan", "RteRule", "Translation", "plan", "rte_rules", "translate"]
