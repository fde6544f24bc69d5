/* One step of a stochastic Runge-Kutta method (pysciml_node/stochastic/step.py), for the loop and
   for its sweep.

   The emitted code before this file gives the sizes (N entries of what is stepped, of which the
   first ENTRIES are the state; MOTIONS columns of the diffusion; STAGES, and how many of them the
   step and its error estimate need), the nodes, the sums of stages (combine), the integrals of the
   motion, and both fields. */

/* Where the evaluations of a step lie: drifts and diffusions in rows, their arguments and the fields'
   own memory in slots of a stage's drift and a stage's diffusion, one after the other. Slots of no
   size are one slot. */
typedef struct {
  REAL *drifts, *diffusions, *integrals, *arguments, *work;
  int64_t argument_size, work_size;
} Stages;

#define DRIFT(k, i) ((k)->drifts + (i) * ROW)
#define DIFFUSION(k, i) ((k)->diffusions + (i) * MATRIX_ROW)
#define ARGUMENT(k, slot) ((k)->arguments + (slot) * (k)->argument_size)
#define WORK_OF(k, slot) ((k)->work + (slot) * (k)->work_size)
#define PACKED_OF_DIFFUSION(packed) ((packed) + PACKED)

/* A step with slots of their own for all that a pullback reads: of one that is kept for the sweep, or
   taken again in it. */
#define SLOT (STAGES * (ROW + MATRIX_ROW) + INTEGRALS + 2 * STAGES * (ROW + SOME_WORK))

static Stages psn_apart(REAL *rows) {
  REAL *diffusions = rows + STAGES * ROW, *integrals = diffusions + STAGES * MATRIX_ROW;
  REAL *arguments = integrals + INTEGRALS, *work = arguments + 2 * STAGES * ROW;
  return (Stages){rows, diffusions, integrals, arguments, work, ROW, SOME_WORK};
}

/* Drift and diffusion of the first stages, where they are not known, and of the others; and the end
   of the step, where it is asked for. */
static void psn_take(const Stages *k, const REAL *packed, double t, const REAL *u, Motion m,
                     int drifts, int diffusions, int known, REAL *end, int64_t *of_drift,
                     int64_t *of_diffusion) {
  REAL h = (REAL)m.h, root = (REAL)sqrt(m.h);
  const REAL *last = 0;
  integrals_of(m.h, m.w, m.area, k->integrals);
  for (int i = known; i < drifts || i < diffusions; i++) {
    REAL *x = 0;
    if (i < drifts && HAS_DRIFT[i]) {
      x = ARGUMENT(k, 2 * i);
      combine(2 * i, h, root, u, k->drifts, k->diffusions, k->integrals, x);
      field((REAL)(t + DRIFT_NODES[i] * m.h), x, packed, DRIFT(k, i), WORK_OF(k, 2 * i));
      (*of_drift)++;
      last = x;
    }
    if (i < diffusions) {
      if (!x || !SHARED[i]) {
        x = ARGUMENT(k, 2 * i + 1);
        combine(2 * i + 1, h, root, u, k->drifts, k->diffusions, k->integrals, x);
      }
      field_diffusion((REAL)(t + DIFFUSION_NODES[i] * m.h), x, PACKED_OF_DIFFUSION(packed),
                      DIFFUSION(k, i), WORK_OF(k, 2 * i + 1));
      (*of_diffusion)++;
    }
  }
  if (!end) return;
  combine(END, h, root, u, k->drifts, k->diffusions, k->integrals, end);
  if (CARRIES) memcpy(end + ENTRIES, last, ENTRIES * sizeof(REAL));
}
