"""
SciMLSensitivity's adjoints for the fields of this package.

Its "Zygote" vector-Jacobian products find the rule below, so that they call the field's own.
"""
module PySciMLNodeSensitivityExt

using PySciMLNode
using PySciMLNode: RightHandSide, inside, reserve!, linearize!, vjp!, evaluate!, plain, Settings
using ChainRulesCore: ChainRulesCore, NoTangent
using ForwardDiff
using LinearAlgebra
using PySciMLNode.SciMLBase
using PySciMLNode.OrdinaryDiffEqCore: AutoFiniteDiff, CompositeAlgorithm
using SciMLSensitivity
using Zygote

function ChainRulesCore.rrule(rhs::RightHandSide, state, parameters, t)
    u, p = plain(state), plain(parameters)
    reserve!(rhs.field, 1)
    du = similar(u)
    time = inside(rhs, t)
    linearize!(du, rhs.field, u, p, time, 1)
    rhs.evaluations += 1
    function pull(v)
        ubar, pbar = similar(u), zero(p)
        tbar = vjp!(ubar, pbar, rhs.field, u, p, time, 1, plain(ChainRulesCore.unthunk(v)))
        return NoTangent(), ubar, pbar, tbar
    end
    return du, pull
end

method(s::Settings) = method(Val(Symbol(s.method)))
method(::Val{:GaussAdjoint}) = GaussAdjoint(; autojacvec = ZygoteVJP())
method(::Val{:InterpolatingAdjoint}) = InterpolatingAdjoint(; autojacvec = ZygoteVJP())
method(::Val{:BacksolveAdjoint}) = BacksolveAdjoint(; autojacvec = ZygoteVJP())
method(::Val{:QuadratureAdjoint}) = QuadratureAdjoint(; autojacvec = ZygoteVJP())

function PySciMLNode.sensitivities!(
    solution, rhs, settings, times, cotangents, u0bar, pbar; poll
)
    settings.method == "ForwardDiffSensitivity" &&
        return forward!(solution, rhs, settings, times, cotangents, u0bar, pbar)
    function jump!(out, u, p, t, i)
        poll()
        copyto!(out, cotangents[i])
        return nothing
    end
    ubar, gradient = adjoint_sensitivities(
        solution, backward(settings.algorithm);
        t = times, dgdu_discrete = jump!, sensealg = method(settings), abstol = settings.abstol,
        reltol = settings.reltol, maxiters = settings.max_steps,
    )
    copyto!(u0bar, ubar)
    copyto!(pbar, gradient)
    return nothing
end

# The adjoint equation is linear in its state, so that differences give an implicit method its exact
# Jacobian; dual numbers would have to pass through the field's own vector-Jacobian product.
backward(alg) = hasfield(typeof(alg), :autodiff) ? remake(alg; autodiff = AutoFiniteDiff()) : alg
function backward(alg::CompositeAlgorithm)
    return CompositeAlgorithm(map(backward, alg.algs), alg.choice_function)
end

# Dual numbers through the solver: the field's derivatives by its vector-Jacobian products.
function (rhs::RightHandSide)(u::AbstractVector{D}, p, t) where {D<:ForwardDiff.Dual}
    return dual(rhs, u, p, t)
end

function (rhs::RightHandSide)(u::AbstractVector, p::AbstractVector{D}, t) where {D<:ForwardDiff.Dual}
    return dual(rhs, u, p, t)
end

function (rhs::RightHandSide)(
    u::AbstractVector{D}, p::AbstractVector{D}, t
) where {D<:ForwardDiff.Dual}
    return dual(rhs, u, p, t)
end

function dual(rhs, u, p, t)
    D = promote_type(eltype(u), eltype(p))
    x, q, s = ForwardDiff.value.(u), ForwardDiff.value.(p), ForwardDiff.value(t)
    value, pull = ChainRulesCore.rrule(rhs, x, q, s)
    v = zero(value)
    return map(eachindex(value)) do i
        v[i] = 1
        _, ubar, pbar, tbar = pull(v)
        v[i] = 0
        parts = (along(ubar, u), along(pbar, p), along(tbar, t))
        return D(value[i], sum(filter(!isnothing, parts)))
    end
end

# What a perturbation of one argument adds; nothing where it carries none.
along(bar, x::ForwardDiff.Dual) = bar * ForwardDiff.partials(x)
along(bar, x::AbstractArray{<:ForwardDiff.Dual}) = sum(b * ForwardDiff.partials(y) for (b, y) in zip(bar, x))
along(bar, x) = nothing

function forward!(solution, rhs, settings, times, cotangents, u0bar, pbar)
    prob = solution.prob
    n = length(u0bar)
    function loss(z)
        changed = remake(prob; u0 = z[1:n], p = z[(n + 1):end])
        # The steps that the solve took, as they are.
        found = solve(
            changed, settings.algorithm; saveat = times, save_start = false, adaptive = false,
            tstops = solution.t,
        )
        return sum(dot(cotangents[i], found.u[i]) for i in eachindex(times))
    end
    gradient = ForwardDiff.gradient(loss, vcat(prob.u0, prob.p))
    copyto!(u0bar, view(gradient, 1:n))
    copyto!(pbar, view(gradient, (n + 1):length(gradient)))
    return nothing
end

end
