# The forward solve: OrdinaryDiffEq's steps, one at a time, so that each can be recorded, watched and
# interrupted.

"""
What a forward solve leaves: ends of the accepted `times`, scaled `errors` of the steps, `states` at
the times, how it ended, how many states were saved and how many steps rejected, SciML's own
solutions where these are kept, one between each two stops, and the right-hand side that they call.
"""
mutable struct Record{V}
    const times::Vector{Float64}
    const errors::Vector{Float64}
    const states::Vector{V}
    retcode::ReturnCode.T
    saved::Int
    rejected::Int
    const pieces::Vector{Any}
    const rhs::RightHandSide
end

Record(rhs, u0::V, t) where {V} =
    Record{V}([t], Float64[], [copy(u0)], ReturnCode.Default, 0, 0, [], rhs)

"""
    march(rhs, plan, u0, p, marks, dt0, saveat, saved; poll, watch, dense, mass_matrix) -> Record

Solve from `marks[1]` to `marks[end]`, stepping to all marks between them.

The states at `saveat`, in the order of integration, are written to the columns of `saved`. `poll()`
is called at each step and may throw. `watch(integrator)` sees each accepted step and ends the solve
where it returns true; nothing is saved in that step. With `dense` SciML's own solutions are kept in
the record, one between each two marks, so that nothing is interpolated across a stop; the field is
then called out of place, as the adjoints of SciMLSensitivity want it.
"""
function march(
    rhs::RightHandSide, plan::Plan{T}, u0::V, p::V, marks, dt0, saveat, saved;
    poll, watch, dense, mass_matrix
) where {T,V}
    record = begun(rhs, u0, marks, saveat, saved)
    last = length(marks)
    # By pieces where the solutions are kept, and otherwise in one go.
    for (from, to) in (dense ? [(i, i + 1) for i in 1:(last - 1)] : [(1, last)])
        bound!(rhs, T, marks, marks[from], marks[from + 1])
        span = T.((marks[from], marks[to]))
        problem = ode_problem(rhs, copy(record.states[end]), span, p, mass_matrix, Val(dense))
        first = from == 1 || !plan.adaptive ? dt0 : 0.0
        left = max(plan.max_steps - length(record.errors) - record.rejected, 1)
        stops = T.(view(marks, (from + 1):(to - 1)))
        integrator = start(problem, plan, stops, first, left, Val(dense))
        follow!(record, integrator, rhs, plan, marks, from + 1, to, saveat, saved, poll, watch)
        record.rejected += integrator.stats.nreject
        dense && push!(record.pieces, finished(integrator))
        record.retcode == ReturnCode.Success || break
    end
    return record
end

# What a solve has left when it begins: the states that are saved at the start.
function begun(rhs, u0, marks, saveat, saved)
    record = Record(rhs, u0, marks[1])
    while record.saved < length(saveat) && saveat[record.saved + 1] == marks[1]
        save!(record, saved, u0)
    end
    return record
end

function finished(integrator)
    if integrator.sol.retcode == ReturnCode.Default
        integrator.sol = SciMLBase.solution_new_retcode(integrator.sol, ReturnCode.Success)
    end
    SciMLBase.postamble!(integrator)
    return integrator.sol
end

function ode_problem(rhs, u0, tspan, p, mass_matrix, ::Val{outofplace}) where {outofplace}
    f = ODEFunction{!outofplace,SciMLBase.FullSpecialize}(
        rhs; jac = Jacobian(rhs), tgrad = TimeGradient(rhs), mass_matrix
    )
    return ODEProblem{!outofplace,SciMLBase.FullSpecialize}(f, u0, tspan, p)
end

function start(problem, plan::Plan{T}, tstops, dt0, maxiters, ::Val{dense}) where {T,dense}
    first = dt0 > 0 ? (; dt = T(dt0) * sign(problem.tspan[2] - problem.tspan[1])) : (;)
    return init(
        problem, plan.algorithm;
        plan.adaptive, plan.abstol, plan.reltol, plan.controller, plan.dtmin, plan.dtmax,
        internalnorm = plan.norm, maxiters, tstops, dense, calck = true,
        save_everystep = dense, save_start = dense, save_end = dense, verbose = SILENT, first...,
    )
end

# Step to the marks from number `next` to `goal`. Where `poll()` tells to leave, the number is returned
# of the mark to go on to, and else `nothing`.
function follow!(
    record, integrator, rhs, plan::Plan{T}, marks, next, goal, saveat, saved, poll, watch
) where {T}
    direction = integrator.tdir
    while next <= goal
        poll() && return next
        OrdinaryDiffEqCore.step!(integrator)
        code = integrator.sol.retcode
        if code != ReturnCode.Default && code != ReturnCode.Success
            record.retcode = code
            return nothing
        end
        t = integrator.t
        at_mark = t == T(marks[next])
        time = at_mark ? marks[next] : Float64(t)
        stopped = watch(integrator)
        # The caller cuts the step in which it stops, and saves what lies in the cut one.
        while !stopped &&
              record.saved < length(saveat) &&
              direction * saveat[record.saved + 1] < direction * time
            column = view(saved, :, record.saved + 1)
            integrator(column, T(saveat[record.saved + 1]))
            record.saved += 1
        end
        while !stopped && record.saved < length(saveat) && saveat[record.saved + 1] == time
            save!(record, saved, integrator.u)
        end
        push!(record.times, time)
        push!(record.errors, plan.adaptive ? Float64(OrdinaryDiffEqCore.get_EEst(integrator)) : NaN)
        push!(record.states, copy(integrator.u))
        if stopped
            record.retcode = ReturnCode.Terminated
            return nothing
        end
        if at_mark
            next += 1
            if next <= goal
                bound!(rhs, T, marks, time, marks[next])
                # The other side of a stop: the derivative there is another one.
                SciMLBase.derivative_discontinuity!(integrator, true)
            end
        end
    end
    record.retcode = ReturnCode.Success
    return nothing
end

function save!(record, saved, u)
    record.saved += 1
    saved[:, record.saved] .= u
    return nothing
end
