"""What METEOR is compared with, each a few lines over the same interfaces.

Inside the LLM, for `Meteor.generate(pruner=...)`: `fixed`, `fastv`, `pyramid_drop`, `drop_all`.
Inside an encoder: `tome`. At the encoders' outputs: `prumerge`. In place of stage 2: see
`fusions.py`. Each is named after the paper whose idea it follows; what differs from that paper's
own code is said.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_encode import allocate_budget, encode, find_encoder
from stage2_fuse import Fused, fuse
from stage3_decode import AdaptivePruner, select

from ..model import Encoded, Meteor

Pruner = Callable[..., AdaptivePruner]  # (decoder, visual_mask) -> AdaptivePruner


# ----------------------------------------------------------------------------------- inside the LLM


def fixed(counts: dict[int, int], k: int | None = 5) -> Pruner:
    """The same number of tokens for every question.

    Args: counts: {layer: tokens kept}; k: heads that decide, None for all.
    Source: [supplement Table 3, "Pre-defined Ratio"]
    """
    return partial(AdaptivePruner, counts=counts, k=k)


def fastv(keep: int, layer: int, eager: bool = False) -> Pruner:
    """FastV (ECCV 2024): at one early layer, the tokens that the prompt's last token attends to
    most, over all heads.

    Theirs reads the attention weights of the layer before; for that its demo loads the whole model
    on
    eager attention: `eager`. Otherwise the layer's own q and k are multiplied before it runs.

    Source: [arXiv 2403.06764]
    """
    kind = EagerFastV if eager else AdaptivePruner
    return partial(asked_by_the_last_token, kind, {layer: keep})


def pyramid_drop(keep: list[int], num_layers: int) -> Pruner:
    """PyramidDrop (CVPR 2025): after each quarter of the layers fewer tokens, ranked by the
    attention of the prompt's last token, from the layer's own q and k, as theirs.

    Args: keep: tokens left after the first, second and third quarter. Theirs halves each time, and
        counts positions anew after each drop, where here they stay.
    Source: [arXiv 2410.17247]
    """
    counts = {num_layers * quarter // 4: K for quarter, K in zip((1, 2, 3), keep)}
    return partial(asked_by_the_last_token, AdaptivePruner, counts)


def asked_by_the_last_token(
    kind: type[AdaptivePruner], counts: dict[int, int], decoder, visual_mask: Tensor
) -> AdaptivePruner:
    """A pruner in which the prompt's last token alone asks; prompts are padded on the left."""
    asks = torch.zeros_like(visual_mask)
    asks[:, -1] = True
    return kind(decoder, visual_mask, counts=counts, k=None, query_mask=asks)


def drop_all(layer: int) -> Pruner:
    """From `layer` on, 1..L-1, no visual token is there: how deep does the LLM look at the picture?

    Source: [our choice]
    """
    return partial(DropAll, layer=layer)


class DropAll(AdaptivePruner):
    """Drops every visual token prior to one layer."""

    def __init__(self, decoder, visual_mask: Tensor, layer: int):
        super().__init__(decoder, visual_mask, counts={layer: 1})  # 1: the least it is asked for

    def _choose(self, i, layer, hidden: Tensor, rotary: tuple, sees: Tensor | None) -> Tensor:
        """In place of stage 3's choice: which of the tokens that are there stay, (B, N) bool."""
        prompt = self._prompt
        visual = prompt.visual.gather(1, prompt.index)  # (B, N)
        self.kept[i] = torch.zeros_like(self.visual_mask)
        self.counts[i] = self.visual_mask.new_zeros(len(self.visual_mask), dtype=torch.int64)
        return prompt.valid & ~visual


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
        if self._past == 0:  # of the prompt, not of an answer's token
            weights = output[1]  # (B, H, N, N)
            self._weights = weights[:, :, -1].float().mean(dim=1)  # (B, N)

    @torch.no_grad()
    def _choose(self, i, layer, hidden: Tensor, rotary: tuple, sees: Tensor | None) -> Tensor:
        """In place of stage 3's choice: which of the tokens that are there stay, (B, N) bool."""
        prompt = self._prompt
        if prompt.copies > 1:
            raise ValueError(
                "eager FastV must be used without beams or several sequences for a prompt"
            )
        visual = prompt.visual.gather(1, prompt.index) & prompt.valid  # (B, N)
        there = visual.sum(dim=1)
        count = self.fixed[i].to(there).minimum(there)
        keep = select(self._weights, count, visual)
        self.counts[i] = count
        self.kept[i] = torch.zeros_like(self.visual_mask).scatter(1, prompt.index, keep)
        text = prompt.valid & ~visual
        return text | keep


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
    model, _ = find_encoder(encoder)
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


def prumerge(model: Meteor, images: Tensor, names: list[str], budget: int) -> Encoded:
    """PruMerge++-style: all at once at each encoder's output, the patches of most attention, the
    others merged in.

    Equal shares for the encoders `names`. Theirs picks outliers by quartiles and adds patches on a
    regular grid; here the count is given, so the highest stay. A ConvNet has no attention: there,
    those least like its mean token stay.

    Source: [arXiv 2403.15388]
    """
    available = [model.views[name].num_tokens for name in names]
    counts = allocate_budget(budget, [1.0] * len(names), available, "average")
    pixels = dict(zip(model.encoders, model.pixels(images)))
    merged, kept = [], []
    for name, K in zip(names, counts):
        encoder, x = model.encoders[name], pixels[name]
        _, keep_idx = encode(encoder, x, (K,), ("attention",))
        every_token, _ = encode(encoder, x)
        merged.append(merge(every_token, keep_idx))
        kept.append(keep_idx)
    return only(model, names, merged, kept)


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
