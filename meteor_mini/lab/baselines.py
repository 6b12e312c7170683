"""What METEOR is compared with, each a few lines over the same interfaces.

Inside the LLM, for `Meteor.generate(pruner=...)`: `fixed`, `fastv`, `pyramid_drop`. Inside an
encoder: `tome`; at the encoders' outputs: `prumerge`. In place of stage 2: see `fusions.py`.

Each is named after the paper whose idea it follows; what differs from its own code is said.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from stage1_encode import allocate_budget, check_blocks, encode, find_encoder
from stage2_fuse import Fused, fuse
from stage3_decode import AdaptivePruner, select

from ..model import Encoded, Meteor

Pruner = Callable[..., AdaptivePruner]  # (decoder, visual_mask) -> a context manager


# ----------------------------------------------------------------------------------- inside the LLM


def fixed(counts: dict[int, int], k: int | None = 5) -> Pruner:
    """The same number of tokens for every question.

    Args: counts: {layer: tokens kept}; k: heads that decide, None for all.
    Source: [supplement Table 3, "Pre-defined Ratio"]
    """

    def pruner(decoder, visual_mask: Tensor) -> AdaptivePruner:
        return AdaptivePruner(decoder, visual_mask, counts=counts, k=k)

    return pruner


def last_token(visual_mask: Tensor) -> Tensor:
    """(B, S) bool: the prompt's last token, who alone asks in FastV and PyramidDrop.

    Prompts are padded on the left.
    """
    last = torch.zeros_like(visual_mask)
    last[:, -1] = True
    return last


def fastv(keep: int, layer: int, eager: bool = False) -> Pruner:
    """FastV (ECCV 2024): at one early layer, the tokens that the last token attends to most.

    Attention is the mean over all heads. Theirs reads the weights of the layer before, and its demo
    loads the whole model on eager attention for that: `eager`. Otherwise the layer's own q and k of
    the last token are multiplied before it runs.

    Source: [arXiv 2403.06764]
    """
    kind = EagerFastV if eager else AdaptivePruner

    def pruner(decoder, visual_mask: Tensor) -> AdaptivePruner:
        asks = last_token(visual_mask)
        return kind(decoder, visual_mask, counts={layer: keep}, k=None, query_mask=asks)

    return pruner


def pyramid_drop(keep: list[int], num_layers: int) -> Pruner:
    """PyramidDrop (CVPR 2025): after each quarter of the layers fewer tokens.

    They are ranked by the last token's attention, from the layer's own q and k, as theirs. Theirs
    halves each time, and counts positions anew after each drop, where here they stay.

    Args: keep: tokens left after the first, second and third quarter.
    Source: [arXiv 2410.17247]
    """
    counts = {}
    for quarter, K in zip((1, 2, 3), keep):
        counts[num_layers * quarter // 4] = K

    def pruner(decoder, visual_mask: Tensor) -> AdaptivePruner:
        asks = last_token(visual_mask)
        return AdaptivePruner(decoder, visual_mask, counts=counts, k=None, query_mask=asks)

    return pruner


class EagerFastV(AdaptivePruner):
    """Ranks by the last token's row of the weights that the layer before has just used.

    In the block all layers are on eager attention, and write their weights (B, H, S, S) to memory.
    """

    def __enter__(self) -> "EagerFastV":
        super().__enter__()
        self._implementation = self.decoder.config._attn_implementation
        self.decoder.set_attn_implementation("eager")
        for i in self.layers:
            attention = self.decoder.layers[i - 1].self_attn
            self._handles.append(attention.register_forward_hook(self._read))
        return self

    def __exit__(self, *error) -> None:
        self.decoder.set_attn_implementation(self._implementation)
        super().__exit__(*error)

    def _read(self, attention, args, output) -> None:
        reads_prompt = self._past == 0
        if reads_prompt:
            weights = output[1]  # (B, H, N, N)
            self._weights = weights[:, :, -1].float().mean(dim=1)  # (B, N)

    @torch.no_grad()
    def _stays(self, i: int, layer, hidden: Tensor, rotary: tuple) -> Tensor:
        if self._visual.shape != self.visual_mask.shape:
            raise ValueError(
                "eager FastV must be used without beams or several sequences for a prompt"
            )
        visual = self._visual.gather(1, self._index) & self._valid  # (B, N)
        text = self._valid & ~visual
        there = visual.sum(dim=1)
        self.counts[i] = self.fixed[i].to(there).minimum(there)
        score = self._weights.masked_fill(~visual, 0)
        kept = select(score, self.counts[i], visual)
        self.kept[i] = torch.zeros_like(self.visual_mask).scatter(1, self._index, kept)
        return text | kept


# -------------------------------------------------------------------------------- inside an encoder


def tome(encoder: nn.Module, pixels: Tensor, r: int, eager: bool = False) -> Tensor:
    """ToMe (ICLR 2023) on a ViT of timm: patches that are alike are merged, r in each block.

    Between attention and MLP of each block the r patches that are most like another one are merged
    into it, so that N - L r of N are left. Patches take turns as givers (even places) and takers
    (odd ones); likeness is the cosine of their keys, mean over heads. A merged token is the mean of
    its patches, and attention counts it as often as it has patches.

    Args:
        pixels (B, 3, H, W) float: what the encoder's own preprocessing makes.
        r: 0..half of the patches, in every block.
        eager: write the attention weights out, as theirs does, not on fused attention.
    Returns: (B, N - L r, D).
    Raises: TypeError for another encoder; ValueError for another r.
    Source: [arXiv 2210.09461]
    """
    vit, family = find_encoder(encoder)
    if not isinstance(vit, VisionTransformer):
        raise TypeError(
            "encoder must be a VisionTransformer of timm without rotary positions, "
            f"got {type(vit).__name__}"
        )
    check_blocks(vit, vit.blocks, family)
    P = vit.num_prefix_tokens
    x = vit.patch_drop(vit._pos_embed(vit.patch_embed(pixels)))
    x = vit.norm_pre(x)  # (B, P + N, D)
    size = x.new_ones(*x.shape[:2], 1)  # patches in each token: (B, P + N, 1)
    for block in vit.blocks:
        mixed, keys = proportional_attention(block.attn, block.norm1(x), size, eager)
        x = x + block.ls1(mixed)
        x, size = merge_pairs(x, size, keys, r, P)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return vit.norm(x)[:, P:]


def proportional_attention(
    attention: nn.Module, x: Tensor, size: Tensor, eager: bool
) -> tuple[Tensor, Tensor]:
    r"""softmax(q K^T / \sqrt{d} + log size) V: a token counts as often as it has patches.

    Args: attention: of timm; x (B, n, D), size (B, n, 1) float.
    Returns: the attention's output (B, n, D); keys (B, n, d), mean over heads.
    """
    heads = []
    for part in attention.qkv(x).chunk(3, dim=-1):
        part = part.unflatten(-1, (attention.num_heads, -1))  # (B, n, H, d)
        heads.append(part.transpose(1, 2))
    q, k, v = heads  # (B, H, n, d) each
    q, k = attention.q_norm(q), attention.k_norm(k)
    often = size.log()[:, None, None, :, 0]  # (B, 1, 1, n)
    if eager:
        weights = (attention.scale * q @ k.mT + often).softmax(dim=-1)  # (B, H, n, n)
        mixed = weights @ v
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, often, scale=attention.scale)
    mixed = mixed.transpose(1, 2).flatten(2)  # (B, n, D)
    return attention.proj(mixed), k.mean(dim=1)


def merge_pairs(
    x: Tensor, size: Tensor, keys: Tensor, r: int, prefix: int
) -> tuple[Tensor, Tensor]:
    """The r givers of highest cosine to their best taker join it, the mean weighted by size.

    Tokens keep their order.

    Args: x (B, n, D), size (B, n, 1), keys (B, n, d); the first `prefix` tokens stay.
    Returns: x (B, n - r, D); size (B, n - r, 1).
    Raises: ValueError for an r that is no number from 0 to half of the patches.
    """
    n = x.shape[1]
    unit = F.normalize(keys, dim=-1)[:, prefix:]
    most = unit.shape[1] // 2
    if not 0 <= r <= most:
        raise ValueError(f"r must be 0 to {most}, half of the patches there are, got {r}")
    cosines = unit[:, ::2] @ unit[:, 1::2].mT  # (B, givers, takers)
    best, taker = cosines.max(dim=-1)  # (B, givers)
    giver = best.argsort(dim=1, descending=True, stable=True)[:, :r]  # (B, r)
    source = prefix + 2 * giver  # places in x
    target = prefix + 2 * taker.gather(1, giver) + 1

    total = x * size
    given = total.take_along_dim(source[..., None], dim=1)  # (B, r, D)
    total = total.scatter_add(1, target[..., None].expand_as(given), given)
    given_size = size.take_along_dim(source[..., None], dim=1)  # (B, r, 1)
    size = size.scatter_add(1, target[..., None], given_size)

    gone = torch.zeros(x.shape[:2], dtype=torch.int, device=x.device).scatter(1, source, 1)
    stay_first = gone.argsort(dim=1, stable=True)  # places that stay, in order, then those gone
    stay = stay_first[:, : n - r, None]  # (B, n - r, 1)
    return (total / size).take_along_dim(stay, dim=1), size.take_along_dim(stay, dim=1)


# ------------------------------------------------------------------------------ behind the encoders


def merge(tokens: Tensor, keep_idx: Tensor) -> Tensor:
    """Each dropped token joins the kept one that it is most like.

    A kept token becomes the mean of its group.

    Args: tokens (B, N, D) float; keep_idx (B, K) int64, ascending.
    Returns: (B, K, D).
    """
    K = keep_idx.shape[1]
    kept = tokens.take_along_dim(keep_idx[..., None], dim=1)  # (B, K, D)
    cosines = F.normalize(tokens, dim=-1) @ F.normalize(kept, dim=-1).mT  # (B, N, K)
    group = cosines.argmax(dim=-1)  # (B, N)
    own_group = torch.arange(K, device=group.device).expand_as(keep_idx)
    group = group.scatter(1, keep_idx, own_group)  # whatever it is most like, a kept token stays
    member = F.one_hot(group, K).to(tokens.dtype)  # (B, N, K)
    members = member.sum(dim=1)[..., None]  # (B, K, 1)
    return member.mT @ tokens / members


def prumerge(model: Meteor, images: Tensor, names: list[str], budget: int) -> Encoded:
    """PruMerge++-style: all at once at each encoder's output, the others merged into those kept.

    The patches of most attention in the last block are kept, equally many of each encoder. Theirs
    picks outliers by quartiles and adds patches on a regular grid; here the count is given, so the
    highest stay (of a ConvNet, which has no attention, those least like its mean token).

    Args: images (B, 3, H, W) in [0, 1]; names: the encoders; budget: tokens of all together.
    Source: [arXiv 2403.15388]
    """
    pixels = dict(zip(model.encoders, model.pixels(images)))
    available = [model.views[name].num_tokens for name in names]
    counts = allocate_budget(budget, [1.0] * len(names), available, "average")
    merged, kept = [], []
    for name, K in zip(names, counts):
        encoder = model.encoders[name]
        _, keep_idx = encode(encoder, pixels[name], (K,), ("attention",))
        tokens, _ = encode(encoder, pixels[name])
        merged.append(merge(tokens, keep_idx))
        kept.append(keep_idx)
    return only(model, names, merged, kept)


def only(model: Meteor, names: list[str], features: list[Tensor], kept: list[Tensor]) -> Encoded:
    """The sequence that a model with only the encoders `names` would feed to its LLM: no stage 2.

    Args: features: tokens (B, n_l, D_l) of each of the names; kept: their patches (B, n_l).
    """
    tokens = [model.projectors[name](x) for name, x in zip(names, features)]
    fused = fuse(tokens, None)
    all_names = list(model.encoders)
    numbers = torch.tensor([all_names.index(name) for name in names], device=model.device)
    encoder_id = numbers[fused.encoder_id]  # in the numbering of all encoders
    no_patches = kept[0][:, :0]
    all_kept = []
    for name in all_names:
        all_kept.append(kept[names.index(name)] if name in names else no_patches)
    return Encoded(Fused(fused.tokens, encoder_id, fused.keep_idx), all_kept)
