# SPDX-License-Identifier: Apache-2.0
"""What the rest of this package knows the machine by: where sysfs and its kin are, and what changes something there.

Everything that is asked of the kernel, or told to it, goes through a Machine; tests give one with a small kernel of
their own (`tests/fake_pci.py`).
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from bypass import nic, procfs
from bypass.offloop import off_loop
from bypass.pci import network
from bypass.records import locked, started

RECORDS = "run/bypass/nic"
RTEXT_FILTER_VF = 1


@dataclass(frozen=True, slots=True)
class VfSettings:
    """What a device lets a virtual function do. None and "": as it is. `vlan` 0: none."""

    mac: str = ""
    trust: bool | None = None
    spoofchk: bool | None = None
    vlan: int | None = None


class Machine:
    """This machine. `root`: where the file system begins."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.sys = root / "sys"
        self.proc = root / "proc"
        self.run = root / "run"
        self.lib_modules = root / "lib/modules"
        self.records = root / RECORDS
        self.pci_ids = tuple(root / "usr/share" / place / "pci.ids" for place in ("misc", "hwdata"))

    # ---- Files -----------------------------------------------------------------------------------------------------
    def read(self, path: Path) -> str:
        """A file's text without white space around it; "" when it is not there, or says nothing to us."""
        try:
            return path.read_text(errors="replace").strip().rstrip("\0")
        except OSError:
            return ""

    def write(self, path: Path, text: str) -> None:
        """Into a file that exists. OSError with what the kernel thinks of it."""
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)

    def target(self, path: Path) -> str:
        """The last part of what a symbolic link points to; "" when there is none."""
        try:
            return Path(os.readlink(path)).name
        except OSError:
            return ""

    # ---- The rest --------------------------------------------------------------------------------------------------
    def load_module(self, name: str) -> None:
        """By modprobe. OSError: why not."""
        modprobe = shutil.which("modprobe") or shutil.which("modprobe", path="/usr/sbin:/sbin")
        if modprobe is None:
            raise OSError(f"the module {name} is not loaded, and there is no modprobe (apt-get install kmod)")
        done = subprocess.run([modprobe, "--", name], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise OSError(done.stderr.strip() or f"modprobe {name} failed")

    def facts(self, ifname: str) -> nic.Nic:
        return nic.read(ifname)

    def snapshot(self, ifname: str) -> network.Saved:
        return network.snapshot(ifname)

    def restore(self, saved: network.Saved, ifname: str) -> list[str]:
        return network.restore(saved, ifname)

    def vf_settings(self, ifname: str) -> dict[int, VfSettings]:
        """Of an interface's virtual functions, by number."""
        return read_vfs(ifname)

    def set_vf(self, ifname: str, vf: int, settings: VfSettings) -> None:
        """OSError with what the kernel, or the driver, thinks of it."""
        change_vf(ifname, vf, settings)

    def settle(self) -> None:
        """Lets udev finish what it does to new interfaces: it may rename them."""
        if (self.run / "udev/control").exists() and shutil.which("udevadm"):
            subprocess.run(["udevadm", "settle", "--timeout=5"], capture_output=True, check=False)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def holders(self, paths: set[str]) -> dict[int, str]:
        """Processes that have one of these device files open: pid -> name."""
        found = {}
        for pid in procfs.pids(self.proc):
            if any(target in paths for _, target in procfs.descriptors(pid, self.proc)):
                found[pid] = self.read(self.proc / str(pid) / "comm")
        return found

    def started(self, pid: int) -> int | None:
        """As bypass.records.started()."""
        return started(pid, self.proc)

    def locked(self) -> AbstractContextManager[None]:
        """One change of drivers at a time. DeviceError: the folder of records cannot be made or used."""
        return locked(self.records, "changing drivers needs root")


# ---- Virtual functions, by netlink ---------------------------------------------------------------------------------
@off_loop
def read_vfs(ifname: str) -> dict[int, VfSettings]:
    """Settings of the virtual functions of an interface, by number."""
    from pyroute2 import IPRoute

    found = {}
    with IPRoute() as ip:
        link = ip.link("get", index=socket.if_nametoindex(ifname), ext_mask=RTEXT_FILTER_VF)[0]
    listed = link.get_attr("IFLA_VFINFO_LIST")
    for vf in listed.get_attrs("IFLA_VF_INFO") if listed else ():
        mac, vlan = vf.get_attr("IFLA_VF_MAC"), vf.get_attr("IFLA_VF_VLAN")
        trust, spoofchk = vf.get_attr("IFLA_VF_TRUST"), vf.get_attr("IFLA_VF_SPOOFCHK")
        found[int(mac["vf"])] = VfSettings(
            mac["mac"][:17],
            bool(trust["trust"]) if trust else None,
            bool(spoofchk["spoofchk"]) if spoofchk else None,
            vlan["vlan"] if vlan else None,
        )
    return found


@off_loop
def change_vf(ifname: str, vf: int, settings: VfSettings) -> None:
    """One message for each setting, since drivers refuse some of them. OSError: which, and why."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    said = {
        "mac": settings.mac or None,
        "vlan": settings.vlan,
        "trust": None if settings.trust is None else int(settings.trust),
        "spoofchk": None if settings.spoofchk is None else int(settings.spoofchk),
    }
    with IPRoute() as ip:
        for name, value in said.items():
            if value is None:
                continue
            try:
                ip.link("set", index=socket.if_nametoindex(ifname), vf={"vf": vf, name: value})
            except NetlinkError as error:
                code = abs(error.code)
                raise OSError(code, f"{name} of function {vf}: {os.strerror(code)}") from error
