/* The stages of an explicit step; for src/solve.h. */

typedef struct {
  Solve *s;
  REAL h, times[ALL_STAGES];
  int from, upto;
} Stages;

static void psn_stages_in(void *job, int part) {
  const Stages *a = job;
  Part p = psn_part(a->s, part, a->s->k);
  for (int i = a->from; i < a->upto; i++) {
    REAL *g = psn_argument(&p, i);
    combine(i, a->h, U(&p), K(&p, 0), g);
    field_in(psn_first(part), a->times[i], g, a->s->packed, K(&p, i), psn_values(&p, i));
  }
}

static void psn_stages(Solve *s, double t, double h, int upto) {
  if (s->known >= upto) return;
  Stages a = {s, (REAL)h, {0}, (int)s->known, upto};
  psn_times(s->marks, s->mark_count, s->t0, s->t1, t, h, a.times);
  IN_PARTS(s->team, psn_stages_in, &a);
  s->evaluations += upto - s->known;
  s->known = upto;
}

/* Shampine's: |k_i - k_j| / |g_i - g_j| of two stages at one time, with their arguments. */
static double psn_eigenvalue(Solve *s, double t, double h) {
  if (FIRST_ALIKE < 0) return NAN;
  double top = 0, bottom = 0;
  psn_stages(s, t, h, FIRST_ALIKE + 1);
  FOR_PARTS {
    const REAL *k = K(&p, FIRST_ALIKE), *other = K(&p, SECOND_ALIKE);
    REAL *g = EXTRA(&p), *beside = G(&p);
    /* As they are rounded: near an equilibrium their difference is of rounding. */
    combine(FIRST_ALIKE, (REAL)h, U(&p), K(&p, 0), g);
    combine(SECOND_ALIKE, (REAL)h, U(&p), K(&p, 0), beside);
    FOR_RUNS(p.part, 0) for (int i = run.from; i < run.to; i++) {
      double rate = k[i] - other[i], state = g[i] - beside[i];
      top += rate * rate, bottom += state * state;
    }
  }
  return sqrt(top) / (sqrt(bottom) + ROUNDING);
}

static void psn_first_stage(Solve *s, double t, double h) { psn_stages(s, t, h, 1); }
