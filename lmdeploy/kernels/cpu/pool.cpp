// The thread pool: one 64-bit word says which job, phase and chunk come next, so that a chunk is taken by one
// compare-and-swap and a thread that missed a job cannot touch the following one.
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <time.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "simd.h"

namespace lm {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kClosed = 255;            // phase of a job that has ended
constexpr int64_t kSpinNs = 200 * 1000;  // how long an idle worker looks for the next job before it sleeps
constexpr int kSpinsBeforeYield = 200;
constexpr int kSharedBuffers = 4;

// state = job number (24 bits) | phase (8) | next chunk (32)
uint64_t make_state(uint64_t job, int phase) { return (job & 0xffffffu) << 40 | static_cast<uint64_t>(phase) << 32; }
uint64_t job_of(uint64_t state) { return state >> 40; }
int phase_of(uint64_t state) { return static_cast<int>(state >> 32 & 0xff); }
int64_t chunk_of(uint64_t state) { return static_cast<int64_t>(state & 0xffffffffu); }

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<int64_t>(t.tv_sec) * 1000000000 + t.tv_nsec;
}

struct alignas(64) Pool {
  alignas(64) std::atomic<uint64_t> state{make_state(0, kClosed)};
  alignas(64) std::atomic<int64_t> done{0};
  // Written before `state` opens the job, read after a chunk of it was taken.
  alignas(64) std::atomic<int> phases{0};
  std::atomic<int64_t> totals[kMaxPhases] = {};
  std::atomic<ChunkFn> fn{nullptr};
  std::atomic<const void*> context{nullptr};
  std::atomic<int> width{1};  // workers numbered at or above it stay out of this job
  alignas(64) std::atomic<int> sleepers{0};
  pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
  int workers = 1;  // the caller is worker 0
  uint64_t job = 0;
};

pthread_mutex_t call_mutex = PTHREAD_MUTEX_INITIALIZER;
Pool* pool = nullptr;
bool in_child_handler_set = false;
struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
};
Buffer shared_buffers[kSharedBuffers];
struct ThreadBuffer : Buffer {
  ~ThreadBuffer() { std::free(data); }
};
thread_local ThreadBuffer own_buffer;

void* grow(Buffer& buffer, size_t bytes) {
  if (buffer.bytes < bytes) {
    std::free(buffer.data);
    buffer.bytes = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    if (posix_memalign(&buffer.data, 64, buffer.bytes) != 0) std::abort();
  }
  return buffer.data;
}

// Threads do not survive a fork; the child starts its own at its first job.
void forget_threads() {
  pool = nullptr;
  for (Buffer& buffer : shared_buffers) buffer = Buffer();
  call_mutex = PTHREAD_MUTEX_INITIALIZER;
}

// Work on one job until it is closed.
void work(Pool& p, uint64_t job) {
  int idle = 0;
  for (;;) {
    uint64_t state = p.state.load(std::memory_order_acquire);
    const int phase = phase_of(state);
    if (job_of(state) != (job & 0xffffffu) || phase == kClosed) return;
    const int64_t total = p.totals[phase].load(std::memory_order_relaxed);
    const int64_t chunk = chunk_of(state);
    if (chunk >= total) {  // the last chunks of the phase are running elsewhere
      pause();
      if (++idle > kSpinsBeforeYield) sched_yield();
      continue;
    }
    idle = 0;
    if (!p.state.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) continue;
    p.fn.load(std::memory_order_relaxed)(p.context.load(std::memory_order_relaxed), phase, chunk);
    if (p.done.fetch_add(1, std::memory_order_acq_rel) + 1 == total) {
      const bool last = phase + 1 == p.phases.load(std::memory_order_relaxed);
      p.done.store(0, std::memory_order_relaxed);
      p.state.store(make_state(job, last ? kClosed : phase + 1), std::memory_order_release);
    }
  }
}

// Look for a job after `seen`: spin for a moment, then sleep until one is announced.
uint64_t wait_for_job(Pool& p, uint64_t seen) {
  const int64_t give_up = now_ns() + kSpinNs;
  for (;;) {
    for (int i = 0; i < 64; i++) {
      const uint64_t job = job_of(p.state.load(std::memory_order_acquire));
      if (job != seen) return job;
      pause();
    }
    if (now_ns() > give_up) break;
    sched_yield();  // on a busy machine the caller may be waiting for this very processor
  }
  pthread_mutex_lock(&p.mutex);
  p.sleepers.fetch_add(1);
  uint64_t job = job_of(p.state.load());
  while (job == seen) {
    pthread_cond_wait(&p.wake, &p.mutex);
    job = job_of(p.state.load());
  }
  p.sleepers.fetch_sub(1);
  pthread_mutex_unlock(&p.mutex);
  return job;
}

struct WorkerStart {
  Pool* pool;
  int number;
};

void* worker_main(void* argument) {
  const WorkerStart start = *static_cast<WorkerStart*>(argument);
  delete static_cast<WorkerStart*>(argument);
  Pool& p = *start.pool;
  uint64_t seen = ~0ull;
  for (;;) {
    seen = wait_for_job(p, seen);
    if (start.number < p.width.load(std::memory_order_acquire)) work(p, seen);
  }
  return nullptr;
}

Pool& pool_with(int threads) {
  if (pool == nullptr) {
    if (!in_child_handler_set) {
      pthread_atfork(nullptr, nullptr, forget_threads);
      in_child_handler_set = true;
    }
    pool = new Pool();
  }
  for (; pool->workers < threads; pool->workers++) {
    pthread_t thread;
    auto* start = new WorkerStart{pool, pool->workers};
    if (pthread_create(&thread, nullptr, worker_main, start) != 0) {
      delete start;
      break;  // fewer threads do the same work
    }
    pthread_detach(thread);
  }
  return *pool;
}

}  // namespace

CallLock::CallLock() { pthread_mutex_lock(&call_mutex); }
CallLock::~CallLock() { pthread_mutex_unlock(&call_mutex); }

void* thread_buffer(size_t bytes) { return grow(own_buffer, bytes); }
void* shared_buffer(int slot, size_t bytes) { return grow(shared_buffers[slot], bytes); }

void run_job(int64_t wanted, int phases, const int64_t* totals, ChunkFn fn, const void* context) {
  const int threads = static_cast<int>(wanted < kMaxThreads ? wanted : kMaxThreads);
  int64_t most = 0;
  for (int phase = 0; phase < phases; phase++) most = totals[phase] > most ? totals[phase] : most;
  if (threads <= 1 || most <= 1) {
    for (int phase = 0; phase < phases; phase++)
      for (int64_t chunk = 0; chunk < totals[phase]; chunk++) fn(context, phase, chunk);
    return;
  }
  Pool& p = pool_with(threads);
  p.phases.store(phases, std::memory_order_relaxed);
  for (int phase = 0; phase < phases; phase++) p.totals[phase].store(totals[phase], std::memory_order_relaxed);
  p.fn.store(fn, std::memory_order_relaxed);
  p.context.store(context, std::memory_order_relaxed);
  p.width.store(threads, std::memory_order_relaxed);
  const uint64_t job = ++p.job & 0xffffffu;
  p.state.store(make_state(job, 0));
  if (p.sleepers.load() > 0) {
    pthread_mutex_lock(&p.mutex);
    pthread_cond_broadcast(&p.wake);
    pthread_mutex_unlock(&p.mutex);
  }
  work(p, job);
}

}  // namespace lm
