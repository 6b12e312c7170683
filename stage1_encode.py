r"""METEOR stage 1: prune the tokens of C vision encoders while they encode, each to its own count.

Paper: METEOR (ICCV 2025, https://arxiv.org/abs/2507.20842), rank-guided collaborative token
assignment; supplement A and B.1. The blocks of an encoder are cut into three parts, as equal as can
be. Tokens are pruned after the last block of each part b = 0, 1, 2.

Which tokens stay:

    R_i   = cos(x_i, 1/N \sum_j x_j)
        redundancy, in the shallow part: tokens that are like the mean token go
    s_i   = 1/H \sum_h softmax(q_cls^h . k^h / sqrt(d))_i
        score, in the deeper parts: tokens that CLS attends to stay

How many, for a total of k_b tokens over all encoders:

    k_b^l = k_b r_b^l / \sum_m r_b^m
        encoder l keeps a part of them in proportion to r_b^l, the expected rank of its features

In:   encoders of open_clip, timm and transformers, unmodified; for each the pixels that its own
      preprocessing makes; how many tokens to keep.
Out:  per encoder, tokens (B, K, D) without CLS, and keep_idx (B, K): which patches they are.

    ranks = expected_ranks(encoders, batches)  # once, on some pictures; store them
    features, keep_idx = encode_all(encoders, pixels, total=1193, ranks=ranks)

or one encoder, to counts that you choose:

    with EncoderPruner(encoder, keep=(300, 200, 100)) as pruner:
        encoder(pixels)
    pruner.tokens, pruner.keep_idx  # (B, 100, D), (B, 100)

Change here: `mean_similarity` and `received_attention` (which tokens stay), `feature_rank` and
`RTOL` (what rank means), `allocate_budget` (how encoders share), `FAMILIES` (one more encoder).

Not from the paper: which parts count as shallow (the first alone). Rank counts the singular values
above RTOL times the largest. Shares are rounded by largest remainder, and lie between one token and
all there are. Totals before the last fall geometrically unless given. Where there is no CLS, the
score is the mean attention from all tokens. A ConvNet needs its dense grid, and is pruned at its
output only. Tested with open_clip 3.0 to 3.3, timm 1.0.30 and 31, transformers 5.18 to 5.24.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Smaller, and rounding noise counts: at 1e-3 all encoders have nearly full rank. Larger, and the
# rank depends on the picture: at 1e-1 it varies by a third from one to the next.
RTOL = 1e-2
POINTS = 3  # pruning points of the paper: after each third of the blocks
STRATEGIES = ("rank", "average", "rank_reverse")


def require(condition: bool, message: str, error: type[Exception] = ValueError) -> None:
    if not condition:
        raise error(message)


# ----------------------------------------------------------------------- which tokens are redundant


def mean_similarity(tokens: Tensor) -> Tensor:
    r"""R_i = cos(x_i, 1/N \sum_j x_j): how much a token looks like the background.

    Args: tokens (B, N, D) float.
    Returns: redundancy (B, N) float32, -1..1; the lowest stay.
    Source: [paper, Finding 1]
    """
    tokens = tokens.float()
    mean_token = tokens.mean(dim=1, keepdim=True)  # (B, 1, D)
    return F.cosine_similarity(tokens, mean_token, dim=-1)  # (B, N)


def received_attention(q: Tensor, k: Tensor, scale: float, chunk: int = 256) -> Tensor:
    r"""s_i = 1/H \sum_h softmax(scale q^h K^h)_i, averaged over the queries that are given.

    Args:
        q (B, H, Q, d) float: the query of CLS alone (Q = 1), or of all tokens (Q = N).
        k (B, H, N, d) float: keys of all tokens.
        scale: factor of q . k, as the encoder's own attention has it.
        chunk: queries computed at a time, so that no N x N matrix is held.
    Returns: score (B, N) float32, 0..1; over all tokens a row sums to 1; the highest stay.
    Source: [paper, Finding 2]; all tokens as queries where there is no CLS [our choice]
    """
    q, k = q.float(), k.float()
    total = 0
    with torch.autocast(q.device.type, enabled=False):
        for some in q.split(chunk, dim=2):
            attention = (scale * some @ k.mT).softmax(dim=-1)  # (B, H, chunk, N)
            total = total + attention.mean(dim=1).sum(dim=1)  # (B, N)
    return total / q.shape[2]


def highest(score: Tensor, K: int) -> Tensor:
    """Places of the K highest scores of each row, ascending; ties go to the lower place.

    Args: score (B, N) float. Returns: (B, K) int64.
    """
    order = score.argsort(dim=1, descending=True, stable=True)  # (B, N)
    return order[:, :K].sort(dim=1).values


# ----------------------------------------------------------------------- how many tokens each keeps


def singular_values(tokens: Tensor) -> Tensor:
    """Singular values of each token matrix: roots of the eigenvalues of its smaller Gram matrix.

    Args: tokens (B, N, D) float, finite.
    Returns: (B, min(N, D)) float64, ascending.
    Raises: ValueError for another shape, NaN or infinity.
    """
    require(
        tokens.dim() == 3 and bool(tokens.isfinite().all()),
        f"tokens must be finite, of shape (B, N, D), got shape {tuple(tokens.shape)}",
    )
    A = tokens.double()
    N, D = A.shape[1:]
    gram = A @ A.mT if N <= D else A.mT @ A  # (B, min(N, D), min(N, D))
    eigenvalues = torch.linalg.eigvalsh(gram)
    return eigenvalues.clamp(min=0).sqrt()  # rounding leaves some just below 0


def feature_rank(tokens: Tensor, rtol: float = RTOL) -> Tensor:
    r"""#{j: \sigma_j > rtol \sigma_max}: how many directions the tokens really use.

    Args: tokens (B, N, D) float; rtol: 1e-6 (what a Gram matrix resolves) to below 1.
    Returns: (B,) int64, 0..min(N, D).
    Source: [paper]; counting by rtol [our choice]
    """
    require(1e-6 <= rtol < 1, f"rtol must be at least 1e-6 and below 1, got {rtol}")
    sigma = singular_values(tokens)
    largest = sigma[:, -1:]
    return (sigma > rtol * largest).sum(dim=1)


def nuclear_diversity(tokens: Tensor) -> Tensor:
    r"""||A||_* / N for the row-normalised tokens A: 1 where all differ, low where all are alike.

    Args: tokens (B, N, D) float.
    Returns: (B,) float64, 0..sqrt(min(N, D) / N).
    Source: [supplement A]
    """
    N = tokens.shape[1]
    A = F.normalize(tokens.double(), dim=-1)
    return singular_values(A).sum(dim=1) / N


def strategy_weights(ranks: Sequence[float], strategy: str) -> list[Fraction]:
    """What the shares are in proportion to. Exact fractions, so that equal shares are equal."""
    if strategy == "rank":
        return [Fraction(r) for r in ranks]
    if strategy == "rank_reverse":
        return [1 / Fraction(r) for r in ranks]
    return [Fraction(1) for _ in ranks]  # "average"


def allocate_budget(
    total: int, ranks: Sequence[float], available: Sequence[int], strategy: str = "rank"
) -> list[int]:
    r"""k^l = k r^l / \sum_m r^m: share `total` tokens among encoders in proportion to their ranks.

    No encoder gets more than it has, and each gets at least one token. An encoder that meets such a
    bound keeps the bound, and the others share what is left by the same rule. Ten tokens, ranks
    6, 3, 1, four tokens in the first encoder: the shares would be 6, 3, 1; the first keeps 4, and
    the others share 6 as 3 : 1, which is 4.5 and 1.5; rounded, 4, 5, 1.

    Args:
        total: k, from C to sum(available); ranks: r^l, C positive numbers.
        available: tokens that each encoder has; strategy: one of `STRATEGIES`.
    Returns: C whole numbers, 1 <= k^l <= available[l], whose sum is exactly `total`.
    Raises: ValueError for arguments not as above.
    Source: [paper, Eq. of k_b^l; supplement Table 1]; bounds and rounding [our choice]
    """
    C = len(available)
    ranks = [float(r) for r in ranks]
    require(strategy in STRATEGIES, f"strategy must be one of {STRATEGIES}, got {strategy!r}")
    require(
        isinstance(total, int) and C <= total <= sum(available) and min(available) >= 1,
        f"total must be an int from {C}, one each, to all of {[*available]}, got {total}",
    )
    require(
        len(ranks) == C and all(0 < r < math.inf for r in ranks),
        f"ranks must be {C} positive numbers, one for each encoder, got {ranks}",
    )
    weights = strategy_weights(ranks, strategy)
    shares = {}  # encoder -> its share, once that is settled
    waiting = set(range(C))
    while waiting:
        left = total - sum(shares.values())
        weight_sum = sum(weights[l] for l in waiting)
        wanted = {l: left * weights[l] / weight_sum for l in waiting}
        bounded = {l: min(max(wanted[l], 1), available[l]) for l in waiting}
        too_much = sum(bounded.values()) - left
        if too_much > 0:  # all shares must fall: who was raised to one token stays there
            settled = {l for l in waiting if bounded[l] > wanted[l]}
        elif too_much < 0:  # all shares can rise: who was cut to all it has stays there
            settled = {l for l in waiting if bounded[l] < wanted[l]}
        else:  # the bounds give and take the same
            settled = set(waiting)
        for l in settled:
            shares[l] = bounded[l]
        waiting -= settled
    return largest_remainder([shares[l] for l in range(C)], total)


def largest_remainder(shares: Sequence[Fraction], total: int) -> list[int]:
    """Round down, then one more for the largest remainders; ties go to the lower index."""
    counts = [math.floor(share) for share in shares]
    remainders = [share - count for share, count in zip(shares, counts)]
    by_remainder = sorted(range(len(shares)), key=remainders.__getitem__, reverse=True)  # stable
    missing = total - sum(counts)
    for l in by_remainder[:missing]:
        counts[l] += 1
    return counts


def plan_budgets(
    totals: int | Sequence[int] | None,
    ranks: Tensor | Sequence[Sequence[float]] | None,
    available: Sequence[int],
    inside: Sequence[bool],
    strategy: str = "rank",
) -> list[tuple[int, ...]]:
    """How many tokens each encoder keeps at each pruning point.

    Args:
        totals: k_2, the tokens of all encoders together at their output; or (k_0, k_1, k_2), one
            total for each point; or None to keep all. With k_2 alone, the totals before it fall by
            the same factor from point to point.
        ranks: (points, C), as `expected_ranks` gives them; may be None with strategy "average".
        available: C counts of tokens, unpruned.
        inside: C bool: whether an encoder can be pruned before its output. Only the last total is
            for all encoders; k_0 and k_1 are shared among those that can.
        strategy: one of `STRATEGIES`.
    Returns: for each encoder its counts at the points, never rising; the last ones sum to k_2. What
        an encoder has lost at one point it cannot get back at the next, whatever its rank is there.
    Raises: ValueError for totals or ranks not as above.
    Source: [paper]; totals that fall geometrically [our choice]
    """
    C = len(available)
    check_totals(totals, ranks, inside, C)
    points = POINTS if ranks is None else len(ranks)
    if isinstance(totals, (list, tuple)):
        points = len(totals)
    if totals is None:
        return [(n,) * points for n in available]
    if ranks is None and strategy == "average":
        ranks = [[1.0] * C] * points
    require(
        ranks is not None and all(len(row) == C for row in ranks),
        f"ranks must be ({points}, {C}), points by encoders, as expected_ranks gives, or None "
        f"with strategy 'average', got {ranks}",
    )
    prunable = [l for l in range(C) if inside[l]]
    if isinstance(totals, int):
        last = allocate_budget(totals, ranks[-1], available, strategy)
        totals = geometric_totals(totals, last, available, prunable, points)
    left = list(available)
    plan = []
    for b in range(points):
        sharing = list(range(C)) if b == points - 1 else prunable
        if sharing:
            point_ranks = [ranks[b][l] for l in sharing]
            still_there = [left[l] for l in sharing]
            counts = allocate_budget(totals[b], point_ranks, still_there, strategy)
            for l, count in zip(sharing, counts):
                left[l] = count
        plan.append(tuple(left))
    return list(zip(*plan))


def check_totals(totals, ranks, inside: Sequence[bool], C: int) -> None:
    """ValueError for totals, or lengths of lists, that `plan_budgets` cannot serve."""
    require(len(inside) == C, f"inside must be {C} bools, one for each encoder, got {inside}")
    is_list = isinstance(totals, (list, tuple)) and len(totals) > 0
    require(
        totals is None or isinstance(totals, int) or is_list,
        f"totals must be an int, a list of ints, one for each point, or None, got {totals!r}",
    )
    if not is_list:
        return
    require(
        ranks is None or len(ranks) == len(totals),
        f"totals must be an int or have an entry for each row of ranks, got {totals} and {ranks}",
    )
    require(
        len(totals) == 1 or any(inside),
        f"totals must be an int where no encoder is pruned before its output, got {totals}",
    )


def geometric_totals(
    total: int,
    last: Sequence[int],
    available: Sequence[int],
    prunable: Sequence[int],
    points: int,
) -> list[int]:
    """Totals of all points but the last, each the same fraction of the one before; then `total`."""
    start = sum(available[l] for l in prunable)
    end = sum(last[l] for l in prunable)
    fall = end / max(start, 1)
    return [round(start * fall ** ((b + 1) / points)) for b in range(points - 1)] + [total]


# -------------------------------------------------------------------------------- inside an encoder


class EncoderPruner:
    """Prunes an encoder's tokens inside a `with` block, by hooks; after it the model is as it was.

    Modifications: the blocks are cut into as many equal parts as `keep` has entries. After the last
    block of a part, the dropped patches leave the sequence; tokens in front of the patches (CLS,
    registers) always stay. Blocks that follow get the rotary positions of the tokens that are left.

    Args:
        encoder: a model of `FAMILIES`, or one that holds such a model, as a LLaVA does.
        keep: tokens left after each part, never rising; None keeps all that are there.
        criteria: "similarity" or "attention" for each part; None: similarity first, then attention
            (with one part, similarity alone).
        depth: number of blocks whose output is wanted, without the final norm, as LLaVA reads the
            last block but one (later blocks run all the same); None: all, and the norm that the
            library applies to patches.
    After a forward:
        tokens (B, K, D): the patches that are left, as the encoder returns them; with gradient.
        keep_idx (B, K) int64: their numbers among all patches, ascending; ties to the lower index.
    Raises: TypeError for a model that is not supported; ValueError for arguments not as above, for
        features that are not finite, and for a forward with patch dropout, an attention mask or
        gradient checkpointing.
    Source: [paper, rank-guided collaborative token assignment]
    """

    def __init__(
        self,
        encoder: nn.Module,
        keep: Sequence[int | None],
        criteria: Sequence[str] | None = None,
        depth: int | None = None,
    ):
        self.encoder, self.family = find_encoder(encoder)
        name = type(self.encoder).__name__
        require(
            not self.family.dense,
            f"a {name} needs its dense grid and is not pruned inside: use encode",
            TypeError,
        )
        self.blocks = self.encoder.get_submodule(self.family.blocks)
        check_blocks(self.encoder, self.blocks, self.family)
        self.depth = len(self.blocks) if depth is None else depth
        require(
            1 <= self.depth <= len(self.blocks),
            f"depth must be 1 to {len(self.blocks)}, the blocks of a {name}, got {depth}",
        )
        check_keep(keep)
        self.keep = tuple(keep)
        self.points = pruning_points(self.depth, len(self.keep))
        self.criteria = default_criteria(len(self.keep)) if criteria is None else tuple(criteria)
        require(
            len(self.criteria) == len(self.keep)
            and {*self.criteria} <= {"similarity", "attention"},
            "criteria must be 'similarity' or 'attention' for each of the "
            f"{len(self.keep)} entries of keep, got {self.criteria}",
        )
        self.prefix, self.has_cls = self.family.prefix(self.encoder)
        self.tokens, self.keep_idx = None, None
        self._handles = []

    def __enter__(self) -> "EncoderPruner":
        require(not self._handles, "this EncoderPruner must not be entered twice at a time")
        self.tokens, self.keep_idx = None, None
        for i, block in enumerate(self.blocks):
            before = partial(self._before_block, i)
            self._handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        for b, i in enumerate(self.points):
            after = partial(self._after_part, b)
            self._handles.append(self.blocks[i].register_forward_hook(after, with_kwargs=True))
        return self

    def __exit__(self, kind, *_) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        ran = kind is not None or self.tokens is not None
        require(ran, "the encoder did not run inside the block, or was compiled before it")

    def _before_block(self, i: int, block: nn.Module, args: tuple, kwargs: dict) -> tuple:
        """Call a block with what belongs to the tokens that are left."""
        x = args[0]  # (B, P + N, D)
        rope = kwargs.get(ROPE)  # rotary table of the patches, (N, 2 d) or (1 or B, 1, N, 2 d)
        masks = [m for m in args[1:] if torch.is_tensor(m)]
        masks += [m for name, m in kwargs.items() if torch.is_tensor(m) and name != ROPE]
        if i == 0:
            self._start(x, masks)
        if not self._pruned:
            return args, kwargs
        # The masks hide nothing (see _start), but they are as long as the whole sequence was.
        args = (x, *(None if torch.is_tensor(m) else m for m in args[1:]))
        kwargs = {name: None if torch.is_tensor(m) else m for name, m in kwargs.items()}
        if rope is not None:
            table = rope.reshape(-1, *rope.shape[-2:])  # (1 or B, N, 2 d)
            kept_rows = table.take_along_dim(self.keep_idx[..., None], dim=1)  # (B, K, 2 d)
            kwargs[ROPE] = kept_rows[:, None]  # an axis for heads, or B would be read as heads
        return args, kwargs

    def _start(self, x: Tensor, masks: list[Tensor]) -> None:
        """A forward begins: all patches are there."""
        require(
            not any(hides_tokens(mask) for mask in masks) and not drops_patches(self.encoder),
            "the encoder must see all its patches: without padding or an attention mask, and "
            "with patch dropout switched off",
        )
        require(
            not reruns_blocks(self.encoder),
            "gradient checkpointing must be off: it runs the blocks again after they were pruned",
        )
        N = x.shape[1] - self.prefix
        self.keep_idx = torch.arange(N, device=x.device).expand(len(x), N)  # (B, N)
        self._pruned = False
        self.tokens = None

    def _after_part(self, b: int, block: nn.Module, args: tuple, kwargs: dict, output):
        """Stage 1 itself: score the patches that leave this block, and keep the best."""
        x = output[0] if isinstance(output, tuple) else output  # (B, P + N, D)
        P, N, K = self.prefix, x.shape[1] - self.prefix, self.keep[b]
        finite = x.sum(dtype=torch.float32).isfinite()  # one NaN or infinity spoils the sum
        require(
            bool(finite),
            f"features of {type(self.encoder).__name__} must be finite, got NaN or inf",
        )
        require(
            K is None or (type(K) is int and 1 <= K <= N),
            f"keep[{b}] must be None or an int, 1 to {N} here, got {K}",
        )
        if K is not None and K < N:
            with torch.no_grad():
                if self.criteria[b] == "similarity":
                    score = -mean_similarity(x[:, P:])  # (B, N)
                else:
                    score = self._attention_score(block, args[0], kwargs.get(ROPE))
                stay = highest(score, K)  # (B, K)
            patches = x[:, P:].take_along_dim(stay[..., None], dim=1)  # (B, K, D)
            x = torch.cat([x[:, :P], patches], dim=1)  # (B, P + K, D)
            self.keep_idx = self.keep_idx.gather(1, stay)
            self._pruned = True
        if b == len(self.keep) - 1:
            self.tokens = self._final_norm(x)[:, P:]  # (B, K, D)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    def _attention_score(self, block: nn.Module, x: Tensor, rope: Tensor | None) -> Tensor:
        """Attention in the block that has just run. -> (B, N)

        It is computed once more from the block's input, as fused attention gives no weights out;
        of CLS, one row.
        """
        queries = 1 if self.has_cls else x.shape[1]
        q, k, scale = self.family.queries_and_keys(block, x, queries, rope)
        return received_attention(q, k, scale)[:, self.prefix :]

    def _final_norm(self, x: Tensor) -> Tensor:
        """The norm that the library applies to all tokens after its last block, where it does."""
        norm, uses_all_blocks = self.family.norm, self.depth == len(self.blocks)
        if norm is None or not uses_all_blocks or pools_before_norm(self.encoder):
            return x
        return self.encoder.get_submodule(norm)(x)


def default_criteria(parts: int) -> tuple[str, ...]:
    """Similarity in the first part, where attention is still dense and unstable; then attention.

    Source: [paper, Findings 1 and 2]; the first part alone [our choice]
    """
    return ("similarity",) + ("attention",) * (parts - 1)


def check_keep(keep) -> None:
    require(
        isinstance(keep, Sequence),
        "keep must be a sequence, with an int or None for each pruning point, as (40, 30, 20), got "
        f"{keep!r}",
        TypeError,
    )


def pruning_points(blocks: int, parts: int) -> list[int]:
    """The last block of each part, from 0: of 24 blocks in 3 parts 7, 15, 23.  Source: [paper]"""
    require(
        1 <= parts <= blocks,
        f"there must be 1 to {blocks} pruning points, at most one for each block, got {parts}",
    )
    return [blocks * (b + 1) // parts - 1 for b in range(parts)]


def hides_tokens(mask: Tensor) -> bool:
    """Whether an attention mask hides a token: a bool mask by False, an additive one by below 0."""
    hidden = ~mask if mask.dtype == torch.bool else mask < 0
    return bool(hidden.any())


def drops_patches(encoder: nn.Module) -> bool:
    """Whether patch dropout, open_clip's or timm's, is active: it would change patches' numbers."""
    for module in encoder.modules():
        if type(module).__name__.startswith("PatchDropout") and module.training and module.prob > 0:
            return True
    return False


def reruns_blocks(encoder: nn.Module) -> bool:
    """Whether gradient checkpointing is on, in open_clip, timm or transformers."""
    if not torch.is_grad_enabled():
        return False
    for module in encoder.modules():
        for name in CHECKPOINTING:
            if module.training and getattr(module, name, False) is True:
                return True
    return False


# ----------------------------------------------------------------------------------- whole encoders


def encode(
    encoder: nn.Module,
    pixels: Tensor,
    keep: Sequence[int | None] = (None,),
    criteria: Sequence[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run one encoder under `EncoderPruner`, or a ConvNeXt under `encode_dense`.

    Args: encoder, keep, criteria: as in `EncoderPruner`; a ConvNeXt is pruned by the last entry of
        keep alone, by similarity; pixels: what the encoder's own preprocessing makes, (B, 3, H, W),
        or the flattened patches (B, N, 2 + 3 p^2) of a Pix2Struct.
    Returns: tokens (B, K, D) without CLS; keep_idx (B, K) int64, ascending.
    Raises: as `EncoderPruner`.
    """
    model, family = find_encoder(encoder)
    check_keep(keep)
    N = count_tokens(model, pixels)
    if not family.dense:
        with EncoderPruner(model, keep, criteria) as pruner:
            model(pixels)
        return pruner.tokens, pruner.keep_idx
    for b, K in enumerate(keep[:-1]):
        require(
            K is None or K == N,
            f"keep[{b}] must be None or {N} here, as a {type(model).__name__} is pruned at its "
            f"output only, got {K}",
        )
    return encode_dense(model, pixels, keep[-1])


def encode_dense(encoder: nn.Module, pixels: Tensor, keep: int | None) -> tuple[Tensor, Tensor]:
    """Run a timm ConvNeXt, which needs its dense grid, and prune its output by similarity.

    Args: pixels (B, 3, H, W) float; keep: K, 1 to h w, or None for all.
    Returns: tokens (B, K, D); keep_idx (B, K) int64, ascending.
    Source: [our choice]
    """
    grid = encoder.forward_features(pixels)  # (B, D, h, w)
    tokens = grid.flatten(2).mT  # (B, N, D), N = h w
    B, N, _ = tokens.shape
    finite = bool(tokens.sum(dtype=torch.float32).isfinite())
    require(finite, f"features of {type(encoder).__name__} must be finite, got NaN or inf")
    require(
        keep is None or (type(keep) is int and 1 <= keep <= N),
        f"keep must end in None or an int, 1 to {N} here, got {keep}",
    )
    if keep is None or keep == N:
        return tokens, torch.arange(N, device=tokens.device).expand(B, N)
    with torch.no_grad():
        keep_idx = highest(-mean_similarity(tokens), keep)  # (B, K)
    return tokens.take_along_dim(keep_idx[..., None], dim=1), keep_idx


def encode_all(
    encoders: Sequence[nn.Module],
    pixels: Sequence[Tensor],
    total: int | Sequence[int] | None,
    ranks: Tensor | Sequence[Sequence[float]] | None = None,
    strategy: str = "rank",
    criteria: Sequence[str] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """All encoders under one budget: `plan_budgets`, then `encode` for each.

    Args: encoders, pixels: C of each; the others as in `plan_budgets` and `EncoderPruner`.
    Returns: C tensors of tokens (B, n_l, D_l); C tensors keep_idx (B, n_l) int64.
    """
    require(
        len(pixels) == len(encoders),
        f"pixels must be one tensor for each of the {len(encoders)} encoders, got {len(pixels)}",
    )
    available = [count_tokens(encoder, x) for encoder, x in zip(encoders, pixels)]
    inside = [can_prune_inside(encoder) for encoder in encoders]
    plan = plan_budgets(total, ranks, available, inside, strategy)
    tokens, keep_idx = [], []
    for encoder, x, keep in zip(encoders, pixels, plan):
        kept_tokens, kept_places = encode(encoder, x, keep, criteria)
        tokens.append(kept_tokens)
        keep_idx.append(kept_places)
    return tokens, keep_idx


@torch.no_grad()
def expected_ranks(
    encoders: Sequence[nn.Module],
    batches: Iterable[Sequence[Tensor]],
    rtol: float = RTOL,
    points: int = POINTS,
) -> Tensor:
    """r_b^l: the mean rank over pictures of each encoder's patches at each pruning point, unpruned.

    Args: encoders: C models in eval mode; batches: each a list of the C encoders' pixels for the
        same pictures, 64 pictures or more in all; rtol: as in `feature_rank`; points: how many.
    Returns: (points, C) float64. A ConvNeXt has the rank of its output at every point.
    Source: [supplement B.1]
    """
    ranks = torch.zeros(points, len(encoders), dtype=torch.float64)
    pictures = 0
    for pixels in batches:
        pictures += len(pixels[0])
        for l, (encoder, x) in enumerate(zip(encoders, pixels)):
            for b, features in enumerate(features_at_points(encoder, x, points)):
                ranks[b, l] += feature_rank(features, rtol).sum().item()
    require(pictures > 0, "batches must hold at least one picture, got none")
    return ranks / pictures


def features_at_points(encoder: nn.Module, pixels: Tensor, points: int = POINTS) -> list[Tensor]:
    """The patches (B, N, D) after the last block of each part, nothing pruned, before any norm."""
    model, family = find_encoder(encoder)
    if family.dense:
        return [encode_dense(model, pixels, None)[0]] * points
    blocks = model.get_submodule(family.blocks)
    prefix, _ = family.prefix(model)
    features = []

    def note(block, args, output):
        x = output[0] if isinstance(output, tuple) else output
        features.append(x[:, prefix:])

    handles = [blocks[i].register_forward_hook(note) for i in pruning_points(len(blocks), points)]
    try:
        model(pixels)
    finally:
        for handle in handles:
            handle.remove()
    return features


def count_tokens(encoder: nn.Module, pixels: Tensor) -> int:
    """How many patches the encoder makes of pixels (B, 3, H, W) or flattened patches (B, N, _)."""
    h, w = patch_grid(encoder, pixels)
    return h * w


def patch_grid(encoder: nn.Module, pixels: Tensor) -> tuple[int, int]:
    """(h, w) patches; of a Pix2Struct by the row and column, from 1, in front of each patch."""
    model, family = find_encoder(encoder)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    reads_patches = len(convolutions) == 0  # a Pix2Struct
    dims = 3 if reads_patches else 4
    require(
        isinstance(pixels, Tensor),
        f"pixels of a {type(model).__name__} must be a tensor, got {type(pixels).__name__}",
        TypeError,
    )
    require(
        pixels.dim() == dims,
        f"pixels of a {type(model).__name__} must have {dims} dimensions, the first of them the "
        f"batch, got shape {tuple(pixels.shape)}",
    )
    if reads_patches:
        rows, columns = pixels[0, :, :2].amax(dim=0).long().tolist()
        return rows, columns
    if family.dense:
        stride = (model.feature_info[-1]["reduction"],) * 2
    else:  # a vision transformer cuts its patches by the one convolution that it has
        stride = convolutions[0].stride
    H, W = pixels.shape[-2:]
    return H // stride[0], W // stride[1]


def can_prune_inside(encoder: nn.Module) -> bool:
    """False for a ConvNeXt, which needs its dense grid up to the output."""
    return not find_encoder(encoder)[1].dense


# ------------------------------------------------------------------------- the libraries' own names
# A family is a row of `FAMILIES`: where a library keeps its blocks and its final norm, which tokens
# stand before the patches, and how a block makes q and k. tests/test_library_names.py tests them.

ROPE = "rope"  # the argument by which timm hands a rotary table to a block
CHECKPOINTING = ("grad_checkpointing", "gradient_checkpointing")  # timm, open_clip; transformers


@dataclass(frozen=True)
class Family:
    """What stage 1 must know of a class of encoders; a path is attributes joined by dots.

    blocks: path of the list of blocks. A block takes its tokens (B, P + N, D) as first argument,
        and gives them back, alone or first in a tuple. Its other tensors are masks, or `ROPE`.
    norm: path of the norm that the library applies to all tokens at the end; None where it does
        not, as transformers' CLIP norms its CLS alone.
    prefix: encoder -> (P, the number of tokens before the patches; whether the first is CLS).
    queries_and_keys: (block, x, Q, rope) -> q (B, H, Q, d) of the first Q tokens of the block's
        input x (B, P + N, D), k (B, H, P + N, d) of all, and the scale of their products.
    kinds: "block.attention" classes that queries_and_keys is written for, where a model may have
        others.
    dense: a ConvNeXt, which has none of these.
    """

    blocks: str = ""
    norm: str | None = None
    prefix: Callable | None = None
    queries_and_keys: Callable | None = None
    kinds: tuple[str, ...] = ()
    dense: bool = False


def cls_only(encoder) -> tuple[int, bool]:
    return 1, True


def no_prefix(encoder) -> tuple[int, bool]:
    return 0, False


def cls_and_registers(encoder) -> tuple[int, bool]:
    return 1 + encoder.config.num_register_tokens, True


def timm_prefix(encoder) -> tuple[int, bool]:
    return encoder.num_prefix_tokens, encoder.cls_token is not None


def split_heads(x: Tensor, d: int) -> Tensor:
    return x.unflatten(-1, (-1, d)).transpose(1, 2)  # (B, N, H d) -> (B, H, N, d)


def open_clip_queries_and_keys(
    block, x: Tensor, Q: int, rope: None
) -> tuple[Tensor, Tensor, float]:
    """open_clip's ResidualAttentionBlock: torch's own attention, q, k and v in one matrix."""
    attention, h = block.attn, block.ln_1(x)
    W_q, W_k, _ = attention.in_proj_weight.chunk(3)
    b_q, b_k, _ = attention.in_proj_bias.chunk(3)
    d = attention.head_dim
    q = split_heads(F.linear(h[:, :Q], W_q, b_q), d)  # (B, H, Q, d)
    k = split_heads(F.linear(h, W_k, b_k), d)  # (B, H, N, d)
    return q, k, d**-0.5


def timm_queries_and_keys(
    block, x: Tensor, Q: int, rope: Tensor | None
) -> tuple[Tensor, Tensor, float]:
    """timm's ViT and EVA blocks: q and k fused or apart, normed where there are norms, rotated."""
    attention, h = block.attn, block.norm1(x)
    d = attention.head_dim
    if attention.qkv is not None:
        W_q, W_k, _ = attention.qkv.weight.chunk(3)
        bias = attention.qkv.bias
        b_q, b_k, _ = (None, None, None) if bias is None else bias.chunk(3)
        q, k = F.linear(h[:, :Q], W_q, b_q), F.linear(h, W_k, b_k)
    else:
        q, k = attention.q_proj(h[:, :Q]), attention.k_proj(h)
    if getattr(attention, "q_bias", None) is not None:  # EVA's k has no bias
        q = q + attention.q_bias
    q = attention.q_norm(split_heads(q, d))  # (B, H, Q, d)
    k = attention.k_norm(split_heads(k, d))  # (B, H_kv, N, d)
    if rope is not None:
        P = x.shape[1] - rope.shape[-2]  # tokens before the patches have no position
        k = rotate_patches(k, rope, P, attention)
        if Q > 1:  # Q = 1 is CLS, which has none
            q = rotate_patches(q, rope, P, attention)
    heads_per_key = q.shape[1] // k.shape[1]  # several heads may share keys
    k = k.repeat_interleave(heads_per_key, dim=1)  # (B, H, N, d)
    return q, k, attention.scale


def rotate_patches(x: Tensor, rope: Tensor, P: int, attention) -> Tensor:
    from timm.layers import apply_rot_embed_cat

    rotated = apply_rot_embed_cat(x[:, :, P:], rope, half=attention.rotate_half)
    return torch.cat([x[:, :, :P], rotated], dim=2)  # (B, H, N, d)


def transformers_queries_and_keys(
    norm: str, attention: str, query: str, key: str, block, x: Tensor, Q: int, rope: None
) -> tuple[Tensor, Tensor, float]:
    """A block of transformers: its norm, attention, and what makes q and k, by their names."""
    h = block.get_submodule(norm)(x)
    attn = block.get_submodule(attention)
    d = attn.key_value_proj_dim if hasattr(attn, "key_value_proj_dim") else attn.head_dim
    scale = attn.scaling if hasattr(attn, "scaling") else attn.scale
    q = split_heads(attn.get_submodule(query)(h[:, :Q]), d)  # (B, H, Q, d)
    k = split_heads(attn.get_submodule(key)(h), d)  # (B, H, N, d)
    return q, k, scale


TIMM_KINDS = ("Block.Attention", "EvaBlock.EvaAttention", "EvaBlock.AttentionRope")
CLIP_NAMES = ("layer_norm1", "self_attn", "q_proj", "k_proj")
VIT_NAMES = ("layernorm_before", "attention", "q_proj", "k_proj")
DINO_NAMES = ("norm1", "attention", "q_proj", "k_proj")
PIX2STRUCT_NAMES = ("pre_attention_layer_norm", "attention", "query", "key")

FAMILIES = {  # by name, so that only the libraries of your encoders are needed
    "open_clip.transformer.VisionTransformer": Family(
        blocks="transformer.resblocks",
        norm="ln_post",
        prefix=cls_only,
        queries_and_keys=open_clip_queries_and_keys,
        kinds=("ResidualAttentionBlock.MultiheadAttention",),
    ),
    "timm.models.vision_transformer.VisionTransformer": Family(
        blocks="blocks",
        norm="norm",
        prefix=timm_prefix,
        queries_and_keys=timm_queries_and_keys,
        kinds=TIMM_KINDS,
    ),
    "timm.models.eva.Eva": Family(
        blocks="blocks",
        norm="norm",
        prefix=timm_prefix,
        queries_and_keys=timm_queries_and_keys,
        kinds=TIMM_KINDS,
    ),
    "timm.models.convnext.ConvNeXt": Family(dense=True),
    "transformers.models.clip.modeling_clip.CLIPVisionModel": Family(
        blocks="encoder.layers",
        prefix=cls_only,
        queries_and_keys=partial(transformers_queries_and_keys, *CLIP_NAMES),
    ),
    "transformers.models.siglip.modeling_siglip.SiglipVisionModel": Family(
        blocks="encoder.layers",
        norm="post_layernorm",
        prefix=no_prefix,
        queries_and_keys=partial(transformers_queries_and_keys, *CLIP_NAMES),
    ),
    "transformers.models.vit.modeling_vit.ViTModel": Family(
        blocks="layers",
        norm="layernorm",
        prefix=cls_only,
        queries_and_keys=partial(transformers_queries_and_keys, *VIT_NAMES),
    ),
    "transformers.models.dinov2.modeling_dinov2.Dinov2Model": Family(
        blocks="encoder.layer",
        norm="layernorm",
        prefix=cls_only,
        queries_and_keys=partial(transformers_queries_and_keys, *DINO_NAMES),
    ),
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers"
    ".Dinov2WithRegistersModel": Family(
        blocks="encoder.layer",
        norm="layernorm",
        prefix=cls_and_registers,
        queries_and_keys=partial(transformers_queries_and_keys, *DINO_NAMES),
    ),
    "transformers.models.pix2struct.modeling_pix2struct.Pix2StructVisionModel": Family(
        blocks="encoder.layer",
        norm="layernorm",
        prefix=no_prefix,
        queries_and_keys=partial(transformers_queries_and_keys, *PIX2STRUCT_NAMES),
    ),
}


def find_encoder(model: nn.Module) -> tuple[nn.Module, Family]:
    """The first module of a class of `FAMILIES`, the model itself or one inside, and its row.

    Raises: TypeError where there is none.
    """
    for module in model.modules():
        for cls in type(module).__mro__:
            name = f"{cls.__module__}.{cls.__qualname__}"
            if name in FAMILIES:
                return module, FAMILIES[name]
    raise TypeError(
        f"encoder must be or hold one of {', '.join(FAMILIES)}, got {type(model).__name__}: "
        "for another, add a row to FAMILIES"
    )


def check_blocks(encoder: nn.Module, blocks: Iterable[nn.Module], family: Family) -> None:
    """TypeError for variants of a class whose q and k the family's function would get wrong."""
    name = type(encoder).__name__
    found = {block_kind(block) for block in blocks}
    require(
        not family.kinds or found <= {*family.kinds},
        f"blocks of {name} must be {family.kinds}, got {sorted(found)}",
        TypeError,
    )
    one_table = not getattr(encoder, "rope_mixed", False)
    require(one_table, f"{name} must have one rotary table, got 'mixed'", TypeError)


def pools_before_norm(encoder: nn.Module) -> bool:
    """Whether an open_clip model norms only what it pools from the patches, and not the patches."""
    if not hasattr(encoder, "final_ln_after_pool"):
        return False
    return encoder.final_ln_after_pool or encoder.attn_pool is not None


def block_kind(block: nn.Module) -> str:
    """The class of a block, and of its attention where it has exactly one: "Block.Attention"."""
    if not hasattr(block, "attn"):  # timm's parallel blocks have several
        return type(block).__name__
    return f"{type(block).__name__}.{type(block.attn).__name__}"


def main() -> None:
    """What the libraries' own models, with random weights, keep of 300 tokens, by strategy."""
    import timm
    from open_clip.transformer import VisionTransformer
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    clip = CLIPVisionConfig(num_hidden_layers=3, image_size=192, patch_size=16)
    encoders = [
        VisionTransformer(96, 8, width=96, layers=3, heads=6, mlp_ratio=2.0),
        CLIPVisionModel(clip),
        timm.create_model("eva02_tiny_patch14_224", img_size=168),
        timm.create_model("vit_base_patch16_siglip_224", img_size=192, depth=3),
        timm.create_model("convnext_atto"),
    ]
    sides = [96, 192, 168, 192, 384]
    pictures = F.interpolate(torch.rand(4, 3, 7, 7), 80)  # 7 x 7 coloured squares, not mere noise
    pixels = [F.interpolate(pictures, side, mode="bilinear") for side in sides]

    ranks = expected_ranks([encoder.eval() for encoder in encoders], [pixels])
    for l, encoder in enumerate(encoders):
        tokens = count_tokens(encoder, pixels[l])
        print(f"{type(encoder).__name__:>17}: {tokens} tokens, ranks {ranks[:, l].tolist()}")
    for strategy in STRATEGIES:
        tokens, _ = encode_all(encoders, pixels, 300, ranks, strategy)
        print(f"{strategy:>17}: {[x.shape[1] for x in tokens]}")


if __name__ == "__main__":
    main()
