"""Singly diagonally implicit methods with an explicit first stage.

References:
    TRBDF2: R. E. Bank et al., IEEE Trans. Electron Devices 32 (1985) 1992-2007; M. E. Hosea,
    L. F. Shampine, "Analysis and implementation of TR-BDF2", Appl. Numer. Math. 20 (1996) 21-37.
    KenCarp4: C. A. Kennedy, M. H. Carpenter, "Additive Runge-Kutta schemes for
    convection-diffusion-reaction equations", Appl. Numer. Math. 44 (2003) 139-181, the implicit
    part of ARK4(3)6L[2]SA.
"""

from __future__ import annotations

import math

from pysciml_node.tableaus.base import hermite
from pysciml_node.tableaus.implicit import DiagonallyImplicitTableau

_W = math.sqrt(2) / 4
_D = 1 - math.sqrt(2) / 2
_TRBDF2_B = (_W, _W, _D)
TRBDF2 = DiagonallyImplicitTableau(
    order=2,
    error_order=2,
    c=(0.0, 2 * _D, 1.0),
    a=((), (_D,), (_W, _W)),
    b=_TRBDF2_B,
    b_error=((math.sqrt(2) - 1) / 3, -1 / 3, (2 - math.sqrt(2)) / 3),
    fsal=True,
    interpolant=hermite(_TRBDF2_B, fsal=True),
    gamma=_D,
)

_KENCARP4_B = (82889 / 524892, 0.0, 15625 / 83664, 69875 / 102672, -2260 / 8211, 1 / 4)
KENCARP4 = DiagonallyImplicitTableau(
    order=4,
    error_order=3,
    c=(0.0, 1 / 2, 83 / 250, 31 / 50, 17 / 20, 1.0),
    a=(
        (),
        (1 / 4,),
        (8611 / 62500, -1743 / 31250),
        (5012029 / 34652500, -654441 / 2922500, 174375 / 388108),
        (
            15267082809 / 155376265600,
            -71443401 / 120774400,
            730878875 / 902184768,
            2285395 / 8070912,
        ),
        _KENCARP4_B[:5],
    ),
    b=_KENCARP4_B,
    b_error=(
        31666707 / 9881966720,
        0.0,
        -256875 / 105007616,
        -2768025 / 128864768,
        169839 / 3864644,
        -5247 / 225920,
    ),
    fsal=True,
    interpolant=hermite(_KENCARP4_B, fsal=True),
    gamma=1 / 4,
)
