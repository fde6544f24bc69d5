/* The Brownian motions of a solve as a function of its seed: pysciml_node/stochastic/brownian.py,
   virtual_tree.py and normals.py, for an interval that is halved, and its halves again. Integers are
   theirs bit for bit, numbers to a few units in the last place. A motion is the same to the last bit
   whenever it is asked for.

   The emitted code before this file gives PATHS, how many motions there are, and PATH_ROW; and SEEDS,
   of how many solves they are, each with a seed of its own: those of all lie side by side. */

/* One copy of it, so that it rounds alike wherever it is called. */
#define PSN_APART static __attribute__((noinline))

enum { DEPTH = 32 };
#define TICKS ((int64_t)1 << DEPTH) /* of the root interval */

typedef struct Noise {
  double t0, length; /* of the root interval */
  uint64_t seed;
  const uint64_t *seeds; /* of several */
  int64_t evaluations; /* of the diffusion */
  int64_t rejecting;   /* whether the last attempt of the loop was rejected */
  int64_t rooted, last; /* whether the whole interval is known; where the last motion began */
  int64_t cells[DEPTH]; /* by depth, where the cell begins that was split there last, and 1; or 0 */
  REAL *rows;
} Noise;

/* Motion over an interval of length h: its increments and its space-time Levy areas, by motion. */
typedef struct {
  double h;
  const REAL *w, *area;
} Motion;

/* Rows of a path: the whole interval; two motions that are put together; numbers; by depth the
   halves of a cell. Each row is followed by one for areas. */
enum { WHOLE_ROW = 0, BEFORE_ROW = 2, AFTER_ROW = 4, NUMBERS_ROW = 6, HALVES_ROW = 8 };
enum { PATH_MEMORY = (HALVES_ROW + 4 * DEPTH) * PATH_ROW };
#define PATH(n, i) ((n)->rows + (int64_t)(i) * PATH_ROW)

static uint64_t psn_mixed(uint64_t state, uint64_t word) {
  state += word + 0x9E3779B97F4A7C15u;
  state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9u;
  state = (state ^ (state >> 27)) * 0x94D049BB133111EBu;
  return state ^ (state >> 31);
}

/* SFC64 (C. Doty-Humphrey, PractRand). */
PSN_INLINE uint64_t psn_word(uint64_t *a, uint64_t *b, uint64_t *c, uint64_t count) {
  uint64_t word = *a + *b + count;
  *a = *b ^ (*b >> 11);
  *b = *c + (*c << 3);
  *c = ((*c << 24) | (*c >> 40)) + word;
  return word;
}

typedef union {
  INT bits;
  REAL x;
} Number;

/* Two standard normal numbers for each motion, by Box and Muller's formula: all first ones, and
   from PATHS on all second ones. */
PSN_APART void psn_normals(const Noise *n, int whole, int64_t start, int64_t end, Number *numbers) {
  uint64_t a[SEEDS], b[SEEDS], c[SEEDS], count = 1;
#pragma omp simd
  for (int l = 0; l < SEEDS; l++) {
    uint64_t place = psn_mixed(0, SEEDS == 1 ? n->seed : n->seeds[l]);
    if (whole) place = psn_mixed(place, 0);
    uint64_t hashed = psn_mixed(0, psn_mixed(psn_mixed(place, start), end));
    a[l] = psn_mixed(hashed, 0), b[l] = psn_mixed(hashed, 1), c[l] = psn_mixed(hashed, 2);
  }
  for (; count <= 12; count++) {
#pragma omp simd
    for (int l = 0; l < SEEDS; l++) psn_word(a + l, b + l, c + l, count);
  }
#ifdef PSN_DOUBLE
  for (int i = 0; i < 2 * PATHS; i += SEEDS, count++) {
#pragma omp simd
    for (int l = 0; l < SEEDS; l++) numbers[i + l].bits = (INT)psn_word(a + l, b + l, c + l, count);
  }
#else /* two of each word */
  for (int i = 0; i < 2 * PATHS; i += 2 * SEEDS, count++) {
#pragma omp simd
    for (int l = 0; l < SEEDS; l++) {
      uint64_t word = psn_word(a + l, b + l, c + l, count);
      numbers[i + l].bits = (INT)(UINT)word;
      numbers[i + SEEDS + l].bits = (INT)(UINT)(word >> 32);
    }
  }
#endif
  const REAL unit = 1 / (REAL)((UINT)1 << (8 * sizeof(REAL) - 1));
  const REAL turn = (REAL)(3.14159265358979323846 * (double)unit);
#pragma omp simd
  for (int i = 0; i < PATHS; i++) {
    /* In (0, 1]: half a unit keeps the logarithm finite. */
    REAL uniform = (F(__builtin_fabs)((REAL)numbers[i].bits) + (REAL)0.5) * unit;
    REAL angle = (REAL)numbers[PATHS + i].bits * turn;
    REAL radius = F(__builtin_sqrt)((REAL)-2 * psn_log(uniform));
    numbers[i].x = psn_sine_of_small(angle, 1) * radius;
    numbers[PATHS + i].x = psn_sine_of_small(angle, 0) * radius;
  }
}

/* The numbers of the whole interval and of cells lie together, without padding between them. */
static const REAL *psn_numbers(Noise *n, int whole, int64_t start, int64_t end) {
  Number *numbers = (Number *)PATH(n, NUMBERS_ROW);
  psn_normals(n, whole, start, end, numbers);
  return (const REAL *)numbers;
}

static double psn_tick(const Noise *n) { return 1 / ((double)TICKS / n->length); }

/* A time in ticks. */
static int64_t psn_place(const Noise *n, double t) {
  double place = rint((t - n->t0) * ((double)TICKS / n->length));
  return (int64_t)psn_smaller(psn_larger(place, 0), (double)TICKS);
}

static Motion psn_whole(Noise *n) {
  double h = (double)TICKS * psn_tick(n);
  REAL *w = PATH(n, WHOLE_ROW), *area = PATH(n, WHOLE_ROW + 1);
  if (!n->rooted) {
    const REAL *numbers = psn_numbers(n, 1, 0, TICKS);
    REAL deviation = (REAL)sqrt(h), of_area = (REAL)sqrt(h / 12);
    for (int i = 0; i < PATHS; i++) {
      w[i] = numbers[i] * deviation;
      area[i] = numbers[PATHS + i] * of_area;
    }
    n->rooted = 1;
  }
  return (Motion){h, w, area};
}

/* One half of a cell, which lies at `start` and has the motion `whole`; both are made at once. */
PSN_APART Motion psn_half(Noise *n, int depth, int64_t start, Motion whole, int second) {
  int64_t length = TICKS >> depth;
  REAL *w = PATH(n, HALVES_ROW + 4 * depth), *area = w + PATH_ROW;
  REAL *w2 = w + 2 * PATH_ROW, *area2 = w + 3 * PATH_ROW;
  if (n->cells[depth] != start + 1) {
    const REAL *numbers = psn_numbers(n, 0, start, start + length);
    double v = sqrt(whole.h) / 2;
    REAL of_w = (REAL)(v / 2), of_area = (REAL)(v / 4), of_both = (REAL)(v / sqrt(3.0) / 2);
#pragma omp simd
    for (int i = 0; i < PATHS; i++) {
      REAL n1 = numbers[i], n2 = numbers[PATHS + i] * of_both;
      REAL half = whole.area[i] * (REAL)0.25 - n1 * of_area;
      w[i] = whole.w[i] * (REAL)0.5 + whole.area[i] * (REAL)1.5 + n1 * of_w;
      w2[i] = whole.w[i] - w[i];
      area[i] = half + n2;
      area2[i] = half - n2;
    }
    n->cells[depth] = start + 1;
  }
  double h = (double)(length / 2) * psn_tick(n);
  return second ? (Motion){h, w2, area2} : (Motion){h, w, area};
}

/* An interval and the one that follows it, as one; its rows may be those of a part. */
PSN_APART Motion psn_then(Motion one, Motion two, REAL *w, REAL *area) {
  double h = one.h + two.h;
  REAL first = (REAL)(one.h / h), second = (REAL)(two.h / h);
#pragma omp simd
  for (int i = 0; i < PATHS; i++) {
    REAL a = one.w[i], b = two.w[i];
    area[i] = one.area[i] * first + two.area[i] * second + (a * second - b * first) / 2;
    w[i] = a + b;
  }
  return (Motion){h, w, area};
}

/* The motion from `from`, inside of a cell, to the cell's end. */
static Motion psn_suffix(Noise *n, int depth, int64_t start, Motion whole, int64_t from) {
  Motion found = {0, 0, 0};
  while (start < from) {
    int64_t middle = start + (TICKS >> (depth + 1));
    Motion second = psn_half(n, depth, start, whole, 1);
    if (from < middle) {
      REAL *w = PATH(n, BEFORE_ROW), *area = PATH(n, BEFORE_ROW + 1);
      /* Deeper splits keep their halves in other rows: the first one needs no copy. */
      found = found.w ? psn_then(second, found, w, area) : second;
      whole = psn_half(n, depth, start, whole, 0);
    } else
      whole = second, start = middle;
    depth++;
  }
  if (!found.w) return whole;
  return psn_then(whole, found, PATH(n, BEFORE_ROW), PATH(n, BEFORE_ROW + 1));
}

/* The motion from a cell's start to `to`, inside of it. */
static Motion psn_prefix(Noise *n, int depth, int64_t start, Motion whole, int64_t to) {
  Motion found = {0, 0, 0};
  int64_t end = start + (TICKS >> depth);
  while (to < end) {
    int64_t middle = start + (TICKS >> (depth + 1));
    if (to > middle) {
      Motion first = psn_half(n, depth, start, whole, 0);
      REAL *w = PATH(n, AFTER_ROW), *area = PATH(n, AFTER_ROW + 1);
      found = found.w ? psn_then(found, first, w, area) : first;
      whole = psn_half(n, depth, start, whole, 1), start = middle;
    } else
      whole = psn_half(n, depth, start, whole, 0), end = middle;
    depth++;
  }
  if (!found.w) return whole;
  return psn_then(found, whole, PATH(n, AFTER_ROW), PATH(n, AFTER_ROW + 1));
}

/* A motion that halves of other cells do not overwrite. */
static Motion psn_copied(Motion m, REAL *w, REAL *area) {
  if (m.w != w) {
    memcpy(w, m.w, PATHS * sizeof(REAL));
    memcpy(area, m.area, PATHS * sizeof(REAL));
  }
  return (Motion){m.h, w, area};
}

/* The motion from one time to another; it lasts until the next one is asked for. */
static Motion psn_motion(Noise *n, double t, double end) {
  int64_t from = psn_place(n, t), to = psn_place(n, end), start = 0;
  if (from >= to) { /* The path does not tell these times apart. */
    memset(PATH(n, BEFORE_ROW), 0, 2 * PATH_ROW * sizeof(REAL));
    return (Motion){0, PATH(n, BEFORE_ROW), PATH(n, BEFORE_ROW + 1)};
  }
  Motion cell = psn_whole(n);
  int forward = from >= n->last, depth = 0;
  n->last = from;
  for (;; depth++) {
    int64_t length = TICKS >> depth, middle = start + length / 2;
    if (from == start && to == start + length) return cell;
    if (from < middle && to > middle) {
      /* The end that the next interval begins with is looked for last: its branch is kept. */
      Motion first, second;
      Motion one = psn_half(n, depth, start, cell, 0), two = psn_half(n, depth, start, cell, 1);
      REAL *w = PATH(n, BEFORE_ROW), *area = PATH(n, BEFORE_ROW + 1);
      REAL *w2 = PATH(n, AFTER_ROW), *area2 = PATH(n, AFTER_ROW + 1);
      if (forward) {
        first = psn_copied(psn_suffix(n, depth + 1, start, one, from), w, area);
        second = psn_prefix(n, depth + 1, middle, two, to);
      } else {
        second = psn_copied(psn_prefix(n, depth + 1, middle, two, to), w2, area2);
        first = psn_suffix(n, depth + 1, start, one, from);
      }
      return psn_then(first, second, w, area);
    }
    int right = from >= middle;
    cell = psn_half(n, depth, start, cell, right);
    if (right) start = middle;
  }
}

/* The end t + h of a step moved to a time that is found quickly (brownian.py). */
static double psn_aligned(const Noise *n, double t, double h, int down) {
  double unit = ldexp(1.0, (int)floor(log2(h / n->length)) - 2);
  double place = (t - n->t0 + h) / n->length / unit;
  /* Rounded before it is added, as in Python: the path would tell the two times apart. */
  volatile double away = (down ? floor(place) : rint(place)) * unit * n->length;
  return n->t0 + away;
}
