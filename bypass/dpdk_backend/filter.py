# SPDX-License-Identifier: Apache-2.0
"""The device between a port and a stack (filter.h), and the exception path to the kernel (exception.h), for Python."""

from __future__ import annotations

import os
from typing import Any

from bypass._core import ffi, lib
from bypass.errors import DeviceError

__all__ = ["ExceptionPath", "FilterDevice"]


def _numbers(struct: Any) -> dict[str, int]:
    return {name: int(getattr(struct, name)) for name, _ in ffi.typeof(struct).fields}


class ExceptionPath:
    """Frames to and from the kernel by a TAP device.

    Args:
        fd: the device's descriptor, this object's from here on.
        rate: packets a second that the kernel is given at most.
        burst: packets at once; 0: the usual.
    """

    def __init__(self, fd: int, rate: int, burst: int = 0) -> None:
        self.c: Any = ffi.new("struct exception_path *")
        lib.exception_adopt(self.c, fd, rate, burst)

    def counters(self) -> dict[str, int]:
        """`struct exception_counters`."""
        return _numbers(self.c.n)

    def set_carrier(self, up: bool) -> None:
        """Tells the kernel about the port's link. DeviceError: the device is gone."""
        err = lib.exception_carrier(self.c, int(up))
        if err < 0:
            raise DeviceError(f"the exception path's carrier cannot be set: {os.strerror(-err)}")

    def close(self) -> None:
        lib.exception_close(self.c)


class FilterDevice:
    """A `struct bypass_netdev *` in front of another.

    Args:
        lower: the device below. It, classifier and exception path have to outlive this.
        classifier: `struct classifier *`, or what `classify` takes in its place.
        exception: None: what the kernel would get is handed up.
        vlan: the port's tag.
        classify: `filter_classify_fn`; None: classify_burst().

    Attributes:
        dev: the device for the stack.
    """

    def __init__(
        self,
        lower: Any,
        classifier: Any,
        exception: ExceptionPath | None,
        vlan: int | None = None,
        classify: Any = None,
    ) -> None:
        config = ffi.new("struct filter_config *")
        config.classifier = ffi.cast("struct classifier *", classifier)
        config.classify = classify or ffi.addressof(lib, "classify_burst")
        config.exception = exception.c if exception is not None else ffi.NULL
        config.vlan = vlan or 0
        self._held = (lower, classifier, exception, classify)
        self.dev: Any = lib.filter_create(lower, config)
        if not self.dev:
            raise DeviceError(f"no filter device: {os.strerror(ffi.errno)}")

    def now(self, now_ns: int) -> None:
        """Before each turn: the time by which the rate is measured."""
        lib.filter_now(self.dev, now_ns)

    def counters(self) -> dict[str, int]:
        """`struct filter_counters`."""
        out = ffi.new("struct filter_counters *")
        lib.filter_counters(self.dev, out)
        return _numbers(out[0])

    def refresh(self) -> None:
        """MTU and MAC address of the device below, when they have changed."""
        lib.filter_refresh(self.dev)

    def close(self) -> None:
        """Before the device below. A second call does nothing."""
        if self.dev:
            lib.filter_destroy(self.dev)
            self.dev = None
