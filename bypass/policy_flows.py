# SPDX-License-Identifier: Apache-2.0
"""A policy's flows: rules of what was read, and what may not stand together in one.

What lives here: the way from the models of a flow to its `Rule`, and the checks across its fields. What does not: how
each field is read (`policy_fields.py`), conflicts between rules (`rules.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from bypass.access import NO_QUOTA, Allow, Quota
from bypass.policy_fields import (
    NO_ALLOW_MODEL,
    NO_QUOTA_MODEL,
    AllowModel,
    FlowModel,
    MatchModel,
    QuotaModel,
    Wrong,
)
from bypass.policy_yaml import Path
from bypass.rules import ICMP, ICMPV6, TCP, UDP, Rule


def flow_rule(index: int, flow: FlowModel, match: MatchModel, line: int, column: int) -> Rule:
    """The rule of a flow that was checked."""
    return Rule(
        index,
        flow.name,
        match.proto,
        match.local,
        match.local_port,
        match.remote,
        match.remote_port,
        match.vlan,
        flow.action,
        line,
        column,
        _allow(flow.allow),
    )


def quota_of(model: QuotaModel) -> Quota:
    """What a `quota` mapping allows."""
    return NO_QUOTA if model is NO_QUOTA_MODEL else Quota(**model.model_dump())


def _allow(model: AllowModel) -> Allow | None:
    if model is NO_ALLOW_MODEL:
        return None
    return Allow(model.user, model.group, model.ports, quota_of(model.quota))


def across_allow(at: Path, flow: FlowModel) -> Iterator[Wrong]:
    """What is wrong between `allow` and the other fields of a flow."""
    allow, ports = flow.allow, flow.match.local_port
    if allow is NO_ALLOW_MODEL:
        return
    if flow.action != "steer":
        right = "only steer takes flows: leave it out"
        yield Wrong((*at, "allow"), f"nobody uses a {flow.action} rule", right, whole=True)
    if not allow.user and not allow.group:
        yield Wrong((*at, "allow"), "allows nobody", "name user or group", whole=True)
    for part in allow.ports or ():
        if ports is not None and not (ports.first <= part.first and part.last <= ports.last):
            wrong = f"the ports {part} are not all of the rule's, {ports}"
            yield Wrong((*at, "allow", "ports"), wrong, "a part of local_port", whole=True)
            return


def across_match(
    at: Path, match: MatchModel, action: str | None, bad: Collection[Path] = ()
) -> Iterator[Wrong]:
    """What is wrong between the fields of a flow. `bad`: fields that could not be read, seen from the flow."""
    at_match = (*at, "match")
    if not match.model_fields_set and not bad:
        right = "name at least one of " + ", ".join(MatchModel.model_fields)
        yield Wrong(at_match, "an empty match takes every packet", right, whole=True)
    if match.proto not in (TCP, UDP) and ("match", "proto") not in bad:
        for name in ("local_port", "remote_port"):
            if getattr(match, name) is not None:
                yield Wrong(
                    (*at_match, name), "is a port, and only tcp and udp have ports", "say proto: tcp or udp"
                )
    if match.local is not None and match.remote is not None and match.local.version != match.remote.version:
        wrong = f"is IPv{match.remote.version}, but local is IPv{match.local.version}"
        yield Wrong((*at_match, "remote"), wrong, "both of one family")
    for family, proto, other in ((6, ICMP, "icmpv6"), (4, ICMPV6, "icmp")):
        if match.proto == proto and any(
            n is not None and n.version == family for n in (match.local, match.remote)
        ):
            yield Wrong((*at_match, "proto"), f"is not spoken over IPv{family}", other)
    if action == "steer":
        yield from _not_steerable(at_match, match)


def _not_steerable(at: Path, match: MatchModel) -> Iterator[Wrong]:
    """What the stack does not speak yet."""
    if match.proto not in (None, TCP, UDP):
        yield Wrong(
            (*at, "proto"), "cannot be steered", "steer takes tcp and udp; ICMP errors follow their flow"
        )
    for name in ("local", "remote"):
        net = getattr(match, name)
        if net is not None and net.version == 6:
            right = "IPv6 passes to the kernel until the stack speaks it"
            yield Wrong((*at, name), "cannot be steered", right)
    if match.vlan is not None:
        right = "tagged frames pass to the kernel until the stack speaks 802.1Q"
        yield Wrong((*at, "vlan"), "cannot be steered", right)


def what_else(at: Path, item: object, bad: set[Path]) -> list[Wrong]:
    """Errors across the fields of a flow some of whose fields could not be read."""
    match = item.get("match") if isinstance(item, dict) else None
    if not isinstance(item, dict) or not isinstance(match, dict) or ("match",) in bad:
        return []
    rest = MatchModel.model_validate({k: v for k, v in match.items() if ("match", k) not in bad})
    return list(across_match(at, rest, None if ("action",) in bad else item.get("action"), bad))
