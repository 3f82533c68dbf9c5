// What sees torch, in one translation unit, as csrc/bindings.cpp.
#include "cuda/latent.cpp"
#include "cuda/likelihood.cpp"
#include "cuda/mixture.cpp"
#include "cuda/objective.cpp"
#include "cuda/ppca.cpp"
