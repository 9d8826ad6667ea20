"""Everything that searches, kept to one thread for a while, so that speeds of different libraries can be compared."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import faiss
import numba
import torch
from threadpoolctl import threadpool_limits

from friendrec.pipeline.retrieval import clusters, exact, parts

POOLS: tuple[Any, ...] = (clusters, exact, parts)
"""Modules whose `CORES` says over how many threads they spread queries."""


@contextmanager
def one_thread() -> Iterator[None]:
    """BLAS, OpenMP, FAISS, torch, numba and our own pools; afterwards as before."""
    cores = [module.CORES for module in POOLS]
    before = faiss.omp_get_max_threads(), torch.get_num_threads(), numba.get_num_threads()
    with threadpool_limits(1):
        try:
            for module in POOLS:
                module.CORES = 1
            faiss.omp_set_num_threads(1)
            torch.set_num_threads(1)
            numba.set_num_threads(1)
            yield
        finally:
            for module, number in zip(POOLS, cores, strict=True):
                module.CORES = number
            faiss.omp_set_num_threads(before[0])
            torch.set_num_threads(before[1])
            numba.set_num_threads(before[2])
