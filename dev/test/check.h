// What the tests in C count: a line for each failure.
#ifndef CURIA_CHECK_H
#define CURIA_CHECK_H

#include <stdarg.h>
#include <stdio.h>

static int passed, failed;

__attribute__((format(printf, 2, 3))) static int check(int good, const char *format, ...) {
    passed += good != 0, failed += !good;
    if (good) return 1;
    va_list args;
    va_start(args, format);
    printf("failed: ");
    vprintf(format, args);
    printf("\n");
    va_end(args);
    return 0;
}

#endif
