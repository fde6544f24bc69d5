/* A batch in parts, where no row depends on another: each has memory of its own, as a batch of so many
   rows would have. The last one begins with rows of the one before it where these do not come out even,
   so that all parts are alike, and leaves these to that one. What a part does depends on no other, and
   sums are formed in the order of the parts: results are the same for any number of threads.

   The emitted code says how many PARTS there are and, of several, how many rows the batch (TOTAL) and a
   part (PART_ROWS) have, and of each of the PIECES of a state the entries of a row (WIDTHS) and of a row
   of the pieces before it (BEFORE). N are the entries of a part, ENTIRE those of the state. */

/* k: the derivatives at the stages of a step. */
typedef struct {
  REAL *memory, *k;
  int part;
} Part;

/* Entries of a part, and how far they lie from those of the whole state. */
typedef struct {
  int from, to;
  int64_t shift;
} Run;

#ifndef PARTS
#define PARTS 1
#endif
#if PARTS == 1
enum { PIECES = 1, ENTIRE = N };
#define field_in(first, ...) field(__VA_ARGS__)
#define pull_in(first, ...) pull(__VA_ARGS__)
#define IN_PARTS(team, work, job) work(job, 0)
#define WITH_TEAM(s, run) run

static inline Run psn_run(int part, int piece, int all) { return (Run){0, N, 0}; }
#else
#define IN_PARTS(team, work, job) psn_do(team, work, job)
#define WITH_TEAM(s, run)                                                                          \
  do {                                                                                             \
    Team team;                                                                                     \
    psn_open(&team, PARTS, (s)->threads);                                                          \
    (s)->team = &team;                                                                             \
    run;                                                                                           \
    psn_close(&team);                                                                              \
  } while (0)

/* The first row of a part. */
static inline int psn_first(int part) {
  return part == PARTS - 1 ? TOTAL - PART_ROWS : part * PART_ROWS;
}

/* A piece of a part: its own rows, or all. */
static inline Run psn_run(int part, int piece, int all) {
  int before = BEFORE[piece], width = WIDTHS[piece], start = before * PART_ROWS;
  int repeated = all || part < PARTS - 1 ? 0 : PARTS * PART_ROWS - TOTAL;
  int64_t whole = (int64_t)before * TOTAL + (int64_t)width * psn_first(part);
  return (Run){start + repeated * width, start + PART_ROWS * width, whole - start};
}
#endif

#define FOR_RUNS(part, all)                                                                        \
  for (int piece = 0; piece < PIECES; piece++)                                                     \
    for (Run run = psn_run(part, piece, all), *once = &run; once; once = 0)

/* A part of a state. */
static inline void psn_take_part(int part, const REAL *whole, REAL *x) {
  FOR_RUNS(part, 1) memcpy(x + run.from, whole + run.shift + run.from, (run.to - run.from) * sizeof(REAL));
}

/* Put a part where it belongs in a state. */
static inline void psn_put_part(int part, const REAL *x, REAL *whole) {
  FOR_RUNS(part, 0) memcpy(whole + run.shift + run.from, x + run.from, (run.to - run.from) * sizeof(REAL));
}
