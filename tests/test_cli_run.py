# SPDX-License-Identifier: Apache-2.0
"""`bypass run`: an unmodified program with a broker of its own, as another user, and what is left of it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from backends import finds, policy_for
from broker_support import running
from support import WAIT_S

from bypass import app, netns
from bypass.broker.site import LoopSite
from bypass.cli.run import beyond_reach, environment
from bypass.errors import BypassError
from bypass.lab import SERVER_IFNAME, SERVER_IP, Lab

BYPASS = [sys.executable, "-m", "bypass"]
TIMEOUT = 60
NOBODY = 65534

POLICY = f"""
version: 1
interface: {SERVER_IFNAME}
backend: {{kind: afxdp, mode: copy, ring_size: 256}}
flows:
  - name: echo
    match: {{proto: tcp, local_port: 8080}}
    action: steer
"""

SERVER = f"""
import os, socket
s = socket.create_server(("{SERVER_IP}", 8080))
print(os.getpid(), os.getuid(), os.environ["BYPASS_PROCNAME"], flush=True)
while True:
    c, _ = s.accept()
    while data := c.recv(1000):
        c.sendall(data)
    c.close()
"""

TALK_TO_ONESELF = """
import socket
s = socket.create_server(("127.0.0.1", 0))
c = socket.create_connection(s.getsockname())
a, _ = s.accept()
c.sendall(b"through the stack")
print(a.recv(100).decode(), flush=True)
"""


def bypass_run(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("BYPASS_S")} | (env or {})
    return subprocess.run(
        [*BYPASS, "run", *args], capture_output=True, text=True, timeout=TIMEOUT, env=environ
    )


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Killed at the end of the block, whatever happens in it."""
    with process:
        try:
            yield process
        finally:
            process.kill()


def private_brokers() -> set[str]:
    lines = Path("/proc/thread-self/net/unix").read_text().splitlines()
    return {name for line in lines if (name := line.rpartition(" ")[2]).startswith("@bypass/run/")}


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_output_and_exit_code_are_the_programs() -> None:
    done = bypass_run("--loopback", "--", "/usr/bin/python3", "-c", TALK_TO_ONESELF + "raise SystemExit(7)")
    assert (done.stdout, done.stderr, done.returncode) == ("through the stack\n", "", 7)
    wait_until(lambda: not private_brokers())


def test_a_signal_reaches_the_program_itself() -> None:
    argv = [*BYPASS, "run", "--loopback", "--", "/bin/sh", "-c", "echo $$; exec sleep 60"]
    with ended(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) == process.pid, "no process stands between"
        assert len(private_brokers()) == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT) == -signal.SIGTERM
    wait_until(lambda: not private_brokers())


def test_a_program_may_wait_for_all_of_its_children() -> None:
    program = "import os\ntry: os.wait()\nexcept ChildProcessError: print('none')"
    done = bypass_run("--loopback", "--", "/usr/bin/python3", "-c", program)
    assert done.stdout == "none\n"


@pytest.mark.parametrize(("program", "code"), [("/nonexistent", 127), ("/etc/passwd", 126)])
def test_a_program_that_cannot_be_started(program: str, code: int) -> None:
    done = bypass_run("--loopback", "--", program)
    assert done.returncode == code
    assert done.stderr.startswith(f"bypass: {program}: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--socket", "@bypass-nobody", "--", "true"],
            "no broker runs at @bypass-nobody, and there is no policy",
        ),
        (["-c", "/nonexistent.yaml", "--", "true"], "cannot be read"),
        (["--user", "no-such-user", "--loopback", "--", "true"], "no user 'no-such-user'"),
        (["--loopback"], "PROGRAM"),
    ],
)
def test_what_cannot_be_is_said_once_with_exit_code_2(args: list[str], message: str) -> None:
    done = bypass_run(*args, env={"BYPASS_POLICY": "/nonexistent.yaml"})
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="root: a file of another user")
def test_a_program_that_the_library_cannot_reach_is_told(tmp_path: Path) -> None:
    plain, static, setuid, go = (tmp_path / name for name in ("plain", "static", "setuid", "go"))
    source = tmp_path / "it.c"
    source.write_text('#include <stdio.h>\nint main(void) { puts("it runs"); return 7; }\n')
    subprocess.run(["gcc", "-o", plain, source], check=True)
    subprocess.run(["gcc", "-static", "-o", static, source], check=True)
    shutil.copy(plain, setuid)
    os.chown(setuid, NOBODY, NOBODY)
    setuid.chmod(0o4755)
    tmp_path.chmod(0o755)
    go.write_bytes(plain.read_bytes() + b"\xff Go buildinf:\x08\x02")
    go.chmod(0o755)
    for path, why in (
        (plain, ""),
        (static, "is linked statically"),
        (setuid, "becomes another user"),
        (go, "is written in Go"),
    ):
        done = bypass_run("--loopback", "--", str(path))
        assert (done.returncode, done.stdout) == (7, "it runs\n")
        if why:
            assert done.stderr.startswith(f"bypass: {path} ")
            assert why in done.stderr
            assert done.stderr.endswith(": all its sockets are the kernel's\n")
            assert done.stderr.count("\n") == 1
        else:
            assert done.stderr == ""
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\nexit 3\n")
    script.chmod(0o755)
    assert (bypass_run("--loopback", "--", str(script)).stderr, beyond_reach("no-such-program", {})) == (
        "",
        "",
    )


def test_a_running_broker_is_used() -> None:
    program = "import os; print(os.environ['BYPASS_SOCKET'])"
    with running(LoopSite) as broker:
        done = bypass_run("--socket", broker.name, "--", "/usr/bin/python3", "-c", program)
        assert done.stdout == f"{broker.name}\n"
        done = bypass_run("--", "/usr/bin/python3", "-c", program, env={"BYPASS_SOCKET": broker.name})
        assert done.stdout == f"{broker.name}\n"
        done = bypass_run("--loopback", "--socket", broker.name, "--", "/usr/bin/python3", "-c", program)
        assert done.stdout.startswith("@bypass/run/")


def test_the_environment_says_what_the_library_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/lib/a.so /lib/b.so")
    monkeypatch.setenv("BYPASS_APP", "7:00")
    got = environment(Path("/x/lib.so"), "@name", "redis")
    assert got["LD_PRELOAD"] == "/x/lib.so:/lib/a.so:/lib/b.so"
    assert (got["BYPASS_SOCKET"], got["BYPASS_PROCNAME"]) == ("@name", "redis")
    assert "BYPASS_APP" not in got


def test_the_library_is_found_or_its_absence_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine.so"
    mine.touch()
    monkeypatch.setenv("BYPASS_PRELOAD", str(mine))
    assert app.preload_library() == mine
    mine.unlink()
    with pytest.raises(BypassError, match="make build"):
        app.preload_library()


@pytest.mark.netns
@pytest.mark.backends(asked=True)
def test_a_server_of_an_unprivileged_user_serves_the_network(lab: Lab, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(policy_for(lab, POLICY))
    argv = [*BYPASS, "run", "-c", str(policy), "--user", str(NOBODY), "--procname", "echo", "--"]
    argv += ["/usr/bin/python3", "-c", SERVER]
    with netns.entered(lab.server_ns):
        with ended(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == f"{process.pid} {NOBODY} echo\n"
            opened = Path("/proc/thread-self/net/snmp").read_text()
            for _ in range(3):
                with (
                    netns.entered(lab.client_ns),
                    socket.create_connection((SERVER_IP, 8080), WAIT_S) as client,
                ):
                    client.sendall(b"hello")
                    assert client.recv(5, socket.MSG_WAITALL) == b"hello"
            assert passive_opens() == passive_opens(opened), "the kernel has accepted none of them"
            assert {n.rpartition("-")[0] for n in private_brokers()} == {f"@bypass/run/{process.pid}"}
        wait_until(lambda: not private_brokers())
    wait_until(lambda: not netns.processes(lab.server_ns))
    if finds(lab, "fail-open"):
        with netns.entered(lab.client_ns), pytest.raises(ConnectionRefusedError):
            socket.create_connection((SERVER_IP, 8080), WAIT_S)


def passive_opens(text: str = "") -> int:
    text = text or Path("/proc/thread-self/net/snmp").read_text()
    names, values = (line.split() for line in text.splitlines() if line.startswith("Tcp:"))
    return int(values[names.index("PassiveOpens")])


@pytest.mark.netns
@pytest.mark.backends(asked=True)
def test_one_program_after_the_other(lab: Lab, tmp_path: Path) -> None:
    """The private broker of the first may still be about to let go of the interface."""
    policy = tmp_path / "policy.yaml"
    policy.write_text(policy_for(lab, POLICY))
    listens = f"import socket; socket.create_server(('{SERVER_IP}', 8080)); print('listens')"
    with netns.entered(lab.server_ns):
        for _ in range(3):
            done = bypass_run("-c", str(policy), "--", "/usr/bin/python3", "-c", listens)
            assert (done.returncode, done.stdout, done.stderr) == (0, "listens\n", "")
        wait_until(lambda: not private_brokers())
    wait_until(lambda: not netns.processes(lab.server_ns))


@pytest.mark.skipif(os.geteuid() != 0, reason="root: becomes another user")
def test_a_library_that_the_user_cannot_read(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir(mode=0o700)
    library = hidden / "libbypass-preload.so"
    library.write_bytes(app.preload_library().read_bytes())
    argv = ("--loopback", "--user", str(NOBODY), "--", "true")
    done = bypass_run(*argv, env={"BYPASS_PRELOAD": str(library)})
    assert done.returncode == 2
    assert f"cannot read {library}" in done.stderr
    wait_until(lambda: not private_brokers())
