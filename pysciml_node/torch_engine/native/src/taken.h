/* Single steps that are taken again from their starts: where they end, what lies inside of them, and
   estimates of their errors and of the field's stiffness (replay/trajectory.py). */

typedef struct Taken {
  Solve *s;   /* how they are taken and measured; its ends, saved and places are those of the steps */
  struct Sweep *back;
  const REAL *starts;        /* states, rows of ENTIRE */
  double *steps, *norms;     /* of each step start and size; and four norms, as forward leaves them */
  REAL *errors, *stiffness;  /* of each step, or 0 where they are not wanted */
  const REAL *errors_bar, *stiffness_bar; /* their cotangents, or 0 */
  REAL *starts_bar;          /* those of the starts */
  int64_t count, n;
  int64_t anywhere; /* whether the one step begins anywhere; its size is Hairer's where it is NaN */
  int64_t constant; /* whether its first stage is a constant */
} Taken;

enum { HIGH, LOW, TOP, BOTTOM, NORMS };

/* Stages that estimates need. */
#define ESTIMATED (FIRST_ALIKE >= STAGES ? FIRST_ALIKE + 1 : STAGES)

/* Two stages with the same node: squares of the differences of their derivatives and arguments. */
typedef struct {
  Solve *s;
  REAL h, top[PARTS], bottom[PARTS];
} Pair;

/* The difference of the arguments over h. */
static inline REAL psn_between(const REAL *k, int i) {
  REAL sum = 0;
  for (int j = 0; j < ALL_STAGES; j++)
    if (BETWEEN[j] != 0) sum += BETWEEN[j] * k[j * ROW + i];
  return sum;
}

static void psn_pair_in(void *job, int part) {
  Pair *a = job;
  Part p = psn_part(a->s, part, a->s->k);
  const REAL *k = K(&p, 0), *first = k + FIRST_ALIKE * ROW, *second = k + SECOND_ALIKE * ROW;
  REAL top = 0, bottom = 0;
  FOR_RUNS(part, 0)
    for (int i = run.from; i < run.to; i++) {
      REAL slope = first[i] - second[i], way = a->h * psn_between(k, i);
      top += slope * slope, bottom += way * way;
    }
  a->top[part] = top, a->bottom[part] = bottom;
}

static void psn_estimate(Taken *a, const Ending *e, double h) {
  Solve *s = a->s;
  double *norms = a->norms + NORMS * a->n;
  REAL high, low, top = 0, bottom = 0;
  a->errors[a->n] = (REAL)(psn_error_norm(e, &high, &low) * s->factor * fabs(h));
  a->stiffness[a->n] = (REAL)NAN;
  norms[HIGH] = high, norms[LOW] = low;
  if (FIRST_ALIKE < 0) return;
  Pair pair = {s, (REAL)h};
  IN_PARTS(s->team, psn_pair_in, &pair);
  for (int part = 0; part < PARTS; part++) top += pair.top[part], bottom += pair.bottom[part];
  norms[TOP] = F(__builtin_sqrt)(top), norms[BOTTOM] = F(__builtin_sqrt)(bottom);
  a->stiffness[a->n] = (REAL)(norms[TOP] / (norms[BOTTOM] + ROUNDING));
}

static void psn_take(Taken *a) {
  Solve *s = a->s;
  double t = a->steps[2 * a->n], *h = a->steps + 2 * a->n + 1;
  s->k = a->n < s->kept_room ? s->kept + a->n * PARTS * SLOT : s->memory;
  s->known = s->linearized = 0;
  FOR_PARTS psn_take_part(p.part, a->starts + a->n * ENTIRE, U(&p));
  if (a->anywhere) psn_first_stage(s, t, 0.0);
  if (isnan(*h)) *h = psn_first_size(s, s->t1 > s->t0 ? 1 : -1);
  psn_stages(s, t, *h, a->errors ? ESTIMATED : STAGES);
  Ending e = {s, (REAL)*h, a->errors != 0};
  IN_PARTS(s->team, psn_end_in, &e);
  psn_put_all(s, LAST(s), s->ends + a->n * ENTIRE);
  if (a->errors) psn_estimate(a, &e, *h);
  while (s->reached < s->save_count && s->places[2 * s->reached] == a->n) {
    psn_dense(s, t, *h, s->places[2 * s->reached + 1], s->saved + s->reached * ENTIRE);
    s->reached++;
  }
}

static int64_t psn_take_all(Taken *a) {
  double until = psn_seconds() + a->s->seconds;
  for (int64_t turn = 1; a->n < a->count; turn++, a->n++) {
    if (turn % TURNS == 0 && psn_seconds() > until) return RUNNING;
    psn_take(a);
  }
  return SUCCESS;
}

/* What Python calls: take the steps, or go on with them for a while. */
int64_t take(Taken *a) {
  Solve *s = a->s;
  if (!a->n) pack_all(s->tensors, s->packed);
  WITH_TEAM(s, s->status = psn_take_all(a));
  return s->status;
}
