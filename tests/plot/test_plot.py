"""Pictures hold the numbers that they show."""

import math

import numpy as np
import pytest
import torch

import pysciml_node as psn

figures = pytest.importorskip("matplotlib.figure")


@pytest.fixture
def axes():
    return figures.Figure().subplots()


def decay(u0, **options):
    return psn.solve(
        psn.ODEProblem(lambda t, u: -u, u0, (0.0, 1.0)), rtol=1e-8, atol=1e-8, **options
    )


def rotation(u0):
    problem = psn.ODEProblem(lambda t, u: torch.stack((u[..., 1], -u[..., 0]), -1), u0, (0.0, 3.0))
    return psn.solve(problem, rtol=1e-8, atol=1e-8)


def test_curves_follow_the_solution_and_marks_the_steps(axes):
    solution = decay(torch.ones(2, dtype=torch.float64, requires_grad=True))
    assert solution.plot(axes=axes) is axes
    curve, marks = axes.lines[:2]
    assert np.allclose(curve.get_ydata(), np.exp(-curve.get_xdata()), atol=1e-7)
    assert np.allclose(marks.get_xdata(), solution.step_times.numpy())
    assert np.allclose(marks.get_ydata(), np.exp(-marks.get_xdata()), atol=1e-7)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["u[0]", "u[1]"]


def test_entries_are_named_by_the_structure_of_the_state(axes):
    state = {"x": torch.ones(2, 2), "s": torch.ones(())}
    problem = psn.ODEProblem(lambda t, u: {k: -v for k, v in u.items()}, state, (0.0, 1.0))
    solution = psn.solve(problem)
    solution.plot(axes=axes, entries=3, steps=False)
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["x[0, 0]", "x[0, 1]", "x[1, 0]"]
    assert len(axes.lines) == 3


def test_complex_states_show_their_modulus(axes):
    problem = psn.ODEProblem(lambda t, u: 1j * u, torch.ones(1, dtype=torch.complex128), (0.0, 2.0))
    psn.solve(problem, rtol=1e-8, atol=1e-8).plot(axes=axes)
    assert np.allclose(axes.lines[0].get_ydata(), 1.0, atol=1e-6)


def test_steps_show_sizes_errors_and_stiffness():
    solution = decay(torch.ones(1, dtype=torch.float64))
    panels = psn.plot.steps(solution, axes=figures.Figure().subplots(3))
    sizes, errors, stiffness = (panel.lines[0].get_ydata() for panel in panels)
    assert math.isclose(sizes.sum(), 1.0)
    assert np.allclose(errors, solution.step_errors.numpy())
    # The eigenvalue of u' = -u is 1.
    assert np.allclose(stiffness, sizes, rtol=1e-2)
    with pytest.raises(ValueError, match=r"three axes(.|\n)*subplots"):
        psn.plot.steps(solution, axes=panels[:2])


@pytest.mark.parametrize("shape", [(2,), (3, 2)])
def test_paths_of_a_rotation_are_circles_and_arrows_stand_on_the_radius(shape, axes):
    u0 = torch.zeros(shape, dtype=torch.float64)
    u0[..., 0] = 1.0
    psn.plot.phase(rotation(u0), axes=axes, resolution=5)
    for line in axes.lines:
        assert np.allclose(np.hypot(*line.get_data()), 1.0, atol=1e-6)
    (arrows,) = axes.collections
    assert np.allclose(arrows.X * arrows.U + arrows.Y * arrows.V, 0.0)


def test_phase_refuses_other_states():
    with pytest.raises(ValueError, match=r"\(2,\) or \(B, 2\)(.|\n)*plot\.solution"):
        psn.plot.phase(decay(torch.ones(3)))


def test_a_density_is_drawn_where_it_is(axes):
    normal = torch.distributions.Independent(
        torch.distributions.Normal(torch.tensor([1.0, 0.0]), 0.1), 1
    )
    psn.plot.density(normal, bounds=(-2, 2, -2, 2), resolution=41, axes=axes)
    image = axes.images[0].get_array()
    row, column = np.unravel_index(image.argmax(), image.shape)
    assert (row, column) == (20, 30)  # x = 1 is three quarters to the right, y = 0 in the middle


def test_bands_hold_their_share_of_the_paths(axes):
    times = torch.linspace(0, 1, 3)
    paths = torch.linspace(0, 1, 101).expand(3, 101)
    psn.plot.bands(times, paths, levels=(0.5,), axes=axes)
    assert np.allclose(axes.lines[0].get_ydata(), 0.5)
    low, high = axes.collections[0].get_paths()[0].vertices[:, 1].min(), 0.75
    assert math.isclose(low, 0.25, abs_tol=1e-6)
    assert math.isclose(axes.collections[0].get_paths()[0].vertices[:, 1].max(), high, abs_tol=1e-6)
    with pytest.raises(ValueError, match=r"\(T, M"):
        psn.plot.bands(times, paths[:2], axes=axes)


def test_trainings_work_and_costs(axes):
    psn.plot.training({"nfe": [80, 60], "loss": [1.0, 0.5]}, axes=axes)
    assert list(axes.lines[0].get_ydata()) == [80, 60]
    with pytest.raises(ValueError, match=r"nfe=\.\.\."):
        psn.plot.training({"loss": [1.0]}, axes=axes)
    other = figures.Figure().subplots()
    psn.plot.work_precision({"Tsit5": [(10, 1e-2), (20, 1e-4)]}, axes=other)
    assert other.get_xscale() == other.get_yscale() == "log"
    last = figures.Figure().subplots()
    psn.plot.bars({"discrete": 1.0, "direct": 8.0}, unit="MiB", axes=last)
    assert [bar.get_width() for bar in last.patches] == [1.0, 8.0]
