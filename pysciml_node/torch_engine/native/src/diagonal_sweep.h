/* The discrete adjoint of a singly diagonally implicit step; for src/linear_sweep.h.

   It is that of the implicit function theorem at the slopes that Newton's iteration has found, not of
   the iteration: with J_i = df/du at the stage,

       y_i = (I - h gamma J_i)^-T [h (b_i u1* + sum_m b_i(theta_m) v*_m + sum_{j>i} a_ji U*_j)],

   and y_1, of the explicit stage, is its slope's cotangent. */

/* Each slope is found, and corrected by one more step of the iteration with the Jacobian at the stage
   itself, which the adjoint needs anyway. */
static void psn_replay_stages(Sweep *s, Linear *at, const REAL *times, REAL h, const REAL *u) {
  REAL *known = YS(s);
  for (int i = 0; i < STAGES; i++) {
    REAL *g = STAGE_OF(s, i), *values = g + 2 * ROW, *slope = s->memory + i * ROW;
    memcpy(g, u, N * sizeof(REAL));
    if (i) {
      combine(i, h, u, s->memory, known);
      memcpy(slope, slope - ROW, N * sizeof(REAL));
      s->evaluations +=
          psn_newton(&s->accuracy, at, at + i, times[i], h, u, known, s->packed, values, g, slope);
      for (int e = 0; e < N; e++) g[e] = known[e] + h * GAMMA * slope[e];
    }
    psn_linearize(at + i, times[i], g, s->packed, values);
    psn_factor(at + i, h);
    REAL *rate = RATES(s) + i * ROW, *change = at[i].row;
    memcpy(rate, at[i].rate, N * sizeof(REAL));
    if (!i) {
      memcpy(slope, rate, N * sizeof(REAL));
      continue;
    }
    for (int e = 0; e < N; e++) change[e] = rate[e] - slope[e];
    psn_solve(at + i, change);
    for (int e = 0; e < N; e++) slope[e] += change[e];
  }
  s->evaluations += STAGES;
}

static void psn_turn(Sweep *s, Linear *at, int i, const REAL *k_bar, REAL *y) {
  memcpy(y, k_bar, N * sizeof(REAL));
  if (i) psn_solve_turned(at + i, y);
}

/* The argument has h gamma k_i. */
static double psn_along(Sweep *s, const Linear *at, int stage) {
  const REAL *bar = BARS_OF(s) + stage * ROW, *k = s->memory + stage * ROW;
  double along = 0;
  for (int e = 0; stage && e < N; e++) along += (double)bar[e] * k[e];
  return GAMMA * along;
}

/* It has none of them in its equations. */
static double psn_pull_derivatives(Sweep *s, REAL t, REAL h, const REAL *u, REAL *sum) { return 0; }
