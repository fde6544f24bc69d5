# A program as a layer of Lux: the same numbers, the program's own gradient.

using Lux, PySciMLNode, Random, Test, Zygote

isdefined(@__MODULE__, :PROGRAMS) || include("program_cases.jl")

@testset "a program in Lux" begin
    program = PySciMLNode.program(PROGRAMS["linear by input"], Float64)
    layer = PySciMLNode.lux_model(program)
    ps, st = Lux.setup(Random.Xoshiro(0), layer)
    @test Lux.parameterlength(layer) == WEIGHTS
    @test size(ps.w) == (WEIGHTS,)
    p, u = sin.(1.0:WEIGHTS), reshape(cos.(1.0:STATES), 4, 6)
    ps = PySciMLNode.named_parameters(layer, p)
    du = similar(vec(u))
    PySciMLNode.evaluate!(du, program, vec(u), p, 0.3)
    @test vec(first(layer((u, 0.3), ps, st))) ≈ du
    value((u, t), ps) = sum(abs2, first(layer((u, t), ps, st)))
    (ubar, tbar), pbar = Zygote.gradient(value, (u, 0.3), ps)
    expected, gradient = similar(du), zero(p)
    PySciMLNode.linearize!(similar(du), program, vec(u), p, 0.3, 1)
    time = PySciMLNode.vjp!(expected, gradient, program, vec(u), p, 0.3, 1, 2du)
    @test vec(ubar) ≈ expected
    @test pbar.w ≈ gradient
    @test tbar ≈ time
end
