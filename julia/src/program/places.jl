# Entries at places of their own: indices, flips, pads, and sums into places; and greatest entries.

"""
    Places(starts, outer, stride, block)

Blocks of `block` entries: the `i`th of the `o`th row begins after `starts[i] + o * stride` entries,
both from 0; a negative start stands for zeros.
"""
struct Places
    starts::Vector{Int}
    outer::Int
    stride::Int
    block::Int
end

"Call `f(to, from)` with the entries before each block, in its own order and at its place."
@inline function each_block(f::F, p::Places) where {F}
    to = 0
    for o in 0:(p.outer - 1), start in p.starts
        start < 0 || f(to, start + o * p.stride)
        to += p.block
    end
end

"`y` from the entries of `x` at the places, 0 where there are none."
function collect!(y::Run, x::Run, p::Places, add::Bool)
    add || fill!(y, 0)
    each_block(p) do to, from
        @inbounds for j in 1:(p.block)
            y[to + j] += x[from + j]
        end
    end
end

"`y[places] += x`: the transpose of `collect!`."
function distribute!(y::Run, x::Run, p::Places, add::Bool)
    add || fill!(y, 0)
    each_block(p) do to, from
        @inbounds for j in 1:(p.block)
            y[from + j] += x[to + j]
        end
    end
end

# Other arrays go by the host's memory: several entries may go to one place.
for name in (:collect!, :distribute!)
    @eval function $name(y, x, p::Places, add::Bool)
        found, given = Array(y), Array(x)
        $name(view(found, 1:length(found)), view(given, 1:length(given)), p, add)
        copyto!(y, found)
        return nothing
    end
end

"`y` has the entries of `x` at some places, or, if `turned`, those of `x` are added there."
struct Relocation <: Operation
    x::Operand
    y::Operand
    places::Places
    turned::Bool
end

function forward!(o::Relocation, m::Memory)
    y, x = values_of(m, o.y), values_of(m, o.x)
    o.turned ? distribute!(y, x, o.places, false) : collect!(y, x, o.places, false)
    return nothing
end

function backward!(o::Relocation, m::Memory, c::Cotangents)
    wanted(c, o.x) || return nothing
    xbar, ybar = values_of(c, o.x), values_of(c, o.y)
    o.turned ? collect!(xbar, ybar, o.places, o.x.add) : distribute!(xbar, ybar, o.places, o.x.add)
    return nothing
end

function relocation(node::Node, turned::Bool)
    a = node.attributes
    places = Places(Vector{Int}(a["places"]), a["outer"], a["stride"], a["block"])
    return Relocation(node.inputs[1], node.output, places, turned)
end

"""
`y` has the entries of `x` (`inner`, `n`, and others) at places along its second axis, from 0 as they are
computed. What lies outside is NaN.
"""
struct Lookup <: Operation
    x::Operand
    index::Operand
    y::Operand
    inner::Int
    n::Int
end

"Call `f(to, from)` with the entries before each block; `from` is negative for a place outside."
@inline function each_lookup(f::F, o::Lookup, index) where {F}
    to = 0
    for start in 0:(o.inner * o.n):(o.x.block.length - 1), place in index
        f(to, 0 <= place < o.n ? start + o.inner * trunc(Int, place) : -1)
        to += o.inner
    end
end

function look_up!(y::Run, x::Run, index::Run, o::Lookup)
    each_lookup(o, index) do to, from
        @inbounds for j in 1:(o.inner)
            y[to + j] = from < 0 ? oftype(y[to + j], NaN) : x[from + j]
        end
    end
end

"The transpose of `look_up!`, added to `xbar`."
function put_back!(xbar::Run, ybar::Run, index::Run, o::Lookup)
    each_lookup(o, index) do to, from
        from < 0 && return nothing
        @inbounds for j in 1:(o.inner)
            xbar[from + j] += ybar[to + j]
        end
    end
end

# Other arrays go by the host's memory, as above.
for name in (:look_up!, :put_back!)
    @eval function $name(out, given, index, o::Lookup)
        found, from, at = Array(out), Array(given), Array(index)
        whole(x) = view(x, 1:length(x))
        $name(whole(found), whole(from), whole(at), o)
        copyto!(out, found)
        return nothing
    end
end

forward!(o::Lookup, m::Memory) =
    look_up!(values_of(m, o.y), values_of(m, o.x), values_of(m, o.index), o)

function backward!(o::Lookup, m::Memory, c::Cotangents)
    wanted(c, o.x) || return nothing
    xbar = values_of(c, o.x)
    o.x.add || fill!(xbar, 0)
    put_back!(xbar, values_of(c, o.y), values_of(m, o.index), o)
    return nothing
end

function lookup(T, layout, node::Node)
    _, n, inner = node.shapes[1]
    return Lookup(node.inputs[1], node.inputs[2], node.output, inner, n)
end

"The greatest entry along some dimensions; no gradient goes through it."
struct Extremum <: Operation
    x::Operand
    y::Operand
    pattern::Pattern
end

forward!(o::Extremum, m::Memory) = greatest!(values_of(m, o.y), values_of(m, o.x), o.pattern)
backward!(::Extremum, ::Memory, ::Cotangents) = nothing

function greatest!(y::Run, x::Run, p::Pattern)
    fill!(y, -Inf)
    each_run(p) do _, xo, yo
        step = p.b[1] == 0 ? 0 : 1
        @inbounds for i in 1:(p.dims[1])
            place = yo + 1 + step * (i - 1)
            y[place] = max(y[place], x[xo + i])
        end
    end
end
greatest!(y, x, p::Pattern) =
    (maximum!(reshape(y, extents(p.dims, p.b)), reshape(x, p.dims)); nothing)

function extremum(T, layout, node::Node)
    shape = node.shapes[1]
    kept = copy(shape)
    for dim in node.attributes["dims"]
        kept[dim + 1] = 1
    end
    return Extremum(node.inputs[1], node.output, broadcast_pattern(shape, shape, kept))
end
