# SPDX-License-Identifier: Apache-2.0
"""What is tested inside the machine of `make test-vm`. Runs in the guest only, as root, on the host's files.

    lan0   e1000e      192.0.2.10/24     --+
    fast0  virtio-net  198.51.100.10/24  --+-- (QEMU) --  peer0, in namespace `peer`: 192.0.2.20, 198.51.100.20

Lines that begin with "@ " are JSON for outcome.py: a check and whether it held, a row of the closing table, the end.
All others are for people. Python is ten times slower here than outside: few modules are imported, once, and
servers are forked from this process.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import bypass
from bypass import aio, netns
from bypass.bpf import build
from bypass.cli import main as bypass_command
from bypass.errors import BypassError
from bypass.webserver import WebServer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NICS = {"52:54:00:00:00:01": "lan0", "52:54:00:00:00:02": "fast0", "52:54:00:00:00:03": "peer0"}
PCI = {"lan0": "0000:00:10.0", "fast0": "0000:00:11.0"}  # as machine.py and the policies have them
ADDRESSES = {"lan0": "192.0.2.10", "fast0": "198.51.100.10"}
PEER_ADDRESSES = ("192.0.2.20", "198.51.100.20")
MTU = 1400  # of lan0: it has to be the same when the device has been away
HTTP, ECHO, KERNEL = 8080, 8081, 8082
PMDS = (
    "bus_pci",
    "bus_vdev",
    "mempool_ring",
    "net_e1000",
    "net_tap",
    "net_virtio",
)  # what the policies' drivers need
HUGEPAGES = "128M"
TAP_ADDRESS, TAP_PEER = "203.0.113.2", "203.0.113.1"
DATAGRAMS = 40
BODY_BYTES = 4 << 20
CONNECTIONS, PINGS = 16, 5
WWW = Path("/run/www")
WAIT_S = 60.0


class CheckError(Exception):
    """Something that the test promises did not hold."""


# ---- What the host hears -----------------------------------------------------------------------------------------
failed: list[str] = []


def tell(**what: Any) -> None:
    print("@ " + json.dumps(what), flush=True)


def check(ok: bool, text: str) -> None:
    """A failure ends the part, which tells it."""
    if not ok:
        raise CheckError(text)
    tell(check=text, ok=True)


def part(name: str, func: Callable[[], None]) -> None:
    """One part of the test; those that follow run whether it holds or not."""
    begin = time.monotonic()
    try:
        func()
        kernel_content()
    except Exception as e:  # noqa: BLE001 - whatever it is, it is told, and the next part runs
        tell(check=f"{name}: {e if isinstance(e, CheckError) else repr(e)}", ok=False)
        traceback.print_exc(file=sys.stdout)
        failed.append(name)
    tell(part=name, seconds=round(time.monotonic() - begin, 1))


# ---- The guest's network -----------------------------------------------------------------------------------------
def sh(command: str) -> str:
    """A command that has to work; its output."""
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, timeout=WAIT_S)
    if done.returncode != 0:
        raise CheckError(f"{command}: exit code {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


IMPORTED = (
    "bypass.embedded",
    "bypass.backends",
    "bypass.dpdk_backend.filter",
    "bypass.dpdk_backend.tap",
    "bypass.cli.nic",
)


def prepare() -> None:
    for name in IMPORTED:  # here, once, and not in each child
        importlib.import_module(name)
    sh("modprobe -a virtio_net e1000e tun")
    for index, ifname in socket.if_nameindex():
        mac = Path(f"/sys/class/net/{ifname}/address").read_text().strip()
        if mac in NICS:
            sh(f"ip link set dev {ifname} name {NICS[mac]}")
            print(
                f"guest: {NICS[mac]} is {ifname} ({index}), {driver(NICS[mac])} at {pci_address(NICS[mac])}"
            )
    netns.create("peer")
    sh("ip link set peer0 netns peer")
    for address in PEER_ADDRESSES:
        sh(f"ip -n peer addr add {address}/24 dev peer0")
    sh("ip -n peer link set peer0 up")
    sh(f"ip link set lan0 mtu {MTU}")
    for ifname, address in ADDRESSES.items():
        sh(f"ip addr add {address}/24 dev {ifname} && ip link set {ifname} up")
    sh("ip route add 203.0.113.0/24 via 192.0.2.20 dev lan0")
    WWW.mkdir()
    (WWW / "body.bin").write_bytes(os.urandom(BODY_BYTES))
    build.compile_programs = prepared_programs  # type: ignore[assignment]


def prepared_programs(flags: tuple[str, ...], text: str | None = None) -> dict[str, build.Program]:
    """What the host compiled (machine.py): bcc takes half a minute here."""
    for entry in json.loads((ROOT / "build/vm/programs.json").read_text()):
        if entry["flags"] == list(flags) and text is None:
            return {
                p["name"]: build.Program(
                    p["name"], bytes.fromhex(p["code"]), tuple((n, m) for n, m in p["maps"])
                )
                for p in entry["programs"]
            }
    raise CheckError(f"no program was prepared for {flags}")


def driver(ifname: str) -> str:
    link = Path(f"/sys/class/net/{ifname}/device")
    return (link / "driver").resolve().name


def pci_address(ifname: str) -> str:
    """virtio devices are below their PCI device."""
    return re.findall(
        r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", str(Path(f"/sys/class/net/{ifname}/device").resolve())
    )[-1]


def pci_driver(address: str) -> str:
    link = Path(f"/sys/bus/pci/devices/{address}/driver")
    return link.resolve().name if link.exists() else "none"


def appearance(ifname: str) -> dict[str, Any]:
    """What has to be the same after a device was away."""
    (link,) = json.loads(sh(f"ip -j addr show dev {ifname}"))
    return {
        "mac": link["address"],
        "mtu": link["mtu"],
        "up": "UP" in link["flags"],
        "addresses": sorted(
            f"{a['local']}/{a['prefixlen']}" for a in link["addr_info"] if a["family"] == "inet"
        ),
        "routes": sorted(r["dst"] for r in json.loads(sh(f"ip -j route show dev {ifname}"))),
    }


# ---- The peer: the kernel's, in its namespace --------------------------------------------------------------------
def dial(address: str, port: int) -> socket.socket:
    s = netns.run("peer", socket.socket, socket.AF_INET, socket.SOCK_STREAM)
    s.settimeout(WAIT_S)
    s.connect((address, port))
    return s


def ping(address: str) -> str:
    """Answers of so many, such as "5/5". Several tries: the first finds the way, while a link comes up."""
    sh(f"for i in 1 2 3 4 5 6; do ip netns exec peer ping -q -c 1 -W 5 {address} > /dev/null && break; done")
    done = subprocess.run(
        ["ip", "netns", "exec", "peer", "ping", "-q", "-c", str(PINGS), "-i", "0.2", "-W", "5", address],
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_S,
    )
    found = re.search(r"(\d+) packets transmitted, (\d+) received", done.stdout)
    answers = int(found[2]) if found else 0
    check(answers == PINGS, f"ping {address}: {answers} of {PINGS} answered")
    return f"{answers}/{PINGS}"


def echo(address: str) -> str:
    """CONNECTIONS connections, each with an exchange; the median time of an exchange."""
    took = []
    message = os.urandom(512)
    for _ in range(CONNECTIONS):
        with dial(address, ECHO) as s:
            begin = time.monotonic()
            s.sendall(message)
            back = b""
            while len(back) < len(message) and (piece := s.recv(4096)):
                back += piece
            took.append(time.monotonic() - begin)
            if back != message:
                raise CheckError(
                    f"{len(back)} bytes came back from the echo of {address}, or others than were sent"
                )
    median = sorted(took)[len(took) // 2] * 1000
    check(True, f"TCP echo from {address}: {CONNECTIONS} connections, {median:.1f} ms an exchange")
    return f"{median:.1f} ms"


def fetch(address: str) -> str:
    """The body over HTTP; MB/s."""
    with dial(address, HTTP) as s:
        begin = time.monotonic()
        s.sendall(b"GET /body.bin HTTP/1.1\r\nHost: guest\r\nConnection: close\r\n\r\n")
        got = bytearray()
        while piece := s.recv(1 << 18):
            got += piece
        seconds = time.monotonic() - begin
    head, _, body = bytes(got).partition(b"\r\n\r\n")
    same = hashlib.sha256(body).digest() == hashlib.sha256((WWW / "body.bin").read_bytes()).digest()
    rate = len(body) / seconds / 1e6
    status = head.split(b"\r\n")[0].decode(errors="replace")
    check(
        same,
        f"HTTP from {address}: {status!r}, {len(body)} bytes, {rate:.1f} MB/s, body {'' if same else 'not '}as it was",
    )
    return f"{rate:.1f} MB/s"


# ---- The server: a stack, in a process of its own ----------------------------------------------------------------
async def serve(stack: bypass.Stack, address: str, ready: Callable[[], None]) -> WebServer:
    async def back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    web = WebServer(WWW)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    servers = [
        await aio.start_server(stack, web.handle, address, HTTP),
        await aio.start_server(stack, back, address, ECHO),
    ]
    ready()
    await stop.wait()
    for server in servers:
        server.close()
        await server.wait_closed()
    return web


def work(policy: Path, address: str, out: int, namespace: str = "") -> None:
    """The child: serves until SIGTERM, and tells by `out` what the device was and did."""
    where = netns.entered(namespace) if namespace else nullcontext()
    with where, bypass.Stack.from_policy(policy) as stack:
        web = asyncio.run(serve(stack, address, lambda: os.write(out, b"ready\n") and None))
        device, port = stack.driver.device, stack.driver.port
        about = {
            "mode": device.mode,
            "mode_reason": device.mode_reason,
            "xdp": getattr(device, "xdp_mode", ""),
            "queues": {q: (n["rx_packets"], n["tx_packets"]) for q, n in device.statistics().items()},
            "large": [
                sum(n.get(k, 0) for n in device.statistics().values())
                for k in ("tso_packets", "tso_segments")
            ],
            "audit": asdict(device.audit()),
            "requests": web.requests,
            "more": port.counters(),
            "hardware": getattr(device, "hardware", None) and device.hardware.text(),
        }
    os.write(out, json.dumps(about).encode())


@contextmanager
def forked(func: Callable[[int], None]) -> Iterator[tuple[int, IO[bytes]]]:
    """A child that runs func(out); its pid and what it writes to `out`. At the end it has to end by itself.

    Raises:
        CheckError: its exit code is not 0.
    """
    sys.stdout.flush()
    r, w = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(r)
        code = 1
        try:
            func(w)
            code = 0
        except BaseException:  # noqa: BLE001 - the child must not go on as its parent
            traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
        os._exit(code)
    os.close(w)
    with open(r, "rb") as said:
        try:
            yield child, said
        except BaseException:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
        _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code != 0:
        raise CheckError(f"process {child} ended with exit code {code}")


class Server:
    """`about`: what the server said when it ended."""

    def __init__(self) -> None:
        self.about: dict[str, Any] = {}


@contextmanager
def served(policy: Path, address: str, namespace: str = "") -> Iterator[Server]:
    """A stack in a child, as a policy says, with HTTP and echo; in a network namespace, or where we are."""
    server = Server()
    begin = time.monotonic()
    with forked(lambda out: work(policy, address, out, namespace)) as (child, said):
        ready = said.readline() == b"ready\n"
        check(ready, f"a stack serves {address} by {policy.name}, after {time.monotonic() - begin:.1f} s")
        yield server
        os.kill(child, signal.SIGTERM)
        text = said.read()
    server.about = json.loads(text)


def run_bypass(*args: str, code: int = 0) -> str:
    """`bypass ARGS` in a child: all that the command does, without an interpreter's start, which takes seconds here.
    What it says, on both of its streams; it has to end with exit code `code`."""

    def command(out: int) -> None:
        os.dup2(out, 1)
        os.dup2(out, 2)
        got = bypass_command(args)
        sys.stdout.flush()
        if got != code:
            raise CheckError(f"bypass {' '.join(args)}: exit code {got}")

    with forked(command) as (_, said):
        return said.read().decode().rstrip()


def refusal(policy: Path) -> str:
    """What opening a stack fails with."""

    def attempt(out: int) -> None:
        try:
            bypass.Stack.from_policy(policy).close()
        except BypassError as e:
            os.write(out, str(e).encode())

    with forked(attempt) as (_, said):
        return said.read().decode()


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


def check_frames(about: dict[str, Any]) -> None:
    a = about["audit"]
    clean = a["conserved"] and a["misplaced"] == a["bad_free"] == 0
    check(clean and about["requests"] == 1, "every frame is accounted for; one request was answered")


def ask_kernel(address: str) -> None:
    """TCP with a socket of the kernel's, on the port that a PMD has: by the exception path, both ways."""
    message = os.urandom(20000)
    with socket.create_server((address, KERNEL)) as server, dial(address, KERNEL) as s:
        server.settimeout(WAIT_S)
        conn, _ = server.accept()
        with conn:
            conn.settimeout(WAIT_S)
            s.sendall(message[:10000])
            conn.sendall(message[10000:])
            there, back = b"", b""
            while len(there) < 10000 and (piece := conn.recv(10000)):
                there += piece
            while len(back) < 10000 and (piece := s.recv(10000)):
                back += piece
    check(
        there + back == message, f"TCP with the kernel's socket at {address}:{KERNEL}, by the exception path"
    )


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
        if ifname == "lan0":
            after_a_kill(ifname, policy, address)
    finally:
        print(f"guest: bypass nic unbind {ifname}: {run_bypass('nic', 'unbind', ifname)}")
    drivers.append(pci_driver(device))
    check_back(ifname, device, drivers, before)
    tell(row={"device": ifname, "driver": " > ".join(drivers), **row})
    tell(row={"device": ifname, "driver": drivers[2], "path": "the kernel again", "ping": ping(address)})


def check_back(ifname: str, device: str, drivers: list[str], before: dict[str, Any]) -> None:
    check(drivers[-1] == drivers[0], f"{device} is back with {drivers[-1]}")
    after = appearance(ifname)
    check(
        after == before,
        f"{ifname} is as it was: {after}" if after == before else f"{ifname}: {before}, then {after}",
    )


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
    with served(policy, address):
        echo(address)
    print(f"guest: kept from memory by the IOMMU after the kill: {len(faults())} times{lines(faults())}")
    sh("dmesg -C")


def complaints(pattern: str) -> list[str]:
    """Lines of the kernel's log since it was cleared."""
    return re.findall(rf"^.*(?:{pattern}).*$", sh("dmesg"), re.MULTILINE)


def kernel_content() -> None:
    trouble = complaints("BUG:|Oops|WARNING:")
    if trouble:
        raise CheckError(f"the kernel complains:{lines(trouble)}")


def faults() -> list[str]:
    return complaints("DMAR:.*fault addr")


def lines(found: list[str]) -> str:
    return "".join(f"\n    {line}" for line in found[:4])


def through_the_port(ifname: str, policy: Path, address: str) -> dict[str, str]:
    with served(policy, address) as server:
        check(ifname in interfaces(), f"{ifname} is there again, as the kernel's side of the port")
        answers, rtt, rate = ping(address), echo(address), fetch(address)
        ask_kernel(address)
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
    exception = about["more"]["exception"]
    lost = {name: exception[name] for name in ("over_rate", "full", "errors", "read_errors")}
    passed, back = exception["passed"], exception["from_kernel"]
    check(
        min(passed, back) >= PINGS,
        f"exception path: {passed} frames to the kernel, {back} from it; not: {lost}",
    )
    check_frames(about)
    return {"path": about["mode_reason"], "http": rate, "echo": rtt, "ping": answers}


def rules_in_hardware() -> None:
    """net_tap puts rules of rte_flow into the kernel's tc, on the way of what the kernel sends there: its hardware."""
    policy, ranges = HERE / "dpdk-tap.yaml", Path("/run/ranges.yaml")
    ranges.write_text(policy.read_text().replace("local_port: 8080", "local_port: 8080-8081"))
    said = refusal(ranges)
    check("'web': Operation not supported" in said, f"tc has no masks of ports, and all is undone: {said}")
    with served(policy, TAP_ADDRESS, "peer") as server:
        sh(f"ip -n peer addr add {TAP_PEER}/24 dev dtap0 && ip -n peer link set dtap0 up")
        rtt, rate, answers = echo(TAP_ADDRESS), fetch(TAP_ADDRESS), ping(TAP_ADDRESS)
        with netns.run("peer", socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as s:
            for _ in range(DATAGRAMS):
                s.sendto(b"?", (TAP_ADDRESS, 9))
        drops = tc_drops()
    about = server.about
    seen = about["more"]["filter"]
    check(
        (drops, seen["dropped"]) == (DATAGRAMS, 0),
        f"a drop rule: {drops} of {DATAGRAMS} datagrams dropped by tc, {seen['dropped']} left to the classifier",
    )
    queues = {q: rx for q, (rx, _) in about["queues"].items()}
    check(
        queues["1"] == seen["steered"] > 0 < queues["0"],
        f"steered frames are on queue 1, all else on queue 0: {queues}, {seen['steered']} steered",
    )
    check_frames(about)
    row = {"device": "dtap0", "driver": about["mode_reason"], "path": about["hardware"]}
    tell(row={**row, "http": rate, "echo": rtt, "ping": answers})


def tc_drops() -> int:
    """Packets that rules of tc have dropped on their way to the port."""
    filters = json.loads(sh("tc -n peer -j -s filter show dev dtap0"))
    actions = [a for f in filters for a in f.get("options", {}).get("actions", [])]
    return sum(a["stats"]["drops"] for a in actions if a["control_action"]["type"] == "drop")


def interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


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
    if not failed:
        part("the kernel alone", kernel_alone)
        part("AF_XDP on virtio-net", afxdp_on_virtio)
        part("what DPDK needs", dpdk_ready)
        part("DPDK on e1000e", lambda: whole_port("lan0", HERE / "dpdk-e1000e.yaml"))
        part("DPDK on virtio-net", lambda: whole_port("fast0", HERE / "dpdk-virtio.yaml"))
        part(
            "DPDK on virtio-net, taken by its server",
            lambda: taken_by_the_server("fast0", HERE / "dpdk-virtio.yaml"),
        )
        part("rules in a port's hardware", rules_in_hardware)
        part("all given back", all_given_back)
    tell(end=True, failed=failed)


if __name__ == "__main__":
    main()
