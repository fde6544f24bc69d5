# Programs as layers of Lux.

module PySciMLNodeLuxExt

using ChainRulesCore: ChainRulesCore, NoTangent, unthunk
using Lux: Lux
using Lux.LuxCore: AbstractRNG
using PySciMLNode: PySciMLNode, Program, evaluate!, linearize!, reserve!, vjp!

"""
    ProgramLayer(program)

`layer((u, t), ps, st)` is the derivative that the program gives, of the shape of `u`; `ps` holds
the parameters as arrays by name, their dimensions those of torch reversed. Its gradient is the
program's own.
"""
struct ProgramLayer{P<:Program} <: Lux.AbstractLuxLayer
    program::P
    names::Vector{Symbol}
    sizes::Vector{Dims}
end

function PySciMLNode.lux_model(program::Program)
    names = [Symbol(replace(name, '.' => '_', ' ' => '_')) for name in program.names]
    sizes = Dims[Tuple(reverse(shape)) for shape in program.shapes]
    return ProgramLayer(program, names, sizes)
end

# Zeros: the weights are torch's, see `named_parameters`.
Lux.initialparameters(::AbstractRNG, layer::ProgramLayer) =
    PySciMLNode.named_parameters(layer, zeros(eltype(layer), layer.program.sizes[2]))
Lux.initialstates(::AbstractRNG, ::ProgramLayer) = (;)
Lux.parameterlength(layer::ProgramLayer) = layer.program.sizes[2]
Base.eltype(::ProgramLayer{<:Program{T}}) where {T} = T

function PySciMLNode.named_parameters(layer::ProgramLayer, p::AbstractVector)
    start = 0
    arrays = map(layer.sizes) do size
        n = prod(size)
        start += n
        reshape(p[(start - n + 1):start], size)
    end
    return NamedTuple{Tuple(layer.names)}(Tuple(arrays))
end

flat(layer::ProgramLayer, ps) =
    reduce(vcat, (vec(getproperty(ps, name)) for name in layer.names); init=eltype(layer)[])

(layer::ProgramLayer)((u, t), ps, st) = (derivative(layer.program, u, flat(layer, ps), t), st)

"The program's value, out of place; each call has memory of its own, so pullbacks may interleave."
function derivative(program::Program, u, p, t)
    du = similar(u)
    evaluate!(vec(du), copy(program), vec(u), p, t)
    return du
end

function ChainRulesCore.rrule(::typeof(derivative), program::Program, u, p, t)
    own, du = copy(program), similar(u)
    reserve!(own, 1)
    linearize!(vec(du), own, vec(u), p, t, 1)
    function pullback(cotangent)
        v = convert(typeof(vec(u)), vec(collect(unthunk(cotangent))))
        ubar, pbar = similar(u), zero(p)
        tbar = vjp!(vec(ubar), pbar, own, vec(u), p, t, 1, v)
        return NoTangent(), NoTangent(), ubar, pbar, tbar
    end
    return du, pullback
end

end
