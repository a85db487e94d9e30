// What a generated kernel and the driver know of one another.
#pragma once
#include <cstdint>

using Index = int64_t;

// One parameter to be stepped. Its arrays are the parameter, the gradient and the slots, in this order; its axes are
// counted from the slowest in memory to the fastest.
struct Leaf {
  void* const* arrays;
  const Index* widths;        // bytes of an element, of every array
  const Index* strides;       // bytes from one row to the next, of every array of the parameter's size; 0 of others,
                              // SCATTERED where a row's elements do not follow one another
  const Index* const* steps;  // of every array of the parameter's size whose elements do not all follow one another:
                              // bytes from one element to the next along each axis; null of others
  const Index* sizes;         // the parameter's axes
  const double* scalars;      // the numbers that are made of hyper-parameters
  Index count, axes;          // arrays and axes
  Index rows, columns;
};
constexpr Index SCATTERED = -1;

// A leaf while it is stepped: where its arrays are, and room for what is computed on the way.
struct Work {
  const Leaf* leaf;
  void* const* arrays;    // the leaf's, or copies of a part of them
  const Index* strides;
  void* small;            // small values
  void* kept;             // one number for each row, kept from one pass to the next
  void* partial;          // the reductions of one chunk (in `between`: of all of them)
  void* buffer;           // what sweeps along a tile hand on, and what lanes are gathered in
  Index chunks, partial_bytes;
};

// A schedule as code. A vector has as many numbers as the leaf has columns (rows, where tiles are columns).
struct Schedule {
  Index passes;
  Index vectors, scalars;                  // small values
  Index partial_vectors, partial_scalars;  // reductions that every chunk adds to
  Index kept;                              // numbers that are kept for each row
  void (*const* between)(const Work&);     // before each pass, and at the end
  void (*const* begin)(const Work&);       // starts the reductions of a chunk, for each pass
  void (*const* pass)(const Work&, Index begin, Index end);
  Index (*buffer)(const Leaf&);            // bytes
};

// All code for one chain: the ways of going over memory that suit the shapes of leaves.
struct Kernel {
  Index element;          // bytes of a number that is computed with
  Index lanes;            // numbers in a vector register
  const Schedule* flat;       // every element for itself, begin and end count elements; null where elements depend on others
  const Schedule* rows;       // tiles of rows, lanes along the columns
  const Schedule* packed;     // tiles of rows that are shorter than a register; may be null
  const Schedule* columns;    // tiles of columns, for few and very long rows; may be null
};
