/* The discrete adjoint of Rosenbrock steps of members abreast; for src/members_linear_sweep.h.

   It is rosenbrock_sweep.h lane by lane: there are the equations. */

/* The pullback as a field: of u, a cotangent, and a time that it does not read. */
#define POINT LINEAR_OF(LINEARS)
#define VALUE (POINT + POINT_ROW)
#define VALUE_BAR (VALUE + POINT_ROW)
#define POINT_BAR (VALUE_BAR + POINT_ROW)
#define WORK_OF (POINT_BAR + POINT_ROW)
#define BARS_OF_POINT (WORK_OF + WORK_pulled)
/* The pairs are those of the stages, or as many as J has rows. */
enum { BY_ROWS = N < STAGES, PAIRS = BY_ROWS ? N : STAGES };

/* The pairs w, (v, tau) number m: into the points and into the values' cotangents. */
static void psn_pair(Sweeper *w, int m) {
  REAL *left = POINT + N * ABREAST, *right = VALUE_BAR + N * ABREAST;
  REAL *tau = VALUE_BAR + 2 * N * ABREAST;
  if (!BY_ROWS) {
    memcpy(left, Y(m), N * ABREAST * sizeof(REAL));
    FOR_ENTRIES LANES_ALL AT(right, i, l) = w->size[l] * AT(K(m), i, l);
    LANES_ALL tau[l] = w->size[l] * (REAL)TIME_WEIGHTS[m];
    return;
  }
  memset(left, 0, N * ABREAST * sizeof(REAL));
  memset(right, 0, (N + 1) * ABREAST * sizeof(REAL));
  LANES_ALL AT(left, m, l) = 1;
  for (int j = 0; j < STAGES; j++) {
    REAL weight[ABREAST];
    LANES_ALL weight[l] = w->size[l] * AT(Y(j), m, l);
    FOR_ENTRIES LANES_ALL AT(right, i, l) += weight[l] * AT(K(j), i, l);
    LANES_ALL tau[l] += weight[l] * (REAL)TIME_WEIGHTS[j];
  }
}

static void psn_pull_derivatives(const Back *b, Sweeper *w, REAL *packed_bar) {
  const REAL *own = OWN_VALUES + OWN_FIRST, *packed = b->packed + PACKED;
  memcpy(POINT, U, N * ABREAST * sizeof(REAL));
  memset(POINT + 2 * N * ABREAST, 0, ABREAST * sizeof(REAL));
  memset(VALUE_BAR, 0, N * ABREAST * sizeof(REAL));
  REAL time_bar[TIME_ROW] = {0};
  for (int m = 0; m < PAIRS; m++) {
    psn_pair(w, m);
    field_pulled(TIMES, POINT, packed, own, VALUE, WORK_OF);
    pull_pulled(TIMES, POINT, packed, own, VALUE, WORK_OF, VALUE_BAR, POINT_BAR, time_bar,
                packed_bar + PACKED, OWN_BARS + OWN_FIRST, BARS_OF_POINT);
    for (int e = 0; e < N * ABREAST; e++) SUM[e] += POINT_BAR[e];
  }
  LANES_ALL w->t_bar[l] += time_bar[l];
}

static void psn_along(Sweeper *w, const Linear *at, int stage) {
  LANES_ALL for (int i = 0; i < N; i++) {
    double sum = TIME_WEIGHTS[stage] * AT(at->slope, i, l);
    for (int j = 0; j < N; j++)
      sum += (double)AT(at->jacobian, i * N + j, l) * AT(K(stage), j, l);
    w->h_bar[l] += AT(Y(stage), i, l) * sum;
  }
}

static void psn_replay_stages(const Back *b, Sweeper *w, Linear *at) {
  psn_linearize(at, TIMES, U, b->packed, OWN_VALUES, STAGE(0) + 2 * ROW);
  psn_factor(at, w->size);
  memcpy(STAGE(0), U, N * ABREAST * sizeof(REAL));
  memcpy(RATE(0), at->rate, N * ABREAST * sizeof(REAL));
  for (int i = 0; i < STAGES; i++) {
    if (i) {
      combine(i, w->size, U, K(0), STAGE(i));
      field(TIMES + i * TIME_ROW, STAGE(i), b->packed, OWN_VALUES, RATE(i), STAGE(i) + 2 * ROW);
    }
    psn_slope(at, i, w->size, RATE(i), K(0));
  }
}

static void psn_turn(Sweeper *w, const Linear *at, int i) {
  couple_bars(i, Y(0), at->row);
  psn_weigh(at->row, 1, Y(i));
  for (int e = 0; e < N * ABREAST; e++) Y(i)[e] += STAGE_BAR(i)[e];
  psn_solve_turned(at, Y(i));
  for (int e = 0; e < N * ABREAST; e++) Y(i)[e] *= GAMMA;
}
