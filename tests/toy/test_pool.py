"""The training's pictures, its schedule, and that it goes on where it was stopped."""

import json

import numpy as np
import torch
from torch import nn

from meteor_mini.toy import pool, world


def test_a_drawn_pool_holds_the_pictures(tmp_path):
    pool.draw_pool(tmp_path, 3)
    drawn, facts = pool.Pool(tmp_path), pool.load_facts(tmp_path)
    assert len(drawn) == len(facts) == 3
    for i in range(3):
        picture = world.make_picture(i)
        assert np.array_equal(drawn.images[i], picture.image)
        assert np.array_equal(drawn.words[i], picture.patch_words)
        assert np.array_equal(drawn.clutter[i], picture.patch_clutter)
        assert facts[i].kind == picture.kind
        assert np.array_equal(facts[i].patch_words, picture.patch_words)
        as_lists = json.dumps([facts[i].facts, picture.facts])
        assert json.loads(as_lists)[0] == json.loads(as_lists)[1]


def test_the_schedule_warms_up_and_falls():
    rates = [pool.schedule(step, 1000) for step in range(1000)]
    assert rates[0] == 0.01 and rates[99] == 1.0 and abs(rates[999] - 0.02) < 1e-3
    assert all(a > b for a, b in zip(rates[100:], rates[101:]))
    held = [pool.schedule(step, 1000, hold=0.5) for step in range(1000)]
    assert held[99:501] == [1.0] * 402 and held[502] < 1.0


def test_a_stopped_training_goes_on_as_if_it_had_not_been(tmp_path):
    def start():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 1))
        muon = torch.optim.Muon(model[0].parameters())
        return model, [muon, torch.optim.AdamW(model[1].parameters())]

    def step(model, optimizers, number):
        torch.manual_seed(number)
        loss = model(torch.randn(8, 4)).square().mean()
        pool.update(optimizers, loss, rate=0.01, clip=1.0)

    model, optimizers = start()
    for number in range(4):
        step(model, optimizers, number)
        if number == 1:
            pool.save_state(tmp_path / "state", model.state_dict(), optimizers, 2)
    resumed, optimizers = start()
    assert pool.load_state(tmp_path / "state", resumed, optimizers) == 2
    for number in range(2, 4):
        step(resumed, optimizers, number)
    for one, other in zip(model.parameters(), resumed.parameters()):
        assert torch.equal(one, other)


def test_the_gradients_norm_is_clipped_over_all_optimizers():
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizers = [torch.optim.SGD([weight]) for weight in weights]
    pool.update(optimizers, 3 * weights[0].sum() + 4 * weights[1].sum(), rate=1.0, clip=1.0)
    assert torch.allclose(
        torch.cat([w.data for w in weights]), torch.tensor([-0.6, -0.8]), atol=1e-4
    )
