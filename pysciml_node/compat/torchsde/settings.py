"""The names of methods, noises and interpretations, as `torchsde.settings` has them."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["LEVY_AREA_APPROXIMATIONS", "METHODS", "METHOD_OPTIONS", "NOISE_TYPES", "SDE_TYPES"]


class Names:
    """Words, as attributes of one object."""

    def __init__(self, *words: str, **renamed: str) -> None:
        self.__dict__.update({word.replace("-", "_"): word for word in words}, **renamed)

    def __contains__(self, word: object) -> bool:
        return word in self.__dict__.values()

    def __iter__(self) -> Iterator[str]:
        return iter(self.all())

    def __len__(self) -> int:
        # The compiler of torch asks it of whatever can be iterated over.
        return len(self.__dict__)

    def __getattr__(self, name: str) -> str:
        raise AttributeError(f"there is no name {name!r}.\n  There are {', '.join(self)}.")

    def all(self) -> list[str]:
        """All words, sorted."""
        return sorted(self.__dict__.values())

    def __repr__(self) -> str:
        return str(self.all())


METHODS = Names(
    "euler",
    "milstein",
    "srk",
    "midpoint",
    "reversible_heun",
    "adjoint_reversible_heun",
    "heun",
    "euler_heun",
    log_ode_midpoint="log_ode",
)
NOISE_TYPES = Names("general", "diagonal", "scalar", "additive")
SDE_TYPES = Names("ito", "stratonovich")
LEVY_AREA_APPROXIMATIONS = Names("none", "space-time", "davie", "foster")
METHOD_OPTIONS = Names("grad_free")
