# SPDX-License-Identifier: Apache-2.0
"""What `bypass nic rules` prints."""

from __future__ import annotations

import ipaddress
import json
from dataclasses import asdict
from typing import Any

from bypass.cli.ask import ask_all
from bypass.errors import BypassError, DeviceError
from bypass.hwflow import Plan, Translation, plan, rte_rules, translate
from bypass.hwflow.offered import offered
from bypass.policy import Policy, load_policy
from bypass.rules import PROTOCOLS, Address
from bypass.steer_maps import BLOCK, Endpoint

MOST_ENTRIES = 1_000_000


def lines(
    file: str,
    form: str | None,
    as_json: bool,
    *,
    queues: tuple[int, ...] | None,
    kernel_queues: tuple[int, ...] | None,
    vf: int | None,
    addresses: tuple[str, ...],
    live: bool,
    first: int,
    undo: bool,
    group: int,
    port: int,
    limit: int,
) -> tuple[list[str], list[str]]:
    """(commands or JSON; what is left to the program, and whether the device has rules).

    Raises:
        BypassError: the policy is wrong, needs too many rules, or the queues are not known.
    """
    policy = load_policy(file)
    form = form or ("rte_flow" if policy.backend.kind == "dpdk" else "ethtool")
    translation = translate(
        policy,
        live=endpoints(policy.interface) if live else None,
        addresses=local_addresses(policy, addresses),
        limit=limit,
        by_rule=form == "rte_flow",
    )
    stack = queues or stack_queues(policy, vf)
    if form == "rte_flow":
        made = _rte(policy, translation, stack, kernel_queues or (), vf, group, port, as_json)
    else:
        theirs = kernel_queues or _others(policy.interface, () if vf is not None else stack)
        made = _ethtool(
            plan(translation, policy.interface, stack=stack, kernel=theirs, vf=vf), first, undo, as_json
        )
    return made, [*(p.text(policy.path) for p in translation.left), _offer(policy, form)]


def _offer(policy: Policy, form: str) -> str:
    if form == "rte_flow" and policy.backend.kind != "dpdk":
        return f"{policy.interface}: its rules of rte_flow are a DPDK driver's"
    offer = offered(policy)
    where = policy.interface if policy.backend.kind == "afxdp" else "the port"
    return f"{where}: {'no rules: ' if offer.has is False else ''}{offer.text}"


def _rte(
    policy: Policy,
    translation: Translation,
    stack: tuple[int, ...],
    kernel: tuple[int, ...],
    vf: int | None,
    group: int,
    port: int,
    as_json: bool,
) -> list[str]:
    tag = policy.backend.vlan if policy.backend.kind == "dpdk" else None
    rules = rte_rules(translation, stack, vf=vf, kernel_queues=kernel, group=group, port_vlan=tag)
    if not as_json:
        return [r.testpmd(port) for r in rules]
    found = [
        {
            **asdict(r),
            "pattern": [{"kind": i.kind, "spec": i.spec.hex(), "mask": i.mask.hex()} for i in r.pattern],
            "testpmd": r.testpmd(port),
        }
        for r in rules
    ]
    return [json.dumps({"rules": found}, indent=2)]


def _ethtool(made: Plan, first: int, undo: bool, as_json: bool) -> list[str]:
    commands = made.undo_commands(first) if undo else made.commands(first)
    if as_json:
        about = {"interface": made.ifname, "stack": made.stack, "kernel": made.kernel, "commands": commands}
        return [json.dumps(about, indent=2)]
    if made.context:
        return [
            "# The new RSS context is taken to be number 1: the first command with `context` tells.",
            *commands,
        ]
    return commands


def stack_queues(policy: Policy, vf: int | None) -> tuple[int, ...]:
    """As the policy has them. DeviceError: it has not."""
    backend = policy.backend
    if backend.kind == "dpdk":
        return tuple(range(backend.queues))
    if vf is not None:
        return (0,)
    if backend.queues is None:
        raise DeviceError(
            "which queues are the stack's? The policy takes all: --queues 3, or backend: {queues: [3]}"
        )
    return backend.queues


def _others(ifname: str, stack: tuple[int, ...]) -> tuple[int, ...]:
    """The interface's queues beside the stack's. DeviceError: there is no such interface to ask."""
    from bypass import nic

    try:
        facts = nic.read(ifname, around=False)
    except DeviceError as error:
        raise DeviceError(f"which queues are the kernel's? --kernel-queues 0-2 ({error})") from error
    return tuple(q for q in range(facts.rx_queues) if q not in stack)


def local_addresses(policy: Policy, said: tuple[str, ...]) -> list[Address] | None:
    """Those that were said; else the port's of the policy, or the interface's. None: nobody knows."""
    if said:
        try:
            return [ipaddress.ip_address(a) for a in said]
        except ValueError as error:
            raise BypassError(f"--address: {error}") from error
    if policy.backend.kind == "dpdk":
        return [a.ip for a in policy.backend.addresses] or None
    from bypass.netlink import NetlinkSocket, read_addresses, read_interface, steerable

    with NetlinkSocket() as requests:
        try:
            read_interface(requests, policy.interface)
        except DeviceError:
            return None
        return list(steerable(read_addresses(requests)))


def endpoints(ifname: str) -> list[Endpoint]:
    """What sockets own now, of all processes that steer flows of the interface. BypassError: there is none."""
    return [entry(e) for answer in ask_all("flows", ifname, MOST_ENTRIES) for e in answer["entries"]]


def entry(e: dict[str, Any]) -> Endpoint:
    """As `bypass flows --json` has it."""
    return Endpoint(
        e["entry"],
        PROTOCOLS[e["proto"]],
        None if e["local"] is None else ipaddress.IPv4Address(e["local"]),
        e["local_port"],
        None if e["remote"] is None else ipaddress.IPv4Address(e["remote"]),
        e["remote_port"],
        0,
        e["drain"],
        e["last_local_port"] - e["local_port"] + 1 == BLOCK,
    )
