"""Stage 3 by the library itself, where nothing is cut: every decoder family is checked against it.

One unpadded prompt runs through the library's own model on eager attention. Before each layer the
attention mask hides the tokens dropped so far, as keys; they stay in the sequence. Which ones are
dropped follows from the attention weights that the layer before has returned, by METEOR's four
lines in plain loops.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class Softmax64(TorchFunctionMode):
    """Eager attention of the library takes its softmax in float32; in here, in its input's type."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is F.softmax and args and args[0].dtype == torch.float64:
            kwargs["dtype"] = None
        return func(*args, **kwargs)


class Dense(NamedTuple):
    """What the oracle says of one prompt."""

    logits: torch.Tensor  # (S, vocabulary), or the last hidden states of a bare decoder
    kept: dict  # layer -> set of places
    alive: torch.Tensor  # (S,) bool: the text and the tokens that reach the last layer
    hidden_states: tuple  # of (S, D)


def meteor(attention, asks, there, lam, k):
    """Section 3.4 in loops. attention (H, S, S) lists; asks, there: lists of places; a set."""
    heads = range(len(attention))
    a = [
        {i: sum(attention[h][t][i] for t in asks) / len(asks) for i in there} for h in heads
    ]  # a[h][i]: how much the text attends to token i in head h
    vav = [sum(a[h].values()) for h in heads]
    best_heads = sorted(heads, key=lambda h: -vav[h])[:k]
    score = {i: sum(a[h][i] for h in best_heads) for i in there}
    count = len(there)
    if lam < math.inf:
        count = max(1, math.floor(lam * sum(vav[h] for h in best_heads) + 0.5))
    return set(sorted(there, key=lambda i: -score[i])[:count])


def attention_of(layer):
    """The part of a layer that is its attention, whatever it is called."""
    parts = dict(layer.named_children())
    return next(
        parts[name] for name in ("self_attn", "attention", "self_attention") if name in parts
    )


@torch.no_grad()
def dense(model, embeds, visual, layers, lam, k=5, see=None, positions=None):
    """One unpadded prompt, no token leaves the sequence.

    Args:
        model: of the library, its weights in float64 where the comparison has to be close.
        embeds (S, D): the prompt, or (S,) int64: its token ids.
        visual (S,) bool.
        layers, lam, k: as of AdaptivePruner.
        see (S, S) bool: who sees whom; None: causal.
        positions: position_ids of the one prompt; None: the model's own.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    S = len(embeds)
    see = torch.ones(S, S).tril().bool() if see is None else see
    last_visual = max((i for i in range(S) if visual[i]), default=-1)
    text = list(range(last_visual + 1, S))
    kept, alive, weights = {}, torch.ones(S).bool(), {}

    def before_layer(i):
        def hook(layer, args, kwargs):
            nonlocal alive
            if i in layers:
                there = [t for t in range(S) if visual[t] and alive[t]]
                kept[i] = meteor(weights[i - 1][0].tolist(), text, there, lam, k)
                alive = torch.tensor([not visual[t] or t in kept[i] for t in range(S)])
            allowed = (see & alive) | torch.eye(S).bool()
            mask = torch.zeros(1, 1, S, S, dtype=embeds_dtype).masked_fill(
                ~allowed, torch.finfo(embeds_dtype).min
            )
            assert "attention_mask" in kwargs, "the layer takes no mask"
            return args, kwargs | {"attention_mask": mask}

        return hook

    def after_attention(i):
        def hook(module, args, output):
            weights[i] = output[1]

        return hook

    embeds_dtype = next(decoder.parameters()).dtype
    handles = []
    for i, layer in enumerate(decoder.layers):
        handles.append(layer.register_forward_pre_hook(before_layer(i), with_kwargs=True))
        if i + 1 in layers:
            part = attention_of(layer)
            handles.append(part.register_forward_hook(after_attention(i)))
    before, decoder.config._attn_implementation = decoder.config._attn_implementation, "eager"
    name = "inputs_embeds" if embeds.is_floating_point() else "input_ids"
    given = {} if positions is None else dict(position_ids=positions)
    try:
        with Softmax64():
            out = model(**{name: embeds[None]}, use_cache=False, output_hidden_states=True, **given)
    finally:
        decoder.config._attn_implementation = before
        for handle in handles:
            handle.remove()
    logits = out.logits if hasattr(out, "logits") else out.last_hidden_state
    states = tuple(state[0] for state in out.hidden_states or ())
    return Dense(logits[0], kept, alive, states)
