"""
Vector-Jacobian products of fields written in Julia.
"""
module PySciMLNodeZygoteExt

using PySciMLNode
using Zygote

PySciMLNode.pullback_of(f, u, p, t) = Zygote.pullback(f, u, p, t)

end
