# Programs on arrays of the GPU's kind: no scalar indexing, nothing taken to the processor.

using JLArrays, Test
using PySciMLNode: program, evaluate!, linearize!, vjp!, on

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
