/* What the loop of one solve is asked, how it measures errors and chooses sizes, and where Python
   calls it. */

/* What Newton's iteration may leave missing of the argument of a stage, entry by entry; both numbers,
   or 0 where they are by entries (replay/newton.py). */
typedef struct {
  double rtol, atol;
  const REAL *rtols, *atols;
} Accuracy;

typedef struct {
  /* The problem. */
  double t0, t1, dt0, dtmin, dtmax;
  double shift, factor;                   /* of the tolerance; shift < 0: by entries */
  double beta[3], gamma, qmin, qmax;      /* of the controller; gamma is `safety` of PID */
  int64_t control, max_steps, stop_count, save_count, moving, free, driven;
  int64_t mark_count;
  const double *marks, *stops, *saves;    /* jumps of the field; where steps end, and t1; saveat */
  const REAL *rtol, *atol;                /* by entries, or 0 */
  Accuracy accuracy;                      /* of Newton's iteration */
  const REAL *u0, *const *tensors;        /* the field's parameters, and where they are packed */
  REAL *packed;
  /* Where results go: rows of ENTIRE, the initial state's and those of `room` steps; of each step end,
     size, error, and stop or -1; for each saved time its step and its place in it, or the state that it
     is and NaN; and the last state. */
  REAL *ends, *saved, *final;
  double *steps, *places;
  REAL *memory, *kept; /* kept: room for the stages of the first kept_room steps, or 0 */
  int64_t room, kept_room;
  Event *events;
  int64_t event_count, found; /* the event that has ended the solve */
  struct Noise *noise;        /* of a stochastic equation */
  /* Of two methods that take turns (torch_engine/switching.py), or 0: where an attempt is stiff, how
     many in a row change the method, counted below zero where they are not stiff, and the factor of the
     size then; the attempts in a row so far. */
  double limit, factor_of_turn;
  int64_t patience, run;
  /* The state of the loop. */
  double t, h, last_t, last_h, last_error, eigenvalue, history[2], seconds;
  int64_t status, started, known, linearized, next_stop;
  int64_t accepted, rejected, evaluations, reached, finite;
  REAL *k; /* the derivatives of the step that is tried, in memory or in a slot of kept */
  int64_t threads; /* that may take parts, and their team */
  void *team;
} Solve;

/* Sums of squares of entries of a part's x, in units of the tolerance. */
PSN_INLINE REAL psn_squares(const Solve *s, int from, int to, int64_t shift, const REAL *x,
                            const REAL *u, const REAL *u1) {
  REAL sum = 0;
  if (s->shift >= 0) {
    REAL atol = (REAL)s->shift;
#pragma omp simd reduction(+ : sum)
    for (int i = from; i < to; i++) {
      REAL a = F(__builtin_fabs)(u[i]), b = F(__builtin_fabs)(u1[i]);
      REAL q = x[i] / (((a > b || a != a) ? a : b) + atol);
      sum += q * q;
    }
  } else
    for (int i = from; i < to; i++) {
      REAL a = F(__builtin_fabs)(u[i]), b = F(__builtin_fabs)(u1[i]);
      REAL unit = ((a > b || a != a) ? a : b) * s->rtol[shift + i] + s->atol[shift + i];
      REAL q = x[i] / unit;
      sum += q * q;
    }
  return sum;
}

static REAL psn_squares_of(const Solve *s, int part, const REAL *x, const REAL *u, const REAL *u1) {
  REAL sum = 0;
  FOR_RUNS(part, 0) {
    int64_t driven = s->driven - run.shift; /* the later entries drive no steps */
    if (driven >= run.to) sum += psn_squares(s, run.from, run.to, run.shift, x, u, u1);
    else if (driven > run.from) sum += psn_squares(s, run.from, (int)driven, run.shift, x, u, u1);
  }
  return sum;
}

/* The norm of a whole state. */
static double psn_norm_of(const Solve *s, const REAL *x, const REAL *u, const REAL *u1) {
  return F(__builtin_sqrt)(psn_squares_of(s, 0, x, u, u1));
}

static double psn_pid(const Solve *s, double error) {
  double errors[3] = {psn_larger(error, 1e-10), s->history[0], s->history[1]}, product = 1;
  for (int i = 0; i < 3; i++) product *= pow(errors[i] / s->gamma, -s->beta[i]);
  return 1 + atan(product - 1);
}

static double psn_size_after_accepted(Solve *s, double h, double error) {
  if (s->control == FIXED) return h;
  if (s->control == DERIVATIVE) {
    double factor = psn_pid(s, error);
    s->history[1] = s->history[0];
    s->history[0] = psn_larger(error, 1e-10);
    return h * factor;
  }
  double q = 0;
  if (error > 0) q = pow(error, s->beta[0]) / pow(s->history[0], s->beta[1]) / s->gamma;
  s->history[0] = psn_larger(error, 1e-4);
  return h / psn_smaller(psn_larger(q, 1 / s->qmax), 1 / s->qmin);
}

static double psn_size_after_rejected(const Solve *s, double h, double error) {
  if (s->control == DERIVATIVE)
    return isfinite(error) ? h * psn_smaller(psn_pid(s, error), 0.9) : h * 0.2;
  if (!isfinite(error)) return h * s->qmin;
  return h / psn_smaller(1 / s->qmin, psn_larger(pow(error, s->beta[0]) / s->gamma, 1.0));
}

/* In the file of the loop: step until the end or an event, until there is no room, or for a while; the
   present state, or its first part; and a state of which that is given, in one piece. */
static int64_t psn_march(Solve *s);
static const REAL *psn_state(const Solve *s);
static void psn_put_all(Solve *s, const REAL *x, REAL *whole);

static void psn_keep_end(Solve *s, int64_t state, const REAL *u) {
  psn_put_all(s, u, s->saved + s->reached * ENTIRE);
  double *place = s->places + 2 * s->reached++;
  place[0] = (double)state, place[1] = NAN;
}

/* What Python calls. */
int64_t march(Solve *s) {
  if (!s->started || s->status == CHANGED) pack_all(s->tensors, s->packed);
  WITH_TEAM(s, {
    s->status = psn_march(s);
    psn_put_all(s, psn_state(s), s->final);
  });
  s->finite = 1;
  for (int64_t i = 0; i < ENTIRE; i++) s->finite &= isfinite(s->final[i]) != 0;
  return s->status;
}
