"""Drift and diffusion of many members, and steps of all of them, mapped from those of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.problems.ensemble import Array, EnsembleProblem
from pysciml_node.problems.sde import SDEProblem
from pysciml_node.replay.members.field import MembersField
from pysciml_node.steps.field import FlatField, without_gradients
from pysciml_node.stochastic.fields import Fields
from pysciml_node.stochastic.members.paths import Motions
from pysciml_node.stochastic.step import SDEMethod, Stepper, Taken


@dataclass(frozen=True)
class _Motion:
    """The Brownian motion of one member, as it is mapped over."""

    h: Tensor
    w: Tensor
    area: Tensor | None


class _Plain(FlatField):
    """The drift inside of a map, where nothing is looked at."""

    @override
    def __call__(self, t: Tensor, u: Tensor) -> Tensor:
        return self._evaluate(t, u)


class _FieldsOfOne(Fields):
    def __init__(self, problem: SDEProblem) -> None:
        super().__init__(problem)
        self.drift = _Plain(problem, self.given)

    @override
    def diffusion(self, t: Tensor, u: Tensor) -> Tensor:
        return self._diffusion(t, u)


@dataclass(frozen=True)
class TakenByAll:
    """What a step of many members gives.

    Attributes:
        end: vectors at the ends, `(L, N)`.
        error: error estimates, `(L, N)`, where they were asked for.
        last: drift and diffusion of the last stage side by side, where they were asked for.
    """

    end: Tensor
    error: Tensor | None
    last: Tensor | None


class MembersFields(MembersField):
    """Drift and diffusion on the flat states of some members.

    Their values stand side by side: the drift's `N`, then those of the diffusion.

    Args:
        ensemble: of a stochastic equation.
        method: of the steps.

    Attributes:
        nfe_diffusion: evaluations of the diffusion for each member, `(M,)`.
        stepper: takes the steps of one member.
    """

    def __init__(self, ensemble: EnsembleProblem, method: SDEMethod) -> None:
        super().__init__(ensemble)
        problem = ensemble.member(0)
        assert isinstance(problem, SDEProblem)
        self.given["diffusion"] = problem.diffusion
        self.fields = _FieldsOfOne(problem)
        self._looks = self.fields.nfe_diffusion
        self.stepper = Stepper(method, self.fields)
        self.nfe_diffusion = np.zeros(len(ensemble), dtype=np.int64)

    @override
    def _give(self, given: dict[str, Any]) -> None:
        self.fields.given = self.fields.drift.given = given

    @override
    def restart(self) -> None:
        super().restart()
        # The look at the diffusion's shape counts, as it does for one.
        self.nfe_diffusion[:] = 1 + self._looks

    @override
    def tally(self, rows: Array, evaluations: int = 1) -> None:
        super().tally(rows, evaluations)
        np.add.at(self.nfe_diffusion, rows, evaluations)

    @override
    def _mapped(self, t: Tensor, u: Tensor, p: Any) -> Tensor:
        def slope(t: Tensor, u: Tensor) -> tuple[Tensor, ...]:
            return self.fields.drift(t, u), self.fields.diffusion(t, u)

        at = self.stepper.first_argument(u)
        return torch.cat(self.over(slope, p, t, at), dim=1)

    def split(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """Drift and diffusion out of a pair that stands side by side."""
        entries = self.stepper.entries
        return k[:, :entries], k[:, entries:]

    def magnitude(self, g: Tensor) -> Tensor:
        """Standard deviation of `g dW / dt**0.5` for each entry, `(L, N)`."""
        layout = self.fields.layout
        return g.view(len(g), layout.entries, -1).norm(dim=-1) if layout.matrix else g.abs()

    def take(
        self, t: Tensor, u: Tensor, motions: Motions, p: Any, first: Tensor | None, judged: bool
    ) -> TakenByAll:
        """Steps of some members.

        Args:
            t: where they start, `(L,)`.
            u: the vectors there, `(L, N)`.
            motions: Brownian motion over the steps.
            p: parameters of these members.
            first: drift and diffusion of the first stages, where they are known.
            judged: whether error estimates and last stages are asked for.
        """
        like, stepper = self.stepper.method.like, self.stepper
        h = torch.from_numpy(motions.h).to(like)
        known = () if first is None else self.split(first)
        fsal = stepper.method.tableau.fsal

        def one(t: Tensor, u: Tensor, h: Tensor, w: Tensor, area: Tensor, *known: Tensor) -> Any:
            motion = _Motion(h, w, area)
            pair = (known[0], known[1]) if known else None
            end, taken = stepper.take(t, u, motion, with_error=judged, first=pair)
            out = [end]
            if judged:
                out.append(stepper.error_vector(taken, u, motion))
            if fsal:
                out += _last(taken)
            return tuple(out)

        def take(t: Tensor, u: Tensor) -> Tensor:
            out = self.over(one, p, t, u, h, motions.w, motions.area, *known)
            return torch.cat(out, dim=1)

        if torch.is_grad_enabled():
            every = take(t, u)
        else:
            every = without_gradients(take, t, u, self.watch)
        sizes = [u.shape[1], stepper.entries if judged else 0]
        end, error, last = torch.split(every, [*sizes, every.shape[1] - sum(sizes)], dim=1)
        return TakenByAll(end, error if judged else None, last if fsal else None)


def _last(taken: Taken) -> list[Tensor]:
    f, g = taken.f[-1], taken.g[-1]
    assert f is not None
    assert g is not None
    return [f, g]
