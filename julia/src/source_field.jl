# Right-hand sides written in Julia.

"""
A function of the user's, given as text: `f(u, p, t)`, which returns the derivative, or SciML's form in
place, `f(du, u, p, t)`, which writes it. `u` has the state's shape reversed (batch last), `p` is a
vector, and the derivative has `u`'s shape.
"""
struct SourceField{T,N} <: AbstractField
    f::Any
    # Where the function was defined: without it the collector would take the function's type.
    scope::Module
    in_place::Bool
    # What the function gets, so that nothing it writes there changes the solver's numbers.
    state::Array{T,N}
    parameters::Vector{T}
    pullbacks::Vector{Any}
end

SourceField{T}(f, scope, in_place, shape::NTuple{N,Int}) where {T,N} =
    SourceField{T,N}(f, scope, in_place, zeros(T, shape), T[], [])

function SourceField{T}(text::String, shape) where {T}
    scope = Module(:JuliaField)
    Core.eval(scope, :(using PySciMLNode.LinearAlgebra))
    expression = Meta.parseall(text)
    f = Core.eval(scope, expression)
    f isa Base.Callable || throw(
        ArgumentError("the source must end in a function f(u, p, t), but ends in a $(typeof(f))")
    )
    return SourceField{T}(f, scope, is_in_place(f), Tuple(shape))
end

"Whether a function is to be called as `f(du, u, p, t)`; `f(u, p, t)` comes first if it has both."
function is_in_place(f)
    counts = [method.nargs - 1 for method in methods(f)]
    3 in counts && return false
    4 in counts && return true
    any(method -> method.isva, methods(f)) && return false
    throw(
        ArgumentError(
            "the source must end in a function f(u, p, t) or f(du, u, p, t), but its function takes " *
            join(unique(counts), " or ") * " arguments",
        ),
    )
end

# For another task: the function is shared, what is kept between evaluations is not.
Base.copy(f::SourceField{T}) where {T} =
    SourceField{T}(f.f, f.scope, f.in_place, size(f.state))

function evaluate!(du, f::SourceField, u, p, t)
    copyto!(f.state, u)
    copyto!(resize!(f.parameters, length(p)), p)
    if f.in_place
        Base.invokelatest(f.f, reshape(du, size(f.state)), f.state, f.parameters, t)
        return nothing
    end
    return store!(du, Base.invokelatest(f.f, f.state, f.parameters, t), size(f.state))
end

function store!(du, slope, shape)
    size(slope) == shape || throw(
        DimensionMismatch("the function must return the state's size $shape, but gave $(size(slope))")
    )
    copyto!(du, slope)
    return nothing
end

"""
    pullback_of(f, u, p, t) -> value, pullback

Filled in by the extension with Zygote.
"""
function pullback_of end

"""
    pullback_in_place(f, u, p, t) -> value, pullback

Of `f(du, u, p, t)`, by its Jacobian: Zygote does not follow what is written in place, dual numbers go
wherever numbers go. Filled in by the extension with ForwardDiff.
"""
function pullback_in_place end

reserve!(f::SourceField, slots::Int) = length(f.pullbacks) < slots && resize!(f.pullbacks, slots)

function linearize!(du, f::SourceField, u, p, t, slot)
    reserve!(f, slot)
    # Copies: the pullback keeps its arguments, and the caller's memory is used again.
    state = copy(reshape(u, size(f.state)))
    differentiate = f.in_place ? pullback_in_place : pullback_of
    slope, pull = Base.invokelatest(differentiate, f.f, state, copy(p), t)
    f.pullbacks[slot] = pull
    return store!(du, slope, size(f.state))
end

function vjp!(ubar, pbar, f::SourceField{T}, u, p, t, slot, v) where {T}
    cotangent = copy(reshape(v, size(f.state)))
    state, parameters, time = Base.invokelatest(f.pullbacks[slot], cotangent)
    state === nothing ? fill!(ubar, 0) : copyto!(ubar, state)
    parameters === nothing || (pbar .+= parameters)
    return time === nothing ? zero(T) : T(time)
end
