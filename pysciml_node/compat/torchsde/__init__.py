"""torchsde's names on this package's solvers: change the import, keep the rest.

    from pysciml_node.compat import torchsde

Reference: X. Li, P. Kidger, torchsde, https://github.com/google-research/torchsde.
"""

from __future__ import annotations

from pysciml_node.compat.torchsde import settings, types
from pysciml_node.compat.torchsde.brownian import (
    BaseBrownian,
    BrownianInterval,
    BrownianPath,
    BrownianTree,
    ReverseBrownian,
    brownian_interval_like,
)
from pysciml_node.compat.torchsde.functions import sdeint, sdeint_adjoint
from pysciml_node.compat.torchsde.sdes import BaseSDE, SDEIto, SDEStratonovich

# The version whose interface this is.
__version__ = "0.2.6"

__all__ = [
    "BaseBrownian",
    "BaseSDE",
    "BrownianInterval",
    "BrownianPath",
    "BrownianTree",
    "ReverseBrownian",
    "SDEIto",
    "SDEStratonovich",
    "brownian_interval_like",
    "sdeint",
    "sdeint_adjoint",
    "settings",
    "types",
]
