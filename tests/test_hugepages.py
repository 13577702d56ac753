# SPDX-License-Identifier: Apache-2.0
"""Hugepages: what is reserved is free afterwards, fewer are told, and release() takes away no more than was added."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_pci import FakeMachine

from bypass import hugepages
from bypass.errors import DeviceError
from bypass.hugepages import Release, Reservation, parse_amount, parse_size, release, reserve
from bypass.pci.machine import Machine

M2, G1 = 2 << 20, 1 << 30


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    m = FakeMachine(tmp_path)
    m.pages(2048, nodes=2)
    m.pages(1 << 20, nodes=2)
    return m


def whole(machine: FakeMachine, size: int = M2, node: int | None = None) -> hugepages.Pool:
    return next(p for p in hugepages.pools(machine) if (p.size, p.node) == (size, node))


def use(machine: FakeMachine, pages: int) -> None:
    """A program takes some."""
    at = machine.sys / "kernel/mm/hugepages/hugepages-2048kB/free_hugepages"
    at.write_text(f"{int(at.read_text()) - pages}\n")


def test_amounts_are_pages_or_bytes() -> None:
    assert [parse_amount(t, M2) for t in ("512", "512M", "1G", "3M", "1m")] == [512, 256, 512, 2, 1]
    assert [parse_size(t) for t in ("2M", "1G", "2MB", "65536", " 64k")] == [M2, G1, M2, 65536, 65536]
    for wrong in ("", "M", "-1", "1T", "0x10", "2 M", "1.5G", "0M"):
        with pytest.raises(DeviceError, match="is no size: write it as 2M or 1G"):
            parse_size(wrong)
    with pytest.raises(DeviceError, match="'some' is no size"):
        parse_amount("some", M2)


def test_reserving_twice_is_as_once_and_release_gives_all_back(machine: FakeMachine) -> None:
    assert reserve(40, machine=machine) == Reservation(M2, None, 40, 40, 40)
    assert reserve(40, machine=machine) == Reservation(M2, None, 40, 40, 0)
    assert reserve(50, machine=machine) == Reservation(M2, None, 50, 50, 10)
    assert release(machine=machine) == [Release(M2, None, 50, 0)]
    assert whole(machine).total == 0
    assert release(machine=machine) == []


def test_pages_of_others_stay(machine: FakeMachine) -> None:
    machine.write(machine.sys / "kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "10")
    use(machine, 4)
    assert reserve(20, machine=machine) == Reservation(M2, None, 20, 20, 14)
    assert whole(machine).total == 24
    assert release(machine=machine) == [Release(M2, None, 14, 0)]
    assert (whole(machine).total, whole(machine).free) == (10, 6)


def test_fewer_than_asked_for_are_told_and_kept(machine: FakeMachine) -> None:
    machine.free_pages = 7
    assert reserve(40, machine=machine) == Reservation(M2, None, 40, 7, 7)
    assert release(machine=machine) == [Release(M2, None, 7, 0)]


def test_pages_in_use_are_released_later(machine: FakeMachine) -> None:
    reserve(10, machine=machine)
    use(machine, 3)
    assert release(machine=machine) == [Release(M2, None, 7, 3)]
    use(machine, -3)
    assert release(machine=machine) == [Release(M2, None, 3, 0)]
    assert not (machine.run / hugepages.RECORD).exists()


def test_pages_that_are_promised_to_somebody_are_not_free(machine: FakeMachine) -> None:
    reserve(10, machine=machine)
    (machine.sys / "kernel/mm/hugepages/hugepages-2048kB/resv_hugepages").write_text("4\n")
    assert whole(machine).free == 6


def test_a_node_and_a_size_of_ones_own(machine: FakeMachine) -> None:
    assert reserve(3, G1, 1, machine=machine) == Reservation(G1, 1, 3, 3, 3)
    assert machine.writes == [("devices/system/node/node1/hugepages/hugepages-1048576kB/nr_hugepages", "3")]
    assert whole(machine, G1, 1).total == 3
    assert release(machine=machine) == [Release(G1, 1, 3, 0)]


def test_what_is_not_there_is_an_error_that_lists_what_is(machine: FakeMachine, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="no hugepages of 4M here; sizes: 2M, 1G"):
        reserve(1, 4 << 20, machine=machine)
    with pytest.raises(DeviceError, match="there is no node 7; there are: 0, 1"):
        reserve(1, M2, 7, machine=machine)
    bare = FakeMachine(tmp_path / "bare")
    with pytest.raises(DeviceError, match="this kernel has no hugepages"):
        reserve(1, machine=bare)


def test_a_refused_write_changes_nothing(machine: FakeMachine) -> None:
    machine.fail_at = {1}
    with pytest.raises(DeviceError, match="nr_hugepages: 40 cannot be set: Input/output error"):
        reserve(40, machine=machine)
    assert release(machine=machine) == []
    (machine.run / hugepages.RECORD).write_text("{broken")
    with pytest.raises(DeviceError, match="cannot be read"):
        release(machine=machine)


def test_mounts_are_found_and_not_made_twice(machine: FakeMachine) -> None:
    (machine.proc / "self").mkdir()
    (machine.proc / "self/mounts").write_text("proc /proc proc rw 0 0\nnone /mnt/huge hugetlbfs rw 0 0\n")
    assert hugepages.mounts(machine) == ["/mnt/huge"]
    assert hugepages.mount("/mnt/huge", M2, machine) is False


def test_this_machine_is_read_as_the_kernel_tells_it() -> None:
    told = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines() if "Huge" in line)
    if "HugePages_Total" not in told:
        assert hugepages.pools() == []
        return
    size = int(told["Hugepagesize"].split()[0]) << 10
    pool = next(p for p in hugepages.pools(Machine()) if (p.size, p.node) == (size, None))
    assert pool.total == int(told["HugePages_Total"])
