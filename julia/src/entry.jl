# The functions that Python calls. Only numbers, strings, pointers, handles and functions cross.

const CODES = Dict(
    ReturnCode.Success => 0,
    ReturnCode.Terminated => 1,
    ReturnCode.MaxIters => 2,
    ReturnCode.DtLessThanMin => 3,
    ReturnCode.ConvergenceFailure => 5,
)
const UNSTABLE = 4

"""
    make_tableau(json) -> handle
"""
make_tableau(json::String) = keep(Tableau(JSON.parse(json)))

"""
    make_plan(json, rtol, atol, n) -> handle

How to solve. `rtol` and `atol` are addresses of `n` numbers each where `n > 0`, and otherwise the
description holds one number for each.
"""
function make_plan(json::String, rtol::Int, atol::Int, n::Int)
    d = JSON.parse(json)
    T = REAL[d["dtype"] + 1]
    chosen = algorithm(String(d["algorithm"]), d["packages"])
    tolerance(address, number) = n > 0 ? copy(host(T, address, n)) : T(number)
    c = d["controller"]
    control = c === nothing ? nothing : controller(c["name"], c["options"], T, chosen)
    norm = DrivenNorm(d["driven"], d["counted"])
    return keep(
        Plan(
            chosen, Bool(d["adaptive"]), tolerance(atol, d["atol"]), tolerance(rtol, d["rtol"]),
            norm, control, T(d["dtmin"]), T(something(d["dtmax"], Inf)), Int(d["max_steps"]),
        ),
    )
end

"""
    make_python_field(dtype, evaluate, linearize, pull, n, state, m, slope, np, gradient) -> handle
"""
function make_python_field(
    dtype::Int, evaluate, linearize, pull, n::Int, state::Int, m::Int, slope::Int, np::Int,
    gradient::Int,
)
    T = REAL[dtype + 1]
    return keep(
        RightHandSide(
            PythonField{T}(
                evaluate, Py(linearize), Py(pull), host(T, state, n), host(T, slope, m),
                host(T, gradient, np),
            ),
        ),
    )
end

"""
    make_program(json, dtype) -> handle
"""
make_program(json::String, dtype::Int) = keep(RightHandSide(program(json, REAL[dtype + 1])))

"""
    make_source(text, dtype, dims, shape) -> handle

A field written in Julia; `shape` is the address of the `dims` sizes of the state, as Julia sees it.
"""
make_source(text::String, dtype::Int, dims::Int, shape::Int) =
    keep(RightHandSide(SourceField{REAL[dtype + 1]}(text, host(Int, shape, dims))))

"""
    evaluate_once!(field, dtype, device, n, u, np, p, t, du)

One evaluation of a field.
"""
function evaluate_once!(
    field::Int, dtype::Int, device::Int, n::Int, u::Int, np::Int, p::Int, t::Float64, du::Int
)
    T, rhs = REAL[dtype + 1], OBJECTS[field]::RightHandSide
    vector(address, length) = memory(T, device, address, length)
    evaluate!(vector(du, n), rhs.field, vector(u, n), vector(p, np), T(t))
    return nothing
end

"""
    pull_once!(field, dtype, device, n, u, np, p, t, v, ubar, pbar) -> tbar

One vector-Jacobian product of a field; `pbar` is added to.
"""
function pull_once!(
    field::Int, dtype::Int, device::Int, n::Int, u::Int, np::Int, p::Int, t::Float64, v::Int,
    ubar::Int, pbar::Int,
)
    T, f = REAL[dtype + 1], (OBJECTS[field]::RightHandSide).field
    vector(address, length) = memory(T, device, address, length)
    state, parameters, time = vector(u, n), vector(p, np), T(t)
    reserve!(f, 1)
    linearize!(vector(ubar, n), f, state, parameters, time, 1)
    return Float64(
        vjp!(vector(ubar, n), vector(pbar, np), f, state, parameters, time, 1, vector(v, n))
    )
end

"""
    solve!(fd, field, plan, device, n, u0, np, p, nmarks, marks, dt0, m, saveat, saved, mass, dense,
           observer, room, log, states, report) -> handle of the record, or 0

Solve forward. Addresses: `u0` `(n)`, `p` `(np)`, `saved` `(n, m)` of the plan's type, `mass` `(n, n)`
or 0; `marks` and `saveat` in double precision; `report` takes six integers: accepted steps,
saved states, evaluations, rejected steps, return code, whether the last state is finite. Throws when
`fd` tells of an interrupt.

Up to `room` steps are written at once, as [`fetch!`](@ref) writes them. A record stays where there
were more, and where SciML's solutions were kept with it.
"""
function solve!(
    fd::Int, field::Int, plan::Int, device::Int, n::Int, u0::Int, np::Int, p::Int, nmarks::Int,
    marks::Int, dt0::Float64, m::Int, saveat::Int, saved::Int, mass::Int, dense::Bool, observer,
    room::Int, log::Int, states::Int, report::Int,
)
    described = OBJECTS[plan]
    told = host(Int, report, 6)
    record = exclusively(OBJECTS[field]::RightHandSide) do rhs
        run_solve!(
            rhs, described, device, n, u0, memory(number(described), device, p, np),
            host(Float64, marks, nmarks), dt0, m, host(Float64, saveat, m), saved, mass, dense, fd,
            observer, view(told, 1:5),
        )
    end
    told[6] = all(isfinite, record.states[end])
    fits = length(record.errors) <= room
    fits && write_steps!(record, device, n, log, states)
    return fits && isempty(record.pieces) ? 0 : keep(record)
end

function run_solve!(
    rhs, plan::Plan{T}, device, n, u0, parameters, marks, dt0, m, saveat, saved, mass, dense, fd,
    observer, report,
) where {T}
    rhs.evaluations = 0
    start = memory(T, device, u0, n)
    columns = reshape(memory(T, device, saved, n * m), n, m)
    mass_matrix = mass == 0 ? I : copy(transpose(reshape(memory(T, device, mass, n * n), n, n)))
    watch = observer === nothing ? Returns(false) : integrator -> observed(observer, integrator)
    # SciML's solutions outlive the call.
    dense && (parameters = copy(parameters))
    record = march(
        rhs, plan, start, parameters, marks, dt0, saveat, columns;
        poll = () -> stop_when_interrupted(fd), watch, dense, mass_matrix,
    )
    steps = length(record.errors)
    code = get(CODES, record.retcode, UNSTABLE)
    # `stats.nf` counts what OrdinaryDiffEq knows of; the field counts all.
    report .= (steps, record.saved, rhs.evaluations, record.rejected, code)
    return record
end

"""
The integrators of the steps that observers are looking at: one may itself solve something.
"""
const LOOKED_AT = Any[]

function observed(observer, integrator)
    push!(LOOKED_AT, integrator)
    try
        return pyconvert(Bool, observer(Float64(integrator.tprev), Float64(integrator.t)))
    finally
        pop!(LOOKED_AT)
    end
end

"""
    look!(t, address, n)

Dense output at a time inside the step that an observer is looking at.
"""
function look!(t::Float64, address::Int, n::Int)
    integrator = LOOKED_AT[end]
    out = memory(eltype(integrator.u), 0, address, n)
    T = typeof(integrator.t)
    t == Float64(integrator.t) ? copyto!(out, integrator.u) : integrator(out, T(t))
    return nothing
end

"""
    fetch!(record, device, n, log, states)

Write what a solve of `s` steps left: their `s + 1` ends and `s` errors to `log`, in double precision,
and the states at the ends, one after the other, to `states`. Frees the record, unless SciML's solutions
were kept with it.
"""
function fetch!(record::Int, device::Int, n::Int, log::Int, states::Int)
    found = OBJECTS[record]
    write_steps!(found, device, n, log, states)
    isempty(found.pieces) && free(record)
    return nothing
end

function write_steps!(record::Record{V}, device, n, log, states) where {V}
    count = length(record.errors)
    numbers = host(Float64, log, 2 * count + 1)
    copyto!(numbers, record.times)
    copyto!(numbers, count + 2, record.errors, 1, count)
    rows = memory(eltype(V), device, states, (count + 1) * n)
    for (i, state) in enumerate(record.states)
        copyto!(rows, (i - 1) * n + 1, state, 1, n)
    end
    return nothing
end

"""
    pullback!(fd, field, tableau, forward, dtype, device, n, np, p, steps, times, sizes, nmarks,
              marks, states, cotangents, m, outputs, inside, theta, u0bar, pbar, bars, report)

The discrete adjoint; with `forward` the same derivatives by dual numbers. `states` and `cotangents`
hold `steps + 1` addresses (0 stands for a zero cotangent), `outputs` those of `m` dense outputs inside
the steps `inside` at `theta`. `bars` takes the cotangents of each step's start and size and of each
`theta`, or is 0. `report` takes the replayed steps and the evaluations. Throws when `fd` tells of an
interrupt.
"""
function pullback!(
    fd::Int, field::Int, tableau::Int, forward::Bool, dtype::Int, device::Int, n::Int, np::Int,
    p::Int, steps::Int, times::Int, sizes::Int, nmarks::Int, marks::Int, states::Int,
    cotangents::Int, m::Int, outputs::Int, inside::Int, theta::Int, u0bar::Int, pbar::Int,
    bars::Int, report::Int,
)
    return exclusively(OBJECTS[field]::RightHandSide) do rhs
        pull_addresses!(
            REAL[dtype + 1], rhs, OBJECTS[tableau]::Tableau, forward, device, n, np, p,
            host(Float64, times, steps + 1), host(Float64, sizes, steps),
            host(Float64, marks, nmarks), host(Int, states, steps + 1),
            host(Int, cotangents, steps + 1), host(Int, outputs, m), host(Int, inside, m),
            host(Float64, theta, m), u0bar, pbar,
            bars == 0 ? Float64[] : host(Float64, bars, 2 * steps + m), fd, host(Int, report, 2),
        )
    end
end

function pull_addresses!(
    ::Type{T}, rhs, tableau, forward, device, n, np, p, times, sizes, marks, states, cotangents,
    outputs, inside, theta, u0bar, pbar, bars, fd, report,
) where {T}
    vector(address) = memory(T, device, address, n)
    ubar = vector(u0bar)
    V = typeof(ubar)
    steps = Steps{V}(times, sizes, marks, vector.(states))
    arriving = Arriving{V}(
        [address == 0 ? nothing : vector(address) for address in cotangents], vector.(outputs),
        inside, theta,
    )
    return run_pullback!(
        rhs, tableau, forward, steps, arriving, memory(T, device, p, np), memory(T, device, pbar, np),
        ubar, bars, fd, report,
    )
end

function run_pullback!(
    rhs, tableau, forward, steps, arriving, parameters, gradient, ubar, bars, fd, report
)
    rhs.evaluations = 0
    count = length(steps.sizes)
    # Views, so that the sweep writes into Python's memory.
    part(from, length) = isempty(bars) ? bars : view(bars, (from + 1):(from + length))
    poll = () -> stop_when_interrupted(fd)
    replayed = 0
    # Cotangents of times come out of the replay alone.
    if !forward || !isempty(bars)
        sweep = Sweep(rhs, tableau, steps, arriving, parameters, gradient, ubar)
        sweep!(
            sweep; tbars = part(0, count), hbars = part(count, count),
            thetabars = part(2 * count, length(arriving.theta)), poll,
        )
        replayed = sweep.replayed
    end
    if forward
        fill!(gradient, 0)
        replayed = forward_sweep!(rhs, tableau, steps, arriving, parameters, gradient, ubar; poll)
    end
    report .= (replayed, rhs.evaluations)
    return nothing
end
