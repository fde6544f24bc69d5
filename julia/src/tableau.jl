# Explicit Runge-Kutta methods as data. Python is the only owner of the coefficients.

"""
An explicit method with its dense output `u + h * sum_i b_i(theta) k_i`, as Python describes it.

`a[i]` are the rows of all stages, those that only dense output needs included; `weights[i, j]` is
the coefficient of `theta^j` in `b_i`.
"""
struct Tableau
    stages::Int
    all_stages::Int
    fsal::Bool
    c::Vector{Float64}
    a::Vector{Vector{Float64}}
    b::Vector{Float64}
    weights::Matrix{Float64}
end

"""
    Tableau(description)

From the parsed JSON with the entries `c`, `a`, `b`, `fsal` and `weights`.
"""
function Tableau(d::AbstractDict)
    rows(x) = [Vector{Float64}(row) for row in x]
    b, weights = Vector{Float64}(d["b"]), rows(d["weights"])
    # Rows of the stages that dense output ignores are left out in the description's end.
    matrix = zeros(length(weights), maximum(length, weights))
    for (i, row) in enumerate(weights)
        matrix[i, eachindex(row)] = row
    end
    c = Vector{Float64}(d["c"])
    return Tableau(length(b), length(c), d["fsal"], c, rows(d["a"]), b, matrix)
end

"""
    dense_weights(tableau, theta)

`b_i(theta)` of all stages.
"""
dense_weights(tab::Tableau, theta) = tab.weights * [theta^j for j in axes(tab.weights, 2)]

"""
    dense_slopes(tableau, theta)

`db_i/dtheta` of all stages.
"""
dense_slopes(tab::Tableau, theta) =
    tab.weights * [j * theta^(j - 1) for j in axes(tab.weights, 2)]
