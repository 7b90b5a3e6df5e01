// A moving average of many tensors: a block for each piece of one. Rounded as torch's operators
// round it: difference, product and sum, one after the other.

// Numbers that a thread reads before it writes any.
#define MANY 8

// pieces (blocks, 3): where the averages are, where the numbers are, and how many; weight ().
extern "C" __global__ void average(const long long *pieces, const float *weight) {
    const long long *piece = pieces + 3ll * blockIdx.x;
    float *averages = (float *)piece[0];
    const float *numbers = (const float *)piece[1];
    const int count = (int)piece[2], threads = blockDim.x;
    const float share = weight[0];
    for (int first = threadIdx.x; first < count; first += MANY * threads) {
        float before[MANY], now[MANY];
#pragma unroll
        for (int k = 0; k < MANY; k++) {
            const int i = first + k * threads;
            before[k] = i < count ? averages[i] : 0.0f;
            now[k] = i < count ? numbers[i] : 0.0f;
        }
#pragma unroll
        for (int k = 0; k < MANY; k++)
            if (first + k * threads < count)
                averages[first + k * threads] = before[k] + (now[k] - before[k]) * share;
    }
}
