# Group and layer normalization.

"""
    Normalization

`y = (x - mean) / sqrt(var + eps) .* weight .+ bias` over runs of `pixels * channels` entries, of
which there are `groups` in each of the samples; weights belong to channels, counted through the
groups of a sample. (Layer normalization: a channel is a pixel, and there is one group.)

Reference: Y. Wu, K. He, Group Normalization, ECCV 2018, equation 1.
"""
struct Normalization{T} <: Operation
    x::Operand
    weight::Union{Operand,Nothing}
    bias::Union{Operand,Nothing}
    y::Operand
    saved::Block               # mean and 1 / deviation of every run
    pixels::Int
    channels::Int
    groups::Int
    eps::T
end

run_length(o::Normalization) = o.pixels * o.channels
runs(o::Normalization) = o.y.block.length ÷ run_length(o)

function forward!(o::Normalization, m::Memory)
    saved = values_of(m, o.saved)
    normalize!(values_of(m, o.y), values_of(m, o.x), saved, o)
    o.weight === nothing || scale_channels!(values_of(m, o.y), values_of(m, o.weight), o)
    o.bias === nothing || shift_channels!(values_of(m, o.y), values_of(m, o.bias), o)
    return nothing
end

function normalize!(y::Run{T}, x::Run{T}, saved::Run{T}, o::Normalization) where {T}
    n = run_length(o)
    for j in 0:(runs(o) - 1)
        source = view(x, (j * n + 1):(j * n + n))
        mean = sum(source) / n
        total = zero(T)
        @inbounds @simd for i in eachindex(source)
            total += (source[i] - mean)^2
        end
        scale = inv(sqrt(total / n + o.eps))
        @inbounds saved[2j + 1], saved[2j + 2] = mean, scale
        @inbounds @simd ivdep for i in 1:n
            y[j * n + i] = (source[i] - mean) * scale
        end
    end
end
function normalize!(y, x, saved, o::Normalization)
    n = run_length(o)
    table, columns = reshape(saved, 2, :), reshape(x, n, :)
    mean = sum(columns; dims=1) ./ n
    scale = inv.(sqrt.(sum(abs2, columns .- mean; dims=1) ./ n .+ o.eps))
    view(table, 1:1, :) .= mean
    view(table, 2:2, :) .= scale
    reshape(y, n, :) .= (columns .- mean) .* scale
    return nothing
end

"Call `f(start, channel)` for every channel of every run, `start` entries before it."
@inline function each_channel(f::F, o::Normalization) where {F}
    start = 0
    for _ in 1:(runs(o) ÷ o.groups), channel in 1:(o.groups * o.channels)
        f(start, channel)
        start += o.pixels
    end
end

channels_first(x, o::Normalization) = reshape(x, o.pixels, o.channels * o.groups, :)

function scale_channels!(y::Run, weight::Run, o::Normalization)
    each_channel(o) do start, channel
        @inbounds factor = weight[channel]
        @inbounds @simd ivdep for i in (start + 1):(start + o.pixels)
            y[i] *= factor
        end
    end
end
scale_channels!(y, weight, o::Normalization) =
    (channels_first(y, o) .*= reshape(weight, 1, :, 1); nothing)

function shift_channels!(y::Run, bias::Run, o::Normalization)
    each_channel(o) do start, channel
        @inbounds shift = bias[channel]
        @inbounds @simd ivdep for i in (start + 1):(start + o.pixels)
            y[i] += shift
        end
    end
end
shift_channels!(y, bias, o::Normalization) =
    (channels_first(y, o) .+= reshape(bias, 1, :, 1); nothing)

function backward!(o::Normalization, m::Memory, c::Cotangents)
    ybar, x, saved = values_of(c, o.y), values_of(m, o.x), values_of(m, o.saved)
    if o.bias !== nothing && wanted(c, o.bias)
        o.bias.add || fill!(values_of(c, o.bias), 0)
        pull_shift!(values_of(c, o.bias), ybar, o)
    end
    if o.weight !== nothing && wanted(c, o.weight)
        o.weight.add || fill!(values_of(c, o.weight), 0)
        pull_weight!(values_of(c, o.weight), ybar, x, saved, o)
    end
    if wanted(c, o.x)
        g = scratch(m, 0, length(ybar))
        copyto!(g, ybar)
        o.weight === nothing || scale_channels!(g, values_of(m, o.weight), o)
        pull_normalized!(values_of(c, o.x), g, x, saved, o)
    end
    return nothing
end

function pull_shift!(bbar::Run, ybar::Run, o::Normalization)
    each_channel(o) do start, channel
        total = zero(eltype(bbar))
        @inbounds @simd for i in (start + 1):(start + o.pixels)
            total += ybar[i]
        end
        @inbounds bbar[channel] += total
    end
end
pull_shift!(bbar, ybar, o::Normalization) =
    (bbar .+= vec(sum(channels_first(ybar, o); dims=(1, 3))); nothing)

function pull_weight!(wbar::Run, ybar::Run, x::Run, saved::Run, o::Normalization)
    each_channel(o) do start, channel
        j = start ÷ run_length(o)
        @inbounds mean, scale = saved[2j + 1], saved[2j + 2]
        total = zero(eltype(wbar))
        @inbounds @simd for i in (start + 1):(start + o.pixels)
            total += ybar[i] * (x[i] - mean)
        end
        @inbounds wbar[channel] += total * scale
    end
end
function pull_weight!(wbar, ybar, x, saved, o::Normalization)
    normal = normalized(x, saved, o)
    wbar .+= vec(sum(channels_first(ybar, o) .* channels_first(normal, o); dims=(1, 3)))
    return nothing
end

function normalized(x, saved, o::Normalization)
    table = reshape(saved, 2, :)
    return (reshape(x, run_length(o), :) .- table[1:1, :]) .* table[2:2, :]
end

# xbar = scale (g - mean(g) - normal mean(g normal))
function pull_normalized!(xbar::Run, g::Run, x::Run, saved::Run, o::Normalization)
    n = run_length(o)
    for j in 0:(runs(o) - 1)
        @inbounds mean, scale = saved[2j + 1], saved[2j + 2]
        first, second = zero(eltype(g)), zero(eltype(g))
        span = (j * n + 1):(j * n + n)
        @inbounds @simd for i in span
            first += g[i]
            second += g[i] * (x[i] - mean)
        end
        first, second = first / n, second * scale * scale / n
        if o.x.add
            @inbounds @simd ivdep for i in span
                xbar[i] += scale * (g[i] - first - (x[i] - mean) * second)
            end
        else
            @inbounds @simd ivdep for i in span
                xbar[i] = scale * (g[i] - first - (x[i] - mean) * second)
            end
        end
    end
end
function pull_normalized!(xbar, g, x, saved, o::Normalization)
    n = run_length(o)
    columns, normal = reshape(g, n, :), normalized(x, saved, o)
    scale = reshape(saved, 2, :)[2:2, :]
    change = scale .* (
        columns .- sum(columns; dims=1) ./ n .- normal .* (sum(columns .* normal; dims=1) ./ n)
    )
    copy_or_add!(reshape(xbar, n, :), change, o.x.add)
    return nothing
end

function normalization(T, layout, node::Node)
    a = node.attributes
    rest = node.inputs[2:end]
    weight = a["weight"] ? popfirst!(rest) : nothing
    bias = a["bias"] ? popfirst!(rest) : nothing
    count = node.output.block.length ÷ (a["pixels"] * a["channels"])
    want_scratch!(layout, node.output.block.length)
    return Normalization(
        node.inputs[1], weight, bias, node.output, allocate!(layout, 2 * count),
        a["pixels"], a["channels"], a["groups"], number(T, node, "eps"),
    )
end
