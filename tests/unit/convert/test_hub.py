"""A model by its name on the hub: fetched, found in the cache, refused with one message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import hub_of

from megatron_groupdpo.convert.hf.hub import is_hub_name

NAMES = """
import json, sys
from megatron_groupdpo.convert.hf.hub import model_folder
from megatron_groupdpo.errors import CheckpointError
for name in sys.argv[1:]:
    try:
        folder = model_folder(name)
        print(json.dumps([str(folder), sorted(p.name for p in folder.iterdir())]))
    except CheckpointError as error:
        print(json.dumps(["error", str(error)]))
"""


@pytest.mark.parametrize(
    ("text", "bare", "expected"),
    [
        ("hf://org/model", False, True),
        ("org/model", True, True),
        ("org/model@main", True, True),
        ("org/model", False, False),
        ("runs/a/b", True, False),
        ("/org/model", True, False),
        ("../model", True, False),
        ("model", True, False),
    ],
)
def test_what_is_a_name(text: str, bare: bool, expected: bool):
    assert is_hub_name(text, bare=bare) is expected


def test_a_folder_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert not is_hub_name("org/model")


def resolve(repository: Path, endpoint: str, cache: Path, *names: str, **environment: str) -> list[list[object]]:
    done = subprocess.run(
        [sys.executable, "-c", NAMES, *names],
        env={
            **os.environ,
            "PYTHONPATH": str(repository),
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(cache),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_model_is_fetched_from_the_hub_once_and_then_found_offline(
    repository: Path, own_copy: Callable[[str], Path], tmp_path: Path
):
    folder = own_copy("llama-tied")
    (folder / "pytorch_model.bin").write_bytes(b"not asked for")
    (folder / "consolidated.safetensors").write_bytes(b"not asked for")
    cache = tmp_path / "cache"
    with hub_of({"org/tiny": folder}) as (endpoint, asked):
        found, prefixed, missing = resolve(repository, endpoint, cache, "org/tiny", "hf://org/tiny@main", "org/absent")
    wanted = ["config.json", "generation_config.json", "model.safetensors"]
    assert found == prefixed
    assert found[1] == wanted
    assert sorted(asked) == [f"org/tiny/{name}" for name in wanted], "each file once, and no other"
    assert (Path(str(found[0])) / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert missing[0] == "error"
    assert "org/absent: no such folder, and the hub does not serve it (RepositoryNotFoundError" in str(missing[1])
    # the server is gone
    again, offline = resolve(repository, endpoint, cache, "org/tiny", "org/other", HF_HUB_OFFLINE="1")
    assert again == found
    assert "cannot be reached for it (HF_HUB_OFFLINE is set) nor is it in the hub's cache" in str(offline[1])
    (unreachable,) = resolve(repository, endpoint, cache, "org/other")
    assert "org/other: no such folder, and the hub cannot be reached for it" in str(unreachable[1])
    assert "\n" not in str(unreachable[1])


@pytest.mark.costly
def test_import_takes_a_name(repository: Path, hf_models: Callable[..., Path], tmp_path: Path):
    with hub_of({"org/tiny": hf_models("llama-tied")}) as (endpoint, _):
        done = subprocess.run(
            [sys.executable, str(repository / "tools" / "convert_checkpoint.py"), "import", "--hf", "org/tiny",
             "--save", str(tmp_path / "checkpoint")],
            env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache")},
            capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "LlamaForCausalLM imported" in done.stdout
    assert (tmp_path / "checkpoint" / "iter_0000000" / "metadata.json").is_file()
