"""Stochastic Runge-Kutta methods as data.

References:
    SRIW1, SRA1: A. Roessler, "Runge-Kutta methods for the strong approximation of solutions of
    stochastic differential equations", SIAM J. Numer. Anal. 48 (2010) 922-952, tables 6.1 and 6.3;
    the embedded error estimates: C. Rackauckas, Q. Nie, Discrete Contin. Dyn. Syst. B 22 (2017)
    2731-2761.
    SOSRI, SOSRI2, SOSRA, SOSRA2: C. Rackauckas, Q. Nie, "Stability-optimized high order methods and
    stiffness detection for pathwise stiff stochastic differential equations", arXiv 1804.04344; the
    digits are those of StochasticDiffEq.jl `src/tableaus.jl`.
    EM, RKMil: P. E. Kloeden, E. Platen, *Numerical Solution of Stochastic Differential Equations*,
    Springer 1992, sections 10.2 and 11.1; their estimate: H. Lamba, J. Comput. Appl. Math. 161
    (2003) 417-430.
    EulerHeun: W. Ruemelin, SIAM J. Numer. Anal. 19 (1982) 604-613.
    StratonovichMidpoint: P. E. Kloeden, E. Platen, section 5.4 (the midpoint rule of ordinary
    equations along the path); K. Burrage, P. M. Burrage, T. Tian, Proc. R. Soc. Lond. A 460 (2004)
    373-402.
    ReversibleHeun: P. Kidger, J. Foster, X. Li, T. Lyons, "Efficient and accurate gradients for
    neural SDEs", arXiv 2105.13493, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

Row = tuple[float, ...]

Integral = Literal["sqrt_h", "w", "i10", "i11", "i111"]
"""What a row of diffusion weights is multiplied by, for a step of size `h`.

`sqrt_h`: `h**0.5`; `w`: `W`; `i10`: `I_(1,0) / h`; `i11`: `I_(1,1) / h**0.5`;
`i111`: `I_(1,1,1) / h`; with the iterated Ito integrals of one Brownian motion.
"""

Rows = tuple[tuple[Integral, Row], ...]


@dataclass(frozen=True)
class Stage:
    """A point at which the drift or the diffusion is evaluated.

    At time `t + c h` and state `base_0 u + base_1 v + h sum_j a_j f_j + sum_k I_k sum_j b_kj g_j`,
    with the drifts `f_j` and diffusions `g_j` of the stages before.

    Args:
        c: node.
        a: weights of the drifts.
        noise: for each integral its weights of the diffusions.
        base: weights of the state `u` and of the carried vector `v` (reversible methods).
    """

    c: float = 0.0
    a: Row = ()
    noise: Rows = ()
    base: tuple[float, float] = (1.0, 0.0)


@dataclass(frozen=True)
class SDETableau:
    """An explicit stochastic Runge-Kutta method with an embedded error estimate.

    The step is `u1 = u + h sum_i alpha_i f_i + sum_k I_k sum_i beta_ki g_i`.

    Args:
        drift: stages of the drift; `None` where a stage has none.
        diffusion: stages of the diffusion, as many; `None` likewise.
        alpha: weights of the drifts.
        beta: for each integral its weights of the diffusions.
        error_drift: weights of the drift part of the error estimate.
        error_noise: weights of its diffusion part.
        strong_order: of convergence of paths, for the noise the method is made for.
        weak_order: of convergence of moments.
        controller_order: exponent `k` of the step size control, `h <- h * error**(-1/k)`.
        per_root: the scaled error is divided by the square root of the step's share of the
            interval. Errors of mean zero add up in the mean square, so that the sum over all steps
            then is at the tolerance; methods that propagate a better solution than the one whose
            error they estimate do without.
        carry: the argument of the last stage is carried to the next step, beside the state.
        fsal: the last stage is the first of the next step.
        stiffness_stages: two drift stages with the same node, whose difference quotient estimates
            the dominant eigenvalue.
        stability_radius: length of the drift's stability region on the negative real axis.
    """

    drift: tuple[Stage | None, ...]
    diffusion: tuple[Stage | None, ...]
    alpha: Row
    beta: Rows
    error_drift: Row
    error_noise: Rows
    strong_order: float
    weak_order: float
    controller_order: float
    per_root: bool = False
    carry: bool = False
    fsal: bool = False
    stiffness_stages: tuple[int, int] | None = None
    stability_radius: float | None = None

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.drift)

    @property
    def error_order(self) -> float:
        """Order of the embedded solution, as step size controllers count it."""
        return self.controller_order - 1


_FIRST = Stage()

# Euler's drift increment ends at the second stage's time. Its diffusion, moved by one standard
# deviation, gives Milstein's correction: what EM leaves out and RKMil adds.
_EULER = Stage(c=1.0, a=(1.0,))
_LAMBA_DRIFT = (-1 / 2, 1 / 2)

EM = SDETableau(
    drift=(_FIRST, _EULER),
    diffusion=(_FIRST, Stage(a=(1.0,), noise=(("sqrt_h", (1.0,)),))),
    alpha=(1.0, 0.0),
    beta=(("w", (1.0, 0.0)),),
    error_drift=_LAMBA_DRIFT,
    error_noise=(("i11", (-1.0, 1.0)),),
    strong_order=0.5,
    weak_order=1.0,
    controller_order=0.5,
    per_root=True,
)

# StochasticDiffEq's adaptive method: the diffusion is evaluated at the end of the step's interval.
LAMBA_EM = replace(
    EM, diffusion=(Stage(c=1.0), Stage(c=1.0, a=(1.0,), noise=(("sqrt_h", (1.0,)),)))
)

# For general noise one stage cannot give the corrections of all pairs of motions: the change of the
# diffusion over the step stands in for them.
EM_GENERAL = SDETableau(
    drift=(_FIRST, _EULER),
    diffusion=(_FIRST, Stage(c=1.0, a=(1.0,), noise=(("w", (1.0,)),))),
    alpha=(1.0, 0.0),
    beta=(("w", (1.0, 0.0)),),
    error_drift=_LAMBA_DRIFT,
    error_noise=(("w", (-1 / 2, 1 / 2)),),
    strong_order=0.5,
    weak_order=1.0,
    controller_order=0.5,
    per_root=True,
)

LAMBA_EM_GENERAL = replace(
    EM_GENERAL, diffusion=(Stage(c=1.0), Stage(c=1.0, a=(1.0,), noise=(("w", (1.0,)),)))
)

RKMIL = SDETableau(
    drift=(_FIRST, _EULER),
    diffusion=EM.diffusion,
    alpha=(1.0, 0.0),
    beta=(("w", (1.0, 0.0)), ("i11", (-1.0, 1.0))),
    error_drift=_LAMBA_DRIFT,
    error_noise=(("i11", (-1.0, 1.0)),),
    strong_order=1.0,
    weak_order=1.0,
    controller_order=1.0,
)

# J_(1,1) = W^2 / 2 = I_(1,1) + h / 2.
_STRATONOVICH_CORRECTION: Rows = (("i11", (-1.0, 1.0)), ("sqrt_h", (-1 / 2, 1 / 2)))
RKMIL_STRATONOVICH = SDETableau(
    drift=(_FIRST, _EULER),
    diffusion=(_FIRST, Stage(noise=(("sqrt_h", (1.0,)),))),
    alpha=(1.0, 0.0),
    beta=(("w", (1.0, 0.0)), *_STRATONOVICH_CORRECTION),
    error_drift=_LAMBA_DRIFT,
    error_noise=_STRATONOVICH_CORRECTION,
    strong_order=1.0,
    weak_order=1.0,
    controller_order=1.0,
)

_EULER_MARUYAMA = Stage(c=1.0, a=(1.0,), noise=(("w", (1.0,)),))
EULER_HEUN = SDETableau(
    drift=(_FIRST, _EULER_MARUYAMA),
    diffusion=(_FIRST, _EULER_MARUYAMA),
    alpha=(1 / 2, 1 / 2),
    beta=(("w", (1 / 2, 1 / 2)),),
    error_drift=(-1 / 2, 1 / 2),
    error_noise=(("w", (-1 / 2, 1 / 2)),),
    strong_order=1.0,
    weak_order=1.0,
    controller_order=1.0,
)

# The midpoint rule along the path. The difference from Euler's step estimates the error.
_HALFWAY = Stage(c=1 / 2, a=(1 / 2,), noise=(("w", (1 / 2,)),))
STRATONOVICH_MIDPOINT = SDETableau(
    drift=(_FIRST, _HALFWAY),
    diffusion=(_FIRST, _HALFWAY),
    alpha=(0.0, 1.0),
    beta=(("w", (0.0, 1.0)),),
    error_drift=(-1.0, 1.0),
    error_noise=(("w", (-1.0, 1.0)),),
    strong_order=1.0,
    weak_order=1.0,
    controller_order=1.0,
)

# The carried vector v is where the field was last evaluated: v1 = 2 u - v + h f(v) + g(v) W.
_CARRIED = Stage(base=(0.0, 1.0))
_REVERSED = Stage(c=1.0, a=(1.0,), noise=(("w", (1.0,)),), base=(2.0, -1.0))
REVERSIBLE_HEUN = SDETableau(
    drift=(_CARRIED, _REVERSED),
    diffusion=(_CARRIED, _REVERSED),
    alpha=(1 / 2, 1 / 2),
    beta=(("w", (1 / 2, 1 / 2)),),
    error_drift=(-1 / 2, 1 / 2),
    error_noise=(("w", (-1 / 2, 1 / 2)),),
    strong_order=1.0,
    weak_order=1.0,
    controller_order=1.0,
    carry=True,
    fsal=True,
)

# What the order is where the noise does not commute.
_HALF: dict[str, Any] = {"strong_order": 0.5, "controller_order": 0.5, "per_root": True}
EULER_HEUN_GENERAL = replace(EULER_HEUN, **_HALF)
STRATONOVICH_MIDPOINT_GENERAL = replace(STRATONOVICH_MIDPOINT, **_HALF)
REVERSIBLE_HEUN_GENERAL = replace(REVERSIBLE_HEUN, **_HALF)


def _drift_stages(a: tuple[Row, ...], b: tuple[Row, ...]) -> tuple[Stage, ...]:
    """Drift stages of Roessler's methods: their diffusions enter with `I_(1,0) / h`."""
    return tuple(
        Stage(c=sum(row), a=row, noise=(("i10", weights),) if any(weights) else ())
        for row, weights in zip(a, b, strict=True)
    )


def _sri(
    a0: tuple[Row, ...],
    a1: tuple[Row, ...],
    b0: tuple[Row, ...],
    b1: tuple[Row, ...],
    alpha: Row,
    beta: tuple[Row, Row, Row, Row],
    error_drift: Row,
    stiffness_stages: tuple[int, int] | None = None,
    stability_radius: float | None = None,
) -> SDETableau:
    """A method for diagonal and scalar noise, from Roessler's notation.

    The parts with `beta_3` and `beta_4` are what a method of strong order 1 does without.
    """
    used = tuple(w or e for w, e in zip(alpha, error_drift, strict=True))
    return SDETableau(
        drift=tuple(
            stage if weight else None
            for stage, weight in zip(_drift_stages(a0, b0), used, strict=True)
        ),
        diffusion=tuple(
            Stage(c=sum(row), a=row, noise=(("sqrt_h", weights),) if any(weights) else ())
            for row, weights in zip(a1, b1, strict=True)
        ),
        alpha=alpha,
        beta=(("w", beta[0]), ("i11", beta[1]), ("i10", beta[2]), ("i111", beta[3])),
        error_drift=error_drift,
        error_noise=(("i10", beta[2]), ("i111", beta[3])),
        strong_order=1.5,
        weak_order=2.0,
        controller_order=1.5,
        stiffness_stages=stiffness_stages,
        stability_radius=stability_radius,
    )


# The third drift stage would be the first one again: its weight of 1/4 stands with that.
SRIW1 = _sri(
    a0=((), (3 / 4,), (0.0, 0.0), (0.0, 0.0, 0.0)),
    a1=((), (1 / 4,), (1.0, 0.0), (1 / 4, 0.0, 0.0)),
    b0=((), (3 / 2,), (0.0, 0.0), (0.0, 0.0, 0.0)),
    b1=((), (1 / 2,), (-1.0, 0.0), (-5.0, 3.0, 1 / 2)),
    alpha=(1 / 3, 2 / 3, 0.0, 0.0),
    beta=(
        (-1.0, 4 / 3, 2 / 3, 0.0),
        (-1.0, 4 / 3, -1 / 3, 0.0),
        (2.0, -4 / 3, -2 / 3, 0.0),
        (-2.0, 5 / 3, -2 / 3, 1.0),
    ),
    error_drift=(1.0, 1.0, 0.0, 0.0),
)

SOSRI = _sri(
    a0=(
        (),
        (-0.04199224421316468,),
        (2.842612915017106, -2.0527723684000727),
        (4.338237071435815, -2.8895936137439793, 2.3017575594644466),
    ),
    a1=(
        (),
        (0.26204282091330466,),
        (0.20903646383505375, -0.1502377115150361),
        (0.05836595312746999, 0.6149440396332373, 0.08535117634046772),
    ),
    b0=(
        (),
        (-0.21641093549612528,),
        (1.5336352863679572, 0.26066223492647056),
        (-1.0536037558179159, 1.7015284721089472, -0.20725685784180017),
    ),
    b1=(
        (),
        (-0.5119011827621657,),
        (2.67767339866713, -4.9395031322250995),
        (0.15580956238299215, 3.2361551006624674, -1.4223118283355949),
    ),
    alpha=(1.140099274172029, -0.6401334255743456, 0.4736296532772559, 0.026404498125060714),
    beta=(
        (-1.8453464565104432, 2.688764531100726, -0.2523866501071323, 0.40896857551684956),
        (0.4969658141589478, -0.5771202869753592, -0.12919702470322217, 0.2093514975196336),
        (2.8453464565104425, -2.688764531100725, 0.2523866501071322, -0.40896857551684945),
        (0.11522663875443433, -0.57877086147738, 0.2857851028163886, 0.17775911990655704),
    ),
    error_drift=(1.0, 1.0, 1.0, 1.0),
)

SOSRI2 = _sri(
    a0=(
        (),
        (0.13804532298278663,),
        (0.5818361298250374, 0.4181638701749618),
        (0.4670018408674211, 0.8046204792187386, -0.27162232008616016),
    ),
    a1=(
        (),
        (0.45605532163856893,),
        (0.7555807846451692, 0.24441921535482677),
        (0.6981181143266059, 0.3453277086024727, -0.04344582292908241),
    ),
    b0=(
        (),
        (0.08852381537667678,),
        (1.0317752458971061, 0.4563552922077882),
        (1.73078280444124, -0.46089678470929774, -0.9637509618944188),
    ),
    b1=(
        (),
        (0.6753186815412179,),
        (-0.07452812525785148, -0.49783736486149366),
        (-0.5591906709928903, 0.022696571806569924, -0.8984927888368557),
    ),
    alpha=(-0.15036858140642623, 0.7545275856696072, 0.686995463807979, -0.2911544680711602),
    beta=(
        (-0.45315689727309133, 0.8330937231303951, 0.3792843195533544, 0.24077885458934192),
        (-0.4994383733810986, 0.9181786186154077, -0.25613778661003145, -0.16260245862427797),
        (1.4531568972730915, -0.8330937231303933, -0.3792843195533583, -0.24077885458934023),
        (-0.4976090683622265, 0.9148155835648892, -1.4102107084476505, 0.9930041932449877),
    ),
    error_drift=(1.0, 1.0, 1.0, 1.0),
    stiffness_stages=(2, 3),
    stability_radius=10.6,
)


def _sra(
    a0: tuple[Row, ...],
    b0: tuple[Row, ...],
    c1: Row,
    alpha: Row,
    beta: tuple[Row, Row],
    stiffness_stages: tuple[int, int] | None = None,
    stability_radius: float | None = None,
) -> SDETableau:
    """A method for additive noise, from Roessler's notation."""
    return SDETableau(
        drift=_drift_stages(a0, b0),
        diffusion=tuple(Stage(c=c) for c in c1),
        alpha=alpha,
        beta=(("w", beta[0]), ("i10", beta[1])),
        error_drift=(1.0,) * len(alpha),
        error_noise=(("i10", beta[1]),),
        strong_order=1.5,
        weak_order=2.0,
        controller_order=1.5,
        stiffness_stages=stiffness_stages,
        stability_radius=stability_radius,
    )


SRA1 = _sra(
    a0=((), (3 / 4,)),
    b0=((), (3 / 2,)),
    c1=(1.0, 0.0),
    alpha=(1 / 3, 2 / 3),
    beta=((1.0, 0.0), (-1.0, 1.0)),
)

SOSRA = _sra(
    a0=((), (0.6923962376159507,), (-3.1609142252828395, 4.1609142252828395)),
    b0=((), (1.3371632704399763,), (1.442371048468624, 1.8632741501139225)),
    c1=(0.0, 0.041248171110700504, 1.0),
    alpha=(0.2889874966892885, 0.6859880440839937, 0.025024459226717772),
    beta=(
        (-16.792534242221663, 17.514995785380226, 0.27753845684143835),
        (0.4237535769069274, 0.6010381474428539, -1.0247917243497813),
    ),
)

SOSRA2 = _sra(
    a0=((), (1.0,), (0.9511849235504364, 0.04881507644956362)),
    b0=((), (0.7686101171003622,), (0.43886792994934987, 0.7490415909204886)),
    c1=(0.0, 1.0, 1.0),
    alpha=(0.4999999999999998, -0.9683897375354181, 1.4683897375354185),
    beta=(
        (0.0, 0.92438032145683, 0.07561967854316998),
        (1.0, -0.8169981105823436, -0.18300188941765633),
    ),
    stiffness_stages=(1, 2),
    stability_radius=5.3,
)
