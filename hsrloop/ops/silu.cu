// From the gradient by what SiLU returned to that by what BatchNorm returned, which is computed again
// on the way, from BatchNorm's input: nothing is written in between.

#define WIDTH 4  // channels of a thread, read in one piece
#define DEEP 4   // pixels of a thread, all read before it works on any

// P pixels of all images, C channels, a multiple of WIDTH; channels of a pixel lie side by side.
struct Given {
    const void *x;     // (P, C) BatchNorm's input, of `kind`
    const void *grad;  // (P, C) by SiLU's output; pixels are `pitch` numbers apart
    void *out;         // (P, C)
    const float *mean, *invstd, *weight, *bias;  // (C)
    int pixels, channels, pitch, kind;
};

template <typename Number> struct alignas(WIDTH * sizeof(Number)) Few {
    Number n[WIDTH];
};

static __device__ float read(float number, int) { return number; }

static __device__ float read(unsigned short bits, int kind) { return wide(bits, kind); }

static __device__ void write(float *to, float number, int) { *to = number; }

static __device__ void write(unsigned short *to, float number, int kind) {
    *to = narrow(number, kind);
}

template <typename Number>
static __device__ Few<Number> few(const void *numbers, long long row, long long pitch) {
    return ((const Few<Number> *)((const Number *)numbers + row * pitch))[threadIdx.x];
}

template <typename Number> static __device__ void work(Given g) {
    const int first = blockIdx.x * blockDim.y * DEEP + threadIdx.y, step = blockDim.y;
    const Few<float> mean = few<float>(g.mean, 0, 0), invstd = few<float>(g.invstd, 0, 0);
    const Few<float> weight = few<float>(g.weight, 0, 0), bias = few<float>(g.bias, 0, 0);
    Few<Number> x[DEEP], grad[DEEP];
#pragma unroll
    for (int k = 0; k < DEEP; k++) {
        const int pixel = first + k * step;
        if (pixel < g.pixels) {
            x[k] = few<Number>(g.x, pixel, g.channels);
            grad[k] = few<Number>(g.grad, pixel, g.pitch);
        }
    }
#pragma unroll
    for (int k = 0; k < DEEP; k++) {
        const int pixel = first + k * step;
        if (pixel >= g.pixels)
            return;
        Few<Number> out;
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            const float centred = read(x[k].n[i], g.kind) - mean.n[i];
            Number rounded;  // as BatchNorm returned it
            write(&rounded, weight.n[i] * centred * invstd.n[i] + bias.n[i], g.kind);
            const float y = read(rounded, g.kind);
            const float s = sizeof(Number) == sizeof(float) ? 1.0f / (1.0f + expf(-y))
                                                            : __fdividef(1.0f, 1.0f + __expf(-y));
            const float slope = s * (1.0f + y * (1.0f - s));
            write(&out.n[i], read(grad[k].n[i], g.kind) * slope, g.kind);
        }
        ((Few<Number> *)((Number *)g.out + (long long)pixel * g.channels))[threadIdx.x] = out;
    }
}

// A block of (C / WIDTH, pixels) threads for each DEEP times as many pixels.
extern "C" __global__ void silu_backward(Given g) {
    if (g.kind == FLOAT32)
        work<float>(g);
    else
        work<unsigned short>(g);
}
