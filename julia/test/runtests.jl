using Test

@testset "PySciMLNode" begin
    include("programs.jl")
    # Packages that an installation need not have.
    isnothing(Base.find_package("JLArrays")) || include("jlarrays.jl")
    all(name -> !isnothing(Base.find_package(name)), ("Lux", "Zygote")) && include("lux.jl")
end
