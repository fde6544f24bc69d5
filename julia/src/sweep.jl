# The discrete adjoint: accepted steps replayed backward, one at a time.
#
# For U_i = u + h sum_j a_ij k_j, k_i = f(t + c_i h, U_i), u1 = u + h sum_i b_i k_i and dense outputs
# v_m = u + h sum_i b_i(theta_m) k_i the cotangents obey, for i = s, ..., 1,
#     k*_i = h (b_i u1* + sum_m b_i(theta_m) v*_m + sum_{j>i} a_ji U*_j),   U*_i = (df/du)' k*_i,
#     u* = u1* + sum_m v*_m + sum_i U*_i
# (Hager, Numer. Math. 87 (2000) 247-282).

"""
Pulls cotangents back through single steps of one field and method, its buffers allocated once.

The columns of `K` are the stages; those of `C` the cotangents in the order in which they arise:
`u1*, v*_1, ..., v*_m, U*_s, ..., U*_1`, so that each sum is one matrix-vector product.
"""
struct StepPullback{T,V<:AbstractVector{T},M<:AbstractMatrix{T},F<:AbstractField}
    rhs::RightHandSide
    field::F
    tableau::Tableau
    p::V
    pbar::V
    K::M
    C::M
    arguments::Vector{V}
    sum::V
    kbar::V
    weights::Vector{T}
end

function StepPullback(rhs, tableau, p, pbar, u, outputs::Int)
    T, N = eltype(u), length(u)
    s = tableau.all_stages
    columns = s + 1 + outputs
    K, C = similar(u, N, s), similar(u, N, columns)
    reserve!(rhs.field, s)
    weights = Vector{T}(undef, columns)
    arguments = [similar(u) for _ in 1:s]
    return StepPullback(
        rhs, rhs.field, tableau, p, pbar, K, C, arguments, similar(u), similar(u), weights
    )
end

# y = alpha * A[:, from:to] * w + beta * y, the weights copied to the device of A.
function combine!(y, A, from, to, w, alpha, beta)
    T = eltype(y)
    columns = view(A, :, from:to)
    return mul!(y, columns, on_device(y, view(w, 1:(to - from + 1))), T(alpha), T(beta))
end

function combine!(y::Vector{T}, A::Matrix{T}, from, to, w, alpha, beta) where {T}
    n, few = length(y), length(y) * (to - from + 1) <= FEW
    few || return mul!(y, view(A, :, from:to), view(w, 1:(to - from + 1)), T(alpha), T(beta))
    beta == 0 ? fill!(y, zero(T)) : y .*= T(beta)
    for j in from:to
        factor = T(alpha) * w[j - from + 1]
        @inbounds @simd ivdep for i in 1:n
            y[i] = muladd(factor, A[i, j], y[i])
        end
    end
    return y
end

on_device(::Array, w) = w
on_device(like, w) = copyto!(similar(like, length(w)), collect(w))

"""
    stages!(pull, t, h, u, count)

Evaluate the first `count` stages of a step from `u`, keeping what their pullbacks need.
"""
function stages!(pull::StepPullback{T}, t, h, u, count) where {T}
    (; rhs, field, tableau, p, K, weights) = pull
    for i in 1:count
        argument = copyto!(pull.arguments[i], u)
        if i > 1
            weights[1:(i - 1)] .= tableau.a[i]
            combine!(argument, K, 1, i - 1, weights, h, 1)
        end
        time = inside(rhs, T(t + tableau.c[i] * h))
        linearize!(view(K, :, i), field, argument, p, time, i)
    end
    rhs.evaluations += count
    return nothing
end

"""
    pull!(pull, t, h, u, ubar, outputs, thetas) -> (tbar, hbar)

Replace the cotangent `ubar` of a step's end by that of its start.

`outputs` are cotangents of dense outputs at the fractions `thetas`. Returns the cotangents of the
step's start time and size; those of `thetas` have parts of their own, see `theta_bar`.
"""
function pull!(pull::StepPullback{T}, t, h, u, ubar, outputs, thetas) where {T}
    (; rhs, field, tableau, p, pbar, K, C, arguments, kbar, weights) = pull
    m = length(thetas)
    # Without dense outputs the last stage of a first-same-as-last method has no cotangent here.
    count = m > 0 ? tableau.all_stages : tableau.stages - tableau.fsal
    stages!(pull, t, h, u, count)
    C[:, 1] .= ubar
    for j in 1:m
        C[:, 1 + j] .= outputs[j]
    end
    dense = [dense_weights(tableau, theta) for theta in thetas]
    tbar = hbar = 0.0
    for i in count:-1:1
        weights[1] = i <= tableau.stages ? tableau.b[i] : 0
        for j in 1:m
            weights[1 + j] = dense[j][i]
        end
        for (place, j) in enumerate(count:-1:(i + 1))
            weights[1 + m + place] = tableau.a[j][i]
        end
        last = 1 + m + count - i
        combine!(kbar, C, 1, last, weights, h, 0)
        time = inside(rhs, T(t + tableau.c[i] * h))
        along = Float64(dot(kbar, view(K, :, i)))
        slope = vjp!(pull.sum, pbar, field, arguments[i], p, time, i, kbar)
        C[:, last + 1] .= pull.sum
        tbar += slope
        hbar += along / h + tableau.c[i] * slope
    end
    fill!(weights, 1)
    combine!(ubar, C, 1, 1 + m + count, weights, 1, 0)
    return tbar, hbar
end

"""
    theta_bar(pull, h, output, theta)

Cotangent of the fraction at which a dense output was taken, right after the `pull!` of its step.
"""
function theta_bar(pull::StepPullback, h, output, theta)
    (; tableau, K, weights) = pull
    weights[1:(tableau.all_stages)] .= dense_slopes(tableau, theta)
    combine!(pull.sum, K, 1, tableau.all_stages, weights, h, 0)
    return Float64(dot(output, pull.sum))
end

"""
The accepted steps of a solve: `times` (`n + 1`), `sizes` (`n`), the `states` at the times, and the
`marks` (start, stops, end) between which the field is evaluated.
"""
struct Steps{V}
    times::Vector{Float64}
    sizes::Vector{Float64}
    marks::Vector{Float64}
    states::Vector{V}
end

"""
Cotangents that arrive at a solve: at its states (`nothing` stands for zero), and at dense outputs
`j` inside step `step[j]` at the fraction `theta[j]`, in the order of the steps.
"""
struct Arriving{V}
    states::Vector{Union{Nothing,V}}
    outputs::Vector{V}
    step::Vector{Int}
    theta::Vector{Float64}
end

"""
A sweep on its way: step `next` is the next one to be replayed, and `live` tells whether a cotangent has
arrived at its end.
"""
mutable struct Sweep{S<:StepPullback,V}
    const pull::S
    const steps::Steps{V}
    const arriving::Arriving{V}
    const inside::Vector{Vector{Int}}
    const ubar::V
    next::Int
    live::Bool
    replayed::Int
end

"""
    Sweep(rhs, tableau, steps, arriving, p, pbar, ubar)

A sweep that begins: it pulls all cotangents of a solve back to its initial state (`ubar`) and parameters
(`pbar`, added to).
"""
function Sweep(rhs, tableau, steps::Steps{V}, arriving, p, pbar, ubar) where {V}
    n, m = length(steps.sizes), length(arriving.theta)
    inside = [Int[] for _ in 1:n]
    for j in 1:m
        push!(inside[arriving.step[j]], j)
    end
    most = maximum(length, inside; init = 0)
    pull = StepPullback(rhs, tableau, p, pbar, steps.states[1], most)
    fill!(ubar, 0)
    return Sweep{typeof(pull),V}(pull, steps, arriving, inside, ubar, n, false, 0)
end

"""
    sweep!(sweep; tbars, hbars, thetabars, poll) -> whether it has gone through

Go on with a sweep, until `poll()` tells to leave it for now.

`tbars`, `hbars` receive the cotangents of each step's start time and size, `thetabars` those of the
dense outputs' fractions; they may be empty where no gradient of times is wanted.
"""
function sweep!(sweep::Sweep; tbars, hbars, thetabars, poll)
    (; pull, steps, arriving, ubar) = sweep
    while sweep.next > 0
        poll() && return false
        k = sweep.next
        arrived, members = arriving.states[k + 1], sweep.inside[k]
        arrived === nothing || (ubar .+= arrived)
        sweep.live |= arrived !== nothing || !isempty(members)
        sweep.next -= 1
        sweep.live || continue
        t, h = steps.times[k], steps.sizes[k]
        bound!(pull.rhs, eltype(ubar), steps.marks, t, steps.times[k + 1])
        outputs, thetas = view(arriving.outputs, members), view(arriving.theta, members)
        tbar, hbar = pull!(pull, t, h, steps.states[k], ubar, outputs, thetas)
        sweep.replayed += 1
        isempty(tbars) && continue
        tbars[k], hbars[k] = tbar, hbar
        for (j, output, theta) in zip(members, outputs, thetas)
            thetabars[j] = theta_bar(pull, h, output, theta)
        end
    end
    arriving.states[1] === nothing || (ubar .+= arriving.states[1])
    return true
end
