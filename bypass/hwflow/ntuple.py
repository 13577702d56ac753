# SPDX-License-Identifier: Apache-2.0
"""Hardware rules for the AF_XDP backend, as ethtool(8) has them: `-N` rules that choose queues, and an `-X` table that
keeps everything else off the queues of the stack. The same as bytes for the ioctls.

    eth1, queues 0 1 2 3, of which bypass has 3:
      -X: hash over 0 1 2         what no rule names: the kernel's
      -N: tcp to port 80 -> 3     where AF_XDP sockets are, and the steering program decides

Sources: ethtool(8); linux/ethtool.h (struct ethtool_rxnfc, struct ethtool_rx_flow_spec). In a mask of ethtool(8) the
bits that are set are ignored; in the kernel's structs they are compared.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from bypass.errors import DeviceError
from bypass.hwflow.rules import HardwareRule, Translation
from bypass.rules import TCP, UDP

__all__ = ["SPEC_BYTES", "NtupleRule", "Plan", "Target", "plan"]

# linux/ethtool.h
FLOW_TYPES = {"tcp4": 1, "udp4": 2, "tcp6": 5, "udp6": 6, "ip4": 0xD, "ip6": 0xE}
FLOW_EXT, FLOW_RSS = 0x80000000, 0x20000000
DISCARD = (1 << 64) - 1
VF_SHIFT = 32
IP_VERSION_4 = 1  # ETH_RX_NFC_IP4
VLAN_ID = 0x0FFF
SPEC_BYTES = 168
# flow type; fields and their masks: of the headers (52 bytes), then VLAN and others (20 bytes); cookie; location
_SPEC = struct.Struct("=I 52s20s 52s20s 4x Q I4x")
_EXT = struct.Struct(">8x 2x H 8x")  # struct ethtool_flow_ext: the tag's control information


@dataclass(frozen=True, slots=True)
class Target:
    """Where packets go: to a queue, to queues by an RSS context (none: the kernel's), to a virtual function's queue."""

    queues: tuple[int, ...]
    vf: int | None = None


@dataclass(frozen=True, slots=True)
class NtupleRule:
    """One rule of `ethtool -N`. target None: dropped."""

    hardware: HardwareRule
    target: Target | None

    @property
    def flow_type(self) -> str:
        name = {TCP: "tcp", UDP: "udp"}.get(self.hardware.proto or 0, "ip")
        return f"{name}{self.hardware.family}"

    @property
    def name(self) -> str:
        return self.hardware.rule.name

    def spreads(self) -> bool:
        """It needs an RSS context."""
        return self.target is not None and len(self.target.queues) != 1

    # ---- For people ------------------------------------------------------------------------------------------------
    def text(self, location: int, context: int) -> str:
        """What follows `ethtool -N IFACE`."""
        words = ["flow-type", self.flow_type]
        for name, value, mask, bits in self._fields():
            words += [name, _shown(name, value, bits)]
            if mask != (1 << bits) - 1:
                words += ["m", _shown(name, ~mask & (1 << bits) - 1, bits)]
        return " ".join([*words, *self._action_words(context), "loc", str(location)])

    def _fields(self) -> Iterator[tuple[str, int, int, int]]:
        """(ethtool's name, value, mask, bits) of what is compared."""
        h = self.hardware
        bits = 32 if h.family == 4 else 128
        for name, net in (("src-ip", h.remote), ("dst-ip", h.local)):
            if net is not None and net.prefixlen:
                yield name, int(net.network_address), int(net.netmask), bits
        if self.flow_type.startswith("ip") and h.proto is not None:
            yield "l4proto", h.proto, 0xFF, 8
        for name, (value, mask) in (("src-port", h.remote_port), ("dst-port", h.local_port)):
            if mask:
                yield name, value, mask, 16
        if h.vlan is not None:
            yield "vlan", h.vlan, VLAN_ID, 16

    def _action_words(self, context: int) -> Iterator[str]:
        if self.target is None:
            yield from ("action", "-1")
        elif self.spreads():
            yield from ("context", str(context if self.target.queues else 0))
        elif self.target.vf is not None:
            yield from ("vf", str(self.target.vf), "queue", str(self.target.queues[0]))
        else:
            yield from ("action", str(self.target.queues[0]))

    # ---- For the kernel ----------------------------------------------------------------------------------------------
    def pack(self, location: int) -> bytes:
        """struct ethtool_rx_flow_spec."""
        flow = FLOW_TYPES[self.flow_type]
        value, mask = self._headers()
        ext = (bytes(_EXT.size), bytes(_EXT.size))
        if self.hardware.vlan is not None:
            flow |= FLOW_EXT
            ext = (_EXT.pack(self.hardware.vlan), _EXT.pack(VLAN_ID))
        if self.spreads():
            flow |= FLOW_RSS
        return _SPEC.pack(flow, value, ext[0], mask, ext[1], self._cookie(), location)

    def _cookie(self) -> int:
        if self.target is None:
            return DISCARD
        if self.spreads():
            return 0
        # Function 0 is the device itself, so theirs begin with 1.
        return self.target.queues[0] | (0 if self.target.vf is None else self.target.vf + 1 << VF_SHIFT)

    def _headers(self) -> tuple[bytes, bytes]:
        """struct ethtool_tcpip4_spec or its kin, and its mask, without the padding of the union."""
        fields = {name: (v, m) for name, v, m, _ in self._fields()}
        width = 4 if self.hardware.family == 4 else 16
        whole = []
        for which in (0, 1):

            def number(name: str, length: int, which: int = which) -> bytes:
                return fields.get(name, (0, 0))[which].to_bytes(length, "big")

            data = number("src-ip", width) + number("dst-ip", width)
            if not self.flow_type.startswith("ip"):
                data += number("src-port", 2) + number("dst-port", 2)
            elif width == 4:  # four bytes of what follows, TOS, IP version, protocol
                data += bytes(5) + bytes([0 if which else IP_VERSION_4]) + number("l4proto", 1)
            else:  # four bytes of what follows, class, protocol
                data += bytes(5) + number("l4proto", 1)
            whole.append(data)
        return whole[0], whole[1]


def _shown(name: str, value: int, bits: int) -> str:
    if name.endswith("-ip"):
        return str(ip_address(value.to_bytes(bits // 8, "big")))
    return hex(value) if bits == 16 and name == "vlan" and value > VLAN_ID else str(value)


# ---- All of an interface -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Plan:
    """What an interface is told.

    Attributes:
        ifname: the interface.
        stack: queues that AF_XDP sockets have; none of them when a virtual function is the target.
        kernel: queues that the kernel keeps.
        rules: those that are asked first at the beginning.
        file: of the policy, for errors.
    """

    ifname: str
    stack: tuple[int, ...]
    kernel: tuple[int, ...]
    rules: tuple[NtupleRule, ...]
    file: str

    @property
    def context(self) -> tuple[int, ...]:
        """Queues of the RSS context; none is needed when they are less than two."""
        return self.stack if any(r.spreads() for r in self.rules) else ()

    def weights(self, queues: Sequence[int]) -> str:
        """For -X: which queues share."""
        return " ".join("1" if q in queues else "0" for q in range(max((*self.stack, *self.kernel)) + 1))

    def commands(self, first: int = 0, context: int = 1) -> list[str]:
        """What does it. first: location of the first rule; context: number of the RSS context, where one is made."""
        at = self.ifname
        lines = [f"ethtool -K {at} ntuple on"]
        if self.context:
            lines.append(f"ethtool -X {at} context new weight {self.weights(self.context)}")
        lines += [f"ethtool -N {at} {r.text(first + i, context)}" for i, r in enumerate(self.rules)]
        if self.stack:
            lines.append(f"ethtool -X {at} weight {self.weights(self.kernel)}")
        return lines

    def undo_commands(self, first: int = 0, context: int = 1) -> list[str]:
        """What takes it back, where the interface hashed over all queues before."""
        at = self.ifname
        lines = [f"ethtool -X {at} default"] if self.stack else []
        lines += [f"ethtool -N {at} delete {first + i}" for i in reversed(range(len(self.rules)))]
        if self.context:
            lines.append(f"ethtool -X {at} context {context} delete")
        return lines


def plan(
    translation: Translation,
    ifname: str,
    *,
    stack: Sequence[int],
    kernel: Sequence[int],
    vf: int | None = None,
) -> Plan:
    """Rules for an interface whose queues are shared out.

    A `pass` rule sends to the kernel's queues in turn, one for each rule, because only a device with RSS contexts can
    spread what a rule matches; where the stack has several queues it is one, and the kernel's hash is used.

    Args:
        stack: queues of AF_XDP sockets; with `vf` of the virtual function, the first counts.
        kernel: the others that the kernel is to use.
        vf: what is steered goes to this virtual function.

    Raises:
        DeviceError: the queues cannot be shared out so.
    """
    ours, theirs = tuple(dict.fromkeys(stack)), tuple(dict.fromkeys(kernel))
    both = sorted(set(ours) & set(theirs)) if vf is None else []
    if both:
        raise DeviceError(
            f"{ifname}: queue {', '.join(map(str, both))} cannot be the stack's and the kernel's"
        )
    if not theirs:
        raise DeviceError(f"{ifname}: no queue is left to the kernel: it needs one at least")
    if not ours and vf is None:
        raise DeviceError(f"{ifname}: no queue is the stack's")
    target = Target((ours or (0,))[:1], vf) if vf is not None else Target(ours)
    turn, made, seen = 0, [], set()
    for r in translation.rules:
        if r.match in seen:
            continue  # the same again, behind: it is never asked
        seen.add(r.match)
        if r.action == "drop":
            made.append(NtupleRule(r, None))
        elif r.action == "pass":
            made.append(
                NtupleRule(r, Target((theirs[turn % len(theirs)],) if len(target.queues) == 1 else ()))
            )
            turn += 1
        else:
            made.append(NtupleRule(r, target))
    return Plan(ifname, ours if vf is None else (), theirs, tuple(made), translation.file)
