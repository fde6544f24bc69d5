"""Members of an ensemble in many processes, or on many machines."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pysciml_node import checks


@dataclass(frozen=True)
class Parallel(checks.Configured):
    """Members handed to joblib in chunks: `solve(ensemble, members=Parallel())`.

    Processes of this machine do the work, or whatever `joblib.parallel_config` names: threads, a
    Dask or a Ray cluster. Each chunk is solved as one ensemble where it is sent. States, codes and
    counts come back, and Brownian paths are those of a solve in one place.

    Gradients are computed by the workers too: a backward pass sends each chunk again, with the
    cotangents of its states. It is solved again there, compared with the first time, and pulled
    back. `u` and `u1` of the solution carry these gradients. The solution of a single member,
    `solution[m]`, is computed here when it is asked for.

    What is sent is a copy: counts and caches that a field keeps in attributes stay with the worker.
    Functions of modules are imported there by name. Needs joblib and cloudpickle
    (`pip install 'pysciml_node[parallel]'`).

    Args:
        workers: how many chunks are solved at a time, -1 for one on each core; default what
            `joblib.parallel_config` says, and -1 where it says nothing.
        chunk: members in each; default so many that each worker has two chunks.

    Examples:
        >>> import torch, pysciml_node as psn
        >>> problem = psn.ODEProblem(lambda t, u: -u, torch.ones(1).double(), (0.0, 1.0))
        >>> starts = torch.tensor([[1.0], [2.0], [3.0]]).double()
        >>> ensemble = psn.EnsembleProblem(problem, starts)
        >>> solution = psn.solve(ensemble, members=psn.Parallel(workers=1, chunk=2))
        >>> [round(x, 3) for x in solution.u1[:, 0].tolist()]
        [0.368, 0.736, 1.104]
    """

    workers: int | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.workers is not None:
            workers = checks.whole("workers", self.workers, at_least=-1)
            if workers == 0:
                raise ValueError(
                    "workers must be at least 1, or -1 for one on each core, but is 0.\n"
                    "  In this process: leave members= out."
                )
            checks.settle(self, workers=workers)
        if self.chunk is not None:
            checks.settle(self, chunk=checks.whole("chunk", self.chunk, at_least=1))

    def slices(self, size: int, workers: int) -> list[slice]:
        """The members of each chunk.

        Args:
            size: how many members there are.
            workers: how many there are of these.
        """
        chunk = self.chunk or math.ceil(size / (1 if workers == 1 else 2 * workers))
        return [slice(first, min(first + chunk, size)) for first in range(0, size, chunk)]
