/* Fields of members abreast with their Jacobians, and the linear systems of implicit steps; for
   src/members.h.

   It is linear.h lane by lane. Lanes may exchange different rows. */

/* The field at a time and a state of each with its derivatives, and room for what comes of them. */
typedef struct {
  REAL *jacobian, *factors, *rate, *slope, *unit, *row, *pivots, *values, *bars;
} Linear;

#define LINEAR_MEMORY (2 * MATRIX + 5 * ROW + GIVEN_WORK)

static void psn_place(Linear *l, REAL *memory, REAL *bars) {
  l->jacobian = memory, l->factors = memory + MATRIX;
  l->rate = memory + 2 * MATRIX, l->slope = l->rate + ROW;
  l->unit = l->slope + ROW, l->row = l->unit + ROW, l->pivots = l->row + ROW;
  l->values = l->pivots + ROW;
  l->bars = bars;
}

static void psn_linearize(const Linear *at, const REAL *time, const REAL *u, const REAL *packed,
                          const REAL *own, REAL *work) {
  field(time, u, packed, own, at->rate, work);
  FOR_ENTRIES {
    REAL time_bar[TIME_ROW] = {0};
    memset(at->unit, 0, N * ABREAST * sizeof(REAL));
    LANES_ALL AT(at->unit, i, l) = 1;
    pull_state(time, u, packed, own, at->rate, work, at->unit, at->row, time_bar, 0, 0, at->bars);
    LANES_ALL AT(at->slope, i, l) = time_bar[l];
    memcpy(at->jacobian + i * N * ABREAST, at->row, N * ABREAST * sizeof(REAL));
  }
}

/* The same for steps by Newton's iteration that are not differentiated: by the Jacobian that the problem
   brings, if any. */
static void psn_linearize_step(const Linear *at, const REAL *time, const REAL *u, const REAL *packed,
                               const REAL *own, REAL *work) {
#ifdef WITH_GIVEN
  field(time, u, packed, own, at->rate, work);
  field_given(time, u, packed + GIVEN_AT, own + OWN_FIRST, at->jacobian, at->values);
#else
  psn_linearize(at, time, u, packed, own, work);
#endif
}

/* Bring up row `pivot` of a matrix of rows of `width` entries, to row c, in every lane. */
static void psn_exchange_rows(REAL *a, const REAL *pivot, int c, int width) {
  for (int i = c + 1; i < N; i++) {
    int any = 0;
    LANES_ALL any |= pivot[l] == i;
    if (!any) continue;
    for (int j = 0; j < width; j++) {
      REAL *upper = a + (c * width + j) * ABREAST, *lower = a + (i * width + j) * ABREAST;
#pragma omp simd
      LANES_ALL {
        REAL x = upper[l], y = lower[l];
        upper[l] = pivot[l] == i ? y : x, lower[l] = pivot[l] == i ? x : y;
      }
    }
  }
}

/* Factors of M - h gamma J, by elimination with partial pivoting. */
static void psn_factor(const Linear *at, const REAL *h) {
  REAL *restrict a = at->factors;
  for (int e = 0; e < N * N; e++) {
#pragma omp simd
    LANES_ALL AT(a, e, l) = -(h[l] * GAMMA) * AT(at->jacobian, e, l);
#ifdef WITH_MASS
    LANES_ALL AT(a, e, l) += MASS[e];
#endif
  }
#ifndef WITH_MASS
  FOR_ENTRIES LANES_ALL AT(a, i * N + i, l) += 1;
#endif
  for (int c = 0; c < N; c++) {
    REAL best[ABREAST], *restrict pivot = at->pivots + c * ABREAST;
    LANES_ALL best[l] = F(__builtin_fabs)(AT(a, c * N + c, l)), pivot[l] = (REAL)c;
    for (int i = c + 1; i < N; i++) {
#pragma omp simd
      LANES_ALL {
        REAL size = F(__builtin_fabs)(AT(a, i * N + c, l));
        pivot[l] = size > best[l] ? (REAL)i : pivot[l];
        best[l] = size > best[l] ? size : best[l];
      }
    }
    psn_exchange_rows(a, pivot, c, N);
    for (int i = c + 1; i < N; i++) {
      REAL *restrict lower = a + i * N * ABREAST;
      const REAL *restrict upper = a + c * N * ABREAST;
      REAL factor[ABREAST];
#pragma omp simd
      LANES_ALL factor[l] = AT(lower, c, l) /= AT(upper, c, l);
      for (int j = c + 1; j < N; j++) {
#pragma omp simd
        LANES_ALL AT(lower, j, l) -= factor[l] * AT(upper, j, l);
      }
    }
  }
}

/* Take from entry i of x what other entries give by a row of factors. */
static void psn_take(const REAL *restrict row, int from, int to, int i, REAL *x) {
  REAL sum[ABREAST] = {0};
  for (int j = from; j < to; j++) {
#pragma omp simd
    LANES_ALL sum[l] += AT(row, j, l) * AT(x, j, l);
  }
  LANES_ALL AT(x, i, l) -= sum[l];
}

/* Solve A x = b in place. */
static void psn_solve(const Linear *at, REAL *x) {
  const REAL *a = at->factors;
  for (int c = 0; c < N; c++) psn_exchange_rows(x, at->pivots + c * ABREAST, c, 1);
  FOR_ENTRIES psn_take(a + i * N * ABREAST, 0, i, i, x);
  for (int i = N - 1; i >= 0; i--) {
    psn_take(a + i * N * ABREAST, i + 1, N, i, x);
    LANES_ALL AT(x, i, l) /= AT(a, i * N + i, l);
  }
}

/* Of the linearizations that a step holds, number i. */
#define LINEAR(w, l, i) psn_place(l, VALUES + WORK + BARS + (i) * LINEAR_MEMORY, VALUES + WORK)

/* Give some lanes a new Jacobian; the factors are to be formed anew. The values of the field in all lanes
   go to `rate`, and the derivatives by time to where the pivots will be. */
static void psn_linearize_some(const Linear *at, const int *takes, const REAL *time, const REAL *u,
                               const REAL *packed, const REAL *own, REAL *work, REAL *rate) {
  Linear made = *at;
  made.jacobian = at->factors, made.rate = rate, made.slope = at->pivots;
  psn_linearize_step(&made, time, u, packed, own, work);
  for (int e = 0; e < N * N; e++)
    LANES_ALL AT(at->jacobian, e, l) = takes[l] ? AT(made.jacobian, e, l) : AT(at->jacobian, e, l);
}

/* The field with its derivatives at the starts of steps, which serve every attempt at them. */
static void psn_lanes_linearize(const Many *m, Worker *w, const int *takes) {
  Linear at;
  LINEAR(w, &at, 0);
  psn_linearize_some(&at, takes, TIMES, U, m->packed, OWN_VALUES, VALUES, EXTRA);
  FOR_ENTRIES LANES_ALL if (takes[l]) {
    AT(at.rate, i, l) = AT(EXTRA, i, l);
    AT(at.slope, i, l) = AT(at.pivots, i, l);
  }
  LANES_ALL if (takes[l]) w->linearized[l] = 1, w->evaluations[l]++;
}

static void psn_lanes_first(const Many *m, Worker *w, const int *asked) {
  int missing = 0, takes[ABREAST];
  LANES_ALL missing |= takes[l] = psn_lacks_first(w, l, asked);
  if (!missing) return;
  Linear at;
  LINEAR(w, &at, 0);
  psn_lanes_linearize(m, w, takes);
  FOR_ENTRIES LANES_ALL if (takes[l]) AT(K(0), i, l) = AT(at.rate, i, l);
  LANES_ALL if (takes[l]) w->known[l] = 1;
}

/* Bounds of the largest eigenvalues: the norms of the Jacobians at the starts. */
static void psn_lanes_eigenvalues(Worker *w) {
  Linear at;
  REAL largest[ABREAST] = {0};
  LINEAR(w, &at, 0);
  FOR_ENTRIES {
    REAL sum[ABREAST] = {0};
    for (int j = 0; j < N; j++) LANES_ALL sum[l] += F(__builtin_fabs)(AT(at.jacobian, i * N + j, l));
    LANES_ALL largest[l] = psn_maximum(largest[l], sum[l]);
  }
  LANES_ALL w->eigenvalue[l] = largest[l];
}
