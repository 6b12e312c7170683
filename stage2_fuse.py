r"""METEOR stage 2: of the tokens of C vision encoders, keep those that no other encoder repeats.

Paper: METEOR (ICCV 2025, https://arxiv.org/abs/2507.20842), post-projection fusion with
collaborative pruning.

    z^l   = P_l(x^l)
        each encoder's tokens in the LLM's width, by a two-layer MLP of its own (`Projector`)
    R_i^j = \sum_{l \neq j} \sum_m cos(z_i^j, z_m^l)
        redundancy of token i of encoder j: how much all tokens of all OTHER encoders are like it

Keep the K tokens with the lowest R over all encoders together, in their order: encoder by encoder,
each in raster order. How many tokens each encoder keeps is an outcome, not an input.

With unit vectors u = z / |z|, one sum per encoder T_l = \sum_m u_m^l, and T = \sum_l T_l, the
double sum is a dot product, linear in the number of tokens, without any N x N matrix:

    R_i^j = u_i^j . \sum_{l \neq j} T_l = u_i^j . (T - T_j)

In:   C tensors (B, N_l, D), already projected: any N_l, one D; a budget K.
Out:  `Fused`: tokens (B, K, D), encoder_id (B, K), keep_idx (B, K).

    z = [project(x) for project, x in zip(projectors, features)]
    fused = fuse(z, budget=576)

Change here: `mutual_redundancy` (what is redundant), `fuse` (who is kept), `Projector` (the map
into the LLM).

Not from the paper: strategy "greedy", which drops one token at a time and updates the sums, so that
one copy of what two encoders both see stays (the one-shot rule drops both copies). In "separate",
each encoder gets one token, and the others are shared in proportion to N_l - 1. Of equal tokens the
lower index stays, but in "greedy" it goes first. A zero vector has cosine 0 to everything.

Needs torch only. `python stage2_fuse.py` runs it on random features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRATEGIES = ("collaborative", "greedy", "separate", "random")


# ----------------------------------------------------------------------------------------- the idea


class Projector(nn.Sequential):
    """P_l: a two-layer MLP with a GELU between, (..., D_in) -> (..., D_out).

    Source: [paper, fusion; as in LLaVA-1.5]
    """

    def __init__(self, D_in: int, D_out: int):
        super().__init__(nn.Linear(D_in, D_out), nn.GELU(), nn.Linear(D_out, D_out))


def mutual_redundancy(tokens: Sequence[Tensor]) -> list[Tensor]:
    r"""R_i^j = \sum_{l \neq j} \sum_m cos(z_i^j, z_m^l), by sums: linear in the number of tokens.

    Args: tokens: C >= 2 tensors (B, N_l, D) float, projected into one space.
    Returns: C tensors (B, N_l) float32; higher is dropped. With M tokens in the other encoders,
        each value lies in -M..M.
    Raises: TypeError or ValueError as `fuse`; ValueError for fewer than two encoders.
    Source: [paper, collaborative pruning]
    """
    check_tokens(tokens)
    if len(tokens) < 2:
        raise ValueError("tokens must hold at least 2 encoders: one alone has no mutual redundancy")
    units = [F.normalize(z.float(), dim=-1) for z in tokens]  # u: C x (B, N_l, D)
    sums = torch.stack([u.sum(dim=1) for u in units])  # T_l: (C, B, D)
    of_others = sums.sum(dim=0) - sums  # T - T_j: (C, B, D)
    return [dot(u, others) for u, others in zip(units, of_others)]  # C x (B, N_l)


def dot(u: Tensor, v: Tensor) -> Tensor:
    """u_i . v for every token: (B, N, D), (B, D) -> (B, N), in float32 also under autocast."""
    with torch.autocast(u.device.type, enabled=False):
        return torch.einsum("bnd,bd->bn", u, v)


def own_redundancy(z: Tensor) -> Tensor:
    r"""R_i = \sum_m cos(z_i, z_m) within one encoder: what strategy "separate" goes by.

    Args: z (B, N, D) float. Returns: (B, N) float32.  Source: [supplement Table 2]
    """
    u = F.normalize(z.float(), dim=-1)
    return dot(u, u.sum(dim=1))


def lowest(values: Tensor, K: int) -> Tensor:
    """Places of the K lowest values of each row, ascending; ties go to the lower index.

    Args: values (B, N). Returns: (B, K) int64.
    """
    order = values.argsort(dim=1, stable=True)  # (B, N)
    return order[:, :K].sort(dim=1).values


# ------------------------------------------------------------------------------------------- fusing


@dataclass
class Fused:
    """What stage 2 hands to the LLM.

    tokens (B, K, D) float: the kept tokens, tokens[b, j] == torch.cat(input, 1)[b, keep_idx[b, j]].
    encoder_id (B, K) int64: which encoder each came from, 0..C-1.
    keep_idx (B, K) int64: ascending places in the concatenation of all encoders. A place minus the
        tokens of the encoders before is a place in its own encoder's list: which of the tokens
        that stage 1 kept.
    """

    tokens: Tensor
    encoder_id: Tensor
    keep_idx: Tensor

    def survivors(self, C: int) -> Tensor:
        """(B, C) int64: tokens kept of each of the C encoders; every row sums to K.

        Source: [supplement Fig. 1]
        """
        return F.one_hot(self.encoder_id, C).sum(dim=1)


def fuse(
    tokens: Sequence[Tensor],
    budget: int | None,
    strategy: str = "collaborative",
    generator: torch.Generator | None = None,
) -> Fused:
    r"""Concatenate the encoders' tokens along the sequence, and keep `budget` of them per sample.

    Args:
        tokens: C tensors (B, N_l, D) float, projected into one space (see `Projector`).
        budget: K, tokens kept per sample, 1 to \sum N_l (C or more for "separate"); None keeps all.
        strategy: "collaborative": the K lowest mutual redundancies over all encoders together (the
            paper); "greedy": one at a time, sums updated (ours); "separate": redundancy within each
            encoder, with a budget of its own (see `proportional`); "random": uniform.
        generator: of "random"; torch's global one where None.
    Returns: `Fused`; tokens keep their order. The choice carries no gradient, the kept tokens do.
    Raises: TypeError where tokens is no list of float tensors or budget no int; ValueError for a
        budget out of range, NaN or infinite features, mismatched shapes, an unknown strategy, or
        pruning with a single encoder.
    Source: [paper, collaborative pruning; supplement Table 2]
    """
    check_tokens(tokens)
    check_budget(tokens, budget, strategy)
    together = torch.cat(list(tokens), dim=1)  # (B, N, D)
    B, N, D = together.shape
    if budget is None or budget == N:
        keep_idx = torch.arange(N, device=together.device).expand(B, N)
    elif len(tokens) < 2:
        raise ValueError(
            "tokens must hold at least 2 encoders to prune: one alone has no mutual redundancy"
        )
    else:
        with torch.no_grad():
            keep_idx = choose(tokens, budget, strategy, generator)  # (B, K)
    kept = together.gather(1, keep_idx[..., None].expand(-1, -1, D))  # (B, K, D)
    return Fused(kept, owners(tokens, keep_idx), keep_idx)


def owners(tokens: Sequence[Tensor], keep_idx: Tensor) -> Tensor:
    """Which encoder each place (B, K) of the concatenation belongs to. -> (B, K) int64"""
    sizes = torch.tensor([z.shape[1] for z in tokens], device=keep_idx.device)
    ends = sizes.cumsum(0)  # encoder l has the places ends[l - 1] to ends[l] - 1
    return torch.bucketize(keep_idx.contiguous(), ends, right=True)


def choose(
    tokens: Sequence[Tensor], K: int, strategy: str, generator: torch.Generator | None
) -> Tensor:
    """The K places that stay, by strategy. -> keep_idx (B, K), in the concatenation's numbering"""
    B, N = len(tokens[0]), sum(z.shape[1] for z in tokens)
    if strategy == "collaborative":
        return lowest(torch.cat(mutual_redundancy(tokens), dim=1), K)
    if strategy == "greedy":
        dropped = greedy_drop(tokens, N - K)
        return lowest(dropped.float(), K)  # the K places where it is 0
    if strategy == "separate":
        return choose_within_each(tokens, K)
    where = "cpu" if generator is None else generator.device
    noise = torch.rand(B, N, generator=generator, device=where)  # "random"
    return lowest(noise, K).to(tokens[0].device)


def choose_within_each(tokens: Sequence[Tensor], K: int) -> Tensor:
    """Strategy "separate": each encoder keeps its own part of K. -> keep_idx (B, K)"""
    parts, start = [], 0
    for z, K_l in zip(tokens, proportional(K, [z.shape[1] for z in tokens])):
        parts.append(start + lowest(own_redundancy(z), K_l))
        start += z.shape[1]
    return torch.cat(parts, dim=1)


def proportional(K: int, sizes: list[int]) -> list[int]:
    """K shared out: one each, the rest in proportion to what each has beyond that one.

    Args: K: len(sizes) to sum(sizes).
    Returns: counts that sum to K exactly, each at least 1 and at most its size; ties go to the
        lower index.
    """
    C, N = len(sizes), sum(sizes)
    shares = []
    for n in sizes:
        beyond_the_first = (K - C) * (n - 1) / max(1, N - C)
        shares.append(1 + beyond_the_first)
    counts = [int(share + 1e-9) for share in shares]  # a share like 2.9999999999 is a whole 3
    remainders = [share - count for share, count in zip(shares, counts)]
    by_remainder = sorted(range(C), key=remainders.__getitem__, reverse=True)  # stable
    for l in by_remainder[: K - sum(counts)]:
        counts[l] += 1
    return counts


def greedy_drop(tokens: Sequence[Tensor], drop: int) -> Tensor:
    r"""Drop the token of highest R, take it out of its encoder's sum, and again, `drop` times.

    After token m of encoder l is gone, R_i falls by cos(z_i, z_m) for every i of the other
    encoders. Its twin in another encoder is then less redundant, and stays. A step costs N D
    operations.

    Returns: (B, N) bool over the concatenation, True for the tokens that are dropped.
    Source: [our choice]
    """
    R = torch.cat(mutual_redundancy(tokens), dim=1)  # (B, N)
    B, N = R.shape
    u = F.normalize(torch.cat(list(tokens), dim=1).float(), dim=-1)  # (B, N, D)
    everything = torch.arange(N, device=R.device).expand(B, N)
    owner = owners(tokens, everything)  # (B, N)
    batch = torch.arange(B, device=R.device)
    dropped = torch.zeros_like(R, dtype=torch.bool)
    for _ in range(drop):
        worst = R.argmax(dim=1)  # (B,); the first of equals
        cos = dot(u, u[batch, worst])  # (B, N)
        had_it_in_their_sum = owner != owner[batch, worst, None]  # tokens of the other encoders
        R = torch.where(had_it_in_their_sum, R - cos, R)
        R[batch, worst] = -torch.inf  # never the maximum again
        dropped[batch, worst] = True
    return dropped


# ---------------------------------------------------------------------------------- what is refused


def check_tokens(tokens: Sequence[Tensor]) -> None:
    """One sentence for each way in which the list of features can be wrong."""
    is_list = isinstance(tokens, (list, tuple))
    if not is_list or not all(torch.is_tensor(z) and z.is_floating_point() for z in tokens):
        raise TypeError("tokens must be a list of float tensors (B, N_l, D), one for each encoder")
    shapes = [tuple(z.shape) for z in tokens]
    if not shapes or any(len(shape) != 3 or 0 in shape for shape in shapes):
        raise ValueError(f"tokens must be non-empty tensors (B, N_l, D), got shapes {shapes}")
    if len({(B, D) for B, _, D in shapes}) > 1:
        raise ValueError(f"tokens must share B and D, got shapes {shapes}: project them first")
    for l, z in enumerate(tokens):
        if not z.isfinite().all():
            raise ValueError(f"tokens[{l}] must be finite, but holds NaN or infinity")


def check_budget(tokens: Sequence[Tensor], budget: int | None, strategy: str) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")
    if budget is None:
        return
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise TypeError(f"budget must be an int or None, got {type(budget).__name__}")
    N = sum(z.shape[1] for z in tokens)
    fewest = len(tokens) if strategy == "separate" else 1
    if not fewest <= budget <= N:
        raise ValueError(f"budget must be {fewest} to {N}, the tokens there are, got {budget}")


def main() -> None:
    """Four encoders of different N and width, random features: who survives, by strategy."""
    torch.manual_seed(0)
    shapes = {
        "CLIP": (576, 1024),
        "ConvNeXt": (1024, 3072),
        "EVA-02": (576, 1024),
        "Pix2Struct": (1024, 1536),
    }
    D = 256
    tokens = []
    for name, (N_l, D_l) in shapes.items():
        tokens.append(Projector(D_l, D)(torch.randn(2, N_l, D_l)))
        print(f"{name:>13}: {N_l} tokens of width {D_l}")
    N = sum(z.shape[1] for z in tokens)
    for strategy in STRATEGIES:
        fused = fuse(tokens, 576, strategy)
        K = fused.tokens.shape[1]
        by_encoder = fused.survivors(len(tokens)).tolist()
        print(f"{strategy:>13}: {N} -> {K} tokens, by encoder {by_encoder}")


if __name__ == "__main__":
    main()
