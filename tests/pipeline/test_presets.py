"""What `friendrec presets` says of quality and cost is what README.md says, and every preset is there."""

import re
from pathlib import Path

import pytest

from friendrec.pipeline import presets
from friendrec.pipeline.config import PRESETS
from friendrec.pipeline.presets import TASKS, PresetsOptions, measured


def test_every_preset_is_listed_and_what_was_not_measured_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presets, "measured", lambda: [row for row in measured() if row["preset"] == "two_tower_mlp"])
    presets.main(PresetsOptions())
    parts = dict(re.findall(r"^(\w+)\n((?:.+\n| *\n(?=  ))*)", capsys.readouterr().out, re.MULTILINE))
    assert set(parts) == set(PRESETS)
    for name, text in parts.items():
        assert ("not measured" in text) == (name != "two_tower_mlp")
    for row in measured():
        if row["preset"] == "two_tower_mlp":
            assert f"{row['parameters']:,}" in parts["two_tower_mlp"]


def test_measurements_are_dated_reproducible_and_of_known_presets() -> None:
    for row in measured():
        assert row["preset"] in PRESETS
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"])
        assert row["preset"] in row["command"]
        assert set(row["recall@10"]) == set(row["best_heuristic"]) == set(TASKS)


def test_figures_are_those_of_the_readme(repository: Path) -> None:
    """A row of the table: log, candidates, then `.751 (.755)` a task."""
    readme = (repository / "README.md").read_text()
    rows = re.findall(r"^\| ([\w -]+): [^|]*\| ([\d,]+) \|(.*)\|$", readme, re.MULTILINE)
    told = {
        log: (int(candidates.replace(",", "")), [float(figure) for figure in re.findall(r"\.\d{3}", figures)])
        for log, candidates, figures in rows
    }
    kept = {
        row["log"]: (row["candidates"], [row[of][task] for task in TASKS for of in ("recall@10", "best_heuristic")])
        for row in measured()
        if row["preset"] == "two_tower_mlp"
    }
    assert len(kept) == 4
    assert kept == told
