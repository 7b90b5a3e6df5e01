// A bias and SiLU in one pass over memory. What comes out may be two tensors of half as many
// channels, as whoever splits it wants it.

#define DEEP 4  // pixels of a thread, all read before it works on any

// P pixels of all images, C channels, a multiple of WIDTH; channels of a pixel lie side by side.
struct Biased {
    const void *x, *bias;  // (P, C), (C) of `kind`
    void *outs[2];         // (P, width) each; the first may be x, the second is for what is left
    int pixels, channels, width, kind;
};

template <int KIND> static __device__ void forward(Biased b) {
    typedef typename NumberOf<KIND>::Type Number;
    const int first = blockIdx.x * blockDim.y * DEEP + threadIdx.y, step = blockDim.y;
    const int channel = WIDTH * threadIdx.x;
    const Few<Number> bias = few<Number>(b.bias, channel);
    void *out = channel < b.width ? b.outs[0] : b.outs[1];
    const int own = channel < b.width ? channel : channel - b.width;
    Few<Number> x[DEEP];
#pragma unroll
    for (int k = 0; k < DEEP; k++)
        if (first + k * step < b.pixels)
            x[k] = few<Number>(b.x, (long long)(first + k * step) * b.channels + channel);
#pragma unroll
    for (int k = 0; k < DEEP; k++) {
        if (first + k * step >= b.pixels)
            return;
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            Number sum;  // as a convolution with a bias returns it
            write<KIND>(&sum, read<KIND>(x[k].n[i]) + read<KIND>(bias.n[i]));
            const float y = read<KIND>(sum);
            write<KIND>(&x[k].n[i], gate<KIND>(y, y));
        }
        few<Number>(out, (long long)(first + k * step) * b.width + own) = x[k];
    }
}

// A block of (C / WIDTH, pixels) threads for each DEEP times as many pixels.
extern "C" __global__ void __launch_bounds__(1024) bias_silu(Biased b) {
    if (b.kind == FLOAT32)
        forward<FLOAT32>(b);
    else if (b.kind == FLOAT16)
        forward<FLOAT16>(b);
    else
        forward<BFLOAT16>(b);
}
