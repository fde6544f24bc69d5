"""Gradients of solves of few steps, beside torchdiffeq's `odeint`, on one core.

    python benchmarks/few_steps.py

The fixed cost of a solve decides here: the field is a 2-50-2 tanh MLP, its batch 20, in float32.
Both packages take the same steps, in turns; time is that of a solve with its gradient with respect
to the state and the weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import timing


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--core", type=int, default=None)
    arguments.add_argument("--repeats", type=int, default=20)
    chosen = arguments.parse_args()
    timing.pin(chosen.core)
    import torch

    torch.set_num_threads(1)
    header = ["", "odeint, us", "here, us", "CPU, ratio", "difference"]
    rows = []
    for name, calls in _cases(torch).items():
        ours, theirs = (calls[key]() for key in ("here", "odeint"))
        pairs = zip(ours, theirs, strict=True)
        difference = max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)
        times = timing.interleave(calls, chosen.repeats)
        shown = [
            f"{1e3 * x.median:.0f} [{1e3 * x.low:.0f}, {1e3 * x.high:.0f}]"
            for x in (times["odeint"], times["here"])
        ]
        ratio = times["here"].cpu / times["odeint"].cpu
        rows.append([name, *shown, f"{ratio:.2f}", f"{difference:.0e}"])
    print(timing.table(header, rows))


def _cases(torch: Any) -> dict[str, dict[str, Callable[[], Any]]]:
    import torchdiffeq

    import pysciml_node as psn

    torch.manual_seed(0)

    class Field(torch.nn.Module):  # type: ignore[misc, name-defined]
        """A tanh MLP."""

        def __init__(self) -> None:
            super().__init__()
            layers = torch.nn.Linear(2, 50), torch.nn.Tanh(), torch.nn.Linear(50, 2)
            self.net = torch.nn.Sequential(*layers)

        def forward(self, t: Any, u: Any) -> Any:
            return self.net(u)

    field, u0 = Field(), torch.randn(20, 2, requires_grad=True)
    inputs, times = [u0, *field.parameters()], torch.tensor([0.0, 1.0])

    def here(algorithm: Any, **options: Any) -> Callable[[], Any]:
        def gradient() -> Any:
            u1 = psn.solve(psn.ODEProblem(field, u0, (0.0, 1.0)), algorithm, **options).u1
            return torch.autograd.grad(u1.square().sum(), inputs)

        return gradient

    def odeint(method: str, **options: Any) -> Callable[[], Any]:
        def gradient() -> Any:
            u1 = torchdiffeq.odeint(field, u0, times, method=method, **options)[-1]
            return torch.autograd.grad(u1.square().sum(), inputs)

        return gradient

    fixed, loose = psn.FixedStep(), {"rtol": 1e-3, "atol": 1e-3}
    return {
        "Euler, 1 step": {
            "odeint": odeint("euler"),
            "here": here(psn.Euler(), controller=fixed, dt0=1.0),
        },
        "RK4, 4 steps": {
            # Theirs is the rule of three eighths, which takes as many evaluations.
            "odeint": odeint("rk4", options={"step_size": 0.25}),
            "here": here(psn.RK4(), controller=fixed, dt0=0.25),
        },
        "dopri5, tolerance 1e-3": {
            "odeint": odeint("dopri5", **loose),
            "here": here(psn.DP5(), controller=psn.IController(), **loose),
        },
    }


if __name__ == "__main__":
    main()
