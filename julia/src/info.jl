# What runs, for reports and results files, and what is loaded on demand.

"""
    info() -> String

Versions, paths and threads, as a JSON object.
"""
function info()
    packages = Dict{String,String}()
    for (id, _) in Base.loaded_modules
        version = id.uuid === nothing ? nothing : pkgversion(Base.loaded_modules[id])
        version === nothing || (packages[id.name] = string(version))
    end
    return JSON.json((
        julia = string(VERSION),
        project = something(Base.active_project(), ""),
        depots = DEPOT_PATH,
        threads = Threads.nthreads(),
        blas = [basename(library.libname) for library in BLAS.get_config().loaded_libs],
        blas_threads = BLAS.get_num_threads(),
        processor = Sys.CPU_NAME,
        packages,
    ))
end

"""
Folder for what is compiled for this copy of the package, where its project is not its own.
"""
const DEPOT = Ref("")

"""
    load(name)

Load a package of the project that only some solves need, and with it the extensions it completes.
"""
function load(name::String)
    id = Base.identify_package(name)
    id === nothing &&
        throw(ArgumentError("the project $(dirname(Base.active_project())) has no package $name"))
    depot = DEPOT[]
    isempty(depot) || pushfirst!(DEPOT_PATH, depot)
    try
        Base.require(id)
    finally
        isempty(depot) || filter!(!=(depot), DEPOT_PATH)
    end
    return nothing
end
