# What is compiled with the extension: the default method, for the types that no network changes.

stochastic_sample(dtype, adaptive) = """
{"dtype": $dtype, "algorithm": "SOSRI()", "packages": ["StochasticDiffEq"], "adaptive": $adaptive,
 "controller": $(adaptive ? SAMPLE_CONTROLLER : "null"), "rtol": 1e-1, "atol": 1e-1, "driven": 4,
 "counted": 4, "dtmin": 0.0, "dtmax": null, "max_steps": 1000}
"""

const SAMPLE_CONTROLLER = """
{"name": "PIController", "options": {"beta1": 0.46, "beta2": 0.26, "gamma": 0.9, "qmin": 0.2,
 "qmax": 1.125, "qmax_first_step": 1.125}}
"""

const SAMPLE_METHOD = """
{"drift": [{"c": 0.0, "a": [], "noise": []}], "diffusion": [{"c": 0.0, "a": [], "noise": []}],
 "alpha": [1.0], "beta": [["w", [1.0]], ["i10", [1.0]]]}
"""

function rehearse_stochastic(dtype, adaptive)
    T = REAL[dtype + 1]
    field = PySciMLNode.make_program(PySciMLNode.SAMPLE, dtype)
    plan = PySciMLNode.make_plan(stochastic_sample(dtype, adaptive), 0, 0, 0)
    method = PySciMLNode.make_sde_method(SAMPLE_METHOD)
    u0, u, p, pbar = T[0.1, 0.2, 0.3, 0.4], zeros(T, 4), fill(T(0.1), 26), zeros(T, 26)
    w, z, marks, report = zeros(T, 4), zeros(T, 4), [0.0, 1.0], zeros(5)
    at(x) = Int(pointer(x))
    GC.@preserve u0 u p pbar w z marks report begin
        walk = PySciMLNode.start_sde!(
            -1, field, field, plan, 0, 1.0, 4, at(u0), 26, at(p), 26, at(p), 2, at(marks), 0.125,
            0.125, 0.0, 4, 0, adaptive ? 1.0 : 0.0, at(w), at(z), Returns(nothing),
        )
        PySciMLNode.step_sde!(-1, walk, 0, 4, at(u), at(report))
        PySciMLNode.step_sde!(-1, walk, 0, 4, at(u), at(report))
        pullback = PySciMLNode.make_sde_pullback(
            field, field, method, dtype, 0, 4, 26, at(p), at(pbar), 26, at(p), at(pbar), at(w), at(z)
        )
        PySciMLNode.pull_sde!(-1, pullback, 0, 4, 0.0, 0.125, at(u0), at(u))
        foreach(PySciMLNode.free, (walk, pullback))
    end
    foreach(PySciMLNode.free, (field, plan, method))
    return nothing
end

@setup_workload begin
    # By itself it would be made in a module that this one may not change.
    PySciMLNode.ALGORITHMS["SOSRI()"] = SOSRI()
    @compile_workload begin
        for dtype in (0, 1), adaptive in (true, false)
            rehearse_stochastic(dtype, adaptive)
        end
    end
    empty!(OBJECTS)
end
