# SPDX-License-Identifier: Apache-2.0
"""What an AF_XDP backend does with an interface's own rules: `backend: {queues: [3], hardware_rules: auto}`.

    in force      sockets on these queues; the hash table of the interface leaves them out
    not in force  sockets on all queues, as without the field: nothing may depend on the hardware

The steering program judges each packet either way.
"""

from __future__ import annotations

import logging

from bypass.afxdp import interface_queues
from bypass.errors import DeviceError
from bypass.hwflow.held import Held, found, recover
from bypass.hwflow.inforce import InForce, host_addresses, wanted
from bypass.hwflow.ntuple import Plan, plan
from bypass.hwflow.rules import translate
from bypass.policy import Policy

__all__ = ["InterfaceRules", "plan_of"]

log = logging.getLogger("bypass")
CHECK_NS = 1_000_000_000


def plan_of(policy: Policy) -> Plan:
    """The rules of a policy for its interface as it is now, in the network namespace of the calling thread.

    Raises:
        PolicyError: they are too many. DeviceError: the interface has no queue beside those of the stack.
    """
    ours = policy.afxdp.queues or ()
    rings = interface_queues(policy.interface)
    return plan(
        translate(policy, addresses=host_addresses()),
        policy.interface,
        stack=ours,
        kernel=[q for q in range(rings) if q not in ours],
    )


class InterfaceRules:
    """The rules of a policy in its interface's hardware, if it wants them and they can be had. What a process that
    was killed has left there is taken off in any case.

    Args:
        policy: of kind afxdp.
        keeper: the process with whose end they are nobody's; None: this one.
        left: a broker was killed, and we go on with what its keeper has.

    Attributes:
        in_force: what is in force; None: the policy does not want any.
        backend: the policy's, with the queues that sockets have to be on.

    Raises:
        DeviceError: they are required, and cannot be.
    """

    def __init__(self, policy: Policy, keeper: int | None = None, *, left: bool = False) -> None:
        self._policy, self._keeper = policy, keeper
        self._held: Held | None = None
        self._trouble = ""  # said already
        self.due_ns = 0  # when check() looks again
        self._recover()
        if left and found(policy.interface) is None:
            why = InForce(0, "the broker that was killed went on without")
            self.in_force = None if policy.backend.hardware_rules == "none" else why
        elif left:
            self.in_force = self._go_on()
        else:
            self.in_force = wanted(policy, self._put)
        self.backend = policy.afxdp
        if self.in_force is not None and self._held is None:
            self.backend = policy.afxdp.on_all(interface_queues(policy.interface))

    def _recover(self) -> None:
        ifname = self._policy.interface
        try:
            if recover(ifname):
                log.warning("%s: rules of a process that was killed are taken off its hardware", ifname)
        except DeviceError as error:
            if self._policy.backend.hardware_rules == "required":
                raise
            log.error("%s: rules of a process that was killed stay in its hardware: %s", ifname, error)

    def _put(self) -> InForce:
        made = plan_of(self._policy)
        self._held = Held(made, self._keeper)
        return _told(made)

    def _go_on(self) -> InForce:
        """Its applications use these queues: where the rules of our policy are refused, those before stay."""
        made = plan_of(self._policy)
        try:
            self._held = Held(made, self._keeper)
        except DeviceError as error:
            log.error("%s: hardware rules stay as the broker before had them: %s", made.ifname, error)
            self._held = Held(made, self._keeper, exchange=False)
        return _told(made)

    def exchange(self, policy: Policy) -> None:
        """Another policy for the same queues. DeviceError: the interface refuses it, and has what it had."""
        if self._held is not None:
            made = plan_of(policy)
            self._held.exchange(made)
            self.in_force = _told(made)
        self._policy = policy

    def check(self, now_ns: int) -> None:
        """Now and then: the device may have forgotten rules, when it was down, say. These are put on again."""
        if self._held is None or now_ns < self.due_ns:
            return
        self.due_ns = now_ns + CHECK_NS
        try:
            again = self._held.check()
        except DeviceError as error:
            if str(error) != self._trouble:
                log.error(
                    "%s: rules in hardware are gone, and cannot be put on again: %s", self._held.ifname, error
                )
            self._trouble = str(error)
            return
        self._trouble = ""
        if again:
            log.warning("%s: put on its hardware again: %s", self._held.ifname, ", ".join(again))

    @property
    def held(self) -> bool:
        """Rules are in force."""
        return self._held is not None

    def close(self) -> None:
        """The interface is as it was. What it refuses is told, and tried again by the next who uses it."""
        held, self._held = self._held, None
        if held is not None:
            try:
                held.close()
            except DeviceError as error:
                log.error("%s", error)


def _told(made: Plan) -> InForce:
    drops = sum(r.target is None for r in made.rules)
    ours, theirs = (", ".join(map(str, queues)) for queues in (made.stack, made.kernel))
    dropped = f"{drops} drop; " if drops else ""
    return InForce(len(made.rules), f"{dropped}steered flows on queues {ours}, the rest on {theirs}")
