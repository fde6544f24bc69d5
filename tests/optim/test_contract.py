"""The torch.optim contract, for every optimizer this package ships."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from optim.flows import Paired, linear_closure, normal

from pysciml_node.optim import VarianceCorrected

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "terminal": {"lr": 0.5},
    "terminal-bound": {"lr": 0.5, "safeguard": "bound"},
    "terminal-backtracking": {"lr": 0.5, "safeguard": "backtracking"},
    "diagonal": {"lr": 0.2, "curvature": "diagonal", "probes": 4, "damping": 0.1},
    "diagonal-backtracking": {"lr": 0.5, "curvature": "diagonal", "safeguard": "backtracking"},
    "gauss-newton": {"lr": 1.0, "curvature": "gauss-newton"},
    "gauss-newton-plain": {"lr": 1.0, "curvature": "gauss-newton", "safeguard": "none"},
    "gauss-newton-backtracking": {
        "lr": 1.0,
        "curvature": "gauss-newton",
        "safeguard": "backtracking",
    },
    "gauss-newton-exact": {"lr": 1.0, "curvature": "gauss-newton", "jvp": "double-backward"},
}
every_optimizer = pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
D, HORIZON = 3, 1.0


class Fit:
    """Two parameters, `A = left + right`, fitted to the flow of a fixed matrix."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.left = torch.nn.Parameter(0.3 * normal(D, D, seed=0, dtype=dtype))
        self.right = torch.nn.Parameter(torch.zeros(D, D, dtype=dtype))
        self.x0 = normal(12, D, seed=1, dtype=dtype)
        self.target = 0.5 * normal(D, D, seed=2, dtype=dtype)

    @property
    def params(self) -> list[torch.nn.Parameter]:
        return [self.left, self.right]

    def closure(self, sign: float = 1.0) -> Paired:
        def evaluate() -> tuple[torch.Tensor, Any]:
            a = self.left + self.right
            loss, sol = linear_closure(a, self.x0, self.target, HORIZON)()
            return sign * loss, sol

        return evaluate

    def loss(self) -> float:
        return float(self.closure()()[0].detach())

    def values(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.params]


def make(fit: Fit, options: dict[str, Any], **changes: Any) -> VarianceCorrected:
    generator = torch.Generator().manual_seed(0)
    return VarianceCorrected(fit.params, **(options | {"generator": generator} | changes))


def run(fit: Fit, optimizer: VarianceCorrected, steps: int, sign: float = 1.0) -> None:
    for _ in range(steps):
        optimizer.step(fit.closure(sign))


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_optimizer
def test_converges(options: dict) -> None:
    fit = Fit()
    start = fit.loss()
    run(fit, make(fit, options), 60)
    assert fit.loss() < 1e-3 * start


@every_optimizer
def test_state_dict_round_trip_continues_bit_for_bit(options: dict) -> None:
    straight, resumed = Fit(), Fit()
    run(straight, make(straight, options), 6)
    first = make(resumed, options)
    run(resumed, first, 3)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = VarianceCorrected(resumed.params, **options)
    second.load_state_dict(torch.load(file, weights_only=True))
    run(resumed, second, 3)
    assert equal(straight.values(), resumed.values())


@every_optimizer
def test_deepcopy_takes_the_same_steps(options: dict) -> None:
    fit = Fit()
    optimizer = make(fit, options)
    run(fit, optimizer, 2)
    twin_fit, twin = copy.deepcopy((fit, optimizer))
    run(fit, optimizer, 2)
    run(twin_fit, twin, 2)
    assert equal(fit.values(), twin_fit.values())


@every_optimizer
def test_foreach_equals_the_loop(options: dict) -> None:
    results = []
    for foreach in (False, True):
        fit = Fit()
        run(fit, make(fit, options, foreach=foreach), 4)
        results.append(fit.values())
    assert equal(*results)


@every_optimizer
def test_maximize_ascends_the_negative(options: dict) -> None:
    down, up = Fit(), Fit()
    run(down, make(down, options), 4)
    run(up, make(up, options, maximize=True), 4, sign=-1.0)
    assert equal(down.values(), up.values())


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_are_kept(options: dict, dtype: torch.dtype) -> None:
    fit = Fit(dtype)
    start = fit.loss()
    optimizer = make(fit, options)
    run(fit, optimizer, 10)
    assert fit.loss() < start
    assert all(p.dtype == dtype for p in fit.params)
    for state in optimizer.state.values():
        assert all(v.dtype == dtype for name, v in state.items() if name != "step")


@every_optimizer
def test_a_group_with_rate_zero_stands_still(options: dict) -> None:
    fit = Fit()
    start = fit.values()
    groups = [{"params": [fit.left]}, {"params": [fit.right], "lr": 0.0}]
    run(fit, VarianceCorrected(groups, **options), 3)
    assert torch.equal(fit.right, start[1])
    assert not torch.equal(fit.left, start[0])


@every_optimizer
def test_group_hyper_parameters_are_read_at_each_step(options: dict) -> None:
    fit = Fit()
    optimizer = make(fit, options)
    run(fit, optimizer, 1)
    before = fit.values()
    optimizer.param_groups[0]["lr"] = 0.0
    run(fit, optimizer, 1)
    assert equal(before, fit.values())


@every_optimizer
def test_schedulers_set_the_rate(options: dict) -> None:
    scheduled, by_hand = Fit(), Fit()
    optimizer, manual = make(scheduled, options), make(by_hand, options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    for power in range(3):
        run(scheduled, optimizer, 1)
        scheduler.step()
        manual.param_groups[0]["lr"] = options["lr"] * 0.5**power
        run(by_hand, manual, 1)
    assert equal(scheduled.values(), by_hand.values())


@every_optimizer
def test_a_tensor_rate_is_a_rate(options: dict) -> None:
    plain, tensor = Fit(), Fit()
    run(plain, make(plain, options), 2)
    run(tensor, make(tensor, options, lr=torch.tensor(options["lr"], dtype=torch.float64)), 2)
    assert equal(plain.values(), tensor.values())


@every_optimizer
def test_parameters_without_gradient_are_left_alone(options: dict) -> None:
    fit = Fit()
    idle = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = VarianceCorrected([*fit.params, idle], **options)
    run(fit, optimizer, 2)
    assert torch.equal(idle, torch.ones_like(idle))
    assert idle not in optimizer.state


@every_optimizer
def test_nothing_happens_without_gradients(options: dict) -> None:
    fit = Fit()
    before = fit.values()
    assert make(fit, options).step() is None
    assert equal(before, fit.values())


@every_optimizer
def test_step_returns_the_loss_before_it_and_leaves_gradients(options: dict) -> None:
    fit = Fit()
    before = fit.loss()
    loss = make(fit, options).step(fit.closure())
    assert float(loss) == before
    assert not loss.requires_grad
    assert all(p.grad is not None for p in fit.params)


@every_optimizer
def test_gradients_do_not_accumulate_over_steps(options: dict) -> None:
    clean, dirty = Fit(), Fit()
    for p in dirty.params:
        p.grad = torch.ones_like(p)
    run(clean, make(clean, options), 1)
    run(dirty, make(dirty, options), 1)
    assert equal(clean.values(), dirty.values())


@every_optimizer
def test_hooks_run(options: dict) -> None:
    fit = Fit()
    optimizer = make(fit, options)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    run(fit, optimizer, 1)
    assert calls == ["pre", "post"]


@every_optimizer
def test_sparse_gradients_are_refused(options: dict) -> None:
    p = torch.nn.Parameter(torch.ones(4, 2))
    p.grad = torch.sparse_coo_tensor([[0]], [[1.0, 1.0]], (4, 2))
    with pytest.raises(TypeError, match="sparse"):
        VarianceCorrected([p], **options).step(horizon=1.0, second_moment=1.0)


@pytest.mark.parametrize("name", ["terminal", "terminal-bound", "diagonal"])
def test_explicit_backward_and_both_closures_take_the_same_step(name: str) -> None:
    results = []
    for way in ("explicit", "paired", "standard"):
        fit = Fit()
        optimizer = make(fit, OPTIMIZERS[name])
        if way == "paired":
            optimizer.step(fit.closure())
        elif way == "explicit":
            loss, sol = fit.closure()()
            loss.backward(retain_graph=True)
            optimizer.step(solution=sol)
        else:
            sols: list[Any] = []

            def standard(fit=fit, optimizer=optimizer, sols=sols) -> torch.Tensor:
                optimizer.zero_grad()
                loss, sol = fit.closure()()
                loss.backward(retain_graph=True)
                sols.append(sol)
                return loss

            _, sol = fit.closure()()
            assert float(optimizer.step(standard, solution=sol).detach()) == Fit().loss()
        results.append(fit.values())
    assert equal(results[0], results[1])
    assert equal(results[0], results[2])


def test_probes_follow_the_generator_alone() -> None:
    def trained(seed: int, global_seed: int) -> list[torch.Tensor]:
        fit = Fit()
        generator = torch.Generator().manual_seed(seed)
        optimizer = VarianceCorrected(fit.params, lr=0.1, curvature="diagonal", generator=generator)
        with torch.random.fork_rng():
            torch.manual_seed(global_seed)
            run(fit, optimizer, 2)
        return fit.values()

    assert equal(trained(1, 1), trained(1, 2))
    assert not equal(trained(1, 1), trained(2, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be finite and at least 0"),
        ({"lr": float("nan")}, "lr must be finite and at least 0"),
        ({"curvature": "fisher"}, "curvature must be one of"),
        ({"safeguard": "gain-ratio"}, "safeguard must be one of"),
        ({"safeguard": "bound", "curvature": "diagonal"}, "safeguard must be one of"),
        ({"damping": 0.1}, "lower lr instead"),
        ({"damping": -0.1, "curvature": "diagonal"}, "damping must be finite and at least 0"),
        ({"beta": 1.0}, "beta must be at least 0 and below 1"),
        ({"probes": 0}, "probes must be a positive whole number"),
        ({"probes": True}, "probes must be a positive whole number"),
        ({"cg_steps": 1.5}, "cg_steps must be a positive whole number"),
        ({"cg_rtol": 0.0}, "cg_rtol must be between 0 and 1"),
        ({"max_trials": 0}, "max_trials must be a positive whole number"),
        ({"fd_step": 0.0}, "fd_step must be between 0 and 1"),
        ({"jvp": "forward"}, "jvp must be one of"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        VarianceCorrected([torch.nn.Parameter(torch.zeros(1))], **options)


def test_groups_must_agree_on_the_joint_step() -> None:
    fit = Fit()
    optimizer = VarianceCorrected([fit.left])
    with pytest.raises(ValueError, match="maximize must agree"):
        optimizer.add_param_group({"params": [fit.right], "maximize": True})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [fit.right], "lr": 0.3})
    single = torch.nn.Parameter(torch.zeros(2, dtype=torch.float32))
    with pytest.raises(ValueError, match="one dtype and device"):
        VarianceCorrected([fit.left, single], curvature="gauss-newton")


def test_complex_parameters_go_with_the_terminal_curvature_alone() -> None:
    a = torch.nn.Parameter(torch.tensor(0.2 + 0.5j, dtype=torch.complex128))
    x0 = normal(6, 1, seed=4).to(a.dtype)
    target = torch.tensor(-0.1 - 0.2j, dtype=a.dtype)
    optimizer = VarianceCorrected([a], lr=0.5)
    for _ in range(40):
        optimizer.zero_grad()
        x = x0 * torch.exp(a)
        (0.5 * (x - x0 * torch.exp(target)).abs().square().mean()).backward()
        optimizer.step(solution=x, horizon=1.0)
    assert abs(a.detach() - target) < 1e-9
    with pytest.raises(ValueError, match="complex"):
        VarianceCorrected([a], curvature="diagonal")
