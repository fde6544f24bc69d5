/* Single steps that are taken again from their starts: where they end, what lies inside of them, and
   estimates of their errors and of the field's stiffness (replay/trajectory.py), with the discrete
   adjoint of all of these; for src/explicit_sweep.h, which pulls
   their stages back. */

typedef struct Taken {
  Solve *s;   /* how they are taken and measured; its ends, saved and places are those of the steps */
  Sweep *back;
  const REAL *starts;        /* states, rows of ENTIRE */
  double *steps, *norms;     /* of each step start and size; and four norms, as forward leaves them */
  REAL *errors, *stiffness;  /* of each step, or 0 where they are not wanted */
  const REAL *errors_bar, *stiffness_bar; /* their cotangents, or 0 */
  REAL *starts_bar;          /* those of the starts */
  int64_t count, n;
  int64_t anywhere; /* whether the one step begins anywhere; its size is Hairer's where it is NaN */
  int64_t constant; /* whether its first stage is a constant */
} Taken;

enum { HIGH, LOW, TOP, BOTTOM, NORMS };

/* Stages that estimates need. */
#define ESTIMATED (FIRST_ALIKE >= STAGES ? FIRST_ALIKE + 1 : STAGES)

/* Two stages with the same node: squares of the differences of their derivatives and arguments. */
typedef struct {
  Solve *s;
  REAL h, top[PARTS], bottom[PARTS];
} Pair;

/* The difference of the arguments over h. */
static inline REAL psn_between(const REAL *k, int i) {
  REAL sum = 0;
  for (int j = 0; j < ALL_STAGES; j++)
    if (BETWEEN[j] != 0) sum += BETWEEN[j] * k[j * ROW + i];
  return sum;
}

static void psn_pair_in(void *job, int part) {
  Pair *a = job;
  Part p = psn_part(a->s, part, a->s->k);
  const REAL *k = K(&p, 0), *first = k + FIRST_ALIKE * ROW, *second = k + SECOND_ALIKE * ROW;
  REAL top = 0, bottom = 0;
  FOR_RUNS(part, 0)
    for (int i = run.from; i < run.to; i++) {
      REAL slope = first[i] - second[i], way = a->h * psn_between(k, i);
      top += slope * slope, bottom += way * way;
    }
  a->top[part] = top, a->bottom[part] = bottom;
}

static void psn_estimate(Taken *a, const Ending *e, double h) {
  Solve *s = a->s;
  double *norms = a->norms + NORMS * a->n;
  REAL high, low, top = 0, bottom = 0;
  a->errors[a->n] = (REAL)(psn_error_norm(e, &high, &low) * s->factor * fabs(h));
  a->stiffness[a->n] = (REAL)NAN;
  norms[HIGH] = high, norms[LOW] = low;
  if (FIRST_ALIKE < 0) return;
  Pair pair = {s, (REAL)h};
  IN_PARTS(s->team, psn_pair_in, &pair);
  for (int part = 0; part < PARTS; part++) top += pair.top[part], bottom += pair.bottom[part];
  norms[TOP] = F(__builtin_sqrt)(top), norms[BOTTOM] = F(__builtin_sqrt)(bottom);
  a->stiffness[a->n] = (REAL)(norms[TOP] / (norms[BOTTOM] + ROUNDING));
}

static void psn_take(Taken *a) {
  Solve *s = a->s;
  double t = a->steps[2 * a->n], *h = a->steps + 2 * a->n + 1;
  s->k = a->n < s->kept_room ? s->kept + a->n * PARTS * SLOT : s->memory;
  s->known = 0;
  FOR_PARTS psn_take_part(p.part, a->starts + a->n * ENTIRE, U(&p));
  if (a->anywhere) psn_first_stage(s, t, 0.0);
  if (isnan(*h)) *h = psn_first_size(s, s->t1 > s->t0 ? 1 : -1);
  psn_stages(s, t, *h, a->errors ? ESTIMATED : STAGES);
  Ending e = {s, (REAL)*h, a->errors != 0};
  IN_PARTS(s->team, psn_end_in, &e);
  psn_put_all(s, LAST(s), s->ends + a->n * ENTIRE);
  if (a->errors) psn_estimate(a, &e, *h);
  while (s->reached < s->save_count && s->places[2 * s->reached] == a->n) {
    psn_dense(s, t, *h, s->places[2 * s->reached + 1], s->saved + s->reached * ENTIRE);
    s->reached++;
  }
}

static int64_t psn_take_all(Taken *a) {
  double until = psn_seconds() + a->s->seconds;
  for (int64_t turn = 1; a->n < a->count; turn++, a->n++) {
    if (turn % TURNS == 0 && psn_seconds() > until) return RUNNING;
    psn_take(a);
  }
  return SUCCESS;
}

/* What Python calls: take the steps, or go on with them for a while. */
int64_t take(Taken *a) {
  Solve *s = a->s;
  if (!a->n) pack_all(s->tensors, s->packed);
  WITH_TEAM(s, s->status = psn_take_all(a));
  return s->status;
}

static inline double psn_bar_of(const REAL *bars, int64_t n) { return bars ? bars[n] : 0; }

static inline REAL psn_sign(REAL x) { return (REAL)((x > 0) - (x < 0)); }

/* Where cotangents of the two sums of squares and of the two norms of a pair go to. */
typedef struct {
  const Solve *s;
  const REAL *u, *u1; /* start and end of a part, */
  REAL *bar, *sum;    /* and their cotangents, of which that of the end goes on to the start */
} Ends;

/* Of a sum of squares of errors in units of the tolerance, in a part. */
static void psn_pull_squares_in(const Part *p, const Ends *ends, const REAL *weights, double squares_bar,
                                double h, REAL *error) {
  const Solve *s = ends->s;
  FOR_RUNS(p->part, 0) {
    int64_t driven = s->driven - run.shift;
    int to = driven < run.to ? (int)driven : run.to;
    for (int i = run.from; i < to; i++) {
      REAL a = F(__builtin_fabs)(ends->u[i]), b = F(__builtin_fabs)(ends->u1[i]);
      REAL largest = a > b || a != a ? a : b, rate = 1, unit = largest + (REAL)s->shift;
      if (s->shift < 0) {
        rate = s->rtol[run.shift + i];
        unit = largest * rate + s->atol[run.shift + i];
      }
      REAL q = error[i] / unit, error_bar = 2 * (REAL)squares_bar * q / unit;
      REAL largest_bar = -error_bar * q * rate, share = a > b ? 1 : a < b ? 0 : (REAL)0.5;
      REAL of_end = (1 - share) * largest_bar * psn_sign(ends->u1[i]);
      ends->sum[i] += share * largest_bar * psn_sign(ends->u[i]) + of_end;
      ends->bar[i] += of_end;
      error[i] = error_bar / (REAL)h;
    }
    for (int j = 0; j < STAGES; j++) {
      REAL *k_bar = STAGE_OF(p, j) + ROW, weight = weights[j];
      if (weight != 0)
        for (int i = run.from; i < to; i++) k_bar[i] += weight * error[i];
    }
  }
}

/* Of the norms of a pair of stages; over h, as those of stages are. */
static void psn_pull_pair_in(const Part *p, const REAL *k, double top_bar, double bottom_bar, double h) {
  const REAL *first = k + FIRST_ALIKE * ROW, *second = k + SECOND_ALIKE * ROW;
  REAL *first_bar = STAGE_OF(p, FIRST_ALIKE) + ROW, *second_bar = STAGE_OF(p, SECOND_ALIKE) + ROW;
  FOR_RUNS(p->part, 0)
    for (int i = run.from; i < run.to; i++) {
      REAL slope_bar = (REAL)(top_bar / h) * (first[i] - second[i]);
      REAL way_bar = (REAL)(bottom_bar * h) * psn_between(k, i);
      for (int j = 0; j < ALL_STAGES; j++)
        if (BETWEEN[j] != 0) STAGE_OF(p, j)[ROW + i] += BETWEEN[j] * way_bar;
      first_bar[i] += slope_bar, second_bar[i] -= slope_bar;
    }
}

/* What the cotangents of a step's estimates add to those of its stages, over h, of its start and end. */
static void psn_pull_estimates_in(const Taken *a, const Part *p, const REAL *u, const REAL *k, double h,
                                  REAL *bar, REAL *sum) {
  const Solve *s = a->s;
  const double *norms = a->norms + NORMS * a->back->n;
  double error_bar = psn_bar_of(a->errors_bar, a->back->n);
  double stiffness_bar = psn_bar_of(a->stiffness_bar, a->back->n);
  REAL *error = BARS_OF(p), *u1 = SHARED_BAR(p);
  double high = norms[HIGH], whole = high, high_bar = 0, low_bar = 0;
  double norm_bar = error_bar * s->factor * fabs(h);
#ifdef TWO_ERRORS
  whole += 0.01 * norms[LOW];
#endif
  if (high != 0 && error_bar != 0) {
    Ends ends = {s, u, u1, bar, sum};
    double root = sqrt(whole);
    combine(END, (REAL)h, u, k, u1);
#ifdef TWO_ERRORS
    high_bar = norm_bar * (1 - high / (2 * whole)) / root;
    low_bar = -norm_bar * 0.005 * high / (whole * root);
    error_low_of(k, error);
    psn_pull_squares_in(p, &ends, ERROR_LOW, low_bar, h, error);
#else
    high_bar = norm_bar / (2 * root);
#endif
    error_of(k, error);
    psn_pull_squares_in(p, &ends, ERROR, high_bar, h, error);
  }
  if (FIRST_ALIKE < 0 || stiffness_bar == 0 || norms[TOP] == 0) return;
  double below = norms[BOTTOM] + ROUNDING, top_bar = stiffness_bar / (below * norms[TOP]), bottom_bar = 0;
  if (norms[BOTTOM] != 0)
    bottom_bar = -stiffness_bar * norms[TOP] / (below * below * norms[BOTTOM]);
  psn_pull_pair_in(p, k, top_bar, bottom_bar, h);
}

static void psn_clear_bar_in(void *job, int part) {
  Part p = psn_part_back(job, part);
  memset(psn_bar(job, &p), 0, N * sizeof(REAL));
}

static void psn_leave_bar_in(void *job, int part) {
  const Sweep *s = job;
  Part p = psn_part_back(s, part);
  if (PARTS > 1) psn_put_part(part, psn_bar(s, &p), s->start_bar);
}

/* Pull the cotangents of a step back to its start. */
static void psn_pull_taken(Taken *a) {
  Sweep *s = a->back;
  int64_t n = s->n, inside = psn_count_inside(s, n);
  double t = a->steps[2 * n], h = a->steps[2 * n + 1];
  int estimated = psn_bar_of(a->errors_bar, n) != 0 || psn_bar_of(a->stiffness_bar, n) != 0;
  s->start_bar = a->starts_bar + n * ENTIRE;
  IN_PARTS(s->team, psn_clear_bar_in, s);
  if (estimated || inside) {
    Replay r = {s, n, inside, h, {0}, inside ? ALL_STAGES : ESTIMATED, -1, 0, estimated ? a : 0, a->constant};
    REAL first[ALL_STAGES];
    psn_times(s->marks, s->mark_count, s->t0, s->t1, t, h, r.times);
    psn_times(s->marks, s->mark_count, s->t0, s->t1, t, 0.0, first);
    if (a->anywhere) r.times[0] = first[0];
    if (!psn_slot(s, n, 0)) s->evaluations += r.count;
    s->pulls += r.count - a->constant;
    IN_PARTS(s->team, psn_replay_in, &r);
  }
  IN_PARTS(s->team, psn_leave_bar_in, s);
  s->q -= inside;
}

static int64_t psn_pull_all(Taken *a) {
  Sweep *s = a->back;
  double until = psn_seconds() + s->seconds;
  for (int64_t turn = 1; s->n > 0; turn++) {
    if (turn % TURNS == 0 && psn_seconds() > until) return RUNNING;
    s->n--;
    psn_pull_taken(a);
  }
  return SUCCESS;
}

/* What Python calls: pull back all of them, the last one first, or go on with them for a while. */
int64_t pull_back(Taken *a) {
  Sweep *s = a->back;
  s->start_bar = a->starts_bar;
  WITH_TEAM(s, {
    if (!s->started) psn_begin(s);
    s->started = 1;
    s->status = psn_pull_all(a);
    if (s->status == SUCCESS) psn_finish(s);
  });
  if (s->status == SUCCESS) unpack_all(s->packed, s->packed_bar, psn_scratch(s));
  return s->status;
}
