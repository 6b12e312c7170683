"""Stage 3 around vision-language models of transformers as they come, and their own `generate`.

Tiny random ones of the real classes (tiny_models.py). One case a family; every property for every
family.
"""

import json
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers as T
from PIL import Image
from tiny_models import EYES, IMAGE, TEXT, VLMS, batch
from tiny_models import vlm as tiny_vlm

from meteor_mini import cli, vlm
from meteor_mini.pictures import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from meteor_mini.toy.parts import build_tokenizer
from stage3_decode import AdaptivePruner, find_cache

OPTIONS = dict(max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
PROMPTS = {
    "one picture": [[1, 20, 21, 22, 23, IMAGE, 30, 31]],
    "two pictures": [[1, IMAGE, 40, IMAGE, 41, 42]],
    "no picture": [[1, 50, 51, 52, 53]],
    "several turns": [
        [1, 5, IMAGE, 7, 8, 60, 61, 62, 5, IMAGE, 30, 31],
        [1, 5, IMAGE, 7, 60, 5, 33, 34, 35],
        [1, 5, 20, 60, 61, 5, IMAGE, 21, 62, 63, 5, IMAGE, 36, 62, 5, 37, 38, 39],
    ],
    "ragged": [
        [1, 5, IMAGE, 7, 8, 9, 10],
        [1, IMAGE, 40, 44, IMAGE, 41],
        [1, 60, IMAGE, 61, 62, 63, 64, 65],
    ],
}


@pytest.fixture(scope="module", params=VLMS)
def family(request):
    return tiny_vlm(request.param)


@pytest.mark.parametrize("prompts", PROMPTS)
def test_lambda_infinity_generates_as_the_model_alone(family, prompts):
    inputs, visual_mask = batch(family, PROMPTS[prompts])
    alone = family[0].generate(**inputs, **OPTIONS)
    with AdaptivePruner(family[0], visual_mask, lam=math.inf) as pruner:
        assert torch.equal(family[0].generate(**inputs, **OPTIONS), alone)
    assert torch.equal(pruner.average_tokens(), visual_mask.sum(dim=1).float())


@pytest.mark.parametrize("prompts", PROMPTS)
def test_pruned_caches_hold_the_text_and_the_tokens_kept(family, prompts):
    inputs, visual_mask = batch(family, PROMPTS[prompts])
    with AdaptivePruner(family[0], visual_mask, lam=2) as pruner:
        out = family[0].generate(**inputs, **OPTIONS, return_dict_in_generate=True)
    had = visual_mask.sum(dim=1)
    assert all((K <= had).all() and (K >= had.clamp(max=1)).all() for K in pruner.counts.values())
    if had.any():
        assert pruner.counts[5].sum() < had.sum()
    text = inputs["attention_mask"].sum(dim=1) - had
    for layer, cached in enumerate(find_cache(out).layers):
        left = next((pruner.counts[i] for i in (5, 3, 1) if i <= layer), None)
        longest = visual_mask.shape[1] if left is None else int((text + left).max())
        assert cached.keys.shape[2] == longest + 2  # of 3 new tokens the last is not read


def test_in_several_turns_the_text_after_the_last_picture_asks(family):
    """Of each prompt: as if query_mask named those tokens, and not as if it named all text.

    Counts are each prompt's own.
    """
    prompts = PROMPTS["several turns"]
    inputs, visual_mask = batch(family, prompts)
    masks = {
        "last": torch.zeros_like(visual_mask),
        "all": inputs["attention_mask"].bool() & ~visual_mask,
    }
    for b, prompt in enumerate(prompts):
        text = prompt[len(prompt) - prompt[::-1].index(IMAGE) :]
        assert inputs["input_ids"][b, -len(text) :].tolist() == text and IMAGE not in text
        masks["last"][b, -len(text) :] = True
    runs = {}
    for name, query_mask in {"own": None, **masks}.items():
        with AdaptivePruner(family[0], visual_mask, lam=2, query_mask=query_mask) as pruner:
            ids = family[0].generate(**inputs, **OPTIONS)
        runs[name] = [ids, *pruner.vav.values()], pruner
    same = {
        name: all(torch.equal(a, b) for a, b in zip(runs["own"][0], runs[name][0]))
        for name in masks
    }
    assert same == {"last": True, "all": False}
    own = runs["own"][1]
    for i, kept in own.kept.items():
        assert torch.equal(kept.sum(dim=1), own.counts[i]) and not (kept & ~visual_mask).any()
    sums = [sum(own.vav[1][b].topk(5).values.tolist()) for b in range(3)]
    assert own.counts[1].tolist() == [max(1, math.floor(2 * s + 0.5)) for s in sums]


@pytest.mark.parametrize("prompts", ["ragged", "several turns"])
def test_a_ragged_batch_equals_its_prompts_one_by_one(family, prompts):
    prompts, first = PROMPTS[prompts], 0
    inputs, visual_mask = batch(family, prompts)
    with AdaptivePruner(family[0], visual_mask, lam=2) as pruner:
        together = family[0].generate(**inputs, **OPTIONS)[:, inputs["input_ids"].shape[1] :]
    for b, prompt in enumerate(prompts):
        real = inputs["attention_mask"][b].bool()
        one, one_mask = batch(family, [prompt], first)
        assert torch.equal(one["input_ids"][0], inputs["input_ids"][b, real])
        with AdaptivePruner(family[0], one_mask, lam=2) as single:
            alone = family[0].generate(**one, **OPTIONS)[:, one["input_ids"].shape[1] :]
        assert torch.equal(alone[0], together[b])
        assert all(torch.equal(single.kept[i][0], pruner.kept[i][b, real]) for i in pruner.layers)
        first += prompt.count(IMAGE)


@torch.no_grad()
def test_logits_of_a_ragged_batch_equal_its_prompts_one_by_one(family):
    """And with lambda = infinity they are the model's own, bit for bit."""
    prompts, first = PROMPTS["ragged"], 0
    inputs, visual_mask = batch(family, prompts)
    real = inputs["attention_mask"].bool()
    alone = family[0](**inputs).logits
    with AdaptivePruner(family[0], visual_mask, lam=math.inf):
        assert torch.equal(family[0](**inputs).logits[real], alone[real])
    with AdaptivePruner(family[0], visual_mask, lam=2):
        together = family[0](**inputs).logits
    assert (together[:, -1] - alone[:, -1]).abs().max() > 1e-4, "nothing changes: a weak test"
    for b, prompt in enumerate(prompts):
        one, one_mask = batch(family, [prompt], first)
        with AdaptivePruner(family[0], one_mask, lam=2):
            logits = family[0](**one).logits
        assert (logits[0, -1] - together[b, -1]).abs().max() < 1e-4
        first += prompt.count(IMAGE)


def test_sampling_with_a_seed_and_bfloat16(family):
    inputs, visual_mask = batch(family, PROMPTS["ragged"])
    sample = OPTIONS | dict(do_sample=True, top_k=0)

    def run(model, **pixels):
        torch.manual_seed(1)
        return model.generate(**inputs | pixels, **sample)

    alone = run(family[0])
    with AdaptivePruner(family[0], visual_mask, lam=math.inf):
        assert torch.equal(run(family[0]), alone)
    try:
        half, low = (
            family[0].to(torch.bfloat16),
            {k: v.bfloat16() for k, v in inputs.items() if "pixel" in k},
        )
        alone = run(half, **low)
        with AdaptivePruner(half, visual_mask, lam=math.inf):
            assert torch.equal(run(half, **low), alone)
        with AdaptivePruner(half, visual_mask, lam=2) as pruner:
            run(half, **low)
        assert pruner.average_tokens().sum() < visual_mask.sum()
    finally:
        family[0].float()


def test_the_model_is_as_before_also_after_an_error(family):
    model = family[0]
    inputs, visual_mask = batch(family, PROMPTS["ragged"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}

    def hooks():
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    there = hooks()
    with (
        pytest.raises(ValueError, match="tokens of visual_mask, got 3"),
        AdaptivePruner(model, visual_mask, lam=2),
    ):
        model.generate(**batch(family, [[1, 50, 51]])[0], **OPTIONS)
    assert hooks() == there and attributes == {
        name: set(vars(module)) for name, module in model.named_modules()
    }
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ------------------------------------------------------------------ stage 1 on LLaVA's CLIP


@pytest.fixture(scope="module")
def small_llava():
    torch.manual_seed(0)
    vision = T.CLIPVisionConfig(**EYES | dict(num_hidden_layers=6), image_size=32)
    config = T.LlavaConfig(
        text_config=T.LlamaConfig(**TEXT), vision_config=vision, image_token_index=IMAGE
    )
    return T.LlavaForConditionalGeneration(config).eval()


def llava_batch(prompts):
    """As `batch`, with pixels that are those of pictures in [0, 1]."""
    rows = [
        [t for token in p for t in ([token] * 16 if token == IMAGE else [token])] for p in prompts
    ]
    S = max(map(len, rows))
    ids, mask = (
        torch.tensor([[0] * (S - len(row)) + values for row, values in zip(rows, kind)])
        for kind in (rows, [[1] * len(row) for row in rows])
    )
    pixels = (
        torch.rand(
            sum(p.count(IMAGE) for p in prompts),
            3,
            32,
            32,
            generator=torch.Generator().manual_seed(2),
        )
        - torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1)
    ) / torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1)
    return dict(input_ids=ids, attention_mask=mask, pixel_values=pixels)


def test_stage_1_keeping_all_is_the_model_alone(small_llava):
    inputs = llava_batch(PROMPTS["ragged"])
    embeds, visual_mask = vlm.encode_llava(small_llava, **inputs, keep=(None, None, None))
    assert torch.equal(visual_mask, inputs["input_ids"] == IMAGE)
    with torch.no_grad():
        theirs, ours = small_llava(**inputs).logits, small_llava(**embeds).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=1e-5)
    alone = small_llava.generate(**inputs, **OPTIONS)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(small_llava.generate(**embeds, **OPTIONS), alone)


def test_stages_1_and_3_together_and_one_by_one(small_llava):
    inputs, first = llava_batch(PROMPTS["ragged"]), 0
    embeds, visual_mask = vlm.encode_llava(small_llava, **inputs, keep=(12, 9, 6))
    assert visual_mask.sum(dim=1).tolist() == [6, 12, 6] and embeds["attention_mask"].sum(
        dim=1
    ).tolist() == [12, 16, 13]
    with AdaptivePruner(small_llava, visual_mask, lam=2) as pruner:
        together = small_llava.generate(**embeds, **OPTIONS)
    assert (pruner.counts[5] < visual_mask.sum(dim=1)).any()
    for b, prompt in enumerate(PROMPTS["ragged"]):
        real, n = inputs["attention_mask"][b].bool(), prompt.count(IMAGE)
        one, mask = vlm.encode_llava(
            small_llava,
            inputs["input_ids"][b, real][None],
            inputs["attention_mask"][b, real][None],
            inputs["pixel_values"][first : first + n],
            (12, 9, 6),
        )
        with AdaptivePruner(small_llava, mask, lam=2):
            assert torch.equal(small_llava.generate(**one, **OPTIONS)[0], together[b])
        first += n


def test_a_llava_that_joins_layers_is_refused(small_llava):
    small_llava.config.vision_feature_layer, before = (
        [-2, -1],
        small_llava.config.vision_feature_layer,
    )
    with pytest.raises(TypeError, match="one layer of its CLIP"):
        vlm.blocks_that_llava_reads(small_llava)
    small_llava.config.vision_feature_layer = before


# ---------------------------------------------------------- meteor_mini.vlm and the command line


@pytest.fixture
def short_answers(monkeypatch):
    """`ask` stops after three tokens: a random model would not."""
    monkeypatch.setattr(vlm, "ask", partial(vlm.ask, max_new_tokens=3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny LLaVA with its processor, as `save_pretrained` writes them."""
    torch.manual_seed(0)
    words = "USER : ASSISTANT what is this a red circle .".split()
    tokenizer = build_tokenizer(words)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    config = T.LlavaConfig(
        text_config=T.LlamaConfig(**TEXT),
        vision_config=T.CLIPVisionConfig(**EYES, image_size=32),
        image_token_index=image_id,
    )
    path = tmp_path_factory.mktemp("llava")
    T.LlavaForConditionalGeneration(config).save_pretrained(path)
    sight = T.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    template = (
        "{% for m in messages %}USER : {% for c in m['content'] %}"
        "{{ '<image> ' if c['type'] == 'image' else c['text'] }}"
        "{% endfor %}{% endfor %} ASSISTANT :"
    )
    T.LlavaProcessor(
        image_processor=sight,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
        image_token="<image>",
    ).save_pretrained(path)
    return path


def test_ask_answers_as_the_model_and_keeps_the_tokens_that_lambda_was_calibrated_for(folder):
    model, processor = vlm.load_vlm(str(folder))
    image = Image.new("RGB", (40, 30), "red")
    with pytest.raises(ValueError, match="lam must be given"):
        vlm.ask(model, processor, image, "what is this")
    everything = vlm.ask(
        model, processor, image, "what is this", lam=float("inf"), max_new_tokens=5
    )
    inputs = vlm.prepare(model, processor, image, "what is this")
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[
        :, inputs["input_ids"].shape[1] :
    ]
    assert everything["answer"] == processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    assert everything["visual_tokens"] == everything["average_tokens"] == 16

    vlm.calibrate_lambda(model, [inputs], tokens=8)
    some = vlm.ask(model, processor, image, "what is this", max_new_tokens=5)
    assert some["average_tokens"] == pytest.approx(8, abs=0.5) and list(some["counts"]) == [1, 3, 5]
    with pytest.raises(ValueError, match="target_average must be"):
        vlm.calibrate_lambda(model, [inputs], tokens=17)


def test_a_processor_without_a_chat_template_gets_the_question_alone(folder):
    """PaliGemma's."""
    model, processor = vlm.load_vlm(str(folder))
    processor.chat_template = None
    image = Image.new("RGB", (40, 30), "red")
    inputs = vlm.prepare(model, processor, image, "<image> what is this")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 16
    words = processor.tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)
    assert words.split() == ["what", "is", "this"]


def test_every_family_of_these_tests_is_loaded_by_its_name():
    names = {tiny_vlm(name)[0].config.model_type for name in VLMS}
    assert names | {"deepseek_vl"} == set(vlm.MODEL_TYPES)


def test_the_command_line_shows_pictures_as_they_are(folder, tmp_path, monkeypatch):
    """Not padded to a square, as a Meteor's encoders see them."""
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (60, 20)).save(tmp_path / "pictures" / "wide.png")
    shown, prepare = [], vlm.prepare

    def note(model, processor, image, question):
        shown.append(image.size)
        return prepare(model, processor, image, question)

    monkeypatch.setattr(vlm, "prepare", note)
    model = ["--model", str(folder)]
    wide = str(tmp_path / "pictures" / "wide.png")
    assert cli.main(["ask", wide, "what is this", "--lam", "2", *model]) == 0
    assert cli.main(["calibrate", str(tmp_path / "pictures"), "--tokens", "8", *model]) == 0
    assert set(shown) == {(60, 20)} and len(shown) == 2


def test_the_command_line_calibrates_and_asks_it(folder, tmp_path, capsys, short_answers):
    (tmp_path / "pictures").mkdir()
    for color in ("red", "blue"):
        Image.new("RGB", (40, 30), color).save(tmp_path / "pictures" / f"{color}.png")
    photo = str(tmp_path / "pictures" / "red.png")
    ask = ["ask", photo, "what is this", "--json", "--model"]
    assert cli.main([*ask, str(folder), "--tokens", "8"]) == 0
    solved = json.loads(capsys.readouterr().out)
    assert solved["visual_tokens"] == 16 and abs(solved["average_tokens"] - 8) <= 0.5

    calibrate = ["calibrate", str(tmp_path / "pictures"), "--question", "what is this"]
    calibrate += ["--tokens", "8", "--model", str(folder), "--out", str(tmp_path / "own")]
    assert cli.main(calibrate) == 0
    printed = capsys.readouterr().out
    lam, kept = re.match(r"--lam ([\d.e+-]+) keeps ([\d.]+) of 16.0 ", printed).groups()
    blue = str(tmp_path / "pictures" / "blue.png")
    assert cli.main(["ask", blue, *ask[2:], str(folder), "--lam", lam]) == 0
    of_blue = json.loads(capsys.readouterr().out)["average_tokens"]
    assert cli.main([*ask, str(folder), "--lam", lam]) == 0
    by_lambda = json.loads(capsys.readouterr().out)
    measured = (by_lambda["average_tokens"] + of_blue) / 2
    assert float(kept) == pytest.approx(measured, abs=0.051)  # one decimal is printed
    assert cli.main([*ask, str(tmp_path / "own")]) == 0  # lambda travels with the configuration
    assert json.loads(capsys.readouterr().out) == by_lambda
    assert abs(by_lambda["average_tokens"] - 8) <= 2

    assert cli.main([*ask, str(folder)]) == 2
    assert "`meteor-mini calibrate` finds it" in capsys.readouterr().err
    assert cli.main([*ask, str(folder), "--plot", str(tmp_path / "x.png")]) == 2
    assert "--plot draws the encoders of a Meteor" in capsys.readouterr().err
    assert cli.main([*ask, "me/nothing"]) == 2
    assert "could not be fetched from the hub" in capsys.readouterr().err


def test_the_readmes_snippet_runs(folder):
    """The two lines around `generate`, before which the reader has a model, inputs and lambda."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (snippet,) = re.findall(r"```py\n(.*?)```", text, flags=re.S)
    model = T.AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = T.AutoProcessor.from_pretrained(folder)
    photo = Image.new("RGB", (40, 30), "red")
    asked = "USER : <image> what is this ASSISTANT :"
    inputs = processor(images=[photo], text=[asked], return_tensors="pt")
    names = {"AdaptivePruner": AdaptivePruner, "model": model, "inputs": inputs, "lam": 2}
    exec(compile(snippet, "README", "exec"), names)
    assert names["words"].shape[1] > inputs["input_ids"].shape[1]
    assert 1 < names["pruner"].average_tokens().item() < 16


def test_other_models_are_refused(tmp_path):
    config = T.GitConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=32,
        vision_config=dict(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        ),
    )
    T.GitForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(
        (TypeError, ValueError), match="model must be one of llava|could not be fetched"
    ):
        vlm.load_vlm(str(tmp_path))


def test_keep_all_of_a_vlm_keeps_all(folder, tmp_path, capsys, short_answers):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    ask = ["ask", str(tmp_path / "a.png"), "what is this", "--json", "--keep-all", "--model"]
    assert cli.main([*ask, str(folder)]) == 0
    assert json.loads(capsys.readouterr().out)["average_tokens"] == 16


def test_lambda_is_calibrated_on_the_mean_over_prompts(folder, monkeypatch):
    model, processor = vlm.load_vlm(str(folder))
    image = Image.new("RGB", (40, 30), "red")
    asked = ["what is this", "a red circle . a red circle . what"]
    prompts = [vlm.prepare(model, processor, image, question) for question in asked]
    monkeypatch.setattr(vlm, "solve_lambda", lambda tokens, measure: measure(2.0))
    alone = [vlm.calibrate_lambda(model, [prompt], 8) for prompt in prompts]
    assert alone[0] != alone[1]
    assert vlm.calibrate_lambda(model, prompts, 8) == pytest.approx(sum(alone) / 2)


def test_a_lambda_of_zero_is_a_lambda(folder):
    model, processor = vlm.load_vlm(str(folder))
    model.config.meteor_lambda = 1e9
    image = Image.new("RGB", (40, 30), "red")
    result = vlm.ask(model, processor, image, "what is this", lam=0, max_new_tokens=1)
    assert set(result["counts"].values()) == {1}


def test_a_template_that_begins_with_bos_gives_it_once(folder):
    model, processor = vlm.load_vlm(str(folder))
    image = Image.new("RGB", (40, 30), "red")
    without = vlm.prepare(model, processor, image, "what is this")["input_ids"]
    processor.chat_template = "{{ bos_token }}" + processor.chat_template
    ids = vlm.prepare(model, processor, image, "what is this")["input_ids"]
    bos = processor.tokenizer.bos_token_id
    assert (ids == bos).sum() == 1 and ids.shape[1] - without.shape[1] <= 1
