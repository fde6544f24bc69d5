# Entries moved, repeated and summed.

const Six = NTuple{6,Int}
filled(x, value) = Six(vcat(x, fill(value, 6 - length(x))))

"""
    Layout

A view: entry `(i1, i2, ...)` (first index fastest) of `dims` is entry `offset + sum(i * stride)` of
what is viewed. Strides of 0 repeat; no other two entries coincide.
"""
struct Layout
    dims::Six
    strides::Six
    offset::Int
end

@inline function source(v::Layout, i::Int)
    place = v.offset
    for k in 1:6
        i, r = divrem(i, v.dims[k])
        place += r * v.strides[k]
    end
    return place
end
@inline pick(x, v::Layout, i::Int) = @inbounds x[source(v, i) + 1]

"The entry of `g` (`v.dims`, 1 where repeated) that views entry `j`, or zero; strides descending."
@inline function deposit(g, dims::Six, strides::Six, places::Six, offset::Int, j::Int)
    rest, place = j - offset, 1
    rest < 0 && return zero(eltype(g))
    for k in 1:6
        strides[k] == 0 && continue
        q, rest = divrem(rest, strides[k])
        q < dims[k] || return zero(eltype(g))
        place += q * places[k]
    end
    return rest == 0 ? (@inbounds g[place]) : zero(eltype(g))
end

function take!(y::Run, x::Run, v::Layout)
    n, step, yo = v.dims[1], v.strides[1], 0
    while yo < length(y)
        xo = 1 + source(v, yo)
        @inbounds if step == 1
            @simd ivdep for i in 0:(n - 1)
                y[yo + i + 1] = x[xo + i]
            end
        else
            for i in 0:(n - 1)
                y[yo + i + 1] = x[xo + step * i]
            end
        end
        yo += n
    end
end
take!(y, x, v::Layout) = (y .= pick.(Ref(x), Ref(v), 0:(length(y) - 1)); nothing)

"`x[view] += y`: the transpose of `take!`."
function put!(x::Run, y::Run, v::Layout)
    n, step, yo = v.dims[1], v.strides[1], 0
    while yo < length(y)
        xo = 1 + source(v, yo)
        @inbounds if step == 1
            @simd ivdep for i in 0:(n - 1)
                x[xo + i] += y[yo + i + 1]
            end
        else
            for i in 0:(n - 1)
                x[xo + step * i] += y[yo + i + 1]
            end
        end
        yo += n
    end
end
function put!(x, y, v::Layout)
    repeats = Tuple(k for k in 1:6 if v.strides[k] == 0)
    g = isempty(repeats) ? y : vec(sum(reshape(y, v.dims); dims=repeats))
    kept = ntuple(k -> v.strides[k] == 0 ? 1 : v.dims[k], 6)
    places = ntuple(k -> prod(kept[1:(k - 1)]), 6)
    order = sortperm(collect(v.strides); rev=true)
    dims, strides, places = Six(kept[order]), Six(v.strides[order]), Six(places[order])
    x .+= deposit.(Ref(g), Ref(dims), Ref(strides), Ref(places), v.offset, 0:(length(x) - 1))
    return nothing
end

"`y` is a view of `x`, made contiguous."
struct Gather <: Operation
    x::Operand
    y::Operand
    layout::Layout
end

forward!(o::Gather, m::Memory) = take!(values_of(m, o.y), values_of(m, o.x), o.layout)

function backward!(o::Gather, m::Memory, c::Cotangents)
    wanted(c, o.x) || return nothing
    xbar = values_of(c, o.x)
    o.x.add || fill!(xbar, 0)
    put!(xbar, values_of(c, o.y), o.layout)
    return nothing
end

function gather(T, layout, node::Node)
    dims, strides = Int[], Int[]
    for (n, s) in zip(reverse(node.attributes["size"]), reverse(node.attributes["stride"]))
        n == 1 && continue
        if !isempty(dims) && s == strides[end] * dims[end]
            dims[end] *= n
        else
            push!(dims, n)
            push!(strides, s)
        end
    end
    length(dims) > 6 && throw(ArgumentError("a view of more than six dimensions: $dims"))
    view_layout = Layout(filled(dims, 1), filled(strides, 0), node.attributes["offset"])
    return Gather(node.inputs[1], node.output, view_layout)
end

"A piece of a concatenation, `width` entries a column; a single entry fills its piece."
struct Piece
    x::Operand
    width::Int
    fills::Bool
end

"Pieces side by side in each of `columns`."
struct Concatenation <: Operation
    pieces::Vector{Piece}
    y::Operand
    columns::Int
end

@inline function piece_of(y, o::Concatenation, start::Int, width::Int)
    height = o.y.block.length ÷ o.columns
    return view(reshape(y, height, o.columns), (start + 1):(start + width), :)
end

function forward!(o::Concatenation, m::Memory)
    y, start = values_of(m, o.y), 0
    for piece in o.pieces
        put_piece!(y, values_of(m, piece.x), o, start, piece)
        start += piece.width
    end
end

function put_piece!(y::Run, x::Run, o::Concatenation, start::Int, piece::Piece)
    n, height, step = piece.width, length(y) ÷ o.columns, piece.fills ? 0 : piece.width
    for j in 0:(o.columns - 1)
        yo, xo = start + j * height, j * step
        @inbounds if piece.fills
            value = x[1]
            @simd ivdep for i in 1:n
                y[yo + i] = value
            end
        else
            @simd ivdep for i in 1:n
                y[yo + i] = x[xo + i]
            end
        end
    end
end
function put_piece!(y, x, o::Concatenation, start::Int, piece::Piece)
    piece_of(y, o, start, piece.width) .=
        piece.fills ? reshape(x, 1, 1) : reshape(x, piece.width, o.columns)
    return nothing
end

function backward!(o::Concatenation, m::Memory, c::Cotangents)
    ybar, start = values_of(c, o.y), 0
    for piece in o.pieces
        if wanted(c, piece.x)
            xbar = values_of(c, piece.x)
            piece.x.add || fill!(xbar, 0)
            pull_piece!(xbar, ybar, o, start, piece)
        end
        start += piece.width
    end
end

function pull_piece!(xbar::Run, ybar::Run, o::Concatenation, start::Int, piece::Piece)
    n, height, step = piece.width, length(ybar) ÷ o.columns, piece.width
    for j in 0:(o.columns - 1)
        yo, xo = start + j * height, j * step
        @inbounds if piece.fills
            total = zero(eltype(xbar))
            @simd for i in 1:n
                total += ybar[yo + i]
            end
            xbar[1] += total
        else
            @simd ivdep for i in 1:n
                xbar[xo + i] += ybar[yo + i]
            end
        end
    end
end
function pull_piece!(xbar, ybar, o::Concatenation, start::Int, piece::Piece)
    g = piece_of(ybar, o, start, piece.width)
    xbar .+= piece.fills ? vec(sum(g; dims=(1, 2))) : vec(copy(g))
    return nothing
end

function concatenation(T, layout, node::Node)
    dim = node.attributes["dim"] + 1
    inner = prod(node.shape[(dim + 1):end]; init=1)
    columns = prod(node.shape[1:(dim - 1)]; init=1)
    pieces = map(node.inputs, node.shapes, node.attributes["widths"]) do x, shape, width
        fills = prod(shape; init=1) == 1 && width * inner * columns > 1
        Piece(x, width * inner, fills)
    end
    return Concatenation(pieces, node.output, columns)
end

"`factor * sum(x)` over some dimensions."
struct Reduction{T} <: Operation
    x::Operand
    y::Operand
    pattern::Pattern
    factor::T
end

forward!(o::Reduction, m::Memory) =
    reduce!(values_of(m, o.y), values_of(m, o.x), o.pattern, o.factor)

function backward!(o::Reduction, m::Memory, c::Cotangents)
    wanted(c, o.x) || return nothing
    spread!(values_of(c, o.x), values_of(c, o.y), o.pattern, o.factor, o.x.add)
    return nothing
end

function reduction(T, layout, node::Node)
    shape = node.shapes[1]
    kept = copy(shape)
    for dim in node.attributes["dims"]
        kept[dim + 1] = 1
    end
    pattern = broadcast_pattern(shape, shape, kept)
    return Reduction(node.inputs[1], node.output, pattern, number(T, node, "factor"))
end
