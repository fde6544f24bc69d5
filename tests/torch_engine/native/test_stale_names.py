"""Native code is that of what names stand for now, however code comes to them."""

from __future__ import annotations

import functools
import itertools
import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from decaying import D, Holder, decay, end
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.torch_engine.native import prepared

pytestmark = pytest.mark.usefixtures("looks_in_both")

Way = tuple[Callable[..., Any], Callable[[float], Any]]

# Each is the text of a module with a field `f` that reads `rate`, which is 1 at first.
MODULES = {
    "import": "def f(t, u):\n import {name} as me\n return -me.rate * u",
    "sys.modules": "import sys\ndef f(t, u): return -sys.modules[__name__].rate * u",
    "modules inside": "def f(t, u):\n from sys import modules as m\n return -m[__name__].rate * u",
    "name in a class": (
        "import sys\nclass Field:\n"
        " def __call__(self, t, u): return -sys.modules[self.__module__].rate * u\nf = Field()"
    ),
    "import_module": "import importlib\nget = importlib.import_module\n"
    "def f(t, u): return -get(__name__).rate * u",
    "__import__": "get = __import__\ndef f(t, u): return -get(__name__).rate * u",
    "inspect": "import inspect\ndef f(t, u): return -inspect.getmodule(f).rate * u",
    "inspect inside": (
        "def f(t, u):\n from inspect import getmodule as home\n return -home(f).rate * u"
    ),
    "getmodule by words": (
        "import inspect\nw = ['get', 'module']\n"
        "def f(t, u): return -getattr(inspect, ''.join(w))(f).rate * u"
    ),
    "an iterator": (
        "import itertools, sys\nme = itertools.repeat(sys.modules[__name__])\n"
        "def f(t, u): return -next(me).rate * u"
    ),
    "an object of C": (
        "import queue, sys\nheld = queue.Queue()\nheld.put(sys.modules[__name__])\n"
        "def f(t, u): return -held.queue[0].rate * u"
    ),
    "a default": (
        "import contextvars, sys\n"
        "me = contextvars.ContextVar('me', default=sys.modules[__name__])\n"
        "def f(t, u): return -me.get().rate * u"
    ),
    "a class of modules": (
        "import sys, types\nclass Module(types.ModuleType):\n"
        " @property\n def twice(self): return 2 * rate\n"
        "me = sys.modules[__name__]\nme.__class__ = Module\ndef f(t, u): return -me.twice / 2 * u"
    ),
    "globals": "g = globals\ndef f(t, u): return -g()['rate'] * u",
    "eval": "e, w = [eval], ['ra', 'te']\ndef f(t, u): return -e[0](''.join(w)) * u",
    "get of globals": "get = globals().get\ndef f(t, u): return -get('rate') * u",
    "a view of globals": (
        "rates = globals().values()\n"
        "def f(t, u): return -next(x for x in rates if isinstance(x, float)) * u"
    ),
    "a function by words": "def g(): return rate\ndef f(t, u): return -globals()['g']() * u",
    "names alike": (
        "import torch\nclass Field(torch.nn.Module):\n rate = 3.0\n"
        " def forward(self, t, u): return -self.rate * rate / 3 * u\nf = Field()"
    ),
    "an attribute that is not there": (
        "import sys\nclass Field:\n"
        " def __getattr__(self, name): return getattr(sys.modules[__name__], name)\n"
        " def __call__(self, t, u): return -self.rate * u\nf = Field()"
    ),
}
_numbers = itertools.count()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Makes a module of its text."""

    def make(text: str) -> Any:
        module = types.ModuleType(f"users_module_{next(_numbers)}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec("rate = 1.0\n" + text.replace("{name}", module.__name__), module.__dict__)
        return module

    return make


@pytest.mark.parametrize("way", MODULES)
def test_a_global_that_code_comes_to_by_its_module(way: str, made: Callable[[str], Any]) -> None:
    module = made(MODULES[way])
    for rate in (1.0, 2.0, 1.0):
        module.rate = rate
        assert end(module.f) == decay(rate)


def scaled(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def inner(*given: Any) -> Any:
        return Holder.k * function(*given)

    return inner


exponential = scaled(math.exp)
softplus = scaled(nn.functional.softplus)


def by_wrapper_of_a_librarys_function() -> Way:
    return lambda t, u: -exponential(0.0) * u, lambda k: setattr(Holder, "k", k)


def by_function_in_a_library() -> Way:
    def function(x: Any) -> Any:
        return Holder.k

    math.rate_of_a_test = functools.partial(function, 1)  # type: ignore[attr-defined]
    return lambda t, u: -math.rate_of_a_test() * u, lambda k: setattr(Holder, "k", k)  # type: ignore[attr-defined]


def by_get_of_a_dict() -> Way:
    held = {"k": 1.0}
    get = held.get
    return lambda t, u: -get("k") * u, lambda k: held.update(k=k)


def by_item_of_a_list_in_a_partial() -> Way:
    held = [1.0]
    get = functools.partial(held.__getitem__, 0)
    return lambda t, u: -get() * u, lambda k: held.__setitem__(0, k)


def by_method_of_a_tensor() -> Way:
    held = torch.ones(1, dtype=D)
    times = held.mul
    return lambda t, u: -times(u), held.fill_


def by_attribute_of_an_object() -> Way:
    holder = Holder()
    get = holder.__getattribute__
    return lambda t, u: -get("k") * u, lambda k: setattr(holder, "k", k)


def by_view_of_a_dict() -> Way:
    held = {"k": 1.0}
    values = held.values()
    return lambda t, u: -sum(values) * u, lambda k: held.update(k=k)


def by_cell() -> Way:
    held = types.CellType(1.0)
    return lambda t, u: -held.cell_contents * u, lambda k: setattr(held, "cell_contents", k)


def by_method_of_a_base() -> Way:
    class Base:
        def rate(self) -> Any:
            return Holder.k

    class Derived(Base):
        pass

    base = super(Derived, Derived())
    return lambda t, u: -base.rate() * u, lambda k: setattr(Holder, "k", k)


def by_class_without_a_module() -> Way:
    held: dict[str, Any] = {"k": 1.0}
    exec("class Rate:\n def __call__(self, t, u): return -k * u", held)
    return held["Rate"](), lambda k: held.update(k=k)


def by_object_of_a_class_without_a_module() -> Way:
    held: dict[str, Any] = {}
    exec("class Rate: pass", held)
    rate = held["Rate"]()
    rate.k = [1.0]
    return lambda t, u: -rate.k[0] * u, lambda k: rate.k.__setitem__(0, k)


def by_builtins_of_its_own() -> Way:
    held: dict[str, Any] = {"__builtins__": {"k": 1.0}}
    exec("def f(t, u): return -k * u", held)
    return held["f"], lambda k: held["__builtins__"].update(k=k)


WAYS = [value for name, value in sorted(globals().items()) if name.startswith("by_")]


@pytest.fixture
def as_before() -> Iterator[None]:
    yield
    Holder.k = 1.0
    vars(math).pop("rate_of_a_test", None)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_number_that_has_changed_is_seen(way: Callable[[], Way], as_before: None) -> None:
    f, change = way()
    assert end(f) == decay(1.0)
    for rate in (2.0, 1.0):
        change(rate)
        assert end(f) == decay(rate)


REFUSED = {
    "a name in pieces": (
        "w = ['__glo', 'bals__']\ndef f(t, u): return -getattr(f, ''.join(w))['rate'] * u"
    ),
    "a name that is looked for": (
        "def f(t, u):\n name = next(x for x in dir(f) if x.endswith('bals__'))\n"
        " return -getattr(f, name)['rate'] * u"
    ),
    "pkgutil": "import pkgutil\ndef f(t, u): return -pkgutil.resolve_name(__name__ + ':rate') * u",
    "pydoc": "import pydoc\ndef f(t, u): return -pydoc.locate(__name__ + '.rate') * u",
    "pickle": (
        "import pickle\ndef f(t, u): return -pickle.loads(f'c{__name__}\\nrate\\n.'.encode()) * u"
    ),
}


@pytest.mark.parametrize("way", REFUSED)
def test_what_is_found_by_others_is_refused(way: str, made: Callable[[str], Any]) -> None:
    with pytest.raises(psn.CompileError, match="may differ at each solve"):
        end(made(REFUSED[way]).f)


a: Any = 0.0


class Named(nn.Module):
    """A field whose attribute has the name of a global of its module."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(1, dtype=D))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return -self.a * u


@pytest.mark.parametrize("call", [Named, lambda: Named().forward], ids=["module", "method"])
def test_a_global_with_the_name_of_an_attribute_has_nothing_prepared_again(
    call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a script's `a = time.time()`, beside `self.a`."""
    made: list[Any] = []
    make = prepared._prepare
    monkeypatch.setattr(prepared, "_prepare", lambda *how: made.append(how) or make(*how))
    field = call()
    for i in range(5):
        monkeypatch.setitem(globals(), "a", float(i))
        assert end(field) == decay(1.0)
    assert len(made) == 1
