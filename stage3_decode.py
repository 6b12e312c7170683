r"""METEOR stage 3: drop visual tokens inside an unmodified Hugging Face decoder, as many as the prompt can spare.

Paper: METEOR (ICCV 2025, https://arxiv.org/abs/2507.20842), instance-adaptive text-guided token pruning, and
supplement B.1, Tables 3, 7, 8. Training-free. Prior to the input of layers 4, 12 and 20 of 32:

    a_i^h = mean_{t in text after the image} softmax(q_t^h . k^h / sqrt(d))_i   what the prompt looks at
    VAV_h = \sum_i a_i^h                  Visual Attention Value of head h; I: the k heads of highest VAV
    score_i = \sum_{h in I} a_i^h         which tokens: those of highest score
    K = round(\lambda \sum_{h in I} VAV_h)   how many: at least 1, at most those still there

Only the rows of the text queries are computed, from the layer's own q and k: the model stays on SDPA. Text stays;
kept tokens keep their order and rotary positions; later layers and their KV caches are shorter.

In:   a decoder (Llama, Mistral, Qwen2, Qwen3: a CausalLM, or the one in a VLM), visual_mask (B, S) bool.
Out:  `generate` and `forward` as ever inside the block; pruner.kept[layer] (B, S) bool, pruner.average_tokens():

    with AdaptivePruner(model, visual_mask, lam=50) as pruner:
        ids = model.generate(inputs_embeds=embeds, attention_mask=attention_mask, max_new_tokens=20)

Change here: `text_relevance` (who is kept), `adaptive_count` (how many), `visual_attention` (who asks), `layers` of
`AdaptivePruner`, and its `counts`, fixed budgets instead of `lam` (FastV, PyramidDrop).

Not from the paper: layers L/8, 3L/8, 5L/8 at other depths; halves round up; ties go to the lower index; \lambda is
solved from a wanted average; the decoder returns zeros where a token is gone.

Needs torch and transformers. `python stage3_decode.py` prunes a random tiny Llama.
"""
import functools
import inspect
import math
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import create_causal_mask


def visual_attention(q: torch.Tensor, k: torch.Tensor, scale: float, query_idx: torch.Tensor,
                     query_valid: torch.Tensor, visual_mask: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    r"""a_i^h = mean_t softmax_s(scale q_t^h . k_s^h)_i over the text queries t; s runs over all that t may see.

    Args:
        q (B, H, T, d) float: queries of the text; k (B, H_kv, S, d) float: keys of all tokens, H_kv divides H.
        query_idx (B, T) int64: position in S of each query; query_valid (B, T) bool: False for a filler.
        visual_mask (B, S) bool: the visual tokens; valid (B, S) bool: False on padding.
    Returns: (B, H, S) float32, zero outside the visual tokens. Memory: B H T S floats.
    Source: [paper, text-guided pruning]
    """
    (B, H, T, d), S = q.shape, k.shape[2]
    q = q.reshape(B, k.shape[1], -1, d)  # heads that share a key side by side: (B, H_kv, H / H_kv * T, d)
    scores = scale * (q.float() @ k.float().transpose(2, 3)).view(B, H, T, S)
    sees = valid[:, None] & (torch.arange(S, device=q.device) <= query_idx[..., None])  # causal: (B, T, S)
    weights = scores.masked_fill(~sees[:, None], torch.finfo(torch.float32).min).softmax(dim=-1)
    weights = weights.masked_fill(~query_valid[:, None, :, None], 0)  # (B, H, T, S)
    return weights.sum(dim=2) / query_valid.sum(dim=1)[:, None, None] * visual_mask[:, None]  # (B, H, S)


def head_vav(attention: torch.Tensor) -> torch.Tensor:
    r"""VAV_h = \sum_i a_i^h, 0..1. (B, H, S) -> (B, H).  Source: [paper, Finding 4]"""
    return attention.sum(dim=-1)


def text_relevance(attention: torch.Tensor, k: int) -> torch.Tensor:
    r"""score_i = \sum_{h in I} a_i^h; equal VAVs: the lower head. (B, H, S) -> (B, S).  Source: [paper; Table 3]"""
    heads = head_vav(attention).argsort(dim=1, descending=True, stable=True)[:, :k]  # I: (B, k)
    return take(attention, heads).sum(dim=1)


def adaptive_count(vav: torch.Tensor, lam: float, k: int, available: torch.Tensor) -> torch.Tensor:
    r"""K = \lambda \sum_{h in I} VAV_h over the k highest, halves rounded up, within 1 and what is there.

    Args: vav (B, H) float; lam: 0..infinity, which keeps all; k: 1..H; available (B,) int64: tokens still there.
    Returns: (B,) int64, 1..available, 0 where nothing is there.  Source: [paper, Finding 5; Table 8]
    """
    if math.isinf(lam):  # infinity x a sum of 0 would be NaN
        return available
    K = (lam * vav.double().topk(k, dim=1).values.sum(dim=1) + 0.5).floor()
    return K.clamp(min=1).minimum(available).long()


def select(score: torch.Tensor, count: torch.Tensor, visual_mask: torch.Tensor) -> torch.Tensor:
    """The count[b] visual tokens of highest score, ties to the lower index. (B, S), (B,), (B, S) -> (B, S) bool."""
    order = score.masked_fill(~visual_mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return (order.argsort(dim=1) < count[:, None]) & visual_mask  # argsort of the order: the place of each token


def average_tokens(tokens_in, counts, layers, num_layers: int):
    """Mean over the LLM's layers of the visual tokens present: "# Tok." with a star in the paper.

    Args: tokens_in and each of counts: numbers or (B,) tensors; counts[j] are there from layers[j] (0-indexed) on.
    Returns: a float, or (B,).  [396, 170, 76] of 576 at [4, 12, 20] of 32: 242.  Source: [supplement Table 3]
    """
    ends = [*layers[1:], num_layers]
    return (tokens_in * layers[0] + sum(c * (end - i) for c, i, end in zip(counts, layers, ends))) / num_layers


def solve_lambda(target_average: float, measure: Callable[[float], float], tolerance: float = 0.5,
                 steps: int = 30) -> float:
    r"""The \lambda whose average token count is the wanted one, by bisection of \lambda = x / (1 - x), x in 0..1.

    Args: measure: \lambda -> mean of `AdaptivePruner.average_tokens` over a calibration set, rising with \lambda;
        tolerance: tokens off that will do; steps: calls of measure at most, then the closest tried is the answer.
    Raises: ValueError where target_average is not within measure(0) and measure(infinity).  Source: [our choice]
    """
    tried = {lam: measure(lam) for lam in (0.0, math.inf)}
    require(tried[0.0] <= target_average <= tried[math.inf],
            f"target_average must be {tried[0.0]:.2f} to {tried[math.inf]:.2f}, got {target_average}")
    low, high, miss = 0.0, 1.0, lambda lam: abs(tried[lam] - target_average)
    while miss(min(tried, key=miss)) > tolerance and len(tried) < steps:
        x = (low + high) / 2
        lam = x / (1 - x)
        tried[lam] = measure(lam)
        low, high = (x, high) if tried[lam] < target_average else (low, x)
    return min(tried, key=miss)


def require(condition, message: str) -> None:
    if not condition:
        raise ValueError(message)


def compact(stays: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the True entries in order, right-aligned; where rows are ragged, fillers (False ones) in front.

    (B, S) bool -> idx (B, N) int64, no position twice in a row, and real (B, N) bool; N: the longest row's count.
    """
    N = int(stays.sum(dim=1).max())
    idx = stays.int().argsort(dim=1, stable=True)[:, stays.shape[1] - N:]  # False first, then True, each in order
    return idx, stays.gather(1, idx)


def take(x: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """x (B or 1, S, D) at idx (B, N) -> (B, N, D)."""
    return x.expand(len(idx), -1, -1).gather(1, idx[..., None].expand(-1, -1, x.shape[-1]))


def queries_and_keys(layer, hidden: torch.Tensor, rotary: tuple, query_idx: torch.Tensor) -> tuple:
    """The layer's own rotated q (B, H, T, d) at query_idx (B, T), and k (B, H_kv, S, d), of hidden (B, S, D)."""
    attn, x = layer.self_attn, layer.input_layernorm(hidden)
    rotate = sys.modules[type(attn).__module__].apply_rotary_pos_emb  # of the architecture's own file
    q = attn.q_proj(take(x, query_idx)).unflatten(-1, (-1, attn.head_dim))  # (B, T, H, d)
    k = attn.k_proj(x).unflatten(-1, (-1, attn.head_dim))  # (B, S, H_kv, d)
    if hasattr(attn, "q_norm"):  # Qwen3
        q, k = attn.q_norm(q), attn.k_norm(k)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    return rotate(q, q, *(take(table, query_idx) for table in rotary))[0], rotate(k, k, *rotary)[0]


@torch.no_grad()
def check_layer(decoder, layer) -> None:
    """Three tokens through the layer's attention: the output must follow from `queries_and_keys`, or TypeError."""
    attn, modes = layer.self_attn, [(module, module.training) for module in layer.modules()]
    position = torch.arange(3, device=attn.o_proj.weight.device)[None]
    x = torch.arange(3 * decoder.config.hidden_size, device=position.device).sin().view(1, 3, -1).to(decoder.dtype)
    rotary, last, every = decoder.rotary_emb(x, position), position[:, 2:], position >= 0
    try:
        layer.eval()  # no dropout, and so no random numbers
        mask, normed = create_causal_mask(decoder.config, x, every, None), layer.input_layernorm(x)
        theirs = attn(hidden_states=normed, position_embeddings=rotary, attention_mask=mask)[0][0, 2]  # (D,)
        q, k = queries_and_keys(layer, x, rotary, last)
        a = visual_attention(q, k, attn.scaling, last, last > 0, every, every)  # of the last token: (1, H, 3)
        a, v = a.view(k.shape[1], -1, 3).to(x.dtype), attn.v_proj(normed).view(3, k.shape[1], -1)  # (3, H_kv, d)
        ours = attn.o_proj(torch.einsum("hgs,shd->hgd", a, v).flatten())  # (D,)
    finally:
        for module, mode in modes:
            module.training = mode
    if not (ours - theirs).abs().max() <= torch.finfo(x.dtype).eps ** 0.5 * theirs.abs().max():
        raise TypeError("its attention does not follow from q_proj, k_proj and rotary positions as Llama's does")


class AdaptivePruner:
    r"""Prunes visual tokens inside a `with` block, by hooks; nothing of it is left on the model afterwards.

    Modifications to the library's forward, while the block lasts: from the first pruned layer on, a layer gets the
    tokens that are left, right-aligned, with their first rotary positions, their causal mask and no position_ids;
    last_hidden_state comes back at full length; hidden_states and attentions, if asked for, stay short. A KV cache
    filled inside the block can be continued inside it only.

    Args:
        decoder: model of Llama's kind, on sdpa or eager; visual_mask (B, S) bool: visual tokens of the prompt.
        layers: ascending, 1..L-1, pruned prior to their input; None: L/8, 3L/8, 5L/8.
        lam: \lambda, 0..infinity (keeps all); k: number of heads that decide, 1..H; None: all of them.
        query_mask (B, S) bool: who asks; None: all text after the last visual token. In training, not the answer.
        counts: {layer: tokens kept at most, an int >= 1 or (B,) int64} instead of layers and lam.
    After a prompt: kept[layer] (B, S) bool, visual tokens there from that layer on; counts[layer] (B,) int64; and
        what the layer decided by, vav[layer] (B, H) and attention[layer] (B, H, S) float32.
    Raises: TypeError for an unsupported decoder, ValueError for arguments or a forward that it cannot prune.
    """

    def __init__(self, decoder, visual_mask: torch.Tensor, layers: list[int] | None = None,
                 lam: float | None = None, k: int | None = 5, query_mask: torch.Tensor | None = None,
                 counts: dict | None = None):
        self.decoder = decoder.get_decoder() if hasattr(decoder, "get_decoder") else decoder
        try:
            config, blocks = self.decoder.config, self.decoder.layers
            L, H = config.num_hidden_layers, config.num_attention_heads
            for block in blocks:
                check_layer(self.decoder, block)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise TypeError("decoder must be a Hugging Face model like Llama, Mistral, Qwen2 or Qwen3, got "
                            f"{type(self.decoder).__name__}: {error}") from error
        require(config._attn_implementation in ("sdpa", "eager"),
                f"decoder must run attention 'sdpa' or 'eager', got {config._attn_implementation!r}")
        require((lam is None) != (counts is None) and (counts is None or layers is None),
                "lam or counts must be given, one of the two, and layers only beside lam")
        require(lam is None or lam >= 0, f"lam must be 0 to infinity, got {lam}")
        require(k is None or 1 <= k <= H, f"k must be 1 to {H}, the heads there are, or None for all, got {k}")
        layers = [L // 8, 3 * L // 8, 5 * L // 8] if layers is None else list(layers)
        layers = layers if counts is None else sorted(counts)
        require(layers and layers == sorted(set(layers)) and 1 <= layers[0] and layers[-1] < L,
                f"layers must be ascending numbers, 1 to {L - 1} for this decoder, got {layers}")
        for name, m in (("visual_mask", visual_mask), ("query_mask", query_mask)):
            require(m is None or m.dtype == torch.bool and m.dim() == 2 and m.shape == visual_mask.shape,
                    f"{name} must be bool of shape (B, S), got {m is not None and (m.dtype, tuple(m.shape))}")
        require(visual_mask.any(dim=1).all(), "visual_mask must mark at least 1 visual token in every sample")
        require(query_mask is None or not (query_mask & visual_mask).any(), "query_mask must mark no visual token")
        self.fixed = counts and {i: torch.as_tensor(K).expand(len(visual_mask)) for i, K in counts.items()}
        require(not counts or all((K >= 1).all() for K in self.fixed.values()),
                f"counts must be 1 or more tokens at each layer, got {counts}")
        self.visual_mask, self.query_mask, self.layers = visual_mask, query_mask, layers
        self.lam, self.k, self._handles = lam, k or H, []

    def average_tokens(self) -> torch.Tensor:
        """(B,) float: mean over the decoder's layers of the visual tokens there, of the last prompt."""
        tokens_in, counts = self.visual_mask.sum(dim=1), [K.to(self.visual_mask.device) for K in self.counts.values()]
        return average_tokens(tokens_in, counts, self.layers, len(self.decoder.layers))

    def __enter__(self) -> "AdaptivePruner":
        if self._handles:
            raise RuntimeError("this AdaptivePruner is active already: leave its block first")
        self.kept, self.counts, self.vav, self.attention, self._stages, self._cache = {}, {}, {}, {}, {}, None
        self._handles = [self.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
                         self.decoder.register_forward_hook(self._after_decoder)]
        for i in range(self.layers[0], len(self.decoder.layers)):
            hook = functools.partial(self._before_layer, i)
            self._handles.append(self.decoder.layers[i].register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, kind, *_) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._stages, self._cache = [], {}, None
        if kind is None and list(self.kept) != self.layers:
            raise RuntimeError("nothing was pruned: the decoder did not run in the block, or was compiled before it")

    def _before_decoder(self, decoder, args, kwargs) -> None:
        """Reads the call: a prompt or its continuation, which tokens are padding; refuses what cannot be pruned."""
        call = inspect.signature(decoder.forward).bind(*args, **kwargs).arguments
        x = call["input_ids"] if call.get("inputs_embeds") is None else call["inputs_embeds"]
        mask, cache, position = (call.get(name) for name in ("attention_mask", "past_key_values", "position_ids"))
        (B, S), (rows, T) = self.visual_mask.shape, x.shape[:2]
        require(cache is None or isinstance(cache, DynamicCache),
                f"past_key_values must be a DynamicCache or None, got {type(cache).__name__}")
        past = 0 if cache is None else cache.get_seq_length()
        require(mask is not None or position is None or (position.diff() == 1).all(),
                "position_ids without an attention_mask must count up by 1: packed sequences are not supported")
        mask = torch.ones(rows, past + T, device=x.device) if mask is None else mask
        require(torch.is_tensor(mask) and mask.shape == (rows, past + T),
                f"attention_mask must be None or of shape (batch, tokens so far), here {(rows, past + T)}")
        window = getattr(decoder.layers[-1].self_attn, "sliding_window", getattr(decoder.config, "sliding_window", 0))
        require(not window or past + T <= window,
                f"the sequence must fit the decoder's sliding window of {window} tokens, got {past + T}")
        self._tail = mask[:, S:].bool() if past else None  # a continuation: validity of the tokens since the prompt
        if past:
            return require(cache is self._cache, "past_key_values must be empty, or filled in this block")
        require(T == S or T > S and self.kept, f"the prompt must have visual_mask's {S} tokens, at once, got {T}")
        c = self._copies = max(1, rows // B)  # generate puts copies of a sample side by side: beams, more answers
        require(rows == B * c and (c == 1 or torch.equal(x[:, :S], x[::c, :S].repeat_interleave(c, dim=0))),
                f"the decoder's batch must be visual_mask's {B} samples, or copies of each in a row, got {rows}")
        after = self.visual_mask.int().flip(1).cumsum(1).flip(1) == 0  # no visual token from here on
        masks = [self.visual_mask, after if self.query_mask is None else self.query_mask]
        self._visual, self._asks = (F.pad(m.to(x.device), (0, T - S)).repeat_interleave(c, dim=0) for m in masks)
        self._index, self._valid = torch.arange(T, device=x.device).expand(rows, T), mask.bool()
        require(not (self._visual & ~self._valid).any(), "visual_mask must be False where attention_mask is 0")
        require((self._asks & self._valid).any(dim=1).all(),
                "visual_mask must be followed by text, or query_mask mark some, in every sample")

    def _before_layer(self, i: int, layer, args, kwargs) -> tuple:
        """A pruned layer selects; it and those up to the next pruned one are called with what belongs to the rest."""
        hidden, cache, rotary = args[0], kwargs.get("past_key_values"), kwargs["position_embeddings"]
        if i in self.layers:
            if self._tail is None:
                hidden = self._prune(i, layer, hidden, rotary)
                self._stages[i], self._cache, valid = self._valid, cache, self._valid  # valid: (B, N)
                rotary = tuple(take(table, self._index) for table in rotary)
            else:
                valid = torch.cat([self._stages[i], self._tail], dim=1)  # (B, N + tokens since the prompt)
            mask = create_causal_mask(self.decoder.config, hidden, valid, cache, layer_idx=i)
            self._changed = {"attention_mask": mask, "position_embeddings": rotary, "position_ids": None}
        return (hidden, *args[1:]), kwargs | self._changed

    def _prune(self, i: int, layer, hidden: torch.Tensor, rotary: tuple) -> torch.Tensor:
        """Stage 3 itself: hidden (B, N, D), the states of the tokens self._index (B, N), to those that stay."""
        index, valid, c = self._index, self._valid, self._copies
        visual, asks = (mask.gather(1, index) & valid for mask in (self._visual, self._asks))  # (B, N)
        with torch.no_grad():
            query_idx, query_valid = compact(asks)
            q, k = queries_and_keys(layer, hidden, tuple(take(table, index) for table in rotary), query_idx)
            a = visual_attention(q, k, layer.self_attn.scaling, query_idx, query_valid, visual, valid)[::c]
            vav, there = head_vav(a), visual[::c].sum(dim=1)
            require(vav.isfinite().all(), f"hidden states at layer {i} must be finite, but hold NaN or infinity")
            K = self.fixed[i].to(a.device).minimum(there) if self.fixed else \
                adaptive_count(vav, self.lam, self.k, there)
            keep = select(text_relevance(a, self.k), K, visual[::c])
        self.kept[i] = torch.zeros_like(self._visual[::c]).scatter(1, index[::c], keep)[:, :visual_mask_length]
        idx, self._valid = compact(valid & ~visual | keep.repeat_interleave(c, dim=0))
        self._index = index.gather(1, idx)
        return take(hidden, idx)
