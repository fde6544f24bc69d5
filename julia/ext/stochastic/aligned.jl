"""
A step size controller whose steps end where the path is found quickly: at times that are whole numbers
of a power of two of the tree's `length` from `t0`.

What the alignment changes is not fed back: `proposed` is the size that the controller has asked for,
and small factors would be rounded away.
"""
struct Aligned{C} <: OrdinaryDiffEqCore.AbstractController
    inner::C
    t0::Float64
    length::Float64
    proposed::Float64
end

mutable struct AlignedCache{C,K} <: OrdinaryDiffEqCore.AbstractControllerCache
    const inner::C
    const controller::K  # the inner one: solvers read their limits from it
    const t0::Float64
    const length::Float64
    proposed::Float64
end

function OrdinaryDiffEqCore.setup_controller_cache(
    alg, cache, c::Aligned, ::Type{E}, disco_probs
) where {E}
    inner = OrdinaryDiffEqCore.setup_controller_cache(alg, cache, c.inner, E, disco_probs)
    return AlignedCache(inner, inner.controller, c.t0, c.length, c.proposed)
end

OrdinaryDiffEqCore.get_EEst(c::AlignedCache) = OrdinaryDiffEqCore.get_EEst(c.inner)
OrdinaryDiffEqCore.set_EEst!(c::AlignedCache, value) = OrdinaryDiffEqCore.set_EEst!(c.inner, value)

OrdinaryDiffEqCore.stepsize_controller!(integrator, c::AlignedCache, alg) =
    OrdinaryDiffEqCore.stepsize_controller!(integrator, c.inner, alg)

OrdinaryDiffEqCore.accept_step_controller(integrator, c::AlignedCache, alg) =
    OrdinaryDiffEqCore.accept_step_controller(integrator, c.inner, alg)

function OrdinaryDiffEqCore.step_accept_controller!(integrator, c::AlignedCache, alg, q)
    following = OrdinaryDiffEqCore.step_accept_controller!(integrator, c.inner, alg, q)
    c.proposed *= following / integrator.dt
    limited = c.proposed > integrator.opts.dtmax
    return aligned(c, integrator.t, min(c.proposed, integrator.opts.dtmax), limited)
end

function OrdinaryDiffEqCore.step_reject_controller!(integrator, c::AlignedCache, alg)
    c.proposed = OrdinaryDiffEqCore.step_reject_controller!(integrator, c.inner, alg)
    integrator.dt = aligned(c, integrator.t, c.proposed, true)
    return integrator.dt
end

# Sizes keep three binary digits: they change by an eighth at most, or become shorter by a quarter
# where they must not become longer. Python aligns the first step by the same rule.
function aligned(c::AlignedCache, t, h, down)
    isfinite(h) && h > 0 || return h
    unit = ldexp(1.0, exponent(h / c.length) - 2)
    place = (t - c.t0 + h) / c.length / unit
    return c.t0 + (down ? floor(place) : round(place)) * unit * c.length - t
end
