"""Walks through the graphs of functions that are no fields, and return something else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree
from typing_extensions import override

from pysciml_node.errors import UnsupportedModule
from pysciml_node.translation.builder import Traced
from pysciml_node.translation.graph import GraphWalk


class DiffusionWalk(GraphWalk):
    """Goes through the graph of a diffusion, which may have an axis of motions behind the state's.

    Which shape is right depends on the noise; the program has the one that the diffusion returns.
    """

    @override
    def flat(self, out: Any) -> Tensor:
        whole = self.spec.keys is None and isinstance(out, Tensor)
        return out.reshape(-1) if whole else super().flat(out)

    @override
    def _outputs(self, outputs: Sequence[Any]) -> list[Traced]:
        return self._parts(outputs) if self.spec.keys is None else super()._outputs(outputs)


class JacobianWalk(GraphWalk):
    """Goes through the graph of a Jacobian that a problem brings, which is one tensor."""

    @override
    def flat(self, out: Any) -> Tensor:
        matrix: Tensor = out.reshape(-1)
        return matrix

    @override
    def _outputs(self, outputs: Sequence[Any]) -> list[Traced]:
        return [self._trace(x) for x in outputs]


class ConditionWalk(GraphWalk):
    """Goes through the graph of an event's condition, which is one real number.

    What is true or false becomes 1 or -1, as for a loop in Python.
    """

    @override
    def flat(self, out: Any) -> Tensor:
        if not isinstance(out, Tensor):
            raise UnsupportedModule(f"{self._name} must return one real number as a tensor.")
        value = out.reshape(1).to(self.spec.dtype)
        return 2.0 * value - 1.0 if out.dtype == torch.bool else value

    @override
    def _expect_dtype(self) -> None:
        """Refuse nothing: a number of any dtype has a sign."""

    @override
    def _outputs(self, outputs: Sequence[Any]) -> list[Traced]:
        nodes = pytree.tree_leaves(self.exported.graph.output_node().args)
        kinds = [node.meta["val"] for node in nodes if isinstance(node, Node)]
        if len(nodes) != 1 or len(kinds) != 1 or kinds[0].numel() != 1:
            raise UnsupportedModule(f"{self._name} must return one real number as a tensor.")
        value = self._trace(outputs[0])
        truth = kinds[0].dtype == torch.bool
        return [self.builder.affine(value, 2.0, -1.0) if truth else value]
