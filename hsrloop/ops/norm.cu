// BatchNorm of a batch and SiLU, forth and back. Each is two passes over memory: one finds what each
// block has of two numbers a channel, the next adds them up, each block for itself, and writes.
// What BatchNorm itself returns is never written: backward it is computed again, and rounded again
// as forward.
//
// P pixels of all images, C channels, a multiple of WIDTH; channels of a pixel lie side by side. A
// block takes `across` threads for as many WIDTH channels, blockIdx.y says which, and as many rows
// of pixels at a time as it has threads for. Sums are added in an order that only the sizes decide.
// What SiLU returns may be two tensors, as whoever splits it wants it.

#define FINDING 1024  // threads of a block of `moments` and `gradient_sums`, at most
#define WRITING 256   // of a block of the other two, at most
#define TOGETHER 4    // of the latter that a multiprocessor has room for

struct Part {
    void *out;         // (P, channels) what SiLU returns
    const void *grad;  // by it; pixels are `pitch` numbers apart
    int channels, pitch;
};

struct Given {
    Part parts[2];     // of channels side by side; the second may have none
    const void *x;     // (P, C) BatchNorm's input
    void *by_x;        // (P, C) gradient
    const float *weight, *bias;         // (C)
    float *mean, *invstd;               // (C) of the batch
    float *running_mean, *running_var;  // (C)
    float *by_bias, *by_weight;         // (C) gradients
    float *partial;                     // (blocks, 3, C)
    int pixels, channels, across, blocks;
    float eps, momentum;
};

// Which pixels and channels are a thread's.
struct Share {
    int channel, row, rows;
    bool used;

    __device__ Share(const Given &g) {
        channel = WIDTH * (blockIdx.y * g.across + threadIdx.x % g.across);
        row = threadIdx.x / g.across;
        rows = blockDim.x / g.across;
        used = channel < g.channels;
    }
};

// The part that a thread's channels are in, its pointers moved to them.
static __device__ Part part_of(const Given &g, const Share &s, int bytes) {
    const int before = g.parts[0].channels;
    Part own = s.channel < before ? g.parts[0] : g.parts[1];
    const int channel = s.channel < before ? s.channel : s.channel - before;
    own.out = (char *)own.out + (long long)channel * bytes;
    own.grad = (const char *)own.grad + (long long)channel * bytes;
    return own;
}

// Of some pixels: how many, and two numbers for each of WIDTH channels.
struct Totals {
    float count, a[WIDTH], b[WIDTH];
};

// Means and sums of squares around them.
struct Moments {
    static __device__ void add(Totals &t, const Totals &more) {
        if (more.count == 0)
            return;
        const float count = t.count + more.count, share = __fdividef(more.count, count);
        for (int i = 0; i < WIDTH; i++) {
            const float apart = more.a[i] - t.a[i];
            t.a[i] += apart * share;
            t.b[i] += more.b[i] + apart * apart * share * t.count;
        }
        t.count = count;
    }
};

struct Sums {
    static __device__ void add(Totals &t, const Totals &more) {
        for (int i = 0; i < WIDTH; i++) {
            t.a[i] += more.a[i];
            t.b[i] += more.b[i];
        }
    }
};

// The totals of all rows of a block, in its first.
template <typename How>
static __device__ void add_rows(Totals *all, Totals &own, int row, int rows, int across) {
    int apart = 1;
    while (2 * apart < rows)
        apart *= 2;
    all[threadIdx.x] = own;
    for (; apart; apart /= 2) {
        __syncthreads();
        if (row < apart && row + apart < rows) {
            How::add(own, all[threadIdx.x + apart * across]);
            all[threadIdx.x] = own;
        }
    }
    __syncthreads();
}

// Writes the totals of all rows of a block.
template <typename How>
static __device__ void leave(Totals own, const Share &s, const Given &g) {
    __shared__ Totals all[FINDING];
    add_rows<How>(all, own, s.row, s.rows, g.across);
    if (s.row > 0 || !s.used)
        return;
    float *to = g.partial + 3LL * blockIdx.x * g.channels + s.channel;
    Few<float> count, a, b;
    for (int i = 0; i < WIDTH; i++) {
        count.n[i] = own.count;
        a.n[i] = own.a[i];
        b.n[i] = own.b[i];
    }
    few<float>(to, 0) = count;
    few<float>(to, g.channels) = a;
    few<float>(to, 2 * g.channels) = b;
}

// The totals that all blocks left, in every thread.
template <typename How> static __device__ Totals left(const Share &s, const Given &g) {
    __shared__ Totals all[WRITING];
    Totals own = {};
    if (s.used) {
#pragma unroll 4
        for (int block = s.row; block < g.blocks; block += s.rows) {
            const float *from = g.partial + 3LL * block * g.channels + s.channel;
            const Few<float> a = few<float>(from, g.channels), b = few<float>(from, 2 * g.channels);
            Totals more = {*from, {}, {}};
            for (int i = 0; i < WIDTH; i++) {
                more.a[i] = a.n[i];
                more.b[i] = b.n[i];
            }
            How::add(own, more);
        }
    }
    add_rows<How>(all, own, s.row, s.rows, g.across);
    return all[threadIdx.x % g.across];
}

// Calls work(pixel, few numbers of x) with each of a thread's pixels, DEPTH of which are read before
// it works on any.
template <int KIND, int DEPTH, typename Work>
static __device__ void for_pixels(const Given &g, const Share &s, Work work) {
    typedef typename NumberOf<KIND>::Type Number;
    const int step = gridDim.x * s.rows * DEPTH;
    for (int first = blockIdx.x * s.rows * DEPTH + s.row; first < g.pixels; first += step) {
        Few<Number> x[DEPTH];
#pragma unroll
        for (int k = 0; k < DEPTH; k++) {
            const long long pixel = first + k * s.rows;
            if (pixel < g.pixels)
                x[k] = few<Number>(g.x, pixel * g.channels + s.channel);
        }
#pragma unroll
        for (int k = 0; k < DEPTH; k++)
            if (first + k * s.rows < g.pixels)
                work(first + k * s.rows, x[k]);
    }
}

// The same with the gradient beside.
template <int KIND, typename Work>
static __device__ void for_both(const Given &g, const Share &s, Work work) {
    typedef typename NumberOf<KIND>::Type Number;
    constexpr int DEPTH = KIND == FLOAT32 ? 2 : 4;
    const Part part = part_of(g, s, sizeof(Number));
    const int step = gridDim.x * s.rows * DEPTH;
    for (int first = blockIdx.x * s.rows * DEPTH + s.row; first < g.pixels; first += step) {
        Few<Number> x[DEPTH], grad[DEPTH];
#pragma unroll
        for (int k = 0; k < DEPTH; k++) {
            const long long pixel = first + k * s.rows;
            if (pixel < g.pixels) {
                x[k] = few<Number>(g.x, pixel * g.channels + s.channel);
                grad[k] = few<Number>(part.grad, pixel * part.pitch);
            }
        }
#pragma unroll
        for (int k = 0; k < DEPTH; k++)
            if (first + k * s.rows < g.pixels)
                work(first + k * s.rows, x[k], grad[k]);
    }
}

template <int KIND> static __device__ void find_moments(const Given &g) {
    typedef typename NumberOf<KIND>::Type Number;
    const Share s(g);
    Totals own = {};
    Few<float> usual = {};  // its first pixel: numbers around it are small
    if (s.used)
        for_pixels<KIND, KIND == FLOAT32 ? 4 : 8>(g, s, [&](int, const Few<Number> &x) {
            for (int i = 0; i < WIDTH; i++) {
                const float number = read<KIND>(x.n[i]);
                usual.n[i] = own.count ? usual.n[i] : number;
                const float away = number - usual.n[i];
                own.a[i] += away;
                own.b[i] = fmaf(away, away, own.b[i]);
            }
            own.count += 1;
        });
    for (int i = 0; i < WIDTH && own.count; i++) {
        const float away = own.a[i] / own.count;
        own.b[i] -= own.a[i] * away;
        own.a[i] = usual.n[i] + away;
    }
    leave<Moments>(own, s, g);
}

// What BatchNorm does with a thread's channels.
template <int KIND> struct Norm {
    typedef typename NumberOf<KIND>::Type Number;
    Few<float> mean, invstd, weight, bias;

    // With the statistics that were found before.
    __device__ Norm(const Given &g, int channel)
        : mean(few<float>(g.mean, channel)), invstd(few<float>(g.invstd, channel)),
          weight(few<float>(g.weight, channel)), bias(few<float>(g.bias, channel)) {}

    // With those of these totals.
    __device__ Norm(const Given &g, int channel, const Totals &t)
        : weight(few<float>(g.weight, channel)), bias(few<float>(g.bias, channel)) {
        for (int i = 0; i < WIDTH; i++) {
            mean.n[i] = t.a[i];
            invstd.n[i] = 1 / sqrtf(squares(t, i) / g.pixels + g.eps);
        }
    }

    static __device__ float squares(const Totals &t, int i) { return t.b[i] < 0 ? 0 : t.b[i]; }

    // Keeps the statistics, and moves the running ones.
    __device__ void keep(const Given &g, int channel, const Totals &t) const {
        few<float>(g.mean, channel) = mean;
        few<float>(g.invstd, channel) = invstd;
        const float before = 1 - g.momentum;
        for (int i = 0; i < WIDTH; i++) {
            float &running = g.running_mean[channel + i], &spread = g.running_var[channel + i];
            running = running * before + mean.n[i] * g.momentum;
            spread = spread * before + squares(t, i) / (g.pixels - 1) * g.momentum;
        }
    }

    __device__ float hat(Number x, int i) const {
        return (read<KIND>(x) - mean.n[i]) * invstd.n[i];
    }

    // As it is returned: rounded.
    __device__ float output(float hat, int i) const {
        Number rounded;
        write<KIND>(&rounded, fmaf(hat, weight.n[i], bias.n[i]));
        return read<KIND>(rounded);
    }

    // The gradient by it.
    __device__ float slope(float hat, Number grad, int i) const {
        const float y = output(hat, i), s = gate<KIND>(y, 1.0f);
        return read<KIND>(grad) * (s * (1.0f + y * (1.0f - s)));
    }
};

template <int KIND> static __device__ void forward(const Given &g) {
    typedef typename NumberOf<KIND>::Type Number;
    const Share s(g);
    const Totals found = left<Moments>(s, g);
    if (!s.used)
        return;
    const Norm<KIND> norm(g, s.channel, found);
    if (blockIdx.x == 0 && s.row == 0)
        norm.keep(g, s.channel, found);
    const Part part = part_of(g, s, sizeof(Number));
    for_pixels<KIND, KIND == FLOAT32 ? 2 : 4>(g, s, [&](int pixel, const Few<Number> &x) {
        Few<Number> out;
        for (int i = 0; i < WIDTH; i++) {
            const float y = norm.output(norm.hat(x.n[i], i), i);
            write<KIND>(&out.n[i], gate<KIND>(y, y));
        }
        few<Number>(part.out, (long long)pixel * part.channels) = out;
    });
}

template <int KIND> static __device__ void find_sums(const Given &g) {
    typedef typename NumberOf<KIND>::Type Number;
    const Share s(g);
    Totals own = {};
    if (s.used) {
        const Norm<KIND> norm(g, s.channel);
        for_both<KIND>(g, s, [&](int, const Few<Number> &x, const Few<Number> &grad) {
            for (int i = 0; i < WIDTH; i++) {
                const float hat = norm.hat(x.n[i], i), slope = norm.slope(hat, grad.n[i], i);
                own.a[i] += slope;
                own.b[i] = fmaf(slope, hat, own.b[i]);
            }
        });
    }
    leave<Sums>(own, s, g);
}

template <int KIND> static __device__ void backward(const Given &g) {
    typedef typename NumberOf<KIND>::Type Number;
    const Share s(g);
    const Totals found = left<Sums>(s, g);
    if (!s.used)
        return;
    const Norm<KIND> norm(g, s.channel);
    Few<float> mean, along;
    for (int i = 0; i < WIDTH; i++) {
        if (blockIdx.x == 0 && s.row == 0) {
            g.by_bias[s.channel + i] = found.a[i];
            g.by_weight[s.channel + i] = found.b[i];
        }
        mean.n[i] = found.a[i] / g.pixels;
        along.n[i] = found.b[i] / g.pixels;
    }
    for_both<KIND>(g, s, [&](int pixel, const Few<Number> &x, const Few<Number> &grad) {
        Few<Number> out;
        for (int i = 0; i < WIDTH; i++) {
            const float hat = norm.hat(x.n[i], i), slope = norm.slope(hat, grad.n[i], i);
            const float rest = fmaf(-hat, along.n[i], slope - mean.n[i]);
            write<KIND>(&out.n[i], norm.weight.n[i] * norm.invstd.n[i] * rest);
        }
        few<Number>(g.by_x, (long long)pixel * g.channels + s.channel) = out;
    });
}

// Of each kind its own, or registers would have to do for all.
extern "C" __global__ void __launch_bounds__(FINDING) moments_float32(Given g) {
    find_moments<FLOAT32>(g);
}

extern "C" __global__ void __launch_bounds__(FINDING) moments_float16(Given g) {
    find_moments<FLOAT16>(g);
}

extern "C" __global__ void __launch_bounds__(FINDING) moments_bfloat16(Given g) {
    find_moments<BFLOAT16>(g);
}

// After `moments`. Writes mean and invstd too, moves running_mean and running_var.
extern "C" __global__ void __launch_bounds__(WRITING, TOGETHER) norm_silu_float32(Given g) {
    forward<FLOAT32>(g);
}

extern "C" __global__ void __launch_bounds__(WRITING, TOGETHER) norm_silu_float16(Given g) {
    forward<FLOAT16>(g);
}

extern "C" __global__ void __launch_bounds__(WRITING, TOGETHER) norm_silu_bfloat16(Given g) {
    forward<BFLOAT16>(g);
}

extern "C" __global__ void __launch_bounds__(FINDING) gradient_sums_float32(Given g) {
    find_sums<FLOAT32>(g);
}

extern "C" __global__ void __launch_bounds__(FINDING) gradient_sums_float16(Given g) {
    find_sums<FLOAT16>(g);
}

extern "C" __global__ void __launch_bounds__(FINDING) gradient_sums_bfloat16(Given g) {
    find_sums<BFLOAT16>(g);
}

// After `gradient_sums`. Writes by_bias and by_weight too.
extern "C" __global__ void __launch_bounds__(WRITING, TOGETHER) norm_silu_backward_float32(Given g) {
    backward<FLOAT32>(g);
}

extern "C" __global__ void __launch_bounds__(WRITING, TOGETHER) norm_silu_backward_float16(Given g) {
    backward<FLOAT16>(g);
}

extern "C" __global__ void __launch_bounds__(WRITING, TOGETHER) norm_silu_backward_bfloat16(Given g) {
    backward<BFLOAT16>(g);
}
