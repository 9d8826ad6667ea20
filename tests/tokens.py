"""Tokens of a small prepared data set, without a run to tokenize."""

from pathlib import Path

from friendrec.datasets.prepared import load_prepared
from friendrec.pipeline.publish import publish
from friendrec.pipeline.tokens import TOKENS, write_tokens
from tests.models.codes import ragged_codes

SIZES = (8, 8, 4)


def publish_random_tokens(data: Path, out: Path, newcomers: int = 0, seed: int = 0) -> Path:
    """Codes of two levels and a third where it is needed, for the train users and some newcomers."""
    opened = load_prepared(data)
    num = opened.num_train_users + newcomers
    assert num <= opened.num_users
    codes = ragged_codes(seed, num, SIZES, ended=0.3)
    assert len(codes) == num
    with publish(out, kind="stu", options={"seed": seed}, inputs={"data": data}, extra={"sizes": SIZES}) as attempt:
        write_tokens(attempt / TOKENS, opened.user_ids[:num], codes)
    return out
