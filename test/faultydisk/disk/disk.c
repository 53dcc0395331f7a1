// This library makes a server's disk fail. The server preloads the library, so that
// it intercepts the C library's calls. The variable FAULTY_DISK is the path of a file
// with the fault. An empty file means no fault. The fault is a call (open, write, rename
// or space), a substring of the path of the affected files, and the effect (an errno, or
// kill).
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

// fails reports whether the call on the path must fail, and sets errno. It uses
// raw system calls, which are not intercepted.
static int fails(const char *call, const char *path) {
    const char *control = getenv("FAULTY_DISK");
    if (!control || !path) return 0;
    int saved = errno;
    int fd = (int)syscall(SYS_openat, AT_FDCWD, control, O_RDONLY | O_CLOEXEC);
    if (fd < 0) { errno = saved; return 0; }
    char rule[512];
    ssize_t n = syscall(SYS_read, fd, rule, sizeof rule - 1);
    syscall(SYS_close, fd);
    errno = saved;
    char what[16], part[400], happens[16];
    if (n <= 0) return 0;
    rule[n] = 0;
    if (sscanf(rule, "%15s %399s %15s", what, part, happens) != 3) return 0;
    if (strcmp(what, call) != 0 || !strstr(path, part)) return 0;
    if (strcmp(happens, "kill") == 0) {
        kill(getpid(), SIGKILL);
        pause();
    }
    errno = atoi(happens);
    return 1;
}

static int write_fails(int fd) {
    if (!getenv("FAULTY_DISK")) return 0;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    if (n <= 0) return 0;
    path[n] = 0;
    return fails("write", path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int rename(const char *from, const char *to) {
    return fails("rename", from) ? -1 : REAL(rename)(from, to);
}

ssize_t write(int fd, const void *data, size_t n) {
    return write_fails(fd) ? -1 : REAL(write)(fd, data, n);
}

ssize_t pwrite(int fd, const void *data, size_t n, off_t at) {
    return write_fails(fd) ? -1 : REAL(pwrite)(fd, data, n, at);
}

ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) {
    return write_fails(fd) ? -1 : REAL(pwrite64)(fd, data, n, at);
}

ssize_t pwritev(int fd, const struct iovec *parts, int n, off_t at) {
    return write_fails(fd) ? -1 : REAL(pwritev)(fd, parts, n, at);
}

ssize_t pwritev64(int fd, const struct iovec *parts, int n, off64_t at) {
    return write_fails(fd) ? -1 : REAL(pwritev64)(fd, parts, n, at);
}

int posix_fallocate(int fd, off_t at, off_t n) {
    return write_fails(fd) ? errno : REAL(posix_fallocate)(fd, at, n);
}

int posix_fallocate64(int fd, off64_t at, off64_t n) {
    return write_fails(fd) ? errno : REAL(posix_fallocate64)(fd, at, n);
}

// A server may check the free space before it writes.
int statvfs(const char *path, struct statvfs *space) {
    int result = REAL(statvfs)(path, space);
    if (result == 0 && fails("space", path)) space->f_bavail = space->f_bfree = 0;
    return result;
}

int statvfs64(const char *path, struct statvfs64 *space) {
    int result = REAL(statvfs64)(path, space);
    if (result == 0 && fails("space", path)) space->f_bavail = space->f_bfree = 0;
    return result;
}

#define OPEN(name)                                                              \
    int name(const char *path, int flags, ...) {                                \
        va_list more;                                                           \
        va_start(more, flags);                                                  \
        mode_t mode = (flags & (O_CREAT | __O_TMPFILE)) ? va_arg(more, mode_t) : 0; \
        va_end(more);                                                           \
        if ((flags & O_CREAT) && fails("open", path)) return -1;                \
        return REAL(name)(path, flags, mode);                                   \
    }
OPEN(open)
OPEN(open64)
