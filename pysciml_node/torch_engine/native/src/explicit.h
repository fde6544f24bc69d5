/* The stages of an explicit step; for src/solve.h. */

static void psn_stages(Solve *s, double t, double h, int upto) {
  REAL times[ALL_STAGES];
  psn_times(s->marks, s->mark_count, s->t0, s->t1, t, h, times);
  for (int i = (int)s->known; i < upto; i++) {
    REAL *g = psn_argument(s, i);
    combine(i, (REAL)h, U(s), K(s, 0), g);
    psn_evaluate(s, times[i], g, K(s, i), psn_values(s, i));
  }
  if (s->known < upto) s->known = upto;
}

static void psn_first_stage(Solve *s, double t, double h) {
  if (s->known) return;
  REAL times[ALL_STAGES];
  psn_times(s->marks, s->mark_count, s->t0, s->t1, t, h, times);
  if (s->k != s->memory) memcpy(ARGUMENT(s->k, 0), U(s), N * sizeof(REAL));
  psn_evaluate(s, times[0], U(s), K(s, 0), psn_values(s, 0));
  s->known = 1;
}
