# Continuous adjoints along a solution that was kept: what is common to all of them.

"""
    sensitivities!(solution, rhs, settings, times, cotangents, u0bar, pbar; poll)

Pull cotangents at `times` (in the order of integration, distinct, none of them the start) back
through a solution that was kept: `u0bar` is overwritten, `pbar` is added to. The extension with
SciMLSensitivity has methods for its adjoints.
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

# The adjoint equation is linear in its state, so that differences give an implicit method its exact
# Jacobian; dual numbers would have to pass through the field's own vector-Jacobian product.
backward(alg) = hasfield(typeof(alg), :autodiff) ? remake(alg; autodiff = AutoFiniteDiff()) : alg
function backward(alg::CompositeAlgorithm)
    return CompositeAlgorithm(map(backward, alg.algs), alg.choice_function)
end

"""
    sensitivity!(fd, record, plan, method, rtol, atol, max_steps, n, nmarks, marks, m, times,
                 cotangents, np, u0bar, pbar, slopes, report)

Differentiate a solve whose solutions were kept. `cotangents` holds `m` addresses. `slopes`, if it is
not 0, takes the `n` derivatives of the state at the start and then those at the `m` times; `report`
the evaluations of the field.
"""
function sensitivity!(
    fd::Int, record::Int, plan::Int, method::String, rtol::Float64, atol::Float64,
    max_steps::Int, n::Int, nmarks::Int, marks::Int, m::Int, times::Int, cotangents::Int, np::Int,
    u0bar::Int, pbar::Int, slopes::Int, report::Int,
)
    found = OBJECTS[record]
    return run_sensitivity!(
        found.rhs, found.pieces, OBJECTS[plan], method, rtol, atol, max_steps, n,
        host(Float64, marks, nmarks), host(Float64, times, m), host(Int, cotangents, m), np, u0bar,
        pbar, slopes, fd, host(Int, report, 1),
    )
end

function run_sensitivity!(
    own, pieces, plan::Plan{T}, method, rtol, atol, max_steps, n, marks, times, addresses, np, u0bar,
    pbar, slopes, fd, report,
) where {T}
    settings = Settings{T,typeof(plan.algorithm)}(method, plan.algorithm, atol, rtol, max_steps)
    moments = T.(times)
    cotangents = Vector{T}[copy(host(T, address, n)) for address in addresses]
    poll = () -> stop_when_interrupted(fd)
    rates = slopes == 0 ? nothing : reshape(host(T, slopes, n * (length(times) + 1)), n, :)
    ubar, gradient = host(T, u0bar, n), host(T, pbar, np)
    report[1] = exclusively(own) do rhs
        rhs.evaluations = 0
        pull_pieces!(pieces, rhs, settings, marks, moments, cotangents, ubar, gradient; poll)
        rates === nothing || state_rates!(rates, pieces, rhs, marks, moments)
        return rhs.evaluations
    end
    return nothing
end

"""
    pull_pieces!(pieces, rhs, settings, marks, times, cotangents, ubar, pbar; poll)

From the last piece to the first: what comes out at the start of one arrives at the end of the piece
before, and in each the field is evaluated on that piece's side of the stops.
"""
function pull_pieces!(pieces, rhs, settings, marks, times, cotangents, ubar, pbar; poll)
    fill!(ubar, 0)
    fill!(pbar, 0)
    alive = false
    for k in length(pieces):-1:1
        solution = pieces[k]
        start, finish = solution.prob.tspan
        direction = sign(finish - start)
        here = findall(t -> direction * start < direction * t <= direction * finish, times)
        alive || !isempty(here) || continue
        moments, arriving = times[here], cotangents[here]
        if alive && !isempty(moments) && moments[end] == finish
            arriving[end] = arriving[end] .+ ubar
        elseif alive
            push!(moments, finish)
            push!(arriving, copy(ubar))
        end
        alive = true
        bound!(rhs, eltype(ubar), marks, marks[k], marks[k + 1])
        pull_piece!(
            solution, solution.prob.f.mass_matrix, rhs, settings, moments, arriving, ubar, pbar;
            poll,
        )
    end
    return nothing
end

pull_piece!(solution, ::UniformScaling, rhs, settings, times, cotangents, ubar, pbar; poll) =
    sensitivities!(solution, rhs, settings, times, cotangents, ubar, pbar; poll)

# A time at a stop belongs to the piece that ends there.
function piece_of(pieces, t)
    inside(piece) = (span = piece.prob.tspan; (t - span[2]) * sign(span[2] - span[1]) <= 0)
    return something(findfirst(inside, pieces), length(pieces))
end

function state_rates!(rates, pieces, rhs, marks, times)
    for (i, t) in enumerate((pieces[1].prob.tspan[1], times...))
        k = piece_of(pieces, t)
        solution = pieces[k]
        bound!(rhs, eltype(rates), marks, marks[k], marks[k + 1])
        rates[:, i] .= state_rate(
            rhs, solution.prob.f.mass_matrix, solution(t), solution.prob.p, t
        )
    end
    return nothing
end

state_rate(rhs, ::UniformScaling, u, p, t) = (du = similar(u); rhs(du, u, p, t); du)

"""
    interpolate!(record, n, m, times, out)

Dense output `(n, m)` of a solution that was kept.
"""
function interpolate!(record::Int, n::Int, m::Int, times::Int, out::Int)
    pieces = OBJECTS[record].pieces
    T = eltype(pieces[1].u[1])
    columns = reshape(host(T, out, n * m), n, m)
    for (i, t) in enumerate(host(Float64, times, m))
        columns[:, i] .= pieces[piece_of(pieces, t)](T(t))
    end
    return nothing
end
