"""Sections that say what is done: data, objective, optimizer, training, checkpoint, logging."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from megatron_groupdpo.config.sections.bounds import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ProperFraction,
)
from megatron_groupdpo.objectives import OBJECTIVES


def hyperparameter(name: str) -> Any:
    """A field for an objective's option; unset means the objective's own default, which stays in its file."""
    users: dict[str, list[str]] = {}
    for objective in OBJECTIVES.values():
        for option in fields(objective.hyperparameters):
            if option.name == name and option.default is not MISSING:
                users.setdefault(str(option.default), []).append(objective.name)
    assert users, f"no objective has an option {name!r}"
    unset = "; ".join(f"{default} for {', '.join(names)}" for default, names in users.items())
    return field(default=None, metadata={"unset": f"{unset}; refused for other objectives"})


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Token stores and the tokenizer they were made with."""

    data_path: tuple[str, ...]
    """Token stores to train on."""
    data_weights: tuple[PositiveFloat, ...] = ()
    """Share of each store of data_path in the order, in any unit; none: all groups count alike."""
    curriculum: Literal["none", "group-size"] = "none"
    """group-size: the first epoch goes from the smallest groups to the largest."""
    seq_length: PositiveInt
    """Longest prompt plus response, in tokens."""
    valid_data_path: tuple[str, ...] = ()
    """Token stores to validate on; excludes valid_fraction."""
    valid_fraction: ProperFraction = 0.0
    """Share of the training prompts held out for validation; all groups of a prompt fall on one side."""
    shuffle: bool = True
    """New seeded order of the groups in every epoch; otherwise the order of the store."""
    num_workers: NonNegativeInt = 1
    """Processes that prepare batches ahead of the step, on each rank; 0: none."""
    tokenizer_type: Literal["SentencePieceTokenizer", "HuggingFaceTokenizer"] | None = None
    """Kind of tokenizer; none: as the token store says."""
    tokenizer_model: str | None = None
    """Tokenizer file or folder; none: as the token store says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """The loss: (1/B) sum of the groups' preference losses + nll_coeff x (1/B_nll) sum of their NLL.

    B counts the groups whose preference term is not empty, B_nll those with a positive.
    """

    objective: str = field(default="all_pairs", metadata={"choices": tuple(OBJECTIVES)})
    """Preference loss of a group."""
    beta: PositiveFloat = 0.1
    """Score of a response: beta x (log pi - log pi_ref)."""
    score_average: bool = False
    """Average log pi over the response's tokens in the score, instead of summing."""
    nll_coeff: NonNegativeFloat = 1.0
    """Weight of the NLL of the positives; with sft, of the whole loss."""
    nll_average: Literal["sum", "response", "batch-tokens"] = "response"
    """NLL of a response summed over its tokens; averaged over them; or one token mean over the batch's positives."""
    one_sided_nll: bool = False
    """Groups that are empty for the objective (say, without a negative) keep their NLL; otherwise they are left out."""
    reference: Literal["cached", "resident", "none"] = "cached"
    """log pi_ref read from reference_logprobs; computed by the model of pretrained_checkpoint; or, for objectives
    without one, none."""
    reference_logprobs: str | None = None
    """Store of reference log-probabilities (cached)."""
    reference_probe_groups: NonNegativeInt = 8
    """Groups to score again at load if pretrained_checkpoint has the reference's weights and the policy others."""
    reference_offload: bool = False
    """Keep the weights of a resident reference on the host, swapped with the policy's for its scoring pass."""
    label_smoothing: float | None = hyperparameter("label_smoothing")
    """Probability in [0, 0.5) that a preference is flipped (conservative DPO)."""
    pair_selection: Literal["best_worst", "random"] | None = hyperparameter("pair_selection")
    """The pair of a group: by value, or drawn anew in every epoch."""
    weight_exponent: float | None = hyperparameter("weight_exponent")
    """Weights are exp(this x distance of the value from the group's mean)."""
    psi_scaling: Literal["group", "given"] | None = hyperparameter("psi_scaling")
    """Values scaled to [0, 1] in each group, or taken as they are."""
    value_temperature: float | None = hyperparameter("value_temperature")
    """Targets are softmax(values / this)."""
    simpo_gamma: float | None = hyperparameter("simpo_gamma")
    """Target margin between the scores of a pair."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule."""

    lr: PositiveFloat
    """Peak learning rate."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam (decoupled weight decay) or SGD with momentum."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate the decay ends at."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "linear"
    """Shape of the decay after warm-up."""
    lr_decay_iters: PositiveInt | None = None
    """Iterations over which the rate decays; none: all of the run."""
    lr_warmup_iters: NonNegativeInt = 0
    """Iterations of linear warm-up from 0; excludes lr_warmup_fraction."""
    lr_warmup_fraction: Fraction | None = None
    """Warm-up as a share of the decay iterations."""
    weight_decay: NonNegativeFloat = 0.01
    """Weight decay; norms and biases have none."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest norm of the whole gradient; 0: no clipping."""
    adam_beta1: ProperFraction = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: ProperFraction = 0.999
    """Decay of Adam's second moment."""
    adam_eps: PositiveFloat = 1e-8
    """Added to Adam's denominator."""
    sgd_momentum: ProperFraction = 0.9
    """Momentum of SGD."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """Batch sizes and length of the run. The batch counts groups (prompts), the microbatch counts responses."""

    global_batch_size: PositiveInt
    """Prompts (groups) of one optimizer step, over all data-parallel ranks."""
    micro_batch_size: PositiveInt | None = None
    """Responses of one microbatch on one rank; bounds activation memory. Excludes max_tokens_per_microbatch."""
    max_tokens_per_microbatch: PositiveInt | None = None
    """Tokens of one microbatch on one rank, responses packed to fill it."""
    train_iters: PositiveInt | None = None
    """Optimizer steps of the run; excludes train_samples."""
    train_samples: PositiveInt | None = None
    """Prompts (groups) of the run."""
    seed: NonNegativeInt = 1234
    """Seed of initial weights, data order and random pairs."""
    eval_interval: PositiveInt | None = None
    """Validate every so many iterations; none: never."""
    eval_iters: PositiveInt = 100
    """Global batches of a validation: with another global_batch_size it sees other groups, unless it sees all."""
    score_drift_threshold: PositiveFloat | None = None
    """Stop when a response's score differs by more than this between the two passes; none: only report it (with FP8:
    what 0.02 a token of the longest response comes to)."""
    logp_tolerance: PositiveFloat | None = None
    """By how much a log-probability per token may differ from the reference's where the weights are the same."""
    gradient_tolerance: PositiveFloat | None = None
    """What verify_gradients allows, relative to the gradient's norm."""
    verify_gradients: NonNegativeInt = 0
    """Compare the gradient of the two passes with one graph's, on a few groups of the batch, in the first so many
    iterations of every start; 0: never."""
    check_weight_hash_across_dp_replicas_interval: PositiveInt | None = 100
    """Compare hashes of the weights over the data- and context-parallel replicas every so many iterations;
    none: never."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """Distributed checkpoints, loadable under any layout."""

    save: str | None = None
    """Folder to write checkpoints to; one is always written at the end."""
    load: str | None = None
    """Folder to resume from: weights, optimizer, schedule, place in the data (the order follows from the seed). Or a
    Hugging Face model to start from: its folder, or hf://org/name; a checkpoint in save then goes first."""
    save_interval: PositiveInt | None = None
    """Write a checkpoint every so many iterations."""
    pretrained_checkpoint: str | None = None
    """Folder of the weights to start from, or a Hugging Face model; used where load holds no checkpoint yet."""
    finetune: bool = False
    """Take only the weights from load and start at iteration 0."""
    no_load_optim: bool = False
    """Do not load the optimizer's state."""
    exit_on_missing_checkpoint: bool = False
    """Refuse to start when load holds no checkpoint, instead of starting anew."""
    export_hf: str | None = None
    """Folder to write the model to at the end of the run, in Hugging Face form."""
    export_hf_interval: PositiveInt | None = None
    """Also every so many iterations, into folders beside it: FOLDER-iter_0000100."""
    ckpt_format: Literal["torch_dist"] = "torch_dist"
    """Format of checkpoints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggingConfig:
    """Where the run reports."""

    run_dir: str | None = None
    """Folder for metrics.jsonl and the run's configuration; none: the folder of save, and with neither, no files."""
    tensorboard_dir: str | None = None
    """Folder for TensorBoard; none: not written."""
    log_interval: PositiveInt = 1
    """Print the console line every so many iterations; metrics.jsonl has every one."""
    log_throughput: bool = False
    """Add TFLOP/s per GPU to the console line."""
    profile: bool = False
    """Save a trace of some iterations, by torch.profiler, for each rank in the run's folder (profile/)."""
    profile_step_start: PositiveInt = 10
    """First iteration of the trace."""
    profile_step_end: PositiveInt = 12
    """The iteration after the last one of the trace."""
