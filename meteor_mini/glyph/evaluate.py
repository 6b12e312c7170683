"""Accuracy by question family, average tokens, and which patches survive: what `meteor-mini eval` prints."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from . import world as glyphworld
from .glyphworld import FAMILIES
from .model import Answer, Budget, Meteor


def to_images(pixels: list[np.ndarray]) -> torch.Tensor:
    """Pictures (H, W, 3) uint8 of one size -> (B, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255


def batches(split: str, samples: int, batch: int = 50, first: int = 0) -> Iterator[list[tuple]]:
    """`samples` examples (family, picture, question, answer), the families in turn, in lists of at most `batch`."""
    names = list(FAMILIES)
    for start in range(0, samples, batch):
        rows = range(first + start, first + min(start + batch, samples))
        yield [
            (
                names[i % len(names)],
                *glyphworld.example(i // len(names), split, names[i % len(names)]),
            )
            for i in rows
        ]


Method = (
    Budget | Callable[[Meteor, torch.Tensor, list[str]], list[Answer]]
)  # what is measured: (model, images, questions)


@torch.no_grad()
def accuracy(model: Meteor, method: Method, split: str = "test", samples: int = 1000) -> dict:
    """Exact-match accuracy in percent.

    Args: method: a budget, or a function (model, images, questions) -> answers.
    Returns: {"accuracy": mean over questions, "families": {family: accuracy}, "average_tokens": mean visual tokens per
    LLM layer, "family_tokens": the same by family, "right" (n,) bool, "tokens" (n,) float and "family" (n,) str of each question,
    "llm_flops": mean FLOPs of the LLM's prefill, "survivors": {stage: {encoder: {family: mean tokens}}}}.
    """
    right, tokens, family, flops, survivors = [], [], [], [], []
    for examples in batches(split, samples):
        images = to_images([picture.image for _, picture, _, _ in examples])
        questions = [question for *_, question, _ in examples]
        answers = (
            model.answer(images, questions, method)
            if isinstance(method, Budget)
            else method(model, images, questions)
        )
        right += [answer.text == truth for answer, (*_, truth) in zip(answers, examples)]
        tokens += [answer.tokens["stage3"] for answer in answers]
        family += [name for name, *_ in examples]
        flops += [
            prefill_flops(model.decoder.config, answer.layers, len(ids) + 1)
            for answer, ids in zip(answers, model.tokenize(questions))
        ]
        survivors += [answer.survivors for answer in answers]
    right, tokens, family = np.array(right), np.array(tokens), np.array(family)
    present = [f for f in FAMILIES if (family == f).any()]
    mean = {
        stage: {
            name: {
                f: float(np.mean([s[stage][name] for s, g in zip(survivors, family) if g == f]))
                for f in present
            }
            for name in counts
        }
        for stage, counts in survivors[0].items()
    }
    return {
        "accuracy": 100 * right.mean(),
        "average_tokens": tokens.mean(),
        "families": {f: 100 * right[family == f].mean() for f in present},
        "family_tokens": {f: tokens[family == f].mean() for f in present},
        "right": right,
        "tokens": tokens,
        "family": family,
        "llm_flops": float(np.mean(flops)),
        "survivors": mean,
    }


def prefill_flops(config, visual: list[float], text: int) -> float:
    """FLOPs of a Llama's prefill, without embeddings and head: 2 (4 n d^2 + 2 n^2 d + 3 n d m) summed over layers.

    Args: config: a LlamaConfig; visual: visual tokens in each layer; text: text tokens, in all layers. n: both together;
    d: width, of which grouped keys and values take their part; m: width of the gated MLP. What torch.utils.flop_counter
    counts; a pruner's own q and k are not in it.
    """
    d, m, grouped = (
        config.hidden_size,
        config.intermediate_size,
        config.num_key_value_heads / config.num_attention_heads,
    )
    return sum(
        2 * (n * d * d * (2 + 2 * grouped) + 2 * n * n * d + 3 * n * d * m)
        for n in (v + text for v in visual)
    )


@torch.no_grad()
def encoding_flops(model: Meteor, encode: Callable[[Meteor, torch.Tensor], object]) -> int:
    """FLOPs of encode(model, images) for one picture, encoders, stages 1 and 2, projectors: counted while they run."""
    image = to_images([glyphworld.make_picture(0, "val").image])
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(
        False
    )  # CLIP's: the counter does not know that operator, and counts nothing
    try:
        # Plain attention is counted by its products; torch before 2.15 has no count for the CPU's fused one.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            encode(model, image)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()


def interval(right: list[bool], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval over questions of an accuracy, or of a mean difference, in percent."""
    values, rng = np.asarray(right, dtype=float), np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return 100 * float(low), 100 * float(high)


def difference(a: list[bool], b: list[bool]) -> tuple[float, float, float]:
    """Accuracy of a minus b on the same questions, in points, with its paired 95 % interval: (mean, low, high)."""
    d = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    return 100 * float(d.mean()), *interval(d)


def utilization(accuracies: dict[frozenset, float], names: list[str]) -> dict[str, float]:
    """CUR(e) = (acc(E) - acc(E without e)) / acc(E) for each encoder e; the information gap is max - min of these.

    Args: accuracies: subset of names -> accuracy, at least E and its subsets of one less.
    Returns: {e: CUR(e)}, at most 1; nan for all where the full model is never right.  Source: [arXiv 2507.03262]
    """
    everyone = accuracies[frozenset(names)] or float("nan")
    return {e: (everyone - accuracies[frozenset(names) - {e}]) / everyone for e in names}


PATCHES = {
    "background": [],
    "shape": glyphworld.SHAPES,
    "glyph": ["number", "cell"],
    "header": ["header"],
    "bar": ["bar"],
}


@torch.no_grad()
def recall(model: Meteor, budget: Budget, split: str = "val", samples: int = 96) -> dict:
    """Of the background, shape, glyph, header and bar patches, which percentage survives each stage, per encoder.

    Returns: {stage: {encoder: {group: percent}}}, with "any" for patches that survive in one encoder or more. The one
    table that explains most accuracy figures.
    """
    alive, total = {}, {}
    what = list(glyphworld.SLOTS).index("what")
    for examples in batches(split, samples):
        images = to_images([picture.image for _, picture, _, _ in examples])
        for answer, (_, picture, *_) in zip(
            model.answer(images, [e[2] for e in examples], budget), examples
        ):
            word = torch.from_numpy(picture.patch_words[:, what])
            for group, words in PATCHES.items():
                members = [glyphworld.SLOTS["what"].index(w) + 1 for w in words] or [0]
                patches = torch.isin(word, torch.tensor(members))
                total[group] = total.get(group, 0) + int(patches.sum())
                for stage, maps in answer.kept.items():
                    for name, grid in [
                        *maps.items(),
                        ("any", torch.stack([*maps.values()]).any(dim=0)),
                    ]:
                        key = (stage, name, group)
                        alive[key] = alive.get(key, 0) + int((grid.flatten() & patches).sum())
    stages, names = ["stage1", "stage2", "stage3"], [*model.encoders, "any"]
    return {
        s: {n: {g: 100 * alive[s, n, g] / max(1, total[g]) for g in PATCHES} for n in names}
        for s in stages
    }


def print_recall(table: dict) -> None:
    for stage, encoders in table.items():
        for name, groups in encoders.items():
            print(f"{stage} {name:>10}: " + ", ".join(f"{g} {v:3.0f} %" for g, v in groups.items()))
