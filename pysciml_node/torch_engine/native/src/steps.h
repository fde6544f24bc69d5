/* Times of the stages, sizes that end on a stop, weights of the dense output. */

/* The times of the stages, kept inside the interval, and inside what jumps of the field leave of the
   step. They are formed in double precision and rounded once. */
static void psn_times(const double *marks, int64_t count, double t0, double t1, double t, double h,
                      REAL *times) {
  double low = psn_smaller(t0, t1), high = psn_larger(t0, t1), near = 1e-9 * fabs(h);
  double first = psn_smaller(t, t + h), last = psn_larger(t, t + h);
  for (int64_t i = 0; i < count; i++) {
    if (fabs(first - marks[i]) < near) low = F(nextafter)((REAL)marks[i], (REAL)INFINITY);
    if (fabs(last - marks[i]) < near) high = F(nextafter)((REAL)marks[i], -(REAL)INFINITY);
  }
  for (int i = 0; i < ALL_STAGES; i++)
    times[i] = (REAL)psn_smaller(psn_larger(t + NODES[i] * h, low), high);
}

/* The size h with which t + h is the end to the last bit, where there is one. */
static double psn_size_between(double t, double end) {
  double h = end - t, below = nextafter(h, -INFINITY), above = nextafter(h, INFINITY);
  return t + h == end ? h : t + below == end ? below : t + above == end ? above : h;
}

/* Whether an interval is far from zero (step.py). */
static int psn_is_far(double t0, double t1) {
  return psn_larger(fabs(t0), fabs(t1)) > FAR * fabs(t1 - t0);
}

/* The size of a step that ends on no stop; far from zero that of the way it goes (step.py). */
static double psn_size_from(double t0, double t1, double t, double proposed) {
  double end = t + proposed, h = end - t;
  return psn_is_far(t0, t1) && h != 0 ? h : proposed;
}

static void psn_dense_weights(double theta, int derivative, REAL *weights) {
  for (int i = 0; i < ALL_STAGES; i++) {
    double sum = 0, power = derivative ? 1 : theta;
    for (int j = 0; j < POWERS; j++, power *= theta)
      sum += DENSE[i][j] * (derivative ? (j + 1) * power : power);
    weights[i] = (REAL)sum;
  }
}
