# SPDX-License-Identifier: Apache-2.0
"""The harness of `make test-vm`, without a machine: what goes into it, how it is ended, and what its words come to."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "vm"))

import machine
from machine import MachineError, Nic
from outcome import Outcome

NEWC_FIELDS = (
    "ino",
    "mode",
    "uid",
    "gid",
    "nlink",
    "mtime",
    "filesize",
    "maj",
    "min",
    "rmaj",
    "rmin",
    "namesize",
    "check",
)


def entries(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """A reader of newc archives: path -> (mode, content)."""
    found: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        head = {f: int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i, f in enumerate(NEWC_FIELDS)}
        name_at = at + 110
        name = archive[name_at : name_at + head["namesize"] - 1].decode()
        data_at = -(-(name_at + head["namesize"]) // 4) * 4
        if name == "TRAILER!!!":
            return found
        found[name] = head["mode"], archive[data_at : data_at + head["filesize"]]
        at = -(-(data_at + head["filesize"]) // 4) * 4


# ---- What goes in ------------------------------------------------------------------------------------------------
def test_an_archive_holds_what_was_put_in() -> None:
    files = [
        ("bin", 0o40755, b""),
        ("bin/a", 0o100755, b"12345"),
        ("bin/empty", 0o100644, b""),
        ("b", 0o100644, bytes(9)),
    ]
    assert entries(machine.cpio(files)) == {name: (mode, data) for name, mode, data in files}


def test_modules_are_loaded_after_what_they_need() -> None:
    dependencies = "\n".join(
        (
            "kernel/fs/9p/9p.ko.xz: kernel/net/9p/9pnet.ko.xz kernel/fs/netfs/netfs.ko.xz",
            "kernel/net/9p/9pnet_virtio.ko.xz: kernel/net/9p/9pnet.ko.xz",
            "kernel/net/9p/9pnet.ko.xz:",
            "kernel/fs/netfs/netfs.ko.xz:",
            "kernel/drivers/vfio-pci.ko.xz:",
        )
    )
    order = machine.load_order(
        dependencies, "kernel/drivers/virtio/virtio_pci.ko\n", ["virtio_pci", "9p", "9pnet_virtio"]
    )
    names = [Path(path).name.partition(".")[0] for path in order]
    assert names == ["netfs", "9pnet", "9p", "9pnet_virtio"]
    assert machine.load_order(dependencies, "", ["vfio_pci"]) == ["kernel/drivers/vfio-pci.ko.xz"]
    with pytest.raises(MachineError, match="no module e1000e"):
        machine.load_order(dependencies, "", ["e1000e"])


def test_each_card_has_a_tap_and_an_address_and_no_kvm_is_asked_for(tmp_path: Path) -> None:
    vm = tmp_path / "vm"
    for folder in ("usr/bin", "usr/lib/x86_64-linux-gnu/qemu", "boot"):
        (vm / folder).mkdir(parents=True)
    (vm / "usr/bin/qemu-system-x86_64").touch()
    (vm / "boot/vmlinuz-1").touch()
    nics = [
        Nic("one", "52:54:00:00:00:09", "e1000e"),
        Nic("two", "52:54:00:00:00:0a", "virtio-net-pci", "mq=on", queues=2),
    ]
    argv, env = machine.command(vm, Path("/initrd"), Path("/log"), nics)
    text = " ".join(argv)
    assert argv[0] == str(vm / "usr/bin/qemu-system-x86_64")
    assert env["LD_LIBRARY_PATH"] == str(vm / "usr/lib/x86_64-linux-gnu")
    assert "-accel tcg" in text
    assert "kvm" not in text.replace("kernel-irqchip", "")
    assert "readonly=on" in text
    assert "tap,id=one,ifname=one,script=no" in text
    assert "e1000e,netdev=one,id=card-one,mac=52:54:00:00:00:09" in text
    assert "-qmp" not in text
    assert "queues=2 " in text
    assert "vectors=6,mq=on" in text


def test_a_card_is_taken_away_by_qmp(tmp_path: Path) -> None:
    """Against a QEMU that says what its reference says: a greeting, an event at any time, an answer to each command."""
    path = tmp_path / "qmp"
    asked: list[dict[str, object]] = []

    def answer(server: socket.socket, last: str) -> None:
        sock, _ = server.accept()
        with sock, sock.makefile("rw") as talk:
            talk.write('{"QMP": {}}\n')
            for reply in ('{"return": {}}', last):
                talk.flush()
                asked.append(json.loads(talk.readline()))
                talk.write('{"event": "RTC_CHANGE"}\n' + reply + "\n")

    for last, trouble in (
        ('{"return": {}}', None),
        ('{"error": {"desc": "not found"}}', "device_del: not found"),
    ):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
            server.bind(str(path))
            server.listen()
            thread = threading.Thread(target=answer, args=(server, last))
            thread.start()
            if trouble is None:
                machine.unplug(path, "one")
            else:
                with pytest.raises(MachineError, match=trouble):
                    machine.unplug(path, "one")
            thread.join()
        path.unlink()
    assert asked[:2] == [
        {"execute": "qmp_capabilities"},
        {"execute": "device_del", "arguments": {"id": "card-one"}},
    ]


# ---- How it is ended ---------------------------------------------------------------------------------------------
@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> str:
    """machine.run() in this namespace: its children here are no machines."""
    from contextlib import nullcontext

    monkeypatch.setattr(machine.netns, "entered", lambda name: nullcontext())
    return "unused"


def run(argv: list[str], limit_s: float, silent_s: float) -> tuple[str | None, list[str]]:
    lines: list[str] = []
    return machine.run(argv, dict(os.environ), "unused", limit_s, silent_s, lines.append), lines


def test_a_machine_that_ends_by_itself_is_heard_to_its_last_line(here: str) -> None:
    assert run(["sh", "-c", "printf 'a\\r\\nb\\n'; sleep 0.1; echo c"], 60, 60) == (None, ["a", "b", "c"])


def test_a_machine_that_hangs_is_ended_and_a_failing_one_is_told(here: str, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    script = f"echo $$ > {pid}; echo up; exec sleep 1000"
    why, lines = run(["sh", "-c", script], 60, 0.3)
    assert (why, lines) == ("it said nothing for 0 s", ["up"])
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    why, _ = run(["sh", "-c", "while :; do echo again; sleep 0.05; done"], 0.4, 60)
    assert why == "it took too long"
    why, _ = run(["sh", "-c", "printf 'no such device'; exit 3"], 60, 60)
    assert why == "QEMU ended with exit code 3: no such device"


def test_a_machine_is_ended_when_its_reader_fails(here: str) -> None:
    heard: list[int] = []

    def interrupted(text: str) -> None:
        heard.append(int(text))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        machine.run(["sh", "-c", "echo $$; exec sleep 1000"], dict(os.environ), "unused", 60, 60, interrupted)
    with pytest.raises(ProcessLookupError):
        os.kill(heard[0], 0)


# ---- What it said ------------------------------------------------------------------------------------------------
def test_checks_rows_and_the_end_are_heard() -> None:
    outcome = Outcome()
    said = [
        "guest: Linux",
        '@ {"check": "ping", "ok": true}',
        '@ {"row": {"device": "lan0", "ping": "5/5"}}',
        '@ {"unplug": "hot"}',
        '@ {"check": "echo", "ok": false}',
        '@ {"end": true, "failed": ["echo"]}',
    ]
    shown = [outcome.hear(line) for line in said]
    assert shown == ["guest: Linux", "ok     ping", "", "", "FAILED echo", ""]
    assert outcome.unplug == "hot"
    assert outcome.failed == ["echo"]
    assert outcome.ended
    assert outcome.table().row_count == 1


def test_silence_and_parts_that_failed_without_a_word_are_failures() -> None:
    assert Outcome().failed == ["nothing was checked"]
    outcome = Outcome()
    outcome.hear('@ {"check": "ping", "ok": true}')
    assert outcome.hear('@ {"check": "pi[  12.3] kernel') == '@ {"check": "pi[  12.3] kernel'
    outcome.hear('@ {"end": true, "failed": ["network"]}')
    assert outcome.failed == ["parts failed: network"]
