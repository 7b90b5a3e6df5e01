// A batch of augmented images in one pass: each thread makes one output pixel, from its sources in
// the bank to its colour. It computes what `pixels_torch` and `colour_torch` do, in the same order
// of operations, rounded once where they are (fmaf, as torch.addcmul and torch.lerp): compiled
// without further contraction it gives the bytes that they give on the CPU. A compiler for the host
// takes it too.

#define LAYER_COLUMNS 14
#define STAMP_COLUMNS 19
#define WEIGHT_BITS 7
#define ONE (1 << WEIGHT_BITS)
#define HALF (1 << (WEIGHT_BITS - 1))
#define ODD 0x00FF00FF
#define LEAST_SLOPE 1e-9f

typedef unsigned char byte;

struct Taps {
    int at, step, weights[4];
};

struct Run {
    float first, last;
};

static __device__ int bits(const float *number) { return *(const int *)number; }

static __device__ float within(float x, float low, float high) {
    return fminf(fmaxf(x, low), high);
}

// base + weight * (end - start) from the nearer end, as torch.lerp.
static __device__ float mixed(float start, float end, float weight) {
    return fabsf(weight) < 0.5f ? fmaf(weight, end - start, start)
                                : fmaf(weight - 1.0f, end - start, end);
}

static __device__ Taps taps(float column, float row, int step) {
    const float x = floorf(column), y = floorf(row);
    const int wx = (int)rintf((column - x) * ONE), wy = (int)rintf((row - y) * ONE);
    const int both = (wx * wy + ONE / 2) >> WEIGHT_BITS;
    return {(int)y * step + (int)x, step, {ONE - wx - wy + both, wx - both, wy - both, both}};
}

// Three bytes as one int.
static __device__ int packed(const byte *pixels, int place) {
    const byte *rgb = pixels + 3LL * place;
    return rgb[0] | rgb[1] << 8 | rgb[2] << 16;
}

// All bytes, two at a time side by side in one int.
static __device__ int colours(const byte *pixels, int base, Taps t) {
    const int places[4] = {t.at, t.at + 1, t.at + t.step, t.at + t.step + 1};
    int odd = HALF << 16 | HALF, even = odd;
    for (int i = 0; i < 4; i++) {
        const int found = packed(pixels, base + places[i]);
        odd += (found & ODD) * t.weights[i];
        even += (found >> 8 & ODD) * t.weights[i];
    }
    return (odd >> WEIGHT_BITS & ODD) | (even >> WEIGHT_BITS & ODD) << 8;
}

static __device__ int one_byte(const byte *pixels, int base, Taps t, int channel) {
    const int places[4] = {t.at, t.at + 1, t.at + t.step, t.at + t.step + 1};
    int total = HALF;
    for (int i = 0; i < 4; i++)
        total += pixels[3LL * (base + places[i]) + channel] * t.weights[i];
    return total >> WEIGHT_BITS;
}

// From where to where low <= slope * x + start <= high.
static __device__ Run run(float slope, float start, float low, float high) {
    if (fabsf(slope) < LEAST_SLOPE)
        slope = LEAST_SLOPE;
    const float a = (low - start) / slope, b = (high - start) / slope;
    return slope > 0 ? Run{a, b} : Run{b, a};
}

// Where each layer covers each line: a thread for every two. layers (count, LAYER_COLUMNS), runs
// (count, side) of first and last.
extern "C" __global__ void cover(const float *layers, float *runs, int count, int side) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, line = i % side;
    if (i / side >= count)
        return;
    const float *r = layers + i / side * LAYER_COLUMNS;
    const float y = (float)line;
    const Run across = run(r[0], r[1] * y + r[2], r[6] - r[10], r[8] + r[10]);
    const Run down = run(r[3], r[4] * y + r[5], r[7] - r[11], r[9] + r[11]);
    runs[2 * i] = fmaxf(across.first, down.first);
    runs[2 * i + 1] = fminf(across.last, down.last);
}

// The topmost of a frame's layers; its first row is grey. `runs` are those of its lines.
static __device__ int composed(const float *layers, const Run *runs, int rows, const byte *pixels,
                               int side, float x, float y) {
    int top = rows - 1;
    while (top > 0 && !(x >= runs[top * side].first && x <= runs[top * side].last))
        top--;
    const float *r = layers + top * LAYER_COLUMNS;
    const float column = within(fmaf(r[1], y, fmaf(r[0], x, r[2])), r[6], r[8]);
    const float row = within(fmaf(r[4], y, fmaf(r[3], x, r[5])), r[7], r[9]);
    return colours(pixels, bits(r + 12), taps(column, row, bits(r + 13)));
}

// One cut-out, or its shadow, blended over a pixel.
static __device__ int stamped(int below, const float *r, const byte *pixels, float x, float y) {
    const float u = (r[1] * y + r[2]) + r[0] * x, v = (r[4] * y + r[5]) + r[3] * x;
    const Taps t = taps(within(u, 0, r[6]), within(v, 0, r[7]), bits(r + 17));
    const int colour = colours(pixels, bits(r + 15), t);
    const float alpha = (float)one_byte(pixels, bits(r + 16), t, bits(r + 18)) * (r[11] / 255.0f);
    int result = 0;
    for (int channel = 0; channel < 3; channel++) {
        const int shift = 8 * channel;
        const float over = rintf(fminf((float)(colour >> shift & 255) * r[8 + channel], 255));
        const float under = (float)(below >> shift & 255);
        result |= (int)rintf(mixed(under, over, alpha)) << shift;
    }
    return result;
}

// A frame's pixel: layers, then stamps. `links` holds where each frame's stamps begin, frames + 1
// numbers, then for each in the order of blending its row and its window's height and width.
static __device__ int framed(const float *layers, const float *runs, int rows, const float *stamps,
                             const int *links, int frames, int frame, const byte *pixels, int side,
                             int column, int line) {
    const float x = (float)column, y = (float)line;
    const Run *own = (const Run *)runs + frame * rows * side + line;
    int pixel = composed(layers + frame * rows * LAYER_COLUMNS, own, rows, pixels, side, x, y);
    for (int i = links[frame]; i < links[frame + 1]; i++) {
        const int *link = links + frames + 1 + 3 * i;
        const float *r = stamps + link[0] * STAMP_COLUMNS;
        const int over = column - (int)r[12], down = line - (int)r[13];
        if (over >= 0 && down >= 0 && down < link[1] && over < link[2])
            pixel = stamped(pixel, r, pixels, x, y);
    }
    return pixel;
}

// How far a channel lies below the value, in spreads.
static __device__ float share(float hue, float place) {
    float away = fabsf(hue - place);
    away = fminf(away, fabsf(away - 6.0f));
    return within(away - 1.0f, 0, 1);
}

// layers (frames, rows, LAYER_COLUMNS) and their runs, see `cover`; stamps (n, STAMP_COLUMNS), links
// as in `framed`, then for each image the frame it is mixed with, or -1, and the weight of its own
// (the bits of a float); factors (images, 3) of `colour_factors`, or null; out (images, side, side,
// 3).
extern "C" __global__ void render(const float *layers, const float *runs, const float *stamps,
                                  const int *links, const float *factors, const byte *pixels,
                                  byte *out, int frames, int rows, int side) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    const int line = blockIdx.y * blockDim.y + threadIdx.y;
    const int image = blockIdx.z;
    if (column >= side || line >= side)
        return;
    int pixel =
        framed(layers, runs, rows, stamps, links, frames, image, pixels, side, column, line);
    const int *mix = links + frames + 1 + 3 * links[frames] + 2 * image;
    if (mix[0] >= 0) {
        const int other =
            framed(layers, runs, rows, stamps, links, frames, mix[0], pixels, side, column, line);
        const float weight = *(const float *)(mix + 1);
        int both = 0;
        for (int shift = 0; shift < 24; shift += 8) {
            const float own = (float)(pixel >> shift & 255), partner = (float)(other >> shift & 255);
            both |= (int)rintf(mixed(partner, own, weight)) << shift;
        }
        pixel = both;
    }
    byte *rgb = out + 3 * (((long long)image * side + line) * side + column);
    float r = (float)(pixel & 255), g = (float)(pixel >> 8 & 255), b = (float)(pixel >> 16 & 255);
    if (factors) {
        const float turn = factors[3 * image], more = factors[3 * image + 1];
        const float lighter = factors[3 * image + 2];
        const float value = fmaxf(fmaxf(r, g), b), spread = value - fminf(fminf(r, g), b);
        float hue = value == r   ? g - b
                    : value == g ? (b - r) + 2.0f * spread
                                 : (r - g) + 4.0f * spread;
        hue = hue / fmaxf(spread, 1) + turn;
        const float bright = fminf(value * lighter, 255);
        const float fall = fminf(spread * more, value) * (bright / fmaxf(value, 1));
        r = (bright + 0.5f) - share(hue, 0) * fall;
        g = (bright + 0.5f) - share(hue, 2) * fall;
        b = (bright + 0.5f) - share(hue, 4) * fall;
    }
    rgb[0] = (byte)(int)r;
    rgb[1] = (byte)(int)g;
    rgb[2] = (byte)(int)b;
}
