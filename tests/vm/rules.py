# SPDX-License-Identifier: Apache-2.0
"""A policy's rules in a port's hardware: inside the machine net_tap has some, the kernel's tc."""

from __future__ import annotations

import json
import socket
from pathlib import Path

from inside import (
    HERE,
    check,
    check_frames,
    echo,
    fetch,
    ping,
    refusal,
    served,
    sh,
    tell,
)  # fmt: skip

from bypass import netns

TAP_ADDRESS, TAP_PEER = "203.0.113.2", "203.0.113.1"
DATAGRAMS = 40


def rules_in_hardware() -> None:
    """net_tap puts rules of rte_flow into the kernel's tc, on the way of what the kernel sends there: its hardware."""
    policy, ranges = HERE / "dpdk-tap.yaml", Path("/run/ranges.yaml")
    ranges.write_text(policy.read_text().replace("local_port: 8080", "local_port: 8080-8081"))
    said = refusal(ranges)
    check("'web': Operation not supported" in said, f"tc has no masks of ports, and all is undone: {said}")
    with served(policy, TAP_ADDRESS, "peer") as server:
        sh(f"ip -n peer addr add {TAP_PEER}/24 dev dtap0 && ip -n peer link set dtap0 up")
        rtt, rate, answers = echo(TAP_ADDRESS), fetch(TAP_ADDRESS), ping(TAP_ADDRESS)
        with netns.run("peer", socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as s:
            for _ in range(DATAGRAMS):
                s.sendto(b"?", (TAP_ADDRESS, 9))
        drops, by_queue = tc_counts()
    about = server.about
    seen = about["more"]["filter"]
    check(
        (drops, seen["dropped"]) == (DATAGRAMS, 0),
        f"a drop rule: {drops} of {DATAGRAMS} datagrams dropped by tc, {seen['dropped']} left to the classifier",
    )
    queues = {q: rx for q, (rx, _) in about["queues"].items()}
    check(
        all(queues[q] >= by_queue.get(q, 0) > 0 for q in "01"),
        f"steered frames are on queue 1, all else on queue 0: {queues}; tc had sent {by_queue} when asked",
    )
    check_frames(about)
    row = {"device": "dtap0", "driver": about["mode_reason"], "path": about["hardware"]}
    tell(row={**row, "http": rate, "echo": rtt, "ping": answers})


def tc_counts() -> tuple[int, dict[str, int]]:
    """Packets that rules of tc have dropped on their way to the port, and those sent to each queue."""
    filters = json.loads(sh("tc -n peer -j -s filter show dev dtap0"))
    drops, queues = 0, dict[str, int]()
    for action in [a for f in filters for a in f.get("options", {}).get("actions", [])]:
        if action["control_action"]["type"] == "drop":
            drops += action["stats"]["drops"]
        else:
            queue = str(action["queue_mapping"])
            queues[queue] = queues.get(queue, 0) + action["stats"]["packets"]
    return drops, queues
