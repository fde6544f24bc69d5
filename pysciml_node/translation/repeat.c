/* Whether a solve is one that was before, but for its state and the numbers of tensors: what was given
   for it, and what its field can reach.

   Like translation/again.c this needs neither Python's headers nor its library: `begin` is handed
   functions of the stable ABI. It goes through what is kept of fields: of each its watches, and in the
   memory of a watch what solves need, by what they are told apart by. Questions answer 1, 0, or -1 after
   an exception. */

#include <stdint.h>
#include <string.h>

typedef struct Object Object;
typedef intptr_t Size;

/* In the order of repeated.py. */
static struct {
  Object *(*in_dict)(Object *, Object *);
  Object *(*in_tuple)(Object *, Size);
  Object *(*in_list)(Object *, Size);
  Size (*length)(Object *);
  Object *(*attribute)(Object *, Object *);
  Object *(*type)(Object *);
  Object *(*call)(Object *);
  Object *(*call_with)(Object *, ...);
  Object *(*address)(void *);
  Object *(*pack)(Size, ...);
  double (*real)(Object *);
  Size (*number)(Object *);
  Object *(*new_list)(Size);
  int (*append)(Object *, Object *);
  int (*equal)(Object *, Object *, int);
  int (*next_of_dict)(Object *, Size *, Object **, Object **);
  void (*keep)(Object *);
  void (*let_go)(Object *);
  Object *none, *of_reals, *tspan, *spec, *p, *u0, *memory, *tensors, *shape, *version;
  Object *of_states, *is_inference, *no, *yes, *of_lists, *of_tuples, *of_dicts;
  Object *fields, *look, *repeated, *walked, *absent, *modes;
} py;

/* What `Repeated` of repeated.py holds. */
enum { START = 1, END, GIVEN, FORM, KEYS, SHAPES };

enum { EQUAL = 2 }; /* Py_EQ */

static int is(Object *found, Object *expected) {
  if (!found) return -1;
  py.let_go(found);
  return found == expected;
}

/* What is kept of a field: a function that gives it, its class, and its watches. */
static int is_kept(Object *kept, Object *field) {
  int same = is(py.type(field), py.in_tuple(kept, 1));
  return same == 1 ? is(py.call(py.in_tuple(kept, 0)), field) : same;
}

/* Whether a time is the number, to its last bit: zero has two signs. */
static int is_time(Object *t, Object *expected) {
  int real = is(py.type(t), py.of_reals);
  if (real < 1) return real;
  double time = py.real(t), other = py.real(expected);
  return !memcmp(&time, &other, sizeof time);
}

/* Whether a part of a state that is a plain tensor has the shape, and is not of inference mode. */
static int is_part(Object *x, Object *expected) {
  int plain = is(py.type(x), py.of_states);
  if (plain < 1) return plain < 0 ? -1 : 1; /* Python looks at others */
  Object *shape = py.attribute(x, py.shape);
  if (!shape) return -1;
  int same = py.equal(shape, expected, EQUAL);
  py.let_go(shape);
  return same == 1 ? is(py.call_with(py.is_inference, x, (Object *)0), py.no) : same;
}

/* Whether a dict has the parts of a state, of such names, in their order. */
static int are_parts(Object *u0, Object *keys, Object *shapes) {
  Object *key, *part;
  int same = py.length(u0) == py.length(keys);
  Size place = 0;
  for (Size i = 0; same == 1 && py.next_of_dict(u0, &place, &key, &part); i++) {
    Object *name = py.in_tuple(keys, i);
    if (key != name) same = py.equal(key, name, EQUAL);
    if (same == 1) same = is_part(part, py.in_tuple(shapes, i));
  }
  return same;
}

/* Whether a state has the parts that it should have; Python looks at those of other kinds. */
static int is_state(Object *u0, Object *keys, Object *shapes) {
  if (keys == py.none) return is_part(u0, py.in_tuple(shapes, 0));
  Object *kind = py.type(u0);
  if (!kind) return -1;
  py.let_go(kind);
  if (kind == py.of_dicts) return are_parts(u0, keys, shapes);
  int same = kind != py.of_tuples || py.length(u0) == py.length(shapes);
  for (Size i = 0; kind == py.of_tuples && same == 1 && i < py.length(shapes); i++)
    same = is_part(py.in_tuple(u0, i), py.in_tuple(shapes, i));
  return same;
}

/* Whether a problem is nothing but a field and a state, over the interval, with an extra argument if
   there was one. */
static int is_plain(Object *problem, Object *known) {
  for (Size i = 0; i < py.length(py.absent); i++)
    if (py.in_dict(problem, py.in_tuple(py.absent, i)) != py.none) return 0;
  int alone = py.in_dict(problem, py.p) == py.none;
  if (alone != (py.in_tuple(known, FORM) == py.none)) return 0;
  Object *span = py.in_dict(problem, py.tspan);
  int same = is_time(py.in_tuple(span, 0), py.in_tuple(known, START));
  if (same == 1) same = is_time(py.in_tuple(span, 1), py.in_tuple(known, END));
  if (same < 1) return same;
  return is_state(py.in_dict(problem, py.u0), py.in_tuple(known, KEYS), py.in_tuple(known, SHAPES));
}

/* Whether torch is in no mode that may be refused. */
static int is_ordinary(void) {
  for (Size i = 0; i < py.length(py.modes); i += 2) {
    int same = is(py.call(py.in_tuple(py.modes, i)), py.in_tuple(py.modes, i + 1));
    if (same < 1) return same;
  }
  return 1;
}

/* Whether the tensors that a function was not given are those of its surroundings. */
static int has(Object *held, Object *tensors, Object *known) {
  Size given = py.number(py.in_tuple(known, GIVEN)), count = py.length(held);
  int same = py.length(tensors) == given + count;
  for (Size i = 0; same && i < count; i++)
    same = py.in_list(tensors, given + i) == py.in_list(held, i);
  return same;
}

/* How often each of them has been changed in place, which torch does not count of some. */
static Object *versions_of(Object *held) {
  Size count = py.length(held);
  Object *versions = py.new_list(0);
  for (Size i = 0; versions && i < count; i++) {
    Object *version = py.attribute(py.in_list(held, i), py.version);
    int failed = !version || py.append(versions, version);
    if (version) py.let_go(version);
    if (!failed) continue;
    py.let_go(versions);
    versions = 0;
  }
  return versions;
}

/* What is known, the tensors, the surroundings, and the versions of the tensors that are theirs, if those
   are the same. */
static int find(Object *known, Object *tensors, Object *walked, Object **found) {
  Object *held = py.attribute(walked, py.tensors);
  if (!held) return -1;
  int same = has(held, tensors, known);
  Object *versions = same ? versions_of(held) : 0;
  if (versions) *found = py.pack(4, known, tensors, walked, versions);
  if (same && !*found) same = -1;
  if (versions) py.let_go(versions);
  py.let_go(held);
  return same;
}

/* The entry of a dict by a new key, which is borrowed; nothing after an exception too. */
static Object *entry(Object *dict, Object *key) {
  Object *found = key ? py.in_dict(dict, key) : 0;
  if (key) py.let_go(key);
  return found;
}

static Object *way_of(Object *problem, Object *options, Object *algorithm) {
  Object *spec = py.address(py.in_dict(problem, py.spec));
  Object *how = py.address(options), *by = py.address(algorithm);
  Object *way = spec && how && by ? py.pack(3, spec, how, by) : 0;
  if (spec) py.let_go(spec);
  if (how) py.let_go(how);
  if (by) py.let_go(by);
  return way;
}

/* What `find` finds of a watch, if nothing but its tensors has changed. */
static int look_at(Object *watch, Object *parts, Object *problem, Object *way, Object **found) {
  Object *memory = py.attribute(watch, py.memory);
  if (!memory) return -1;
  Object *noted = py.in_dict(memory, py.look), *ways = py.in_dict(memory, py.repeated);
  Object *walked = py.in_dict(memory, py.walked), *known = ways ? py.in_dict(ways, way) : 0;
  py.let_go(memory); /* the watch has it */
  if (!noted || !walked || !known) return 0;
  py.keep(noted); /* what is called here may exchange them, and so may other threads in its time */
  py.keep(walked);
  py.keep(known);
  int same = is_plain(problem, known);
  Object *tensors = same == 1 ? py.call_with(py.look, noted, parts, (Object *)0) : 0;
  if (same == 1) same = !tensors ? -1 : tensors == py.none ? 0 : find(known, tensors, walked, found);
  if (tensors) py.let_go(tensors);
  py.let_go(known);
  py.let_go(walked);
  py.let_go(noted);
  return same;
}

static int look(Object *watches, Object *const *given, Object **found) {
  Object *way = way_of(given[2], given[3], given[4]);
  int same = way ? 0 : -1;
  for (Size i = 0; same == 0 && i < py.length(watches); i++)
    same = look_at(py.in_tuple(watches, i), given[1], given[2], way, found);
  if (way) py.let_go(way);
  return same;
}

/* `repeat(anchor, parts, problem, options, algorithm)`: what is known, the tensors of the field,
   its surroundings, and the versions of their tensors; None where it is another solve. The problem is a
   dict. */
Object *repeat(Object *self, Object *const *given, Size count) {
  (void)self, (void)count;
  Object *found = 0, *kept = entry(py.fields, py.address(given[0]));
  int same = 0;
  if (kept) {
    py.keep(kept); /* what a look calls may have it forgotten */
    same = is_kept(kept, given[0]);
    if (same == 1) same = is_ordinary();
    if (same == 1) same = look(py.in_tuple(kept, 2), given, &found);
    py.let_go(kept);
  }
  if (same == 1) return found;
  if (same < 0) return 0;
  py.keep(py.none);
  return py.none;
}

/* What `_Given` of plans.py holds. */
enum { PLAN, VALUES, KINDS, ROWS, NAMES, SPEC, ASKED, FIRST, LAST };

/* Whether a dict has the very keys and values. */
static int has_values(Object *dict, Object *known) {
  Object *key, *value, *name, *expected;
  Size at = 0, place = 0;
  int same = py.length(dict) == py.length(known);
  while (same && py.next_of_dict(known, &place, &name, &expected))
    same = py.next_of_dict(dict, &at, &key, &value) && key == name && value == expected;
  return same;
}

/* Whether a list, a tuple or a dict has the very entries; of others Python asks. */
static int has_entries(Object *row, Object *known, Object *kind) {
  if (kind == py.of_dicts) return has_values(row, known);
  Object *(*at)(Object *, Size) = kind == py.of_lists ? py.in_list : py.in_tuple;
  if (kind != py.of_lists && kind != py.of_tuples) return 0;
  Size count = py.length(known);
  int same = py.length(row) == count;
  for (Size i = 0; same && i < count; i++) same = at(row, i) == at(known, i);
  return same;
}

/* Whether a value is the one in a place, or equal and of its kind. */
static int is_given(Object *value, Object *given, Size place) {
  Object *known = py.in_list(py.in_tuple(given, VALUES), place);
  Object *kind = py.in_tuple(py.in_tuple(given, KINDS), place);
  int same = is(py.type(value), kind);
  if (same < 1) return same;
  if (py.in_tuple(py.in_tuple(given, ROWS), place) == py.yes) return has_entries(value, known, kind);
  return value == known ? 1 : py.equal(value, known, EQUAL);
}

/* Whether the algorithm and the options are those that were given. */
static int are_given(Object *algorithm, Object *options, Object *given) {
  Object *names = py.in_tuple(given, NAMES), *name, *value;
  if (py.length(options) != py.length(names)) return 0;
  int same = is_given(algorithm, given, 0);
  Size place = 0;
  for (Size i = 0; same == 1 && py.next_of_dict(options, &place, &name, &value); i++)
    same = name == py.in_tuple(names, i) ? is_given(value, given, i + 1) : 0;
  return same;
}

/* The same for a problem of the structure over the interval, by the engine. */
static int is_recent(Object *given, Object *const *arguments) {
  Object *span = py.in_dict(arguments[1], py.tspan);
  if (py.in_dict(arguments[1], py.spec) != py.in_tuple(given, SPEC)) return 0;
  int same = is_time(py.in_tuple(span, 0), py.in_tuple(given, FIRST));
  if (same == 1) same = is_time(py.in_tuple(span, 1), py.in_tuple(given, LAST));
  if (same == 1) same = py.equal(arguments[4], py.in_tuple(given, ASKED), EQUAL);
  return same == 1 ? are_given(arguments[2], arguments[3], given) : same;
}

/* `recall(recent, problem, algorithm, options, engine)`: the plan of the first of a list that was given
   the same; None where there is none, or Python has to compare. The problem is a dict. */
Object *recall(Object *self, Object *const *arguments, Size count) {
  (void)self, (void)count;
  Object *plan = 0;
  int same = 0;
  for (Size i = 0; same == 0 && i < py.length(arguments[0]); i++) {
    Object *given = py.in_list(arguments[0], i);
    py.keep(given); /* what is compared may have the list changed */
    same = is_recent(given, arguments);
    if (same == 1) py.keep(plan = py.in_tuple(given, PLAN));
    py.let_go(given);
  }
  if (same < 0) return 0;
  if (!plan) py.keep(plan = py.none);
  return plan;
}

/* Receive what it needs. */
void begin(const void *const *functions) { memcpy(&py, functions, sizeof py); }
