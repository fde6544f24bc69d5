/* The discrete adjoint (replay/adjoint_discrete.py): accepted steps replayed backward. */
typedef struct Sweep {
  double t0, t1, seconds;
  int64_t mark_count;
  const double *marks;
  Accuracy accuracy;
  struct Noise *noise; /* of a stochastic equation */
  const REAL *ends, *packed; /* as in Solve */
  const double *steps, *places;
  /* Cotangents that arrive; 0 where there is none. */
  const REAL *saved_bar, *ends_bar, *last_bar;
  /* Cotangents that leave: of u0, of the packed parameters; and of each step's start and size and
     each saved time's place in its step, or 0: these PARTS times, and in the end their sums first. */
  REAL *start_bar, *packed_bar;
  double *t_bar, *h_bar, *theta_bar;
  REAL *memory;
  const REAL *kept; /* the stages of the first kept_count steps */
  /* The step behind, the first of the method's, and those behind its last; the saved time behind. */
  int64_t n, first, count, q, kept_count, started, live, shared, evaluations, pulls, replayed, status;
  int64_t reached, threads; /* saved times; as in Solve */
  void *team;
} Sweep;

/* Whether a saved time lies inside a step, and a cotangent arrives at it. */
static int psn_is_inside(const Sweep *s, int64_t saved, int64_t n) {
  return s->saved_bar && saved >= 0 && s->places[2 * saved] == n && !isnan(s->places[2 * saved + 1]);
}

/* Whether a saved time is that of a state, and a cotangent arrives at it. */
static int psn_is_at(const Sweep *s, int64_t saved, int64_t state) {
  return s->saved_bar && saved >= 0 && s->places[2 * saved] == state &&
         isnan(s->places[2 * saved + 1]);
}

/* Saved times inside a step at which cotangents arrive. */
static int64_t psn_count_inside(const Sweep *s, int64_t n) {
  int64_t inside = 0;
  while (psn_is_inside(s, s->q - inside, n)) inside++;
  return inside;
}

/* The method's: pull the cotangent of a step's end, and those that arrive inside of it, back to its
   start; and memory for cotangents of a field's values. */
static void psn_replay(Sweep *s, int64_t n);
static REAL *psn_scratch(Sweep *s);

/* The memory of a part, and its cotangents that go on from step to step: of the state, and of the
   parameters. */
#if PARTS == 1
static Part psn_part_back(const Sweep *s, int part) { return (Part){s->memory, s->memory, 0}; }
static REAL *psn_bar(const Sweep *s, const Part *p) { return s->start_bar; }
static REAL *psn_packed_bar(const Sweep *s, const Part *p) { return s->packed_bar; }
#else
static Part psn_part_back(const Sweep *s, int part);
static REAL *psn_bar(const Sweep *s, const Part *p);
static REAL *psn_packed_bar(const Sweep *s, const Part *p);
#endif

/* The cotangents that arrive at a state, those of `saved` saved times among them. */
typedef struct {
  Sweep *s;
  const REAL *end, *last;
  int64_t saved;
  int live[PARTS];
} Arrival;

static void psn_arrive_in(void *job, int part) {
  Arrival *a = job;
  const Sweep *s = a->s;
  Part p = psn_part_back(s, part);
  REAL *bar = psn_bar(s, &p);
  a->live[part] = a->last || a->saved;
  FOR_RUNS(part, 0) {
    if (a->end) {
      const REAL *v = a->end + run.shift;
      for (int e = run.from; e < run.to; e++) {
        bar[e] += v[e];
        a->live[part] |= v[e] != 0;
      }
    }
    if (a->last) {
      const REAL *v = a->last + run.shift;
      for (int e = run.from; e < run.to; e++) bar[e] += v[e];
    }
    for (int64_t m = s->q; m > s->q - a->saved; m--) {
      const REAL *v = s->saved_bar + m * ENTIRE + run.shift;
      for (int e = run.from; e < run.to; e++) bar[e] += v[e];
    }
  }
}

static void psn_arrive(Sweep *s, int64_t state) {
  Arrival a = {s};
  if (s->ends_bar) a.end = s->ends_bar + state * ENTIRE;
  if (state == s->count) a.last = s->last_bar;
  while (psn_is_at(s, s->q - a.saved, state)) a.saved++;
  if (!(a.end || a.last || a.saved)) return;
  IN_PARTS(s->team, psn_arrive_in, &a);
  for (int part = 0; part < PARTS; part++) s->live |= a.live[part];
  s->q -= a.saved;
}

/* Go back through the steps, to the first of the method's or for a while. What arrives where it starts
   comes with the steps before it. */
static int64_t psn_sweep(Sweep *s) {
  double until = psn_seconds() + s->seconds;
  for (int64_t turn = 1; s->n > s->first; turn++) {
    if (turn % TURNS == 0 && psn_seconds() > until) return RUNNING;
    psn_arrive(s, s->n);
    int64_t n = --s->n;
    if (s->live || psn_is_inside(s, s->q, n)) {
      psn_replay(s, n);
      s->live = 1;
    }
  }
  if (!s->first) psn_arrive(s, 0);
  return SUCCESS;
}

#if PARTS > 1
static void psn_begin_in(void *job, int part) {
  const Sweep *s = job;
  Part p = psn_part_back(s, part);
  memset(psn_bar(s, &p), 0, N * sizeof(REAL));
  memset(psn_packed_bar(s, &p), 0, ALL_PACKED * sizeof(REAL));
}

/* The cotangent of the initial state, and a share of the parameters'. */
static void psn_finish_in(void *job, int part) {
  const Sweep *s = job;
  Part p = psn_part_back(s, part);
  psn_put_part(part, psn_bar(s, &p), s->start_bar);
  int64_t from = (int64_t)ALL_PACKED * part / PARTS, to = (int64_t)ALL_PACKED * (part + 1) / PARTS;
  memset(s->packed_bar + from, 0, (to - from) * sizeof(REAL));
  for (int i = 0; i < PARTS; i++) {
    Part other = psn_part_back(s, i);
    const REAL *bar = psn_packed_bar(s, &other);
    for (int64_t e = from; e < to; e++) s->packed_bar[e] += bar[e];
  }
}

/* Sums over the parts of what each adds to the cotangents of times. */
static void psn_sum_times(double *bar, int64_t count) {
  for (int part = 1; part < PARTS; part++)
    for (int64_t i = 0; i < count; i++) bar[i] += bar[part * count + i];
}

static void psn_begin(Sweep *s) { psn_do(s->team, psn_begin_in, s); }

static void psn_finish(Sweep *s) {
  psn_do(s->team, psn_finish_in, s);
  if (!s->t_bar) return;
  psn_sum_times(s->t_bar, s->count);
  psn_sum_times(s->h_bar, s->count);
  psn_sum_times(s->theta_bar, s->reached);
}
#else
static void psn_begin(Sweep *s) {
  memset(s->start_bar, 0, N * sizeof(REAL));
  memset(s->packed_bar, 0, ALL_PACKED * sizeof(REAL));
}

static void psn_finish(Sweep *s) {}
#endif

/* What Python calls. At the end the cotangents of the packed parameters become those of the
   parameters. */
int64_t sweep(Sweep *s) {
  WITH_TEAM(s, {
    if (!s->started) psn_begin(s);
    s->started = 1;
    s->status = psn_sweep(s);
    if (s->status == SUCCESS) psn_finish(s);
  });
  if (s->status == SUCCESS) unpack_all(s->packed, s->packed_bar, psn_scratch(s));
  return s->status;
}
