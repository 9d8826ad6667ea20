"""`friendrec prepare`: what is published, what is said, and that a mistake publishes nothing."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from friendrec.datasets.prepared import load_prepared
from friendrec.errors import FriendrecError
from friendrec.pipeline import prepare
from friendrec.pipeline.prepare import PrepareOptions, corrected_command
from friendrec.pipeline.publish import open_published, publish

DAY = 86_400_000_000


@dataclass(frozen=True)
class SimulateOptions:
    seed: int = 0


def events(rows: int = 100) -> pa.Table:
    return pa.table(
        {
            "actor_id": np.arange(rows) % 7,
            "target_id": np.arange(rows) % 7 + 1,
            "action": ["message"] * rows,
            "timestamp": pa.array(np.arange(rows) * DAY, pa.timestamp("us", tz="UTC")),
        }
    )


@pytest.fixture
def log(tmp_path: Path) -> Path:
    pq.write_table(events(), tmp_path / "log.parquet")
    return tmp_path / "log.parquet"


def options(log: Path, **changes: Any) -> PrepareOptions:
    return PrepareOptions(interactions=str(log), out=str(log.parent / "data"), **changes)


def test_publishes_a_data_set_with_lineage(log: Path) -> None:
    prepare.main(options(log))
    directory, manifest = open_published(log.parent / "data", kind="data", verify=True)
    assert manifest.inputs["interactions"]["path"] == str(log)
    assert manifest.options["chunk_length"] == 256
    assert manifest.extra["cleaning"]["rows"] == 100
    assert load_prepared(directory).num_events == 100
    assert {path.name for path in directory.iterdir()} == {
        "actions.json",
        "arrays",
        "exclusions",
        "manifest.json",
        "rejected",
        "sequences",
        "splits.json",
        "statistics",
        "vocabulary",
    }
    assert {path.name for path in log.parent.iterdir()} == {"log.parquet", "data"}


def test_repeating_does_nothing(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare.main(options(log))
    before = (log.parent / "data/manifest.json").stat().st_mtime_ns
    capsys.readouterr()
    prepare.main(options(log))
    assert "up to date" in " ".join(capsys.readouterr().out.split())
    assert (log.parent / "data/manifest.json").stat().st_mtime_ns == before
    with pytest.raises(FriendrecError, match="already holds a prepared data set: choose another --out"):
        prepare.main(options(log, chunk_length=64))


def test_the_closing_table_counts_by_kind(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = events()
    loops = table.slice(0, 3).set_column(1, "target_id", table["actor_id"].slice(0, 3))
    late = events(1).set_column(3, "timestamp", pa.array([2**61], pa.timestamp("us", tz="UTC")))
    blocks = table.slice(0, 2).set_column(2, "action", pa.array(["block"] * 2))
    pq.write_table(pa.concat_tables([table, loops, late, blocks, table.slice(0, 5)]), log)
    prepare.main(options(log, roles="block=exclude"))
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for line in (
        "in the log 111",
        "rejected 1 timestamp in the future 1",
        "self-loops 3",
        "exact duplicates 5",
        "exclusions 2",
        "events 100",
        "train, until 1970-03-22 00:00 80",
        "validation, until 1970-04-01 00:00 10",
        "test 10",
        "block (exclude)",
    ):
        assert line in printed
    cleaning = json.loads((log.parent / "data/statistics/cleaning.json").read_text())
    parts = ("rejected", "deselected", "self_loops", "duplicates", "exclusions", "events")
    assert cleaning["rows"] == sum(cleaning[part] for part in parts) == 111


def test_a_simulated_log_brings_its_users(tmp_path: Path) -> None:
    with publish(tmp_path / "log", kind="log", options=SimulateOptions(), inputs={}) as attempt:
        for name, table in (
            ("interactions", events()),
            ("users", pa.table({"user_id": np.arange(9), "country": ["SE"] * 9})),
        ):
            (attempt / name).mkdir()
            pq.write_table(table, attempt / name / "part-0.parquet")
    prepare.main(options(tmp_path / "log"))
    data = load_prepared(tmp_path / "data")
    assert data.num_events == 100
    assert data.array("profile_country_values").tolist() == [1] * data.num_users

    other = tmp_path / "users.parquet"
    pq.write_table(pa.table({"user_id": np.arange(9), "town": ["Umeå"] * 9}), other)
    named = PrepareOptions(interactions=str(tmp_path / "log"), users=str(other), out=str(tmp_path / "named"))
    prepare.main(named)
    assert {path.name for path in (tmp_path / "named/profiles").iterdir()} == {"town.parquet"}
    assert set(open_published(tmp_path / "named")[1].inputs) == {"interactions", "users"}


def test_another_kind_of_directory_is_no_log(log: Path) -> None:
    prepare.main(options(log))
    mistaken = PrepareOptions(interactions=str(log.parent / "data"), out=str(log.parent / "again"))
    with pytest.raises(FriendrecError, match="is a prepared data set, expected a log"):
        prepare.main(mistaken)


def test_mistakes_show_the_command_that_mends_them_and_publish_nothing(log: Path) -> None:
    table = events().rename_columns(["src", "dst", "action", "timestamp"])
    epochs = pa.array(np.arange(100) + 1_700_000_000)
    pq.write_table(table.set_column(3, "timestamp", epochs), log)
    start = f"friendrec prepare --interactions {log} "
    end = f"--out {log.parent / 'data'}"

    def refused(**changes: Any) -> str:
        with pytest.raises(FriendrecError) as error:
            prepare.main(options(log, **changes))
        assert {path.name for path in log.parent.iterdir()} == {"log.parquet"}
        assert "\n" not in str(error.value)
        return str(error.value)

    columns = "actor_id=src,target_id=dst"
    assert refused(chunk_length=64).endswith(f"run {start}--columns {columns} --chunk-length 64 {end}")
    assert refused(columns=columns).endswith(f"run {start}--columns {columns} --time-unit s {end}")
    message = refused(columns=columns, time_unit="ns", splits="1,0,0", actions="mail")
    assert message.endswith("--actions names the action mail, the log has message: correct --actions")
    broken = table.set_column(0, "src", pa.array([None, None] + [1] * 98, pa.int64()))
    pq.write_table(broken, log)
    assert refused(columns=columns) == (
        "2 of 100 rows are malformed (no actor_id: 2); mend the log or allow them: "
        f"run {start}--columns {columns} --max-reject 0.02 {end}"
    )
    prepare.main(options(log, columns=columns, max_reject=0.02))


def test_too_little_memory_is_said(log: Path) -> None:
    with pytest.raises(FriendrecError, match=r"--memory-limit 1MB is too little for this log: pass more"):
        prepare.main(options(log, memory_limit="1MB"))
    assert {path.name for path in log.parent.iterdir()} == {"log.parquet"}


def test_corrected_command_quotes_and_leaves_defaults_out() -> None:
    spaced = PrepareOptions(interactions="my log", out="data", actions="a,b", splits="0.8,0.1,0.1")
    assert corrected_command(spaced) == "friendrec prepare --interactions 'my log' --actions a,b --out data"


def test_help_needs_no_engine() -> None:
    code = "import sys, friendrec.pipeline.prepare; print({'ibis', 'torch', 'pyarrow'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"
