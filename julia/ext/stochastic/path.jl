"""
The Brownian path as StochasticDiffEq sees it: `draw(start, end)` writes the increments to `dW`, `dZ`.

For a step of size `h` these make `I_(1,0) = h (dW + dZ / sqrt(3)) / 2`.
"""
mutable struct Path{T,V<:AbstractVector{T}} <: SciMLBase.AbstractNoiseProcess{T,2,Vector{V},true}
    const draw::Any  # not a parameter: solvers are compiled for the path's type
    const dW::V
    const dZ::V
    const W::Vector{V}  # where solvers look up how many motions there are
    curt::Float64
    dt::Float64
    const reset::Bool
end

Path(draw, dW::V, dZ::V, t) where {T,V<:AbstractVector{T}} =
    Path{T,V}(draw, dW, dZ, [dW], t, 0.0, false)

# A solver copies the noise of its problem, and this one is for a single solve.
Base.copy(path::Path) = path

Base.show(io::IO, ::Path) = print(io, "Path")
Base.show(io::IO, ::MIME"text/plain", path::Path) = show(io, path)

function DiffEqNoiseProcess.calculate_step!(path::Path, dt, u, p)
    path.dt = dt
    path.draw(path.curt, path.curt + dt)
    return nothing
end

function DiffEqNoiseProcess.accept_step!(path::Path, dt, u, p, setup_next = true)
    path.curt += path.dt
    path.dt = dt
    setup_next && DiffEqNoiseProcess.calculate_step!(path, dt, u, p)
    return nothing
end

DiffEqNoiseProcess.reject_step!(path::Path, dt, u, p) =
    DiffEqNoiseProcess.calculate_step!(path, dt, u, p)

DiffEqNoiseProcess.setup_next_step!(path::Path, u, p) =
    DiffEqNoiseProcess.calculate_step!(path, path.dt, u, p)

DiffEqNoiseProcess.save_noise!(::Path) = nothing
