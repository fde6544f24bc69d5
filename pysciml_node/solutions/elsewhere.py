"""The names that other packages have for the parts of a solution."""

ELSEWHERE = {
    "y": "u",
    "ys": "u",
    "x": "u",
    "xs": "u",
    "states": "u",
    "y1": "u1",
    "final": "u1",
    "ts": "t",
    "times": "t",
    "y0": "problem.u0",
    "u0": "problem.u0",
    "nfev": "stats.nfe",
    "nfe": "stats.nfe",
    "status": "retcode",
}
