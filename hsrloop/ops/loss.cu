// Assignment and loss, forward and backward, without a tensor as large as boxes times anchor points
// and without a shape that follows the boxes. Each kernel decides what `assign` and `loss` decide,
// in the same order of operations. Whatever threads write to together is a maximum of integers, so
// that the result does not depend on who comes first. A compiler for the host takes it too.

#define TOPK 10
#define LANES 128
#define MOST_LEVELS 8
// Numbers that a thread reads before it works on any; and most bins of a side.
#define MANY 16
#define ROW_BITS 28
#define ROWS ((1 << ROW_BITS) - 1)
#define LAST 0xFFFFFFFFu
#define EPS 1e-7f
#define SCORE_EPS 1e-9f
#define INSIDE_PX 1e-9f
#define DFL_MARGIN 0.01f
#define PI 3.14159265358979f

// B images, A anchor points, C classes, L levels, R bins, M places for boxes in an image; N = B * M
// boxes, T = N * TOPK slots.
struct Pass {
    const void *box_logits, *class_logits;  // (B, 4 R, A) and (B, C, A), of `kind`
    const float *truth;                     // (6, N) `boxes.Columns`
    const long long *labels;                // (N), -1 where there is no box
    const int *levels;                      // (L, 4): first anchor point, height, width, stride
    float *predicted;                       // (6, B * A) `boxes.Columns`
    Key *ranking;                           // (B * A) most overlap, and with which box; at first 0
    unsigned *earliest, *latest;            // (B * A) first and last slot that wants it; at first 0
    int *wanted, *given;                    // (T) anchor point, and box that it is given to, or -1
    float *ciou, *metric;                   // (T) of these two
    unsigned *highest;                      // (2, N) metric and overlap, as bits; at first 0
    float *weight;                          // (T) target scores
    float *parts;                           // (4, T) of the sums over slots
    float *sums;                            // (threads) of softplus
    const float *by_box, *by_cls, *by_dfl;  // () gradients of the sums
    void *box_gradient, *class_gradient;    // as the logits, the first 0 at first
    int kind, images, anchors, classes, places, depth, bins, threads;
    float smallest;  // px, a box's sides count as no shorter than this
};

// Numbers that stand `step` apart, from `first` on; as far as `reach` they are there, the rest are
// below all others.
static __device__ void load_many(const void *numbers, long long first, int step, int reach,
                                 int kind, float *found) {
    const float *floats = (const float *)numbers + first;
    const unsigned short *halves = (const unsigned short *)numbers + first;
    if (kind == FLOAT32) {
#pragma unroll
        for (int k = 0; k < MANY; k++)
            found[k] = k * step < reach ? floats[k * step] : number_of(0xFF800000);
        return;
    }
    const unsigned short lowest = kind == FLOAT16 ? 0xFC00 : 0xFF80;
    unsigned short bits[MANY];
#pragma unroll
    for (int k = 0; k < MANY; k++)
        bits[k] = k * step < reach ? halves[k * step] : lowest;
    if (kind == FLOAT16) {
#pragma unroll
        for (int k = 0; k < MANY; k++)
            found[k] = from_half(bits[k]);
    } else {
#pragma unroll
        for (int k = 0; k < MANY; k++)
            found[k] = number_of((unsigned)bits[k] << 16);
    }
}

static __device__ void store_many(void *numbers, long long first, int step, int reach, int kind,
                                  const float *given) {
#pragma unroll
    for (int k = 0; k < MANY; k++)
        if (k * step < reach)
            store(numbers, first + k * step, kind, given[k]);
}

// How far it is from one place to another, where that is near.
static __device__ int reach_of(long long from, long long to) {
    const long long most = 1 << 30;
    return (int)(to - from < most ? to - from : most);
}

static __device__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

struct Cell {
    float x, y, stride;
};

static __device__ Cell cell_of(Pass p, int anchor) {
    const int *grid = p.levels;
    while (grid + 4 < p.levels + 4 * p.depth && anchor >= grid[4])
        grid += 4;
    const int own = anchor - grid[0], width = grid[2];
    const float stride = (float)grid[3];
    return {((float)(own % width) + 0.5f) * stride, ((float)(own / width) + 0.5f) * stride, stride};
}

struct Box {
    float x1, y1, x2, y2, area, angle;
};

static __device__ Box box_at(const float *columns, long long rows, long long i) {
    return {columns[i],            columns[rows + i],     columns[2 * rows + i],
            columns[3 * rows + i], columns[4 * rows + i], columns[5 * rows + i]};
}

struct Pair {  // see `boxes.Pairs`
    float width, height, both, iou, across, down, diagonal, right, below, apart, turn, aspect;
    float weight, ciou;
};

static __device__ Pair pair_of(Box a, Box b) {
    Pair p;
    p.width = fmaxf(fminf(a.x2, b.x2) - fmaxf(a.x1, b.x1), 0.0f);
    p.height = fmaxf(fminf(a.y2, b.y2) - fmaxf(a.y1, b.y1), 0.0f);
    const float inner = p.width * p.height;
    p.both = a.area + b.area - inner + EPS;
    p.iou = inner / p.both;
    p.across = fmaxf(a.x2, b.x2) - fminf(a.x1, b.x1);
    p.down = fmaxf(a.y2, b.y2) - fminf(a.y1, b.y1);
    p.diagonal = p.across * p.across + p.down * p.down + EPS;
    p.right = (b.x1 + b.x2) - (a.x1 + a.x2);
    p.below = (b.y1 + b.y2) - (a.y1 + a.y2);
    p.apart = (p.right * p.right + p.below * p.below) / p.diagonal;
    p.turn = b.angle - a.angle;
    p.aspect = p.turn * p.turn;
    p.weight = p.aspect / (p.aspect - p.iou + (1.0f + EPS));
    p.ciou = p.iou - 0.25f * p.apart - p.aspect * p.weight;
    return p;
}

// The derivative of the complete IoU by a's side moved outwards; sides: left, top, right, bottom.
static __device__ float by_side(Box a, Box b, Pair p, int side) {
    const bool vertical = side % 2, far = side / 2;
    const float per_union = p.iou / p.both, half = 0.5f / p.diagonal;
    const float width = a.x2 - a.x1, height = a.y2 - a.y1 + EPS;
    const float turned = p.weight * p.turn * (4.0f / PI) / (width * width + height * height);
    const float other = vertical ? width : height;
    const float own = (vertical ? -other : other) * turned - other * per_union;
    const float touching = (vertical ? p.height : p.width) > 0.0f ? 1.0f : 0.0f;
    const float crossing =
        (vertical ? p.width : p.height) * touching * (1.0f / p.both + per_union);
    const float around = (vertical ? p.down : p.across) * (p.apart * half);
    const float towards = (vertical ? p.below : p.right) * half;
    const bool cut = far ? (vertical ? a.y2 < b.y2 : a.x2 < b.x2)
                         : (vertical ? a.y1 > b.y1 : a.x1 > b.x1);
    return (cut ? crossing : around) + own + (far ? towards : -towards);
}

static __device__ long long points_in(Pass p) { return (long long)p.images * p.anchors; }

static __device__ int boxes_in(Pass p) { return p.images * p.places; }

static __device__ int image_of(Pass p, int box) { return box / p.places; }

static __device__ long long point_of(Pass p, int image, int anchor) {
    return (long long)image * p.anchors + anchor;
}

// Where the class logit of a box stands at an anchor point.
static __device__ long long class_place(Pass p, int box, int anchor) {
    const long long row = (long long)image_of(p, box) * p.classes + p.labels[box];
    return row * p.anchors + anchor;
}

static __device__ float metric_at(Pass p, long long place, float overlap) {
    const float score = sigmoid(load(p.class_logits, place, p.kind));
    const float cube = overlap * overlap * overlap;
    return sqrtf(score) * cube * cube;
}

// Where the logit of a side's first bin is.
static __device__ long long bins_at(Pass p, int image, int which, int anchor) {
    return ((image * 4ll + which) * p.bins) * p.anchors + anchor;
}

// The distribution of a side's distance over bins; parts are of `total`, 0 where there is no bin.
struct Side {
    float logits[MANY], parts[MANY], highest, total;
};

static __device__ Side side_at(Pass p, long long first) {
    Side side;
    load_many(p.box_logits, first, p.anchors, p.bins * p.anchors, p.kind, side.logits);
    side.highest = side.logits[0];
    side.total = 0.0f;
#pragma unroll
    for (int k = 1; k < MANY; k++)
        side.highest = fmaxf(side.highest, side.logits[k]);
#pragma unroll
    for (int k = 0; k < MANY; k++)
        side.total += side.parts[k] = expf(side.logits[k] - side.highest);
    return side;
}

static __device__ float mean_of(Side side) {
    float mean = 0.0f;
#pragma unroll
    for (int k = 1; k < MANY; k++)
        mean += (float)k * (side.parts[k] / side.total);
    return mean;
}

// The logarithm of a bin's share.
static __device__ float log_share(Side side, int which, float lost) {
    float logit = 0.0f;
#pragma unroll
    for (int k = 0; k < MANY; k++)
        logit = k == which ? side.logits[k] : logit;
    return logit - side.highest - lost;
}

// Where the boxes are that the logits say; a thread for each anchor point of each image.
extern "C" __global__ void __launch_bounds__(LANES, 8) decode(Pass p) {
    const long long point = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (point >= points_in(p))
        return;
    const int image = point / p.anchors, anchor = point % p.anchors;
    const Cell cell = cell_of(p, anchor);
    float distance[4];
#pragma unroll 1  // so that there is room for more threads
    for (int which = 0; which < 4; which++)
        distance[which] = mean_of(side_at(p, bins_at(p, image, which, anchor))) * cell.stride;
    const float x1 = cell.x - distance[0], y1 = cell.y - distance[1];
    const float x2 = cell.x + distance[2], y2 = cell.y + distance[3];
    const float width = x2 - x1, height = y2 - y1 + EPS;
    const float columns[6] = {x1, y1, x2, y2, width * height, atanf(width / height) * (2.0f / PI)};
    for (int i = 0; i < 6; i++)
        p.predicted[i * points_in(p) + point] = columns[i];
}

struct Span {
    int first, count;
};

static __device__ int nearby(float place, int cells, float size) {
    return (int)fminf(fmaxf(floorf(place / size - 0.5f), -2.0f), (float)cells) - 1;
}

// The cells whose centres are inside (low, high); see `targets._span`.
static __device__ Span span(float low, float high, int cells, float size) {
    int first = nearby(low, cells, size), last = nearby(high, cells, size) + 3;
    for (int i = 0; i < 3; i++) {
        first += !(((float)first + 0.5f) * size - low > INSIDE_PX);
        last -= !(high - ((float)last + 0.5f) * size > INSIDE_PX);
    }
    first = first < 0 ? 0 : first;
    last = last > cells - 1 ? cells - 1 : last;
    return {first, last < first ? 0 : last - first + 1};
}

static __device__ void widen(float *low, float *high, float smallest) {
    const float centre = (*low + *high) / 2.0f, half = fmaxf(*high - *low, smallest) / 2.0f;
    *low = centre - half;
    *high = centre + half;
}

// The cells of a level whose centres are inside a box: row by row from the anchor point `corner`.
struct Field {
    int corner, width, columns, count;
};

static __device__ Field field_of(const int *grid, Box box) {
    const Span across = span(box.x1, box.x2, grid[2], (float)grid[3]);
    const Span down = span(box.y1, box.y2, grid[1], (float)grid[3]);
    const int corner = grid[0] + down.first * grid[2] + across.first;
    return {corner, grid[2], across.count, across.count * down.count};
}

// A point's rank by metric, as a number: among equals the first point is greater.
static __device__ Key key_of(float metric, int anchor) {
    return metric > 0.0f ? (Key)bits_of(metric) << 32 | (LAST - anchor) : 0;
}

// The best TOPK anchor points of each box, best first, and who else wants them; a block of at most
// LANES threads for each.
extern "C" __global__ void search(Pass p) {
    __shared__ float top[TOPK][LANES];       // each lane's best, falling
    __shared__ int at[TOPK][LANES];          // their points
    __shared__ Key best[LANES / WARP][TOPK]; // each warp's, falling
    __shared__ Field fields[MOST_LEVELS];
    const int box = blockIdx.x, lane = threadIdx.x, lanes = blockDim.x, image = image_of(p, box);
    for (int rank = lane; rank < TOPK; rank += lanes)
        p.wanted[box * TOPK + rank] = -1;
    if (p.labels[box] < 0 || p.labels[box] >= p.classes)
        return;  // for all threads alike
    for (int rank = 0; rank < TOPK; rank++)
        top[rank][lane] = 0.0f;
    const Box own = box_at(p.truth, boxes_in(p), box);
    for (int level = lane; level < p.depth; level += lanes) {
        Box wide = own;
        widen(&wide.x1, &wide.x2, p.smallest);
        widen(&wide.y1, &wide.y2, p.smallest);
        fields[level] = field_of(p.levels + 4 * level, wide);
    }
    __syncthreads();
    const long long row = class_place(p, box, 0);
    int level = 0, before = 0;
    for (int k = lane;; k += lanes) {
        while (level < p.depth && k - before >= fields[level].count)
            before += fields[level++].count;
        if (level == p.depth)
            break;
        const Field field = fields[level];
        const int line = (k - before) / field.columns, column = k - before - line * field.columns;
        const int anchor = field.corner + line * field.width + column;
        const long long point = point_of(p, image, anchor);
        const float overlap = pair_of(box_at(p.predicted, points_in(p), point), own).ciou;
        if (!(overlap > 0.0f))
            continue;  // nor if it is no number
        atomicMax(p.ranking + point, (Key)bits_of(overlap) << ROW_BITS | (Key)(ROWS - box));
        const float cube = overlap * overlap * overlap;
        if (cube * cube <= top[TOPK - 1][lane])
            continue;  // a score is at most 1
        const float metric = metric_at(p, row + anchor, overlap);
        if (!(metric > top[TOPK - 1][lane]))
            continue;
        int rank = TOPK - 1;
        for (; rank > 0 && top[rank - 1][lane] < metric; rank--) {
            top[rank][lane] = top[rank - 1][lane];
            at[rank][lane] = at[rank - 1][lane];
        }
        top[rank][lane] = metric;
        at[rank][lane] = anchor;
    }
    for (int rank = 0, next = 0; rank < TOPK; rank++) {
        const Key key = next < TOPK ? key_of(top[next][lane], at[next][lane]) : 0;
        const Key greatest = greatest_in_warp(key);
        if (key && key == greatest)
            next++;
        if (lane % WARP == 0)
            best[lane / WARP][rank] = greatest;
    }
    __syncthreads();
    const int found = lanes / WARP * TOPK;
    for (int i = lane; i < found; i += lanes) {
        const Key key = best[i / TOPK][i % TOPK];
        int rank = 0;
        for (int other = 0; other < found; other++)
            rank += best[other / TOPK][other % TOPK] > key;
        if (!key || rank >= TOPK)
            continue;
        const unsigned slot = (unsigned)box * TOPK + rank;
        const int anchor = LAST - (unsigned)key;
        const long long point = point_of(p, image, anchor);
        p.wanted[slot] = anchor;
        atomicMax(p.earliest + point, LAST - slot);
        atomicMax(p.latest + point, slot + 1);
    }
}

// Which box a slot's point is given to; a thread for each slot.
extern "C" __global__ void settle(Pass p) {
    const int slot = blockIdx.x * blockDim.x + threadIdx.x, wants = slot / TOPK;
    if (wants >= boxes_in(p))
        return;
    p.given[slot] = -1;
    const int anchor = p.wanted[slot];
    const long long point = point_of(p, image_of(p, wants), anchor);
    if (anchor < 0 || LAST - p.earliest[point] != (unsigned)slot)
        return;
    const bool contested = p.latest[point] - 1 > (unsigned)slot;
    const int box = contested ? ROWS - (int)(p.ranking[point] & ROWS) : wants;
    const Box own = box_at(p.predicted, points_in(p), point);
    const float overlap = pair_of(own, box_at(p.truth, boxes_in(p), box)).ciou;
    const float above = fmaxf(overlap, 0.0f);
    const float metric = metric_at(p, class_place(p, box, anchor), above);
    p.given[slot] = box;
    p.ciou[slot] = overlap;
    p.metric[slot] = metric;
    atomicMax(p.highest + box, bits_of(metric));
    atomicMax(p.highest + boxes_in(p) + box, bits_of(above));
}

// What a side should say: a place between two bins.
struct Aim {
    int below;
    float share;
};

static __device__ Aim aim_of(Cell cell, Box target, int side, int bins) {
    const float distance = side == 0   ? cell.x - target.x1
                           : side == 1 ? cell.y - target.y1
                           : side == 2 ? target.x2 - cell.x
                                       : target.y2 - cell.y;
    const float most = (float)(bins - 1) - DFL_MARGIN;
    const float bin = fminf(fmaxf(distance / cell.stride, 0.0f), most);
    return {(int)bin, bin - (float)(int)bin};
}

// Target scores, and what slots add to four sums: 1 - CIoU and distribution focal loss, weighted,
// logit times score, and score; a thread for each slot.
extern "C" __global__ void __launch_bounds__(LANES, 8) terms(Pass p) {
    const int slot = blockIdx.x * blockDim.x + threadIdx.x, slots = boxes_in(p) * TOPK;
    if (slot >= slots)
        return;
    float own[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    const int box = p.given[slot], anchor = p.wanted[slot];
    if (box >= 0) {
        const float most = number_of(p.highest[box]);
        const float overlap = number_of(p.highest[boxes_in(p) + box]);
        const float score = p.metric[slot] * (overlap / (most + SCORE_EPS));
        const Cell cell = cell_of(p, anchor);
        float likely = 0.0f;
#pragma unroll 1
        for (int which = 0; which < 4; which++) {
            const Side side = side_at(p, bins_at(p, image_of(p, box), which, anchor));
            const Aim aim = aim_of(cell, box_at(p.truth, boxes_in(p), box), which, p.bins);
            const float lost = logf(side.total);
            const float low = log_share(side, aim.below, lost);
            const float high = log_share(side, aim.below + 1, lost);
            likely += low + aim.share * (high - low);
        }
        own[0] = (1.0f - p.ciou[slot]) * score;
        own[1] = -0.25f * likely * score;
        own[2] = load(p.class_logits, class_place(p, box, anchor), p.kind) * score;
        own[3] = score;
    }
    p.weight[slot] = own[3];
    for (int i = 0; i < 4; i++)
        p.parts[(long long)i * slots + slot] = own[i];
}

// Softplus over all class logits, added up by each of `threads`.
extern "C" __global__ void softplus(Pass p) {
    const int thread = blockIdx.x * blockDim.x + threadIdx.x;
    const long long count = points_in(p) * p.classes;
    if (thread >= p.threads)
        return;
    float sum = 0.0f, x[MANY];
    for (long long i = thread; i < count; i += (long long)MANY * p.threads) {
        load_many(p.class_logits, i, p.threads, reach_of(i, count), p.kind, x);
#pragma unroll
        for (int k = 0; k < MANY; k++)
            sum += x[k] > 20.0f ? x[k] : log1pf(expf(x[k]));
    }
    p.sums[thread] = sum;
}

// The gradient to class logits as if all were background; a thread for MANY of them.
extern "C" __global__ void background(Pass p) {
    const long long first = (long long)blockIdx.x * blockDim.x * MANY + threadIdx.x;
    const int step = blockDim.x, reach = reach_of(first, points_in(p) * p.classes);
    const float scale = p.by_cls[0];
    float x[MANY];
    load_many(p.class_logits, first, step, reach, p.kind, x);
#pragma unroll
    for (int k = 0; k < MANY; k++)
        x[k] = sigmoid(x[k]) * scale;
    store_many(p.class_gradient, first, step, reach, p.kind, x);
}

// The gradient at the slots, after `background`; a thread for each side of each slot.
extern "C" __global__ void foreground(Pass p) {
    const long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const int slot = thread / 4, which = thread % 4;
    if (slot >= boxes_in(p) * TOPK || p.given[slot] < 0)
        return;
    const int box = p.given[slot], anchor = p.wanted[slot], image = image_of(p, box);
    const float score = p.weight[slot];
    if (which == 0) {
        const long long place = class_place(p, box, anchor);
        const float excess = sigmoid(load(p.class_logits, place, p.kind)) - score;
        store(p.class_gradient, place, p.kind, excess * p.by_cls[0]);
    }
    const Cell cell = cell_of(p, anchor);
    const Box own = box_at(p.predicted, points_in(p), point_of(p, image, anchor));
    const Box target = box_at(p.truth, boxes_in(p), box);
    const float slope = by_side(own, target, pair_of(own, target), which) * (cell.stride * score);
    const long long first = bins_at(p, image, which, anchor);
    const Side side = side_at(p, first);
    const Aim aim = aim_of(cell, target, which, p.bins);
    const float by_distance = slope * p.by_box[0], quarter = score * (p.by_dfl[0] / 4.0f);
    const float part = aim.share * quarter, mean = mean_of(side);
    float gradient[MANY];
#pragma unroll
    for (int k = 0; k < MANY; k++) {
        gradient[k] = ((mean - (float)k) * by_distance + quarter) * (side.parts[k] / side.total);
        gradient[k] += k == aim.below ? part - quarter : k == aim.below + 1 ? -part : 0.0f;
    }
    store_many(p.box_gradient, first, p.anchors, p.bins * p.anchors, p.kind, gradient);
}
