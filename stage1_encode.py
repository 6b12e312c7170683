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

Needs torch and your encoders' libraries. `python stage1_encode.py` runs five families with random weights.
"""
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RTOL = 1e-2  # at 1e-3 float features are all but full rank; at 1e-1 ranks vary by a third between pictures
CRITERIA = ("similarity", "attention", "attention")  # of parts 0, 1, 2
STRATEGIES = ("rank", "average", "rank_reverse")
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def singular_values(tokens: Tensor) -> Tensor:
    """Roots of the eigenvalues of the smaller Gram matrix. (B, N, D) -> (B, min(N, D)) float64, ascending."""
    if tokens.dim() != 3 or not tokens.isfinite().all():
        raise ValueError(f"tokens must be finite, of shape (B, N, D), got shape {tuple(tokens.shape)}")
    A = tokens.double()
    gram = A @ A.mT if A.shape[1] <= A.shape[2] else A.mT @ A
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()  # rounding leaves zeros just below 0


def feature_rank(tokens: Tensor, rtol: float = RTOL) -> Tensor:
    """#{j: sigma_j > rtol sigma_max}. (B, N, D) -> (B,) int64.  Source: [paper; our choice of rtol]"""
    if not 1e-6 <= rtol < 1:  # the Gram matrix resolves sigma / sigma_max no finer
        raise ValueError(f"rtol must be at least 1e-6 and below 1, got {rtol}")
    sigma = singular_values(tokens)
    return (sigma > rtol * sigma[:, -1:]).sum(dim=1)


def nuclear_diversity(tokens: Tensor) -> Tensor:
    """||A||_* / N, rows normalised. (B, N, D) -> (B,) in [0, sqrt(min(N, D) / N)].  Source: [supplement A]"""
    return singular_values(F.normalize(tokens.double(), dim=-1)).sum(dim=1) / tokens.shape[1]


def mean_similarity(tokens: Tensor) -> Tensor:
    r"""R_i = cos(x_i, 1/N \sum_j x_j). (B, N, D) -> redundancy (B, N) float32.  Source: [paper, Finding 1]"""
    x = tokens.float()
    return F.cosine_similarity(x, x.mean(dim=1, keepdim=True), dim=-1)


def received_attention(q: Tensor, k: Tensor, scale: float, from_cls: bool, chunk: int = 256) -> Tensor:
    r"""s_i = 1/H \sum_h softmax(scale q^h K^h)_i; q of token 0 if from_cls, else the mean over all queries.

    Args: q, k (B, H, N, d) float; chunk: queries at a time, so that no N x N matrix is held.
    Returns: score (B, N) float32, each row sums to 1.  Source: [paper, Finding 2]; without CLS [our choice]
    """
    q, k = (q[:, :, :1] if from_cls else q).float(), k.float()
    with torch.autocast(q.device.type, enabled=False):
        parts = [(scale * rows @ k.mT).softmax(-1).mean(dim=1).sum(dim=1) for rows in q.split(chunk, dim=2)]
    return sum(parts) / q.shape[2]


def allocate_budget(total: int, ranks: Sequence[float], available: Sequence[int],
                    strategy: str = "rank") -> list[int]:
    r"""k^l = k r^l / \sum_m r^m in whole tokens, 1 <= k^l <= available[l], their sum exactly `total`.

    A share that meets a bound is held there, and the others divide the rest by the same rule; then largest
    remainder, ties to the lower index. In exact fractions: no rounding decides.

    Args: ranks: C positive numbers; strategy: "average" ignores them, "rank_reverse" takes 1 / rank.
    Raises: ValueError for a total outside C..sum(available), for ranks or a strategy not as above.
    Source: [paper, Eq. of k_b^l; supplement Table 1]; bounds and rounding [our choice]
    """
    C, ranks = len(available), [float(r) for r in ranks]
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")
    if not isinstance(total, int) or not C <= total <= sum(available) or min(available) < 1:
        raise ValueError(f"total must be an int from {C}, one each, to all of {[*available]}, got {total}")
    if len(ranks) != C or not all(0 < r < math.inf for r in ranks):
        raise ValueError(f"ranks must be {C} positive numbers, one for each encoder, got {ranks}")
    # A share is t w, held to 1..available: the sum of all rises with t, in straight lines from bend to bend.
    weights = [{"rank": Fraction(r), "average": 1, "rank_reverse": 1 / Fraction(r)}[strategy] for r in ranks]
    held = lambda t: [min(max(t * w, 1), n) for w, n in zip(weights, available)]
    bends = [Fraction(bound) / w for w, n in zip(weights, available) for bound in (1, n)]
    t = max(bend for bend in bends if sum(held(bend)) <= total)
    slope = [w if 1 <= t * w < n else 0 for w, n in zip(weights, available)]
    shares = [s + (total - sum(held(t))) * w / (sum(slope) or 1) for s, w in zip(held(t), slope)]
    counts = [math.floor(s) for s in shares]
    for l in sorted(range(C), key=lambda l: counts[l] - shares[l])[: total - sum(counts)]:  # a stable sort
        counts[l] += 1
    return counts


def plan_budgets(totals: int | Sequence[int] | None, ranks: Tensor | Sequence[Sequence[float]] | None,
                 available: Sequence[int], inside: Sequence[bool], strategy: str = "rank") -> list[tuple]:
    """Tokens left to each encoder at the points 0, 1, 2; what is left at one point bounds the next.

    Args:
        totals: k_2, or (k_0, k_1, k_2), or None to keep all. Encoders pruned inside share k_0 and k_1, which
            fall geometrically to their part of k_2 unless given.
        ranks: (3, C), or None with "average"; inside: C bool, `Adapter.prunable_inside`.
    Returns: C triples; the last entries sum to k_2.
    Raises: ValueError for totals or ranks not as above.  Source: [paper]; k_0, k_1 [our choice]
    """
    C, part = len(available), [l for l, prunable in enumerate(inside) if prunable]
    if totals is None:
        return [(n, n, n) for n in available]
    ranks = [[1.0] * C] * 3 if ranks is None and strategy == "average" else ranks
    if ranks is None or len(ranks) != 3 or any(len(row) != C for row in ranks):
        raise ValueError(f"ranks must be (3, {C}), points by encoders, as expected_ranks gives, got {ranks}")
    if isinstance(totals, int):
        last, n = allocate_budget(totals, ranks[2], available, strategy), sum(available[l] for l in part)
        fall = sum(last[l] for l in part) / max(n, 1)
        totals = [round(n * fall ** (1 / 3)), round(n * fall ** (2 / 3)), totals]
    elif len(totals) != 3 or not part:
        raise ValueError(f"totals must be an int, or 3 where an encoder is pruned inside, got {totals}")
    left, plan = list(available), []
    for total, row, who in zip(totals, ranks, (part, part, range(C))):
        if who:
            counts = allocate_budget(total, [row[l] for l in who], [left[l] for l in who], strategy)
            left = [dict(zip(who, counts)).get(l, n) for l, n in enumerate(left)]
        plan.append(left)
    return list(zip(*plan))


def encode(encoder: nn.Module, images: Tensor, keep: Sequence[int | None] = (None, None, None),
           part_criteria: Sequence[str] = CRITERIA) -> tuple[Tensor, Tensor]:
    """Run an encoder, pruning at the points 0, 1, 2; with nothing pruned, the library's own tokens.

    Args:
        encoder: see `adapter`; images (B, 3, H, W) float in [0, 1], of any size.
        keep: tokens left at each point, never rising; None: those there are. A ConvNet keeps all to the end.
        part_criteria: "similarity" or "attention" for each part.
    Returns: tokens (B, K, D), no CLS; keep_idx (B, K) int64, ascending. The choice carries no gradient.
    Raises: ValueError for images, keep, part_criteria not as above or features that are not finite.
    """
    a = adapter(encoder)
    counts = a.check(keep, part_criteria)
    x, rope = a.embed(images)  # (B, P + N, D); (B, N, 2 d), or None
    P, keep_idx = a.prefix, torch.arange(a.num_tokens, device=x.device).expand(len(x), -1)  # (B, N)
    for part, K, criterion in zip(a.parts, counts, part_criteria):
        for i in part:
            x_in, x = x, a.block(i, x, rope)
        if not x.isfinite().all():
            raise ValueError(f"features of {type(encoder).__name__} must be finite, but hold NaN or infinity")
        if K == keep_idx.shape[1]:
            continue
        with torch.no_grad():
            if criterion == "similarity" or not a.prunable_inside:
                score = -mean_similarity(x[:, P:])
            else:  # attention in the block that has just run, from its own q and k
                score = received_attention(*a.attention(i, x_in, rope), a.from_cls)[:, P:]
            order = score.argsort(dim=1, descending=True, stable=True)  # ties: lower index first
            stay = order[:, :K].sort(dim=1).values  # (B, K)
        x = torch.cat([x[:, :P], take(x[:, P:], stay)], dim=1)  # (B, P + K, D)
        rope, keep_idx = rope if rope is None else take(rope, stay), keep_idx.gather(1, stay)
    return a.norm(x)[:, P:], keep_idx


def take(t: Tensor, stay: Tensor) -> Tensor:
    return t.gather(1, stay[..., None].expand(-1, -1, t.shape[-1]))  # (B, N, D), (B, K) -> (B, K, D)


def encode_all(encoders: Sequence[nn.Module], images: Tensor, total: int | Sequence[int] | None,
               ranks: Tensor | Sequence[Sequence[float]] | None = None, strategy: str = "rank",
               part_criteria: Sequence[str] = CRITERIA) -> tuple[list[Tensor], list[Tensor]]:
    """`plan_budgets`, then `encode` with each encoder: C x tokens (B, n_l, D_l), C x keep_idx (B, n_l)."""
    adapters = [adapter(e) for e in encoders]
    sizes, inside = [a.num_tokens for a in adapters], [a.prunable_inside for a in adapters]
    plan = plan_budgets(total, ranks, sizes, inside, strategy)
    encoded = [encode(e, images, keep, part_criteria) for e, keep in zip(encoders, plan)]
    return [tokens for tokens, _ in encoded], [keep_idx for _, keep_idx in encoded]


@torch.no_grad()
def expected_ranks(encoders: Sequence[nn.Module], batches: Iterable[Tensor], rtol: float = RTOL) -> Tensor:
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
                ranks[b, l] += feature_rank(x[:, a.prefix:], rtol).sum().item()
    if not pictures:
        raise ValueError("batches must hold at least one picture, got none")
    return ranks / pictures


class Adapter:
    """What the walk must know of a family of models; the four below show how little that is.

    Attributes: blocks; norm, the final one; dim D; grid (h, w) of patches; size (H, W) of its pictures;
    prefix P, how many tokens precede the patches; from_cls: the first is a CLS. Methods: patchify(pixels) ->
    x (B, P + N, D), rotary table (N, 2 d) or None; block(i, x, rope) -> x; attention(i, x, rope) -> q, k (B,
    H, P + N, d), scale.
    """

    prunable_inside, mode = True, "bicubic"
    kinds = ()  # "block.attention" classes that `attention` is written for

    def __init__(self, model, outer, blocks, norm, dim, grid, size, prefix=0, from_cls=False):
        self.model, self.blocks, self.norm, self.dim, L = model, blocks, norm, dim, len(blocks)
        self.grid, self.num_tokens, self.size = tuple(grid), grid[0] * grid[1], tuple(size)
        self.num_blocks, self.prefix, self.from_cls = L, prefix, from_cls
        self.parts = [range(L * b // 3, L * (b + 1) // 3) for b in range(3)]  # of 24: they end at 7, 15, 23
        self.cfg = getattr(outer, "preprocess_cfg", None) or getattr(model, "pretrained_cfg", None) or {}
        found = {f"{type(b).__name__}.{type(b.attn).__name__}" for b in blocks if self.kinds}
        if not found <= {*self.kinds}:
            raise TypeError(f"blocks of {type(model).__name__} must be {self.kinds}, got {sorted(found)}")
        if self.prunable_inside and L < 3:
            raise ValueError(f"encoder must have at least 3 blocks, one for each part, got {L}")

    def check(self, keep, part_criteria) -> list[int]:
        """keep, with None replaced by the count there is."""
        if len(keep) != 3 or len(part_criteria) != 3 or not set(part_criteria) <= set(CRITERIA):
            raise ValueError("keep and part_criteria ('similarity' or 'attention') must have 3 entries, one "
                             f"a part, got {keep} and {part_criteria}")
        counts, inside = [self.num_tokens], 1 if self.prunable_inside else self.num_tokens
        for b, (K, least) in enumerate(zip(keep, (inside, inside, 1))):
            counts.append(counts[-1] if K is None else K)
            if not isinstance(counts[-1], int) or not least <= counts[-1] <= counts[-2]:
                raise ValueError(f"keep[{b}] must be None or an int, {least} to {counts[-2]} here, got {K}")
        return counts[1:]

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Resize, normalise and embed images: x (B, P + N, D) and rope (B, N, 2 d) or None."""
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be float (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        if not ((images >= 0) & (images <= 1)).all():  # NaN is neither
            raise ValueError("images must be in [0, 1]: divide bytes by 255; encode normalises by itself")
        mean, std = self.statistics(images)
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode=self.mode, antialias=True).clamp(0, 1)  # overshoot
        dtype = max(self.model.parameters(), key=Tensor.dim).dtype  # of a weight, not of a norm or a bias
        x, rope = self.patchify(((images - mean) / std).to(dtype))
        if x.shape[1] != self.prefix + self.num_tokens:
            raise ValueError(f"encoder must embed {self.num_tokens} patches, got {x.shape[1] - self.prefix}: "
                             "switch patch dropout off")
        return x, rope if rope is None else rope.expand(len(x), -1, -1)

    def statistics(self, images):
        constants = self.cfg.get("mean", CLIP_MEAN), self.cfg.get("std", CLIP_STD)
        return [images.new_tensor(c).view(3, 1, 1) for c in constants]

    def block(self, i, x, rope):
        return self.blocks[i](x)


def heads(t: Tensor, d: int) -> Tensor:
    return t.unflatten(-1, (-1, d)).transpose(1, 2)  # (B, N, H d) -> (B, H, N, d)


class ClipViT(Adapter):
    """open_clip's VisionTransformer."""

    kinds = ("ResidualAttentionBlock.MultiheadAttention",)

    def __init__(self, v, outer):
        norm = v.ln_post if v.attn_pool is None and not v.final_ln_after_pool else nn.Identity()
        super().__init__(v, outer, v.transformer.resblocks, norm, v.conv1.out_channels, v.grid_size,
                         v.image_size, prefix=1, from_cls=True)

    def patchify(self, pixels):
        return self.model._embeds(pixels), None

    def attention(self, i, x, rope):
        attn, h = self.blocks[i].attn, self.blocks[i].ln_1(x)
        q, k, _ = F.linear(h, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
        return heads(q, attn.head_dim), heads(k, attn.head_dim), attn.head_dim**-0.5


class TimmViT(Adapter):
    """timm's VisionTransformer (SigLIP: no CLS) and Eva (EVA-02: rotary positions go with their tokens)."""

    kinds = ("Block.Attention", "EvaBlock.EvaAttention", "EvaBlock.AttentionRope")

    def __init__(self, v, outer):
        if getattr(v, "rope_mixed", False):
            raise TypeError("Eva must share one rotary table between blocks and heads, got rope_type 'mixed'")
        super().__init__(v, outer, v.blocks, v.norm, v.embed_dim, v.patch_embed.grid_size,
                         v.patch_embed.img_size, v.num_prefix_tokens, v.cls_token is not None)

    def patchify(self, pixels):
        v = self.model
        x = v._pos_embed(v.patch_embed(pixels))
        x, rope = x if isinstance(x, tuple) else (v.patch_drop(x), None)
        return v.norm_pre(x), rope

    def block(self, i, x, rope):  # with an axis for the heads: (B, N, 2 d) would be read as (H, N, 2 d)
        return self.blocks[i](x) if rope is None else self.blocks[i](x, rope=rope.unsqueeze(1))

    def attention(self, i, x, rope):
        attn, h, P = self.blocks[i].attn, self.blocks[i].norm1(x), self.prefix
        split = getattr(attn, "q_proj", None) is not None
        q, k = (attn.q_proj(h), attn.k_proj(h)) if split else attn.qkv(h).chunk(3, dim=-1)[:2]
        q = q if getattr(attn, "q_bias", None) is None else q + attn.q_bias  # k has none
        q, k = attn.q_norm(heads(q, attn.head_dim)), attn.k_norm(heads(k, attn.head_dim))
        if rope is not None:
            from timm.layers import apply_rot_embed_cat
            turn = lambda t: apply_rot_embed_cat(t[:, :, P:], rope.unsqueeze(1), half=attn.rotate_half)
            q, k = (torch.cat([t[:, :, :P], turn(t)], dim=2) for t in (q, k))
        return q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1), attn.scale


class ConvNeXt(Adapter):
    """timm's ConvNeXt: a dense map, no blocks to stop at."""

    prunable_inside = False

    def __init__(self, v, outer):
        size = getattr(outer, "image_size", None) or getattr(v, "pretrained_cfg", {}).get("input_size")
        if size is None:
            raise ValueError("ConvNeXt must tell its input: set pretrained_cfg = {'input_size': (3, H, W)}")
        grid = [s // v.feature_info[-1]["reduction"] for s in size[-2:]]
        super().__init__(v, outer, (), nn.Identity(), v.num_features, grid, size[-2:])

    def patchify(self, pixels):
        return self.model.forward_features(pixels).flatten(2).mT, None  # (B, D, h, w) -> (B, h w, D)


class Pix2Struct(Adapter):
    """transformers' Pix2StructVisionModel: config.meteor_grid = (h, w) patches, or the largest square."""

    mode = "bilinear"

    def __init__(self, v, outer):
        c, side = v.config, math.isqrt(v.config.seq_len)
        self.p, grid = math.isqrt(c.patch_embed_hidden_size // 3), getattr(c, "meteor_grid", (side, side))
        size = [s * self.p for s in grid]
        super().__init__(v, outer, v.encoder.layer, v.layernorm, c.hidden_size, grid, size)

    def statistics(self, images):  # each picture's own
        std = images.flatten(1).std(dim=1).clamp(min=images[0].numel() ** -0.5)
        return images.mean(dim=(1, 2, 3), keepdim=True), std.view(-1, 1, 1, 1)

    def patchify(self, pixels):
        (h, w), p = self.grid, self.p
        patches = pixels.reshape(-1, 3, h, p, w, p).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        ids = torch.cartesian_prod(torch.arange(1, h + 1), torch.arange(1, w + 1)).to(pixels)  # row, column
        return self.model.embeddings(torch.cat([ids.expand(len(pixels), -1, -1), patches], dim=-1)), None

    def block(self, i, x, rope):
        return self.blocks[i](x)[0]

    def attention(self, i, x, rope):
        attn, h = self.blocks[i].attention, self.blocks[i].pre_attention_layer_norm(x)
        q, k = (heads(project(h), attn.key_value_proj_dim) for project in (attn.query, attn.key))
        return q, k, attn.scaling


FAMILIES = {  # by name: only the libraries of your encoders are needed
    "open_clip.transformer.VisionTransformer": ClipViT,
    "timm.models.vision_transformer.VisionTransformer": TimmViT,
    "timm.models.eva.Eva": TimmViT,
    "timm.models.convnext.ConvNeXt": ConvNeXt,
    "transformers.models.pix2struct.modeling_pix2struct.Pix2StructVisionModel": Pix2Struct,
}


def adapter(encoder: nn.Module) -> Adapter:
    """For a model of `FAMILIES`, an open_clip model or its `visual`, a Pix2StructForConditionalGeneration.

    Raises: TypeError for any other, or for blocks that its adapter is not written for.
    """
    visual = getattr(encoder, "visual", encoder)
    for model in (getattr(encoder, "encoder", None), getattr(visual, "trunk", None), visual):
        for cls in type(model).__mro__:
            if (name := f"{cls.__module__}.{cls.__qualname__}") in FAMILIES:
                return FAMILIES[name](model, visual)
    raise TypeError(f"encoder must be or hold one of {', '.join(FAMILIES)}, got {type(model).__name__}: for "
                    "another, list an Adapter that embeds, runs a block and gives its q and k")


def main() -> None:
    """Real library classes, small, with random weights: what each keeps of 300 tokens, by strategy."""
    import timm.models as timm
    from open_clip.transformer import VisionTransformer
    from transformers import Pix2StructVisionConfig, Pix2StructVisionModel
    torch.manual_seed(0)
    vit = dict(img_size=96, patch_size=8, embed_dim=96, depth=6, num_heads=6)
    p2s = Pix2StructVisionConfig(hidden_size=96, num_hidden_layers=6, num_attention_heads=6, d_kv=16, d_ff=96,
                                 patch_embed_hidden_size=192, seq_len=144, initializer_range=0.02)
    models = {"CLIP": VisionTransformer(96, 8, 96, 6, 6, 3.0), "Pix2Struct": Pix2StructVisionModel(p2s),
              "EVA-02": timm.Eva(use_rot_pos_emb=True, **vit),
              "SigLIP": timm.VisionTransformer(class_token=False, global_pool="map", **vit),
              "ConvNeXt": timm.ConvNeXt(depths=(1, 1, 2, 1), dims=(16, 32, 64, 64), output_stride=8)}
    models["ConvNeXt"].pretrained_cfg = {"input_size": (3, 96, 96)}
    encoders, images = [m.eval() for m in models.values()], F.interpolate(torch.rand(4, 3, 7, 7), 80)
    ranks = expected_ranks(encoders, [images])
    for name, encoder, r in zip(models, encoders, ranks.T.tolist()):
        print(f"{name:>12}: {adapter(encoder).num_tokens} tokens, expected ranks {r}")
    for strategy in STRATEGIES:
        tokens, _ = encode_all(encoders, images, 300, ranks, strategy)
        print(f"{strategy:>12}: " + ", ".join(f"{name} {t.shape[1]}" for name, t in zip(models, tokens)))


if __name__ == "__main__":
    main()
