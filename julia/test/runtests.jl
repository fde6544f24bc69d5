using Test

# Packages that an installation need not have.
present(names...) = all(name -> !isnothing(Base.find_package(name)), names)

@testset "PySciMLNode" begin
    include("programs.jl")
    present("JLArrays") && include("jlarrays.jl")
    present("JLArrays", "StochasticDiffEq") && include("stochastic.jl")
    present("Lux", "Zygote") && include("lux.jl")
end
