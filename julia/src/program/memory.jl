# Where the values of a program live, and the vectors that one evaluation works on.

"The vectors a value can live in: the state, the parameters, a slot's own memory, the result."
@enum Space::UInt8 STATE PARAMETERS WORK RESULT

"""
    Block(space, offset, length)

A value of a program: `length` entries after the first `offset` of a vector. A tensor `(a, b, c)`
stored by rows is the array `(c, b, a)` stored by columns, so shapes need no data moved.
"""
struct Block
    space::Space
    offset::Int
    length::Int
end

"""
    Operand(block, active, add)

An input of an operation. `active`: a gradient flows to it; `add`: in the backward sweep others have
written its cotangent before, so this operation adds to it.
"""
struct Operand
    block::Block
    active::Bool
    add::Bool
end

"What one evaluation reads and writes: a vector for each space, and room for intermediate values."
mutable struct Memory{V}
    state::V
    parameters::V
    work::V
    result::V
    scratch::V
end

"Cotangents, laid out as values are. Without `with_parameters` those of the parameters are left."
mutable struct Cotangents{V}
    state::V
    parameters::V
    work::V
    result::V
    with_parameters::Bool
end

@inline function vector(m::Union{Memory,Cotangents}, space::Space)
    space === WORK && return m.work
    space === PARAMETERS && return m.parameters
    space === STATE && return m.state
    return m.result
end

@inline part(x::AbstractVector, offset::Int, n::Int) = view(x, (offset + 1):(offset + n))
@inline values_of(m, b::Block) = part(vector(m, b.space), b.offset, b.length)
@inline values_of(m, o::Operand) = values_of(m, o.block)
@inline scratch(m::Memory, offset::Int, n::Int) = part(m.scratch, offset, n)

"Whether the backward sweep is to give this operand's cotangent."
@inline wanted(c::Cotangents, o::Operand) =
    o.active && (o.block.space !== PARAMETERS || c.with_parameters)

"A value in a vector's block as a matrix with `ld` entries from column to column."
struct Mat{V<:AbstractVector}
    data::V
    offset::Int
    ld::Int
    rows::Int
    columns::Int
end

@inline Mat(m, o::Operand, rows, columns) = Mat(m, o.block, rows, columns)
@inline Mat(m, b::Block, rows, columns) =
    Mat(vector(m, b.space), b.offset, rows, rows, columns)
