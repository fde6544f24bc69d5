/* The discrete adjoint of a Rosenbrock step; for src/sweep.h.

   With A = M - h gamma J the cotangents obey, for i = s, ..., 1,

       y_i = gamma A^-T [h (b_i u1* + sum_m b_i(theta_m) v*_m + sum_{j>i} a_ji U*_j)
                         + M^T sum_{j>i} C_ji y_j],
       U*_i = (df/du)^T y_i,

   and the derivatives at the start of the step have h sum_i y_i k_i^T and h sum_i d_i y_i. These are
   few pairs: what they do to u, t and the parameters is the derivative of
   sum_m (v_m^T J^T + tau_m f_t^T) w_m, which the emitted field of the pullback gives (pulled.py). */

#define RATES(s) (STAGE_OF(s, STAGES))
#define YS(s) (RATES(s) + STAGES * ROW)
#define LINEAR_OF(s) (YS(s) + STAGES * ROW)
/* The pullback as a field: of u, a cotangent, and a time that it does not read. */
#define POINT(s) (LINEAR_OF(s) + LINEAR_MEMORY)
#define VALUE(s) (POINT(s) + POINT_ROW)
#define VALUE_BAR(s) (VALUE(s) + POINT_ROW)
#define POINT_BAR(s) (VALUE_BAR(s) + POINT_ROW)
#define WORK_OF(s) (POINT_BAR(s) + POINT_ROW)
#define BARS_OF_POINT(s) (WORK_OF(s) + WORK_pulled)
/* The pairs are those of the stages, or as many as J has rows. */
enum { BY_ROWS = N < STAGES, PAIRS = BY_ROWS ? N : STAGES };

/* Solve A^T x = b in place. */
static void psn_solve_turned(const Linear *l, REAL *x) {
  const REAL *a = l->factors;
  for (int i = 0; i < N; i++) {
    x[i] /= a[i * N + i];
    for (int j = i + 1; j < N; j++) x[j] -= a[i * N + j] * x[i];
  }
  for (int i = N - 1; i >= 0; i--)
    for (int j = 0; j < i; j++) x[j] -= a[i * N + j] * x[i];
  for (int i = N - 1; i >= 0; i--) psn_exchange(x, i, l->pivots[i]);
}

/* The pair w, (v, tau): into the point and into the value's cotangent. */
static void psn_pair(const REAL *y, const REAL *k, int m, REAL h, REAL *w, REAL *v, REAL *tau) {
  if (!BY_ROWS) {
    memcpy(w, y + m * ROW, N * sizeof(REAL));
    for (int e = 0; e < N; e++) v[e] = h * k[m * ROW + e];
    *tau = h * (REAL)TIME_WEIGHTS[m];
    return;
  }
  memset(w, 0, N * sizeof(REAL));
  memset(v, 0, N * sizeof(REAL));
  w[m] = 1, *tau = 0;
  for (int i = 0; i < STAGES; i++) {
    REAL weight = h * y[i * ROW + m];
    for (int e = 0; e < N; e++) v[e] += weight * k[i * ROW + e];
    *tau += weight * (REAL)TIME_WEIGHTS[i];
  }
}

/* What the derivatives at the start of a step pull back: adds to `sum`, returns the time's. */
static double psn_pull_derivatives(Sweep *s, REAL t, REAL h, const REAL *u, REAL *sum) {
  REAL *point = POINT(s), *bar = VALUE_BAR(s), time[LANES] = {0};
  memcpy(point, u, N * sizeof(REAL));
  point[2 * N] = 0;
  memset(bar, 0, N * sizeof(REAL));
  for (int m = 0; m < PAIRS; m++) {
    psn_pair(YS(s), s->memory, m, h, point + N, bar + N, bar + 2 * N);
    field_pulled(t, point, s->packed + PACKED, VALUE(s), WORK_OF(s));
    pull_pulled(t, point, s->packed + PACKED, VALUE(s), WORK_OF(s), bar, POINT_BAR(s), time,
                s->packed_bar + PACKED, BARS_OF_POINT(s));
    for (int e = 0; e < N; e++) sum[e] += POINT_BAR(s)[e];
  }
  return time[0];
}

/* The derivative of the slopes' equations in h, over the stages' arguments and rates. */
static double psn_along(const Linear *l, const REAL *y, const REAL *k, int stage) {
  double along = 0;
  for (int i = 0; i < N; i++) {
    double sum = TIME_WEIGHTS[stage] * l->slope[i];
    for (int j = 0; j < N; j++) sum += (double)l->jacobian[i * N + j] * k[j];
    along += y[i] * sum;
  }
  return along;
}

static void psn_replay_stages(Sweep *s, Linear *l, const REAL *times, REAL h, const REAL *u) {
  REAL *k = s->memory;
  memcpy(STAGE_OF(s, 0), u, N * sizeof(REAL));
  psn_linearize(l, times[0], u, s->packed, STAGE_OF(s, 0) + 2 * ROW);
  psn_factor(l, h);
  memcpy(RATES(s), l->rate, N * sizeof(REAL));
  for (int i = 0; i < STAGES; i++) {
    REAL *g = STAGE_OF(s, i), *rate = RATES(s) + i * ROW;
    if (i) {
      combine(i, h, u, k, g);
      field(times[i], g, s->packed, rate, g + 2 * ROW);
    }
    psn_slope(l, i, h, rate, k);
  }
  s->evaluations += STAGES;
  s->pulls += STAGES;
  s->replayed++;
}

static void psn_replay(Sweep *s, int64_t n) {
  double t = n ? s->steps[4 * (n - 1)] : s->t0, h = s->steps[4 * n + 1];
  REAL *k = s->memory, *bars = BARS_OF(s), *u = bars + ALL_STAGES * ROW, *sum = u + ROW;
  REAL *bar = s->start_bar, times[ALL_STAGES];
  Linear l;
  psn_place(&l, LINEAR_OF(s), SCRATCH(s));
  psn_times(s->marks, s->mark_count, s->t0, s->t1, t, h, times);
  memcpy(u, n ? s->ends + (n - 1) * N : s->u0, N * sizeof(REAL));
  psn_replay_stages(s, &l, times, (REAL)h, u);
  memcpy(sum, bar, N * sizeof(REAL));
  psn_pull_outputs(s, k, psn_count_inside(s, n), STAGES, h, sum);
  double t_bar = 0, h_bar = 0;
  for (int i = STAGES - 1; i >= 0; i--) {
    REAL *g = STAGE_OF(s, i), *k_bar = g + ROW, *y = YS(s) + i * ROW, time[LANES] = {0};
    combine_bars(i, STAGES, (REAL)h, bar, bars, k_bar);
    for (int e = 0; e < N; e++) h_bar += (double)k_bar[e] * k[i * ROW + e] / h;
    couple_bars(i, YS(s), l.row);
    psn_weigh(l.row, 1, y);
    for (int e = 0; e < N; e++) y[e] += k_bar[e];
    psn_solve_turned(&l, y);
    for (int e = 0; e < N; e++) y[e] *= GAMMA;
    pull(times[i], g, s->packed, RATES(s) + i * ROW, g + 2 * ROW, y, bars + i * ROW, time,
         s->packed_bar, SCRATCH(s));
    for (int e = 0; e < N; e++) sum[e] += bars[i * ROW + e];
    t_bar += time[0];
    h_bar += NODES[i] * time[0] + psn_along(&l, y, k + i * ROW, i);
  }
  t_bar += psn_pull_derivatives(s, times[0], (REAL)h, u, sum);
  memcpy(bar, sum, N * sizeof(REAL));
  if (s->t_bar) s->t_bar[n] = t_bar, s->h_bar[n] = h_bar;
}
