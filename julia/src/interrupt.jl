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

Throw an `InterruptException`, which Python raises as `KeyboardInterrupt`, if SIGINT has arrived;
returns false.
"""
function stop_when_interrupted(descriptor::Integer)
    interrupted(descriptor) && throw(InterruptException())
    return false
end

"In place of a descriptor: nobody listens, and what takes longer than a moment is left for now."
const BRIEFLY = -(1 << 62)
const MOMENT = 20_000_000  # nanoseconds

"""
    Poll(descriptor)

Asked at each step whether to leave what is being done for now; throws as [`stop_when_interrupted`](@ref)
does.
"""
struct Poll
    descriptor::Int
    until::UInt64
end

Poll(descriptor::Int) = Poll(descriptor, time_ns() + MOMENT)
is_brief(poll::Poll) = poll.descriptor == BRIEFLY
(p::Poll)() = is_brief(p) ? time_ns() > p.until : stop_when_interrupted(p.descriptor)

"""
    begin_work(work, descriptor) -> result, or the negative of a handle

Call `work(poll)`, which returns `nothing` where it is left for now: it is kept for [`go_on!`](@ref) then.
"""
function begin_work(work, descriptor::Int)
    result = work(Poll(descriptor))
    return result === nothing ? -keep(work) : result::Int
end

"""
    go_on!(fd, work) -> result

Go on with what was left, to its end.
"""
function go_on!(fd::Int, work::Int)
    result = OBJECTS[work](Poll(fd))::Int
    free(work)
    return result
end
