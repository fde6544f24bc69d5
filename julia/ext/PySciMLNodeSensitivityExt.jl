"""
SciMLSensitivity's adjoints for the fields of this package.

Its "Zygote" vector-Jacobian products find the rule below, so that they call the field's own.
"""
module PySciMLNodeSensitivityExt

using PySciMLNode
using PySciMLNode: RightHandSide, Settings, backward, inside, linearize!, plain, reserve!, vjp!
using ChainRulesCore: ChainRulesCore, NoTangent
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
    function jump!(out, u, p, t, i)
        poll()
        copyto!(out, cotangents[i])
        return nothing
    end
    # How the adjoint solve ends is not told: look how far it comes.
    reached = times[end]
    look(u, p, t) = (reached = t; false)
    ubar, gradient = adjoint_sensitivities(
        solution, backward(settings.algorithm);
        t = times, dgdu_discrete = jump!, sensealg = method(settings), abstol = settings.abstol,
        reltol = settings.reltol, maxiters = settings.max_steps, isoutofdomain = look,
    )
    t0, t1 = solution.prob.tspan
    # It is told the end of a step before the solver rounds it to the end of the interval.
    abs(reached - t0) <= 100 * eps(max(abs(t0), abs(t1))) || throw(
        ErrorException(
            "the adjoint equation could not be solved beyond t = $reached; larger tolerances of " *
            "the adjoint, or more max_steps, may help",
        ),
    )
    copyto!(u0bar, ubar)
    gradient === nothing || (pbar .+= vec(gradient))
    return nothing
end

end
