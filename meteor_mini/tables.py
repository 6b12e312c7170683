"""The paper's tables on the embedded model: `meteor-mini eval --table NAME`, or all of them into results/README.md.

A row is a label, what is measured (`evaluate.Method`) and what the paper prints for it. The paper's numbers are on other
data with a 7B model: only the *orders* of rows can be compared, so they stand in columns of their own.
"""
import itertools
import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import stage1_encode
from stage3_decode import AdaptivePruner, solve_lambda

from . import baselines, evaluate, glyphworld
from .evaluate import accuracy, batches, difference, encoding_flops, interval, to_images, utilization
from .glyphworld import FAMILIES
from .model import Budget, Encoded, Meteor

GROUPS = ["General", "OCR & Chart"]


@dataclass
class Row:
    """label; method: what is measured; paper: {column: value}; encoding: the budget that its encoders work under;
    against: the label of the row above that it is compared with, question by question."""

    label: str
    method: evaluate.Method
    paper: dict[str, float | str]
    encoding: Budget = Budget()
    against: str | None = None


def pruned(budget: Budget, pruner: baselines.Pruner) -> evaluate.Method:
    """Stages 1 and 2 under a budget, then another pruner in place of stage 3."""
    return lambda model, images, questions: model.answer(images, questions, replace(budget, stage3=None), pruner)


def encoded_by(encode: Callable[[Meteor, torch.Tensor], Encoded], pruner: baselines.Pruner | None = None) -> evaluate.Method:
    """Another way to make the LLM's visual tokens."""
    return lambda model, images, questions: model.answer(encode(model, images), questions, Budget.none(), pruner)


def fastv_count(K: int, average: float, layer: int, L: int) -> int:
    """Tokens after `layer` of L so that K in front of it make the wanted average."""
    return max(1, round((average * L - K * layer) / (L - layer)))


def pyramid_counts(K: int, average: float) -> list[int]:
    """K r, K r^2, K r^3 after each quarter of the layers, r such that K (1 + r + r^2 + r^3) / 4 is the wanted average."""
    low, high = 0.0, 1.0
    for _ in range(50):
        r = (low + high) / 2
        low, high = (r, high) if K * (1 + r + r**2 + r**3) / 4 < average else (low, r)
    return [max(1, round(K * r**power)) for power in (1, 2, 3)]


# ------------------------------------------------------------------ the tables, each a list of rows

def main_table(model: Meteor) -> list[Row]:
    own, L = model.budget, model.decoder.config.num_hidden_layers
    K, average, everything = own.stage2, own.stage3, sum(a.num_tokens for a in model.adapters)
    cells, names = max(a.num_tokens for a in model.adapters), list(model.encoders)
    rows = [Row("unpruned", Budget.none(), {})]
    for tokens in (round(1.3 * average), average, round(0.7 * average)):
        budget = replace(own, stage3=tokens)
        rows.append(Row(f"METEOR, {tokens}", budget, {"tokens": "242*", "-tokens": "-76 %"} if tokens == average else {},
                        budget, "unpruned"))
    encoding, mine = replace(own, stage3=None), f"METEOR, {average}"
    return rows + [
        Row(f"stages 1+2, then FastV, {average}", pruned(own, baselines.fastv(fastv_count(K, average, 1, L), 1)), {}, encoding, mine),
        Row(f"stages 1+2, then PyramidDrop, {average}", pruned(own, baselines.pyramid_drop(pyramid_counts(K, average), L)), {},
            encoding, mine),
        Row(f"PruMerge++-style at the encoders, {average}", encoded_by(lambda m, x: baselines.prumerge(m, x, names, average)), {},
            Budget(), mine),
        Row(f"FastV alone, {cells}", pruned(Budget.none(), baselines.fastv(fastv_count(everything, cells, 1, L), 1)), {},
            Budget(), mine),
        Row(f"PyramidDrop alone, {2 * cells}", pruned(Budget.none(), baselines.pyramid_drop(pyramid_counts(everything, 2 * cells), L)),
            {}, Budget(), mine),
    ]


def table1(model: Meteor) -> list[Row]:
    paper = {"rank": 67.99, "average": 66.87, "rank_reverse": 65.69}
    rows = []
    for total in (model.budget.stage1, model.budget.stage1 // 2):
        for strategy, value in paper.items():
            budget = Budget(stage1=total, stage1_strategy=strategy)
            rows.append(Row(f"{strategy}, {total}", budget, {"Avg": value} if total == model.budget.stage1 else {}, budget,
                            None if strategy == "rank" else f"rank, {total}"))
    return rows


def table2(model: Meteor) -> list[Row]:
    total = model.budget.stage1
    rows = [Row(f"upper bound, {total}", Budget(stage1=total), {"POPE": 86.7, "DocVQA": 72.2, "OCR": 513}, Budget(stage1=total))]
    paper = {"collaborative": {"POPE": 86.9, "DocVQA": 72.2, "OCR": 521}, "separate": {"POPE": 87.3, "DocVQA": 66.2, "OCR": 502},
             "random": {"POPE": 84.9, "DocVQA": 43.0, "OCR": 432}, "greedy": {}}
    proportion = round(total * 576 / 1193)  # the paper's
    for K in dict.fromkeys([model.budget.stage2, proportion]):
        for strategy, numbers in paper.items():
            budget = Budget(stage1=total, stage2=K, stage2_strategy=strategy)
            rows.append(Row(f"{strategy}, {K}", budget, numbers if K == proportion else {}, budget,
                            None if strategy == "collaborative" else f"collaborative, {K}"))
    return rows


def table3(model: Meteor) -> list[Row]:
    own = replace(model.budget, stage3=None)
    K, average, L = own.stage2, model.budget.stage3, model.decoder.config.num_hidden_layers
    columns = lambda *values: dict(zip(["POPE", "DocVQA", "OCR"], values))
    one, layers = {1: fastv_count(K, average, 1, L)}, [L // 8, 3 * L // 8, 5 * L // 8]
    spans = np.diff([*layers, L])
    shares = np.array([390, 172, 78]) / 576  # the paper's, scaled to the wanted average
    scale = (average * L - K * layers[0]) / (K * shares @ spans)
    three = {i: max(1, round(K * share * scale)) for i, share in zip(layers, shares)}
    fixed = f"fixed, {len(three)} layers, top-{own.k} heads"
    rows = [Row("upper bound", own, columns(86.9, 72.2, 521), own),
            Row("fixed, layer 1, all heads", pruned(own, baselines.fixed(one, None)), columns(86.1, 59.9, 432), own),
            Row(f"fixed, layer 1, top-{own.k} heads", pruned(own, baselines.fixed(one, own.k)), columns(86.2, 61.4, 447), own,
                "fixed, layer 1, all heads"),
            Row(fixed, pruned(own, baselines.fixed(three, own.k)), columns(86.2, 65.9, 485), own)]
    for share, numbers in ((312 / 242, (86.4, 70.1, 552)), (1, (86.2, 69.0, 550)), (162 / 242, (86.9, 66.7, 523))):
        tokens = round(share * average)
        rows.append(Row(f"adaptive, {tokens}", replace(own, stage3=tokens), columns(*numbers), own, fixed))
    return rows


def alone(name: str, total: int | None = None) -> Callable[[Meteor, torch.Tensor], Encoded]:
    """A model with the single encoder `name`, stage 1 pruning it to `total` tokens."""
    def encode(model, images):
        l = list(model.encoders).index(name)
        features, kept = stage1_encode.encode_all([model.encoders[name]], images, total, model.ranks[:, [l]])
        return baselines.only(model, [name], features, kept)
    return encode


def table6(model: Meteor) -> list[Row]:
    name = "clip"
    N = model.adapters[list(model.encoders).index(name)].num_tokens
    few = round(0.27 * N)  # 29 % of FLOPs in the paper's row
    both = adaptive(lambda_for(model, alone(name, few), 0.45 * few, model.budget.k), model.budget.k)
    return [Row(f"{name}, unpruned", encoded_by(alone(name)), {"GQA": 62.0, "POPE": 85.9, "TextVQA": 58.2}),
            Row("PruMerge++-style", encoded_by(lambda m, x: baselines.prumerge(m, x, [name], few)),
                {"GQA": 57.5, "POPE": 84.0, "TextVQA": 57.1}),
            Row("stage 1", encoded_by(alone(name, few)), {"GQA": 58.6, "POPE": 84.5, "TextVQA": 57.3}, against="PruMerge++-style"),
            Row("stages 1 and 3", encoded_by(alone(name, few), both), {"GQA": 55.1, "POPE": 78.4, "TextVQA": 53.8})]


def table7(model: Meteor) -> list[Row]:
    name, L = "pix2struct", model.decoder.config.num_hidden_layers
    N = model.adapters[list(model.encoders).index(name)].num_tokens
    average, k = 0.45 * N, model.budget.k
    return [Row(f"{name}, unpruned", encoded_by(alone(name)), {"POPE": 86.1, "ChartQA": 64.0, "DocVQA": 70.0}),
            Row("FastV", encoded_by(alone(name), baselines.fastv(fastv_count(N, average, 1, L), 1)),
                {"POPE": 86.3, "ChartQA": 55.9, "DocVQA": 62.1}),
            Row("PyramidDrop", encoded_by(alone(name), baselines.pyramid_drop(pyramid_counts(N, average), L)),
                {"POPE": 86.4, "ChartQA": 59.1, "DocVQA": 65.6}),
            Row("stage 3", encoded_by(alone(name), adaptive(lambda_for(model, alone(name), average, k), k)),
                {"POPE": 86.1, "ChartQA": 61.8, "DocVQA": 67.5}, against="FastV")]


def table8(model: Meteor) -> list[Row]:
    own, average = model.budget, model.budget.stage3
    encoding = replace(own, stage3=None)
    encode, rows = lambda m, x: m.encode(x, encoding), []
    columns = lambda *values: dict(zip(["Gene.", "OCR"], values))
    for k, numbers in ((3, (73.6, 64.8)), (5, (73.5, 65.0)), (7, (73.5, 64.6))):
        lam = lambda_for(model, encode, average, k)
        rows.append(Row(f"k = {k}, lambda = {lam:.0f}", pruned(own, adaptive(lam, k)), columns(*numbers), encoding))
    lam = lambda_for(model, encode, average, own.k)
    for factor, numbers in ((65 / 50, (73.8, 65.6)), (25 / 50, (73.4, 63.4))):
        rows.append(Row(f"k = {own.k}, lambda = {factor * lam:.0f}", pruned(own, adaptive(factor * lam, own.k)), columns(*numbers),
                        encoding))
    return rows


def adaptive(lam: float, k: int) -> baselines.Pruner:
    return lambda decoder, visual_mask: AdaptivePruner(decoder, visual_mask, lam=lam, k=k)


@torch.no_grad()
def lambda_for(model: Meteor, encode: Callable[[Meteor, torch.Tensor], Encoded], average: float, k: int) -> float:
    """lambda that keeps `average` tokens, solved on 48 validation questions which nothing is measured on."""
    examples = [e for part in batches("val", 48, first=50_000) for e in part]
    encoded = encode(model, to_images([picture.image for _, picture, _, _ in examples]))
    embeds, attention_mask, visual_mask = model.prompt(encoded, [question for *_, question, _ in examples])

    def measure(lam: float) -> float:
        with AdaptivePruner(model.decoder, visual_mask, lam=lam, k=k) as pruner:
            model.decoder.model(inputs_embeds=embeds, attention_mask=attention_mask)
        return pruner.average_tokens().mean().item()

    return solve_lambda(average, measure)


# ------------------------------------------------------------------ measuring rows

def measure_rows(model: Meteor, rows: list[Row], samples: int, cache: dict) -> list[dict]:
    """One dictionary a row: accuracy with its interval, by group and family, tokens, FLOPs, differences to `against`.

    cache: repr of a budget -> result; tables that share a row share its questions and its run.
    """
    done, results = {}, []
    for row in tqdm(rows, desc="rows", mininterval=5, leave=False):
        key = repr(row.method) if isinstance(row.method, Budget) else row.label
        if key not in cache or key == row.label:
            torch.manual_seed(0)  # of the strategy "random"
            cache[key] = accuracy(model, row.method, "test", samples)
        result = done[row.label] = cache[key]
        masks = {"all": result["group"] != "", **{g: result["group"] == g for g in GROUPS}}
        results.append({
            "label": row.label, "paper": row.paper, "against": row.against, "interval": interval(result["right"]),
            "flops": result["llm_flops"] + encoding_flops(model, row.encoding),
            "groups": {g: 100 * float(result["right"][masks[g]].mean()) for g in GROUPS},
            "differences": {g: difference(result["right"][mask], done[row.against]["right"][mask])
                            for g, mask in masks.items()} if row.against else {},
            **{k: result[k] for k in ("average_tokens", "accuracy", "families", "family_tokens", "survivors")}})
    return results


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


# ------------------------------------------------------------------ the report

TABLES = {"main": main_table, "1": table1, "2": table2, "3": table3, "6": table6, "7": table7, "8": table8}
TITLES = {"main": "Main result", "1": "Table 1: how encoders share the budget (stage 1 alone)",
          "2": "Table 2: what fusion drops (stages 1 and 2)", "3": "Table 3: fixed and adaptive counts in the LLM",
          "6": "Table 6: a single encoder, stages 1 and 3", "7": "Table 7: a single encoder, stage 3",
          "8": "Table 8: heads and lambda", "figure1": "Figure 1: survivors per encoder, by family",
          "redundancy": "What each encoder is worth (arXiv 2507.03262)", "video": "Table 4: tiled clips, zero-shot"}


def run(model: Meteor, name: str, samples: int, cache: dict) -> dict:
    """Measure one table: {"rows": [...]} of `measure_rows`, or what `redundancy` and `video` return."""
    if name == "redundancy":
        return redundancy(model, min(samples, 400))  # 15 subsets, unpruned
    if name == "video":
        return video(model, min(samples, 200))
    if name == "figure1":
        return {"survivors": measure_rows(model, [Row("METEOR", model.budget, {}, model.budget)], samples, cache)[0]["survivors"]}
    result = {"rows": measure_rows(model, TABLES[name](model), samples, cache)}
    if name == "1":
        result["ranks"] = rank_statistics(model)
    return result


@torch.no_grad()
def rank_statistics(model: Meteor, pictures: int = 64) -> dict:
    """Per encoder at its output: expected rank, its spread (std over mean) over pictures, nuclear-norm diversity."""
    images = to_images([glyphworld.make_picture(i, "val").image for i in range(pictures)])
    features, _ = stage1_encode.encode_all(list(model.encoders.values()), images, None)
    table = {}
    for name, x in zip(model.encoders, features):
        rank = stage1_encode.feature_rank(x).double()
        table[name] = {"rank": rank.mean().item(), "spread": (rank.std() / rank.mean()).item(),
                       "diversity": stage1_encode.nuclear_diversity(x).mean().item()}
    return table


def bracket(low: float, high: float) -> str:
    return f"[{low:.1f}, {high:.1f}]"


def grid(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]) + "\n"


def markdown(name: str, result: dict) -> str:
    """One table as Markdown; the paper's columns stand last and are named so."""
    text = f"## {TITLES[name]}\n\n"
    if name == "redundancy":
        kinds, names = list(result["cur"]), list(result["kl"])
        text += grid(["encoders seen", *kinds], [[s, *(f"{v[k]:.1f}" for k in kinds)] for s, v in result["subsets"].items()])
        text += "\n" + grid(["CUR of", *kinds], [[e, *(f"{result['cur'][k][e]:+.2f}" for k in kinds)] for e in names] +
                            [["IG", *(f"{result['ig'][k]:.2f}" for k in kinds)]])
        return text + "\n" + grid(["attention KL, full to single", *names], [["nats", *(f"{v:.2f}" for v in result["kl"].values())]])
    if name == "video":
        return text + grid(["clip", "method", "tokens", "accuracy"],
                           [[kind, method, f"{v['average_tokens']:.1f}", f"{v['accuracy']:.1f} {bracket(*v['interval'])}"]
                            for kind, methods in result.items() for method, v in methods.items()])
    if name == "figure1":
        parts = []
        for stage, encoders in result["survivors"].items():
            families = list(next(iter(encoders.values())))
            parts.append(grid([stage, *families], [[e, *(f"{v[f]:.1f}" for f in families)] for e, v in encoders.items()]))
        return text + "\n".join(parts)
    rows = result["rows"]
    paper = list(dict.fromkeys(c for row in rows for c in row["paper"]))
    full = max(row["flops"] for row in rows)
    head = ["", "tokens", "FLOPs", "accuracy", *GROUPS, *FAMILIES, "difference", *GROUPS, *(f"paper: {c}" for c in paper)]
    lines = []
    for row in rows:
        differences = [f"{mean:+.1f} {bracket(low, high)}" for mean, low, high in row["differences"].values()]
        differences = [f"{differences[0]} to {row['against']}", *differences[1:]] if differences else [""] * (1 + len(GROUPS))
        lines.append([row["label"], f"{row['average_tokens']:.1f}", f"{100 * row['flops'] / full:.0f} %",
                      f"{row['accuracy']:.1f} {bracket(*row['interval'])}", *(f"{v:.1f}" for v in row["groups"].values()),
                      *(f"{row['families'][f]:.1f}" for f in FAMILIES), *differences, *(str(row["paper"].get(c, "")) for c in paper)])
    text += grid(head, lines)
    if "ranks" in result:
        text += "\n" + grid(["encoder", "expected rank", "std / mean over pictures", "nuclear-norm diversity"],
                            [[n, f"{v['rank']:.1f}", f"{100 * v['spread']:.0f} %", f"{v['diversity']:.3f}"]
                             for n, v in result["ranks"].items()])
    return text


def report(model: Meteor, names: list[str], samples: int, folder: Path | None) -> dict:
    """Measure and print tables; with a folder, write README.md and tables.json there after each one."""
    cache, results, start = {}, {}, time.time()
    for name in names:
        results[name] = run(model, name, samples, cache)
        print(markdown(name, results[name]), flush=True)
    if folder is not None:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip() or "unknown"
        head = (f"# The paper's tables on the embedded model\n\n`meteor-mini eval --table all --samples {samples}`, commit {commit}, "
                f"{(time.time() - start) / 60:.0f} minutes on {torch.get_num_threads()} CPU threads, torch {torch.__version__}, fixed "
                "seeds.\n\nAccuracy is exact match in percent on held-out questions, with a 95 % bootstrap interval over questions; "
                "differences are paired, in points, against the row named. *tokens*: visual tokens per LLM layer. *FLOPs*: encoders, "
                "projectors and the LLM's prefill, relative to the most expensive row of the table. The paper's columns are measured "
                "on other data with a 7B model: compare orders, not numbers.\n\n")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(head + "\n".join(markdown(name, results[name]) for name in names))
        (folder / "tables.json").write_text(json.dumps(results, indent=1, default=float) + "\n")
    return results
