// Numbers of three kinds, computed with as float. Every source is compiled after this, on a card and
// on a host.

#define FLOAT32 0
#define FLOAT16 1
#define BFLOAT16 2

static __device__ unsigned bits_of(float number) { return *(const unsigned *)&number; }

static __device__ float number_of(unsigned bits) { return *(const float *)&bits; }

// What the bits of one of the two short kinds mean.
static __device__ float wide(unsigned short bits, int kind) {
    return kind == FLOAT16 ? from_half(bits) : number_of((unsigned)bits << 16);
}

// To the nearest, to even between two; what is no number stays none.
static __device__ unsigned short narrow(float number, int kind) {
    if (kind == FLOAT16)
        return to_half(number);
    const unsigned bits = bits_of(number);
    return number != number ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

static __device__ float load(const void *numbers, long long i, int kind) {
    return kind == FLOAT32 ? ((const float *)numbers)[i]
                         : wide(((const unsigned short *)numbers)[i], kind);
}

static __device__ void store(void *numbers, long long i, int kind, float number) {
    if (kind == FLOAT32)
        ((float *)numbers)[i] = number;
    else
        ((unsigned short *)numbers)[i] = narrow(number, kind);
}

// A few numbers that lie side by side, read and written in one piece.
#define WIDTH 4
template <typename Number> struct alignas(WIDTH * sizeof(Number)) Few {
    Number n[WIDTH];
};

template <typename Number> static __device__ const Few<Number> &few(const void *from, long long at) {
    return *(const Few<Number> *)((const Number *)from + at);
}

template <typename Number> static __device__ Few<Number> &few(void *from, long long at) {
    return *(Few<Number> *)((Number *)from + at);
}

// One of them, of a kind that is known when this is compiled.
template <int KIND> static __device__ float read(float number) { return number; }

template <int KIND> static __device__ float read(unsigned short bits) { return wide(bits, KIND); }

template <int KIND> static __device__ void write(float *to, float number) { *to = number; }

template <int KIND> static __device__ void write(unsigned short *to, float number) {
    *to = narrow(number, KIND);
}

template <int KIND> struct NumberOf {
    typedef unsigned short Type;
};

template <> struct NumberOf<FLOAT32> {
    typedef float Type;
};

// 1 / (1 + exp(-y)), or y times that; quick where the result is rounded to a short kind.
template <int KIND> static __device__ float gate(float y, float numerator) {
    return KIND == FLOAT32 ? numerator / (1.0f + expf(-y)) : __fdividef(numerator, 1.0f + __expf(-y));
}
