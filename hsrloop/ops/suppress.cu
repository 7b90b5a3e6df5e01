// Non-maximum suppression of rows that are in order, best first: one block for each image. As soon
// as enough rows are kept the rest are dropped. Overlaps are computed in the order of operations of
// `nms._overlapping`; without contraction they are the same to the bit.

#define MOST 4096

static __device__ bool overlap(const float *a, const float *b, float iou) {
    const float width = fmaxf(fminf(a[2], b[2]) - fmaxf(a[0], b[0]), 0);
    const float inner = fmaxf(fminf(a[3], b[3]) - fmaxf(a[1], b[1]), 0) * width;
    const float areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]);
    return inner / (areas - inner) > iou;
}

// boxes (images, rows, 4) xyxy, wanted and kept (images, rows) of 0 and 1; rows at most MOST.
extern "C" __global__ void suppress(const float *boxes, const unsigned char *wanted,
                                    unsigned char *kept, int rows, int enough, float iou) {
    __shared__ unsigned char alive[MOST];
    const int first = blockIdx.x * rows, thread = threadIdx.x, threads = blockDim.x;
    const float *own = boxes + 4ll * first;
    for (int i = thread; i < rows; i += threads)
        alive[i] = wanted[first + i];
    __syncthreads();
    int count = 0;
    for (int i = 0; i < rows; i++) {
        if (!alive[i])
            continue;  // for all threads alike
        const bool last = ++count == enough;
        for (int j = i + 1 + thread; j < rows; j += threads)
            if (alive[j] && (last || overlap(own + 4 * j, own + 4 * i, iou)))
                alive[j] = 0;
        __syncthreads();
        if (last)
            break;
    }
    for (int i = thread; i < rows; i += threads)
        kept[first + i] = alive[i];
}
