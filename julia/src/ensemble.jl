# Many solves of one problem, and their discrete adjoints, over the threads of Julia.

"""
    each_member(work, rhs, members, workers)

Call `work(rhs, i)` for each member `i`, over as many threads, every one with a copy of the
right-hand side of its own. An exception is thrown once all threads have stopped, at their next member.
"""
function each_member(work, rhs::RightHandSide, members, workers)
    if workers < 2
        foreach(i -> work(rhs, i), 1:members)
        return nothing
    end
    fields = [rhs; [RightHandSide(copy(rhs.field)) for _ in 2:workers]]
    # Members take different times: each thread fetches its next one.
    next, failed = Threads.Atomic{Int}(1), Threads.Atomic{Bool}(false)
    failures = Vector{Any}(nothing, workers)
    Threads.@threads for worker in 1:workers
        try
            while !failed[] && (i = Threads.atomic_add!(next, 1)) <= members
                work(fields[worker], i)
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

"""
    solve_many!(fd, field, plan, device, threaded, members, n, u0, np, p, nmarks, marks, dt0, m,
                saveat, saved, mass, dense, records, report)

`solve!` for many members, which differ in their initial states and parameters: `u0`, `p` and
`saved` hold an address for each. The handles of the records are written to `records`, and five
integers for each member to `report`.
"""
function solve_many!(
    fd::Int, field::Int, plan::Int, device::Int, threaded::Bool, members::Int, n::Int, u0::Int,
    np::Int, p::Int, nmarks::Int, marks::Int, dt0::Float64, m::Int, saveat::Int, saved::Int,
    mass::Int, dense::Bool, records::Int, report::Int,
)
    described = OBJECTS[plan]
    times, saved_times = host(Float64, marks, nmarks), host(Float64, saveat, m)
    starts, parameters, columns = (host(Int, list, members) for list in (u0, p, saved))
    reports = reshape(host(Int, report, 5 * members), 5, members)
    found = Vector{Any}(undef, members)
    # Streams of a GPU belong to tasks: there the work stays in the one that Python ordered.
    workers = threaded && device == 0 ? min(Threads.nthreads(), members) : 1
    exclusively(OBJECTS[field]::RightHandSide) do own
        each_member(own, members, workers) do rhs, i
            found[i] = run_solve!(
                rhs, described, device, n, starts[i], np, parameters[i], times, dt0, m, saved_times,
                columns[i], mass, dense, fd, nothing, view(reports, :, i),
            )
        end
    end
    host(Int, records, members) .= keep.(found)
    return nothing
end
