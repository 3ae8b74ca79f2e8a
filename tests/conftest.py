"""What every test may ask for: real data where the machine has them, and skips that say why."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from megatron_groupdpo.mcore.setup import Ranks

ROOT = Path(__file__).resolve().parent.parent


@cache
def _why_no_gpu() -> str | None:
    import torch

    if torch.cuda.is_available():
        return None
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
    return f"no CUDA device (torch {torch.__version__}, {build})"


LONGEST = (
    "te",
    "distributed/test_layout_invariance.py",
    "distributed/test_proofs.py",
    "distributed/test_reference.py",
    "distributed/test_resume.py",
    "distributed/test_gradient.py",
    "distributed/test_cuda_graphs.py",
    "distributed/test_gpu_suite.py",
    "distributed/test_command_line.py",
    "distributed/test_clean_output.py",
)
"""Groups that take longest, in the order in which they are begun, so that no long one is left to the end."""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A worker takes a group at a time: a file, or all tests of the ranks that have Transformer Engine."""
    begun: set[tuple[str, str]] = set()
    groups: dict[pytest.Item, str] = {}
    for item in items:
        path = item.path.relative_to(ROOT / "tests").as_posix()
        groups[item] = group = "te" if "te_pool" in getattr(item, "fixturenames", ()) else path
        if config.pluginmanager.hasplugin("xdist"):
            item.add_marker(pytest.mark.xdist_group(group))
        if _is_fast(item, path, begun):
            item.add_marker(pytest.mark.fast)
    order = {group: place for place, group in enumerate(LONGEST)}
    items.sort(key=lambda item: (order.get(groups[item], len(order)), groups[item]))


def _is_fast(item: pytest.Item, path: str, begun: set[tuple[str, str]]) -> bool:
    """Cheap units, and of the tests on several ranks the first case of each that is neither slow nor costly."""
    if any(item.get_closest_marker(name) for name in ("slow", "costly", "gpu")):
        return False
    law = (path, getattr(item, "originalname", item.name))
    if path.startswith("distributed/") and law in begun:
        return False
    begun.add(law)
    return True


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (reason := _why_no_gpu()):
        pytest.skip(reason)


@pytest.fixture(scope="session")
def repository() -> Path:
    return ROOT


def run_tool(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    """What a command of ``tools/`` answers, run in this process."""

    def leave(status: int) -> None:
        raise SystemExit(status)

    command = [str(ROOT / "tools" / f"{name}.py"), *map(str, words)]
    output, errors, status = io.StringIO(), io.StringIO(), 0
    kept = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        patch.setattr(os, "_exit", leave)
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            try:
                runpy.run_path(command[0], run_name="__main__")
            except SystemExit as end:
                status = int(end.code or 0)
    signal.signal(signal.SIGTERM, kept)
    return subprocess.CompletedProcess(command, status, output.getvalue(), errors.getvalue())


@pytest.fixture(scope="session")
def tool() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``tool("inspect_data", *words)``, where the process is not the point: a new one imports for seconds."""
    return run_tool


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """``real_data("gsm8k_test.jsonl")``: the path of a real data set, or a skip.

    The files are not part of the repository; they are looked for in GROUPDPO_DATA_DIR, by default
    ``../shared/data`` beside the checkout.
    """
    named = os.environ.get("GROUPDPO_DATA_DIR")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"

    def path_or_skip(name: str) -> Path:
        path = folder / name
        if not path.is_file():
            pytest.skip(f"real data absent: {name} is not in {folder} (set GROUPDPO_DATA_DIR)")
        return path

    return path_or_skip


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Ranks]:
    """This process as the only rank of a run on the CPU: for units that need Megatron's groups, and for mutants."""
    from megatron_groupdpo.config import ParallelConfig
    from megatron_groupdpo.mcore.setup import initialize, shut_down

    launch = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    with pytest.MonkeyPatch.context() as environment:
        for name, value in (launch | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}).items():
            environment.setenv(name, value)
        ranks = initialize(ParallelConfig(device="cpu"), seed=7)
        yield ranks
        shut_down()
