# Entries that Python calls by their addresses: what they take stands in one row of whole numbers.

"What the last call by an address raised, with its backtrace."
const RAISED = Ref{Any}(nothing)

"""
    cross(entry, words) -> whether it raised

Call an entry with as many `words` as it takes; what it returns replaces the first of them, and what it
raises is kept for [`raised`](@ref). Nothing may be thrown through the caller, who is no Julia.
"""
function cross(entry::F, words::Ptr{Int}, ::Val{count}) where {F,count}
    try
        unsafe_store!(words, entry(ntuple(i -> unsafe_load(words, i), Val(count))...)::Int)
        return Cint(0)
    catch error
        RAISED[] = (error, catch_backtrace())
        return Cint(1)
    end
end

"""
    raised() -> name, message, trace

What the last call by an address raised, in words.
"""
function raised()
    error, trace = RAISED[]
    RAISED[] = nothing
    # Nobody asks more of an interrupt, and the first trace takes a second to be written.
    error isa InterruptException && return "InterruptException", "", ""
    told = sprint(showerror, error)
    return String(nameof(typeof(error))), told, sprint(showerror, error, trace)
end

"""
    address_of(entry) -> address

The address of a function that takes the address of a row, as [`cross`](@ref) does.
"""
address_of(entry::String) = Int(address_of(Val(Symbol(entry))))

for entry in (:fly!, :pull_flight!, :go_on!)
    count = length(Base.method_argnames(only(methods(getfield(@__MODULE__, entry))))) - 1
    crossed = Symbol(:cross_, entry)
    @eval $crossed(words::Ptr{Int}) = cross($entry, words, Val($count))
    @eval address_of(::Val{$(QuoteNode(entry))}) = @cfunction($crossed, Cint, (Ptr{Int},))
end
