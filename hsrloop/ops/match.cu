// Which detections are right: one warp for each image and threshold. Each detection in turn takes the
// free box that it overlaps most, and is right if the overlap reaches the threshold.

#define MOST 1024
#define OWN (MOST / WARP)  // boxes of a thread: every WARP-th
#define WORD 32
#define LAST 0xFFFFFFFFu

// iou (images, boxes, detections), 0 where classes differ; thresholds (levels); right
// (images, detections, levels) of 0 and 1; boxes at most MOST.
extern "C" __global__ void match(const float *iou, const float *thresholds, unsigned char *right,
                                 int images, int boxes, int detections, int levels) {
    const int which = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    const int lane = threadIdx.x % WARP;
    if (which >= images * levels)
        return;  // for a warp as a whole
    const int image = which / levels, level = which % levels;
    const float *own = iou + (long long)image * boxes * detections;
    unsigned char *found = right + (long long)image * detections * levels + level;
    unsigned taken[(OWN + WORD - 1) / WORD] = {};  // of this thread's boxes
    for (int d = 0; d < detections; d++) {
        Key best = 0;  // overlap, and among equals the first box
        for (int i = 0, box = lane; box < boxes; i++, box += WARP) {
            const float overlap = own[(long long)box * detections + d];
            const unsigned bits = *(const unsigned *)&overlap;
            const Key key = (Key)bits << 32 | (LAST - box);
            if (overlap > 0 && key > best && !(taken[i / WORD] >> i % WORD & 1))
                best = key;
        }
        best = greatest_in_warp(best);
        const unsigned bits = best >> 32;
        const int nearest = LAST - (unsigned)best;
        const bool hit = best && *(const float *)&bits >= thresholds[level];
        if (hit && nearest % WARP == lane)
            taken[nearest / WARP / WORD] |= 1u << nearest / WARP % WORD;
        if (lane == 0)
            found[(long long)d * levels] = hit;
    }
}
