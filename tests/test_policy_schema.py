# SPDX-License-Identifier: Apache-2.0
"""The JSON Schema says what the validator does: both take valid policies, and what the schema refuses the validator
refuses. The other way round they differ only where a schema cannot see: those cases are listed."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support import examples

from bypass.errors import PolicyError
from bypass.policy import parse_policy, policy_schema
from bypass.testing.policies import policy_documents

SCHEMA = policy_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

# What only the validator sees.
UNSEEN = re.compile(
    "bits set behind its prefix|ends before it begins|is the name of the flow|contradicts|different masks"
    "|but local is|is IPv4 inside IPv6|is no address that a packet has|is not spoken over|too few for the rings"
    "|is longer than 15 bytes|are not all of the rule's|leaves the port without any address|has a route already"
    "|is in no prefix of addresses|but the route is for|is the port's own address|is not for all destinations"
    "|is IPv6, which the stack|is never seen here|is not an address that a port may have|address of|is no gateway's"
)


def refusals(doc: object) -> list[str]:
    """What the validator says, through a YAML file."""
    try:
        parse_policy(yaml.safe_dump(doc))
    except PolicyError as error:
        return [f"{p.message}: {p.hint}" for p in error.problems]
    return []


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["required"] == ["version", "interface", "backend", "flows"]
    assert SCHEMA["additionalProperties"] is False
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA


def test_every_field_explains_itself_to_an_editor() -> None:
    parts = [SCHEMA, *SCHEMA["$defs"].values()]
    fields = {name: field for part in parts for name, field in part["properties"].items()}
    assert len(fields) == 64
    assert [n for n, f in fields.items() if "description" not in f and "$ref" not in f] == []
    assert all("description" in part for part in parts)


@settings(max_examples=examples(60))
@given(policy_documents())
def test_both_take_valid_policies(doc: dict[str, Any]) -> None:
    assert refusals(doc) == []
    VALIDATOR.validate(doc)


JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 2, 80, 4094, 4095, 65535, 65536, 1.5, "", "tcp", "TCP", "all", "80", "0-1", "80-90",
    "90-80", "1-65536", "steer", "pass", "auto", "192.0.2.10", "192.0.2.0/24", "192.0.2.1/24", "0.0.0.0/0", "0.0.0.0",
    "256.0.0.1", "192.0.2.10/33", "2001:db8::1", "2001:db8::/32", "::1/129", "a b", "eth1", "sixteen-letters-", "..",
    [], [0], [0, 0], {}, {"a": 1}, "afxdp", 2048, 4096, 100, "dpdk", "none", "tap", "64M", "192.0.2.1",
    ["192.0.2.10/24"], ["192.0.2.0/24"], "net_null0", "192.0.2.1/24", "2001:db8::2", "::/0",
]  # fmt: skip
KEYS = [
    "version",
    "interface",
    "backend",
    "flows",
    "name",
    "match",
    "action",
    "kind",
    "mode",
    "queues",
    "ring_size",
]
KEYS += ["device", "mtu", "eal", "exception", "addresses", "routes", "to", "via", "hugepages", "memory"]
KEYS += ["frames", "frame_size", "proto", "local", "local_port", "remote", "remote_port", "vlan", "unknown"]


@st.composite
def damaged(draw: st.DrawFn) -> Any:
    """A policy with one to three values replaced, added or removed."""
    doc = copy.deepcopy(draw(policy_documents()))
    for _ in range(draw(st.integers(1, 3))):
        places: list[Any] = []
        todo: list[Any] = [doc]
        while todo:
            part = todo.pop()
            places.append(part)
            todo += [
                v for v in (part.values() if isinstance(part, dict) else part) if isinstance(v, dict | list)
            ]
        part = draw(st.sampled_from(places))
        junk = copy.deepcopy(draw(st.sampled_from(JUNK)))
        if isinstance(part, list):
            if part and draw(st.booleans()):
                part[draw(st.integers(0, len(part) - 1))] = junk
            else:
                part.append(junk)
        elif part and draw(st.booleans()):
            key = draw(st.sampled_from(sorted(part)))
            if draw(st.booleans()):
                part[key] = junk
            else:
                del part[key]
        else:
            part[draw(st.sampled_from(KEYS))] = junk
    return doc


@settings(max_examples=examples(300))
@given(damaged())
def test_both_agree_on_damaged_policies(doc: Any) -> None:
    said = refusals(doc)
    if VALIDATOR.is_valid(doc):
        assert all(UNSEEN.search(line) for line in said), said
    else:
        assert said, list(VALIDATOR.iter_errors(doc))


BASE = {
    "version": 1,
    "interface": "eth1",
    "backend": {"kind": "afxdp"},
    "flows": [{"name": "a", "match": {"proto": "tcp"}, "action": "steer"}],
}


@pytest.mark.parametrize(
    "match",
    [
        {},
        {"local_port": 80},
        {"proto": "icmp", "local_port": 80},
        {"proto": 47, "remote_port": 80},
        {"proto": "tcp", "vlan": 5},
        {"proto": "icmp"},
        {"proto": 1},
        {"local": "2001:db8::1"},
        {"proto": "udp", "remote": "2001:db8::/32"},
        {"proto": "tcp", "local_port": 0},
        {"proto": "tcp", "local_port": "0-5"},
        {"proto": "tcp", "local_port": "80"},
        {"proto": "tcp", "local_port": "5-65536"},
        {"local": "192.0.2.256"},
        {"local": "192.0.2.0/33"},
        {"proto": 256},
    ],
)
def test_rules_across_fields_are_in_the_schema_too(match: dict[str, Any]) -> None:
    doc = copy.deepcopy(BASE)
    doc["flows"][0]["match"] = match  # type: ignore[index]
    assert refusals(doc)
    assert not VALIDATOR.is_valid(doc)


@pytest.mark.parametrize(
    "match", [{"proto": 6, "local_port": 80}, {"proto": 17, "remote_port": "1-2"}, {"local": "::1"}]
)
def test_what_is_right_stays_right_in_the_schema(match: dict[str, Any]) -> None:
    doc = copy.deepcopy(BASE)
    doc["flows"][0] = {"name": "a", "match": match, "action": "pass"}  # type: ignore[index]
    assert not refusals(doc)
    VALIDATOR.validate(doc)
