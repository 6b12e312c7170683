"""stage2_fuse.py against hand-computed tokens and slow loops. Run: pytest
tests/test_stage2_fuse.py
"""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from stage2_fuse import (
    STRATEGIES,
    Projector,
    fuse,
    greedy_drop,
    lowest,
    mutual_redundancy,
    proportional,
)

SIZES = [(3, 4), (5, 2, 7), (1, 9, 4, 6), (16, 12, 16, 9)]  # tokens of each encoder


def features(sizes, B=2, D=8, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, n, D, generator=generator, dtype=dtype) for n in sizes]


def naive_redundancy(tokens, b, j, i):
    """The double sum, one cosine at a time."""
    total = 0.0
    for l, other in enumerate(tokens):
        if l != j:
            for m in range(other.shape[1]):
                x, y = tokens[j][b, i], other[b, m]
                total += float(x @ y / (x.norm() * y.norm()))
    return total


def naive_greedy(tokens, b, drop):
    """Drop the token of highest redundancy over what is still there, recomputed from scratch each
    time.
    """
    alive = [(j, i) for j, z in enumerate(tokens) for i in range(z.shape[1])]

    def cos(p, q):
        first, second = tokens[p[0]][b, p[1]], tokens[q[0]][b, q[1]]
        return float(F.cosine_similarity(first, second, dim=0))

    for _ in range(drop):
        scores = [sum(cos(p, q) for q in alive if q[0] != p[0]) for p in alive]
        alive.pop(max(range(len(alive)), key=lambda a: scores[a]))
    return alive


def test_redundancy_of_four_tokens_by_hand():
    first = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])  # (1, 2, 2): east, north
    second = torch.tensor([[[3.0, 0.0], [1.0, 1.0]]])  # east, north-east
    R = mutual_redundancy([first, second])
    s = math.sqrt(0.5)
    torch.testing.assert_close(R[0], torch.tensor([[1 + s, 0 + s]]))
    torch.testing.assert_close(R[1], torch.tensor([[1.0, 2 * s]]))


def test_four_tokens_by_hand_keep_the_lowest_in_their_order():
    first, second = (
        torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]),
        torch.tensor([[[3.0, 0.0], [1.0, 1.0]]]),
    )
    fused = fuse([first, second], 2)  # R = 1.71, 0.71, 1.00, 1.41: tokens 1 and 2 stay
    assert fused.keep_idx.tolist() == [[1, 2]] and fused.encoder_id.tolist() == [[0, 1]]
    assert fused.tokens.tolist() == [[[0.0, 2.0], [3.0, 0.0]]]
    assert fused.survivors(2).tolist() == [[1, 1]]


@pytest.mark.parametrize("sizes", SIZES)
def test_sums_equal_the_naive_double_sum(sizes):
    tokens = features(sizes)
    R = mutual_redundancy(tokens)
    for j, z in enumerate(tokens):
        for b in range(2):
            expected = torch.tensor([naive_redundancy(tokens, b, j, i) for i in range(z.shape[1])])
            torch.testing.assert_close(R[j][b], expected, atol=1e-5, rtol=1e-5)


def test_redundancy_ignores_an_encoder_s_own_tokens_and_the_length_of_vectors():
    tokens = features((4, 5))
    alone = mutual_redundancy(tokens)[0]
    more = [torch.cat([tokens[0], tokens[0] * 3], dim=1), tokens[1] * 7]
    torch.testing.assert_close(mutual_redundancy(more)[0], torch.cat([alone, alone], dim=1))


def test_redundancy_keeps_65536_tokens_without_a_pairwise_matrix():
    tokens = [torch.randn(1, 32768, 16), torch.randn(1, 32768, 16)]  # N x N floats would be 17 GB
    fused = fuse(tokens, 1000)
    assert fused.tokens.shape == (1, 1000, 16)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("sizes", SIZES)
def test_exactly_K_tokens_are_kept_in_order_for_every_K(strategy, sizes):
    tokens = features(sizes)
    together = torch.cat(tokens, dim=1)
    owner = torch.cat([torch.full((n,), l) for l, n in enumerate(sizes)])
    for K in range(len(sizes), sum(sizes) + 1):
        fused = fuse(tokens, K, strategy)
        assert fused.tokens.shape == (
            2,
            K,
            8,
        ) and fused.keep_idx.shape == fused.encoder_id.shape == (2, K)
        assert (fused.keep_idx.diff(dim=1) > 0).all()
        for b in range(2):
            assert torch.equal(fused.tokens[b], together[b, fused.keep_idx[b]])
            assert torch.equal(fused.encoder_id[b], owner[fused.keep_idx[b]])
        assert (fused.survivors(len(sizes)).sum(dim=1) == K).all()


@pytest.mark.parametrize("sizes", SIZES)
def test_collaborative_equals_sorting_the_naive_redundancies(sizes):
    tokens, K = features(sizes), sum(sizes) // 2
    fused = fuse(tokens, K)
    for b in range(2):
        R = [naive_redundancy(tokens, b, j, i) for j, n in enumerate(sizes) for i in range(n)]
        assert fused.keep_idx[b].tolist() == sorted(sorted(range(len(R)), key=R.__getitem__)[:K])


@pytest.mark.parametrize("sizes", SIZES)
def test_greedy_equals_recomputing_the_sum_after_each_drop(sizes):
    tokens, K = features(sizes, D=5), sum(sizes) // 2
    fused = fuse(tokens, K, "greedy")
    starts = [sum(sizes[:l]) for l in range(len(sizes))]
    for b in range(2):
        assert fused.keep_idx[b].tolist() == [
            starts[j] + i for j, i in naive_greedy(tokens, b, sum(sizes) - K)
        ]


def test_greedy_keeps_one_copy_of_what_two_encoders_share_and_the_one_shot_rule_drops_both():
    eye = torch.eye(4)
    tokens = [eye[None, [0, 1]], eye[None, [0, 2]]]  # token 0 of each is the same
    assert fuse(tokens, 2).keep_idx.tolist() == [[1, 3]]
    assert fuse(tokens, 3, "greedy").keep_idx.tolist() == [[1, 2, 3]]
    assert greedy_drop(tokens, 1).tolist() == [[True, False, False, False]]


def test_separate_prunes_within_each_encoder_with_a_proportional_budget():
    tokens = features((4, 8))
    fused = fuse(tokens, 6, "separate")
    assert fused.survivors(2).tolist() == [[2, 4], [2, 4]]
    for b in range(2):
        for z, start, K_l in zip(tokens, (0, 4), (2, 4)):
            u = F.normalize(z[b], dim=-1)
            R = [sum(float(u[i] @ u[m]) for m in range(len(u))) for i in range(len(u))]
            best = sorted(sorted(range(len(R)), key=R.__getitem__)[:K_l])
            mine = [
                i - start for i in fused.keep_idx[b].tolist() if start <= i < start + z.shape[1]
            ]
            assert mine == best


def test_random_repeats_with_its_generator_and_differs_without():
    tokens = features((20, 20))

    def draw(seed):
        return fuse(tokens, 10, "random", torch.Generator().manual_seed(seed)).keep_idx

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("sizes", [(1, 1), (3, 5, 2), (144, 144, 36, 9), (1, 100)])
def test_proportional_budgets_sum_exactly_and_fit_for_every_total(sizes):
    for K in range(len(sizes), sum(sizes) + 1):
        counts = proportional(K, list(sizes))
        assert sum(counts) == K and all(1 <= c <= n for c, n in zip(counts, sizes)), (K, counts)
    assert proportional(6, [6, 6]) == [3, 3] and proportional(3, [6, 6]) == [
        2,
        1,
    ]  # a tie goes to the lower index


def test_ties_go_to_the_lower_index():
    same = torch.ones(1, 3, 4)
    assert fuse([same, same], 4).keep_idx.tolist() == [[0, 1, 2, 3]]
    assert lowest(torch.tensor([[2.0, 1.0, 1.0, 1.0]]), 2).tolist() == [[1, 2]]


@pytest.mark.parametrize("budget", [None, 12])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_keep_all_is_plain_concatenation(budget, strategy):
    tokens = features((3, 4, 5))
    fused = fuse(tokens, budget, strategy)
    assert torch.equal(fused.tokens, torch.cat(tokens, dim=1))
    assert fused.keep_idx.tolist() == [list(range(12))] * 2


def test_one_encoder_alone_passes_through_whole():
    tokens = features((6,))
    assert (
        torch.equal(fuse(tokens, None).tokens, tokens[0]) and fuse(tokens, 6).encoder_id.sum() == 0
    )


@pytest.mark.parametrize("strategy", ["collaborative", "greedy", "separate"])
def test_a_batch_equals_its_samples_one_by_one(strategy):
    tokens = features((9, 7, 5), B=4)
    whole = fuse(tokens, 8, strategy)
    for b in range(4):
        single = fuse([z[b : b + 1] for z in tokens], 8, strategy)
        assert torch.equal(single.keep_idx[0], whole.keep_idx[b]) and torch.equal(
            single.tokens[0], whole.tokens[b]
        )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_reach_the_kept_tokens_and_no_others(strategy):
    tokens = [z.requires_grad_() for z in features((6, 5))]
    fused = fuse(tokens, 4, strategy, torch.Generator().manual_seed(0))
    fused.tokens.sum().backward()
    gradient = torch.cat([z.grad for z in tokens], dim=1).abs().sum(-1) > 0  # (B, N)
    expected = torch.zeros(2, 11, dtype=torch.bool).scatter(1, fused.keep_idx, True)
    assert torch.equal(gradient, expected)


def test_inputs_are_unchanged():
    tokens = features((6, 5))
    before = [z.clone() for z in tokens]
    for strategy in STRATEGIES:
        fuse(tokens, 4, strategy)
    assert all(torch.equal(a, b) for a, b in zip(tokens, before))


def test_half_precision_tokens_stay_half_and_are_chosen_in_float32():
    tokens = [z.bfloat16() for z in features((6, 5))]
    fused = fuse(tokens, 4)
    assert fused.tokens.dtype == torch.bfloat16
    assert torch.equal(fused.keep_idx, fuse([z.float() for z in tokens], 4).keep_idx)


def test_a_zero_vector_has_no_redundancy():
    tokens = features((3, 3))
    tokens[0][:, 1] = 0
    assert (mutual_redundancy(tokens)[0][:, 1] == 0).all()


def test_projector_is_two_linear_layers_with_a_gelu():
    projector, x = Projector(5, 7), torch.randn(2, 3, 5)
    first, _, second = projector
    torch.testing.assert_close(
        projector(x), F.gelu(x @ first.weight.T + first.bias) @ second.weight.T + second.bias
    )
    assert projector(x).shape == (2, 3, 7)


NAN = torch.full((2, 3, 8), float("nan"))


@pytest.mark.parametrize(
    "tokens, budget, strategy, kind, message",
    [
        (features((6,)), 3, "collaborative", ValueError, "at least 2 encoders"),
        (features((6, 5)), 0, "collaborative", ValueError, "budget must be 1 to 11.*got 0"),
        (features((6, 5)), -3, "random", ValueError, "budget must be 1 to 11.*got -3"),
        (features((6, 5)), 10**9, "greedy", ValueError, "budget must be 1 to 11"),
        (features((6, 5)), 1, "separate", ValueError, "budget must be 2 to 11"),
        (
            features((6, 5)),
            2.5,
            "collaborative",
            TypeError,
            "budget must be an int or None, got float",
        ),
        (features((6, 5)), True, "collaborative", TypeError, "budget must be an int"),
        (features((6, 5)), 3, "best", ValueError, "strategy must be one of"),
        ([NAN, NAN], 3, "collaborative", ValueError, r"tokens\[0\] must be finite"),
        (
            torch.randn(2, 3, 8),
            3,
            "collaborative",
            TypeError,
            "tokens must be a list of float tensors",
        ),
        ([], 3, "collaborative", ValueError, "non-empty"),
        ([torch.ones(2, 3, 8).long()], None, "collaborative", TypeError, "float tensors"),
        (
            [torch.randn(2, 3, 8), torch.randn(2, 3, 9)],
            3,
            "collaborative",
            ValueError,
            "share B and D",
        ),
        ([torch.randn(3, 8), torch.randn(3, 8)], 3, "collaborative", ValueError, r"\(B, N_l, D\)"),
    ],
)
def test_bad_input_gets_one_sentence(tokens, budget, strategy, kind, message):
    with pytest.raises(kind, match=message) as caught:
        fuse(tokens, budget, strategy)
    assert "\n" not in str(caught.value)


def test_redundancy_of_one_encoder_is_refused():
    with pytest.raises(ValueError, match="at least 2 encoders"):
        mutual_redundancy(features((6,)))


def test_the_file_runs_alone_in_an_empty_folder(tmp_path):
    shutil.copy(Path(__file__).parents[1] / "stage2_fuse.py", tmp_path)
    run = subprocess.run(
        [sys.executable, "-I", "stage2_fuse.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "3200 -> 576 tokens" in run.stdout


def test_redundancy_is_float32_under_autocast():
    tokens = features((9, 7, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, kept = mutual_redundancy(tokens), fuse(tokens, 8).keep_idx
    for mine, plain in zip(inside, mutual_redundancy(tokens)):
        assert torch.equal(mine, plain)
    assert torch.equal(kept, fuse(tokens, 8).keep_idx)
