// Products of linear layers, those of few rows apart; attention within samples, and that of one token, for decoding;
// RMS norms, rotary positions and SwiGLU; a whole decoder layer of one token; tokens drawn, and logprobs.

#include <omp.h>

namespace {

constexpr int LANES = 8;      // floats of a vector
constexpr int OUTPUTS = 6;    // weights' rows that a thread takes at a time
constexpr int STRIP = 16;     // rows of x that stand side by side for `across`
constexpr int STRIP_FROM = 9; // fewer are as fast, or faster, by `along`

typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4)));

inline float total(Lanes v) {
  typedef float Half __attribute__((vector_size(2 * LANES)));
  Half halves[2];
  __builtin_memcpy(halves, &v, sizeof v);
  const Half sum = halves[0] + halves[1];
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

typedef float Vector __attribute__((vector_size(4 * LANES)));
// Of the maths library that comes with glibc.
extern "C" Vector _ZGVdN8v_expf(Vector);

// 0 where it would be less than all normal numbers, and no more than they can be: that function makes such as these one
// by one, which takes many times as long.
inline Vector exponential(Vector x) {
  const Vector least = Vector{} - 87.33f, most = Vector{} + 88.72f;
  const Vector some = _ZGVdN8v_expf(x < least ? least : x > most ? most : x);
  return x < least ? Vector{} : some;
}

inline Vector sigmoid(Vector x) {
  const Vector least = Vector{} - 88;
  return x < least ? Vector{} : 1 / (1 + exponential(-x));
}

// Up to LANES numbers, zeros for those that are missing.
inline Vector some_of(const float *from, long count) {
  Vector some = {};
  if (count == LANES)
    __builtin_memcpy(&some, from, sizeof some);
  else
    __builtin_memcpy(&some, from, count * sizeof *from);
  return some;
}

inline void put(float *to, Vector some, long count) {
  if (count == LANES)
    __builtin_memcpy(to, &some, sizeof some);
  else
    __builtin_memcpy(to, &some, count * sizeof *to);
}

// w becomes exp((w - less) * scale); returns the sum.
inline float exponentials(float *w, long n, float less, float scale) {
  Vector sum = {};
  long i = 0;
  for (; i + LANES <= n; i += LANES) {
    const Vector some = exponential((some_of(w + i, LANES) - less) * scale);
    put(w + i, some, LANES);
    sum += some;
  }
  float rest = 0;
  if (i < n) {
    put(w + i, exponential((some_of(w + i, n - i) - less) * scale), n - i);
    for (; i < n; i++) rest += w[i];
  }
  return total(sum) + rest;
}

// In the order in which `exponentials` adds.
inline float added(const float *w, long n) {
  Vector sum = {};
  float rest = 0;
  long i = 0;
  for (; i + LANES <= n; i += LANES) sum += some_of(w + i, LANES);
  for (; i < n; i++) rest += w[i];
  return total(sum) + rest;
}

inline float largest(const float *w, long n) {
  float most = w[0];
  Lanes many = most - Lanes{};
  long i = 0;
  for (; i + LANES <= n; i += LANES) {
    const Lanes some = *reinterpret_cast<const Lanes *>(w + i);
    many = some > many ? some : many;
  }
  for (; i < n; i++) most = w[i] > most ? w[i] : most;
  for (int lane = 0; lane < LANES; lane++) most = many[lane] > most ? many[lane] : most;
  return most;
}

inline float dot(const float *a, const float *b, long n) {
  Lanes sum = {};
  long i = 0;
  for (; i + LANES <= n; i += LANES)
    sum += *reinterpret_cast<const Lanes *>(a + i) * *reinterpret_cast<const Lanes *>(b + i);
  float rest = 0;
  for (; i < n; i++) rest += a[i] * b[i];
  return total(sum) + rest;
}

struct Shape {
  long rows, outputs, inputs;
};

// A layer's `[outputs, inputs]` and `[outputs]`, or null.
struct Linear {
  const float *weight, *bias;
};

// N outputs of R rows, the lanes along k: what few rows wait for is weights from memory, which are asked for early.
template <int N, int R>
inline void along(const float *x, const float *weight, const float *bias, const float *more, float *y, Shape shape) {
  const long k = shape.inputs;
  const float *next = weight + OUTPUTS * k;
  Lanes sums[N][R] = {};
  long i = 0;
  for (; i + LANES <= k; i += LANES) {
    Lanes w[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      w[n] = *reinterpret_cast<const Lanes *>(weight + n * k + i);
      __builtin_prefetch(next + n * k + i);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Lanes value = *reinterpret_cast<const Lanes *>(x + r * k + i);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) sums[n][r] += w[n] * value;
    }
  }
  for (int n = 0; n < N; n++)
    for (int r = 0; r < R; r++) {
      float sum = (more ? more[r * shape.outputs + n] : 0) + (bias ? bias[n] : 0) + total(sums[n][r]);
      for (long j = i; j < k; j++) sum += weight[n * k + j] * x[r * k + j];
      y[r * shape.outputs + n] = sum;
    }
}

template <int N>
void some_along(const float *x, const float *weight, const float *bias, const float *more, float *y, Shape shape) {
  const long k = shape.inputs, outputs = shape.outputs;
  for (long r = 0, taken; r < shape.rows; r += taken) {
    const float *from = x + r * k, *plus = more ? more + r * outputs : more;
    float *to = y + r * outputs;
    taken = shape.rows - r < 4 ? shape.rows - r : 4;
    switch (taken) {
    case 4: along<N, 4>(from, weight, bias, plus, to, shape); break;
    case 3: along<N, 3>(from, weight, bias, plus, to, shape); break;
    case 2: along<N, 2>(from, weight, bias, plus, to, shape); break;
    case 1: along<N, 1>(from, weight, bias, plus, to, shape); break;
    }
  }
}

// N outputs of a strip, the lanes across its rows: nothing has to be added up in the end. `step` is from one of a
// strip's inputs to the next, in floats, `stride` from one output to the next.
template <int N>
inline void across(const float *strip, long step, const float *weight, const float *bias, const float *more, float *y,
                   long stride, Shape shape) {
  constexpr int M = STRIP / LANES;
  const long k = shape.inputs;
  const float *next = weight + OUTPUTS * k;
  Lanes sums[N][M] = {};
  for (long i = 0; i < k; i++) {
    Lanes values[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) values[m] = reinterpret_cast<const Lanes *>(strip + i * step)[m];
    if (i % STRIP == 0) // the next rows of weights as they lie, a line of a cache for each of these
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) __builtin_prefetch(next + i * N + n * STRIP);
#pragma GCC unroll 8
    for (int n = 0; n < N; n++)
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) sums[n][m] += weight[n * k + i] * values[m];
  }
  for (int n = 0; n < N; n++)
    for (long r = 0; r < shape.rows; r++) {
      const long at = r * shape.outputs + n * stride;
      y[at] = (more ? more[at] : 0) + (bias ? bias[n] : 0) + sums[n][r / LANES][r % LANES];
    }
}

// What follows is for the threads of a parallel region to share.

inline long in_strips(long rows) { return rows % STRIP < STRIP_FROM ? rows - rows % STRIP : rows; }

// Rows of x side by side: a strip for each full STRIP of them, and for what is left if it is enough.
void into_strips(const float *x, float *strips, long rows, long inputs) {
#pragma omp for collapse(2)
  for (long first = 0; first < in_strips(rows); first += STRIP)
    for (long i = 0; i < inputs; i++)
      for (long r = 0; r < STRIP; r++)
        strips[first * inputs + i * STRIP + r] = first + r < rows ? x[(first + r) * inputs + i] : 0;
}

// y = more + bias + x times the weights, which are read once; nobody waits for the others in the end.
void multiply_few(const float *x, const float *strips, Linear layer, const float *more, float *y, Shape whole) {
  const long rows = whole.rows, outputs = whole.outputs, inputs = whole.inputs, stripped = in_strips(rows);
#pragma omp for nowait
  for (long n = 0; n < outputs; n += OUTPUTS) {
    const bool full = n + OUTPUTS <= outputs;
    const float *w = layer.weight + n * inputs, *b = layer.bias ? layer.bias + n : nullptr;
    for (long first = 0; first < stripped; first += STRIP) {
      const Shape shape = {rows - first < STRIP ? rows - first : STRIP, outputs, inputs};
      const float *strip = strips + first * inputs, *plus = more ? more + first * outputs + n : more;
      float *to = y + first * outputs + n;
      if (full)
        across<OUTPUTS>(strip, STRIP, w, b, plus, to, 1, shape);
      else
        for (long j = 0; j < outputs - n; j++)
          across<1>(strip, STRIP, w + j * inputs, b ? b + j : b, plus ? plus + j : plus, to + j, 1, shape);
    }
    const Shape shape = {rows - stripped, outputs, inputs};
    const float *from = x + stripped * inputs, *plus = more ? more + stripped * outputs + n : more;
    float *to = y + stripped * outputs + n;
    for (long j = 0; j < (full ? OUTPUTS : outputs - n); j += full ? 3 : 1)
      if (full)
        some_along<3>(from, w + j * inputs, b ? b + j : b, plus ? plus + j : plus, to + j, shape);
      else
        some_along<1>(from, w + j * inputs, b ? b + j : b, plus ? plus + j : plus, to + j, shape);
  }
}

// See `attend`.
void attend_few(const float *q, const float *keys, const float *values, float *y, float *scores, const long *begins,
                long rows, long heads, long group, long tokens, long capacity, long size, float scale) {
#pragma omp for schedule(dynamic)
  for (long task = 0; task < rows * heads; task++) {
    const long begin = begins[task / heads], seen = tokens - begin, whole = seen - seen % 3;
    const float *k = keys + (task * capacity + begin) * size, *v = values + (task * capacity + begin) * size;
    const float *from = q + task * group * size;
    float *to = y + task * group * size, *weights = scores + task * group * tokens;
    const Shape dots = {group, seen, size};
    for (long t = 0; t < whole; t += 3) some_along<3>(from, k + t * size, nullptr, nullptr, weights + t, dots);
    for (long t = whole; t < seen; t++) some_along<1>(from, k + t * size, nullptr, nullptr, weights + t, dots);
    for (long h = 0; h < group; h++) {
      float *w = weights + h * seen;
      const float sum = exponentials(w, seen, largest(w, seen), scale);
      for (long t = 0; t < seen; t++) w[t] /= sum;
    }
    const Shape mixed = {STRIP, 1, seen};
    for (long column = 0; column < size; column += STRIP)
      for (long h = 0, taken; h < group; h += taken) {
        const float *strip = v + column, *w = weights + h * seen;
        float *some = to + h * size + column;
        taken = group - h >= 4 ? 4 : group - h >= 3 ? 3 : 1;
        if (taken == 4) across<4>(strip, size, w, nullptr, nullptr, some, size, mixed);
        if (taken == 3) across<3>(strip, size, w, nullptr, nullptr, some, size, mixed);
        if (taken == 1) across<1>(strip, size, w, nullptr, nullptr, some, size, mixed);
      }
  }
}

// y = x * (offset + weight) over x's root mean square, which may be in place; returns one over that root.
inline float norm_of(const float *x, const float *weight, float *y, long size, float epsilon, float offset) {
  const float scale = 1 / __builtin_sqrtf(dot(x, x, size) / size + epsilon);
  for (long i = 0; i < size; i++) y[i] = (offset + weight[i]) * (x[i] * scale);
  return scale;
}

// y = x turned by a position's angles, or back.
inline void turn(const float *__restrict x, const float *__restrict cosines, const float *__restrict sines,
                 float *__restrict y, long size, bool back) {
  const long half = size / 2;
  if (back)
    for (long i = 0; i < half; i++) {
      y[i] = x[i] * cosines[i] + x[half + i] * sines[half + i];
      y[half + i] = x[half + i] * cosines[half + i] - x[i] * sines[i];
    }
  else
    for (long i = 0; i < half; i++) {
      y[i] = x[i] * cosines[i] - x[half + i] * sines[i];
      y[half + i] = x[half + i] * cosines[half + i] + x[i] * sines[half + i];
    }
}

void gated(const float *gate, const float *up, float *y, long n) {
#pragma omp for
  for (long i = 0; i < n; i += LANES) {
    const long count = n - i < LANES ? n - i : LANES;
    const Vector g = some_of(gate + i, count), u = some_of(up + i, count);
    put(y + i, g * sigmoid(g) * u, count);
  }
}

// The cblas_sgemm of a BLAS whose integers have 32 bits.
typedef void (*Sgemm)(int order, int a_turned, int b_turned, int m, int n, int k, float alpha, const float *a, int lda,
                      const float *b, int ldb, float beta, float *c, int ldc);
constexpr int ROW_MAJOR = 101, AS_IT_LIES = 111, TURNED = 112;

// How many threads share the rows of a product `[m, n]`; the others take its columns. A tile's rows cost the BLAS more
// to bring into its own order than its columns do, so threads share columns only where there are many.
long sharing_rows(long m, long n, long threads) {
  long best = threads;
  for (long some = threads - 1; some > 0; some--)
    if (threads % some == 0 && 3 * m / some + n * some / threads < 3 * m / best + n * best / threads) best = some;
  return best;
}

constexpr long COLUMNS = 2048; // that a BLAS has of b at a time: for a whole vocabulary its copy of b would be large

inline long bound(long whole, long parts, long part) {
  const long size = ((whole + parts - 1) / parts + STRIP - 1) / STRIP * STRIP;
  return part * size < whole ? part * size : whole;
}

constexpr long BLOCK = 512; // numbers whose sum is made in fp32: near that of a whole vocabulary few would count

constexpr long QUERIES = 64; // tokens of a sample whose attention is made at a time

} // namespace

// y = bias + a b, `[m, n]`: every thread has a BLAS make a tile. a is `[m, k]` or, turned, `[k, m]`; b is `[k, n]` or,
// turned, `[n, k]`.
extern "C" void multiply(Sgemm sgemm, const float *a, const float *b, const float *bias, float *y, long m, long n,
                         long k, int a_turned, int b_turned, int threads) {
  const long down = sharing_rows(m, n, threads), across = threads / down;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long tile = 0; tile < threads; tile++) {
    const long top = bound(m, down, tile / across), bottom = bound(m, down, tile / across + 1);
    const long left = bound(n, across, tile % across), right = bound(n, across, tile % across + 1);
    if (top >= bottom) continue;
    for (long column = left, columns; column < right; column += columns) {
      columns = right - column < COLUMNS ? right - column : COLUMNS;
      float *to = y + top * n + column;
      if (bias)
        for (long r = 0; r < bottom - top; r++) __builtin_memcpy(to + r * n, bias + column, columns * sizeof *bias);
      sgemm(ROW_MAJOR, a_turned ? TURNED : AS_IT_LIES, b_turned ? TURNED : AS_IT_LIES, bottom - top, columns, k, 1,
            a + top * (a_turned ? 1 : k), a_turned ? m : k, b + column * (b_turned ? k : 1), b_turned ? k : n,
            bias != nullptr, to, n);
    }
  }
}

// y[r, n] = bias[n] + sum over k of x[r, k] * weight[n, k], with weights as they lie, each read once. `strips` has room
// for all rows of x and 15 more.
extern "C" void few_rows(const float *x, const float *weight, const float *bias, float *y, float *strips, long rows,
                         long outputs, long inputs, int threads) {
#pragma omp parallel num_threads(threads)
  {
    into_strips(x, strips, rows, inputs);
    multiply_few(x, strips, {weight, bias}, nullptr, y, {rows, outputs, inputs});
  }
}

// What each token gets from attention to those of its sample up to itself. Samples stand back to back; `begins` has
// their first tokens, and where the last one ends. q and y: `[tokens, heads, size]`; keys and values: `[tokens, heads /
// group, size]`; logs: `[heads, tokens]`, of the sums that weights were divided by; scratch: `[threads, QUERIES,
// longest]`.
extern "C" void attend_within(Sgemm sgemm, const float *q, const float *keys, const float *values, float *y,
                              float *logs, float *scratch, const long *begins, long samples, long longest, long heads,
                              long group, long size, float scale, int threads) {
  const long tokens = begins[samples], step = heads * size, kept = heads / group * size;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (long task = 0; task < samples * heads; task++) {
    const long begin = begins[task / heads], length = begins[task / heads + 1] - begin, head = task % heads;
    const float *from = q + begin * step + head * size;
    const float *k = keys + begin * kept + head / group * size, *v = values + begin * kept + head / group * size;
    float *to = y + begin * step + head * size, *w = scratch + omp_get_thread_num() * QUERIES * longest;
    for (long first = 0; first < length; first += QUERIES) {
      const long seen = first + QUERIES < length ? first + QUERIES : length, queries = seen - first;
      sgemm(ROW_MAJOR, AS_IT_LIES, TURNED, queries, seen, size, scale, from + first * step, step, k, kept, 0, w, seen);
      for (long i = 0; i < queries; i++) {
        float *row = w + i * seen;
        const long own = first + i + 1;
        const float most = largest(row, own), sum = exponentials(row, own, most, 1);
        for (long t = 0; t < own; t++) row[t] /= sum;
        for (long t = own; t < seen; t++) row[t] = 0;
        logs[head * tokens + begin + first + i] = most + __builtin_logf(sum);
      }
      sgemm(ROW_MAJOR, AS_IT_LIES, AS_IT_LIES, queries, size, seen, 1, w, seen, v, kept, 0, to + first * step, step);
    }
  }
}

// The gradients of that, from y's; those of keys and values for each head of the group, `[tokens, heads, size]`, zeros
// at first. scratch: `[threads, 2, QUERIES, longest]`.
extern "C" void attend_within_backward(Sgemm sgemm, const float *of_y, const float *q, const float *keys,
                                       const float *values, const float *y, const float *logs, float *of_q,
                                       float *of_keys, float *of_values, float *scratch, const long *begins,
                                       long samples, long longest, long heads, long group, long size, float scale,
                                       int threads) {
  const long tokens = begins[samples], step = heads * size, kept = heads / group * size;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (long task = 0; task < samples * heads; task++) {
    const long begin = begins[task / heads], length = begins[task / heads + 1] - begin, head = task % heads;
    const long at = begin * step + head * size;
    const float *k = keys + begin * kept + head / group * size, *v = values + begin * kept + head / group * size;
    float *w = scratch + omp_get_thread_num() * 2 * QUERIES * longest, *of_w = w + QUERIES * longest;
    for (long first = 0; first < length; first += QUERIES) {
      const long seen = first + QUERIES < length ? first + QUERIES : length, queries = seen - first;
      const long here = at + first * step;
      sgemm(ROW_MAJOR, AS_IT_LIES, TURNED, queries, seen, size, scale, q + here, step, k, kept, 0, w, seen);
      sgemm(ROW_MAJOR, AS_IT_LIES, TURNED, queries, seen, size, 1, of_y + here, step, v, kept, 0, of_w, seen);
      for (long i = 0; i < queries; i++) {
        float *row = w + i * seen, *of_row = of_w + i * seen;
        const long own = first + i + 1;
        const float mean = dot(of_y + here + i * step, y + here + i * step, size);
        exponentials(row, own, logs[head * tokens + begin + first + i], 1);
        for (long t = 0; t < own; t++) of_row[t] = row[t] * (of_row[t] - mean) * scale;
        for (long t = own; t < seen; t++) row[t] = of_row[t] = 0;
      }
      sgemm(ROW_MAJOR, TURNED, AS_IT_LIES, seen, size, queries, 1, w, seen, of_y + here, step, 1, of_values + at, step);
      sgemm(ROW_MAJOR, TURNED, AS_IT_LIES, seen, size, queries, 1, of_w, seen, q + here, step, 1, of_keys + at, step);
      sgemm(ROW_MAJOR, AS_IT_LIES, AS_IT_LIES, queries, size, seen, 1, of_w, seen, k, kept, 0, of_q + here, step);
    }
  }
}

// What one new token of each row gets from attention to those of the row that are there from `begins` on. Keys and
// values: `[rows, heads, capacity, size]`; q and y: `[rows, heads * group, size]`; scores: `[rows, heads * group,
// tokens]`. The size is a multiple of STRIP, the scale above 0.
extern "C" void attend(const float *q, const float *keys, const float *values, float *y, float *scores,
                       const long *begins, long rows, long heads, long group, long tokens, long capacity, long size,
                       float scale, int threads) {
#pragma omp parallel num_threads(threads)
  attend_few(q, keys, values, y, scores, begins, rows, heads, group, tokens, capacity, size, scale);
}

// y = x * (offset + weight) over the root mean square of each row, `[rows, size]`; scales: `[rows]`, one over that
// root.
extern "C" void norm(const float *x, const float *weight, float *y, float *scales, long rows, long size,
                     float epsilon, float offset, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long row = 0; row < rows; row++)
    scales[row] = norm_of(x + row * size, weight, y + row * size, size, epsilon, offset);
}

// The gradients of that, from y's; that of the weight, unless null, in parts to be added up: `[threads, size]`, zeros
// at first.
extern "C" void norm_backward(const float *__restrict of_y, const float *__restrict x, const float *__restrict weight,
                              const float *__restrict scales, float *__restrict of_x, float *__restrict of_weight,
                              long rows, long size, float offset, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long row = 0; row < rows; row++) {
    const float *from = x + row * size, *given = of_y + row * size;
    float *to = of_x + row * size;
    const float scale = scales[row];
    for (long i = 0; i < size; i++) to[i] = (offset + weight[i]) * given[i];
    const float mean = dot(to, from, size) / size * scale * scale;
    for (long i = 0; i < size; i++) to[i] = (to[i] - from[i] * mean) * scale;
    if (!of_weight) continue;
    float *part = of_weight + omp_get_thread_num() * size;
    for (long i = 0; i < size; i++) part[i] += given[i] * (from[i] * scale);
  }
}

// y = x turned by its position's angles, or back, `[tokens, heads, size]`; cosines and sines: `[positions, size]`, and
// token t has those of t modulo positions.
extern "C" void rotate(const float *x, const float *cosines, const float *sines, float *y, long tokens, long heads,
                       long size, long positions, int back, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long t = 0; t < tokens; t++) {
    const long angles = t % positions * size;
    for (long h = t * heads; h < (t + 1) * heads; h++)
      turn(x + h * size, cosines + angles, sines + angles, y + h * size, size, back);
  }
}

// y = silu(gate) * up, n of each.
extern "C" void swiglu(const float *gate, const float *up, float *y, long n, int threads) {
#pragma omp parallel num_threads(threads)
  gated(gate, up, y, n);
}

// The gradients of that, from y's.
extern "C" void swiglu_backward(const float *of_y, const float *gate, const float *up, float *of_gate, float *of_up,
                                long n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long i = 0; i < n; i += LANES) {
    const long count = n - i < LANES ? n - i : LANES;
    const Vector g = some_of(gate + i, count), u = some_of(up + i, count), given = some_of(of_y + i, count);
    const Vector open = sigmoid(g);
    put(of_up + i, given * (g * open), count);
    put(of_gate + i, given * u * (open * (1 + g * (1 - open))), count);
  }
}

// A decoder layer as in Llama: what does not change from step to step.
struct Layer {
  const float *norm, *norm_of_mlp, *norm_of_q, *norm_of_k; // the latter two may be null
  Linear q, k, v, o, gate, up, down;
  long width, heads, kept, size, inner; // of x, heads of queries and of keys, their size, and that of the MLP
  float epsilon, scale;
  int rotates;
};

// Room for what is made on the way, of as many rows as there are.
struct Room {
  float *x;                  // `[rows, width]`
  float *strips;             // rows and 15 more of the widest
  float *q, *attended;       // `[rows, heads, size]`
  float *k, *v;              // `[rows, kept, size]`
  float *scores;             // `[rows, heads, tokens]`
  float *middle;             // `[rows, width]`
  float *gate, *up;          // `[rows, inner]`
};

// One new token of each row, x to y, `[rows, width]`. Its key and value come to stand in the column `filled` of
// `[rows, kept, capacity, size]`, and it sees those of its row from `begins` on. Cosines and sines: `[positions,
// size]`, and row r has those of r modulo positions.
extern "C" void decode(const Layer *layer, const Room *room, const float *x, float *y, const float *cosines,
                       const float *sines, float *keys, float *values, const long *begins, long rows, long positions,
                       long filled, long capacity, int threads) {
  const Layer l = *layer;
  const Room at = *room;
  const long size = l.size, of_q = l.heads * size, of_k = l.kept * size;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (long r = 0; r < rows; r++) norm_of(x + r * l.width, l.norm, at.x + r * l.width, l.width, l.epsilon, 0);
    into_strips(at.x, at.strips, rows, l.width);
    multiply_few(at.x, at.strips, l.q, nullptr, at.q, {rows, of_q, l.width});
    multiply_few(at.x, at.strips, l.k, nullptr, at.k, {rows, of_k, l.width});
    multiply_few(at.x, at.strips, l.v, nullptr, at.v, {rows, of_k, l.width});
#pragma omp barrier
#pragma omp for
    for (long r = 0; r < rows; r++) {
      const float *c = cosines + r % positions * size, *s = sines + r % positions * size;
      for (long h = 0; h < l.heads; h++) {
        // In the place of what attention gives, which is not there yet.
        float *q = at.q + r * of_q + h * size, *turned = at.attended + r * of_q + h * size;
        if (l.norm_of_q) norm_of(q, l.norm_of_q, q, size, l.epsilon, 0);
        if (!l.rotates) continue;
        turn(q, c, s, turned, size, false);
        __builtin_memcpy(q, turned, size * sizeof *q);
      }
      for (long h = 0; h < l.kept; h++) {
        float *k = at.k + r * of_k + h * size;
        const long to = ((r * l.kept + h) * capacity + filled) * size;
        if (l.norm_of_k) norm_of(k, l.norm_of_k, k, size, l.epsilon, 0);
        if (l.rotates)
          turn(k, c, s, keys + to, size, false);
        else
          __builtin_memcpy(keys + to, k, size * sizeof *k);
        __builtin_memcpy(values + to, at.v + r * of_k + h * size, size * sizeof *values);
      }
    }
    attend_few(at.q, keys, values, at.attended, at.scores, begins, rows, l.kept, l.heads / l.kept, filled + 1, capacity,
               size, l.scale);
    into_strips(at.attended, at.strips, rows, of_q);
    multiply_few(at.attended, at.strips, l.o, x, at.middle, {rows, l.width, of_q});
#pragma omp barrier
#pragma omp for
    for (long r = 0; r < rows; r++)
      norm_of(at.middle + r * l.width, l.norm_of_mlp, at.x + r * l.width, l.width, l.epsilon, 0);
    into_strips(at.x, at.strips, rows, l.width);
    multiply_few(at.x, at.strips, l.gate, nullptr, at.gate, {rows, l.inner, l.width});
    multiply_few(at.x, at.strips, l.up, nullptr, at.up, {rows, l.inner, l.width});
#pragma omp barrier
    gated(at.gate, at.up, at.gate, rows * l.inner);
    into_strips(at.gate, at.strips, rows, l.inner);
    multiply_few(at.gate, at.strips, l.down, at.middle, y, {rows, l.width, l.inner});
  }
}

// A token of each row of scores, `[rows, vocabulary]`, drawn with the softmax of the row: the first one up to which
// there is more than a share of all, `shares`, from 0 to below 1. Its logprob, too. scratch: `[threads, vocabulary]`.
extern "C" void draw(const float *scores, const double *shares, long *tokens, float *logprobs, float *scratch,
                     long rows, long vocabulary, int threads) {
  // What is there of it from `first` on.
  const auto block = [vocabulary](long first) { return first + BLOCK < vocabulary ? BLOCK : vocabulary - first; };
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (long row = 0; row < rows; row++) {
    const float *own = scores + row * vocabulary, most = largest(own, vocabulary);
    float *w = scratch + omp_get_thread_num() * vocabulary;
    __builtin_memcpy(w, own, vocabulary * sizeof *w);
    double total = 0, below = 0;
    for (long first = 0; first < vocabulary; first += BLOCK) total += exponentials(w + first, block(first), most, 1);
    double at = shares[row] * total;
    if (at >= total) at = __builtin_nextafter(total, 0); // by rounding
    long chosen = 0;
    for (long first = 0; first < vocabulary; first += BLOCK) {
      const float sum = added(w + first, block(first));
      if (below + sum <= at) {
        below += sum;
        continue;
      }
      for (long i = first; i < first + block(first); i++) {
        if (w[i] > 0) chosen = i; // the last one, should rounding leave none
        below += w[i];
        if (below > at) break;
      }
      break;
    }
    tokens[row] = chosen;
    logprobs[row] = own[chosen] - most - __builtin_log(total);
  }
}

// Logprobs of chosen tokens and entropies of the rows of logits over a temperature, `[rows, vocabulary]`. `slopes`,
// unless null, become the gradients of the logprobs with respect to the logits, times what is `given` for each row.
// scratch, if there are none: `[threads, vocabulary]`.
extern "C" void logprobs(const float *logits, const long *chosen, const float *given, float *slopes, float *logprobs,
                         float *entropies, float *scratch, long rows, long vocabulary, float temperature, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (long row = 0; row < rows; row++) {
    const float *own = logits + row * vocabulary, most = largest(own, vocabulary) / temperature;
    float *w = slopes ? slopes + row * vocabulary : scratch + omp_get_thread_num() * vocabulary;
    double all = 0, weighted = 0;
    for (long first = 0, end; first < vocabulary; first = end) { // in double what fp32 would round away
      end = first + BLOCK < vocabulary ? first + BLOCK : vocabulary;
      Vector sum = {}, of_logits = {};
      for (long i = first; i < end; i += LANES) {
        const long count = end - i < LANES ? end - i : LANES;
        Vector x = some_of(own + i, count) / temperature - most;
        const Vector least = Vector{} - 1e30f; // of minus infinity there is nothing, either
        x = x < least ? least : x;
        Vector some = exponential(x);
        for (long lane = count; lane < LANES; lane++) some[lane] = 0;
        put(w + i, some, count);
        sum += some;
        of_logits += some * x;
      }
      all += total(sum);
      weighted += total(of_logits);
    }
    const double log = __builtin_log(all);
    logprobs[row] = own[chosen[row]] / temperature - most - log;
    entropies[row] = log - weighted / all;
    if (!slopes) continue;
    const float scale = given[row] / temperature, less = scale / all;
    for (long i = 0; i < vocabulary; i++) w[i] *= -less;
    w[chosen[row]] += scale;
  }
}
