# Programs on a GPU. Never run so far: written after the array interface that JLArrays checks.

module PySciMLNodeCUDAExt

using CUDA: CUDA, CuVector
using PySciMLNode: PySciMLNode, Program, on

"""
    on_gpu(program)

The program on vectors of the GPU. Its operations are launched on the stream of the current task;
whoever shares the memory with other libraries orders the streams around the call.
"""
PySciMLNode.on_gpu(program::Program{T}) where {T} = on(CuVector{T,CUDA.DeviceMemory}, program)

# The C library's error function is not there.
CUDA.@device_override PySciMLNode.erf(x::Float64) = CUDA.erf(x)
CUDA.@device_override PySciMLNode.erf(x::Float32) = CUDA.erf(x)

end
