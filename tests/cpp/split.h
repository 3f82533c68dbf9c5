// Every kernel of an instruction set, in one piece and then item by item in several threads: the same bits.
#pragma once

#include "check.h"
#include "cpu/kernels/kernels.h"

void split(Checks&, const fastelbo::KernelTable&, bool quick);

// A kernel that is wrong on purpose: a sanitizer has to notice.
void split_broken(Checks&);
