/* The stages of Rosenbrock steps of members abreast; for src/members.h.

   It is rosenbrock.h lane by lane: there are the equations. */

/* Linearizations of a step, for its adjoint. */
enum { LINEARS = 1 };

/* M x, or M^T x. */
static void psn_weigh(const REAL *x, int turned, REAL *out) {
#ifdef WITH_MASS
  memset(out, 0, N * ABREAST * sizeof(REAL));
  FOR_ENTRIES for (int j = 0; j < N; j++) LANES_ALL
    AT(out, i, l) += (turned ? MASS[j * N + i] : MASS[i * N + j]) * AT(x, j, l);
#else
  memcpy(out, x, N * ABREAST * sizeof(REAL));
#endif
}

/* The slope of a stage from the field's value there. */
static void psn_slope(const Linear *at, int stage, const REAL *h, const REAL *rate, REAL *k) {
  REAL *x = k + stage * ROW, weight = (REAL)TIME_WEIGHTS[stage];
  couple(stage, k, at->row);
  psn_weigh(at->row, 0, x);
  FOR_ENTRIES LANES_ALL AT(x, i, l) += AT(rate, i, l);
  if (TIMED && weight != 0)
    FOR_ENTRIES LANES_ALL AT(x, i, l) += weight * h[l] * AT(at->slope, i, l);
  FOR_ENTRIES LANES_ALL AT(x, i, l) *= GAMMA;
  psn_solve(at, x);
}

/* The field at the start of a step. */
#define START_RATE(w) (VALUES + WORK + BARS + 2 * MATRIX)

static void psn_lanes_stages(const Many *m, Worker *w, int upto) {
  Linear at;
  LINEAR(w, &at, 0);
  psn_lanes_count(w, upto);
  psn_factor(&at, w->real_size);
  psn_slope(&at, 0, w->real_size, at.rate, K(0));
  for (int i = 1; i < STAGES; i++) {
    combine(i, w->real_size, U, K(0), G);
    psn_lanes_evaluate(m, w, i, G, EXTRA);
    psn_slope(&at, i, w->real_size, EXTRA, K(0));
  }
}
