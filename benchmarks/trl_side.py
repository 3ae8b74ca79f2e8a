"""TRL's numbers for the problem of ``tests/harness/pair_problem.py``, from its own ``DPOTrainer`` on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from pair_compare import Numbers
from pair_problem import BETA, NUM_PAIRS, SEQ_LENGTH, ProblemFiles, Variant, make_pairs, token_rows
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer


class Recorder(TrainerCallback):
    """Keeps the gradient that the optimizer is about to use."""

    gradient: dict[str, Tensor]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradient = {name: parameter.grad.double() for name, parameter in model.named_parameters()}


class RecordingTrainer(DPOTrainer):
    """DPOTrainer that also keeps the loss of every batch; it logs rounded ones."""

    losses: list[float]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(float(loss))
        return loss


@dataclass(frozen=True, kw_only=True)
class TrlRun:
    """One run of TRL."""

    numbers: Numbers
    metrics: Mapping[str, float]
    """As TRL logs them."""


def trl_numbers(files: ProblemFiles, model: str, variant: Variant) -> TrlRun:
    """Loss and gradient of a variant: the sum of its runs; the rest is the same in each of them."""
    runs = [(factor, _run(files, model, options, variant.pairs_per_batch)) for factor, options in variant.trl]
    first = runs[0][1]
    gradient = {
        name: torch.stack([factor * run.numbers.gradient[name] for factor, run in runs]).sum(0)
        for name in first.numbers.gradient
    }
    numbers = Numbers(
        loss=sum(factor * run.numbers.loss for factor, run in runs),
        chosen_logps=first.numbers.chosen_logps,
        rejected_logps=first.numbers.rejected_logps,
        chosen_rewards=first.numbers.chosen_rewards,
        rejected_rewards=first.numbers.rejected_rewards,
        gradient=gradient,
    )
    return TrlRun(numbers=numbers, metrics=first.metrics)


def _run(files: ProblemFiles, model: str, options: Mapping[str, Any], pairs_per_batch: int) -> TrlRun:
    """``train()`` for one step over all pairs."""
    recorder = Recorder()
    trainer = RecordingTrainer(
        model=_model(files, model, reference=False),
        ref_model=_model(files, model, reference=True),
        args=_config(files, options, pairs_per_batch),
        train_dataset=Dataset.from_list([vars(pair) for pair in make_pairs()]),
        processing_class=AutoTokenizer.from_pretrained(str(files.tokenizer)),
        callbacks=[recorder],
    )
    trainer.remove_callback(PrinterCallback)
    _check_tokens(trainer, files)
    # Before the step: afterwards the policy's weights are others.
    policy_sides, reference_sides = _logps(trainer, trainer.model), _logps(trainer, trainer.ref_model)
    trainer.losses = []
    trainer.train()
    rewards = [BETA * (policy - reference) for policy, reference in zip(policy_sides, reference_sides)]
    numbers = Numbers(
        loss=sum(trainer.losses),
        chosen_logps=policy_sides[0].tolist(),
        rejected_logps=policy_sides[1].tolist(),
        chosen_rewards=rewards[0].tolist(),
        rejected_rewards=rewards[1].tolist(),
        gradient=recorder.gradient,
    )
    logged = next(line for line in trainer.state.log_history if "rewards/chosen" in line)
    return TrlRun(numbers=numbers, metrics=logged)


def _model(files: ProblemFiles, model: str, *, reference: bool) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(files.model(model, reference=reference)), dtype=torch.float32)


def _config(files: ProblemFiles, options: Mapping[str, Any], pairs_per_batch: int) -> DPOConfig:
    return DPOConfig(
        output_dir=str(files.root / "trl"),
        beta=BETA,
        max_length=SEQ_LENGTH,
        per_device_train_batch_size=pairs_per_batch,
        gradient_accumulation_steps=NUM_PAIRS // pairs_per_batch,
        max_steps=1,
        max_grad_norm=0.0,  # no clipping
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **options,
    )


def _check_tokens(trainer: DPOTrainer, files: ProblemFiles) -> None:
    """Both sides made the same token ids of the texts."""
    for index, (theirs, ours) in enumerate(zip(trainer.train_dataset, token_rows(files.store), strict=True)):
        found = {name: list(theirs[name]) for name in ours}
        if found != ours:
            raise SystemExit(f"pair {index}: TRL has the tokens {found}, the token store {ours}")


def _logps(trainer: DPOTrainer, model: Any) -> list[Tensor]:
    """Chosen and rejected, [pairs] each, from the trainer's own collator and scoring."""
    model.eval()
    batch = trainer.data_collator(list(trainer.train_dataset))
    return [side.double() for side in trainer.compute_ref_log_probs(model, batch)]
