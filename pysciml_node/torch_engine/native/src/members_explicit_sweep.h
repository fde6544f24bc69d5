/* The discrete adjoint of explicit steps of members abreast; for src/members_sweep.h. */

static void psn_lanes_replay(const Back *b, Sweeper *w, REAL *packed_bar) {
  int count = psn_lanes_prepare(b, w);
  for (int i = 0; i < count; i++) {
    combine(i, w->size, U, K(0), STAGE(i));
    field(TIMES + i * TIME_ROW, STAGE(i), b->packed, OWN_VALUES, K(i), STAGE(i) + 2 * ROW);
  }
  psn_lanes_arrive(b, w, count);
  REAL time_bar[TIME_ROW] = {0};
  for (int i = count - 1; i >= 0; i--) {
    combine_bars(i, count, w->size, BAR, BAR_OF(0), STAGE_BAR(i));
    pull(TIMES + i * TIME_ROW, STAGE(i), b->packed, OWN_VALUES, K(i), STAGE(i) + 2 * ROW,
         STAGE_BAR(i), BAR_OF(i), time_bar, packed_bar, OWN_BARS, SCRATCH);
    psn_lanes_move(b, w, i, time_bar, STAGE_BAR(i));
  }
  for (int i = 0; i < count; i++)
    for (int e = 0; e < N * ABREAST; e++) SUM[e] += BAR_OF(i)[e];
  memcpy(BAR, SUM, N * ABREAST * sizeof(REAL));
}
