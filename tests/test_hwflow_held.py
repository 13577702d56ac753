# SPDX-License-Identifier: Apache-2.0
"""Rules on an interface end with their process, however that ends: put on, exchanged, taken off, and taken off by the
next one after a kill at any moment. No NIC here has such tables: a device of ours answers for the loopback's name."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_hwflow_ethtool import TWO, FakeNic
from test_hwflow_rules import WEB, policy

from bypass import netns
from bypass.cli import main
from bypass.doctor import check_rules
from bypass.doctor_port import Check
from bypass.errors import DeviceError
from bypass.hwflow import Plan, held, plan, translate
from bypass.hwflow.apply import Room, room_of
from bypass.hwflow.held import Held, found, recover
from bypass.hwflow.offered import Offer, of_interface, of_port
from bypass.policy_fields import HardwareRules

IFNAME = "lo"
WANTS: tuple[HardwareRules, ...] = ("none", "auto", "required")


class Nic(FakeNic):
    name = IFNAME


def planned(*flows: str, stack: tuple[int, ...] = (3,), kernel: tuple[int, ...] = (0, 1, 2)) -> Plan:
    return plan(translate(policy(*(flows or TWO))), IFNAME, stack=stack, kernel=kernel)


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that was."""
    with subprocess.Popen(["true"]) as process:
        pass
    return process.pid


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name != "lock")


def test_rules_are_there_until_close_with_a_record_of_what_was_changed(tmp_path: Path) -> None:
    device = Nic()
    before = device.state()
    ours = Held(planned(), None, device.ask, tmp_path)
    record = found(IFNAME, tmp_path)
    assert record is not None
    assert record.alive
    assert record.keeper[0] == os.getpid()
    assert record.traces.table == tuple(before[1])
    assert [r.location for r in record.traces.rules] == [at for at in sorted(device.rules) if at != 1]
    assert recover(IFNAME, device.ask, tmp_path) is False, "they are ours"
    ours.close()
    assert device.state() == before
    assert files(tmp_path) == []
    assert found(IFNAME, tmp_path) is None


@pytest.mark.parametrize(("stack", "kernel"), [((3,), (0, 1, 2)), ((2, 3), (0, 1))], ids=["queue", "context"])
def test_a_refusal_at_each_step_leaves_nothing(
    tmp_path: Path, stack: tuple[int, ...], kernel: tuple[int, ...]
) -> None:
    device = Nic()
    Held(planned(stack=stack, kernel=kernel), None, device.ask, tmp_path).close()
    for step in range(1, device.changes // 2 + 1):
        device = Nic()
        before = device.state()
        device.fails = {step: 28}
        with pytest.raises(DeviceError, match="No space left on device"):
            Held(planned(stack=stack, kernel=kernel), None, device.ask, tmp_path)
        assert device.state() == before, step
        assert files(tmp_path) == []


class Killed(BaseException):
    """No `except Exception` sees it, as none sees a SIGKILL."""


class Mortal(Nic):
    """Kills who asks, before or after the how manieth change; and whatever that one tries to do afterwards."""

    def __init__(self, at: int, *, after: bool) -> None:
        super().__init__()
        self.at, self.after, self.over = at, after, False

    def ask(self, ifname: str, question: bytes) -> bytes:
        before = self.changes
        if self.over or (not self.after and before == self.at and _changes(question)):
            self.over = True
            raise Killed
        told = super().ask(ifname, question)
        if self.after and self.changes == self.at + 1:
            self.over = True
            raise Killed
        return told


def _changes(question: bytes) -> bool:
    return int.from_bytes(question[:4], "little") in (0x26, 0x31, 0x32, 0x47)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("stack", "kernel"), [((3,), (0, 1, 2)), ((2, 3), (0, 1))], ids=["queue", "context"])
def test_what_a_killed_process_left_is_taken_off_by_the_next(
    tmp_path: Path, dead: int, stack: tuple[int, ...], kernel: tuple[int, ...], after: bool
) -> None:
    """At each step, before and after the device has done it; then the next one puts its own rules on."""
    made = planned(stack=stack, kernel=kernel)
    device = Nic()
    Held(made, None, device.ask, tmp_path).close()
    total, before = device.changes // 2, Nic().state()
    for step in range(total):
        device = Mortal(step, after=after)
        with pytest.raises(Killed):
            Held(made, dead, device.ask, tmp_path)
        device.over, device.at = False, -9
        assert (device.state() != before) == (step > 0 or after)
        recover(IFNAME, device.ask, tmp_path)
        if after and len(stack) > 1 and step == 1:  # the kernel numbers a context: nobody knew it yet
            assert device.contexts.popitem()[1] == [2, 3] * 4
        assert device.state() == before, step
        assert files(tmp_path) == []
    device = Nic()
    left = Held(made, dead, device.ask, tmp_path)
    again = Held(planned(WEB), None, device.ask, tmp_path)
    assert len(device.rules) == 2
    again.close()
    assert device.state() == before
    assert left.ifname == IFNAME


def test_rules_of_others_that_took_a_place_of_ours_stay(tmp_path: Path, dead: int) -> None:
    """Killed before the device had the rule of which the record speaks; nobody has it now."""
    device = Nic()
    Held(planned(), dead, device.ask, tmp_path)
    gone = max(device.rules)
    del device.rules[gone]
    assert recover(IFNAME, device.ask, tmp_path) is True
    assert device.rules == {1: b"of somebody else"}


def test_other_rules_take_their_place_and_a_refusal_brings_the_old_ones_back(tmp_path: Path) -> None:
    device = Nic()
    ours = Held(planned(), None, device.ask, tmp_path)
    first = device.state()
    ours.exchange(planned(WEB))
    assert len(device.rules) == 2
    ours.exchange(planned())
    assert device.state() == first
    for step in range(1, 4):  # of the rules that are put on, behind those that were taken off
        device.fails = {device.changes + len(planned().rules) + step: 28}
        with pytest.raises(DeviceError, match=r"p.yaml:\d+: '\w+' is refused: No space left on device"):
            ours.exchange(planned(*TWO, "dns: proto: udp, local: 192.0.2.10, local_port: 53 -> steer"))
        assert device.state() == first
    ours.close()
    assert device.state() == Nic().state()


@pytest.mark.parametrize("special", [False, True])
def test_what_the_device_forgets_is_put_on_again(tmp_path: Path, special: bool) -> None:
    device = Nic(special=special)
    ours = Held(planned(), None, device.ask, tmp_path)
    before = device.state()
    assert ours.check() == []
    assert device.state() == before
    for names in (("web", "ssh"), ("all",), ()):
        record = found(IFNAME, tmp_path)
        assert record is not None
        lost = [r for r in record.traces.rules if r.name in names]
        for rule in lost:
            del device.rules[rule.location]
        device.table = [0, 1, 2, 3] * 2
        device.flags = 0 if "web" in names else device.flags
        again = ["ntuple filters"] if "web" in names else []
        assert ours.check() == [*again, *(f"'{r.name}'" for r in lost), "hash table"]
        assert (device.flags, device.table) == before[:2]
        assert special or device.rules == before[2]
        assert len(device.rules) == len(before[2])
        assert ours.check() == []
    for _ in range(2):
        device.rules = {1: b"of somebody else"}
        device.fails = {device.changes + 2: 28}
        with pytest.raises(DeviceError, match="which was in force, is refused: No space left on device"):
            ours.check()
    assert ours.check() != []
    assert len(device.rules) == len(before[2])
    device.rules = {1: b"of somebody else"}
    ours.close()
    assert device.state() == Nic(special=special).state()


def test_a_successor_of_the_same_keeper_goes_on_and_others_are_refused(tmp_path: Path) -> None:
    device = Nic()
    before = device.state()
    with subprocess.Popen(["sleep", "1000"]) as keeper:
        try:
            Held(planned(), keeper.pid, device.ask, tmp_path)
            with pytest.raises(
                DeviceError, match=f"lo: process {keeper.pid} has rules in its hardware: end it first"
            ):
                Held(planned(), None, device.ask, tmp_path)
            assert recover(IFNAME, device.ask, tmp_path) is False
            put = device.state()
            Held(planned(WEB), keeper.pid, device.ask, tmp_path, exchange=False)
            assert device.state() == put
            successor = Held(planned(WEB), keeper.pid, device.ask, tmp_path)
            assert len(device.rules) == 2
            successor.close()
            assert device.state() == before
            Held(planned(), keeper.pid, device.ask, tmp_path)
        finally:
            keeper.kill()
    assert recover(IFNAME, device.ask, tmp_path) is True
    assert device.state() == before


def test_what_cannot_be_taken_off_is_told_and_tried_again(tmp_path: Path) -> None:
    device = Nic()
    before = device.state()
    ours = Held(planned(), None, device.ask, tmp_path)
    device.fails = {device.changes + 2: 5}
    with pytest.raises(DeviceError, match=r"lo: not undone: rule \d \('all'\): Input/output error"):
        ours.close()
    record = found(IFNAME, tmp_path)
    assert record is not None
    assert (record.traces.table, [r.name for r in record.traces.rules]) == (None, ["all"])
    ours.close()
    assert device.state() == before
    assert files(tmp_path) == []


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 1}', '{"version": 9}'])
def test_a_record_that_cannot_be_understood_is_named(tmp_path: Path, text: str) -> None:
    device = Nic()
    Held(planned(), None, device.ask, tmp_path)
    (path,) = tmp_path.glob("*.json")
    path.write_text(text)
    for use in (
        lambda: recover(IFNAME, device.ask, tmp_path),
        lambda: Held(planned(), None, device.ask, tmp_path),
    ):
        with pytest.raises(DeviceError, match=path.name):
            use()


def test_a_record_belongs_to_a_network_namespace(tmp_path: Path, namespace: str) -> None:
    """Every one has a loopback of the same name and number."""
    device = Nic()
    ours = Held(planned(), None, device.ask, tmp_path)
    (name,) = files(tmp_path)
    assert name.startswith(netns.cookie())
    assert netns.run(namespace, found, IFNAME, tmp_path) is None
    assert json.loads((tmp_path / name).read_text())["ifname"] == IFNAME
    ours.close()


def test_who_closes_may_be_in_another_namespace_and_the_interface_have_another_name(
    tmp_path: Path, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, cookies = Nic(), set()
    before = device.state()

    def ask_by(s: socket.socket, ifname: str, question: bytes) -> bytes:
        cookies.add(s.getsockopt(socket.SOL_SOCKET, netns.SO_NETNS_COOKIE, 8))
        return device.ask(ifname, question)

    monkeypatch.setattr(held, "ask_by", ask_by)
    ip = ["ip", "-n", namespace, "link"]
    subprocess.run([*ip, "add", "eth7", "type", "veth", "peer", "name", "far7"], check=True)
    device.name = "eth7"
    made = plan(translate(policy(*TWO)), "eth7", stack=(3,), kernel=(0, 1, 2))
    ours = netns.run(namespace, Held, made, None, None, tmp_path)
    assert device.table == [0, 1, 2, 0, 1, 2, 0, 1]
    subprocess.run([*ip, "set", "eth7", "name", "eth8"], check=True)
    device.name = "eth8"
    ours.close()
    assert device.state() == before
    assert len(cookies) == 1
    assert netns.run(namespace, netns.cookie) == cookies.pop()[::-1].hex()


def test_who_may_not_write_records_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DeviceError, match="Not a directory: rules in hardware need root"):
        Held(planned(), None, Nic().ask, tmp_path / "file" / "records")
    with pytest.raises(DeviceError, match="nosuch0: there is no such interface"):
        recover("nosuch0", None, tmp_path)


def test_who_may_not_look_at_records_goes_on(tmp_path: Path) -> None:
    """A stack with capabilities and no root: what was left there is not its to take off."""
    Held(planned(), None, Nic().ask, tmp_path)
    code = "import sys; from pathlib import Path; from bypass.hwflow.held import found, recover; "
    code += "print(recover('lo', None, Path(sys.argv[1])), found('lo', Path(sys.argv[1])))"
    as_user = ["setpriv", "--reuid=65534", "--clear-groups", sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(as_user, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False None\n"


def test_the_command_takes_off_what_was_left(
    tmp_path: Path, dead: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    device = Nic()
    before = device.state()
    Held(planned(), dead, device.ask, tmp_path)
    monkeypatch.setattr(held, "RECORDS", tmp_path)
    monkeypatch.setattr(held, "ask", device.ask)
    left = found(IFNAME)
    says = f"those of process {dead}, which was killed: whoever uses lo next takes them off"
    assert check_rules("interface", of_interface(IFNAME, device.ask), "required", left) == Check(
        "interface", "hardware rules", "warn", says, "bypass nic rules --recover lo"
    )
    assert main(["nic", "rules", "--recover", IFNAME]) == 0
    assert device.state() == before
    assert main(["nic", "rules", "--recover", IFNAME]) == 0
    assert capsys.readouterr().out == "lo: its rules are as they were\nlo: nobody who was killed left rules\n"
    assert main(["nic", "rules", "--recover", "nosuch0"]) == 2
    assert main(["nic", "rules"]) == 2


def test_the_doctor_says_what_a_policy_can_have(dead: int) -> None:
    has, lacks, unknown = (
        of_interface(IFNAME, Nic().ask),
        of_port("net_memif0,role=server"),
        of_port("net_tap0"),
    )
    assert has == Offer(True, "room for 63 of 64; a hash table of 8 entries")
    assert of_interface(IFNAME, Nic(special=True).ask).text.startswith("places of its driver's choice; ")
    assert of_interface(IFNAME).has is False, "the loopback itself"
    assert (lacks.has, unknown.has, of_port("0000:03:00.0").has) == (False, None, None)
    verdicts = {
        (offer.has, wants): check_rules("dpdk", offer, wants).verdict
        for offer in (has, lacks, unknown)
        for wants in WANTS
    }
    assert {pair for pair, verdict in verdicts.items() if verdict != "ok"} == {
        (False, "auto"),
        (False, "required"),
    }
    assert verdicts[False, "auto"] == "warn"
    assert verdicts[False, "required"] == "fail"


def test_what_an_interface_offers_is_known() -> None:
    assert room_of(IFNAME, Nic().ask) == Room(64, 63, 8)
    assert room_of(IFNAME, Nic(special=True).ask) == Room(None, None, 8)
    device = Nic()
    device.lacks = {0x2E}
    with pytest.raises(DeviceError, match="lo: its driver has no ntuple filters, or they are off"):
        room_of(IFNAME, device.ask)
    device.lacks = {0x46}
    with pytest.raises(DeviceError, match="lo: its hash table cannot be read"):
        room_of(IFNAME, device.ask)
