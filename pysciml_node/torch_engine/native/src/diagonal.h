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

/* The slope with f(t, known + h gamma slope), in place of a guess; NaN where the iteration does not
   converge. It takes the Jacobian at the step's start, and after a while one at the stage. Returns
   the evaluations of the field. */
static int psn_newton(const Linear *start, Linear *local, REAL t, REAL h, const REAL *known,
                      const REAL *packed, REAL *work, REAL *point, REAL *slope) {
  REAL step = h * GAMMA, size = F(__builtin_fabs)(step), *change = local->row;
  REAL close = (psn_greatest(known) + size * psn_greatest(slope)) * NEWTON_ACCURACY / size;
  const Linear *by = start;
  int turn = 0;
  while (turn < 2 * ITERATIONS) {
    for (int e = 0; e < N; e++) point[e] = known[e] + step * slope[e];
    if (turn++ == ITERATIONS) {
      psn_linearize(local, t, point, packed, work);
      psn_factor(local, h);
      by = local;
    } else
      field(t, point, packed, local->rate, work);
    for (int e = 0; e < N; e++) change[e] = local->rate[e] - slope[e];
    psn_solve(by, change);
    for (int e = 0; e < N; e++) slope[e] += change[e];
    REAL last = psn_greatest(change);
    if (last <= close) return turn;
    if (!isfinite(last)) break;
  }
  for (int e = 0; e < N; e++) slope[e] = (REAL)NAN;
  return turn;
}

static void psn_stages(Solve *s, double t, double h, int upto) {
  if (s->known >= upto) return;
  REAL times[ALL_STAGES];
  Linear start, local;
  psn_linearize_start(s, t, h, &start);
  LINEAR(s, &local, 1);
  psn_times(s->marks, s->mark_count, s->t0, s->t1, t, h, times);
  psn_factor(&start, (REAL)h);
  for (int i = 1; i < STAGES; i++) {
    combine(i, (REAL)h, U(s), K(s, 0), G(s));
    memcpy(K(s, i), K(s, i - 1), N * sizeof(REAL));
    s->evaluations += psn_newton(&start, &local, times[i], (REAL)h, G(s), s->packed, W(s),
                                 EXTRA(s), K(s, i));
  }
  s->known = STAGES;
}
