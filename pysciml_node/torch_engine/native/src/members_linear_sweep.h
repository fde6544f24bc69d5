/* The discrete adjoint of implicit steps of members abreast; for src/members_sweep.h.

   It is linear_sweep.h lane by lane: there are the equations. */

#define RATE(i) (STAGE(STAGES) + (i) * ROW)
#define Y(i) (RATE(STAGES) + (i) * ROW)
#define LINEAR_OF(i) (Y(STAGES) + (i) * LINEAR_MEMORY)

/* Solve A^T x = b in place. */
static void psn_solve_turned(const Linear *at, REAL *x) {
  const REAL *a = at->factors;
  FOR_ENTRIES {
    LANES_ALL AT(x, i, l) /= AT(a, i * N + i, l);
    for (int j = i + 1; j < N; j++) LANES_ALL AT(x, j, l) -= AT(a, i * N + j, l) * AT(x, i, l);
  }
  for (int i = N - 1; i >= 0; i--)
    for (int j = 0; j < i; j++) LANES_ALL AT(x, j, l) -= AT(a, i * N + j, l) * AT(x, i, l);
  for (int c = N - 1; c >= 0; c--) psn_exchange_rows(x, at->pivots + c * ABREAST, c, 1);
}

/* The method's: take the stages again, with their arguments, rates and slopes; ... */
static void psn_replay_stages(const Back *b, Sweeper *w, Linear *at);

/* ... Y(i) of the cotangent of a slope; ... */
static void psn_turn(Sweeper *w, const Linear *at, int i);

/* ... the derivative of a stage's equations in h, over its argument and its rate; ... */
static void psn_along(Sweeper *w, const Linear *at, int stage);

/* ... and what the derivatives at the starts of steps pull back: adds to SUM and to the starts'
   cotangents. */
static void psn_pull_derivatives(const Back *b, Sweeper *w, REAL *packed_bar);

static void psn_lanes_replay(const Back *b, Sweeper *w, REAL *packed_bar) {
  Linear at[LINEARS];
  for (int i = 0; i < LINEARS; i++) psn_place(at + i, LINEAR_OF(i), SCRATCH);
  psn_lanes_prepare(b, w);
  psn_replay_stages(b, w, at);
  psn_lanes_arrive(b, w, STAGES);
  REAL time_bar[TIME_ROW] = {0};
  for (int i = STAGES - 1; i >= 0; i--) {
    combine_bars(i, STAGES, w->size, BAR, BAR_OF(0), STAGE_BAR(i));
    psn_turn(w, at, i);
    pull(TIMES + i * TIME_ROW, STAGE(i), b->packed, OWN_VALUES, RATE(i), STAGE(i) + 2 * ROW, Y(i),
         BAR_OF(i), time_bar, packed_bar, OWN_BARS, SCRATCH);
    for (int e = 0; e < N * ABREAST; e++) SUM[e] += BAR_OF(i)[e];
    psn_lanes_move(b, w, i, time_bar, STAGE_BAR(i));
    if (b->t_bar) psn_along(w, at, i);
  }
  psn_pull_derivatives(b, w, packed_bar);
  memcpy(BAR, SUM, N * ABREAST * sizeof(REAL));
}
