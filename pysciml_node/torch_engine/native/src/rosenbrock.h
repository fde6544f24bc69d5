/* The stages of a Rosenbrock step; for src/solve.h.

   With J = df/du, by rows, and f_t = df/dt at the start of a step, the slopes k_i solve

       (M - h gamma J) k_i = gamma [f(t + c_i h, u + h sum_j a_ij k_j)
                                    + M sum_j C_ij k_j + h d_i f_t]

   (tableaus/implicit.py), of which the emitted code has the sums and, but for the identity, M. */

/* The field at the start of a step with its derivatives, and room for what comes of them. */
typedef struct {
  REAL *jacobian, *factors, *rate, *slope, *unit, *row, *bars;
  int pivots[N];
} Linear;

#define LINEAR_MEMORY (2 * MATRIX + 4 * ROW)

static void psn_place(Linear *l, REAL *memory, REAL *bars) {
  l->jacobian = memory, l->factors = memory + MATRIX;
  l->rate = memory + 2 * MATRIX, l->slope = l->rate + ROW;
  l->unit = l->slope + ROW, l->row = l->unit + ROW;
  l->bars = bars;
}

static void psn_linearize(Linear *l, REAL t, const REAL *u, const REAL *packed, REAL *work) {
  field(t, u, packed, l->rate, work);
  for (int i = 0; i < N; i++) {
    REAL time[LANES] = {0};
    memset(l->unit, 0, N * sizeof(REAL));
    l->unit[i] = 1;
    pull_state(t, u, packed, l->rate, work, l->unit, l->row, time, 0, l->bars);
    memcpy(l->jacobian + i * N, l->row, N * sizeof(REAL));
    l->slope[i] = time[0];
  }
}

/* Factors of M - h gamma J by elimination with partial pivoting: P A = L U. Without a pivot the
   solutions are not finite, and the step is rejected. */
static void psn_factor(Linear *l, REAL h) {
  REAL *a = l->factors, scale = h * GAMMA;
  for (int i = 0; i < N * N; i++) a[i] = -scale * l->jacobian[i];
#ifdef WITH_MASS
  for (int i = 0; i < N * N; i++) a[i] += MASS[i];
#else
  for (int i = 0; i < N; i++) a[i * N + i] += 1;
#endif
  for (int c = 0; c < N; c++) {
    int pivot = c;
    for (int i = c + 1; i < N; i++)
      if (F(__builtin_fabs)(a[i * N + c]) > F(__builtin_fabs)(a[pivot * N + c])) pivot = i;
    l->pivots[c] = pivot;
    if (pivot != c)
      for (int j = 0; j < N; j++) {
        REAL kept = a[c * N + j];
        a[c * N + j] = a[pivot * N + j], a[pivot * N + j] = kept;
      }
    for (int i = c + 1; i < N; i++) {
      REAL factor = a[i * N + c] /= a[c * N + c];
#pragma omp simd
      for (int j = c + 1; j < N; j++) a[i * N + j] -= factor * a[c * N + j];
    }
  }
}

static void psn_exchange(REAL *x, int i, int j) {
  REAL kept = x[i];
  x[i] = x[j], x[j] = kept;
}

static REAL psn_product(const REAL *a, const REAL *x, int from, int to) {
  REAL sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int j = from; j < to; j++) sum += a[j] * x[j];
  return sum;
}

/* Solve A x = b in place. */
static void psn_solve(const Linear *l, REAL *x) {
  const REAL *a = l->factors;
  for (int i = 0; i < N; i++) psn_exchange(x, i, l->pivots[i]);
  for (int i = 0; i < N; i++) x[i] -= psn_product(a + i * N, x, 0, i);
  for (int i = N - 1; i >= 0; i--)
    x[i] = (x[i] - psn_product(a + i * N, x, i + 1, N)) / a[i * N + i];
}

/* M x, or M^T x. */
static void psn_weigh(const REAL *x, int turned, REAL *out) {
#ifdef WITH_MASS
  memset(out, 0, N * sizeof(REAL));
  for (int i = 0; i < N; i++)
    for (int j = 0; j < N; j++) out[i] += (turned ? MASS[j * N + i] : MASS[i * N + j]) * x[j];
#else
  memcpy(out, x, N * sizeof(REAL));
#endif
}

/* The slope of stage i from the field's value there. */
static void psn_slope(const Linear *l, int i, REAL h, const REAL *rate, REAL *k) {
  REAL *x = k + i * ROW, weight = (REAL)TIME_WEIGHTS[i] * h;
  couple(i, k, l->row);
  psn_weigh(l->row, 0, x);
  for (int e = 0; e < N; e++) x[e] += rate[e];
  if (weight != 0)
    for (int e = 0; e < N; e++) x[e] += weight * l->slope[e];
  for (int e = 0; e < N; e++) x[e] *= GAMMA;
  psn_solve(l, x);
}

#define LINEAR(s, l) psn_place(l, W(s) + WORK + BARS, W(s) + WORK)

static void psn_first_stage(Solve *s, double t, double h) {
  if (s->known) return;
  REAL times[ALL_STAGES];
  Linear l;
  LINEAR(s, &l);
  psn_times(s->marks, s->mark_count, s->t0, s->t1, t, h, times);
  psn_linearize(&l, times[0], U(s), s->packed, W(s));
  memcpy(K(s, 0), l.rate, N * sizeof(REAL));
  s->evaluations++;
  s->known = 1;
}

static void psn_stages(Solve *s, double t, double h, int upto) {
  if (s->known >= upto) return;
  REAL times[ALL_STAGES];
  Linear l;
  LINEAR(s, &l);
  psn_times(s->marks, s->mark_count, s->t0, s->t1, t, h, times);
  psn_factor(&l, (REAL)h);
  psn_slope(&l, 0, (REAL)h, l.rate, K(s, 0));
  for (int i = 1; i < STAGES; i++) {
    combine(i, (REAL)h, U(s), K(s, 0), G(s));
    psn_evaluate(s, times[i], G(s), EXTRA(s), W(s));
    psn_slope(&l, i, (REAL)h, EXTRA(s), K(s, 0));
  }
  s->known = STAGES;
}
