# SPDX-License-Identifier: Apache-2.0
"""The backends that the same tests run on, and where they differ.

A module or test with `pytest.mark.backends` runs once on AF_XDP and once on DPDK: its `lab` is a veth that the kernel
keeps, or a wire that DPDK reads whole (net_af_packet), and `policy_for()` says the same rules for either. What DPDK
cannot do, or does in another way, stands in DIFFERENCES and nowhere else: such a test has to fail there.
"""

from __future__ import annotations

from bypass.lab import Lab, dpdk_policy

LABS: dict[str, dict[str, bool]] = {"afxdp": {}, "dpdk": {"wire": True}}

DIFFERENCES: dict[str, str] = {
    "test_linux_peer::test_connections_that_the_kernel_held_survive_the_start": (
        "the kernel has its device of the port from bypass: before the start there is no connection to hold"
    ),
    "test_linux_peer::test_a_killed_server_leaves_the_port_to_the_kernel": (
        "the kernel's device of the port goes with the process: nobody answers, until the port is the kernel's again"
    ),
}
"""Of the DPDK backend: a test's name, as `module::test`, and why it cannot pass there."""

PARTS: dict[str, str] = {
    "fragments": "net_af_packet has the kernel join fragments (PACKET_FANOUT_FLAG_DEFRAG) before DPDK sees them",
}
"""Of the DPDK backend: what a test that passes there does not find."""


def finds(lab: Lab, part: str) -> bool:
    """Whether a test finds this one of PARTS on the lab's backend."""
    assert part in PARTS
    return not lab.wire


def policy_for(lab: Lab, text: str) -> str:
    """A policy that was written for AF_XDP, for the lab's backend."""
    return dpdk_policy(text) if lab.wire else text
