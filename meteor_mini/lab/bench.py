"""What pruning buys: time, memory and FLOPs on real architectures at real sizes, side by side with peers: `meteor-mini bench`.

Weights are random, because timing needs no training; so counts are given (the paper's), not found by ranks and lambda. All
contenders of a table run in one process, taking turns; a figure is the median of its runs. Nothing here asserts a time.
"""

import contextlib
import importlib.util
import os
import platform
import statistics
import sys
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import stage1_encode
import stage2_fuse
from stage3_decode import AdaptivePruner, average_tokens, find_cache

from . import baselines
from .evaluate import encoding_flops, prefill_flops
from .model import Budget, Encoded, Meteor
from .presets import build_decoder
from .report import commit, grid
from .tables import fastv_count, pyramid_counts

# "small" and "eagle-x4" of presets.py with n x n patches in each encoder, whatever their own size: 4 n^2 visual tokens.
SIZES = {
    "small": {
        "clip": dict(patch=16, width=768, layers=12, heads=12),
        "convnext": dict(depths=[3, 3, 27, 3], width=128),
        "eva": dict(patch=16, embed_dim=768, depth=12, num_heads=12, qkv_fused=True),
        "pix2struct": dict(
            hidden_size=768, num_hidden_layers=12, num_attention_heads=12, d_ff=2048
        ),
        "llama": dict(
            hidden_size=576,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            intermediate_size=1536,
            vocab_size=49152,
            max_position_embeddings=8192,
        ),
    },
    "large": {
        "clip": dict(patch=14, width=1024, layers=24, heads=16),
        "convnext": dict(depths=[3, 4, 30, 3], width=384),
        "eva": dict(patch=14, embed_dim=1024, depth=24, num_heads=16, qkv_fused=False),
        "pix2struct": dict(
            hidden_size=1536, num_hidden_layers=18, num_attention_heads=24, d_ff=3968
        ),
        "llama": dict(
            hidden_size=2048,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            intermediate_size=8192,
            vocab_size=128256,
            max_position_embeddings=8192,
        ),
    },
}
SIZES["large-7b"] = SIZES["large"] | {
    "llama": dict(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        intermediate_size=11008,
        vocab_size=32000,
        max_position_embeddings=8192,
    )
}
PAPER = (
    4096,
    1193,
    576,
    (396, 170, 76),
)  # visual tokens; after stages 1 and 2; from each pruned LLM layer on (Table 3)
TEXT, NEW = 32, 9  # words of a question; tokens that are generated
CPU_TOKENS = 20_000  # visual tokens in a batch, at most, on a CPU


def build(size: str, n: int, device: str, dtype: torch.dtype) -> Meteor:
    """Four encoders of n x n patches and a Llama, with random weights. Raises: ValueError for another size."""
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    o = SIZES[size]
    clip, conv, eva = (dict(o[name]) for name in ("clip", "convnext", "eva"))
    patch, widths = clip.pop("patch"), [conv["width"] * 2**i for i in range(4)]
    encoders = {
        "clip": [
            "clip",
            clip
            | dict(image_size=n * patch, patch_size=patch, mlp_ratio=4, output_dim=clip["width"]),
        ],
        "convnext": [
            "convnext",
            dict(
                num_classes=0,
                depths=conv["depths"],
                dims=widths,
                output_stride=16,
                input_size=[3, 16 * n, 16 * n],
            ),
        ],
        "eva": [
            "eva",
            {k: v for k, v in eva.items() if k != "patch"}
            | dict(
                img_size=n * patch,
                patch_size=patch,
                num_classes=0,
                mlp_ratio=8 / 3,
                swiglu_mlp=True,
                scale_mlp=True,
                use_rot_pos_emb=True,
                ref_feat_shape=[n, n],
            ),
        ],
        "pix2struct": ["pix2struct", o["pix2struct"] | dict(seq_len=n * n, initializer_range=0.02)],
    }
    config = {
        "encoders": encoders,
        "decoder": o["llama"],
        "words": ["what"],
        "ranks": None,
        "lambda_table": None,
        "budget": None,
    }
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
    total, K = (round(N * part / PAPER[0]) for part in PAPER[1:3])
    layers = [L // 8, 3 * L // 8, 5 * L // 8]
    counts = {i: round(N * part / PAPER[0]) for i, part in zip(layers, PAPER[3])}
    budget = Budget(stage1=total, stage2=K, stage1_strategy="average")
    widths, width = [a.dim for a in model.adapters], model.decoder.config.hidden_size
    fusion = baselines.ChannelFusion(widths, model.adapters[0].grid, width).to(
        model.device, model.decoder.dtype
    )
    eagle = baselines.learned(model, fusion)

    def channels(images: torch.Tensor) -> Encoded:
        tokens = eagle.encode(model, images)
        place = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        return Encoded(stage2_fuse.Fused(tokens, torch.zeros_like(place), place), [])

    return {
        "unpruned": Contender(lambda x: model.encode_no_grad(x, Budget.none()), None, [N] * L),
        "EAGLE-style": Contender(channels, None, [N // 4] * L),
        "METEOR": Contender(
            lambda x: model.encode_no_grad(x, budget),
            baselines.fixed(counts, 5),
            spread(K, counts, L),
        ),
    }


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


def run(model: Meteor, contender: Contender, images: torch.Tensor, new: int = NEW) -> dict:
    """From pictures to `new` tokens.

    Returns: {"prefill": seconds to the first, "decode": seconds for each of the others, "kv": bytes of the KV cache}.
    """
    clock = Clock(model.device)
    synchronize(model.device)
    start = time.perf_counter()
    encoded = contender.encode(images)
    out, _ = model.generate(
        encoded,
        [" ".join(["what"] * TEXT)] * len(encoded.fused.tokens),
        Budget.none(),
        contender.pruner,
        max_new_tokens=new,
        min_new_tokens=new,
        streamer=clock,
        return_dict_in_generate=True,
    )
    first, *others = clock.times[1:]
    return {
        "prefill": first - start,
        "decode": (others[-1] - first) / len(others) if others else float("nan"),
        "kv": sum(
            layer.keys.nbytes + layer.values.nbytes for layer in find_cache(out.values()).layers
        ),
    }


@contextlib.contextmanager
def silent_stderr():
    """Without what PyTorch's profiler writes to file 2, past Python, at every start."""
    kept, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept), os.close(sink)


def peak(device: torch.device, work: Callable[[], object]) -> int:
    """Most bytes of tensors that `work` holds at a time, above those there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with (
        silent_stderr(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        work()
    events = sorted(
        (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    )
    held = most = 0
    for event in events:
        held += event.nbytes()
        most = max(most, held)
    return most


@contextlib.contextmanager
def stopwatch(device: torch.device):
    """Seconds spent in the parts of a prefill, {part: seconds}: each function's own time, without the parts it calls."""
    spent, stack = Counter(), []
    places = [
        (stage1_encode.Adapter, "embed", "encoders"),
        (stage1_encode.Adapter, "block", "encoders"),
        (stage1_encode, "encode_all", "stage 1"),
        (Meteor, "fuse", "projectors"),
        (stage2_fuse, "fuse", "stage 2"),
        (Meteor, "generate", "LLM"),
        *(
            (AdaptivePruner, name, "stage 3")
            for name in (
                "__init__",
                "__enter__",
                "_before_decoder",
                "_before_layer",
                "_after_decoder",
            )
        ),
    ]

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

    kept, adapter = [vars(owner)[name] for owner, name, _ in places], stage1_encode.adapter

    def with_timed_norm(encoder):
        a = adapter(encoder)
        a.norm = timed(a.norm, "encoders")
        return a

    for owner, name, part in places:
        setattr(owner, name, timed(vars(owner)[name], part))
    stage1_encode.adapter = with_timed_norm
    try:
        yield spent
    finally:
        stage1_encode.adapter = adapter
        for (owner, name, _), function in zip(places, kept):
            setattr(owner, name, function)


def median(rows: list[dict], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def turns(
    work: dict[str, Callable[[], dict]], runs: int, seconds: float, warm: bool = False
) -> dict[str, list[dict]]:
    """Every contender once a round: one round to warm up, unless all are warm, then one to `runs` that count, as many as fit
    into `seconds`."""
    if not warm:
        for once in work.values():
            once()
    rounds, start, first = [], time.perf_counter(), 0.0
    while not rounds or len(rounds) < runs and time.perf_counter() - start + first <= seconds:
        rounds.append({name: once() for name, once in work.items()})
        first = first or time.perf_counter() - start
    return {name: [results[name] for results in rounds] for name in work}


# ------------------------------------------------------------------ the tables: lists of rows, {column: number or text}


@torch.no_grad()
def whole(
    size: str,
    n: int,
    batches: list[int],
    device: str,
    dtype: torch.dtype,
    runs: int,
    seconds: float,
) -> list[dict]:
    """From pictures to words: unpruned, EAGLE-style and METEOR, at 4 n^2 visual tokens."""
    model, rows = build(size, n, device, dtype), []
    everyone, config = contenders(model), model.decoder.config
    flops = {
        name: encoding_flops(model, lambda m, x: c.encode(x))
        + prefill_flops(config, c.layers, TEXT + 2)
        for name, c in everyone.items()
    }
    for batch in batches:
        images = torch.rand(batch, 3, 256, 256, device=device)
        timed = turns(
            {name: lambda c=c: run(model, c, images) for name, c in everyone.items()},
            runs,
            seconds,
            batch > batches[0],
        )
        for name, c in everyone.items():
            prefill = sorted(r["prefill"] for r in timed[name])
            saved = median(timed["unpruned"], "prefill") / median(timed[name], "prefill")
            row = {
                "visual tokens": 4 * n * n,
                "batch": batch,
                "contender": name,
                "tokens in the LLM": statistics.mean(c.layers),
                "prefill, s": median(timed[name], "prefill"),
                "least": prefill[0],
                "most": prefill[-1],
                "runs": len(prefill),
                "speed-up": saved,
                "FLOPs ratio": flops["unpruned"] / flops[name],
                "realised": saved / (flops["unpruned"] / flops[name]),
                "decode, ms a token": 1000 * median(timed[name], "decode"),
                "KV cache, MiB": timed[name][0]["kv"] / 2**20,
            }
            if batch == 1 or device != "cpu":
                row["peak memory, MiB"] = (
                    peak(model.device, lambda: run(model, c, images, new=1)) / 2**20
                )
            rows.append(row)
    return rows


@torch.no_grad()
def split(size: str, n: int, device: str, dtype: torch.dtype, runs: int) -> list[dict]:
    """Where the time of a prefill goes, batch 1; *selection*: of stages 1, 2 and 3, all that is no layer and no projector."""
    model, rows = build(size, n, device, dtype), []
    images = torch.rand(1, 3, 256, 256, device=device)
    everyone = {name: c for name, c in contenders(model).items() if name != "EAGLE-style"}
    for name, c in everyone.items():
        run(model, c, images, new=1)
        samples = []
        for _ in range(runs):
            with stopwatch(model.device) as spent:
                run(model, c, images, new=1)
            samples.append(Counter(spent))
        parts = {
            part: statistics.median(s[part] for s in samples)
            for part in ("encoders", "stage 1", "projectors", "stage 2", "stage 3", "LLM")
        }
        chosen = sum(parts[stage] for stage in ("stage 1", "stage 2", "stage 3"))
        rows.append(
            {"visual tokens": 4 * n * n, "contender": name}
            | {f"{part}, ms": 1000 * s for part, s in parts.items()}
            | {"selection, % of prefill": 100 * chosen / sum(parts.values())}
        )
    return rows


@torch.no_grad()
def peers(
    size: str, V: int, device: str, dtype: torch.dtype, runs: int, seconds: float
) -> list[dict]:
    """Inside the LLM alone, V random visual tokens in: as many kept on average by each, as near as their rules allow."""
    model = build_decoder(SIZES[size]["llama"]).eval().to(device, dtype)
    L = model.config.num_hidden_layers
    layers = [L // 8, 3 * L // 8, 5 * L // 8]
    counts = {i: round(V * part / PAPER[2]) for i, part in zip(layers, PAPER[3])}
    average = average_tokens(V, [*counts.values()], layers, L)
    early, pyramid = fastv_count(V, average, 2, L), pyramid_counts(V, average)
    short = (
        average_tokens(V, pyramid, [L * quarter // 4 for quarter in (1, 2, 3)], L) - average
    )  # where 4 does not divide L
    pyramid = pyramid_counts(V, average - short)
    embed = model.get_input_embeddings().weight
    embeds = embed[torch.randint(len(embed), (1, V + TEXT), device=device)]
    visual = (torch.arange(V + TEXT, device=device) < V)[None]
    ours = {
        "unpruned": None,
        "stage 3": baselines.fixed(counts, 5),
        "FastV, eager": baselines.fastv(early, 2, True),
        "FastV, SDPA": baselines.fastv(early, 2),
        "PyramidDrop": baselines.pyramid_drop(pyramid, L),
    }
    kept = {}

    def once(name: str, new: int = NEW) -> dict:
        clock, pruner = Clock(model.device), ours[name] and ours[name](model, visual)
        synchronize(model.device)
        start = time.perf_counter()
        with pruner or contextlib.nullcontext():
            model.generate(
                inputs_embeds=embeds,
                attention_mask=visual.long().fill_(1),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                streamer=clock,
                pad_token_id=0,
            )
        kept[name] = spread(V, {i: int(K) for i, K in pruner.counts.items()} if pruner else {}, L)
        first, *others = clock.times[1:]
        return {
            "prefill": first - start,
            "decode": (others[-1] - first) / len(others) if others else 0.0,
        }

    timed = turns({name: lambda name=name: once(name) for name in ours}, runs, seconds)
    full = median(timed["unpruned"], "prefill")
    flops = {name: prefill_flops(model.config, layers, TEXT) for name, layers in kept.items()}
    return [
        {
            "visual tokens": V,
            "method": name,
            "mean tokens": statistics.mean(kept[name]),
            "prefill, s": median(timed[name], "prefill"),
            "least": min(r["prefill"] for r in timed[name]),
            "most": max(r["prefill"] for r in timed[name]),
            "runs": len(timed[name]),
            "speed-up": full / median(timed[name], "prefill"),
            "FLOPs ratio": flops["unpruned"] / flops[name],
            "decode, ms a token": 1000 * median(timed[name], "decode"),
            "peak memory, MiB": peak(model.device, lambda: once(name, 1)) / 2**20,
        }
        for name in ours
    ]


@torch.no_grad()
def inside_a_vit(n: int, device: str, dtype: torch.dtype, runs: int, seconds: float) -> list[dict]:
    """A SigLIP ViT-B/16 of timm with n x n patches: stage 1 and ToMe, both to the paper's share of the tokens."""
    vit = timm.create_model(
        "vit_base_patch16_siglip_256", img_size=16 * n, num_classes=0, global_pool=""
    )
    vit, N = vit.eval().to(device, dtype), n * n
    r = round(N * (1 - PAPER[1] / PAPER[0]) / len(vit.blocks))
    K = N - len(vit.blocks) * r
    keep = (round(N * (K / N) ** (1 / 3)), round(N * (K / N) ** (2 / 3)), K)
    images = torch.rand(1, 3, 16 * n, 16 * n, device=device)
    work = {
        "unpruned": lambda: stage1_encode.encode(vit, images)[0],
        "stage 1": lambda: stage1_encode.encode(vit, images, keep)[0],
        "ToMe": lambda: baselines.tome(vit, images, r),
        "ToMe, eager": lambda: baselines.tome(vit, images, r, True),
    }
    kept = {name: once().shape[1] for name, once in work.items()}
    timed = turns(
        {
            name: lambda once=once: {"s": seconds_of(once, images.device)}
            for name, once in work.items()
        },
        runs,
        seconds,
    )
    merged = N - r * (len(vit.blocks) - 1) / 2
    blocks = {
        "unpruned": N,
        "stage 1": (N + keep[0] + keep[1]) / 3,
        "ToMe": merged,
        "ToMe, eager": merged,
    }
    return [
        {
            "patches": N,
            "method": name,
            "tokens out": kept[name],
            "mean tokens": blocks[name],
            "encoding, s": median(timed[name], "s"),
            "least": min(t["s"] for t in timed[name]),
            "most": max(t["s"] for t in timed[name]),
            "runs": len(timed[name]),
            "speed-up": median(timed["unpruned"], "s") / median(timed[name], "s"),
        }
        for name in work
    ]


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def median_of(work: Callable[[], object], device: torch.device, runs: int = 3) -> float:
    """Median seconds of `runs` runs, after one to warm up."""
    work()
    return statistics.median(seconds_of(work, device) for _ in range(runs))


def pairwise_redundancy(tokens: list[torch.Tensor]) -> list[torch.Tensor]:
    """Stage 2's formula as it is written, with all pairs of different encoders: what `mutual_redundancy` avoids."""
    units = [F.normalize(z.float(), dim=-1) for z in tokens]
    return [
        sum((u @ other.mT).sum(dim=-1) for l, other in enumerate(units) if l != j)
        for j, u in enumerate(units)
    ]


@torch.no_grad()
def growth(
    size: str, sizes: list[int], pairwise_up_to: int, device: str, dtype: torch.dtype
) -> list[dict]:
    """Stage 2's choice among N tokens of 4 encoders: by sums and by all pairs."""
    rows, device = [], torch.device(device)
    for N in sizes:
        tokens = [
            torch.randn(1, N // 4, SIZES[size]["llama"]["hidden_size"], device=device, dtype=dtype)
            for _ in range(4)
        ]
        sums = lambda: stage2_fuse.fuse(tokens, N // 2)
        row = {
            "N": N,
            "by sums, ms": 1000 * median_of(sums, device),
            "by sums, MiB": peak(device, sums) / 2**20,
        }
        if N <= pairwise_up_to:
            pairs = lambda: stage2_fuse.lowest(
                torch.cat(pairwise_redundancy(tokens), dim=1), N // 2
            )
            row |= {
                "by pairs, ms": 1000 * median_of(pairs, device),
                "by pairs, MiB": peak(device, pairs) / 2**20,
            }
        rows.append(row)
    return rows


@torch.no_grad()
def overhead(size: str, sides: list[int], device: str, dtype: torch.dtype) -> list[dict]:
    """One choice of stages 1 and 3 against one block of a ViT and one layer of the LLM that it is made in."""
    rows, o = [], SIZES[size]
    for n in sides:
        clip = {k: v for k, v in o["clip"].items() if k != "patch"} | dict(
            layers=3, image_size=16 * n, patch_size=16, output_dim=8
        )
        siglip = dict(img_size=16 * n, num_classes=0, global_pool="", depth=3)
        vits = [
            open_clip.transformer.VisionTransformer(**clip, mlp_ratio=4),
            timm.create_model("vit_base_patch16_siglip_256", **siglip),
        ]
        row = {"tokens": n * n}
        for name, vit in zip(("attention of CLS", "attention of all rows"), vits):
            a = stage1_encode.adapter(vit.eval().to(device, dtype))
            x = torch.randn(1, a.prefix + a.num_tokens, a.dim, device=device, dtype=dtype)
            attention = lambda: stage1_encode.received_attention(
                *a.attention(0, x, None), a.from_cls
            )[:, a.prefix :]
            similarity = lambda: -stage1_encode.mean_similarity(x[:, a.prefix :])
            block = median_of(lambda: a.block(0, x, None), x.device)
            row[f"stage 1, {name}, % of a block"] = (
                100 * median_of(lambda: kept_half(x, attention(), a.prefix), x.device) / block
            )
        row["stage 1, similarity, % of a block"] = (
            100 * median_of(lambda: kept_half(x, similarity(), a.prefix), x.device) / block
        )
        model = build_decoder(o["llama"] | dict(num_hidden_layers=4)).eval().to(device, dtype)
        embeds = torch.randn(1, n * n + TEXT, model.config.hidden_size, device=device, dtype=dtype)
        visual = (torch.arange(n * n + TEXT, device=device) < n * n)[None]
        samples = []
        for _ in range(4):  # the first warms up
            with (
                stopwatch(embeds.device) as spent,
                AdaptivePruner(model, visual, [1, 2, 3], lam=float("inf")),
            ):
                spent.clear()  # of making and entering the pruner
                total = seconds_of(lambda: model.model(inputs_embeds=embeds), embeds.device)
                samples.append(100 * (spent["stage 3"] / 3) / ((total - spent["stage 3"]) / 4))
        row["stage 3, a selection, % of a layer"] = statistics.median(samples[1:])
        rows.append(row)
    return rows


def kept_half(x: torch.Tensor, score: torch.Tensor, prefix: int) -> torch.Tensor:
    """What stage 1 does with a score: sort, gather. x (B, P + N, D), score (B, N) -> (B, P + N // 2, D)"""
    stay = (
        score.argsort(dim=1, descending=True, stable=True)[:, : score.shape[1] // 2]
        .sort(dim=1)
        .values
    )
    return torch.cat(
        [x[:, :prefix], x[:, prefix:][torch.arange(len(x), device=x.device)[:, None], stay]], dim=1
    )


@torch.no_grad()
def kernels(
    size: str, n: int, device: str, dtype: torch.dtype, runs: int, seconds: float
) -> list[dict]:
    """Prefill with PyTorch's fused (flash) attention, with its plain one, and with the LLM's MLPs compiled by torch.compile."""
    model, rows = build(size, n, device, dtype), []
    images = torch.rand(1, 3, 256, 256, device=device)
    everyone = {name: c for name, c in contenders(model).items() if name != "EAGLE-style"}
    plain = [SDPBackend.MATH]
    fused = [
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        *plain,
    ]  # the first that serves the mask

    def once(c: Contender, backends: list) -> dict:
        with sdpa_kernel(backends, set_priority=True):
            return run(model, c, images, new=1)

    work = {
        (name, kind): lambda c=c, backends=backends: once(c, backends)
        for name, c in everyone.items()
        for kind, backends in (("fused", fused), ("plain", plain))
    }
    timed = turns(work, runs, seconds)
    for layer in model.decoder.model.layers:
        layer.mlp.compile(
            dynamic=True
        )  # whole layers would be compiled anew for each kind of mask, for minutes
    try:
        timed |= turns(
            {
                (name, "fused, MLPs compiled"): lambda c=c: once(c, fused)
                for name, c in everyone.items()
            },
            runs,
            seconds,
        )
    except torch._dynamo.exc.BackendCompilerFailed as error:  # as without a C++ compiler
        print(
            f"kernels: torch.compile does not work here: {str(error).splitlines()[0]}",
            file=sys.stderr,
        )
    for (name, kind), results in timed.items():
        rows.append(
            {
                "visual tokens": 4 * n * n,
                "contender": name,
                "kernels": kind,
                "prefill, s": median(results, "prefill"),
                "runs": len(results),
                "speed-up": median(timed["unpruned", kind], "prefill") / median(results, "prefill"),
            }
        )
    return rows


# ------------------------------------------------------------------ the whole

NOTES = {
    "whole": "From pictures to words, random weights. METEOR: the paper's counts (4096, 1193, 576, 396-170-76) in proportion to the "
    "visual tokens. *speed-up* and *FLOPs ratio*: unpruned over the row; *realised*: the first over the second, 1.00 where "
    "time falls as counted FLOPs do (causal attention counted in full, stage 3's own q and k not). *prefill*: median, least "
    "and most of the runs. *peak memory*: tensors above the weights.",
    "split": "Median milliseconds of each part in runs of their own. *selection*: stages 1 to 3, without blocks, projectors and layers; a "
    "third of it (by cProfile, at 2304 tokens) are queries and keys that stage 1 computes once more at two points of each ViT, "
    "because fused attention gives none away.",
    "peers": "In the LLM alone, the same decoder, as many tokens kept. *FastV, eager*: ranked by the weights of the layer before, with all "
    "layers on eager attention, as its demo loads the model; every layer then writes H S S weights. *FastV, SDPA*: the few rows "
    "needed are multiplied apart, as PyramidDrop's own code and stage 3 do. With one mean, FastV has the fewest FLOPs: "
    "it drops early and at once, and attention grows with the square.",
    "inside_a_vit": "Stage 1 drops at three points, none in the first third of the blocks; ToMe merges a few tokens in every block. *ToMe, "
    "eager*: with the attention weights written out, as its code does. *mean tokens*: in attention, over the blocks.",
    "growth": "Stage 2's `fuse`, half of N kept, against its formula with all pairs of different encoders.",
    "overhead": 'One choice, with sorting and gathering, against the block or layer in which it is made. "All rows": of a SigLIP ViT-B/16.',
    "kernels": "The same prefill on PyTorch's fused attention and on its plain one, taking turns; then, in turns of their own, with "
    "the LLM's MLPs compiled by torch.compile.",
}


def bench(
    size: str, device: str, dtype: torch.dtype, quick: bool, done: Callable[[dict], None]
) -> None:
    """All tables, {name: rows}, printed as they are made; each time `done` gets those there are. quick: the smallest sizes, in
    under 3 minutes on 2 cores. What does not fit into a GPU's memory is left out, and said."""
    sides, batches, runs, seconds = (
        ([16], [1], 3, 30) if quick else ([16, 24, 32], [1, 4, 16], 5, 80)
    )
    allowed = lambda n: [b for b in batches if device != "cpu" or b * 4 * n * n <= CPU_TOKENS]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        work = {
            "whole": [
                lambda n=n: whole(size, n, allowed(n), device, dtype, runs, seconds) for n in sides
            ],
            "split": [lambda n=n: split(size, n, device, dtype, 3) for n in sides],
            "peers": [
                lambda n=n: peers(size, 4 * n * n, device, dtype, runs, seconds) for n in sides
            ],
            "inside_a_vit": [
                lambda n=n: inside_a_vit(n, device, dtype, runs, seconds)
                for n in (sides if quick else [24, 32])
            ],
            "growth": [
                lambda: growth(
                    size,
                    [4**i for i in range(5, 8 if quick else 9)],
                    4**6 if quick else 4**7,
                    device,
                    dtype,
                )
            ],
            "overhead": [lambda: overhead(size, sides, device, dtype)],
            "kernels": [] if quick else [lambda: kernels(size, 24, device, dtype, runs, seconds)],
        }
        tables = {}
        for name, parts in work.items():
            for part in parts:
                try:
                    rows = part()
                except torch.OutOfMemoryError:
                    print(
                        f"{name}: a size does not fit into the memory of {device} and is left out",
                        file=sys.stderr,
                    )
                    continue
                print(as_grid(rows, head=name not in tables), flush=True)
                tables.setdefault(name, []).extend(rows)
                done(tables)


def as_grid(rows: list[dict], head: bool = True) -> str:
    """Markdown, one line a row; numbers below 100 with three digits that count."""
    columns = list(dict.fromkeys(c for row in rows for c in row))
    show = lambda v: (
        ""
        if v is None
        else str(v)
        if isinstance(v, (str, int))
        else f"{v:#.3g}"
        if 0 < abs(v) < 99.95
        else f"{v:,.0f}"
    )
    text = grid(columns, [[show(row.get(c)) for c in columns] for row in rows])
    return text.strip() if head else "\n".join(text.strip().splitlines()[2:])


def page(tables: dict[str, list[dict]], command: str, minutes: float, device: str) -> str:
    """results/benchmark.md: the machine, the versions, the command, a table and a note each."""
    machine = (
        torch.cuda.get_device_name(device)
        if device != "cpu"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    how = (
        f"`{command}`, {minutes:.0f} minutes, {machine}, Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, timm {timm.__version__}, commit {commit()}."
    )
    parts = [
        f"## {name.replace('_', ' ').capitalize()}\n\n{NOTES[name]}\n\n{as_grid(rows)}\n"
        for name, rows in tables.items()
    ]
    return "# What pruning buys\n\n" + "\n\n".join([how, *parts])


def write(
    tables: dict[str, list[dict]], folder: Path, command: str, minutes: float, device: str
) -> None:
    """The page, and a figure beside it where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    text = page(tables, command, minutes, device)
    if importlib.util.find_spec("matplotlib") and "overhead" in tables:
        from .plots import benchmark_figure

        benchmark_figure(tables).savefig(folder / "benchmark.png", dpi=100)
        text += "\n![the same as curves: what prefill takes, where, beside peers, and how choosing grows](benchmark.png)\n"
    (folder / "benchmark.md").write_text(text)
