# Ctrl-C. Python's handler of signals writes their numbers to a socket while Julia runs; a loop that
# looks into it can stop by itself.

const SIGINT = 0x02
const MSG_PEEK = Cint(2)

"""
    interrupted(descriptor) -> Bool

Whether SIGINT has arrived at the socket. Nothing is taken from it, so the answer stays the same.
A negative descriptor never interrupts.
"""
function interrupted(descriptor::Integer)
    descriptor < 0 && return false
    received = Ref{NTuple{16,UInt8}}()
    count = @ccall recv(
        Cint(descriptor)::Cint,
        received::Ptr{Cvoid},
        sizeof(received[])::Csize_t,
        MSG_PEEK::Cint,
    )::Cssize_t
    for i = 1:count
        received[][i] == SIGINT && return true
    end
    return false
end

"""
    stop_when_interrupted(descriptor)

Throw an `InterruptException`, which Python raises as `KeyboardInterrupt`, if SIGINT has arrived.
"""
function stop_when_interrupted(descriptor::Integer)
    interrupted(descriptor) && throw(InterruptException())
    return nothing
end
