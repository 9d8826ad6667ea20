"""A segment holds each row where its list is, at the precision of its type."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from friendrec.errors import FriendrecError
from friendrec.pipeline.retrieval.segments import Dtype, build_segment, restored, stored


@given(seed=st.integers(0, 2**32 - 1), users=st.integers(0, 12), lists=st.integers(2, 5), copies=st.integers(1, 2))
def test_rows_lie_in_their_lists_by_id(seed: int, users: int, lists: int, copies: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((users, 3)).astype(np.float32)
    ids = rng.permutation(30)[:users].astype(np.int32)
    assigned = np.array([rng.permutation(lists)[:copies] for _ in ids], np.int32).reshape(users, copies)
    segment = build_segment(vectors, ids, assigned, lists)
    assert len(segment.ids) == users * copies and segment.offsets[-1] == users * copies
    for c in range(lists):
        mine = slice(segment.offsets[c], segment.offsets[c + 1])
        members = sorted(int(ids[n]) for n in range(users) if c in assigned[n].tolist())
        assert segment.ids[mine].tolist() == members
        for r in range(mine.start, mine.stop):
            n = ids.tolist().index(segment.ids[r])
            assert segment.primary[r] == assigned[n, 0]
            assert np.array_equal(segment.rows[r], vectors[n])
    assert len(segment.dead) == len(segment.scale) == 0


@pytest.mark.parametrize("dtype", get_args(Dtype))
def test_the_rows_of_a_user_are_stored_in_every_type(dtype: Dtype) -> None:
    vectors = np.array([[1, -254, 3], [0.5, 0.25, 0]], np.float32)
    segment = build_segment(vectors, np.array([4, 1], np.int32), np.array([[0, 1], [1, 0]], np.int32), 2, dtype)
    assert segment.rows.dtype == dtype
    assert segment.ids.tolist() == [1, 4, 1, 4]
    expected = vectors[[1, 0, 1, 0]]
    tolerance = np.abs(expected).max(axis=1, keepdims=True) * {"float32": 0, "float16": 1e-3, "int8": 1 / 254}[dtype]
    assert (np.abs(restored(segment.rows, segment.scale) - expected) <= tolerance).all()


def test_a_type_too_small_is_refused() -> None:
    with pytest.raises(FriendrecError, match="pass --dtype float32"):
        stored(np.array([[1, 70_000]], np.float32), "float16")


@given(hnp.arrays(np.float32, (4, 3), elements=st.floats(-1e4, 1e4, width=32)))
def test_bytes_are_never_off_by_more_than_half_a_step(vectors: np.ndarray) -> None:
    rows, scale = stored(vectors, "int8")
    step = np.abs(vectors).max(axis=1, keepdims=True) / 127
    assert (np.abs(restored(rows, scale) - vectors) <= step / 2 * (1 + 1e-4) + 1e-12).all()
    assert np.abs(rows.astype(int)).max() <= 127
