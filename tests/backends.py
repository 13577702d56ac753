# SPDX-License-Identifier: Apache-2.0
"""The backends that the same tests run on, and where they differ.

A module or test with `pytest.mark.backends` runs once on AF_XDP and once on DPDK: its `lab` is a veth that the kernel
keeps, or a wire that DPDK reads whole (net_af_packet), and `policy_for()` says the same rules for either. One with a
`mode` runs in both of AF_XDP, and in the one that DPDK has: a port has one owner, which is like `shared`. What DPDK
cannot do, or does in another way, stands in DIFFERENCES and nowhere else: such a test has to fail there.

`pytest.mark.backends(asked=True)` is for what says little more on the second backend than other tests do: it runs there
when it is asked for, by `make test-backends`, which writes the results of both side by side (tests/side_by_side.py).
"""

from __future__ import annotations

import os
import socket

import pytest

from bypass import libbpf
from bypass.lab import SERVER_IFNAME, Lab, dpdk_policy

LABS: dict[str, dict[str, bool]] = {"afxdp": {}, "dpdk": {"wire": True}}
MODES = {"afxdp": ("direct", "shared"), "dpdk": ("shared",)}
ALL = "BYPASS_BACKENDS" in os.environ
"""Whether the tests run on DPDK too that do so when asked."""

DIFFERENCES: dict[str, str] = {
    "test_broker_shared::test_without_bypass_fwd_the_kernel_has_everything": (
        "the kernel's device of the port goes with bypass-fwd: nobody answers, until the next start"
    ),
    "test_linux_peer::test_connections_that_the_kernel_held_survive_the_start": (
        "the kernel has its device of the port from bypass: before the start there is no connection to hold"
    ),
    "test_linux_peer::test_a_killed_server_leaves_the_port_to_the_kernel": (
        "the kernel's device of the port goes with the process: nobody answers, until the port is the kernel's again"
    ),
}
"""Of the DPDK backend: a test's name, as `module::test`, and why it cannot pass there."""

PARTS: dict[str, str] = {
    "fail-open": (
        "when bypass-fwd ends, or is killed, so does the kernel's device of the port: the kernel serves nobody there, "
        "and resets nothing, until the next start"
    ),
    "fragments": "net_af_packet has the kernel join fragments (PACKET_FANOUT_FLAG_DEFRAG) before DPDK sees them",
}
"""Of the DPDK backend: what a test that passes there does not find."""


def parametrize(metafunc: pytest.Metafunc) -> None:
    """The backends, and the modes, of a test that is marked."""
    marker = metafunc.definition.get_closest_marker("backends")
    if not marker or "lab" not in metafunc.fixturenames:
        return
    labs = LABS if ALL or not marker.kwargs.get("asked") else {"afxdp": LABS["afxdp"]}
    if "mode" in metafunc.fixturenames:
        each = [pytest.param(labs[b], mode, id=f"{b}-{mode}") for b in labs for mode in MODES[b]]
        metafunc.parametrize(("lab", "mode"), each, indirect=["lab"])
    else:
        metafunc.parametrize("lab", list(labs.values()), ids=list(labs), indirect=True)


def of(item: pytest.Item) -> str | None:
    """The backend that a test runs on; None: it is of one backend only, or of none."""
    callspec = getattr(item, "callspec", None)
    if callspec is None or not item.get_closest_marker("backends"):
        return None
    return next((name for name, lab in LABS.items() if lab == callspec.params.get("lab")), None)


def finds(lab: Lab, part: str) -> bool:
    """Whether a test finds this one of PARTS on the lab's backend."""
    assert part in PARTS
    return not lab.wire


def policy_for(lab: Lab, text: str) -> str:
    """A policy that was written for AF_XDP, for the lab's backend."""
    return dpdk_policy(text) if lab.wire else text


def has_it(lab: Lab) -> bool:
    """In the server's namespace: whether the interface, or the port, is bypass's."""
    if lab.wire:
        return SERVER_IFNAME in {name for _, name in socket.if_nameindex()}
    return libbpf.xdp_attached(socket.if_nametoindex(SERVER_IFNAME)) is not None
