"""What `meteor-mini bench` counts, on a model of the same classes at toy widths. No test asserts a time."""

import json

import pytest
import torch

import stage1_encode
import stage2_fuse
from meteor_mini import bench, cli
from stage3_decode import AdaptivePruner, average_tokens

TINY = {
    "clip": dict(patch=4, width=32, layers=3, heads=4),
    "convnext": dict(depths=[1, 1, 1, 1], width=8),
    "eva": dict(patch=4, embed_dim=32, depth=3, num_heads=4, qkv_fused=True),
    "pix2struct": dict(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        d_kv=8,
        d_ff=48,
        patch_embed_hidden_size=48,
    ),
    "llama": dict(
        hidden_size=32,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=64,
        vocab_size=99,
        max_position_embeddings=8192,
    ),
}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(bench.SIZES, "tiny", TINY)
    monkeypatch.setitem(bench.SIZES, "small", TINY)


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench.SIZES, "tiny", TINY)
        torch.manual_seed(0)
        return bench.build("tiny", 8, "cpu", torch.float32)


def test_every_encoder_has_the_asked_grid(model):
    assert [a.num_tokens for a in model.adapters] == [64] * 4
    with pytest.raises(ValueError, match="size must be one of small"):
        bench.build("huge", 8, "cpu", torch.float32)


def test_budgets_are_the_papers_at_the_papers_size_and_in_proportion_elsewhere(model, monkeypatch):
    at = {name: c.layers for name, c in bench.contenders(model).items()}
    assert at["unpruned"] == [256] * 8 and at["EAGLE-style"] == [64] * 8
    assert at["METEOR"] == [36, 25, 25, 11, 11, 5, 5, 5]  # 576, 396, 170 and 76 of 4096, of 256
    for adapter in model.adapters:
        monkeypatch.setattr(adapter, "num_tokens", 1024)
    llm = bench.contenders(model)["METEOR"].layers
    assert llm == [576, 396, 396, 170, 170, 76, 76, 76]


@torch.no_grad()
def test_the_contenders_keep_what_they_are_counted_for(model):
    images = torch.rand(2, 3, 40, 40)
    for name, c in bench.contenders(model).items():
        encoded = c.encode(images)
        _, pruner = model.generate(
            encoded, ["what"] * 2, bench.Budget.none(), c.pruner, max_new_tokens=1
        )
        assert encoded.fused.tokens.shape[1] == c.layers[0], name
        if pruner is not None:
            assert {i: n.tolist() for i, n in pruner.counts.items()} == {
                i: [c.layers[i]] * 2 for i in (1, 3, 5)
            }
            assert sum(map(len, encoded.stage1_idx)) and sum(
                k.shape[1] for k in encoded.stage1_idx
            ) == round(256 * 1193 / 4096)


@torch.no_grad()
def test_the_kv_cache_is_counted_by_hand(model):
    for name, c in bench.contenders(model).items():
        result = bench.run(model, c, torch.rand(2, 3, 40, 40), new=3)
        text = (
            bench.TEXT + 2 + 2
        )  # <bos>, the question, <ans>, and two of the three new tokens went through the decoder
        head = TINY["llama"]["hidden_size"] // 8
        assert result["kv"] == sum(2 * 2 * 4 * head * 4 * (n + text) for n in c.layers), name
        assert result["prefill"] > 0 and result["decode"] > 0


def test_peak_memory_counts_what_is_held_at_a_time():
    def work():
        a = torch.zeros(1000, 256)  # 1,024,000 bytes
        del a
        b = torch.zeros(1000, 512)
        return (b + 1).sum()  # b and its copy: 4,096,000

    assert bench.peak(CPU, work) == pytest.approx(4_096_000, rel=0.01)


@torch.no_grad()
def test_the_stopwatch_charges_each_part_once_and_leaves_nothing_behind(model):
    places = [
        (stage1_encode, "encode_all"),
        (stage1_encode, "adapter"),
        (stage1_encode.Adapter, "embed"),
        (stage2_fuse, "fuse"),
        (AdaptivePruner, "__init__"),
        (AdaptivePruner, "_before_layer"),
    ]
    before = [vars(owner)[name] for owner, name in places]
    c, images = bench.contenders(model)["METEOR"], torch.rand(1, 3, 40, 40)
    with bench.stopwatch(CPU) as spent:
        wall = bench.seconds_of(lambda: bench.run(model, c, images, new=1), CPU)
    assert (
        set(spent) == {"encoders", "stage 1", "projectors", "stage 2", "stage 3", "LLM"}
        and min(spent.values()) > 0
    )
    assert (
        sum(spent.values()) <= wall
    )  # a part inside another is not counted twice: no assertion of a speed
    assert before == [vars(owner)[name] for owner, name in places]
    with pytest.raises(RuntimeError, match="inside"), bench.stopwatch(CPU):
        raise RuntimeError("inside")
    assert before == [vars(owner)[name] for owner, name in places]


@torch.no_grad()
def test_answers_under_the_stopwatch_are_the_same(model):
    c, images, questions = (
        bench.contenders(model)["METEOR"],
        torch.rand(2, 3, 40, 40),
        ["what what"] * 2,
    )
    ids = model.generate(
        c.encode(images), questions, bench.Budget.none(), c.pruner, max_new_tokens=4
    )[0]
    with bench.stopwatch(CPU):
        again = model.generate(
            c.encode(images), questions, bench.Budget.none(), c.pruner, max_new_tokens=4
        )[0]
    assert torch.equal(ids, again)


def test_turns_interleave_and_the_first_round_warms_up():
    calls = []
    work = {name: lambda name=name: calls.append(name) or {"s": len(calls)} for name in "ab"}
    assert bench.turns(work, 2, seconds=60) == {
        "a": [{"s": 3}, {"s": 5}],
        "b": [{"s": 4}, {"s": 6}],
    }
    assert calls == ["a", "b"] * 3
    calls.clear()
    assert bench.turns(work, 2, seconds=0) == {
        "a": [{"s": 3}],
        "b": [{"s": 4}],
    }  # no time: one round counts, never the cold one
    assert bench.turns(work, 1, seconds=0, warm=True) == {"a": [{"s": 5}], "b": [{"s": 6}]}


def test_the_pairwise_formula_is_stage_2s():
    torch.manual_seed(0)
    tokens = [torch.randn(2, n, 6) for n in (5, 7, 3)]
    for pairs, sums in zip(
        bench.pairwise_redundancy(tokens), stage2_fuse.mutual_redundancy(tokens)
    ):
        torch.testing.assert_close(pairs, sums)


def test_peers_keep_the_same_mean_of_tokens_and_the_model_stays_on_sdpa():
    rows = bench.peers("tiny", 256, "cpu", torch.float32, 1, 0)
    layers = [1, 3, 5]
    mine = average_tokens(256, [176, 76, 34], layers, 8)
    assert rows[0]["mean tokens"] == 256 and [r["method"] for r in rows[:2]] == [
        "unpruned",
        "stage 3",
    ]
    for row in rows[1:]:
        assert row["mean tokens"] == pytest.approx(mine, abs=2), row["method"]
    config = bench.build_decoder(TINY["llama"]).config
    flops = [
        bench.prefill_flops(config, layers, bench.TEXT)
        for layers in ([256] * 8, [256] + [176] * 2 + [76] * 2 + [34] * 3)
    ]
    assert (
        rows[1]["FLOPs ratio"] == pytest.approx(flops[0] / flops[1]) and rows[0]["FLOPs ratio"] == 1
    )
    memory = {row["method"]: row["peak memory, MiB"] for row in rows}
    assert memory["FastV, eager"] > 2 * memory["FastV, SDPA"]  # every layer writes H S S weights


def test_speed_ups_are_the_unpruned_time_over_the_rows(monkeypatch):
    taken = iter([4.0, 2.0, 1.0, 0.5, 0.25])
    monkeypatch.setattr(
        bench,
        "turns",
        lambda work, *args: {
            name: [once() | {key: t for key in ("prefill", "decode", "s")}]
            for (name, once), t in zip(work.items(), taken)
        },
    )
    unpruned, eagle, mine = bench.whole("tiny", 8, [1], "cpu", torch.float32, 1, 0)
    assert [r["speed-up"] for r in (unpruned, eagle, mine)] == [1, 2, 4]
    assert (
        mine["realised"] == pytest.approx(4 / mine["FLOPs ratio"])
        and mine["decode, ms a token"] == 1000
    )
    taken = iter([4.0, 2.0, 1.0, 0.5, 0.25])
    assert [r["speed-up"] for r in bench.peers("tiny", 256, "cpu", torch.float32, 1, 0)] == [
        1,
        2,
        4,
        8,
        16,
    ]


def test_what_does_not_fit_is_left_out_and_said(monkeypatch, capsys):
    def full(*args):
        raise torch.OutOfMemoryError("no")

    for name in ("whole", "split", "peers", "inside_a_vit", "growth", "overhead"):
        monkeypatch.setattr(
            bench, name, full if name == "whole" else lambda *args, name=name: [{"row of": name}]
        )
    seen = []
    bench.bench("tiny", "cpu", torch.float32, True, lambda tables: seen.append(list(tables)))
    assert seen[-1] == ["split", "peers", "inside_a_vit", "growth", "overhead"]
    assert "whole: a size does not fit" in capsys.readouterr().err


def test_numbers_are_shown_with_digits_that_count():
    grid = bench.as_grid(
        [{"a": 0.0123456, "b": 7, "c": 1234.5, "d": None, "e": 99.97, "f": 0.0}, {"a": "x"}]
    )
    assert grid.splitlines()[2:] == ["| 0.0123 | 7 | 1,234 |  | 100 | 0 |", "| x |  |  |  |  |  |"]


def test_every_table_has_its_rows_and_becomes_a_page(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    create = bench.timm.create_model
    small = dict(embed_dim=48, num_heads=4, depth=3)
    monkeypatch.setattr(bench.timm, "create_model", lambda name, **o: create(name, **o | small))
    tables = {
        "whole": bench.whole("tiny", 8, [1, 2], "cpu", torch.float32, 1, 0),
        "split": bench.split("tiny", 8, "cpu", torch.float32, 1),
        "peers": bench.peers("tiny", 256, "cpu", torch.float32, 1, 0),
        "inside_a_vit": bench.inside_a_vit(8, "cpu", torch.float32, 1, 0),
        "growth": bench.growth("tiny", [256, 1024], 256, "cpu", torch.float32),
        "overhead": bench.overhead("tiny", [8], "cpu", torch.float32),
        "kernels": bench.kernels("tiny", 8, "cpu", torch.float32, 1, 0),
    }
    assert tables.keys() == bench.NOTES.keys()
    whole = {(r["batch"], r["contender"]): r for r in tables["whole"]}
    assert (
        len(whole) == 6
        and whole[1, "unpruned"]["FLOPs ratio"] == whole[1, "unpruned"]["realised"] == 1
    )
    assert whole[1, "METEOR"]["FLOPs ratio"] > whole[1, "EAGLE-style"]["FLOPs ratio"] > 1
    assert whole[2, "METEOR"]["KV cache, MiB"] == 2 * whole[1, "METEOR"]["KV cache, MiB"]
    assert whole[1, "METEOR"]["peak memory, MiB"] < whole[1, "unpruned"]["peak memory, MiB"]
    assert {r["kernels"] for r in tables["kernels"]} >= {"fused", "plain"} and len(
        {r["contender"] for r in tables["kernels"]}
    ) == 2
    vit = {r["method"]: r for r in tables["inside_a_vit"]}
    assert (
        vit["stage 1"]["tokens out"]
        == vit["ToMe"]["tokens out"]
        < vit["unpruned"]["tokens out"]
        == 64
    )
    assert "by pairs, ms" in tables["growth"][0] and "by pairs, ms" not in tables["growth"][1]
    bench.write(tables, tmp_path / "results", "meteor-mini bench", 1.0, "cpu")
    text = (tmp_path / "results" / "benchmark.md").read_text()
    assert (
        all(note in text for note in bench.NOTES.values())
        and (tmp_path / "results" / "benchmark.png").stat().st_size > 10_000
    )


def test_the_command_writes_what_it_is_asked_to(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(
        bench, "bench", lambda *args: asked.append(args[:4]) or args[4]({"whole": [{"a": 1}]})
    )
    assert cli.main(["bench", "--quick", "--json", "rows.json"]) == 0
    assert asked == [("small", "cpu", torch.float32, True)] and json.loads(
        (tmp_path / "rows.json").read_text()
    ) == {"whole": [{"a": 1}]}
    assert not (tmp_path / "results").exists()
    assert cli.main(["bench", "--quick", "--device", "nowhere"]) == 2
    assert (
        "--device must be cpu, or cuda where torch finds a GPU, got nowhere"
        in capsys.readouterr().err
    )
    monkeypatch.undo()
    assert cli.main(["bench", "--quick", "--size", "huge"]) == 2
    assert "size must be one of" in capsys.readouterr().err
