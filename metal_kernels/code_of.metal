// code = clip(round((x - low) / step), 0, top); a step of 0 marks a constant group
inline float code_of(float x, float low, float step, float top) {
  return step == 0 ? 0.0f : clamp(rint((x - low) / step), 0.0f, top);
}
