"""The whole job on generated problems: warm start, sample, score, GroupDPO, Hugging Face model, held-out answers.

Every step is a command of this repository, printed before it runs; any of them can be repeated by hand.

    python examples/demo/run.py [--dir runs/demo] [--seed 1] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOOLS = HERE.parent.parent / "tools"
MARKER = "made-by-examples-demo"
NUM_WARM, NUM_TRAIN, NUM_HELD_OUT, NUM_SAMPLES = 24000, 1200, 300, 8
QUICK = 20  # --quick does this much less
MAX_NEW_TOKENS, SAMPLED_ANSWERS = 64, 4


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Where the demo works, and its seed."""

    folder: Path
    seed: int
    started: float
    quick: bool = False

    def scaled(self, count: int) -> int:
        return count // QUICK if self.quick else count

    def say(self, number: int, what: str) -> None:
        print(f"\n=== {number}/10  {what}  ({time.perf_counter() - self.started:.0f} s)", flush=True)

    def call(self, *words: object, ranks: int | None = None) -> None:
        """Run a command of the repository, printed first; its failure ends the demo."""
        launcher, environment = [sys.executable], {}
        if ranks is not None:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        command = [*launcher, *(str(word) for word in words)]
        shown = [*(f"{name}={value}" for name, value in environment.items()), shlex.join(command)]
        print("$ " + " ".join(shown), flush=True)
        if subprocess.run(command, check=False, env=os.environ | environment).returncode:
            raise SystemExit(f"the demo stopped: the command above failed; its files are in {self.folder}")


def main() -> None:
    """All ten steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/demo"), help="working folder (runs/demo)")
    parser.add_argument("--seed", type=int, default=1, help="of problems, weights, samples and order (1)")
    parser.add_argument("--quick", action="store_true", help="see that every step runs; the numbers mean nothing")
    args = parser.parse_args()
    demo = Demo(folder=fresh_folder(args.dir), seed=args.seed, started=time.perf_counter(), quick=args.quick)

    demo.say(1, "generate verifiable problems")
    make_problems(demo)
    demo.say(2, "train a SentencePiece tokenizer")
    train_tokenizer(demo)
    demo.say(3, "warm-start a GPT on worked solutions (objective sft, 2 ranks, data-parallel)")
    preprocess(demo, "warm.jsonl", "warm.store", "--schema", "sft", "--one-sided", "keep")
    warm = demo.folder / "warm"
    train(demo, "warm_start.yaml", "--data-path", demo.folder / "warm.store", "--save", warm)
    demo.say(4, f"sample {NUM_SAMPLES} responses a prompt from that policy and verify them")
    for name in ("train", "held_out"):
        sample_groups(demo, warm, name)
    demo.say(5, "group records to token stores")
    for name in ("train", "held_out"):
        # the policy's own samples: how often one comes up counts
        preprocess(demo, f"{name}_groups.jsonl", f"{name}.store", "--partition", "label", "--duplicates", "keep")
    demo.say(6, "reference log-probabilities, once")
    stores = [demo.folder / f"{name}.store" for name in ("train", "held_out")]
    reference = demo.folder / "reference"
    score = ("--load", warm, "--data-path", *stores, "--output", reference, "--micro-batch-size", 64)
    demo.call(TOOLS / "score_reference.py", *score, ranks=2)
    demo.say(7, "GroupDPO (objective all_pairs, 2 ranks, pipeline-parallel)")
    final = demo.folder / "groupdpo"
    train(
        demo, "groupdpo.yaml", "--data-path", stores[0], "--valid-data-path", stores[1],
        "--reference-logprobs", reference, "--pretrained-checkpoint", warm,
        "--save", final, "--tensorboard-dir", final / "tensorboard",
    )  # fmt: skip
    demo.say(8, "distributed checkpoints to Hugging Face folders")
    for name in ("warm", "groupdpo"):
        demo.call(
            TOOLS / "convert_checkpoint.py", "export", "--load", demo.folder / name,
            "--hf", demo.folder / f"{name}_hf",
        )  # fmt: skip
    demo.say(9, "answer held-out prompts with transformers")
    problems = json_lines(demo.folder / "held_out.jsonl")
    answers = {name: answer_with_transformers(demo, f"{name}_hf", problems) for name in ("warm", "groupdpo")}
    demo.say(10, "before and after")
    demo.call(TOOLS / "plot_run.py", final, "--output", final / "training.png")
    report(demo, answers)


def fresh_folder(folder: Path) -> Path:
    """An empty working folder; an earlier demo's is replaced, anything else is left alone."""
    if folder.exists():
        if any(folder.iterdir()) and not (folder / MARKER).exists():
            raise SystemExit(f"{folder} is not empty and no earlier demo made it; choose another --dir")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()
    return folder


def make_problems(demo: Demo) -> None:
    """Worked solutions for the warm start, and prompts to sample on and to hold out, apart by construction."""
    from megatron_groupdpo.online.problems import generate, write_problems

    # Four terms: a small model is mostly right when it writes the steps down, mostly wrong when it does not.
    four_terms = partial(generate, kinds=("plain",), num_terms=(4,))
    worked = four_terms(demo.scaled(NUM_WARM), seed=demo.seed, split="train")
    sampled = four_terms(demo.scaled(NUM_TRAIN), seed=demo.seed + 1000, split="train", distinct=True)
    held_out = four_terms(demo.scaled(NUM_HELD_OUT), seed=demo.seed + 2000, split="held_out", distinct=True)
    with (demo.folder / "warm.jsonl").open("w", encoding="utf-8") as file:
        for problem in worked:
            file.write(json.dumps({"prompt": problem.prompt, "response": problem.worked_solution}) + "\n")
    write_problems(demo.folder / "train.jsonl", sampled)
    write_problems(demo.folder / "held_out.jsonl", held_out)
    with (demo.folder / "corpus.txt").open("w", encoding="utf-8") as file:
        for problem in worked:
            file.write(f"{problem.prompt}\n{problem.worked_solution}\n")
    for problem in worked[:3]:
        print(f"  {problem.prompt}  ->  {problem.worked_solution}")
    print(f"{len(worked)} worked solutions, {len(sampled)} prompts to sample on, {len(held_out)} held out")


def train_tokenizer(demo: Demo) -> None:
    """A small BPE model with single digits, of the kind that exports to Hugging Face with equal ids."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=str(demo.folder / "corpus.txt"),
        model_prefix=str(demo.folder / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        hard_vocab_limit=False,
        split_digits=True,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=3,
        minloglevel=2,
    )
    print(f"tokenizer: {demo.folder / 'tokenizer.model'}")


def preprocess(demo: Demo, records: str, store: str, *options: object) -> None:
    """Group records to a token store."""
    demo.call(
        TOOLS / "preprocess_data.py", "--input", demo.folder / records, "--output", demo.folder / store,
        "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", demo.folder / "tokenizer.model",
        "--seq-length", 128, *options,
    )  # fmt: skip


def train(demo: Demo, config: str, *flags: object) -> None:
    """A training run on two ranks."""
    quick = ("--train-iters", 60) if demo.quick else ()
    demo.call("-m", "megatron_groupdpo.train", "--config", HERE / config, "--seed", demo.seed, *flags, *quick, ranks=2)


def sample_groups(demo: Demo, checkpoint: Path, name: str) -> None:
    """Responses of the policy to the prompts of a split, verified."""
    demo.call(
        TOOLS / "sample_groups.py", "--load", checkpoint, "--prompts", demo.folder / f"{name}.jsonl",
        "--output", demo.folder / f"{name}_groups.jsonl", "--num-samples-per-prompt", NUM_SAMPLES,
        "--max-new-tokens", MAX_NEW_TOKENS, "--batch-size", 1024, "--seed", demo.seed, ranks=2,
    )  # fmt: skip


def answer_with_transformers(demo: Demo, model_folder: str, problems: list[dict]) -> dict[str, float]:
    """Share of right answers: sampled at temperature 1 (SAMPLED_ANSWERS a prompt), and with the likeliest tokens."""
    import torch
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_groupdpo.online.verifiers import get_verifier

    tokenizer = AutoTokenizer.from_pretrained(demo.folder / model_folder)
    model = AutoModelForCausalLM.from_pretrained(demo.folder / model_folder).eval()
    verify = get_verifier("exact_answer")
    by_length: dict[int, list[tuple[list[int], str]]] = {}  # prompts of one length need no padding
    for problem in problems:
        ids = tokenizer(problem["prompt"])["input_ids"]
        by_length.setdefault(len(ids), []).append((ids, problem["answer"]))
    torch.manual_seed(demo.seed)
    ways = {
        "sampled": {"do_sample": True, "temperature": 1.0, "top_k": 0, "num_return_sequences": SAMPLED_ANSWERS},
        "greedy": {"do_sample": False, "num_return_sequences": 1},
    }
    accuracy = {}
    for way, options in ways.items():
        right, count = 0.0, int(options["num_return_sequences"])
        bar = tqdm(total=len(problems), desc=f"{model_folder}, {way}", unit=" prompts")
        for length, rows in sorted(by_length.items()):
            ids = torch.tensor([row[0] for row in rows])
            with torch.no_grad():
                out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_NEW_TOKENS, **options)
            texts = tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
            right += sum(verify(text, rows[index // count][1]).score for index, text in enumerate(texts))
            bar.update(len(rows))
        bar.close()
        accuracy[way] = right / (count * len(problems))
    return accuracy


def report(demo: Demo, answers: dict[str, dict[str, float]]) -> None:
    """The table, also kept as JSON, and where to look next."""
    final = demo.folder / "groupdpo"
    evals = [line for line in json_lines(final / "metrics.jsonl") if "eval/rewards/margins" in line]
    first, last = evals[0], evals[-1]
    rows = {
        "verifier accuracy, sampled answers": (answers["warm"]["sampled"], answers["groupdpo"]["sampled"]),
        "verifier accuracy, likeliest answer": (answers["warm"]["greedy"], answers["groupdpo"]["greedy"]),
        "group pairwise accuracy": (first["eval/rewards/accuracies"], last["eval/rewards/accuracies"]),
        "reward margin": (first["eval/rewards/margins"], last["eval/rewards/margins"]),
    }
    print(f"\n{'held-out prompts':<44}{'before':>10}{'after':>10}{'change':>10}")
    for name, (before, after) in rows.items():
        print(f"{name:<44}{before:>10.3f}{after:>10.3f}{after - before:>+10.3f}")
    seconds = time.perf_counter() - demo.started
    result = {"seed": demo.seed, "seconds": seconds, **{n: {"before": b, "after": a} for n, (b, a) in rows.items()}}
    (demo.folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nmodel        {demo.folder / 'groupdpo_hf'} (AutoModelForCausalLM.from_pretrained)")
    print(f"plot         {final / 'training.png'}")
    print(f"TensorBoard  {sys.executable} -m tensorboard.main --logdir {final / 'tensorboard'}")
    print(f"took         {seconds:.0f} s")


def json_lines(path: Path) -> list[dict]:
    """The objects of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


if __name__ == "__main__":
    main()
