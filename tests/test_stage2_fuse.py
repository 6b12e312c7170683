"""stage2_fuse.py against hand-computed tokens and slow loops.

Run: pytest tests/test_stage2_fuse.py
"""

import math
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import stage2_fuse
from stage2_fuse import Projector, fuse, gather, lowest, mutual_redundancy

SIZES = [(3, 4), (5, 2, 7), (1, 9, 4, 6), (16, 12, 16, 9)]  # tokens of each encoder


def features(sizes, B=2, D=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, n, D, generator=generator, dtype=torch.float64) for n in sizes]


def slow_redundancy(tokens, b):
    """The double sum for one sample, one cosine at a time."""
    R = []
    for j, mine in enumerate(tokens):
        for x in mine[b]:
            others = [y for l, z in enumerate(tokens) if l != j for y in z[b]]
            R.append(sum(float(x @ y / (x.norm() * y.norm())) for y in others))
    return R


# Encoder 0: east, north; encoder 1: east, north-east
FOUR = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[3.0, 0.0], [1.0, 1.0]]])


def test_redundancy_of_four_tokens_by_hand():
    s = math.sqrt(0.5)
    torch.testing.assert_close(mutual_redundancy(FOUR), torch.tensor([[1 + s, s, 1.0, 2 * s]]))


def test_four_tokens_by_hand_keep_the_lowest_in_their_order():
    fused = fuse(FOUR, 2)  # R = 1.71, 0.71, 1.00, 1.41: tokens 1 and 2 stay
    assert fused.keep_idx.tolist() == [[1, 2]] and fused.encoder_id.tolist() == [[0, 1]]
    assert fused.tokens.tolist() == [[[0.0, 2.0], [3.0, 0.0]]]


@pytest.mark.parametrize("sizes", SIZES)
def test_sums_equal_the_slow_double_sum(sizes):
    tokens = features(sizes)
    want = torch.tensor([slow_redundancy(tokens, b) for b in range(2)])
    R = mutual_redundancy(tokens)
    assert R.dtype == torch.float32
    torch.testing.assert_close(R, want, rtol=0, atol=5e-6)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_tokens_that_stay_are_those_of_lowest_slow_redundancy(sizes):
    tokens, K = features(sizes), sum(sizes) // 2
    fused = fuse(tokens, K)
    for b in range(2):
        R = slow_redundancy(tokens, b)
        assert fused.keep_idx[b].tolist() == sorted(sorted(range(len(R)), key=R.__getitem__)[:K])


def test_redundancy_ignores_an_encoders_own_tokens_and_the_length_of_vectors():
    first, second = features((4, 5))
    alone = mutual_redundancy([first, second])[:, :4]
    more = mutual_redundancy([torch.cat([first, 3 * first], dim=1), 7 * second])[:, :8]
    torch.testing.assert_close(more, torch.cat([alone, alone], dim=1))


def test_65536_tokens_need_no_pairwise_matrix():
    tokens = [torch.randn(1, 32768, 16), torch.randn(1, 32768, 16)]  # N x N floats would be 17 GB
    assert fuse(tokens, 1000).tokens.shape == (1, 1000, 16)


@pytest.mark.parametrize("sizes", SIZES)
def test_exactly_K_tokens_are_kept_in_order_for_every_K(sizes):
    tokens = features(sizes)
    together = torch.cat(tokens, dim=1)
    owner = torch.cat([torch.full((n,), l) for l, n in enumerate(sizes)])
    for K in range(1, sum(sizes) + 1):
        fused = fuse(tokens, K)
        assert fused.tokens.shape == (2, K, 8)
        assert fused.keep_idx.dtype == fused.encoder_id.dtype == torch.int64
        assert (fused.keep_idx.diff(dim=1) > 0).all()
        for b in range(2):
            assert torch.equal(fused.tokens[b], together[b, fused.keep_idx[b]])
            assert torch.equal(fused.encoder_id[b], owner[fused.keep_idx[b]])


def test_gather_serves_a_rule_of_ones_own():
    tokens = features((3, 1, 2))
    keep_idx = torch.tensor([[0, 2, 3, 5], [1, 3, 4, 5]])
    fused = gather(tokens, keep_idx)
    assert fused.encoder_id.tolist() == [[0, 0, 1, 2], [0, 1, 2, 2]]
    assert torch.equal(fused.keep_idx, keep_idx)
    want = [[tokens[0][0, 0], tokens[0][0, 2], tokens[1][0, 0], tokens[2][0, 1]]]
    want += [[tokens[0][1, 1], tokens[1][1, 0], tokens[2][1, 0], tokens[2][1, 1]]]
    assert torch.equal(fused.tokens, torch.stack([torch.stack(row) for row in want]))


def test_ties_go_to_the_lower_index():
    same = torch.ones(1, 3, 4)
    assert fuse([same, same], 4).keep_idx.tolist() == [[0, 1, 2, 3]]
    assert lowest(torch.tensor([[2.0, 1.0, 1.0, 1.0]]), 2).tolist() == [[1, 2]]


@pytest.mark.parametrize("budget", [None, 12])
def test_keep_all_is_plain_concatenation(budget):
    tokens = features((3, 4, 5))
    fused = fuse(tokens, budget)
    assert torch.equal(fused.tokens, torch.cat(tokens, dim=1))
    assert fused.keep_idx.tolist() == [list(range(12))] * 2
    assert fused.encoder_id.tolist() == [[0] * 3 + [1] * 4 + [2] * 5] * 2


@pytest.mark.parametrize("budget", [None, 6])
def test_one_encoder_alone_passes_through_whole(budget):
    tokens = features((6,))
    fused = fuse(tokens, budget)
    assert torch.equal(fused.tokens, tokens[0]) and fused.encoder_id.tolist() == [[0] * 6] * 2


def test_a_batch_equals_its_samples_one_by_one():
    tokens = features((9, 7, 5), B=4)
    whole = fuse(tokens, 8)
    for b in range(4):
        single = fuse([z[b : b + 1] for z in tokens], 8)
        assert all(torch.equal(one[0], each[b]) for one, each in zip(single, whole))
    assert len(whole.keep_idx.unique(dim=0)) == 4, "each sample must be pruned for itself"


def test_gradients_reach_the_kept_tokens_and_no_others():
    tokens = [z.requires_grad_() for z in features((6, 5))]
    fused = fuse(tokens, 4)
    fused.tokens.sum().backward()
    reached = torch.cat([z.grad for z in tokens], dim=1)  # (B, N, D)
    want = torch.zeros(2, 11, 8, dtype=torch.float64)
    for b in range(2):
        want[b, fused.keep_idx[b]] = 1
    assert torch.equal(reached, want)


def test_inputs_are_unchanged():
    tokens = features((6, 5))
    before = [z.clone() for z in tokens]
    fuse(tokens, 4)
    assert all(torch.equal(a, b) for a, b in zip(tokens, before))


def test_half_precision_tokens_stay_half_and_are_chosen_in_float32():
    tokens = [z.bfloat16() for z in features((6, 5))]
    fused = fuse(tokens, 4)
    assert fused.tokens.dtype == torch.bfloat16
    assert torch.equal(fused.keep_idx, fuse([z.float() for z in tokens], 4).keep_idx)


def test_redundancy_is_float32_under_autocast():
    tokens = [z.float() for z in features((9, 7, 5))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, kept = mutual_redundancy(tokens), fuse(tokens, 8).keep_idx
    assert torch.equal(inside, mutual_redundancy(tokens))
    assert torch.equal(kept, fuse(tokens, 8).keep_idx)


def test_a_zero_vector_has_no_redundancy():
    tokens = features((3, 3))
    tokens[0][:, 1] = 0
    assert (mutual_redundancy(tokens)[:, 1] == 0).all()


def test_projector_is_two_linear_layers_with_a_gelu():
    projector, x = Projector(5, 7), torch.randn(2, 3, 5)
    first, _, second = projector
    want = F.gelu(x @ first.weight.T + first.bias) @ second.weight.T + second.bias
    torch.testing.assert_close(projector(x), want)
    assert want.shape == (2, 3, 7)


@pytest.mark.parametrize(
    "sizes, budget, message",
    [
        ((6,), 3, "tokens must hold at least 2 encoders to prune"),
        ((6, 5), 0, "budget must be 1 to 11, the tokens there are, got 0"),
        ((6, 5), -3, "budget must be 1 to 11, .* got -3"),
        ((6, 5), 12, "budget must be 1 to 11, .* got 12"),
    ],
)
def test_what_cannot_be_pruned_is_refused(sizes, budget, message):
    with pytest.raises(ValueError, match=message):
        fuse(features(sizes), budget)


def test_tokens_of_other_shapes_are_refused():
    one, other = features((6, 5))
    for tokens in (one, [one, other[..., :4]], [one, other[:1]]):  # a tensor, of other width, batch
        with pytest.raises(ValueError, match="of the same B and D, got"):
            fuse(tokens, 3)


def test_the_file_runs_alone(tmp_path, monkeypatch, capsys):
    """Copied into an empty folder, with nothing else of this project in reach."""
    shutil.copy(stage2_fuse.__file__, tmp_path)
    here = Path(stage2_fuse.__file__).parent
    monkeypatch.chdir(tmp_path)
    elsewhere = [p for p in sys.path if p and Path(p).resolve() not in (here, here / "tests")]
    monkeypatch.setattr(sys, "path", elsewhere)
    for name in [n for n in sys.modules if n.split(".")[0].startswith(("stage", "meteor"))]:
        monkeypatch.delitem(sys.modules, name)
    runpy.run_path("stage2_fuse.py", run_name="__main__")
    assert "[576, 1024, 576, 1024] -> (2, 576, 256)" in capsys.readouterr().out
