"""Whatever happens to the writer of an update, and whoever reads meanwhile: the index is that of before or of after."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from friendrec.pipeline import index, update
from friendrec.pipeline.index import IndexOptions
from friendrec.pipeline.publish import open_published
from friendrec.pipeline.update import UpdateOptions

from .updates import AFTER, BEFORE, DIM, build, contents, options_of, publish_embeddings


@pytest.fixture
def built(tmp_path: Path) -> Path:
    return build(tmp_path)


KILLED_AT_EVERY_STEP = """
import os, shutil, signal, sys
from pathlib import Path
import faiss, fsspec.implementations.local, pandas, pyarrow.dataset, pyarrow.parquet
from friendrec.pipeline import revision, update
from friendrec.pipeline.retrieval import store

index, embeddings, leaving, every = sys.argv[1:]

def step(moment):
    seen = 0
    def hook(event, args):
        nonlocal seen
        here = str(args[0]).startswith(copy) if args else False
        writes = event in ("os.rename", "os.mkdir") and here
        writes |= event == "open" and here and args[1] not in ("r", "rb")  # to write, or to force to the disk
        if writes or event in ("os.remove", "os.rmdir"):
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1
    sys.addaudithook(hook)
    update.main(update.UpdateOptions(index=copy, embeddings=embeddings, delete=leaving, compact=True))

moment, ended = 0, False
while not ended:
    copy = f"{index}-{moment}"
    shutil.copytree(index, copy)
    child = os.fork()
    if child == 0:
        step(moment)
        os._exit(0)
    ended = os.waitpid(child, 0)[1] == 0
    moment += int(every)
"""
"""A process of its own: who forks may not have run threads before."""


@pytest.mark.parametrize("every", [24, pytest.param(1, marks=pytest.mark.long)])
def test_a_writer_killed_at_any_step_leaves_the_index_of_before_or_after(built: Path, every: int) -> None:
    options = options_of(built)
    words = [str(built), str(options.embeddings), str(options.delete), str(every)]
    subprocess.run([sys.executable, "-c", KILLED_AT_EVERY_STEP, *words], check=True, stdout=subprocess.DEVNULL)
    copies = sorted(built.parent.glob("index-*"), key=lambda path: int(path.name.removeprefix("index-")))
    found = [contents(copy) for copy in copies]
    assert all(state in (BEFORE, AFTER) for state in found)
    done = [state == AFTER for state in found]
    assert done == sorted(done) and 0 < sum(done) < len(done), "killed before the commit, and after it"
    for copy in copies:
        open_published(copy, "index", verify=True)
        update.main(UpdateOptions(index=str(copy), embeddings=options.embeddings, delete=options.delete))
        assert contents(copy) == AFTER
        named = {Path(name).parent.name for name in open_published(copy)[1].files if name.startswith("segments/")}
        assert {path.name for path in (copy / "segments").iterdir()} == named, "no orphans are left"


READER = """
import json, sys
from pathlib import Path
from friendrec.pipeline.publish import open_published
from friendrec.pipeline.retrieval.kinds import load_index
from friendrec.pipeline.retrieval.protocol import Queries
import numpy as np

index = sys.argv[1]
opened = load_index(open_published(index, "index")[0])
for line in sys.stdin:
    opened = load_index(open_published(index, "index")[0]) if line == "open\\n" else opened
    ids, _ = opened.search(Queries.dense(np.ones((1, 3), np.float32)), 20)
    print(json.dumps(sorted(opened.user_ids[ids[ids >= 0]].tolist())), flush=True)
"""


def test_another_process_sees_what_it_opened_until_it_opens_again(built: Path) -> None:
    environment = os.environ | {"NUMBA_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", READER, str(built)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment,
    ) as reader:  # fmt: skip
        assert reader.stdin is not None and reader.stdout is not None

        def ask(word: str) -> list[int]:
            print(word, file=reader.stdin, flush=True)
            found: list[int] = json.loads(reader.stdout.readline())  # type: ignore[union-attr]
            return found

        assert ask("search") == sorted(BEFORE)
        update.main(options_of(built))
        assert ask("search") == sorted(BEFORE)
        update.main(UpdateOptions(index=str(built), compact=True))
        assert ask("search") == sorted(BEFORE)
        assert ask("open") == sorted(AFTER)
        reader.stdin.close()


@pytest.mark.long
def test_a_writer_killed_at_any_time_leaves_the_index_of_before_or_after(tmp_path: Path) -> None:
    """As above, with an index that takes a while to write, and a kill that waits for nothing."""
    rng = np.random.default_rng(0)
    vectors = [dict(enumerate(rng.integers(-9, 10, (60_000, DIM)).tolist())) for _ in range(2)]
    embeddings = publish_embeddings(tmp_path / "embeddings", vectors[0])
    built, changes = tmp_path / "index", publish_embeddings(tmp_path / "changes", vectors[1])
    index.main(IndexOptions(embeddings=embeddings, kind="clusters", out=str(built), nprobe=1))
    whole = 0.0
    command = [sys.executable, "-m", "friendrec", "update", "--index", str(built), "--embeddings", changes]
    for share in (1.0, *np.linspace(0.3, 0.95, 12)):  # of the time that the first, undisturbed, takes
        shutil.rmtree(built.with_name("copy"), ignore_errors=True)
        copy = Path(shutil.copytree(built, built.with_name("copy")))
        command[command.index("--index") + 1] = str(copy)
        begun = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(None if share == 1 else share * whole)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        whole = time.monotonic() - begun if share == 1 else whole
        state = contents(copy)
        assert state in (vectors if share < 1 else vectors[1:])
        update.main(UpdateOptions(index=str(copy), embeddings=changes))
        assert contents(copy) == vectors[1]
