# What small solves work with is kept for later ones: to make an integrator takes longer than many a solve.

"""
What a prepared solve works with: a right-hand side and parameters of its own, SciML's integrator of
them, and `fresh`, what the fields of plain numbers were in it and in its parts when it was made.
"""
struct Kept{V,I,F}
    rhs::RightHandSide
    parameters::V
    integrator::I
    fresh::F
end

# Those of more numbers take so long that making them anew does not count, and would hold much memory.
const MOST_KEPT = 1 << 14
const MOST_IDLE = 4

function Kept(rhs, plan::Plan{T}, u0, p, marks, dt0) where {T}
    own, parameters = RightHandSide(copy(rhs.field)), copy(p)
    bound!(own, T, marks, marks[1], marks[2])
    span = T.((marks[1], marks[end]))
    problem = ode_problem(own, copy(u0), span, parameters, I, Val(false))
    stops = T.(view(marks, 2:(length(marks) - 1)))
    integrator = start(problem, plan, stops, dt0, plan.max_steps, Val(false))
    fresh = map(plain_fields, mutable_parts(integrator))
    return Kept(own, parameters, integrator, (integrator.sol, fresh))
end

mutable_parts(integrator) = (integrator, integrator.controller_cache, integrator.stats)

"""
    plain_fields(x) -> NamedTuple

The fields of a mutable object that hold plain numbers.
"""
@generated function plain_fields(x::T) where {T}
    free(name) = isbitstype(fieldtype(T, name)) && !isconst(T, name)
    names = Tuple(filter(free, collect(fieldnames(T))))
    return :(NamedTuple{$names}(($((:(getfield(x, $(QuoteNode(name)))) for name in names)...),)))
end

"""
    restore!(x, fields)

Give an object fields again that [`plain_fields`](@ref) has read.
"""
@generated function restore!(x, fields::NamedTuple{names}) where {names}
    set(name) = :(setfield!(x, $(QuoteNode(name)), fields.$name))
    return Expr(:block, map(set, names)..., nothing)
end

"""
    restart!(kept, plan, u0, dt0)

Put an integrator back to where `init` leaves a new one.

SciML's own `reinit!` leaves the counts, the first step, what the controller and the last step have left,
and how the solve before has ended.
"""
function restart!(kept::Kept, plan::Plan, u0, dt0)
    (; integrator) = kept
    sol, fresh = kept.fresh
    integrator.sol = sol
    map(restore!, mutable_parts(integrator), fresh)
    reinit!(integrator, u0; reset_dt = false)
    plan.adaptive && dt0 == 0 && auto_dt_reset!(integrator)
    return integrator
end

# The record of a solve forward that begins, as `march` begins it.
function begin_again!(kept::Kept, plan::Plan{T}, u0, p, marks, dt0, saveat, saved) where {T}
    (; rhs, parameters) = kept
    copyto!(parameters, p)
    rhs.evaluations = 0
    record = begun(rhs, u0, marks, saveat, saved)
    bound!(rhs, T, marks, marks[1], marks[2])
    restart!(kept, plan, u0, dt0)
    return record
end

"""
A solve forward on its way, with what it works with; it goes on to the mark of number `next`.
"""
mutable struct Departure{M,K,R,C}
    const made::M
    const kept::K
    const record::R
    const columns::C
    next::Int
end

Departure(made, kept, record, columns) = Departure(made, kept, record, columns, 2)

function (d::Departure)(poll)
    (; made, kept, record) = d
    (; rhs, integrator) = kept
    next = follow!(
        record, integrator, rhs, made.plan, made.marks, d.next, length(made.marks), made.saveat,
        d.columns, poll, Returns(false),
    )
    if next !== nothing
        d.next = next
        return nothing
    end
    record.rejected = integrator.stats.nreject
    give_back!(made, kept)
    return record, rhs.evaluations
end

"A sweep on its way, with what it works with."
struct Return{M,K,S}
    made::M
    kept::K
    sweep::S
end

function (r::Return)(poll)
    sweep!(r.sweep; tbars = (), hbars = (), thetabars = (), poll) || return nothing
    give_back!(r.made, r.kept)
    return r.sweep.replayed, r.kept.rhs.evaluations
end

"""
    take_kept!(prepared, u0, p) -> kept

Something to work with, which nothing else uses until it is given back: a solve may call what solves again,
and one that throws has it thrown away.
"""
function take_kept!(made, u0, p)
    isempty(made.idle) || return pop!(made.idle)
    return Kept(made.rhs, made.plan, u0, p, made.marks, made.dt0)
end

"""
    give_back!(prepared, kept)

Have later solves work with it.
"""
function give_back!(made, kept)
    length(made.idle) < MOST_IDLE && push!(made.idle, kept)
    return nothing
end
