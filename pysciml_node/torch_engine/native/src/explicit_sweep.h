/* The discrete adjoint of an explicit step; for src/sweep.h. */

/* Whether a step starts with the evaluation with which the dense output of the one before ends, where q
   is the last saved time before it. At a stop the field may jump. */
static int psn_is_joined(const Sweep *s, int64_t n, int64_t q) {
  if (END_STAGE < 0 || n == s->first || s->steps[4 * (n - 1) + 3] >= 0 || s->t_bar) return 0;
  while (psn_is_at(s, q, n)) q--;
  return psn_is_inside(s, q, n - 1);
}

/* The stages of a part of a step as the loop has kept them, or 0. */
static const REAL *psn_slot(const Sweep *s, int64_t n, int part) {
  return n < s->kept_count ? s->kept + (n * PARTS + part) * SLOT : 0;
}

/* Leave the first stage of a step, and the cotangent of its derivative, to the step before. */
static void psn_share(const Sweep *s, const Part *p, int64_t n) {
  memcpy(SHARED_BAR(p), STAGE_OF(p, 0) + ROW, N * sizeof(REAL));
  if (psn_slot(s, n - 1, p->part)) return;
  memcpy(STAGE_OF(p, END_STAGE), STAGE_OF(p, 0), STAGE_MEMORY * sizeof(REAL));
  memcpy(K(p, END_STAGE), K(p, 0), N * sizeof(REAL));
}

/* A step that is replayed: its stages, of which one may be known from the step after it, and whether
   its first one is left to the step before; or one of single steps, with estimates that have cotangents,
   and whether its first stage is a constant (taken.h). */
typedef struct {
  Sweep *s;
  int64_t n, inside;
  double h;
  REAL times[ALL_STAGES];
  int count, known, shares;
  const Taken *taken;
  int constant;
} Replay;

/* The state at the start of a part of a step. */
static const REAL *psn_start_in(const Replay *r, const Part *p) {
  const REAL *whole = r->s->ends + r->n * ENTIRE;
  if (PARTS == 1) return whole;
  REAL *own = BARS_OF(p) + ALL_STAGES * ROW;
  psn_take_part(p->part, whole, own);
  return own;
}

/* The stages of a part of a step, taken again. */
static void psn_take_again(const Replay *r, const Part *p) {
  const Sweep *s = r->s;
  const REAL *u = psn_start_in(r, p);
  for (int i = 0; i < r->count; i++) {
    REAL *g = STAGE_OF(p, i);
    if (i == r->known) continue;
    combine(i, (REAL)r->h, u, K(p, 0), g);
    field_in(psn_first(p->part), r->times[i], g, s->packed, K(p, i), g + 2 * ROW);
  }
}

/* The discrete adjoint of a step (replay/adjoint_discrete.py). */
static void psn_replay_in(void *job, int part) {
  const Replay *r = job;
  Sweep *s = r->s;
  Part p = psn_part_back(s, part);
  const REAL *slot = psn_slot(s, r->n, part), *k = slot ? slot : p.memory;
  REAL *bars = BARS_OF(&p), *sum = bars + (ALL_STAGES + 1) * ROW;
  REAL *bar = psn_bar(s, &p), h = (REAL)r->h;
  if (!slot) psn_take_again(r, &p);
  memcpy(sum, bar, N * sizeof(REAL));
  psn_pull_outputs_in(s, &p, k, r->inside, r->count, r->h, sum);
  if (r->taken) {
    psn_pull_estimates_in(r->taken, &p, psn_start_in(r, &p), k, r->h, bar, sum);
    /* Stages that the dense output alone has. */
    memset(bars + r->count * ROW, 0, (ALL_STAGES - r->count) * ROW * sizeof(REAL));
  }
  double t_bar = 0, h_bar = 0;
  for (int i = r->count - 1; i >= 0; i--) {
    REAL *own = STAGE_OF(&p, i), *k_bar = own + ROW;
    const REAL *g = slot ? ARGUMENT(slot, i) : own, *w = slot ? VALUES(slot, i) : own + 2 * ROW;
    combine_bars(i, r->count, h, bar, bars, k_bar);
    if (i == r->known)
      for (int e = 0; e < N; e++) k_bar[e] += SHARED_BAR(&p)[e];
    if (i == 0 && (r->shares || r->constant)) {
      memset(bars, 0, N * sizeof(REAL));
      if (r->shares) psn_share(s, &p, r->n);
      break;
    }
    REAL time[LANES] = {0};
    pull_in(psn_first(part), r->times[i], g, s->packed, k + i * ROW, w, k_bar, bars + i * ROW,
            time, psn_packed_bar(s, &p), SCRATCH(&p));
    if (s->t_bar) {
      double along = 0;
      for (int e = 0; e < N; e++) along += (double)k_bar[e] * k[i * ROW + e];
      h_bar += along / r->h + NODES[i] * time[0];
      t_bar += time[0];
    }
  }
  for (int i = 0; i < r->count; i++)
    for (int e = 0; e < N; e++) sum[e] += bars[i * ROW + e];
  memcpy(bar, sum, N * sizeof(REAL));
  int64_t at = part * s->count + r->n;
  if (s->t_bar) s->t_bar[at] = t_bar, s->h_bar[at] = h_bar;
}

static void psn_replay(Sweep *s, int64_t n) {
  double t = n ? s->steps[4 * (n - 1)] : s->t0;
  Replay r = {s, n, psn_count_inside(s, n), s->steps[4 * n + 1]};
  r.count = r.inside ? ALL_STAGES : FSAL ? STAGES - 1 : STAGES;
  r.known = s->shared ? END_STAGE : -1;
  if (!psn_slot(s, n, 0)) s->evaluations += r.count - s->shared;
  s->pulls += r.count - s->shared;
  s->replayed++;
  psn_times(s->marks, s->mark_count, s->t0, s->t1, t, r.h, r.times);
  r.shares = psn_is_joined(s, n, s->q - r.inside);
  IN_PARTS(s->team, psn_replay_in, &r);
  s->q -= r.inside;
  s->shared = r.shares;
}

static void psn_replay_taken(const Taken *a, int64_t inside, int estimated) {
  Sweep *s = a->back;
  int64_t n = s->n;
  double t = a->steps[2 * n], h = a->steps[2 * n + 1];
  Replay r = {s, n, inside, h, {0}, inside ? ALL_STAGES : ESTIMATED, -1, 0, estimated ? a : 0, a->constant};
  REAL first[ALL_STAGES];
  psn_times(s->marks, s->mark_count, s->t0, s->t1, t, h, r.times);
  psn_times(s->marks, s->mark_count, s->t0, s->t1, t, 0.0, first);
  if (a->anywhere) r.times[0] = first[0];
  if (!psn_slot(s, n, 0)) s->evaluations += r.count;
  s->pulls += r.count - a->constant;
  IN_PARTS(s->team, psn_replay_in, &r);
}
