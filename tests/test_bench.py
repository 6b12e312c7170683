"""What `meteor-mini bench` compares, on models of the same classes at small widths: the counts and
FLOPs of the contenders, by hand. No test asserts a time.
"""

from functools import partial

import pandas
import pytest
import timm
import torch

from meteor_mini import Budget, bench
from meteor_mini.bench import count_by_layer, llm_contenders, whole_contenders

L, D, MLP, HEADS, KV_HEADS = 8, 32, 64, 8, 4
TINY = {
    "patch": 14,
    "clip": {"width": 32, "layers": 3, "heads": 4},
    "convnext": "convnext_atto",
    "eva": "eva02_tiny_patch14_224",
    "pix2struct": {"hidden_size": 64, "num_hidden_layers": 3, "d_ff": 48},
    "llama": bench.llama(D, L, HEADS, KV_HEADS, MLP, 99),
}
TEXT = 3 + 32 + 2  # <s> USER :, the question, ASSISTANT :
IMAGES = torch.rand(2, 3, 40, 40)


@pytest.fixture(scope="module")
def model():
    """Four encoders of 8 x 8 patches: 256 visual tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench.SIZES, "tiny", TINY)
        torch.manual_seed(0)
        return bench.build_model("tiny", 8)


def mean(numbers):
    return sum(numbers) / len(numbers)


def llama_flops(layers):
    """Two a multiplication and addition; queries and output D x D, keys and values D x D / 2."""
    total = 0
    for visual in layers:
        n = visual + TEXT
        projections = n * (2 * D * D + 2 * D * D * KV_HEADS // HEADS)
        total += 2 * (projections + 2 * n * n * D + 3 * n * D * MLP)
    return total


def test_counts_are_the_papers_in_proportion(model):
    assert [view.num_tokens for view in model.views.values()] == [64] * 4
    layers = {name: c.layers for name, c in whole_contenders(model).items()}
    assert layers == {
        "unpruned": [256] * L,
        "EAGLE-style": [64] * L,
        "METEOR": [36, 25, 25, 11, 11, 5, 5, 5],  # 576, 396, 170 and 76 of 4096, of 256
        "METEOR, keeps nearly all": [4 * 61 - 1] * L,
    }
    assert [bench.scale_count(k, 4096) for k in (1193, 576, 396)] == [1193, 576, 396]
    assert count_by_layer(9, {2: 5, 3: 4}, 5) == [9, 9, 5, 4, 4]


@torch.no_grad()
@pytest.mark.parametrize("contenders", [whole_contenders, partial(llm_contenders, images=IMAGES)])
def test_every_contender_has_the_tokens_that_its_row_says(model, contenders):
    for name, c in contenders(model).items():
        encoded = c.encode(IMAGES)
        assert encoded.fused.tokens.shape[1] == c.layers[0], name
        questions = [bench.QUESTION] * 2
        _, pruner = model.generate(
            encoded, questions, Budget.keep_all(), c.pruner, max_new_tokens=1
        )
        for layer, count in (pruner.counts if pruner else {}).items():
            assert count.tolist() == [c.layers[layer]] * 2, name
        figures = bench.time_answer(model, c, IMAGES)
        slots = sum(n + TEXT + bench.NEW - 1 for n in c.layers)  # the last new token has none
        keys = 2 * KV_HEADS * (D // HEADS) * slots  # of 2 pictures
        assert figures["kv_mib"] == 2 * 4 * keys / 2**20, name  # and values, float32


def test_peers_have_equal_means_and_flops_by_hand(model):
    peers = llm_contenders(model, IMAGES[:1])
    layers = {name: c.layers for name, c in peers.items()}
    assert layers["stage 3"] == [256, 176, 176, 76, 76, 34, 34, 34]  # 396, 170, 76 of 576
    wanted = mean(layers["stage 3"])  # 107.75
    assert layers["FastV"] == layers["FastV, eager"] == [256] * 2 + [58] * 6
    assert mean(layers["FastV"]) == pytest.approx(wanted, abs=0.5)
    assert mean(layers["PyramidDrop"]) == pytest.approx(wanted, abs=0.5)
    assert layers["unpruned"] == layers["stage 3, keeps all"] == [256] * L
    for name, c in peers.items():
        assert bench.count_flops(model, c, IMAGES[:1]) == llama_flops(c.layers), name


@torch.no_grad()
def test_stage_3_that_keeps_all_answers_as_unpruned(model):
    peers = llm_contenders(model, IMAGES)
    answers = []
    for name in ("unpruned", "stage 3, keeps all"):
        c = peers[name]
        ids, _ = model.generate(c.encode(IMAGES), ["what"] * 2, Budget.keep_all(), c.pruner)
        answers.append(ids)
    assert torch.equal(*answers)


def test_ratios_are_those_of_one_round(monkeypatch):
    times = {"unpruned": iter([90, 4, 6, 9, 8]), "a": iter([90, 1, 3, 1, 2])}  # the first warms up
    calls = []

    def once(name):
        calls.append(name)
        return {"ms": next(times[name])}

    work = {name: partial(once, name) for name in ("unpruned", "a")}
    rows = bench.compare(work, {"unpruned": 10, "a": 2}, seconds=60)
    rounds = list(zip(calls[::2], calls[1::2]))
    assert len(rounds) == 4 and {frozenset(names) for names in rounds} == {frozenset(work)}
    assert len(set(rounds)) == 2 and list(rows.index) == list(work)  # not always in one order
    row = rows.loc["a"]
    assert (row.ms, row.speed_up, row.least, row.most, row.rounds) == (1, 4, 2, 9, 3)
    assert (row.flops_ratio, row.realised) == (5, 0.8)
    row = bench.compare(work, {"unpruned": 10, "a": 2}, seconds=0).loc["a"]
    assert (row.speed_up, row.rounds) == (4, 1)  # the first counts where it is alone


@pytest.fixture
def tiny_run(monkeypatch):
    def narrow_vit(n):
        options = {"embed_dim": 48, "num_heads": 4, "depth": 3, "img_size": 16 * n}
        name = "vit_base_patch16_siglip_256"
        return timm.create_model(name, num_classes=0, global_pool="", **options).eval()

    monkeypatch.setitem(bench.SIZES, "tiny", TINY)
    monkeypatch.setattr(bench, "SIDES", (8,))
    monkeypatch.setattr(bench, "BATCHES", (1,))
    monkeypatch.setattr(bench, "ROUNDS", 0)  # the first alone
    monkeypatch.setattr(bench, "NEW", 2)
    monkeypatch.setattr(bench, "build_vit", narrow_vit)
    return partial(bench.run, "tiny", "cpu", torch.float32)


def test_a_quick_run_prints_and_writes_nothing(tiny_run, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "counted_flops", lambda work: 1)  # it is slow
    tiny_run(quick=True, folder=None)
    assert "PyramidDrop" in capsys.readouterr().out and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="size must be one of small"):
        bench.run("huge", "cpu", torch.float32, True, None)


def test_a_full_run_writes_a_row_for_each_contender(tiny_run, model, tmp_path):
    tiny_run(quick=False, folder=tmp_path)
    frame = pandas.read_csv(tmp_path / "benchmark.csv")
    methods = frame.groupby(["table", "batch"])["method"].apply(list).to_dict()
    assert methods == {
        ("whole", 1): list(whole_contenders(model)),
        ("peers", 1): list(llm_contenders(model, IMAGES[:1])),
        ("inside_a_vit", 1): ["unpruned", "stage 1", "ToMe", "ToMe, eager"],
    }
    vit = frame[frame["table"] == "inside_a_vit"].set_index("method")
    assert vit["tokens_out"].to_dict() == {
        "unpruned": 64,
        "stage 1": 19,  # 64 - 3 x 15
        "ToMe": 19,
        "ToMe, eager": 19,
    }
    assert vit.loc["stage 1", "mean_tokens"] == pytest.approx((64 + 43 + 28) / 3, abs=0.1)
    assert vit.loc["ToMe", "mean_tokens"] == mean([64, 49, 34])
    assert frame.loc[frame["method"] == "METEOR", "flops_ratio"].min() > 1
    assert all(title in (tmp_path / "benchmark.md").read_text() for title in bench.TITLES.values())
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000
