"""How the tables of `bench` are shown: results/benchmark.md, a note to each, and its figure."""

import importlib.util
import platform
from pathlib import Path

import timm
import torch
import transformers

from .markdown import commit, grid

NOTES = {
    "whole": "From pictures to words, random weights. METEOR: the paper's counts (4096, 1193, 576, "
    "396-170-76) in proportion to the visual tokens. *speed-up* and *FLOPs ratio*: unpruned over "
    "the row; *realised*: the first over the second, 1.00 where time falls as counted FLOPs do "
    "(causal attention counted in full, stage 3's own q and k not). *prefill*: median, least and "
    "most of the runs. *peak memory*: tensors above the weights.",
    "split": "Median milliseconds of each part in runs of their own. *selection*: stages 1 to 3, "
    "without blocks, projectors and layers; a third of it (by cProfile, at 2304 tokens) are "
    "queries and keys that stage 1 computes once more at two points of each ViT, because fused "
    "attention gives none away.",
    "peers": "In the LLM alone, the same decoder, as many tokens kept. *FastV, eager*: ranked by "
    "the weights of the layer before, with all layers on eager attention, as its demo loads the "
    "model; every layer then writes H S S weights. *FastV, SDPA*: the few rows needed are "
    "multiplied apart, as PyramidDrop's own code and stage 3 do. With one mean, FastV has the "
    "fewest FLOPs: it drops early and at once, and attention grows with the square.",
    "inside_a_vit": "Stage 1 drops at three points, none in the first third of the blocks; ToMe "
    "merges a few tokens in every block. *ToMe, eager*: with the attention weights written out, as "
    "its code does. *mean tokens*: in attention, over the blocks.",
    "growth": "Stage 2's `fuse`, half of N kept, against its formula with all pairs of different "
    "encoders.",
    "overhead": "One choice, with sorting and gathering, against the block or layer in which it is "
    'made. "All rows": of a SigLIP ViT-B/16.',
    "kernels": "The same prefill on PyTorch's fused attention and on its plain one, taking turns; "
    "then, in turns of their own, with the LLM's MLPs compiled by torch.compile.",
}


def as_grid(rows: list[dict], head: bool = True) -> str:
    """Markdown, one line a row; head: with the names of the columns."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[shown(row.get(column)) for column in columns] for row in rows]
    lines = grid(columns, cells).strip().splitlines()
    return "\n".join(lines if head else lines[2:])


def shown(value: float | str | None) -> str:
    """A cell; numbers below 100 with three digits that count."""
    if value is None:
        return ""
    if isinstance(value, str | int):
        return str(value)
    if 0 < abs(value) < 99.95:
        return f"{value:#.3g}"
    return f"{value:,.0f}"


def page(tables: dict[str, list[dict]], command: str, minutes: float, device: str) -> str:
    """results/benchmark.md: the machine, the versions, the command, a table and a note each."""
    if device == "cpu":
        machine = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    else:
        machine = torch.cuda.get_device_name(device)
    how = (
        f"`{command}`, {minutes:.0f} minutes, {machine}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"timm {timm.__version__}, commit {commit()}."
    )
    parts = ["# What pruning buys\n", how]
    for name, rows in tables.items():
        title = name.replace("_", " ").capitalize()
        parts.append(f"\n## {title}\n\n{NOTES[name]}\n\n{as_grid(rows)}\n")
    return "\n".join(parts)


def write(
    tables: dict[str, list[dict]], folder: Path, command: str, minutes: float, device: str
) -> None:
    """The page, and a figure beside it where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    text = page(tables, command, minutes, device)
    if importlib.util.find_spec("matplotlib") and "overhead" in tables:
        from .bench_figure import benchmark_figure

        benchmark_figure(tables).savefig(folder / "benchmark.png", dpi=100)
        what = "what prefill takes, where, beside peers, and how choosing grows"
        text += f"\n![the same as curves: {what}](benchmark.png)\n"
    (folder / "benchmark.md").write_text(text)
