# SPDX-License-Identifier: Apache-2.0
"""The benchmark's servers on AF_XDP: `python -m bench.serve VARIANT LAB`. Started by bench.network, pinned.

    bare     rings only: what came in goes out, by afxdp_echo (UDP and a stateless TCP; echo port only)
    bypass   the stack: an event loop in C over the public API (bench/server_bypass.c)
    python   the stack: bypass.aio streams in Python (echo port, TCP only)
    dpdk     as bypass, on a DPDK port, in a lab whose server's end is a wire

`bare`, `bypass` and `dpdk` come as -spin, which never sleep, and as -sleep, which sleep whenever nothing is there. All
have the same rules. Prints "ready", serves until its input ends, prints what was counted as one JSON object.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import cffi
from bypass._core import ffi as core_ffi
from bypass._core import lib as core_lib

from bench.programs import ROOT, program
from bypass import netns
from bypass._build_core import declarations
from bypass.afxdp import AfxdpDevice
from bypass.backends import DpdkAttachment
from bypass.core import address_bytes
from bypass.lab import CLIENT_IP, SERVER_IFNAME, SERVER_IP, Lab, dpdk_policy
from bypass.policy import parse_policy
from bypass.steering import Steering

ECHO, DISCARD, CHARGEN = 7, 9, 19
VARIANTS = (
    "bare-spin",
    "bare-sleep",
    "bypass-spin",
    "bypass-sleep",
    "bypass-csum",
    "python",
    "dpdk-spin",
    "dpdk-sleep",
)

POLICY = f"""
version: 1
interface: {SERVER_IFNAME}
backend: {{kind: afxdp, mode: copy, queues: all}}
flows:
  - name: udp
    match: {{proto: udp, local: {SERVER_IP}, local_port: {ECHO}}}
    action: steer
  - name: tcp
    match: {{proto: tcp, local: {SERVER_IP}, local_port: {ECHO}-{CHARGEN}}}
    action: steer
"""


@contextlib.contextmanager
def steered() -> Iterator[AfxdpDevice]:
    """The device with the services' ports steered to it. In the server's namespace."""
    with contextlib.ExitStack() as stack:
        # Frames for full windows both ways: half stay with the device for reception.
        device = stack.enter_context(AfxdpDevice(SERVER_IFNAME, mode="copy", ring_size=4096, frames=16384))
        steering = stack.enter_context(
            Steering(parse_policy(POLICY), SERVER_IFNAME, queues=len(device.queue_numbers))
        )
        steering.set_locals([SERVER_IP])
        for queue, fd in device.fds.items():
            steering.set_socket(0, queue, fd)
        steering.add_endpoint(socket.IPPROTO_UDP, SERVER_IP, ECHO)
        for port in (ECHO, DISCARD, CHARGEN):
            steering.add_endpoint(socket.IPPROTO_TCP, SERVER_IP, port)
        yield device


@contextlib.contextmanager
def steered_dpdk() -> Iterator[DpdkAttachment]:
    """The same on a DPDK port."""
    attachment = DpdkAttachment(parse_policy(dpdk_policy(POLICY)))
    with contextlib.closing(attachment):
        attachment.tell_addresses()
        attachment.steering.add_endpoint(socket.IPPROTO_UDP, SERVER_IP, ECHO)
        for port in (ECHO, DISCARD, CHARGEN):
            attachment.steering.add_endpoint(socket.IPPROTO_TCP, SERVER_IP, port)
        yield attachment


def server_library() -> tuple[cffi.FFI, Any]:
    """build/bench/libserver.so, with the declarations of its header and of bypass.h."""
    ffi = cffi.FFI()
    text = (ROOT / "bench" / "server_bypass.h").read_text()
    enum_on = text.index("enum {")
    ffi.cdef(declarations() + text[enum_on : text.rindex("#endif")])
    return ffi, ffi.dlopen(program("libserver.so"))


def serve_bypass(
    device: AfxdpDevice | DpdkAttachment, lab: Lab, spin: bool, stop: threading.Event
) -> dict[str, int]:
    """Returns the stack's counters that are not 0."""
    ffi, lib = server_library()
    sides = lab.sides()
    assert sides is not None
    args: Any = ffi.new("struct server_args *")
    args.local.b = address_bytes(SERVER_IP)
    args.peer.b = address_bytes(CLIENT_IP)
    args.peer_mac = bytes.fromhex(sides[1].mac.replace(":", ""))
    args.flags = lib.SERVER_SPIN if spin else 0
    flag = ffi.new("uint32_t *")
    netdev = ffi.cast("struct bypass_netdev *", int(core_ffi.cast("uintptr_t", device.netdev)))

    def end() -> None:
        stop.wait()
        flag[0] = 1

    watcher = threading.Thread(target=end)
    watcher.start()
    print("ready", flush=True)
    stats = ffi.new("uint64_t[]", core_lib.bypass_stat_count())
    err = int(lib.server_run(netdev, args, flag, stats))  # without the interpreter's lock
    stop.set()
    watcher.join()
    if err < 0:
        raise OSError(-err, os.strerror(-err))
    names = (core_ffi.string(core_lib.bypass_stat_name(i)).decode() for i in range(len(stats)))
    return {name: int(n) for name, n in zip(names, stats, strict=True) if n}


def serve_bare(device: AfxdpDevice, spin: bool, stop: threading.Event) -> None:
    print("ready", flush=True)
    while not stop.is_set():
        device.echo(0.05, port=ECHO, spin=spin)


def serve_python(stop: threading.Event) -> None:
    """TCP echo with bypass.aio: the rate that a Python program gets."""
    from bypass import Stack, aio

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(4096):
            writer.write(data)
        writer.close()

    async def serve(stack: Stack) -> None:
        server = await aio.start_server(stack, echo, SERVER_IP, ECHO)
        print("ready", flush=True)
        await asyncio.to_thread(stop.wait)
        server.close()

    with Stack.from_policy(parse_policy(POLICY)) as stack:
        asyncio.run(serve(stack))


def main(variant: str, lab_name: str) -> None:
    lab = Lab(lab_name)
    stop = threading.Event()

    def until_input_ends() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=until_input_ends, daemon=True).start()
    with netns.entered(lab.server_ns):
        if variant == "python":
            serve_python(stop)
            print("{}")
            return
        if variant.startswith("dpdk"):
            with steered_dpdk() as port:
                counters = serve_bypass(port, lab, variant.endswith("spin"), stop)
                print(json.dumps({"stack": counters}))
            return
        with steered() as device:
            counters = {}
            if variant.startswith("bare"):
                serve_bare(device, variant.endswith("spin"), stop)
            else:
                counters = serve_bypass(device, lab, variant.endswith("spin"), stop)
            seen = {name: n for name, n in device.statistics()[0].items() if n}
            print(json.dumps({"device": seen, "stack": counters}))


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in VARIANTS:
        sys.exit(f"usage: python -m bench.serve {{{','.join(VARIANTS)}}} LAB")
    main(sys.argv[1], sys.argv[2])
