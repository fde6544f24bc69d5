/* The discrete adjoint of members abreast (sweep.h, replay/adjoint_discrete.py), and what Python calls.

   Workers take the members chunk by chunk, and a chunk's members share no lane with those of another:
   the sum of the shared parameters' cotangents is the same for any number of workers. */

typedef struct {
  double t0[ABREAST], t1[ABREAST], t[ABREAST], h[ABREAST], t_bar[ABREAST], h_bar[ABREAST];
  REAL size[ABREAST];
  int64_t member[ABREAST], n[ABREAST], first[ABREAST], q[ABREAST], inside[ABREAST], live[ABREAST];
  int64_t chunk, next, last, started, status;
  REAL *memory;
} Sweeper;

typedef struct {
  const double *t0, *t1, *marks, *steps, *places;
  const REAL *u0, *packed, *ends;
  const REAL *const *own;
  Accuracy accuracy;
  /* Where each member's steps begin; which members are to be gone back through, or 0 where it is all of
     them; the first of the method's steps and the one behind its last. */
  const int64_t *offsets, *rows, *first, *behind;
  int64_t *left; /* (members, 2): saved times that are left, and whether cotangents have arrived */
  /* Cotangents that arrive, or 0; and those that leave: of the starts, of each member's own
     parameters, to which both are added, and of the packed parameters by chunks. */
  const REAL *saved_bar, *ends_bar, *last_bar;
  REAL *start_bar, *packed_bar;
  REAL *const *own_bar;
  /* Likewise of each step's start and size, and of each saved time's place in its step, or 0. */
  double *t_bar, *h_bar, *theta_bar;
  int64_t *costs; /* (members, 2): evaluations, steps */
  int64_t span_stride, start_stride, mark_count, save_count, members, chunk, threads;
  double seconds;
  REAL *memory;
  int64_t memory_stride, next;
  Sweeper *workers;
} Back;

#undef U
#undef OWN_VALUES
#undef TIMES
#define BAR_OF(i) K(ALL_STAGES + (i))
#define U K(2 * ALL_STAGES)
#define SUM K(2 * ALL_STAGES + 1)
#define BAR K(2 * ALL_STAGES + 2)
#define TIMES K(2 * ALL_STAGES + 3)
#define OWN_VALUES (TIMES + ALL_STAGES * TIME_ROW)
#define OWN_BARS (OWN_VALUES + OWN_ROOM)
#define SCRATCH (OWN_BARS + OWN_ROOM)
#define STAGE(i) (SCRATCH + BARS + (i) * (2 * ROW + WORK)) /* argument, cotangent, values */
#define STAGE_BAR(i) (STAGE(i) + ROW)

static const double *psn_place_of(const Back *b, const Sweeper *w, int l) {
  return b->places + 2 * (w->member[l] * b->save_count + w->q[l]);
}

/* Whether the last saved time that is left lies inside a step, and a cotangent arrives at it. */
static int psn_lies_inside(const Back *b, const Sweeper *w, int l, int64_t n) {
  if (!b->saved_bar || w->q[l] < 0) return 0;
  const double *place = psn_place_of(b, w, l);
  return place[0] == n && !isnan(place[1]);
}

static const REAL *psn_saved_bar(const Back *b, const Sweeper *w, int l) {
  return b->saved_bar + (w->member[l] * b->save_count + w->q[l]) * N;
}

static void psn_add(Sweeper *w, int l, const REAL *bar) {
  FOR_ENTRIES AT(BAR, i, l) += bar[i];
}

/* The cotangents that arrive at a state. */
static void psn_arrive_at(const Back *b, Sweeper *w, int l, int64_t state) {
  int64_t m = w->member[l], first = b->offsets[m], count = b->offsets[m + 1] - first;
  if (b->ends_bar && state) {
    const REAL *row = b->ends_bar + (first + state - 1) * N;
    psn_add(w, l, row);
    FOR_ENTRIES w->live[l] |= row[i] != 0;
  }
  if (b->last_bar && state == count) {
    const REAL *row = b->last_bar + m * N;
    psn_add(w, l, row);
    FOR_ENTRIES w->live[l] |= row[i] != 0;
  }
  while (b->saved_bar && w->q[l] >= 0 && psn_place_of(b, w, l)[0] == state &&
         isnan(psn_place_of(b, w, l)[1])) {
    psn_add(w, l, psn_saved_bar(b, w, l));
    w->live[l] = 1;
    w->q[l]--;
  }
}

/* Go back to a step that cotangents have reached; 0 where there is none any more. What arrives where
   the method's first step starts comes with the steps before it. */
static int psn_seek(const Back *b, Sweeper *w, int l) {
  while (w->n[l] > w->first[l]) {
    psn_arrive_at(b, w, l, w->n[l]);
    w->n[l]--;
    if (w->live[l] || psn_lies_inside(b, w, l, w->n[l])) {
      w->live[l] = 1;
      return 1;
    }
  }
  if (!w->first[l]) psn_arrive_at(b, w, l, 0);
  return 0;
}

static void psn_back_begin(const Back *b, Sweeper *w, int l, int64_t m) {
  w->member[l] = m;
  w->first[l] = b->first[m], w->n[l] = b->behind[m];
  w->q[l] = b->left[2 * m] - 1, w->live[l] = b->left[2 * m + 1];
  w->t0[l] = b->t0[m * b->span_stride], w->t1[l] = b->t1[m * b->span_stride];
  FOR_ENTRIES AT(BAR, i, l) = b->start_bar[m * N + i];
  for (int j = 0; j < OWN; j++)
    for (int i = 0; i < OWN_SIZES[j]; i++) {
      AT(OWN_VALUES + OWN_PLACES[j], i, l) = b->own[j][m * OWN_SIZES[j] + i];
      AT(OWN_BARS + OWN_PLACES[j], i, l) = b->own_bar[j][m * OWN_SIZES[j] + i];
    }
}

static void psn_back_end(const Back *b, Sweeper *w, int l) {
  int64_t m = w->member[l];
  b->left[2 * m] = w->q[l] + 1, b->left[2 * m + 1] = w->live[l];
  FOR_ENTRIES b->start_bar[m * N + i] = AT(BAR, i, l), AT(BAR, i, l) = 0;
  for (int j = 0; j < OWN; j++)
    for (int i = 0; i < OWN_SIZES[j]; i++)
      b->own_bar[j][m * OWN_SIZES[j] + i] = AT(OWN_BARS + OWN_PLACES[j], i, l);
  w->member[l] = -1;
}

/* The start of the step to be replayed. */
static void psn_load(const Back *b, Sweeper *w, int l) {
  int64_t m = w->member[l], step = b->offsets[m] + w->n[l];
  const REAL *u = w->n[l] ? b->ends + (step - 1) * N : b->u0 + m * b->start_stride;
  FOR_ENTRIES AT(U, i, l) = u[i];
  w->t[l] = w->n[l] ? b->steps[4 * (step - 1)] : w->t0[l];
  w->h[l] = b->steps[4 * step + 1];
}

/* A lane that is idle does what another one does, with cotangents of zero. */
static void psn_follow(Sweeper *w, int l, int busy) {
  FOR_ENTRIES AT(U, i, l) = AT(U, i, busy), AT(BAR, i, l) = 0;
  for (int j = 0; j < OWN; j++)
    for (int i = 0; i < OWN_SIZES[j]; i++)
      AT(OWN_VALUES + OWN_PLACES[j], i, l) = AT(OWN_VALUES + OWN_PLACES[j], i, busy);
  w->t[l] = w->t[busy], w->h[l] = w->h[busy], w->inside[l] = 0;
  w->t0[l] = w->t0[busy], w->t1[l] = w->t1[busy];
}

/* Put all lanes at steps to be replayed; 0 where the chunk has no more. */
static int psn_position(const Back *b, Sweeper *w) {
  int busy = -1, idle = 0;
  LANES_ALL {
    for (;;) {
      if (w->member[l] < 0) {
        if (w->next == w->last) break;
        int64_t i = w->next++;
        psn_back_begin(b, w, l, b->rows ? b->rows[i] : i);
      }
      if (psn_seek(b, w, l)) break;
      psn_back_end(b, w, l);
    }
    if (w->member[l] < 0) {
      idle = 1;
      continue;
    }
    busy = l;
    psn_load(b, w, l);
  }
  if (busy >= 0 && idle) LANES_ALL if (w->member[l] < 0) psn_follow(w, l, busy);
  return busy >= 0;
}

/* What dense outputs add to the cotangents of stages, over h, and to that of the start. */
static void psn_dense_bars(const Back *b, Sweeper *w, int l) {
  for (; psn_lies_inside(b, w, l, w->n[l]); w->q[l]--) {
    const REAL *v = psn_saved_bar(b, w, l);
    double theta = psn_place_of(b, w, l)[1];
    REAL weights[ALL_STAGES];
    psn_dense_weights(theta, 0, weights);
    for (int i = 0; i < ALL_STAGES; i++)
      for (int e = 0; e < N; e++) AT(STAGE_BAR(i), e, l) += weights[i] * v[e];
    for (int e = 0; e < N; e++) AT(SUM, e, l) += v[e];
    if (!b->theta_bar) continue;
    psn_dense_weights(theta, 1, weights);
    double along = 0;
    for (int e = 0; e < N; e++) {
      REAL total = 0;
      for (int i = 0; i < ALL_STAGES; i++) total += weights[i] * AT(K(i), e, l);
      along += (double)v[e] * (w->size[l] * total);
    }
    b->theta_bar[w->member[l] * b->save_count + w->q[l]] = along;
  }
}

/* Get ready for the steps that the lanes are at; returns how many stages they need. */
static int psn_lanes_prepare(const Back *b, Sweeper *w) {
  int count = FSAL ? STAGES - 1 : STAGES;
  LANES_ALL {
    w->size[l] = (REAL)w->h[l];
    w->t_bar[l] = w->h_bar[l] = 0;
    w->inside[l] = w->member[l] >= 0 && psn_lies_inside(b, w, l, w->n[l]);
    if (w->inside[l]) count = ALL_STAGES;
  }
  if (TIMED) LANES_ALL {
    REAL times[ALL_STAGES];
    psn_times(b->marks, b->mark_count, w->t0[l], w->t1[l], w->t[l], w->h[l], times);
    for (int i = 0; i < ALL_STAGES; i++) TIMES[i * TIME_ROW + l] = times[i];
  }
  return count;
}

/* The cotangents that arrive at steps whose stages are known. */
static void psn_lanes_arrive(const Back *b, Sweeper *w, int count) {
  for (int i = 0; i < count; i++) memset(STAGE_BAR(i), 0, N * ABREAST * sizeof(REAL));
  memcpy(SUM, BAR, N * ABREAST * sizeof(REAL));
  LANES_ALL {
    if (w->member[l] < 0) continue;
    int64_t *costs = b->costs + 2 * w->member[l];
    costs[0] += w->inside[l] ? ALL_STAGES : FSAL ? STAGES - 1 : STAGES, costs[1]++;
    if (w->inside[l]) psn_dense_bars(b, w, l);
  }
}

/* What a stage adds to the cotangents of the step's start and size, by that of its argument's time,
   which begins anew, and, over h, by that of what it adds to the step. */
static void psn_lanes_move(const Back *b, Sweeper *w, int i, REAL *time_bar, const REAL *k_bar) {
  if (!b->t_bar) return;
  LANES_ALL {
    double along = 0;
    for (int e = 0; e < N; e++) along += (double)AT(k_bar, e, l) * AT(K(i), e, l);
    w->h_bar[l] += along / w->h[l] + NODES[i] * time_bar[l];
    w->t_bar[l] += time_bar[l];
    time_bar[l] = 0;
  }
}

/* The method's: pull the cotangents of the steps' ends, in BAR, back to their starts. */
static void psn_lanes_replay(const Back *b, Sweeper *w, REAL *packed_bar);

/* Write down what moves the steps that have been pulled back. */
static void psn_lanes_note(const Back *b, Sweeper *w) {
  if (!b->t_bar) return;
  LANES_ALL if (w->member[l] >= 0) {
    int64_t step = b->offsets[w->member[l]] + w->n[l];
    b->t_bar[step] = w->t_bar[l], b->h_bar[step] = w->h_bar[l];
  }
}

static int psn_next_chunk(Back *b, Sweeper *w) {
  w->chunk = __atomic_fetch_add(&b->next, 1, __ATOMIC_RELAXED);
  w->next = w->chunk * b->chunk;
  if (w->next >= b->members) return 0;
  w->last = w->next + b->chunk < b->members ? w->next + b->chunk : b->members;
  return 1;
}

/* Go back through the steps of all members, or for a while. */
static int64_t psn_members_sweep(Back *b, Sweeper *w) {
  double until = psn_seconds() + b->seconds;
  if (!w->started) {
    LANES_ALL w->member[l] = -1;
    w->started = 1;
    if (!psn_next_chunk(b, w)) return SUCCESS;
  }
  for (int64_t turn = 1;; turn++) {
    if (turn % TURNS == 0 && psn_seconds() > until) return RUNNING;
    if (psn_position(b, w)) {
      psn_lanes_replay(b, w, b->packed_bar + w->chunk * ALL_PACKED);
      psn_lanes_note(b, w);
    } else if (!psn_next_chunk(b, w))
      return SUCCESS;
  }
}

static int64_t psn_sweep_worker(void *job, int64_t i) {
  Back *b = job;
  Sweeper *w = b->workers + i;
  w->memory = b->memory + i * b->memory_stride;
  return w->status == SUCCESS ? SUCCESS : (w->status = psn_members_sweep(b, w));
}

/* What Python calls. */
int64_t members_sweep(Back *b) {
  if (!b->workers) b->workers = calloc(b->threads, sizeof(Sweeper));
  return b->workers ? psn_in_threads(b, psn_sweep_worker, b->threads) : OUT_OF_MEMORY;
}

/* The shared parameters' cotangents: those of all chunks, in their order. */
void members_finish(Back *b, REAL *scratch) {
  int64_t chunks = (b->members + b->chunk - 1) / b->chunk;
  for (int64_t c = 1; c < chunks; c++)
    for (int64_t i = 0; i < ALL_PACKED; i++) b->packed_bar[i] += b->packed_bar[c * ALL_PACKED + i];
  unpack_all(b->packed, b->packed_bar, scratch);
}

void members_let_go(Back *b) {
  free(b->workers);
  b->workers = 0;
}
