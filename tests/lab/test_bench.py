"""What `meteor-mini bench` counts, on a model of the same classes at toy widths.

No test asserts a speed.
"""

import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

import stage1_encode
import stage2_fuse
from meteor_mini import Budget, cli
from meteor_mini.lab import bench, bench_page, contenders, timing
from stage3_decode import average_tokens

TINY = {
    "clip": {"patch": 4, "width": 32, "layers": 3, "heads": 4},
    "convnext": {"depths": [1, 1, 1, 1], "width": 8},
    "eva": {"patch": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, "qkv_fused": True},
    "pix2struct": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "d_kv": 8,
        "d_ff": 48,
        "patch_embed_hidden_size": 48,
    },
    "llama": {
        "hidden_size": 32,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 99,
        "max_position_embeddings": 8192,
    },
}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(contenders.SIZES, "tiny", TINY)
    monkeypatch.setitem(contenders.SIZES, "small", TINY)


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(contenders.SIZES, "tiny", TINY)
        torch.manual_seed(0)
        return contenders.build("tiny", 8, "cpu", torch.float32)


def test_every_encoder_has_the_asked_grid(model):
    assert [view.num_tokens for view in model.views.values()] == [64] * 4
    with pytest.raises(ValueError, match="size must be one of small"):
        contenders.build("huge", 8, "cpu", torch.float32)


def test_budgets_are_the_papers_at_the_papers_size_and_in_proportion_elsewhere(model, monkeypatch):
    at = {name: c.layers for name, c in contenders.contenders(model).items()}
    assert at["unpruned"] == [256] * 8 and at["EAGLE-style"] == [64] * 8
    assert at["METEOR"] == [36, 25, 25, 11, 11, 5, 5, 5]  # 576, 396, 170 and 76 of 4096, of 256
    large = {name: replace(view, grid=(32, 32)) for name, view in model.views.items()}
    monkeypatch.setattr(model, "views", large)
    layers = contenders.contenders(model)["METEOR"].layers
    assert layers == [576, 396, 396, 170, 170, 76, 76, 76]


def test_tokens_in_the_layers_never_rise():
    assert contenders.spread(9, {2: 5, 3: 7}, 5) == [9, 9, 5, 5, 5]
    assert contenders.spread(9, {}, 3) == [9, 9, 9]
    assert contenders.spread(4, {1: 6}, 2) == [4, 4]


@torch.no_grad()
def test_the_contenders_keep_what_they_are_counted_for(model):
    images = torch.rand(2, 3, 40, 40)
    for name, c in contenders.contenders(model).items():
        encoded = c.encode(images)
        _, pruner = model.generate(encoded, ["what"] * 2, Budget.none(), c.pruner, max_new_tokens=1)
        assert encoded.fused.tokens.shape[1] == c.layers[0], name
        if pruner is not None:
            counts = {i: count.tolist() for i, count in pruner.counts.items()}
            assert counts == {i: [c.layers[i]] * 2 for i in (1, 3, 5)}
            kept = [keep.shape[1] for keep in encoded.stage1_idx]
            assert len(kept) == 4 and sum(kept) == round(256 * 1193 / 4096)


@torch.no_grad()
def test_the_two_of_split_and_kernels_are_those_of_whole(model):
    both, everyone = contenders.pruned_and_not(model), contenders.contenders(model)
    assert list(both) == ["unpruned", "METEOR"]
    assert all(both[name].layers == everyone[name].layers for name in both)


@torch.no_grad()
def test_the_kv_cache_is_counted_by_hand(model):
    # text before the picture, the question, <ans>, and two of the three new tokens
    text = len(model.before_ids) + contenders.TEXT + 1 + 2
    d = TINY["llama"]["hidden_size"] // 8
    for name, c in contenders.contenders(model).items():
        result = contenders.run(model, c, torch.rand(2, 3, 40, 40), new=3)
        numbers = [2 * 4 * d * (n + text) for n in c.layers]  # pictures, heads of keys
        assert result["kv"] == 2 * 4 * sum(numbers), name  # keys and values, float32
        assert result["prefill"] > 0 and result["decode"] > 0


def test_peak_memory_counts_what_is_held_at_a_time():
    def work():
        a = torch.zeros(1000, 256)  # 1,024,000 bytes
        del a
        b = torch.zeros(1000, 512)
        return (b + 1).sum()  # b and its copy: 4,096,000

    assert timing.peak(CPU, work) == pytest.approx(4_096_000, rel=0.01)


@torch.no_grad()
def test_the_stopwatch_charges_each_part_once(model):
    c, images = contenders.contenders(model)["METEOR"], torch.rand(1, 3, 40, 40)
    with timing.stopwatch(CPU) as spent:
        wall = timing.seconds_of(partial(contenders.run, model, c, images, new=1), CPU)
    assert set(spent) == set(timing.PARTS) and min(spent.values()) > 0
    # A part inside another is not counted twice: no assertion of a speed.
    assert sum(spent.values()) <= wall
    with pytest.raises(RuntimeError, match="inside"), timing.stopwatch(CPU):
        raise RuntimeError("inside")
    assert sys.getprofile() is None


@torch.no_grad()
def test_choosing_is_charged_to_stage_1_in_every_kind_of_encoder(model, monkeypatch):
    c, images = contenders.contenders(model)["METEOR"], torch.rand(1, 3, 40, 40)
    similarity, scored = stage1_encode.mean_similarity, []

    def slow(tokens):
        scored.append(tokens.shape[1])
        timing.time.sleep(0.05)
        return similarity(tokens)

    monkeypatch.setattr(stage1_encode, "mean_similarity", slow)
    with timing.stopwatch(CPU) as spent:
        c.encode(images)
    assert scored == [64] * 4  # point 0 of three ViTs, the output of the ConvNeXt
    assert spent["stage 1"] >= 4 * 0.05


@torch.no_grad()
def test_answers_under_the_stopwatch_are_the_same(model):
    c, images = contenders.contenders(model)["METEOR"], torch.rand(2, 3, 40, 40)

    def answer():
        encoded = c.encode(images)
        questions = ["what what"] * 2
        ids, _ = model.generate(encoded, questions, Budget.none(), c.pruner, max_new_tokens=4)
        return ids

    ids = answer()
    with timing.stopwatch(CPU):
        again = answer()
    assert torch.equal(ids, again)


def test_turns_interleave_and_the_first_round_warms_up():
    calls = []

    def once(name):
        calls.append(name)
        return {"s": len(calls)}

    work = {"a": partial(once, "a"), "b": partial(once, "b")}
    rounds = timing.turns(work, 2, seconds=60)
    assert rounds == {"a": [{"s": 3}, {"s": 5}], "b": [{"s": 4}, {"s": 6}]}
    assert calls == ["a", "b"] * 3
    calls.clear()  # no time: one round counts, never the cold one
    assert timing.turns(work, 2, seconds=0) == {"a": [{"s": 3}], "b": [{"s": 4}]}
    rounds = timing.turns(work, 1, seconds=0, warm=True)
    assert rounds == {"a": [{"s": 5}], "b": [{"s": 6}]}


def test_the_pairwise_formula_is_stage_2s():
    torch.manual_seed(0)
    tokens = [torch.randn(2, n, 6) for n in (5, 7, 3)]
    by_pairs, by_sums = bench.pairwise_redundancy(tokens), stage2_fuse.mutual_redundancy(tokens)
    for pairs, sums in zip(by_pairs, by_sums):
        torch.testing.assert_close(pairs, sums)


def test_peers_keep_the_same_mean_of_tokens_and_the_model_stays_on_sdpa():
    rows = bench.peers("tiny", 256, "cpu", torch.float32, 1, 0)
    mine = average_tokens(256, [176, 76, 34], [1, 3, 5], 8)
    assert rows[0]["mean tokens"] == 256 and rows[0]["FLOPs ratio"] == 1
    assert [row["method"] for row in rows[:2]] == ["unpruned", "stage 3"]
    for row in rows[1:]:
        assert row["mean tokens"] == pytest.approx(mine, abs=2), row["method"]
    config = bench.build_decoder(TINY["llama"]).config
    full = bench.prefill_flops(config, [256] * 8, contenders.TEXT)
    layers = [256] + [176] * 2 + [76] * 2 + [34] * 3
    pruned = bench.prefill_flops(config, layers, contenders.TEXT)
    assert rows[1]["FLOPs ratio"] == pytest.approx(full / pruned)
    memory = {row["method"]: row["peak memory, MiB"] for row in rows}
    assert memory["FastV, eager"] > 2 * memory["FastV, SDPA"]  # every layer writes H S S weights


def test_speed_ups_are_the_unpruned_time_over_the_rows(monkeypatch):
    def halving(work, *args):
        """As `turns`, but the first takes 4 seconds for everything, the next 2, and so on."""
        figures, taken = {}, 4.0
        for name, once in work.items():
            figures[name] = [once() | {"prefill": taken, "decode": taken, "s": taken}]
            taken /= 2
        return figures

    monkeypatch.setattr(bench, "turns", halving)
    rows = bench.whole("tiny", 8, [1], "cpu", torch.float32, 1, 0)
    assert [row["speed-up"] for row in rows] == [1, 2, 4]
    mine = rows[-1]
    assert mine["realised"] == pytest.approx(4 / mine["FLOPs ratio"])
    assert mine["decode, ms a token"] == 1000
    rows = bench.peers("tiny", 256, "cpu", torch.float32, 1, 0)
    assert [row["speed-up"] for row in rows] == [1, 2, 4, 8, 16]


def test_what_does_not_fit_is_left_out_and_said(monkeypatch, capsys):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("no")

    def one_row(name, *args, **kwargs):
        return [{"row of": name}]

    monkeypatch.setattr(bench, "whole", full)
    others = ["split", "peers", "inside_a_vit", "growth", "overhead"]
    for name in others:
        monkeypatch.setattr(bench, name, partial(one_row, name))
    seen = []

    def done(tables):
        seen.append(list(tables))

    bench.bench("tiny", "cpu", torch.float32, True, done)
    assert seen[-1] == others
    assert "whole: a size does not fit" in capsys.readouterr().err


def test_numbers_are_shown_with_digits_that_count():
    numbers = {"a": 0.0123456, "b": 7, "c": 1234.5, "d": None, "e": 99.97, "f": 0.0}
    grid = bench_page.as_grid([numbers, {"a": "x"}])
    assert grid.splitlines()[2:] == ["| 0.0123 | 7 | 1,234 |  | 100 | 0 |", "| x |  |  |  |  |  |"]


@pytest.fixture
def small_vit(monkeypatch):
    """timm's ViT of three narrow blocks in place of its ViT-B."""
    create = bench.timm.create_model

    def small(name, **options):
        return create(name, **options | {"embed_dim": 48, "num_heads": 4, "depth": 3})

    monkeypatch.setattr(bench.timm, "create_model", small)


def test_every_table_has_its_rows_and_becomes_a_page(small_vit, tmp_path):
    pytest.importorskip("matplotlib")
    tables = {
        # 12 x 12 patches: with fewer, resizing the pictures takes more memory than the toy model
        "whole": bench.whole("tiny", 12, [1, 2], "cpu", torch.float32, 1, 0),
        "split": bench.split("tiny", 8, "cpu", torch.float32, 1),
        "peers": bench.peers("tiny", 256, "cpu", torch.float32, 1, 0),
        "inside_a_vit": bench.inside_a_vit(8, "cpu", torch.float32, 1, 0),
        "growth": bench.growth("tiny", [256, 1024], 256, "cpu", torch.float32),
        "overhead": bench.overhead("tiny", [8], "cpu", torch.float32),
        "kernels": bench.kernels("tiny", 8, "cpu", torch.float32, 1, 0),
    }
    assert tables.keys() == bench.NOTES.keys()
    whole = {(r["batch"], r["contender"]): r for r in tables["whole"]}
    full, mine = whole[1, "unpruned"], whole[1, "METEOR"]
    assert len(whole) == 6 and full["FLOPs ratio"] == full["realised"] == 1
    assert mine["FLOPs ratio"] > whole[1, "EAGLE-style"]["FLOPs ratio"] > 1
    assert whole[2, "METEOR"]["KV cache, MiB"] == 2 * mine["KV cache, MiB"]
    assert mine["peak memory, MiB"] < full["peak memory, MiB"]
    assert {r["kernels"] for r in tables["kernels"]} >= {"fused", "plain"}
    assert len({r["contender"] for r in tables["kernels"]}) == 2
    vit = {r["method"]: r["tokens out"] for r in tables["inside_a_vit"]}
    assert vit["stage 1"] == vit["ToMe"] < vit["unpruned"] == 64
    by_size = tables["growth"]
    assert "by pairs, ms" in by_size[0] and "by pairs, ms" not in by_size[1]
    bench.write(tables, tmp_path / "results", "meteor-mini bench", 1.0, "cpu")
    text = (tmp_path / "results" / "benchmark.md").read_text()
    assert all(note in text for note in bench.NOTES.values())
    assert (tmp_path / "results" / "benchmark.png").stat().st_size > 10_000


def test_the_command_writes_what_it_is_asked_to(monkeypatch, tmp_path, capsys):
    asked = []

    def one_table(size, device, dtype, quick, done):
        asked.append((size, device, dtype, quick))
        done({"whole": [{"a": 1}]})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "bench", one_table)
    assert cli.main(["bench", "--quick", "--json", "rows.json"]) == 0
    assert asked == [("small", "cpu", torch.float32, True)]
    assert json.loads((tmp_path / "rows.json").read_text()) == {"whole": [{"a": 1}]}
    assert not (tmp_path / "results").exists()
    assert cli.main(["bench", "--quick", "--device", "nowhere"]) == 2
    wrong = "--device must be cpu, or cuda where torch finds a GPU, got nowhere"
    assert wrong in capsys.readouterr().err
    monkeypatch.undo()
    assert cli.main(["bench", "--quick", "--size", "huge"]) == 2
    assert "size must be one of" in capsys.readouterr().err
