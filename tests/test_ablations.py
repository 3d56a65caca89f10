"""The ablations' definitions make runs that can start, and the verdict on the paper's order is what it says."""

import json
import sys
from pathlib import Path

import pytest

from maejax import build
from maejax import config as configs
from maejax.check import check
from maejax.overrides import override
from maejax.ranking import Row
from maejax.sweep import Point, State, expand

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def ablations():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import ablations

        yield ablations
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_every_table_is_a_grid_of_configs_that_can_be(ablations):
    assert sorted(ablations.TABLES) == sorted(f.stem for f in configs.recipes_folder().glob("ablations/*.py"))
    for table in ablations.TABLES:
        about = ablations.definition(table)
        finetunes = getattr(about, "VERB", "pretrain") == "finetune"
        for budget in ("cpu", "gpu"):
            b = ablations.BUDGETS[budget]
            base = configs.load(ablations.FINETUNE if finetunes else ablations.CIFAR)
            fixed = b.finetune if finetunes else b.pretrain
            base = override(base, {key: str(value) for key, value in fixed.items()})
            grid = {key: values.split(",") for key, values in ablations.grids(table, budget).items()}
            points = expand(grid, paired=True)
            assert len(points) == len(about.POINTS), table
            for point in points:
                if finetunes and budget == "cpu":  # --from gives the encoder its depth
                    point = point | {"model.depth": "6"}
                config = override(base, point)
                check(config)
                build.check_names(config)


def test_each_table_has_one_point_that_is_the_recipe_itself(ablations):
    """What is compared is one choice at a time: the default of the recipe is among the values, but for lengths."""
    for table in set(ablations.TABLES) - {"finetuned_blocks"}:
        base = override(
            configs.load(ablations.CIFAR), {k: str(v) for k, v in ablations.BUDGETS["cpu"].pretrain.items()}
        )
        grid = {key: values.split(",") for key, values in ablations.grids(table, "cpu").items()}
        found = [configs.differences(base, override(base, point)) for point in expand(grid, paired=True)]
        assert {} in found, table


def rows(folder: Path, values: list[float]) -> list[Row]:
    made = []
    for i, value in enumerate(values):
        run = folder / str(i)
        (run / "evals").mkdir(parents=True)
        (run / "evals/linear_9.json").write_text(json.dumps({"images": {"test": 5000}}))
        point = Point(
            name=str(i), workdir=run, settings={}, seed=0, steps=9, evals=("linear",), computes={}, arguments=()
        )
        made.append(Row(settings={}, points=(point,), states=(State(kind="done"),), values={"linear_top1": [value]}))
    return made


def test_the_verdict_counts_pairs_and_does_not_hide_any(ablations, tmp_path):
    paper, ours = [65.5, 70.0, 73.5], [0.40, 0.45, 0.50]
    text = ablations.order(paper, ours, rows(tmp_path / "a", ours), "linear_top1")
    assert text.startswith("**The paper's ordering holds** at this scale (linear_top1): 3 of 3 pairs")
    assert "standard error of 0.7 points" in text and "3 of the pairs differ" in text and ", 0 of them against" in text
    ours = [0.50, 0.45, 0.455]
    text = ablations.order(paper, ours, rows(tmp_path / "b", ours), "linear_top1")
    assert "does not hold in full** at this scale (linear_top1): 1 of 3 pairs" in text and "another one" in text
    assert "2 of the pairs differ by more than twice that of a difference, 2 of them against the paper" in text
    assert "nothing is said" in ablations.order(
        paper, [0.4, None, 0.5], rows(tmp_path / "c", [0.4, 0.5]), "linear_top1"
    )
