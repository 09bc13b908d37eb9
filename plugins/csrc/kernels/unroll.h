// What GCC has to be told in loops over small arrays of vectors.
#pragma once

// Without it GCC keeps the arrays in memory.
#if defined(__GNUC__)
#define CPM_UNROLL _Pragma("GCC unroll 16")
// Pins a running sum to its place: GCC would gather the products of many steps first, and spill them.
#define CPM_PIN(vector) asm("" : "+x"(vector))
#else
#define CPM_UNROLL
#define CPM_PIN(vector)
#endif
