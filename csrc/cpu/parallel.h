// A parallel loop that runs on any pool: the caller takes part, and waits for claimed work only.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace anyprec::cpu {

// Calls body(i) for each i in 0..count. `schedule(fn)` hands fn to a pool with `threads` threads;
// the loop finishes even if the pool never runs it, so nested and concurrent loops can't deadlock.
// Helpers that start late find no index left and return without touching `body`.
template <typename Schedule, typename Body>
void parallel_for(int64_t count, int64_t threads, Schedule&& schedule, const Body& body) {
  if (count <= 1 || threads <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  auto work = [state, count, &body] {
    for (int64_t i; (i = state->next.fetch_add(1)) < count;) {
      body(i);
      if (state->done.fetch_add(1) + 1 == count) state->done.notify_one();
    }
  };
  int64_t helpers = (threads < count ? threads : count) - 1;
  for (int64_t t = 0; t < helpers; ++t) schedule(work);
  work();
  for (int64_t done; (done = state->done.load()) < count;) state->done.wait(done);
}

}  // namespace anyprec::cpu
