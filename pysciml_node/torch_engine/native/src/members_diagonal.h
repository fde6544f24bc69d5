/* The stages of singly diagonally implicit steps of members abreast; for src/members.h.

   It is diagonal.h lane by lane: there are the equations. Lanes whose iteration has ended stay where it
   did. */

/* Linearizations of a step, for its adjoint: at each of its stages. */
enum { LINEARS = STAGES };

/* The field at the start of a step. */
#define START_RATE(w) K(0)

static REAL psn_greatest(const REAL *x, int l) {
  REAL greatest = 0;
  FOR_ENTRIES greatest = psn_maximum(greatest, F(__builtin_fabs)(AT(x, i, l)));
  return greatest;
}

/* What the iteration of all lanes reads beside the stage. */
typedef struct {
  const Accuracy *accuracy;
  const int64_t *member;
  const REAL *packed, *own, *h, *u;
  REAL *work;
  int64_t *evaluations;
} Newton;

/* The greatest entry of a change of a slope, in units of what may be missing of its argument. */
static REAL psn_units(const Newton *n, int l, REAL size, const REAL *known, const REAL *slope,
                      const REAL *change) {
  int64_t row = (n->member[l] < 0 ? 0 : n->member[l]) * n->accuracy->stride;
  const REAL *rtol = n->accuracy->rtol + row, *atol = n->accuracy->atol + row;
  REAL greatest = 0;
  FOR_ENTRIES {
    REAL part = psn_maximum(F(__builtin_fabs)(AT(n->u, i, l)), F(__builtin_fabs)(AT(known, i, l)));
    REAL unit = (part + size * F(__builtin_fabs)(AT(slope, i, l))) * rtol[i] + atol[i] + TINY;
    greatest = psn_maximum(greatest, size * F(__builtin_fabs)(AT(change, i, l)) / unit);
  }
  return greatest;
}

/* Changes of slopes by the Jacobians at the start, or at the stage where a lane has one there. */
static void psn_changes(const Linear *start, const Linear *there, const int *local, const REAL *slope) {
  REAL *change = there->row, *other = there->slope;
  int any = 0, all = 1;
  LANES_ALL any |= local[l] > 0, all &= local[l] > 0;
  for (int e = 0; e < N * ABREAST; e++) other[e] = change[e] = there->rate[e] - slope[e];
  if (!all) psn_solve(start, change);
  if (!any) return;
  psn_solve(there, other);
  FOR_ENTRIES LANES_ALL AT(change, i, l) = local[l] ? AT(other, i, l) : AT(change, i, l);
}

/* The slopes with f(t, known + h gamma slope) of those who are asked, in place of guesses; NaN where the
   iteration does not converge. */
static void psn_newton(const Newton *n, const int *asked, const Linear *start, const Linear *there,
                       const REAL *time, const REAL *known, REAL *point, REAL *slope) {
  REAL step[ABREAST], size[ABREAST], scale[ABREAST], last[ABREAST], theta[ABREAST] = {0};
  REAL *change = there->row, before[N * ABREAST];
  /* local: changes by a Jacobian at the stage itself */
  int any = 0, active[ABREAST], takes[ABREAST], local[ABREAST] = {0};
  LANES_ALL {
    step[l] = n->h[l] * GAMMA, size[l] = F(__builtin_fabs)(step[l]);
    scale[l] = psn_greatest(known, l) / size[l] + psn_greatest(slope, l);
    last[l] = INFINITY;
    any |= active[l] = asked[l];
  }
  for (int turn = 0; any && turn < 2 * ITERATIONS; turn++) {
    int linearizes = 0;
    FOR_ENTRIES LANES_ALL AT(point, i, l) = AT(known, i, l) + step[l] * AT(slope, i, l);
    if (turn) memcpy(before, change, sizeof(before));
    LANES_ALL {
      takes[l] = active[l] && !local[l] && (theta[l] > SLOW || turn == ITERATIONS);
      linearizes |= takes[l];
      local[l] = takes[l] || local[l] ? local[l] + 1 : 0;
    }
    if (linearizes) {
      psn_linearize_some(there, takes, time, point, n->packed, n->own, n->work, there->rate);
      psn_factor(there, n->h);
    } else
      field(time, point, n->packed, n->own, there->rate, n->work);
    psn_changes(start, there, local, slope);
    any = 0;
    LANES_ALL if (active[l]) {
      n->evaluations[l]++;
      FOR_ENTRIES AT(slope, i, l) += AT(change, i, l);
      last[l] = psn_greatest(change, l);
      active[l] = isfinite(last[l]) != 0;
      if (last[l] <= scale[l] * NEWTON_ACCURACY) {
        REAL now = psn_units(n, l, size[l], known, slope, change), missing = now;
        if (turn) {
          REAL then = psn_units(n, l, size[l], known, slope, before);
          if (then > now) missing = psn_minimum(now, now * now / (then - now));
          theta[l] = now / then;
        }
        int rests = local[l] > 1 && theta[l] >= 1 && last[l] <= scale[l] * NOISE;
        if (missing <= 1 || rests) active[l] = 0;
      }
      any |= active[l];
    }
  }
  LANES_ALL if (asked[l] && !(last[l] <= scale[l] * NEWTON_ACCURACY))
    FOR_ENTRIES AT(slope, i, l) = (REAL)NAN;
}

static void psn_lanes_stages(const Many *m, Worker *w, int upto) {
  int missing = 0, asked[ABREAST], takes[ABREAST];
  LANES_ALL {
    asked[l] = w->member[l] >= 0;
    missing |= takes[l] = asked[l] && !w->linearized[l];
  }
  if (missing) psn_lanes_linearize(m, w, takes);
  Linear start, there;
  LINEAR(w, &start, 0);
  LINEAR(w, &there, 1);
  psn_factor(&start, w->real_size);
  Newton n = {&m->accuracy, w->member, m->packed, OWN_VALUES, w->real_size, U, VALUES, w->evaluations};
  for (int i = 1; i < upto; i++) {
    combine(i, w->real_size, U, K(0), G);
    memcpy(K(i), K(i - 1), N * ABREAST * sizeof(REAL));
    psn_newton(&n, asked, &start, &there, TIMES + i * TIME_ROW, G, EXTRA, K(i));
  }
}
