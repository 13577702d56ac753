# SPDX-License-Identifier: Apache-2.0
"""The demonstration (`make demo`): one address, two servers, and nobody notices.

In a lab of two network namespaces an ordinary curl fetches a large file from the bypass stack at port 8080 and from
the kernel at port 8081 of the same address, while ping never stops answering. Then the bypass server is killed
(SIGKILL), and the kernel answers for its port at once. Without root or XDP the same server runs on the simulated
wire. What was seen is written to build/demo.json.

`--backend dpdk` is the same on a whole port: DPDK has the server's end of the veth, and the kernel serves port 8081 and
answers ping behind the exception path. There the kernel has nothing without the process that drives the port: the kill
shows that too, and a second start.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bypass import lab, probe
from bypass.errors import BypassError
from bypass.lab import SERVER_IFNAME, SERVER_IP, WIRE_IFNAME, Lab

ROOT = Path(__file__).resolve().parent.parent
POLICY = ROOT / "config" / "web.yaml"
DPDK_POLICY = ROOT / "config" / "dpdk.yaml"
BYPASS_PORT, KERNEL_PORT = 8080, 8081
START_S = 20.0
PING_S = "0.05"  # between requests
ON_THEIR_WAY = 20  # requests of a second, whose answers may still come

console = Console(highlight=False, emoji=False, soft_wrap=True)


class DemoError(BypassError):
    """Something that the demonstration promises did not hold."""


def say(text: str) -> None:
    console.print(f"[bold cyan]·[/] {text}")


def check(facts: dict[str, Any], name: str, value: Any, ok: bool, text: str) -> None:
    """Keeps a fact, prints it, and ends the demonstration if it is not as it should be."""
    facts[name] = value
    console.print(f"  {'[green]✓[/]' if ok else '[red]✗[/]'} {text}")
    if not ok:
        raise DemoError(f"{name}: {text}")


def make_body(path: Path, size: int) -> str:
    """Writes `size` unpredictable bytes; their SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as f:
        for start in range(0, size, 1 << 20):
            piece = os.urandom(min(1 << 20, size - start))
            digest.update(piece)
            f.write(piece)
    return digest.hexdigest()


# ---- On a real interface -----------------------------------------------------------------------------------------


@contextmanager
def running(argv: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(argv, text=True, **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def server_pid(shell: subprocess.Popen[str]) -> int:
    """`ip netns exec` replaces itself by the shell and that by the program: one process, one pid."""
    return shell.pid


def fetch(place: Lab, port: int) -> tuple[str, float]:
    """The file from SERVER_IP:port by curl in the client's namespace: SHA-256 and seconds."""
    url = f"http://{SERVER_IP}:{port}/body.bin"
    argv = place.command("client", ["curl", "--silent", "--show-error", "--fail", "--max-time", "60", url])
    digest = hashlib.sha256()
    start = time.monotonic()
    with running(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as curl:
        assert curl.stdout is not None
        assert curl.stderr is not None
        while piece := os.read(curl.stdout.fileno(), 1 << 20):
            digest.update(piece)
        if curl.wait() != 0:
            raise DemoError(f"curl {url}: {curl.stderr.read().strip()}")
    return digest.hexdigest(), time.monotonic() - start


def wait_open(place: Lab, port: int, server: subprocess.Popen[str]) -> None:
    """Until curl gets an answer from the port."""
    url = f"http://{SERVER_IP}:{port}/none"
    argv = place.command("client", ["curl", "--silent", "--output", "/dev/null", "--max-time", "2", url])
    deadline = time.monotonic() + START_S
    while subprocess.run(argv, check=False).returncode != 0:
        if server.poll() is not None or time.monotonic() > deadline:
            raise DemoError(f"the server at port {port} did not come up")
        time.sleep(0.05)


def kernel_tcp(place: Lab) -> dict[str, int]:
    """What the TCP of the server's kernel has counted (RFC 4022): InSegs, PassiveOpens ..."""
    argv = place.command("server", ["cat", "/proc/net/snmp"])
    lines = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.splitlines()
    names, values = (line.split()[1:] for line in lines if line.startswith("Tcp:"))
    return dict(zip(names, map(int, values), strict=True))


def flows(place: Lab) -> dict[str, Any]:
    return ask(place, "flows")


def ask(place: Lab, what: str) -> dict[str, Any]:
    """`bypass flows` or `bypass stats` in the server's namespace."""
    argv = place.command("server", [sys.executable, "-m", "bypass", what, "--json"])
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise DemoError(f"bypass {what}: {done.stderr.strip()}")
    loaded: dict[str, Any] = json.loads(done.stdout)
    return loaded


# What tries the port from the client's side: one line an attempt, "<monotonic seconds> <result>". While the port
# changes hands each attempt is short, to see when it answers again. Then an answer may take what a busy machine needs;
# silence is a SYN that nobody answers, shortly before it would be sent again (RFC 6298 2.1: after a second).
PROBE = """
import errno, socket, sys, time
end = time.monotonic() + float(sys.argv[3])
patience = 0.005
while time.monotonic() < end:
    s = socket.socket()
    s.settimeout(patience)
    e = s.connect_ex((sys.argv[1], int(sys.argv[2])))
    print(time.monotonic(), "silence" if e == errno.EAGAIN else errno.errorcode.get(e, "open"), flush=True)
    s.close()
    if e == errno.ECONNREFUSED:
        patience = 0.9
    time.sleep(0.002)
"""


def kill_and_watch(place: Lab, server: subprocess.Popen[str]) -> tuple[float, list[str]]:
    """SIGKILL; milliseconds until the kernel refuses the port, and what each attempt from then on gave."""
    argv = place.command("client", [sys.executable, "-c", PROBE, SERVER_IP, str(BYPASS_PORT), "3"])
    with running(argv, stdout=subprocess.PIPE) as prober:
        assert prober.stdout is not None
        before = "silence"
        while before == "silence" and (line := prober.stdout.readline()):  # a busy machine may take longer
            before = line.split()[1]
        if before != "open":
            raise DemoError(f"port {BYPASS_PORT} gave {before} before the kill")
        killed = time.monotonic()
        os.kill(server_pid(server), signal.SIGKILL)
        server.wait()
        attempts = [(float(t), what) for t, what in (line.split() for line in prober.stdout)]
    refused = [t for t, what in attempts if what == "ECONNREFUSED"]
    if not refused:
        raise DemoError("after the kill the port never answered")
    return (refused[0] - killed) * 1e3, [what for t, what in attempts if t >= refused[0]]


def left_over(place: Lab) -> list[str]:
    """What is still attached to the interface, by the kernel's own word."""
    link = subprocess.run(
        place.command("server", ["ip", "-d", "link", "show", SERVER_IFNAME]),
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    index = link.split(":", 1)[0]
    found = re.findall(r"prog/xdp id \d+|xdp\w* ", link)
    listed = subprocess.run(["bpftool", "-j", "link"], check=True, capture_output=True, text=True).stdout
    for entry in json.loads(listed or "[]"):
        text = json.dumps(entry)
        if entry.get("type") in ("xdp", "tcx") and re.search(
            rf'"(ifindex|devname)": "?({index}|{SERVER_IFNAME})\b', text
        ):
            found.append(text)
    return found


def ping_summary(output: str) -> tuple[int, int]:
    """Packets sent and received, of ping's last lines."""
    match = re.search(r"(\d+) packets transmitted, (\d+) received", output)
    if match is None:
        raise DemoError(f"ping said nothing of its packets: {output[-200:]!r}")
    return int(match[1]), int(match[2])


def ended_ping_summary(ping: subprocess.Popen[str]) -> tuple[int, int]:
    """The same of a ping that is ended now. What it asked in the last second does not count where nothing after it was
    answered: answers may be on their way."""
    ping.send_signal(signal.SIGINT)
    output = ping.communicate(timeout=10)[0]
    return counted(output)


def counted(output: str) -> tuple[int, int]:
    """Of what an interrupted ping said: the requests that an answer had to come to, and answers."""
    sent, received = ping_summary(output)
    last = max(map(int, re.findall(r"bytes from .* icmp_seq=(\d+)", output)), default=0)
    return (last if sent - last <= ON_THEIR_WAY else sent), received


def tell_who_served(place: Lab, facts: dict[str, Any], before: dict[str, int]) -> None:
    table = Table(title="Who served what")
    for column in ("rule", "action", "packets", "bytes"):
        table.add_column(column, justify="right" if column in ("packets", "bytes") else "left")
    status = flows(place)
    for rule in status["rules"]:
        table.add_row(rule["name"], rule["action"], f"{rule['packets']:,}", f"{rule['bytes']:,}")
    console.print(table)
    facts["flows"] = status
    steered = sum(rule["packets"] for rule in status["rules"] if rule["action"] == "steer")
    after = kernel_tcp(place)
    opens, segments = (after[name] - before[name] for name in ("PassiveOpens", "InSegs"))
    facts["kernel_tcp_segments"] = segments
    check(facts, "steered_packets", steered, steered > 0,
          f"port {BYPASS_PORT}: {steered:,} packets went to the user-space stack")  # fmt: skip
    check(facts, "kernel_tcp_accepted", opens, opens == 1,
          f"port {KERNEL_PORT}: the kernel's TCP accepted {opens} connection, {segments:,} segments")  # fmt: skip


def on_interface(size: int, facts: dict[str, Any]) -> None:
    with ExitStack() as undo:
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="bypass-demo-")))
        say(f"a file of {size / 1e6:.0f} MB, and a lab: two hosts in network namespaces, joined by a veth")
        expected = make_body(folder / "body.bin", size)
        place = undo.enter_context(Lab(f"demo-{os.getpid()}"))
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        kernel = undo.enter_context(running(kernels_server(place, folder), **quiet))
        ping = undo.enter_context(
            running(place.command("client", ["ping", "-i", PING_S, SERVER_IP]), stdout=subprocess.PIPE)
        )
        wait_open(place, KERNEL_PORT, kernel)
        before = kernel_tcp(place)
        server = undo.enter_context(running(bypass_server(place, POLICY, folder)))
        wait_open(place, BYPASS_PORT, server)
        fetch_both(place, size, expected, facts)
        tell_who_served(place, facts, before)
        say("SIGKILL to the bypass server")
        ms, after = kill_and_watch(place, server)
        facts["refused_within_100_ms"] = ms < 100
        late = (
            "" if ms < 100 else " [yellow](more than the 100 ms that a machine with time to spare needs)[/]"
        )
        check(facts, "refused_after_kill_ms", round(ms, 1), ms < 1000,
              f"the kernel refuses port {BYPASS_PORT} after {ms:.0f} ms{late}")  # fmt: skip
        check(facts, "answers_after", sorted(set(after)), set(after) == {"ECONNREFUSED"},
              f"all {len(after)} later attempts are refused, none meets silence")  # fmt: skip
        remains = left_over(place)
        check(
            facts, "left_attached", remains, not remains, f"nothing is attached to {SERVER_IFNAME} any more"
        )
        sent, received = ended_ping_summary(ping)
        check(facts, "ping", {"sent": sent, "received": received}, 0 < sent == received,
              f"ping went on all the time: {received} answers to {sent}")  # fmt: skip
    lab_is_gone(place, facts)


def kernels_server(place: Lab, folder: Path) -> list[str]:
    http = [sys.executable, "-m", "http.server", str(KERNEL_PORT), "--bind", SERVER_IP]
    return place.command("server", [*http, "--directory", str(folder)])


def bypass_server(place: Lab, policy: Path, folder: Path) -> list[str]:
    own = [sys.executable, "-m", "bypass.webserver", "--policy", str(policy), "--directory", str(folder)]
    return place.command("server", [*own, f"{SERVER_IP}:{BYPASS_PORT}"])


def fetch_both(place: Lab, size: int, expected: str, facts: dict[str, Any]) -> None:
    say(
        f"{SERVER_IP}:{BYPASS_PORT} is served by bypass, {SERVER_IP}:{KERNEL_PORT} by the kernel; curl fetches both"
    )
    for name, port in (("bypass", BYPASS_PORT), ("kernel", KERNEL_PORT)):
        got, seconds = fetch(place, port)
        facts[f"{name}_seconds"] = round(seconds, 3)
        check(facts, f"{name}_sha256_equal", got == expected, got == expected,
              f"{name:6} {size / 1e6:.0f} MB in {seconds:.2f} s, SHA-256 equal")  # fmt: skip


def lab_is_gone(place: Lab, facts: dict[str, Any]) -> None:
    say("the lab is taken down")
    gone = not {place.server_ns, place.client_ns} & {name for left in lab.labs() for name in left.namespaces}
    check(facts, "lab_removed", gone, gone, "no namespace is left")


# ---- On a DPDK port ----------------------------------------------------------------------------------------------


def missing_for_dpdk() -> list[str]:
    """What this machine lacks for it, and what to do."""
    from bypass.dpdk_backend.eal import load_plugin

    lacks = [] if os.geteuid() == 0 else ["a DPDK port takes root"]
    try:
        load_plugin()
    except BypassError as e:
        lacks.append(str(e))
    return lacks


def pings(place: Lab, count: int) -> tuple[int, int]:
    """Requests and answers."""
    argv = place.command("client", ["ping", "-c", str(count), "-i", "0.05", "-W", "1", SERVER_IP])
    return ping_summary(subprocess.run(argv, check=False, capture_output=True, text=True).stdout)


def on_dpdk_port(size: int, facts: dict[str, Any]) -> None:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with ExitStack() as undo:
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="bypass-demo-")))
        say(f"a file of {size / 1e6:.0f} MB, and a lab whose server's end, {WIRE_IFNAME}, is a port of DPDK")
        expected = make_body(folder / "body.bin", size)
        place = undo.enter_context(Lab(f"demo-{os.getpid()}", wire=True))
        server = undo.enter_context(running(bypass_server(place, DPDK_POLICY, folder)))
        wait_open(place, BYPASS_PORT, server)
        before = kernel_tcp(place)
        kernel = undo.enter_context(running(kernels_server(place, folder), **quiet))
        wait_open(place, KERNEL_PORT, kernel)
        before["PassiveOpens"] = kernel_tcp(place)["PassiveOpens"]
        ping = undo.enter_context(
            running(place.command("client", ["ping", "-i", PING_S, SERVER_IP]), stdout=subprocess.PIPE)
        )
        fetch_both(place, size, expected, facts)
        sent, received = ended_ping_summary(ping)
        tell_who_served(place, facts, before)
        tell_the_exception_path(place, facts)
        check(facts, "ping", {"sent": sent, "received": received}, 0 < sent == received,
              f"the kernel answered ping all the time: {received} answers to {sent}")  # fmt: skip
        say("SIGKILL to the bypass server, which is the driver of the port")
        os.kill(server_pid(server), signal.SIGKILL)
        server.wait()
        links = subprocess.run(
            place.command("server", ["ip", "-br", "link"]), check=True, capture_output=True, text=True
        )
        names = [line.split()[0].partition("@")[0] for line in links.stdout.splitlines()]
        check(facts, "left_interfaces", names, sorted(names) == sorted(["lo", WIRE_IFNAME]),
              f"the TAP device {SERVER_IFNAME} went with it; the veth is as it was")  # fmt: skip
        sent, received = pings(place, 5)
        check(facts, "ping_after", {"sent": sent, "received": received}, received == 0,
              f"nobody drives the port: {received} answers to {sent} pings; bypass and kernel are silent")  # fmt: skip
        start = time.monotonic()
        again = undo.enter_context(running(bypass_server(place, DPDK_POLICY, folder)))
        wait_open(place, BYPASS_PORT, again)
        wait_open(place, KERNEL_PORT, kernel)
        seconds = time.monotonic() - start
        check(facts, "served_again_seconds", round(seconds, 2), True,
              f"started again: bypass and the kernel's server, which went on, serve after {seconds:.1f} s")  # fmt: skip
    lab_is_gone(place, facts)


def tell_the_exception_path(place: Lab, facts: dict[str, Any]) -> None:
    (process,) = ask(place, "stats")["processes"]
    found = process["more"]["exception"]
    facts["exception"] = found
    say(
        f"by the exception path: {found['passed']:,} frames to the kernel, {found['from_kernel']:,} from it; "
        f"{found['over_rate']:,} were more than the policy's rate, {found['full']:,} more than it took"
    )


# ---- On the simulated wire ---------------------------------------------------------------------------------------


def on_simulated_wire(size: int, facts: dict[str, Any]) -> None:
    from bypass import aio
    from bypass.sim import Faults, Network
    from bypass.webserver import WebServer

    with tempfile.TemporaryDirectory(prefix="bypass-demo-") as name, Network(seed=1) as network:
        expected = make_body(Path(name) / "body.bin", size)
        network.wire(faults=Faults(delay_ns=100_000, loss=0.0001, reorder=0.001))
        server = network.stack("192.0.2.10/24", name="server")
        client = network.stack("192.0.2.20/24", name="client")

        async def exchange() -> str:
            web = await aio.start_server(server, WebServer(Path(name)).handle, SERVER_IP, BYPASS_PORT)
            reader, writer = await aio.open_connection(client, SERVER_IP, BYPASS_PORT)
            writer.write(b"GET /body.bin HTTP/1.1\r\nConnection: close\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            digest = hashlib.sha256()
            while piece := await reader.read(1 << 20):
                digest.update(piece)
            writer.close()
            web.close()
            return digest.hexdigest()

        say(
            "the same server on a simulated wire: 100 us delay, 0.01 % loss, 0.1 % reordering, a virtual clock"
        )
        start, virtual = time.monotonic(), network.now_ns()
        got = aio.run(exchange(), network)
        seconds = time.monotonic() - start
        facts |= {
            "seconds": round(seconds, 3),
            "virtual_seconds": round((network.now_ns() - virtual) / 1e9, 3),
        }
        text = f"{size / 1e6:.0f} MB in {seconds:.2f} s ({facts['virtual_seconds']} s of virtual time), SHA-256 equal"
        check(facts, "bypass_sha256_equal", got == expected, got == expected, text)
        retransmits = server.stats()["tcp_out_retransmits"]
        facts["retransmits"] = retransmits
        console.print(f"    {retransmits} segments were sent again on the way")


# ---- Command -----------------------------------------------------------------------------------------------------


@click.command()
@click.option(
    "--simulate", is_flag=True, help="On the simulated wire, even where a real interface could be used."
)
@click.option(
    "--megabytes", default=100, show_default=True, type=click.IntRange(1, 4000), help="Size of the file."
)
@click.option(
    "--backend",
    default="afxdp",
    show_default=True,
    type=click.Choice(["afxdp", "dpdk"]),
    help="Beside the kernel on an interface, or with a whole port.",
)
@click.option("--json", "path", default="build/demo.json", show_default=True, type=click.Path(path_type=Path))
def main(simulate: bool, megabytes: int, backend: str, path: Path) -> None:
    """One address, two servers: bypass and the kernel side by side, then the bypass server is killed."""
    facts: dict[str, Any] = {"mode": "interface", "megabytes": megabytes, "backend": backend}
    started = time.monotonic()
    lacks = missing_for_dpdk if backend == "dpdk" else probe.missing_for_xdp
    reason = "asked for" if simulate else ", ".join(lacks())
    try:
        if reason and backend == "dpdk":
            raise BypassError("--simulate is for --backend afxdp" if simulate else reason)
        if backend == "dpdk":
            on_dpdk_port(megabytes * 1_000_000, facts)
        elif reason:
            facts |= {"mode": "simulated", "reason": reason}
            say(f"on the simulated wire: {'' if simulate else 'this machine lacks '}{reason}")
            on_simulated_wire(megabytes * 1_000_000, facts)
        else:
            on_interface(megabytes * 1_000_000, facts)
        facts["ok"] = True
    except BypassError as e:
        facts |= {"ok": False, "error": str(e)}
        print(f"demo: {e}", file=sys.stderr)
        sys.exit(1 if isinstance(e, DemoError) else e.exit_code)
    finally:
        facts["total_seconds"] = round(time.monotonic() - started, 2)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(facts, indent=2) + "\n")
    say(f"done in {facts['total_seconds']} s; the facts are in {path}")


if __name__ == "__main__":
    main()
