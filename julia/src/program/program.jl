# Programs: exported networks as data. Nothing here depends on the network's type, so a program
# needs no compilation of its own.

"One step of a program: `forward!(op, memory)` and `backward!(op, memory, cotangents)`."
abstract type Operation end

include("memory.jl")

"An operation as it stands in the JSON; shapes are torch's, by rows."
struct Node
    inputs::Vector{Operand}
    shapes::Vector{Vector{Int}}
    output::Operand
    shape::Vector{Int}
    attributes::AbstractDict
end

"How long a slot's memory and the scratch vector have to be."
mutable struct Extent
    work::Int
    scratch::Int
end

# Blocks start at multiples of 64 bytes (of Float32), for aligned loads.
aligned(n::Int) = cld(n, 16) * 16
function allocate!(extent::Extent, n::Int)
    block = Block(WORK, extent.work, n)
    extent.work += aligned(n)
    return block
end
want_scratch!(extent::Extent, n::Int) = (extent.scratch = max(extent.scratch, n); nothing)

include("functions.jl")
include("kernels.jl")
include("elementwise.jl")
include("linear.jl")
include("movement.jl")
include("places.jl")
include("conv.jl")
include("norm.jl")
include("graph.jl")

const BUILDERS = Dict{String,Function}(
    "linear" => linear,
    "bmm" => batched_product,
    "conv" => convolution,
    "norm" => normalization,
    "sum" => reduction,
    "cat" => concatenation,
    "view" => gather,
    "greatest" => extremum,
    "pick" => lookup,
    "take" => (T, layout, node) -> relocation(node, false),
    "put" => (T, layout, node) -> relocation(node, true),
)

const PROGRAM_VERSION = 1

"What a slot keeps of one evaluation."
struct Slot{V}
    work::V
    result::V
end

"""
    Program{T,V}

A field made of operations on blocks of a few vectors of type `V`. Evaluations work in place and do
not allocate on `Vector`s; derivatives are written by hand, operation by operation.

`linearize!` keeps every intermediate value in its slot; `vjp!` reads `u` and `p` again, so they
must be those of `linearize!`. A program serves one task at a time: `copy` it for another.
"""
struct Program{T,V<:AbstractVector{T}} <: AbstractField
    operations::Vector{Operation}
    constants::Vector{Tuple{Block,T}}
    zeroed::Vector{Block}          # cotangents to clear before a backward sweep
    time::Block
    time_used::Bool
    sizes::NTuple{4,Int}           # of the state, the parameters, a slot's memory, scratch
    names::Vector{String}          # of the parameters
    shapes::Vector{Vector{Int}}
    memory::Memory{V}
    cotangents::Cotangents{V}
    slots::Vector{Slot{V}}         # the first serves `evaluate!`
end

Base.show(io::IO, f::Program{T}) where {T} = print(
    io, "Program{$T}(", f.sizes[1], " states, ", f.sizes[2], " parameters, ",
    length(f.operations), " operations)",
)

"""
    program(json, T, V = Vector{T})

The field that a JSON program (see docs/julia_fields.md) stands for, in numbers of type `T` and
vectors of type `V`.
"""
function program(json::AbstractString, ::Type{T}, ::Type{V}=Vector{T}) where {T,V}
    text = JSON.parse(json)
    version = get(text, "version", nothing)
    version == PROGRAM_VERSION || throw(
        ArgumentError(
            "a program of version $version was given; this package reads $PROGRAM_VERSION"
        ),
    )
    graph = Graph{T}(text)
    operations = build_operations(graph)
    sizes = (graph.states, graph.parameters, graph.extent.work, graph.extent.scratch)
    return Program{T,V}(
        operations, graph.constants, graph.zeroed, graph.blocks[graph.time],
        graph.time in graph.active, sizes, graph.names, graph.shapes, buffers(T, V, sizes)...,
    )
end

function buffers(::Type{T}, ::Type{V}, sizes) where {T,V}
    make(n) = fill!(similar(V, n), zero(T))
    states, parameters, work, room = sizes
    empty = make(0)
    return Memory{V}(empty, empty, empty, empty, make(room)),
    Cotangents{V}(empty, empty, make(work), empty, true),
    Slot{V}[]
end

function Base.copy(f::Program{T,V}) where {T,V}
    return Program{T,V}(
        f.operations, f.constants, f.zeroed, f.time, f.time_used, f.sizes, f.names, f.shapes,
        buffers(T, V, f.sizes)...,
    )
end

"The same program on vectors of another type (of the GPU, or of dual numbers)."
function on(::Type{V}, f::Program) where {T,V<:AbstractVector{T}}
    constants = Tuple{Block,T}[(block, T(value)) for (block, value) in f.constants]
    return Program{T,V}(
        f.operations, constants, f.zeroed, f.time, f.time_used, f.sizes, f.names, f.shapes,
        buffers(T, V, f.sizes)...,
    )
end

function slot!(f::Program{T,V}, index::Int) where {T,V}
    while length(f.slots) < index
        work = fill!(similar(V, f.sizes[3]), zero(T))
        for (block, value) in f.constants
            fill!(part(work, block.offset, block.length), value)
        end
        push!(f.slots, Slot{V}(work, similar(V, f.sizes[1])))
    end
    return @inbounds f.slots[index]
end

reserve!(f::Program, slots::Int) = (slot!(f, slots + 1); nothing)

function prepare!(f::Program{T,V}, slot::Slot{V}, result::V, u::V, p::V, t) where {T,V}
    length(u) == f.sizes[1] || throw(
        DimensionMismatch("the program's state has $(f.sizes[1]) entries, but u has $(length(u))")
    )
    length(p) == f.sizes[2] || throw(
        DimensionMismatch(
            "the program has $(f.sizes[2]) parameter values, but p has $(length(p))"
        ),
    )
    m = f.memory
    m.state, m.parameters, m.work, m.result = u, p, slot.work, result
    set_first!(slot.work, f.time.offset, T(t))
    return m
end
set_first!(x::Vector, offset::Int, value) = (x[offset + 1] = value; nothing)
set_first!(x, offset::Int, value) = (fill!(part(x, offset, 1), value); nothing)
get_first(x::Vector, offset::Int) = x[offset + 1]
get_first(x, offset::Int) = sum(part(x, offset, 1))

"""
Operations of which most small fields are made. To find a method while the program runs takes as long as
a small operation does, so these are told apart by their types alone.
"""
const FREQUENT = (
    Linear{Identity}, Linear{Tanh}, Binary{Add}, Binary{Multiply}, Binary{Subtract}, Unary{Cube},
    Unary{Tanh},
)

@eval @inline function run_forward!(op::Operation, m::Memory)
    $((:(op isa $kind && return forward!(op, m)) for kind in FREQUENT)...)
    return forward!(op, m)
end

@eval @inline function run_backward!(op::Operation, m::Memory, c::Cotangents)
    $((:(op isa $kind && return backward!(op, m, c)) for kind in FREQUENT)...)
    return backward!(op, m, c)
end

function run!(operations::Vector{Operation}, m::Memory)
    for op in operations
        run_forward!(op, m)
    end
    return nothing
end

function evaluate!(du::V, f::Program{T,V}, u::V, p::V, t) where {T,V}
    run!(f.operations, prepare!(f, slot!(f, 1), du, u, p, t))
    return nothing
end

function linearize!(du, f::Program{T,V}, u::V, p::V, t, slot::Int) where {T,V}
    kept = slot!(f, slot + 1)
    run!(f.operations, prepare!(f, kept, kept.result, u, p, t))
    copyto!(du, kept.result)
    return nothing
end

"`pbar` may be `nothing`: the parameters' cotangent is then not computed."
function vjp!(
    ubar::V, pbar::Union{V,Nothing}, f::Program{T,V}, u::V, p::V, t, slot::Int, v::V
) where {T,V}
    kept = slot!(f, slot + 1)
    m, c = prepare!(f, kept, kept.result, u, p, t), f.cotangents
    c.state, c.result, c.with_parameters = ubar, v, pbar !== nothing
    c.parameters = pbar === nothing ? p : pbar
    for block in f.zeroed
        fill!(values_of(c, block), zero(T))
    end
    for i in length(f.operations):-1:1
        run_backward!((@inbounds f.operations[i]), m, c)
    end
    return f.time_used ? get_first(c.work, f.time.offset) : zero(T)
end

"""
    lux_model(program)

A program as a layer of Lux; needs `using Lux`. See the extension's `ProgramLayer`.
"""
function lux_model end

"""
    named_parameters(layer, p)

A flat parameter vector (torch's, say) as the parameters of `lux_model`'s layer.
"""
function named_parameters end

"""
    on_gpu(program)

The program on vectors of the GPU; needs `using CUDA`.
"""
function on_gpu end

include("precompile.jl")
