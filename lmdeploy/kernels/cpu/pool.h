// Threads that share the chunks of a job. A thread that comes late, or not at all, holds nobody up.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace lm {

constexpr int kMaxPhases = 4;

using ChunkFn = void (*)(const void* context, int phase, int64_t chunk);

// Run `phases` phases of totals[phase] >= 1 chunks on up to `threads` threads, the caller's included. A phase starts when
// every chunk of the one before has ended.
void run_job(int64_t threads, int phases, const int64_t* totals, ChunkFn fn, const void* context);

template <class Body>
void parallel(int64_t threads, std::initializer_list<int64_t> totals, const Body& body) {
  run_job(threads, static_cast<int>(totals.size()), totals.begin(),
          [](const void* context, int phase, int64_t chunk) { (*static_cast<const Body*>(context))(phase, chunk); },
          &body);
}

// Buffers that only grow. Each thread has its own; the shared ones belong to the call that holds a CallLock.
void* thread_buffer(size_t bytes);
void* shared_buffer(int slot, size_t bytes);

// One at a time: shared buffers and the pool are used by one call.
struct CallLock {
  CallLock();
  ~CallLock();
  CallLock(const CallLock&) = delete;
  CallLock& operator=(const CallLock&) = delete;
};

template <class T>
T* thread_array(size_t count) { return static_cast<T*>(thread_buffer(count * sizeof(T))); }
template <class T>
T* shared_array(int slot, size_t count) { return static_cast<T*>(shared_buffer(slot, count * sizeof(T))); }

}  // namespace lm
