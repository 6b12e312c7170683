"""What is measured of the embedded model besides rows: ranks, patches that stage 2 leaves, what
each encoder is worth, how deep the LLM looks, where the last tokens lie, clips.
"""

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import stage1_encode

from .. import baselines
from ..budgets import Budget
from ..toy.clips import CLIPS, make_clip
from ..toy.evaluate import (
    Example,
    batches,
    difference,
    images_and_questions,
    interval,
    ratio,
    recall,
    to_images,
    utilization,
    with_interval,
)
from ..toy.questions import FAMILIES, KIND_OF_FAMILY
from ..toy.world import make_picture
from ..model import Answer, Encoded, Meteor
from .tables import GROUPS


@torch.no_grad()
def rank_statistics(model: Meteor, pictures: int = 64) -> dict[str, dict[str, float]]:
    """Per encoder at its output: expected rank, its spread (std over mean) over pictures,
    nuclear-norm diversity.
    """
    images = to_images([make_picture(i, "val").image for i in range(pictures)])
    encoders = list(model.encoders.values())
    features, _ = stage1_encode.encode_all(encoders, model.pixels(images), None)
    table = {}
    for name, x in zip(model.encoders, features):
        rank = stage1_encode.feature_rank(x).double()  # (pictures,)
        table[name] = {
            "rank": rank.mean().item(),
            "spread": (rank.std() / rank.mean()).item(),
            "diversity": nuclear_diversity(x).mean().item(),
        }
    return table


def nuclear_diversity(tokens: Tensor) -> Tensor:
    r"""||A||_* / N for the row-normalised tokens A: 1 where all differ, low where all are alike.

    Args: tokens (B, N, D) float.
    Returns: (B,) float64, 0..sqrt(min(N, D) / N).
    Source: [supplement A]
    """
    A = F.normalize(tokens.double(), dim=-1)
    return torch.linalg.matrix_norm(A, "nuc") / tokens.shape[1]


def coverage(model: Meteor) -> dict[str, dict[str, float]]:
    """Why strategies differ: patches that are left in one encoder or more after stage 2, in percent
    of each kind, on validation pictures, at table 2's tightest K.

    Returns: {strategy: {kind of patch: percent}}.
    """
    K = model.budget.stage1 // 3
    torch.manual_seed(0)  # of "random"
    table = {}
    budget = Budget(stage1=model.budget.stage1, stage2=K)
    for strategy, fusion in baselines.FUSIONS.items():
        table[f"{strategy}, {K}"] = recall(model, budget, fusion)["stage2"]["any"]
    return table


# ------------------------------------------------------------------ what each encoder is worth


@torch.no_grad()
def redundancy(model: Meteor, samples: int) -> dict:
    """Accuracy of all 2^C - 1 subsets of encoders, the others' outputs replaced by zeros; CUR, IG,
    attention KL.

    Kinds of question: see `question_kinds`. Zeros are projected like any feature, so a
    masked encoder still gives its tokens, all alike: CUR holds what an encoder adds and what its
    constant tokens cost.

    Returns: {"subsets": {"clip+eva": {kind: (accuracy, low, high)}}, "cur": {kind: {encoder: CUR}},
        "ig": {kind: IG}, "losses": {encoder: {kind: points that are lost without it, (mean, low,
        high)}}, "kl": {encoder: KL of the last layer's attention over visual tokens, full
        model || that encoder alone}, "questions": n}.
    Source: [arXiv 2507.03262]
    """
    names = list(model.encoders)
    subsets = all_subsets(names)
    right, kl, family = {s: [] for s in subsets}, {n: [] for n in names}, []
    for examples in batches("test", samples):
        right_here, kl_here = by_subset(model, subsets, examples)
        for subset in subsets:
            right[subset] += right_here[subset]
        for name in names:
            kl[name] += kl_here[name]
        family += [example.family for example in examples]
    kinds = question_kinds()
    measured, score = {}, {}
    for subset in subsets:
        measured[subset], score[subset] = {}, {}
        for kind, families in kinds.items():
            own = [r for r, f in zip(right[subset], family) if f in families]
            score[subset][kind] = 100 * float(np.mean(own))
            measured[subset][kind] = (score[subset][kind], *interval(own))
    cur = {kind: utilization({s: score[s][kind] for s in subsets}, names) for kind in kinds}
    return {
        "subsets": {"+".join(n for n in names if n in s): measured[s] for s in subsets},
        "cur": cur,
        "losses": losses_without(right, family, names),
        "ig": {kind: max(rates.values()) - min(rates.values()) for kind, rates in cur.items()},
        "kl": {name: float(np.mean(values)) for name, values in kl.items()},
        "questions": len(family),
    }


def losses_without(right: dict, family: list[str], names: list[str]) -> dict:
    """Points that are lost without an encoder: {encoder: {kind: (mean, low, high)}}.

    Args: right: {subset: was each answer right}; family: of each question.
    """
    everyone, losses = frozenset(names), {}
    for name in names:
        losses[name] = {}
        for kind, families in question_kinds().items():
            asked = np.isin(family, families)
            full, without = (np.array(right[s])[asked] for s in (everyone, everyone - {name}))
            losses[name][kind] = difference(full, without)
    return losses


def all_subsets(names: list[str]) -> list[frozenset[str]]:
    """All but the empty one, the largest first."""
    subsets = []
    for size in range(len(names), 0, -1):
        subsets += map(frozenset, itertools.combinations(names, size))
    return subsets


def question_kinds() -> dict[str, list[str]]:
    """Kind of question -> its families: all, each group, OCR without charts, each family."""
    kinds = {"all": list(FAMILIES)}
    for group in GROUPS:
        kinds[group] = [family for family, its_group in FAMILIES.items() if its_group == group]
    kinds["OCR"] = [family for family in kinds["OCR & Chart"] if KIND_OF_FAMILY[family] != "chart"]
    for family in FAMILIES:
        kinds[family] = [family]
    return kinds


def by_subset(model: Meteor, subsets: list[frozenset[str]], examples: list[Example]) -> tuple:
    """Answers to one batch of questions with every subset of encoders.

    Returns: {subset: was each answer right}; {encoder: KL of each question}.
    """
    names = list(model.encoders)
    images, questions = images_and_questions(examples)
    encoders = list(model.encoders.values())
    features, kept = stage1_encode.encode_all(encoders, model.pixels(images), None)
    right, attention = {}, {}
    for subset in subsets:
        encoded = model.fuse(masked(features, names, subset), kept, Budget.none())
        ids, _ = model.generate(encoded, questions, Budget.none())
        texts = model.decode(ids)
        right[subset] = [text == e.answer for text, e in zip(texts, examples)]
        if len(subset) in (1, len(names)):
            attention[subset] = last_attention(model, encoded, questions)
    full, kl = attention[frozenset(names)], {}
    for name in names:
        kl[name] = divergence(full, attention[frozenset([name])]).tolist()
    return right, kl


def masked(features: list[Tensor], names: list[str], subset: frozenset[str]) -> list[Tensor]:
    """Zeros in place of the features of encoders that are not in the subset."""
    return [x if name in subset else torch.zeros_like(x) for name, x in zip(names, features)]


def last_attention(model: Meteor, encoded: Encoded, questions: list[str]) -> Tensor:
    """The last layer's attention from the text onto the K visual tokens, mean over heads, summing
    to 1: (B, K). The library's eager attention returns it.
    """
    embeds, attention_mask, visual_mask = model.prompt(encoded, questions)
    model.decoder.set_attn_implementation("eager")
    weights = model.decoder(
        inputs_embeds=embeds, attention_mask=attention_mask, output_attentions=True
    ).attentions[-1]  # (B, H, S, S)
    model.decoder.set_attn_implementation("sdpa")
    asks = visual_mask.flip(1).cumsum(1).flip(1) == 0  # (B, S): text after the picture
    asks = asks & attention_mask.bool()
    rows = weights.mean(dim=1) * asks[..., None]  # (B, S, S)
    onto = rows.sum(dim=1) / asks.sum(dim=1, keepdim=True)  # (B, S)
    on_picture = onto[visual_mask].view(len(questions), -1)  # (B, K)
    return on_picture / on_picture.sum(dim=1, keepdim=True)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats, row by row. (B, K), (B, K) -> (B,)"""
    tiny = torch.finfo(p.dtype).tiny
    log_ratio = p.clamp(min=tiny).log() - q.clamp(min=tiny).log()
    return (p * log_ratio).sum(dim=1)


# ------------------------------------------------------------------ how deep the LLM looks


@torch.no_grad()
def drops(model: Meteor, samples: int) -> dict:
    """Accuracy when all visual tokens go after i of the LLM's layers, for each i. Nothing else is
    pruned, so that this says something of the LLM alone.

    Returns: {"unpruned": (accuracy, low, high), "layers": [{"layers": i, "accuracy": (accuracy,
        low, high), "loss": unpruned minus this (mean, low, high)}], "questions": n}.
    """
    depths = range(1, model.decoder.config.num_hidden_layers)
    full, right = [], {i: [] for i in depths}
    for examples in batches("test", samples):
        images, questions = images_and_questions(examples)
        encoded = model.encode(images, Budget.none())
        full += right_answers(model.answer(encoded, questions, Budget.none()), examples)
        for i in depths:
            answers = model.answer(encoded, questions, Budget.none(), baselines.drop_all(i))
            right[i] += right_answers(answers, examples)
    layers = []
    for i in depths:
        accuracy = with_interval(right[i])
        layers.append({"layers": i, "accuracy": accuracy, "loss": difference(full, right[i])})
    return {"unpruned": with_interval(full), "layers": layers, "questions": len(full)}


def right_answers(answers: list[Answer], examples: list[Example]) -> list[bool]:
    return [answer.text == example.answer for answer, example in zip(answers, examples)]


# ------------------------------------------------------------------ where the last tokens lie


@torch.no_grad()
def focus(model: Meteor, samples: int) -> dict:
    """Does the figure tell the truth? Of the tokens left at the last pruned layer, the share that
    lies on patches that the question asks about, and what a random choice of as many would have.

    A random choice has, on average, the share of those it chooses from: all tokens of all encoders,
    or, which is harder to beat, those that enter the LLM. Questions that ask about nothing in the
    picture (is there ...? no) are left out.

    Returns: {kind: {"left": percent, "of all": percent, "of those in the LLM": percent, "ratio":
        left to of all, (ratio, low, high), "ratio in the LLM": the same, "questions": n}}, kinds as
        in `question_kinds`.
    """
    shares, family = [], []
    for examples in batches("test", samples):
        answers = model.answer(*images_and_questions(examples))
        for example, answer in zip(examples, answers):
            if example.asked.any():
                shares.append(shares_on_asked(answer, example.asked))
                family.append(example.family)
    shares = np.array(shares)  # (n, 3)
    table = {}
    for kind, families in question_kinds().items():
        some = shares[np.isin(family, families)]
        if len(some) > 0:
            table[kind] = focus_figures(some)
    return table


def shares_on_asked(answer: Answer, asked: np.ndarray) -> tuple[float, float, float]:
    """The share on asked patches (h w,) bool of the tokens left at the end, of all encoders'
    tokens, and of those that entered the LLM.
    """
    shares = []
    every_patch = {name: torch.ones_like(kept) for name, kept in answer.kept["stage1"].items()}
    for maps in (answer.kept["stage3"], every_patch, answer.kept["stage2"]):
        kept = torch.stack([*maps.values()]).flatten(1)  # (encoders, h w)
        on_asked = kept & torch.from_numpy(asked)
        shares.append(int(on_asked.sum()) / int(kept.sum()))
    return tuple(shares)


def focus_figures(shares: np.ndarray) -> dict:
    """Of shares (n, 3) of `shares_on_asked`."""
    left, of_all, in_llm = shares.T
    return {
        "left": 100 * float(left.mean()),
        "of all": 100 * float(of_all.mean()),
        "of those in the LLM": 100 * float(in_llm.mean()),
        "ratio": ratio(left, of_all, paired=True),
        "ratio in the LLM": ratio(left, in_llm, paired=True),
        "questions": len(shares),
    }


# ------------------------------------------------------------------ clips


@torch.no_grad()
def video(model: Meteor, samples: int) -> dict:
    """Tiled clips, never seen in training.

    Returns: {kind: {"unpruned" or "METEOR": {"accuracy", "interval", "average_tokens",
        "questions"}, "difference": METEOR minus unpruned (mean, low, high)}}.
    """
    table = {}
    for kind in CLIPS:
        clips = [make_clip(i, kind) for i in range(samples)]
        unpruned, right_unpruned = clip_accuracy(model, Budget.none(), clips)
        meteor, right_meteor = clip_accuracy(model, model.budget, clips)
        table[kind] = {"unpruned": unpruned, "METEOR": meteor}
        table[kind]["difference"] = difference(right_meteor, right_unpruned)
    return table


def clip_accuracy(model: Meteor, budget: Budget, clips: list[tuple]) -> tuple[dict, list[bool]]:
    """Of clips (image, question, truth) under a budget, and whether each answer was right."""
    answers = []
    for start in range(0, len(clips), 50):
        images, questions, _ = zip(*clips[start : start + 50])
        answers += model.answer(to_images(images), list(questions), budget)
    right = [answer.text == truth for answer, (*_, truth) in zip(answers, clips)]
    figures = {
        "accuracy": 100 * float(np.mean(right)),
        "interval": interval(right),
        "average_tokens": float(np.mean([answer.tokens["stage3"] for answer in answers])),
        "questions": len(clips),
    }
    return figures, right
