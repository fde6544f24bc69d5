# Loops that operations share. Each has a form for Array, written so that LLVM vectorizes it, and a
# form in broadcasts and reductions for every other array type, without scalar indexing.

"A run of a Vector."
const Run{T} = SubArray{T,1,Vector{T},Tuple{UnitRange{Int}},true}

"`y .= f.(x)`"
function apply!(f::F, y::Run, x::Run) where {F}
    @inbounds @simd ivdep for i in eachindex(y, x)
        y[i] = f(x[i])
    end
end
apply!(f::F, y, x) where {F} = (y .= f.(x); nothing)

"`xbar = ybar * f'(x)`, added to what is there if `add`."
function pull_entries!(f::F, xbar::Run, ybar::Run, x::Run, y::Run, add::Bool) where {F}
    if add
        @inbounds @simd ivdep for i in eachindex(xbar, ybar, x, y)
            xbar[i] += ybar[i] * derivative(f, x[i], y[i])
        end
    else
        @inbounds @simd ivdep for i in eachindex(xbar, ybar, x, y)
            xbar[i] = ybar[i] * derivative(f, x[i], y[i])
        end
    end
end
function pull_entries!(f::F, xbar, ybar, x, y, add::Bool) where {F}
    if add
        xbar .+= ybar .* derivative.(f, x, y)
    else
        xbar .= ybar .* derivative.(f, x, y)
    end
    return nothing
end
Base.broadcastable(f::Union{Scalar,Pairwise}) = Ref(f)

"`y = x`, or `y += x` if `add`."
copy_or_add!(y, x, add::Bool) = (add ? (y .+= x) : (y .= x); nothing)

"`y = act.(y .+ bias)` on the columns of a matrix of `n` rows; `bias` may be `nothing`."
function finish!(f::F, y::Run, bias::Union{Run,Nothing}, n::Int) where {F}
    if bias === nothing
        f isa Identity || apply!(f, y, y)
        return nothing
    end
    start = 0
    for _ in 1:(length(y) ÷ n)
        @inbounds @simd ivdep for i in 1:n
            y[start + i] = f(y[start + i] + bias[i])
        end
        start += n
    end
end
function finish!(f::F, y, bias, n::Int) where {F}
    bias === nothing || (reshape(y, n, :) .+= bias)
    f isa Identity || (y .= f.(y))
    return nothing
end

"`zbar = ybar .* f'(y)` and its sum over the columns of a matrix of `n` rows."
function unfinish!(f::F, zbar::Run, total::Run, ybar::Run, y::Run, n::Int) where {F}
    fill!(total, 0)
    start = 0
    for _ in 1:(length(y) ÷ n)
        @inbounds @simd ivdep for i in 1:n
            z = ybar[start + i] * derivative_at_output(f, y[start + i])
            zbar[start + i] = z
            total[i] += z
        end
        start += n
    end
end
function unfinish!(f::F, zbar, total, ybar, y, n::Int) where {F}
    zbar .= ybar .* derivative_at_output.(f, y)
    sum!(total, reshape(zbar, n, :))
    return nothing
end

"Sum over the columns of a matrix of `n` rows."
function sum_columns!(total::Run, y::Run, n::Int)
    fill!(total, 0)
    start = 0
    for _ in 1:(length(y) ÷ n)
        @inbounds @simd ivdep for i in 1:n
            total[i] += y[start + i]
        end
        start += n
    end
end
sum_columns!(total, y, n::Int) = (sum!(total, reshape(y, n, :)); nothing)

# Matrix products -----------------------------------------------------------------------------

"Products in a matrix product that are quicker to take here than to hand over to BLAS."
const FEW = 128

"`C = op(A) op(B)`, added to `C` if `beta`, of few products; the sums have `k` terms."
function gemm_of_few!(
    ta::Char, tb::Char, A::Mat{Vector{T}}, B::Mat{Vector{T}}, beta::Bool, C::Mat{Vector{T}}, k::Int
) where {T}
    a, b, c = A.data, B.data, C.data
    # From term to term of a sum, and from column to column of the result.
    along, across = tb == 'N' ? (1, B.ld) : (B.ld, 1)
    @inbounds for j in 0:(C.columns - 1)
        y, z = C.offset + j * C.ld, B.offset + 1 + j * across
        if ta == 'N'
            beta || fill!(view(c, (y + 1):(y + C.rows)), zero(T))
            for l in 0:(k - 1)
                factor, x = b[z + l * along], A.offset + l * A.ld
                @simd ivdep for i in 1:C.rows
                    c[y + i] = muladd(a[x + i], factor, c[y + i])
                end
            end
        else
            for i in 1:C.rows
                x, total = A.offset + 1 + (i - 1) * A.ld, beta ? c[y + i] : zero(T)
                for l in 0:(k - 1)
                    total = muladd(a[x + l], b[z + l * along], total)
                end
                c[y + i] = total
            end
        end
    end
    return nothing
end

for (T, routine) in ((:Float64, :dgemm_), (:Float32, :sgemm_))
    @eval function gemm!(
        ta::Char, tb::Char, A::Mat{Vector{$T}}, B::Mat{Vector{$T}}, beta::Bool, C::Mat{Vector{$T}}
    )
        k = ta == 'N' ? A.columns : A.rows
        C.rows * C.columns * k <= FEW && return gemm_of_few!(ta, tb, A, B, beta, C, k)
        a, b, c = A.data, B.data, C.data
        GC.@preserve a b c ccall(
            (BLAS.@blasfunc($routine), BLAS.libblastrampoline),
            Cvoid,
            (
                Ref{UInt8}, Ref{UInt8}, Ref{BLAS.BlasInt}, Ref{BLAS.BlasInt}, Ref{BLAS.BlasInt},
                Ref{$T}, Ptr{$T}, Ref{BLAS.BlasInt}, Ptr{$T}, Ref{BLAS.BlasInt},
                Ref{$T}, Ptr{$T}, Ref{BLAS.BlasInt}, Clong, Clong,
            ),
            ta, tb, C.rows, C.columns, k,
            one($T), pointer(a, A.offset + 1), A.ld, pointer(b, B.offset + 1), B.ld,
            $T(beta), pointer(c, C.offset + 1), C.ld, 1, 1,
        )
        return nothing
    end
end

"The entries of a `Mat` as an array; a copy where they are not contiguous."
function dense(A::Mat)
    A.ld == A.rows && return reshape(part(A.data, A.offset, A.rows * A.columns), A.rows, A.columns)
    first_row = A.offset % A.ld
    whole = reshape(part(A.data, A.offset - first_row, A.ld * A.columns), A.ld, A.columns)
    return whole[(first_row + 1):(first_row + A.rows), :]
end

"`C = op(A) op(B)`, added to `C` if `beta`; `op` is the transpose where the letter is 'T'."
function gemm!(ta::Char, tb::Char, A::Mat, B::Mat, beta::Bool, C::Mat)
    left = ta == 'T' ? transpose(dense(A)) : dense(A)
    right = tb == 'T' ? transpose(dense(B)) : dense(B)
    if C.ld == C.rows
        mul!(dense(C), left, right, true, beta)
    else
        first_row = C.offset % C.ld
        whole = reshape(part(C.data, C.offset - first_row, C.ld * C.columns), C.ld, C.columns)
        copy_or_add!(view(whole, (first_row + 1):(first_row + C.rows), :), left * right, beta)
    end
    return nothing
end

# Broadcasting --------------------------------------------------------------------------------

const Four = NTuple{4,Int}

"""
    Pattern(dims, a, b)

How two operands spread over a result of (at most) four dimensions: `a` and `b` are their strides,
0 along dimensions over which they are repeated.
"""
struct Pattern
    dims::Four
    a::Four
    b::Four
end

flat(p::Pattern) = p.dims[2] * p.dims[3] * p.dims[4] == 1 && p.a[1] == 1 && p.b[1] == 1
extents(dims::Four, strides::Four) = ntuple(i -> strides[i] == 0 ? 1 : dims[i], 4)

"Call `f(y, a, b)` with the offsets of every run along the first dimension."
@inline function each_run(f::F, p::Pattern) where {F}
    y = 0
    for l in 0:(p.dims[4] - 1), k in 0:(p.dims[3] - 1), j in 0:(p.dims[2] - 1)
        f(y, l * p.a[4] + k * p.a[3] + j * p.a[2], l * p.b[4] + k * p.b[3] + j * p.b[2])
        y += p.dims[1]
    end
end

"`y .= f.(a, b)`"
function apply_pairs!(f::F, y::Run, a::Run, b::Run, p::Pattern) where {F}
    n = p.dims[1]
    each_run(p) do yo, ao, bo
        @inbounds if p.a[1] == 1 && p.b[1] == 1
            @simd ivdep for i in 1:n
                y[yo + i] = f(a[ao + i], b[bo + i])
            end
        elseif p.a[1] == 1
            second = b[bo + 1]
            @simd ivdep for i in 1:n
                y[yo + i] = f(a[ao + i], second)
            end
        elseif p.b[1] == 1
            first = a[ao + 1]
            @simd ivdep for i in 1:n
                y[yo + i] = f(first, b[bo + i])
            end
        else
            value = f(a[ao + 1], b[bo + 1])
            @simd ivdep for i in 1:n
                y[yo + i] = value
            end
        end
    end
end
function apply_pairs!(f::F, y, a, b, p::Pattern) where {F}
    left, right = reshape(a, extents(p.dims, p.a)), reshape(b, extents(p.dims, p.b))
    reshape(y, p.dims) .= f.(left, right)
    return nothing
end

"""
`xbar += sum(ybar .* slope.(f, a, b, y))` over the dimensions along which the operand with cotangent
`xbar` and strides `s` was repeated.
"""
function pull_repeated!(
    slope::S, f::F, xbar::Run, ybar::Run, y::Run, a::Run, b::Run, p::Pattern, s::Four
) where {S,F}
    n, sa, sb = p.dims[1], p.a[1], p.b[1]
    yo = 0
    for l in 0:(p.dims[4] - 1), k in 0:(p.dims[3] - 1), j in 0:(p.dims[2] - 1)
        ao = 1 + l * p.a[4] + k * p.a[3] + j * p.a[2]
        bo = 1 + l * p.b[4] + k * p.b[3] + j * p.b[2]
        xo = 1 + l * s[4] + k * s[3] + j * s[2]
        @inbounds if s[1] == 0
            total = zero(eltype(xbar))
            @simd for i in 0:(n - 1)
                total += ybar[yo + i + 1] * slope(f, a[ao + sa * i], b[bo + sb * i], y[yo + i + 1])
            end
            xbar[xo] += total
        else
            @simd ivdep for i in 0:(n - 1)
                xbar[xo + i] +=
                    ybar[yo + i + 1] * slope(f, a[ao + sa * i], b[bo + sb * i], y[yo + i + 1])
            end
        end
        yo += n
    end
end
function pull_repeated!(
    slope::S, f::F, xbar, ybar, y, a, b, p::Pattern, s::Four
) where {S,F}
    left, right = reshape(a, extents(p.dims, p.a)), reshape(b, extents(p.dims, p.b))
    terms = reshape(ybar, p.dims) .* slope.(f, left, right, reshape(y, p.dims))
    add_sum!(xbar, terms, extents(p.dims, s))
    return nothing
end

"The same where nothing is repeated; `xbar` is overwritten unless `add`."
function pull_flat!(
    slope::S, f::F, xbar::Run, ybar::Run, y::Run, a::Run, b::Run, add::Bool
) where {S,F}
    if add
        @inbounds @simd ivdep for i in eachindex(xbar, ybar, y, a, b)
            xbar[i] += ybar[i] * slope(f, a[i], b[i], y[i])
        end
    else
        @inbounds @simd ivdep for i in eachindex(xbar, ybar, y, a, b)
            xbar[i] = ybar[i] * slope(f, a[i], b[i], y[i])
        end
    end
end
pull_flat!(slope::S, f::F, xbar, ybar, y, a, b, add::Bool) where {S,F} =
    copy_or_add!(xbar, ybar .* slope.(f, a, b, y), add)

"`x += sum(terms)` over the dimensions in which `x`, of size `size`, has a single entry."
function add_sum!(x, terms, size::Four)
    dims = Tuple(i for i in 1:4 if size[i] == 1)
    reshape(x, size) .+= isempty(dims) ? terms : sum(terms; dims)
    return nothing
end

"`y = factor * sum(x)` over the dimensions in which `y` (operand `b` of the pattern) is repeated."
function reduce!(y::Run, x::Run, p::Pattern, factor)
    fill!(y, 0)
    n = p.dims[1]
    each_run(p) do _, xo, yo
        @inbounds if p.b[1] == 0
            y[yo + 1] += sum(view(x, (xo + 1):(xo + n)))
        else
            @simd ivdep for i in 1:n
                y[yo + i] += x[xo + i]
            end
        end
    end
    factor == 1 || (y .*= factor)
    return nothing
end
function reduce!(y, x, p::Pattern, factor)
    sum!(reshape(y, extents(p.dims, p.b)), reshape(x, p.dims))
    factor == 1 || (y .*= factor)
    return nothing
end

"`x += factor * y`, `y` repeated along its missing dimensions: the transpose of `reduce!`."
function spread!(x::Run, y::Run, p::Pattern, factor, add::Bool)
    add || fill!(x, 0)
    n = p.dims[1]
    each_run(p) do _, xo, yo
        @inbounds if p.b[1] == 0
            value = factor * y[yo + 1]
            @simd ivdep for i in 1:n
                x[xo + i] += value
            end
        else
            @simd ivdep for i in 1:n
                x[xo + i] += factor * y[yo + i]
            end
        end
    end
end
function spread!(x, y, p::Pattern, factor, add::Bool)
    copy_or_add!(reshape(x, p.dims), factor .* reshape(y, extents(p.dims, p.b)), add)
    return nothing
end
