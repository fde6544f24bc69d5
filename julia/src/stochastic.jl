# Stochastic equations: what Python calls; filled in by the extension with StochasticDiffEq.

"""
    start_sde!(fd, drift, diffusion, plan, device, delta, n, u0, nf, pf, ng, pg, nmarks, marks, dt0,
               proposed, dtmin, motions, samples, length, w, z, noise) -> handle of a walk

Get ready to solve `du = f dt + g dW` from `marks[1]` to `marks[end]` by steps to all marks between.

Addresses: `u0` `(n)`, parameters `pf` `(nf)` of the drift and `pg` `(ng)` of the diffusion, `w` and `z`
`(motions)`, `marks` in double precision. `noise(start, end)` writes to `w` and `z` the increments of
`motions` Brownian motions and of the independent ones that give the integrals `I_(1,0)`; with
`samples > 0` the diffusion is a matrix for each of as many samples, otherwise it is diagonal.

The first step has size `dt0`, and `proposed` is what the controller wanted; with `length > 0` steps end
where the path, a tree over that length, is found quickly.
"""
function start_sde! end

"""
    step_sde!(fd, walk, device, n, u, report) -> code

Take one accepted step and write the state at its end to the address `u`. `report` takes, in double
precision: its end, its error, all rejected steps, and the evaluations of drift and diffusion so far.
Returns -1, or the return code of a solve that has failed. Throws when `fd` tells of an interrupt.
"""
function step_sde! end

"""
    make_sde_method(json) -> handle

The coefficients of a stochastic method, for its discrete adjoint.
"""
function make_sde_method end

"""
    make_sde_pullback(drift, diffusion, method, dtype, device, n, nf, pf, pfbar, ng, pg, pgbar, w, z)
        -> handle

The discrete adjoint of steps with diagonal noise. Addresses: the parameters of drift and diffusion
with their gradients, which are added to, and the increments `w` and `z` `(n)`, which each pull reads.
"""
function make_sde_pullback end

"""
    pull_sde!(fd, pullback, device, n, t, h, u, ubar)

Replace the cotangent at the address `ubar` of the end of a step from `t`, `u` by that of its start.
"""
function pull_sde! end
