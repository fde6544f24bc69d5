/* The time loop, for any one-step method with a tableau.

   The emitted code before this file gives the sizes (N entries of the state in rows of ROW, STAGES,
   ALL_STAGES with those of the dense output, WORK numbers of a field evaluation), the method
   (combine, NODES, DENSE, ...) and the field (field, pull), for the rows of a part (parts.h); the
   code after it says how the stages of a step are found and pulled back. The loop is that of
   pysciml_node/torch_engine/march.py and the first step that of replay/norms.py, line by line:
   whoever changes one changes the other. */

/* What lies in the memory of a part, where s is a Part; with a Solve, of the first part. */
#define K(s, i) ((s)->k + (i) * ROW)
#define U(s) ((s)->memory + ALL_STAGES * ROW)
#define G(s) ((s)->memory + (ALL_STAGES + 1) * ROW)
#define LAST(s) ((s)->memory + (ALL_STAGES + 2) * ROW)
#define EXTRA(s) ((s)->memory + (ALL_STAGES + 3) * ROW)
#define W(s) ((s)->memory + (ALL_STAGES + 4) * ROW)
#define MARCH_ROOM ((ALL_STAGES + 4) * ROW + WORK)
/* The stages of a step that are kept for the sweep: derivatives, arguments, values of the field. */
#define SLOT (ALL_STAGES * (2 * ROW + WORK))
#define ARGUMENT(slot, i) ((slot) + (ALL_STAGES + (i)) * ROW)
#define VALUES(slot, i) ((slot) + 2 * ALL_STAGES * ROW + (i) * WORK)

/* A part, with the derivatives in memory or in a slot, of which those of the first part are k. */
static inline Part psn_part(const Solve *s, int part, REAL *k) {
  int64_t room = k == s->memory ? MARCH_ROOM : SLOT;
  return (Part){s->memory + (int64_t)part * MARCH_ROOM, k + part * room, part};
}

#define FOR_PARTS                                                                                  \
  for (Part p = psn_part(s, 0, s->k); p.part < PARTS; p = psn_part(s, p.part + 1, s->k))

static const REAL *psn_state(const Solve *s) { return U(s); }

/* Where the argument of a stage goes, and the values of the field there. */
static REAL *psn_argument(const Part *p, int i) {
  return p->k == p->memory ? G(p) : ARGUMENT(p->k, i);
}

static REAL *psn_values(const Part *p, int i) {
  return p->k == p->memory ? W(p) : VALUES(p->k, i);
}

/* The end of an attempt, and sums of squares of its errors by parts. */
typedef struct {
  Solve *s;
  REAL h;
  int adaptive;
  REAL high[PARTS], low[PARTS];
} Ending;

static void psn_end_in(void *job, int part) {
  Ending *e = job;
  Part p = psn_part(e->s, part, e->s->k);
  REAL *u = U(&p), *u1 = LAST(&p), *error = EXTRA(&p);
  if (FSAL && e->adaptive) memcpy(u1, psn_argument(&p, STAGES - 1), N * sizeof(REAL));
  else combine(END, e->h, u, K(&p, 0), u1);
  if (!e->adaptive) return;
  error_of(K(&p, 0), error);
  e->high[part] = psn_squares_of(e->s, part, error, u, u1);
#ifdef TWO_ERRORS
  error_low_of(K(&p, 0), error);
  e->low[part] = psn_squares_of(e->s, part, error, u, u1);
#endif
}

/* The norm of the errors of an attempt, without its factor, and the sums of squares that it is of. */
static double psn_error_norm(const Ending *e, REAL *high, REAL *low) {
  *high = *low = 0;
  for (int part = 0; part < PARTS; part++) *high += e->high[part], *low += e->low[part];
  double norm = F(__builtin_sqrt)(*high);
#ifdef TWO_ERRORS
  if (norm != 0) norm = *high / F(__builtin_sqrt)(*high + (REAL)0.01 * *low);
#endif
  return norm;
}

/* The end of an attempt, into LAST, and its error; NaN for fixed steps. */
static double psn_end(Solve *s, double h, int adaptive) {
  Ending e = {s, (REAL)h, adaptive};
  REAL high, low;
  IN_PARTS(s->team, psn_end_in, &e);
  return adaptive ? psn_error_norm(&e, &high, &low) * s->factor * fabs(h) : NAN;
}

/* The field at a state in memory, of which the first part is given. */
typedef struct {
  Solve *s;
  REAL t;
  const REAL *u;
  REAL *k, *values;
} Evaluation;

static void psn_evaluate_in(void *job, int part) {
  const Evaluation *e = job;
  int64_t at = (int64_t)part * MARCH_ROOM;
  field_in(psn_first(part), e->t, e->u + at, e->s->packed, e->k + at, e->values + at);
}

static void psn_evaluate(Solve *s, REAL t, const REAL *u, REAL *k, REAL *values) {
  Evaluation e = {s, t, u, k, values};
  IN_PARTS(s->team, psn_evaluate_in, &e);
  s->evaluations++;
}

/* The method's: the first stage of a step, and the missing ones up to `upto`, of which an explicit
   method leaves the last one's argument in its place. */
static void psn_first_stage(Solve *s, double t, double h);
static void psn_stages(Solve *s, double t, double h, int upto);

/* An estimate of the largest eigenvalue of df/du, behind an attempt. */
static double psn_eigenvalue(Solve *s, double t, double h);

/* Hairer's first step (Solving Ordinary Differential Equations I, section II.4). */
static double psn_first_size(Solve *s, double direction) {
  if (!isnan(s->dt0)) return copysign(s->dt0, direction);
  psn_first_stage(s, s->t0, 0.0);
  double span = s->t1 - s->t0, length = fabs(span);
  REAL size = 0, slope = 0, bend = 0;
  FOR_PARTS {
    size += psn_squares_of(s, p.part, U(&p), U(&p), U(&p));
    slope += psn_squares_of(s, p.part, K(&p, 0), U(&p), U(&p));
  }
  double d0 = F(__builtin_sqrt)(size) * s->factor, d1 = F(__builtin_sqrt)(slope) * s->factor;
  if (!isfinite(d1)) return NAN;
  double h0 = d0 < 1e-5 || d1 < 1e-5 ? 1e-6 : 0.01 * d0 / d1;
  h0 = copysign(psn_smaller(h0, length), span);
  FOR_PARTS for (int i = 0; i < N; i++) G(&p)[i] = U(&p)[i] + (REAL)h0 * K(&p, 0)[i];
  psn_evaluate(s, (REAL)(s->t0 + h0), G(s), EXTRA(s), W(s));
  FOR_PARTS {
    for (int i = 0; i < N; i++) EXTRA(&p)[i] -= K(&p, 0)[i];
    bend += psn_squares_of(s, p.part, EXTRA(&p), U(&p), U(&p));
  }
  double d2 = F(__builtin_sqrt)(bend) * s->factor / fabs(h0);
  double largest = d2 > d1 ? d2 : d1;
  if (!isfinite(largest)) return h0;
  double h1 = largest <= 1e-15 ? psn_larger(1e-6, fabs(h0) * 1e-3)
                               : pow(0.01 / largest, 1.0 / ORDER);
  return copysign(psn_smaller(psn_smaller(100 * fabs(h0), h1), length), span);
}

/* A state, of which the first part is given, in one piece. */
typedef struct {
  const REAL *x;
  REAL *whole;
} Putting;

static void psn_put_in(void *job, int part) {
  const Putting *p = job;
  psn_put_part(part, p->x + (int64_t)part * MARCH_ROOM, p->whole);
}

static void psn_put_all(Solve *s, const REAL *x, REAL *whole) {
  Putting p = {x, whole};
  IN_PARTS(s->team, psn_put_in, &p);
}

/* The state at a place in a step. */
typedef struct {
  Solve *s;
  REAL h, weights[ALL_STAGES];
  REAL *out;
} Place;

static void psn_dense_in(void *job, int part) {
  const Place *place = job;
  Part p = psn_part(place->s, part, place->s->k);
  const REAL *u = U(&p), *k = K(&p, 0);
  FOR_RUNS(part, 0) {
    REAL *out = place->out + run.shift;
    for (int i = run.from; i < run.to; i++) {
      REAL sum = 0;
      for (int j = 0; j < ALL_STAGES; j++) sum += place->weights[j] * k[j * ROW + i];
      out[i] = u[i] + place->h * sum;
    }
  }
}

static void psn_dense(Solve *s, double t, double h, double theta, REAL *out) {
  psn_stages(s, t, h, ALL_STAGES);
  Place place = {s, (REAL)h, {0}, out};
  psn_dense_weights(theta, 0, place.weights);
  IN_PARTS(s->team, psn_dense_in, &place);
}

/* Save what lies in an accepted step from U to u1 (saver.py). */
static void psn_save(Solve *s, double t, double h, double end, int lands, const REAL *u1) {
  int forward = h > 0, last = lands && s->next_stop == s->stop_count - 1;
  int closed = (s->moving && !last) || (s->free && !lands);
  while (s->reached < s->save_count) {
    double at = s->saves[s->reached];
    if (!((forward ? at < end : at > end) || (closed && at == end))) break;
    double theta = (at - t) / h;
    psn_dense(s, t, h, theta, s->saved + s->reached * ENTIRE);
    double *place = s->places + 2 * s->reached++;
    place[0] = (double)s->accepted, place[1] = theta;
  }
  while (s->reached < s->save_count && s->saves[s->reached] == end)
    psn_keep_end(s, s->accepted + 1, u1);
}

/* Where the derivatives of the next step go. */
static REAL *psn_next_k(const Solve *s) {
  return s->accepted < s->kept_room ? s->kept + s->accepted * PARTS * SLOT : s->memory;
}

/* Write the end of an accepted step down, and go on from there to the stages of another one. */
typedef struct {
  Solve *s;
  REAL *end, *k;
  int same; /* whether its first stage is the END_STAGE of the one before */
} Acceptance;

static void psn_accept_in(void *job, int part) {
  const Acceptance *a = job;
  Part p = psn_part(a->s, part, a->s->k), next = psn_part(a->s, part, a->k);
  psn_put_part(part, LAST(&p), a->end);
  memcpy(U(&p), LAST(&p), N * sizeof(REAL));
  if (!a->same) return;
  memcpy(K(&next, 0), K(&p, END_STAGE), N * sizeof(REAL));
  if (next.k == next.memory) return;
  memcpy(ARGUMENT(next.k, 0), ARGUMENT(p.k, END_STAGE), N * sizeof(REAL));
  memcpy(VALUES(next.k, 0), VALUES(p.k, END_STAGE), WORK * sizeof(REAL));
}

static void psn_accept(Solve *s, int same) {
  REAL *end = s->ends + ++s->accepted * ENTIRE;
  Acceptance a = {s, end, psn_next_k(s), same};
  IN_PARTS(s->team, psn_accept_in, &a);
  s->k = a.k;
  s->known = same, s->linearized = 0;
}

#if PARTS == 1
/* In events.h. */
static int psn_cut(Solve *s, double t, double *h, double end);
#else
/* Events are looked for in the whole state. */
static int psn_cut(Solve *s, double t, double *h, double end) { return 0; }
#endif

/* Whether the other method is to take the next attempt. */
static int psn_turns(Solve *s) {
  if (!s->patience) return 0;
  /* What is not finite counts as stiff. */
  int stiff = !(fabs(s->h) * s->eigenvalue <= s->limit);
  s->run = stiff ? (s->run > 0 ? s->run : 0) + 1 : (s->run < 0 ? s->run : 0) - 1;
  if (s->patience > 0 ? s->run < s->patience : s->run > s->patience) return 0;
  s->h *= s->factor_of_turn;
  return 1;
}

/* Go on from where the other method has left off. */
static void psn_take_over(Solve *s) {
  s->k = s->memory;
  FOR_PARTS psn_take_part(p.part, s->final, U(&p));
  s->known = s->linearized = 0;
}

static int64_t psn_march(Solve *s) {
  int adaptive = s->control != FIXED;
  double direction = s->t1 > s->t0 ? 1 : -1, until = psn_seconds() + s->seconds;
  if (!s->started) {
    s->k = psn_next_k(s);
    memcpy(s->ends, s->u0, ENTIRE * sizeof(REAL));
    FOR_PARTS psn_take_part(p.part, s->u0, U(&p));
    while (s->reached < s->save_count && s->saves[s->reached] == s->t0) psn_keep_end(s, 0, U(s));
    s->t = s->t0;
    s->h = psn_first_size(s, direction);
    /* The first size is a guess: only the error of a step asks for less than the limit. */
    if (isfinite(s->h) && fabs(s->h) < s->dtmin) s->h = copysign(s->dtmin, direction);
    s->started = 1;
  }
  if (s->status == CHANGED) psn_take_over(s);
  for (int64_t turn = 1;; turn++) {
    double h = s->h, t = s->t;
    if (!isfinite(h)) return UNSTABLE;
    if (s->accepted + s->rejected >= s->max_steps) return OUT_OF_STEPS;
    if (s->accepted == s->room) return FULL;
    if (turn % TURNS == 0 && psn_seconds() > until) return RUNNING;
    double proposed = copysign(psn_smaller(fabs(h), s->dtmax), direction);
    double stop = s->stops[s->next_stop];
    int lands = fabs(stop - t) <= fabs(proposed) * (1 + SLIVER);
    /* Far from zero the end may be rounded to the stop. */
    lands = lands || (psn_is_far(s->t0, s->t1) && t + proposed == stop);
    h = lands ? psn_size_between(t, stop) : psn_size_from(s->t0, s->t1, t, proposed);
    double unit = nextafter(fabs(t), INFINITY) - fabs(t);
    if (adaptive && fabs(proposed) < psn_larger(s->dtmin, 4 * unit) && !lands)
      return s->last_h != 0 && !isfinite(s->last_error) ? UNSTABLE : TOO_SMALL;
    psn_first_stage(s, t, h);
    psn_stages(s, t, h, FSAL && !adaptive ? STAGES - 1 : STAGES);
    double error = psn_end(s, h, adaptive);
    s->last_t = t, s->last_h = h, s->last_error = error;
    if (s->patience) s->eigenvalue = psn_eigenvalue(s, t, h);
    if (adaptive && !(error <= 1)) {
      s->rejected++;
      s->known = 1;
      s->h = psn_size_after_rejected(s, h, error);
      if (psn_turns(s)) return CHANGED;
      continue;
    }
    double end = lands ? stop : t + h;
    int cut = s->event_count && psn_cut(s, t, &h, end);
    if (cut) end = t + h, lands = 0;
    psn_save(s, t, h, end, lands, LAST(s));
    double *row = s->steps + 4 * s->accepted;
    row[0] = end, row[1] = h, row[2] = error, row[3] = lands ? (double)s->next_stop : -1;
    psn_accept(s, END_STAGE >= 0 && s->known > END_STAGE && !lands);
    s->t = end;
    if (cut) return STOPPED;
    if (lands && ++s->next_stop == s->stop_count) return SUCCESS;
    double following = psn_size_after_accepted(s, h, error);
    if (!adaptive)
      s->h = proposed;
    else /* A step cut short by a stop says little: keep the size that was proposed. */
      s->h = fabs(h) < 0.9 * fabs(proposed) && fabs(proposed) >= fabs(following) ? proposed
                                                                                : following;
    if (psn_turns(s)) return CHANGED;
  }
}
