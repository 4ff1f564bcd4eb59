// y[r, n] = bias[n] + sum over k of x[r, k] * weight[n, k] for few rows r, with weights as they lie, each read once.

namespace {

constexpr int LANES = 8;      // floats of a vector
constexpr int OUTPUTS = 6;    // weights' rows that a thread takes at a time
constexpr int STRIP = 16;     // rows of x that stand side by side for `across`
constexpr int STRIP_FROM = 9; // fewer are as fast, or faster, by `along`

typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4)));

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
      float sum = bias ? bias[n] : 0;
      for (int lane = 0; lane < LANES; lane++) sum += sums[n][r][lane];
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

// N outputs of a strip, the lanes across its rows: nothing has to be added up in the end.
template <int N>
void across(const float *strip, const float *weight, const float *bias, float *y, Shape shape) {
  constexpr int M = STRIP / LANES;
  const long k = shape.inputs;
  const float *next = weight + OUTPUTS * k;
  Lanes sums[N][M] = {};
  for (long i = 0; i < k; i++) {
    Lanes values[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) values[m] = reinterpret_cast<const Lanes *>(strip + i * STRIP)[m];
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
      y[r * shape.outputs + n] = (bias ? bias[n] : 0) + sums[n][r / LANES][r % LANES];
}

} // namespace

// `strips` has room for all rows of x and 15 more.
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
          across<OUTPUTS>(strip, w, b, to, shape);
        else
          for (long j = 0; j < outputs - n; j++) across<1>(strip, w + j * inputs, b ? b + j : b, to + j, shape);
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
