# The continuous adjoint of M u' = f(u, p, t), M any constant matrix.
#
# With cotangents v_i of the states at t_i the multiplier obeys, backward in time,
#     M' l' = -(df/du)' l,      M' (l(t_i-) - l(t_i+)) = v_i + (df/du)' L e_i,      R' (df/du)' l = 0
# where the columns of L and R span the left and right null spaces of M. The e_i, one for each
# algebraic equation, say how a state there moves with its equation. Then
#     u0* = M' l(t0),      p* = integral (df/dp)' l dt + sum_i (df/dp)' L e_i.
# (Y. Cao, S. Li, L. Petzold, R. Serban, SIAM J. Sci. Comput. 24 (2003) 1076-1089, of index 1.)

"""
A mass matrix with bases of its null spaces: of `M'` (`left`) and of `M` (`right`).
"""
struct Mass{T}
    matrix::Matrix{T}
    left::Matrix{T}
    right::Matrix{T}
end

Mass(matrix::AbstractMatrix{T}) where {T} =
    (m = Matrix{T}(matrix); Mass{T}(m, nullspace(copy(m')), nullspace(m)))

"""
    pull_piece!(solution, matrix, rhs, settings, times, cotangents, ubar, pbar; poll)

All continuous adjoints are this one where there is a mass matrix: the state is interpolated, and the
parameters' gradient is integrated by Gauss's rule of five points on each step.
"""
function pull_piece!(
    solution, matrix::AbstractMatrix, rhs, settings, times, cotangents, ubar, pbar; poll
)
    mass, p = Mass(matrix), solution.prob.p
    equation = AdjointEquation(solution, rhs, p, similar(ubar), similar(ubar), zero(p), poll)
    multiplier = zero(ubar)
    for i in reverse(eachindex(times))
        multiplier = jump!(pbar, multiplier, equation, mass, times[i], cotangents[i])
        goal = i > 1 ? times[i - 1] : solution.prob.tspan[1]
        path = travel(equation, mass, settings, multiplier, times[i], goal)
        integrate!(pbar, path, equation)
        multiplier = path.u[end]
    end
    mul!(ubar, mass.matrix', multiplier)
    return nothing
end

"""
`M' l' = -(df/du)' l` along a solution; what follows are its vectors, used again at each evaluation.
"""
struct AdjointEquation{S,V,P} <: Function
    solution::S
    rhs::RightHandSide
    p::V
    u::V
    du::V
    pbar::V
    poll::P
end

# The vector-Jacobian product of the field at a time: `ubar` is overwritten, `e.pbar` added to.
function pull_at!(ubar, e::AdjointEquation, t, v)
    e.solution(e.u, t)
    time = inside(e.rhs, t)
    reserve!(e.rhs.field, 1)
    linearize!(e.du, e.rhs.field, e.u, e.p, time, 1)
    e.rhs.evaluations += 1
    vjp!(ubar, e.pbar, e.rhs.field, e.u, e.p, time, 1, v)
    return nothing
end

function (e::AdjointEquation)(dl, l, _, t)
    e.poll()
    pull_at!(dl, e, t, l)
    dl .*= -1
    return nothing
end

jacobian(e::AdjointEquation, t) = (e.solution(e.u, t); Jacobian(e.rhs)(e.u, e.p, t))

function jump!(pbar, multiplier, e::AdjointEquation, mass::Mass, t, cotangent)
    k = size(mass.left, 2)
    k == 0 && return multiplier + mass.matrix' \ cotangent
    J = jacobian(e, t)
    equations = [mass.matrix' -(J' * mass.left); (J * mass.right)' zeros(eltype(J), k, k)]
    factors = lu(equations; check = false)
    issuccess(factors) || throw(
        ArgumentError(
            "the algebraic equations do not determine the algebraic entries at t = $t (an index " *
            "above 1): there is no gradient.",
        ),
    )
    found = factors \ [mass.matrix' * multiplier + cotangent; zeros(eltype(J), k)]
    n = length(multiplier)
    fill!(e.pbar, 0)
    pull_at!(similar(multiplier), e, t, mass.left * found[(n + 1):end])
    pbar .+= e.pbar
    return found[1:n]
end

function travel(e::AdjointEquation, mass::Mass, settings, multiplier, from, to)
    jac(J, l, _, t) = (J .= .-jacobian(e, t)'; nothing)
    f = ODEFunction{true,SciMLBase.FullSpecialize}(e; jac, mass_matrix = copy(mass.matrix'))
    problem = ODEProblem{true,SciMLBase.FullSpecialize}(f, multiplier, (from, to))
    path = solve(
        problem, backward(settings.algorithm);
        settings.abstol, settings.reltol, maxiters = settings.max_steps, dense = true,
        initializealg = SciMLBase.NoInit(), verbose = SILENT,
    )
    SciMLBase.successful_retcode(path) || throw(
        ErrorException(
            "the adjoint equation could not be solved beyond t = $(path.t[end]) ($(path.retcode)); " *
            "larger tolerances of the adjoint may help.",
        ),
    )
    return path
end

const NODES = (0.0, -0.5384693101056831, 0.5384693101056831, -0.9061798459386640, 0.9061798459386640)
const WEIGHTS = (
    0.5688888888888889, 0.47862867049936647, 0.47862867049936647, 0.23692688505618908,
    0.23692688505618908,
)

# pbar += integral of (df/dp)' l over the path, which leads backward.
function integrate!(pbar::AbstractVector{T}, path, e::AdjointEquation) where {T}
    isempty(pbar) && return nothing
    ubar = similar(e.u)
    for (later, earlier) in zip(path.t, Iterators.drop(path.t, 1))
        middle, half = (later + earlier) / 2, (later - earlier) / 2
        for (node, weight) in zip(NODES, WEIGHTS)
            t = middle + T(node) * half
            fill!(e.pbar, 0)
            pull_at!(ubar, e, t, path(t))
            pbar .+= T(weight) * half .* e.pbar
        end
    end
    return nothing
end

"The derivative of the state: `M u' = f`, and the algebraic equations hold on."
function state_rate(rhs, matrix::AbstractMatrix, u, p, t)
    mass, f = Mass(matrix), state_rate(rhs, I, u, p, t)
    isempty(mass.left) && return mass.matrix \ f
    J, slope = similar(u, length(u), length(u)), similar(u)
    each_row((i, row, tbar) -> (J[i, :] .= row; slope[i] = tbar), rhs, u, p, t)
    return [mass.matrix; mass.left' * J] \ [f; -(mass.left' * slope)]
end
