"""What pruning buys: time, memory and FLOPs on real architectures at real sizes, side by side with
peers: `meteor-mini bench`.

All contenders of a table run in one process, taking turns; a figure is the median of its rounds.
Nothing here asserts a time. `contenders.py` says what is compared, `timing.py` how it is measured,
`bench_page.py` how it is shown.
"""

import contextlib
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import open_clip
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

import stage1_encode
import stage2_fuse
from stage1_encode import EncoderPruner
from stage3_decode import AdaptivePruner, average_tokens, default_layers

from .. import baselines
from ..toy.evaluate import encoding_flops, prefill_flops
from ..model import Meteor
from ..pictures import view_of
from ..weights import build_decoder
from .bench_page import NOTES, as_grid, write
from .contenders import (
    HEADS,
    NEW,
    PAPER_ALL,
    PAPER_STAGE1,
    PAPER_STAGE2,
    PAPER_STAGE3,
    SIZES,
    TEXT,
    Contender,
    build,
    contenders,
    pruned_and_not,
    run,
    spread,
)
from .tables import fastv_count, pyramid_counts
from .timing import (
    PARTS,
    Clock,
    least_and_most,
    median,
    median_of,
    peak,
    seconds_of,
    stopwatch,
    synchronize,
    turns,
)

__all__ = ["NOTES", "SIZES", "bench", "write"]

MIB = 2**20
CPU_TOKENS = 20_000  # visual tokens in a batch, at most, on a CPU
CHOOSING = (
    "stage 1",
    "stage 2",
    "stage 3",
)  # parts of a prefill that are no layer and no projector


# ------------------------------------------------------------------ from pictures to words
# Each table is a list of rows, {column: number or text}.


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
    """Unpruned, EAGLE-style and METEOR, at 4 n^2 visual tokens.

    Args: size: of `SIZES`; batches: how many pictures at a time; runs, seconds: of `turns`.
    """
    model = build(size, n, device, dtype)
    everyone = contenders(model)
    flops = {name: flops_of(model, contender) for name, contender in everyone.items()}
    rows = []
    for batch in batches:
        images = torch.rand(batch, 3, 256, 256, device=device)
        work = {name: partial(run, model, c, images) for name, c in everyone.items()}
        warm = batch > batches[0]
        timed = turns(work, runs, seconds, warm)
        for name, contender in everyone.items():
            row = {"visual tokens": model.num_tokens, "batch": batch, "contender": name}
            row["tokens in the LLM"] = statistics.mean(contender.layers)
            row |= whole_figures(timed[name], timed["unpruned"], flops["unpruned"] / flops[name])
            if batch == 1 or device != "cpu":
                first_token = partial(run, model, contender, images, new=1)
                row["peak memory, MiB"] = peak(model.device, first_token) / MIB
            rows.append(row)
    return rows


def whole_figures(own: list[dict], full: list[dict], flops_ratio: float) -> dict[str, float]:
    """What `run` measured of one contender beside the unpruned model."""
    prefill = median(own, "prefill")
    least, most = least_and_most(own, "prefill")
    speed_up = median(full, "prefill") / prefill
    return {
        "prefill, s": prefill,
        "least": least,
        "most": most,
        "runs": len(own),
        "speed-up": speed_up,
        "FLOPs ratio": flops_ratio,
        "realised": speed_up / flops_ratio,
        "decode, ms a token": 1000 * median(own, "decode"),
        "KV cache, MiB": own[0]["kv"] / MIB,
    }


def flops_of(model: Meteor, contender: Contender) -> float:
    """Of one picture, up to the first token."""

    def encode(model: Meteor, images: Tensor) -> object:
        return contender.encode(images)

    text = TEXT + 2  # with <bos> and <ans>
    in_the_llm = prefill_flops(model.decoder.config, contender.layers, text)
    return encoding_flops(model, encode) + in_the_llm


@torch.no_grad()
def split(size: str, n: int, device: str, dtype: torch.dtype, runs: int) -> list[dict]:
    """Where the time of a prefill goes, batch 1; *selection*: `CHOOSING` together."""
    model = build(size, n, device, dtype)
    images = torch.rand(1, 3, 256, 256, device=device)
    rows = []
    for name, contender in pruned_and_not(model).items():
        run(model, contender, images, new=1)
        samples = []
        for _ in range(runs):
            with stopwatch(model.device) as spent:
                run(model, contender, images, new=1)
            samples.append(Counter(spent))
        parts = {part: median(samples, part) for part in PARTS}
        choosing = sum(parts[part] for part in CHOOSING)
        row = {"visual tokens": model.num_tokens, "contender": name}
        for part in PARTS:
            row[f"{part}, ms"] = 1000 * parts[part]
        row["selection, % of prefill"] = 100 * choosing / sum(parts.values())
        rows.append(row)
    return rows


@torch.no_grad()
def kernels(
    size: str, n: int, device: str, dtype: torch.dtype, runs: int, seconds: float
) -> list[dict]:
    """Prefill with PyTorch's fused (flash) attention, with its plain one, and with the LLM's MLPs
    compiled by torch.compile.
    """
    model = build(size, n, device, dtype)
    images = torch.rand(1, 3, 256, 256, device=device)
    everyone = pruned_and_not(model)
    plain = [SDPBackend.MATH]
    # The first that serves the mask is taken.
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    work = {}
    for name, contender in everyone.items():
        work[name, "fused"] = partial(run_on, fused, model, contender, images)
        work[name, "plain"] = partial(run_on, plain, model, contender, images)
    timed = turns(work, runs, seconds)

    for layer in model.decoder.model.layers:
        # Whole layers would be compiled anew for each kind of mask, for minutes.
        layer.mlp.compile(dynamic=True)
    work = {}
    for name, contender in everyone.items():
        work[name, "fused, MLPs compiled"] = partial(run_on, fused, model, contender, images)
    try:
        timed |= turns(work, runs, seconds)
    except torch._dynamo.exc.BackendCompilerFailed as error:  # as without a C++ compiler
        cause = str(error).splitlines()[0]
        print(f"kernels: torch.compile does not work here: {cause}", file=sys.stderr)

    rows = []
    for (name, kind), results in timed.items():
        prefill = median(results, "prefill")
        row = {"visual tokens": model.num_tokens, "contender": name, "kernels": kind}
        row |= {"prefill, s": prefill, "runs": len(results)}
        row["speed-up"] = median(timed["unpruned", kind], "prefill") / prefill
        rows.append(row)
    return rows


def run_on(
    backends: list[SDPBackend], model: Meteor, contender: Contender, images: Tensor
) -> dict[str, float]:
    """`run` up to the first token, with these kinds of attention."""
    with sdpa_kernel(backends, set_priority=True):
        return run(model, contender, images, new=1)


# ------------------------------------------------------------------ in the LLM alone


@torch.no_grad()
def peers(
    size: str, V: int, device: str, dtype: torch.dtype, runs: int, seconds: float
) -> list[dict]:
    """V random visual tokens in: as many kept on average by each, as near as their rules allow."""
    model = build_decoder(SIZES[size]["llama"]).eval().to(device, dtype)
    pruners = peer_pruners(V, model.config.num_hidden_layers)
    embed = model.get_input_embeddings().weight
    embeds = embed[torch.randint(len(embed), (1, V + TEXT), device=device)]
    visual_mask = (torch.arange(V + TEXT, device=device) < V)[None]

    work = {}
    for name, pruner in pruners.items():
        work[name] = partial(generate, model, pruner, embeds, visual_mask)
    timed = turns(work, runs, seconds)
    flops = {}
    for name, results in timed.items():
        flops[name] = prefill_flops(model.config, results[0]["layers"], TEXT)

    rows = []
    for name, results in timed.items():
        prefill = median(results, "prefill")
        least, most = least_and_most(results, "prefill")
        row = {
            "visual tokens": V,
            "method": name,
            "mean tokens": statistics.mean(results[0]["layers"]),
            "prefill, s": prefill,
            "least": least,
            "most": most,
            "runs": len(results),
            "speed-up": median(timed["unpruned"], "prefill") / prefill,
            "FLOPs ratio": flops["unpruned"] / flops[name],
            "decode, ms a token": 1000 * median(results, "decode"),
        }
        row["peak memory, MiB"] = peak(model.device, partial(work[name], new=1)) / MIB
        rows.append(row)
    return rows


def peer_pruners(V: int, L: int) -> dict[str, baselines.Pruner | None]:
    """Stage 3 at the paper's counts, and its peers at counts with the same mean over L layers."""
    layers = default_layers(L)
    counts = {i: round(V * k / PAPER_STAGE2) for i, k in zip(layers, PAPER_STAGE3)}
    average = average_tokens(V, list(counts.values()), layers, L)
    early = fastv_count(V, average, 2, L)
    pyramid = pyramid_counts(V, average)
    quarters = [L * quarter // 4 for quarter in (1, 2, 3)]
    missed_by = average_tokens(V, pyramid, quarters, L) - average  # where 4 does not divide L
    pyramid = pyramid_counts(V, average - missed_by)
    return {
        "unpruned": None,
        "stage 3": baselines.fixed(counts, HEADS),
        "FastV, eager": baselines.fastv(early, 2, eager=True),
        "FastV, SDPA": baselines.fastv(early, 2),
        "PyramidDrop": baselines.pyramid_drop(pyramid, L),
    }


def generate(
    model: PreTrainedModel,
    make_pruner: baselines.Pruner | None,
    embeds: Tensor,
    visual_mask: Tensor,
    new: int = NEW,
) -> dict:
    """`new` tokens after a prompt embeds (1, S, D), under a pruner.

    Returns: as `Clock.seconds`, and "layers": visual tokens in each layer.
    """
    clock = Clock(model.device)
    pruner = make_pruner(model, visual_mask) if make_pruner is not None else None
    synchronize(model.device)
    start = time.perf_counter()
    with pruner or contextlib.nullcontext():
        model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones_like(visual_mask, dtype=torch.long),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            streamer=clock,
            pad_token_id=0,
        )
    counts = {}
    if pruner is not None:
        counts = {i: int(count) for i, count in pruner.counts.items()}
    V, L = int(visual_mask.sum()), model.config.num_hidden_layers
    return clock.seconds(start) | {"layers": spread(V, counts, L)}


# ------------------------------------------------------------------ in one encoder alone


@torch.no_grad()
def inside_a_vit(n: int, device: str, dtype: torch.dtype, runs: int, seconds: float) -> list[dict]:
    """A SigLIP ViT-B/16 of timm with n x n patches: stage 1 and ToMe, both to the paper's share of
    the tokens.
    """
    vit = siglip(n).to(device, dtype)
    N, blocks = n * n, len(vit.blocks)
    merged = round(N * (1 - PAPER_STAGE1 / PAPER_ALL) / blocks)  # by ToMe in each block
    K = N - blocks * merged
    keep = (round(N * (K / N) ** (1 / 3)), round(N * (K / N) ** (2 / 3)), K)
    images = torch.rand(1, 3, 16 * n, 16 * n, device=device)
    work = {
        "unpruned": partial(stage1_tokens, vit, images),
        "stage 1": partial(stage1_tokens, vit, images, keep),
        "ToMe": partial(tome_tokens, vit, images, merged),
        "ToMe, eager": partial(tome_tokens, vit, images, merged, eager=True),
    }
    in_the_blocks = {
        "unpruned": N,
        "stage 1": (N + keep[0] + keep[1]) / 3,
        "ToMe": N - merged * (blocks - 1) / 2,
        "ToMe, eager": N - merged * (blocks - 1) / 2,
    }
    tokens_out = {name: once().shape[1] for name, once in work.items()}
    timed = turns(
        {name: partial(timed_once, once, images.device) for name, once in work.items()},
        runs,
        seconds,
    )
    rows = []
    for name, results in timed.items():
        least, most = least_and_most(results, "s")
        row = {
            "patches": N,
            "method": name,
            "tokens out": tokens_out[name],
            "mean tokens": in_the_blocks[name],
            "encoding, s": median(results, "s"),
            "least": least,
            "most": most,
            "runs": len(results),
            "speed-up": median(timed["unpruned"], "s") / median(results, "s"),
        }
        rows.append(row)
    return rows


def siglip(n: int, **options) -> nn.Module:
    """timm's ViT-B/16 of SigLIP for n x n patches: no CLS token, so all rows of attention count."""
    model = timm.create_model(
        "vit_base_patch16_siglip_256", img_size=16 * n, num_classes=0, global_pool="", **options
    )
    return model.eval()


def stage1_tokens(vit: nn.Module, images: Tensor, keep: tuple = (None,)) -> Tensor:
    """What stage 1 makes of pictures (B, 3, H, W) in [0, 1], with the preprocessing. (B, K, D)"""
    tokens, _ = stage1_encode.encode(vit, vit_pixels(vit, images), keep)
    return tokens


def tome_tokens(vit: nn.Module, images: Tensor, r: int, eager: bool = False) -> Tensor:
    """What ToMe makes of them. (B, N - L r, D)"""
    return baselines.tome(vit, vit_pixels(vit, images), r, eager)


def vit_pixels(vit: nn.Module, images: Tensor) -> Tensor:
    return view_of(vit)(images).to(vit.patch_embed.proj.weight.dtype)


def timed_once(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    return {"s": seconds_of(work, device)}


# ------------------------------------------------------------------ what choosing costs


@torch.no_grad()
def growth(
    size: str, sizes: list[int], pairwise_up_to: int, device: str, dtype: torch.dtype
) -> list[dict]:
    """Stage 2's choice among N tokens of 4 encoders: by sums and by all pairs."""
    rows, device = [], torch.device(device)
    D = SIZES[size]["llama"]["hidden_size"]
    for N in sizes:
        tokens = [torch.randn(1, N // 4, D, device=device, dtype=dtype) for _ in range(4)]
        by_sums = partial(stage2_fuse.fuse, tokens, N // 2)
        row = {
            "N": N,
            "by sums, ms": 1000 * median_of(by_sums, device),
            "by sums, MiB": peak(device, by_sums) / MIB,
        }
        if N <= pairwise_up_to:
            by_pairs = partial(choose_by_pairs, tokens, N // 2)
            row["by pairs, ms"] = 1000 * median_of(by_pairs, device)
            row["by pairs, MiB"] = peak(device, by_pairs) / MIB
        rows.append(row)
    return rows


def choose_by_pairs(tokens: list[Tensor], K: int) -> Tensor:
    """The K tokens of all encoders that stage 2 keeps, (B, K), by its formula as it is written."""
    return stage2_fuse.lowest(pairwise_redundancy(tokens), K)


def pairwise_redundancy(tokens: list[Tensor]) -> Tensor:
    """Stage 2's formula as it is written, with all pairs of tokens of different encoders: what
    `mutual_redundancy` avoids.

    Args: tokens: C x (B, n_l, D). Returns: (B, sum of n_l).
    """
    units = [F.normalize(z.float(), dim=-1) for z in tokens]
    redundancies = []
    for j, own in enumerate(units):
        others = [unit for l, unit in enumerate(units) if l != j]
        redundancies.append(sum((own @ other.mT).sum(dim=-1) for other in others))
    return torch.cat(redundancies, dim=1)


@torch.no_grad()
def overhead(size: str, sides: list[int], device: str, dtype: torch.dtype) -> list[dict]:
    """One choice of stages 1 and 3 in percent of the block of a ViT, or of the layer of the LLM,
    that it is made in.
    """
    rows = []
    for n in sides:
        clip = shallow_clip(SIZES[size]["clip"], n).to(device, dtype)
        no_cls = siglip(n, depth=3).to(device, dtype)
        of_cls, _ = stage1_overhead(clip, device, dtype)
        of_all, of_similarity = stage1_overhead(no_cls, device, dtype)
        llama = SIZES[size]["llama"] | {"num_hidden_layers": 4}
        decoder = build_decoder(llama).eval().to(device, dtype)
        rows.append(
            {
                "tokens": n * n,
                "stage 1, attention of CLS, % of a block": of_cls,
                "stage 1, attention of all rows, % of a block": of_all,
                "stage 1, similarity, % of a block": of_similarity,
                "stage 3, a selection, % of a layer": stage3_overhead(decoder, n * n),
            }
        )
    return rows


def shallow_clip(size: dict, n: int) -> nn.Module:
    """open_clip's ViT of three blocks, as wide as that of `SIZES`."""
    model = open_clip.transformer.VisionTransformer(
        image_size=16 * n,
        patch_size=16,
        width=size["width"],
        layers=3,
        heads=size["heads"],
        mlp_ratio=4,
        output_dim=8,
    )
    return model.eval()


def stage1_overhead(vit: nn.Module, device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Choosing half of the patches by attention and by similarity, each in percent of a block."""
    blocks = EncoderPruner(vit, [None]).blocks
    view = view_of(vit)
    pixels = torch.rand(1, 3, *view.size, device=device, dtype=dtype)
    N, percents = view.num_tokens, []
    for rule in (baselines.AttentionPruner, EncoderPruner):  # of one part: similarity
        samples = []
        for _ in range(4):
            with stopwatch(torch.device(device)) as spent:
                stage1_encode.encode(vit, pixels, [N // 2], rule)
            samples.append(100 * spent["stage 1"] * len(blocks) / spent["encoders"])
        percents.append(statistics.median(samples[1:]))  # the first warms up
    return tuple(percents)


def stage3_overhead(decoder: PreTrainedModel, V: int, runs: int = 3) -> float:
    """One selection among V visual tokens in percent of a layer: lambda infinity keeps all, so that
    all layers stay equal.
    """
    D, L, device = decoder.config.hidden_size, decoder.config.num_hidden_layers, decoder.device
    embeds = torch.randn(1, V + TEXT, D, device=device, dtype=decoder.dtype)
    visual_mask = (torch.arange(V + TEXT, device=device) < V)[None]
    layers = list(range(1, L))
    read_prompt = partial(decoder.model, inputs_embeds=embeds)
    percents = []
    for _ in range(1 + runs):
        with stopwatch(device) as spent:
            with AdaptivePruner(decoder, visual_mask, float("inf"), layers):
                spent.clear()  # of making and entering the pruner
                total = seconds_of(read_prompt, device)
                choosing = spent["stage 3"]
        a_selection, a_layer = choosing / len(layers), (total - choosing) / L
        percents.append(100 * a_selection / a_layer)
    return statistics.median(percents[1:])  # the first warms up


# ------------------------------------------------------------------ all tables


def bench(
    size: str, device: str, dtype: torch.dtype, quick: bool, done: Callable[[dict], None]
) -> None:
    """Make all tables, {name: rows}, and print each.

    What does not fit into a GPU's memory is left out, and said.

    Args:
        size: of `SIZES`; quick: the smallest sizes, in under 3 minutes on 2 cores.
        done: called with the tables there are, each time that one has grown.
    """
    tables = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, part in plan(size, device, dtype, quick):
            try:
                rows = part()
            except torch.OutOfMemoryError:
                left_out = f"a size does not fit into the memory of {device} and is left out"
                print(f"{name}: {left_out}", file=sys.stderr)
                continue
            print(as_grid(rows, head=name not in tables), flush=True)
            tables.setdefault(name, []).extend(rows)
            done(tables)


def plan(
    size: str, device: str, dtype: torch.dtype, quick: bool
) -> list[tuple[str, Callable[[], list[dict]]]]:
    """What `bench` runs, in order: (table, what makes rows of it)."""
    at = {"device": device, "dtype": dtype}
    if quick:
        sides, vit_sides, batches, timing = [16], [16], [1], {"runs": 3, "seconds": 30}
        growing, pairwise_up_to = [4**i for i in range(5, 8)], 4**6
    else:
        sides, vit_sides, batches = [16, 24, 32], [24, 32], [1, 4, 16]
        timing = {"runs": 5, "seconds": 80}
        growing, pairwise_up_to = [4**i for i in range(5, 9)], 4**7

    parts = []
    for n in sides:
        allowed = [b for b in batches if device != "cpu" or b * 4 * n * n <= CPU_TOKENS]
        parts.append(("whole", partial(whole, size, n, allowed, **at, **timing)))
    for n in sides:
        parts.append(("split", partial(split, size, n, **at, runs=3)))
    for n in sides:
        parts.append(("peers", partial(peers, size, 4 * n * n, **at, **timing)))
    for n in vit_sides:
        parts.append(("inside_a_vit", partial(inside_a_vit, n, **at, **timing)))
    parts.append(("growth", partial(growth, size, growing, pairwise_up_to, **at)))
    parts.append(("overhead", partial(overhead, size, sides, **at)))
    if not quick:
        parts.append(("kernels", partial(kernels, size, 24, **at, **timing)))
    return parts
