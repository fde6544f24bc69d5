# Stochastic steps and their discrete adjoint on arrays of the GPU's kind: no scalar indexing, no
# fallback to the processor; the gradient against differences of the solve itself.

using JLArrays, JSON, LinearAlgebra, Random, StochasticDiffEq, Test
using PySciMLNode: PySciMLNode, program, on

isdefined(@__MODULE__, :PROGRAMS) || include("program_cases.jl")

JLArrays.allowscalar(false)

const EXTENSION = Base.get_extension(PySciMLNode, :PySciMLNodeStochasticExt)

stochastic_plan(name) = """
{"dtype": 1, "algorithm": "$name", "packages": ["StochasticDiffEq"], "adaptive": false,
 "controller": null, "rtol": 0.1, "atol": 0.1, "driven": $STATES, "counted": $STATES,
 "dtmin": 0.0, "dtmax": null, "max_steps": 1000}
"""

# Milstein's method without derivatives.
const MILSTEIN = EXTENSION.Method(JSON.parse("""
{"drift": [{"c": 0.0, "a": [], "noise": []}, null],
 "diffusion": [{"c": 0.0, "a": [], "noise": []},
               {"c": 0.0, "a": [1.0], "noise": [["sqrt_h", [1.0]]]}],
 "alpha": [1.0, 0.0], "beta": [["w", [1.0, 0.0]], ["i11", [-1.0, 1.0]]]}
"""))

const COUNT = 4

"The end of a solve in `COUNT` steps, and the gradients of `cotangent' u1`."
function walk_and_pull(field, u0::V, p::V, cotangent::V, motions) where {V}
    parts = PySciMLNode.RightHandSide(field), PySciMLNode.RightHandSide(copy(field))
    handle = PySciMLNode.make_plan(stochastic_plan("RKMil()"), 0, 0, 0)
    plan = PySciMLNode.OBJECTS[handle]
    PySciMLNode.free(handle)
    w, z, h = zero(u0), zero(u0), 1 / COUNT
    draw(from, to) = (copyto!(w, motions[round(Int, from / h) + 1]); nothing)
    walk = EXTENSION.walk(
        parts..., plan, copy(u0), (p, p), w, z, [0.0, 1.0];
        delta = 1.0, dt0 = h, proposed = h, dtmin = 0.0, samples = 0, length = 0.0, draw,
    )
    states = [copy(u0)]
    for _ in 1:COUNT
        step!(walk.integrator)
        push!(states, copy(walk.integrator.u))
    end
    gradients, ubar = (zero(p), zero(p)), copy(cotangent)
    pull = EXTENSION.StepPullback(parts..., MILSTEIN, (p, p), gradients, w, z)
    for k in COUNT:-1:1
        draw((k - 1) * h, k * h)
        EXTENSION.pull!(pull, (k - 1) * h, h, states[k], ubar)
    end
    return states[end], ubar, gradients...
end

@testset "stochastic steps and their adjoint, $name" for name in ("linear by input", "tanh")
    f = program(PROGRAMS[name], Float64)
    sample(n, phase) = [sin(12.9898 * (i + phase)) for i in 1:n]
    u0, p, cotangent = sample(STATES, 0), sample(WEIGHTS, 1), sample(STATES, 2)
    motions = [0.5 * randn(Xoshiro(k), STATES) for k in 1:COUNT]
    expected = walk_and_pull(f, u0, p, cotangent, motions)
    found = walk_and_pull(on(JLVector{Float64}, f), jl(u0), jl(p), jl(cotangent), motions)
    @test found[1] isa JLVector{Float64} && found[2] isa JLVector{Float64}
    for (a, b) in zip(found, expected)
        @test Array(a) ≈ b rtol = 1e-13
    end
    end_of(u) = dot(cotangent, first(walk_and_pull(f, u, p, cotangent, motions)))
    direction, step = sample(STATES, 3), 1e-5
    slope = (end_of(u0 + step * direction) - end_of(u0 - step * direction)) / 2step
    @test dot(direction, expected[2]) ≈ slope rtol = 1e-7
end

@testset "matrices of a batch" begin
    data, w = randn(Xoshiro(0), 2, 3, 4), randn(Xoshiro(1), 8)
    blocks = EXTENSION.Blocks(data)
    dense = collect(blocks)
    @test size(dense) == (12, 8) && count(!iszero, dense) == 24
    @test mul!(zeros(12), blocks, w) ≈ dense * w
    @test mul!(ones(12), blocks, w, 0.5, 2.0) ≈ 0.5 * dense * w .+ 2
    @test Array(mul!(jl(zeros(12)), EXTENSION.Blocks(jl(data)), jl(w))) ≈ dense * w
    @test_throws ArgumentError blocks[1, 8] = 1.0
end
