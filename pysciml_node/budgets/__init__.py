"""Training to a budget: weights of penalties that hold what a solve may cost."""

from pysciml_node.budgets.budget import Budget
from pysciml_node.budgets.history import History

__all__ = ["Budget", "History"]
