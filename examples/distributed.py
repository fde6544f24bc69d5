"""Training on several processes, with checkpoints that any other number of them can go on from.

Trains a normalizing flow of two moons or a classifier of handwritten digits, by
`DistributedDataParallel` or by FSDP2 (`fully_shard`), on as many processes as `torchrun` starts:

    torchrun --nproc-per-node 2 examples/distributed.py --model flow --parallel ddp
    torchrun --nproc-per-node 2 examples/distributed.py --model classifier --parallel fsdp

Each process takes its share of every batch. A step depends on the seed and its number alone: which
samples it takes, and the random numbers of penalties. So a run that goes on from a checkpoint, on
whatever number of processes, goes on as if nothing had happened:

    torchrun --nproc-per-node 2 examples/distributed.py --steps 200 --checkpoint runs/distributed
    torchrun --nproc-per-node 4 examples/distributed.py --steps 400 --checkpoint runs/distributed

A budget of evaluations, `--budget 40`, holds the mean over the processes, which share its weight.
"""

import argparse
import datetime
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import pysciml_node as psn
from pysciml_node.data import digits
from pysciml_node.data.plane import plane
from pysciml_node.layers.timed import TimedField


class FlowOfMoons(nn.Module):
    """The density of two moons; a call gives the loss and the evaluations."""

    def __init__(self, weight: float | psn.Budget, tolerance: float) -> None:
        super().__init__()
        field = TimedField.mlp(2, (32, 32), start_at_rest=False)
        penalty = psn.KineticEnergy(weight)
        self.flow = psn.CNF(
            field, event_shape=2, rtol=tolerance, atol=tolerance, regularizers=[penalty]
        )

    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Fresh points."""
        return (plane("two-moons", count, generator=generator).x,)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        """Negative log-likelihood with the penalty."""
        density = self.flow(x)
        return density.penalty - density.log_prob.mean(), density.nfe


class ClassifierOfDigits(nn.Module):
    """A neural ODE between two linear layers; a call gives the loss and the evaluations."""

    def __init__(self, weight: float | psn.Budget, tolerance: float) -> None:
        super().__init__()
        self.data = digits().train
        self.encoder = nn.Linear(64, 16)
        field = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
        penalty = psn.LocalError("unbiased", weight)
        self.node = psn.NeuralODE(field, rtol=tolerance, atol=tolerance, regularizers=[penalty])
        self.head = nn.Linear(16, 10)

    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """A random part of the training data."""
        part = self.data[torch.randperm(len(self.data), generator=generator)[:count]]
        return part.x.flatten(1), part.y

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, int]:
        """Cross entropy with the penalty."""
        solution = self.node(self.encoder(x))
        loss = cross_entropy(self.head(solution.u1), y)
        return loss + solution.penalty, solution.stats.nfe


MODELS = {"flow": FlowOfMoons, "classifier": ClassifierOfDigits}


class Run:
    """A model on all processes of the group, its optimizer and how far it is.

    Args:
        options: the command line's.
        device: of this process.
    """

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device, self.step = options, device, 0
        weight = psn.Budget(options.budget) if options.budget else options.weight
        torch.manual_seed(options.seed)  # the same parameters everywhere
        self.inner = MODELS[options.model](weight, options.tolerance).to(device)
        self.inner = self.inner.to(getattr(torch, options.dtype))
        self.model: nn.Module = self.inner
        if options.parallel == "fsdp":
            # Whole layers are sharded: a field by itself would be gathered at every evaluation,
            # and its weights would be gone when the backward pass goes through the steps again.
            fully_shard(self.inner, mesh=init_device_mesh(device.type, (dist.get_world_size(),)))
        else:
            self.model = DistributedDataParallel(self.inner)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=options.learning_rate)

    def gradients(self) -> tuple[float, int]:
        """Take the gradients of the next step; returns loss and evaluations of this process."""
        seed = self.options.seed * 1_000_003 + self.step
        batch = self.inner.batch(self.options.batch_size, torch.Generator().manual_seed(seed))
        rank, processes = dist.get_rank(), dist.get_world_size()
        dtype = getattr(torch, self.options.dtype)
        share = [x[rank::processes].to(self.device) for x in batch]
        share = [x.to(dtype) if x.is_floating_point() else x for x in share]
        torch.manual_seed(seed)  # the same random times and probes everywhere
        self.optimizer.zero_grad()
        loss, nfe = self.model(*share)
        loss.backward()
        return float(loss.detach()), nfe

    def advance(self) -> tuple[float, int]:
        """Take a step; returns loss and evaluations of this process."""
        result = self.gradients()
        self.optimizer.step()
        self.step += 1
        return result

    def state(self) -> dict[str, Any]:
        """All that decides how the run goes on, by names that no number of processes changes."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": self.step}

    def save(self, folder: Path) -> None:
        """Write a checkpoint into a folder of its own, of which every process writes its part."""
        dcp.save(self.state(), checkpoint_id=folder / f"step-{self.step:08d}")

    def resume(self, folder: Path) -> None:
        """Go on from the last whole checkpoint, if there is one, of any number of processes."""
        whole = sorted(path.parent for path in folder.glob("step-*/.metadata"))  # written last
        if not whole:
            return
        state = self.state()
        dcp.load(state, checkpoint_id=whole[-1])
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.step = state["step"]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="flow")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=256, help="of all processes together")
    parser.add_argument("--learning-rate", type=float, default=0.005)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--weight", type=float, default=0.01, help="of the penalty")
    parser.add_argument("--budget", type=float, help="evaluations, in place of a weight")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="folder to go on from, and to save in")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train on the processes that torchrun has started."""
    options = parse(arguments)
    if "RANK" not in os.environ:
        raise SystemExit(
            "distributed.py is one process of several, but was started alone.\n"
            "  Start all: torchrun --nproc-per-node 2 examples/distributed.py"
        )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=5))
    try:
        run = Run(options, device)
        if options.checkpoint:
            run.resume(options.checkpoint)
        while run.step < options.steps:
            loss, nfe = run.advance()
            if dist.get_rank() == 0 and run.step % 50 == 0:
                print(f"step {run.step}: loss {loss:.4f}, {nfe} evaluations", flush=True)
            if options.checkpoint and (run.step % 100 == 0 or run.step == options.steps):
                run.save(options.checkpoint)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
