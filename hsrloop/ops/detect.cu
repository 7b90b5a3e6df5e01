// From what the head says to detections: the best candidates of each image, decoded, and of those
// that overlap only the best. Both kernels have a block for each image.

#define MOST 2048   // candidates of an image, a power of two
#define LEVELS 4    // of a head
#define BUCKETS 1024
#define BUCKET_BITS 10
#define CHUNK 32    // buckets
#define SCORE_BITS 30  // of a float in (0, 1]
#define DEEP 4      // times a thread reads before it looks

// One level of all images: cells one after the other, what belongs to one side by side.
struct Level {
    const void *boxes, *classes;  // (images, cells, 4 * bins) and (images, cells, classes)
    int width, cells;
    float stride;
};

struct Head {
    Level levels[LEVELS];
    int count, classes, anchors, bins, kind;
    float least, conf;  // logits up to `least` cannot have a score above `conf`
};

static __device__ float score_of(float logit) { return gate<FLOAT32>(logit, 1.0f); }

// Call `look` with each logit of an image and its place, which is class * anchors + anchor.
template <int KIND, typename Look>
static __device__ void each_logit(const Head &h, int image, Look look) {
    typedef typename NumberOf<KIND>::Type Number;
    const int thread = threadIdx.x, threads = blockDim.x;
    int first = 0;  // anchor
    for (int l = 0; l < h.count; l++) {
        const int numbers = h.levels[l].cells * h.classes;
        const Number *own = (const Number *)h.levels[l].classes + (long long)image * numbers;
        auto one = [&](int i, Number number) {
            const float logit = read<KIND>(number);
            if (logit > h.least) {
                const int cell = i / h.classes, label = i - cell * h.classes;
                look(logit, label * h.anchors + first + cell);
            }
        };
        // A few at a time from where they may be read in one piece.
        const int off = (int)((unsigned long long)own / sizeof(Number) % WIDTH);
        const int before = off ? (numbers < WIDTH - off ? numbers : WIDTH - off) : 0;
        const int groups = (numbers - before) / WIDTH, after = before + groups * WIDTH;
        if (thread < before)
            one(thread, own[thread]);
        if (thread < numbers - after)
            one(after + thread, own[after + thread]);
        for (int start = thread; start < groups; start += DEEP * threads) {
            Few<Number> some[DEEP];
#pragma unroll
            for (int d = 0; d < DEEP; d++)
                if (start + d * threads < groups)
                    some[d] = few<Number>(own, before + WIDTH * (start + d * threads));
#pragma unroll
            for (int d = 0; d < DEEP; d++)
                if (start + d * threads < groups)
#pragma unroll
                    for (int k = 0; k < WIDTH; k++)
                        one(before + WIDTH * (start + d * threads) + k, some[d].n[k]);
        }
        first += h.levels[l].cells;
    }
}

// Sort keys, the greatest first; `size` is a power of two.
static __device__ void sort_falling(Key *keys, int size) {
    for (int run = 2; run <= size; run *= 2)
        for (int apart = run / 2; apart; apart /= 2) {
            for (int i = threadIdx.x; i < size; i += blockDim.x) {
                const int other = i ^ apart;
                if (other > i && (keys[i] < keys[other]) == !(i & run)) {
                    const Key kept = keys[i];
                    keys[i] = keys[other];
                    keys[other] = kept;
                }
            }
            __syncthreads();
        }
}

// The mean of a side's distribution over `bins` logits.
template <int KIND, typename Number>
static __device__ float mean_bin(const Number *logits, int bins) {
    float top = read<KIND>(logits[0]);
    for (int k = 1; k < bins; k++)
        top = fmaxf(top, read<KIND>(logits[k]));
    float total = 0, sum = 0;
    for (int k = 0; k < bins; k++) {
        const float chance = expf(read<KIND>(logits[k]) - top);
        total += chance;
        sum += k * chance;
    }
    return sum / total;
}

template <int KIND>
static __device__ void decode(const Head &h, int image, unsigned place, float *row) {
    typedef typename NumberOf<KIND>::Type Number;
    const int label = place / h.anchors;
    int l = 0, cell = place - label * h.anchors;
    while (cell >= h.levels[l].cells)
        cell -= h.levels[l++].cells;
    const Level &level = h.levels[l];
    const Number *logits = (const Number *)level.boxes +
                           ((long long)image * level.cells + cell) * 4 * h.bins;
    const float x = (cell % level.width + 0.5f) * level.stride;
    const float y = (cell / level.width + 0.5f) * level.stride;
    row[0] = x - mean_bin<KIND>(logits, h.bins) * level.stride;
    row[1] = y - mean_bin<KIND>(logits + h.bins, h.bins) * level.stride;
    row[2] = x + mean_bin<KIND>(logits + 2 * h.bins, h.bins) * level.stride;
    row[3] = y + mean_bin<KIND>(logits + 3 * h.bins, h.bins) * level.stride;
    row[5] = label;
}

// What the threads of a block share.
struct Shared {
    Key keys[MOST];
    int buckets[BUCKETS], sums[BUCKETS / CHUNK];
    int total, above, chosen, taken, equal;
};

template <int KIND>
static __device__ void best(const Head &h, Shared &s, float *rows, int *counts, int wanted) {
    const int image = blockIdx.x, thread = threadIdx.x, threads = blockDim.x;
    // The bits of the last score taken, from the highest on; 0 where all are taken. A score's bits
    // order as it does.
    unsigned last = 0;
    if (!thread)
        s.total = s.above = s.taken = s.equal = 0;
    for (int shift = SCORE_BITS - BUCKET_BITS; shift >= 0; shift -= BUCKET_BITS) {
        for (int i = thread; i < BUCKETS; i += threads)
            s.buckets[i] = 0;
        __syncthreads();
        int seen = 0;
        each_logit<KIND>(h, image, [&](float logit, int) {
            const float score = score_of(logit);
            const unsigned bits = bits_of(score);
            if (score > h.conf && bits >> (shift + BUCKET_BITS) == last) {
                atomicAdd(&s.buckets[bits >> shift & (BUCKETS - 1)], 1);
                seen++;
            }
        });
        if (seen && shift == SCORE_BITS - BUCKET_BITS)
            atomicAdd(&s.total, seen);
        __syncthreads();
        if (s.total <= wanted)
            break;
        for (int c = thread; c < BUCKETS / CHUNK; c += threads) {
            int sum = 0;
            for (int k = 0; k < CHUNK; k++)
                sum += s.buckets[c * CHUNK + (k + c) % CHUNK];  // each thread in its own bank
            s.sums[c] = sum;
        }
        __syncthreads();
        if (!thread) {
            int above = s.above, chunk = BUCKETS / CHUNK - 1;
            while (above + s.sums[chunk] < wanted)
                above += s.sums[chunk--];
            int chosen = chunk * CHUNK + CHUNK - 1;
            while (above + s.buckets[chosen] < wanted)
                above += s.buckets[chosen--];
            s.above = above;
            s.chosen = chosen;
        }
        __syncthreads();
        last = last << BUCKET_BITS | s.chosen;
    }
    const int better = s.above;
    for (int i = thread; i < MOST; i += threads)
        s.keys[i] = 0;
    __syncthreads();
    each_logit<KIND>(h, image, [&](float logit, int place) {
        const float score = score_of(logit);
        const unsigned bits = bits_of(score);
        if (score > h.conf && bits >= last) {
            // Of those like the last one, which of them are taken is left open.
            const int at = bits > last ? atomicAdd(&s.taken, 1) : better + atomicAdd(&s.equal, 1);
            if (at < wanted)
                s.keys[at] = (Key)bits << 32 | ~(unsigned)place;
        }
    });
    __syncthreads();
    const int count = s.total < wanted ? s.total : wanted;
    int size = 1;
    while (size < count)
        size *= 2;
    sort_falling(s.keys, size);
    for (int i = thread; i < wanted; i += threads) {
        float *row = rows + 6ll * (image * wanted + i);
        if (i < count) {
            decode<KIND>(h, image, ~(unsigned)s.keys[i], row);
            row[4] = number_of(s.keys[i] >> 32);
        } else {
            for (int k = 0; k < 6; k++)
                row[k] = 0;
        }
    }
    if (!thread)
        counts[image] = s.total;
}

// Write `wanted` rows for each image, at most MOST: x1 y1 x2 y2, score, class; the best first, equal
// ones by place, 0 where there are fewer; and how many candidates there are.
extern "C" __global__ void __launch_bounds__(1024) candidates(Head h, float *rows, int *counts,
                                                              int wanted) {
    __shared__ Shared s;
    if (h.kind == FLOAT32)
        best<FLOAT32>(h, s, rows, counts, wanted);
    else if (h.kind == FLOAT16)
        best<FLOAT16>(h, s, rows, counts, wanted);
    else
        best<BFLOAT16>(h, s, rows, counts, wanted);
}

// Overlaps are computed in the order of operations of `nms._overlapping`; without contraction they
// are the same to the bit.
static __device__ bool overlap(const float *a, const float *b, float iou) {
    const float width = fmaxf(fminf(a[2], b[2]) - fmaxf(a[0], b[0]), 0);
    const float inner = fmaxf(fminf(a[3], b[3]) - fmaxf(a[1], b[1]), 0) * width;
    const float areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]);
    return inner / (areas - inner) > iou;
}

// Of what `candidates` wrote, write the first `enough` that no better one of their class overlaps,
// and 0 where there are fewer; and whether candidates that were not among `tried` would change that.
extern "C" __global__ void __launch_bounds__(1024) suppress(const float *rows, const int *counts,
                                                            float *found, unsigned char *settled,
                                                            int tried, int enough, float iou,
                                                            float class_offset) {
    __shared__ float boxes[MOST * 4];
    __shared__ unsigned char alive[MOST];
    __shared__ short kept[MOST];
    const int image = blockIdx.x, thread = threadIdx.x, threads = blockDim.x;
    const float *own = rows + 6ll * image * tried;
    const int total = counts[image], some = total < tried ? total : tried;
    for (int i = thread; i < some; i += threads) {
        for (int k = 0; k < 4; k++)
            boxes[4 * i + k] = own[6 * i + k] + own[6 * i + 5] * class_offset;
        alive[i] = 1;
    }
    __syncthreads();
    int count = 0;
    for (int i = 0; i < some && count < enough; i++) {
        if (!alive[i])
            continue;  // for all threads alike
        if (!thread)
            kept[count] = i;
        count++;
        for (int j = i + 1 + thread; j < some; j += threads)
            if (alive[j] && overlap(boxes + 4 * j, boxes + 4 * i, iou))
                alive[j] = 0;
        __syncthreads();
    }
    for (int i = thread; i < 6 * enough; i += threads)
        found[6ll * image * enough + i] = i / 6 < count ? own[6 * kept[i / 6] + i % 6] : 0;
    // Candidates as good as the last one tried may be missing.
    if (!thread)
        settled[image] =
            total <= tried || (count == enough && own[6 * kept[enough - 1] + 4] > own[6 * tried - 2]);
}
