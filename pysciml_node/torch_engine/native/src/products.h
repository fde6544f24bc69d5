/* Products of small matrices whose sizes are constants, by vectors of the processor's width.

   Weights are packed: their rows are padded with zeros to whole vectors (`w_stride`). Values lie
   in buffers with room for one vector behind their last entry, so that the last vector of a row may
   be stored whole: what it covers belongs to the next row and is written later. */

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
typedef REAL vec __attribute__((vector_size(VECTOR_BYTES)));
typedef REAL loose __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));
#define LANES ((int)(VECTOR_BYTES / sizeof(REAL)))
#define LOAD(p) ((vec) * (const loose *)(p))
#define STORE(p, v) (*(loose *)(p) = (loose)(v))

PSN_INLINE REAL psn_sum_of_lanes(vec v) {
  union { vec v; REAL x[VECTOR_BYTES / sizeof(REAL)]; } u = {v};
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) u.x[i] += u.x[i + half];
  return u.x[0];
}

/* The products of two rows by lanes: their whole vectors. */
PSN_INLINE vec psn_products(int inner, const REAL *a, const REAL *b) {
  vec sum = {0};
  for (int i = 0; i + LANES <= inner; i += LANES) sum += LOAD(a + i) * LOAD(b + i);
  return sum;
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLES
#endif
#endif
#ifdef SHUFFLES
typedef REAL quad __attribute__((vector_size(4 * sizeof(REAL))));

PSN_INLINE quad psn_quarter(vec v) {
  union { vec v; quad q[VECTOR_BYTES < sizeof(quad) ? 1 : VECTOR_BYTES / sizeof(quad)]; } u = {v};
  quad sum = u.q[0];
  for (int i = 1; i < (int)(VECTOR_BYTES / sizeof(quad)); i++) sum += u.q[i];
  return sum;
}

/* Four sums of lanes at once. */
PSN_INLINE quad psn_four_sums(quad a, quad b, quad c, quad d) {
  quad p = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  quad q = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return __builtin_shufflevector(p, q, 0, 1, 4, 5) + __builtin_shufflevector(p, q, 2, 3, 6, 7);
}
#endif

/* rows (at most 4) times vectors (at most 4) of y = start + x w; start is a row, or 0. */
PSN_INLINE void psn_tile(int rows, int vectors, int inner, const REAL *x, int x_stride,
                         const REAL *w, int w_stride, const REAL *start, REAL *y, int y_stride) {
  vec sum[4][4];
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vectors; v++) sum[r][v] = start ? LOAD(start + v * LANES) : (vec){0};
  for (int i = 0; i < inner; i++)
    for (int v = 0; v < vectors; v++) {
      vec weight = LOAD(w + i * w_stride + v * LANES);
      for (int r = 0; r < rows; r++) sum[r][v] += x[r * x_stride + i] * weight;
    }
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vectors; v++) STORE(y + r * y_stride + v * LANES, sum[r][v]);
}

PSN_INLINE void psn_tiles(int vectors, int rows, int inner, const REAL *x, int x_stride,
                          const REAL *w, int w_stride, const REAL *start, REAL *y, int y_stride) {
  if (rows == 4) {
    psn_tile(4, vectors, inner, x, x_stride, w, w_stride, start, y, y_stride);
    return;
  }
  for (int r = 0; r < rows; r++)
    psn_tile(1, vectors, inner, x + r * x_stride, x_stride, w, w_stride, start, y + r * y_stride,
             y_stride);
}

/* y (rows, columns) = start + x (rows, inner) w (inner, columns), columns by vectors.

   Of a block of rows the last columns come first: they cover the start of the next row. */
PSN_INLINE void psn_by_columns(int rows, int inner, int columns, const REAL *x, int x_stride,
                               const REAL *w, int w_stride, const REAL *start, REAL *y,
                               int y_stride) {
  int vectors = (columns + LANES - 1) / LANES, whole = vectors / 4 * 4 * LANES;
  for (int r = 0; r < rows; r += 4) {
    int count = rows - r < 4 ? rows - r : 4;
    const REAL *x_r = x + r * x_stride, *s = start ? start + whole : 0;
    REAL *y_r = y + r * y_stride;
#define LAST(k)                                                                                    \
  if (vectors % 4 == k)                                                                            \
    psn_tiles(k, count, inner, x_r, x_stride, w + whole, w_stride, s, y_r + whole, y_stride);
    LAST(1) LAST(2) LAST(3)
#undef LAST
    for (int c = whole - 4 * LANES; c >= 0; c -= 4 * LANES)
      psn_tiles(4, count, inner, x_r, x_stride, w + c, w_stride, start ? start + c : 0, y_r + c,
                y_stride);
  }
}

/* y (rows, columns) = start + x (rows, inner) w (columns, inner)^T, few columns: inner by vectors. */
PSN_INLINE void psn_by_inner(int rows, int inner, int columns, const REAL *x, int x_stride,
                             const REAL *w, int w_stride, const REAL *start, REAL *y,
                             int y_stride) {
  int whole = inner / LANES * LANES, r = 0;
#ifdef SHUFFLES
  if (whole && VECTOR_BYTES >= sizeof(quad))
    for (; r + 4 <= rows; r += 4)
      for (int c = 0; c < columns; c++) {
        const REAL *a = x + r * x_stride, *b = w + c * w_stride;
        quad part[4];
        for (int j = 0; j < 4; j++) part[j] = psn_quarter(psn_products(inner, a + j * x_stride, b));
        quad sums = psn_four_sums(part[0], part[1], part[2], part[3]);
        for (int j = 0; j < 4; j++) {
          REAL total = start ? start[c] + sums[j] : sums[j];
          for (int i = whole; i < inner; i++) total += a[j * x_stride + i] * b[i];
          y[(r + j) * y_stride + c] = total;
        }
      }
#endif
  for (; r < rows; r++)
    for (int c = 0; c < columns; c++) {
      const REAL *a = x + r * x_stride, *b = w + c * w_stride;
      REAL total = start ? start[c] : 0;
      if (whole) total += psn_sum_of_lanes(psn_products(inner, a, b));
      for (int i = whole; i < inner; i++) total += a[i] * b[i];
      y[r * y_stride + c] = total;
    }
}

/* Tiles of g (first, second) += a (rows, first)^T b (rows, second). */
PSN_INLINE void psn_outer_tile(int firsts, int vectors, int rows, const REAL *a, int a_stride,
                               const REAL *b, int b_stride, REAL *g, int g_stride) {
  vec sum[4][4];
  for (int f = 0; f < firsts; f++)
    for (int v = 0; v < vectors; v++) sum[f][v] = LOAD(g + f * g_stride + v * LANES);
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vectors; v++) {
      vec factor = LOAD(b + r * b_stride + v * LANES);
      for (int f = 0; f < firsts; f++) sum[f][v] += a[r * a_stride + f] * factor;
    }
  for (int f = 0; f < firsts; f++)
    for (int v = 0; v < vectors; v++) STORE(g + f * g_stride + v * LANES, sum[f][v]);
}

/* g (first, second) += a (rows, first)^T b (rows, second); g's rows are padded, and what falls into
   their padding is never read. */
PSN_INLINE void psn_outer(int rows, int first, int second, const REAL *a, int a_stride,
                          const REAL *b, int b_stride, REAL *g, int g_stride) {
  int vectors = (second + LANES - 1) / LANES;
  for (int f = 0; f < first; f += 4)
    for (int v = 0; v < vectors; v += 4) {
      const REAL *a_f = a + f, *b_v = b + v * LANES;
      REAL *g_f = g + f * g_stride + v * LANES;
      int firsts = first - f < 4 ? first - f : 4, several = vectors - v < 4 ? vectors - v : 4;
#define TILE(m, k)                                                                                 \
  if (firsts == m && several == k)                                                                 \
    psn_outer_tile(m, k, rows, a_f, a_stride, b_v, b_stride, g_f, g_stride);
#define TILES(m) TILE(m, 1) TILE(m, 2) TILE(m, 3) TILE(m, 4)
      TILES(1) TILES(2) TILES(3) TILES(4)
#undef TILES
#undef TILE
    }
}

/* w (rows, columns) into rows of `stride`, as it is or turned; the padding is zero already. */
static void psn_pack(int rows, int columns, const REAL *w, int stride, int turned, REAL *out) {
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < columns; c++)
      out[turned ? c * stride + r : r * stride + c] = w[r * columns + c];
}

static void psn_unpack(int rows, int columns, const REAL *packed, int stride, int turned, REAL *g) {
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < columns; c++)
      g[r * columns + c] += packed[turned ? c * stride + r : r * stride + c];
}

/* y (m, n) = a b of one of a stack; strides say how each lies. ADD: y += a b. */
static void psn_matmul(int m, int inner, int n, const REAL *a, int a_row, int a_column,
                       const REAL *b, int b_row, int b_column, REAL *y, int y_row, int y_column) {
  for (int r = 0; r < m; r++)
    for (int c = 0; c < n; c++) {
      REAL sum = 0;
      for (int i = 0; i < inner; i++) sum += a[r * a_row + i * a_column] * b[i * b_row + c * b_column];
      y[r * y_row + c * y_column] += sum;
    }
}

#ifdef ABREAST
/* Some columns of the next. */
PSN_INLINE void psn_product_tile(int columns, int add, int inner, const REAL *a, int a_column,
                                 int a_lane, const REAL *b, int b_row, int b_column, int b_lane,
                                 REAL *y, int y_column, int y_lane) {
  REAL sum[4][ABREAST] = {{0}};
  for (int i = 0; i < inner; i++)
    for (int c = 0; c < columns; c++)
#pragma omp simd
      for (int l = 0; l < ABREAST; l++)
        sum[c][l] += a[i * a_column + l * a_lane] * b[i * b_row + c * b_column + l * b_lane];
  for (int c = 0; c < columns; c++) {
    REAL *out = y + c * y_column;
    if (y_lane) {
#pragma omp simd
      for (int l = 0; l < ABREAST; l++) out[l] = add ? out[l] + sum[c][l] : sum[c][l];
    } else {
      REAL total = 0;
#pragma omp simd reduction(+ : total)
      for (int l = 0; l < ABREAST; l++) total += sum[c][l];
      *out = add ? *out + total : total;
    }
  }
}

/* y (m, n) = a b, or y += a b, for members abreast. A lane of 0 is an operand that they share; in y
   their sum. */
PSN_INLINE void psn_product(int add, int m, int inner, int n, const REAL *a, int a_row, int a_column,
                            int a_lane, const REAL *b, int b_row, int b_column, int b_lane, REAL *y,
                            int y_row, int y_column, int y_lane) {
  for (int r = 0; r < m; r++) {
    const REAL *a_r = a + r * a_row;
    REAL *y_r = y + r * y_row;
    int c = 0;
    for (; c + 4 <= n; c += 4)
      psn_product_tile(4, add, inner, a_r, a_column, a_lane, b + c * b_column, b_row, b_column,
                       b_lane, y_r + c * y_column, y_column, y_lane);
    for (; c < n; c++)
      psn_product_tile(1, add, inner, a_r, a_column, a_lane, b + c * b_column, b_row, b_column,
                       b_lane, y_r + c * y_column, y_column, y_lane);
  }
}
#endif

/* Entries of x (outer, n, inner) at places along its second axis, by members where there are
   several; what lies outside is NaN. */
typedef struct {
  int outer, n, inner, places, x_lanes, lanes;
} Pick;

#define PICK_LOOPS(BODY)                                                                           \
  int width = s.x_lanes > s.lanes ? s.x_lanes : s.lanes;                                           \
  for (int o = 0; o < s.outer; o++)                                                                \
    for (int i = 0; i < s.places; i++)                                                             \
      for (int l = 0; l < width; l++) {                                                            \
        REAL place = index[i * s.lanes + l % s.lanes];                                             \
        int inside = place >= 0 && place < s.n;                                                    \
        int from = (o * s.n + (inside ? (int)place : 0)) * s.inner * s.x_lanes + l % s.x_lanes;    \
        int to = (o * s.places + i) * s.inner * width + l;                                         \
        for (int j = 0; j < s.inner; j++) BODY                                                     \
      }

PSN_INLINE void psn_pick(Pick s, const REAL *x, const REAL *index, REAL *y) {
  PICK_LOOPS(y[to + j * width] = inside ? x[from + j * s.x_lanes] : (REAL)NAN;)
}

/* Adds to the cotangent of x. */
PSN_INLINE void psn_pick_pull(Pick s, const REAL *g, const REAL *index, REAL *x_bar) {
  PICK_LOOPS(if (inside) x_bar[from + j * s.x_lanes] += g[to + j * width];)
}

/* Cross-correlation of (n, c, h, w) with (o, c / groups, kh, kw); weights and values by rows. */
typedef struct {
  int n, c, h, w, o, oh, ow, kh, kw, sy, sx, py, px, dy, dx, groups;
} Conv;

#define CONV_LOOPS(BODY)                                                                           \
  int per = s.c / s.groups, outs = s.o / s.groups;                                                 \
  for (int n = 0; n < s.n; n++)                                                                    \
    for (int o = 0; o < s.o; o++)                                                                  \
      for (int i = 0; i < per; i++)                                                                \
        for (int ky = 0; ky < s.kh; ky++)                                                          \
          for (int kx = 0; kx < s.kw; kx++) {                                                      \
            int channel = o / outs * per + i, place = ((o * per + i) * s.kh + ky) * s.kw + kx;     \
            for (int row = 0; row < s.oh; row++) {                                                   \
              int iy = row * s.sy - s.py + ky * s.dy;                                              \
              if (iy < 0 || iy >= s.h) continue;                                                   \
              int out = ((n * s.o + o) * s.oh + row) * s.ow;                                       \
              int in = ((n * s.c + channel) * s.h + iy) * s.w - s.px + kx * s.dx;                  \
              int low = s.px - kx * s.dx, high = s.w + s.px - kx * s.dx;                           \
              int from = low <= 0 ? 0 : (low + s.sx - 1) / s.sx;                                   \
              int to = high <= 0 ? 0 : (high + s.sx - 1) / s.sx;                                   \
              to = to < s.ow ? to : s.ow;                                                          \
              BODY                                                                                 \
            }                                                                                      \
          }

PSN_INLINE void psn_conv(Conv s, const REAL *x, const REAL *w, const REAL *bias, REAL *y) {
  for (int n = 0; n < s.n; n++)
    for (int o = 0; o < s.o; o++)
      for (int i = 0; i < s.oh * s.ow; i++) y[(n * s.o + o) * s.oh * s.ow + i] = bias ? bias[o] : 0;
  CONV_LOOPS(REAL weight = w[place];
             for (int q = from; q < to; q++) y[out + q] += weight * x[in + q * s.sx];)
}

/* Adds to the cotangents; any of them may be 0. */
PSN_INLINE void psn_conv_pull(Conv s, const REAL *x, const REAL *w, const REAL *g, REAL *x_bar,
                              REAL *w_bar, REAL *bias_bar) {
  if (x_bar) {
    CONV_LOOPS(REAL weight = w[place];
               for (int q = from; q < to; q++) x_bar[in + q * s.sx] += weight * g[out + q];)
  }
  if (w_bar) {
    CONV_LOOPS(REAL sum = 0; for (int q = from; q < to; q++) sum += g[out + q] * x[in + q * s.sx];
               w_bar[place] += sum;)
  }
  if (bias_bar)
    for (int n = 0; n < s.n; n++)
      for (int o = 0; o < s.o; o++) {
        REAL sum = 0;
        for (int i = 0; i < s.oh * s.ow; i++) sum += g[(n * s.o + o) * s.oh * s.ow + i];
        bias_bar[o] += sum;
      }
}

/* Normalization of x (blocks, channels, pixels) over each block; blocks of one row share the weights
   by their place in it. Keeps mean and 1 / deviation of each block. */
PSN_INLINE void psn_norm(int blocks, int groups, int channels, int pixels, REAL eps, const REAL *x,
                         const REAL *weight, const REAL *bias, REAL *y, REAL *kept) {
  int size = channels * pixels;
  for (int b = 0; b < blocks; b++) {
    const REAL *in = x + b * size;
    REAL mean = 0, square = 0;
    for (int i = 0; i < size; i++) mean += in[i];
    mean /= size;
    for (int i = 0; i < size; i++) square += (in[i] - mean) * (in[i] - mean);
    REAL inverse = 1 / F(__builtin_sqrt)(square / size + eps);
    kept[2 * b] = mean, kept[2 * b + 1] = inverse;
    for (int c = 0; c < channels; c++) {
      int place = b % groups * channels + c;
      REAL scale = weight ? weight[place] : 1, shift = bias ? bias[place] : 0;
      for (int i = c * pixels; i < (c + 1) * pixels; i++)
        y[b * size + i] = (in[i] - mean) * inverse * scale + shift;
    }
  }
}

PSN_INLINE void psn_norm_pull(int blocks, int groups, int channels, int pixels, const REAL *x,
                              const REAL *weight, const REAL *kept, const REAL *g, REAL *x_bar,
                              REAL *weight_bar, REAL *bias_bar) {
  int size = channels * pixels;
  for (int b = 0; b < blocks; b++) {
    const REAL *in = x + b * size, *out = g + b * size;
    REAL mean = kept[2 * b], inverse = kept[2 * b + 1], sum = 0, along = 0;
    for (int c = 0; c < channels; c++) {
      int place = b % groups * channels + c;
      REAL scale = weight ? weight[place] : 1, total = 0, moment = 0;
      for (int i = c * pixels; i < (c + 1) * pixels; i++) {
        total += out[i];
        moment += out[i] * (in[i] - mean) * inverse;
      }
      sum += total * scale, along += moment * scale;
      if (weight_bar) weight_bar[place] += moment;
      if (bias_bar) bias_bar[place] += total;
    }
    if (!x_bar) continue;
    for (int c = 0; c < channels; c++) {
      int place = b % groups * channels + c;
      REAL scale = weight ? weight[place] : 1;
      for (int i = c * pixels; i < (c + 1) * pixels; i++) {
        REAL unit = (in[i] - mean) * inverse;
        x_bar[b * size + i] += inverse * (out[i] * scale - (sum + unit * along) / size);
      }
    }
  }
}
