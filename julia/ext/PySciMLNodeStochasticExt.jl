"""
Stochastic equations: StochasticDiffEq's steps on a Brownian path that Python owns.

The path is a function of its seed, so that a rejected step looks at it again over a shorter interval,
and a sweep backward finds the same increments.
"""
module PySciMLNodeStochasticExt

using PySciMLNode
using PySciMLNode: RightHandSide, Plan, OBJECTS, CODES, REAL, SILENT, UNSTABLE
using PySciMLNode: combine!, host, keep, linearize!, memory, reserve!, stop_when_interrupted, vjp!
using PySciMLNode.LinearAlgebra
using PySciMLNode.OrdinaryDiffEqCore
using PySciMLNode.PrecompileTools: @compile_workload, @setup_workload
using PySciMLNode.PythonCall
using PySciMLNode.SciMLBase
using StochasticDiffEq
using StochasticDiffEq.DiffEqNoiseProcess

include("stochastic/path.jl")
include("stochastic/aligned.jl")
include("stochastic/blocks.jl")
include("stochastic/walk.jl")
include("stochastic/pullback.jl")
PySciMLNode.check_entries()
include("stochastic/workload.jl")

end
