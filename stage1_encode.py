r"""METEOR stage 1: prune the tokens of C vision encoders while they encode, each to its own count.

Paper: METEOR (ICCV 2025, https://arxiv.org/abs/2507.20842), rank-guided collaborative token
assignment; supplement A and B.1. The blocks of an encoder are cut into three parts, as equal as can
be. Tokens are pruned after the last block of each part b = 0, 1, 2.

Which tokens stay:

    R_i   = cos(x_i, 1/N \sum_j x_j)
        redundancy, in the shallow part: tokens similar to the mean token are dropped
    s_i   = 1/H \sum_h softmax(q_cls^h . k^h / sqrt(d))_i
        score, in the deeper parts: tokens that CLS attends to are kept

How many, for a total of k_b tokens over all encoders:

    k_b^l = k_b r_b^l / \sum_m r_b^m
        encoder l keeps a part of them in proportion to r_b^l, the expected rank of its features

q and k are those of the block, heard while it calls its own attention. So its norms, adapters,
quantised weights and rotary embedding are already applied.

In:   encoders of open_clip, timm and transformers, unmodified; for each the pixels that its own
      preprocessing makes; how many tokens to keep.
Out:  per encoder, tokens (B, K, D) without CLS, and keep_idx (B, K): which patches they are.

    ranks = expected_ranks(encoders, batches)  # once, on some pictures; store them
    features, keep_idx = encode_all(encoders, pixels, total=1193, ranks=ranks)

or one encoder, to counts that you choose:

    with EncoderPruner(encoder, keep=(300, 200, 100)) as pruner:
        encoder(pixels)
    pruner.tokens, pruner.keep_idx  # (B, 100, D), (B, 100)

Change here: `EncoderPruner.score` is the one method that a rule of your own overrides;
`feature_rank` and `RTOL` (what rank means), `allocate_budget` (how encoders share), `FAMILIES` (one
more encoder).

Not from the paper: which parts count as shallow (the first alone). Rank counts the singular values
above RTOL times the largest. Shares are rounded by largest remainder, and lie between one token and
all there are. Totals before the last fall geometrically unless given. Where there is no CLS, the
score is the mean attention from all tokens. A ConvNet needs its dense grid, and is pruned at its
output only. Tested with open_clip 3.0 to 3.3, timm 1.0.30 and 31, transformers 5.18 to 5.24.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Below this share of the largest singular value, rounding noise inflates the rank: at 1e-3 all
# encoders have nearly full rank. At 1e-1 the rank varies by a third from picture to picture.
RTOL = 1e-2
POINTS = 3  # pruning points of the paper: after each third of the blocks


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


def received_attention(q: Tensor, k: Tensor, scale: float, chunk: int = 64) -> Tensor:
    r"""s_i = 1/H \sum_h softmax(scale q^h K^h)_i, averaged over the queries that are given.

    Args:
        q (B, H, Q, d) float: the query of CLS alone (Q = 1), or of all tokens (Q = N).
        k (B, H_kv, N, d) float: keys of all tokens; H_kv divides H, as heads may share keys.
        scale: factor of q . k, as the encoder's own attention has it.
        chunk: queries of a head computed at a time, so that no N x N matrix is held.
    Returns: score (B, N) float32, 0..1; over all tokens a row sums to 1; the highest stay.
    Source: [paper, Finding 2]; all tokens as queries where there is no CLS [our choice]
    """
    B, H_kv, _, d = k.shape
    q = q.float().reshape(B, H_kv, -1, d)  # heads that share keys: more queries of those keys
    k_columns = k.float().mT  # (B, H_kv, d, N)
    total = 0
    with torch.autocast(q.device.type, enabled=False):
        for some in q.split(chunk, dim=2):
            attention = (scale * some @ k_columns).softmax(dim=-1)  # (B, H_kv, chunk, N)
            total = total + attention.sum(dim=(1, 2))  # (B, N)
    return total / (H_kv * q.shape[2])


def highest(score: Tensor, K: int) -> Tensor:
    """Places of the K highest scores of each row, ascending; ties go to the lower place.

    Args: score (B, N) float. Returns: (B, K) int64.
    """
    order = score.argsort(dim=1, descending=True, stable=True)  # (B, N)
    return order[:, :K].sort(dim=1).values


def take(tokens: Tensor, keep_idx: Tensor) -> Tensor:
    """The tokens (B, K, D) at places keep_idx (B, K) of tokens (B, N, D)."""
    rows = torch.arange(len(tokens), device=tokens.device)[:, None]
    return tokens[rows, keep_idx]  # whole rows, several times as fast as take_along_dim


# ----------------------------------------------------------------------- how many tokens each keeps


def feature_rank(tokens: Tensor, rtol: float = RTOL) -> Tensor:
    r"""#{j: \sigma_j > rtol \sigma_max}: how many directions the tokens really use.

    The singular values are the roots of the eigenvalues of the smaller Gram matrix, which is
    faster, and precise down to an rtol of 1e-6.

    Args: tokens (B, N, D) float.
    Returns: (B,) int64, 0..min(N, D).
    Source: [paper]; counting by rtol [our choice]
    """
    A = tokens.double()
    N, D = A.shape[1:]
    gram = A @ A.mT if N <= D else A.mT @ A  # (B, min(N, D), min(N, D))
    eigenvalues = torch.linalg.eigvalsh(gram)  # ascending; rounding leaves some just below 0
    sigma = eigenvalues.clamp(min=0).sqrt()
    return (sigma > rtol * sigma[:, -1:]).sum(dim=1)


def allocate_budget(total: int, ranks: Sequence[float], available: Sequence[int]) -> list[int]:
    r"""k^l = k r^l / \sum_m r^m: share `total` tokens among encoders in proportion to their ranks.

    No encoder gets more than it has, and each gets at least one token. An encoder that meets such a
    bound keeps the bound, and the others share what is left by the same rule. Ten tokens, ranks
    6, 3, 1, four tokens in the first encoder: the shares would be 6, 3, 1; the first keeps 4, and
    the others share 6 as 3 : 1, which is 4.5 and 1.5; rounded, 4, 5, 1.

    Args:
        total: k, from C to sum(available).
        ranks: r^l, C positive numbers; equal ones share equally.
        available: tokens that each encoder has.
    Returns: C whole numbers, 1 <= k^l <= available[l], whose sum is exactly `total`.
    Raises: ValueError for a total out of range, or ranks that are not C positive numbers.
    Source: [paper, Eq. of k_b^l]; bounds and rounding [our choice]
    """
    C = len(available)
    require(
        C <= total <= sum(available),
        f"total must be {C}, one token for each encoder, to all of {[*available]}, got {total}",
    )
    require(
        len(ranks) == C and all(0 < r < math.inf for r in ranks),
        f"ranks must be {C} positive numbers, one for each encoder, got {[*ranks]}",
    )
    weights = [Fraction(float(r)) for r in ranks]  # exact, so that equal shares are equal
    shares = {}  # encoder -> its share, once that is settled
    waiting = set(range(C))
    while waiting:
        left = total - sum(shares.values())
        weight_sum = sum(weights[l] for l in waiting)
        wanted = {l: left * weights[l] / weight_sum for l in waiting}
        bounded = {l: min(max(wanted[l], 1), available[l]) for l in waiting}
        too_much = sum(bounded.values()) - left
        if too_much > 0:  # the next round shares less: those raised to 1 would stay at 1
            settled = {l for l in waiting if bounded[l] > wanted[l]}
        elif too_much < 0:  # the next round shares more: those cut to all they have would stay so
            settled = {l for l in waiting if bounded[l] < wanted[l]}
        else:  # no share was out of bounds, or those above and below make up for each other
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
) -> list[tuple[int, ...]]:
    """How many tokens each encoder keeps at each pruning point.

    Args:
        totals: k_2, the tokens of all encoders together at their output; or (k_0, k_1, k_2), one
            total for each point; or None to keep all. With k_2 alone, the totals before it fall by
            the same factor from point to point.
        ranks: (points, C), as `expected_ranks` gives them; None: all encoders share equally.
        available: C counts of tokens, unpruned.
        inside: C bool: whether an encoder can be pruned before its output. Only the last total is
            for all encoders; k_0 and k_1 are shared among those that can.
    Returns: for each encoder its counts at the points, never rising; the last ones sum to k_2. What
        an encoder has lost at one point it cannot get back at the next, whatever its rank is there.
    Raises: ValueError for totals out of range, or ranks of another shape.
    Source: [paper]; totals that fall geometrically [our choice]
    """
    C = len(available)
    one_for_each_point = isinstance(totals, (list, tuple))
    if ranks is None:
        ranks = [[1.0] * C] * (len(totals) if one_for_each_point else POINTS)
    elif one_for_each_point:
        rows = len(totals)
        require(len(ranks) == rows, f"ranks must have {rows} rows, one for each of {totals}")
    points = len(ranks)
    if totals is None:
        return [(n,) * points for n in available]
    prunable = [l for l in range(C) if inside[l]]
    if isinstance(totals, int):
        last = allocate_budget(totals, ranks[-1], available)
        totals = geometric_totals(totals, last, available, prunable, points)
    left = list(available)
    plan = []
    for b in range(points):
        sharing = list(range(C)) if b == points - 1 else prunable
        if sharing:
            point_ranks = [ranks[b][l] for l in sharing]
            still_there = [left[l] for l in sharing]
            counts = allocate_budget(totals[b], point_ranks, still_there)
            for l, count in zip(sharing, counts):
                left[l] = count
        plan.append(tuple(left))
    return list(zip(*plan))


def geometric_totals(
    total: int,
    last: Sequence[int],
    available: Sequence[int],
    prunable: Sequence[int],
    points: int,
) -> list[int]:
    """One total for each point: of the prunable encoders at all points but the last, where they
    fall by the same factor each time; of all encoders, `total`, at the last.
    """
    start = sum(available[l] for l in prunable)
    end = sum(last[l] for l in prunable)
    fall = end / max(start, 1)
    return [round(start * fall ** ((b + 1) / points)) for b in range(points - 1)] + [total]


# ------------------------------------------------------------------------- the libraries' own names


class Family(NamedTuple):
    """What stage 1 must know of a class of encoders; a path is attributes joined by dots.

    blocks: path of the list of blocks. A block takes its tokens (B, P + N, D) as first argument,
        and gives them back, alone or first in a tuple.
    norm: path of the norm that the library applies to all tokens at the end; None where it does
        not, as transformers' CLIP norms its CLS alone.
    prefix: encoder -> (P, the number of tokens before the patches; whether the first is CLS).
    """

    blocks: str
    norm: str | None
    prefix: Callable[[nn.Module], tuple[int, bool]]


def cls_only(encoder: nn.Module) -> tuple[int, bool]:
    return 1, True


def no_prefix(encoder: nn.Module) -> tuple[int, bool]:
    return 0, False


def timm_prefix(encoder: nn.Module) -> tuple[int, bool]:
    return encoder.num_prefix_tokens, encoder.cls_token is not None


def cls_and_registers(encoder: nn.Module) -> tuple[int, bool]:
    return 1 + encoder.config.num_register_tokens, True


# library and class -> family; by name, so that only the libraries of your encoders are needed
FAMILIES = {
    "open_clip.VisionTransformer": Family("transformer.resblocks", "ln_post", cls_only),
    "timm.VisionTransformer": Family("blocks", "norm", timm_prefix),
    "timm.Eva": Family("blocks", "norm", timm_prefix),
    "transformers.CLIPVisionModel": Family("encoder.layers", None, cls_only),
    "transformers.SiglipVisionModel": Family("encoder.layers", "post_layernorm", no_prefix),
    "transformers.ViTModel": Family("layers", "layernorm", cls_only),
    "transformers.Dinov2Model": Family("encoder.layer", "layernorm", cls_only),
    "transformers.Dinov2WithRegistersModel": Family(
        "encoder.layer", "layernorm", cls_and_registers
    ),
    "transformers.Pix2StructVisionModel": Family("encoder.layer", "layernorm", no_prefix),
}
CONVNETS = ("timm.ConvNeXt",)  # need their dense grid, and are pruned at their output


def find_class(model: nn.Module, names: Iterable[str]) -> tuple[nn.Module, str] | None:
    """Find the first module, the model included, whose class is in `names`; and that name."""
    for module in model.modules():
        for cls in type(module).__mro__:
            name = f"{cls.__module__.split('.')[0]}.{cls.__name__}"
            if name in names:
                return module, name
    return None


def find_encoder(model: nn.Module) -> nn.Module:
    """The encoder itself, or the one that a model holds.

    Raises: TypeError where there is none of `FAMILIES` or `CONVNETS`.
    """
    found = find_class(model, [*FAMILIES, *CONVNETS])
    require(
        found is not None,
        f"encoder must be or hold one of {', '.join([*FAMILIES, *CONVNETS])}, got "
        f"{type(model).__name__}: for another, add a row to FAMILIES",
        TypeError,
    )
    return found[0]


def can_prune_inside(encoder: nn.Module) -> bool:
    """False for a ConvNeXt, which needs its dense grid up to the output."""
    return find_class(find_encoder(encoder), CONVNETS) is None


# -------------------------------------------------------------------------- listening to a block


SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


class Spy(TorchFunctionMode):
    """Hears the attention that runs inside, as all libraries make it with functions of torch.

    heard: for each attention that ran, a function Q -> (B, P + N) float32: what every token
        received from the first Q tokens, mean over heads. Nothing is computed until it is called,
        as a rule may not want it.
    """

    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:  # timm, and transformers on sdpa
            q, k = args[:2]  # (B, H, P + N, d), (B, H_kv, P + N, d)
            bias = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            none = bias is None or not alters_attention(bias)
            require(none, "attention with a bias of its own is not supported", TypeError)
            scale = kwargs.get("scale") or q.shape[-1] ** -0.5
            self.heard.append(lambda Q: received_attention(q[:, :, :Q], k, scale))
        elif func is F.multi_head_attention_forward:  # open_clip: torch's own module
            x, _, _, _, heads, weight, bias = args[:7]  # x (P + N, B, D)
            self.heard.append(partial(packed_attention, x, heads, weight, bias))
        elif func in SOFTMAX and output.dim() == 4:  # eager: its weights, (B, H, P + N, P + N)
            self.heard.append(lambda Q: output[:, :, :Q].float().mean(dim=(1, 2)))
        return output


def packed_attention(x: Tensor, heads: int, weight: Tensor, bias: Tensor | None, Q: int) -> Tensor:
    """What tokens x (S, B, D) receive from the first Q in torch's own attention module. (B, S)

    It projects inside one function, so its q and k cannot be heard, and are projected again.
    """
    W_q, W_k, _ = weight.chunk(3)
    b_q, b_k, _ = (None, None, None) if bias is None else bias.chunk(3)
    q = F.linear(x[:Q], W_q, b_q).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)  # (B, H, Q, d)
    k = F.linear(x, W_k, b_k).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)  # (B, H, S, d)
    return received_attention(q, k, q.shape[-1] ** -0.5)


# -------------------------------------------------------------------------------- inside an encoder

ACTIVE = set()  # ids of the encoders that are in a pruner's block


class EncoderPruner:
    """Prunes an encoder's tokens inside a `with` block, by hooks; after it the model is as it was.

    Modifications: the blocks are cut into as many equal parts as `keep` has entries. After the last
    block of a part, the dropped patches leave the sequence; tokens in front of the patches (CLS,
    registers) always stay. Blocks that follow get the rotary positions of the tokens that are left.

    Args:
        encoder: a model of `FAMILIES`, or one that holds such a model, as a LLaVA does.
        keep: tokens left after each part, never rising; None keeps all that are there. (40,) prunes
            once, after all blocks, by similarity; (None, None, 40) once, there, by attention.
        depth: stop after this many blocks, and return their output without the final norm: LLaVA
            reads the last block but one. (Later blocks still run.) None: all blocks, and the final
            norm where the library applies it to patches.
    After a forward:
        tokens (B, K, D): the patches that are left, as the encoder returns them; with gradient.
        keep_idx (B, K) int64: their numbers among all patches, ascending; ties to the lower index.
    Raises: TypeError for a model that is not supported; ValueError for a count out of range, and
        for a forward with padding or gradient checkpointing.
    Source: [paper, rank-guided collaborative token assignment]
    """

    def __init__(self, encoder: nn.Module, keep: Sequence[int | None], depth: int | None = None):
        found = find_class(encoder, FAMILIES)
        require(
            found is not None,
            f"encoder must be or hold one of {', '.join(FAMILIES)}, got {type(encoder).__name__}: "
            "a ConvNeXt is pruned by encode, for another encoder add a row to FAMILIES",
            TypeError,
        )
        self.encoder, name = found
        family = FAMILIES[name]
        self.blocks = self.encoder.get_submodule(family.blocks)
        self.norm = None
        if family.norm is not None and depth in (None, len(self.blocks)):
            self.norm = self.encoder.get_submodule(family.norm)
        self.prefix, self.has_cls = family.prefix(self.encoder)
        require(
            isinstance(keep, Iterable),
            f"keep must hold a count for each pruning point, as (None, None, 40), got {keep}",
            TypeError,
        )
        self.keep = tuple(keep)
        depth = len(self.blocks) if depth is None else depth
        require(depth <= len(self.blocks), f"depth must be at most {len(self.blocks)}, got {depth}")
        self.points = pruning_points(depth, len(self.keep))

    def score(self, part: int, tokens: Tensor, attention: Callable[[], Tensor]) -> Tensor:
        """The rule: the tokens of highest score stay.

        Similarity in the first part, where attention is still dense and unstable; then attention.

        Args:
            part: 0-indexed, which of the parts has just ended.
            tokens (B, N, D) float: the patches that leave its last block.
            attention: call it for (B, N) float32, the attention that each patch has received in
                that block, from CLS, or from all tokens where there is no CLS; mean over heads.
        Returns: score (B, N) float.
        Source: [paper, Findings 1 and 2]; the first part alone [our choice]
        """
        if part == 0:
            return -mean_similarity(tokens)
        return attention()

    def __enter__(self) -> "EncoderPruner":
        # One pruner at a time, as the hooks of two would mix.
        free = id(self.encoder) not in ACTIVE
        require(free, "this encoder is in another pruner's block, or another thread's: leave it")
        ACTIVE.add(id(self.encoder))
        self.tokens, self.keep_idx, self._spy = None, None, None
        self._handles = []
        for i, block in enumerate(self.blocks):
            before = partial(self._before_block, i)
            self._handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        for b, i in enumerate(self.points):
            after = partial(self._after_part, b)
            self._handles.append(self.blocks[i].register_forward_hook(after, always_call=True))
        if self.norm is not None:
            self._handles.append(self.norm.register_forward_hook(self._after_norm))
        return self

    def __exit__(self, kind, *_) -> None:
        ACTIVE.remove(id(self.encoder))
        for handle in self._handles:
            handle.remove()
        self._stop_listening()  # Ctrl-C in a block skips the hooks after it
        ran = kind is not None or self.tokens is not None
        require(ran, "the encoder did not run inside the block, or was compiled before it")

    def _before_block(self, i: int, block: nn.Module, args: tuple, kwargs: dict) -> tuple:
        """Call a block with what belongs to the tokens that are left; listen where it counts."""
        x = args[0]  # (B, P + N, D)
        rope = kwargs.get("rope")  # timm's rotary tables of the patches, (..., N, 2 d)
        if i == 0:
            masks = [m for m in (*args[1:], *kwargs.values()) if isinstance(m, Tensor)]
            self._start(x, [m for m in masks if m is not rope])
        if self.keep_idx.shape[1] < self.N:
            # The masks hide nothing (see _start), and no longer fit the shorter sequence.
            args = (x, *(None if isinstance(m, Tensor) else m for m in args[1:]))
            kwargs = {name: None if isinstance(m, Tensor) else m for name, m in kwargs.items()}
            if rope is not None:
                table = rope.reshape(-1, *rope.shape[-2:])  # (1 or H, N, 2 d)
                kwargs["rope"] = table[:, self.keep_idx].transpose(0, 1)  # (B, 1 or H, K, 2 d)
        K = self.keep[self.points.index(i)] if i in self.points else None
        if K is not None and K < self.keep_idx.shape[1]:
            self._spy = Spy()
            self._spy.__enter__()
        return args, kwargs

    def _start(self, x: Tensor, masks: list[Tensor]) -> None:
        """A forward begins: all patches are there."""
        require(
            not any(alters_attention(mask) for mask in masks),
            "the encoder must see all its patches, without padding or an attention mask",
        )
        require(
            not reruns_blocks(self.encoder),
            "gradient checkpointing must be off: it runs the blocks again after they were pruned",
        )
        require(
            not drops_patches(self.encoder),
            "patch dropout must be off: keep_idx would not say which patches are left",
        )
        self.N = x.shape[1] - self.prefix
        self.keep_idx = torch.arange(self.N, device=x.device).expand(len(x), self.N)  # (B, N)
        self.tokens = None

    def _after_part(self, b: int, block: nn.Module, args: tuple, output):
        """Stage 1 itself: score the patches that leave this block, and keep the best."""
        heard = self._stop_listening()
        if output is None:  # the block has raised
            return None
        x = output[0] if isinstance(output, tuple) else output  # (B, P + N, D)
        P, N, K = self.prefix, x.shape[1] - self.prefix, self.keep[b]
        require(
            K is None or 1 <= K <= N, f"keep[{b}] must be None or an int, 1 to {N} here, got {K}"
        )
        if K is not None and K < N:
            with torch.no_grad():
                score = self.score(b, x[:, P:], partial(self._attention, heard))  # (B, N)
                shape = (len(x), N)
                require(score.shape == shape, f"score must return a tensor of shape {shape}")
                stay = highest(score, K)  # (B, K)
            x = torch.cat([x[:, :P], take(x[:, P:], stay)], dim=1)  # (B, P + K, D)
            self.keep_idx = self.keep_idx.gather(1, stay)
        if b == len(self.keep) - 1:
            self.tokens = x[:, P:]  # (B, K, D)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    def _stop_listening(self) -> list[Callable[[int], Tensor]]:
        """Close the spy, where one is open; what it has heard."""
        spy, self._spy = self._spy, None
        if spy is None:
            return []
        spy.__exit__(None, None, None)
        return spy.heard

    def _attention(self, heard: list[Callable[[int], Tensor]]) -> Tensor:
        """(B, N): the attention that each patch received in the block that has just run."""
        require(
            len(heard) > 0,
            f"no attention was heard in a block of {type(self.encoder).__name__}: it must call "
            "torch's scaled_dot_product_attention, multi_head_attention_forward or softmax",
            TypeError,
        )
        x_length = self.prefix + self.keep_idx.shape[1]
        queries = 1 if self.has_cls else x_length
        each = [attention(queries) for attention in heard]  # a parallel block has several
        return (sum(each) / len(each))[:, self.prefix :]

    def _after_norm(self, norm: nn.Module, args: tuple, output: Tensor) -> None:
        """Where the library norms all tokens at the end, these are what the encoder returns."""
        if self.tokens is None:
            return
        B, K, D = self.tokens.shape
        if output.shape == (B, self.prefix + K, D):  # and not what the library has pooled
            self.tokens = output[:, self.prefix :]


def pruning_points(blocks: int, parts: int) -> list[int]:
    """The last block of each part, from 0: of 24 blocks in 3 parts 7, 15, 23.  Source: [paper]"""
    require(
        1 <= parts <= blocks,
        f"there must be 1 to {blocks} pruning points, at most one for each block, got {parts}",
    )
    return [blocks * (b + 1) // parts - 1 for b in range(parts)]


def alters_attention(mask: Tensor) -> bool:
    """Whether a mask does anything: an additive one by values other than 0, others by hiding."""
    altered = mask != 0 if mask.is_floating_point() else mask == 0
    return bool(altered.any())


def reruns_blocks(encoder: nn.Module) -> bool:
    """Whether gradient checkpointing is on, in open_clip, timm or transformers."""
    if not torch.is_grad_enabled():
        return False
    return any(
        getattr(module, "grad_checkpointing", False) is True  # open_clip, timm: in eval mode too
        or (module.training and getattr(module, "gradient_checkpointing", False) is True)
        for module in encoder.modules()
    )


def drops_patches(encoder: nn.Module) -> bool:
    """Whether open_clip's or timm's patch dropout is on."""
    return any(
        module.training and type(module).__name__.startswith("PatchDropout") and module.prob > 0
        for module in encoder.modules()
    )


# ----------------------------------------------------------------------------------- whole encoders


def encode(
    encoder: nn.Module,
    pixels: Tensor,
    keep: Sequence[int | None] = (None,),
    pruner: type[EncoderPruner] = EncoderPruner,
) -> tuple[Tensor, Tensor]:
    """Run one encoder under a pruner, or a ConvNeXt under `encode_dense`.

    Args: pixels: what the encoder's own preprocessing makes, (B, 3, H, W), or the flattened patches
        (B, N, 2 + 3 p^2) of a Pix2Struct; keep: as in `EncoderPruner`; a ConvNeXt goes by the last
        entry alone; pruner: `EncoderPruner`, or a subclass with a rule of its own, which a ConvNeXt
        does not follow.
    Returns: tokens (B, K, D) without CLS; keep_idx (B, K) int64, ascending.
    Raises: as `EncoderPruner`.
    """
    model = find_encoder(encoder)
    if not can_prune_inside(model):
        return encode_dense(model, pixels, keep[-1])
    with pruner(model, keep) as pruned:
        model(pixels)
    return pruned.tokens, pruned.keep_idx


def encode_dense(convnet: nn.Module, pixels: Tensor, keep: int | None) -> tuple[Tensor, Tensor]:
    """Run a timm ConvNeXt, which needs its dense grid, and prune its output by similarity.

    Args: pixels (B, 3, H, W) float; keep: K, 1 to h w, or None for all.
    Returns: tokens (B, K, D); keep_idx (B, K) int64, ascending.
    Source: [our choice]
    """
    tokens = dense_tokens(convnet, pixels)  # (B, N, D)
    N = tokens.shape[1]
    require(
        keep is None or 1 <= keep <= N,
        f"keep must end in None or an int, 1 to {N} here, got {keep}",
    )
    with torch.no_grad():
        keep_idx = highest(-mean_similarity(tokens), N if keep is None else keep)  # (B, K)
    return take(tokens, keep_idx), keep_idx


def dense_tokens(convnet: nn.Module, pixels: Tensor) -> Tensor:
    """What a timm ConvNeXt makes of pixels: (B, h w, D), in raster order."""
    grid = convnet.forward_features(pixels)  # (B, D, h, w)
    return grid.flatten(2).mT


def encode_all(
    encoders: Sequence[nn.Module],
    pixels: Sequence[Tensor],
    total: int | Sequence[int] | None,
    ranks: Tensor | Sequence[Sequence[float]] | None = None,
    pruner: type[EncoderPruner] = EncoderPruner,
) -> tuple[list[Tensor], list[Tensor]]:
    """All encoders under one budget: `plan_budgets`, then `encode` for each.

    Args: encoders, pixels: C of each; total, ranks: as in `plan_budgets`; pruner: as in `encode`.
    Returns: C tensors of tokens (B, n_l, D_l); C tensors keep_idx (B, n_l) int64.
    """
    require(
        len(pixels) == len(encoders),
        f"pixels must be one tensor for each of the {len(encoders)} encoders, got {len(pixels)}",
    )
    available = [count_tokens(encoder, x) for encoder, x in zip(encoders, pixels)]
    inside = [can_prune_inside(encoder) for encoder in encoders]
    plan = plan_budgets(total, ranks, available, inside)
    results = [encode(*each, pruner) for each in zip(encoders, pixels, plan)]
    return [tokens for tokens, _ in results], [keep_idx for _, keep_idx in results]


@torch.no_grad()
def expected_ranks(
    encoders: Sequence[nn.Module],
    batches: Iterable[Sequence[Tensor]],
    points: int = POINTS,
) -> Tensor:
    """r_b^l: the mean rank over pictures of each encoder's patches at each pruning point, unpruned.

    Args: encoders: C models in eval mode; batches: each a list of the C encoders' pixels for the
        same pictures, 64 pictures or more in all; points: how many.
    Returns: (points, C) float64. A ConvNeXt has the rank of its output at every point.
    Source: [supplement B.1]
    """
    ranks = torch.zeros(points, len(encoders), dtype=torch.float64)
    pictures = 0
    for pixels in batches:
        pictures += len(pixels[0])
        for l, (encoder, x) in enumerate(zip(encoders, pixels)):
            for b, features in enumerate(features_at_points(encoder, x, points)):
                ranks[b, l] += feature_rank(features).sum().item()
    require(pictures > 0, "batches must hold at least one picture, got none")
    return ranks / pictures


def features_at_points(encoder: nn.Module, pixels: Tensor, points: int = POINTS) -> list[Tensor]:
    """The patches (B, N, D) after the last block of each part, nothing pruned, before any norm."""
    if not can_prune_inside(encoder):
        return [dense_tokens(find_encoder(encoder), pixels)] * points
    features = []

    def note(block, args, output):
        x = output[0] if isinstance(output, tuple) else output
        features.append(x[:, pruner.prefix :])

    with EncoderPruner(encoder, [None] * points) as pruner:
        pruner._handles += [pruner.blocks[i].register_forward_hook(note) for i in pruner.points]
        pruner.encoder(pixels)
    return features


COUNTS = WeakKeyDictionary()  # encoder -> {shape of a picture: patches that it makes of it}


def count_tokens(encoder: nn.Module, pixels: Tensor) -> int:
    """How many patches the encoder makes of pixels; each shape is counted once.

    Args: pixels: as in `encode`.
    """
    counts, shape = COUNTS.setdefault(encoder, {}), pixels.shape[1:]
    if shape not in counts:
        counts[shape] = count_anew(encoder, pixels)
    return counts[shape]


class Counted(Exception):
    """Leaves an encoder whose patches have been counted."""


@torch.no_grad()
def count_anew(encoder: nn.Module, pixels: Tensor) -> int:
    """The patches that reach the encoder's first block: it runs up to there, on one picture.

    A ConvNeXt runs to its end, on an empty batch.
    """
    if not can_prune_inside(encoder):
        return dense_tokens(find_encoder(encoder), pixels[:0]).shape[1]

    def leave(block, args):
        raise Counted

    with contextlib.suppress(Counted), EncoderPruner(encoder, [None]) as pruner:
        pruner._handles.append(pruner.blocks[0].register_forward_pre_hook(leave))
        pruner.encoder(pixels[:1])
    return pruner.N


@torch.no_grad()
def main() -> None:
    """Prune five randomly initialised models of the libraries to 300 tokens in total."""
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
    pictures = F.interpolate(torch.rand(2, 3, 7, 7), 80)  # 7 x 7 coloured squares, not mere noise
    pixels = [F.interpolate(pictures, side, mode="bilinear") for side in sides]

    ranks = expected_ranks([encoder.eval() for encoder in encoders], [pixels])
    tokens, _ = encode_all(encoders, pixels, 300, ranks)
    for l, encoder in enumerate(encoders):
        N, K = count_tokens(encoder, pixels[l]), tokens[l].shape[1]
        name = f"{type(encoder).__module__.split('.')[0]}.{type(encoder).__name__}"
        print(f"{name:>28}: ranks {ranks[:, l].tolist()}, {N} -> {K} tokens")


if __name__ == "__main__":
    main()
