# Programs: derivatives against differences, no allocation, accuracy of the fast functions.

using LinearAlgebra, Test
using PySciMLNode: PySciMLNode, program, evaluate!, linearize!, vjp!, reserve!, on

include("program_cases.jl")

"Numbers in [-1, 1] that depend on nothing."
numbers(T, n, phase) = T[sin(12.9898 * (i + phase)) for i in 1:n]

derivative_of(f, u, p, t) = (du = similar(u); evaluate!(du, f, u, p, t); du)

@testset "derivatives: $name" for (name, text) in sort(collect(PROGRAMS))
    f = program(text, Float64)
    u, p, t = numbers(Float64, STATES, 0), numbers(Float64, WEIGHTS, 1), 0.3
    v, u1, p1, t1 = numbers(Float64, STATES, 2), numbers(Float64, STATES, 3),
    numbers(Float64, WEIGHTS, 4), 0.7
    du, ubar, pbar = similar(u), similar(u), zero(p)
    reserve!(f, 2)
    linearize!(du, f, u, p, t, 2)
    @test du ≈ derivative_of(f, u, p, t)
    evaluate!(similar(u), f, v, p1, 1.0)  # other evaluations leave the slot as it is
    linearize!(similar(u), f, v, p1, 1.0, 1)
    tbar = vjp!(ubar, pbar, f, u, p, t, 2, v)
    h = 1e-6
    ahead = derivative_of(f, u + h * u1, p + h * p1, t + h * t1)
    behind = derivative_of(f, u - h * u1, p - h * p1, t - h * t1)
    slope = dot(v, ahead - behind) / 2h
    @test slope ≈ dot(ubar, u1) + dot(pbar, p1) + tbar * t1 rtol = 1e-7 atol = 1e-8
    kept = copy(pbar)
    again = similar(u)
    @test vjp!(again, pbar, f, u, p, t, 2, v) ≈ tbar
    @test again ≈ ubar
    @test pbar ≈ 2 * kept  # added
    vjp!(again, nothing, f, u, p, t, 2, v)
    @test again ≈ ubar
end

allocated(f::F, arguments...) where {F} = (f(arguments...); @allocated f(arguments...))

@testset "no allocation in $T: $name" for T in (Float32, Float64), (name, text) in PROGRAMS
    f = program(text, T)
    u, p, v = numbers(T, STATES, 0), numbers(T, WEIGHTS, 1), numbers(T, STATES, 2)
    du, ubar, pbar = similar(u), similar(u), zero(p)
    @test allocated(evaluate!, du, f, u, p, T(0.3)) == 0
    @test allocated(linearize!, du, f, u, p, T(0.3), 1) == 0
    # the returned number itself
    @test allocated(vjp!, ubar, pbar, f, u, p, T(0.3), 1, v) <= 16
end

@testset "types are inferred" begin
    f = program(PROGRAMS["linear by input"], Float32)
    u, p = numbers(Float32, STATES, 0), numbers(Float32, WEIGHTS, 1)
    du, pbar = similar(u), zero(p)
    @inferred evaluate!(du, f, u, p, 0.3f0)
    @inferred linearize!(du, f, u, p, 0.3f0, 1)
    @test (@inferred vjp!(du, pbar, f, u, p, 0.3f0, 1, u)) isa Float32
end

@testset "a copy has memory of its own" begin
    f = program(PROGRAMS["linear by input"], Float64)
    g = copy(f)
    u, p = numbers(Float64, STATES, 0), numbers(Float64, WEIGHTS, 1)
    du = derivative_of(f, u, p, 0.3)
    linearize!(similar(u), f, u, p, 0.3, 1)
    linearize!(similar(u), g, 2u, p, 0.5, 1)
    ubar, other = similar(u), similar(u)
    vjp!(ubar, zero(p), f, u, p, 0.3, 1, du)
    vjp!(other, zero(p), g, 2u, p, 0.5, 1, du)
    @test ubar != other
    @test derivative_of(g, u, p, 0.3) ≈ du
end

@testset "products of few and of many terms in $T" for T in (Float32, Float64)
    using_blas(m, n, k) = m * n * k > PySciMLNode.FEW
    sizes = ((1, 1, 1), (5, 1, 5), (2, 7, 3), (3, 4, 10), (3, 4, 11), (12, 1, 12))
    @test Set(using_blas(size...) for size in sizes) == Set((true, false))
    for (m, n, k) in sizes, ta in ('N', 'T'), tb in ('N', 'T'), add in (false, true)
        # Parts of larger matrices.
        part(rows, columns, phase) =
            PySciMLNode.Mat(numbers(T, (rows + 2) * columns + 1, phase), 2, rows + 2, rows, columns)
        A = part((ta == 'N' ? (m, k) : (k, m))..., 0)
        B, C = part((tb == 'N' ? (k, n) : (n, k))..., 1), part(m, n, 2)
        array(x) = copy(PySciMLNode.dense(x))
        left, right = ta == 'N' ? array(A) : array(A)', tb == 'N' ? array(B) : array(B)'
        expected, before = left * right + add * array(C), copy(C.data)
        PySciMLNode.gemm!(ta, tb, A, B, add, C)
        @test array(C) ≈ expected rtol = 8 * eps(T) atol = 8 * eps(T)
        outside = [!(2 < i && (i - 3) % (m + 2) < m) for i in eachindex(before)]
        @test C.data[outside] == before[outside]
    end
end

"Error in units of the last place."
ulps(found::T, exact) where {T} = abs(big(found) - exact) / eps(max(T(abs(exact)), floatmin(T)))

@testset "fast functions in $T" for T in (Float32, Float64)
    points = T[range(-30, 30; length=4001); range(-1, 1; length=4001); T(10) .^ (-30:2:1)]
    for (fast, exact) in (
        (PySciMLNode.fast_exp, exp),
        (PySciMLNode.fast_tanh, tanh),
        (PySciMLNode.fast_expm1, expm1),
        (PySciMLNode.fast_sigmoid, x -> inv(1 + exp(-x))),
        (PySciMLNode.fast_softplus, x -> log1p(exp(x))),
    )
        @test maximum(x -> ulps(fast(x), exact(big(x))), points) < 3
        @test isnan(fast(T(NaN)))
    end
    @test PySciMLNode.fast_exp(T(-Inf)) == 0
    @test PySciMLNode.fast_exp(T(Inf)) == T(Inf)
    @test PySciMLNode.fast_tanh(T(Inf)) == 1
    @test PySciMLNode.fast_tanh(T(-0.0)) === T(-0.0)
end

@testset "what is wrong is said" begin
    text = PROGRAMS["tanh"]
    @test_throws "version 2" program(replace(text, "\"version\":1" => "\"version\":2"), Float64)
    @test_throws "\"tanj\"" program(replace(text, "tanh" => "tanj"), Float64)
    f = program(text, Float64)
    u, p = zeros(STATES), zeros(WEIGHTS)
    @test_throws "24 entries, but u has 3" evaluate!(zeros(3), f, zeros(3), p, 0.0)
    @test_throws "60 parameter values, but p has 3" evaluate!(u, f, u, zeros(3), 0.0)
end
