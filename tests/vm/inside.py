# SPDX-License-Identifier: Apache-2.0
"""What the parts of the guest's test share: what the host hears, the guest's network, the peer, and servers.

    lan0   e1000e      192.0.2.10/24     --+
    fast0  virtio-net  198.51.100.10/24  --+-- (QEMU) --  peer0, in namespace `peer`: 192.0.2.20, 198.51.100.20
    hot0   virtio-net, behind a port from which it can be taken

Lines that begin with "@ " are JSON for outcome.py: a check and whether it held, a row of the closing table, a card that
the host shall take away, the end. All others are for people. Python is ten times slower here than outside: few modules
are imported, once, and servers are forked from this process.
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
NICS = {
    "52:54:00:00:00:01": "lan0",
    "52:54:00:00:00:02": "fast0",
    "52:54:00:00:00:03": "peer0",
    "52:54:00:00:00:04": "hot0",
}
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
BODY_BYTES = 4 << 20
CONNECTIONS, PINGS = 16, 5
WWW = Path("/run/www")
WAIT_S = 60.0
IDLE_S = 1.0
QUIET = 60  # looks at an idle port in a second, at most: ten are the link's; by timer they would be 500
VLAN, VLAN_ADDRESS, VLAN_SERVER, VLAN_PEER = 5, "203.0.114.1", "203.0.114.10", "203.0.114.20"


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


def wanted(name: str) -> bool:
    """`make test-vm ARGS="--only WORD"`: parts whose name this is found in, and those without which there are none."""
    found = re.search(r"bypass\.only=(\S+)", Path("/proc/cmdline").read_text())
    return not found or re.search(found[1], name) is not None or name in ("what DPDK needs", "all given back")


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
    sh("modprobe -a virtio_net e1000e tun 8021q")
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
    sh(f"ip -n peer link add link peer0 name peer0.{VLAN} type vlan id {VLAN}")
    sh(f"ip -n peer addr add {VLAN_PEER}/24 dev peer0.{VLAN} && ip -n peer link set peer0.{VLAN} up")
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
def looks(device: Any) -> int:
    return sum(n.get("rx_idle", 0) for n in device.statistics().values())


async def serve(stack: bypass.Stack, address: str, ready: Callable[[], None]) -> tuple[WebServer, int]:
    """Until SIGTERM; then, with DPDK, a second in which nothing comes: how many looks at the port there are in it."""

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
    before = looks(stack.driver.device)
    await asyncio.sleep(IDLE_S if before else 0)
    idle = looks(stack.driver.device) - before
    for server in servers:
        server.close()
        await server.wait_closed()
    return web, idle


def work(policy: Path, address: str, out: int, namespace: str = "") -> None:
    """The child: serves until SIGTERM, and tells by `out` what the device was and did."""
    where = netns.entered(namespace) if namespace else nullcontext()
    with where, bypass.Stack.from_policy(policy) as stack:
        web, idle = asyncio.run(serve(stack, address, lambda: os.write(out, b"ready\n") and None))
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
            "idle": idle,
            "interrupts": sum(n.get("rx_interrupts", 0) for n in device.statistics().values()),
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
        os.close(out)  # a broker that stays has it not
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


# ---- What is looked at -------------------------------------------------------------------------------------------
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


def check_back(ifname: str, device: str, drivers: list[str], before: dict[str, Any]) -> None:
    check(drivers[-1] == drivers[0], f"{device} is back with {drivers[-1]}")
    after = appearance(ifname)
    check(
        after == before,
        f"{ifname} is as it was: {after}" if after == before else f"{ifname}: {before}, then {after}",
    )


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


def interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]
