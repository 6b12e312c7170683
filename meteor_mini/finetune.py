"""Trains a Meteor of pretrained parts on a user's dialogues, with transformers' Trainer.

    meteor-mini train --model small --data FILE --out DIR         phase 1: the projectors alone
    meteor-mini train --model DIR --data FILE --out DIR2 --phase all    phase 2: all but the
    encoders

Stages 1 and 2 are active at the model's own budget while it trains, stage 3 is not (the paper's
recipe). Several GPUs, bf16, accumulation, logging and resuming are the Trainer's: `accelerate
launch -m meteor_mini.cli train ...`, and --set for its own options, as `--set bf16=true`.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from .budgets import calibrate
from .model import Encoded, Meteor
from .pictures import load_picture, resize_square, to_square

PHASES = {"projectors": ["projectors"], "all": ["projectors", "decoder"]}
RATES = {"projectors": 1e-3, "all": 2e-5}  # LLaVA's
CALIBRATION = 64  # pictures that measure ranks and lambda
Dialogue = list[tuple[str, str]]  # questions with true answers about one picture


# ------------------------------------------------------------------------------------ a user's data


class Dialogues(Dataset):
    """Pictures with questions and answers.

    An item: {"images": (3, side, side) float in [0, 1], "dialogues": [(question, answer), ...]}.

    Args:
        rows: dictionaries, either LLaVA's {"image": file, "conversations": [{"from": "human" |
            "gpt", "value"}, ...]}, or {"image": a file or a Pillow image, "question", "answer"}, as
            in many Hugging Face datasets, which may be given as they are.
        side: pixels of the square that all pictures become; folder: where the files are.
    """

    def __init__(self, rows, side: int, folder: str | Path = "."):
        if len(rows) == 0:
            raise ValueError("data must hold at least one row, got none")
        self.rows, self.side, self.folder = rows, side, Path(folder)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        row = self.rows[i]
        image = row["image"]
        if isinstance(image, (str, Path)):
            image = load_picture(self.folder / image)
        else:
            image = to_square(image.convert("RGB"))
        return {"images": resize_square(image, self.side)[0], "dialogues": pairs(row)}


def pairs(row: dict) -> Dialogue:
    """A row's questions with answers, without LLaVA's placeholder for the picture.

    Raises: ValueError for a row of neither form.
    """
    if "conversations" in row:
        turns = row["conversations"]
        texts = [turn["value"].replace("<image>", "").strip() for turn in turns]
        in_turns = ["human", "gpt"] * (len(turns) // 2)
        if turns and [turn["from"] for turn in turns] == in_turns:
            return list(zip(texts[::2], texts[1::2]))
    elif {"image", "question", "answer"} <= set(row):
        return [(row["question"], row["answer"])]
    raise ValueError(
        "data must hold rows of image and conversations (human and gpt in turns), or of image, "
        f"question and answer, got {json.dumps(row, default=str)[:150]}"
    )


def read_rows(file: str | Path) -> list[dict]:
    """The rows of a JSON file: each must be of a known form, with a picture that exists.

    Raises: ValueError that names the file, or the row (from 0).
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"data {file} does not exist, or is no file")
    try:
        rows = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"data {file} is no JSON file that can be read: {error}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"data {file} must be a list of one row or more")
    for number, row in enumerate(rows):
        pairs(row)
        picture = row.get("image")
        if not (file.parent / str(picture)).is_file():
            raise ValueError(
                f"data {file}, row {number}: picture {picture} does not exist in {file.parent}"
            )
    return rows


def collate(items: list[dict]) -> dict:
    return {
        "images": torch.stack([item["images"] for item in items]),
        "dialogues": [item["dialogues"] for item in items],
    }


# ----------------------------------------------------------------------------------------- the loss


def training_loss(
    model: Meteor, images: Tensor | Encoded, dialogues: list[Dialogue]
) -> dict[str, Tensor]:
    """Mean cross-entropy of the answers' tokens, with stages 1 and 2 active at the model's own
    budget.

    Args: images (B, 3, H, W) float in [0, 1], or an `Encoded` batch; dialogues: one for each
        picture.
    Returns: {"loss": scalar, "logits": (n, V), "labels": (n,)} of the n tokens of all answers, each
        answer's <eos> with them.
    """
    encoded = images if isinstance(images, Encoded) else model.encode(images)
    return answer_loss(model, encoded.fused.tokens, dialogues)


def answer_loss(model: Meteor, visual: Tensor, dialogues: list[Dialogue]) -> dict[str, Tensor]:
    """`training_loss` from visual tokens (B, K, D), however they were made."""
    embeds, mask, position, labels = pack(model, visual, dialogues)
    labels = labels[:, 1:]  # position t predicts token t + 1
    columns = (labels != -100).any(dim=0).nonzero()[:, 0]  # where some row is asked
    logits = model.decoder(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=position,
        use_cache=False,
        logits_to_keep=columns,
    ).logits  # (B, columns, V): with the decoder's own scaling
    labels = labels[:, columns]
    asked = labels != -100
    logits = logits[asked]  # (n, V)
    return {
        "loss": F.cross_entropy(logits, labels[asked]),
        "logits": logits,
        "labels": labels[asked],
    }


def pack(
    model: Meteor, visual: Tensor, dialogues: list[Dialogue]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[text before] [visual tokens] [question 1, answer 1, <eos>] [question 2, ...]: one row a
    picture.

    No question sees another, and each has the positions that it would have alone.

    Args: visual (B, K, D).
    Returns: embeddings (B, S, D); mask (B, 1, S, S) bool, True where a query sees a key; positions
        (B, S) int64; labels (B, S) int64, -100 where nothing is asked (labels[t] is predicted at t
        - 1).
    """
    B, K, _ = visual.shape
    device = visual.device
    start = len(model.before_ids) + K  # where the first question begins
    packed = [pack_dialogue(model, dialogue, start) for dialogue in dialogues]
    pad = model.decoder.generation_config.pad_token_id
    ids, owner, position, labels = (
        pad_rows([row[key] for row in packed], filler, device)
        for key, filler in (("ids", pad), ("owner", -1), ("position", 0), ("labels", -100))
    )  # (B, T) each
    embed = model.decoder.get_input_embeddings()
    before = embed(torch.tensor(model.before_ids, device=device)).expand(B, -1, -1)
    embeds = torch.cat([before, visual.to(before.dtype), embed(ids)], dim=1)  # (B, start + T, D)

    owner = F.pad(owner, (start, 0))  # 0: the text before and the picture, which all questions see
    S = owner.shape[1]
    causal = torch.ones(S, S, dtype=torch.bool, device=device).tril()
    key_is_shared = owner[:, None, :] == 0
    same_question = owner[:, None, :] == owner[:, :, None]  # (B, S, S)
    mask = causal & (key_is_shared | same_question)

    position = torch.cat([torch.arange(start, device=device).expand(B, -1), position], dim=1)
    labels = F.pad(labels, (start, 0), value=-100)
    return embeds, mask[:, None], position, labels


def pack_dialogue(model: Meteor, dialogue: Dialogue, start: int) -> dict[str, list[int]]:
    """All questions of one picture in a row: of each token id, question, position and label."""
    questions = model.tokenize([question for question, _ in dialogue])
    answers = [answer for _, answer in dialogue]
    answers = model.tokenizer(answers, add_special_tokens=False).input_ids
    row = {"ids": [], "owner": [], "position": [], "labels": []}
    for number, (question, answer) in enumerate(zip(questions, answers), 1):
        ended = answer + [model.tokenizer.eos_token_id]
        length = len(question) + len(ended)
        row["ids"] += question + ended
        row["owner"] += [number] * length
        row["position"] += range(start, start + length)
        row["labels"] += [-100] * len(question) + ended
    return row


def pad_rows(rows: list[list[int]], filler: int, device: torch.device) -> Tensor:
    """Rows of different lengths -> (B, T) int64, filled up behind."""
    T = max(map(len, rows))
    return torch.tensor([row + [filler] * (T - len(row)) for row in rows], device=device)


# ------------------------------------------------------------------------------------- the training


class Loss(nn.Module):
    """What the Trainer trains. It would take a `Meteor`'s own config for one of transformers'."""

    # Asked for where a checkpoint lacks a key: tied word embeddings stand in it once.
    _keys_to_ignore_on_save = None

    def __init__(self, meteor: Meteor):
        super().__init__()
        self.meteor = meteor

    def forward(self, images: Tensor, dialogues: list[Dialogue]) -> dict:
        return {"loss": training_loss(self.meteor, images, dialogues)["loss"]}


class MeteorTrainer(Trainer):
    """A Trainer whose checkpoints hold each shared tensor once."""

    def _save(self, output_dir=None, state_dict=None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        trained = self.accelerator.unwrap_model(self.model)
        save_model(trained, str(folder / "model.safetensors"), metadata={"format": "pt"})


def training_arguments(checkpoints: Path, phase: str, options: dict) -> TrainingArguments:
    """LLaVA's settings, where the user gives no others."""
    defaults = {
        "output_dir": str(checkpoints),
        "learning_rate": RATES[phase],
        "lr_scheduler_type": "cosine",
        "warmup_steps": 20,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1,
        "remove_unused_columns": False,
        "report_to": "none",
        "seed": 0,
    }
    return TrainingArguments(**defaults | options)


def finetune(
    model: Meteor,
    data: Dialogues,
    out: str | Path,
    phase: str = "projectors",
    resume: bool = False,
    **options,
) -> Trainer:
    """Train, and write the result into `out`.

    A model that lacks ranks is calibrated first; lambda is measured again afterwards.

    Args: phase: of `PHASES`; resume: from the last checkpoint in out/checkpoints; options: of
        `TrainingArguments`.
    Raises: ValueError where there is nothing to resume from, by transformers.
    """
    checkpoints = Path(out) / "checkpoints"
    first = [data[i] for i in range(min(CALIBRATION, len(data)))]
    pictures = torch.stack([item["images"] for item in first])
    batches = list(pictures.split(8))
    questions = [item["dialogues"][0][0] for item in first]
    if model.config["ranks"] is None:
        calibrate(model, batches, questions)
    model.requires_grad_(False)
    for part in PHASES[phase]:
        getattr(model, part).requires_grad_(True)
    trainer = MeteorTrainer(
        Loss(model),
        training_arguments(checkpoints, phase, options),
        data_collator=collate,
        train_dataset=data,
    )
    trainer.train(resume_from_checkpoint=True if resume else None)
    model.eval().requires_grad_(False)
    calibrate(model, batches, questions)
    model.config["trained"] = True
    if trainer.is_world_process_zero():
        model.save_pretrained(out)
    return trainer
