"""What a run logs, training and validation, step by step against `transformers` on the very weights of each step."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_examples import decoder
from metrics_oracle import Scored, dpo_phi, expected_held_out, expected_metrics
from rank_pool import RankPool
from tiny_run import TinyData, read_metrics, write_config

from megatron_groupdpo.convert.verify import TOLERANCE
from megatron_groupdpo.data.store.reader import TokenStore

BETA, NLL_COEFF, SIZE, STEPS = 0.3, 0.7, 4, 3
LOSS = {"phi": dpo_phi, "beta": BETA, "nll_coeff": NLL_COEFF}


@pytest.fixture(scope="module")
def start(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForCausalLM

    vocab = int(TokenStore.open(tiny_data.store).meta["tokenizer"]["vocab_size"])
    config = decoder("Qwen2Config", vocab_size=vocab, tie_word_embeddings=True, max_position_embeddings=128)
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("start") / "hf"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def argv(tiny_data: TinyData, start: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """``dpo`` on groups of 2 to 5: most responses get no pass in training. The held-out set is the training set."""
    path = write_config(
        tmp_path_factory.mktemp("config") / "run.yaml",
        tiny_data.store,
        tiny_data.reference,
        data={"valid_data_path": [str(tiny_data.store)], "shuffle": False},
        objective={"objective": "dpo", "beta": BETA, "nll_coeff": NLL_COEFF},
        optimizer={"lr": 5e-3, "lr_decay_style": "constant", "lr_warmup_iters": 0},
        training={"global_batch_size": SIZE, "train_iters": STEPS, "eval_interval": 1},
    )
    import yaml

    config = yaml.safe_load(path.read_text())
    config["model"] = {}
    path.write_text(yaml.safe_dump({name: section for name, section in config.items() if section}))
    return ["--config", str(path), "--load", str(start)]


def validated_on_rank(
    argv: Sequence[str], sizes: Sequence[int], limits: Sequence[int], trained: bool
) -> list[dict[str, Any]]:
    """Train or not, and validate the weights then in batches of these sizes, at most ``limits`` of them."""
    from megatron_groupdpo.config import load_config
    from megatron_groupdpo.convert.hf.model_section import complete_model_section
    from megatron_groupdpo.mcore.setup import initialize, shut_down
    from megatron_groupdpo.run.build import build_run
    from megatron_groupdpo.run.loop import evaluate, train

    config = load_config(argv, complete=complete_model_section)
    ranks = initialize(config.parallel, seed=config.training.seed)
    try:
        run = build_run(config, ranks)
        if trained:
            train(run)
        found = []
        for size, limit in zip(sizes, limits, strict=True):
            training = replace(run.config.training, global_batch_size=size, eval_iters=limit)
            found.append(evaluate(replace(run, config=replace(run.config, training=training))))
        return found
    finally:
        shut_down()


def scored_by_transformers(folder: Path, data: TinyData) -> list[list[Scored]]:
    """The store's groups, scored one response at a time; ``dpo`` reads the pair of the largest content hashes."""
    from transformers import AutoModelForCausalLM

    from megatron_groupdpo.reference.store import ReferenceLogProbs

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    store = TokenStore.open(data.store)
    reference = ReferenceLogProbs.open(data.reference, (store,), precision="fp32")
    groups = []
    for index in range(len(store)):
        sample = store[index]
        hashes = [zlib.crc32(np.ascontiguousarray(t, dtype="<i4").tobytes()) for t in sample.response_tokens]
        read = {
            max((k for k, label in enumerate(sample.labels_K) if label == side), key=hashes.__getitem__)
            for side in (1, -1)
        }
        group = []
        for k, tokens in enumerate(sample.response_tokens):
            ids = torch.from_numpy(np.concatenate([sample.prompt_tokens, tokens]).astype(np.int64))[None]
            with torch.no_grad():
                logps = model(ids).logits.double().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            ref = float(reference[np.array([sample.first_response_id + k])][0])
            own = float(logps[len(sample.prompt_tokens) - 1 :].sum())
            group.append(Scored(int(sample.labels_K[k]), 0.0, own, ref, len(tokens), trained=k in read))
        groups.append(group)
    return groups


def assert_within_verify(found: dict[str, Any], wanted: dict[str, float], tokens: int) -> None:
    """As `verify` asks of a token, for a sum over ``tokens`` of them; most differ by a hundredth of that."""
    assert wanted
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=TOLERANCE * tokens / 100), name


def test_every_step_and_validation_is_what_transformers_gives(
    pool: RankPool, tiny_data: TinyData, start: Path, argv: list[str], tmp_path: Path
):
    save, out = tmp_path / "save", tmp_path / "out"
    more = ["--save", str(save), "--export-hf", str(out), "--export-hf-interval", "1"]
    sizes, limits = (1, 2, 3, 4, 5, 10, 3, 2), (100, 100, 100, 100, 100, 100, 2, 3)
    over_two = pool.run(2, validated_on_rank, [*argv, *more], sizes, limits, True)
    lines = read_metrics(save)
    steps = {line["iteration"]: line for line in lines if "loss" in line}
    validations = {line["iteration"]: line for line in lines if "eval/loss" in line}
    assert list(steps) == [1, 2, 3]
    assert list(validations) == [0, 1, 2, 3]

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).unlink()  # transformers has one kind for every Qwen2 model, which reads other ids than the data's
    longest = max(int(n) for n in TokenStore.open(tiny_data.store).response_lengths_R)
    folders = [start, *(tmp_path / f"out-iter_{i:07d}" for i in range(1, STEPS + 1))]
    for iteration, folder in enumerate(folders):
        groups = scored_by_transformers(folder, tiny_data)
        whole = expected_held_out(groups, **LOSS)
        assert whole["eval/group/responses"] > whole["eval/trained/group/responses"] == 20
        assert_within_verify(validations[iteration], whole, longest)
        assert {name for name in validations[iteration] if name.startswith("eval/")} == set(whole)
        if iteration < STEPS:
            own = [groups[place % len(groups)] for place in range(SIZE * iteration, SIZE * (iteration + 1))]
            assert_within_verify(steps[iteration + 1], expected_metrics(own, **LOSS), longest)

    # The last weights, in batches of any size, over one rank and two, with short last batches.
    for metrics in over_two[0][:6]:
        assert metrics == pytest.approx({n: validations[STEPS][n] for n in metrics}, rel=1e-5, abs=1e-9)
    # Three groups a batch, two batches; and two a batch, three batches: the same six groups.
    assert_within_verify(over_two[0][6], expected_held_out(groups[:6], **LOSS), longest)
    assert over_two[0][7] == pytest.approx(over_two[0][6], rel=1e-5, abs=1e-9)
    assert over_two[0] == over_two[1], "every rank with the output layer has them"
    alone = pool.run(1, validated_on_rank, [*argv, "--load", str(out)], (3, 10), (100, 1), False)
    for metrics in alone[0]:
        assert metrics == pytest.approx({n: validations[STEPS][n] for n in metrics}, rel=1e-5, abs=1e-9)
