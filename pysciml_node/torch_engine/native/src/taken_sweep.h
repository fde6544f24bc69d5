/* The discrete adjoint of single steps that are taken again; behind src/taken.h and src/dense_sweep.h. */

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

/* The method's: pull the cotangents of a step's end back to its start, with those that arrive inside of
   it and, where it is `estimated`, those of its estimates. */
static void psn_replay_taken(const Taken *a, int64_t inside, int estimated);

/* Pull the cotangents of a step back to its start. */
static void psn_pull_taken(Taken *a) {
  Sweep *s = a->back;
  int64_t n = s->n, inside = psn_count_inside(s, n);
  int estimated = psn_bar_of(a->errors_bar, n) != 0 || psn_bar_of(a->stiffness_bar, n) != 0;
  s->start_bar = a->starts_bar + n * ENTIRE;
  IN_PARTS(s->team, psn_clear_bar_in, s);
  if (estimated || inside) psn_replay_taken(a, inside, estimated);
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
