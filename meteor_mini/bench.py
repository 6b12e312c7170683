"""What pruning buys: time, memory and FLOPs on real architectures at real sizes, side by side with peers: `meteor-mini bench`.

Weights are random, because timing needs no training; so counts are given (the paper's), not found by ranks and lambda. All
contenders of a table run in one process, taking turns; a figure is the median of its runs. Nothing here asserts a time.
"""
import contextlib
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import open_clip
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import stage1_encode
import stage2_fuse
from stage3_decode import AdaptivePruner, average_tokens

from . import baselines
from .evaluate import encoding_flops, prefill_flops
from .model import Budget, Encoded, Meteor
from .presets import build_decoder
from .report import commit, grid
from .tables import fastv_count, pyramid_counts

# "small" and "eagle-x4" of presets.py with n x n patches in each encoder, whatever their own size: 4 n^2 visual tokens.
SIZES = {
    "small": {"clip": dict(patch=16, width=768, layers=12, heads=12), "convnext": dict(depths=[3, 3, 27, 3], width=128),
              "eva": dict(patch=16, embed_dim=768, depth=12, num_heads=12, qkv_fused=True),
              "pix2struct": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, d_ff=2048),
              "llama": dict(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                            intermediate_size=1536, vocab_size=49152, max_position_embeddings=8192)},
    "large": {"clip": dict(patch=14, width=1024, layers=24, heads=16), "convnext": dict(depths=[3, 4, 30, 3], width=384),
              "eva": dict(patch=14, embed_dim=1024, depth=24, num_heads=16, qkv_fused=False),
              "pix2struct": dict(hidden_size=1536, num_hidden_layers=18, num_attention_heads=24, d_ff=3968),
              "llama": dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
                            intermediate_size=8192, vocab_size=128256, max_position_embeddings=8192)},
}
SIZES["large-7b"] = SIZES["large"] | {"llama": dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
                                                    num_key_value_heads=32, intermediate_size=11008, vocab_size=32000,
                                                    max_position_embeddings=8192)}
PAPER = (4096, 1193, 576, (396, 170, 76))  # visual tokens; after stages 1 and 2; from each pruned LLM layer on (Table 3)
TEXT, NEW = 32, 9  # words of a question; tokens that are generated
CPU_TOKENS = 40_000  # visual tokens in a batch, at most, on a CPU


def build(size: str, n: int, device: str, dtype: torch.dtype) -> Meteor:
    """Four encoders of n x n patches and a Llama, with random weights. Raises: ValueError for another size."""
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    o = SIZES[size]
    clip, conv, eva = (dict(o[name]) for name in ("clip", "convnext", "eva"))
    patch, widths = clip.pop("patch"), [conv["width"] * 2**i for i in range(4)]
    encoders = {
        "clip": ["clip", clip | dict(image_size=n * patch, patch_size=patch, mlp_ratio=4, output_dim=clip["width"])],
        "convnext": ["convnext", dict(num_classes=0, depths=conv["depths"], dims=widths, output_stride=16, input_size=[3, 16 * n, 16 * n])],
        "eva": ["eva", {k: v for k, v in eva.items() if k != "patch"} | dict(
            img_size=n * patch, patch_size=patch, num_classes=0, mlp_ratio=8 / 3, swiglu_mlp=True, scale_mlp=True,
            use_rot_pos_emb=True, ref_feat_shape=[n, n])],
        "pix2struct": ["pix2struct", o["pix2struct"] | dict(seq_len=n * n, initializer_range=0.02)]}
    config = {"encoders": encoders, "decoder": o["llama"], "words": ["what"], "ranks": None, "lambda_table": None, "budget": None}
    return Meteor(config, decoder=build_decoder(o["llama"])).eval().to(device, dtype)


class Contender(NamedTuple):
    """encode: pictures -> `Encoded`; pruner: of `Meteor.generate`; layers: visual tokens in each LLM layer."""

    encode: Callable[[torch.Tensor], Encoded]
    pruner: baselines.Pruner | None
    layers: list[int]


def spread(K: int, counts: dict[int, int], L: int) -> list[int]:
    """Visual tokens in each of L layers: K, from layer i on counts[i]."""
    return [min([K, *(n for i, n in counts.items() if i <= layer)]) for layer in range(L)]


def contenders(model: Meteor) -> dict[str, Contender]:
    """Unpruned; EAGLE-style, a token a grid cell; METEOR at the paper's budgets in proportion to the tokens there are."""
    N, L = sum(a.num_tokens for a in model.adapters), model.decoder.config.num_hidden_layers
    total, K, counts = (round(N * part / PAPER[0]) for part in PAPER[1:3]), None, None
    total, K = total
    layers = [L // 8, 3 * L // 8, 5 * L // 8]
    counts = {i: round(N * part / PAPER[0]) for i, part in zip(layers, PAPER[3])}
    budget = Budget(stage1=total, stage2=K, stage1_strategy="average")
    widths, width = [a.dim for a in model.adapters], model.decoder.config.hidden_size
    fusion = baselines.ChannelFusion(widths, model.adapters[0].grid, width).to(model.device, model.decoder.dtype)
    eagle = baselines.learned(model, fusion)

    def channels(images: torch.Tensor) -> Encoded:
        tokens = eagle.encode(model, images)
        place = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        return Encoded(stage2_fuse.Fused(tokens, torch.zeros_like(place), place), [])

    return {"unpruned": Contender(lambda x: model.encode_no_grad(x, Budget.none()), None, [N] * L),
            "EAGLE-style": Contender(channels, None, [N // 4] * L),
            "METEOR": Contender(lambda x: model.encode_no_grad(x, budget), baselines.fixed(counts, 5), spread(K, counts, L))}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """The moments at which `generate` gives tokens (it calls this a streamer), after the prompt's own."""

    def __init__(self, device: torch.device):
        self.device, self.times = device, []

    def put(self, ids: torch.Tensor) -> None:
        synchronize(self.device)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def run(model: Meteor, contender: Contender, images: torch.Tensor | None, encoded: Encoded | None = None, new: int = NEW) -> dict:
    """From pictures, or an `Encoded` batch, to `new` tokens.

    Returns: {"prefill": seconds to the first, "decode": seconds for each of the others, "kv": bytes of the KV cache}.
    """
    clock = Clock(model.device)
    synchronize(model.device)
    start = time.perf_counter()
    encoded = contender.encode(images) if encoded is None else encoded
    out, _ = model.generate(encoded, [" ".join(["what"] * TEXT)] * len(encoded.fused.tokens), Budget.none(), contender.pruner,
                            max_new_tokens=new, min_new_tokens=new, streamer=clock, return_dict_in_generate=True)
    first, *others = clock.times[1:]
    return {"prefill": first - start, "decode": (others[-1] - first) / len(others) if others else float("nan"),
            "kv": sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)}


def peak(device: torch.device, work: Callable[[], object]) -> int:
    """Most bytes of tensors that `work` holds at a time, above those there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = sorted((e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    held = most = 0
    for event in events:
        held += event.nbytes()
        most = max(most, held)
    return most


@contextlib.contextmanager
def stopwatch(device: torch.device):
    """Seconds spent in the parts of a prefill, {part: seconds}: each function's own time, without the parts it calls."""
    spent, stack = Counter(), []
    places = [(stage1_encode.Adapter, "embed", "encoders"), (stage1_encode.Adapter, "block", "encoders"),
              (stage1_encode, "encode_all", "stage 1"), (Meteor, "fuse", "projectors"), (stage2_fuse, "fuse", "stage 2"),
              (Meteor, "generate", "LLM"), *((AdaptivePruner, name, "stage 3") for name in (
                  "__init__", "__enter__", "_before_decoder", "_before_layer", "_after_decoder"))]

    def timed(function: Callable, part: str) -> Callable:
        def call(*args, **kwargs):
            synchronize(device)
            start, inner = time.perf_counter(), sum(spent.values())
            try:
                return function(*args, **kwargs)
            finally:
                synchronize(device)
                spent[part] += time.perf_counter() - start - (sum(spent.values()) - inner)
        return call

    kept = [vars(owner)[name] for owner, name, _ in places]
    for owner, name, part in places:
        setattr(owner, name, timed(vars(owner)[name], part))
    try:
        yield spent
    finally:
        for (owner, name, _), function in zip(places, kept):
            setattr(owner, name, function)
