/* The stages of an explicit step; for src/solve.h. */

static void psn_stages(Solve *s, double t, double h, int upto) {
  REAL times[ALL_STAGES];
  psn_times(s->marks, s->mark_count, s->t0, s->t1, t, h, times);
  for (int i = (int)s->known; i < upto; i++) {
    combine(i, (REAL)h, U(s), K(s, 0), G(s));
    psn_evaluate(s, times[i], G(s), K(s, i));
  }
  if (s->known < upto) s->known = upto;
}

static void psn_first_stage(Solve *s, double t, double h) {
  if (s->known) return;
  REAL times[ALL_STAGES];
  psn_times(s->marks, s->mark_count, s->t0, s->t1, t, h, times);
  psn_evaluate(s, times[0], U(s), K(s, 0));
  s->known = 1;
}
