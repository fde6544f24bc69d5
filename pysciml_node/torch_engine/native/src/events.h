/* Where conditions cross zero in accepted steps: steps/event_search.py and
   torch_engine/event_search.py, line by line, with members_events.h. Whoever changes one changes the
   others. */

/* A condition at a place in a step. */
static double psn_inside(Solve *s, const Event *e, double t, double h, double theta) {
  psn_dense(s, t, h, theta, G(s));
  return psn_condition(e, t + theta * h, G(s));
}

/* A condition at a place on the line along the field through the start. */
static double psn_beside(Solve *s, const Event *e, double dt) {
  const REAL *u = U(s), *rate = EXTRA(s);
  REAL *g = G(s);
  for (int i = 0; i < N; i++) g[i] = u[i] + (REAL)dt * rate[i];
  return psn_condition(e, s->t0 + dt, g);
}

/* With which sign a condition leaves its zero at the start. It may be back at zero before it is looked
   at: what leaves with the other sign has crossed. */
static double psn_leaving(Solve *s, const Event *e, double t, double h) {
  double later = psn_inside(s, e, t, h, AFTER);
  if (!psn_crosses(e, -later, later)) return later;
  field((REAL)s->t0, U(s), s->packed, EXTRA(s), W(s));
  double early = psn_beside(s, e, -BESIDE * h), late = psn_beside(s, e, BESIDE * h);
  return early * later > 0 && late * later < 0 ? -later : later;
}

/* Where in a step a condition crosses zero, by bisection. */
static double psn_locate(Solve *s, const Event *e, double t, double h) {
  double low = 0, high = 1, sign = e->before > 0 ? 1 : -1;
  while (high - low > e->width) {
    double middle = 0.5 * (low + high);
    if (sign * psn_inside(s, e, t, h, middle) > 0) low = middle;
    else high = middle;
  }
  return high;
}

/* Cut an accepted step at the first event in it, if there is any: it is taken again with the shorter
   size, so that the state at the event is the step's own result. */
static int psn_cut(Solve *s, double t, double *h, double end) {
  Event *last = s->events + s->event_count;
  for (Event *e = s->events; e < last; e++) e->after = psn_condition(e, end, LAST(s));
  double first = INFINITY;
  for (Event *e = s->events; e < last; e++) {
    if (e->open) e->before = psn_leaving(s, e, t, *h);
    e->open = 0;
    if (psn_crosses(e, e->before, e->after)) {
      double theta = psn_locate(s, e, t, *h);
      if (theta < first) first = theta, s->found = e - s->events;
    }
    e->before = e->after;
  }
  if (first == INFINITY) return 0;
  *h = psn_size_from(s->t0, s->t1, t, *h * first);
  s->known = 1;
  psn_stages(s, t, *h, FSAL ? STAGES - 1 : STAGES);
  combine(END, (REAL)*h, U(s), K(s, 0), LAST(s));
  return 1;
}
