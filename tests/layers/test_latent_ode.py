"""Latent ODEs: what a missing value can change, merged times, the divergence, the encoders."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pysciml_node as psn
from pysciml_node.data import IrregularSeries
from pysciml_node.layers import GRUEncoder, LatentODE, ODERNNEncoder, Posterior
from pysciml_node.layers.recognition import RecognitionCell, inputs_of, visits
from pysciml_node.schedules import Annealing

VARIABLES, LATENT = 3, 4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def series_of(lengths, seed: int = 0, share: float = 0.6) -> IrregularSeries:
    g = generator(seed)
    return IrregularSeries.join(
        [
            (
                torch.rand(n, generator=g, dtype=torch.float64).sort().values,
                torch.randn(n, VARIABLES, generator=g, dtype=torch.float64),
                torch.rand(n, VARIABLES, generator=g) < share,
            )
            for n in lengths
        ]
    )


class Field(nn.Module):
    def __init__(self, size: int = LATENT) -> None:
        super().__init__()
        weight = 0.7 * torch.randn(size, size, generator=generator(7), dtype=torch.float64)
        self.weight = nn.Parameter(weight)

    def forward(self, t, z):
        return torch.tanh(z @ self.weight) * torch.cos(t)


def make_encoder(kind: str = "gru") -> nn.Module:
    sizes = {"state": 5, "hidden": 6, "generator": generator(1)}
    if kind == "gru":
        return GRUEncoder(VARIABLES, LATENT, **sizes)
    return ODERNNEncoder(VARIABLES, LATENT, Field(10), rtol=1e-9, atol=1e-9, **sizes)


def make_model(kind: str = "gru", **options) -> LatentODE:
    decoder = nn.Linear(LATENT, VARIABLES)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, generator=generator(2))
    options = {"noise": 0.3, "rtol": 1e-9, "atol": 1e-9, "engine": "torch", **options}
    return LatentODE(make_encoder(kind), Field(), decoder, psn.Tsit5(), **options).double()


@pytest.mark.parametrize("kind", ["gru", "ode-rnn"])
@pytest.mark.parametrize("filler", [1e6, float("nan")])
def test_missing_values_change_neither_the_loss_nor_its_gradient(kind, filler):
    series = series_of([4, 2, 5])
    filled = torch.where(series.observed, series.values, filler)
    other = IrregularSeries(series.times, filled, series.observed, series.lengths)
    model = make_model(kind).eval()
    losses = [model.loss(s) for s in (series, other)]
    assert torch.equal(*losses)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("kind", ["gru", "ode-rnn"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_batch_on_merged_times_is_each_sample_alone(kind, reduction):
    series = series_of([4, 1, 6, 3])
    model = make_model(kind, reduction=reduction).eval()
    together = model(series)
    assert together.solution.u.shape == (14, 4, LATENT)
    alone = [model(series[k : k + 1]) for k in range(4)]
    torch.testing.assert_close(
        together.mean, torch.cat([one.mean for one in alone]), rtol=0, atol=1e-7
    )
    separate = torch.stack([model.loss(series[k : k + 1]) for k in range(4)]).mean()
    torch.testing.assert_close(model.loss(series), separate, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["gru", "ode-rnn"])
def test_the_order_of_the_samples_does_not_matter(kind):
    series = series_of([3, 5, 2])
    encoder = make_encoder(kind).double()
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(encoder(series[order]), encoder(series)[order], rtol=0, atol=1e-8)


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_every_row_is_visited_once_and_the_later_ones_of_a_sample_first(lengths):
    series = series_of(lengths)
    seen = [(s, r) for samples, rows in visits(series) for s, r in zip(samples, rows, strict=True)]
    assert sorted(int(row) for _, row in seen) == list(range(sum(lengths)))
    for sample in range(len(lengths)):
        mine = [int(row) for s, row in seen if int(s) == sample]
        assert mine == sorted(mine, reverse=True)
        assert all(int(series.sample[row]) == sample for row in mine)


def test_the_gru_encoder_is_its_cell_row_by_row():
    series = series_of([4, 2])
    encoder = make_encoder().double()
    x, gaps = inputs_of(series)
    assert gaps[series.first + series.lengths - 1].tolist() == [0.0, 0.0]
    torch.testing.assert_close(gaps[0], series.times[1] - series.times[0])
    for sample, rows in enumerate(([3, 2, 1, 0], [5, 4])):
        h = torch.zeros(1, 10, dtype=torch.float64)
        for row in rows:
            h = encoder.cell(x[row : row + 1], h)
        to_start = series.times[rows[-1]].reshape(1, 1)
        h = encoder.cell(torch.cat((torch.zeros(1, 2 * VARIABLES), to_start), 1), h)
        torch.testing.assert_close(encoder(series)[sample], encoder.posterior(h)[0])


@pytest.mark.parametrize("kind", ["gru", "ode-rnn"])
def test_when_a_series_starts_is_seen(kind):
    """The latent state lives at the interval's start, so a later series has another posterior."""
    series = series_of([4, 2])
    moved = IrregularSeries(series.times + 0.25, series.values, series.observed, series.lengths)
    encoder = make_encoder(kind).double()
    with torch.no_grad():
        assert (encoder(series) - encoder(moved)).abs().min().item() > 1e-6
    encoder.start = 0.25  # what counts is the time since the start, but for the field's own time
    if kind == "gru":
        torch.testing.assert_close(encoder(moved), make_encoder(kind).double()(series))


@pytest.mark.parametrize("kind", ["gru", "ode-rnn"])
def test_rows_before_the_start_are_refused(kind):
    encoder = make_encoder(kind).double()
    encoder.start = 2.0
    with pytest.raises(ValueError, match=r"before the start of the interval, 2\.0"):
        encoder(series_of([3, 2]))


def test_encoder_and_latent_state_start_at_one_time():
    with pytest.raises(ValueError, match=r"start=1\.0"):
        make_model(tspan=(1.0, 2.0))


def test_the_cell_is_the_gated_unit_of_its_docstring():
    cell = RecognitionCell(3, 2, 5, generator=generator()).double()
    x = torch.randn(4, 3, generator=generator(1), dtype=torch.float64)
    m, s = torch.randn(2, 4, 2, generator=generator(2), dtype=torch.float64)
    z, r = cell.update(torch.cat((m, s, x), 1)), cell.reset(torch.cat((m, s, x), 1))
    new_m, new_s = cell.new(torch.cat((r * m, r * s, x), 1)).chunk(2, 1)
    expected = torch.cat(((1 - z) * new_m + z * m, (1 - z) * new_s + z * s), 1)
    torch.testing.assert_close(cell(x, torch.cat((m, s), 1)), expected)
    assert bool(((z > 0) & (z < 1)).all())


def test_states_flow_over_each_samples_own_gap():
    encoder = make_encoder("ode-rnn").double()
    h = torch.randn(3, 10, generator=generator(), dtype=torch.float64)
    ends = torch.tensor([0.9, 0.5, 0.7], dtype=torch.float64)
    gaps = torch.tensor([0.4, 0.0, 0.7], dtype=torch.float64)
    after = encoder.between(h, ends, gaps)
    torch.testing.assert_close(after[1], h[1], rtol=0, atol=1e-12)
    for k in (0, 2):
        span = (float(ends[k]), float(ends[k] - gaps[k]))
        problem = psn.ODEProblem(encoder.node.field.field, h[k : k + 1], span)
        alone = psn.solve(problem, rtol=1e-10, atol=1e-10, engine="torch").u1
        torch.testing.assert_close(after[k], alone[0], rtol=0, atol=1e-7)


def test_the_divergence_is_that_of_gaussians():
    mean = torch.randn(5, 2, generator=generator(), dtype=torch.float64)
    log_variance = torch.randn(5, 2, generator=generator(1), dtype=torch.float64)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (log_variance / 2).exp()),
        torch.distributions.Normal(torch.zeros(5, 2).double(), torch.ones(5, 2).double()),
    )
    posterior = Posterior(mean, log_variance)
    torch.testing.assert_close(posterior.divergence(), expected)
    draws = torch.stack([posterior.sample(generator(k)) for k in range(4000)])
    torch.testing.assert_close(draws.mean(0), mean, rtol=0, atol=0.2)
    torch.testing.assert_close(draws.std(0), (log_variance / 2).exp(), rtol=0.05, atol=0)


def test_the_loss_is_the_negative_evidence_lower_bound_with_an_annealed_divergence():
    series = series_of([4, 2])
    model = make_model(reduction="sum", kl_weight=Annealing(0.5, delay=1)).eval()
    found = model(series)
    density = torch.distributions.Normal(found.mean, 0.3).log_prob(series.values)
    likelihood = (density * series.observed).sum() / 2
    divergence = found.posterior.divergence().sum() / 2
    for weight in (0.0, 0.0, 0.5, 0.75):
        torch.testing.assert_close(model.loss(series), weight * divergence - likelihood)
        model.step_schedules()
    copy = make_model(kl_weight=Annealing(0.5, delay=1))
    copy.load_state_dict(model.state_dict())
    assert copy.steps == 4


def test_the_mean_reduction_divides_by_what_was_observed():
    series = series_of([4, 2])
    model = make_model(reduction="mean").eval()
    found = model(series)
    whole = make_model(reduction="sum").log_likelihood(found.mean, series)
    torch.testing.assert_close(
        model.log_likelihood(found.mean, series), whole / series.counts().clamp(min=1)
    )


def test_training_draws_from_the_generator_and_evaluation_takes_the_mean():
    series = series_of([3, 3])
    first, again, other = (make_model(generator=generator(k))(series).mean for k in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    model = make_model().eval()
    start = model(series).solution.trajectory.states()[0].view(2, LATENT)
    torch.testing.assert_close(start, model.encode(series).mean)


def test_rows_that_were_not_shown_can_be_decoded():
    series = series_of([4, 3])
    model = make_model().eval()
    shown, hidden = series.hide(0.5, generator=generator())
    found = model(shown, series)
    assert found.mean.shape == series.values.shape
    values = series.values.clone()
    values[hidden] = 100.0
    changed = IrregularSeries(series.times, values, series.observed, series.lengths)
    torch.testing.assert_close(model(shown, changed).mean, found.mean)
    loss = model.loss(shown, changed.only(~hidden), found)
    torch.testing.assert_close(loss, model.loss(shown, series.only(~hidden), found))


@pytest.mark.parametrize(
    "regularizer",
    [psn.LocalError("biased"), psn.GlobalError(), psn.RandomEndTime(1.0), psn.TaylorDerivative(2)],
    ids=lambda regularizer: regularizer.name,
)
def test_regularizers_reach_the_latent_field_and_rest_in_evaluation(regularizer):
    series = series_of([3, 2])
    model = make_model(regularizers=[regularizer], rtol=1e-4, atol=1e-4)
    found = model(series)
    (model.loss(series, found=found) + found.solution.penalty).backward()
    assert bool(torch.isfinite(model.node.field.weight.grad).all())
    if not isinstance(regularizer, psn.RandomEndTime):
        assert float(found.solution.penalty.detach()) > 0
    else:
        assert not torch.equal(found.solution.t, series.merged[0])
    assert float(model.eval()(series).solution.penalty) == 0.0


@pytest.mark.parametrize("adjoint", [psn.DiscreteAdjoint(), psn.InterpolatingAdjoint()])
def test_gradients_are_those_of_the_recorded_solve(adjoint):
    series = series_of([3, 2])
    gradients = []
    for one in (psn.DirectAdjoint(), adjoint):
        model = make_model(adjoint=one).eval()
        gradients.append(torch.autograd.grad(model.loss(series), list(model.parameters())))
    for direct, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, direct, rtol=1e-5, atol=1e-6)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="noise must be positive"):
        make_model(noise=0.0)
    with pytest.raises(ValueError, match="reduction must be"):
        make_model(reduction="median")
    with pytest.raises(ValueError, match="the 2 samples of series"):
        make_model()(series_of([2, 2]), series_of([2]))
    model = LatentODE(nn.Identity(), Field(), nn.Identity())
    model.encoder.forward = lambda series: torch.zeros(2, 3)
    with pytest.raises(ValueError, match="mean and log-variance"):
        model(series_of([1, 1]))


def test_annealing_rises_from_zero_to_one():
    schedule = Annealing(0.99, delay=100)
    assert schedule(0) == schedule(100) == 0.0
    assert schedule(200) == pytest.approx(1 - math.exp(100 * math.log(0.99)))
    assert schedule(10_000) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        Annealing(1.0)
