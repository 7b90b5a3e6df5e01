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
