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
from typing import TYPE_CHECKING, Any

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
    "with Transformer Engine",
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
WITH_TRANSFORMER_ENGINE = {
    "distributed/test_fp8_python.py",
    "distributed/test_transformer_engine_python.py",
}


def group_of(nodeid: str) -> str:
    """What a worker takes at a time: a file, or all tests whose ranks have Transformer Engine."""
    path = nodeid.split("::")[0].removeprefix("tests/")
    return LONGEST[0] if path in WITH_TRANSFORMER_ENGINE else path


def _place(item: pytest.Item) -> tuple[int, str]:
    group = group_of(item.nodeid)
    return LONGEST.index(group) if group in LONGEST else len(LONGEST), group


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put groups in their order, and mark what is fast."""
    begun: set[str] = set()
    for item in items:
        if _is_fast(item, begun):
            item.add_marker(pytest.mark.fast)
    items.sort(key=_place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Groups to workers, in the order in which they were collected. xdist 3.8's own groups fail under pytest 9.1."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    if config.getoption("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False
    return Groups(config, log)


def _is_fast(item: pytest.Item, begun: set[str]) -> bool:
    """Cheap units, and of the tests on several ranks the first case of each that is neither slow nor costly."""
    if any(item.get_closest_marker(name) for name in ("slow", "costly", "gpu")):
        return False
    law, _, _case = item.nodeid.partition("[")
    if law.startswith("tests/distributed/") and law in begun:
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
