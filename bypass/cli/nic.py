# SPDX-License-Identifier: Apache-2.0
"""`bypass nic list | bind | unbind | vf | hugepages | rules`."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import Any

import click

from bypass import records
from bypass.cli.table import print_table
from bypass.errors import DeviceError
from bypass.pci import Bus, Device, VfSettings, bind, left_behind, set_functions, unbind
from bypass.pci.devices import USER_DRIVERS

JSON = click.option("--json", "as_json", is_flag=True, help="For programs.")


@click.group()
def nic() -> None:
    """Network devices, for the DPDK backend: which there are, who drives them, hugepages, virtual functions.

    DEVICE is an interface's name or a PCI address; without its domain it is one of 0000.

    \b
    Examples:
      bypass nic list
      bypass nic bind eth1
      bypass nic unbind eth1
      bypass nic hugepages reserve 512M
    """


# ---- Devices -------------------------------------------------------------------------------------------------------
@nic.command("list")
@JSON
def list_(as_json: bool) -> None:
    """List the network devices: of the PCI bus, virtio's too, then those of other buses.

    Interfaces are those of this network namespace. GROUP is the device's IOMMU group, with how many others are in it;
    they are named below the table. VFs are those it has of those it may have.

    \b
    Examples:
      bypass nic list
      bypass nic list --json
    """
    bus = Bus()
    devices, others = bus.network(), bus.others()
    if as_json:
        found = {"devices": [about(d) for d in devices], "others": [asdict(o) for o in others]}
        click.echo(json.dumps(found, indent=2))
        return
    rows = [row(d) for d in devices]
    rows += [(o.device, f"({o.bus})", o.driver, o.interface, o.state, "", "", "") for o in others]
    print_table(
        ("ADDRESS", "DEVICE", "DRIVER", "INTERFACE", "STATE", "GROUP", "NUMA", "VFS"), rows, right=("NUMA",)
    )
    for d in devices:
        for n in d.neighbours:
            click.echo(f"{n.address} ({n.driver or 'no driver'}) is in the IOMMU group of {d.address}")


def about(device: Device) -> dict[str, Any]:
    """For programs."""
    said = asdict(device)
    said["vendor"], said["device"] = f"{device.vendor:04x}", f"{device.device:04x}"
    return {**said, "iommu": device.iommu, "by_user": device.by_user}


def row(d: Device) -> tuple[str, ...]:
    group = f"{d.group} +{len(d.neighbours)}" if d.neighbours else d.group
    return (
        d.address,
        f"{d.vendor:04x}:{d.device:04x} {d.name}".strip(),
        d.driver or "none",
        " ".join(d.interfaces),
        " ".join(d.states),
        f"{group} (no IOMMU)" if d.unsafe_group else group or "no IOMMU",
        "" if d.numa is None else str(d.numa),
        f"of {d.parent}" if d.parent else f"{d.vfs} of {d.max_vfs}" if d.max_vfs else "",
    )


@nic.command("bind")
@click.argument("device", metavar="DEVICE")
@click.option(
    "--driver",
    default="vfio-pci",
    show_default=True,
    type=click.Choice(USER_DRIVERS),
    help="The driver that gets it.",
)
@click.option("--force", is_flag=True, help="Also a device that something depends on.")
@click.option(
    "--no-iommu",
    is_flag=True,
    help="vfio-pci without an IOMMU: whoever has the device may write to all memory by it.",
)
def bind_(device: str, driver: str, force: bool, no_iommu: bool) -> None:
    """Take DEVICE from its kernel driver, so that a program can have it. `bypass nic unbind` gives it back.

    Its interface goes; what that had (name, state, MTU, MAC, addresses, routes) is kept below /run/bypass/nic. Refused,
    with the reason, where it carries the default route or a login, where an XDP program is on it or other interfaces
    are on top, where it has virtual functions, and where others of its IOMMU group have kernel drivers. When a
    step fails everything is as it was.

    \b
    Examples:
      bypass nic bind eth1
      bypass nic bind 03:00.0 --driver uio_pci_generic
    """
    done = bind(device, driver, force=force, no_iommu=no_iommu)
    for warning in done.warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo(f"{done.address}: {done.driver}" + ("" if done.changed else ", as before"))


@nic.command("unbind")
@click.argument("device", metavar="DEVICE", required=False)
@click.option("--left", is_flag=True, help="All devices that programs had taken which were killed.")
def unbind_(device: str | None, left: bool) -> None:
    """Give DEVICE back to its kernel driver, and its interface what it had.

    DEVICE may be the name that the interface had. It also repairs what was left by a program that was killed, such as a
    broker; `bypass doctor` names these devices. Refused while a program uses the device. What does not come back:
    interfaces on top (VLANs), queueing disciplines, settings of ethtool(8).

    --left also removes notes below /run/bypass that speak of network namespaces that are gone.

    \b
    Examples:
      bypass nic unbind eth1
      bypass nic unbind 0000:03:00.0
      bypass nic unbind --left
    """
    if left == (device is not None):
        raise click.UsageError("name a DEVICE, or say --left for all that were left behind")
    refused = []
    for name in [device] if device is not None else [record.address for record in left_behind()]:
        try:
            done = unbind(name)
        except DeviceError as error:
            refused.append(str(error))
            continue
        what = f"{done.driver or 'no driver'}" + "".join(f", {i}" for i in done.interfaces)
        what = "was taken out of the machine; its record is forgotten" if done.gone else what
        click.echo(f"{done.address}: {what}" + ("" if done.changed else ", as before"))
    gone = sum(map(records.forget, records.OF_NAMESPACES)) if left else 0
    if gone:
        click.echo(f"{gone} notes of network namespaces that are gone: removed")
    if refused:
        raise DeviceError("\n".join(refused))


# ---- Virtual functions ---------------------------------------------------------------------------------------------
class MacAddress(click.ParamType):  # type: ignore[type-arg]
    name = "MAC"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not re.fullmatch(r"(?:[0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}", value):
            self.fail(f"{value!r} is no MAC address, such as 02:00:00:00:00:01", param, ctx)
        if int(value[:2], 16) & 1:
            self.fail(f"{value!r} is a group's address", param, ctx)
        return value.lower()


@nic.command("vf")
@click.argument("device", metavar="DEVICE")
@click.argument("number", metavar="N", type=click.IntRange(0, 65535))
@click.option("--mac", type=MacAddress(), help="Of the first function; those that follow count upwards.")
@click.option("--trust", type=click.Choice(["on", "off"]), help="May it change its MAC, and be promiscuous?")
@click.option(
    "--spoofchk", type=click.Choice(["on", "off"]), help="Is what it sends from other MACs dropped?"
)
@click.option("--vlan", type=click.IntRange(0, 4094), help="All of its traffic is in this VLAN; 0: none.")
@click.option("--force", is_flag=True, help="Also remove functions that are in use.")
def vf_(
    device: str,
    number: int,
    mac: str | None,
    trust: str | None,
    spoofchk: str | None,
    vlan: int | None,
    force: bool,
) -> None:
    """Give DEVICE N virtual functions (SR-IOV), and set them up; 0 removes them.

    Another number than it has makes all of them anew. Refused, with the reason, where one to be removed is in use: an
    address on its interface, a login, a driver for programs, another network namespace. One that a program has open is
    never removed. When a step fails, the number is what it was.

    \b
    Examples:
      bypass nic vf eth1 4 --mac 02:00:00:00:01:00 --trust on --spoofchk off
      bypass nic vf eth1 0
    """
    said = VfSettings(
        mac or "",
        None if trust is None else trust == "on",
        None if spoofchk is None else spoofchk == "on",
        vlan,
    )
    done = set_functions(device, number, None if said == VfSettings() else said, force=force)
    for warning in done.warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo(f"{done.address}: {len(done.addresses)} virtual functions, {done.before} before")
    for address in done.addresses:
        click.echo(f"  {address}")


# ---- Hugepages -----------------------------------------------------------------------------------------------------
SIZE = click.option("--size", default="2M", show_default=True, help="Of a page: 2M, 1G.")
NODE = click.option(
    "--node", type=click.IntRange(0, 1023), help="Of this node's memory. Default: the kernel chooses."
)


@nic.group("hugepages")
def hugepages() -> None:
    """Show, reserve, or release hugepages. Nothing is mounted unless asked: DPDK needs no mount.

    \b
    Examples:
      bypass nic hugepages show
      bypass nic hugepages reserve 512 --size 2M --node 0
      bypass nic hugepages release
    """


@hugepages.command("show")
@JSON
def hugepages_show(as_json: bool) -> None:
    """Show how many pages of each size there are, on the whole and by node, and where hugetlbfs is mounted."""
    from bypass.hugepages import mounts, pools, size_text

    found, where = pools(), mounts()
    if as_json:
        click.echo(json.dumps({"pools": [asdict(p) for p in found], "mounts": where}, indent=2))
        return
    rows = [
        (
            size_text(p.size),
            "all" if p.node is None else str(p.node),
            str(p.total),
            str(p.free),
            str(p.surplus),
        )
        for p in found
    ]
    print_table(
        ("SIZE", "NODE", "PAGES", "FREE", "SURPLUS"), rows, right=("NODE", "PAGES", "FREE", "SURPLUS")
    )
    click.echo(f"Mounted: {', '.join(where) or 'nowhere'}")


@hugepages.command("reserve")
@click.argument("amount", metavar="N[M|G]")
@SIZE
@NODE
@click.option("--mount", "mount_point", metavar="PATH", help="Mount hugetlbfs there as well.")
def hugepages_reserve(amount: str, size: str, node: int | None, mount_point: str | None) -> int:
    """See to it that N pages, or so many bytes of them, are free. Pages that are free already count.

    Exit code 0; 1 when the kernel had fewer: what it gave is kept, and said.

    \b
    Examples:
      bypass nic hugepages reserve 512
      bypass nic hugepages reserve 2G --size 1G --node 1
    """
    from bypass.hugepages import mount, parse_amount, parse_size, reserve, size_text

    page = parse_size(size)
    done = reserve(parse_amount(amount, page), page, node)
    if mount_point and mount(mount_point, page):
        click.echo(f"mounted: {mount_point}")
    where = "" if node is None else f" on node {node}"
    click.echo(f"{done.free} pages of {size_text(page)} are free{where}, {done.added} of them new")
    if done.free >= done.wanted:
        return 0
    click.echo(
        f"bypass: {done.wanted} were asked for: memory is too small or too fragmented; "
        "try sysctl -w vm.compact_memory=1, or hugepages= on the kernel's command line",
        err=True,
    )
    return 1


@hugepages.command("release")
def hugepages_release() -> int:
    """Give the kernel back what `reserve` took, and nothing else.

    Exit code 0; 1 when some of it is in use and stays until this is called again.
    """
    from bypass.hugepages import release, size_text

    done = release()
    if not done:
        click.echo("nothing is reserved")
    for r in done:
        where = "" if r.node is None else f" of node {r.node}"
        kept = f", {r.kept} are in use" if r.kept else ""
        click.echo(f"{r.removed} pages of {size_text(r.size)}{where} released{kept}")
    return int(any(r.kept for r in done))


# ---- Rules in hardware ---------------------------------------------------------------------------------------------
class Numbers(click.ParamType):  # type: ignore[type-arg]
    """Queues as `3`, `0-2`, `0,2,4-7`."""

    name = "QUEUES"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        found: list[int] = []
        for part in str(value).split(","):
            m = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", part)
            if m is None or int(m[2] or m[1]) < int(m[1]):
                self.fail(f"{value!r} is no list of queues: write it as 3, 0-2 or 0,2,4-7", param, ctx)
            found += range(int(m[1]), int(m[2] or m[1]) + 1)
        return tuple(dict.fromkeys(found))


@nic.command("rules")
@click.option("-c", "--config", "file", metavar="POLICY", help="The policy.")
@click.option(
    "--recover", metavar="IFACE", help="Take off an interface the rules that a process left which was killed."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["ethtool", "rte_flow"]),
    help="For the kernel's driver, or for testpmd of DPDK. Default: by the policy's backend.",
)
@click.option("--queues", type=Numbers(), help="Of the stack: 3, 0-2. Default: the policy's.")
@click.option("--kernel-queues", type=Numbers(), help="Of the kernel. Default, for ethtool: all others.")
@click.option("--vf", type=click.IntRange(0, 254), help="What is steered goes to this virtual function.")
@click.option(
    "--address", "addresses", multiple=True, help="Of this host; again for each. Default: the interface's."
)
@click.option("--live", is_flag=True, help="Only what sockets of running programs own now.")
@click.option(
    "--first", default=0, type=click.IntRange(0, 1 << 20), help="ethtool: location of the first rule."
)
@click.option("--undo", is_flag=True, help="ethtool: print what takes them off again.")
@click.option("--group", default=0, type=click.IntRange(0, 1 << 20), help="rte_flow: the group.")
@click.option("--port", default=0, type=click.IntRange(0, 1 << 16), help="rte_flow: testpmd's port.")
@click.option(
    "--limit", default=4096, show_default=True, type=click.IntRange(1), help="Rules of the device's table."
)
@JSON
def rules_(file: str | None, recover: str | None, form: str | None, as_json: bool, **said: Any) -> None:
    """Print a policy's rules for network hardware, which chooses queues before any program runs. Nothing is applied:
    `backend: {hardware_rules: auto}` in a policy does that. On stderr: whether the device has such rules.

    ethtool: rules (-N) that send what is steered to the queues of the stack, and a hash table (-X) that keeps all else
    off them. rte_flow: the same for a port of DPDK, as commands of testpmd. The steering program still decides about
    each packet. What hardware cannot say is left to it, and told on stderr with its place. No NIC was at hand to try.

    \b
    Examples:
      bypass nic rules -c policy.yaml --queues 3 --kernel-queues 0-2
      bypass nic rules -c policy.yaml --queues 3 --kernel-queues 0-2 --undo
      bypass nic rules -c dpdk.yaml --format rte_flow
      bypass nic rules --recover eth1
    """
    from bypass.cli.hardware import lines

    if recover is not None:
        from bypass.hwflow.held import recover as take_off

        done = take_off(recover)
        click.echo(
            f"{recover}: {'its rules are as they were' if done else 'nobody who was killed left rules'}"
        )
        return
    if file is None:
        raise click.UsageError("-c POLICY, or --recover IFACE")

    found, left = lines(file, form, as_json, **said)
    for text in left:
        click.echo(text, err=True)
    click.echo("\n".join(found))
