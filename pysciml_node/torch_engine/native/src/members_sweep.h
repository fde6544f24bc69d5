/* The discrete adjoint of members abreast (sweep.h, replay/adjoint_discrete.py), and what Python calls.

   Workers take the members chunk by chunk, and a chunk's members share no lane with those of another:
   the sum of the shared parameters' cotangents is the same for any number of workers. */

typedef struct {
  double t0[ABREAST], t1[ABREAST], t[ABREAST], h[ABREAST];
  REAL size[ABREAST];
  int64_t member[ABREAST], n[ABREAST], q[ABREAST], inside[ABREAST], live[ABREAST];
  int64_t chunk, next, last, started, status;
  REAL *memory;
} Sweeper;

typedef struct {
  const double *t0, *t1, *marks, *steps, *places;
  const REAL *u0, *packed, *ends;
  const REAL *const *own;
  const int64_t *offsets, *counts;
  /* Cotangents that arrive, or 0; and those that leave: of the starts, of each member's own
     parameters, and of the packed parameters by chunks. */
  const REAL *saved_bar, *ends_bar, *last_bar;
  REAL *start_bar, *packed_bar;
  REAL *const *own_bar;
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

static const double *psn_place(const Back *b, const Sweeper *w, int l) {
  return b->places + 2 * (w->member[l] * b->save_count + w->q[l]);
}

/* Whether the last saved time that is left lies inside a step, and a cotangent arrives at it. */
static int psn_lies_inside(const Back *b, const Sweeper *w, int l, int64_t n) {
  if (!b->saved_bar || w->q[l] < 0) return 0;
  const double *place = psn_place(b, w, l);
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
  while (b->saved_bar && w->q[l] >= 0 && psn_place(b, w, l)[0] == state &&
         isnan(psn_place(b, w, l)[1])) {
    psn_add(w, l, psn_saved_bar(b, w, l));
    w->live[l] = 1;
    w->q[l]--;
  }
}

/* Go back to a step that cotangents have reached; 0 where there is none any more. */
static int psn_seek(const Back *b, Sweeper *w, int l) {
  while (w->n[l] > 0) {
    psn_arrive_at(b, w, l, w->n[l]);
    w->n[l]--;
    if (w->live[l] || psn_lies_inside(b, w, l, w->n[l])) {
      w->live[l] = 1;
      return 1;
    }
  }
  psn_arrive_at(b, w, l, 0);
  return 0;
}

static void psn_back_begin(const Back *b, Sweeper *w, int l, int64_t m) {
  w->member[l] = m;
  w->n[l] = b->offsets[m + 1] - b->offsets[m];
  w->q[l] = b->counts[m * COUNTS + REACHED] - 1;
  w->live[l] = 0;
  w->t0[l] = b->t0[m * b->span_stride], w->t1[l] = b->t1[m * b->span_stride];
  FOR_ENTRIES AT(BAR, i, l) = 0;
  for (int j = 0; j < OWN; j++)
    for (int i = 0; i < OWN_SIZES[j]; i++) {
      AT(OWN_VALUES + OWN_PLACES[j], i, l) = b->own[j][m * OWN_SIZES[j] + i];
      AT(OWN_BARS + OWN_PLACES[j], i, l) = 0;
    }
}

static void psn_back_end(const Back *b, Sweeper *w, int l) {
  int64_t m = w->member[l];
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
        psn_back_begin(b, w, l, w->next++);
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
    REAL weights[ALL_STAGES];
    psn_dense_weights(psn_place(b, w, l)[1], 0, weights);
    for (int i = 0; i < ALL_STAGES; i++)
      for (int e = 0; e < N; e++) AT(STAGE_BAR(i), e, l) += weights[i] * v[e];
    for (int e = 0; e < N; e++) AT(SUM, e, l) += v[e];
  }
}

static void psn_lanes_replay(const Back *b, Sweeper *w, REAL *packed_bar) {
  int usual = FSAL ? STAGES - 1 : STAGES, count = usual;
  LANES_ALL {
    w->size[l] = (REAL)w->h[l];
    w->inside[l] = w->member[l] >= 0 && psn_lies_inside(b, w, l, w->n[l]);
    if (w->inside[l]) count = ALL_STAGES;
  }
  if (TIMED) LANES_ALL {
    REAL times[ALL_STAGES];
    psn_times(b->marks, b->mark_count, w->t0[l], w->t1[l], w->t[l], w->h[l], times);
    for (int i = 0; i < ALL_STAGES; i++) TIMES[i * TIME_ROW + l] = times[i];
  }
  for (int i = 0; i < count; i++) {
    combine(i, w->size, U, K(0), STAGE(i));
    field(TIMES + i * TIME_ROW, STAGE(i), b->packed, OWN_VALUES, K(i), STAGE(i) + 2 * ROW);
    memset(STAGE_BAR(i), 0, N * ABREAST * sizeof(REAL));
  }
  memcpy(SUM, BAR, N * ABREAST * sizeof(REAL));
  LANES_ALL {
    if (w->member[l] < 0) continue;
    int64_t *costs = b->costs + 2 * w->member[l];
    costs[0] += w->inside[l] ? ALL_STAGES : usual, costs[1]++;
    if (w->inside[l]) psn_dense_bars(b, w, l);
  }
  for (int i = count - 1; i >= 0; i--) {
    combine_bars(i, count, w->size, BAR, BAR_OF(0), STAGE_BAR(i));
    pull(TIMES + i * TIME_ROW, STAGE(i), b->packed, OWN_VALUES, K(i), STAGE(i) + 2 * ROW,
         STAGE_BAR(i), BAR_OF(i), packed_bar, OWN_BARS, SCRATCH);
  }
  for (int i = 0; i < count; i++)
    for (int e = 0; e < N * ABREAST; e++) SUM[e] += BAR_OF(i)[e];
  memcpy(BAR, SUM, N * ABREAST * sizeof(REAL));
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
    if (psn_position(b, w))
      psn_lanes_replay(b, w, b->packed_bar + w->chunk * PACKED);
    else if (!psn_next_chunk(b, w))
      return SUCCESS;
  }
}

/* Threads. */
typedef struct {
  void *job;
  int64_t (*run)(void *, int64_t);
  int64_t index, status;
} Task;

static void *psn_thread(void *x) {
  Task *task = x;
  task->status = task->run(task->job, task->index);
  return 0;
}

enum { MOST_THREADS = 256 };

static int64_t psn_in_threads(void *job, int64_t (*run)(void *, int64_t), int64_t threads) {
  Task tasks[MOST_THREADS];
  pthread_t ids[MOST_THREADS];
  int made[MOST_THREADS] = {0};
  for (int64_t i = 0; i < threads; i++) tasks[i] = (Task){job, run, i, RUNNING};
  for (int64_t i = 1; i < threads; i++)
    made[i] = !pthread_create(&ids[i], 0, psn_thread, &tasks[i]);
  psn_thread(&tasks[0]);
  int64_t status = tasks[0].status;
  for (int64_t i = 1; i < threads; i++) {
    if (made[i]) pthread_join(ids[i], 0);
    else psn_thread(&tasks[i]);
    if (tasks[i].status == RUNNING) status = RUNNING;
  }
  return status;
}

static int64_t psn_march_worker(void *job, int64_t i) {
  Many *m = job;
  Worker *w = m->workers + i;
  return w->status == SUCCESS ? SUCCESS : (w->status = psn_members_march(m, w));
}

static int64_t psn_sweep_worker(void *job, int64_t i) {
  Back *b = job;
  Sweeper *w = b->workers + i;
  return w->status == SUCCESS ? SUCCESS : (w->status = psn_members_sweep(b, w));
}

/* What Python calls. */
int64_t members_march(Many *m) {
  if (!m->workers && !(m->workers = calloc(m->threads, sizeof(Worker)))) return OUT_OF_MEMORY;
  for (int64_t i = 0; i < m->threads; i++) m->workers[i].memory = m->memory + i * m->memory_stride;
  return psn_in_threads(m, psn_march_worker, m->threads);
}

/* The steps of all members, one after the other. */
void members_gather(const Many *m, const int64_t *offsets, REAL *ends, double *steps) {
  for (int64_t i = 0; i < m->members; i++) {
    const int64_t *counts = m->counts + i * COUNTS;
    const Worker *w = m->workers + counts[LANE] / ABREAST;
    int64_t l = counts[LANE] % ABREAST, from = counts[FIRST], n = offsets[i + 1] - offsets[i];
    if (!n) continue;
    memcpy(ends + offsets[i] * N, w->ends[l] + from * N, n * N * sizeof(REAL));
    memcpy(steps + offsets[i] * 4, w->steps[l] + from * 4, n * 4 * sizeof(double));
  }
}

void members_release(Many *m) {
  if (!m->workers) return;
  for (int64_t i = 0; i < m->threads; i++)
    LANES_ALL free(m->workers[i].ends[l]), free(m->workers[i].steps[l]);
  free(m->workers);
  m->workers = 0;
}

/* Make the workers ready for another solve; where their steps take more than `most` bytes a lane,
   let go of these. */
void members_rest(Many *m, int64_t most) {
  for (int64_t i = 0; i < m->threads; i++) {
    Worker *w = m->workers + i;
    w->started = w->status = 0;
    LANES_ALL {
      w->used[l] = 0;
      if (w->room[l] * (int64_t)(N * sizeof(REAL) + 4 * sizeof(double)) <= most) continue;
      free(w->ends[l]), free(w->steps[l]);
      w->ends[l] = 0, w->steps[l] = 0, w->room[l] = 0;
    }
  }
}

int64_t members_sweep(Back *b) {
  if (!b->workers) {
    b->workers = calloc(b->threads, sizeof(Sweeper));
    if (!b->workers) return OUT_OF_MEMORY;
    for (int64_t i = 0; i < b->threads; i++) b->workers[i].memory = b->memory + i * b->memory_stride;
  }
  return psn_in_threads(b, psn_sweep_worker, b->threads);
}

/* The shared parameters' cotangents: those of all chunks, in their order. */
void members_finish(Back *b, REAL *scratch) {
  int64_t chunks = (b->members + b->chunk - 1) / b->chunk;
  for (int64_t c = 1; c < chunks; c++)
    for (int64_t i = 0; i < PACKED; i++) b->packed_bar[i] += b->packed_bar[c * PACKED + i];
  unpack(b->packed, b->packed_bar, scratch);
}

void members_let_go(Back *b) {
  free(b->workers);
  b->workers = 0;
}

void prepare(const REAL *const *tensors, REAL *packed) { pack(tensors, packed); }
