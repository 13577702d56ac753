# SPDX-License-Identifier: Apache-2.0
"""Virtual functions are made, set up and removed; those in use stay; what fails leaves the number as it was."""

from __future__ import annotations

import errno
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from fake_pci import NIC, PLAIN, FakeMachine, configured

from bypass import netns
from bypass.errors import DeviceError
from bypass.pci import Bus, VfSettings, bind, set_functions
from bypass.pci.machine import change_vf, read_vfs

VF0, VF1 = "0000:03:10.0", "0000:03:10.1"


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    m = FakeMachine(tmp_path)
    m.load_module("vfio-pci")
    m.device(vfs=4)
    return m


def number(machine: FakeMachine) -> int:
    return Bus(machine).read(NIC).vfs


def test_functions_are_made_and_removed(machine: FakeMachine) -> None:
    done = set_functions("eth1", 2, machine=machine)
    assert (done.address, done.before, done.addresses, done.warnings) == (NIC, 0, (VF0, VF1), ())
    assert Bus(machine).read(VF1).parent == NIC
    assert [d.address for d in Bus(machine).network()] == [NIC, VF0, VF1]
    machine.writes.clear()
    assert set_functions("eth1", 2, machine=machine).addresses == (VF0, VF1)
    assert machine.writes == []  # it has two already
    set_functions("eth1", 3, machine=machine)
    assert [w for _, w in machine.writes] == ["0", "3"]  # the kernel wants it so
    assert set_functions("eth1", 0, machine=machine).addresses == ()


def test_each_function_is_set_up_macs_count_upwards(machine: FakeMachine) -> None:
    said = VfSettings("02:00:00:00:00:fe", trust=True, spoofchk=False, vlan=7)
    set_functions("eth1", 3, said, machine=machine)
    assert machine.vfs == {
        0: said,
        1: replace(said, mac="02:00:00:00:00:ff"),
        2: replace(said, mac="02:00:00:00:01:00"),
    }
    with pytest.raises(DeviceError, match="fe:ff:ff:ff:ff:ff \\+ 1 is no MAC address of a host"):
        set_functions("eth1", 2, VfSettings("fe:ff:ff:ff:ff:ff"), machine=machine)


@pytest.mark.parametrize("call", [1, 2])
def test_settings_that_are_refused_leave_no_functions(machine: FakeMachine, call: int) -> None:
    machine.vf_fails_at = call
    with pytest.raises(
        DeviceError, match="its functions were not set up: Operation not supported; there are 0 as before"
    ):
        set_functions("eth1", 2, VfSettings(trust=True), machine=machine)
    assert number(machine) == 0


def test_settings_that_are_refused_are_taken_back_on_functions_that_were_there(machine: FakeMachine) -> None:
    set_functions("eth1", 2, VfSettings(vlan=5), machine=machine)
    machine.vf_calls, machine.vf_fails_at = 0, 2
    with pytest.raises(DeviceError, match="there are 2 as before"):
        set_functions("eth1", 2, VfSettings(vlan=6), machine=machine)
    assert machine.vfs == {0: VfSettings(vlan=5), 1: VfSettings(vlan=5)}
    assert number(machine) == 2


@pytest.mark.parametrize(("fails", "left"), [({1}, 2), ({2}, 2)])
def test_a_number_that_the_device_does_not_take_leaves_the_old_one(
    machine: FakeMachine, fails: set[int], left: int
) -> None:
    set_functions("eth1", 2, machine=machine)
    machine.fail_at = {len(machine.writes) + n for n in fails}
    with pytest.raises(
        DeviceError, match="gets no 3 virtual functions: Input/output error; there are 2 as before"
    ):
        set_functions("eth1", 3, machine=machine)
    assert number(machine) == left


def test_when_the_old_number_does_not_come_back_either_it_is_said(machine: FakeMachine) -> None:
    set_functions("eth1", 2, machine=machine)
    machine.fail_at = {len(machine.writes) + n for n in (2, 3)}
    with pytest.raises(DeviceError, match="and the 2 that it had are gone: Input/output error"):
        set_functions("eth1", 3, machine=machine)


def test_more_than_there_may_be_or_any_without_sriov(machine: FakeMachine) -> None:
    with pytest.raises(DeviceError, match=f"{NIC} may have 4 virtual functions, not 5"):
        set_functions("eth1", 5, machine=machine)
    machine.device("0000:04:00.0", "e1000e", "eth2", group="40")
    with pytest.raises(DeviceError, match=r"0000:04:00.0 has no virtual functions \(SR-IOV\)"):
        set_functions("eth2", 1, machine=machine)
    bind(NIC, machine=machine)
    with pytest.raises(DeviceError, match="has no interface here by which its functions could be set up"):
        set_functions(NIC, 1, VfSettings(trust=True), machine=machine)


def test_functions_in_use_are_removed_by_force_only(machine: FakeMachine) -> None:
    set_functions("eth1", 4, machine=machine)
    machine.config["03v0"] = configured("03v0")
    machine.config["03v1"] = replace(configured("03v1"), addresses=[], master="br0")
    machine.about["03v1"] = replace(PLAIN, login="198.51.100.7")
    bind("03v2", machine=machine)
    with pytest.raises(DeviceError) as error:
        set_functions("eth1", 0, machine=machine)
    assert str(error.value).split(": ", 1)[1].split("; ") == [
        f"03v0 ({VF0}) has 192.0.2.10/24",
        f"03v1 ({VF1}) carries the login from 198.51.100.7 and belongs to br0",
        "0000:03:10.2 was bound to vfio-pci: bypass nic unbind 0000:03:10.2 first",
    ]
    assert number(machine) == 4
    assert len(set_functions("eth1", 0, force=True, machine=machine).warnings) == 3
    assert number(machine) == 0
    assert machine.state()["records"] == []


def test_a_function_that_a_program_has_open_stays_whatever_is_asked(machine: FakeMachine) -> None:
    set_functions("eth1", 1, machine=machine)
    bind(VF0, force=True, machine=machine)
    machine.busy = {4711: "qemu-system-x86"}
    with pytest.raises(DeviceError, match=rf"{VF0} is in use by qemu-system-x86 \(4711\)"):
        set_functions("eth1", 0, force=True, machine=machine)
    assert number(machine) == 1


@pytest.mark.netns
def test_settings_reach_the_driver_by_netlink(namespace: str) -> None:
    """A veth has no functions: its refusal shows that the kernel has understood the question (EINVAL if it had not)."""
    subprocess.run(
        ["ip", "-n", namespace, "link", "add", "nic1", "type", "veth", "peer", "name", "far1"], check=True
    )
    for said in (
        VfSettings("02:00:00:00:00:01"),
        VfSettings(trust=True),
        VfSettings(spoofchk=False),
        VfSettings(vlan=5),
    ):
        with pytest.raises(OSError, match="of function 3: Operation not supported") as error:
            netns.run(namespace, change_vf, "nic1", 3, said)
        assert error.value.errno == errno.EOPNOTSUPP
    assert netns.run(namespace, read_vfs, "nic1") == {}
