"""The paper's tables on the embedded model, as rows: a label, what is measured, and what the paper prints for it.

The paper's numbers are on other data with a 7B model: only the *orders* of rows can be compared, so they stand in
columns of their own. `report.py` measures and prints.
"""
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

import stage1_encode
from stage3_decode import AdaptivePruner, solve_lambda

from . import baselines, glyphworld
from .evaluate import Method, batches, interval, to_images, utilization
from .glyphworld import FAMILIES
from .model import Budget, Encoded, Meteor

GROUPS = ["General", "OCR & Chart"]
Encode = Callable[[Meteor, torch.Tensor], Encoded]


@dataclass
class Row:
    """label; method: what is measured; encode: what makes its visual tokens, for counting FLOPs; against: label of the
    row above that it is compared with, question by question; paper: {column: value}."""

    label: str
    method: Method
    encode: Encode
    against: str | None = None
    paper: dict[str, float | str] = field(default_factory=dict)


def own(budget: Budget, label: str, against: str | None = None, **paper) -> Row:
    """A row of METEOR itself."""
    return Row(label, budget, lambda m, x: m.encode(x, budget), against, paper)


def other(budget: Budget, pruner: baselines.Pruner, label: str, against: str | None = None, **paper) -> Row:
    """Stages 1 and 2 under a budget, another pruner in place of stage 3."""
    budget = replace(budget, stage3=None)
    method = lambda model, images, questions: model.answer(images, questions, budget, pruner)
    return Row(label, method, lambda m, x: m.encode(x, budget), against, paper)


def encoded(encode: Encode, pruner: baselines.Pruner | None, label: str, against: str | None = None, **paper) -> Row:
    """Another way to make the LLM's visual tokens, and a pruner in the LLM or none."""
    method = lambda model, images, questions: model.answer(encode(model, images), questions, Budget.none(), pruner)
    return Row(label, method, encode, against, paper)


def merged(names: list[str], budget: int, label: str, against: str | None = None, **paper) -> Row:
    """PruMerge++-style; FLOPs of one pass through each encoder, though ours makes two."""
    row = encoded(lambda m, x: baselines.prumerge(m, x, names, budget), None, label, against, **paper)
    return replace(row, encode=lambda m, x: [stage1_encode.encode(m.encoders[n], x) for n in names])


def fusion_rows(model: Meteor, names: list[str], against: str, paper: dict[str, dict] = {}) -> list[Row]:
    """Rows of `baselines.LEARNED`; none for a model whose folder has no baselines.safetensors (`train_baselines.py`)."""
    file = Path(model.folder or "") / "baselines.safetensors"
    methods = baselines.load_learned(model, file) if file.exists() else {}
    everything = lambda m, x: m.encode(x, Budget.none())
    return [Row(f"{n}, {model.adapters[0].num_tokens}", methods[n], everything, against, paper.get(n, {}))
            for n in names if n in methods]


def fastv_count(K: int, average: float, layer: int, L: int) -> int:
    """Tokens after `layer` of L so that K in front of it make the wanted average."""
    return max(1, round((average * L - K * layer) / (L - layer)))


def pyramid_counts(K: int, average: float) -> list[int]:
    """K r, K r^2, K r^3 after each quarter of the layers: r such that K (1 + r + r^2 + r^3) / 4 is the wanted average."""
    low, high = 0.0, 1.0
    for _ in range(50):
        r = (low + high) / 2
        low, high = (r, high) if K * (1 + r + r**2 + r**3) / 4 < average else (low, r)
    return [max(1, round(K * r**power)) for power in (1, 2, 3)]


def fastv(K: int, average: float, L: int) -> baselines.Pruner:
    return baselines.fastv(fastv_count(K, average, 1, L), layer=1)


def pyramid(K: int, average: float, L: int) -> baselines.Pruner:
    return baselines.pyramid_drop(pyramid_counts(K, average), L)


# ------------------------------------------------------------------ the tables, each a list of rows

def main_table(model: Meteor) -> list[Row]:
    budget, L, names = model.budget, model.decoder.config.num_hidden_layers, list(model.encoders)
    K, average, cells = budget.stage2, budget.stage3, model.adapters[0].num_tokens
    everything, mine = sum(a.num_tokens for a in model.adapters), f"METEOR, {average}"
    wanted = [round(1.3 * average), average, round(0.7 * average)]
    return [
        own(Budget.none(), "unpruned"),
        *fusion_rows(model, ["EAGLE-style"], "unpruned"),
        *(own(replace(budget, stage3=n), f"METEOR, {n}", "unpruned") for n in wanted),
        other(budget, fastv(K, average, L), f"stages 1+2, then FastV, {average}", mine),
        other(budget, pyramid(K, average, L), f"stages 1+2, then PyramidDrop, {average}", mine),
        merged(names, average, f"PruMerge++-style, {average}", mine),
        other(Budget.none(), fastv(everything, cells, L), f"FastV alone, {cells}", mine),
        other(Budget.none(), pyramid(everything, 1.5 * cells, L), f"PyramidDrop alone, {1.5 * cells:.0f}", mine)]


def table1(model: Meteor) -> list[Row]:
    rows, full = [], model.budget.stage1
    paper = {"rank": 67.99, "average": 66.87, "rank_reverse": 65.69}
    for total in (full, full // 2):
        rows += [own(Budget(stage1=total, stage1_strategy=s), f"{s}, {total}", None if s == "rank" else f"rank, {total}",
                     **({"Avg": value} if total == full else {})) for s, value in paper.items()]
    return rows


def table2(model: Meteor) -> list[Row]:
    total = model.budget.stage1
    paper = {"collaborative": dict(POPE=86.9, DocVQA=72.2, OCR=521), "separate": dict(POPE=87.3, DocVQA=66.2, OCR=502),
             "random": dict(POPE=84.9, DocVQA=43.0, OCR=432), "greedy": {}}
    rows = [own(Budget(stage1=total), f"upper bound, {total}", POPE=86.7, DocVQA=72.2, OCR=513)]
    for K in dict.fromkeys([model.budget.stage2, proportion := round(total * 576 / 1193)]):  # the paper's proportion
        rows += [own(Budget(stage1=total, stage2=K, stage2_strategy=s), f"{s}, {K}",
                     None if s == "collaborative" else f"collaborative, {K}", **(values if K == proportion else {}))
                 for s, values in paper.items()]
    cells = model.adapters[0].num_tokens  # what the learned fusions leave
    wide = Budget(stage1=round(cells * 1193 / 576), stage2=cells)
    learned = {"EAGLE-style": dict(POPE=86.7, DocVQA=70.9, OCR=493), "Resampler": dict(POPE=85.5, DocVQA=48.1, OCR=348),
               "MLP": dict(POPE=86.3, DocVQA=54.7, OCR=410), "PixShuffle": dict(POPE=85.9, DocVQA=53.4, OCR=400)}
    return [*rows, own(wide, f"collaborative, {cells}"),
            *fusion_rows(model, list(learned), f"collaborative, {cells}", learned)]


def table3(model: Meteor) -> list[Row]:
    budget, L, k = model.budget, model.decoder.config.num_hidden_layers, model.budget.k
    K, average = budget.stage2, budget.stage3
    columns = lambda *values: dict(zip(["POPE", "DocVQA", "OCR"], values))
    layers = [L // 8, 3 * L // 8, 5 * L // 8]
    shares = np.array([390, 172, 78])  # the paper's counts, scaled to the wanted average
    scale = (average * L - K * layers[0]) / (shares @ np.diff([*layers, L]))
    one, three = {1: fastv_count(K, average, 1, L)}, {i: max(1, round(n * scale)) for i, n in zip(layers, shares)}
    fixed = f"fixed, 3 layers, top-{k} heads"
    rows = [own(replace(budget, stage3=None), "upper bound", **columns(86.9, 72.2, 521)),
            other(budget, baselines.fixed(one, None), "fixed, layer 1, all heads", **columns(86.1, 59.9, 432)),
            other(budget, baselines.fixed(one, k), f"fixed, layer 1, top-{k} heads", "fixed, layer 1, all heads",
                  **columns(86.2, 61.4, 447)),
            other(budget, baselines.fixed(three, k), fixed, **columns(86.2, 65.9, 485))]
    for share, values in ((312 / 242, (86.4, 70.1, 552)), (1, (86.2, 69.0, 550)), (162 / 242, (86.9, 66.7, 523))):
        n = round(share * average)
        rows.append(own(replace(budget, stage3=n), f"adaptive, {n}", fixed, **columns(*values)))
    return rows


def alone(name: str, total: int | None = None) -> Encode:
    """A model with the single encoder `name`, stage 1 pruning it to `total` tokens."""
    def encode(model, images):
        ranks = model.ranks[:, [list(model.encoders).index(name)]]
        features, kept = stage1_encode.encode_all([model.encoders[name]], images, total, ranks)
        return baselines.only(model, [name], features, kept)
    return encode


def table6(model: Meteor) -> list[Row]:
    name, k = "clip", model.budget.k
    few = round(0.27 * model.adapters[list(model.encoders).index(name)].num_tokens)  # 29 % of FLOPs in the paper's row
    both = adaptive(lambda_for(model, alone(name, few), 0.45 * few, k), k)
    columns = lambda *values: dict(zip(["GQA", "POPE", "TextVQA"], values))
    first = f"PruMerge++-style, {few}"
    return [encoded(alone(name), None, f"{name} alone", **columns(62.0, 85.9, 58.2)),
            merged([name], few, first, **columns(57.5, 84.0, 57.1)),
            encoded(alone(name, few), None, f"stage 1, {few}", first, **columns(58.6, 84.5, 57.3)),
            encoded(alone(name, few), both, f"stages 1 and 3, {0.45 * few:.0f}", first, **columns(55.1, 78.4, 53.8))]


def table7(model: Meteor) -> list[Row]:
    name, L, k = "pix2struct", model.decoder.config.num_hidden_layers, model.budget.k
    N = model.adapters[list(model.encoders).index(name)].num_tokens
    average, see = round(0.45 * N), alone(name)
    columns = lambda *values: dict(zip(["POPE", "ChartQA", "DocVQA"], values))
    stage3 = adaptive(lambda_for(model, see, average, k), k)
    return [encoded(see, None, f"{name} alone", **columns(86.1, 64.0, 70.0)),
            encoded(see, fastv(N, average, L), f"FastV, {average}", **columns(86.3, 55.9, 62.1)),
            encoded(see, pyramid(N, average, L), f"PyramidDrop, {average}", f"FastV, {average}", **columns(86.4, 59.1, 65.6)),
            encoded(see, stage3, f"stage 3, {average}", f"FastV, {average}", **columns(86.1, 61.8, 67.5))]


def table8(model: Meteor) -> list[Row]:
    budget, k = model.budget, model.budget.k
    encode, rows = lambda m, x: m.encode(x, replace(budget, stage3=None)), []
    lams = {heads: lambda_for(model, encode, budget.stage3, heads) for heads in (3, 5, 7)}
    for heads, paper in ((3, (73.6, 64.8)), (5, (73.5, 65.0)), (7, (73.5, 64.6))):
        rows.append((lams[heads], heads, paper))
    rows += [(65 / 50 * lams[k], k, (73.8, 65.6)), (25 / 50 * lams[k], k, (73.4, 63.4))]
    return [other(budget, adaptive(lam, heads), f"k = {heads}, lambda = {lam:.1f}", **dict(zip(["Gene.", "OCR"], paper)))
            for lam, heads, paper in rows]


def adaptive(lam: float, k: int) -> baselines.Pruner:
    return lambda decoder, visual_mask: AdaptivePruner(decoder, visual_mask, lam=lam, k=k)


@torch.no_grad()
def lambda_for(model: Meteor, encode: Encode, average: float, k: int) -> float:
    """lambda that keeps `average` tokens, solved on 48 validation questions which nothing is measured on."""
    examples = [e for part in batches("val", 48, first=50_000) for e in part]
    encoded = encode(model, to_images([picture.image for _, picture, _, _ in examples]))
    embeds, attention_mask, visual_mask = model.prompt(encoded, [question for *_, question, _ in examples])

    def measure(lam: float) -> float:
        with AdaptivePruner(model.decoder, visual_mask, lam=lam, k=k) as pruner:
            model.decoder.model(inputs_embeds=embeds, attention_mask=attention_mask)
        return pruner.average_tokens().mean().item()

    return solve_lambda(average, measure)


# ------------------------------------------------------------------ what each encoder is worth

@torch.no_grad()
def redundancy(model: Meteor, samples: int) -> dict:
    """Accuracy of all 2^C - 1 subsets of encoders, the others' outputs replaced by zeros; CUR, IG, attention KL.

    Returns: {"subsets": {"clip+eva": {"accuracy", "families"}}, "cur": {family or group: {encoder: CUR}}, "ig": {family or
    group: IG}, "kl": {encoder: KL of the last layer's attention over visual tokens, full model || that encoder alone}}.
    Source: [arXiv 2507.03262]
    """
    names = list(model.encoders)
    subsets = [frozenset(s) for n in range(len(names), 0, -1) for s in itertools.combinations(names, n)]
    right, family, kl = {s: [] for s in subsets}, [], {n: [] for n in names}
    for examples in batches("test", samples):
        images = to_images([picture.image for _, picture, _, _ in examples])
        questions = [question for *_, question, _ in examples]
        features, kept = stage1_encode.encode_all(list(model.encoders.values()), images, None)
        family += [name for name, *_ in examples]
        attention = {}
        for subset in subsets:
            encoded = model.fuse([x * float(n in subset) for n, x in zip(names, features)], kept, Budget.none())
            texts = model.decode(model.generate(encoded, questions, Budget.none())[0])
            right[subset] += [text == truth for text, (*_, truth) in zip(texts, examples)]
            if len(subset) in (1, len(names)):
                attention[subset] = last_attention(model, encoded, questions)
        for n in names:
            kl[n] += divergence(attention[subsets[0]], attention[frozenset([n])]).tolist()
    kinds = {"all": list(FAMILIES), **{g: [f for f in FAMILIES if FAMILIES[f] == g] for g in GROUPS}, **{f: [f] for f in FAMILIES}}
    score = lambda s, kind: 100 * float(np.mean([r for r, f in zip(right[s], family) if f in kinds[kind]]))
    cur = {kind: utilization({s: score(s, kind) for s in subsets}, names) for kind in kinds}
    return {"subsets": {"+".join(n for n in names if n in s): {kind: score(s, kind) for kind in kinds} for s in subsets},
            "cur": cur, "ig": {kind: max(v.values()) - min(v.values()) for kind, v in cur.items()},
            "kl": {n: float(np.mean(v)) for n, v in kl.items()}}


def last_attention(model: Meteor, encoded: Encoded, questions: list[str]) -> torch.Tensor:
    """The last layer's attention from the text onto the K visual tokens, mean over heads, summing to 1: (B, K)."""
    embeds, attention_mask, visual_mask = model.prompt(encoded, questions)
    last = model.decoder.config.num_hidden_layers - 1
    with AdaptivePruner(model.decoder, visual_mask, layers=[last], lam=float("inf")) as pruner:
        model.decoder.model(inputs_embeds=embeds, attention_mask=attention_mask)
    a = pruner.attention[last].mean(dim=1)[visual_mask].view(len(questions), -1)
    return a / a.sum(dim=1, keepdim=True)


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats, row by row. (B, K), (B, K) -> (B,)"""
    tiny = torch.finfo(p.dtype).tiny
    return (p * (p.clamp(min=tiny).log() - q.clamp(min=tiny).log())).sum(dim=1)


@torch.no_grad()
def video(model: Meteor, samples: int) -> dict:
    """Tiled clips, never seen in training: {kind: {"unpruned" or "METEOR": accuracy, interval, tokens}}."""
    table = {}
    for kind in ("colors", "counter"):
        clips = [glyphworld.make_clip(i, kind) for i in range(samples)]
        for name, budget in {"unpruned": Budget.none(), "METEOR": model.budget}.items():
            answers = [a for start in range(0, samples, 50) for a in model.answer(
                to_images([image for image, *_ in clips[start:start + 50]]), [q for _, q, _ in clips[start:start + 50]], budget)]
            right = [a.text == truth for a, (*_, truth) in zip(answers, clips)]
            table.setdefault(kind, {})[name] = {"accuracy": 100 * float(np.mean(right)), "interval": interval(right),
                                                "average_tokens": float(np.mean([a.tokens["stage3"] for a in answers]))}
    return table


TABLES = {"main": main_table, "1": table1, "2": table2, "3": table3, "6": table6, "7": table7, "8": table8}
