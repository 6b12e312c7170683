"""Accuracy by question family, average tokens, and which patches survive: what `meteor-mini eval` prints."""
from collections.abc import Iterator

import numpy as np
import torch

from . import glyphworld
from .glyphworld import FAMILIES
from .model import Budget, Meteor


def to_images(pixels: list[np.ndarray]) -> torch.Tensor:
    """Pictures (H, W, 3) uint8 of one size -> (B, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255


def batches(split: str, samples: int, batch: int = 50, first: int = 0) -> Iterator[list[tuple]]:
    """`samples` examples (family, picture, question, answer), the families in turn, in lists of at most `batch`."""
    names = list(FAMILIES)
    for start in range(0, samples, batch):
        rows = range(first + start, first + min(start + batch, samples))
        yield [(names[i % len(names)], *glyphworld.example(i // len(names), split, names[i % len(names)])) for i in rows]


@torch.no_grad()
def accuracy(model: Meteor, budget: Budget, split: str = "test", samples: int = 1000, first: int = 0) -> dict:
    """Exact-match accuracy in percent.

    Returns: {"accuracy": mean over questions, "families": {family: accuracy}, "average_tokens": mean visual tokens per
    LLM layer, "family_tokens": the same by family, "right": [bool per question]}.
    """
    right, tokens, family = [], [], []
    for examples in batches(split, samples, first=first):
        images = to_images([picture.image for _, picture, _, _ in examples])
        answers = model.answer(images, [question for *_, question, _ in examples], budget)
        right += [answer.text == truth for answer, (*_, truth) in zip(answers, examples)]
        tokens += [answer.tokens["stage3"] for answer in answers]
        family += [name for name, *_ in examples]
    right, tokens, family = np.array(right), np.array(tokens), np.array(family)
    return {"accuracy": 100 * right.mean(), "average_tokens": tokens.mean(),
            "families": {f: 100 * right[family == f].mean() for f in FAMILIES if (family == f).any()},
            "family_tokens": {f: tokens[family == f].mean() for f in FAMILIES if (family == f).any()},
            "right": right.tolist()}


GROUPS = {"background": [], "shape": glyphworld.SHAPES, "glyph": ["number", "cell"], "header": ["header"], "bar": ["bar"]}


@torch.no_grad()
def recall(model: Meteor, budget: Budget, split: str = "val", samples: int = 96) -> dict:
    """Of the background, shape, glyph, header and bar patches, which percentage survives each stage, per encoder.

    Returns: {stage: {encoder: {group: percent}}}. The one table that explains most accuracy figures.
    """
    alive, total = {}, {}
    what = list(glyphworld.SLOTS).index("what")
    for examples in batches(split, samples):
        images = to_images([picture.image for _, picture, _, _ in examples])
        for answer, (_, picture, *_) in zip(model.answer(images, [e[2] for e in examples], budget), examples):
            word = torch.from_numpy(picture.patch_words[:, what])
            for group, words in GROUPS.items():
                members = [glyphworld.SLOTS["what"].index(w) + 1 for w in words] or [0]
                patches = torch.isin(word, torch.tensor(members))
                total[group] = total.get(group, 0) + int(patches.sum())
                for stage, maps in answer.kept.items():
                    for name, grid in maps.items():
                        key = (stage, name, group)
                        alive[key] = alive.get(key, 0) + int((grid.flatten() & patches).sum())
    stages, names = ["stage1", "stage2", "stage3"], list(model.encoders)
    return {s: {n: {g: 100 * alive[s, n, g] / max(1, total[g]) for g in GROUPS} for n in names} for s in stages}


def print_recall(table: dict) -> None:
    for stage, encoders in table.items():
        for name, groups in encoders.items():
            print(f"{stage} {name:>10}: " + ", ".join(f"{g} {v:3.0f} %" for g, v in groups.items()))
