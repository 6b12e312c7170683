r"""METEOR stage 2: project the tokens of C vision encoders into one space, and keep the K least mutually redundant.

Paper: METEOR (ICCV 2025, https://arxiv.org/abs/2507.20842), post-projection fusion with collaborative pruning.

    z^l   = P_l(x^l)                                     one two-layer MLP per encoder, into the LLM's width
    R_i^j = \sum_{l \neq j} \sum_m cos(z_i^j, z_m^l)     redundancy of token i of encoder j over all OTHER encoders
    keep the K tokens with the lowest R, over all encoders together, in their order (encoder by encoder, raster)

With unit vectors u = z / |z| and one sum per encoder, T_l = \sum_m u_m^l, the double sum is a dot product,

    R_i^j = u_i^j . \sum_{l \neq j} T_l = u_i^j . (T - T_j),   T = \sum_l T_l,

linear in the number of tokens: no N x N matrix. How many tokens each encoder keeps is an outcome, not an input.

In:   a list of C tensors (B, N_l, D), any N_l, one D; a budget K.
Out:  `Fused`: tokens (B, K, D), encoder_id (B, K), keep_idx (B, K).

Change here: `mutual_redundancy` (what is redundant), `fuse` (who is kept), `Projector` (the map into the LLM).

Not from the paper: strategy "greedy", which drops one token at a time and updates the sums, so that one copy of
what two encoders both see stays (the one-shot rule drops both copies); in "separate", budgets in proportion to N_l;
ties go to the lower index; a zero vector has cosine 0 to everything.

Needs torch only. `python stage2_fuse.py` runs it on random features.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

STRATEGIES = ("collaborative", "greedy", "separate", "random")


class Projector(nn.Sequential):
    """P_l: two-layer MLP with a GELU between, (..., D_in) -> (..., D_out).  Source: [paper, fusion; LLaVA-1.5]"""

    def __init__(self, D_in: int, D_out: int):
        super().__init__(nn.Linear(D_in, D_out), nn.GELU(), nn.Linear(D_out, D_out))


@dataclass
class Fused:
    """What stage 2 hands to the LLM.

    tokens (B, K, D) float: the kept tokens, `tokens[b, j] == torch.cat(input, 1)[b, keep_idx[b, j]]`.
    encoder_id (B, K) int64: which encoder each came from, 0..C-1.
    keep_idx (B, K) int64: ascending positions in the concatenation of all encoders.
    """

    tokens: torch.Tensor
    encoder_id: torch.Tensor
    keep_idx: torch.Tensor

    def survivors(self, C: int) -> torch.Tensor:
        """(B, C) int64: tokens kept of each of the C encoders; every row sums to K.  Source: [supplement Fig. 1]"""
        return F.one_hot(self.encoder_id, C).sum(dim=1)


def mutual_redundancy(tokens: list[torch.Tensor]) -> list[torch.Tensor]:
    r"""R_i^j = \sum_{l \neq j} \sum_m cos(z_i^j, z_m^l), by sums: linear in the number of tokens.

    Args:
        tokens: C >= 2 tensors (B, N_l, D) float, projected into one space.
    Returns: C tensors (B, N_l) float32, each value in [-M, M] with M the other encoders' token count; higher is dropped.
    Raises: TypeError or ValueError as `fuse`; ValueError for fewer than two encoders.
    Source: [paper, collaborative pruning]
    """
    _check(tokens)
    if len(tokens) < 2:
        raise ValueError("tokens must hold at least 2 encoders: one alone has no mutual redundancy")
    units = [F.normalize(z.float(), dim=-1) for z in tokens]  # C x (B, N_l, D)
    sums = torch.stack([u.sum(dim=1) for u in units])  # T_l: (C, B, D)
    others = sums.sum(dim=0) - sums  # T - T_j: (C, B, D)
    return [torch.einsum("bnd,bd->bn", u, o) for u, o in zip(units, others)]  # C x (B, N_l)


def greedy_order(tokens: list[torch.Tensor], drop: int) -> torch.Tensor:
    r"""Drop the token of highest R, take it out of its encoder's sum, and again, `drop` times.

    After m (of encoder l) is gone, R_i falls by cos(z_i, z_m) for every i of the other encoders: N D operations
    a step, so `drop` x N x D in all. Its twin in another encoder is then less redundant, and stays.

    Returns: (B, N) bool over the concatenation, True for the N - drop tokens that stay.
    Source: [our choice]
    """
    sizes = [z.shape[1] for z in tokens]
    u = F.normalize(torch.cat(tokens, dim=1).float(), dim=-1)  # (B, N, D)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(
        u.device
    )  # (N,)
    R = torch.cat(mutual_redundancy(tokens), dim=1)  # (B, N)
    batch = torch.arange(len(u), device=u.device)
    for _ in range(drop):
        worst = R.argmax(dim=1)  # (B,); the first of equals
        cos = torch.einsum("bnd,bd->bn", u, u[batch, worst])  # (B, N)
        R = R - cos * (
            owner != owner[worst, None]
        )  # only tokens of the other encoders had it in their sum
        R[batch, worst] = -torch.inf  # gone: never the maximum again
    return R != -torch.inf


def lowest(values: torch.Tensor, K: int) -> torch.Tensor:
    """Positions of the K lowest values of each row, ascending; ties go to the lower index. (B, N) -> (B, K) int64."""
    return values.argsort(dim=1, stable=True)[:, :K].sort(dim=1).values


def fuse(
    tokens: list[torch.Tensor],
    budget: int | None,
    strategy: str = "collaborative",
    generator: torch.Generator | None = None,
) -> Fused:
    r"""Concatenate the encoders' tokens along the sequence and keep `budget` of them per sample.

    Args:
        tokens: C tensors (B, N_l, D) float, projected into one space (see `Projector`).
        budget: K, tokens kept per sample, C <= K <= \sum N_l for "separate", else 1 <= K; None keeps all.
        strategy: "collaborative": the K lowest mutual redundancies over all encoders together (the paper);
            "greedy": one at a time, sums updated (ours); "separate": redundancy within each encoder,
            R_i = \sum_m cos(z_i^j, z_m^j), and a budget of its own in proportion to N_l; "random": uniform.
        generator: of "random"; torch's global one where None.
    Returns: `Fused`; tokens keep their order. The choice carries no gradient, the kept tokens do.
    Raises: TypeError where tokens is no list of float tensors or budget no int; ValueError for a budget out of range,
        NaN or infinite features, mismatched shapes, an unknown strategy, or pruning with a single encoder.
    Source: [paper, collaborative pruning; supplement Table 2]
    """
    _check(tokens)
    sizes = [z.shape[1] for z in tokens]
    N = sum(sizes)
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int)):
        raise TypeError(f"budget must be an int or None, got {type(budget).__name__}")
    fewest = len(tokens) if strategy == "separate" else 1
    if budget is not None and not fewest <= budget <= N:
        raise ValueError(f"budget must be {fewest} to {N}, the tokens there are, got {budget}")
    together = torch.cat(tokens, dim=1)  # (B, N, D)
    B, device = len(together), together.device
    if budget is None or budget == N:
        keep_idx = torch.arange(N, device=device).expand(B, N)
    elif len(tokens) < 2:
        raise ValueError(
            "tokens must hold at least 2 encoders to prune: one alone has no mutual redundancy"
        )
    else:
        with torch.no_grad():
            keep_idx = _choose(tokens, sizes, budget, strategy, generator)
    kept = together.gather(1, keep_idx[..., None].expand(-1, -1, together.shape[-1]))  # (B, K, D)
    starts = torch.tensor(sizes, device=device).cumsum(0)
    encoder_id = torch.bucketize(keep_idx.contiguous(), starts, right=True)  # (B, K)
    return Fused(kept, encoder_id, keep_idx)


def _choose(tokens, sizes, K, strategy, generator) -> torch.Tensor:
    """keep_idx (B, K) of each strategy, in the concatenation's numbering."""
    if strategy == "collaborative":
        return lowest(torch.cat(mutual_redundancy(tokens), dim=1), K)
    if strategy == "greedy":
        stays = greedy_order(tokens, sum(sizes) - K)
        return lowest((~stays).float(), K)
    if strategy == "random":
        noise = torch.rand(len(tokens[0]), sum(sizes), generator=generator)
        return lowest(noise, K).to(tokens[0].device)
    parts, start = [], 0
    for z, K_l in zip(tokens, proportional(K, sizes)):  # "separate"
        u = F.normalize(z.float(), dim=-1)
        R = torch.einsum("bnd,bd->bn", u, u.sum(dim=1))  # \sum_m cos(z_i, z_m), within the encoder
        parts.append(start + lowest(R, K_l))
        start += z.shape[1]
    return torch.cat(parts, dim=1)


def proportional(K: int, sizes: list[int]) -> list[int]:
    """K split in proportion to `sizes`: floors, then one each by largest remainder (ties: lower index), each >= 1.

    Needs len(sizes) <= K <= sum(sizes); the parts sum to K exactly and none exceeds its size.
    """
    share = [
        1 + (K - len(sizes)) * (n - 1) / max(1, sum(sizes) - len(sizes)) for n in sizes
    ]  # 1 each, then the rest
    counts = [int(s + 1e-9) for s in share]
    by_remainder = sorted(range(len(sizes)), key=lambda l: (counts[l] - share[l], l))
    for l in by_remainder[: K - sum(counts)]:
        counts[l] += 1
    return counts


def _check(tokens: list[torch.Tensor]) -> None:
    """One sentence for each way in which the list of features can be wrong."""
    if not isinstance(tokens, (list, tuple)) or not all(
        torch.is_tensor(z) and z.is_floating_point() for z in tokens
    ):
        raise TypeError("tokens must be a list of float tensors (B, N_l, D), one for each encoder")
    if not tokens or any(z.dim() != 3 or 0 in z.shape for z in tokens):
        raise ValueError(
            f"tokens must be non-empty tensors (B, N_l, D), got shapes {[tuple(z.shape) for z in tokens]}"
        )
    if len({(z.shape[0], z.shape[2]) for z in tokens}) > 1:
        raise ValueError(
            f"tokens must share B and D, got shapes {[tuple(z.shape) for z in tokens]}: project them first"
        )
    for l, z in enumerate(tokens):
        if not z.isfinite().all():
            raise ValueError(f"tokens[{l}] must be finite, but holds NaN or infinity")


def main() -> None:
    """Four encoders of different N and width, random features: tokens in, tokens out, survivors by encoder."""
    torch.manual_seed(0)
    shapes = {
        "CLIP": (576, 1024),
        "ConvNeXt": (1024, 3072),
        "EVA-02": (576, 1024),
        "Pix2Struct": (1024, 1536),
    }
    D = 256
    tokens = [Projector(D_l, D)(torch.randn(2, N_l, D_l)) for N_l, D_l in shapes.values()]
    print("in: " + ", ".join(f"{name} {N_l} x {D_l}" for name, (N_l, D_l) in shapes.items()))
    for strategy in STRATEGIES:
        fused = fuse(tokens, 576, strategy)
        print(
            f"{strategy:>13}: {sum(z.shape[1] for z in tokens)} -> {fused.tokens.shape[1]} tokens, "
            f"by encoder {fused.survivors(len(tokens)).tolist()}"
        )


if __name__ == "__main__":
    main()
