# SPDX-License-Identifier: Apache-2.0
"""What the tests share: the budget of hypothesis, what a test may need of the machine, and a lab.

A test that needs root, namespaces and XDP carries `@pytest.mark.netns`. Where these are missing it is skipped, and
the skip says what is missing; with CI=true in the environment it fails instead.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import backends
import hypothesis
import pytest
from bypass._core import ffi, lib
from c_library import Library
from support import FUZZ

from bypass import netns, probe
from bypass.lab import Lab

if TYPE_CHECKING:
    from mutants import Runs

if "BYPASS_PYTHON" in os.environ:  # the sanitizers' build: their runtime is for Python, not for curl
    os.environ.pop("LD_PRELOAD", None)
    sys.executable = os.environ["BYPASS_PYTHON"]

os.environ.pop(
    "COLUMNS", None
)  # of the terminal, or of pytest-xdist's workers: tables that are piped are whole

hypothesis.settings.register_profile(
    "bypass",
    deadline=None,  # tests never judge by time
    derandomize=os.environ.get("CI") == "true" and FUZZ == 1,
    print_blob=True,
    max_examples=100 * FUZZ,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("bypass")


def missing(what: list[str]) -> None:
    """Skips the running test, saying what is missing; under CI=true this is a failure."""
    text = f"missing: {'; '.join(what)}"
    if os.environ.get("CI") == "true":
        pytest.fail(text, pytrace=False)
    pytest.skip(text)


def require_netns() -> None:
    """Goes on only where root, network namespaces, bcc, AF_XDP and native XDP on a veth are there."""
    what = probe.missing_for_xdp()
    if what:
        missing(what)


def require_dpdk() -> None:
    """Goes on only where the DPDK plug-in was built and its libraries are there."""
    error = ffi.new("struct dpdk_error *")
    if lib.dpdk_load(ffi.NULL, error) == ffi.NULL:
        missing([ffi.string(error.text).decode()])


def pytest_configure(config: pytest.Config) -> None:
    """The steering program is compiled once in a run for each set of masks, in whatever process: bypass.bpf.build.

    What collection makes stays for good: it is not looked through for garbage, neither now nor each time later.
    """
    gc.disable()
    if "BYPASS_BPF_CACHE" not in os.environ:  # the workers of pytest-xdist have it from who starts them
        folder = tempfile.TemporaryDirectory(prefix="bypass-bpf-")
        os.environ["BYPASS_BPF_CACHE"] = folder.name
        config.add_cleanup(lambda: os.environ.pop("BYPASS_BPF_CACHE"))
        config.add_cleanup(folder.cleanup)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    backends.parametrize(metafunc)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        backend = backends.of(item)
        if backend is None:
            continue
        item.user_properties.append(("backend", backend))
        name = f"{item.path.stem}::{getattr(item, 'originalname', item.name)}"
        if name in backends.DIFFERENCES and backend == "dpdk":
            item.add_marker(pytest.mark.xfail(reason=backends.DIFFERENCES[name], strict=True))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("netns"):
        require_netns()


@pytest.fixture
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A lab of the test's own (see bypass.lab), removed afterwards whatever happens.

    `@pytest.mark.parametrize("lab", [{"queues": 4}], indirect=True)` for one that differs.
    """
    param = getattr(request, "param", {})
    if param.get("wire"):
        require_dpdk()
    with Lab(lab_name(), **param) as it:
        yield it


@pytest.fixture
def namespace() -> Iterator[str]:
    """The name of an empty network namespace of the test's own."""
    name = f"bypass-{lab_name()}"
    netns.create(name)
    try:
        yield name
    finally:
        netns.remove(name)


@pytest.fixture(scope="session")
def fwd_library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Shared mode in C."""
    import fwd_support

    return fwd_support.build(tmp_path_factory.mktemp("fwd"))


@pytest.fixture(scope="session")
def mutant_runs() -> Iterator[Runs]:
    """Runs tests on mutants of the stack."""
    from mutants import Runs

    with contextlib.closing(Runs()) as runs:
        yield runs


@pytest.fixture(scope="session")
def bench_programs() -> None:
    """The benchmarks' C programs are there; the stack itself was built before the tests."""
    from c_programs import make

    make("-f", "bench/build.mk")


_labs = 0


def lab_name() -> str:
    """A name that no other lab of this machine has: `<pid>-<n>`."""
    global _labs
    _labs += 1
    return f"{os.getpid()}-{_labs}"


# ---- Nothing stays behind ----------------------------------------------------------------------------------------
def our_namespaces() -> list[str]:
    return netns.names(f"bypass-{os.getpid()}-")


def our_bpf_links() -> list[str]:
    """Descriptors of this process that are bpf links: an attached program that nobody detached."""
    found = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            if "bpf_link" in os.readlink(fd):
                about = Path(f"/proc/self/fdinfo/{fd.name}").read_text()
                found.append(" ".join(re.findall(r"(?:link_type|prog_id|link_id|ifindex):\s*\S+", about)))
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
    return found


@pytest.fixture(autouse=True, scope="session")
def nothing_left() -> Iterator[None]:
    """At the end of the session no namespace of this process and no attached program may be left."""
    yield
    left = our_namespaces()
    for name in left:
        netns.remove(name)
    assert not left, f"namespaces left by the tests: {left}"
    assert not our_bpf_links(), f"bpf links left by the tests: {our_bpf_links()}"
