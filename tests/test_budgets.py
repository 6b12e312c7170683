"""budgets.py: a budget from one wanted number, lambda from a table, and what calibration
measures.
"""

from dataclasses import replace

import pytest
import torch

from meteor_mini import Budget, load
from meteor_mini.budgets import budget_for, lambda_from_table, measure_lambda, stage3_lambda
from meteor_mini.evaluate import accuracy
from meteor_mini.toy.questions import example_batches, images_and_questions
from stage3_decode import AdaptivePruner


@pytest.fixture(scope="module")
def model():
    return load("toy")


def test_a_budget_for_n_tokens_is_in_the_proportions_of_the_models_own(model):
    assert (
        budget_for(model, 576) == Budget.keep_all()
        and budget_for(model, model.budget.stage3) == model.budget
    )
    for tokens in (8, 20, 34, 60, 100):
        budget = budget_for(model, tokens)
        if tokens != model.budget.stage3:
            assert budget.stage3 == tokens and budget.stage2 == round(tokens * 576 / 242)
            assert budget.stage1 == round(budget.stage2 * model.budget.stage1 / model.budget.stage2)
        assert stage3_lambda(model.config, budget, budget.stage2 or 576) > 0
    for tokens in (0, -3, 577, 10**9):
        with pytest.raises(ValueError, match=f"tokens must be 4 to 576.*got {tokens}"):
            budget_for(model, tokens)


def test_average_tokens_come_near_the_ones_asked_for(model):
    """lambda is solved on calibration questions; on others the mean is near, which 36 questions
    show roughly.
    """
    for tokens in (20, 34):
        got = accuracy(model, budget_for(model, tokens), "val", samples=36)["average_tokens"]
        assert abs(got - tokens) <= 0.15 * tokens


def test_lambda_is_read_off_the_table_linearly():
    table = {"K": [10, 20], "lam": [0.0, 1.0, 2.0], "average": [[1.0, 5.0, 9.0], [2.0, 10.0, 18.0]]}
    assert lambda_from_table(table, 10, 3.0) == pytest.approx(0.5)
    assert lambda_from_table(table, 15, 7.5) == pytest.approx(1.0)
    assert lambda_from_table(table, 20, 18.0) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="stage3 must be 1.0 to 9.0 tokens"):
        lambda_from_table(table, 10, 9.5)
    with pytest.raises(ValueError, match="stage2 must leave 10 to 20 tokens"):
        lambda_from_table(table, 30, 5.0)
    with pytest.raises(ValueError, match="calibrated"):
        lambda_from_table(None, 10, 5.0)


def test_a_curve_that_dips_is_inverted_all_the_same():
    table = {"K": [10], "lam": [0.0, 1.0, 2.0, 3.0], "average": [[1.0, 5.0, 4.0, 9.0]]}
    assert lambda_from_table(table, 10, 9.0) == pytest.approx(3.0)
    assert lambda_from_table(table, 10, 7.0) == pytest.approx(2.5)


def test_lambda_is_measured_with_the_budgets_heads_and_layers(untrained, monkeypatch):
    images, questions = images_and_questions(next(example_batches("val", 2)))
    own = untrained.config["budget"]
    monkeypatch.setitem(untrained.config, "budget", own | {"k": 1, "layers": [2]})
    table = measure_lambda(untrained, images, questions, [80], [20.0])
    encoded = untrained.encode(images, Budget(stage1=168, stage2=80))
    embeds, mask, visual = untrained.prompt(encoded, questions)
    with AdaptivePruner(untrained.decoder, visual, 20.0, [2], 1) as pruner, torch.no_grad():
        untrained.decoder.model(inputs_embeds=embeds, attention_mask=mask)
    average = pruner.average_tokens().mean().item()
    assert table["average"][0][0] == pytest.approx(average, abs=1e-3)
    assert (table["k"], table["layers"]) == (1, [2])


def test_a_budget_of_other_heads_or_layers_than_lambdas_is_refused(model):
    plain = Budget(stage1=320, stage2=145, stage3=48)  # k = 5, where the toy has 6
    with pytest.raises(ValueError, match="lambda was measured with {'k': 6, 'layers': .2, 6.}"):
        stage3_lambda(model.config, plain, 145)
    assert stage3_lambda(model.config, replace(model.budget, stage3=40), 145) > 0
