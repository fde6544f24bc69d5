/* Events, and how their conditions are called; for every loop. */

/* An event: its condition, as it is called, and the values of it at the ends of a step. */
typedef struct {
  double (*condition)(double t, const REAL *u, const REAL *packed, REAL *memory);
  const REAL *packed;
  REAL *memory;
  double width;            /* of the bracket at which a search for it ends, in steps */
  int64_t direction, open; /* open: with which sign it leaves its start is not known */
  double before, after;
} Event;

#define AFTER 0.01   /* the share of the first step at which a condition that begins at zero has a sign */
#define BESIDE 0.001 /* where a line along the field is looked at on both sides of such a start */

static double psn_condition(const Event *e, double t, const REAL *u) {
  return e->condition(t, u, e->packed, e->memory);
}

static int psn_crosses(const Event *e, double before, double after) {
  int rising = before < 0 && 0 <= after, falling = before > 0 && 0 >= after;
  return (rising && e->direction >= 0) || (falling && e->direction <= 0);
}
