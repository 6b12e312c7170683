"""Stage 3 around vision-language models of transformers as they come: tiny random ones of the real
classes, their own `generate`. One case a family; every property for every family.

A prompt is a list of token ids in which IMAGE stands for one whole picture; its visual tokens are
put there as the family's processor does.
"""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import transformers as T
from PIL import Image

from meteor_mini import cli, vlm
from meteor_mini.glyph.parts import build_tokenizer
from meteor_mini.pictures import CLIP_MEAN, CLIP_STD
from stage3_decode import AdaptivePruner, find_cache

IMAGE = 3  # the placeholder token's id
TEXT = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=8,
    num_attention_heads=8,
    max_position_embeddings=1024,
    initializer_range=0.1,
)  # the default, 0.02, makes attention all but flat
EYES = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=8
)
OPTIONS = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
PROMPTS = {
    "one picture": [[1, 5, IMAGE, 7, 8, 9, 10]],
    "in the middle of text": [[1, 20, 21, 22, 23, IMAGE, 30, 31]],
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


def pictures(n, *size):
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(n))


def llava():
    config = T.LlavaConfig(
        text_config=T.LlamaConfig(**TEXT),
        vision_config=T.CLIPVisionConfig(**EYES, image_size=32),
        image_token_index=IMAGE,
    )
    return (
        T.LlavaForConditionalGeneration(config),
        [16] * 9,
        lambda per_row: dict(pixel_values=pictures(sum(per_row), 32, 32)),
    )


def llava_next():
    config = T.LlavaNextConfig(
        text_config=T.LlamaConfig(**TEXT),
        vision_config=T.CLIPVisionConfig(**EYES, image_size=32),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
    )
    sizes = [
        (64, 64),
        (64, 32),
        (32, 64),
    ] * 3  # pictures of different shapes have different numbers of tokens
    tokens = [
        16 + h // 8 * (w // 8 + 1) for h, w in sizes
    ]  # the whole; each row of the tiles, and its end

    def pixels(per_row):
        n = sum(per_row)
        return dict(
            pixel_values=pictures(n * 5, 32, 32).view(n, 5, 3, 32, 32),
            image_sizes=torch.tensor(sizes[:n]),
        )

    return T.LlavaNextForConditionalGeneration(config), tokens, pixels


def idefics(config, vision, model):
    """Idefics3 and SmolVLM: pictures of each prompt in a row of their own, filled up with black
    ones.
    """
    built = config(
        text_config=T.LlamaConfig(**TEXT),
        vision_config=vision(**EYES, image_size=64),
        image_token_id=IMAGE,
        scale_factor=2,
    )

    def pixels(per_row):
        values, rows = (
            torch.zeros(len(per_row), max(per_row), 3, 64, 64),
            list(pictures(sum(per_row), 64, 64)),
        )
        for b, n in enumerate(per_row):
            for i in range(n):
                values[b, i] = rows.pop(0)
        return dict(pixel_values=values)

    return model(built), [16] * 9, pixels


def deepseek():
    """Two encoders, SigLIP and SAM, joined by channels."""
    high = T.SamVisionConfig(
        hidden_size=32,
        output_channels=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
        mlp_dim=32,
        global_attn_indexes=[1],
        window_size=4,
        initializer_range=0.02,
    )
    config = T.DeepseekVLHybridConfig(
        text_config=T.LlamaConfig(**TEXT),
        high_res_vision_config=high,
        image_token_id=IMAGE,
        vision_config=T.SiglipVisionConfig(**EYES, image_size=32),
    )
    return (
        T.DeepseekVLHybridForConditionalGeneration(config),
        [16] * 9,
        lambda per_row: dict(
            pixel_values=pictures(sum(per_row), 32, 32),
            high_res_pixel_values=pictures(sum(per_row), 64, 64),
        ),
    )


FAMILIES = {
    "llava": llava,
    "llava-next": llava_next,
    "deepseek-vl-hybrid": deepseek,
    "idefics3": lambda: idefics(
        T.Idefics3Config, T.Idefics3VisionConfig, T.Idefics3ForConditionalGeneration
    ),
    "smolvlm": lambda: idefics(
        T.SmolVLMConfig, T.SmolVLMVisionConfig, T.SmolVLMForConditionalGeneration
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    torch.manual_seed(0)
    model, tokens, pixels = FAMILIES[request.param]()
    return model.eval(), tokens, pixels


def batch(family, prompts):
    """Inputs of `generate`, padded on the left, and the visual mask."""
    _, tokens, pixels = family
    tokens, rows = iter(tokens), []
    for prompt in prompts:
        rows.append(
            [t for token in prompt for t in ([token] * next(tokens) if token == IMAGE else [token])]
        )
    S = max(map(len, rows))
    ids = torch.tensor([[0] * (S - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (S - len(row)) + [1] * len(row) for row in rows])
    per_row = [prompt.count(IMAGE) for prompt in prompts]
    return dict(
        input_ids=ids, attention_mask=mask, **(pixels(per_row) if sum(per_row) else {})
    ), ids == IMAGE


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
    for layer, cached in enumerate(find_cache(out.values()).layers):
        left = next((pruner.counts[i] for i in (5, 3, 1) if i <= layer), None)
        longest = visual_mask.shape[1] if left is None else int((text + left).max())
        assert cached.keys.shape[2] == longest + 4  # of 5 new tokens the last is not read


def test_in_several_turns_the_text_after_the_last_picture_asks(family):
    """Of each prompt: as with those tokens named in a query_mask, and not as with all text; counts
    are each prompt's own.
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
        runs[name] = [ids, *pruner.attention.values()], pruner
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
    prompts, tokens = PROMPTS[prompts], list(family[1])
    inputs, visual_mask = batch(family, prompts)
    with AdaptivePruner(family[0], visual_mask, lam=2) as pruner:
        together = family[0].generate(**inputs, **OPTIONS)[:, inputs["input_ids"].shape[1] :]
    per_row, first = [prompt.count(IMAGE) for prompt in prompts], 0
    for b, n in enumerate(per_row):
        real = inputs["attention_mask"][b].bool()
        rows = (
            slice(b, b + 1)
            if inputs["pixel_values"].shape[0] == len(prompts) != sum(per_row)
            else slice(first, first + n)
        )
        one = {k: v[rows] for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
        if (
            "image_sizes" not in one and one["pixel_values"].dim() == 5
        ):  # without the black pictures
            one["pixel_values"] = one["pixel_values"][:, :n]
        one |= dict(
            input_ids=inputs["input_ids"][b, real][None],
            attention_mask=inputs["attention_mask"][b, real][None],
        )
        with AdaptivePruner(family[0], visual_mask[b, real][None], lam=2) as single:
            alone = family[0].generate(**one, **OPTIONS)[:, one["input_ids"].shape[1] :]
        assert torch.equal(alone[0], together[b])
        assert all(torch.equal(single.kept[i][0], pruner.kept[i][b, real]) for i in pruner.layers)
        first += n
    assert len(tokens) == 9


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
    hooks = lambda: [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    there = hooks()
    with (
        pytest.raises(ValueError, match="visual_mask's"),
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
        - torch.tensor(CLIP_MEAN).view(3, 1, 1)
    ) / torch.tensor(CLIP_STD).view(3, 1, 1)
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


# ------------------------------------------------------------------ meteor_mini.vlm and the command
# line


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
        "{% for m in messages %}USER : {% for c in m['content'] %}{{ '<image> ' if c['type'] == 'image' else c['text'] }}"
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


def test_ask_answers_as_the_model_with_the_wanted_tokens(folder):
    model, processor = vlm.load_vlm(str(folder))
    image = Image.new("RGB", (40, 30), "red")
    everything = vlm.ask(model, processor, image, "what is this", keep_all=True, max_new_tokens=5)
    inputs = vlm.inputs_of(model, processor, image, "what is this")
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[
        :, inputs["input_ids"].shape[1] :
    ]
    assert everything["answer"] == processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    assert everything["visual_tokens"] == everything["average_tokens"] == 16
    some = vlm.ask(model, processor, image, "what is this", tokens=8, max_new_tokens=5)
    assert some["average_tokens"] == pytest.approx(8, abs=0.5) and list(some["counts"]) == [1, 3, 5]
    with pytest.raises(ValueError, match="target_average must be"):
        vlm.ask(model, processor, image, "what is this", tokens=17)


def test_the_command_line_asks_it(folder, tmp_path, capsys):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.png")
    command = ["ask", "--model", str(folder), str(tmp_path / "photo.png"), "what is this"]
    assert cli.main([*command, "--json", "--tokens", "8"]) == 0
    assert json.loads(capsys.readouterr().out)["visual_tokens"] == 16
    assert (
        cli.main([*command, "--plot", str(tmp_path / "x.png")]) == 2
        and not (tmp_path / "x.png").exists()
    )
    assert "--plot draws the encoders of a Meteor model" in capsys.readouterr().err
    assert cli.main(["ask", "--model", "me/nothing", *command[3:]]) == 2
    assert "could not be fetched from the hub" in capsys.readouterr().err


def test_the_readmes_snippet_runs(folder, tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (snippet,) = (
        s for s in re.findall(r"```py\n(.*?)```", text, flags=re.S) if "AdaptivePruner" in s
    )
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "red").save("photo.jpg")
    exec(
        compile(
            snippet.replace("llava-hf/llava-1.5-7b-hf", str(folder)).replace("lam=50", "lam=2"),
            "README",
            "exec",
        ),
        {},
    )
    out = capsys.readouterr().out
    assert out.startswith("['") and 1 < float(re.search(r"tensor\(\[([\d.]+)", out)[1]) < 16


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
