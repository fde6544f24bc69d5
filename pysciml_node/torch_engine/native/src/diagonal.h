/* The stages of a singly diagonally implicit step; for src/solve.h.

   The first slope is that of the start. Each other one solves

       k_i = f(t + c_i h, u + h sum_{j<i} a_ij k_j + h gamma k_i)

   by Newton's iteration (replay/implicit.py, line by line: whoever changes one changes the other). */

/* Linearizations of a step, for its adjoint: at each of its stages. */
enum { LINEARS = STAGES };

static REAL psn_greatest(const REAL *x) {
  REAL greatest = 0;
  for (int e = 0; e < N; e++) greatest = psn_maximum(greatest, F(__builtin_fabs)(x[e]));
  return greatest;
}

/* The greatest entry of a change of a slope, in units of what may be missing of its argument. */
static REAL psn_units(const Accuracy *a, REAL size, const REAL *u, const REAL *known,
                      const REAL *slope, const REAL *change) {
  REAL greatest = 0;
  for (int e = 0; e < N; e++) {
    REAL rtol = a->rtols ? a->rtols[e] : (REAL)a->rtol;
    REAL atol = a->atols ? a->atols[e] : (REAL)a->atol;
    REAL part = psn_maximum(F(__builtin_fabs)(u[e]), F(__builtin_fabs)(known[e]));
    REAL unit = (part + size * F(__builtin_fabs)(slope[e])) * rtol + atol + TINY;
    greatest = psn_maximum(greatest, size * F(__builtin_fabs)(change[e]) / unit);
  }
  return greatest;
}

/* The slope with f(t, known + h gamma slope), in place of a guess; NaN where the iteration does not
   converge. It takes the Jacobian at the step's start, and later one at the stage. Returns the
   evaluations of the field. */
static int psn_newton(const Accuracy *accuracy, const Linear *start, Linear *there, REAL t, REAL h,
                      const REAL *u, const REAL *known, const REAL *packed, REAL *work, REAL *point,
                      REAL *slope) {
  REAL step = h * GAMMA, size = F(__builtin_fabs)(step), *change = there->row, before[N];
  REAL scale = psn_greatest(known) / size + psn_greatest(slope), close = scale * NEWTON_ACCURACY;
  int turn = 0, local = 0; /* changes by a Jacobian at the stage itself */
  REAL last = INFINITY, theta = 0;
  while (turn < 2 * ITERATIONS) {
    for (int e = 0; e < N; e++) point[e] = known[e] + step * slope[e];
    if (turn) memcpy(before, change, sizeof(before));
    if (!local && (theta > SLOW || turn == ITERATIONS)) {
      psn_linearize_step(there, t, point, packed, work);
      psn_factor(there, h);
      local = 1;
    } else {
      field(t, point, packed, there->rate, work);
      local += local > 0;
    }
    turn++;
    for (int e = 0; e < N; e++) change[e] = there->rate[e] - slope[e];
    psn_solve(local ? there : start, change);
    for (int e = 0; e < N; e++) slope[e] += change[e];
    last = psn_greatest(change);
    if (last <= close) {
      REAL now = psn_units(accuracy, size, u, known, slope, change), missing = now;
      if (turn > 1) {
        REAL then = psn_units(accuracy, size, u, known, slope, before);
        if (then > now) missing = psn_minimum(now, now * now / (then - now));
        theta = now / then;
      }
      int rests = local > 1 && theta >= 1 && last <= scale * NOISE;
      if (missing <= 1 || rests) return turn;
    }
    if (!isfinite(last)) break;
  }
  if (last <= close) return turn;
  for (int e = 0; e < N; e++) slope[e] = (REAL)NAN;
  return turn;
}

static void psn_stages(Solve *s, double t, double h, int upto) {
  if (s->known >= upto) return;
  REAL times[ALL_STAGES];
  Linear start, local;
  psn_first_stage(s, t, h);
  psn_linearize_start(s, t, h, &start);
  LINEAR(s, &local, 1);
  psn_times(s->marks, s->mark_count, s->t0, s->t1, t, h, times);
  psn_factor(&start, (REAL)h);
  for (int i = 1; i < STAGES; i++) {
    combine(i, (REAL)h, U(s), K(s, 0), G(s));
    memcpy(K(s, i), K(s, i - 1), N * sizeof(REAL));
    s->evaluations += psn_newton(&s->accuracy, &start, &local, times[i], (REAL)h, U(s), G(s),
                                 s->packed, W(s), EXTRA(s), K(s, i));
  }
  s->known = STAGES;
}
