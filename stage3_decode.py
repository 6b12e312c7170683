r"""METEOR stage 3: drop visual tokens inside an unmodified Hugging Face decoder, as the prompt allows.

Paper: METEOR (ICCV 2025, https://arxiv.org/abs/2507.20842), instance-adaptive text-guided token pruning;
supplement B.1, Tables 3, 7, 8. Training-free. Prior to the input of layers 4, 12 and 20 of 32:

    a_i^h = mean_{t in text after the image} softmax(q_t^h . k^h / sqrt(d))_i    what the prompt looks at
    VAV_h = \sum_i a_i^h                      Visual Attention Value of head h; I: the k heads of highest VAV
    score_i = \sum_{h in I} a_i^h             which tokens: those of highest score
    K = round(\lambda \sum_{h in I} VAV_h)    how many: at least 1, at most those still there

Only the rows of the text queries are computed, from the layer's own q and k: the model stays on SDPA. Text
stays; kept tokens keep their order and rotary positions; later layers and their KV caches are shorter.

In:   a decoder (Llama, Mistral, Qwen2, Qwen3; a CausalLM, or the one in a VLM), visual_mask (B, S) bool.
Out:  in the block, `generate` and `forward` as ever; then pruner.kept[layer] (B, S) bool, .average_tokens():
    with AdaptivePruner(model, visual_mask, lam=50) as pruner:
        ids = model.generate(inputs_embeds=embeds, attention_mask=attention_mask, max_new_tokens=20)

Change here: `text_relevance` (who is kept), `adaptive_count` (how many), `visual_attention` (who asks), and
`counts` of `AdaptivePruner`: fixed budgets in place of `lam` (FastV, PyramidDrop).
Not from the paper: layers L/8, 3L/8, 5L/8 at other depths; halves round up; ties go to the lower index;
\lambda solved from a wanted average; zeros where a token is gone. `python stage3_decode.py` is a tiny demo.
"""

import inspect
import math
import weakref
from collections.abc import Callable, Iterable
from functools import partial

import torch
import transformers
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import create_causal_mask

CHECKED = weakref.WeakSet()  # decoders whose layers passed `check_decoder`, which takes a while


def visual_attention(
    q: Tensor,
    k: Tensor,
    scale: float,
    query_idx: Tensor,
    query_valid: Tensor,
    visual_mask: Tensor,
    valid: Tensor,
) -> Tensor:
    r"""a_i^h = mean_t softmax_s(scale q_t^h . k_s^h)_i over the text queries t; s: all tokens that t may see.

    Args: q (B, H, T, d) float: queries of the text; k (B, H_kv, S, d) float: keys of all; H_kv divides H.
        query_idx (B, T) int64: place in S of each query; query_valid (B, T) bool: False for a filler.
        visual_mask (B, S) bool: the visual tokens; valid (B, S) bool: False on padding.
    Returns: (B, H, S) float32, 0 outside the visual tokens. Memory: B H T S floats.  Source: [paper]
    """
    (B, H, T, d), S = q.shape, k.shape[2]
    scores = scale * (q.reshape(B, k.shape[1], -1, d).float() @ k.float().mT).view(
        B, H, T, S
    )  # H_kv groups
    sees = valid[:, None] & (
        torch.arange(S, device=q.device) <= query_idx[..., None]
    )  # causal: (B, T, S)
    weights = scores.masked_fill(~sees[:, None], torch.finfo(torch.float32).min).softmax(dim=-1)
    weights = weights.masked_fill(~query_valid[:, None, :, None], 0)  # (B, H, T, S)
    return (
        weights.sum(dim=2) / query_valid.sum(dim=1)[:, None, None] * visual_mask[:, None]
    )  # (B, H, S)


def head_vav(attention: Tensor) -> Tensor:
    r"""VAV_h = \sum_i a_i^h, 0..1. (B, H, S) -> (B, H).  Source: [paper, Finding 4]"""
    return attention.sum(dim=-1)


def text_relevance(attention: Tensor, k: int) -> Tensor:
    r"""score_i = \sum_{h in I} a_i^h; of equal VAVs the lower head. (B, H, S) -> (B, S).  Source: [paper]"""
    heads = head_vav(attention).argsort(dim=1, descending=True, stable=True)[
        :, :k, None
    ]  # I: (B, k, 1)
    return attention.take_along_dim(heads, dim=1).sum(dim=1)


def adaptive_count(vav: Tensor, lam: float, k: int, available: Tensor) -> Tensor:
    r"""K = \lambda \sum_{h in I} VAV_h, halves rounded up, within 1 and what is there.

    Args: vav (B, H) float; lam: 0..infinity (keeps all); k: 1..H; available (B,) int64: tokens still there.
    Returns: (B,) int64, 1..available, 0 where nothing is there.  Source: [paper, Finding 5; Table 8]
    """
    if math.isinf(lam):  # infinity x a sum of 0 would be NaN
        return available
    K = (lam * vav.double().topk(k, dim=1).values.sum(dim=1) + 0.5).floor()
    return K.clamp(min=1).minimum(available).long()


def select(score: Tensor, count: Tensor, visual_mask: Tensor) -> Tensor:
    """The count[b] visual tokens of highest score; ties: lower index. (B, S), (B,), (B, S) -> (B, S) bool."""
    order = score.masked_fill(~visual_mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return (
        order.argsort(dim=1) < count[:, None]
    ) & visual_mask  # argsort of the order: place of each token


def average_tokens(
    tokens_in: float | Tensor, counts: list, layers: list, num_layers: int
) -> float | Tensor:
    """Mean over the LLM's layers of the visual tokens present: "# Tok." with a star in the paper.

    Args: tokens_in and counts[j], there from layers[j] (0-indexed) on: numbers, or (B,) tensors.
    Returns: a float, or (B,). 576 in, [396, 170, 76] at [4, 12, 20] of 32: 242.  Source: [supplement Table 3]
    """
    spans = [end - i for i, end in zip(layers, [*layers[1:], num_layers])]
    return (tokens_in * layers[0] + sum(K * span for K, span in zip(counts, spans))) / num_layers


def solve_lambda(
    target_average: float, measure: Callable[[float], float], tolerance: float = 0.5
) -> float:
    r"""The \lambda that keeps target_average tokens, by bisection of \lambda = x / (1 - x), 0 < x < 1.

    Args: measure: \lambda -> mean `average_tokens` of a calibration set, not falling; tolerance: in tokens.
    Raises: ValueError where target_average is not in measure(0)..measure(infinity).  Source: [our choice]
    """
    low, high, least, most = 0.0, 1.0, measure(0.0), measure(math.inf)
    require(
        least <= target_average <= most,
        f"target_average must be {least:.2f} to {most:.2f} here, got {target_average}",
    )
    for _ in range(40):
        x = (low + high) / 2
        if abs((average := measure(x / (1 - x))) - target_average) <= tolerance:
            break
        low, high = (x, high) if average < target_average else (low, x)
    return x / (1 - x)


def compact(stays: Tensor) -> tuple[Tensor, Tensor]:
    """(B, S) bool -> idx (B, N) int64: places of the True entries in order, right-aligned; real (B, N) bool:
    False where a shorter row is filled up in front, by places of False entries, none twice."""
    N = int(stays.sum(dim=1).max())
    idx = stays.int().argsort(dim=1, stable=True)[
        :, stays.shape[1] - N :
    ]  # False, then True, each in order
    return idx, stays.gather(1, idx)


def require(condition, message: str) -> None:
    if not condition:
        raise ValueError(message)


# ------------------------------------------------------------------------- the library's own names
# Hooks see a call by the names of its arguments, and a release of transformers may rename them, as
# 5.24 did. The arguments that stage 3 reads or replaces are named in this part alone. These names,
# and those of modules below, have a test each in tests/test_library_names.py.

TESTED_VERSIONS = "5.18 to 5.24"  # of transformers, the bounds in pyproject.toml
DECODER_ARGUMENTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
LAYER_ARGUMENTS = ("hidden_states", "attention_mask", "position_embeddings")


def tested() -> str:
    return f"tested with transformers {TESTED_VERSIONS}, this is {transformers.__version__}"


def require_names(names: Iterable[str], found: Iterable[str], where: str) -> None:
    """TypeError that says which of `names` the library no longer has there, and what was tested."""
    for name in names:
        if name not in found:
            raise TypeError(f"{where} has no {name!r}, which stage 3 needs ({tested()})")


def find_cache(values: Iterable) -> Cache | None:
    """The KV cache among a call's arguments or outputs, whatever its name; None where there is none.

    It is told by its type: the name was past_key_values until transformers 5.23, and is cache now.
    What only behaves like a cache is found too, so that it can be refused.
    """
    for value in values:
        if isinstance(value, Cache) or hasattr(value, "get_seq_length"):
            return value
    return None


def read_decoder_call(decoder, args: tuple, kwargs: dict) -> tuple:
    """What a decoder is called with.

    Returns: the input, ids (rows, T) or embeddings (rows, T, D); its attention mask, position ids
        and KV cache, each None where not given.
    """
    signature = inspect.signature(decoder.forward)
    call = signature.bind(*args, **kwargs).arguments
    ids, embeds, mask, position = (call.get(name) for name in DECODER_ARGUMENTS)
    cache = find_cache([*args, *kwargs.values()])
    return (ids if embeds is None else embeds), mask, position, cache


def read_layer_call(layer, args: tuple, kwargs: dict) -> tuple:
    """What a layer is called with: hidden (rows, N, D), its mask, rotary (cos, sin), the KV cache.

    Raises: TypeError for a name that is missing; ValueError where only the position tells arguments.
    """
    call = dict(zip(LAYER_ARGUMENTS, args[:1])) | kwargs  # the hidden states come by position
    where = f"the call of a {type(layer).__name__}"
    require(len(args) <= 1, f"{where} must name all but its first argument ({tested()})")
    require_names(LAYER_ARGUMENTS, call, where)
    hidden, mask, rotary = (call[name] for name in LAYER_ARGUMENTS)
    return hidden, mask, rotary, find_cache(call.values())


def change_layer_call(kwargs: dict, hidden: Tensor, mask: Tensor | None, rotary) -> tuple:
    """args and kwargs of the same call with these three in place of what came."""
    changed = kwargs | dict(zip(LAYER_ARGUMENTS, (hidden, mask, rotary)))
    hidden = changed.pop(LAYER_ARGUMENTS[0])
    return (hidden,), changed


def on_sdpa_or_eager(decoder) -> bool:
    return decoder.config._attn_implementation in ("sdpa", "eager")


# ------------------------------------------------------------------------------- inside a decoder


def queries_and_keys(
    layer, hidden: Tensor, rotary: list[Tensor], query_idx: Tensor
) -> tuple[Tensor, Tensor]:
    """The layer's rotated q (B, H, T, d) at query_idx (B, T) and k (B, H_kv, S, d), of hidden (B, S, D)."""
    attn, x, rows = layer.self_attn, layer.input_layernorm(hidden), query_idx[..., None]
    heads = lambda y: y.unflatten(-1, (-1, attn.head_dim)).transpose(
        1, 2
    )  # (B, S, H d) -> (B, H, S, d)
    q, k = heads(attn.q_proj(x.take_along_dim(rows, dim=1))), heads(attn.k_proj(x))
    if hasattr(attn, "q_norm"):  # Qwen3
        q, k = attn.q_norm(q), attn.k_norm(k)
    rotate = inspect.getmodule(type(attn)).apply_rotary_pos_emb  # of the architecture's own file
    return rotate(q, q, *(table.take_along_dim(rows, dim=1) for table in rotary))[0], rotate(
        k, k, *rotary
    )[0]


@torch.no_grad()
def check_decoder(decoder) -> None:
    """Three tokens through each layer's attention; TypeError where `queries_and_keys` cannot explain it."""
    modes = [(module, module.training) for module in getattr(decoder, "modules", list)()]
    try:
        require(on_sdpa_or_eager(decoder), "it is not on sdpa or eager")
        require_names(
            DECODER_ARGUMENTS, inspect.signature(decoder.forward).parameters, "its forward"
        )
        decoder.eval()  # no dropout, and so no random numbers
        position, D = torch.arange(3, device=decoder.device)[None], decoder.config.hidden_size
        x = torch.linspace(0, 99, 3 * D).sin().view(1, 3, D).to(decoder.device, decoder.dtype)
        rotary, last, every = decoder.rotary_emb(x, position), position[:, 2:], position >= 0
        for layer in decoder.layers:
            attn, normed = layer.self_attn, layer.input_layernorm(x)
            for module in (layer, attn):
                known = inspect.signature(module.forward).parameters
                if any(
                    name in known for name in LAYER_ARGUMENTS
                ):  # a wrapper may name none of them
                    require_names(LAYER_ARGUMENTS, known, f"{type(module).__name__}.forward")
            args, kwargs = change_layer_call({}, normed, None, rotary)
            theirs = attn(*args, **kwargs)[0][0, 2]
            q, k = queries_and_keys(layer, x, rotary, last)
            a = visual_attention(
                q, k, attn.scaling, last, last > 0, every, every
            )  # of the last: (1, H, 3)
            v = attn.v_proj(normed).view(3, k.shape[1], -1)  # (3, H_kv, d)
            ours = torch.einsum(
                "hgs,shd->hgd", a.view(k.shape[1], -1, 3).to(v.dtype), v
            )  # (H_kv, H/H_kv, d)
            off = (attn.o_proj(ours.flatten()) - theirs).abs().max() / theirs.abs().max()
            require(
                off <= max(torch.finfo(x.dtype).eps, 1e-7) ** 0.5, "its attention is not Llama's"
            )
        CHECKED.add(decoder)
    except Exception as e:  # whatever another architecture answers
        name, reason = type(decoder).__name__, str(e)
        if tested() not in reason:
            reason += f" ({tested()})"
        raise TypeError(f"decoder must be Llama, Mistral, Qwen2 or Qwen3, not {name}: {reason}")
    finally:
        for module, mode in modes:
            module.training = mode


class AdaptivePruner:
    r"""Prunes visual tokens inside a `with` block, by hooks; nothing of it is left on the model afterwards.
    Modifications: from the first pruned layer on, layers get the tokens left, right-aligned, their mask and
    rotary positions; last_hidden_state goes back to full length. A KV cache filled in the block ends with it.
    Args:
        decoder: of Llama's kind, on sdpa or eager; visual_mask (B, S) bool: visual tokens, if any.
        layers: ascending, 1..L-1, pruned prior to their input; None: L/8, 3L/8, 5L/8.
        lam: \lambda, 0..infinity (keeps all); k: number of heads that decide, 1..H; None: all.
        query_mask (B, S) bool: who asks; None: the text after the last visual token. Leave out answers.
        counts: {layer: tokens kept at most, an int or (B,) int64}, in place of layers and lam.
    After a prompt: kept[layer] (B, S) bool, visual tokens there from that layer on; counts[layer] (B,) int64;
        vav[layer] (B, H) and attention[layer] (B, H, S) float32, what the layer decided by.
    Raises: TypeError for an unsupported decoder, at its first pruner; ValueError for what cannot be pruned.
    """

    def __init__(
        self,
        decoder,
        visual_mask: Tensor,
        layers: list | None = None,
        lam: float | None = None,
        k: int | None = 5,
        query_mask: Tensor | None = None,
        counts: dict | None = None,
    ):
        self.decoder = decoder.get_decoder() if hasattr(decoder, "get_decoder") else decoder
        if self.decoder not in CHECKED or not on_sdpa_or_eager(self.decoder):
            check_decoder(self.decoder)
        L, H = self.decoder.config.num_hidden_layers, self.decoder.config.num_attention_heads
        require((lam is None) != (counts is None), "lam or counts must be given, and not both")
        require(lam is None or lam >= 0, f"lam must be 0 to infinity, got {lam}")
        require(
            counts is None or layers is None,
            "layers must be None beside counts, whose keys they are",
        )
        require(
            k is None or k in range(1, H + 1),
            f"k must be 1 to {H}, the heads, or None for all, got {k}",
        )
        layers = [L // 8, 3 * L // 8, 5 * L // 8] if layers is None else list(layers)
        layers = layers if counts is None else sorted(counts)
        require(
            layers and layers == sorted(set(layers) & set(range(1, L))),
            f"layers must be ascending numbers, 1 to {L - 1} for this decoder, got {layers}",
        )
        for name, m in (("visual_mask", visual_mask), ("query_mask", query_mask)):
            require(
                m is None or (m.dtype, m.dim(), m.shape) == (torch.bool, 2, visual_mask.shape),
                f"{name} must be bool of shape (B, S), got {m is not None and (m.dtype, tuple(m.shape))}",
            )
        asks = (
            visual_mask.flip(1).cumsum(1).flip(1) == 0
            if query_mask is None
            else query_mask & ~visual_mask
        )
        self.visual_mask, self.asks = (
            m.to(self.decoder.device) for m in (visual_mask, asks)
        )  # (B, S)
        self.fixed = {
            i: torch.as_tensor(K).expand(len(visual_mask)) for i, K in (counts or {}).items()
        }
        self.layers, self.num_layers, self.lam, self.k, self._handles = layers, L, lam, k or H, []

    def average_tokens(self) -> Tensor:
        """(B,) float: visual tokens there in the last prompt, mean over the decoder's layers."""
        return average_tokens(
            self.visual_mask.sum(1), [*self.counts.values()], self.layers, self.num_layers
        )

    def __enter__(self) -> "AdaptivePruner":
        require(not self._handles, "this AdaptivePruner must not be entered twice at a time")
        self.kept, self.counts, self.vav, self.attention, self._stages, self._cache = (
            {},
            {},
            {},
            {},
            {},
            None,
        )
        self._handles = [
            self.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            self.decoder.register_forward_hook(self._after_decoder),
        ]
        self._handles += [
            layer.register_forward_pre_hook(partial(self._before_layer, i), with_kwargs=True)
            for i, layer in enumerate(self.decoder.layers)
            if i >= self.layers[0]
        ]
        return self

    def __exit__(self, kind, *_) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._stages, self._cache = [], {}, None
        require(
            kind or list(self.kept) == self.layers,
            "the decoder did not run, or was compiled before",
        )

    def _before_decoder(self, decoder, args, kwargs) -> None:
        """Reads the call: a prompt or its continuation, what is padding; refuses what cannot be pruned."""
        x, mask, position, cache = read_decoder_call(decoder, args, kwargs)
        past, (B, S), (rows, T) = (
            cache.get_seq_length() if cache else 0,
            self.visual_mask.shape,
            x.shape[:2],
        )
        require(
            not cache or isinstance(cache, DynamicCache) and past == 0 or cache is self._cache,
            "the KV cache must be None, or a DynamicCache that is empty or was filled in this block",
        )
        require(
            mask is not None or position is None or (position.diff() == 1).all(),
            "position_ids must count up by 1 where there is no attention_mask: packing is not supported",
        )
        mask = torch.ones(rows, past + T, device=x.device) if mask is None else mask
        hint = ""
        if cache is None and self.kept and T < S:
            hint = f"; if this call continues the prompt, its KV cache was not found ({tested()})"
        require(
            getattr(mask, "shape", 0) == (rows, past + T),
            f"attention_mask must be (B, tokens so far){hint}",
        )
        require(
            past + T <= (getattr(decoder.config, "sliding_window", None) or math.inf),
            f"the sequence must fit the decoder's sliding_window, but has {past + T} tokens",
        )
        self._past, self._changed = past, None
        self._tail = mask.bool()[
            :, self._visual.shape[1] if past else T :
        ]  # (rows, tokens since the prompt)
        if past:
            return
        require(
            T == S or T > S and self.kept,
            f"the prompt must be visual_mask's {S} tokens, got {T}{hint}",
        )
        c = self._copies = max(
            1, rows // B
        )  # generate puts copies of a sample side by side, e.g. for beams
        require(
            rows == B * c and (c == 1 or x[:, :S].equal(x[::c, :S].repeat_interleave(c, dim=0))),
            f"the batch must be visual_mask's {B} samples, or copies of each side by side, got {rows}",
        )
        self._visual, self._asks = (
            torch.nn.functional.pad(m, (0, T - S)).repeat_interleave(c, dim=0)
            for m in (self.visual_mask, self.asks)
        )  # (rows, T)
        self._index, self._valid = torch.arange(T, device=x.device).expand(rows, T), mask.bool()
        require(
            (self._visual <= self._valid).all(),
            "visual_mask must be False where attention_mask is 0",
        )
        require(
            (self._asks & self._valid).any(dim=1).all(),
            "visual_mask must be followed by text, or query_mask mark some, in every sample",
        )

    def _before_layer(self, i: int, layer, args, kwargs) -> tuple:
        """A pruned layer selects; it and those up to the next pruned layer are called with what is left."""
        hidden, mask, rotary, cache = read_layer_call(layer, args, kwargs)
        if self._changed:  # by a pruned layer below
            mask, rotary = self._changed
        if i in self.layers:
            if not self._past:
                idx, self._valid = compact(self._stays(i, layer, hidden, rotary))  # (rows, N)
                hidden, *rotary = (
                    x.take_along_dim(idx[..., None], dim=1) for x in (hidden, *rotary)
                )
                self._index, self._stages[i], self._cache = (
                    self._index.gather(1, idx),
                    self._valid,
                    cache,
                )
            valid = torch.cat(
                [self._stages[i], self._tail], dim=1
            )  # (rows, N + tokens since the prompt)
            mask = create_causal_mask(self.decoder.config, hidden, valid, cache, layer_idx=i)
            self._changed = mask, rotary
        return change_layer_call(kwargs, hidden, mask, rotary)

    @torch.no_grad()
    def _stays(self, i: int, layer, hidden: Tensor, rotary: tuple) -> Tensor:
        """Stage 3 itself: which of the tokens with states hidden (rows, N, D) stay, (rows, N) bool."""
        index, valid, c = self._index, self._valid, self._copies
        visual, asks = (m.gather(1, index) & valid for m in (self._visual, self._asks))  # (rows, N)
        query_idx, query_valid = compact(asks)
        q, k = queries_and_keys(layer, hidden, rotary, query_idx)
        a = visual_attention(q, k, layer.self_attn.scaling, query_idx, query_valid, visual, valid)[
            ::c
        ]
        vav, there = head_vav(a), visual[::c].sum(dim=1)
        require(
            vav.isfinite().all(),
            f"hidden states at layer {i} must be finite, but hold NaN or infinity",
        )
        K = self.fixed[i].to(there) if self.fixed else adaptive_count(vav, self.lam, self.k, there)
        keep = select(text_relevance(a, self.k), K, visual[::c])  # (B, N)
        full, place = a.new_zeros(*a.shape[:2], self._visual.shape[1]), index[::c, None]
        self.kept[i] = (
            full[:, 0].bool().scatter(1, place[:, 0], keep)[:, : self.visual_mask.shape[1]]
        )
        self.attention[i] = full.scatter(2, place.expand_as(a), a)[..., : self.visual_mask.shape[1]]
        self.counts[i], self.vav[i] = K.minimum(there), vav
        return valid & ~visual | keep.repeat_interleave(c, dim=0)

    def _after_decoder(self, decoder, args, output) -> None:
        """The prompt's last hidden state goes back to full length, so that logits and labels line up."""
        if not self._past:
            name = type(decoder).__name__
            require(not isinstance(output, tuple), "return_dict must be True, or not given")
            require_names(["last_hidden_state"], dir(output), f"the output of {name}")
            cache = find_cache(output.values())
            same = (
                cache is self._cache or cache is None or cache.get_seq_length() == 0
            )  # 0: not used
            require(
                same or not self.kept,  # if nothing was kept, no layer's hook ran: __exit__ says so
                f"{name} must hand its KV cache to the layers as it is ({tested()})",
            )
            hidden = output.last_hidden_state.masked_fill(
                ~self._valid[..., None], 0
            )  # (rows, N, D)
            full = hidden.new_zeros(*self._visual.shape, hidden.shape[2])
            output.last_hidden_state = full.scatter(
                1, self._index[..., None].expand_as(hidden), hidden
            )


def main() -> None:
    """A random Llama of 8 layers, prompts of 48 visual tokens: what each lambda keeps, and the KV caches."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=64, num_hidden_layers=8, num_attention_heads=8)
    ).eval()
    embeds, visual_mask = torch.randn(2, 64, 64), (torch.arange(64) < 48).expand(2, 64)
    for lam in (math.inf, 10, 5):
        with AdaptivePruner(model, visual_mask, lam=lam) as pruner, torch.no_grad():
            cache = find_cache(model(inputs_embeds=embeds).values())
        kept = [K.tolist() for K in pruner.counts.values()]
        print(
            f"lambda {lam}: 48 -> {kept} visual tokens; KV cache",
            [*map(cache.get_seq_length, range(8))],
        )


if __name__ == "__main__":
    main()
