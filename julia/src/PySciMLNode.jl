"""
Solves and differentiates the problems of the Python package `pysciml_node`.

Python calls the functions of `entry.jl`; only numbers, strings, pointers and integer handles cross.
"""
module PySciMLNode

using DiffEqBase: DiffEqBase, DEVerbosity
using JSON
using LinearAlgebra
using PrecompileTools: PrecompileTools, @compile_workload, @setup_workload
using PythonCall
using SciMLBase
using OrdinaryDiffEqCore
using OrdinaryDiffEqCore: AutoFiniteDiff, CompositeAlgorithm
using OrdinaryDiffEqTsit5

include("fields.jl")
include("program/program.jl")
include("tableau.jl")
include("sweep.jl")
const SILENT = DEVerbosity(DiffEqBase.None())

include("controllers.jl")
include("algorithms.jl")
include("march.jl")
include("buffers.jl")
include("interrupt.jl")
include("info.jl")
include("python_field.jl")
include("source_field.jl")
include("entry.jl")
include("kept.jl")
include("flight.jl")
include("crossing.jl")
include("ensemble.jl")
include("ensemble_sweep.jl")
include("stochastic.jl")
include("sensitivity.jl")
include("mass_adjoint.jl")
include("forward_sweep.jl")
include("boundary.jl")
include("workload.jl")

end
