/* What every loop over steps needs: how it ends, kinds of control, the clock. */

enum { RUNNING, FULL, SUCCESS, OUT_OF_STEPS, TOO_SMALL, UNSTABLE, OUT_OF_MEMORY, STOPPED, CHANGED };
enum { FIXED, PROPORTIONAL_INTEGRAL, DERIVATIVE };
#define SLIVER 1e-8
#define FAR 64

static double psn_seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

static double psn_larger(double a, double b) { return a > b ? a : b; }
static double psn_smaller(double a, double b) { return a < b ? a : b; }
