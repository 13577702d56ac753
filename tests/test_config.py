# SPDX-License-Identifier: Apache-2.0
"""Every policy in config/ is good as it is, and explains itself."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml

from bypass.policy import load_policy, policy_schema

CONFIG = Path(__file__).parent.parent / "config"
FILES = sorted(CONFIG.iterdir())


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
