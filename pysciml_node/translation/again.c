/* The second look of watch.py at what a field reaches, question by question.

   This needs neither Python's headers nor its library: `begin` is handed functions of the stable ABI.
   Objects are compared by their addresses, which the watch's columns keep in use. Questions answer 1
   where all is as it was, 0 where something has changed, and -1 after an exception. Their order is that
   of `_noted` in again.py. */

#include <stdint.h>
#include <stdlib.h>

typedef struct Object Object;
typedef intptr_t Size;

/* What `_noted` notes: objects, which may be missing, and numbers. */
typedef union {
  Object *object;
  Size number;
} Word;

/* In the order of again.py. */
static struct {
  Object *(*get_item)(Object *, Object *);
  Object *(*get_attribute)(Object *, Object *);
  Object *(*type)(Object *);
  Object *(*call)(Object *);
  Object *(*iterate)(Object *);
  Object *(*next)(Object *);
  int (*next_of_dict)(Object *, Size *, Object **, Object **);
  int (*contains)(Object *, Object *);
  int (*is_true)(Object *);
  int (*equal)(Object *, Object *, int);
  Size (*length)(Object *);
  Object *(*part)(Object *, Size);
  const Word *(*bytes)(Object *);
  Object *(*new_list)(Size);
  int (*append)(Object *, Object *);
  Object *(*in_list)(Object *, Size);
  Object *(*failed)(void);
  void (*keep)(Object *);
  void (*let_go)(Object *);
  Object *none, *yes, *dtype, *shape, *device, *is_cpu, *layout, *requires_grad, *dict;
} py;

enum { EQUAL = 2 }; /* Py_EQ */

/* Whether what was found is the very object. */
static int is(Object *found, Object *expected) {
  if (!found) return -1;
  int same = found == expected;
  py.let_go(found);
  return same;
}

static int are_empty(const Word **at) {
  for (Size n = (*at)++->number; n > 0; n--) {
    int full = py.is_true((*at)++->object);
    if (full) return full < 0 ? -1 : 0;
  }
  return 1;
}

static int have_sizes(const Word **at) {
  for (Size n = (*at)++->number; n > 0; n--, *at += 2) {
    Size length = py.length((*at)[0].object);
    if (length != (*at)[1].number) return length < 0 ? -1 : 0;
  }
  return 1;
}

/* Keys of dicts in their order, each with its value or, where that is not looked at, nothing. */
static int have_entries(const Word **at) {
  for (Size n = (*at)++->number; n > 0; n--) {
    Object *dict = (*at)++->object, *key, *value;
    Size place = 0;
    for (Size count = (*at)++->number; count > 0; count--, *at += 2) {
      if (!py.next_of_dict(dict, &place, &key, &value)) return 0;
      if (key != (*at)[0].object || ((*at)[1].object && value != (*at)[1].object)) return 0;
    }
    if (py.next_of_dict(dict, &place, &key, &value)) return 0;
  }
  return 1;
}

/* Containers or objects, keys or names, and what stands there. */
static int stand(const Word **at, Object *(*get)(Object *, Object *)) {
  for (Size n = (*at)++->number; n > 0; n--, *at += 3) {
    int same = is(get((*at)[0].object, (*at)[1].object), (*at)[2].object);
    if (same < 1) return same;
  }
  return 1;
}

static int iterates(Object *iterator, const Word *keys, Size count) {
  for (Size i = 0; i < count; i++) {
    Object *key = py.next(iterator);
    if (!key) return py.failed() ? -1 : 0;
    if (!is(key, keys[i].object)) return 0;
  }
  return 1;
}

static int have_order(const Word **at) {
  for (Size n = (*at)++->number; n > 0; n--) {
    Object *iterator = py.iterate((*at)++->object);
    if (!iterator) return -1;
    Size count = (*at)++->number;
    int same = iterates(iterator, *at, count);
    py.let_go(iterator);
    if (same < 1) return same;
    *at += count;
  }
  return 1;
}

static int are_absent(const Word **at) {
  for (Size n = (*at)++->number; n > 0; n--, *at += 2) {
    int there = py.contains((*at)[0].object, (*at)[1].object);
    if (there) return there < 0 ? -1 : 0;
  }
  return 1;
}

static int append(Object *list, Object *x) {
  if (!x) return -1;
  int failed = py.append(list, x);
  py.let_go(x);
  return failed ? -1 : 1;
}

/* The tensors: first those that the function was given, then those at their places. */
static int find(const Word **at, Object *parts, Object *found) {
  for (Size n = (*at)++->number; n > 0; n--) {
    Object *x = py.part(parts, (*at)++->number);
    if (!x || py.append(found, x)) return -1;
  }
  for (Size n = (*at)++->number; n > 0; n--, *at += 2)
    if (append(found, py.get_item((*at)[0].object, (*at)[1].object)) < 0) return -1;
  return 1;
}

static int is_given(const Word **at, Object *parts, Object *found) {
  Size count = (*at)++->number;
  if (count < 0) return 1; /* the field is no function */
  if (py.length(parts) != count) return 0;
  for (Size i = 0; i < count; i++) {
    int same = is(py.type(py.part(parts, i)), (*at)++->object);
    if (same < 1) return same;
  }
  for (Size n = (*at)++->number; n > 0; n--, *at += 2) {
    int same = is(py.call((*at)[1].object), py.part(parts, (*at)[0].number));
    if (same < 1) return same;
  }
  for (Size n = (*at)++->number; n > 0; n--, *at += 2)
    if (py.part(parts, (*at)[0].number) != py.in_list(found, (*at)[1].number)) return 0;
  return 1;
}

static int are_repeated(const Word **at, Object *found) {
  for (Size n = (*at)++->number; n > 0; n--, *at += 3) {
    Object *x = py.get_item((*at)[0].object, (*at)[1].object);
    int same = is(x, py.in_list(found, (*at)[2].number));
    if (same < 1) return same;
  }
  return 1;
}

static int equals(Object *found, Object *expected) {
  if (!found) return -1;
  int same = found == expected ? 1 : py.equal(found, expected, EQUAL);
  py.let_go(found);
  return same;
}

/* A device is made anew for each that asks; most are the CPU, of which there is one. */
static int is_on(Object *x, Object *device) {
  if (device == py.yes) return is(py.get_attribute(x, py.is_cpu), py.yes);
  return equals(py.get_attribute(x, py.device), device);
}

/* What `describe` says of a tensor. */
static int is_described(const Word *as, Object *x) {
  int same = is(py.type(x), as[0].object);
  if (same == 1) same = is(py.get_attribute(x, py.dtype), as[1].object);
  if (same == 1) same = equals(py.get_attribute(x, py.shape), as[2].object);
  if (same == 1) same = is_on(x, as[3].object);
  if (same == 1) same = is(py.get_attribute(x, py.layout), as[4].object);
  if (same == 1 && as[5].object) same = is(py.get_attribute(x, py.requires_grad), as[5].object);
  if (same < 1) return same;
  Object *attributes = py.get_attribute(x, py.dict);
  if (!attributes) return -1;
  int full = py.is_true(attributes);
  py.let_go(attributes);
  return full < 0 ? -1 : full != as[6].number;
}

static int by_address(const void *a, const void *b) {
  uintptr_t x = *(const uintptr_t *)a, y = *(const uintptr_t *)b;
  return (x > y) - (x < y);
}

static int are_distinct(Object *found, Size count) {
  if (count < 2) return 1;
  Object **sorted = malloc(count * sizeof *sorted);
  if (!sorted) return 0;
  for (Size i = 0; i < count; i++) sorted[i] = py.in_list(found, i);
  qsort(sorted, count, sizeof *sorted, by_address);
  int distinct = 1;
  for (Size i = 1; i < count; i++) distinct &= sorted[i] != sorted[i - 1];
  free(sorted);
  return distinct;
}

static int are_described(const Word **at, Object *found) {
  Size count = (*at)++->number;
  if (py.length(found) != count) return 0;
  for (Size i = 0; i < count; i++, *at += 7) {
    int same = is_described(*at, py.in_list(found, i));
    if (same < 1) return same;
  }
  return are_distinct(found, count);
}

static int all_stands(const Word *at, Object *parts, Object *found) {
  int same = find(&at, parts, found);
  if (same == 1) same = is_given(&at, parts, found);
  if (same == 1) same = are_empty(&at);
  if (same == 1) same = have_sizes(&at);
  if (same == 1) same = have_entries(&at);
  if (same == 1) same = stand(&at, py.get_item);
  if (same == 1) same = stand(&at, py.get_attribute);
  if (same == 1) same = have_order(&at);
  if (same == 1) same = are_absent(&at);
  if (same == 1) same = are_repeated(&at, found);
  if (same == 1) same = are_described(&at, found);
  return same == 1 ? is(py.call(at[0].object), at[1].object) : same; /* the default dtype */
}

/* `look(noted, parts)`: the tensors that are there now; None where anything has changed. */
Object *look(Object *self, Object *const *arguments, Size count) {
  (void)self, (void)count;
  const Word *at = py.bytes(arguments[0]);
  Object *found = at ? py.new_list(0) : 0;
  if (!found) return 0;
  int same = all_stands(at, arguments[1], found);
  if (same == 1) return found;
  py.let_go(found);
  if (same < 0) return 0;
  py.keep(py.none);
  return py.none;
}

/* Receive what it needs. */
void begin(const void *const *functions) { __builtin_memcpy(&py, functions, sizeof py); }
