"""What this machine has, what a run would use of it, and the way out where something is missing.

    python -m megatron_groupdpo.doctor [--json]

Exit status 1 when something required is missing, or something that is here does not work.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from megatron_groupdpo import __version__
from megatron_groupdpo.config.fp8 import TILE, fp8_recipes
from megatron_groupdpo.doctor.imports import LIBRARIES, PROBES, Probe, run_probe

_MIN_DISK_GB = 10.0
_MIN_MEMORY_GB = 4.0

_TE_INSTALL = "on a GPU machine, after torch: pip install --no-build-isolation 'megatron-groupdpo[te]'"
_TE_REMOVE = (
    "complete it with `pip install --no-build-isolation 'megatron-groupdpo[te]'` beside a CUDA build of torch, or "
    "remove it with `pip uninstall transformer-engine transformer_engine_torch transformer_engine_cu13`"
)
_APEX_INSTALL = (
    'pip install --no-build-isolation --config-settings "--build-option=--cpp_ext" '
    '--config-settings "--build-option=--cuda_ext" git+https://github.com/NVIDIA/apex '
    "(the package named apex on PyPI is another one)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    state: Literal["ok", "absent", "low", "broken"]
    """``absent``: optional, and not here. ``low``: less than advised. ``broken``: required and missing, or here
    and unusable."""
    detail: str
    way_out: str = ""


# Rules: what follows from what is here.


def optimizer_path(*, transformer_engine: bool, apex: bool) -> str:
    """Where Megatron takes Adam and gradient clipping from: Transformer Engine, then Apex, then torch."""
    if transformer_engine:
        return "Transformer Engine's fused Adam and multi-tensor clipping"
    if apex:
        return "Apex's fused Adam and multi-tensor clipping"
    return "torch.optim.AdamW, Megatron's own clipping"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    return Finding(name="Python", state="ok", detail=f"{platform.python_version()} ({sys.executable})")


def _requirements() -> Finding:
    """Everything pyproject.toml asks for, against what is installed."""
    try:
        lines = metadata.requires("megatron-groupdpo") or []
    except metadata.PackageNotFoundError:
        return Finding(
            name="requirements",
            state="absent",
            detail="the package runs from its folder and is not installed: requirements not checked",
            way_out="make setup, or pip install -c requirements/constraints.txt -e .",
        )
    wrong = []
    needed = [need for need in map(Requirement, lines) if need.marker is None or need.marker.evaluate({"extra": ""})]
    for need in needed:
        version = _version(need.name)
        if version is None:
            wrong.append(f"{need} is missing")
        elif not need.specifier.contains(version, prereleases=True):
            wrong.append(f"{need} is needed, {version} is here")
    if wrong:
        return Finding(
            name="requirements",
            state="broken",
            detail="; ".join(wrong),
            way_out="make setup, or pip install -c requirements/constraints.txt -e .",
        )
    return Finding(name="requirements", state="ok", detail=f"all {len(needed)} of pyproject.toml are met")


def _torch(probe: Probe) -> list[Finding]:
    found = probe.answer
    if found is None:
        return [
            Finding(
                name="PyTorch", state="broken", detail=probe.error, way_out="make setup, or pip install 'torch>=2.11'"
            )
        ]
    build = f"built for CUDA {found['cuda']}" if found["cuda"] else "a CPU build"
    backends = " and ".join(name for name in ("nccl", "gloo") if found[name]) or "no communication backend"
    findings = [Finding(name="PyTorch", state="ok", detail=f"{found['version']}, {build}, {backends}")]
    for index, device in enumerate(found["devices"]):
        major, minor = device["capability"]
        detail = f"{device['name']}, {device['memory_gb']:.0f} GB, compute capability {major}.{minor}"
        findings.append(Finding(name=f"GPU {index}", state="ok", detail=detail))
    if not found["devices"]:
        way_out = (
            "check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES"
            if found["cuda"]
            else "to use a GPU, install a CUDA build of torch: https://pytorch.org/get-started/locally"
        )
        detail = "no CUDA device: a run uses the CPU with gloo, fp32 or bf16, same code"
        findings.append(Finding(name="GPU", state="absent", detail=detail, way_out=way_out))
    return findings


def _megatron(probe: Probe, *, engine_broken: bool) -> Finding:
    version = _version("megatron-core")
    if version is None:
        return Finding(
            name="Megatron-Core",
            state="broken",
            detail="not installed",
            way_out="make setup, or pip install 'megatron-core>=0.19,<0.20'",
        )
    if probe.answer is None:
        way_out = "repair Transformer Engine first (above)" if engine_broken else "reinstall it: make clean setup"
        return Finding(
            name="Megatron-Core",
            state="broken",
            detail=f"{version} does not import: {probe.error}",
            way_out=way_out,
        )
    return Finding(name="Megatron-Core", state="ok", detail=version)


def _engine_is_absent(probe: Probe) -> bool:
    return probe.error.startswith("ModuleNotFoundError") and "'transformer_engine'" in probe.error


def _transformer_engine(probe: Probe) -> Finding:
    name = "Transformer Engine"
    if probe.answer is not None:
        return Finding(name=name, state="ok", detail=probe.answer["version"])
    if _engine_is_absent(probe):
        return Finding(name=name, state="absent", detail="no FP8, no fused layers", way_out=_TE_INSTALL)
    return Finding(name=name, state="broken", detail=f"does not import: {probe.error}", way_out=_TE_REMOVE)


def _apex(probe: Probe) -> Finding:
    found = probe.answer
    if found is None:
        return Finding(name="Apex", state="broken", detail=probe.error, way_out=_APEX_INSTALL)
    if all(found.values()):
        return Finding(name="Apex", state="ok", detail="amp_C and fused_weight_gradient_mlp_cuda import")
    missing = " and ".join(name for name, present in found.items() if not present)
    detail = f"{missing} not importable: torch's or Transformer Engine's optimizer and clipping are used"
    if _version("apex") and not any(found.values()):
        detail += f" (an `apex` {_version('apex')} without them is installed)"
    return Finding(name="Apex", state="absent", detail=detail, way_out=_APEX_INSTALL)


def _paths(torch: Probe, engine: Probe, apex: Probe) -> list[Finding]:
    """What a run would use."""
    devices = torch.answer["devices"] if torch.answer else []
    engine_used = engine.answer is not None and bool(devices)
    fused = apex.answer or {}
    # One recipe has to run on every device of the run.
    recipes = fp8_recipes(min(tuple(device["capability"]) for device in devices)) if devices else ()
    if engine_used and recipes:
        detail = f"--fp8-recipe {', '.join(recipes)} (with --bf16 --fp8-format)"
        absent = [recipe for recipe in TILE if recipe not in recipes]
        detail += f"; {', '.join(absent)} would be refused: another compute capability" if absent else ""
        fp8 = Finding(name="FP8", state="ok", detail=detail)
    else:
        reasons = [
            *([] if engine_used else ["Transformer Engine on a GPU"]),
            *([] if recipes else ["a GPU of compute capability 8.9 or more"]),
        ]
        detail = f"not available (needs {' and '.join(reasons)}); FP8 flags are refused"
        fp8 = Finding(name="FP8", state="absent", detail=detail, way_out="train in bf16 (--bf16)")
    attention = (
        "Transformer Engine's (cuDNN, or flash-attn where installed)"
        if engine_used
        else "PyTorch scaled_dot_product_attention (local layer spec)"
    )
    optimizer = optimizer_path(transformer_engine=engine.answer is not None, apex=bool(fused.get("amp_C")))
    return [
        fp8,
        Finding(name="attention", state="ok", detail=attention),
        Finding(name="optimizer", state="ok", detail=optimizer),
    ]


def _libraries(probe: Probe) -> list[Finding]:
    findings = []
    for name in LIBRARIES:
        version = _version(name)
        if version is None:
            way_out = f"make setup, or pip install {name}"
            findings.append(Finding(name=name, state="broken", detail="not installed", way_out=way_out))
        else:
            findings.append(Finding(name=name, state="ok", detail=version))
    if probe.answer is None and all(finding.state == "ok" for finding in findings):
        way_out = "reinstall what the message names: make clean setup"
        findings.append(Finding(name="library imports", state="broken", detail=probe.error, way_out=way_out))
    return findings


def _memory_gb() -> tuple[float, float] | None:
    """(available, total) of the host; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        try:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
        except (ValueError, OSError):
            return None
        return total, total
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
    return kilobytes["MemAvailable"] * 1024 / 1e9, kilobytes["MemTotal"] * 1024 / 1e9


def _machine() -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    findings = [
        Finding(name="CPU", state="ok", detail=f"{cores} cores for this process, {platform.machine()}"),
        Finding(name="disk", state="ok", detail=f"{free:.0f} GB free in {Path.cwd()}")
        if free >= _MIN_DISK_GB
        else Finding(
            name="disk",
            state="low",
            detail=f"{free:.1f} GB free in {Path.cwd()}, {_MIN_DISK_GB:.0f} GB advised",
            way_out="free some, or run from another disk",
        ),
    ]
    memory = _memory_gb()
    if memory is not None:
        available, total = memory
        detail = f"{available:.1f} of {total:.1f} GB available"
        findings.append(
            Finding(name="memory", state="ok", detail=detail)
            if available >= _MIN_MEMORY_GB
            else Finding(
                name="memory",
                state="low",
                detail=f"{detail}, {_MIN_MEMORY_GB:.0f} GB advised",
                way_out="end other programs, or start fewer ranks",
            )
        )
    return findings


def examine() -> list[Finding]:
    """Look at everything; takes some seconds, for the imports."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        probes = dict(zip(PROBES, pool.map(run_probe, PROBES)))
    engine = probes["transformer_engine"]
    engine_broken = engine.answer is None and not _engine_is_absent(engine)
    return [
        _python(),
        _requirements(),
        *_torch(probes["torch"]),
        _transformer_engine(engine),
        _apex(probes["apex"]),
        _megatron(probes["megatron"], engine_broken=engine_broken),
        *_paths(probes["torch"], engine, probes["apex"]),
        *_libraries(probes["libraries"]),
        *_machine(),
    ]


def render(findings: Sequence[Finding]) -> str:
    """The report as text: one line per finding, and under it the way out where there is one."""
    width = max(len(finding.name) for finding in findings)
    lines = [f"megatron_groupdpo {__version__}"]
    for finding in findings:
        lines.append(f"  {finding.state:<6}  {finding.name:<{width}}  {finding.detail}")
        if finding.way_out:
            lines.append(f"  {'':<6}  {'':<{width}}  -> {finding.way_out}")
    broken = [finding.name for finding in findings if finding.state == "broken"]
    lines.append(f"To put right: {', '.join(broken)}" if broken else "Ready to run.")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; exit status 1 when something is broken."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_groupdpo.doctor",
        description="What this machine has, what a run would use, and the way out.",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as a JSON list")
    options = parser.parse_args(arguments)
    findings = examine()
    print(json.dumps([dataclasses.asdict(finding) for finding in findings]) if options.json else render(findings))
    return 1 if any(finding.state == "broken" for finding in findings) else 0
