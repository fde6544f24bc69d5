# Continuous adjoints and forward sensitivities: what the extension with SciMLSensitivity fills in.

"""
    sensitivities!(solution, rhs, settings, times, cotangents, u0bar, pbar; poll)

Pull cotangents at `times` (in the order of integration, distinct, none of them the start) back
through a solution that was kept: `u0bar` and `pbar` are overwritten.
"""
function sensitivities! end

"""
How a solution is differentiated: the name of the method, its algorithm, tolerances, step limit.
"""
struct Settings{T,A}
    method::String
    algorithm::A
    abstol::T
    reltol::T
    max_steps::Int
end

"""
    sensitivity!(fd, record, field, plan, method, rtol, atol, max_steps, n, m, times, cotangents, np,
                 u0bar, pbar, slopes, report)

Differentiate a solve whose solution was kept. `cotangents` holds `m` addresses. `slopes` takes the
`n` derivatives at the start and then those at the `m` times; `report` the evaluations of the field.
"""
function sensitivity!(
    fd::Int, record::Int, field::Int, plan::Int, method::String, rtol::Float64, atol::Float64,
    max_steps::Int, n::Int, m::Int, times::Int, cotangents::Int, np::Int, u0bar::Int, pbar::Int,
    slopes::Int, report::Int,
)
    return run_sensitivity!(
        OBJECTS[record].solution, OBJECTS[field]::RightHandSide, OBJECTS[plan], method, rtol, atol,
        max_steps, n, host(Float64, times, m), host(Int, cotangents, m), np, u0bar, pbar, slopes,
        fd, host(Int, report, 1),
    )
end

function run_sensitivity!(
    solution, rhs, plan::Plan{T}, method, rtol, atol, max_steps, n, times, addresses, np, u0bar,
    pbar, slopes, fd, report,
) where {T}
    rhs.evaluations = 0
    start, finish = solution.prob.tspan
    rhs.low, rhs.high = minmax(start, finish)
    settings = Settings{T,typeof(plan.algorithm)}(method, plan.algorithm, atol, rtol, max_steps)
    ubar, gradient = host(T, u0bar, n), host(T, pbar, np)
    poll = () -> stop_when_interrupted(fd)
    cotangents = [copy(host(T, address, n)) for address in addresses]
    sensitivities!(solution, rhs, settings, T.(times), cotangents, ubar, gradient; poll)
    rates = reshape(host(T, slopes, n * (length(times) + 1)), n, :)
    p = solution.prob.p
    for (i, t) in enumerate((start, T.(times)...))
        du = rates[:, i]
        evaluate!(du, rhs.field, solution(t), p, t)
        rates[:, i] .= du
    end
    report[1] = rhs.evaluations
    return nothing
end

"""
    interpolate!(record, n, m, times, out)

Dense output `(n, m)` of a solution that was kept.
"""
function interpolate!(record::Int, n::Int, m::Int, times::Int, out::Int)
    solution = OBJECTS[record].solution
    T = eltype(solution.u[1])
    columns = reshape(host(T, out, n * m), n, m)
    for (i, t) in enumerate(host(Float64, times, m))
        columns[:, i] .= solution(T(t))
    end
    return nothing
end
