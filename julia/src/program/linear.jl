# Products of matrices.

"Columns `start + 1 ... start + width` of a weight, and the input that they multiply."
struct Term
    x::Operand
    start::Int
    width::Int
end

"""
    Linear

`y = f.(W [x1; x2; ...; s1; ...] .+ b)` on `columns` samples, for `W` with `outputs` rows. The
inputs `x` are not put together first, and the scalars `s` (the time, say) that stand for a whole row of
equal entries only shift the bias.

The weight is stored with its inputs (`by_input`) or its outputs first.
"""
struct Linear{F<:OutputScalar} <: Operation
    f::F
    terms::Vector{Term}
    scalars::Vector{Term}
    weight::Operand
    bias::Union{Operand,Nothing}
    y::Operand
    inputs::Int
    outputs::Int
    columns::Int
    by_input::Bool
end

"The part of a weight (or its cotangent) that a term multiplies."
@inline function weight_part(m, o::Linear, term::Term)
    w, start = o.weight.block, term.start
    data = vector(m, w.space)
    o.by_input && return Mat(data, w.offset + start, o.inputs, term.width, o.outputs)
    return Mat(data, w.offset + start * o.outputs, o.outputs, o.outputs, term.width)
end

"Every `step`-th entry of a vector from `first` on, `n` of them."
struct Row{V<:AbstractVector}
    data::V
    first::Int
    step::Int
    n::Int
end
entries_of(r::Row) = view(r.data, r.first:(r.step):(r.first + r.step * (r.n - 1)))

"The weights of a scalar input."
@inline function weight_row(m, o::Linear, term::Term)
    w = o.weight.block
    first, step = o.by_input ? (term.start, o.inputs) : (term.start * o.outputs, 1)
    return Row(vector(m, w.space), w.offset + first + 1, step, o.outputs)
end

"`y += row * s` for a one-entry vector `s`."
function add_scaled!(y::Run, row::Row{<:Vector}, s::Run)
    @inbounds factor = s[1]
    @inbounds @simd ivdep for i in 1:row.n
        y[i] += factor * row.data[row.first + row.step * (i - 1)]
    end
end
add_scaled!(y, row::Row, s) = (y .+= entries_of(row) .* s; nothing)

"`row += x * s` for a one-entry vector `s`."
function add_to_row!(row::Row{<:Vector}, x::Run, s::Run)
    @inbounds factor = s[1]
    @inbounds @simd ivdep for i in 1:row.n
        row.data[row.first + row.step * (i - 1)] += factor * x[i]
    end
end
add_to_row!(row::Row, x, s) = (entries_of(row) .+= x .* s; nothing)

"`s += dot(row, x)` for a one-entry vector `s`."
function add_dot!(s::Run, row::Row{<:Vector}, x::Run)
    total = zero(eltype(s))
    @inbounds @simd for i in 1:row.n
        total += x[i] * row.data[row.first + row.step * (i - 1)]
    end
    @inbounds s[1] += total
    return nothing
end
add_dot!(s, row::Row, x) = (s .+= sum(entries_of(row) .* x; dims=1); nothing)

"The bias, shifted by the scalar inputs, in `total`."
function total_bias!(total, o::Linear, m::Memory)
    o.bias === nothing ? fill!(total, 0) : copyto!(total, values_of(m, o.bias))
    for term in o.scalars
        add_scaled!(total, weight_row(m, o, term), values_of(m, term.x))
    end
    return nothing
end

function forward!(o::Linear, m::Memory)
    y = Mat(m, o.y, o.outputs, o.columns)
    for (i, term) in enumerate(o.terms)
        x = Mat(m, term.x, term.width, o.columns)
        gemm!(o.by_input ? 'T' : 'N', 'N', weight_part(m, o, term), x, i > 1, y)
    end
    isempty(o.terms) && fill!(values_of(m, o.y), 0)
    if !isempty(o.scalars)
        total = scratch(m, 0, o.outputs)
        total_bias!(total, o, m)
        finish!(o.f, values_of(m, o.y), total, o.outputs)
    elseif o.bias === nothing
        finish!(o.f, values_of(m, o.y), nothing, o.outputs)
    else
        finish!(o.f, values_of(m, o.y), values_of(m, o.bias), o.outputs)
    end
    return nothing
end

function backward!(o::Linear, m::Memory, c::Cotangents)
    total = scratch(m, 0, o.outputs)
    z = preactivation_cotangent!(total, o, m, c)
    if o.bias !== nothing && wanted(c, o.bias)
        copy_or_add!(values_of(c, o.bias), total, o.bias.add)
    end
    add = o.weight.add
    if wanted(c, o.weight) && !add
        fill!(values_of(c, o.weight), 0)
        add = true
    end
    for term in o.terms
        pull_term!(o, term, z, add, m, c)
    end
    for term in o.scalars
        pull_scalar!(o, term, total, m, c)
    end
    return nothing
end

"The cotangent before the activation; its sum over the samples in `total`."
function preactivation_cotangent!(total, o::Linear, m::Memory, c::Cotangents)
    ybar = values_of(c, o.y)
    if o.f isa Identity
        o.bias === nothing && isempty(o.scalars) || sum_columns!(total, ybar, o.outputs)
        return Mat(c, o.y, o.outputs, o.columns)
    end
    offset = aligned(o.outputs)
    zbar = scratch(m, offset, o.outputs * o.columns)
    unfinish!(o.f, zbar, total, ybar, values_of(m, o.y), o.outputs)
    return Mat(m.scratch, offset, o.outputs, o.outputs, o.columns)
end

function pull_term!(o::Linear, term::Term, z::Mat, add::Bool, m::Memory, c::Cotangents)
    if wanted(c, o.weight)
        x, wbar = Mat(m, term.x, term.width, o.columns), weight_part(c, o, term)
        o.by_input ? gemm!('N', 'T', x, z, add, wbar) : gemm!('N', 'T', z, x, add, wbar)
    end
    if wanted(c, term.x)
        xbar = Mat(c, term.x, term.width, o.columns)
        gemm!(o.by_input ? 'N' : 'T', 'N', weight_part(m, o, term), z, term.x.add, xbar)
    end
    return nothing
end

function pull_scalar!(o::Linear, term::Term, total, m::Memory, c::Cotangents)
    if wanted(c, o.weight)
        add_to_row!(weight_row(c, o, term), total, values_of(m, term.x))
    end
    if wanted(c, term.x)
        term.x.add || fill!(values_of(c, term.x), 0)
        add_dot!(values_of(c, term.x), weight_row(m, o, term), total)
    end
    return nothing
end

function linear(T, layout, node::Node)
    a = node.attributes
    f = SCALARS[a["activation"]](T, node)
    split, scalar = length(a["columns"]), length(a["scalars"])
    terms = [Term(node.inputs[i], s, w) for (i, (s, w)) in enumerate(a["columns"])]
    scalars = [Term(node.inputs[split + i], s, 1) for (i, s) in enumerate(a["scalars"])]
    weight = node.inputs[split + scalar + 1]
    bias = a["bias"] ? node.inputs[split + scalar + 2] : nothing
    inputs, outputs = a["in_features"], a["out_features"]
    columns = node.output.block.length ÷ max(outputs, 1)
    want_scratch!(layout, aligned(outputs) + outputs * columns)
    return Linear(
        f, terms, scalars, weight, bias, node.output, inputs, outputs, columns, a["by_input"]
    )
end

"""
    BatchedProduct

`y[i] = A[i] B[i]` for `batch` pairs of matrices, `(rows, inner)` and `(inner, columns)` by rows; a
step of 0 from matrix to matrix stands for one that all share.
"""
struct BatchedProduct <: Operation
    a::Operand
    b::Operand
    y::Operand
    batch::Int
    rows::Int
    inner::Int
    columns::Int
    transposed_a::Bool
    transposed_b::Bool
    step_a::Int
    step_b::Int
end

@inline function factors(m, o::BatchedProduct, i::Int)
    a, b = o.a.block, o.b.block
    (ra, ca) = o.transposed_a ? (o.rows, o.inner) : (o.inner, o.rows)
    (rb, cb) = o.transposed_b ? (o.inner, o.columns) : (o.columns, o.inner)
    return Mat(vector(m, a.space), a.offset + i * o.step_a, ra, ra, ca),
    Mat(vector(m, b.space), b.offset + i * o.step_b, rb, rb, cb)
end
@inline function product(m, o::BatchedProduct, i::Int)
    y = o.y.block
    start = y.offset + i * o.rows * o.columns
    return Mat(vector(m, y.space), start, o.columns, o.columns, o.rows)
end

function forward!(o::BatchedProduct, m::Memory)
    for i in 0:(o.batch - 1)
        a, b = factors(m, o, i)
        gemm!(o.transposed_b ? 'T' : 'N', o.transposed_a ? 'T' : 'N', b, a, false, product(m, o, i))
    end
end

function backward!(o::BatchedProduct, m::Memory, c::Cotangents)
    for i in 0:(o.batch - 1)
        a, b = factors(m, o, i)
        abar, bbar = factors(c, o, i)
        ybar = product(c, o, i)
        if wanted(c, o.a)
            add = o.a.add || (i > 0 && o.step_a == 0)
            if o.transposed_a
                gemm!('T', o.transposed_b ? 'T' : 'N', ybar, b, add, abar)
            else
                gemm!(o.transposed_b ? 'N' : 'T', 'N', b, ybar, add, abar)
            end
        end
        if wanted(c, o.b)
            add = o.b.add || (i > 0 && o.step_b == 0)
            if o.transposed_b
                gemm!(o.transposed_a ? 'T' : 'N', 'T', a, ybar, add, bbar)
            else
                gemm!('N', o.transposed_a ? 'N' : 'T', ybar, a, add, bbar)
            end
        end
    end
end

function batched_product(T, layout, node::Node)
    a = node.attributes
    batch, rows, inner, columns = a["batch"], a["rows"], a["inner"], a["columns"]
    return BatchedProduct(
        node.inputs[1], node.inputs[2], node.output, batch, rows, inner, columns,
        a["transposed_a"], a["transposed_b"],
        a["shared_a"] ? 0 : rows * inner, a["shared_b"] ? 0 : inner * columns,
    )
end
