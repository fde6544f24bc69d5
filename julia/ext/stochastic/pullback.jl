# The discrete adjoint of one step. With the stages
#     f_i = f(X_i), X_i = u + h sum_j a_ij f_j + sum_k I_k sum_j b_kij g_j,   g_i = g(Y_i) likewise,
# and u1 = u + h sum_i alpha_i f_i + sum_k I_k sum_i beta_ki g_i the cotangents obey, for i = s, ..., 1,
#     f*_i = h (alpha_i u1* + sum_{j>i} a_ji X*_j + a'_ji Y*_j),         X*_i = (df/du)' f*_i,
#     g*_i = sum_k I_k (beta_ki u1* + sum_{j>i} b_kji X*_j + b'_kji Y*_j),  Y*_i = (dg/du)' g*_i,
#     u* = u1* + sum_i X*_i + Y*_i.

const INTEGRALS = ("sqrt_h", "w", "i10", "i11", "i111")

"""
A stochastic method as Python describes it. Of the matrices, `drift[:, i]` weighs the drifts of the
stages in `X_i` (`i <= s`), `Y_i` and `u1` (the last), and `noise[k][:, i]` the diffusions.
"""
struct Method
    stages::Int
    f_nodes::Vector{Union{Nothing,Float64}}  # none where a stage has no drift
    g_nodes::Vector{Union{Nothing,Float64}}
    drift::Matrix{Float64}
    noise::Vector{Pair{Int,Matrix{Float64}}}
end

function Method(d::AbstractDict)
    s = length(d["drift"])
    drift = zeros(s, 2s + 1)
    noise = [zeros(s, 2s + 1) for _ in INTEGRALS]
    function fill_column!(column, row, terms)
        drift[eachindex(row), column] .= row
        for (kind, weights) in terms
            noise[findfirst(==(kind), INTEGRALS)][eachindex(weights), column] .= weights
        end
    end
    for (offset, stages) in ((0, d["drift"]), (s, d["diffusion"])), (i, stage) in enumerate(stages)
        stage === nothing || fill_column!(offset + i, stage["a"], stage["noise"])
    end
    fill_column!(2s + 1, d["alpha"], d["beta"])
    node(stage) = stage === nothing ? nothing : Float64(stage["c"])
    used = [k => noise[k] for k in eachindex(INTEGRALS) if any(!iszero, noise[k])]
    return Method(s, node.(d["drift"]), node.(d["diffusion"]), drift, used)
end

PySciMLNode.make_sde_method(json::String) = keep(Method(PySciMLNode.JSON.parse(json)))

"""
Pulls cotangents back through single steps, its buffers allocated once. The columns of `C` are
`X*_1, ..., X*_s, Y*_1, ..., Y*_s, u1*`; those of `I` the integrals, of `F` and `G` the stages.
"""
struct StepPullback{T,V<:AbstractVector{T},M<:AbstractMatrix{T}}
    drift::RightHandSide
    diffusion::RightHandSide
    method::Method
    parameters::NTuple{2,V}
    gradients::NTuple{2,V}
    w::V
    z::V
    F::M
    G::M
    C::M
    I::M
    X::Vector{V}
    Y::Vector{V}
    sum::V
    bar::V
end

function StepPullback(
    drift, diffusion, method, parameters::NTuple{2,V}, gradients::NTuple{2,V}, w::V, z::V
) where {T,V<:AbstractVector{T}}
    s, n = method.stages, length(w)
    reserve!(drift.field, s)
    reserve!(diffusion.field, s)
    empty(columns) = fill!(similar(w, n, columns), 0)
    vectors() = [similar(w) for _ in 1:s]
    F = empty(s)
    return StepPullback{T,V,typeof(F)}(
        drift, diffusion, method, parameters, gradients, w, z, F, empty(s), empty(2s + 1),
        empty(length(INTEGRALS)), vectors(), vectors(), similar(w), similar(w),
    )
end

function integrals!(pull::StepPullback{T}, h) where {T}
    (; I, w, z) = pull
    h, root = T(h), T(sqrt(h))
    I[:, 1] .= root
    I[:, 2] .= w
    I[:, 3] .= (w .+ z ./ sqrt(T(3))) ./ 2
    I[:, 4] .= (w .^ 2 .- h) ./ (2root)
    I[:, 5] .= (w .^ 3 .- 3h .* w) ./ (6h)
    return nothing
end

# y += the column of a stage, or of the end.
function add_column!(y, pull::StepPullback, column, h)
    (; method, F, G, I, sum) = pull
    add_weighted!(y, F, view(method.drift, :, column), h, 1)
    for (k, weights) in method.noise
        row = view(weights, :, column)
        any(!iszero, row) || continue
        add_weighted!(sum, G, row, 1, 0)
        y .+= view(I, :, k) .* sum
    end
    return y
end

add_weighted!(y, A, w, alpha, beta) = combine!(y, A, 1, size(A, 2), eltype(y).(w), alpha, beta)

function pull!(pull::StepPullback{T}, t, h, u, ubar) where {T}
    (; method, F, G, C, X, Y, bar) = pull
    s = method.stages
    (pf, pg), (pfbar, pgbar) = pull.parameters, pull.gradients
    integrals!(pull, h)
    fill!(F, 0)
    fill!(G, 0)
    for i in 1:s
        stage!(F, X, pull, pull.drift, method.f_nodes[i], pf, i, i, t, h, u)
        stage!(G, Y, pull, pull.diffusion, method.g_nodes[i], pg, i, s + i, t, h, u)
    end
    fill!(C, 0)
    C[:, 2s + 1] .= ubar
    for i in s:-1:1
        if method.g_nodes[i] !== nothing
            fill!(bar, 0)
            for (k, weights) in method.noise
                row = view(weights, i, :)
                any(!iszero, row) || continue
                add_weighted!(pull.sum, C, row, 1, 0)
                bar .+= view(pull.I, :, k) .* pull.sum
            end
            pull_stage!(C, s + i, pull, pull.diffusion, method.g_nodes[i], pg, pgbar, Y, i, t, h)
        end
        if method.f_nodes[i] !== nothing
            add_weighted!(bar, C, view(method.drift, i, :), h, 0)
            pull_stage!(C, i, pull, pull.drift, method.f_nodes[i], pf, pfbar, X, i, t, h)
        end
    end
    add_weighted!(ubar, C, ones(2s + 1), 1, 0)
    return nothing
end

function stage!(values, arguments, pull, rhs, node, p, i, column, t, h, u)
    node === nothing && return nothing
    argument = add_column!(copyto!(arguments[i], u), pull, column, h)
    linearize!(view(values, :, i), rhs.field, argument, p, eltype(u)(t + node * h), i)
    return nothing
end

function pull_stage!(C, column, pull, rhs, node, p, pbar, arguments, i, t, h)
    time = eltype(pull.bar)(t + node * h)
    vjp!(pull.sum, pbar, rhs.field, arguments[i], p, time, i, pull.bar)
    C[:, column] .= pull.sum
    return nothing
end

function PySciMLNode.make_sde_pullback(
    drift::Int, diffusion::Int, method::Int, dtype::Int, device::Int, n::Int, nf::Int, pf::Int,
    pfbar::Int, ng::Int, pg::Int, pgbar::Int, w::Int, z::Int,
)
    vector(address, count) = memory(REAL[dtype + 1], device, address, count)
    return keep(
        StepPullback(
            distinct(OBJECTS[drift]::RightHandSide, OBJECTS[diffusion]::RightHandSide)...,
            OBJECTS[method]::Method, (vector(pf, nf), vector(pg, ng)),
            (vector(pfbar, nf), vector(pgbar, ng)), vector(w, n), vector(z, n),
        ),
    )
end

function PySciMLNode.pull_sde!(
    fd::Int, pullback::Int, device::Int, n::Int, t::Float64, h::Float64, u::Int, ubar::Int
)
    stop_when_interrupted(fd)
    pull_at!(OBJECTS[pullback]::StepPullback, device, n, t, h, u, ubar)
    return nothing
end

function pull_at!(pull::StepPullback{T}, device, n, t, h, u, ubar) where {T}
    return pull!(pull, t, h, memory(T, device, u, n), memory(T, device, ubar, n))
end
