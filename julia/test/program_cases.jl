# Programs of one or two operations each, on a state of 24 entries, for the tests of programs.

using JSON

const STATES = 24
const WEIGHTS = 60

"One operation on the state (1), the weights (2) and the time (0); `out` has the state's entries."
step(op, inputs, shapes, shape; out=9, attributes...) = Dict{String,Any}(
    "op" => op, "in" => inputs, "in_shapes" => shapes, "out" => out, "shape" => shape,
    (String(k) => v for (k, v) in attributes)...,
)

function case(steps...; outputs=[9])
    return JSON.json(Dict(
        "version" => 1,
        "inputs" => Dict("t" => 0, "u" => [Dict("id" => 1, "shape" => [STATES])]),
        "parameters" => [
            Dict("id" => 2, "name" => "w", "shape" => [WEIGHTS], "offset" => 0, "trained" => true),
        ],
        "constants" => [Dict("id" => 3, "value" => 0.5)],
        "ops" => collect(steps),
        "outputs" => outputs,
    ))
end

piece(id, from, n) = step("range", [2], [[WEIGHTS]], [n]; out=id, offset=from)

entrywise(name; attributes...) = case(step(name, [1], [[24]], [24]; attributes...))

linear(by_input, activation) = case(
    piece(4, 0, 36), piece(5, 36, 6), step("range", [1], [[24]], [16]; out=6, offset=4),
    step("linear", [6, 0, 3, 4, 5], [[4, 4], [1], [1], [6, 6], [6]], [4, 6];
        columns=[[1, 4]], scalars=[0, 5], by_input, bias=true, activation,
        in_features=6, out_features=6),
)

const PROGRAMS = Dict{String,String}(
    (name => entrywise(name) for name in [
        "tanh", "sigmoid", "relu", "exp", "expm1", "square", "cube", "sin", "cos", "abs", "erf",
        "silu", "gelu", "gelu_tanh", "reciprocal", "identity", "tan", "atan", "sinh", "cosh",
        "asinh", "erfc",
    ])...,
    (name => case(step("affine", [1], [[24]], [24]; out=8, factor=0.5, shift=0.0),
        step(name, [8], [[24]], [24])) for name in ["asin", "acos", "atanh"])...,
    "acosh" => case(step("square", [1], [[24]], [24]; out=8),
        step("affine", [8], [[24]], [24]; out=7, factor=1.0, shift=1.5),
        step("acosh", [7], [[24]], [24])),
    (name => case(step("mul", [1, 1], [[24], [24]], [24]; out=7),
        step("affine", [7], [[24]], [24]; out=8, factor=1.0, shift=0.3),
        step(name, [1, 8], [[24], [24]], [24])) for name in ["atan2", "remainder", "fmod"])...,
    (name => case(step(name, [1, 3], [[24], [1]], [24]; out=8),
        step("where", [8, 1], [[24], [24]], [24])) for name in ["less", "less_equal"])...,
    (name => case(step(name, [1], [[24]], [24]; out=8), step("mul", [1, 8], [[24], [24]], [24]))
        for name in ["sign", "floor", "round"])...,
    "take" => case(
        step("take", [1], [[24]], [24]; places=[3, -1, 0, 0, 5, 1], outer=4, stride=6, block=1),
    ),
    "put" => case(
        step("put", [1], [[24]], [24]; places=[0, 0, 4], outer=2, stride=12, block=4),
    ),
    "pick" => case(
        step("clamp", [1], [[24]], [24]; out=7, low=0.0, high=3.0),
        step("floor", [7], [[24]], [24]; out=8), step("pick", [1, 8], [[1, 24, 1], [24]], [24]),
    ),
    "softmax" => case(
        step("greatest", [1], [[4, 6]], [4, 1]; out=4, dims=[1]),
        step("sub", [1, 4], [[4, 6], [4, 1]], [4, 6]; out=5), step("exp", [5], [[24]], [24]; out=6),
        step("sum", [6], [[4, 6]], [4, 1]; out=7, dims=[1], factor=1.0),
        step("div", [6, 7], [[4, 6], [4, 1]], [4, 6]),
    ),
    (name => case(step("square", [1], [[24]], [24]; out=8), step("affine", [8], [[24]], [24]; out=7,
        factor=1.0, shift=0.5), step(name, [7], [[24]], [24])) for name in [
        "sqrt", "rsqrt", "log", "log1p",
    ])...,
    "leaky_relu" => entrywise("leaky_relu"; slope=0.2),
    "elu" => entrywise("elu"; alpha=1.2, scale=0.9, input_scale=1.1),
    "softplus" => entrywise("softplus"; beta=2.0, threshold=3.0),
    "clamp" => entrywise("clamp"; low=-0.5, high=nothing),
    "affine" => entrywise("affine"; factor=-2.0, shift=0.3),
    "power" => entrywise("power"; exponent=4.0),
    "exponential" => entrywise("exponential"; base=1.7),
    "linear by input" => linear(true, "tanh"),
    "linear by output" => linear(false, "identity"),
    "linear of the time" => case(
        piece(4, 0, 24),
        step("linear", [0, 4], [[1], [24, 1]], [1, 24]; columns=[], scalars=[0], by_input=true,
            bias=false, activation="sigmoid", in_features=1, out_features=24),
    ),
    "bmm" => case(
        piece(4, 0, 9),
        step("bmm", [1, 4], [[2, 3, 4], [1, 3, 3]], [2, 4, 3]; batch=2, rows=4, inner=3, columns=3,
            transposed_a=true, transposed_b=true, shared_a=false, shared_b=true),
    ),
    "bmm of the state" => case(
        step("bmm", [1, 1], [[2, 3, 4], [2, 3, 4]], [2, 3, 3]; out=8, batch=2, rows=3, inner=4,
            columns=3, transposed_a=false, transposed_b=true, shared_a=false, shared_b=false),
        step("bmm", [8, 1], [[2, 3, 3], [2, 3, 4]], [2, 3, 4]; batch=2, rows=3, inner=3,
            columns=4, transposed_a=false, transposed_b=false, shared_a=false, shared_b=false),
    ),
    "conv" => case(
        piece(4, 0, 36), piece(5, 36, 2),
        step("conv", [1, 4, 5], [[1, 2, 3, 4], [2, 2, 3, 3], [2]], [1, 2, 3, 4];
            stride=[1, 1], padding=[1, 1], dilation=[1, 1]),
    ),
    "conv in groups" => case(
        piece(4, 0, 36), piece(5, 36, 6),
        step("conv", [1, 4, 5], [[1, 2, 3, 4], [6, 1, 2, 3], [6]], [1, 6, 2, 2];
            stride=[2, 1], padding=[1, 1], dilation=[1, 2]),
    ),
    "conv of single pixels" => case(
        piece(4, 0, 4),
        step("conv", [1, 4], [[1, 2, 3, 4], [2, 2, 1, 1]], [1, 2, 3, 4];
            stride=[1, 1], padding=[0, 0], dilation=[1, 1]),
    ),
    "group norm" => case(
        piece(4, 0, 4), piece(5, 4, 4),
        step("norm", [1, 4, 5], [[2, 4, 3], [4], [4]], [2, 4, 3]; weight=true, bias=true,
            groups=2, channels=2, pixels=3, eps=1e-5),
    ),
    "layer norm" => case(
        piece(4, 0, 6),
        step("norm", [1, 4], [[4, 6], [6]], [4, 6]; weight=true, bias=false, groups=1, channels=6,
            pixels=1, eps=1e-5),
    ),
    "sum" => case(
        step("sum", [1], [[2, 3, 4]], [2, 1, 4]; out=8, dims=[1], factor=0.5),
        step("mul", [1, 8], [[2, 3, 4], [2, 1, 4]], [2, 3, 4]),
    ),
    "sum of all" => case(
        step("sum", [1], [[24]], [1]; out=8, dims=[0], factor=1.0),
        step("add", [1, 8], [[24], [1]], [24]),
    ),
    "cat" => case(
        step("view", [1], [[24]], [2, 4, 2]; out=8, size=[2, 4, 2], stride=[12, 3, 1], offset=0),
        step("cat", [8, 0], [[2, 4, 2], [1]], [2, 4, 3]; dim=2, widths=[2, 1]),
    ),
    "view" => case(
        step("view", [1], [[24]], [4, 3, 2]; size=[4, 3, 2], stride=[1, 4, 12], offset=0)
    ),
    "repeated view" => case(
        step("view", [1], [[24]], [4, 6]; size=[4, 6], stride=[0, 2], offset=3)
    ),
    (name => case(
        piece(4, 0, 4),
        step("square", [4], [[4]], [4]; out=6),
        step("affine", [6], [[4]], [4]; out=5, factor=1.0, shift=0.7),
        step("exp", [1], [[24]], [24]; out=8),
        step(name, [8, 5], [[2, 4, 3], [4, 1]], [2, 4, 3]; out=7),
        step("add", [7, 0], [[24], [1]], [24]),
    ) for name in ["add", "sub", "mul", "div", "pow", "maximum", "minimum"])...,
    "a value used twice" => case(step("mul", [1, 1], [[24], [24]], [24])),
    "no time, no weights" => case(step("sin", [1], [[24]], [24])),
    "neither state nor weights" => case(
        step("view", [0], [[1]], [24]; size=[24], stride=[0], offset=0)
    ),
)
