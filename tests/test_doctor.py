# SPDX-License-Identifier: Apache-2.0
"""The doctor says what is there, what hurts, what mends it, and which AF_XDP mode it would take and why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import lab_name

from bypass import doctor, netns, nic, probe
from bypass.cli import cli, main
from bypass.errors import DeviceError
from bypass.lab import Lab

NATIVE = nic.XDP_BASIC | nic.XDP_REDIRECT
PLAIN = nic.Nic(
    name="eth1",
    index=7,
    kind="device",
    driver="ice",
    mac="02:00:00:00:00:07",
    mtu=1500,
    state="up",
    rx_queues=4,
    tx_queues=4,
    max_queues=8,
    features={"rx-lro": nic.Feature(False, True), "rx-vlan-hw-parse": nic.Feature(False, True)},
    xdp_features=NATIVE | nic.XDP_ZEROCOPY,
    program=None,
    default_route=False,
    login="",
    rps=("0", "0"),
)


def found(checks: Iterator[doctor.Check], name: str) -> doctor.Check:
    return next(c for c in checks if c.name == name)


# ---- The choice of the mode --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("facts", "mode", "reason"),
    [
        (PLAIN, "zerocopy", "the driver (ice) offers it"),
        (replace(PLAIN, default_route=True), "copy", "carries the default route"),
        (replace(PLAIN, login="192.0.2.9"), "copy", "login from 192.0.2.9"),
        (replace(PLAIN, xdp_features=NATIVE), "copy", "offers no zero-copy"),
        (replace(PLAIN, xdp_features=None), "copy", "before 6.3"),
        (replace(PLAIN, xdp_features=0), "skb", "no native XDP"),
        (replace(PLAIN, xdp_features=0, default_route=True), "skb", "no native XDP"),
    ],
)
def test_auto_prefers_safety_then_what_the_driver_offers(facts: nic.Nic, mode: str, reason: str) -> None:
    chosen, why = doctor.choose(facts, "auto")
    assert chosen == mode
    assert reason in why


@pytest.mark.parametrize("mode", ["zerocopy", "copy", "skb"])
def test_a_mode_asked_for_by_name_is_not_second_guessed(mode: str) -> None:
    assert doctor.choose(replace(PLAIN, default_route=True), mode) == (mode, "as asked for")


def test_an_unknown_mode_or_interface_is_an_error_that_lists_the_right_ones() -> None:
    with pytest.raises(DeviceError, match="mode 'fast': it is one of auto, zerocopy, copy, skb"):
        doctor.choose_mode("lo", "fast")
    with pytest.raises(DeviceError, match=r"no interface 'nope' here; there are: .*lo"):
        doctor.choose_mode("nope", "auto")
    with pytest.raises(DeviceError, match="no interface"):
        doctor.choose_mode("x" * 40, "auto")


# ---- Judgement from facts ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("version", "verdict", "lacks"),
    [
        ((6, 18), "ok", ""),
        ((6, 6), "ok", ""),
        ((6, 5), "fail", "tcx"),
        ((5, 9), "fail", "one packet memory"),
        ((4, 19), "fail", "need_wakeup"),
    ],
)
def test_a_kernel_is_judged_by_what_it_lacks(version: tuple[int, int], verdict: str, lacks: str) -> None:
    check = doctor.check_kernel(version)
    assert check.verdict == verdict
    assert lacks in check.found
    assert bool(check.fix) == (verdict != "ok")


def test_missing_capabilities_are_named_with_their_purpose() -> None:
    check = doctor.check_capabilities(frozenset({"CAP_NET_ADMIN", "CAP_SYS_ADMIN"}))
    assert check.verdict == "fail"
    assert "CAP_NET_RAW (to open AF_XDP sockets)" in check.found
    assert "CAP_BPF" not in check.found  # CAP_SYS_ADMIN includes it
    assert (
        doctor.check_capabilities(
            frozenset({"CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_BPF", "CAP_PERFMON"})
        ).verdict
        == "ok"
    )


def test_the_memlock_limit_counts_only_without_the_capability() -> None:
    assert doctor.check_memlock(8 << 20, frozenset()).verdict == "warn"
    assert doctor.check_memlock(8 << 20, frozenset()).fix == "ulimit -l 65536"
    assert doctor.check_memlock(8 << 20, frozenset({"CAP_IPC_LOCK"})).verdict == "ok"
    assert doctor.check_memlock(64 << 20, frozenset()).verdict == "ok"
    assert doctor.check_memlock(-1, frozenset()).found == "unlimited"


def test_few_descriptors_and_an_interpreter_are_warned_of() -> None:
    assert doctor.check_files(256, 4096) == doctor.Check(
        "machine", "open files", "warn", "256: few for a server", "ulimit -n 4096"
    )
    assert doctor.check_files(1024, 1024).verdict == "ok"
    assert doctor.check_jit(False).fix == "sysctl -w net.core.bpf_jit_enable=1"
    assert [doctor.check_jit(j).verdict for j in (True, None)] == ["ok", "warn"]


@pytest.mark.parametrize(
    ("feature", "verdict", "fix"),
    [
        ("rx-lro", "fail", "ethtool -K eth1 lro off"),
        ("rx-gro-hw", "fail", "ethtool -K eth1 rx-gro-hw off"),
        ("rx-vlan-hw-parse", "warn", "ethtool -K eth1 rxvlan off"),
    ],
)
def test_an_offload_that_hurts_comes_with_the_command_that_ends_it(
    feature: str, verdict: str, fix: str
) -> None:
    on = replace(PLAIN, features={feature: nic.Feature(True, True)})
    (check,) = doctor.check_offloads(on)
    assert (check.verdict, check.fix) == (verdict, fix)
    (check,) = doctor.check_offloads(replace(PLAIN, features={feature: nic.Feature(True, False)}))
    assert check.verdict == "warn"
    assert "ethtool" not in check.fix
    (check,) = doctor.check_offloads(PLAIN)
    assert check.verdict == "ok"


def test_a_foreign_program_fails_and_says_whose_it_is() -> None:
    foreign = nic.XdpProgram(12, "xdp_dispatcher", "native", {4711: "xdp-loader"})
    check = doctor.check_program(replace(PLAIN, program=foreign))
    assert check.verdict == "fail"
    assert "xdp_dispatcher (program 12, native), held by xdp-loader (4711)" in check.found
    assert "ip link set dev eth1 xdp off" in check.fix
    ours = nic.XdpProgram(13, "bypass_steer", "native", {4712: "python"})
    assert doctor.check_program(replace(PLAIN, program=ours)).verdict == "ok"


def test_the_rest_of_an_interface_is_judged_too() -> None:
    assert (
        found(doctor.check_interface(replace(PLAIN, state="down")), "link").fix == "ip link set dev eth1 up"
    )
    assert found(doctor.check_interface(replace(PLAIN, mtu=9000)), "MTU").verdict == "warn"
    assert found(doctor.check_interface(replace(PLAIN, mtu=65536, xdp_features=0)), "MTU").verdict == "ok"
    assert found(doctor.check_interface(replace(PLAIN, xdp_features=0)), "driver").verdict == "warn"
    assert found(doctor.check_interface(replace(PLAIN, login="192.0.2.9")), "login").verdict == "warn"
    assert found(doctor.check_interface(PLAIN), "queues").found == "4 of 8 receive, 4 transmit"
    assert "before it" in found(doctor.check_interface(replace(PLAIN, rps=("ff,00000003",))), "RPS").found
    assert found(doctor.check_interface(replace(PLAIN, rps=("00,00000000",))), "RPS").found == "off"
    unseen = found(doctor.check_interface(replace(PLAIN, kind="veth", peer=None)), "veth peer")
    assert unseen.verdict == "warn"


def test_mitigations_that_cost_are_named_with_what_ends_them() -> None:
    """As kernels write them (drivers/base/cpu.c, arch/x86/kernel/cpu/bugs.c)."""
    told = {
        "retbleed": "Mitigation: untrained return thunk; SMT enabled with STIBP protection",
        "meltdown": "Mitigation: PTI",
        "mds": "Mitigation: Clear CPU buffers; SMT vulnerable",
        "spectre_v2": "Mitigation: Retpolines; STIBP: disabled",
        "spec_rstack_overflow": "Vulnerable: Safe RET, no microcode",
        "l1tf": "Not affected",
    }
    check = doctor.check_mitigations(told)
    assert check.verdict == "warn"
    assert "retbleed untrains the predictor of returns (Mitigation: untrained return thunk" in check.found
    assert check.fix.endswith("run: retbleed=off nopti mds=off on the kernel's command line")
    for one in ("Mitigation: IBRS", "Mitigation: Stuffing"):
        assert doctor.check_mitigations({"retbleed": one}).fix.count("retbleed=off") == 1
    for none in ("Mitigation: Enhanced IBRS", "Not affected", "Vulnerable"):
        assert doctor.check_mitigations({"retbleed": none}).verdict == "ok"
    assert doctor.check_mitigations({}).verdict == "ok"


def test_strict_filtering_hurts_where_the_way_back_is_another(tmp_path: Path) -> None:
    def check(**change: Any) -> doctor.Check:
        return found(doctor.check_interface(replace(PLAIN, **change)), "rp_filter")

    bad = check(rp_filter=1, default_elsewhere="eth0")
    assert (bad.verdict, bad.fix) == ("warn", "sysctl -w net.ipv4.conf.eth1.rp_filter=2")
    assert "strict, and eth0 has a default route" in bad.found
    assert [check(rp_filter=r, default_elsewhere="eth0").found for r in (0, 2, None)] == [
        "off",
        "loose",
        "not visible",
    ]
    assert check(rp_filter=1).verdict == "ok"
    for name, value in (("all", "1"), ("eth1", "0"), ("eth2", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rp_filter").write_text(f"{value}\n")
    assert [nic._rp_filter(i, tmp_path) for i in ("eth1", "eth2", "eth3")] == [1, 2, None]


def test_network_manager_is_known_by_the_files_that_it_keeps(tmp_path: Path) -> None:
    folder = tmp_path / "NetworkManager/devices"
    folder.mkdir(parents=True)
    (folder / "7").write_text("[device]\nmanaged=true\nconnection-uuid=1\n")
    (folder / "8").write_text("[device]\nmanaged=false\n")
    assert [nic._manager(i, tmp_path) for i in (7, 8, 9)] == ["NetworkManager", "", ""]
    check = found(doctor.check_interface(replace(PLAIN, manager="NetworkManager")), "manager")
    assert (check.verdict, check.fix) == ("warn", "nmcli device set eth1 managed no")


def test_a_report_is_as_bad_as_its_worst_check() -> None:
    ok, warn, fail = (doctor.Check("machine", v, v, "") for v in ("ok", "warn", "fail"))  # type: ignore[arg-type]
    assert doctor.Report("", (ok,)).verdict == "ok"
    assert doctor.Report("", (ok, warn)).verdict == "warn"
    assert doctor.Report("", (fail, ok, warn)).verdict == "fail"


# ---- Facts from the kernel ---------------------------------------------------------------------------------------
@contextmanager
def changed(lab: Lab, side: str, *ethtool: str) -> Iterator[None]:
    subprocess.run(lab.command(side, ["ethtool", *ethtool]), check=True, capture_output=True)
    yield


def inspect(lab: Lab) -> nic.Nic:
    return netns.run(lab.server_ns, nic.read, "bypass0")


@pytest.mark.netns
def test_a_lab_is_as_it_should_be(lab: Lab) -> None:
    report = netns.run(lab.server_ns, doctor.diagnose, "bypass0")
    costly = doctor.check_mitigations(probe.vulnerabilities())  # of this machine's processor
    assert [c for c in report.checks if c.verdict != "ok" and c != costly] == []
    assert (report.mode, report.reason) == ("copy", "the driver (veth) offers no zero-copy")
    facts = inspect(lab)
    assert (facts.driver, facts.kind, facts.rx_queues, facts.max_queues) == ("veth", "veth", 2, 2)
    assert facts.peer is not None
    assert (facts.peer.name, facts.peer.namespace) == ("bypass1", lab.client_ns)


@pytest.mark.netns
@pytest.mark.parametrize(
    ("ethtool", "says", "mend"),
    [
        (["-K", "bypass1", "tx", "on"], "leaves TCP and UDP checksums", "ethtool -K bypass1 tx off"),
        (["-K", "bypass1", "txvlan", "on"], "keeps VLAN tags", "ethtool -K bypass1 txvlan off"),
    ],
)
def test_what_the_peer_of_a_veth_does_is_seen_and_mended(
    lab: Lab, ethtool: list[str], says: str, mend: str
) -> None:
    with changed(lab, "client", *ethtool):
        check = found(doctor.check_interface(inspect(lab)), "veth peer")
        assert check.verdict == "warn"
        assert says in check.found
        assert check.fix == f"ip netns exec {lab.client_ns} {mend}"
        subprocess.run(check.fix.split(), check=True, capture_output=True)
        assert found(doctor.check_interface(inspect(lab)), "veth peer").verdict == "ok"


@pytest.mark.netns
def test_more_sending_queues_than_receiving_ones_fail(lab: Lab) -> None:
    with changed(lab, "server", "-L", "bypass0", "rx", "1"):
        checks = [c for c in doctor.check_interface(inspect(lab)) if c.name == "veth peer"]
    (check,) = [c for c in checks if c.verdict == "fail"]
    assert check.fix == f"ip netns exec {lab.client_ns} ethtool -L bypass1 tx 1"


@pytest.mark.netns
def test_strict_filtering_is_found_and_mended(lab: Lab) -> None:
    script = "ip link add d0 type veth peer name d1; ip addr add 198.18.0.1/24 dev d0; ip link set d0 up; \
        sysctl -qw net.ipv4.conf.bypass0.rp_filter=1; ip route add default via 198.18.0.2"
    subprocess.run(lab.command("server", ["sh", "-ec", script]), check=True)
    check = found(doctor.check_interface(inspect(lab)), "rp_filter")
    assert (check.verdict, "d0 has a default route" in check.found) == ("warn", True)
    subprocess.run(lab.command("server", check.fix.split()), check=True, capture_output=True)
    assert found(doctor.check_interface(inspect(lab)), "rp_filter").found == "loose"


@pytest.mark.netns
def test_an_attached_program_is_seen_with_its_holder(lab: Lab) -> None:
    def attach() -> nic.Nic:
        prog = probe.load_pass_program()
        link = probe.attach_native(prog, nic.read("bypass0").index)
        try:
            return nic.read("bypass0")
        finally:
            link.close()
            prog.close()

    program = netns.run(lab.server_ns, attach).program
    assert program is not None
    assert (program.name, program.mode) == ("bypass_probe", "native")
    assert os.getpid() in program.holders
    assert inspect(lab).program is None


@pytest.mark.netns
@pytest.mark.parametrize("below", [False, True], ids=["the interface", "a bridge above it"])
def test_the_default_route_is_found_also_above_the_interface(lab: Lab, below: bool) -> None:
    script = "ip route add default via 192.0.2.20"
    if below:
        script = """set -e
            ip addr flush dev bypass0; ip link add br0 type bridge; ip link set bypass0 master br0; ip link set br0 up
            ip addr add 192.0.2.10/24 dev br0; ip route add default via 192.0.2.20"""
    assert inspect(lab).default_route is False
    subprocess.run(lab.command("server", ["sh", "-c", script]), check=True)
    facts = inspect(lab)
    assert facts.default_route is True
    assert doctor.choose(facts, "auto")[0] == "copy"


@pytest.mark.netns
def test_the_login_is_found_by_the_route_to_it(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "192.0.2.20 50000 192.0.2.10 22")
    assert inspect(lab).login == "192.0.2.20"
    monkeypatch.setenv("SSH_CONNECTION", "203.0.113.1 50000 203.0.113.2 22")
    assert inspect(lab).login == ""  # no route there
    monkeypatch.setenv("SSH_CONNECTION", "203.0.113.1 50000 192.0.2.10 22")
    assert (
        inspect(lab).login == "203.0.113.1"
    )  # our end's address is on the interface, whatever the route says


@pytest.mark.netns
def test_other_logins_than_our_own_are_found(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSH_CONNECTION", " ")
    entries = ((7, b"192.0.2.20"), (8, b"192.0.2.21"), (7, b":0"), (7, b"::1"), (2, b"6.18.0"))
    (tmp_path / "utmp").write_bytes(b"".join(nic.UTMP.pack(kind, host) for kind, host in entries))
    (tmp_path / "systemd/sessions").mkdir(parents=True)
    (tmp_path / "systemd/sessions/4").write_text("UID=0\nREMOTE=1\nREMOTE_HOST=fe80::5%eth0\n")
    (tmp_path / "systemd/sessions/5").write_text("UID=0\nREMOTE_HOST=host.example\n")
    assert nic.logins(tmp_path) == ["192.0.2.20", "fe80::5"]
    monkeypatch.setattr(nic, "logins", lambda: ["203.0.113.1", "192.0.2.20"])
    assert inspect(lab).login == "192.0.2.20"


def test_the_login_is_found_where_sudo_hid_it() -> None:
    """sudo starts its command without SSH_CONNECTION; a parent still has it."""
    inner = "import os; from bypass import nic; print(nic.ssh_client())"
    outer = (
        "import os, subprocess, sys;"
        "env = {k: v for k, v in os.environ.items() if k != 'SSH_CONNECTION'};"
        f"subprocess.run([sys.executable, '-c', {inner!r}], env=env, check=True)"
    )
    env = {**os.environ, "SSH_CONNECTION": "192.0.2.77 1 192.0.2.10 22"}
    done = subprocess.run([sys.executable, "-c", outer], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "192.0.2.77\n"


# ---- The command -------------------------------------------------------------------------------------------------
@pytest.mark.netns
def test_the_command_prints_a_table_for_people_and_json_for_programs() -> None:
    with Lab(lab_name()) as lab:
        argv = [sys.executable, "-m", "bypass", "doctor", "bypass0"]
        people = subprocess.run(lab.command("server", argv), capture_output=True, text=True, check=False)
        assert people.returncode == 0, people.stdout + people.stderr
        assert "mode: auto takes copy: the driver (veth) offers no zero-copy" in people.stdout
        program = subprocess.run(
            lab.command("server", [*argv, "--json"]), capture_output=True, text=True, check=True
        )
    about: dict[str, Any] = json.loads(program.stdout)
    costly = doctor.check_mitigations(probe.vulnerabilities())
    assert (about["interface"], about["mode"], about["verdict"]) == ("bypass0", "copy", costly.verdict)
    assert {"group", "name", "verdict", "found", "fix"} == set(about["checks"][0])


def test_the_exit_code_is_the_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probe, "try_bcc", lambda: "bcc cannot be imported [no such module]")
    result = CliRunner().invoke(cli, ["doctor"], standalone_mode=False)
    assert result.return_value == 1
    assert "bcc cannot be imported [no such module]" in result.stdout
    assert "make setup" in result.stdout
    assert main(["doctor", "nope"]) == 2
    assert "no interface 'nope' here" in capsys.readouterr().err


def test_the_interface_of_a_dpdk_policy_need_not_be_there(tmp_path: Path) -> None:
    """It is made when the port is opened."""
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "version: 1\ninterface: kernel0\nbackend: {kind: dpdk, device: net_null0}\naddresses: [192.0.2.10/24]\nflows:\n"
        "  - {name: web, match: {proto: tcp, local: 192.0.2.10, local_port: 80}, action: steer}\n"
    )
    told = []
    for named in ([], ["kernel0"]):
        result = CliRunner().invoke(cli, ["doctor", *named, "-c", str(policy)], standalone_mode=False)
        assert result.exception is None
        told.append(result.stdout)
    assert told[0] == told[1]
    assert main(["doctor", "kernel1", "-c", str(policy)]) == 2


def test_without_root_nothing_is_tried_that_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr(probe, "try_native_xdp", lambda: pytest.fail("tried"))
    checks = {c.name: c for c in doctor.check_machine()}
    assert checks["native XDP"].verdict == "warn"
    assert checks["native XDP"].fix == "sudo bypass doctor"


def test_an_old_kernel_is_missing_for_xdp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(probe, "kernel_version", lambda: (6, 1))
    assert any(m.startswith("kernel 6.6 or later") for m in probe.missing_for_xdp())


@pytest.mark.netns
def test_a_name_that_is_no_namespace_yet_does_not_disturb(lab: Lab) -> None:
    """As in the moment between `ip netns add` making the file and mounting the namespace on it."""
    half_made = netns.RUN_DIR / f"bypass-{os.getpid()}-0-half"
    half_made.touch()
    try:
        facts = inspect(lab)
    finally:
        half_made.unlink()
    assert facts.peer is not None
    assert facts.peer.namespace == lab.client_ns
