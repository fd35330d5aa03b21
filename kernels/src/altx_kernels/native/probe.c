/* How many threads a kernel gets that asks for n: what `altx doctor` tries. */
#include "altx.h"

EXPORT void FN(threads)(int64_t n, int64_t *got) {
#pragma omp parallel num_threads(n)
    if (omp_get_thread_num() == 0) *got = omp_get_num_threads();
}
