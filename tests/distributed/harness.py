"""Real gloo processes for tests: started once, then running any function of a test module at any world size.

    workers = Workers(3)
    workers.run(2, function, *args)   # -> [rank 0's return value, rank 1's]

`function` runs on ranks 0..W-1 of a fresh process group each time, under the environment that torchrun would set.
Tests stay without fixed ports: the parent hosts the rendezvous store on a free one.
"""

import gc
import importlib
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

_TIMEOUT = 120.0  # seconds a call may take
_GRACE = 5.0  # seconds the other ranks get once one has failed: they wait for it in a collective


class Workers:
    """`size` processes that wait for work; a context manager that ends them."""

    def __init__(self, size: int) -> None:
        self._workers = [_Worker() for _ in range(size)]

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return values of `function(*args)` by rank. A rank's exception is raised here with its traceback."""
        import torch.distributed as dist

        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        # The test module travels as a path: pytest's importlib mode leaves it off sys.path.
        module = (function.__module__, sys.modules[function.__module__].__file__)
        task = pickle.dumps((function.__qualname__, args))
        for rank in range(world_size):
            self._workers[rank].pipe.send((_environment(rank, world_size, store.port), module, task))
        answers = self._answers(world_size)
        failures = [f"rank {rank}:\n{answers[rank][1]}" for rank in sorted(answers) if not answers[rank][0]]
        if failures:
            raise AssertionError("\n".join(failures))
        return [pickle.loads(answers[rank][1]) for rank in range(world_size)]

    def _answers(self, world_size: int) -> dict[int, tuple[bool, Any]]:
        """(whether it went well, pickled value or text) by rank; a worker that does not answer is replaced."""
        answers: dict[int, tuple[bool, Any]] = {}
        waiting = set(range(world_size))
        until = time.monotonic() + _TIMEOUT
        while waiting and (ready := wait([self._workers[r].pipe for r in waiting], max(0.0, until - time.monotonic()))):
            for rank in [rank for rank in waiting if self._workers[rank].pipe in ready]:
                waiting.remove(rank)
                try:
                    answers[rank] = self._workers[rank].pipe.recv()
                except EOFError:
                    answers[rank] = False, f"its process ended with exit code {self._replace(rank)}"
                if not answers[rank][0]:
                    until = min(until, time.monotonic() + _GRACE)
        for rank in waiting:
            self._replace(rank)
            answers[rank] = False, "gave no answer and was ended"
        return answers

    def _replace(self, rank: int) -> int:
        """Exit code of the old process of `rank`; the new one is ready for the next call."""
        old, self._workers[rank] = self._workers[rank], _Worker()
        return old.end(1)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.end(0)  # idle: nothing to wait for


class _Worker:
    """A process of this file's main block, at the other end of a pipe."""

    def __init__(self) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        environment = os.environ | threads | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with theirs:
            end = theirs.fileno()
            self._process = subprocess.Popen([sys.executable, __file__, str(end)], pass_fds=[end], env=environment)

    def end(self, patience: float) -> int:
        """Exit code of the process; still there after `patience` seconds, it is killed."""
        self.pipe.close()
        try:
            return self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def heights() -> set[int]:
    """First dimension of every tensor of two dimensions or more that this process holds; shards count as themselves."""
    import torch
    from torch.distributed._shard.sharded_tensor import ShardedTensor

    gc.collect()
    held = (thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor))
    real = (t for t in held if not isinstance(t, ShardedTensor) and t.device.type != "meta")
    return {t.shape[0] for t in real if t.ndim >= 2}


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun tells a worker; the agent's store is the parent's."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _serve(pipe: Connection) -> None:
    """A worker's life: one thread, and one process group a task."""
    import torch
    import torchrec.distributed.collective_utils as collectives

    from friendrec.sharding.parallel import process_group

    torch.set_num_threads(1)
    while True:
        try:
            environment, (name, path), task = pipe.recv()
        except EOFError:
            return
        try:
            os.environ.update(environment)
            collectives._INITIALIZED = False  # else a rank that has sharded before skips a broadcast others wait for
            _import(name, path)
            qualname, args = pickle.loads(task)
            with process_group():
                answer: tuple[bool, Any] = (True, pickle.dumps(getattr(sys.modules[name], qualname)(*args)))
        except BaseException:  # whatever it is, the parent must hear of it
            answer = (False, traceback.format_exc())
        pipe.send(answer)


def _import(name: str, path: str) -> None:
    """Import a test module under pytest's name for it, so that its neighbours are found by relative import."""
    *parents, _ = name.split(".")
    for depth in range(len(parents), 0, -1):
        package = ModuleType(".".join(parents[:depth]))
        package.__path__ = [str(Path(path).parents[len(parents) - depth])]
        sys.modules.setdefault(package.__name__, package)
    importlib.import_module(name)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
