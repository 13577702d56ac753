# SPDX-License-Identifier: Apache-2.0
"""Messages of the broker: as C lays them out, both ways, whatever is in them."""

from __future__ import annotations

import os
import socket
from dataclasses import fields

import pytest
from bypass._core import ffi, lib
from hypothesis import given
from hypothesis import strategies as st

from bypass.broker import protocol
from bypass.broker.protocol import SIZE, Kind, Message

U16, U32 = st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF)
ADDRESSES = st.tuples(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str), U16).filter(
    lambda a: not a[0].startswith("::ffff:")
)
MESSAGES = st.builds(
    Message,
    type=U16,
    error=U16,
    seq=U32,
    app=U32,
    lease=U32,
    local=ADDRESSES,
    remote=ADDRESSES,
    kind=U32,
    flags=U32,
    mtu=U16,
    last_port=U16,
    last_remote_port=U16,
    prefix_len=st.integers(0, 255),
    remote_prefix_len=st.integers(0, 255),
    index=U32,
    mac=st.binary(min_size=6, max_size=6),
    abi=U16,
    token=st.binary(min_size=16, max_size=16),
    name=st.text(st.characters(exclude_characters="\0", codec="ascii"), max_size=31),
    text=st.text(st.characters(exclude_characters="\0", codec="ascii"), max_size=159),
)


def test_every_field_of_the_struct_is_one_of_the_message() -> None:
    assert [f.name for f in fields(Message)] == [name for name, _ in ffi.typeof("struct app_msg").fields]
    named = {n.removeprefix("APP_"): v for n, v in ffi.typeof("enum app_msg_type").relements.items()}
    assert {kind.name: kind.value for kind in Kind} == named


@given(MESSAGES)
def test_what_is_packed_is_unpacked(message: Message) -> None:
    assert Message.unpack(message.pack()) == message


@given(st.binary(min_size=SIZE, max_size=SIZE))
def test_any_bytes_of_the_right_size_are_a_message(data: bytes) -> None:
    Message.unpack(data).pack()


@given(st.binary(max_size=2 * SIZE).filter(lambda data: len(data) != SIZE))
def test_other_sizes_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="a message has"):
        Message.unpack(data)


def test_a_long_text_is_cut_between_characters_and_ends_with_zero() -> None:
    raw = Message(Kind.LEASE, text="ä" * 200, name="n" * 40).pack()
    m = ffi.from_buffer("struct app_msg *", raw)
    assert m.text[159] == b"\0"
    assert ffi.string(m.text).decode() == "ä" * 79
    assert ffi.string(m.name) == b"n" * (lib.APP_NAME - 1)


def test_descriptors_travel_and_too_many_are_told() -> None:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with a, b:
        reader, writer = os.pipe()
        assert protocol.send(a, b"x", [writer])
        os.close(writer)
        got = protocol.receive(b)
        assert got is not None
        data, fds, whole = got
        assert (data, whole) == (b"x", True)
        os.write(fds[0], b"through")
        assert os.read(reader, 10) == b"through"
        os.close(fds[0])
        assert protocol.send(a, b"y", [reader] * (protocol.MAX_FDS + 3))
        os.close(reader)
        got = protocol.receive(b)
        assert got is not None
        assert len(got[1]) <= protocol.MAX_FDS + 1
        assert not got[2]
        for fd in got[1]:
            os.close(fd)
        assert protocol.receive(b) is None
        a.close()
        assert protocol.receive(b) == (b"", [], True)


def test_no_room_is_no_error_and_a_peer_that_is_gone_is() -> None:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with a, b:
        sent = 0
        while protocol.send(a, bytes(SIZE)):
            sent += 1
            assert sent < 100_000
        assert sent
        b.close()
        with pytest.raises(OSError, match=r"[Bb]roken|reset"):
            protocol.send(a, b"z")
