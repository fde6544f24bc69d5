/* The discrete adjoint of an explicit step; for src/sweep.h. */

/* Whether a step starts with the evaluation with which the dense output of the one before ends. At a
   stop the field may jump. */
static int psn_is_joined(const Sweep *s, int64_t n) {
  if (END_STAGE < 0 || n == 0 || s->steps[4 * (n - 1) + 3] >= 0 || s->t_bar) return 0;
  int64_t q = s->q;
  while (psn_is_at(s, q, n)) q--;
  return psn_is_inside(s, q, n - 1);
}

/* The stages of a step as the loop has kept them, or 0. */
static const REAL *psn_slot(const Sweep *s, int64_t n) {
  return n < s->kept_count ? s->kept + n * SLOT : 0;
}

/* Leave the first stage of a step, and the cotangent of its derivative, to the step before. */
static void psn_share(Sweep *s, int64_t n) {
  memcpy(SHARED_BAR(s), STAGE_OF(s, 0) + ROW, N * sizeof(REAL));
  if (psn_slot(s, n - 1)) return;
  memcpy(STAGE_OF(s, END_STAGE), STAGE_OF(s, 0), STAGE_MEMORY * sizeof(REAL));
  memcpy(s->memory + END_STAGE * ROW, s->memory, N * sizeof(REAL));
}

/* The stages of a step, taken again. */
static void psn_take_again(Sweep *s, const REAL *times, double h, const REAL *u, int count,
                           int known) {
  REAL *k = s->memory;
  for (int i = 0; i < count; i++) {
    REAL *g = STAGE_OF(s, i);
    if (i == known) continue;
    combine(i, (REAL)h, u, k, g);
    field(times[i], g, s->packed, k + i * ROW, g + 2 * ROW);
  }
  s->evaluations += count - (known >= 0);
}

/* The discrete adjoint of a step (replay/adjoint_discrete.py). */
static void psn_replay(Sweep *s, int64_t n) {
  double t = n ? s->steps[4 * (n - 1)] : s->t0, h = s->steps[4 * n + 1];
  const REAL *start = n ? s->ends + (n - 1) * N : s->u0, *slot = psn_slot(s, n);
  const REAL *k = slot ? slot : s->memory;
  REAL *bars = BARS_OF(s), *sum = bars + (ALL_STAGES + 1) * ROW, *bar = s->start_bar;
  int known = s->shared ? END_STAGE : -1;
  int64_t inside = psn_count_inside(s, n);
  int count = inside ? ALL_STAGES : FSAL ? STAGES - 1 : STAGES;
  REAL times[ALL_STAGES];
  psn_times(s->marks, s->mark_count, s->t0, s->t1, t, h, times);
  if (!slot) psn_take_again(s, times, h, start, count, known);
  s->pulls += count - s->shared;
  s->replayed++;
  memcpy(sum, bar, N * sizeof(REAL));
  psn_pull_outputs(s, k, inside, count, h, sum);
  s->shared = psn_is_joined(s, n);
  double t_bar = 0, h_bar = 0;
  for (int i = count - 1; i >= 0; i--) {
    REAL *own = STAGE_OF(s, i), *k_bar = own + ROW;
    const REAL *g = slot ? ARGUMENT(slot, i) : own, *w = slot ? VALUES(slot, i) : own + 2 * ROW;
    combine_bars(i, count, (REAL)h, bar, bars, k_bar);
    if (i == known)
      for (int e = 0; e < N; e++) k_bar[e] += SHARED_BAR(s)[e];
    if (s->shared && i == 0) {
      memset(bars, 0, N * sizeof(REAL));
      psn_share(s, n);
      break;
    }
    REAL time[LANES] = {0};
    pull(times[i], g, s->packed, k + i * ROW, w, k_bar, bars + i * ROW, time, s->packed_bar,
         SCRATCH(s));
    if (s->t_bar) {
      double along = 0;
      for (int e = 0; e < N; e++) along += (double)k_bar[e] * k[i * ROW + e];
      h_bar += along / h + NODES[i] * time[0];
      t_bar += time[0];
    }
  }
  for (int i = 0; i < count; i++)
    for (int e = 0; e < N; e++) sum[e] += bars[i * ROW + e];
  memcpy(bar, sum, N * sizeof(REAL));
  if (s->t_bar) s->t_bar[n] = t_bar, s->h_bar[n] = h_bar;
}
