/* Elementary functions of one number without branches, so that loops over them become vector code.

   Error at most 2 units in the last place of REAL (tests/torch_engine/test_native_functions.py).
   Reductions and the logarithm's series follow fdlibm (Sun Microsystems, freely distributable);
   exp is a Taylor polynomial on |r| <= log(2) / 2. NaN and infinities come out as they should: no
   flag that assumes their absence may be given to the compiler. */

#ifdef PSN_DOUBLE
typedef int64_t INT;
typedef uint64_t UINT; /* which wraps around where INT may not */
#define MANTISSA 52
#define BIAS 1023
#define ROUND 6755399441055744.0 /* 1.5 * 2^52: adding it leaves the nearest integer in the low bits */
#define LN2_HIGH 6.93147180369123816490e-01
#define LN2_LOW 1.90821492927058770002e-10
#define EXP_LOW -745.5
#define EXP_HIGH 709.9
#define TANH_FLAT 44.0
#define F(name) name
#else
typedef int32_t INT;
typedef uint32_t UINT;
#define MANTISSA 23
#define BIAS 127
#define ROUND 12582912.0f
#define LN2_HIGH 6.9313812256e-01f
#define LN2_LOW 9.0580006145e-06f
#define EXP_LOW -104.5f
#define EXP_HIGH 89.0f
#define TANH_FLAT 20.0f
#define F(name) name##f
#endif
#define LOG2E ((REAL)1.4426950408889634074)
#define PSN_INLINE static inline __attribute__((always_inline))

PSN_INLINE INT psn_bits(REAL x) { union { REAL x; INT i; } u = {x}; return u.i; }
PSN_INLINE REAL psn_real(INT i) { union { INT i; REAL x; } u = {i}; return u.x; }

/* 2^n, where rounded = n + ROUND and n is within the normal range. */
PSN_INLINE REAL psn_power_of_two(REAL rounded) {
  return psn_real((INT)(((UINT)psn_bits(rounded) + BIAS) << MANTISSA));
}

/* exp(r) - 1 for |r| <= log(2) / 2. */
PSN_INLINE REAL psn_expm1_small(REAL r) {
#ifdef PSN_DOUBLE
  REAL q = 1.0 / 6227020800;
  q = q * r + 1.0 / 479001600;
  q = q * r + 1.0 / 39916800;
  q = q * r + 1.0 / 3628800;
  q = q * r + 1.0 / 362880;
  q = q * r + 1.0 / 40320;
  q = q * r + 1.0 / 5040;
  q = q * r + 1.0 / 720;
#else
  REAL q = (REAL)(1.0 / 5040);
  q = q * r + (REAL)(1.0 / 720);
#endif
  q = q * r + (REAL)(1.0 / 120);
  q = q * r + (REAL)(1.0 / 24);
  q = q * r + (REAL)(1.0 / 6);
  q = q * r + (REAL)0.5;
  return r + r * r * q;
}

PSN_INLINE REAL psn_exp(REAL x) {
  REAL y = x < EXP_LOW ? EXP_LOW : x;
  y = y > EXP_HIGH ? EXP_HIGH : y;
  REAL n = (y * LOG2E + ROUND) - ROUND;
  REAL r = (y - n * LN2_HIGH) - n * LN2_LOW;
  /* In two factors: 2^n alone may leave the range where the product does not. */
  REAL half = n * (REAL)0.5 + ROUND;
  REAL first = psn_power_of_two(half), second = psn_power_of_two((n - (half - ROUND)) + ROUND);
  return (((REAL)1 + psn_expm1_small(r)) * first) * second;
}

PSN_INLINE REAL psn_expm1(REAL x) {
  REAL y = x < -TANH_FLAT ? -TANH_FLAT : x;
  y = y > EXP_HIGH ? EXP_HIGH : y;
  REAL n = (y * LOG2E + ROUND) - ROUND;
  REAL r = (y - n * LN2_HIGH) - n * LN2_LOW;
  REAL half = n * (REAL)0.5 + ROUND;
  REAL first = psn_power_of_two(half), second = psn_power_of_two((n - (half - ROUND)) + ROUND);
  REAL e = psn_expm1_small(r);
  /* 2^n e + (2^n - 1), with the factor that could overflow last. */
  REAL inverse = ((REAL)1 / first) / second;
  REAL large = ((e + ((REAL)1 - inverse)) * first) * second;
  REAL scale = first * second;
  REAL small = scale * e + (scale - (REAL)1);
  REAL out = n > (REAL)(MANTISSA + 4) ? large : small;
  return x == 0 ? x : out; /* -0 stays */
}

#ifdef PSN_DOUBLE
PSN_INLINE REAL psn_tanh(REAL x) {
  REAL y = (REAL)-2 * F(__builtin_fabs)(x);
  y = y < -TANH_FLAT ? -TANH_FLAT : y;
  REAL n = (y * LOG2E + ROUND);
  REAL scale = psn_power_of_two(n);
  n -= ROUND;
  REAL e = psn_expm1_small((y - n * LN2_HIGH) - n * LN2_LOW);
  e = scale * e + (scale - (REAL)1);
  /* -e / (2 + e) with e = exp(-2 |x|) - 1; near 1 as its distance from 1. */
  int flat = e < (REAL)-0.667;
  REAL d = (REAL)2 + e, lost = e - (d - (REAL)2);
  REAL q = (flat ? (REAL)2 + (REAL)2 * e : -e) / d;
  q -= q * (lost * (REAL)0.61); /* what rounding took from d, over d, which is about 1.6 */
  return F(__builtin_copysign)(flat ? (REAL)1 - q : q, x);
}
#else
/* Near 0 by the series of Cephes (S. L. Moshier, freely distributable); beyond, as
   1 - 2 / (1 + 2^n 2^f), where 2^f is a minimax polynomial. Over all numbers the error is at most 1.6
   units in the last place. */
PSN_INLINE REAL psn_tanh(REAL x) {
  REAL y = F(__builtin_fabs)(x);
  y = y > 9.1f ? 9.1f : y;
  REAL s = y * y;
  REAL near = -5.70498872745e-3f;
  near = near * s + 2.06390887954e-2f;
  near = near * s - 5.37397155531e-2f;
  near = near * s + 1.33314422036e-1f;
  near = near * s - 3.33332819422e-1f;
  near = y + y * s * near;
  REAL rounded = y * (2 * LOG2E) + ROUND;
  REAL f = y * (2 * LOG2E) - (rounded - ROUND);
  REAL p = 1.5345812e-4f;
  p = p * f + 1.33999313e-3f;
  p = p * f + 9.61848896e-3f;
  p = p * f + 5.55032878e-2f;
  p = p * f + 2.40226469e-1f;
  p = p * f + 6.93147206e-1f;
  p = p * f + 1;
  REAL power = psn_real((INT)((UINT)psn_bits(p) + ((UINT)psn_bits(rounded) << MANTISSA)));
  REAL far = 1 - 2 / (1 + power);
  return F(__builtin_copysign)(y < 0.625f ? near : far, x);
}
#endif

PSN_INLINE REAL psn_sigmoid(REAL x) {
  /* From exp(-|x|), which never overflows. */
  REAL e = psn_exp(-F(__builtin_fabs)(x));
  REAL top = x < 0 ? e : (REAL)1;
  return top / ((REAL)1 + e);
}

/* Bits of x less those of sqrt(1/2), so that the exponent changes there. */
PSN_INLINE INT psn_bits_over_root(REAL x) {
  return (INT)((UINT)psn_bits(x) - (UINT)psn_bits((REAL)0.70710678118654752440));
}

/* log(2^k m) from f = m - 1 and a correction c that is added to f. */
PSN_INLINE REAL psn_log_series(REAL k, REAL f, REAL c) {
  REAL s = f / ((REAL)2 + f), z = s * s, h = (REAL)0.5 * f * f;
#ifdef PSN_DOUBLE
  REAL r = 1.479819860511658591e-01;
  r = r * z + 1.531383769920937332e-01;
  r = r * z + 1.818357216161805012e-01;
  r = r * z + 2.222219843214978396e-01;
  r = r * z + 2.857142874366239149e-01;
  r = r * z + 3.999999999940941908e-01;
  r = r * z + 6.666666666666735130e-01;
#else
  REAL r = 0.24279078841f;
  r = r * z + 0.28498786688f;
  r = r * z + 0.40000972152f;
  r = r * z + 0.66666662693f;
#endif
  r = r * z;
  return k * LN2_HIGH - ((h - (s * (h + r) + (k * LN2_LOW + c))) - f);
}

PSN_INLINE REAL psn_log(REAL x) {
  /* Subnormal numbers are brought into the normal range first. */
  REAL tiny = (REAL)((INT)1 << (MANTISSA + 2));
  int is_small = x < psn_real((INT)1 << MANTISSA);
  REAL y = is_small ? x * tiny : x;
  INT i = psn_bits_over_root(y);
  REAL k = (REAL)(i >> MANTISSA) - (is_small ? (REAL)(MANTISSA + 2) : (REAL)0);
  REAL m = psn_real((i & (((INT)1 << MANTISSA) - 1)) + psn_bits((REAL)0.70710678118654752440));
  REAL out = psn_log_series(k, m - (REAL)1, 0);
  out = x < 0 ? (REAL)NAN : out;
  out = x == 0 ? -(REAL)INFINITY : out;
  return x < (REAL)INFINITY ? out : x; /* infinity and NaN as they are */
}

PSN_INLINE REAL psn_log1p(REAL x) {
  REAL u = (REAL)1 + x;
  INT i = psn_bits_over_root(u);
  INT e = i >> MANTISSA;
  REAL k = (REAL)e;
  REAL m = psn_real((i & (((INT)1 << MANTISSA) - 1)) + psn_bits((REAL)0.70710678118654752440));
  REAL lost = e > 0 ? (REAL)1 - (u - x) : x - (u - (REAL)1);
  REAL out = psn_log_series(k, m - (REAL)1, lost / u);
  out = x < -1 ? (REAL)NAN : out;
  out = x == -1 ? -(REAL)INFINITY : out;
  out = x == 0 ? x : out;
  return x < (REAL)INFINITY ? out : x;
}

/* Sine and cosine for |x| <= SMALL_ANGLE: reduction by pi/2 in three parts, series of fdlibm. */
#define SMALL_ANGLE ((REAL)(sizeof(REAL) == 8 ? 1e5 : 1e3))
#ifdef PSN_DOUBLE
#define PIO2_1 1.57079632673412561417e+00
#define PIO2_2 6.07710050630396597660e-11
#define PIO2_3 2.02226624879595063154e-21
#else
#define PIO2_1 1.5703125f
#define PIO2_2 4.837512969970703125e-4f
#define PIO2_3 7.54978995489188e-8f
#endif

PSN_INLINE REAL psn_sine_series(REAL r) {
  REAL z = r * r;
#ifdef PSN_DOUBLE
  REAL q = 1.58969099521155010221e-10;
  q = q * z - 2.50507602534068634195e-08;
  q = q * z + 2.75573137070700676789e-06;
  q = q * z - 1.98412698298579493134e-04;
  q = q * z + 8.33333333332248946124e-03;
  q = q * z - 1.66666666666666324348e-01;
#else
  REAL q = 2.718311493989822e-6f;
  q = q * z - 1.98393348360966317347e-4f;
  q = q * z + 8.3333293858894631756e-3f;
  q = q * z - 0.166666666416265235595f;
#endif
  return r + r * z * q;
}

PSN_INLINE REAL psn_cosine_series(REAL r) {
  REAL z = r * r;
#ifdef PSN_DOUBLE
  REAL q = -1.13596475577881948265e-11;
  q = q * z + 2.08757232129817482790e-09;
  q = q * z - 2.75573143513906633035e-07;
  q = q * z + 2.48015872894767294178e-05;
  q = q * z - 1.38888888888741095749e-03;
  q = q * z + 4.16666666666666019037e-02;
#else
  REAL q = 2.43904487962774090654e-5f;
  q = q * z - 1.38867637746099294692e-3f;
  q = q * z + 4.16666233237390631894e-2f;
#endif
  REAL h = (REAL)0.5 * z, w = (REAL)1 - h;
  return w + ((((REAL)1 - w) - h) + z * z * q);
}

/* sin(x + quarter * pi / 2) */
PSN_INLINE REAL psn_sine_of_small(REAL x, INT quarter) {
  REAL rounded = x * (REAL)0.63661977236758134308 + ROUND;
  REAL n = rounded - ROUND;
  INT q = psn_bits(rounded) + quarter;
  REAL r = ((x - n * PIO2_1) - n * PIO2_2) - n * PIO2_3;
  REAL out = (q & 1) ? psn_cosine_series(r) : psn_sine_series(r);
  return (q & 2) ? -out : out;
}

/* Over arrays: angles that are too large for the short reduction go by the C library, one by one. */
static void psn_sines(int n, const REAL *x, REAL *y, INT quarter) {
  int large = 0;
  for (int i = 0; i < n; i++) large |= !(F(__builtin_fabs)(x[i]) <= SMALL_ANGLE);
#pragma omp simd
  for (int i = 0; i < n; i++) {
    REAL value = psn_sine_of_small(x[i], quarter);
    y[i] = x[i] == 0 && !quarter ? x[i] : value; /* -0 stays */
  }
  if (!large) return;
  for (int i = 0; i < n; i++)
    if (!(F(__builtin_fabs)(x[i]) <= SMALL_ANGLE)) y[i] = quarter ? F(cos)(x[i]) : F(sin)(x[i]);
}

PSN_INLINE REAL psn_relu(REAL x) { return x < 0 ? (REAL)0 : x; } /* NaN stays */
PSN_INLINE REAL psn_clamp(REAL x, REAL low, REAL high) {
  REAL y = x < low ? low : x;
  return y > high ? high : y;
}
PSN_INLINE REAL psn_softplus(REAL x, REAL beta, REAL threshold) {
  REAL z = x * beta;
  REAL bounded = z > threshold ? threshold : z;
  return z > threshold ? x : psn_log1p(psn_exp(bounded)) / beta;
}
PSN_INLINE REAL psn_elu(REAL x, REAL alpha, REAL scale, REAL input_scale) {
  REAL negative = x > 0 ? (REAL)0 : x;
  return x > 0 ? x * scale : psn_expm1(negative * input_scale) * (alpha * scale);
}
PSN_INLINE REAL psn_normal_cdf(REAL x) {
  return (REAL)0.5 * F(erfc)(-x * (REAL)0.70710678118654752440);
}

/* NaN wherever one of both is. */
PSN_INLINE REAL psn_maximum(REAL a, REAL b) { return a > b || a != a ? a : b; }
PSN_INLINE REAL psn_minimum(REAL a, REAL b) { return a < b || a != a ? a : b; }

/* What is left of a division; of the divisor's sign. */
PSN_INLINE REAL psn_remainder(REAL a, REAL b) {
  REAL r = F(fmod)(a, b);
  return r != 0 && (r < 0) != (b < 0) ? r + b : r;
}
PSN_INLINE REAL psn_angle_pull(REAL g, REAL side, REAL other) {
  REAL square = side * side + other * other;
  return square == 0 ? (REAL)0 : g * side / square;
}

PSN_INLINE REAL psn_silu_pull(REAL g, REAL x) {
  REAL s = psn_sigmoid(x);
  return g * s * (1 + x * (1 - s));
}
PSN_INLINE REAL psn_gelu_pull(REAL g, REAL x) {
  REAL density = (REAL)0.39894228040143267794 * psn_exp((REAL)-0.5 * x * x);
  return g * (psn_normal_cdf(x) + x * density);
}
PSN_INLINE REAL psn_gelu_tanh_pull(REAL g, REAL x, REAL inner, REAL slope) {
  REAL t = psn_tanh(inner);
  return g * ((REAL)0.5 * (1 + t) + (REAL)0.5 * x * (1 - t * t) * slope);
}
