# SPDX-License-Identifier: Apache-2.0
"""The lab: made whole or not at all, the same when asked for twice, and removed with everything in it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import lab_name

from bypass import netns, probe
from bypass.cli import cli, main
from bypass.errors import LabError
from bypass.lab import CLIENT_IFNAME, SERVER_IFNAME, WIRE_IFNAME, Lab, dpdk_policy, labs, wait_for
from bypass.policy import load_policy, parse_policy

CONFIG = Path(__file__).parent.parent / "config"


@pytest.mark.netns
@pytest.mark.parametrize("lab", [{"queues": 3, "mtu": 1400}], indirect=True)
def test_the_sides_are_what_was_asked_for(lab: Lab) -> None:
    sides = lab.sides()
    assert sides is not None
    server, client = sides
    assert (server.interface, server.address) == (SERVER_IFNAME, "192.0.2.10")
    assert (client.interface, client.address) == (CLIENT_IFNAME, "192.0.2.20")
    assert {(s.queues, s.mtu) for s in sides} == {(3, 1400)}


@pytest.mark.netns
@pytest.mark.parametrize("lab", [{"wire": True}], indirect=True)
def test_a_port_for_dpdk_has_no_addresses(lab: Lab) -> None:
    sides = lab.sides()
    assert sides is not None
    assert (sides[0].interface, sides[0].address) == (WIRE_IFNAME, "")
    assert sides[1].address == "192.0.2.20"
    assert lab.up() is False
    with pytest.raises(
        LabError, match="is up, and its interface is a port for DPDK: take the lab down first"
    ):
        Lab(lab.name).up()
    addresses = lab.command("server", ["ip", "-o", "address", "show", "dev", WIRE_IFNAME])
    assert subprocess.run(addresses, capture_output=True, check=True).stdout == b""


def test_a_policy_for_the_lab_becomes_one_for_its_port() -> None:
    web = CONFIG / "web.yaml"
    policy, dpdk = load_policy(web), parse_policy(dpdk_policy(web.read_text()))
    assert [r.match_text() for r in dpdk.flows] == [r.match_text() for r in policy.flows]
    assert dpdk.interface == policy.interface == "bypass0"
    assert dpdk.backend == load_policy(CONFIG / "dpdk.yaml").backend
    direct = web.read_text().replace("version: 1", "version: 1\nmode: direct")
    assert parse_policy(dpdk_policy(direct)).mode == "shared"


@pytest.mark.netns
@pytest.mark.parametrize("source", ["192.0.2.20", "198.51.100.1", "198.51.100.77"])
def test_the_server_answers_every_address_of_the_client(lab: Lab, source: str) -> None:
    ping = lab.command("client", ["ping", "-c", "1", "-W", "2", "-I", source, "192.0.2.10"])
    done = subprocess.run(ping, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.netns
@pytest.mark.parametrize("side", ["server", "client"])
def test_no_side_leaves_checksums_or_tags_to_the_device(lab: Lab, side: str) -> None:
    ifname = {"server": SERVER_IFNAME, "client": CLIENT_IFNAME}[side]
    ns = {"server": lab.server_ns, "client": lab.client_ns}[side]
    features = netns.run(ns, read_features, ifname)
    assert features["tx-checksum-ip-generic"] is False
    assert features["tx-vlan-hw-insert"] is False
    assert features["tx-tcp-segmentation"] is False  # goes with the checksum


def read_features(ifname: str) -> dict[str, bool]:
    from pyroute2.ethtool.ioctl import IoctlEthtool

    ethtool = IoctlEthtool(ifname)
    try:
        features = ethtool.get_features()
        return {name: bool(features.is_active(name)) for name in features.keys()}  # noqa: SIM118
    finally:
        ethtool.close()


@pytest.mark.netns
def test_a_command_sees_its_own_interfaces_and_a_bpf_file_system(lab: Lab) -> None:
    script = "ls /sys/class/net; mountpoint /sys/fs/bpf; exit 7"
    done = subprocess.run(
        lab.command("server", ["sh", "-c", script]), capture_output=True, text=True, check=False
    )
    assert done.returncode == 7, done.stderr
    assert done.stdout.split()[:2] == [SERVER_IFNAME, "lo"]
    assert "/sys/fs/bpf is a mountpoint" in done.stdout


@pytest.mark.netns
def test_up_twice_changes_nothing_and_up_otherwise_is_refused(lab: Lab) -> None:
    before = lab.describe()
    assert lab.up() is False
    assert lab.describe() == before
    with pytest.raises(
        LabError, match=r"up with 2 queues and MTU 1500, not 4 and 1500.*bypass lab down --name"
    ):
        Lab(lab.name, queues=4).up()
    assert lab.describe() == before


@pytest.mark.netns
def test_down_ends_what_runs_inside_also_what_ignores_sigterm() -> None:
    it = Lab(lab_name())
    it.up()
    polite = subprocess.Popen(it.command("server", ["sleep", "1000"]))
    stubborn = subprocess.Popen(
        it.command("client", ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1000; done"]),
        stdout=subprocess.PIPE,
    )
    try:
        assert stubborn.stdout is not None
        assert stubborn.stdout.readline() == b"ready\n"
        wait_for(lambda: polite.pid in netns.processes(it.server_ns), 5, "the command to be inside")
    finally:
        ended = it.down()
    assert {polite.pid, stubborn.pid} <= set(ended)
    assert polite.wait(5) < 0
    assert stubborn.wait(5) < 0
    stubborn.stdout.close()
    assert not netns.exists(it.server_ns)
    assert not netns.exists(it.client_ns)
    assert it.down() == {}


@pytest.mark.netns
def test_a_half_built_lab_is_built_anew() -> None:
    it = Lab(lab_name())
    netns.create(it.client_ns)  # as an interrupted `up` leaves it
    try:
        assert it.sides() is None
        assert it.name in [each.name for each in labs()]
        assert it.up() is True
        assert it.sides() is not None
    finally:
        it.down()


@pytest.mark.netns
def test_a_lab_that_fails_half_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError("no such luck")

    monkeypatch.setattr("bypass.lab._quieten", broken)
    it = Lab(lab_name())
    with pytest.raises(OSError, match="no such luck"):
        it.up()
    assert not any(netns.exists(ns) for ns in it.namespaces)


@pytest.mark.netns
def test_only_the_calling_thread_enters_and_it_comes_back(lab: Lab) -> None:
    home = os.stat("/proc/self/ns/net").st_ino
    with netns.entered(lab.server_ns):
        assert os.stat("/proc/thread-self/ns/net").st_ino == (netns.RUN_DIR / lab.server_ns).stat().st_ino
        assert os.stat("/proc/self/ns/net").st_ino in (home, (netns.RUN_DIR / lab.server_ns).stat().st_ino)
    assert os.stat("/proc/thread-self/ns/net").st_ino == home
    with pytest.raises(ZeroDivisionError):
        netns.run(lab.server_ns, lambda: 1 // 0)
    assert os.stat("/proc/thread-self/ns/net").st_ino == home


@pytest.mark.netns
def test_the_command_line_makes_uses_and_removes_a_lab() -> None:
    name = lab_name()
    runner = CliRunner()
    try:
        made = runner.invoke(cli, ["lab", "up", "--name", name, "--json"])
        assert made.exit_code == 0, made.output
        about = json.loads(made.stdout)
        assert about["made"] is True
        assert about["server"]["namespace"] == f"bypass-{name}-server"
        again = runner.invoke(cli, ["lab", "up", "--name", name])
        assert "was up already" in again.stdout
        assert f"bypass-{name}-client" in again.stdout
        assert main(["lab", "exec", "--name", name, "client", "--", "sh", "-c", "exit 3"]) == 3
    finally:
        gone = runner.invoke(cli, ["lab", "down", "--name", name, "--json"])
    assert json.loads(gone.stdout)["removed"] == [f"bypass-{name}-server", f"bypass-{name}-client"]
    assert "nothing to remove" in runner.invoke(cli, ["lab", "down", "--name", name]).stdout


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "a b"}, r"lab name 'a b'"),
        ({"name": "x" * 49}, "at most 48"),
        ({"queues": 0}, "1 to 64"),
        ({"queues": 65}, "1 to 64"),
        ({"mtu": 67}, "68 to 65535"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(LabError, match=message):
        Lab(**kwargs)  # type: ignore[arg-type]


def test_a_lab_that_is_not_there_is_an_error_that_says_how_to_make_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["lab", "exec", "--name", f"{os.getpid()}-none", "server", "true"]) == 2
    assert f"bypass lab up --name {os.getpid()}-none" in capsys.readouterr().err


def test_without_root_the_lab_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert main(["lab", "up"]) == 2
    assert "needs root" in capsys.readouterr().err
    assert probe.missing_for_xdp() == ["root"]
