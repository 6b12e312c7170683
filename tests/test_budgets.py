"""budgets.py: a budget from one wanted number, lambda from a table, and what calibration
measures.
"""

import pytest

from meteor_mini import Budget, load
from meteor_mini.budgets import budget_for, lambda_from_table, stage3_lambda
from meteor_mini.evaluate import accuracy


@pytest.fixture(scope="module")
def model():
    return load("toy")


def test_a_budget_for_n_tokens_is_in_the_proportions_of_the_models_own(model):
    assert (
        budget_for(model, 576) == Budget.none()
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
