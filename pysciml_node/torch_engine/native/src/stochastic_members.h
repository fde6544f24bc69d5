/* The members of an ensemble of stochastic equations: each is a solve as stochastic.h and sweep.h take
   it, on its own path. Workers, one a thread, take them one after the other.

   Where all take the same steps, SEEDS of them go abreast as one solve: every entry is followed by those
   of the others, and what one does depends on no other. `rows` has the members of each such group;
   ~m stands for one that is there to fill it, of which nothing is kept.

   Python gives of all what is alike in `base`, and of each its interval, first size, root of the path,
   seed, tolerance, saved times and state. Of the parameters, those with a number in `own` are each
   member's own, so many entries of them; where there are any, `packed` is 0 and each group packs. */

/* What the members of a solve and of its sweep have in common. */
typedef struct {
  const double *t0, *t1, *length;
  const uint64_t *seeds;
  const REAL *const *tensors;
  const int64_t *own, *starts, *sizes; /* of each parameter, where it lies packed */
  const int64_t *rows;
  int64_t groups, parameters, save_count, threads, memory_stride, next;
  const REAL *packed;
  REAL *memory; /* of a worker: that of the loop, and packed parameters with their cotangents */
} Crew;

enum { CREW_PACKED = (ALL_PACKED + 15) / 16 * 16 };

/* Entries of what is stepped of one member, and one of them in a row of all. */
enum { OF_ONE = N / SEEDS };
#define LANES_ALL for (int l = 0; l < SEEDS; l++)
#define FOR_ONE for (int i = 0; i < OF_ONE; i++)

static int64_t psn_member(const int64_t *rows, int l) { return rows[l] < 0 ? ~rows[l] : rows[l]; }

static Noise psn_path_of(const Crew *c, const int64_t *rows, uint64_t *seeds) {
  int64_t m = psn_member(rows, 0);
  LANES_ALL seeds[l] = c->seeds[psn_member(rows, l)];
  return (Noise){.t0 = c->t0[m], .length = c->length[m], .seed = seeds[0], .seeds = seeds};
}

/* States of members side by side, and apart again. */
static void psn_gather_lanes(const int64_t *rows, const REAL *of, REAL *into) {
  LANES_ALL FOR_ONE into[i * SEEDS + l] = of[psn_member(rows, l) * OF_ONE + i];
}

static void psn_spread_lane(const REAL *from, int l, REAL *into) {
  FOR_ONE into[i] = from[i * SEEDS + l];
}

/* The packed parameters of a group, in a worker's room where they are not those of all. */
static const REAL *psn_packed_of(const Crew *c, const int64_t *rows, const REAL **tensors,
                                 REAL *room) {
  if (c->packed) return c->packed;
  int64_t shared = 0;
  for (int64_t i = 0; i < c->parameters; i++)
    if (SEEDS == 1) tensors[i] = c->tensors[i] + rows[0] * c->own[i];
    else if (!c->own[i]) tensors[shared++] = c->tensors[i];
  pack_all(tensors, room);
  if (SEEDS == 1) return room;
  for (int64_t i = 0; i < c->parameters; i++)
    for (int64_t e = 0; e < c->own[i]; e++)
      LANES_ALL room[c->starts[i] + e * SEEDS + l] =
          c->tensors[i][psn_member(rows, l) * c->own[i] + e];
  return room;
}

typedef struct {
  Solve s;
  Noise noise;
  uint64_t seeds[SEEDS];
  double *stops, *places;
  const REAL **tensors;
  REAL *start, *saved;
  /* Of all its groups one after the other: the states, the initial one of each first, and as many
     rows for steps, the last of which is empty. */
  REAL *ends;
  double *steps;
  int64_t group, busy, used, room, status;
} Walker;

typedef struct {
  Crew crew;
  Solve base;
  const double *dt0, *shift, *factor, *stops, *saves;
  const REAL *rtol, *atol, *u0;
  int64_t tolerance_stride, save_stride, stop_count, room; /* room: for the steps of a worker at first */
  REAL *last, *saved;
  double *places;
  int64_t *counts; /* (members, COUNTS) */
  Walker *workers;
} Walk;

enum { ACCEPTED, REJECTED, EVALUATIONS, REACHED, CODE, WORKER, FIRST, OF_DIFFUSION, LANE, COUNTS };

/* Show the loop where its rows lie. */
static void psn_place_rows(Walker *w) {
  w->s.ends = w->ends + w->used * N, w->s.steps = w->steps + 4 * w->used;
  w->s.room = w->room - w->used - 1;
}

static int psn_grow(const Walk *k, Walker *w) {
  int64_t room = w->room ? 2 * w->room : k->room;
  REAL *ends = realloc(w->ends, room * N * sizeof(REAL));
  if (ends) w->ends = ends;
  double *steps = realloc(w->steps, 4 * room * sizeof(double));
  if (steps) w->steps = steps;
  if (!ends || !steps) return 0;
  w->room = room;
  psn_place_rows(w);
  return 1;
}

static void psn_begin_group(const Walk *k, Walker *w, int64_t g) {
  const Crew *c = &k->crew;
  const int64_t *rows = c->rows + g * SEEDS;
  Solve *s = &w->s;
  int64_t m = psn_member(rows, 0);
  double t0 = c->t0[m], t1 = c->t1[m];
  *s = k->base;
  s->t0 = t0, s->t1 = t1, s->dt0 = k->dt0[m];
  s->shift = k->shift[m], s->factor = k->factor[m];
  if (k->rtol) s->rtol = k->rtol + m * k->tolerance_stride, s->atol = k->atol + m * k->tolerance_stride;
  s->stops = w->stops, s->stop_count = 0;
  for (int64_t i = 0; i < k->stop_count; i++)
    if (t0 < k->stops[i] && k->stops[i] < t1) w->stops[s->stop_count++] = k->stops[i];
  w->stops[s->stop_count++] = t1;
  s->saves = k->saves + m * k->save_stride, s->save_count = c->save_count;
  s->saved = w->saved, s->places = w->places, s->u0 = w->start;
  psn_gather_lanes(rows, k->u0, w->start);
  REAL *room = c->memory + (w - k->workers) * c->memory_stride;
  s->packed = (REAL *)psn_packed_of(c, rows, w->tensors, room);
  s->memory = room + CREW_PACKED;
  w->noise = psn_path_of(c, rows, w->seeds), s->noise = &w->noise;
  w->group = g, w->busy = 1;
  psn_place_rows(w);
}

static int psn_is_finite(const REAL *u, int l) {
  int finite = 1;
  FOR_ONE finite &= isfinite(u[i * SEEDS + l]) != 0;
  return finite;
}

/* Where no error estimate watches the whole state, steps are kept up to what is not finite. Gives how a
   member ended, and how many steps and saved times are left. */
static int64_t psn_looked_through(const Solve *s, int64_t code, int l, int64_t *steps, int64_t *saved) {
  int watched = s->control != FIXED && s->driven == ENTRIES / SEEDS;
  *steps = s->accepted, *saved = s->reached;
  if (watched || (code != SUCCESS && code != UNSTABLE)) return code;
  if (psn_is_finite(s->ends + s->accepted * N, l)) return code;
  int64_t good = 1, reached = 0;
  while (good <= s->accepted && psn_is_finite(s->ends + good * N, l)) good++;
  if (good > s->accepted) return code;
  for (good--; reached < s->reached; reached++) {
    const double *place = s->places + 2 * reached;
    if (place[0] > good || (place[0] == good && !isnan(place[1]))) break;
  }
  *steps = good, *saved = reached;
  return UNSTABLE;
}

static void psn_end_group(const Walk *k, Walker *w, int64_t code) {
  const int64_t *rows = k->crew.rows + w->group * SEEDS, times = k->crew.save_count;
  Solve *s = &w->s;
  LANES_ALL if (rows[l] >= 0) {
    int64_t m = rows[l], *counts = k->counts + m * COUNTS;
    counts[CODE] = psn_looked_through(s, code, l, counts + ACCEPTED, counts + REACHED);
    counts[REJECTED] = s->rejected;
    counts[EVALUATIONS] = s->evaluations, counts[OF_DIFFUSION] = w->noise.evaluations;
    counts[WORKER] = w - k->workers, counts[FIRST] = w->used, counts[LANE] = l;
    psn_spread_lane(s->ends + counts[ACCEPTED] * N, l, k->last + m * OF_ONE);
    if (!times) continue;
    memcpy(k->places + 2 * m * times, s->places, 2 * counts[REACHED] * sizeof(double));
    REAL *saved = k->saved + m * times * OF_ONE;
    for (int64_t i = 0; i < counts[REACHED]; i++)
      psn_spread_lane(s->saved + i * N, l, saved + i * OF_ONE);
    for (int64_t i = counts[REACHED] * OF_ONE; i < times * OF_ONE; i++) saved[i] = (REAL)NAN;
  }
  w->used += s->accepted + 1;
  w->busy = 0;
}

static int psn_has_room(const Walk *k, Walker *w) {
  const Crew *c = &k->crew;
  if (w->stops) return 1;
  w->stops = malloc((k->stop_count + 1) * sizeof(double));
  w->tensors = malloc((c->parameters + 1) * sizeof(REAL *));
  w->places = malloc((c->save_count + 1) * 2 * sizeof(double));
  w->saved = malloc((c->save_count + 1) * N * sizeof(REAL));
  w->start = malloc(N * sizeof(REAL));
  return w->stops && w->tensors && w->places && w->saved && w->start;
}

static int64_t psn_walk(Walk *k, Walker *w) {
  double until = psn_seconds() + k->base.seconds;
  if (!psn_has_room(k, w)) return OUT_OF_MEMORY;
  do {
    if (!w->busy) {
      int64_t g = __atomic_fetch_add(&k->crew.next, 1, __ATOMIC_RELAXED);
      if (g >= k->crew.groups) return SUCCESS;
      if (w->used + 2 > w->room && !psn_grow(k, w)) return OUT_OF_MEMORY;
      psn_begin_group(k, w, g);
    }
    int64_t status = psn_march(&w->s);
    if (status == RUNNING) break;
    if (status != FULL) psn_end_group(k, w, status);
    else if (!psn_grow(k, w)) return OUT_OF_MEMORY;
  } while (psn_seconds() < until);
  return RUNNING;
}

static int64_t psn_walk_worker(void *job, int64_t i) {
  Walk *k = job;
  Walker *w = k->workers + i;
  return w->status == RUNNING ? (w->status = psn_walk(k, w)) : w->status;
}

/* What Python calls. */
int64_t members_march(Walk *k) {
  if (!k->workers) k->workers = calloc(k->crew.threads, sizeof(Walker));
  if (!k->workers) return OUT_OF_MEMORY;
  int64_t status = psn_in_threads(k, psn_walk_worker, k->crew.threads);
  for (int64_t i = 0; i < k->crew.threads; i++)
    if (k->workers[i].status == OUT_OF_MEMORY) return OUT_OF_MEMORY;
  return status;
}

/* The states and steps of so many members, one after the other. */
void members_gather(const Walk *k, int64_t members, const int64_t *offsets, REAL *ends, double *steps) {
  for (int64_t m = 0; m < members; m++) {
    const int64_t *counts = k->counts + m * COUNTS;
    const Walker *w = k->workers + counts[WORKER];
    int64_t n = counts[ACCEPTED], from = counts[FIRST], to = offsets[m];
    for (int64_t i = 0; i <= n; i++)
      psn_spread_lane(w->ends + (from + i) * N, counts[LANE], ends + (to + m + i) * OF_ONE);
    memcpy(steps + to * 4, w->steps + from * 4, n * 4 * sizeof(double));
  }
}

void members_release(Walk *k) {
  if (!k->workers) return;
  for (int64_t i = 0; i < k->crew.threads; i++) {
    Walker *w = k->workers + i;
    free(w->stops), free((void *)w->tensors), free(w->places), free(w->saved), free(w->start);
    free(w->ends), free(w->steps);
  }
  free(k->workers);
  k->workers = 0;
}

typedef struct {
  Sweep s;
  Noise noise;
  uint64_t seeds[SEEDS];
  const REAL **tensors;
  REAL *start_bar, *ends, *ends_bar, *saved_bar, *last_bar;
  int64_t chunk, next, last, busy, status;
} Returner;

typedef struct {
  Crew crew;
  double seconds;
  const double *steps, *places;
  const REAL *ends, *saved_bar, *ends_bar, *last_bar;
  const int64_t *offsets, *counts;
  REAL *start_bar, *packed_bar; /* packed_bar: by chunks */
  REAL *const *own_bar;
  int64_t *costs; /* (members, 3): evaluations, pullbacks, steps */
  int64_t chunk, longest; /* groups of a chunk; steps of the member that has most */
  Returner *workers;
} Return;

/* Rows of members side by side; the cotangents of those that fill a group are zeros. */
static const REAL *psn_put_lanes(const int64_t *rows, const REAL *of, const int64_t *offsets,
                                 int64_t stride, int64_t count, int bars, REAL *into) {
  if (!of) return 0;
  LANES_ALL {
    int64_t m = psn_member(rows, l);
    const REAL *from = of + (offsets ? offsets[m] + m : m * stride) * OF_ONE;
    int empty = bars && rows[l] < 0;
    for (int64_t n = 0; n < count; n++, from += OF_ONE)
      FOR_ONE into[n * N + i * SEEDS + l] = empty ? 0 : from[i];
  }
  return into;
}

static void psn_begin_return(const Return *b, Returner *w, int64_t g) {
  const Crew *c = &b->crew;
  const int64_t *rows = c->rows + g * SEEDS, *offsets = b->offsets;
  Sweep *s = &w->s;
  int64_t m = psn_member(rows, 0), times = c->save_count, count = b->counts[m * COUNTS + ACCEPTED];
  REAL *room = c->memory + (w - b->workers) * c->memory_stride;
  *s = (Sweep){.t0 = c->t0[m], .t1 = c->t1[m], .seconds = b->seconds, .n = count, .count = count};
  s->q = b->counts[m * COUNTS + REACHED] - 1;
  s->steps = b->steps + 4 * offsets[m], s->places = b->places + 2 * m * times;
  s->ends = psn_put_lanes(rows, b->ends, offsets, 0, count + 1, 0, w->ends);
  s->ends_bar = psn_put_lanes(rows, b->ends_bar, offsets, 0, count + 1, 1, w->ends_bar);
  s->saved_bar = psn_put_lanes(rows, b->saved_bar, 0, times, s->q + 1, 1, w->saved_bar);
  s->last_bar = psn_put_lanes(rows, b->last_bar, 0, 1, 1, 1, w->last_bar);
  s->start_bar = w->start_bar;
  s->packed = psn_packed_of(c, rows, w->tensors, room);
  s->packed_bar = c->packed ? b->packed_bar + w->chunk * ALL_PACKED : room + CREW_PACKED;
  s->memory = room + 2 * CREW_PACKED;
  w->noise = psn_path_of(c, rows, w->seeds), s->noise = &w->noise;
  memset(s->start_bar, 0, N * sizeof(REAL));
  if (!c->packed) memset(s->packed_bar, 0, ALL_PACKED * sizeof(REAL));
  w->busy = 1;
}

/* The cotangents of a group's starts and parameters: members' own ones to their rows, the others to
   those of the chunk. */
static void psn_end_return(const Return *b, Returner *w, int64_t g) {
  const Crew *c = &b->crew;
  const int64_t *rows = c->rows + g * SEEDS;
  Sweep *s = &w->s;
  LANES_ALL if (rows[l] >= 0) {
    int64_t *costs = b->costs + 3 * rows[l];
    costs[0] = s->evaluations, costs[1] = s->pulls, costs[2] = s->replayed;
    psn_spread_lane(s->start_bar, l, b->start_bar + rows[l] * OF_ONE);
  }
  w->busy = 0;
  if (c->packed) return;
  unpack_all(s->packed, s->packed_bar, psn_scratch(s));
  for (int64_t i = 0, own = 0; i < c->parameters; i++) {
    const REAL *bar = s->packed_bar + c->starts[i];
    REAL *sum = b->packed_bar + w->chunk * ALL_PACKED + c->starts[i];
    int64_t size = c->own[i];
    if (!size)
      for (int64_t e = 0; e < c->sizes[i]; e++) sum[e] += bar[e];
    else {
      LANES_ALL if (rows[l] >= 0)
        for (int64_t e = 0; e < size; e++) b->own_bar[own][rows[l] * size + e] = bar[e * SEEDS + l];
      own++;
    }
  }
}

static int psn_has_room_back(const Return *b, Returner *w) {
  const Crew *c = &b->crew;
  if (w->tensors) return 1;
  w->tensors = malloc((c->parameters + 1) * sizeof(REAL *));
  w->start_bar = malloc((2 * (b->longest + 2) + c->save_count + 2) * N * sizeof(REAL));
  w->ends = w->start_bar + N, w->ends_bar = w->ends + (b->longest + 1) * N;
  w->last_bar = w->ends_bar + (b->longest + 1) * N, w->saved_bar = w->last_bar + N;
  return w->tensors && w->start_bar;
}

static int64_t psn_return(Return *b, Returner *w) {
  Crew *c = &b->crew;
  double until = psn_seconds() + b->seconds;
  if (!psn_has_room_back(b, w)) return OUT_OF_MEMORY;
  do {
    if (!w->busy && w->next == w->last) {
      w->chunk = __atomic_fetch_add(&c->next, 1, __ATOMIC_RELAXED);
      w->next = w->chunk * b->chunk;
      if (w->next >= c->groups) return SUCCESS;
      w->last = w->next + b->chunk < c->groups ? w->next + b->chunk : c->groups;
    }
    if (!w->busy) psn_begin_return(b, w, w->next++);
    if (psn_sweep(&w->s) == RUNNING) break;
    psn_end_return(b, w, w->next - 1);
  } while (psn_seconds() < until);
  return RUNNING;
}

static int64_t psn_return_worker(void *job, int64_t i) {
  Return *b = job;
  Returner *w = b->workers + i;
  return w->status == RUNNING ? (w->status = psn_return(b, w)) : w->status;
}

int64_t members_sweep(Return *b) {
  if (!b->workers) b->workers = calloc(b->crew.threads, sizeof(Returner));
  if (!b->workers) return OUT_OF_MEMORY;
  int64_t status = psn_in_threads(b, psn_return_worker, b->crew.threads);
  for (int64_t i = 0; i < b->crew.threads; i++)
    if (b->workers[i].status == OUT_OF_MEMORY) return OUT_OF_MEMORY;
  return status;
}

/* The shared parameters' cotangents: those of all chunks, in their order. */
void members_finish(Return *b) {
  const Crew *c = &b->crew;
  int64_t chunks = (c->groups + b->chunk - 1) / b->chunk;
  for (int64_t i = 1; i < chunks; i++)
    for (int64_t e = 0; e < ALL_PACKED; e++) b->packed_bar[e] += b->packed_bar[i * ALL_PACKED + e];
  Sweep s = {.memory = c->memory + 2 * CREW_PACKED};
  if (c->packed) unpack_all(c->packed, b->packed_bar, psn_scratch(&s));
}

void members_let_go(Return *b) {
  if (!b->workers) return;
  for (int64_t i = 0; i < b->crew.threads; i++) free((void *)b->workers[i].tensors), free(b->workers[i].start_bar);
  free(b->workers);
  b->workers = 0;
}

void prepare(const REAL *const *tensors, REAL *packed) { pack_all(tensors, packed); }
