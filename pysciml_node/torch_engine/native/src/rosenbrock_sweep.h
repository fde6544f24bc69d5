/* The discrete adjoint of a Rosenbrock step; for src/linear_sweep.h.

   With A = M - h gamma J the cotangents obey, for i = s, ..., 1,

       y_i = gamma A^-T [h (b_i u1* + sum_m b_i(theta_m) v*_m + sum_{j>i} a_ji U*_j)
                         + M^T sum_{j>i} C_ji y_j],

   and the derivatives at the start of the step have h sum_i y_i k_i^T and h sum_i d_i y_i. These are
   few pairs: what they do to u, t and the parameters is the derivative of
   sum_m (v_m^T J^T + tau_m f_t^T) w_m, which the emitted field of the pullback gives (pulled.py). */

/* The pullback as a field: of u, a cotangent, and a time that it does not read. */
#define POINT(s) (LINEAR_OF(s) + LINEAR_MEMORY)
#define VALUE(s) (POINT(s) + POINT_ROW)
#define VALUE_BAR(s) (VALUE(s) + POINT_ROW)
#define POINT_BAR(s) (VALUE_BAR(s) + POINT_ROW)
#define WORK_OF(s) (POINT_BAR(s) + POINT_ROW)
#define BARS_OF_POINT(s) (WORK_OF(s) + WORK_pulled)
/* The pairs are those of the stages, or as many as J has rows. */
enum { BY_ROWS = N < STAGES, PAIRS = BY_ROWS ? N : STAGES };

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

static double psn_along(Sweep *s, const Linear *at, int stage) {
  const REAL *y = YS(s) + stage * ROW, *k = s->memory + stage * ROW;
  double along = 0;
  for (int i = 0; i < N; i++) {
    double sum = TIME_WEIGHTS[stage] * at->slope[i];
    for (int j = 0; j < N; j++) sum += (double)at->jacobian[i * N + j] * k[j];
    along += y[i] * sum;
  }
  return along;
}

static void psn_replay_stages(Sweep *s, Linear *at, const REAL *times, REAL h, const REAL *u) {
  REAL *k = s->memory;
  memcpy(STAGE_OF(s, 0), u, N * sizeof(REAL));
  psn_linearize(at, times[0], u, s->packed, STAGE_OF(s, 0) + 2 * ROW);
  psn_factor(at, h);
  memcpy(RATES(s), at->rate, N * sizeof(REAL));
  for (int i = 0; i < STAGES; i++) {
    REAL *g = STAGE_OF(s, i), *rate = RATES(s) + i * ROW;
    if (i) {
      combine(i, h, u, k, g);
      field(times[i], g, s->packed, rate, g + 2 * ROW);
    }
    psn_slope(at, i, h, rate, k);
  }
  s->evaluations += STAGES;
}

static void psn_turn(Sweep *s, Linear *at, int i, const REAL *k_bar, REAL *y) {
  couple_bars(i, YS(s), at->row);
  psn_weigh(at->row, 1, y);
  for (int e = 0; e < N; e++) y[e] += k_bar[e];
  psn_solve_turned(at, y);
  for (int e = 0; e < N; e++) y[e] *= GAMMA;
}
