/* The rows of the engine bench: each is one kind of work that an execution engine does well or badly.
 *
 * A row is a function that does `operations` operations and returns a checksum of what it computed. The checksum depends on the number of
 * operations alone, so a wrong instruction anywhere shows as a wrong checksum; timing and checking run the same code. */
#ifndef ROWS_H
#define ROWS_H

#include <stddef.h>
#include <stdint.h>

struct row {
    const char *name;
    const char *operation; /* what one operation is */
    uint64_t (*run)(long operations);
    long check_operations; /* how many operations the checksum is taken over */
    int (*available)(void); /* null: everywhere */
};

extern const struct row integer_rows[];
extern const struct row vector_rows[];
extern const struct row memory_rows[];
extern const struct row kernel_rows[];

/* A generator of numbers that are the same everywhere (xorshift64*, Vigna 2016). */
static inline uint64_t next_number(uint64_t *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545f4914f6cdd1dull;
}

/* Folds a value into a checksum. */
static inline uint64_t fold(uint64_t sum, uint64_t value) {
    return (sum ^ value) * 0x9e3779b97f4a7c15ull + (sum >> 47);
}

/* Folds bytes into a checksum. */
uint64_t fold_bytes(uint64_t sum, const void *bytes, size_t length);
/* Ends the program with a sentence if the system refused. */
long must(const char *what, long result);
/* The path of this program. */
extern char own_path[];
/* Writes the fixed inputs of the programs that are rows. */
int write_inputs(const char *folder);

#endif
