# SPDX-License-Identifier: Apache-2.0
"""`bypass up`, `down`, `reload`, `ps`, `explain`, and the units of systemd: on an interface of a lab."""

from __future__ import annotations

import configparser
import contextlib
import json
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from broker_support import STREAM, Child, Client
from support import WAIT_S

from bypass import libbpf, netns
from bypass.broker import private
from bypass.broker.private import site_when_free
from bypass.broker.protocol import Kind, Message
from bypass.broker.site import LoopSite
from bypass.broker.tools import Asking, ask
from bypass.errors import ForeignProgramError
from bypass.lab import CLIENT_IP, SERVER_IFNAME, SERVER_IP, Lab

ROOT = Path(__file__).resolve().parents[1]
BYPASS = [sys.executable, "-m", "bypass"]
TIMEOUT = 60
NOBODY = 65534
POLICY = f"""
version: 1
interface: {SERVER_IFNAME}
backend: {{kind: afxdp, mode: copy, ring_size: 256}}
flows:
  - name: web
    match: {{proto: tcp, local: {SERVER_IP}, local_port: 8080}}
    action: steer
    allow: {{user: {NOBODY}}}
  - name: keep
    match: {{proto: tcp, local: {SERVER_IP}, local_port: 8081}}
    action: pass
"""


def bypass(*args: str, **options: object) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("BYPASS_S")}
    return subprocess.run(
        [*BYPASS, *args],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=environ,
        **options,  # type: ignore[call-overload]
    )


def good(*args: str) -> str:
    done = bypass(*args)
    assert (done.returncode, done.stderr) == (0, ""), done
    return str(done.stdout)


def xdp_attached() -> bool:
    return libbpf.xdp_attached(socket.if_nametoindex(SERVER_IFNAME)) is not None


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def policy(lab: Lab, tmp_path: Path) -> Iterator[Path]:
    """A policy; the test's thread is in the server's namespace, in which no process is left afterwards."""
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    with netns.entered(lab.server_ns):
        yield path
        wait_until(lambda: not xdp_attached())
    wait_until(lambda: not netns.processes(lab.server_ns))


@pytest.fixture
def folder() -> Iterator[Path]:
    """That every user may enter, as /run."""
    with tempfile.TemporaryDirectory(prefix="bypass-test-") as path:
        os.chmod(path, 0o755)
        yield Path(path)


@pytest.fixture
def broker(policy: Path, folder: Path) -> Iterator[str]:
    """A broker in the background; its socket."""
    name = str(folder / "broker.sock")
    said = good("up", "-c", str(policy), "--socket", name)
    found = re.fullmatch(rf"broker (\d+) serves {SERVER_IFNAME} by {policy} at {name}\n", said)
    assert found
    pid = int(found[1])
    try:
        yield name
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not os.path.exists(name))


pytestmark = pytest.mark.netns


def test_up_and_down_leave_nothing(broker: str) -> None:
    assert xdp_attached()
    assert good("ps", "--socket", broker) == "No application\n"
    assert good("down", "--socket", broker) == "the broker has ended; nothing was in use\n"
    assert not os.path.exists(broker)
    assert not xdp_attached()
    done = bypass("down", "--socket", broker)
    assert done.returncode == 2
    assert "no broker runs at" in done.stderr


def test_what_cannot_be_started_says_why_and_leaves_nothing(
    policy: Path, broker: str, tmp_path: Path
) -> None:
    other = str(tmp_path / "other.sock")
    again = bypass("up", "-c", str(policy), "--socket", broker)
    assert (again.returncode, "a broker runs already" in again.stderr) == (2, True)
    second = bypass("up", "-c", str(policy), "--socket", other)
    assert second.returncode == 2
    assert "has an XDP program already" in second.stderr
    policy.write_text(POLICY.replace(SERVER_IFNAME, "nonexistent"))
    missing = bypass("up", "-c", str(policy), "--socket", other)
    assert (missing.returncode, "nonexistent" in missing.stderr) == (2, True)
    policy.write_text(POLICY.replace("8080", "80800"))
    wrong = bypass("up", "-c", str(policy), "--socket", other)
    assert (wrong.returncode, "80800 is not a port" in wrong.stderr) == (2, True)
    assert not os.path.exists(other)
    assert "Traceback" not in again.stderr + second.stderr + missing.stderr + wrong.stderr


def test_a_broker_waits_for_one_that_ends_and_not_for_a_foreign_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries: list[bool] = []

    def site_after(times: int, ours: bool) -> LoopSite:
        tries.append(ours)
        if len(tries) <= times:
            raise ForeignProgramError("has an XDP program already", ours)
        return LoopSite()

    site_when_free(lambda: site_after(3, True)).close()
    assert len(tries) == 4
    tries.clear()
    with pytest.raises(ForeignProgramError):
        site_when_free(lambda: site_after(3, False))
    assert len(tries) == 1
    tries.clear()
    monkeypatch.setattr(private, "FREE_S", 0.2)
    with pytest.raises(ForeignProgramError):
        site_when_free(lambda: site_after(1000, True))
    assert len(tries) > 1


def test_a_broker_that_is_started_while_the_one_before_ends_comes_up(
    broker: str, policy: Path, folder: Path
) -> None:
    name = str(folder / "next.sock")
    up = subprocess.Popen(
        [*BYPASS, "up", "-c", str(policy), "--socket", name], stdout=subprocess.PIPE, text=True
    )
    try:
        wait_until(lambda: os.path.exists(name))  # it listens: the interface is next, which is not free
        good("down", "--socket", broker)
        said, _ = up.communicate(timeout=20)
        assert (up.returncode, "serves" in said) == (0, True)
    finally:
        up.kill()
        bypass("down", "--socket", name)


def test_a_broker_that_ends_instead_of_answering_is_one_line(tmp_path: Path) -> None:
    name = str(tmp_path / "ends.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(name)
        listener.listen()
        asked = subprocess.Popen([*BYPASS, "ps", "--socket", name], stderr=subprocess.PIPE, text=True)
        ended, _ = listener.accept()
        select.select([ended], [], [], 20)
        ended.close()  # with the question unread: it sees a reset
        _, said = asked.communicate(timeout=20)
    assert (asked.returncode, said) == (2, f"bypass: the broker at {name} has ended\n")


def test_ps_shows_who_has_what_and_users_their_own_only(broker: str, lab: Lab) -> None:
    with Child(broker, NOBODY, lab.server_ns) as child:
        child.do("hello")
        child.do("listen", host=SERVER_IP, port=8080)
        (app,) = json.loads(good("ps", "--json", "--socket", broker))
        assert app["pids"] == [child.process.pid]
        assert (app["name"], app["uid"], app["mode"], app["interface"]) == (
            "child",
            NOBODY,
            "direct",
            SERVER_IFNAME,
        )
        assert app["queues"] == [0, 1]
        assert app["leases"] == [{"lease": 1, "proto": "tcp", "local": f"{SERVER_IP}:8080", "remote": None}]
        assert app["memory"] > 1 << 20
        assert 0 <= app["cpu"] < 1
        text = good("ps", "--socket", broker)
        assert f"tcp {SERVER_IP}:8080" in text
        for user, count in ((NOBODY, 1), (NOBODY - 1, 0)):
            done = bypass("ps", "--json", "--socket", broker, user=user, group=user, cwd=ROOT)
            assert done.returncode == 0, done.stderr
            assert len(json.loads(done.stdout)) == count
        for command in ("down", "reload"):
            done = bypass(command, "--socket", broker, user=NOBODY, group=NOBODY, cwd=ROOT)
            assert done.returncode == 2
            assert "only root" in done.stderr
    wait_until(lambda: good("ps", "--socket", broker) == "No application\n")


def test_explain_names_rule_application_and_queue(broker: str, lab: Lab) -> None:
    flow = f"tcp {CLIENT_IP}:4000 > {SERVER_IP}:"
    text = good("explain", SERVER_IFNAME, flow + "8080", "--socket", broker)
    assert "web (" in text
    assert "none has a socket for it" in text
    with Child(broker, NOBODY, lab.server_ns) as child:
        child.do("hello")
        child.do("listen", host=SERVER_IP, port=8080)
        text = good("explain", "--socket", broker, SERVER_IFNAME, flow + "8080")
        assert f"live         tcp {SERVER_IP}:8080" in text
        assert f"process {child.process.pid}" in text
        assert "queue        one of 0 1: a veth has no hash" in text
        assert "socket       the application's own on each of them, all steered alike" in text
    assert "pass" in good("explain", "--socket", broker, SERVER_IFNAME, flow + "8081")
    assert "none: the kernel has it" in good("explain", "--socket", broker, SERVER_IFNAME, flow + "22")
    for args in ((SERVER_IFNAME, "tcp nonsense"), ("eth7", flow + "22"), (SERVER_IFNAME, flow + "99999")):
        done = bypass("explain", "--socket", broker, *args)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


def test_reload_grants_anew_and_takes_what_is_granted_no_more(broker: str, policy: Path, lab: Lab) -> None:
    client = Client(broker)
    with client, socket.socket() as kept, socket.socket() as lost:
        client.hello()
        lost.bind((SERVER_IP, 8080))
        lease = client.lease(lost, STREAM, (SERVER_IP, 8080)).lease
        client.told.clear()
        policy.write_text(POLICY.replace("8080", "9090"))
        assert (
            good("reload", "--socket", broker)
            == f"{policy}: 2 rules in force; 1 leases are granted no more\n"
        )
        assert client.wait_for(Kind.REVOKED).lease == lease
        assert client.wait_for(Kind.GRANT).local[1] == 9090
        kept.bind((SERVER_IP, 9090))
        second = client.lease(kept, STREAM, (SERVER_IP, 9090)).lease
        for text, message in (
            (POLICY.replace("8080", "0"), "0 is not a port"),
            (POLICY.replace("ring_size: 256", "ring_size: 512"), "backend is not what it was"),
            (POLICY.replace(SERVER_IFNAME, "eth7"), "interface is not what it was"),
            (POLICY.replace(f"user: {NOBODY}", "user: no-such-user"), "there is no user no-such-user"),
        ):
            policy.write_text(text)
            done = bypass("reload", "--socket", broker)
            assert (done.returncode, message in done.stderr) == (2, True), done.stderr
        assert client.good(Message(Kind.RELEASE, lease=second)).lease == second, "nothing of that was applied"
        assert client.header().spin_us == 0
        policy.write_text(POLICY + "stack: {spin_us: 30, batch: 64}\n")
        good("reload", "--socket", broker)
        header = client.header()
        assert (header.spin_us, header.batch) == (30, 64), "the running program's memory says so"


ACCEPTS = f"""
import selectors, socket, sys
s = socket.create_server(("{SERVER_IP}", 8080))
chosen = selectors.DefaultSelector()
if sys.argv[1] == "epoll":
    s.setblocking(False)
    chosen.register(s, selectors.EVENT_READ)
print("ready", flush=True)
while True:
    if sys.argv[1] == "epoll":
        chosen.select()
    c, _ = s.accept()
    c.sendall(b"hello")
    c.close()
"""


KEEPS = f"""
import socket
s = socket.create_server(("{SERVER_IP}", 8080))
print("ready", flush=True)
c, _ = s.accept()
c.sendall(b"hello")
try:
    print("got", c.recv(10), flush=True)
except ConnectionResetError:
    print("reset", flush=True)
"""


def test_connections_of_a_listener_that_is_granted_no_more_are_reset(
    broker: str, policy: Path, lab: Lab
) -> None:
    run = [*BYPASS, "run", "--socket", broker, "--user", "nobody", "--", "/usr/bin/python3", "-c", KEEPS]
    with subprocess.Popen(run, stdout=subprocess.PIPE, text=True) as program:
        try:
            assert program.stdout is not None
            assert program.stdout.readline() == "ready\n"
            with netns.entered(lab.client_ns), socket.create_connection((SERVER_IP, 8080), 10) as c:
                assert c.recv(10) == b"hello"
                policy.write_text(POLICY.replace("8080", "9090"))
                good("reload", "--socket", broker)
                assert select.select([program.stdout], [], [], TIMEOUT)[0], "it waits for what never comes"
                assert program.stdout.readline() == "reset\n"
        finally:
            program.kill()


@pytest.mark.parametrize("how", ["blocking", "epoll"])
def test_a_listener_that_is_granted_no_more_goes_on_by_the_kernel(
    how: str, broker: str, policy: Path, lab: Lab
) -> None:
    def greeted() -> int:
        """Connections that the kernel took for one of the client's."""
        before = passive_opens()
        with netns.entered(lab.client_ns), socket.create_connection((SERVER_IP, 8080), 10) as c:
            assert c.recv(10) == b"hello"
        return passive_opens() - before

    run = [
        *BYPASS,
        "run",
        "--socket",
        broker,
        "--user",
        "nobody",
        "--",
        "/usr/bin/python3",
        "-c",
        ACCEPTS,
        how,
    ]
    program = subprocess.Popen(run, stdout=subprocess.PIPE, text=True)
    try:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        assert greeted() == 0
        policy.write_text(POLICY.replace("8080", "8088"))
        assert "1 leases are granted no more" in good("reload", "--socket", broker)
        wait_until(lambda: greeted() == 1)
        assert [greeted() for _ in range(3)] == [1, 1, 1]
        assert program.poll() is None
    finally:
        program.kill()
        program.communicate()


def passive_opens() -> int:
    names, values = (
        line.split()
        for line in Path("/proc/thread-self/net/snmp").read_text().splitlines()
        if line.startswith("Tcp:")
    )
    return int(values[names.index("PassiveOpens")])


def test_down_tells_what_dies(broker: str, lab: Lab) -> None:
    with Client(broker) as client, socket.socket() as sock:
        client.hello()
        sock.bind((SERVER_IP, 8080))
        client.lease(sock, STREAM, (SERVER_IP, 8080))
        said = good("down", "--socket", broker)
        assert said == "the broker has ended; 1 lease of 1 application died\n"
        assert client.wait_for(Kind.DRAIN).flags == 1
        with pytest.raises(EOFError):
            client.read()


def test_a_broker_that_drains_grants_nothing_and_ends_with_the_last_lease(broker: str, lab: Lab) -> None:
    """As it does when `bypass down --drain` is interrupted."""
    with Client(broker) as client, socket.socket() as sock, socket.socket() as late:
        client.hello()
        sock.bind((SERVER_IP, 8080))
        lease = client.lease(sock, STREAM, (SERVER_IP, 8080)).lease
        asking = Asking(broker)
        answers = asking.ask({"do": "down", "drain": True})
        assert next(answers) == {"apps": 1, "leases": 1}
        assert client.wait_for(Kind.DRAIN).flags == 0
        answer, _ = client.ask(Message(Kind.LEASE, kind=STREAM, local=(SERVER_IP, 8080)), (late.fileno(),))
        assert answer.error
        client.good(Message(Kind.RELEASE, lease=lease))
        assert next(answers) == {"apps": 1, "leases": 0, "end": True}
        asking.wait_for_end()
        asking.close()


def test_down_does_not_wait_for_who_only_listens(broker: str, lab: Lab) -> None:
    with Client(broker) as client, socket.socket() as sock:
        client.hello()
        sock.bind((SERVER_IP, 8080))
        client.lease(sock, STREAM, (SERVER_IP, 8080))
        said = good("down", "--drain", "--socket", broker)
        assert said == "the broker has ended; 1 lease of 1 application went to the kernel\n"
        assert client.wait_for(Kind.DRAIN).flags == 0


def with_socket(sock: socket.socket) -> list[str]:
    """A command that runs another one as systemd would, with a socket as descriptor 3."""
    code = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); "
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1'); os.execv(sys.argv[2], sys.argv[2:])"
    )
    return [sys.executable, "-c", code, str(sock.fileno())]


def test_a_shared_interface_is_one_command_away(policy: Path, folder: Path, lab: Lab) -> None:
    policy.write_text(POLICY.replace("version: 1", "version: 1\nmode: shared"))
    name = str(folder / "broker.sock")
    good("up", "-c", str(policy), "--socket", name)
    try:
        with Child(name, NOBODY, lab.server_ns) as one, Child(name, NOBODY, lab.server_ns) as two:
            assert [child.do("hello")["app"] for child in (one, two)] == [1, 2]
            apps = json.loads(good("ps", "--json", "--socket", name))
            assert [(a["app"], a["mode"]) for a in apps] == [(1, "shared"), (2, "shared")]
            assert "no application" not in good("stats", SERVER_IFNAME)
    finally:
        assert "the broker has ended" in good("down", "--socket", name)


@pytest.mark.parametrize("mode", ["direct", "shared"])
def test_a_killed_broker_disturbs_nobody(mode: str, policy: Path, folder: Path, lab: Lab) -> None:
    policy.write_text(POLICY.replace("version: 1", f"version: 1\nmode: {mode}"))
    name = str(folder / "broker.sock")
    pid = int(good("up", "-c", str(policy), "--socket", name).split()[1])
    with Child(name, NOBODY, lab.server_ns) as app:
        app.do("hello")
        app.tell("serve", host=SERVER_IP, port=8080, connections=3)
        assert app.line() == {"serving": [SERVER_IP, 8080]}
        for n in range(3):
            with netns.entered(lab.client_ns):
                client = socket.create_connection((SERVER_IP, 8080), WAIT_S)
            with client:
                client.sendall(b"before")
                assert client.recv(6, socket.MSG_WAITALL) == b"before"
                if n == 0:
                    os.kill(pid, signal.SIGKILL)
                    wait_until(lambda: pid not in others(lab))
                client.sendall(b"after")
                assert client.recv(5, socket.MSG_WAITALL) == b"after"
        assert app.line() == {"bytes": 33}
        assert xdp_attached()
        app.kill()
    wait_until(lambda: not xdp_attached())
    wait_until(lambda: not others(lab))
    good("up", "-c", str(policy), "--socket", name)
    good("down", "--socket", name)


@pytest.mark.parametrize("mode", ["direct", "shared"])
def test_a_killed_bypass_fwd_leaves_all_to_the_kernel(
    mode: str, policy: Path, folder: Path, lab: Lab
) -> None:
    policy.write_text(POLICY.replace("version: 1", f"version: 1\nmode: {mode}"))
    name = str(folder / "broker.sock")
    good("up", "-c", str(policy), "--socket", name)
    with Child(name, NOBODY, lab.server_ns) as app:
        app.do("hello")
        app.do("listen", host=SERVER_IP, port=8080)
        (fwd,) = (pid for pid, comm in others(lab).items() if comm == "bypass-fwd")
        os.kill(fwd, signal.SIGKILL)
        wait_until(lambda: not xdp_attached())
        wait_until(lambda: not os.path.exists(name))
        wait_until(lambda: list(others(lab)) == [app.process.pid])
        with netns.entered(lab.client_ns):
            socket.create_connection((SERVER_IP, 8080), WAIT_S).close()  # its kernel socket listens still


def others(lab: Lab) -> dict[int, str]:
    """Processes in the server's namespace, beside this one."""
    return {pid: name for pid, name in netns.processes(lab.server_ns).items() if pid != os.getpid()}


def test_counters_are_there_while_the_broker_runs(broker: str, lab: Lab) -> None:
    assert "web" in good("flows", SERVER_IFNAME)
    assert "no application has the interface" in good("stats", SERVER_IFNAME)
    with Child(broker, NOBODY, lab.server_ns) as child:
        child.do("hello")
        child.do("listen", host=SERVER_IP, port=8080)
        assert SERVER_IP in good("flows", SERVER_IFNAME)
        (answer,) = json.loads(good("stats", "--json", SERVER_IFNAME))["processes"]
        assert set(answer["rings"]) == {"0", "1"}
        assert "rx_dropped" in answer["rings"]["0"]


# ---- systemd -------------------------------------------------------------------------------------------------------


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(ROOT / "config" / "systemd" / name)
    return parser


def test_the_units_fit_the_command_and_each_other() -> None:
    service, sock = unit("bypass.service"), unit("bypass.socket")
    assert service["Unit"]["Requires"] == "bypass.socket"
    assert service["Service"]["Type"] == "notify-reload"
    assert sock["Socket"]["ListenSequentialPacket"] == "/run/bypass/broker.sock"
    assert sock["Socket"]["SocketMode"] == "0666"
    argv = shlex.split(service["Service"]["ExecStart"])
    assert argv[1:] == ["up", "--foreground", "-c", "/etc/bypass/policy.yaml"]


def test_systemd_passes_the_socket_and_is_told_every_state(policy: Path, tmp_path: Path) -> None:
    path, notify_path = str(tmp_path / "s.sock"), str(tmp_path / "notify.sock")
    argv = [*shlex.split(unit("bypass.service")["Service"]["ExecStart"])[1:-1], str(policy)]
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified,
    ):
        listening.bind(path)
        listening.listen(8)
        notified.bind(notify_path)
        early = Client(path)  # waits in the queue until the broker is there
        environ = {**os.environ, "NOTIFY_SOCKET": notify_path}
        command = [*with_socket(listening), *BYPASS, *argv]
        process = subprocess.Popen(command, pass_fds=(listening.fileno(),), env=environ)

        def state() -> list[str]:
            assert select.select([notified], [], [], TIMEOUT)[0]
            return notified.recv(1000).decode().split("\n")

        with process, early:
            try:
                assert state() == ["READY=1", f"STATUS=serves {SERVER_IFNAME}"]
                early.hello()
                process.send_signal(signal.SIGHUP)
                reloading = state()
                assert reloading[0] == "RELOADING=1"
                assert reloading[1].startswith("MONOTONIC_USEC=")
                assert state() == ["READY=1"]
                assert ask(path, {"do": "ps"})[-1] == {"end": True}
                process.send_signal(signal.SIGTERM)
                assert state() == ["STOPPING=1"]
                assert process.wait(TIMEOUT) == 0
            finally:
                process.kill()
        assert os.path.exists(path), "the socket is systemd's"


def test_a_socket_of_another_type_is_refused(policy: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(tmp_path / "s.sock"))
        listening.listen(8)
        argv = [*with_socket(listening), *BYPASS, "up", "--foreground", "-c", str(policy)]
        passed = (listening.fileno(),)
        done = subprocess.run(argv, pass_fds=passed, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 2
    assert "ListenSequentialPacket" in done.stderr
