"""
Matrices of the samples of a batch on the diagonal of one: `data[motion, entry, sample]`.
"""
struct Blocks{T,A<:AbstractArray{T,3}} <: AbstractMatrix{T}
    data::A
end

Base.size(b::Blocks) = (size(b.data, 2) * size(b.data, 3), size(b.data, 1) * size(b.data, 3))
Base.copy(b::Blocks) = Blocks(copy(b.data))
Base.zero(b::Blocks) = Blocks(zero(b.data))
Base.similar(b::Blocks, ::Type{T}, dims::Dims{2}) where {T} =
    dims == size(b) ? Blocks(similar(b.data, T)) : similar(b.data, T, dims)

function Base.getindex(b::Blocks{T}, i::Int, j::Int) where {T}
    m, d, _ = size(b.data)
    sample, other = cld(i, d), cld(j, m)
    return sample == other ? b.data[mod1(j, m), mod1(i, d), sample] : zero(T)
end

function Base.setindex!(b::Blocks, value, i::Int, j::Int)
    m, d, _ = size(b.data)
    sample, other = cld(i, d), cld(j, m)
    sample == other && return b.data[mod1(j, m), mod1(i, d), sample] = value
    iszero(value) || throw(ArgumentError("samples of a batch have motions of their own"))
    return value
end

function LinearAlgebra.mul!(y::AbstractVector, b::Blocks, w::AbstractVector, α::Number, β::Number)
    m, d, samples = size(b.data)
    # One sum over the motions for the whole batch: no loop over samples.
    products = b.data .* reshape(w, m, 1, samples)
    sums = reshape(sum(products; dims = 1), d * samples)
    iszero(β) ? (y .= α .* sums) : (y .= α .* sums .+ β .* y)
    return y
end

LinearAlgebra.mul!(y::AbstractVector, b::Blocks, w::AbstractVector) = mul!(y, b, w, true, false)

entries(g::AbstractVector) = g
entries(g::Blocks) = vec(g.data)
