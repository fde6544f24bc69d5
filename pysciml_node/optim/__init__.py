"""Optimizers that measure their step at the end of the flow."""

from pysciml_node.optim.terminal import TerminalSolution, scale_by_terminal_variance_
from pysciml_node.optim.variance_corrected import VarianceCorrected

__all__ = ["TerminalSolution", "VarianceCorrected", "scale_by_terminal_variance_"]
