/* The time loop of stochastic equations: pysciml_node/stochastic/march.py and steps/loop.py, line by
   line. Whoever changes one changes the other. */

#define U(s) (s->memory)
#define LAST(s) (s->memory + WHOLE)
#define EXTRA(s) (s->memory + 2 * WHOLE)
#define ASIDE(s) (EXTRA(s) + ROW) /* drift and diffusion of one stage */
#define LOOP_STAGES(s) (ASIDE(s) + ROW + MATRIX_ROW)

static Stages psn_compact(const Solve *s) {
  REAL *drifts = LOOP_STAGES(s), *diffusions = drifts + STAGES * ROW;
  REAL *integrals = diffusions + STAGES * MATRIX_ROW, *argument = integrals + INTEGRALS;
  return (Stages){drifts, diffusions, integrals, argument, argument + ROW, 0, 0};
}

/* Whether the step that is tried is kept for the sweep, and its stages. */
static int psn_keeps(const Solve *s) { return s->accepted < s->kept_room; }

static Stages psn_stages(const Solve *s) {
  return psn_keeps(s) ? psn_apart(s->kept + s->accepted * SLOT) : psn_compact(s);
}

static const REAL *psn_state(const Solve *s) { return U(s); }

static void psn_both(Solve *s, const Stages *k, double t, const REAL *u, int i) {
  field((REAL)t, u, s->packed, DRIFT(k, i), WORK_OF(k, 2 * i));
  field_diffusion((REAL)t, u, PACKED_OF_DIFFUSION(s->packed), DIFFUSION(k, i),
                  WORK_OF(k, 2 * i + 1));
  s->evaluations++, s->noise->evaluations++;
}

/* Three standard deviations of the noise of an entry over a root of time. */
static REAL psn_deviation(const REAL *diffusion, int entry) {
  if (!MATRIX) return 3 * F(__builtin_fabs)(diffusion[entry]);
  REAL sum = 0;
  for (int c = 0; c < MOTIONS; c++) {
    REAL x = diffusion[entry * MOTIONS + c];
    sum += x * x;
  }
  return 3 * F(__builtin_sqrt)(sum);
}

static void psn_put_all(Solve *s, const REAL *x, REAL *whole) {
  memcpy(whole, x, N * sizeof(REAL));
}

/* Hairer's first step, with the noise in the slope (stochastic/step.py). */
static double psn_first_size(Solve *s) {
  if (!isnan(s->dt0)) return s->dt0;
  Stages k = psn_stages(s);
  REAL *u = U(s), *f = DRIFT(&k, 0), *g = DIFFUSION(&k, 0), *f1 = DRIFT(&k, 1);
  REAL *g1 = DIFFUSION(&k, 1), *x = ARGUMENT(&k, 0), *ahead = ARGUMENT(&k, 2), *slope = EXTRA(s);
  double span = s->t1 - s->t0;
  memcpy(x, u, ENTRIES * sizeof(REAL));
  psn_both(s, &k, s->t0, x, 0);
  s->known = STARTS_AT_START;
  for (int i = 0; i < ENTRIES; i++) slope[i] = F(__builtin_fabs)(f[i]) + psn_deviation(g, i);
  double d0 = psn_norm_of(s, u, u, u) * s->factor, d1 = psn_norm_of(s, slope, u, u) * s->factor;
  if (!isfinite(d1)) return NAN;
  double h0 = d0 < 1e-5 || d1 < 1e-5 ? 1e-6 : 0.01 * d0 / d1;
  h0 = psn_smaller(h0, span);
  for (int i = 0; i < ENTRIES; i++) ahead[i] = u[i] + (REAL)h0 * f[i];
  psn_both(s, &k, s->t0 + h0, ahead, 1);
  for (int i = 0; i < ENTRIES; i++)
    slope[i] = F(__builtin_fabs)(f1[i] - f[i]) +
               F(__builtin_fabs)(psn_deviation(g1, i) - psn_deviation(g, i));
  double d2 = psn_norm_of(s, slope, u, u) * s->factor / h0, largest = d2 > d1 ? d2 : d1;
  if (!isfinite(largest)) return h0;
  double h1 = largest <= 1e-15 ? psn_larger(1e-6, h0 * 1e-3)
                               : pow(0.01 / largest, 1 / (STRONG_ORDER + 0.5));
  return psn_smaller(psn_smaller(100 * h0, h1), span);
}

/* A step over a motion, from the state; with the first stage, where the last attempt has left it. */
static void psn_step(Solve *s, const Stages *k, double t, Motion m, int with_error, REAL *end) {
  int drifts = with_error ? ERROR_DRIFTS : STEP_DRIFTS;
  int diffusions = with_error ? ERROR_DIFFUSIONS : STEP_DIFFUSIONS;
  psn_take(k, s->packed, t, U(s), m, drifts, diffusions, (int)s->known, end, &s->evaluations,
           &s->noise->evaluations);
}

static double psn_step_error(Solve *s, Motion m) {
  Stages k = psn_stages(s);
  REAL *error = EXTRA(s);
  combine(ESTIMATE, (REAL)m.h, (REAL)sqrt(m.h), U(s), k.drifts, k.diffusions, k.integrals, error);
  double norm = psn_norm_of(s, error, U(s), LAST(s)) * s->factor;
  return PER_ROOT && m.h > 0 ? norm * sqrt((s->t1 - s->t0) / m.h) : norm;
}

/* Save what lies in an accepted step: shorter steps from its start, on the same path. */
static void psn_save(Solve *s, double t, double end, const REAL *u1) {
  Stages k = psn_compact(s), kept = psn_stages(s);
  if (STARTS_AT_START && psn_keeps(s)) {
    memcpy(k.drifts, kept.drifts, ENTRIES * sizeof(REAL));
    memcpy(k.diffusions, kept.diffusions, ENTRIES * MOTIONS * sizeof(REAL));
  }
  while (s->reached < s->save_count && s->saves[s->reached] < end) {
    double at = s->saves[s->reached], *place = s->places + 2 * s->reached;
    REAL *row = s->saved + s->reached * N;
    Motion m = psn_motion(s->noise, t, at);
    if (m.h > 0)
      psn_step(s, &k, t, m, 0, row);
    else
      memcpy(row, U(s), N * sizeof(REAL));
    place[0] = (double)s->accepted, place[1] = at;
    s->reached++;
  }
  while (s->reached < s->save_count && s->saves[s->reached] == end)
    psn_keep_end(s, s->accepted + 1, u1);
}

/* Put the last stage aside, which steps to saved times would overwrite. */
static void psn_put_aside(Solve *s) {
  Stages k = psn_stages(s);
  memcpy(ASIDE(s), DRIFT(&k, STAGES - 1), ENTRIES * sizeof(REAL));
  memcpy(ASIDE(s) + ROW, DIFFUSION(&k, STAGES - 1), ENTRIES * MOTIONS * sizeof(REAL));
}

/* Make it the first stage of the next step; with what a pullback reads of it, where both are kept. */
static void psn_pass_on(Solve *s, const Stages *before) {
  Stages k = psn_stages(s);
  memcpy(DRIFT(&k, 0), ASIDE(s), ENTRIES * sizeof(REAL));
  memcpy(DIFFUSION(&k, 0), ASIDE(s) + ROW, ENTRIES * MOTIONS * sizeof(REAL));
  if (!psn_keeps(s)) return;
  int slot = 2 * (STAGES - 1);
  memcpy(ARGUMENT(&k, 0), ARGUMENT(before, slot), ENTRIES * sizeof(REAL));
  memcpy(WORK_OF(&k, 0), WORK_OF(before, slot), 2 * SOME_WORK * sizeof(REAL));
}

static int64_t psn_march(Solve *s) {
  int adaptive = s->control != FIXED;
  double until = psn_seconds() + s->seconds;
  Noise *noise = s->noise;
  noise->rows = psn_compact(s).work + SOME_WORK;
  if (!s->started) {
    memcpy(s->ends, s->u0, N * sizeof(REAL));
    memcpy(U(s), s->u0, N * sizeof(REAL));
    while (s->reached < s->save_count && s->saves[s->reached] == s->t0) psn_keep_end(s, 0, U(s));
    s->t = s->t0;
    s->h = psn_first_size(s);
    /* The first size is a guess: only the error of a step asks for less than the limit. */
    if (isfinite(s->h)) s->h = psn_larger(s->h, s->dtmin);
    s->started = 1;
  }
  /* Below this the path does not tell times apart. */
  double smallest = psn_larger(s->dtmin, ldexp(noise->length, 4 - DEPTH));
  smallest = psn_larger(smallest, 8 * (nextafter(fabs(s->t1), INFINITY) - fabs(s->t1)));
  for (int64_t turn = 1;; turn++) {
    double h = s->h, t = s->t;
    if (!isfinite(h)) return UNSTABLE;
    if (s->accepted + s->rejected >= s->max_steps) return OUT_OF_STEPS;
    if (s->accepted == s->room) return FULL;
    if (turn % TURNS == 0 && psn_seconds() > until) return RUNNING;
    double proposed = psn_smaller(fabs(h), s->dtmax), stop = s->stops[s->next_stop];
    int lands = fabs(stop - t) <= proposed * (1 + SLIVER);
    if (adaptive && proposed < smallest && !lands)
      return s->last_h != 0 && !isfinite(s->last_error) ? UNSTABLE : TOO_SMALL;
    double end = lands ? stop : t + proposed;
    if (adaptive && !lands) {
      end = psn_aligned(noise, t, proposed, noise->rejecting || proposed == s->dtmax);
      end = psn_smaller(end, stop);
    }
    /* Far from zero the end may be rounded to the stop. */
    lands = end >= stop;
    Motion m = psn_motion(noise, t, end);
    REAL *u = U(s), *u1 = LAST(s);
    Stages k = psn_stages(s);
    psn_step(s, &k, t, m, adaptive, u1);
    double error = adaptive ? psn_step_error(s, m) : NAN;
    s->last_t = t, s->last_h = m.h, s->last_error = error;
    /* Only now are the first stages those of this state. */
    s->known = STARTS_AT_START;
    if (adaptive && !(error <= 1)) {
      s->rejected++;
      noise->rejecting = 1;
      s->h = psn_size_after_rejected(s, psn_smaller(proposed, 1.125 * (end - t)), error);
      continue;
    }
    if (PASSES_ON) psn_put_aside(s);
    double size = m.h;
    psn_save(s, t, end, u1);
    double *row = s->steps + 4 * s->accepted;
    row[0] = end, row[1] = size, row[2] = error, row[3] = lands ? (double)s->next_stop : -1;
    memcpy(s->ends + ++s->accepted * N, u1, N * sizeof(REAL));
    noise->rejecting = 0;
    /* The fields may jump at a stop: their values there belong to the next step. */
    s->known = PASSES_ON && !lands;
    if (s->known) psn_pass_on(s, &k);
    memcpy(u, u1, N * sizeof(REAL));
    s->t = end;
    if (lands && ++s->next_stop == s->stop_count) return SUCCESS;
    if (!adaptive) {
      s->h = proposed;
      continue;
    }
    /* A step cut short by a stop says little: keep the size that was proposed. What the alignment has
       changed is not fed back: small factors would be rounded away. */
    int cut = end - t < 0.7 * proposed;
    double following = psn_size_after_accepted(s, cut ? end - t : proposed, error);
    s->h = cut ? psn_larger(following, proposed) : following;
  }
}
