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
    sensitivity!(fd, members, records, plan, method, rtol, atol, max_steps, n, mark_ends, marks,
                 time_ends, times, cotangents, np, u0bar, pbar, slopes, report)

Differentiate solves whose solutions were kept, over the threads of Julia. `cotangents` holds `n`
numbers for each time, of one member after the other, as `time_ends` says. `u0bar` and `pbar` have a row
for each member. `slopes`, if it is not 0, takes for each the `n` derivatives of the state at its start
and then those at its times; `report` the evaluations of the field.
"""
function sensitivity!(
    fd::Int, members::Int, records::Int, plan::Int, method::String, rtol::Float64, atol::Float64,
    max_steps::Int, n::Int, mark_ends::Int, marks::Int, time_ends::Int, times::Int, cotangents::Int,
    np::Int, u0bar::Int, pbar::Int, slopes::Int, report::Int,
)
    found = [OBJECTS[handle] for handle in host(Int, records, members)]
    limits, last = host(Int, mark_ends, members), host(Int, time_ends, members)
    points, moments = host(Float64, marks, limits[end]), host(Float64, times, last[end])
    evaluations = host(Int, report, members)
    # A solution calls the right-hand side that it was found with.
    groups = [findall(record -> record.rhs === rhs, found) for rhs in unique(r.rhs for r in found)]
    each_job(length(groups), worker_count(length(groups), 0)) do _, g
        exclusively(found[groups[g][1]].rhs) do rhs
            for i in groups[g]
                part = members_part(last, i)
                evaluations[i] = run_sensitivity!(
                    rhs, found[i].pieces, OBJECTS[plan], method, rtol, atol, max_steps, n,
                    points[members_part(limits, i)], moments[part], cotangents, first(part),
                    u0bar, np, pbar, slopes, i, fd,
                )
            end
        end
    end
    return nothing
end

function run_sensitivity!(
    rhs, pieces, plan::Plan{T}, method, rtol, atol, max_steps, n, marks, times, addresses, first,
    u0bar, np, pbar, slopes, i, fd,
) where {T}
    settings = Settings{T,typeof(plan.algorithm)}(method, plan.algorithm, atol, rtol, max_steps)
    moments, count = T.(times), length(times)
    cotangents = [copy(row(T, 0, addresses, n, first + j - 1)) for j in 1:count]
    rhs.evaluations = 0
    pull_pieces!(
        pieces, rhs, settings, marks, moments, cotangents, row(T, 0, u0bar, n, i),
        row(T, 0, pbar, np, i); poll = () -> stop_when_interrupted(fd),
    )
    if slopes != 0
        # Before them are those of the members before, one more each than there are times.
        address = slopes + n * sizeof(T) * (first - 1 + i - 1)
        rates = reshape(host(T, address, n * (count + 1)), n, :)
        state_rates!(rates, pieces, rhs, marks, moments)
    end
    return rhs.evaluations
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
