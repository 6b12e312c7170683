r"""METEOR stage 3: drop visual tokens inside an unmodified Hugging Face decoder.

Paper: METEOR (ICCV 2025, https://arxiv.org/abs/2507.20842), instance-adaptive text-guided token
pruning; supplement B.1, Tables 3, 7, 8. Training-free. Prior to layers 4, 12 and 20 of 32, by the
attention of the layer before:

    a_i^h   = mean_{t in text after the image} softmax(q_t^h . k^h / sqrt(d))_i
                                              how much the text attends to token i in head h
    VAV_h   = \sum_i a_i^h                    Visual Attention Value of head h
    I       = the k heads of highest VAV      most heads hardly attend to the image
    score_i = \sum_{h in I} a_i^h             the tokens of highest score stay
    K       = round(\lambda \sum_{h in I} VAV_h)   how many: at least 1, at most those still there

Text always stays. Kept tokens keep their order and their rotary positions. Later layers, and their
KV caches, are shorter.

q and k are those of the layer before, heard while it calls its own attention. So nothing is
computed twice, and its norms, adapters, quantised weights and rotary embedding are already applied.

In:   a decoder of transformers, alone or inside a vision-language model; visual_mask (B, S) bool.
Out:  inside the block, `generate` and `forward` as usual, with fewer tokens; afterwards
      pruner.kept[layer] (B, S) bool and pruner.average_tokens():

    with AdaptivePruner(model, visual_mask, lam=50) as pruner:
        ids = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=20)

Supported: decoders whose layers are called with rotary tables (`position_embeddings`) and attend
through transformers' `AttentionInterface`, on sdpa, eager or flash attention; docs/models.md lists
them. Tested with transformers 5.18 to 5.24.

Change here: `TokenPruner.choose` is the one method that a rule of your own overrides;
`AdaptivePruner` is METEOR's, by `text_relevance` (which tokens stay) and `adaptive_count` (how
many).
Not from the paper: it says "prior to the input" of a layer, which we read as the attention of the
layer before, as FastV does; layers L/8, 3L/8, 5L/8 at other depths; halves round up; ties go to the
lower index; \lambda is solved from a wanted average; hidden states of dropped tokens return as
zeros.
`python stage3_decode.py` is a tiny demo.
"""

import math
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, Cache, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import create_causal_mask

# --------------------------------------------------------------------------------- the paper's idea


def visual_attention(
    q: Tensor,
    k: Tensor,
    scale: float,
    sees: Tensor,
    asks: Tensor,
    softcap: float | None = None,
    chunk: int = 128,
) -> Tensor:
    r"""How much the text attends to each token, in each head.

    a_i^h = mean_t softmax_s(scale q_t^h . k_s^h)_i    t: text queries; s: all tokens that t sees

    Args:
        q (B, H, T, d) float: queries of the text.
        k (B, H_kv, N, d) float: keys of all tokens; H_kv divides H, as heads may share keys.
        scale: what the layer multiplies its scores by, mostly 1 / sqrt(d).
        sees (B, T, N) bool: the tokens that each query sees.
        asks (B, T) bool: False for a filler, in samples with fewer queries than others.
        softcap: Gemma 2 caps its scores at this size; None: no cap.
        chunk: queries computed at a time, so that memory stays at B H chunk N floats.
    Returns:
        attention (B, H, N) float32: 0..1; a row sums to 1 over all tokens.
    Source: [paper]
    """
    B, H, T, _ = q.shape
    H_kv, N = k.shape[1:3]
    keys = k.float().mT  # (B, H_kv, d, N)
    lowest = torch.finfo(torch.float32).min  # not -inf: a row that sees nothing would be NaN
    total = torch.zeros(B, H, N, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for start in range(0, T, chunk):
            some = slice(start, start + chunk)
            queries = q[:, :, some].float()  # (B, H, chunk, d)
            queries = queries.unflatten(1, (H_kv, -1)).flatten(2, 3)  # heads that share keys: rows
            scores = scale * queries @ keys  # (B, H_kv, H / H_kv * chunk, N)
            scores = scores.reshape(B, H, -1, N)  # (B, H, chunk, N)
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            weights = scores.masked_fill(~sees[:, None, some], lowest).softmax(dim=-1)
            is_filler = ~asks[:, None, some, None]  # (B, 1, chunk, 1)
            total += weights.masked_fill(is_filler, 0).sum(dim=2)
    return total / asks.sum(dim=1)[:, None, None]


def head_vav(attention: Tensor) -> Tensor:
    r"""Visual Attention Value of each head: VAV_h = \sum_i a_i^h.

    Args:
        attention (B, H, N) float: a, 0 outside the visual tokens.
    Returns:
        vav (B, H) float: 0..1, the share of its attention that a head gives to the image.
    Source: [paper, Finding 4]
    """
    return attention.sum(dim=-1)


def text_relevance(attention: Tensor, k: int) -> Tensor:
    r"""Which tokens matter to the question: score_i = \sum_{h in I} a_i^h.

    Args:
        attention (B, H, N) float: a, 0 outside the visual tokens.
        k: size of I, 1..H; of heads with equal VAV the lower is taken.
    Returns:
        score (B, N) float: the highest stay.
    Source: [paper]
    """
    order = head_vav(attention).argsort(dim=1, descending=True, stable=True)  # (B, H)
    best_heads = order[:, :k, None]  # I: (B, k, 1)
    return attention.take_along_dim(best_heads, dim=1).sum(dim=1)


def adaptive_count(vav: Tensor, lam: float, k: int, available: Tensor) -> Tensor:
    r"""How many tokens this prompt needs: K = round(\lambda \sum_{h in I} VAV_h).

    Args:
        vav (B, H) float: of `head_vav`.
        lam: \lambda, 0..infinity; infinity keeps all.
        k: size of I, 1..H.
        available (B,) int64: tokens that are still there.
    Returns:
        K (B,) int64: 1..available, and 0 where nothing is there; halves are rounded up.
    Source: [paper, Finding 5; Table 8]
    """
    if math.isinf(lam):  # infinity times a sum of 0 would be NaN
        return available
    best = vav.double().topk(k, dim=1).values  # (B, k)
    K = (lam * best.sum(dim=1) + 0.5).floor()  # (B,)
    return K.clamp(min=1).minimum(available).long()


def select(score: Tensor, count: Tensor, visual: Tensor) -> Tensor:
    """The visual tokens of highest score; of equal scores the lower index.

    Args:
        score (B, N) float: the highest stay.
        count (B,) int64: how many to keep of each sample.
        visual (B, N) bool: the tokens to choose from.
    Returns:
        keep (B, N) bool.
    Source: [paper]
    """
    score = score.masked_fill(~visual, -torch.inf)
    order = score.argsort(dim=1, descending=True, stable=True)  # (B, N): the best token first
    first = torch.arange(score.shape[1], device=score.device) < count[:, None]  # (B, N)
    return torch.zeros_like(visual).scatter(1, order, first) & visual


def default_layers(L: int) -> list[int]:
    """The layers to prune in a decoder of L: 4, 12, 20 of 32.  Source: [our choice for other L]"""
    return sorted({max(1, eighths * L // 8) for eighths in (1, 3, 5)})


def average_tokens(
    tokens_in: float | Tensor, counts: list, layers: list, num_layers: int
) -> float | Tensor:
    """Mean over the LLM's layers of the visual tokens present: "# Tok." with a star in the paper.

    576 tokens in, counts [396, 170, 76] at layers [4, 12, 20] of 32: 242.

    Args:
        tokens_in: a number, or (B,) of them: visual tokens in the prompt.
        counts: for each of layers a number, or (B,) of them: visual tokens there from it on.
        layers: 0-indexed, ascending.
        num_layers: L.
    Returns:
        average: a float, or (B,).
    Source: [supplement Table 3]
    """
    total = tokens_in * layers[0]
    for K, start, end in zip(counts, layers, [*layers[1:], num_layers]):
        total = total + K * (end - start)
    return total / num_layers


def solve_lambda(
    target_average: float, measure: Callable[[float], float], tolerance: float = 0.5
) -> float:
    r"""The \lambda that reaches a target token count, on average over layers and prompts.

    By bisection of x in \lambda = x / (1 - x) target_average, which reaches from 0 to infinity as x
    goes from 0 to 1. The VAVs of the top heads sum to about 1, so \lambda is of the target's order.

    Args:
        target_average: wanted mean of `average_tokens`.
        measure: \lambda -> mean `average_tokens` over a calibration set; must be non-decreasing.
        tolerance: in tokens.
    Returns:
        lam: a float.
    Calls measure up to 42 times. Where it jumps over the target, the answer lies at the jump.

    Raises: ValueError where target_average is not in measure(0)..measure(infinity).
    Source: [our choice]
    """
    least, most = measure(0.0), measure(math.inf)
    require(
        least <= target_average <= most,
        f"target_average must be {least:.2f} to {most:.2f} here, got {target_average}",
    )
    low, high = 0.0, 1.0
    for _ in range(40):
        x = (low + high) / 2
        lam = x / (1 - x) * target_average
        average = measure(lam)
        if abs(average - target_average) <= tolerance:
            break
        if average < target_average:
            low = x
        else:
            high = x
    return lam


# --------------------------------------------------------------------- tokens that stay, as indices


def compact(stays: Tensor) -> tuple[Tensor, Tensor]:
    """Close the gaps: the tokens that stay, in order, right-aligned in as few columns as they need.

    Right-aligned, so that an answer's tokens follow without a gap, and the last column is the last
    token of every row. A row with fewer tokens than the longest is filled up in front; the masks
    hide its fillers. They are places of tokens that do not stay, none of them twice, so that they
    can be scattered back without overwriting a kept one. Of five tokens, True for 1 and 4: idx
    [1, 4]; beside a row that keeps three, [3, 1, 4].

    Args:
        stays (B, S) bool.
    Returns:
        idx (B, N) int64: places in S, to gather by; N: tokens that stay in the longest row.
        real (B, N) bool: False for a filler.
    """
    N = int(stays.sum(dim=1).max())
    order = stays.int().argsort(dim=1, stable=True)  # who goes, then who stays, each in order
    idx = order[:, stays.shape[1] - N :]
    return idx, stays.gather(1, idx)


def take(x: Tensor, idx: Tensor) -> Tensor:
    """The tokens at idx (B, N) of x (B or 1, S, D): (B, N, D)."""
    rows = torch.arange(len(idx), device=x.device)[:, None]  # (B, 1)
    return x.expand(len(idx), -1, -1)[rows, idx.to(x.device)]


def require(condition, message: str, error: type[Exception] = ValueError) -> None:
    if not condition:
        raise error(message)


# -------------------------------------------------------------------------- masks of the library
# A layer is called with no mask; or with a 2-D one, False on padding (flash attention); or with a
# finished one, (B or 1, 1, queries, keys), of bools (sdpa) or of 0 and the lowest number (eager).


def visible(mask: Tensor) -> Tensor:
    """A finished mask as bools: True where a query sees a key. A float one hides by a large
    negative number, mostly the lowest of its type; smaller ones are biases.
    """
    return mask if mask.dtype == torch.bool else mask > -1e4


def cut_mask(mask: Tensor, queries: Tensor | None, keys: Tensor, real: Tensor) -> Tensor:
    """Of a layer's mask the tokens that are left. No query sees a filler.

    Args:
        mask (B or 1, all keys) bool, or (B or 1, 1, all queries, all keys) bool or float.
        queries (B, Q) int64: the queries that are left; None: all.
        keys (B, N) int64: the keys that are left.
        real (B, N) bool: False for padding and fillers.
    Returns:
        mask (B, N) or (B, 1, Q, N): of the same type.
    """
    keys, real = keys.to(mask.device), real.to(mask.device)
    if mask.dim() == 2:
        return mask.bool().take_along_dim(keys, dim=1) & real
    if queries is not None:
        queries = queries.to(mask.device)
        mask = mask.take_along_dim(queries[:, None, :, None], dim=2)  # (B, 1, Q, all keys)
    mask = mask.take_along_dim(keys[:, None, None, :], dim=3)  # (B, 1, Q, N)
    unseen = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.masked_fill(~real[:, None, None], unseen)


def seen_by(query_idx: Tensor, mask: Tensor | None, is_causal: bool, N: int) -> Tensor:
    """For some queries of a layer, which of its N tokens each of them sees.

    Args:
        query_idx (B, T) int64: places of the queries among the N tokens.
        mask: the layer's own.
        is_causal: whether the layer hides the future where it is given no finished mask.
    Returns:
        sees (B, T, N) bool.
    """
    if mask is not None and mask.dim() == 4:
        return visible(mask)[:, 0].take_along_dim(query_idx[..., None], dim=1)
    sees = torch.ones(*query_idx.shape, N, dtype=torch.bool, device=query_idx.device)
    if is_causal:
        sees = torch.arange(N, device=sees.device) <= query_idx[..., None]
    if mask is not None:
        sees = sees & mask.bool()[:, None]
    return sees


# The layer types of a config that respect the attention mask. Recurrent layers ignore it and would
# read the fillers.
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


def shortest_window(config) -> float:
    """The smallest attention window of any layer; infinity if every layer sees the whole sequence.

    A longer sequence would be cut at other tokens once some are gone. Doge attends to the
    keep_window_size best keys only, fillers among them; Llama 4 scales a query by its place in the
    cut sequence, from floor_scale on.
    """
    kinds = getattr(config, "layer_types", None)
    sizes = [getattr(config, "keep_window_size", None), getattr(config, "floor_scale", None)]
    if kinds is None or "sliding_attention" in kinds:
        sizes.append(getattr(config, "sliding_window", None))
    if kinds is not None and "chunked_attention" in kinds:
        sizes.append(getattr(config, "attention_chunk_size", None))
    return min((size for size in sizes if size), default=math.inf)


def require_supported(decoder) -> None:
    """TypeError for a decoder in whose layers tokens cannot be dropped."""
    config, kind = getattr(decoder, "config", None), type(decoder).__name__
    require(
        hasattr(decoder, "layers") and hasattr(config, "num_attention_heads"),
        f"model must hold a decoder of transformers with layers of attention, got {kind}",
        TypeError,
    )
    others = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    require(not others, f"tokens cannot be dropped in {kind}'s layers of {others}", TypeError)
    one_each = len(decoder.layers) == config.num_hidden_layers
    require(
        one_each and not getattr(config, "num_kv_shared_layers", 0),
        f"each layer of the decoder must have one attention with keys of its own, got {kind}",
        TypeError,
    )


def is_mask(mask) -> bool:
    is_bool = isinstance(mask, Tensor) and mask.dtype == torch.bool
    return is_bool and mask.dim() == 2 and len(mask) > 0


# ---------------------------------------------------------------------- listening to the attention


ACTIVE = {}  # id of a decoder's config -> the pruner in whose block it is


class Heard(NamedTuple):
    """What a layer's attention is called with."""

    q: Tensor  # (B, H, N, d)
    k: Tensor  # (B, H_kv, N, d)
    mask: Tensor | None  # the layer's
    scale: float
    softcap: float | None
    is_causal: bool


def hear(module, query, key, value, attention_mask, **kwargs):
    """Registered with transformers as an attention function: notes what it is called with, and
    hands on to the one that was there.
    """
    require(
        kwargs.get("s_aux") is None,
        f"stage 3 does not know attention sinks, which {type(module).__name__} has",
        TypeError,
    )
    pruner = ACTIVE[id(module.config)]
    scale, is_causal = kwargs.get("scaling"), kwargs.get("is_causal")
    pruner.heard = Heard(
        q=query,
        k=key,
        mask=attention_mask,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        softcap=kwargs.get("softcap"),
        is_causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
    )
    attend = attention_function(module, pruner.implementation)
    return attend(module, query, key, value, attention_mask, **kwargs)


def attention_function(module, implementation: str) -> Callable:
    """What an attention module of transformers would call by itself."""
    for cls in type(module).__mro__:
        library = sys.modules[cls.__module__]
        if hasattr(library, "eager_attention_forward"):
            functions = library.ALL_ATTENTION_FUNCTIONS
            return functions.get_interface(implementation, library.eager_attention_forward)
    raise TypeError(f"{type(module).__name__} has no eager_attention_forward beside it")


# --------------------------------------------------------------------------------- inside a decoder


# How it works. `generate` calls the decoder once with the whole prompt, and then with one token at
# a time and the KV cache.
#   Prompt: hooks run before every layer from the first pruned one on. While the layer before a
#     pruned one runs, its attention is heard. A pruned layer's input is cut before it writes its
#     keys and values; so its part of the KV cache, and those of all later layers, are short from
#     the start. These layers get the masks and rotary tables of the tokens that are left.
#   Afterwards: nothing is chosen. A layer's cache is already short; only its mask has to be, too:
#     the tokens that were left at that layer, and all that came since.
#   Batches: samples keep different numbers of tokens, so short ones have fillers in front, which
#     the masks hide as they hide padding. Padding itself is dropped at the first pruned layer, or
#     becomes such a filler.
#   Beams: copies of one prompt choose alike, once, so the library may reorder them as it likes.
# Layer 0 is never pruned: the library takes the length of its cache for the length of all.


class Left(NamedTuple):
    """The tokens that are left from some layer on."""

    place: Tensor  # (rows, N) int64: place in the prompt of each, right-aligned
    real: Tensor  # (rows, N) bool: False for padding, and for fillers in front of short rows
    ragged: bool  # whether some are not real


class TokenPruner:
    """Drops visual tokens inside a `with` block, by hooks. A subclass says which stay: `choose`.

    Nothing of it is left on the model afterwards.

    Modifications: from the first pruned layer on, layers get the tokens left, right-aligned, with
    their masks and rotary positions. last_hidden_state and hidden_states go back to full length,
    with zeros where a token was dropped; attentions do not. So a dropped token predicts nothing: a
    loss must leave out the token after the picture. A KV cache that was filled in the block, and
    lacks tokens, refuses more of them once the block has ended. Until then every call of the model
    is pruned by visual_mask, those of other threads too: let them wait.

    Args:
        model: a decoder on sdpa, eager or flash attention, or a model that holds one.
        visual_mask (B, S) bool: the visual tokens of each prompt, if any.
        layers: ascending, 1..L-1, pruned prior to their input; None: L/8, 3L/8, 5L/8.
        query_mask (B, S) bool: the tokens that ask; None: the text after the last visual token. In
            training, leave out the answers.
    After a prompt:
        kept[layer] (B, S) bool: visual tokens there from that layer on.
        counts[layer] (B,) int64: how many they are.
    Raises: TypeError for a decoder that is not served, ValueError for arguments or a prompt that
        cannot be pruned.
    """

    def __init__(
        self,
        model,
        visual_mask: Tensor,
        layers: Iterable[int] | None = None,
        query_mask: Tensor | None = None,
    ):
        self.decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
        require_supported(self.decoder)
        L = self.num_layers = self.decoder.config.num_hidden_layers
        self.layers = default_layers(L) if layers is None else list(layers)
        ascending = sorted(set(self.layers) & set(range(1, L)))
        require(
            self.layers and self.layers == ascending,
            f"layers must be ascending numbers, 1 to {L - 1} for this decoder, got {self.layers}",
        )
        require(is_mask(visual_mask), "visual_mask must be a bool tensor of shape (B, S)")
        if query_mask is None:
            query_mask = visual_mask.flip(1).cumsum(1).flip(1) == 0  # no visual token from here on
        require(
            is_mask(query_mask) and query_mask.shape == visual_mask.shape,
            "query_mask must be a bool tensor of shape (B, S), as visual_mask",
        )
        self.visual_mask = visual_mask
        self.query_mask = query_mask & ~visual_mask
        self.kept, self.counts = {}, {}

    def choose(self, layer: int, attention: Tensor, visual: Tensor) -> Tensor:
        """The rule: which of the visual tokens that are left stay from this layer on.

        Args:
            layer: 0-indexed, one of `layers`.
            attention (B, H, N) float32: how much the text attends to each token, in each head; 0
                outside the visual tokens.
            visual (B, N) bool: the visual tokens that are left, among the N tokens there.
        Returns:
            keep (B, N) bool.
        """
        raise NotImplementedError

    def average_tokens(self) -> Tensor:
        """(B,) float: visual tokens there in the last prompt, mean over the decoder's layers."""
        require(len(self.counts) > 0, "average_tokens needs a prompt, and none has run yet")
        counts = list(self.counts.values())
        tokens_in = self.visual_mask.sum(dim=1).to(counts[0].device)
        return average_tokens(tokens_in, counts, self.layers, self.num_layers)

    def __enter__(self) -> "TokenPruner":
        owner = id(self.decoder.config)
        require(
            owner not in ACTIVE,
            "this decoder, or one made from the same config, is in another pruner's block: leave "
            "it first",
        )
        self.implementation = self.decoder.config._attn_implementation
        require(
            self.implementation in ("sdpa", "eager") or "flash" in self.implementation,
            f"attn_implementation must be sdpa, eager or flash, got {self.implementation!r}",
        )
        ACTIVE[owner] = self
        AttentionInterface.register("meteor_hear", hear)
        self.kept, self.counts = {}, {}
        self.cache = None  # the KV cache that this block fills
        self.heard = None  # of the layer that ran last
        self.past = 0  # tokens that were there before this call
        self._left = {}  # layer -> the tokens left from it on
        self._handles = [
            self.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            self.decoder.layers[0].register_forward_pre_hook(self._before_first, with_kwargs=True),
            self.decoder.register_forward_hook(self._after_decoder),
        ]
        for i in range(self.layers[0], self.num_layers):
            before = partial(self._before_layer, i)
            layer = self.decoder.layers[i]
            self._handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        for i in self.layers:
            layer = self.decoder.layers[i - 1]
            self._handles += [
                layer.register_forward_pre_hook(self._start_listening),
                layer.register_forward_hook(self._stop_listening, always_call=True),
            ]
        return self

    def __exit__(self, kind, *_) -> None:
        del ACTIVE[id(self.decoder.config)]
        self.decoder.config._attn_implementation = self.implementation
        for handle in self._handles:
            handle.remove()
        self._close_cache()
        self.cache = self.heard = self._first_mask = self._prompts = None
        self._left, self._masks, self._rotary = {}, {}, {}
        require(
            kind is not None or list(self.kept) == self.layers,
            "the decoder did not run in the block, was compiled before it, or ran in "
            "generate_batch, which is not supported",
        )

    def _close_cache(self) -> None:
        """The last prompt's cache takes no more tokens, where a layer lacks some of the prompt."""
        is_cut = any(left.ragged or left.place.shape[1] < self.S for left in self._left.values())
        if self.cache is not None and is_cut:
            self.cache.update = refuse_short_cache

    def _before_decoder(self, decoder, args, kwargs) -> None:
        """Qwen3-VL adds features of the picture after its first layers, at the prompt's places."""
        added = kwargs.get("deepstack_visual_embeds") or []
        require(
            len(added) <= self.layers[0],
            f"layers must begin at {len(added)} or later: the layers before it of "
            f"{type(decoder).__name__} need all visual tokens, got {self.layers}",
        )

    # ------------------------------------------------ before layer 0: does a prompt begin, or go on

    def _before_first(self, layer, args, kwargs) -> None:
        """Reads the call. Refuses what would be pruned wrongly."""
        require(
            len(args) == 1,
            f"{type(self.decoder).__name__} must name all but the first argument of its layers",
            TypeError,
        )
        self._require_rotary(kwargs)
        now = self.decoder.config._attn_implementation
        require(
            now == self.implementation,
            f"attn_implementation must stay {self.implementation!r} in the block, is {now!r}: "
            "generate_batch, which changes it, is not supported",
        )
        hidden, cache = args[0], find_cache(kwargs)
        past = cache.get_seq_length() if isinstance(cache, Cache) else 0
        self.past = past
        self._first_mask = kwargs["attention_mask"]
        self._masks, self._rotary = {}, {}  # cut once for all layers with the same tokens left
        is_new = cache is None or isinstance(cache, DynamicCache) and past == 0
        require(
            is_new or cache is self.cache,
            "the KV cache must be None, or a DynamicCache that is empty or was filled by the last "
            f"prompt of this block, got a {type(cache).__name__} of {past} tokens: guidance_scale, "
            "which fills two, is not supported",
        )
        window = shortest_window(self.decoder.config)
        total = past + hidden.shape[1]
        require(total <= window, f"the sequence must fit the window of {window}, but has {total}")
        if past == 0:
            self._start(hidden, self._first_mask, cache)
        require(past == 0 or past >= self.S, "the KV cache must not be cut back into the prompt")

    def _start(self, hidden: Tensor, mask: Tensor | None, cache: Cache | None) -> None:
        """A prompt begins; without a KV cache, it comes again with its answer."""
        B, given = self.visual_mask.shape
        rows, S = hidden.shape[:2]
        has_answer = S > given and cache is None and len(self.kept) > 0
        require(
            S == given or has_answer,
            f"the first call must hold the {given} tokens of visual_mask, got {S}: prompts of "
            "another length, chunked prefill, assisted decoding, guidance_scale and continuous "
            "batching are not supported",
        )
        if cache is not self.cache:
            self._close_cache()  # that of the prompt before
        self.S = S
        self.copies = max(1, rows // B)
        prompts = hidden[:, :given]
        are_copies = rows == B * self.copies
        if are_copies and self.copies > 1:
            are_copies = prompts.equal(self._copy(self._one_copy(prompts)))
        require(
            are_copies,
            f"the batch must be the {B} samples of visual_mask, or copies of each side by side",
        )
        require(
            not has_answer or self._one_copy(prompts).equal(self._prompts),
            "a longer call without a KV cache must begin with the prompt of the call before: use a "
            "block of its own for each prompt",
        )
        self._prompts = self._one_copy(prompts) if cache is None else None
        answer = (0, S - given)  # neither visual nor asking
        device = hidden.device
        self._visual = self._copy(F.pad(self.visual_mask, answer)).to(device)  # (rows, S)
        self._asks = self._copy(F.pad(self.query_mask, answer)).to(device)  # (rows, S)

        real = torch.ones_like(self._visual)
        if mask is not None and mask.dim() == 2:
            real = mask.bool()
        elif mask is not None:  # only padding does not see itself
            real = visible(mask)[:, 0].diagonal(dim1=1, dim2=2).expand(rows, S)
        require(
            (self._asks & real).any(dim=1).all(),
            "visual_mask must be followed by text, or query_mask mark some, in every sample",
        )
        place = torch.arange(S, device=device).expand(rows, S)
        self._left = {0: Left(place, real, ragged=not real.all())}
        self.cache = cache

    def _copy(self, x: Tensor) -> Tensor:
        """(B, ...) -> (rows, ...): each sample as often as `generate` copies it, for its beams."""
        return x.repeat_interleave(self.copies, dim=0)

    def _one_copy(self, x: Tensor) -> Tensor:
        """(rows, ...) -> (B, ...): the first of the copies of each sample."""
        return x[:: self.copies]

    # -------------------------------------------------- around the layer before: what it attends to

    def _start_listening(self, layer, args) -> None:
        if self.past == 0:
            self.decoder.config._attn_implementation = "meteor_hear"

    def _stop_listening(self, layer, args, output) -> None:
        self.decoder.config._attn_implementation = self.implementation

    def _require_rotary(self, kwargs) -> None:
        """Beam gives rotary tables to some of its layers only."""
        require(
            kwargs.get("position_embeddings") is not None and "attention_mask" in kwargs,
            f"{type(self.decoder).__name__} must call its layers with position_embeddings",
            TypeError,
        )

    # ----------------------------------------------------------------- before a layer: what goes on

    def _before_layer(self, i: int, layer, args, kwargs) -> tuple:
        """At a pruned layer, choose; call it and all later ones with the tokens that are left."""
        self._require_rotary(kwargs)
        hidden = args[0]
        if self.past > 0:
            self._require_whole_cache(i, find_cache(kwargs))
        elif i in self.layers:
            hidden = take(hidden, self._drop(i))
        return (hidden,), self._call_with(self._left_at(i), i, hidden, kwargs)

    @torch.no_grad()
    def _drop(self, i: int) -> Tensor:
        """Chooses prior to layer i: (rows, N') int64, places of those that stay among N tokens."""
        heard, self.heard = self.heard, None
        require(
            heard is not None,
            f"layer {i - 1} of {type(self.decoder).__name__} must attend through transformers' "
            "AttentionInterface, which it did not call",
            TypeError,
        )
        device = heard.q.device  # of layer i - 1, where a model lies on several
        place, real = (x.to(device) for x in self._left_at(i - 1)[:2])
        visual = self._visual.to(device).gather(1, place) & real  # (rows, N)
        asks = self._asks.to(device).gather(1, place) & real  # (rows, N)
        attention = self._text_attention(heard, asks)  # (B, H, N)
        visual_once = self._one_copy(visual)  # (B, N): copies of a sample choose alike
        attention = attention.masked_fill(~visual_once[:, None], 0)
        keep = self.choose(i, attention, visual_once)
        require(
            is_mask(keep) and keep.shape == visual_once.shape,
            f"choose must return a bool tensor of shape {tuple(visual_once.shape)}, as visual",
        )
        keep = keep & visual_once  # (B, N)

        in_prompt = torch.zeros_like(self._one_copy(self._visual), device=device)  # (B, S)
        in_prompt = in_prompt.scatter(1, self._one_copy(place), keep)
        self.kept[i] = in_prompt[:, : self.visual_mask.shape[1]]
        self.counts[i] = keep.sum(dim=1)
        text = real & ~visual
        idx, still_real = compact(text | self._copy(keep))  # (rows, N')
        self._left[i] = Left(place.gather(1, idx), still_real, ragged=not still_real.all())
        return idx

    def _text_attention(self, heard: Heard, asks: Tensor) -> Tensor:
        """(B, H, N): how much the tokens that ask, (rows, N) bool, attend to each token."""
        query_idx, is_query = compact(asks)  # (rows, T)
        sees = seen_by(query_idx, heard.mask, heard.is_causal, asks.shape[1])  # (rows, T, N)
        q = heard.q.take_along_dim(query_idx[:, None, :, None], dim=2)  # (rows, H, T, d)
        q, k, sees, is_query = map(self._one_copy, (q, heard.k, sees, is_query))
        return visual_attention(q, k, heard.scale, sees, is_query, heard.softcap)

    def _left_at(self, i: int) -> Left:
        """The tokens that layer i is called with."""
        return self._left[max(layer for layer in self._left if layer <= i)]

    def _call_with(self, left: Left, i: int, hidden: Tensor, kwargs: dict) -> dict:
        """Layer i's arguments for the tokens that are left, and in an answer for all since."""
        rotary = kwargs["position_embeddings"]
        if id(left) not in self._masks:
            self._masks[id(left)] = self._mask(left, i, hidden, find_cache(kwargs))
        if self.past == 0:
            key = id(left), id(rotary)  # layers of a kind share their tables
            if key not in self._rotary:
                self._rotary[key] = rotary, take_rotary(rotary, left.place)
            rotary = self._rotary[key][1]
        changed = {"attention_mask": self._masks[id(left)], "position_embeddings": rotary}
        if "position_ids" in kwargs:
            changed["position_ids"] = self._positions(left, kwargs["position_ids"])
        return kwargs | changed

    def _positions(self, left: Left, positions: Tensor | None) -> Tensor | None:
        """Position ids of the tokens left, by which Ministral 3 scales its queries.

        Flash attention would take their gaps for those between several packed prompts.
        """
        if positions is None or "flash" in self.implementation:
            return None
        if self.past > 0:
            return positions
        return positions.expand(len(left.place), -1).take_along_dim(left.place, dim=-1)

    def _mask(self, left: Left, i: int, hidden: Tensor, cache: Cache | None) -> Tensor | None:
        """The mask for the tokens that are left: layer 0's, cut.

        Layer i's own will not do: in an answer, the library makes the mask of a kind of layers as
        long as the cache of the first of them, which may be a pruned one. Layer 0's is always
        whole, and serves all layers, as no window is shorter than the sequence.
        """
        queries, keys, real = left.place, left.place, left.real
        if self.past == 0:
            cache = None
        else:  # an answer: all its queries, and its keys after those of the prompt that are left
            end = self.past + hidden.shape[1]
            since = torch.arange(self.S, end, device=keys.device).expand(len(keys), -1)
            queries, keys = None, torch.cat([keys, since], dim=1)
            real = F.pad(real, (0, end - self.S), value=True)
        if self._first_mask is not None:
            return cut_mask(self._first_mask, queries, keys, real)
        if left.ragged:
            return create_causal_mask(self.decoder.config, hidden, real, cache, layer_idx=i)
        return None

    def _require_whole_cache(self, i: int, cache: Cache) -> None:
        """Assisted decoding takes rejected tokens out of the cache. Older releases crop all layers
        to one length, so that those which are shorter keep the rejected tokens.
        """
        left = self._left_at(i).place.shape[1]
        require(
            cache.get_seq_length(i) == left + self.past - self.S,
            "the KV cache must be cropped by as many tokens in every layer, which assisted "
            "decoding of this release of transformers does not do",
        )

    # ------------------------------------------------------- after the decoder: back to full length

    def _after_decoder(self, decoder, args, output) -> None:
        """The prompt's hidden states go back to full length: logits and labels line up."""
        if self.past > 0 or not self.kept:
            return
        require(hasattr(output, "last_hidden_state"), "return_dict must be True, or not given")
        last = self._left_at(self.num_layers - 1)
        output.last_hidden_state = self._at_full_length(output.last_hidden_state, last)
        states = getattr(output, "hidden_states", None)
        if states is not None:  # the input of layer 0, then what leaves each layer
            left = [self._left_at(max(i - 1, 0)) for i in range(len(states))]
            output.hidden_states = tuple(map(self._at_full_length, states, left))

    def _at_full_length(self, hidden: Tensor, left: Left) -> Tensor:
        """Hidden states of the tokens left (rows, N, D) -> (rows, S, D), 0 for all others."""
        if hidden.shape[1] == self.S and not left.ragged:
            return hidden
        real = left.real.to(hidden.device)[..., None]
        place = left.place.to(hidden.device)[..., None].expand_as(hidden)
        whole = hidden.new_zeros(len(hidden), self.S, hidden.shape[2])
        return whole.scatter(1, place, hidden.masked_fill(~real, 0))


class AdaptivePruner(TokenPruner):
    r"""METEOR's rule: the text's top heads choose, and how much they attend says how many stay.

    Args:
        lam: \lambda, 0..infinity; infinity keeps all.
        k: number of heads that decide, 1..H, the paper's 5; None: all.
        model, visual_mask, layers, query_mask: as in `TokenPruner`, whose results these are, too.
    After a prompt:
        vav[layer] (B, H) float32: Visual Attention Values that the layer's tokens were chosen by.
    Source: [paper]
    """

    def __init__(
        self,
        model,
        visual_mask: Tensor,
        lam: float,
        layers: Iterable[int] | None = None,
        k: int | None = 5,
        query_mask: Tensor | None = None,
    ):
        super().__init__(model, visual_mask, layers, query_mask)
        H = self.decoder.config.num_attention_heads
        require(lam >= 0, f"lam must be 0 to infinity, got {lam}")
        require(k is None or k in range(1, H + 1), f"k must be 1 to {H}, or None for all, got {k}")
        self.lam, self.k = lam, H if k is None else k
        self.vav = {}

    def choose(self, layer: int, attention: Tensor, visual: Tensor) -> Tensor:
        vav = head_vav(attention)  # (B, H)
        self.vav[layer] = vav
        K = adaptive_count(vav, self.lam, self.k, available=visual.sum(dim=1))  # (B,)
        return select(text_relevance(attention, self.k), K, visual)


def take_rotary(tables, place: Tensor):
    """The rotary tables, (B or 1, S, d) each, of the tokens at place: they keep their positions."""
    if isinstance(tables, Tensor):
        return take(tables, place)
    return tuple(take(table, place) for table in tables)


def find_cache(kwargs: dict) -> Cache | None:
    """The KV cache among a layer's arguments, by its type, as releases and models name it apart.

    That of continuous batching is of another type: it is found by its name, to be refused.
    """
    caches = [x for x in kwargs.values() if isinstance(x, Cache)]
    caches += [kwargs.get("past_key_values"), kwargs.get("cache")]
    return next((cache for cache in caches if cache is not None), None)


def refuse_short_cache(*args, **kwargs):
    """Replaces `update` after the block, so that a pruned cache cannot be reused by mistake."""
    raise ValueError(
        "this KV cache lacks the tokens that were pruned, and only the pruner's own block knows "
        "which: go on inside the block"
    )


def main() -> None:
    """A random Llama of 8 layers and prompts of 48 visual tokens: what each lambda keeps."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, num_hidden_layers=8, num_attention_heads=8)
    model = LlamaForCausalLM(config).eval()
    embeds = torch.randn(2, 64, 64)
    visual_mask = (torch.arange(64) < 48).expand(2, 64)
    for lam in (math.inf, 10, 5):
        with AdaptivePruner(model, visual_mask, lam=lam) as pruner, torch.no_grad():
            cache = find_cache(model(inputs_embeds=embeds))
            lengths = [cache.get_seq_length(i) for i in range(8)]
        kept = [K.tolist() for K in pruner.counts.values()]
        print(f"lambda {lam}: 48 -> {kept} visual tokens; KV cache {lengths}")


if __name__ == "__main__":
    main()
