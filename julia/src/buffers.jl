# What crosses the boundary: pointers into memory that torch owns, and integer handles.

const OBJECTS = Dict{Int,Any}()
const NEXT = Ref(0)

"""
    keep(object) -> handle

Hold an object until Python frees its handle.
"""
function keep(object)
    NEXT[] += 1
    OBJECTS[NEXT[]] = object
    return NEXT[]
end

"""
    free(handles)

Let go of what the handles stand for.
"""
free(handle::Integer) = (delete!(OBJECTS, handle); nothing)
free(handles) = foreach(handle -> free(Int(handle)), handles)

"""
    held() -> number

How many objects are held for Python.
"""
held() = length(OBJECTS)

const REAL = (Float32, Float64)

"""
    memory(T, device, address, n)

The `n` numbers at an address, as a vector that lives as long as the call. Device 0 is the
processor; extensions add others.
"""
memory(::Type{T}, device::Int, address::Int, n::Int) where {T} = memory(T, Val(device), address, n)

function memory(::Type{T}, ::Val{0}, address::Int, n::Int) where {T}
    n == 0 && return T[]
    return unsafe_wrap(Array, Ptr{T}(address), n)
end

function memory(::Type, ::Val{device}, address, n) where {device}
    throw(ArgumentError("states on this device need the package CUDA: python -m pysciml_node install --cuda"))
end

host(::Type{T}, address::Int, n::Int) where {T} = memory(T, Val(0), address, n)
