"""`tokenize` from the tokens of before, for newcomers, and by RQ-VAE: what stays, what is added, what is refused."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from friendrec.datasets.prepared import PreparedData, load_prepared
from friendrec.errors import FriendrecError
from friendrec.models.rqvae import RqVae
from friendrec.models.rqvae_config import RqVaeConfig
from friendrec.pipeline import tokenize
from friendrec.pipeline.embeddings import write_part
from friendrec.pipeline.first_events import first_events, vectors_of_newcomers
from friendrec.pipeline.publish import publish
from friendrec.pipeline.retokenize import load_tokenizer
from friendrec.pipeline.tokenize import TokenizeOptions
from friendrec.pipeline.tokens import codes_of, read_tokens
from tests.synthetic import prepared_from_events
from tests.training import publish_data

DIM = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_data(tmp_path_factory.mktemp("data") / "data", users=240, events=2000)


@pytest.fixture(scope="module")
def prepared(data: Path) -> PreparedData:
    return load_prepared(data)


def vectors_of(prepared: PreparedData) -> np.ndarray:
    """Vectors by circles of ten, as the events are."""
    circle = (prepared.user_ids[: prepared.num_train_users] - 1000) // 70
    rng = np.random.default_rng(0)
    return (3 * rng.standard_normal((24, DIM))[circle] + rng.standard_normal((len(circle), DIM))).astype(np.float32)


def publish_vectors(out: Path, user_ids: np.ndarray, vectors: np.ndarray) -> str:
    with publish(out, kind="embeddings", options={"out": str(out)}, inputs={}) as attempt:
        biased = np.concatenate([vectors, np.ones((len(vectors), 1), np.float32)], axis=1)
        write_part(attempt / "part-0.parquet", user_ids, biased, biased, "float32")
    return str(out)


@pytest.fixture(scope="module")
def embeddings(prepared: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> str:
    ids = prepared.user_ids[: prepared.num_train_users]
    return publish_vectors(tmp_path_factory.mktemp("embeddings") / "e", ids, vectors_of(prepared))


def made(out: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The table and the report."""
    given: dict[str, Any] = {"num_codebooks": 2, "codebook_size": 32, **options}
    tokenize.main(TokenizeOptions(out=str(out), **given))
    return read_tokens(out)[0], read_report(out)


def read_report(stu: Path) -> dict[str, Any]:
    """What `tokenize` left of figures."""
    report: dict[str, Any] = json.loads((stu / "report.json").read_text())
    return report


@pytest.fixture(scope="module")
def earlier(embeddings: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("earlier") / "stu"
    made(out, embeddings=embeddings)
    return out


def test_turned_vectors_and_new_users_leave_most_codes_alone(
    prepared: PreparedData, earlier: Path, tmp_path: Path
) -> None:
    table, _ = read_tokens(earlier)
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((DIM, DIM)))[0]
    moved = (vectors_of(prepared) @ turn + 2).astype(np.float32)
    ids = np.concatenate([prepared.user_ids[: len(moved)], [5, 6, 7]])
    vectors = np.concatenate([moved, moved[:3] + 0.1])
    new, report = made(
        tmp_path / "stu", embeddings=publish_vectors(tmp_path / "e", ids, vectors), start_from=str(earlier)
    )
    assert new.user_ids.tolist() == ids.tolist()
    changed = new.tokens[: len(moved)] != table.tokens
    assert report["common_users"] == len(moved) and len(np.unique(new.tokens, axis=0)) == len(ids)
    assert report["churn"] == pytest.approx(changed.any(axis=1).mean()) and report["churn"] < 0.1
    assert report["churn_of_levels"] == pytest.approx(changed.mean(axis=0).tolist())
    assert report["reconstruction_error"] < 1.2 * report["from_scratch"]["reconstruction_error"]
    assert report["from_scratch"]["churn"] > 0.5


def test_what_new_codebooks_would_give_is_what_they_give(
    embeddings: str, earlier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, fresh = made(tmp_path / "fresh", embeddings=embeddings, seed=3)
    _, again = made(tmp_path / "again", embeddings=embeddings, seed=3, start_from=str(earlier))
    for name in ("reconstruction_error", "neighbour_preservation"):
        assert again["from_scratch"][name] == fresh[name]
    assert "new codebooks would leave" in " ".join(capsys.readouterr().out.split())


def test_first_events_are_those_at_the_first_timestamp() -> None:
    rng = np.random.default_rng(0)
    actor, target = rng.integers(0, 15, (2, 400))
    action = rng.choice(["message", "poke"], 400)
    data = prepared_from_events(actor, target, action, np.sort(rng.integers(0, 10, 400)))  # forty events a time
    found = first_events(data, 3, data.num_users)
    lengths = np.diff(found.partners.offsets)
    assert lengths.max() > 2 and len(found) == data.num_users - 3
    for place, user in enumerate(range(3, data.num_users)):
        own = range(data.offsets[user], data.offsets[user + 1])
        first = min(data.timestamp[i] for i in own)
        expected = [
            (data.partner[i], 2 * data.direction[i] + data.action[i]) for i in own if data.timestamp[i] == first
        ]
        here = slice(found.partners.offsets[place], found.partners.offsets[place + 1])
        assert list(zip(found.partners.values[here], found.kinds[here], strict=True)) == expected


def test_profiles_are_those_of_the_users(prepared: PreparedData) -> None:
    ((bags, size),) = first_events(prepared, 200, prepared.num_users).profiles
    offsets, values = prepared.array("profile_course_offsets"), prepared.array("profile_course_values")
    assert size == 6 and len(bags.offsets) == prepared.num_users - 200 + 1
    for place, user in enumerate(range(200, prepared.num_users)):
        own = bags.values[bags.offsets[place] : bags.offsets[place + 1]]
        assert np.array_equal(own, values[offsets[user] : offsets[user + 1]])


def test_what_newcomers_do_later_changes_nothing(prepared: PreparedData) -> None:
    vectors = vectors_of(prepared)
    begin = np.repeat(prepared.offsets[:-1], np.diff(prepared.offsets))
    user = np.repeat(np.arange(prepared.num_users), np.diff(prepared.offsets))
    later = (prepared.timestamp > prepared.timestamp[begin]) & (user >= prepared.num_train_users)
    assert later.any()
    other = dataclasses.replace(
        prepared,
        partner=np.where(later, 0, prepared.partner),
        action=np.where(later, 0, prepared.action),
        direction=np.where(later, 1 - prepared.direction, prepared.direction),
    )
    found, _ = vectors_of_newcomers(prepared, vectors)
    assert len(found) == prepared.num_users - prepared.num_train_users >= 10
    assert np.array_equal(found, vectors_of_newcomers(other, vectors)[0])
    met_nobody = dataclasses.replace(
        prepared, partner=np.where(user >= prepared.num_train_users, prepared.num_users - 1, prepared.partner)
    )
    assert not np.array_equal(found, vectors_of_newcomers(met_nobody, vectors)[0])


@pytest.mark.parametrize("shape", [{}, {"num_codebooks": 1, "codebook_size": 8}])
def test_newcomers_get_codes_of_their_own_and_nobody_elses_changes(
    shape: dict[str, int], embeddings: str, data: Path, prepared: PreparedData, tmp_path: Path
) -> None:
    without, _ = made(tmp_path / "without", embeddings=embeddings, **shape)
    table, report = made(tmp_path / "with", embeddings=embeddings, data=str(data), newcomers=True, **shape)
    num = prepared.num_train_users
    assert np.array_equal(codes_of(table, prepared, "stu").tokens, table.tokens)
    assert np.array_equal(table.user_ids, prepared.user_ids) and np.array_equal(table.tokens[:num], without.tokens)
    assert len(np.unique(table.tokens, axis=0)) == prepared.num_users
    assert (table.tokens < table.sizes).all() and report["sizes"] == list(table.sizes)
    assert report["users"] == num and report["newcomers"]["users"] == prepared.num_users - num
    again, _ = made(
        tmp_path / "again", embeddings=embeddings, data=str(data), newcomers=True, **shape,
        start_from=str(tmp_path / "with"),
    )  # fmt: skip
    assert (again.tokens != table.tokens).any(axis=1).mean() < 0.1


def test_rqvae_trains_saves_and_goes_on(embeddings: str, tmp_path: Path) -> None:
    options = {"embeddings": embeddings, "method": "rqvae", "rqvae": RqVaeConfig(steps=40, batch_size=128)}
    table, report = made(tmp_path / "one", **options)
    again, _ = made(tmp_path / "two", **options)
    assert np.array_equal(table.tokens, again.tokens) and report["collision_rate_after"] == 0
    assert isinstance(load_tokenizer(tmp_path / "one", "rqvae"), RqVae)
    _, report = made(tmp_path / "three", **options, start_from=str(tmp_path / "one"))
    assert report["churn"] < 0.1


WRONG: list[tuple[Callable[[Path], dict[str, Any]], str]] = [
    (lambda _: {"method": "rqvae"}, "made by rqkmeans: pass --method rqkmeans"),
    (lambda _: {"num_codebooks": 3}, "pass --num-codebooks 2 --codebook-size 32"),
    (lambda _: {"codebook_size": 16}, "pass --num-codebooks 2 --codebook-size 32"),
    (lambda _: {"margin": 1.0}, "--margin 1.0: give a share"),
    (
        lambda path: {"embeddings": publish_vectors(path / "e", np.arange(40), np.ones((40, DIM), np.float32))},
        "none of the users",
    ),
    (
        lambda path: {"embeddings": publish_vectors(path / "e", np.arange(40), np.ones((40, 3), np.float32))},
        "vectors of 6 dimensions, not 3",
    ),
    (
        lambda path: {
            "embeddings": publish_vectors(
                path / "e", np.array([f"u{i}" for i in range(40)], object), np.ones((40, DIM), np.float32)
            )
        },
        "of users of another log",
    ),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_start_that_does_not_fit_is_refused_with_a_remedy(
    change: Callable[[Path], dict[str, Any]], message: str, embeddings: str, earlier: Path, tmp_path: Path
) -> None:
    options = {"embeddings": embeddings, "start_from": str(earlier)} | change(tmp_path)
    with pytest.raises(FriendrecError, match=message):
        made(tmp_path / "stu", **options)
    assert not (tmp_path / "stu").exists()


def test_newcomers_of_other_data_are_refused(embeddings: str, tmp_path: Path) -> None:
    other = publish_data(tmp_path / "other", users=100, events=900, seed=1)
    with pytest.raises(FriendrecError, match="export them for this data"):
        made(tmp_path / "stu", embeddings=embeddings, data=str(other), newcomers=True)
