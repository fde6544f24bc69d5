/* A field with its Jacobian, and the dense linear systems of implicit steps; for src/solve.h. */

/* The field at one time and state with its derivatives, and room for what comes of them. */
typedef struct {
  REAL *jacobian, *factors, *rate, *slope, *unit, *row, *values, *bars;
  int pivots[N];
} Linear;

#define LINEAR_MEMORY (2 * MATRIX + 4 * ROW + GIVEN_WORK)

static void psn_place(Linear *l, REAL *memory, REAL *bars) {
  l->jacobian = memory, l->factors = memory + MATRIX;
  l->rate = memory + 2 * MATRIX, l->slope = l->rate + ROW;
  l->unit = l->slope + ROW, l->row = l->unit + ROW, l->values = l->row + ROW;
  l->bars = bars;
}

static void psn_linearize(Linear *l, REAL t, const REAL *u, const REAL *packed, REAL *work) {
  field(t, u, packed, l->rate, work);
  for (int i = 0; i < N; i++) {
    REAL time[LANES] = {0};
    memset(l->unit, 0, N * sizeof(REAL));
    l->unit[i] = 1;
    pull_state(t, u, packed, l->rate, work, l->unit, l->row, time, 0, l->bars);
    l->slope[i] = time[0];
    memcpy(l->jacobian + i * N, l->row, N * sizeof(REAL));
  }
}

/* The same for steps by Newton's iteration that are not differentiated: by the Jacobian that the problem
   brings, if any. */
static void psn_linearize_step(Linear *l, REAL t, const REAL *u, const REAL *packed, REAL *work) {
#ifdef WITH_GIVEN
  field(t, u, packed, l->rate, work);
  field_given(t, u, packed + GIVEN_AT, l->jacobian, l->values);
#else
  psn_linearize(l, t, u, packed, work);
#endif
}

/* Factors of M - h gamma J by elimination with partial pivoting: P A = L U. Without a pivot the
   solutions are not finite, and the step is rejected. */
static void psn_factor(Linear *l, REAL h) {
  REAL *a = l->factors, scale = h * GAMMA;
  for (int i = 0; i < N * N; i++) a[i] = -scale * l->jacobian[i];
#ifdef WITH_MASS
  for (int i = 0; i < N * N; i++) a[i] += MASS[i];
#else
  for (int i = 0; i < N; i++) a[i * N + i] += 1;
#endif
  for (int c = 0; c < N; c++) {
    int pivot = c;
    for (int i = c + 1; i < N; i++)
      if (F(__builtin_fabs)(a[i * N + c]) > F(__builtin_fabs)(a[pivot * N + c])) pivot = i;
    l->pivots[c] = pivot;
    if (pivot != c)
      for (int j = 0; j < N; j++) {
        REAL kept = a[c * N + j];
        a[c * N + j] = a[pivot * N + j], a[pivot * N + j] = kept;
      }
    for (int i = c + 1; i < N; i++) {
      REAL factor = a[i * N + c] /= a[c * N + c];
#pragma omp simd
      for (int j = c + 1; j < N; j++) a[i * N + j] -= factor * a[c * N + j];
    }
  }
}

static void psn_exchange(REAL *x, int i, int j) {
  REAL kept = x[i];
  x[i] = x[j], x[j] = kept;
}

static REAL psn_product(const REAL *a, const REAL *x, int from, int to) {
  REAL sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int j = from; j < to; j++) sum += a[j] * x[j];
  return sum;
}

/* Solve A x = b in place. */
static void psn_solve(const Linear *l, REAL *x) {
  const REAL *a = l->factors;
  for (int i = 0; i < N; i++) psn_exchange(x, i, l->pivots[i]);
  for (int i = 0; i < N; i++) x[i] -= psn_product(a + i * N, x, 0, i);
  for (int i = N - 1; i >= 0; i--)
    x[i] = (x[i] - psn_product(a + i * N, x, i + 1, N)) / a[i * N + i];
}

/* Of the linearizations that a step holds, number i. */
#define LINEAR(s, l, i) psn_place(l, W(s) + WORK + BARS + (i) * LINEAR_MEMORY, W(s) + WORK)

/* That at the start of a step, which serves every attempt at it. */
static void psn_linearize_start(Solve *s, double t, double h, Linear *l) {
  LINEAR(s, l, 0);
  if (s->linearized) return;
  REAL times[ALL_STAGES];
  psn_times(s->marks, s->mark_count, s->t0, s->t1, t, h, times);
  psn_linearize_step(l, times[0], U(s), s->packed, W(s));
  s->evaluations++;
  s->linearized = 1;
}

/* A bound of it: the norm of the Jacobian at the start. */
static double psn_eigenvalue(Solve *s, double t, double h) {
  Linear l;
  REAL largest = 0;
  LINEAR(s, &l, 0);
  for (int i = 0; i < N; i++) {
    REAL sum = 0;
    for (int j = 0; j < N; j++) sum += F(__builtin_fabs)(l.jacobian[i * N + j]);
    largest = psn_maximum(largest, sum);
  }
  return largest;
}

static void psn_first_stage(Solve *s, double t, double h) {
  if (s->known) return;
  Linear l;
  psn_linearize_start(s, t, h, &l);
  memcpy(K(s, 0), l.rate, N * sizeof(REAL));
  s->known = 1;
}
