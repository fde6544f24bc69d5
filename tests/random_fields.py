"""Random fields for tests: programs of any operations, on states and parameters of any shapes.

A field is drawn by hypothesis one value after the other, from a pool that begins with the parts of
the state, the time and the parameters. Values are scaled to about one, so that rounding stays small
beside them, and those with jumps are shifted, so that no jump lies at a number that rounding meets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from random_functions import ALONG, BINARY, KINKED, MOVED, REDUCED, SMOOTH
from torch import Tensor, nn
from torch.nn import functional as F

Value = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""A value of a program, from the parameters and the values before it."""

MOST = 1700
"""Entries of a value, at most."""

WIDTHS = st.one_of(st.integers(1, 9), st.sampled_from([11, 13, 15, 16, 17, 23, 31, 32, 33]))
SIDES = st.sampled_from([1, 1, 2, 3, 4, 5, 7])


class RandomField(nn.Module):
    """A drawn program as a module of `f(t, u, p)`, or of `f(t, u)` where nothing is drawn as `p`.

    Attributes:
        state: the shapes of the state's parts.
        keys: their names: none for one tensor, `(0, 1, ...)` for a tuple, others for a dict.
        rows: how many rows of the state do not depend on each other; 0 where they may.
        weights: the module's own parameters.
        given: those that are given as `p`.
        text: the program, a line for each value.
    """

    def __init__(self, state: Sequence[tuple[int, ...]], keys: tuple[Any, ...], rows: int) -> None:
        super().__init__()
        self.state, self.keys, self.rows = state, keys, rows
        self.weights = nn.ParameterList()
        self.given: list[Tensor] = []
        self.is_given: list[bool] = []
        self.steps: list[Value] = []
        self.ends: list[Value] = []
        self.text: list[str] = []

    def forward(self, t: Tensor, u: Any, p: Sequence[Tensor] = ()) -> Any:
        """Evaluate the derivative at `u`."""
        mine, given = iter(self.weights), iter(p)
        weights = [next(given) if is_given else next(mine) for is_given in self.is_given]
        values = [*self.parts(u), t]
        for step in self.steps:
            values.append(step(weights, values))
        return self.assembled([end(weights, values) for end in self.ends])

    def assembled(self, parts: Sequence[Tensor]) -> Any:
        """A state of these parts."""
        if not self.keys:
            return parts[0]
        return tuple(parts) if self.keys[0] == 0 else dict(zip(self.keys, parts, strict=True))

    def parts(self, u: Any) -> list[Tensor]:
        """The parts of a state."""
        return [u[key] for key in self.keys] if self.keys else [u]

    def extra_repr(self) -> str:
        """The program."""
        return "\n".join([f"{self.state} {self.keys} rows={self.rows}", *self.text])


class _Drawing:
    """A field while it is drawn, with its values at one state."""

    def __init__(self, draw: st.DrawFn, field: RandomField, given: bool) -> None:
        self.draw, self.field, self.may_give = draw, field, given
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
        self.weights: list[Tensor] = []
        self.values = [self.numbers(*shape) for shape in field.state]
        self.state = [x.requires_grad_() for x in self.values]
        self.values.append(torch.tensor(0.3, dtype=torch.float64))

    def numbers(self, *shape: int) -> Tensor:
        """Numbers of about one."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def one(self, *choices: Any) -> Any:
        """One of these."""
        return self.draw(st.sampled_from(choices))

    def choose(self, fits: Callable[[Tensor], bool] = lambda x: True) -> int | None:
        """A value of a kind, rather a late one, or None where there is none."""
        fitting = [i for i, x in enumerate(self.values) if fits(x)]
        return self.draw(st.sampled_from([*fitting, *fitting[-2:] * 2])) if fitting else None

    def free(self, x: Tensor) -> int:
        """How many of a value's last axes may be mixed."""
        return x.ndim - int(x.ndim > 0 and 0 < self.field.rows == x.shape[0])

    def axis(self, x: Tensor) -> int:
        """An axis of a value that may be mixed, from the last."""
        return -self.draw(st.integers(1, self.free(x)))

    def add(self, name: str, step: Value) -> None:
        """Take up a value, scaled to about one; unless it is too large or not finite."""
        found = step(self.weights, self.values)
        size = float(found.detach().abs().max()) if found.numel() else 1.0
        if found.numel() > MOST or not math.isfinite(size):
            return
        if size > 2:
            factor, inner = 1.5 / size, step
            found, step = found * factor, lambda w, v: inner(w, v) * factor
        self.field.steps.append(step)
        self.field.text.append(f"{len(self.values)} {name}: {tuple(found.shape)}")
        self.values.append(found)

    def weight(self, *shape: int) -> int:
        """A parameter, which lies in memory in some way: its number."""
        x = self.numbers(*shape) / max(1, math.prod(shape[1:])) ** 0.5
        lying = self.one("rows", "turned", "expanded", "every other")
        if lying == "turned" and x.ndim > 1:
            x = x.movedim(0, -1).contiguous().movedim(-1, 0)
        elif lying == "expanded" and x.ndim:
            x = x[:1].clone().expand(shape)
        elif lying == "every other" and x.ndim:
            x = torch.stack([x, x], -1)[..., 0]
        given = self.may_give and self.one(True, False)
        self.field.is_given.append(given)
        if given:
            self.field.given.append(x.detach().requires_grad_())
            self.weights.append(self.field.given[-1])
        else:
            self.field.weights.append(nn.Parameter(x, requires_grad=self.one(True, True, False)))
            self.weights.append(self.field.weights[-1])
        self.field.text.append(f"weight {len(self.weights) - 1} {lying} {given}: {shape}")
        return len(self.weights) - 1

    # Operations: each takes up one value ------------------------------------------------------

    def entries(self) -> None:
        """A function of one value."""
        i = self.choose()
        functions = self.one(SMOOTH, SMOOTH, KINKED)
        k = self.draw(st.integers(0, len(functions) - 1))
        name = f"{'smooth' if functions is SMOOTH else 'kinked'} {k} of {i}"
        self.add(name, lambda w, v: functions[k](v[i]))

    def pair(self) -> None:
        """A function of two values, of which one may be repeated."""
        i = self.choose()
        j = self.choose(lambda x: _meet(x, self.values[i]))
        k = self.draw(st.integers(0, len(BINARY) - 1))
        self.add(f"binary {k} of {i}, {j}", lambda w, v: BINARY[k](v[i], v[j]))

    def weighted(self) -> None:
        """A function of a value and a parameter of a shape to which either may be repeated."""
        i = self.choose()
        shape = [n if self.one(True, True, False) else 1 for n in self.values[i].shape]
        j = self.weight(*shape[self.draw(st.integers(0, len(shape))) :])
        k = self.draw(st.integers(0, len(BINARY) - 1))
        turned = self.one(True, False)
        name = f"binary {k} of {i}, weight {j}{' turned' if turned else ''}"
        self.add(name, lambda w, v: BINARY[k](w[j], v[i]) if turned else BINARY[k](v[i], w[j]))

    def known(self) -> None:
        """A parameter itself, of which others make what depends on parameters alone."""
        j = self.weight(*self.draw(st.lists(SIDES, max_size=3)))
        self.add(f"weight {j}", lambda w, v: w[j] * 1)

    def along(self) -> None:
        """A function along an axis."""
        i = self.choose(lambda x: self.free(x) > 0 and x.numel() > 0)
        if i is not None:
            d, k = self.axis(self.values[i]), self.draw(st.integers(0, len(ALONG) - 1))
            self.add(f"along {k} of {i} by {d}", lambda w, v: ALONG[k](v[i], d))

    def reduced(self) -> None:
        """One entry instead of an axis."""
        i = self.choose(lambda x: self.free(x) > 0 and x.numel() > 0)
        if i is not None:
            d, k = self.axis(self.values[i]), self.draw(st.integers(0, len(REDUCED) - 1))
            keep = self.one(True, False)
            self.add(f"reduced {k} of {i} by {d}, {keep}", lambda w, v: REDUCED[k](v[i], d, keep))

    def moved(self) -> None:
        """The entries of a value in other places."""
        i = self.choose(lambda x: self.free(x) > 0 and x.numel() > 0)
        if i is None:
            return
        x = self.values[i]
        d, k = self.axis(x), self.draw(st.integers(0, len(MOVED) - 1))
        if k == 0 and self.free(x) > 1:
            e = self.axis(x)
            self.add(f"axes {d}, {e} of {i}", lambda w, v: v[i].transpose(d, e))
        elif k == 1 and self.free(x) > 1:
            fixed = x.ndim - self.free(x)
            self.add(f"flat {i}", lambda w, v: v[i].flatten(fixed))
        elif k > 1:
            self.add(f"moved {k} of {i} by {d}", lambda w, v: MOVED[k](v[i], d))

    def taken(self) -> None:
        """Some entries along an axis, as a slice or by numbers, with repetitions."""
        i = self.choose(lambda x: self.free(x) > 0 and x.numel() > 0)
        if i is None:
            return
        d = self.axis(self.values[i])
        n = self.values[i].shape[d]
        if self.one(True, False):
            start, step = self.draw(st.integers(0, n - 1)), self.one(1, 1, 2, 3)
            name, places = f"from {start} by {step}", torch.arange(start, n, step)
            after = (slice(None),) * (-d - 1)
            step_of: Value = lambda w, v: v[i][(..., slice(start, None, step), *after)]  # noqa: E731
        else:
            listed = self.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=7))
            name, places = f"places {listed}", torch.tensor(listed)
            step_of = lambda w, v: v[i].index_select(d, places)  # noqa: E731
        self.add(f"{name} of {i} along {d}", step_of)

    def written(self) -> None:
        """Entries of one value in a copy of another: set, or added with repetitions."""
        i = self.choose(lambda x: self.free(x) > 0 and x.numel() > 0)
        if i is None:
            return
        d = self.axis(self.values[i])
        n = self.values[i].shape[d]
        places = torch.tensor(self.draw(st.lists(st.integers(0, n - 1), min_size=n, max_size=n)))
        if self.one(True, False):
            self.add(
                f"{places.tolist()} added to {i} along {d}",
                lambda w, v: v[i].sin().index_add(d, places, v[i]),
            )
        else:
            at = (..., int(places[0]), *(slice(None),) * (-d - 1))

            def write(w: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:
                out = v[i].cos()
                out[at] = v[i][at] * 0.5
                return out

            self.add(f"set in {i} at {at}", write)

    def joined(self) -> None:
        """Two values, one behind the other."""
        i = self.choose(lambda x: self.free(x) > 0 and x.numel() > 0)
        if i is None:
            return
        x = self.values[i]
        d = self.axis(x)
        j = self.choose(lambda y: y.ndim == x.ndim and _but(x, d) == _but(y, d))
        if self.one(True, False):
            self.add(f"{i} and {j} along {d}", lambda w, v: torch.cat([v[i], v[j]], d))
        else:
            self.add(
                f"{i} twice beside its axis {d}",
                lambda w, v: torch.stack([v[i], 2 * v[i].sin()], d),
            )

    def linear(self) -> None:
        """A product with a parameter from the right."""
        i = self.choose(lambda x: self.free(x) > 0 and x.numel() > 0)
        if i is None:
            return
        n, m = self.values[i].shape[-1], self.draw(WIDTHS)
        if self.one(True, False):
            j = self.weight(m, n)
            k = self.weight(m) if self.one(True, False) else None
            self.add(
                f"linear of {i}, weights {j}, {k}",
                lambda w, v: F.linear(v[i], w[j], None if k is None else w[k]),
            )
        else:
            j = self.weight(n, m)
            self.add(f"product of {i}, weight {j}", lambda w, v: v[i] @ w[j])

    def product(self) -> None:
        """A product of two values."""
        i = self.choose(lambda x: self.free(x) > 1 and x.numel() > 0)
        if i is None:
            return
        x = self.values[i]
        j = self.choose(lambda y: y.ndim in (2, x.ndim) and y.ndim > 1 and _multiply(x, y))
        kind = self.one("gram", "other", "attention", "einsum")
        if kind == "other" and j is not None:
            self.add(f"product of {i}, {j}", lambda w, v: v[i] @ v[j])
        elif kind == "attention":
            self.add(
                f"attention of {i}",
                lambda w, v: F.scaled_dot_product_attention(v[i], v[i].cos(), v[i], scale=0.7),
            )
        elif kind == "einsum":
            self.add(
                f"einsum of {i}", lambda w, v: torch.einsum("...ij,...kj->...ik", v[i], v[i].sin())
            )
        else:
            self.add(f"gram of {i}", lambda w, v: v[i].mT @ v[i])

    def filtered(self) -> None:
        """A convolution of the last axis."""
        i = self.choose(lambda x: self.free(x) > 0 and x.ndim < 4 and x.numel() > 0)
        if i is None:
            return
        x = self.values[i]
        inside = x.shape[-2] if x.ndim == 3 else 1
        size = self.draw(st.integers(1, min(3, x.shape[-1])))
        outside, stride = self.one(1, 2, 3, 4), self.one(1, 1, 2)
        j = self.weight(outside, inside, size)
        padding = self.one(0, 1)
        flat = x.ndim != 3

        def convolve(w: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:
            y = v[i].reshape(-1, 1, v[i].shape[-1]) if flat else v[i]
            y = F.conv1d(y, w[j], stride=stride, padding=padding)
            return y.reshape(*v[i].shape[:-1], -1) if flat else y

        self.add(f"filter of {i}, weight {j}", convolve)

    def normalized(self) -> None:
        """A normalization."""
        i = self.choose(lambda x: self.free(x) > 0 and x.numel() > 0)
        if i is None:
            return
        x = self.values[i]
        n, kind = x.shape[-1], self.one("layer", "plain layer", "rms", "group")
        if kind == "group" and x.ndim > 2 and x[0].numel() > 2 * x.shape[1]:
            groups = x.shape[1] if x.shape[1] % 2 else x.shape[1] // 2
            self.add(f"group norm of {i}", lambda w, v: F.group_norm(v[i], groups, eps=0.1))
        elif kind == "layer":
            j, k = self.weight(n), self.weight(n)
            self.add(f"layer norm of {i}", lambda w, v: F.layer_norm(v[i], (n,), w[j], w[k], 0.1))
        elif kind == "rms":
            j = self.weight(n)
            self.add(f"rms norm of {i}", lambda w, v: F.rms_norm(v[i], (n,), w[j], 0.1))
        else:
            self.add(f"plain norm of {i}", lambda w, v: F.layer_norm(v[i], (n,), eps=0.1))

    OPERATIONS = (
        entries, entries, entries, pair, pair, weighted, weighted, known, along, reduced, moved,
        taken, written, joined, linear, linear, product, filtered, normalized,
    )  # fmt: skip

    def end(self, at: int) -> None:
        """The derivative of a part of the state: a value in its shape, bounded, and a decay."""
        shape = self.field.state[at]
        size, rows = math.prod(shape), self.field.rows
        i = self.choose(lambda x: x.numel() > 0 or size == 0)
        # Rows stay apart where the value has them too.
        fixed = int(rows > 0 and self.values[i].ndim > 0 and self.values[i].shape[0] == rows)
        how = self.one("mean", "product", "repeated")
        x = self.values[i]
        if x.shape == shape:
            how = "itself"
        elif how == "product" and x.numel() // max(rows if fixed else 1, 1) > 64:
            how = "mean"
        width = size // rows if fixed else size
        j = None
        if how == "product":
            inner = x.numel() // rows if fixed else x.numel()
            j = self.weight(width, inner)

        def value(w: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:
            y = v[i]
            if how == "itself":
                return y
            if how == "mean":
                return (
                    y.reshape(rows, -1).mean(1).reshape(-1, *(1,) * (len(shape) - 1))
                    if fixed
                    else y.mean()
                )
            y = y.reshape(rows, -1) if fixed else y.reshape(-1)
            if j is not None:
                return F.linear(y, w[j]).reshape(shape)
            copies = max(1, -(-width // max(y.shape[-1], 1)))
            return torch.cat([y] * copies, -1)[..., :width].reshape(shape)

        decay = self.one(0.0, 0.3, 0.7)
        factor = self._slope(value)
        self.field.text.append(f"part {at}: {i} {how} {j}, {decay}")
        self.field.ends.append(lambda w, v: (factor * value(w, v) - decay * v[at]).expand(shape))

    def _slope(self, value: Value) -> float:
        """What keeps a derivative, and how it changes with all that it depends on, below one."""
        y = value(self.weights, self.values)
        sizes = [1.0, *([float(y.detach().abs().max())] if y.numel() else [])]
        if y.requires_grad:
            inputs = [x for x in [*self.state, *self.weights] if x.requires_grad]
            bars = torch.autograd.grad(y.abs().sum(), inputs, allow_unused=True, retain_graph=True)
            sizes += [float(bar.abs().max()) for bar in bars if bar is not None and bar.numel()]
        worst = max(sizes)
        return 0.8 / worst if math.isfinite(worst) else 0.0


def _but(x: Tensor, dim: int) -> tuple[int, ...]:
    shape = list(x.shape)
    del shape[dim]
    return tuple(shape)


def _meet(x: Tensor, y: Tensor) -> bool:
    """Whether two values have a shape that both can be repeated to."""
    try:
        return math.prod(torch.broadcast_shapes(x.shape, y.shape)) <= MOST
    except RuntimeError:
        return False


def _multiply(x: Tensor, y: Tensor) -> bool:
    """Whether two values have a product."""
    return x.shape[-1] == y.shape[-2] and (y.ndim == 2 or x.shape[:-2] == y.shape[:-2])


@st.composite
def fields(draw: st.DrawFn, member: bool = False) -> RandomField:
    """A field of a batch, or of one member of an ensemble, whose `p` may be each member's own."""
    given = member or draw(st.booleans())
    rows = 0
    if not member and draw(st.booleans()):
        rows = draw(st.one_of(st.integers(1, 16), st.sampled_from([0, 22, 26, 34])))
    count = draw(st.sampled_from([1, 1, 2, 3]))
    tails = [draw(st.lists(SIDES, max_size=2)) for _ in range(count)]
    if draw(st.booleans()):
        tails[0] = [draw(WIDTHS)]
    state = [(rows, *tail) if rows else tuple(tail) for tail in tails]
    if count > 1 and not rows and draw(st.integers(1, 16)) == 16:
        state[-1] = (0, *state[-1])
    keys: tuple[Any, ...] = draw(st.sampled_from([tuple(range(count)), tuple("zxy"[:count])]))
    if count == 1 and draw(st.sampled_from([True, True, False])):
        keys = ()
    field = RandomField(state, keys, rows)
    drawing = _Drawing(draw, field, given)
    for _ in range(draw(st.integers(4, 14))):
        draw(st.sampled_from(_Drawing.OPERATIONS))(drawing)
    for at in range(count):
        drawing.end(at)
    return field
