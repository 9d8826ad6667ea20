"""The verbs of friendrec as TorchX jobs: `torchx run -s local_cwd torchx_components/components.py:VERB -- [options]`.

What stands after `--` goes to the verb as it is (`friendrec VERB --help`). Verbs that run on several processes take
`--nproc` (and `train` `--nnodes`) before it, and every job `--image`, `--cpu`, `--memMB`, `--env A=b,C=d` and
`--mounts type=bind,src=/data,dst=/data`. Installed, the same jobs are `torchx run friendrec.VERB`. TorchX reads the
signatures by itself and wants typing.Optional; nothing of friendrec is imported here.
"""

from collections.abc import Sequence
from typing import Dict, List, Optional  # noqa: UP035

from torchx import specs

IMAGE = "friendrec:latest"
Environment = Optional[Dict[str, str]]  # noqa: UP006, UP045
Mounts = Optional[List[str]]  # noqa: UP006, UP045


def simulate(
    *args: str,
    image: str = IMAGE,
    cpu: int = 2,
    memMB: int = 4096,
    env: Environment = None,
    mounts: Mounts = None,
) -> specs.AppDef:
    """Make a log of a simulated social network.

    Args:
        args: options of `friendrec simulate`
        image: container image with friendrec installed; local_cwd and slurm ignore it
        cpu: processor cores
        memMB: memory in MB
        env: environment variables
        mounts: volumes, as in type=bind,src=/data,dst=/data
    """
    return _job("simulate", args, image, cpu, memMB, env, mounts)


def prepare(
    *args: str,
    image: str = IMAGE,
    cpu: int = 2,
    memMB: int = 8192,
    env: Environment = None,
    mounts: Mounts = None,
) -> specs.AppDef:
    """Turn an interaction log into a prepared data set.

    Args:
        args: options of `friendrec prepare`
        image: container image with friendrec installed; local_cwd and slurm ignore it
        cpu: processor cores
        memMB: memory in MB
        env: environment variables
        mounts: volumes, as in type=bind,src=/data,dst=/data
    """
    return _job("prepare", args, image, cpu, memMB, env, mounts)


def train(
    *args: str,
    nproc: int = 2,
    nnodes: int = 1,
    max_restarts: int = 3,
    image: str = IMAGE,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    env: Environment = None,
    mounts: Mounts = None,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Train a preset on one or more processes and machines; what dies goes on from the last checkpoint.

    Args:
        args: preset and options of `friendrec train`; --resume is added
        nproc: processes a machine
        nnodes: machines
        max_restarts: how often workers are started again after one died, and the job after a machine was lost
        image: container image with friendrec installed; local_cwd and slurm ignore it
        cpu: processor cores a machine
        gpu: GPUs a machine
        memMB: memory in MB a machine
        env: environment variables
        mounts: volumes, as in type=bind,src=/data,dst=/data
        rdzv_port: port on the first machine where the machines meet
    """
    launch = ["--max-restarts", str(max_restarts)]
    if nnodes > 1:  # $$ leaves a $NAME, whose value the launcher looks up where it runs
        endpoint = f"$${specs.macros.rank0_env}:{rdzv_port}"
        launch += ["--nnodes", str(nnodes), "--rdzv-id", specs.macros.app_id, "--rdzv-endpoint", endpoint]
    if max_restarts and "--resume" not in args:
        args = (*args, "--resume")
    app = _job("train", args, image, cpu, memMB, env, mounts, nproc, launch)
    role = app.roles[0]
    role.resource.gpu = gpu
    role.num_replicas = nnodes
    role.max_retries = max_restarts
    role.port_map = {"c10d": rdzv_port}
    return app


def export(
    *args: str,
    nproc: int = 1,
    image: str = IMAGE,
    cpu: int = 2,
    memMB: int = 8192,
    env: Environment = None,
    mounts: Mounts = None,
) -> specs.AppDef:
    """Write the embeddings of every user, each process its own rows.

    Args:
        args: options of `friendrec export`
        nproc: processes
        image: container image with friendrec installed; local_cwd and slurm ignore it
        cpu: processor cores
        memMB: memory in MB
        env: environment variables
        mounts: volumes, as in type=bind,src=/data,dst=/data
    """
    return _job("export", args, image, cpu, memMB, env, mounts, nproc)


def tokenize(
    *args: str,
    image: str = IMAGE,
    cpu: int = 2,
    memMB: int = 8192,
    env: Environment = None,
    mounts: Mounts = None,
) -> specs.AppDef:
    """Give every user a code of few tokens, learned from exported embeddings.

    Args:
        args: options of `friendrec tokenize`
        image: container image with friendrec installed; local_cwd and slurm ignore it
        cpu: processor cores
        memMB: memory in MB
        env: environment variables
        mounts: volumes, as in type=bind,src=/data,dst=/data
    """
    return _job("tokenize", args, image, cpu, memMB, env, mounts)


def index(
    *args: str,
    nproc: int = 1,
    image: str = IMAGE,
    cpu: int = 2,
    memMB: int = 8192,
    env: Environment = None,
    mounts: Mounts = None,
) -> specs.AppDef:
    """Build a retrieval index from embeddings or tokens.

    Args:
        args: options of `friendrec index`
        nproc: processes that build an index of kind clusters; the others take one
        image: container image with friendrec installed; local_cwd and slurm ignore it
        cpu: processor cores
        memMB: memory in MB
        env: environment variables
        mounts: volumes, as in type=bind,src=/data,dst=/data
    """
    return _job("index", args, image, cpu, memMB, env, mounts, nproc)


def update(
    *args: str,
    image: str = IMAGE,
    cpu: int = 2,
    memMB: int = 8192,
    env: Environment = None,
    mounts: Mounts = None,
) -> specs.AppDef:
    """Add, replace and delete users of an index of clusters, in place.

    Args:
        args: options of `friendrec update`
        image: container image with friendrec installed; local_cwd and slurm ignore it
        cpu: processor cores
        memMB: memory in MB
        env: environment variables
        mounts: volumes, as in type=bind,src=/data,dst=/data
    """
    return _job("update", args, image, cpu, memMB, env, mounts)


def evaluate(
    *args: str,
    nproc: int = 1,
    image: str = IMAGE,
    cpu: int = 2,
    memMB: int = 8192,
    env: Environment = None,
    mounts: Mounts = None,
) -> specs.AppDef:
    """Measure a run on the validation or test period.

    Args:
        args: options of `friendrec evaluate`
        nproc: processes
        image: container image with friendrec installed; local_cwd and slurm ignore it
        cpu: processor cores
        memMB: memory in MB
        env: environment variables
        mounts: volumes, as in type=bind,src=/data,dst=/data
    """
    return _job("evaluate", args, image, cpu, memMB, env, mounts, nproc)


def recommend(
    *args: str,
    nproc: int = 1,
    image: str = IMAGE,
    cpu: int = 2,
    memMB: int = 8192,
    env: Environment = None,
    mounts: Mounts = None,
) -> specs.AppDef:
    """Write recommendations for many users.

    Args:
        args: options of `friendrec recommend`
        nproc: processes
        image: container image with friendrec installed; local_cwd and slurm ignore it
        cpu: processor cores
        memMB: memory in MB
        env: environment variables
        mounts: volumes, as in type=bind,src=/data,dst=/data
    """
    return _job("recommend", args, image, cpu, memMB, env, mounts, nproc)


def compare(
    *args: str,
    image: str = IMAGE,
    cpu: int = 2,
    memMB: int = 8192,
    env: Environment = None,
    mounts: Mounts = None,
) -> specs.AppDef:
    """Train one run a step of the climb and compare what each adds.

    Args:
        args: options of `friendrec compare`, --nproc among them
        image: container image with friendrec installed; local_cwd and slurm ignore it
        cpu: processor cores
        memMB: memory in MB
        env: environment variables
        mounts: volumes, as in type=bind,src=/data,dst=/data
    """
    return _job("compare", args, image, cpu, memMB, env, mounts)


def frontier(
    *args: str,
    image: str = IMAGE,
    cpu: int = 2,
    memMB: int = 8192,
    env: Environment = None,
    mounts: Mounts = None,
) -> specs.AppDef:
    """Measure recall against work for every kind of index of a run.

    Args:
        args: options of `friendrec frontier`
        image: container image with friendrec installed; local_cwd and slurm ignore it
        cpu: processor cores
        memMB: memory in MB
        env: environment variables
        mounts: volumes, as in type=bind,src=/data,dst=/data
    """
    return _job("frontier", args, image, cpu, memMB, env, mounts)


def insight(
    *args: str,
    image: str = IMAGE,
    cpu: int = 2,
    memMB: int = 8192,
    env: Environment = None,
    mounts: Mounts = None,
) -> specs.AppDef:
    """Cross model and search, and tell which of the two matters more.

    Args:
        args: options of `friendrec insight`, --nproc among them
        image: container image with friendrec installed; local_cwd and slurm ignore it
        cpu: processor cores
        memMB: memory in MB
        env: environment variables
        mounts: volumes, as in type=bind,src=/data,dst=/data
    """
    return _job("insight", args, image, cpu, memMB, env, mounts)


def pipeline(
    *args: str,
    interactions: str,
    out: str,
    preset: str = "two_tower_mlp",
    nproc: int = 2,
    scheduler: str = "local_cwd",
    image: str = IMAGE,
    cpu: int = 2,
    memMB: int = 8192,
    env: Environment = None,
    mounts: Mounts = None,
) -> specs.AppDef:
    """Run the whole chain from a log to recommendations: a driver that runs each stage as a job of its own.

    Args:
        args: more options of `friendrec pipeline`
        interactions: interaction log
        out: directory for everything that is made
        preset: what to train
        nproc: processes that train
        scheduler: TorchX scheduler of the stages
        image: container image of the driver and its stages; local_cwd and slurm ignore it
        cpu: processor cores of the driver, and of its stages where they run beside it
        memMB: memory in MB
        env: environment variables of the driver
        mounts: volumes of the driver, as in type=bind,src=/data,dst=/data
    """
    options = ["--interactions", interactions, "--out", out, "--preset", preset]
    options += ["--nproc", str(nproc), "--scheduler", scheduler, "--image", image]
    return _job("pipeline", [*options, *args], image, cpu, memMB, env, mounts)


def _job(
    verb: str,
    args: Sequence[str],
    image: str,
    cpu: int,
    memMB: int,
    env: Environment,
    mounts: Mounts,
    nproc: int = 1,
    launch: Sequence[str] = (),
) -> specs.AppDef:
    several = nproc > 1 or launch
    command = ["friendrec.pipeline.launch", "--nproc", str(nproc), *launch, "--"] if several else ["friendrec"]
    role = specs.Role(
        name=verb,
        image=image,
        entrypoint="python",
        args=["-P", "-m", *command, verb, *args],  # -P: a checkout's folders must not hide packages of their name
        resource=specs.Resource(cpu=cpu, gpu=0, memMB=memMB),
        env={"OMP_WAIT_POLICY": "PASSIVE"} | (env or {}),
        mounts=specs.parse_mounts(mounts) if mounts else [],
    )
    return specs.AppDef(name=f"friendrec-{verb}", roles=[role])
