# Many solves of one problem, and their gradients, over the threads of Julia.
#
# What differs between members stands in arrays whose last dimension counts them. Where they have
# different numbers of something, `ends` holds the place of each member's last.

"""
    each_job(work, jobs, workers)

Call `work(worker, i)` for each job `i`, over as many threads. An exception is thrown once all threads
have stopped, at their next job.
"""
function each_job(work, jobs, workers)
    if workers < 2
        foreach(i -> work(1, i), 1:jobs)
        return nothing
    end
    # Jobs take different times: each thread fetches its next one.
    next, failed = Threads.Atomic{Int}(1), Threads.Atomic{Bool}(false)
    failures = Vector{Any}(nothing, workers)
    Threads.@threads for worker in 1:workers
        try
            while !failed[] && (i = Threads.atomic_add!(next, 1)) <= jobs
                work(worker, i)
            end
        catch exception
            failed[] = true
            failures[worker] = exception
        end
    end
    found = findfirst(!isnothing, failures)
    found === nothing || throw(failures[found])
    return nothing
end

# Streams of a GPU belong to tasks: there the work stays in the one that Python ordered.
worker_count(jobs, device) = device == 0 ? min(Threads.nthreads(), jobs) : 1

"""
    each_member(work, rhs, jobs, workers)

Call `work(rhs, i)` for each job, every thread with a copy of the right-hand side of its own.
"""
function each_member(work, rhs::RightHandSide, jobs, workers)
    fields = [rhs; [RightHandSide(copy(rhs.field)) for _ in 2:workers]]
    return each_job((worker, i) -> work(fields[worker], i), jobs, workers)
end

# The `n` numbers of member `i`.
row(::Type{T}, device, address, n, i) where {T} =
    memory(T, device, address + (i - 1) * n * sizeof(T), n)

members_part(ends, i) = (i == 1 ? 1 : ends[i - 1] + 1):ends[i]

"""
Parameters of members: those that all share, with `k` entries, at `places`, of each member's own.
"""
struct MemberParameters{V}
    shared::V
    places::Vector{Int}
    own::Int
    device::Int
end

function MemberParameters(::Type{T}, device, np, p, k, places, own) where {T}
    return MemberParameters(memory(T, device, p, np), host(Int, places, k), own, device)
end

function of_member(parameters::MemberParameters, i)
    (; shared, places, own, device) = parameters
    isempty(places) && return shared
    p = copy(shared)
    p[places] = row(eltype(p), device, own, length(places), i)
    return p
end

"""
    solve_many!(fd, field, plan, device, members, n, u0, np, p, k, places, own, mark_ends, marks, dt0,
                m, saveat, saved, mass, dense, records, report)

`solve!` for many members. `u0`, `own`, `saveat` and `saved` hold the numbers of each after those of
the one before, `marks` as far as `mark_ends` says, and `dt0` a number for each. The handles of the
records are written to `records`, and five integers for each member to `report`.
"""
function solve_many!(
    fd::Int, field::Int, plan::Int, device::Int, members::Int, n::Int, u0::Int, np::Int, p::Int,
    k::Int, places::Int, own::Int, mark_ends::Int, marks::Int, dt0::Int, m::Int, saveat::Int,
    saved::Int, mass::Int, dense::Bool, records::Int, report::Int,
)
    found = exclusively(OBJECTS[field]::RightHandSide) do rhs
        run_solve_many!(
            rhs, OBJECTS[plan], device, members, n, u0, (np, p, k, places, own),
            host(Int, mark_ends, members), marks, host(Float64, dt0, members), m, saveat, saved, mass,
            dense, fd, reshape(host(Int, report, 5 * members), 5, members),
        )
    end
    host(Int, records, members) .= keep.(found)
    return nothing
end

function run_solve_many!(
    shared, plan::Plan{T}, device, members, n, u0, given, mark_ends, marks, dt0, m, saveat, saved,
    mass, dense, fd, report,
) where {T}
    found = Vector{Any}(undef, members)
    parameters = MemberParameters(T, device, given...)
    points = host(Float64, marks, mark_ends[end])
    each_member(shared, members, worker_count(members, device)) do rhs, i
        found[i] = run_solve!(
            rhs, plan, device, n, u0 + (i - 1) * n * sizeof(T), of_member(parameters, i),
            points[members_part(mark_ends, i)], dt0[i], m, row(Float64, 0, saveat, m, i),
            saved + (i - 1) * n * m * sizeof(T), mass, dense, fd, nothing, view(report, :, i),
        )
    end
    return found
end

"""
    fetch_many!(records, members, device, n, ends, errors, states)

`fetch!` for many members: `ends` and `errors` of the accepted steps and the `states` there, of one
member after the other.
"""
function fetch_many!(
    records::Int, members::Int, device::Int, n::Int, ends::Int, errors::Int, states::Int
)
    done = 0
    for handle in host(Int, records, members)
        found = OBJECTS[handle]
        count = length(found.errors)
        copyto!(row(Float64, 0, ends + 8 * done, count, 1), view(found.times, 2:(count + 1)))
        copyto!(row(Float64, 0, errors + 8 * done, count, 1), found.errors)
        for k in 1:count
            copyto!(
                row(eltype(found.states[1]), device, states, n, done + k), found.states[k + 1]
            )
        end
        done += count
        isempty(found.pieces) && free(handle)
    end
    return nothing
end
