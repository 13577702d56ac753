# SPDX-License-Identifier: Apache-2.0
"""Notes below /run/bypass: whose process has ended, which network namespaces are gone, and what is removed for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import lab_name

from bypass import netns, records
from bypass.broker import blocks
from bypass.cli import main
from bypass.doctor import check_notes
from bypass.errors import DeviceError
from bypass.hwflow import held

LIVING = (os.getpid(), records.started(os.getpid()) or 0)
DEAD = (LIVING[0], LIVING[1] - 1)
"""The number is used again."""


@pytest.fixture
def gone() -> str:
    """The cookie of a network namespace that was."""
    name = f"bypass-{lab_name()}"
    netns.create(name)
    cookie = netns.run(name, netns.cookie)
    netns.remove(name)
    return cookie


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    found = (tmp_path / "hwflow", tmp_path / "ports")
    monkeypatch.setattr(records, "OF_NAMESPACES", found)
    for folder in found:
        folder.mkdir(mode=0o700)
    return found


def note(folder: Path, cookie: str, keeper: object = DEAD) -> Path:
    path = folder / f"{cookie}-7"
    path.write_text(json.dumps({"keeper": keeper}))
    return path


# ---- Processes -----------------------------------------------------------------------------------------------------
def test_a_process_is_its_number_and_when_it_began() -> None:
    assert records.is_alive(LIVING)
    assert not records.is_alive(DEAD)


def test_one_that_ended_is_dead_before_its_parent_has_looked() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        began = records.started(process.pid)
        assert began is not None
        assert records.is_alive((process.pid, began))
        process.stdin.close()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert Path(f"/proc/{process.pid}/stat").read_text().split()[2] == "Z"
        assert records.started(process.pid) is None
    assert records.started(process.pid) is None


# ---- Files ---------------------------------------------------------------------------------------------------------
def test_a_note_is_written_whole_and_for_root_alone(tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    records.write(path, "first, and long")
    records.write(path, "then")
    assert path.read_text() == "then"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_one_at_a_time_changes_what_notes_are_about(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from bypass.records import locked\n"
    code += "with locked(Path(sys.argv[1]), ''): print('has it', flush=True)"
    with records.locked(tmp_path / "new", "it needs root"):
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
        other = subprocess.Popen([sys.executable, "-c", code, tmp_path / "new"], stdout=subprocess.PIPE)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(0.5)
    with other:
        assert other.communicate(timeout=60)[0] == b"has it\n"
    (tmp_path / "file").touch()
    with (
        pytest.raises(DeviceError, match="Not a directory: it needs root"),
        records.locked(tmp_path / "file" / "x", "it needs root"),
    ):
        pass


# ---- Network namespaces --------------------------------------------------------------------------------------------
def held_by_name() -> Iterator[str]:
    name = f"bypass-{lab_name()}"
    netns.create(name)
    yield netns.run(name, netns.cookie)
    netns.remove(name)


def held_by_a_descriptor() -> Iterator[str]:
    fd = netns.unnamed()
    with netns.entered_fd(fd):
        cookie = netns.cookie()
    yield cookie
    os.close(fd)


def held_by_a_process() -> Iterator[str]:
    code = "from bypass import netns; print(netns.cookie(), flush=True); input()"
    command = ["unshare", "--net", sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate("\n")


def held_by_a_thread() -> Iterator[str]:
    code = (
        "import threading; from bypass import netns\n"
        "def work():\n"
        "    with netns.entered_fd(netns.unnamed()): print(netns.cookie(), flush=True); input()\n"
        "t = threading.Thread(target=work); t.start(); t.join()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate("\n")


def held_by_a_mount_of_others() -> Iterator[str]:
    """As runtimes of containers have them, in a mount namespace of their own and by a name that proc(5) escapes."""
    script = "mount -t tmpfs none /mnt && touch '/mnt/a b' && ip netns add x$$ && "
    script += "mount --bind /run/netns/x$$ '/mnt/a b' && ip netns exec x$$ python3 -c \"$1\" && "
    script += "ip netns del x$$ && echo && read x && umount '/mnt/a b'"
    code = "import socket; print(socket.socket().getsockopt(1, 71, 8)[::-1].hex(), end='')"
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script, "sh", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate("\n")


@pytest.mark.netns
@pytest.mark.parametrize(
    "holder",
    [held_by_name, held_by_a_descriptor, held_by_a_process, held_by_a_thread, held_by_a_mount_of_others],
)
def test_a_namespace_is_there_as_long_as_somebody_can_enter_it(
    holder: object, folders: tuple[Path, Path]
) -> None:
    assert callable(holder)
    kept = holder()
    cookie = next(kept)
    path = note(folders[0], cookie)
    assert cookie in netns.cookies()
    assert records.forget(folders[0]) == 0
    assert path.exists()
    assert list(kept) == []
    assert cookie not in netns.cookies()
    assert records.forget(folders[0]) == 1
    assert not path.exists()


@pytest.mark.netns
def test_who_may_not_look_into_one_does_not_guess() -> None:
    """A root whose capabilities are fewer than those of a process elsewhere, as a service's or a container's."""
    code = "from bypass import netns; print(len(netns.cookies()))"
    fewer = ["setpriv", "--bounding-set=-sys_ptrace,-sys_boot", sys.executable, "-c", code]
    elsewhere = held_by_a_process()
    next(elsewhere)
    done = subprocess.run(fewer, capture_output=True, text=True, check=False, timeout=60)
    assert list(elsewhere) == []
    assert (done.returncode, done.stdout) == (1, "")
    assert "PermissionError: [Errno 13] there are network namespaces that this process may not" in done.stderr


@pytest.mark.netns
def test_only_notes_of_dead_processes_in_namespaces_that_are_gone_are_removed(
    gone: str, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hwflow, _ = folders
    for name, text in (("damaged-1", "{"), (f"{gone}-1", "[]"), (f"{gone}-2", '{"keeper": 5}')):
        (hwflow / name).write_text(text)
    kept = {*hwflow.iterdir(), note(hwflow, netns.cookie())}
    living = note(hwflow, gone, LIVING)
    assert records.left_over(hwflow) == {}
    living.rename(hwflow / f"{gone}-8")
    left = note(hwflow, gone)
    assert records.left_over(hwflow) == {left: {"keeper": list(DEAD)}}
    with monkeypatch.context() as patched:
        patched.setattr(netns, "cookies", lambda: (_ for _ in ()).throw(PermissionError("not yours")))
        assert records.forget(hwflow) == 0, "who may not look does not guess"
    assert records.forget(hwflow) == 1
    assert set(hwflow.iterdir()) == {*kept, hwflow / f"{gone}-8"}
    assert records.forget(hwflow / "nosuch") == 0


@pytest.mark.netns
def test_the_next_start_anywhere_removes_them(gone: str, folders: tuple[Path, Path]) -> None:
    hwflow, ports = folders
    note(hwflow, gone)
    note(ports, gone)
    assert held.recover("lo", None, hwflow) is False
    assert list(hwflow.iterdir()) == []
    blocks.Reserved(ports)
    assert list(ports.iterdir()) == []


@pytest.mark.netns
def test_commands_name_and_remove_them(
    gone: str, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["nic", "unbind", "--left"]) == 0
    assert capsys.readouterr().out == ""
    for folder in folders:
        note(folder, gone)
    main(["doctor", "--json"])
    checks = json.loads(capsys.readouterr().out)["checks"]
    (said,) = (c for c in checks if c["name"] == "notes")
    assert (said["verdict"], said["fix"]) == ("warn", "bypass nic unbind --left")
    assert said["found"].startswith("2 of killed processes")
    assert main(["nic", "unbind", "--left"]) == 0
    assert capsys.readouterr().out == "2 notes of network namespaces that are gone: removed\n"
    assert [list(folder.iterdir()) for folder in folders] == [[], []]
    assert list(check_notes(0)) == []
