"""stage1_encode.py against hand-computed cases, slow loops and the libraries themselves. Run: pytest tests/test_stage1_encode.py

The models are the libraries' own classes, small, with random weights (every parameter perturbed: biases that are
zero at birth would hide a forgotten bias). The oracle for `encode` keeps all tokens in place, masks the dropped ones
as keys, and reads the attention weights from the library's own attention module.
"""

import math
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from PIL import Image
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Pix2StructConfig,
    Pix2StructForConditionalGeneration,
    Pix2StructImageProcessor,
    Pix2StructVisionConfig,
    Pix2StructVisionModel,
)

import stage1_encode
from stage1_encode import (
    CLIP_MEAN,
    CLIP_STD,
    CRITERIA,
    FAMILIES,
    STRATEGIES,
    Adapter,
    adapter,
    allocate_budget,
    encode,
    encode_all,
    expected_ranks,
    feature_rank,
    heads,
    mean_similarity,
    nuclear_diversity,
    plan_budgets,
    received_attention,
    singular_values,
)

SIDE, PATCH, GRID, HEADS, BLOCKS = 32, 4, 8, 4, 6
VIT = dict(
    img_size=SIDE,
    patch_size=PATCH,
    embed_dim=32,
    depth=BLOCKS,
    num_heads=HEADS,
    num_classes=0,
    mlp_ratio=2,
)
P2S = dict(
    hidden_size=32,
    num_hidden_layers=BLOCKS,
    num_attention_heads=HEADS,
    d_kv=8,
    d_ff=32,
    seq_len=GRID**2,
    patch_embed_hidden_size=3 * PATCH**2,
    initializer_range=0.02,
)


def clip(**options):
    return VisionTransformer(
        **dict(
            image_size=SIDE,
            patch_size=PATCH,
            width=32,
            layers=BLOCKS,
            heads=HEADS,
            mlp_ratio=2.0,
            output_dim=24,
            output_tokens=True,
        )
        | options
    )


def conv():
    model = ConvNeXt(num_classes=0, depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), output_stride=8)
    model.pretrained_cfg = {"input_size": (3, 64, 64)}
    return model


def p2s(**options):
    return Pix2StructVisionModel(Pix2StructVisionConfig(**P2S | options))


MODELS = {  # name: how to build it
    "clip": clip,
    "eva fused": lambda: Eva(
        use_rot_pos_emb=True, ref_feat_shape=(4, 4), **VIT
    ),  # q_bias and v_bias beside qkv
    "eva02": lambda: Eva(
        use_rot_pos_emb=True,
        qkv_fused=False,
        swiglu_mlp=True,
        scale_mlp=True,
        scale_attn_inner=True,
        global_pool="token",
        **VIT,
    ),  # as EVA02-B and -L: q_proj and k_proj, norms inside
    "eva no bias": lambda: Eva(use_rot_pos_emb=True, qkv_bias=False, **VIT),
    "eva no rope": lambda: Eva(init_values=0.1, **VIT),  # as EVA-01
    "eva registers": lambda: Eva(
        use_rot_pos_emb=True,
        rope_type="dinov3",
        num_reg_tokens=3,
        no_embed_class=True,
        rope_rotate_half=True,
        use_abs_pos_emb=False,
        **VIT,
    ),  # as DINOv3
    "eva grouped": lambda: Eva(
        use_rot_pos_emb=True, attn_type="rope", qkv_fused=False, num_kv_heads=2, qk_norm=True, **VIT
    ),
    "eva core": lambda: Eva(
        use_rot_pos_emb=True, attn_type="rope", use_pre_transformer_norm=True, **VIT
    ),  # as PE-Core
    "siglip": lambda: timm.models.VisionTransformer(class_token=False, global_pool="map", **VIT),
    "vit": lambda: timm.models.VisionTransformer(qk_norm=True, reg_tokens=2, **VIT),
    "convnext": conv,
    "pix2struct": p2s,
    "dinov2": lambda: Dinov2Model(
        Dinov2Config(
            hidden_size=32,
            num_hidden_layers=BLOCKS,
            num_attention_heads=HEADS,
            image_size=SIDE,
            patch_size=PATCH,
            use_swiglu_ffn=True,
        )
    ),
}
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
TRANSFORMERS = [name for name in MODELS if name != "convnext"]
PREFIX = {
    "clip": 1,
    "eva registers": 4,
    "siglip": 0,
    "vit": 3,
    "convnext": 0,
    "pix2struct": 0,
}  # the others: 1


def perturbed(model, seed=0):
    """Every parameter moved, so that no bias, scale or positional table is trivial; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data += (
            (0.3 if p.dim() > 1 else 0.1)
            * max(p.shape[-1:], default=1) ** -0.5
            * torch.randn(p.shape, generator=generator)
        )
    return model.eval()


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {name: perturbed(build()) for name, build in MODELS.items()}


def pictures(B=4, side=SIDE, seed=0):
    return torch.rand(B, 3, side, side, generator=torch.Generator().manual_seed(seed))


def normalised(images, mean=CLIP_MEAN, std=CLIP_STD):
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def p2s_patches(images, p=PATCH):
    """HF's input, one patch at a time: row, column (from 1), then the patch's pixels in the order height, width, channel."""
    x = torch.stack([(i - i.mean()) / i.std() for i in images])
    rows = [
        [
            torch.cat(
                [
                    torch.tensor([r + 1.0, c + 1.0]),
                    i[:, r * p : r * p + p, c * p : c * p + p].permute(1, 2, 0).flatten(),
                ]
            )
            for r in range(i.shape[1] // p)
            for c in range(i.shape[2] // p)
        ]
        for i in x
    ]
    return torch.stack([torch.stack(row) for row in rows])


def library_tokens(name, model, images):
    """Patch tokens of the library's own forward."""
    P = PREFIX.get(name, 1)
    if name == "clip":
        return model(normalised(images))[1]
    if name == "dinov2":
        return model(normalised(images, **IMAGENET)).last_hidden_state[:, P:]
    if name == "pix2struct":
        return model(flattened_patches=p2s_patches(images)).last_hidden_state
    x = model.forward_features(normalised(images))
    return x.flatten(2).transpose(1, 2) if name == "convnext" else x[:, P:]


# ---------------------------------------------------------------- rank and diversity


def test_rank_by_hand():
    sigma = torch.tensor([1.0, 0.5, 0.02, 0.005, 0.0])
    A = (
        torch.linalg.qr(torch.randn(7, 5, generator=torch.Generator().manual_seed(1)))[0] * sigma
    )  # (7, 5), those sigmas
    B = A @ torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(2)))[0]
    tokens = torch.stack([B, 100 * B, torch.zeros(7, 5), torch.ones(7, 5)])
    assert feature_rank(tokens, 1e-2).tolist() == [3, 3, 0, 1]
    assert feature_rank(tokens, 1e-3).tolist() == [4, 4, 0, 1]
    assert feature_rank(tokens, 0.6).tolist() == [1, 1, 0, 1]
    assert feature_rank(tokens).dtype == torch.int64 and feature_rank(tokens.mT, 1e-2).tolist() == [
        3,
        3,
        0,
        1,
    ]


def test_diversity_by_hand():
    tokens = torch.stack([torch.eye(4, 6), torch.ones(4, 6)])  # all different; all the same
    torch.testing.assert_close(
        nuclear_diversity(tokens), torch.tensor([1.0, 0.5], dtype=torch.float64)
    )
    torch.testing.assert_close(
        nuclear_diversity(5 * tokens), nuclear_diversity(tokens), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("N, D", [(1, 5), (5, 1), (6, 9), (9, 6), (40, 24), (24, 40)])
def test_rank_and_diversity_against_svd_one_matrix_at_a_time(N, D):
    tokens = torch.randn(3, N, D, generator=torch.Generator().manual_seed(N)) * torch.logspace(
        0, -4, D
    )
    before = tokens.clone()
    for rtol in (1e-1, 1e-2, 1e-3):
        want = [
            int((s > rtol * s.max()).sum())
            for s in (torch.linalg.svdvals(a.double()) for a in tokens)
        ]
        assert feature_rank(tokens, rtol).tolist() == want
    want = [float(torch.linalg.svdvals(F.normalize(a.double(), dim=-1)).sum()) / N for a in tokens]
    diversity = nuclear_diversity(tokens)
    torch.testing.assert_close(
        diversity, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-6
    )
    assert (diversity <= math.sqrt(min(N, D) / N) + 1e-9).all()
    assert torch.equal(tokens, before) and singular_values(tokens).shape == (3, min(N, D))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: feature_rank(torch.ones(2, 3)),
            r"tokens must be finite, of shape \(B, N, D\), got shape \(2, 3\)",
        ),
        (lambda: nuclear_diversity(torch.full((1, 2, 3), math.nan)), "tokens must be finite"),
        (
            lambda: feature_rank(torch.ones(1, 2, 3), 1.0),
            "rtol must be at least 1e-6 and below 1, got 1.0",
        ),
        (lambda: feature_rank(torch.ones(1, 2, 3), 1e-9), "rtol must be at least 1e-6"),
        (lambda: feature_rank(torch.ones(1, 2, 3), math.nan), "rtol must be"),
    ],
)
def test_rank_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------- the two criteria


def test_similarity_of_four_tokens_by_hand():
    tokens = torch.tensor(
        [[[2.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, -1.0]]]
    )  # the mean points east
    torch.testing.assert_close(mean_similarity(tokens), torch.tensor([[1.0, 0.0, 1.0, 0.0]]))


def test_attention_of_three_tokens_by_hand():
    q = torch.tensor([[[[1.0], [0.0], [-1.0]]]])  # (B, H, N, d) = (1, 1, 3, 1)
    k = torch.tensor([[[[0.0], [math.log(4.0)], [math.log(9.0)]]]])
    torch.testing.assert_close(
        received_attention(q, k, 0.5, True), torch.tensor([[1.0, 2.0, 3.0]]) / 6
    )
    first, last = torch.tensor([1.0, 2.0, 3.0]) / 6, torch.tensor([6.0, 3.0, 2.0]) / 11
    torch.testing.assert_close(received_attention(q, k, 0.5, False)[0], (first + 1 / 3 + last) / 3)


@pytest.mark.parametrize("B, H, N, d", [(1, 1, 2, 3), (2, 3, 7, 4), (4, 4, 9, 2), (3, 2, 33, 8)])
def test_criteria_against_loops(B, H, N, d):
    g = torch.Generator().manual_seed(N)
    q, k, tokens = (
        torch.randn(*shape, generator=g) for shape in ((B, H, N, d), (B, H, N, d), (B, N, d))
    )
    before = q.clone(), k.clone(), tokens.clone()
    for from_cls in (True, False):
        want = torch.zeros(B, N)
        for b in range(B):
            for h in range(H):
                for row in range(1 if from_cls else N):
                    e = [math.exp(0.3 * float(q[b, h, row] @ k[b, h, j])) for j in range(N)]
                    want[b] += torch.tensor(e) / sum(e) / H / (1 if from_cls else N)
        for chunk in (1, 4, 256):
            torch.testing.assert_close(received_attention(q, k, 0.3, from_cls, chunk), want)
    for b in range(B):
        mean = sum(tokens[b, i] for i in range(N)) / N
        want = [float(x @ mean / (x.norm() * mean.norm())) for x in tokens[b]]
        torch.testing.assert_close(mean_similarity(tokens)[b], torch.tensor(want))
    assert all(torch.equal(x, y) for x, y in zip(before, (q, k, tokens)))


def test_criteria_are_float32_under_autocast():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 9, 8, generator=g), torch.randn(2, 3, 9, 8, generator=g)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(
            received_attention(q, k, 0.3, False), received_attention(q.clone(), k, 0.3, False)
        )
        inside, similar = received_attention(q, k, 0.3, False), mean_similarity(q[:, 0])
    assert torch.equal(inside, received_attention(q, k, 0.3, False)) and torch.equal(
        similar, mean_similarity(q[:, 0])
    )
    assert received_attention(q.bfloat16(), k.bfloat16(), 0.3, True).dtype == torch.float32


# ---------------------------------------------------------------- allocation


@pytest.mark.parametrize(
    "total, ranks, available, strategy, want",
    [
        (10, [3, 1, 1], [9, 9, 9], "rank", [6, 2, 2]),
        (
            10,
            [2, 1, 1],
            [9, 9, 9],
            "rank",
            [5, 3, 2],
        ),  # 5, 2.5, 2.5: the tie goes to the lower index
        (10, [1, 1, 2], [9, 9, 9], "rank", [3, 2, 5]),
        (
            10,
            [6, 3, 1],
            [4, 9, 9],
            "rank",
            [4, 5, 1],
        ),  # held at 4; the other 6 by 3 : 1 = 4.5, 1.5, a tie
        (10, [6, 3, 1], [4, 4, 9], "rank", [4, 4, 2]),  # then held at 4 again
        (10, [97, 1, 2], [99, 9, 9], "rank", [8, 1, 1]),  # nobody below 1
        (10, [1, 2, 4], [9, 9, 9], "rank_reverse", [6, 3, 1]),  # 4 : 2 : 1 = 5.71, 2.86, 1.43
        (10, [1, 2, 4], [9, 9, 9], "average", [4, 3, 3]),
        (10, [1, 2, 4], [2, 9, 9], "average", [2, 4, 4]),
        (5, [0.2], [7], "rank", [5]),
        (17, [90.5, 61.25, 33.0, 87.75], [6, 4, 3, 4], "rank", [6, 4, 3, 4]),
    ],
)
def test_allocation_by_hand(total, ranks, available, strategy, want):
    assert allocate_budget(total, ranks, available, strategy) == want
    assert (
        allocate_budget(total, torch.tensor(ranks, dtype=torch.float64), available, strategy)
        == want
    )


def slow_shares(total, weights, available):
    """Shares in proportion to the weights, held to their bounds: by bisection of the factor of proportion."""
    low, high = 0, max(Fraction(n) / w for n, w in zip(available, weights))
    for _ in range(80):
        middle = (low + high) / 2
        if sum(min(max(middle * w, 1), n) for n, w in zip(available, weights)) < total:
            low = middle
        else:
            high = middle
    return [min(max(high * w, 1), n) for n, w in zip(available, weights)]


@pytest.mark.parametrize(
    "ranks, available",
    [
        ([5.0, 3.0, 2.0], [6, 7, 3]),
        ([1e-3, 7.0, 50.0, 3.5], [4, 1, 9, 12]),
        ([1.0, 1.0], [5, 3]),
        ([90.1, 61.2, 33.3, 87.4], [36, 49, 36, 64]),
        ([2.0], [4]),
        ([1.0, 1e9], [5, 5]),
    ],
)
def test_allocation_of_every_total(ranks, available):
    for strategy in STRATEGIES:
        for total in range(len(ranks), sum(available) + 1):
            counts = allocate_budget(total, ranks, available, strategy)
            assert sum(counts) == total and all(
                isinstance(k, int) and 1 <= k <= n for k, n in zip(counts, available)
            )
            weights = [
                {"rank": Fraction(r), "average": Fraction(1), "rank_reverse": 1 / Fraction(r)}[
                    strategy
                ]
                for r in ranks
            ]
            shares = slow_shares(total, weights, available)
            assert all(abs(k - s) < 1 + 1e-9 for k, s in zip(counts, shares)), (
                strategy,
                total,
                counts,
            )
            up = [
                s - k for k, s in zip(counts, shares) if k > s + Fraction(1, 10**9)
            ]  # rounded up: largest remainders
            down = [s - k for k, s in zip(counts, shares) if k < s - Fraction(1, 10**9)]
            assert not up or not down or min(up) + 1 >= max(down) - Fraction(1, 10**9)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            (2, [1, 1, 1], [4, 4, 4]),
            "total must be an int from 3, one each, to all of .4, 4, 4., got 2",
        ),
        (
            (13, [1, 1, 1], [4, 4, 4]),
            "total must be an int from 3, one each, to all of .4, 4, 4., got 13",
        ),
        ((6.0, [1, 1, 1], [4, 4, 4]), "total must be an int .* got 6.0"),
        (
            (6, [1, 1], [4, 4, 4]),
            r"ranks must be 3 positive numbers, one for each encoder, got \[1.0, 1.0\]",
        ),
        ((6, [1, 1, 0], [4, 4, 4]), "ranks must be 3 positive numbers"),
        ((6, [1, 1, 0], [4, 4, 4], "rank_reverse"), "ranks must be 3 positive numbers"),
        ((6, [1, 1, -1], [4, 4, 4]), "ranks must be 3 positive numbers"),
        ((6, [1, 1, math.nan], [4, 4, 4]), "ranks must be 3 positive numbers"),
        ((6, [1, 1, math.inf], [4, 4, 4]), "ranks must be 3 positive numbers"),
        (
            (6, [1, 1, 1], [4, 4, 4], "svd"),
            r"strategy must be one of \('rank', 'average', 'rank_reverse'\), got 'svd'",
        ),
        ((6, [1, 1, 1], [4, 4, 0]), "one each, to all of .4, 4, 0., got 6"),
    ],
)
def test_allocation_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        allocate_budget(*arguments)


def test_plan_by_hand():
    ranks, available, inside = [[1, 5, 1], [1, 7, 3], [1, 2, 1]], [64, 64, 64], [True, False, True]
    # point 2: 32 = 8 + 16 + 8; inside 128 -> 16, a factor of 1/2 a point
    assert plan_budgets(32, ranks, available, inside) == [(32, 8, 8), (64, 64, 16), (32, 24, 8)]
    assert plan_budgets((100, 40, 32), ranks, available, inside) == [
        (50, 10, 8),
        (64, 64, 16),
        (50, 30, 8),
    ]
    assert plan_budgets(32, None, available, inside, "average") == [
        (35, 19, 11),
        (64, 64, 11),
        (35, 19, 10),
    ]
    assert plan_budgets(None, None, available, inside) == [(64, 64, 64)] * 3
    assert plan_budgets(32, torch.tensor(ranks, dtype=torch.float64), available, inside)[1] == (
        64,
        64,
        16,
    )
    assert plan_budgets(9, [[1], [1], [1]], [16], [False]) == [(16, 16, 9)]


def test_plan_of_every_total_never_increases_and_sums_exactly():
    ranks = torch.tensor([[9.0, 2.0, 5.0], [1.0, 2.0, 8.0], [6.0, 3.0, 1.0]])  # the points disagree
    available = [9, 16, 12]
    for inside in ([True, False, True], [True, True, True], [False, False, False]):
        for strategy in STRATEGIES:
            for total in range(3, sum(available) + 1):
                plan = plan_budgets(total, ranks, available, inside, strategy)
                assert sum(p[2] for p in plan) == total
                for p, n, prunable in zip(plan, available, inside):
                    assert n >= p[0] >= p[1] >= p[2] >= 1 and (prunable or p[:2] == (n, n))
            assert plan == [(n, n, n) for n in available]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            (6, None, [4, 4], [True, True]),
            r"ranks must be \(3, 2\), points by encoders, as expected_ranks gives, got None",
        ),
        ((6, [[1, 1]] * 2, [4, 4], [True, True]), r"ranks must be \(3, 2\)"),
        ((6, [[1, 1, 1]] * 3, [4, 4], [True, True]), r"ranks must be \(3, 2\)"),
        (
            ((7, 6), [[1, 1]] * 3, [4, 4], [True, True]),
            r"totals must be an int, or 3 .* got \(7, 6\)",
        ),
        (
            ((8, 8, 6), [[1, 1]] * 3, [4, 4], [False, False]),
            "totals must be an int, or 3 where an encoder is pruned inside",
        ),
        (
            ((9, 7, 6), [[1, 1]] * 3, [4, 4], [True, True]),
            "total must be an int from 2, one each, to all of .4, 4., got 9",
        ),
        (
            ((6, 7, 6), [[1, 1]] * 3, [4, 4], [True, True]),
            "total must be an int from 2, one each, to all of .3, 3., got 7",
        ),
        (
            ((6, 4, 5), [[1, 1]] * 3, [4, 4], [True, True]),
            "total must be an int from 2, one each, to all of .2, 2., got 5",
        ),
        ((1, [[1, 1]] * 3, [4, 4], [True, True]), "total must be an int from 2"),
    ],
)
def test_plan_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_budgets(*arguments)


# ---------------------------------------------------------------- encoding: nothing pruned


@pytest.mark.parametrize("name", MODELS)
def test_keep_all_is_the_library_forward(models, name):
    images = pictures(side=64 if name == "convnext" else SIDE)
    with torch.no_grad():
        want = library_tokens(name, models[name], images)
        for keep in ((None, None, None), (64, 64, 64)):
            tokens, keep_idx = encode(models[name], images, keep)
            assert tokens.shape == want.shape == (4, 64, adapter(models[name]).dim)
            difference = (tokens - want).abs()
            assert difference.max() <= 1e-5, (
                f"max {difference.max():.1e}, mean {difference.mean():.1e}"
            )
            assert keep_idx.dtype == torch.int64 and keep_idx.tolist() == [list(range(64))] * 4


@pytest.mark.parametrize("name", MODELS)
def test_adapter_attributes(models, name):
    a = adapter(models[name])
    assert (a.prefix, a.grid, a.num_tokens, a.dim) == (PREFIX.get(name, 1), (8, 8), 64, 32)
    assert a.prunable_inside == (name != "convnext") and a.num_blocks == (
        0 if name == "convnext" else BLOCKS
    )
    assert a.from_cls == (name not in ("siglip", "convnext", "pix2struct"))
    assert [list(p) for p in a.parts] == (
        [[]] * 3 if name == "convnext" else [[0, 1], [2, 3], [4, 5]]
    )


@pytest.mark.parametrize(
    "blocks, last",
    [(24, [7, 15, 23]), (12, [3, 7, 11]), (6, [1, 3, 5]), (3, [0, 1, 2]), (7, [1, 3, 6])],
)
def test_pruning_points_are_the_last_blocks_of_the_thirds(blocks, last):
    assert [part[-1] for part in adapter(clip(layers=blocks, width=8, heads=1)).parts] == last


def test_models_of_open_clip_and_hugging_face_are_unwrapped():
    whole = perturbed(
        open_clip.CLIP(
            16,
            dict(layers=3, width=32, head_width=8, patch_size=8, image_size=32),
            dict(context_length=8, vocab_size=32, width=16, heads=2, layers=1),
        )
    )
    inner = encode(whole.visual, pictures(2))
    assert all(torch.equal(x, y) for x, y in zip(encode(whole, pictures(2)), inner)) and inner[
        0
    ].shape == (2, 16, 32)
    tower = TimmModel(
        "test_convnext", 16, image_size=64, pool="", proj="linear"
    )  # as convnext_base_w in open_clip
    tower.eval()
    a = adapter(tower)
    assert (
        a.size == (64, 64) and a.grid == (2, 2) and adapter(tower.trunk).size == (160, 160)
    )  # timm's pretrained_cfg
    torch.testing.assert_close(
        encode(tower, pictures(2, 64))[0],
        tower.trunk.forward_features(normalised(pictures(2, 64), *imagenet(tower))).flatten(2).mT,
    )
    text = dict(vocab_size=16, hidden_size=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    both = Pix2StructForConditionalGeneration(
        Pix2StructConfig(text_config=text, vision_config=P2S)
    ).eval()
    assert torch.equal(encode(both, pictures(2))[0], encode(both.encoder, pictures(2))[0])


def imagenet(tower):
    return tower.trunk.pretrained_cfg["mean"], tower.trunk.pretrained_cfg["std"]


def test_eva02_as_open_clip_builds_it():
    tower = perturbed(
        TimmModel("eva02_tiny_patch14_224", 16, image_size=224, pool="token", proj=None)
    )
    assert adapter(tower).size == (224, 224) and adapter(tower).grid == (16, 16)
    images = pictures(1, 224)
    with torch.no_grad():
        want = tower.trunk.forward_features(normalised(images, *imagenet(tower)))[:, 1:]
        torch.testing.assert_close(encode(tower, images)[0], want, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- encoding: pruned, against masked attention


class Library:
    """Runs a model block by block on all tokens, dropped ones masked as keys, and reads its own attention weights."""

    def __init__(self, name, model):
        self.name, self.model = name, model

    def start(self, images):
        v, x = self.model, normalised(images, **IMAGENET if self.name == "dinov2" else {})
        if self.name == "clip":
            self.blocks, self.norm, x = v.transformer.resblocks, v.ln_post, v._embeds(x)
        elif self.name == "pix2struct":
            self.blocks, self.norm, x = (
                v.encoder.layer,
                v.layernorm,
                v.embeddings(p2s_patches(images)),
            )
        elif self.name == "dinov2":
            self.blocks, self.norm, x = v.encoder.layer, v.layernorm, v.embeddings(x)
        else:
            self.blocks, self.norm, x = v.blocks, v.norm, v._pos_embed(v.patch_embed(x))
            x, self.rope = x if isinstance(x, tuple) else (x, None)
            x = v.norm_pre(x)
        return x

    def run(self, i, x, present):
        """Block i on x (1, S, D) with keys where present (S,) bool; and its attention weights (S, S), mean over heads."""
        block, S = self.blocks[i], x.shape[1]
        mask = torch.zeros(S, S).masked_fill(~present, -torch.inf)
        if self.name == "clip":
            h = block.ln_1(x)
            weights = block.attn(
                h, h, h, attn_mask=mask, need_weights=True, average_attn_weights=True
            )[1]
            return block(x, attn_mask=mask), weights[0]
        if self.name == "pix2struct":
            block.attention.config._attn_implementation = "eager"
            x, weights = block(x, mask[None, None])
            block.attention.config._attn_implementation = "sdpa"
            return x, weights[0].mean(0)
        caught = []
        if self.name == "dinov2":
            hook = block.attention.register_forward_hook(lambda m, a, out: caught.append(out[1]))
            block.attention.config._attn_implementation = "eager"
            x = block(x, attention_mask=mask[None, None])
            block.attention.config._attn_implementation = "sdpa"
            hook.remove()
            return x, caught[0][0].mean(0)
        hook = block.attn.attn_drop.register_forward_hook(lambda m, a, out: caught.append(out))
        block.attn.fused_attn = False
        x = (
            block(x, attn_mask=mask)
            if self.rope is None
            else block(x, attn_mask=mask, rope=self.rope)
        )
        hook.remove()
        block.attn.fused_attn = True
        return x, caught[0][0].mean(0)


@torch.no_grad()
def masked_oracle(name, model, image, keep, criteria):
    """keep_idx and tokens of one picture (1, 3, H, W), token by token."""
    library, P, from_cls = (
        Library(name, model),
        PREFIX.get(name, 1),
        name not in ("siglip", "pix2struct"),
    )
    x = library.start(image)
    alive, S = list(range(64)), x.shape[1]
    for i in range(BLOCKS):
        present = torch.tensor([s < P or s - P in alive for s in range(S)])
        x, weights = library.run(i, x, present)
        if i in (1, 3, 5):
            K = keep[i // 2]
            if criteria[i // 2] == "similarity":
                mean = torch.stack([x[0, P + t] for t in alive]).mean(0)
                score = {t: -float(F.cosine_similarity(x[0, P + t], mean, dim=0)) for t in alive}
            else:
                queries = [0] if from_cls else [s for s in range(S) if present[s]]
                score = {t: float(weights[queries, P + t].mean()) for t in alive}
            alive = sorted(sorted(alive, key=lambda t: (-score[t], t))[:K])
    return alive, library.norm(x)[0, [P + t for t in alive]]


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize(
    "keep, criteria",
    [((40, 23, 9), CRITERIA), ((64, 31, 30), ("attention", "attention", "similarity"))],
)
def test_pruned_tokens_against_masked_attention_of_the_library(models, name, keep, criteria):
    images = pictures(HEADS)  # B == H: where a rotary table without a head axis is silently wrong
    with torch.no_grad():
        tokens, keep_idx = encode(models[name], images, keep, criteria)
    assert (
        tokens.shape == (HEADS, keep[2], 32)
        and keep_idx.shape == (HEADS, keep[2])
        and keep_idx.dtype == torch.int64
    )
    for b in range(HEADS):
        want_idx, want = masked_oracle(name, models[name], images[b : b + 1], keep, criteria)
        assert keep_idx[b].tolist() == want_idx
        difference = (tokens[b] - want).abs()
        assert difference.max() <= 1e-5, f"max {difference.max():.1e}, mean {difference.mean():.1e}"


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_scores_come_from_the_librarys_queries_and_keys(models, name):
    """softmax(scale q k^T) of the adapter against the attention weights of the library, before and after pruning."""
    a, library, images = adapter(models[name]), Library(name, models[name]), pictures(1)
    with torch.no_grad():
        (x, rope), y = a.embed(images), library.start(images)
        for i in range(3):
            q, k, scale = a.attention(i, x, rope)
            mine = (
                (scale * q @ k.mT).softmax(-1).mean(1)[0]
            )  # (1, P + N) of the CLS alone, or (N, N)
            y, weights = library.run(i, y, torch.ones(y.shape[1], dtype=torch.bool))
            x = a.block(i, x, rope)
            assert len(mine) == (1 if a.from_cls else len(weights))
            torch.testing.assert_close(mine, weights[: len(mine)], rtol=0, atol=1e-6)
            assert weights.std() > 1e-4, "attention too even to test anything"


@pytest.mark.parametrize("name", MODELS)
def test_batch_equals_singles(models, name):
    keep = (None, None, 9) if name == "convnext" else (40, 23, 9)
    images = pictures(HEADS, 64 if name == "convnext" else SIDE, seed=3)
    with torch.no_grad():
        tokens, keep_idx = encode(models[name], images, keep)
        for b in range(len(images)):
            alone, idx = encode(models[name], images[b : b + 1], keep)
            assert torch.equal(idx[0], keep_idx[b])
            torch.testing.assert_close(alone[0], tokens[b], rtol=0, atol=1e-5)
    assert len({tuple(row) for row in keep_idx.tolist()}) > 1, (
        "each picture must be pruned for itself"
    )
    assert (
        (keep_idx[:, 1:] > keep_idx[:, :-1]).all() and 0 <= keep_idx.min() and keep_idx.max() < 64
    )


def test_convnext_is_pruned_at_its_output_by_similarity(models):
    images = pictures(3, 64)
    with torch.no_grad():
        every = encode(models["convnext"], images)[0]
        tokens, keep_idx = encode(models["convnext"], images, (None, 64, 9), ("attention",) * 3)
    for b in range(3):
        similarity = mean_similarity(every)[b].tolist()
        assert keep_idx[b].tolist() == sorted(
            sorted(range(64), key=lambda t: (similarity[t], t))[:9]
        )
        assert torch.equal(tokens[b], every[b, keep_idx[b]])


def test_cut_after_the_last_block_selects_the_librarys_tokens(models):
    for name in TRANSFORMERS:
        with torch.no_grad():
            tokens, keep_idx = encode(models[name], pictures(), (None, None, 9))
            want = library_tokens(name, models[name], pictures())
        for b in range(4):
            torch.testing.assert_close(tokens[b], want[b, keep_idx[b]], rtol=0, atol=1e-5)


def test_ties_go_to_the_lower_index(models):
    model = perturbed(clip())
    model.positional_embedding.data.zero_()
    images = torch.full((2, 3, SIDE, SIDE), 0.5)  # all patches alike
    with torch.no_grad():
        assert encode(model, images, (40, 23, 9))[1].tolist() == [list(range(9))] * 2


def test_gradients_reach_the_kept_tokens_and_no_others(models):
    for name in ("clip", "eva fused", "pix2struct", "siglip", "dinov2"):
        model, P, seen = models[name].train(), PREFIX.get(name, 1), []
        block = {
            "clip": lambda: model.transformer.resblocks,
            "pix2struct": lambda: model.encoder.layer,
            "dinov2": lambda: model.encoder.layer,
        }.get(name, lambda: model.blocks)()[1]  # the last of part 0

        def keep_grad(module, arguments, out):
            out = out[0] if isinstance(out, tuple) else out
            out.retain_grad()
            seen.append(out)

        hook = block.register_forward_hook(keep_grad)
        images = pictures(2).requires_grad_()
        tokens, keep_idx = encode(model, images, (30, 30, 30))
        tokens.square().sum().backward()
        hook.remove()
        model.zero_grad()
        model.eval()
        reached = seen[0].grad[:, P:].abs().sum(-1) > 0  # (B, N)
        for b in range(2):
            assert reached[b].nonzero().flatten().tolist() == keep_idx[b].tolist(), name
        assert images.grad.abs().sum() > 0


def test_inputs_and_models_are_left_unchanged(models):
    for name, model in models.items():
        images = pictures(2, 48)
        before, state = images.clone(), {k: v.clone() for k, v in model.state_dict().items()}
        attributes = {n: set(vars(m)) for n, m in model.named_modules()}
        keep = (None, None, 9) if name == "convnext" else [40, 23, 9]
        tokens, _ = encode(model, images, keep)
        assert (
            torch.equal(images, before)
            and keep in ((None, None, 9), [40, 23, 9])
            and not tokens.isnan().any()
        )
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_autocast_and_half_precision(models):
    for name, model in models.items():
        keep = (None, None, 9) if name == "convnext" else (40, 23, 9)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            tokens, keep_idx = encode(model, pictures(2), keep)
        assert tokens.shape == (2, 9, 32) and keep_idx.shape == (2, 9)
        half = perturbed(MODELS[name]()).bfloat16()
        with torch.no_grad():
            assert encode(half, pictures(2), keep)[0].dtype == torch.bfloat16


# ---------------------------------------------------------------- pictures


def test_resize_and_normalise_as_open_clip_does(models):
    noise = np.random.default_rng(0).integers(0, 256, (3, 50, 50, 3), dtype=np.uint8)
    transform = open_clip.image_transform(SIDE, is_train=False)
    want = torch.stack([transform(Image.fromarray(n)) for n in noise])
    images = torch.from_numpy(noise).permute(0, 3, 1, 2).float() / 255
    caught = []
    hook = models["clip"].conv1.register_forward_pre_hook(
        lambda m, arguments: caught.append(arguments[0])
    )
    encode(models["clip"], images)
    hook.remove()
    assert (caught[0] - want).abs().mean() < 1 / 255 / max(
        CLIP_STD
    )  # Pillow rounds to bytes, twice


def test_pix2struct_input_as_the_librarys_processor(models):
    caught = []
    hook = models["pix2struct"].embeddings.register_forward_pre_hook(
        lambda m, arguments: caught.append(arguments[0])
    )
    images = F.interpolate(pictures(2, 9), 48, mode="bilinear")
    encode(models["pix2struct"], images)
    hook.remove()
    processor = Pix2StructImageProcessor(
        patch_size={"height": PATCH, "width": PATCH}, do_convert_rgb=False
    )
    want = processor(
        list(images), max_patches=GRID**2 + 5, return_tensors="pt"
    ).flattened_patches  # padded by 5
    assert (want[:, GRID**2 :] == 0).all()
    torch.testing.assert_close(caught[0], want[:, : GRID**2], rtol=0, atol=1e-5)


def test_mean_and_std_of_open_clip_then_timm_then_clip():
    model = clip(layers=3)
    grey = torch.full((1, 3, SIDE, SIDE), 0.25)
    assert torch.allclose(adapter(model).statistics(grey)[0].flatten(), torch.tensor(CLIP_MEAN))
    model.preprocess_cfg = {"mean": (0.5, 0.5, 0.25), "std": (0.5, 0.25, 0.5)}
    mean, std = adapter(model).statistics(grey)
    assert mean.flatten().tolist() == [0.5, 0.5, 0.25] and std.flatten().tolist() == [
        0.5,
        0.25,
        0.5,
    ]
    vit = timm.create_model("test_vit", num_classes=0)
    assert adapter(vit).statistics(grey)[0].flatten().tolist() == pytest.approx(
        vit.pretrained_cfg["mean"]
    )
    vit.preprocess_cfg = {"mean": (0.25,) * 3, "std": (0.5,) * 3}
    assert adapter(vit).statistics(grey)[0].flatten().tolist() == [0.25] * 3


def test_pix2struct_grid_is_the_largest_square_or_as_configured():
    assert adapter(p2s(seq_len=80)).grid == (8, 8)
    wide = p2s(seq_len=80)
    wide.config.meteor_grid = (4, 16)
    assert adapter(wide).grid == (4, 16) and adapter(wide).size == (16, 64)
    images = torch.rand(1, 3, 16, 64)
    with torch.no_grad():
        want = wide.eval()(flattened_patches=p2s_patches(images)).last_hidden_state
        torch.testing.assert_close(encode(wide, images)[0], want, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- several encoders


def four(models):
    return [models[name] for name in ("clip", "convnext", "eva02", "pix2struct")]


def test_encode_all_gives_each_its_part_of_the_total(models):
    ranks = torch.tensor([[1.0, 9.0, 4.0, 3.0], [1.0, 9.0, 4.0, 3.0], [1.0, 2.0, 4.0, 3.0]])
    with torch.no_grad():
        tokens, keep_idx = encode_all(four(models), pictures(2), 50, ranks)
        assert [t.shape for t in tokens] == [(2, 5, 32), (2, 10, 32), (2, 20, 32), (2, 15, 32)]
        plan = plan_budgets(50, ranks, [64] * 4, [True, False, True, True])
        for encoder, keep, x, idx in zip(four(models), plan, tokens, keep_idx):
            alone = encode(encoder, pictures(2), keep)
            assert torch.equal(alone[0], x) and torch.equal(alone[1], idx)
        for strategy in STRATEGIES:
            for total in (4, 97, 256):
                tokens, _ = encode_all(four(models), pictures(1), total, ranks, strategy)
                plan = plan_budgets(total, ranks, [64] * 4, [True, False, True, True], strategy)
                assert [t.shape[1] for t in tokens] == [n for *_, n in plan] and sum(
                    t.shape[1] for t in tokens
                ) == total
        tokens, keep_idx = encode_all(four(models), pictures(1), None)
        assert [k.tolist() for k in keep_idx] == [[list(range(64))]] * 4
        criteria = ("similarity", "similarity", "similarity")
        by_likeness = encode_all(four(models), pictures(1), (120, 60, 50), ranks, "rank", criteria)[
            1
        ][0]
        keep = plan_budgets((120, 60, 50), ranks, [64] * 4, [True, False, True, True])[0]
        assert torch.equal(by_likeness, encode(models["clip"], pictures(1), keep, criteria)[1])
        assert not torch.equal(by_likeness, encode(models["clip"], pictures(1), keep)[1])


def test_expected_ranks_against_the_libraries_features_one_picture_at_a_time(models):
    names, images = (
        ["clip", "convnext", "eva registers", "siglip"],
        F.interpolate(pictures(5, 3), SIDE),
    )  # blotches
    ranks = expected_ranks(
        [models[n] for n in names], (part for part in images.split(2)), rtol=0.05
    )  # 2, 2 and 1
    assert ranks.shape == (3, 4) and ranks.dtype == torch.float64
    with torch.no_grad():
        for l, name in enumerate(names):
            model, pixels = models[name], normalised(images)
            if name == "clip":
                features = model.forward_intermediates(pixels, [1, 3, 5], output_fmt="NLC")[
                    "image_intermediates"
                ]
            elif name == "convnext":
                large = F.interpolate(images, 64, mode="bicubic", antialias=True).clamp(0, 1)
                features = [model.forward_features(normalised(large)).flatten(2).mT] * 3
            else:
                features = model.forward_intermediates(
                    pixels, [1, 3, 5], output_fmt="NLC", intermediates_only=True
                )
            for b, x in enumerate(features):
                want = [int(torch.linalg.matrix_rank(a.double(), rtol=0.05)) for a in x]
                assert float(ranks[b, l]) == pytest.approx(sum(want) / 5), (name, b)
    assert len(ranks.unique()) > 3, "ranks too equal to test anything"


# ---------------------------------------------------------------- errors, other models, the file alone


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            (torch.rand(3, 32, 32),),
            r"images must be float \(B, 3, H, W\), got torch.float32 \(3, 32, 32\)",
        ),
        ((torch.rand(1, 1, 32, 32),), "images must be float"),
        (
            (torch.zeros(1, 3, 32, 32, dtype=torch.uint8),),
            "images must be float .* got torch.uint8",
        ),
        ((255 * pictures(1),), r"images must be in \[0, 1\]: divide bytes by 255"),
        ((pictures(1) - 0.5,), "images must be in"),
        ((pictures(1) * math.nan,), "images must be in"),
        ((pictures(1), (20, 30, 10)), r"keep\[1\] must be None or an int, 1 to 20 here, got 30"),
        ((pictures(1), (65, 30, 10)), r"keep\[0\] must be None or an int, 1 to 64 here, got 65"),
        ((pictures(1), (30, 20, 0)), r"keep\[2\] must be None or an int, 1 to 20 here, got 0"),
        (
            (pictures(1), (30, 20.0, 10)),
            r"keep\[1\] must be None or an int, 1 to 30 here, got 20.0",
        ),
        ((pictures(1), (None, 20, 30)), r"keep\[2\] must be None or an int, 1 to 20 here, got 30"),
        (
            (pictures(1), (30, 20)),
            r"keep and part_criteria \('similarity' or 'attention'\) must have 3 entries, one a part, got \(30, 20\)",
        ),
        (
            (pictures(1), (30, 20, 10), ("attention",)),
            r"must have 3 entries, .* and \('attention',\)",
        ),
        (
            (pictures(1), (30, 20, 10), ("attention", "norm", "attention")),
            "must have 3 entries, .* 'norm'",
        ),
    ],
)
def test_encode_errors(models, arguments, message):
    with pytest.raises(ValueError, match=message):
        encode(models["clip"], *arguments)


@pytest.mark.parametrize("keep, b", [((30, None, 10), 0), ((64, 30, 10), 1), ((None, 30, 30), 1)])
def test_convnext_refuses_to_be_pruned_inside(models, keep, b):
    with pytest.raises(
        ValueError, match=rf"keep\[{b}\] must be None or an int, 64 to 64 here, got 30"
    ):
        encode(models["convnext"], pictures(1), keep)


def test_features_that_are_not_finite_are_refused():
    model = perturbed(clip())
    model.transformer.resblocks[3].ln_1.weight.data[0] = math.nan
    with pytest.raises(
        ValueError, match="features of VisionTransformer must be finite, got NaN or inf"
    ):
        encode(model, pictures(1))
    with pytest.raises(ValueError, match="tokens must be finite"):
        expected_ranks([model], [pictures(1)])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("token", [1, 20, 40])
def test_one_bad_token_at_a_pruning_point_is_refused_though_it_might_be_dropped(bad, token):
    model = perturbed(clip())
    last = model.transformer.resblocks[adapter(model).parts[1][-1]]
    spoil = lambda block, args, out: out.index_fill(1, torch.tensor([token]), bad)
    with (
        last.register_forward_hook(spoil),
        pytest.raises(ValueError, match="features of VisionTransformer must be finite"),
    ):
        encode(model, pictures(1), (40, 20, 10))


@pytest.mark.parametrize(
    "encoder, error, message",
    [
        (
            lambda: timm.create_model("test_resnet"),
            TypeError,
            "encoder must be or hold one of .*open_clip.transformer.VisionTransformer"
            ".*timm.models.eva.Eva.*timm.models.convnext.ConvNeXt.*Pix2StructVisionModel.*Dinov2Model.*, got ResNet: for another, list an Adapter",
        ),
        (lambda: nn.Linear(2, 2), TypeError, "got Linear"),
        (
            lambda: clip(qk_norm=True),
            TypeError,
            "blocks of VisionTransformer must be .* got .*CustomResidualAttentionBlock",
        ),
        (
            lambda: Eva(use_post_norm=True, **VIT),
            TypeError,
            "blocks of Eva must be .* got .*EvaBlockPostNorm",
        ),
        (
            lambda: timm.models.VisionTransformer(block_fn=ParallelThingsBlock, **VIT),
            TypeError,  # as vit_small_patch16_18x2_224
            "blocks of VisionTransformer must be .* got .'ParallelThingsBlock'",
        ),
        (
            lambda: timm.models.VisionTransformer(block_fn=ParallelScalingBlock, **VIT),
            TypeError,
            "blocks of VisionTransformer must be .* got .'ParallelScalingBlock'",
        ),
        (
            lambda: Eva(use_rot_pos_emb=True, rope_type="mixed", **VIT),
            TypeError,
            "one rotary table, got 'mixed'",
        ),
        (lambda: clip(layers=2), ValueError, "encoder must have at least 3 blocks, got 2"),
        (
            lambda: ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)),
            ValueError,
            "ConvNeXt must tell its input: set pretrained_cfg",
        ),
    ],
)
def test_models_that_are_refused(encoder, error, message):
    with pytest.raises(error, match=message):
        adapter(encoder())


@pytest.mark.parametrize(
    "build",
    [
        lambda: clip(patch_dropout=0.5),
        lambda: Eva(patch_drop_rate=0.5, use_rot_pos_emb=True, **VIT),
        lambda: timm.models.VisionTransformer(patch_drop_rate=0.5, **VIT),
    ],
)
def test_patch_dropout_is_refused_where_it_is_active(build):
    model = build()
    encode(model.eval(), pictures(1))
    with pytest.raises(
        ValueError, match="encoder must embed 64 patches, got 32: switch patch dropout off"
    ):
        encode(model.train(), pictures(1))


def test_expected_ranks_of_no_pictures_is_an_error(models):
    with pytest.raises(ValueError, match="batches must hold at least one picture, got none"):
        expected_ranks([models["clip"]], [])


def test_another_family_is_one_adapter_and_one_line(monkeypatch):
    class WithRegisters(Adapter):
        def __init__(self, v, outer):
            c = v.config
            side = c.image_size // c.patch_size
            super().__init__(
                v,
                outer,
                v.encoder.layer,
                v.layernorm,
                c.hidden_size,
                (side, side),
                (c.image_size,) * 2,
                1 + c.num_register_tokens,
                True,
            )

        def patchify(self, pixels):
            return self.model.embeddings(pixels), None

        def attention(self, i, x, rope):
            attn, h = self.blocks[i].attention, self.blocks[i].norm1(x)
            return heads(attn.q_proj(h), 8), heads(attn.k_proj(h), 8), 8**-0.5

    model = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=4,
            num_register_tokens=2,
        )
    ).eval()
    name = f"{Dinov2WithRegistersModel.__module__}.Dinov2WithRegistersModel"
    monkeypatch.setitem(FAMILIES, name, WithRegisters)
    with torch.no_grad():
        want = model(normalised(pictures())).last_hidden_state[:, 3:]
        torch.testing.assert_close(encode(model, pictures())[0], want, rtol=0, atol=1e-5)
        assert encode(model, pictures(), (40, 23, 9))[0].shape == (4, 9, 32)


def test_a_grid_of_its_own_for_encoders_that_take_any():
    dino = MODELS["dinov2"]().eval()
    dino.config.meteor_grid = (6, 10)
    assert encode(dino, pictures())[0].shape == (4, 60, 32) and adapter(dino).size == (24, 40)


def test_file_runs_alone(tmp_path):
    shutil.copy(stage1_encode.__file__, tmp_path)
    before, alone = os.times(), {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "stage1_encode.py"],
        cwd=tmp_path,
        env=alone,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("144 tokens") == 5 and [
        line.split(":")[0].strip() for line in done.stdout.splitlines()[5:]
    ] == list(STRATEGIES)
    after = os.times()  # processor seconds: a busy machine is no fault of the file
    assert (
        after.children_user + after.children_system - before.children_user - before.children_system
        < 30
    )


def test_file_keeps_to_its_form():
    lines = Path(stage1_encode.__file__).read_text().splitlines()
    assert max(map(len, lines)) <= 110
    assert not any(
        line.startswith(("import meteor", "from meteor", "import stage", "from stage"))
        for line in lines
    )
