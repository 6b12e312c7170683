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
from .evaluate import Method, batches, difference, interval, recall, to_images, utilization
from .glyphworld import FAMILIES
from .model import Budget, Encoded, Meteor

GROUPS = ["General", "OCR & Chart"]
Encode = Callable[[Meteor, torch.Tensor], object]


@dataclass
class Row:
    """label; method: what is measured; encode: what makes its visual tokens, for counting FLOPs; against: label of the
    row above that it is compared with, question by question; paper: {column: value}."""

    label: str
    method: Method
    encode: Encode
    against: str | None = None
    paper: dict[str, float | str] = field(default_factory=dict)


def meteor_row(budget: Budget, label: str, against: str | None = None, **paper) -> Row:
    return Row(label, budget, lambda m, x: m.encode(x, budget), against, paper)


def pruner_row(
    budget: Budget, pruner: baselines.Pruner, label: str, against: str | None = None, **paper
) -> Row:
    """Stages 1 and 2 under a budget, another pruner in place of stage 3."""
    budget = replace(budget, stage3=None)
    method = lambda model, images, questions: model.answer(images, questions, budget, pruner)
    return Row(label, method, lambda m, x: m.encode(x, budget), against, paper)


def encoding_row(
    encode: Encode, pruner: baselines.Pruner | None, label: str, against: str | None = None, **paper
) -> Row:
    """Another way to make the LLM's visual tokens (an `Encoded` batch), and a pruner in the LLM or none."""
    method = lambda model, images, questions: model.answer(
        encode(model, images), questions, Budget.none(), pruner
    )
    return Row(label, method, encode, against, paper)


def prumerge_row(
    names: list[str], tokens: int, label: str, against: str | None = None, **paper
) -> Row:
    """FLOPs are counted of one pass through each encoder, though ours makes two."""
    row = encoding_row(
        lambda m, x: baselines.prumerge(m, x, names, tokens), None, label, against, **paper
    )
    one_pass = lambda m, x: [
        m.projectors[n](stage1_encode.encode(m.encoders[n], x)[0][:, :tokens]) for n in names
    ]
    return replace(row, encode=one_pass)


def fusion_rows(
    model: Meteor, names: list[str], against: str, paper: dict[str, dict] | None = None
) -> list[Row]:
    """Rows of `baselines.LEARNED`; none for a model whose folder has no baselines.safetensors (`train_baselines.py`)."""
    file = Path(model.folder or "") / "baselines.safetensors"
    learned = baselines.load_learned(model, file) if file.exists() else {}
    return [
        Row(
            f"{n}, {model.adapters[0].num_tokens}",
            learned[n].answer,
            learned[n].encode,
            against,
            (paper or {}).get(n, {}),
        )
        for n in names
        if n in learned
    ]


def fastv_count(K: int, average: float, layer: int, L: int) -> int:
    """Tokens after `layer` of L so that K in front of it make the wanted average.

    Raises: ValueError where K in front of it alone are too many.
    """
    count = round((average * L - K * layer) / (L - layer))
    if not 1 <= count <= K:
        raise ValueError(
            f"average must be {K * layer / L + 1:.0f} to {K} with {K} tokens up to layer {layer}, got {average}"
        )
    return count


def pyramid_counts(K: int, average: float) -> list[int]:
    """K r, K r^2, K r^3 after each quarter of the layers: r such that K (1 + r + r^2 + r^3) / 4 is the wanted average.

    Raises: ValueError where the first quarter alone takes too many.
    """
    if not K / 4 + 0.75 <= average <= K:
        raise ValueError(
            f"average must be {K / 4 + 0.75} to {K} with {K} tokens in the first quarter, got {average}"
        )
    low, high = 0.0, 1.0
    for _ in range(50):
        r = (low + high) / 2
        low, high = (r, high) if K * (1 + r + r**2 + r**3) / 4 < average else (low, r)
    return [max(1, round(K * r**power)) for power in (1, 2, 3)]


def fastv(model: Meteor, K: int, average: float) -> tuple[baselines.Pruner, str]:
    """FastV at layer 1, and its counts in words."""
    count = fastv_count(K, average, 1, model.decoder.config.num_hidden_layers)
    return baselines.fastv(count, layer=1), f"FastV {K}-{count}"


def pyramid(model: Meteor, K: int, average: float) -> tuple[baselines.Pruner, str]:
    counts = pyramid_counts(K, average)
    pruner = baselines.pyramid_drop(counts, model.decoder.config.num_hidden_layers)
    return pruner, f"PyramidDrop {K}-" + "-".join(map(str, counts))


# ------------------------------------------------------------------ the tables, each a list of rows


def main_table(model: Meteor) -> list[Row]:
    budget, names = model.budget, list(model.encoders)
    K, average, cells = budget.stage2, budget.stage3, model.adapters[0].num_tokens
    everything, mine = sum(a.num_tokens for a in model.adapters), f"METEOR, {average}"
    wanted = [budget, *(model.budget_for(round(share * average)) for share in (1.3, 0.7))]
    in_llm = [fastv(model, K, average), pyramid(model, K, average)]
    alone_in_llm = [fastv(model, everything, cells), pyramid(model, everything, 1.25 * cells)]
    return [
        meteor_row(Budget.none(), "unpruned"),
        *fusion_rows(
            model, ["EAGLE-style"], "unpruned", {"EAGLE-style": {"tokens": "1024", "TFLOPs": 26.21}}
        ),
        *(
            meteor_row(
                b,
                f"METEOR, {b.stage3}",
                "unpruned",
                **(
                    {"tokens": "242*", "TFLOPs": 13.42, "points to EAGLE": -0.3}
                    if b == budget
                    else {}
                ),
            )
            for b in wanted
        ),
        *(pruner_row(budget, pruner, f"stages 1+2, {label}", mine) for pruner, label in in_llm),
        prumerge_row(names, average, f"PruMerge++-style, {average}", mine),
        *(
            pruner_row(Budget.none(), pruner, f"{label} alone", mine)
            for pruner, label in alone_in_llm
        ),
    ]


def table1(model: Meteor) -> list[Row]:
    rows, full = [], model.budget.stage1
    inside, n = (
        [a.prunable_inside for a in model.adapters],
        sum(a.num_tokens for a in model.adapters if a.prunable_inside),
    )
    paper = {"rank": 67.99, "average": 66.87, "rank_reverse": 65.69}
    for total in (full, full // 2):
        fall = (
            total * sum(inside) / len(inside) / n
        )  # the same totals at the inner points, whatever the strategy
        totals = (round(n * fall ** (1 / 3)), round(n * fall ** (2 / 3)), total)
        rows += [
            meteor_row(
                Budget(stage1=totals, stage1_strategy=s),
                f"{s}, {total}",
                None if s == "rank" else f"rank, {total}",
                **({"Avg": value} if total == full else {}),
            )
            for s, value in paper.items()
        ]
    return rows


def table2(model: Meteor) -> list[Row]:
    """Four budgets: the model's own, the paper's proportion, a third of stage 1's (where strategies part), and that of the
    learned fusions (a token a cell)."""
    total, cells = model.budget.stage1, model.adapters[0].num_tokens
    one = dict(POPE=86.9, DocVQA=72.2, OCR=521)
    paper = {
        "collaborative": one,
        "separate": dict(POPE=87.3, DocVQA=66.2, OCR=502),
        "random": dict(POPE=84.9, DocVQA=43.0, OCR=432),
        "greedy": {},
    }
    rows = [
        meteor_row(
            Budget(stage1=total),
            f"post-projection fusion, {total}",
            POPE=86.7,
            DocVQA=72.2,
            OCR=513,
        )
    ]
    proportion = round(total * 576 / 1193)
    for K in dict.fromkeys([model.budget.stage2, proportion, total // 3]):
        rows += [
            meteor_row(
                Budget(stage1=total, stage2=K, stage2_strategy=s),
                f"{s}, {K}",
                None if s == "collaborative" else f"collaborative, {K}",
                **(values if K == proportion else {}),
            )
            for s, values in paper.items()
        ]
    wide = Budget(stage1=round(cells * 1193 / 576), stage2=cells)
    learned = {
        "EAGLE-style": dict(POPE=86.7, DocVQA=70.9, OCR=493),
        "Resampler": dict(POPE=85.5, DocVQA=48.1, OCR=348),
        "MLP": dict(POPE=86.3, DocVQA=54.7, OCR=410),
        "PixShuffle": dict(POPE=85.9, DocVQA=53.4, OCR=400),
    }
    return [
        *rows,
        meteor_row(wide, f"collaborative, {cells}", **one),
        *fusion_rows(model, list(learned), f"collaborative, {cells}", learned),
    ]


def coverage(model: Meteor) -> dict[str, dict[str, float]]:
    """Why strategies differ: patches that are left in one encoder or more after stage 2, in percent of each kind,
    on validation pictures, at table 2's tightest K. {strategy: {kind of patch: percent}}"""
    budget = Budget(stage1=model.budget.stage1, stage2=model.budget.stage1 // 3)
    torch.manual_seed(0)  # of "random"
    by = {
        s: replace(budget, stage2_strategy=s)
        for s in ("collaborative", "separate", "random", "greedy")
    }
    return {f"{s}, {b.stage2}": recall(model, b)["stage2"]["any"] for s, b in by.items()}


def table3(model: Meteor) -> list[Row]:
    """The model's own average, of K tokens in the paper's proportion to it."""
    average, L, k = model.budget.stage3, model.decoder.config.num_hidden_layers, model.budget.k
    K = round(average * 576 / 242)
    budget = replace(model.budget, stage2=K)
    columns = lambda *values: dict(zip(["POPE", "DocVQA", "OCR"], values))
    layers = budget.layers or (L // 8, 3 * L // 8, 5 * L // 8)
    shares = np.array([390, 172, 78])  # the paper's counts, scaled to the wanted average
    scale = (average * L - K * layers[0]) / (shares @ np.diff([*layers, L]))
    one, three = (
        {1: fastv_count(K, average, 1, L)},
        {i: max(1, round(n * scale)) for i, n in zip(layers, shares)},
    )
    fixed = f"fixed, 3 layers, {k} head(s)"
    rows = [
        meteor_row(replace(budget, stage3=None), "upper bound", **columns(86.9, 72.2, 521)),
        pruner_row(
            budget,
            baselines.fixed(one, None),
            "fixed, layer 1, all heads",
            **columns(86.1, 59.9, 432),
        ),
        pruner_row(
            budget,
            baselines.fixed(one, k),
            f"fixed, layer 1, {k} head(s)",
            "fixed, layer 1, all heads",
            **columns(86.2, 61.4, 447),
        ),
        pruner_row(budget, baselines.fixed(three, k), fixed, **columns(86.2, 65.9, 485)),
    ]
    encode = lambda m, x: m.encode(x, budget)
    early = replace(
        budget, layers=[1]
    )  # not in the paper: adaptive counts where tokens still matter
    lam = lambda_for(model, encode, average, early)
    rows.insert(
        3,
        pruner_row(
            early,
            adaptive(early, lam),
            f"adaptive, {average}, layer 1",
            f"fixed, layer 1, {k} head(s)",
        ),
    )
    for share, values in (
        (312 / 242, (86.4, 70.1, 552)),
        (1, (86.2, 69.0, 550)),
        (162 / 242, (86.9, 66.7, 523)),
    ):
        n = round(share * average)
        rows.append(
            pruner_row(
                budget,
                adaptive(budget, lambda_for(model, encode, n, budget)),
                f"adaptive, {n}",
                fixed,
                **columns(*values),
            )
        )
    return rows


def alone(name: str, total: int | tuple[int, int, int] | None = None) -> Encode:
    """A model with the single encoder `name`, stage 1 pruning it to `total` tokens, or to three totals, one a point."""

    def encode(model, images):
        ranks = model.ranks[:, [list(model.encoders).index(name)]]
        features, kept = stage1_encode.encode_all(
            [model.encoders[name]], images.to(model.device), total, ranks
        )
        return baselines.only(model, [name], features, kept)

    return encode


def table6(model: Meteor) -> list[Row]:
    name, own = "clip", model.budget
    few = round(0.27 * model.adapters[0].num_tokens)  # about the paper's 29 % of the LLM's FLOPs
    fewer = round(0.45 * few)  # about its 12 %
    both = adaptive(own, lambda_for(model, alone(name, few), fewer, own))
    columns = lambda *values: dict(zip(["GQA", "POPE", "TextVQA"], values))
    merged, all_of_it = (
        [f"PruMerge++-style, {n}" for n in (few, fewer)],
        model.adapters[0].num_tokens,
    )
    return [
        encoding_row(alone(name), None, f"{name} alone", **columns(62.0, 85.9, 58.2)),
        prumerge_row([name], few, merged[0], **columns(57.5, 84.0, 57.1)),
        encoding_row(
            alone(name, few), None, f"stage 1, {few}", merged[0], **columns(58.6, 84.5, 57.3)
        ),
        # not in the paper: is it the choice, or that tokens are gone before the encoder is at its end?
        encoding_row(
            alone(name, (all_of_it, all_of_it, few)),
            None,
            f"stage 1 at the output only, {few}",
            merged[0],
        ),
        prumerge_row([name], fewer, merged[1]),
        encoding_row(
            alone(name, few),
            both,
            f"stages 1 and 3, {fewer}",
            merged[1],
            **columns(55.1, 78.4, 53.8),
        ),
    ]


def table7(model: Meteor) -> list[Row]:
    name, own = "pix2struct", model.budget
    N, see = model.adapters[list(model.encoders).index(name)].num_tokens, alone(name)
    average = round(0.45 * N)
    columns = lambda *values: dict(zip(["POPE", "ChartQA", "DocVQA"], values))
    (first, label), (second, label2) = fastv(model, N, average), pyramid(model, N, average)
    stage3 = adaptive(own, lambda_for(model, see, average, own))
    return [
        encoding_row(see, None, f"{name} alone", **columns(86.1, 64.0, 70.0)),
        encoding_row(see, first, label, **columns(86.3, 55.9, 62.1)),
        encoding_row(see, second, label2, label, **columns(86.4, 59.1, 65.6)),
        encoding_row(see, stage3, f"stage 3, {average}", label, **columns(86.1, 61.8, 67.5)),
    ]


def table8(model: Meteor) -> list[Row]:
    """K as in Table 3; besides the paper's k the model's own."""
    own = replace(model.budget, stage2=round(model.budget.stage3 * 576 / 242))
    encode = lambda m, x: m.encode(x, own)
    paper = {3: (73.6, 64.8), 5: (73.5, 65.0), 7: (73.5, 64.6)}
    lams = {
        k: lambda_for(model, encode, own.stage3, replace(own, k=k))
        for k in dict.fromkeys([own.k, *paper])
    }
    rows = [(k, lam, paper.get(k, ())) for k, lam in lams.items()]
    rows += [
        (own.k, 65 / 50 * lams[own.k], (73.8, 65.6)),
        (own.k, 25 / 50 * lams[own.k], (73.4, 63.4)),
    ]
    label = "k = {}, lambda = {:.1f}".format
    first = label(*rows[0][:2])
    return [
        pruner_row(
            own,
            adaptive(replace(own, k=k), lam),
            label(k, lam),
            first if label(k, lam) != first else None,
            **dict(zip(["Gene.", "OCR"], values)),
        )
        for k, lam, values in rows
    ]


def adaptive(budget: Budget, lam: float) -> baselines.Pruner:
    """Stage 3 with lambda as given, heads and layers of a budget."""
    return lambda decoder, visual_mask: AdaptivePruner(
        decoder, visual_mask, budget.layers, lam=lam, k=budget.k
    )


@torch.no_grad()
def lambda_for(model: Meteor, encode: Encode, average: float, budget: Budget) -> float:
    """lambda that keeps `average` tokens, solved on 96 validation questions, those of calibration among them."""
    examples = [e for part in batches("val", 96, first=50_000) for e in part]
    encoded = encode(model, to_images([picture.image for _, picture, _, _ in examples]))
    embeds, attention_mask, visual_mask = model.prompt(
        encoded, [question for *_, question, _ in examples]
    )

    def measure(lam: float) -> float:
        with adaptive(budget, lam)(model.decoder, visual_mask) as pruner:
            model.decoder.model(inputs_embeds=embeds, attention_mask=attention_mask)
        return pruner.average_tokens().mean().item()

    return solve_lambda(average, measure, tolerance=0.1)


# ------------------------------------------------------------------ what each encoder is worth


@torch.no_grad()
def redundancy(model: Meteor, samples: int) -> dict:
    """Accuracy of all 2^C - 1 subsets of encoders, the others' outputs replaced by zeros; CUR, IG, attention KL.

    Kinds of question: "all", the groups, the families. Zeros are projected like any feature, so a masked encoder still
    gives its tokens, all alike: CUR holds what an encoder adds and what its constant tokens cost.
    Returns: {"subsets": {"clip+eva": {kind: (accuracy, low, high)}}, "cur": {kind: {encoder: CUR}}, "ig": {kind: IG}, "kl":
    {encoder: KL of the last layer's attention over visual tokens, full model || that encoder alone}, "questions": n}.
    Source: [arXiv 2507.03262]
    """
    names = list(model.encoders)
    subsets = [
        frozenset(s) for n in range(len(names), 0, -1) for s in itertools.combinations(names, n)
    ]
    right, family, kl = {s: [] for s in subsets}, [], {n: [] for n in names}
    for examples in batches("test", samples):
        images = to_images([picture.image for _, picture, _, _ in examples]).to(model.device)
        questions = [question for *_, question, _ in examples]
        features, kept = stage1_encode.encode_all(list(model.encoders.values()), images, None)
        family += [name for name, *_ in examples]
        attention = {}
        for subset in subsets:
            encoded = model.fuse(
                [x * float(n in subset) for n, x in zip(names, features)], kept, Budget.none()
            )
            texts = model.decode(model.generate(encoded, questions, Budget.none())[0])
            right[subset] += [text == truth for text, (*_, truth) in zip(texts, examples)]
            if len(subset) in (1, len(names)):
                attention[subset] = last_attention(model, encoded, questions)
        for n in names:
            kl[n] += divergence(attention[subsets[0]], attention[frozenset([n])]).tolist()
    kinds = {
        "all": list(FAMILIES),
        **{g: [f for f in FAMILIES if FAMILIES[f] == g] for g in GROUPS},
    }
    kinds |= {f: [f] for f in FAMILIES}
    of = lambda s, kind: [r for r, f in zip(right[s], family) if f in kinds[kind]]
    score = {s: {kind: 100 * float(np.mean(of(s, kind))) for kind in kinds} for s in subsets}
    cur = {kind: utilization({s: score[s][kind] for s in subsets}, names) for kind in kinds}
    return {
        "subsets": {
            "+".join(n for n in names if n in s): {
                k: (score[s][k], *interval(of(s, k))) for k in kinds
            }
            for s in subsets
        },
        "cur": cur,
        "ig": {kind: max(v.values()) - min(v.values()) for kind, v in cur.items()},
        "kl": {n: float(np.mean(v)) for n, v in kl.items()},
        "questions": len(family),
    }


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
    """Tiled clips, never seen in training.

    Returns: {kind: {"unpruned" or "METEOR": {"accuracy", "interval", "average_tokens", "questions"}, "difference": METEOR
    minus unpruned (mean, low, high)}}.
    """
    table = {}
    for kind in ("colors", "counter"):
        table[kind], right = {}, {}
        clips = [glyphworld.make_clip(i, kind) for i in range(samples)]
        for name, budget in {"unpruned": Budget.none(), "METEOR": model.budget}.items():
            answers = []
            for start in range(0, samples, 50):
                images, questions, _ = zip(*clips[start : start + 50])
                answers += model.answer(to_images(images), list(questions), budget)
            right[name] = [a.text == truth for a, (*_, truth) in zip(answers, clips)]
            table[kind][name] = {
                "accuracy": 100 * float(np.mean(right[name])),
                "interval": interval(right[name]),
                "average_tokens": float(np.mean([a.tokens["stage3"] for a in answers])),
                "questions": samples,
            }
        table[kind]["difference"] = difference(right["METEOR"], right["unpruned"])
    return table


TABLES = {
    "main": main_table,
    "1": table1,
    "2": table2,
    "3": table3,
    "6": table6,
    "7": table7,
    "8": table8,
}
