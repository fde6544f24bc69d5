# Algorithms by name, and how a solve is set up.

const ALGORITHMS = Dict{String,Any}("Tsit5()" => Tsit5())

"""
    algorithm(expression, packages)

The algorithm that an expression such as `"Rodas5P()"` or `"AutoTsit5(Rosenbrock23())"` makes from
the names that the solver `packages`, which have been loaded, export.
"""
function algorithm(expression::String, packages)
    return get!(ALGORITHMS, expression) do
        scope, parsed = Module(:Algorithms), Meta.parse(expression)
        # Only what is named: looking at every export of a package also finds its clashes.
        for name in symbols(parsed), package in packages
            owner = loaded_package(package)
            Base.isexported(owner, name) && isdefined(owner, name) && !isdefined(scope, name) ||
                continue
            Core.eval(scope, :(const $name = $(getfield(owner, name))))
        end
        Core.eval(scope, parsed)
    end
end

symbols(::Any) = Symbol[]
symbols(name::Symbol) = [name]
symbols(expression::Expr) = mapreduce(symbols, vcat, expression.args; init = Symbol[])

function loaded_package(name)
    for (id, owner) in Base.loaded_modules
        id.name == name && return owner
    end
    throw(ArgumentError("the package $name has not been loaded"))
end

"""
Root-mean-square norm over the leading `driven` entries of a state, of which `counted` have a finite
tolerance; the absolute value of a number.
"""
struct DrivenNorm <: Function
    driven::Int
    counted::Int
end

(::DrivenNorm)(x::Number, t) = abs(x)

function (n::DrivenNorm)(x::AbstractVector, t)
    # Stochastic solvers also measure Brownian motions, of which there may be fewer.
    length(x) < n.driven && return sqrt(sum(abs2, x) / length(x))
    driven = n.driven == length(x) ? x : view(x, 1:(n.driven))
    return sqrt(sum(abs2, driven) / max(n.counted, 1))
end

"""
How solves of one kind are run: what Python describes once and then names by its handle.
"""
struct Plan{T,A,R,C}
    algorithm::A
    adaptive::Bool
    abstol::R
    reltol::R
    norm::DrivenNorm
    controller::C
    dtmin::T
    dtmax::T
    max_steps::Int
end

"The type of the numbers of a plan's solves."
number(::Plan{T}) where {T} = T

"""
    controller(name, options, T, algorithm)

A step size controller; `nothing` leaves the choice to the algorithm.
"""
function controller(name, options, ::Type{T}, algorithm) where {T}
    name === nothing && return nothing
    settings = (; (Symbol(key) => T(value) for (key, value) in options)...)
    name == "IController" && return OrdinaryDiffEqCore.IController(T, algorithm; settings...)
    name == "PIController" && return OrdinaryDiffEqCore.PIController(T, algorithm; settings...)
    name == "PIDController" && return PID(T, algorithm; settings...)
    throw(ArgumentError("unknown controller $name"))
end
