/* Calls of the loops from Python: a request is copied, told where tensors lie, and handed over.

   Like translation/again.c this needs neither Python's headers nor its library: `begin` is handed
   functions of the stable ABI. What `cross` does is said in Python by
   `_call` of crossing.py. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct Object Object;
typedef intptr_t Size;

/* In the order of crossing.py. */
static struct {
  const void *(*bytes)(Object *);
  Object *(*new_block)(const char *, Size);
  char *(*block)(Object *);
  Object *(*type)(Object *);
  Object *(*attribute)(Object *, Object *);
  Object *(*call)(Object *, Object *);
  Size (*number)(Object *);
  Object *(*failed)(void);
  int (*interrupted)(void);
  void *(*release)(void);
  void (*acquire)(void *);
  Size (*length)(Object *);
  Object *(*in_tuple)(Object *, Size);
  Object *(*in_list)(Object *, Size);
  int (*exchange)(Object *, Size, Size, Object *);
  int (*append)(Object *, Object *);
  Object *(*new_tuple)(Size);
  int (*put)(Object *, Size, Object *);
  Object *(*call_all)(Object *, Object *);
  Object *(*pack)(Size, ...);
  Object *(*of_size)(Size);
  int (*resize)(Object *, Size);
  void (*keep)(Object *);
  void (*let_go)(Object *);
  Object *none, *yes, *no, *of_numbers, *of_blocks, *dtype, *data_ptr, *is_contiguous, *is_neg;
  Object *contiguous, *new_empty;
} py;

enum { IN_REQUEST = -2, BEHIND = -1 };
enum { ALIGNED = 64 };
enum { RUNNING = 0, SUCCESS = 2 }; /* as in codes.h */

/* A place in the request that holds an address or a number: of what is given, by its number, behind
   the request, or in it; what is added; and whether it is a tensor made for the call. */
typedef struct {
  Size at, of, added, own;
} Hole;

/* What is written to a given tensor in the end: so many bytes, from a place behind the request. */
typedef struct {
  Size to, from, size;
} Result;

/* A function, the bytes of a block and of the request in it, and what the request lacks. One that has
   results is called until it has gone through. */
typedef struct {
  int64_t (*run)(void *);
  Size size, filled;
  Object *dtype;
  Size holes, results;
  Hole hole[];
} Call;

static const Result *results_of(const Call *call) { return (const Result *)(call->hole + call->holes); }

static char *aligned(char *block) {
  return (char *)(((uintptr_t)block + ALIGNED - 1) & ~(uintptr_t)(ALIGNED - 1));
}

/* Whether what was found is the very object; -1 after an exception. */
static int is(Object *found, Object *expected) {
  if (!found) return -1;
  py.let_go(found);
  return found == expected;
}

static int number(Object *x, Size *found) {
  *found = py.number(x);
  return *found == -1 && py.failed() ? -1 : 1;
}

/* Where a tensor lies. */
static int locate(Object *x, Size *found) {
  Object *address = py.call(py.data_ptr, x);
  if (!address) return -1;
  int known = number(address, found);
  py.let_go(address);
  return known;
}

/* The same, if it does as C reads it. */
static int lies(Object *x, Object *dtype, Size *found) {
  int as_read = is(py.attribute(x, py.dtype), dtype);
  if (as_read == 1) as_read = is(py.call(py.is_contiguous, x), py.yes);
  if (as_read == 1) as_read = is(py.call(py.is_neg, x), py.no);
  return as_read == 1 ? locate(x, found) : as_read;
}

static int find(Object *x, Object *dtype, int own, Size *found) {
  *found = 0;
  if (x == py.none) return 1;
  Object *kind = py.type(x);
  py.let_go(kind);
  if (kind == py.of_numbers) return number(x, found);
  if (kind != py.of_blocks) return own ? locate(x, found) : lies(x, dtype, found);
  *found = (Size)aligned(py.block(x));
  return 1;
}

static int fill(const Call *call, char *request, Object *const *given) {
  memcpy(request, results_of(call) + call->results, call->filled);
  for (Size i = 0; i < call->holes; i++) {
    Hole hole = call->hole[i];
    Size place = (Size)(hole.of == IN_REQUEST ? request : aligned(request));
    int known = hole.of < 0 ? 1 : find(given[hole.of], call->dtype, hole.own, &place);
    if (known < 1) return known;
    place += hole.added;
    memcpy(request + hole.at, &place, sizeof place);
  }
  return 1;
}

/* Run it, once or to its end, while other threads may go on. */
static int run(const Call *call, char *request, int to_end) {
  for (;;) {
    void *thread = py.release();
    int64_t status = call->run(request);
    py.acquire(thread);
    if (!to_end || status != RUNNING) return 1;
    if (py.interrupted()) return -1;
  }
}

/* Where results go to, which are made for the call; there are none for None. */
static int find_places(const Call *call, Object *const *given, Size *places) {
  for (Size i = 0; i < call->results; i++) {
    Object *x = given[results_of(call)[i].to];
    int known = x == py.none ? 1 : is(py.attribute(x, py.dtype), call->dtype);
    if (known == 1) known = find(x, call->dtype, 1, places + i);
    if (known < 1) return known;
  }
  return 1;
}

static void give(const Call *call, char *request, const Size *places) {
  const Result *result = results_of(call);
  for (Size i = 0; i < call->results; i++, result++)
    if (places[i]) memcpy((void *)places[i], aligned(request) + result->from, result->size);
}

/* Fill a request, have it run, and give the results away. */
static int go_through(const Call *call, char *request, Object *const *given, int to_end) {
  Size few[64], *places = call->results > 64 ? malloc(call->results * sizeof *places) : few;
  if (!places) return 0;
  int done = find_places(call, given, places);
  if (done == 1) done = fill(call, request, given);
  if (done == 1) done = run(call, request, to_end);
  if (done == 1) give(call, request, places);
  if (places != few) free(places);
  return done;
}

/* The block, in which the request is as the function has left it; nothing where a tensor does not lie as
   C reads it, or writes to it. `done` is -1 after an exception. */
static Object *block_of(const Call *call, Object *const *given, int to_end, int *done) {
  Object *block = call ? py.new_block(0, call->size) : 0;
  *done = block ? go_through(call, py.block(block), given, to_end) : -1;
  if (*done == 1) return block;
  if (block) py.let_go(block);
  return 0;
}

static Object *held(Object *x) {
  py.keep(x);
  return x;
}

static Object *none_unless(int failed) { return failed ? 0 : held(py.none); }

/* `cross(call, *given)`: the block; None where a tensor does not lie as C reads it. */
Object *cross(Object *self, Object *const *given, Size count) {
  (void)self, (void)count;
  int done;
  Object *block = block_of(py.bytes(given[0]), given + 1, 0, &done);
  return block ? block : none_unless(done < 0);
}

/* A new tensor like another one, of other sizes: torch reads numbers in half the time of a tuple. */
static Object *new_like(Object *x, Object *sizes) {
  Size count = py.length(sizes);
  Object *arguments = count ? py.new_tuple(count + 1) : py.pack(2, x, sizes);
  if (!arguments) return 0;
  if (count) py.put(arguments, 0, held(x)); /* which it takes over */
  for (Size i = 0; i < count; i++) py.put(arguments, i + 1, held(py.in_tuple(sizes, i)));
  Object *made = py.call_all(py.new_empty, arguments);
  py.let_go(arguments);
  return made;
}

/* Memory of a list; nothing where there is none. */
static Object *taken_from(Object *memories) {
  Size count = py.length(memories);
  if (count < 1) return 0;
  Object *memory = py.in_list(memories, count - 1);
  py.keep(memory);
  if (!py.exchange(memories, count - 1, count, 0)) return memory;
  py.let_go(memory);
  return 0;
}

/* A tensor, or None, as C reads it, so that only its place is left to find; nothing where it is of another
   kind, or after an exception. */
static Object *as_read(Object *x, Object *dtype) {
  if (x == py.none) return held(x);
  int known = is(py.attribute(x, py.dtype), dtype);
  if (known == 1) known = is(py.call(py.is_neg, x), py.no);
  int in_one = known == 1 ? is(py.call(py.is_contiguous, x), py.yes) : -1;
  return in_one < 0 ? 0 : in_one ? held(x) : py.call(py.contiguous, x);
}

/* Copy a part of a state, or of its cotangent, of which None is zero. */
static int put_part(Object *x, Object *dtype, char *to, Size size) {
  Object *read = as_read(x, dtype);
  if (!read) return py.failed() ? -1 : 0;
  Size place;
  int known = read == py.none ? 1 : locate(read, &place);
  if (read == py.none) memset(to, 0, size);
  else if (known == 1) memcpy(to, (void *)place, size);
  py.let_go(read);
  return known;
}

/* How what a loop leaves lies in its block: in the request how it has ended, whether its states are finite,
   the number of accepted steps, the addresses of the first state, of the last one and of those at the
   ends of steps, and the room for steps; where the steps begin behind it, and the states behind them, of
   so many entries and bytes; the bytes that are kept of a step; and those of each part of a state. */
typedef struct {
  Size status, finite, accepted, first, last, ends, room, steps, entries, row, slot;
  Size part[];
} Left;

enum { STEP = 32 };

/* Where the states begin behind so many steps. */
static Size ends_at(const Left *left, Size steps) {
  return (left->steps + STEP * steps + ALIGNED - 1) / ALIGNED * ALIGNED;
}

/* The states as a tensor like the initial one. */
static Object *ends_of(const Left *left, Object *u0, const char *from, Size accepted) {
  Size place;
  Object *rows = py.of_size(accepted + 1), *entries = py.of_size(left->entries);
  Object *sizes = rows && entries ? py.pack(2, rows, entries) : 0;
  if (rows) py.let_go(rows);
  if (entries) py.let_go(entries);
  Object *ends = sizes ? new_like(u0, sizes) : 0;
  if (sizes) py.let_go(sizes);
  if (!ends) return 0;
  if (locate(ends, &place) == 1) {
    memcpy((void *)place, from, (accepted + 1) * left->row);
    return ends;
  }
  py.let_go(ends);
  return 0;
}

/* Make a block no longer than what lies in it, which begins at an address that is aligned. */
static int shorten(Object *block, Size size) {
  char *before = py.block(block);
  Size start = aligned(before) - before;
  if (py.resize(block, size + ALIGNED)) return -1;
  char *after = py.block(block);
  if (aligned(after) - after != start) memmove(aligned(after), after + start, size);
  return 1;
}

static int64_t number_at(const char *request, Size place) {
  int64_t found;
  memcpy(&found, request + place, sizeof found);
  return found;
}

static int ended_well(const Left *left, const char *request) {
  return number_at(request, left->status) == SUCCESS && number_at(request, left->finite);
}

/* The parts of a state, and their shapes. */
typedef struct {
  Object *const *part, *shapes;
} State;

/* Where the last state lies, behind the room for those at the ends of steps. */
static char *last_of(const Left *left, char *request, Size room) {
  return aligned(request) + ends_at(left, room) + (room + 1) * left->row;
}

/* Put the parts one behind the other. */
static int gather(const Left *left, const State *state, Object *dtype, char *to) {
  int known = 1;
  for (Size i = 0; known == 1 && i < py.length(state->shapes); to += left->part[i++])
    known = put_part(state->part[i], dtype, to, left->part[i]);
  return known;
}

/* New tensors for the parts, in a tuple. */
static Object *scatter(const Left *left, const State *state, const char *from) {
  Size count = py.length(state->shapes), place;
  Object *parts = py.new_tuple(count);
  for (Size i = 0; parts && i < count; from += left->part[i++]) {
    Object *made = new_like(state->part[i], py.in_tuple(state->shapes, i));
    if (made && locate(made, &place) == 1) {
      memcpy((void *)place, from, left->part[i]);
      py.put(parts, i, made); /* which it takes over */
      continue;
    }
    if (made) py.let_go(made);
    py.let_go(parts);
    parts = 0;
  }
  return parts;
}

/* The block of a loop that has run to its end; nothing where that is not a good one. The first state lies
   where it leaves the last one. */
static Object *stepped(const Call *call, const Left *left, const State *state, Object **given, Size room,
                       int *done) {
  Size size = call->size + ends_at(left, room) - left->steps + (room + 2) * left->row;
  Object *block = py.new_block(0, size);
  *done = -1;
  if (!block) return 0;
  char *request = py.block(block), *last = last_of(left, request, room);
  char *ends = aligned(request) + ends_at(left, room);
  *done = fill(call, request, given);
  if (*done == 1) *done = gather(left, state, call->dtype, last);
  if (*done == 1) {
    memcpy(request + left->first, &last, sizeof last);
    memcpy(request + left->last, &last, sizeof last);
    memcpy(request + left->ends, &ends, sizeof ends);
    memcpy(request + left->room, &room, sizeof room);
    *done = run(call, request, 1);
  }
  if (*done == 1) *done = ended_well(left, request);
  if (*done == 1) return block;
  py.let_go(block);
  return 0;
}

enum { SAVED, MEMORY, KEPT, KEPT_ROOM, THREADS, PARAMETERS, MOST_GIVEN = 128 };

/* The block, the last state, the saved ones, where there is a sweep those at the ends of steps, what is
   kept for it, and how many steps there are. Those are behind the steps in the block otherwise. */
static Object *taken(const Call *call, const Left *left, const State *state, Object **given, Size room) {
  int done, swept = given[KEPT_ROOM] != py.none;
  Object *block = stepped(call, left, state, given, room, &done), *found = 0;
  if (!block) return none_unless(done < 0);
  char *request = py.block(block), *from = aligned(request) + ends_at(left, room);
  Object *last = scatter(left, state, last_of(left, request, room));
  Size accepted = number_at(request, left->accepted), size;
  Object *ends = swept ? ends_of(left, state->part[0], from, accepted) : held(py.none);
  size = ends_at(left, accepted);
  if (!swept) {
    memmove(aligned(request) + size, from, (accepted + 1) * left->row);
    size += (accepted + 1) * left->row;
  }
  Object *steps = last && ends && shorten(block, size) == 1 ? py.of_size(accepted) : 0;
  if (steps) {
    found = py.pack(6, block, last, given[SAVED], ends, given[KEPT], steps);
    py.let_go(steps);
  }
  if (last) py.let_go(last);
  if (ends) py.let_go(ends);
  py.let_go(block);
  return found;
}

/* What a loop is given beside its state and the parameters; the saved states have a shape. */
static int make(const Left *left, const State *state, Object *saved, Object **given) {
  Size room = 0;
  if (given[KEPT_ROOM] != py.none && number(given[KEPT_ROOM], &room) < 1) return 0;
  given[SAVED] = saved == py.none ? held(saved) : new_like(state->part[0], saved);
  if (!given[SAVED]) return 0;
  given[KEPT] = room ? py.new_block(0, room * left->slot + ALIGNED) : held(py.none);
  return given[KEPT] != 0;
}

/* `take_steps(call, left, memories, shapes, saved, room, kept_room, threads, *u0, *parameters)`: with room
   for so many steps the block, the parts of the last state, of these shapes, in a tuple, the saved states,
   of such a shape, and unless `kept_room` is None those at the ends of the steps and what is kept of so
   many steps, and the number of steps; None where `cross` gives None, the solve does not end well, or the
   list lacks memory for it. */
Object *take_steps(Object *self, Object *const *arguments, Size count) {
  (void)self;
  Object *memories = arguments[2], *found = 0;
  Object *given[MOST_GIVEN] = {[KEPT_ROOM] = arguments[6], [THREADS] = arguments[7]};
  State state = {arguments + 8, arguments[3]};
  if (count + PARAMETERS > MOST_GIVEN) return none_unless(0);
  for (Size i = 8 + py.length(state.shapes), to = PARAMETERS; i < count; i++) given[to++] = arguments[i];
  if (!(given[MEMORY] = taken_from(memories))) return none_unless(py.failed() != 0);
  const Call *call = py.bytes(arguments[0]);
  const Left *left = py.bytes(arguments[1]);
  Size room;
  if (call && left && number(arguments[5], &room) == 1 && make(left, &state, arguments[4], given))
    found = taken(call, left, &state, given, room);
  if (found && py.append(memories, given[MEMORY])) {
    py.let_go(found);
    found = 0;
  }
  for (Size i = SAVED; i <= KEPT; i++)
    if (given[i]) py.let_go(given[i]);
  return found;
}

enum { ENDS, BARS, SWEPT = 4, NUMBERS, LOG = 13, GRADIENTS };

/* New tensors for the gradients that are wanted, of shapes where there are any, in a tuple: those of the
   parts of the initial state, and of the parameters. */
static Object *gradients_of(Object *tensors, Object *shapes, Object *wanted, Object *start) {
  Size parts = py.length(start), count = parts + py.length(shapes);
  Object *found = py.new_tuple(count);
  for (Size i = 0; found && i < count; i++) {
    Object *shape = i < parts ? py.in_tuple(start, i) : py.in_tuple(shapes, i - parts);
    Object *like = py.in_tuple(tensors, i < parts ? 0 : i - parts + 1);
    int is_made = shape != py.none && py.in_tuple(wanted, i) == py.yes;
    Object *made = is_made ? new_like(like, shape) : held(py.none);
    if (made) {
      py.put(found, i, made); /* which it takes over */
      continue;
    }
    py.let_go(found);
    found = 0;
  }
  return found;
}

/* The block of a sweep, and the gradients that it has written. */
static Object *swept(const Call *call, Object **given, Object *gradients) {
  int done;
  Object *block = block_of(call, given, 1, &done);
  if (!block) return none_unless(done < 0);
  Object *found = py.pack(2, block, gradients);
  py.let_go(block);
  return found;
}

/* The cotangent of a state from those of its parts, whose gradients are the first results: a tensor, or a
   block, or None where there are none. Nothing where one of them is of another kind. */
static Object *bar_of(const Call *call, Object *parts) {
  Size count = py.length(parts), size = ALIGNED, arrived = 0;
  for (Size i = 0; i < count; i++) {
    arrived += py.in_tuple(parts, i) != py.none;
    size += results_of(call)[i].size;
  }
  if (count == 1 || !arrived) return as_read(py.in_tuple(parts, 0), call->dtype);
  Object *bar = py.new_block(0, size);
  char *to = bar ? aligned(py.block(bar)) : 0;
  for (Size i = 0; bar && i < count; to += results_of(call)[i++].size) {
    if (put_part(py.in_tuple(parts, i), call->dtype, to, results_of(call)[i].size) == 1) continue;
    py.let_go(bar);
    bar = 0;
  }
  return bar;
}

/* `pull_back(call, memories, shapes, start, wanted, tensors, saved, ends, last, *numbers, log)`: the block of
   a sweep to its end, and the gradients of the parts of the initial state, whose shapes `start` has, and of
   the parameters in a tuple; None as above. The states at the ends of the steps are the first of the
   tensors, and the cotangents of three kinds of states arrive, of the last one those of its parts. */
Object *pull_back(Object *self, Object *const *arguments, Size count) {
  (void)self, (void)count;
  Object *memories = arguments[1], *tensors = arguments[5], *found = 0, *gradients = 0;
  Object *given[MOST_GIVEN] = {[ENDS] = py.in_tuple(tensors, 0)};
  Size parameters = py.length(arguments[2]), wanted = parameters + py.length(arguments[3]);
  if (wanted + GRADIENTS > MOST_GIVEN || py.length(tensors) != parameters + 1) return none_unless(0);
  const Call *call = py.bytes(arguments[0]);
  int read = call != 0;
  for (Size i = 0; i < 3 && read; i++) {
    Object *x = arguments[6 + i];
    read = (given[BARS + i] = i < 2 ? as_read(x, call->dtype) : bar_of(call, x)) != 0;
  }
  if (read && (given[SWEPT] = taken_from(memories))) {
    for (Size i = NUMBERS; i <= LOG; i++) given[i] = arguments[4 + i];
    gradients = gradients_of(tensors, arguments[2], arguments[4], arguments[3]);
    for (Size i = 0; gradients && i < wanted; i++) given[GRADIENTS + i] = py.in_tuple(gradients, i);
    if (gradients) found = swept(call, given, gradients);
    if (found && py.append(memories, given[SWEPT])) {
      py.let_go(found);
      found = 0;
    }
  } else if (!py.failed()) found = none_unless(0);
  for (Size i = BARS; i <= SWEPT; i++)
    if (given[i]) py.let_go(given[i]);
  if (gradients) py.let_go(gradients);
  return found;
}

/* Receive what it needs. */
void begin(const void *const *functions) { memcpy(&py, functions, sizeof py); }
