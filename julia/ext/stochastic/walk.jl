"""
Drift or diffusion as StochasticDiffEq calls it; `P` of `p` are its parameters. Times have double
precision, whatever the state has.
"""
struct Part{P} <: Function
    rhs::RightHandSide
end

(f::Part{P})(du, u, p, t) where {P} = f.rhs(entries(du), u, p[P], eltype(u)(t))

"""
A solve on its way.
"""
struct Walk
    integrator::Any
    drift::RightHandSide
    diffusion::RightHandSide
end

function PySciMLNode.start_sde!(
    fd::Int, drift::Int, diffusion::Int, plan::Int, device::Int, delta::Float64, n::Int, u0::Int,
    nf::Int, pf::Int, ng::Int, pg::Int, nmarks::Int, marks::Int, dt0::Float64, proposed::Float64,
    dtmin::Float64, motions::Int, samples::Int, length::Float64, w::Int, z::Int, noise,
)
    stop_when_interrupted(fd)
    return keep(
        start_walk(
            OBJECTS[drift]::RightHandSide, OBJECTS[diffusion]::RightHandSide, OBJECTS[plan], device,
            delta, (n, u0), (nf, pf), (ng, pg), host(Float64, marks, nmarks), dt0, proposed,
            dtmin, (motions, w), (motions, z), samples, length, noise,
        ),
    )
end

function start_walk(
    drift, diffusion, plan::Plan{T}, device, delta, u0, pf, pg, marks, dt0, proposed, dtmin, w, z,
    samples, length, noise,
) where {T}
    vector((count, address)) = memory(T, device, address, count)
    # What Python owns may be gone before the walk ends; the increments are written there by design.
    return walk(
        drift, diffusion, plan, copy(vector(u0)), (copy(vector(pf)), copy(vector(pg))), vector(w),
        vector(z), marks;
        delta, dt0, proposed, dtmin, samples, length,
        draw = (from, to) -> (noise(from, to); nothing),
    )
end

"""
    walk(drift, diffusion, plan, u0, parameters, w, z, marks;
         delta, dt0, proposed, dtmin, samples, length, draw)

As `start_sde!`, on vectors; `draw(start, end)` writes to `w` and `z`.
"""
function walk(
    drift, diffusion, plan, u0, parameters, w, z, marks;
    delta, dt0, proposed, dtmin, samples, length, draw,
)
    drift, diffusion = distinct(drift, diffusion)
    path = Path(draw, w, z, marks[1])
    rates = samples == 0 ? nothing : blocks(u0, samples, Base.length(w))
    problem = SDEProblem{true}(
        SDEFunction{true,SciMLBase.FullSpecialize}(Part{1}(drift), Part{2}(diffusion)),
        u0, (marks[1], marks[end]), parameters; noise = path, noise_rate_prototype = rates,
    )
    control = plan.controller
    control === nothing || length == 0 ||
        (control = Aligned(control, marks[1], length, proposed))
    integrator = init(
        problem, plan.algorithm;
        plan.adaptive, plan.abstol, plan.reltol, controller = control, delta, dt = dt0,
        dtmin, dtmax = Float64(plan.dtmax), internalnorm = plan.norm,
        maxiters = plan.max_steps, tstops = marks[2:(end - 1)], save_everystep = false,
        save_start = false, save_end = false, verbose = SILENT,
    )
    return Walk(integrator, drift, diffusion)
end

# Modules of one architecture are one program: each part needs room, and a count, of its own. The
# bounds on times that an ordinary solve has left are not this one's.
distinct(drift, diffusion) = (
    RightHandSide(drift.field),
    RightHandSide(drift === diffusion ? copy(diffusion.field) : diffusion.field),
)

function blocks(u, samples, motions)
    m, d = motions ÷ samples, Base.length(u) ÷ samples
    return Blocks(fill!(similar(u, m, d, samples), 0))
end

function PySciMLNode.step_sde!(fd::Int, walk::Int, device::Int, n::Int, u::Int, report::Int)
    return advance!(OBJECTS[walk]::Walk, fd, device, n, u, host(Float64, report, 5))
end

function advance!(walk::Walk, fd, device, n, address, report)
    integrator = walk.integrator
    stop_when_interrupted(fd)
    step!(integrator)
    code = integrator.sol.retcode
    error = integrator.opts.adaptive ? Float64(OrdinaryDiffEqCore.get_EEst(integrator)) : NaN
    report .= (
        integrator.t, error, integrator.stats.nreject, walk.drift.evaluations,
        walk.diffusion.evaluations,
    )
    copyto!(memory(eltype(integrator.u), device, address, n), integrator.u)
    return code == ReturnCode.Default || code == ReturnCode.Success ? -1 : get(CODES, code, UNSTABLE)
end
