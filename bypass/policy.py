# SPDX-License-Identifier: Apache-2.0
"""The policy: which flows of an interface may be taken, by which backend.

What lives here: the policy's language (its fields, what each may hold, what an error says), its JSON Schema, and the
result, `Policy`. What does not: YAML and places in it (`policy_yaml.py`), ranks and compilation (`rules.py`).

    version: 1
    interface: eth1
    backend: {kind: afxdp, mode: auto, queues: all}
    flows:
      - name: web
        match: {proto: tcp, local: 192.0.2.10, local_port: 8080, remote: 198.51.100.0/24}
        action: steer

A policy is good as a whole or refused as a whole: all errors are found at once, each with line and column.
"""

from __future__ import annotations

import difflib
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from bypass.access import NO_QUOTA, Allow, Quota
from bypass.errors import DeviceError, PolicyError, Problem
from bypass.policy_backend import (
    AfxdpBackend,
    DpdkBackend,
    EalOptions,
    across_head,
    has_port_vlan,
    read_backend,
)
from bypass.policy_fields import (
    BACKENDS,
    NO_ALLOW_MODEL,
    NO_QUOTA_MODEL,
    TEXTS,
    AfxdpModel,
    AllowModel,
    DpdkModel,
    EalModel,
    FlowModel,
    HeadModel,
    MatchModel,
    Mode,
    QuotaModel,
    RouteModel,
    StackModel,
    Wrong,
    backend_kind,
    policy_schema,
)
from bypass.policy_values import MAX_RULES
from bypass.policy_yaml import (
    Document,
    Oddity,
    Path,
    Place,
    no_garbage_collection,
    path_text,
    read_yaml,
    scalar_text,
    shown,
)
from bypass.profiles import NO_OPTIONS, Profile, StackOptions, resolve
from bypass.rules import (
    ICMP,
    ICMPV6,
    MAX_PROBLEMS,
    TCP,
    UDP,
    Address,
    CompiledRules,
    PortRange,
    Rule,
    check_conflicts,
    compile_rules,
)

__all__ = [
    "AfxdpBackend",
    "DpdkBackend",
    "EalOptions",
    "Mode",
    "Policy",
    "PortRange",
    "Profile",
    "Rule",
    "StackOptions",
    "load_policy",
    "parse_policy",
    "policy_schema",
    "require_visible_vlans",
]

MAX_FILE_BYTES = 256 << 20


@dataclass(frozen=True)
class Policy:
    """A policy that was checked. Rules are in file order, `flows[i].index == i`.

    Attributes:
        backend: how frames reach the stack; `afxdp` and `dpdk` are the same where its kind is known.
        profile: what the stack is tuned for; None: nothing in particular.
        stack: sizes and times of the stack, the profile's where the policy names none.
        congestion: the congestion control of sockets that choose none; None: the stack's default.
        mode: `direct`: one application at a time uses the interface; `shared`: several.
        quota: what an application may have.
        cpus, numa: where applications run, and where their memory lies; None: as they were started.
    """

    version: int
    interface: str
    backend: AfxdpBackend | DpdkBackend
    flows: tuple[Rule, ...]
    path: str
    profile: Profile | None = None
    stack: StackOptions = NO_OPTIONS
    congestion: str | None = None
    mode: Literal["direct", "shared"] = "direct"
    quota: Quota = NO_QUOTA
    cpus: tuple[int, ...] | None = None
    numa: int | None = None

    @property
    def afxdp(self) -> AfxdpBackend:
        """The backend, for those who can use no other.

        Raises:
            DeviceError: it is another.
        """
        if isinstance(self.backend, AfxdpBackend):
            return self.backend
        raise DeviceError(
            f"{self.path}: backend.kind is {self.backend.kind}: this works with kind: afxdp only"
        )

    @property
    def dpdk(self) -> DpdkBackend:
        """As `afxdp`."""
        if isinstance(self.backend, DpdkBackend):
            return self.backend
        raise DeviceError(
            f"{self.path}: backend.kind is {self.backend.kind}: this works with kind: dpdk only"
        )

    @cached_property
    def compiled(self) -> CompiledRules:
        """The rules as masks and keys, made once."""
        return compile_rules(self.flows, self.path)

    @cached_property
    def _by_local_port(self) -> tuple[dict[int, list[Rule]], list[Rule]]:
        """Rules by their one local port, and the others; each by descending rank."""
        one: defaultdict[int, list[Rule]] = defaultdict(list)
        others = []
        for rule in sorted(self.flows, key=lambda r: (-r.rank, r.index)):
            if rule.local_port is not None and rule.local_port.width == 1:
                one[rule.local_port.first].append(rule)
            else:
                others.append(rule)
        return dict(one), others

    def grant(
        self,
        proto: int,
        local_addr: Address | None,
        local_port: int,
        remote_addr: Address | None = None,
        remote_port: int | None = None,
        permits: Callable[[Rule, int], bool] | None = None,
    ) -> Rule | None:
        """The rule by which a socket may take its flows off the interface.

        A listener leaves `remote_addr` and `remote_port` out: a rule that is limited to some remotes grants it
        all the same, and the steering program takes only what the rule allows.

        Args:
            proto: 6 (TCP) or 17 (UDP).
            local_addr: None or the unspecified address: any local address.
            local_port: 1..65535.
            remote_addr, remote_port: of a connected socket.
            permits: whether a `steer` rule may be used with this local port. Every `steer` rule that could bring the
                socket a packet has to be permitted, since its live entry takes what any of them steers.

        Returns:
            The `steer` rule of highest rank that shares a flow with the socket; None when there is none, or when
            a `pass` or `drop` rule of higher rank matches everything that the socket could receive.
        """
        if any(a is not None and a.version == 6 for a in (local_addr, remote_addr)):
            return None  # the steering program hands over IPv4 only
        if local_addr is not None and local_addr.is_unspecified:
            local_addr = None
        if local_addr is not None and remote_addr is not None and remote_port is not None:
            rule = self.compiled.decide(proto, local_addr, local_port, remote_addr, remote_port)
            if rule is None or rule.action != "steer" or (permits and not permits(rule, local_port)):
                return None
            return rule
        one, others = self._by_local_port
        found = None
        # A single port ranks before every range, so the two lists follow each other in rank.
        for rules in (one.get(local_port, ()), others):
            for rule in rules:
                if not _meets(rule, proto, local_addr, local_port, remote_addr, remote_port):
                    continue
                if rule.action == "steer":
                    if permits is None:
                        return rule
                    if not permits(rule, local_port):
                        return None
                    found = found or rule
                if _covers(rule, local_addr, remote_addr, remote_port):
                    return found
        return found


def _meets(
    rule: Rule,
    proto: int,
    local_addr: Address | None,
    local_port: int,
    remote_addr: Address | None,
    remote_port: int | None,
) -> bool:
    """Some packet of the socket's matches the rule."""
    return (
        rule.proto in (None, proto)
        and (rule.local_port is None or local_port in rule.local_port)
        and (rule.local is None or local_addr is None or local_addr in rule.local)
        and (rule.remote is None or remote_addr is None or remote_addr in rule.remote)
        and (rule.remote_port is None or remote_port is None or remote_port in rule.remote_port)
    )


def _covers(
    rule: Rule, local_addr: Address | None, remote_addr: Address | None, remote_port: int | None
) -> bool:
    """Every packet of the socket's matches the rule, given that some does."""
    return (
        rule.vlan is None
        and (rule.local is None or local_addr is not None)
        and (rule.remote is None or remote_addr is not None)
        and (rule.remote_port is None or remote_port is not None)
    )


def require_visible_vlans(policy: Policy, ifname: str) -> None:
    """Refuses rules about VLANs on an interface that hides tags from XDP: a tagged frame would look like one without,
    and match other rules. Policies without such rules are not looked at.

    Raises:
        PolicyError: at each rule that names a VLAN.
        DeviceError: there is no such interface in the calling thread's network namespace.
    """
    named = [rule for rule in policy.flows if rule.vlan is not None]
    if not named:
        return
    from bypass import nic

    facts = nic.read(ifname)
    device, mend = ifname, f"ethtool -K {ifname} rxvlan off"
    hidden = any(facts.is_active(name) for name in ("rx-vlan-hw-parse", "rx-vlan-stag-hw-parse"))
    if facts.kind == "veth":  # the sending end decides
        device, mend = "the peer", "in the peer's network namespace: ethtool -K PEER txvlan off"
        names = ("tx-vlan-hw-insert", "tx-vlan-stag-hw-insert")
        hidden = facts.peer is None or any(
            name in facts.peer.features and facts.peer.features[name].active for name in names
        )
        if facts.peer is None:
            device, mend = "the peer (it cannot be looked at)", "name its network namespace below /run/netns"
    if hidden:
        message = f"{device} keeps VLAN tags beside the packet, where XDP does not see them"
        problems = [
            Problem(f"flows[{r.index}].match.vlan", r.line, r.column, message, str(r.vlan), mend)
            for r in named
        ]
        raise PolicyError(problems, policy.path)


# ---- Reading --------------------------------------------------------------------------------------------


def load_policy(path: str | os.PathLike[str]) -> Policy:
    """Reads and checks a policy file.

    Raises:
        PolicyError: with every problem of the file; also when it cannot be read.
    """
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise PolicyError([Problem("", 0, 0, f"cannot be read: {error.strerror}")], name) from error
    if len(raw) > MAX_FILE_BYTES:
        hint = "use prefixes and port ranges in place of single addresses and ports"
        raise PolicyError([Problem("", 0, 0, f"larger than {MAX_FILE_BYTES >> 20} MiB", "", hint)], name)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line = before.count(b"\n") + 1
        column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8-sig")) + 1
        message = f"the byte 0x{raw[error.start]:02x} is not UTF-8"
        raise PolicyError([Problem("", line, column, message, "", "save the file as UTF-8")], name) from error
    return parse_policy(text, name)


def parse_policy(text: str, path: str = "policy") -> Policy:
    """Checks the text of a policy.

    Args:
        text: YAML.
        path: a name for errors.

    Raises:
        PolicyError: with every problem found, in file order.
    """
    doc = read_yaml(text, "flows")
    if doc.problems:
        raise PolicyError(doc.problems, path)
    check = _Check(doc)
    policy = check.policy(path)
    if policy is None:
        raise PolicyError(check.problems(text), path)
    _ = policy.compiled  # raises when the rules need too many masks or entries
    return policy


class _Check:
    """Reads a document into a policy, and collects what is wrong with it."""

    def __init__(self, doc: Document) -> None:
        self.doc = doc
        self.wrongs: list[Wrong] = []
        self.located: list[Problem] = list(doc.duplicates)

    def policy(self, path: str) -> Policy | None:
        """The policy, or None when something is wrong."""
        data = self.doc.data
        if not isinstance(data, dict):
            message = "the document is empty" if data is None else "the document is not a mapping"
            right = "the top level holds version, interface, backend and flows"
            self.wrongs.append(Wrong((), message, right, whole=True))
            return None
        head = self._head(data)
        flows = data.get("flows")
        with no_garbage_collection():
            rules = self._flows(flows) if isinstance(flows, list) else []
            self.located += check_conflicts(rules)
        if head is None or self.wrongs or self.located:
            return None
        return Policy(
            head.version,
            head.interface,
            read_backend(head),
            tuple(rules),
            path,
            head.profile,
            _stack_options(head),
            head.congestion,
            head.mode or ("direct" if isinstance(head.backend, AfxdpModel) else "shared"),
            _quota(head.quota),
            head.cpus,
            head.numa,
        )

    def _head(self, data: dict[str, Any]) -> HeadModel | None:
        try:
            head = HeadModel.model_validate(data)
        except ValidationError as error:
            self.wrongs += _field_errors(error, ())
            return None
        self.wrongs += across_head(head)
        stack = _stack_options(head)
        for name in ("sndbuf", "rcvbuf"):
            first, most = getattr(stack, name), getattr(stack, f"{name}_max")
            if first is not None and most is not None and first > most:
                said = name if getattr(head.stack, name) is not None else f"{name}_max"
                limit = f"{name}_max" if said == name else name
                wrong = (
                    f"is {'more' if said == name else 'less'} than {limit}, {most if said == name else first}"
                )
                self.wrongs.append(Wrong(("stack", said), wrong, f"{name} is at most {name}_max"))
        return head

    def _flows(self, flows: list[Any]) -> list[Rule]:
        """The flows that are right by themselves."""
        names: dict[str, int] = {}
        rules = []
        tagged = has_port_vlan(self.doc.data)
        for index, item in enumerate(flows):
            at = ("flows", index)
            try:
                flow = FlowModel.model_validate(item)
            except ValidationError as error:
                errors = _field_errors(error, at)
                self.wrongs += errors
                self.wrongs += _what_else(at, item, {e.path[2:] for e in errors})
                name = item.get("name") if isinstance(item, dict) else None
            else:
                name, match = flow.name, flow.match
                bad = [*_across(at, match, flow.action), *_across_allow(at, flow)]
                if tagged and match.vlan is not None and flow.action != "steer":
                    right = "rules are about frames of backend.vlan, and see them without tag"
                    bad.append(Wrong((*at, "match", "vlan"), "is never seen here", right))
                self.wrongs += bad
                if not bad:
                    line, column = self.doc.item_marks[index]
                    rules.append(_rule(index, flow, match, line, column))
            if isinstance(name, str) and names.setdefault(name, index) != index:
                first = self.doc.item_marks[names[name]][0]
                wrong = f"is the name of the flow in line {first} already"
                self.wrongs.append(Wrong((*at, "name"), wrong, "each flow has a name of its own"))
        return rules

    def problems(self, text: str) -> list[Problem]:
        """All problems with their places, in file order."""
        wrongs = self.wrongs[:MAX_PROBLEMS]
        wanted = {w.path[:n] for w in wrongs for n in range(len(w.path) + 1)}
        places = read_yaml(text, "flows", wanted).places
        problems = [_located(w, places, self.doc.data) for w in wrongs]
        problems += self.located[: MAX_PROBLEMS - len(problems)]
        problems.sort(key=lambda p: (p.line, p.column))
        more = len(self.wrongs) + len(self.located) - len(problems)
        if more:
            problems.append(Problem("", 0, 0, f"{more} more problems"))
        return problems


def _stack_options(head: HeadModel) -> StackOptions:
    return resolve(head.profile, StackOptions(**head.stack.model_dump()))


def _rule(index: int, flow: FlowModel, match: MatchModel, line: int, column: int) -> Rule:
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


def _quota(model: QuotaModel) -> Quota:
    return NO_QUOTA if model is NO_QUOTA_MODEL else Quota(**model.model_dump())


def _allow(model: AllowModel) -> Allow | None:
    if model is NO_ALLOW_MODEL:
        return None
    return Allow(model.user, model.group, model.ports, _quota(model.quota))


def _across_allow(at: Path, flow: FlowModel) -> Iterator[Wrong]:
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


def _across(at: Path, match: MatchModel, action: str | None, bad: Collection[Path] = ()) -> Iterator[Wrong]:
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


def _what_else(at: Path, item: object, bad: set[Path]) -> list[Wrong]:
    """Errors across the fields of a flow some of whose fields could not be read."""
    match = item.get("match") if isinstance(item, dict) else None
    if not isinstance(item, dict) or not isinstance(match, dict) or ("match",) in bad:
        return []
    rest = MatchModel.model_validate({k: v for k, v in match.items() if ("match", k) not in bad})
    return list(_across(at, rest, None if ("action",) in bad else item.get("action"), bad))


# ---- Errors ---------------------------------------------------------------------------------------------

_MODELS: dict[str, type[BaseModel]] = {
    "": HeadModel,
    "backend": AfxdpModel,
    "dpdk": DpdkModel,
    "eal": EalModel,
    "route": RouteModel,
    "stack": StackModel,
    "flow": FlowModel,
    "match": MatchModel,
    "allow": AllowModel,
    "quota": QuotaModel,
}
_TEXT_FIELDS = {
    "interface",
    "profile",
    "congestion",
    "kind",
    "mode",
    "name",
    "action",
    "proto",
    "local",
    "remote",
    "device",
    "to",
    "via",
}


def _where(path: Path, kind: str) -> tuple[str, str]:
    """The mapping (a key of _MODELS) and field that a path leads to. `kind`: of the backend."""
    if len(path) > 1 and path[-2] == "quota":
        return "quota", str(path[-1])
    if path[:1] == ("flows",) and len(path) > 1:
        if path[2:3] == ("allow",) and len(path) > 3:
            return "allow", str(path[3])
        if path[2:3] == ("match",) and len(path) > 3:
            return "match", str(path[3])
        return "flow", str(path[2]) if len(path) > 2 else ""
    if path[:2] == ("backend", "eal") and len(path) > 2:
        return "eal", str(path[2])
    if path[:1] == ("backend",) and len(path) > 1:
        return "dpdk" if kind == "dpdk" else "backend", str(path[1])
    if path[:1] == ("stack",) and len(path) > 1:
        return "stack", str(path[1])
    if path[:1] == ("routes",) and len(path) > 1:
        return "route", str(path[2]) if len(path) > 2 else ""
    return "", str(path[0]) if path else ""


def _field_errors(error: ValidationError, at: Path) -> list[Wrong]:
    """pydantic's errors in our words. `at`: where the model that found them stands."""
    wrongs = []
    for detail in error.errors(include_url=False, include_input=False):
        path, kind = (*at, *detail["loc"]), ""
        if path[:1] == ("backend",) and len(path) > 1:  # pydantic names the model of the union too
            kind, path = str(path[1]), (path[0], *path[2:])
        mapping, name = _where(path, kind)
        text = TEXTS.get((mapping, name))
        if detail["type"] == "extra_forbidden" and (other := _other_backend(path, kind)):
            wrongs.append(
                Wrong(
                    path,
                    f"is for kind: {other}",
                    _INSTEAD.get((kind, name), f"leave it out with {kind}"),
                    whole=True,
                    at_key=True,
                )
            )
        elif detail["type"] == "extra_forbidden":
            known = list(_MODELS[mapping].model_fields)
            near = difflib.get_close_matches(name[:40], known, 1)
            right = f"did you mean {near[0]}?" if near else "the keys here are " + ", ".join(known)
            wrongs.append(Wrong(path, "unknown key", right, whole=True, at_key=True))
        elif text is None:
            raise AssertionError(f"no text for the field {mapping}.{name}") from error
        elif detail["type"] == "missing":
            wrongs.append(Wrong(path[:-1], f"{name} is missing", text.right, whole=True))
        elif detail["type"] in ("too_short", "too_long"):
            wrong = "is empty" if detail["type"] == "too_short" else f"has more than {MAX_RULES} items"
            wrongs.append(Wrong(path, f"the list {wrong}", text.right, whole=True))
        else:
            context = detail.get("ctx", {}) if detail["type"] == "policy" else {}
            item = context.get("at")
            where = path if item is None else (*path, item)
            wrongs.append(
                Wrong(where, context.get("wrong") or text.wrong, context.get("right") or text.right)
            )
    return wrongs


_INSTEAD = {  # what a backend has in place of another's key
    ("dpdk", "mode"): "a DPDK port has one owner, and offloads says what it does",
    ("afxdp", "device"): "`interface` names the kernel's device",
    ("afxdp", "mtu"): "the kernel's device has it: `ip link set mtu`",
    ("afxdp", "vlan"): "the kernel's VLAN device has it",
    ("afxdp", "idle_us"): "AF_XDP wakes who sleeps; stack.spin_us says how long a call polls",
}


def _other_backend(path: Path, kind: str) -> str:
    """The backend that has such a key, when this one has not."""
    return next((k for k, m in BACKENDS.items() if kind and len(path) == 2 and path[1] in m.model_fields), "")


def _located(wrong: Wrong, places: dict[Path, Place], data: Any) -> Problem:
    path = wrong.path
    known = next(path[:n] for n in range(len(path), -1, -1) if path[:n] in places or n == 0)
    place = places.get(known, Place(1, 1, None))
    line, column = (
        (place.key_line, place.key_column) if wrong.at_key and known == path else (place.line, place.column)
    )
    value = None if wrong.whole else _value_at(data, path)
    raw = place.raw
    if known != path and not isinstance(value, list | dict):
        raw = scalar_text(value)  # it came by an alias: the place is that of the alias
    raw = shown(raw) if raw is not None else ""
    if wrong.whole:
        return Problem(path_text(path), line, column, wrong.wrong, raw, wrong.right)
    message, right = f"{_described(value, raw)} {wrong.wrong}", wrong.right
    odd = _odd_meaning(value)
    if odd:
        message = f"{raw} is {odd}"
    if (
        (odd or type(value) is int)
        and path[-1] in _TEXT_FIELDS
        and wrong.right == TEXTS[_where(path, _kind_of(data))].right
    ):
        right = f"put it in quotes if it is meant as text; {right}"
    return Problem(path_text(path), line, column, message, raw, right)


def _kind_of(data: Any) -> str:
    return backend_kind(data.get("backend")) if isinstance(data, dict) else ""


def _value_at(data: Any, path: Path) -> Any:
    for step in path:
        data = data[step]
    return data


def _described(value: Any, raw: str) -> str:
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a mapping"
    return raw or ("an empty value" if value is None else "an empty text")


def _odd_meaning(value: Any) -> str:
    """What YAML takes a value for, where its author may not know it."""
    if isinstance(value, Oddity):
        return value.meaning
    return "a boolean in YAML" if isinstance(value, bool) else ""
