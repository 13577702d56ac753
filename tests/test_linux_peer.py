# SPDX-License-Identifier: Apache-2.0
"""The stack on a veth with Linux at the other end, in both roles: bytes, losses, many connections, foreign packets."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from backends import finds, policy_for
from peer import (
    POLICY,
    SERVER_PORT,
    Peer,
    Sniffer,
    Thrower,
    client_socket,
    curl,
    ip_packets,
    server_socket,
    tcp_segment,
)
from support import WAIT_S

from bench.loss import loss
from bypass import netns
from bypass.demo import make_body
from bypass.lab import CLIENT_IP, SERVER_IP, Lab

pytestmark = [pytest.mark.netns, pytest.mark.backends, pytest.mark.timeout(300)]

URL = f"http://{SERVER_IP}:{SERVER_PORT}"
SYN, RST, PSH, ACK = 2, 4, 8, 16


def quiet_audit(peer: Peer) -> dict:
    """Once nothing of a connection is left but TIME_WAIT, which holds no memory but its own. The last FINs may still be
    on their way, and the server's program may not have closed yet, when the client has ended."""
    deadline = time.monotonic() + WAIT_S
    while (audit := peer.do("audit"))["stack"]["frames"] or set(audit["states"]) - {"TIME_WAIT"}:
        assert time.monotonic() < deadline, audit
        time.sleep(0.05)
    waiting = audit["states"].get("TIME_WAIT", 0)
    assert audit["states"] == ({"TIME_WAIT": waiting} if waiting else {})
    stack = audit["stack"]
    assert stack["conns"] == waiting
    assert stack["timers"] == waiting
    assert {k: stack[k] for k in ("chunks", "frags", "dst_waiting", "frames", "tx_pending")} == dict.fromkeys(
        ("chunks", "frags", "dst_waiting", "frames", "tx_pending"), 0
    )
    assert stack["handles"] == stack["listeners"] + stack["udp_socks"]
    return audit


def test_a_gigabyte_each_way_arrives_unharmed(lab: Lab, tmp_path: Path) -> None:
    size = 200_000_000 if lab.wire else 1_000_000_000  # net_af_packet is a system call a packet and a copy
    digest = make_body(tmp_path / "body.bin", size)
    with Peer(lab, tmp_path) as peer:
        peer.do("listen", port=SERVER_PORT)
        argv = lab.command("client", ["curl", "-sS", "--fail", "--max-time", "120", f"{URL}/body.bin"])
        got = hashlib.sha256()
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as download:
            assert download.stdout is not None
            while piece := download.stdout.read(1 << 20):
                got.update(piece)
        assert download.returncode == 0
        assert got.hexdigest() == digest
        up = curl(lab, "--upload-file", str(tmp_path / "body.bin"), f"{URL}/up")
        assert up.stdout.decode().strip() == digest
        audit = quiet_audit(peer)
        assert audit["stats"].get("tcp_out_retransmits", 0) < 100  # nothing dropped on purpose here


def test_bytes_arrive_through_two_percent_of_loss_each_way(lab: Lab, tmp_path: Path) -> None:
    digest = make_body(tmp_path / "body.bin", 20_000_000)
    with Peer(lab, tmp_path) as peer:
        peer.do("listen", port=SERVER_PORT)
        with loss(lab, 20_000) as seen:
            down = curl(lab, f"{URL}/body.bin")
            up = curl(lab, "--upload-file", str(tmp_path / "body.bin"), f"{URL}/up")
        assert hashlib.sha256(down.stdout).hexdigest() == digest
        assert up.stdout.decode().strip() == digest
        print(f"dropped of seen: {seen}; {peer.do('audit')['stats']}")
    for dropped, total in seen.values():
        assert 0.01 < dropped / total < 0.03
        assert dropped > 20


def test_linux_opens_fast_to_the_stack(lab: Lab, tmp_path: Path) -> None:
    """RFC 7413: the first connection brings a cookie, the second has its request in the SYN."""
    (tmp_path / "x").write_bytes(b"hello")
    request = b"GET /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with Peer(lab, tmp_path) as peer:
        peer.do("listen", port=SERVER_PORT, fastopen=16)
        for taken in range(3):
            with client_socket(lab) as client:
                client.settimeout(
                    None
                )  # else the socket does not block, and the first call only asks for a cookie
                assert client.sendto(request, socket.MSG_FASTOPEN, (SERVER_IP, SERVER_PORT)) == len(request)
                answer = b""
                while piece := client.recv(4096):
                    answer += piece
                assert answer.endswith(b"hello")
                info = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)
                assert bool(info[5] & 32) == (taken > 0), "TCPI_OPT_SYN_DATA"
            stats = peer.do("audit")["stats"]
            assert stats.get("tcp_fastopen_passive", 0) == taken
        assert stats["tcp_fastopen_cookies"] == 1


def test_the_stack_opens_fast_to_linux(lab: Lab, tmp_path: Path) -> None:
    netns.run(lab.client_ns, Path("/proc/sys/net/ipv4/tcp_fastopen").write_text, "3")
    with Peer(lab, tmp_path) as peer, client_socket(lab) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)
        listener.bind((CLIENT_IP, 8000))
        listener.listen(16)

        def serve() -> None:
            for _ in range(3):
                served, _ = listener.accept()
                with served:
                    while piece := served.recv(4096):
                        served.sendall(piece.upper())

        thread = threading.Thread(target=serve)
        thread.start()
        for _ in range(3):
            assert peer.do("fastopen", host=CLIENT_IP, port=8000, text="hello") == {"text": "HELLO"}
        thread.join(10)
        stats = peer.do("audit")["stats"]
        assert (stats["tcp_fastopen_active"], stats["tcp_fastopen_active_taken"]) == (2, 2)


def test_the_stack_as_a_client_of_linux(lab: Lab, tmp_path: Path) -> None:
    digest = make_body(tmp_path / "body.bin", 50_000_000)
    argv = [sys.executable, "-m", "http.server", "8000", "--bind", CLIENT_IP, "--directory", str(tmp_path)]
    kernel = subprocess.Popen(
        lab.command("client", argv), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        with Peer(lab, tmp_path) as peer:
            deadline = time.monotonic() + 20
            while (
                True
            ):  # the kernel's server takes a moment; until then the stack is refused, as it should be
                answer = peer.do("fetch", host=CLIENT_IP, port=8000, path="/body.bin")
                if answer.get("errno") != 111 or time.monotonic() > deadline:
                    break
                time.sleep(0.05)
            assert answer == {"sha256": digest, "length": 50_000_000}
    finally:
        kernel.kill()
        kernel.wait()


def test_datagrams_come_back_whatever_their_size(lab: Lab, tmp_path: Path) -> None:
    with Peer(lab, tmp_path) as peer:
        peer.do("echo", port=7)
        with client_socket(lab, socket.SOCK_DGRAM) as s:
            s.connect((SERVER_IP, 7))
            for size in (0, 1, 63, 64, 255, 256, 257, 1000, 1471, 1472):
                data = bytes(i & 255 for i in range(size))
                s.send(data)
                assert s.recv(65536) == data
        assert peer.do("audit")["stats"]["udp_in"] == 10


CLIENTS = """
import asyncio, sys
host, port, total, at_once, who_closes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
left, done = total, 0
close = b"Connection: close\\r\\n" if who_closes == "server" else b""

async def client():
    global left, done
    while left > 0:
        left -= 1
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"GET /small HTTP/1.1\\r\\n" + close + b"\\r\\n")
        head = await reader.readuntil(b"\\r\\n\\r\\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        assert await reader.readexactly(5) == b"small"
        if who_closes == "server":
            assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        done += 1

async def main():
    await asyncio.gather(*(client() for _ in range(at_once)))
    print(done)

asyncio.run(main())
"""


@pytest.mark.parametrize(("total", "who_closes"), [(10_000, "client"), (500, "server")])
def test_two_hundred_clients_at_once_and_nothing_leaks(
    lab: Lab, tmp_path: Path, total: int, who_closes: str
) -> None:
    (tmp_path / "small").write_text("small")
    with Peer(lab, tmp_path) as peer:
        peer.do("listen", port=SERVER_PORT)
        argv = [sys.executable, "-c", CLIENTS, SERVER_IP, str(SERVER_PORT), str(total), "200", who_closes]
        done = subprocess.run(
            lab.command("client", argv), capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert int(done.stdout) == total
        audit = quiet_audit(peer)
        assert audit["requests"] == total
        assert audit["stats"]["tcp_accepted"] == total
        assert audit["states"] == ({} if who_closes == "client" else {"TIME_WAIT": total})
        frames = audit["frames"]
        print(json.dumps(frames))


def test_connections_that_the_kernel_held_survive_the_start(lab: Lab, tmp_path: Path) -> None:
    """The kernel's server on the port has gone, its connection lives; then bypass takes the port."""
    (tmp_path / "small").write_text("small")
    with contextlib.ExitStack() as undo:
        listener = undo.enter_context(server_socket(lab))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((SERVER_IP, SERVER_PORT))
        listener.listen()
        old = undo.enter_context(client_socket(lab))
        old.connect((SERVER_IP, SERVER_PORT))
        served, _ = listener.accept()
        undo.enter_context(served)
        served.settimeout(10)
        listener.close()

        def old_works(text: bytes) -> None:
            old.sendall(text)
            assert served.recv(100) == text
            served.sendall(text.upper())
            assert old.recv(100) == text.upper()

        old_works(b"before")
        sniffer = undo.enter_context(Sniffer(lab))
        with Peer(lab, tmp_path) as peer:
            peer.do("listen", port=SERVER_PORT)
            old_works(b"while bypass has the port")
            assert curl(lab, f"{URL}/small").stdout == b"small"
            old_works(b"and after others came and went")
            assert peer.do("audit")["reasons"]["draining"] > 0
            old.close()
            assert served.recv(1) == b""
            served.close()
            assert curl(lab, f"{URL}/small").stdout == b"small"
        assert sniffer.resets == []


def test_no_reset_meets_a_live_connection_whatever_is_thrown_at_it(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "small").write_text("small")
    with contextlib.ExitStack() as undo:
        peer = undo.enter_context(Peer(lab, tmp_path))
        peer.do("listen", port=SERVER_PORT)
        live = undo.enter_context(client_socket(lab))
        live.connect((SERVER_IP, SERVER_PORT))
        request = b"GET /small HTTP/1.1\r\n\r\n"

        def works() -> None:
            live.sendall(request)
            got = b""
            while not got.endswith(b"small"):
                piece = live.recv(1000)
                assert piece, "the connection ended"
                got += piece

        works()
        us, them = live.getsockname(), (SERVER_IP, SERVER_PORT)
        thrower = Thrower(lab)
        undo.callback(thrower.close)
        sniffer = undo.enter_context(Sniffer(lab))
        packets = []
        for i in range(200):
            wild = i * 21_474_836
            for flags in (ACK, PSH | ACK, SYN, SYN | ACK, 0, RST):
                segment = tcp_segment(us, them, wild, wild * 7, flags, b"stray" * (flags & PSH))
                packets += ip_packets(CLIENT_IP, SERVER_IP, segment)
            whole = tcp_segment(us, them, wild, wild * 3, PSH | ACK, b"in pieces" * 20)
            packets += ip_packets(CLIENT_IP, SERVER_IP, whole, pieces=3, ident=i + 1)
            packets += reversed(ip_packets(CLIENT_IP, SERVER_IP, whole, pieces=2, ident=i + 1000))
        thrower.throw(packets)
        works()
        time.sleep(0.3)  # a reset that somebody owes would come by now
        works()
        mine = [r for r in sniffer.resets if r == (SERVER_PORT, us[1])]
        assert mine == []
        audit = peer.do("audit")
        assert not finds(lab, "fragments") or audit["reasons"]["tcp_fragment"] >= 200
        assert audit["stats"]["tcp_in_reset_ignored"] > 0


def test_a_killed_server_leaves_the_port_to_the_kernel(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "small").write_text("small")
    with contextlib.ExitStack() as undo, Peer(lab, tmp_path) as peer:
        peer.do("listen", port=SERVER_PORT)
        assert curl(lab, f"{URL}/small").stdout == b"small"
        open_one = undo.enter_context(client_socket(lab))
        open_one.connect((SERVER_IP, SERVER_PORT))
        peer.kill()
        deadline = time.monotonic() + 10  # on DPDK it passes: nobody answers there
        while True:
            with client_socket(lab) as s:
                s.settimeout(0.02)
                try:
                    s.connect((SERVER_IP, SERVER_PORT))
                except ConnectionRefusedError:
                    break
                except TimeoutError:
                    pass
            assert time.monotonic() < deadline, "nobody answers for the port"
        open_one.sendall(b"x")
        with pytest.raises(ConnectionResetError):
            open_one.recv(1)
    with Peer(lab, tmp_path) as again:
        again.do("listen", port=SERVER_PORT)
        assert curl(lab, f"{URL}/small").stdout == b"small"


def test_closing_a_listener_gives_the_port_back_to_the_kernel(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "small").write_text("small")
    with Peer(lab, tmp_path) as peer:
        peer.do("listen", port=SERVER_PORT)
        assert curl(lab, f"{URL}/small").stdout == b"small"
        peer.do("unlisten", port=SERVER_PORT)
        with client_socket(lab) as s, pytest.raises(ConnectionRefusedError):
            s.connect((SERVER_IP, SERVER_PORT))


def test_many_slow_readers_do_not_stop_the_others(lab: Lab, tmp_path: Path) -> None:
    """Clients that ask for much and read nothing: frames stay bounded, a small request is still answered."""
    make_body(tmp_path / "body.bin", 8_000_000)
    (tmp_path / "small").write_text("small")
    with contextlib.ExitStack() as undo:
        peer = undo.enter_context(Peer(lab, tmp_path))
        peer.do("listen", port=SERVER_PORT)
        for _ in range(40):
            lazy = undo.enter_context(client_socket(lab))
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lazy.connect((SERVER_IP, SERVER_PORT))
            lazy.sendall(b"GET /body.bin HTTP/1.1\r\n\r\n")
        time.sleep(0.5)
        for _ in range(20):
            assert curl(lab, f"{URL}/small", timeout_s=20).stdout == b"small"


def test_threads_of_a_kernel_client_write_while_they_read(lab: Lab, tmp_path: Path) -> None:
    """Both directions at once over one connection, pipelined."""
    (tmp_path / "small").write_text("small")
    count = 3000
    with Peer(lab, tmp_path) as peer, client_socket(lab) as s:
        peer.do("listen", port=SERVER_PORT)
        s.connect((SERVER_IP, SERVER_PORT))
        writer = threading.Thread(target=s.sendall, args=(b"GET /small HTTP/1.1\r\n\r\n" * count,))
        writer.start()
        got = b""
        while got.count(b"HTTP/1.1 200") < count or not got.endswith(b"small"):
            piece = s.recv(1 << 16)
            assert piece
            got += piece
        writer.join()
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


INSIDE_A_LOOP = """
import asyncio, sys, bypass, bypass.aio

async def main():
    with bypass.Stack.from_policy(sys.argv[1]) as stack:
        reader, writer = await bypass.aio.open_connection(stack, sys.argv[2], 8000)
        writer.write(b"hello")
        print((await reader.readexactly(5)).decode())
        writer.close()

asyncio.run(main())
"""


def test_a_stack_is_opened_and_closed_inside_a_coroutine(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(policy_for(lab, POLICY))
    with client_socket(lab) as listener:
        listener.bind((CLIENT_IP, 8000))
        listener.listen()
        argv = [sys.executable, "-c", INSIDE_A_LOOP, str(tmp_path / "policy.yaml"), CLIENT_IP]
        program = subprocess.Popen(
            lab.command("server", argv), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            served, _ = listener.accept()
            with served:
                served.sendall(served.recv(100))
                assert program.communicate(timeout=30)[0] == "hello\n"
            assert program.returncode == 0
        finally:
            program.kill()
            program.wait()
