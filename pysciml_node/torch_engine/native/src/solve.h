/* The time loop, for any one-step method with a tableau.

   The emitted code before this file gives the sizes (N entries of the state in rows of ROW, STAGES,
   ALL_STAGES with those of the dense output, WORK numbers of a field evaluation), the method
   (combine, NODES, DENSE, ...) and the field (field, pull); the code after it says how the stages
   of a step are found and pulled back. The loop is that of
   pysciml_node/torch_engine/march.py and the first step that of replay/norms.py, line by line:
   whoever changes one changes the other. */

#define K(s, i) (s->k + (i) * ROW)
#define U(s) (s->memory + ALL_STAGES * ROW)
#define G(s) (s->memory + (ALL_STAGES + 1) * ROW)
#define LAST(s) (s->memory + (ALL_STAGES + 2) * ROW)
#define EXTRA(s) (s->memory + (ALL_STAGES + 3) * ROW)
#define W(s) (s->memory + (ALL_STAGES + 4) * ROW)

static const REAL *psn_state(const Solve *s) { return U(s); }

/* The stages of a step that are kept for the sweep: derivatives, arguments, values of the field. */
#define SLOT (ALL_STAGES * (2 * ROW + WORK))
#define ARGUMENT(slot, i) ((slot) + (ALL_STAGES + (i)) * ROW)
#define VALUES(slot, i) ((slot) + 2 * ALL_STAGES * ROW + (i) * WORK)

/* Where the argument of a stage goes, and the values of the field there. */
static REAL *psn_argument(const Solve *s, int i) {
  return s->k == s->memory ? G(s) : ARGUMENT(s->k, i);
}

static REAL *psn_values(const Solve *s, int i) {
  return s->k == s->memory ? W(s) : VALUES(s->k, i);
}

/* Go on to the stages of another step. `same`: its first is the END_STAGE of the one before. */
static void psn_next_stages(Solve *s, int same) {
  const REAL *last = s->k;
  s->k = s->accepted < s->kept_room ? s->kept + s->accepted * SLOT : s->memory;
  s->known = same, s->linearized = 0;
  if (!same) return;
  memcpy(K(s, 0), last + END_STAGE * ROW, N * sizeof(REAL));
  if (s->k == s->memory) return;
  memcpy(ARGUMENT(s->k, 0), ARGUMENT(last, END_STAGE), N * sizeof(REAL));
  memcpy(VALUES(s->k, 0), VALUES(last, END_STAGE), WORK * sizeof(REAL));
}

static double psn_step_error(Solve *s, const REAL *u, const REAL *u1, double h) {
  REAL *error = EXTRA(s);
  error_of(K(s, 0), error);
  double norm = psn_norm_of(s, error, u, u1);
#ifdef TWO_ERRORS
  if (norm != 0) {
    error_low_of(K(s, 0), error);
    REAL low = (REAL)psn_norm_of(s, error, u, u1), high = (REAL)norm;
    norm = high * high / F(__builtin_sqrt)(high * high + (REAL)0.01 * low * low);
  }
#endif
  return norm * s->factor * fabs(h);
}

static void psn_evaluate(Solve *s, REAL t, const REAL *u, REAL *k, REAL *values) {
  field(t, u, s->packed, k, values);
  s->evaluations++;
}

/* The method's: the first stage of a step, and the missing ones up to `upto`, of which an explicit
   method leaves the last one's argument in its place. */
static void psn_first_stage(Solve *s, double t, double h);
static void psn_stages(Solve *s, double t, double h, int upto);

/* Hairer's first step (Solving Ordinary Differential Equations I, section II.4). */
static double psn_first_size(Solve *s, double direction) {
  if (!isnan(s->dt0)) return copysign(s->dt0, direction);
  psn_first_stage(s, s->t0, 0.0);
  const REAL *u = U(s), *k = K(s, 0);
  double span = s->t1 - s->t0, length = fabs(span);
  double d0 = psn_norm_of(s, u, u, u) * s->factor, d1 = psn_norm_of(s, k, u, u) * s->factor;
  if (!isfinite(d1)) return NAN;
  double h0 = d0 < 1e-5 || d1 < 1e-5 ? 1e-6 : 0.01 * d0 / d1;
  h0 = copysign(psn_smaller(h0, length), span);
  REAL *g = G(s), *change = EXTRA(s);
  for (int i = 0; i < N; i++) g[i] = u[i] + (REAL)h0 * k[i];
  psn_evaluate(s, (REAL)(s->t0 + h0), g, change, W(s));
  for (int i = 0; i < N; i++) change[i] -= k[i];
  double d2 = psn_norm_of(s, change, u, u) * s->factor / fabs(h0);
  double largest = d2 > d1 ? d2 : d1;
  if (!isfinite(largest)) return h0;
  double h1 = largest <= 1e-15 ? psn_larger(1e-6, fabs(h0) * 1e-3)
                               : pow(0.01 / largest, 1.0 / ORDER);
  return copysign(psn_smaller(psn_smaller(100 * fabs(h0), h1), length), span);
}

/* The state at a place in a step. */
static void psn_dense(Solve *s, double t, double h, double theta, REAL *out) {
  psn_stages(s, t, h, ALL_STAGES);
  REAL weights[ALL_STAGES];
  const REAL *u = U(s), *k = K(s, 0);
  psn_dense_weights(theta, 0, weights);
  for (int i = 0; i < N; i++) {
    REAL sum = 0;
    for (int j = 0; j < ALL_STAGES; j++) sum += weights[j] * k[j * ROW + i];
    out[i] = u[i] + (REAL)h * sum;
  }
}

/* Save what lies in an accepted step from U to u1 (saver.py). */
static void psn_save(Solve *s, double t, double h, double end, int lands, const REAL *u1) {
  int forward = h > 0, last = lands && s->next_stop == s->stop_count - 1;
  int closed = (s->moving && !last) || (s->free && !lands);
  while (s->reached < s->save_count) {
    double at = s->saves[s->reached];
    if (!((forward ? at < end : at > end) || (closed && at == end))) break;
    double theta = (at - t) / h;
    psn_dense(s, t, h, theta, s->saved + s->reached * N);
    double *place = s->places + 2 * s->reached++;
    place[0] = (double)s->accepted, place[1] = theta;
  }
  while (s->reached < s->save_count && s->saves[s->reached] == end)
    psn_keep_end(s, s->accepted + 1, u1);
}

/* In events.h. */
static int psn_cut(Solve *s, double t, double *h, double end);

static int64_t psn_march(Solve *s) {
  int adaptive = s->control != FIXED;
  double direction = s->t1 > s->t0 ? 1 : -1, until = psn_seconds() + s->seconds;
  if (!s->started) {
    memcpy(U(s), s->u0, N * sizeof(REAL));
    psn_next_stages(s, 0);
    while (s->reached < s->save_count && s->saves[s->reached] == s->t0) psn_keep_end(s, 0, U(s));
    s->t = s->t0;
    s->h = psn_first_size(s, direction);
    /* The first size is a guess: only the error of a step asks for less than the limit. */
    if (isfinite(s->h) && fabs(s->h) < s->dtmin) s->h = copysign(s->dtmin, direction);
    s->started = 1;
  }
  for (int64_t turn = 1;; turn++) {
    double h = s->h, t = s->t;
    if (!isfinite(h)) return UNSTABLE;
    if (s->accepted + s->rejected >= s->max_steps) return OUT_OF_STEPS;
    if (s->accepted == s->room) return FULL;
    if (turn % TURNS == 0 && psn_seconds() > until) return RUNNING;
    double proposed = copysign(psn_smaller(fabs(h), s->dtmax), direction);
    double stop = s->stops[s->next_stop];
    int lands = fabs(stop - t) <= fabs(proposed) * (1 + SLIVER);
    h = lands ? psn_size_between(t, stop) : proposed;
    double unit = nextafter(fabs(t), INFINITY) - fabs(t);
    if (adaptive && fabs(proposed) < psn_larger(s->dtmin, 4 * unit) && !lands)
      return s->last_h != 0 && !isfinite(s->last_error) ? UNSTABLE : TOO_SMALL;
    psn_first_stage(s, t, h);
    psn_stages(s, t, h, FSAL && !adaptive ? STAGES - 1 : STAGES);
    REAL *u = U(s), *u1 = LAST(s);
    if (FSAL && adaptive)
      memcpy(u1, psn_argument(s, STAGES - 1), N * sizeof(REAL));
    else
      combine(END, (REAL)h, u, K(s, 0), u1);
    double error = adaptive ? psn_step_error(s, u, u1, h) : NAN;
    s->last_t = t, s->last_h = h, s->last_error = error;
    if (adaptive && !(error <= 1)) {
      s->rejected++;
      s->known = 1;
      s->h = psn_size_after_rejected(s, h, error);
      continue;
    }
    double end = lands ? stop : t + h;
    int cut = s->event_count && psn_cut(s, t, &h, end);
    if (cut) end = t + h, lands = 0;
    psn_save(s, t, h, end, lands, u1);
    double *row = s->steps + 4 * s->accepted;
    row[0] = end, row[1] = h, row[2] = error, row[3] = lands ? (double)s->next_stop : -1;
    memcpy(s->ends + s->accepted * N, u1, N * sizeof(REAL));
    s->accepted++;
    psn_next_stages(s, END_STAGE >= 0 && s->known > END_STAGE && !lands);
    memcpy(u, u1, N * sizeof(REAL));
    s->t = end;
    if (cut) return STOPPED;
    if (lands && ++s->next_stop == s->stop_count) return SUCCESS;
    double following = psn_size_after_accepted(s, h, error);
    if (!adaptive)
      s->h = proposed;
    else /* A step cut short by a stop says little: keep the size that was proposed. */
      s->h = fabs(h) < 0.9 * fabs(proposed) && fabs(proposed) >= fabs(following) ? proposed
                                                                                : following;
  }
}
