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

static void psn_first_stage(Solve *s, double t, double h) { psn_stages(s, t, h, 1); }
