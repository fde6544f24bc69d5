# From the JSON to operations: where every value lives, and which cotangents are written first.

"The values of a program while it is built."
mutable struct Graph{T}
    steps::Vector{Any}
    blocks::Dict{Int,Block}
    active::Set{Int}               # depends on the state, the time or a trained parameter
    base::Dict{Int,Int}            # parts of values share their memory
    outputs::Vector{Int}
    time::Int
    extent::Extent
    states::Int
    parameters::Int
    constants::Vector{Tuple{Block,T}}
    zeroed::Vector{Block}
    names::Vector{String}
    shapes::Vector{Vector{Int}}
end

entries(shape) = prod(shape; init=1)

"Operations through which no gradient goes."
const FLAT = Set(
    ["stop", "sign", "floor", "round", "less", "less_equal", "equal", "greatest"]
)

function Graph{T}(text) where {T}
    g = Graph{T}(
        text["ops"], Dict(), Set(), Dict(), text["outputs"], text["inputs"]["t"], Extent(0, 0),
        0, 0, [], [], [], [],
    )
    g.blocks[g.time] = allocate!(g.extent, 1)
    push!(g.active, g.time)
    for part in text["inputs"]["u"]
        g.blocks[part["id"]] = Block(STATE, g.states, entries(part["shape"]))
        push!(g.active, part["id"])
        g.states += entries(part["shape"])
    end
    for parameter in text["parameters"]
        block = Block(PARAMETERS, parameter["offset"], entries(parameter["shape"]))
        g.blocks[parameter["id"]] = block
        parameter["trained"] && push!(g.active, parameter["id"])
        g.parameters = max(g.parameters, block.offset + block.length)
        push!(g.names, parameter["name"])
        push!(g.shapes, parameter["shape"])
    end
    for constant in text["constants"]
        block = allocate!(g.extent, 1)
        g.blocks[constant["id"]] = block
        push!(g.constants, (block, number(T, constant["value"])))
    end
    place_steps!(g)
    return g
end

function place_steps!(g::Graph)
    results = Dict{Int,Int}()
    place = 0
    for step in g.steps
        step["out"] in g.outputs || continue
        results[step["out"]] = entries(step["shape"])
    end
    for id in g.outputs
        haskey(results, id) ||
            throw(ArgumentError("output $id of the program is not the result of an operation"))
        g.blocks[id] = Block(RESULT, place, results[id])
        place += results[id]
    end
    place == g.states || throw(
        ArgumentError("the program's results have $place entries, but its state has $(g.states)")
    )
    for step in g.steps
        id, inputs = step["out"], step["in"]
        for input in inputs
            g.blocks[input].space === RESULT &&
                throw(ArgumentError("output $input of the program is also an operand"))
        end
        step["op"] in FLAT || !any(in(g.active), inputs) || push!(g.active, id)
        haskey(g.blocks, id) && continue
        if step["op"] == "range"
            whole = g.blocks[inputs[1]]
            start = whole.offset + step["offset"]
            g.blocks[id] = Block(whole.space, start, entries(step["shape"]))
            g.base[id] = get(g.base, inputs[1], inputs[1])
        else
            g.blocks[id] = allocate!(g.extent, entries(step["shape"]))
        end
    end
    return nothing
end

"""
Which operands find their cotangent already written by a later operation. Values of which parts are
used on their own are cleared first, and so are those that no operation writes.
"""
function written_before!(g::Graph)
    written = Set{Int}(values(g.base))
    clear!(id) = (push!(written, id); push!(g.zeroed, g.blocks[id]); nothing)
    foreach(id -> push!(g.zeroed, g.blocks[id]), filter(cleared_by_us(g), collect(written)))
    added = Vector{Vector{Bool}}(undef, length(g.steps))
    for (i, step) in Iterators.reverse(enumerate(g.steps))
        out = step["out"]
        if step["op"] != "range" && out in g.active && !(out in written) && !(out in g.outputs)
            clear!(out)
        end
        added[i] = map(step["in"]) do input
            root = get(g.base, input, input)
            before = root in written || g.blocks[root].space === PARAMETERS
            out in g.active && step["op"] != "range" && push!(written, root)
            return before
        end
    end
    for (id, block) in g.blocks
        source = block.space === STATE || id == g.time
        source && !haskey(g.base, id) && !(id in written) && clear!(id)
    end
    return added
end

# The parameters' cotangents are the caller's.
cleared_by_us(g::Graph) = id -> id in g.active && g.blocks[id].space !== PARAMETERS

function build_operations(g::Graph{T}) where {T}
    added = written_before!(g)
    operations = Operation[]
    for (step, add) in zip(g.steps, added)
        name = step["op"]
        name == "range" && continue
        pulls = step["out"] in g.active
        inputs = [
            Operand(g.blocks[id], pulls && id in g.active, before) for
            (id, before) in zip(step["in"], add)
        ]
        output = Operand(g.blocks[step["out"]], step["out"] in g.active, false)
        shapes = Vector{Int}[Vector{Int}(s) for s in step["in_shapes"]]
        node = Node(inputs, shapes, output, Vector{Int}(step["shape"]), step)
        push!(operations, build_operation(name, T, g.extent, node))
    end
    return operations
end

function build_operation(name, ::Type{T}, extent::Extent, node::Node) where {T}
    haskey(SCALARS, name) && return operation(SCALARS[name](T, node), node)
    haskey(PAIRWISE, name) && return operation(PAIRWISE[name], node)
    haskey(BUILDERS, name) && return BUILDERS[name](T, extent, node)
    throw(ArgumentError("operation \"$name\" of the program is not known to this package"))
end
