"""What METEOR is compared with, each on an extension point of the stage files.

Inside the LLM, subclasses of `TokenPruner` for `Meteor.generate(pruner=...)`: `fixed`, `fastv`,
`pyramid_drop`, `RandomPruner`. In place of stage 2: those of `FUSIONS`. In place of both: `pool`,
`shrink`, and EAGLE's `encode_channels`. Inside an encoder: `tome`, `RandomPatches`; at its output:
`prumerge`. How encoders share a budget: `reranked`. Each is named after the paper whose idea it
follows; what differs from that paper's own code is said.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_encode import (
    EncoderPruner,
    allocate_budget,
    can_prune_inside,
    dense_tokens,
    encode,
    encode_all,
    find_encoder,
    highest,
    mean_similarity,
)
from stage2_fuse import Fused, Projector, fuse, gather, lowest, mutual_redundancy
from stage3_decode import TokenPruner, select, text_relevance

from .model import Encoded, Meteor
from .pictures import pixels_for

Pruner = Callable[..., TokenPruner]  # (decoder, visual_mask) -> TokenPruner


# ----------------------------------------------------------------------------------- inside the LLM


class FixedPruner(TokenPruner):
    """METEOR's scores, and the same number of tokens for every question.

    Args: tokens: {layer: tokens left from it on}; k: heads that decide, None for all.
    Source: [supplement Table 3, "Pre-defined Ratio"]
    """

    def __init__(self, model, visual_mask: Tensor, tokens: dict[int, int], k=5, query_mask=None):
        super().__init__(model, visual_mask, sorted(tokens), query_mask)
        self.tokens, self.k = tokens, k

    def score(self, attention: Tensor) -> Tensor:
        """(B, H, N) -> (B, N): the highest stay."""
        return text_relevance(attention, self.k or attention.shape[1])

    def choose(self, layer: int, attention: Tensor, visual: Tensor) -> Tensor:
        count = torch.full_like(visual[:, 0], self.tokens[layer], dtype=torch.int64)
        return select(self.score(attention), count, visual)


def fixed(tokens: dict[int, int], k: int | None = 5) -> Pruner:
    """Pruners of `FixedPruner`."""
    return partial(FixedPruner, tokens=tokens, k=k)


class LastTokenPruner(FixedPruner):
    """The prompt's last token alone asks, over all heads; prompts are padded on the left."""

    def __init__(self, model, visual_mask: Tensor, tokens: dict[int, int]):
        last = torch.zeros_like(visual_mask)
        last[:, -1] = True
        super().__init__(model, visual_mask, tokens, k=None, query_mask=last)


def fastv(keep: int, layer: int, eager: bool = False) -> Pruner:
    """FastV (ECCV 2024): at one early layer, the tokens that the prompt's last token attends to
    most, over all heads, in the layer before.

    Args: eager: load all layers on eager attention, as its demo does to read the weights.
    Source: [arXiv 2403.06764]
    """
    return partial(EagerFastV if eager else LastTokenPruner, tokens={layer: keep})


class EagerFastV(LastTokenPruner):
    """In the block all layers are on eager attention, and write their weights (B, H, S, S) out."""

    def __enter__(self) -> "EagerFastV":
        super().__enter__()
        self.usual, self.implementation = self.implementation, "eager"
        self.decoder.set_attn_implementation("eager")
        return self

    def __exit__(self, *error) -> None:
        self.implementation = self.usual
        self.decoder.set_attn_implementation(self.usual)
        super().__exit__(*error)


def pyramid_drop(tokens: dict[int, int]) -> Pruner:
    """PyramidDrop (CVPR 2025): after each quarter of the layers fewer tokens, ranked by the
    attention of the prompt's last token.

    Args: tokens: {layer: tokens left from it on}, as `pyramid_counts` gives. Theirs halves each
        time, and counts positions anew after each drop, where here they stay.
    Source: [arXiv 2410.17247]
    """
    return partial(LastTokenPruner, tokens=tokens)


def fastv_count(K: int, average: float, layer: int, num_layers: int) -> int:
    """Tokens from `layer` on, so that K before it make the wanted average over the layers.

    Raises: ValueError where K before it alone are too many, or K everywhere too few.
    """
    count = round((average * num_layers - K * layer) / (num_layers - layer))
    if not 1 <= count <= K:
        raise ValueError(f"average {average} is out of reach with {K} tokens before layer {layer}")
    return count


def pyramid_counts(
    K: int, average: float, num_layers: int, layers: Sequence[int] | None = None
) -> dict[int, int]:
    """{layer: tokens from it on}: K r, K r^2, ... from each of `layers` on, with the r at which K
    before them make the wanted average.

    Args: layers: where tokens go; PyramidDrop's, after each quarter of the layers, where None.
    Raises: ValueError where K before the first alone are too many, or K everywhere too few.
    """
    layers = layers or [num_layers * quarter // 4 for quarter in (1, 2, 3)]
    lengths = np.diff([0, *layers, num_layers])  # layers with K tokens, with K r, ...
    polynomial = K * lengths[::-1] / num_layers  # of r, the highest power first
    polynomial[-1] -= average
    roots = np.roots(polynomial)
    r = max((root.real for root in roots if abs(root.imag) < 1e-9), default=0)  # one is positive
    if not 0 < r <= 1:
        raise ValueError(
            f"average {average} is out of reach with {K} tokens before layer {layers[0]}"
        )
    return {layer: max(1, round(K * r**power)) for power, layer in enumerate(layers, 1)}


class RandomPruner(FixedPruner):
    """Any tokens, as many as given for each layer.

    Args: seed: of the choice.
    Source: [our choice]
    """

    def __init__(self, model, visual_mask: Tensor, tokens: dict[int, int], seed: int = 0):
        super().__init__(model, visual_mask, tokens)
        self.generator = torch.Generator().manual_seed(seed)

    def score(self, attention: Tensor) -> Tensor:
        B, _, N = attention.shape
        return torch.rand(B, N, generator=self.generator).to(attention.device)


class AttentionRecorder(TokenPruner):
    """Keeps all, and notes what the text attends to in the layer before each of `layers`.

    attention: {layer: (B, H, N) float32, 0 outside the visual tokens}.
    """

    def __init__(self, model, visual_mask: Tensor, layers: list[int]):
        super().__init__(model, visual_mask, layers)
        self.attention = {}

    def choose(self, layer: int, attention: Tensor, visual: Tensor) -> Tensor:
        self.attention[layer] = attention
        return visual


# --------------------------------------------------------------------------------- in place of fuse


def separate(tokens: Sequence[Tensor], budget: int) -> Fused:
    r"""Each encoder keeps its own part of the budget, by R_i = \sum_m cos(z_i, z_m) within it.

    Encoders share the budget in proportion to their tokens; each gets at least one.
    Source: [supplement Table 2]
    """
    sizes = [z.shape[1] for z in tokens]
    keep_idx, start = [], 0
    for z, K_l in zip(tokens, allocate_budget(budget, sizes, sizes)):
        unit = F.normalize(z.float(), dim=-1)
        redundancy = torch.einsum("bnd,bd->bn", unit, unit.sum(dim=1))
        keep_idx.append(start + lowest(redundancy, K_l))
        start += z.shape[1]
    return gather(tokens, torch.cat(keep_idx, dim=1))


def greedy(tokens: Sequence[Tensor], budget: int) -> Fused:
    """Drop the token of highest R, take it out of its encoder's sum, and again.

    After token m of encoder l is gone, R_i falls by cos(z_i, z_m) for every i of the other
    encoders. Its twin in another encoder is then less redundant, and stays. A step costs N D
    operations. Of equal tokens the lower index goes first.

    Source: [our choice]
    """
    R = mutual_redundancy(tokens)  # (B, N)
    B, N = R.shape
    unit = F.normalize(torch.cat(list(tokens), dim=1).float(), dim=-1)  # (B, N, D)
    owner = gather(tokens, torch.arange(N, device=R.device).expand(B, N)).encoder_id  # (B, N)
    batch = torch.arange(B, device=R.device)
    dropped = torch.zeros_like(R)
    for _ in range(N - budget):
        worst = R.argmax(dim=1)  # (B,); the first of equals
        cos = torch.einsum("bnd,bd->bn", unit, unit[batch, worst])  # (B, N)
        had_it_in_their_sum = owner != owner[batch, worst, None]  # tokens of the other encoders
        R = torch.where(had_it_in_their_sum, R - cos, R)
        R[batch, worst] = -torch.inf  # never the maximum again
        dropped[batch, worst] = 1
    return gather(tokens, lowest(dropped, budget))


def random_fusion(tokens: Sequence[Tensor], budget: int) -> Fused:
    """Any tokens, by torch's global generator.  Source: [supplement Table 2]"""
    noise = torch.rand(len(tokens[0]), sum(z.shape[1] for z in tokens))
    return gather(tokens, lowest(noise, budget).to(tokens[0].device))


def regular(tokens: Sequence[Tensor], budget: int) -> Fused:
    """Every n-th patch of each encoder in raster order; encoders share as in `separate`.

    Source: [our choice]
    """
    sizes = [z.shape[1] for z in tokens]
    places, start = [], 0
    for N_l, K_l in zip(sizes, allocate_budget(budget, sizes, sizes)):
        places.append(start + torch.linspace(0, N_l - 1, K_l).round().long())
        start += N_l
    keep_idx = torch.cat(places).to(tokens[0].device)
    return gather(tokens, keep_idx.expand(len(tokens[0]), -1))


def divprune(tokens: Sequence[Tensor], budget: int) -> Fused:
    """DivPrune (CVPR 2025): one after the other, the token that is farthest from those chosen.

    Distance: 1 - cosine, to the nearest of them. The first is the one farthest from all others.
    Source: [arXiv 2503.02175]
    """
    unit = F.normalize(torch.cat(list(tokens), dim=1).float(), dim=-1)  # (B, N, D)
    distance = 1 - unit @ unit.mT  # (B, N, N)
    batch = torch.arange(len(unit), device=unit.device)
    to_others = distance + 2 * torch.eye(unit.shape[1], device=unit.device)  # 2: the largest
    chosen = [to_others.amin(dim=2).argmax(dim=1)]  # (B,) each
    nearest = distance[batch, chosen[0]]  # (B, N): of each token to the chosen ones
    for _ in range(budget - 1):
        nearest[batch, chosen[-1]] = -1  # not again
        chosen.append(nearest.argmax(dim=1))
        nearest = nearest.minimum(distance[batch, chosen[-1]])
    return gather(tokens, torch.stack(chosen, dim=1).sort(dim=1).values)


FUSIONS = {
    "collaborative": fuse,
    "separate": separate,
    "greedy": greedy,
    "random": random_fusion,
    "regular grid": regular,
    "DivPrune": divprune,
}


# ---------------------------------------------------------------------- how encoders share a budget

STRATEGIES = ("rank", "average", "rank_reverse")


def reranked(ranks: Tensor, strategy: str) -> Tensor:
    """Ranks (points, C) that make stage 1 share its budget by a strategy of `STRATEGIES`.

    Source: [supplement Table 1]
    """
    if strategy == "average":
        return torch.ones_like(ranks)
    return 1 / ranks.double() if strategy == "rank_reverse" else ranks


# ------------------------------------------------------------------- inside and behind the encoders


@torch.no_grad()
def tome(encoder: nn.Module, pixels: Tensor, r: int, eager: bool = False) -> Tensor:
    """ToMe (ICLR 2023) on a ViT of timm: between attention and MLP of each block, the r patches
    that are most like another one are merged into it, so that N - L r of N are left.

    Patches take turns as givers (even places) and takers (odd ones). Likeness is the cosine of
    their keys, mean over heads. A merged token is the mean of its patches, and attention counts it
    as often
    as it has patches: log(size) is added to its scores.

    Args: pixels (B, 3, H, W); r: 0..half of the patches, in every block; eager: write the attention
        weights out, as theirs does, not on fused attention.
    Returns: (B, N - L r, D).
    Source: [arXiv 2210.09461]
    """
    model = find_encoder(encoder)
    blocks = getattr(model, "blocks", [None])
    if not hasattr(blocks[0], "ls1") or getattr(model, "rope", None) is not None:
        raise TypeError(
            "encoder must be a VisionTransformer of timm without rotary positions, "
            f"got {type(model).__name__}"
        )
    x = model._pos_embed(model.patch_embed(pixels))
    x = model.norm_pre(model.patch_drop(x))  # (B, P + N, D)
    size = x.new_ones(*x.shape[:2], 1)  # patches in each token: (B, P + N, 1)
    for block in blocks:
        attended, k = attention_by_size(block, x, size, eager)
        x = x + attended
        keys = k.mean(dim=1)  # (B, n, d)
        x, size = merge_pairs(x, size, keys, r, model.num_prefix_tokens)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.norm(x)[:, model.num_prefix_tokens :]


def attention_by_size(block, x: Tensor, size: Tensor, eager: bool) -> tuple[Tensor, Tensor]:
    """A block's attention, in which a token counts as often as it has patches.

    Args: x (B, n, D); size (B, n, 1). Returns: what is added to x, (B, n, D); the keys (B, H, n,
        d).
    """
    attn = block.attn
    q, k, v = (
        t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        for t in attn.qkv(block.norm1(x)).chunk(3, dim=-1)
    )
    q, k = attn.q_norm(q), attn.k_norm(k)  # (B, H, n, d)
    often = size.log()[:, None, None, :, 0]  # (B, 1, 1, n)
    if eager:
        weights = (attn.scale * q @ k.mT + often).softmax(dim=-1)  # (B, H, n, n)
        mixed = weights @ v
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, often, scale=attn.scale)
    return block.ls1(attn.proj(mixed.transpose(1, 2).flatten(2))), k


def merge_pairs(
    x: Tensor, size: Tensor, keys: Tensor, r: int, prefix: int
) -> tuple[Tensor, Tensor]:
    """The r givers of highest cosine to their best taker join it; tokens keep their order.

    Args: x (B, n, D), size (B, n, 1), keys (B, n, d); the first `prefix` tokens stay.
    Returns: x (B, n - r, D), means weighted by size; size (B, n - r, 1).
    """
    n, D = x.shape[1:]
    unit = F.normalize(keys, dim=-1)[:, prefix:]
    patches = unit.shape[1]
    if not 0 <= r <= patches // 2:
        raise ValueError(f"r must be 0 to {patches // 2}, half of the patches there are, got {r}")
    cosines = unit[:, ::2] @ unit[:, 1::2].mT  # (B, givers, takers)
    best, taker = cosines.max(dim=-1)  # (B, givers)
    giver = best.argsort(dim=1, descending=True, stable=True)[:, :r]  # (B, r)
    source = prefix + 2 * giver  # places in x
    target = prefix + 2 * taker.gather(1, giver) + 1

    total = x * size
    given = total.take_along_dim(source[..., None], dim=1)  # (B, r, D)
    total = total.scatter_add(1, target[..., None].expand(-1, -1, D), given)
    given_size = size.take_along_dim(source[..., None], dim=1)  # (B, r, 1)
    size = size.scatter_add(1, target[..., None], given_size)

    gone = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device).scatter(1, source, True)
    those_left = gone.int().argsort(dim=1, stable=True)[:, : n - r, None]  # in order
    mean = (total / size).take_along_dim(those_left, dim=1)
    return mean, size.take_along_dim(those_left, dim=1)


class AttentionPruner(EncoderPruner):
    """Attention alone decides, in every part."""

    def score(self, part: int, tokens: Tensor, attention: Callable[[], Tensor]) -> Tensor:
        return attention()


class RandomPatches(EncoderPruner):
    """Any patches, by torch's global generator."""

    def score(self, part: int, tokens: Tensor, attention: Callable[[], Tensor]) -> Tensor:
        return torch.rand(tokens.shape[:2], device=tokens.device)


def prumerge(model: Meteor, images: Tensor, names: list[str], budget: int) -> Encoded:
    """PruMerge++-style: all at once at each encoder's output, the patches of most attention, the
    others merged in.

    Equal shares for the encoders `names`. Theirs picks outliers by quartiles and adds patches on a
    regular grid; here the count is given, so the highest stay. A ConvNet has no attention: there,
    those least like its mean token stay.

    Source: [arXiv 2403.15388]
    """
    available = [model.views[name].num_tokens for name in names]
    counts = allocate_budget(budget, [1.0] * len(names), available)
    pixels = dict(zip(model.encoders, model.pixels(images)))
    merged, kept = [], []
    for name, K in zip(names, counts):
        every_token, keep_idx = attended(model.encoders[name], pixels[name], K)
        merged.append(merge(every_token, keep_idx))
        kept.append(keep_idx)
    return only(model, names, merged, kept)


class OutputNoter(AttentionPruner):
    """Notes all tokens as the encoder would return them, before the choice."""

    def score(self, part: int, tokens: Tensor, attention: Callable[[], Tensor]) -> Tensor:
        self.every_token = tokens if self.norm is None else self.norm(tokens)
        return super().score(part, tokens, attention)


def attended(encoder: nn.Module, pixels: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """All of an encoder's tokens (B, N, D), and the K patches of most attention (B, K), in one
    run."""
    if not can_prune_inside(encoder):
        every_token = dense_tokens(find_encoder(encoder), pixels)
        return every_token, highest(-mean_similarity(every_token), K)
    with OutputNoter(encoder, (K,)) as pruner:
        pruner.encoder(pixels)
    if K == pruner.N:  # nothing was scored
        return pruner.tokens, pruner.keep_idx
    return pruner.every_token, pruner.keep_idx


def merge(tokens: Tensor, keep_idx: Tensor) -> Tensor:
    """Each dropped token joins the kept one that it is most like; a kept one becomes its group's
    mean.

    Args: tokens (B, N, D) float; keep_idx (B, K) int64, ascending. Returns: (B, K, D).
    """
    kept = tokens.take_along_dim(keep_idx[..., None], dim=1)  # (B, K, D)
    cosines = F.normalize(tokens, dim=-1) @ F.normalize(kept, dim=-1).mT  # (B, N, K)
    group = cosines.argmax(dim=-1)  # (B, N)
    K = keep_idx.shape[1]
    own_group = torch.arange(K, device=group.device).expand_as(keep_idx)
    group = group.scatter(1, keep_idx, own_group)  # a kept token is in its own
    member = F.one_hot(group, K).to(tokens.dtype)  # (B, N, K)
    return member.mT @ tokens / member.sum(dim=1)[..., None]


def only(model: Meteor, names: list[str], features: list[Tensor], kept: list[Tensor]) -> Encoded:
    """The sequence that a model with only the encoders `names` would feed to its LLM: no stage 2.

    Args: features, kept: of each name, tokens (B, n_l, D_l) and their patches (B, n_l).
    """
    projected = [model.projectors[name](x) for name, x in zip(names, features)]
    fused = fuse(projected, None)
    everyone = list(model.encoders)
    number = torch.tensor([everyone.index(name) for name in names], device=model.device)
    patches = dict(zip(names, kept))
    none = kept[0][:, :0]
    all_kept = [patches.get(name, none) for name in everyone]
    return Encoded(Fused(fused.tokens, number[fused.encoder_id], fused.keep_idx), all_kept)


# ------------------------------------------------------- fewer tokens without a choice among them


def grids_for(budget: int, grids: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """A smaller grid (r, c) for each encoder, `budget` cells together, as alike as can be.

    Args: grids: (h, w) of the encoders' patches. No side of a cell is longer than twice the other.
    Raises: ValueError where there are none.
    """
    share = budget / len(grids)
    options = []
    for h, w in grids:
        of_area = {}
        for r, c in itertools.product(range(1, h + 1), range(1, w + 1)):
            if 0.5 <= (h / r) / (w / c) <= 2:
                of_area[r * c] = (r, c)
        nearest = sorted(of_area, key=lambda area: abs(area - share))[:8]
        options.append([of_area[area] for area in nearest])

    def unevenness(chosen: tuple) -> float:
        return sum((r * c - share) ** 2 for r, c in chosen)

    fitting = [
        chosen for chosen in itertools.product(*options) if sum(r * c for r, c in chosen) == budget
    ]
    if not fitting:
        raise ValueError(f"budget {budget} is no sum of grids for {len(grids)} encoders")
    return list(min(fitting, key=unevenness))


def pool(model: Meteor, images: Tensor, budget: int) -> Encoded:
    """Average pooling of each encoder's projected tokens to a smaller grid.

    Source: [our choice]
    """
    encoders, views = list(model.encoders.values()), list(model.views.values())
    features, _ = encode_all(encoders, model.pixels(images), None)
    pooled = []
    grids = grids_for(budget, [view.grid for view in views])
    for project, x, view, grid in zip(model.projectors.values(), features, views, grids):
        plane = project(x).mT.unflatten(2, view.grid)  # (B, D, h, w)
        pooled.append(F.adaptive_avg_pool2d(plane, grid).flatten(2).mT)  # (B, r c, D)
    return of_no_patch(model, torch.cat(pooled, dim=1))


def shrink(model: Meteor, images: Tensor, budget: int) -> Encoded:
    """A smaller picture: so small that all its patches are as many as the budget.

    It lies in the upper left corner of a picture of its mean color, so that the encoders' positions
    are those that they know; the patches outside of it go. So the encoders save no time here, as
    they would on an input that is small.
    Source: [our choice]
    """
    H, W = images.shape[2:]
    views = list(model.views.values())
    tokens = []
    for number, grid in enumerate(grids_for(budget, [view.grid for view in views])):
        name, (h, w), (r, c) = list(model.views)[number], views[number].grid, grid
        size = [round(H * r / h), round(W * c / w)]
        small = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        canvas = images.mean(dim=(2, 3), keepdim=True).expand_as(images).clone()
        canvas[:, :, : size[0], : size[1]] = small
        encoder = model.encoders[name]
        (pixels,) = pixels_for({name: encoder}, model.views, canvas, model.device)
        x, _ = encode(encoder, pixels)
        corner = model.projectors[name](x).unflatten(1, (h, w))[:, :r, :c]  # (B, r, c, D)
        tokens.append(corner.flatten(1, 2))
    return of_no_patch(model, torch.cat(tokens, dim=1))


def of_no_patch(model: Meteor, tokens: Tensor) -> Encoded:
    """Tokens (B, K, D) for the LLM that are no patches of one encoder: no map shows them."""
    place = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2])
    fused = Fused(tokens, torch.zeros_like(place), place)
    return Encoded(fused, [place[:, :0] for _ in model.encoders])


# ----------------------------------------------------------- in place of all stages: EAGLE's fusion


class ChannelFusion(nn.Module):
    """EAGLE's pre-projection fusion: the encoders' channels side by side, a token per grid cell.

    Source: [supplement Table 2, "Pre-projection fusion"; arXiv 2408.15998]
    """

    def __init__(self, widths: list[int], width: int):
        super().__init__()
        self.project = Projector(sum(widths), width)

    def forward(self, features: list[Tensor]) -> Tensor:
        channels = torch.cat(features, dim=-1)  # (B, N, sum of D_l)
        return self.project(channels)  # (B, N, D)


def channel_fusion(model: Meteor) -> ChannelFusion:
    """An untrained one for a model whose encoders share a grid."""
    widths = [view.width for view in model.views.values()]
    return ChannelFusion(widths, model.decoder.config.hidden_size).to(model.device)


def encode_channels(model: Meteor, fusion: ChannelFusion, images: Tensor) -> Encoded:
    """The model's encoders, unpruned, and their fused channels."""
    features, _ = encode_all(list(model.encoders.values()), model.pixels(images), None)
    return of_no_patch(model, fusion(features))  # (B, N, D)
