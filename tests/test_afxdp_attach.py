# SPDX-License-Identifier: Apache-2.0
"""An AF_XDP device that several processes share: attached without a privilege, inherited by fork, left and taken up
again; and memory that is damaged is refused."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from afxdp_relative import NOBODY, Relative, View
from afxdp_support import Redirect, link, udp_clients
from bypass._core import ffi, lib

from bypass import netns
from bypass.lab import SERVER_IFNAME, Lab, wait_for

pytestmark = pytest.mark.netns

QUEUES = 2
OFFSET = 1 << 20  # where the device begins in its file: an application has other things in front of it
STATE, CONFIG, SOCKET = (lib.AFXDP_STEP_STATE, lib.AFXDP_STEP_CONFIG, lib.AFXDP_STEP_SOCKET)


class Opener(View):
    """Who opens the device, with all privileges, at OFFSET of a memory file that is larger."""

    def __init__(self, memfd: int) -> None:
        config = ffi.new(
            "struct afxdp_config *",
            {
                "ifname": SERVER_IFNAME.encode(),
                "queue_count": QUEUES,
                "queues": list(range(QUEUES)),
                "frames": 1024,
                "frame_size": 2048,
                "ring_size": 128,
                "fill_size": 256,
                "bind_wait_ms": 2000,
            },
        )
        self.config = config
        self.size = int(lib.afxdp_mem_size(config))
        os.ftruncate(memfd, OFFSET + self.size + 4096)
        super().__init__(memfd)
        error = ffi.new("struct afxdp_error *")
        at = ffi.from_buffer("uint8_t[]", self.map) + OFFSET
        self.dev = lib.afxdp_open(config, at, self.size, error)
        assert self.dev != ffi.NULL, (error.err, error.step)
        self.become(self.dev)
        self.fds = [int(lib.afxdp_fd(self.dev, i)) for i in range(QUEUES)]

    def audit(self) -> dict[str, int]:
        """Where the frames are, once nothing is under transmission any more; asserts that the counts agree."""
        out, done = ffi.new("struct frame_audit *"), ffi.new("bypass_pkt[]", 64)

        def quiet() -> bool:
            with self.using():
                self.nd.ops.reap(self.nd, done, 64)
                assert lib.afxdp_audit(self.dev, out) == 0
            return int(out.tx) == 0

        wait_for(quiet, 5, "transmissions to complete")
        return {name: int(getattr(out, name)) for name, _ in ffi.typeof("struct frame_audit").fields}


AT_REST = {
    "frames": 1024,
    "free": 512,
    "stack": 0,
    "tx": 0,
    "stack_tx": 0,
    "rx": 512,
    "misplaced": 0,
    "bad_free": 0,
}


@pytest.fixture
def opener(lab: Lab) -> Iterator[Opener]:
    """With all UDP and TCP of the server's interface steered into it."""
    memfd = os.memfd_create("attach", os.MFD_CLOEXEC)
    with ExitStack() as stack:
        stack.callback(os.close, memfd)
        with netns.entered(lab.server_ns):
            it = Opener(memfd)
            stack.callback(lambda: it.dev != ffi.NULL and it.close())
            stack.enter_context(Redirect(SERVER_IFNAME, dict(enumerate(it.fds))))
        yield it


@pytest.fixture
def relative(lab: Lab, opener: Opener) -> Iterator[Callable[[], Relative]]:
    """Makes processes that have a view of the opener's device, in the server's namespace."""
    with ExitStack() as stack:

        def make(ns: str = lab.server_ns) -> Relative:
            with netns.entered(ns):
                it = stack.enter_context(Relative(opener.memfd))
            assert it.call("attach", OFFSET, fds=opener.fds) is None
            return it

        yield make


@pytest.fixture
def exchange(lab: Lab) -> Iterator[Callable[[range], list[int]]]:
    """Sends datagrams with these numbers by many flows, one after another; the numbers of the answers."""
    with udp_clients(lab) as make:
        socks = [make() for _ in range(16)]

        def send(numbers: range) -> list[int]:
            back = []
            for first in range(numbers.start, numbers.stop, len(socks)):
                some = list(zip(range(first, numbers.stop), socks, strict=False))
                for n, s in some:
                    s.send(b"%d" % n)
                back += [int(s.recv(100)) for _, s in some]
            return back

        yield send


# ---- Sharing ------------------------------------------------------------------------------------------------------
def test_a_process_without_any_capability_receives_and_sends(
    opener: Opener, relative: Callable[..., Relative], exchange: Callable[[range], list[int]]
) -> None:
    it = relative()
    assert it.call("privileges") == {
        "Uid": "\t".join([str(NOBODY)] * 4),
        "CapPrm": "0" * 16,
        "CapEff": "0" * 16,
    }
    it.begin("echo", 200)
    assert exchange(range(200)) == list(range(200))
    assert sorted(it.end()) == list(range(200))
    assert opener.audit() == AT_REST


def test_relatives_in_turn_lose_no_packet_and_no_frame(
    opener: Opener, relative: Callable[..., Relative], exchange: Callable[[range], list[int]]
) -> None:
    """Each finds the rings where the other has left them; positions go around the rings several times."""
    relatives = [relative(), relative()]
    for turn in range(100):
        mine = range(16 * turn, 16 * turn + 16)
        it = relatives[turn % 2]
        it.begin("echo", mine.stop)
        assert exchange(mine) == list(mine)
        assert sorted(it.end()) == list(mine)
    assert opener.audit() == AT_REST


def test_relatives_at_the_same_time_lose_no_packet_and_no_frame(
    opener: Opener, relative: Callable[..., Relative], exchange: Callable[[range], list[int]]
) -> None:
    relatives = [relative(), relative()]
    for it in relatives:
        it.begin("echo", 2000, 2)
    assert exchange(range(2000)) == list(range(2000))
    assert sorted(n for it in relatives for n in it.end()) == list(range(2000))
    assert opener.audit() == AT_REST


def test_a_forked_child_goes_on_with_the_view_that_it_inherits(
    opener: Opener, relative: Callable[..., Relative], exchange: Callable[[range], list[int]]
) -> None:
    """And its parent after it; of one who attached and of the one who opened."""
    it = relative()
    for turn in range(6):
        mine = range(160 * turn, 160 * turn + 160)
        it.begin("forked_echo" if turn % 2 else "echo", mine.stop)
        assert exchange(mine) == list(mine)
        assert sorted(it.end()) == list(mine)
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(exchange, range(960, 1120))
        assert sorted(opener.forked_echo(1120)) == list(range(960, 1120))
        assert answers.result() == list(range(960, 1120))
    assert opener.audit() == AT_REST


def test_what_arrives_while_nobody_has_a_view_is_there_for_the_next(
    opener: Opener, relative: Callable[..., Relative], lab: Lab
) -> None:
    it = relative()
    it.call("detach")
    with udp_clients(lab) as make:
        s = make()
        for n in range(50):
            s.send(b"%d" % n)
        assert it.call("attach", OFFSET, fds=opener.fds) is None
        assert it.call("echo", 50) == list(range(50))
        assert [int(s.recv(100)) for _ in range(50)] == list(range(50))
    assert opener.audit() == AT_REST


def test_the_device_outlives_the_view_that_opened_it(
    opener: Opener, relative: Callable[..., Relative], exchange: Callable[[range], list[int]]
) -> None:
    it = relative()
    opener.detach()
    it.begin("echo", 200)
    assert exchange(range(200)) == list(range(200))
    it.end()
    assert it.call("close") == 0


def test_frames_that_one_holds_are_not_free_for_the_other(
    opener: Opener, relative: Callable[..., Relative]
) -> None:
    """free_frames is what a stack looks at before it takes any."""
    it = relative()
    held = it.call("take", 100)
    with opener.using():
        assert opener.nd.free_frames == 412
    assert set(held).isdisjoint(opener.take(412))
    assert opener.take(1) == []
    it.call("give", held)
    with opener.using():
        assert opener.nd.free_frames == 100


def test_a_view_knows_what_the_opener_knows(
    opener: Opener, relative: Callable[..., Relative], lab: Lab
) -> None:
    """And a changed MTU, from every network namespace."""
    here, elsewhere = relative(), relative(lab.client_ns)
    about = opener.about()
    assert about["mac"] == lab.sides()[0].mac  # type: ignore[index]
    assert (about["health"], about["mtu"], about["queues"], about["queues_now"]) == (0, 1500, QUEUES, QUEUES)
    assert here.call("about") == about
    assert elsewhere.call("about") == about | {"queues_now": -errno.EXDEV}
    link(lab.server_ns, SERVER_IFNAME, mtu=1400)
    assert here.call("about")["mtu"] == 1400
    assert elsewhere.call("about")["mtu"] == 1400
    with opener.using():
        assert opener.nd.mtu == 1400
    link(lab.server_ns, SERVER_IFNAME, state="down")
    assert elsewhere.call("about")["health"] == -errno.ENETDOWN


def test_a_view_of_some_queues_leaves_the_others_alone(
    opener: Opener, relative: Callable[..., Relative], lab: Lab
) -> None:
    """Their packets wait for a view that has them."""
    it = relative()
    it.call("detach")
    assert it.call("attach", OFFSET, fds=opener.fds[:1]) is None
    with udp_clients(lab) as make:
        socks = [make() for _ in range(64)]
        for n, s in enumerate(socks):
            s.send(b"%d" % n)
        first: list[tuple[int, int]] = []
        wait_for(lambda: not first.extend(it.call("receive")) and bool(first), 5, "packets of queue 0")
        rest: list[tuple[int, int]] = []
        wait_for(lambda: not rest.extend(opener.receive()) and len(first + rest) == 64, 5, "all packets")
    assert {q for _, q in first} == {0}
    assert 1 in {q for _, q in rest}
    assert opener.audit() == AT_REST


def test_a_view_of_some_queues_meets_what_one_of_all_queues_left(
    opener: Opener, relative: Callable[..., Relative], lab: Lab
) -> None:
    """Every queue is short of frames, and it is another queue's turn."""
    it = relative()
    it.call("detach")
    assert it.call("attach", OFFSET, fds=opener.fds[:1]) is None
    taken = opener.take(512)
    held: list[tuple[int, int, int]] = []
    with udp_clients(lab) as make:
        socks = [make() for _ in range(64)]
        for n, s in enumerate(socks):
            s.send(b"%d" % n)
        wait_for(lambda: not held.extend(opener.hold()) and len(held) == 64, 5, "all packets")
        assert {queue for _, queue, _ in held} == {0, 1}
        socks[next(n for _, queue, n in held if queue == 0)].send(b"64")
        wait_for(lambda: not held.extend(opener.hold()) and len(held) == 65, 5, "the last packet, of queue 0")
    it.call("give", taken)
    assert it.call("receive") == []
    opener.give([frame for frame, _, _ in held])
    assert opener.audit() == AT_REST


@pytest.mark.parametrize("lab", [{"queues": 4}], indirect=True)
def test_queues_that_are_added_later_are_served_by_each_view_that_takes_them(
    opener: Opener, relative: Callable[..., Relative], lab: Lab
) -> None:
    """The first of them, here without a privilege, makes the queue's books."""
    one, error, added = relative(), ffi.new("struct afxdp_error *"), []
    with ExitStack() as stack:
        with netns.entered(lab.server_ns):
            for number in (2, 3):
                added.append(int(lib.afxdp_more_socket(opener.config, number, opener.fds[0], error)))
                assert added[-1] >= 0, os.strerror(error.err)
                stack.callback(os.close, added[-1])
            assert lib.afxdp_more_socket(opener.config, 3, opener.fds[0], error) == -errno.EBUSY
            assert lib.afxdp_more_socket(opener.config, 9, opener.fds[0], error) == -errno.EINVAL
        assert one.call("take_queue", 4, fds=[opener.fds[1]]) == -errno.EXDEV, "the socket of another queue"
        assert one.call("take_queue", 4, fds=added[:1]) == 2
        assert opener.take_queue([added[1]], 4) == -errno.EXDEV, "queue 2 has a socket already"
        assert opener.take_queue([os.dup(added[0])], 4) == 2
        late = relative()
        late.call("detach")
        assert late.call("attach", OFFSET, fds=[*opener.fds, *added]) is None, "nobody has taken queue 3 yet"
        for view in (one, late):
            view.call("take_queue", 4, fds=[added[1]])
        assert opener.take_queue([os.dup(added[1])], 4) == 3
        assert [view.call("about")["queues"] for view in (one, late)] == [4, 4]
        audit = opener.audit()
        assert audit["rx"] == 2 * 256 + 2 * 128, "the first two come down to their share in use"
        assert opener.take_queue([os.dup(added[1])], 65) == -errno.ENOSPC


# ---- Refusing -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("what", "refusal"),
    [
        (lambda o: {"fds": o.fds, "offset": OFFSET + 64}, (errno.EINVAL, CONFIG)),
        (lambda o: {"fds": o.fds, "offset": OFFSET, "flags": 1}, (errno.EINVAL, CONFIG)),
        (lambda o: {"fds": [], "offset": OFFSET}, (errno.EINVAL, CONFIG)),
        (lambda o: {"fds": o.fds * 33, "offset": OFFSET}, (errno.EINVAL, CONFIG)),
        (lambda o: {"fds": [*o.fds, o.fds[0]], "offset": OFFSET}, (errno.EXDEV, SOCKET)),
        (lambda o: {"fds": o.fds, "offset": OFFSET, "size": 100}, (errno.EINVAL, CONFIG)),
        (lambda o: {"fds": o.fds, "offset": OFFSET, "size": o.size - 1}, (errno.EBADMSG, STATE)),
        (lambda o: {"fds": o.fds, "offset": 0}, (errno.EBADMSG, STATE)),
        (lambda o: {"fds": o.fds[::-1], "offset": OFFSET}, (errno.EXDEV, SOCKET)),
        (lambda o: {"fds": [o.fds[0], o.memfd], "offset": OFFSET}, (errno.EXDEV, SOCKET)),
        (lambda o: {"fds": [o.fds[0], -1], "offset": OFFSET}, (errno.EXDEV, SOCKET)),
    ],
)
def test_what_is_not_the_device_is_refused_and_descriptors_stay_the_callers(
    opener: Opener, what: Callable[[Opener], dict[str, Any]], refusal: tuple[int, int]
) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    assert View(opener.memfd).attach(**what(opener)) == refusal
    assert sorted(os.listdir("/proc/self/fd")) == before


CONFIG_AT = 8  # struct afxdp_state of bypass/afxdp/internal.h: magic, bytes, cfg, then numbers
AFTER = CONFIG_AT + ffi.sizeof("struct afxdp_config")
COOKIES = ((AFTER + 20 + 7) & ~7) + 8
FILL_TARGET = COOKIES + 8 * lib.AFXDP_MAX_QUEUES
QUEUE_STATE = (
    4 * 8 + 2 * 4 + ffi.sizeof("struct afxdp_counters") + 63
) & ~63  # at the end, one for each queue


def field(name: str) -> int:
    return CONFIG_AT + int(ffi.offsetof("struct afxdp_config", name))


@pytest.mark.parametrize(
    ("at", "was", "becomes"),
    [
        pytest.param(0, 0x41465831, 0, id="magic"),
        pytest.param(4, None, 64, id="another build"),
        pytest.param(field("frames"), 1024, 1025, id="frames"),
        pytest.param(field("frames"), 1024, 0xFFFFFFFF, id="frames wrap"),
        pytest.param(field("frame_size"), 2048, 4096, id="frame size"),
        pytest.param(field("frame_size"), 2048, 0, id="no frame size"),
        pytest.param(field("ring_size"), 128, 127, id="ring size"),
        pytest.param(field("ring_size"), 128, 0, id="no ring"),
        pytest.param(field("ring_size"), 128, 1 << 16, id="ring larger than the kernel's"),
        pytest.param(field("fill_size"), 256, 1 << 16, id="fill ring larger than the kernel's"),
        pytest.param(field("queue_count"), QUEUES, 65, id="queues"),
        pytest.param(field("tx_headroom"), 0, 2000, id="headroom"),
        pytest.param(field("rx_headroom"), 0, 2000, id="receive headroom"),
        pytest.param(AFTER, None, 24, id="transmit metadata"),
        pytest.param(COOKIES, None, 1, id="the socket"),
        pytest.param(FILL_TARGET, 256, 257, id="fill target"),
        pytest.param(FILL_TARGET + 4, 512, 1025, id="free frames"),
        pytest.param("free list", None, 1024, id="a free frame"),
        pytest.param("rx.prod", 0, 129, id="ring position"),
    ],
)
def test_damaged_memory_is_refused(opener: Opener, at: Any, was: int | None, becomes: int) -> None:
    view = View(opener.memfd)
    state = int.from_bytes(view.map[OFFSET + 4 : OFFSET + 8], "little")
    if at == "free list":
        at = state
    elif at == "rx.prod":
        at = state - lib.AFXDP_MAX_QUEUES * QUEUE_STATE
    at += OFFSET
    if was is not None:
        assert int.from_bytes(view.map[at : at + 4], "little") == was, (
            "the test's idea of the layout is wrong"
        )
    good = view.map[at : at + 4]
    view.map[at : at + 4] = becomes.to_bytes(4, "little")
    before = sorted(os.listdir("/proc/self/fd"))
    refusal = view.attach(opener.fds, OFFSET)
    assert refusal is not None
    assert refusal[0] in (errno.EBADMSG, errno.EXDEV, errno.EINVAL)
    assert sorted(os.listdir("/proc/self/fd")) == before
    view.map[at : at + 4] = good
    assert view.attach([os.dup(fd) for fd in opener.fds], OFFSET) is None
    view.detach()
