/* The discrete adjoint of stochastic steps (pysciml_node/stochastic/adjoints.py): each is taken again
   on the same path, and pulled back. */

#define SLOT_BARS(s) (s->memory + SLOT)                      /* by slot, and one more */
#define VALUE_BAR(s) (SLOT_BARS(s) + (2 * STAGES + 1) * ROW) /* of a field's value */
#define START_BAR(s) (VALUE_BAR(s) + MATRIX_ROW)
#define SCRATCH(s) (START_BAR(s) + WHOLE)
#define ROWS_OF_PATH(s) (SCRATCH(s) + SOME_BARS)

static REAL *psn_scratch(Sweep *s) { return SCRATCH(s); }

/* Take a step again up to a time; `size` is its length on the path. */
static Stages psn_again(Sweep *s, double t, const REAL *u, double end, double *size) {
  Motion m = psn_motion(s->noise, t, end);
  Stages k = psn_apart(s->memory);
  psn_take(&k, s->packed, t, u, m, STEP_DRIFTS, STEP_DIFFUSIONS, 0, 0, &s->evaluations,
           &s->noise->evaluations);
  *size = m.h;
  return k;
}

/* Add the cotangent of a step's start to `sum`, from that of its end. */
static void psn_pull_step(Sweep *s, const Stages *k, double t, double size, const REAL *bar,
                          REAL *sum) {
  REAL h = (REAL)size, root = (REAL)sqrt(size);
  REAL *bars = SLOT_BARS(s), *value_bar = VALUE_BAR(s), *other = bars + 2 * STAGES * ROW;
  int last = (STEP_DRIFTS > STEP_DIFFUSIONS ? STEP_DRIFTS : STEP_DIFFUSIONS) - 1;
  for (int i = last; i >= 0; i--) {
    int with_drift = i < STEP_DRIFTS && HAS_DRIFT[i], joined = with_drift && SHARED[i];
    REAL *bar_of_drift = bars + 2 * i * ROW, time[LANES] = {0};
    if (with_drift) {
      s->pulls++;
      pull_to_drift(i, h, bar, bars, value_bar);
      pull((REAL)(t + DRIFT_NODES[i] * size), ARGUMENT(k, 2 * i), s->packed, DRIFT(k, i),
           WORK_OF(k, 2 * i), value_bar, bar_of_drift, time, s->packed_bar, SCRATCH(s));
    }
    if (i < STEP_DIFFUSIONS) {
      REAL *into = joined ? other : bars + (2 * i + 1) * ROW;
      pull_to_diffusion(i, root, bar, bars, k->integrals, value_bar);
      pull_diffusion((REAL)(t + DIFFUSION_NODES[i] * size), ARGUMENT(k, 2 * i + !joined),
                     PACKED_OF_DIFFUSION(s->packed), DIFFUSION(k, i), WORK_OF(k, 2 * i + 1),
                     value_bar, into, time, PACKED_OF_DIFFUSION(s->packed_bar), SCRATCH(s));
      if (joined)
        for (int e = 0; e < ENTRIES; e++) bar_of_drift[e] += other[e];
    }
    if (CARRIES && i == last)
      for (int e = 0; e < ENTRIES; e++) bar_of_drift[e] += bar[ENTRIES + e];
  }
  pull_to_start(bar, bars, sum);
}

static void psn_replay(Sweep *s, int64_t n) {
  double t = n ? s->steps[4 * (n - 1)] : s->t0;
  const REAL *u = s->ends + n * N;
  REAL *bar = s->start_bar, *sum = START_BAR(s);
  s->noise->rows = ROWS_OF_PATH(s);
  memset(sum, 0, N * sizeof(REAL));
  double size;
  if (s->live) {
    int kept = n < s->kept_count;
    Stages k = kept ? psn_apart((REAL *)s->kept + n * SLOT)
                    : psn_again(s, t, u, s->steps[4 * n], &size);
    psn_pull_step(s, &k, t, kept ? s->steps[4 * n + 1] : size, bar, sum);
  }
  int64_t inside = psn_count_inside(s, n);
  for (int64_t m = s->q - inside + 1; m <= s->q; m++) {
    Stages k = psn_again(s, t, u, s->places[2 * m + 1], &size);
    psn_pull_step(s, &k, t, size, s->saved_bar + m * N, sum);
  }
  s->q -= inside;
  memcpy(bar, sum, N * sizeof(REAL));
  s->replayed++;
}
