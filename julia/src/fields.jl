# Right-hand sides: what every kind of field offers, and the one function type that solvers see.

"""
A vector field on flat states: `u`, `p` and `du` are vectors of one real element type `T`.

A field implements [`evaluate!`](@ref), [`linearize!`](@ref), [`vjp!`](@ref) and, where it keeps
something between the last two, [`reserve!`](@ref).
"""
abstract type AbstractField end

"""
    evaluate!(du, f, u, p, t)

`du .= f(t, u)`.
"""
function evaluate! end

"""
    linearize!(du, f, u, p, t, slot)

`du .= f(t, u)`, keeping in `slot` what `vjp!` needs.
"""
function linearize! end

"""
    vjp!(ubar, pbar, f, u, p, t, slot, v) -> tbar

Pull `v` back through the evaluation kept in `slot`: `ubar .= (df/du)' v`, `pbar .+= (df/dp)' v`;
returns `(df/dt)' v`, zero for an autonomous field.
"""
function vjp! end

"""
    reserve!(f, slots)

Make room for `slots` evaluations to be kept at once.
"""
reserve!(::AbstractField, ::Int) = nothing

"""
    RightHandSide(field)

A field as solvers call it. Its type is the same for every field, so that a solver compiles once;
the field is dispatched on once an evaluation.

`low` and `high` bound the times at which the field is evaluated: rounding must not carry a stage
beyond the interval, and steps that meet at a stop evaluate their own side of it. `busy` while a solve
uses it: what that solve calls may solve again, with a copy.
"""
mutable struct RightHandSide <: Function
    field::AbstractField
    low::Float64
    high::Float64
    evaluations::Int
    busy::Bool
end

RightHandSide(field) = RightHandSide(field, -Inf, Inf, 0, false)

"""
    exclusively(work, rhs)

Call `work` with the right-hand side, or with a copy of it where a solve is using it already.
"""
function exclusively(work, rhs::RightHandSide)
    own = rhs.busy ? RightHandSide(copy(rhs.field)) : rhs
    own.busy = true
    try
        return work(own)
    finally
        own.busy = false
    end
end

@inline inside(f::RightHandSide, t::T) where {T} = clamp(t, T(f.low), T(f.high))

function (f::RightHandSide)(du, u, p, t)
    f.evaluations += 1
    field, time = f.field, inside(f, t)
    # Most fields are programs on the solver's own vectors: their method is known beforehand.
    if field isa Program{eltype(u),typeof(u)}
        evaluate!(du, field, u, p, time)
    else
        evaluate!(du, field, u, p, time)
    end
    return nothing
end

# Out of place, for the adjoints of SciMLSensitivity.
function (f::RightHandSide)(u, p, t)
    du = similar(u, length(u))
    f(du, plain(u), plain(p), t)
    return du
end

# Fields take plain vectors; the adjoints of SciMLSensitivity pass views.
plain(x::SubArray) = copy(x)
plain(x) = x

"""
    each_row(visit, rhs, u, p, t)

Call `visit(i, row, tbar)` for each component `i` of a field with its row of `df/du` and its `df/dt`,
from the vector-Jacobian product; `row` is used again.
"""
function each_row(visit, f::RightHandSide, u, p, t)
    t = inside(f, t)
    reserve!(f.field, 1)
    row, pbar, v = similar(u), zero(p), fill!(similar(u), 0)
    linearize!(row, f.field, u, p, t, 1)
    f.evaluations += 1
    for i in eachindex(u)
        v[i] = 1
        visit(i, row, vjp!(row, pbar, f.field, u, p, t, 1, v))
        v[i] = 0
    end
    return nothing
end

"""
    Jacobian(rhs)

`df/du` of a field, row by row from its vector-Jacobian product, for implicit methods.
"""
struct Jacobian <: Function
    rhs::RightHandSide
end

(j::Jacobian)(J, u, p, t) = each_row((i, row, tbar) -> (J[i, :] .= row), j.rhs, u, p, t)

(j::Jacobian)(u, p, t) = (J = similar(u, length(u), length(u)); j(J, u, p, t); J)

"""
    TimeGradient(rhs)

`df/dt` of a field, for Rosenbrock methods.
"""
struct TimeGradient <: Function
    rhs::RightHandSide
end

(g::TimeGradient)(dT, u, p, t) = each_row((i, row, tbar) -> (dT[i] = tbar), g.rhs, u, p, t)

(g::TimeGradient)(u, p, t) = (dT = similar(u); g(dT, u, p, t); dT)

"""
    bound!(rhs, T, marks, t, t1)

Let a field be evaluated between the marks around the step from `t` to `t1` only; at an inner mark
(a stop) just beside it, on the step's own side. `T` is the type of the times that the field gets.
"""
function bound!(rhs::RightHandSide, ::Type{T}, marks, t, t1) where {T}
    low, high = minmax(t, t1)
    first, last = minmax(marks[1], marks[end])
    below, above = -Inf, Inf
    for x in @view marks[2:(end - 1)]
        x <= low && (below = max(below, x))
        x >= high && (above = min(above, x))
    end
    rhs.low = below > first ? nextfloat(T(below)) : T(first)
    rhs.high = above < last ? prevfloat(T(above)) : T(last)
    return rhs
end
