/* Events of members abreast: events.h lane by lane. A lane in whose step there is one takes it again, cut
   short, while the others go on. */

/* Of x the entries of a lane, in G. */
static const REAL *psn_lane_of(Worker *w, const REAL *x, int l) {
  FOR_ENTRIES G[i] = AT(x, i, l);
  return G;
}

static double psn_lane_inside(Worker *w, const Event *e, int l, double theta) {
  REAL weights[ALL_STAGES];
  psn_dense_weights(theta, 0, weights);
  FOR_ENTRIES {
    REAL sum = 0;
    for (int j = 0; j < ALL_STAGES; j++) sum += weights[j] * AT(K(j), i, l);
    G[i] = AT(U, i, l) + w->real_size[l] * sum;
  }
  return psn_condition(e, w->t[l] + theta * w->size[l], G);
}

static double psn_lane_beside(Worker *w, const Event *e, int l, double dt) {
  const REAL *rate = START_RATE(w);
  FOR_ENTRIES G[i] = AT(U, i, l) + (REAL)dt * AT(rate, i, l);
  return psn_condition(e, w->t0[l] + dt, G);
}

static double psn_lane_leaving(Worker *w, const Event *e, int l) {
  double later = psn_lane_inside(w, e, l, AFTER), dt = BESIDE * w->size[l];
  if (!psn_crosses(e, -later, later)) return later;
  double early = psn_lane_beside(w, e, l, -dt), late = psn_lane_beside(w, e, l, dt);
  return early * later > 0 && late * later < 0 ? -later : later;
}

static double psn_lane_locate(Worker *w, const Event *e, int l) {
  double low = 0, high = 1, sign = e->before > 0 ? 1 : -1;
  while (high - low > e->width) {
    double middle = 0.5 * (low + high);
    if (sign * psn_lane_inside(w, e, l, middle) > 0) low = middle;
    else high = middle;
  }
  return high;
}

/* Where in a step the first event lies, as a share of it; INFINITY where there is none. */
static double psn_lane_first(const Many *m, Worker *w, int l) {
  Event *events = psn_events_of(m, w, l);
  double first = INFINITY;
  for (int64_t i = 0; i < m->event_count; i++) {
    Event *e = events + i;
    if (e->open) e->before = psn_lane_leaving(w, e, l);
    e->open = 0;
    if (psn_crosses(e, e->before, e->after)) {
      double theta = psn_lane_locate(w, e, l);
      if (theta < first) first = theta, w->found[l] = i;
    }
    e->before = e->after;
  }
  return first;
}

/* Whether the inside of an accepted step has to be looked at, by the conditions at its end. */
static int psn_lane_looks(const Many *m, Worker *w, int l) {
  int looks = 0;
  double end = psn_step_end(w, l);
  const REAL *u = psn_lane_of(w, LAST, l);
  Event *events = psn_events_of(m, w, l), *last = events + m->event_count;
  for (Event *e = events; e < last; e++) {
    e->after = psn_condition(e, end, u);
    looks |= e->open || psn_crosses(e, e->before, e->after);
  }
  if (!looks)
    for (Event *e = events; e < last; e++) e->before = e->after;
  return looks;
}

/* Look for events in the accepted steps. A step with one is not taken: the next attempt of its lane ends
   there, with the error that the whole step had. */
static void psn_lanes_cut(const Many *m, Worker *w) {
  int any = 0, looks[ABREAST];
  LANES_ALL {
    looks[l] = w->member[l] >= 0 && w->take[l] != 0 && !w->cut[l] && psn_lane_looks(m, w, l);
    any |= looks[l];
  }
  if (!any) return;
  psn_lanes_complete(m, w, looks);
  LANES_ALL if (looks[l]) {
    double theta = psn_lane_first(m, w, l);
    if (theta == INFINITY) continue;
    w->cut[l] = 1, w->take[l] = 0;
    w->whole_error[l] = w->error[l];
    w->h[l] = w->size[l] * theta;
  }
}
