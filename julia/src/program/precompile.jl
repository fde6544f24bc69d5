# The operations of programs, compiled when the package is: no network compiles anything of its own.

function precompile_programs(::Type{T}) where {T}
    V = Vector{T}
    m, c = Memory{V}, Cotangents{V}
    outputs = (Identity, Tanh, Sigmoid, ReLU)
    scalars = (
        outputs..., Exp, Expm1, Sqrt, Rsqrt, Reciprocal, Square, Cube, Sin, Cos, Log, Log2, Log10,
        Log1p, Abs, Erf, SiLU, GELU, TanhGELU, LeakyReLU{T}, ELU{T}, Softplus{T}, Clamp{T},
        Affine{T}, Power{T}, Exponential{T}, Erfc, Tan, Asin, Acos, Atan, Sinh, Cosh, Asinh, Acosh,
        Atanh, Stop, Sign, Floor, Round, Single,
    )
    pairs = (
        Add, Subtract, Multiply, Divide, Raise, Maximum, Minimum, Angle, Remainder, Leftover, Less,
        LessEqual, Equal, Where,
    )
    kinds = (
        (Unary{F} for F in scalars)..., (Binary{F} for F in pairs)...,
        (Linear{F} for F in outputs)..., BatchedProduct, Convolution, Normalization{T}, Gather, Concatenation, Reduction{T},
        Relocation, Extremum,
    )
    for kind in kinds
        precompile(forward!, (kind, m))
        precompile(backward!, (kind, m, c))
    end
    F = Program{T,V}
    precompile(program, (String, Type{T}))
    precompile(evaluate!, (V, F, V, V, T))
    precompile(linearize!, (V, F, V, V, T, Int))
    precompile(vjp!, (V, V, F, V, V, T, Int, V))
    precompile(reserve!, (F, Int))
    return nothing
end

if PrecompileTools.workload_enabled(@__MODULE__)
    precompile_programs(Float64)
    precompile_programs(Float32)
end
