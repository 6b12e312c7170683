"""The training's losses and parts against loops, and one tiny run of every stage, stopped and
resumed.
"""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import stage1_encode
from meteor_mini import load
from meteor_mini.toy import attention_losses, pool, schooling, train, world
from meteor_mini.toy.parts import DECODER, ENCODERS


@pytest.fixture(scope="module")
def model():
    return train.build_model(layers=2)


def random_words(*shape):
    """Random words of random patches, half of them none, and one patch without any."""
    torch.manual_seed(0)
    words = [torch.randint(len(slot) + 1, shape) for slot in world.SLOTS.values()]
    words = torch.stack(words, dim=-1) * torch.randint(2, (*shape, len(words)))
    words[0, 0] = 0
    return words


# --------------------------------------------------------------------------------- parts and losses


@torch.no_grad()
def test_embedded_words_equal_a_loop_over_patches_and_slots(model):
    words = random_words(2, 3)
    got = train.embed_words(model, words)
    vectors, tokenizer = model.decoder.get_input_embeddings().weight, model.tokenizer
    for b in range(2):
        for n in range(3):
            named = []
            for vocabulary, word in zip(world.SLOTS.values(), words[b, n].tolist()):
                if word > 0:
                    named.append(vocabulary[word - 1])
            expected = vectors[tokenizer.convert_tokens_to_ids(named or ["<pad>"])].sum(dim=0)
            torch.testing.assert_close(got[b, n], expected / max(len(named), 1) ** 0.5)


def test_each_encoder_lists_each_thing_that_it_passes_on_once():
    words = torch.from_numpy(np.stack([world.make_picture(i).patch_words for i in range(8)]))
    tokens = train.list_things_once(words, np.random.default_rng(0))
    for patches, row in zip(words, tokens):
        expected = []
        for slots in schooling.TOLD_SLOTS.values():
            passed_on = {tuple((w * slots[w[0]]).tolist()) for w in patches}
            expected += passed_on - {(0,) * len(world.SLOTS)}
        assert sorted(tuple(w) for w in row.tolist() if any(w)) == sorted(expected)


def test_a_grown_llama_computes_the_same(model):
    few, many = train.build_model(layers=2).decoder, train.build_model(layers=6).decoder
    with torch.no_grad():
        for parameter in few.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
        train.grow_layers(few, many)
        x = torch.randn(2, 7, few.config.hidden_size)
        torch.testing.assert_close(many(inputs_embeds=x).logits, few(inputs_embeds=x).logits)
        many.model.layers[2].mlp.down_proj.weight.zero_()  # the first of the old ones
        assert not torch.allclose(many(inputs_embeds=x).logits, few(inputs_embeds=x).logits)


def test_every_parameter_has_one_optimizer_and_only_matrices_of_layers_have_muon(model):
    of_each = []
    for optimizer in train.llama_optimizers(model.decoder, rate=1e-3):
        of_each.append({id(p) for group in optimizer.param_groups for p in group["params"]})
    muon, adam = of_each
    assert not muon & adam
    assert muon | adam == {id(p) for p in model.decoder.parameters()}
    for name, parameter in model.decoder.named_parameters():
        assert (id(parameter) in muon) == ("layers." in name and parameter.ndim == 2)


def test_align_loss_equals_a_loop_over_patches():
    torch.manual_seed(0)
    projected, target = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    has_words = torch.tensor([[True, False, True], [False, False, True]])
    total, mass = 0.0, 0.0
    for b in range(2):
        for n in range(3):
            weight = 1.0 if has_words[b, n] else train.BLANK_WEIGHT
            total += weight * ((projected[b, n] - target[b, n]) ** 2).mean().item()
            mass += weight
    got = train.align_loss(projected, target, has_words)
    assert got.item() == pytest.approx(total / mass, rel=1e-5)


def test_distill_loss_equals_a_loop_over_the_patches_that_are_left(model):
    encoder, project = model.encoders["eva"], model.projectors["eva"]
    torch.manual_seed(0)
    teacher = copy.deepcopy(encoder)
    for weight in teacher.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    pixels = model.views["eva"](torch.rand(2, 3, 96, 96))
    has_words = torch.rand(2, 144) < 0.5
    loss = train.distill_loss(encoder, teacher, project, pixels, has_words, keep=(100, 60, 40))
    with torch.no_grad():
        unpruned = project(stage1_encode.encode(teacher, pixels)[0])
        tokens, kept = stage1_encode.encode(encoder, pixels, (100, 60, 40))
        pruned = project(tokens)
    total, mass = 0.0, 0.0
    for b in range(2):
        for place, patch in enumerate(kept[b].tolist()):
            weight = 1.0 if has_words[b, patch] else train.BLANK_WEIGHT
            total += weight * (pruned[b, place] - unpruned[b, patch]).square().mean().item()
            mass += weight
    assert loss.item() == pytest.approx(total / mass, rel=1e-4)
    loss.backward()
    assert any(weight.grad is not None for weight in encoder.parameters())
    assert all(weight.grad is None for weight in teacher.parameters())
    model.zero_grad()
    same = train.distill_loss(encoder, encoder, project, pixels, has_words, (None,))
    assert same.item() < 1e-10  # an encoder that keeps all is its own teacher


@torch.no_grad()
def test_some_encoders_now_and_then_see_nothing(model):
    features = [torch.randn(1, 4, view.width) for view in model.views.values()]
    kept = [torch.arange(4)[None]] * len(features)
    of_nothing = []
    for projector, x in zip(model.projectors.values(), features):
        of_nothing.append(projector(torch.zeros_like(x[:1, :1])))
    masked = 0
    for seed in range(100):
        fused = train.fuse_randomly(model, features, kept, np.random.default_rng(seed)).fused
        blind = [
            projector(0 * x[:1, :1]) for projector, x in zip(model.projectors.values(), features)
        ]
        masked += any((fused.tokens - token).abs().amax(dim=-1).min() < 1e-6 for token in blind)
    assert 2 <= masked <= 16  # 8 % of batches, less those in which all see


def test_a_pool_holds_the_pictures_it_drew(tmp_path):
    pool.draw_pool(tmp_path, 6)
    drawn = pool.Pool(tmp_path)
    assert len(drawn) == 6
    for i in range(6):
        picture = world.make_picture(i)
        assert np.array_equal(drawn.images[i], picture.image)
        assert drawn.pictures[i].facts == picture.facts
        assert drawn.words[i].tolist() == picture.patch_words.tolist()
        assert drawn.clutter[i].tolist() == picture.patch_clutter.tolist()
    bar = 1 + world.SLOTS["what"].index("bar")
    with_bars = [i for i in range(6) if bar in drawn.words[i, :, 0].tolist()]
    assert schooling.find_pictures(drawn, "bar").tolist() == with_bars


# ------------------------------------------------------------------------------------ every stage


class Stopped(Exception):
    pass


@pytest.fixture
def tiny(monkeypatch):
    """Every stage in two steps on a few pictures, with a small Llama."""
    monkeypatch.setattr(train, "POOL", 16)
    monkeypatch.setattr(train, "STEPS", dict.fromkeys(train.STEPS, 2))
    monkeypatch.setattr(schooling, "STEPS", dict.fromkeys(ENCODERS, 2))
    monkeypatch.setattr(pool, "SAVE_EVERY", 1)
    for module in (train, schooling):
        monkeypatch.setattr(module, "BATCH", 4)
    for name, value in {"VALIDATION": 2, "RANK_PICTURES": 4, "TABLE_QUESTIONS": 2}.items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(train, "DECODER", DECODER | {"num_hidden_layers": 2})
    monkeypatch.setattr(train, "BUDGET", train.BUDGET | {"layers": [1]})
    monkeypatch.setattr(train, "FIRST_LAYERS", 1)
    monkeypatch.setattr(attention_losses, "TAUGHT_LAYERS", [1])
    monkeypatch.setattr(train, "TABLE_KS", [24, 145])
    monkeypatch.setattr(train, "TABLE_LAMBDAS", [0.0, 512.0])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the last bits of sums depend on how threads share them
    yield monkeypatch
    torch.set_num_threads(threads)


def run(monkeypatch, work, out):
    monkeypatch.setattr("sys.argv", ["train", "--work", str(work), "--out", str(out)])
    train.main()


def stop_in_the_middle(monkeypatch, stage, work, out):
    """Run a stage anew, and stop it in its last step."""
    (work / f"{stage}.safetensors").unlink()
    with monkeypatch.context() as patch:
        original = pool.torch.manual_seed
        last = (schooling.STEPS | train.STEPS)[stage] - 1

        def stop(seed):
            if seed == last and (work / f"{stage}.state").exists():
                raise Stopped
            return original(seed)

        patch.setattr(pool.torch, "manual_seed", stop)
        with pytest.raises(Stopped):
            run(monkeypatch, work, out)


@pytest.mark.slow  # half a minute
def test_every_stage_runs_resumes_and_leaves_a_model_that_loads(tiny, tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    run(tiny, work, out)
    model = load(out)
    assert model.config["ranks"] and model.config["lambda_table"]
    assert model.budget.stage1 == train.BUDGET["stage1"]
    assert model.decoder.config.num_hidden_layers == 2

    answer, distilled = (
        load_file(work / f"{stage}.safetensors") for stage in ("answer", "distill")
    )
    changed = [name for name in answer if not torch.equal(answer[name], distilled[name])]
    assert changed and all(name.startswith("encoders.eva.") for name in changed)

    for stage in ("clip", "answer"):
        file = work / f"{stage}.safetensors"
        uninterrupted = file.read_bytes()
        stop_in_the_middle(tiny, stage, work, out)
        assert not file.exists()
        run(tiny, work, out)
        assert file.read_bytes() == uninterrupted
