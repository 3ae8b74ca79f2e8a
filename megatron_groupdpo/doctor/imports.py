"""Importing things that may fail or die, each in a process of its own, and what came of it.

    python -m megatron_groupdpo.doctor.imports NAME

A partial Transformer Engine raises RuntimeError or FileNotFoundError on import, and a library built for another
torch can end the process; neither may take the caller along.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_ANSWER = "probe-answer:"
_TIMEOUT_SECONDS = 300

LIBRARIES = ("transformers", "datasets", "sentencepiece", "tensorboard", "safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What the import of something in a process of its own gave."""

    answer: dict[str, Any] | None
    """None when it failed."""
    error: str = ""


def _probe_torch() -> dict[str, Any]:
    import torch

    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices.append(
                {
                    "name": properties.name,
                    "capability": [properties.major, properties.minor],
                    "memory_gb": properties.total_memory / 1e9,
                }
            )
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "devices": devices,
        "nccl": torch.distributed.is_available() and torch.distributed.is_nccl_available(),
        "gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available(),
    }


def _probe_transformer_engine() -> dict[str, Any]:
    engine = importlib.import_module("transformer_engine")
    importlib.import_module("transformer_engine.pytorch")
    return {"version": str(getattr(engine, "__version__", "unknown"))}


def _probe_apex() -> dict[str, Any]:
    # `import apex` proves nothing: the package of that name on PyPI is unrelated, and NVIDIA's installs
    # without its compiled parts.
    importlib.import_module("torch")  # the compiled parts link against its libraries
    found = {}
    for name in ("amp_C", "fused_weight_gradient_mlp_cuda"):
        try:
            importlib.import_module(name)
            found[name] = True
        except ModuleNotFoundError:
            found[name] = False
    return found


def _probe_megatron() -> dict[str, Any]:
    # Through the one folder that may import it, so that what a run imports is what is tried.
    importlib.import_module("megatron_groupdpo.mcore.model.build")
    return {}


def _probe_libraries() -> dict[str, Any]:
    for name in LIBRARIES:
        importlib.import_module(name)
    return {}


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": _probe_torch,
    "transformer_engine": _probe_transformer_engine,
    "apex": _probe_apex,
    "megatron": _probe_megatron,
    "libraries": _probe_libraries,
}


def run_probe(name: str) -> Probe:
    """Run one probe in a new process; whatever happens there comes back as a :class:`Probe`."""
    try:
        process = subprocess.run(
            [sys.executable, "-m", "megatron_groupdpo.doctor.imports", name],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return Probe(answer=None, error=f"no answer within {_TIMEOUT_SECONDS} s")
    for line in process.stdout.splitlines():
        if line.startswith(_ANSWER):
            return Probe(**json.loads(line.removeprefix(_ANSWER)))
    if process.returncode < 0:
        return Probe(answer=None, error=f"the import ended the process: {_signal_name(-process.returncode)}")
    last = (process.stderr.strip().splitlines() or ["no message"])[-1]
    return Probe(answer=None, error=f"the import ended the process with status {process.returncode}: {last}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _answer_probe(name: str) -> None:
    try:
        probe = Probe(answer=PROBES[name]())
    except Exception as error:
        text = " ".join(str(error).split())
        probe = Probe(answer=None, error=f"{type(error).__name__}: {text[:300]}")
    print(f"\n{_ANSWER}{json.dumps(dataclasses.asdict(probe))}", flush=True)


if __name__ == "__main__":
    _answer_probe(sys.argv[1])
