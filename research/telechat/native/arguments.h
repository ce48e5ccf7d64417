// What MindSpore passes to an operator: its inputs, then its outputs.
#pragma once

#include <cstdint>
#include <vector>

namespace telechat {

typedef std::vector<int64_t> Shape;
typedef std::vector<Shape> Shapes;

inline Shape shape_of(int i, const int* ndims, int64_t** shapes) { return Shape(shapes[i], shapes[i] + ndims[i]); }

class Arguments {
 public:
  Arguments(void** params, const int* ndims, int64_t** shapes) : params_(params), ndims_(ndims), shapes_(shapes) {}

  float* floats(int i) const { return static_cast<float*>(params_[i]); }
  const int32_t* integers(int i) const { return static_cast<const int32_t*>(params_[i]); }

  // Length of axis `axis` of argument i; -1 is the last.
  int64_t length(int i, int axis) const { return shapes_[i][axis < 0 ? ndims_[i] + axis : axis]; }

  int64_t size(int i) const {
    int64_t all = 1;
    for (int axis = 0; axis < ndims_[i]; ++axis) all *= shapes_[i][axis];
    return all;
  }

  // Rows of argument i if all axes but the last are one.
  int64_t rows(int i) const {
    int64_t all = 1;
    for (int axis = 0; axis + 1 < ndims_[i]; ++axis) all *= shapes_[i][axis];
    return all;
  }

 private:
  void** params_;
  const int* ndims_;
  int64_t** shapes_;
};

}  // namespace telechat

// Heads of the two functions of an operator.
#define TELECHAT_OPERATOR(name) \
  extern "C" int name(int, void** params, int* ndims, int64_t** shapes, const char**, void*, void*)
#define TELECHAT_SHAPE(name) extern "C" telechat::Shape name##InferShape(int* ndims, int64_t** shapes, void*)
#define TELECHAT_SHAPES(name) extern "C" telechat::Shapes name##InferShape(int* ndims, int64_t** shapes, void*)
