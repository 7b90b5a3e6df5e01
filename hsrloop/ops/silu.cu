// A bias and SiLU in one pass over memory.

#define DEEP 4  // pixels of a thread, all read before it works on any

// P pixels of all images, C channels, a multiple of WIDTH; channels of a pixel lie side by side.
struct Biased {
    void *x;           // (P, C) of `kind`, in place
    const void *bias;  // (C) of `kind`
    int pixels, channels, kind;
};

template <int KIND> static __device__ void forward(Biased b) {
    typedef typename NumberOf<KIND>::Type Number;
    const int first = blockIdx.x * blockDim.y * DEEP + threadIdx.y, step = blockDim.y;
    const int channel = WIDTH * threadIdx.x;
    const Few<Number> bias = few<Number>(b.bias, channel);
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
        few<Number>(b.x, (long long)(first + k * step) * b.channels + channel) = x[k];
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
