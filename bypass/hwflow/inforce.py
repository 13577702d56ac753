# SPDX-License-Identifier: Apache-2.0
"""What of a policy a device does by rules of its own, for `bypass stats`, and what is said where it does none.

hardware_rules: none      no device is asked
                auto      where the device refuses, the program does all of it alone; the reason is told
                required  where the device refuses, the port or interface is not used: one error
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from bypass.errors import BypassError, DeviceError
from bypass.netlink import NetlinkSocket, read_addresses, steerable
from bypass.policy import Policy
from bypass.rules import Address

__all__ = ["InForce", "host_addresses", "wanted"]

log = logging.getLogger("bypass")


@dataclass(frozen=True, slots=True)
class InForce:
    """`rules`: how many the device has. `reason`: what they do; without any: why not."""

    rules: int
    reason: str

    def text(self) -> str:
        return f"{self.rules} rules in hardware: {self.reason}" if self.rules else f"none: {self.reason}"


def wanted(policy: Policy, put: Callable[[], InForce]) -> InForce | None:
    """What put() did to the device, as the policy wants it. None: the policy does not ask for it.

    Raises:
        BypassError: it is required, and put() has raised one.
    """
    how = policy.backend.hardware_rules
    if how == "none":
        return None
    try:
        found = put()
    except BypassError as error:
        if how == "required":
            raise DeviceError(f"backend.hardware_rules is required, and cannot be: {error}") from error
        found = InForce(0, str(error))
    log.info("%s: hardware rules: %s", policy.interface, found.text())
    return found


def host_addresses() -> list[Address]:
    """This host's, in the network namespace of the calling thread."""
    with NetlinkSocket() as requests:
        return list(steerable(read_addresses(requests)))
