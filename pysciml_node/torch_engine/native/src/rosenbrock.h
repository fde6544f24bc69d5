/* The stages of a Rosenbrock step; for src/solve.h.

   With J = df/du, by rows, and f_t = df/dt at the start of a step, the slopes k_i solve

       (M - h gamma J) k_i = gamma [f(t + c_i h, u + h sum_j a_ij k_j)
                                    + M sum_j C_ij k_j + h d_i f_t]

   (tableaus/implicit.py), of which the emitted code has the sums and, but for the identity, M. */

/* Linearizations of a step, for its adjoint. */
enum { LINEARS = 1 };

/* M x, or M^T x. */
static void psn_weigh(const REAL *x, int turned, REAL *out) {
#ifdef WITH_MASS
  memset(out, 0, N * sizeof(REAL));
  for (int i = 0; i < N; i++)
    for (int j = 0; j < N; j++) out[i] += (turned ? MASS[j * N + i] : MASS[i * N + j]) * x[j];
#else
  memcpy(out, x, N * sizeof(REAL));
#endif
}

/* The slope of stage i from the field's value there. */
static void psn_slope(const Linear *l, int i, REAL h, const REAL *rate, REAL *k) {
  REAL *x = k + i * ROW, weight = (REAL)TIME_WEIGHTS[i] * h;
  couple(i, k, l->row);
  psn_weigh(l->row, 0, x);
  for (int e = 0; e < N; e++) x[e] += rate[e];
  if (weight != 0)
    for (int e = 0; e < N; e++) x[e] += weight * l->slope[e];
  for (int e = 0; e < N; e++) x[e] *= GAMMA;
  psn_solve(l, x);
}

static void psn_stages(Solve *s, double t, double h, int upto) {
  if (s->known >= upto) return;
  REAL times[ALL_STAGES];
  Linear l;
  psn_linearize_start(s, t, h, &l);
  psn_times(s->marks, s->mark_count, s->t0, s->t1, t, h, times);
  psn_factor(&l, (REAL)h);
  psn_slope(&l, 0, (REAL)h, l.rate, K(s, 0));
  for (int i = 1; i < STAGES; i++) {
    combine(i, (REAL)h, U(s), K(s, 0), G(s));
    psn_evaluate(s, times[i], G(s), EXTRA(s), W(s));
    psn_slope(&l, i, (REAL)h, EXTRA(s), K(s, 0));
  }
  s->known = STAGES;
}
