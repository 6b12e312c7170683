r"""METEOR stage 2: of the tokens of C vision encoders, keep those that no other encoder repeats.

Paper: METEOR (ICCV 2025, https://arxiv.org/abs/2507.20842), post-projection fusion with
collaborative pruning.

    z^l   = P_l(x^l)
        each encoder's tokens in the LLM's width, by a two-layer MLP of its own (`Projector`)
    R_i^j = \sum_{l \neq j} \sum_m cos(z_i^j, z_m^l)
        redundancy of token i of encoder j: summed similarity to all tokens of the OTHER encoders

Keep the K tokens with the lowest R over all encoders together, in their order: encoder by encoder,
each in raster order. How many tokens each encoder keeps is an outcome, not an input.

With unit vectors u = z / |z|, one sum per encoder T_l = \sum_m u_m^l, and T = \sum_l T_l, the
double sum is a dot product, linear in the number of tokens, without any N x N matrix:

    R_i^j = u_i^j . \sum_{l \neq j} T_l = u_i^j . (T - T_j)

In:   C tensors (B, N_l, D), already projected: any N_l, one D; a budget K.
Out:  `Fused`: tokens (B, K, D), encoder_id (B, K), keep_idx (B, K).

    z = [project(x) for project, x in zip(projectors, features)]
    fused = fuse(z, budget=576)

Change here: `mutual_redundancy` (what is redundant), `fuse` (which tokens stay), `Projector` (the
map into the LLM). For a rule of your own, choose keep_idx and call `gather`.

Not from the paper: of equal tokens the lower index stays. A zero vector has cosine 0 to everything.

Needs torch only. `python stage2_fuse.py` runs it on random features.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Projector(nn.Sequential):
    """P_l: a two-layer MLP with a GELU between, (..., D_in) -> (..., D_out).

    Source: [paper, fusion; as in LLaVA-1.5]
    """

    def __init__(self, D_in: int, D_out: int):
        super().__init__(nn.Linear(D_in, D_out), nn.GELU(), nn.Linear(D_out, D_out))


def mutual_redundancy(tokens: Sequence[Tensor]) -> Tensor:
    r"""R_i^j = \sum_{l \neq j} \sum_m cos(z_i^j, z_m^l), by sums: linear in the number of tokens.

    Args: tokens: C tensors (B, N_l, D) float, projected into one space.
    Returns: (B, \sum N_l) float32, encoder by encoder; the lowest stay. With M tokens in the other
        encoders, a value lies in -M..M.
    Source: [paper, collaborative pruning]
    """
    units = [F.normalize(z.float(), dim=-1) for z in tokens]  # u: C x (B, N_l, D)
    sums = torch.stack([u.sum(dim=1) for u in units])  # T_l: (C, B, D)
    of_others = sums.sum(dim=0) - sums  # T - T_j: (C, B, D)
    return torch.cat([dot(u, others) for u, others in zip(units, of_others)], dim=1)


def dot(u: Tensor, v: Tensor) -> Tensor:
    """u_i . v for every token: (B, N, D), (B, D) -> (B, N), in float32 also under autocast."""
    with torch.autocast(u.device.type, enabled=False):
        return torch.einsum("bnd,bd->bn", u, v)


def lowest(values: Tensor, K: int) -> Tensor:
    """Places of the K lowest values of each row, ascending; ties go to the lower index.

    Args: values (B, N). Returns: (B, K) int64.
    """
    order = values.argsort(dim=1, stable=True)  # (B, N)
    return order[:, :K].sort(dim=1).values


class Fused(NamedTuple):
    """What stage 2 hands to the LLM.

    tokens (B, K, D) float: the kept tokens, tokens[b, j] == torch.cat(input, 1)[b, keep_idx[b, j]].
    encoder_id (B, K) int64: which encoder each came from, 0..C-1.
    keep_idx (B, K) int64: ascending places in the concatenation of all encoders. Subtract the
        token counts of the encoders before to index that encoder's own list, the tokens that
        stage 1 kept.
    """

    tokens: Tensor
    encoder_id: Tensor
    keep_idx: Tensor


def fuse(tokens: Sequence[Tensor], budget: int | None) -> Fused:
    r"""Concatenate the encoders' tokens along the sequence, and keep `budget` of them per sample.

    Args:
        tokens: C tensors (B, N_l, D) float, projected into one space (see `Projector`).
        budget: K, tokens kept per sample, 1 to \sum N_l; None keeps all.
    Returns: `Fused`; tokens keep their order. The choice carries no gradient, the kept tokens do.
    Raises: ValueError for tokens of other shapes, a budget out of range, and for pruning a single
        encoder, which has no mutual redundancy.
    Source: [paper, collaborative pruning]
    """
    shapes = [tuple(z.shape) for z in tokens]
    if any(len(shape) != 3 or shape[::2] != shapes[0][::2] for shape in shapes):
        raise ValueError(f"tokens must be tensors (B, N_l, D) of the same B and D, got {shapes}")
    B, N = len(tokens[0]), sum(z.shape[1] for z in tokens)
    if budget is None or budget == N:
        keep_idx = torch.arange(N, device=tokens[0].device).expand(B, N)
        return gather(tokens, keep_idx)
    if not 1 <= budget < N:
        raise ValueError(f"budget must be 1 to {N}, the tokens there are, got {budget}")
    if len(tokens) < 2:
        raise ValueError("tokens must hold at least 2 encoders to prune: one has no others")
    with torch.no_grad():
        keep_idx = lowest(mutual_redundancy(tokens), budget)  # (B, K)
    return gather(tokens, keep_idx)


def gather(tokens: Sequence[Tensor], keep_idx: Tensor) -> Fused:
    """The tokens at the places keep_idx (B, K) of the concatenation of all encoders."""
    together = torch.cat(list(tokens), dim=1)  # (B, N, D)
    kept = together.take_along_dim(keep_idx[..., None], dim=1)  # (B, K, D)
    owner = [keep_idx.new_full((z.shape[1],), l) for l, z in enumerate(tokens)]
    encoder_id = torch.cat(owner)[keep_idx]  # (B, K)
    return Fused(kept, encoder_id, keep_idx)


def main() -> None:
    """Four encoders of different N and width, random features: how many tokens of each survive."""
    torch.manual_seed(0)
    sizes, widths = [576, 1024, 576, 1024], [1024, 3072, 1024, 1536]
    features = [torch.randn(2, N_l, D_l) for N_l, D_l in zip(sizes, widths)]
    tokens = [Projector(D_l, 256)(x) for x, D_l in zip(features, widths)]
    fused = fuse(tokens, budget=576)
    by_encoder = F.one_hot(fused.encoder_id).sum(dim=1)  # (B, C)
    print(f"{sizes} -> {tuple(fused.tokens.shape)}, by encoder {by_encoder.tolist()}")


if __name__ == "__main__":
    main()
