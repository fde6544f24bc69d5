# PID control as the Python package defines it: a step is accepted where its error is at most 1.
# (OrdinaryDiffEq's own accepts by the factor it would take next.)

struct PID{T,B} <: OrdinaryDiffEqCore.AbstractController
    basic::B
    betas::NTuple{3,T}
    safety::T
end

function PID(::Type{T}, algorithm; beta1, beta2, beta3, safety) where {T}
    basic = OrdinaryDiffEqCore.resolve_basic((;), algorithm, T)
    return PID{T,typeof(basic)}(basic, (beta1, beta2, beta3), safety)
end

mutable struct PIDCache{T,B,E} <: OrdinaryDiffEqCore.AbstractControllerCache
    controller::PID{T,B}
    history::NTuple{2,T}
    EEst::E
end

function OrdinaryDiffEqCore.setup_controller_cache(
    alg, cache, controller::PID{T,B}, ::Type{E}, disco_probs
) where {T,B,E}
    return PIDCache{T,B,E}(controller, (one(T), one(T)), oneunit(E))
end

# The factor on the step size; the floor keeps the powers finite where a step was exact.
function factor(integrator, cache::PIDCache{T}, alg) where {T}
    (; betas, safety) = cache.controller
    k = OrdinaryDiffEqCore.get_current_adaptive_order(alg, integrator.cache) + 1
    errors = (max(T(cache.EEst), T(1e-10)), cache.history...)
    product = prod((e / safety)^(-beta / k) for (e, beta) in zip(errors, betas))
    return 1 + atan(product - 1)
end

OrdinaryDiffEqCore.stepsize_controller!(integrator, cache::PIDCache, alg) =
    1 / factor(integrator, cache, alg)

function OrdinaryDiffEqCore.step_accept_controller!(
    integrator, cache::PIDCache{T}, alg, q
) where {T}
    cache.history = (max(T(cache.EEst), T(1e-10)), cache.history[1])
    return integrator.dt / q
end

function OrdinaryDiffEqCore.step_reject_controller!(integrator, cache::PIDCache{T}, alg) where {T}
    shrink = isfinite(cache.EEst) ? min(factor(integrator, cache, alg), T(0.9)) : T(0.2)
    return integrator.dt *= shrink
end
