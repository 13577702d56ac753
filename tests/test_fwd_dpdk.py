# SPDX-License-Identifier: Apache-2.0
"""bypass-fwd beside a classifier: keys of the dead go from its memory, and what cannot be a classifier is refused.

What of it needs a port of DPDK is in test_broker_dpdk.py.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bypass._core import ffi, lib

from bypass.fwd import Forwarder

PORTS = range(1000, 3000)


class Classifier:
    """Memory with a classifier in it, as a broker makes it."""

    def __init__(self, *, sealed: bool = True) -> None:
        config = ffi.new("struct classify_config *")
        config.abi, config.keys, config.endpoints = lib.CLASSIFY_ABI, 64, 4096
        config.held, config.members, config.seed = 64, 64, int.from_bytes(os.urandom(8), "little")
        size = lib.classify_mem_size(config)
        self.fd = os.memfd_create("classifier", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        if sealed:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self._map = mmap.mmap(self.fd, size)
        self._bytes = ffi.from_buffer(self._map)
        self.view = ffi.new("struct classifier *")
        assert lib.classify_init(self.view, self._bytes, size, config) == 0

    def add(self, port: int) -> None:
        e = ffi.new("struct classify_endpoint *", {"entry": port})
        assert lib.classify_endpoint_add(self.view, self._key(port), e) == 0

    def has(self, port: int) -> bool:
        out = ffi.new("struct classify_endpoint *")
        code = lib.classify_endpoint_get(self.view, self._key(port), out)
        assert code in (0, -errno.ENOENT)
        return bool(code == 0)

    def key(self, port: int) -> bytes:
        return bytes(ffi.buffer(self._key(port)))

    def _key(self, port: int) -> Any:
        key = ffi.new("struct classify_key *")
        key.local, key.proto = socket.inet_aton("192.0.2.10"), socket.IPPROTO_TCP
        key.local_port = port.to_bytes(2, "big")
        return key

    def close(self) -> None:
        ffi.release(self._bytes)
        self._map.close()
        os.close(self.fd)


@pytest.fixture
def classifier() -> Iterator[Classifier]:
    c = Classifier()
    yield c
    c.close()


@pytest.fixture
def forwarder() -> Iterator[Forwarder]:
    with Forwarder.start() as f:
        yield f


def wait_until_gone(c: Classifier, port: int) -> None:
    deadline = time.monotonic() + 20
    while c.has(port):
        assert time.monotonic() < deadline, f"the entry of port {port} stays"
        time.sleep(0.002)


@pytest.mark.parametrize("broker", ["alive", "dead"])
def test_the_flows_of_the_dead_are_the_kernels(classifier: Classifier, tmp_path: Path, broker: str) -> None:
    """More than go between two rounds; some were given up before, some are not its own."""
    name = str(tmp_path / "fwd.sock")
    f = Forwarder.start(name, hold=True)
    for port in PORTS:
        classifier.add(port)
    f.put("app")
    keys = [classifier.key(port) for port in PORTS[:-100]]
    f.watch_keys("app", 0, keys[:1000], classifier.fd)
    f.watch_keys("app", 0, keys[1000:])
    f.forget_keys("app", 0, keys[500:600])
    with subprocess.Popen(["sleep", "60"]) as process:
        pidfd = os.pidfd_open(process.pid)
        f.watch("app", [pidfd])
        os.close(pidfd)
        if broker == "dead":
            f.close()
        process.kill()
    if broker == "alive":
        wait_until_gone(classifier, PORTS[0])  # the last one of its to be deleted
        f.close()
    assert os.waitpid(f.pid, 0)[1] == 0  # with the last item
    left = {port for port in PORTS if classifier.has(port)}
    assert left == {*PORTS[500:600], *PORTS[-100:]}


def test_memory_that_could_hurt_is_refused(forwarder: Forwarder, classifier: Classifier) -> None:
    forwarder.put("app")
    unsealed = Classifier(sealed=False)
    nothing = os.memfd_create("nothing", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(nothing, 1 << 20)
    fcntl.fcntl(nothing, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    key = classifier.key(PORTS[0])
    for fd, keys, code in (
        (unsealed.fd, [key], errno.EPERM),
        (nothing, [key], errno.EINVAL),
        (classifier.fd, [key + b"x"], errno.EINVAL),
    ):
        with pytest.raises(OSError, match="no classifier") as e:
            forwarder.watch_keys("app", 0, keys, fd)
        assert e.value.errno == code
        with pytest.raises(OSError, match="classifier's memory") as e:
            forwarder.dpdk_open(
                {"device": b"net_null0"}, ["fwd"], fd if fd != classifier.fd else nothing, nothing
            )
    os.close(nothing)
    unsealed.close()
    forwarder.watch_keys("app", 0, [key], classifier.fd)
    assert [(i.name, i.keys) for i in forwarder.list()] == [("app", 1)]


def test_a_port_without_sense_is_refused(forwarder: Forwarder, classifier: Classifier) -> None:
    """Before DPDK is loaded, which could not be undone."""
    for config, args in (({"device": b"x" * 512}, ["fwd"]), ({"device": b"net_null0"}, [])):
        with pytest.raises(OSError, match="a port comes with") as e:
            forwarder.dpdk_open(config, args, classifier.fd, classifier.fd)
        assert e.value.errno == errno.EINVAL
    with pytest.raises(OSError, match="have 3004 bytes, of 2048"):
        forwarder.dpdk_open({"device": b"net_null0"}, ["x" * 3003], classifier.fd, classifier.fd)
    with pytest.raises(OSError, match=r"no port of DPDK"):
        forwarder.dpdk_stats(0)
    with pytest.raises(OSError, match=r"no port of DPDK"):
        forwarder.dpdk_audit()
    assert "bypass-dpdk" not in Path(f"/proc/{forwarder.pid}/maps").read_text()


@pytest.mark.parametrize(
    ("count", "size", "code"),
    [
        (0, 0, errno.ENODEV),
        (2, 2, errno.ENODEV),
        (2, 1.5, errno.EINVAL),
        (2, 3, errno.EINVAL),
        (0, 1, errno.EINVAL),
        (4097, 4097, errno.EINVAL),
        (2**32 - 1, 1, errno.EINVAL),
    ],
)
def test_rules_of_a_port_come_in_a_file_that_holds_just_them(
    forwarder: Forwarder, monkeypatch: pytest.MonkeyPatch, count: int, size: float, code: int
) -> None:
    """What is right has no port here."""
    real = forwarder._ask

    def lies(kind: str, struct: str, values: Any, **more: Any) -> Any:
        os.ftruncate(more["fds"][0], int(size * ffi.sizeof("struct dpdk_flow")))
        return real(kind, struct, values | {"count": count}, **more)

    monkeypatch.setattr(forwarder, "_ask", lies)
    with pytest.raises(OSError, match=r"rules come in a file|no port of DPDK") as e:
        forwarder.dpdk_flows(ffi.new("struct dpdk_flow[]", 0), -1)
    assert e.value.errno == code
