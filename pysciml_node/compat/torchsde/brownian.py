"""Brownian motion between any two times, as torchsde's classes give it.

The motion is a function of its entropy: the same whatever is asked for, and in which order. No
tree of Python objects is kept, only the last branch of a virtual one
(`pysciml_node.stochastic.virtual_tree`), on the device of the motion.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.compat.torchsde.settings import LEVY_AREA_APPROXIMATIONS
from pysciml_node.stochastic.levy import levy_area
from pysciml_node.stochastic.normals import GeneratedNormals
from pysciml_node.stochastic.ticks import Ticks
from pysciml_node.stochastic.virtual_tree import Increment, VirtualTree

Scalar = float | Tensor
Found = Tensor | tuple[Tensor | None, ...]


class BaseBrownian(ABC):
    """Brownian motion that can be asked for its increments.

    Attributes:
        dtype: of the increments.
        device: where they are.
        shape: of an increment.
        levy_area_approximation: `"none"`, `"space-time"`, `"davie"` or `"foster"`.
    """

    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    levy_area_approximation: str

    @abstractmethod
    def __call__(
        self, ta: Scalar, tb: Scalar | None = None, return_U: bool = False, return_A: bool = False
    ) -> Any:
        """The increment from `ta` to `tb`.

        Args:
            ta: start; the end of an interval from the first time where `tb` is left out.
            tb: end.
            return_U: return `U`, the integral of `W_s - W_ta` over the interval, too.
            return_A: return an approximation of Levy's area too.

        Returns:
            `W`, or a tuple of `W` and what else was asked for; `None` stands for what
            `levy_area_approximation` leaves out.
        """

    def size(self) -> torch.Size:
        """The shape of an increment."""
        return self.shape

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"device={str(self.device)!r}, "
            f"levy_area_approximation={self.levy_area_approximation!r})"
        )


def as_time(name: str, value: Any) -> float:
    """A time; of a float32 tensor the decimal number that is written for it.

    So `torch.tensor(0.3)` and `0.3` are one time.
    """
    if isinstance(value, Tensor) and value.dtype == torch.float32 and value.numel() == 1:
        return checks.number(name, float(str(np.float32(value.item()))))
    return checks.number(name, value.item() if isinstance(value, Tensor) else value)


class BrownianInterval(BaseBrownian):
    """Brownian motion on `[t0, t1]`, with space-time and approximate Levy area.

    The increments add up, `W(s, u) = W(s, t) + W(t, u)`, and they are the same whenever they are
    asked for. Round numbers are found fastest; so are whole multiples of `dt` where that is given.

    Args:
        t0: start.
        t1: end.
        size: shape of an increment; that of `W` or `H` by default.
        dtype: floating point; that of `W` or `H`, or the default dtype. Half precision is computed
            in float32.
        device: likewise; the CPU by default. Motions agree on one kind of device only.
        entropy: a whole number, or several, that choose the motion; drawn from torch's generator
            by default.
        dt: a step of which multiples are asked for, from `t0`.
        tol: times are rounded to the power of ten at this number. With 0 they are told apart to
            nine digits of the interval, or to a millionth of `dt`.
        pool_size: of the sequence of seeds that `entropy` is hashed by (numpy's `SeedSequence`).
        cache_size: splits of the last branch that are kept at most, two intervals each; a branch
            has about 30, whatever has been asked for.
        halfway_tree: accepted: with or without it the motion does not depend on the queries.
        levy_area_approximation: `"none"`; `"space-time"` for `U`; `"davie"` or `"foster"` for `U`
            and `A`. Different choices give different motions.
        W: increment over the whole interval, `size`; drawn by default.
        H: space-time Levy area over the whole interval, likewise.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of range, or no `size`.

    Examples:
        >>> import torch
        >>> from pysciml_node.compat.torchsde import BrownianInterval
        >>> bm = BrownianInterval(0.0, 1.0, size=(4, 2), entropy=3)
        >>> whole, parts = bm(0.2, 0.9), bm(0.2, 0.5) + bm(0.5, 0.9)
        >>> torch.allclose(whole, parts, atol=1e-6)
        True

    Reference: J. Foster, T. Lyons, H. Oberhauser, SIAM J. Numer. Anal. 58 (2020) 1393-1421.
    """

    def __init__(
        self,
        t0: Scalar = 0.0,
        t1: Scalar = 1.0,
        size: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        entropy: int | Sequence[int] | None = None,
        dt: Scalar | None = None,
        tol: float = 0.0,
        pool_size: int = 8,
        cache_size: int | None = 45,
        halfway_tree: bool = False,
        levy_area_approximation: str = "none",
        W: Tensor | None = None,
        H: Tensor | None = None,
    ) -> None:
        self.t0, self.t1 = as_time("t0", t0), as_time("t1", t1)
        if self.t0 > self.t1:
            raise ValueError(
                f"t0 must not be later than t1, but they are {self.t0} and {self.t1}.\n"
                "  Exchange them; ReverseBrownian turns the time round."
            )
        self.dt = None if dt is None else checks.number("dt", as_time("dt", dt), above=0)
        self.tol = checks.number("tol", tol, at_least=0)
        self.halfway_tree = checks.flag("halfway_tree", halfway_tree)
        if self.halfway_tree and (self.dt is not None or self.tol == 0):
            raise ValueError(
                f"halfway_tree=True needs a positive tol and no dt, but they are {tol} and {dt}.\n"
                "  Leave it out: the motion does not depend on the queries anyway."
            )
        self.levy_area_approximation = checks.choice(
            "levy_area_approximation", levy_area_approximation, LEVY_AREA_APPROXIMATIONS
        )
        self.pool_size = checks.whole("pool_size", pool_size, at_least=1)
        self.cache_size = (
            None if cache_size is None else checks.whole("cache_size", cache_size, at_least=0)
        )
        self.shape, self.dtype, self.device = _layout(size, dtype, device, W, H)
        self.entropy = int(torch.randint(2**31 - 1, ())) if entropy is None else _entropy(entropy)
        self._tree = self._planted()
        given = [None if x is None else x.reshape(-1).to(self._tree.normals.dtype) for x in (W, H)]
        if W is not None or H is not None:
            self._tree.given(*given)

    def _planted(self) -> VirtualTree:
        """The tree, with times in ticks of which round numbers are whole."""
        span = self.t1 - self.t0
        if self.tol > 0:
            self._ticks = Ticks.of_digits(-int(math.log10(self.tol)), span)
        elif self.dt is not None:
            self._ticks = Ticks.of_steps(self.t0, self.dt, span)
        else:
            self._ticks = Ticks.for_span(span)
        seed = np.random.SeedSequence(self.entropy, pool_size=self.pool_size)
        wide = self.dtype == torch.float64
        area = self.levy_area_approximation != "none"
        return VirtualTree(
            GeneratedNormals(
                int(seed.generate_state(1, np.uint64)[0]),
                torch.float64 if wide else torch.float32,
                self.device,
            ),
            math.prod(self.shape),
            (self._ticks.at(self.t0), self._ticks.at(self.t1)),
            self._ticks,
            area=area,
            depth=10**9 if self.cache_size is None else self.cache_size,
        )

    def __call__(
        self, ta: Scalar, tb: Scalar | None = None, return_U: bool = False, return_A: bool = False
    ) -> Any:
        """The increment from `ta` to `tb`; see `BaseBrownian`.

        Raises:
            RuntimeError: `ta` is later than `tb`.
        """
        if tb is None:
            warnings.warn(
                f"{type(self).__name__} is made to be asked for intervals, not for points.",
                stacklevel=2,
            )
            ta, tb = self.t0, ta
        start, stop = self._inside("ta", ta), self._inside("tb", tb)
        if start > stop:
            raise RuntimeError(
                f"ta must not be later than tb, but they are {start} and {stop}.\n"
                "  Exchange them, and change the sign of W."
            )
        places = self._ticks.at(start), self._ticks.at(stop)
        with torch.inference_mode(False):
            return self._returned(self.motion(start, stop), places, return_U, return_A)

    def motion(self, start: float, end: float) -> Increment:
        """The motion between two times inside, flat; not to be changed in place."""
        # What is kept must not belong to one caller's mode.
        with torch.inference_mode(False):
            return self._tree.motion(self._ticks.at(start), self._ticks.at(end))

    def found_first(self, low: float, high: float) -> float:
        """The time between two that is found most quickly."""
        ticks = self._ticks
        return ticks.time(self._tree.first_between(ticks.at(low), ticks.at(high)))

    def _inside(self, name: str, value: Scalar) -> float:
        t = as_time(name, value)
        if self.t0 <= t <= self.t1:
            return t
        warnings.warn(
            f"{name} should lie in [{self.t0}, {self.t1}], but is {t}: the nearer end is used.",
            stacklevel=3,
        )
        return min(max(t, self.t0), self.t1)

    def _returned(
        self, motion: Increment, places: tuple[int, int], return_U: bool, return_A: bool
    ) -> Found:
        found: list[Tensor | None] = [self._shaped(motion.w)]
        if return_U:
            u = None if motion.area is None else motion.h * (motion.w / 2 + motion.area)
            found.append(None if u is None else self._shaped(u))
        if return_A:
            found.append(self._levy_area(motion, places))
        return tuple(found) if len(found) > 1 else self._shaped(motion.w)

    def _shaped(self, flat: Tensor) -> Tensor:
        """In the form of an increment; never what is kept itself."""
        return flat.to(self.dtype, copy=True).view(self.shape)

    def _levy_area(self, motion: Increment, places: tuple[int, int]) -> Tensor | None:
        if self.levy_area_approximation not in ("davie", "foster"):
            return None
        assert motion.area is not None
        w, area = motion.w.view(self.shape), motion.area.view(self.shape)
        if w.ndim < 2:
            # One motion a sample: it has no area with another one.
            return torch.zeros_like(w, dtype=self.dtype)
        foster = self.levy_area_approximation == "foster"
        numbers = self._tree.normals.at([(1, *places)], w.numel() * w.shape[-1])
        noise = numbers.view(*w.shape, w.shape[-1])
        return levy_area(motion.h, w, area, noise, foster=foster).to(self.dtype)


def _entropy(entropy: Any) -> int | list[int]:
    """One whole number, or a list of them."""
    if checks.as_float(entropy) is not None:
        return checks.whole("entropy", entropy, at_least=0)
    if not isinstance(entropy, Iterable) or isinstance(entropy, str | bytes):
        checks.refuse("entropy", "a whole number, or a list of them", entropy, "Write entropy=1.")
    return [checks.whole(f"entropy[{i}]", x, at_least=0) for i, x in enumerate(entropy)]


def _layout(
    size: Sequence[int] | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    *given: Tensor | None,
) -> tuple[torch.Size, torch.dtype, torch.device]:
    """Shape, dtype and device, by what says them.

    Raises:
        TypeError: `W` or `H` is no floating-point tensor.
        ValueError: nothing says the size, or two things say different ones.
    """
    tensors = {
        name: checks.tensor(name, x, floating=True)
        for name, x in zip("WH", given, strict=True)
        if x is not None
    }
    sizes = [] if size is None else [torch.Size(checks.shape("size", size))]
    sizes += [x.shape for x in tensors.values()]
    if not sizes:
        raise ValueError("size must be given, or W or H.\n  Write size=(batch, channels).")
    dtypes = ([] if dtype is None else [dtype]) + [x.dtype for x in tensors.values()]
    devices = [] if device is None else [_device(device)]
    devices += [x.device for x in tensors.values()]
    for what, found in (("size", sizes), ("dtype", dtypes), ("device", devices)):
        if any(one != found[0] for one in found):
            raise ValueError(
                f"size, W and H must agree in {what}, but have {', '.join(map(str, found))}.\n"
                "  Leave the argument out, or convert W and H."
            )
    chosen = dtypes[0] if dtypes else torch.get_default_dtype()
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise TypeError(
            f"dtype must be a floating-point one, but is {chosen}.\n  Write dtype=torch.float32."
        )
    return sizes[0], chosen, devices[0] if devices else torch.device("cpu")


def _device(device: torch.device | str) -> torch.device:
    """A device with its index: where tensors that are made on it are."""
    found = torch.device(device)
    return found if found.type == "cpu" else torch.empty(0, device=found).device


class _FromPoint(BaseBrownian):
    """Brownian motion that is `w0` at `t0`: asked for one time, it returns its value there."""

    def __init__(self, w0: Tensor, interval: BrownianInterval) -> None:
        self.w0, self.interval = w0, interval
        self.shape, self.dtype, self.device = interval.shape, interval.dtype, interval.device
        self.levy_area_approximation = interval.levy_area_approximation

    def __call__(
        self, t: Scalar, tb: Scalar | None = None, return_U: bool = False, return_A: bool = False
    ) -> Any:
        """The increment from `t` to `tb`, or the value at `t` where `tb` is left out."""
        if tb is not None or return_U or return_A:
            return self.interval(t, tb, return_U=return_U, return_A=return_A)
        return self.interval(self.interval.t0, t) + self.w0


class BrownianPath(_FromPoint):
    """Brownian motion from `w0` at `t0`, for one unit of time.

    Args:
        t0: start.
        w0: value there, any shape.
        window_size: accepted; has no effect.

    Examples:
        >>> import torch
        >>> from pysciml_node.compat.torchsde import BrownianPath
        >>> bm = BrownianPath(t0=0.0, w0=torch.zeros(4, 1))
        >>> bm(0.0, 0.5).shape
        torch.Size([4, 1])
    """

    def __init__(self, t0: Scalar, w0: Tensor, window_size: int = 8) -> None:
        w0 = checks.tensor("w0", w0, floating=True)
        start = as_time("t0", t0)
        interval = BrownianInterval(
            start, start + 1, w0.shape, w0.dtype, w0.device, cache_size=None
        )
        super().__init__(w0, interval)


class BrownianTree(_FromPoint):
    """Brownian motion from `w0` at `t0` to `t1`, by its entropy.

    What the noise samplers of diffusion models use: one tree for each seed.

    Args:
        t0: start.
        w0: value there, any shape.
        t1: end; default `t0 + 1`.
        w1: value there; drawn by default.
        entropy: a whole number that chooses the motion.
        tol: times are rounded to the power of ten at this number.
        pool_size: as in `BrownianInterval`.
        cache_depth: accepted; has no effect.
        safety: accepted; has no effect.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: `tol` is not positive, or `t1` is before `t0`.

    Examples:
        >>> import torch
        >>> from pysciml_node.compat.torchsde import BrownianTree
        >>> x = torch.zeros(3, 8, 8)
        >>> bm = BrownianTree(0.03, x, 14.6, entropy=7)
        >>> noise = bm(0.5, 1.5)  # of variance one: the interval has this length
        >>> torch.equal(noise, BrownianTree(0.03, x, 14.6, entropy=7)(0.5, 1.5))
        True
    """

    def __init__(
        self,
        t0: Scalar,
        w0: Tensor,
        t1: Scalar | None = None,
        w1: Tensor | None = None,
        entropy: int | Sequence[int] | None = None,
        tol: float = 1e-6,
        pool_size: int = 24,
        cache_depth: int = 9,
        safety: float | None = None,
    ) -> None:
        w0 = checks.tensor("w0", w0, floating=True)
        start = as_time("t0", t0)
        interval = BrownianInterval(
            start,
            start + 1 if t1 is None else t1,
            w0.shape,
            w0.dtype,
            w0.device,
            entropy,
            tol=checks.number("tol", tol, above=0),
            pool_size=pool_size,
            halfway_tree=True,
            W=None if w1 is None else checks.tensor("w1", w1, floating=True) - w0,
        )
        super().__init__(w0, interval)


class ReverseBrownian(BaseBrownian):
    """A motion with the time turned round: its increment from `-t` to `-s` is that from `s` to `t`.

    Args:
        base_brownian: the motion.
    """

    def __init__(self, base_brownian: BaseBrownian) -> None:
        self.base_brownian = base_brownian
        self.dtype, self.device = base_brownian.dtype, base_brownian.device
        self.shape = base_brownian.shape
        self.levy_area_approximation = base_brownian.levy_area_approximation

    def __call__(
        self, ta: Scalar, tb: Scalar | None = None, return_U: bool = False, return_A: bool = False
    ) -> Any:
        """The motion's increment from `-tb` to `-ta`."""
        if tb is None:
            raise ValueError(
                "a reversed motion is asked for intervals, but tb is None.\n  Give both ends."
            )
        return self.base_brownian(-tb, -ta, return_U=return_U, return_A=return_A)


def brownian_interval_like(
    y: Tensor,
    t0: Scalar = 0.0,
    t1: Scalar = 1.0,
    size: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> BrownianInterval:
    """A `BrownianInterval` with the shape, dtype and device of a tensor.

    Args:
        y: the tensor.
        t0: start.
        t1: end.
        size: another shape.
        dtype: another dtype.
        device: another device.
        kwargs: further arguments of `BrownianInterval`.

    Examples:
        >>> import torch
        >>> from pysciml_node.compat.torchsde import brownian_interval_like
        >>> brownian_interval_like(torch.zeros(4, 2)).shape
        torch.Size([4, 2])
    """
    y = checks.tensor("y", y)
    return BrownianInterval(
        t0,
        t1,
        y.shape if size is None else size,
        y.dtype if dtype is None else dtype,
        y.device if device is None else device,
        **kwargs,
    )
