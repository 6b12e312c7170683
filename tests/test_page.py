"""page.py: what it says of methods.csv and search.csv."""

import json

import pandas as pd
import pytest

from meteor_mini import page


def line(share, method, accuracy, speed_up, family="all", seed=0):
    against = "unpruned" if method == "METEOR" else "METEOR"
    numbers = {"tokens": 144 * share, "flops": 1e6, "accuracy": accuracy, "speed_up": speed_up}
    numbers |= {"rounds": 3, "least": speed_up - 0.5, "most": speed_up + 0.5}
    interval = {"low": accuracy - 5, "high": accuracy + 5}
    differences = dict.fromkeys(("difference", "difference_low", "difference_high"), -1.0)
    head = {"share": share, "method": method, "against": against, "seed": seed, "family": family}
    return head | {"questions": 24} | numbers | interval | differences


@pytest.fixture
def methods():
    """METEOR at two averages, FastV faster at both, random with two seeds."""
    lines = [line(4.0, "unpruned", 90.0, 1.0)]
    for share, speed_up, accuracy in ((0.6, 2.0, 80.0), (0.2, 4.0, 60.0)):
        lines.append(line(share, "METEOR", accuracy, speed_up))
        lines.append(line(share, "METEOR", accuracy - 20, speed_up, "hard"))
        lines.append(line(share, "FastV", 1.5 * accuracy - 30, speed_up + 1))
        lines += [line(share, "random", value, 5.0, seed=value) for value in (30, 40)]
    return pd.DataFrame(lines)


def test_at_equal_time_a_method_has_its_best_accuracy_of_those_that_are_as_fast(methods):
    table = page.at_equal_time(methods)
    assert table.columns.tolist() == ["60%, speed-up 2.00", "20%, speed-up 4.00"]
    assert table.loc["METEOR"].tolist() == [80.0, 60.0]
    assert table.loc["FastV"].tolist() == [90.0, 60.0]  # at 60 % it is three times as fast
    assert table.loc["unpruned"].isna().all()  # it is always slower


def test_the_page_is_written_from_the_csv_files_alone(methods, tmp_path):
    methods.to_csv(tmp_path / "methods.csv", index=False)
    fresh = methods[methods["share"] != 0.6].assign(accuracy=12.0, low=11.0, high=13.0)
    fresh.to_csv(tmp_path / "fresh_methods.csv", index=False)
    settings = [json.dumps({"enter": 1.5, "k": k}) for k in (3, 5, 9)]
    searched = {"method": "METEOR", "setting": settings, "accuracy": [50.0, 60.0, None]}
    searched = pd.DataFrame(searched).assign(questions=48, share=0.2, tokens=28.9)
    searched.to_csv(tmp_path / "search.csv", index=False)
    page.write(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "searched on 48 validation questions" in " ".join(text.split())
    accuracy, difference, tokens, kinds = (
        text.split(f"### {title}")[1].split("```")[1].splitlines()
        for title in ("Right answers", "Points above METEOR", "Visual tokens", "Kinds of question")
    )
    assert " ".join(accuracy[1].split()) == "60%, 86 tokens 20%, 29 tokens"

    def row_of(method, table):
        (row,) = [row for row in table if row.startswith(method)]
        return row.removeprefix(method)

    assert row_of("METEOR", accuracy).split("  ")[-2:] == ["80.0 [75.0, 85.0]", "60.0 [55.0, 65.0]"]
    assert "35.0 [30.0, 40.0]" in row_of("random (2 seeds)", accuracy)
    fresh = text.split("### Fresh questions")[1].split("```")[1].splitlines()
    assert row_of("FastV", fresh).strip() == "12.0 [11.0, 13.0]"
    assert row_of("METEOR", difference).count("-1.0 [-1.0, -1.0]") == 2
    assert row_of("METEOR", tokens).split() == ["86.4", "28.8"]
    hard = row_of("METEOR", kinds)  # at 20 %, where the settings were searched
    assert "40.0 [35.0, 45.0]" in hard and "4.00 [3.50, 4.50]" in hard
    settings = text.split("### Settings")[1].split("```")[1].splitlines()
    (setting,) = [row for row in settings if "METEOR" in row]
    assert "enter 1.5, k 5" in setting and "50.0 to 60.0" in setting and " 3 " in setting
    for name, (title, _) in page.METHODS_FIGURES.items():
        assert (tmp_path / f"methods_{name}.png").exists() and f"![{title}]" in text
