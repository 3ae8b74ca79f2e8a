"""The doctor tells present from absent from broken, survives broken installs, and always names a way out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_groupdpo.doctor import examine as doctor
from megatron_groupdpo.doctor.imports import Probe, run_probe


def _package(folder: Path, name: str, source: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(source)


@pytest.fixture
def import_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path) -> Path:
    """A folder the probes import from before site-packages."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{repository}")
    return tmp_path


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise RuntimeError('found empty `transformer-engine` meta package')", "RuntimeError"),
        ("raise FileNotFoundError('libtransformer_engine.so')", "FileNotFoundError"),
        ("import os; os.abort()", "SIGABRT"),
        ("import sys; sys.exit(3)", "status 3"),
        ("import no_such_library", "no_such_library"),
    ],
)
def test_a_broken_transformer_engine_is_told_from_an_absent_one(import_folder: Path, source: str, message: str):
    _package(import_folder, "transformer_engine", source)
    finding = doctor._transformer_engine(run_probe("transformer_engine"))
    assert finding.state == "broken"
    assert message in finding.detail
    assert "pip uninstall" in finding.way_out


def test_an_absent_transformer_engine_is_no_fault():
    finding = doctor._transformer_engine(
        Probe(answer=None, error="ModuleNotFoundError: No module named 'transformer_engine'")
    )
    assert finding.state == "absent"
    assert "no-build-isolation" in finding.way_out


def test_output_of_an_import_does_not_hide_the_answer(import_folder: Path):
    _package(import_folder, "transformer_engine", "print('banner', end=''); __version__ = '9.9'")
    (import_folder / "transformer_engine" / "pytorch.py").write_text("print('another', end='')")
    assert run_probe("transformer_engine") == Probe(answer={"version": "9.9"})


def test_the_unrelated_apex_is_not_taken_for_nvidias(import_folder: Path):
    _package(import_folder, "apex", "")
    finding = doctor._apex(run_probe("apex"))
    assert finding.state == "absent"
    assert "amp_C" in finding.detail
    assert "NVIDIA/apex" in finding.way_out


@pytest.mark.costly
def test_a_compiled_apex_is_seen_by_its_modules(import_folder: Path):
    (import_folder / "amp_C.py").write_text("")
    assert doctor._apex(run_probe("apex")).state == "absent"
    (import_folder / "fused_weight_gradient_mlp_cuda.py").write_text("")
    assert doctor._apex(run_probe("apex")).state == "ok"
    (import_folder / "amp_C.py").write_text("raise ImportError('undefined symbol: _ZN2at')")
    assert doctor._apex(run_probe("apex")).state == "broken"


@pytest.mark.parametrize(
    ("capability", "recipes"),
    [
        ((8, 0), set()),
        ((8, 9), {"delayed", "tensorwise"}),
        ((9, 0), {"delayed", "tensorwise", "blockwise"}),
        ((10, 0), {"delayed", "tensorwise", "blockwise", "mxfp8"}),
    ],
)
def test_fp8_recipes_follow_the_compute_capability(capability: tuple[int, int], recipes: set[str]):
    assert set(doctor.fp8_recipes(capability)) == recipes


def test_fp8_is_only_promised_where_every_device_and_transformer_engine_can():
    def fp8(*capabilities: list[int], engine: Probe) -> doctor.Finding:
        devices = [{"capability": capability} for capability in capabilities]
        return doctor._paths(Probe(answer={"devices": devices}), engine, Probe(answer={}))[0]

    engine, none = Probe(answer={"version": "2.11"}), Probe(answer=None, error="ModuleNotFoundError")
    assert "blockwise" in fp8([9, 0], engine=engine).detail
    promised, _, refused = fp8([9, 0], [8, 9], engine=engine).detail.partition(";")
    assert "blockwise" not in promised
    assert "blockwise" in refused
    assert fp8([9, 0], [8, 0], engine=engine).state == "absent"
    assert fp8([9, 0], engine=none).state == "absent"
    assert fp8(engine=engine).state == "absent"


def test_optimizers_go_transformer_engine_then_apex_then_torch():
    assert "Transformer Engine" in doctor.optimizer_path(transformer_engine=True, apex=True)
    assert "Apex" in doctor.optimizer_path(transformer_engine=False, apex=True)
    assert "torch" in doctor.optimizer_path(transformer_engine=False, apex=False)


@pytest.mark.costly
def test_the_command_reports_this_machine(import_folder: Path, repository: Path):
    _package(import_folder, "transformer_engine", "raise RuntimeError('partial install')")
    result = subprocess.run(
        [sys.executable, "-m", "megatron_groupdpo.doctor", "--json"],
        capture_output=True,
        text=True,
        cwd=repository,
        timeout=300,
    )
    assert result.returncode == 1, result.stderr
    findings = {finding["name"]: finding for finding in json.loads(result.stdout)}
    assert findings["PyTorch"]["state"] == "ok"
    assert findings["Transformer Engine"]["state"] == "broken"
    # Megatron imports Transformer Engine where it finds it, and falls with it.
    assert findings["Megatron-Core"]["way_out"] == "repair Transformer Engine first (above)"
    assert {"Python", "Apex", "FP8", "attention", "optimizer", "transformers", "datasets", "disk"} <= set(findings)
    assert all(finding["way_out"] for finding in findings.values() if finding["state"] != "ok")


def test_the_report_shows_each_way_out_and_what_to_put_right():
    text = doctor.render(
        [
            doctor.Finding(name="PyTorch", state="ok", detail="2.11.0"),
            doctor.Finding(name="Megatron-Core", state="broken", detail="not installed", way_out="make setup"),
        ]
    )
    assert "-> make setup" in text
    assert text.endswith("To put right: Megatron-Core")
