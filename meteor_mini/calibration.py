"""Stage 3's lambda from a wanted average of tokens: a table measured once, then inverted."""

from dataclasses import replace

import torch

import stage1_encode
import stage3_decode


def lambda_from_table(table: dict | None, K: int, target: float) -> float:
    """lambda for a wanted average of `target` tokens per LLM layer when K enter it.

    table: {"K": [..ascending], "lam": [..ascending], "average": one row per K}, measured by `calibrate`. The rows of
    the two nearest K are mixed linearly, then the monotone curve is inverted, linearly too.
    Raises: ValueError without a table, for one that is not as above, or for a target outside what the table reaches
        at this K.
    """
    if not table:
        raise ValueError(
            "stage3 needs a calibrated model: call meteor_mini.calibrate(model, ...) first"
        )
    Ks, lams, rows = read_table(table)
    if not Ks[0] <= K <= Ks[-1]:
        raise ValueError(
            f"stage2 must leave {int(Ks[0])} to {int(Ks[-1])} tokens for a calibrated stage3, got {K}"
        )
    above = int(
        torch.searchsorted(Ks, torch.tensor(float(K), dtype=torch.float64)).clamp(1, len(Ks) - 1)
    )
    mix = (K - Ks[above - 1]) / (Ks[above] - Ks[above - 1])
    curve = ((1 - mix) * rows[above - 1] + mix * rows[above]).cummax(0).values  # (lams,)
    if not curve[0] <= target <= curve[-1]:
        raise ValueError(
            f"stage3 must be {curve[0]:.1f} to {curve[-1]:.1f} tokens when stage2 leaves {K}, got {target}"
        )
    i = int(
        torch.searchsorted(curve, torch.tensor(float(target), dtype=torch.float64)).clamp(
            1, len(curve) - 1
        )
    )
    step = (curve[i] - curve[i - 1]).clamp(min=1e-9)
    return float(lams[i - 1] + (target - curve[i - 1]) / step * (lams[i] - lams[i - 1]))


def read_table(table: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ks (n,), lams (m,), averages (n, m), all float64, of a table as `calibrate` makes it.

    Raises: ValueError for any other, as an edited config.json may hold.
    """
    wrong = ValueError(
        "lambda_table must hold K and lam, 2 or more ascending numbers each, and average, a row of "
        "len(lam) numbers for each K: measure it again with meteor_mini.calibrate"
    )
    try:
        Ks, lams, rows = (
            torch.tensor(table[key], dtype=torch.float64) for key in ("K", "lam", "average")
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise wrong from error
    for ascending in (Ks, lams):
        if ascending.dim() != 1 or len(ascending) < 2 or not (ascending.diff() > 0).all():
            raise wrong
    finite = all(numbers.isfinite().all() for numbers in (Ks, lams, rows))
    if rows.shape != (len(Ks), len(lams)) or not finite:
        raise wrong
    return Ks, lams, rows


@torch.no_grad()
def calibrate(
    model, images: torch.Tensor, questions: list[str], Ks: list[int], lams: list[float]
) -> dict:
    """Measure stage 3's average tokens for each K entering the LLM and each lambda: the table of `lambda_from_table`.

    Args: model: a `Meteor`; images (B, 3, H, W) in [0, 1] and B questions typical of the use; Ks, lams ascending. Stage 1
    leaves each K the tokens that `Meteor.proportions` gives it.
    """
    rows, total = [], sum(a.num_tokens for a in model.adapters)
    for K in Ks:
        stage1 = round(K * model.proportions[0])
        budget = replace(model.budget, stage1=stage1 if stage1 < total else None, stage2=K)
        encoded = model.encode(images, budget)
        embeds, attention_mask, visual_mask = model.prompt(encoded, questions)
        row = []
        for lam in lams:
            with stage3_decode.AdaptivePruner(
                model.decoder, visual_mask, budget.layers, lam=lam, k=budget.k
            ) as pruner:
                model.decoder.model(inputs_embeds=embeds, attention_mask=attention_mask)
            row.append(round(float(pruner.average_tokens().mean()), 3))
        rows.append(row)
    return {"K": list(Ks), "lam": list(lams), "average": rows}


def calibrate_model(model, images: list[torch.Tensor], questions: list[str]) -> None:
    """Measure, on pictures and questions typical of the use, all that a model of pretrained parts lacks: ranks and lambda.

    Args: images: (b, 3, H, W) in [0, 1] each, 64 pictures or more in all; questions: one for each picture; the first 16 pictures
    and questions measure lambda. Writes config["ranks"] and config["lambda_table"].
    Raises: ValueError where questions and pictures differ in number.
    """
    if len(questions) != sum(map(len, images)):
        raise ValueError(
            f"questions must be one for each of the {sum(map(len, images))} pictures, got {len(questions)}"
        )
    images = [part.to(model.device) for part in images]
    model.config["ranks"] = stage1_encode.expected_ranks(
        list(model.encoders.values()), images
    ).tolist()
    total = sum(a.num_tokens for a in model.adapters)
    Ks = sorted({max(8, round(share * total)) for share in (0.02, 0.05, 0.1, 0.2, 0.4)})
    some = [x for part in images for x in part][:16]
    model.config["lambda_table"] = calibrate(
        model, torch.stack(some), questions[:16], Ks, [0.0, *(2.0**i for i in range(10))]
    )
