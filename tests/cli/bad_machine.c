/* A machine that misbehaves, for one process: LD_PRELOAD before it, and a file that says how, mapped by both.

   The clock of the day jumps; writes to files below a directory fail; what is to be synced there waits. Reads, other
   files, sockets and the clocks that only count seconds are those of the machine. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct faults {
  volatile int64_t clock_offset_s;
  volatile int32_t write_errno;  /* 0: writes work */
  volatile int32_t syncs_wait;   /* as long as it is not 0 */
  volatile int32_t waiting;      /* syncs that wait now */
  char directory[PATH_MAX];
};

static struct faults *faults;

__attribute__((constructor)) static void start(void) {
  const char *path = getenv("KVCODEC_BAD_MACHINE");
  int file = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
  if (file < 0) return;
  void *mapped = mmap(NULL, sizeof *faults, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (mapped != MAP_FAILED) faults = mapped;
  close(file);
}

static int is_ours(int file) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t size = readlink(link, path, sizeof path - 1);
  if (size < 0) return 0;
  path[size] = 0;
  return strncmp(path, faults->directory, strlen(faults->directory)) == 0;
}

static int write_fails(int file) {
  int number = faults ? faults->write_errno : 0;
  if (!number || !is_ours(file)) return 0;
  errno = number;
  return 1;
}

static void wait_to_sync(int file) {
  if (!faults || !faults->syncs_wait || !is_ours(file)) return;
  __sync_fetch_and_add(&faults->waiting, 1);
  while (faults->syncs_wait) usleep(2000);
  __sync_fetch_and_sub(&faults->waiting, 1);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int clock_gettime(clockid_t clock, struct timespec *now) {
  static __typeof__(&clock_gettime) real;
  if (!real) real = REAL(clock_gettime);
  int status = real(clock, now);
  if (!status && faults && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
    now->tv_sec += faults->clock_offset_s;
  return status;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  static int (*real)(struct timeval *, void *);
  if (!real) real = (int (*)(struct timeval *, void *))dlsym(RTLD_NEXT, "gettimeofday");
  int status = real(now, zone);
  if (!status && faults) now->tv_sec += faults->clock_offset_s;
  return status;
}

time_t time(time_t *now) {
  struct timespec read;
  clock_gettime(CLOCK_REALTIME, &read);
  if (now) *now = read.tv_sec;
  return read.tv_sec;
}

ssize_t write(int file, const void *data, size_t size) {
  return write_fails(file) ? -1 : REAL(write)(file, data, size);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
  return write_fails(file) ? -1 : REAL(writev)(file, parts, count);
}

ssize_t pwrite(int file, const void *data, size_t size, off_t at) {
  return write_fails(file) ? -1 : REAL(pwrite)(file, data, size, at);
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
  return write_fails(file) ? -1 : REAL(pwrite64)(file, data, size, at);
}

int fdatasync(int file) {
  wait_to_sync(file);
  return write_fails(file) ? -1 : REAL(fdatasync)(file);
}

int fsync(int file) {
  wait_to_sync(file);
  return write_fails(file) ? -1 : REAL(fsync)(file);
}
