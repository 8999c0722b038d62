/* rows: times small pieces of work. Build: gcc -O2 -static -o rows *.c
 *
 *   rows [--batch-ms N] [NAME...]          every row, or these
 *   rows time REPEATS NAME PROGRAM...      a whole program as a row: its run time and the checksum of what it wrote
 *   rows inputs FOLDER                     the fixed inputs of the programs
 *
 * A line a row: "ROW name nanoseconds-per-operation checksum". The time is the median of three batches of at least N ms. */
#define _GNU_SOURCE
#include "rows.h"
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { BATCHES = 3, REPEATS_MAX = 15 };

char own_path[512];

static double now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e9 + (double)time.tv_nsec;
}

long must(const char *what, long result) {
    if (result >= 0) return result;
    fprintf(stderr, "rows: %s: %s\n", what, strerror(errno));
    exit(1);
}

uint64_t fold_bytes(uint64_t sum, const void *bytes, size_t length) {
    const uint8_t *at = bytes;
    for (size_t i = 0; i < length; i++) sum = fold(sum, at[i]);
    return sum;
}

static int by_value(const void *left, const void *right) {
    double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

static double median(double *values, int count) {
    qsort(values, (size_t)count, sizeof *values, by_value);
    return values[count / 2];
}

/* How many operations fill a batch: doubled until a run is long enough to judge by. */
static long operations_of_a_batch(const struct row *row, double batch_ns) {
    long operations = 1;
    for (;;) {
        double start = now_ns();
        row->run(operations);
        double taken = now_ns() - start;
        if (taken >= batch_ns) return operations;
        if (taken >= batch_ns / 4) return (long)((double)operations * batch_ns / taken) + 1;
        operations *= taken < batch_ns / 40 ? 8 : 2;
    }
}

static void measure(const struct row *row, double batch_ns) {
    if (row->available && !row->available()) {
        printf("SKIP %s this processor cannot do it\n", row->name);
        return;
    }
    uint64_t checksum = row->run(row->check_operations);
    long operations = operations_of_a_batch(row, batch_ns);
    double times[BATCHES];
    for (int batch = 0; batch < BATCHES; batch++) {
        double start = now_ns();
        row->run(operations);
        times[batch] = (now_ns() - start) / (double)operations;
    }
    printf("ROW %s %.2f %016llx\n", row->name, median(times, BATCHES), (unsigned long long)checksum);
    fflush(stdout);
}

/* Runs a program with its output in a pipe; returns the checksum of the output. */
static uint64_t run_program(char **arguments, int *status) {
    int output[2];
    must("pipe", pipe(output));
    pid_t child = (pid_t)must("fork", fork());
    if (child == 0) {
        dup2(output[1], 1);
        dup2((int)must("open /dev/null", open("/dev/null", O_WRONLY)), 2);
        close(output[0]);
        execvp(arguments[0], arguments);
        _exit(127);
    }
    close(output[1]);
    static uint8_t buffer[65536];
    uint64_t sum = 0, position = 0;
    for (ssize_t length; (length = read(output[0], buffer, sizeof buffer)) > 0; position += (uint64_t)length)
        /* A sample, by place in the whole output: the work is the program's, not ours, and reads may be of any length. */
        for (uint64_t at = -position & 15; at < (uint64_t)length; at += 16) sum = fold(sum, buffer[at]);
    sum = fold(sum, position);
    close(output[0]);
    must("waitpid", waitpid(child, status, 0));
    return sum;
}

static int time_program(int repeats, const char *name, char **arguments) {
    double times[REPEATS_MAX];
    uint64_t checksum = 0;
    if (repeats < 1 || repeats > REPEATS_MAX) repeats = 3;
    for (int n = 0; n < repeats; n++) {
        int status = -1;
        double start = now_ns();
        checksum = run_program(arguments, &status);
        times[n] = now_ns() - start;
        if (status != 0) {
            printf("FAIL %s status %d\n", name, status);
            return 1;
        }
    }
    printf("ROW %s %.0f %016llx\n", name, median(times, repeats), (unsigned long long)checksum);
    return 0;
}

static int wanted(const char *name, int count, char **names) {
    for (int i = 0; i < count; i++)
        if (strcmp(names[i], name) == 0) return 1;
    return count == 0;
}

int main(int count, char **arguments) {
    if (count > 1 && strcmp(arguments[1], "nothing") == 0) return 0;
    ssize_t length = readlink("/proc/self/exe", own_path, sizeof own_path - 1);
    if (length > 0) own_path[length] = 0;
    if (count > 2 && strcmp(arguments[1], "inputs") == 0) return write_inputs(arguments[2]);
    if (count > 4 && strcmp(arguments[1], "time") == 0) return time_program(atoi(arguments[2]), arguments[3], arguments + 4);
    double batch_ms = 150;
    int first = 1;
    if (count > 2 && strcmp(arguments[1], "--batch-ms") == 0) {
        batch_ms = atof(arguments[2]);
        first = 3;
    }
    const struct row *groups[] = {integer_rows, vector_rows, memory_rows, kernel_rows};
    for (size_t group = 0; group < sizeof groups / sizeof *groups; group++)
        for (const struct row *row = groups[group]; row->name; row++)
            if (wanted(row->name, count - first, arguments + first)) measure(row, batch_ms * 1e6);
    return 0;
}
