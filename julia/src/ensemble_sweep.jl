# The discrete adjoint of many solves of one problem, over the threads of Julia.

"""
The steps of many members and the cotangents that arrive at them, as [`pullback_many!`](@ref) is given
them: numbers, and the addresses of states of `n` numbers.
"""
struct SweptMembers{T}
    device::Int
    n::Int
    u0::Int
    states::Int
    at_steps::Int
    saved::Int
    mark_ends::Vector{Int}
    marks::Vector{Float64}
    step_ends::Vector{Int}
    ends::Vector{Float64}
    sizes::Vector{Float64}
    m::Int
    spots::Vector{Int}
    theta::Vector{Float64}
end

state(s::SweptMembers{T}, address, i) where {T} = row(T, s.device, address, s.n, i)

function steps_of(s::SweptMembers, i)
    part, marks = members_part(s.step_ends, i), s.marks[members_part(s.mark_ends, i)]
    states = [state(s, s.u0, i)]
    append!(states, state(s, s.states, k) for k in part)
    return Steps([marks[1]; s.ends[part]], s.sizes[part], marks, states)
end

"""
The cotangents of member `i`. Rows of zeros stand for no cotangent: nothing is replayed for them.
"""
function arriving(s::SweptMembers, i)
    part, V = members_part(s.step_ends, i), typeof(state(s, s.u0, i))
    states = Vector{Union{Nothing,V}}(nothing, length(part) + 1)
    if s.at_steps != 0
        for (k, step) in enumerate(part)
            direct = state(s, s.at_steps, step)
            iszero(direct) || (states[k + 1] = direct)
        end
    end
    outputs, inside, theta = V[], Int[], Float64[]
    for j in (s.m * (i - 1) + 1):(s.m * i)
        spot = s.spots[j]
        spot < 0 && continue
        cotangent = state(s, s.saved, j)
        if !isnan(s.theta[j])
            push!(outputs, cotangent)
            push!(inside, spot)
            push!(theta, s.theta[j])
        elseif !iszero(cotangent)
            before = states[spot + 1]
            states[spot + 1] = before === nothing ? cotangent : before .+ cotangent
        end
    end
    return Arriving{V}(states, outputs, inside, theta)
end

const PARTS = 16

"""
    summed!(work, parameters, rhs, members, device, pbar, own)

Call `work(rhs, i, gradient)` for each member, over threads. What it adds to `gradient`, which is zero
before, goes to the sum `pbar`; the entries of its own go to member `i`'s row of `own`. Members are
summed in parts, whose number does not depend on that of the threads.
"""
function summed!(work, parameters::MemberParameters, rhs, members, device, pbar, own)
    places = parameters.places
    size = cld(members, PARTS)
    parts = cld(members, size)
    totals = [zero(pbar) for _ in 1:parts]
    each_member(rhs, parts, worker_count(parts, device)) do rhs, part
        gradient = similar(pbar)
        for i in (size * (part - 1) + 1):min(size * part, members)
            work(rhs, i, fill!(gradient, 0))
            totals[part] .+= gradient
            isempty(places) && continue
            copyto!(row(eltype(pbar), device, own, length(places), i), gradient[places])
        end
    end
    foreach(total -> pbar .+= total, totals)
    return nothing
end

"""
    pullback_many!(fd, field, tableau, forward, dtype, device, members, n, u0, np, p, k, places, own,
                   mark_ends, marks, step_ends, ends, sizes, states, at_steps, m, saved, spots, theta,
                   u0bar, pbar, ownbar, bars, report)

`pullback!` for many members. `at_steps` holds cotangents of the states at the `ends` of all steps, or
is 0. `saved` holds those of the `m` saved states of each: of the state number `spots` (0 is the start)
where `theta` is NaN, and else of the dense output in the step of this number; -1 stands for none.
`u0bar` and `ownbar` are overwritten, and `pbar` is added to. `bars`, if it is not 0, takes for each
member the cotangents of its steps' starts and sizes and of its dense outputs' places, in a block of
two numbers a step and `m`; `report` the replayed steps and the evaluations of each.
"""
function pullback_many!(
    fd::Int, field::Int, tableau::Int, forward::Bool, dtype::Int, device::Int, members::Int, n::Int,
    u0::Int, np::Int, p::Int, k::Int, places::Int, own::Int, mark_ends::Int, marks::Int,
    step_ends::Int, ends::Int, sizes::Int, states::Int, at_steps::Int, m::Int, saved::Int,
    spots::Int, theta::Int, u0bar::Int, pbar::Int, ownbar::Int, bars::Int, report::Int,
)
    T, last, limits = REAL[dtype + 1], host(Int, step_ends, members), host(Int, mark_ends, members)
    swept = SweptMembers{T}(
        device, n, u0, states, at_steps, saved, limits, host(Float64, marks, limits[end]), last,
        host(Float64, ends, last[end]), host(Float64, sizes, last[end]), m,
        host(Int, spots, m * members), host(Float64, theta, m * members),
    )
    parameters = MemberParameters(T, device, np, p, k, places, own)
    exclusively(OBJECTS[field]::RightHandSide) do rhs
        run_pullback_many!(
            swept, rhs, OBJECTS[tableau]::Tableau, forward, members, parameters, u0bar,
            memory(T, device, pbar, np), ownbar,
            host(Float64, bars, bars == 0 ? 0 : 2 * last[end] + m * members), fd,
            reshape(host(Int, report, 2 * members), 2, members),
        )
    end
    return nothing
end

function run_pullback_many!(
    swept, own, tableau, forward, members, parameters, u0bar, pbar, ownbar, bars, fd, report
)
    (; device, m, step_ends) = swept
    summed!(parameters, own, members, device, pbar, ownbar) do rhs, i, gradient
        part = members_part(step_ends, i)
        block = 2 * (first(part) - 1) + m * (i - 1)
        times = isempty(bars) ? bars : view(bars, (block + 1):(block + 2 * length(part) + m))
        run_pullback!(
            rhs, tableau, forward, steps_of(swept, i), arriving(swept, i), of_member(parameters, i),
            gradient, state(swept, u0bar, i), times, fd, view(report, :, i),
        )
    end
    return nothing
end
