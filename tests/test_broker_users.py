# SPDX-License-Identifier: Apache-2.0
"""Who may use which rule, and how much: users as the kernel knows them, on an interface and in the books."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest
from broker_support import Child, RunningBroker, running
from bypass._core import lib

from bypass import netns
from bypass.broker.direct import DirectSite
from bypass.broker.users import Access, User
from bypass.errors import PolicyError
from bypass.grants import Grants
from bypass.lab import SERVER_IFNAME, SERVER_IP, Lab
from bypass.policy import parse_policy
from bypass.stack_api import STREAM

NOBODY, OTHER = 65534, 65533
POLICY = f"""
version: 1
interface: {SERVER_IFNAME}
backend: {{kind: afxdp, mode: copy, ring_size: 256}}
quota: {{memory: 64M, conns: 300}}
cpus: [0]
flows:
  - name: mine
    match: {{proto: tcp, local: {SERVER_IP}, local_port: 8000-8100}}
    action: steer
    allow: {{user: {NOBODY}, ports: [8080, 8090-8092], quota: {{frames: 1024}}}}
  - name: roots
    match: {{proto: tcp, local: {SERVER_IP}, local_port: 9000}}
    action: steer
"""


def grants(text: str, uid: int, *gids: int, trusted: bool = False) -> Grants:
    policy = parse_policy(text)
    return Grants(policy, Access(policy).permits(User(uid, 0, frozenset(gids), trusted)))


def granted(it: Grants, host: str, port: int) -> bool:
    return it.find(STREAM, (host, port), None) is not None


def test_a_rule_is_granted_to_whom_it_allows_with_the_ports_that_it_allows() -> None:
    mine, others = grants(POLICY, NOBODY), grants(POLICY, OTHER)
    assert [p for p in range(8000, 8101) if granted(mine, SERVER_IP, p)] == [8080, 8090, 8091, 8092]
    assert not granted(mine, SERVER_IP, 9000)
    assert not any(granted(others, SERVER_IP, p) for p in (8080, 9000))
    assert [(r.name, str(p)) for r, p in mine.steered()] == [("mine", "8080"), ("mine", "8090-8092")]
    assert list(others.steered()) == []
    root = grants(POLICY, OTHER, trusted=True)
    assert granted(root, SERVER_IP, 8000)
    assert granted(root, SERVER_IP, 9000)
    assert [(r.name, str(p)) for r, p in root.steered()] == [("mine", "8000-8100"), ("roots", "9000")]


def test_groups_count_also_the_supplementary_ones() -> None:
    text = POLICY.replace(f"user: {NOBODY}", "group: 4242")
    assert granted(grants(text, OTHER, 7, 4242), SERVER_IP, 8080)
    assert not granted(grants(text, OTHER, 7), SERVER_IP, 8080)


def test_a_listener_that_would_get_packets_of_somebody_elses_rule_is_refused() -> None:
    text = POLICY.replace("roots", "rest").replace(
        f"local: {SERVER_IP}, local_port: 9000", "local_port: 8080"
    )
    it = grants(text, NOBODY)
    assert "name: rest" in text
    assert not granted(it, "0.0.0.0", 8080), "it would also get 192.0.2.11:8080, which is root's"
    assert not granted(it, SERVER_IP, 8080), "a single port ranks before the range: root's rule decides"
    assert granted(it, SERVER_IP, 8090)


def test_one_users_rules_need_no_question_for_each() -> None:
    text = POLICY.replace(", ports: [8080, 8090-8092], quota: {frames: 1024}", "")
    text = text[: text.index("  - name: roots")]
    assert grants(text, NOBODY).permits is None
    assert grants(text, OTHER).permits is not None
    assert not granted(grants(text, OTHER), SERVER_IP, 8080)


def test_the_stricter_quota_counts() -> None:
    policy = parse_policy(POLICY.replace("frames: 1024", "frames: 1024, conns: 500, memory: 32M"))
    access = Access(policy)
    quota = access.quota(User(NOBODY, 0, frozenset(), False))
    assert (quota.conns, quota.memory, quota.frames) == (300, 32 << 20, 1024)
    quota = access.quota(User(OTHER, 0, frozenset(), False))
    assert (quota.conns, quota.memory, quota.frames) == (300, 64 << 20, None)


def test_names_that_are_not_here_are_told_with_their_rule() -> None:
    text = POLICY.replace(f"user: {NOBODY}", "user: [root, no-such-one], group: nor-this")
    with pytest.raises(PolicyError) as e:
        Access(parse_policy(text, "p.yaml"))
    line = text[: text.index("- name: mine")].count("\n") + 1
    assert str(e.value).splitlines() == [
        f"p.yaml:{line}:5: flows[0].allow.user: there is no user no-such-one on this machine: "
        "`getent passwd` lists those that there are",
        f"p.yaml:{line}:5: flows[0].allow.group: there is no group nor-this on this machine: "
        "`getent group` lists those that there are",
    ]


# ---- on an interface ---------------------------------------------------------------------------------------------


def site(text: str) -> DirectSite:
    return DirectSite(parse_policy(text, "p.yaml"))


@pytest.fixture
def broker(lab: Lab) -> Iterator[RunningBroker]:
    with netns.entered(lab.server_ns), running(lambda: site(POLICY), lab.server_ns) as it:
        yield it


@pytest.mark.netns
def test_an_unprivileged_user_gets_what_the_policy_allows(broker: RunningBroker, lab: Lab) -> None:
    with Child(broker.name, OTHER, lab.server_ns) as other:
        refused = other.do("hello")
        assert refused == {"error": errno.EACCES, "text": f"the policy allows user {OTHER} nothing"}
    with Child(broker.name, NOBODY, lab.server_ns) as child:
        app = child.do("hello")
        assert child.do("grants") == {"grants": ["mine", "mine"]}
        assert "lease" in child.do("listen", host=SERVER_IP, port=8080)
        for port in (8000, 9000):
            assert child.do("listen", host=SERVER_IP, port=port)["error"] == errno.EACCES
        header = broker.server.broker.apps[app["app"]].memory.header
        assert header.config.max_conns == 300
        assert os.sched_getaffinity(child.process.pid) == {0}
        size = header.dev_size
        assert 1024 * 2048 < size < 1024 * 2048 * 1.2, "1024 frames, their metadata, and the rings' state"
        with Child(broker.name, OTHER, lab.server_ns) as relative:
            assert relative.do("hello", app=app["app"], token=app["token"])["app"] == app["app"], (
                "it has the token"
            )


@pytest.mark.netns
def test_an_application_that_needs_more_memory_than_it_may_have_is_refused(lab: Lab) -> None:
    text = POLICY.replace("memory: 64M", "memory: 4M")
    with netns.entered(lab.server_ns), running(lambda: site(text), lab.server_ns) as broker:
        with Child(broker.name, NOBODY, lab.server_ns) as child:
            refused = child.do("hello")
            assert refused["error"] == errno.EDQUOT
            assert "may have 4096 KiB" in refused["text"]
        assert not broker.server.broker.apps


@pytest.mark.netns
def test_memory_lies_on_the_node_that_the_policy_names(lab: Lab) -> None:
    text = POLICY.replace("cpus: [0]", "numa: 0")
    with netns.entered(lab.server_ns), running(lambda: site(text), lab.server_ns) as broker:
        client = broker.client()
        client.hello()
        assert lib.app_valid(client.header(), client.header().size)
    text = POLICY.replace("cpus: [0]", "numa: 1000")
    with (
        netns.entered(lab.server_ns),
        running(lambda: site(text), lab.server_ns) as broker,
        Child(broker.name, NOBODY, lab.server_ns) as child,
    ):
        assert "NUMA node 1000" in child.do("hello")["text"]
