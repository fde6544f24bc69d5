# Entry by entry: functions of one value, and of two with broadcasting.

"`y = f.(x)`"
struct Unary{F<:Scalar} <: Operation
    f::F
    x::Operand
    y::Operand
end

forward!(o::Unary, m::Memory) = apply!(o.f, values_of(m, o.y), values_of(m, o.x))

function backward!(o::Unary, m::Memory, c::Cotangents)
    wanted(c, o.x) || return nothing
    xbar, ybar = values_of(c, o.x), values_of(c, o.y)
    pull_entries!(o.f, xbar, ybar, values_of(m, o.x), values_of(m, o.y), o.x.add)
    return nothing
end

"`y = f.(a, b)`, each operand repeated along the dimensions that it lacks."
struct Binary{F<:Pairwise} <: Operation
    f::F
    a::Operand
    b::Operand
    y::Operand
    pattern::Pattern
end

forward!(o::Binary, m::Memory) =
    apply_pairs!(o.f, values_of(m, o.y), values_of(m, o.a), values_of(m, o.b), o.pattern)

function backward!(o::Binary, m::Memory, c::Cotangents)
    pull_operand!(by_first, o, o.a, o.pattern.a, m, c)
    pull_operand!(by_second, o, o.b, o.pattern.b, m, c)
    return nothing
end

function pull_operand!(slope::S, o::Binary, x::Operand, strides::Four, m, c) where {S}
    wanted(c, x) || return nothing
    xbar, ybar = values_of(c, x), values_of(c, o.y)
    y, a, b = values_of(m, o.y), values_of(m, o.a), values_of(m, o.b)
    if flat(o.pattern)
        pull_flat!(slope, o.f, xbar, ybar, y, a, b, x.add)
    else
        x.add || fill!(xbar, 0)
        pull_repeated!(slope, o.f, xbar, ybar, y, a, b, o.pattern, strides)
    end
    return nothing
end

number(T, node, key) = number(T, node.attributes[key])
number(T, x::Number) = T(x)
number(T, x::AbstractString) = T(parse(Float64, x))  # infinities and NaN are text

const SCALARS = Dict{String,Function}(
    "identity" => (T, node) -> Identity(),
    "tanh" => (T, node) -> Tanh(),
    "sigmoid" => (T, node) -> Sigmoid(),
    "relu" => (T, node) -> ReLU(),
    "exp" => (T, node) -> Exp(),
    "expm1" => (T, node) -> Expm1(),
    "sqrt" => (T, node) -> Sqrt(),
    "rsqrt" => (T, node) -> Rsqrt(),
    "reciprocal" => (T, node) -> Reciprocal(),
    "square" => (T, node) -> Square(),
    "cube" => (T, node) -> Cube(),
    "sin" => (T, node) -> Sin(),
    "cos" => (T, node) -> Cos(),
    "log" => (T, node) -> Log(),
    "log2" => (T, node) -> Log2(),
    "log10" => (T, node) -> Log10(),
    "log1p" => (T, node) -> Log1p(),
    "abs" => (T, node) -> Abs(),
    "erf" => (T, node) -> Erf(),
    "silu" => (T, node) -> SiLU(),
    "gelu" => (T, node) -> GELU(),
    "gelu_tanh" => (T, node) -> TanhGELU(),
    "leaky_relu" => (T, node) -> LeakyReLU(number(T, node, "slope")),
    "elu" => (T, node) -> ELU(
        number(T, node, "alpha"), number(T, node, "scale"), number(T, node, "input_scale")
    ),
    "softplus" => (T, node) -> Softplus(number(T, node, "beta"), number(T, node, "threshold")),
    "clamp" => (T, node) -> Clamp(
        number(T, something(node.attributes["low"], -Inf)),
        number(T, something(node.attributes["high"], Inf)),
    ),
    "affine" => (T, node) -> Affine(number(T, node, "factor"), number(T, node, "shift")),
    "power" => (T, node) -> Power(number(T, node, "exponent")),
    "exponential" => (T, node) -> Exponential(number(T, node, "base")),
    "erfc" => (T, node) -> Erfc(),
    "tan" => (T, node) -> Tan(),
    "asin" => (T, node) -> Asin(),
    "acos" => (T, node) -> Acos(),
    "atan" => (T, node) -> Atan(),
    "sinh" => (T, node) -> Sinh(),
    "cosh" => (T, node) -> Cosh(),
    "asinh" => (T, node) -> Asinh(),
    "acosh" => (T, node) -> Acosh(),
    "atanh" => (T, node) -> Atanh(),
    "stop" => (T, node) -> Stop(),
    "sign" => (T, node) -> Sign(),
    "floor" => (T, node) -> Floor(),
    "round" => (T, node) -> Round(),
    "single" => (T, node) -> Single(),
)

const PAIRWISE = Dict{String,Pairwise}(
    "add" => Add(),
    "sub" => Subtract(),
    "mul" => Multiply(),
    "div" => Divide(),
    "pow" => Raise(),
    "maximum" => Maximum(),
    "minimum" => Minimum(),
    "atan2" => Angle(),
    "remainder" => Remainder(),
    "fmod" => Leftover(),
    "less" => Less(),
    "less_equal" => LessEqual(),
    "equal" => Equal(),
    "where" => Where(),
)

operation(f::Scalar, node::Node) = Unary(f, node.inputs[1], node.output)

function operation(f::Pairwise, node::Node)
    pattern = broadcast_pattern(node.shape, node.shapes[1], node.shapes[2])
    return Binary(f, node.inputs[1], node.inputs[2], node.output, pattern)
end

"""
    broadcast_pattern(shape, a, b)

The pattern of operands of shapes `a` and `b` (by rows, broadcast to `shape`), neighbouring
dimensions along which both behave alike made one.
"""
function broadcast_pattern(shape, a, b)
    rank = length(shape)
    padded(s) = reverse(vcat(ones(Int, rank - length(s)), s))
    sizes, has = Int[], Tuple{Bool,Bool}[]
    for (n, x, y) in zip(reverse(shape), padded(a), padded(b))
        n == 1 && continue
        here = (x == n, y == n)
        if !isempty(has) && has[end] == here
            sizes[end] *= n
        else
            push!(sizes, n)
            push!(has, here)
        end
    end
    isempty(sizes) && (push!(sizes, 1); push!(has, (true, true)))
    length(sizes) > 4 && throw(ArgumentError("shapes $a and $b alternate too often to broadcast"))
    strides(k) = begin
        step, found = 1, zeros(Int, 4)
        for (i, n) in enumerate(sizes)
            has[i][k] && (found[i] = step; step *= n)
        end
        Four(found)
    end
    dims = Four(vcat(sizes, ones(Int, 4 - length(sizes))))
    return Pattern(dims, strides(1), strides(2))
end
