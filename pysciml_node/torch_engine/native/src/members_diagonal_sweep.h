/* The discrete adjoint of singly diagonally implicit steps of members abreast; for
   src/members_linear_sweep.h.

   It is diagonal_sweep.h lane by lane: there are the equations. */

static void psn_replay_stages(const Back *b, Sweeper *w, Linear *at) {
  int asked[ABREAST];
  int64_t evaluations[ABREAST] = {0};
  REAL *known = Y(0);
  /* Idle lanes do what another one does: their numbers have to be as finite. */
  LANES_ALL asked[l] = 1;
  Newton n = {&b->accuracy, w->member, b->packed, OWN_VALUES, w->size, U, 0, evaluations};
  for (int i = 0; i < STAGES; i++) {
    REAL *g = STAGE(i), *slope = K(i), *change = at[i].row;
    const REAL *time = TIMES + i * TIME_ROW;
    n.work = g + 2 * ROW;
    memcpy(g, U, N * ABREAST * sizeof(REAL));
    if (i) {
      combine(i, w->size, U, K(0), known);
      memcpy(slope, K(i - 1), N * ABREAST * sizeof(REAL));
      psn_newton(&n, asked, at, at + i, time, known, g, slope);
      FOR_ENTRIES LANES_ALL AT(g, i, l) = AT(known, i, l) + w->size[l] * GAMMA * AT(slope, i, l);
    }
    psn_linearize(at + i, time, g, b->packed, OWN_VALUES, n.work);
    psn_factor(at + i, w->size);
    memcpy(RATE(i), at[i].rate, N * ABREAST * sizeof(REAL));
    for (int e = 0; e < N * ABREAST; e++) change[e] = at[i].rate[e] - (i ? slope[e] : 0);
    if (i) psn_solve(at + i, change);
    for (int e = 0; e < N * ABREAST; e++) slope[e] = (i ? slope[e] : 0) + change[e];
  }
  LANES_ALL if (w->member[l] >= 0) b->costs[2 * w->member[l]] += evaluations[l];
}

static void psn_turn(Sweeper *w, const Linear *at, int i) {
  memcpy(Y(i), STAGE_BAR(i), N * ABREAST * sizeof(REAL));
  if (i) psn_solve_turned(at + i, Y(i));
}

/* The argument has h gamma k_i. */
static void psn_along(Sweeper *w, const Linear *at, int stage) {
  (void)at;
  if (!stage) return;
  LANES_ALL for (int i = 0; i < N; i++)
    w->h_bar[l] += GAMMA * (double)AT(BAR_OF(stage), i, l) * AT(K(stage), i, l);
}

/* It has none of them in its equations. */
static void psn_pull_derivatives(const Back *b, Sweeper *w, REAL *packed_bar) {
  (void)b, (void)w, (void)packed_bar;
}
