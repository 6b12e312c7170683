"""Trains a Meteor of pretrained parts on a user's pictures and dialogues, with transformers' Trainer.

    meteor-mini train --preset small --data FILE --out DIR                  phase 1: the projectors alone
    meteor-mini train --model DIR --data FILE --out DIR2 --phase all        phase 2: everything but the encoders

Stages 1 and 2 are active at the model's own budget while it trains, stage 3 is not (the paper's recipe). Several GPUs, bf16,
accumulation, logging and resuming are the Trainer's: `accelerate launch -m meteor_mini train ...`, more options in `Trainer`'s
own words with --set, as `--set bf16=true --set gradient_accumulation_steps=4`.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from .calibration import calibrate_model
from .model import Meteor
from .pictures import load_picture, to_square

PHASES = {"projectors": ["projectors"], "all": ["projectors", "decoder"]}
RATES = {"projectors": 1e-3, "all": 2e-5}  # LLaVA's
CALIBRATION = 64  # pictures that measure ranks and lambda


class Dialogues(Dataset):
    """Pictures with questions and answers. rows: dictionaries, either LLaVA's {"image": file, "conversations": [{"from":
    "human" | "gpt", "value"}, ...]}, its files in `folder`, or {"image": a file or a Pillow image, "question", "answer"},
    as in many Hugging Face datasets, which may be given as they are; side: pixels of the square that all pictures become.

    An item: {"images": (3, side, side) float in [0, 1], "dialogues": [(question, answer), ...]}.
    """

    def __init__(self, rows, side: int, folder: str | Path = "."):
        self.rows, self.side, self.folder = rows, side, Path(folder)
        if not len(rows):
            raise ValueError("data must hold at least one row, got none")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        row = self.rows[i]
        image = row["image"]
        image = (
            load_picture(self.folder / image)
            if isinstance(image, (str, Path))
            else to_square(image.convert("RGB"))
        )
        image = F.interpolate(image, (self.side, self.side), mode="bicubic", antialias=True).clamp(
            0, 1
        )[0]
        return {"images": image, "dialogues": pairs(row)}


def pairs(row: dict) -> list[tuple[str, str]]:
    """A row's questions with answers, without LLaVA's placeholder for the picture.

    Raises: ValueError for a row of neither form.
    """
    if "conversations" in row:
        turns = row["conversations"]
        said = [turn["value"].replace("<image>", "").strip() for turn in turns]
        if [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2) and turns:
            return list(zip(said[::2], said[1::2]))
    elif {"image", "question", "answer"} <= set(row):
        return [(row["question"], row["answer"])]
    raise ValueError(
        "data must hold rows of image and conversations (human and gpt in turns), or of image, question and "
        f"answer, got {json.dumps(row, default=str)[:150]}"
    )


def read_rows(file: str | Path):
    """The rows of a JSON file, each of a known form and with a picture that exists; or of a directory from `save_to_disk` of
    Hugging Face's datasets, pictures inside.

    Raises: ValueError that names the file, or the row (from 0).
    """
    file = Path(file)
    if file.is_dir():
        return read_dataset(file)
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
        if not (file.parent / str(row.get("image"))).is_file():
            raise ValueError(
                f"data {file}, row {number}: picture {row.get('image')} does not exist in {file.parent}"
            )
    return rows


def read_dataset(folder: Path):
    try:
        from datasets import load_from_disk  # nothing else here needs it

        pairs((rows := load_from_disk(str(folder)))[0])  # columns are the same in all rows
        return rows
    except ImportError as error:
        raise ValueError(
            f"data {folder} is a directory: reading one of save_to_disk needs `pip install datasets`"
        ) from error
    except (OSError, LookupError) as error:  # of another kind; several datasets; no row
        raise ValueError(
            f"data {folder} must hold one dataset with a row or more, from save_to_disk of datasets: {error}"
        ) from error


def load_data(file: str | Path, side: int) -> Dialogues:
    """What `read_rows` reads; pictures of a JSON file are found from its folder."""
    return Dialogues(read_rows(file), side, Path(file).parent)


def collate(items: list[dict]) -> dict:
    return {
        "images": torch.stack([item["images"] for item in items]),
        "dialogues": [item["dialogues"] for item in items],
    }


class Loss(nn.Module):
    """What the Trainer trains. It would take a `Meteor`'s own config for one of transformers'."""

    _keys_to_ignore_on_save = (
        None  # asked for where a checkpoint lacks a key: tied word embeddings stand in it once
    )

    def __init__(self, meteor: Meteor):
        super().__init__()
        self.meteor = meteor

    def forward(self, images: torch.Tensor, dialogues: list) -> dict:
        return {"loss": self.meteor(images, dialogues)["loss"]}


class MeteorTrainer(Trainer):
    """A Trainer whose checkpoints hold each shared tensor once."""

    def _save(self, output_dir=None, state_dict=None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        weights = self.accelerator.unwrap_model(self.model).meteor.weights()
        arrays = {f"meteor.{k}": v.contiguous() for k, v in weights.items()}
        save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})


def side_of(model: Meteor) -> int:
    return max(max(adapter.size) for adapter in model.adapters)


def finetune(
    model: Meteor,
    data: Dialogues,
    out: str | Path,
    phase: str = "projectors",
    resume: bool = False,
    **options,
) -> Trainer:
    """Train; a model that lacks ranks is calibrated first, lambda is measured again afterwards; the result goes into `out`.

    Args: phase: of `PHASES`; resume: from the last checkpoint in out/checkpoints; options: of `TrainingArguments`.
    """
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {', '.join(PHASES)}, got {phase!r}")
    out = Path(out)
    if resume and not list((out / "checkpoints").glob("checkpoint-*")):
        raise ValueError(
            f"resume finds no checkpoint in {out / 'checkpoints'}: run once without it"
        )
    for number in (
        range(len(data)) if model.config["words"] else ()
    ):  # a tokenizer that does not know every word
        try:
            model.tokenize([text for pair in pairs(data.rows[number]) for text in pair])
        except ValueError as error:
            raise ValueError(f"data, row {number}: {error}") from error
    first = [data[i] for i in range(min(CALIBRATION, len(data)))]
    batches = [
        torch.stack([item["images"] for item in first[i : i + 8]]) for i in range(0, len(first), 8)
    ]
    questions = [item["dialogues"][0][0] for item in first]
    if model.config["ranks"] is None:
        calibrate_model(model, batches, questions)
    model.requires_grad_(False)
    for part in PHASES[phase]:
        getattr(model, part).requires_grad_(True)
    defaults = dict(
        output_dir=str(out / "checkpoints"),
        learning_rate=RATES[phase],
        lr_scheduler_type="cosine",
        warmup_steps=20,
        per_device_train_batch_size=8,
        num_train_epochs=1,
        remove_unused_columns=False,
        report_to="none",
        seed=0,
    )
    trainer = MeteorTrainer(
        Loss(model),
        TrainingArguments(**defaults | options),
        data_collator=collate,
        train_dataset=data,
    )
    trainer.train(resume_from_checkpoint=resume or None)
    model.eval().requires_grad_(False)
    calibrate_model(model, batches, questions)
    model.config["trained"] = True
    if trainer.is_world_process_zero():
        model.save_pretrained(out)
    return trainer
