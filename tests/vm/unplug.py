# SPDX-License-Identifier: Apache-2.0
"""A device that goes while a program has it: the host takes hot0 away, as a hand takes a card."""

from __future__ import annotations

import os
import time
from pathlib import Path

from inside import HERE, CheckError, check, forked, pci_address, run_bypass, tell

import bypass
from bypass.errors import BypassError

POLICY = Path("/run/hot.yaml")


def hold(out: int) -> None:
    """The child: has a stack on the port until that is gone, and says what it was told."""
    stack = bypass.Stack.from_policy(POLICY)
    os.write(out, b"up\n")
    begin = time.monotonic()
    said = "nothing"
    try:
        while time.monotonic() - begin < 40:
            stack.run(timeout=1)
    except BypassError as e:
        said = f"{type(e).__name__}: {e}, after {time.monotonic() - begin:.1f} s"
    try:
        stack.close()
    except BypassError as e:
        said += f"; at its end: {e}"
    os.write(out, said.encode())


def taken_from_under_a_program() -> None:
    device = pci_address("hot0")
    text = (HERE / "dpdk-virtio.yaml").read_text().replace("fast0", "hot0").replace("0000:00:11.0", device)
    POLICY.write_text(text.replace("queues: 2", "queues: 1").replace("198.51.100", "203.0.115"))
    with forked(hold) as (_, out):
        if out.readline() != b"up\n":
            raise CheckError("no stack on hot0")
        tell(unplug="hot")
        said = out.read().decode()
    check("DeviceGoneError" in said, f"hot0 was taken away: {said}")
    check(not Path(f"/sys/bus/pci/devices/{device}").exists(), f"{device} is gone")
    print(f"guest: bypass nic list: {run_bypass('nic', 'list')}")
    said = run_bypass("nic", "unbind", device, code=2)
    check("no PCI device" in said, f"nothing is left to give back: {said.splitlines()[0]!r}")
