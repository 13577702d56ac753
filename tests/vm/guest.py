# SPDX-License-Identifier: Apache-2.0
"""What is tested inside the machine of `make test-vm`. Runs in the guest only, as root, on the host's files. What it
stands on: inside.py. Shared mode: shared.py.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from inside import (
    ADDRESSES,
    HERE,
    HUGEPAGES,
    PCI,
    PINGS,
    PMDS,
    QUIET,
    VLAN,
    VLAN_ADDRESS,
    VLAN_SERVER,
    appearance,
    ask_kernel,
    check,
    check_back,
    check_frames,
    driver,
    echo,
    failed,
    faults,
    fetch,
    interfaces,
    lines,
    part,
    pci_address,
    pci_driver,
    ping,
    prepare,
    refusal,
    run_bypass,
    served,
    sh,
    tell,
    wanted,
)  # fmt: skip
from rules import rules_in_hardware
from shared import shared_mode
from unplug import taken_from_under_a_program


# ---- The parts ---------------------------------------------------------------------------------------------------
def kernel_alone() -> None:
    for ifname, address in ADDRESSES.items():
        tell(row={"device": ifname, "driver": driver(ifname), "path": "kernel", "ping": ping(address)})


def afxdp_on_virtio() -> None:
    address = ADDRESSES["fast0"]
    before = pci_driver(pci_address("fast0"))
    with served(HERE / "afxdp.yaml", address) as server:
        link = sh("ip -d link show dev fast0")
        check(
            " xdp " in link and "xdpgeneric" not in link, "the XDP program is in virtio-net's driver (native)"
        )
        rtt, rate, answers = echo(address), fetch(address), ping(address)
    about = server.about
    check(about["xdp"] == "native", f"AF_XDP: {about['mode']} ({about['mode_reason']}), XDP {about['xdp']}")
    queues = about["queues"]
    used = all(rx > 0 and tx > 0 for rx, tx in queues.values())
    check(used and len(queues) == 2, f"two queues, both used (received, sent): {queues}")
    check_frames(about)
    check("xdp" not in sh("ip -d link show dev fast0"), "no XDP program is left")
    tell(
        row={
            "device": "fast0",
            "driver": f"{before}, kept",
            "path": f"AF_XDP {about['mode']}, {about['xdp']} XDP, {len(queues)} queues",
            "http": rate,
            "echo": rtt,
            "ping": answers,
        }
    )


class Killed(Exception):
    """For after_a_kill()."""


def whole_port(ifname: str, policy: Path) -> None:
    """The device goes to vfio-pci, a stack serves through DPDK's driver, and the kernel has it back as it was."""
    address, device, before = ADDRESSES[ifname], pci_address(ifname), appearance(ifname)
    drivers = [pci_driver(device)]
    print(f"guest: bypass nic bind {ifname}: {run_bypass('nic', 'bind', ifname)}")
    drivers.append(pci_driver(device))
    check(drivers[1] == "vfio-pci", f"{device} ({drivers[0]}) is bound to {drivers[1]}")
    check(ifname not in interfaces(), f"{ifname} is gone meanwhile")
    try:
        row = through_the_port(ifname, policy, address)
        check(not faults(), f"the IOMMU had nothing to keep the device from{lines(faults())}")
    finally:
        print(f"guest: bypass nic unbind {ifname}: {run_bypass('nic', 'unbind', ifname)}")
    drivers.append(pci_driver(device))
    check_back(ifname, device, drivers, before)
    tell(row={"device": ifname, "driver": " > ".join(drivers), **row})
    tell(row={"device": ifname, "driver": drivers[2], "path": "the kernel again", "ping": ping(address)})


def taken_by_the_server(ifname: str, policy: Path) -> None:
    """Without `bypass nic bind`: the port is a server's for as long as that runs. One is killed meanwhile: the next
    takes over what it had taken, and gives it back."""
    address, device, before = ADDRESSES[ifname], pci_address(ifname), appearance(ifname)
    drivers = [pci_driver(device)]
    after_a_kill(ifname, policy, address)
    drivers.append(pci_driver(device))
    check_back(ifname, device, drivers, before)
    row = {
        "device": ifname,
        "driver": f"{drivers[0]} > (vfio-pci) > {drivers[1]}",
        "path": "a server, the next one, the kernel",
    }
    tell(row={**row, "ping": ping(address)})


def after_a_kill(ifname: str, policy: Path, address: str) -> None:
    """What a SIGKILL leaves keeps the next server from nothing.

    A device that cannot be reset (no FLR, as both here) goes on where it was as soon as the next program lets it access
    memory, and until that one's driver resets it: at addresses that are no more. The IOMMU is there for that; its
    complaints are shown, and no failure.
    """
    try:
        with served(policy, address):
            raise Killed
    except Killed:
        check(ifname not in interfaces(), "its server is killed, the kernel's side of the port is gone")
    check("vfio" in pci_driver(PCI[ifname]), "the device is still with vfio-pci")
    text = policy.read_text().replace("queues:", f"vlan: {VLAN}\n  queues:").replace(address, VLAN_SERVER)
    tagged = Path("/run/vlan.yaml")
    tagged.write_text(text)
    # The stack in a VLAN: the device's checksums are those of tagged frames.
    with served(tagged, VLAN_SERVER):
        echo(VLAN_SERVER)
        fetch(VLAN_SERVER)
    print(f"guest: kept from memory by the IOMMU after the kill: {len(faults())} times{lines(faults())}")
    sh("dmesg -C")


def through_the_port(ifname: str, policy: Path, address: str) -> dict[str, str]:
    with served(policy, address) as server:
        check(ifname in interfaces(), f"{ifname} is there again, as the kernel's side of the port")
        answers, rtt, rate = ping(address), echo(address), fetch(address)
        ask_kernel(address)
        if ifname == "lan0":
            kernels_vlan(ifname)
        said = refusal(policy)
        check(ifname in said, f"no second stack on the port: {said!r}")
        said = run_bypass("nic", "unbind", ifname, code=2)
        check(True, f"not taken away from under a program: {said!r}")
    check(ifname not in interfaces(), "nothing is left of the kernel's side when the server has ended")
    about = server.about
    rx, tx = (sum(n[i] for n in about["queues"].values()) for i in (0, 1))
    used = all(min(counts) > 0 for counts in about["queues"].values())
    check(used, f"{about['mode_reason']}: {rx} frames received, {tx} sent; by queue: {about['queues']}")
    if (
        ifname == "fast0"
    ):  # QEMU's TAP takes large packets, and the kernel of the peer has the last word on them
        packets, segments = about["large"]
        check(
            segments > 2 * packets > 0, f"virtio-net's segmentation: {segments} segments in {packets} packets"
        )
    check(
        about["interrupts"] > 0 and about["idle"] < QUIET,
        f"{about['interrupts']} interrupts, and {about['idle']} looks in a second in which nothing came",
    )
    exception = about["more"]["exception"]
    lost = {name: exception[name] for name in ("over_rate", "full", "errors", "read_errors")}
    passed, back = exception["passed"], exception["from_kernel"]
    check(
        min(passed, back) >= PINGS,
        f"exception path: {passed} frames to the kernel, {back} from it; not: {lost}",
    )
    check_frames(about)
    return {"path": about["mode_reason"], "http": rate, "echo": rtt, "ping": answers}


def kernels_vlan(ifname: str) -> None:
    """A VLAN device on the kernel's side of the port: tagged frames are the kernel's, both ways."""
    sh(f"ip link add link {ifname} name vlan0 type vlan id {VLAN} && ip addr add {VLAN_ADDRESS}/24 dev vlan0")
    sh("ip link set vlan0 up")
    ping(VLAN_ADDRESS)
    ask_kernel(VLAN_ADDRESS)


def dpdk_ready() -> None:
    """Hugepages, and a folder of the drivers that are needed."""
    sh("modprobe vfio-pci")
    print(f"guest: {run_bypass('nic', 'hugepages', 'reserve', HUGEPAGES)}")
    print(run_bypass("nic", "list"))
    folder = Path("/run/pmds")
    folder.mkdir()
    for name in PMDS:
        (found,) = Path("/usr/lib").glob(f"*/dpdk/pmds-*/librte_{name}.so")
        (folder / found.name).symlink_to(found.resolve())
    check(True, f"hugepages of {HUGEPAGES}, {len(PMDS)} drivers of DPDK")


def all_given_back() -> None:
    print(f"guest: {run_bypass('nic', 'hugepages', 'release')}")
    (total,) = re.findall(r"HugePages_Total:\s+(\d+)", Path("/proc/meminfo").read_text())
    check(total == "0", "no hugepage is reserved any more")


def main() -> None:
    print(
        f"guest: Linux {os.uname().release}, up for {Path('/proc/uptime').read_text().split()[0]} s",
        flush=True,
    )
    part("network", prepare)
    parts = {
        "the kernel alone": kernel_alone,
        "AF_XDP on virtio-net": afxdp_on_virtio,
        "what DPDK needs": dpdk_ready,
        "DPDK on e1000e": lambda: whole_port("lan0", HERE / "dpdk-e1000e.yaml"),
        "DPDK on virtio-net": lambda: whole_port("fast0", HERE / "dpdk-virtio.yaml"),
        "DPDK on virtio-net, taken by its server": lambda: taken_by_the_server(
            "fast0", HERE / "dpdk-virtio.yaml"
        ),
        "shared mode on e1000e": lambda: shared_mode("lan0", HERE / "dpdk-e1000e.yaml"),
        "rules in a port's hardware": rules_in_hardware,
        "a device that is taken away": taken_from_under_a_program,
        "all given back": all_given_back,
    }
    for name, func in parts.items():
        if "network" not in failed and wanted(name):
            part(name, func)
    tell(end=True, failed=failed)


if __name__ == "__main__":
    main()
