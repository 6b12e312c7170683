"""weights.py on a hub cache made here: the real file names and loading code, tiny random
weights.
"""

import importlib.util
import json
import re
import socket
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers as T
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file

import meteor_mini
from meteor_mini import Budget, Meteor, budgets, calibrate, cli, vlm
from meteor_mini.budgets import measure_lambda
from meteor_mini.finetune import training_loss
from meteor_mini.model import text_around_picture
from meteor_mini.pictures import view_of
from meteor_mini.toy import world
from meteor_mini.toy.parts import build_tokenizer
from meteor_mini.weights import (
    PRESETS,
    build_encoder,
    fetch_encoder,
    hub_or_cache,
    short_name,
)
from stage1_encode import encode
from stage3_decode import AdaptivePruner

WORDS = "what is this a red circle describe user assistant : the picture".split()
CHAT = (
    "{% for m in messages %}<bos>user : {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} assistant :{% endif %}"
)
VIT = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 4, "vocab_size": 8, "width": 32, "heads": 2, "layers": 1},
}
TIMM = {"timm_pool": "token", "timm_proj": "linear", "image_size": 224}
EVA = VIT | {"vision_cfg": TIMM | {"timm_model_name": "eva02_tiny_patch14_224"}}
CONVNEXT = VIT | {
    "vision_cfg": TIMM | {"timm_model_name": "convnext_atto", "timm_pool": "avg", "image_size": 64}
}
PRETRAINED_LLM = PRESETS["small"]["decoder"]
# open_clip's own name, tag and repository; 32 channels and 3 blocks here
SIGLIP = "ViT-SO400M-14-SigLIP-384/webli"
NAMES = [
    "tiny-vit/mine",
    "hf-hub:me/tiny-eva",
    "hf-hub:me/tiny-convnext",
    "me/tiny-pix2struct",
    "me/tiny-dino",
]

FAST = [NAMES[0], NAMES[3]]  # the smallest two, where any will do


def snapshot(cache, repo):
    """A repository's folder in a hub cache, as huggingface_hub lays it out."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    return folder / "snapshots" / ("0" * 40)


@pytest.fixture(autouse=True)
def short_calibration(monkeypatch):
    """Lambda is measured at a few points."""
    monkeypatch.setattr(budgets, "LAMBDAS", [0.0, 1.0, 2.0, 4.0, 64.0])
    monkeypatch.setattr(budgets, "K_SHARES", (0.02, 0.14, 0.4))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Returns (cache folder, {name: the encoder whose weights lie there})."""
    patch, cache, made = pytest.MonkeyPatch(), tmp_path_factory.mktemp("cache"), {}
    patch.setattr(constants, "HF_HUB_OFFLINE", True)
    (configs := tmp_path_factory.mktemp("configs") / "tiny-vit.json").write_text(json.dumps(VIT))
    open_clip.add_model_config(configs)
    tag = {
        "hf_hub": "me/tiny-vit/",
        "mean": (0.1, 0.2, 0.3),
        "std": (0.9, 0.8, 0.7),
        "quick_gelu": True,
    }
    patch.setitem(
        open_clip.pretrained._PRETRAINED,
        "tiny-vit",
        {"mine": tag, "pickled": tag | {"hf_hub": "me/pickled/"}},
    )
    torch.manual_seed(0)
    vit = open_clip.create_model("tiny-vit", force_quick_gelu=True)
    save_file(vit.state_dict(), snapshot(cache, "me/tiny-vit") / "open_clip_model.safetensors")
    torch.save(vit.state_dict(), snapshot(cache, "me/pickled") / "open_clip_pytorch_model.bin")
    made["tiny-vit/mine"] = vit.visual
    architecture, entrypoints = SIGLIP.split("/")[0], timm.models._registry._model_entrypoints
    config = open_clip.get_model_config(architecture)
    trunk = config["vision_cfg"]["timm_model_name"]
    patch.setitem(
        entrypoints, trunk, partial(entrypoints[trunk], embed_dim=32, depth=3, num_heads=2)
    )
    patch.setitem(
        open_clip.factory._MODEL_CONFIGS,
        architecture,
        config | {"embed_dim": 32, "text_cfg": VIT["text_cfg"]},
    )
    siglip = open_clip.create_model(architecture)
    save_file(
        siglip.state_dict(), snapshot(cache, f"timm/{architecture}") / "open_clip_model.safetensors"
    )
    made[SIGLIP] = siglip.visual
    for name, config in {"tiny-eva": EVA, "tiny-convnext": CONVNEXT}.items():
        folder = snapshot(cache, f"me/{name}")
        preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
        (folder / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
        )
        model = open_clip.create_model(f"local-dir:{folder}")
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
        made[f"hf-hub:me/{name}"] = model.visual
    vision = dict(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        d_kv=16,
        d_ff=32,
        patch_embed_hidden_size=192,
        seq_len=64,
        initializer_range=0.02,
    )
    text = dict(hidden_size=32, num_layers=1, num_heads=2, d_kv=16, d_ff=32, vocab_size=16)
    pix2struct = T.Pix2StructForConditionalGeneration(
        T.Pix2StructConfig(vision_config=vision, text_config=text)
    )
    pix2struct.save_pretrained(snapshot(cache, "me/tiny-pix2struct"))
    made["me/tiny-pix2struct"] = pix2struct.encoder
    made["me/tiny-dino"] = T.Dinov2Model(
        T.Dinov2Config(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
            layerscale_value=0.7,
        )
    )
    made["me/tiny-dino"].save_pretrained(snapshot(cache, "me/tiny-dino"))
    tokenizer = build_tokenizer(WORDS)
    tokenizer.chat_template = CHAT
    llama = T.LlamaForCausalLM(
        T.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=8,
            num_attention_heads=8,
            tie_word_embeddings=True,
            initializer_range=0.1,
        )
    )
    folder = snapshot(cache, "me/tiny-llama")
    llama.save_pretrained(folder), tokenizer.save_pretrained(folder)
    made["me/tiny-llama"] = llama
    yield str(cache), {name: module.eval() for name, module in made.items()}
    patch.undo()


@pytest.fixture(scope="module")
def model(hub):
    return Meteor.from_pretrained(
        encoders=NAMES, decoder="me/tiny-llama", grid=[4, 6], cache_dir=hub[0]
    )


@pytest.fixture
def images():
    return torch.rand(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [*NAMES, SIGLIP])
def test_an_encoder_has_the_weights_of_the_cache_and_is_built_again_without_them(hub, name):
    loaded, spec = fetch_encoder(name, cache_dir=hub[0])
    theirs = hub[1][name].state_dict()
    assert loaded.state_dict().keys() == theirs.keys() and all(
        torch.equal(v, theirs[k]) for k, v in loaded.state_dict().items()
    )
    again = build_encoder(*json.loads(json.dumps(spec)))
    assert not torch.equal(
        *(next(p for p in m.parameters() if p.dim() > 1) for m in (again, loaded))
    )
    again.load_state_dict(loaded.state_dict())
    x = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    pixels = view_of(loaded)(x)
    assert view_of(again) == view_of(loaded)
    assert torch.equal(encode(again.eval(), pixels)[0], encode(loaded.eval(), pixels)[0])


def test_tags_bring_their_own_activation_and_statistics(hub):
    visual, _ = fetch_encoder("tiny-vit/mine", cache_dir=hub[0])
    assert type(visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert list(visual.preprocess_cfg["mean"]) == [0.1, 0.2, 0.3]


def test_cambrians_encoders_by_name_go_from_picture_to_words(hub, images):
    """SigLIP, CLIP, DINOv2, ConvNeXt; unpruned SigLIP gives what the library's own forward gives at
    its own statistics.
    """
    own = Meteor.from_pretrained(
        encoders=[SIGLIP, NAMES[0], NAMES[4], NAMES[2]], decoder="me/tiny-llama", cache_dir=hub[0]
    )
    grids = [view.grid for view in own.views.values()]
    assert grids == [(27, 27), (4, 4), (4, 4), (2, 2)]
    siglip = own.encoders["ViT-SO400M-14-SigLIP-384"]
    assert [*siglip.preprocess_cfg["mean"]] == [*siglip.preprocess_cfg["std"]] == [0.5] * 3
    x = F.interpolate(images, (384, 384), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        assert torch.equal(
            encode(siglip, view_of(siglip)(images))[0],
            hub[1][SIGLIP].trunk.forward_features(2 * x - 1),
        )
    calibrate(own, [images], ["what is this", "a", "describe the picture"])
    with pytest.warns(UserWarning, match="not trained"):
        answers = own.answer(images, ["what is this", "a", "the picture"], max_new_tokens=4)
    for answer in answers:
        assert (
            answer.tokens["encoders"] == 729 + 16 + 16 + 4
            and answer.tokens["stage1"] == own.budget.stage1
        )
        assert answer.tokens["stage2"] == own.budget.stage2 > answer.tokens["stage3"] and set(
            answer.text.split()
        ) <= {*WORDS}
    assert (
        any(answer.text for answer in answers)
        and SIGLIP in (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    )


def test_names_grids_and_budget(model):
    assert list(model.encoders) == [
        "tiny-vit",
        "tiny-eva",
        "tiny-convnext",
        "tiny-pix2struct",
        "tiny-dino",
    ]
    assert [view.grid for view in model.views.values()] == [
        (4, 4),
        (16, 16),
        (2, 2),
        (4, 6),
        (4, 6),
    ]
    total = model.num_tokens
    assert model.budget.stage1 == round(1193 / 4096 * total) and model.budget.stage3 == round(
        242 / 4096 * total
    )
    assert (
        short_name("ViT-B-16/openai") == "ViT-B-16"
        and short_name("lmsys/vicuna-7b-v1.5") == "vicuna-7b-v1-5"
    )


def test_the_prompt_is_the_decoders_own_chat_with_the_picture_inside(model, hub, images):
    assert text_around_picture(model.tokenizer) == ("<bos>user : ", "\n{} assistant :")
    encoded = model.encode(images[:1], Budget.keep_all())
    embeds, mask, visual = model.prompt(encoded, ["what is this"])
    embed = hub[1]["me/tiny-llama"].get_input_embeddings()
    ids = model.tokenizer(
        "<bos>user : what is this assistant :", add_special_tokens=False, return_tensors="pt"
    ).input_ids
    assert torch.equal(embeds[~visual], embed(ids)[0]) and mask.all()
    assert torch.equal(embeds[visual], encoded.fused.tokens[0]) and visual[0].nonzero()[0, 0] == 3


def test_unpruned_it_is_the_plain_concatenation(model, hub, images):
    questions, llama = ["what is this", "describe the red circle", "a"], hub[1]["me/tiny-llama"]
    with pytest.warns(UserWarning, match="projectors of this model are not trained"):
        answers = model.answer(images, questions, Budget.keep_all(), max_new_tokens=4)
    for b, question in enumerate(questions):
        with torch.no_grad():
            tokens = [
                project(encode(encoder, x)[0])
                for project, encoder, x in zip(
                    model.projectors.values(),
                    model.encoders.values(),
                    model.pixels(images[b : b + 1]),
                )
            ]
            parts = [
                llama.get_input_embeddings()(
                    model.tokenizer(t, add_special_tokens=False, return_tensors="pt").input_ids
                )
                for t in ("<bos>user :", f"{question} assistant :")
            ]
            embeds = torch.cat([parts[0], *tokens, parts[1]], dim=1)
            ids = llama.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2]),
                max_new_tokens=4,
                do_sample=False,
                eos_token_id=model.tokenizer.eos_token_id,
                pad_token_id=0,
            )
        assert (
            answers[b].text
            == model.tokenizer.batch_decode(ids, skip_special_tokens=True)[0].strip()
        )


def test_calibrated_saved_and_loaded_it_prunes_the_same_without_the_cache(hub, images, tmp_path):
    own = Meteor.from_pretrained(encoders=FAST, decoder="me/tiny-llama", cache_dir=hub[0])
    with pytest.raises(ValueError, match="stage1 needs ranks"):
        own.encode(images)
    with pytest.raises(ValueError, match="questions must be one for each of the 3 pictures"):
        calibrate(own, [images], ["a"])
    calibrate(own, [images[:2], images[2:]], ["what is this", "a", "describe the picture"])
    table, words = own.config["lambda_table"], ["what is this", "a", "describe the picture"]
    assert table == measure_lambda(
        own, images, words, table["K"], table["lam"]
    )  # each picture with its own question
    assert table != measure_lambda(own, images, words[::-1], table["K"], table["lam"])
    budget = Budget(stage1=20, stage2=12, stage3=6)
    own.save_pretrained(tmp_path / "saved")
    again = Meteor.from_pretrained(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, second = (
            m.answer(images, ["what is this", "a", "the picture"], budget, max_new_tokens=3)
            for m in (own, again)
        )
    assert [a.text for a in first] == [a.text for a in second] and [a.layers for a in first] == [
        a.layers for a in second
    ]
    assert first[0].tokens["stage1"] == 20 and first[0].tokens["stage2"] == 12
    assert sum(a.tokens["stage3"] for a in first) / 3 == pytest.approx(6, abs=1)


def test_training_loss_goes_through_the_decoders_own_chat(hub, images):
    own = Meteor.from_pretrained(encoders=FAST, decoder="me/tiny-llama", cache_dir=hub[0])
    dialogues = [[("what is this", "a red circle")], [("describe", "the picture"), ("a", "red")]]
    out = training_loss(own, own.encode(images[:2], Budget.keep_all()), dialogues)
    expected = own.tokenizer(
        "a red circle <eos> the picture <eos> red <eos>", add_special_tokens=False
    ).input_ids
    assert out["labels"].tolist() == expected
    out["loss"].backward()
    assert all(p.grad is not None for p in own.projectors.parameters())


def test_bfloat16_goes_from_picture_to_words_and_loads_again_as_float32(hub, images, tmp_path):
    half = Meteor.from_pretrained(
        encoders=FAST, decoder="me/tiny-llama", dtype="bfloat16", cache_dir=hub[0]
    )
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    calibrate(half, [images], ["what is this", "a", "describe the picture"])
    half.save_pretrained(tmp_path / "half")
    for model in (half, Meteor.from_pretrained(tmp_path / "half")):
        with pytest.warns(UserWarning):
            answers = model.answer(images, ["what is this", "a", "the picture"], max_new_tokens=3)
        assert all(
            a.tokens["stage2"] == half.budget.stage2 > a.tokens["stage3"] for a in answers
        ) and any(a.text for a in answers)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto"])
def test_device_map_reaches_the_decoder_and_changes_no_answer(hub, images, monkeypatch, device_map):
    pytest.importorskip(
        "accelerate", reason="accelerate is not installed: pip install -e '.[train]'"
    )
    given, load = [], T.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        T.AutoModelForCausalLM,
        "from_pretrained",
        lambda *a, **kw: given.append(kw) or load(*a, **kw),
    )
    plain, placed = (
        Meteor.from_pretrained(encoders=FAST, decoder="me/tiny-llama", cache_dir=hub[0], **options)
        for options in ({}, {"device_map": device_map})
    )
    assert "device_map" not in given[0] and given[1]["device_map"] == device_map
    placed.to(plain.device)  # where "auto" found a GPU
    pruner = partial(AdaptivePruner, lam=2)
    with pytest.warns(UserWarning):
        first, second = (
            m.answer(images, ["what is this"] * 3, Budget(stage2=20), pruner, max_new_tokens=3)
            for m in (plain, placed)
        )
    assert first[0].tokens["stage3"] < 20
    assert [(a.text, a.layers) for a in first] == [(a.text, a.layers) for a in second]


def test_a_device_map_without_accelerate_is_refused(hub, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="device_map needs accelerate: pip install"):
        Meteor.from_pretrained(
            encoders=NAMES[:2], decoder="me/tiny-llama", cache_dir=hub[0], device_map="auto"
        )


@pytest.fixture
def unplugged(monkeypatch):
    """A machine without a network where nobody has set HF_HUB_OFFLINE; the list of names that were
    looked up there.
    """
    asked = []

    def refuse(host, *_, **__):
        asked.append(host)
        raise socket.gaierror("no network here")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between retries, if there were any
    return asked


def test_without_a_network_a_warm_cache_loads_at_one_attempt_a_part(hub, unplugged):
    for _ in range(2):
        model = Meteor.from_pretrained(encoders=NAMES, decoder="me/tiny-llama", cache_dir=hub[0])
    assert list(model.encoders) == [short_name(name) for name in NAMES]
    assert (
        len(unplugged) <= 2 * (2 * len(NAMES) + 2) and not constants.HF_HUB_OFFLINE
    )  # a part: configuration and weights


@pytest.mark.parametrize("name", ["small", "nobody/nothing"])
def test_without_a_network_a_cold_cache_says_so_at_the_first_attempt(hub, unplugged, name):
    with pytest.raises(ValueError, match="could not be fetched from the hub"):
        Meteor.from_pretrained(name, cache_dir=hub[0])
    assert len(unplugged) == 1 and not constants.HF_HUB_OFFLINE


def test_where_the_hub_answers_it_is_asked_and_directories_never_ask(hub, unplugged, tmp_path):
    with hub_or_cache(str(tmp_path)):
        assert not unplugged and not constants.HF_HUB_OFFLINE
    with pytest.raises(KeyError), hub_or_cache("me/tiny-vit"):
        assert unplugged and constants.HF_HUB_OFFLINE
        raise KeyError
    assert not constants.HF_HUB_OFFLINE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            meteor_mini.weights,
            "get_session",
            lambda: SimpleNamespace(head=lambda url, timeout: None),
        )
        with hub_or_cache("me/tiny-vit"):
            assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("name", ["ViT-B-16/openai", "hf-hub:me/nothing", "me/nothing"])
def test_what_cannot_be_fetched_is_named_with_a_way_out(hub, name):
    repository = {"ViT-B-16/openai": "timm/vit_base_patch16_clip_224.openai"}.get(
        name, "me/nothing"
    )
    with pytest.raises(
        ValueError,
        match=f"could not be fetched from the hub: .*`hf download {repository}` and copy the cache",
    ) as error:
        fetch_encoder(name, cache_dir=hub[0])
    assert str(error.value).startswith(name) and "\n" not in str(error.value)


def test_bad_names_are_refused(hub):
    with pytest.raises(ValueError, match="is not a safetensors file"):
        fetch_encoder("tiny-vit/pickled", cache_dir=hub[0])
    with pytest.raises(ValueError, match="knows no weights 'other' of tiny-vit, but mine, pickled"):
        fetch_encoder("tiny-vit/other", cache_dir=hub[0])
    with pytest.raises(TypeError, match="must be a Pix2Struct or a DINOv2"):
        fetch_encoder("me/tiny-llama", cache_dir=hub[0])
    for encoders, decoder in (
        (NAMES[:1], "me/tiny-llama"),
        ([NAMES[0]] * 2, "me/tiny-llama"),
        (NAMES, None),
    ):
        with pytest.raises(
            ValueError, match="encoders must be 2 or more of different names, and decoder"
        ):
            Meteor.from_pretrained(encoders=encoders, decoder=decoder, cache_dir=hub[0])


def test_the_snippets_of_docs_training_put_models_together(hub, monkeypatch, capsys):
    """With the names of the cache made here in place of the real ones."""
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    *put_together, _ = re.findall(r"```py\n(.*?)```", page, flags=re.S)
    snippet = "\n".join(put_together)
    monkeypatch.setitem(
        PRESETS, "small", {"encoders": NAMES[:3], "decoder": "me/tiny-llama", "grid": None}
    )
    for real, tiny in {
        "ViT-B-16/openai": NAMES[0],
        "facebook/dinov2-small": NAMES[4],
        PRETRAINED_LLM: "me/tiny-llama",
    }.items():
        assert real in snippet
        snippet = snippet.replace(real, tiny)
    load = Meteor.from_pretrained
    monkeypatch.setattr(
        Meteor,
        "from_pretrained",
        lambda *names, **options: load(*names, **options, cache_dir=hub[0]),
    )
    exec(compile(snippet, "docs/training.md", "exec"), {})
    out = capsys.readouterr().out
    assert len(put_together) == 2
    assert "['tiny-vit', 'tiny-eva'," in out and "['tiny-vit', 'tiny-dino'] Budget(" in out


# --------------------------------------------------------------------------------- the command line


def test_calibrate_and_train_from_the_command_line(hub, tmp_path, monkeypatch, capsys):
    parts = dict(encoders=FAST, decoder="me/tiny-llama", cache_dir=hub[0])
    load = Meteor.from_pretrained
    monkeypatch.setattr(
        Meteor, "from_pretrained", lambda name: load(**parts) if name == "small" else load(name)
    )
    monkeypatch.setattr(budgets, "LAMBDAS", [0.0, 64.0])  # the whole table is tested elsewhere
    monkeypatch.setattr(budgets, "K_SHARES", (0.1, 0.4))
    (tmp_path / "pictures").mkdir()
    rows = []
    for i in range(8):
        Image.fromarray(world.make_picture(i).image).save(tmp_path / "pictures" / f"{i}.png")
        rows.append(
            {"image": f"pictures/{i}.png", "question": "what is this", "answer": "a red circle"}
        )
    assert (
        cli.main(
            [
                "calibrate",
                str(tmp_path / "pictures"),
                "--model",
                "small",
                "--question",
                "describe",
                "--out",
                str(tmp_path / "measured"),
            ]
        )
        == 0
    )
    assert "expected ranks of tiny-vit, tiny-pix2struct on 8 pictures" in capsys.readouterr().out
    assert len(Meteor.from_pretrained(tmp_path / "measured").config["ranks"]) == 3
    pytest.importorskip(
        "accelerate", reason="accelerate is not installed: pip install -e '.[train]'"
    )
    (tmp_path / "data.json").write_text(json.dumps(rows))
    train = [
        "train",
        "--model",
        "small",
        "--data",
        str(tmp_path / "data.json"),
        "--out",
        str(tmp_path / "trained"),
    ]
    assert (
        cli.main(
            [*train, "--set", "max_steps=2", "--set", "use_cpu=true", "--set", "disable_tqdm=true"]
        )
        == 0
    )
    assert Meteor.from_pretrained(tmp_path / "trained").config["trained"]
    assert cli.main([*train, "--set", "nosuch=1"]) == 2 and "nosuch" in capsys.readouterr().err
    assert cli.main([*train, "--data", "no.json"]) == 2
    assert "data no.json does not exist" in capsys.readouterr().err


@pytest.mark.slow  # writes 3 GB of random weights of the full size, and loads them
def test_small_at_full_size_from_picture_to_words(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    torch.manual_seed(0)
    for name in list(PRESETS["small"]["encoders"].values())[:3]:
        architecture, tag = name.split("/")
        known = open_clip.get_pretrained_cfg(architecture, tag)
        model = open_clip.create_model(
            architecture, force_quick_gelu=known.get("quick_gelu", False)
        )
        owner, repo, file = (known["hf_hub"] + "//").split("/")[:3]
        save_file(
            model.state_dict(),
            snapshot(tmp_path, f"{owner}/{repo}") / (file or "open_clip_model.safetensors"),
        )
    T.Pix2StructForConditionalGeneration(
        T.Pix2StructConfig(vision_config={"initializer_range": 0.02})
    ).save_pretrained(snapshot(tmp_path, "google/pix2struct-base"))
    tokenizer = build_tokenizer(
        WORDS + [f"word{i}" for i in range(49152 - len(build_tokenizer(WORDS)))]
    )
    folder = snapshot(tmp_path, PRETRAINED_LLM)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    llm = T.LlamaConfig(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        intermediate_size=1536,
        tie_word_embeddings=True,
    )  # SmolLM2-135M
    T.LlamaForCausalLM(llm).save_pretrained(folder)
    model = Meteor.from_pretrained("small", cache_dir=str(tmp_path))
    picture = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(budgets, "LAMBDAS", [4.0, 8.0, 16.0])  # around what leaves its average
    calibrate(model, [torch.rand(4, 3, 64, 64)], ["what is this"] * 4)
    for name, budget in {"unpruned": Budget.keep_all(), "METEOR": model.budget}.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            start = time.perf_counter()
            answer = model.answer(
                picture, ["what is this"], budget, max_new_tokens=5, min_new_tokens=5
            )[0]
        with capsys.disabled():
            seconds = time.perf_counter() - start
            print(f"\n{name}: {seconds:.2f} s, tokens {answer.tokens}, '{answer.text}'")
        assert answer.tokens["encoders"] == 196 + 64 + 196 + 256 and len(answer.text.split()) >= 4
    assert answer.tokens["stage1"] == model.budget.stage1 and answer.tokens[
        "stage3"
    ] == pytest.approx(model.budget.stage3, abs=4)


# ------------------------------------------------------ real weights, where a warm cache holds them


def warm(load):
    """load(), or a skip with the sentence that says what is missing. Tests are offline: fill the
    cache first.
    """
    try:
        return load()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.pretrained
def test_real_small_prunes_and_keeps_all():
    model = warm(lambda: Meteor.from_pretrained("small"))
    pictures = torch.stack(
        [torch.from_numpy(world.make_picture(i).image).permute(2, 0, 1) / 255 for i in range(16)]
    )
    calibrate(model, [pictures], ["What is this?"] * 16)
    with pytest.warns(UserWarning, match="not trained"):
        answer = model.answer(pictures[:1], ["What is this?"], max_new_tokens=4)[0]
    assert answer.tokens["encoders"] == 712 and answer.tokens["stage2"] == model.budget.stage2


@pytest.mark.pretrained
def test_a_real_smolvlm_answers_the_same_unpruned_and_names_a_colour_pruned():
    model, processor = warm(lambda: vlm.load_vlm("HuggingFaceTB/SmolVLM-256M-Instruct"))
    red = Image.new("RGB", (512, 512), "red")
    inputs = vlm.prepare(model, processor, red, "What color is this picture?")
    alone = model.generate(**inputs, max_new_tokens=20, do_sample=False)[
        :, inputs["input_ids"].shape[1] :
    ]
    kept = vlm.ask(
        model, processor, red, "What color is this picture?", lam=float("inf"), max_new_tokens=20
    )
    assert kept["answer"] == processor.batch_decode(alone, skip_special_tokens=True)[0].strip()
    vlm.calibrate_lambda(model, [inputs], vlm.SHARE * kept["visual_tokens"])
    pruned = vlm.ask(model, processor, red, "What color is this picture?", max_new_tokens=20)
    assert "red" in pruned["answer"].lower()
