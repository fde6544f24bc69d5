# What is compiled when the package is installed: the entry points as Python calls them, for the
# types that no network changes.

const SAMPLE = """
{"version": 1, "inputs": {"t": 0, "u": [{"id": 1, "shape": [2, 2]}]}, "parameters": [
{"id": 2, "name": "1.weight", "shape": [4, 3], "offset": 0, "trained": true},
{"id": 3, "name": "1.bias", "shape": [4], "offset": 12, "trained": true},
{"id": 4, "name": "2.weight", "shape": [2, 4], "offset": 16, "trained": true},
{"id": 5, "name": "2.bias", "shape": [2], "offset": 24, "trained": true}], "constants": [], "ops": [
{"op": "cube", "in": [1], "in_shapes": [[2, 2]], "out": 6, "shape": [2, 2]},
{"op": "linear", "in": [6, 0, 2, 3], "in_shapes": [[2, 2], [1], [4, 3], [4]], "out": 8,
 "shape": [2, 4], "columns": [[0, 2]], "scalars": [2], "by_input": true, "bias": true,
 "activation": "tanh", "in_features": 3, "out_features": 4},
{"op": "linear", "in": [8, 4, 5], "in_shapes": [[2, 4], [2, 4], [2]], "out": 9, "shape": [2, 2],
 "columns": [[0, 4]], "scalars": [], "by_input": true, "bias": true, "activation": "identity",
 "in_features": 4, "out_features": 2}], "outputs": [9]}
"""

# Tsit5's first rows are enough to compile the sweep.
const SAMPLE_TABLEAU = """
{"c": [0.0, 0.5], "a": [[], [0.5]], "b": [0.0, 1.0], "fsal": false,
 "weights": [[1.0, -1.0], [0.0, 1.0]]}
"""

sample_plan(dtype) = """
{"dtype": $dtype, "algorithm": "Tsit5()", "packages": ["OrdinaryDiffEqTsit5"], "adaptive": true,
 "controller": {"name": "PIController", "options": {"beta1": 0.14, "beta2": 0.08, "gamma": 0.9,
 "qmin": 0.2, "qmax": 10.0}}, "rtol": 1e-3, "atol": 1e-3, "driven": 4, "counted": 4, "dtmin": 0.0,
 "dtmax": null, "max_steps": 1000}
"""

function rehearse(dtype)
    T = REAL[dtype + 1]
    field, plan = make_program(SAMPLE, dtype), make_plan(sample_plan(dtype), 0, 0, 0)
    tableau = make_tableau(SAMPLE_TABLEAU)
    n, u0, p = 4, T[0.1, 0.2, 0.3, 0.4], fill(T(0.1), 26)
    marks, saveat, saved = [0.0, 1.0], [0.5], zeros(T, n, 1)
    log, ends, report = zeros(201), zeros(T, n, 101), zeros(Int, 6)
    u0bar, pbar = zero(u0), zero(p)
    at(x) = Int(pointer(x))
    GC.@preserve u0 p marks saveat saved log ends report u0bar pbar begin
        for (first_step, room) in ((0.0, 100), (0.1, 0))
            record = solve!(
                -1, field, plan, 0, n, at(u0), 26, at(p), 2, at(marks), first_step, 1, at(saveat),
                at(saved), 0, false, nothing, room, at(log), at(ends), at(report),
            )
            record == 0 || fetch!(record, 0, n, at(log), at(ends))
            count = report[1]
            times = log[1:(count + 1)]
            addresses = [at(ends) + i * n * sizeof(T) for i in 0:count]
            sizes, bars = diff(times), zeros(2 * count + 1)
            cotangents = [zeros(Int, count); at(u0)]
            outputs, inside, theta, done = [at(u0)], [1], [0.5], zeros(Int, 2)
            GC.@preserve times addresses sizes bars cotangents outputs inside theta done begin
                pullback!(
                    -1, field, tableau, false, dtype, 0, n, 26, at(p), count, at(times), at(sizes), 2,
                    at(marks), at(addresses), at(cotangents), 1, at(outputs), at(inside),
                    at(theta), at(u0bar), at(pbar), at(bars), at(done),
                )
            end
        end
    end
    rehearse_flight(T, n, u0, p, prepare(field, plan, tableau, n, 2, at(marks), 0.0, 1, at(saveat)))
    foreach(free, (field, plan, tableau))
    return nothing
end

function rehearse_flight(::Type{T}, n, u0, p, prepared) where {T}
    packed, saved, final, ends, bars = zero(p), zero(u0), zero(u0), zeros(T, n, 101), zeros(T, 30)
    log, report, done = zeros(402), zeros(Int, 6), zeros(Int, 2)
    tensors = [Int(pointer(p, first)) for first in (1, 13, 17, 25)]
    at(x) = Int(pointer(x))
    GC.@preserve u0 p packed saved final ends bars log report done tensors begin
        # As Python does it first, and where there is not enough room.
        for (fd, room) in ((BRIEFLY, 100), (-1, 0))
            row = [
                fd, prepared, at(u0), at(tensors), at(packed), at(saved), at(final), room, at(ends),
                at(log), at(report),
            ]
            GC.@preserve row cross_fly!(pointer(row))
            row[1] == 0 || fetch_flight!(prepared, row[1], at(ends), at(log))
        end
        row = [
            BRIEFLY, prepared, report[1], report[2], at(packed), at(ends), at(log), at(u0), at(ends),
            at(u0), at(bars), at(done),
        ]
        GC.@preserve row cross_pull_flight!(pointer(row))
    end
    free(prepared)
    return nothing
end

@setup_workload begin
    @compile_workload begin
        foreach(rehearse, (0, 1))
        free(Int[])
        info()
        foreach(address_of, ("fly!", "pull_flight!", "go_on!"))
    end
    empty!(OBJECTS)
    NEXT[] = 0
end
