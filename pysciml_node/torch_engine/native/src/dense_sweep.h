/* The discrete adjoint of steps with a dense output: what they keep, and what its cotangents add. */
#define STAGE_MEMORY (2 * ROW + WORK) /* argument, derivative's cotangent, values of the field */
#define BARS_OF(s) ((s)->memory + ALL_STAGES * ROW)
#define SHARED_BAR(s) ((s)->memory + (2 * ALL_STAGES + 2) * ROW)
#define SCRATCH(s) ((s)->memory + (2 * ALL_STAGES + 3) * ROW)
#define STAGE_OF(s, i) (SCRATCH(s) + BARS + (i) * STAGE_MEMORY)

static REAL *psn_scratch(Sweep *s) { return SCRATCH(s); }

#if PARTS > 1
/* Behind what a step needs lie the cotangents that go on. */
#define SWEEP_ROOM                                                                                 \
  ((2 * ALL_STAGES + 3) * ROW + BARS + ALL_STAGES * STAGE_MEMORY + ROW + PACKED)

static Part psn_part_back(const Sweep *s, int part) {
  REAL *memory = s->memory + (int64_t)part * SWEEP_ROOM;
  return (Part){memory, memory, part};
}

static REAL *psn_bar(const Sweep *s, const Part *p) { return STAGE_OF(p, ALL_STAGES); }
static REAL *psn_packed_bar(const Sweep *s, const Part *p) { return psn_bar(s, p) + ROW; }
#endif

/* What dense outputs at the last `inside` saved times add to the cotangents of `count` stages, of which
   the derivatives are k, over h, and to that of the start. */
static void psn_pull_outputs_in(Sweep *s, const Part *p, const REAL *k, int64_t inside, int count,
                                double h, REAL *sum) {
  for (int i = 0; i < count; i++) memset(STAGE_OF(p, i) + ROW, 0, N * sizeof(REAL));
  for (int64_t m = s->q; m > s->q - inside; m--) {
    REAL weights[ALL_STAGES], slopes[ALL_STAGES];
    double along = 0;
    psn_dense_weights(s->places[2 * m + 1], 0, weights);
    if (s->t_bar) psn_dense_weights(s->places[2 * m + 1], 1, slopes);
    FOR_RUNS(p->part, 0) {
      const REAL *v = s->saved_bar + m * ENTIRE + run.shift;
      for (int i = 0; i < count; i++) {
        REAL *into = STAGE_OF(p, i) + ROW;
        for (int e = run.from; e < run.to; e++) into[e] += weights[i] * v[e];
      }
      for (int e = run.from; e < run.to; e++) sum[e] += v[e];
      if (s->t_bar)
        for (int e = run.from; e < run.to; e++) {
          REAL total = 0;
          for (int i = 0; i < count; i++) total += slopes[i] * k[i * ROW + e];
          along += (double)v[e] * ((REAL)h * total);
        }
    }
    if (s->t_bar) s->theta_bar[p->part * s->reached + m] = along;
  }
}
