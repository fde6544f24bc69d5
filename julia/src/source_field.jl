# Right-hand sides written in Julia.

"""
A function `f(u, p, t)` of the user's, given as text. `u` has the state's shape reversed (batch last),
`p` is a vector, and the result has `u`'s shape.
"""
struct SourceField{T} <: AbstractField
    f::Any
    # Where the function was defined: without it the collector would take the function's type.
    scope::Module
    shape::Dims
    pullbacks::Vector{Any}
end

function SourceField{T}(text::String, shape) where {T}
    scope = Module(:JuliaField)
    Core.eval(scope, :(using PySciMLNode.LinearAlgebra))
    expression = Meta.parseall(text)
    f = Core.eval(scope, expression)
    f isa Base.Callable || throw(
        ArgumentError("the source must end in a function f(u, p, t), but ends in a $(typeof(f))")
    )
    return SourceField{T}(f, scope, Dims(shape), [])
end

# For another task: the function is shared, what is kept between evaluations is not.
Base.copy(f::SourceField{T}) where {T} = SourceField{T}(f.f, f.scope, f.shape, [])

function evaluate!(du, f::SourceField{T}, u, p, t) where {T}
    return store!(du, Base.invokelatest(f.f, reshape(u, f.shape), p, t), f.shape)
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

reserve!(f::SourceField, slots::Int) = length(f.pullbacks) < slots && resize!(f.pullbacks, slots)

function linearize!(du, f::SourceField, u, p, t, slot)
    reserve!(f, slot)
    # Copies: the pullback keeps its arguments, and the caller's memory is used again.
    slope, pull = Base.invokelatest(pullback_of, f.f, copy(reshape(u, f.shape)), copy(p), t)
    f.pullbacks[slot] = pull
    return store!(du, slope, f.shape)
end

function vjp!(ubar, pbar, f::SourceField{T}, u, p, t, slot, v) where {T}
    state, parameters, time = Base.invokelatest(f.pullbacks[slot], copy(reshape(v, f.shape)))
    state === nothing ? fill!(ubar, 0) : copyto!(ubar, state)
    parameters === nothing || (pbar .+= parameters)
    return time === nothing ? zero(T) : T(time)
end
