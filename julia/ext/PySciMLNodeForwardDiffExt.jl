"""
Forward sensitivities: dual numbers through the accepted steps of an explicit method, the field's
derivatives by its vector-Jacobian products.
"""
module PySciMLNodeForwardDiffExt

using ForwardDiff: ForwardDiff, Dual
using PySciMLNode
using PySciMLNode: bound!, dense_weights, inside, linearize!, reserve!, vjp!
using PySciMLNode.LinearAlgebra

function PySciMLNode.forward_sweep!(rhs, tableau, steps, arriving, p, pbar, ubar; poll)
    n = length(ubar)
    member = [Int[] for _ in steps.sizes]
    for (j, step) in enumerate(arriving.step)
        push!(member[step], j)
    end
    reserve!(rhs.field, 1)
    # The cotangents make a number of the solve; its gradient is what is pulled back.
    function pairing(z)
        u, q = z[1:n], z[(n + 1):end]
        total = weighed(arriving.states[1], u)
        for k in eachindex(steps.sizes)
            poll()
            t, h = steps.times[k], eltype(ubar)(steps.sizes[k])
            bound!(rhs, eltype(ubar), steps.marks, t, steps.times[k + 1])
            K = stages(rhs, tableau, u, q, t, h, isempty(member[k]))
            for j in member[k]
                weights = dense_weights(tableau, arriving.theta[j])
                total += dot(arriving.outputs[j], u + h * combination(K, weights))
            end
            u = u + h * combination(K, tableau.b)
            total += weighed(arriving.states[k + 1], u)
        end
        return total
    end
    gradient = ForwardDiff.gradient(pairing, vcat(steps.states[1], p))
    copyto!(ubar, view(gradient, 1:n))
    pbar .+= view(gradient, (n + 1):length(gradient))
    return length(steps.sizes)
end

weighed(::Nothing, u) = zero(eltype(u))
weighed(cotangent, u) = dot(cotangent, u)

# sum_i w_i k_i, in the precision of the stages; there may be more of them than weights.
combination(K, weights) = sum(ForwardDiff.valtype(eltype(k))(w) * k for (k, w) in zip(K, weights))

# The last stages serve dense output alone.
function stages(rhs, tableau, u, p, t, h, without_output)
    K = Vector{typeof(u)}()
    for i in 1:(without_output ? tableau.stages : tableau.all_stages)
        argument = i == 1 ? u : u + h * combination(K, tableau.a[i])
        push!(K, slope(rhs, argument, p, inside(rhs, typeof(h)(t + tableau.c[i] * h))))
    end
    return K
end

"The field at dual numbers."
function slope(rhs, u::AbstractVector{D}, p, t) where {D<:Dual}
    x, q = ForwardDiff.value.(u), ForwardDiff.value.(p)
    value = similar(x)
    linearize!(value, rhs.field, x, q, t, 1)
    rhs.evaluations += 1
    v, ubar, pbar = zero(x), similar(x), similar(q)
    return map(eachindex(value)) do i
        v[i] = 1
        fill!(pbar, 0)
        vjp!(ubar, pbar, rhs.field, x, q, t, 1, v)
        v[i] = 0
        return D(value[i], along(ubar, u) + along(pbar, p))
    end
end

# What the perturbation of an argument adds.
function along(bar, x::AbstractVector{D}) where {D}
    none = zero(ForwardDiff.partials(zero(D)))
    return sum((b * ForwardDiff.partials(y) for (b, y) in zip(bar, x)); init = none)
end

function PySciMLNode.pullback_in_place(f, u, p, t)
    n, m = length(u), length(p)
    function write!(du, z)
        f(reshape(du, size(u)), reshape(z[1:n], size(u)), z[(n + 1):(n + m)], z[end])
        return nothing
    end
    value = similar(u)
    J = ForwardDiff.jacobian(write!, vec(value), [vec(u); p; t])
    f(value, u, p, t)
    function pull(v)
        bar = J' * vec(v)
        return reshape(bar[1:n], size(u)), bar[(n + 1):(n + m)], bar[end]
    end
    return value, pull
end

end
