/* Kernel rows: the way into the kernel and back, processes, memory management, files. Their checksum counts what went right. */
#define _GNU_SOURCE
#include "rows.h"
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static uint64_t run_getpid(long operations) {
    uint64_t same = 0;
    long parent = getppid();
    for (long n = 0; n < operations; n++) same += syscall(SYS_getppid) == parent;
    return same;
}

static uint64_t run_read1(long operations) {
    uint64_t zeros = 0;
    int file = (int)must("open /dev/zero", open("/dev/zero", O_RDONLY));
    for (long n = 0; n < operations; n++) {
        char byte = 1;
        zeros += read(file, &byte, 1) == 1 && byte == 0;
    }
    close(file);
    return zeros;
}

static uint64_t run_stat(long operations) {
    uint64_t files = 0;
    struct stat facts;
    for (long n = 0; n < operations; n++) files += stat("/usr/bin/../lib/os-release", &facts) == 0 && S_ISREG(facts.st_mode);
    return files;
}

static int wait_for(pid_t child) {
    int status = -1;
    must("waitpid", waitpid(child, &status, 0));
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* One operation: a byte to another process and back, one higher. */
static uint64_t run_pipe(long operations) {
    int there[2], back[2];
    must("pipe", pipe(there));
    must("pipe", pipe(back));
    pid_t child = (pid_t)must("fork", fork());
    uint8_t byte = 0;
    if (child == 0) {
        close(there[1]);
        close(back[0]);
        while (read(there[0], &byte, 1) == 1) {
            byte++;
            if (write(back[1], &byte, 1) != 1) break;
        }
        _exit(0);
    }
    close(there[0]);
    close(back[1]);
    uint64_t right = 0;
    for (long n = 0; n < operations; n++) {
        byte = (uint8_t)n;
        must("write", write(there[1], &byte, 1));
        must("read", read(back[0], &byte, 1));
        right += byte == (uint8_t)(n + 1);
    }
    close(there[1]);
    close(back[0]);
    wait_for(child);
    return right;
}

static uint64_t run_yield(long operations) {
    uint64_t done = 0;
    for (long n = 0; n < operations; n++) done += sched_yield() == 0;
    return done;
}

static uint64_t run_fork(long operations) {
    uint64_t right = 0;
    for (long n = 0; n < operations; n++) {
        pid_t child = (pid_t)must("fork", fork());
        if (child == 0) _exit((int)(n & 63));
        right += wait_for(child) == (int)(n & 63);
    }
    return right;
}

static uint64_t spawn(long operations, const char *path, const char *argument) {
    uint64_t right = 0;
    for (long n = 0; n < operations; n++) {
        pid_t child = (pid_t)must("fork", fork());
        if (child == 0) {
            execl(path, path, argument, (char *)NULL);
            _exit(127);
        }
        right += wait_for(child) == 0;
    }
    return right;
}

static uint64_t run_forkexec(long operations) { return spawn(operations, own_path, "nothing"); }
static uint64_t run_forkexecdyn(long operations) { return spawn(operations, "/bin/true", NULL); }

/* Maps, touches every page, and unmaps; new pages are zero. */
static uint64_t touch(long operations, size_t bytes) {
    uint64_t zeros = 0;
    for (long n = 0; n < operations; n++) {
        char *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base == MAP_FAILED) must("mmap", -1);
        if (bytes > 4096) madvise(base, bytes, MADV_NOHUGEPAGE);
        for (size_t at = 0; at < bytes; at += 4096) zeros += base[at]++ == 0;
        munmap(base, bytes);
    }
    return zeros;
}

static uint64_t run_mmap1(long operations) { return touch(operations, 4096); }
static uint64_t run_fault256(long operations) { return touch(operations, 256 * 4096); }

static uint64_t run_file(long operations) {
    char path[64];
    uint64_t bytes = 0;
    snprintf(path, sizeof path, "/tmp/rows.%d", (int)getpid());
    for (long n = 0; n < operations; n++) {
        int file = (int)must("open a file in /tmp", open(path, O_CREAT | O_EXCL | O_RDWR, 0600));
        bytes += (uint64_t)must("write", write(file, path, sizeof path));
        close(file);
        must("unlink", unlink(path));
    }
    return bytes;
}

const struct row kernel_rows[] = {
    {"getpid", "a system call that does nothing", run_getpid, 100, NULL},
    {"read1", "a byte from /dev/zero", run_read1, 100, NULL},
    {"stat", "stat of a path of five parts", run_stat, 50, NULL},
    {"pipe", "a byte to another process and back", run_pipe, 50, NULL},
    {"yield", "sched_yield", run_yield, 50, NULL},
    {"fork", "fork, exit, wait", run_fork, 5, NULL},
    {"forkexec", "fork and exec of a static program", run_forkexec, 3, NULL},
    {"forkexecdyn", "fork and exec of /bin/true", run_forkexecdyn, 3, NULL},
    {"mmap1", "map, touch and unmap a page", run_mmap1, 20, NULL},
    {"fault256", "map, touch and unmap 256 pages", run_fault256, 2, NULL},
    {"file", "create, write 64 bytes, close, unlink", run_file, 20, NULL},
    {0},
};
