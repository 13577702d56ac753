# SPDX-License-Identifier: Apache-2.0
"""What a port for DPDK lacks is a failure where a policy asks for one, and only told where none does."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from fake_pci import NIC, FakeMachine

from bypass import doctor, doctor_port
from bypass.cli import cli
from bypass.doctor_port import LOADS, Check, Facts, Needs, check_port
from bypass.hugepages import Pool
from bypass.pci import Bus, bind, records
from bypass.policy import parse_policy

GOOD = Facts((Pool(2 << 20, None, 512, 512, 0), Pool(1 << 30, None, 1, 1, 0)), 20, "there", "22.11.11", LOADS)
BARE = Facts((), 0, "missing", "", "there is no DPDK plug-in")
POLICY = """
version: 1
interface: bypass0
backend: {kind: dpdk, device: "DEVICE", EAL}
addresses: [192.0.2.10/24]
flows: [{name: web, match: {proto: tcp, local: 192.0.2.10, local_port: 80}, action: steer}]
"""
AFXDP = re.sub(r"backend: .*\n.*", "backend: {kind: afxdp}", POLICY).replace("bypass0", "eth1")


def needs(device: str = "net_af_packet0,iface=eth1", eal: str = "") -> Needs:
    """What a policy needs."""
    found = Needs.of(parse_policy(POLICY.replace("DEVICE", device).replace("EAL", eal)))
    assert found is not None
    return found


def named(checks: Iterator[Check], name: str) -> Check:
    return next(c for c in checks if c.name == name)


def test_what_a_policy_needs_is_read_from_it() -> None:
    frames = 4 * 1024 * (2048 + doctor_port.FRAME_EXTRA) + doctor_port.EAL_BYTES
    assert needs() == Needs(frames, "")
    assert needs("0000:03:00.0", "eal: {memory: 256M}") == Needs(256 << 20, "0000:03:00.0")
    assert needs("pci:03:00.0,arg=1", "eal: {hugepages: false}") == Needs(0, "03:00.0")
    assert Needs.of(parse_policy(AFXDP)) is None
    assert Needs.of(None) is None


def test_nothing_fails_without_a_policy_and_nothing_is_mended() -> None:
    for facts in (GOOD, BARE):
        checks = list(check_port(facts, None))
        assert [c.verdict for c in checks] == ["ok"] * 5
        assert [c.fix for c in checks] == [""] * 5
    assert named(check_port(BARE, None), "DPDK plug-in").found == "there is no DPDK plug-in"


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("DPDK plug-in", "apt-get install --no-install-recommends dpdk-dev && make build"),
        ("hugepages", "bypass nic hugepages reserve 256M (or eal: {hugepages: false} in the policy)"),
        ("IOMMU", "boot with intel_iommu=on"),
        ("vfio-pci", "a kernel with CONFIG_VFIO_PCI"),
    ],
)
def test_what_a_policy_needs_and_is_not_there_fails_with_what_mends_it(name: str, fix: str) -> None:
    wanted = replace(needs(eal="eal: {memory: 256M}"), device=NIC)
    bad = named(check_port(BARE, wanted), name)
    assert bad.verdict == "fail"
    assert bad.fix.startswith(fix)
    good = named(check_port(GOOD, wanted), name)
    assert (good.verdict, good.fix) == ("ok", "")


def test_pages_count_by_what_is_free_of_them() -> None:
    wanted = Needs(300 << 20, "")
    facts = replace(GOOD, pools=(Pool(2 << 20, None, 512, 100, 0),))
    check = named(check_port(facts, wanted), "hugepages")
    assert (check.verdict, check.found) == ("fail", "200 MiB free, 300 needed: 100 MiB are missing")
    assert (
        named(
            check_port(replace(facts, pools=(Pool(2 << 20, None, 512, 150, 0),)), wanted), "hugepages"
        ).verdict
        == "ok"
    )
    assert named(check_port(BARE, Needs(0, "")), "hugepages").verdict == "ok"


def test_a_virtual_device_needs_neither_iommu_nor_vfio() -> None:
    checks = {c.name: c.verdict for c in check_port(BARE, Needs(0, ""))}
    assert (checks["IOMMU"], checks["vfio-pci"], checks["DPDK plug-in"]) == ("ok", "ok", "fail")


def test_old_libraries_are_no_libraries() -> None:
    for version, verdict in (("22.11.0", "ok"), ("23.3.1", "ok"), ("21.11.9", "fail"), ("22.07.0", "fail")):
        assert named(check_port(replace(GOOD, libraries=version), Needs(0, "")), "DPDK").verdict == verdict


def test_the_device_is_the_programs_or_will_be(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    machine.device()
    machine.device("0000:04:00.0", "mlx5_core", "eth2", group="9")
    bus = Bus(machine)
    bad = doctor_port.check_device(NIC, bus)
    assert (bad.verdict, bad.fix) == ("warn", f"bypass nic bind {NIC}")
    bind(NIC, machine=machine)
    assert doctor_port.check_device("03:00.0", bus).verdict == "ok"
    assert "on top of which" in doctor_port.check_device("04:00.0", bus).found
    assert "no PCI device" in doctor_port.check_device("05:00.0", bus).found


def test_a_device_that_a_killed_process_left_is_told(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    machine.device()
    bus = Bus(machine)
    bind(NIC, machine=machine)
    assert list(doctor_port.check_left(bus)) == []
    (record,) = records.every(machine)
    records.save(machine, replace(record, holder=(4711, 55)))
    (left,) = doctor_port.check_left(bus)
    assert (left.verdict, left.fix) == ("warn", f"bypass nic unbind {NIC}; or start again what had it")
    assert left.found == f"{NIC}: process 4711, which had taken it, was killed; it is with vfio-pci"
    machine.busy = {4712: "bypass-fwd"}
    (left,) = doctor_port.check_left(bus)
    assert "is in use by bypass-fwd (4712)" in left.found
    assert left.fix.startswith("bypass up")
    machine.busy = {}
    (machine.sys / "bus/pci/devices" / NIC).unlink()
    (left,) = doctor_port.check_left(bus)
    assert "and it is gone" in left.found


def test_vfio_is_there_or_a_module_or_missing(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    machine.pages()
    assert doctor_port.read(machine).vfio == "missing"
    folder = machine.lib_modules / platform.release()
    folder.mkdir(parents=True)
    (folder / "modules.dep").write_text(
        "kernel/drivers/vfio/pci/vfio-pci.ko.xz: kernel/drivers/vfio/vfio.ko.xz\n"
    )
    assert doctor_port.read(machine).vfio == "loadable"
    machine.driver("vfio-pci")
    machine.device(NIC)
    facts = doctor_port.read(machine)
    assert (facts.vfio, facts.groups, len(facts.pools)) == ("there", 1, 1)


def test_a_plug_in_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bad = tmp_path / "bad.so"
    bad.write_text("not a library")
    monkeypatch.setenv("BYPASS_DPDK", str(bad))
    assert "cannot be loaded" in doctor_port.read().plugin


def test_the_command_takes_a_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        doctor, "diagnose", lambda name, policy: seen.append((name, policy)) or doctor.Report(name, ())
    )
    file = tmp_path / "p.yaml"
    for text, interface in (
        (POLICY.replace("DEVICE", "net_null0").replace(", EAL", ""), ""),
        (AFXDP, "eth1"),
    ):
        file.write_text(text)
        done = CliRunner().invoke(
            cli, ["doctor", "-c", str(file)], standalone_mode=False, catch_exceptions=False
        )
        assert done.return_value == 0
        assert seen.pop() == (interface, parse_policy(text, str(file)))
