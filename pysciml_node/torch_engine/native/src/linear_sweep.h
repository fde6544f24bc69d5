/* The discrete adjoint of an implicit step; for src/sweep.h.

   Every slope k_i follows from f at an argument, U_i, by a linear system. With k*_i the cotangents
   of slopes that explicit steps have too (replay/adjoint_discrete.py), the method makes of them those
   of the values of f, y_i, by the transposed system, and for i = s, ..., 1 it is

       U*_i = (df/du)^T y_i. */

#define RATES(s) (STAGE_OF(s, STAGES))
#define YS(s) (RATES(s) + STAGES * ROW)
#define LINEAR_OF(s) (YS(s) + STAGES * ROW)

/* Solve A^T x = b in place. */
static void psn_solve_turned(const Linear *l, REAL *x) {
  const REAL *a = l->factors;
  for (int i = 0; i < N; i++) {
    x[i] /= a[i * N + i];
    for (int j = i + 1; j < N; j++) x[j] -= a[i * N + j] * x[i];
  }
  for (int i = N - 1; i >= 0; i--)
    for (int j = 0; j < i; j++) x[j] -= a[i * N + j] * x[i];
  for (int i = N - 1; i >= 0; i--) psn_exchange(x, i, l->pivots[i]);
}

/* The method's: take the stages again, with their arguments, rates and slopes; ... */
static void psn_replay_stages(Sweep *s, Linear *at, const REAL *times, REAL h, const REAL *u);

/* ... y_i of the cotangent of a slope; ... */
static void psn_turn(Sweep *s, Linear *at, int i, const REAL *k_bar, REAL *y);

/* ... the derivative in h of a slope's equation, over those of its argument and time, by y_i; ... */
static double psn_along(Sweep *s, const Linear *at, int i);

/* ... and what the derivatives of the field at the start of the step pull back: adds to `sum`, returns
   the time's. */
static double psn_pull_derivatives(Sweep *s, REAL t, REAL h, const REAL *u, REAL *sum);

/* A step, or one of single steps with estimates that have cotangents (taken.h). */
static void psn_replay_step(Sweep *s, int64_t n, double t, double h, int64_t inside, const Taken *taken) {
  Part p = psn_part_back(s, 0);
  REAL *k = s->memory, *bars = BARS_OF(s), *u = bars + ALL_STAGES * ROW, *sum = u + ROW;
  REAL *bar = s->start_bar, times[ALL_STAGES];
  Linear at[LINEARS];
  for (int i = 0; i < LINEARS; i++)
    psn_place(at + i, LINEAR_OF(s) + i * LINEAR_MEMORY, SCRATCH(s));
  psn_times(s->marks, s->mark_count, s->t0, s->t1, t, h, times);
  memcpy(u, s->ends + n * N, N * sizeof(REAL));
  psn_replay_stages(s, at, times, (REAL)h, u);
  s->pulls += STAGES;
  memcpy(sum, bar, N * sizeof(REAL));
  psn_pull_outputs_in(s, &p, k, inside, STAGES, h, sum);
  if (taken) psn_pull_estimates_in(taken, &p, u, k, h, bar, sum);
  double t_bar = 0, h_bar = 0;
  for (int i = STAGES - 1; i >= 0; i--) {
    REAL *g = STAGE_OF(s, i), *k_bar = g + ROW, *y = YS(s) + i * ROW, time[LANES] = {0};
    combine_bars(i, STAGES, (REAL)h, bar, bars, k_bar);
    for (int e = 0; e < N; e++) h_bar += (double)k_bar[e] * k[i * ROW + e] / h;
    psn_turn(s, at, i, k_bar, y);
    pull(times[i], g, s->packed, RATES(s) + i * ROW, g + 2 * ROW, y, bars + i * ROW, time,
         s->packed_bar, SCRATCH(s));
    for (int e = 0; e < N; e++) sum[e] += bars[i * ROW + e];
    t_bar += time[0];
    h_bar += NODES[i] * time[0] + psn_along(s, at, i);
  }
  t_bar += psn_pull_derivatives(s, times[0], (REAL)h, u, sum);
  memcpy(bar, sum, N * sizeof(REAL));
  if (s->t_bar) s->t_bar[n] = t_bar, s->h_bar[n] = h_bar;
}

static void psn_replay(Sweep *s, int64_t n) {
  int64_t inside = psn_count_inside(s, n);
  psn_replay_step(s, n, n ? s->steps[4 * (n - 1)] : s->t0, s->steps[4 * n + 1], inside, 0);
  s->replayed++;
  s->q -= inside;
}

static void psn_replay_taken(const Taken *a, int64_t inside, int estimated) {
  int64_t n = a->back->n;
  psn_replay_step(a->back, n, a->steps[2 * n], a->steps[2 * n + 1], inside, estimated ? a : 0);
}
