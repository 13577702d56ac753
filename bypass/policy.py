# SPDX-License-Identifier: Apache-2.0
"""The policy: which flows of an interface may be taken, by which backend.

What lives here: the result, `Policy`, with what it grants, and the way to it from a file. What does not: its fields and
their JSON Schema (`policy_fields.py`), checks across fields (`policy_backend.py`, `policy_flows.py`), what errors say
(`policy_errors.py`), YAML and places in it (`policy_yaml.py`), ranks and compilation (`rules.py`).

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

import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pydantic import ValidationError

from bypass.access import NO_QUOTA, Quota
from bypass.errors import DeviceError, PolicyError, Problem
from bypass.policy_backend import (
    AfxdpBackend,
    DpdkBackend,
    EalOptions,
    across_head,
    has_port_vlan,
    read_backend,
)
from bypass.policy_errors import field_errors, located_problem
from bypass.policy_fields import AfxdpModel, FlowModel, HeadModel, Mode, Wrong, policy_schema
from bypass.policy_flows import across_allow, across_match, flow_rule, quota_of, what_else
from bypass.policy_yaml import Document, no_garbage_collection, read_yaml
from bypass.profiles import NO_OPTIONS, Profile, StackOptions, resolve
from bypass.rules import (
    MAX_PROBLEMS,
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
            quota_of(head.quota),
            head.cpus,
            head.numa,
        )

    def _head(self, data: dict[str, Any]) -> HeadModel | None:
        try:
            head = HeadModel.model_validate(data)
        except ValidationError as error:
            self.wrongs += field_errors(error, ())
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
                errors = field_errors(error, at)
                self.wrongs += errors
                self.wrongs += what_else(at, item, {e.path[2:] for e in errors})
                name = item.get("name") if isinstance(item, dict) else None
            else:
                name, match = flow.name, flow.match
                bad = [*across_match(at, match, flow.action), *across_allow(at, flow)]
                if tagged and match.vlan is not None and flow.action != "steer":
                    right = "rules are about frames of backend.vlan, and see them without tag"
                    bad.append(Wrong((*at, "match", "vlan"), "is never seen here", right))
                self.wrongs += bad
                if not bad:
                    line, column = self.doc.item_marks[index]
                    rules.append(flow_rule(index, flow, match, line, column))
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
        problems = [located_problem(w, places, self.doc.data) for w in wrongs]
        problems += self.located[: MAX_PROBLEMS - len(problems)]
        problems.sort(key=lambda p: (p.line, p.column))
        more = len(self.wrongs) + len(self.located) - len(problems)
        if more:
            problems.append(Problem("", 0, 0, f"{more} more problems"))
        return problems


def _stack_options(head: HeadModel) -> StackOptions:
    return resolve(head.profile, StackOptions(**head.stack.model_dump()))
