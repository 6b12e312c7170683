"""Training a Meteor on dialogues with transformers' Trainer: data, a tiny run, resuming, two
processes.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from meteor_mini import Budget, Meteor, budgets, load
from meteor_mini.finetune import (
    Dialogues,
    collate,
    finetune,
    pairs,
    read_rows,
    training_loss,
)
from meteor_mini.toy.questions import QUESTION_FAMILIES, images_and_questions, make_example

pytest.importorskip("accelerate", reason="accelerate is not installed: pip install -e '.[train]'")


@pytest.fixture(autouse=True)
def short_calibration(monkeypatch):
    """Lambda is measured at four points on four pictures: its table is tested elsewhere."""
    monkeypatch.setattr("meteor_mini.finetune.CALIBRATION", 4)
    monkeypatch.setattr(budgets, "LAMBDAS", [0.0, 64.0])
    monkeypatch.setattr(budgets, "K_SHARES", (0.1, 0.4))


@pytest.fixture
def data(tmp_path):
    """Eight pictures in LLaVA's format, and the file that lists them."""
    rows = []
    for i in range(8):
        example = make_example(i, "train", "value")
        Image.fromarray(example.picture.image).save(tmp_path / f"{i}.png")
        turns = [
            {"from": "human", "value": f"<image>\n{example.question}"},
            {"from": "gpt", "value": example.answer},
        ]
        rows.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return tmp_path / "data.json"


def load_data(file, side):
    return Dialogues(read_rows(file), side, Path(file).parent)


def untrained():
    """The embedded model with projectors as random as a preset's."""
    model = load("toy")
    torch.manual_seed(0)
    for module in model.projectors.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


SHORT = dict(
    max_steps=4,
    per_device_train_batch_size=2,
    learning_rate=3e-3,
    warmup_steps=0,
    logging_steps=1,
    disable_tqdm=True,
    use_cpu=True,
)


@pytest.fixture(scope="module")
def model():
    return load("toy")


@pytest.fixture(scope="module")
def batch():
    """A picture, a question and its answer of each family."""
    examples = [make_example(3, "val", family) for family in QUESTION_FAMILIES]
    images, questions = images_and_questions(examples)
    return images, questions, [example.answer for example in examples]


def test_rows_of_both_forms():
    turns = [
        {"from": "human", "value": "a\n<image>"},
        {"from": "gpt", "value": "b"},
        {"from": "human", "value": "c"},
        {"from": "gpt", "value": "d"},
    ]
    assert pairs({"image": "x", "conversations": turns}) == [("a", "b"), ("c", "d")]
    assert pairs({"image": "x", "question": "a", "answer": "b"}) == [("a", "b")]
    for bad in (
        {"image": "x"},
        {"conversations": turns[1:]},
        {"conversations": []},
        {"question": "a", "answer": "b"},
    ):
        with pytest.raises(ValueError, match="data must hold rows of image and"):
            pairs(bad)


def test_pictures_become_squares_of_one_size(data):
    loaded = load_data(data, 64)
    batch = collate([loaded[0], loaded[3]])
    assert len(loaded) == 8 and batch["images"].shape == (2, 3, 64, 64)
    example = make_example(3, "train", "value")
    assert batch["dialogues"][1] == [(example.question, example.answer)]
    pillow = Dialogues(
        [{"image": Image.fromarray(np.zeros((20, 40), np.uint8)), "question": "a", "answer": "b"}],
        32,
    )
    assert pillow[0]["images"].shape == (3, 32, 32) and pillow[0]["dialogues"] == [("a", "b")]


def test_bad_data_is_refused(tmp_path, data):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "dict.json").write_text("{}")
    row = {"image": "1.png", "question": "a", "answer": "b"}
    (tmp_path / "gone.json").write_text(json.dumps([row, row | {"image": "no.png"}]))
    for file, message in (
        ("none.json", "does not exist"),
        (".", "or is no file"),
        ("bad.json", "is no JSON file"),
        ("dict.json", "must be a list of one row"),
        ("gone.json", "row 1: picture no.png does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            load_data(tmp_path / file, 32)
    with pytest.raises(ValueError, match="at least one row"):
        Dialogues([], 32)


def test_the_snippet_of_docs_training_runs_on_rows_with_pictures_inside(tmp_path, monkeypatch):
    """With the embedded model in place of "small", and a list in place of a dataset of the hub."""
    rows = []
    for example in (make_example(i, "train", "value") for i in range(8)):
        image = Image.fromarray(example.picture.image)
        rows.append({"image": image, "question": example.question, "answer": example.answer})
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    *_, snippet = re.findall(r"```py\n(.*?)```", page, flags=re.S)
    monkeypatch.setitem(
        sys.modules, "datasets", SimpleNamespace(load_dataset=lambda name, split: rows)
    )
    monkeypatch.chdir(tmp_path)
    assert snippet.count('"small"') == snippet.count("max_steps=1000") == 1
    exec(
        compile(
            snippet.replace("small", "toy").replace(
                "max_steps=1000", "max_steps=2, per_device_train_batch_size=2, use_cpu=True"
            ),
            "docs/training.md",
            "exec",
        ),
        {},
    )
    assert Meteor.from_pretrained(tmp_path / "phase1").config["trained"]


def copy_of_weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed_parts(model, before):
    after = model.state_dict()
    return {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}


def test_phase_one_trains_the_projectors_alone_and_the_loss_falls(data, tmp_path):
    model = untrained()
    before = copy_of_weights(model)
    trainer = finetune(
        model, load_data(data, model.side), tmp_path / "out", **SHORT | dict(max_steps=8)
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert np.mean(losses[-3:]) < 0.8 * losses[0]
    assert changed_parts(model, before) == {"projectors"}
    saved = Meteor.from_pretrained(tmp_path / "out")
    assert saved.config["trained"] and not changed_parts(saved, model.state_dict())


def test_phase_two_trains_the_decoder_too_and_resuming_gives_the_same_weights(
    data, tmp_path, monkeypatch
):
    monkeypatch.setattr("meteor_mini.finetune.calibrate", lambda *_: None)  # moves no weight
    steps = SHORT | dict(max_steps=2, save_steps=1)
    whole, part = untrained(), untrained()
    before = copy_of_weights(whole)
    finetune(whole, load_data(data, 96), tmp_path / "whole", "all", **steps)
    (tmp_path / "part").mkdir()
    (tmp_path / "whole" / "checkpoints" / "checkpoint-2").rename(tmp_path / "later")
    (tmp_path / "whole" / "checkpoints").rename(tmp_path / "part" / "checkpoints")
    trainer = finetune(part, load_data(data, 96), tmp_path / "part", "all", resume=True, **steps)
    later = [e for e in trainer.state.log_history if e.get("step", 0) > 1 and "loss" in e]
    assert trainer.state.global_step == 2 and len(later) == 1
    resumed = part.state_dict()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=1e-6)
    assert changed_parts(whole, before) == {"projectors", "decoder"}


SCRIPT = """
import json, sys
from tests.test_finetune import SHORT, finetune, load_data, untrained
data, out, batch = sys.argv[1:]
options = {} if batch == "4" else {"ddp_backend": "gloo"}
options |= {"max_steps": 3, "per_device_train_batch_size": int(batch)}
trainer = finetune(untrained(), load_data(data, 96), out, **SHORT | options)
assert trainer.args.world_size == 4 // int(batch)
if trainer.is_world_process_zero():
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    open(out + "/loss.json", "w").write(json.dumps(losses))
"""


@pytest.mark.slow  # starts two more Pythons
def test_two_processes_give_the_loss_of_one(data, tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    losses, root = {}, str(Path(__file__).parents[1])
    # Accelerate has no word for several CPU processes but MPI: torchrun's, which it calls
    # multi-GPU, serves as well with gloo.
    for processes, batch, kind in ((1, 4, ["--cpu"]), (2, 2, ["--multi_gpu"])):
        out = tmp_path / f"out{processes}"
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            *kind,
            "--num_processes",
            str(processes),
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            tmp_path / "run.py",
            data,
            out,
            str(batch),
        ]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        losses[processes] = json.loads((out / "loss.json").read_text())
    assert losses[1] == pytest.approx(losses[2], rel=0.02)


# ----------------------------------------------------------------------------- the loss


@torch.no_grad()
def test_the_training_loss_equals_each_question_alone(model, batch):
    images, questions, answers = (part[:4] for part in batch)
    dialogues = [
        [(q, a), ("describe the picture .", "number 4 2")] for q, a in zip(questions, answers)
    ]
    encoded = model.encode(images)
    losses = []
    for b, dialogue in enumerate(dialogues):
        for question, answer in dialogue:
            embeds, *_ = model.prompt(encoded.rows([b]), [question])  # <bos> picture question <ans>
            said = model.tokenizer(answer, add_special_tokens=False).input_ids + [
                model.tokenizer.eos_token_id
            ]
            whole = torch.cat(
                [embeds, model.decoder.get_input_embeddings()(torch.tensor([said]))], dim=1
            )
            logp = (
                model.decoder(inputs_embeds=whole)
                .logits[0, embeds.shape[1] - 1 : -1]
                .log_softmax(-1)
            )
            losses += [-logp[t, token].item() for t, token in enumerate(said)]
    out = training_loss(model, encoded, dialogues)
    assert out["logits"].shape[0] == out["labels"].shape[0] == len(losses)
    assert out["loss"].item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    from_images = training_loss(model, images, dialogues)["loss"]
    assert out["loss"].item() == pytest.approx(from_images.item(), rel=1e-5)


def test_training_gradients_reach_encoders_projectors_and_decoder(model, batch):
    images, questions, truths = batch
    dialogues = [[(questions[b], truths[b])] for b in range(2)]
    encoded = model.encode(images[:2], Budget(stage1=60, stage2=30))
    training_loss(model, encoded, dialogues)["loss"].backward()
    for part in (*model.encoders.values(), *model.projectors.values(), model.decoder):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    model.zero_grad()


def test_logits_have_the_decoders_own_scaling(model, batch):
    """Cohere multiplies its logits, Granite divides them."""
    images, questions, answers = batch
    dialogues = [[pair] for pair in zip(questions, answers)][:2]
    scaled = load("toy")

    def divide(module, args, output):
        output.logits = output.logits / 4
        return output

    scaled.decoder.register_forward_hook(divide)
    with torch.no_grad():
        plain = training_loss(model, images[:2], dialogues)
        divided = training_loss(scaled, images[:2], dialogues)
    torch.testing.assert_close(divided["logits"], plain["logits"] / 4)
