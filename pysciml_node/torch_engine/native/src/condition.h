/* The condition of an event, as Python hands it to a loop (events.h): one number, which a program
   computes as it does a field. */

double condition(double t, const REAL *u, const REAL *packed, REAL *memory) {
  REAL value[ROW];
  field((REAL)t, u, packed, value, memory);
  return (double)value[0];
}
void prepare(const REAL *const *tensors, REAL *packed) { pack(tensors, packed); }
