/* The discrete adjoint of steps with a dense output: what they keep, and what its cotangents add. */
#define STAGE_MEMORY (2 * ROW + WORK) /* argument, derivative's cotangent, values of the field */
#define BARS_OF(s) (s->memory + ALL_STAGES * ROW)
#define SHARED_BAR(s) (s->memory + (2 * ALL_STAGES + 2) * ROW)
#define SCRATCH(s) (s->memory + (2 * ALL_STAGES + 3) * ROW)
#define STAGE_OF(s, i) (SCRATCH(s) + BARS + (i) * STAGE_MEMORY)

static REAL *psn_scratch(Sweep *s) { return SCRATCH(s); }

/* What dense outputs add to the cotangents of `count` stages, over h, and to that of the start. */
static void psn_pull_outputs(Sweep *s, const REAL *k, int64_t inside, int count, double h,
                             REAL *sum) {
  for (int i = 0; i < count; i++) memset(STAGE_OF(s, i) + ROW, 0, N * sizeof(REAL));
  for (int64_t m = s->q; m > s->q - inside; m--) {
    const REAL *v = s->saved_bar + m * N;
    REAL weights[ALL_STAGES];
    psn_dense_weights(s->places[2 * m + 1], 0, weights);
    for (int i = 0; i < count; i++) {
      REAL *into = STAGE_OF(s, i) + ROW;
      for (int e = 0; e < N; e++) into[e] += weights[i] * v[e];
    }
    for (int e = 0; e < N; e++) sum[e] += v[e];
    if (s->t_bar) {
      psn_dense_weights(s->places[2 * m + 1], 1, weights);
      double along = 0;
      for (int e = 0; e < N; e++) {
        REAL total = 0;
        for (int i = 0; i < count; i++) total += weights[i] * k[i * ROW + e];
        along += (double)v[e] * ((REAL)h * total);
      }
      s->theta_bar[m] = along;
    }
  }
  s->q -= inside;
}
