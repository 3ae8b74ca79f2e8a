"""What tests cost, by file: ``make test ARGS="-p tests.cpu_times"``.

Wall time says little on a machine that does other things; CPU seconds (user and system) of this process and all that it
started, ranks included, say what a test costs.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

_started: list[float] = []
_cpu: Counter[str] = Counter()
_wall: Counter[str] = Counter()
_tests: Counter[str] = Counter()


def cpu_seconds() -> float:
    """Of this process and its children, those that have ended among them."""
    own, total = psutil.Process(), 0.0
    for process in [own, *own.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def pytest_runtest_logstart() -> None:
    _started[:] = [cpu_seconds()]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Iterator[None]:
    report: Any = yield
    if call.when == "teardown":
        report.user_properties = [*report.user_properties, ("cpu_seconds", cpu_seconds() - _started[0])]
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path = report.nodeid.split("::")[0]
    _wall[path] += report.duration
    if report.when == "teardown":
        _tests[path] += 1
        _cpu[path] += dict(report.user_properties).get("cpu_seconds", 0.0)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("CPU seconds by file")
    for path, seconds in _cpu.most_common():
        terminalreporter.write_line(f"{seconds:8.1f} CPU {_wall[path]:8.1f} wall {_tests[path]:5d} tests  {path}")
    terminalreporter.write_line(f"{sum(_cpu.values()):8.1f} CPU {sum(_wall.values()):8.1f} wall, all")
