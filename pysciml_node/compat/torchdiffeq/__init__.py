"""torchdiffeq's functions on this package's solvers: change the import, keep the rest.

    from pysciml_node.compat.torchdiffeq import odeint, odeint_adjoint

What is kept: signatures, names of methods and options, time first in the result, decreasing times,
tuples of tensors as state, integral step control with torchdiffeq's constants and norms, the grids
of the fixed-step methods, and the callbacks. What differs, on purpose:

* The last step ends on the last time, and `func` is never called outside the interval. Other times
  are read off the method's own interpolant, not a quartic; also for the implicit methods, where
  `options["interp"]` is accepted and has no effect.
* A solve that cannot go on raises `SolverFailure` with the partial solution, not `AssertionError`;
  so does one whose state is not finite.
* `odeint_adjoint` takes the accepted steps again where nothing else is asked for.
* With `event_fn`, the time and the state of the event carry their gradients at once: `odeint_event`
  adds nothing to `odeint` but its signature.
* The Adams methods have the weights of the grid that they are on, also where its steps differ.

Reference: R. T. Q. Chen, torchdiffeq, https://github.com/rtqichen/torchdiffeq.
"""

from pysciml_node.compat.torchdiffeq import _impl
from pysciml_node.compat.torchdiffeq.adjoint import odeint_adjoint
from pysciml_node.compat.torchdiffeq.functions import odeint, odeint_dense, odeint_event

# The version whose interface this is.
__version__ = "0.2.5"

__all__ = ["_impl", "odeint", "odeint_adjoint", "odeint_dense", "odeint_event"]
