# SPDX-License-Identifier: Apache-2.0
"""`profile`, `stack` and `congestion` of a policy: what they set, what overrides what, what is refused and where."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from bypass._core import lib
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from bypass.cli import cli
from bypass.core import Config
from bypass.errors import PolicyError
from bypass.lab import SERVER_IP, Lab
from bypass.policy import Policy, parse_policy
from bypass.policy_fields import CONGESTION, StackModel
from bypass.profiles import CORE_BUFFER, PROFILES, RING_SIZES, StackOptions
from bypass.sim import Network

PAGE = (Path(__file__).parent.parent / "docs/policy.md").read_text()


def text(head: str = "", backend: str = "{kind: afxdp}") -> str:
    flow = "flows: [{name: web, match: {proto: tcp, local_port: 80}, action: steer}]"
    return f"version: 1\ninterface: bypass0\n{head}\nbackend: {backend}\n{flow}\n"


def policy(head: str = "", backend: str = "{kind: afxdp}") -> Policy:
    return parse_policy(text(head, backend), "p.yaml")


def errors(head: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        policy(head)
    return str(caught.value).splitlines()


# ---- What is set --------------------------------------------------------------------------------------------------


def test_without_a_profile_the_defaults_are_the_cores() -> None:
    p = policy()
    assert (p.profile, p.stack, p.congestion) == (None, StackOptions(), None)
    assert p.stack.config(None) == Config()
    assert p.backend.ring_size == 2048


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_is_a_set_of_defaults_that_a_stack_accepts(name: Any) -> None:
    p = policy(f"profile: {name}")
    assert p.stack == PROFILES[name]
    assert p.backend.ring_size == RING_SIZES[name]
    with Network(1) as net:
        stack = net.stack("10.0.0.1/24", config=p.stack.config(None))
        handle = stack.open(lib.BYPASS_STREAM)
        assert stack.core.getopt(handle, lib.BYPASS_SO_RCVBUF) == (PROFILES[name].rcvbuf or CORE_BUFFER)


def test_explicit_keys_override_the_profile() -> None:
    p = policy("profile: latency\nstack: {delack_ms: 3, conns: 77}", "{kind: afxdp, ring_size: 256}")
    assert (p.stack.delack_ms, p.stack.conns, p.stack.spin_us) == (3, 77, 50)
    assert p.backend.ring_size == 256
    assert policy("profile: latency", "{kind: afxdp, ring_size: 2048}").backend.ring_size == 2048


def test_what_the_program_says_overrides_the_policy() -> None:
    stack = policy("profile: connections\nstack: {delack_ms: 3}").stack
    got = stack.config(Config(conns=9, rcvbuf=1 << 20, delack_ms=100))
    assert (got.conns, got.rcvbuf, got.delack_ms) == (9, 1 << 20, 100)
    assert got.rcvbuf_max is None, "its buffer is larger than the policy's limit, and brings its own"
    assert (got.sndbuf, got.sndbuf_max) == (16384, 1 << 18)


@given(
    st.builds(
        StackOptions,
        sndbuf=st.none() | st.integers(4096, 1 << 20),
        sndbuf_max=st.none() | st.integers(4096, 1 << 23),
        rcvbuf_max=st.none() | st.integers(4096, 1 << 23),
        delack_ms=st.none() | st.integers(1, 500),
    ),
    st.none() | st.builds(Config, sndbuf=st.none() | st.integers(4096, 1 << 22)),
)
def test_every_combination_that_passes_is_a_configuration(
    options: StackOptions, program: Config | None
) -> None:
    cfg = options.config(program).fill(0)
    assert lib.bypass_arena_size(cfg) > 0


def test_the_congestion_control_is_the_default_of_new_sockets() -> None:
    assert policy("congestion: bbr").congestion == "bbr"
    with Network(1) as net:
        known = net.stack("10.0.0.1/24").core.cc_names()
    assert set(CONGESTION) == set(known), "policy_fields.CONGESTION names what the stack has built in"
    for name in CONGESTION:
        assert f"`{name}`" in PAGE


@pytest.mark.netns
def test_a_stack_on_an_interface_has_what_its_policy_says(lab: Lab, tmp_path: Path) -> None:
    from bypass import Stack, netns

    path = tmp_path / "p.yaml"
    path.write_text(text("profile: latency\nstack: {rcvbuf: 50000, batch: 7}\ncongestion: reno"))
    with netns.entered(lab.server_ns), Stack.from_policy(path) as stack:
        server = stack.create_server((SERVER_IP, 80))
        with stack.driver.lock:
            assert stack.core.getopt(server._handle, lib.BYPASS_SO_RCVBUF) == 50000
            assert stack.core.cc_get(server._handle) == "reno"
        assert (stack.driver.batch, stack.driver._spin_ns) == (7, 50_000)  # type: ignore[attr-defined]
        server.close()


# ---- What is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("profile: latencyy", "p.yaml:3:10: profile: latencyy is not a profile: did you mean latency?"),
        ("profile: fast", "p.yaml:3:10: profile: fast is not a profile: latency, throughput or connections"),
        ("profile: [latency]", "p.yaml:3:10: profile: a list is not a profile: "),
        (
            "congestion: vegas",
            "p.yaml:3:13: congestion: vegas is not a congestion control: cubic, reno, dctcp or bbr",
        ),
        ("stack: 5", "p.yaml:3:8: stack: 5 is not a mapping of the stack's options: "),
        ("stack: {rcvbu: 1}", "p.yaml:3:9: stack.rcvbu: unknown key: did you mean rcvbuf?"),
        ("stack: {sndbuf: 100}", "p.yaml:3:17: stack.sndbuf: 100 is not a buffer size in bytes: 4096 to"),
        ("stack: {delack_ms: on}", "p.yaml:3:20: stack.delack_ms: on is a boolean in YAML: 1 to 500"),
        (
            "stack: {sndbuf: 9000, sndbuf_max: 8000}",
            "p.yaml:3:17: stack.sndbuf: 9000 is more than sndbuf_max, 8000: sndbuf is at most sndbuf_max",
        ),
        (
            "profile: throughput\nstack: {rcvbuf_max: 65536}",
            "p.yaml:4:21: stack.rcvbuf_max: 65536 is less than rcvbuf, 1048576: rcvbuf is at most rcvbuf_max",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_place(head: str, said: str) -> None:
    assert errors(head)[0].startswith(said)


def test_frames_are_compared_with_the_rings_of_the_profile() -> None:
    with pytest.raises(PolicyError, match="at least 8192"):
        policy("profile: throughput", "{kind: afxdp, frames: 5000}")


# ---- What is told -------------------------------------------------------------------------------------------------


def test_policy_check_prints_what_comes_of_it(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text("profile: latency\nstack: {conns: 5}\ncongestion: bbr"))
    done = CliRunner().invoke(cli, ["policy", "check", str(path)])
    assert done.exit_code == 0
    assert "Profile: latency\n" in done.output
    assert "conns 5" in done.output
    assert "delack_ms 10" in done.output
    assert "Congestion control: bbr" in done.output


def test_the_page_has_the_profiles_numbers() -> None:
    rows = dict(re.findall(r"^\| `(?:backend\.)?(\w+)`[^|]*\|[^|]*\|[^|]*\|(.*)\|$", PAGE, re.MULTILINE))
    for name in (f.name for f in fields(StackOptions)):
        cells = [cell.strip() for cell in rows[name].split("|")]
        values = [getattr(PROFILES[p], name) for p in PROFILES]
        assert cells == ["" if v is None else str(v) for v in values], name
    assert [c.strip() for c in rows["ring_size"].split("|")] == [str(RING_SIZES[p]) for p in PROFILES]


def test_every_option_has_a_key() -> None:
    assert set(StackModel.model_fields) == {f.name for f in fields(StackOptions)}
