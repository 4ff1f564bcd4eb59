// Products of linear layers, those of few rows apart; attention within samples, and that of one token, for decoding;
// RMS norms, rotary positions and SwiGLU.

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
    const Vector some = _ZGVdN8v_expf((some_of(w + i, LANES) - less) * scale);
    put(w + i, some, LANES);
    sum += some;
  }
  float rest = 0;
  if (i < n) {
    put(w + i, _ZGVdN8v_expf((some_of(w + i, n - i) - less) * scale), n - i);
    for (; i < n; i++) rest += w[i];
  }
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

// N outputs of R rows, the lanes along k: what few rows wait for is weights from memory, which are asked for early.
template <int N, int R>
inline void along(const float *x, const float *weight, const float *bias, float *y, Shape shape) {
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
      float sum = (bias ? bias[n] : 0) + total(sums[n][r]);
      for (long j = i; j < k; j++) sum += weight[n * k + j] * x[r * k + j];
      y[r * shape.outputs + n] = sum;
    }
}

template <int N>
void some_along(const float *x, const float *weight, const float *bias, float *y, Shape shape) {
  const long k = shape.inputs, outputs = shape.outputs;
  long r = 0;
  for (; shape.rows - r >= 4; r += 4) along<N, 4>(x + r * k, weight, bias, y + r * outputs, shape);
  switch (shape.rows - r) {
  case 3: along<N, 3>(x + r * k, weight, bias, y + r * outputs, shape); break;
  case 2: along<N, 2>(x + r * k, weight, bias, y + r * outputs, shape); break;
  case 1: along<N, 1>(x + r * k, weight, bias, y + r * outputs, shape); break;
  }
}

// N outputs of a strip, the lanes across its rows: nothing has to be added up in the end. `step` is from one of a
// strip's inputs to the next, in floats, `stride` from one output to the next.
template <int N>
inline void across(const float *strip, long step, const float *weight, const float *bias, float *y, long stride,
                   Shape shape) {
  constexpr int M = STRIP / LANES;
  const long k = shape.inputs;
  const float *next = weight + OUTPUTS * k;
  Lanes sums[N][M] = {};
  for (long i = 0; i < k; i++) {
    Lanes values[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) values[m] = reinterpret_cast<const Lanes *>(strip + i * step)[m];
    if (i % 16 == 0)
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) __builtin_prefetch(next + n * k + i);
#pragma GCC unroll 8
    for (int n = 0; n < N; n++)
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) sums[n][m] += weight[n * k + i] * values[m];
  }
  for (int n = 0; n < N; n++)
    for (long r = 0; r < shape.rows; r++)
      y[r * shape.outputs + n * stride] = (bias ? bias[n] : 0) + sums[n][r / LANES][r % LANES];
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

// y[r, n] = bias[n] + sum over k of x[r, k] * weight[n, k], with weights as they lie, each read once. A strip for each
// full STRIP of rows, and for what is left if it is enough; `strips` has room for all rows of x and 15 more.
extern "C" void few_rows(const float *x, const float *weight, const float *bias, float *y, float *strips, long rows,
                         long outputs, long inputs, int threads) {
  const long rest = rows % STRIP;
  const long in_strips = rest < STRIP_FROM ? rows - rest : rows;
  const long count = (in_strips + STRIP - 1) / STRIP;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for collapse(2)
    for (long s = 0; s < count; s++)
      for (long i = 0; i < inputs; i++)
        for (long r = 0; r < STRIP; r++) {
          const long row = s * STRIP + r;
          strips[(s * inputs + i) * STRIP + r] = row < rows ? x[row * inputs + i] : 0;
        }
#pragma omp for
    for (long block = 0; block < (outputs + OUTPUTS - 1) / OUTPUTS; block++) {
      const long n = block * OUTPUTS;
      const bool whole = n + OUTPUTS <= outputs;
      const float *w = weight + n * inputs, *b = bias ? bias + n : nullptr;
      for (long s = 0; s < count; s++) {
        const long first = s * STRIP;
        const Shape shape = {rows - first < STRIP ? rows - first : STRIP, outputs, inputs};
        const float *strip = strips + first * inputs;
        float *to = y + first * outputs + n;
        if (whole)
          across<OUTPUTS>(strip, STRIP, w, b, to, 1, shape);
        else
          for (long j = 0; j < outputs - n; j++)
            across<1>(strip, STRIP, w + j * inputs, b ? b + j : b, to + j, 1, shape);
      }
      const Shape shape = {rows - in_strips, outputs, inputs};
      const float *from = x + in_strips * inputs;
      float *to = y + in_strips * outputs + n;
      for (long j = 0; j < (whole ? OUTPUTS : outputs - n); j += whole ? 3 : 1)
        if (whole)
          some_along<3>(from, w + j * inputs, b ? b + j : b, to + j, shape);
        else
          some_along<1>(from, w + j * inputs, b ? b + j : b, to + j, shape);
    }
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
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (long task = 0; task < rows * heads; task++) {
    const long begin = begins[task / heads], seen = tokens - begin, whole = seen - seen % 3;
    const float *k = keys + (task * capacity + begin) * size, *v = values + (task * capacity + begin) * size;
    const float *from = q + task * group * size;
    float *to = y + task * group * size, *weights = scores + task * group * tokens;
    const Shape dots = {group, seen, size};
    for (long t = 0; t < whole; t += 3) some_along<3>(from, k + t * size, nullptr, weights + t, dots);
    for (long t = whole; t < seen; t++) some_along<1>(from, k + t * size, nullptr, weights + t, dots);
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
        if (taken == 4) across<4>(strip, size, w, nullptr, some, size, mixed);
        if (taken == 3) across<3>(strip, size, w, nullptr, some, size, mixed);
        if (taken == 1) across<1>(strip, size, w, nullptr, some, size, mixed);
      }
  }
}

// y = x * (offset + weight) over the root mean square of each row, `[rows, size]`; scales: `[rows]`, one over that root.
extern "C" void norm(const float *__restrict x, const float *__restrict weight, float *__restrict y,
                     float *__restrict scales, long rows, long size, float epsilon, float offset, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long row = 0; row < rows; row++) {
    const float *from = x + row * size;
    float *to = y + row * size;
    const float scale = scales[row] = 1 / __builtin_sqrtf(dot(from, from, size) / size + epsilon);
    for (long i = 0; i < size; i++) to[i] = (offset + weight[i]) * (from[i] * scale);
  }
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
extern "C" void rotate(const float *__restrict x, const float *__restrict cosines, const float *__restrict sines,
                       float *__restrict y, long tokens, long heads, long size, long positions, int back, int threads) {
  const long half = size / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long t = 0; t < tokens; t++) {
    const float *c = cosines + t % positions * size, *s = sines + t % positions * size;
    for (long h = t * heads; h < (t + 1) * heads; h++) {
      const float *a = x + h * size, *b = a + half;
      float *to = y + h * size;
      if (back)
        for (long i = 0; i < half; i++) {
          to[i] = a[i] * c[i] + b[i] * s[half + i];
          to[half + i] = b[i] * c[half + i] - a[i] * s[i];
        }
      else
        for (long i = 0; i < half; i++) {
          to[i] = a[i] * c[i] - b[i] * s[i];
          to[half + i] = b[i] * c[half + i] + a[i] * s[half + i];
        }
    }
  }
}

// y = silu(gate) * up, n of each.
extern "C" void swiglu(const float *gate, const float *up, float *y, long n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long i = 0; i < n; i += LANES) {
    const long count = n - i < LANES ? n - i : LANES;
    const Vector g = some_of(gate + i, count), u = some_of(up + i, count);
    put(y + i, g / (1 + _ZGVdN8v_expf(-g)) * u, count);
  }
}

// The gradients of that, from y's.
extern "C" void swiglu_backward(const float *of_y, const float *gate, const float *up, float *of_gate, float *of_up,
                                long n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long i = 0; i < n; i += LANES) {
    const long count = n - i < LANES ? n - i : LANES;
    const Vector g = some_of(gate + i, count), u = some_of(up + i, count), given = some_of(of_y + i, count);
    const Vector open = 1 / (1 + _ZGVdN8v_expf(-g));
    put(of_up + i, given * (g * open), count);
    put(of_gate + i, given * u * (open * (1 + g * (1 - open))), count);
  }
}
