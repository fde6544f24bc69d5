# Programs, solves and their discrete adjoint on arrays of the GPU's kind: no scalar indexing, no
# fallback to the processor.

using JLArrays, JSON, LinearAlgebra, Test
using PySciMLNode: PySciMLNode, program, evaluate!, linearize!, vjp!, on

isdefined(@__MODULE__, :PROGRAMS) || include("program_cases.jl")

JLArrays.allowscalar(false)

@testset "JLArrays: $name" for (name, text) in sort(collect(PROGRAMS))
    T = Float32  # kernels compile slowly
    f = program(text, T)
    g = on(JLVector{T}, f)
    sample(n, phase) = T[sin(12.9898 * (i + phase)) for i in 1:n]
    u, p, v = sample(STATES, 0), sample(WEIGHTS, 1), sample(STATES, 2)
    du, ubar, pbar = similar(u), similar(u), zero(p)
    linearize!(du, f, u, p, T(0.3), 1)
    tbar = vjp!(ubar, pbar, f, u, p, T(0.3), 1, v)
    ju, jp, jv = jl(u), jl(p), jl(v)
    jdu, jubar, jpbar = similar(ju), similar(ju), zero(jp)
    evaluate!(jdu, g, ju, jp, T(0.3))
    @test Array(jdu) ≈ du
    linearize!(jdu, g, ju, jp, T(0.3), 1)
    @test Array(jdu) ≈ du
    @test vjp!(jubar, jpbar, g, ju, jp, T(0.3), 1, jv) ≈ tbar atol = 100 * eps(T)
    @test Array(jubar) ≈ ubar
    @test Array(jpbar) ≈ pbar
end

const TIGHT_PLAN = """
{"dtype": 1, "algorithm": "Tsit5()", "packages": ["OrdinaryDiffEqTsit5"], "adaptive": true,
 "controller": null, "rtol": 1e-8, "atol": 1e-8, "driven": $STATES, "counted": $STATES,
 "dtmin": 0.0, "dtmax": null, "max_steps": 1000}
"""

# The classical method of order 4; any method can be replayed on the steps of another.
const CLASSICAL = PySciMLNode.Tableau(JSON.parse("""
{"c": [0.0, 0.5, 0.5, 1.0], "a": [[], [0.5], [0.0, 0.5], [0.0, 0.0, 1.0]],
 "b": [0.125, 0.375, 0.375, 0.125], "fsal": false,
 "weights": [[1.0, -0.875], [0.0, 0.375], [0.0, 0.375], [0.0, 0.125]]}
"""))

"Steps, states and cotangents of a solve on vectors like `u0`."
function solve_and_pull(field, u0::V, p::V, cotangent::V) where {V}
    rhs = PySciMLNode.RightHandSide(field)
    handle = PySciMLNode.make_plan(TIGHT_PLAN, 0, 0, 0)
    plan = PySciMLNode.OBJECTS[handle]
    PySciMLNode.free(handle)
    marks, saveat = [0.0, 0.4, 1.0], [0.0, 0.3, 0.4, 1.0]
    saved, poll = similar(u0, length(u0), length(saveat)), Returns(false)
    record = PySciMLNode.march(
        rhs, plan, u0, p, marks, 0.0, saveat, saved;
        poll, watch = Returns(false), dense = false, mass_matrix = I,
    )
    count = length(record.errors)
    steps = PySciMLNode.Steps{V}(record.times, diff(record.times), marks, record.states)
    arriving = PySciMLNode.Arriving{V}(
        [cotangent, fill(nothing, count - 1)..., cotangent], [cotangent, cotangent], [1, 1],
        [0.2, 0.7],
    )
    u0bar, pbar = similar(u0), zero(p)
    tbars, hbars, thetabars = zeros(count), zeros(count), zeros(2)
    sweep = PySciMLNode.Sweep(rhs, CLASSICAL, steps, arriving, p, pbar, u0bar)
    @test PySciMLNode.sweep!(sweep; tbars, hbars, thetabars, poll)
    return record.times, record.states[end], saved, u0bar, pbar, tbars, hbars, thetabars
end

@testset "JLArrays: a solve and its adjoint, $name" for name in ("linear by input", "tanh")
    f = program(PROGRAMS[name], Float64)
    sample(n, phase) = [sin(12.9898 * (i + phase)) for i in 1:n]
    given = sample(STATES, 0), sample(WEIGHTS, 1), sample(STATES, 2)
    expected = solve_and_pull(f, given...)
    found = solve_and_pull(on(JLVector{Float64}, f), jl.(given)...)
    @test found[2] isa JLVector{Float64} && found[5] isa JLVector{Float64}
    for (a, b) in zip(found, expected)
        @test Array(a) ≈ b rtol = 1e-13
    end
end
