// Which detections are right: one thread for each image and threshold. Each detection in turn takes
// the free box that it overlaps most, and is right if the overlap reaches the threshold.

#define MOST 1024
#define WORD 32

// iou (images, boxes, detections), 0 where classes differ; thresholds (levels); right
// (images, detections, levels) of 0 and 1; boxes at most MOST.
extern "C" __global__ void match(const float *iou, const float *thresholds, unsigned char *right,
                                 int images, int boxes, int detections, int levels) {
    const int which = blockIdx.x * blockDim.x + threadIdx.x;
    if (which >= images * levels)
        return;
    const int image = which / levels, level = which % levels;
    const float *own = iou + (long long)image * boxes * detections;
    const float least = thresholds[level];
    unsigned char *found = right + (long long)image * detections * levels + level;
    unsigned taken[MOST / WORD];
    for (int i = 0; i < (boxes + WORD - 1) / WORD; i++)
        taken[i] = 0;
    for (int d = 0; d < detections; d++) {
        float best = 0;
        int nearest = 0;
        for (int box = 0; box < boxes; box++) {
            const float overlap = own[(long long)box * detections + d];
            if (overlap > best && !(taken[box / WORD] >> box % WORD & 1)) {
                best = overlap;
                nearest = box;
            }
        }
        const bool hit = best >= least;
        if (hit)
            taken[nearest / WORD] |= 1u << nearest % WORD;
        found[(long long)d * levels] = hit;
    }
}
