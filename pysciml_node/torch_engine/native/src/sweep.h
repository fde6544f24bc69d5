/* The discrete adjoint (replay/adjoint_discrete.py): accepted steps replayed backward. */
typedef struct {
  double t0, t1, seconds;
  int64_t mark_count;
  const double *marks;
  struct Noise *noise; /* of a stochastic equation */
  const REAL *u0, *ends, *packed;
  const double *steps, *places;
  /* Cotangents that arrive; 0 where there is none. */
  const REAL *saved_bar, *ends_bar, *last_bar;
  /* Cotangents that leave: of u0, of the packed parameters; and of each step's start and size and
     each saved time's place in its step, or 0. */
  REAL *start_bar, *packed_bar;
  double *t_bar, *h_bar, *theta_bar;
  REAL *memory;
  const REAL *kept; /* the stages of the first kept_count steps */
  int64_t n, count, q, kept_count, started, live, shared, evaluations, pulls, replayed, status;
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

/* The method's: pull the cotangent of a step's end, in start_bar, and those that arrive inside of it
   back to its start; and memory for cotangents of a field's values. */
static void psn_replay(Sweep *s, int64_t n);
static REAL *psn_scratch(Sweep *s);

static void psn_arrive(Sweep *s, int64_t state) {
  REAL *bar = s->start_bar;
  if (s->ends_bar && state) {
    const REAL *row = s->ends_bar + (state - 1) * N;
    for (int e = 0; e < N; e++) {
      bar[e] += row[e];
      s->live |= row[e] != 0;
    }
  }
  if (s->last_bar && state == s->count) {
    for (int e = 0; e < N; e++) bar[e] += s->last_bar[e];
    s->live = 1;
  }
  while (psn_is_at(s, s->q, state)) {
    for (int e = 0; e < N; e++) bar[e] += s->saved_bar[s->q * N + e];
    s->live = 1;
    s->q--;
  }
}

/* Go back through the steps, to the first or for a while. */
static int64_t psn_sweep(Sweep *s) {
  double until = psn_seconds() + s->seconds;
  for (int64_t turn = 1; s->n > 0; turn++) {
    if (turn % TURNS == 0 && psn_seconds() > until) return RUNNING;
    psn_arrive(s, s->n);
    int64_t n = --s->n;
    if (s->live || psn_is_inside(s, s->q, n)) {
      psn_replay(s, n);
      s->live = 1;
    } else if (s->t_bar)
      s->t_bar[n] = s->h_bar[n] = 0;
  }
  psn_arrive(s, 0);
  return SUCCESS;
}

/* What Python calls. At the end the cotangents of the packed parameters become those of the
   parameters. */
int64_t sweep(Sweep *s) {
  if (!s->started) {
    memset(s->start_bar, 0, N * sizeof(REAL));
    memset(s->packed_bar, 0, ALL_PACKED * sizeof(REAL));
    s->started = 1;
  }
  s->status = psn_sweep(s);
  if (s->status == SUCCESS) unpack_all(s->packed, s->packed_bar, psn_scratch(s));
  return s->status;
}
