r"""METEOR stage 3: drop visual tokens inside an unmodified Hugging Face decoder.

Paper: METEOR (ICCV 2025, https://arxiv.org/abs/2507.20842), instance-adaptive text-guided token
pruning; supplement B.1, Tables 3, 7, 8. Training-free. Prior to the input of layers 4, 12 and 20
of 32:

    a_i^h = mean_{t in text after the image} softmax(q_t^h . k^h / sqrt(d))_i
                                              what the text looks at
    VAV_h = \sum_i a_i^h                      Visual Attention Value of head h
    I     = the k heads of highest VAV        most heads do not look at the image
    score_i = \sum_{h in I} a_i^h             which tokens stay: those of highest score
    K = round(\lambda \sum_{h in I} VAV_h)    how many stay: at least 1, at most those still there

Text always stays. Kept tokens keep their order and their rotary positions. Later layers, and their
KV caches, are shorter. Only the rows of the text that asks are computed, from the layer's own q and
k, so the layers themselves stay on SDPA.

In:   a decoder of Llama's kind, alone or inside a vision-language model;
      visual_mask (B, S) bool.
Out:  inside the block, `generate` and `forward` as ever, with fewer tokens; afterwards
      pruner.kept[layer] (B, S) bool and pruner.average_tokens():

    with AdaptivePruner(model, visual_mask, lam=50) as pruner:
        ids = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=20)

Served: Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE, Gemma, Gemma 3, Granite, Cohere, Phi-3,
SmolLM3, Starcoder2, and the decoders inside LLaVA, LLaVA-NeXT, LLaVA-OneVision, InternVL, Idefics3,
SmolVLM, DeepSeek-VL, PaliGemma, Qwen2.5-VL and Qwen3-VL. No list decides: `check_decoder` does.

Change here: `text_relevance` (which tokens are kept), `adaptive_count` (how many),
`visual_attention` (what is looked at), `AdaptivePruner._choose` (all of it). Fixed budgets go by
`counts` in place of `lam`; with k=None and the last token alone as query_mask that is FastV or
PyramidDrop.
Not from the paper: layers L/8, 3L/8, 5L/8 at other depths; halves round up; ties go to the lower
index; \lambda is solved from a wanted average; zeros where a token is gone.
`python stage3_decode.py` is a tiny demo.
"""

import inspect
import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import create_causal_mask

# --------------------------------------------------------------------------------- the paper's idea


def visual_attention(
    q: Tensor,
    k: Tensor,
    scale: float,
    query_idx: Tensor,
    query_valid: Tensor,
    visual_mask: Tensor,
    valid: Tensor,
    sees: Tensor | None = None,
) -> Tensor:
    r"""How much the text looks at each visual token, in each head.

    a_i^h = mean_t softmax_s(scale q_t^h . k_s^h)_i    t: text queries; s: all tokens that t may see

    Args:
        q (B, H, T, d) float: queries of the text.
        k (B, H_kv, S, d) float: keys of the S tokens that are there; H_kv divides H, as heads may
            share keys.
        scale: what the layer multiplies its scores by, mostly 1 / sqrt(d).
        query_idx (B, T) int64: place in S of each query.
        query_valid (B, T) bool: False for a filler, in samples with fewer queries than others.
        visual_mask (B, S) bool: the visual tokens.
        valid (B, S) bool: False on padding.
        sees (B, T, S) bool: what each query may see; None: itself and what is before it.
    Returns:
        attention (B, H, S) float32: 0..1, and 0 outside the visual tokens. Memory: B H T S floats.
    Source: [paper]
    """
    B, H, T, d = q.shape
    H_kv, S = k.shape[1:3]
    if sees is None:
        sees = seen_by(query_idx, valid)  # (B, T, S)

    q = q.reshape(B, H_kv, -1, d)  # (B, H_kv, H / H_kv T, d): the heads that share a key
    scores = scale * (q.float() @ k.float().mT)  # (B, H_kv, H / H_kv T, S)
    scores = scores.view(B, H, T, S)
    lowest = torch.finfo(torch.float32).min
    weights = scores.masked_fill(~sees[:, None], lowest).softmax(dim=-1)  # (B, H, T, S)

    is_filler = ~query_valid[:, None, :, None]  # (B, 1, T, 1)
    number = query_valid.sum(dim=1)[:, None, None]  # (B, 1, 1)
    mean = weights.masked_fill(is_filler, 0).sum(dim=2) / number  # (B, H, S)
    return mean.masked_fill(~visual_mask[:, None], 0)


def seen_by(query_idx: Tensor, valid: Tensor) -> Tensor:
    """What a query sees of a causal sequence: itself and all before it, but no padding.

    Args:
        query_idx (B, T) int64: place in S of each query.
        valid (B, S) bool: False on padding.
    Returns:
        sees (B, T, S) bool.
    """
    place = torch.arange(valid.shape[1], device=valid.device)  # (S,)
    not_later = place <= query_idx[..., None]  # (B, T, S)
    return not_later & valid[:, None]


def head_vav(attention: Tensor) -> Tensor:
    r"""Visual Attention Value of each head: VAV_h = \sum_i a_i^h.

    Args:
        attention (B, H, S) float: of `visual_attention`.
    Returns:
        vav (B, H) float: 0..1, the share of its attention that a head gives to the image.
    Source: [paper, Finding 4]
    """
    return attention.sum(dim=-1)


def text_relevance(attention: Tensor, k: int) -> Tensor:
    r"""Which tokens matter to the question: score_i = \sum_{h in I} a_i^h.

    Args:
        attention (B, H, S) float: of `visual_attention`.
        k: size of I, 1..H; of heads with equal VAV the lower is taken.
    Returns:
        score (B, S) float: higher is kept.
    Source: [paper]
    """
    vav = head_vav(attention)  # (B, H)
    order = vav.argsort(dim=1, descending=True, stable=True)  # (B, H)
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


def select(score: Tensor, count: Tensor, visual_mask: Tensor) -> Tensor:
    """The visual tokens of highest score; of equal scores the lower index.

    Args:
        score (B, S) float: higher is kept.
        count (B,) int64: how many to keep of each sample.
        visual_mask (B, S) bool: whom to choose from.
    Returns:
        keep (B, S) bool.
    Source: [paper]
    """
    score = score.masked_fill(~visual_mask, -torch.inf)
    order = score.argsort(dim=1, descending=True, stable=True)  # (B, S): the best token first
    place = order.argsort(dim=1)  # (B, S): the place of each token in that order
    among_best = place < count[:, None]
    return among_best & visual_mask


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
    ends = [*layers[1:], num_layers]
    after_pruning = 0
    for K, start, end in zip(counts, layers, ends):
        after_pruning = after_pruning + K * (end - start)
    before_pruning = tokens_in * layers[0]
    return (before_pruning + after_pruning) / num_layers


def solve_lambda(
    target_average: float, measure: Callable[[float], float], tolerance: float = 0.5
) -> float:
    r"""The \lambda that keeps as many tokens as wanted, on average over layers and prompts.

    By bisection of x in \lambda = x / (1 - x), which reaches from 0 to infinity as x goes from 0
    to 1.

    Args:
        target_average: wanted mean of `average_tokens`.
        measure: \lambda -> mean `average_tokens` over a calibration set; must never fall.
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
        lam = x / (1 - x)
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
    hide its fillers. They are places of tokens that do not stay, none of them twice. Of five
    tokens, True for 1 and 4: idx [1, 4]; beside a row that keeps three, [3, 1, 4].

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
    return x.take_along_dim(idx[..., None], dim=1)


def require(condition, message: str) -> None:
    if not condition:
        raise ValueError(message)


# -------------------------------------------------------------------------- the library's own names
# Hooks see a call by the names of its arguments, and a release of transformers may rename them, as
# 5.24 did. What stage 3 reads or replaces in transformers is named in this part alone, apart from
# config, device, dtype and layers. Each name has a test in tests/test_library_names.py.

TESTED_VERSIONS = "5.18 to 5.24"  # of transformers, the bounds in pyproject.toml
DECODER_ARGUMENTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
LAYER_ARGUMENTS = ("hidden_states", "attention_mask", "position_embeddings")
ADDED_FEATURES = "deepstack_visual_embeds"  # of Qwen3-VL: what it adds after its first layers


class DecoderCall(NamedTuple):
    """What a decoder is called with; all but x is None where it was not given."""

    x: Tensor  # ids (rows, T), or embeddings (rows, T, D)
    mask: Tensor | dict | None
    position_ids: Tensor | None
    cache: Cache | None
    added: list | None


class LayerCall(NamedTuple):
    """What a layer is called with."""

    hidden: Tensor  # (rows, N, D)
    mask: Tensor | None
    rotary: tuple[Tensor, Tensor]  # cos and sin, (rows or 1, N, d) each
    cache: Cache | None


def tested() -> str:
    return f"tested with transformers {TESTED_VERSIONS}, this is {transformers.__version__}"


def require_names(names: Iterable[str], found: Iterable[str], where: str) -> None:
    """TypeError that says which of `names` the library no longer has there, and what was tested."""
    for name in names:
        if name not in found:
            raise TypeError(f"{where} has no {name!r}, which stage 3 needs ({tested()})")


def find_cache(values: Iterable) -> Cache | None:
    """The KV cache among a call's arguments or outputs, whatever its name; or None.

    It is told by its type: the name was past_key_values until transformers 5.23, and is cache now.
    What only behaves like a cache is found too, so that it can be refused.
    """
    for value in values:
        if isinstance(value, Cache) or hasattr(value, "get_seq_length"):
            return value
    return None


def read_decoder_call(signature: inspect.Signature, args: tuple, kwargs: dict) -> DecoderCall:
    """Sort a call's arguments by name; signature: of the decoder's forward."""
    named = signature.bind(*args, **kwargs).arguments
    ids, embeds, mask, position_ids = (named.get(name) for name in DECODER_ARGUMENTS)
    return DecoderCall(
        x=ids if embeds is None else embeds,
        mask=mask,
        position_ids=position_ids,
        cache=find_cache([*args, *kwargs.values()]),
        added=kwargs.get(ADDED_FEATURES),
    )


def read_layer_call(layer, args: tuple, kwargs: dict) -> LayerCall:
    """Sort a call's arguments by name. The hidden states come by position, all others by name.

    Raises: TypeError for a name that is missing; ValueError for more arguments by position.
    """
    where = f"the call of a {type(layer).__name__}"
    require(len(args) <= 1, f"{where} must name all but its first argument ({tested()})")
    named = dict(zip(LAYER_ARGUMENTS, args)) | kwargs
    require_names(LAYER_ARGUMENTS, named, where)
    hidden, mask, rotary = (named[name] for name in LAYER_ARGUMENTS)
    return LayerCall(hidden, mask, rotary, find_cache(named.values()))


def change_layer_call(kwargs: dict, hidden: Tensor, mask: Tensor | None, rotary) -> tuple:
    """args and kwargs of the same call with these three in place of what came."""
    changed = kwargs | dict(zip(LAYER_ARGUMENTS, (hidden, mask, rotary)))
    hidden = changed.pop(LAYER_ARGUMENTS[0])
    return (hidden,), changed


def on_sdpa_or_eager(decoder) -> bool:
    return decoder.config._attn_implementation in ("sdpa", "eager")


def hides_future(decoder) -> bool:
    """Whether its attention hides the future where it is given no mask. PaliGemma's does not."""
    return all(getattr(layer.self_attn, "is_causal", True) for layer in decoder.layers)


def shortest_window(config) -> float:
    """Tokens that the decoder's sliding layers look back on; infinity where no layer slides."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)  # not there where all layers are alike
    some_slide = layer_types is None or "sliding_attention" in layer_types
    if window is None or not some_slide:
        return math.inf
    return window


def packing_positions(position_ids: Tensor | None) -> Tensor | None:
    """The positions (rows, T) that could tell packed prompts; None where none were given.

    Qwen-VL has three positions a token: time, row and column, (3, rows, T). They may jump. Where a
    fourth comes first, (4, rows, T), it counts the tokens.
    """
    if position_ids is None or position_ids.dim() == 2:
        return position_ids
    has_token_count = position_ids.shape[0] == 4
    return position_ids[0] if has_token_count else None


def rotary_tables(decoder, layer, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (1, S, d) that the decoder makes for this layer, at position (1, S)."""
    rotary_emb = decoder.rotary_emb
    if hasattr(rotary_emb, "mrope_section"):  # Qwen-VL: time, row and column, here the same
        return rotary_emb(x, position.expand(3, 1, -1))
    if "layer_type" in inspect.signature(rotary_emb.forward).parameters:  # Gemma 3: a table a type
        return rotary_emb(x, position, layer.self_attn.layer_type)
    return rotary_emb(x, position)


def has_rotary(attn) -> bool:
    """SmolLM3 has layers without positions: they are given the tables and do not use them."""
    return getattr(attn, "use_rope", True)


def split_fused(attn, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, S, H d), k and v (B, S, H_kv d) from one matrix for all three, as Phi-3 has it."""
    q_width = attn.o_proj.in_features
    both_widths = attn.qkv_proj.out_features - q_width  # of k and v
    return attn.qkv_proj(x).split([q_width, both_widths // 2, both_widths // 2], dim=-1)


def project(attn, x: Tensor, query_idx: Tensor) -> tuple[Tensor, Tensor]:
    """q (B, T, H d) of the tokens at query_idx and k (B, S, H_kv d) of all."""
    if hasattr(attn, "qkv_proj"):
        q, k, _ = split_fused(attn, x)
        return take(q, query_idx), k
    return attn.q_proj(take(x, query_idx)), attn.k_proj(x)


def project_values(attn, x: Tensor) -> Tensor:
    """v (B, S, H_kv d) of all tokens."""
    if hasattr(attn, "qkv_proj"):
        return split_fused(attn, x)[2]
    return attn.v_proj(x)


def normalise(attn, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q and k (B, n, heads, d) as Qwen3, Gemma 3 and some Cohere norm them; others do not."""
    if hasattr(attn, "q_norm"):
        return attn.q_norm(q), attn.k_norm(k)
    return q, k


def rotate(attn, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, heads, n, d) turned by its positions, as the architecture's own file does it."""
    turn = inspect.getmodule(type(attn)).apply_rotary_pos_emb
    return turn(x, x, cos, sin)[0]


# ----------------------------------------------------------------------------- masks of the library


class Padding(NamedTuple):
    """What a decoder's attention mask says."""

    valid: Tensor  # (rows, tokens so far) bool: False on padding
    is_plain: bool  # False where the model made masks that say more than "no padding, no future"


def read_mask(mask: Tensor | dict | None, rows: int, past: int, T: int, device) -> Padding | None:
    """What is padding. None where the mask is not of a kind that is understood.

    A model gives its decoder no mask, or (rows, tokens so far), 0 on padding. Where visual tokens
    see each other both ways (PaliGemma, Gemma 3), it gives finished masks (rows, 1, T, tokens so
    far), one or a dict of one for each type of layers.
    """
    everything = torch.ones(rows, past + T, dtype=torch.bool, device=device)
    if isinstance(mask, dict):
        mask = next((one for one in mask.values() if one is not None), None)
    if mask is None:
        return Padding(everything, is_plain=True)
    if getattr(mask, "shape", None) == everything.shape:
        return Padding(mask.bool(), is_plain=True)
    if not is_finished_mask(mask, rows, T):
        return None
    # Of what follows the prompt, only the mask's last columns are used: the prompt's padding is
    # known. One token of an answer sees all of them; of several, who sees whom is not understood.
    if past > 0:
        return Padding(everything, is_plain=True) if T == 1 else None
    sees = allowed(mask)[:, 0].expand(rows, -1, -1)  # (rows, T, T)
    valid = sees.diagonal(dim1=1, dim2=2)  # (rows, T): only padding does not see itself
    # An answer's token will see all that is valid. The prompt's last token must have done so too,
    # or these masks hide more than padding and the future.
    last_sees_all = sees[:, -1].equal(valid)
    return Padding(valid, is_plain=False) if last_sees_all else None


def is_finished_mask(mask, rows: int, T: int) -> bool:
    """Whether it is (rows, 1, T, S) of bools, or of zeros and the lowest number, as on eager."""
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return False
    batch, heads, queries, _ = mask.shape
    if batch not in (1, rows) or heads != 1 or queries != T:
        return False
    if mask.dtype == torch.bool:
        return True
    if not mask.is_floating_point():
        return False
    is_lowest = mask <= torch.finfo(mask.dtype).min
    return bool((is_lowest | (mask == 0)).all())


def allowed(mask: Tensor) -> Tensor:
    """A finished mask as bools: True where a query may see a key."""
    return mask if mask.dtype == torch.bool else mask == 0


def cut_mask(mask: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """Of a finished mask the rows and columns of the tokens that are left. Nobody sees a filler.

    Args:
        mask (rows or 1, 1, T, T) bool or float: of the whole prompt.
        index (rows, N) int64: places of the tokens left.
        valid (rows, N) bool: False for padding and fillers.
    Returns:
        mask (rows, 1, N, N): of the same type.
    """
    mask = mask.take_along_dim(index[:, None, :, None], dim=2)  # (rows, 1, N, T)
    mask = mask.take_along_dim(index[:, None, None, :], dim=3)  # (rows, 1, N, N)
    unseen = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.masked_fill(~valid[:, None, None], unseen)


# ----------------------------------------------------------------------- q and k, and proof of them

CHECKED = weakref.WeakSet()  # decoders whose layers passed `check_decoder`, which takes a while


def queries_and_keys(
    attn, x: Tensor, rotary: Iterable[Tensor], query_idx: Tensor
) -> tuple[Tensor, Tensor]:
    """q and k as the layer's attention makes them.

    Args:
        attn: the layer's attention module.
        x (B, S, D) float: what it is given, the layer's input after its norm.
        rotary: cos and sin, (B or 1, S, d) float each.
        query_idx (B, T) int64: places in S of the queries.
    Returns:
        q (B, H, T, d) float: of the queries. k (B, H_kv, S, d) float: of all tokens.
    """
    q, k = project(attn, x, query_idx)  # (B, T, H d), (B, S, H_kv d)
    q = q.unflatten(-1, (-1, attn.head_dim))  # (B, T, H, d)
    k = k.unflatten(-1, (-1, attn.head_dim))  # (B, S, H_kv, d)
    q, k = normalise(attn, q, k)
    q = q.transpose(1, 2)  # (B, H, T, d)
    k = k.transpose(1, 2)  # (B, H_kv, S, d)
    if has_rotary(attn):
        q = rotate(attn, q, *(take(table, query_idx) for table in rotary))
        k = rotate(attn, k, *rotary)
    return q, k


@torch.no_grad()
def check_decoder(decoder) -> None:
    """Three tokens through each layer's attention, which `queries_and_keys` has to explain.

    Nothing of it stays on the decoder, and no random number is drawn.

    Raises: TypeError that says what is not of Llama's kind.
    """
    modules = list(decoder.modules()) if isinstance(decoder, torch.nn.Module) else []
    modes = [(module, module.training) for module in modules]
    try:
        require(on_sdpa_or_eager(decoder), "it is not on sdpa or eager")
        parameters = inspect.signature(decoder.forward).parameters
        require_names(DECODER_ARGUMENTS, parameters, "its forward")
        decoder.eval()  # no dropout, and so no random numbers
        for i, layer in enumerate(decoder.layers):
            check_names(layer)
            check_attention(decoder, i)
        CHECKED.add(decoder)
    except Exception as error:  # whatever another architecture answers
        reason = str(error)
        if tested() not in reason:
            reason += f" ({tested()})"
        raise TypeError(
            "decoder must be of Llama's kind (Llama, Mistral, Qwen, Gemma 3, Phi-3, ...), "
            f"not {type(decoder).__name__}: {reason}"
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode


def check_names(layer) -> None:
    """TypeError where the layer or its attention lacks an argument that stage 3 needs."""
    for module in (layer, layer.self_attn):
        parameters = inspect.signature(module.forward).parameters
        is_wrapper = not any(name in parameters for name in LAYER_ARGUMENTS)  # takes any call
        if not is_wrapper:
            require_names(LAYER_ARGUMENTS, parameters, f"{type(module).__name__}.forward")


def check_attention(decoder, i: int) -> None:
    """ValueError where q and k do not explain what the attention of layer i puts out.

    The last of three tokens sees all three. What the attention makes of it must be the mean of the
    values, weighted by our softmax of q . k. The tokens stand far apart, so that turning shows.
    """
    layer = decoder.layers[i]
    attn = layer.self_attn
    D = decoder.config.hidden_size
    probe = torch.linspace(0, 99, 3 * D).sin().view(1, 3, D).to(decoder.device, decoder.dtype)
    position = torch.tensor([[0, 5, 17]], device=decoder.device)
    last = torch.tensor([[2]], device=decoder.device)
    every = torch.ones(1, 3, dtype=torch.bool, device=decoder.device)
    rotary = rotary_tables(decoder, layer, probe, position)
    x = sharpen(attn, layer.input_layernorm(probe), last)  # (1, 3, D)

    args, kwargs = change_layer_call({}, x, None, rotary)
    theirs = attn(*args, **kwargs)[0][0, 2]  # (D,)

    q, k = queries_and_keys(attn, x, rotary, last)
    weights = visual_attention(q, k, attn.scaling, last, every[:, :1], every, every)  # (1, H, 3)
    v = project_values(attn, x).unflatten(-1, (k.shape[1], -1))[0]  # (3, H_kv, d)
    weights = weights.view(k.shape[1], -1, 3).to(v.dtype)  # (H_kv, H / H_kv, 3)
    mixed = torch.einsum("hgs,shd->hgd", weights, v)  # (H_kv, H / H_kv, d)
    ours = attn.o_proj(mixed.flatten())  # (D,)

    error = (ours - theirs).abs().max() / theirs.abs().max()
    tolerance = max(torch.finfo(x.dtype).eps, 1e-7) ** 0.5
    require(error <= tolerance, f"q and k do not explain the attention of its layer {i}")


def sharpen(attn, x: Tensor, last: Tensor) -> Tensor:
    """x (1, 3, D) made as large as scores of size 2 need; flat attention would prove nothing."""
    q, k = project(attn, x, last)
    size = q.float().std() * k.float().std() * attn.scaling * attn.head_dim**0.5  # of a score
    return x * (2 / size).sqrt().to(x.dtype)


# --------------------------------------------------------------------------------- inside a decoder


# How it works. `generate` calls the decoder once with the whole prompt, and then with one token at
# a time and the KV cache.
#   Prompt: hooks run before every layer from the first pruned one on. A pruned layer chooses, and
#     its hidden states are cut before it writes its keys and values; so its part of the KV cache,
#     and those of all later layers, are short from the start. Layers in between get the short
#     masks and rotary tables.
#   Afterwards: nothing is chosen. A layer's cache is already short; only its mask has to be, too:
#     the tokens that were left at that layer, and all that came since.
#   Batches: samples keep different numbers of tokens, so short ones have fillers in front, which
#     the masks hide as they hide padding. Padding itself is dropped at the first pruned layer, or
#     becomes such a filler.
#   Beams: copies of one prompt choose alike, once, so the library may reorder them as it likes.
# Layer 0 is never pruned: the library takes the length of its cache for the length of all.


@dataclass
class Prompt:
    """What is known of the prompt that is read, or was read last.

    A row is a sample, or one of `copies` of it side by side, as `generate` makes them for beams.
    A token that is left carries its place in the prompt with it. So all that belongs to the whole
    prompt (rotary tables, masks, who is visual, who asks) is looked up by `index`, at any layer.
    """

    visual: Tensor  # (rows, T) bool: of the whole prompt
    asks: Tensor  # (rows, T) bool: text that selects
    copies: int  # rows of one sample
    is_plain: bool  # False: the masks of the layers say more than "no padding, no future"
    index: Tensor  # (rows, N) int64: place in the prompt of each token left, right-aligned
    valid: Tensor  # (rows, N) bool: False for padding, and for fillers in front of short rows


class AdaptivePruner:
    r"""Prunes visual tokens inside a `with` block, by hooks.

    Nothing of it is left on the model afterwards. A KV cache that was filled in the block ends
    with it.

    Modifications: from the first pruned layer on, layers get the tokens left, right-aligned, with
    their mask and rotary positions; last_hidden_state goes back to full length.

    Args:
        decoder: a decoder of Llama's kind on sdpa or eager, or a model that holds one.
        visual_mask (B, S) bool: the visual tokens of each prompt, if any.
        layers: ascending, 1..L-1, pruned prior to their input; None: L/8, 3L/8, 5L/8.
        lam: \lambda, 0..infinity; infinity keeps all.
        k: number of heads that decide, 1..H, the paper's 5; None: all.
        query_mask (B, S) bool: who asks; None: the text after the last visual token. In training,
            leave out the answers.
        counts: {layer: tokens kept at most, an int or (B,) int64, 1 or more}, in place of layers
            and lam.
    After a prompt:
        kept[layer] (B, S) bool: visual tokens there from that layer on.
        counts[layer] (B,) int64: how many they are.
        vav[layer] (B, H) float32: Visual Attention Values that the layer decided by.
        attention[layer] (B, H, S) float32: what they are sums of.
    Raises: TypeError for an unsupported decoder, at its first pruner; ValueError for what cannot be
        pruned.
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
        self._hides_future = hides_future(self.decoder)
        L = self.decoder.config.num_hidden_layers
        H = self.decoder.config.num_attention_heads

        require((lam is None) != (counts is None), "lam or counts must be given, and not both")
        require(lam is None or lam >= 0, f"lam must be 0 to infinity, got {lam}")
        require(
            k is None or k in range(1, H + 1),
            f"k must be 1 to {H}, the heads, or None for all, got {k}",
        )
        require_mask("visual_mask", visual_mask)
        if query_mask is None:
            asks = text_after_image(visual_mask)
        else:
            require_mask("query_mask", query_mask, visual_mask.shape)
            asks = query_mask & ~visual_mask

        self.visual_mask = visual_mask.to(self.decoder.device)  # (B, S)
        self.asks = asks.to(self.decoder.device)  # (B, S)
        self.layers = layers_to_prune(layers, counts, L)
        self.num_layers = L
        self.lam = lam
        self.k = H if k is None else k
        self.fixed = {}  # layer -> (B,): the counts given, one a sample
        for i, K in (counts or {}).items():
            self.fixed[i] = counts_of_samples(K, len(visual_mask))
        self._handles = []

    def average_tokens(self) -> Tensor:
        """(B,) float: visual tokens there in the last prompt, mean over the decoder's layers."""
        ran = list(getattr(self, "counts", {})) == self.layers
        require(ran, "average_tokens is known after a prompt ran in the block, and not before")
        counts = list(self.counts.values())
        return average_tokens(self.visual_mask.sum(1), counts, self.layers, self.num_layers)

    def __enter__(self) -> "AdaptivePruner":
        require(not self._handles, "this AdaptivePruner must not be entered twice at a time")
        self.kept = {}
        self.counts = {}
        self.vav = {}
        self.attention = {}
        self._prompt = None
        self._valid_from = {}  # pruned layer -> valid of the tokens that it and its KV cache hold
        self._cache = None  # the KV cache that this block fills
        self._signature = inspect.signature(self.decoder.forward)  # once, not at every token
        self._handles = [
            self.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            self.decoder.register_forward_hook(self._after_decoder),
        ]
        for i, layer in enumerate(self.decoder.layers):
            if i >= self.layers[0]:
                hook = partial(self._before_layer, i)
                self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, kind, *_) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._prompt = None
        self._valid_from = {}
        self._cache = None
        if kind is None:
            all_pruned = list(self.kept) == self.layers
            require(all_pruned, "the decoder did not run, or was compiled before")

    # --------------------------------------------------- before the decoder: what is it called with

    def _before_decoder(self, decoder, args, kwargs) -> None:
        """Reads the call: a prompt, or what follows it. Refuses what cannot be pruned."""
        call = read_decoder_call(self._signature, args, kwargs)
        rows, T = call.x.shape[:2]
        past = call.cache.get_seq_length() if call.cache is not None else 0
        self._require_own_cache(call.cache, past)
        self._require_no_packing(call)
        self._require_later_layers(call.added)

        hint = ""
        if call.cache is None and self.kept and T < self.visual_mask.shape[1]:
            hint = f"; if this call continues the prompt, its KV cache was not found ({tested()})"
        padding = read_mask(call.mask, rows, past, T, call.x.device)
        require(padding is not None, f"attention_mask must be (B, tokens so far){hint}")
        require(
            past + T <= shortest_window(decoder.config),
            f"the sequence must fit the decoder's sliding_window, but has {past + T} tokens",
        )
        self._past = past
        if past == 0:
            self._require_prompt(call.x, hint)
            require(
                self._hides_future or not padding.is_plain,
                "attention_mask must be the model's own, (B, 1, S, S), as this decoder's attention "
                "is not causal: PaliGemma makes it from token_type_ids",
            )
            self._prompt = self._new_prompt(padding, rows, T)
        prompt_length = self._prompt.visual.shape[1]
        self._since = padding.valid[:, prompt_length:]  # (rows, tokens since the prompt)

    def _require_own_cache(self, cache, past: int) -> None:
        is_new = isinstance(cache, DynamicCache) and past == 0
        require(
            cache is None or is_new or cache is self._cache,
            "the KV cache must be None, or a DynamicCache that is empty "
            "or was filled in this block",
        )

    def _require_no_packing(self, call: DecoderCall) -> None:
        """Without a mask the library would take a jump in the positions for a new prompt."""
        position = packing_positions(call.position_ids)
        require(
            call.mask is not None or position is None or (position.diff() == 1).all(),
            "position_ids must count up by 1 where there is no attention_mask: "
            "packing is not supported",
        )

    def _require_later_layers(self, added: list | None) -> None:
        """Qwen3-VL adds features to visual tokens after its first layers, at their old places."""
        number = len(added) if added is not None else 0
        require(
            self.layers[0] >= number,
            f"layers must begin at {number} or later, got {self.layers}: this decoder adds visual "
            f"features after each of its first {number} layers, where no token may be missing",
        )

    def _require_prompt(self, x: Tensor, hint: str) -> None:
        """The prompt must be visual_mask's. Without a KV cache it comes again with its answer."""
        B, S = self.visual_mask.shape
        rows, T = x.shape[:2]
        require(
            T == S or T > S and self.kept,
            f"the prompt must be visual_mask's {S} tokens, got {T}{hint}",
        )
        copies = max(1, rows // B)
        fits = rows == B * copies
        if fits and copies > 1:
            prompts = x[:, :S]
            fits = prompts.equal(prompts[::copies].repeat_interleave(copies, dim=0))
        require(
            fits,
            f"the batch must be visual_mask's {B} samples, or copies of each side by side, "
            f"got {rows}",
        )

    def _new_prompt(self, padding: Padding, rows: int, T: int) -> Prompt:
        B, S = self.visual_mask.shape
        copies = max(1, rows // B)
        answer = (0, T - S)  # neither visual nor asking
        visual = torch.nn.functional.pad(self.visual_mask, answer)  # (B, T)
        asks = torch.nn.functional.pad(self.asks, answer)  # (B, T)
        prompt = Prompt(
            visual=visual.repeat_interleave(copies, dim=0),  # (rows, T)
            asks=asks.repeat_interleave(copies, dim=0),  # (rows, T)
            copies=copies,
            is_plain=padding.is_plain,
            index=torch.arange(T, device=visual.device).expand(rows, T),
            valid=padding.valid,
        )
        require(
            not (prompt.visual & ~prompt.valid).any(),
            "visual_mask must be False where attention_mask is 0",
        )
        require(
            (prompt.asks & prompt.valid).any(dim=1).all(),
            "visual_mask must be followed by text, or query_mask mark some, in every sample",
        )
        return prompt

    # ----------------------------------------------------------------- before a layer: who goes on

    def _before_layer(self, i: int, layer, args, kwargs) -> tuple:
        """A pruned layer selects. It and those up to the next one are called with what is left."""
        call = read_layer_call(layer, args, kwargs)
        hidden, rotary = call.hidden, call.rotary
        reads_prompt = self._past == 0
        if i in self.layers:
            if reads_prompt:
                hidden = self._prune(i, layer, call)
                self._cache = call.cache  # what the layers really fill; see _after_decoder
            else:
                self._require_whole_cache(i, call.cache)
            # For sliding layers too: the sequence fits their window, see _before_decoder.
            self._causal_mask = self._causal_mask_of_those_left(i, hidden, call.cache)
        mask = self._causal_mask
        if reads_prompt:
            rotary = self._rotary_of_those_left(rotary)
            own_mask = self._own_mask_of_those_left(call.mask)
            mask = self._causal_mask if own_mask is None else own_mask
        return change_layer_call(kwargs, hidden, mask, rotary)

    def _require_whole_cache(self, i: int, cache) -> None:
        """Cutting all to one length, as transformers once did, would miss the short ones."""
        prompt_length = self._prompt.visual.shape[1]
        since_prompt = self._past - prompt_length
        expected = self._valid_from[i].shape[1] + since_prompt
        require(
            cache is None or cache.get_seq_length(i) == expected,
            "the KV cache must be cut back by as many tokens in every layer, or not at all",
        )

    def _prune(self, i: int, layer, call: LayerCall) -> Tensor:
        """Drops tokens prior to layer i. Returns the hidden states (rows, N, D) of those left."""
        prompt = self._prompt
        own_mask = self._own_mask_of_those_left(call.mask)  # (rows, 1, N, N) or None
        sees = None if own_mask is None else allowed(own_mask)[:, 0]  # (rows, N, N)
        rotary = self._rotary_of_those_left(call.rotary)
        stays = self._choose(i, layer, call.hidden, rotary, sees)
        idx, real = compact(stays)  # (rows, N'): places among the N tokens that were there
        prompt.index = prompt.index.gather(1, idx)  # their places in the prompt
        prompt.valid = real
        self._valid_from[i] = real
        return take(call.hidden, idx)

    def _rotary_of_those_left(self, rotary: tuple) -> tuple:
        """The tables are the whole prompt's, in each layer: kept tokens keep their positions."""
        return tuple(take(table, self._prompt.index) for table in rotary)

    def _own_mask_of_those_left(self, mask: Tensor | None) -> Tensor | None:
        """The mask that the model made for a layer, cut; None where it is simply causal."""
        if self._prompt.is_plain or mask is None:
            return None
        return cut_mask(mask, self._prompt.index, self._prompt.valid)

    def _causal_mask_of_those_left(self, i: int, hidden: Tensor, cache) -> Tensor | None:
        """Of layers i and on: no padding, no filler, no future."""
        valid = torch.cat([self._valid_from[i], self._since], dim=1)  # (rows, N + those since)
        return create_causal_mask(self.decoder.config, hidden, valid, cache, layer_idx=i)

    @torch.no_grad()
    def _choose(self, i: int, layer, hidden: Tensor, rotary: tuple, sees: Tensor | None) -> Tensor:
        """Stage 3 itself: which of the tokens that are there stay. Records kept and counts.

        Args:
            hidden (rows, N, D) float: input of layer i.
            rotary: cos and sin of these tokens, (rows, N, d) each.
            sees (rows, N, N) bool: who sees whom; None: each sees itself and who is before.
        Returns:
            stays (rows, N) bool.
        """
        prompt = self._prompt
        valid = prompt.valid
        visual = prompt.visual.gather(1, prompt.index) & valid  # (rows, N)
        asks = prompt.asks.gather(1, prompt.index) & valid  # (rows, N)

        query_idx, query_valid = compact(asks)  # (rows, T)
        if sees is not None:
            sees = take(sees, query_idx)  # (rows, T, N)
        attn = layer.self_attn
        q, k = queries_and_keys(attn, layer.input_layernorm(hidden), rotary, query_idx)
        attention = visual_attention(
            q, k, attn.scaling, query_idx, query_valid, visual, valid, sees
        )  # (rows, H, N)

        attention = attention[:: prompt.copies]  # (B, H, N): copies of a sample say the same
        visual_once = visual[:: prompt.copies]  # (B, N)
        there = visual_once.sum(dim=1)  # (B,)
        vav = head_vav(attention)  # (B, H)
        require(
            vav.isfinite().all(),
            f"hidden states at layer {i} must be finite, but hold NaN or infinity",
        )
        if self.fixed:
            K = self.fixed[i].to(there).minimum(there)
        else:
            K = adaptive_count(vav, self.lam, self.k, there)
        keep = select(text_relevance(attention, self.k), K, visual_once)  # (B, N)

        self._record(i, keep, K, vav, attention)
        text = valid & ~visual
        kept_visual = keep.repeat_interleave(prompt.copies, dim=0)
        return text | kept_visual

    def _record(self, i: int, keep: Tensor, K: Tensor, vav: Tensor, attention: Tensor) -> None:
        """What layer i decided, and by what, in the numbering of visual_mask."""
        prompt = self._prompt
        S = self.visual_mask.shape[1]
        place = prompt.index[:: prompt.copies]  # (B, N)
        kept = torch.zeros_like(prompt.visual[:: prompt.copies])  # (B, T)
        whole = attention.new_zeros(*attention.shape[:2], kept.shape[1])  # (B, H, T)
        self.kept[i] = kept.scatter(1, place, keep)[:, :S]
        self.attention[i] = whole.scatter(2, place[:, None].expand_as(attention), attention)[
            ..., :S
        ]
        self.counts[i] = K
        self.vav[i] = vav

    # ------------------------------------------------------- after the decoder: back to full length

    def _after_decoder(self, decoder, args, output) -> None:
        """The prompt's last hidden state goes back to full length: logits and labels line up."""
        if self._past > 0:
            return
        name = type(decoder).__name__
        require(not isinstance(output, tuple), "return_dict must be True, or not given")
        require_names(["last_hidden_state"], dir(output), f"the output of {name}")
        if self.kept:  # else no layer's hook ran, and __exit__ says so
            cache = find_cache(output.values())
            unused = cache is None or cache.get_seq_length() == 0
            require(
                unused or cache is self._cache,
                f"{name} must hand its KV cache to the layers as it is ({tested()})",
            )
        prompt = self._prompt
        hidden = output.last_hidden_state.masked_fill(~prompt.valid[..., None], 0)  # (rows, N, D)
        whole = hidden.new_zeros(*prompt.visual.shape, hidden.shape[2])  # (rows, T, D)
        place = prompt.index[..., None].expand_as(hidden)  # (rows, N, D)
        output.last_hidden_state = whole.scatter(1, place, hidden)


def layers_to_prune(layers: list | None, counts: dict | None, L: int) -> list:
    """The layers given, or the keys of counts, or L/8, 3L/8, 5L/8."""
    if counts is not None:
        require(layers is None, "layers must be None beside counts, whose keys they are")
        layers = sorted(counts)
    elif layers is None:
        require(L >= 8, f"layers must be given for a decoder of {L} layers, fewer than 8")
        layers = [L // 8, 3 * L // 8, 5 * L // 8]
    layers = list(layers)
    ascending = sorted(set(layers) & set(range(1, L)))
    require(
        layers and layers == ascending,
        f"layers must be ascending numbers, 1 to {L - 1} for this decoder, got {layers}",
    )
    return layers


def counts_of_samples(K: int | Tensor, B: int) -> Tensor:
    """(B,) int64: counts given as one number, or one a sample."""
    K = torch.as_tensor(K)
    is_count = not K.is_floating_point() and K.dtype != torch.bool and K.shape in ((), (B,))
    require(
        is_count and bool((K >= 1).all()),
        f"counts must be whole numbers of 1 or more, one or {B} of them a layer, got {K.tolist()}",
    )
    return K.expand(B)


def require_mask(name: str, mask: Tensor, shape: tuple | None = None) -> None:
    is_tensor = isinstance(mask, Tensor)
    require(is_tensor, f"{name} must be a bool tensor (B, S), got a {type(mask).__name__}")
    good = mask.dtype == torch.bool and mask.dim() == 2 and shape in (None, mask.shape)
    got = mask.dtype, tuple(mask.shape)
    require(good, f"{name} must be bool of shape (B, S), got {got}")


def text_after_image(visual_mask: Tensor) -> Tensor:
    """(B, S) bool: True after the last visual token of each sample."""
    from_here_on = visual_mask.flip(1).cumsum(1).flip(1)  # (B, S): visual tokens, itself included
    return from_here_on == 0


def main() -> None:
    """A random Llama of 8 layers and prompts of 48 visual tokens: what each lambda keeps."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, num_hidden_layers=8, num_attention_heads=8)
    model = LlamaForCausalLM(config).eval()
    embeds = torch.randn(2, 64, 64)
    visual_mask = (torch.arange(64) < 48).expand(2, 64)
    for lam in (math.inf, 10, 5):
        with AdaptivePruner(model, visual_mask, lam=lam) as pruner, torch.no_grad():
            cache = find_cache(model(inputs_embeds=embeds).values())
        kept = [K.tolist() for K in pruner.counts.values()]
        lengths = [cache.get_seq_length(i) for i in range(8)]
        print(f"lambda {lam}: 48 -> {kept} visual tokens; KV cache {lengths}")


if __name__ == "__main__":
    main()
