"""Names of other packages, for code that cannot be edited; torchdiffeq's private ones."""

import sys

import pytest
import torch

import pysciml_node as psn
from pysciml_node.compat import install
from pysciml_node.compat.torchdiffeq import odeint
from pysciml_node.compat.torchdiffeq._impl import NAMES
from pysciml_node.compat.torchdiffeq.solvers import SOLVERS


def test_install_and_undo(capsys):
    before = sys.modules.get("torchdiffeq")
    installed = install("torchdiffeq")
    assert "import torchdiffeq now gives pysciml_node.compat.torchdiffeq" in capsys.readouterr().out
    import torchdiffeq
    from torchdiffeq._impl.fixed_grid import RK4
    from torchdiffeq._impl.odeint import SOLVERS as known

    assert torchdiffeq.odeint is odeint
    assert known["rk4"] is torchdiffeq._impl.fixed_grid.RK4 is RK4
    assert int(torchdiffeq.__version__.split(".")[1]) == 2
    installed.undo()
    assert sys.modules.get("torchdiffeq") is before
    assert "torchdiffeq._impl.odeint" not in sys.modules


def test_install_torchsde_and_undo(capsys):
    before = sys.modules.get("torchsde")
    with install("torchsde"):
        assert "import torchsde now gives" in capsys.readouterr().out
        import torchsde
        from torchsde.settings import METHODS
        from torchsde.types import Scalar

        assert torchsde.sdeint is psn.compat.torchsde.sdeint
        assert torchsde.BrownianTree(0.1, torch.zeros(3), 2.0, entropy=1)(0.2, 0.3).shape == (3,)
        assert METHODS.log_ode_midpoint == "log_ode"
        assert isinstance(0.5, Scalar)
        assert torchsde.__version__ == "0.2.6"
    assert sys.modules.get("torchsde") is before
    assert "torchsde.settings" not in sys.modules


def test_install_says_what_is_too_late(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchdiffeq", torch)
    with pytest.warns(psn.PsnWarning, match="has been imported already"):
        installed = install("torchdiffeq")
    with installed:
        assert sys.modules["torchdiffeq"] is psn.compat.torchdiffeq
    assert sys.modules["torchdiffeq"] is torch
    with pytest.raises(ValueError, match="torchdiffeq"):
        install("torchdiff")


def test_a_solver_of_ones_own():
    """A subclass of torchdiffeq's interface, by its name in `SOLVERS`."""
    from pysciml_node.compat.torchdiffeq._impl.solvers import FixedGridODESolver

    class Leap(FixedGridODESolver):
        order = 2

        def _step_func(self, func, t0, dt, t1, y0):
            f0 = func(t0, y0)
            return dt * func(t0 + dt / 2, y0 + dt / 2 * f0), f0

    t, y0 = torch.linspace(0, 1, 9).double(), (torch.ones(2).double(), torch.zeros(1).double())
    SOLVERS["leap"] = Leap
    try:
        found = odeint(lambda t, y: (-y[0] * t, y[1] + 1), y0, t, method="leap")
    finally:
        del SOLVERS["leap"]
    expected = odeint(lambda t, y: (-y[0] * t, y[1] + 1), y0, t, method="midpoint")
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


def test_names_without_a_counterpart_say_what_to_use():
    with pytest.raises(AttributeError, match="A new adaptive method is a table"):
        psn.compat.torchdiffeq._impl.rk_common.RKAdaptiveStepsizeODESolver  # noqa: B018
    with pytest.raises(ImportError):
        from pysciml_node.compat.torchdiffeq._impl.misc import _nothing  # noqa: F401
    with pytest.raises(TypeError, match='odeint\\(func, y0, t, method="dopri5"'):
        SOLVERS["dopri5"](None, None)


def test_a_call_in_normal_form():
    t = torch.tensor([1.0, 0.5])
    y0 = (torch.tensor(2.0), torch.ones(2, 2))
    shapes, field, state, times, rtol, _, method, options, _, backward = NAMES["misc"][
        "_check_inputs"
    ](lambda t, y: (t * y[0], -y[1]), y0, t, (1e-3, 1e-4), 1e-6, None, None, None, SOLVERS)
    assert (method, backward, state.shape) == ("dopri5", True, (5,))
    assert times.tolist() == [-1.0, -0.5]
    assert rtol.tolist() == pytest.approx([1e-3, *[1e-4] * 4])
    # Time runs forward: the derivative changes its sign, and the field sees its own time.
    assert field(times[0], state).tolist() == [-2.0, 1.0, 1.0, 1.0, 1.0]
    parts = NAMES["misc"]["_flat_to_shape"](state.expand(3, 5), (3,), shapes)
    assert [part.shape for part in parts] == [(3,), (3, 2, 2)]
    assert float(options["norm"](state)) == 2.0


def test_the_quartic_of_a_step():
    dt = torch.tensor(0.7).double()
    exact = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()

    def at(x):
        return sum(c * x**i for i, c in enumerate(exact))

    def slope(x):
        return sum(i * c * x ** (i - 1) for i, c in enumerate(exact) if i) / dt

    names = NAMES["interp"]
    found = names["_interp_fit"](at(0.0), at(1.0), at(0.5), slope(0.0), slope(1.0), dt)
    torch.testing.assert_close(torch.stack(found), exact, rtol=1e-12, atol=1e-12)
    value = names["_interp_evaluate"](found, 0 * dt, dt, 0.3 * dt)
    torch.testing.assert_close(value, at(0.3), rtol=1e-12, atol=1e-12)


def test_the_step_size_that_follows():
    size, safety, most, least = (torch.tensor(x).double() for x in (0.1, 0.9, 10.0, 0.2))
    following = NAMES["misc"]["_optimal_step_size"]

    def factor(error):
        return float(following(size, torch.tensor(error).double(), safety, most, least, 5) / size)

    assert factor(0.0) == pytest.approx(10.0)
    assert factor(0.95) == pytest.approx(1.0)
    assert factor(2.0) == pytest.approx(0.9 / 2**0.2)
    assert factor(1e9) == pytest.approx(0.2)


def test_the_table_of_dormand_and_prince():
    tableau = NAMES["dopri5"]["_DORMAND_PRINCE_SHAMPINE_TABLEAU"]
    assert float(tableau.c_sol.sum()) == pytest.approx(1.0)
    assert float(tableau.c_error.sum()) == pytest.approx(0.0, abs=1e-15)
    assert float(tableau.c_error[-1]) == pytest.approx(-1 / 60)
    assert float(NAMES["dopri5"]["DPS_C_MID"].sum()) == pytest.approx(0.5)
