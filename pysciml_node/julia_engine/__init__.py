"""The Julia engine: SciML's solvers and adjoints in this process, through juliacall.

Importing this package starts nothing; `runtime.start` does.
"""
