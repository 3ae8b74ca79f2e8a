"""The laws of every objective, float64: against loops, against closed forms, under permutation and padding."""

from __future__ import annotations

import math

import pytest
import torch
from objective_oracle import ORACLES

from megatron_groupdpo.objectives import (
    OBJECTIVES,
    active_groups,
    coefficients,
    get_objective,
    group_keys,
    group_loss,
    loss_and_coefficients,
    nll_responses,
    separable_terms,
    used_responses,
)

NAN = math.nan

# Every objective at its defaults, and again with each hyperparameter moved.
CASES = [
    ("all_pairs", {}),
    ("all_pairs", {"label_smoothing": 0.2}),
    ("mpo", {}),
    ("softmax", {}),
    ("margin", {}),
    ("margin", {"label_smoothing": 0.1}),
    ("dpo", {}),
    ("dpo", {"label_smoothing": 0.3}),
    ("weighted_mpo", {}),
    ("weighted_mpo", {"weight_exponent": 0.3}),
    ("plackett_luce", {}),
    ("lipo_lambda", {}),
    ("lipo_lambda", {"psi_scaling": "given"}),
    ("info_nca", {}),
    ("info_nca", {"value_temperature": 0.4}),
    ("nca", {}),
    ("nca", {"value_temperature": 2.0}),
    ("group_bce", {}),
    ("ipo_pairs", {"beta": 0.7}),
    ("simpo_pairs", {}),
    ("simpo_pairs", {"simpo_gamma": 1.3, "label_smoothing": 0.1}),
    ("sft", {}),
]
IDS = [f"{name}-{'-'.join(map(str, options.values()))}" for name, options in CASES]
every_case = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
PAIRED_FOUR = ("all_pairs", "mpo", "softmax", "margin")
SMALLEST = {name: next(o for n, o in CASES if n == name) for name, _ in CASES}

# Ragged, K = 6: two-sided with tied and absent values, one-sided, all values equal, no values, empty.
LABELS = torch.tensor(
    [
        [1, -1, 1, -1, -1, 1],
        [1, -1, 0, 0, 0, 0],
        [-1, 1, -1, 1, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [-1, -1, 0, 0, 0, 0],
        [1, -1, -1, 1, 0, 0],
        [1, -1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]
)
VALUES = torch.tensor(
    [
        [0.9, 0.1, 0.5, 0.5, 0.0, 0.9],
        [0.8, 0.3, NAN, NAN, NAN, NAN],
        [NAN, 0.7, 0.2, 0.6, NAN, NAN],
        [0.2, 0.9, 0.9, NAN, NAN, NAN],
        [0.4, 0.1, NAN, NAN, NAN, NAN],
        [0.5, 0.5, 0.5, 0.5, NAN, NAN],
        [NAN, NAN, NAN, NAN, NAN, NAN],
        [NAN, NAN, NAN, NAN, NAN, NAN],
    ],
    dtype=torch.float64,
)
KEYS = torch.randint(-(2**62), 2**62, LABELS.shape, generator=torch.Generator().manual_seed(5))


def random_scores(seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(LABELS.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_cases_cover_every_objective():
    assert {name for name, _ in CASES} == set(OBJECTIVES) == set(ORACLES)


@every_case
@pytest.mark.parametrize(("seed", "scale"), [(0, 2.0), (1, 2.0), (2, 9.0), (3, 0.0)])
def test_loss_equals_the_plain_loop(name, options, seed, scale):
    scores = random_scores(seed, scale)  # at scale 0, as at step 0, all scores tie
    loss = group_loss(name, scores, LABELS, VALUES, tie_keys_GK=KEYS, **options)
    rows = zip(scores.tolist(), LABELS.tolist(), VALUES.tolist(), KEYS.tolist())
    close(loss, torch.tensor([ORACLES[name](*row, **options) for row in rows], dtype=torch.float64))


@every_case
def test_coefficients_equal_finite_differences(name, options):
    scores, step = random_scores(), 1e-6
    given = coefficients(name, scores, LABELS, VALUES, tie_keys_GK=KEYS, **options)
    for k in range(scores.shape[1]):
        bump = torch.zeros_like(scores)
        bump[:, k] = step
        up = group_loss(name, scores + bump, LABELS, VALUES, tie_keys_GK=KEYS, **options)
        down = group_loss(name, scores - bump, LABELS, VALUES, tie_keys_GK=KEYS, **options)
        torch.testing.assert_close(given[:, k], (up - down) / (2 * step), rtol=1e-7, atol=1e-8)


def test_one_pair_is_dpo():
    scores = 3 * torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, -1]]).expand(50, 2)
    values = torch.tensor([[2.0, -1.0]]).expand(50, 2)
    expected = torch.log1p(torch.exp(scores[:, 1] - scores[:, 0]))
    for name in (*PAIRED_FOUR, "dpo", "plackett_luce"):
        close(group_loss(name, scores, labels, values), expected)
    close(group_loss("simpo_pairs", scores, labels, simpo_gamma=0.0), expected)
    close(group_loss("weighted_mpo", scores, labels, values, weight_exponent=0.0), expected)


def test_one_pair_with_label_smoothing_is_conservative_dpo():
    scores = torch.tensor([[0.3, 1.1]], dtype=torch.float64)
    z, e = 0.3 - 1.1, 0.1
    expected = -(1 - e) * math.log(1 / (1 + math.exp(-z))) - e * math.log(1 / (1 + math.exp(z)))
    for name in ("all_pairs", "margin", "dpo"):
        loss = group_loss(name, scores, torch.tensor([[1, -1]]), label_smoothing=e)
        close(loss, torch.tensor([expected], dtype=torch.float64))


@every_case
def test_coefficients_of_a_group_sum_to_zero(name, options):
    sums = coefficients(name, random_scores(), LABELS, VALUES, **options).sum(1)
    if name in ("nca", "group_bce"):
        assert sums[0].abs() > 1e-3, "these two act on absolute scores"
    else:
        close(sums, torch.zeros_like(sums), 1e-13)


@pytest.mark.parametrize("name", PAIRED_FOUR)
def test_positives_are_pushed_up_and_negatives_down(name):
    c = coefficients(name, random_scores(scale=5.0), LABELS, VALUES)
    assert bool((c[LABELS == 1] <= 0).all())
    assert bool((c[LABELS == -1] >= 0).all())
    assert bool((c[0] != 0).all())


def test_coefficients_have_the_closed_forms_of_the_table():
    s = random_scores()[0]
    p, n = LABELS[0] == 1, LABELS[0] == -1
    num_p, num_n = int(p.sum()), int(n.sum())
    sigma = torch.sigmoid(s[None, :] - s[:, None])  # [i, j]: sigma(s_j - s_i)
    expected = {name: torch.zeros(6, dtype=torch.float64) for name in PAIRED_FOUR}
    expected["all_pairs"][p] = -sigma[p][:, n].sum(1) / (num_p * num_n)
    expected["all_pairs"][n] = sigma[p][:, n].sum(0) / (num_p * num_n)
    expected["mpo"][p] = s.softmax(0)[p] - s[p].softmax(0)
    expected["mpo"][n] = s.softmax(0)[n]
    m = s[p].mean() - s[n].mean()
    expected["margin"][p] = -torch.sigmoid(-m) / num_p
    expected["margin"][n] = torch.sigmoid(-m) / num_n
    for i in p.nonzero().flatten().tolist():
        q = torch.cat([s[i : i + 1], s[n]]).softmax(0)
        expected["softmax"][i] = -(1 - q[0]) / num_p
        expected["softmax"][n] += q[1:] / num_p
    for name, c in expected.items():
        close(coefficients(name, s[None], LABELS[:1])[0], c)


def test_value_softmax_coefficients_have_the_closed_forms_of_the_table():
    s, r = random_scores()[0], VALUES[0]
    q = (r / 0.4).softmax(0)
    close(coefficients("info_nca", s[None], LABELS[:1], r[None], value_temperature=0.4)[0], s.softmax(0) - q)
    c = coefficients("nca", s[None], LABELS[:1], r[None], value_temperature=0.4)[0]
    close(c, -q * torch.sigmoid(-s) + torch.sigmoid(s) / 6)
    w = s + LABELS[0] * (r - r.mean())
    c = coefficients("weighted_mpo", s[None], LABELS[:1], r[None])[0]
    p = LABELS[0] == 1
    close(c, w.softmax(0) - torch.where(p, torch.where(p, w, -math.inf).softmax(0), 0.0))


@every_case
def test_permuting_responses_permutes_coefficients_and_keeps_losses(name, options):
    scores, order = random_scores(), torch.tensor([3, 5, 0, 4, 2, 1])
    scores[0, 2] = scores[0, 3]  # equal scores and equal values: the tie keys must decide, not the column
    loss, c = loss_and_coefficients(name, scores, LABELS, VALUES, tie_keys_GK=KEYS, **options)
    permuted_loss, permuted_c = loss_and_coefficients(
        name, scores[:, order], LABELS[:, order], VALUES[:, order], tie_keys_GK=KEYS[:, order], **options
    )
    close(permuted_loss, loss)
    close(permuted_c, c[:, order])


@every_case
def test_padding_cells_change_nothing_and_get_zero(name, options):
    scores = random_scores()
    loss, c = loss_and_coefficients(name, scores, LABELS, VALUES, tie_keys_GK=KEYS, **options)
    assert bool((c[LABELS == 0] == 0).all())
    for junk in (NAN, math.inf, -math.inf, 1e30):
        padded_scores = torch.where(LABELS == 0, junk, scores)
        padded_values = torch.where(LABELS == 0, junk, VALUES)
        junk_loss, junk_c = loss_and_coefficients(
            name, padded_scores, LABELS, padded_values, tie_keys_GK=KEYS, **options
        )
        assert torch.equal(junk_loss, loss)
        assert torch.equal(junk_c, c)


@every_case
def test_ragged_groups_equal_the_groups_one_by_one(name, options):
    scores = random_scores()
    loss, c = loss_and_coefficients(name, scores, LABELS, VALUES, tie_keys_GK=KEYS, **options)
    for g, row in enumerate(LABELS):
        cut = slice(0, int((row != 0).sum()))
        if cut.stop == 0:
            continue
        alone = (x[g : g + 1, cut] for x in (scores, LABELS, VALUES))
        alone_loss, alone_c = loss_and_coefficients(name, *alone, tie_keys_GK=KEYS[g : g + 1, cut], **options)
        close(alone_loss[0], loss[g])
        close(alone_c[0], c[g, cut])


@every_case
def test_empty_groups_have_loss_and_coefficients_exactly_zero(name, options):
    scores = random_scores()
    active = active_groups(name, LABELS, VALUES, **options)
    loss, c = loss_and_coefficients(name, scores, LABELS, VALUES, **options)
    assert bool((loss[~active] == 0).all())
    assert bool((c[~active] == 0).all())
    if name != "sft":
        assert bool((loss[active] > 0).all())
    # The same through a graph of the caller's own, where a NaN would spread.
    leaf = scores.clone().requires_grad_()
    group_loss(name, leaf, LABELS, VALUES, **options).sum().backward()
    assert torch.equal(leaf.grad, c)


@every_case
def test_a_batch_of_empty_groups_only_has_a_zero_gradient(name, options):
    labels = torch.tensor([[-1, -1, 0], [0, 0, 0]])
    leaf = torch.full((2, 3), NAN, requires_grad=True)
    loss = group_loss(name, leaf, labels, torch.full((2, 3), 0.5), **options)
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros(2))
    assert torch.equal(leaf.grad, torch.zeros(2, 3))


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_scores_stay_finite(name, options, dtype):
    for seed in range(3):
        scores = (1e4 * random_scores(seed).sign()).to(dtype)
        loss, c = loss_and_coefficients(name, scores, LABELS, VALUES, **options)
        assert bool(loss.isfinite().all())
        assert bool(c.isfinite().all())
        if name != "ipo_pairs":  # a squared distance grows with the scores
            assert float(c.abs().max()) <= 6.0


@every_case
def test_a_large_common_part_of_the_scores_costs_no_precision(name, options):
    if name in ("nca", "group_bce"):
        return  # these two act on absolute scores
    scores = (random_scores() * 1024).round() / 1024  # so that fp32 holds the sums below exactly
    near = loss_and_coefficients(name, scores, LABELS, VALUES, tie_keys_GK=KEYS, **options)
    far = loss_and_coefficients(name, scores.float() + 8192, LABELS, VALUES, tie_keys_GK=KEYS, **options)
    for expected, found in zip(near, far):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_step_zero_losses_have_their_closed_forms():
    zeros = torch.zeros_like(VALUES)
    num_p, num_n = (LABELS == 1).sum(1).double(), (LABELS == -1).sum(1).double()
    both = (num_p > 0) & (num_n > 0)
    log2 = torch.full_like(num_p, math.log(2))
    expected = {
        "all_pairs": log2,
        "margin": log2,
        "dpo": log2,
        "mpo": torch.log((num_p + num_n) / num_p),
        "softmax": torch.log(1 + num_n),
        "group_bce": 2 * log2,
        "ipo_pairs": torch.full_like(num_p, 1 / (2 * 0.7) ** 2),
    }
    for name, loss in expected.items():
        close(group_loss(name, zeros, LABELS, VALUES, **SMALLEST[name]), torch.where(both, loss, 0.0))
    distinct = torch.tensor([True, True, True, True, True, False, False, False])
    valued = ((LABELS != 0) & ~VALUES.isnan()).sum(1).double()
    factorial = torch.lgamma(valued + 1)
    close(group_loss("plackett_luce", zeros, LABELS, VALUES), torch.where(distinct, factorial, 0.0))
    close(group_loss("info_nca", zeros, LABELS, VALUES), torch.where(distinct, valued.log(), 0.0))
    close(group_loss("nca", zeros, LABELS, VALUES), torch.where(distinct, 2 * log2, 0.0))


def test_which_groups_are_empty_for_each_objective():
    both_sides = [True, True, True, False, False, True, True, False]
    expected = {
        "weighted_mpo": [True, True, True, False, False, True, False, False],
        "sft": [True, True, True, True, False, True, True, False],
    }
    for name in ("plackett_luce", "lipo_lambda", "info_nca", "nca"):
        expected[name] = [True, True, True, True, True, False, False, False]
    for name in OBJECTIVES:
        active = active_groups(name, LABELS, VALUES, **SMALLEST[name])
        assert active.tolist() == expected.get(name, both_sides), name


@every_case
def test_unused_scores_are_never_read(name, options):
    scores = random_scores()
    used = used_responses(name, LABELS, VALUES, tie_keys_GK=KEYS, **options)
    assert not bool((used & (LABELS == 0)).any())
    assert not bool(used[~active_groups(name, LABELS, VALUES, **options)].any())
    full = loss_and_coefficients(name, scores, LABELS, VALUES, tie_keys_GK=KEYS, **options)
    scores_unused_lost = torch.where(used, scores, NAN)
    lost = loss_and_coefficients(name, scores_unused_lost, LABELS, VALUES, tie_keys_GK=KEYS, **options)
    assert torch.equal(full[0], lost[0])
    assert torch.equal(full[1], lost[1])
    if name not in ("sft", "lipo_lambda"):  # a pair of neighbouring equal psi may weigh nothing
        assert bool((full[1][used] != 0).all())


@every_case
def test_the_nll_lies_on_positives_that_get_a_pass(name, options):
    used = used_responses(name, LABELS, VALUES, tie_keys_GK=KEYS, **options)
    nll = nll_responses(name, LABELS, VALUES, tie_keys_GK=KEYS, **options)
    active = active_groups(name, LABELS, VALUES, **options)
    assert bool((LABELS[nll] == 1).all())
    assert bool((used | ~nll)[active].all())
    if not get_objective(name).needs_values:
        has_positive = (LABELS == 1).any(1)
        expected = torch.where(has_positive, 1, 0) if name == "dpo" else (LABELS == 1).sum(1)
        assert torch.equal(nll.sum(1), expected)


def test_sft_gives_negatives_no_pass():
    assert torch.equal(used_responses("sft", LABELS), LABELS == 1)


def test_dpo_takes_the_best_positive_and_the_worst_negative():
    labels = torch.tensor([[1, 1, -1, -1], [1, 1, -1, -1], [1, 1, -1, -1]])
    values = torch.tensor([[0.2, 0.9, 0.1, 0.3], [0.5, 0.5, NAN, 0.3], [NAN, NAN, NAN, NAN]])
    keys = torch.tensor([[9, 0, 0, 9], [1, 2, 9, 0], [1, 7, 3, 2]])
    used = used_responses("dpo", labels, values, tie_keys_GK=keys)
    assert used.tolist() == [[False, True, True, False], [False, True, False, True], [False, True, True, False]]
    assert used_responses("dpo", labels).tolist() == [[True, False, True, False]] * 3


def test_dpo_random_pair_is_one_of_each_side_fixed_by_seed_and_group_id():
    num_groups = 400
    labels = torch.tensor([[1, -1, 1, -1, 1, -1, 0, 0]]).expand(num_groups, 8)
    ids = torch.arange(num_groups)

    def drawn(ids, **key):
        return used_responses("dpo", labels, pair_selection="random", group_keys_G=group_keys(ids, **key))

    used = drawn(ids, seed=1)
    assert torch.equal(used, drawn(ids, seed=1))
    assert torch.equal(used.flip(0), drawn(ids.flip(0), seed=1)), "a group's draw does not depend on the batch"
    assert not torch.equal(used, drawn(ids, seed=2))
    assert not torch.equal(used, drawn(ids, seed=1, epoch=1))
    assert bool((used & (labels == 1)).sum(1).eq(1).all())
    assert bool((used & (labels == -1)).sum(1).eq(1).all())
    counts = used.sum(0).double()[labels[0] != 0]
    assert bool((counts - num_groups / 3).abs().max() < 5 * (num_groups * 2 / 9) ** 0.5)
    # The two sides are drawn independently: all 9 pairs occur.
    assert len({tuple(row) for row in used.tolist()}) == 9


def test_group_keys_are_fixed_for_all_time():
    """A change of these numbers changes every drawn pair of every resumed run."""
    assert group_keys(torch.tensor([0, 1, -5]), seed=1234, epoch=2).tolist() == [
        _splitmix(_splitmix(_splitmix(1234) + 2) + i) for i in (0, 1, -5)
    ]


def _splitmix(x: int) -> int:
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    x ^= x >> 31
    return x - 2**64 if x >= 2**63 else x


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if OBJECTIVES[n].separable])
def test_separable_terms_sum_to_the_loss_and_read_one_score_each(name):
    scores = random_scores()
    terms = separable_terms(name, scores, LABELS, VALUES)
    close(terms.sum(1), group_loss(name, scores, LABELS, VALUES))
    for k in range(scores.shape[1]):
        alone = torch.where(torch.arange(6) == k, scores, NAN)
        assert torch.equal(separable_terms(name, alone, LABELS, VALUES)[:, k], terms[:, k])
        one_c = coefficients(name, torch.where(torch.arange(6) == k, scores, 0.0), LABELS, VALUES)[:, k]
        close(one_c, coefficients(name, scores, LABELS, VALUES)[:, k])


def test_objectives_declared_coupled_do_couple():
    scores = random_scores()
    for name in OBJECTIVES:
        if not get_objective(name).separable:
            moved = scores.clone()
            moved[:, 0] += 0.5
            c = coefficients(name, scores, LABELS, VALUES, tie_keys_GK=KEYS, **SMALLEST[name])
            moved_c = coefficients(name, moved, LABELS, VALUES, tie_keys_GK=KEYS, **SMALLEST[name])
            assert not torch.allclose(c[:, 1:], moved_c[:, 1:]), name


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_values_are_needed_where_declared_and_nowhere_else(name):
    used = used_responses(name, LABELS, VALUES, **SMALLEST[name])
    halved = torch.where(VALUES > 0.5, VALUES / 2, VALUES)
    loss = group_loss(name, random_scores(), LABELS, VALUES, **SMALLEST[name])
    changed = not torch.equal(loss, group_loss(name, random_scores(), LABELS, halved, **SMALLEST[name]))
    assert changed == (get_objective(name).needs_values or name == "dpo")
    assert bool(used.any())


def test_half_precision_scores_are_computed_in_fp32():
    scores = random_scores().to(torch.bfloat16)
    loss, c = loss_and_coefficients("all_pairs", scores, LABELS)
    assert loss.dtype == c.dtype == torch.float32
    close(loss, group_loss("all_pairs", scores.float(), LABELS))


def test_coefficients_work_where_gradients_are_off():
    with torch.no_grad():
        outside = coefficients("mpo", random_scores(), LABELS)
    with torch.inference_mode():
        inference = random_scores()
    close(coefficients("mpo", inference, LABELS), outside)
