"""What pruning buys: time, memory and FLOPs at real sizes, beside rivals: `meteor-mini bench`.

Models have the published sizes and random weights: how long a prefill takes does not depend on what
the weights know. So token counts are given (the paper's), not found by ranks and lambda. All
contenders of a comparison run in one process and take turns, so that a busy moment of the machine
meets all of them alike; read the ratios, the seconds are those of one machine.

Tables:
    whole         from the picture to the first token: unpruned, EAGLE-style, METEOR
    peers         in the LLM alone, as many tokens kept on average: stage 3, FastV, PyramidDrop
    inside_a_vit  in one encoder alone, as many tokens out: stage 1, ToMe

Change here: `SIZES` (the models), `whole_contenders` and `llm_contenders` (a rival of your own).
"""

import math
import platform
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas
import timm
import tokenizers
import torch
import transformers
from matplotlib.figure import Figure
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.benchmark import timer  # waits for the GPU, then reads the clock
from transformers import Pix2StructVisionConfig, Pix2StructVisionModel, PreTrainedTokenizerFast

import stage1_encode
from stage3_decode import AdaptivePruner, average_tokens, default_layers, find_cache

from . import baselines, plots
from .budgets import Budget
from .flops import counted_flops, prefill_flops
from .model import Encoded, Meteor
from .pictures import view_of
from .weights import build_decoder

MIB = 2**20
# Visual tokens of the paper (Table 3): of all encoders, after stage 1, after stage 2, and from each
# pruned layer of the LLM on.
PAPER_ALL, PAPER_STAGE1, PAPER_STAGE2, PAPER_STAGE3 = 4096, 1193, 576, (396, 170, 76)
QUESTION = " ".join(["what"] * 32)
NEW = 9  # tokens that are generated
SIDES = (16, 24, 32)  # each of four encoders has n x n patches: 1024, 2304, 4096 visual tokens
BATCHES = (1, 4, 16)
ROUNDS = 3  # that count, after one that warms up
CPU_TOKENS = 16_384  # visual tokens in a batch, at most, on a CPU
SECONDS, QUICK_SECONDS = 160, 20  # that the rounds of a comparison may take; one always runs


# --------------------------------------------------------------------------------------- the models


def llama(width: int, layers: int, heads: int, kv_heads: int, mlp: int, words: int) -> dict:
    """Options of transformers' LlamaConfig."""
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": words,
        "max_position_embeddings": 8192,
    }


# patch: of CLIP and EVA; clip, pix2struct: options of the library's class; convnext, eva: timm's.
SMALL = {
    "patch": 16,
    "clip": {"width": 768, "layers": 12, "heads": 12},
    "convnext": "convnext_base",
    "eva": "eva02_base_patch16_clip_224",
    "pix2struct": {"hidden_size": 768, "num_hidden_layers": 12, "d_ff": 2048},
    "llama": llama(576, 30, 9, 3, 1536, 49152),  # SmolLM2-135M
}
LARGE = {  # the paper's encoders
    "patch": 14,
    "clip": {"width": 1024, "layers": 24, "heads": 16},
    "convnext": "convnext_xxlarge",
    "eva": "eva02_large_patch14_clip_224",
    "pix2struct": {"hidden_size": 1536, "num_hidden_layers": 18, "d_ff": 3968},
    "llama": llama(2048, 16, 32, 8, 8192, 128256),  # Llama-3.2-1B
}
LARGE_7B = LARGE | {"llama": llama(4096, 32, 32, 32, 11008, 32000)}  # Vicuna-7B
SIZES = {"small": SMALL, "large": LARGE, "large-7b": LARGE_7B}


def build_model(size: str, n: int) -> Meteor:
    """Four encoders of n x n patches and a Llama, with random weights."""
    options = SIZES[size]
    side = n * options["patch"]
    clip = VisionTransformer(
        image_size=side, patch_size=options["patch"], mlp_ratio=4, output_dim=8, **options["clip"]
    )
    convnext = timm.create_model(
        options["convnext"],
        num_classes=0,
        output_stride=16,
        pretrained_cfg_overlay={"input_size": (3, 16 * n, 16 * n)},
    )
    eva = timm.create_model(options["eva"], num_classes=0, img_size=side)
    heads = options["pix2struct"]["hidden_size"] // 64
    pix2struct = Pix2StructVisionModel(
        Pix2StructVisionConfig(
            seq_len=n * n,
            num_attention_heads=heads,
            initializer_range=0.02,  # the default, 1e-10, leaves its MLPs dead
            **options["pix2struct"],
        )
    )
    encoders = {"clip": clip, "convnext": convnext, "eva": eva, "pix2struct": pix2struct}
    return Meteor({}, build_tokenizer(), encoders, build_decoder(options["llama"])).eval()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """It knows one word, which is enough to ask a question of a given length."""
    words = {"<s>": 0, "</s>": 1, "<unk>": 2, "what": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


# ---------------------------------------------------------------------------------- who is compared


class Contender(NamedTuple):
    """One way from pictures to words.

    encode: pictures (B, 3, H, W) -> `Encoded`; pruner: as `Meteor.generate` takes it; layers:
    visual tokens in each layer of the LLM.
    """

    encode: Callable[[Tensor], Encoded]
    pruner: baselines.Pruner | None
    layers: list[int]


def whole_contenders(model: Meteor) -> dict[str, Contender]:
    """Unpruned; EAGLE-style, a token for each grid cell; METEOR at the paper's counts.

    "METEOR, keeps nearly all" makes every choice that METEOR makes, and drops one token at each in
    stages 1 and 2 and none in stage 3: its time beside the unpruned model's is what choosing costs.
    """
    L, N = model.decoder.config.num_hidden_layers, model.num_tokens
    n = N // 4  # tokens of an encoder
    K = scale_count(PAPER_STAGE2, N)
    counts = {i: scale_count(k, N) for i, k in zip(default_layers(L), PAPER_STAGE3)}
    meteor = Budget(stage1=scale_count(PAPER_STAGE1, N), stage2=K)
    # Three encoders are pruned at all points, the ConvNeXt at its output only.
    nearly_all = Budget(stage1=(3 * (n - 1), 3 * (n - 2), 4 * (n - 3)), stage2=4 * (n - 3) - 1)
    keep_all = partial(AdaptivePruner, lam=math.inf)
    equal_ranks = torch.ones(3, 4)
    fusion = baselines.channel_fusion(model).to(model.decoder.dtype)
    return {
        "unpruned": Contender(partial(model.encode, budget=Budget.keep_all()), None, [N] * L),
        "EAGLE-style": Contender(partial(baselines.encode_channels, model, fusion), None, [n] * L),
        "METEOR": Contender(
            partial(model.encode, budget=meteor, ranks=equal_ranks),
            baselines.fixed(counts),
            count_by_layer(K, counts, L),
        ),
        "METEOR, keeps nearly all": Contender(
            partial(model.encode, budget=nearly_all, ranks=equal_ranks),
            keep_all,
            [nearly_all.stage2] * L,
        ),
    }


def llm_contenders(model: Meteor, images: Tensor) -> dict[str, Contender]:
    """Stage 3 at the paper's counts, and its peers with the same mean over the layers.

    All get the same visual tokens, V of them, encoded once before the clock starts.
    """
    encoded = model.encode(images, Budget.keep_all())

    def reuse(images: Tensor) -> Encoded:
        return encoded

    L, V = model.decoder.config.num_hidden_layers, model.num_tokens
    layers = default_layers(L)
    stage3 = {i: round(V * k / PAPER_STAGE2) for i, k in zip(layers, PAPER_STAGE3)}
    average = average_tokens(V, list(stage3.values()), layers, L)
    early = baselines.fastv_count(V, average, 2, L)
    pyramid = baselines.pyramid_counts(V, average, L)
    pruners = {
        "unpruned": (None, {}),
        "stage 3": (baselines.fixed(stage3), stage3),
        "stage 3, keeps all": (partial(AdaptivePruner, lam=math.inf), {}),
        "FastV": (baselines.fastv(early, 2), {2: early}),
        "FastV, eager": (baselines.fastv(early, 2, eager=True), {2: early}),
        "PyramidDrop": (baselines.pyramid_drop(pyramid), pyramid),
    }
    return {
        name: Contender(reuse, pruner, count_by_layer(V, counts, L))
        for name, (pruner, counts) in pruners.items()
    }


def scale_count(count: int, N: int) -> int:
    """One of the paper's counts, in proportion for a model of N visual tokens."""
    return round(N * count / PAPER_ALL)


def count_by_layer(K: int, counts: dict[int, int], L: int) -> list[int]:
    """Visual tokens in each of L layers: K at first, counts[i] from layer i on."""
    layers = []
    for layer in range(L):
        K = counts.get(layer, K)
        layers.append(K)
    return layers


# --------------------------------------------------------------------------------- how it is timed


@torch.no_grad()
def time_answer(model: Meteor, contender: Contender, images: Tensor) -> dict[str, float]:
    """One run from pictures to `NEW` tokens.

    Returns: ms to the first token, encode_ms of it until the visual tokens are there, decode_ms for
        each of the other tokens, kv_mib of the KV cache, and on a GPU peak_mib, the weights
        included.
    """
    times = []

    def note(ids: Tensor) -> None:
        times.append(timer())

    streamer = SimpleNamespace(put=note, end=lambda: None)  # gets the prompt, then each new token
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    start = timer()
    encoded = contender.encode(images)
    encoded_at = timer()
    output, _ = model.generate(
        encoded,
        [QUESTION] * len(images),
        Budget.keep_all(),
        contender.pruner,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        streamer=streamer,
        return_dict_in_generate=True,
    )
    _, first, *others = times
    cache = find_cache(output)
    kv = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    figures = {
        "ms": 1000 * (first - start),
        "encode_ms": 1000 * (encoded_at - start),
        "decode_ms": 1000 * (others[-1] - first) / len(others),
        "kv_mib": kv / MIB,
    }
    if on_gpu:
        figures["peak_mib"] = torch.cuda.max_memory_allocated(model.device) / MIB
    return figures


@torch.no_grad()
def time_call(work: Callable[[], object]) -> dict[str, float]:
    start = timer()
    work()
    return {"ms": 1000 * (timer() - start)}


def take_turns(work: dict[str, Callable[[], dict]], seconds: float) -> pandas.DataFrame:
    """Run every contender once a round, in another order each time. The first round warms up; it
    counts where it is the only one that fits into `seconds`.

    Returns: a row for each run that counts: "round", "method", what the run returned, "ms" among
        it, and speed_up, the time of "unpruned" over the row's in the same round.
    """
    runs, start, rng = [], timer(), np.random.default_rng(0)
    for number in range(1 + ROUNDS):
        elapsed = timer() - start
        if number > 0 and elapsed + elapsed / number > seconds:
            break
        for name in rng.permutation(list(work)):
            runs.append({"round": number, "method": str(name)} | work[name]())
    runs = pandas.DataFrame(runs)
    after_the_first = runs[runs["round"] > 0]
    runs = runs if after_the_first.empty else after_the_first
    unpruned = runs[runs["method"] == "unpruned"].set_index("round")["ms"]
    runs = runs.assign(speed_up=runs["round"].map(unpruned) / runs["ms"])
    as_given = pandas.Series(range(len(work)), index=list(work))
    return runs.sort_values("method", key=lambda names: names.map(as_given), kind="stable")


def compare(
    work: dict[str, Callable[[], dict]], flops: dict[str, float], seconds: float
) -> pandas.DataFrame:
    """A row for each contender: medians over the rounds, and ratios to "unpruned".

    speed_up: the unpruned time over the row's in the same round; the median, least and most.
    realised: speed_up / flops_ratio, 1 where time falls as FLOPs do.
    """
    runs = take_turns(work, seconds)
    by_method = runs.groupby("method", sort=False)
    rows = by_method.median().drop(columns="round")
    rows["rounds"] = by_method.size()
    rows["least"] = by_method["speed_up"].min()
    rows["most"] = by_method["speed_up"].max()
    rows["flops_ratio"] = flops["unpruned"] / pandas.Series(flops)
    rows["realised"] = rows["speed_up"] / rows["flops_ratio"]
    return rows


# ------------------------------------------------------------------------------------- the tables


def compare_models(
    model: Meteor, contenders: dict[str, Contender], images: Tensor, seconds: float
) -> pandas.DataFrame:
    """Rows of `whole` or `peers` for a batch of pictures; seconds: as in `take_turns`."""
    work = {name: partial(time_answer, model, c, images) for name, c in contenders.items()}
    flops = {name: count_flops(model, c, images[:1]) for name, c in contenders.items()}
    rows = compare(work, flops, seconds)
    rows["mean_tokens"] = [sum(c.layers) / len(c.layers) for c in contenders.values()]
    rows["tokens_out"] = [c.layers[-1] for c in contenders.values()]
    rows["batch"] = len(images)
    rows["visual_tokens"] = model.num_tokens
    return rows


def count_flops(model: Meteor, contender: Contender, image: Tensor) -> float:
    """Of one picture (1, 3, H, W), up to the first token; the pruner's own in the LLM excepted."""
    text = len(model.before_ids) + len(model.tokenize([QUESTION])[0])
    in_the_llm = prefill_flops(model.decoder.config, contender.layers, text)
    return counted_flops(partial(contender.encode, image)) + in_the_llm


def compare_in_a_vit(vit: nn.Module, images: Tensor, seconds: float) -> pandas.DataFrame:
    """Stage 1 drops at three points, none in the first third of the blocks; ToMe merges r tokens in
    every block. Both end at the paper's share of the N tokens, K.

    Args: vit: a VisionTransformer of timm; images (B, 3, H, W) at its input size; seconds: as in
        `take_turns`.
    """
    N, blocks = view_of(vit).num_tokens, len(vit.blocks)
    r = round(N * (1 - PAPER_STAGE1 / PAPER_ALL) / blocks)
    K = N - blocks * r
    keep = [round(N * (K / N) ** (point / 3)) for point in (1, 2, 3)]
    encode = {
        "unpruned": partial(stage1_encode.encode, vit, images),
        "stage 1": partial(stage1_encode.encode, vit, images, keep),
        "ToMe": partial(baselines.tome, vit, images, r),
        "ToMe, eager": partial(baselines.tome, vit, images, r, eager=True),
    }
    work = {name: partial(time_call, once) for name, once in encode.items()}
    flops = {name: counted_flops(once) for name, once in encode.items()}
    rows = compare(work, flops, seconds)
    merged = N - r * (blocks - 1) / 2
    rows["mean_tokens"] = [N, (N + keep[0] + keep[1]) / 3, merged, merged]  # into the blocks
    rows["tokens_out"] = [N, K, K, K]
    rows["batch"] = len(images)
    rows["visual_tokens"] = N
    return rows


def build_vit(n: int) -> nn.Module:
    """SigLIP's ViT-B/16 with n x n patches: it has no CLS, so that all tokens are the queries."""
    name = "vit_base_patch16_siglip_256"
    return timm.create_model(name, img_size=16 * n, num_classes=0, global_pool="").eval()


def measure(
    size: str, device: str, dtype: torch.dtype, quick: bool
) -> Iterator[tuple[str, pandas.DataFrame]]:
    """Yield (table, rows), one comparison after another."""
    sides, batches = (SIDES[:1], BATCHES[:1]) if quick else (SIDES, BATCHES)
    seconds = QUICK_SECONDS if quick else SECONDS
    for n in sides:
        model = build_model(size, n).to(device, dtype)
        images = torch.rand(max(batches), 3, 256, 256, device=device)
        whole = whole_contenders(model)
        for batch in batches:
            if device != "cpu" or batch * model.num_tokens <= CPU_TOKENS:
                yield "whole", compare_models(model, whole, images[:batch], seconds)
        peers = llm_contenders(model, images[:1])
        of_llm = compare_models(model, peers, images[:1], seconds)
        yield "peers", of_llm.drop(columns="encode_ms")  # encoded before the clock starts
    for n in sides:
        vit = build_vit(n).to(device, dtype)
        images = torch.rand(1, 3, 16 * n, 16 * n, device=device, dtype=dtype)
        yield "inside_a_vit", compare_in_a_vit(vit, images, seconds)


def run(size: str, device: str, dtype: torch.dtype, quick: bool, folder: Path | None) -> None:
    """Print every table, and keep what there is in `folder`: benchmark.csv, .png and .md.

    Args: size: of `SIZES`; quick: the smallest comparisons alone; folder: None writes nothing.
    Raises: ValueError for a size that is not in `SIZES`.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    setup = describe_setup(size, device, dtype)
    print(setup)
    parts = []
    for table, rows in measure(size, device, dtype, quick):
        rows = rows.reset_index()  # "method" becomes a column
        print(f"\n{table}\n{as_text(rows)}", flush=True)
        parts.append(rows.assign(table=table, setup=setup))
        if folder is not None:
            save(pandas.concat(parts), folder)


# --------------------------------------------------------------------------------- how it is shown

FIELDS = (
    "visual_tokens batch method mean_tokens tokens_out rounds ms encode_ms speed_up least most "
    "flops_ratio realised decode_ms kv_mib peak_mib"
).split()
TITLES = {
    "whole": "From the picture to the first token",
    "peers": "In the LLM alone, equal mean tokens",
    "inside_a_vit": "In a SigLIP ViT-B/16, equal tokens out",
}
PAGE = """# What pruning buys

Written by `meteor-mini bench` from [benchmark.csv](benchmark.csv). {setup}; random weights, so the
counts are given: the paper's, in proportion to the visual tokens.

![speed-up over the number of visual tokens](benchmark.png)

Batch 1. Solid: measured, from the least to the most of the rounds; dotted: the ratio of FLOPs.

The contenders of a comparison take turns in one process; where `rounds` is 1, only the warm-up
round was run. `ms`: milliseconds to the first token, or of the encoding, median of the rounds;
`encode_ms`: those of them until the visual tokens are there; the rest is the LLM's. `speed_up`: the
unpruned model's time over the row's in the same round, median, `least` and `most`. `flops_ratio`:
the unpruned FLOPs over the row's, encoders, projectors and prefill. `realised`: `speed_up` over
`flops_ratio`, 1 where time falls as FLOPs do. `mean_tokens`: visual tokens, mean over the layers;
`tokens_out`: in the last one. `decode_ms`: of each later token; `kv_mib`: size of the KV cache.
FLOPs count attention in full, as if it were not causal, and nothing that a pruner computes in the
LLM.

*METEOR, keeps nearly all* makes all of METEOR's choices and drops almost nothing, *stage 3, keeps
all* those of stage 3: their `speed_up` falls short of 1 by the cost of choosing, where `least` and
`most` are close enough to resolve it. *FastV, eager* and *ToMe, eager* materialise the attention
matrix, as the authors' code does. At equal mean tokens FastV has the fewest FLOPs here: it drops
early and at once, and attention grows with the square.
"""


def describe_setup(size: str, device: str, dtype: torch.dtype) -> str:
    if device == "cpu":
        machine = f"{platform.machine()}, CPU threads: {torch.get_num_threads()}"
    else:
        machine = torch.cuda.get_device_name(device)
    libraries = ", ".join(f"{x.__name__} {x.__version__}" for x in (torch, transformers, timm))
    return f"Size {size}, {str(dtype).removeprefix('torch.')}, {machine}, {libraries}"


def as_text(rows: pandas.DataFrame) -> str:
    """A table of the columns that hold anything."""
    columns = [name for name in FIELDS if name in rows and rows[name].notna().any()]
    return rows[columns].to_string(index=False, float_format="{:,.2f}".format)


def save(frame: pandas.DataFrame, folder: Path) -> None:
    """benchmark.csv, and the figure and the page that are made from it."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = [name for name in ("table", *FIELDS, "setup") if name in frame]
    frame.to_csv(folder / "benchmark.csv", columns=columns, index=False, float_format="%.5g")
    frame = pandas.read_csv(folder / "benchmark.csv")
    draw(frame).savefig(folder / "benchmark.png", dpi=100)
    page = PAGE.format(setup=frame["setup"].iloc[0])
    for table, rows in frame.groupby("table", sort=False):
        page += f"\n## {TITLES[table]}\n\n```text\n{as_text(rows)}\n```\n"
    (folder / "benchmark.md").write_text(page)


def draw(frame: pandas.DataFrame) -> Figure:
    """Speed-ups at batch 1 over the visual tokens, a panel for each table of benchmark.csv."""
    tables = list(frame.groupby("table", sort=False))
    figure = Figure(figsize=(5 * len(tables), 4), layout="constrained")
    panels = figure.subplots(1, len(tables), squeeze=False)[0]
    for panel, (table, rows) in zip(panels, tables):
        pruned = rows[(rows["batch"] == 1) & (rows["method"] != "unpruned")]
        for place, (method, own) in enumerate(pruned.groupby("method", sort=False)):
            color, marker = (c[place % len(c)] for c in (plots.PALETTE, plots.MARKERS))
            x = own["visual_tokens"]
            panel.plot(x, own["speed_up"], color=color, marker=marker, label=method)
            panel.fill_between(x, own["least"], own["most"], color=color, alpha=0.2)
            panel.plot(x, own["flops_ratio"], color=color, linestyle=":")
        panel.axhline(1, color="gray", linewidth=0.8)
        panel.set_title(TITLES[table], fontsize=10, loc="left")
        panel.set_xlabel("visual tokens")
        panel.set_ylabel("speed-up (unpruned = 1)")
        panel.set_ylim(bottom=0)
        panel.set_xticks(sorted(pruned["visual_tokens"].unique()))
        panel.legend(fontsize=8, frameon=False)
    return figure
