# Any Python callable as a field, by callback.

"""
A field that Python evaluates. The three functions exchange vectors through memory that both sides
see: `evaluate(t)` reads `state` and writes `slope`; `linearize(t, slot)` does so and keeps the graph;
`pull(slot)` reads the cotangent from `slope`, writes that of the state to `state`, adds that of
the parameters to `gradient`, and returns that of time.
"""
struct PythonField{T} <: AbstractField
    evaluate::Py
    linearize::Py
    pull::Py
    state::Vector{T}
    slope::Vector{T}
    gradient::Vector{T}
end

# The memory is read and written anew at each call.
Base.copy(f::PythonField) = f

function evaluate!(du, f::PythonField, u, p, t)
    copyto!(f.state, u)
    f.evaluate(Float64(t))
    copyto!(du, f.slope)
    return nothing
end

function linearize!(du, f::PythonField, u, p, t, slot)
    copyto!(f.state, u)
    f.linearize(Float64(t), slot)
    copyto!(du, f.slope)
    return nothing
end

function vjp!(ubar, pbar, f::PythonField{T}, u, p, t, slot, v) where {T}
    copyto!(f.slope, v)
    fill!(f.gradient, 0)
    tbar = pyconvert(Float64, f.pull(slot))
    copyto!(ubar, f.state)
    pbar .+= f.gradient
    return T(tbar)
end
