"""stage3_decode.py against hand-computed tokens, loops, and the library's own model uncut.

The oracle is dense_oracle.py: nothing is cut there, dropped tokens are masked as keys, one prompt
at a time. Run: pytest tests/test_stage3_decode.py
"""

import copy
import functools
import math
import runpy
import shutil
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from dense_oracle import Softmax64, dense
from tiny_models import CACHE, FAMILIES, VOCAB, D, H, L, build, ragged, tiny, vlm
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.masking_utils import flash_attention_mask

import stage3_decode
from stage3_decode import (
    AdaptivePruner,
    TokenPruner,
    adaptive_count,
    average_tokens,
    compact,
    cut_mask,
    find_cache,
    head_vav,
    seen_by,
    select,
    shortest_window,
    solve_lambda,
    text_relevance,
    visual_attention,
)

LAYERS, LAM = [1, 3, 5], 2.0  # L/8, 3L/8, 5L/8 of 8 layers
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))


def prune(model, visual_mask, lam=LAM, layers=None, **options):
    return AdaptivePruner(model, visual_mask, lam, layers, **options)


def positions(attention_mask):
    """As `generate` counts them: from the first token that is not padding."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def forward(model, embeds, attention_mask=None, **options):
    if attention_mask is not None and attention_mask.dim() == 2:
        options["position_ids"] = positions(attention_mask)[:, -embeds.shape[1] :]
    with Softmax64():
        return model(inputs_embeds=embeds, attention_mask=attention_mask, **options).logits


def generate(model, embeds, attention_mask, seed=0, **options):
    torch.manual_seed(seed)
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0) | options
    return model.generate(inputs_embeds=embeds, attention_mask=attention_mask, **options)


def gap(a, b):
    return float((a - b).abs().max())


def kept_sets(pruner, b, first=0):
    """{layer: places kept of sample b, counted from its first real token}."""
    return {
        i: set((mask[b].nonzero().flatten() - first).tolist()) for i, mask in pruner.kept.items()
    }


def singles(embeds, attention_mask, visual_mask):
    """Each prompt alone, without its padding: embeds, attention_mask, visual_mask of one row."""
    for b in range(len(embeds)):
        real = attention_mask[b].bool()
        yield [x[b : b + 1, real] for x in (embeds, attention_mask, visual_mask)]


# ----------------------------------------------------------------------------------- pure functions


def test_visual_attention_of_two_visual_and_two_text_tokens_by_hand():
    k = torch.tensor([1.0, 2.0, 1.0, 4.0]).log().view(1, 1, 4, 1)  # exp(q k) = 1, 2, 1, 4
    q = torch.ones(1, 1, 2, 1)
    sees = torch.tensor([[[True, True, True, False], [True, True, True, True]]])
    both = torch.ones(1, 2).bool()
    mean = [(1 / 4 + 1 / 8) / 2, (2 / 4 + 2 / 8) / 2, (1 / 4 + 1 / 8) / 2, (0 + 4 / 8) / 2]
    a = visual_attention(q, k, 1.0, sees, both)
    torch.testing.assert_close(a, torch.tensor([[mean]]))
    # The scale multiplies the scores.
    torch.testing.assert_close(visual_attention(2 * q, k, 0.5, sees, both), a)
    # A filler is no part of the mean.
    last = visual_attention(q, k, 1.0, sees, torch.tensor([[False, True]]))
    torch.testing.assert_close(last, torch.tensor([[[1 / 8, 2 / 8, 1 / 8, 4 / 8]]]))
    # What no query sees gets nothing.
    unseen = visual_attention(q, k, 1.0, sees & (torch.arange(4) > 0), both)
    torch.testing.assert_close(unseen[0, 0, :2], torch.tensor([0, (2 / 3 + 2 / 7) / 2]))


def test_a_softcap_bounds_the_scores_by_hand():
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([0.0, 50.0]).view(1, 1, 2, 1)
    sees, asks = torch.ones(1, 1, 2).bool(), torch.ones(1, 1).bool()
    a = visual_attention(q, k, 1.0, sees, asks, softcap=2.0)
    e = math.exp(2 * math.tanh(25))
    torch.testing.assert_close(a, torch.tensor([[[1 / (1 + e), e / (1 + e)]]]))


@pytest.mark.parametrize(
    "B,heads,shared,T,S,d", [(1, 4, 4, 1, 5, 2), (2, 4, 2, 3, 7, 4), (3, 6, 1, 4, 9, 2)]
)
@pytest.mark.parametrize("chunk", [1, 2, 128])
def test_visual_attention_equals_the_loops_in_chunks_of_any_size(B, heads, shared, T, S, d, chunk):
    generator = torch.Generator().manual_seed(B)
    q = torch.randn(B, heads, T, d, generator=generator)
    k = torch.randn(B, shared, S, d, generator=generator)
    asks = torch.arange(T) >= torch.arange(B)[:, None] % T  # sample b has b fillers in front
    sees = torch.rand(B, T, S, generator=generator) < 0.7
    sees[..., -1] = True
    before = q.clone(), k.clone()
    got = visual_attention(q, k, 0.7, sees, asks, chunk=chunk)
    assert got.dtype == torch.float32
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])
    for b in range(B):
        rows = [t for t in range(T) if asks[b, t]]
        for h in range(heads):
            want = [0.0] * S
            for t in rows:
                seen = [s for s in range(S) if sees[b, t, s]]
                key = k[b, h * shared // heads]
                e = {s: math.exp(0.7 * float(q[b, h, t] @ key[s])) for s in seen}
                for s in seen:
                    want[s] += e[s] / sum(e.values()) / len(rows)
            assert gap(got[b, h], torch.tensor(want)) < 1e-6


def test_heads_by_hand():
    attention = torch.tensor([[[0.1, 0.1, 0.0], [0.4, 0.0, 0.2], [0.0, 0.3, 0.3], [0.0, 0.0, 0.0]]])
    close = torch.testing.assert_close
    close(head_vav(attention), torch.tensor([[0.2, 0.6, 0.6, 0.0]]))
    close(text_relevance(attention, 1), torch.tensor([[0.4, 0.0, 0.2]]))  # a tie: head 1
    close(text_relevance(attention, 2), torch.tensor([[0.4, 0.3, 0.5]]))
    close(text_relevance(attention, 4), attention.sum(dim=1))
    both = torch.cat([attention, attention.flip(1)])  # each sample has its own best head
    close(text_relevance(both, 1), torch.tensor([[0.4, 0.0, 0.2], [0.0, 0.3, 0.3]]))


def test_adaptive_count_by_hand():
    vav, there = torch.tensor([[0.5, 0.25, 0.0], [0.125, 0.5, 0.5]]), torch.tensor([9, 9])
    nothing_there = torch.tensor([0, 1])
    cases = [
        (2, 2, there, [2, 2]),  # 1.5 and 2.0: halves round up
        (10, 2, there, [8, 9]),  # 7.5 and 10, at most 9
        (10, 1, there, [5, 5]),
        (6, 3, there, [5, 7]),
        (3.3, 2, there, [2, 3]),  # 2.475 and 3.3
        (0, 2, there, [1, 1]),
        (1e300, 2, there, [9, 9]),
        (math.inf, 2, there, [9, 9]),
        (10, 2, nothing_there, [0, 1]),
    ]
    for lam, k, available, want in cases:
        got = adaptive_count(vav, lam, k, available)
        assert got.tolist() == want and got.dtype == torch.int64, lam
    assert adaptive_count(torch.zeros(2, 3), math.inf, 2, there).tolist() == [9, 9]  # not NaN


@pytest.mark.parametrize("lam", [0.0, 0.5, 3.7, 20.0, 1e4])
def test_adaptive_count_equals_the_loop(lam):
    vav = torch.rand(50, 6, generator=torch.Generator().manual_seed(0))
    for k in (1, 5, 6):
        want = [max(1, math.floor(lam * sum(sorted(row)[-k:]) + 0.5)) for row in vav.tolist()]
        want = [min(K, n) for n, K in enumerate(want)]
        assert adaptive_count(vav, lam, k, torch.arange(50)).tolist() == want


def test_select_by_hand():
    score = torch.tensor([[9.0, 1.0, 3.0, 3.0, 2.0]])
    visual = torch.tensor([[False, True, True, True, True]])

    def kept(count):
        return select(score, torch.tensor([count]), visual).nonzero()[:, 1].tolist()

    # Text never counts; of equals the lower index.
    assert [kept(n) for n in range(5)] == [[], [2], [2, 3], [2, 3, 4], [1, 2, 3, 4]]


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
    assert idx.tolist() == [[0, 2, 3], [2, 3, 1]]
    assert real.tolist() == [[True, True, True], [False, False, True]]
    share = torch.arange(1, 21)[:, None] / 20
    stays = torch.rand(20, 30, generator=torch.Generator().manual_seed(0)) < share
    idx, real = compact(stays)
    assert idx.shape[1] == int(stays.sum(1).max())
    for b in range(20):
        assert idx[b, real[b]].tolist() == stays[b].nonzero().flatten().tolist()
        assert real[b].tolist() == sorted(real[b].tolist())  # right-aligned
        assert len(set(idx[b].tolist())) == idx.shape[1]  # no place twice


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_cut_mask_keeps_rows_and_columns_and_hides_fillers_by_hand(kind):
    sees = torch.ones(1, 1, 4, 4).tril().bool()
    low = torch.finfo(torch.float32).min
    mask = sees if kind == torch.bool else torch.zeros(1, 1, 4, 4).masked_fill(~sees, low)
    left, real = torch.tensor([[1, 0, 3]]), torch.tensor([[False, True, True]])
    for rows, want in (
        (left, [[0, 1, 0], [0, 1, 0], [0, 1, 1]]),
        (None, [[0, 1, 0], [0, 1, 0], [0, 1, 0], [0, 1, 1]]),
    ):
        got = cut_mask(mask, rows, left, real)
        assert got.dtype == kind
        assert stage3_decode.visible(got)[0, 0].int().tolist() == want
    flat = cut_mask(torch.tensor([[1, 1, 1, 0]]), None, left, real)
    assert flat.tolist() == [[False, True, False]]


def test_seen_by_reads_each_kind_of_mask():
    query = torch.tensor([[1, 3]])
    causal = [[True, True, False, False], [True] * 4]
    padding = torch.tensor([[False, True, True, True]])
    finished = torch.ones(1, 1, 4, 4).tril().bool()
    assert seen_by(query, None, True, 4).tolist() == [causal]
    assert seen_by(query, None, False, 4).tolist() == [[[True] * 4] * 2]
    assert seen_by(query, finished, False, 4).tolist() == [causal]
    assert seen_by(query, padding, True, 4).tolist() == [
        [[False, True, False, False], [False, True, True, True]]
    ]


def test_the_shortest_window_is_that_of_some_layer():
    def window(**options):
        return shortest_window(transformers.PreTrainedConfig(**options))

    assert window() == math.inf
    assert window(sliding_window=7) == 7  # no list of layers: all have it
    assert window(sliding_window=7, layer_types=["full_attention"]) == math.inf
    assert window(sliding_window=7, layer_types=["full_attention", "sliding_attention"]) == 7
    assert window(attention_chunk_size=5, layer_types=["chunked_attention"]) == 5
    assert window(attention_chunk_size=5, layer_types=["full_attention"]) == math.inf
    assert window(keep_window_size=6) == 6  # Doge: beyond it, the best keys, among fillers too
    assert window(floor_scale=9) == 9  # Llama 4: beyond it, scores depend on places in the cut


def test_average_tokens_gives_the_papers_rows():
    for counts, want in {(390, 172, 78): 241.75, (396, 170, 76): 242, (525, 252, 122): 312}.items():
        assert average_tokens(576, counts, [4, 12, 20], 32) == want
    assert average_tokens(576, [288], [1], 32) == 297
    assert average_tokens(576, (226, 80, 36), [4, 12, 20], 32) == 162  # the paper's table says 126
    counts = [torch.tensor([4, 4]), torch.tensor([2, 1])]
    per_sample = average_tokens(torch.tensor([8, 4]), counts, [2, 4], 8)
    assert per_sample.tolist() == [(16 + 8 + 8) / 8, (8 + 8 + 4) / 8]


def test_solve_lambda_finds_the_target_a_jump_or_says_the_range():
    calls = []

    def measure(lam):
        calls.append(lam)
        return min(100.0, max(1.0, 2 * lam))

    for target in (1.0, 1.3, 17.0, 60.0, 99.9, 100.0):
        calls.clear()
        lam = solve_lambda(target, measure, tolerance=0.01)
        assert len(calls) <= 42 and abs(measure(lam) - target) <= 0.01
    assert solve_lambda(50.0, measure) == pytest.approx(25, abs=0.25)  # 0.5 tokens off will do

    def step(lam):
        return 10.0 if lam < 7 else 20.0

    assert solve_lambda(14.0, step) == pytest.approx(7)
    for target in (0.5, 101.0, math.nan):
        with pytest.raises(ValueError, match="target_average must be 1.00 to 100.00 here"):
            solve_lambda(target, measure)


def test_solve_lambda_reaches_a_wanted_average_on_a_model():
    embeds, attention_mask, visual_mask = ragged()

    def measure(lam):
        with prune(tiny(), visual_mask, lam) as pruner:
            forward(tiny(), embeds, attention_mask)
        return float(pruner.average_tokens().mean())

    assert abs(measure(solve_lambda(8.0, measure, tolerance=0.3)) - 8.0) <= 0.3


def test_a_cache_is_found_whatever_it_is_called():
    cache = DynamicCache()
    assert find_cache(dict(a=None, b=3, c=torch.ones(2), any_name=cache)) is cache
    assert find_cache(dict(a=None, b=(1, 2))) is None


# -------------------------------------------------------------------- the whole, against the oracle


def uncut(model, pruner, embeds, attention_mask, visual_mask, lam=LAM, **options):
    """What the oracle says of every sample, one at a time, for the pruner's layers and k."""
    every = []
    for b, (one, _, visual) in enumerate(singles(embeds, attention_mask, visual_mask)):
        own = {key: of(b, visual[0]) for key, of in options.items()}
        every.append(dense(model, one[0], visual[0], pruner.layers, lam, pruner.k, **own))
    return every


def check(pruner, logits, attention_mask, every):
    """Kept sets, counts and logits of every sample against the oracle's."""
    for b, want in enumerate(every):
        real = attention_mask[b].bool()
        kept = {
            i: set(mask[b, real].nonzero().flatten().tolist()) for i, mask in pruner.kept.items()
        }
        assert kept == want.kept, f"sample {b}"
        counts = {i: int(K[b]) for i, K in pruner.counts.items()}
        assert counts == {i: len(places) for i, places in want.kept.items()}
        off = gap(logits[b, real][want.alive], want.logits[want.alive])
        assert off < 1e-9, f"sample {b}: logits differ by {off}"


def check_against_the_oracle(model, pruner, logits, embeds, attention_mask, visual_mask, **options):
    every = uncut(model, pruner, embeds, attention_mask, visual_mask, **options)
    check(pruner, logits, attention_mask, every)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_ragged_batch_equals_the_library_uncut_on_sdpa_and_eager(family):
    model = build(family).double()
    embeds, attention_mask, visual_mask = prompts = ragged(torch.float64)
    every = None
    for impl in ("sdpa", "eager"):
        if family == "Gemma2" and impl == "sdpa":
            continue  # the library gives it no sdpa, which cannot cap scores
        model.set_attn_implementation(impl)
        with prune(model, visual_mask) as pruner:
            logits = forward(model, embeds, attention_mask)
        assert list(pruner.kept) == LAYERS  # the default: L/8, 3L/8, 5L/8
        counts = [tuple(K.tolist()) for K in pruner.counts.values()]
        assert len(set(counts)) > 1, "no later layer drops more: a weak test"
        every = every or uncut(model, pruner, *prompts)
        check(pruner, logits, attention_mask, every)
        gone = visual_mask & ~pruner.kept[LAYERS[-1]]
        if model.get_output_embeddings().bias is None:
            assert not logits[gone].any()  # hidden states of dropped tokens are zeros
        assert gap(logits[:, -1], forward(model, embeds, attention_mask)[:, -1]) > 1e-3


@pytest.mark.parametrize("impl", ["sdpa", "eager", "flash_test"])
def test_a_batch_without_padding_or_mask_equals_the_library_uncut(impl):
    """Only what each prompt keeps makes it ragged."""
    model = on(impl)
    embeds, _, _ = ragged(torch.float64)
    visual_mask = ((torch.arange(24) > 1) & (torch.arange(24) < 18)).expand(3, 24)
    with prune(model, visual_mask, 4.0) as pruner:
        logits = forward(model, embeds)
    assert all(len(set(K.tolist())) > 1 for K in pruner.counts.values()), "a weak test"
    mask = torch.ones(3, 24).long()
    check_against_the_oracle(model, pruner, logits, embeds, mask, visual_mask, lam=4.0)


@pytest.mark.parametrize("k", [1, 3, 8, None])
@pytest.mark.parametrize("lam", [0.0, 1.5, 6.0])
def test_other_k_lambda_and_layers_equal_the_library_uncut(k, lam):
    model = tiny("Llama", torch.float64)
    prompt = [x[1:2] for x in ragged(torch.float64, seed=1)]
    with prune(model, prompt[2], lam, layers=[2, 3, 7], k=k) as pruner:
        logits = forward(model, prompt[0])
    check_against_the_oracle(model, pruner, logits, *prompt, lam=lam)


def test_hidden_states_come_back_at_full_length_with_zeros_where_a_token_is_gone():
    model = tiny("Llama", torch.float64)
    embeds, attention_mask, visual_mask = ragged(torch.float64)
    with prune(model, visual_mask) as pruner, torch.no_grad():
        out = model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=positions(attention_mask),
            output_hidden_states=True,
        )
    assert len(out.hidden_states) == L + 1
    for b, (one, _, visual) in enumerate(singles(embeds, attention_mask, visual_mask)):
        want = dense(model, one[0], visual[0], LAYERS, LAM)
        real = attention_mask[b].bool()
        for i, (state, expected) in enumerate(zip(out.hidden_states, want.hidden_states)):
            state = state[b, real]
            there = ~visual[0]
            ran = [layer for layer in LAYERS if layer < i]  # state i is the output of layer i - 1
            there |= pruner.kept[ran[-1]][b, real] if ran else visual[0]
            assert state.shape == expected.shape and gap(state[there], expected[there]) < 1e-9
            assert not state[~there].any()


def both_ways(visual, everything):
    """(S, S) bool, who sees whom: the past, and its own picture (Gemma 3) or all (PaliGemma)."""
    S = len(visual)
    blocks = (~visual).cumsum(0)  # equal numbers: visual tokens side by side
    same_picture = (blocks[:, None] == blocks) & visual & visual[:, None]
    return torch.ones(S, S).bool() if everything else torch.ones(S, S).tril().bool() | same_picture


def finished(sees, model):
    """(B, S, S) bool -> what such a model's masks look like: bools on sdpa, else floats."""
    mask = sees[:, None]
    if model.config._attn_implementation == "sdpa":
        return mask
    low = torch.finfo(model.dtype).min
    return torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, low)


@pytest.mark.parametrize("impl", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["Gemma", "Gemma3"])
def test_masks_that_see_both_ways_equal_the_library_uncut(family, impl):
    """A prompt that sees all of itself (Gemma, in PaliGemma), or pictures that see themselves."""
    everything = family == "Gemma"
    bidirectional = dict(use_bidirectional_attention=True) if everything else {}
    model = build(family, attn_implementation=impl, **bidirectional).double()
    embeds, attention_mask, visual_mask = ragged(torch.float64)
    see = torch.stack([both_ways(row, everything) for row in visual_mask])
    mask = finished(see & attention_mask.bool()[:, None], model)
    if family == "Gemma3":
        mask = dict(full_attention=mask, sliding_attention=mask)
    call = dict(inputs_embeds=embeds, attention_mask=mask, position_ids=positions(attention_mask))
    with Softmax64(), prune(model, visual_mask) as pruner, torch.no_grad():
        logits = model(**call).logits

    def of_sample(b, visual):
        return both_ways(visual, everything)

    prompt = embeds, attention_mask, visual_mask
    check_against_the_oracle(model, pruner, logits, *prompt, see=of_sample)
    causal = dense(model, embeds[1], visual_mask[1], LAYERS, LAM).logits[-1]
    assert gap(causal, logits[1, -1]) > 1e-3, "the mask changes nothing: a weak test"
    with Softmax64(), torch.no_grad():
        with prune(model, visual_mask, math.inf):
            everything_kept = model(**call).logits
        plain = model(**call).logits
    real = attention_mask.bool()
    assert torch.equal(everything_kept[real], plain[real])


THREE_PARTS = dict(rope_type="default", rope_theta=100.0, mrope_section=[2, 1, 1])
QWEN_VL = {"Qwen2_5_VL": {}, "Qwen3VL": dict(head_dim=8)}


def qwen_vl(family):
    config = getattr(transformers, family + "TextConfig")(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=96,
        num_hidden_layers=L,
        num_attention_heads=H,
        num_key_value_heads=4,
        initializer_range=0.25,
        rope_parameters=THREE_PARTS,
        **QWEN_VL[family],
    )
    torch.manual_seed(0)
    return getattr(transformers, family + "TextModel")(config).eval().double()


def three_part_positions(visual):
    """(3, S): a text token has one number, a visual token its time, row and column in rows of 4."""
    at, found, b = 0, [], 0
    while b < len(visual):
        n = 0
        while b + n < len(visual) and visual[b + n]:
            n += 1
        found += [(at, at + i // 4, at + i % 4) for i in range(n)] or [(at, at, at)]
        at += max(-(-n // 4), min(n, 4)) or 1
        b += n or 1
    return torch.tensor(found).T


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("family", QWEN_VL)
def test_three_part_positions_with_jumps_equal_the_library_uncut(family, padded):
    decoder = qwen_vl(family)
    embeds, attention_mask, visual_mask = ragged(torch.float64)
    if not padded:  # without a mask jumps could be taken for packing
        embeds, attention_mask, visual_mask = (
            x[1:2] for x in (embeds, attention_mask, visual_mask)
        )
    where = torch.zeros(3, *visual_mask.shape, dtype=torch.long)
    real = attention_mask.bool()
    for b in range(len(embeds)):
        where[:, b, real[b]] = three_part_positions(visual_mask[b, real[b]].tolist())
    mask = attention_mask if padded else None
    with prune(decoder, visual_mask) as pruner, torch.no_grad():
        out = decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=where)

    def of_sample(b, visual):
        return where[:, b : b + 1, real[b]]

    prompt = embeds, attention_mask, visual_mask
    check_against_the_oracle(decoder, pruner, out.last_hidden_state, *prompt, positions=of_sample)


# ------------------------------------------------------------------------------- keeping everything

SAMPLING = [
    dict(),
    dict(do_sample=True),
    dict(num_beams=3),
    dict(do_sample=True, num_return_sequences=2),
    dict(use_cache=False),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_lambda_infinity_is_the_unpruned_model_bit_for_bit(family):
    model = tiny(family)
    embeds, attention_mask, visual_mask = ragged()
    real = attention_mask.bool()
    with prune(model, visual_mask, math.inf) as pruner:
        logits = forward(model, embeds, attention_mask)
        ids = generate(model, embeds, attention_mask, max_new_tokens=3)
    assert torch.equal(logits[real], forward(model, embeds, attention_mask)[real])
    assert torch.equal(ids, generate(model, embeds, attention_mask, max_new_tokens=3))
    assert all(torch.equal(kept, visual_mask) for kept in pruner.kept.values())
    with prune(model, visual_mask, math.inf):
        logits = forward(model, embeds)
    assert torch.equal(logits, forward(model, embeds))  # without a mask everywhere


@pytest.mark.parametrize("options", SAMPLING, ids=str)
def test_lambda_infinity_generates_as_the_unpruned_model(options):
    embeds, attention_mask, visual_mask = ragged()
    with prune(tiny(), visual_mask, math.inf):
        ids = generate(tiny(), embeds, attention_mask, **options)
    assert torch.equal(ids, generate(tiny(), embeds, attention_mask, **options))


# -------------------------------------------------------------- generate: batches, caches, sampling


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ragged_batch_equals_its_prompts_one_by_one(family):
    model, prompts = tiny(family), ragged()
    before = [x.clone() for x in prompts]
    with prune(model, prompts[2]) as pruner:
        ids = generate(model, *prompts[:2], max_new_tokens=3)
    assert all(torch.equal(a, b) for a, b in zip(before, prompts)), "inputs are changed"
    assert not torch.equal(ids, generate(model, *prompts[:2], max_new_tokens=3)), "a weak test"
    for b, (embeds, attention_mask, visual_mask) in enumerate(singles(*prompts)):
        with prune(model, visual_mask) as single:
            alone = generate(model, embeds, attention_mask, max_new_tokens=3)
        assert ids[b].tolist() == alone[0].tolist(), f"sample {b}"
        assert kept_sets(pruner, b, int((prompts[1][b] == 0).sum())) == kept_sets(single, 0)
        assert pruner.average_tokens()[b] == single.average_tokens()[0]


def test_beams_of_a_ragged_batch_equal_those_of_its_prompts_one_by_one():
    prompts = ragged()
    with prune(tiny(), prompts[2]) as pruner:
        ids = generate(tiny(), *prompts[:2], num_beams=3)
    assert pruner.kept[5].shape == prompts[2].shape  # one row for each sample, not for each beam
    for b, (embeds, attention_mask, visual_mask) in enumerate(singles(*prompts)):
        with prune(tiny(), visual_mask) as single:
            alone = generate(tiny(), embeds, attention_mask, num_beams=3)
        assert ids[b].tolist() == alone[0].tolist()
        assert kept_sets(pruner, b, int((prompts[1][b] == 0).sum())) == kept_sets(single, 0)


@pytest.mark.parametrize("options", SAMPLING[:4], ids=str)
def test_cached_generation_equals_recomputing_everything(options):
    """Without a cache every step reads prompt and answer: the answer must not steer it."""
    _, attention_mask, visual_mask = ragged()
    ids = torch.randint(3, VOCAB, (3, 24), generator=torch.Generator().manual_seed(1))
    lengths, runs = [], []

    def note(layer, args, kwargs):
        lengths.append(args[0].shape[1])

    def answer(use_cache=True, ids=ids):
        torch.manual_seed(0)
        call = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        call |= dict(attention_mask=attention_mask, use_cache=use_cache)
        return tiny().generate(ids, **call | options)

    handle = tiny().model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    for use_cache in (True, False):
        with prune(tiny(), visual_mask) as pruner:
            runs.append((answer(use_cache), pruner.kept))
    handle.remove()
    assert lengths == [24, 1, 1, 1, 1, 1, 24, 25, 26, 27, 28, 29]
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(runs[0][1][i], runs[1][1][i]) for i in LAYERS)
    with prune(tiny(), visual_mask):  # two prompts in one block, each with its own selection
        answer(ids=ids.flip(1))
        assert torch.equal(answer(), runs[0][0])


@pytest.mark.parametrize("family", ["Llama", "Gemma3", "Exaone4"])
def test_later_caches_are_shorter_by_what_was_dropped(family):
    model = tiny(family)
    embeds, attention_mask, visual_mask = ragged()
    with prune(model, visual_mask) as pruner:
        out = generate(model, embeds, attention_mask, return_dict_in_generate=True)
    text = (attention_mask - visual_mask.long()).sum(dim=1)
    left = {i: int((text + K).max()) for i, K in pruner.counts.items()}  # the longest sample's
    S = embeds.shape[1]
    assert left[5] < left[1] < S
    want = [S, left[1], left[1], left[3], left[3], left[5], left[5], left[5]]
    for layer, n in zip(find_cache(out).layers, want):
        assert layer.keys.shape[2] == layer.values.shape[2] == n + 5  # the last is not cached


def one_more_turn(seed=5):
    """The ragged prompts and six tokens more, of which sample 0 says but four."""
    embeds, attention_mask, visual_mask = ragged(torch.float64)
    S = embeds.shape[1]
    more = torch.randn(3, 6, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mask = F.pad(attention_mask, (0, 6), value=1)
    mask[0, S + 1 : S + 3] = 0
    return S, torch.cat([embeds, more], dim=1), mask, visual_mask


@pytest.mark.parametrize("family", ["Llama", "Gemma3", "SmolLM3"])
def test_several_tokens_after_the_prompt_equal_one_forward_over_all(family):
    """A ragged second turn: pieces of 1, 3 and 2 tokens."""
    model = tiny(family, torch.float64)
    S, whole, mask, visual_mask = one_more_turn()
    pad = functools.partial(F.pad, pad=(0, 6))
    asks = pad(prune(model, visual_mask).query_mask)
    with prune(model, pad(visual_mask), query_mask=asks) as once:
        want = forward(model, whole, mask)
    pieces, cache = [], DynamicCache(config=model.config)
    with prune(model, visual_mask) as pruner:
        for start, end in ((0, S), (S, S + 1), (S + 1, S + 4), (S + 4, S + 6)):
            pieces.append(forward(model, whole[:, start:end], mask[:, :end], **{CACHE: cache}))
    assert all(torch.equal(pad(pruner.kept[i]), once.kept[i]) for i in LAYERS)
    real = mask.bool() & (torch.arange(S + 6) >= S)
    assert gap(torch.cat(pieces, dim=1)[real], want[real]) < 1e-9


@pytest.mark.parametrize("impl", ["sdpa", "eager"])
def test_a_second_turn_after_masks_that_see_both_ways_equals_one_forward_over_all(impl):
    """The prompt sees all of itself, the turn sees the prompt and its own past."""
    model = build("Gemma", attn_implementation=impl, use_bidirectional_attention=True).double()
    S, whole, mask, visual_mask = one_more_turn()
    T = whole.shape[1]
    sees = torch.ones(T, T).tril().bool()
    sees[:S, :S] = True
    sees = sees & mask.bool()[:, None]  # (B, T, T)
    where = positions(mask)

    def run(start, end, **options):
        with torch.no_grad():
            return model(
                inputs_embeds=whole[:, start:end],
                attention_mask=finished(sees[:, start:end, :end], model),
                position_ids=where[:, start:end],
                **options,
            ).logits

    pad = functools.partial(F.pad, pad=(0, 6))
    asks = pad(prune(model, visual_mask).query_mask)
    with Softmax64(), prune(model, pad(visual_mask), query_mask=asks):
        want = run(0, T)
    cache = DynamicCache(config=model.config)
    with Softmax64(), prune(model, visual_mask):
        run(0, S, **{CACHE: cache})
        pieces = [run(S, S + 4, **{CACHE: cache}), run(S + 4, T, **{CACHE: cache})]
    real = mask[:, S:].bool()
    assert gap(torch.cat(pieces, dim=1)[real], want[:, S:][real]) < 1e-9


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
@torch.no_grad()
def test_a_second_turn_of_text_on_a_whole_model_that_sees_both_ways(name):
    """Equals the unpruned model where all is kept; else each prompt alone."""
    model, tokens, pixels, _ = vlm(name)
    model = model.double()
    picture = [3] * tokens[0]
    rows = [[1, 5, *picture, 7, 8, 9, 10], [1, *picture, 40, 44]]
    S = max(map(len, rows))
    ids = torch.tensor([[0] * (S - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (S - len(row)) + [1] * len(row) for row in rows])
    turn = torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24]])
    inputs = {k: v.double() if "pixel" in k else v for k, v in pixels([1, 1], 0, ids).items()}

    def two_turns(rows, start):
        one = {key: x[rows, start:] if "type" in key else x[rows] for key, x in inputs.items()}
        out = model(input_ids=ids[rows, start:], attention_mask=mask[rows, start:], **one)
        longer = F.pad(mask[rows, start:], (0, 4), value=1)
        return model(
            input_ids=turn[rows],
            attention_mask=longer,
            token_type_ids=torch.zeros_like(turn[rows]),
            **{CACHE: find_cache(out)},
        ).logits

    both, visual_mask = slice(None), ids == 3
    plain = two_turns(both, 0)
    with prune(model, visual_mask, math.inf):
        assert torch.equal(two_turns(both, 0), plain)
    with prune(model, visual_mask, 2.0):
        batch = two_turns(both, 0)
    assert gap(batch, plain) > 1e-4, "nothing changes: a weak test"
    for b in range(2):
        start = S - len(rows[b])
        with prune(model, visual_mask[b : b + 1, start:], 2.0):
            alone = two_turns(slice(b, b + 1), start)
        assert gap(alone[0], batch[b]) < 1e-6


def test_input_ids_and_a_bare_decoder():
    ids = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    visual_mask = ((torch.arange(20) > 0) & (torch.arange(20) < 14)).expand(2, 20)
    model = tiny()
    with torch.no_grad():
        with prune(model, visual_mask):
            by_embeds = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
        with prune(model.model, visual_mask):  # the bare LlamaModel
            states = model.model(ids).last_hidden_state
    assert torch.equal(model.lm_head(states), by_embeds)


class KeepFirst(TokenPruner):
    """A rule of one's own: the first visual token that is left."""

    def choose(self, layer, attention, visual):
        self.seen = getattr(self, "seen", []) + [(layer, attention, visual)]
        return visual & (visual.cumsum(dim=1) == 1)


def test_a_rule_of_ones_own_is_one_method_that_gets_what_the_text_attends_to():
    prompts = embeds, attention_mask, visual_mask = ragged()
    with KeepFirst(tiny(), visual_mask, layers=[2, 5]) as pruner:
        ids = generate(tiny(), embeds, attention_mask)
    first = visual_mask & (visual_mask.cumsum(dim=1) == 1)
    assert torch.equal(pruner.kept[2], first) and torch.equal(pruner.kept[5], first)
    (i, attention, visual), (j, later, left) = pruner.seen
    assert (i, j) == (2, 5) and visual.sum() == visual_mask.sum() and left.sum() == 3
    assert attention.shape == (3, H, embeds.shape[1]) and attention.dtype == torch.float32
    for a, there in ((attention, visual), (later, left)):
        a = a.transpose(1, 2)
        assert not a[~there].any() and (a[there] > 0).all()
    for b, one in enumerate(singles(*prompts)):
        with KeepFirst(tiny(), one[2], layers=[2, 5]):
            assert generate(tiny(), *one[:2])[0].tolist() == ids[b].tolist()


def test_what_a_rule_chooses_beyond_the_visual_tokens_is_ignored():
    class KeepAll(TokenPruner):
        def choose(self, layer, attention, visual):
            return torch.ones_like(visual)

    embeds, attention_mask, visual_mask = ragged()
    with KeepAll(tiny(), visual_mask) as pruner:
        logits = forward(tiny(), embeds, attention_mask)
    real = attention_mask.bool()
    assert torch.equal(pruner.kept[5], visual_mask)
    assert torch.equal(logits[real], forward(tiny(), embeds, attention_mask)[real])


def test_a_sample_without_visual_tokens_is_left_alone():
    embeds, attention_mask, visual_mask = ragged(torch.float64)
    model = tiny("Llama", torch.float64)
    blind = visual_mask & (torch.arange(3) > 0)[:, None]  # the first sample is text alone
    plain = forward(model, embeds, attention_mask)
    with prune(model, blind, 1.0) as pruner:
        pruned = forward(model, embeds, attention_mask)
    real = attention_mask[0].bool()
    assert gap(pruned[0, real], plain[0, real]) < 1e-9
    assert gap(pruned[1, -1], plain[1, -1]) > 1e-3 and pruner.average_tokens()[0] == 0
    assert all(K[0] == 0 and (K[1:] > 0).all() for K in pruner.counts.values())


def test_padding_on_the_right_gives_the_same_states():
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
    assert gap(right, turned[3]) < 1e-9


def test_half_precision_keeps_all_or_prunes_as_asked():
    model = build().bfloat16()
    embeds, attention_mask, visual_mask = ragged(torch.bfloat16)
    with prune(model, visual_mask, math.inf):
        ids = generate(model, embeds, attention_mask)
    assert torch.equal(ids, generate(model, embeds, attention_mask))
    with prune(model, visual_mask) as pruner:
        logits = forward(model, embeds, attention_mask)
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    assert pruner.vav[1].dtype == torch.float32
    assert pruner.counts[5].sum() < visual_mask.sum()


# ----------------------------------------------------------------------------------------- training


def training():
    """The ragged prompts as training data: two last tokens answer, the one before them asks."""
    embeds, attention_mask, visual_mask = ragged(torch.float64)
    query_mask = torch.zeros_like(visual_mask)
    query_mask[:, -3] = True
    labels = torch.full(visual_mask.shape, -100)
    labels[:, -2:] = torch.tensor([[5, 6], [7, 8], [9, 10]])
    inputs = dict(
        inputs_embeds=embeds.requires_grad_(),
        attention_mask=attention_mask,
        labels=labels,
        use_cache=False,
    )
    return inputs, visual_mask, query_mask


def test_training_lines_up_with_its_labels_and_gradients_reach_kept_tokens_and_no_others():
    model, (inputs, visual_mask, query_mask), caught = build().double(), training(), {}

    def catch(i, module, args, output):
        output.retain_grad()
        caught[i] = output

    handles = [
        model.model.layers[i - 1].register_forward_hook(functools.partial(catch, i))
        for i in LAYERS  # what layer i prunes
    ]
    with prune(model, visual_mask, 1.5, query_mask=query_mask) as pruner:
        out = model(**inputs)
    out.loss.backward()
    for handle in handles:
        handle.remove()
    answers = out.logits.detach()[:, -3:-1].reshape(-1, VOCAB)
    want = F.cross_entropy(answers, inputs["labels"][:, -2:].reshape(-1))
    assert float(out.loss.detach()) == pytest.approx(float(want), abs=1e-5)  # theirs is float32
    grad = caught[1].grad.abs().sum(dim=2)  # layer 1 has the prompt's numbering
    gone = visual_mask & ~pruner.kept[1]
    assert gone.any(dim=1).all()
    assert not grad[gone].any() and (grad[pruner.kept[1]] > 0).all()
    assert all((caught[i].grad.abs().sum(dim=2) > 0).any(dim=1).all() for i in LAYERS)
    for name, parameter in model.named_parameters():
        assert "embed_tokens" in name or parameter.grad.isfinite().all()


@pytest.mark.skipif(VERSION < (5, 23), reason="older checkpointing replays a layer's hooks too")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("backward", ["inside the block", "after it"])
def test_gradient_checkpointing_changes_nothing(backward):
    grads = []
    for checkpointing in (False, True):
        model, (inputs, visual_mask, query_mask) = build().double().train(), training()
        if checkpointing:
            model.gradient_checkpointing_enable(dict(use_reentrant=False))
        with prune(model, visual_mask, 1.5, query_mask=query_mask):
            loss = model(**inputs).loss
            if backward == "inside the block":
                loss.backward()
        if backward == "after it":
            loss.backward()
        grads.append(inputs["inputs_embeds"].grad)
    assert grads[0].any() and gap(*grads) < 1e-12


def test_answers_left_out_of_query_mask_do_not_steer():
    embeds, attention_mask, visual_mask = ragged(torch.float64)
    model = tiny("Llama", torch.float64)
    with prune(model, visual_mask) as prompt:
        forward(model, embeds, attention_mask)
    answer = torch.randn(3, 4, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    whole, mask = torch.cat([embeds, answer], dim=1), F.pad(attention_mask, (0, 4), value=1)
    pad = functools.partial(F.pad, pad=(0, 4))
    with prune(model, pad(visual_mask), query_mask=pad(prompt.query_mask)) as masked:
        forward(model, whole, mask)
    with prune(model, pad(visual_mask)) as unmasked:
        forward(model, whole, mask)
    assert all(torch.equal(masked.kept[i], pad(prompt.kept[i])) for i in LAYERS)
    assert any(not torch.equal(unmasked.kept[i], masked.kept[i]) for i in LAYERS)


# -------------------------------------------------------------------- models as people load them


def prune_logits(model, layers=None):
    """Kept tokens from the last pruned layer on, and the logits, of a ragged batch."""
    embeds, attention_mask, visual_mask = ragged()
    with prune(model, visual_mask, layers=layers) as pruner:
        logits = forward(model, embeds, attention_mask)
    return pruner.kept[pruner.layers[-1]], logits


def test_lora_of_peft_keeps_the_same_tokens_as_the_merged_one():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers for an attribute that is renamed
        adapted = peft.get_peft_model(copy.deepcopy(tiny()), config).eval()
    kept, logits = prune_logits(adapted.base_model.model)
    merged_kept, merged_logits = prune_logits(adapted.merge_and_unload())
    assert torch.equal(kept, merged_kept) and gap(logits, merged_logits) < 1e-4
    assert not torch.equal(kept, prune_logits(tiny())[0])


def test_weights_that_accelerate_brings_in_for_each_layer():
    accelerate = pytest.importorskip("accelerate")
    model = copy.deepcopy(tiny())
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    for got, want in zip(prune_logits(model), prune_logits(tiny())):
        assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore")
def test_int8_layers_are_heard():
    linear = {torch.nn.Linear}
    model = torch.ao.quantization.quantize_dynamic(tiny(), linear, dtype=torch.qint8)
    embeds, _, visual_mask = next(singles(*ragged()))
    with prune(model, visual_mask, layers=[5]) as pruner:  # an int8 scale is that of all tokens
        forward(model, embeds)
    asks = pruner.query_mask[0]
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(inputs_embeds=embeds, output_attentions=True).attentions[4]
    model.set_attn_implementation(implementation)
    attention = weights[:, :, asks].mean(dim=2).masked_fill(~visual_mask[:, None], 0)
    vav = attention.sum(dim=-1)
    count = adaptive_count(vav, LAM, pruner.k, visual_mask.sum(dim=1))
    want = select(text_relevance(attention, pruner.k), count, visual_mask)
    assert torch.equal(pruner.kept[5], want) and want.sum() < visual_mask.sum()


# ---------------------------------------------------------------------------------- mixed precision


def test_under_autocast_lambda_infinity_is_the_plain_model_and_pruning_works():
    embeds, attention_mask, visual_mask = ragged()
    with torch.autocast("cpu", torch.bfloat16):
        plain = forward(tiny(), embeds, attention_mask)
        with prune(tiny(), visual_mask, math.inf):
            everything = forward(tiny(), embeds, attention_mask)
        with prune(tiny(), visual_mask) as pruner:
            pruned = forward(tiny(), embeds, attention_mask)
    real = attention_mask.bool()
    assert torch.equal(everything[real], plain[real])
    assert gap(pruned[:, -1].float(), plain[:, -1].float()) > 1e-2
    assert pruner.vav[1].dtype == torch.float32 and pruner.counts[5].sum() < visual_mask.sum()


def test_the_attention_is_computed_in_float32_under_autocast():
    """In bfloat16 the sums of a head would be off by about 0.4 %."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 4, n, 8, generator=generator) for n in (6, 40))
    call = q, k, 1.0, torch.ones(1, 6, 40).bool(), torch.ones(1, 6).bool()
    want = visual_attention(*call)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(visual_attention(*call), want)


def test_a_training_step_under_autocast_moves_every_weight():
    """As Trainer(bf16=True) does: autocast around the forward, backward outside of both."""
    model, (inputs, visual_mask, query_mask) = build().train(), training()
    inputs["inputs_embeds"] = inputs["inputs_embeds"].detach().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        with prune(model, visual_mask, 1.5, query_mask=query_mask):
            loss = model(**inputs).loss
    loss.backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        moved = gap(parameter.detach(), before[name]) > 0
        assert moved == ("embed_tokens" not in name), name  # the prompt came as embeddings


# ---------------------------------------------------------------------------------- flash attention


def flash_by_hand(
    module, query, key, value, attention_mask, scaling=None, softcap=None, is_causal=None, **kwargs
):
    """What a flash kernel computes, on a CPU: no padding, and the last query sees the last key.

    attention_mask (B, keys) or None: False on padding. It returns (B, N, H, d), None.
    """
    B, heads, Q, _ = query.shape
    places = kwargs.get("position_ids")
    if attention_mask is None and places is not None and B == 1:
        assert places.shape[-1] == Q and (places.diff() == 1).all(), "read as packed prompts"
    keys = key.shape[2]
    mask = torch.ones(B, keys) if attention_mask is None else attention_mask
    assert mask.shape == (B, keys), "a kernel takes (B, keys)"
    out = torch.zeros(B, Q, heads, value.shape[-1], dtype=query.dtype)
    for b, real in enumerate(mask.bool()):
        rows = real[-Q:]
        q, n, m = query[b, :, rows], int(rows.sum()), int(real.sum())
        k, v = (x[b, :, real].repeat_interleave(heads // x.shape[1], dim=0) for x in (key, value))
        scores = scaling * q @ k.mT  # (H, n, m)
        sees = torch.ones(n, m).tril(m - n).bool()
        out[b, rows] = (scores.masked_fill(~sees, -torch.inf).softmax(-1) @ v).transpose(0, 1)
    return out, None


AttentionInterface.register("flash_test", flash_by_hand)
AttentionMaskInterface.register("flash_test", flash_attention_mask)


def on(implementation, family="Llama"):
    """Set afterwards: a model built on flash attention looks for its kernels at once."""
    model = build(family).double()
    model.config._attn_implementation = implementation
    return model


@pytest.mark.parametrize("padded", [True, False], ids=["ragged", "unpadded"])
@pytest.mark.parametrize("family", ["Llama", "Gemma3", "Phi3"])
def test_flash_attention_gives_what_sdpa_gives(family, padded):
    embeds, attention_mask, visual_mask = ragged(torch.float64)
    if not padded:
        attention_mask = torch.ones_like(attention_mask)
    runs = []
    for impl in ("sdpa", "flash_test"):
        model = on(impl, family)
        with prune(model, visual_mask) as pruner:
            logits = forward(model, embeds, attention_mask)
            ids = generate(model, embeds, attention_mask)
        runs.append((logits, pruner.kept, ids))
    (a, kept, words), (b, other_kept, other_words) = runs
    assert all(torch.equal(kept[i], other_kept[i]) for i in LAYERS)
    alive = attention_mask.bool() & (~visual_mask | kept[5])
    assert gap(a[alive], b[alive]) < 1e-9 and torch.equal(words, other_words)


def test_flash_attention_of_one_unpadded_prompt_gives_what_sdpa_gives():
    """Without a mask, positions with gaps would be read as packed prompts."""
    embeds, _, visual_mask = (x[1:2] for x in ragged(torch.float64))
    runs = []
    for impl in ("sdpa", "flash_test"):
        model = on(impl)
        with prune(model, visual_mask) as pruner:
            runs.append(forward(model, embeds, position_ids=torch.arange(24)[None]))
    assert gap(*runs) < 1e-9 and pruner.counts[5] < visual_mask.sum()


# ------------------------------------------------------------------------------ what is left behind


def state(model):
    """All that hooks or attributes could change: every module's dictionary, hooks and mode."""

    def look(key, value):
        if "hooks" in key:
            return list(value)
        return value if key == "training" else id(value)

    modules = {
        name: {key: look(key, value) for key, value in vars(module).items()}
        for name, module in model.named_modules()
    }
    return modules, model.config.to_dict(), model.config._attn_implementation


def raise_in(module, error):
    """The module raises this error when it is called."""

    def hook(module, args):
        raise error

    return module.register_forward_pre_hook(hook)


@pytest.mark.parametrize(
    "error", [KeyError("mine"), torch.OutOfMemoryError("no memory left"), KeyboardInterrupt()]
)
@pytest.mark.parametrize("layer", [0, 1, 7])
def test_an_error_inside_a_layer_passes_through_and_nothing_stays(error, layer):
    """Also while its attention is listened to, as that of layer 0 is."""
    model = build()
    embeds, attention_mask, visual_mask = ragged()
    before, plain = state(model), forward(model, embeds, attention_mask)
    handle = raise_in(model.model.layers[layer].mlp, error)
    with pytest.raises(type(error)) as caught, prune(model, visual_mask):
        forward(model, embeds, attention_mask)
    handle.remove()
    assert caught.value is error
    assert state(model) == before and not stage3_decode.ACTIVE
    assert torch.equal(forward(model, embeds, attention_mask), plain)


def test_nothing_stays_on_the_model():
    model = build()
    embeds, attention_mask, visual_mask = ragged()
    before, plain = state(model), forward(model, embeds, attention_mask)
    with prune(model, visual_mask):
        assert state(model) != before
        generate(model, embeds, attention_mask)
    assert state(model) == before and not stage3_decode.ACTIVE
    with pytest.raises(KeyError, match="mine"), prune(model, visual_mask):
        generate(model, embeds, attention_mask)
        raise KeyError("mine")
    assert state(model) == before and not stage3_decode.ACTIVE
    assert torch.equal(forward(model, embeds, attention_mask), plain)


def test_one_pruner_serves_one_block_after_another():
    embeds, attention_mask, visual_mask = ragged()
    pruner, runs = prune(tiny(), visual_mask), []
    for _ in range(2):
        with pruner:
            runs.append(generate(tiny(), embeds, attention_mask))
    assert torch.equal(*runs)


def test_two_threads_that_prune_two_models_at_once_do_not_meet():
    prompts = ragged()
    models = [build("Llama"), build("Qwen3")]
    alone = []
    for model in models:
        with prune(model, prompts[2]) as pruner:
            alone.append((generate(model, *prompts[:2]), pruner.kept))
    found = [[], []]
    start = threading.Barrier(2)

    def work(i):
        start.wait()
        for _ in range(5):
            with prune(models[i], prompts[2]) as pruner:
                embeds, attention_mask, _ = prompts
                options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
                ids = models[i].generate(
                    inputs_embeds=embeds, attention_mask=attention_mask, **options
                )
            found[i].append((ids, pruner.kept))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (ids, kept), runs in zip(alone, found):
        assert len(runs) == 5  # no thread died
        for other, other_kept in runs:
            assert torch.equal(ids, other)
            assert all(torch.equal(kept[i], other_kept[i]) for i in LAYERS)


# -------------------------------------------------------------------- ways of calling that some use


def prompt_of_ids():
    """One prompt of 24 ids whose end repeats its beginning, so that prompt lookup finds a match."""
    ids = torch.randint(3, VOCAB, (1, 24), generator=torch.Generator().manual_seed(0))
    ids[0, 21:] = ids[0, :3]
    visual_mask = ((torch.arange(24) > 2) & (torch.arange(24) < 18))[None]
    return ids, visual_mask


GREEDY = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)


@pytest.mark.parametrize("lam", [math.inf, LAM])
@pytest.mark.parametrize("way", ["prompt lookup", "assistant_model"])
def test_assisted_decoding_gives_the_greedy_answer_or_is_named_in_a_sentence(way, lam):
    model, (ids, visual_mask) = build(), prompt_of_ids()
    if way == "prompt lookup":
        options = dict(prompt_lookup_num_tokens=3)
    else:
        options = dict(assistant_model=build(num_hidden_layers=2))
    ones = torch.ones_like(ids)
    with prune(model, visual_mask, lam):
        greedy = model.generate(ids, attention_mask=ones, **GREEDY)
    try:
        with prune(model, visual_mask, lam):
            answer = model.generate(ids, attention_mask=ones, **GREEDY, **options)
    except ValueError as error:
        assert "assisted decoding" in str(error)
    else:
        assert torch.equal(answer, greedy)


def refuses(message, call, model, visual_mask, error=ValueError, **options):
    """The block raises this sentence, and leaves no hook on the model."""
    before = model.config._attn_implementation
    with pytest.raises(error, match=message), prune(model, visual_mask, **options):
        call()
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert model.config._attn_implementation == before and not stage3_decode.ACTIVE


def test_ways_of_generating_that_are_not_served_are_named():
    model, (ids, visual_mask) = build(), prompt_of_ids()
    ones = torch.ones_like(ids)
    for options, name in (
        (dict(guidance_scale=1.5), "guidance_scale"),
        (dict(prefill_chunk_size=8), "chunked prefill"),
        (dict(cache_implementation="static"), "KV cache must be None, or a DynamicCache"),
    ):

        def call(options=options):
            model.generate(ids, attention_mask=ones, **GREEDY, **options)

        refuses(name, call, model, visual_mask)


@torch.no_grad()
def test_a_cache_that_outlives_its_block_is_refused_there_or_holds_everything():
    model, prompts = build(), ragged()
    embeds, attention_mask, visual_mask = prompts
    longer = F.pad(attention_mask, (0, 1), value=1)
    with prune(model, visual_mask):
        cache = find_cache(model(inputs_embeds=embeds, attention_mask=attention_mask))
        forward(model, embeds[:, :1], longer, **{CACHE: cache})
    with pytest.raises(ValueError, match="lacks the tokens that were pruned"):
        forward(model, embeds[:, :1], F.pad(longer, (0, 1), value=1), **{CACHE: cache})
    refuses(
        "the KV cache must be None, or a DynamicCache that is empty or was filled by the last",
        lambda: forward(model, embeds[:, :1], longer, **{CACHE: cache}),
        model,
        visual_mask,
    )
    plain = find_cache(model(inputs_embeds=embeds))
    with prune(model, visual_mask, math.inf):
        whole = find_cache(model(inputs_embeds=embeds))
    one, other = (forward(model, embeds[:, :1], None, **{CACHE: c}) for c in (plain, whole))
    assert torch.equal(one, other)


def test_two_pruners_on_one_decoder_are_refused_in_a_sentence():
    model, (embeds, attention_mask, visual_mask) = build(), ragged()

    def enter_again():
        with prune(model, visual_mask):
            forward(model, embeds, attention_mask)

    refuses("this decoder, .* is in another pruner's block", enter_again, model, visual_mask)


@torch.no_grad()
def test_a_cache_that_was_cut_back_in_some_layers_only_is_refused():
    """As older versions cut it back: to one length, which the short caches never reach."""
    model, (embeds, attention_mask, visual_mask) = build(), ragged()
    longer = F.pad(attention_mask, (0, 1), value=1)
    with prune(model, visual_mask, 2.0):
        cache = find_cache(model(inputs_embeds=embeds, attention_mask=attention_mask))
        forward(model, embeds[:, -1:], longer, **{CACHE: cache})
        for layer in cache.layers:
            if layer.keys.shape[2] > embeds.shape[1]:
                layer.keys, layer.values = layer.keys[:, :, :-1], layer.values[:, :, :-1]
        with pytest.raises(ValueError, match="must be cropped by as many tokens in every layer"):
            forward(model, embeds[:, -1:], longer, **{CACHE: cache})


@pytest.mark.parametrize("family", ["Gemma3", "Phi3", "Starcoder2", "Gemma2"])
def test_a_window_shorter_than_the_sequence_is_refused_and_a_longer_one_is_not(family):
    prompts = embeds, attention_mask, visual_mask = ragged()
    S = embeds.shape[1]
    model = build(family, sliding_window=S - 1)
    message = f"the sequence must fit the window of {S - 1}, but has {S}"
    refuses(message, lambda: forward(model, *prompts[:2]), model, visual_mask)
    model = build(family, sliding_window=S + 2)
    with prune(model, visual_mask):
        generate(model, embeds, attention_mask, max_new_tokens=3)  # the last is not read

    def too_long():
        generate(model, embeds, attention_mask, max_new_tokens=4)

    refuses(f"window of {S + 2}, but has {S + 3}", too_long, model, visual_mask)


# ----------------------------------------------------------------------------------------- refusals

ASCENDING = r"layers must be ascending numbers, 1 to 7 for this decoder, got "
BAD_ARGUMENTS = {
    "lam must be 0 to infinity, got -1": dict(lam=-1),
    "lam must be 0 to infinity, got nan": dict(lam=math.nan),
    "k must be 1 to 8, or None for all, got 0": dict(k=0),
    "k must be 1 to 8, or None for all, got 9": dict(k=9),
    "k must be 1 to 8, or None for all, got 2.5": dict(k=2.5),
    ASCENDING + r"\[\]": dict(layers=[]),
    ASCENDING + r"\[0, 3\]": dict(layers=[0, 3]),
    ASCENDING + r"\[3, 8\]": dict(layers=[3, 8]),
    ASCENDING + r"\[5, 3\]": dict(layers=[5, 3]),
    ASCENDING + r"\[3, 3\]": dict(layers=[3, 3]),
    "visual_mask must be a bool tensor of shape": dict(visual_mask=ragged()[2].long()),
    "visual_mask must be a bool tensor of shape .B": dict(visual_mask=ragged()[2][0]),
    "visual_mask must be a bool tensor of shape .B, S": dict(visual_mask=ragged()[2].tolist()),
    "query_mask must be a bool tensor of shape": dict(query_mask=ragged()[2].long()),
    "query_mask must be a bool tensor of shape .B": dict(query_mask=ragged()[2][:, 1:]),
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(message):
    with pytest.raises(ValueError, match=message):
        AdaptivePruner(
            **dict(model=tiny(), visual_mask=ragged()[2], lam=1.0) | BAD_ARGUMENTS[message]
        )


NOTHING_ASKS = "visual_mask must be followed by text, or query_mask mark some, in every sample"
CALLS = {
    "text after the picture": (NOTHING_ASKS, dict(visual=lambda v: v | (torch.arange(24) == 23))),
    "tokens that ask": (NOTHING_ASKS, dict(asks=torch.zeros_like)),
    "asking text": (NOTHING_ASKS, dict(asks=torch.clone)),  # visual tokens never ask
    "as many tokens": (
        "the first call must hold the 24 tokens of visual_mask, got 22",
        dict(embeds=lambda x: x[:, 2:]),
    ),
    "as many samples": (
        "the batch must be the 3 samples of visual_mask, or copies of each side by side",
        dict(embeds=lambda x: x[:2]),
    ),
    "copies side by side": (
        "the batch must be the 3 samples of visual_mask, or copies of each side by side",
        dict(embeds=lambda x: x.repeat(2, 1, 1)),
    ),
}


@pytest.mark.parametrize("needs", CALLS)
def test_a_prompt_that_cannot_be_pruned_is_refused(needs):
    message, change = CALLS[needs]
    embeds, _, visual_mask = ragged()
    visual = change.get("visual", torch.clone)(visual_mask)
    embeds = change.get("embeds", torch.clone)(embeds)
    asks = change["asks"](visual) if "asks" in change else None
    model = build()
    refuses(message, lambda: forward(model, embeds), model, visual, query_mask=asks)


def test_another_prompt_without_a_cache_is_not_taken_for_the_first_with_its_answer():
    """Its length alone would not tell: it would be pruned by the first prompt's mask."""
    model, (embeds, _, visual_mask) = build(), ragged()
    answered = torch.cat([embeds, embeds[:, -2:]], dim=1)
    another = answered.clone()
    another[1, 3] += 1
    with prune(model, visual_mask):
        forward(model, embeds, use_cache=False)
        forward(model, answered, use_cache=False)
        with pytest.raises(ValueError, match="a longer call without a KV cache must begin with"):
            forward(model, another, use_cache=False)


def test_layers_that_get_features_of_the_whole_picture_are_not_pruned():
    """Qwen3-VL adds them at the places that the picture had, after its first layers."""
    decoder, (embeds, attention_mask, visual_mask) = qwen_vl("Qwen3VL"), ragged(torch.float64)
    features = [torch.randn(int(visual_mask.sum()), D).double() for _ in range(2)]

    def call(layers):
        with prune(decoder, visual_mask, layers=layers), torch.no_grad():
            decoder(
                inputs_embeds=embeds,
                attention_mask=attention_mask,
                visual_pos_masks=visual_mask,
                deepstack_visual_embeds=features,
            )

    with pytest.raises(ValueError, match="layers must begin at 2 or later.*got .1, 3"):
        call([1, 3])
    call([2, 3])


@pytest.mark.parametrize(
    "wrong", [lambda keep: keep.float(), lambda keep: keep[:1], lambda keep: keep.nonzero()]
)
def test_a_rule_that_returns_no_mask_of_the_tokens_is_refused(wrong):
    class Wrong(TokenPruner):
        def choose(self, layer, attention, visual):
            return wrong(visual)

    model, (embeds, attention_mask, visual_mask) = build(), ragged()
    with pytest.raises(ValueError, match=r"choose must return a bool tensor of shape \(3, 24\)"):
        with Wrong(model, visual_mask):
            forward(model, embeds, attention_mask)


def test_an_average_before_any_prompt_is_refused():
    model, (embeds, attention_mask, visual_mask) = build(), ragged()
    with prune(model, visual_mask) as pruner:
        with pytest.raises(ValueError, match="average_tokens needs a prompt"):
            pruner.average_tokens()
        forward(model, embeds, attention_mask)


def test_other_kv_caches_are_refused():
    model, (embeds, attention_mask, visual_mask) = build(), ragged()
    filled = DynamicCache(config=model.config)
    forward(model, embeds, attention_mask, **{CACHE: filled})
    static = StaticCache(config=model.config, max_cache_len=64)
    longer = torch.ones(3, 25).long()
    for cache, x, mask in ((static, embeds, attention_mask), (filled, embeds[:, :1], longer)):

        def call(cache=cache, x=x, mask=mask):
            forward(model, x, mask, **{CACHE: cache})

        refuses(
            "the KV cache must be None, or a DynamicCache that is empty", call, model, visual_mask
        )


def test_flex_attention_is_refused():
    model, (embeds, _, visual_mask) = build(attn_implementation="flex_attention"), ragged()
    message = "attn_implementation must be sdpa, eager or flash, got 'flex_attention'"
    refuses(message, lambda: forward(model, embeds), model, visual_mask)


def test_a_block_in_which_nothing_ran_is_refused():
    refuses("the decoder did not run in the block", lambda: None, build(), ragged()[2])


def test_a_decoder_compiled_before_the_block_is_pruned_or_refused():
    """Torch may or may not notice new hooks; no unpruned run may pass for a pruned one."""
    embeds, _, visual_mask = ragged()
    model = build(num_hidden_layers=2)
    with prune(model, visual_mask, layers=[1]):
        want = forward(model, embeds)
    model.model.compile(backend="eager")
    forward(model, embeds)  # compiled here, without our hooks
    try:
        with prune(model, visual_mask, layers=[1]):
            got = forward(model, embeds)
        assert gap(got, want) < 1e-4
    except ValueError as error:
        assert "the decoder did not run in the block, was compiled before it" in str(error)
    finally:
        torch.compiler.reset()


def test_the_cache_of_an_earlier_prompt_in_the_block_is_closed_too():
    model = build()
    embeds, _, visual_mask = ragged()
    with prune(model, visual_mask), torch.no_grad():
        first = find_cache(model(inputs_embeds=embeds))
        model(inputs_embeds=embeds)
    with pytest.raises(ValueError, match="this KV cache lacks the tokens that were pruned"):
        forward(model, embeds[:, :1], **{CACHE: first})


def test_continuous_batching_is_refused_by_name():
    """Its cache is of another type; the library swallows the sentence in a thread of its own."""
    model = build()
    embeds, _, visual_mask = ragged()
    with pytest.raises(ValueError, match="the KV cache must be None, or a DynamicCache"):
        with prune(model, visual_mask):
            model.model.layers[0](
                embeds,
                attention_mask=None,
                position_embeddings=model.model.rotary_emb(embeds, torch.arange(24)[None]),
                **{CACHE: object()},
            )


def test_a_float_mask_of_another_large_negative_number_hides_as_well():
    model = build(attn_implementation="eager")
    embeds, attention_mask, visual_mask = ragged()
    S = embeds.shape[1]
    sees = torch.ones(S, S).tril().bool() & attention_mask.bool()[:, None]
    counts = []
    for hidden in (torch.finfo(torch.float32).min, -1e9):
        mask = torch.zeros(3, 1, S, S).masked_fill(~sees[:, None], hidden)
        with prune(model, visual_mask) as pruner:
            forward(model, embeds, mask)
        counts.append({i: K.tolist() for i, K in pruner.counts.items()})
    assert counts[0] == counts[1]


def test_a_decoder_that_is_told_not_to_be_causal_is_heard_so():
    model = build()
    embeds, _, visual_mask = ragged()
    asks = torch.zeros_like(visual_mask)
    asks[:, 0] = True  # in front of the picture: it sees it only where the future is not hidden
    for is_causal in (True, False):
        with prune(model, visual_mask, lam=math.inf, query_mask=asks) as pruner:
            forward(model, embeds, is_causal=is_causal)
        assert (pruner.vav[1].sum() > 0) == (not is_causal)


def test_a_copy_of_a_model_is_pruned_as_the_model_is():
    """A copy has a config of its own, and neither hears the other."""
    prompts = ragged()
    model = build()
    twin = copy.deepcopy(model)
    with prune(model, prompts[2]), prune(twin, prompts[2], math.inf):
        pruned, plain = (generate(m, *prompts[:2]) for m in (model, twin))
    assert torch.equal(plain, generate(model, *prompts[:2])) and not torch.equal(pruned, plain)


def test_attention_sinks_and_layers_without_rotary_tables_are_refused():
    embeds, _, visual_mask = ragged()
    small = dict(vocab_size=VOCAB, pad_token_id=0)
    size = dict(hidden_size=D, num_hidden_layers=L, num_attention_heads=H, **small)
    experts = dict(intermediate_size=32, num_local_experts=2, num_experts_per_tok=1, head_dim=8)
    sinks = transformers.GptOssConfig(**size, **experts, num_key_value_heads=4)
    opt = transformers.OPTConfig(**size, ffn_dim=96, word_embed_proj_dim=D)
    for model, message in (
        (transformers.GptOssForCausalLM(sinks), "stage 3 does not know attention sinks"),
        (transformers.OPTForCausalLM(opt), "must call its layers with position_embeddings"),
    ):
        model = model.eval()

        def call(model=model):
            forward(model, embeds)

        refuses(message, call, model, visual_mask, TypeError)


# ----------------------------------------------------------------------------------------- the file


def test_the_file_runs_alone(tmp_path, monkeypatch, capsys):
    """Copied into an empty folder, with nothing else of this project in reach."""
    shutil.copy(stage3_decode.__file__, tmp_path)
    here = Path(stage3_decode.__file__).parent
    monkeypatch.chdir(tmp_path)
    elsewhere = [p for p in sys.path if p and Path(p).resolve() not in (here, here / "tests")]
    monkeypatch.setattr(sys, "path", elsewhere)
    for name in [n for n in sys.modules if n.split(".")[0].startswith(("stage", "meteor"))]:
        monkeypatch.delitem(sys.modules, name)
    runpy.run_path("stage3_decode.py", run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.count("KV cache [64, ") == 3
    assert "lambda inf: 48 -> [[48, 48]" in printed
