"""
Solves and differentiates the problems of the Python package `pysciml_node`.

Python calls the functions of `entry.jl`; only numbers, strings, pointers and integer handles cross.
"""
module PySciMLNode

using LinearAlgebra
using SciMLBase
using OrdinaryDiffEqCore
using OrdinaryDiffEqTsit5

include("fields.jl")

end
