/* SwiftPM wants one source file in a C target; the layouts and their asserts are in the header. */
#include "quire_layout.h"
