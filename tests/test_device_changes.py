# SPDX-License-Identifier: Apache-2.0
"""What the administrator changes while an embedded stack serves: addresses, neighbours, routes of the interface, or of
the kernel's device of the port. The peer is Linux."""

from __future__ import annotations

import errno
import socket
import subprocess

import pytest
from test_sockets_embedded import connected, readable, serving, stack  # noqa: F401 (fixture)

from bypass import Stack, netns
from bypass.lab import CLIENT_IFNAME, CLIENT_IP, CLIENT_NET, CLIENT_NET_IP, SERVER_IFNAME, SERVER_IP, Lab

pytestmark = [pytest.mark.netns, pytest.mark.backends]

SECOND = "192.0.2.11"
MAC = "02:00:5e:00:53:99"


def ip(ns: str, *args: str) -> None:
    subprocess.run(["ip", "-n", ns, *args], check=True, capture_output=True, timeout=60)


def has(stack: Stack, address: str) -> bool:  # noqa: F811
    with stack.socket(socket.SOCK_DGRAM) as sock:
        try:
            sock.bind((address, 7))
        except OSError as e:
            if e.errno != errno.EADDRNOTAVAIL:
                raise
            return False
    return True


def test_an_address_that_is_added_is_served_and_one_that_is_taken_away_is_not(
    stack: Stack,  # noqa: F811
    lab: Lab,
) -> None:
    with stack.create_server(("", 8090)) as server:
        server.settimeout(20)
        assert not has(stack, SECOND)
        ip(lab.server_ns, "addr", "add", f"{SECOND}/24", "dev", SERVER_IFNAME)
        assert serving(stack, lambda: has(stack, SECOND))
        with connected(lab, (SECOND, 8090)) as client:
            connection, peer = server.accept()
            assert (connection.getsockname(), peer) == ((SECOND, 8090), client.getsockname())
            client.send(b"to the new one")
            assert connection.recv(100) == b"to the new one"
            connection.close()
        ip(lab.server_ns, "addr", "del", f"{SECOND}/24", "dev", SERVER_IFNAME)
        assert serving(stack, lambda: not has(stack, SECOND))
        with connected(lab, (SECOND, 8090)), connected(lab, (SERVER_IP, 8090)) as client:
            connection, peer = server.accept()
            assert (connection.getsockname(), peer) == ((SERVER_IP, 8090), client.getsockname())
            connection.close()
            server.settimeout(0.3)
            with pytest.raises(TimeoutError):
                server.accept()


def test_a_neighbour_with_another_mac_address_is_followed(stack: Stack, lab: Lab) -> None:  # noqa: F811
    with stack.create_server((SERVER_IP, 8080)) as server, connected(lab, (SERVER_IP, 8080)) as client:
        server.settimeout(20)
        connection, _ = server.accept()
        connection.sendall(b"before")
        assert serving(stack, lambda: readable(client))
        assert client.recv(100) == b"before"
        ip(lab.client_ns, "link", "set", CLIENT_IFNAME, "address", MAC)
        ip(lab.server_ns, "neigh", "replace", CLIENT_IP, "lladdr", MAC, "dev", SERVER_IFNAME)
        connection.sendall(b"after")
        assert serving(stack, lambda: readable(client))
        assert client.recv(100) == b"after"
        connection.close()


def test_a_route_by_another_gateway_is_taken_at_once(stack: Stack, lab: Lab) -> None:  # noqa: F811
    """The first one leads nowhere; the connection goes on by the second."""
    ip(lab.client_ns, "addr", "add", "192.0.2.21/24", "dev", CLIENT_IFNAME)
    with netns.entered(lab.client_ns):
        client = socket.socket()
    with stack.create_server((SERVER_IP, 8080)) as server, client:
        server.settimeout(20)
        client.bind((CLIENT_NET_IP, 0))
        client.setblocking(False)
        client.connect_ex((SERVER_IP, 8080))
        connection, peer = server.accept()
        assert peer[0] == CLIENT_NET_IP
        ip(lab.server_ns, "neigh", "replace", "192.0.2.77", "lladdr", MAC, "dev", SERVER_IFNAME)
        ip(lab.server_ns, "route", "replace", CLIENT_NET, "via", "192.0.2.77")
        stack.run(timeout=0.2)
        connection.sendall(b"by another way")
        stack.run(timeout=0.3)
        assert not readable(client), "nobody is there"
        ip(lab.server_ns, "route", "replace", CLIENT_NET, "via", "192.0.2.21")
        assert serving(stack, lambda: readable(client))
        assert client.recv(100) == b"by another way"
        connection.close()
