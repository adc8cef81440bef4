// Chooses the instruction set, once, from what the processor and the operating system support.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace anyprec::cpu {

// Usable here, the best first.
std::vector<const Kernels*> available_kernels();

// The one called `name`, or the best if `name` is null or empty; throws std::runtime_error that
// lists the names if it is not available.
const Kernels& choose_kernels(const char* name);

}  // namespace anyprec::cpu
