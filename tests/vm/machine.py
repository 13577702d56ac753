# SPDX-License-Identifier: Apache-2.0
"""A machine in QEMU for `make test-vm`: its initramfs, its network cards, its run.

    namespace bypass-<pid>-vm of the host, with nothing else in it
    +-- bridge --------------------------------------------+
    |  tap e1000e      tap virtio (2 queues)     tap peer  |
    +-----|-----------------|-----------------------|------+
          |                 |                       |          (QEMU; emulated by TCG, never KVM)
       e1000e          virtio-net              virtio-net
       behind an emulated IOMMU                the kernel peer, in a namespace of the guest's

What lives here: everything about the machine, nothing about what is tested in it (guest.py) or said about it
(__main__.py). Several queues of a virtio-net need a tap: QEMU's other back ends have one.
"""

from __future__ import annotations

import json
import lzma
import os
import selectors
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bypass import netns

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
VM = ROOT / ".venv" / "vm"

# To see the host's files; the rest the guest loads from them.
MODULES = ("virtio_pci", "9p", "9pnet_virtio", "overlay")
MEMORY_MB = 1536
CPUS = 2


class MachineError(Exception):
    """The machine cannot be made, or did not do what a machine does."""


@dataclass(frozen=True)
class Nic:
    """A network card of the guest. `args`: of QEMU's -device. `queues`: pairs of them."""

    name: str
    mac: str
    model: str
    args: str = ""
    queues: int = 1


NICS = (
    Nic("e1000e", "52:54:00:00:00:01", "e1000e", "addr=10"),
    Nic(
        "virtio",
        "52:54:00:00:00:02",
        "virtio-net-pci",
        "addr=11,iommu_platform=on,disable-legacy=on,mq=on",
        queues=2,
    ),
    Nic("peer", "52:54:00:00:00:03", "virtio-net-pci", "addr=12,disable-legacy=on"),
    Nic("hot", "52:54:00:00:00:04", "virtio-net-pci", "bus=bay,iommu_platform=on,disable-legacy=on"),
)


# ---- The initramfs -----------------------------------------------------------------------------------------------
def cpio(files: Sequence[tuple[str, int, bytes]]) -> bytes:
    """An archive as the kernel takes it (Documentation/driver-api/early-userspace/buffer-format.rst, "newc").

    Args:
        files: (path, mode with its type, content), folders before what is in them.
    """
    out = bytearray()
    for number, (path, mode, data) in enumerate([*files, ("TRAILER!!!", 0, b"")], 1):
        name = path.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name), 0)
        out += b"070701" + b"".join(b"%08X" % f for f in fields) + name
        out += b"\0" * (-len(out) % 4) + data
        out += b"\0" * (-len(out) % 4)
    return bytes(out)


def load_order(dependencies: str, builtin: str, names: Sequence[str]) -> list[str]:
    """The files to load for these modules, in order; nothing for those that the kernel has in it.

    Args:
        dependencies: text of modules.dep: "path: path of what it needs ..." (depmod(8)), the needed in reverse order.
        builtin: text of modules.builtin: a path a line.
        names: of modules, without their folder and suffix.

    Raises:
        MachineError: there is no such module.
    """
    inside = {_module(path) for path in builtin.splitlines()}
    by_name = {}
    for line in dependencies.splitlines():
        path, _, needs = line.partition(":")
        by_name[_module(path)] = (path, needs.split())
    order: list[str] = []
    for name in names:
        if name in inside:
            continue
        if name not in by_name:
            raise MachineError(
                f"the kernel has no module {name}: it takes Debian's normal flavour, not the cloud's"
            )
        path, needs = by_name[name]
        order += [p for p in (*reversed(needs), path) if p not in order]
    return order


def _module(path: str) -> str:
    return Path(path).name.partition(".ko")[0].replace("-", "_")


def libraries(vm: Path) -> str:
    """The library path for what was unpacked: what of it is installed was not fetched."""
    return ":".join(str(p) for p in (*vm.glob("usr/lib/*-linux-gnu"), *vm.glob("lib/*-linux-gnu")))


def initramfs(vm: Path, clone: Path) -> bytes:
    """busybox, the modules of MODULES and init."""
    (modules,) = (vm / "lib/modules").iterdir()
    about = [(modules / name).read_text() for name in ("modules.dep", "modules.builtin")]
    order = load_order(*about, MODULES)
    folders = ("bin", "sbin", "proc", "sys", "dev", "host", "over", "root", "modules")
    files: list[tuple[str, int, bytes]] = [(name, stat.S_IFDIR | 0o755, b"") for name in folders]
    files.append(("bin/busybox", stat.S_IFREG | 0o755, (vm / "bin/busybox").read_bytes()))
    for path in order:
        data = (modules / path).read_bytes()
        name = _module(path)
        files.append(
            (f"modules/{name}", stat.S_IFREG | 0o644, lzma.decompress(data) if path.endswith(".xz") else data)
        )
    names = "".join(_module(path) + "\n" for path in order)
    files.append(("modules/order", stat.S_IFREG | 0o644, names.encode()))
    init = (HERE / "init").read_text()
    for mark, value in (("@CLONE@", str(clone)), ("@VM@", str(vm)), ("@LIBRARIES@", libraries(vm))):
        init = init.replace(mark, value)
    files.append(("init", stat.S_IFREG | 0o755, init.encode()))
    return cpio(files)


def write_programs(path: Path, flags: Sequence[tuple[str, ...]]) -> None:
    """The steering program for each of these flags, as bytecode, for guest.py."""
    from bypass.bpf import build

    entries = []
    for one in flags:
        programs = build.compile_programs(one).values()
        described = [{"name": p.name, "code": p.code.hex(), "maps": p.maps} for p in programs]
        entries.append({"flags": one, "programs": described})
    path.write_text(json.dumps(entries))


# ---- The network -------------------------------------------------------------------------------------------------
@contextmanager
def network(nics: Sequence[Nic]) -> Iterator[str]:
    """A namespace with a bridge that joins a tap for each card; its name."""
    from pyroute2 import IPRoute

    name = f"bypass-{os.getpid()}-vm"
    netns.create(name)
    try:
        with IPRoute(netns=name) as ip:
            ip.link("add", ifname="bridge", kind="bridge")
            bridge = ip.link_lookup(ifname="bridge")[0]
            for nic in nics:
                netns.run(name, _make_tap, nic)
                tap = ip.link_lookup(ifname=nic.name)[0]
                ip.link("set", index=tap, master=bridge, state="up")
            ip.link("set", index=bridge, state="up")
        yield name
    finally:
        netns.remove(name)


def _make_tap(nic: Nic) -> None:
    multi = ["multi_queue"] if nic.queues > 1 else []
    command = ["ip", "tuntap", "add", "dev", nic.name, "mode", "tap", "vnet_hdr", *multi]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise MachineError(f"{' '.join(command)}: {done.stderr.strip()}")


# ---- QEMU --------------------------------------------------------------------------------------------------------
def command(
    vm: Path,
    initrd: Path,
    console: Path,
    nics: Sequence[Nic] = NICS,
    *,
    qmp: Path | None = None,
    options: str = "",
) -> tuple[list[str], dict[str, str]]:
    """QEMU's command line and the environment it needs where it is not installed."""
    own = vm / "usr/bin/qemu-system-x86_64"
    qemu = str(own) if own.exists() else shutil.which("qemu-system-x86_64")
    if qemu is None:
        raise MachineError("qemu-system-x86_64 is missing: scripts/vm fetches it")
    env = dict(os.environ)
    where: list[str] = []
    if own.exists():
        env["LD_LIBRARY_PATH"] = libraries(vm)
        env["QEMU_MODULE_DIR"] = str(next(vm.glob("usr/lib/*-linux-gnu/qemu")))
        where = ["-L", str(vm / "usr/share/qemu"), "-L", str(vm / "usr/share/seabios")]
    (kernel,) = (vm / "boot").glob("vmlinuz-*")
    # iommu=pt: what the kernel drives itself is not translated (each translation is emulated), what vfio drives is.
    kernel_options = f"{options} console=ttyS0 quiet loglevel=5 panic=-1 mitigations=off net.ifnames=0"
    # no_timer_check: a busy host's emulated timer is late, which Linux takes for a broken IO-APIC, and panics
    # (arch/x86/kernel/apic/io_apic.c, check_timer; under KVM Linux leaves this check out by itself).
    kernel_options += " intel_iommu=on iommu=pt no_timer_check"
    argv = [qemu, *where, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
    argv += ["-machine", "q35,kernel-irqchip=split", "-accel", "tcg,thread=multi", "-cpu", "max,la57=off"]
    argv += ["-smp", str(CPUS), "-m", str(MEMORY_MB)]
    argv += ["-kernel", str(kernel), "-initrd", str(initrd), "-append", kernel_options]
    argv += ["-device", "intel-iommu,intremap=on,caching-mode=on,device-iotlb=on"]
    argv += ["-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"]
    argv += ["-serial", f"file:{console}", "-serial", "stdio", "-monitor", "none"]
    argv += ["-device", "pcie-root-port,id=bay,addr=13,chassis=1"]
    if qmp is not None:
        argv += ["-qmp", f"unix:{qmp},server=on,wait=off"]
    for nic in nics:
        more = f",queues={nic.queues}" if nic.queues > 1 else ""
        vectors = f",vectors={2 * nic.queues + 2}" if nic.queues > 1 else ""
        extra = f",{nic.args}" if nic.args else ""
        argv += ["-netdev", f"tap,id={nic.name},ifname={nic.name},script=no,downscript=no,vhost=off{more}"]
        argv += [
            "-device",
            f"{nic.model},netdev={nic.name},id=card-{nic.name},mac={nic.mac},romfile={vectors}{extra}",
        ]
    return argv, env


def unplug(qmp: Path, name: str) -> None:
    """Takes a card away: the guest is asked to let go of it, and it goes then.

    Source: QEMU's QMP reference, device_del.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        sock.connect(str(qmp))
        with sock.makefile("rw") as talk:
            talk.readline()  # its greeting
            remove = {"execute": "device_del", "arguments": {"id": f"card-{name}"}}
            for command in ({"execute": "qmp_capabilities"}, remove):
                talk.write(json.dumps(command) + "\n")
                talk.flush()
                while not {"return", "error"} & (answer := json.loads(talk.readline())).keys():
                    pass  # an event
                if "error" in answer:
                    raise MachineError(f"QEMU: {command['execute']}: {answer['error'].get('desc')}")


def run(
    argv: Sequence[str],
    env: dict[str, str],
    namespace: str,
    limit_s: float,
    silent_s: float,
    line: Callable[[str], None],
) -> str | None:
    """Runs QEMU in a namespace; every line that the guest says goes to `line`.

    Args:
        limit_s, silent_s: it is ended after so many seconds, or so many without a line.

    Returns:
        None: the guest ended by itself; or why it was ended.
    """
    with netns.entered(namespace):
        qemu = subprocess.Popen(
            argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    assert qemu.stdout is not None
    try:
        return _listen(qemu, time.monotonic() + limit_s, silent_s, line)
    finally:
        if qemu.poll() is None:
            qemu.send_signal(signal.SIGKILL)
        qemu.wait()
        qemu.stdout.close()


def _listen(
    qemu: subprocess.Popen[bytes], deadline: float, silent_s: float, line: Callable[[str], None]
) -> str | None:
    assert qemu.stdout is not None
    fd = qemu.stdout.fileno()
    rest = b""
    heard = time.monotonic()
    with selectors.DefaultSelector() as ready:
        ready.register(fd, selectors.EVENT_READ)
        while True:
            now = time.monotonic()
            if now >= deadline:
                return "it took too long"
            if now >= heard + silent_s:
                return f"it said nothing for {silent_s:.0f} s"
            if not ready.select(min(deadline, heard + silent_s) - now):
                continue
            piece = os.read(fd, 65536)
            if not piece:
                break
            heard = time.monotonic()
            *lines, rest = (rest + piece).split(b"\n")
            for text in lines:
                line(text.decode(errors="replace").rstrip("\r"))
    if qemu.wait() != 0:
        return f"QEMU ended with exit code {qemu.returncode}: {rest.decode(errors='replace')}"
    return None
