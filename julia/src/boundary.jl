# The table of what Python calls: the fields of each entry, in their order, with their kinds. Python
# reads the same file; here the methods are held against it when the package is compiled.

const ENTRIES_FILE = joinpath(@__DIR__, "entries.json")
include_dependency(ENTRIES_FILE)

const TYPES = Dict(
    "descriptor" => Int, "handle" => Int, "whole" => Int, "tensor" => Int, "numbers" => Int,
    "integers" => Int, "number" => Float64, "flag" => Bool, "text" => String, "function" => Any,
)

"""
    check_entries(entries) -> number

Throw unless each entry of the table that has been defined has one method, with the table's arguments;
returns how many there are.
"""
function check_entries(entries = JSON.parsefile(ENTRIES_FILE))
    return count(pairs(entries)) do (name, fields)
        defined = methods(getfield(@__MODULE__, Symbol(name)))
        isempty(defined) && return false
        method = only(defined)
        names = String.(Base.method_argnames(method)[2:end])
        types = Any[fieldtypes(Base.unwrap_unionall(method.sig))[2:end]...]
        names == collect(keys(fields)) && types == [TYPES[kind] for kind in values(fields)] ||
            error("$name takes $(names .=> types), but the table of entries says $fields")
        return true
    end
end

check_entries()
