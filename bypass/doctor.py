# SPDX-License-Identifier: Apache-2.0
"""Can bypass work here? Checks of the machine and of one interface, each with a verdict and the command that mends
it, and the choice behind `mode: auto`.

What lives here: judgement. The facts come from bypass.probe (the machine) and bypass.nic (an interface); what a whole
port for DPDK needs is in `doctor_port.py`.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from bypass import doctor_port, nic, probe, records
from bypass.doctor_port import Check, Verdict
from bypass.errors import DeviceError

if TYPE_CHECKING:
    from bypass.hwflow.held import Record
    from bypass.hwflow.offered import Offer
    from bypass.policy import Policy
    from bypass.policy_fields import HardwareRules

SEVERITY: dict[Verdict, int] = {"ok": 0, "warn": 1, "fail": 2}
MODES = ("auto", "zerocopy", "copy", "skb")

# Kernel versions: what each brings that bypass uses. `must`: nothing works before it.
KERNEL_FEATURES: tuple[tuple[tuple[int, int], str, bool], ...] = (
    ((5, 4), "need_wakeup", True),
    ((5, 9), "XDP attached by a link, which goes with its owner", True),
    ((5, 10), "one packet memory for all queues", True),
    ((5, 11), "BPF memory outside of the memlock limit", False),
    ((6, 3), "drivers say which XDP features they have", False),
    ((6, 6), "the guard against kernel resets (a tcx link)", True),
)
NEEDED_CAPS = {
    "CAP_NET_ADMIN": "to attach programs",
    "CAP_NET_RAW": "to open AF_XDP sockets",
    "CAP_BPF": "to load programs",
    "CAP_PERFMON": "to load programs that read packets through pointers",
}
UMEM_BYTES = 64 << 20  # packet memory of a generous set-up: what the memlock limit is compared with
MIN_FILES = 1024
# Mitigations that cost at each entry to the kernel or each return: file of /sys/devices/system/cpu/vulnerabilities, how
# its text begins, what it does, what switches it off on the kernel's command line (admin-guide/kernel-parameters.txt).
MITIGATIONS = (
    (
        "retbleed",
        r"Mitigation: (untrained return thunk|IBPB)",
        "untrains the predictor of returns",
        "retbleed=off",
    ),
    ("retbleed", r"Mitigation: (IBRS|Stuffing)", "restricts prediction in the kernel", "retbleed=off"),
    ("spec_rstack_overflow", r"Mitigation: ", "makes returns safe", "spec_rstack_overflow=off"),
    ("meltdown", r"Mitigation: PTI", "changes page tables", "nopti"),
    ("mds", r"Mitigation: Clear CPU buffers", "clears buffers", "mds=off"),
    ("tsx_async_abort", r"Mitigation: Clear CPU buffers", "clears buffers", "tsx_async_abort=off"),
    ("mmio_stale_data", r"Mitigation: Clear CPU buffers", "clears buffers", "mmio_stale_data=off"),
    (
        "indirect_target_selection",
        r"Mitigation: Aligned",
        "moves branches and returns",
        "indirect_target_selection=off",
    ),
)
STRICT = 1  # rp_filter
NATIVE_MTU = 3498  # what a 4 KiB page holds beside XDP's headroom and the kernel's tail


@dataclass(frozen=True)
class Report:
    """`mode`: what `mode: auto` takes on the interface, and why; both "" without an interface."""

    interface: str
    checks: tuple[Check, ...]
    mode: str = ""
    reason: str = ""

    @property
    def verdict(self) -> Verdict:
        return max((c.verdict for c in self.checks), key=SEVERITY.__getitem__, default="ok")

    def as_dict(self) -> dict[str, Any]:
        """For --json: {"interface", "verdict", "mode", "reason", "checks": [{"group", "name", "verdict", "found",
        "fix"}]}."""
        about = {
            "interface": self.interface,
            "verdict": self.verdict,
            "mode": self.mode,
            "reason": self.reason,
        }
        return about | {"checks": [asdict(c) for c in self.checks]}


def diagnose(ifname: str = "", policy: Policy | None = None) -> Report:
    """All checks; those of an interface only with `ifname`. What a port for DPDK needs is a failure to lack when the
    policy is of that kind.

    Raises:
        DeviceError: no such interface.
    """
    from bypass.hwflow.held import found
    from bypass.hwflow.offered import of_interface, of_port

    checks = [*check_machine(), *doctor_port.check_port(doctor_port.read(), doctor_port.Needs.of(policy))]
    if policy is not None and policy.backend.kind == "dpdk" and policy.backend.hardware_rules != "none":
        checks.append(check_rules("dpdk", of_port(policy.backend.device), policy.backend.hardware_rules))
    if not ifname:
        return Report("", tuple(checks))
    facts = nic.read(ifname)
    checks += check_interface(facts)
    wants: HardwareRules = "none"
    if policy is not None and policy.backend.kind == "afxdp" and policy.interface == ifname:
        wants = policy.backend.hardware_rules
    checks.append(check_rules("interface", of_interface(ifname), wants, found(ifname)))
    mode, reason = choose(facts, "auto")
    return Report(ifname, tuple(checks), mode, reason)


def check_rules(group: str, offer: Offer, wants: HardwareRules, left: Record | None = None) -> Check:
    """Rules in hardware: what the device offers, what the policy wants, what a killed process left."""
    name = "hardware rules"
    if left is not None and not left.alive:
        found = f"those of process {left.keeper[0]}, which was killed: whoever uses {left.ifname} next takes them off"
        return Check(group, name, "warn", found, f"bypass nic rules --recover {left.ifname}")
    if offer.has is not False or wants == "none":
        return Check(group, name, "ok", offer.text)
    if wants == "auto":
        return Check(group, name, "warn", f"{offer.text}; the program does it alone")
    return Check(group, name, "fail", offer.text, "hardware_rules: auto in the policy, or another device")


# ---- The mode --------------------------------------------------------------------------------------------------
def choose_mode(ifname: str, requested: str) -> tuple[str, str]:
    """The AF_XDP mode to use on `ifname`: ("zerocopy" | "copy" | "skb", the reason in words).

    Anything but "auto" is taken at its word: whether the driver obeys is seen at bind, and a refusal is an error.

    Raises:
        DeviceError: no such interface, or no such mode.
    """
    return choose(nic.read(ifname, around=False), requested)


def choose(facts: nic.Nic, requested: str) -> tuple[str, str]:
    """choose_mode() from facts that are there already."""
    if requested not in MODES:
        raise DeviceError(f"mode {requested!r}: it is one of {', '.join(MODES)}")
    if requested != "auto":
        return requested, "as asked for"
    bits = facts.xdp_features
    if bits is not None and not bits & nic.XDP_REDIRECT:
        return (
            "skb",
            f"the driver of {facts.name} ({facts.driver or facts.kind}) has no native XDP with redirection",
        )
    if facts.default_route:
        return "copy", f"{facts.name} carries the default route, and zero-copy drivers have taken hosts down"
    if facts.login:
        return (
            "copy",
            f"the login from {facts.login} comes through {facts.name}, and a hung driver would end it",
        )
    if bits is None:
        return (
            "copy",
            "this kernel (before 6.3) does not say whether the driver can do zero-copy; ask for it by name",
        )
    if bits & nic.XDP_ZEROCOPY:
        return "zerocopy", f"the driver ({facts.driver}) offers it, and nothing else depends on {facts.name}"
    return "copy", f"the driver ({facts.driver}) offers no zero-copy"


# ---- The machine -----------------------------------------------------------------------------------------------
def check_machine() -> Iterator[Check]:
    yield check_kernel(probe.kernel_version())
    yield check_capabilities(probe.capabilities())
    yield check_memlock(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], probe.capabilities())
    yield check_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
    yield check_jit(probe.is_jited())
    yield check_mitigations(probe.vulnerabilities())
    yield from check_notes(sum(len(records.left_over(folder)) for folder in records.OF_NAMESPACES))
    yield _tried("bcc", "it compiles the steering program", probe.try_bcc)
    yield _tried("C core", "bypass._core is built", probe.try_core)
    yield _tried("bpf(2)", "an XDP program loads", probe.try_program_load, privileged=True)
    yield _tried("AF_XDP", "the kernel has it", probe.try_xsk, privileged=True)
    yield _tried("native XDP", "attaches by a link (tried on a veth)", probe.try_native_xdp, privileged=True)


def check_notes(left: int) -> Iterator[Check]:
    """`left`: notes below /run/bypass of network namespaces that are gone."""
    if left:
        found = f"{left} of killed processes in network namespaces that are gone; the next start removes them"
        yield Check("machine", "notes", "warn", found, "bypass nic unbind --left")


def _tried(name: str, good: str, attempt: Callable[[], str | None], privileged: bool = False) -> Check:
    """The outcome of an attempt. One that needs privilege is not made without: it would only say so again."""
    if privileged and os.geteuid() != 0:
        return Check("machine", name, "warn", "not tried: it needs root", "sudo bypass doctor")
    problem = attempt()
    if problem is None:
        return Check("machine", name, "ok", good)
    return Check("machine", name, "fail", problem, "make setup" if name in ("bcc", "C core") else "")


def check_kernel(version: tuple[int, int]) -> Check:
    text = ".".join(map(str, version))
    lacking = [(v, what, must) for v, what, must in KERNEL_FEATURES if version < v]
    if not lacking:
        return Check("machine", "kernel", "ok", f"{text}; everything that bypass uses is in 6.6")
    words = "; ".join(f"{what} ({v[0]}.{v[1]})" for v, what, _ in lacking)
    verdict: Verdict = "fail" if any(must for *_, must in lacking) else "warn"
    return Check("machine", "kernel", verdict, f"{text} lacks: {words}", "boot a kernel of 6.6 or later")


def check_capabilities(have: frozenset[str]) -> Check:
    def has(cap: str) -> bool:
        return cap in have or (cap in ("CAP_BPF", "CAP_PERFMON") and "CAP_SYS_ADMIN" in have)

    lacking = [f"{cap} ({why})" for cap, why in NEEDED_CAPS.items() if not has(cap)]
    if lacking:
        return Check("machine", "capabilities", "fail", f"missing: {', '.join(lacking)}", "run it with sudo")
    return Check("machine", "capabilities", "ok", ", ".join(sorted(have)))


def check_memlock(limit_bytes: int, have: frozenset[str]) -> Check:
    """Packet memory is locked memory: the limit counts unless the process has CAP_IPC_LOCK."""
    if limit_bytes == resource.RLIM_INFINITY:
        return Check("machine", "memlock", "ok", "unlimited")
    text = f"{limit_bytes >> 10} KiB"
    if "CAP_IPC_LOCK" in have:
        return Check("machine", "memlock", "ok", f"{text}, which CAP_IPC_LOCK passes over")
    if limit_bytes >= UMEM_BYTES:
        return Check("machine", "memlock", "ok", text)
    return Check(
        "machine", "memlock", "warn", f"{text}: limits packet memory", f"ulimit -l {UMEM_BYTES >> 10}"
    )


def check_files(soft: int, hard: int) -> Check:
    if soft >= MIN_FILES or soft == resource.RLIM_INFINITY:
        return Check("machine", "open files", "ok", str(soft))
    most = hard if hard != resource.RLIM_INFINITY else 65536
    return Check("machine", "open files", "warn", f"{soft}: few for a server", f"ulimit -n {most}")


def check_jit(jited: bool | None) -> Check:
    """`jited`: what the kernel says of a program that it has just loaded; None: none could be loaded."""
    if jited is None:
        return Check(
            "machine", "BPF JIT", "warn", "not known: no program could be loaded", "sudo bypass doctor"
        )
    if jited:
        return Check("machine", "BPF JIT", "ok", "programs are compiled")
    slow = "off: the program is interpreted for every packet, several times slower"
    return Check("machine", "BPF JIT", "warn", slow, "sysctl -w net.core.bpf_jit_enable=1")


def check_mitigations(told: dict[str, str]) -> Check:
    """`told`: what the kernel says of each vulnerability."""
    costly = [(f, what, off) for f, text, what, off in MITIGATIONS if re.match(text, told.get(f, ""))]
    if not costly:
        return Check("machine", "mitigations", "ok", "none that costs at each entry to the kernel")
    found = "; ".join(f"{file} {what} ({told[file]})" for file, what, _ in costly)
    off = " ".join(dict.fromkeys(off for *_, off in costly))
    fix = f"where only trusted programs run: {off} on the kernel's command line"
    return Check("machine", "mitigations", "warn", f"cost time at each entry to the kernel: {found}", fix)


# ---- An interface ----------------------------------------------------------------------------------------------
def check_interface(facts: nic.Nic) -> Iterator[Check]:
    for check in (check_link, check_driver, check_zerocopy, check_queues, check_mtu, check_program):
        yield check(facts)
    yield from check_offloads(facts)
    if facts.kind == "veth":
        yield from check_peer(facts)
    for check in (check_default_route, check_login, check_rps, check_rp_filter, check_manager):
        yield check(facts)


def _check(name: str, verdict: Verdict, found: str, fix: str = "") -> Check:
    return Check("interface", name, verdict, found, fix)


def check_link(facts: nic.Nic) -> Check:
    if facts.state == "down":
        return _check("link", "warn", "down", f"ip link set dev {facts.name} up")
    return _check("link", "ok", f"{facts.state}, {facts.mac}")


def check_driver(facts: nic.Nic) -> Check:
    name = facts.driver or facts.kind
    bits = facts.xdp_features
    if bits is None:
        return _check("driver", "ok", f"{name}; this kernel does not say what it can do (6.3 does)")
    if bits & nic.XDP_BASIC and bits & nic.XDP_REDIRECT:
        return _check("driver", "ok", f"{name}: native XDP with redirection")
    found = f"{name}: no native XDP; generic XDP works, but each packet is a kernel buffer first"
    return _check("driver", "warn", found, "backend: {mode: skb} in the policy, or another NIC")


def check_zerocopy(facts: nic.Nic) -> Check:
    bits = facts.xdp_features
    if bits is None:
        return _check("zero-copy", "ok", "not known before it is tried (mode: zerocopy)")
    return _check(
        "zero-copy", "ok", "offered" if bits & nic.XDP_ZEROCOPY else "not offered; copy mode is used"
    )


def check_queues(facts: nic.Nic) -> Check:
    most = f" of {facts.max_queues}" if facts.max_queues else ""
    return _check("queues", "ok", f"{facts.rx_queues}{most} receive, {facts.tx_queues} transmit")


def check_mtu(facts: nic.Nic) -> Check:
    native = facts.xdp_features is None or facts.xdp_features & nic.XDP_BASIC
    if facts.mtu <= NATIVE_MTU or not native:
        return _check("MTU", "ok", f"{facts.mtu} bytes")
    found = f"{facts.mtu} bytes: most drivers refuse native XDP above {NATIVE_MTU}"
    return _check("MTU", "warn", found, f"ip link set dev {facts.name} mtu 1500")


def check_program(facts: nic.Nic) -> Check:
    program = facts.program
    if program is None:
        return _check("XDP program", "ok", "none")
    if program.ours:
        return _check("XDP program", "ok", f"bypass's own: {program.whose()}")
    kind = "xdpgeneric" if program.mode == "skb" else "xdp"
    fix = f"stop its owner, or: ip link set dev {facts.name} {kind} off"
    return _check("XDP program", "fail", f"somebody else's: {program.whose()}", fix)


def check_offloads(facts: nic.Nic) -> Iterator[Check]:
    """One check for each offload that hurts, or one that says that none does."""
    hurts: list[tuple[tuple[str, ...], str, Verdict, str]] = [
        (("rx-lro",), "lro", "fail", "LRO merges segments before XDP: drivers refuse XDP while it is on"),
        (
            ("rx-gro-hw",),
            "rx-gro-hw",
            "fail",
            "hardware GRO merges segments before XDP: drivers refuse XDP then",
        ),
    ]
    if facts.kind != "veth":  # there the sender decides: see its peer
        tag = "the NIC takes VLAN tags off before XDP: a tagged frame looks like one without"
        hurts.append((("rx-vlan-hw-parse", "rx-vlan-stag-hw-parse"), "rxvlan", "warn", tag))
    clean = True
    for names, short, verdict, why in hurts:
        active = [n for n in names if facts.is_active(n)]
        if not active:
            continue
        clean = False
        fixed = not any(facts.features[n].changeable for n in active)
        fix = (
            "not from here: the hypervisor or the firmware decides"
            if fixed
            else f"ethtool -K {facts.name} {short} off"
        )
        yield _check(f"offload {short}", "warn" if fixed else verdict, why, fix)
    if clean:
        yield _check("offloads", "ok", "none that hurts")


def check_peer(facts: nic.Nic) -> Iterator[Check]:
    """The other end of a veth decides whether checksums and tags are in the packets, and on which queues they come."""
    peer = facts.peer
    if peer is None:
        found = "in a namespace that is not to be seen from here"
        yield _check("veth peer", "warn", found, "in its namespace: ethtool -K PEER tx off txvlan off")
        return
    at = f"ip netns exec {peer.namespace} " if peer.namespace else ""
    where = f"{peer.name} in {peer.namespace}" if peer.namespace else peer.name
    before = 0
    for feature, short, why in (
        ("tx-checksum-ip-generic", "tx", "leaves TCP and UDP checksums to a NIC that is not there"),
        ("tx-vlan-hw-insert", "txvlan", "keeps VLAN tags beside the packet, where XDP does not see them"),
    ):
        if feature in peer.features and peer.features[feature].active:
            before += 1
            yield _check("veth peer", "warn", f"{where} {why}", f"{at}ethtool -K {peer.name} {short} off")
    if peer.tx_queues > facts.rx_queues:
        before += 1
        found = f"{where} sends on {peer.tx_queues} queues, {facts.name} receives on {facts.rx_queues}: XDP is refused"
        yield _check("veth peer", "fail", found, f"{at}ethtool -L {peer.name} tx {facts.rx_queues}")
    if not before:
        yield _check("veth peer", "ok", f"{where}: whole checksums, tags in the packets")


def check_default_route(facts: nic.Nic) -> Check:
    if facts.default_route:
        return _check("default route", "ok", "through this interface: `mode: auto` stays with copy mode")
    return _check("default route", "ok", "elsewhere")


def check_login(facts: nic.Nic) -> Check:
    if facts.login:
        found = f"the login from {facts.login} comes through here: `pass` its flow in the policy if a rule could match"
        return _check("login", "warn", found, "match: {proto: tcp, local_port: 22}, action: pass")
    return _check("login", "ok", "not through this interface, as far as can be seen")


def check_rps(facts: nic.Nic) -> Check:
    if facts.rps is None:
        return _check("RPS", "ok", "not visible from this mount namespace")
    if any(int(mask.replace(",", "") or "0", 16) for mask in facts.rps):
        return _check("RPS", "ok", "on: it spreads the kernel's share; XDP and AF_XDP come before it")
    return _check("RPS", "ok", "off")


def check_rp_filter(facts: nic.Nic) -> Check:
    """In strict mode the kernel drops what comes from where it would not send by the same interface (RFC 3704)."""
    if facts.rp_filter is None:
        return _check("rp_filter", "ok", "not visible")
    if facts.rp_filter != STRICT:
        return _check("rp_filter", "ok", "loose" if facts.rp_filter else "off")
    if not facts.default_elsewhere:
        return _check("rp_filter", "ok", "strict, and no other interface has a default route")
    found = (
        f"strict, and {facts.default_elsewhere} has a default route: the kernel drops its share of what comes in here "
        "from peers to which it would send by there"
    )
    return _check("rp_filter", "warn", found, f"sysctl -w net.ipv4.conf.{facts.name}.rp_filter=2")


def check_manager(facts: nic.Nic) -> Check:
    if not facts.manager:
        return _check("manager", "ok", "NetworkManager does not manage it")
    found = (
        f"{facts.manager} manages it, and sets it up anew when its driver or carrier changes: addresses, MTU and state "
        "that others gave it are lost"
    )
    return _check("manager", "warn", found, f"nmcli device set {facts.name} managed no")
