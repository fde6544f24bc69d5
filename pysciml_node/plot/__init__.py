"""Pictures of solutions, flows and trainings, by matplotlib.

Each function draws into the axes it is given, or into the current ones, and returns them; titles,
limits and saving stay with matplotlib. The functions read what they draw and keep no graph.
"""

from pysciml_node.plot.models import bands, density
from pysciml_node.plot.solutions import phase, solution, steps
from pysciml_node.plot.studies import bars, budget, training, work_precision

__all__ = [
    "bands",
    "bars",
    "budget",
    "density",
    "phase",
    "solution",
    "steps",
    "training",
    "work_precision",
]
