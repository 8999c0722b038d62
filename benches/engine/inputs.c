/* The inputs of the programs that are rows: the same bytes wherever they are made. */
#include "rows.h"
#include <stdio.h>
#include <stdlib.h>

static FILE *create(const char *folder, const char *name) {
    char path[512];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "w");
    if (!file) must(path, -1);
    return file;
}

/* Text of a few thousand made-up words with a little noise: it compresses about as well as prose does. */
static void write_text(const char *folder, const char *name, size_t bytes) {
    enum { WORDS = 2500 };
    static char words[WORDS][12];
    uint64_t seed = 41;
    for (int w = 0; w < WORDS; w++) {
        int length = 2 + (int)(next_number(&seed) >> 32) % 8;
        if (length < 2) length = 2 - length;
        for (int i = 0; i < length; i++) words[w][i] = "eeaatoinsrhldcumfpg"[(next_number(&seed) >> 40) % 19];
        words[w][length] = 0;
    }
    FILE *file = create(folder, name);
    size_t written = 0;
    while (written < bytes) {
        int count = 0;
        for (int i = 0; i < 11; i++) {
            uint64_t a = (next_number(&seed) >> 33) % WORDS, b = (next_number(&seed) >> 33) % WORDS;
            count += fprintf(file, "%s ", words[a < b ? a : b]); /* the smaller of two: some words are common */
        }
        count += fprintf(file, "%06x\n", (unsigned)(next_number(&seed) >> 40));
        written += (size_t)count;
    }
    fclose(file);
}

/* About 1500 lines of C with loops, switches, structures and calls. */
static void write_source(const char *folder) {
    FILE *file = create(folder, "unit.c");
    fputs("#include <string.h>\n#include <stdlib.h>\nstruct cell { int count, limit; struct cell *next; double weight[4]; };\n", file);
    for (int i = 0; i < 120; i++) {
        fprintf(file, "int part_%d(struct cell *cell, const char *text, int length) {\n    int total = %d;\n", i, i);
        fprintf(file, "    for (int at = 0; at < length; at++) {\n        switch ((text[at] + %d) %% 6) {\n", i % 11);
        fprintf(file, "        case 0: total += cell->count * %d; break;\n        case 1: total ^= cell->limit << %d; break;\n", i + 3, i % 7);
        fputs("        case 2: if (cell->next) cell = cell->next; break;\n", file);
        fputs("        case 3: cell->weight[at & 3] += total * 0.5; break;\n", file);
        fprintf(file, "        case 4: total = (int)strlen(text) + total %% %d; break;\n        default: total -= text[at];\n        }\n", i + 2);
        fprintf(file, "        if (total > %d) total = total / %d", 900 + i, i + 3);
        if (i) fprintf(file, " + part_%d(cell, text + 1, length / 2)", i - 1);
        fputs(";\n    }\n    return total;\n}\n", file);
    }
    fclose(file);
}

static void write_script(const char *folder) {
    FILE *file = create(folder, "script.py");
    fputs("def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n\n"
          "table = {}\nfor i in range(60000):\n    table[i % 911] = table.get(i % 911, 0) + i * 7\n"
          "text = ''.join(chr(97 + i * i % 26) for i in range(20000))\n"
          "vowels = sum(1 for c in text if c in 'aeiou')\n"
          "print(fibonacci(19), sum(table.values()), vowels, sum(x * x for x in range(60000)))\n",
          file);
    fclose(file);
}

int write_inputs(const char *folder) {
    write_text(folder, "text.bin", 8 << 20);
    write_text(folder, "text1m.bin", 1 << 20);
    write_source(folder);
    write_script(folder);
    return 0;
}
