# SPDX-License-Identifier: Apache-2.0
"""The programs of steering in the kernel: those of one policy, loaded; attaching them; and what a refusal means.

What does not live here: compiling (`bpf/build.py`), the maps (`steer_maps.py`), exchanging the programs of one policy
for another's (`steering.py`).
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Mapping
from typing import Literal

from bypass import libbpf, procfs
from bypass.bpf import build
from bypass.errors import BypassError, ForeignProgramError, PrivilegeError, SteeringError
from bypass.nic import OUR_PROGRAMS
from bypass.policy import Policy
from bypass.steer_maps import Count, counts_of, policy_maps
from bypass.steering_api import Guard

__all__ = ["Mode", "Programs", "attach_guard", "attach_xdp", "explained", "refuse_foreign"]

Mode = Literal["native", "skb", "auto"]


class Programs:
    """The programs of one policy and the maps that go with it."""

    def __init__(self, policy: Policy, shared: dict[str, libbpf.Map], text: str | None) -> None:
        self._programs = build.compile_programs(build.defines(policy.compiled), text)
        self.policy = policy
        self.maps: dict[str, libbpf.Map] = {}
        self.progs: dict[str, libbpf.Prog] = {}
        try:
            self.maps.update(policy_maps(policy.compiled))
            for name in (build.XDP, build.GUARD):
                self.progs[name] = self.load(name, shared)
        except BaseException:
            self.close()
            raise

    def load(self, name: str, shared: dict[str, libbpf.Map]) -> libbpf.Prog:
        """One of the programs, once more, on the same maps."""
        kind, attach = (
            (libbpf.PROG_XDP, libbpf.ATTACH_XDP) if name == build.XDP else (libbpf.PROG_SCHED_CLS, 0)
        )
        fds = {name: m.fd for name, m in (shared | self.maps).items()}
        return _load(self._programs[name], kind, attach, fds)

    def counts(self) -> list[Count]:
        return list(counts_of(self.maps["rule_count"]))[: len(self.policy.flows)]

    def close(self) -> None:
        for owned in (*self.progs.values(), *self.maps.values()):
            owned.close()


def attach_xdp(
    progs: Mapping[str, libbpf.Prog], ifname: str, ifindex: int, mode: Mode
) -> tuple[libbpf.Link, Mode]:
    """Puts the XDP program on an interface. The link that keeps it there, and native or skb.

    Raises:
        ForeignProgramError: there is one already.
        OSError: it is refused.
    """
    flags = libbpf.XDP_SKB_MODE if mode == "skb" else libbpf.XDP_DRV_MODE
    try:
        link = libbpf.Link(progs[build.XDP], ifindex, libbpf.ATTACH_XDP, flags)
    except OSError as e:
        if e.errno in (errno.EBUSY, errno.EEXIST):
            refuse_foreign(ifname, ifindex)
        if mode != "auto" or e.errno != errno.EOPNOTSUPP:
            raise
        return attach_xdp(progs, ifname, ifindex, "skb")
    return link, "skb" if mode == "skb" else "native"


def attach_guard(progs: Mapping[str, libbpf.Prog], ifindex: int) -> tuple[libbpf.Link | None, Guard]:
    """Puts the reset guard on an interface, where the kernel can. OSError: it is refused."""
    try:
        link = libbpf.Link(progs[build.GUARD], ifindex, libbpf.ATTACH_TCX_EGRESS)
        return link, Guard(True, "tcx egress")
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
        return None, Guard(
            False,
            f"kernel {os.uname().release} has no tcx (6.6 and later do): a reset that the kernel sends for a "
            "stray packet of a live connection reaches the peer",
        )


def _load(program: build.Program, kind: int, attach_type: int, fds: dict[str, int]) -> libbpf.Prog:
    log: list[str] = []
    try:
        return libbpf.Prog(
            kind, f"bypass_{program.name.split('_')[1]}", program.linked(fds), attach_type, log
        )
    except OSError as e:
        if e.errno == errno.EPERM or not any(log):
            raise
        handle, path = tempfile.mkstemp(prefix="bypass-verifier-", suffix=".log")
        with open(handle, "w") as f:
            f.write("".join(log))
        last = [line for line in "".join(log).splitlines() if line and not line.startswith("processed")][-1:]
        raise SteeringError(
            f"the kernel refuses {program.name}: {' '.join(last) or e.strerror}; the verifier's log is in {path}"
        ) from e


def refuse_foreign(ifname: str, ifindex: int) -> None:
    """ForeignProgramError: the interface has an XDP program."""
    there = libbpf.xdp_attached(ifindex)
    if there is None:
        return
    whose = ", ".join(f"{pid} ({procfs.name_of(pid) or 'ended'})" for pid in there.pids)
    whose = f"held by process {whose}" if whose else "held by no process: attached by netlink"
    kind = "xdpgeneric" if there.mode == "skb" else "xdp"
    undo = "end that process" if there.pids else f"`ip link set dev {ifname} {kind} off`"
    ours = there.name.startswith(OUR_PROGRAMS)
    if ours and there.pids:
        undo = "`bypass down`, or end what `bypass ps` shows (`bypass up` with the socket of a killed broker goes on)"
    raise ForeignProgramError(
        f"{ifname} has an XDP program already: id {there.prog_id}, name {there.name}, {there.mode} mode, {whose}; "
        f"bypass does not replace it. {undo} to remove it",
        ours,
    )


def explained(e: OSError, ifname: str) -> BypassError:
    """A system call's failure in words."""
    if e.errno == errno.EPERM:
        return PrivilegeError(
            f"{ifname}: {e.strerror}: steering needs root (CAP_BPF, CAP_NET_ADMIN, CAP_NET_RAW)"
        )
    hint = {
        errno.EOPNOTSUPP: "the driver has no native XDP: use `mode: skb`",
        errno.EBUSY: "another XDP program came first",
        errno.EINVAL: "is the MTU larger than the driver allows with XDP? (`ip -d link`, `dmesg`)",
        errno.ERANGE: "the MTU is larger than the driver allows with XDP (`ip link set ... mtu`)",
        errno.ENOMEM: "not enough memory for the maps",
    }.get(e.errno or 0, "")
    return SteeringError(": ".join(part for part in (ifname, e.strerror or str(e), hint) if part))
