"""Measurements other than the method tables: the paper's Findings 3 to 5, who survives (Figure 1),
ranks, what each encoder is worth, clips (Table 4). Findings 1 and 2: `photographs`.

    frame = measure(model, "heads", samples=240)

Every finding is a list of lines, each with one value, see `measure`. Change here: FINDINGS, and the
functions above it.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

import stage1_encode
from stage3_decode import default_layers

from . import baselines
from .budgets import Budget
from .evaluate import (
    Estimate,
    difference,
    information_gap,
    masks_by_kind,
    mean,
    ratio,
    utilization,
)
from .methods import Row, eagle_rows, stages
from .model import Meteor
from .toy.clips import CLIPS, make_clip
from .toy.questions import (
    GROUPS,
    Example,
    example_batches,
    images_and_questions,
    to_images,
)
from .toy.world import make_picture

FIELDS = "finding encoder layer criterion kind questions value low high".split()


def measure(model: Meteor, name: str, samples: int) -> pd.DataFrame:
    """Measure a finding of `FINDINGS` on `samples` questions of the test split.

    Returns: a line for each value, with its 95 % interval [low, high] where it has one. encoder:
        one, or several joined by "+"; layer: of the LLM; criterion:
        what the value is; kind: of the questions, as in `evaluate.families_by_kind`, or of the
        clips. Fields that mean nothing for a finding are empty.
    """
    lines = pd.DataFrame(FINDINGS[name](model, samples))
    return lines.assign(finding=name).reindex(columns=FIELDS)


def line(estimate: Estimate | float, criterion: str, **where) -> dict:
    """One line: an estimate, or a value without an interval."""
    if not isinstance(estimate, Estimate):
        estimate = Estimate(estimate, float("nan"), float("nan"))
    return where | {"criterion": criterion} | estimate._asdict()


def lines_by_kind(values: np.ndarray, family: Iterable[str], criterion: str, **where) -> list[dict]:
    """The mean of values (n,) of n questions, for each kind of question that occurs."""
    lines = []
    for kind, asked in masks_by_kind(family).items():
        own = values[asked]
        lines.append(line(mean(own), criterion, kind=kind, questions=len(own), **where))
    return lines


# ---------------------------------------------------------------------------------- who survives


@torch.no_grad()
def figure1(model: Meteor, samples: int) -> list[dict]:
    """Tokens of each encoder that survive each stage of METEOR, by kind of question; and how many
    more OCR & Chart questions keep than General ones.

    Source: [paper, Figure 1]
    """
    L = model.decoder.config.num_hidden_layers
    first = (model.budget.layers or default_layers(L))[0]  # before it, all keep the same number
    stages = ("stage1", "stage2", "stage3")
    left = {(stage, name): [] for stage in stages for name in model.encoders}
    in_layers, family = [], []
    for examples in example_batches("test", samples):
        for example, answer in zip(examples, model.answer(*images_and_questions(examples))):
            family.append(example.family)
            in_layers.append(answer.layers)
            for stage, name in left:
                left[stage, name].append(answer.survivors[stage][name])
    lines = []
    for (stage, name), counts in left.items():
        lines += lines_by_kind(np.array(counts), family, stage, encoder=name)
    in_layers = np.array(in_layers)  # (n, L)
    masks = masks_by_kind(family)
    averages = {
        "tokens per LLM layer": in_layers.mean(axis=1),
        "tokens per layer from the first pruned one on": in_layers[:, first:].mean(axis=1),
    }
    for criterion, tokens in averages.items():
        lines += lines_by_kind(tokens, family, criterion)
        general, ocr = (tokens[masks[group]] for group in GROUPS)
        share = ratio(ocr, general, paired=False)
        lines.append(line(share, criterion, kind="OCR & Chart / General"))
    return lines


@torch.no_grad()
def ranks(model: Meteor, samples: int) -> list[dict]:
    """Of each encoder at stage 1's last point: its rank, how much that varies over pictures, its
    diversity.
    """
    images = to_images([make_picture(i, "val").image for i in range(min(samples, 64))])
    lines = []
    for (name, encoder), pixels in zip(model.encoders.items(), model.pixels(images)):
        x = stage1_encode.features_at_points(encoder, pixels)[-1]  # (B, N, D)
        rank = stage1_encode.feature_rank(x).double().numpy()  # (pictures,)
        spread = 100 * float(rank.std(ddof=1) / rank.mean()) if len(rank) > 1 else float("nan")
        diversity = nuclear_diversity(x).numpy()
        where = {"encoder": name, "questions": len(rank)}
        lines.append(line(mean(rank), "rank", **where))
        lines.append(line(spread, "standard deviation of the rank, percent", **where))
        lines.append(line(mean(diversity), "diversity", **where))
    return lines


@torch.no_grad()
def similarity(model: Meteor, samples: int) -> list[dict]:
    """How alike projected tokens are, nothing pruned: the cosine of an encoder's tokens to its own
    others, and to the tokens of the other encoders, the mean and the highest.

    Source: [paper, Finding 3]
    """
    images = to_images([make_picture(i, "val").image for i in range(min(samples, 64))])
    fused = model.encode(images, Budget.keep_all()).fused
    encoder = fused.encoder_id[0]  # (N,), the same for all pictures
    cosines = all_cosines(fused.tokens)  # (B, N, N)
    lines = []
    for number, name in enumerate(model.encoders):
        own = encoder == number
        for others, compared in (("within the encoder", own), ("to the others", ~own)):
            pairs = cosines[:, own][:, :, compared]  # (B, n_l, n)
            where = {"encoder": name, "questions": len(images)}
            average = pairs.nanmean(dim=(1, 2))  # (B,)
            nearest = pairs.nan_to_num(-1).amax(dim=2).mean(dim=1)
            lines.append(line(mean(average.numpy()), f"mean cosine {others}", **where))
            lines.append(line(mean(nearest.numpy()), f"highest cosine {others}", **where))
    return lines


def all_cosines(tokens: Tensor) -> Tensor:
    """Tokens (B, N, D) -> cosines of all pairs (B, N, N) float32, nan of a token and itself."""
    unit = F.normalize(tokens.float(), dim=-1)
    return (unit @ unit.mT).diagonal_scatter(torch.full(tokens.shape[:2], math.nan), 0, 1, 2)


def nuclear_diversity(tokens: Tensor) -> Tensor:
    r"""||A||_* / N for the row-normalised tokens A: 1 where all differ, low where all are alike.

    Args: tokens (B, N, D) float.
    Returns: (B,) float64, 0..sqrt(min(N, D) / N).
    Source: [supplement A]
    """
    A = F.normalize(tokens.double(), dim=-1)
    return torch.linalg.matrix_norm(A, "nuc") / tokens.shape[1]


# ----------------------------------------------------------------------- what each encoder is worth


@torch.no_grad()
def redundancy(model: Meteor, samples: int) -> list[dict]:
    """Accuracy with all encoders, and with one encoder's output replaced by zeros; of these CUR and
    information gap.

    Zeros are projected like any feature, so a masked encoder still gives its tokens, all alike: CUR
    holds what an encoder adds and what its constant tokens cost.

    Source: [arXiv 2507.03262]
    """
    names = list(model.encoders)
    everyone = frozenset(names)
    subsets = [everyone, *(everyone - {name} for name in names)]
    right, family = {s: [] for s in subsets}, []
    for examples in example_batches("test", samples):
        for subset, answers in by_subset(model, subsets, examples).items():
            right[subset] += answers
        family += [example.family for example in examples]

    right = {subset: 100 * np.array(answers) for subset, answers in right.items()}  # (n,) each
    lines = []
    for subset in subsets:
        encoder = "+".join(name for name in names if name in subset)
        lines += lines_by_kind(right[subset], family, "accuracy", encoder=encoder)
    for kind, asked in masks_by_kind(family).items():
        rates = utilization({s: right[s][asked].mean() for s in subsets}, names)
        full = right[everyone][asked]
        for name in names:
            where = {"encoder": name, "kind": kind, "questions": len(full)}
            without = right[everyone - {name}][asked]
            lines.append(line(difference(full, without), "points lost without it", **where))
            _, low, high = ratio(without, full, paired=True)  # CUR = 1 - without / full
            lines.append(line(Estimate(rates[name], 1 - high, 1 - low), "CUR", **where))
        gap = information_gap(rates)
        lines.append(line(gap, "information gap", kind=kind, questions=len(full)))
    return lines


def by_subset(
    model: Meteor, subsets: list[frozenset[str]], examples: list[Example]
) -> dict[frozenset[str], list[bool]]:
    """Was each answer to one batch of questions right, with every subset of encoders?"""
    images, questions = images_and_questions(examples)
    truths = [example.answer for example in examples]
    encoders = list(model.encoders.values())
    features, kept = stage1_encode.encode_all(encoders, model.pixels(images), None)
    right = {}
    for subset in subsets:
        masked = [
            x if name in subset else torch.zeros_like(x)
            for name, x in zip(model.encoders, features)
        ]
        encoded = model.fuse(masked, kept)
        ids, _ = model.generate(encoded, questions, Budget.keep_all())
        right[subset] = [text == truth for text, truth in zip(model.decode(ids), truths)]
    return right


# ------------------------------------------------------------------ what the LLM looks at; clips


@torch.no_grad()
def heads(model: Meteor, samples: int) -> list[dict]:
    """The visual attention value of every head, in every layer but the last, after stages 1 and 2:
    of the heads' means over questions the lowest, the median and the highest; and the sum over the
    top heads of each question, by which stage 3 counts, by kind of question.

    A layer's number is that of the layer that listens, so that stage 3 in layer i + 1 uses it.

    Source: [paper, Findings 4 and 5]
    """
    layers = list(range(1, model.decoder.config.num_hidden_layers))
    values, family = {i: [] for i in layers}, []
    for examples in example_batches("test", samples):
        images, questions = images_and_questions(examples)
        encoded = model.encode(images, replace(model.budget, stage3=None))
        recorder = model.prefill(
            encoded, questions, partial(baselines.AttentionRecorder, layers=layers)
        )
        for i in layers:
            values[i].append(recorder.attention[i].sum(dim=-1).cpu().numpy())  # (B, H)
        family += [example.family for example in examples]
    lines = []
    for i in layers:
        of_heads = np.sort(np.concatenate(values[i]).mean(axis=0))  # (H,), mean over questions
        where = {"layer": i - 1, "questions": len(family)}
        spread = {"lowest": of_heads[0], "median": np.median(of_heads), "highest": of_heads[-1]}
        lines += [line(float(value), f"{name} head", **where) for name, value in spread.items()]
    for i in model.budget.layers or default_layers(layers[-1] + 1):
        top = np.sort(np.concatenate(values[i]), axis=1)[:, -model.budget.k :].sum(axis=1)  # (n,)
        lines += lines_by_kind(top, family, "sum over the top heads", layer=i - 1)
    return lines


@torch.no_grad()
def video(model: Meteor, samples: int) -> list[dict]:
    """Clips tiled into one picture, never seen in training: unpruned, METEOR, and EAGLE-style
    fusion where it was trained.

    Source: [supplement Table 4]
    """
    methods = {"unpruned": Row("", stages()).answer, "METEOR": Meteor.answer}
    for row in eagle_rows(model, "METEOR"):
        methods["EAGLE-style"] = row.answer
    lines = []
    for kind in CLIPS:
        right, tokens = {name: [] for name in methods}, {name: [] for name in methods}
        clips = [make_clip(i, kind) for i in range(min(samples, 200))]
        for start in range(0, len(clips), 50):
            images, questions, truths = zip(*clips[start : start + 50])
            for name, answer in methods.items():
                answers = answer(model, to_images(images), list(questions))
                right[name] += [100 * (a.text == truth) for a, truth in zip(answers, truths)]
                tokens[name] += [a.tokens["stage3"] for a in answers]
        where = {"kind": kind, "questions": len(clips)}
        for name in methods:
            lines.append(line(mean(right[name]), f"accuracy, {name}", **where))
            lines.append(line(mean(tokens[name]), f"tokens per LLM layer, {name}", **where))
            if name != "METEOR":
                gain = difference(right["METEOR"], right[name])
                lines.append(line(gain, f"METEOR - {name}", **where))
    return lines


FINDINGS = {
    "figure1": figure1,
    "ranks": ranks,
    "similarity": similarity,
    "heads": heads,
    "redundancy": redundancy,
    "video": video,
}
