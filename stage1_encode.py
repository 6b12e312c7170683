r"""METEOR stage 1: prune the tokens of C vision encoders while they encode, each in proportion to its feature rank.

Paper: METEOR (ICCV 2025, https://arxiv.org/abs/2507.20842), rank-guided collaborative token assignment; appendix A.
An encoder's blocks form three equal parts; tokens are pruned after the last block of each: points b = 0, 1, 2.

    R_i   = cos(x_i, mean_j x_j)                 redundancy in the shallow part: likeness to the background; lowest stay
    s_i   = 1/H \sum_h softmax(q_cls k^T)_{h,i}  score in the deeper parts: attention from CLS; highest stay
    k_b^l = k_b r_b^l / \sum_m r_b^m             tokens for encoder l, with r_b^l its expected feature rank at point b

In:   C library models, unmodified; images (B, 3, H, W) in [0, 1]; a total k_2; ranks (3, C) from `expected_ranks`.
Out:  per encoder, tokens (B, n_l, D_l) after its final norm, and keep_idx (B, n_l): which patches, ascending raster.

Change here: `RTOL` and `feature_rank` (the measure of rank), `allocate_budget` (who gets how many),
`mean_similarity` and `received_attention` (which tokens stay), `FAMILIES` (add an encoder: one `Adapter`).

Not from the paper: rank = singular values above RTOL times the largest; counts by largest remainder, each 1 to what the
encoder has; totals at points 0 and 1 fall geometrically unless given; part 1 by similarity, parts 2 and 3 by attention;
without a CLS, the mean attention from all tokens; a ConvNet is pruned at its output only, by similarity.

Needs torch, and the libraries of your encoders. `python stage1_encode.py` runs it on five families, random weights.
"""
import math
from collections.abc import Iterable
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import nn

RTOL = 1e-2  # a singular value counts towards the rank when it exceeds RTOL times the largest
CRITERIA = ("similarity", "attention", "attention")  # of parts 0, 1, 2
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


# ---------------------------------------------------------------- what an encoder's features hold

def singular_values(tokens: torch.Tensor) -> torch.Tensor:
    """(B, N, D) -> (B, min(N, D)) float64, ascending: roots of the eigenvalues of the smaller Gram matrix."""
    A = tokens.double()
    gram = A @ A.mT if A.shape[1] <= A.shape[2] else A.mT @ A
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()  # rounding can leave an eigenvalue just below 0


def feature_rank(tokens: torch.Tensor, rtol: float = RTOL) -> torch.Tensor:
    """Rank of each token matrix [N, D]: singular values above rtol * sigma_max. (B, N, D) -> (B,) int64."""
    sigma = singular_values(tokens)
    return (sigma > rtol * sigma[:, -1:]).sum(dim=1)


def nuclear_diversity(tokens: torch.Tensor) -> torch.Tensor:
    """||A||_* / N of the row-normalised tokens A. (B, N, D) -> (B,) float64 in [0, sqrt(min(N, D) / N)]."""
    return singular_values(F.normalize(tokens.double(), dim=-1)).sum(dim=1) / tokens.shape[1]


# ---------------------------------------------------------------- which tokens stay

def mean_similarity(tokens: torch.Tensor) -> torch.Tensor:
    """Redundancy R_i = cos(x_i, mean_j x_j). (B, N, D) -> (B, N) float32 in [-1, 1]; higher is dropped."""
    x = tokens.float()
    return F.cosine_similarity(x, x.mean(dim=1, keepdim=True), dim=-1)


def received_attention(q: torch.Tensor, k: torch.Tensor, scale: float, from_cls: bool, chunk: int = 256) -> torch.Tensor:
    """Score: attention that each token receives, from token 0 (CLS) or as a mean over all tokens; mean over heads."""
    q = q[:, :, :1] if from_cls else q  # (B, H, Q, d)
    score = 0
    with torch.autocast(q.device.type, enabled=False):
        for rows in q.float().split(chunk, dim=2):  # never more than chunk x N attention weights at a time
            score = score + (rows @ k.float().mT * scale).softmax(dim=-1).mean(dim=1).sum(dim=1)
    return score / q.shape[2]  # (B, N)


def highest(score: torch.Tensor, K: int) -> torch.Tensor:
    """Positions of the K highest of each row, ascending; ties go to the lower index. (B, N) -> (B, K) int64."""
    return score.argsort(dim=1, descending=True, stable=True)[:, :K].sort(dim=1).values


# ---------------------------------------------------------------- how many tokens each encoder keeps

def allocate_budget(total: int, ranks, available: list[int], strategy: str = "rank") -> list[int]:
    if strategy not in ("rank", "average", "rank_reverse"):
        raise ValueError(f"strategy must be 'rank', 'average' or 'rank_reverse', got {strategy!r}")
    C = len(available)
    if not C <= total <= sum(available):
        raise ValueError(f"total must be {C} to {sum(available)}, one to all tokens of {C} encoders, got {total}")
    ranks = [1.0] * C if strategy == "average" else [float(r) for r in ranks]
    if len(ranks) != C or not all(0 < r < math.inf for r in ranks):
        raise ValueError(f"ranks must be {C} positive numbers, one for each encoder, got {ranks}")
    weights = [1 / Fraction(r) if strategy == "rank_reverse" else Fraction(r) for r in ranks]
    fill = lambda t: [min(max(t * w, 1), a) for w, a in zip(weights, available)]
    t = max(t for t in (n / w for w, a in zip(weights, available) for n in (1, a)) if sum(fill(t)) <= total)
    free = [w if 1 <= t * w < a else 0 for w, a in zip(weights, available)]
    share = [s + (total - sum(fill(t))) * w / (sum(free) or 1) for s, w in zip(fill(t), free)]
    counts = [math.floor(s) for s in share]
    by_remainder = sorted(range(C), key=lambda l: (counts[l] - share[l], l))
    for l in by_remainder[: total - sum(counts)]:
        counts[l] += 1
    return counts


def plan_budgets(totals, ranks, available: list[int], inside: list[bool], strategy: str = "rank"):
    C = len(available)
    if totals is None:
        return [(n, n, n) for n in available]
    ranks = [None] * 3 if ranks is None else ranks
    part = [l for l in range(C) if inside[l]]
    if isinstance(totals, int):
        n = sum(available[l] for l in part)
        share = sum(allocate_budget(totals, ranks[2], available, strategy)[l] for l in part)
        totals = [round(n * (share / n) ** (b / 3)) if part else 0 for b in (1, 2)] + [totals]
    plan = [list(available)]
    for b, who in enumerate([part, part, list(range(C))]):
        row = list(plan[-1])
        if who:
            r = None if ranks[b] is None else [ranks[b][l] for l in who]
            for l, count in zip(who, allocate_budget(totals[b], r, [row[l] for l in who], strategy)):
                row[l] = count
        plan.append(row)
    return list(zip(*plan[1:]))


# ---------------------------------------------------------------- encode

def take(t: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Rows `keep` (B, K) of t (B, N, d) -> (B, K, d)."""
    return t.gather(1, keep[..., None].expand(-1, -1, t.shape[-1]))


@torch.no_grad()
def choose(a, criterion: str, i: int, x_in: torch.Tensor, x: torch.Tensor, rope, K: int) -> torch.Tensor:
    if not x.isfinite().all():
        raise ValueError("features must be finite, but hold NaN or infinity")
    if criterion == "similarity" or not a.num_blocks:
        return highest(-mean_similarity(x[:, a.prefix:]), K)
    return highest(received_attention(*a.attention(i, x_in, rope), a.from_cls)[:, a.prefix:], K)


def encode(encoder: nn.Module, images: torch.Tensor, keep=(None, None, None), part_criteria=CRITERIA):
    a = adapter(encoder)
    P, L, n = a.prefix, a.num_blocks, a.num_tokens
    counts = [n]
    for b, K in enumerate(keep):
        counts.append(counts[-1] if K is None else K)
        if not 1 <= counts[-1] <= counts[-2]:
            raise ValueError(f"keep[{b}] must be 1 to {counts[-2]}, the tokens still there, got {K}")
        if b < 2 and not a.prunable_inside and counts[-1] != n:
            raise ValueError(f"keep[{b}] must be None or {n}: this encoder is pruned at its output only, got {K}")
    x, rope = a.embed(images)  # (B, P + n, D); rope (B, n, 2 d) or None
    if x.shape[1] != P + n:
        raise ValueError(f"encoder must give {P} + {n} tokens, got {x.shape[1]}: switch its patch dropout off")
    keep_idx = torch.arange(n, device=x.device).expand(len(x), n)
    for b in range(3):
        x_in, i = x, 0
        for i in range(L * b // 3, L * (b + 1) // 3):
            x_in, x = x, a.block(i, x, rope)
        if counts[b + 1] < keep_idx.shape[1]:
            stay = choose(a, part_criteria[b], i, x_in, x, rope, counts[b + 1])
            x = torch.cat([x[:, :P], take(x[:, P:], stay)], dim=1)
            rope = rope if rope is None else take(rope, stay)
            keep_idx = keep_idx.gather(1, stay)
    return a.norm(x)[:, P:], keep_idx


def encode_all(encoders, images, total, ranks=None, strategy="rank", part_criteria=CRITERIA):
    adapters = [adapter(e) for e in encoders]
    plan = plan_budgets(total, ranks, [a.num_tokens for a in adapters], [a.prunable_inside for a in adapters], strategy)
    out = [encode(e, images, keep, part_criteria) for e, keep in zip(encoders, plan)]
    return [tokens for tokens, _ in out], [keep_idx for _, keep_idx in out]


@torch.no_grad()
def expected_ranks(encoders, batches: Iterable[torch.Tensor], rtol: float = RTOL) -> torch.Tensor:
    adapters = [adapter(e) for e in encoders]
    ranks, pictures = torch.zeros(3, len(adapters), dtype=torch.float64), 0
    for images in batches:
        pictures += len(images)
        for l, a in enumerate(adapters):
            x, rope = a.embed(images)
            for b in range(3):
                for i in range(a.num_blocks * b // 3, a.num_blocks * (b + 1) // 3):
                    x = a.block(i, x, rope)
                ranks[b, l] += feature_rank(x[:, a.prefix:], rtol).sum().cpu()
    return ranks / pictures


# ---------------------------------------------------------------- adapters: how to walk each family of library models

def heads(t: torch.Tensor, H: int) -> torch.Tensor:
    """(B, N, H d) -> (B, H, N, d)"""
    return t.unflatten(-1, (H, -1)).transpose(1, 2)


class Adapter:
    prunable_inside = True

    def __init__(self, model, outer, blocks, grid, size, dim, prefix=0, from_cls=False):
        self.model, self.blocks, self.num_blocks = model, blocks, len(blocks)
        self.grid, self.num_tokens, self.size = tuple(grid), grid[0] * grid[1], tuple(size)
        self.dim, self.prefix, self.from_cls = dim, prefix, from_cls
        cfg = getattr(outer, "preprocess_cfg", None) or getattr(model, "pretrained_cfg", None) or {}
        self.mean, self.std = cfg.get("mean", CLIP_MEAN), cfg.get("std", CLIP_STD)
        if self.prunable_inside and self.num_blocks < 3:
            raise ValueError(f"encoder must have at least 3 blocks, one for each part, got {self.num_blocks}")

    def resize(self, images, mode="bicubic"):
        if tuple(images.shape[-2:]) == self.size:
            return images
        return F.interpolate(images, self.size, mode=mode, antialias=True)

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (self.mean, self.std))
        return (self.resize(images).clamp(0, 1) - mean) / std


class ClipViT(Adapter):
    def __init__(self, v, outer):
        super().__init__(v, outer, v.transformer.resblocks, v.grid_size, v.image_size, v.conv1.out_channels, 1, True)

    def embed(self, images):
        return self.model._embeds(self.prepare(images)), None

    def block(self, i, x, rope):
        return self.blocks[i](x)

    def attention(self, i, x, rope):
        attn, h = self.blocks[i].attn, self.blocks[i].ln_1(x)
        q, k, _ = F.linear(h, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
        return heads(q, attn.num_heads), heads(k, attn.num_heads), attn.head_dim**-0.5

    def norm(self, x):
        return self.model.ln_post(x)


class TimmViT(Adapter):
    def __init__(self, v, outer):
        size = v.patch_embed.img_size
        super().__init__(v, outer, v.blocks, v.patch_embed.grid_size, size, v.embed_dim, v.num_prefix_tokens,
                         v.cls_token is not None)

    def embed(self, images):
        v = self.model
        return v.norm_pre(v.patch_drop(v._pos_embed(v.patch_embed(self.prepare(images))))), None

    def block(self, i, x, rope):
        return self.blocks[i](x)

    def attention(self, i, x, rope):
        attn, h = self.blocks[i].attn, self.blocks[i].norm1(x)
        q, k, _ = attn.qkv(h).chunk(3, dim=-1)
        return attn.q_norm(heads(q, attn.num_heads)), attn.k_norm(heads(k, attn.num_heads)), attn.scale

    def norm(self, x):
        return self.model.norm(x)


class Eva(TimmViT):
    def embed(self, images):
        v = self.model
        x, rope = v._pos_embed(v.patch_embed(self.prepare(images)))
        return v.norm_pre(x), rope if rope is None else rope.expand(len(x), -1, -1)

    def block(self, i, x, rope):
        return self.blocks[i](x, rope=rope if rope is None else rope.unsqueeze(1))  # (B, 1, N, 2 d): same for all heads

    def attention(self, i, x, rope):
        from timm.layers import apply_rot_embed_cat
        attn, h, P = self.blocks[i].attn, self.blocks[i].norm1(x), self.prefix
        if attn.q_proj is not None:
            q, k = attn.q_proj(h), attn.k_proj(h)
        else:
            bias = attn.qkv.bias if attn.q_bias is None else torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
            q, k, _ = F.linear(h, attn.qkv.weight, bias).chunk(3, dim=-1)
        q, k = attn.q_norm(heads(q, attn.num_heads)), attn.k_norm(heads(k, attn.num_heads))
        if rope is not None:
            turn = lambda t: apply_rot_embed_cat(t[:, :, P:], rope.unsqueeze(1), half=attn.rotate_half)
            q, k = (torch.cat([t[:, :, :P], turn(t)], dim=2) for t in (q, k))
        return q, k, attn.scale


class ConvNeXt(Adapter):
    prunable_inside = False

    def __init__(self, v, outer):
        size = getattr(outer, "image_size", None) or (getattr(v, "pretrained_cfg", None) or {}).get("input_size")
        if size is None:
            raise ValueError("encoder must tell its input size: set encoder.pretrained_cfg = {'input_size': (3, H, W)}")
        stride = v.feature_info[-1]["reduction"]
        super().__init__(v, outer, [], [s // stride for s in size[-2:]], size[-2:], v.num_features)

    def embed(self, images):
        return self.model.forward_features(self.prepare(images)).flatten(2).mT, None

    def norm(self, x):
        return x


class Pix2Struct(Adapter):
    def __init__(self, v, outer):
        side, self.patch = math.isqrt(v.config.seq_len), math.isqrt(v.config.patch_embed_hidden_size // 3)
        grid = getattr(v.config, "meteor_grid", (side, side))
        super().__init__(v, outer, v.encoder.layer, grid, [s * self.patch for s in grid], v.config.hidden_size)

    def embed(self, images):
        B, (h, w), p = len(images), self.grid, self.patch
        std = images.flatten(1).std(dim=1).clamp(min=images[0].numel() ** -0.5).view(B, 1, 1, 1)
        x = self.resize((images - images.mean(dim=(1, 2, 3), keepdim=True)) / std, "bilinear")
        patches = x.reshape(B, 3, h, p, w, p).permute(0, 2, 4, 3, 5, 1).reshape(B, h * w, -1)
        ids = torch.cartesian_prod(torch.arange(1, h + 1), torch.arange(1, w + 1)).to(x).expand(B, -1, -1)
        return self.model.embeddings(torch.cat([ids, patches], dim=-1)), None

    def block(self, i, x, rope):
        return self.blocks[i](x)[0]

    def attention(self, i, x, rope):
        attn, h = self.blocks[i].attention, self.blocks[i].pre_attention_layer_norm(x)
        return heads(attn.query(h), attn.n_heads), heads(attn.key(h), attn.n_heads), attn.scaling

    def norm(self, x):
        return self.model.layernorm(x)


FAMILIES = {
    "open_clip.transformer.VisionTransformer": ClipViT,
    "timm.models.eva.Eva": Eva,
    "timm.models.vision_transformer.VisionTransformer": TimmViT,
    "timm.models.convnext.ConvNeXt": ConvNeXt,
    "transformers.models.pix2struct.modeling_pix2struct.Pix2StructVisionModel": Pix2Struct,
}


def adapter(encoder: nn.Module) -> Adapter:
    visual = getattr(encoder, "visual", encoder)  # of an open_clip model
    for model in (visual, getattr(visual, "trunk", None), getattr(encoder, "encoder", None)):
        for cls in type(model).__mro__:
            name = f"{cls.__module__}.{cls.__qualname__}"
            if name in FAMILIES:
                return FAMILIES[name](model, visual)
    raise TypeError(f"encoder must be one of {list(FAMILIES)}, or a model that holds one, got {type(encoder).__name__}")
