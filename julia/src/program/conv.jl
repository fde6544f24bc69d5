# Convolutions (cross-correlations, as in torch) in two dimensions, as products of matrices; those
# in one dimension have a height of 1.

"The geometry of one group of one sample."
struct Window
    channels::Int
    size::NTuple{2,Int}        # (width, height): first index fastest
    kernel::NTuple{2,Int}
    stride::NTuple{2,Int}
    padding::NTuple{2,Int}
    dilation::NTuple{2,Int}
    out::NTuple{2,Int}
end

patch_length(w::Window) = w.channels * prod(w.kernel)
"Whether the patches are the input itself."
pointwise(w::Window) =
    prod(w.kernel) == 1 && w.stride == (1, 1) && w.padding == (0, 0)

@inline place(w::Window, d::Int, out::Int, tap::Int) =
    out * w.stride[d] - w.padding[d] + tap * w.dilation[d]

# The patch matrix has a row for each output pixel and a column for each tap of the kernel.
@inline function patch_entry(x, w::Window, i::Int)
    i, ox = divrem(i, w.out[1])
    i, oy = divrem(i, w.out[2])
    i, kx = divrem(i, w.kernel[1])
    channel, ky = divrem(i, w.kernel[2])
    ix, iy = place(w, 1, ox, kx), place(w, 2, oy, ky)
    inside = 0 <= ix < w.size[1] && 0 <= iy < w.size[2]
    return inside ? (@inbounds x[1 + ix + w.size[1] * (iy + w.size[2] * channel)]) : zero(eltype(x))
end

@inline function image_entry(patches, w::Window, i::Int)
    i, ix = divrem(i, w.size[1])
    channel, iy = divrem(i, w.size[2])
    total = zero(eltype(patches))
    for ky in 0:(w.kernel[2] - 1), kx in 0:(w.kernel[1] - 1)
        ox, restx = divrem(ix + w.padding[1] - kx * w.dilation[1], w.stride[1])
        oy, resty = divrem(iy + w.padding[2] - ky * w.dilation[2], w.stride[2])
        (restx == 0 && resty == 0 && 0 <= ox < w.out[1] && 0 <= oy < w.out[2]) || continue
        column = kx + w.kernel[1] * (ky + w.kernel[2] * channel)
        total += @inbounds patches[1 + ox + w.out[1] * (oy + w.out[2] * column)]
    end
    return total
end

"The outputs whose tap lies inside the input, as a range."
@inline function inside_range(w::Window, d::Int, tap::Int)
    shift = w.padding[d] - tap * w.dilation[d]
    first = max(0, cld(shift, w.stride[d]))
    last = min(w.out[d] - 1, fld(w.size[d] - 1 + shift, w.stride[d]))
    return first, last
end

function patches!(col::Run, x::Run, w::Window)
    to = 0
    for channel in 0:(w.channels - 1), ky in 0:(w.kernel[2] - 1), kx in 0:(w.kernel[1] - 1)
        first, last = inside_range(w, 1, kx)
        for oy in 0:(w.out[2] - 1)
            iy = place(w, 2, oy, ky)
            @inbounds if 0 <= iy < w.size[2] && first <= last
                from = 1 + place(w, 1, 0, kx) + w.size[1] * (iy + w.size[2] * channel)
                for ox in 0:(first - 1)
                    col[to + ox + 1] = 0
                end
                if w.stride[1] == 1
                    @simd ivdep for ox in first:last
                        col[to + ox + 1] = x[from + ox]
                    end
                else
                    for ox in first:last
                        col[to + ox + 1] = x[from + w.stride[1] * ox]
                    end
                end
                for ox in (last + 1):(w.out[1] - 1)
                    col[to + ox + 1] = 0
                end
            else
                for ox in 1:w.out[1]
                    col[to + ox] = 0
                end
            end
            to += w.out[1]
        end
    end
end
patches!(col, x, w::Window) = (col .= patch_entry.(Ref(x), Ref(w), 0:(length(col) - 1)); nothing)

"Patches added where they came from."
function unpatch!(x::Run, col::Run, w::Window)
    from = 0
    for channel in 0:(w.channels - 1), ky in 0:(w.kernel[2] - 1), kx in 0:(w.kernel[1] - 1)
        first, last = inside_range(w, 1, kx)
        for oy in 0:(w.out[2] - 1)
            iy = place(w, 2, oy, ky)
            if 0 <= iy < w.size[2]
                to = 1 + place(w, 1, 0, kx) + w.size[1] * (iy + w.size[2] * channel)
                @inbounds @simd ivdep for ox in first:last
                    x[to + w.stride[1] * ox] += col[from + ox + 1]
                end
            end
            from += w.out[1]
        end
    end
end
unpatch!(x, col, w::Window) = (x .+= image_entry.(Ref(col), Ref(w), 0:(length(x) - 1)); nothing)

struct Convolution <: Operation
    x::Operand
    weight::Operand
    bias::Union{Operand,Nothing}
    y::Operand
    window::Window
    batch::Int
    groups::Int
    filters::Int               # outputs of one group
end

@inline pixels(o::Convolution) = prod(o.window.out)
"The part of the input (`x` or its cotangent) that group `g` (from 0, sample by sample) sees."
@inline function group_input(m, o::Convolution, g::Int)
    n = o.window.channels * prod(o.window.size)
    x = o.x.block
    return Mat(vector(m, x.space), x.offset + g * n, pixels(o), pixels(o), o.window.channels)
end
@inline function group_weight(m, o::Convolution, g::Int)
    k, w = patch_length(o.window), o.weight.block
    start = w.offset + (g % o.groups) * k * o.filters
    return Mat(vector(m, w.space), start, k, k, o.filters)
end
@inline function group_output(m, o::Convolution, g::Int)
    y = o.y.block
    start = y.offset + g * pixels(o) * o.filters
    return Mat(vector(m, y.space), start, pixels(o), pixels(o), o.filters)
end

function group_patches(m::Memory, o::Convolution, g::Int)
    x = group_input(m, o, g)
    pointwise(o.window) && return x
    n, k = pixels(o), patch_length(o.window)
    size = o.window.channels * prod(o.window.size)
    patches!(scratch(m, 0, n * k), part(x.data, x.offset, size), o.window)
    return Mat(m.scratch, 0, n, n, k)
end

function forward!(o::Convolution, m::Memory)
    for g in 0:(o.batch * o.groups - 1)
        col = group_patches(m, o, g)
        gemm!('N', 'N', col, group_weight(m, o, g), false, group_output(m, o, g))
    end
    o.bias === nothing || add_channels!(values_of(m, o.y), values_of(m, o.bias), pixels(o))
    return nothing
end

function backward!(o::Convolution, m::Memory, c::Cotangents)
    if wanted(c, o.x) && !o.x.add
        fill!(values_of(c, o.x), 0)
    end
    if wanted(c, o.weight) && !o.weight.add
        fill!(values_of(c, o.weight), 0)
    end
    for g in 0:(o.batch * o.groups - 1)
        ybar = group_output(c, o, g)
        if wanted(c, o.weight)
            gemm!('T', 'N', group_patches(m, o, g), ybar, true, group_weight(c, o, g))
        end
        wanted(c, o.x) && pull_image!(o, g, ybar, m, c)
    end
    if o.bias !== nothing && wanted(c, o.bias)
        o.bias.add || fill!(values_of(c, o.bias), 0)
        sum_channels!(values_of(c, o.bias), values_of(c, o.y), pixels(o))
    end
    return nothing
end

function pull_image!(o::Convolution, g::Int, ybar::Mat, m::Memory, c::Cotangents)
    xbar = group_input(c, o, g)
    weight = group_weight(m, o, g)
    pointwise(o.window) && return gemm!('N', 'T', ybar, weight, true, xbar)
    n, k = pixels(o), patch_length(o.window)
    gemm!('N', 'T', ybar, weight, false, Mat(m.scratch, 0, n, n, k))
    size = o.window.channels * prod(o.window.size)
    unpatch!(part(xbar.data, xbar.offset, size), scratch(m, 0, n * k), o.window)
    return nothing
end

"`y[:, channel, sample] .+= bias[channel]`, `n` entries a channel."
function add_channels!(y::Run, bias::Run, n::Int)
    for j in 0:(length(y) ÷ n - 1)
        @inbounds value = bias[j % length(bias) + 1]
        @inbounds @simd ivdep for i in 1:n
            y[j * n + i] += value
        end
    end
end
add_channels!(y, bias, n::Int) =
    (reshape(y, n, length(bias), :) .+= reshape(bias, 1, :, 1); nothing)

function sum_channels!(total::Run, y::Run, n::Int)
    for j in 0:(length(y) ÷ n - 1)
        @inbounds total[j % length(total) + 1] += sum(view(y, (j * n + 1):(j * n + n)))
    end
end
sum_channels!(total, y, n::Int) =
    (total .+= vec(sum(reshape(y, n, length(total), :); dims=(1, 3))); nothing)

function convolution(T, layout, node::Node)
    a = node.attributes
    batch, channels, height, width = node.shapes[1]
    filters, group_channels, kernel_height, kernel_width = node.shapes[2]
    groups = channels ÷ group_channels
    flipped(key) = (Int(a[key][2]), Int(a[key][1]))
    window = Window(
        group_channels, (width, height), (kernel_width, kernel_height),
        flipped("stride"), flipped("padding"), flipped("dilation"), (node.shape[4], node.shape[3]),
    )
    pointwise(window) || want_scratch!(layout, patch_length(window) * prod(window.out))
    bias = length(node.inputs) == 3 ? node.inputs[3] : nothing
    return Convolution(
        node.inputs[1], node.inputs[2], bias, node.output, window, batch, groups, filters ÷ groups
    )
end
