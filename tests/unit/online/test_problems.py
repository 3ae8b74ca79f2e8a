"""Generated problems are right, the same for a seed, and never in both splits."""

from __future__ import annotations

import ast
import hashlib
import operator
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_groupdpo.errors import ConfigError, DataError
from megatron_groupdpo.online.problems import (
    KINDS,
    STYLES,
    Problem,
    generate,
    read_problems,
    split_of,
    write_problems,
)

NUM = 2000


def calculate(expression: str) -> int:
    """Independent of the generator: walks the syntax tree of ``3 + 5 - 4``."""
    node = ast.parse(expression, mode="eval").body

    def value(part: ast.expr) -> int:
        if isinstance(part, ast.BinOp):
            act = {ast.Add: operator.add, ast.Sub: operator.sub}[type(part.op)]
            return act(value(part.left), value(part.right))
        assert isinstance(part, ast.Constant)
        return int(str(part.value))

    return value(node)


def expression_in(prompt: str) -> str:
    """What a prompt asks, read from its words alone."""
    if match := re.fullmatch(r"What is ([0-9 +-]+)\?", prompt):
        return match[1]
    match = re.fullmatch(r"[A-Z][a-z]+ has (\d+) [a-z]+((?:, (?:gets|loses) \d+)+)\. How many now\?", prompt)
    assert match, prompt
    changes = re.findall(r"(gets|loses) (\d+)", match[2])
    return match[1] + "".join(f" {'+' if verb == 'gets' else '-'} {number}" for verb, number in changes)


def test_every_answer_is_what_the_prompt_asks_for():
    problems = generate(NUM, seed=3, split="train", num_terms=(2, 3, 4, 5), max_value=40)
    for problem in problems:
        assert int(problem.answer) == calculate(expression_in(problem.prompt)), problem


def test_every_written_step_is_true_and_the_solution_ends_in_the_answer():
    steps = 0
    for problem in generate(NUM, seed=4, split="train"):
        assert problem.worked_solution.endswith(f"#### {problem.answer}")
        in_symbols = problem.worked_solution.replace("plus", "+").replace("minus", "-").replace("makes", "=")
        for expression, result in re.findall(r"(\d+ [+-] \d+) = (\d+)", in_symbols):
            assert calculate(expression) == int(result), problem
            steps += 1
    assert steps > NUM // 2


def test_values_stay_in_range():
    for problem in generate(NUM, seed=5, split="train", num_terms=(4,), max_value=12):
        assert max(int(number) for number in re.findall(r"\d+", problem.worked_solution)) <= 12
        assert "-" not in problem.answer


def test_the_same_arguments_give_the_same_problems_everywhere():
    assert generate(300, seed=1, split="train") == generate(300, seed=1, split="train")
    assert generate(300, seed=1, split="train")[:100] == generate(100, seed=1, split="train")
    assert generate(300, seed=1, split="train") != generate(300, seed=2, split="train")
    # Pinned, so that a demo's numbers can be repeated on another machine.
    text = repr(generate(50, seed=1, split="held_out")).encode()
    assert hashlib.sha256(text).hexdigest()[:16] == "2105eabfcfc9ad68"


def test_no_arithmetic_is_in_both_splits():
    train = generate(NUM, seed=1, split="train")
    held_out = generate(NUM, seed=2, split="held_out")
    assert not {problem.key for problem in train} & {problem.key for problem in held_out}
    assert {split_of(problem.key) for problem in train} == {"train"}

    # Order and wording do not make another problem.
    def terms(problem: Problem) -> tuple[int, ...]:
        return tuple(sorted(map(int, re.findall(r"[+-]?\d+", expression_in(problem.prompt).replace(" ", "")))))

    assert not set(map(terms, train)) & set(map(terms, held_out))


def test_one_key_in_five_is_held_out():
    keys = [f"sum:+{first}+{second}" for first in range(100) for second in range(100)]
    share = Counter(map(split_of, keys))["held_out"] / len(keys)
    assert 0.18 < share < 0.22


def test_styles_and_kinds_are_all_drawn_and_can_be_chosen():
    def style(problem: Problem) -> str:
        text = problem.worked_solution
        return "words" if "First" in text else "steps" if "=" in text else "direct"

    problems = generate(NUM, seed=6, split="train")
    assert {style(problem) for problem in problems} == set(STYLES)
    assert {problem.prompt.startswith("What") for problem in problems} == {True, False}
    chosen = generate(200, seed=6, split="train", styles=("direct",), kinds=("plain",))
    assert {style(problem) for problem in chosen} == {"direct"}
    assert all(problem.prompt.startswith("What") for problem in chosen)
    weighted = Counter(map(style, generate(NUM, seed=6, split="train", styles=("steps", "steps", "steps", "direct"))))
    assert 2 < weighted["steps"] / weighted["direct"] < 4


def test_distinct_prompts_are_distinct_and_run_out_with_a_message():
    problems = generate(300, seed=7, split="held_out", distinct=True)
    assert len({problem.prompt for problem in problems}) == 300
    with pytest.raises(ConfigError, match="run out at"):
        generate(10_000, seed=7, split="held_out", distinct=True, kinds=("plain",), num_terms=(2,))


@pytest.mark.parametrize(
    "wrong",
    [
        {"split": "test"},
        {"kinds": ("riddle",)},
        {"kinds": ()},
        {"styles": ("short",)},
        {"num_terms": (1, 2)},
        {"num_terms": ()},
        {"max_value": 1},
    ],
)
def test_wrong_arguments_are_named(wrong: dict[str, object]):
    arguments: dict = {"seed": 0, "split": "train", **wrong}
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        generate(1, **arguments)


def test_what_is_written_is_read_back(tmp_path: Path):
    problems = generate(20, seed=8, split="train")
    path = tmp_path / "problems.jsonl"
    write_problems(path, problems)
    assert read_problems(path) == problems
    assert [file.name for file in tmp_path.iterdir()] == ["problems.jsonl"]


def test_a_write_cut_short_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "problems.jsonl"
    old = generate(3, seed=8, split="train")
    write_problems(path, old)

    def breaks_off():
        yield old[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_problems(path, breaks_off())
    assert read_problems(path) == old


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no problems"),
        ('{"question": "q", "answer": "#### 1"}\n{broken', r"p\.jsonl:2: not a JSON"),
        ('{"question": "q", "answer": "42"}', r"p\.jsonl:1: not a problem"),
        ('{"question": "q", "answer": "item # 42"}', r"p\.jsonl:1: not a problem"),
        ('{"question": "q", "answer": 42}', r"p\.jsonl:1: not a problem"),
        ("[1]", r"p\.jsonl:1: not a problem"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path: Path, text: str, message: str):
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_problems(path)


def test_an_absent_or_binary_file_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        read_problems(tmp_path / "absent.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        read_problems(tmp_path / "binary.jsonl")


def test_gsm8k_is_read_as_problems(real_data: Callable[[str], Path]):
    problems = read_problems(real_data("gsm8k_test.jsonl"))
    assert len(problems) == 1319
    assert (problems[0].answer, problems[2].answer) == ("18", "70000")
    assert problems[0].prompt.startswith("Janet")
    assert len({problem.key for problem in problems}) == 1319


def test_kinds_are_listed():
    assert KINDS == ("plain", "story")
