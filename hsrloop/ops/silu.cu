// SiLU together with what comes before it, in one pass over memory: forward after a bias, and
// backward to what BatchNorm returned, which is computed again on the way, from BatchNorm's input.

#define WIDTH 4  // channels of a thread, read in one piece
#define DEEP 4   // pixels of a thread, all read before it works on any

// P pixels of all images, C channels, a multiple of WIDTH; channels of a pixel lie side by side.
struct Biased {
    void *x;           // (P, C) of `kind`, in place
    const void *bias;  // (C) of `kind`
    int pixels, channels, kind;
};

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
static __device__ Few<Number> &few(void *numbers, long long row, long long pitch) {
    return ((Few<Number> *)((Number *)numbers + row * pitch))[threadIdx.x];
}

template <typename Number>
static __device__ const Few<Number> &few(const void *numbers, long long row, long long pitch) {
    return ((const Few<Number> *)((const Number *)numbers + row * pitch))[threadIdx.x];
}

// 1 / (1 + exp(-y)), or y times that; quick where the result is rounded to a short kind.
template <typename Number> static __device__ float sigmoid(float y, float numerator) {
    return sizeof(Number) == sizeof(float) ? numerator / (1.0f + expf(-y))
                                           : __fdividef(numerator, 1.0f + __expf(-y));
}

static __device__ int first_pixel() { return blockIdx.x * blockDim.y * DEEP + threadIdx.y; }

template <typename Number> static __device__ void forward(Biased b) {
    const int first = first_pixel(), step = blockDim.y;
    const Few<Number> bias = few<Number>(b.bias, 0, 0);
    Few<Number> x[DEEP];
#pragma unroll
    for (int k = 0; k < DEEP; k++)
        if (first + k * step < b.pixels)
            x[k] = few<Number>(b.x, first + k * step, b.channels);
#pragma unroll
    for (int k = 0; k < DEEP; k++) {
        if (first + k * step >= b.pixels)
            return;
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            Number sum;  // as a convolution with a bias returns it
            write(&sum, read(x[k].n[i], b.kind) + read(bias.n[i], b.kind), b.kind);
            const float y = read(sum, b.kind);
            write(&x[k].n[i], sigmoid<Number>(y, y), b.kind);
        }
        few<Number>(b.x, first + k * step, b.channels) = x[k];
    }
}

template <typename Number> static __device__ void backward(Given g) {
    const int first = first_pixel(), step = blockDim.y;
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
            const float s = sigmoid<Number>(y, 1.0f);
            const float slope = s * (1.0f + y * (1.0f - s));
            write(&out.n[i], read(grad[k].n[i], g.kind) * slope, g.kind);
        }
        few<Number>(g.out, pixel, g.channels) = out;
    }
}

// Both have a block of (C / WIDTH, pixels) threads for each DEEP times as many pixels.
extern "C" __global__ void __launch_bounds__(1024) bias_silu(Biased b) {
    if (b.kind == FLOAT32)
        forward<float>(b);
    else
        forward<unsigned short>(b);
}

extern "C" __global__ void __launch_bounds__(1024) silu_backward(Given g) {
    if (g.kind == FLOAT32)
        backward<float>(g);
    else
        backward<unsigned short>(g);
}
