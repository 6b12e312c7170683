"""What METEOR is compared with, each a few lines over the same interfaces.

Inside the LLM, for `Meteor.generate(pruner=...)`: `fixed`, `fastv`, `pyramid_drop`. At the encoders' outputs:
`prumerge`. Each is named after the paper whose idea it follows; what differs from that paper's own code is said.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_encode import adapter, allocate_budget, encode
from stage2_fuse import Fused, fuse
from stage3_decode import AdaptivePruner

from .model import Encoded, Meteor

Pruner = Callable[..., AdaptivePruner]


def fixed(counts: dict[int, int], k: int | None = 5) -> Pruner:
    """The same number of tokens for every question: {layer: tokens kept}; k: heads that decide, None for all.
    Source: [supplement Table 3, "Pre-defined Ratio"]"""
    return lambda decoder, visual_mask: AdaptivePruner(decoder, visual_mask, counts=counts, k=k)


def last_token(visual_mask: Tensor) -> Tensor:
    """(B, S) bool: the prompt's last token, who alone asks in FastV and PyramidDrop. Prompts are padded on the left."""
    last = torch.zeros_like(visual_mask)
    last[:, -1] = True
    return last


def fastv(keep: int, layer: int) -> Pruner:
    """FastV (ECCV 2024): at one early layer, the tokens that the last token attends to most, over all heads.

    Theirs reads the attention of the layer before, and so runs it on eager attention; here the layer's own q and k of
    the last token are multiplied before it runs.  Source: [arXiv 2403.06764]
    """
    return lambda decoder, visual_mask: AdaptivePruner(decoder, visual_mask, counts={layer: keep}, k=None,
                                                       query_mask=last_token(visual_mask))


def pyramid_drop(keep: list[int], num_layers: int) -> Pruner:
    """PyramidDrop (CVPR 2025): after each quarter of the layers fewer tokens, ranked by the last token's attention.

    Args: keep: tokens left after the first, second and third quarter; theirs halves each time.
    Source: [arXiv 2410.17247]
    """
    counts = {num_layers * quarter // 4: K for quarter, K in zip((1, 2, 3), keep)}
    return lambda decoder, visual_mask: AdaptivePruner(decoder, visual_mask, counts=counts, k=None,
                                                       query_mask=last_token(visual_mask))


def merge(tokens: Tensor, keep_idx: Tensor) -> Tensor:
    """Each dropped token joins the kept one that it is most like; a kept token becomes the mean of its group.

    Args: tokens (B, N, D) float; keep_idx (B, K) int64, ascending. Returns: (B, K, D).
    """
    kept = tokens.take_along_dim(keep_idx[..., None], dim=1)  # (B, K, D)
    group = (F.normalize(tokens, dim=-1) @ F.normalize(kept, dim=-1).mT).argmax(dim=-1)  # (B, N)
    group = group.scatter(1, keep_idx, torch.arange(keep_idx.shape[1], device=group.device).expand_as(keep_idx))
    member = F.one_hot(group, keep_idx.shape[1]).to(tokens.dtype)  # (B, N, K)
    return member.mT @ tokens / member.sum(dim=1)[..., None]


def prumerge(model: Meteor, images: Tensor, names: list[str], budget: int) -> Encoded:
    """PruMerge++-style: all at once at each encoder's output, the patches of most attention, the others merged in.

    Equal shares for the encoders `names`. Theirs picks outliers by quartiles and adds patches on a regular grid; here the
    count is given, so the highest stay (of a ConvNet, which has no attention, those least like its mean token).
    Source: [arXiv 2403.15388]
    """
    encoders = [model.encoders[n] for n in names]
    counts = allocate_budget(budget, [1.0] * len(names), [adapter(e).num_tokens for e in encoders], "average")
    kept = [encode(e, images, (None, None, K))[1] for e, K in zip(encoders, counts)]
    merged = [merge(encode(e, images)[0], keep_idx) for e, keep_idx in zip(encoders, kept)]
    return only(model, names, merged, kept)


def only(model: Meteor, names: list[str], features: list[Tensor], kept: list[Tensor]) -> Encoded:
    """The sequence that a model with only the encoders `names` would feed to its LLM: no stage 2."""
    tokens = fuse([model.projectors[n](x) for n, x in zip(names, features)], None)
    index = [list(model.encoders).index(n) for n in names]
    all_kept = [kept[names.index(n)] if n in names else kept[0][:, :0] for n in model.encoders]
    return Encoded(Fused(tokens.tokens, torch.tensor(index)[tokens.encoder_id], tokens.keep_idx), all_kept)
