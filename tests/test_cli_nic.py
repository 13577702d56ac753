# SPDX-License-Identifier: Apache-2.0
"""`bypass nic`: what it lists, and what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fake_pci import NIC, FakeMachine

import bypass.hugepages
import bypass.pci.binding
import bypass.pci.devices
import bypass.pci.vf
from bypass.cli import cli, main
from bypass.pci import Bus, records
from bypass.pci.devices import read_names

IDS = """# a comment
1af4  Red Hat, Inc.
\t1041  Virtio 1.0 network device
8086  Intel Corporation
\t10fb  82599ES 10-Gigabit SFI/SFP+ Network Connection
\t\t8086 0003  Ethernet Server Adapter X520-2
\t10fc  Another
C 02  Network controller
\t10fb  not a device
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    m = FakeMachine(tmp_path)
    m.load_module("vfio-pci")
    m.pages()
    m.device(vfs=4)
    m.device("0000:03:00.1", "ixgbe", "eth2", numa=-1)
    for module in (bypass.pci.binding, bypass.pci.devices, bypass.pci.vf, bypass.hugepages):
        monkeypatch.setattr(module, "Machine", lambda: m)
    ids = tmp_path / "usr/share/misc/pci.ids"
    ids.parent.mkdir(parents=True)
    ids.write_text(IDS)
    return m


def run(*args: str, code: int = 0) -> str:
    done = CliRunner().invoke(cli, ["nic", *args], standalone_mode=False, catch_exceptions=False)
    assert (done.return_value or 0) == code, done.output
    return done.output


def test_names_are_those_of_devices_not_of_subsystems_or_classes(tmp_path: Path) -> None:
    (tmp_path / "pci.ids").write_text(IDS)
    wanted = {(0x8086, 0x10FB), (0x1AF4, 0x1041), (0x8086, 3)}
    assert read_names(tmp_path / "pci.ids", wanted) == {
        (0x8086, 0x10FB): "Intel Corporation 82599ES 10-Gigabit SFI/SFP+ Network Connection",
        (0x1AF4, 0x1041): "Red Hat, Inc. Virtio 1.0 network device",
    }


def test_the_list_has_all_that_decides(machine: FakeMachine) -> None:
    machine.device("0000:00:1f.2", "ahci", "", klass=0x010601, group="5")
    usb = machine.sys / "devices/usb1/1-1:1.0"
    (usb / "net/usb0").mkdir(parents=True)
    (usb / "net/usb0/operstate").write_text("down\n")
    (usb / "net/usb0/device").symlink_to(usb)
    (machine.sys / "bus/usb").mkdir()
    (usb / "subsystem").symlink_to(machine.sys / "bus/usb")
    (machine.sys / "class/net/usb0").symlink_to(usb / "net/usb0")
    text = run("list")
    line = next(x for x in text.splitlines() if x.startswith(NIC))
    assert "8086:10fb Intel Corporation 82599ES" in line
    assert line.split()[-9:] == ["ixgbe", "eth1", "up", "17", "+1", "0", "0", "of", "4"]
    assert "ahci" not in text
    assert f"0000:03:00.1 (ixgbe) is in the IOMMU group of {NIC}" in text
    assert "1-1:1.0" in text
    assert "(usb)" in text
    found: dict[str, Any] = json.loads(run("list", "--json"))
    assert [d["address"] for d in found["devices"]] == [NIC, "0000:03:00.1"]
    assert found["devices"][0]["vendor"] == "8086"
    assert found["devices"][1]["numa"] is None
    assert found["others"][0]["interface"] == "usb0"


def test_a_virtio_device_has_its_interface_one_level_below(machine: FakeMachine) -> None:
    at = machine.device("0000:00:03.0", "virtio-pci", "", group="", ids=(0x1AF4, 0x1041))
    (at / "virtio2/net/eth7").mkdir(parents=True)
    (at / "virtio2/net/eth7/device").symlink_to(at / "virtio2")
    (machine.sys / "class/net/eth7").symlink_to(at / "virtio2/net/eth7")
    device = Bus(machine).find("eth7")
    assert (device.address, device.interfaces, device.iommu) == ("0000:00:03.0", ("eth7",), False)


def test_bind_and_unbind_say_what_they_did(machine: FakeMachine) -> None:
    machine.device("0000:04:00.0", "ixgbe", "eth3", group="9")
    assert run("bind", "eth3") == "0000:04:00.0: vfio-pci\n"
    assert run("bind", "04:00.0") == "0000:04:00.0: vfio-pci, as before\n"
    assert run("unbind", "eth3") == "0000:04:00.0: ixgbe, eth3\n"
    assert run("unbind", "eth3") == "0000:04:00.0: ixgbe, eth3, as before\n"
    assert "warning: forced: 0000:03:00.1 is in the same IOMMU group" in run("bind", "eth1", "--force")


def test_all_that_was_left_behind_is_given_back(
    machine: FakeMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    before = machine.state()
    assert run("unbind", "--left") == ""
    assert main(["nic", "unbind"]) == 2
    assert "name a DEVICE, or say --left" in capsys.readouterr().err
    run("bind", "eth1", "--force")
    (record,) = records.every(machine)
    records.save(machine, replace(record, holder=(4711, 55)))
    machine.busy = {4712: "bypass-fwd"}
    assert main(["nic", "unbind", "--left"]) == 2
    assert "is in use by bypass-fwd (4712)" in capsys.readouterr().err
    machine.busy = {}
    assert run("unbind", "--left") == f"{record.address}: {record.driver}, eth1\n"
    assert machine.state() == before


def test_functions_and_pages_say_what_they_did(machine: FakeMachine) -> None:
    out = run(
        "vf", "eth1", "1", "--mac", "02:00:00:00:0A:01", "--trust", "on", "--spoofchk", "off", "--vlan", "3"
    )
    assert out == f"{NIC}: 1 virtual functions, 0 before\n  0000:03:10.0\n"
    (said,) = machine.vfs.values()
    assert (said.mac, said.trust, said.spoofchk, said.vlan) == ("02:00:00:00:0a:01", True, False, 3)
    assert run("hugepages", "reserve", "20M") == "10 pages of 2M are free, 10 of them new\n"
    assert run("hugepages", "show").split()[5:15].count("10") >= 2
    assert json.loads(run("hugepages", "show", "--json"))["pools"][0]["free"] == 10
    assert run("hugepages", "release") == "10 pages of 2M released\n"
    assert run("hugepages", "release") == "nothing is reserved\n"
    machine.free_pages = 5
    assert "try sysctl -w vm.compact_memory=1" in run("hugepages", "reserve", "6", code=1)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["bind", "nope"], "no PCI device 'nope' here; network devices: 0000:03:00.0 (eth1)"),
        (["vf", "eth1", "1", "--mac", "02:00"], "is no MAC address"),
        (["vf", "eth1", "1", "--mac", "01:00:00:00:00:01"], "is a group's address"),
        (["vf", "eth1", "70000"], "70000 is not in the range"),
        (["hugepages", "reserve", "many"], "is no size"),
        (["bind", "eth1", "--driver", "ahci"], "'ahci' is not one of"),
    ],
)
def test_what_is_wrong_is_said_with_exit_code_2(
    machine: FakeMachine, capsys: pytest.CaptureFixture[str], args: list[str], says: str
) -> None:
    before = machine.state()
    assert main(["nic", *args]) == 2
    assert says in capsys.readouterr().err
    assert machine.state() == before


@pytest.mark.parametrize("command", ["", "list", "bind", "unbind", "vf", "hugepages", "hugepages reserve"])
def test_every_command_has_help_with_examples(command: str) -> None:
    assert "Examples:" in run(*command.split(), "--help")


def test_this_machine_is_listed() -> None:
    found = json.loads(run("list", "--json"))
    folders = sorted(Path("/sys/bus/pci/devices").glob("*"))
    network = [p.name for p in folders if (p / "class").read_text().startswith("0x02")]
    assert [d["address"] for d in found["devices"]] == network
    for device in found["devices"]:
        for ifname in device["interfaces"]:
            assert Bus().find(ifname).address == device["address"]
