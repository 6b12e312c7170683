"""stage3_decode.py against hand-computed tokens, double loops, and an oracle that cuts no sequence.

The oracle masks dropped tokens as keys, one sample at a time, in float64.
Run: pytest tests/test_stage3_decode.py
"""

import ast
import functools
import inspect
import math
import random
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

import stage3_decode
from stage3_decode import (
    AdaptivePruner,
    adaptive_count,
    average_tokens,
    check_decoder,
    compact,
    find_cache,
    head_vav,
    select,
    solve_lambda,
    text_relevance,
    visual_attention,
)

D, L, H, VOCAB = 64, 8, 8, 96
EAGER = dict(experts_implementation="eager")  # the grouped one has no float64
FAMILIES = {
    "Llama": dict(num_key_value_heads=4),
    "Mistral": dict(num_key_value_heads=2, sliding_window=None),
    "Qwen2": dict(num_key_value_heads=8),
    "Qwen3": dict(num_key_value_heads=4, head_dim=16),
    "Gemma": dict(num_key_value_heads=4, head_dim=16),
    "Granite": dict(num_key_value_heads=4, attention_multiplier=0.2, residual_multiplier=0.7),
    "Cohere": dict(num_key_value_heads=4, use_qk_norm=True),
    "Starcoder2": dict(num_key_value_heads=4, sliding_window=None),
    "Mixtral": dict(num_key_value_heads=4, num_local_experts=4, sliding_window=None, **EAGER),
    "Qwen3Moe": dict(
        num_key_value_heads=4,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        **EAGER,
    ),
    "Phi3": dict(num_key_value_heads=4, partial_rotary_factor=0.5),  # q, k and v from one matrix
    "SmolLM3": dict(num_key_value_heads=4, no_rope_layer_interval=2),  # 1, 3, 5, 7: no positions
    "Gemma3": dict(  # layer 5 looks at all, the others through a window, with another rotary table
        num_key_value_heads=4,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=64,
        tie_word_embeddings=False,  # as tied, they say the same token again and again
    ),
}
CLASSES = {"Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM")}  # where the name does not say them
LAYERS, LAM = [1, 3, 5], 3.0
CACHE = next(  # what this release calls a KV cache: past_key_values, or cache from 5.24 on
    name
    for name in ("past_key_values", "cache")
    if name in inspect.signature(transformers.LlamaModel.forward).parameters
)


def build(family="Llama", **options):
    """A random tiny CausalLM of a library class. Large weights, so that heads look unevenly."""
    config_name, model_name = CLASSES.get(family, (family + "Config", family + "ForCausalLM"))
    config = getattr(transformers, config_name)(
        **dict(
            vocab_size=VOCAB,
            hidden_size=D,
            intermediate_size=96,
            num_hidden_layers=L,
            num_attention_heads=H,
            max_position_embeddings=256,
            initializer_range=0.25,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            **FAMILIES.get(family, {}),
        )
        | options
    )
    torch.manual_seed(0)
    return getattr(transformers, model_name)(config).eval()


@functools.cache
def tiny(family="Llama", dtype=torch.float32, **options):
    return build(family, **options).to(dtype)


def ragged(dtype=torch.float32, seed=0):
    """Three prompts of 12, 24 and 21 tokens, left-padded: text, visual tokens, text."""
    shapes = ["tvvvvvvvvttt", "ttvvvvvvvvvvvvtvvvvttttt", "tvvvvvvvvvvvvvvvttttt"]
    S = max(map(len, shapes))
    rows = [" " * (S - len(shape)) + shape for shape in shapes]
    attention_mask = torch.tensor([[c != " " for c in row] for row in rows]).long()
    visual_mask = torch.tensor([[c == "v" for c in row] for row in rows])
    embeds = torch.randn(
        len(rows), S, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return embeds.to(dtype), attention_mask, visual_mask


def prune(model, visual_mask, layers=None, lam=LAM, **options):
    return AdaptivePruner(model, visual_mask, layers=layers, lam=lam, **options)


def forward(model, embeds, attention_mask=None, **options):
    if attention_mask is not None and attention_mask.shape == embeds.shape[:2]:
        options["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)  # as generate does
    with torch.no_grad():
        return model(inputs_embeds=embeds, attention_mask=attention_mask, **options).logits


def generate(model, embeds, attention_mask, seed=0, **options):
    torch.manual_seed(seed)
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0) | options
    return model.generate(inputs_embeds=embeds, attention_mask=attention_mask, **options)


def gap(a, b):
    return float((a - b).abs().max())


def turn(x, cos, sin):
    """Rotary embedding by its definition: the pair (j, j + d/2) turns by angle j. x (H, S, d)."""
    d = cos.shape[-1]  # Phi-3 turns only the first d numbers
    half = d // 2
    low, high, rest = x[..., :half], x[..., half:d], x[..., d:]
    cos, sin = cos[..., :half], sin[..., :half]
    return torch.cat([low * cos - high * sin, high * cos + low * sin, rest], dim=-1)


def turn_neighbours(x, cos, sin):
    """Cohere's: the pair (2j, 2j + 1) turns by angle j. x (H, S, d)."""
    even, odd, cos, sin = x[..., 0::2], x[..., 1::2], cos[..., 0::2], sin[..., 0::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def tables(model, number, x):
    """cos and sin (S, d) of the layer by that number, or None where it has no positions."""
    decoder, position = model.model, torch.arange(len(x))[None]
    if family_of(model) == "SmolLM3" and number % 2:
        return None
    if family_of(model) == "Gemma3":
        kind = "full_attention" if number == 5 else "sliding_attention"
        return [table[0] for table in decoder.rotary_emb(x[None], position, kind)]
    return [table[0] for table in decoder.rotary_emb(x[None], position)]


def family_of(model):
    return getattr(model, "family", type(model).__name__.removesuffix("ForCausalLM"))


def split(model, attn, h):
    """q (S, H, d), k and v (S, H_kv, d) of the normed states h (S, D), before rotation."""
    if family_of(model) == "Phi3":  # 8, 4 and 4 heads of 8 in one matrix
        qkv = attn.qkv_proj(h)
        q, k, v = qkv[:, :64], qkv[:, 64:96], qkv[:, 96:]
    else:
        q, k, v = attn.q_proj(h), attn.k_proj(h), attn.v_proj(h)
    q, k, v = (y.view(len(h), -1, attn.head_dim) for y in (q, k, v))
    if family_of(model) in ("Qwen3", "Qwen3Moe", "Cohere", "Gemma3", "Qwen3VL"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    return q, k, v


def scale_of(model, attn):
    c = model.config
    if family_of(model) == "Granite":
        return c.attention_multiplier
    return (c.query_pre_attn_scalar if family_of(model) == "Gemma3" else attn.head_dim) ** -0.5


def rest_of_layer(model, layer, x, attended):
    """What a layer does with what its attention put out, both (S, D): residual, norms, MLP."""
    kind, mlp = family_of(model), lambda y: layer.mlp(y[None])[0]
    if kind == "Cohere":  # attention and MLP side by side
        return x + attended + mlp(layer.input_layernorm(x))
    if kind == "Gemma3":
        x = x + layer.post_attention_layernorm(attended)
        return x + layer.post_feedforward_layernorm(mlp(layer.pre_feedforward_layernorm(x)))
    strength = model.config.residual_multiplier if kind == "Granite" else 1
    x = x + attended * strength
    return x + mlp(layer.post_attention_layernorm(x)) * strength


def logits_of(model, x):
    logits = model.lm_head(model.model.norm(x))
    if family_of(model) == "Cohere":
        return logits * model.config.logit_scale
    return logits / model.config.logits_scaling if family_of(model) == "Granite" else logits


def scaled(model, embeds):
    """What Granite makes of its inputs before the first layer."""
    return embeds * model.config.embedding_multiplier if family_of(model) == "Granite" else embeds


@torch.no_grad()
def oracle(model, embeds, visual, layers, lam, k, counts=None, see=None, rotary=None):
    """One unpadded prompt (S, D), S x S masks, no token leaves: logits (S, VOCAB), {layer: kept}.

    see (S, S) bool: who sees whom, causal where None; rotary: cos, sin (S, d), the decoder's where
    None.
    """
    decoder, S, kept = model.model, len(embeds), {}
    see = torch.ones(S, S).tril().bool() if see is None else see
    alive, x = [True] * S, embeds
    text = [t for t in range(S) if t > max(i for i in range(S) if visual[i])]
    for number, layer in enumerate(decoder.layers):
        attn, h = layer.self_attn, layer.input_layernorm(x)
        q, key, v = (y.transpose(0, 1) for y in split(model, attn, h))
        angles = rotary or tables(model, number, embeds)
        if angles is not None:
            turned = turn_neighbours if family_of(model) == "Cohere" else turn
            q, key = turned(q, *angles), turned(key, *angles)
        key, v = (z.repeat_interleave(len(q) // len(z), dim=0) for z in (key, v))  # (H, S, d)
        scores = q @ key.transpose(1, 2) * scale_of(model, attn)  # (H, S, S)
        if number in layers:
            a = {}  # (head, visual token) -> mean attention of the text on it
            for head in range(H):
                for t in text:
                    seen = [s for s in range(S) if see[t, s] and alive[s]]
                    weights = scores[head, t, seen].softmax(dim=0)
                    for s, weight in zip(seen, weights.tolist()):
                        a[head, s] = a.get((head, s), 0.0) + weight / len(text)
            there = [i for i in range(S) if visual[i] and alive[i]]
            vav = [sum(a[head, i] for i in there) for head in range(H)]
            best = sorted(range(H), key=lambda head: -vav[head])[:k]
            score = {i: sum(a[head, i] for head in best) for i in there}
            K = (
                counts[number]
                if counts
                else max(1, math.floor(lam * sum(vav[head] for head in best) + 0.5))
            )
            kept[number] = set(sorted(there, key=lambda i: -score[i])[:K])  # at most all
            alive = [alive[i] and (not visual[i] or i in kept[number]) for i in range(S)]
        allowed = see & torch.tensor(alive) | torch.eye(S).bool()
        mixed = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1) @ v  # (H, S, d)
        attended = attn.o_proj(mixed.transpose(0, 1).reshape(S, -1))
        x = rest_of_layer(model, layer, x, attended)
    return logits_of(model, x), kept


def kept_sets(pruner, b, first=0):
    """{layer: positions kept of sample b, counted from its first real token}."""
    return {
        i: set((mask[b].nonzero().flatten() - first).tolist()) for i, mask in pruner.kept.items()
    }


# ----------------------------------------------------------------------------------- pure functions


def test_visual_attention_of_two_visual_and_two_text_tokens_by_hand():
    k = torch.tensor([1.0, 2.0, 1.0, 4.0]).log().view(1, 1, 4, 1)  # exp(q k) = 1, 2, 1, 4
    q, query_idx = (
        torch.ones(1, 1, 2, 1),
        torch.tensor([[2, 3]]),
    )  # token 2 sees 1, 2, 1; token 3 sees all
    visual = torch.tensor([[True, True, False, False]])
    a = visual_attention(
        q, k, 1.0, query_idx, torch.ones(1, 2).bool(), visual, torch.ones(1, 4).bool()
    )
    torch.testing.assert_close(
        a, torch.tensor([[[(1 / 4 + 1 / 8) / 2, (2 / 4 + 2 / 8) / 2, 0, 0]]])
    )
    two, four = torch.ones(1, 2).bool(), torch.ones(1, 4).bool()
    half = visual_attention(2 * q, k, 0.5, query_idx, two, visual, four)
    torch.testing.assert_close(half, a)  # scale multiplies the scores
    last = visual_attention(q, k, 1.0, query_idx, torch.tensor([[False, True]]), visual, four)
    torch.testing.assert_close(last, torch.tensor([[[1 / 8, 2 / 8, 0, 0]]]))  # token 2 is a filler
    inner = torch.arange(4)[None] > 0
    padded = visual_attention(q, k, 1.0, query_idx, two, visual & inner, inner)
    torch.testing.assert_close(
        padded, torch.tensor([[[0, (2 / 3 + 2 / 7) / 2, 0, 0]]])
    )  # token 0 is padding


@pytest.mark.parametrize(
    "B,heads,shared,T,S,d", [(1, 4, 4, 1, 5, 2), (2, 4, 2, 3, 7, 4), (3, 6, 1, 4, 9, 2)]
)
def test_visual_attention_equals_the_loops(B, heads, shared, T, S, d):
    generator = torch.Generator().manual_seed(B)
    q, k = (torch.randn(B, n, m, d, generator=generator) for n, m in ((heads, T), (shared, S)))
    query_idx = torch.arange(S - T, S).expand(B, T)
    query_valid = (
        torch.arange(T) >= torch.arange(B)[:, None] % T
    )  # ragged: sample b has b fillers in front
    valid = torch.arange(S) >= torch.arange(B)[:, None]  # ragged: b tokens of padding
    visual = valid & (torch.arange(S) < S - T)
    before = q.clone(), k.clone()
    got = visual_attention(q, k, 0.7, query_idx, query_valid, visual, valid)
    assert got.dtype == torch.float32 and torch.equal(q, before[0]) and torch.equal(k, before[1])
    for b in range(B):
        rows = [t for t in range(T) if query_valid[b, t]]
        for h in range(heads):
            want = [0.0] * S
            for t in rows:
                seen = [s for s in range(int(query_idx[b, t]) + 1) if valid[b, s]]
                e = {
                    s: math.exp(0.7 * float(q[b, h, t] @ k[b, h * shared // heads, s]))
                    for s in seen
                }
                for s in seen:
                    want[s] += e[s] / sum(e.values()) / len(rows) * bool(visual[b, s])
            assert gap(got[b, h], torch.tensor(want)) < 1e-6


def test_heads_by_hand():
    attention = torch.tensor([[[0.1, 0.1, 0.0], [0.4, 0.0, 0.2], [0.0, 0.3, 0.3], [0.0, 0.0, 0.0]]])
    torch.testing.assert_close(head_vav(attention), torch.tensor([[0.2, 0.6, 0.6, 0.0]]))
    torch.testing.assert_close(
        text_relevance(attention, 1), torch.tensor([[0.4, 0.0, 0.2]])
    )  # a tie: head 1
    torch.testing.assert_close(text_relevance(attention, 2), torch.tensor([[0.4, 0.3, 0.5]]))
    torch.testing.assert_close(text_relevance(attention, 4), attention.sum(dim=1))
    both = torch.cat([attention, attention.flip(1)])  # each sample has its own best head
    torch.testing.assert_close(
        text_relevance(both, 1), torch.tensor([[0.4, 0.0, 0.2], [0.0, 0.3, 0.3]])
    )


def test_adaptive_count_by_hand():
    vav, there = torch.tensor([[0.5, 0.25, 0.0], [0.125, 0.5, 0.5]]), torch.tensor([9, 9])
    assert adaptive_count(vav, 2, 2, there).tolist() == [2, 2]  # 1.5 and 2.0: halves round up
    assert adaptive_count(vav, 10, 2, there).tolist() == [8, 9]  # 7.5 and 10, clamped
    assert adaptive_count(vav, 10, 1, there).tolist() == [5, 5]
    assert adaptive_count(vav, 6, 3, there).tolist() == [5, 7]
    assert adaptive_count(vav, 3.3, 2, there).tolist() == [2, 3]  # 2.475 and 3.3
    assert adaptive_count(vav, 0, 2, there).tolist() == [1, 1]
    assert adaptive_count(vav, 1e300, 2, torch.tensor([3, 4])).tolist() == [3, 4]
    assert adaptive_count(vav, 10, 2, torch.tensor([0, 1])).tolist() == [
        0,
        1,
    ]  # nothing there: nothing kept
    assert adaptive_count(torch.zeros(2, 3), math.inf, 2, there).tolist() == [
        9,
        9,
    ]  # not infinity x 0
    assert {adaptive_count(vav, lam, 2, there).dtype for lam in (2, math.inf)} == {torch.int64}


@pytest.mark.parametrize("lam", [0.0, 0.5, 3.7, 20.0, 1e4])
def test_adaptive_count_equals_the_loop(lam):
    vav, there = torch.rand(50, 6, generator=torch.Generator().manual_seed(0)), torch.arange(50)
    for k in (1, 5, 6):
        want = [max(1, math.floor(lam * sum(sorted(row)[-k:]) + 0.5)) for row in vav.tolist()]
        want = [min(K, n) for n, K in enumerate(want)]
        assert adaptive_count(vav, lam, k, there).tolist() == want


def test_select_by_hand():
    score, visual = (
        torch.tensor([[9.0, 1.0, 3.0, 3.0, 2.0]]),
        torch.tensor([[False, True, True, True, True]]),
    )
    kept = [
        select(score, torch.tensor([n]), visual).nonzero()[:, 1].tolist() for n in (0, 1, 2, 3, 4)
    ]
    assert kept == [
        [],
        [2],
        [2, 3],
        [2, 3, 4],
        [1, 2, 3, 4],
    ]  # text never counts; of equals the lower index
    two = select(
        score.expand(2, 5), torch.tensor([1, 3]), torch.stack([visual[0], visual[0].flip(0)])
    )
    assert two.tolist() == [[False, False, True, False, False], [True, False, True, True, False]]


def test_select_equals_the_loop():
    generator = torch.Generator().manual_seed(0)
    score = torch.randint(0, 4, (40, 12), generator=generator).float()  # many ties
    visual = torch.rand(40, 12, generator=generator) < 0.7
    count = torch.arange(40) % 9
    for b, got in enumerate(select(score, count, visual)):
        order = sorted(visual[b].nonzero().flatten().tolist(), key=lambda i: -score[b, i])
        assert set(got.nonzero().flatten().tolist()) == set(order[: count[b]])


def test_compact_by_hand_and_by_loop():
    idx, real = compact(torch.tensor([[True, False, True, True], [False, True, False, False]]))
    assert idx.tolist() == [[0, 2, 3], [2, 3, 1]] and real.tolist() == [
        [True] * 3,
        [False, False, True],
    ]
    stays = (
        torch.rand(20, 30, generator=torch.Generator().manual_seed(0))
        < torch.arange(1, 21)[:, None] / 20
    )
    idx, real = compact(stays)
    assert idx.shape[1] == int(stays.sum(1).max())
    for b in range(20):
        want = stays[b].nonzero().flatten().tolist()
        assert idx[b, real[b]].tolist() == want and real[b].tolist() == sorted(real[b].tolist())
        assert len(set(idx[b].tolist())) == idx.shape[1]  # fillers never name a place twice


def test_average_tokens_gives_the_papers_rows():
    rows = {(390, 172, 78): 241.75, (396, 170, 76): 242, (525, 252, 122): 312}
    for counts, want in rows.items():
        assert average_tokens(576, counts, [4, 12, 20], 32) == want
    assert round(average_tokens(576, (390, 172, 78), [4, 12, 20], 32)) == 242
    assert average_tokens(576, [288], [1], 32) == 297
    assert (
        average_tokens(576, (226, 80, 36), [4, 12, 20], 32) == 162
    )  # the paper's table prints 126
    per_sample = average_tokens(
        torch.tensor([8, 4]), [torch.tensor([4, 4]), torch.tensor([2, 1])], [2, 4], 8
    )
    assert per_sample.tolist() == [(16 + 8 + 8) / 8, (8 + 8 + 4) / 8]


def test_solve_lambda():
    calls = []

    def measure(lam):
        calls.append(lam)
        return min(100.0, max(1.0, 2 * lam))

    for target in (1.0, 1.3, 17.0, 60.0, 99.9, 100.0):
        calls.clear()
        assert abs(measure(solve_lambda(target, measure, tolerance=0.01)) - target) <= 0.01
        assert len(calls) < 30
    assert solve_lambda(50.0, measure) == pytest.approx(25, abs=0.25)  # 0.5 tokens off will do

    def step(lam):
        return 10.0 if lam < 7 else 20.0  # a target that no lambda hits ends at the step

    assert solve_lambda(14.0, step) == pytest.approx(7)
    for target in (0.5, 101.0, math.nan):
        with pytest.raises(ValueError, match="target_average must be 1.00 to 100.00 here"):
            solve_lambda(target, measure)


def test_solve_lambda_reaches_a_wanted_average_on_a_model():
    embeds, attention_mask, visual_mask = ragged()

    def measure(lam):
        with prune(tiny(), visual_mask, lam=lam) as pruner:
            forward(tiny(), embeds, attention_mask)
        return float(pruner.average_tokens().mean())

    assert abs(measure(solve_lambda(8.0, measure, tolerance=0.3)) - 8.0) <= 0.3


# -------------------------------------------------------------------- the whole, against the oracle


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("impl", ["sdpa", "eager"])
def test_pruned_forward_equals_the_oracle_on_a_ragged_batch(family, impl):
    dtype = (
        torch.float64 if impl == "sdpa" else torch.float32
    )  # the library's eager softmax is float32
    model = tiny(family, dtype, attn_implementation=impl)
    embeds, attention_mask, visual_mask = ragged(dtype)
    with prune(model, visual_mask) as pruner:
        logits = forward(model, embeds, attention_mask)
    assert list(pruner.kept) == LAYERS  # the default: L/8, 3L/8, 5L/8
    assert len({tuple(K.tolist()) for K in pruner.counts.values()}) > 1  # later layers do drop more
    for b in range(len(embeds)):
        first = int((attention_mask[b] == 0).sum())
        want, kept = oracle(
            model,
            scaled(model, embeds[b, first:]),
            visual_mask[b, first:].tolist(),
            LAYERS,
            LAM,
            k=5,
        )
        assert kept_sets(pruner, b, first) == kept, f"sample {b}"
        assert {i: len(s) for i, s in kept.items()} == {
            i: int(K[b]) for i, K in pruner.counts.items()
        }
        alive = attention_mask[b].bool() & (~visual_mask[b] | pruner.kept[5][b])
        off = gap(logits[b, alive], want[alive[first:]])
        assert off < (1e-10 if impl == "sdpa" else 1e-4), f"sample {b}: logits differ by {off}"
        assert not logits[b, ~alive].any()  # zero states where a token is gone, no bias in lm_head


@pytest.mark.parametrize("k", [1, 3, 8, None])
@pytest.mark.parametrize("lam", [0.0, 1.5, 6.0])
def test_pruned_forward_equals_the_oracle_for_other_k_lambda_and_layers(k, lam):
    model = tiny("Llama", torch.float64)
    embeds, attention_mask, visual_mask = ragged(torch.float64, seed=1)
    embeds, visual = embeds[1], visual_mask[1]
    with prune(model, visual[None], layers=[2, 3, 7], lam=lam, k=k) as pruner:
        logits = forward(model, embeds[None])
    want, kept = oracle(model, embeds, visual.tolist(), [2, 3, 7], lam, k or H)
    assert kept_sets(pruner, 0) == kept
    assert gap(logits[0, ~visual], want[~visual]) < 1e-10


def both_ways(visual, everything):
    """(S, S) bool, who sees whom: the past, and its own picture (Gemma 3) or all (PaliGemma)."""
    S = len(visual)
    blocks = (~visual).cumsum(0)  # equal numbers: visual tokens side by side
    same_picture = (blocks[:, None] == blocks) & visual & visual[:, None]
    return torch.ones(S, S).bool() if everything else torch.ones(S, S).tril().bool() | same_picture


def finished_mask(model, attention_mask, visual_mask, everything):
    """What PaliGemma's or Gemma 3's whole model gives to its decoder: (B, 1, S, S)."""
    see = torch.stack([both_ways(row, everything) for row in visual_mask])
    mask = (see & attention_mask.bool()[:, None])[:, None]
    if model.config._attn_implementation == "sdpa":
        return mask
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("impl", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["Gemma", "Gemma3"])
def test_masks_that_see_both_ways_equal_the_oracle_and_generate_as_singles(family, impl):
    """A prefix that sees all of itself (Gemma, in PaliGemma), or pictures that see themselves."""
    dtype = torch.float64 if impl == "sdpa" else torch.float32
    bidirectional = dict(use_bidirectional_attention=True) if family == "Gemma" else {}
    model = build(family, attn_implementation=impl, **bidirectional).to(dtype)
    everything = family == "Gemma"
    embeds, attention_mask, visual_mask = ragged(dtype)
    mask = finished_mask(model, attention_mask, visual_mask, everything)
    if family == "Gemma3":
        mask = dict(full_attention=mask, sliding_attention=mask)
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    call = dict(inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids)
    with prune(model, visual_mask) as pruner, torch.no_grad():
        logits = model(**call).logits
    for b in range(len(embeds)):
        first = int((attention_mask[b] == 0).sum())
        visual = visual_mask[b, first:]
        see = both_ways(visual, everything)
        alone = embeds[b, first:]
        want, kept = oracle(model, alone, visual.tolist(), LAYERS, LAM, k=5, see=see)
        assert kept_sets(pruner, b, first) == kept, f"sample {b}"
        alive = attention_mask[b].bool() & (~visual_mask[b] | pruner.kept[5][b])
        off = gap(logits[b, alive], want[alive[first:]])
        assert off < (1e-10 if impl == "sdpa" else 1e-4), f"sample {b}: logits differ by {off}"
    causal = oracle(model, embeds[1], visual_mask[1].tolist(), LAYERS, LAM, k=5)[0]
    assert gap(causal[-1], logits[1, -1]) > 1e-3, "the mask changes nothing: a weak test"
    with prune(model, visual_mask, lam=math.inf), torch.no_grad():
        pruned = model(**call).logits
    with torch.no_grad():
        bare = model(**call).logits
    real = attention_mask.bool()
    assert torch.equal(pruned[real], bare[real])


THREE_PARTS = dict(rope_type="default", rope_theta=100.0, mrope_section=[2, 1, 1])
QWEN_VL = {"Qwen2_5_VL": {}, "Qwen3VL": dict(head_dim=8)}


def three_part_positions(visual):
    """(3, S): a text token has one number, a visual token its time, row and column in rows of 4."""
    at, positions, b = 0, [], 0
    while b < len(visual):
        n = 0
        while b + n < len(visual) and visual[b + n]:
            n += 1
        positions += [(at, at + i // 4, at + i % 4) for i in range(n)] or [(at, at, at)]
        at += max(-(-n // 4), min(n, 4)) or 1
        b += n or 1
    return torch.tensor(positions).T


def three_part_angles(family, position):
    """cos and sin (S, 8): of the 4 pairs, 2 turn by time, 1 by row, 1 by column."""
    which = [0, 0, 1, 2] if family == "Qwen2_5_VL" else [0, 1, 2, 0]  # Qwen3-VL takes turns
    speed = 100.0 ** (-torch.arange(4, dtype=torch.float32) / 4)
    angles = torch.stack([position[part] * speed[j] for j, part in enumerate(which)], dim=1)
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos().double(), angles.sin().double()


def qwen_vl(family, **options):
    config = dict(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=96,
        num_hidden_layers=L,
        num_attention_heads=H,
        num_key_value_heads=4,
        initializer_range=0.25,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        rope_parameters=THREE_PARTS,
        **QWEN_VL[family],
    )
    torch.manual_seed(0)
    text_config = getattr(transformers, family + "TextConfig")(**config | options)
    return getattr(transformers, family + "TextModel")(text_config).eval().double()


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("family", QWEN_VL)
def test_three_part_positions_with_jumps_equal_the_oracle(family, padded):
    decoder = qwen_vl(family)
    embeds, attention_mask, visual_mask = ragged(torch.float64)
    if not padded:  # without a mask jumps could be taken for packing
        embeds, attention_mask, visual_mask = embeds[1:2], None, visual_mask[1:2]
    positions = torch.zeros(3, *visual_mask.shape, dtype=torch.long)
    real = torch.ones_like(visual_mask) if attention_mask is None else attention_mask.bool()
    for b in range(len(embeds)):
        positions[:, b, real[b]] = three_part_positions(visual_mask[b, real[b]].tolist())
    with prune(decoder, visual_mask) as pruner, torch.no_grad():
        states = decoder(
            inputs_embeds=embeds, attention_mask=attention_mask, position_ids=positions
        ).last_hidden_state
    plain = types.SimpleNamespace(
        model=decoder, config=decoder.config, family=family, lm_head=torch.nn.Identity()
    )
    for b in range(len(embeds)):
        first = int((~real[b]).sum())
        rotary = three_part_angles(family, positions[:, b, first:])
        visual = visual_mask[b, first:].tolist()
        want, kept = oracle(plain, embeds[b, first:], visual, LAYERS, LAM, 5, rotary=rotary)
        assert kept_sets(pruner, b, first) == kept
        alive = real[b] & (~visual_mask[b] | pruner.kept[5][b])
        assert gap(states[b, alive], want[alive[first:]]) < 1e-5  # the library's angles are float32


def test_qwen_vl_packed_by_its_fourth_position_is_refused():
    """(4, B, S): the first number counts the tokens, and starts anew with a packed prompt."""
    decoder = qwen_vl("Qwen2_5_VL")
    embeds, _, visual_mask = ragged(torch.float64)
    count = torch.arange(24).expand(1, 3, 24)
    for first, fits in ((count, True), (count % 12, False)):
        call = dict(inputs_embeds=embeds, position_ids=torch.cat([first, count.expand(3, 3, 24)]))
        with torch.no_grad():
            if fits:
                with prune(decoder, visual_mask):
                    decoder(**call)
                continue
            with pytest.raises(ValueError, match="position_ids must count up by 1 where there is"):
                with prune(decoder, visual_mask):
                    decoder(**call)


def test_layers_that_get_visual_features_again_are_not_pruned():
    decoder = qwen_vl("Qwen3VL")
    embeds, attention_mask, visual_mask = ragged(torch.float64)
    added = [torch.ones(int(visual_mask.sum()), D).double()] * 2
    call = dict(
        inputs_embeds=embeds,
        attention_mask=attention_mask,
        visual_pos_masks=visual_mask,
        deepstack_visual_embeds=added,
    )
    message = r"layers must begin at 2 or later, got \[1, 3, 5\]: this decoder adds visual features"
    with pytest.raises(ValueError, match=message), prune(decoder, visual_mask):
        decoder(**call)
    with prune(decoder, visual_mask, layers=[2, 5], lam=math.inf), torch.no_grad():
        pruned = decoder(**call).last_hidden_state
    with torch.no_grad():
        bare = decoder(**call).last_hidden_state
        without = decoder(**call | dict(deepstack_visual_embeds=None)).last_hidden_state
    real = attention_mask.bool()
    assert torch.equal(pruned[real], bare[real]) and gap(bare[real], without[real]) > 1e-3
    with prune(decoder, visual_mask, layers=[2, 5]) as pruner, torch.no_grad():
        decoder(**call)
    assert (pruner.counts[5] <= visual_mask.sum(1)).all()
    assert pruner.counts[5].sum() < visual_mask.sum()


def test_half_precision():
    model = build().bfloat16()
    embeds, attention_mask, visual_mask = ragged(torch.bfloat16)
    with prune(model, visual_mask, lam=math.inf):
        pruned = generate(model, embeds, attention_mask)
    assert torch.equal(pruned, generate(model, embeds, attention_mask))
    with prune(model, visual_mask) as pruner:
        logits = forward(model, embeds, attention_mask)
    assert logits.dtype == torch.bfloat16 and pruner.attention[1].dtype == torch.float32
    assert pruner.counts[5].sum() < visual_mask.sum() and logits.isfinite().all()


def test_fixed_counts_equal_the_oracle():
    model = tiny("Llama", torch.float64)
    embeds, attention_mask, visual_mask = ragged(torch.float64)
    with AdaptivePruner(
        model, visual_mask, k=None, counts={6: 4, 2: torch.tensor([5, 9, 20])}
    ) as pruner:
        logits = forward(model, embeds, attention_mask)
    assert {i: K.tolist() for i, K in pruner.counts.items()} == {
        2: [5, 9, 15],
        6: [4, 4, 4],
    }  # not 20 of 15
    for b in range(3):
        first = int((attention_mask[b] == 0).sum())
        counts = {2: [5, 9, 20][b], 6: 4}
        visual = visual_mask[b, first:].tolist()
        want, kept = oracle(model, embeds[b, first:], visual, [2, 6], None, H, counts)
        assert kept_sets(pruner, b, first) == kept and gap(logits[b, -1], want[-1]) < 1e-10


def test_what_is_recorded_is_what_decided():
    embeds, attention_mask, visual_mask = ragged()
    calls = []
    with prune(tiny(), visual_mask) as pruner:
        handle = (
            tiny()
            .model.layers[6]
            .register_forward_pre_hook(  # after ours: the layer's own call
                lambda module, args, kwargs: calls.append((args[0], kwargs)), with_kwargs=True
            )
        )
        forward(tiny(), embeds, attention_mask)
        handle.remove()
    (hidden, kwargs), there = calls[0], visual_mask
    assert hidden.shape[1] < embeds.shape[1]
    assert all(table.shape[1] == hidden.shape[1] for table in kwargs["position_embeddings"])
    for i in LAYERS:
        attention, vav = pruner.attention[i], pruner.vav[i]
        assert attention.shape == (3, H, embeds.shape[1]) and attention.dtype == torch.float32
        assert (
            not attention.transpose(1, 2)[~there].any()
            and (attention.transpose(1, 2)[there] > 0).all()
        )
        torch.testing.assert_close(vav, head_vav(attention))
        want = [
            min(n, max(1, math.floor(LAM * sum(sorted(row)[-5:]) + 0.5)))
            for row, n in zip(vav.tolist(), there.sum(1).tolist())
        ]
        assert pruner.counts[i].tolist() == want  # round(lambda sum VAV), clamped, sample by sample
        assert torch.equal(
            pruner.kept[i], select(text_relevance(attention, 5), pruner.counts[i], there)
        )
        assert (pruner.kept[i] <= there).all()  # what is gone stays gone
        there = pruner.kept[i]
    want = average_tokens(visual_mask.sum(1), [K for K in pruner.counts.values()], LAYERS, L)
    assert torch.equal(pruner.average_tokens(), want) and want.shape == (3,)


# ------------------------------------------------------------------------------- keeping everything

SAMPLING = [
    dict(),
    dict(do_sample=True),
    dict(num_beams=3),
    dict(do_sample=True, num_return_sequences=2),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_lambda_infinity_is_the_unpruned_model_bit_for_bit(family):
    model = tiny(family)
    embeds, attention_mask, visual_mask = ragged()
    real = attention_mask.bool()
    with prune(model, visual_mask, lam=math.inf) as pruner:
        pruned = forward(model, embeds, attention_mask)
    assert torch.equal(pruned[real], forward(model, embeds, attention_mask)[real])
    assert all(torch.equal(kept, visual_mask) for kept in pruner.kept.values())
    for options in SAMPLING:
        with prune(model, visual_mask, lam=math.inf):
            pruned = generate(model, embeds, attention_mask, **options)
        assert torch.equal(pruned, generate(model, embeds, attention_mask, **options)), options


def test_lambda_infinity_without_a_mask_is_bit_equal_everywhere():
    embeds, _, visual_mask = ragged()
    with prune(tiny(), visual_mask, lam=math.inf, layers=[1]):
        pruned = forward(tiny(), embeds)
    assert torch.equal(pruned, forward(tiny(), embeds))


# -------------------------------------------------------------- generate: batches, caches, sampling


def singles(model, embeds, attention_mask, visual_mask, lam=LAM, **options):
    """generate, one unpadded prompt at a time: tokens, kept sets and average tokens of each."""
    for b in range(len(embeds)):
        real = attention_mask[b].bool()
        with prune(model, visual_mask[b : b + 1, real], lam=lam) as pruner:
            ids = generate(
                model, embeds[b : b + 1, real], attention_mask[b : b + 1, real], **options
            )
        yield ids, kept_sets(pruner, 0), float(pruner.average_tokens())


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_batch_equals_singles(family):
    model = tiny(family)
    embeds, attention_mask, visual_mask = ragged()
    before = embeds.clone(), attention_mask.clone(), visual_mask.clone()
    with prune(model, visual_mask) as pruner:
        ids = generate(model, embeds, attention_mask)
    for a, b in zip(before, (embeds, attention_mask, visual_mask)):
        assert torch.equal(a, b)
    assert not torch.equal(ids, generate(model, embeds, attention_mask)), (
        "nothing changes: a weak test"
    )
    for b, (alone, kept, average) in enumerate(singles(model, embeds, attention_mask, visual_mask)):
        assert ids[b].tolist() == alone[0].tolist(), f"sample {b}"
        assert kept_sets(pruner, b, int((attention_mask[b] == 0).sum())) == kept
        assert float(pruner.average_tokens()[b]) == average
    with prune(model, visual_mask):
        logits = forward(model, embeds, attention_mask)
    for b in range(3):
        real = attention_mask[b].bool()
        with prune(model, visual_mask[b : b + 1, real]):
            off = gap(logits[b, -1], forward(model, embeds[b : b + 1, real])[0, -1])
        assert off < 1e-4, f"sample {b}: logits differ by {off}"


def test_beams_of_a_ragged_batch_equal_singles():
    embeds, attention_mask, visual_mask = ragged()
    with prune(tiny(), visual_mask) as pruner:
        ids = generate(tiny(), embeds, attention_mask, num_beams=3)
    assert pruner.kept[5].shape == visual_mask.shape  # one row for each sample, not for each beam
    for b, (alone, kept, _) in enumerate(
        singles(tiny(), embeds, attention_mask, visual_mask, num_beams=3)
    ):
        assert ids[b].tolist() == alone[0].tolist()
        assert kept_sets(pruner, b, int((attention_mask[b] == 0).sum())) == kept


@pytest.mark.parametrize("options", SAMPLING, ids=str)
def test_cached_generation_equals_recomputing_everything(options):
    """Without a cache every step reads prompt and answer: the answer must not steer it."""
    embeds, attention_mask, visual_mask = ragged()
    runs = []
    for use_cache in (True, False):
        with prune(tiny(), visual_mask) as pruner:
            ids = generate(tiny(), embeds, attention_mask, use_cache=use_cache, **options)
        runs.append((ids, pruner.kept))
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(runs[0][1][i], runs[1][1][i]) for i in LAYERS)
    assert torch.equal(
        generate_twice(options), runs[0][0]
    )  # and a seed gives the same answer again


def generate_twice(options):
    embeds, attention_mask, visual_mask = ragged()
    with prune(tiny(), visual_mask):  # two prompts in one block, each with its own selection
        generate(tiny(), embeds.flip(1), attention_mask, **options)
        return generate(tiny(), embeds, attention_mask, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_later_caches_are_shorter_by_what_was_dropped(family):
    model = tiny(family)
    embeds, attention_mask, visual_mask = ragged()
    S = embeds.shape[1]
    with prune(model, visual_mask) as pruner:
        out = generate(model, embeds, attention_mask, return_dict_in_generate=True)
    real, had = attention_mask.sum(1), visual_mask.sum(1)
    left = {
        i: int((real - had + K).max()) for i, K in pruner.counts.items()
    }  # the longest sample's
    assert left[1] < S and left[5] < left[1]
    want = [S, left[1], left[1], left[3], left[3], left[5], left[5], left[5]]
    layers = find_cache(out.values()).layers
    assert [layer.get_seq_length() for layer in layers] == [
        n + 5 for n in want
    ]  # the last is not cached
    assert (
        [layer.keys.shape[2] for layer in layers]
        == [layer.values.shape[2] for layer in layers]
        == [n + 5 for n in want]
    )


def test_several_tokens_after_the_prompt_equal_one_forward_over_all():
    """A ragged second turn: pieces of 1, 3 and 2 tokens, or the first with the prompt."""
    embeds, attention_mask, visual_mask = ragged(torch.float64)
    model, S = tiny("Llama", torch.float64), embeds.shape[1]
    more = torch.randn(3, 6, D, generator=torch.Generator().manual_seed(5))
    whole = torch.cat([embeds, more.double()], dim=1)
    mask = torch.nn.functional.pad(attention_mask, (0, 6), value=1)
    mask[0, S + 1 : S + 3] = 0  # sample 0 says less: two tokens of padding
    position = (mask.cumsum(1) - 1).clamp(min=0)
    pad = functools.partial(torch.nn.functional.pad, pad=(0, 6))
    with prune(model, pad(visual_mask), query_mask=pad(prune(model, visual_mask).asks)) as once:
        want = forward(model, whole, mask)
    with prune(model, visual_mask) as pruner, torch.no_grad():
        for cuts in ([0, S, S + 1, S + 4, S + 6], [0, S + 1, S + 4, S + 6]):
            cache, pieces = DynamicCache(config=model.config), []
            for start, end in zip(cuts, cuts[1:]):
                pieces.append(
                    model(
                        inputs_embeds=whole[:, start:end],
                        attention_mask=mask[:, :end],
                        position_ids=position[:, start:end],
                        **{CACHE: cache},
                    ).logits
                )
            assert all(torch.equal(pad(pruner.kept[i]), once.kept[i]) for i in LAYERS)
            real = mask.bool() & (torch.arange(S + 6) >= S)
            assert gap(torch.cat(pieces, dim=1)[real], want[real]) < 1e-10


def test_input_ids_positional_arguments_and_a_bare_decoder():
    ids = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    visual_mask = (torch.arange(20) > 0) & (torch.arange(20) < 14)
    model, visual_mask = tiny(), visual_mask.expand(2, 20)
    with torch.no_grad():
        with prune(model, visual_mask):
            by_embeds = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
        with prune(model.model, visual_mask):  # the bare LlamaModel
            states = model.model(ids).last_hidden_state
    assert torch.equal(model.lm_head(states), by_embeds)


def test_the_decoder_inside_a_vision_language_model():
    config = transformers.LlavaConfig(
        text_config=tiny().config,
        image_token_index=3,
        image_token_id=3,
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        ),
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[1, 5] + [3] * 16 + [7, 8, 9, 10]])  # 4 x 4 patches
    inputs = dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.randn(1, 3, 32, 32)
    )
    inputs |= dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)

    def run():
        return model.generate(**inputs)

    with AdaptivePruner(model, ids == 3, counts={1: 9, 4: 5}) as pruner:
        run()
    assert pruner.kept[4].sum() == 5 and pruner.average_tokens().tolist() == [
        (16 + 9 * 3 + 5 * 4) / 8
    ]
    with prune(model, ids == 3, lam=math.inf):
        pruned = run()
    assert torch.equal(pruned, run())


# ----------------------------------------------------------------------------------------- training


def training():
    """The ragged prompts as training data: two last tokens answer, the one before them asks."""
    embeds, attention_mask, visual_mask = ragged(torch.float64)
    query_mask, labels = torch.zeros_like(visual_mask), torch.full(visual_mask.shape, -100)
    query_mask[:, -3] = True
    labels[:, -2:] = torch.tensor([[5, 6], [7, 8], [9, 10]])
    inputs = dict(
        inputs_embeds=embeds.requires_grad_(), attention_mask=attention_mask, labels=labels
    )
    return inputs | dict(use_cache=False), visual_mask, query_mask


def test_training_forward_lines_up_with_its_labels_and_carries_gradients():
    model, (inputs, visual_mask, query_mask), caught = build().double(), training(), {}

    def catch(i):
        def hook(module, args, output):
            output.retain_grad()
            caught[i] = output

        return hook

    handles = [
        model.model.layers[i - 1].register_forward_hook(catch(i)) for i in LAYERS
    ]  # it prunes these
    with prune(model, visual_mask, lam=1.5, query_mask=query_mask) as pruner:
        out = model(**inputs)
        out.loss.backward()
    for handle in handles:
        handle.remove()
    assert out.logits.shape == (*visual_mask.shape, VOCAB)
    logits, labels = (
        out.logits.detach()[:, -3:-1].reshape(-1, VOCAB),
        inputs["labels"][:, -2:].reshape(-1),
    )
    want = torch.nn.functional.cross_entropy(logits, labels)
    assert float(out.loss.detach()) == pytest.approx(
        float(want), abs=1e-5
    )  # the library's loss is float32
    gone = visual_mask & ~pruner.kept[1]  # layer 1 has the prompt's numbering
    grad = caught[1].grad.abs().sum(dim=2)
    assert gone.any(dim=1).all() and not grad[gone].any() and (grad[pruner.kept[1]] > 0).all()
    assert all((caught[i].grad.abs().sum(dim=2) > 0).any(dim=1).all() for i in LAYERS)
    assert all(
        p.grad.isfinite().all()
        for name, p in model.named_parameters()
        if "embed_tokens" not in name
    )


VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))


@pytest.mark.skipif(VERSION < (5, 23), reason="older checkpointing replays a layer's hooks too")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_changes_nothing():
    grads = []
    for checkpointing in (False, True):
        model, (inputs, visual_mask, query_mask) = build().double().train(), training()
        if checkpointing:
            model.gradient_checkpointing_enable(dict(use_reentrant=False))
        with prune(model, visual_mask, lam=1.5, query_mask=query_mask):
            model(**inputs).loss.backward()
        grads.append(inputs["inputs_embeds"].grad)
    assert grads[0].any() and gap(*grads) < 1e-12


def test_answers_left_out_of_query_mask_do_not_steer():
    embeds, attention_mask, visual_mask = ragged(torch.float64)
    model, pad = tiny("Llama", torch.float64), torch.nn.functional.pad
    with prune(model, visual_mask) as prompt:
        forward(model, embeds, attention_mask)
    answer = torch.randn(3, 4, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    whole, mask = torch.cat([embeds, answer], dim=1), pad(attention_mask, (0, 4), value=1)
    with prune(model, pad(visual_mask, (0, 4)), query_mask=pad(prompt.asks, (0, 4))) as masked:
        forward(model, whole, mask)
    with prune(model, pad(visual_mask, (0, 4))) as unmasked:
        forward(model, whole, mask)
    assert all(torch.equal(masked.kept[i], pad(prompt.kept[i], (0, 4))) for i in LAYERS)
    assert any(
        not torch.equal(unmasked.kept[i], masked.kept[i]) for i in LAYERS
    )  # without it, they do


def test_right_padding_gives_the_same_states():
    embeds, attention_mask, visual_mask = ragged(torch.float64)
    model = tiny("Llama", torch.float64)
    with prune(model, visual_mask):
        left = forward(model, embeds, attention_mask)
    order = attention_mask.argsort(dim=1, descending=True, stable=True)  # padding to the end
    turned = [
        torch.stack([row[idx] for row, idx in zip(x, order)])
        for x in (embeds, attention_mask, visual_mask, left)
    ]
    with prune(model, turned[2]):
        right = forward(model, *turned[:2])
    assert gap(right, turned[3]) < 1e-10


# ------------------------------------------------------------------------------ what is left behind


def state(model):
    """All that hooks or attributes could change: every module's dictionary, hooks and mode."""

    def look(key, value):
        if "hooks" in key:
            return list(value)
        return value if key == "training" else id(value)

    return {
        name: {key: look(key, value) for key, value in vars(module).items()}
        for name, module in model.named_modules()
    }


def test_nothing_stays_on_the_model():
    model = build()
    model.model.layers[2].mlp.train()  # a mode of its own must survive the check of the decoder
    embeds, attention_mask, visual_mask = ragged()
    before, config, reference = (
        state(model),
        model.config.to_dict(),
        forward(model, embeds, attention_mask),
    )
    model.train()
    model.eval()
    model.model.layers[2].mlp.train()
    with prune(model, visual_mask) as pruner:
        forward(model, embeds, attention_mask)
        assert state(model) != before
    assert state(model) == before and model.config.to_dict() == config
    with pytest.raises(KeyError, match="mine"):
        with prune(model, visual_mask):
            generate(model, embeds, attention_mask)
            raise KeyError("mine")
    with pytest.raises(ValueError, match="finite"):
        with prune(model, visual_mask):
            forward(model, embeds * math.nan, attention_mask)
    assert state(model) == before
    assert torch.equal(forward(model, embeds, attention_mask), reference)
    assert pruner._cache is None and not pruner._handles  # the KV cache is not held either
    with (
        prune(model, visual_mask) as one,
        pytest.raises(ValueError, match="must not be entered twice"),
    ):
        forward(model, embeds, attention_mask)
        with one:
            pass
    assert state(model) == before


def test_check_uses_no_random_numbers_even_with_dropout():
    model = build(attention_dropout=0.5).train()
    embeds, attention_mask, visual_mask = ragged()
    numbers = torch.get_rng_state(), random.getstate()
    prune(model, visual_mask)
    assert torch.equal(torch.get_rng_state(), numbers[0]) and random.getstate() == numbers[1]
    assert all(module.training for module in model.modules())


# ----------------------------------------------------------------------------------------- refusals


def small(name, **options):
    options |= dict(vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config = getattr(transformers, name + "Config")(**options)
    return getattr(transformers, name + ("LMHeadModel" if name == "GPT2" else "ForCausalLM"))(
        config
    ).eval()


LLAMA = dict(hidden_size=D, intermediate_size=96, num_hidden_layers=L, num_attention_heads=H)


@pytest.mark.parametrize(
    "make",
    [
        lambda: small("GPT2", n_embd=D, n_layer=L, n_head=H),
        lambda: torch.nn.Linear(3, 3),
        lambda: "a name",
        lambda: small("OPT", ffn_dim=96, word_embed_proj_dim=D, **LLAMA),
        lambda: small("Olmo2", **LLAMA),
        lambda: small("GPTNeoX", **LLAMA),
        lambda: build(attn_implementation="flex_attention"),
    ],
    ids=["GPT-2", "Linear", "str", "OPT", "OLMo-2", "GPT-NeoX", "flex attention"],
)
def test_unsupported_decoders_are_refused(make):
    with pytest.raises(TypeError, match="decoder must be of Llama's kind .*, not"):
        AdaptivePruner(make(), ragged()[2], lam=1.0)


@pytest.mark.parametrize(
    "family, options",
    [
        ("Gemma2", dict(attn_implementation="eager", head_dim=16)),  # caps its scores
        ("Cohere2", {}),  # some layers have no positions, and no attribute says so
    ],
)
@pytest.mark.parametrize("spread", [0.02, 0.25])
def test_decoders_that_differ_in_one_formula_are_refused(family, options, spread):
    """Even where weights are so small that attention is flat, as they are in a new model."""
    options = LLAMA | dict(num_key_value_heads=4, initializer_range=spread) | options
    with pytest.raises(TypeError, match="q and k do not explain the attention of its layer"):
        check_decoder(small(family, **options).model)


FAULTS = [  # a family, a function of stage 3, and what it could be by mistake
    ("Llama", "has_rotary", lambda attn: False),
    ("SmolLM3", "has_rotary", lambda attn: True),
    ("Qwen3", "normalise", lambda attn, q, k: (q, k)),
    ("Gemma3", "normalise", lambda attn, q, k: (q, k * 1.1)),
    ("Phi3", "split_fused", lambda attn, x: attn.qkv_proj(x).split([32, 32, 64], dim=-1)[::-1]),
    ("Cohere", "rotate", lambda attn, x, cos, sin: turn(x, cos, sin)),
    ("Granite", "visual_attention", lambda q, k, scale, *r: visual_attention(q, k, 8**-0.5, *r)),
    ("Gemma3", "visual_attention", lambda q, k, scale, *r: visual_attention(q, k, 0.25, *r)),
]


@pytest.mark.parametrize("family, name, fault", FAULTS, ids=[f"{f}-{n}" for f, n, _ in FAULTS])
@pytest.mark.parametrize("spread", [0.02, 0.25])
def test_the_check_finds_a_fault_of_ours(family, name, fault, spread, monkeypatch):
    model = build(family, initializer_range=spread)
    check_decoder(model.model)
    monkeypatch.setattr(stage3_decode, name, fault)
    with pytest.raises(TypeError, match="q and k do not explain the attention of its layer"):
        check_decoder(model.model)


def test_a_decoder_that_is_not_causal_is_refused_without_its_own_mask():
    """PaliGemma's, without token_type_ids: given no mask, its attention would see the future."""
    embeds, attention_mask, visual_mask = ragged()
    model = build("Gemma", use_bidirectional_attention=True)
    message = "attention_mask must be the model's own, .B, 1, S, S., as this decoder's attention is"
    for mask in (attention_mask, None):
        refuses(message, embeds, mask, visual_mask, model)


def test_finished_masks_that_nobody_made_are_refused():
    embeds, attention_mask, visual_mask = ragged()
    good = finished_mask(tiny(), attention_mask, visual_mask, everything=False)
    packed = good.clone()
    packed[..., 12:, :12] = False  # the last token does not see the first ones
    message = r"attention_mask must be \(B, tokens so far\)"
    per_head = good.expand(3, H, -1, -1)
    for bad in (packed, per_head, good[:2], good[:, :, 1:], good.long(), good.float()):
        refuses(message, embeds, bad, visual_mask)
    with prune(tiny(), visual_mask) as pruner:
        forward(tiny(), embeds, good)
        cache = pruner._cache
        two_more = torch.ones(3, 1, 2, embeds.shape[1] + 2).bool()
        with pytest.raises(ValueError, match=message):
            forward(tiny(), embeds[:, :2], two_more, **{CACHE: cache})


@pytest.mark.parametrize("family", ["Gemma3", "Phi3", "Starcoder2"])
def test_a_window_shorter_than_the_sequence_is_refused(family):
    embeds, attention_mask, visual_mask = ragged()
    S = embeds.shape[1]
    message = f"the sequence must fit the decoder's sliding_window, but has {S} tokens"
    refuses(message, embeds, attention_mask, visual_mask, build(family, sliding_window=S - 1))
    model = build(family, sliding_window=S + 2)
    with prune(model, visual_mask):
        generate(model, embeds, attention_mask, max_new_tokens=3)  # the last is not read
    message = f"the sequence must fit the decoder's sliding_window, but has {S + 3} tokens"
    with pytest.raises(ValueError, match=message), prune(model, visual_mask):
        generate(model, embeds, attention_mask, max_new_tokens=4)


def test_a_window_that_no_layer_has_is_none():
    embeds, attention_mask, visual_mask = ragged()
    model = build("Gemma3", sliding_window=8, layer_types=["full_attention"] * L)
    with prune(model, visual_mask) as pruner:
        forward(model, embeds, attention_mask)
    assert pruner.counts[5].sum() < visual_mask.sum()


def test_attention_that_differs_from_our_q_and_k_is_refused():
    """Same class, same names, another formula: only the three tokens of the check can tell."""
    model = build()
    attn = model.model.layers[3].self_attn
    attn.scaling = 1.0
    check_decoder(model.model)  # a layer's own scaling is read, so this is fine
    model = build()
    attn = model.model.layers[3].self_attn
    attn.q_norm = attn.k_norm = torch.nn.LayerNorm(D // H)  # names that its forward does not use
    with pytest.raises(TypeError, match="q and k do not explain the attention of its layer 3"):
        check_decoder(model.model)


def test_a_decoders_layers_are_checked_once_and_its_attention_implementation_always(monkeypatch):
    model, calls = build(), []
    read = stage3_decode.queries_and_keys
    monkeypatch.setattr(
        stage3_decode, "queries_and_keys", lambda *args: calls.append(1) or read(*args)
    )
    for _ in range(2):
        AdaptivePruner(model, ragged()[2], lam=1.0)
        assert len(calls) == L
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(TypeError, match="it is not on sdpa or eager"):
        AdaptivePruner(model, ragged()[2], lam=1.0)


BAD_ARGUMENTS = {
    "lam must be 0 to infinity, got -1": dict(lam=-1),
    "lam must be 0 to infinity, got nan": dict(lam=math.nan),
    "lam or counts must be given, and not both": dict(counts={1: 4}),
    "lam or counts must be given": dict(lam=None),
    "k must be 1 to 8, the heads, or None for all, got 0": dict(k=0),
    "k must be 1 to 8, the heads, or None for all, got 9": dict(k=9),
    "k must be 1 to 8, the heads, or None for all, got 2.5": dict(k=2.5),
    r"layers must be ascending numbers, 1 to 7 for this decoder, got \[\]": dict(layers=[]),
    r"layers must be ascending numbers, 1 to 7 for this decoder, got \[0, 3\]": dict(layers=[0, 3]),
    r"layers must be ascending numbers, 1 to 7 for this decoder, got \[3, 8\]": dict(layers=[3, 8]),
    r"layers must be ascending numbers, 1 to 7 for this decoder, got \[5, 3\]": dict(layers=[5, 3]),
    r"layers must be ascending numbers, 1 to 7 for this decoder, got \[3, 3\]": dict(layers=[3, 3]),
    "layers must be None beside counts": dict(lam=None, counts={1: 4}, layers=[1]),
    r"layers must be ascending numbers, 1 to 7 for this decoder, got \[0\]": dict(
        lam=None, counts={0: 4}
    ),
    r"layers must be ascending numbers.*, got \[\]": dict(lam=None, counts={}),
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_arguments(message):
    with pytest.raises(ValueError, match=message):
        AdaptivePruner(tiny(), ragged()[2], **dict(lam=1.0) | BAD_ARGUMENTS[message])


def test_bad_masks():
    embeds, attention_mask, visual_mask = ragged()
    for bad in (visual_mask.long(), visual_mask[0], visual_mask[None]):
        with pytest.raises(ValueError, match=r"visual_mask must be bool of shape \(B, S\), got"):
            prune(tiny(), bad)
    for bad in (visual_mask.long(), visual_mask[:, 1:]):
        with pytest.raises(ValueError, match=r"query_mask must be bool of shape \(B, S\), got"):
            prune(tiny(), visual_mask, query_mask=bad)
    with pytest.raises(ValueError, match=r"visual_mask must be a bool tensor \(B, S\), got a list"):
        prune(tiny(), visual_mask.tolist())
    too_few_layers = build(num_hidden_layers=4)
    with pytest.raises(
        ValueError, match="layers must be given for a decoder of 4 layers, fewer than 8"
    ):
        prune(too_few_layers, visual_mask)


def test_a_sample_without_visual_tokens_is_left_alone():
    embeds, attention_mask, visual_mask = ragged()
    blind = visual_mask & (torch.arange(3) > 0)[:, None]  # the first sample is text alone
    bare = forward(tiny(), embeds, attention_mask)
    with prune(tiny(), blind, lam=1.0) as pruner:
        pruned = forward(tiny(), embeds, attention_mask)
    real = attention_mask[0].bool()
    torch.testing.assert_close(pruned[0, real], bare[0, real], atol=1e-5, rtol=1e-5)
    assert gap(pruned[1, -1], bare[1, -1]) > 1e-3 and pruner.average_tokens()[0] == 0
    assert all(K[0] == 0 and (K[1:] > 0).all() for K in pruner.counts.values())


def refuses(message, embeds, attention_mask, visual_mask, model=None, query_mask=None, **options):
    model = model or tiny()
    with pytest.raises(ValueError, match=message), prune(model, visual_mask, query_mask=query_mask):
        forward(model, embeds, attention_mask, **options)


def test_bad_calls():
    embeds, attention_mask, visual_mask = ragged()
    S = embeds.shape[1]
    nothing = "visual_mask must be followed by text, or query_mask mark some, in every sample"
    refuses(nothing, embeds, attention_mask, visual_mask | (torch.arange(S) == S - 1))
    refuses(nothing, embeds, attention_mask, visual_mask, query_mask=torch.zeros_like(visual_mask))
    refuses(
        nothing, embeds, attention_mask, visual_mask, query_mask=visual_mask
    )  # visual tokens never ask
    refuses(
        "visual_mask must be False where attention_mask is 0",
        embeds,
        attention_mask,
        visual_mask | (torch.arange(S) == 0),
    )
    refuses(
        f"the prompt must be visual_mask's {S} tokens, got {S - 2}",
        embeds[:, 2:],
        None,
        visual_mask,
    )
    refuses(
        f"the prompt must be visual_mask's {S - 2} tokens, got {S}",
        embeds,
        None,
        visual_mask[:, 2:],
    )
    refuses(
        "the batch must be visual_mask's 3 samples, .*got 2",
        embeds[:2],
        attention_mask[:2],
        visual_mask,
    )
    refuses(
        "the batch must be visual_mask's 3 samples, .*got 6",
        embeds.repeat(2, 1, 1),
        None,
        visual_mask,
    )
    refuses(
        r"attention_mask must be \(B, tokens so far\)", embeds, torch.ones(3, 1, S, S), visual_mask
    )
    refuses(
        r"attention_mask must be \(B, tokens so far\)", embeds, attention_mask[:, 1:], visual_mask
    )
    refuses(
        "position_ids must count up by 1 where there is no attention_mask",
        embeds,
        None,
        visual_mask,
        position_ids=torch.arange(S)[None] % 12,
    )
    refuses(
        "the KV cache must be None, or a DynamicCache",
        embeds,
        attention_mask,
        visual_mask,
        **{CACHE: StaticCache(config=tiny().config, max_cache_len=64)},
    )
    filled = DynamicCache(config=tiny().config)
    forward(tiny(), embeds, attention_mask, **{CACHE: filled})
    refuses(
        "the KV cache must be None, or a DynamicCache that is empty or was filled in this block",
        embeds[:, :1],
        torch.ones(3, S + 1),
        visual_mask,
        **{CACHE: filled},
    )
    broken = embeds.clone()
    broken[1, 12] = math.nan
    refuses(
        "hidden states at layer 1 must be finite, but hold NaN or infinity",
        broken,
        None,
        visual_mask,
    )
    window = build("Mistral", sliding_window=S - 1)
    refuses(
        f"the sequence must fit the decoder's sliding_window, but has {S} tokens",
        embeds,
        attention_mask,
        visual_mask,
        window,
    )
    with (
        pytest.raises(ValueError, match="the decoder did not run, or was compiled before"),
        prune(tiny(), visual_mask),
    ):
        pass


def test_a_decoder_compiled_before_the_block_is_pruned_or_refused():
    """Torch may or may not notice new hooks; no unpruned run may pass for a pruned one."""
    embeds, _, visual_mask = ragged()
    model = build()
    with prune(model, visual_mask):
        want = forward(model, embeds)
    model.model.compile(backend="eager")
    forward(model, embeds)  # compiled here, without our hooks
    try:
        with prune(model, visual_mask):
            got = forward(model, embeds)
        assert gap(got, want) < 1e-4
    except ValueError as error:
        assert "the decoder did not run, or was compiled before" in str(error)
    torch.compiler.reset()


def test_a_window_that_holds_the_whole_sequence_changes_nothing():
    embeds, attention_mask, visual_mask = ragged()
    ids = []
    for window in (None, embeds.shape[1] + 6):
        model = build("Mistral", sliding_window=window)
        with prune(model, visual_mask):
            ids.append(generate(model, embeds, attention_mask))
    assert torch.equal(*ids)


# ------------------------------------------------------------------ another release of transformers

VERSIONS = f"tested with transformers .* to .*, this is {transformers.__version__}"


def test_a_cache_is_found_whatever_it_is_called():
    cache = DynamicCache()
    assert find_cache([None, 3, torch.ones(2), cache, "past"]) is cache
    assert find_cache(dict(any_name=cache).values()) is cache and find_cache([None, (1, 2)]) is None


def test_a_cache_of_no_known_type_is_refused_and_not_overlooked():
    embeds, attention_mask, visual_mask = ragged()
    refuses(
        "the KV cache must be None, or a DynamicCache",
        embeds,
        attention_mask,
        visual_mask,
        **{CACHE: Wrapped(DynamicCache(config=tiny().config))},
    )


@pytest.mark.parametrize("name", stage3_decode.DECODER_ARGUMENTS)
def test_a_decoder_whose_argument_was_renamed_is_refused_with_the_name_and_the_versions(name):
    model = build()
    signature = inspect.signature(model.model.forward)
    renamed = [
        p.replace(name="renamed") if p.name == name else p for p in signature.parameters.values()
    ]
    model.model.forward = lambda *args, **kwargs: None
    model.model.forward.__signature__ = inspect.Signature(renamed)
    with pytest.raises(
        TypeError, match=f"its forward has no '{name}', which stage 3 needs .{VERSIONS}"
    ):
        AdaptivePruner(model, ragged()[2], lam=1.0)


@pytest.mark.parametrize("name", stage3_decode.LAYER_ARGUMENTS)
def test_a_layer_whose_argument_was_renamed_is_refused_with_the_name_and_the_versions(name):
    embeds, attention_mask, visual_mask = ragged()
    model = build()

    def rename(layer, args, kwargs):  # runs before the pruner's hook
        kwargs = dict(hidden_states=args[0]) | kwargs
        kwargs["renamed"] = kwargs.pop(name)
        return (), kwargs

    model.model.layers[1].register_forward_pre_hook(rename, with_kwargs=True)
    with (
        pytest.raises(
            TypeError,
            match=f"call of a LlamaDecoderLayer has no '{name}', which stage 3 needs .{VERSIONS}",
        ),
        prune(model, visual_mask),
    ):
        forward(model, embeds, attention_mask)


def test_a_layer_called_by_position_is_refused():
    """Stage 3 would not know which argument is which."""
    embeds, attention_mask, visual_mask = ragged()
    model = build()

    def by_position(layer, args, kwargs):
        return (*args, kwargs.pop("attention_mask")), kwargs

    model.model.layers[1].register_forward_pre_hook(by_position, with_kwargs=True)
    refuses(
        f"call of a LlamaDecoderLayer must name all but its first argument .{VERSIONS}",
        embeds,
        attention_mask,
        visual_mask,
        model,
    )


class Wrapped:
    """A KV cache of no known type."""

    def __init__(self, cache):
        self.cache = cache

    def __getattr__(self, name):
        return getattr(self.cache, name)


def test_layers_that_are_given_another_cache_are_refused():
    """Their masks would be too short, and no error would follow."""
    embeds, attention_mask, visual_mask = ragged()
    model = build()

    def wrap(layer, args, kwargs):
        return args, kwargs | {CACHE: Wrapped(kwargs[CACHE])}

    for layer in model.model.layers:
        layer.register_forward_pre_hook(wrap, with_kwargs=True)
    refuses(
        f"LlamaModel must hand its KV cache to the layers as it is .{VERSIONS}",
        embeds,
        attention_mask,
        visual_mask,
        model,
    )


def test_a_continuation_whose_cache_is_not_found_says_so():
    embeds, attention_mask, visual_mask = ragged()
    hint = f"; if this call continues the prompt, its KV cache was not found .{VERSIONS}"
    for mask, message in (
        (torch.ones(3, embeds.shape[1] + 1), "attention_mask must be .B, tokens so far."),
        (None, "the prompt must be visual_mask's 24 tokens, got 1"),
    ):
        with pytest.raises(ValueError, match=message + hint), prune(tiny(), visual_mask):
            forward(tiny(), embeds, attention_mask)
            forward(tiny(), embeds[:, :1], mask)


@pytest.mark.parametrize(
    "wrap",
    [lambda layer: torch.compile(layer, backend="eager"), lambda layer: AnyCall(layer)],
    ids=["compiled", "wrapped"],
)
def test_layers_that_are_compiled_or_wrapped_one_by_one_are_pruned_as_before(wrap):
    embeds, attention_mask, visual_mask = ragged()
    model = build()
    with prune(model, visual_mask) as want:
        forward(model, embeds, attention_mask)
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = wrap(layer)
    with prune(model, visual_mask) as pruner:
        forward(model, embeds, attention_mask)
    assert all(torch.equal(pruner.kept[i], want.kept[i]) for i in LAYERS)
    torch.compiler.reset()


@pytest.mark.parametrize("part", ["layer", "attention"])
@pytest.mark.parametrize("name", stage3_decode.LAYER_ARGUMENTS)
def test_a_forward_whose_argument_was_renamed_is_refused_before_anything_runs(part, name):
    model = build()
    module = model.model.layers[2] if part == "layer" else model.model.layers[2].self_attn
    signature = inspect.signature(module.forward)
    renamed = [
        p.replace(name="renamed") if p.name == name else p for p in signature.parameters.values()
    ]
    original = module.forward
    module.forward = lambda *args, **kwargs: original(*args, **kwargs)
    module.forward.__signature__ = inspect.Signature(renamed)
    with pytest.raises(
        TypeError,
        match=f"{type(module).__name__}.forward has no '{name}', which stage 3 needs .{VERSIONS}",
    ):
        AdaptivePruner(model, ragged()[2], lam=1.0)


class AnyCall(torch.nn.Module):
    """Passes every call on: its own signature has no names."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


def test_a_bare_decoder_that_is_asked_for_a_tuple_is_refused():
    embeds, attention_mask, visual_mask = ragged()
    with (
        pytest.raises(ValueError, match="return_dict must be True, or not given"),
        prune(tiny(), visual_mask),
    ):
        tiny().model(inputs_embeds=embeds, attention_mask=attention_mask, return_dict=False)


def test_an_output_without_last_hidden_state_is_refused_with_the_name_and_the_versions():
    embeds, attention_mask, visual_mask = ragged()
    model = build()
    model.model.register_forward_hook(
        lambda decoder, args, output: dict(states=output.last_hidden_state)
    )
    with (
        pytest.raises(
            TypeError,
            match="output of LlamaModel has no 'last_hidden_state', which stage 3 needs "
            f".{VERSIONS}",
        ),
        prune(model, visual_mask),
    ):
        forward(model, embeds, attention_mask)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling"])
def test_an_attention_whose_part_was_renamed_is_refused_with_the_name_and_the_versions(name):
    model = build()
    attention = model.model.layers[2].self_attn
    attention.renamed = getattr(attention, name)
    delattr(attention, name)
    with pytest.raises(TypeError, match=f"decoder must be .*no attribute '{name}'.*{VERSIONS}"):
        AdaptivePruner(model, ragged()[2], lam=1.0)


# ----------------------------------------------------------------------------------------- the file


def test_file_keeps_to_its_form():
    path = Path(stage3_decode.__file__)
    assert max(map(len, path.read_text().splitlines())) <= 100
    tree = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module.split(".")[0] for node in tree if isinstance(node, ast.ImportFrom)}
    assert names <= {"torch", "transformers"} | sys.stdlib_module_names


def test_file_runs_alone(tmp_path):
    shutil.copy(stage3_decode.__file__, tmp_path)
    run = subprocess.run(
        [sys.executable, "stage3_decode.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("KV cache [64, ") == 3 and "lambda inf: 48 -> [[48, 48]" in run.stdout


@torch.no_grad()
def test_a_cache_that_was_cut_back_in_some_layers_only_is_refused():
    """As older versions cut it back: to one length, which the short caches never reach."""
    model = build()
    embeds, attention_mask, visual_mask = ragged()
    longer = torch.cat([attention_mask, attention_mask[:, -1:]], dim=1)
    named = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in named else "past_key_values"
    with prune(model, visual_mask, lam=2):
        out = model(inputs_embeds=embeds, attention_mask=attention_mask)
        cache = find_cache(out.values())
        model(inputs_embeds=embeds[:, -1:], attention_mask=longer, **{name: cache})
        for layer in cache.layers:
            if layer.keys.shape[2] > embeds.shape[1]:
                layer.keys = layer.keys[:, :, :-1]
                layer.values = layer.values[:, :, :-1]
        with pytest.raises(ValueError, match="must be cut back by as many tokens in every layer"):
            model(inputs_embeds=embeds[:, -1:], attention_mask=longer, **{name: cache})


@pytest.mark.parametrize("K", [0, -3, 2.5, True, torch.tensor([1, 2, 3, 4, 5])])
def test_counts_that_are_no_counts_are_refused(K):
    _, _, visual_mask = ragged()
    with pytest.raises(ValueError, match="counts must be whole numbers of 1 or more, one or"):
        AdaptivePruner(build(), visual_mask, counts={2: K})


def test_default_layers_need_a_decoder_that_is_deep_enough():
    _, _, visual_mask = ragged()
    model = build(num_hidden_layers=7)
    with pytest.raises(ValueError, match="layers must be given for a decoder of 7 layers"):
        AdaptivePruner(model, visual_mask, lam=2)
    AdaptivePruner(model, visual_mask, layers=[1, 3], lam=2)


def test_there_is_no_average_before_a_prompt():
    _, _, visual_mask = ragged()
    pruner = prune(build(), visual_mask)
    with pytest.raises(ValueError, match="average_tokens is known after a prompt ran in the block"):
        pruner.average_tokens()
