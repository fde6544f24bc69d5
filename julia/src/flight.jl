# Solves that are prepared: what they have in common is told once, and each tells no more than where its
# tensors lie.

"""
What solves of one field by one plan have in common: the `tableau` of their discrete adjoint, the `size` of
the state, `marks` and `saveat` as [`march`](@ref) takes them, and the `lengths` of the field's parameters.
What small ones work with is kept: `idle` has it (see [`Kept`](@ref)) while no solve does.
"""
struct Prepared{P<:Plan}
    rhs::RightHandSide
    plan::P
    tableau::Tableau
    size::Int
    marks::Vector{Float64}
    dt0::Float64
    saveat::Vector{Float64}
    lengths::Vector{Int}
    keeps::Bool
    idle::Vector{Any}
end

"""
    prepare(field, plan, tableau, n, nmarks, marks, dt0, m, saveat) -> handle

Prepare solves of a program by an explicit method.
"""
function prepare(
    field::Int, plan::Int, tableau::Int, n::Int, nmarks::Int, marks::Int, dt0::Float64, m::Int,
    saveat::Int,
)
    rhs = OBJECTS[field]::RightHandSide
    numbers(address, count) = copy(host(Float64, address, count))
    program = rhs.field::Program
    return keep(
        Prepared(
            rhs, OBJECTS[plan], OBJECTS[tableau]::Tableau, n, numbers(marks, nmarks), dt0,
            numbers(saveat, m), Int[prod(shape) for shape in program.shapes],
            sum(program.sizes) <= MOST_KEPT, Any[],
        ),
    )
end

"""
    fly!(fd, prepared, u0, tensors, packed, saved, final, room, ends, log, report) -> record or 0

Solve forward. `tensors` holds the addresses of the parameters, which are copied to `packed` one after
the other. The states at the saved times go to `saved`, the last one to `final`, and those at the ends of
up to `room` steps, the initial one first, to `ends`. `log` takes two numbers for each saved time, its step
and its place in it from 0 to 1, or the number of the state that it is and NaN; and behind them four for
each step: its end, its size, its error, and the number of the stop that it ends on, or -1. `report` is that
of [`solve!`](@ref). A record stays where there were more steps, for [`fetch_flight!`](@ref). It returns the
negative of a handle where it is left for now, as [`begin_work`](@ref) does.
"""
function fly!(
    fd::Int, prepared::Int, u0::Int, tensors::Int, packed::Int, saved::Int, final::Int, room::Int,
    ends::Int, log::Int, report::Int,
)
    made = OBJECTS[prepared]
    march_on = depart(made, u0, tensors, packed, saved)
    return begin_work(fd) do poll
        left = march_on(poll)
        left === nothing && return nothing
        record, evaluations = left
        report_flight!(made, record, evaluations, final, host(Int, report, 6))
        length(record.errors) > room && return keep(record)
        write_flight!(made, record, ends, log)
        return 0
    end
end

# What gives the record and the evaluations of a solve, or `nothing` where it is left for now.
function depart(made::Prepared{<:Plan{T}}, u0, tensors, packed, saved) where {T}
    (; plan, size, marks, dt0, saveat, lengths) = made
    m = length(saveat)
    columns = reshape(host(T, saved, size * m), size, m)
    start = host(T, u0, size)
    parameters = pack(T, packed, host(Int, tensors, length(lengths)), lengths)
    if made.keeps
        kept = take_kept!(made, start, parameters)
        record = begin_again!(kept, plan, start, parameters, marks, dt0, saveat, columns)
        return Departure(made, kept, record, columns)
    end
    return function (poll)
        is_brief(poll) && return nothing  # to come back does not count here
        exclusively(made.rhs) do rhs
            rhs.evaluations = 0
            record = march(
                rhs, plan, start, parameters, marks, dt0, saveat, columns;
                poll, watch = Returns(false), dense = false, mass_matrix = I,
            )
            (record, rhs.evaluations)
        end
    end
end

function report_flight!(made::Prepared{<:Plan{T}}, record, evaluations, final, report) where {T}
    last = record.states[end]
    copyto!(host(T, final, made.size), last)
    report[1], report[2], report[3] = length(record.errors), record.saved, evaluations
    report[4], report[5] = record.rejected, get(CODES, record.retcode, UNSTABLE)
    report[6] = all(isfinite, last)
    return nothing
end

# The parameters in one piece.
function pack(::Type{T}, address, tensors, lengths) where {T}
    packed = host(T, address, sum(lengths))
    at = 1
    for (tensor, length) in zip(tensors, lengths)
        unsafe_copyto!(pointer(packed, at), Ptr{T}(tensor), length)
        at += length
    end
    return packed
end

function write_flight!(made::Prepared{<:Plan{T}}, record, ends, log) where {T}
    (; times, errors, states) = record
    (; size, marks, saveat) = made
    m, count = length(saveat), length(errors)
    rows = reshape(host(T, ends, size * (count + 1)), size, count + 1)
    for (i, state) in enumerate(states)
        rows[:, i] .= state
    end
    noted = host(Float64, log, 2 * m + 4 * count)
    for i in 1:count
        stop = stop_at(marks, times[i + 1])
        noted[(2 * m + 4 * i - 3):(2 * m + 4 * i)] .=
            (times[i + 1], times[i + 1] - times[i], errors[i], stop)
    end
    direction, step = sign(marks[end] - marks[1]), 1
    for i in 1:(record.saved)
        t = saveat[i]
        while step < count && direction * times[step + 1] < direction * t
            step += 1
        end
        start, stop = times[step], times[min(step, count) + 1]
        noted[2 * i - 1], noted[2 * i] =
            t == times[1] ? (0.0, NaN) :
            t == stop ? (Float64(step), NaN) : (step - 1.0, (t - start) / (stop - start))
    end
    return nothing
end

# The number of the stop at a time, counted from 0, or -1.
function stop_at(marks, t)
    for i in 2:length(marks)
        marks[i] == t && return i - 2
    end
    return -1
end

"""
    fetch_flight!(prepared, record, ends, log)

Write what a solve of more steps than there was room for has left, as [`fly!`](@ref) does, and free it.
"""
function fetch_flight!(prepared::Int, record::Int, ends::Int, log::Int)
    write_flight!(OBJECTS[prepared], OBJECTS[record], ends, log)
    free(record)
    return nothing
end

"""
    pull_flight!(fd, prepared, steps, reached, packed, ends, log, saved, arriving, final, bars, report) -> 0

The discrete adjoint of the first `steps` steps of a solve and of its first `reached` saved times.
`saved`, `arriving` and `final` are the cotangents of what [`fly!`](@ref) has written to `saved`, `ends`
and `final`, or 0. `bars` takes those of the parameters, and behind them that of the initial state;
`report` the replayed steps and the evaluations. It returns as [`begin_work`](@ref) does.
"""
function pull_flight!(
    fd::Int, prepared::Int, steps::Int, reached::Int, packed::Int, ends::Int, log::Int, saved::Int,
    arriving::Int, final::Int, bars::Int, report::Int,
)
    made = OBJECTS[prepared]
    sweep_on = turn_back(made, steps, reached, packed, ends, log, saved, arriving, final, bars)
    return begin_work(fd) do poll
        counts = sweep_on(poll)
        counts === nothing && return nothing
        host(Int, report, 2) .= counts
        return 0
    end
end

# What gives the replayed steps and the evaluations of a sweep, or `nothing` where it is left for now.
function turn_back(
    made::Prepared{<:Plan{T}}, count, reached, packed, ends, log, saved, at_ends, final, bars
) where {T}
    (; size, marks, saveat, lengths) = made
    m, np = length(saveat), sum(lengths)
    row(address, i) = host(T, address + (i - 1) * size * sizeof(T), size)
    noted = reshape(host(Float64, log + 16 * m, 4 * count), 4, count)
    times = [marks[1]; view(noted, 1, :)]
    steps = Steps{Vector{T}}(times, noted[2, :], marks, [row(ends, i) for i in 1:(count + 1)])
    arriving = Arriving{Vector{T}}(
        Vector{Union{Nothing,Vector{T}}}(nothing, count + 1), Vector{T}[], Int[], Float64[]
    )
    at_ends == 0 || for i in 1:(count + 1)
        arrive!(arriving, i, row(at_ends, i))
    end
    final == 0 || arrive!(arriving, count + 1, row(final, 1))
    places = host(Float64, log, 2 * m)
    saved == 0 || for i in 1:reached
        place, theta, bar = Int(places[2 * i - 1]), places[2 * i], row(saved, i)
        if isnan(theta)
            arrive!(arriving, place + 1, bar)
        else
            push!(arriving.outputs, bar)
            push!(arriving.step, place + 1)
            push!(arriving.theta, theta)
        end
    end
    gradient, parameters = fill!(host(T, bars, np), 0), host(T, packed, np)
    ubar = row(bars + np * sizeof(T), 1)
    if made.keeps
        kept = take_kept!(made, steps.states[1], parameters)
        kept.rhs.evaluations = 0
        sweep = Sweep(kept.rhs, made.tableau, steps, arriving, parameters, gradient, ubar)
        return Return(made, kept, sweep)
    end
    return function (poll)
        is_brief(poll) && return nothing
        counts = [0, 0]
        exclusively(made.rhs) do rhs
            run_pullback!(
                rhs, made.tableau, false, steps, arriving, parameters, gradient, ubar, Float64[],
                poll.descriptor, counts,
            )
        end
        return counts
    end
end

# Add to what arrives at a state; not in Python's memory.
function arrive!(arriving, i, bar)
    known = arriving.states[i]
    arriving.states[i] = known === nothing ? copy(bar) : known .+= bar
    return nothing
end
