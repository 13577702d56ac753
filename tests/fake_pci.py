# SPDX-License-Identifier: Apache-2.0
"""A machine with PCI devices below a folder: a tree like sysfs, and a kernel that does what is written there asks for.

Drivers come and go as on Linux: an interface goes with its driver, with all that it had, and what a driver makes anew
is bare and has the name that the kernel chose. Any write may be made to fail (`fail_at`: the how manieth, from 1).
"""

from __future__ import annotations

import errno
import shutil
from dataclasses import replace
from pathlib import Path

from bypass import nic
from bypass.pci.machine import Machine, VfSettings
from bypass.pci.network import Item, Saved

PLAIN = nic.Nic(
    name="",
    index=2,
    kind="device",
    driver="ixgbe",
    mac="02:00:00:00:00:02",
    mtu=1500,
    state="up",
    rx_queues=1,
    tx_queues=1,
    max_queues=1,
    features={},
    xdp_features=None,
    program=None,
    default_route=False,
    login="",
)
BARE = Saved("", 0, "02:00:00:00:00:02", 1500, False)
NIC = "0000:03:00.0"


class FakeMachine(Machine):
    def __init__(self, root: Path, *, iommu: bool = True) -> None:
        super().__init__(root)
        self.iommu = iommu
        self.writes: list[tuple[str, str]] = []
        self.fail_at: set[int] = set()
        self.refusing: set[str] = set()  # drivers whose probe fails
        self.modules = {"vfio-pci"}  # what modprobe finds
        self.native: dict[str, str] = {}  # address -> the kernel's driver for it
        self.kernel_names: dict[str, str] = {}
        self.config: dict[str, Saved] = {}  # by interface
        self.about: dict[str, nic.Nic] = {}
        self.unable: list[str] = []  # what restore() says
        self.busy: dict[int, str] = {}
        self.pids: dict[int, int] = {}
        self.free_pages = 100
        self.vfs: dict[int, VfSettings] = {}
        self.vf_calls = self.vf_fails_at = 0
        for folder in ("bus/pci/devices", "bus/pci/drivers", "class/net", "kernel/iommu_groups"):
            (self.sys / folder).mkdir(parents=True)
        (self.sys / "bus/pci/drivers_probe").touch()
        self.proc.mkdir()

    # ---- Building --------------------------------------------------------------------------------------------------
    def driver(self, name: str) -> Path:
        folder = self.sys / "bus/pci/drivers" / name
        folder.mkdir(exist_ok=True)
        for file in ("bind", "unbind"):
            (folder / file).touch()
        return folder

    def device(
        self,
        address: str = NIC,
        driver: str = "ixgbe",
        ifname: str = "eth1",
        *,
        kernel_name: str = "",
        klass: int = 0x020000,
        group: str = "17",
        numa: int = 0,
        ids: tuple[int, int] = (0x8086, 0x10FB),
        vfs: int | None = None,
    ) -> Path:
        """As after boot: bound, and its interface set up."""
        at = self.sys / "devices/pci0000:00" / address
        at.mkdir(parents=True)
        (self.sys / "bus/pci/devices" / address).symlink_to(at)
        for name, text in (
            ("class", f"0x{klass:06x}\n"),
            ("vendor", f"0x{ids[0]:04x}\n"),
            ("device", f"0x{ids[1]:04x}\n"),
            ("numa_node", f"{numa}\n"),
            ("driver_override", "(null)\n"),
        ):
            (at / name).write_text(text)
        if vfs is not None:
            (at / "sriov_numvfs").write_text("0\n")
            (at / "sriov_totalvfs").write_text(f"{vfs}\n")
        if self.iommu and group:
            folder = self.sys / "kernel/iommu_groups" / group
            (folder / "devices").mkdir(parents=True, exist_ok=True)
            (folder / "devices" / address).symlink_to(at)
            (at / "iommu_group").symlink_to(folder)
        if driver:
            self.driver(driver)
            self.native[address] = driver
            self.kernel_names[address] = kernel_name or ifname
            self._bind(address, driver)
            if ifname and kernel_name:
                self._rename(kernel_name, ifname)
            if ifname:
                self.config[ifname] = configured(ifname)
        return at

    # ---- The kernel ------------------------------------------------------------------------------------------------
    def write(self, path: Path, text: str) -> None:
        if not path.exists():
            raise OSError(errno.ENOENT, "No such file or directory")
        self.writes.append((str(path.relative_to(self.sys)), text))
        if len(self.writes) in self.fail_at:
            raise OSError(errno.EIO, "Input/output error")
        name, parent = path.name, path.parent.resolve()
        if name == "driver_override":
            path.write_text("(null)\n" if text == "\n" else text)
        elif name == "unbind":
            self._unbind(text.strip(), parent.name)
        elif name == "bind":
            self._bind(text.strip(), parent.name)
        elif name == "drivers_probe":
            self._probe(text.strip())
        elif name == "sriov_numvfs":
            self._vfs(parent, int(text))
        elif name == "nr_hugepages":
            self._hugepages(parent, int(text))
        else:
            path.write_text(text + "\n")

    def _at(self, address: str) -> Path:
        return (self.sys / "bus/pci/devices" / address).resolve()

    def _probe(self, address: str) -> None:
        at = self._at(address)
        override = self.read(at / "driver_override")
        wanted = self.native.get(address, "") if override == "(null)" else override
        if (at / "driver").is_symlink() or not wanted or not (self.sys / "bus/pci/drivers" / wanted).exists():
            return
        if wanted not in self.refusing:
            self._bind(address, wanted)

    def _bind(self, address: str, driver: str) -> None:
        at = self._at(address)
        if driver in self.refusing:
            raise OSError(errno.ENODEV, "No such device")
        (at / "driver").symlink_to(self.driver(driver))
        ifname = self.kernel_names.get(address, "")
        if driver == self.native.get(address) and ifname:
            self._interface(at, ifname)

    def _interface(self, at: Path, ifname: str) -> None:
        folder = at / "net" / ifname
        folder.mkdir(parents=True)
        (folder / "operstate").write_text("up\n")
        (folder / "dev_port").write_text("0\n")
        (folder / "device").symlink_to(at)
        (self.sys / "class/net" / ifname).symlink_to(folder)
        self.config[ifname] = replace(BARE, name=ifname)

    def _unbind(self, address: str, driver: str) -> None:
        at = self._at(address)
        if self.target(at / "driver") != driver:
            raise OSError(errno.ENODEV, "No such device")
        (at / "driver").unlink()
        for folder in (at / "net").glob("*"):
            (self.sys / "class/net" / folder.name).unlink()
            self.config.pop(folder.name, None)
            shutil.rmtree(folder)

    def _rename(self, old: str, new: str) -> None:
        folder = (self.sys / "class/net" / old).resolve()
        folder.rename(folder.parent / new)
        (self.sys / "class/net" / old).unlink()
        (self.sys / "class/net" / new).symlink_to(folder.parent / new)
        self.config[new] = replace(self.config.pop(old), name=new)

    def _vfs(self, at: Path, number: int) -> None:
        now = int(self.read(at / "sriov_numvfs"))
        if number and now:
            raise OSError(errno.EBUSY, "Device or resource busy")
        if number > int(self.read(at / "sriov_totalvfs")):
            raise OSError(errno.ERANGE, "Numerical result out of range")
        for i in range(now):
            address = self.target(at / f"virtfn{i}")
            (at / f"virtfn{i}").unlink()
            if self.target(self._at(address) / "driver"):
                self._unbind(address, self.target(self._at(address) / "driver"))
            vf = self._at(address)
            for link in (self.sys / "kernel/iommu_groups").glob(f"*/devices/{address}"):
                link.unlink()
            (self.sys / "bus/pci/devices" / address).unlink()
            shutil.rmtree(vf)
        for i in range(number):
            address = f"{at.name[:8]}10.{i}"
            vf = self.device(address, "ixgbevf", f"{at.name[5:7]}v{i}", group=f"2{i}")
            (vf / "physfn").symlink_to(at)
            (at / f"virtfn{i}").symlink_to(vf)
            self.config[f"{at.name[5:7]}v{i}"] = replace(BARE, name=f"{at.name[5:7]}v{i}")
        (at / "sriov_numvfs").write_text(f"{number}\n")

    def pages(self, size_kib: int = 2048, nodes: int = 1) -> None:
        """Room for hugepages of a size, on this many nodes."""
        name = f"hugepages-{size_kib}kB"
        places = [self.sys / "kernel/mm/hugepages" / name]
        places += [self.sys / f"devices/system/node/node{n}/hugepages" / name for n in range(nodes)]
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
            for file in ("nr_hugepages", "free_hugepages", "surplus_hugepages"):
                (place / file).write_text("0\n")

    def _hugepages(self, at: Path, number: int) -> None:
        used = int(self.read(at / "nr_hugepages")) - int(self.read(at / "free_hugepages"))
        got = max(min(number, self.free_pages), used)
        (at / "nr_hugepages").write_text(f"{got}\n")
        (at / "free_hugepages").write_text(f"{got - used}\n")

    # ---- The rest of the machine -----------------------------------------------------------------------------------
    def load_module(self, name: str) -> None:
        if name not in self.modules:
            raise OSError(f"modprobe: FATAL: Module {name} not found")
        self.driver(name)
        unsafe = self.sys / "module/vfio/parameters/enable_unsafe_noiommu_mode"
        unsafe.parent.mkdir(parents=True, exist_ok=True)
        unsafe.write_text("N\n")

    def facts(self, ifname: str) -> nic.Nic:
        return replace(self.about.get(ifname, PLAIN), name=ifname)

    def snapshot(self, ifname: str) -> Saved:
        return self.config[ifname]

    def restore(self, saved: Saved, ifname: str) -> list[str]:
        if self.unable:
            return list(self.unable)
        if ifname != saved.name:
            self._rename(ifname, saved.name)
        self.config[saved.name] = saved
        return []

    def vf_settings(self, ifname: str) -> dict[int, VfSettings]:
        return dict(self.vfs)

    def set_vf(self, ifname: str, vf: int, settings: VfSettings) -> None:
        self.vf_calls += 1
        if self.vf_calls == self.vf_fails_at:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        self.vfs[vf] = settings

    def settle(self) -> None:
        pass

    def sleep(self, seconds: float) -> None:
        pass

    def holders(self, paths: set[str]) -> dict[int, str]:
        return self.busy

    def started(self, pid: int) -> int | None:
        return self.pids.get(pid, 1 if pid not in self.pids else None)

    def state(self) -> dict[str, object]:
        """All that a command may have changed."""
        devices = self.sys / "bus/pci/devices"
        return {
            "drivers": {p.name: self.target(p / "driver") for p in devices.iterdir()},
            "overrides": {p.name: self.read(p / "driver_override") for p in devices.iterdir()},
            "interfaces": dict(self.config),
            "names": sorted(p.name for p in (self.sys / "class/net").iterdir()),
            "records": sorted(p.name for p in self.records.glob("*.json")),
            "unsafe": self.read(self.sys / "module/vfio/parameters/enable_unsafe_noiommu_mode"),
        }


def configured(ifname: str) -> Saved:
    return Saved(
        ifname,
        7,
        "02:00:00:00:00:02",
        9000,
        True,
        addresses=[Item("192.0.2.10/24", "00")],
        routes=[Item("198.51.100.0/24 via 192.0.2.1", "00")],
    )
