# SPDX-License-Identifier: Apache-2.0
"""A device goes to vfio-pci and comes back with everything that it had; what fails half way is undone; what others
depend on is not taken."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from fake_pci import NIC, PLAIN, FakeMachine

from bypass import nic
from bypass.errors import DeviceError
from bypass.pci import Bus, bind, left_behind, records, take, unbind


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    """A NIC that was renamed after boot, with vfio-pci loaded."""
    m = FakeMachine(tmp_path)
    m.load_module("vfio-pci")
    m.device(kernel_name="eth0", ifname="wan0")
    return m


# ---- There and back ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [NIC, "03:00.0", "wan0"])
def test_a_device_is_bound_by_address_or_interface_and_comes_back_as_it_was(
    machine: FakeMachine, name: str
) -> None:
    before = machine.state()
    bound = bind(name, machine=machine)
    assert (bound.address, bound.driver, bound.changed, bound.warnings) == (NIC, "vfio-pci", True, ())
    now = machine.state()
    assert now["drivers"] == {NIC: "vfio-pci"}
    assert now["names"] == []
    given = unbind(name, machine=machine)  # by the name that it had, too
    assert (given.driver, given.interfaces, given.changed) == ("ixgbe", ("wan0",), True)
    assert machine.state() == before


def test_only_this_device_is_asked_of_the_new_driver(machine: FakeMachine) -> None:
    machine.device("0000:04:00.0", "ixgbe", "lan0", group="18")
    bind(NIC, machine=machine)
    assert machine.writes == [
        (f"bus/pci/devices/{NIC}/driver_override", "vfio-pci"),
        (f"bus/pci/devices/{NIC}/driver/unbind", NIC),
        ("bus/pci/drivers_probe", NIC),
    ]
    assert machine.state()["drivers"] == {NIC: "vfio-pci", "0000:04:00.0": "ixgbe"}


def test_twice_is_as_once(machine: FakeMachine) -> None:
    before = machine.state()
    bind(NIC, machine=machine)
    bound, done = machine.state(), len(machine.writes)
    assert bind(NIC, machine=machine).changed is False
    assert (machine.state(), len(machine.writes)) == (bound, done)
    unbind(NIC, machine=machine)
    assert unbind(NIC, machine=machine).changed is False
    assert machine.state() == before


def test_the_record_is_for_root_alone_and_tells_what_was_there(machine: FakeMachine) -> None:
    bind(NIC, machine=machine)
    path = machine.records / f"{NIC}.json"
    assert stat.S_IMODE(machine.records.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    said = json.loads(path.read_text())
    assert (said["driver"], said["to"], said["holder"]) == ("ixgbe", "vfio-pci", None)
    assert said["interfaces"][0]["name"] == "wan0"
    assert said["interfaces"][0]["addresses"][0]["text"] == "192.0.2.10/24"


def test_a_module_is_loaded_when_it_is_missing(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    machine.device()
    assert bind("eth1", machine=machine).changed
    assert Bus(machine).read(NIC).driver == "vfio-pci"


def test_a_device_that_had_no_driver_has_none_afterwards(machine: FakeMachine) -> None:
    machine.device("0000:05:00.0", "", "", group="19")
    bind("0000:05:00.0", machine=machine)
    assert Bus(machine).read("0000:05:00.0").driver == "vfio-pci"
    assert unbind("0000:05:00.0", machine=machine).driver == ""


def test_a_device_that_somebody_else_bound_goes_to_the_driver_that_the_kernel_chooses(
    machine: FakeMachine,
) -> None:
    at = machine.sys / "bus/pci/devices" / NIC
    machine.write(at / "driver_override", "vfio-pci")
    machine.write(at / "driver/unbind", NIC)
    machine.write(machine.sys / "bus/pci/drivers_probe", NIC)
    assert unbind(NIC, machine=machine).driver == "ixgbe"


# ---- Failures ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_step_of_bind_that_fails_leaves_everything_as_it_was(machine: FakeMachine, step: int) -> None:
    before = machine.state()
    machine.fail_at = {step}
    with pytest.raises(
        DeviceError, match="was not bound to vfio-pci: Input/output error; it is ixgbe as before"
    ):
        bind(NIC, machine=machine)
    assert len(machine.writes) >= step
    assert machine.state() == before


def test_a_driver_that_does_not_take_the_device_is_a_failure_too(machine: FakeMachine) -> None:
    before = machine.state()
    machine.refusing = {"vfio-pci"}
    with pytest.raises(DeviceError, match="vfio-pci did not take it"):
        bind(NIC, machine=machine)
    assert machine.state() == before


@pytest.mark.parametrize(("step", "undo"), [(2, 1), (3, 1), (3, 2)])
def test_when_undoing_fails_as_well_the_record_mends_it_later(
    machine: FakeMachine, step: int, undo: int
) -> None:
    before = machine.state()
    machine.fail_at = {step, step + undo}
    with pytest.raises(DeviceError, match=f"and then: .*bypass nic unbind {NIC}"):
        bind(NIC, machine=machine)
    assert machine.state()["records"] == [f"{NIC}.json"]
    with pytest.raises(DeviceError, match=f"bypass nic unbind {NIC} does it from its record"):
        bind(NIC, machine=machine)
    unbind(NIC, machine=machine)
    assert machine.state() == before


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_step_of_unbind_that_fails_leaves_no_device_without_a_driver(
    machine: FakeMachine, step: int
) -> None:
    before = machine.state()
    bind(NIC, machine=machine)
    machine.fail_at = {len(machine.writes) + step}
    with pytest.raises(DeviceError, match="it is with vfio-pci now: mend the cause, then bypass nic unbind"):
        unbind(NIC, machine=machine)
    assert Bus(machine).read(NIC).driver == "vfio-pci"
    unbind("wan0", machine=machine)
    assert machine.state() == before


def test_a_kernel_driver_that_does_not_come_back_is_told_and_tried_again(machine: FakeMachine) -> None:
    before = machine.state()
    bind(NIC, machine=machine)
    machine.refusing = {"ixgbe"}
    with pytest.raises(DeviceError, match="not given back to ixgbe: No such device; it is with vfio-pci now"):
        unbind(NIC, machine=machine)
    machine.refusing = set()
    unbind(NIC, machine=machine)
    assert machine.state() == before


def test_what_the_interface_does_not_get_back_is_told_and_tried_again(machine: FakeMachine) -> None:
    before = machine.state()
    bind(NIC, machine=machine)
    machine.unable = ["route 198.51.100.0/24 via 192.0.2.1: Network is unreachable"]
    with pytest.raises(
        DeviceError, match=r"wan0: route 198.51.100.0/24 .*: Network is unreachable.*tries again"
    ):
        unbind(NIC, machine=machine)
    assert Bus(machine).read(NIC).driver == "ixgbe"
    machine.unable = []
    assert unbind(NIC, machine=machine).interfaces == ("wan0",)
    assert machine.state() == before


def test_an_interface_that_never_appears_is_told(machine: FakeMachine) -> None:
    bind(NIC, machine=machine)
    machine.kernel_names[NIC] = ""
    with pytest.raises(DeviceError, match="wan0: the driver made no interface in 10 s"):
        unbind(NIC, machine=machine)


@pytest.mark.parametrize("writes", [1, 2, 3])
def test_a_kill_between_two_steps_is_repaired_from_the_record(machine: FakeMachine, writes: int) -> None:
    class Killed(BaseException):
        pass

    before = machine.state()
    real, done = machine.write, []

    def write(path: Path, text: str) -> None:
        if len(done) >= writes:
            raise Killed
        done.append(path)
        real(path, text)

    machine.write = write  # type: ignore[method-assign]
    if writes < 3:
        with pytest.raises(Killed):
            bind(NIC, machine=machine)
    else:
        bind(NIC, machine=machine)
    machine.write = real  # type: ignore[method-assign]
    assert machine.state()["records"] == [f"{NIC}.json"]
    unbind(NIC, machine=machine)
    assert machine.state() == before


def test_a_record_that_cannot_be_read_or_written_is_an_error_that_names_it(machine: FakeMachine) -> None:
    before = machine.state()
    (machine.records / f"{NIC}.new").mkdir(parents=True)
    with pytest.raises(DeviceError, match=f"{NIC}.json: the record of .* cannot be written"):
        bind(NIC, machine=machine)
    assert machine.state() == before
    for text, says in (
        ("{", "cannot be read"),
        ('{"version": 9}', "another version"),
        ('{"version": 1}', "is no record"),
    ):
        (machine.records / f"{NIC}.json").write_text(text)
        with pytest.raises(DeviceError, match=says):
            unbind(NIC, machine=machine)


# ---- Refusals ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("facts", "says"),
    [
        (replace(PLAIN, default_route=True), "wan0 carries the default route"),
        (replace(PLAIN, login="198.51.100.7"), "the login from 198.51.100.7 comes through wan0"),
        (
            replace(PLAIN, program=nic.XdpProgram(4, "bypass_steer", "native", {77: "python"})),
            r"wan0 is used by a running bypass: bypass_steer .*python \(77\)",
        ),
        (
            replace(PLAIN, program=nic.XdpProgram(4, "filter", "skb", {})),
            "wan0 is used by an XDP program: filter",
        ),
    ],
)
def test_what_somebody_depends_on_is_taken_by_force_only(
    machine: FakeMachine, facts: nic.Nic, says: str
) -> None:
    before = machine.state()
    machine.about["wan0"] = facts
    with pytest.raises(
        DeviceError, match=rf"refused \(bypass nic bind --force does it all the same\): {says}"
    ):
        bind("wan0", machine=machine)
    assert machine.state() == before
    assert machine.writes == []
    (warning,) = bind("wan0", force=True, machine=machine).warnings
    assert warning.startswith("forced: ")


def test_all_reasons_are_named_at_once(machine: FakeMachine) -> None:
    machine.about["wan0"] = replace(PLAIN, default_route=True, login="198.51.100.7")
    machine.config["wan0"] = replace(machine.config["wan0"], lost=["the interface wan0.100 on top of it"])
    with pytest.raises(DeviceError) as error:
        bind("wan0", machine=machine)
    assert str(error.value).count("; ") == 2
    assert "wan0.100 on top of it would be lost" in str(error.value)


def test_the_others_of_an_iommu_group_count_bridges_do_not(machine: FakeMachine) -> None:
    machine.device("0000:03:00.1", "ixgbe", "wan1")
    machine.device("0000:02:00.0", "pcieport", "", klass=0x060400)
    with pytest.raises(
        DeviceError, match=r"0000:03:00.1 is in the same IOMMU group \(17\) and has the driver ixgbe"
    ):
        bind(NIC, machine=machine)
    bind("0000:03:00.1", force=True, machine=machine)
    assert bind(NIC, machine=machine).warnings == ()


def test_virtual_functions_that_would_go_are_named(machine: FakeMachine) -> None:
    at = machine.device("0000:06:00.0", "ixgbe", "lan0", group="30", vfs=4)
    machine.write(at / "sriov_numvfs", "2")
    with pytest.raises(DeviceError, match=r"its 2 virtual functions would go: 0000:06:10\.0 0000:06:10\.1"):
        bind("lan0", machine=machine)


def test_an_interface_in_another_namespace_is_suspected(machine: FakeMachine) -> None:
    machine.device("0000:07:00.0", "ixgbe", "", group="31")
    with pytest.raises(DeviceError, match="ixgbe has it without an interface here"):
        bind("0000:07:00.0", machine=machine)


def test_only_network_devices_that_exist_and_drivers_for_programs(machine: FakeMachine) -> None:
    machine.device("0000:00:1f.2", "ahci", "", klass=0x010601, group="5")
    with pytest.raises(
        DeviceError, match=r"no PCI device 'nope' here; network devices: 0000:03:00.0 \(wan0\)"
    ):
        bind("nope", machine=machine)
    with pytest.raises(DeviceError, match=r"no PCI device '\.\./wan0'"):
        bind("../wan0", machine=machine)
    with pytest.raises(DeviceError, match=r"0000:00:1f.2 is no network device \(its class is 010601\)"):
        bind("00:1f.2", force=True, machine=machine)
    with pytest.raises(DeviceError, match="driver 'ahci': it is one of vfio-pci, uio_pci_generic, igb_uio"):
        bind(NIC, "ahci", machine=machine)
    machine.modules.clear()
    with pytest.raises(
        DeviceError, match="the driver igb_uio is not there: modprobe: FATAL: Module igb_uio not found"
    ):
        bind(NIC, "igb_uio", machine=machine)


@pytest.mark.parametrize(
    ("cmdline", "says"),
    [("quiet", "boot with intel_iommu=on"), ("quiet intel_iommu=on", "the kernel was told to use one")],
)
def test_without_an_iommu_it_says_how_to_get_one(tmp_path: Path, cmdline: str, says: str) -> None:
    machine = FakeMachine(tmp_path, iommu=False)
    machine.device()
    (machine.proc / "cmdline").write_text(cmdline)
    with pytest.raises(DeviceError, match=f"has no IOMMU, which vfio-pci needs: {says}.*--no-iommu"):
        bind("eth1", force=True, machine=machine)  # force is not enough
    machine.about["eth1"] = replace(PLAIN, default_route=True)
    with pytest.raises(DeviceError, match=r"Also: eth1 carries the default route"):
        bind("eth1", machine=machine)


def test_the_unsafe_mode_is_switched_on_for_the_devices_that_need_it_and_off_after_them(
    tmp_path: Path,
) -> None:
    machine = FakeMachine(tmp_path, iommu=False)
    machine.load_module("vfio-pci")
    machine.device()
    machine.device("0000:04:00.0", "ixgbe", "eth2")
    before = machine.state()
    (warning,) = bind("eth1", no_iommu=True, machine=machine).warnings
    assert "can read and write everything" in warning
    assert machine.state()["unsafe"] == "Y"
    bind("eth2", no_iommu=True, machine=machine)
    unbind("eth2", machine=machine)
    assert machine.state()["unsafe"] == "Y"
    unbind("eth1", machine=machine)
    assert machine.state() == before
    machine.fail_at = {len(machine.writes) + 3}
    with pytest.raises(DeviceError, match="it is ixgbe as before"):
        bind("eth1", no_iommu=True, machine=machine)
    assert machine.state() == before


def test_a_device_that_a_program_has_open_is_not_taken_from_it(machine: FakeMachine) -> None:
    bind(NIC, machine=machine)
    bound = machine.state()
    machine.busy = {4711: "bypass-fwd"}
    with pytest.raises(DeviceError, match=r"in use by bypass-fwd \(4711\): stop it first"):
        unbind(NIC, machine=machine)
    assert machine.state() == bound


# ---- Taking --------------------------------------------------------------------------------------------------------
def test_what_was_taken_goes_back_at_the_end_of_the_block(machine: FakeMachine) -> None:
    before = machine.state()
    with take("wan0", machine=machine) as taken:
        assert (taken.address, taken.driver, taken.ours) == (NIC, "vfio-pci", True)
        record = records.load(machine, NIC)
        assert record is not None
        assert record.holder == (os.getpid(), 1)
    assert machine.state() == before
    with pytest.raises(RuntimeError), take("wan0", machine=machine):
        raise RuntimeError
    assert machine.state() == before


def test_what_was_bound_by_command_stays_bound(machine: FakeMachine) -> None:
    bind(NIC, machine=machine)
    bound = machine.state()
    with take(NIC, machine=machine) as taken:
        assert taken.ours is False
    assert machine.state() == bound


def test_what_another_process_has_is_refused_and_inherited_when_it_was_killed(machine: FakeMachine) -> None:
    before = machine.state()
    machine.pids[4711] = 55
    bind(NIC, machine=machine)
    record = records.load(machine, NIC)
    assert record is not None
    records.save(machine, replace(record, holder=(4711, 55)))
    for call in (lambda: take(NIC, machine=machine).__enter__(), lambda: unbind(NIC, machine=machine)):
        with pytest.raises(DeviceError, match=f"{NIC} is held by process 4711"):
            call()
    machine.pids[4711] = 56  # another process has the number now
    with take(NIC, machine=machine) as taken:
        assert taken.ours is True
    assert machine.state() == before


def test_what_a_killed_process_left_half_way_is_mended_and_taken(machine: FakeMachine) -> None:
    before = machine.state()
    machine.fail_at = {2, 3}
    with pytest.raises(DeviceError), take(NIC, machine=machine):
        pass
    assert machine.state()["records"]
    machine.pids[os.getpid()] = 2  # the next process
    with take("wan0", machine=machine) as taken:
        assert taken.ours is True
        assert machine.state()["drivers"] == {NIC: "vfio-pci"}
    assert machine.state() == before


def test_a_device_that_was_taken_out_is_forgotten(
    machine: FakeMachine, caplog: pytest.LogCaptureFixture
) -> None:
    with take(NIC, machine=machine):
        (machine.sys / "bus/pci/devices" / NIC).unlink()
    assert f"{NIC} was taken out of the machine" in caplog.text
    assert machine.state()["records"] == []
    with pytest.raises(DeviceError, match="no PCI device"):
        unbind(NIC, machine=machine)


def test_what_a_killed_process_left_is_known(machine: FakeMachine) -> None:
    assert left_behind(machine) == []
    with take(NIC, machine=machine):
        assert left_behind(machine) == []
        machine.pids[os.getpid()] = 2  # this one is dead, and another has its number
        assert [r.address for r in left_behind(machine)] == [NIC]
        machine.pids[os.getpid()] = 1
    bind(NIC, machine=machine)
    assert left_behind(machine) == []  # by command: nobody's to end
