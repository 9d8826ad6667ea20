"""What is promised of tokens, on embeddings of a real log: no collapse, no collisions, few changes after a retrain."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from friendrec.pipeline import export, prepare, tokenize, train
from friendrec.pipeline.export import ExportOptions
from friendrec.pipeline.prepare import PrepareOptions
from friendrec.pipeline.tokenize import TokenizeOptions
from tests.pipeline.test_tokenize_again import read_report

pytestmark = pytest.mark.long


def embed(log: Path, out: Path, *args: str) -> str:
    """Embeddings of one epoch on a log."""
    out.mkdir()
    data, run, embeddings = (str(out / name) for name in ("data", "run", "embeddings"))
    prepare.main(PrepareOptions(interactions=str(log), out=data))
    train.main(train.parse(["two_tower_mlp", f"--data={data}", f"--out={run}", "--epochs=1", *args]))
    export.main(ExportOptions(run=run, data=data, out=embeddings))
    return embeddings


@pytest.fixture(scope="module")
def place(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`earlier`, embeddings of the first 95 % of collegemsg, and `later`, of all, trained on from there."""
    out = tmp_path_factory.mktemp("real")
    log = pq.read_table(shared_data / "collegemsg.parquet").sort_by("timestamp")
    pq.write_table(log.slice(0, int(0.95 * len(log))), out / "first.parquet")
    earlier = embed(out / "first.parquet", out / "earlier")
    embed(shared_data / "collegemsg.parquet", out / "later", f"--init-from={earlier}")
    return out


@pytest.mark.parametrize("method", ["rqkmeans", "rqvae"])
def test_few_codes_change_after_a_warm_start_with_a_twentieth_of_new_events(
    method: str, place: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    options = {"method": method, "out": str(first), "embeddings": str(place / "earlier" / "embeddings")}
    tokenize.main(TokenizeOptions(**options))  # type: ignore[arg-type]
    options |= {"out": str(second), "embeddings": str(place / "later" / "embeddings"), "start_from": str(first)}
    tokenize.main(TokenizeOptions(**options))  # type: ignore[arg-type]
    report = read_report(second)
    assert report["common_users"] < report["users"] and report["collision_rate_after"] == 0
    assert report["churn"] < 0.1 < 0.9 < report["from_scratch"]["churn"]
    assert report["reconstruction_error"] < 1.15 * report["from_scratch"]["reconstruction_error"]


@pytest.mark.parametrize("method", ["rqkmeans", "rqvae"])
@pytest.mark.parametrize("size", [64, 256])
def test_all_tokens_are_used_and_no_code_is_shared(method: str, size: int, place: Path, tmp_path: Path) -> None:
    embeddings = str(place / "later" / "embeddings")
    out = tmp_path / "stu"
    tokenize.main(TokenizeOptions(embeddings=embeddings, method=method, codebook_size=size, out=str(out)))  # type: ignore[arg-type]
    report = read_report(out)
    assert min(level["utilisation"] for level in report["levels"]) >= 0.95
    assert report["collision_rate_after"] == 0
