/* The time loop and its discrete adjoint for the members of an ensemble, each with steps of its own.

   ABREAST members step at once: of every entry of a state those of all of them lie side by side, so
   that loops over members become vector code, and what one of them does depends on no other. A member
   that is done gives its lane to the next one. Workers, one a thread, share the members. The loop is
   that of solve.h and march.py, lane by lane.

   The emitted code before this file gives the sizes, the method and the field for ABREAST members:
   OWN parameters of each member's own with OWN_PLACES and OWN_SIZES, in OWN_ROOM numbers, and whether
   the field reads the time (TIMED). */

/* What Newton's iteration may leave missing of the argument of a stage, entry by entry; a row of each
   member where the stride is not 0. */
typedef struct {
  const REAL *rtol, *atol;
  int64_t stride;
} Accuracy;

/* What a worker knows of the members that it runs. */
typedef struct {
  double t[ABREAST], h[ABREAST], proposed[ABREAST], size[ABREAST], stop[ABREAST], error[ABREAST];
  double t0[ABREAST], t1[ABREAST], direction[ABREAST], history[2][ABREAST], shift[ABREAST],
      factor[ABREAST], whole_error[ABREAST];
  REAL real_size[ABREAST], take[ABREAST], follow[ABREAST];
  int64_t member[ABREAST], known[ABREAST], linearized[ABREAST], lands[ABREAST], code[ABREAST];
  int64_t next_stop[ABREAST], first_stop[ABREAST], stop_count[ABREAST];
  int64_t accepted[ABREAST], rejected[ABREAST], evaluations[ABREAST], reached[ABREAST];
  /* How many attempts it may make; whether its step is taken again up to an event, and which one. */
  int64_t most[ABREAST], cut[ABREAST], found[ABREAST];
  /* Of two methods that take turns: the steps before this one's, and the attempts in a row and the
     estimate of the largest eigenvalue, as in control.h. */
  int64_t before[ABREAST], run[ABREAST];
  double eigenvalue[ABREAST];
  int have; /* stages of the attempt that all lanes have */
  /* Steps of the members of each lane, one member after the other. */
  REAL *ends[ABREAST];
  double *steps[ABREAST];
  int64_t used[ABREAST], room[ABREAST];
  int64_t started, status;
  REAL *memory;
} Worker;

/* Where a member stands that the other method goes on with. */
typedef struct {
  double t, h, error;
  int64_t run, next_stop;
} Pause;

typedef struct {
  /* The problem; rows of each member where a stride is not 0. */
  const double *t0, *t1, *shift, *factor, *stops, *marks, *saves;
  const REAL *rtol, *atol, *u0, *packed;
  const REAL *const *own;
  Accuracy accuracy;
  const int64_t *rows; /* which members are to be solved; 0 where it is all of them */
  int64_t span_stride, scale_stride, tolerance_stride, save_stride, start_stride;
  int64_t members, stop_count, mark_count, save_count, control, max_steps, driven;
  int64_t free, threads; /* free: whether ends of the intervals receive gradients */
  /* Events of every lane of every worker, one after the other; of each member the values of their
     conditions at its start, whether it is not known with which sign they leave it, the attempts that
     it has made before, and which event has ended it, or -1. */
  Event *events;
  double *before;
  int64_t *open;
  const int64_t *spent;
  int64_t *found;
  int64_t event_count;
  /* Of two methods that take turns, as in control.h, or 0; and where members stand meanwhile. */
  double limit, factor_of_turn;
  int64_t patience;
  Pause *pauses;
  double dt0, dtmin, dtmax, beta[3], gamma, qmin, qmax, seconds;
  /* Where results go: of each member the state that it got to, the saved states, the numbers of its
     accepted and rejected steps, evaluations and saved times, how it ended, and where its steps are:
     worker and lane, and the first one's place there. */
  REAL *last, *saved, *memory;
  double *places;
  int64_t *counts; /* (members, 7) */
  int64_t memory_stride, next, room; /* room for the steps of a lane at first */
  Worker *workers;
} Many;

enum { ACCEPTED, REJECTED, EVALUATIONS, REACHED, CODE, LANE, FIRST, COUNTS };

#define K(i) (w->memory + (i) * ROW)
#define U (w->memory + ALL_STAGES * ROW)
#define G (w->memory + (ALL_STAGES + 1) * ROW)
#define LAST (w->memory + (ALL_STAGES + 2) * ROW)
#define EXTRA (w->memory + (ALL_STAGES + 3) * ROW)
#define TIMES (w->memory + (ALL_STAGES + 4) * ROW)
#define OWN_VALUES (TIMES + (ALL_STAGES + 1) * TIME_ROW)
#define VALUES (OWN_VALUES + OWN_ROOM)
#define AT(x, i, l) (x)[(i) * ABREAST + (l)]
#define LANES_ALL for (int l = 0; l < ABREAST; l++)
#define FOR_ENTRIES for (int i = 0; i < N; i++)

/* Distance to the next number above. */
PSN_INLINE double psn_unit(double t) {
  union { double x; int64_t i; } u = {__builtin_fabs(t)};
  double x = u.x;
  u.i++;
  return u.x - x;
}

static void psn_lane_times(const Many *m, Worker *w, const double *size) {
  if (!TIMED) return;
  LANES_ALL {
    REAL times[ALL_STAGES];
    psn_times(m->marks, m->mark_count, w->t0[l], w->t1[l], w->t[l], size[l], times);
    for (int i = 0; i < ALL_STAGES; i++) TIMES[i * TIME_ROW + l] = times[i];
  }
}

static void psn_lanes_evaluate(const Many *m, Worker *w, int stage, const REAL *u, REAL *k) {
  field(TIMES + stage * TIME_ROW, u, m->packed, OWN_VALUES, k, VALUES);
}

static int psn_lacks_first(const Worker *w, int l, const int *asked) {
  return w->member[l] >= 0 && !w->known[l] && (!asked || asked[l]);
}

/* The method's: the first stages of those who have none, and are asked for, at times that have been
   formed; and all stages of an attempt up to `upto`. An explicit method with an error estimate whose
   last stage is the end of the step leaves that one's argument in LAST. */
static void psn_lanes_first(const Many *m, Worker *w, const int *asked);
static void psn_lanes_stages(const Many *m, Worker *w, int upto);

/* Estimates of the largest eigenvalues of df/du, behind an attempt. */
static void psn_lanes_eigenvalues(Worker *w);

/* Count the evaluations of an attempt behind the first one. A step that is taken again has no error
   estimate. */
static void psn_lanes_count(Worker *w, int upto) {
  int again = FSAL ? STAGES - 1 : STAGES;
  LANES_ALL w->evaluations[l] += (w->cut[l] ? again : upto) - 1;
}

/* Norms of x in units of the tolerance, one for each member. */
static void psn_lane_norms(const Many *m, const Worker *w, const REAL *x, const REAL *u,
                           const REAL *u1, double *norms) {
  REAL sum[ABREAST] = {0}, shift[ABREAST];
  LANES_ALL shift[l] = (REAL)w->shift[l];
  for (int64_t i = 0; i < m->driven; i++) {
    if (!m->rtol) {
#pragma omp simd
      LANES_ALL {
        REAL a = F(__builtin_fabs)(AT(u, i, l)), b = F(__builtin_fabs)(AT(u1, i, l));
        REAL q = AT(x, i, l) / (((a > b || a != a) ? a : b) + shift[l]);
        sum[l] += q * q;
      }
    } else
      LANES_ALL {
        int64_t member = w->member[l] < 0 ? 0 : w->member[l], row = member * m->tolerance_stride;
        REAL a = F(__builtin_fabs)(AT(u, i, l)), b = F(__builtin_fabs)(AT(u1, i, l));
        REAL q = AT(x, i, l) / (((a > b || a != a) ? a : b) * m->rtol[row + i] + m->atol[row + i]);
        sum[l] += q * q;
      }
  }
  LANES_ALL norms[l] = F(__builtin_sqrt)(sum[l]) * w->factor[l];
}

/* Hairer's first step (Solving Ordinary Differential Equations I, section II.4) of fresh members. */
static void psn_first_sizes(const Many *m, Worker *w, const int *fresh) {
  double zero[ABREAST] = {0}, d0[ABREAST], d1[ABREAST], d2[ABREAST], h0[ABREAST];
  psn_lane_times(m, w, zero);
  psn_lanes_first(m, w, fresh);
  psn_lane_norms(m, w, U, U, U, d0);
  psn_lane_norms(m, w, K(0), U, U, d1);
  LANES_ALL {
    double span = w->t1[l] - w->t0[l], length = fabs(span);
    double first = d0[l] < 1e-5 || d1[l] < 1e-5 ? 1e-6 : 0.01 * d0[l] / d1[l];
    h0[l] = copysign(psn_smaller(first, length), span);
    TIMES[ALL_STAGES * TIME_ROW + l] = (REAL)(w->t0[l] + h0[l]);
  }
  FOR_ENTRIES LANES_ALL AT(G, i, l) = AT(U, i, l) + (REAL)h0[l] * AT(K(0), i, l);
  psn_lanes_evaluate(m, w, ALL_STAGES, G, EXTRA);
  FOR_ENTRIES LANES_ALL AT(EXTRA, i, l) -= AT(K(0), i, l);
  psn_lane_norms(m, w, EXTRA, U, U, d2);
  LANES_ALL if (fresh[l]) {
    double span = w->t1[l] - w->t0[l], length = fabs(span), size = fabs(h0[l]);
    double largest = psn_larger(d2[l] / size, d1[l]);
    double h1 = largest <= 1e-15 ? psn_larger(1e-6, size * 1e-3) : pow(0.01 / largest, 1.0 / ORDER);
    w->h[l] = copysign(psn_smaller(psn_smaller(100 * size, h1), length), span);
    if (!isfinite(largest)) w->h[l] = h0[l];
    if (!isfinite(d1[l])) w->h[l] = NAN;
    else w->evaluations[l]++;
  }
}

/* The stop that a member goes to: its own ones of those of all, and then its end. */
static void psn_aim(const Many *m, Worker *w, int l) {
  int64_t n = w->next_stop[l], at = w->first_stop[l] + (w->direction[l] > 0 ? n : -n);
  w->stop[l] = n < w->stop_count[l] ? m->stops[at] : w->t1[l];
}

static void psn_keep_saved(const Many *m, Worker *w, int l, double state, const REAL *u) {
  int64_t place = w->member[l] * m->save_count + w->reached[l]++;
  FOR_ENTRIES m->saved[place * N + i] = AT(u, i, l);
  m->places[2 * place] = state, m->places[2 * place + 1] = NAN;
}

static double psn_save_time(const Many *m, const Worker *w, int l) {
  return m->saves[w->member[l] * m->save_stride + w->reached[l]];
}

static Event *psn_events_of(const Many *m, const Worker *w, int l) {
  return m->events + ((w - m->workers) * ABREAST + l) * m->event_count;
}

static void psn_watch_events(const Many *m, const Worker *w, int l) {
  if (!m->event_count) return;
  Event *events = psn_events_of(m, w, l);
  for (int64_t i = 0, at = w->member[l] * m->event_count; i < m->event_count; i++, at++)
    events[i].before = m->before[at], events[i].open = m->open[at];
}

/* In members_turns.h: whether the other method has left a member off, and go on with it. */
static int psn_is_paused(const Many *m, int64_t member);
static void psn_resume(const Many *m, Worker *w, int l);

/* Give a lane to a member. */
static void psn_begin(const Many *m, Worker *w, int l, int64_t member) {
  double t0 = m->t0[member * m->span_stride], t1 = m->t1[member * m->span_stride];
  double low = psn_smaller(t0, t1), high = psn_larger(t0, t1);
  int64_t first = 0, last = m->stop_count;
  while (first < last && m->stops[first] <= low) first++;
  while (last > first && m->stops[last - 1] >= high) last--;
  w->member[l] = member;
  w->t[l] = w->t0[l] = t0, w->t1[l] = t1;
  w->direction[l] = t1 > t0 ? 1 : -1;
  w->shift[l] = m->rtol ? 0 : m->shift[member * m->scale_stride];
  w->factor[l] = m->factor[member * m->scale_stride];
  w->history[0][l] = m->control == DERIVATIVE ? 1 : 1e-4, w->history[1][l] = 1;
  w->known[l] = w->linearized[l] = w->next_stop[l] = w->code[l] = 0;
  w->error[l] = 0;
  w->stop_count[l] = last - first;
  w->first_stop[l] = t1 > t0 ? first : last - 1;
  w->accepted[l] = w->rejected[l] = w->evaluations[l] = w->reached[l] = 0;
  w->cut[l] = 0, w->found[l] = -1, w->before[l] = w->run[l] = 0;
  w->most[l] = m->max_steps - (m->spent ? m->spent[member] : 0);
  psn_watch_events(m, w, l);
  psn_aim(m, w, l);
  FOR_ENTRIES AT(U, i, l) = m->u0[member * m->start_stride + i];
  for (int j = 0; j < OWN; j++)
    for (int i = 0; i < OWN_SIZES[j]; i++)
      AT(OWN_VALUES + OWN_PLACES[j], i, l) = m->own[j][member * OWN_SIZES[j] + i];
  if (psn_is_paused(m, member)) {
    psn_resume(m, w, l);
    return;
  }
  while (w->reached[l] < m->save_count && psn_save_time(m, w, l) == t0) psn_keep_saved(m, w, l, 0, U);
  w->h[l] = copysign(m->dt0, w->direction[l]);
}

/* Idle lanes take the next members; returns whether any lane is busy. */
static int psn_fill(Many *m, Worker *w) {
  int busy = 0, any = 0, fresh[ABREAST] = {0};
  LANES_ALL {
    if (w->member[l] < 0 && __atomic_load_n(&m->next, __ATOMIC_RELAXED) < m->members) {
      int64_t i = __atomic_fetch_add(&m->next, 1, __ATOMIC_RELAXED);
      if (i < m->members) {
        int64_t member = m->rows ? m->rows[i] : i;
        any |= fresh[l] = !psn_is_paused(m, member);
        psn_begin(m, w, l, member);
      }
    }
    busy |= w->member[l] >= 0;
  }
  if (any && isnan(m->dt0)) psn_first_sizes(m, w, fresh);
  if (any) /* The first size is a guess: only the error of a step asks for less than the limit. */
    LANES_ALL if (fresh[l] && isfinite(w->h[l]) && fabs(w->h[l]) < m->dtmin)
        w->h[l] = copysign(m->dtmin, w->direction[l]);
  return busy;
}

/* A member is done: how, and what it leaves. */
static void psn_end(Many *m, Worker *w, int l, int64_t code) {
  int64_t member = w->member[l], *counts = m->counts + member * COUNTS;
  counts[ACCEPTED] = w->accepted[l], counts[REJECTED] = w->rejected[l];
  counts[EVALUATIONS] = w->evaluations[l], counts[REACHED] = w->reached[l];
  counts[CODE] = code;
  counts[LANE] = (w - m->workers) * ABREAST + l;
  counts[FIRST] = w->used[l] - (w->accepted[l] - w->before[l]);
  if (m->found) m->found[member] = code == STOPPED ? w->found[l] : -1;
  FOR_ENTRIES m->last[member * N + i] = AT(U, i, l);
  for (int64_t i = w->reached[l] * N; i < m->save_count * N; i++)
    m->saved[member * m->save_count * N + i] = (REAL)NAN;
  w->member[l] = -1;
}

/* Sizes of the next attempts; returns whether a member ended. */
static int psn_propose(Many *m, Worker *w) {
  int ended = 0, adaptive = m->control != FIXED;
#pragma omp simd reduction(| : ended)
  LANES_ALL {
    double h = w->h[l], proposed = copysign(psn_smaller(fabs(h), m->dtmax), w->direction[l]);
    double smallest = psn_larger(m->dtmin, 4 * psn_unit(w->t[l]));
    int cut = w->cut[l] != 0;
    int lands = fabs(w->stop[l] - w->t[l]) <= fabs(proposed) * (1 + SLIVER) && !cut;
    /* Far from zero the end may be rounded to the stop. */
    int far = psn_is_far(w->t0[l], w->t1[l]) && !cut;
    int ends = lands || (far && w->t[l] + proposed == w->stop[l]);
    int finite = fabs(h) <= 1.7976931348623157e308;
    int late = w->accepted[l] + w->rejected[l] >= w->most[l] && !cut;
    int small = adaptive && fabs(proposed) < smallest && !lands && !cut;
    w->proposed[l] = proposed, w->size[l] = proposed;
    w->lands[l] = ends;
    w->code[l] = !finite ? UNSTABLE : late ? OUT_OF_STEPS : small ? TOO_SMALL : RUNNING;
    ended |= w->member[l] >= 0 && w->code[l] != RUNNING;
  }
  LANES_ALL {
    double t = w->t[l];
    w->size[l] = w->lands[l] ? psn_size_between(t, w->stop[l])
                             : psn_size_from(w->t0[l], w->t1[l], t, w->proposed[l]);
  }
  if (ended)
    LANES_ALL if (w->member[l] >= 0 && w->code[l] != RUNNING) {
      int bad = w->code[l] == TOO_SMALL && !isfinite(w->error[l]);
      psn_end(m, w, l, bad ? UNSTABLE : w->code[l]);
    }
  return ended;
}

/* The stages of an attempt, its end and its error. */
static void psn_attempt(const Many *m, Worker *w, int upto) {
  int adaptive = m->control != FIXED;
  LANES_ALL w->real_size[l] = (REAL)w->size[l];
  psn_lane_times(m, w, w->size);
  psn_lanes_first(m, w, 0);
  psn_lanes_stages(m, w, upto);
  if (!(FSAL && adaptive)) combine(END, w->real_size, U, K(0), LAST);
  LANES_ALL w->known[l] = upto;
  w->have = upto;
  if (m->patience) psn_lanes_eigenvalues(w);
  if (!adaptive) {
    LANES_ALL w->error[l] = NAN;
    return;
  }
  error_of(K(0), EXTRA);
  psn_lane_norms(m, w, EXTRA, U, LAST, w->error);
#ifdef TWO_ERRORS
  double low[ABREAST];
  error_low_of(K(0), EXTRA);
  psn_lane_norms(m, w, EXTRA, U, LAST, low);
  LANES_ALL {
    double a = w->error[l], b = low[l];
    if (a != 0) w->error[l] = a * a / sqrt(a * a + 0.01 * b * b);
  }
#endif
  LANES_ALL w->error[l] *= fabs(w->size[l]);
}

/* In members_control.h: the sizes that follow from the errors; `take` says who has been accepted. */
static void psn_control(const Many *m, Worker *w);

/* Whether a time that is to be saved lies inside a step that has been accepted. So does the end of a
   step that moves with its start. */
static int psn_is_passed(const Many *m, const Worker *w, int l, double end) {
  if (w->reached[l] == m->save_count) return 0;
  double at = psn_save_time(m, w, l);
  if (at == end) return m->free && !w->lands[l];
  return w->direction[l] > 0 ? at < end : at > end;
}

static double psn_step_end(const Worker *w, int l) {
  return w->lands[l] ? w->stop[l] : w->t[l] + w->size[l];
}

/* The stages of the dense output too, for lanes that ask for them. */
static void psn_lanes_complete(const Many *m, Worker *w, const int *asked) {
  for (; w->have < ALL_STAGES; w->have++) {
    combine(w->have, w->real_size, U, K(0), G);
    psn_lanes_evaluate(m, w, w->have, G, K(w->have));
  }
  LANES_ALL if (asked[l] && w->known[l] < ALL_STAGES) {
    w->evaluations[l] += ALL_STAGES - w->known[l];
    w->known[l] = ALL_STAGES;
  }
}

/* Save what lies in the accepted steps (saver.py). */
static void psn_lanes_save(const Many *m, Worker *w) {
  int any = 0, passed[ABREAST];
  LANES_ALL {
    passed[l] = w->member[l] >= 0 && w->take[l] != 0 && psn_is_passed(m, w, l, psn_step_end(w, l));
    any |= passed[l];
  }
  if (any) {
    psn_lanes_complete(m, w, passed);
    LANES_ALL if (passed[l]) {
      double end = psn_step_end(w, l);
      while (psn_is_passed(m, w, l, end)) {
        int64_t place = w->member[l] * m->save_count + w->reached[l];
        double theta = (psn_save_time(m, w, l) - w->t[l]) / w->size[l];
        REAL weights[ALL_STAGES];
        psn_dense_weights(theta, 0, weights);
        FOR_ENTRIES {
          REAL sum = 0;
          for (int j = 0; j < ALL_STAGES; j++) sum += weights[j] * AT(K(j), i, l);
          m->saved[place * N + i] = AT(U, i, l) + w->real_size[l] * sum;
        }
        m->places[2 * place] = (double)w->accepted[l], m->places[2 * place + 1] = theta;
        w->reached[l]++;
      }
    }
  }
  LANES_ALL if (w->member[l] >= 0 && w->take[l] != 0) {
    double end = psn_step_end(w, l);
    while (w->reached[l] < m->save_count && psn_save_time(m, w, l) == end)
      psn_keep_saved(m, w, l, (double)(w->accepted[l] + 1), LAST);
  }
}

static int psn_grow(Worker *w, int l, int64_t first) {
  int64_t room = w->room[l] ? 2 * w->room[l] : first;
  if (w->used[l] < w->room[l]) return 1;
  REAL *ends = realloc(w->ends[l], room * N * sizeof(REAL));
  if (ends) w->ends[l] = ends;
  double *steps = realloc(w->steps[l], room * 4 * sizeof(double));
  if (steps) w->steps[l] = steps;
  if (!ends || !steps) return 0;
  w->room[l] = room;
  return 1;
}

/* Where no error estimate watches the whole state, one that is not finite ends its member. */
static void psn_watch(const Many *m, Worker *w) {
  if (m->control != FIXED && m->driven == N) return;
  REAL sum[ABREAST] = {0};
  FOR_ENTRIES LANES_ALL sum[l] += 0 * AT(LAST, i, l);
  LANES_ALL if (w->take[l] != 0 && sum[l] != 0) w->take[l] = 0, w->code[l] = UNSTABLE;
}

/* Write down the accepted steps and go on from their ends. */
static void psn_advance(Many *m, Worker *w) {
  psn_watch(m, w);
  if (m->save_count) psn_lanes_save(m, w);
  LANES_ALL {
    int taken = w->member[l] >= 0 && w->take[l] != 0;
    w->take[l] = taken;
    w->follow[l] = taken && END_STAGE >= 0 && w->known[l] > END_STAGE && !w->lands[l];
    w->known[l] = !taken || w->follow[l] != 0;
    w->linearized[l] = w->linearized[l] && !taken;
    w->rejected[l] += !taken && !w->cut[l] && w->code[l] == RUNNING;
    w->accepted[l] += taken;
  }
  LANES_ALL if (w->take[l] != 0) {
    if (!psn_grow(w, l, m->room)) {
      w->code[l] = OUT_OF_MEMORY;
      w->accepted[l]--;
      continue;
    }
    int64_t place = w->used[l]++;
    double *row = w->steps[l] + 4 * place, end = w->t[l] + w->size[l], stop = -1;
    if (w->lands[l]) {
      end = w->stop[l], stop = (double)w->next_stop[l];
      if (w->next_stop[l]++ == w->stop_count[l]) w->code[l] = SUCCESS;
      else psn_aim(m, w, l);
    }
    if (w->cut[l]) w->code[l] = STOPPED;
    row[0] = end, row[1] = w->size[l], row[2] = w->error[l], row[3] = stop;
    REAL *into = w->ends[l] + place * N;
    FOR_ENTRIES into[i] = AT(LAST, i, l);
    w->t[l] = end;
  }
  FOR_ENTRIES {
#pragma omp simd
    LANES_ALL {
      AT(U, i, l) = w->take[l] != 0 ? AT(LAST, i, l) : AT(U, i, l);
      if (END_STAGE >= 0)
        AT(K(0), i, l) = w->follow[l] != 0 ? AT(K(END_STAGE >= 0 ? END_STAGE : 0), i, l)
                                           : AT(K(0), i, l);
    }
  }
  LANES_ALL if (w->member[l] >= 0 && w->code[l] != RUNNING) psn_end(m, w, l, w->code[l]);
}

/* In members_events.h, and in members_turns.h. */
static void psn_lanes_cut(const Many *m, Worker *w);
static void psn_lanes_turn(Many *m, Worker *w);

/* Step until all members are done, or for a while. */
static int64_t psn_members_march(Many *m, Worker *w) {
  double until = psn_seconds() + m->seconds;
  /* The last stage of such a method serves the error, the next step, and the eigenvalue. */
  int upto = FSAL && m->control == FIXED && !m->patience ? STAGES - 1 : STAGES;
  if (!w->started) {
    LANES_ALL w->member[l] = -1;
    w->started = 1;
  }
  for (int64_t turn = 1; psn_fill(m, w); turn++) {
    if (turn % TURNS == 0 && psn_seconds() > until) return RUNNING;
    if (psn_propose(m, w)) continue;
    psn_attempt(m, w, upto);
    psn_control(m, w);
    if (m->event_count) psn_lanes_cut(m, w);
    psn_advance(m, w);
    if (m->patience) psn_lanes_turn(m, w);
  }
  return SUCCESS;
}
