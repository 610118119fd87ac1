// The exact gelu. Metal has no erf.

// erf(x), within 2e-7. Below 0.9: x times a polynomial in x^2. Above: 1 - exp(a polynomial in |x|),
// which is fitted to log(erfc(x)) up to 4, where float knows no difference from 1. Both minimax.
inline float erf(float x) {
  const float a = min(abs(x), 4.0f), s = x * x;
  float near = 8.53884048e-05f;
  near = fma(near, s, -8.18192784e-04f);
  near = fma(near, s, 5.2044359e-03f);
  near = fma(near, s, -2.68607531e-02f);
  near = fma(near, s, 1.12837195e-01f);
  near = fma(near, s, -3.76126349e-01f);
  near = fma(near, s, 1.12837923f);
  float far = -2.09094833e-05f;
  far = fma(far, a, 4.32302215e-04f);
  far = fma(far, a, -4.16052341e-03f);
  far = fma(far, a, 2.50914879e-02f);
  far = fma(far, a, -1.08236603e-01f);
  far = fma(far, a, -6.33386672e-01f);
  far = fma(far, a, -1.12949514f);
  far = fma(far, a, 1.70551037e-04f);
  return a < 0.9f ? x * near : copysign(1 - exp(far), x);
}

// gelu(x) = x (1 + erf(x / sqrt(2))) / 2
inline float gelu(float x) {
  return 0.5f * x * (1 + erf(x * 0.707106781f));
}
