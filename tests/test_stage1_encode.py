"""stage1_encode.py against hand-computed cases, slow loops and the libraries themselves.

Run: pytest tests/test_stage1_encode.py

The models are the libraries' own classes, small, with random weights, every parameter perturbed:
biases that are zero at birth would hide a forgotten bias. The oracle for pruning runs the library's
forward on all tokens, masks the dropped ones as keys, and reads the attention weights from the
library's own attention module.
"""

import copy
import math
import runpy
import shutil
import sys
import warnings
from fractions import Fraction
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock
from torch import nn
from torch.nn.utils import parametrize
from torch.overrides import has_torch_function
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Pix2StructConfig,
    Pix2StructForConditionalGeneration,
)

import stage1_encode
from stage1_encode import (
    FAMILIES,
    EncoderPruner,
    Family,
    allocate_budget,
    can_prune_inside,
    count_anew,
    count_tokens,
    encode,
    encode_all,
    expected_ranks,
    feature_rank,
    features_at_points,
    find_encoder,
    highest,
    mean_similarity,
    no_prefix,
    plan_budgets,
    pruning_points,
    received_attention,
)

SIDE, PATCH, HEADS, BLOCKS = 32, 4, 4, 6  # 8 x 8 = 64 patches
KEEP = (40, 23, 9)
VIT = dict(img_size=SIDE, patch_size=PATCH, embed_dim=32, depth=BLOCKS, num_heads=HEADS)
VIT |= dict(num_classes=0, mlp_ratio=2)
ROTARY = VIT | dict(use_rot_pos_emb=True)
SIZES = dict(hidden_size=32, num_hidden_layers=BLOCKS, num_attention_heads=HEADS)
HUGGING_FACE = SIZES | dict(image_size=SIDE, patch_size=PATCH)
WITH_MLP = HUGGING_FACE | dict(intermediate_size=64)
P2S = SIZES | dict(d_kv=8, d_ff=32, seq_len=64, initializer_range=0.02)
P2S |= dict(patch_embed_hidden_size=3 * PATCH**2)


def clip(**options):
    sizes = dict(image_size=SIDE, patch_size=PATCH, width=32, layers=BLOCKS, heads=HEADS)
    rest = dict(mlp_ratio=2.0, output_dim=24, output_tokens=True)
    return VisionTransformer(**sizes | rest | options)


def vit(**options):
    return timm.models.VisionTransformer(**VIT | options)


def hugging_face(name, **options):
    config = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, f"{name}Model")(config)


MODELS = {  # name: how to build it
    "clip": clip,
    "eva fused": lambda: Eva(ref_feat_shape=(4, 4), **ROTARY),  # q_bias and v_bias beside qkv
    "eva02": lambda: Eva(  # as EVA02-B and -L: q_proj and k_proj, norms inside
        qkv_fused=False,
        swiglu_mlp=True,
        scale_mlp=True,
        scale_attn_inner=True,
        global_pool="token",
        **ROTARY,
    ),
    "eva no bias": lambda: Eva(qkv_bias=False, **ROTARY),
    "eva no rope": lambda: Eva(init_values=0.1, **VIT),  # as EVA-01
    "eva registers": lambda: Eva(  # as DINOv3
        rope_type="dinov3",
        num_reg_tokens=3,
        no_embed_class=True,
        rope_rotate_half=True,
        use_abs_pos_emb=False,
        **ROTARY,
    ),
    "eva grouped": lambda: Eva(
        attn_type="rope", qkv_fused=False, num_kv_heads=2, qk_norm=True, **ROTARY
    ),
    "eva core": lambda: Eva(attn_type="rope", use_pre_transformer_norm=True, **ROTARY),  # PE-Core
    "eva mixed": lambda: Eva(rope_type="mixed", **ROTARY),  # a rotary table for each block and head
    "eva post norm": lambda: Eva(use_post_norm=True, **ROTARY),
    "siglip": lambda: vit(class_token=False, global_pool="map"),
    "vit": lambda: vit(qk_norm=True, reg_tokens=2),
    "vit things": lambda: vit(block_fn=ParallelThingsBlock),  # two attentions in a block
    "vit scaling": lambda: vit(block_fn=ParallelScalingBlock),
    "convnext": lambda: ConvNeXt(
        num_classes=0, depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), output_stride=8
    ),
    "pix2struct": lambda: hugging_face("Pix2StructVision", **P2S),
    "dinov2": lambda: hugging_face("Dinov2", use_swiglu_ffn=True, **HUGGING_FACE),
    "dinov2 registers": lambda: hugging_face(
        "Dinov2WithRegisters", num_register_tokens=2, **HUGGING_FACE
    ),
    "hf clip": lambda: hugging_face("CLIPVision", **WITH_MLP),
    "hf siglip": lambda: hugging_face("SiglipVision", **WITH_MLP),
    "hf vit": lambda: hugging_face("ViT", **WITH_MLP),
}
OF_HUGGING_FACE = ("pix2struct", "dinov2", "dinov2 registers", "hf clip", "hf siglip", "hf vit")
TRANSFORMERS = [name for name in MODELS if name != "convnext"]
NO_CLS = ("siglip", "convnext", "pix2struct", "hf siglip")
PREFIX = dict.fromkeys(MODELS, 1) | dict.fromkeys(NO_CLS, 0)
PREFIX |= {"eva registers": 4, "vit": 3, "dinov2 registers": 3}


def perturbed(model, seed=0):
    """Every parameter moved, so that no bias, scale or positional table is trivial; in eval."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        size = 0.3 if p.dim() > 1 else 0.1
        width = p.shape[-1] if p.dim() else 1
        p.data += size * width**-0.5 * torch.randn(p.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {name: perturbed(build()) for name, build in MODELS.items()}


def pictures(B=4, side=SIDE, seed=0):
    return torch.rand(B, 3, side, side, generator=torch.Generator().manual_seed(seed))


def p2s_patches(images, p=PATCH):
    """Hugging Face's input, one patch at a time: row and column from 1, then its pixels."""
    every = []
    for image in images:
        image = (image - image.mean()) / image.std()
        patches = []
        for r in range(image.shape[1] // p):
            for c in range(image.shape[2] // p):
                patch = image[:, r * p : r * p + p, c * p : c * p + p].permute(1, 2, 0)
                patches.append(torch.cat([torch.tensor([r + 1.0, c + 1.0]), patch.flatten()]))
        every.append(torch.stack(patches))
    return torch.stack(every)


def pixels(name, B=4, seed=0):
    """What the model reads: random pixels around 0, or flattened patches; 64 patches each."""
    images = pictures(B, 64 if name == "convnext" else SIDE, seed)
    return p2s_patches(images) if name == "pix2struct" else 4 * (images - 0.5)


def library_tokens(name, model, x):
    """The patches of the library's own forward, (B, 64, D)."""
    if name == "clip":
        return model(x)[1]
    if name in OF_HUGGING_FACE:
        return model(x).last_hidden_state[:, PREFIX[name] :]
    x = model.forward_features(x)
    return x.flatten(2).mT if name == "convnext" else x[:, PREFIX[name] :]


def equal(mine, want):
    return all(torch.equal(a, b) for a, b in zip(mine, want))


class ByAttention(EncoderPruner):
    """A rule of one's own: attention in every part."""

    def score(self, part, tokens, attention):
        return attention()


# ---------------------------------------------------------------------------- the rules, and ranks


def test_redundancy_of_four_tokens_by_hand():
    # the mean points east
    tokens = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, -1.0]]])
    torch.testing.assert_close(mean_similarity(tokens), torch.tensor([[1.0, 0.0, 1.0, 0.0]]))


def test_attention_of_three_tokens_by_hand():
    q = torch.tensor([[[[1.0], [0.0], [-1.0]]]])  # (B, H, N, d) = (1, 1, 3, 1)
    k = torch.tensor([[[[0.0], [math.log(4.0)], [math.log(9.0)]]]])
    first, last = torch.tensor([1.0, 2.0, 3.0]) / 6, torch.tensor([6.0, 3.0, 2.0]) / 11
    torch.testing.assert_close(received_attention(q[:, :, :1], k, 0.5)[0], first)
    torch.testing.assert_close(received_attention(q, k, 0.5)[0], (first + 1 / 3 + last) / 3)


@pytest.mark.parametrize("B, H, H_kv, N, d", [(1, 1, 1, 2, 3), (2, 4, 2, 7, 4), (3, 2, 2, 33, 8)])
def test_rules_against_loops(B, H, H_kv, N, d):
    g = torch.Generator().manual_seed(N)
    q, k = torch.randn(B, H, N, d, generator=g), torch.randn(B, H_kv, N, d, generator=g)
    tokens = torch.randn(B, N, d, generator=g)
    before = q.clone(), k.clone(), tokens.clone()
    for Q in (1, N):
        want = torch.zeros(B, N)
        for b in range(B):
            for h in range(H):
                for i in range(Q):
                    keys = k[b, h * H_kv // H]
                    e = [math.exp(0.3 * float(q[b, h, i] @ keys[j])) for j in range(N)]
                    want[b] += torch.tensor(e) / sum(e) / H / Q
        for chunk in (1, 4, 256):
            torch.testing.assert_close(received_attention(q[:, :, :Q], k, 0.3, chunk), want)
    for b in range(B):
        mean = sum(tokens[b, i] for i in range(N)) / N
        want = [float(x @ mean / (x.norm() * mean.norm())) for x in tokens[b]]
        torch.testing.assert_close(mean_similarity(tokens)[b], torch.tensor(want))
    assert equal((q, k, tokens), before)


def test_rules_are_float32_under_autocast_and_in_half_precision():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 9, 8, generator=g), torch.randn(2, 3, 9, 8, generator=g)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = received_attention(q, k, 0.3), mean_similarity(q[:, 0])
    assert equal(inside, (received_attention(q, k, 0.3), mean_similarity(q[:, 0])))
    half = q.bfloat16()
    assert torch.equal(
        received_attention(half, half, 0.3), received_attention(*2 * [half.float()], 0.3)
    )
    assert torch.equal(mean_similarity(half[:, 0]), mean_similarity(half[:, 0].float()))


def test_the_highest_scores_by_hand_ascending_and_ties_to_the_lower_place():
    score = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0], [4.0, 1.0, 2.0, 3.0]])
    assert highest(score, 2).tolist() == [[1, 3], [0, 1], [0, 3]]
    assert highest(score, 3).tolist() == [[1, 2, 3], [0, 1, 2], [0, 2, 3]]


def test_rank_by_hand():
    g = torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(7, 5, generator=g))[0]
    right = torch.linalg.qr(torch.randn(5, 5, generator=g))[0]
    A = left * torch.tensor([1.0, 0.5, 0.02, 0.005, 0.0]) @ right  # (7, 5), those singular values
    tokens = torch.stack([A, 100 * A, torch.zeros(7, 5), torch.ones(7, 5)])
    assert feature_rank(tokens, 1e-2).tolist() == feature_rank(tokens.mT).tolist() == [3, 3, 0, 1]
    assert feature_rank(tokens, 1e-3).tolist() == [4, 4, 0, 1]
    assert feature_rank(tokens, 0.6).tolist() == [1, 1, 0, 1]


@pytest.mark.parametrize("N, D", [(1, 5), (5, 1), (6, 9), (40, 24), (24, 40)])
def test_rank_against_svd_one_matrix_at_a_time(N, D):
    tokens = torch.randn(3, N, D, generator=torch.Generator().manual_seed(N))
    tokens = tokens * torch.logspace(0, -4, D)
    for rtol in (1e-1, 1e-2, 1e-3):
        sigmas = [torch.linalg.svdvals(a.double()) for a in tokens]
        assert feature_rank(tokens, rtol).tolist() == [int((s > rtol * s[0]).sum()) for s in sigmas]


# --------------------------------------------------------------------------------------- allocation


@pytest.mark.parametrize(
    "total, ranks, available, want",
    [
        (10, [3, 1, 1], [9, 9, 9], [6, 2, 2]),
        (10, [2, 1, 1], [9, 9, 9], [5, 3, 2]),  # 5, 2.5, 2.5: the tie goes to the lower index
        (10, [1, 2, 4], [9, 9, 9], [1, 3, 6]),  # 1.43, 2.86, 5.71
        (10, [6, 3, 1], [4, 9, 9], [4, 5, 1]),  # held at 4; the other 6 by 3 : 1 are 4.5 and 1.5
        (10, [6, 3, 1], [4, 4, 9], [4, 4, 2]),  # then held at 4 again
        (10, [97, 1, 2], [99, 9, 9], [8, 1, 1]),  # nobody below 1
        (10, [1, 1, 1], [2, 9, 9], [2, 4, 4]),
        (5, [0.2], [7], [5]),
        (17, [90.5, 61.25, 33.0, 87.75], [6, 4, 3, 4], [6, 4, 3, 4]),
    ],
)
def test_allocation_by_hand(total, ranks, available, want):
    assert allocate_budget(total, ranks, available) == want
    assert allocate_budget(total, torch.tensor(ranks, dtype=torch.float64), available) == want


def slow_shares(total, ranks, available):
    """Shares in proportion to the ranks, held to their bounds: by bisection of the factor."""
    ranks = [Fraction(r) for r in ranks]
    low, high = 0, max(n / r for n, r in zip(available, ranks))
    for _ in range(80):
        middle = (low + high) / 2
        if sum(min(max(middle * r, 1), n) for n, r in zip(available, ranks)) < total:
            low = middle
        else:
            high = middle
    return [min(max(high * r, 1), n) for n, r in zip(available, ranks)]


@pytest.mark.parametrize(
    "ranks, available",
    [
        ([5.0, 3.0, 2.0], [6, 7, 3]),
        ([1e-3, 7.0, 50.0, 3.5], [4, 1, 9, 12]),
        ([1.0, 1.0], [5, 3]),
        ([90.1, 61.2, 33.3, 87.4], [36, 49, 36, 64]),
        ([1.0, 1e9], [5, 5]),
    ],
)
def test_every_total_is_allocated_exactly_within_bounds_by_largest_remainders(ranks, available):
    small = Fraction(1, 10**9)
    for total in range(len(ranks), sum(available) + 1):
        counts = allocate_budget(total, ranks, available)
        assert sum(counts) == total
        assert all(isinstance(k, int) and 1 <= k <= n for k, n in zip(counts, available))
        excess = [k - s for k, s in zip(counts, slow_shares(total, ranks, available))]
        assert all(abs(e) < 1 + small for e in excess), (total, counts)
        up, down = [e for e in excess if e > small], [e for e in excess if e < -small]
        # who was rounded up had the larger remainders: 1 - e above, -e below
        assert not up or not down or max(up) - 1 <= min(down) + small


@pytest.mark.parametrize(
    "total, ranks, available, message",
    [
        (2, [1, 1, 1], [4, 4, 4], r"total must be 3, one .*, to all of \[4, 4, 4\], got 2"),
        (13, [1, 1, 1], [4, 4, 4], "total must be 3, .* got 13"),
        (6, [1, 1], [4, 4, 4], r"ranks must be 3 positive numbers, .*, got \[1, 1\]"),
        *[
            (6, [1, 1, r], [4, 4, 4], "ranks must be 3 positive")
            for r in (0, -1, math.nan, math.inf)
        ],
    ],
)
def test_allocation_errors(total, ranks, available, message):
    with pytest.raises(ValueError, match=message):
        allocate_budget(total, ranks, available)


def test_plan_by_hand():
    ranks, available, inside = [[1, 5, 1], [1, 7, 3], [1, 2, 1]], [64, 64, 64], [True, False, True]
    # last: 32 = 8 + 16 + 8; inside 128 -> 16, half at each point
    want = [(32, 8, 8), (64, 64, 16), (32, 24, 8)]
    assert plan_budgets(32, ranks, available, inside) == want
    assert plan_budgets(32, torch.tensor(ranks), available, inside) == want
    given = [(50, 10, 8), (64, 64, 16), (50, 30, 8)]
    assert plan_budgets((100, 40, 32), ranks, available, inside) == given
    equally = [(35, 19, 11), (64, 64, 11), (35, 19, 10)]
    assert plan_budgets(32, None, available, inside) == equally
    assert plan_budgets(None, None, available, inside) == [(64, 64, 64)] * 3
    assert plan_budgets(9, [[1], [1], [1]], [16], [False]) == [(16, 16, 9)]
    assert plan_budgets((9, 7), None, [6, 6], [True, True]) == [(5, 4), (4, 3)]


@pytest.mark.parametrize("inside", [(True, False, True), (True,) * 3, (False,) * 3])
def test_every_plan_never_rises_and_ends_in_its_total(inside):
    ranks = [[9.0, 2.0, 5.0], [1.0, 2.0, 8.0], [6.0, 3.0, 1.0]]  # the points disagree
    available = [9, 16, 12]
    for total in range(3, sum(available) + 1):
        plan = plan_budgets(total, ranks, available, inside)
        assert sum(counts[2] for counts in plan) == total
        for counts, n, prunable in zip(plan, available, inside):
            assert n >= counts[0] >= counts[1] >= counts[2] >= 1
            assert prunable or counts[:2] == (n, n)
    assert plan == [(n, n, n) for n in available]


@pytest.mark.parametrize(
    "totals, message",
    [
        ((7, 6), r"ranks must have 2 rows, one for each of \(7, 6\)"),
        ((9, 7, 6), r"total must be 2, .* all of \[4, 4\], got 9"),
        ((6, 7, 6), r"total must be 2, .* all of \[3, 3\], got 7"),
        ((6, 4, 5), r"total must be 2, .* all of \[2, 2\], got 5"),
        (1, "total must be 2, .* got 1"),
    ],
)
def test_plan_errors(totals, message):
    with pytest.raises(ValueError, match=message):
        plan_budgets(totals, [[1, 1]] * 3, [4, 4], [True, True])


# ------------------------------------------------------------------------- encoding: nothing pruned


@pytest.mark.parametrize("name", MODELS)
def test_keep_all_is_the_librarys_forward_to_the_bit(models, name):
    model, x = models[name], pixels(name)
    with torch.no_grad():
        want = library_tokens(name, model, x)
        for keep in ((None, None, None), (64, 64, 64), (None,), (64, None, 64, 64, None, None)):
            tokens, keep_idx = encode(model, x, keep)
            assert tokens.shape == want.shape == (4, 64, 32)
            assert torch.equal(tokens, want)
            assert keep_idx.dtype == torch.int64 and keep_idx.tolist() == [list(range(64))] * 4


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_librarys_own_output_is_what_it_was_before_inside_and_after(models, name):
    model, x = models[name], pixels(name, 2)
    with torch.no_grad():
        before = library_tokens(name, model, x)
        with EncoderPruner(model, (None, None, 64)):
            inside = library_tokens(name, model, x)
        encode(model, x, KEEP)
        after = library_tokens(name, model, x)
    assert torch.equal(inside, before) and torch.equal(after, before)


@pytest.mark.parametrize("name", MODELS)
def test_what_stage_1_finds_in_a_model(models, name):
    model, x = models[name], pixels(name)
    assert find_encoder(model) is model and count_tokens(model, x) == 64
    assert can_prune_inside(model) == (name != "convnext")
    if name != "convnext":
        pruner = EncoderPruner(model, (None,) * 3)
        assert (pruner.prefix, pruner.has_cls) == (PREFIX[name], name not in NO_CLS)
        assert len(pruner.blocks) == BLOCKS and pruner.points == [1, 3, 5]


@pytest.mark.parametrize(
    "blocks, last",
    [(24, [7, 15, 23]), (3, [0, 1, 2]), (7, [1, 3, 6]), (23, [6, 14, 22]), (24, [5, 11, 17, 23])],
)
def test_pruning_points_are_the_last_blocks_of_equal_parts(blocks, last):
    assert pruning_points(blocks, len(last)) == last


@torch.no_grad()
def test_a_grid_that_is_no_square_and_a_picture_that_the_encoder_pads():
    wide, x = vit(img_size=(16, 64)).eval(), torch.rand(2, 3, 16, 64)
    assert encode(wide, x, (40, 20, 9))[0].shape == (2, 9, 32)
    padding = vit(dynamic_img_size=True, dynamic_img_pad=True).eval()
    x = torch.rand(2, 3, 30, 37)  # padded to 8 x 10 patches of 4 pixels
    assert count_tokens(padding, x) == 80
    assert encode_all([padding], [x], None)[1][0].tolist() == [list(range(80))] * 2
    assert torch.equal(encode(padding, x)[0], padding.forward_features(x)[:, 1:])


def test_patches_are_counted_once_for_each_shape_and_encoder():
    model, other = (vit(dynamic_img_size=True).eval() for _ in range(2))
    runs = []
    for encoder in (model, other):
        encoder.patch_embed.register_forward_pre_hook(lambda module, args: runs.append(module))
    counts = [
        count_tokens(encoder, torch.rand(B, 3, H, 16))
        for encoder, B, H in ((model, 2, 16), (model, 1, 16), (model, 2, 32), (other, 2, 16))
    ]
    assert counts == [16, 16, 32, 16] and len(runs) == 3


@pytest.mark.parametrize(
    "name, options, N",
    [
        ("vitamin_small_224", dict(depth=3), 196),  # open_clip's ViTamin-S
        ("vit_base_mci_224", dict(depth=3), 196),  # its MobileCLIP-B
        ("vit_tiny_r_s16_p8_224", dict(depth=3), 49),  # a ViT behind a ResNet
    ],
)
@torch.no_grad()
def test_tokens_behind_a_convolutional_stem_are_counted_as_they_are(name, options, N):
    model = timm.create_model(name, num_classes=0, **options).eval()
    x = pictures(1, 224)
    assert count_tokens(model, x) == N
    want = model.forward_features(x)[:, model.num_prefix_tokens :]
    assert torch.equal(encode_all([model], [x], None)[0][0], want)
    tokens, keep_idx = encode_all([model], [x], 20)
    assert tokens[0].shape[1] == 20 and keep_idx[0].max() < N


def test_models_inside_other_models_are_found():
    tower = dict(layers=3, width=32, head_width=8, patch_size=8, image_size=32)
    text = dict(context_length=8, vocab_size=32, width=16, heads=2, layers=1)
    whole = perturbed(open_clip.CLIP(16, tower, text))
    x, keep = pictures(2), (12, 9, 5)
    with torch.no_grad():
        want = encode(whole.visual, x, keep)
        assert equal(encode(whole, x, keep), want)
        with EncoderPruner(whole, keep) as pruner:
            whole.encode_image(x)  # whatever runs the tower
    assert equal((pruner.tokens, pruner.keep_idx), want)

    # as convnext_base_w in open_clip
    wrapped = TimmModel("test_convnext", 16, image_size=64, pool="", proj="linear").eval()
    x = pictures(2, 64)
    assert torch.equal(encode(wrapped, x)[0], wrapped.trunk.forward_features(x).flatten(2).mT)

    text = dict(vocab_size=16, hidden_size=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    config = Pix2StructConfig(text_config=text, vision_config=P2S)
    both, x = Pix2StructForConditionalGeneration(config).eval(), pixels("pix2struct", 2)
    assert torch.equal(encode(both, x)[0], both.encoder(x).last_hidden_state)


def test_the_tower_of_a_llava_up_to_the_layer_that_it_reads():
    """depth: LLaVA takes hidden_states[-2], without a final norm."""
    text = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
    )
    config = LlavaConfig(vision_config=transformers.CLIPVisionConfig(**WITH_MLP), text_config=text)
    llava = perturbed(LlavaForConditionalGeneration(config))
    tower, x = llava.model.vision_tower, pixels("hf clip")
    with torch.no_grad():
        want = tower(x, output_hidden_states=True).hidden_states[-2][:, 1:]
        with EncoderPruner(llava, (None,), depth=BLOCKS - 1) as pruner:
            tower(x)
        assert torch.equal(pruner.tokens, want)
        with EncoderPruner(llava, KEEP, depth=BLOCKS - 1) as pruner:
            llava.get_image_features(pixel_values=x)
    assert pruner.points == [0, 2, 4] and pruner.tokens.shape == (4, 9, 32)


@torch.no_grad()
def test_a_depth_leaves_out_the_final_norm_and_all_blocks_have_it(models):
    model, x = models["vit"], pixels("vit")
    want = model.forward_intermediates(x, [4, 5], output_fmt="NLC", intermediates_only=True)
    for depth, tokens in ((5, want[0]), (6, model.norm(want[1]))):
        with EncoderPruner(model, (None,), depth=depth) as pruner:
            model(x)
        assert torch.equal(pruner.tokens, tokens)


@pytest.mark.parametrize("pooled", ["final_ln_after_pool", "attentional_pool"])
@pytest.mark.parametrize("keep", [(None,), KEEP])
@torch.no_grad()
def test_an_open_clip_model_that_pools_first_norms_no_patch(pooled, keep):
    """Its last norm is for what it pools; the patches are those that leave the last block."""
    queries = 1 + (keep[-1] or 64)  # pools to as many tokens as there are
    model = perturbed(clip(**{pooled: True}, attn_pooler_heads=4, attn_pooler_queries=queries))
    left = []
    model.transformer.register_forward_hook(lambda module, args, output: left.append(output))
    tokens, _ = encode(model, pictures(2), keep)
    assert torch.equal(tokens, left[0][:, 1:])


# ------------------------------------------------------- encoding: pruned, against masked attention


def be_eager(model):
    """Attention as a softmax that can be read, in timm and transformers."""
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def note_weights(block, noted):
    """Hooks that append the attention weights (S, S) of one picture, mean over heads."""

    def ask(module, args, kwargs):
        return args, kwargs | dict(need_weights=True, average_attn_weights=True)

    def second(module, args, output):
        if isinstance(output, tuple) and output[1] is not None:
            weights = output[1][0]
            noted.append(weights.mean(0) if weights.dim() == 3 else weights)

    def dropped_out(module, args, output):
        noted.append(output[0].mean(0))

    for module in block.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.register_forward_pre_hook(ask, with_kwargs=True)
        if hasattr(module, "attn_drop"):
            module.attn_drop.register_forward_hook(dropped_out)
        elif "Attention" in type(module).__name__:
            module.register_forward_hook(second)


@torch.no_grad()
def masked_oracle(name, model, x, keep, rules):
    """keep_idx and tokens of each picture: nothing leaves the sequence, and loops choose."""
    model = be_eager(copy.deepcopy(model))
    blocks = list(EncoderPruner(model, keep).blocks)
    P, S = PREFIX[name], PREFIX[name] + 64
    alive, weights = [], []

    def mask_dropped(block, args, kwargs):
        weights.clear()
        present = torch.tensor([s < P or s - P in alive for s in range(S)])
        mask = torch.zeros(S, S).masked_fill(~present, -torch.inf)
        if name in OF_HUGGING_FACE:
            others = {key: value for key, value in kwargs.items() if key != "attention_mask"}
            return (args[0], mask[None, None]), others
        return args[:1], kwargs | {"attn_mask": mask}

    def choose(block, args, output):
        part, inside = divmod(blocks.index(block), 2)
        if inside == 0:
            return
        out = output[0] if isinstance(output, tuple) else output  # (1, S, D)
        if rules[part] == "similarity":
            mean = torch.stack([out[0, P + t] for t in alive]).mean(0)
            score = {t: -float(F.cosine_similarity(out[0, P + t], mean, dim=0)) for t in alive}
        else:
            average = sum(weights) / len(weights)
            assert average.std() > 1e-4, "attention too even to test anything"
            queries = range(S) if name in NO_CLS else [0]
            queries = [s for s in queries if s < P or s - P in alive]
            score = {t: float(average[queries, P + t].mean()) for t in alive}
        alive[:] = sorted(sorted(alive, key=lambda t: (-score[t], t))[: keep[part]])

    for block in blocks:
        block.register_forward_pre_hook(mask_dropped, with_kwargs=True)
        note_weights(block, weights)
        block.register_forward_hook(choose)
    keep_idx, tokens = [], []
    for b in range(len(x)):
        alive[:] = range(64)
        every = library_tokens(name, model, x[b : b + 1])
        keep_idx.append(torch.tensor(alive))
        tokens.append(every[0, alive])
    return torch.stack(tokens), torch.stack(keep_idx)


def assert_pruned_as_by_the_library(name, model, x, keep, pruner=EncoderPruner):
    rules = ("attention" if pruner is ByAttention else "similarity", "attention", "attention")
    with torch.no_grad():
        tokens, keep_idx = encode(model, x, keep, pruner)
    want, want_idx = masked_oracle(name, model, x, keep, rules)
    assert keep_idx.dtype == torch.int64 and torch.equal(keep_idx, want_idx)
    difference = (tokens - want).abs()
    assert difference.max() <= 1e-5, f"max {difference.max():.1e}, mean {difference.mean():.1e}"


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("keep, pruner", [(KEEP, EncoderPruner), ((64, 31, 30), ByAttention)])
def test_pruned_tokens_are_those_of_the_library_with_the_dropped_ones_masked(
    models, name, keep, pruner
):
    # B == H: where a rotary table without a head axis is silently wrong
    B = HEADS if pruner is EncoderPruner else 2
    assert_pruned_as_by_the_library(name, models[name], pixels(name, B), keep, pruner)


@pytest.mark.parametrize("name", MODELS)
def test_batch_equals_singles(models, name):
    x = pixels(name, HEADS, seed=3)
    with torch.no_grad():
        tokens, keep_idx = encode(models[name], x, KEEP)
        for b in range(HEADS):
            alone, alone_idx = encode(models[name], x[b : b + 1], KEEP)
            assert torch.equal(alone_idx[0], keep_idx[b])
            torch.testing.assert_close(alone[0], tokens[b], rtol=0, atol=1e-5)
    assert len(keep_idx.unique(dim=0)) == HEADS, "each picture must be pruned for itself"
    assert (keep_idx.diff(dim=1) > 0).all() and 0 <= keep_idx.min() and keep_idx.max() < 64


@pytest.mark.parametrize("name", [n for n in TRANSFORMERS if n != "clip"])
def test_eager_attention_keeps_the_same_tokens(models, name):
    x = pixels(name, 2)
    eager = be_eager(copy.deepcopy(models[name]))
    with torch.no_grad():
        tokens, keep_idx = encode(models[name], x, KEEP, ByAttention)
        eager_tokens, eager_idx = encode(eager, x, KEEP, ByAttention)
    assert torch.equal(eager_idx, keep_idx)
    torch.testing.assert_close(eager_tokens, tokens, rtol=0, atol=1e-5)


def test_open_clips_other_block_keeps_the_same_tokens(models):
    """Its own attention instead of torch's module, by scaled_dot_product_attention."""
    other, x = clip(block_type="custom").eval(), pixels("clip")
    other.load_state_dict(models["clip"].state_dict())
    with torch.no_grad():
        tokens, keep_idx = encode(models["clip"], x, KEEP)
        other_tokens, other_idx = encode(other, x, KEEP)
    assert torch.equal(other_idx, keep_idx)
    torch.testing.assert_close(other_tokens, tokens, rtol=0, atol=1e-5)


def test_ties_go_to_the_lower_index():
    model = perturbed(clip())
    model.positional_embedding.data.zero_()
    grey = torch.full((2, 3, SIDE, SIDE), 0.5)  # all patches alike
    with torch.no_grad():
        assert encode(model, grey, KEEP)[1].tolist() == [list(range(9))] * 2


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_gradients_reach_the_kept_tokens_and_no_others(models, name):
    model, P, left = copy.deepcopy(models[name]).train(), PREFIX[name], []

    def keep_grad(module, args, output):
        output = output[0] if isinstance(output, tuple) else output
        output.retain_grad()
        left.append(output)

    EncoderPruner(model, (30,) * 3).blocks[1].register_forward_hook(keep_grad)  # the first part
    x = pixels(name, 2).requires_grad_()
    tokens, keep_idx = encode(model, x, (30, 30, 30))
    tokens.square().sum().backward()
    reached = left[0].grad[:, P:].abs().sum(-1) > 0  # (B, N)
    assert torch.equal(reached, torch.zeros(2, 64, dtype=torch.bool).scatter(1, keep_idx, True))
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("name", MODELS)
def test_autocast_and_half_precision_score_in_float32(models, name):
    scores = []

    class Noting(EncoderPruner):
        def score(self, part, tokens, attention):
            scores.append(attention())
            return super().score(part, tokens, attention)

    x = pixels(name, 2)
    half = copy.deepcopy(models[name]).bfloat16()
    if name == "eva mixed":
        half.rope.float()  # timm 1.0.30 cannot do it in half precision
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert encode(models[name], x, KEEP, Noting)[0].shape == (2, 9, 32)
        assert encode(half, x.bfloat16(), KEEP, Noting)[0].dtype == torch.bfloat16
    for score in scores:
        assert score.dtype == torch.float32
        distinct = min(len(row.unique()) for row in score)
        assert distinct > 0.9 * score.shape[1], "rounded to half precision, most would be equal"
    assert len(scores) == (0 if name == "convnext" else 6)


@pytest.mark.parametrize("by_position", [True, False])
@pytest.mark.parametrize("name", ["hf clip", "pix2struct", "dinov2", "vit"])
@torch.no_grad()
def test_a_mask_that_hides_nothing_is_not_handed_on_at_its_old_length(models, name, by_position):
    """As a library may hand one to every block, by position or by name."""
    model, x = models[name], pixels(name, 2)
    want = encode(model, x, KEEP)
    keyword = "attn_mask" if name == "vit" else "attention_mask"
    S = 64 + PREFIX[name]
    mask, lengths, handles = torch.zeros(2, 1, S, S), [], []

    def with_mask(block, args, kwargs):
        others = {key: value for key, value in kwargs.items() if key != keyword}
        if by_position:
            return (args[0], mask), others
        return args[:1], others | {keyword: mask}

    def note(block, args, kwargs):
        given = args[1] if len(args) > 1 else kwargs.get(keyword)
        lengths.append(None if given is None else given.shape[-1])

    pruner = EncoderPruner(model, KEEP)
    handles += [b.register_forward_pre_hook(with_mask, with_kwargs=True) for b in pruner.blocks]
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


# -------------------------------------------------------------------------- what is left behind


def hooks_of(model):
    return [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]


def nothing_listens():
    return not has_torch_function([torch.zeros(1)])


@pytest.mark.parametrize("name", MODELS)
def test_inputs_and_models_are_left_unchanged(models, name):
    model, x, keep = models[name], pixels(name, 2), [40, 23, 9]
    before, state = x.clone(), copy.deepcopy(model.state_dict())
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    encode(model, x, keep)
    count_tokens(model, x)
    expected_ranks([model], [[x]])
    assert torch.equal(x, before) and keep == [40, 23, 9]
    assert equal(model.state_dict().values(), state.values())
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert not hooks_of(model) and nothing_listens()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["clip", "vit", "hf vit"])
def test_nothing_is_left_behind_when_a_block_fails(models, name, error):
    model, x = copy.deepcopy(models[name]), pixels(name, 2)
    want = encode(model, x, KEEP)

    def fail(module, args):
        raise error("in the middle of a block that is listened to")

    last_layer = list(EncoderPruner(model, KEEP).blocks[3].modules())[-1]
    handle = last_layer.register_forward_pre_hook(fail)
    with pytest.raises(error):
        encode(model, x, KEEP)
    handle.remove()
    assert not hooks_of(model) and nothing_listens()
    assert equal(encode(model, x, KEEP), want)


def test_forwards_that_fail_disturb_neither_the_next_nor_a_mode_of_torch_around_them():
    model, x = vit(depth=3).eval(), pixels("vit", 2)
    want, failing = encode(model, x, KEEP), [True]

    def fail(module, args):
        if failing:
            raise RuntimeError("once")

    model.blocks[0].mlp.register_forward_pre_hook(fail)
    with warnings.catch_warnings(), EncoderPruner(model, KEEP) as pruner:
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="once"):
            model(x)
        assert nothing_listens()
        with torch.device("meta"):
            with pytest.raises(ValueError, match="must see all its patches"):
                model(x, attn_mask=torch.full((65, 65), -1.0, device="cpu"))
            assert torch.zeros(1).is_meta
        failing.clear()
        model(x)
    assert equal((pruner.tokens, pruner.keep_idx), want) and nothing_listens()


def test_a_pruner_serves_many_forwards_one_after_another(models):
    model = models["eva02"]
    with torch.no_grad():
        found = []
        with EncoderPruner(model, KEEP) as pruner:
            for seed in (0, 5):
                model(pixels("eva02", 2, seed))
                found.append((pruner.tokens, pruner.keep_idx))
        for seed, mine in zip((0, 5), found):
            assert equal(encode(model, pixels("eva02", 2, seed), KEEP), mine)


def test_counting_and_ranks_inside_a_pruners_block_are_refused(models):
    model, x = models["siglip"], pixels("siglip")
    with pytest.raises(ValueError, match="this encoder is in another pruner's block"):
        with EncoderPruner(model, (40, 20, 9)):
            count_anew(model, x)
    with pytest.raises(ValueError, match="this encoder is in another pruner's block"):
        with EncoderPruner(model, (40, 20, 9)):
            expected_ranks([model], [[x]])
    assert count_tokens(model, x) == 64


def test_a_second_pruner_on_the_same_encoder_is_refused(models):
    model, x = models["clip"], pixels("clip", 2)
    want = encode(model, x, KEEP)
    with pytest.raises(ValueError, match="this encoder is in another pruner's block"):
        with EncoderPruner(model, (50, 40, 30)), EncoderPruner(model, KEEP):
            pass
    pruner = EncoderPruner(model, KEEP)
    with pytest.raises(ValueError, match="in another pruner's block"), pruner, pruner:
        pass
    assert not hooks_of(model)
    with EncoderPruner(models["vit"], KEEP):  # another encoder's is none
        assert equal(encode(model, x, KEEP), want)
        models["vit"](pixels("vit", 1))


# ------------------------------------------------------------------- encoders as people load them


class Adapter(nn.Module):
    """What peft does: the layer itself, and a low-rank sum beside it."""

    def __init__(self, base, seed, rank=8):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.base = base
        self.down = torch.randn(rank, base.in_features, generator=g) / base.in_features**0.5
        self.up = torch.randn(base.out_features, rank, generator=g) / 2

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


@torch.no_grad()
def test_an_adapter_on_a_fused_qkv_keeps_the_same_patches_as_the_merged_one(models):
    model, x = copy.deepcopy(models["vit"]), pixels("vit")
    merged = copy.deepcopy(model)
    for i in range(BLOCKS):
        adapter = Adapter(model.blocks[i].attn.qkv, seed=i)
        model.blocks[i].attn.qkv = adapter
        merged.blocks[i].attn.qkv.weight += adapter.up @ adapter.down
    keep_idx = encode(model, x, KEEP, ByAttention)[1]
    assert torch.equal(keep_idx, encode(merged, x, KEEP, ByAttention)[1])
    assert not torch.equal(keep_idx, encode(models["vit"], x, KEEP, ByAttention)[1])
    assert_pruned_as_by_the_library("vit", model, x, KEEP)


class Sum(nn.Module):
    """Adds to a weight, as adapters of packed projections do."""

    def forward(self, weight):
        return weight + weight.flip(1) / 2


@torch.no_grad()
def test_an_adapter_on_open_clips_packed_projection_is_heard(models):
    model, x = copy.deepcopy(models["clip"]), pixels("clip")
    blocks = model.transformer.resblocks
    for block in blocks:
        parametrize.register_parametrization(block.attn, "in_proj_weight", Sum())
    keep_idx = encode(model, x, KEEP, ByAttention)[1]
    for block in blocks:
        parametrize.remove_parametrizations(block.attn, "in_proj_weight")
    assert torch.equal(keep_idx, encode(model, x, KEEP, ByAttention)[1])
    assert not torch.equal(keep_idx, encode(models["clip"], x, KEEP, ByAttention)[1])


@pytest.mark.parametrize(
    "name, layers", [("dinov2", "all-linear"), ("clip", ["attn"]), ("vit", ["qkv"])]
)
@torch.no_grad()
def test_lora_of_peft_keeps_the_same_patches_as_the_merged_one(models, name, layers):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=layers, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers for an attribute that is renamed
        model = peft.get_peft_model(copy.deepcopy(models[name]), config).eval()
    x = pixels(name)
    keep_idx = encode(model, x, KEEP, ByAttention)[1]
    assert torch.equal(keep_idx, encode(model.merge_and_unload(), x, KEEP, ByAttention)[1])
    assert not torch.equal(keep_idx, encode(models[name], x, KEEP, ByAttention)[1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["vit", "eva02", "hf vit"])
def test_int8_layers_are_heard(models, name):
    model = torch.ao.quantization.quantize_dynamic(models[name], {nn.Linear}, dtype=torch.qint8)
    x = pixels(name, 6)
    # An int8 layer's scale is that of all the tokens it gets: one picture at a time, and none of
    # its tokens leaves before the last point.
    keep = (64, 64, 30)
    with torch.no_grad():
        singles = [encode(model, x[b : b + 1], keep, ByAttention)[1] for b in range(6)]
        float_idx = encode(models[name], x, keep, ByAttention)[1]
    keep_idx = torch.cat(singles)
    want = masked_oracle(name, model, x, keep, ("attention",) * 3)[1]
    assert torch.equal(keep_idx, want) and not torch.equal(keep_idx, float_idx)


@torch.no_grad()
def test_weights_that_accelerate_brings_in_for_each_layer(models):
    accelerate = pytest.importorskip("accelerate")
    model, x = copy.deepcopy(models["eva02"]), pixels("eva02", 2)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.blocks[0].attn.q_proj.weight.is_meta
    for _ in range(2):
        assert count_tokens(model, x) == 64  # leaves the encoder by an exception
        assert equal(encode(model, x, KEEP), encode(models["eva02"], x, KEEP))


@torch.no_grad()
def test_a_class_that_a_wrapper_has_renamed(models):
    """As FSDP2 does."""
    model, x = copy.deepcopy(models["vit"]), pixels("vit", 2)
    for module in (model, *model.blocks):
        module.__class__ = type(f"FSDP{type(module).__name__}", (type(module),), {})
    assert equal(encode(model, x, KEEP), encode(models["vit"], x, KEEP))


@torch.no_grad()
def test_a_compiled_block_is_pruned_and_an_encoder_compiled_before_is_refused():
    model, x = perturbed(vit(depth=2)), pixels("vit", 2)
    want = encode(model, x, (40, 9))
    part = copy.deepcopy(model)
    part.blocks[1] = torch.compile(part.blocks[1], backend="eager")
    assert equal(encode(part, x, (40, 9)), want)

    model.compile(backend="eager")
    model(x)
    with pytest.raises(ValueError, match="did not run inside the block, or was compiled before"):
        encode(model, x, (40, 9))


# --------------------------------------------------------------------------------- several encoders

FOUR = ("clip", "convnext", "eva02", "pix2struct")


@torch.no_grad()
def test_encode_all_gives_each_its_part_of_the_total(models):
    encoders = [models[name] for name in FOUR]
    two, one = [[pixels(name, B) for name in FOUR] for B in (2, 1)]
    ranks = torch.tensor([[1.0, 9.0, 4.0, 3.0], [1.0, 9.0, 4.0, 3.0], [1.0, 2.0, 4.0, 3.0]])
    inside = [True, False, True, True]
    tokens, keep_idx = encode_all(encoders, two, 50, ranks)
    assert [t.shape for t in tokens] == [(2, 5, 32), (2, 10, 32), (2, 20, 32), (2, 15, 32)]
    plan = plan_budgets(50, ranks, [64] * 4, inside)
    for each in zip(encoders, two, plan, tokens, keep_idx):
        encoder, x, keep, *mine = each
        assert equal(encode(encoder, x, keep), mine)
    for total in (4, 97, 256):
        tokens, _ = encode_all(encoders, one, total, ranks)
        plan = plan_budgets(total, ranks, [64] * 4, inside)
        assert [t.shape[1] for t in tokens] == [counts[2] for counts in plan]
        assert sum(t.shape[1] for t in tokens) == total
    _, keep_idx = encode_all(encoders, one, None)
    assert [k.tolist() for k in keep_idx] == [[list(range(64))]] * 4
    _, keep_idx = encode_all(encoders, one, (120, 60, 50), ranks, ByAttention)
    keep = plan_budgets((120, 60, 50), ranks, [64] * 4, inside)[0]
    assert torch.equal(keep_idx[0], encode(encoders[0], one[0], keep, ByAttention)[1])
    assert not torch.equal(keep_idx[0], encode(encoders[0], one[0], keep)[1])


@torch.no_grad()
def test_expected_ranks_against_the_librarys_features_one_picture_at_a_time(models):
    names = ["clip", "convnext", "eva registers", "siglip"]
    encoders = [models[name] for name in names]
    blotches = F.interpolate(pictures(5, 3), SIDE)
    large = F.interpolate(blotches, 64, mode="bicubic", antialias=True)
    pixels_of = [large if name == "convnext" else blotches for name in names]
    batches = ([x[a:b] for x in pixels_of] for a, b in ((0, 2), (2, 4), (4, 5)))
    ranks = expected_ranks(encoders, batches)
    assert ranks.shape == (3, 4) and ranks.dtype == torch.float64
    for l, (name, model, x) in enumerate(zip(names, encoders, pixels_of)):
        if name == "convnext":
            features = [model.forward_features(x).flatten(2).mT] * 3
        else:
            found = model.forward_intermediates(
                x, [1, 3, 5], output_fmt="NLC", intermediates_only=True
            )
            features = found["image_intermediates"] if name == "clip" else found
        assert equal(features_at_points(model, x), features)
        for b, tokens in enumerate(features):
            want = [int(torch.linalg.matrix_rank(a.double(), rtol=1e-2)) for a in tokens]
            assert float(ranks[b, l]) == pytest.approx(sum(want) / 5), (name, b)
    assert len(ranks.unique()) > 3, "ranks too equal to test anything"
    assert expected_ranks(encoders, [[x[:2] for x in pixels_of]], points=2).shape == (2, 4)
    with pytest.raises(ValueError, match="batches must hold at least one picture, got none"):
        expected_ranks(encoders, [])


@torch.no_grad()
def test_convnext_is_pruned_at_its_output_by_similarity(models):
    model, x = models["convnext"], pixels("convnext", 3)
    every = model.forward_features(x).flatten(2).mT
    tokens, keep_idx = encode(model, x, (3, 64, 9))
    for b in range(3):
        similarity = mean_similarity(every)[b].tolist()
        assert keep_idx[b].tolist() == sorted(sorted(range(64), key=similarity.__getitem__)[:9])
        assert torch.equal(tokens[b], every[b, keep_idx[b]])
    for K in (0, 65):
        with pytest.raises(ValueError, match=f"keep must end in None or an int, 1 to 64 .* {K}"):
            encode(model, x, (None, None, K))


# ------------------------------------------------------------------- one's own rule, family; errors


@torch.no_grad()
def test_a_rule_of_ones_own_chooses_by_its_score_alone(models):
    class RightColumns(EncoderPruner):
        def score(self, part, tokens, attention):
            B, N, _ = tokens.shape
            assert N == (64, *KEEP)[part] and attention().shape == (B, N)
            return (self.keep_idx % 8).float()

    for name in ("clip", "eva02", "pix2struct"):
        keep_idx = encode(models[name], pixels(name, 2), KEEP, RightColumns)[1]
        assert keep_idx.tolist() == [[6, 7, 15, 23, 31, 39, 47, 55, 63]] * 2


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
    row = Family("blocks", "last", FAMILIES["transformers.ViTModel"].prefix)
    with torch.no_grad():
        want = encode(model.inner, pictures(), KEEP)
        monkeypatch.setitem(FAMILIES, f"{__name__.split('.')[0]}.Mine", row)
        assert find_encoder(model) is model
        assert equal(encode(model, pictures(), KEEP), want)


def test_a_block_whose_attention_cannot_be_heard_is_refused(monkeypatch):
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

        def forward(self, x):
            return self.blocks(x)

    monkeypatch.setitem(
        FAMILIES, f"{__name__.split('.')[0]}.Mixer", Family("blocks", None, no_prefix)
    )
    x = torch.rand(2, 9, 4)
    assert encode(Mixer(), x, (5, None))[0].shape == (2, 5, 4)  # similarity alone needs none
    with pytest.raises(TypeError, match="no attention was heard in a block of Mixer: it must call"):
        encode(Mixer(), x, (5, 3))
    assert nothing_listens()


@pytest.mark.parametrize(
    "keep, message",
    [
        ((20, 30, 10), r"keep\[1\] must be None or an int, 1 to 20 here, got 30"),
        ((65, 30, 10), r"keep\[0\] must be None or an int, 1 to 64 here, got 65"),
        ((30, 20, 0), r"keep\[2\] must be None or an int, 1 to 20 here, got 0"),
        ((None, 20, 30), r"keep\[2\] must be None or an int, 1 to 20 here, got 30"),
        ((), "there must be 1 to 6 pruning points, at most one for each block, got 0"),
        ((9,) * 7, "there must be 1 to 6 pruning points, .* got 7"),
    ],
)
def test_counts_that_do_not_fit_are_refused(models, keep, message):
    with pytest.raises(ValueError, match=message):
        encode(models["clip"], pictures(1), keep)
    assert not hooks_of(models["clip"]) and nothing_listens()


def test_padding_is_refused_and_a_mask_that_hides_nothing_is_not(models):
    """Pix2Struct's own preprocessing pads with zeros; which patches those are differs."""
    model, x = models["pix2struct"], pixels("pix2struct", 2)
    padded = torch.cat([x, torch.zeros(2, 5, x.shape[2])], dim=1)
    with torch.no_grad():
        for keep in ((None, None, None), KEEP):
            with pytest.raises(ValueError, match="must see all its patches, without padding"):
                encode(model, padded, keep)
        want = encode(model, x, KEEP)
        with EncoderPruner(model, KEEP) as pruner:
            model(x, attention_mask=torch.ones(2, 64))
    assert equal((pruner.tokens, pruner.keep_idx), want)


@pytest.mark.parametrize("shown, hidden", [(True, False), (1, 0), (0.0, -math.inf)])
@torch.no_grad()
def test_a_mask_of_any_kind_that_hides_a_token_is_refused(models, shown, hidden):
    model, x = models["hf vit"], pixels("hf vit", 1)

    def with_mask(block, args):
        return args[0], mask

    handle = model.layers[0].register_forward_pre_hook(with_mask)
    try:
        with EncoderPruner(model, KEEP):
            mask = torch.full((1, 1, 65, 65), shown)
            mask[..., 7] = hidden
            with pytest.raises(ValueError, match="without padding or an attention mask"):
                model(x)
            mask = None
            model(x)
    finally:
        handle.remove()


def test_the_pruner_says_that_nothing_ran_through_it(models):
    with pytest.raises(ValueError, match="the encoder did not run inside the block"):
        with EncoderPruner(models["clip"], (9,)):
            pass
    assert not hooks_of(models["clip"])


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", ["clip", "siglip", "eva02", "hf clip", "dinov2", "pix2struct"])
def test_gradient_checkpointing_is_refused_where_it_runs(models, name, train):
    """It runs a block again in the backward pass, when what was pruned there is no longer known.

    open_clip and timm do so in eval mode too; transformers does not.
    """
    model, x = copy.deepcopy(models[name]).train(train), pixels(name, 1)
    if name in OF_HUGGING_FACE:
        enable = getattr(model, "activation_checkpointing_enable", None)  # its name from 5.24 on
        (enable or model.gradient_checkpointing_enable)()
    else:
        model.set_grad_checkpointing(True)
    if train or name not in OF_HUGGING_FACE:
        with pytest.raises(ValueError, match="gradient checkpointing must be off"):
            encode(model, x, KEEP)
    else:
        encode(model, x, KEEP)[0].sum().backward()
    with torch.no_grad():
        encode(model, x, KEEP)  # there it does nothing


def test_patch_dropout_is_refused_in_training():
    model = timm.create_model("test_vit", num_classes=0, patch_drop_rate=0.5)
    x = torch.rand(1, 3, 160, 160)
    with pytest.raises(ValueError, match="patch dropout must be off"):
        encode(model.train(), x, (9,))
    encode(model.eval(), x, (9,))


@torch.no_grad()
def test_attention_with_a_bias_is_refused_in_a_new_family(monkeypatch):
    """It would be scored as if there was none."""
    family = stage1_encode.Family("blocks", "norm", stage1_encode.no_prefix)
    monkeypatch.setitem(stage1_encode.FAMILIES, "timm.VisionTransformerRelPos", family)
    model = timm.create_model("vit_relpos_small_patch16_224", depth=2, num_classes=0).eval()
    with pytest.raises(TypeError, match="attention with a bias of its own is not supported"):
        encode(model, torch.rand(1, 3, 224, 224), (None, 50))


def test_a_rule_that_scores_other_than_each_patch_is_refused(models):
    class OneRow(EncoderPruner):
        def score(self, part, tokens, attention):
            return tokens[:1, :, 0]

    with pytest.raises(ValueError, match=r"score must return a tensor of shape \(2, 64\)"):
        encode(models["clip"], pixels("clip", 2), (9,), OneRow)


@pytest.mark.parametrize(
    "build", [lambda: timm.create_model("test_resnet"), lambda: nn.Linear(2, 2)]
)
def test_models_of_no_family_are_refused(build):
    model = build()
    name = type(model).__name__
    with pytest.raises(
        TypeError, match=f"one of open_clip.Vis.*Pix2Struct.*ConvNeXt, got {name}: "
    ):
        encode(model, pictures(1), KEEP)
    with pytest.raises(TypeError, match=f"got {name}: a ConvNeXt is pruned by encode, for another"):
        EncoderPruner(model, KEEP)


def test_misuse_is_refused_in_a_sentence(models):
    with pytest.raises(TypeError, match="got ConvNeXt: a ConvNeXt is pruned by encode"):
        EncoderPruner(models["convnext"], (9,))
    with pytest.raises(TypeError, match="keep must hold a count for each pruning point.*got 9"):
        EncoderPruner(models["clip"], 9)
    with pytest.raises(ValueError, match="depth must be at most 6, got 7"):
        EncoderPruner(models["clip"], (9,), depth=7)
    with pytest.raises(ValueError, match="pixels must be one tensor for each of the 2 encoders"):
        encode_all([models["clip"]] * 2, [pictures(1)], 50)


def test_the_file_runs_alone(tmp_path, monkeypatch, capsys):
    """Copied into an empty folder, with nothing else of this project in reach."""
    shutil.copy(stage1_encode.__file__, tmp_path)
    here = Path(stage1_encode.__file__).parent
    monkeypatch.chdir(tmp_path)
    elsewhere = [p for p in sys.path if p and Path(p).resolve() not in (here, here / "tests")]
    monkeypatch.setattr(sys, "path", elsewhere)
    for name in [n for n in sys.modules if n.split(".")[0].startswith(("stage", "meteor"))]:
        monkeypatch.delitem(sys.modules, name)
    runpy.run_path("stage1_encode.py", run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].split()[-1] for line in lines] == [
        "open_clip.VisionTransformer",
        "transformers.CLIPVisionModel",
        "timm.Eva",
        "timm.VisionTransformer",
        "timm.ConvNeXt",
    ]
    assert all("144 -> " in line for line in lines)
    assert sum(int(line.split("-> ")[1].split()[0]) for line in lines) == 300
