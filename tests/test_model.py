"""The composition: Meteor against the plain concatenation of everything; its counts; its files.

The embedded checkpoint is the model under test, so these tests also say that it loads and works.
"""

import ast
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

import meteor_mini
import stage1_encode
import stage2_fuse
from meteor_mini import Budget, Meteor, load
from meteor_mini.model import text_around_picture
from meteor_mini.toy.parts import build_tokenizer
from meteor_mini.toy.questions import QUESTION_FAMILIES, images_and_questions, make_example
from stage3_decode import AdaptivePruner


@pytest.fixture(scope="module")
def model():
    return load("toy")


@pytest.fixture(scope="module")
def batch():
    """Twelve pictures, a question of each family (so prompts of different lengths), the true
    answers.
    """
    examples = [make_example(3, "val", family) for family in QUESTION_FAMILIES]
    images, questions = images_and_questions(examples)
    return images, questions, [example.answer for example in examples]


def plain(model, images, question_ids):
    """Every token of every encoder's own forward, projected and concatenated, in front of one
    question.
    """
    tokens = []
    for name, encoder, projector in zip(
        model.encoders, model.encoders.values(), model.projectors.values()
    ):
        if name == "clip":
            features = encoder.ln_post(encoder.transformer(encoder._embeds(normalised(images))))[
                :, 1:
            ]
        elif name == "eva":
            features = encoder.forward_features(normalised(images))[:, encoder.num_prefix_tokens :]
        elif name == "convnext":
            features = encoder.forward_features(normalised(images)).flatten(2).transpose(1, 2)
        else:
            features = encoder(flattened_patches=flattened(images)).last_hidden_state
        tokens.append(projector(features))
    embed = model.decoder.get_input_embeddings()
    before = embed(torch.tensor([model.tokenizer(model.before).input_ids]))
    return torch.cat([before, *tokens, embed(torch.tensor([question_ids]))], dim=1)


def normalised(images):
    """96 x 96 pixels, of CLIP's mean and deviation."""
    bicubic = InterpolationMode.BICUBIC
    images = transforms.resize(images, [96, 96], bicubic, antialias=True).clamp(0, 1)
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def flattened(images):
    """Pix2Struct's input by loops: standardise the picture, cut 16 x 16 patches, put row and column
    (from 1) in front.
    """
    rows = []
    for image in images:
        image = (image - image.mean()) / max(image.std(), image.numel() ** -0.5)
        for r in range(12):
            for c in range(12):
                patch = (
                    image[:, 16 * r : 16 * r + 16, 16 * c : 16 * c + 16].permute(1, 2, 0).flatten()
                )
                rows.append(torch.cat([torch.tensor([r + 1.0, c + 1.0]), patch]))
    return torch.stack(rows).view(len(images), 144, -1)


@torch.no_grad()
def test_keep_all_equals_the_plain_concatenation_of_everything(model, batch):
    images, questions, _ = batch
    ids = model.tokenize(questions)
    for b in range(3):
        expected = plain(model, images[b : b + 1], ids[b])
        encoded = model.encode(images[b : b + 1], Budget.keep_all())
        embeds, mask, visual = model.prompt(encoded, questions[b : b + 1])
        assert (embeds - expected).abs().max() <= 1e-5
        first = len(model.before_ids)
        assert mask.all() and visual.sum() == 576 and visual[0, first : first + 576].all()
        theirs = model.decoder.generate(
            inputs_embeds=expected, attention_mask=mask, max_new_tokens=24, do_sample=False
        )
        mine, pruner = model.generate(encoded, questions[b : b + 1], Budget.keep_all())
        assert pruner is None and torch.equal(mine, theirs)


@torch.no_grad()
def test_an_infinite_lambda_changes_nothing(model, batch):
    images, questions = batch[0][:6], batch[1][:6]
    budget = Budget(stage1=168, stage2=80)
    encoded = model.encode(images, budget)
    plainly, none = model.generate(encoded, questions, budget)
    embeds, mask, visual = model.prompt(encoded, questions)
    with AdaptivePruner(model.decoder, visual, lam=float("inf")):
        pruned = model.decoder.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=24, do_sample=False
        )
    assert none is None and torch.equal(plainly, pruned)


def test_encode_is_stages_1_and_2_in_a_row(model, batch):
    images, budget = batch[0][:2], model.budget
    with torch.no_grad():
        encoded = model.encode(images)
        features, kept = stage1_encode.encode_all(
            list(model.encoders.values()), model.pixels(images), budget.stage1, model.ranks
        )
        fused = stage2_fuse.fuse(
            [p(x) for p, x in zip(model.projectors.values(), features)],
            budget.stage2,
        )
    assert torch.equal(encoded.fused.tokens, fused.tokens) and torch.equal(
        encoded.fused.keep_idx, fused.keep_idx
    )
    assert all(torch.equal(a, b) for a, b in zip(encoded.stage1_idx, kept))


def test_the_books_add_up(model, batch):
    images, questions = batch[0][:4], batch[1][:4]
    for budget in (model.budget, Budget.keep_all(), Budget(stage1=100), Budget(stage2=50)):
        for answer in model.answer(images, questions, budget):
            stage1 = 576 if budget.stage1 is None else budget.stage1
            stage2 = stage1 if budget.stage2 is None else budget.stage2
            assert answer.tokens["encoders"] == 576
            assert answer.tokens["stage1"] == stage1 == sum(answer.survivors["stage1"].values())
            assert answer.tokens["stage2"] == stage2 == sum(answer.survivors["stage2"].values())
            assert sum(answer.survivors["stage3"].values()) <= answer.tokens["stage3"] <= stage2
            for name in model.encoders:
                first, second, third = (
                    answer.kept[s][name] for s in ("stage1", "stage2", "stage3")
                )
                assert first.shape == (12, 12)
                assert (second <= first).all() and (
                    third <= second
                ).all()  # a patch never comes back
                assert int(second.sum()) == answer.survivors["stage2"][name]


def test_a_batch_of_different_questions_equals_one_by_one(model, batch):
    images, questions = batch[0][:6], batch[1][:6]
    together = model.answer(images, questions)
    for b, question in enumerate(questions):
        alone = model.answer(images[b : b + 1], [question])[0]
        assert alone.text == together[b].text and alone.survivors == together[b].survivors
        for stage, maps in alone.kept.items():
            assert all(torch.equal(m, together[b].kept[stage][n]) for n, m in maps.items()), (
                stage,
                question,
            )


def test_one_encoding_serves_many_questions(model, batch):
    images = batch[0][:1]
    with torch.no_grad():
        encoded = model.encode(images)
    for question in ("is there a red circle ?", "describe the picture ."):
        again = model.answer(encoded.rows([0, 0]), [question, question])
        assert again[0].text == again[1].text == model.answer(images, [question])[0].text


def test_save_and_load_give_the_same_answers(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    written = {f.name for f in tmp_path.iterdir()} - {
        "README.md"
    }  # huggingface_hub adds a model card
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert written == {"config.json", "model.safetensors"} | tokenizer
    again = Meteor.from_pretrained(tmp_path)
    assert not again.training
    loaded = again.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded[key], value), key
    images, questions = batch[0][:4], batch[1][:4]
    assert [a.text for a in again.answer(images, questions)] == [
        a.text for a in model.answer(images, questions)
    ]


def test_the_prompt_of_the_embedded_model_is_its_own_chat_template(model):
    assert model.before.startswith("<bos>") and model.after == "\n{}<ans>"
    ids = model.tokenizer(model.before, add_special_tokens=False).input_ids
    assert model.before_ids == ids
    assert ids[0] == model.tokenizer.bos_token_id and model.tokenizer.unk_token_id not in ids
    vicuna = build_tokenizer(["what"])
    vicuna.chat_template = None
    assert text_around_picture(vicuna) == ("<bos>USER: ", "\n{} ASSISTANT:")


def test_digits_are_joined_and_case_does_not_matter(model):
    ids = model.tokenize(["What NUMBER is printed?", "what number is printed?"])
    assert ids[0] == ids[1]
    row = model.tokenizer("number 407 , red", add_special_tokens=False).input_ids
    assert model.decode([row]) == ["number 407 , red"]


@pytest.mark.parametrize(
    "questions, kind, message",
    [
        ([""], ValueError, "at least one word"),
        (["  "], ValueError, "at least one word"),
        (
            ["is there a zebra or a giraffe?"],
            ValueError,
            "does not know: giraffe, zebra; it knows: .*circle",
        ),
        ("what", TypeError, "list of str"),
        ([3], TypeError, "list of str"),
        (["what number is printed?"] * 2, ValueError, "one for each of the 1 pictures, got 2"),
    ],
)
def test_bad_questions_get_one_sentence(model, batch, questions, kind, message):
    with pytest.raises(kind, match=message):
        model.answer(batch[0][:1], questions)


def test_several_answers_to_each_question_stand_side_by_side(model, batch):
    images, questions = batch[0][:2], batch[1][:2]
    one_each = model.answer(images, questions, num_beams=3)
    three_each = model.answer(images, questions, num_beams=3, num_return_sequences=3)
    assert len(three_each) == 6
    for b in range(2):
        assert three_each[3 * b].text == one_each[b].text
        for answer in three_each[3 * b : 3 * b + 3]:
            assert answer.survivors == one_each[b].survivors and answer.layers == one_each[b].layers


def test_answers_are_the_same_where_generate_returns_a_dictionary(model, batch):
    images, questions = batch[0][:2], batch[1][:2]
    plain = model.answer(images, questions)
    as_dict = model.answer(images, questions, return_dict_in_generate=True)
    assert [answer.text for answer in as_dict] == [answer.text for answer in plain]


def test_no_question_has_no_answer(model, batch):
    images, questions = batch[0][:2], batch[1][:2]
    assert model.answer(images[:0], []) == []
    assert model.answer(model.encode(images).rows([]), []) == []
    with pytest.raises(ValueError, match="images must hold a picture for each question"):
        model.answer(images[:0], questions)


def test_threads_that_share_a_model_get_the_answers_that_they_get_alone(model, batch):
    images, questions = batch[0][:6], batch[1][:6]
    alone = [a.text for a in model.answer(images, questions)]
    with ThreadPoolExecutor(3) as pool:
        asked = [
            pool.submit(model.answer, images[b : b + 1], questions[b : b + 1])
            for b in range(len(questions))
        ]
    assert [future.result()[0].text for future in asked] == alone


def test_nan_pictures_are_refused(model):
    with pytest.raises(ValueError, match="images"):
        model.answer(torch.full((1, 3, 96, 96), float("nan")), ["what number is printed?"])


def test_a_file_name_in_place_of_a_picture_says_how_to_load_it(model):
    with pytest.raises(
        TypeError, match="images must be a tensor .*load_picture.file. gives, .* got str"
    ):
        model.answer("picture.png", ["what number is printed?"])


# ------------------------------------------------------------------------------------ the house


def imports(file: Path) -> set[str]:
    """The modules of this project that a module imports at its top, as "toy.world"."""
    found = set()
    for node in ast.parse(file.read_text()).body:  # not those inside functions
        if isinstance(node, ast.ImportFrom) and node.level:
            where = "" if file.parent.name == "meteor_mini" or node.level == 2 else "toy."
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {where + name for name in names}
    return found


@pytest.mark.parametrize(
    "module",
    ["model", "budgets", "weights", "pictures", "vlm", "finetune", "baselines", "flops"]
    + ["bench", "plots", "cli"],
)
def test_nothing_that_serves_other_models_imports_the_toy(module):
    root = Path(meteor_mini.__file__).parent
    reached, waiting = set(), {module}
    while waiting:
        name = waiting.pop()
        reached.add(name)
        file = root / f"{name.replace('.', '/')}.py"
        if file.is_file():
            waiting |= imports(file) - reached
    assert not [name for name in reached if name.split(".")[0] in ("toy", "evaluate", "tables")]


# --------------------------------------------------------------------------------- model files


def test_a_directory_without_weights_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="has no config.json"):
        Meteor.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(model.config))
    with pytest.raises(ValueError, match="has no model.safetensors"):
        Meteor.from_pretrained(tmp_path)


def test_a_checkpoint_of_another_shape_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["projectors.clip.0.weight"] = torch.zeros(3, 3)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="(?s)does not fit .*projectors.clip.0.weight"):
        Meteor.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is not the configuration of a Meteor"):
        Meteor.from_pretrained(tmp_path)


def test_truncated_weights_and_pickles_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="does not fit"):
        Meteor.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="has no model.safetensors"):
        Meteor.from_pretrained(tmp_path)


def test_an_unreachable_hub_is_one_sentence_that_says_what_to_do():
    with pytest.raises(
        ValueError,
        match="could not be fetched from the hub: .*`hf download nobody/no-such-model`",
    ):
        Meteor.from_pretrained("nobody/no-such-model")


def test_weights_in_half_precision_load_as_float32(model, tmp_path):
    model.save_pretrained(tmp_path)
    weights = {k: v.half() for k, v in load_file(tmp_path / "model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors")
    again = Meteor.from_pretrained(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    shutil.rmtree(tmp_path)
