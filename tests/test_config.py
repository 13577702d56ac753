# SPDX-License-Identifier: Apache-2.0
"""Every policy in config/ is good as it is, runs in the lab, and explains itself."""

from __future__ import annotations

import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

from bypass import netns
from bypass.errors import PolicyError
from bypass.lab import Lab
from bypass.policy import load_policy, policy_schema
from bypass.steering import Steering

CONFIG = Path(__file__).parent.parent / "config"
FILES = sorted(CONFIG.glob("*.yaml"))
AFXDP = [f for f in FILES if load_policy(f).backend.kind == "afxdp"]


def test_there_are_policies() -> None:
    assert {f.name for f in FILES} >= {"web.yaml", "redis.yaml", "dns-drop.yaml", "mixed.yaml"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_policy_is_good(path: Path) -> None:
    policy = load_policy(path)
    assert policy.flows
    assert policy.interface == "bypass0"  # the server's interface of the lab
    jsonschema.validate(yaml.safe_load(path.read_text()), policy_schema())


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_policy_is_explained_in_its_head_comment(path: Path) -> None:
    head = path.read_text().partition("\nversion:")[0].splitlines()
    assert len(head) >= 3
    assert all(line.startswith("#") for line in head)


def test_the_demo_policy_serves_port_8080_of_the_lab() -> None:
    (rule,) = load_policy(CONFIG / "web.yaml").flows
    assert rule.match_text() == "proto tcp, local 192.0.2.10, local_port 8080"
    assert rule.action == "steer"


@pytest.mark.netns
@pytest.mark.parametrize("path", AFXDP, ids=lambda p: p.name)
def test_policy_runs_in_the_lab(path: Path, lab: Lab) -> None:
    policy = load_policy(path)
    with netns.entered(lab.server_ns), Steering(policy, policy.interface, queues=lab.queues) as steering:
        assert steering.mode == "native"
        assert list(steering.rules()) == [rule.name for rule in policy.flows]


@pytest.mark.netns
def test_vlan_rules_are_refused_where_tags_are_hidden_from_xdp(lab: Lab) -> None:
    subprocess.run(
        ["ip", "netns", "exec", lab.client_ns, "ethtool", "-K", "bypass1", "txvlan", "on"],
        check=True,
        capture_output=True,
    )
    policy = load_policy(CONFIG / "mixed.yaml")
    (rule,) = (r for r in policy.flows if r.vlan is not None)
    with netns.entered(lab.server_ns):
        with pytest.raises(PolicyError, match="the peer keeps VLAN tags beside the packet") as caught:
            Steering(policy, "bypass0", queues=lab.queues)
        assert [p.line for p in caught.value.problems] == [rule.line]
        with Steering(load_policy(CONFIG / "web.yaml"), "bypass0", queues=lab.queues) as steering:
            with pytest.raises(PolicyError):
                steering.swap(policy)
            assert list(steering.rules()) == ["web"]
