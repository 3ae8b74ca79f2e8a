"""A verifier accepts the right answer in any usual form, and nothing that only looks like it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_groupdpo.errors import ConfigError, DataError
from megatron_groupdpo.online.problems import generate, read_problems
from megatron_groupdpo.online.verifiers import (
    Verdict,
    exact_answer,
    get_verifier,
    marked_answer,
    register,
    verifier_names,
)

RIGHT = [
    ("#### 42", "42"),
    ("7 * 6 = 42. #### 42", "42"),
    ("####42", "42"),
    ("#### 42.", "42"),
    ("#### 42.0", "42"),
    ("#### $42", "42"),
    ("#### +42", "42"),
    ("#### 42 apples", "42"),
    ("#### 42%", "42"),
    ("#### 42 (that is, 42 apples)", "42"),
    ("####\n\n42", "42"),
    ("#### 41 no, wrong. #### 42", "42"),
    ("#### 42\n\nQuestion: what is 3 + 4?", "42"),
    ("#### 1,234,567", "1234567"),
    ("#### 1234567", "1,234,567"),
    ("#### $1,234.50", "1234.5"),
    ("#### -5", "-5"),
    ("#### \u22125", "-5"),
    ("#### -$5", "$-5"),
    ("#### 1/2", "0.5"),
    ("#### .5", "0.5"),
    ("#### 007", "7"),
    ("so 7 * 6 = 42", "42"),
    ("so 7 * 6 = 42.", "42"),
    ("so 7 * 6 = 42. Ann has 42 cups.", "42"),
    ("The answer is 42.", "42"),
    ("the Answer is: 42", "42"),
    ("Answer: 42", "42"),
    ("7 * 6 = <<7*6=42>>42 cups\nA: 42", "42"),
    ("#### 42", "Six times seven is <<6*7=42>>42\n#### 42"),
]

WRONG = [
    ("", "42"),
    ("42", "42"),
    ("I think it might be 42", "42"),
    ("#### ", "42"),
    ("#### forty-two", "42"),
    ("#### 41", "42"),
    ("#### 420", "42"),
    ("#### 142", "42"),
    ("#### 4 2", "42"),
    ("#### 42 or 43", "42"),
    ("#### 40 41 42 43", "42"),
    ("#### 42-43", "42"),
    ("#### 42e3", "42"),
    ("#### 4,2", "42"),
    ("#### 1,2345", "12345"),
    ("#### 1,2341,234", "1234"),
    ("#### 42.5", "42"),
    ("#### -42", "42"),
    ("#### 42 #### 41", "42"),
    ("#### \uff14\uff12", "42"),
    ("#### \u0664\u0662", "42"),
    ("#### 42/0", "42"),
    ("so 7 * 6 = 42. Then 42 + 1 makes 43.", "42"),
    ("= 42, and the rest is 5", "42"),
    ("the answer is not 41 but 42", "42"),
    ("#### 0.1000000000000000000001", "0.1"),
    ("#### " + "9" * 100_000, "9"),
    ("= " * 50_000 + "1 2", "2"),
]


@pytest.mark.parametrize(("response", "known"), RIGHT)
def test_right_answers_in_usual_forms(response: str, known: str):
    verdict = exact_answer(response, known)
    assert (verdict.score, verdict.label) == (1.0, 1)
    assert verdict.found


@pytest.mark.parametrize(("response", "known"), WRONG)
def test_what_only_looks_right(response: str, known: str):
    verdict = exact_answer(response, known)
    assert (verdict.score, verdict.label) == (0.0, -1)


def test_the_strict_verifier_asks_for_the_marker():
    assert marked_answer("#### 42", "42").score == 1
    assert marked_answer("so 7 * 6 = 42.", "42") == Verdict(score=0.0, label=-1, found=None)


def test_the_answer_found_is_given_as_written():
    assert exact_answer("#### $1,234.", "1").found == "$1,234"
    assert exact_answer("nothing", "1").found is None


@given(st.text(alphabet=st.characters(), max_size=200), st.integers(-(10**9), 10**9))
def test_a_response_never_makes_it_raise(text: str, number: int):
    for response in (text, f"{text}#### {text}", f"= {text}"):
        assert exact_answer(response, str(number)).label in (-1, 1)
    assert exact_answer(f"{text}\n#### {number}", str(number)).label == 1
    assert exact_answer(f"{text}\n#### {number}", str(number + 1)).label == -1


@pytest.mark.parametrize("name", verifier_names())
@pytest.mark.parametrize("response", ["", "no number", "1/0", "1 or 2", "#### \ud800", "9" * 100_000])
def test_what_is_no_answer_is_wrong_to_every_verifier(name: str, response: str):
    verdict = get_verifier(name)(response, "42")
    assert (verdict.score, verdict.label) == (0.0, -1)


@pytest.mark.parametrize("known", ["", "forty-two", "1 or 2", "text ####", "1/0"])
def test_a_known_answer_that_cannot_be_one_is_an_error(known: str):
    with pytest.raises(DataError, match="known answer"):
        exact_answer("#### 42", known)


def test_every_generated_solution_is_right_for_its_problem_and_wrong_for_another():
    for problem in generate(1000, seed=0, split="train"):
        assert marked_answer(problem.worked_solution, problem.answer).score == 1
        assert marked_answer(problem.worked_solution, str(int(problem.answer) + 1)).score == 0


@pytest.mark.parametrize("name", ["gsm8k_train.jsonl", "gsm8k_test.jsonl"])
def test_every_gsm8k_answer_is_read(real_data: Callable[[str], Path], name: str):
    problems = read_problems(real_data(name))
    assert len(problems) > 1000
    for problem in problems:
        assert marked_answer(problem.worked_solution, problem.answer).score == 1, problem
        assert marked_answer(problem.worked_solution, problem.answer.replace(",", "") + "1").score == 0, problem


def test_judgements_agree_with_gsm8ks_labels_of_model_solutions(real_data: Callable[[str], Path]):
    labels = []
    for line in real_data("gsm8k_model_solutions.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        known = record["ground_truth"].rpartition("A:")[2].strip()
        for solution in record.values():
            if isinstance(solution, dict):
                labels.append((solution["is_correct"], exact_answer(solution["solution"], known).label == 1))
    assert len(labels) == 4 * 1319
    assert [given for given, judged in labels if given != judged] == []
    assert {True, False} == {given for given, _ in labels}


def test_a_verifier_is_found_by_its_name():
    assert get_verifier("exact_answer") is exact_answer
    assert {"exact_answer", "marked_answer"} <= set(verifier_names())
    with pytest.raises(ConfigError, match="did you mean 'exact_answer'"):
        get_verifier("exact_anwser")


def test_a_name_is_taken_once():
    with pytest.raises(AssertionError, match="twice"):
        register("exact_answer")(marked_answer)
    assert get_verifier("exact_answer") is exact_answer
