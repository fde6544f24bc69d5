/* Control of the step sizes of members abreast: solve.h lane by lane. */

static double psn_derivative_size(const Many *m, Worker *w, int l, int accepted) {
  double last = psn_larger(w->error[l], 1e-10), product = 1;
  double errors[3] = {last, w->history[0][l], w->history[1][l]};
  for (int i = 0; i < 3; i++) product *= pow(errors[i] / m->gamma, -m->beta[i]);
  double factor = 1 + atan(product - 1);
  if (!accepted) return w->size[l] * (isfinite(w->error[l]) ? psn_smaller(factor, 0.9) : 0.2);
  w->history[1][l] = w->history[0][l];
  w->history[0][l] = last;
  return w->size[l] * factor;
}

static void psn_proportional_sizes(const Many *m, Worker *w, double *next) {
  REAL first = (REAL)m->beta[0], second = (REAL)m->beta[1], power[ABREAST], before[ABREAST] = {0};
  double widest = 1 / m->qmin, tightest = 1 / m->qmax, safety = 1 / m->gamma, qmin = m->qmin;
  double *error = w->error, *size = w->size, *history = w->history[0];
#pragma omp simd
  LANES_ALL power[l] = psn_log(error[l] > 0 ? (REAL)error[l] : (REAL)1);
  if (second != 0)
#pragma omp simd
    LANES_ALL before[l] = second * psn_log((REAL)history[l]);
#pragma omp simd
  LANES_ALL {
    REAL accepted_power = first * power[l] - before[l], rejected_power = first * power[l];
    power[l] = psn_exp(error[l] <= 1 ? accepted_power : rejected_power);
  }
#pragma omp simd
  LANES_ALL {
    double e = error[l], q = e > 0 ? (double)power[l] * safety : 0, least = e <= 1 ? tightest : 1;
    q = q > least ? q : least;
    q = q < widest ? q : widest;
    double sized = size[l] / q, cut = size[l] * qmin, kept = e > 1e-4 ? e : 1e-4;
    next[l] = __builtin_fabs(e) <= 1.7976931348623157e308 ? sized : cut;
    history[l] = e <= 1 ? kept : history[l];
    w->take[l] = e <= 1 ? (REAL)1 : (REAL)0;
  }
}

/* The sizes that follow from the errors; `take` says who has been accepted. */
static void psn_control(const Many *m, Worker *w) {
  if (m->control == FIXED) {
    LANES_ALL w->take[l] = 1, w->h[l] = w->proposed[l];
    return;
  }
  double next[ABREAST];
  LANES_ALL if (w->cut[l]) w->error[l] = w->whole_error[l];
  if (m->control == DERIVATIVE) {
    LANES_ALL {
      w->take[l] = w->error[l] <= 1;
      next[l] = psn_derivative_size(m, w, l, w->error[l] <= 1);
    }
  } else
    psn_proportional_sizes(m, w, next);
  /* A step cut short by a stop says little: keep the size that was proposed. */
#pragma omp simd
  LANES_ALL {
    int cut = w->take[l] != 0 && fabs(w->size[l]) < 0.9 * fabs(w->proposed[l]) &&
              fabs(w->proposed[l]) >= fabs(next[l]);
    w->h[l] = cut ? w->proposed[l] : next[l];
  }
}
