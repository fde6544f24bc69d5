"""torchsde's names on this package's solvers: change the import, keep the rest.

    from pysciml_node.compat import torchsde

Reference: X. Li, P. Kidger, torchsde, https://github.com/google-research/torchsde.
"""

from __future__ import annotations

from pysciml_node.compat.torchsde import settings
from pysciml_node.compat.torchsde.brownian import (
    BaseBrownian,
    BrownianInterval,
    BrownianPath,
    BrownianTree,
    ReverseBrownian,
    brownian_interval_like,
)

__all__ = [
    "BaseBrownian",
    "BrownianInterval",
    "BrownianPath",
    "BrownianTree",
    "ReverseBrownian",
    "brownian_interval_like",
    "settings",
]
