"""Linear combinations of stages, with a graph and without one."""

import pytest
import torch

from pysciml_node.replay.vectors import RecordedVectors, Weights, vectors_like

FEW, MORE, NONE = (0.1, 0.0, -0.4, 0.3), (0.1, 0.2, -0.4, 0.3), (0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("weights", [FEW, MORE, NONE], ids=["few", "more", "none"])
@pytest.mark.parametrize("size", [3, 40_000], ids=["short", "long"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_with_a_graph_are_those_without_to_the_bit(
    size: int, dtype: torch.dtype, weights: tuple[float, ...]
) -> None:
    torch.manual_seed(0)
    base, *stages = torch.randn(5, size, dtype=dtype).unbind()
    tensor, h = Weights.of(weights, base), 0.37
    plain, recorded = vectors_like(base, 4), RecordedVectors()
    leaves = [x.clone().requires_grad_() for x in (base, *stages)]
    for i, stage in enumerate(stages):
        plain.put(i, stage)
        recorded.put(i, leaves[1 + i])
    total = recorded.combine(leaves[0], h, tensor)
    torch.testing.assert_close(total.detach(), plain.combine(base, h, tensor), rtol=0, atol=0)
    cotangent = torch.randn(size, dtype=dtype)
    gradients = torch.autograd.grad(total, leaves, cotangent, materialize_grads=True)
    for gradient, weight in zip(gradients, (1 / h, *weights), strict=True):
        torch.testing.assert_close(gradient, h * weight * cotangent)


def test_a_single_stage_is_one_node_of_the_graph() -> None:
    base, stage = torch.randn(2, 3, requires_grad=True).unbind()
    recorded = RecordedVectors()
    recorded.put(0, stage)
    total = recorded.combine(base, 0.5, Weights.of((0.2,), base.detach()))
    torch.testing.assert_close(total, base + 0.1 * stage)
    assert total.grad_fn is not None
    assert {node for node, _ in total.grad_fn.next_functions} == {base.grad_fn}
