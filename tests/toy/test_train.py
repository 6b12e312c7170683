"""The training's parts against loops.

And one tiny run of every stage end to end (slow), stopped and resumed.
"""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import stage1_encode
from meteor_mini import load
from meteor_mini.budgets import Budget
from meteor_mini.finetune import answer_loss, pack
from meteor_mini.lab import fusions, tables, train_fusions
from meteor_mini.toy import evaluate, questions, schooling, train, world


@pytest.fixture(scope="module")
def model():
    return train.new_model(layers=2)


def some_words(*shape):
    """Random words of random patches, half of them none, and one patch without any."""
    torch.manual_seed(0)
    words = [torch.randint(len(slot) + 1, shape) for slot in world.SLOTS.values()]
    words = torch.stack(words, dim=-1) * torch.randint(2, (*shape, len(words)))
    words[0, 0] = 0
    return words


def test_slot_ids_are_the_words_of_the_tokenizer(model):
    for ids, words in zip(train.slot_ids(model), world.SLOTS.values()):
        assert model.tokenizer.convert_ids_to_tokens(ids.tolist()) == ["<pad>", *words]


@torch.no_grad()
def test_spoken_equals_a_loop_over_patches_and_slots(model):
    words, table = some_words(2, 3), train.slot_ids(model)
    got = train.spoken(model, words, table)
    vectors = model.decoder.get_input_embeddings().weight
    for b in range(2):
        for n in range(3):
            ids = [table[s][w].item() for s, w in enumerate(words[b, n].tolist()) if w]
            expected = vectors[ids].sum(0) / max(len(ids), 1) ** 0.5
            if not ids:
                expected = vectors[model.tokenizer.pad_token_id]
            torch.testing.assert_close(got[b, n], expected)


def test_each_thing_is_said_once_by_each_encoder_that_tells_it():
    pictures = [world.make_picture(i).patch_words.astype(np.uint8) for i in range(8)]
    tokens = train.each_thing_once(np.stack(pictures), np.random.default_rng(0))
    for patches, said in zip(pictures, tokens):
        expected = []
        for name in schooling.TOLD:
            told = {tuple(words) for words in schooling.told_words(patches, name).tolist()}
            expected += told - {(0,) * len(world.SLOTS)}
        got = [tuple(words) for words in said.tolist() if any(words)]
        assert sorted(got) == sorted(expected)


def test_a_grown_llama_computes_the_same(model):
    few, many = train.new_model(layers=2).decoder, train.new_model(layers=6).decoder
    with torch.no_grad():
        for parameter in few.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
        train.grown(few, many)
        x = torch.randn(2, 7, few.config.hidden_size)
        torch.testing.assert_close(many(inputs_embeds=x).logits, few(inputs_embeds=x).logits)
        many.model.layers[2].mlp.down_proj.weight.zero_()  # the first of the old ones
        assert not torch.allclose(many(inputs_embeds=x).logits, few(inputs_embeds=x).logits)


def test_every_parameter_has_one_optimizer_and_only_matrices_of_layers_have_muon(model):
    muon, adam = train.optimizers_of(model.decoder)
    of_each = []
    for optimizer in (muon, adam):
        of_each.append({id(p) for group in optimizer.param_groups for p in group["params"]})
    assert not of_each[0] & of_each[1]
    assert of_each[0] | of_each[1] == {id(p) for p in model.decoder.parameters()}
    for name, parameter in model.decoder.named_parameters():
        in_layers = "layers." in name and parameter.ndim == 2
        assert (id(parameter) in of_each[0]) == in_layers


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


def test_steady_loss_equals_a_loop_over_the_patches_that_are_left(model):
    encoder, project = model.encoders["eva"], model.projectors["eva"]
    torch.manual_seed(0)
    other = copy.deepcopy(encoder)
    for weight in other.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    pixels = model.views["eva"](torch.rand(2, 3, 96, 96))
    has_words = torch.rand(2, 144) < 0.5
    loss = train.steady_loss(encoder, other, project, pixels, has_words, keep=(100, 60, 40))
    with torch.no_grad():
        unpruned = project(stage1_encode.encode(other, pixels)[0])
        tokens, kept = stage1_encode.encode(encoder, pixels, (100, 60, 40))
        said = project(tokens)
    total, mass = 0.0, 0.0
    for b in range(2):
        for place, patch in enumerate(kept[b].tolist()):
            weight = 1.0 if has_words[b, patch] else train.BLANK_WEIGHT
            total += weight * (said[b, place] - unpruned[b, patch]).square().mean().item()
            mass += weight
    assert loss.item() == pytest.approx(total / mass, rel=1e-4)
    loss.backward()
    assert any(weight.grad is not None for weight in encoder.parameters())
    assert all(weight.grad is None for weight in other.parameters())
    model.zero_grad()


def test_an_encoder_that_keeps_all_patches_is_steady(model):
    encoder, project = model.encoders["eva"], model.projectors["eva"]
    pixels = model.views["eva"](torch.rand(2, 3, 96, 96))
    has_words = torch.ones(2, 144, dtype=torch.bool)
    loss = train.steady_loss(encoder, copy.deepcopy(encoder), project, pixels, has_words, (None,))
    assert loss.item() < 1e-10


def test_random_plans_leave_a_total_within_the_bounds_and_now_and_then_all(model, monkeypatch):
    ranks = [[4.0, 2.0, 3.0, 4.0]] * 3
    monkeypatch.setitem(model.config, "ranks", ranks)
    rng, whole = np.random.default_rng(0), 0
    for _ in range(200):
        plan = train.random_plan(model, rng)
        total = sum(counts[-1] for counts in plan)
        whole += total == model.num_tokens
        low, high = train.STEADY_COUNTS
        assert total == model.num_tokens or low <= total < high
    assert 10 <= whole <= 60  # of 200, 0.15 expected


def test_each_stage_runs_what_is_named_after_it(monkeypatch, tmp_path):
    ran = []

    def note(name):
        return lambda *args: ran.append(name)

    for stage in ("words", "features", "align", "answer", "steady", "calibrate"):
        monkeypatch.setattr(train, f"{stage}_stage", note(stage))
    monkeypatch.setattr(train, "draw_pool", note("pictures"))
    monkeypatch.setattr(train, "train_encoder", lambda name, *args: ran.append(name))
    for stage in train.STAGES:
        train.run_stage(stage, tmp_path, tmp_path)
    assert ran == train.STAGES


def test_showing_finds_the_pictures_with_a_thing():
    pictures = [world.make_picture(i).patch_words.astype(np.uint8) for i in range(40)]
    bar = 1 + world.SLOTS["what"].index("bar")
    expected = [i for i, words in enumerate(pictures) if bar in words[:, 0].tolist()]
    pool = SimpleNamespace(words=np.stack(pictures))
    assert 0 < len(expected) < 40
    assert schooling.showing(pool, "bar").tolist() == expected


@torch.no_grad()
def test_attention_on_the_picture_is_what_eager_attention_says(model):
    torch.manual_seed(0)
    visual, P = torch.randn(2, 3, model.decoder.config.hidden_size), len(model.before_ids)
    dialogues = [[("is there", "yes")], [("red", "42")]]  # five tokens each, with <ans> and <eos>
    expected = answer_loss(model, visual, dialogues)["loss"]
    with train.attention_on_picture(model, K=3) as attention:
        loss = answer_loss(model, visual, dialogues)["loss"]
    assert model.decoder.config._attn_implementation == "sdpa"
    torch.testing.assert_close(loss, expected)
    embeds = pack(model, visual, dialogues)[0]
    model.decoder.set_attn_implementation("eager")
    try:
        weights = model.decoder.model(inputs_embeds=embeds, output_attentions=True).attentions
    finally:
        model.decoder.set_attn_implementation("sdpa")
    assert len(attention) == len(weights) == model.decoder.config.num_hidden_layers
    for got, weight in zip(attention, weights):  # (B, H, T, K); (B, H, S, S)
        torch.testing.assert_close(got, weight[:, :, P + 3 :, P : P + 3])


def test_looking_and_aside_losses_equal_loops(model):
    torch.manual_seed(0)
    B, H, T, K = 2, 2, 5, 4
    attention = [torch.rand(B, H, T, K) / K for _ in range(8)]
    asking = torch.tensor([[1, 1, 0, 2, 0], [1, 0, 0, 0, 0]])
    picture, question = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 1])
    tokens = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]).bool()
    looking, aside = [], []
    for layer, weights in enumerate(attention):
        for b in range(B):
            for h in range(H):
                looking += weights[b, h].sum(dim=-1).tolist()
        if layer not in train.TAUGHT_LAYERS:
            continue
        for b, n, shown in zip(picture, question, tokens):
            on_thing = on_picture = 0.0
            for h in range(H):
                for t in range(T):
                    if asking[b, t] == n:
                        on_picture += weights[b, h, t].sum().item()
                        on_thing += weights[b, h, t][shown].sum().item()
            aside.append(-np.log(on_thing / on_picture + 1e-3))
    about = train.About(picture, question, tokens)
    assert train.looking_loss(attention).item() == pytest.approx(np.mean(looking), rel=1e-5)
    assert train.aside_loss(attention, about, asking).item() == pytest.approx(
        np.mean(aside), rel=1e-5
    )
    nothing = train.About(picture[:0], question[:0], tokens[:0])
    assert train.aside_loss(attention, nothing, asking).item() == 0


def test_tokens_asked_about_show_the_thing_and_are_of_encoders_that_know_what_is_needed(model):
    pictures = [world.make_picture(i) for i in range(6)]
    rng = np.random.default_rng(0)
    asked = [train.dialogue(picture, rng) for picture in pictures]
    images = evaluate.to_images([picture.image for picture in pictures])
    model.config["ranks"] = [[1.0] * len(model.encoders)] * 3
    encoded = model.encode(images, Budget(stage1=200, stage2=60))
    expected = []
    for b, of_picture in enumerate(asked):
        after_stage1 = []  # the encoder and the patch of each token
        for name, idx in zip(schooling.TOLD, encoded.stage1_idx):
            after_stage1 += [(name, patch) for patch in idx[b].tolist()]
        in_llm = [after_stage1[i] for i in encoded.fused.keep_idx[b].tolist()]
        for number, question in enumerate(of_picture, 1):
            for thing in question.about:
                shown = questions.asked_patches(pictures[b], question._replace(about=[thing]))
                tokens = []
                for name, patch in in_llm:
                    words = pictures[b].patch_words[patch].astype(np.uint8)
                    told = schooling.told_words(words, name)
                    needed = [s for s, slot in enumerate(world.SLOTS) if slot in thing and s > 0]
                    knows = told.any() and all(told[needed])
                    tokens.append(bool(shown[patch] and knows))
                if any(tokens):
                    expected.append((b, number, tokens))
    about = train.tokens_asked_about(encoded, pictures, asked)
    got = zip(about.picture.tolist(), about.question.tolist(), about.tokens.tolist())
    assert len(expected) > 6 and list(got) == expected


@pytest.mark.parametrize(
    "thing, names",
    [
        ({"what": "star"}, ["clip", "convnext", "eva", "pix2struct"]),
        ({"what": "star", "color": None}, ["clip"]),
        ({"what": "star", "pattern": None}, ["convnext"]),
        ({"what": "bar", "extreme": "tallest", "color": None}, ["eva"]),
        ({"what": "label", "row": "top", "column": "left"}, ["pix2struct"]),
    ],
)
def test_encoders_that_tell_of_what_is_asked(thing, names):
    tells = dict(zip(schooling.TOLD, train.encoders_that_tell_of(thing)))
    assert [name for name in tells if tells[name]] == names


def test_asking_tokens_are_those_of_questions(model):
    dialogues = [[("is there", "yes"), ("red", "42")], [("red", "1")]]
    expected = [[1, 1, 1, 0, 0, 2, 2, 0, 0, 0], [1, 1, 0, 0] + [0] * 6]  # with <ans>
    assert train.asking_tokens(model, dialogues).tolist() == expected


def test_packed_positions_and_mask_by_hand(model):
    visual = torch.zeros(1, 2, 128)
    P = len(model.before_ids)
    _, mask, position, labels = pack(model, visual, [[("is there", "yes"), ("red", "42")]])
    # P words before, v v | is there <ans> yes <eos> | red <ans> 4 2 <eos>
    start = P + 2
    first, second = range(start, start + 5), range(start, start + 5)
    assert position[0].tolist() == [*range(start), *first, *second]
    spoken = []
    for label in labels[0].tolist():
        spoken.append(model.tokenizer.convert_ids_to_tokens(label) if label != -100 else "")
    answers = [""] * 3 + ["yes", "<eos>"] + [""] * 2 + ["4", "2", "<eos>"]
    assert spoken == [""] * start + answers
    seen = mask[0, 0].int().tolist()
    assert seen[start + 4] == [1] * (start + 5) + [0] * 5
    assert seen[start + 5] == [1] * start + [0] * 5 + [1] + [0] * 4
    assert seen[start + 9] == [1] * start + [0] * 5 + [1] * 5


@pytest.mark.parametrize("short", [0.0, 1.0])
def test_dialogues_are_short_and_ask_nothing_twice(model, short):
    rng = np.random.default_rng(0)
    for index in range(40):
        pairs = train.as_pairs(train.dialogue(world.make_picture(index), rng, short))
        assert pairs and all(question and answer for question, answer in pairs)
        assert len({question for question, _ in pairs}) == len(pairs)
        ids = model.tokenizer([f"{question} {answer}" for question, answer in pairs]).input_ids
        words = sum(len(of_pair) + 2 for of_pair in ids)
        assert words <= 72 or len(pairs) == 1  # one description may be longer


def test_a_batch_without_masking_is_untouched_and_a_masked_encoder_is_zero():
    features = [torch.randn(2, 3, 4) for _ in range(4)]
    masked = 0
    for seed in range(200):
        out = train.mask_encoders(features, np.random.default_rng(seed))
        untouched = [torch.equal(x, y) for x, y in zip(features, out)]
        assert all(same or y.abs().max() == 0 for same, y in zip(untouched, out))
        masked += not all(untouched)
    assert 5 <= masked <= 30  # 8 % of batches, less those in which all are seen


def test_the_mean_of_weights_is_that_of_each_number(tmp_path):
    files, values = [], [1.0, 2.0, 6.0]
    for number, value in enumerate(values):
        files.append(tmp_path / f"{number}.safetensors")
        train.save_whole({"a": torch.full((2,), value), "b": torch.tensor([-value])}, files[-1])
    mean = train.mean_weights(files)
    assert mean["a"].tolist() == [3, 3] and mean["b"].tolist() == [-3]


def test_rounds_go_on_with_new_questions_and_leave_the_mean_of_their_ends(
    model, monkeypatch, tmp_path
):
    asked, shape = [], model.decoder.model.norm.weight.shape

    def train_llama(model, stage, work, loss_of, numbers, rate, hold):
        asked.append(numbers)
        end = {"decoder.model.norm.weight": torch.full(shape, float(len(asked)))}
        train.save_whole(end, work / f"{stage}.safetensors")

    monkeypatch.setattr(train, "train_llama", train_llama)
    monkeypatch.setattr(train, "trained", lambda *_: train.new_model(layers=2))
    monkeypatch.setattr(train, "load_facts", lambda _: [])
    left = []
    monkeypatch.setattr(train, "recall", lambda model, _: left.append(model))
    monkeypatch.setattr(train, "print_recall", lambda _: None)
    train.answer_stage(tmp_path)
    together = [number for numbers in asked for number in numbers]
    assert [len(numbers) for numbers in asked] == list(train.ROUNDS)
    assert together == list(range(sum(train.ROUNDS)))
    saved = train.load_file(tmp_path / "answer.safetensors")["decoder.model.norm.weight"]
    assert (saved == 2).all() and (left[0].decoder.model.norm.weight == 2).all()


def run(module, monkeypatch, work, out, *options):
    monkeypatch.setattr("sys.argv", ["train", "--work", str(work), "--out", str(out), *options])
    module.main()


@pytest.fixture
def one_thread():
    """The last bits of sums depend on how several threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow  # ten minutes: every stage of both trainings, and calibration
def test_every_stage_runs_resumes_and_leaves_a_model_that_loads(monkeypatch, tmp_path, one_thread):
    steps = {name: 2 for name in train.STEPS}
    for name, value in {"POOL": 128, "STEPS": steps, "ROUNDS": (2, 2)}.items():
        monkeypatch.setattr(train, name, value)
    run(train, monkeypatch, tmp_path / "work", tmp_path / "model")
    model = load(tmp_path / "model")
    assert model.config["ranks"] and model.config["lambda_table"]
    assert model.budget.stage1 == train.BUDGET["stage1"]
    before = train.load_file(tmp_path / "work" / "answer.safetensors")
    after = train.load_file(tmp_path / "work" / "steady.safetensors")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed and all(name.startswith("encoders.eva.") for name in changed)

    schedule = train.schedule
    monkeypatch.setattr(train, "schedule", lambda step, _, **options: schedule(step, 2, **options))
    stopped = {  # after one step
        "words": ("STEPS", steps | {"words": 1}),
        "answer": ("ROUNDS", (1,)),
        "steady": ("STEPS", steps | {"steady": 1}),
    }
    for stage, (name, fewer) in stopped.items():
        once = (tmp_path / "work" / f"{stage}.safetensors").read_bytes()
        for file in (tmp_path / "work").glob(f"{stage}*.safetensors"):
            file.unlink()
        whole = getattr(train, name)
        for value in (fewer, whole):
            monkeypatch.setattr(train, name, value)
            run(train, monkeypatch, tmp_path / "work", tmp_path / "model", "--stage", stage)
        assert (tmp_path / "work" / f"{stage}.safetensors").read_bytes() == once

    monkeypatch.setattr(train_fusions, "CHUNKS", 2)
    monkeypatch.setattr(train_fusions, "STEPS", {"align": 2, "answer": 4})
    file = tmp_path / "model" / fusions.FILE
    run(train_fusions, monkeypatch, tmp_path / "work", file)
    rows = tables.table2(load(tmp_path / "model"))
    (row,) = [row for row in rows if row.label.startswith("EAGLE-style")]
    assert evaluate.accuracy(model, row.method, "val", 8)["average_tokens"] == 144
