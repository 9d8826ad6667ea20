"""Index exported embeddings, so that friends can be searched for.

The exact index scores every user by inner product, the metric trained; its files are a FAISS flat index, the raw
user ids in the same order, and meta.json.
"""

from dataclasses import dataclass
from typing import Literal

from friendrec.pipeline.publish import is_finished, open_published, publish

EXAMPLES = """
friendrec index --embeddings embeddings --out index
friendrec index --embeddings s3://bucket/embeddings --kind exact --out index
"""


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    embeddings: str
    """Directory or URL that `friendrec export` made."""
    kind: Literal["exact"] = "exact"
    """exact: every user is scored, nothing is missed; cost grows with the number of users."""
    out: str
    """Directory or URL to create."""


def main(options: IndexOptions) -> None:
    """Publish the index at `options.out`, or find it there already."""
    inputs = {"embeddings": options.embeddings}
    if is_finished(options.out, kind="index", options=options, inputs=inputs):
        print(f"{options.out} is this index already.")
        return
    from friendrec.pipeline.embeddings import read_embeddings
    from friendrec.pipeline.retrieval.exact import ExactIndex

    directory, _ = open_published(options.embeddings, "embeddings")
    user_ids, vectors = read_embeddings(directory, "target")
    index = ExactIndex(vectors, user_ids)
    with publish(options.out, kind="index", options=options, inputs=inputs) as attempt:
        index.save(attempt)
    print(f"{options.out}: {len(index):,} users, {vectors.shape[1]} dimensions, exact inner product")
