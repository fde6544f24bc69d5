# Programs on a GPU. Never run so far: written after the array interface that JLArrays checks.

module PySciMLNodeCUDAExt

using CUDA: CUDA, CuArray
using PySciMLNode: PySciMLNode, Program, on

# Operations are launched on the stream of the current task; whoever shares memory with another
# library orders the streams around the call.
PySciMLNode.on_gpu(program::Program{T}) where {T} = on(CuArray{T,1,CUDA.DeviceMemory}, program)

# The C library's error function is not on the device.
CUDA.@device_override PySciMLNode.erf(x::Float64) =
    ccall("extern __nv_erf", llvmcall, Cdouble, (Cdouble,), x)
CUDA.@device_override PySciMLNode.erf(x::Float32) =
    ccall("extern __nv_erff", llvmcall, Cfloat, (Cfloat,), x)

end
