"""The preparation program against a plain twin, and what it promises: one order, one layout, one set of bytes."""

import hashlib
import json
import tempfile
from collections import Counter, defaultdict
from datetime import UTC, date, datetime, timedelta
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from friendrec.datasets import cleaning, layout
from friendrec.datasets.engine import connect, stream
from friendrec.datasets.preparation import Summary, prepare
from friendrec.datasets.preparation_config import PreparationConfig
from friendrec.datasets.prepared import load_prepared
from friendrec.datasets.profiles import open_users
from friendrec.datasets.schema import open_log
from friendrec.errors import FriendrecError

Row = tuple[Any, Any, Any, Any]
DAY = 86_400_000_000
ROLES = ("target", "history", "negative", "exclude")


def write_log(path: Path, rows: list[Row], ids: pa.DataType) -> Path:
    """Rows of (actor, target, action, microseconds)."""
    types = {"actor_id": ids, "target_id": ids, "action": pa.string(), "timestamp": pa.timestamp("us", tz="UTC")}
    columns = list(zip(*rows, strict=True))
    arrays = [pa.array(list(column), kind) for column, kind in zip(columns, types.values(), strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(arrays, names=list(types)), path)
    return path


def run(log: Path, out: Path, users: Path | None = None, **options: Any) -> Summary:
    config = PreparationConfig(**options)
    opened = open_log(str(log), config.column_of, config.time_unit)
    table = open_users(str(users), config.column_of, opened.id_type) if users else None
    out.mkdir()
    with tempfile.TemporaryDirectory() as tables:
        engine = connect(Path(tables), config.memory_limit)
        try:
            return prepare(engine, opened, table, config, out, lambda step, share: None)
        finally:
            engine.disconnect()


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def digests(directory: Path) -> dict[str, str]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def twin(rows: list[Row], roles: dict[str, str], selected: list[str], config: PreparationConfig) -> dict[str, Any]:
    """The whole preparation as design.md words it, with lists and dictionaries; None where nothing can be prepared."""
    bad, valid = [], []
    for row in rows:
        blanks = [f"no {name}" for name, value in zip(("actor_id", "target_id", "action"), row[:3], strict=True)
                  if value is None or value == ""]  # fmt: skip
        reason = blanks[0] if blanks else "no timestamp" if row[3] is None else None
        if reason is None and row[3] < 0:
            reason = "timestamp before 1970"
        if reason is None and row[3] > datetime.now(UTC).timestamp() * 1e6 + DAY:
            reason = "timestamp in the future"
        bad.append((row, reason)) if reason else valid.append(row)
    chosen = set(selected or {row[2] for row in valid})
    accepted = [row for row in valid if row[2] in chosen and row[0] != row[1]]
    kept_actions = sorted(action for action in chosen if roles.get(action, "target") != "exclude")
    distinct = set(accepted)
    events = sorted((t, u, v, a) for u, v, a, t in distinct if a in kept_actions)
    blocked = [(t, u, v) for u, v, a, t in distinct if a not in kept_actions]
    first: dict[Any, int] = {}
    for t, u, v, _ in events:
        first.setdefault(u, t)
        first.setdefault(v, t)
    users = sorted(first, key=lambda user: (first[user], user))
    row_of = {user: row for row, user in enumerate(users)}
    bounds = [int(share * len(events)) for share in config.boundaries]
    times = [events[k][0] if k < len(events) else events[-1][0] + 1 for k in bounds] if events else [0, 0]
    train = [event for event in events if event[0] < times[0]]
    sequences = defaultdict(list)
    for t, u, v, a in events:
        code = kept_actions.index(a)
        sequences[row_of[u]].append((row_of[v], code, 0, t))
        sequences[row_of[v]].append((row_of[u], code, 1, t))
    return {
        "users": [(user, first[user]) for user in users],
        "events": events,
        "sequences": [sequences[row] for row in range(len(users))],
        "actions": [(action, roles.get(action, "target")) for action in kept_actions],
        "splits": {
            "train_until": times[0],
            "validation_until": times[1],
            "num_train_events": len(train),
            "num_validation_events": sum(times[0] <= event[0] < times[1] for event in events),
            "num_train_users": sum(time < times[0] for time in first.values()),
        },
        "rejected": Counter((*row, reason) for row, reason in bad),
        "exclusions": sorted((t, row_of[u], row_of[v]) for t, u, v in blocked if u in row_of and v in row_of),
        "cleaning": {
            "rows": len(rows),
            "rejected": len(bad),
            "rejected_by_reason": dict(Counter(reason for _, reason in bad)),
            "deselected": sum(row[2] not in chosen for row in valid),
            "self_loops": sum(row[2] in chosen and row[0] == row[1] for row in valid),
            "duplicates": len(accepted) - len(distinct),
            "exclusions": len(blocked),
            "exclusions_of_unknown_users": sum(u not in row_of or v not in row_of for _, u, v in blocked),
            "events": len(events),
        },
        "sent": Counter(row_of[u] for _, u, _, _ in train),
        "received": Counter(row_of[v] for _, _, v, _ in train),
        "per_action": Counter(kept_actions.index(a) for _, _, _, a in train),
        "per_day": Counter(date(1970, 1, 1) + timedelta(days=t // DAY) for t, _, _, _ in train),
    }


def chunks_of(sequence: list[Any], config: PreparationConfig) -> list[tuple[int, int, list[Any]]]:
    """(chunk, context, entries) of one user."""
    cuts = range(0, len(sequence), config.chunk_length)
    starts = [max(cut - config.context_length, 0) for cut in cuts]
    return [
        (k, cut - start, sequence[start : cut + config.chunk_length])
        for k, (cut, start) in enumerate(zip(cuts, starts, strict=True))
    ]


@st.composite
def logs(draw: st.DrawFn) -> tuple[list[Row], pa.DataType]:
    """Few users and few times, so that ties, duplicates and self-loops are many; every tenth row is malformed."""
    users: Any
    users, kind = draw(
        st.sampled_from([((3, 10, 9, -2, 2**62), pa.int64()), (("b", "B", "é", "10", "9", "😀"), pa.string())])
    )
    action = st.sampled_from(["message", "block", "like"])
    time = st.integers(0, 3).map(lambda k: k * DAY // 2) | st.integers(10**15, 10**15 + 3)
    row = st.tuples(st.sampled_from(users), st.sampled_from(users), action, time)
    size = draw(st.integers(1, 60))
    rows = draw(st.lists(row, min_size=size, max_size=size))
    empty = (None, "") if kind == pa.string() else (None,)
    for place in range(0, len(rows), 10):
        spoilt: list[Any] = list(rows[place])
        field = draw(st.integers(0, 3))
        spoilt[field] = draw(
            st.sampled_from([*empty, None] if field < 2 else [None] if field == 2 else [None, -1, 2**62])
        )
        rows.append(tuple(spoilt))  # type: ignore[arg-type]
    return draw(st.permutations(rows)), kind


@given(
    log=logs(),
    roles=st.dictionaries(st.sampled_from(["message", "block"]), st.sampled_from(ROLES)),
    select=st.booleans(),
    splits=st.sampled_from(["0.8,0.1,0.1", "0.5,0.25,0.25", "1,0,0", "1/3,1/3,1/3"]),
    chunk_length=st.integers(1, 5),
    context_length=st.integers(0, 12),
    buckets=st.none() | st.integers(1, 3),
)
@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])  # shrinking takes minutes
def test_agrees_with_a_plain_twin(
    log: tuple[list[Row], pa.DataType],
    roles: dict[str, str],
    select: bool,
    splits: str,
    chunk_length: int,
    context_length: int,
    buckets: int | None,
) -> None:
    rows, ids = log
    found = {row[2] for row in rows if row[2] and row[0] not in (None, "") and row[1] not in (None, "")
             and row[3] is not None and 0 <= row[3] < 2**60}  # fmt: skip
    selected = sorted(found & {"message", "block"}) if select else []
    roles = {action: role for action, role in roles.items() if action in (selected or found)}
    options: dict[str, Any] = {
        "actions": ",".join(selected) or None,
        "roles": ",".join(f"{action}={role}" for action, role in roles.items()) or None,
        "splits": splits,
        "chunk_length": chunk_length,
        "context_length": context_length,
        "buckets": buckets,
        "max_reject": 1,
    }
    config = PreparationConfig(**options)
    expected = twin(rows, roles, selected, config)
    with tempfile.TemporaryDirectory() as folder:
        path, out = write_log(Path(folder) / "log.parquet", rows, ids), Path(folder) / "data"
        if not expected["splits"]["num_train_events"] or "target" not in {role for _, role in expected["actions"]}:
            with pytest.raises(FriendrecError):
                run(path, out, **options)
            return
        run(path, out, **options)
        assert_equal(out, expected, config)


def assert_equal(out: Path, expected: dict[str, Any], config: PreparationConfig) -> None:
    """Every file of a prepared directory says what the twin says."""
    vocabulary = rows_of(out / "vocabulary")
    assert [(user["user_id"], user["first_timestamp"]) for user in vocabulary] == expected["users"]
    assert [user["row"] for user in vocabulary] == list(range(len(vocabulary)))

    splits = json.loads((out / "splits.json").read_text())
    lengths = {"context_length": config.context_length, "chunk_length": config.chunk_length}
    assert splits == expected["splits"] | lengths
    assert json.loads((out / "statistics/cleaning.json").read_text()) == expected["cleaning"]
    actions = json.loads((out / "actions.json").read_text())
    assert [(action["name"], action["role"]) for action in actions] == expected["actions"]

    sequences = {}
    for bucket in range(config.buckets or 1):
        for row in rows_of(out / f"sequences/bucket={bucket}/part-0.parquet"):
            assert row["user"] % (config.buckets or 1) == bucket
            lists = zip(row["partner"], row["action"], row["direction"], row["timestamp"], strict=True)
            sequences[row["user"], row["chunk"]] = (row["chunk"], row["context"], list(lists))
    wanted = {
        (user, chunk[0]): chunk
        for user, sequence in enumerate(expected["sequences"])
        for chunk in chunks_of(sequence, config)
    }
    assert sequences == wanted

    data = load_prepared(out)
    entries = [entry for sequence in expected["sequences"] for entry in sequence]
    flat = zip(data.partner, data.action, data.direction, data.timestamp, strict=True)
    assert [tuple(map(int, entry)) for entry in flat] == entries
    row_of = {user: row for row, (user, _) in enumerate(expected["users"])}
    actors = np.searchsorted(data.offsets, data.event_entry, side="right") - 1
    assert actors.tolist() == [row_of[actor] for _, actor, _, _ in expected["events"]]
    assert data.partner[data.event_entry].tolist() == [row_of[target] for _, _, target, _ in expected["events"]]

    exclusions = [(row["timestamp"], row["actor"], row["target"]) for row in rows_of(out / "exclusions")]
    assert exclusions == expected["exclusions"]
    statistics = rows_of(out / "statistics/users")
    assert {row["row"]: row["sent"] for row in statistics if row["sent"]} == expected["sent"]
    assert {row["row"]: row["received"] for row in statistics if row["received"]} == expected["received"]
    assert {row["action"]: row["events"] for row in rows_of(out / "statistics/actions")} == expected["per_action"]
    assert {row["day"]: row["events"] for row in rows_of(out / "statistics/days")} == expected["per_day"]
    kept = Counter(row["reason"] for row in rows_of(out / "rejected"))
    assert kept == expected["cleaning"]["rejected_by_reason"]


def random_log(rows: int, seed: int, users: int = 500) -> pa.Table:
    """Times with many ties; ids are strings; some self-loops, duplicates and malformed rows."""
    random = np.random.default_rng(seed)
    ids = [random.integers(0, users, rows).astype(str) for _ in range(2)]
    blank = random.random(rows) < 0.002
    time = random.integers(0, rows // 4, rows) * 500_000_000
    action = random.choice(["accept", "block", "message"], rows)
    log = pa.table(
        {
            "actor_id": pa.array(ids[0], mask=blank),
            "target_id": ids[1],
            "action": action,
            "timestamp": pa.array(time, pa.timestamp("us", tz="UTC")),
        }
    )
    return pa.concat_tables([log, log.slice(0, rows // 50)])


@pytest.mark.parametrize("rows", [20_000, pytest.param(200_000, marks=pytest.mark.long)])
def test_bytes_depend_on_neither_row_order_nor_file_split_nor_memory(tmp_path: Path, rows: int) -> None:
    log = random_log(rows, seed=1)
    shuffled = log.take(np.random.default_rng(2).permutation(len(log)))
    pq.write_table(log, tmp_path / "log.parquet")
    options: dict[str, Any] = {"roles": "block=exclude", "buckets": 2, "chunk_length": 64}
    run(tmp_path / "log.parquet", tmp_path / "whole", **options)

    split = tmp_path / "split"
    cuts = [0, 10, rows // 3, rows // 3 + 1, len(log)]
    for part, (start, stop) in enumerate(pairwise(cuts)):
        (split / f"day={part % 2}").mkdir(parents=True, exist_ok=True)
        pq.write_table(shuffled.slice(start, stop - start), split / f"day={part % 2}" / f"{part}.parquet")
    run(split, tmp_path / "parts", memory_limit="100MB", **options)
    assert digests(tmp_path / "whole") == digests(tmp_path / "parts")

    changed = log.set_column(2, "action", pa.array(["message"] * len(log)))  # that the digests see a difference
    pq.write_table(changed, tmp_path / "changed.parquet")
    run(tmp_path / "changed.parquet", tmp_path / "other", buckets=2, chunk_length=64)
    same = digests(tmp_path / "whole").items() & digests(tmp_path / "other").items()
    assert {name for name, _ in same}.isdisjoint({"arrays/partner.npy", "sequences/bucket=0/part-0.parquet"})


def test_each_event_is_once_outside_the_context(tmp_path: Path) -> None:
    pq.write_table(random_log(3_000, seed=3, users=5), tmp_path / "log.parquet")
    summary = run(tmp_path / "log.parquet", tmp_path / "data", chunk_length=32, context_length=50)
    own: Counter[tuple[int, ...]] = Counter()
    for row in rows_of(tmp_path / "data/sequences"):
        lists = zip(row["partner"], row["action"], row["direction"], row["timestamp"], strict=True)
        own.update((row["user"], *entry) for entry in list(lists)[row["context"] :])
    outs = [entry for entry in own if entry[3] == 0]
    assert set(own.values()) == {1}
    assert len(outs) == len(own) - len(outs) == summary.cleaning.events


@pytest.mark.parametrize(
    "name",
    [
        "collegemsg",
        "bitcoin_otc",
        pytest.param("email_eu_core", marks=pytest.mark.long),
        pytest.param("mathoverflow", marks=pytest.mark.long),
    ],
)
def test_counts_of_public_logs(shared_data: Path, tmp_path: Path, name: str) -> None:
    expected = json.loads((shared_data / "baselines.json").read_text())["sets"][name]
    actions = "trust" if name == "bitcoin_otc" else None
    summary = run(shared_data / f"{name}.parquet", tmp_path / "data", actions=actions)
    counts, splits = summary.cleaning, summary.splits
    assert {kind: getattr(counts, kind) for kind in expected["cleaning"]} == expected["cleaning"]
    assert counts.events == expected["events"]
    assert counts.rejected == 0
    assert splits.num_train_events == expected["split"]["train"]
    assert splits.num_validation_events == expected["split"]["validation"]
    assert counts.events - splits.num_train_events - splits.num_validation_events == expected["split"]["test"]
    assert splits.num_train_users == expected["candidates"]
    for moment in ("train_until", "validation_until"):
        exact = datetime.fromisoformat(expected[moment]).replace(tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)
        assert getattr(splits, moment) == exact // timedelta(microseconds=1)


def test_default_flags_take_every_action_of_bitcoin(shared_data: Path, tmp_path: Path) -> None:
    summary = run(shared_data / "bitcoin_otc.parquet", tmp_path / "data")
    assert (summary.cleaning.rows, summary.cleaning.events) == (35_592, 35_592)
    assert [action.role for action in summary.actions] == ["target", "target"]


def test_a_growing_log_renumbers_nobody(tmp_path: Path) -> None:
    log = random_log(2_000, seed=4, users=900).drop_null().sort_by("timestamp")
    pq.write_table(log.slice(0, 1_000), tmp_path / "early.parquet")
    pq.write_table(log, tmp_path / "late.parquet")
    run(tmp_path / "early.parquet", tmp_path / "young")
    run(tmp_path / "late.parquet", tmp_path / "old")
    young, old = (rows_of(tmp_path / name / "vocabulary") for name in ("young", "old"))
    last = log["timestamp"][999].value
    settled = [user for user in young if user["first_timestamp"] < last]
    assert len(old) > len(settled) > 500
    assert old[: len(settled)] == settled


def test_profiles(tmp_path: Path) -> None:
    events = [(k, k + 1, "message", k * DAY) for k in range(10)]  # train: users 0 to 8
    users = pa.table(
        {
            "user_id": [8, 0, 1, 2, 10, 77],
            "country": ["SE", "FR", None, "SE", "IT", "ES"],
            "interests": pa.array([[], ["go", "chess", "go"], None, ["chess"], ["go", "golf"], ["go"]]),
            "age": pa.array([30, 20, 20, None, 40, 20], pa.int16()),
            "height": [1.8] * 6,
        }
    )
    pq.write_table(users, tmp_path / "users.parquet")
    log = write_log(tmp_path / "log.parquet", events, pa.int64())
    summary = run(log, tmp_path / "data", tmp_path / "users.parquet")
    assert summary.ignored_columns == ("height",)

    def bags(name: str) -> dict[int, list[int]]:
        offsets, values = (
            np.load(tmp_path / f"data/arrays/profile_{name}_{part}.npy") for part in ("offsets", "values")
        )
        assert (offsets.dtype, values.dtype) == (np.int64, np.int32)
        assert len(offsets) == 12
        return {row: values[offsets[row] : offsets[row + 1]].tolist() for row in (0, 1, 2, 3, 8, 10)}

    def codes(name: str) -> list[tuple[int, Any]]:
        return [(row["code"], row["value"]) for row in rows_of(tmp_path / f"data/profiles/{name}.parquet")]

    assert codes("country") == [(1, "FR"), (2, "SE")]  # IT belongs to a user of the test period only
    assert bags("country") == {0: [1], 1: [0], 2: [2], 3: [0], 8: [2], 10: [0]}
    assert codes("interests") == [(1, "chess"), (2, "go")]
    assert bags("interests") == {0: [1, 2], 1: [0], 2: [1], 3: [0], 8: [0], 10: [2]}
    assert codes("age") == [(1, 20), (2, 30)]
    assert bags("age") == {0: [1], 1: [1], 2: [0], 3: [0], 8: [2], 10: [0]}


@pytest.mark.parametrize(
    ("ids", "message"), [([1, 1], "several rows of user 1"), (["1", "2"], "is string, the log's ids are int64")]
)
def test_users_tables_that_do_not_fit(tmp_path: Path, ids: list[Any], message: str) -> None:
    pq.write_table(pa.table({"user_id": ids, "country": ["SE", "FR"]}), tmp_path / "users.parquet")
    log = write_log(tmp_path / "log.parquet", [(k, k + 1, "message", k * DAY) for k in range(10)], pa.int64())
    with pytest.raises(FriendrecError, match=message):
        run(log, tmp_path / "data", tmp_path / "users.parquet")


EVENTS = [(k, k + 1, "message", k * DAY) for k in range(10)]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            EVENTS,
            {"actions": "mesage"},
            r"--actions names the action mesage, the log has message: did you mean message\?",
        ),
        (EVENTS, {"roles": "block=exclude"}, r"--roles names the action block, the log has message: correct --roles"),
        ([*EVENTS, (1, 2, "like", 5)], {"actions": "message", "roles": "like=history"}, r"--actions selects message"),
        (EVENTS, {"roles": "message=history"}, r"no action with the role target"),
        ([(1, 1, "message", 0)] * 3, {}, r"no event is left after cleaning \(3 rows, 3 self-loops\)"),
        ([(1, 2, "message", -5)], {"max_reject": 1}, r"no event is left after cleaning \(1 rows, 1 rejected\)"),
        ([(1, 2, "like", 5), (2, 3, "like", 5)], {}, r"first 2 of 2 events share one timestamp"),
        (
            [*EVENTS, (None, 2, "like", 5), (1, 2, "like", -1)],
            {},
            r"2 of 12 .*\(no actor_id: 1, timestamp before 1970: 1\)",
        ),
        ([*EVENTS, (1, 2, "like", 2**61)], {}, r"timestamp in the future: 1"),
        ([(1, 2, f"action {k}", k) for k in range(1001)], {}, r"1001 actions"),
    ],
)
def test_logs_that_cannot_be_prepared(tmp_path: Path, rows: list[Row], options: dict[str, Any], message: str) -> None:
    log = write_log(tmp_path / "log.parquet", rows, pa.int64())
    with pytest.raises(FriendrecError, match=message) as error:
        run(log, tmp_path / "data", **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"splits": "0.8,0.1"}, "--splits 0.8,0.1 is not three shares that add up to 1"),
        ({"splits": "0.8,0.1,0.2"}, "add up to 1"),
        ({"splits": "0,0.5,0.5"}, "add up to 1"),
        ({"splits": "1.2,-0.1,-0.1"}, "add up to 1"),
        ({"splits": "a,b,c"}, "add up to 1"),
        ({"columns": "actor=src"}, "--columns maps actor"),
        ({"columns": "actor_id"}, "not a list like name=value"),
        ({"roles": "block=ban"}, "--roles gives block the role ban: it is one of target, history, negative, exclude"),
        ({"chunk_length": 0}, "--chunk-length is 0: it must be at least 1"),
        ({"buckets": 0}, "--buckets is 0"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FriendrecError, match=message):
        PreparationConfig(**options)


def test_splits_are_exact() -> None:
    assert PreparationConfig(splits="0.7,0.2,0.1").boundaries == (Fraction(7, 10), Fraction(9, 10))


def test_memory_limit_must_be_a_size(tmp_path: Path) -> None:
    with pytest.raises(FriendrecError, match="--memory-limit much is not a size: pass one like 2GB"):
        connect(tmp_path, "much")


def test_stream_cuts_where_it_is_told(tmp_path: Path) -> None:
    engine = connect(tmp_path, "1GB")
    numbers = ibis.range(300_000).unnest().name("n").as_table().order_by("n")
    tables = list(stream(engine, numbers, pa.schema({"n": pa.int32()}), 70_000))
    assert [len(table) for table in tables] == [70_000] * 4 + [20_000]
    assert pa.concat_tables(tables)["n"].to_pylist() == list(range(300_000))


def test_the_program_is_one_for_spark_too() -> None:
    """Every step compiles for PySpark, so that none leans on DuckDB alone."""
    log = ibis.table({"actor_id": "int64", "target_id": "int64", "action": "string", "timestamp": "int64"}, "log")
    judged = cleaning.judge(log, 2**60)
    actions = cleaning.choose_actions(["block", "like"], [], {"block": "exclude"})
    clean = cleaning.clean(judged, actions)
    vocabulary = layout.vocabulary(clean)
    events = layout.with_rows(layout.number(clean, "event", layout.TOTAL_ORDER), vocabulary)
    entries = layout.entries(events)
    steps = [judged, clean, vocabulary, events, entries, layout.sequences(entries, 256, 50)]
    steps += [layout.user_statistics(entries), layout.action_statistics(entries), layout.day_statistics(entries)]
    for step in steps:
        assert "SELECT" in ibis.to_sql(step, dialect="pyspark")
