# SPDX-License-Identifier: Apache-2.0
"""Which device a policy's port takes from the kernel, and gives back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from fake_pci import NIC, FakeMachine

from bypass.dpdk_backend.taken import device_taken
from bypass.errors import DeviceError
from bypass.pci import bind, records
from bypass.policy_backend import DpdkBackend


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    m = FakeMachine(tmp_path)
    m.load_module("vfio-pci")
    m.device(ifname="wan0")
    return m


@pytest.mark.parametrize("device", [NIC, "03:00.0", f"{NIC},arg=1", f"pci:{NIC}"])
def test_what_the_kernel_has_is_taken_and_given_back(machine: FakeMachine, device: str) -> None:
    before = machine.state()
    with device_taken(DpdkBackend(device), machine) as ours:
        assert ours
        assert machine.state()["drivers"] == {NIC: "vfio-pci"}
    assert machine.state() == before


def test_what_was_bound_by_command_or_by_hand_stays_as_it_is(machine: FakeMachine) -> None:
    by_hand = "0000:04:00.0"
    machine.device(by_hand, "uio_pci_generic", "", group="18")
    bind(NIC, machine=machine)
    bound = machine.state()
    for address in (NIC, by_hand):
        with device_taken(DpdkBackend(address), machine) as ours:
            assert not ours
            assert machine.state() == bound
    assert machine.state() == bound


def test_what_dpdk_drives_on_top_of_the_kernels_driver_stays_with_it(machine: FakeMachine) -> None:
    machine.device("0000:05:00.0", "mlx5_core", "fast0", group="19")
    before = machine.state()
    with device_taken(DpdkBackend("0000:05:00.0"), machine) as ours:
        assert not ours
        assert machine.state() == before


def test_what_a_killed_program_had_taken_is_taken_over_and_goes_back(machine: FakeMachine) -> None:
    before = machine.state()
    bind(NIC, machine=machine)
    record = records.load(machine, NIC)
    assert record is not None
    machine.pids[4711] = 55
    records.save(machine, replace(record, holder=(4711, 55)))
    with pytest.raises(DeviceError, match="held by process 4711"), device_taken(DpdkBackend(NIC), machine):
        pass
    del machine.pids[4711]
    with device_taken(DpdkBackend(NIC), machine) as ours:
        assert ours
    assert machine.state() == before


def test_virtual_devices_are_nobodys_and_a_device_that_is_not_there_is_told(machine: FakeMachine) -> None:
    before = machine.state()
    for device in ("net_af_packet0,iface=eth1", "net_bonding0,mode=1,slave=0000:03:00.0", "vdev:net_ring0"):
        with device_taken(DpdkBackend(device), machine) as ours:
            assert not ours
    assert machine.state() == before
    with (
        pytest.raises(DeviceError, match=r"no PCI device '0000:09:00\.0' here"),
        device_taken(DpdkBackend("0000:09:00.0"), machine),
    ):
        pass
