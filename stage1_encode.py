r"""METEOR stage 1: prune the tokens of C vision encoders while they encode, each to a count set by rank.

Paper: METEOR (ICCV 2025, arXiv 2507.20842), rank-guided collaborative token assignment; supplement A, B.1.
Blocks form three equal parts; tokens are pruned after the last block of each part b = 0, 1, 2:

    R_i   = cos(x_i, 1/N \sum_j x_j)           b = 0: redundancy, likeness to the background; lowest stay
    s_i   = 1/H \sum_h softmax(q_cls^h K^h)_i  b > 0: score, attention from CLS in that block; highest stay
    k_b^l = k_b r_b^l / \sum_m r_b^m           tokens left to encoder l; r_b^l: expected rank of its features

In:   C library models, unmodified; images (B, 3, H, W) in [0, 1]; a total k_2; ranks (3, C).
Out:  per encoder: tokens (B, n_l, D_l) after its final norm; keep_idx (B, n_l): which patches, raster order.
Change here: `RTOL`, `feature_rank` (what rank means), `allocate_budget` (how many stay), `mean_similarity`,
`received_attention` (which stay), `FAMILIES` (another encoder: an `Adapter` and a line).
Not from the paper: rank = singular values above RTOL times the largest; largest remainder, counts of 1 to all
there are; k_0, k_1 fall geometrically unless given; which criterion serves which part; without CLS, the mean
attention from all tokens; a ConvNet, which needs its dense grid, is pruned at its output, by similarity.
"""

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RTOL = 1e-2  # at 1e-3 float features are all but full rank; at 1e-1 ranks vary by a third between pictures
CRITERIA = ("similarity", "attention", "attention")  # of parts 0, 1, 2
STRATEGIES = {
    "rank": lambda r: r,
    "average": lambda r: 1,
    "rank_reverse": lambda r: 1 / r,
}  # of rank r
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def require(condition, message: str, error: type = ValueError) -> None:
    if not condition:
        raise error(message)


def singular_values(tokens: Tensor) -> Tensor:
    """Roots of the eigenvalues of the smaller Gram matrix. (B, N, D) -> (B, min(N, D)) float64, ascending."""
    require(
        tokens.dim() == 3 and tokens.isfinite().all(),
        f"tokens must be finite, of shape (B, N, D), got shape {tuple(tokens.shape)}",
    )
    A = tokens.double()
    gram = A @ A.mT if A.shape[1] <= A.shape[2] else A.mT @ A
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()  # rounding leaves zeros just below 0


def feature_rank(tokens: Tensor, rtol: float = RTOL) -> Tensor:
    """#{j: sigma_j > rtol sigma_max}. (B, N, D) -> (B,) int64.  Source: [paper; our choice of rtol]"""
    require(
        1e-6 <= rtol < 1, f"rtol must be at least 1e-6 and below 1, got {rtol}"
    )  # a Gram matrix's limit
    sigma = singular_values(tokens)
    return (sigma > rtol * sigma[:, -1:]).sum(dim=1)


def nuclear_diversity(tokens: Tensor) -> Tensor:
    """||A||_* / N, rows normalised. (B, N, D) -> (B,) in [0, sqrt(min(N, D) / N)].  Source: [supplement A]"""
    return singular_values(F.normalize(tokens.double(), dim=-1)).sum(dim=1) / tokens.shape[1]


def mean_similarity(tokens: Tensor) -> Tensor:
    r"""R_i = cos(x_i, 1/N \sum_j x_j). (B, N, D) -> redundancy (B, N) float32.  Source: [paper, Finding 1]"""
    x = tokens.float()
    return F.cosine_similarity(x, x.mean(dim=1, keepdim=True), dim=-1)


def received_attention(
    q: Tensor, k: Tensor, scale: float, from_cls: bool, chunk: int = 256
) -> Tensor:
    r"""s_i = 1/H \sum_h softmax(scale q^h K^h)_i; q of token 0 if from_cls, else the mean over all queries.
    q, k (B, H, N, d) -> score (B, N) float32 of row sum 1; by `chunk` queries, to hold no N x N matrix.
    Source: [paper, Finding 2]; without CLS [our choice]
    """
    q, k = (q[:, :, :1] if from_cls else q).float(), k.float()
    with torch.autocast(q.device.type, enabled=False):
        parts = [
            (scale * rows @ k.mT).softmax(-1).mean(dim=1).sum(dim=1)
            for rows in q.split(chunk, dim=2)
        ]
    return sum(parts) / q.shape[2]


def allocate_budget(
    total: int, ranks: Sequence[float], available: Sequence[int], strategy: str = "rank"
) -> list[int]:
    r"""k^l = k r^l / \sum_m r^m in whole tokens, 1 <= k^l <= available[l], their sum exactly `total`.

    A share that meets a bound is held there, and the others divide the rest by the same rule, in fractions;
    then largest remainder, ties to the lower index. `STRATEGIES` may replace r by 1 or by 1 / r.
    Raises: ValueError for a total outside C..sum(available), ranks not C positive numbers, another strategy.
    Source: [paper, Eq. of k_b^l; supplement Table 1]; bounds and rounding [our choice]
    """
    C, ranks = len(available), [float(r) for r in ranks]
    require(strategy in STRATEGIES, f"strategy must be one of {(*STRATEGIES,)}, got {strategy!r}")
    require(
        isinstance(total, int) and C <= total <= sum(available) and min(available) >= 1,
        f"total must be an int from {C}, one each, to all of {[*available]}, got {total}",
    )
    require(
        len(ranks) == C and all(0 < r < math.inf for r in ranks),
        f"ranks must be {C} positive numbers, one for each encoder, got {ranks}",
    )
    # A share is t w, held to 1..available: the sum of all rises with t, in straight lines from bend to bend.
    weights = [Fraction(STRATEGIES[strategy](Fraction(r))) for r in ranks]
    held = lambda t: [min(max(t * w, 1), n) for w, n in zip(weights, available)]
    bends = [bound / w for w, n in zip(weights, available) for bound in (1, n)]
    t = max(bend for bend in bends if sum(held(bend)) <= total)
    slope = sum(w for w, n in zip(weights, available) if 1 <= t * w < n) or 1
    shares = held(t + Fraction(total - sum(held(t))) / slope)
    counts = [math.floor(s) for s in shares]
    for l in sorted(range(C), key=lambda l: counts[l] - shares[l])[
        : total - sum(counts)
    ]:  # a stable sort
        counts[l] += 1
    return counts


def plan_budgets(
    totals: int | Sequence[int] | None,
    ranks: Tensor | Sequence[Sequence[float]] | None,
    available: Sequence[int],
    inside: Sequence[bool],
    strategy: str = "rank",
) -> list[tuple]:
    """Tokens left to each encoder at the points 0, 1, 2: C triples, never rising; the last entries make k_2.
    totals: k_2, or (k_0, k_1, k_2), or None to keep all; ranks: (3, C), or None with "average". Those pruned
    `inside` (C bool) share k_0 and k_1, which fall geometrically to their part of k_2 unless given.
    Raises: ValueError for totals or ranks not as above.  Source: [paper]; k_0, k_1 [our choice]
    """
    C, part = len(available), [l for l, prunable in enumerate(inside) if prunable]
    if totals is None:
        return [(n, n, n) for n in available]
    ranks = [[1.0] * C] * 3 if ranks is None and strategy == "average" else ranks
    require(
        ranks is not None and len(ranks) == 3 and all(len(row) == C for row in ranks),
        f"ranks must be (3, {C}), points by encoders, as expected_ranks gives, got {ranks}",
    )
    require(
        isinstance(totals, int) or len(totals) == 3 and part,
        f"totals must be an int, or 3 where an encoder is pruned inside, got {totals}",
    )
    if isinstance(totals, int):
        last, n = (
            allocate_budget(totals, ranks[2], available, strategy),
            sum(available[l] for l in part),
        )
        fall = sum(last[l] for l in part) / max(n, 1)
        totals = [round(n * fall ** (1 / 3)), round(n * fall ** (2 / 3)), totals]
    left, plan = list(available), []
    for total, row, who in zip(totals, ranks, (part, part, range(C))):
        if who:
            counts = allocate_budget(total, [row[l] for l in who], [left[l] for l in who], strategy)
            left = [dict(zip(who, counts)).get(l, n) for l, n in enumerate(left)]
        plan.append(left)
    return list(zip(*plan))


def encode(
    encoder: nn.Module,
    images: Tensor,
    keep: Sequence[int | None] = (None, None, None),
    part_criteria: Sequence[str] = CRITERIA,
) -> tuple[Tensor, Tensor]:
    """Run an encoder, pruning at the points 0, 1, 2; with nothing pruned, the library's own tokens.

    Args: images (B, 3, H, W) float in [0, 1], any size; keep: tokens left at each point, never rising, None
    for all (inside, a ConvNet keeps all); part_criteria: "similarity" or "attention" for each part.
    Returns: tokens (B, K, D), no CLS; keep_idx (B, K) int64, ascending, ties to the lower index, no gradient.
    Raises: ValueError for arguments not as above or features that are not finite; TypeError: see `adapter`.
    """
    a = adapter(encoder)
    require(
        len(keep) == len(part_criteria) == 3 and {*part_criteria} <= {*CRITERIA},
        "keep and part_criteria ('similarity' or 'attention') must have 3 entries, one a part, "
        f"got {keep} and {part_criteria}",
    )
    x, rope = a.embed(images)  # (B, P + N, D); (B, N, 2 d), or None
    P, keep_idx = a.prefix, torch.arange(a.num_tokens, device=x.device).expand(len(x), -1)  # (B, N)
    for b, (part, K, criterion) in enumerate(zip(a.parts, keep, part_criteria)):
        for i in part:
            x_in, x = x, a.block(i, x, rope)
        require(
            x.sum(dtype=torch.float32).isfinite(),  # one NaN or inf spoils the sum
            f"features of {type(encoder).__name__} must be finite, got NaN or inf",
        )
        N, least = x.shape[1] - P, 1 if a.prunable_inside or b == 2 else a.num_tokens
        require(
            K is None or isinstance(K, int) and least <= K <= N,
            f"keep[{b}] must be None or an int, {least} to {N} here, got {K}",
        )
        if K in (None, N):
            continue
        with torch.no_grad():
            if criterion == "similarity" or not a.prunable_inside:
                score = -mean_similarity(x[:, P:])
            else:  # attention in the block that has just run, from its own q and k
                score = received_attention(*a.attention(i, x_in, rope), a.from_cls)[:, P:]
            stay = (
                score.argsort(dim=1, descending=True, stable=True)[:, :K].sort(dim=1).values
            )  # (B, K)
        rows = torch.arange(len(x), device=x.device)[:, None]
        x = torch.cat([x[:, :P], x[:, P:][rows, stay]], dim=1)  # (B, P + K, D)
        rope = rope if rope is None else rope[rows, stay]
        keep_idx = keep_idx.gather(1, stay)
    return a.norm(x)[:, P:], keep_idx


def encode_all(
    encoders: Sequence[nn.Module],
    images: Tensor,
    total: int | Sequence[int] | None,
    ranks: Tensor | Sequence[Sequence[float]] | None = None,
    strategy: str = "rank",
    part_criteria: Sequence[str] = CRITERIA,
) -> tuple[list[Tensor], list[Tensor]]:
    """`plan_budgets`, then `encode` with each encoder: C x tokens (B, n_l, D_l), C x keep_idx (B, n_l)."""
    adapters = [adapter(e) for e in encoders]
    sizes, inside = [a.num_tokens for a in adapters], [a.prunable_inside for a in adapters]
    plan = plan_budgets(total, ranks, sizes, inside, strategy)
    encoded = [encode(e, images, keep, part_criteria) for e, keep in zip(encoders, plan)]
    return [tokens for tokens, _ in encoded], [keep_idx for _, keep_idx in encoded]


@torch.no_grad()
def expected_ranks(
    encoders: Sequence[nn.Module], batches: Iterable[Tensor], rtol: float = RTOL
) -> Tensor:
    """r_b^l: mean rank over all pictures of the patch tokens at each point, unpruned. -> (3, C) float64.
    Models in eval mode, 64 pictures or more; a ConvNet's three are its output's.  Source: [supplement B.1]
    """
    adapters, pictures = [adapter(e) for e in encoders], 0
    ranks = torch.zeros(3, len(adapters), dtype=torch.float64)
    for images in batches:
        pictures += len(images)
        for l, a in enumerate(adapters):
            x, rope = a.embed(images)
            for b, part in enumerate(a.parts):
                for i in part:
                    x = a.block(i, x, rope)
                ranks[b, l] += feature_rank(x[:, a.prefix :], rtol).sum().item()
    require(pictures, "batches must hold at least one picture, got none")
    return ranks / pictures


class Adapter:
    """What `encode` must know of a family: blocks; norm, the final one; dim D; grid (h, w) of patches; size
    (H, W) of its pictures; prefix P, the tokens before the patches; from_cls: the first is a CLS. Methods:
    patchify(pixels) -> x (B, P + N, D), rotary table (N, 2 d) or None; attention(i, x, rope) -> q, k
    (B, H, P + N, d), scale, as block i computes them from x; q of the CLS alone if from_cls.
    """

    prunable_inside, mode = True, "bicubic"
    kinds = ()  # "block.attention" classes that `attention` is written for

    def __init__(self, model, outer, blocks, norm, dim, grid, size, prefix=0, from_cls=False):
        self.model, self.blocks, self.norm, self.dim, L = model, blocks, norm, dim, len(blocks)
        self.grid, self.num_tokens, self.size = tuple(grid), grid[0] * grid[1], tuple(size)
        self.num_blocks, self.prefix, self.from_cls = L, prefix, from_cls
        self.parts = [
            range(L * b // 3, L * (b + 1) // 3) for b in range(3)
        ]  # of 24: they end at 7, 15, 23
        self.cfg = (
            getattr(outer, "preprocess_cfg", None) or getattr(model, "pretrained_cfg", None) or {}
        )
        found = {block_kind(block) for block in blocks}
        require(
            not self.kinds or found <= {*self.kinds},
            f"blocks of {type(model).__name__} must be {self.kinds}, got {sorted(found)}",
            TypeError,
        )
        require(L >= 3 or not self.prunable_inside, f"encoder must have at least 3 blocks, got {L}")

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Resize, normalise and embed images: x (B, P + N, D) and rope (B, N, 2 d) or None."""
        require(
            images.dim() == 4 and images.shape[1] == 3 and images.is_floating_point(),
            f"images must be float (B, 3, H, W), got {images.dtype} {tuple(images.shape)}",
        )
        require(
            ((images >= 0) & (images <= 1)).all(), "images must be in [0, 1]: divide bytes by 255"
        )
        mean, std = self.statistics(images)
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode=self.mode, antialias=True).clamp(
                0, 1
            )  # overshoot
        dtype = max(
            self.model.parameters(), key=Tensor.dim
        ).dtype  # of a weight, not of a norm or a bias
        x, rope = self.patchify(((images - mean) / std).to(dtype))
        N = x.shape[1] - self.prefix
        require(
            N == self.num_tokens,
            f"encoder must embed {self.num_tokens} patches, got {N}: switch patch dropout off",
        )
        return x, rope if rope is None else rope.expand(len(x), -1, -1)

    def statistics(self, images):
        constants = self.cfg.get("mean", CLIP_MEAN), self.cfg.get("std", CLIP_STD)
        return [images.new_tensor(c).view(3, 1, 1) for c in constants]

    def block(self, i, x, rope):
        # rope gets an axis for the heads: (B, N, 2 d) would be read as (H, N, 2 d)
        out = self.blocks[i](x) if rope is None else self.blocks[i](x, rope=rope[:, None])
        return out[0] if isinstance(out, tuple) else out  # transformers gives a tuple


def block_kind(block: nn.Module) -> str:
    """The class of a block, and of its attention where it has exactly one: "Block.Attention"."""
    if not hasattr(block, "attn"):  # timm's parallel blocks have several
        return type(block).__name__
    return f"{type(block).__name__}.{type(block.attn).__name__}"


def heads(t: Tensor, d: int) -> Tensor:
    return t.unflatten(-1, (-1, d)).transpose(1, 2)  # (B, N, H d) -> (B, H, N, d)


class ClipViT(Adapter):
    """open_clip's VisionTransformer."""

    kinds = ("ResidualAttentionBlock.MultiheadAttention",)

    def __init__(self, v, outer):
        norm = v.ln_post if v.attn_pool is None and not v.final_ln_after_pool else nn.Identity()
        super().__init__(
            v,
            outer,
            v.transformer.resblocks,
            norm,
            v.conv1.out_channels,
            v.grid_size,
            v.image_size,
            prefix=1,
            from_cls=True,
        )

    def patchify(self, pixels):
        return self.model._embeds(pixels), None

    def attention(self, i, x, rope):
        attn, h = self.blocks[i].attn, self.blocks[i].ln_1(x)
        (Wq, Wk, _), (bq, bk, _) = attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
        q, k = F.linear(h[:, :1], Wq, bq), F.linear(h, Wk, bk)
        return heads(q, attn.head_dim), heads(k, attn.head_dim), attn.head_dim**-0.5


class TimmViT(Adapter):
    """timm's VisionTransformer (SigLIP: no CLS) and Eva (EVA-02: rotary positions go with their tokens)."""

    kinds = ("Block.Attention", "EvaBlock.EvaAttention", "EvaBlock.AttentionRope")

    def __init__(self, v, outer):
        require(
            not getattr(v, "rope_mixed", False),
            "Eva must have one rotary table, got 'mixed'",
            TypeError,
        )
        super().__init__(
            v,
            outer,
            v.blocks,
            v.norm,
            v.embed_dim,
            v.patch_embed.grid_size,
            v.patch_embed.img_size,
            v.num_prefix_tokens,
            v.cls_token is not None,
        )

    def patchify(self, pixels):
        v = self.model
        x = v._pos_embed(v.patch_embed(pixels))
        x, rope = x if isinstance(x, tuple) else (v.patch_drop(x), None)
        return v.norm_pre(x), rope

    def attention(self, i, x, rope):
        attn, h, P = self.blocks[i].attn, self.blocks[i].norm1(x), self.prefix
        asks = h[:, :1] if self.from_cls else h
        if attn.qkv:
            bias = [None] * 3 if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
            q, k = (F.linear(y, W, b) for y, W, b in zip((asks, h), attn.qkv.weight.chunk(3), bias))
        else:
            q, k = attn.q_proj(asks), attn.k_proj(h)
        q = q if getattr(attn, "q_bias", None) is None else q + attn.q_bias  # k has none
        q, k = attn.q_norm(heads(q, attn.head_dim)), attn.k_norm(heads(k, attn.head_dim))
        if rope is not None:
            from timm.layers import apply_rot_embed_cat

            turn = lambda t: torch.cat(
                [
                    t[:, :, :P],
                    apply_rot_embed_cat(t[:, :, P:], rope[:, None], half=attn.rotate_half),
                ],
                dim=2,
            )
            q, k = q if self.from_cls else turn(q), turn(k)
        return q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1), attn.scale


class ConvNeXt(Adapter):
    """timm's ConvNeXt: a dense map, no blocks to stop at."""

    prunable_inside = False

    def __init__(self, v, outer):
        size = getattr(outer, "image_size", None) or getattr(v, "pretrained_cfg", {}).get(
            "input_size"
        )
        require(
            size, "ConvNeXt must tell its input: set pretrained_cfg = {'input_size': (3, H, W)}"
        )
        grid = [s // v.feature_info[-1]["reduction"] for s in size[-2:]]
        super().__init__(v, outer, (), nn.Identity(), v.num_features, grid, size[-2:])

    def patchify(self, pixels):
        return self.model.forward_features(pixels).flatten(
            2
        ).mT, None  # (B, D, h, w) -> (B, h w, D)


class Pix2Struct(Adapter):
    """transformers' Pix2StructVisionModel: config.meteor_grid = (h, w) patches, or the largest square."""

    mode = "bilinear"

    def __init__(self, v, outer):
        c, p, side = (
            v.config,
            math.isqrt(v.config.patch_embed_hidden_size // 3),
            math.isqrt(v.config.seq_len),
        )
        self.p, grid = p, getattr(c, "meteor_grid", (side, side))
        super().__init__(
            v, outer, v.encoder.layer, v.layernorm, c.hidden_size, grid, [s * p for s in grid]
        )

    def statistics(self, images):  # each picture's own
        std = images.flatten(1).std(dim=1).clamp(min=images[0].numel() ** -0.5)
        return images.mean(dim=(1, 2, 3), keepdim=True), std.view(-1, 1, 1, 1)

    def patchify(
        self, pixels
    ):  # a patch: its row and column, from 1, then its pixels, channels last
        cells = torch.cartesian_prod(*(torch.arange(1, s + 1) for s in self.grid)).to(
            pixels
        )  # (N, 2)
        patches = (
            F.unfold(pixels, self.p, stride=self.p)
            .unflatten(1, (3, -1))
            .permute(0, 3, 2, 1)
            .flatten(2)
        )
        return self.model.embeddings(
            torch.cat([cells.expand(len(pixels), -1, -1), patches], dim=-1)
        ), None

    def attention(self, i, x, rope):
        attn, h = self.blocks[i].attention, self.blocks[i].pre_attention_layer_norm(x)
        q, k = (heads(project(h), attn.key_value_proj_dim) for project in (attn.query, attn.key))
        return q, k, attn.scaling


class Dinov2(Adapter):
    """transformers' Dinov2Model: config.meteor_grid = (h, w) patches, or those of config.image_size."""

    def __init__(self, v, outer):
        c, embed = v.config, v.embeddings.patch_embeddings
        grid = getattr(
            c, "meteor_grid", [s // p for s, p in zip(embed.image_size, embed.patch_size)]
        )
        size = [n * p for n, p in zip(grid, embed.patch_size)]
        super().__init__(v, outer, v.encoder.layer, v.layernorm, c.hidden_size, grid, size, 1, True)
        self.cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # ImageNet's

    def patchify(self, pixels):
        return self.model.embeddings(pixels), None

    def attention(self, i, x, rope):
        attn, h = self.blocks[i].attention, self.blocks[i].norm1(x)
        return (
            heads(attn.q_proj(h[:, :1]), attn.head_dim),
            heads(attn.k_proj(h), attn.head_dim),
            attn.scaling,
        )


FAMILIES = {  # by name: only the libraries of your encoders are needed
    "open_clip.transformer.VisionTransformer": ClipViT,
    "timm.models.vision_transformer.VisionTransformer": TimmViT,
    "timm.models.eva.Eva": TimmViT,
    "timm.models.convnext.ConvNeXt": ConvNeXt,
    "transformers.models.pix2struct.modeling_pix2struct.Pix2StructVisionModel": Pix2Struct,
    "transformers.models.dinov2.modeling_dinov2.Dinov2Model": Dinov2,
}


def adapter(encoder: nn.Module) -> Adapter:
    """For a model of `FAMILIES`, or an open_clip or Pix2Struct model around it; TypeError for any other."""
    visual = getattr(encoder, "visual", encoder)
    for model in (getattr(encoder, "encoder", None), getattr(visual, "trunk", None), visual):
        for cls in type(model).__mro__:
            if (name := f"{cls.__module__}.{cls.__qualname__}") in FAMILIES:
                return FAMILIES[name](model, visual)
    raise TypeError(
        f"encoder must be or hold one of {', '.join(FAMILIES)}, got {type(model).__name__}: for "
        "another, list an Adapter that embeds, runs a block and gives its q and k"
    )


def main() -> None:
    """What the libraries' own models, with random weights, keep of 300 tokens, by strategy."""
    import timm
    from open_clip.transformer import VisionTransformer
    from transformers import Pix2StructVisionConfig, Pix2StructVisionModel

    torch.manual_seed(0)
    config = Pix2StructVisionConfig(num_hidden_layers=3, seq_len=144, initializer_range=0.02)
    encoders = [
        VisionTransformer(96, 8, 96, 3, 6, 2.0),
        Pix2StructVisionModel(config),
        timm.create_model("eva02_tiny_patch14_224", img_size=168),
        timm.create_model("vit_base_patch16_siglip_224", img_size=192, depth=3),
        timm.create_model("convnext_atto", pretrained_cfg_overlay={"input_size": (3, 384, 384)}),
    ]
    images = F.interpolate(torch.rand(4, 3, 7, 7), 80)
    ranks = expected_ranks([e.eval() for e in encoders], [images])
    for encoder, r in zip(encoders, ranks.T.tolist()):
        print(
            f"{type(encoder).__name__:>21}: {adapter(encoder).num_tokens} tokens, expected ranks {r}"
        )
    for strategy in STRATEGIES:
        tokens, _ = encode_all(encoders, images, 300, ranks, strategy)
        print(f"{strategy:>21}: {[x.shape[1] for x in tokens]}")


if __name__ == "__main__":
    main()
