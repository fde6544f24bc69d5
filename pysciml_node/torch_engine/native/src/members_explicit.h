/* The stages of explicit steps of members abreast; for src/members.h. */

/* The field at the start of a step. */
#define START_RATE(w) K(0)

static void psn_lanes_first(const Many *m, Worker *w, const int *asked) {
  int missing = 0, takes[ABREAST];
  LANES_ALL missing |= takes[l] = psn_lacks_first(w, l, asked);
  if (!missing) return;
  psn_lanes_evaluate(m, w, 0, U, EXTRA);
  FOR_ENTRIES LANES_ALL AT(K(0), i, l) = takes[l] ? AT(EXTRA, i, l) : AT(K(0), i, l);
  LANES_ALL if (takes[l]) w->known[l] = 1, w->evaluations[l]++;
}

static void psn_lanes_stages(const Many *m, Worker *w, int upto) {
  int adaptive = m->control != FIXED;
  psn_lanes_count(w, upto);
  for (int i = 1; i < upto; i++) {
    REAL *g = FSAL && adaptive && i == STAGES - 1 ? LAST : G;
    combine(i, w->real_size, U, K(0), g);
    psn_lanes_evaluate(m, w, i, g, K(i));
  }
}

/* Shampine's estimate, as in explicit.h: |k_i - k_j| / |g_i - g_j| of two stages at one time. */
static void psn_lanes_eigenvalues(Worker *w) {
  double top[ABREAST] = {0}, bottom[ABREAST] = {0};
  int first = FIRST_ALIKE < 0 ? 0 : FIRST_ALIKE, second = FIRST_ALIKE < 0 ? 0 : SECOND_ALIKE;
  combine(first, w->real_size, U, K(0), EXTRA);
  combine(second, w->real_size, U, K(0), G);
  FOR_ENTRIES LANES_ALL {
    double rate = AT(K(first), i, l) - AT(K(second), i, l), state = AT(EXTRA, i, l) - AT(G, i, l);
    top[l] += rate * rate, bottom[l] += state * state;
  }
  LANES_ALL w->eigenvalue[l] = FIRST_ALIKE < 0 ? NAN : sqrt(top[l]) / (sqrt(bottom[l]) + ROUNDING);
}
