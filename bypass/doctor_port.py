# SPDX-License-Identifier: Apache-2.0
"""What a whole port for DPDK needs of the machine: hugepages, an IOMMU, vfio, DPDK's libraries, the plug-in.

Without a policy of that kind it is told what there is, and nothing fails: the AF_XDP backend needs none of it.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from bypass.errors import DeviceError
from bypass.hugepages import Pool, pools
from bypass.pci.binding import ON_KERNEL_DRIVER, left_behind, refuse_in_use
from bypass.pci.devices import ADDRESS, Bus, Device
from bypass.pci.machine import Machine

if TYPE_CHECKING:
    from bypass.policy import Policy

Verdict = Literal["ok", "warn", "fail"]
OLDEST = (22, 11)
EAL_BYTES = 32 << 20  # what DPDK itself takes beside the frames
FRAME_EXTRA = 256  # of each frame: its mbuf and what this project keeps with it
LOADS = "loads"
LOAD = f"""from bypass._core import ffi, lib
error = ffi.new("struct dpdk_error *")
print({LOADS!r} if lib.dpdk_load(ffi.NULL, error) else ffi.string(error.text).decode())"""


@dataclass(frozen=True)
class Check:
    """One finding. `fix`: a command, or what to do; "" when there is nothing to do."""

    group: str
    name: str
    verdict: Verdict
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Needs:
    """Of a policy of kind dpdk. `hugepages`: bytes of them; 0: it uses ordinary pages. `device`: its PCI address, ""
    for one that is no PCI device."""

    hugepages: int
    device: str

    @classmethod
    def of(cls, policy: Policy | None) -> Needs | None:
        """None: no DPDK is needed."""
        if policy is None or policy.backend.kind != "dpdk":
            return None
        backend = policy.backend
        named = backend.device.partition(",")[0].removeprefix("pci:")
        memory = (
            backend.eal.memory or backend.default_frames() * (backend.frame_size + FRAME_EXTRA) + EAL_BYTES
        )
        return cls(memory if backend.eal.hugepages else 0, named if ADDRESS.fullmatch(named.lower()) else "")


@dataclass(frozen=True)
class Facts:
    """`groups`: IOMMU groups. `vfio`: the driver is there, can be loaded, or is not to be had. `libraries`: their
    version for compilers, "" without. `plugin`: LOADS, or why it does not."""

    pools: tuple[Pool, ...]
    groups: int
    vfio: Literal["there", "loadable", "missing"]
    libraries: str
    plugin: str


def read(machine: Machine | None = None) -> Facts:
    machine = machine or Machine()
    return Facts(
        tuple(p for p in pools(machine) if p.node is None),
        len(list((machine.sys / "kernel/iommu_groups").glob("*"))),
        _vfio(machine),
        _output(["pkg-config", "--modversion", "libdpdk"]),
        _output([sys.executable, "-c", LOAD]),  # in a process of its own: what is loaded stays
    )


def _vfio(machine: Machine) -> Literal["there", "loadable", "missing"]:
    if (machine.sys / "bus/pci/drivers/vfio-pci").exists():
        return "there"
    folder = machine.lib_modules / platform.release()
    listed = (machine.read(folder / file) for file in ("modules.dep", "modules.builtin"))
    return "loadable" if any(re.search(r"/vfio[-_]pci\.ko", text) for text in listed) else "missing"


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout.strip()
    except FileNotFoundError:
        return ""


# ---- Judgement -----------------------------------------------------------------------------------------------------
def check_port(facts: Facts, needs: Needs | None) -> Iterator[Check]:
    yield _libraries(facts, needs)
    yield _plugin(facts, needs)
    yield _hugepages(facts, needs)
    yield _iommu(facts, needs)
    yield _vfio_check(facts, needs)
    if needs is not None and needs.device:
        yield check_device(needs.device)
    yield from check_left()


def check_left(bus: Bus | None = None) -> Iterator[Check]:
    """Devices that processes had taken which were killed; nothing where there are none."""
    bus = bus or Bus()
    for record in left_behind(bus.machine):
        was = f"{record.address}: process {record.holder[0] if record.holder else 0}, which had taken it, was killed"
        if record.address not in bus.addresses():
            yield Check(
                "dpdk", "device left", "warn", f"{was}, and it is gone", f"bypass nic unbind {record.address}"
            )
            continue
        device = bus.read(record.address)
        try:
            refuse_in_use(bus.machine, device)
        except DeviceError as error:
            fix = "bypass up: a broker takes over what bypass-fwd goes on with"
            yield Check("dpdk", "device left", "warn", f"{was}; {error}", fix)
        else:
            fix = f"bypass nic unbind {record.address}; or start again what had it"
            yield Check(
                "dpdk", "device left", "warn", f"{was}; it is with {device.driver or 'no driver'}", fix
            )


def _check(name: str, needed: bool, found: str, fix: str) -> Check:
    """Something that is missing."""
    return Check("dpdk", name, "fail" if needed else "ok", found, fix if needed else "")


def _libraries(facts: Facts, needs: Needs | None) -> Check:
    fix = "apt-get install --no-install-recommends dpdk-dev && make build"
    if not facts.libraries:
        found = "not there to build against"
        return Check(
            "dpdk", "DPDK", "ok", f"{found}; kind: dpdk needs 22.11 or later", "" if needs is None else fix
        )
    version = tuple(int(n) for n in re.findall(r"\d+", facts.libraries)[:2])
    if version < OLDEST:
        return _check("DPDK", needs is not None, f"{facts.libraries}: older than 22.11", fix)
    return Check("dpdk", "DPDK", "ok", facts.libraries)


def _plugin(facts: Facts, needs: Needs | None) -> Check:
    if facts.plugin == LOADS:
        return Check("dpdk", "DPDK plug-in", "ok", "loads")
    fix = "apt-get install --no-install-recommends dpdk-dev && make build"
    return _check("DPDK plug-in", needs is not None, facts.plugin or "the C core cannot be asked for it", fix)


def _hugepages(facts: Facts, needs: Needs | None) -> Check:
    free = sum(p.size * p.free for p in facts.pools) >> 20
    found = f"{free} MiB free"
    if needs is None:
        return Check("dpdk", "hugepages", "ok", found)
    if not needs.hugepages:
        return Check("dpdk", "hugepages", "ok", f"{found}; the policy uses ordinary pages")
    wanted = -(-needs.hugepages >> 20)
    if free >= wanted:
        return Check("dpdk", "hugepages", "ok", f"{found}, {wanted} needed")
    fix = f"bypass nic hugepages reserve {wanted}M (or eal: {{hugepages: false}} in the policy)"
    return _check("hugepages", True, f"{found}, {wanted} needed: {wanted - free} MiB are missing", fix)


def _iommu(facts: Facts, needs: Needs | None) -> Check:
    if facts.groups:
        return Check("dpdk", "IOMMU", "ok", f"{facts.groups} groups")
    fix = (
        "boot with intel_iommu=on and switch on VT-d or AMD-Vi in the firmware; or bypass nic bind --no-iommu"
    )
    return _check(
        "IOMMU", bool(needs and needs.device), "none: vfio-pci needs one to give a device to a program", fix
    )


def _vfio_check(facts: Facts, needs: Needs | None) -> Check:
    if facts.vfio == "there":
        return Check("dpdk", "vfio-pci", "ok", "there")
    if facts.vfio == "loadable":
        return Check("dpdk", "vfio-pci", "ok", "a module that `bypass nic bind` loads")
    found = "this kernel has none: no device can be given to a program"
    return _check("vfio-pci", bool(needs and needs.device), found, "a kernel with CONFIG_VFIO_PCI")


def check_device(address: str, bus: Bus | None = None) -> Check:
    """The policy's device, and whether a program can have it."""
    try:
        device: Device = (bus or Bus()).find(address)
    except DeviceError as error:
        return Check("dpdk", "device", "fail", str(error), "bypass nic list shows what there is")
    has = f"{device.address} has the driver {device.driver or 'none'}"
    if device.by_user:
        return Check("dpdk", "device", "ok", has)
    if device.driver in ON_KERNEL_DRIVER:
        return Check("dpdk", "device", "ok", f"{has}, on top of which DPDK's works")
    found = f"{has}: a stack in one program takes it while it runs, a broker needs it bound before"
    return Check("dpdk", "device", "warn", found, f"bypass nic bind {device.address}")
