"""SDEs as torchsde describes them: one object with its drift, its diffusion and their products."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from pysciml_node import checks
from pysciml_node.compat.torchsde.settings import NOISE_TYPES, SDE_TYPES
from pysciml_node.problems.sde import Noise
from pysciml_node.stochastic.relative_entropy import entropy_rate

Function = Callable[..., Any]

# The methods of an SDE, by the keys of `names`.
_NAMES = {
    "drift": "f",
    "diffusion": "g",
    "prior_drift": "h",
    "diffusion_prod": "g_prod",
    "drift_and_diffusion": "f_and_g",
    "drift_and_diffusion_prod": "f_and_g_prod",
}


class BaseSDE(nn.Module):
    """Base of SDEs: a module with a noise type and an interpretation.

    Args:
        noise_type: `"diagonal"`, `"scalar"`, `"additive"` or `"general"`.
        sde_type: `"ito"` or `"stratonovich"`.

    Raises:
        ValueError: another word.
    """

    def __init__(self, noise_type: str, sde_type: str) -> None:
        super().__init__()
        self.noise_type = checks.choice("noise_type", noise_type, NOISE_TYPES)
        self.sde_type = checks.choice("sde_type", sde_type, SDE_TYPES)


class SDEIto(BaseSDE):
    """Base of SDEs in Ito's interpretation.

    Args:
        noise_type: as in `BaseSDE`.
    """

    def __init__(self, noise_type: str) -> None:
        super().__init__(noise_type, "ito")


class SDEStratonovich(BaseSDE):
    """Base of SDEs in Stratonovich's interpretation.

    Args:
        noise_type: as in `BaseSDE`.
    """

    def __init__(self, noise_type: str) -> None:
        super().__init__(noise_type, "stratonovich")


class Equation:
    """The functions of an SDE, whichever of its methods it defines.

    Args:
        sde: object with `f` or a method that has it, and `g` or one that has it.
        names: other names for its methods, by `"drift"`, `"diffusion"`, `"prior_drift"`,
            `"diffusion_prod"`, `"drift_and_diffusion"`, `"drift_and_diffusion_prod"`.
        logqp: whether the state has one more entry, the relative entropy so far.

    Raises:
        TypeError: `names` is no dict.
        ValueError: a method is missing, or a type is none.
    """

    def __init__(self, sde: Any, names: Mapping[str, str] | None, logqp: bool) -> None:
        self.noise = cast(Noise, _type_of(sde, "noise_type", NOISE_TYPES))
        self.interpretation = _type_of(sde, "sde_type", SDE_TYPES)
        if names is not None and not isinstance(names, Mapping):
            checks.refuse("names", "a dict", names, 'Write {"drift": "forward"}.')
        named = {
            method: getattr(sde, (names or {}).get(key, method), None)
            for key, method in _NAMES.items()
        }
        self._f: Function | None = named["f"]
        self._g: Function | None = named["g"]
        self._h: Function | None = named["h"]
        self._both = _Joint(named["f_and_g"]) if named["f_and_g"] is not None else None
        self._product, self._both_product = named["g_prod"], named["f_and_g_prod"]
        self.logqp = logqp
        if logqp and any(named[key] is None for key in "fgh"):
            raise ValueError(
                "logqp=True needs drift, diffusion and prior drift, but the sde lacks "
                f"{', '.join(key for key in 'fgh' if named[key] is None)}.\n"
                '  Define them, or name them: names={"prior_drift": ...}.'
            )
        if logqp:
            self._both = _Joint(self._with_entropy)
        if all(x is None for x in (self._f, self._both, self._both_product)):
            raise ValueError(
                "the sde must have a drift: f, f_and_g or f_and_g_prod, but has none.\n"
                '  Define f(t, y), or name it: names={"drift": ...}.'
            )
        if all(x is None for x in (self._g, self._both, self._product, self._both_product)):
            raise ValueError(
                "the sde must have a diffusion: g, f_and_g, g_prod or f_and_g_prod, but has none.\n"
                '  Define g(t, y), or name it: names={"diffusion": ...}.'
            )

    def share(self, shared: bool) -> None:
        """Whether a method asks for drift and diffusion of a state at one time."""
        if self._both is not None:
            self._both.shared = shared

    @property
    def products_only(self) -> bool:
        """Whether the diffusion is known by its products with vectors alone."""
        return self._g is None and self._both is None

    def drift(self, t: Tensor, y: Tensor) -> Tensor:
        """The drift, `(B, d)`."""
        if self._f is not None and not self.logqp:
            return cast(Tensor, self._f(t, y))
        if self._both is not None:
            return self._both.first(t, y)
        assert self._both_product is not None
        # The drift does not depend on the vector.
        return cast(Tensor, self._both_product(t, y, self._vectors(y)[0])[0])

    def _with_entropy(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Drift and diffusion, with the relative entropy to the prior as one more entry."""
        assert self._f is not None
        assert self._g is not None
        assert self._h is not None
        y = y[:, :-1]
        f, g, h = self._f(t, y), self._g(t, y), self._h(t, y)
        rate = entropy_rate(f - h, g, matrix=self.noise != "diagonal")
        still = torch.zeros_like(g[:, :1])
        return torch.cat((f, rate.unsqueeze(-1)), dim=-1), torch.cat((g, still), dim=1)

    def diffusion(self, t: Tensor, y: Tensor) -> Tensor:
        """The diffusion: `(B, d)` for diagonal and scalar noise, `(B, d, m)` for the others."""
        if self._g is not None and not self.logqp:
            g = cast(Tensor, self._g(t, y))
        elif self._both is not None:
            g = self._both.second(t, y)
        else:
            g = self._from_products(t, y)
        return g.squeeze(-1) if self.noise == "scalar" and g.ndim == 3 else g

    def _from_products(self, t: Tensor, y: Tensor) -> Tensor:
        """The matrix whose products are known, column by column."""
        columns = []
        for vector in self._vectors(y):
            if self._product is not None:
                columns.append(self._product(t, y, vector))
            else:
                assert self._both_product is not None
                columns.append(self._both_product(t, y, vector)[1])
        if self.noise == "diagonal":
            return cast(Tensor, columns[0])
        return torch.stack(columns, dim=-1)

    # Motions of each sample, where only products show them.
    motions: int | None = None

    def _vectors(self, y: Tensor) -> list[Tensor]:
        """Vectors whose products make up the diffusion."""
        if self.noise == "diagonal":
            return [torch.ones_like(y)]
        count = 1 if self.noise == "scalar" else self.motions
        if count is None:
            raise ValueError(
                "the number of Brownian motions is not known: the sde has only products with its "
                "diffusion.\n  Pass bm, or define g."
            )
        rows = torch.eye(count, dtype=y.dtype, device=y.device)
        return [row.expand(y.shape[0], count) for row in rows]


class _Joint:
    """Drift and diffusion that one function returns: an evaluation serves both, once.

    Args:
        both: `f_and_g`.

    Attributes:
        shared: whether the drift and the diffusion of one state are those of one time, too.
    """

    def __init__(self, both: Function) -> None:
        self._call = both
        self.shared = True
        # Not searched for what the equation uses: it passes from one line to the next.
        self._kept = threading.local()

    def first(self, t: Tensor, y: Tensor) -> Tensor:
        """The drift; the diffusion is kept for the same state."""
        f, g = self._call(t, y)
        # Holding the state keeps its memory from becoming another's.
        self._kept.found = (_place(y), y, g) if self.shared else None
        return cast(Tensor, f)

    def second(self, t: Tensor, y: Tensor) -> Tensor:
        """The diffusion."""
        found = getattr(self._kept, "found", None)
        self._kept.found = None
        if found is not None and found[0] == _place(y):
            return cast(Tensor, found[2])
        return cast(Tensor, self._call(t, y)[1])


def _place(y: Tensor) -> tuple[Any, ...]:
    """What tells two states apart: their memory, and whether they are recorded."""
    version = 0 if y.is_inference() else y._version
    return y.data_ptr(), y.shape, version, torch.is_grad_enabled(), y.requires_grad


def _type_of(sde: Any, name: str, known: Any) -> str:
    if not hasattr(sde, name):
        raise ValueError(
            f"the sde must have the attribute {name}, but has none.\n"
            f"  Set it to one of {', '.join(known)}, or derive from SDEIto or SDEStratonovich."
        )
    return cast(str, checks.choice(name, getattr(sde, name), known))
