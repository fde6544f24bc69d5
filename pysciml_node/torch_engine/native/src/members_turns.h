/* Two methods that take turns with members: psn_turns of solve.h lane by lane. A member that the other
   method is to go on with leaves its lane, and waits until all others have done so or have ended. */

static int psn_is_paused(const Many *m, int64_t member) {
  return m->patience && m->counts[member * COUNTS + CODE] == CHANGED;
}

/* Go on with a member where the other method has left off. */
static void psn_resume(const Many *m, Worker *w, int l) {
  const int64_t *counts = m->counts + w->member[l] * COUNTS;
  const Pause *pause = m->pauses + w->member[l];
  w->t[l] = pause->t, w->h[l] = pause->h, w->error[l] = pause->error;
  w->run[l] = pause->run, w->next_stop[l] = pause->next_stop;
  w->before[l] = w->accepted[l] = counts[ACCEPTED], w->rejected[l] = counts[REJECTED];
  w->evaluations[l] = counts[EVALUATIONS], w->reached[l] = counts[REACHED];
  FOR_ENTRIES AT(U, i, l) = m->last[w->member[l] * N + i];
  psn_aim(m, w, l);
}

/* Members that the other method is to go on with leave their lanes. */
static void psn_lanes_turn(Many *m, Worker *w) {
  LANES_ALL if (w->member[l] >= 0 && !w->cut[l]) {
    /* What is not finite counts as stiff. */
    int stiff = !(fabs(w->h[l]) * w->eigenvalue[l] <= m->limit);
    int64_t run = w->run[l];
    run = w->run[l] = stiff ? (run > 0 ? run : 0) + 1 : (run < 0 ? run : 0) - 1;
    if (m->patience > 0 ? run < m->patience : run > m->patience) continue;
    m->pauses[w->member[l]] =
        (Pause){w->t[l], w->h[l] * m->factor_of_turn, w->error[l], run, w->next_stop[l]};
    for (int64_t i = 0, at = w->member[l] * m->event_count; i < m->event_count; i++, at++) {
      const Event *e = psn_events_of(m, w, l) + i;
      m->before[at] = e->before, m->open[at] = e->open;
    }
    psn_end(m, w, l, CHANGED);
  }
}
