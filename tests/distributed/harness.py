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
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

_TIMEOUT = 120  # seconds a call may take before its processes are ended


class Workers:
    """`size` processes that wait for work; a context manager that ends them."""

    def __init__(self, size: int) -> None:
        self._pipes: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        environment = os.environ | threads | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        for _ in range(size):
            ours, theirs = multiprocessing.Pipe()
            with theirs:
                end = theirs.fileno()
                command = [sys.executable, __file__, str(end)]
                self._processes.append(subprocess.Popen(command, pass_fds=[end], env=environment))
            self._pipes.append(ours)

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return values of `function(*args)` by rank. A rank's exception is raised here with its traceback."""
        import torch.distributed as dist

        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        # The test module travels as a path: pytest's importlib mode leaves it off sys.path.
        module = (function.__module__, sys.modules[function.__module__].__file__)
        task = pickle.dumps((function.__qualname__, args))
        for rank in range(world_size):
            self._pipes[rank].send((_environment(rank, world_size, store.port), module, task))
        answers = [self._receive(rank) for rank in range(world_size)]
        failures = [f"rank {rank}:\n{answer}" for rank, (good, answer) in enumerate(answers) if not good]
        if failures:
            raise AssertionError("\n".join(failures))
        return [pickle.loads(answer) for _, answer in answers]

    def _receive(self, rank: int) -> tuple[bool, Any]:
        if not self._pipes[rank].poll(_TIMEOUT):
            self._processes[rank].kill()
            return False, f"no answer within {_TIMEOUT} s"
        try:
            answer: tuple[bool, Any] = self._pipes[rank].recv()
        except EOFError:
            return False, f"process ended with exit code {self._processes[rank].wait()}"
        return answer

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()  # the worker reads the end of its pipe and leaves
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


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
                answer = (True, pickle.dumps(getattr(sys.modules[name], qualname)(*args)))
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
