"""Run a verb on several processes that train together: `python -m friendrec.pipeline.launch --nproc 2 -- train ...`.

What `torchrun` does, with the ending that a preemptible machine needs: SIGTERM goes to the workers, the launcher
waits until they have written their checkpoint, and its exit code is theirs (`torchrun` returns 1 even when every
worker returned 0). A user's mistake (exit code 2) is not restarted.
"""

import logging
import os
import signal
import sys
import uuid
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from string import Template
from types import FrameType
from typing import TYPE_CHECKING

from friendrec.errors import FriendrecError
from friendrec.pipeline.arguments import parse_options
from friendrec.pipeline.cli import INTERRUPTED, USER_MISTAKE, guarded, read_verb

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

WORKER = (sys.executable, "-P", "-m", "friendrec")  # -P: a checkout's folders must not hide packages of their name
EXAMPLES = """
python -m friendrec.pipeline.launch --nproc 2 -- train two_tower_mlp --data DATA --out RUN
python -m friendrec.pipeline.launch --nproc 8 --nnodes 2 --rdzv-endpoint host0:29500 --rdzv-id 7 -- train ...
"""


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    nproc: int = 2
    """Processes on this machine: one a GPU, or a few on a CPU."""
    nnodes: int = 1
    """Machines. Each runs this same command."""
    rdzv_endpoint: str = "localhost:0"
    """HOST:PORT of the first machine; `$NAME` in it is an environment variable. Port 0 picks a free one."""
    rdzv_id: str = ""
    """A name for the job, the same on every machine; random when there is one machine."""
    max_restarts: int = 0
    """How often all workers are started again after one died; train then resumes at its last checkpoint."""

    def __post_init__(self) -> None:
        if self.nproc < 1 or self.nnodes < 1:
            raise FriendrecError("--nproc and --nnodes must be at least 1")
        if self.nnodes > 1 and not (self.rdzv_id and not self.rdzv_endpoint.endswith(":0")):
            raise FriendrecError("--nnodes above 1 needs --rdzv-id and --rdzv-endpoint HOST:PORT")


def main(argv: Sequence[str]) -> int:
    """Read `[launch options] -- VERB ...`, run it, and return the exit code."""
    split = argv.index("--") if "--" in argv else len(argv)
    options = parse_options(
        LaunchOptions, argv[:split], prog="friendrec.pipeline.launch", description=__doc__ or "", examples=EXAMPLES
    )
    verb = list(argv[split + 1 :])
    read_verb(verb)  # mistakes in the arguments are told here, once, and before torch is imported
    threads = max(1, len(os.sched_getaffinity(0)) // options.nproc) if hasattr(os, "sched_getaffinity") else 1
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    return launch(options, [*WORKER, *verb])


def launch(options: LaunchOptions, command: Sequence[str]) -> int:
    """Run the command on every rank; 0 when all returned 0, else the code of the first that failed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # Else restarted workers meet in the store of those before them, and may find addresses where nobody listens now.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"  # SIGTERM is ours
    agent = _agent(options, command)
    try:
        result = agent.run()
    except SignalException as interrupt:
        return INTERRUPTED if interrupt.sigval == signal.SIGINT else 128 + interrupt.sigval
    finally:
        agent._rdzv_handler.shutdown()
    if not result.is_failed():
        return 0
    rank, first = next(iter(result.failures.items()))
    if first.exitcode < 0:
        print(f"error: rank {rank} was killed by {signal.Signals(-first.exitcode).name}", file=sys.stderr)
        return 128 - first.exitcode
    if first.exitcode != USER_MISTAKE:
        print(f"error: rank {rank} failed with exit code {first.exitcode}, see its output above", file=sys.stderr)
    return first.exitcode


def _agent(options: LaunchOptions, command: Sequence[str]) -> "LocalElasticAgent":
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.rendezvous import RendezvousParameters, registry

    class ForwardingAgent(LocalElasticAgent):
        """Passes SIGTERM on to the workers and lets them end by themselves."""

        def forward(self, signum: int, frame: FrameType | None) -> None:
            if self._pcontext is None:
                sys.exit(128 + signum)  # nothing has started
            self._remaining_restarts = 0
            for pid in self._pcontext.pids().values():
                try:
                    os.kill(pid, signum)
                except ProcessLookupError:
                    continue

        def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
            result = super()._monitor_workers(worker_group)
            if any(failure.exitcode == USER_MISTAKE for failure in result.failures.values()):
                self._remaining_restarts = 0
            return result

    rendezvous = RendezvousParameters(
        backend="c10d",
        endpoint=Template(options.rdzv_endpoint).substitute(defaultdict(lambda: "localhost", os.environ)),
        run_id=options.rdzv_id or uuid.uuid4().hex,
        min_nodes=options.nnodes,
        max_nodes=options.nnodes,
        local_addr="localhost" if options.nnodes == 1 else None,
    )
    spec = WorkerSpec(
        role="friendrec",
        local_world_size=options.nproc,
        entrypoint=command[0],
        args=tuple(command[1:]),
        rdzv_handler=registry.get_rendezvous_handler(rendezvous),
        max_restarts=options.max_restarts,
        local_addr="localhost" if options.nnodes == 1 else None,
    )
    agent = ForwardingAgent(spec, DefaultLogsSpecs())
    signal.signal(signal.SIGTERM, agent.forward)
    return agent


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
