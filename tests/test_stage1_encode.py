"""stage1_encode.py against hand-computed cases, slow loops and the libraries themselves. Run:
pytest tests/test_stage1_encode.py

The models are the libraries' own classes, small, with random weights (every parameter perturbed:
biases that are zero at birth would hide a forgotten bias). The oracle for `encode` keeps all tokens
in place, masks the dropped ones as keys, and reads the attention weights from the library's own
attention module.
"""

import math
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Pix2StructConfig,
    Pix2StructForConditionalGeneration,
    Pix2StructVisionConfig,
    Pix2StructVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

import stage1_encode
from stage1_encode import (
    FAMILIES,
    STRATEGIES,
    EncoderPruner,
    Family,
    allocate_budget,
    can_prune_inside,
    count_tokens,
    default_criteria,
    encode,
    encode_all,
    expected_ranks,
    feature_rank,
    features_at_points,
    find_encoder,
    mean_similarity,
    nuclear_diversity,
    patch_grid,
    plan_budgets,
    pruning_points,
    received_attention,
    singular_values,
)

CRITERIA = default_criteria(3)
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
    return ConvNeXt(num_classes=0, depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), output_stride=8)


def p2s(**options):
    return Pix2StructVisionModel(Pix2StructVisionConfig(**P2S | options))


HUGGING_FACE = dict(
    hidden_size=32,
    num_hidden_layers=BLOCKS,
    num_attention_heads=HEADS,
    image_size=SIDE,
    patch_size=PATCH,
)
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
    "dinov2": lambda: Dinov2Model(Dinov2Config(**HUGGING_FACE, use_swiglu_ffn=True)),
    "dinov2 registers": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**HUGGING_FACE, num_register_tokens=2)
    ),
    "hf clip": lambda: CLIPVisionModel(CLIPVisionConfig(**HUGGING_FACE, intermediate_size=64)),
    "hf siglip": lambda: SiglipVisionModel(
        SiglipVisionConfig(**HUGGING_FACE, intermediate_size=64)
    ),
    "hf vit": lambda: ViTModel(ViTConfig(**HUGGING_FACE, intermediate_size=64)),
}
OF_HUGGING_FACE = ("pix2struct", "dinov2", "dinov2 registers", "hf clip", "hf siglip", "hf vit")
TRANSFORMERS = [name for name in MODELS if name != "convnext"]
NO_CLS = ("siglip", "convnext", "pix2struct", "hf siglip")
PREFIX = {
    "eva registers": 4,
    "vit": 3,
    "dinov2 registers": 3,
    **dict.fromkeys(NO_CLS, 0),
}  # the others: 1


def perturbed(model, seed=0):
    """Every parameter moved, so that no bias, scale or positional table is trivial; in eval
    mode.
    """
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


def p2s_patches(images, p=PATCH):
    """HF's input, one patch at a time: row, column (from 1), then the pixels: height, width,
    channel.
    """
    pictures = []
    for image in images:
        image = (image - image.mean()) / image.std()
        patches = []
        for r in range(image.shape[1] // p):
            for c in range(image.shape[2] // p):
                patch = image[:, r * p : r * p + p, c * p : c * p + p].permute(1, 2, 0)
                patches.append(torch.cat([torch.tensor([r + 1.0, c + 1.0]), patch.flatten()]))
        pictures.append(torch.stack(patches))
    return torch.stack(pictures)


def pixels(name, B=4, seed=0):
    """What the model reads: random pixels around 0, or flattened patches; 64 patches of each
    picture.
    """
    images = pictures(B, 64 if name == "convnext" else SIDE, seed)
    return p2s_patches(images) if name == "pix2struct" else 4 * (images - 0.5)


def library_tokens(name, model, x):
    """Patch tokens of the library's own forward."""
    P = PREFIX.get(name, 1)
    if name == "clip":
        return model(x)[1]
    if name in OF_HUGGING_FACE:
        return model(x).last_hidden_state[:, P:]
    x = model.forward_features(x)
    return x.flatten(2).transpose(1, 2) if name == "convnext" else x[:, P:]


# ------------------------------------------------------------------------------- rank and diversity


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


# --------------------------------------------------------------------------------- the two criteria


def test_similarity_of_four_tokens_by_hand():
    tokens = torch.tensor(
        [[[2.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, -1.0]]]
    )  # the mean points east
    torch.testing.assert_close(mean_similarity(tokens), torch.tensor([[1.0, 0.0, 1.0, 0.0]]))


def test_attention_of_three_tokens_by_hand():
    q = torch.tensor([[[[1.0], [0.0], [-1.0]]]])  # (B, H, N, d) = (1, 1, 3, 1)
    k = torch.tensor([[[[0.0], [math.log(4.0)], [math.log(9.0)]]]])
    torch.testing.assert_close(
        received_attention(q[:, :, :1], k, 0.5), torch.tensor([[1.0, 2.0, 3.0]]) / 6
    )
    first, last = torch.tensor([1.0, 2.0, 3.0]) / 6, torch.tensor([6.0, 3.0, 2.0]) / 11
    torch.testing.assert_close(received_attention(q, k, 0.5)[0], (first + 1 / 3 + last) / 3)


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
            asking = q[:, :, :1] if from_cls else q
            torch.testing.assert_close(received_attention(asking, k, 0.3, chunk), want)
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
            received_attention(q, k, 0.3), received_attention(q.clone(), k, 0.3)
        )
        inside, similar = received_attention(q, k, 0.3), mean_similarity(q[:, 0])
    assert torch.equal(inside, received_attention(q, k, 0.3)) and torch.equal(
        similar, mean_similarity(q[:, 0])
    )
    assert received_attention(q.bfloat16(), k.bfloat16(), 0.3).dtype == torch.float32


# --------------------------------------------------------------------------------------- allocation


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
    """Shares in proportion to the weights, held to their bounds: by bisection of the factor of
    proportion.
    """
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
            r"ranks must be \(3, 2\), points by encoders, as .*, or None .* got None",
        ),
        ((6, [[1, 1], [1]], [4, 4], [True, True]), r"ranks must be \(2, 2\)"),
        ((6, [[1, 1, 1]] * 3, [4, 4], [True, True]), r"ranks must be \(3, 2\)"),
        (
            ((7, 6), [[1, 1]] * 3, [4, 4], [True, True]),
            "totals must be an int or have an entry for each row of ranks, got .7, 6. and",
        ),
        (
            ((8, 8, 6), [[1, 1]] * 3, [4, 4], [False, False]),
            "totals must be an int where no encoder is pruned before its output, got",
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


# ------------------------------------------------------------------------- encoding: nothing pruned


@pytest.mark.parametrize("name", MODELS)
def test_keep_all_is_the_library_forward_to_the_bit(models, name):
    x = pixels(name)
    with torch.no_grad():
        want = library_tokens(name, models[name], x)
        for keep in ((None, None, None), (64, 64, 64), (None,), (64, None, 64, 64, None, None)):
            tokens, keep_idx = encode(models[name], x, keep)
            assert tokens.shape == want.shape == (4, 64, 32)
            assert torch.equal(tokens, want)
            assert keep_idx.dtype == torch.int64 and keep_idx.tolist() == [list(range(64))] * 4


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_under_the_pruner_the_librarys_own_output_is_what_it_was(models, name):
    model, x = models[name], pixels(name)
    with torch.no_grad():
        before = model(x)
        with EncoderPruner(model, (None, None, 64)) as pruner:
            inside = model(x)
        want = library_tokens(name, model, x)
    if name in OF_HUGGING_FACE:
        assert torch.equal(inside.last_hidden_state, before.last_hidden_state)
    else:
        assert all(torch.equal(a, b) for a, b in zip(inside, before))
    assert torch.equal(pruner.tokens, want)


@pytest.mark.parametrize("name", MODELS)
def test_what_stage_1_finds_in_a_model(models, name):
    model, x = models[name], pixels(name)
    assert find_encoder(model)[0] is model
    assert patch_grid(model, x) == (8, 8) and count_tokens(model, x) == 64
    assert can_prune_inside(model) == (name != "convnext")
    if name == "convnext":
        with pytest.raises(TypeError, match="a ConvNeXt needs its dense grid .* use encode"):
            EncoderPruner(model, (9,))
        return
    pruner = EncoderPruner(model, (None,) * 3)
    assert (pruner.prefix, pruner.has_cls) == (PREFIX.get(name, 1), name not in NO_CLS)
    assert len(pruner.blocks) == BLOCKS and pruner.points == [1, 3, 5]


@pytest.mark.parametrize(
    "blocks, parts, last",
    [
        (24, 3, [7, 15, 23]),
        (12, 3, [3, 7, 11]),
        (6, 3, [1, 3, 5]),
        (3, 3, [0, 1, 2]),
        (7, 3, [1, 3, 6]),
        (24, 1, [23]),
        (24, 4, [5, 11, 17, 23]),
        (23, 3, [6, 14, 22]),
    ],
)
def test_pruning_points_are_the_last_blocks_of_equal_parts(blocks, parts, last):
    assert pruning_points(blocks, parts) == last


def test_a_grid_that_is_no_square():
    wide = p2s()
    x = p2s_patches(torch.rand(2, 3, 16, 64))
    assert patch_grid(wide, x) == (4, 16)
    vit = timm.models.VisionTransformer(**VIT | dict(img_size=(16, 64)))
    assert patch_grid(vit, torch.rand(2, 3, 16, 64)) == (4, 16)
    with torch.no_grad():
        assert encode(vit.eval(), torch.rand(2, 3, 16, 64), (40, 20, 9))[0].shape == (2, 9, 32)


def test_models_inside_other_models_are_found():
    whole = perturbed(
        open_clip.CLIP(
            16,
            dict(layers=3, width=32, head_width=8, patch_size=8, image_size=32),
            dict(context_length=8, vocab_size=32, width=16, heads=2, layers=1),
        )
    )
    x = pictures(2)
    keep = (12, 9, 5)
    inner = encode(whole.visual, x, keep)
    assert all(torch.equal(a, b) for a, b in zip(encode(whole, x, keep), inner))
    with EncoderPruner(whole, keep) as pruner:
        whole.encode_image(x)  # whatever runs the tower
    assert torch.equal(pruner.tokens, inner[0]) and torch.equal(pruner.keep_idx, inner[1])
    # as convnext_base_w in open_clip
    tower = TimmModel("test_convnext", 16, image_size=64, pool="", proj="linear").eval()
    y = pictures(2, 64)
    want = tower.trunk.forward_features(y).flatten(2).mT
    torch.testing.assert_close(encode(tower, y)[0], want)
    text = dict(vocab_size=16, hidden_size=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    both = Pix2StructForConditionalGeneration(
        Pix2StructConfig(text_config=text, vision_config=P2S)
    ).eval()
    x = pixels("pix2struct", 2)
    assert torch.equal(encode(both, x)[0], encode(both.encoder, x)[0])


def test_the_tower_of_a_llava_up_to_the_layer_that_it_reads():
    """depth: LLaVA takes hidden_states[-2], without a final norm."""
    vision = CLIPVisionConfig(**HUGGING_FACE, intermediate_size=64)
    text = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
    )
    llava = perturbed(
        LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
    )
    tower, x = llava.model.vision_tower, pixels("hf clip")
    with torch.no_grad():
        want = tower(x, output_hidden_states=True).hidden_states[-2][:, 1:]
        with EncoderPruner(llava, (None,), depth=BLOCKS - 1) as pruner:
            tower(x)
        assert torch.equal(pruner.tokens, want)
        with EncoderPruner(llava, (40, 23, 9), depth=BLOCKS - 1) as pruner:
            llava.get_image_features(pixel_values=x)
    assert pruner.points == [0, 2, 4] and pruner.tokens.shape == (4, 9, 32)


def test_eva02_as_open_clip_builds_it():
    tower = TimmModel("eva02_tiny_patch14_224", 16, image_size=224, pool="token", proj=None)
    tower, x = perturbed(tower), pictures(1, 224)
    assert patch_grid(tower, x) == (16, 16)
    with torch.no_grad():
        want = tower.trunk.forward_features(x)[:, 1:]
        assert torch.equal(encode(tower, x)[0], want)


@pytest.mark.parametrize("pooled", [dict(final_ln_after_pool=True), dict(attentional_pool=True)])
def test_an_open_clip_model_that_pools_first_norms_no_patch(pooled):
    """Its last norm is for what it pools; the patches are those that leave the last block."""
    model = perturbed(clip(**pooled, attn_pooler_heads=4))
    with torch.no_grad():
        want = model.transformer(model._embeds(pictures(2)))[:, 1:]
        assert torch.equal(encode(model, pictures(2))[0], want)


# ------------------------------------------------------- encoding: pruned, against masked attention


class Library:
    """Runs a model block by block on all tokens, dropped ones masked, and reads its own
    attention.
    """

    def __init__(self, name, model):
        self.name, self.model, self.norm = name, model, nn.Identity()

    def start(self, x):
        v, self.rope = self.model, None
        if self.name == "clip":
            self.blocks, self.norm = v.transformer.resblocks, v.ln_post
            return v._embeds(x)
        if self.name in ("hf clip", "hf siglip"):
            self.blocks = v.encoder.layers
            if self.name == "hf clip":  # whose last norm is for its CLS token alone
                return v.pre_layrnorm(v.embeddings(x))
            self.norm = v.post_layernorm
            return v.embeddings(x)
        if self.name in OF_HUGGING_FACE:
            self.blocks = v.layers if self.name == "hf vit" else v.encoder.layer
            self.norm = v.layernorm
            return v.embeddings(x)
        self.blocks, self.norm, x = v.blocks, v.norm, v._pos_embed(v.patch_embed(x))
        if isinstance(x, tuple):
            x, self.rope = x
        return v.norm_pre(x)

    def run(self, i, x, present):
        """Block i on x (1, S, D) with keys where present (S,) bool; and its attention (S, S), mean
        over heads.
        """
        block, S = self.blocks[i], x.shape[1]
        mask = torch.zeros(S, S).masked_fill(~present, -torch.inf)
        if self.name == "clip":
            h = block.ln_1(x)
            _, weights = block.attn(h, h, h, attn_mask=mask, average_attn_weights=True)
            return block(x, attn_mask=mask), weights[0]
        caught = []
        if self.name in OF_HUGGING_FACE:
            attention = block.self_attn if hasattr(block, "self_attn") else block.attention
            hook = attention.register_forward_hook(lambda m, a, out: caught.append(out[1]))
            attention.config._attn_implementation = "eager"
            x = block(x, mask[None, None])
            attention.config._attn_implementation = "sdpa"
            hook.remove()
            return x[0] if isinstance(x, tuple) else x, caught[0][0].mean(0)
        hook = block.attn.attn_drop.register_forward_hook(lambda m, a, out: caught.append(out))
        block.attn.fused_attn = False
        rope = {} if self.rope is None else {"rope": self.rope}
        x = block(x, attn_mask=mask, **rope)
        hook.remove()
        block.attn.fused_attn = True
        return x, caught[0][0].mean(0)


@torch.no_grad()
def masked_oracle(name, model, x, keep, criteria):
    """keep_idx and tokens of one picture, token by token."""
    library, P, has_cls = Library(name, model), PREFIX.get(name, 1), name not in NO_CLS
    x = library.start(x)
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
                queries = [0] if has_cls else [s for s in range(S) if present[s]]
                score = {t: float(weights[queries, P + t].mean()) for t in alive}
            alive = sorted(sorted(alive, key=lambda t: (-score[t], t))[:K])
    return alive, library.norm(x)[0, [P + t for t in alive]]


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize(
    "keep, criteria",
    [((40, 23, 9), CRITERIA), ((64, 31, 30), ("attention", "attention", "similarity"))],
)
def test_pruned_tokens_against_masked_attention_of_the_library(models, name, keep, criteria):
    x = pixels(name, HEADS)  # B == H: where a rotary table without a head axis is silently wrong
    with torch.no_grad():
        tokens, keep_idx = encode(models[name], x, keep, criteria)
    assert tokens.shape == (HEADS, keep[2], 32)
    assert keep_idx.shape == (HEADS, keep[2]) and keep_idx.dtype == torch.int64
    for b in range(HEADS):
        want_idx, want = masked_oracle(name, models[name], x[b : b + 1], keep, criteria)
        assert keep_idx[b].tolist() == want_idx
        difference = (tokens[b] - want).abs()
        assert difference.max() <= 1e-5, f"max {difference.max():.1e}, mean {difference.mean():.1e}"


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_scores_come_from_the_librarys_queries_and_keys(models, name):
    """softmax(scale q k^T) of the family's row against the library's attention weights, in each
    block.
    """
    model = models[name]
    library, (_, family) = Library(name, model), find_encoder(model)
    with torch.no_grad():
        x = library.start(pixels(name, 1))
        S = x.shape[1]
        for i in range(3):
            for queries in (1, S):
                if queries == 1 and name in NO_CLS:
                    continue
                q, k, scale = family.queries_and_keys(library.blocks[i], x, queries, library.rope)
                mine = (scale * q @ k.mT).softmax(-1).mean(1)[0]  # (queries, S)
                _, weights = library.run(i, x, torch.ones(S, dtype=torch.bool))
                assert len(mine) == queries
                torch.testing.assert_close(mine, weights[:queries], rtol=0, atol=1e-6)
                assert weights.std() > 1e-4, "attention too even to test anything"
            x, _ = library.run(i, x, torch.ones(S, dtype=torch.bool))


@pytest.mark.parametrize("name", MODELS)
def test_batch_equals_singles(models, name):
    keep = (None, None, 9) if name == "convnext" else (40, 23, 9)
    x = pixels(name, HEADS, seed=3)
    with torch.no_grad():
        tokens, keep_idx = encode(models[name], x, keep)
        for b in range(HEADS):
            alone, idx = encode(models[name], x[b : b + 1], keep)
            assert torch.equal(idx[0], keep_idx[b])
            torch.testing.assert_close(alone[0], tokens[b], rtol=0, atol=1e-5)
    each_for_itself = len({tuple(row) for row in keep_idx.tolist()}) > 1
    assert each_for_itself, "each picture must be pruned for itself"
    assert (keep_idx[:, 1:] > keep_idx[:, :-1]).all()
    assert 0 <= keep_idx.min() and keep_idx.max() < 64


def test_convnext_is_pruned_at_its_output_by_similarity(models):
    x = pixels("convnext", 3)
    with torch.no_grad():
        every = encode(models["convnext"], x)[0]
        tokens, keep_idx = encode(models["convnext"], x, (None, 64, 9), ("attention",) * 3)
    for b in range(3):
        similarity = mean_similarity(every)[b].tolist()
        assert keep_idx[b].tolist() == sorted(
            sorted(range(64), key=lambda t: (similarity[t], t))[:9]
        )
        assert torch.equal(tokens[b], every[b, keep_idx[b]])


def test_cut_after_the_last_block_selects_the_librarys_tokens(models):
    for name in TRANSFORMERS:
        x = pixels(name)
        with torch.no_grad():
            tokens, keep_idx = encode(models[name], x, (None, None, 9))
            want = library_tokens(name, models[name], x)
        for b in range(4):
            torch.testing.assert_close(tokens[b], want[b, keep_idx[b]], rtol=0, atol=1e-5)


def test_ties_go_to_the_lower_index(models):
    model = perturbed(clip())
    model.positional_embedding.data.zero_()
    grey = torch.full((2, 3, SIDE, SIDE), 0.5)  # all patches alike
    with torch.no_grad():
        assert encode(model, grey, (40, 23, 9))[1].tolist() == [list(range(9))] * 2


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_gradients_reach_the_kept_tokens_and_no_others(models, name):
    model, P, seen = models[name].train(), PREFIX.get(name, 1), []
    block = EncoderPruner(model, (30, 30, 30)).blocks[1]  # the last of part 0

    def keep_grad(module, arguments, out):
        out = out[0] if isinstance(out, tuple) else out
        out.retain_grad()
        seen.append(out)

    hook = block.register_forward_hook(keep_grad)
    x = pixels(name, 2).requires_grad_()
    tokens, keep_idx = encode(model, x, (30, 30, 30))
    tokens.square().sum().backward()
    hook.remove()
    model.zero_grad()
    model.eval()
    reached = seen[0].grad[:, P:].abs().sum(-1) > 0  # (B, N)
    for b in range(2):
        assert reached[b].nonzero().flatten().tolist() == keep_idx[b].tolist()
    assert x.grad.abs().sum() > 0


def hooks_of(model):
    return [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]


def test_inputs_and_models_are_left_unchanged(models):
    for name, model in models.items():
        x = pixels(name, 2)
        before, state = x.clone(), {k: v.clone() for k, v in model.state_dict().items()}
        attributes = {n: set(vars(m)) for n, m in model.named_modules()}
        keep = [None, None, 9] if name == "convnext" else [40, 23, 9]
        tokens, _ = encode(model, x, keep)
        assert torch.equal(x, before) and keep[2:] == [9] and not tokens.isnan().any()
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
        assert not hooks_of(model)


def test_nothing_is_left_on_a_model_whose_forward_fails():
    model = perturbed(clip())
    with pytest.raises(RuntimeError), EncoderPruner(model, (40, 23, 9)):
        model(torch.rand(1, 1, SIDE, SIDE))
    assert not hooks_of(model)
    with pytest.raises(ValueError, match="keep.1. must be None or an int, 1 to 20 here, got 30"):
        encode(model, pictures(1), (20, 30, 9))
    assert not hooks_of(model)


def test_a_pruner_serves_many_forwards_one_after_another(models):
    model = models["eva02"]
    with torch.no_grad():
        tokens, keep_idx = [], []
        with EncoderPruner(model, (40, 23, 9)) as pruner:
            for seed in (0, 5):
                model(pixels("eva02", 2, seed))
                tokens.append(pruner.tokens)
                keep_idx.append(pruner.keep_idx)
        for seed, mine, idx in zip((0, 5), tokens, keep_idx):
            alone, alone_idx = encode(model, pixels("eva02", 2, seed), (40, 23, 9))
            assert torch.equal(alone, mine) and torch.equal(alone_idx, idx)


def test_autocast_and_half_precision(models):
    for name, model in models.items():
        keep = (None, None, 9) if name == "convnext" else (40, 23, 9)
        x = pixels(name, 2)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            tokens, keep_idx = encode(model, x, keep)
        assert tokens.shape == (2, 9, 32) and keep_idx.shape == (2, 9)
        half = perturbed(MODELS[name]()).bfloat16()
        with torch.no_grad():
            assert encode(half, x.bfloat16(), keep)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("name", OF_HUGGING_FACE)
def test_eager_attention_keeps_the_same_tokens(name):
    x = pixels(name, 2)
    kept = []
    for implementation in ("sdpa", "eager"):
        torch.manual_seed(0)
        model = perturbed(MODELS[name]())
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            kept.append(encode(model, x, (40, 23, 9)))
    assert torch.equal(kept[0][1], kept[1][1])
    torch.testing.assert_close(kept[0][0], kept[1][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("by_position", [True, False])
@pytest.mark.parametrize("name", ["hf clip", "pix2struct", "dinov2", "vit"])
@torch.no_grad()
def test_a_mask_that_hides_nothing_is_not_handed_on_at_its_old_length(models, name, by_position):
    """As a library may hand one to every block, by position or by name."""
    model, x = models[name], pixels(name, 2)
    want = encode(model, x, (40, 23, 9))
    keyword = "attn_mask" if name == "vit" else "attention_mask"
    S = 64 + PREFIX.get(name, 1)
    mask = torch.zeros(2, 1, S, S)
    lengths = []

    def with_mask(block, args, kwargs):
        others = {key: value for key, value in kwargs.items() if key != keyword}
        if by_position:
            return (args[0], mask), others
        return args[:1], others | {keyword: mask}

    def note(block, args, kwargs):
        given = args[1] if len(args) > 1 else kwargs.get(keyword)
        lengths.append(None if given is None else given.shape[-1])

    pruner = EncoderPruner(model, (40, 23, 9))
    handles = [b.register_forward_pre_hook(with_mask, with_kwargs=True) for b in pruner.blocks]
    try:
        with pruner:
            handles += [b.register_forward_pre_hook(note, with_kwargs=True) for b in pruner.blocks]
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    assert lengths == [S, S, None, None, None, None]
    assert torch.equal(pruner.keep_idx, want[1])
    torch.testing.assert_close(pruner.tokens, want[0], rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------- several encoders


def four(models):
    return [models[name] for name in ("clip", "convnext", "eva02", "pix2struct")]


def pixels_of_four(B):
    return [pixels(name, B) for name in ("clip", "convnext", "eva02", "pix2struct")]


def test_encode_all_gives_each_its_part_of_the_total(models):
    ranks = torch.tensor([[1.0, 9.0, 4.0, 3.0], [1.0, 9.0, 4.0, 3.0], [1.0, 2.0, 4.0, 3.0]])
    inside = [True, False, True, True]
    two, one = pixels_of_four(2), pixels_of_four(1)
    with torch.no_grad():
        tokens, keep_idx = encode_all(four(models), two, 50, ranks)
        assert [t.shape for t in tokens] == [(2, 5, 32), (2, 10, 32), (2, 20, 32), (2, 15, 32)]
        plan = plan_budgets(50, ranks, [64] * 4, inside)
        for encoder, x, keep, mine, idx in zip(four(models), two, plan, tokens, keep_idx):
            alone = encode(encoder, x, keep)
            assert torch.equal(alone[0], mine) and torch.equal(alone[1], idx)
        for strategy in STRATEGIES:
            for total in (4, 97, 256):
                tokens, _ = encode_all(four(models), one, total, ranks, strategy)
                plan = plan_budgets(total, ranks, [64] * 4, inside, strategy)
                assert [t.shape[1] for t in tokens] == [n for *_, n in plan]
                assert sum(t.shape[1] for t in tokens) == total
        tokens, keep_idx = encode_all(four(models), one, None)
        assert [k.tolist() for k in keep_idx] == [[list(range(64))]] * 4
        criteria, totals = ("similarity",) * 3, (120, 60, 50)
        _, by_likeness = encode_all(four(models), one, totals, ranks, "rank", criteria)
        keep = plan_budgets(totals, ranks, [64] * 4, inside)[0]
        assert torch.equal(by_likeness[0], encode(models["clip"], one[0], keep, criteria)[1])
        assert not torch.equal(by_likeness[0], encode(models["clip"], one[0], keep)[1])


def test_expected_ranks_against_the_libraries_features_one_picture_at_a_time(models):
    names = ["clip", "convnext", "eva registers", "siglip"]
    blotches = F.interpolate(pictures(5, 3), SIDE)
    large = F.interpolate(blotches, 64, mode="bicubic", antialias=True)
    pixels_of = {name: large if name == "convnext" else blotches for name in names}
    batches = ([pixels_of[n][a:b] for n in names] for a, b in ((0, 2), (2, 4), (4, 5)))
    ranks = expected_ranks([models[n] for n in names], batches, rtol=0.05)
    assert ranks.shape == (3, 4) and ranks.dtype == torch.float64
    with torch.no_grad():
        for l, name in enumerate(names):
            model, x = models[name], pixels_of[name]
            options = dict(output_fmt="NLC", intermediates_only=True)
            if name == "clip":
                found = model.forward_intermediates(x, [1, 3, 5], output_fmt="NLC")
                features = found["image_intermediates"]
            elif name == "convnext":
                features = [model.forward_features(x).flatten(2).mT] * 3
            else:
                features = model.forward_intermediates(x, [1, 3, 5], **options)
            for b, tokens in enumerate(features):
                assert torch.equal(tokens, features_at_points(model, x)[b])
                want = [int(torch.linalg.matrix_rank(a.double(), rtol=0.05)) for a in tokens]
                assert float(ranks[b, l]) == pytest.approx(sum(want) / 5), (name, b)
    assert len(ranks.unique()) > 3, "ranks too equal to test anything"
    first = [pixels_of[n][:2] for n in names]
    assert expected_ranks([models[n] for n in names], [first], points=2).shape == (2, 4)


# ------------------------------------------------------------- errors, other models, the file alone


@pytest.mark.parametrize(
    "arguments, message",
    [
        (((20, 30, 10),), r"keep\[1\] must be None or an int, 1 to 20 here, got 30"),
        (((65, 30, 10),), r"keep\[0\] must be None or an int, 1 to 64 here, got 65"),
        (((30, 20, 0),), r"keep\[2\] must be None or an int, 1 to 20 here, got 0"),
        (((30, 20.0, 10),), r"keep\[1\] must be None or an int, 1 to 30 here, got 20.0"),
        (((30, True, 10),), r"keep\[1\] must be None or an int, 1 to 30 here, got True"),
        (((None, 20, 30),), r"keep\[2\] must be None or an int, 1 to 20 here, got 30"),
        (((),), "there must be 1 to 6 pruning points, at most one for each block, got 0"),
        (((9,) * 7,), "there must be 1 to 6 pruning points, .* got 7"),
        (
            ((30, 20, 10), ("attention",)),
            r"criteria must be 'similarity' or 'attention' for each of the 3 entries of keep, got",
        ),
        (((30, 20, 10), ("attention", "norm", "attention")), "criteria must be .* 'norm'"),
    ],
)
def test_encode_errors(models, arguments, message):
    with pytest.raises(ValueError, match=message):
        encode(models["clip"], pictures(1), *arguments)


@pytest.mark.parametrize("keep, b", [((30, None, 10), 0), ((64, 30, 10), 1), ((None, 30, 30), 1)])
def test_convnext_refuses_to_be_pruned_inside(models, keep, b):
    with pytest.raises(
        ValueError,
        match=rf"keep\[{b}\] must be None or 64 here, as a ConvNeXt is pruned at its output only",
    ):
        encode(models["convnext"], pixels("convnext", 1), keep)


def test_convnext_refuses_more_tokens_than_there_are(models):
    for K in (0, 65, 9.0):
        with pytest.raises(ValueError, match="keep must end in None or an int, 1 to 64 here, got"):
            encode(models["convnext"], pixels("convnext", 1), (None, None, K))


def test_a_depth_beyond_the_blocks_is_refused(models):
    for depth in (0, 7):
        with pytest.raises(ValueError, match="depth must be 1 to 6, the blocks of a Vision"):
            EncoderPruner(models["clip"], (9,), depth=depth)


def test_features_that_are_not_finite_are_refused(models):
    model = perturbed(clip())
    model.transformer.resblocks[3].ln_1.weight.data[0] = math.nan
    with pytest.raises(
        ValueError, match="features of VisionTransformer must be finite, got NaN or inf"
    ):
        encode(model, pictures(1), (None, None, None))
    with pytest.raises(ValueError, match="tokens must be finite"):
        expected_ranks([model], [[pictures(1)]])
    with pytest.raises(ValueError, match="features of ConvNeXt must be finite, got NaN or inf"):
        encode(models["convnext"], pixels("convnext", 1) * math.nan, (None, None, 9))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("token", [1, 20, 40])
def test_one_bad_token_at_a_pruning_point_is_refused_though_it_might_be_dropped(bad, token):
    model = perturbed(clip())
    last = model.transformer.resblocks[3]

    def spoil(block, args, out):
        return out.index_fill(1, torch.tensor([token]), bad)

    with (
        last.register_forward_hook(spoil),
        pytest.raises(ValueError, match="features of VisionTransformer must be finite"),
    ):
        encode(model, pictures(1), (40, 40, 10))


def test_padding_is_refused_and_a_mask_that_hides_nothing_is_not(models):
    """Pix2Struct's own preprocessing pads with zeros; which patches those are differs by
    picture.
    """
    model, x = models["pix2struct"], pixels("pix2struct", 2)
    padded = torch.cat([x, torch.zeros(2, 5, x.shape[2])], dim=1)
    with torch.no_grad():
        for keep in ((None, None, None), (40, 23, 9)):
            with pytest.raises(ValueError, match="must see all its patches: without padding"):
                encode(model, padded, keep)
        want = encode(model, x, (40, 23, 9))
        with EncoderPruner(model, (40, 23, 9)) as pruner:
            model(x, attention_mask=torch.ones(2, 64))
    assert torch.equal(pruner.tokens, want[0]) and torch.equal(pruner.keep_idx, want[1])


def test_a_pruner_says_that_nothing_ran_through_it(models):
    with pytest.raises(ValueError, match="the encoder did not run inside the block"):
        with EncoderPruner(models["clip"], (9,)):
            pass
    pruner = EncoderPruner(models["clip"], (9,))
    with pytest.raises(ValueError, match="must not be entered twice at a time"), pruner, pruner:
        pass
    assert not hooks_of(models["clip"])


@pytest.mark.parametrize(
    "encoder, error, message",
    [
        (
            lambda: timm.create_model("test_resnet"),
            TypeError,
            "encoder must be or hold one of .*open_clip.transformer.VisionTransformer"
            ".*timm.models.eva.Eva.*timm.models.convnext.ConvNeXt.*CLIPVisionModel.*Dinov2Model"
            ".*Pix2StructVisionModel, got ResNet: for another, add a row to FAMILIES",
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
        (lambda: clip(layers=2), ValueError, "there must be 1 to 2 pruning points"),
    ],
)
def test_models_that_are_refused(encoder, error, message):
    with pytest.raises(error, match=message):
        EncoderPruner(encoder(), (40, 23, 9))


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
    encode(model.eval(), pictures(1), (40, 23, 9))
    with pytest.raises(ValueError, match="must see all its patches: .* patch dropout switched off"):
        encode(model.train(), pictures(1), (40, 23, 9))


def test_expected_ranks_of_no_pictures_is_an_error(models):
    with pytest.raises(ValueError, match="batches must hold at least one picture, got none"):
        expected_ranks([models["clip"]], [])


def test_another_family_is_one_row(monkeypatch):
    class Mine(nn.Module):
        """Named differently from everything in FAMILIES."""

        def __init__(self):
            super().__init__()
            self.inner = MODELS["hf vit"]()
            self.blocks, self.last = self.inner.layers, self.inner.layernorm

        def forward(self, x):
            return self.inner(x).last_hidden_state

    model = perturbed(Mine())
    vit = FAMILIES["transformers.models.vit.modeling_vit.ViTModel"]
    row = Family("blocks", "last", vit.prefix, vit.queries_and_keys)
    with torch.no_grad():
        want = encode(model.inner, pictures(), (40, 23, 9))
        monkeypatch.setitem(FAMILIES, f"{__name__}.{Mine.__qualname__}", row)
        assert find_encoder(model)[0] is model
        mine = encode(model, pictures(), (40, 23, 9))
    assert torch.equal(mine[0], want[0]) and torch.equal(mine[1], want[1])


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
    lines = done.stdout.splitlines()
    assert done.stdout.count("144 tokens") == 5
    assert [line.split(":")[0].strip() for line in lines[5:]] == list(STRATEGIES)
    after = os.times()  # processor seconds: a busy machine is no fault of the file
    spent = after.children_user + after.children_system
    assert spent - before.children_user - before.children_system < 30


def test_file_imports_nothing_of_this_project():
    for line in Path(stage1_encode.__file__).read_text().splitlines():
        assert not line.startswith(("import meteor", "from meteor", "import stage", "from stage"))


@pytest.mark.parametrize("name", ["clip", "siglip", "eva02", "hf clip", "dinov2", "pix2struct"])
def test_gradient_checkpointing_is_refused(name):
    """It runs a block again in the backward pass, when what was pruned there is no longer known."""
    model, x = MODELS[name]().train(), pixels(name, 1)
    if name in OF_HUGGING_FACE:
        enable = getattr(model, "activation_checkpointing_enable", None)  # its name from 5.24 on
        (enable or model.gradient_checkpointing_enable)()
    else:
        model.set_grad_checkpointing(True)
    with pytest.raises(ValueError, match="gradient checkpointing must be off"):
        encode(model, x, (40, 23, 9))
    encode(model.eval(), x, (40, 23, 9))  # there it does nothing


def test_lists_that_do_not_fit_and_pixels_of_another_shape_are_refused(models):
    with pytest.raises(ValueError, match="pixels must be one tensor for each of the 4 encoders"):
        encode_all(four(models), pixels_of_four(1)[:3], 50)
    with pytest.raises(ValueError, match="inside must be 2 bools, one for each encoder"):
        plan_budgets(6, [[1, 1]], [4, 4], [True])
    with pytest.raises(ValueError, match="totals must be an int, a list of ints.* got .."):
        plan_budgets([], [[1, 1]], [4, 4], [True, True])
    with pytest.raises(ValueError, match="must have 4 dimensions, the first of them the batch"):
        count_tokens(models["clip"], pictures(1)[0])
    with pytest.raises(ValueError, match="must have 3 dimensions, the first of them the batch"):
        count_tokens(models["pix2struct"], pictures(1))
    with pytest.raises(ValueError, match="must have 4 dimensions, the first of them the batch"):
        encode(models["clip"], pictures(1)[0], (9,))
    for name in ("clip", "convnext"):
        with pytest.raises(TypeError, match="keep must be a sequence, with an int or None for.* 9"):
            encode(models[name], pictures(1), 9)
        with pytest.raises(TypeError, match="pixels of a .* must be a tensor, got dict"):
            encode(models[name], {"pixel_values": pictures(1)}, (9,))
